"""Recipes: names, defaults, scaling."""

import pytest
from pydantic import ValidationError

from prunefront.errors import UnknownNameError
from prunefront.training.recipes import RECIPES, Recipe, default_recipe, get_recipe


def test_a_dataset_without_its_own_recipe_gets_the_neutral_one():
    assert default_recipe("imagefolder:flowers") == Recipe() == get_recipe("default")
    assert default_recipe("digit-scenes") == RECIPES["digit-scenes"]


def test_the_rate_grows_with_the_batch_unless_told_not_to():
    assert Recipe(lr=1e-4, lr_batch_size=512, batch_size=128).scaled_lr == pytest.approx(2.5e-5)
    assert Recipe(lr=1e-4, lr_batch_size=None, batch_size=128).scaled_lr == 1e-4


def test_a_recipe_survives_json():
    recipe = RECIPES["finetune-30"]

    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_an_unknown_field_or_name_is_refused():
    with pytest.raises(ValidationError, match="learning_rate"):
        Recipe.model_validate({"learning_rate": 1})
    with pytest.raises(UnknownNameError, match="finetune-30"):
        get_recipe("finetune30")
