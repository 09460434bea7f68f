"""How to train: learning rates, regularisation, augmentation, schedules and distillation, as a checked document.

The presets carry the values of the papers' own scripts, side by side in ``RECIPES``; ``get_recipe`` adds what a script
changes for one model, ``override`` what the user changes, ``default_recipe_name`` picks one for a config.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from prunefront.config import StrictModel, describe_validation_error
from prunefront.errors import ConfigError, UnknownNameError
from prunefront.training.examples import ExampleOptions

Share = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
Amp = Literal["off", "bf16", "fp16"]


class Augmentation(StrictModel):
    """Random changes of training images, in the words of ``timm.data.create_transform``."""

    min_crop_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.08, description="Smallest random crop, by area.")
    horizontal_flip: Share = 0.5
    color_jitter: NonNegative = 0.4
    auto_augment: str | None = Field(None, description="timm's policy, such as rand-m9-mstd0.5-inc1.")
    random_erasing: Share = 0.0

    def transform_options(self) -> dict[str, Any]:
        """Return the options of ``timm.data.create_transform``."""
        return {
            "scale": (self.min_crop_share, 1.0),
            "hflip": self.horizontal_flip,
            "color_jitter": self.color_jitter,
            "auto_augment": self.auto_augment,
            "re_prob": self.random_erasing,
            "re_mode": "pixel",
        }


class Distillation(StrictModel):
    """Soft distillation: the loss is (1 - alpha) * cross-entropy + alpha * tau^2 * KL(teacher || student) at tau."""

    alpha: Share = 0.5
    tau: Annotated[float, Field(gt=0.0)] = Field(1.0, description="Temperature that softens both distributions.")


class PruningLoss(StrictModel):
    """Weights of the objective ``pruning-distillation`` (DynamicViT, SPViT), for `losses.selection_loss`."""

    classification_weight: NonNegative = 1.0
    ratio_weight: NonNegative = Field(2.0, description="Of the kept shares' squared distance to their targets.")
    distillation_weight: NonNegative = Field(0.5, description="Of each distance to the teacher: logits and tokens.")
    ratio_over: Literal["image", "batch"] = Field("image", description="What a kept share is averaged over.")


class RateTarget(StrictModel):
    """What the objective ``kept-counts`` (DiffRate) aims its counts at."""

    cost_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.65, description="Of the dense model's cost.")
    weight: NonNegative = Field(100.0, description="Of the squared distance to that share.")
    granularity: Count = Field(4, description="Step between the counts to choose from, in tokens.")


class TokenLabels(StrictModel):
    """The objective ``token-labels`` (LV-ViT), for `losses.token_label_loss`, with MixToken."""

    source: Literal["image", "teacher"] = Field(
        "image", description="Of the labels: the image's label for every token, or what a dense LV-ViT says of each."
    )
    class_weight: NonNegative = 1.0
    token_weight: NonNegative = Field(1.0, description="Of the mean over the tokens.")
    uses_ground_truth: bool = Field(False, description="Mix the true label into what the teacher says of the image.")
    mix_alpha: NonNegative = Field(1.0, description="Of MixToken's Beta distribution; 0 is off.")


class KeepRateSchedule(StrictModel):
    """Keep ratios of 1 until ``start_epoch``, then a cosine down to the config's own over ``epochs``."""

    start_epoch: NonNegative = 10.0
    epochs: NonNegative = 100.0
    evaluate_with: Literal["current", "final"] = Field(
        "current", description="Ratios of validation during training; the last one always uses the final ratios."
    )


class SelectorPhases(StrictModel):
    """SPViT's layer-to-phase training: selectors join one by one, from the last site towards the first.

    At the end neighbouring sites of similar keep ratios are one, and the remaining selectors train together.
    """

    epochs: Count = Field(5, description="After as many the next selector joins, however good the model is by then.")
    max_drop: Share | None = Field(
        0.005, description="It joins sooner once search top-1 is at most this below the teacher's; null: never sooner."
    )
    ratio_tolerance: Share = Field(
        0.02, description="But not while a kept share is further than this above its target."
    )
    merge_within: Share = Field(0.05, description="Sites become one where cumulative keep ratios differ by no more.")


