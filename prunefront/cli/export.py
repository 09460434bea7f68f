"""`prunefront export`: models as ONNX or torch.export programs, and the parts of a latency table as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prunefront.cli.measure import CONFIG_SUFFIXES
from prunefront.cli.options import (
    AsJson,
    Checkpoint,
    DtypeOption,
    ImgSize,
    ModelKwargs,
    NumClasses,
    Sha256,
    model_spec,
    weights_file,
)
from prunefront.cli.output import note, print_fields, print_json, progress_bar
from prunefront.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from prunefront.config import ModelSpec, PruneConfig
    from prunefront.export import Agreement, Exported


def export(
    what: Annotated[
        str, typer.Argument(metavar="CONFIG|MODEL", help="Config, saved model (.safetensors), or timm model name.")
    ],
    to: Annotated[Literal["onnx", "program"], typer.Option(help="ONNX, or a torch.export program (.pt2).")],
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
    blocks: Annotated[
        Path | None,
        typer.Option(help="Instead of --out: folder for the parts of a latency table, to be timed on another device."),
    ] = None,
    checkpoint: Checkpoint = None,
    sha256: Sha256 = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Fixed batch size; any when left out (with --blocks: 1).")
    ] = None,
    dtype: DtypeOption = "fp32",
    opset: Annotated[
        int | None, typer.Option(help="Version of ONNX's operators, 18 or later; 20 when left out.")
    ] = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwarg: ModelKwargs = None,
    as_json: AsJson = False,
) -> None:
    """Write a model to a file that runs without prunefront, once its logits agree with the eager model's.

    Token counts are fixed, the batch is of any size. The file is loaded again and run on the CPU (ONNX Runtime,
    torch.export.load); where it does not agree, nothing is left. The config travels in its metadata. The model options
    (--img-size, --num-classes, --model-kwarg) apply to timm models; configs say themselves what they are.

    Example: prunefront export best.json --checkpoint best.safetensors --to onnx --out best.onnx

    Example: prunefront export best.json --to onnx --blocks parts --batch-size 1
    """
    if (out is None) == (blocks is None):
        raise ConfigError("Name what to write: either --out FILE for the model or --blocks FOLDER for its parts.")
    if to == "program" and (blocks is not None or opset is not None):
        raise ConfigError("--blocks and --opset are about ONNX. Use --to onnx, or leave them out.")
    from prunefront.export import DEFAULT_OPSET, export_onnx, export_program, require_onnx
    from prunefront.files import require_writable

    opset = DEFAULT_OPSET if opset is None else opset
    if blocks is not None:
        if checkpoint is not None:
            raise ConfigError("The parts of a table are timed with random weights; leave --checkpoint out.")
        spec = _config(what, img_size, num_classes, model_kwarg).model
        _export_blocks(spec, blocks, batch_size or 1, dtype, opset, as_json)
        return
    assert out is not None
    require_writable(out)
    if to == "onnx":
        require_onnx()  # before weights are downloaded
    weights = weights_file(checkpoint, sha256)
    with progress_bar(f"Exporting {what}"):
        model = _model(what, img_size, num_classes, model_kwarg, weights)
        if to == "onnx":
            exported = export_onnx(model, out, batch_size=batch_size, dtype=dtype, opset=opset)
        else:
            exported = export_program(model, out, batch_size=batch_size, dtype=dtype)
    document: dict[str, Any] = {"what": what, "to": to, **_document(exported)}
    if to == "onnx":
        document["opset"] = opset
    note(f"Wrote {out}")
    if as_json:
        print_json(document)
        return
    agreement = exported.agreement
    fields: list[tuple[str, object]] = [
        ("file", f"{out} ({exported.num_bytes / 2**20:.1f} MiB, {dtype})"),
        ("batch size", batch_size or "any"),
        ("compared", f"logits of {agreement.num_images} noise images with the eager model's in {dtype} and fp64"),
        ("largest difference", f"{agreement.largest_difference:.2g}"),
        ("tolerance", f"{agreement.tolerance:.2g}"),
    ]
    if agreement.own_rounding > agreement.tolerance:
        moved = f"{agreement.own_rounding:.2g}, on images where tokens rank alike"
        fields.append(("rounding in eager", moved))
    if agreement.num_clear < agreement.num_images:
        clear = f"{agreement.num_clear} of {agreement.num_images}; on the others rounding chooses tokens in eager, too"
        fields.append(("clear images", clear))
    print_fields(fields)


def _export_blocks(spec: ModelSpec, folder: Path, batch_size: int, dtype: str, opset: int, as_json: bool) -> None:
    from latency_tables.block_export import export_blocks
    from prunefront.files import require_writable

    require_writable(folder / "entries.csv")
    with progress_bar(f"Exporting parts of {spec.name}") as progress:
        written = export_blocks(spec, folder, batch_size=batch_size, dtype=dtype, opset=opset, progress=progress)
    agreements = {exported.path.name: exported.agreement for exported in written.files}
    name, worst = max(agreements.items(), key=lambda item: _share_of_tolerance(item[1]))
    note(f"Wrote {len(written.files)} parts to {folder}")
    if as_json:
        files = [_document(exported) for exported in written.files]
        print_json({"model": spec.model_dump(mode="json"), "template": str(written.template), "files": files})
        return
    print_fields(
        [
            ("parts", f"{len(written.files)} of {spec.name}, batch {batch_size}, {dtype}, in {folder}"),
            ("compared", f"outputs of each with the eager part's in {dtype} and fp64"),
            ("largest difference", f"{worst.largest_difference:.2g}, of {name}"),
            ("tolerance", f"{worst.tolerance:.2g}"),
            ("to fill in", f"{written.template}; then see prunefront table import --help"),
        ]
    )


def _share_of_tolerance(agreement: Agreement) -> float:
    # Where all outputs are 0, nothing is allowed, and nothing differs.
    return agreement.largest_difference / agreement.tolerance if agreement.tolerance else 0.0


def _document(exported: Exported) -> dict[str, Any]:
    agreement = exported.agreement
    return {
        "file": str(exported.path),
        "dtype": exported.dtype,
        "batch_size": exported.batch_size,
        "num_bytes": exported.num_bytes,
        "num_images": agreement.num_images,
        "num_clear": agreement.num_clear,
        "largest_difference": agreement.largest_difference,
        "tolerance": agreement.tolerance,
        "own_rounding": agreement.own_rounding,
    }


def _config(what: str, img_size: str | None, num_classes: int | None, kwargs: list[str] | None) -> PruneConfig:
    """The config named, inside a saved model, or without sites for a timm model."""
    from prunefront.checkpoints import read_saved_config
    from prunefront.config import PruneConfig, load_config

    if what.endswith(".safetensors"):
        return load_config(read_saved_config(what))
    if what.endswith(CONFIG_SUFFIXES) or Path(what).is_file():
        return load_config(what)
    return PruneConfig(model=model_spec(what, img_size, num_classes, kwargs), method="hybrid")


def _model(
    what: str, img_size: str | None, num_classes: int | None, kwargs: list[str] | None, checkpoint: Path | None
) -> nn.Module:
    """The model with its weights; what cannot work is refused before they are downloaded."""
    import prunefront
    from prunefront.schedule import plan_schedule

    config = _config(what, img_size, num_classes, kwargs)
    if what.endswith(".safetensors"):
        return prunefront.create_model(config, checkpoint=checkpoint or what)
    plan_schedule(config)
    return prunefront.create_model(config, pretrained=checkpoint is None, checkpoint=checkpoint)
