"""The command tree and the one place where errors become a sentence and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from prunefront.cli import (
    best,
    controller,
    data,
    db,
    demo,
    devices,
    doctor,
    eval,
    export,
    front,
    jobs,
    measure,
    methods,
    models,
    search,
    serve,
    table,
    train,
    visualize,
)
from prunefront.cli import config as config_command
from prunefront.cli.output import JobFailedError, note, print_error
from prunefront.errors import PrunefrontError, is_out_of_memory

DONE, FAILED, REFUSED, STOPPED = 0, 1, 2, 130
DEBUG_VARIABLE = "PRUNEFRONT_DEBUG"
# Packages of the checkout that the wheel leaves out.
APPLICATION = frozenset({"search", "service", "store", "workers"})

app = typer.Typer(
    name="prunefront",
    help="Find token schedules that make a Vision Transformer faster on your device, and how accurate they really are.",
    epilog="Start with: prunefront demo --quick",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from prunefront import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


_FIND = "Find a faster model"
_LATENCY = "Latency and accuracy"
_KNOWN = "What there is"
_RUN = "Run the service"

app.command("demo", rich_help_panel=_FIND)(demo.demo)
app.command("search", rich_help_panel=_FIND)(search.search)
app.command("front", rich_help_panel=_FIND)(front.front)
app.command("best", rich_help_panel=_FIND)(best.best)
app.add_typer(config_command.app, name="config", rich_help_panel=_FIND)
app.add_typer(table.app, name="table", rich_help_panel=_LATENCY)
app.command("measure", rich_help_panel=_LATENCY)(measure.measure)
app.command("eval", rich_help_panel=_LATENCY)(eval.evaluate)
app.command("train", rich_help_panel=_FIND, context_settings=train.CONTEXT_SETTINGS)(train.train)
app.command("export", rich_help_panel=_FIND)(export.export)
app.command("visualize", rich_help_panel=_LATENCY)(visualize.visualize)
app.command("methods", rich_help_panel=_KNOWN)(methods.methods)
app.add_typer(models.app, name="models", rich_help_panel=_KNOWN)
app.command("devices", rich_help_panel=_KNOWN)(devices.devices)
app.add_typer(data.app, name="data", rich_help_panel=_KNOWN)
app.command("serve", rich_help_panel=_RUN)(serve.serve)
app.command("controller", rich_help_panel=_RUN)(controller.controller)
app.add_typer(jobs.app, name="jobs", rich_help_panel=_RUN)
app.add_typer(db.app, name="db", rich_help_panel=_RUN)
app.command("doctor", rich_help_panel=_RUN)(doctor.doctor)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; no exception leaves it unless PRUNEFRONT_DEBUG is set."""
    # Its retries are many lines; what came of them is told in one.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        outcome = app(list(arguments), prog_name="prunefront", standalone_mode=False)
        if outcome == STOPPED:  # typer's answer to Ctrl-C; older ones raise Abort
            note("Stopped.")
        return outcome if isinstance(outcome, int) else DONE
    except typer.Abort:
        note("Stopped.")
        return STOPPED
    except typer.TyperException as error:
        message = _usage_sentence(error)
        if message:  # empty when a group without a command has just printed its help
            print_error(f"{message} See {_help_command(error, arguments)}")
        return REFUSED
    except BrokenPipeError:
        _finish_output()  # the reader (head, less) has seen enough
        return FAILED
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        code, sentence = describe(error)
        print_error(sentence)
        _finish_output()
        return code


def _finish_output() -> None:
    """Print what is left; where that fails, it would be tried again at interpreter exit, and fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe(error: Exception) -> tuple[int, str]:
    """Exit code and sentence for an error that ended a command."""
    if isinstance(error, JobFailedError):
        return FAILED, str(error)
    if isinstance(error, PrunefrontError):
        return REFUSED, str(error)
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").partition(".")[0]
        if missing in APPLICATION:
            return REFUSED, (
                f"This command needs the prunefront application ({missing}), which the installed library does not "
                "carry: run it in a checkout after `make install`, or in the container image."
            )
        return REFUSED, f"This command needs the package {missing}: pip install 'prunefront[app]'."
    if error.__class__.__module__.startswith("pydantic"):
        from pydantic import ValidationError

        from prunefront.config import describe_validation_error

        if isinstance(error, ValidationError):
            return REFUSED, describe_validation_error(error)
    if is_out_of_memory(error):
        return (
            FAILED,
            "There is not enough memory for this. Use a smaller --batch-size or --img-size, or another device.",
        )
    if isinstance(error, OSError) and error.strerror:
        place = f"Could not use {error.filename}" if error.filename is not None else "Could not write the output"
        return FAILED, f"{place}: {error.strerror}. Check the free space and the rights of this user."
    text = " ".join(str(error).split()).rstrip(".")
    return FAILED, (
        f"{type(error).__name__}: {text}. This is not an error prunefront foresaw; "
        f"set {DEBUG_VARIABLE}=1 to see where it happened."
    )


def _usage_sentence(error: typer.TyperException) -> str:
    """typer's sentence, with the value that came where typer leaves it out."""
    from pydantic import ValidationError

    message = error.format_message().replace("Value error, ", "").rstrip(".")
    if message and isinstance(error.__cause__, ValidationError):
        first = error.__cause__.errors()[0]
        if first["type"] != "value_error":  # whose own words name it
            message += f" (got {first['input']!r})"
    return message if not message or message.endswith("?") else f"{message}."


def _help_command(error: typer.TyperException, arguments: Sequence[str]) -> str:
    """The command whose help explains what was wrong."""
    context = getattr(error, "ctx", None)
    if context is not None:
        return f"{context.command_path} --help"
    node: Any = typer.main.get_command(app)
    path = ["prunefront"]
    for word in arguments:
        node = getattr(node, "commands", {}).get(word)
        if node is None:
            break
        path.append(word)
    return f"{' '.join(path)} --help"
