"""LatencyTable (``prunefront/latency-table/1``): what was timed on one device, and how far it can be trusted.

One table serves every schedule of every model made of the same kind of block, on one device, runtime, dtype and
batch size. `build` and `csv_import` write tables, `predict` and `validate` read them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from latency_tables.device import DeviceInfo, describe_device
from latency_tables.errors import LatencyTableError, MeasurementStoppedError
from latency_tables.shipped import is_shipped, refuse_shipped, shipped_file
from prunefront.config import Dtype, ModelSpec, PruneConfig, StrictModel, describe_validation_error
from prunefront.config import Runtime as MeasuredRuntime
from prunefront.files import write_json_atomic

__all__ = [
    "Correction", "DeviceInfo", "Dtype", "LatencyEntry", "LatencyTable", "LatencyTableError",
    "MeasurementStoppedError", "Runtime", "ValidationPoint", "ValidationReport", "WeightMemory", "describe_device",
    "load_table", "parse_table", "save_table",
]  # fmt: skip

TABLE_FORMAT: Final = "prunefront/latency-table/1"
MAX_DENSE_DRIFT = 0.1  # Of a validation whose latencies tell of the table, not of the machine.
MAX_CANARY_DRIFT = 0.25  # Of a table to trust: its runs are brought to one speed, as if all parts changed theirs alike.

# What a table may be of: what can be measured here, and what can be imported.
Runtime = Literal[MeasuredRuntime, "tensorrt"]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Mebibytes = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=1)]


class LatencyEntry(StrictModel):
    """One thing that was run, at one token count. Counts include prefix tokens."""

    entry: Annotated[str, Field(min_length=1)] = Field(
        description="stem, head, attention, mlp, another half's name, or block.OP: a whole block that reduces by OP."
    )
    tokens_in: Tokens
    tokens_out: Tokens
    median_ms: Milliseconds | None = Field(description="Null where it ran out of memory, and only there.")
    iqr_ms: Milliseconds = Field(default=0.0, description="Interquartile range of the samples.")
    samples: Annotated[int, Field(ge=0)] = 1
    p10_ms: Milliseconds | None = None
    p90_ms: Milliseconds | None = None
    peak_memory_mib: Mebibytes | None = Field(
        default=None,
        description="Most memory in use while it ran, its input included and the model's weights left out.",
    )
    state: Literal["ok", "noisy", "out_of_memory"] = "ok"
    reason: str | None = Field(default=None, description="Why an entry is noisy, or what ran out of memory.")

    @model_validator(mode="after")
    def _was_timed_or_ran_out_of_memory(self) -> LatencyEntry:
        ran_out = self.state == "out_of_memory"
        if (self.median_ms is None) != ran_out or (self.samples == 0) != ran_out:
            raise ValueError(
                f"entry {self.entry!r} at {self.tokens_in} -> {self.tokens_out} tokens is {self.state!r} with a median "
                f"of {self.median_ms} ms of {self.samples} samples; only what ran out of memory has null and 0, and it "
                "has both"
            )
        if ran_out and not self.reason:
            raise ValueError(
                f"entry {self.entry!r} at {self.tokens_in} -> {self.tokens_out} tokens ran out of memory without a "
                "reason; give one"
            )
        return self

    @classmethod
    def unfit(cls, key: tuple[str, int, int], reason: str) -> LatencyEntry:
        """The entry of what ran out of memory."""
        name, tokens_in, tokens_out = key
        return cls(
            entry=name, tokens_in=tokens_in, tokens_out=tokens_out, median_ms=None, samples=0, state="out_of_memory",
            reason=reason,
        )  # fmt: skip

    @property
    def key(self) -> tuple[str, int, int]:
        return self.entry, self.tokens_in, self.tokens_out


class WeightMemory(StrictModel):
    """Parameters and buffers of the measured model in the table's dtype."""

    block_mib: Mebibytes = Field(description="Of one block.")
    rest_mib: Mebibytes = Field(description="Of all but the blocks: patch embedding, positions, final norm, head.")


class Correction(StrictModel):
    """What whole models cost beyond the sum of their parts, fitted on a few of them.

    latency = intercept + Σ over parts of factor · (sum of that part's entries); a part without a factor has 1. That of
    a schedule that reduces nothing is multiplied by ``dense_factor``.
    """

    intercept_ms: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    factors: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    dense_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=1.0, description="Measured over predicted latency of the dense model, which every speed-up rests on."
    )
    num_models: Annotated[int, Field(ge=0)] = Field(default=0, description="Whole models the fit saw.")
    mape_before: float | None = Field(default=None, description="Mean absolute error on them of the plain sum, 0-1.")
    mape_after: float | None = Field(default=None, description="The same after the fit, 0-1; not held out.")


