"""Search spaces with a synthetic latency: so many milliseconds a token."""

from __future__ import annotations

from typing import Any

from prunefront.config import ModelSpec
from prunefront.geometry import geometry_for
from prunefront.schedule import TokenSchedule
from search.documents import SearchSpace
from search.space import ScheduleSpace, Variances

SMALL = ModelSpec(
    name="vit_tiny_patch16_224",
    img_size=64,
    kwargs={"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3},
)
NO_CLASS_TOKEN = ModelSpec(
    name="vit_tiny_patch16_224",
    img_size=64,
    kwargs={
        "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "class_token": False, "global_pool": "avg",
    },
)  # fmt: skip
METHODS = ("evit", "ppt", "tome", "diffrate", "hybrid")
ATTENTION_MS, MLP_MS = 1.0, 2.0
VARIANCES = Variances(by_block={block: [0.1 * (block + 1) * rank for rank in range(1, 11)] for block in range(4)})


def latency_ms(schedule: TokenSchedule) -> float:
    return sum(ATTENTION_MS * block.tokens_in + MLP_MS * block.tokens_out for block in schedule.blocks)


def space_of(spec: ModelSpec = SMALL, *, variances: Variances | None = VARIANCES, **allowed: Any) -> ScheduleSpace:
    max_latency_ms = allowed.pop("max_latency_ms", None)
    return ScheduleSpace(
        spec,
        geometry_for(spec),
        SearchSpace(**allowed),
        latency_ms=latency_ms,
        max_latency_ms=max_latency_ms,
        variances=variances,
    )
