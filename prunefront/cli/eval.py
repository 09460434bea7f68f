"""`prunefront eval`: accuracy of a config, a saved model or a timm model on a split of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prunefront.cli.measure import CONFIG_SUFFIXES
from prunefront.cli.options import (
    AsJson,
    Checkpoint,
    Device,
    DtypeOption,
    ImgSize,
    ModelKwargs,
    NumClasses,
    model_spec,
)
from prunefront.cli.output import note, print_fields, print_json, progress_bar
from prunefront.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from torch import nn

    from prunefront.training.data import SplitDataset
    from prunefront.training.evaluate import Evaluation


def evaluate(
    what: Annotated[
        str, typer.Argument(metavar="CONFIG|MODEL", help="Config, saved model (.safetensors) or timm model name.")
    ],
    dataset: Annotated[str, typer.Option(help="Dataset id; see prunefront data inspect.")],
    split: Annotated[Literal["train", "search", "test"], typer.Option(help="Split.")] = "test",
    num_images: Annotated[
        int | None, typer.Option(min=1, help="A fixed sample of so many images; all when left out.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 64,
    device: Device = "cpu",
    dtype: DtypeOption = "fp32",
    against_dense: Annotated[
        bool, typer.Option("--against-dense", help="Evaluate the dense model too, for a paired difference.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse images that cannot be decoded instead of leaving them out.")
    ] = False,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwarg: ModelKwargs = None,
    checkpoint: Checkpoint = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate top-1 and top-5 accuracy with a 95 % interval.

    The weights are timm's pretrained ones, unless --checkpoint names others or the file is a saved model.
    Images that cannot be decoded are left out and counted, the same ones for both models.

    Example: prunefront eval best.json --dataset digit-scenes --against-dense
    """
    import numpy as np

    from latency_tables.device import torch_device
    from prunefront.training.data import check_dataset, data_config_of, open_split
    from prunefront.training.statistics import paired_interval, top1_interval

    place = str(torch_device(device))
    check_dataset(dataset)  # before weights are looked for, which may take long
    with progress_bar(f"Loading {what}"):
        model, dense = _models(what, img_size, num_classes, model_kwarg, checkpoint)
    if against_dense and dense is None:
        raise ConfigError(f"--against-dense compares a compressed model with its dense one, but {what} is dense.")
    images = open_split(
        dataset,
        split,
        data_config=data_config_of(model),
        num_images=num_images,
        on_corrupt="refuse" if strict else "skip",
    )
    evaluation = _evaluate(model, images, "Evaluating", batch_size, place, dtype)
    clusters = None if images.clusters is None else images.clusters[evaluation.indices]
    low, high = top1_interval(evaluation.correct, clusters)
    document: dict[str, Any] = {
        "what": what,
        "dataset": dataset,
        "split": split,
        "num_images": evaluation.num_images,
        "num_skipped": evaluation.num_skipped,
        "dtype": dtype,
        **images.data_config.to_dict(),
        "top1": evaluation.top1,
        "top1_ci": [low, high],
        "top5": evaluation.top5,
        "loss": evaluation.loss,
    }
    if against_dense and dense is not None:
        reference = _evaluate(dense, images, "Evaluating dense", batch_size, place, dtype)
        if not np.array_equal(evaluation.indices, reference.indices):
            raise DatasetError(
                f"Both models must see the same images of {dataset!r}, but its files changed between the two. "
                "Evaluate again."
            )
        difference, low, high = paired_interval(evaluation.correct, reference.correct, clusters)
        document |= {"dense_top1": reference.top1, "top1_delta": difference, "top1_delta_ci": [low, high]}
    skipped = images.describe_skipped()
    if skipped is not None:
        note(f"Warning: {skipped}")
    if as_json:
        print_json(document)
        return
    fields: list[tuple[str, object]] = [
        ("top-1", f"{evaluation.top1:.2%}  (95 %: {document['top1_ci'][0]:.2%} to {document['top1_ci'][1]:.2%})"),
        ("top-5", f"{evaluation.top5:.2%}"),
        ("loss", f"{evaluation.loss:.4f}"),
        ("images", f"{evaluation.num_images} of {dataset} {split}"),
    ]
    if "dense_top1" in document:
        fields.insert(1, ("dense top-1", f"{document['dense_top1']:.2%}"))
        fields.insert(2, ("difference", f"{document['top1_delta']:+.2%}  (95 %: {low:+.2%} to {high:+.2%}, paired)"))
    print_fields(fields)


def _models(
    what: str, img_size: str | None, num_classes: int | None, kwargs: list[str] | None, checkpoint: Path | None
) -> tuple[nn.Module, nn.Module | None]:
    """The model asked for and, if it is compressed, the dense one with the same weights.

    What cannot work is refused before weights are downloaded.
    """
    import prunefront
    from prunefront.geometry import geometry_for
    from prunefront.schedule import plan_schedule

    if what.endswith(".safetensors"):
        model = prunefront.load_model(what)
        return model, prunefront.uncompress(model)
    if what.endswith(CONFIG_SUFFIXES) or Path(what).is_file():
        config = prunefront.load_config(what)
        plan_schedule(config)
        dense = prunefront.create_dense(config.model, pretrained=checkpoint is None, checkpoint=checkpoint)
        return prunefront.compress(dense, config), dense
    spec = model_spec(what, img_size, num_classes, kwargs)
    geometry_for(spec)
    return prunefront.create_dense(spec, pretrained=checkpoint is None, checkpoint=checkpoint), None


def _evaluate(
    model: nn.Module,
    images: SplitDataset,
    title: str,
    batch_size: int,
    device: str,
    dtype: Literal["fp32", "bf16", "fp16"],
) -> Evaluation:
    from prunefront.training.evaluate import evaluate as evaluate_model

    with progress_bar(title) as progress:
        return evaluate_model(model, images, batch_size=batch_size, device=device, dtype=dtype, progress=progress)
