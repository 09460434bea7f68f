"""The latency of kept counts as a differentiable cost, so that DiffRate's counts can be learned for a device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from latency_tables.predict import Predictor
from latency_tables.schema import LatencyTable
from prunefront.config import ModelSpec, PruneConfig
from prunefront.geometry import geometry_for
from prunefront.published_schedules import diffrate_sites
from prunefront.schedule import plan_schedule
from prunefront.training.rates import Cost, KeptCounts

SLOPE_TOKENS = 2  # half-width of the difference that stands for the derivative: below it a table is all but linear


def latency_cost(table: LatencyTable, spec: ModelSpec) -> Cost:
    """Predicted milliseconds of a model under kept counts; the gradient is the table's slope at each count.

    Args:
        table: Of the model's blocks.
        spec: The model.

    Raises:
        LatencyTableError: If the table is for other blocks, or lacks what a schedule needs (when it is called).
    """
    geometry = geometry_for(spec)
    predictor = Predictor(table)
    most = geometry.num_tokens

    def predicted_ms(prune: Sequence[int], merge: Sequence[int]) -> float:
        sites = diffrate_sites(prune, merge, only_removing=True)
        config = PruneConfig.model_validate({"model": spec, "method": "diffrate", "sites": sites})
        return predictor.predict(plan_schedule(config, geometry)).latency_ms

    def cost(counts: KeptCounts) -> Tensor:
        prune, merge = counts.integers()
        total = counts.prune[0].new_tensor(predicted_ms(prune, merge))
        for kept, tensors in ((prune, counts.prune), (merge, counts.merge)):
            for block, count in enumerate(tensors):
                if not count.requires_grad:
                    continue
                own = kept[block]
                low, high = max(own - SLOPE_TOKENS, 2), min(own + SLOPE_TOKENS, most)
                sides = []
                for value in (low, high):
                    kept[block] = value
                    sides.append(predicted_ms(prune, merge))
                kept[block] = own
                slope = (sides[1] - sides[0]) / max(high - low, 1)
                total = total + slope * (count - count.detach())
        return total

    return cost
