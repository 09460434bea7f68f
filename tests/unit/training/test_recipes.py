"""Recipes: names, the papers' values, overriding, fitting."""

import pytest
from pydantic import ValidationError

from prunefront.errors import ConfigError, UnknownNameError
from prunefront.training.recipes import (
    RECIPES,
    KeepRateSchedule,
    Recipe,
    check_recipe,
    default_recipe,
    default_recipe_name,
    fit_to_epochs,
    get_recipe,
    override,
)

# The scripts' own values, column by column: batch per GPU and GPUs of the published run, then the effective rate there.
PUBLISHED = {
    #                 epochs GPUs batch  lr   effective min_lr warm-up  w-lr   decay  drop  EMA     clip  repeats amp
    "evit-finetune": (30, 8, 256, 2e-5, 8e-5, 2e-6, 0, 1e-6, 1e-6, 0.1, 0.99996, None, 3, "fp16"),
    "evit-scratch": (300, 8, 256, 5e-4, 2e-3, 1e-5, 5, 1e-6, 0.05, 0.1, 0.99996, None, 3, "fp16"),
    "ppt": (30, 4, 256, 1e-5, 2e-5, 1e-5, 5, 1e-6, 0.05, 0.1, 0.99996, None, 3, "fp16"),
    "dynamicvit": (30, 8, 128, 1e-3, 1e-3, 1e-6, 5, 0.0, 0.05, 0.0, 0.9999, None, 1, "off"),
    "spvit": (30, 4, 256, 5e-4, 1e-3, 1e-5, 0, None, 0.05, 0.0, 0.99996, None, 3, "off"),
    "trilevel": (300, 4, 512, 5e-4, 2e-3, 1e-5, 5, 1e-6, 0.05, 0.1, 0.99996, None, 3, "fp16"),
    "trilevel-swin": (300, 4, 128, 5e-4, 5e-4, 5e-6, 20, 5e-7, 0.05, 0.2, None, 5.0, 1, "fp16"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_values_of_its_script(name):
    recipe = get_recipe(name)
    num_gpus, effective = PUBLISHED[name][1], PUBLISHED[name][4]

    assert (
        recipe.epochs, num_gpus, recipe.batch_size, recipe.lr, effective, recipe.min_lr, recipe.warmup_epochs,
        recipe.warmup_lr, recipe.weight_decay, recipe.drop_path, recipe.ema_decay, recipe.clip_grad, recipe.repeats,
        recipe.amp,
    ) == PUBLISHED[name]  # fmt: skip
    assert recipe.lr * recipe.lr_scale(num_gpus) == pytest.approx(effective)
    # What all of them share.
    assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing, recipe.optimizer) == (0.8, 1.0, 0.1, "adamw")
    assert recipe.augmentation is not None and recipe.distillation is None
    assert recipe.augmentation.auto_augment == "rand-m9-mstd0.5-inc1"
    assert recipe.augmentation.random_erasing == 0.25
    assert recipe.augmentation.color_jitter == (0.3 if name == "ppt" else 0.4)
    assert recipe.lr_steps == ("step" if name in ("dynamicvit", "trilevel-swin") else "epoch")
    assert recipe.eval_mode == (name == "evit-finetune")
    assert recipe.start == ("random" if name in ("evit-scratch", "trilevel", "trilevel-swin") else "weights")
    assert recipe.validate_every == (30 if name.startswith("evit") else 1)


def test_the_papers_with_predictors_hold_the_backbone_back():
    dynamicvit, spvit = RECIPES["dynamicvit"], RECIPES["spvit"]

    for recipe in (dynamicvit, spvit):
        assert (recipe.frozen_epochs, recipe.backbone_lr_factor) == (5, 0.01)
        assert recipe.frozen_parameters == ("cls_token", "pos_embed")
        assert recipe.objective == "pruning-distillation" and recipe.pruning is not None
        pruning = recipe.pruning
        assert (pruning.classification_weight, pruning.ratio_weight) == (1.0, 2.0)
        assert pruning.distillation_weight == 0.5
    assert (dynamicvit.backbone_lr_rule, spvit.backbone_lr_rule) == ("scaled", "capped")
    assert (dynamicvit.pruning.ratio_over, spvit.pruning.ratio_over) == ("image", "batch")
    assert (dynamicvit.predictor_decays_all, spvit.predictor_decays_all) == (False, True)
    assert dynamicvit.warmup_prefix and dynamicvit.evaluates_ema and not spvit.evaluates_ema


def test_lv_vit_is_trained_with_token_labels_and_without_mixed_images():
    scratch, finetune = RECIPES["lvvit-scratch"], RECIPES["lvvit-finetune"]

    for recipe in (scratch, finetune):
        assert (recipe.objective, recipe.optimizer, recipe.amp) == ("token-labels", "adamw", "fp16")
        assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing, recipe.distillation) == (0.0, 0.0, 0.1, None)
        assert (recipe.warmup_epochs, recipe.warmup_lr, recipe.lr_steps, recipe.clip_grad) == (5, 1e-6, "epoch", None)
        assert recipe.augmentation is not None and recipe.token_labels is not None
        assert recipe.augmentation.auto_augment == "rand-m9-mstd0.5-inc1"
        assert recipe.augmentation.random_erasing == 0.25
        labels = recipe.token_labels
        assert (labels.class_weight, labels.token_weight, labels.mix_alpha, labels.source) == (1.0, 1.0, 1.0, "image")
    assert (scratch.start, scratch.epochs, scratch.weight_decay, scratch.min_lr) == ("random", 300, 0.05, 1e-5)
    assert scratch.lr * scratch.lr_scale(8) == pytest.approx(1.6e-3)  # 8 GPUs x 128
    assert (scratch.ema_decay, scratch.evaluates_ema) == (0.99992, True)
    assert (finetune.start, finetune.weight_decay, finetune.ema_decay) == ("weights", 1e-8, None)
    assert finetune.lr * finetune.lr_scale(8) == pytest.approx(5e-6)  # 8 GPUs x 64


