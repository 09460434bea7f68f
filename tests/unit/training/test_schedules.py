"""The keep-rate schedule, by hand."""

import math

import pytest
import torch

import prunefront
from prunefront.config import load_config
from prunefront.errors import ConfigError
from prunefront.schedule import plan_blocks
from prunefront.training.recipes import KeepRateSchedule, SelectorPhases
from prunefront.training.schedules import (
    PhasedSites,
    ScheduledSites,
    cumulative_keep_ratios,
    merged_config,
    openness,
)
from tests.unit.library import models


def config(*sites, method="evit"):
    return load_config(
        {
            "format": "prunefront/config/1",
            "model": {"name": "deit_small_patch16_224"},
            "method": method,
            "sites": [{"op": "prune", **site} for site in sites],
        }
    )


def test_ratios_stay_at_one_then_follow_a_cosine_to_the_base():
    schedule, steps = KeepRateSchedule(start_epoch=10, epochs=100), 5

    shares = [openness(schedule, step, steps) for step in (0, 49, 50, 175, 300, 425, 549, 550, 1500)]

    expected = [1, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert shares[:6] == pytest.approx(expected)
    assert 0 < shares[6] < 1e-4 and shares[7:] == [0, 0]


def test_without_length_the_base_is_in_force_at_once():
    assert openness(KeepRateSchedule(start_epoch=0, epochs=0), 0, 10) == 0.0


def test_each_kind_of_amount_moves_between_everything_and_its_own():
    sites = ScheduledSites(
        config(
            {"block": 3, "keep_ratio": 0.7},
            {"block": 6, "tokens": 69},
            {"block": 8, "remove": 23},
            {"block": 9, "cumulative_keep_ratio": 0.1},
        )
    )

    # 196 patches, 138 after block 3, 69 after block 6, 46 after block 8.
    half = sites.at(0.5)["schedule"]
    assert [site.keep_ratio for site in half[:3]] == pytest.approx([0.85, 0.75, 1 - 23 / 69 / 2])
    assert half[3].cumulative_keep_ratio == pytest.approx(0.55)
    assert [site.keep_ratio or site.cumulative_keep_ratio for site in sites.at(1.0)["schedule"]] == [1.0] * 4
    assert sites.at(0.0) == {}


def test_the_counts_on_the_way_are_evits():
    from prunefront.registry import get_method

    sites = ScheduledSites(config({"block": 3, "keep_ratio": 0.7}, {"block": 6, "keep_ratio": 0.7}))

    plan = plan_blocks(
        get_method("evit"), {}, sites.at(0.5)["schedule"], depth=12, num_patch_tokens=196, num_prefix_tokens=1
    )

    # ceil(0.85 * 196) = 167, ceil(0.85 * 167) = 142.
    assert (plan[4].tokens_in, plan[7].tokens_in) == (168, 143)


def test_a_second_site_of_a_block_counts_what_the_first_one_leaves():
    sites = config({"block": 3, "tokens": 98}, {"block": 3, "op": "merge", "remove": 49}, method="hybrid")

    assert [site.keep_ratio for site in ScheduledSites(sites).at(0.5)["schedule"]] == pytest.approx([0.75, 0.75])


def test_trilevels_share_of_connections_comes_down_with_its_tokens() -> None:
    document = models.config("trilevel", [{"block": 1, "op": "prune", "keep_ratio": 0.7}], attn_ratio=0.2)
    sites = ScheduledSites(document)
    assert sites.at(1.0)["options"] == {"attn_ratio": 1.0}
    assert sites.at(0.5)["options"] == pytest.approx({"attn_ratio": 0.6})
    assert sites.at(0.0) == {}
    assert "options" not in ScheduledSites(document.evolve(options={})).at(0.5)
    model = prunefront.compress(models.build(document.model), document)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = prunefront.uncompress(model)(images)
        torch.testing.assert_close(model(images, **sites.at(1.0)), dense, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model(images, **sites.at(0.5)), model(images), atol=1e-5)
        _, aux = model(images, return_aux=True, options={"attn_ratio": 0.5})
    kept = aux.sites[0].values["attn_mask"][:, 1:, 1:].sum(dim=-1)
    assert (kept == 13).all()  # half of the 26 kept patches, in every row
    with pytest.raises(ConfigError, match="attn_ratio"):
        model(images, options={"attn_ratio": 2.0})


def selecting(*sites):
    """A dynamicvit config; sites are (block, cumulative keep ratio) or documents."""
    documents = [
        site if isinstance(site, dict) else {"block": site[0], "cumulative_keep_ratio": site[1]} for site in sites
    ]
    return config(*({"op": "select", **document} for document in documents), method="dynamicvit")


def amounts(sites):
    return [(site.block, site.cumulative_keep_ratio or site.tokens) for site in sites]


def test_ratios_are_of_the_initial_patches_whatever_a_site_counts():
    # 196 patches: 98 of them stay, then 49, then 9.
    sites = selecting({"block": 2, "keep_ratio": 0.5}, {"block": 4, "tokens": 49}, (6, 0.05))

    assert cumulative_keep_ratios(sites) == (0.5, 0.25, 0.05)


@pytest.mark.parametrize(
    ("sites", "within", "merged"),
    [
        ([(3, 0.9), (4, 0.86), (6, 0.5), (7, 0.48)], 0.05, [(3, 0.86), (6, 0.48)]),
        ([(3, 0.8), (4, 0.75), (5, 0.7)], 0.05, [(3, 0.75), (5, 0.7)]),  # near the first of them, not the last
        ([(3, 0.5), (4, 0.5)], 0.0, [(3, 0.5)]),
        ([{"block": 3, "keep_ratio": 0.5}, {"block": 5, "keep_ratio": 0.95}, (9, 0.1)], 0.05, [(3, 93), (9, 0.1)]),
    ],
)
def test_neighbours_of_similar_ratios_become_the_first_ones_block_with_the_last_ones_amount(sites, within, merged):
    result = merged_config(selecting(*sites), within)

    assert amounts(result.sites) == merged


def test_different_ratios_stay_apart():
    sites = selecting((3, 0.7), (6, 0.49))

    assert merged_config(sites, 0.2) is sites


def epoch(phase, **values):
    return {"phase": float(phase), "search_top1": 0.5, "teacher_search_top1": 0.8, **values}


FOUR = [(3, 0.7), (6, 0.5), (9, 0.3), (10, 0.28)]


def test_selectors_join_from_the_last_block_to_the_first_and_end_merged():
    sites = PhasedSites(selecting(*FOUR), SelectorPhases(epochs=2, max_drop=None), epochs=12)

    history = []
    for _ in range(12):
        history.append(epoch(sites.phase(history)))

    assert [record["phase"] for record in history] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    used = [sites.at(phase).get("schedule") for phase in range(5)]
    assert amounts(used[0]) == [(10, 0.28)]
    assert amounts(used[1]) == [(9, 0.3), (10, 0.28)]
    assert amounts(used[2]) == [(6, 0.5), (9, 0.3), (10, 0.28)]
    assert used[3] is None  # all of the config's
    assert amounts(used[4]) == amounts(sites.final.sites) == [(3, 0.7), (6, 0.5), (9, 0.28)]


def test_without_anything_to_merge_the_config_is_the_end():
    sites = PhasedSites(selecting((3, 0.7), (6, 0.49)), SelectorPhases(epochs=1), epochs=3)

    assert sites.is_last(1) and sites.at(1) == {}
    assert sites.phase([epoch(0), epoch(1), epoch(1)]) == 1


@pytest.mark.parametrize(
    ("record", "joins"),
    [
        (epoch(0, search_top1=0.795, loss_kept_3=0.3), True),  # half a percent lost, 0.28 + 0.02 kept
        (epoch(0, search_top1=0.9, loss_kept_3=0.1), True),
        (epoch(0, search_top1=0.794, loss_kept_3=0.28), False),
        (epoch(0, search_top1=0.8, loss_kept_3=0.31), False),  # as good as the teacher because it keeps too much
        ({"phase": 0.0, "loss_kept_3": 0.28}, False),  # not validated
    ],
)
def test_the_next_selector_joins_once_little_accuracy_is_lost_at_the_target(record, joins):
    sites = PhasedSites(selecting(*FOUR), SelectorPhases(epochs=5), epochs=30)

    assert sites.phase([record]) == int(joins)


def test_every_selector_in_use_has_to_be_at_its_target():
    sites = PhasedSites(selecting(*FOUR), SelectorPhases(epochs=5), epochs=30)

    def following(third, fourth):
        return sites.phase([epoch(1, search_top1=0.8, loss_kept_2=third, loss_kept_3=fourth)])

    assert (following(0.3, 0.28), following(0.4, 0.28), following(0.3, 0.4)) == (2, 1, 1)


def test_phases_without_an_epoch_left_for_the_end_are_refused():
    with pytest.raises(ConfigError, match=r"4 phases of phases.epochs=3 leave none of the 12 epochs"):
        PhasedSites(selecting(*FOUR), SelectorPhases(epochs=3), epochs=12)
    PhasedSites(selecting(*FOUR), SelectorPhases(epochs=3), epochs=13)
