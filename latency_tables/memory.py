"""Predicted peak memory of a schedule: the weights, and what the part that needs most has in use beside them.

Parts run one after the other, so what they have in use does not add up. Weights do: those of the measured model are in
the table, those of learned score predictors follow from its geometry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch

from latency_tables.interpolation import Curve, Surface, in_proportion
from latency_tables.measure import weights_mib
from latency_tables.parts import ATTENTION, BLOCK, HEAD, STEM
from latency_tables.schema import LatencyTable, WeightMemory
from prunefront.config import ModelSpec
from prunefront.geometry import ModelGeometry, geometry_for
from prunefront.registry import get_method
from prunefront.runtimes import DTYPES
from prunefront.schedule import BlockSchedule, TokenSchedule

Figures = Mapping[str, Mapping[tuple[int, int], float]]  # MiB by entry, and tokens in and out.


class MemoryLookup:
    """The memory figures of a table, in MiB."""

    def __init__(self, weights: WeightMemory, figures: Figures, *, model: ModelSpec, dtype: str) -> None:
        self._weights = weights
        self._model = model
        self._dtype = dtype
        self._stem = {tokens_out: mib for (_, tokens_out), mib in figures.get(STEM, {}).items()}
        self._curves = {
            name: Curve({tokens_in: mib for (tokens_in, _), mib in points.items()})
            for name, points in figures.items()
            if not name.startswith(BLOCK)
        }
        # Entries of both halves tell what a whole block has in use.
        self._block = self._curves[ATTENTION]
        self._extra = {
            name: Surface({(t_in, t_out): mib - self._block(t_in) for (t_in, t_out), mib in points.items()})
            for name, points in figures.items()
            if name.startswith(BLOCK)
        }

    @classmethod
    def of(cls, table: LatencyTable) -> MemoryLookup | None:
        """None where a table does not tell the memory of its weights or blocks."""
        figures: dict[str, dict[tuple[int, int], float]] = {}
        for entry in table.entries:
            if entry.peak_memory_mib is not None:
                figures.setdefault(entry.entry, {})[entry.tokens_in, entry.tokens_out] = entry.peak_memory_mib
        if table.weights is None or ATTENTION not in figures:
            return None
        return cls(table.weights, figures, model=table.model, dtype=table.dtype)

    def block_mib(self, block: BlockSchedule, *, reduction: str | None, bias: str | None) -> float:
        """What a block has in use beside the weights.

        Args:
            block: With its token counts.
            reduction: Entry of the reduction in it.
            bias: Entry of the attention whose bias it has; measured without the MLP, which may need more.
        """
        mib = self._block(block.tokens_entering)
        if reduction in self._extra:
            mib += self._extra[reduction](block.tokens_entering, block.tokens_out)
        return max(mib, self._curves[bias](block.tokens_in)) if bias in self._curves else mib

    def peak_mib(self, schedule: TokenSchedule, blocks_mib: Sequence[float]) -> float:
        """Of a model with this schedule.

        Args:
            schedule: Of a model made of the table's blocks.
            blocks_mib: What each block has in use, from `block_mib`.
        """
        first, last = schedule.blocks[0].tokens_entering, schedule.blocks[-1].tokens_out
        head_mib = self._curves[HEAD](last) if HEAD in self._curves else 0.0
        working_mib = max(in_proportion(self._stem, first), head_mib, *blocks_mib)
        weights = self._weights
        return len(blocks_mib) * weights.block_mib + weights.rest_mib + self._predictors_mib(schedule) + working_mib

    def _predictors_mib(self, schedule: TokenSchedule) -> float:
        """Weights of the learned score predictors, one per site; models of equal blocks have equal ones."""
        num_sites = sum(len(block.steps) for block in schedule.blocks)
        return num_sites and num_sites * predictor_mib(schedule.method, geometry_for(self._model), self._dtype)


@lru_cache(maxsize=512)
def predictor_mib(method: str, geometry: ModelGeometry, dtype: str) -> float:
    """Weights of one site's score predictor in a dtype, MiB; 0 for methods without any."""
    with torch.device("meta"):
        predictor = get_method(method).create_predictor(geometry)
    return 0.0 if predictor is None else weights_mib(predictor.to(DTYPES[dtype]))