@pytest.mark.parametrize(
    ("model", "drop_path"), [("lvvit_t", 0.1), ("lvvit_s", 0.1), ("lvvit_m", 0.2), ("lvvit_l", 0.3)]
)
def test_larger_lv_vits_skip_more_branches(model, drop_path):
    assert get_recipe("lvvit-scratch", model).drop_path == drop_path
    assert get_recipe("lvvit-finetune", model).drop_path == drop_path
    assert get_recipe("lvvit-scratch", model).lr == (1e-3 if model == "lvvit_l" else 1.6e-3)


def test_keep_ratios_come_down_from_epoch_10_to_110_when_training_from_scratch():
    assert RECIPES["evit-scratch"].keep_rate == KeepRateSchedule(start_epoch=10, epochs=100, evaluate_with="current")
    assert RECIPES["trilevel"].keep_rate == KeepRateSchedule(start_epoch=10, epochs=100, evaluate_with="final")
    assert [name for name, recipe in RECIPES.items() if recipe.keep_rate] == ["evit-scratch", "trilevel"]


def test_a_script_changes_some_values_for_some_models():
    assert get_recipe("dynamicvit", "deit_base_patch16_224").drop_path == 0.2
    assert get_recipe("dynamicvit", "deit_base_patch16_224").pruning.ratio_weight == 5.0
    assert get_recipe("spvit", "deit_base_patch16_224").epochs == 60
    assert get_recipe("trilevel-swin", "swin_small_patch4_window7_224").drop_path == 0.3
    assert get_recipe("dynamicvit", "deit_small_patch16_224") == RECIPES["dynamicvit"]


def test_a_dataset_without_its_own_recipe_gets_the_neutral_one():
    assert default_recipe("imagefolder:flowers") == Recipe() == get_recipe("default")
    assert default_recipe("digit-scenes") == RECIPES["digit-scenes"]


@pytest.mark.parametrize(
    ("dataset", "method", "model", "name"),
    [
        ("imagefolder:flowers", "evit", "deit_small_patch16_224", "evit-finetune"),
        ("imagefolder:flowers", "ppt", "deit_small_patch16_224", "ppt"),
        ("imagefolder:flowers", "tome", "deit_small_patch16_224", "default"),
        ("imagefolder:flowers", None, "deit_small_patch16_224", "default"),
        ("imagefolder:flowers", "trilevel", "deit_tiny_patch16_224", "trilevel"),
        ("imagefolder:flowers", "trilevel", "swin_tiny_patch4_window7_224", "trilevel-swin"),
        ("digit-scenes", "evit", "digit_vit_patch6_48", "digit-scenes"),
        ("digit-scenes", "dynamicvit", "digit_vit_patch6_48", "dynamicvit"),
    ],
)
def test_a_config_gets_its_methods_recipe_unless_the_dataset_has_one(dataset, method, model, name):
    assert default_recipe_name(dataset, method, model) == name
    check_recipe(get_recipe(name), method)


