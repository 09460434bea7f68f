"""What runs a forward pass: casting, compiling with packed weights, and what is refused."""

from typing import Any

import pytest
import torch
from torch import nn

import prunefront
from prunefront.errors import ConfigError, UnknownNameError
from prunefront.runtimes import CompiledForward, cast_modules, fastest_attention, prepare

CPU = torch.device("cpu")


def switches() -> tuple[bool, bool]:
    """Whether flash kernels are on, and products of attention in reduced precision."""
    backends: Any = torch.backends.cuda
    return backends.flash_sdp_enabled(), backends.fp16_bf16_reduction_math_sdp_allowed()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attention_kernel_is_chosen_for_the_call_alone_and_hardly_moves_the_result(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 33, 16).to(dtype)
    mask = torch.ones(2, 1, 1, 33, dtype=torch.bool)
    mask[0, :, :, 20:] = False
    before = switches()
    with fastest_attention(q):
        if dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported():
            assert switches() == (False, True)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert switches() == before
    logits = (q.double() @ k.double().transpose(-2, -1)) / 4
    exact = logits.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v.double()
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2  # bf16 has 8 bits, and values reach 4
    torch.testing.assert_close(attended.double(), exact, atol=tolerance, rtol=0)


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
        with pytest.raises(Exception, match="(?i)recompil"):
            compiled(torch.randn(5, 16))
        linear.weight.zero_()
        torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)


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
