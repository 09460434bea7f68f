"""Options that several commands share, spelled and explained once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunefront.config import Dtype, Runtime
from prunefront.errors import ConfigError

if TYPE_CHECKING:
    from prunefront.config import ModelSpec

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str, typer.Option(help='Device: "cpu", "cuda" or "cuda:1".')]
RuntimeOption = Annotated[Runtime, typer.Option("--runtime", help="How the model is executed.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Number format of the forward pass.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per forward pass.")]
Url = Annotated[
    str | None,
    typer.Option("--url", envvar="PRUNEFRONT_URL", help="Address of a running service; without it, this machine."),
]
ImgSize = Annotated[
    str | None, typer.Option("--img-size", "--input-size", help="Pixels: 224, or 224x320 (height x width).")
]
NumClasses = Annotated[int | None, typer.Option("--num-classes", min=0, help="Classes; the model's own when left out.")]
ModelKwargs = Annotated[
    list[str] | None,
    typer.Option("--model-kwarg", metavar="NAME=VALUE", help="Passed on to timm.create_model; may be repeated."),
]
Checkpoint = Annotated[
    Path | None, typer.Option("--checkpoint", help="Weights (safetensors or torch) to load into the model.")
]

CropPct = Annotated[
    float | None,
    typer.Option(
        "--crop-pct", min=0.1, max=1.0, help="Share of the resized image that the centre crop keeps; the model's own."
    ),
]
NumImages = Annotated[
    int | None, typer.Option("--num-images", min=1, help="A fixed sample of so many images; all when left out.")
]


def parse_img_size(text: str | None) -> int | tuple[int, int] | None:
    """Read ``224`` or ``224x320``.

    Raises:
        ConfigError: If the text is neither.
    """
    if text is None:
        return None
    parts = text.lower().replace(",", "x").split("x")
    if not 1 <= len(parts) <= 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--img-size expects pixels such as 224 or 224x320, but got {text!r}.")
    sizes = [int(part) for part in parts]
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def parse_pairs(pairs: list[str] | None, option: str) -> dict[str, Any]:
    """Read the ``NAME=VALUE`` pairs of an option; a value is JSON where it parses, text otherwise.

    Raises:
        ConfigError: If one is no such pair.
    """
    kwargs: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"{option} expects NAME=VALUE, but got {pair!r}.")
        try:
            kwargs[name] = json.loads(value)
        except ValueError:
            kwargs[name] = value
    return kwargs


def model_spec(
    name: str, img_size: str | None = None, num_classes: int | None = None, kwargs: list[str] | None = None
) -> ModelSpec:
    """Build the ModelSpec that the model options describe."""
    from prunefront.config import ModelSpec

    return ModelSpec(
        name=name,
        kwargs=parse_pairs(kwargs, "--model-kwarg"),
        img_size=parse_img_size(img_size),
        num_classes=num_classes,
    )