class Recipe(StrictModel):
    """How to train a compressed model. The default is neutral: AdamW, cosine, the dense model as teacher."""

    methods: tuple[str, ...] | None = Field(None, description="Methods it is made for; null: all, and dense models.")
    start: Literal["weights", "random"] = Field("weights", description="What training starts from by default.")
    epochs: Count = 30
    objective: str = Field("classification", description="What is minimised: a name of prunefront.training.objectives.")
    batch_size: Count = Field(64, description="Images per forward pass of each process.")
    accumulate: Count = Field(1, description="Batches whose gradients make one step.")
    amp: Amp = Field("off", description="Autocast; fp16 scales the loss.")
    eval_mode: bool = Field(False, description="Keep the model in eval mode: no drop path, no dropout.")

    optimizer: str = Field("adamw", description="timm's name.")
    lr: Annotated[float, Field(gt=0.0)] = Field(1e-4, description="Peak learning rate for lr_batch_size images.")
    lr_batch_size: Count | None = Field(
        512, description="The rate used is lr * images per step / lr_batch_size; null uses lr as it is."
    )
    min_lr: NonNegative | None = Field(None, description="Where the cosine ends; null: min_lr_share of the rate used.")
    min_lr_share: Share = Field(0.05, description="The cosine ends at this share of the rate used.")
    warmup_epochs: NonNegative = 0.0
    warmup_lr: NonNegative | None = Field(None, description="Where the warm-up begins; null: where the cosine ends.")
    warmup_prefix: bool = Field(False, description="Whether the cosine begins after the warm-up instead of under it.")
    scale_min_lr: bool = Field(False, description="Whether lr_batch_size scales min_lr and warmup_lr as well.")
    lr_steps: Literal["step", "epoch"] = Field("step", description="When the rate changes.")
    weight_decay: NonNegative = Field(0.05, description="Of everything but biases, norms and other 1-d parameters.")
    predictor_decays_all: bool = Field(False, description="Whether biases and norms of predictors decay too.")
    backbone_lr_factor: NonNegative = Field(1.0, description="Rate of all but the predictors, relative to theirs.")
    backbone_lr_rule: Literal["scaled", "capped"] = Field(
        "scaled", description="factor * current rate, or the current rate but at most factor * peak rate."
    )
    frozen_epochs: Annotated[int, Field(ge=0)] = Field(0, description="Epochs in which the predictors learn alone.")
    frozen_parameters: tuple[str, ...] = Field((), description="Parameters that never change, such as cls_token.")
    clip_grad: Annotated[float, Field(gt=0.0)] | None = Field(1.0, description="Largest gradient norm; null: no limit.")

    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None, description="Of the last block, rising linearly from 0; null leaves the model's own."
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    mixup: NonNegative = Field(0.0, description="Alpha of mixup; 0 is off.")
    cutmix: NonNegative = Field(0.0, description="Alpha of cutmix; 0 is off.")
    repeats: Count = Field(1, description="Repeated augmentation: variants of an image per epoch of fewer images.")
    augmentation: Augmentation | None = Augmentation(min_crop_share=0.35, color_jitter=0.0)

    distillation: Distillation | None = Distillation()
    pruning: PruningLoss | None = None
    token_labels: TokenLabels | None = None
    rates: RateTarget | None = Field(None, description="Learn how many tokens to keep, with frozen weights.")
    keep_rate: KeepRateSchedule | None = None
    phases: SelectorPhases | None = Field(None, description="Let selectors join one by one; null trains all at once.")
    examples: ExampleOptions | None = Field(None, description="Leave training images out; null trains on all.")
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(None, description="Null keeps no average.")
    evaluates_ema: bool = Field(False, description="Whether validation looks at the averaged weights too.")
    validate_every: Count = Field(1, description="Epochs between validations; the last epoch is always validated.")

    @property
    def scaled_lr(self) -> float:
        """The peak learning rate of one process."""
        return self.lr * self.lr_scale(1)

    def lr_scale(self, world_size: int) -> float:
        """What ``lr`` is multiplied by when ``world_size`` processes train together."""
        images = self.batch_size * self.accumulate * world_size
        return 1.0 if self.lr_batch_size is None else images / self.lr_batch_size


# The methods without parameters of their own can be trained by each other's recipes.
_WITHOUT_PREDICTORS = ("evit", "ppt", "tome", "diffrate", "hybrid")
_DEIT_AUGMENTATION = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25)
_DEIT: dict[str, Any] = {
    "clip_grad": None,
    "lr_batch_size": 512,
    "lr_steps": "epoch",
    "label_smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "augmentation": _DEIT_AUGMENTATION,
    "distillation": None,
}
_LVVIT: dict[str, Any] = {
    "methods": _WITHOUT_PREDICTORS,
    "objective": "token-labels",
    "amp": "fp16",
    "clip_grad": None,
    "warmup_epochs": 5,
    "warmup_lr": 1e-6,
    "lr_steps": "epoch",
    "drop_path": 0.1,
    "label_smoothing": 0.1,
    "augmentation": _DEIT_AUGMENTATION,
    "distillation": None,
    "token_labels": TokenLabels(),
}

