"""Claim: what tokens save in MACs they save in time. Dense and every method, each in its fastest runtime.

    python -m benchmarks.inference --json --out benchmarks/results/inference.json

One interleaved run per model, dtype and batch size times the dense model and each method's published schedule near
65 % of the dense MACs (3.0 G on DeiT-S) in every runtime, and an eager reference that materialises attention maps
(`benchmarks.reference`). Per method:

- *speed-up*: dense in its fastest runtime over the method in its fastest;
- *conversion*: speed-up over the ratio of MACs, 1 where every saved MAC saves its share of time;
- *over reference*: the eager reference over the method in its fastest runtime;
- *of peak*: share of the machine's matmul peak, measured in the same run as the fastest of some square products.

Run it on a machine that does nothing else; the record says how busy it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

import prunefront
from benchmarks.reference import Reference
from latency_tables.device import describe_device, torch_device
from latency_tables.measure import Measurement, MeasureSettings, measure_models, weights_mib
from prunefront.compress import compress, create_dense
from prunefront.config import ModelSpec, PruneConfig, Site
from prunefront.files import write_json_atomic
from prunefront.runtimes import DTYPES, Forward, cast_modules, prepare, use_shared_compile_cache

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
METHODS = ("evit", "diffrate", "tome", "ppt", "dynamicvit", "hybrid")
MACS_SHARE = 0.65
DENSE = "dense"
EAGER_REFERENCE = "reference"
# Published schedules of hybrid do not exist; EViT's blocks with both of its operations.
HYBRID = tuple(Site(block=block, op=op, keep_ratio=0.82) for block in (3, 6, 9) for op in ("fuse", "merge"))
PEAK_SIZES = (1024, 2048)  # of square products
CLAIMED = {1: 0.92, 8: 0.95, 16: 0.97}  # Conversion on a CPU by batch size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deit_small_patch16_224"], help="timm names")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runtimes", nargs="+", default=["eager", "compile"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=tuple(DTYPES))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--seconds", type=float, default=4.0, help="sampling time per model that is enough")
    parser.add_argument("--json", action="store_true", help="print the record instead of the tables")
    parser.add_argument("--out", help="also write the record to this file, after every run")
    arguments = parser.parse_args()
    use_shared_compile_cache()
    record: dict[str, Any] = {
        "command": "python -m " + " ".join(["benchmarks.inference", *sys.argv[1:]]),
        "device": describe_device(arguments.device).model_dump(mode="json"),
        "runs": [],
    }
    for name in arguments.models:
        for dtype in arguments.dtypes:
            for batch_size in arguments.batch_sizes:
                run = measure(
                    name,
                    arguments.methods,
                    device=arguments.device,
                    runtimes=arguments.runtimes,
                    dtype=dtype,
                    batch_size=batch_size,
                    seconds=arguments.seconds,
                )
                record["runs"].append(run)
                if arguments.out:
                    write_json_atomic(arguments.out, record)
                if not arguments.json:
                    print(table(run), flush=True)
    if arguments.json:
        print(json.dumps(record, indent=1))
    return 0


def schedule_of(method: str, spec: ModelSpec) -> PruneConfig:
    """The method's schedule whose MACs are nearest to the share: published for the model, else for DeiT-S."""
    if method == "hybrid":
        return PruneConfig(model=spec, method="hybrid", sites=HYBRID)
    dense = prunefront.macs(PruneConfig(model=spec, method="hybrid"))
    published = prunefront.published(method, spec) or prunefront.published(method, "deit_small_patch16_224")
    schedules = [config.model_copy(update={"model": spec}) for config in published.values()]
    return min(schedules, key=lambda config: abs(prunefront.macs(config) / dense - MACS_SHARE))


