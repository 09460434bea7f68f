"""The keep-rate schedule, by hand."""

import math

import pytest
import torch

import prunefront
from prunefront.config import load_config
from prunefront.errors import ConfigError
from prunefront.schedule import plan_blocks
from prunefront.training.recipes import KeepRateSchedule
from prunefront.training.schedules import ScheduledSites, openness
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
