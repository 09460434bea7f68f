"""Predicted latency of a schedule: one lookup per half block, reduction, stem and head, summed and corrected.

The same lookups tell its peak memory (`latency_tables.memory`).

Where each image keeps counts of its own, the latency is a distribution over batches of real images.

Nothing is predicted that was not measured: other hardware, blocks, operations or token counts are refused with a
sentence that says what to rebuild.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latency_tables.device import DeviceInfo
from latency_tables.errors import ExceedsMemoryError, LatencyTableError, UnmeasuredTokensError
from latency_tables.interpolation import Curve, PairCurve, Surface, has_one_share, in_proportion
from latency_tables.memory import MemoryLookup
from latency_tables.parts import (
    ATTENTION,
    BLOCK,
    HEAD,
    MASKED_ATTENTION,
    MLP,
    REDUCTION_KINDS,
    SIZED_ATTENTION,
    STEM,
    ReductionKind,
    gives_sizes,
    kind_name,
    measured_methods,
)
from latency_tables.reach import Reach
from latency_tables.schema import LatencyTable
from prunefront.config import ConfigSource, load_config
from prunefront.geometry import ModelGeometry, block_key, geometry_for
from prunefront.registry import get_method
from prunefront.schedule import BlockSchedule, TokenSchedule, plan_schedule, schedule_of_counts

logger = logging.getLogger(__name__)

# Names of Correction.factors. "rest": stem, head, and the learned predictors of selections.
PARTS = ("attention", "mlp", "reduction", "rest")


@dataclass(frozen=True, kw_only=True)
class BlockPrediction:
    """Uncorrected milliseconds of one block."""

    attention_ms: float
    reduction_ms: float
    mlp_ms: float
    predictor_ms: float = 0.0  # What selecting tokens by a learned predictor takes; part of reduction_ms.


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A schedule's latency and what it is made of, and its peak memory."""

    latency_ms: float  # Corrected; what a whole model is expected to take.
    rest_ms: float  # Stem and head, uncorrected like the blocks.
    blocks: tuple[BlockPrediction, ...]
    peak_memory_mib: float | None = None  # Weights and working memory; None where the table does not tell it.
    is_nominal: bool = False  # Each image keeps counts of its own; `predict_distribution` takes them into account.

    @property
    def part_sums(self) -> dict[str, float]:
        """Uncorrected sums by part, as `Correction.factors` names them."""
        return {
            "attention": sum(block.attention_ms for block in self.blocks),
            "mlp": sum(block.mlp_ms for block in self.blocks),
            "reduction": sum(block.reduction_ms - block.predictor_ms for block in self.blocks),
            # Linear layers that run once, unlike sorting and gathering.
            "rest": self.rest_ms + sum(block.predictor_ms for block in self.blocks),
        }


@dataclass(frozen=True, kw_only=True)
class LatencyDistribution:
    """Predicted ms per forward pass of the table's batch, over batches of real images."""

    mean_ms: float
    p50_ms: float
    p95_ms: float
    num_batches: int