def measure(
    name: str,
    methods: Sequence[str],
    *,
    device: str,
    runtimes: Sequence[str],
    dtype: str,
    batch_size: int,
    seconds: float,
) -> dict[str, Any]:
    """One interleaved run: everything at one model, dtype and batch size."""
    spec = ModelSpec(name=name)
    target = torch_device(device)
    configs = {DENSE: PruneConfig(model=spec, method="hybrid")} | {m: schedule_of(m, spec) for m in methods}
    dense = create_dense(spec).eval()
    models = dict(
        zip(
            configs,
            cast_modules(
                [dense, *(compress(dense, configs[method]).eval() for method in methods)], DTYPES[dtype], target
            ),
            strict=True,
        )
    )
    subjects: dict[str, nn.Module | Forward] = {}
    for key, model in models.items():
        subjects |= {f"{key}@{runtime}": prepare(model, runtime, dtype, target) for runtime in runtimes}
        if key != DENSE:
            subjects[f"{key}@{EAGER_REFERENCE}"] = Reference(model)
    for size in PEAK_SIZES:
        subjects[f"matmul@{size}"] = _Product(size, DTYPES[dtype], target)
    images = torch.randn(batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    load = os.getloadavg()[0]
    start = time.monotonic()
    measured = measure_models(
        subjects,
        images,
        device=device,
        runtime="eager",
        dtype=dtype,
        canary=f"{DENSE}@{runtimes[0]}",
        settings=MeasureSettings(target_s=seconds),
        progress=_show,
    )
    for key, one in measured.items():
        of = key.partition("@")[0]
        if of in models and one.peak_memory_mib is not None:  # subjects are measured without their weights
            measured[key] = replace(one, peak_memory_mib=one.peak_memory_mib + weights_mib(models[of]))
    return {
        "model": name,
        "dtype": dtype,
        "batch_size": batch_size,
        "load_before": round(load, 2),
        "seconds": round(time.monotonic() - start, 1),
        **figures(measured, configs, batch_size),
        "measured": {key: asdict(one) for key, one in measured.items()},
    }


def figures(measured: dict[str, Measurement], configs: dict[str, PruneConfig], batch_size: int) -> dict[str, Any]:
    """What is claimed, from the latencies by ``name@runtime``."""
    peak = max(2 * size**3 / measured[f"matmul@{size}"].median_ms / 1e6 for size in PEAK_SIZES)  # GFLOP/s
    fastest = {key: _fastest(measured, key) for key in configs}
    dense_ms = measured[fastest[DENSE]].median_ms
    dense_macs = prunefront.macs(configs[DENSE])
    rows = {}
    for key, config in configs.items():
        best = measured[fastest[key]]
        macs = prunefront.macs(config)
        row = {
            "runtime": fastest[key].partition("@")[2],
            "ms": best.median_ms,
            "iqr_ms": best.iqr_ms,
            "images_per_s": batch_size / best.median_ms * 1e3,
            "peak_memory_mib": best.peak_memory_mib,
            "macs": macs,
            "speedup": dense_ms / best.median_ms,
            "conversion": (dense_ms / best.median_ms) / (dense_macs / macs),
            "of_peak": 2 * macs * batch_size / best.median_ms / 1e6 / peak,
        }
        if key != DENSE:
            row["over_reference"] = measured[f"{key}@{EAGER_REFERENCE}"].median_ms / best.median_ms
        rows[key] = row
    return {"matmul_peak_gflops": peak, "rows": rows, "num_noisy": sum(one.state != "ok" for one in measured.values())}


def _fastest(measured: dict[str, Measurement], key: str) -> str:
    own = [name for name in measured if name.startswith(f"{key}@") and not name.endswith(EAGER_REFERENCE)]
    return min(own, key=lambda name: measured[name].median_ms)


def table(run: dict[str, Any]) -> str:
    """A run as text."""
    claimed = CLAIMED.get(run["batch_size"])
    lines = [
        f"{run['model']} {run['dtype']} batch {run['batch_size']}: "
        f"matmul peak {run['matmul_peak_gflops']:.0f} GFLOP/s, "
        f"load before {run['load_before']}, {run['num_noisy']} noisy, {run['seconds']:.0f} s"
        + (f"; claimed conversion {claimed}" if claimed else ""),
        f"  {'':12} {'runtime':12} {'ms':>9} {'IQR':>6} {'images/s':>9} {'MACs':>7} {'speed-up':>8} {'convers.':>8} "
        f"{'of peak':>7} {'over ref':>8} {'MiB':>6}",
    ]
    for key, row in run["rows"].items():
        over = f"{row['over_reference']:8.2f}" if "over_reference" in row else " " * 8
        memory = "" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:6.0f}"
        lines.append(
            f"  {key:12} {row['runtime']:12} {row['ms']:9.2f} {row['iqr_ms'] / row['ms']:6.1%} "
            f"{row['images_per_s']:9.1f} {row['macs'] / 1e9:6.2f}G {row['speedup']:8.3f} {row['conversion']:8.3f} "
            f"{row['of_peak']:7.2f} {over} {memory:>6}"
        )
    return "\n".join(lines)


class _Product:
    """A square matrix product; the images it is called with do not matter."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._a, self._b = torch.randn(2, size, size).to(dtype=dtype, device=device)

    def __call__(self, images: Tensor) -> Tensor:
        return torch.mm(self._a, self._b)


def _show(done: float, total: float, message: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{done / total:4.0%} {message}", end="" if done < total else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