RECIPES: dict[str, Recipe] = {
    "default": Recipe(),
    # For the demo's small model and its fresh scenes, where an epoch or two has to do: of 5e-5, 1e-4 and 3e-4 the
    # one that gave the best search accuracy for EViT at keep ratio 0.35.
    "digit-scenes": Recipe(batch_size=50, lr=1e-4, lr_batch_size=None, augmentation=None, epochs=2),
    # The recipe that most papers of the field share, without their teacher-free 8-GPU batch.
    "finetune-30": Recipe(
        lr=2e-5,
        clip_grad=None,
        label_smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
        augmentation=_DEIT_AUGMENTATION,
        distillation=None,
    ),
    # EViT, finetune.sh: 8 GPUs x 256. The weight decay is no typo.
    "evit-finetune": Recipe(
        **_DEIT,
        methods=_WITHOUT_PREDICTORS,
        epochs=30,
        batch_size=256,
        amp="fp16",
        eval_mode=True,
        lr=2e-5,
        min_lr=2e-6,
        warmup_lr=1e-6,
        weight_decay=1e-6,
        drop_path=0.1,
        repeats=3,
        ema_decay=0.99996,
        validate_every=30,
    ),
    # EViT, run_code.sh: 8 GPUs x 256.
    "evit-scratch": Recipe(
        **_DEIT,
        methods=_WITHOUT_PREDICTORS,
        start="random",
        epochs=300,
        batch_size=256,
        amp="fp16",
        lr=5e-4,
        min_lr=1e-5,
        warmup_epochs=5,
        warmup_lr=1e-6,
        weight_decay=0.05,
        drop_path=0.1,
        repeats=3,
        ema_decay=0.99996,
        keep_rate=KeepRateSchedule(start_epoch=10, epochs=100, evaluate_with="current"),
        validate_every=30,
    ),
    # PPT, train.sh: 4 GPUs x 256.
    "ppt": Recipe(
        **{**_DEIT, "augmentation": _DEIT_AUGMENTATION.model_copy(update={"color_jitter": 0.3})},
        methods=_WITHOUT_PREDICTORS,
        epochs=30,
        batch_size=256,
        amp="fp16",
        lr=1e-5,
        min_lr=1e-5,
        warmup_epochs=5,
        warmup_lr=1e-6,
        weight_decay=0.05,
        drop_path=0.1,
        repeats=3,
        ema_decay=0.99996,
    ),
    # DynamicViT, README for DeiT: 8 GPUs x 128; the rate is meant for these 1,024 images and never scaled.
    "dynamicvit": Recipe(
        **{**_DEIT, "lr_batch_size": None, "lr_steps": "step"},
        methods=("dynamicvit",),
        epochs=30,
        objective="pruning-distillation",
        batch_size=128,
        lr=1e-3,
        min_lr=1e-6,
        warmup_epochs=5,
        warmup_lr=0.0,
        warmup_prefix=True,
        weight_decay=0.05,
        backbone_lr_factor=0.01,
        frozen_epochs=5,
        frozen_parameters=("cls_token", "pos_embed"),
        drop_path=0.0,
        pruning=PruningLoss(ratio_over="image"),
        ema_decay=0.9999,
        evaluates_ema=True,
    ),
    # SPViT, README for DeiT-S: 4 GPUs x 256. Its script passes no drop path to the model.
    "spvit": Recipe(
        **_DEIT,
        methods=("spvit",),
        epochs=30,
        objective="pruning-distillation",
        batch_size=256,
        lr=5e-4,
        min_lr=1e-5,
        weight_decay=0.05,
        predictor_decays_all=True,
        backbone_lr_factor=0.01,
        backbone_lr_rule="capped",
        frozen_epochs=5,
        frozen_parameters=("cls_token", "pos_embed"),
        drop_path=0.0,
        repeats=3,
        pruning=PruningLoss(ratio_over="batch"),
        ema_decay=0.99996,
    ),
    # DiffRate, its search of kept counts: 4 GPUs x 256, weights frozen.
    "diffrate": Recipe(
        **{**_DEIT, "lr_batch_size": None},
        methods=("diffrate",),
        epochs=3,
        objective="kept-counts",
        batch_size=256,
        amp="fp16",
        lr=1e-2,
        min_lr=1e-3,
        weight_decay=0.0,
        repeats=3,
        rates=RateTarget(),
    ),
    # Tri-Level E-ViT, README for DeiT: 4 GPUs x 512.
    "trilevel": Recipe(
        **_DEIT,
        methods=("trilevel",),
        start="random",
        epochs=300,
        batch_size=512,
        amp="fp16",
        lr=5e-4,
        min_lr=1e-5,
        warmup_epochs=5,
        warmup_lr=1e-6,
        weight_decay=0.05,
        drop_path=0.1,
        repeats=3,
        ema_decay=0.99996,
        keep_rate=KeepRateSchedule(start_epoch=10, epochs=100, evaluate_with="final"),
        examples=ExampleOptions(),
    ),
    # Tri-Level E-ViT, Swin: 4 GPUs x 128.
    "trilevel-swin": Recipe(
        **{**_DEIT, "lr_steps": "step", "clip_grad": 5.0},
        methods=("trilevel",),
        start="random",
        epochs=300,
        batch_size=128,
        amp="fp16",
        lr=5e-4,
        min_lr=5e-6,
        warmup_epochs=20,
        warmup_lr=5e-7,
        scale_min_lr=True,
        weight_decay=0.05,
        drop_path=0.2,
        examples=ExampleOptions(),
    ),
    # LV-ViT, README: 8 GPUs x 128. The labels that its authors stored are replaced by a teacher's, where one is named.
    "lvvit-scratch": Recipe(
        **_LVVIT,
        start="random",
        epochs=300,
        batch_size=128,
        lr=1.6e-3,
        lr_batch_size=1024,
        min_lr=1e-5,
        weight_decay=0.05,
        ema_decay=0.99992,
        evaluates_ema=True,
    ),
    # LV-ViT, README for 384 px: 8 GPUs x 64; the rate is constant after the warm-up. It names no number of epochs.
    "lvvit-finetune": Recipe(
        **_LVVIT, epochs=30, batch_size=64, lr=5e-6, lr_batch_size=512, min_lr_share=1.0, weight_decay=1e-8
    ),
}

