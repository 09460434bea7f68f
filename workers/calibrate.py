"""Task: the spread of PPT's scores in a dense model, from which PPT's thresholds are chosen as quantiles.

PPT pools an image's tokens where the variance of their significance is below a threshold. That variance depends on
model and token count, so a published threshold means nothing for another model; its quantile does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.eva import EvaBlock
from torch import Tensor, nn

from prunefront.errors import ModelError
from prunefront.geometry import geometry_of, require_supported
from prunefront.ops.attention import class_value_scores, project_qkv, project_rotated_qkv
from prunefront.training.data import SplitName, data_config_of, evaluation_batches
from workers.candidate_models import CandidateModels
from workers.devices import prepare_device
from workers.images import open_images
from workers.payloads import CalibratePayload, parse_payload
from workers.tasks import JsonDict, TaskContext

CALIBRATION_SPLIT: SplitName = "search"  # the split that proposals may see


def run_calibrate(payload: JsonDict, context: TaskContext) -> JsonDict:
    """Collect PPT's score variance per block and image, nothing being removed.

    Args:
        payload: See :class:`workers.payloads.CalibratePayload`.
        context: Device, progress and the request to stop.

    Returns:
        ``{"ppt_variance": {block: [variance per image, ascending]}}``, blocks 0-based as text.

    Raises:
        ModelError: If the model has no class token, by whose attention PPT ranks.
    """
    task = parse_payload(CalibratePayload, payload)
    device = prepare_device(context.device)
    dense = CandidateModels(task.model, task.weights).dense.to(device)
    images = open_images(task.dataset, CALIBRATION_SPLIT, data_config_of(dense), task.num_images)
    collected: list[Tensor] = []
    seen = 0
    for batch, _ in evaluation_batches(images, task.batch_size):
        context.stop_if_asked()
        collected.append(score_variances(dense, batch.to(device)).cpu())
        seen += len(batch)
        context.progress(seen, task.num_images, "reading score variances")
    variances = torch.cat(collected, dim=1).sort(dim=1).values
    return {"ppt_variance": {str(block): row.tolist() for block, row in enumerate(variances)}}


def score_variances(model: nn.Module, images: Tensor) -> Tensor:
    """Return the unbiased variance of PPT's significance scores over the non-prefix tokens.

    Section 3 of Wu et al., "PPT", arXiv:2310.01812.

    Args:
        model: A dense timm ViT with a class token, on the device of the images.
        images: Shape (B, C, H, W).

    Returns:
        Variances entering each block's reduction, shape (depth, B), float32.

    Raises:
        ModelError: If the model has no class token.
    """
    geometry = geometry_of(model)
    if not geometry.has_class_token:
        raise ModelError(
            "PPT ranks tokens by the attention of the class token, but this model has none. Leave ppt out."
        )
    vit: Any = require_supported(model)
    rows: list[Tensor] = []

    def before(block: Any, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        normed = block.norm1(arguments[0])
        if isinstance(block, EvaBlock):
            state = project_rotated_qkv(block.attn, normed, options.get("rope"))
        else:
            state = project_qkv(block.attn, normed)
        scores = class_value_scores(state, geometry.num_prefix_tokens)
        rows.append(scores.float().var(dim=-1, unbiased=True))

    hooks: list[Callable[[], None]] = [
        block.register_forward_pre_hook(before, with_kwargs=True).remove for block in vit.blocks
    ]
    try:
        with torch.inference_mode():
            model.eval()(images)
    finally:
        for remove in hooks:
            remove()
    return torch.stack(rows)
