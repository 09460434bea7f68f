"""Ragged batches: packed, padded, or image by image, a model computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen

import prunefront
from prunefront.ops import packing
from prunefront.ops.packing import Packing
from prunefront.ops.tokens import NO_PLACE, Tokens
from tests.unit.library import models

SPECS = {
    "vit": models.small_spec(),
    "distilled": models.small_spec("deit_tiny_distilled_patch16_224"),
    "average": models.small_spec(global_pool="avg"),
    "average-and-largest": models.small_spec(global_pool="avgmax"),
    "attention-pooling": models.small_spec("vit_base_patch16_siglip_224", mlp_ratio=2),
    "q-and-k-norm": models.small_spec(qk_norm=True, init_values=0.5),
    "lvvit": models.small_spec("lvvit_s", stem_width=8),
    "eva02": models.small_spec("eva02_tiny_patch14_224"),
    "dinov3": models.small_spec("vit_small_patch16_dinov3"),
    "rope-mixed": models.small_spec("vit_small_patch16_rope_mixed_224"),
    "perception-encoder": models.small_spec("vit_pe_core_tiny_patch16_384"),
    "grouped-keys": models.small_spec("vit_base_patch16_sapiens2", mlp_ratio=2, num_kv_heads=1),
}
SITES = [{"block": block, "op": "select", "cumulative_keep_ratio": 0.5} for block in (1, 2)]
# Patches that four images keep: all, none from the first or the second site on, and one.
KEPT = (torch.tensor([36, 20, 0, 7]), torch.tensor([30, 0, 0, 1]))


class Keep(nn.Module):
    """A selector that keeps so many patches of each image, the first ones."""

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        self.counts = counts

    def forward(self, x: Tensor, policy: Tensor | None = None) -> tuple[Tensor, Tensor]:
        keep = (torch.arange(x.shape[1]) < self.counts[:, None]).to(x.dtype)
        scores = torch.stack((keep, 1 - keep), dim=-1)
        return scores, 0.25 + 0.5 * scores


def keeping(spec: Any, kept: tuple[Tensor, ...] = KEPT) -> Any:
    """A model whose images keep ``kept`` patches at the sites."""
    model: Any = prunefront.compress(models.build(spec), models.config("spvit", SITES, spec)).eval()
    model.score_predictor = nn.ModuleList(Keep(counts) for counts in kept)
    return model


def padded(monkeypatch: pytest.MonkeyPatch, model: Any, images: Tensor, **kwargs: Any) -> Any:
    """What the model gives when batches stay padded and masked."""
    with monkeypatch.context() as patch:
        patch.setattr(Tokens, "packed", lambda tokens: tokens)
        return model(images, **kwargs)


def ragged() -> tuple[Packing, list[Tensor]]:
    """A packing of images of 3, 1 and 5 tokens, and queries, keys and values (1, H, T, D) for it."""
    lengths = torch.tensor([3, 1, 5])
    qkv = torch.randn(1, 9, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    return Packing.of(torch.arange(5) < lengths[:, None]), list(qkv.permute(2, 0, 3, 1, 4).unbind(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_packed_padded_and_lone_images_have_the_same_logits(
    spec: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = keeping(spec).to(dtype), models.images(4).to(dtype)
    worked_on: list[torch.Size] = []
    model.blocks[3].mlp.register_forward_pre_hook(lambda _, args: worked_on.append(args[0].shape))
    with torch.inference_mode():
        packed_logits = model(images)
        padded_logits = padded(monkeypatch, model, images)
        lone = [keeping(spec, tuple(counts[i : i + 1] for counts in KEPT)).to(dtype) for i in range(4)]
        lone_logits = torch.cat([alone(images[i : i + 1]) for i, alone in enumerate(lone)])
    fixed = model.num_prefix_tokens + 2  # and two packages
    assert [shape[:2] for shape in worked_on] == [(1, 31 + 4 * fixed), (4, 30 + fixed)]
    assert packed_logits.isfinite().all()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(packed_logits, padded_logits, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(packed_logits, lone_logits, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("mode", ["adaptive", "bucketed"])
def test_an_image_has_the_same_logits_in_any_batch(mode: str) -> None:
    model, images = models.selecting("spvit", mode=mode, bucket=4), models.images(8)
    with torch.inference_mode():
        together, aux = model(images, return_aux=True)
        alone = torch.cat([model(image[None]) for image in images])
    assert len(aux.sites[0].values["counts"].unique()) > 1, "the images should differ for this test"
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_what_a_packed_pass_tells_of_its_tokens_is_what_a_padded_one_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lvvit", "rope-mixed"):
        model, images = keeping(SPECS[name]), models.images(4)
        with torch.no_grad():
            _, aux = model(images, return_aux=True)
            _, expected = padded(monkeypatch, model, images, return_aux=True)
        assert torch.equal(aux.present, expected.present)
        assert torch.equal(aux.origin, expected.origin)
        torch.testing.assert_close(aux.tokens[aux.present], expected.tokens[aux.present], atol=1e-5, rtol=1e-5)
        assert (aux.tokens[~aux.present] == 0).all()
        torch.testing.assert_close(aux.class_tokens, expected.class_tokens, atol=1e-5, rtol=1e-5)
        assert torch.equal(torch.stack([site.values["counts"] for site in aux.sites]), torch.stack(KEPT))
        if name == "lvvit":
            assert torch.equal(aux.token_places, expected.token_places)


def test_images_that_keep_alike_are_neither_padded_nor_packed() -> None:
    model = keeping(SPECS["vit"], (torch.tensor([20] * 4), torch.tensor([9] * 4)))
    worked_on: list[torch.Size] = []
    model.blocks[3].mlp.register_forward_pre_hook(lambda _, args: worked_on.append(args[0].shape))
    with torch.inference_mode():
        _, aux = model(models.images(4), return_aux=True)
    assert aux.present is None
    assert worked_on == [(4, 1 + 9 + 2, 48)]


def test_packages_are_pooled_where_no_patch_is_left() -> None:
    model = keeping(SPECS["average"], (torch.tensor([5]), torch.tensor([0])))
    with torch.inference_mode():
        logits, aux = model(models.images(1), return_aux=True)
        assert aux.tokens.shape[1] == 3
        expected = model.head(model.fc_norm(aux.tokens[:, 1:].mean(dim=1)))
    torch.testing.assert_close(logits, expected)


def test_gradients_are_those_of_the_padded_form(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = keeping(SPECS["vit"]), models.images(4)
    gradients = []
    for run in (model, lambda batch: padded(monkeypatch, model, batch)):
        model.zero_grad()
        run(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_packing_lays_images_end_to_end_and_back() -> None:
    nothing = -1
    places = torch.tensor([[nothing, 4, 0, nothing], [nothing, 2, 9, 7]])
    present = torch.tensor([[True, True, False, True], [True, True, True, True]])
    tokens = Tokens(x=places[..., None].float(), num_prefix=1, places=places, present=present)
    packed = tokens.packed()
    assert packed.places is not None and packed.places.tolist() == [[nothing, 4, nothing, nothing, 2, 9, 7]]
    assert packed.x.flatten().tolist() == [-1, 4, -1, -1, 2, 9, 7]
    assert packed.packing is not None and packed.packing.lengths == (3, 4)
    assert packed.packing.offsets.tolist() == [0, 3, 7]
    assert packed.first().tolist() == [[-1], [-1]]
    back = packed.padded()
    assert back.places is not None and torch.equal(back.places, places.masked_fill(~present, NO_PLACE))
    assert torch.equal(back.x, tokens.x.masked_fill(~present[..., None], 0))
    assert back.present is present and back.packing is None


def test_attention_padded_for_a_while_is_that_of_each_image() -> None:
    layout, (q, k, v) = ragged()
    expected = packing.packed_attention(q, k, v, layout)
    torch.testing.assert_close(packing._padded(q, k, v, layout), expected)
    torch.testing.assert_close(expected[:, :, 3:4], v[:, :, 3:4])  # an image of one token attends to itself


def test_the_kernel_for_many_lengths_is_given_its_documented_layout() -> None:
    layout, (q, k, v) = ragged()

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        """Attention as the documentation of ``varlen_attn`` says, written from the equation."""
        assert q.shape == k.shape == v.shape == (9, 2, 8) and all(t.is_contiguous() for t in (q, k, v))
        assert cu_q.tolist() == cu_k.tolist() == [0, 3, 4, 9] and cu_q.dtype == cu_k.dtype == torch.int32
        assert (max_q, max_k) == (5, 5)
        image = torch.bucketize(torch.arange(9), cu_q[1:], right=True)
        logits = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
        weights = logits.masked_fill(image[:, None] != image, -torch.inf).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, v)

    out = packing._by_kernel(kernel, q, k, v, layout)
    torch.testing.assert_close(out, packing.packed_attention(q, k, v, layout))
    # torch's own takes these arguments; without a GPU it can only tell shapes.
    nowhere = Packing(
        present=layout.present, index=layout.index, lengths=layout.lengths, offsets=layout.offsets.to("meta")
    )
    shapes = packing._by_kernel(varlen.varlen_attn, *(t.to("meta", torch.bfloat16) for t in (q, k, v)), nowhere)
    assert shapes.shape == q.shape
    assert packing._varlen_kernel(q) is None
