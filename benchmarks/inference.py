"""Claim: what tokens save in MACs they save in time. Dense and every method, each in its fastest runtime.

    python -m benchmarks.inference --save

One interleaved run per model, dtype and batch size times the dense model and each method's published schedule near
65 % of the dense MACs (3.0 G on DeiT-S) in every runtime, and an eager reference that materialises attention maps
(`benchmarks.reference`; not of SPViT and Tri-Level). What a runtime cannot run is left out, with the reason. Per
method:

- *speed-up*: dense in its fastest runtime over the method in its fastest;
- *conversion*: speed-up over the ratio of MACs, 1 where every saved MAC saves its share of time;
- *linears*: what conversion would be if the model were its linear layers (with their norms and activations) alone, at
  the method's token counts: how well the machine's matrix products turn fewer rows into less time;
- *over reference*: the eager reference over the method in its fastest runtime;
- *of peak*: share of the machine's matmul peak, measured in the same run as the fastest of some square
  products, eager and compiled;
- *of roofline* (CUDA): share of the speed that neither this peak nor the memory allows to exceed: weights and images
  read once, logits written, at the bandwidth of a copy in the same run.

By default it covers DeiT-T, -S and -B, all methods and runtimes, and the batch sizes and dtypes of the device; the
options narrow it. Measuring a model, dtype and batch size again replaces that run in the record and no other.

Run it on a machine that does nothing else; the record says how busy it was.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import prunefront
from benchmarks.records import add_output_options, record_for
from benchmarks.reference import REFERENCED, Reference
from latency_tables.device import describe_device, torch_device
from latency_tables.measure import (
    Measurement,
    MeasureSettings,
    PreparedModel,
    measure_models,
    measuring,
    prepared_model,
    weights_mib,
)
from prunefront.compress import compress, create_dense
from prunefront.config import ModelSpec, PruneConfig, Site
from prunefront.errors import ConfigError, PrunefrontError
from prunefront.runtimes import DTYPES, RUNTIMES, Forward, cast_modules, prepare, use_shared_compile_cache

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
METHODS = ("evit", "diffrate", "tome", "ppt", "dynamicvit", "hybrid", "spvit", "trilevel")
MACS_SHARE = 0.65
DENSE = "dense"
EAGER_REFERENCE = "reference"
LINEARS = "linears"
COPY = "copy"
MATMUL = "matmul@"
COMPILE = "compile"
# Published schedules of hybrid do not exist; EViT's blocks with both of its operations.
HYBRID = tuple(Site(block=block, op=op, keep_ratio=0.82) for block in (3, 6, 9) for op in ("fuse", "merge"))

# By kind of device.
BATCH_SIZES = {"cpu": (1, 8, 16), "cuda": (1, 8, 16, 64, 256)}
DEVICE_DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}
DEVICE_RUNTIMES = {"cpu": tuple(name for name in RUNTIMES if name != "cudagraph"), "cuda": tuple(RUNTIMES)}
PEAK_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # of square products
COPY_BYTES = 2**30  # more than any cache holds
CLAIMED = {"cpu": {1: 0.92, 8: 0.95, 16: 0.97}, "cuda": {1: 0.85, 256: 0.95}}  # conversion by batch size


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm names")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runtimes", nargs="+", choices=tuple(RUNTIMES))
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES))
    parser.add_argument("--batch-sizes", nargs="+", type=int)
    parser.add_argument("--seconds", type=float, default=4.0, help="sampling time per model that is enough")
    add_output_options(parser)
    arguments = parser.parse_args()
    use_shared_compile_cache()
    device = describe_device(arguments.device)
    record = record_for(parser, arguments, "inference", device, key=("model", "dtype", "batch_size"))
    for name in arguments.models:
        for dtype in arguments.dtypes or DEVICE_DTYPES[device.kind]:
            for batch_size in arguments.batch_sizes or BATCH_SIZES[device.kind]:
                run = measure(
                    name,
                    arguments.methods,
                    device=arguments.device,
                    runtimes=arguments.runtimes or DEVICE_RUNTIMES[device.kind],
                    dtype=dtype,
                    batch_size=batch_size,
                    settings=MeasureSettings(target_s=arguments.seconds),
                )
                record.add(run)
                if not arguments.json:
                    print(table(run), flush=True)
    if arguments.json:
        print(record.as_json())
    return 0


def schedule_of(method: str, spec: ModelSpec) -> PruneConfig:
    """The method's schedule whose MACs are nearest to the share: published for the model, else for DeiT-S."""
    if method == "hybrid":
        return PruneConfig(model=spec, method="hybrid", sites=HYBRID)
    dense = prunefront.macs(PruneConfig(model=spec, method="hybrid"))
    published = prunefront.published(method, spec) or prunefront.published(method, "deit_small_patch16_224")
    schedules = [config.model_copy(update={"model": spec}) for config in published.values()]
    nearest = min(schedules, key=lambda config: abs(prunefront.macs(config) / dense - MACS_SHARE))
    # Untrained selectors would decide per image on nothing; with fixed counts its MACs are those of the schedule.
    return nearest.evolve(options={**nearest.options, "mode": "fixed"}) if method == "spvit" else nearest