# What a script changes for one model: recipe -> beginning of timm's model name -> fields.
_FOR_MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "dynamicvit": {"deit_base": {"drop_path": 0.2, "pruning.ratio_weight": 5.0}},
    "spvit": {"deit_base": {"epochs": 60}},
    "trilevel-swin": {"swin_small": {"drop_path": 0.3}},
    "lvvit-scratch": {
        "lvvit_m": {"drop_path": 0.2},
        "lvvit_l": {"drop_path": 0.3, "lr": 1e-3, "augmentation.auto_augment": "rand-n3-m9-mstd0.5-inc1"},
    },
    "lvvit-finetune": {"lvvit_m": {"drop_path": 0.2}, "lvvit_l": {"drop_path": 0.3}},
}
_OF_DATASETS = {"digit-scenes": "digit-scenes"}
_OF_METHODS = {
    "evit": "evit-finetune",
    "ppt": "ppt",
    "dynamicvit": "dynamicvit",
    "spvit": "spvit",
    "trilevel": "trilevel",
}


def get_recipe(name: str, model_name: str | None = None) -> Recipe:
    """Return a recipe by its name.

    Args:
        name: One of ``RECIPES``.
        model_name: timm's name of the model, for the values that the paper's script changes for it.

    Raises:
        UnknownNameError: If there is none.
    """
    try:
        recipe = RECIPES[name]
    except KeyError:
        raise UnknownNameError.of("recipe", name, RECIPES) from None
    for beginning, changes in _FOR_MODELS.get(name, {}).items():
        if model_name is not None and model_name.startswith(beginning):
            recipe = override(recipe, changes)
    return recipe


def default_recipe(dataset_id: str) -> Recipe:
    """Return the recipe for a dataset when the user names none."""
    return RECIPES[_OF_DATASETS.get(dataset_id, "default")]


def default_recipe_name(dataset_id: str, method: str | None = None, model_name: str = "") -> str:
    """Name the recipe for a config: its method's, unless the dataset has its own.

    A method that learns predictors keeps its recipe on every dataset, since no other trains them.

    Args:
        dataset_id: Dataset to train on.
        method: Method of the config; None for a dense model.
        model_name: timm's name of its model.
    """
    name = _OF_METHODS.get(method or "", "default")
    if name == "trilevel" and model_name.startswith("swin"):
        name = "trilevel-swin"
    if RECIPES[name].objective == "classification":
        return _OF_DATASETS.get(dataset_id, name)
    return name


