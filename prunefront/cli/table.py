"""`prunefront table`: latency tables, which predict the latency of any schedule on one device."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prunefront.cli.options import (
    AsJson,
    BatchSize,
    Checkpoint,
    Device,
    DtypeOption,
    ImgSize,
    MaxForeignCores,
    ModelKwargs,
    NumClasses,
    RuntimeOption,
    Sha256,
    Url,
    model_spec,
    weights_file,
)
from prunefront.cli.output import JobFailedError, note, print_fields, print_json, print_table, progress_bar
from prunefront.config import Runtime
from prunefront.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from latency_tables.schema import LatencyTable, ValidationReport
    from prunefront.config import PruneConfig
    from prunefront.training.data import SplitName

app = typer.Typer(help="Build and use latency tables.", no_args_is_help=True)

SHOWN_NOISY_ENTRIES = 5

TableFile = Annotated[
    Path, typer.Argument(help="Latency table (JSON), or shipped:NAME of one that `prunefront table list` shows.")
]


@app.command("build")
def build(
    model: Annotated[str, typer.Argument(help="timm model; the table serves every model with such blocks.")],
    device: Device = "cpu",
    runtime: RuntimeOption = "eager",
    dtype: DtypeOption = "fp32",
    batch_size: BatchSize = 8,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwarg: ModelKwargs = None,
    max_foreign_cores: MaxForeignCores = None,
    out: Annotated[Path | None, typer.Option(help="File to write; named after model and device when left out.")] = None,
    push_url: Annotated[
        str | None,
        typer.Option("--push", metavar="URL", help="Also store it in the service at this address, for its searches."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model's blocks at many token counts and write the table.

    An interrupted build goes on where it was: what is finished stays in a file beside the table until that is written.
    While other processes take CPU from it, it waits; when they go on, it ends and stores nothing they disturbed.

    Example: prunefront table build deit_small_patch16_224 --batch-size 8

    Example: prunefront table build deit_small_patch16_224 --device cuda --push http://192.168.0.10:8000
    """
    from latency_tables.build import build_table, settings_for
    from latency_tables.device import torch_device
    from latency_tables.foreign_cpu import Patience
    from latency_tables.schema import save_table
    from latency_tables.shipped import refuse_shipped
    from prunefront.cli.connection import connect
    from prunefront.files import require_writable

    if push_url is not None:
        with connect(push_url):
            pass  # what is no address is refused before anything is measured
    target = out or Path(f"{model}-{device.replace(':', '')}-{runtime}-{dtype}-b{batch_size}.table.json")
    partial = target.with_name(f"{target.name}.partial")
    refuse_shipped(target)
    require_writable(target)
    patience = Patience.allowing(max_foreign_cores)
    with progress_bar(f"Table of {model}") as progress:
        table = build_table(
            model_spec(model, img_size, num_classes, model_kwarg),
            device=device,
            runtime=runtime,
            dtype=dtype,
            batch_size=batch_size,
            partial_path=partial,
            progress=progress,
            settings=replace(settings_for(torch_device(device), runtime), patience=patience),
        )
    save_table(table, target)
    partial.unlink(missing_ok=True)
    note(f"Wrote {target}")
    _tell_noisy_entries(table)
    stored = None if push_url is None else _push_built(table, target, push_url)
    if as_json:
        print_json(_head(table) | {"file": str(target), "stored": stored})
    else:
        _print_head(table)


@app.command("list")
def list_shipped(as_json: AsJson = False) -> None:
    """List the tables that come with prunefront, and which device of this machine each was measured for.

    Use one wherever a table's file is expected, by its name. Searches use it once it is stored with `table push`.

    Example: prunefront table list
    """
    from latency_tables.device import local_devices
    from latency_tables.schema import load_table
    from latency_tables.shipped import shipped_tables

    here = {info.fingerprint(): name for name, info in local_devices().items()}
    rows: list[dict[str, Any]] = []
    for name in shipped_tables():
        table = load_table(name)
        report = table.validation
        rows.append(
            {
                "name": name,
                "device": table.device.name,
                "threads": table.device.threads,
                "device_fingerprint": table.device.fingerprint(),
                "runtime": table.runtime,
                "dtype": table.dtype,
                "batch_size": table.batch_size,
                "model": table.model.name,
                "block_key": table.block_key,
                "mape": None if report is None else report.mape,
                "speedup_mape": None if report is None else report.speedup_mape,
                "fits_device": here.get(table.device.fingerprint()),
            }
        )
    if as_json:
        print_json(rows)
        return
    if not rows:
        note("No tables come with this version; `prunefront table build` makes one.")
        return
    print_table(
        ["table", "measured on", "error", "of speed-ups", "fits here"],
        [
            (
                row["name"],
                row["device"],
                None if row["mape"] is None else f"{row['mape']:.1%}",
                None if row["speedup_mape"] is None else f"{row['speedup_mape']:.1%}",
                row["fits_device"] or "no",
            )
            for row in rows
        ],
    )


