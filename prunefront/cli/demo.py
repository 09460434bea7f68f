"""`prunefront demo`: the main job on real images, on this machine, in minutes. An ordinary client of the service."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from prunefront.cli.connection import connect
from prunefront.cli.front import print_front
from prunefront.cli.jobs import wait_for
from prunefront.cli.options import MaxForeignCores
from prunefront.cli.output import note, write_result

MODEL = "digit_vit_patch6_48"
DATASET = "digit-scenes"
PLACE = {"device": "cpu", "runtime": "eager", "dtype": "fp32", "batch_size": 8}

FULL: dict[str, Any] = {
    "methods": ["evit", "ppt", "tome", "diffrate", "hybrid"],
    "detail": "full",
    # Proposals end with the minutes, so that a slow machine is done in time and a fast one looks at more.
    "budget": {
        "trials": 160,
        "max_minutes": 2,
        "search_images": 600,
        "measure_top": 8,
        "finetune_top": 2,
        "finetune_epochs": 1,
    },
}
QUICK: dict[str, Any] = {
    "methods": ["evit"],
    "detail": "quick",
    "budget": {"trials": 8, "search_images": 200, "measure_top": 3, "finetune_top": 0},
}


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A smaller search, in about two minutes on 2 cores.")] = False,
    serve: Annotated[
        bool, typer.Option("--serve/--no-serve", help="Show the front on a page afterwards, until Ctrl-C.")
    ] = True,
    max_foreign_cores: MaxForeignCores = None,
    out: Annotated[Path, typer.Option(help="Folder for front.json, best.json, table.json and front.png.")] = Path(
        "prunefront-demo"
    ),
) -> None:
    """Measure this machine, search schedules for a small ViT on real handwritten digits, and show the Pareto front.

    Everything the demo stores lies in the folder of --out, beside its four results.

    Example: prunefront demo --quick --no-serve --out results
    """
    started = time.monotonic()
    out = out.absolute()
    # A demo leaves the user's own jobs alone.
    os.environ["PRUNEFRONT_DATA_DIR"] = str(out / "data")
    os.environ.pop("PRUNEFRONT_DATABASE_URL", None)
    os.environ.setdefault("PRUNEFRONT_LOG_LEVEL", "WARNING")
    plan = QUICK if quick else FULL
    model = {"name": MODEL}
    with connect(None, with_controller=True) as client:
        note(f"Watch it at {client.url}")
        table_job = client.submit(
            {
                "kind": "table",
                "name": "demo: latency table of this machine",
                "model": model,
                "detail": plan["detail"],
                "validate_schedules": 0,
                "max_foreign_cores": max_foreign_cores,
                **PLACE,
            }
        )
        search_job = client.submit(
            {
                "kind": "search",
                "name": "demo: search",
                "model": model,
                "dataset": DATASET,
                "space": {"methods": plan["methods"]},
                "budget": plan["budget"],
                **PLACE,
            }
        )
        table_id = wait_for(client, table_job["id"])["result"]["table_id"]
        _write(out / "table.json", client.table(table_id)["document"])
        wait_for(client, search_job["id"])
        front = client.front(search_job["id"])
        _write(out / "front.json", front)
        _write(out / "best.json", client.best(search_job["id"]).to_dict())
        _draw(front, out / "front.png")
        print_front(front)
        minutes, seconds = divmod(round(time.monotonic() - started), 60)
        note(f"Wrote front.json, best.json, table.json and front.png to {out} after {minutes} min {seconds} s")
        if serve:
            note(f"The front is at {client.url}/jobs/{search_job['id']} until Ctrl-C")
            _until_interrupted()


def _write(path: Path, document: dict[str, Any]) -> None:
    write_result(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _draw(front: dict[str, Any], path: Path) -> None:
    from search.documents import Front
    from search.plot import plot_front

    plot_front(Front.model_validate(front), path)


def _until_interrupted() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        note("Stopped")
