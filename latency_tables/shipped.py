"""Tables that come with prunefront: ``data/MACHINE/MODEL-RUNTIME-DTYPE-bBATCH.json``, named ``shipped:`` and the rest.

``shipped:intel-xeon-2.50ghz-2-threads/deit_small_patch16_224-eager-fp32-b8`` stands for the file wherever a table is
read from a path. The prefix is always needed, so no file of the working folder is ever mistaken for one, or hidden.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from latency_tables.errors import LatencyTableError

if TYPE_CHECKING:
    from latency_tables.schema import LatencyTable

SHIPPED: Final = "shipped:"
DATA = Path(__file__).with_name("data")


def shipped_tables() -> tuple[str, ...]:
    """Names of all tables that come with this version, in order; `latency_tables.schema.load_table` reads them."""
    return tuple(sorted(f"{SHIPPED}{file.parent.name}/{file.stem}" for file in DATA.glob("*/*.json")))


def is_shipped(source: str | os.PathLike[str]) -> bool:
    """Whether this is the name of a shipped table rather than a path."""
    return str(os.fspath(source)).startswith(SHIPPED)


def shipped_file(name: str) -> Path:
    """The file of a shipped table.

    Args:
        name: As `shipped_tables` gives it.

    Raises:
        LatencyTableError: If there is no such table; the sentence names one that is like it.
    """
    names = shipped_tables()
    if name not in names:
        like = difflib.get_close_matches(name, names, n=1)
        raise LatencyTableError(
            f"No table {name!r} comes with this version"
            + (f"; did you mean {like[0]!r}? " if like else ". ")
            + "`prunefront table list` shows those that do."
        )
    machine, _, table = name.removeprefix(SHIPPED).partition("/")
    return DATA / machine / f"{table}.json"


def file_to_ship(table: LatencyTable) -> Path:
    """Where a table has to lie in the source tree to be shipped."""
    return DATA / table.device.slug() / f"{table.model.name}-{table.runtime}-{table.dtype}-b{table.batch_size}.json"


def refuse_shipped(target: str | os.PathLike[str]) -> None:
    """Make sure that what is to be written to is a file of the user.

    Raises:
        LatencyTableError: If it is the name of a shipped table.
    """
    if is_shipped(target):
        raise LatencyTableError(
            f"{os.fspath(target)!r} names a table that comes with prunefront, which is not written to; give a file."
        )
