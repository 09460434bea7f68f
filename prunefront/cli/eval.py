"""`prunefront eval`: accuracy and cost of a config, a saved model, a timm model or an official checkpoint."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prunefront.cli.measure import CONFIG_SUFFIXES, NUM_BATCHES
from prunefront.cli.options import (
    AsJson,
    Checkpoint,
    CropPct,
    Device,
    DtypeOption,
    ImgSize,
    ModelKwargs,
    NumClasses,
    NumImages,
    Sha256,
    model_spec,
    parse_img_size,
    parse_pairs,
    weights_file,
)
from prunefront.cli.output import note, print_fields, print_json, progress_bar
from prunefront.config import Dtype, Runtime
from prunefront.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from prunefront.token_use import TokenUse
    from prunefront.training.data import SplitDataset
    from prunefront.training.distributed import World
    from prunefront.training.evaluate import Evaluation

SAVED_SUFFIX = ".safetensors"


def evaluate(
    dataset: Annotated[str, typer.Option(help="Dataset id; see prunefront data inspect.")],
    what: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG|MODEL]", help="Config, saved model (.safetensors) or timm model name."),
    ] = None,
    split: Annotated[Literal["train", "search", "test"], typer.Option(help="Split.")] = "test",
    num_images: NumImages = None,
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
    sha256: Sha256 = None,
    crop_pct: CropPct = None,
    throughput: Annotated[
        bool, typer.Option("--throughput", help="Also measure latency and images/s at this batch size.")
    ] = False,
    runtime: Annotated[
        Runtime | None, typer.Option("--runtime", help="With --throughput: how the model is executed; eager.")
    ] = None,
    official: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--official",
            metavar="METHOD FILE|URL",
            help="Checkpoint of a method's own repository; an https address needs --sha256.",
        ),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option("--model", help="With --official: timm's or the repository's name of the model in the file."),
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option(min=1, help="With --official: attention heads, which weights do not show.")
    ] = None,
    hparam: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="With --official: a hyper-parameter of the method; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate top-1 and top-5 accuracy with a 95 % interval, tokens per block and MACs.

    The weights are timm's pretrained ones, unless --checkpoint names others or the file is a saved model.
    Images that cannot be decoded are left out and counted, the same ones for both models.

    --official reads what a paper's own script saved. It prepares images as the papers do, --crop-pct 0.875. See
    docs/how-to-official-checkpoints.md.

    Several GPUs: torchrun --nproc-per-node 4 -m prunefront eval ... --device cuda counts every image once.

    Example: prunefront eval best.json --dataset digit-scenes --against-dense --throughput

    Example: prunefront eval --official evit evit.pth --hparam base_keep_rate=0.7 --hparam fuse_token=true --dataset
    imagefolder:imagenet
    """
    import numpy as np

    from latency_tables.device import torch_device
    from prunefront.training.data import check_dataset, data_config_of, open_split
    from prunefront.training.distributed import joined, place_of_process
    from prunefront.training.statistics import paired_interval, top1_interval

    if (what is None) == (official is None):
        raise ConfigError("Name one thing to evaluate: a config, a model, or --official METHOD FILE.")
    of_official = {"--model": model_name, "--num-heads": num_heads, "--hparam": hparam}
    misplaced = [name for name, value in of_official.items() if value] if official is None else []
    if misplaced or (official is not None and checkpoint is not None):
        raise ConfigError(
            f"{misplaced[0]} belongs to --official. Leave it out."
            if misplaced
            else "--official names the weights itself. Leave out --checkpoint."
        )
    if checkpoint is not None and what is not None and what.endswith(SAVED_SUFFIX):
        raise ConfigError(
            f"{what} is a saved model with weights of its own. Leave out --checkpoint, or name a config to load other "
            "weights into."
        )
    _, num_processes, local_rank = place_of_process()
    if throughput and num_processes > 1:
        raise ConfigError(
            f"--throughput times one model that has its machine to itself, but torchrun started {num_processes} "
            "processes, which slow each other down. Run it without torchrun, or leave --throughput out."
        )
    if runtime is not None and not throughput:
        raise ConfigError("--runtime is what --throughput measures; accuracy is always computed eagerly. Leave it out.")
    # Of several processes, each has the GPU of its own number.
    place = torch_device(f"cuda:{local_rank}" if device == "cuda" and num_processes > 1 else device)
    check_dataset(dataset)  # before weights are looked for, which may take long
    what = what if official is None else official[1]
    assert what is not None
    with joined(place) as world:
        weights = weights_file(checkpoint if official is None else official[1], sha256, world=world)
        with progress_bar(f"Loading {what}", shown=world.is_main):
            if official is None:
                model, dense = _models(what, img_size, num_classes, model_kwarg, weights)
            else:
                assert weights is not None
                model, dense = _official(
                    official[0], weights, model_name, num_heads, img_size, num_classes, model_kwarg, hparam
                )
        if against_dense and dense is None:
            raise ConfigError(f"--against-dense compares a compressed model with its dense one, but {what} is dense.")
        transform = data_config_of(model)
        if crop_pct is not None:
            transform = replace(transform, crop_pct=crop_pct)
        images = open_split(
            dataset,
            split,
            data_config=transform,
            num_images=num_images,
            on_corrupt="refuse" if strict else "skip",
        )
        evaluation, use = _evaluate_counting(model, images, batch_size, place, dtype, world)
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
            "macs": use.macs,
            "tokens_out": {
                "mean": list(use.mean), "p50": list(use.p50), "p95": list(use.p95), "is_per_image": use.is_per_image,
            },
        }  # fmt: skip
        if official is not None:
            document |= {"official": official[0], "config": _config_of(model)}
        if against_dense and dense is not None:
            reference = _evaluate(dense, images, "Evaluating dense", batch_size, place, dtype, world)
            if not np.array_equal(evaluation.indices, reference.indices):
                raise DatasetError(
                    f"Both models must see the same images of {dataset!r}, but its files changed between the two. "
                    "Evaluate again."
                )
            difference, low, high = paired_interval(evaluation.correct, reference.correct, clusters)
            document |= {"dense_top1": reference.top1, "top1_delta": difference, "top1_delta_ci": [low, high]}
    if not world.is_main:  # every process knows the result; one tells
        return
    if throughput:
        document["throughput"] = _throughput(model, dense, images, batch_size, device, runtime or "eager", dtype)
    skipped = images.describe_skipped()
    if num_processes > 1 and evaluation.num_skipped:
        note(f"Warning: {evaluation.num_skipped} images could not be decoded and were left out.")
    elif skipped is not None:
        note(f"Warning: {skipped}")
    if as_json:
        print_json(document)
        return
    fields: list[tuple[str, object]] = [
        ("top-1", f"{evaluation.top1:.2%}  (95 %: {document['top1_ci'][0]:.2%} to {document['top1_ci'][1]:.2%})"),
        ("top-5", f"{evaluation.top5:.2%}"),
        ("loss", f"{evaluation.loss:.4f}"),
        ("images", f"{evaluation.num_images} of {dataset} {split}"),
        ("transform", _describe_transform(images)),
        ("MACs", f"{use.macs / 1e9:.3f} G per image{', mean' if use.is_per_image else ''}"),
        *_token_fields(use),
    ]
    if throughput:
        speed = document["throughput"]
        setting = f"{speed['runtime']}, {speed['state']}"
        fields.append(("latency", f"{speed['median_ms']:.3f} ms per batch of {batch_size} ({setting})"))
        against = "" if speed["speedup"] is None else f", {speed['speedup']:.2f} × dense"
        fields.append(("throughput", f"{speed['images_per_s']:.0f} images/s{against}"))
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

    if what.endswith(SAVED_SUFFIX):
        model = prunefront.load_model(what)
        return model, prunefront.uncompress(model)
    if what.endswith(CONFIG_SUFFIXES) or Path(what).is_file():
        config = prunefront.load_config(what)
        plan_schedule(config)
        # Into the compressed model: the file may hold learned parts.
        model = prunefront.create_model(config, pretrained=checkpoint is None, checkpoint=checkpoint)
        return model, prunefront.uncompress(model)
    spec = model_spec(what, img_size, num_classes, kwargs)
    geometry_for(spec)
    return prunefront.create_dense(spec, pretrained=checkpoint is None, checkpoint=checkpoint), None


