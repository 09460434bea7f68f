"""The benchmark of inference: its reference gives the library's logits, its figures are those of hand computation."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import prunefront
from benchmarks import inference
from benchmarks.inference import (
    COPY_BYTES,
    METHODS,
    MODELS,
    LinearLayers,
    figures,
    least_bytes,
    linear_macs,
    measure,
    prepare_all,
    roofline_ms,
    schedule_of,
    table,
)
from benchmarks.reference import REFERENCED, Reference
from latency_tables.device import DeviceInfo
from latency_tables.measure import Measurement, MeasureSettings
from prunefront.compress import compress, create_dense
from prunefront.config import ModelSpec, PruneConfig, Site
from prunefront.errors import ConfigError
from prunefront.runtimes import RUNTIMES

CPU = torch.device("cpu")
ONE = Measurement(
    median_ms=1.0, iqr_ms=0.1, p10_ms=1, p90_ms=1, p99_ms=1, num_samples=9, canary_ms=1, speedup=1,
    peak_memory_mib=50.0, state="ok", reason=None,
)  # fmt: skip
SMALL = ModelSpec(name="deit_tiny_patch16_224", kwargs={"embed_dim": 48, "num_heads": 3}, num_classes=7)


@pytest.mark.parametrize("method", REFERENCED)
def test_the_reference_gives_the_librarys_logits(method: str) -> None:
    torch.manual_seed(3)
    config = schedule_of(method, ModelSpec(name="deit_tiny_patch16_224"))
    model = compress(create_dense(SMALL), config.model_copy(update={"model": SMALL})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(Reference(model)(images), model(images), atol=2e-3, rtol=2e-3)


def test_figures_are_of_the_fastest_runtimes() -> None:
    ms = {
        "dense@eager": 40.0, "dense@compile": 30.0, "evit@eager": 24.0, "evit@compile": 25.0, "evit@reference": 36.0,
        "dense@linears": 20.0, "evit@linears": 16.0,
        "matmul@1024@eager": 2**31 / 1e6 / 100, "matmul@1024@compile": 2**31 / 1e6 / 200,
        "matmul@2048@eager": 2**34 / 1e6 / 100,
    }  # fmt: skip
    spec = ModelSpec(name="deit_small_patch16_224")
    configs = {"dense": PruneConfig(model=spec, method="hybrid"), "evit": schedule_of("evit", spec)}
    run = figures({key: replace(ONE, median_ms=value) for key, value in ms.items()}, configs, 2, {})
    assert run["matmul_peak_gflops"] == pytest.approx(200)
    row = run["rows"]["evit"]
    assert row["runtime"] == "eager"
    assert row["speedup"] == pytest.approx(30 / 24)
    ratio = prunefront.macs(configs["dense"]) / prunefront.macs(configs["evit"])
    assert row["conversion"] == pytest.approx(30 / 24 / ratio)
    assert row["over_reference"] == pytest.approx(1.5)
    linears = linear_macs(configs["dense"]) / linear_macs(configs["evit"])
    assert row["linears"] == pytest.approx(20 / 16 / linears)
    assert row["images_per_s"] == pytest.approx(2 / 0.024)
    assert row["of_peak"] == pytest.approx(2 * prunefront.macs(configs["evit"]) * 2 / 0.024 / 200e9)
    assert "over_reference" not in run["rows"]["dense"]
    assert run["bandwidth_gb_per_s"] is None and "of_roofline" not in row
    text = table(described(run) | {"claimed_conversion": 0.97})
    assert "claimed conversion 0.97" in text and "compile" in text


def described(run: dict[str, Any]) -> dict[str, Any]:
    """A run with the fields that `measure` adds."""
    about = {"model": "m", "dtype": "fp32", "batch_size": 16, "load_before": 0.0, "seconds": 1.0}
    return about | {"claimed_conversion": None, "left_out": {}} | run


def test_the_roofline_is_the_slower_of_computing_and_of_moving_bytes() -> None:
    # 2 GFLOP at 1,000 GFLOP/s take 2 ms; 300 MB at 100 GB/s take 3 ms, at 200 GB/s 1.5 ms.
    assert roofline_ms(1e9, 3e8, peak_gflops=1000, gigabytes_per_s=100) == pytest.approx(3.0)
    assert roofline_ms(1e9, 3e8, peak_gflops=1000, gigabytes_per_s=200) == pytest.approx(2.0)


def test_of_roofline_uses_the_peak_and_the_bandwidth_of_the_same_run() -> None:
    spec = ModelSpec(name="deit_small_patch16_224")
    configs = {"dense": PruneConfig(model=spec, method="hybrid"), "evit": schedule_of("evit", spec)}
    ms = {
        "dense@eager": 1.0, "evit@eager": 0.5,
        "matmul@4096@eager": 2 * 4096**3 / 1e6 / 400_000,  # 400 TFLOP/s
        "copy": 2 * COPY_BYTES / 1e6 / 2000,  # read and written at 2 TB/s
    }  # fmt: skip
    measured = {key: replace(ONE, median_ms=value) for key, value in ms.items()}
    run = figures(measured, configs, 1, {"dense": 44_000_000, "evit": 44_000_000})
    assert run["matmul_peak_gflops"] == pytest.approx(400_000)
    assert run["bandwidth_gb_per_s"] == pytest.approx(2000)
    # At batch 1 the weights (22 µs) take about as long as the products (23 µs of the dense model, 15 of EViT's).
    dense, evit = run["rows"]["dense"], run["rows"]["evit"]
    assert dense["roofline_ms"] == pytest.approx(2 * prunefront.macs(configs["dense"]) / 400e12 * 1e3)
    assert dense["of_roofline"] == pytest.approx(dense["roofline_ms"])
    assert evit["roofline_ms"] == pytest.approx(0.022)
    assert evit["of_roofline"] == pytest.approx(0.044)
    assert "0.04" in table(described(run)) and "bandwidth 2000 GB/s" in table(described(run))


def test_the_least_bytes_are_weights_images_and_logits() -> None:
    model = create_dense(SMALL).to(torch.bfloat16)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert least_bytes(model, torch.zeros(2, 3, 224, 224), "bf16") == 2 * (weights + 2 * 3 * 224 * 224 + 2 * 7)


def test_what_a_runtime_cannot_run_is_left_out_with_the_reason() -> None:
    config = schedule_of("evit", ModelSpec(name="deit_tiny_patch16_224")).model_copy(update={"model": SMALL})
    dense = create_dense(SMALL).to(torch.bfloat16).eval()
    models = {"dense": dense, "evit": compress(dense, config).eval()}
    ready, left_out = prepare_all(
        models, torch.zeros(1, 3, 224, 224), runtimes=("eager", "onnxruntime", "cudagraph"), dtype="bf16", device=CPU
    )
    assert list(ready) == ["dense@eager", "dense@linears", "evit@eager", "evit@reference", "evit@linears"]
    assert left_out["evit@onnxruntime"].startswith("ONNX Runtime cannot run bf16 models")
    assert "needs a CUDA device" in left_out["dense@cudagraph"]
    run = figures(
        {"dense@eager": ONE, "matmul@8@eager": ONE}, {"dense": PruneConfig(model=SMALL, method="hybrid")}, 1, {}
    )
    text = table(described(run) | {"left_out": left_out})
    assert "left out: onnxruntime of dense, evit: ONNX Runtime cannot run bf16 models" in text


def test_linear_layers_alone_work_at_the_counts_of_the_schedule() -> None:
    dense = create_dense(SMALL).eval()
    config = PruneConfig(model=SMALL, method="evit", sites=(Site(block=3, op="prune", keep_ratio=0.5),))
    linears = LinearLayers(compress(dense, config).eval())
    # A block has 4 width² weights in its attention, 8 width² in its MLP; block 3 keeps 98 of 196 patches for its MLP.
    assert linear_macs(PruneConfig(model=SMALL, method="hybrid")) == 12 * 197 * 12 * 48**2
    assert linear_macs(config) == (3 * 197 * 12 + 197 * 4 + 99 * 8 + 8 * 99 * 12) * 48**2
    with torch.inference_mode():
        assert linears(torch.zeros(2, 3, 224, 224)).shape == (2, 99, 48)


def test_a_method_that_no_runtime_runs_has_no_row() -> None:
    configs = {"dense": PruneConfig(model=SMALL, method="hybrid"), "evit": PruneConfig(model=SMALL, method="evit")}
    measured = {"dense@eager": ONE, "evit@reference": ONE, "matmul@8@eager": ONE}
    assert list(figures(measured, configs, 1, {})["rows"]) == ["dense"]


@pytest.mark.parametrize("method", ["spvit", "trilevel"])
def test_the_reference_refuses_methods_that_it_would_run_as_dense(method: str) -> None:
    config = schedule_of(method, ModelSpec(name="deit_tiny_patch16_224"))
    model = compress(create_dense(SMALL), config.model_copy(update={"model": SMALL}))
    with pytest.raises(ConfigError, match=f"got a model of {method}"):
        Reference(model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_schedule_with_fixed_counts_on_every_model(method: str, name: str) -> None:
    spec = ModelSpec(name=name)
    config = schedule_of(method, spec)
    assert config.model == spec and config.sites
    assert prunefront.macs(config) < prunefront.macs(PruneConfig(model=spec, method="hybrid"))
    assert config.options.get("mode", "fixed") == "fixed"


@pytest.mark.parametrize(
    ("device", "runtimes", "dtypes", "batch_sizes"),
    [
        (DeviceInfo(kind="cpu", name="Abacus", threads=2), {"eager", "compile", "onnxruntime"}, {"fp32", "bf16"},
         {1, 8, 16}),
        (DeviceInfo(kind="cuda", name="Loom"), set(RUNTIMES), {"fp32", "bf16", "fp16"}, {1, 8, 16, 64, 256}),
    ],
    ids=["cpu", "cuda"],
)  # fmt: skip
def test_by_default_every_model_method_runtime_dtype_and_batch_size_is_measured(
    device: DeviceInfo, runtimes: set[str], dtypes: set[str], batch_sizes: set[int],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    calls: list[dict[str, Any]] = []

    def noted(name: str, methods: list[str], **options: Any) -> dict[str, Any]:
        calls.append({"model": name, "methods": methods, **options})
        return {"model": name, "dtype": options["dtype"], "batch_size": options["batch_size"]}

    monkeypatch.setattr(inference, "measure", noted)
    monkeypatch.setattr(inference, "describe_device", lambda name: device)
    monkeypatch.setattr("sys.argv", ["inference.py", "--json"])
    assert inference.main() == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 3 * len(dtypes) * len(batch_sizes) == len(calls)
    assert {call["model"] for call in calls} == {f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")}
    assert {call["dtype"] for call in calls} == dtypes
    assert {call["batch_size"] for call in calls} == batch_sizes
    assert all(set(call["runtimes"]) == runtimes for call in calls)
    methods = {"evit", "ppt", "tome", "diffrate", "dynamicvit", "spvit", "trilevel", "hybrid"}
    assert all(set(call["methods"]) == methods for call in calls)


def test_options_narrow_the_benchmark_to_a_part_which_alone_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "inference.json"

    def noted(name: str, methods: list[str], **options: Any) -> dict[str, Any]:
        run = {"model": name, "dtype": options["dtype"], "batch_size": options["batch_size"], "methods": methods}
        return described(run | {"matmul_peak_gflops": 1.0, "bandwidth_gb_per_s": None, "rows": {}, "num_noisy": 0})

    monkeypatch.setattr(inference, "measure", noted)
    part = ["--models", "deit_tiny_patch16_224", "--dtypes", "fp32", "--out", str(out)]
    for line in (["--batch-sizes", "1", "8"], ["--batch-sizes", "8", "--methods", "evit"]):
        monkeypatch.setattr("sys.argv", ["inference.py", *part, *line])
        assert inference.main() == 0
    runs = json.loads(out.read_text())["runs"]
    assert [(run["batch_size"], len(run["methods"])) for run in runs] == [(1, 8), (8, 1)]


def test_a_run_measures_the_dense_model_and_each_method_with_their_weights() -> None:
    settings = MeasureSettings(warmup_rounds=1, min_rounds=2, max_rounds=2, target_s=0.0, attempts=1)
    run = measure(
        "deit_tiny_patch16_224", ["evit"], device="cpu", runtimes=["eager"], dtype="fp32", batch_size=1,
        settings=settings,
    )  # fmt: skip
    assert list(run["rows"]) == ["dense", "evit"]
    assert set(run["measured"]) == {
        "dense@eager", "dense@linears", "evit@eager", "evit@linears", "evit@reference",
        "matmul@1024@eager", "matmul@2048@eager",
    }  # fmt: skip
    assert run["rows"]["dense"]["linears"] == 1.0
    for row in run["rows"].values():
        assert row["peak_memory_mib"] is None or row["peak_memory_mib"] > 5.7e6 * 4 / 2**20  # DeiT-T's parameters
    assert run["left_out"] == {} and run["claimed_conversion"] == 0.92
    assert "claimed conversion 0.92" in table(run)
