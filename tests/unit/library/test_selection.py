"""Learned selection (DynamicViT, SPViT) and LV-ViT: masks in training, removal in evaluation."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import prunefront
from prunefront.backbones.compressed import gumbel_noise
from prunefront.backbones.lvvit import fold_batch_norm
from prunefront.errors import ConfigError, ModelError
from prunefront.methods.base import Masking
from prunefront.methods.selection import KEEP, decide
from tests.unit.library import models

LVVIT = models.small_spec("lvvit_s", stem_width=8)


@pytest.mark.parametrize("spec", [models.small_spec(), LVVIT], ids=["vit", "lvvit"])
def test_keeping_every_token_equals_the_dense_model(spec: Any) -> None:
    keep_all = [{"block": 1, "op": "select", "cumulative_keep_ratio": 1.0}]
    model = models.selecting("dynamicvit", spec, keep_all)
    with torch.no_grad():
        torch.testing.assert_close(
            model(models.images()), prunefront.uncompress(model)(models.images()), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("spec", [models.small_spec(), LVVIT], ids=["vit", "lvvit"])
@pytest.mark.parametrize("method", ["dynamicvit", "spvit"])
def test_evaluation_removes_what_training_masks(method: str, spec: Any) -> None:
    """With the decisions of evaluation and nothing leaking to masked tokens both ways compute one function."""
    model = models.selecting(method, spec, mode="adaptive") if method == "spvit" else models.selecting(method, spec)
    images = models.images()
    with torch.no_grad():
        removed, aux = model(images, return_aux=True)
        chosen = iter(aux.decisions)

        def forced(stage: int, scores: torch.Tensor) -> torch.Tensor:
            keep = next(chosen)
            noise = torch.zeros_like(scores)
            noise[:, : keep.shape[1], KEEP] = (keep * 2 - 1) * 1e4
            return noise

        tokens, _ = model._walk(images, masking=Masking(eps=0.0, noise=forced))
        masked = model._heads(tokens).logits
    assert aux.tokens.shape[1] < 30
    torch.testing.assert_close(masked, removed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["dynamicvit", "spvit"])
def test_training_keeps_all_tokens_and_gives_gradients_to_predictors(method: str) -> None:
    model = models.selecting(method).train()
    logits, aux = model(models.images(), return_aux=True)
    assert aux.tokens.shape[1] == 37 + (2 if method == "spvit" else 0)
    for earlier, later in zip(aux.decisions, aux.decisions[1:], strict=False):
        assert ((later == 0) | (earlier == 1)).all(), "a dropped token came back"
    loss = logits.square().sum() + sum(decision.mean() for decision in aux.decisions)
    loss.backward()
    learned = {name: p.grad for name, p in model.named_parameters() if "score_predictor" in name}
    assert learned and all(grad is not None and grad.isfinite().all() for grad in learned.values())
    assert any(grad.abs().max() > 0 for grad in learned.values() if grad is not None)


def test_decisions_are_straight_through_and_nested() -> None:
    scores = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]], requires_grad=True)
    previous = torch.tensor([[1.0, 1.0, 1.0]])
    decision = decide(scores, previous, 0, Masking(eps=0.0, noise=None))
    assert decision.tolist() == [[0.0, 1.0, 1.0]]  # a tie keeps
    decision.sum().backward()
    soft = torch.softmax(scores.detach(), -1)[..., 0]
    torch.testing.assert_close(scores.grad[..., 0], soft * (1 - soft))  # d softmax / d logit
    assert decide(scores, torch.tensor([[1.0, 0.0, 0.0]]), 0, Masking(eps=0.0, noise=None)).tolist() == [
        [0.0, 0.0, 0.0]
    ]


def test_noise_is_gumbel() -> None:
    torch.manual_seed(0)
    noise = gumbel_noise(0, torch.zeros(200_000, 1, 1))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, rel=0.02)


@pytest.mark.parametrize("spec", [models.small_spec(), LVVIT], ids=["vit", "lvvit"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_image_may_lose_every_patch(spec: Any, training: bool) -> None:
    model = models.selecting("spvit", spec)
    with torch.no_grad():
        for selector in model.score_predictor:
            selector.out_conv[0][4].bias.copy_(torch.tensor([-50.0, 50.0]))
    model.train(training)
    logits, aux = model(models.images(), return_aux=True)
    assert logits.isfinite().all()
    assert all(decision.sum() == 0 for decision in aux.decisions)
    logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_only_surviving_patches_vote_in_lvvit() -> None:
    model = models.selecting("dynamicvit", LVVIT)
    with torch.no_grad():
        logits, aux = model(models.images(), return_aux=True)
        by_hand = model.head(aux.tokens[:, 0]) + 0.5 * model.aux_head(aux.tokens[:, 1:]).amax(dim=1)
    assert aux.tokens.shape[1] == 1 + int(36 * 0.4)
    torch.testing.assert_close(logits, by_hand)
    fused = prunefront.compress(model, models.config("evit", [{"block": 3, "op": "fuse", "tokens": 9}], LVVIT))
    with torch.no_grad():
        logits, aux = fused(models.images(), return_aux=True)
        by_hand = model.head(aux.tokens[:, 0]) + 0.5 * model.aux_head(aux.tokens[:, 1:10]).amax(dim=1)
    assert aux.tokens.shape[1] == 11
    torch.testing.assert_close(logits, by_hand)


def test_packages_do_not_vote_in_lvvit() -> None:
    model = models.selecting("spvit", LVVIT, mode="fixed")
    with torch.no_grad():
        logits, aux = model(models.images(), return_aux=True)
        patches = aux.tokens[:, 1:-2]
        by_hand = model.head(aux.tokens[:, 0]) + 0.5 * model.aux_head(patches).amax(dim=1)
    assert patches.shape[1] == int(36 * 0.4)
    torch.testing.assert_close(logits, by_hand)


@pytest.mark.parametrize("mode", ["adaptive", "bucketed", "fixed"])
def test_spvit_modes_keep_what_they_promise(mode: str) -> None:
    model = models.selecting("spvit", mode=mode, bucket=4)
    with torch.no_grad():
        _, aux = model(models.images(8), return_aux=True)
    counts = torch.stack([site.values["counts"] for site in aux.sites])
    first = aux.sites[0].values["pred_score"]
    wanted = (first[..., 0] >= first[..., 1]).sum(dim=1)
    if mode == "fixed":
        assert counts.tolist() == [[25] * 8, [14] * 8]
    elif mode == "bucketed":
        assert (counts[0] % 4 == 0).logical_or(counts[0] == 36).all()
        assert ((counts[0] >= wanted) & (counts[0] < wanted + 4)).all()
    else:
        assert torch.equal(counts[0], wanted)
        assert len(counts[0].unique()) > 1, "the images should differ for this test"
        assert aux.present is not None
    assert torch.equal(torch.stack([d.sum(dim=1).long() for d in aux.decisions]), counts)


def test_package_is_the_weighted_sum_or_mean_of_what_was_dropped() -> None:
    summed, mean = models.selecting("spvit"), models.selecting("spvit", package_norm="mean")
    with torch.no_grad():
        packages = []
        for model in (summed, mean):
            entering: list[torch.Tensor] = []
            hook = model.score_predictor[0].register_forward_pre_hook(
                lambda _, args, seen=entering: seen.append(args[0])
            )
            _, aux = model(models.images(), return_aux=True)
            hook.remove()
            site = aux.sites[0].values
            weight = site["softmax_score"][..., 0] * (1 - aux.decisions[0])
            total = torch.einsum("bn,bnc->bc", weight, entering[0])
            expected = total if model is summed else total / weight.sum(dim=1, keepdim=True)
            torch.testing.assert_close(site["package_token"], expected, atol=1e-5, rtol=1e-5)
            packages.append(site["package_token"])
    assert not torch.allclose(*packages)


@pytest.mark.parametrize("method", ["dynamicvit", "spvit"])
def test_predictors_travel_with_the_model(method: str, tmp_path: Path) -> None:
    model = models.selecting(method)
    images = models.images()
    dense = prunefront.uncompress(model)
    with torch.no_grad():
        logits = model(images)
        assert {n for n in model.state_dict() if "score_predictor" not in n} == set(dense.state_dict())
        torch.testing.assert_close(copy.deepcopy(model)(images), logits)
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        torch.testing.assert_close(torch.load(stream, weights_only=False)(images), logits)
        loaded = prunefront.load_model(prunefront.save_model(model, tmp_path / "model.safetensors"))
        torch.testing.assert_close(loaded.eval()(images), logits)
        # Another ratio at the same blocks keeps the trained predictors.
        again = prunefront.compress(model, model.prune_config)
        torch.testing.assert_close(again(images), logits)
        assert again.score_predictor[0] is model.score_predictor[0]


def test_other_ratios_for_a_call_need_trained_blocks() -> None:
    model = models.selecting("dynamicvit")
    with torch.no_grad():
        _, aux = model(models.images(), schedule=[{"block": 3, "op": "select", "tokens": 5}], return_aux=True)
        assert aux.tokens.shape[1] == 6
        alone = model.score_predictor[1](torch.zeros(1, 4, 48))
        assert alone.shape == (1, 4, 2)
    with pytest.raises(ConfigError, match=r"predictors for blocks \[1, 3\], but the schedule asks for blocks \[2\]"):
        model(models.images(), schedule=[{"block": 2, "op": "select", "tokens": 5}])


@pytest.mark.parametrize("method", ["dynamicvit", "spvit"])
def test_gradient_checkpointing_gives_the_same_gradients(method: str) -> None:
    model = models.selecting(method).train()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)  # the same noise
        model(models.images()).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-4)


def test_batch_norms_fold_into_the_convolutions() -> None:
    model: Any = models.build(LVVIT)
    model.train()
    model(models.images(8, seed=5))  # running statistics that are not the identity
    model.eval()
    folded: Any = fold_batch_norm(model)
    with torch.no_grad():
        torch.testing.assert_close(folded(models.images()), model(models.images()), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert isinstance(model.patch_embed.bn1, torch.nn.BatchNorm2d)
    with pytest.raises(ModelError, match="Only LV-ViT"):
        fold_batch_norm(models.build(models.small_spec()))


def test_describing_a_model_does_not_move_its_batch_norms() -> None:
    model: Any = models.build(LVVIT)
    model.train()
    before = model.patch_embed.bn1.running_mean.clone()
    prunefront.geometry.geometry_of(model)
    assert torch.equal(model.patch_embed.bn1.running_mean, before) and model.patch_embed.bn1.training


@pytest.mark.parametrize(
    ("name", "parameters"), [("lvvit_t", 8_534_720), ("lvvit_s", 26_151_824), ("lvvit_m", 55_830_544)]
)
def test_lvvit_has_the_official_number_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(name).parameters()) == parameters


def test_both_classifiers_of_lvvit_are_replaced() -> None:
    model: Any = models.build(LVVIT)
    model.reset_classifier(4)
    assert model(models.images()).shape == (3, 4)
    assert model.aux_head.out_features == 4
