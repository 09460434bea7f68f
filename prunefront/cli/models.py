"""`prunefront models`: the timm models that methods can be put into."""

from __future__ import annotations

from typing import Annotated

import typer

from prunefront.cli.options import AsJson
from prunefront.cli.output import note, print_fields, print_json

# timm's modules of plain Vision Transformers and Swin, and ours.
MODULES = ("vision_transformer", "deit", "swin_transformer", "digit_vit")


def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern with *; or one whole name.")] = "*",
    as_json: AsJson = False,
) -> None:
    """List the models that match; one exact name shows its blocks, tokens and MACs.

    Example: prunefront models deit
    """
    import timm

    import prunefront.backbones  # noqa: F401  (registers what timm lacks)
    from prunefront.config import ModelSpec, PruneConfig
    from prunefront.errors import ModelError, UnknownNameError
    from prunefront.geometry import geometry_for

    names = sorted(name for module in MODULES for name in timm.list_models(module=module))
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
                f"{pattern} is not a plain Vision Transformer or Swin; methods work on the models of timm's "
                "vision_transformer and swin_transformer."
            )
        raise UnknownNameError.of("model", pattern, names, hint="prunefront models lists all.")
    if as_json:
        print_json(found)
        return
    for name in found:
        typer.echo(name)
    note(f"{len(found)} models; prunefront models NAME tells more. Parallel-branch and post-norm models are refused.")