class Predictor:
    """Lookups prepared from one table; `predict` re-uses one per table."""

    def __init__(self, table: LatencyTable) -> None:
        # The table may be garbage collected while its predictor is cached, so only what is needed is kept.
        self.name = table.name
        self.block_key = table.block_key
        self.batch_size = table.batch_size
        self._device = table.device.name
        self._correction = table.correction
        groups = table.latencies_ms
        self._reach = _reaches(table)
        for needed in (ATTENTION, MLP):
            if needed not in groups and needed in self._reach:
                raise LatencyTableError(
                    f"Nothing can be predicted from table {self.name!r}: {needed!r} ran out of memory at every token "
                    f"count, at batch size {self.batch_size} on {self._device}. Build one with a smaller batch size."
                )
            if needed not in groups:
                raise LatencyTableError(
                    f"Table {self.name!r} has no {needed!r} entries, so nothing can be predicted from it. Measure the "
                    "attention and MLP halves of a block at several token counts, and import them again."
                )
        self._attention = _curve(groups[ATTENTION])
        self._mlp = _curve(groups[MLP])
        self.min_tokens = max(self._attention.tokens[0], self._mlp.tokens[0])
        self.max_tokens = min(self._attention.tokens[-1], self._mlp.tokens[-1])
        # Sizes and masks cost a bias in attention, which has an element for each pair of tokens: the extra is
        # interpolated by their square, and few token counts are enough for it.
        self._bias_extra = {
            name: Curve(
                {at: ms - self._attention(at) for (at, _), ms in groups.get(name, {}).items()} or {0: 0.0}, power=2
            )
            for name in (SIZED_ATTENTION, MASKED_ATTENTION)
        }
        self._memory = MemoryLookup.of(table)
        # One convolution over the patches: another image size costs in proportion to its tokens.
        self._stem = {tokens_out: ms for (_, tokens_out), ms in groups.get(STEM, {}).items()}
        self._head = Curve({tokens_in: ms for (tokens_in, _), ms in groups.get(HEAD, {}).items()} or {0: 0.0})
        self._overhead = {
            kind.name: _overhead(
                kind,
                {
                    (t_in, t_out): ms - self._halves_ms(kind, t_in, t_out)
                    for (t_in, t_out), ms in groups[kind.entry].items()
                },
            )
            for kind in REDUCTION_KINDS.values()
            if kind.entry in groups
        }

    def predict(self, schedule: TokenSchedule) -> Prediction:
        """Look a schedule up.

        Args:
            schedule: Of every image of a batch.

        Raises:
            ExceedsMemoryError: If it needs what ran out of memory.
            LatencyTableError: If it needs token counts or operations that were not measured.
        """
        options = dict(schedule.options)
        method = get_method(schedule.method)
        proportional = method.uses_size_bias(options)
        sized = masked = False
        appended = 0  # Beyond the tokens of the image; the table need not reach that far.
        blocks = []
        working_mib = []  # Of every block.
        for block in schedule.blocks:
            if method.carries_added_tokens:
                appended += len(block.steps)
            self.require_halves(f"Block {block.index}", max(block.tokens_entering, block.tokens_in, block.tokens_out))
            self._require_measured(block, appended)
            attention = _half_ms(self._attention, block.tokens_in)
            bias = MASKED_ATTENTION if masked else SIZED_ATTENTION if sized and proportional else None
            if bias is not None:
                self._require_room(f"Block {block.index}", bias, block.tokens_in)
                attention += self._bias_extra[bias](block.tokens_in)
            reduction, entry, has_predictor = 0.0, None, False
            if block.steps:
                kind = kind_name(schedule.method, options, block.steps)
                known = self._require_kind(kind)
                reduction, entry = self._reduction_ms(known, block), BLOCK + known[-1]
                has_predictor = REDUCTION_KINDS[kind].has_predictor
                sized = sized or gives_sizes(kind, block.steps)
                masked = masked or REDUCTION_KINDS[kind].masks_attention
            mlp = _half_ms(self._mlp, block.tokens_out)
            if self._memory is not None:
                working_mib.append(self._memory.block_mib(block, reduction=entry, bias=bias))
            blocks.append(
                BlockPrediction(
                    attention_ms=attention, reduction_ms=reduction, mlp_ms=mlp,
                    predictor_ms=reduction if has_predictor else 0.0,
                )
            )  # fmt: skip
        first, last = schedule.blocks[0].tokens_entering, schedule.blocks[-1].tokens_out
        self._require_room("The model", STEM, first)
        self._require_room("The model", HEAD, last)
        rest_ms = in_proportion(self._stem, first) + self._head(last)
        memory = self._memory
        plain = Prediction(latency_ms=0.0, rest_ms=rest_ms, blocks=tuple(blocks))
        correction = self._correction
        latency_ms = corrected_ms(plain.part_sums, correction.intercept_ms, correction.factors)
        if not any(block.steps for block in schedule.blocks):
            latency_ms *= correction.dense_factor
        return Prediction(
            latency_ms=latency_ms,
            rest_ms=plain.rest_ms,
            blocks=plain.blocks,
            peak_memory_mib=None if memory is None else memory.peak_mib(schedule, working_mib),
            is_nominal=not schedule.is_static,
        )

    def predict_distribution(self, schedule: TokenSchedule, counts: NDArray[np.int64]) -> LatencyDistribution:
        """`predict_distribution` for a schedule."""
        self._check_counts(schedule, counts)
        num_batches = len(counts) // self.batch_size
        rows, places = np.unique(counts[: num_batches * self.batch_size], axis=0, return_inverse=True)
        of_rows = [self.predict(schedule_of_counts(schedule, kept.tolist())).latency_ms for kept in rows]
        # Batches are packed: an image takes its share of what a batch of its like takes.
        latencies_ms = np.array(of_rows)[places.reshape(num_batches, self.batch_size)].mean(axis=1)
        p50_ms, p95_ms = np.percentile(latencies_ms, [50, 95])
        return LatencyDistribution(
            mean_ms=float(latencies_ms.mean()), p50_ms=float(p50_ms), p95_ms=float(p95_ms), num_batches=num_batches
        )

    def covered_methods(self, geometry: ModelGeometry) -> list[str]:
        """Methods all of whose reductions on such a model the table has an entry for."""
        missing = {
            kind.method
            for kind in REDUCTION_KINDS.values()
            if kind.runs_on(geometry) and self._known_kinds(kind.name) is None
        }
        return [name for name in measured_methods() if name not in missing]

    def _check_counts(self, schedule: TokenSchedule, counts: NDArray[np.int64]) -> None:
        if schedule.is_static:
            raise LatencyTableError(
                "Every image keeps the counts of this schedule, so its latency is a point. Use predict_latency_ms."
            )
        num_sites = sum(len(block.steps) for block in schedule.blocks)
        if counts.ndim != 2 or counts.shape[1] != num_sites:
            raise LatencyTableError(
                f"Expected counts of shape (images, {num_sites} sites), but got {counts.shape}. "
                "Count with prunefront.token_use.TokenCounter on a model of this config."
            )
        if len(counts) < self.batch_size:
            raise LatencyTableError(
                f"Table {self.name!r} is for batches of {self.batch_size} images, but counts of {len(counts)} were "
                "given. Count more images, or use a table of a smaller batch size."
            )
        patches = schedule.blocks[0].tokens_entering - schedule.num_prefix_tokens
        if np.any(np.diff(counts, axis=1, prepend=patches) > 0) or np.any(counts < 0):
            raise LatencyTableError(
                f"Counts are of the patches kept at each site: 0 to {patches}, and none above the site before. "
                "Count with prunefront.token_use.TokenCounter on a model of this config."
            )

    def _halves_ms(self, kind: ReductionKind, tokens_in: int, tokens_out: int) -> float:
        """What both halves take of a measured block that reduces."""
        attended = kind.tokens_attended(tokens_in, tokens_out)
        mask = self._bias_extra[MASKED_ATTENTION](attended) if kind.masks_attention else 0.0
        return self._attention(attended) + mask + self._mlp(tokens_out)

    def _reduction_ms(self, kinds: Sequence[str], block: BlockSchedule) -> float:
        """Cost of reductions that ``kinds`` add up to: one for each step, or all at what the block removes."""
        points = [(step.tokens_in, step.tokens_out) for step in block.steps]
        if len(kinds) != len(points):
            points = [(block.tokens_entering, block.tokens_out)] * len(kinds)
        for kind, point in zip(kinds, points, strict=True):
            self._require_room(f"Block {block.index}", BLOCK + kind, *point)
        return sum(self._overhead[kind](*point) for kind, point in zip(kinds, points, strict=True))

    def _known_kinds(self, name: str) -> tuple[str, ...] | None:
        """The kind itself, one that stands in for it, or several that add up to it; None without their entries."""
        if name in self._overhead or BLOCK + name in self._reach:
            return (name,)
        kind = REDUCTION_KINDS[name]
        parts = [self._known_kinds(part) for part in ((kind.like,) if kind.like else kind.parts)]
        found = [part for part in parts if part is not None]
        return tuple(itertools.chain.from_iterable(found)) if found and len(found) == len(parts) else None

    def _require_kind(self, kind: str) -> tuple[str, ...]:
        known = self._known_kinds(kind)
        if known is not None:
            return known
        raise LatencyTableError(
            f"Table {self.name!r} has no entry {BLOCK + kind!r}, which this schedule needs; it knows "
            f"{', '.join(sorted(BLOCK + known for known in self._overhead)) or 'no reductions'}. Rebuild the table, "
            "add the entry to the CSV, or choose a method that it knows."
        )

    def require_halves(self, what: str, tokens: int) -> None:
        """Refuse a block on so many tokens where its halves ran out of memory.

        Args:
            what: Begins the sentence.
            tokens: Prefix tokens counted.

        Raises:
            ExceedsMemoryError: If they did.
        """
        self._require_room(what, ATTENTION, tokens)
        self._require_room(what, MLP, tokens)

    def _require_room(self, what: str, entry: str, tokens: int, tokens_out: int | None = None) -> None:
        """Refuse what is not known to fit; ``tokens_out`` are those left, all by default."""
        reach = self._reach.get(entry)
        if reach is None or reach.covers(tokens, tokens if tokens_out is None else tokens_out):
            return
        points = f"{tokens} tokens" if tokens_out is None else f"{tokens} -> {tokens_out} tokens"
        fits = f"up to {reach.max_tokens} tokens" if reach.max_tokens else "at no token count for certain"
        raise ExceedsMemoryError(
            f"{what} needs {entry!r} on {points}, which ran out of memory at batch size {self.batch_size} on "
            f"{self._device} (table {self.name!r}; it fits {fits}). Choose a smaller batch size or fewer tokens."
        )

    def _require_measured(self, block: BlockSchedule, appended: int) -> None:
        parts = {"attention": block.tokens_in, "MLP": block.tokens_out, "reduction": block.tokens_entering}
        for part, tokens in parts.items():
            if not self.min_tokens <= tokens <= self.max_tokens + appended:
                raise UnmeasuredTokensError(
                    f"The {part} of block {block.index} works on {tokens} tokens, but table {self.name!r} was measured "
                    f"for {self.min_tokens} to {self.max_tokens}. Rebuild the table from a model whose token counts "
                    f"include {tokens}, or restrict the schedule."
                )


