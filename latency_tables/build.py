"""Build a latency table: time the parts of a model's blocks at chosen token counts, then a few whole models.

Halves of blocks are timed inside a running chain of the model's own blocks, so that weights come from where they come
from in the model, and allocator and caches are in their usual state. Every run is interleaved with the dense model,
and brought to one speed of the machine by it.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from os import PathLike
from typing import Any, cast

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from latency_tables.correction import WholeModel, fit_correction
from latency_tables.device import DeviceInfo, describe_device, torch_device
from latency_tables.errors import DisturbedError, ExceedsMemoryError, LatencyTableError, MeasurementStoppedError
from latency_tables.foreign_cpu import CpuWatch, LinuxCpuWatch, Patience
from latency_tables.interpolation import interpolate
from latency_tables.measure import (
    MIB,
    STOPPED,
    WHOLE,
    Lap,
    Measurement,
    MeasureSettings,
    Progress,
    ShouldStop,
    Stopwatch,
    Subject,
    measure_subjects,
    measuring,
    peak_memory_mib,
    rounds_for,
    stopwatch_for,
    warm_up,
    weights_mib,
    whole_model,
)
from latency_tables.out_of_memory import free_memory, if_it_fits
from latency_tables.partial import FinishedGroup, PartialFile, canary_drift, rescaled
from latency_tables.parts import (
    ATTENTION,
    HEAD,
    MLP,
    STEM,
    AttentionHalf,
    Frame,
    Head,
    MlpHalf,
    ReducingBlock,
    ReductionKind,
    Stem,
    biased_attentions,
    measured_kinds,
)
from latency_tables.predict import Predictor, corrected_ms
from latency_tables.probe import CALL, FEED, IDLE, Probe, Stage, timed_by
from latency_tables.schedules import random_configs, telling_configs
from latency_tables.schema import Dtype, LatencyEntry, LatencyTable, Runtime, WeightMemory
from prunefront.compress import compress, create_dense
from prunefront.config import ModelSpec, PruneConfig
from prunefront.errors import is_out_of_memory
from prunefront.geometry import ModelGeometry, block_key, geometry_of, require_equal_blocks
from prunefront.runtimes import (
    DTYPES,
    SLOW_TO_PREPARE,
    Forward,
    cast_modules,
    prepare,
    use_shared_compile_cache,
)
from prunefront.schedule import Step, plan_schedule

logger = logging.getLogger(__name__)

# No seed of a validation (below 2**32) draws these schedules.
CORRECTION_SEED = 2**32 + 1
MOST_STEPS = 16  # Of attention that a build times; longer sequences have more.
BETWEEN = "between"  # Lap of what runs between timed parts, for the state in which it leaves the caches.
# Runs are measured again, so often at most, where the machine had a speed that differs so much from that of the last
# run: models change by other factors than the dense model does (pruned DeiT-S by 5 % more, for 30 % of it).
MOST_PASSES, SAME_SPEED = 3, 0.1
EntryKey = tuple[str, int, int]  # Name, tokens entering, tokens left.


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What a build measures. `settings_for` chooses by device and runtime."""

    token_shares: tuple[float, ...]  # First token counts, as shares of all tokens.
    sized_shares: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)  # The same where tokens have sizes, or attention a mask.
    # Attention gets cheaper, not dearer, right after each multiple of this: rows of its products are padded to vectors
    # and tiles. Halves are timed on both sides of each; None where that takes too long.
    attention_step: int | None = 16
    max_token_counts: int  # Adaptive refinement stops there.
    least_gap: int = 8  # Token counts closer than this are not refined between.
    tolerance: float = 0.03  # Interpolation error of a block that is good enough, relative.
    chain_blocks: int = 4  # Blocks per sample; samples take turns through all blocks of the model.
    reduction_tokens: tuple[float, ...] = (1.0, 0.4, 0.1)  # Tokens entering a timed reduction, as shares.
    reduction_removed: tuple[float, ...] = (0.1, 0.45)  # Patch tokens it removes, as shares of those present.
    reduction_blocks: int = 2  # Blocks per sample of a reduction.
    num_whole_models: int = 24  # For the correction, beside the dense one.
    blocks: MeasureSettings = MeasureSettings(warmup_rounds=1, min_rounds=8, max_rounds=30, target_s=0.3)
    reductions: MeasureSettings = MeasureSettings(warmup_rounds=1, min_rounds=6, max_rounds=20, target_s=0.15)
    models: MeasureSettings = MeasureSettings(warmup_rounds=1, min_rounds=6, max_rounds=30, target_s=0.6)
    # With processes that take CPU from the measurements; None measures beside them and marks what they disturb.
    patience: Patience | None = Patience()

    def token_counts(self, geometry: ModelGeometry) -> list[int]:
        """First token counts of the halves of a block, ascending; prefix tokens counted."""
        return _counts(self.token_shares, geometry, least_patches=1)

    def step_token_counts(self, geometry: ModelGeometry) -> list[int]:
        """Token counts on both sides of the steps of attention, ascending; of some of them where they are many."""
        if self.attention_step is None:
            return []
        least = geometry.num_prefix_tokens + 1
        stride = self.attention_step * math.ceil(geometry.num_tokens / (self.attention_step * MOST_STEPS))
        sides = {at + side for at in range(stride, geometry.num_tokens, stride) for side in (0, 1)}
        return sorted(count for count in sides if least <= count <= geometry.num_tokens)

    def sized_token_counts(self, geometry: ModelGeometry) -> list[int]:
        """Token counts of attention where tokens have sizes."""
        return _counts(self.sized_shares, geometry, least_patches=1)

    def head_token_counts(self, geometry: ModelGeometry) -> list[int]:
        """Token counts of the head: a quarter of the tokens, and all."""
        return _counts((0.25, 1.0), geometry, least_patches=1)

    def reduction_token_counts(self, geometry: ModelGeometry) -> list[int]:
        """Tokens entering a timed reduction."""
        return _counts(self.reduction_tokens, geometry, least_patches=2)


