"""The command tree: help, options, errors and exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from prunefront.cli.app import app, describe, run
from prunefront.cli.options import parse_img_size, parse_pairs
from prunefront.cli.output import JobFailedError
from prunefront.errors import ConfigError, FileWriteError

PRINT_A_RESULT = {
    "config published", "config show", "config validate", "data inspect", "data lmdb", "devices", "doctor", "eval",
    "export", "front", "jobs list", "jobs show", "jobs watch", "measure", "methods", "models fetch", "models list",
    "search", "table build", "table import", "table list", "table predict", "table push", "table show",
    "table validate", "train", "visualize",
}  # fmt: skip


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does_with_an_example(name: str) -> None:
    text = COMMANDS[name].help

    assert f"Example: prunefront {name}" in text
    assert len(text.split("\n")[0]) > 20


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    assert [parameter.name for parameter in COMMANDS[name].params if not getattr(parameter, "help", "-")] == []


def test_what_prints_a_result_prints_it_as_json_too() -> None:
    with_json = {name for name, command in COMMANDS.items() if any("--json" in p.opts for p in command.params)}

    assert with_json == PRINT_A_RESULT


def test_the_commands_are_those_of_this_version() -> None:
    assert {name.split()[0] for name in COMMANDS} == {
        "best", "config", "controller", "data", "db", "demo", "devices", "doctor", "eval", "export", "front", "jobs",
        "measure", "methods", "models", "search", "serve", "table", "train", "visualize",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nonsense"], "Error: No such command 'nonsense'. See prunefront --help"),
        (["config", "new"], "Error: Missing option '--model'. See prunefront config new --help"),
        (["serv"], "Did you mean 'serve', 'search'? See prunefront --help"),
        (["measure", "x.json", "--batch-size", "0"], "equal to 1 (got '0'). See prunefront measure --help"),
        (["measure", "x.json", "--batch-size", "many"], "(got 'many'). See prunefront measure --help"),
        (["measure", "x.json", "--dtype", "fp8"], "for '--dtype': 'fp8' is not one of 'fp32', 'bf16', 'fp16'. See"),
        (
            ["search", "m", "--dataset", "d", "--min-keep-ratio", "2"],
            "than or equal to 1 (got '2'). See prunefront search",
        ),
        (["best", "last", "--max-latency-ms", "-5"], "than or equal to 0 (got '-5'). See prunefront best --help"),
        (["config", "show", "--json", "c.json", "--out"], "See prunefront config show --help"),
        (["table", "build", "m", "--batch-size"], "requires an argument. See prunefront table build --help"),
        (["config", "show", "/nowhere/c.json"], "Error: Cannot read config /nowhere/c.json: No such file"),
        (["best", "j", "--min-top1", "0.5", "--min-speedup", "2"], "Error: Give one limit:"),
        (["measure", "deit_small_patch16_224", "--img-size", "big"], "--img-size expects pixels such as 224"),
    ],
)
def test_a_request_that_cannot_be_carried_out_is_one_line_and_exit_code_2(
    arguments: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert sentence in shown.err
    assert len(shown.err.strip().splitlines()) == 1


def test_work_that_failed_is_exit_code_1() -> None:
    assert describe(JobFailedError("Job 7 did not succeed: no images")) == (1, "Job 7 did not succeed: no images")


def test_a_full_disk_is_told_without_error_number() -> None:
    assert describe(FileWriteError(28, "Could not write f: No space left on device.")) == (
        2,
        "Could not write f: No space left on device.",
    )


@pytest.mark.parametrize("module", ["search", "service.app", "store", "workers.tasks"])
def test_the_library_alone_says_where_the_application_is(module: str) -> None:
    code, sentence = describe(ModuleNotFoundError(f"No module named {module!r}", name=module))

    assert code == 2
    assert "checkout" in sentence and "container image" in sentence


def test_a_missing_package_is_named_with_the_extra_that_brings_it() -> None:
    assert describe(ModuleNotFoundError("No module named 'httpx'", name="httpx")) == (
        2,
        "This command needs the package httpx: pip install 'prunefront[app]'.",
    )


def test_an_error_nobody_foresaw_is_one_line_that_says_how_to_see_more(monkeypatch: pytest.MonkeyPatch) -> None:
    code, sentence = describe(ZeroDivisionError("division\nby zero"))

    assert code == 1
    assert sentence.startswith("ZeroDivisionError: division by zero. ") and "PRUNEFRONT_DEBUG=1" in sentence


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_a_lack_of_memory_says_what_to_make_smaller(error: Exception) -> None:
    code, sentence = describe(error)

    assert code == 1
    assert sentence.startswith("There is not enough memory for this. Use a smaller --batch-size")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device"), "Could not write the output: No space left on device. Check"),
        (PermissionError(13, "Permission denied", "/srv/x"), "Could not use /srv/x: Permission denied. Check"),
    ],
)
def test_what_the_system_refuses_is_told_in_its_words(error: OSError, sentence: str) -> None:
    code, told = describe(error)

    assert code == 1
    assert told.startswith(sentence)


def test_with_debugging_the_traceback_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEFRONT_DEBUG", "1")
    with pytest.raises(ConfigError):
        run(["config", "show", "/nowhere/c.json"])


@pytest.mark.parametrize(
    ("text", "size"), [(None, None), ("224", 224), ("224x320", (224, 320)), ("224,320", (224, 320))]
)
def test_image_sizes_are_one_side_or_two(text: str | None, size: int | tuple[int, int] | None) -> None:
    assert parse_img_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "1x2x3", "22.4"])
def test_other_image_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="224 or 224x320"):
        parse_img_size(text)


def test_model_arguments_are_json_where_they_parse_and_text_otherwise() -> None:
    assert parse_pairs(["depth=4", "qkv_bias=false", "global_pool=avg"], "--model-kwarg") == {
        "depth": 4,
        "qkv_bias": False,
        "global_pool": "avg",
    }
    with pytest.raises(ConfigError, match="--option expects NAME=VALUE"):
        parse_pairs(["depth"], "--option")
