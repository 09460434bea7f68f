"""`prunefront demo`: the main job on real images, on this machine, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A smaller search, in about two minutes on 2 cores.")] = False,
    serve: Annotated[
        bool, typer.Option("--serve/--no-serve", help="Show the front on a page afterwards, until Ctrl-C.")
    ] = True,
    out: Annotated[Path, typer.Option(help="Folder for front.json, best.json, table.json and front.png.")] = Path(
        "prunefront-demo"
    ),
) -> None:
    """Measure this machine, search schedules for a small ViT on real handwritten digits, and show the Pareto front.

    Example: prunefront demo --quick --no-serve --out results
    """
    from search.demo import run_demo

    run_demo(quick=quick, serve=serve, out_dir=out)