def _counts(shares: Sequence[float], geometry: ModelGeometry, *, least_patches: int) -> list[int]:
    least = geometry.num_prefix_tokens + least_patches
    return sorted({max(least, round(share * geometry.num_tokens)) for share in shares})


def settings_for(device: torch.device, runtime: str) -> BuildSettings:
    """Dense where the device has steps (GPUs: tiles of 16 tokens), sparse and adaptive elsewhere.

    Attention has steps on CPUs too (16 numbers to a vector; DeiT-S in bf16 at 191 tokens: 5 % more than at 193).

    ``compile`` times few points, as each lengthens the compilation of a probe by seconds, and few whole models, as each
    takes 15 to 30 seconds to compile. Every entry of ``onnxruntime`` is exported by itself, which takes as long.
    """
    if runtime == "compile":
        return BuildSettings(
            # From no tokens to a quarter attention is far from a line (DeiT-S, bf16: 73, 125, 181 us at 2, 16, 49).
            token_shares=(0.0, 0.08, 0.25, 0.5, 1.0),
            sized_shares=(0.0, 1.0),
            attention_step=None,
            max_token_counts=5,
            chain_blocks=1,
            reduction_tokens=(1.0, 0.1),
            reduction_removed=(0.3,),
            num_whole_models=2,
            blocks=MeasureSettings(warmup_rounds=2, min_rounds=6, max_rounds=30, target_s=5.0),
        )
    if runtime in SLOW_TO_PREPARE:
        return BuildSettings(
            token_shares=(0.0, 0.25, 0.5, 1.0),
            sized_shares=(0.5, 1.0),
            attention_step=None,
            max_token_counts=4,
            chain_blocks=1,
            reduction_tokens=(1.0,),
            reduction_removed=(0.3,),
            reduction_blocks=1,
            num_whole_models=3,
        )
    if device.type == "cuda":
        steps = tuple(step / 16 for step in range(17))
        return BuildSettings(token_shares=steps, sized_shares=steps, max_token_counts=64, least_gap=2, tolerance=0.02)
    return BuildSettings(token_shares=(0.0, 0.25, 0.5, 0.75, 1.0), max_token_counts=48)


def quick_settings() -> BuildSettings:
    """For a first look: few token counts and reductions, four whole models."""
    return BuildSettings(
        token_shares=(0.0, 0.25, 0.5, 1.0),
        sized_shares=(0.0, 1.0),
        attention_step=None,
        max_token_counts=6,
        reduction_tokens=(1.0, 0.4),
        reduction_removed=(0.4,),
        num_whole_models=4,
        blocks=MeasureSettings(warmup_rounds=1, min_rounds=6, max_rounds=30, target_s=0.3),
        reductions=MeasureSettings(warmup_rounds=1, min_rounds=5, max_rounds=15, target_s=0.1),
        models=MeasureSettings(warmup_rounds=1, min_rounds=8, max_rounds=25, target_s=0.5),
    )


