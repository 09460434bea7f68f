"""What a fresh interpreter imports, and when timm learns our models."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest


def python(*arguments: str) -> str:
    finished = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_help_is_shown_without_importing_torch() -> None:
    shown = python(
        "-c",
        "import sys; from prunefront.cli.app import run; code = run(['--help']);"
        "print(code, sorted({'torch', 'timm', 'optuna', 'sqlalchemy', 'fastapi', 'numpy'} & set(sys.modules)))",
    )

    assert "Find token schedules" in shown
    assert shown.splitlines()[-1] == "0 []"


def test_the_command_is_a_module_too() -> None:
    assert python("-m", "prunefront", "--version").strip() != ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is always full")
@pytest.mark.parametrize("arguments", [["methods"], ["methods", "--json"], ["--help"]])
def test_a_full_disk_behind_the_output_is_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        finished = subprocess.run(
            [sys.executable, "-m", "prunefront", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )

    assert finished.returncode == 1
    (line,) = finished.stderr.splitlines()
    assert line.startswith("Error: Could not write the output: No space left on device.")


def test_a_reader_that_has_seen_enough_ends_the_command_quietly() -> None:
    command = [sys.executable, "-m", "prunefront", "models"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        complaints = process.stderr.read()

    assert b"Error" not in complaints and b"Traceback" not in complaints


def test_a_closed_output_ends_nothing() -> None:
    command = f"{shlex.quote(sys.executable)} -m prunefront methods >&-"
    finished = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=120)

    assert (finished.returncode, finished.stderr) == (0, "")


def test_an_output_of_ascii_alone_is_enough(tmp_path: Path) -> None:
    def shown(*arguments: str) -> str:
        command = [sys.executable, "-m", "prunefront", "config", *arguments]
        finished = subprocess.run(
            command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, timeout=120
        )
        assert (finished.returncode, finished.stderr) == (0, "")
        return finished.stdout

    assert "fuse" in shown("published", "evit", "deit_small_patch16_224")
    path = tmp_path / "größe.json"
    path.write_text(shown("new", "--model", "digit_vit_patch6_48", "--method", "evit"))
    assert "?" in shown("show", str(path)), "the dash of an empty cell"
    (validated,) = json.loads(shown("validate", str(path), "--json"))
    assert validated["file"] == str(path)


def test_ctrl_c_before_the_command_runs_is_one_word() -> None:
    program = (
        "import sys, types; app = sys.modules['prunefront.cli.app'] = types.ModuleType('app')\n"
        "def run(arguments): raise KeyboardInterrupt\n"
        "app.run = run; import prunefront.cli; prunefront.cli.main()"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)

    assert (finished.returncode, finished.stderr) == (130, "Stopped.\n")


def test_without_typer_the_command_says_what_to_install() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['typer'] = None; import prunefront.cli as c; c.main()"],
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert finished.returncode == 2
    assert finished.stderr.strip() == (
        "The prunefront command needs the package typer, which the library alone does not install: "
        "pip install 'prunefront[app]'."
    )


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("PRUNEFRONT_LEASE_S", "long", "PRUNEFRONT_LEASE_S cannot be used"),
        ("PRUNEFRONT_LOG_LEVEL", "loud", "PRUNEFRONT_LOG_LEVEL cannot be used"),
        ("PRUNEFRONT_DATA_DIR", "/dev/null/data", "data folder /dev/null/data cannot be made"),
        ("PRUNEFRONT_DATA_DIR", "{taken}", "The controller cannot write to {taken}/engine: File exists."),
    ],
)
def test_a_controller_that_cannot_start_says_why_in_one_line(
    tmp_path: Path, variable: str, value: str, words: str
) -> None:
    (tmp_path / "engine").touch()
    finished = subprocess.run(
        [sys.executable, "-m", "search"],
        env={**os.environ, "PRUNEFRONT_DATA_DIR": str(tmp_path), variable: value.format(taken=tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert finished.returncode == 1
    (line,) = finished.stderr.splitlines()
    assert words.format(taken=tmp_path) in line


@pytest.mark.parametrize("order", ["import prunefront, timm", "import timm, prunefront"])
def test_timm_knows_our_models_whichever_is_imported_first(order: str) -> None:
    assert python("-c", f"{order}; print(timm.is_model('digit_vit_patch6_48'))").strip() == "True"


def test_functions_keep_their_names_after_their_modules_are_imported() -> None:
    shown = python(
        "-c",
        "import prunefront; import prunefront.compress, prunefront.macs, prunefront.official;"
        "print(callable(prunefront.compress), callable(prunefront.macs), prunefront.official.__name__);"
        "from prunefront import *; print(callable(compress), 'uncompress' in dir(prunefront))",
    )

    assert shown.splitlines() == ["True True prunefront.official", "True True"]
