"""Tables from measurements made elsewhere: phones, TensorRT, anything that can time an exported block.

The CSV has the header ``entry,tokens_in,tokens_out,batch_size,median_ms,iqr_ms,samples`` and a line per entry. What ran
out of memory has ``out_of_memory`` as its ``median_ms`` and nothing after it.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from latency_tables.device import DeviceInfo
from latency_tables.errors import LatencyTableError
from latency_tables.parts import ATTENTION, BLOCK, HALVES, HEAD, MLP, REDUCTION_KINDS, STEM
from latency_tables.schema import Dtype, LatencyEntry, LatencyTable, Runtime
from prunefront.config import ModelSpec
from prunefront.files import write_atomic
from prunefront.geometry import block_key, geometry_for

COLUMNS = ("entry", "tokens_in", "tokens_out", "batch_size", "median_ms", "iqr_ms", "samples")
OUT_OF_MEMORY = "out_of_memory"  # in place of a median


@dataclass(frozen=True, kw_only=True)
class LatencyCsv:
    """Entries of one CSV and the batch size they share."""

    entries: tuple[LatencyEntry, ...]
    batch_size: int


def read_csv(source: str | os.PathLike[str]) -> LatencyCsv:
    """Read the file at ``source``; see `parse_csv`.

    Raises:
        LatencyTableError: If it cannot be read, or a line is wrong; the sentence names the line.
    """
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LatencyTableError(f"Cannot read {os.fspath(source)}: {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise LatencyTableError(f"{os.fspath(source)} is not UTF-8 text; save it as CSV in UTF-8.") from error
    return parse_csv(text, os.fspath(source))


def parse_csv(text: str, name: str = "CSV") -> LatencyCsv:
    """Check every line.

    Raises:
        LatencyTableError: Naming file, line, column and what was expected there.
    """
    reader = csv.reader(io.StringIO(text))
    header = [column.strip() for column in next(reader, [])]
    if tuple(header) != COLUMNS:
        raise LatencyTableError(
            f"{name}, line 1: expected the header {','.join(COLUMNS)!r}, but got {','.join(header)!r}. "
            "Put that header on top."
        )
    entries: list[LatencyEntry] = []
    lines: dict[tuple[str, int, int], int] = {}
    batch_size: int | None = None
    for row in reader:
        line = f"{name}, line {reader.line_num}"
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if len(cells) != len(COLUMNS):
            raise LatencyTableError(f"{line}: expected {len(COLUMNS)} cells, but got {len(cells)}. Fix the line.")
        values = dict(zip(COLUMNS, cells, strict=True))
        entry = _entry(values, line)
        if entry.entry in HALVES and entry.tokens_in != entry.tokens_out:
            raise LatencyTableError(
                f"{line}: {entry.entry} keeps its tokens, so tokens_in and tokens_out must be equal, but got "
                f"{entry.tokens_in} and {entry.tokens_out}. Fix the counts."
            )
        if entry.entry.startswith(BLOCK) and entry.tokens_out >= entry.tokens_in:
            raise LatencyTableError(
                f"{line}: {entry.entry} removes tokens, so tokens_out must be below tokens_in, but got "
                f"{entry.tokens_in} and {entry.tokens_out}. Fix the counts."
            )
        if entry.key in lines:
            raise LatencyTableError(
                f"{line}: {entry.entry} at {entry.tokens_in} -> {entry.tokens_out} tokens stands in line "
                f"{lines[entry.key]} already. Keep one of them."
            )
        lines[entry.key] = reader.line_num
        found = _whole(values, "batch_size", line)
        if batch_size is not None and found != batch_size:
            raise LatencyTableError(
                f"{line}: batch size {found} after {batch_size} above; a table has one. Import one file per batch size."
            )
        batch_size = found
        entries.append(entry)
    if batch_size is None:
        raise LatencyTableError(f"{name} has a header but no lines. Add measurements.")
    timed = {entry.entry for entry in entries if entry.median_ms is not None}
    missing = [needed for needed in (ATTENTION, MLP) if needed not in timed]
    if missing:
        raise LatencyTableError(
            f"{name} has no {' and no '.join(missing)} lines, which every prediction needs. Add them at two or more "
            "token counts."
        )
    return LatencyCsv(entries=tuple(entries), batch_size=batch_size)


def import_csv(
    source: str | os.PathLike[str],
    *,
    spec: ModelSpec,
    device: DeviceInfo,
    runtime: Runtime,
    dtype: Dtype,
    name: str | None = None,
) -> LatencyTable:
    """A table from a CSV.

    Args:
        source: Path of the CSV.
        spec: Model whose blocks were timed.
        device: The device as its owner calls it; ``DeviceInfo(kind="other", name="Pixel 9")`` will do.

    Raises:
        LatencyTableError: If the CSV is wrong.
        ModelError, UnknownNameError: If the model is not supported or unknown.
    """
    return table_of_csv(read_csv(source), spec=spec, device=device, runtime=runtime, dtype=dtype, name=name)


def table_of_csv(
    parsed: LatencyCsv,
    *,
    spec: ModelSpec,
    device: DeviceInfo,
    runtime: Runtime,
    dtype: Dtype,
    name: str | None = None,
) -> LatencyTable:
    """`import_csv` for a CSV that was read already, as when it came by HTTP.

    Raises:
        ModelError, UnknownNameError: If the model is not supported or unknown.
    """
    return LatencyTable(
        name=name or f"{spec.name} {runtime} {dtype} b{parsed.batch_size} on {device.name}",
        device=device,
        runtime=runtime,
        dtype=dtype,
        batch_size=parsed.batch_size,
        block_key=block_key(geometry_for(spec)),
        model=spec,
        source="imported",
        created_at=datetime.now(UTC),
        entries=parsed.entries,
    )


def export_csv(table: LatencyTable) -> str:
    """The table's entries as CSV; numbers keep all their digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in table.entries:
        timed: tuple[object, ...] = (OUT_OF_MEMORY, "", "")
        if entry.median_ms is not None:
            timed = (repr(entry.median_ms), repr(entry.iqr_ms), entry.samples)
        writer.writerow((entry.entry, entry.tokens_in, entry.tokens_out, table.batch_size, *timed))
    return out.getvalue()


