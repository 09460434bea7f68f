"""Where benchmarks keep what they measured: ``benchmarks/results/<machine>/<benchmark>.json``.

A file holds the machine and its runs. A run says what it was of (model, dtype, batch size, …), which command gave it,
when, and with which versions. Running a part again replaces that run alone, and another machine has a file of its own.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from latency_tables.device import DeviceInfo
from prunefront.errors import ConfigError, PrunefrontError
from prunefront.files import require_writable, write_json_atomic

RESULTS = Path(__file__).with_name("results")
# Of a device, what may change from run to run.
_OF_A_RUN = ("versions", "os", "driver")
# Options that say where results go, and how many values follow: no part of the command that repeats a run.
_OUTPUT_OPTIONS = {"--json": 0, "--save": 0, "--out": 1, "--ship": 0}


class Record:
    """Runs of one benchmark on one machine."""

    def __init__(self, benchmark: str, device: DeviceInfo, *, key: tuple[str, ...], path: Path | None = None) -> None:
        """Open the file that runs are kept in.

        Args:
            benchmark: Name of its module.
            device: What it runs on.
            key: Fields of a run that say what it is of: a run replaces the one that agrees in them.
            path: File, which need not exist yet; None keeps nothing.

        Raises:
            ConfigError: If the file is of another machine or benchmark, or no record.
            FileWriteError: If it could not be written.
        """
        self.runs: list[dict[str, Any]] = []  # of this process
        self._benchmark = benchmark
        self._device = device
        self._key = key
        self._path = path
        self._command = command_line(benchmark, sys.argv[1:])
        if path is not None:
            require_writable(path)
            self._kept()

    def add(self, run: dict[str, Any]) -> dict[str, Any]:
        """Keep a run, with the command, the time and the versions, in the place of the one of the same key.

        The file is read again, so that what others added meanwhile stays.
        """
        of_a_run = self._device.model_dump(mode="json", include=set(_OF_A_RUN))
        run = run | {"command": self._command, "measured_at": f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}"} | of_a_run
        self.runs = _with(self.runs, run, self._key)
        if self._path is not None:
            write_json_atomic(self._path, self._document(_with(self._kept(), run, self._key)))
        return run

    def as_json(self) -> str:
        """The runs of this process as a record."""
        return json.dumps(self._document(self.runs), indent=1)

    def _document(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        hardware = self._device.model_dump(mode="json", exclude=set(_OF_A_RUN))
        return {"benchmark": self._benchmark, "device": hardware, "runs": runs}

    def _kept(self) -> list[dict[str, Any]]:
        """Runs in the file."""
        if self._path is None or not self._path.exists():
            return []
        try:
            document = json.loads(self._path.read_text())
            benchmark, device = document["benchmark"], DeviceInfo.model_validate(document["device"])
            runs: list[dict[str, Any]] = document["runs"]
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise ConfigError(f"{self._path} is not the record of a benchmark; give another file as --out.") from error
        if benchmark != self._benchmark:
            raise ConfigError(
                f"{self._path} has runs of the benchmark {benchmark}, but these are of {self._benchmark}; give another "
                "file as --out."
            )
        if device.fingerprint() != self._device.fingerprint():
            raise ConfigError(
                f"{self._path} has runs of another machine: {_hardware(device)} instead of {_hardware(self._device)}. "
                "Give another file as --out."
            )
        return runs


def _with(runs: list[dict[str, Any]], run: dict[str, Any], key: tuple[str, ...]) -> list[dict[str, Any]]:
    """The runs with one more, which takes the place of the one that it repeats."""
    same = [all(kept.get(field) == run[field] for field in key) for kept in runs]
    if True not in same:
        return [*runs, run]
    return [run if repeated else kept for kept, repeated in zip(runs, same, strict=True)]


def _hardware(device: DeviceInfo) -> str:
    threads = f", {device.threads} threads" if device.kind == "cpu" else ""
    return f"{device.name}{threads} ({' '.join(device.cpu_features)})" if device.cpu_features else device.name + threads


def results_file(benchmark: str, device: DeviceInfo) -> Path:
    """Where the runs of a benchmark on a machine are kept."""
    return RESULTS / device.slug() / f"{benchmark}.json"


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """``--json``, ``--save`` and ``--out``, as `record_for` reads them."""
    parser.add_argument("--json", action="store_true", help="print the record instead of a summary")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--save", action="store_true", help="keep the runs in benchmarks/results, in this machine's folder"
    )
    where.add_argument("--out", type=Path, help="keep the runs in this file; others in it stay")


def record_for(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    benchmark: str,
    device: DeviceInfo,
    key: tuple[str, ...],
) -> Record:
    """The record that the options ask for; a file that cannot take it ends the process with a sentence."""
    try:
        path = results_file(benchmark, device) if arguments.save else arguments.out
        return Record(benchmark, device, key=key, path=path)
    except PrunefrontError as error:
        parser.error(str(error))


def command_line(benchmark: str, arguments: list[str]) -> str:
    """The command that repeats a run, without where its output goes."""
    kept: list[str] = []
    values = 0
    for argument in arguments:
        if values:
            values -= 1
            continue
        option, _, value = argument.partition("=")
        if option in _OUTPUT_OPTIONS:
            values = 0 if value else _OUTPUT_OPTIONS[option]
        else:
            kept.append(argument)
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *kept])
