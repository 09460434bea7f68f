"""`prunefront models`: the timm models that methods can be put into, and weights from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from prunefront.cli.options import AsJson
from prunefront.cli.output import note, print_fields, print_json, progress_bar


class _ListsByDefault(TyperGroup):
    """``prunefront models deit`` means ``prunefront models list deit``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ListsByDefault,
    help="List the models that methods can be put into, or download weights. Without a command: list.",
    epilog="Example: prunefront models deit",
)


@app.command("fetch")
def fetch_weights(
    url: Annotated[str, typer.Argument(help="https address of the weights.")],
    sha256: Annotated[str, typer.Option(metavar="HEX", help="SHA-256 that the file must have.")],
    out: Annotated[Path | None, typer.Option(help="File to write; the address's last part when left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download weights over https; they get their name only when their SHA-256 is the one expected.

    Example: prunefront models fetch https://example.org/evit.pth --sha256 9f86d081...
    """
    from prunefront.fetch import fetch

    with progress_bar("Downloading") as progress:
        path = fetch(url, out, sha256=sha256, progress=progress)
    document = {"file": str(path), "bytes": path.stat().st_size, "sha256": sha256.strip().lower()}
    if as_json:
        print_json(document)
    else:
        print_fields(document.items())


@app.command("list")
def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern with *; or one whole name.")] = "*",
    as_json: AsJson = False,
) -> None:
    """List the models that match; one exact name shows its blocks, tokens and MACs.

    Example: prunefront models list deit
    """
    import timm

    from prunefront.backbones import SUPPORTED_MODULES
    from prunefront.config import ModelSpec, PruneConfig
    from prunefront.errors import ModelError, UnknownNameError
    from prunefront.geometry import geometry_for

    names = sorted(name for module in SUPPORTED_MODULES for name in timm.list_models(module=module))
    if pattern in names:
        import prunefront

        geometry = geometry_for(ModelSpec(name=pattern))
        config = PruneConfig(model=ModelSpec(name=pattern), method="hybrid")
        fields = {
            "name": pattern,
            "img_size": list(geometry.img_size),
            "patch_size": list(geometry.patch_size),
            "blocks": geometry.depth,
            "width": geometry.embed_dim,
            "heads": geometry.num_heads,
            "patch_tokens": geometry.num_patch_tokens,
            "prefix_tokens": geometry.num_prefix_tokens,
            "class_token": geometry.has_class_token,
            "num_classes": geometry.num_classes,
            "macs": prunefront.macs(config),
        }
        if as_json:
            print_json(fields)
        else:
            print_fields((name.replace("_", " "), value) for name, value in fields.items())
        return
    if any(character in pattern for character in "*?["):
        found = timm.list_models(pattern)
    else:
        found = timm.list_models(f"*{pattern}*")
    found = [name for name in found if name in set(names)]
    if not found:
        if timm.is_model(pattern):
            raise ModelError(
                f"{pattern} is no plain or rotary Vision Transformer and no Swin; methods work on the models of timm's "
                "vision_transformer, eva and swin_transformer."
            )
        raise UnknownNameError.of("model", pattern, names, hint="prunefront models lists all.")
    if as_json:
        print_json(found)
        return
    for name in found:
        typer.echo(name)
    note(f"{len(found)} models; prunefront models NAME tells more. Parallel-branch and post-norm models are refused.")