def predict_latency_ms(table: LatencyTable, config: ConfigSource | TokenSchedule) -> float:
    """Expected latency of a whole model in ms per forward pass of the table's batch size.

    Args:
        table: Measured or imported.
        config: Config, dict, path or open file, or a config's schedule where the caller has it already.

    Raises:
        LatencyTableError: If the table is for other blocks, or lacks token counts or operations of the schedule.
        ModelError, ConfigError, UnknownNameError: If the config has no schedule.
    """
    return predict(table, config).latency_ms


def predict(table: LatencyTable, config: ConfigSource | TokenSchedule) -> Prediction:
    """`predict_latency_ms` with its parts: which block and which half the time goes to."""
    return predictor_of(table).predict(_schedule_for(table, config))


def predict_distribution(
    table: LatencyTable, config: ConfigSource | TokenSchedule, counts: NDArray[np.int64]
) -> LatencyDistribution:
    """Expected latencies of a model whose images keep counts of their own, such as adaptive SPViT's.

    Batches are filled in the order of the images; the rest of the images is left out. Nothing is padded, so a batch
    takes the mean of what batches of images like each of its own would take.

    Args:
        table: Measured or imported.
        config: As for `predict_latency_ms`.
        counts: Patches that each image keeps at each site, (images, sites), as
            `prunefront.token_use.TokenCounter` counts them on real images.

    Raises:
        LatencyTableError: If all images keep the schedule's counts, these counts are not of this schedule or do not
            fill a batch, or as for `predict_latency_ms`.
    """
    return predictor_of(table).predict_distribution(_schedule_for(table, config), counts)


