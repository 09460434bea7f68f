"""The file an interrupted build resumes from: a header line, then one JSON line per finished group of entries.

Lines are appended and synced, so a build that is killed loses the group it was at; a last line cut off half-way is
left out when the file is read. A line may also say that groups before it no longer count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latency_tables.errors import LatencyTableError
from latency_tables.measure import relative_range
from latency_tables.schema import LatencyEntry
from prunefront.config import PruneConfig
from prunefront.errors import FileWriteError

PARTIAL_FORMAT = "prunefront/latency-table-partial/1"


@dataclass(frozen=True, kw_only=True)
class FinishedGroup:
    """What one interleaved run gave. Times are relative to the canary of that run."""

    canary_ms: float | None  # None where all of it ran out of memory, so that nothing was timed.
    entries: tuple[LatencyEntry, ...] = ()
    whole_models: tuple[tuple[PruneConfig, float, float], ...] = ()  # Config, median and IQR in ms.
    unfit_models: tuple[PruneConfig, ...] = ()  # Whole models that ran out of memory.
    seconds: float = 0.0


class PartialFile:
    """Finished groups of one build, in memory and, with a path, on disk."""

    def __init__(self, path: str | os.PathLike[str] | None, header: dict[str, Any]) -> None:
        self._path = Path(path) if path is not None else None
        self._header = {"format": PARTIAL_FORMAT, **header}
        self.groups: list[FinishedGroup] = self._read()

    def append(self, group: FinishedGroup) -> None:
        """Remember a group.

        Raises:
            FileWriteError: If the line cannot be written; earlier groups are intact.
        """
        self.groups.append(group)
        self._append_line(
            {
                "canary_ms": group.canary_ms,
                "seconds": group.seconds,
                "entries": [entry.model_dump(mode="json") for entry in group.entries],
                "whole_models": [[config.to_dict(), ms, iqr] for config, ms, iqr in group.whole_models],
                "unfit_models": [config.to_dict() for config in group.unfit_models],
            }
        )

    def drop(self, numbers: Sequence[int]) -> None:
        """Forget groups, by their places in ``groups``.

        Raises:
            FileWriteError: If the line cannot be written; all groups are intact.
        """
        self._append_line({"dropped": list(numbers)})
        self.groups = _without(self.groups, numbers)

    def _read(self) -> list[FinishedGroup]:
        if self._path is None:
            return []
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            self._append_line(self._header)
            return []
        except OSError as error:
            raise LatencyTableError(f"Cannot read {self._path}: {error.strerror}. Check the path.") from error
        # What follows the last line break was cut off while it was written.
        complete = [line for line in lines[:-1] if line]
        if not complete:
            self._path.unlink()
            self._append_line(self._header)
            return []
        self._require_same_build(complete[0])
        try:
            groups: list[FinishedGroup] = []
            for document in map(json.loads, complete[1:]):
                if "dropped" in document:
                    groups = _without(groups, document["dropped"])
                else:
                    groups.append(_parse_group(document))
        except (ValueError, KeyError, TypeError) as error:
            raise LatencyTableError(
                f"{self._path} is damaged ({str(error).splitlines()[0]}). Delete it and build the table anew."
            ) from error
        if lines[-1]:
            os.truncate(self._path, self._path.stat().st_size - len(lines[-1]))
        return groups

    def _require_same_build(self, line: bytes) -> None:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("format") != PARTIAL_FORMAT:
            raise LatencyTableError(f"{self._path} is not an interrupted table build. Choose another path.")
        differing = [
            f"{name} {found.get(name)!r} instead of {wanted!r}"
            for name, wanted in self._header.items()
            if found.get(name) != wanted
        ]
        if differing:
            raise LatencyTableError(
                f"{self._path} holds an interrupted build of another table ({', '.join(differing)}). "
                "Delete it, or choose another path for this build."
            )

    def _append_line(self, document: Any) -> None:
        if self._path is None:
            return
        line = json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FileWriteError(
                error.errno,
                f"Could not write {self._path}: {error.strerror}. Free some space or choose another folder; "
                "what was measured before is intact",
            ) from error


def _without(groups: Sequence[FinishedGroup], numbers: Sequence[int]) -> list[FinishedGroup]:
    return [group for number, group in enumerate(groups) if number not in numbers]


def _parse_group(document: dict[str, Any]) -> FinishedGroup:
    return FinishedGroup(
        canary_ms=None if document["canary_ms"] is None else float(document["canary_ms"]),
        seconds=float(document["seconds"]),
        entries=tuple(LatencyEntry.model_validate(entry) for entry in document["entries"]),
        whole_models=tuple(
            (PruneConfig.model_validate(config), float(ms), float(iqr)) for config, ms, iqr in document["whole_models"]
        ),
        # Older builds knew none.
        unfit_models=tuple(PruneConfig.model_validate(config) for config in document.get("unfit_models", ())),
    )


def canary_drift(groups: Sequence[FinishedGroup]) -> float | None:
    """How much the machine's speed moved between the groups: range of the canaries over their median.

    None for a single group, which says nothing about that; groups that timed nothing do not count.
    """
    canaries = [group.canary_ms for group in groups if group.canary_ms is not None]
    return relative_range(canaries) if len(canaries) > 1 else None


def rescaled(
    groups: Sequence[FinishedGroup],
) -> tuple[float, list[LatencyEntry], list[tuple[PruneConfig, float, float]]]:
    """Bring all groups to one speed of the machine: that of the median canary.

    Returns:
        The canary's median in ms, the entries, and the whole models (config, median, IQR).

    Raises:
        LatencyTableError: If nothing was timed, since all of it ran out of memory.
    """
    canaries = sorted(group.canary_ms for group in groups if group.canary_ms is not None)
    if not canaries:
        raise LatencyTableError("Every part of the model ran out of memory. Choose a smaller batch size.")
    reference = canaries[len(canaries) // 2]
    entries = []
    whole_models = []
    for group in groups:
        factor = reference / (group.canary_ms or reference)
        for entry in group.entries:
            scaled = {
                name: value * factor
                for name in ("median_ms", "iqr_ms", "p10_ms", "p90_ms")
                if (value := getattr(entry, name)) is not None
            }
            entries.append(entry.model_copy(update=scaled))
        whole_models += [(config, ms * factor, iqr * factor) for config, ms, iqr in group.whole_models]
    return reference, entries, whole_models
