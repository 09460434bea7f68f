"""DiffRate's learned rates: proxies by hand, masking against removal, and learning that meets its target."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import prunefront
from benchmarks.controller_overhead import synthetic_table
from latency_tables.predict import predict_latency_ms
from latency_tables.rates import latency_cost
from prunefront.config import PruneConfig
from prunefront.errors import ModelError
from prunefront.geometry import geometry_of
from prunefront.training.rates import KeptCounts, RateProxy, macs_cost, masked_forward, rates_loss, rates_of
from tests.unit.library import models


def test_a_proxy_counts_the_mean_of_its_candidates_rounded_up() -> None:
    proxy = RateProxy(10, granularity=4)
    assert proxy.candidates.tolist() == [10, 6, 2]
    count, stays = proxy()
    assert count.item() == math.ceil((10 + 6 + 2) / 3) + 1
    # Ranks 0 to 2 are within every candidate (class token included), 3 to 6 within two, the rest within one.
    torch.testing.assert_close(stays, torch.tensor([1.0] * 3 + [2 / 3] * 4 + [1 / 3] * 4))
    with torch.no_grad():
        proxy.logits.copy_(torch.tensor([-50.0, -50.0, 50.0]))
    assert proxy()[0].item() == 3
    proxy()[0].backward()
    assert proxy.logits.grad is not None


def _fixed(rates: Any, prune: dict[int, int], merge: dict[int, int]) -> None:
    """Point every proxy at one candidate, class token included in the counts given."""
    with torch.no_grad():
        for parts, wanted in ((rates.prune, prune), (rates.merge, merge)):
            for block, proxy in parts.items():
                place = (proxy.candidates == wanted.get(int(block), 37) - 1).nonzero()[0, 0]
                proxy.logits.fill_(-60.0)
                proxy.logits[place] = 60.0


@pytest.mark.parametrize("merge", [{}, {2: 19}], ids=["prune", "prune and merge"])
def test_masking_computes_what_removal_does(merge: dict[int, int]) -> None:
    spec = models.small_spec()
    model = models.build(spec)
    rates = rates_of(model, granularity=1)
    _fixed(rates, {1: 30, 2: 25, 3: 12}, merge)
    config = models.config("diffrate", rates.sites(), spec)
    kept = [step.kept for block in prunefront.token_counts(config).blocks for step in block.steps]
    assert kept == ([29, 24, 18, 11] if merge else [29, 24, 11])
    images = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        masked = masked_forward(model, rates, images)
        removed = prunefront.compress(model, config)(images)
        dense = model(images)
    # Merging differs in training: sizes are at least one there (quirk of the method), which the last block's
    # proportional attention sees.
    torch.testing.assert_close(masked, removed, atol=1e-4 if not merge else 0.2, rtol=0)
    assert (masked - removed).abs().max() < 0.5 * (dense - removed).abs().max()


def test_macs_of_counts_equal_the_closed_form_and_have_a_gradient() -> None:
    spec = models.small_spec()
    model = models.build(spec)
    rates = rates_of(model, granularity=1)
    _fixed(rates, {1: 30, 2: 25, 3: 12}, {2: 19})
    cost = macs_cost(geometry_of(model))(rates.counts())
    config = models.config("diffrate", rates.sites(), spec)
    assert cost.item() == pytest.approx(prunefront.macs(config), rel=1e-6)
    everything = KeptCounts(prune=(torch.tensor(37.0),) * 4, merge=(torch.tensor(37.0),) * 4)
    dense = macs_cost(geometry_of(model))(everything).item()
    assert dense == pytest.approx(prunefront.macs(PruneConfig(model=spec, method="hybrid")), rel=1e-6)
    count = torch.tensor(30.0, requires_grad=True)
    changed = KeptCounts(prune=(everything.prune[0], count, *everything.prune[2:]), merge=everything.merge)
    macs_cost(geometry_of(model))(changed).backward()
    assert count.grad is not None and count.grad > 0


def test_learning_meets_the_cost_target() -> None:
    spec = models.small_spec()
    model = models.build(spec).requires_grad_(False)
    rates = rates_of(model, granularity=2)
    cost_of = macs_cost(geometry_of(model))
    dense = prunefront.macs(PruneConfig(model=spec, method="hybrid"))
    optimizer = torch.optim.AdamW(rates.parameters(), lr=0.1, weight_decay=0.0)
    images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    labels = model(images).argmax(dim=1)
    for _ in range(60):
        optimizer.zero_grad()
        loss = rates_loss(masked_forward(model, rates, images), labels, cost_of(rates.counts()) / dense, 0.6)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert prunefront.macs(models.config("diffrate", rates.sites(), spec)) / dense == pytest.approx(0.6, abs=0.04)
    gradients = [proxy.logits.grad for proxy in rates.prune.values()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_models_without_a_class_token_are_refused() -> None:
    with pytest.raises(ModelError, match="plain ViTs with a class token"):
        rates_of(models.build(models.small_spec(class_token=False, global_pool="avg")))


def test_the_cost_of_a_table_is_its_prediction_with_its_slope() -> None:
    table = synthetic_table()
    cost_of = latency_cost(table, table.model)
    prune = [torch.tensor(65.0)] + [torch.tensor(float(n), requires_grad=True) for n in (50, 50, 30, 30, 20)]
    merge = [torch.tensor(65.0)] + [torch.tensor(65.0, requires_grad=True) for _ in range(5)]
    cost = cost_of(KeptCounts(prune=tuple(prune), merge=tuple(merge)))
    sites = [{"block": block, "op": "prune", "tokens": kept - 1} for block, kept in ((1, 50), (3, 30), (5, 20))]
    config = PruneConfig.model_validate({"model": table.model, "method": "diffrate", "sites": sites})
    assert cost.item() == pytest.approx(predict_latency_ms(table, config), rel=1e-6)
    cost.backward()  # type: ignore[no-untyped-call]
    # Keeping more tokens anywhere they are really removed costs time; a count above what is there does nothing.
    assert all(prune[block].grad > 0 for block in (1, 3, 5))
    assert merge[1].grad == 0
