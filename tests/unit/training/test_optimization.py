"""Parameter groups and rates, by hand."""

import math

import pytest
from torch import nn

from prunefront.errors import ConfigError
from prunefront.training.optimization import Optimization, held_still, parameter_groups, set_drop_path
from prunefront.training.recipes import RECIPES, Recipe, override
from tests.unit.training.models import tiny_vit


def with_predictors() -> nn.Module:
    model = tiny_vit(3)
    model.score_predictor = nn.ModuleList(nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 2)) for _ in range(2))
    return model


def named_groups(model: nn.Module, recipe: Recipe) -> dict[str, dict]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in parameter_groups(model, recipe) for p in group["params"]}


def test_biases_norms_and_positions_do_not_decay():
    groups = named_groups(tiny_vit(3), Recipe(weight_decay=0.05))

    decaying = {name for name, group in groups.items() if group["weight_decay"] == 0.05}
    assert "blocks.0.attn.qkv.weight" in decaying and "head.weight" in decaying
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"}.isdisjoint(decaying)
    assert len(groups) == len(list(tiny_vit(3).parameters()))


def test_predictors_learn_at_the_full_rate_and_decay_as_the_recipe_says():
    model = with_predictors()
    dynamicvit, spvit = (named_groups(model, RECIPES[name]) for name in ("dynamicvit", "spvit"))

    assert dynamicvit["score_predictor.0.1.weight"]["lr_scale"] == 1.0
    assert dynamicvit["blocks.0.mlp.fc1.weight"]["lr_scale"] == 0.01
    assert dynamicvit["score_predictor.0.1.bias"]["weight_decay"] == 0.0
    assert spvit["score_predictor.0.1.bias"]["weight_decay"] == 0.05
    assert spvit["blocks.0.mlp.fc1.bias"]["weight_decay"] == 0.0


def rates(optimization: Optimization, step: int) -> tuple[float, float]:
    """Of the predictors and of the backbone."""
    optimization.set_rates(step)
    found = {group["is_backbone"]: group["lr"] for group in optimization.optimizer.param_groups}
    return found[False], found[True]


def test_dynamicvits_rates_warm_up_from_zero_while_the_backbone_is_frozen():
    optimization = Optimization(with_predictors(), RECIPES["dynamicvit"], epochs=30, steps_per_epoch=4, world_size=8)

    assert rates(optimization, 0) == (0.0, 0.0)
    assert rates(optimization, 10) == pytest.approx((5e-4, 0.0))
    assert rates(optimization, 20) == pytest.approx((1e-3, 1e-5))  # the cosine begins where the warm-up ends
    middle = 1e-6 + (1e-3 - 1e-6) / 2
    assert rates(optimization, 70) == pytest.approx((middle, 0.01 * middle))
    assert rates(optimization, 120) == pytest.approx((1e-6, 1e-8))


def test_spvits_backbone_gets_the_rate_of_the_epoch_but_at_most_a_hundredth_of_the_peak():
    optimization = Optimization(with_predictors(), RECIPES["spvit"], epochs=30, steps_per_epoch=4, world_size=4)

    def cosine(epoch: int) -> float:
        return 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 30)) / 2

    assert rates(optimization, 0) == pytest.approx((1e-3, 0.0))
    assert rates(optimization, 19) == pytest.approx((cosine(4), 0.0))
    assert rates(optimization, 20) == pytest.approx((cosine(5), 1e-5))
    assert rates(optimization, 23) == rates(optimization, 20)
    assert rates(optimization, 119) == pytest.approx((cosine(29), 1e-5))


def test_evits_rates_change_by_the_epoch():
    finetune = Optimization(tiny_vit(3), RECIPES["evit-finetune"], epochs=30, steps_per_epoch=4, world_size=8)
    scratch = Optimization(tiny_vit(3), RECIPES["evit-scratch"], epochs=300, steps_per_epoch=4, world_size=8)

    def rate(optimization: Optimization, step: int) -> float:
        optimization.set_rates(step)
        return optimization.lr

    assert rate(finetune, 3) == pytest.approx(8e-5)
    assert rate(finetune, 60) == pytest.approx((8e-5 + 2e-6) / 2)
    assert rate(scratch, 0) == pytest.approx(1e-6)
    assert rate(scratch, 10) == pytest.approx(1e-6 + (2e-3 - 1e-6) * 2 / 5)
    assert rate(scratch, 600) == pytest.approx((2e-3 + 1e-5) / 2)  # the cosine lies under the warm-up


def test_swins_lowest_rates_are_scaled_with_the_batch():
    recipe = RECIPES["trilevel-swin"]
    optimization = Optimization(tiny_vit(3), recipe, epochs=300, steps_per_epoch=2, world_size=8)

    optimization.set_rates(0)
    assert optimization.lr == pytest.approx(1e-6)  # 5e-7 * 128 * 8 / 512
    optimization.set_rates(600)
    assert optimization.lr == pytest.approx(1e-5)


def test_a_training_in_which_nothing_would_move_is_refused():
    frozen = override(Recipe(), {"frozen_epochs": 2})
    with pytest.raises(ConfigError, match="frozen_epochs=2 holds the whole model still"):
        Optimization(tiny_vit(3), frozen, epochs=2, steps_per_epoch=1, world_size=1)
    with pytest.raises(ConfigError, match="leaves nothing to train"), held_still(nn.Linear(2, 2), ("weight", "bias")):
        pass
    with pytest.raises(ConfigError, match="timm cannot build the optimizer 'adamv'"):
        Optimization(tiny_vit(3), Recipe(optimizer="adamv"), epochs=2, steps_per_epoch=1, world_size=1)


def test_frozen_parameters_are_left_out_and_free_again_afterwards():
    model = tiny_vit(3)

    with held_still(model, ("cls_token", "pos_embed", "patch_embed")):
        assert not {"cls_token", "pos_embed", "patch_embed.proj.weight"} & set(named_groups(model, Recipe()))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_stochastic_depth_rises_linearly():
    model = tiny_vit(3)
    set_drop_path(model, 0.2)

    found = [[getattr(path, "drop_prob", 0.0) for path in (b.drop_path1, b.drop_path2)] for b in model.blocks]
    assert found == [[0.0, 0.0], [0.1, 0.1], [0.2, 0.2]]
    set_drop_path(model, 0.0)
    assert isinstance(model.blocks[2].drop_path1, nn.Identity)