def build_table(
    spec: ModelSpec,
    *,
    device: str = "cpu",
    runtime: Runtime = "eager",
    dtype: Dtype = "fp32",
    batch_size: int,
    partial_path: str | PathLike[str] | None = None,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
    settings: BuildSettings | None = None,
    stopwatch: Stopwatch | None = None,
    cpu: CpuWatch | None = None,
) -> LatencyTable:
    """Measure the table of a model's blocks on this machine.

    A part that runs out of memory becomes an entry that says so, and a whole model that does is left out of the
    correction.

    Args:
        spec: The model; weights do not matter and are random.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        partial_path: Finished entries are appended to this file; a build that finds one of its own kind goes on where
            it ended. Delete it once the table is saved: until then the same build with it costs nothing.
        progress: Told the share done (of 1.0); the message ends with the time left.
        should_stop: Asked between samples.
        settings: What to measure, in place of `settings_for`'s choice.
        stopwatch, cpu: Injected by tests.

    Raises:
        LatencyTableError: If this machine has no such device, the dense model runs out of memory, or the partial file
            belongs to another build.
        DisturbedError: If other processes take CPU from it for longer than ``settings.patience`` lasts; finished
            entries are in the partial file, and nothing that they disturbed.
        MeasurementStoppedError: When stopped; finished entries are in the partial file.
        ConfigError: If the runtime does not run on the device.
        ModelError, UnknownNameError: If the model is not supported; if it, the runtime or the dtype is unknown.
    """
    target = torch_device(device)
    if runtime == "compile":
        use_shared_compile_cache()
    try:
        build = _Build(
            spec=spec,
            device=target,
            runtime=runtime,
            dtype=dtype,
            batch_size=batch_size,
            info=describe_device(device),
            settings=settings or settings_for(target, runtime),
            stopwatch=stopwatch or stopwatch_for(target),
            cpu=cpu or LinuxCpuWatch(target),
            progress=progress,
            should_stop=should_stop,
        )
        with measuring(target):
            return build.run(partial_path)
    except DisturbedError as error:
        if partial_path is None:
            raise
        raise DisturbedError(
            f"{error} Finished entries are kept in {partial_path}; the same build goes on there."
        ) from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise LatencyTableError(
            f"{spec.name!r} does not fit into the memory of {device} at batch size {batch_size} in {dtype}. "
            "Choose a smaller batch size."
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A subject to run."""

    subject: Subject
    input: Tensor | None = None  # Tokens that stay in use while it runs, and that it does not make itself.
    tells_memory: bool = True  # Otherwise nobody asks for its peak memory, which takes a run.
    memory_of: Subject | None = None  # What needs the memory of its entries, where the subject needs more.


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """The entries that the laps of a part become, and what makes it: a part not made yet holds no memory."""

    entries: Mapping[str, EntryKey]  # Lap name → entry key.
    make: Callable[[], _Part]


@dataclass(frozen=True, kw_only=True)
class _Warm:
    """A part that has run."""

    subject: Subject
    rounds: int
    peak_memory_mib: float | None


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One interleaved run of what fitted into memory."""

    canary_ms: float | None  # None where nothing fitted.
    measured: Mapping[str, Mapping[str, Measurement]]  # By part and lap.
    peak_memory_mib: Mapping[str, float | None]
    unfit: tuple[str, ...]  # Parts that ran out of memory.
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _ProbePlan:
    """What a probe times, by lap."""

    stages: list[Stage] = field(default_factory=list)
    entries: dict[str, EntryKey] = field(default_factory=dict)
    memory_mib: dict[str, float | None] = field(default_factory=dict)
    unfit: list[EntryKey] = field(default_factory=list)  # Entries that ran out of memory; no stages.


class _Build:
    """One build: the model, what is finished, and the stages in order."""

    # Shares of the whole duration, as measured for DeiT-S on a CPU; they only shape the progress bar.
    _STAGES = {"blocks": 0.25, "reductions": 0.30, "whole models": 0.45}

    def __init__(
        self,
        *,
        spec: ModelSpec,
        device: torch.device,
        runtime: Runtime,
        dtype: Dtype,
        batch_size: int,
        info: DeviceInfo,
        settings: BuildSettings,
        stopwatch: Stopwatch,
        cpu: CpuWatch,
        progress: Progress | None,
        should_stop: ShouldStop | None,
    ) -> None:
        self.spec, self.device, self.runtime, self.dtype, self.batch_size = spec, device, runtime, dtype, batch_size
        self.info, self.settings, self.stopwatch, self.cpu = info, settings, stopwatch, cpu
        self._progress, self._should_stop = progress, should_stop
        self._started = time.monotonic()
        self._skipped_share = 0.0
        self._reported_share = 0.0
        dense = create_dense(spec)
        self.model = cast(VisionTransformer, cast_modules([dense], DTYPES[dtype], device)[0].eval())
        self.geometry: ModelGeometry = geometry_of(self.model)
        require_equal_blocks(self.geometry, spec.name)
        self.frame = Frame.of(self.model)
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, self.geometry.in_chans, *self.geometry.img_size)
        self.images = torch.randn(shape, generator=generator).to(device=device, dtype=DTYPES[dtype])
        self.blocks = cast(Sequence[Block], list(self.model.blocks))
        # Whose turn it is: a sample goes on with the block after the last of the sample before, whatever that was of.
        # Weights then come from as far as in a whole model; were they those of the sample before, from the cache.
        self._turns = itertools.count()
        self._drawn: Sequence[PruneConfig] = ()  # Whole models for the correction.

    # --- stages ---------------------------------------------------------------------------------------------------

    def run(self, partial_path: str | PathLike[str] | None) -> LatencyTable:
        self._report("blocks", 0.0, f"warming up {self.spec.name}")
        self.partial = PartialFile(partial_path, self._header())
        # Tokens as the stem makes them: realistic values, without denormal numbers.
        self.tokens: Tensor = Stem(self.model)(self.images)
        if self.runtime == "compile":
            self._measure_probes()
        else:
            self._start_canary()
            for number in range(MOST_PASSES):
                self._measure_blocks()
                self._measure_reductions()
                self._measure_whole_models(self._table())
                if number + 1 == MOST_PASSES or not self._drop_other_speeds():
                    break
        table = self._table()
        unfit = table.unfit_entries
        if unfit:
            logger.warning(
                "%d of %d entries ran out of memory; schedules that need them are refused. Choose a smaller batch size "
                "for those", len(unfit), len(table.entries),
                extra={"action": "build_table", "unfit_entries": len(unfit), "reason": unfit[0].reason},
            )  # fmt: skip
        noisy = table.noisy_entries
        if noisy:
            logger.warning(
                "%d of %d entries are noisy; measure again on a quieter machine", len(noisy), len(table.entries),
                extra={"action": "build_table", "noisy_entries": len(noisy), "reason": noisy[0].reason},
            )  # fmt: skip
        if table.canary_drift is not None and not table.is_steady:
            logger.warning(
                "the machine's speed moved by %.0f%% during the build; measure again on a steadier one",
                100 * table.canary_drift, extra={"action": "build_table", "canary_drift": table.canary_drift},
            )  # fmt: skip
        self._report("whole models", 1.0, "done")
        return table

    def _finished_entries(self) -> set[EntryKey]:
        return {entry.key for group in self.partial.groups for entry in group.entries}

    def _drop_other_speeds(self) -> bool:
        """Forget runs of when the machine had another speed than it has now; whether there are any."""
        canaries = [group.canary_ms for group in self.partial.groups]
        now_ms = next(canary_ms for canary_ms in reversed(canaries) if canary_ms is not None)
        others = [
            number
            for number, canary_ms in enumerate(canaries)
            if canary_ms is not None and abs(canary_ms / now_ms - 1.0) > SAME_SPEED
        ]
        if others:
            self.partial.drop(others)
            self._report("whole models", 1.0, "the machine changed its speed: measuring some parts again")
        return bool(others)

    def _start_canary(self) -> None:
        self.canary = whole_model(self._ready(self.model), [self.images])
        warm_up(self.canary, self.stopwatch, MeasureSettings())

    def _measure_blocks(self) -> None:
        settings = self.settings
        counts = sorted({*settings.token_counts(self.geometry), *settings.step_token_counts(self.geometry)})
        ends = [self._plan_ends(count) for count in settings.head_token_counts(self.geometry)]
        chains = [
            *(self._plan_chain(count) for count in counts),
            *(
                self._plan_chain(count, attention)
                for attention in biased_attentions(self.geometry)
                for count in settings.sized_token_counts(self.geometry)
            ),
        ]
        self._group("blocks", [*chains, *ends], settings.blocks, 0.0, 0.6)
        # Refine between two counts until the middle lies on the line between them, or memory ends there.
        open_gaps = list(itertools.pairwise(counts))
        block_ms = self._block_ms()
        share = 0.6
        while open_gaps and len(counts) < settings.max_token_counts:
            middles = {
                (low + high) // 2: (low, high)
                for low, high in open_gaps
                if high - low >= 2 * settings.least_gap and (low in block_ms or high in block_ms)
            }
            middles = dict(list(middles.items())[: settings.max_token_counts - len(counts)])
            if not middles:
                break
            planned = [self._plan_chain(at) for at in middles]
            self._group("blocks", planned, settings.blocks, share, min(1.0, share + 0.2))
            share = min(1.0, share + 0.2)
            open_gaps = []
            block_ms = self._block_ms()
            for middle, (low, high) in middles.items():
                halves = [(low, middle), (middle, high)]
                if not block_ms.keys() >= {low, middle, high}:
                    open_gaps += [gap for gap in halves if (gap[0] in block_ms) != (gap[1] in block_ms)]
                elif _interpolation_error(block_ms, low, middle, high) > settings.tolerance:
                    open_gaps += halves
            counts = sorted({*counts, *middles})

    def _measure_reductions(self) -> None:
        settings = self.settings
        kinds = measured_kinds(self.geometry, composed=self.runtime not in SLOW_TO_PREPARE)
        planned: dict[EntryKey, _Planned] = {}
        for tokens, kind, removed in itertools.product(
            settings.reduction_token_counts(self.geometry), kinds, settings.reduction_removed
        ):
            one = self._plan_reduction(kind, tokens, removed)
            if one is not None:
                planned[next(iter(one.entries.values()))] = one
        # In one run: the dense model brings all to one speed, but a machine may change more than that.
        self._group("reductions", list(planned.values()), settings.reductions, 0.0, 1.0)

    def _measure_probes(self) -> None:
        """Halves and ends as one compiled graph, reductions and biased attention as another (`probe`).

        They have the weights of one and of two models, which thus come from as far away as in one.
        """
        geometry, settings = self.geometry, self.settings
        blocks = itertools.cycle(self.blocks)
        halves = _ProbePlan()
        halves.entries[STEM] = (STEM, geometry.num_patch_tokens, geometry.num_tokens)
        halves.memory_mib[STEM] = self._peak_mib(Stem(self.model), self.images)
        for count in reversed(settings.token_counts(geometry)):
            before = self._halves(next(blocks))
            halved: list[tuple[EntryKey, nn.Module]] = []
            for block in itertools.islice(blocks, min(settings.chain_blocks, geometry.depth)):
                attention, mlp = self._halves(block)
                halved += [((ATTENTION, count, count), attention), ((MLP, count, count), mlp)]
            self._add_stage(halves, before, halved)
        if not halves.stages:
            raise LatencyTableError("Every part of the model ran out of memory. Choose a smaller batch size.")
        for count in settings.head_token_counts(geometry):
            self._add_stage(halves, self._halves(next(blocks))[1:], [((HEAD, count, 1), Head(self.model))])

        others = _ProbePlan()
        for name in biased_attentions(geometry):
            for count in settings.sized_token_counts(geometry):
                before = self._halves(next(blocks), name)
                biased = AttentionHalf(next(blocks), self.frame, name)
                self._add_stage(others, before, [((name, count, count), biased)])
        # Not what costs as much as another one. But two in one block: their sum would charge what a new number of
        # tokens takes (kernels that were not in use) twice.
        kinds = [kind for kind in measured_kinds(geometry) if len(kind.parts) != 1]
        for tokens, removed in itertools.product(settings.reduction_token_counts(geometry), settings.reduction_removed):
            for kind in kinds:
                steps = kind.steps(tokens, removed, geometry.num_prefix_tokens)
                if steps is not None:
                    before = self._halves(next(blocks))[1:]
                    reducing = ReducingBlock(next(blocks), kind, steps, self.frame)
                    self._add_stage(others, before, [((kind.entry, tokens, steps[-1].tokens_out), reducing)])

        self._measure_together([halves, others], telling_configs(self.spec, geometry)[: settings.num_whole_models])

    def _halves(self, block: Block, attention: str = ATTENTION) -> list[nn.Module]:
        """Attention and MLP of a block."""
        return [AttentionHalf(block, self.frame, attention), MlpHalf(block, self.frame)]

    def _add_stage(
        self, plan: _ProbePlan, before: Sequence[nn.Module], parts: Sequence[tuple[EntryKey, nn.Module]]
    ) -> None:
        """Add parts that run one after the other, unless, run eagerly, they do not fit into memory.

        They follow untimed ones, as in a model: attention takes a tenth less after its input was cut than after an MLP.
        Halves follow a block on as many tokens, as most do; what the first block on another number of tokens takes more
        (kernels and buffers that were not in use) is thus part of the reduction that changed it.
        """
        tokens = parts[0][0][1]
        x = self.tokens[:, :tokens].contiguous()
        # Of both halves, that of a block.
        figures = if_it_fits(lambda: [self._peak_mib(part, x) for _, part in parts], self.device)
        if figures is None:
            plan.unfit.extend(dict.fromkeys(key for key, _ in parts))
            return
        most = None if None in figures else max(cast(list[float], figures)) + x.nbytes / MIB
        named = []
        for key, part in parts:
            name = f"{key[0]} {key[1]} -> {key[2]}"
            plan.entries[name], plan.memory_mib[name] = key, most
            named.append((name, part))
        plan.stages.append(Stage(tokens=tokens, parts=(*((FEED, part) for part in before), *named)))

    def _measure_together(self, plans: Sequence[_ProbePlan], configs: Sequence[PruneConfig]) -> None:
        """All probes and whole models in one run: after another compilation the machine may have another speed."""
        if not {key for plan in plans for key in (*plan.entries.values(), *plan.unfit)} - self._finished_entries():
            return
        started = time.monotonic()
        settings = self.settings.blocks
        self._start_canary()  # Only here: a build that has all its parts need not compile the model.
        subjects: dict[str, Subject] = {}
        rounds: dict[str, int] = {}
        compilations = len(plans) + len(configs)
        for number, plan in enumerate(plans):
            self._stop_if_asked()
            self._report("blocks", number / compilations, f"compiling {len(plan.entries)} parts as one graph")
            name = f"probe {number}"
            subjects[name] = self._probe(plan)
            rounds[name] = rounds_for(warm_up(subjects[name], self.stopwatch, settings), settings)
        models = {f"schedule {number} of {len(configs)}": config for number, config in enumerate(configs, start=1)}
        for number, (name, config) in enumerate(models.items(), start=len(plans)):
            self._stop_if_asked()
            self._report("blocks", number / compilations, f"compiling {name}")
            warm = if_it_fits(partial(self._warm, partial(self._whole_model, config), settings), self.device)
            if warm is None:
                self._leave_out(name, config)
            else:
                subjects[name], rounds[name] = warm.subject, warm.rounds
        canary_ms, measured = self._measure(subjects, rounds, {}, settings, "reductions", 0.0, 1.0)
        entries: list[LatencyEntry] = []
        for number, plan in enumerate(plans):
            laps = measured[f"probe {number}"]
            idle_ms = laps[IDLE].median_ms
            for name, key in plan.entries.items():
                taken = laps[name].less(idle_ms)
                if name == STEM:
                    # Entering and leaving the graph, averaged as laps of one name are; less reading the clock there.
                    taken = taken.less(idle_ms / 2 - 2 * laps[CALL].median_ms)
                entries.append(_entry(key, taken, plan.memory_mib[name]))
            entries += [self._unfit_entry(key) for key in plan.unfit]
        self.partial.append(
            FinishedGroup(
                canary_ms=canary_ms,
                entries=tuple(entries),
                whole_models=(
                    (PruneConfig(model=self.spec, method="hybrid"), canary_ms, 0.0),
                    *(
                        (config, measured[name][WHOLE].median_ms, measured[name][WHOLE].iqr_ms)
                        for name, config in models.items()
                        if name in measured
                    ),
                ),
                unfit_models=tuple(config for name, config in models.items() if name not in measured),
                seconds=time.monotonic() - started,
            )
        )

    def _probe(self, plan: _ProbePlan) -> Subject:
        probe = Probe(Stem(self.model), plan.stages)
        forward = self._ready(probe)

        def subject(lap: Lap) -> None:
            with timed_by(lap, probe.lap_names):
                forward(self.images)
                lap(CALL)

        return subject

    def _peak_mib(self, part: nn.Module, x: Tensor) -> float | None:
        """Of a part run eagerly: a compiled one needs about as much, and compiling each by itself takes minutes."""
        forward = prepare(part, "eager", self.dtype, self.device)
        forward(x)
        return peak_memory_mib(partial(forward, x), self.device)

    def _measure_whole_models(self, table: LatencyTable) -> None:
        finished = {
            config.content_hash()
            for group in self.partial.groups
            for config in (*(config for config, _, _ in group.whole_models), *group.unfit_models)
        }
        predictor = Predictor(table)

        def cost(config: PruneConfig) -> float:
            """Without the correction: a build that goes on draws what it drew before there was one."""
            return sum(predictor.predict(plan_schedule(config, self.geometry)).part_sums.values())

        if not self._drawn:
            # Once: in another pass, parts that were measured again would make others of it.
            try:
                self._drawn = random_configs(
                    self.spec, self.geometry, self.settings.num_whole_models, CORRECTION_SEED, cost=cost
                )  # fmt: skip
            except ExceedsMemoryError as error:
                logger.warning("The table goes without a correction: %s", error, extra={"action": "build_table"})
                return
        configs = [PruneConfig(model=self.spec, method="hybrid"), *self._drawn]
        todo = {
            f"schedule {number} of {len(configs)}": config
            for number, config in enumerate(configs, start=1)
            if config.content_hash() not in finished
        }
        if not todo:
            return
        makers = {key: partial(self._whole_model, config) for key, config in todo.items()}
        for run in self._runs("whole models", makers, self.settings.models, 0.0, 1.0):
            for key in run.unfit:
                self._leave_out(key, todo[key])
            self.partial.append(
                FinishedGroup(
                    canary_ms=run.canary_ms,
                    whole_models=tuple(
                        (todo[key], laps[WHOLE].median_ms, laps[WHOLE].iqr_ms) for key, laps in run.measured.items()
                    ),
                    unfit_models=tuple(todo[key] for key in run.unfit),
                    seconds=run.seconds,
                )
            )

    def _leave_out(self, name: str, config: PruneConfig) -> None:
        logger.warning(
            "Whole model %s ran out of memory and is left out of the correction", name,
            extra={"action": "build_table", "config": config.to_dict()},
        )  # fmt: skip

    def _table(self) -> LatencyTable:
        """The table of everything finished so far."""
        canary_ms, entries, whole_models = rescaled(self.partial.groups)
        name = f"{self.spec.name} {self.runtime} {self.dtype} b{self.batch_size}"
        plain = LatencyTable(
            name=f"{name} on {self.info.name}",
            device=self.info,
            runtime=self.runtime,
            dtype=self.dtype,
            batch_size=self.batch_size,
            block_key=block_key(self.geometry),
            model=self.spec,
            created_at=datetime.now(UTC),
            build_s=round(sum(group.seconds for group in self.partial.groups), 1),
            dense_ms=canary_ms,
            canary_drift=canary_drift(self.partial.groups),
            weights=self._weights(),
            entries=tuple(sorted(entries, key=lambda entry: entry.key)),
        )
        predictor = Predictor(plain)
        models: list[WholeModel] = []
        dense_sums: Mapping[str, float] | None = None
        for config, ms, iqr in whole_models:
            try:
                part_sums = predictor.predict(plan_schedule(config, self.geometry)).part_sums
            except ExceedsMemoryError:
                continue  # The model fits, a part of it did not where it was timed: nothing to compare.
            models.append(WholeModel(part_sums=part_sums, measured_ms=ms, relative_iqr=iqr / ms))
            if not config.sites:
                dense_sums = part_sums
        correction = fit_correction(models)
        if dense_sums is not None:
            # The canary is the dense model, with far more samples than it has as one of the whole models.
            predicted_ms = corrected_ms(dense_sums, correction.intercept_ms, correction.factors)
            correction = correction.model_copy(update={"dense_factor": canary_ms / predicted_ms})
        return plain.evolve(correction=correction)

    # --- subjects -------------------------------------------------------------------------------------------------

    def _ready(self, module: nn.Module) -> Forward:
        return prepare(module, self.runtime, self.dtype, self.device)

    def _plan_chain(self, tokens: int, attention: str = ATTENTION) -> _Planned:
        # What an MLP takes does not depend on the attention before it.
        halves = (ATTENTION, MLP) if attention == ATTENTION else (attention,)
        return _Planned(
            entries={half: (half, tokens, tokens) for half in halves}, make=partial(self._chain, tokens, attention)
        )

    def _chain(self, tokens: int, attention: str) -> _Part:
        """Some blocks one after the other on ``tokens`` tokens, a lap per half; other blocks in every sample.

        Always with their MLPs: attention alone finds its weights in the cache, and takes up to 15 % less.
        """
        x = self.tokens[:, :tokens].contiguous()
        blocks = [
            [
                (attention, self._ready(AttentionHalf(block, self.frame, attention))),
                (MLP, self._ready(MlpHalf(block, self.frame))),
            ]
            for block in self._timed_blocks
        ]
        count = min(len(blocks), self.settings.chain_blocks)

        def subject(lap: Lap) -> None:
            h = x
            for turn in itertools.islice(self._turns, count):
                for half, forward in blocks[turn % len(blocks)]:
                    h = forward(h)
                    lap(half)

        # From the second block on, the input is what the block before made.
        return _Part(subject=subject, input=x if count == 1 else None)

    def _plan_ends(self, tokens: int) -> _Planned:
        entries: dict[str, EntryKey] = {HEAD: (HEAD, tokens, 1)}
        if tokens == self.geometry.num_tokens:
            entries[STEM] = (STEM, self.geometry.num_patch_tokens, tokens)
        return _Planned(entries=entries, make=partial(self._ends, tokens))

    def _ends(self, tokens: int) -> _Part:
        """Stem and head of a model that leaves ``tokens`` after its stem, with all its blocks between them.

        By themselves they would find their weights in the caches, and take two thirds of the time.
        """
        stem, head = self._ready(Stem(self.model)), self._ready(Head(self.model))

        def subject(lap: Lap) -> None:
            x = stem(self.images)
            lap(STEM)
            x = x[:, :tokens].contiguous()
            for block in self.blocks:
                x = block(x)
            lap(BETWEEN)
            head(x)
            lap(HEAD)

        def ends_alone(lap: Lap) -> None:
            head(stem(self.images)[:, :tokens].contiguous())

        return _Part(subject=subject, memory_of=ends_alone)

    def _plan_reduction(self, kind: ReductionKind, tokens: int, removed: float) -> _Planned | None:
        steps = kind.steps(tokens, removed, self.geometry.num_prefix_tokens)
        if steps is None:
            return None
        entries = {kind.entry: (kind.entry, tokens, steps[-1].tokens_out)}
        return _Planned(entries=entries, make=partial(self._reduction, kind, steps, tokens))

    def _reduction(self, kind: ReductionKind, steps: Sequence[Step], tokens: int) -> _Part:
        """A few reducing blocks on the same tokens, other blocks of the model in every sample."""
        x = self.tokens[:, :tokens].contiguous()
        parts = [self._ready(ReducingBlock(block, kind, steps, self.frame)) for block in self._timed_blocks]
        count = min(len(parts), self.settings.reduction_blocks)

        def subject(lap: Lap) -> None:
            for turn in itertools.islice(self._turns, count):
                parts[turn % len(parts)](x)
                lap(kind.entry)

        return _Part(subject=subject, input=x)

    def _whole_model(self, config: PruneConfig) -> _Part:
        if not config.sites:
            return _Part(subject=self.canary, tells_memory=False)
        model = self._ready(compress(self.model, config))
        return _Part(subject=whole_model(model, [self.images]), tells_memory=False)

    @property
    def _timed_blocks(self) -> Sequence[Block]:
        """Blocks whose parts take turns; one where each takes seconds to prepare."""
        return self.blocks[:1] if self.runtime in SLOW_TO_PREPARE else self.blocks

    # --- running --------------------------------------------------------------------------------------------------

    def _group(
        self, stage: str, planned: Sequence[_Planned], settings: MeasureSettings, start: float, end: float
    ) -> None:
        """Measure what is not finished yet, interleaved, and remember it, or that it ran out of memory."""
        done = self._finished_entries()
        todo = {_describe(one): one for one in planned if set(one.entries.values()) - done}
        if not todo:
            self._skipped_share = max(self._skipped_share, self._share(stage, end))
            return
        for run in self._runs(stage, {key: one.make for key, one in todo.items()}, settings, start, end):
            entries = [
                _entry(entry, run.measured[key][lap], run.peak_memory_mib[key])
                for key in run.measured
                for lap, entry in todo[key].entries.items()
                if entry not in done
            ]
            entries += [
                self._unfit_entry(entry)
                for key in run.unfit
                for entry in todo[key].entries.values()
                if entry not in done
            ]
            self.partial.append(FinishedGroup(canary_ms=run.canary_ms, entries=tuple(entries), seconds=run.seconds))
            done |= {entry.key for entry in entries}

    def _unfit_entry(self, key: EntryKey) -> LatencyEntry:
        reason = f"ran out of memory at batch size {self.batch_size} in {self.dtype} on {self.info.name}"
        return LatencyEntry.unfit(key, reason)

    def _runs(
        self, stage: str, makers: Mapping[str, Callable[[], _Part]], settings: MeasureSettings, start: float, end: float
    ) -> Iterator[_Run]:
        """Measure parts together, then those that ran out of memory one by one.

        Beside others, which hold inputs and recorded graphs, there may be no room for a part that fits by itself.
        """
        together = self._run(stage, makers, settings, start, end)
        if len(makers) == 1:
            yield together
            return
        if together.measured:
            yield dataclasses.replace(together, unfit=())
        for key in together.unfit:
            free_memory(self.device)
            yield self._run(stage, {key: makers[key]}, settings, end, end)

    def _run(
        self, stage: str, makers: Mapping[str, Callable[[], _Part]], settings: MeasureSettings, start: float, end: float
    ) -> _Run:
        """Warm up and measure what fits into memory; none of it where sampling runs out of it."""
        started = time.monotonic()
        parts: dict[str, _Warm] = {}
        sampling = start + 0.3 * (end - start)
        for number, (key, make) in enumerate(makers.items()):
            self._stop_if_asked()
            self._report(stage, start + (sampling - start) * number / len(makers), f"warming up {key}")
            warm = if_it_fits(partial(self._warm, make, settings), self.device)
            if warm is not None:
                parts[key] = warm
        memory = {key: part.peak_memory_mib for key, part in parts.items()}
        found = None
        if parts:
            measure = partial(
                self._measure, {key: part.subject for key, part in parts.items()},
                {key: part.rounds for key, part in parts.items()}, memory, settings, stage, sampling, end,
            )  # fmt: skip
            found = if_it_fits(measure, self.device)
        canary_ms, measured = found or (None, {})
        return _Run(
            canary_ms=canary_ms,
            measured=measured,
            peak_memory_mib=memory,
            unfit=tuple(key for key in makers if key not in measured),
            seconds=time.monotonic() - started,
        )

    def _warm(self, make: Callable[[], _Part], settings: MeasureSettings) -> _Warm:
        part = make()
        memory = self._memory_mib(part) if part.tells_memory else None
        rounds = rounds_for(warm_up(part.subject, self.stopwatch, settings), settings)
        return _Warm(subject=part.subject, rounds=rounds, peak_memory_mib=memory)

    def _measure(
        self,
        subjects: Mapping[str, Subject],
        rounds: Mapping[str, int],
        memory: Mapping[str, float | None],
        settings: MeasureSettings,
        stage: str,
        start: float,
        end: float,
    ) -> tuple[float, dict[str, dict[str, Measurement]]]:
        """Measurements by subject and lap, and the canary's latency that they all refer to."""

        def report(done: float, total: float, message: str) -> None:
            self._report(stage, start + (end - start) * done / total, message)

        # A spread of 2 % of what a block costs on average does not matter, however little the entry itself takes.
        canary_ms = sum(ms for _, ms in self.stopwatch.sample(self.canary))
        measured = measure_subjects(
            subjects, canary=self.canary, stopwatch=self.stopwatch, settings=settings, rounds=rounds,
            peak_memory=memory, negligible_ms=0.02 * canary_ms / self.geometry.depth,
            cpu=self.cpu, patience=self.settings.patience, progress=report, should_stop=self._should_stop,
        )  # fmt: skip
        # Attempts differ in how fast the machine was.
        reference_ms = statistics.median(one.canary_ms for laps in measured.values() for one in laps.values())
        return reference_ms, {
            key: {lap: one.at_canary(reference_ms) for lap, one in laps.items()} for key, laps in measured.items()
        }

    def _block_ms(self) -> dict[int, float]:
        """Latency of a whole block by token count, where both of its halves fit into memory."""
        _, entries, _ = rescaled(self.partial.groups)
        halves: dict[int, dict[str, float]] = {}
        for entry in entries:
            if entry.entry in (ATTENTION, MLP) and entry.median_ms is not None:
                halves.setdefault(entry.tokens_in, {})[entry.entry] = entry.median_ms
        return {tokens: sum(ms.values()) for tokens, ms in halves.items() if len(ms) == 2}

    def _memory_mib(self, part: _Part) -> float | None:
        run = partial(self.stopwatch.sample, part.memory_of or part.subject)
        peak_mib = peak_memory_mib(run, self.device, runtime=self.runtime)
        if peak_mib is None or part.input is None:
            return peak_mib
        return peak_mib + part.input.nbytes / MIB

    def _weights(self) -> WeightMemory:
        block_mib = weights_mib(self.blocks[0])
        return WeightMemory(block_mib=block_mib, rest_mib=weights_mib(self.model) - len(self.blocks) * block_mib)

    def _header(self) -> dict[str, Any]:
        return {
            "model": self.spec.model_dump(mode="json"),
            "block_key": block_key(self.geometry),
            "device": self.info.name,
            "fingerprint": self.info.fingerprint(),
            "versions": self.info.versions,
            "runtime": self.runtime,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
        }

    def _stop_if_asked(self) -> None:
        if self._should_stop is not None and self._should_stop():
            raise MeasurementStoppedError(STOPPED)

    def _share(self, stage: str, within: float) -> float:
        before = itertools.takewhile(lambda name: name != stage, self._STAGES)
        return sum(self._STAGES[name] for name in before) + self._STAGES[stage] * within

    def _report(self, stage: str, within: float, message: str) -> None:
        if self._progress is None:
            return
        # Never backwards, not even by a rounding error.
        share = self._reported_share = max(self._share(stage, within), self._reported_share)
        own_share = share - self._skipped_share
        if own_share > 0.05 and share < 1.0:
            left_s = (time.monotonic() - self._started) * (1.0 - share) / own_share
            message = f"{message}, about {_duration(left_s)} left"
        self._progress(share, 1.0, message)


def _interpolation_error(block_ms: Mapping[int, float], low: int, middle: int, high: int) -> float:
    """Relative error of the straight line at the middle."""
    line = interpolate((low, high), (block_ms[low], block_ms[high]), middle)
    return abs(line / block_ms[middle] - 1.0)


def _entry(key: EntryKey, measured: Measurement, peak_memory: float | None) -> LatencyEntry:
    name, tokens_in, tokens_out = key
    return LatencyEntry(
        entry=name,
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        median_ms=measured.median_ms,
        iqr_ms=measured.iqr_ms,
        samples=measured.num_samples,
        p10_ms=measured.p10_ms,
        p90_ms=measured.p90_ms,
        peak_memory_mib=peak_memory,
        state=measured.state,
        reason=measured.reason,
    )


def _describe(planned: _Planned) -> str:
    name, tokens_in, tokens_out = next(iter(planned.entries.values()))
    return f"{name} at {tokens_in} tokens" if tokens_in == tokens_out else f"{name} {tokens_in} -> {tokens_out}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
