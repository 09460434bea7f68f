"""`prunefront config`: write, check and read the configs that `compress` takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunefront.cli.options import AsJson, ImgSize, ModelKwargs, NumClasses, model_spec
from prunefront.cli.output import note, print_fields, print_json, print_table, stdout, write_result
from prunefront.errors import ConfigError

if TYPE_CHECKING:
    from prunefront.config import PruneConfig

app = typer.Typer(help="Write, check and read configs.", no_args_is_help=True)

_SCHEDULE = "Schedule"


@app.command("new", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def new(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="timm model name; the repositories' own names work as well.")],
    method: Annotated[str | None, typer.Option(help="Method; see prunefront methods.")] = None,
    at: Annotated[
        str | None, typer.Option("--at", help="0-based blocks that reduce, e.g. 3,6,9.", rich_help_panel=_SCHEDULE)
    ] = None,
    op: Annotated[
        str | None,
        typer.Option("--op", help="Operation; needed where the method has several.", rich_help_panel=_SCHEDULE),
    ] = None,
    keep_ratio: Annotated[
        float | None,
        typer.Option(
            "--keep-ratio", "--keep-rate", help="Share of the tokens present that stays.", rich_help_panel=_SCHEDULE
        ),
    ] = None,
    cumulative_keep_ratio: Annotated[
        float | None,
        typer.Option(
            "--cumulative-keep-ratio", help="Share of the initial patches that stays.", rich_help_panel=_SCHEDULE
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Tokens left at each block.", rich_help_panel=_SCHEDULE)
    ] = None,
    remove: Annotated[
        int | None, typer.Option("--remove", help="Tokens removed at each block.", rich_help_panel=_SCHEDULE)
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            "--site",
            metavar="BLOCK:OP:AMOUNT=VALUE",
            help="One reduction, e.g. 3:fuse:keep_ratio=0.7; may be repeated.",
            rich_help_panel=_SCHEDULE,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="NAME=VALUE",
            help="Option of the method, e.g. threshold=7e-5.",
            rich_help_panel=_SCHEDULE,
        ),
    ] = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwarg: ModelKwargs = None,
    out: Annotated[Path | None, typer.Option(help="File to write (.json or .yaml) instead of printing.")] = None,
) -> None:
    """Write a config from a schedule, in our words or in those of the method's own repository.

    The repositories' own options are understood as they are: --base_keep_rate 0.7 --drop_loc "(3, 6, 9)" --fuse_token
    (EViT), --r_tokens 50 --pp_loc_list 3 6 9 --threshold 7e-5 (PPT), --r 8 (ToMe), --base_rate 0.7 (DynamicViT),
    --keep_ratio 0.7 --attn_ratio 0.3 (Tri-Level).

    Example: prunefront config new --model deit_small_patch16_224 --method evit --at 3,6,9 --op fuse --keep-ratio 0.7
    """
    from prunefront.cli.options import parse_pairs
    from prunefront.cli.spellings import check_spelling, read_spelling
    from prunefront.config import PruneConfig
    from prunefront.geometry import geometry_for
    from prunefront.official import official_sites
    from prunefront.official_files import timm_name
    from prunefront.registry import get_method

    spec = model_spec(timm_name(model), img_size, num_classes, model_kwarg)
    amounts = {
        "keep_ratio": keep_ratio,
        "cumulative_keep_ratio": cumulative_keep_ratio,
        "tokens": tokens,
        "remove": remove,
    }
    options = parse_pairs(option, "--option")
    sites: list[dict[str, Any]]
    if context.args:
        check_spelling(context.args, [name for parameter in context.command.params for name in parameter.opts])
        if at or site or any(value is not None for value in amounts.values()):
            raise ConfigError(
                f"One schedule takes either our options (--at, --site, --keep-ratio, ...) or the repository's, but got "
                f"both ({' '.join(context.args)}); leave one out."
            )
        method, hparams = read_spelling(context.args, method)
        geometry = geometry_for(spec)
        depth = geometry.depth
        outside = [
            block for name in ("drop_loc", "pp_loc_list") for block in hparams.get(name, ()) if not 0 <= block < depth
        ]
        if outside:
            raise ConfigError(f"{spec.name} has blocks 0 to {depth - 1}, but got {outside[0]}; name one of them.")
        depths = [stage.depth for stage in geometry.stages]
        sites, spelt_options = official_sites(method, hparams, depths or depth)
        options = spelt_options | options
    else:
        if method is None:
            raise ConfigError("Name the method with --method; prunefront methods lists them.")
        sites = [_parse_site(text) for text in site or ()]
        sites += _sites_at(at, op, get_method(method).ops, amounts)
    config = PruneConfig.model_validate({"model": spec, "method": method, "sites": sites, "options": options})
    config.content_hash()  # a block or an amount that the model does not have is refused here, not when it is used
    if out is None:
        typer.echo(config.to_json(), nl=False)
    else:
        write_result(out, config.to_yaml() if out.suffix in (".yaml", ".yml") else config.to_json())


@app.command("validate")
def validate(
    files: Annotated[list[Path], typer.Argument(help="Configs to check.")],
    as_json: AsJson = False,
) -> None:
    """Check that configs are well-formed and fit their models; the first that is not ends the command.

    Example: prunefront config validate best.json
    """
    from prunefront.config import load_config

    hashes = {str(path): load_config(path).content_hash() for path in files}
    if as_json:
        print_json([{"file": file, "content_hash": content_hash} for file, content_hash in hashes.items()])
        return
    for file in hashes:
        stdout().print(f"{file}: valid", markup=False)


@app.command("published")
def published(
    method: Annotated[str, typer.Argument(help="Method.")],
    model: Annotated[str, typer.Argument(help="timm model name.")],
    name: Annotated[str | None, typer.Argument(help="One schedule of the list, to print or write.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the schedule named.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the schedules of a method's paper and repository for a model, or print one of them.

    Example: prunefront config published evit deit_small_patch16_224
    """
    import prunefront
    from prunefront.errors import UnknownNameError

    configs = prunefront.published(method, model)
    if name is not None:
        if name not in configs:
            raise UnknownNameError.of(f"schedule of {method} for {model}", name, configs)
        if out is None:
            typer.echo(configs[name].to_json(), nl=False)
        else:
            write_result(out, configs[name].to_yaml() if out.suffix in (".yaml", ".yml") else configs[name].to_json())
        return
    if out is not None:
        raise ConfigError(f"--out writes one schedule; name it, for example {next(iter(configs), 'NAME')!r}.")
    if as_json:
        print_json({key: config.to_dict() for key, config in configs.items()})
        return
    if not configs:
        note(f"Nothing of {method} was published for models like {model}.")
        return
    rows = [(key, f"{prunefront.macs(config) / 1e9:.4f}", _summary(config)) for key, config in configs.items()]
    print_table(["schedule", "GMACs", "sites"], rows, title=f"{method} for {model}")


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="Config.")],
    as_json: AsJson = False,
) -> None:
    """Show what a config does: tokens per block, MACs, and the results it carries.

    Example: prunefront config show best.json
    """
    import prunefront

    config = prunefront.load_config(file)
    schedule = prunefront.token_counts(config)
    macs = prunefront.macs(config)
    dense_macs = prunefront.macs(config.evolve(sites=()))
    if as_json:
        print_json(
            {
                "config": config.to_dict(),
                "content_hash": config.content_hash(),
                "macs": macs,
                "dense_macs": dense_macs,
                "blocks": [
                    {"block": block.index, "tokens_in": block.tokens_in, "tokens_out": block.tokens_out}
                    for block in schedule.blocks
                ],
            }
        )
        return
    results = config.results
    fields: list[tuple[str, object]] = [
        ("model", config.model.name),
        ("method", config.method),
        ("options", ", ".join(f"{key}={value}" for key, value in config.options.items()) or None),
        ("MACs", f"{macs / 1e9:.4f} G per image, {macs / dense_macs:.0%} of dense"),
    ]
    if results is not None and results.top1 is not None:
        origin = f" on {results.eval.dataset} {results.eval.split}" if results.eval else ""
        fields.append(("top-1", f"{results.top1:.2%}{origin}"))
    for latency in results.latency if results is not None else ():
        fields.append(
            (
                "latency",
                f"measured {_ms(latency.measured_ms)}, predicted {_ms(latency.predicted_ms)}; batch "
                f"{latency.batch_size}, {latency.runtime}, {latency.dtype} on {latency.device}",
            )
        )
    print_fields(fields)
    rows = [
        (
            block.index,
            block.tokens_in,
            block.tokens_out,
            ", ".join(f"{step.op}: {step.kept} stay, {step.removed} go" for step in block.steps) or None,
        )
        for block in schedule.blocks
    ]
    print_table(["block", "tokens in", "tokens out", "reduction"], rows)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f} ms"