def _official(
    method: str,
    path: Path,
    model_name: str | None,
    num_heads: int | None,
    img_size: str | None,
    num_classes: int | None,
    kwargs: list[str] | None,
    hparam: list[str] | None,
) -> tuple[nn.Module, nn.Module | None]:
    """The model in an official checkpoint and, if it is compressed, the dense one with the same weights."""
    import prunefront
    from prunefront.official import load_official

    architecture = parse_pairs(kwargs, "--model-kwarg")
    given = {"num_heads": num_heads, "img_size": parse_img_size(img_size), "num_classes": num_classes}
    architecture |= {name: value for name, value in given.items() if value is not None}
    model = load_official(
        method, path, model=model_name, architecture=architecture, hparams=parse_pairs(hparam, "--hparam")
    )
    return model, prunefront.uncompress(model) if prunefront.is_compressed(model) else None


def _config_of(model: nn.Module) -> dict[str, Any] | None:
    from prunefront.backbones.compressed import Compressed

    return model.prune_config.to_dict() if isinstance(model, Compressed) else None


def _evaluate_counting(
    model: nn.Module, images: SplitDataset, batch_size: int, device: torch.device, dtype: Dtype, world: World
) -> tuple[Evaluation, TokenUse]:
    """Accuracy, and tokens and MACs; counted on the way where each image keeps counts of its own."""
    from prunefront.token_use import TokenCounter, counts_per_image, token_use

    if not counts_per_image(model):
        return _evaluate(model, images, "Evaluating", batch_size, device, dtype, world), token_use(model)
    counter = TokenCounter(model)
    evaluation = _evaluate(counter, images, "Evaluating", batch_size, device, dtype, world)
    return evaluation, token_use(model, [world.gathered(counter.counts())])


