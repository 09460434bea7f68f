"""Patches followed through the sites: hand-made records with known grids, and every method on a small model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import prunefront
from prunefront.errors import InputError, ModelError
from prunefront.token_maps import PatchState, site_maps, trace_tokens
from tests.unit.library import models

if TYPE_CHECKING:
    from prunefront.methods.base import Aux

D, K, M, F = PatchState.DROPPED, PatchState.KEPT, PatchState.MERGED, PatchState.FUSED


def made(*records: tuple[int, str, list[list[int]], dict[str, Any]]) -> Aux:
    """What a forward pass over 4 patches behind one class token would have recorded."""
    from prunefront.methods.base import Aux, SiteRecord

    sites = [
        SiteRecord(
            block=block,
            op=op,
            assignment=torch.tensor(assignment),
            values={name: torch.tensor(value) for name, value in values.items()},
        )
        for block, op, assignment, values in records
    ]
    origin = torch.zeros(len(records[0][2]), 5, dtype=torch.long)
    return Aux(tokens=torch.empty(0), size=None, origin=origin, sites=sites, sizes={})


def test_what_is_left_of_a_later_pruning_is_told_by_patch() -> None:
    # Patches 0 and 3 leave; the others stay as tokens 2 and 1 of the first site, and patch 1 leaves at the second.
    aux = made((3, "prune", [[0, -1, 2, 1, -1]], {}), (6, "prune", [[0, 1, -1]], {}))

    ((first, second),) = site_maps(aux, (2, 2), 1)

    assert first.states.tolist() == [[D, K], [K, D]]
    assert first.groups.tolist() == [[-1, 1], [0, -1]]
    assert second.states.tolist() == [[D, D], [K, D]]
    assert (first.tokens, second.tokens, second.block) == (3, 2, 6)


def test_a_fused_token_stays_fused_until_it_is_pruned() -> None:
    # Patches 0 and 1 are fused behind patches 2 and 3; then the fused token is ranked first; then it is pruned.
    aux = made(
        (1, "fuse", [[0, 3, 3, 1, 2]], {"kept_idx": [[2, 3]]}),
        (2, "fuse", [[0, 3, 2, 1]], {"kept_idx": [[2, 1]]}),
        (3, "prune", [[0, -1, 1, -1]], {}),
    )

    ((first, second, third),) = site_maps(aux, (2, 2), 1)

    assert first.states.tolist() == [[F, F], [K, K]]
    assert first.groups.tolist() == [[2, 2], [0, 1]]
    # Patch 2 alone makes the second fused token.
    assert second.states.tolist() == [[F, F], [F, K]]
    assert second.groups.tolist() == [[0, 0], [2, 1]]
    assert third.states.tolist() == [[D, D], [D, K]]
    assert [site.tokens for site in (first, second, third)] == [4, 4, 2]


def test_merged_patches_share_a_group() -> None:
    aux = made((0, "merge", [[0, 2, 1, 2, 3]], {}), (1, "merge", [[0, 1, 2, 1]], {}))

    ((first, second),) = site_maps(aux, (2, 2), 1)

    assert first.states.tolist() == [[M, K], [M, K]]
    assert first.groups.tolist() == [[1, 0], [1, 2]]
    assert second.groups.tolist() == [[1, 0], [1, 0]]
    assert second.num_groups(M) == 2
    assert second.to_dict()["counts"] == {"dropped": 0, "kept": 0, "merged": 4, "fused": 0}


def test_padding_of_a_ragged_batch_is_no_token() -> None:
    # Image 0 keeps three patches, image 1 one; all else goes into the package behind them, position 4.
    first = [[0, 1, 4, 2, 3], [0, 4, 1, 4, 4]]
    # Then two and one; the first package moves from position 4 to 3, the second one is position 4.
    second = [[0, 1, 4, 2, 3], [0, 1, 4, 4, 3]]
    package = [[0.0], [0.0]]
    aux = made(
        (3, "select", first, {"package_token": package, "counts": [3, 1]}),
        (6, "select", second, {"package_token": package, "counts": [2, 1]}),
    )

    (many, few) = site_maps(aux, (2, 2), 1)

    assert [site.tokens for site in many] == [1 + 3 + 1, 1 + 2 + 2]
    assert [site.tokens for site in few] == [1 + 1 + 1, 1 + 1 + 2]
    assert many[0].states.tolist() == [[K, F], [K, K]]
    assert many[1].states.tolist() == [[K, F], [F, K]]
    assert many[1].groups.tolist() == [[0, 2], [3, 1]]  # patch 1 in the first package, patch 2 in the second
    assert few[1].states.tolist() == [[F, K], [F, F]]
    assert few[1].num_groups(F) == 1  # the second package is empty


def test_an_image_pools_or_prunes_for_itself() -> None:
    aux = made((3, "pool_or_prune", [[0, 2, 1, 2, 3], [0, 1, -1, 2, 3]], {"policy": [True, False]}))

    (pooled,), (pruned,) = site_maps(aux, (2, 2), 1)

    assert (pooled.action, pruned.action) == ("pool", "prune")
    assert pooled.states.tolist() == [[M, K], [M, K]]
    assert pruned.states.tolist() == [[K, D], [K, K]]


def test_a_stage_of_swin_begins_with_all_tokens_again() -> None:
    def record(alive: list[int]) -> tuple[list[list[int]], dict[str, Any]]:
        return [[place if place in alive else -1 for place in range(4)]], {"mask": [[True] * 4]}

    # 3 x 4 patches, halved to 2 x 2; the second record is not composed with the first: patch 0 returns.
    aux = made((4, "prune", *record([1, 2, 3])), (5, "prune", *record([0, 1])))

    ((first, second),) = site_maps(aux, (3, 4), 0)

    assert first.states.tolist() == [[D, K], [K, K]]
    assert second.states.tolist() == [[K, K], [D, D]]
    assert (first.tokens, second.tokens) == (3, 2)


def test_sorting_before_a_merge_is_no_site_but_is_followed() -> None:
    aux = made((2, "prune", [[0, 4, 3, 2, 1]], {}), (2, "merge_mean", [[0, 1, 2, 3, 3]], {}))

    ((only,),) = site_maps(aux, (2, 2), 1)

    assert only.op == "merge_mean"
    assert only.groups.tolist() == [[2, 2], [1, 0]]


def test_another_grid_or_prefix_than_the_records_is_refused() -> None:
    aux = made((3, "prune", [[0, -1, 2, 1, -1]], {}))

    with pytest.raises(InputError, match="record is of 5 tokens, but 10 were left"):
        site_maps(aux, (3, 3), 1)


@pytest.mark.parametrize("name", models.schedules())
def test_every_patch_is_in_one_state_and_where_the_model_says(name: str) -> None:
    config = models.schedules()[name]
    model: Any = prunefront.compress(models.build(config.model), config)
    images = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits, aux = model(images, return_aux=True)

    traces = trace_tokens(model, images)

    assert [trace.prediction for trace in traces] == logits.argmax(dim=1).tolist()
    for image, trace in enumerate(traces):
        for site in trace.sites:
            assert sum(site.count(state) for state in PatchState) == site.states.size == 36
            assert ((site.groups == -1) == (site.states == D)).all()
            alone = np.unique(site.groups[site.states == K], return_counts=True)[1]
            assert (alone == 1).all()
        last = trace.sites[-1]
        origin = aux.origin[image, 1:].numpy()
        assert (last.groups.ravel() == np.where(origin < 0, -1, origin - 1)).all()
        left = aux.tokens.shape[1] if aux.present is None else int(aux.present[image].sum())
        assert last.tokens == left
        for decision, site in zip(aux.decisions, trace.sites, strict=False):
            assert (decision[image].reshape(6, 6).numpy() == (site.states == K)).all()


def test_groups_of_tome_are_as_large_as_the_sizes_say() -> None:
    config = models.schedules()["tome"]
    model: Any = prunefront.compress(models.build(config.model), config)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        _, aux = model(images, return_aux=True)

    for image, trace in enumerate(trace_tokens(model, images)):
        for site in trace.sites:
            members = np.bincount(site.groups.ravel(), minlength=site.tokens - 1)
            assert members.tolist() == aux.sizes[site.block][image, 1:].tolist()


def test_keeping_all_shows_all_kept() -> None:
    sites = [{"block": b, "op": "select", "cumulative_keep_ratio": 1.0} for b in (1, 2)]
    config = models.config("dynamicvit", sites)
    model = prunefront.compress(models.build(config.model), config)

    (trace,) = trace_tokens(model, torch.randn(1, 3, 48, 48))

    assert len(trace.sites) == 2
    assert all((site.states == K).all() and site.tokens == 37 for site in trace.sites)


def test_swin_is_shown_on_the_grid_of_the_stage() -> None:
    kwargs = {"patch_size": 4, "embed_dim": 12, "depths": [2, 4, 2], "num_heads": [2, 2, 4], "window_size": 3}
    spec = prunefront.ModelSpec(name="swin_tiny_patch4_window7_224", kwargs=kwargs, img_size=48, num_classes=5)
    config = models.config("trilevel", [{"block": 2, "op": "prune", "tokens": 20}], spec)
    model = prunefront.compress(models.build(spec), config)

    (trace,) = trace_tokens(model, torch.randn(1, 3, 48, 48))

    assert trace.sites[0].states.shape == (6, 6)
    assert (trace.sites[0].count(K), trace.sites[0].tokens) == (20, 20)


def test_masked_tokens_of_training_are_refused() -> None:
    config = models.schedules()["dynamicvit"]
    model: Any = prunefront.compress(models.build(config.model), config).train()
    _, aux = model(torch.randn(1, 3, 48, 48), return_aux=True)

    with pytest.raises(InputError, match="call model.eval|Call model.eval"):
        site_maps(aux, (6, 6), 1)
    assert trace_tokens(model, torch.randn(1, 3, 48, 48))  # which changes to eval and back
    assert model.training


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ModelError, match="is not compressed"):
        trace_tokens(models.build(models.small_spec()), torch.randn(1, 3, 48, 48))
