"""What runs a forward pass: casting, compiling with packed weights, ONNX sessions, and what is refused."""

import platform
import statistics
import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_cpp_code

import prunefront
from latency_tables.measure import MeasureSettings, measure_models
from prunefront import runtimes
from prunefront.compress import compress
from prunefront.config import Runtime
from prunefront.errors import ConfigError, MissingExtraError, UnknownNameError
from prunefront.ops.dot_product import dot_product_attention
from prunefront.runtimes import (
    DTYPES,
    RUNTIMES,
    CompiledForward,
    cast_modules,
    onnx_session,
    prepare,
)
from tests.unit.library.models import build, schedules, small_spec

CPU = torch.device("cpu")


def test_unknown_runtimes_and_dtypes_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="Unknown runtime 'tensorrt'.*imported as latency tables"):
        prepare(nn.Linear(2, 2), "tensorrt", "fp32", CPU)
    with pytest.raises(UnknownNameError, match="Unknown dtype 'int8'.*bf16, fp16, fp32"):
        prepare(nn.Linear(2, 2), "eager", "int8", CPU)


def test_cuda_graphs_are_refused_on_the_cpu() -> None:
    with pytest.raises(ConfigError, match="'cudagraph' needs a CUDA device, but got cpu"):
        prepare(nn.Linear(2, 2), "cudagraph", "fp32", CPU)


def test_a_machine_without_a_compiler_says_what_to_install() -> None:
    options: dict[str, Any] = {"cpp.cxx": (None, "/nowhere/g++"), "fx_graph_cache": False}
    with torch._inductor.config.patch(options), torch.inference_mode():
        forward = prepare(nn.Sequential(nn.Linear(3, 5), nn.GELU()), "compile", "fp32", CPU)
        with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler .*install it, or use the runtime eager"):
            forward(torch.ones(2, 3))


def test_a_model_of_another_dtype_is_copied_and_the_callers_stays() -> None:
    model = nn.Linear(2, 2)
    assert prepare(model, "eager", "bf16", CPU)(torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model.weight.dtype == torch.float32
    ready = prepare(model, "eager", "fp32", CPU)
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(ready(torch.ones(1, 2)), model.bias.detach().unsqueeze(0))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
# timm's own attention, a bias by size, a boolean mask, a packed batch.
@pytest.mark.parametrize("name", [None, "tome", "trilevel-attention", "spvit-adaptive"])
def test_the_attention_kernel_is_chosen_for_the_call_alone(dtype: str, name: str | None) -> None:
    model: Any = build(small_spec()) if name is None else prunefront.create_model(schedules()[name])
    model = model.to(DTYPES[dtype]).eval()
    fused: list[bool] = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda *_, attn=block.attn: fused.append(attn.fused_attn))
    images = torch.randn(2, 3, 48, 48, dtype=DTYPES[dtype])
    with torch.inference_mode():
        logits = prepare(model, "eager", dtype, CPU)(images)
        assert fused == [dtype == "fp32" or torch.cpu._is_amx_tile_supported()] * 4
        assert all(block.attn.fused_attn for block in model.blocks)
        if name is None:  # No tokens to choose otherwise.
            torch.testing.assert_close(logits, model(images), atol=1e-6 if dtype == "fp32" else 0.02, rtol=0)
    assert logits.isfinite().all()


@pytest.mark.parametrize("bias", ["none", "sizes", "mask"])
def test_attention_as_two_products_is_torchs(bias: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 33, 16, dtype=torch.float64)
    mask = torch.rand(2, 1, 33, 33) > 0.5
    mask |= torch.eye(33, dtype=torch.bool)
    given = {"none": None, "sizes": torch.randn(2, 1, 1, 33, dtype=torch.float64), "mask": mask}[bias]
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=given)
    torch.testing.assert_close(dot_product_attention(q, k, v, bias=given, fused=False), expected)
    kept = dot_product_attention(q, k, torch.ones_like(v), bias=given, dropout=0.5, fused=False)
    assert (kept.std() > 0.05) and kept.mean() == pytest.approx(1.0, abs=0.1)  # What is left is scaled up.


def test_copies_of_models_that_share_weights_share_them_too() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    casted = cast_modules([first, second], torch.bfloat16, CPU)
    assert casted[0].weight is casted[1].weight
    assert casted[0].weight.dtype == torch.bfloat16


@pytest.mark.compile
@pytest.mark.slow
def test_a_compiled_forward_packs_its_weights_and_refuses_another_shape() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 16)
    model = nn.Sequential(linear, nn.GELU()).eval()
    compiled = CompiledForward(model, CPU)
    x = torch.randn(4, 16)
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(ConfigError, match="compiled for images .4, 16. in torch.float32, but got .5, 16."):
            compiled(torch.randn(5, 16))
        linear.weight.zero_()
        torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize(
    ("vendor", "library", "other"),
    [("AuthenticAMD", "cpu__linear_pointwise", "cpu__mkl_linear"), ("GenuineIntel", "cpu__mkl_linear", "cpu__linear")],
)
def test_linear_layers_of_compiled_models_run_by_the_library_that_is_fastest_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, vendor: str, library: str, other: str
) -> None:
    monkeypatch.setattr(runtimes, "cpu_info", {"vendor_id": vendor}.__getitem__)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 64, bias=False)).eval()
    x = torch.randn(8, 64)
    with torch.inference_mode():
        logits, code = run_and_get_cpp_code(CompiledForward(model, CPU), x)
        torch.testing.assert_close(logits, model(x), atol=1e-5, rtol=1e-5)
    assert library in code
    assert other not in code


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("has_avx512", [True, False])
def test_gelu_of_compiled_models_is_a_part_of_the_linear_layer_only_where_that_is_fast(
    monkeypatch: pytest.MonkeyPatch, has_avx512: bool
) -> None:
    monkeypatch.setattr(runtimes, "cpu_info", {"vendor_id": "AuthenticAMD"}.__getitem__)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has_avx512)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 80), nn.GELU(), nn.Linear(80, 48)).eval()
    x = torch.randn(7, 48)
    with torch.inference_mode():
        logits, code = run_and_get_cpp_code(CompiledForward(model, CPU), x)
        torch.testing.assert_close(logits, model(x), atol=1e-5, rtol=1e-5)
    assert ('"gelu"' in code) == has_avx512
    assert (".erf()" in code) == (not has_avx512)
    assert torch._inductor.config.post_grad_custom_pre_pass is None