def check_recipe(recipe: Recipe, method: str | None, name: str = "") -> None:
    """Refuse a recipe that does not fit a method, or whose parts do not fit each other.

    Args:
        recipe: The recipe.
        method: Method of the config; None for a dense model, which takes what methods without predictors take.
        name: The recipe's name, for the sentence.

    Raises:
        ConfigError: Naming the methods it is for and the recipe to take instead, or the parts.
    """
    fits = recipe.methods is None or method in recipe.methods or (method is None and "evit" in recipe.methods)
    if not fits:
        assert recipe.methods is not None
        instead = default_recipe_name("", method)
        raise ConfigError(
            f"The recipe {name + ' ' if name else ''}trains {', '.join(recipe.methods)}, but this config's method is "
            f"{method or 'none (a dense model)'}; use --recipe {instead}, or a config of a method it trains."
        )
    if recipe.phases is not None and recipe.objective != "pruning-distillation":
        raise ConfigError(
            f"phases let learned selectors join one by one, but this training of {method or 'a dense model'} with the "
            f"objective {recipe.objective!r} has none; set phases=null, or train a dynamicvit or spvit config."
        )
    if recipe.phases is not None and recipe.keep_rate is not None:
        raise ConfigError(
            "phases and keep_rate both say which tokens are kept in which epoch; set one of them to null."
        )


def fit_to_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """Return the recipe for a training of ``epochs``.

    Warm-up, frozen phase, keep-rate schedule and exchanges of images stay as they are where they fit into the training,
    and keep their share of it where they do not: a run of 3 epochs is no warm-up alone.
    """
    keep_rate, examples = recipe.keep_rate, recipe.examples
    longest = max(
        recipe.warmup_epochs,
        recipe.frozen_epochs,
        0.0 if keep_rate is None else keep_rate.start_epoch + keep_rate.epochs,
        0 if examples is None else examples.interval_epochs * examples.events,
    )
    if epochs >= recipe.epochs or longest < epochs:
        return recipe.model_copy(update={"epochs": epochs})
    share = epochs / recipe.epochs
    changes: dict[str, Any] = {
        "epochs": epochs,
        "warmup_epochs": recipe.warmup_epochs * share,
        "frozen_epochs": int(recipe.frozen_epochs * share),
    }
    if keep_rate is not None:
        phases = {"start_epoch": keep_rate.start_epoch * share, "epochs": keep_rate.epochs * share}
        changes["keep_rate"] = keep_rate.model_copy(update=phases)
    if examples is not None:
        interval = max(round(examples.interval_epochs * share), 1)
        changes["examples"] = examples.model_copy(update={"interval_epochs": interval})
    return recipe.model_copy(update=changes)


def override(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe with some values replaced.

    Args:
        recipe: The recipe to begin with.
        changes: Values by field, parts of a section with a dot: ``{"lr": 1e-4, "augmentation.random_erasing": 0}``. A
            section that is off is switched on by naming one of its parts.

    Raises:
        ConfigError: If a field is unknown or a value out of range; the text names it.
    """
    document = recipe.model_dump()
    for path, value in changes.items():
        *sections, last = path.split(".")
        place: dict[str, Any] = document
        for section in sections:
            if section not in place:
                raise UnknownNameError.of("recipe field", path, _fields(Recipe))
            if not isinstance(place[section], dict | None):
                raise ConfigError(
                    f"The recipe's {section} is one value without parts, but got {path}; set {section} itself."
                )
            place[section] = copy.copy(place[section]) or {}
            place = place[section]
        place[last] = value
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        for item in error.errors():
            if item["type"] == "extra_forbidden":
                path = ".".join(str(part) for part in item["loc"])
                raise UnknownNameError.of("recipe field", path, _fields(Recipe)) from error
        raise ConfigError(f"This recipe cannot be used: {describe_validation_error(error)}.") from error


_SECTIONS: dict[str, type[StrictModel]] = {
    "augmentation": Augmentation,
    "distillation": Distillation,
    "pruning": PruningLoss,
    "token_labels": TokenLabels,
    "rates": RateTarget,
    "keep_rate": KeepRateSchedule,
    "phases": SelectorPhases,
    "examples": ExampleOptions,
}


def _fields(model: type[StrictModel]) -> list[str]:
    """All names that ``override`` takes."""
    return [*model.model_fields, *(f"{name}.{part}" for name, kind in _SECTIONS.items() for part in kind.model_fields)]
