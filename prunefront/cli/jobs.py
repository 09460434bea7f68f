"""`prunefront jobs`: list, look at and steer jobs."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import typer

from prunefront.cli.connection import connect
from prunefront.cli.options import AsJson, Url
from prunefront.cli.output import JobFailedError, note, print_fields, print_json, print_table, progress_bar
from prunefront.cli.serve import DatabaseUrl, read_settings

app = typer.Typer(help="List, look at and steer jobs.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Job id.")]


@app.command("list")
def list_jobs(
    state: Annotated[
        Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"] | None,
        typer.Option(help="Only jobs in this state."),
    ] = None,
    kind: Annotated[Literal["search", "table", "measure"] | None, typer.Option(help="Only jobs of this kind.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first.

    Example: prunefront jobs list --state running
    """
    with connect(url) as client:
        found = list(client.jobs(state=state, kind=kind))
    if as_json:
        print_json(found)
        return
    print_table(
        ["job", "kind", "name", "state", "at", "done", "created"],
        [
            (job["id"], job["kind"], job["name"], job["state"], job["stage"], share_done(job), _time(job["created_at"]))
            for job in found
        ],
    )
    if not found:
        note("No jobs. prunefront search submits one.")


@app.command("show")
def show(job_id: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Show one job: what was asked for, how far it is, why it waits or failed.

    Example: prunefront jobs show 3f0c...
    """
    with connect(url) as client:
        job = client.job(job_id)
    if as_json:
        print_json(job)
    else:
        print_job(job)


@app.command("watch")
def watch(job_id: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Follow a job until it ends; Ctrl-C stops watching, not the job.

    Example: prunefront jobs watch 3f0c... --url http://127.0.0.1:8000
    """
    with connect(url) as client:
        job = wait_for(client, job_id)
    if as_json:
        print_json(job)
    else:
        print_job(job)


@app.command("cancel")
def cancel(job_id: JobId, url: Url = None) -> None:
    """Stop a job for good; what it has measured so far stays.

    Example: prunefront jobs cancel 3f0c...
    """
    _act(job_id, "cancel", url)


@app.command("pause")
def pause(job_id: JobId, url: Url = None) -> None:
    """Let a job rest; its device is free for others meanwhile.

    Example: prunefront jobs pause 3f0c...
    """
    _act(job_id, "pause", url)


@app.command("resume")
def resume(job_id: JobId, url: Url = None) -> None:
    """Go on with a paused job.

    Example: prunefront jobs resume 3f0c...
    """
    _act(job_id, "resume", url)


@app.command("retry")
def retry(job_id: JobId, url: Url = None) -> None:
    """Go on with a failed or cancelled job; it keeps every result it has.

    Example: prunefront jobs retry 3f0c...
    """
    _act(job_id, "retry", url)


@app.command("delete")
def delete(job_id: JobId, url: Url = None) -> None:
    """Delete a finished job with its results and files.

    Example: prunefront jobs delete 3f0c...
    """
    with connect(url) as client:
        client.delete(job_id)
    note(f"Deleted {job_id}")


@app.command("export-study")
def export_study(
    job_id: JobId,
    storage: Annotated[str, typer.Option(metavar="URL", help="Optuna storage to write to, e.g. sqlite:///study.db.")],
    name: Annotated[str | None, typer.Option(help="Name of the study; the job's id when left out.")] = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Write a search as a standard Optuna study, for Optuna's plots, importances and dashboard.

    Reads the database itself: the parameters that the sampler chose are no part of the HTTP API.

    Example: prunefront jobs export-study 3f0c... --storage sqlite:///study.db
    """
    from search.export import export_study
    from store import open_store

    with open_store(read_settings(database_url=database_url).database_url) as store:
        job, candidates = store.get_job(job_id), store.list_candidates(job_id)
    with progress_bar("Writing the study") as progress:
        count = export_study(job, candidates, storage=storage, name=name or job_id, progress=progress)
    note(f"Wrote {count} trials as study {name or job_id}")


def wait_for(client: Any, job_id: str) -> dict[str, Any]:
    """Show a job's progress until it has succeeded.

    Raises:
        JobFailedError: If it failed or was cancelled.
    """
    from prunefront.client import JobNotSucceededError

    with progress_bar(f"Job {job_id}") as progress:

        def report(job: dict[str, Any]) -> None:
            now = job["progress"]
            text = job["waiting_reason"] or ": ".join(part for part in (job["stage"], now["message"]) if part)
            progress(now["done"], now["total"], text or job["state"])

        try:
            finished: dict[str, Any] = client.wait(job_id, progress=report)
        except JobNotSucceededError as error:
            raise JobFailedError(str(error)) from error
    return finished


def share_done(job: dict[str, Any]) -> str | None:
    """How far the present stage of a running job is."""
    progress = job["progress"]
    if job["state"] != "running" or not progress["total"]:
        return None
    return f"{progress['done'] / progress['total']:.0%}"


def print_job(job: dict[str, Any]) -> None:
    """Print one job."""
    failure = job["failure"] or {}
    fields: list[tuple[str, object]] = [
        ("job", job["id"]),
        ("kind", job["kind"]),
        ("name", job["name"]),
        ("state", job["state"]),
        ("stage", job["stage"]),
        ("progress", ", ".join(part for part in (share_done(job), job["progress"]["message"]) if part) or None),
        ("waits for", job["waiting_reason"]),
        ("failure", failure.get("message")),
        ("attempts", job["attempts"]),
        ("created", _time(job["created_at"])),
        ("finished", job["finished_at"] and _time(job["finished_at"])),
    ]
    print_fields((name, value) for name, value in fields if value is not None)
    if failure.get("log_tail"):
        note(failure["log_tail"])


def _act(job_id: str, verb: Literal["cancel", "pause", "resume", "retry"], url: str | None) -> None:
    with connect(url) as client:
        job = client.act(job_id, verb)
    wanted = " (asked to stop)" if job["cancel_requested"] or job["pause_requested"] else ""
    note(f"{job_id} is {job['state']}{wanted}")


def _time(text: str) -> str:
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")