def test_a_model_whose_counts_depend_on_the_images_is_not_compiled() -> None:
    model = prunefront.create_model(
        {
            "format": "prunefront/config/1",
            "model": {"name": "digit_vit_patch6_48"},
            "method": "spvit",
            "sites": [{"block": 1, "op": "select", "cumulative_keep_ratio": 0.5}],
        },
        pretrained=False,
    ).eval()
    with torch.inference_mode(), pytest.raises(ConfigError, match="one graph, since its token counts depend on"):
        CompiledForward(model, CPU)(torch.randn(2, 3, 48, 48))


@pytest.mark.gpu
def test_a_cuda_graph_gives_the_same_result_and_refuses_another_shape() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda")
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU()).eval().to(device)
    graphed = prepare(model, "cudagraph", "fp32", device)
    with torch.inference_mode():
        for _ in range(2):
            x = torch.randn(4, 16, device=device)
            torch.testing.assert_close(graphed(x), model(x), atol=1e-5, rtol=1e-5)
        with pytest.raises(ConfigError, match="recorded for images"):
            graphed(torch.randn(5, 16, device=device))


def test_documents_name_the_runtimes_that_there_are() -> None:
    assert set(get_args(Runtime)) == set(RUNTIMES)


def test_onnxruntime_gives_the_models_logits_and_refuses_another_shape() -> None:
    model = compress(build(schedules()["hybrid"].model), schedules()["hybrid"])
    ready = prepare(model, "onnxruntime", "fp32", CPU)
    with torch.inference_mode():
        for seed in range(2):
            images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(ready(images), model(images), atol=1e-5, rtol=1e-4)
        # A view whose pixels do not lie in a row is read as what it means.
        turned = images.transpose(2, 3)
        torch.testing.assert_close(ready(turned), model(turned), atol=1e-5, rtol=1e-4)
        with pytest.raises(ConfigError, match=r"made for images \(2, 3, 48, 48\).*got \(3, 3, 48, 48\)"):
            ready(torch.randn(3, 3, 48, 48))


def test_onnxruntime_runs_half_precision_on_the_cpu_but_not_bf16() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 16)
    x = torch.randn(4, 16)
    with torch.inference_mode():
        got = prepare(linear, "onnxruntime", "fp16", CPU)(x.half())
        torch.testing.assert_close(got.float(), linear(x), atol=1e-2, rtol=1e-2)
    assert got.dtype == torch.float16
    with pytest.raises(ConfigError, match="ONNX Runtime cannot run bf16 models. Choose fp32 or fp16"):
        prepare(linear, "onnxruntime", "bf16", CPU)


def test_onnxruntime_is_refused_without_its_package_or_without_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'onnxruntime' exports a torch module"):
        prepare(torch.sigmoid, "onnxruntime", "fp32", CPU)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'prunefront\[export\]'"):
        prepare(nn.Linear(2, 2), "onnxruntime", "fp32", CPU)


def test_onnxruntime_on_a_gpu_needs_the_build_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingExtraError, match="built without CUDA.*pip install onnxruntime-gpu"):
        onnx_session("model.onnx", torch.device("cuda"))


def test_models_are_measured_under_onnxruntime_with_their_weights_as_memory() -> None:
    config = schedules()["tome"]
    dense = build(config.model)
    settings = MeasureSettings(warmup_rounds=1, min_rounds=2, max_rounds=2, target_s=0.0, attempts=1)
    measured = measure_models(
        {"dense": dense, "tome": compress(dense, config)},
        torch.randn(2, 3, 48, 48),
        device="cpu",
        runtime="onnxruntime",
        canary="dense",
        settings=settings,
    )
    weights_mib = sum(tensor.nbytes for tensor in (*dense.parameters(), *dense.buffers())) / 2**20
    for one in measured.values():
        assert one.num_samples == 2
        assert one.peak_memory_mib is None or one.peak_memory_mib >= weights_mib


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep freed memory as they like")
def test_a_prepared_model_finds_the_memory_of_its_last_run_mapped() -> None:
    # In a process of its own: from a heap that other tests used, calls move to memory that these have just freed.
    ran = subprocess.run([sys.executable, "-c", _PAGE_FAULTS], check=True, capture_output=True, text=True)
    mapped = [int(faults) for faults in ran.stdout.split()]
    assert len(mapped) == 5
    assert statistics.median(mapped) < 100


_PAGE_FAULTS = """
import resource
import torch
from torch import nn
from prunefront.runtimes import prepare

class Activations(nn.Module):
    # Has four buffers of 24 MiB in use at once, 24576 pages: more than glibc keeps by default.
    def forward(self, x):
        return float(sum(buffer[-1] for buffer in [x + number for number in range(4)]))

forward = prepare(Activations(), "eager", "fp32", torch.device("cpu"))
x = torch.zeros(6 * 2**20)
with torch.inference_mode():
    for _ in range(3):
        forward(x)
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        forward(x)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
