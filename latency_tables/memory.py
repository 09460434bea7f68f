"""Predicted peak memory of a schedule: the weights, and what the part that needs most has in use beside them.

Parts run one after the other, so what they have in use does not add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from latency_tables.interpolation import Curve, Surface, in_proportion
from latency_tables.parts import ATTENTION, BLOCK, HEAD, STEM
from latency_tables.schema import LatencyTable, WeightMemory
from prunefront.schedule import BlockSchedule

Figures = Mapping[str, Mapping[tuple[int, int], float]]  # MiB by entry, and tokens in and out.


class MemoryLookup:
    """The memory figures of a table, in MiB."""

    def __init__(self, weights: WeightMemory, figures: Figures) -> None:
        self._weights = weights
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
        return None if table.weights is None or ATTENTION not in figures else cls(table.weights, figures)

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

    def peak_mib(self, tokens_first: int, tokens_last: int, blocks_mib: Sequence[float]) -> float:
        """Of a model whose first block begins and whose last one ends with so many tokens."""
        head_mib = self._curves[HEAD](tokens_last) if HEAD in self._curves else 0.0
        working_mib = max(in_proportion(self._stem, tokens_first), head_mib, *blocks_mib)
        return len(blocks_mib) * self._weights.block_mib + self._weights.rest_mib + working_mib
