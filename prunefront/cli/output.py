"""What every command prints with: results to stdout (text or JSON), progress and errors to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from prunefront.errors import PrunefrontError

UNLIMITED = 100_000  # columns of an output that nobody looks at through a window
ProgressCallback = Callable[[float, float, str], None]


class JobFailedError(PrunefrontError, RuntimeError):
    """The request was fine, but the work it started did not succeed; the command exits with 1 instead of 2."""


def stdout() -> Console:
    """The console for results. A file or a pipe has no width: rows stay whole, so that grep finds them."""
    is_terminal = sys.stdout.isatty()
    return Console(file=sys.stdout, width=None if is_terminal else UNLIMITED, soft_wrap=not is_terminal)


def stderr() -> Console:
    """The console for progress, notes and errors."""
    return Console(file=sys.stderr, soft_wrap=True, highlight=False)


def note(text: str) -> None:
    """Tell the user something that is not the result."""
    stderr().print(text, style="dim", markup=False)


def print_error(text: str) -> None:
    """Print one sentence about what went wrong."""
    console = stderr()
    console.print("Error: ", style="bold red", end="")
    console.print(text, markup=False)


def print_json(document: Any) -> None:
    """Print a result for programs: indented JSON and nothing else on stdout."""
    takes_all = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(document, indent=1, ensure_ascii=not takes_all, allow_nan=False) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """Print rows under headings; numbers are right-aligned, None is a dash."""
    table = Table(
        title=escape(title) if title else None, title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    cells = [list(row) for row in rows]
    for index, name in enumerate(columns):
        numeric = any(isinstance(row[index], int | float) for row in cells)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*("–" if cell is None else escape(str(cell)) for cell in row))
    stdout().print(table)


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Print one ``name  value`` per line, names aligned."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields:
        table.add_row(name, "–" if value is None else escape(str(value)))
    stdout().print(table)


def write_result(path: Path, text: str) -> None:
    """Write a result file, all or nothing, and say where it is."""
    from prunefront.files import write_atomic

    write_atomic(path, text)
    note(f"Wrote {path}")


@contextmanager
def progress_bar(title: str, *, shown: bool = True) -> Iterator[ProgressCallback]:
    """Show a bar with the remaining time on stderr while the block runs; nothing where stderr is no terminal.

    Args:
        title: What is going on.
        shown: False for processes that leave telling to another one.

    Yields:
        A callback ``progress(done, total, message)``; a total of 0 or less shows activity without an end.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[message]}", markup=False),
    )
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(title, total=None, message="")

        def report(done: float, total: float, message: str) -> None:
            bar.update(task, completed=done, total=total if total > 0 else None, message=message)

        yield report
