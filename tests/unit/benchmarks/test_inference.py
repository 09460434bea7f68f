"""The benchmark of inference: its reference gives the library's logits, its figures are those of hand computation."""

from dataclasses import replace

import pytest
import torch

import prunefront
from benchmarks.inference import METHODS, figures, schedule_of, table
from benchmarks.reference import Reference
from latency_tables.measure import Measurement
from prunefront.compress import compress, create_dense
from prunefront.config import ModelSpec, PruneConfig

SMALL = ModelSpec(name="deit_tiny_patch16_224", kwargs={"embed_dim": 48, "num_heads": 3}, num_classes=7)


@pytest.mark.parametrize("method", METHODS)
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
    one = Measurement(
        median_ms=1.0, iqr_ms=0.1, p10_ms=1, p90_ms=1, p99_ms=1, num_samples=9, canary_ms=1, speedup=1,
        peak_memory_mib=50.0, state="ok", reason=None,
    )  # fmt: skip
    ms = {
        "dense@eager": 40.0, "dense@compile": 30.0, "evit@eager": 24.0, "evit@compile": 25.0, "evit@reference": 36.0,
        "matmul@1024": 2**31 / 1e6 / 200, "matmul@2048": 2**34 / 1e6 / 100,
    }  # fmt: skip
    spec = ModelSpec(name="deit_small_patch16_224")
    configs = {"dense": PruneConfig(model=spec, method="hybrid"), "evit": schedule_of("evit", spec)}
    run = figures({key: replace(one, median_ms=value) for key, value in ms.items()}, configs, batch_size=2)
    assert run["matmul_peak_gflops"] == pytest.approx(200)
    row = run["rows"]["evit"]
    assert row["runtime"] == "eager"
    assert row["speedup"] == pytest.approx(30 / 24)
    ratio = prunefront.macs(configs["dense"]) / prunefront.macs(configs["evit"])
    assert row["conversion"] == pytest.approx(30 / 24 / ratio)
    assert row["over_reference"] == pytest.approx(1.5)
    assert row["images_per_s"] == pytest.approx(2 / 0.024)
    assert row["of_peak"] == pytest.approx(2 * prunefront.macs(configs["evit"]) * 2 / 0.024 / 200e9)
    assert "over_reference" not in run["rows"]["dense"]
    text = table({"model": "m", "dtype": "fp32", "batch_size": 16, "load_before": 0.0, "seconds": 1.0, **run})
    assert "claimed conversion 0.97" in text and "compile" in text