class ValidationPoint(StrictModel):
    """One held-out whole model: predicted and measured latency and peak memory of its schedule."""

    config: PruneConfig
    predicted_ms: Milliseconds
    measured_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    iqr_ms: Milliseconds
    dense_ms: Milliseconds | None = Field(default=None, description="The dense model in the same interleaved run.")
    again_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="Measured once more, after all others; null where it was not."
    )
    again_dense_ms: Milliseconds | None = Field(default=None, description="The dense model in that run.")
    state: Literal["ok", "noisy"] = "ok"
    predicted_memory_mib: Mebibytes | None = None
    measured_memory_mib: Mebibytes | None = None

    @property
    def relative_error(self) -> float:
        """Positive where the prediction is too high."""
        return self.predicted_ms / self.measured_ms - 1.0


class ValidationReport(StrictModel):
    """Error of a table on whole models that no part of it has seen. Shares and errors are 0-1."""

    num_schedules: Annotated[int, Field(ge=1)]
    seed: int
    mape: float = Field(description="Mean absolute relative error.")
    speedup_mape: float | None = Field(
        default=None,
        description="The same for the speed-up over the dense model of the same run, which drift does not move.",
    )
    speedup_within_5_percent: float | None = None
    speedup_within_10_percent: float | None = None
    speedup_kendall_tau: float | None = None
    dense_drift: float | None = Field(
        default=None,
        description="How far the machine's speed moved: range over median of the dense model's latency over the runs.",
    )
    remeasured_mape: float | None = Field(
        default=None,
        description="Mean absolute relative difference to measuring some of the schedules once more, after all others: "
        "an error of latencies as small as this is measuring's own.",
    )
    remeasured_speedup_mape: float | None = Field(default=None, description="The same for speed-ups.")
    num_remeasured: Annotated[int, Field(ge=0)] = 0
    memory_mape: float | None = Field(
        default=None, description="Mean absolute relative error of peak memory; null where it is not told."
    )
    bias: float = Field(description="Mean signed relative error; positive where predictions are too high.")
    within_5_percent: float
    within_10_percent: float
    kendall_tau: float | None = Field(description="Agreement in rank; null when fewer than two schedules differ.")
    dense_ms: Milliseconds = Field(description="Median of the dense model in the same run.")
    dense_predicted_ms: Milliseconds
    noise: float = Field(description="Median over the schedules of IQR over median, within one run.")
    num_noisy: int = Field(description="Schedules still noisy after three attempts; they count in all figures.")
    device: DeviceInfo
    created_at: datetime
    points: tuple[ValidationPoint, ...]

    @property
    def is_steady(self) -> bool:
        """Whether the machine kept about its speed; otherwise only the figures of speed-ups tell of the table."""
        return self.dense_drift is None or self.dense_drift <= MAX_DENSE_DRIFT


