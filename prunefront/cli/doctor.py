"""`prunefront doctor`: whether this machine has what prunefront needs, and what is missing for what."""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from prunefront.cli.options import AsJson
from prunefront.cli.output import JobFailedError, print_json, print_table, stdout
from prunefront.errors import PrunefrontError

LEAST_FREE_GIB = 2.0
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding."""

    name: str
    state: Literal["ok", "warning", "problem"]
    detail: str


def doctor(as_json: AsJson = False) -> None:
    """Check Python, torch, devices, database, folders, disk and optional tools; exit with 1 if something is broken.

    Example: prunefront doctor
    """
    checks = [finding for group in CHECKS for finding in _guarded(group)]
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        print_table(["", "what", "finding"], [(_SIGNS[check.state], check.name, check.detail) for check in checks])
    problems = [check.name for check in checks if check.state == "problem"]
    if problems:
        raise JobFailedError(f"{len(problems)} problem(s): {', '.join(problems)}.")
    if not as_json:
        stdout().print("Everything that is needed is here.")


_SIGNS = {"ok": "ok", "warning": "!", "problem": "✗"}


def _guarded(group: Callable[[], Iterator[Check]]) -> list[Check]:
    """A check that breaks is itself a finding, and the others still run."""
    name = group.__name__.removeprefix("_check_").replace("_", " ")
    try:
        return list(group())
    except PrunefrontError as error:
        return [Check(name=name, state="problem", detail=str(error))]
    except ModuleNotFoundError as error:
        detail = f"{error.name} is not installed; the library works without it"
        return [Check(name=name, state="warning", detail=detail)]


def _check_python() -> Iterator[Check]:
    version = platform.python_version()
    supported = (3, 11) <= sys.version_info < (3, 14)
    detail = f"{version} at {sys.executable}"
    if not supported:
        detail += "; supported are 3.11 to 3.13"
    yield Check(name="Python", state="ok" if supported else "problem", detail=detail)


def _check_libraries() -> Iterator[Check]:
    from importlib.metadata import PackageNotFoundError, version

    for package, is_needed in (("torch", True), ("timm", True), ("optuna", False), ("fastapi", False)):
        try:
            yield Check(name=package, state="ok", detail=version(package))
        except PackageNotFoundError:
            yield Check(
                name=package,
                state="problem" if is_needed else "warning",
                detail="not installed" + ("" if is_needed else "; needed to search and serve: prunefront[app]"),
            )


def _check_devices() -> Iterator[Check]:
    import torch

    from latency_tables.device import describe_device

    cpu = describe_device("cpu")
    yield Check(name="cpu", state="ok", detail=f"{cpu.name}, {cpu.threads} of {cpu.logical_cores} cores usable")
    if not torch.cuda.is_available():
        yield Check(name="cuda", state="ok", detail="no CUDA device; everything runs on the CPU")
    for index in range(torch.cuda.device_count()):
        info = describe_device(f"cuda:{index}")
        yield Check(
            name=f"cuda:{index}", state="ok", detail=f"{info.name}, {info.memory_gib} GiB, driver {info.driver}"
        )


def _check_compiler() -> Iterator[Check]:
    from prunefront.ops import native

    found = native.find_compiler()
    if found is None:
        detail = "none; on the CPU, the runtime compile needs one, and merging is slower without (install g++)"
        yield Check(name="C++ compiler", state="warning", detail=detail)
    elif not native.is_available():
        yield Check(name="C++ compiler", state="warning", detail=f"{found}; it cannot build what merges tokens faster")
    else:
        yield Check(name="C++ compiler", state="ok", detail=found)


def _check_browser() -> Iterator[Check]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    yield Check(
        name="Chromium",
        state="ok",
        detail=found or "none; only the tests of the page need it, any browser shows the page",
    )


def _check_data_folder() -> Iterator[Check]:
    from service.settings import Settings

    folder = Settings.read().data_dir
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free_gib = shutil.disk_usage(existing).free / 2**30
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        yield Check(
            name="data folder",
            state="problem",
            detail=f"{existing} cannot be written ({error.strerror}); choose another with PRUNEFRONT_DATA_DIR",
        )
        return
    enough = free_gib >= LEAST_FREE_GIB
    yield Check(
        name="data folder",
        state="ok" if enough else "warning",
        detail=f"{folder}, {free_gib:.1f} GiB free" + ("" if enough else "; checkpoints of a search may not fit"),
    )


def _check_database() -> Iterator[Check]:
    from service.settings import Settings
    from store import open_store
    from store.urls import describe, parse_url

    url = parse_url(Settings.read().database_url)
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
        yield Check(name="database", state="ok", detail=f"{describe(url)}, made on first use")
        return
    store = open_store(Settings.read().database_url)
    try:
        store.check()
    finally:
        store.close()
    yield Check(name="database", state="ok", detail=f"{describe(url)} answers and has the tables of this version")


def _check_datasets() -> Iterator[Check]:
    from prunefront.training.data import check_dataset, list_datasets

    for name in list_datasets():
        try:
            check_dataset(name)
        except PrunefrontError as error:
            yield Check(name=name, state="warning", detail=str(error))
        else:
            yield Check(name=name, state="ok", detail="can be read")


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    _check_python,
    _check_libraries,
    _check_devices,
    _check_compiler,
    _check_browser,
    _check_data_folder,
    _check_database,
    _check_datasets,
)
