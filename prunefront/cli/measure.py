"""`prunefront measure`: latency of configs and timm models on this device, measured in turns, and their accuracy."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunefront.cli.options import (
    AsJson,
    BatchSize,
    Checkpoint,
    CropPct,
    Device,
    DtypeOption,
    ImgSize,
    ModelKwargs,
    NumClasses,
    NumImages,
    RuntimeOption,
    Sha256,
    model_spec,
    weights_file,
)
from prunefront.cli.output import ProgressCallback, note, print_json, print_table, progress_bar, write_result
from prunefront.config import Dtype
from prunefront.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from latency_tables.measure import Measurement
    from prunefront.config import PruneConfig

CONFIG_SUFFIXES = (".json", ".yaml", ".yml")
PICTURES = (".png", ".svg", ".pdf")
NUM_BATCHES = 4  # of real images, taking turns: methods that look at the image are as fast as the images let them be

Shape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One thing to measure; a config without sites is a dense model."""

    label: str
    config: PruneConfig

    @property
    def is_dense(self) -> bool:
        return not self.config.sites


def measure(
    what: Annotated[list[str], typer.Argument(metavar="CONFIG|MODEL...", help="Config files and timm model names.")],
    device: Device = "cpu",
    runtime: RuntimeOption = "eager",
    dtype: DtypeOption = "fp32",
    batch_size: BatchSize = 8,
    dataset: Annotated[
        str | None,
        typer.Option(help="Measure on its search images, and evaluate on its test images; random ones when left out."),
    ] = None,
    num_images: NumImages = None,
    crop_pct: CropPct = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwarg: ModelKwargs = None,
    checkpoint: Checkpoint = None,
    sha256: Sha256 = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw top-1 against images/s into this picture (.png, .svg, .pdf); bars without --dataset."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure latency: every config against its dense model, interleaved so that drift cancels out.

    A speed-up refers to the config's own dense model; for timm models, to the first model named. The model options
    (--img-size, --num-classes, --model-kwarg) apply to the timm models; configs say themselves what they are.
    With --dataset each is evaluated as well, on the test split; --num-images takes a fixed sample of it.

    Example: prunefront measure best.json --batch-size 8

    Example: prunefront measure deit_tiny_patch16_224 deit_small_patch16_224 evit.json --dataset imagefolder:imagenet
    --plot trade-off.png
    """
    from latency_tables.device import describe_device
    from prunefront.files import require_writable

    info = describe_device(device)
    for file in (out, plot):
        if file is not None:
            require_writable(file)
    if plot is not None and plot.suffix not in PICTURES:
        raise ConfigError(f"--plot writes {', '.join(PICTURES)}, but got {plot.name!r}. Change its suffix.")
    if dataset is None and (num_images is not None or crop_pct is not None):
        raise ConfigError("--num-images and --crop-pct are about accuracy, which needs --dataset. Add it.")
    if dataset is not None:
        from prunefront.training.data import check_dataset

        check_dataset(dataset)  # before weights are looked for
    subjects = with_dense([_subject(text, img_size, num_classes, model_kwarg) for text in what])
    weights = weights_file(checkpoint, sha256)
    groups: dict[Shape, list[Subject]] = {}
    for subject in subjects:
        groups.setdefault(_input_shape(subject), []).append(subject)
    measured: dict[str, Measurement] = {}
    accuracy: dict[str, dict[str, Any]] = {}
    with progress_bar("Measuring") as progress:
        for number, (shape, group) in enumerate(groups.items()):
            models = _build(group, weights, is_pretrained=dataset is not None)
            measured |= _measure_group(
                group,
                shape,
                models,
                dataset=dataset,
                device=device,
                runtime=runtime,
                dtype=dtype,
                batch_size=batch_size,
                progress=_share(progress, number, len(groups)),
            )
            if dataset is not None:
                for label, model in models.items():
                    accuracy[label] = _accuracy(model, dataset, num_images, crop_pct, batch_size, device, dtype)
    rows = [describe(subject, subjects, measured, batch_size) for subject in subjects]
    for row in rows:
        row |= accuracy.get(row["label"], {})
    document = {
        "device": info.model_dump(mode="json") | {"fingerprint": info.fingerprint()},
        "runtime": runtime,
        "dtype": dtype,
        "batch_size": batch_size,
        "measurements": rows,
    }
    title = f"{info.name}, {runtime}, {dtype}, batch {batch_size}"
    if as_json:
        print_json(document)
    else:
        _print_rows(rows, title)
    if out is not None:  # last: what was measured is on the screen even if the disk is full
        write_result(out, json.dumps(document, indent=1) + "\n")
    if plot is not None:
        from prunefront.cli.measure_plot import plot_rows

        note(f"Wrote {plot_rows(rows, title, plot)}")


def with_dense(subjects: list[Subject]) -> list[Subject]:
    """Put the dense model of every config in front of it, once, and make the labels unique."""
    complete: list[Subject] = []
    for subject in subjects:
        if any(subject.label == other.label for other in complete):
            raise ConfigError(f"{subject.label} is named twice; name everything once.")
        if not subject.is_dense and not any(_has_model_of(subject, other) for other in complete + subjects):
            dense = Subject(label=f"{subject.config.model.name} (dense)", config=subject.config.evolve(sites=()))
            complete.append(dense)
        complete.append(subject)
    return complete


def reference_of(subject: Subject, subjects: list[Subject]) -> Subject:
    """What a speed-up refers to: a config's own dense model, a model's first companion."""
    return next(other for other in subjects if other.is_dense and (subject.is_dense or _has_model_of(subject, other)))


def describe(
    subject: Subject, subjects: list[Subject], measured: dict[str, Measurement], batch_size: int
) -> dict[str, Any]:
    """One row of the result."""
    measurement = measured[subject.label]
    reference = reference_of(subject, subjects)
    reference_ms = measured[reference.label].median_ms
    figures = {name: value for name, value in asdict(measurement).items() if name not in ("canary_ms", "speedup")}
    return {
        "label": subject.label,
        "config": subject.config.to_dict(),
        "reference": reference.label,
        "reference_ms": reference_ms,
        "speedup": reference_ms / measurement.median_ms,
        "images_per_s": 1e3 * batch_size / measurement.median_ms,
        **figures,
    }


def _print_rows(rows: list[dict[str, Any]], title: str) -> None:
    has_accuracy = all("top1" in row for row in rows)
    print_table(
        ["what", *(["top-1"] if has_accuracy else []), "median ms", "IQR ms", "speed-up", "images/s", "MiB", "state"],
        [
            (
                row["label"],
                *([f"{row['top1']:.2%}"] if has_accuracy else []),
                f"{row['median_ms']:.3f}",
                f"{row['iqr_ms']:.3f}",
                f"{row['speedup']:.2f} ×",
                f"{row['images_per_s']:.0f}",
                None if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}",
                row["state"],
            )
            for row in rows
        ],
        title=title,
    )
    for row in rows:
        if row["reason"]:
            note(f"{row['label']} is noisy: {row['reason']}")


def _has_model_of(subject: Subject, other: Subject) -> bool:
    return other.is_dense and other.config.model == subject.config.model


def _subject(text: str, img_size: str | None, num_classes: int | None, kwargs: list[str] | None) -> Subject:
    from prunefront.config import PruneConfig, load_config

    if text.endswith(CONFIG_SUFFIXES) or Path(text).is_file():
        return Subject(label=text, config=load_config(text))
    spec = model_spec(text, img_size, num_classes, kwargs)
    return Subject(label=text, config=PruneConfig(model=spec, method="hybrid"))


def _input_shape(subject: Subject) -> Shape:
    from prunefront.geometry import geometry_for

    geometry = geometry_for(subject.config.model)
    return (geometry.in_chans, *geometry.img_size)


def _build(group: list[Subject], checkpoint: Path | None, *, is_pretrained: bool) -> dict[str, nn.Module]:
    """The models by label; those of one dense model share its weights."""
    import prunefront

    dense: dict[str, nn.Module] = {}
    models: dict[str, nn.Module] = {}
    for subject in group:
        key = subject.config.model.model_dump_json()
        if key not in dense:
            dense[key] = prunefront.create_dense(subject.config.model, pretrained=is_pretrained, checkpoint=checkpoint)
        models[subject.label] = dense[key] if subject.is_dense else prunefront.compress(dense[key], subject.config)
    return models


def _accuracy(
    model: nn.Module,
    dataset: str,
    num_images: int | None,
    crop_pct: float | None,
    batch_size: int,
    device: str,
    dtype: Dtype,
) -> dict[str, Any]:
    """Top-1 with its interval on the test split, prepared as the model expects."""
    from latency_tables.device import torch_device
    from prunefront.training.data import data_config_of, open_split
    from prunefront.training.evaluate import evaluate
    from prunefront.training.statistics import top1_interval

    transform = data_config_of(model)
    if crop_pct is not None:
        transform = replace(transform, crop_pct=crop_pct)
    images = open_split(dataset, "test", data_config=transform, num_images=num_images, on_corrupt="skip")
    evaluation = evaluate(model, images, batch_size=batch_size, device=str(torch_device(device)), dtype=dtype)
    clusters = None if images.clusters is None else images.clusters[evaluation.indices]
    return {
        "dataset": dataset,
        "split": "test",
        "num_images": evaluation.num_images,
        "num_skipped": evaluation.num_skipped,
        "crop_pct": transform.crop_pct,
        "top1": evaluation.top1,
        "top1_ci": list(top1_interval(evaluation.correct, clusters)),
        "top5": evaluation.top5,
    }


def _measure_group(
    group: list[Subject],
    shape: Shape,
    models: dict[str, nn.Module],
    *,
    dataset: str | None,
    device: str,
    runtime: str,
    dtype: str,
    batch_size: int,
    progress: ProgressCallback,
) -> dict[str, Measurement]:
    """Measure what takes images of one shape, in turns."""
    from latency_tables.measure import measure_models

    images = _images(dataset, next(iter(models.values())), shape, batch_size)
    canary = next((subject for subject in group if subject.is_dense), group[0])
    return measure_models(
        models, images, device=device, runtime=runtime, dtype=dtype, canary=canary.label, progress=progress
    )


def _images(dataset: str | None, model: nn.Module, shape: Shape, batch_size: int) -> list[Tensor]:
    """Batches of search images of a dataset, or one of noise."""
    import torch

    if dataset is None:
        return [torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(0))]
    from prunefront.training.data import data_config_of, evaluation_batches, open_split

    split = open_split(dataset, "search", data_config=data_config_of(model), num_images=NUM_BATCHES * batch_size)
    return [images for images, _ in evaluation_batches(split, batch_size) if len(images) == batch_size]


def _share(progress: ProgressCallback, number: int, of: int) -> ProgressCallback:
    def report(done: float, total: float, message: str) -> None:
        progress(number + done / total, of, message)

    return report