def _schedule_for(table: LatencyTable, config: ConfigSource | TokenSchedule) -> TokenSchedule:
    """The schedule of a config whose blocks the table has."""
    if isinstance(config, TokenSchedule):
        return config
    config = load_config(config)
    geometry = geometry_for(config.model)
    require_same_blocks(table, geometry, config.model.name)
    return plan_schedule(config, geometry)


def corrected_ms(part_sums: Mapping[str, float], intercept_ms: float, factors: Mapping[str, float]) -> float:
    """Corrected total, never below zero."""
    return max(0.0, intercept_ms + sum(factors.get(part, 1.0) * ms for part, ms in part_sums.items()))


def require_same_blocks(table: LatencyTable, geometry: ModelGeometry, name: str) -> None:
    """Refuse a table made of other blocks.

    Raises:
        LatencyTableError: If the block types differ.
    """
    if block_key(geometry) != table.block_key:
        raise LatencyTableError(
            f"Table {table.name!r} was measured on blocks {table.block_key!r} (from {table.model.name!r}), but "
            f"{name!r} is made of {block_key(geometry)!r}. Build a table for this model."
        )


def check_table_matches(
    table: LatencyTable,
    *,
    device_info: DeviceInfo,
    runtime: str,
    dtype: str,
    batch_size: int,
    geometry: ModelGeometry,
) -> list[str]:
    """Make sure that a table may be used for a device, runtime, dtype, batch size and model.

    Returns:
        Differences that do not forbid its use (versions, driver), one sentence each; they are logged as warnings.

    Raises:
        LatencyTableError: If something that must match differs; the sentence says what and what to do.
    """
    pairs: list[tuple[str, Any, Any]] = [("runtime", table.runtime, runtime), ("dtype", table.dtype, dtype)]
    pairs.append(("batch size", table.batch_size, batch_size))
    own, wanted = table.device, device_info
    if own.fingerprint() != wanted.fingerprint():
        pairs += [
            ("device kind", own.kind, wanted.kind),
            ("device", own.name, wanted.name),
            ("instruction sets", " ".join(own.cpu_features), " ".join(wanted.cpu_features)),
        ]
        if own.kind == "cpu":
            pairs.append(("number of threads", own.threads, wanted.threads))
    differences = [f"{what} {ours!r} instead of {theirs!r}" for what, ours, theirs in pairs if ours != theirs]
    if differences:
        raise LatencyTableError(
            f"Table {table.name!r} does not fit: it was measured with {', '.join(differences)}. "
            "Build a table here with `prunefront table build`, or choose the one made for this."
        )
    require_same_blocks(table, geometry, "the model")
    predictor_of(table).require_halves("The model", geometry.num_tokens)
    if geometry.num_tokens > predictor_of(table).max_tokens:
        raise LatencyTableError(
            f"Table {table.name!r} reaches up to {predictor_of(table).max_tokens} tokens, but the model has "
            f"{geometry.num_tokens}. Build a table for this model and image size."
        )
    warnings = [
        f"Table {table.name!r} was measured with {package} {version}, but here is {wanted.versions[package]}."
        for package, version in own.versions.items()
        if package in wanted.versions and wanted.versions[package] != version
    ]
    if own.driver is not None and wanted.driver is not None and own.driver != wanted.driver:
        warnings.append(f"Table {table.name!r} was measured with driver {own.driver}, but here is {wanted.driver}.")
    for warning in warnings:
        logger.warning("%s Run `prunefront table validate` to see whether it still holds.", warning)
    return warnings