class LatencyTable(StrictModel):
    """Latency of the parts of a ViT by token count, on one device, runtime, dtype and batch size."""

    format: Literal["prunefront/latency-table/1"] = TABLE_FORMAT
    name: Annotated[str, Field(min_length=1)]
    device: DeviceInfo
    runtime: Runtime
    dtype: Dtype
    batch_size: Annotated[int, Field(ge=1)]
    block_key: str = Field(description="prunefront.geometry.block_key of the models that the table serves.")
    model: ModelSpec = Field(description="The model whose blocks were measured.")
    source: Literal["measured", "imported"] = "measured"
    created_at: datetime
    build_s: Annotated[float, Field(ge=0)] | None = Field(default=None, description="Seconds the build took.")
    dense_ms: Milliseconds | None = Field(default=None, description="The dense model beside the entries (canary).")
    canary_drift: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="Range of the dense model's medians in the runs of the build, over their median: how much the "
        "machine's speed moved meanwhile. Null where there was one run.",
    )
    weights: WeightMemory | None = Field(
        default=None, description="What peak memory is predicted with; null where the table does not tell memory."
    )
    entries: Annotated[tuple[LatencyEntry, ...], Field(min_length=1)]
    correction: Correction = Correction()
    validation: ValidationReport | None = None

    @model_validator(mode="after")
    def _entries_are_unique(self) -> LatencyTable:
        seen: set[tuple[str, int, int]] = set()
        for entry in self.entries:
            if entry.key in seen:
                raise ValueError(
                    f"entry {entry.entry!r} at {entry.tokens_in} -> {entry.tokens_out} tokens stands twice; keep one"
                )
            seen.add(entry.key)
        return self

    @model_validator(mode="after")
    def _halves_take_time(self) -> LatencyTable:
        # Literals: the names are in latency_tables.parts, which needs torch and timm.
        for name in ("attention", "mlp"):
            medians_ms = [e.median_ms for e in self.entries if e.entry == name and e.median_ms is not None]
            if medians_ms and not any(medians_ms):
                raise ValueError(
                    f"every median of {name} is 0 ms, but half a block takes time; measure it with a finer clock"
                )
        return self

    @property
    def entries_by_name(self) -> dict[str, tuple[LatencyEntry, ...]]:
        """Entries of each name, by tokens in, then out."""
        groups: dict[str, list[LatencyEntry]] = {}
        for entry in self.entries:
            groups.setdefault(entry.entry, []).append(entry)
        return {name: tuple(sorted(group, key=lambda e: e.key)) for name, group in groups.items()}

    @property
    def latencies_ms(self) -> dict[str, dict[tuple[int, int], float]]:
        """Medians by name of the entry, then by tokens in and out; without what ran out of memory."""
        groups: dict[str, dict[tuple[int, int], float]] = {}
        for entry in self.entries:
            if entry.median_ms is not None:
                groups.setdefault(entry.entry, {})[entry.tokens_in, entry.tokens_out] = entry.median_ms
        return groups

    @property
    def noisy_entries(self) -> tuple[LatencyEntry, ...]:
        return tuple(entry for entry in self.entries if entry.state == "noisy")

    @property
    def is_steady(self) -> bool:
        """Whether the machine kept about its speed during the build."""
        return self.canary_drift is None or self.canary_drift <= MAX_CANARY_DRIFT

    @property
    def unfit_entries(self) -> tuple[LatencyEntry, ...]:
        """What ran out of memory at the table's batch size."""
        return tuple(entry for entry in self.entries if entry.state == "out_of_memory")

    def evolve(self, **changes: Any) -> LatencyTable:
        """A checked copy with some fields replaced."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**fields, **changes})


def load_table(source: str | os.PathLike[str] | Mapping[str, Any] | IO[str] | IO[bytes]) -> LatencyTable:
    """Read a table from a path, a dict or an open file, or a shipped one by its name (`latency_tables.shipped`).

    Raises:
        LatencyTableError: If it cannot be read, is not JSON, or is not a table; the sentence says which.
    """
    if isinstance(source, Mapping):
        return parse_table(source, "latency table")
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        path = shipped_file(name) if is_shipped(name) else Path(name)
        try:
            text: str | bytes = path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: no path at all, such as one with a NUL
            reason = getattr(error, "strerror", None) or error
            raise LatencyTableError(f"Cannot read latency table {name}: {reason}. Check the path.") from error
    elif not hasattr(source, "read"):
        raise LatencyTableError(
            f"A latency table is read from a path, a mapping or an open file, but got a {type(source).__name__}."
        )
    else:
        name = str(getattr(source, "name", "latency table"))
        text = source.read()
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LatencyTableError(
            f"{name} is not JSON ({error}); the file may be cut off or damaged. Copy it again, or rebuild the table."
        ) from error
    return parse_table(document, name)


def parse_table(document: Any, name: str = "latency table") -> LatencyTable:
    """Check a decoded document.

    Raises:
        LatencyTableError: If it is not a table of this format.
    """
    if not isinstance(document, Mapping) or "format" not in document:
        raise LatencyTableError(
            f'{name} is not a latency table: expected a mapping with "format": "{TABLE_FORMAT}". '
            "Build one with `prunefront table build`, or import measurements with `prunefront table import`."
        )
    if not str(document["format"]).startswith("prunefront/latency-table/"):
        raise LatencyTableError(
            f"{name} is not a latency table: its format is {document['format']!r}, but expected {TABLE_FORMAT!r}. "
            "Check that it is the right file."
        )
    if document["format"] != TABLE_FORMAT:
        raise LatencyTableError(
            f"{name} has format {document['format']!r}, but this version of prunefront reads {TABLE_FORMAT!r}; "
            "rebuild the table, or upgrade prunefront if the file is newer."
        )
    try:
        return LatencyTable.model_validate(dict(document))
    except ValidationError as error:
        raise LatencyTableError(
            f"{name} is damaged, or was not written by prunefront: {describe_validation_error(error)}. Copy it again, "
            "or rebuild the table."
        ) from error


def save_table(table: LatencyTable, path: str | os.PathLike[str]) -> Path:
    """Write the table as JSON, all or nothing.

    Raises:
        LatencyTableError: If the path is the name of a shipped table.
        FileWriteError: If the file cannot be written; what stood there before is intact.
    """
    refuse_shipped(path)
    document = table.model_dump(mode="json")
    if table.validation is not None:
        # Configs without what they leave to defaults: a third of the file of a validated table.
        document["validation"]["points"] = [
            written | {"config": point.config.model_dump(mode="json", exclude_defaults=True)}
            for written, point in zip(document["validation"]["points"], table.validation.points, strict=True)
        ]
    return write_json_atomic(path, document)