def save_csv(table: LatencyTable, path: str | os.PathLike[str]) -> Path:
    """Write `export_csv`, all or nothing.

    Raises:
        FileWriteError: If the file cannot be written.
    """
    return write_atomic(path, export_csv(table))


def _entry(values: Mapping[str, str], line: str) -> LatencyEntry:
    key = (_entry_name(values, line), _whole(values, "tokens_in", line), _whole(values, "tokens_out", line))
    if values["median_ms"] != OUT_OF_MEMORY:
        return LatencyEntry(
            entry=key[0],
            tokens_in=key[1],
            tokens_out=key[2],
            median_ms=_milliseconds(values, "median_ms", line, positive=True),
            iqr_ms=_milliseconds(values, "iqr_ms", line),
            samples=_whole(values, "samples", line),
        )
    if values["iqr_ms"] or values["samples"]:
        raise LatencyTableError(
            f"{line}: what ran {OUT_OF_MEMORY} was not timed, so iqr_ms and samples should be empty, but are "
            f"{values['iqr_ms']!r} and {values['samples']!r}. Empty them, or give the median."
        )
    return LatencyEntry.unfit(key, "ran out of memory, says the CSV")


def _entry_name(values: Mapping[str, str], line: str) -> str:
    known = (STEM, HEAD, *HALVES, *(kind.entry for kind in REDUCTION_KINDS.values()))
    name = values["entry"]
    if name not in known:
        raise LatencyTableError(f"{line}: unknown entry {name!r}; expected one of {', '.join(known)}.")
    return name


def _whole(values: Mapping[str, str], column: str, line: str) -> int:
    text = values[column]
    # isascii: digits of other scripts pass isdecimal.
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise LatencyTableError(f"{line}: {column} should be a whole number of at least 1, but is {text!r}. Fix it.")
    return int(text)


def _milliseconds(values: Mapping[str, str], column: str, line: str, *, positive: bool = False) -> float:
    text = values[column]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        kind = "a positive number" if positive else "a number of at least 0"
        raise LatencyTableError(f"{line}: {column} should be {kind} of milliseconds, but is {text!r}. Fix it.")
    return value