def _throughput(
    model: nn.Module,
    dense: nn.Module | None,
    images: SplitDataset,
    batch_size: int,
    device: str,
    runtime: Runtime,
    dtype: Dtype,
) -> dict[str, Any]:
    """Latency on images of the split, against the dense model where there is one."""
    from itertools import islice

    from latency_tables.measure import measure_models
    from prunefront.training.data import evaluation_batches

    batches = [batch for batch, _ in islice(evaluation_batches(images, batch_size), NUM_BATCHES)]
    batches = [batch for batch in batches if len(batch) == batch_size]
    if not batches:
        raise ConfigError(
            f"--throughput needs a full batch of {batch_size} images, but got fewer from the split. "
            "Use a smaller --batch-size."
        )
    models = {"model": model} | ({} if dense is None else {"dense": dense})
    with progress_bar("Measuring") as progress:
        measured = measure_models(
            models,
            batches,
            device=device,
            runtime=runtime,
            dtype=dtype,
            canary="model" if dense is None else "dense",
            progress=progress,
        )
    figures = {name: value for name, value in asdict(measured["model"]).items() if name not in ("canary_ms", "speedup")}
    median_ms = measured["model"].median_ms
    dense_ms = None if dense is None else measured["dense"].median_ms
    return {
        "batch_size": batch_size,
        "device": device,
        "runtime": runtime,
        "images_per_s": 1e3 * batch_size / median_ms,
        "dense_median_ms": dense_ms,
        "speedup": None if dense_ms is None else dense_ms / median_ms,
        **figures,
    }


def _describe_transform(images: SplitDataset) -> str:
    config = images.data_config
    _, height, width = config.input_size
    return f"{height} x {width} px, {config.interpolation}, crop {config.crop_pct:g} ({config.crop_mode})"


def _token_fields(use: TokenUse) -> list[tuple[str, object]]:
    rows = {"tokens per block": use.mean}
    if use.is_per_image:
        rows = {"tokens per block, mean": use.mean, "p50": use.p50, "p95": use.p95}
    return [(name, " ".join(f"{count:.4g}" for count in counts)) for name, counts in rows.items()]


def _evaluate(
    model: nn.Module,
    images: SplitDataset,
    title: str,
    batch_size: int,
    device: torch.device,
    dtype: Dtype,
    world: World,
) -> Evaluation:
    from prunefront.training.evaluate import evaluate as evaluate_model

    with progress_bar(title, shown=world.is_main) as progress:
        return evaluate_model(
            model, images, batch_size=batch_size, device=device, dtype=dtype, world=world, progress=progress
        )