def test_a_recipe_that_does_not_fit_the_method_is_refused():
    with pytest.raises(ConfigError, match=r"dynamicvit trains dynamicvit, but .* evit; use --recipe evit-finetune"):
        check_recipe(RECIPES["dynamicvit"], "evit", "dynamicvit")
    with pytest.raises(ConfigError, match=r"method is none \(a dense model\)"):
        check_recipe(RECIPES["spvit"], None, "spvit")
    check_recipe(RECIPES["evit-finetune"], None)


def test_phases_without_selectors_to_join_are_refused():
    phased = {"phases.epochs": 2}
    check_recipe(override(RECIPES["spvit"], phased), "spvit")
    check_recipe(override(RECIPES["dynamicvit"], phased), "dynamicvit")
    with pytest.raises(ConfigError, match=r"training of evit with the objective 'classification' has none; set phases"):
        check_recipe(override(RECIPES["default"], phased), "evit")
    with pytest.raises(ConfigError, match="phases and keep_rate both say"):
        check_recipe(override(RECIPES["spvit"], {**phased, "keep_rate.epochs": 3}), "spvit")


def test_values_are_replaced_by_their_path():
    recipe = override(RECIPES["evit-finetune"], {"lr": 1e-4, "augmentation.random_erasing": 0, "distillation.tau": 2})

    assert (recipe.lr, recipe.augmentation.random_erasing, recipe.augmentation.color_jitter) == (1e-4, 0.0, 0.4)
    assert recipe.distillation.tau == 2.0 and recipe.distillation.alpha == 0.5  # the section is on now
    assert RECIPES["evit-finetune"].augmentation.random_erasing == 0.25
    assert override(recipe, {"augmentation": None}).augmentation is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rate": 1}, "Unknown recipe field 'learning_rate'"),
        ({"augmentation.erasing": 1}, "did you mean 'augmentation.random_erasing'"),
        ({"aug.random_erasing": 1}, "did you mean 'augmentation.random_erasing'"),
        ({"lr.peak": 1}, "lr is one value without parts"),
        ({"lr": -1}, "lr: Input should be greater than 0"),
        ({"objective": 3}, "objective"),
    ],
)
def test_what_cannot_be_replaced_is_refused_by_name(changes, sentence):
    with pytest.raises((ConfigError, UnknownNameError), match=sentence):
        override(Recipe(), changes)


def test_phases_keep_their_share_of_a_training_too_short_for_them():
    short, long = fit_to_epochs(RECIPES["dynamicvit"], 3), fit_to_epochs(RECIPES["dynamicvit"], 15)

    assert (short.epochs, short.warmup_epochs, short.frozen_epochs) == (3, 0.5, 0)
    assert (long.epochs, long.warmup_epochs, long.frozen_epochs) == (15, 5, 5)
    scratch = fit_to_epochs(RECIPES["evit-scratch"], 30)
    assert (scratch.keep_rate.start_epoch, scratch.keep_rate.epochs, scratch.warmup_epochs) == (1.0, 10.0, 0.5)


def test_the_rate_grows_with_the_images_of_a_step_unless_told_not_to():
    assert Recipe(lr=1e-4, lr_batch_size=512, batch_size=128).scaled_lr == pytest.approx(2.5e-5)
    assert Recipe(lr_batch_size=512, batch_size=128, accumulate=2).lr_scale(4) == 2.0
    assert Recipe(lr=1e-4, lr_batch_size=None, batch_size=128).scaled_lr == 1e-4


def test_a_recipe_survives_json():
    for recipe in RECIPES.values():
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_an_unknown_field_or_name_is_refused():
    with pytest.raises(ValidationError, match="learning_rate"):
        Recipe.model_validate({"learning_rate": 1})
    with pytest.raises(UnknownNameError, match="finetune-30"):
        get_recipe("finetune30")
