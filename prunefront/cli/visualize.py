"""`prunefront visualize`: pictures of which patches a schedule keeps, drops, merges and fuses."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prunefront.cli.measure import CONFIG_SUFFIXES
from prunefront.cli.options import AsJson, Checkpoint, Device, Sha256, weights_file
from prunefront.cli.output import note, print_json, print_table, progress_bar
from prunefront.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunefront.training.data import DataConfig
    from prunefront.visualize import TokenTrace

DOCUMENT_NAME = "tokens.json"
DOCUMENT_FORMAT = "prunefront/tokens/1"
DEFAULT_IMAGES = 8
BATCH = 8  # images per forward pass


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One image to show: its number in the split or among the files, where it is from, label if known, pixels."""

    index: int
    source: str
    label: int | None
    pixels: Tensor


def visualize(
    what: Annotated[str, typer.Argument(metavar="CONFIG|MODEL", help="Config, or saved model (.safetensors).")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and tokens.json.")],
    dataset: Annotated[str | None, typer.Option(help="Dataset id; see prunefront data inspect.")] = None,
    split: Annotated[Literal["train", "search", "test"], typer.Option(help="Split.")] = "test",
    images: Annotated[
        int | None, typer.Option(min=1, help=f"So many images, evenly spread; {DEFAULT_IMAGES} when left out.")
    ] = None,
    index: Annotated[
        list[int] | None, typer.Option("--index", min=0, help="Image of the split, from 0; may be repeated.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", help="Image file, or folder of them, instead of a dataset; may be repeated."),
    ] = None,
    checkpoint: Checkpoint = None,
    sha256: Sha256 = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Draw what becomes of each patch: the image as the model sees it, then one picture per reduction.

    Dropped patches are dark, merged ones show their group's mean colour and outline, fused ones are tinted. Writes
    image_<n>.png, all of them as grid.png, and the same as numbers in tokens.json. Pictures that the folder's former
    tokens.json names and this run does not draw are removed; other files stay.

    Example: prunefront visualize best.json --dataset digit-scenes --images 4 --out pictures
    """
    from latency_tables.device import torch_device
    from prunefront.files import require_writable, write_atomic
    from prunefront.training.data import data_config_of
    from prunefront.visualize import draw_image, png_bytes, stack_pictures, to_picture

    if (dataset is None) == (image is None):
        raise ConfigError("Name images to show: either --dataset ID or --image FILE, and only one of the two.")
    if index and images is not None:
        raise ConfigError("--images chooses images and --index names them; give one of the two.")
    if index and image:
        raise ConfigError("--index counts the images of a dataset; with --image name the files alone.")
    require_writable(out / DOCUMENT_NAME)
    place = torch_device(device)
    paths = None if image is None else _files(image, images)
    if dataset is not None:
        from prunefront.training.data import check_dataset

        check_dataset(dataset)  # before weights are looked for, which may take long
    weights = weights_file(checkpoint, sha256)
    with progress_bar(f"Loading {what}"):
        model = _load(what, weights).to(place)
    data_config = data_config_of(model)
    if paths is not None:
        shown = [_open_file(number, path, data_config) for number, path in enumerate(paths)]
    else:
        assert dataset is not None
        shown = _of_dataset(dataset, split, images or DEFAULT_IMAGES, index, data_config)
    traces = _trace(model, shown, str(place))
    config: Any = model.prune_config
    document: dict[str, Any] = {
        "format": DOCUMENT_FORMAT,
        "what": what,
        "model": config.model.name,
        "method": config.method,
        "content_hash": config.content_hash(),
        "dataset": dataset,
        "split": split if dataset is not None else None,
        **data_config.to_dict(),
        "state_names": _state_names(),
        "images": [_entry(one, trace) for one, trace in zip(shown, traces, strict=True)],
    }
    pictures = []
    with progress_bar("Drawing") as progress:
        for done, (one, trace) in enumerate(zip(shown, traces, strict=True)):
            picture = to_picture(one.pixels, data_config.mean, data_config.std)
            pictures.append(draw_image(picture, trace.sites, *_title(one, trace)))
            write_atomic(out / f"image_{one.index}.png", png_bytes(pictures[-1]))
            progress(done + 1, len(shown), one.source)
        write_atomic(out / "grid.png", png_bytes(stack_pictures(pictures)))
    # Before the document that names them goes: a run that is killed here leaves nothing that the next one forgets.
    stale = _pictures_of(out) - {entry["file"] for entry in document["images"]}
    for name in stale:
        (out / name).unlink(missing_ok=True)
    write_atomic(out / DOCUMENT_NAME, json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")
    note(f"Wrote {len(shown)} pictures, grid.png and {DOCUMENT_NAME} to {out}")
    if stale:
        note(f"Removed {len(stale)} pictures of the run before")
    if as_json:
        print_json(document)
        return
    _print_counts(document)


def _pictures_of(folder: Path) -> set[str]:
    """Names of the pictures that an earlier run left in a folder, as its document tells."""
    try:
        document = json.loads((folder / DOCUMENT_NAME).read_text(encoding="utf-8"))
        names = [entry["file"] for entry in document["images"] if document["format"] == DOCUMENT_FORMAT]
        return {name for name in names if re.fullmatch(r"image_\d+\.png", name)}
    except (FileNotFoundError, LookupError, TypeError, ValueError):  # there is none, or it is not ours
        return set()


def _load(what: str, checkpoint: Path | None) -> nn.Module:
    """The compressed model; what cannot work is refused before weights are downloaded."""
    import torch

    import prunefront
    from prunefront.checkpoints import PREDICTORS, load_weights
    from prunefront.registry import get_method
    from prunefront.schedule import plan_schedule

    if what.endswith(".safetensors"):
        model = prunefront.load_model(what)
        _require_sites(what, model.prune_config)
        return model
    if not (what.endswith(CONFIG_SUFFIXES) or Path(what).is_file()):
        raise ConfigError(
            f"Expected a config or a saved compressed model, but got {what!r}. A model by name keeps every patch; "
            "prunefront config new or config published writes a config for it."
        )
    config = prunefront.load_config(what)
    _require_sites(what, config)
    plan_schedule(config)
    # Learned parts that no checkpoint brings are drawn anew; the same command is to give the same pictures.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = prunefront.create_model(config, pretrained=checkpoint is None)
    if checkpoint is not None:
        load_weights(model, checkpoint)  # which warns where the file has no selectors
    elif any(name.startswith(f"{PREDICTORS}.") for name in model.state_dict()):
        note(
            f"Warning: the selectors of {get_method(config.method).title} have random weights, so which patches stay "
            "means nothing. Name trained ones with --checkpoint, or show a saved model."
        )
    return model


def _require_sites(what: str, config: Any) -> None:
    if not config.sites:
        raise ConfigError(f"{what} has no sites: it keeps every patch, so there is nothing to show. Add a site.")


def _files(given: list[Path], most: int | None) -> list[Path]:
    """The image files among files and folders."""
    from timm.data.readers.img_extensions import is_img_extension

    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(child for child in path.iterdir() if is_img_extension(child.suffix.lower()))
            if not inside:
                raise DatasetError(f"The folder {path} has no image files. Name one that has, or the files themselves.")
            paths += [inside[at] for at in _spread(len(inside), most or DEFAULT_IMAGES)]
        elif path.is_file():
            paths.append(path)
        else:
            raise DatasetError(f"The image {path} does not exist. Check the path.")
    return paths


def _open_file(number: int, path: Path, data_config: DataConfig) -> Shown:
    from timm.data import create_transform

    from prunefront.training.data_sources import decode_image, unreadable_image

    channels = data_config.input_size[0]
    if channels not in (1, 3):
        raise DatasetError(f"Image files have 1 or 3 channels, but the model takes {channels}. Use another model.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable_image(str(path), error) from error
    decoded = decode_image(content, lambda: str(path)).convert("L" if channels == 1 else "RGB")
    pixels: Tensor = create_transform(**data_config.to_dict())(decoded)
    return Shown(index=number, source=str(path), label=None, pixels=pixels)


def _of_dataset(
    dataset: str, split: Literal["train", "search", "test"], most: int, index: list[int] | None, data_config: DataConfig
) -> list[Shown]:
    from itertools import islice

    from prunefront.training.data import open_split

    images = open_split(dataset, split, data_config=data_config)
    source = f"{dataset} {split}"
    if images.is_streamed:
        if index:
            raise DatasetError(
                f"The stream {dataset!r} is read from its beginning, so --index cannot reach into it; use --images."
            )
        return [
            Shown(index=number, source=source, label=label, pixels=pixels)
            for number, (pixels, label) in enumerate(islice(images.stream(), most))
        ]
    outside = [number for number in index or () if number >= len(images)]
    if outside:
        raise DatasetError(
            f"The split {split!r} of {dataset!r} has images 0 to {len(images) - 1}, but got --index {outside[0]}. "
            "Name one of them."
        )
    shown = []
    # Named twice is shown once: its files would have one name.
    for number in dict.fromkeys(index) if index else _spread(len(images), most):
        pixels, label = images[number]
        shown.append(Shown(index=number, source=source, label=int(label), pixels=pixels))
    return shown


def _spread(total: int, wanted: int) -> list[int]:
    """So many numbers below ``total``, evenly spaced: folders are sorted by class."""
    count = min(total, wanted)
    return [number * total // count for number in range(count)]


def _trace(model: nn.Module, shown: list[Shown], device: str) -> list[TokenTrace]:
    import torch

    from prunefront.visualize import trace_tokens

    traces: list[TokenTrace] = []
    with progress_bar("Following patches") as progress:
        for first in range(0, len(shown), BATCH):
            batch = torch.stack([one.pixels for one in shown[first : first + BATCH]])
            traces += trace_tokens(model, batch.to(device))
            progress(len(traces), len(shown), "")
    return traces


def _state_names() -> list[str]:
    from prunefront.visualize import PatchState

    return [state.name.lower() for state in PatchState]


def _entry(one: Shown, trace: TokenTrace) -> dict[str, Any]:
    return {
        "index": one.index,
        "file": f"image_{one.index}.png",
        "source": one.source,
        "label": one.label,
        "prediction": trace.prediction,
        "sites": [site.to_dict() for site in trace.sites],
    }


def _title(one: Shown, trace: TokenTrace) -> tuple[str, str]:
    name = Path(one.source).name if one.label is None else f"image {one.index}"
    said = [f"label {one.label}"] if one.label is not None else []
    said += [f"predicted {trace.prediction}"] if trace.prediction is not None else []
    return name, ", ".join(said)


def _print_counts(document: dict[str, Any]) -> None:
    rows = []
    for entry in document["images"]:
        for site in entry["sites"]:
            action = site["op"] if site["action"] == site["op"] else f"{site['op']}: {site['action']}"
            rows.append(
                (entry["index"], site["block"], action, site["tokens"], *site["counts"].values(), site["merged_tokens"])
            )
    names = [*document["state_names"], "merged tokens"]
    print_table(["image", "block", "reduction", "tokens", *names], rows)
