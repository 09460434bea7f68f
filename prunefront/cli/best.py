"""`prunefront best`: the one config to take from a job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunefront.cli.connection import connect
from prunefront.cli.front import DeviceOfFront, Fidelity, JobArgument, job_id
from prunefront.cli.options import Url
from prunefront.cli.output import write_result
from prunefront.errors import ConfigError


def best(
    job: JobArgument = "last",
    max_latency_ms: Annotated[
        float | None, typer.Option(min=0, help="The most accurate config that is this fast, per batch.")
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option(min=0, max=1, help="The fastest config that is this accurate, 0-1.")
    ] = None,
    min_speedup: Annotated[
        float | None, typer.Option(min=0, help="The most accurate config that is this much faster than dense.")
    ] = None,
    fidelity: Fidelity = None,
    device: DeviceOfFront = None,
    out: Annotated[Path | None, typer.Option(help="File to write (.json or .yaml) instead of printing.")] = None,
    url: Url = None,
) -> None:
    """Fetch the best config of a job under a limit, with its results, as JSON or YAML.

    Example: prunefront best last --min-speedup 1.5 --out best.json
    """
    if sum(limit is not None for limit in (max_latency_ms, min_top1, min_speedup)) > 1:
        raise ConfigError("Give one limit: --max-latency-ms, --min-top1 or --min-speedup.")
    with connect(url) as client:
        config = client.best(
            job_id(client, job),
            max_latency_ms=max_latency_ms,
            min_top1=min_top1,
            min_speedup=min_speedup,
            fidelity=fidelity,
            device=device,
        )
    if out is None:
        typer.echo(config.to_json(), nl=False)
    else:
        write_result(out, config.to_yaml() if out.suffix in (".yaml", ".yml") else config.to_json())