def _summary(config: PruneConfig) -> str:
    parts = []
    for site in config.sites:
        amount = next(
            f"{name}={getattr(site, name)}"
            for name in ("keep_ratio", "cumulative_keep_ratio", "tokens", "remove")
            if getattr(site, name) is not None
        )
        parts.append(f"{site.block}:{site.op}:{amount}")
    return " ".join(parts)


def _parse_site(text: str) -> dict[str, Any]:
    block, _, rest = text.partition(":")
    op, _, amount = rest.partition(":")
    name, _, value = amount.partition("=")
    try:
        number = int(value) if value.lstrip("+-").isdigit() else float(value)
        return {"block": int(block), "op": op, name.replace("-", "_"): number}
    except ValueError as error:
        raise ConfigError(
            f"--site expects BLOCK:OP:AMOUNT=VALUE such as 3:fuse:keep_ratio=0.7, but got {text!r}."
        ) from error


def parse_blocks(text: str) -> list[int]:
    """Read ``3,6,9``, ``3 6 9`` or ``(3, 6, 9)``.

    Raises:
        ConfigError: If it is none of these.
    """
    words = text.strip("()[] ").replace(",", " ").split()
    if not words or not all(word.isdigit() for word in words):
        raise ConfigError(f"--at expects 0-based blocks such as 3,6,9, but got {text!r}.")
    return [int(word) for word in words]


def _sites_at(
    at: str | None, op: str | None, ops: tuple[str, ...], amounts: dict[str, float | int | None]
) -> list[dict[str, Any]]:
    given = {name: value for name, value in amounts.items() if value is not None}
    if at is None:
        if given or op:
            raise ConfigError("Name the blocks that reduce with --at, for example --at 3,6,9.")
        return []
    blocks = parse_blocks(at)
    if len(given) != 1:
        raise ConfigError(
            "--at needs exactly one of --keep-ratio, --cumulative-keep-ratio, --tokens and --remove, but got "
            f"{len(given)}."
        )
    if op is None and len(ops) > 1:
        raise ConfigError(f"This method can {' or '.join(ops)}; choose one with --op.")
    return [{"block": block, "op": op or ops[0], **given} for block in blocks]