def measure(
    name: str,
    methods: Sequence[str],
    *,
    device: str,
    runtimes: Sequence[str],
    dtype: str,
    batch_size: int,
    settings: MeasureSettings,
) -> dict[str, Any]:
    """One interleaved run: everything at one model, dtype and batch size.

    Raises:
        ConfigError: If none of the runtimes can run the dense model.
    """
    spec = ModelSpec(name=name)
    target = torch_device(device)
    configs = {DENSE: PruneConfig(model=spec, method="hybrid")} | {m: schedule_of(m, spec) for m in methods}
    dense = create_dense(spec).eval()
    built = [dense, *(compress(dense, configs[method]).eval() for method in methods)]
    models = dict(zip(configs, cast_modules(built, DTYPES[dtype], target), strict=True))
    images = torch.randn(batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    load = os.getloadavg()[0]
    start = time.monotonic()
    ready, left_out = prepare_all(models, images, runtimes=runtimes, dtype=dtype, device=target)
    canary = next((key for key in ready if key.startswith(f"{DENSE}@")), None)
    if canary is None:
        raise ConfigError(f"No runtime here runs {name} in {dtype}: {'; '.join(left_out.values())}")
    subjects: dict[str, PreparedModel | Forward] = {**ready}
    # Packed weights may run by another library: in fp32 on CPUs of AMD by oneDNN, eager products by MKL.
    packing = [COMPILE] if f"{DENSE}@{COMPILE}" in ready else []
    for size, runtime in itertools.product(PEAK_SIZES[target.type], ["eager", *packing]):
        subjects[f"{MATMUL}{size}@{runtime}"] = _Product(size, runtime, dtype, target)
    if target.type == "cuda":
        subjects[COPY] = _Copy(COPY_BYTES, target)
    measured = measure_models(
        subjects, images, device=device, dtype=dtype, canary=canary, settings=settings, progress=_show
    )
    return {
        "model": name,
        "dtype": dtype,
        "batch_size": batch_size,
        "load_before": round(load, 2),
        "seconds": round(time.monotonic() - start, 1),
        "claimed_conversion": CLAIMED[target.type].get(batch_size),
        **figures(measured, configs, batch_size, {key: least_bytes(m, images, dtype) for key, m in models.items()}),
        "left_out": left_out,
        "measured": {key: asdict(one) for key, one in measured.items()},
    }


def prepare_all(
    models: Mapping[str, nn.Module], images: Tensor, *, runtimes: Sequence[str], dtype: str, device: torch.device
) -> tuple[dict[str, PreparedModel], dict[str, str]]:
    """Every model behind every runtime, as the eager reference and as its linear layers, called once.

    Keys are ``name@runtime``.

    Returns:
        What runs; and why the rest does not.
    """
    ready: dict[str, PreparedModel] = {}
    left_out: dict[str, str] = {}
    makers: dict[str, Callable[[], PreparedModel]] = {}
    packing = COMPILE if COMPILE in runtimes else runtimes[0]  # Packs weights, which products alone profit from.
    for key, model in models.items():
        makers |= {f"{key}@{name}": partial(prepared_model, model, name, dtype, device) for name in runtimes}
        if key in REFERENCED:
            makers[f"{key}@{EAGER_REFERENCE}"] = partial(_reference, model)
        makers[f"{key}@{LINEARS}"] = partial(prepared_model, LinearLayers(model), packing, dtype, device)
    with measuring(device):
        images = images.to(device=device, dtype=DTYPES[dtype])
        for number, (key, make) in enumerate(makers.items()):
            _show(number, len(makers), f"preparing {key}")
            try:
                prepared = make()
                prepared.forward(images)
            except (PrunefrontError, torch.OutOfMemoryError) as error:
                left_out[key] = " ".join(str(error).split())
            else:
                ready[key] = prepared
    return ready, left_out


def _reference(model: nn.Module) -> PreparedModel:
    return PreparedModel(Reference(model), model, "eager")


def least_bytes(model: nn.Module, images: Tensor, dtype: str) -> int:
    """Bytes that must cross the memory in one forward pass: weights and images once, the logits."""
    logits = len(images) * int(getattr(model, "num_classes", 0))
    return round(weights_mib(model) * 2**20) + (images.numel() + logits) * DTYPES[dtype].itemsize


def roofline_ms(macs: float, num_bytes: float, *, peak_gflops: float, gigabytes_per_s: float) -> float:
    """The least time that this many MACs and bytes take, when both overlap."""
    return max(2 * macs / peak_gflops, num_bytes / gigabytes_per_s) / 1e6


def figures(
    measured: Mapping[str, Measurement],
    configs: Mapping[str, PruneConfig],
    batch_size: int,
    num_bytes: Mapping[str, int],
) -> dict[str, Any]:
    """What is claimed, from the latencies by ``name@runtime``; roofline and bandwidth where a copy was measured."""
    sizes = {key: int(key.split("@")[1]) for key in measured if key.startswith(MATMUL)}
    peak = max(2 * size**3 / measured[key].median_ms / 1e6 for key, size in sizes.items())  # GFLOP/s
    # A copy reads and writes.
    bandwidth = 2 * COPY_BYTES / measured[COPY].median_ms / 1e6 if COPY in measured else None
    fastest = {key: found for key in configs if (found := _fastest(measured, key))}
    dense_ms = measured[fastest[DENSE]].median_ms
    dense_macs = prunefront.macs(configs[DENSE])
    rows = {}
    for key, runner in fastest.items():
        best = measured[runner]
        macs = prunefront.macs(configs[key])
        row = {
            "runtime": runner.partition("@")[2],
            "ms": best.median_ms,
            "iqr_ms": best.iqr_ms,
            "images_per_s": batch_size / best.median_ms * 1e3,
            "peak_memory_mib": best.peak_memory_mib,
            "macs": macs,
            "speedup": dense_ms / best.median_ms,
            "conversion": (dense_ms / best.median_ms) / (dense_macs / macs),
            "of_peak": 2 * macs * batch_size / best.median_ms / 1e6 / peak,
        }
        if bandwidth is not None:
            least_ms = roofline_ms(macs * batch_size, num_bytes[key], peak_gflops=peak, gigabytes_per_s=bandwidth)
            row |= {"roofline_ms": least_ms, "of_roofline": least_ms / best.median_ms}
        if measured.keys() >= {f"{DENSE}@{LINEARS}", f"{key}@{LINEARS}"}:
            faster = measured[f"{DENSE}@{LINEARS}"].median_ms / measured[f"{key}@{LINEARS}"].median_ms
            row["linears"] = faster / (linear_macs(configs[DENSE]) / linear_macs(configs[key]))
        if f"{key}@{EAGER_REFERENCE}" in measured:
            row["over_reference"] = measured[f"{key}@{EAGER_REFERENCE}"].median_ms / best.median_ms
        rows[key] = row
    return {
        "matmul_peak_gflops": peak,
        "bandwidth_gb_per_s": bandwidth,
        "rows": rows,
        "num_noisy": sum(one.state != "ok" for one in measured.values()),
    }


def linear_macs(config: PruneConfig) -> int:
    """MACs per image of what `LinearLayers` runs."""
    return sum(block[op] for block in prunefront.macs_detail(config).blocks for op in ("qkv", "proj", "mlp"))


def _fastest(measured: Mapping[str, Measurement], key: str) -> str | None:
    runners = [f"{key}@{name}" for name in RUNTIMES]
    return min((name for name in runners if name in measured), key=lambda name: measured[name].median_ms, default=None)


def table(run: dict[str, Any]) -> str:
    """A run as text."""
    claimed, bandwidth = run["claimed_conversion"], run["bandwidth_gb_per_s"]
    lines = [
        f"{run['model']} {run['dtype']} batch {run['batch_size']}: "
        f"matmul peak {run['matmul_peak_gflops']:.0f} GFLOP/s, "
        + (f"bandwidth {bandwidth:.0f} GB/s, " if bandwidth else "")
        + f"load before {run['load_before']}, {run['num_noisy']} noisy, {run['seconds']:.0f} s"
        + (f"; claimed conversion {claimed}" if claimed else ""),
        f"  {'':12} {'runtime':12} {'ms':>9} {'IQR':>6} {'images/s':>9} {'MACs':>7} {'speed-up':>8} {'convers.':>8} "
        f"{'linears':>7} {'of peak':>7} {'of roof':>7} {'over ref':>8} {'MiB':>6}",
    ]
    for key, row in run["rows"].items():
        over = f"{row['over_reference']:.2f}" if "over_reference" in row else ""
        linears = f"{row['linears']:.3f}" if "linears" in row else ""
        roof = f"{row['of_roofline']:.2f}" if "of_roofline" in row else ""
        memory = "" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}"
        lines.append(
            f"  {key:12} {row['runtime']:12} {row['ms']:9.2f} {row['iqr_ms'] / row['ms']:6.1%} "
            f"{row['images_per_s']:9.1f} {row['macs'] / 1e9:6.2f}G {row['speedup']:8.3f} {row['conversion']:8.3f} "
            f"{linears:>7} {row['of_peak']:7.2f} {roof:>7} {over:>8} {memory:>6}"
        )
    reasons: dict[tuple[str, str], list[str]] = {}
    for subject, reason in run["left_out"].items():
        key, _, runtime = subject.partition("@")
        reasons.setdefault((runtime, reason), []).append(key)
    lines += [f"  left out: {runtime} of {', '.join(keys)}: {reason}" for (runtime, reason), keys in reasons.items()]
    return "\n".join(lines)