@app.command("show")
def show(file: TableFile, as_json: AsJson = False) -> None:
    """Show what a table was measured for, its entries and the error it may claim.

    Example: prunefront table show deit_small_patch16_224-cpu-eager-fp32-b8.table.json
    """
    from latency_tables.schema import load_table

    table = load_table(file)
    if as_json:
        print_json(_head(table) | {"entries": [entry.model_dump(mode="json") for entry in table.entries]})
        return
    _print_head(table)
    print_table(
        ["entry", "tokens in", "tokens out", "median ms", "IQR ms", "samples", "state"],
        [
            (
                entry.entry,
                entry.tokens_in,
                entry.tokens_out,
                *((None, None) if entry.median_ms is None else (f"{entry.median_ms:.4f}", f"{entry.iqr_ms:.4f}")),
                entry.samples,
                entry.state.replace("_", " "),
            )
            for entry in sorted(table.entries, key=lambda entry: entry.key)
        ],
    )


@app.command("predict")
def predict(
    file: TableFile,
    configs: Annotated[list[Path], typer.Argument(help="Configs.")],
    dataset: Annotated[
        str | None, typer.Option(help="Where images keep counts of their own: dataset to count them on.")
    ] = None,
    checkpoint: Checkpoint = None,
    sha256: Sha256 = None,
    split: Annotated[Literal["train", "search", "test"], typer.Option(help="With --dataset: split.")] = "test",
    num_images: Annotated[int, typer.Option(min=1, help="With --dataset: images to count.")] = 512,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Predict the latency of configs, each beside its dense model, and their peak memory.

    Nothing is run, unless each image keeps counts of its own (SPViT, not in mode "fixed"): then --dataset and the
    trained weights in --checkpoint give the mean, p50 and p95 over batches of real images. Without them such a latency
    is nominal: as if every image kept what the config says.

    Example: prunefront table predict digit.table.json best.json

    Example: prunefront table predict deit_s.json spvit.json --checkpoint spvit.safetensors --dataset imagefolder:val
    """
    from latency_tables.device import torch_device
    from latency_tables.predict import predict as predict_config
    from latency_tables.predict import predict_distribution, predict_latency_ms
    from latency_tables.schema import load_table
    from prunefront.config import load_config

    if (dataset is None) != (checkpoint is None):
        raise ConfigError(
            "Counts of real images come from trained weights on a dataset. Give --dataset and --checkpoint together."
        )
    place = torch_device(device)
    table = load_table(file)
    weights = weights_file(checkpoint, sha256)
    rows: list[dict[str, Any]] = []
    for path in configs:
        config = load_config(path)
        predicted = predict_config(table, config)
        predicted_ms, distribution = predicted.latency_ms, None
        if predicted.is_nominal and dataset is not None and weights is not None:
            counts = _count_kept(config, weights, dataset, split, num_images, place)
            distribution = predict_distribution(table, config, counts)
            predicted_ms = distribution.mean_ms
        elif predicted.is_nominal:
            note(
                f"{path}: each image keeps counts of its own, so this latency is nominal. Give --dataset and "
                "--checkpoint for p50 and p95 over real images."
            )
        dense_ms = predict_latency_ms(table, config.evolve(sites=()))
        rows.append(
            {
                "config": str(path),
                "predicted_ms": predicted_ms,
                "is_nominal": predicted.is_nominal and distribution is None,
                "distribution": None if distribution is None else asdict(distribution),
                "dense_predicted_ms": dense_ms,
                "predicted_speedup": dense_ms / predicted_ms,
                "predicted_memory_mib": predicted.peak_memory_mib,
            }
        )
    if as_json:
        print_json(rows)
        return
    print_table(
        ["config", "predicted ms", "p50", "p95", "dense ms", "speed-up", "peak MiB"],
        [
            (
                row["config"],
                f"{row['predicted_ms']:.3f}{' (nominal)' if row['is_nominal'] else ''}",
                *(row["distribution"] and f"{row['distribution'][name]:.3f}" for name in ("p50_ms", "p95_ms")),
                f"{row['dense_predicted_ms']:.3f}",
                f"{row['predicted_speedup']:.2f} ×",
                None if row["predicted_memory_mib"] is None else f"{row['predicted_memory_mib']:.1f}",
            )
            for row in rows
        ],
        title=_measured_for(table),
    )


def _count_kept(
    config: PruneConfig, checkpoint: Path, dataset: str, split: SplitName, num_images: int, device: torch.device
) -> NDArray[np.int64]:
    """Patches that each image of a split keeps at each site, (images, sites), in random order."""
    import numpy as np

    import prunefront
    from prunefront.token_use import TokenCounter
    from prunefront.training.data import check_dataset, data_config_of, open_split
    from prunefront.training.evaluate import evaluate

    check_dataset(dataset)
    model = prunefront.create_model(config, checkpoint=checkpoint)
    images = open_split(dataset, split, data_config=data_config_of(model), num_images=num_images, on_corrupt="skip")
    counter = TokenCounter(model)
    with progress_bar("Counting tokens") as progress:
        evaluate(counter, images, device=device, progress=progress)
    skipped = images.describe_skipped()
    if skipped is not None:
        note(f"Warning: {skipped}")
    # Splits are often sorted by class, which the batches of a deployed model are not.
    shuffled: NDArray[np.int64] = np.random.default_rng(0).permutation(counter.counts().numpy())
    return shuffled


@app.command("validate")
def validate(
    file: TableFile,
    schedules: Annotated[int, typer.Option(min=1, help="Held-out schedules to measure.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Which schedules are drawn.")] = 0,
    write: Annotated[bool, typer.Option("--write", help="Store the report in the table's file.")] = False,
    max_foreign_cores: MaxForeignCores = None,
    as_json: AsJson = False,
) -> None:
    """Measure whole models that the table has not seen and compare them with its predictions.

    Example: prunefront table validate digit.table.json --schedules 50
    """
    from latency_tables.foreign_cpu import Patience
    from latency_tables.schema import load_table, save_table
    from latency_tables.shipped import refuse_shipped
    from latency_tables.validate import validate_table
    from prunefront.files import require_writable

    table = load_table(file)
    if write:
        refuse_shipped(file)
        require_writable(file)
    with progress_bar("Validating") as progress:
        report = validate_table(
            table, num_schedules=schedules, seed=seed, progress=progress, patience=Patience.allowing(max_foreign_cores)
        )
    if write:
        save_table(table.evolve(validation=report), file)
        note(f"Wrote {file}")
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    print_fields(_report_fields(report))


@app.command("import")
def import_table(
    csv: Annotated[Path, typer.Argument(help="CSV: entry,tokens_in,tokens_out,batch_size,median_ms,iqr_ms,samples.")],
    model: Annotated[str, typer.Option(help="timm model whose blocks were timed.")],
    device_name: Annotated[str, typer.Option(help="The device, as you call it.")],
    runtime: Annotated[Literal[Runtime, "tensorrt"], typer.Option(help="How it was executed.")],
    dtype: DtypeOption = "fp32",
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwarg: ModelKwargs = None,
    out: Annotated[Path | None, typer.Option(help="File to write; named after the CSV when left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a table of latencies that were measured elsewhere, for devices without Python.

    Example: prunefront table import phone.csv --model deit_small_patch16_224 --device-name phone --runtime onnxruntime
    """
    from latency_tables.csv_import import import_csv
    from latency_tables.schema import DeviceInfo, save_table

    if not device_name.strip():
        raise ConfigError("--device-name is what tables of the device are found by; give it a name.")
    table = import_csv(
        csv,
        spec=model_spec(model, img_size, num_classes, model_kwarg),
        device=DeviceInfo(kind="other", name=device_name),
        runtime=runtime,
        dtype=dtype,
    )
    target = out or csv.with_suffix(".table.json")
    save_table(table, target)
    note(f"Wrote {target}")
    if as_json:
        print_json(_head(table) | {"file": str(target)})
    else:
        _print_head(table)


@app.command("push")
def push(file: TableFile, url: Url = None, as_json: AsJson = False) -> None:
    """Store a table, so that searches use it: on this machine, or in the service at --url.

    Example: prunefront table push digit.table.json --url http://127.0.0.1:8000

    Example: prunefront table push shipped:intel-xeon-2.50ghz-2-threads/deit_small_patch16_224-eager-fp32-b8
    """
    stored = _push(_load(file), url)
    if as_json:
        print_json(stored)


@app.command("plot")
def plot(
    file: TableFile,
    out: Annotated[Path | None, typer.Option(help="Picture to write (.png, .svg, .pdf).")] = None,
) -> None:
    """Draw a table: latency by token count and, if validated, predicted against measured.

    Example: prunefront table plot digit.table.json --out table.png
    """
    from latency_tables.plot import plot_table
    from latency_tables.schema import load_table
    from latency_tables.shipped import is_shipped

    target = out or (Path(f"{file.name}.png") if is_shipped(file) else file.with_suffix(".png"))
    plot_table(load_table(file), target)
    note(f"Wrote {target}")


def _push(table: LatencyTable, url: str | None) -> dict[str, Any]:
    from prunefront.cli.connection import connect

    with connect(url) as client:
        stored = client.push_table(table.model_dump(mode="json"))
    note(f"Stored table {stored['id']}; the next search with its device, runtime, dtype and batch size uses it.")
    return stored


def _push_built(table: LatencyTable, file: Path, url: str) -> dict[str, Any]:
    from prunefront.client import ClientError

    try:
        return _push(table, url)
    except ClientError as error:
        command = f"prunefront table push {shlex.quote(str(file))} --url {shlex.quote(url)}"
        raise JobFailedError(f"{error} The table is safe in {file}; `{command}` stores it.") from error


def _load(file: Path) -> LatencyTable:
    from latency_tables.schema import load_table

    return load_table(file)


def _head(table: LatencyTable) -> dict[str, Any]:
    """What a table says about itself, without its entries and the points of its validation."""
    document = table.model_dump(mode="json", exclude={"entries": True, "validation": {"points"}})
    return document | {
        "device_fingerprint": table.device.fingerprint(),
        "num_entries": len(table.entries),
        "num_noisy_entries": len(table.noisy_entries),
        "num_unfit_entries": len(table.unfit_entries),
    }


def _measured_for(table: LatencyTable) -> str:
    return f"{table.device.name}, {table.runtime}, {table.dtype}, batch {table.batch_size}"


def _print_head(table: LatencyTable) -> None:
    entries = f"{len(table.entries)}, {len(table.noisy_entries)} of them noisy"
    if table.unfit_entries:
        entries += f", {len(table.unfit_entries)} out of memory: schedules that need those are refused"
    built = None if table.build_s is None else f"in {table.build_s:.0f} s on {table.created_at:%Y-%m-%d %H:%M} UTC"
    fields: list[tuple[str, object]] = [
        ("table", table.name),
        ("measured for", _measured_for(table)),
        ("threads", table.device.threads),
        ("blocks of", table.model.name),
        (table.source, built),
        ("entries", entries),
        ("dense", None if table.dense_ms is None else f"{table.dense_ms:.3f} ms"),
    ]
    if table.canary_drift is not None:
        advice = "" if table.is_steady else "; build again on a steadier one"
        fields.append(_speed_of_machine(table.canary_drift, "build", advice))
    print_fields(fields)
    if table.validation is not None:
        print_fields(_report_fields(table.validation))
    else:
        note("Not validated yet: prunefront table validate measures the error of its predictions.")


def _tell_noisy_entries(table: LatencyTable) -> None:
    noisy = table.noisy_entries
    for entry in noisy[:SHOWN_NOISY_ENTRIES]:
        note(f"Warning: {entry.entry} {entry.tokens_in} -> {entry.tokens_out} is noisy: {entry.reason}")
    if len(noisy) > SHOWN_NOISY_ENTRIES:
        note(f"Warning: {len(noisy) - SHOWN_NOISY_ENTRIES} more of {len(table.entries)} entries are noisy")


def _report_fields(report: ValidationReport) -> list[tuple[str, object]]:
    return [
        ("mean absolute error", f"{report.mape:.2%} on {report.num_schedules} held-out schedules"),
        ("bias", f"{report.bias:+.2%}"),
        ("within 5 %", f"{report.within_5_percent:.0%}"),
        ("within 10 %", f"{report.within_10_percent:.0%}"),
        ("error of speed-ups", _speedup_figures(report)),
        ("error of peak memory", None if report.memory_mape is None else f"{report.memory_mape:.2%}"),
        ("rank agreement", None if report.kendall_tau is None else f"{report.kendall_tau:.3f} (Kendall's tau)"),
        ("dense", f"{report.dense_ms:.3f} ms measured, {report.dense_predicted_ms:.3f} ms predicted"),
        ("measured again", _remeasured(report)),
        ("noise", f"{report.noise:.2%} of the median; {report.num_noisy} schedules stayed noisy"),
        _speed_of_machine(
            report.dense_drift,
            "validation",
            "" if report.is_steady else "; the error of speed-ups tells what the table is worth",
        ),
    ]


def _speedup_figures(report: ValidationReport) -> str | None:
    within_5, within_10 = report.speedup_within_5_percent, report.speedup_within_10_percent
    if report.speedup_mape is None or within_5 is None or within_10 is None:
        return None
    return f"{report.speedup_mape:.2%}; within 5 %: {within_5:.0%}, within 10 %: {within_10:.0%}"


def _remeasured(report: ValidationReport) -> str | None:
    if report.remeasured_mape is None or report.remeasured_speedup_mape is None:
        return None
    return (
        f"{report.num_remeasured} schedules, which differed by {report.remeasured_mape:.2%} in latency and "
        f"{report.remeasured_speedup_mape:.2%} in speed-up"
    )


def _speed_of_machine(drift: float | None, during: str, advice: str) -> tuple[str, object]:
    return "speed of the machine", None if drift is None else f"moved by {drift:.0%} during the {during}{advice}"
