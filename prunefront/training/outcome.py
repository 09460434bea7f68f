"""What a finished training is worth: one look at the test split, and the config that carries the numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from prunefront.config import EvalInfo, PruneConfig, Results, Weights
from prunefront.macs import macs
from prunefront.training.data import OnCorrupt, data_config_of, open_split
from prunefront.training.distributed import World
from prunefront.training.evaluate import DType, Evaluation, Progress, ShouldStop, evaluate
from prunefront.training.statistics import top1_interval


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Accuracy on the test split.

    Attributes:
        evaluation: Counts and accuracies.
        interval: 95 % interval of top-1, clustered by source.
        info: How it was measured.
    """

    evaluation: Evaluation
    interval: tuple[float, float]
    info: EvalInfo


def judge(
    model: nn.Module,
    dataset_id: str,
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    dtype: DType = "fp32",
    num_workers: int = 0,
    world: World | None = None,
    on_corrupt: OnCorrupt = "refuse",
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> Verdict:
    """Evaluate a trained model on the images that nothing was chosen by.

    Args:
        model: The model as training left it.
        dataset_id: Dataset it was trained on.
        batch_size: Images per forward pass.
        device: Torch device.
        dtype: Number format of the forward pass.
        num_workers: Processes that load images.
        world: The processes that share the work.
        on_corrupt: What to do about images that cannot be decoded: ``refuse`` or ``skip``.
        progress: Called with (images done, all images, text).
        should_stop: Asked before each batch, by a process that works alone.

    Raises:
        CorruptImageError: If an image cannot be decoded and is not to be skipped.
        DatasetError: If there is no such split, or it does not fit the model.
        StoppedError: If ``should_stop`` said so.
    """
    data_config = data_config_of(model)
    images = open_split(dataset_id, "test", data_config=data_config, on_corrupt=on_corrupt)
    evaluation = evaluate(
        model,
        images,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        num_workers=num_workers,
        world=world,
        progress=progress,
        should_stop=should_stop,
    )
    info = EvalInfo(
        dataset=dataset_id,
        split="test",
        num_images=evaluation.num_images,
        crop_pct=data_config.crop_pct,
        interpolation=data_config.interpolation,
        mean=data_config.mean,
        std=data_config.std,
        dtype=dtype,
    )
    clusters = None if images.clusters is None else images.clusters[evaluation.indices]
    return Verdict(evaluation=evaluation, interval=top1_interval(evaluation.correct, clusters), info=info)


def without_accuracy(config: PruneConfig) -> PruneConfig:
    """The config for a model about to be trained: what was measured of its speed stays, its accuracy was another's."""
    results = config.results or Results()
    return config.evolve(
        weights=None,
        results=results.model_copy(update={"macs": macs(config), "top1": None, "top5": None, "eval": None}),
    )


def with_accuracy(config: PruneConfig, tested: Verdict, weights: Weights) -> PruneConfig:
    """The config of a trained model with its accuracy on the test split."""
    results = without_accuracy(config).results
    assert results is not None
    found = {"top1": tested.evaluation.top1, "top5": tested.evaluation.top5, "eval": tested.info}
    return config.evolve(weights=weights, results=results.model_copy(update=found))