def _half_ms(curve: Curve, tokens: int) -> float:
    """Half a block; the few tokens that a method appended to all of an image's cost in proportion."""
    return curve(tokens) * max(1.0, tokens / curve.tokens[-1])


def _reaches(table: LatencyTable) -> dict[str, Reach]:
    """By name, how far the entries reach that ran out of memory somewhere."""
    reaches = {}
    for name in {entry.entry for entry in table.unfit_entries}:
        fitted: list[tuple[int, int]] = []
        failed: list[tuple[int, int]] = []
        for entry in table.entries_by_name[name]:
            # Only a reduction is looked up by both counts, the stem by those that it makes, the rest by those it takes.
            tokens = entry.tokens_out if name == STEM else entry.tokens_in
            point = (tokens, entry.tokens_out if name.startswith(BLOCK) else tokens)
            (failed if entry.median_ms is None else fitted).append(point)
        reaches[name] = Reach(fitted, failed)
    return reaches


def _overhead(kind: ReductionKind, points: Mapping[tuple[int, int], float]) -> Surface | PairCurve:
    """What a reduction takes beyond its halves, by tokens entering and leaving."""
    if not kind.masks_attention:
        return Surface(points)
    # A mask has an element for each pair of tokens: of those that stay where connections are chosen, which takes most.
    # With one share removed for all (compiled tables), counts that enter cannot tell 197 -> 183 tokens from 197 -> 39.
    return PairCurve(points) if has_one_share(points) else Surface(points, power=2)


def _curve(points: Mapping[tuple[int, int], float]) -> Curve:
    return Curve({tokens_in: ms for (tokens_in, _), ms in points.items()})


_PREDICTORS: dict[int, tuple[weakref.ref[LatencyTable], Predictor]] = {}


def predictor_of(table: LatencyTable) -> Predictor:
    """The table's predictor, made once: tables are immutable, and hashing one costs more than a prediction.

    Raises:
        LatencyTableError: If the table lacks entries that every prediction needs.
    """
    known = _PREDICTORS.get(id(table))
    if known is not None and known[0]() is table:
        return known[1]
    predictor = Predictor(table)
    key = id(table)
    _PREDICTORS[key] = (weakref.ref(table, lambda _: _PREDICTORS.pop(key, None)), predictor)
    return predictor
