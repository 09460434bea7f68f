"""`prunefront front`: the Pareto front of a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prunefront.cli.connection import connect
from prunefront.cli.options import AsJson, Url
from prunefront.cli.output import note, print_json, print_table, write_result

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help='Job id; "last" is the newest search.')]
Fidelity = Annotated[
    Literal["screened", "evaluated", "finetuned"] | None,
    typer.Option("--fidelity", help="How well accuracies are known; left out, the one whose front offers most."),
]
DeviceOfFront = Annotated[str | None, typer.Option("--device", help="Device of the latencies; the job's own.")]


def front(
    job: JobArgument = "last",
    fidelity: Fidelity = None,
    device: DeviceOfFront = None,
    out: Annotated[Path | None, typer.Option(help="Also write the front document to this file.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show accuracy against measured latency: dense, the papers' schedules, and the points nothing else beats.

    Example: prunefront front last --out front.json
    """
    with connect(url) as client:
        document = client.front(job_id(client, job), fidelity=fidelity, device=device)
    if out is not None:
        write_result(out, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    if as_json:
        print_json(document)
    else:
        print_front(document)


def job_id(client: Any, job: str) -> str:
    """The id that a word on the command line means.

    Raises:
        UnknownNameError: If "last" is asked for and there is no search.
    """
    from prunefront.errors import UnknownNameError

    if job != "last":
        return job
    newest = next(iter(client.jobs(kind="search")), None)
    if newest is None:
        raise UnknownNameError("There is no search yet; prunefront search or prunefront demo runs one.")
    return str(newest["id"])


def print_front(document: dict[str, Any]) -> None:
    """Print a front document as a table, fastest first."""
    # A mark may stand on the front as well; it is one row all the same.
    points = {point["trial"]: ("front", point) for point in document["points"]}
    for kind, point in [*(("mark", mark) for mark in document["marks"]), ("dense", document["dense"])]:
        if point is not None:
            points.setdefault(point["trial"], (kind, point))
    print_table(
        [
            "",
            "label",
            "method",
            "ms",
            "IQR ms",
            "speed-up",
            "predicted ms",
            "top-1",
            "95 %",
            "to dense",
            "GMACs",
            "trial",
        ],
        [_row(kind, point) for kind, point in sorted(points.values(), key=lambda one: float(one[1]["measured_ms"]))],
        title=(
            f"{document['device']}, {document['runtime']}, {document['dtype']}, batch {document['batch_size']}; "
            f"{document['fidelity']} on the {document['split']} split"
        ),
    )
    if not points:
        note("Nothing is measured yet.")
    for line in document["notes"]:
        note(line)


def _row(kind: str, point: dict[str, Any]) -> tuple[object, ...]:
    interval, delta = point["top1_ci"], point["top1_delta"]
    return (
        kind,
        point["label"],
        point["config"]["method"] if point["config"]["sites"] else "dense",
        f"{point['measured_ms']:.3f}",
        f"{point['iqr_ms']:.3f}",
        f"{point['speedup']:.2f} ×",
        None if point["predicted_ms"] is None else f"{point['predicted_ms']:.3f}",
        f"{point['top1']:.2%}",
        None if interval is None else f"{interval[0]:.2%} to {interval[1]:.2%}",
        None if delta is None else f"{delta:+.2%}",
        f"{point['macs'] / 1e9:.3f}",
        point["trial"],
    )
