"""`prunefront search`: submit a search, watch it, show its front."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prunefront.cli.connection import connect
from prunefront.cli.front import print_front
from prunefront.cli.jobs import wait_for
from prunefront.cli.options import (
    AsJson,
    BatchSize,
    Device,
    DtypeOption,
    ImgSize,
    ModelKwargs,
    NumClasses,
    RuntimeOption,
    Url,
    parse_img_size,
    parse_pairs,
)
from prunefront.cli.output import note, print_json, write_result

_SPACE = "Search space"
_BUDGET = "Budget"


def search(
    model: Annotated[str, typer.Argument(help="timm model.")],
    dataset: Annotated[str, typer.Option(help="Dataset id; see prunefront data inspect.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="Registered checkpoint; timm's pretrained weights when left out.")
    ] = None,
    device: Device = "cpu",
    runtime: RuntimeOption = "eager",
    dtype: DtypeOption = "fp32",
    batch_size: BatchSize = 8,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwarg: ModelKwargs = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="Method to search; may be repeated. All when left out.", rich_help_panel=_SPACE),
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", help="Blocks that may reduce, e.g. 3,6,9; any.", rich_help_panel=_SPACE)
    ] = None,
    min_keep_ratio: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Least share of the tokens that one site keeps.", rich_help_panel=_SPACE),
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(min=0, help="Slower candidates are not promoted.", rich_help_panel=_SPACE)
    ] = None,
    max_memory_mib: Annotated[
        float | None,
        typer.Option(min=0, help="Candidates that need more memory are not promoted.", rich_help_panel=_SPACE),
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Proposals.", rich_help_panel=_BUDGET)] = None,
    max_minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop proposing after so many minutes.", rich_help_panel=_BUDGET)
    ] = None,
    search_images: Annotated[
        int | None, typer.Option(min=1, help="Search images per candidate; all.", rich_help_panel=_BUDGET)
    ] = None,
    measure_top: Annotated[
        int | None, typer.Option(min=1, help="Candidates to measure.", rich_help_panel=_BUDGET)
    ] = None,
    finetune_top: Annotated[
        int | None, typer.Option(min=0, help="Candidates to fine-tune.", rich_help_panel=_BUDGET)
    ] = None,
    finetune_epochs: Annotated[int | None, typer.Option(min=1, help="Epochs each.", rich_help_panel=_BUDGET)] = None,
    sampler: Annotated[
        Literal["auto", "tpe", "nsga2", "gp", "qmc", "random"], typer.Option(help="Optuna sampler.")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the proposals.")] = 0,
    name: Annotated[str | None, typer.Option(help="What to call the job.")] = None,
    priority: Annotated[int, typer.Option(help="Higher runs first.")] = 0,
    url: Url = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Only submit; a running service or controller does the work.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the front document to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Search schedules that are fast on a device and accurate on a dataset, and show the Pareto front.

    Without --url the search runs on this machine, now; interrupted, it goes on with the next serve or controller.

    Example: prunefront search digit_vit_patch6_48 --dataset digit-scenes --trials 100 --out front.json
    """
    from prunefront.files import require_writable

    body = _without_none(
        {
            "kind": "search",
            "name": name,
            "priority": priority,
            "model": {
                "name": model,
                "checkpoint": checkpoint,
                "img_size": parse_img_size(img_size),
                "num_classes": num_classes,
                "kwargs": parse_pairs(model_kwarg, "--model-kwarg") or None,
            },
            "dataset": dataset,
            "device": device,
            "runtime": runtime,
            "dtype": dtype,
            "batch_size": batch_size,
            "space": {"methods": method or None, "locations": _locations(at), "min_keep_ratio": min_keep_ratio},
            "constraints": {"max_latency_ms": max_latency_ms, "max_memory_mib": max_memory_mib},
            "budget": {
                "trials": trials,
                "max_minutes": max_minutes,
                "search_images": search_images,
                "measure_top": measure_top,
                "finetune_top": finetune_top,
                "finetune_epochs": finetune_epochs,
            },
            "sampler": sampler,
            "seed": seed,
        }
    )
    if out is not None:
        require_writable(out)
    with connect(url, with_controller=not detach, offers_devices=True) as client:
        job = client.submit(body)
        note(f"Submitted job {job['id']}")
        if detach:
            if as_json:
                print_json(job)
            else:
                typer.echo(job["id"])
            return
        wait_for(client, job["id"])
        front = client.front(job["id"])
    if out is not None:
        write_result(out, json.dumps(front, indent=1, ensure_ascii=False) + "\n")
    if as_json:
        print_json(front)
        return
    print_front(front)
    note(f"prunefront best {job['id']} --min-speedup 1.5 --out best.json fetches a config.")


def _without_none(document: dict[str, Any]) -> dict[str, Any]:
    """What was given; the job's own defaults stand for the rest."""
    nested = {key: _without_none(value) if isinstance(value, dict) and key != "kwargs" else value
              for key, value in document.items()}  # fmt: skip
    return {key: value for key, value in nested.items() if value is not None and value != {}}


def _locations(text: str | None) -> list[int] | None:
    from prunefront.cli.config import parse_blocks

    return None if text is None else parse_blocks(text)