class LinearLayers(nn.Module):
    """The linear layers of a model's blocks, with norms and activations, at its token counts; no attention.

    Every token keeps its values, and reductions cut tokens off.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.blocks = model.blocks
        tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        plan = getattr(model, "_blocks_plan", None)
        self.counts = [(tokens, tokens)] * len(self.blocks)
        if plan is not None:
            self.counts = [(block.tokens_in, block.tokens_out) for block in plan]
        values = torch.randn(tokens, model.embed_dim, generator=torch.Generator().manual_seed(0))
        self.tokens = nn.Buffer(values.to(next(model.parameters())))

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens + images[:, 0, 0, :1, None]  # Of the images: constants would be computed while compiling.
        for module, (attended, left) in zip(self.blocks, self.counts, strict=True):
            block: Any = module
            x = x[:, :attended]
            values = block.attn.qkv(block.norm1(x))[..., -x.shape[-1] :]
            x = (x + block.attn.proj(values))[:, :left]
            x = x + block.mlp(block.norm2(x))
        return x


class _Product:
    """A square matrix product behind a runtime; the images it is called with do not matter."""

    def __init__(self, size: int, runtime: str, dtype: str, device: torch.device) -> None:
        self._input = torch.randn(size, size, dtype=DTYPES[dtype], device=device)
        self._forward = prepare(nn.Linear(size, size, bias=False), runtime, dtype, device)

    def __call__(self, images: Tensor) -> Any:
        return self._forward(self._input)


class _Copy:
    """A copy of bytes within the device's memory; the images it is called with do not matter."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._source, self._target = torch.zeros(2, num_bytes, dtype=torch.uint8, device=device)

    def __call__(self, images: Tensor) -> Tensor:
        return self._target.copy_(self._source)


def _show(done: float, total: float, message: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{done / total:4.0%} {message}", end="" if done < total else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
