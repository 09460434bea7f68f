"""Options that several commands share, spelled and explained once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunefront.cli.output import progress_bar
from prunefront.config import Dtype, Runtime
from prunefront.errors import ConfigError

if TYPE_CHECKING:
    from prunefront.config import ModelSpec
    from prunefront.training.distributed import World

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str, typer.Option(help='Device: "cpu", "cuda" or "cuda:1".')]
RuntimeOption = Annotated[Runtime, typer.Option("--runtime", help="How the model is executed.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Number format of the forward pass.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per forward pass.")]
MaxForeignCores = Annotated[
    float | None,
    typer.Option(
        "--max-foreign-cores",
        min=0,
        max=1024,
        metavar="CORES",
        help="Cores that other processes may take from measuring a table (0.25 when left out). Beside more it waits "
        "for a minute, then gives up.",
    ),
]
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
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="FILE|URL",
        help="Weights (safetensors or torch) to load into the model; an https address needs --sha256.",
    ),
]
Sha256 = Annotated[
    str | None, typer.Option("--sha256", metavar="HEX", help="SHA-256 that weights at an https address must have.")
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


def weights_file(
    source: str | None, sha256: str | None, *, hash_option: str = "--sha256", world: World | None = None
) -> Path | None:
    """The file with the weights that a command names; those at an https address are downloaded into torch's cache.

    Args:
        source: File or address; None where no weights were named.
        sha256: What the user says that the file at the address must have.
        hash_option: How the command spells ``sha256``.
        world: The processes that all call this; the first one downloads before the others look.

    Raises:
        ConfigError: If an address comes without its hash, or a hash without an address.
        CheckpointError: If the download fails or its hash is another.
    """
    is_address = source is not None and "://" in source
    if source is None or not is_address:
        if sha256 is not None:
            got = "no weights are named" if source is None else f"got the file {source}"
            raise ConfigError(f"{hash_option} goes with weights at an https address, but {got}. Leave it out.")
        return None if source is None else Path(source)
    if sha256 is None:
        raise ConfigError(
            f"Weights at an address are taken only with their SHA-256, but {source} came without; state it with "
            f"{hash_option} HEX."
        )
    from prunefront.fetch import fetch_cached

    with progress_bar("Downloading", shown=world is None or world.is_main) as progress:
        if world is not None:
            if world.is_main:
                fetch_cached(source, sha256=sha256, progress=progress)
            world.wait()
        return fetch_cached(source, sha256=sha256, progress=progress)


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
