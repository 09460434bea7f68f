"""Boxes and swaps against values worked out by hand, and the objective's targets that follow from them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunefront
from prunefront.config import ModelSpec, PruneConfig
from prunefront.errors import ConfigError
from prunefront.training import objectives
from prunefront.training.losses import token_label_loss
from prunefront.training.mix_token import NO_BOX, box_around, draw_box, mixed_tokens, on_grid, swap_box
from prunefront.training.objectives import TokenLabelling
from prunefront.training.recipes import Recipe, TokenLabels

SPEC = ModelSpec(
    name="lvvit_s",
    kwargs={"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "stem_width": 8},
    img_size=32,
    num_classes=5,
)  # 4 x 4 patches
LN3 = math.log(3)  # against 0 it is a probability of three quarters


def compressed(method: str = "evit", sites: tuple[dict[str, Any], ...] = ()) -> Any:
    torch.manual_seed(0)
    document = {"model": SPEC, "method": method, "sites": sites}
    return prunefront.create_model(PruneConfig.model_validate(document)).train()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Drawn:
    """A generator whose draws are known."""

    def __init__(self, share_kept: float, *center: int) -> None:
        self._share_kept, self._center = share_kept, list(center)

    def beta(self, a: float, b: float) -> float:
        return self._share_kept

    def integers(self, high: int) -> int:
        return self._center.pop(0)


@pytest.mark.parametrize(
    ("center", "grid", "share", "box"),
    [
        # A quarter of 14 x 14: sides of 7, so 3 tokens to each side.
        ((5, 6), (14, 14), 0.25, (2, 3, 8, 9)),
        ((0, 13), (14, 14), 0.25, (0, 10, 3, 14)),  # cut off at two borders
        ((7, 7), (14, 14), 1.0, (0, 0, 14, 14)),
        ((2, 4), (4, 8), 0.25, (1, 2, 3, 6)),  # of the grid's shape
        ((3, 3), (14, 14), 0.0, (3, 3, 3, 3)),
    ],
)
def test_a_box_has_the_share_of_the_grid_that_was_drawn(center, grid, share, box):
    assert box_around(center, grid, share) == box
    assert draw_box(grid, 1.0, Drawn(1 - share, *center)) == box  # rows first, then columns


def test_boxes_cover_every_share_and_leave_numpys_own_generator_alone():
    before = np.random.get_state()[1].copy()
    generator = np.random.default_rng(0)
    boxes = [draw_box((1000, 1000), 1.0, generator) for _ in range(4000)]

    # Of a side s in units of the grid, around a uniform center, the part inside is s - s^2/4 on average; its square
    # is the area, s^2 - s^3/2 + s^4/16, here averaged over s^2 uniform on 0..1.
    expected = 1 / 2 - 1 / 5 + 1 / 48
    areas = [(bottom - top) * (right - left) / 1e6 for top, left, bottom, right in boxes]
    assert np.mean(areas) == pytest.approx(expected, abs=0.01)
    assert np.array_equal(np.random.get_state()[1], before)


def test_a_box_is_taken_from_the_image_at_the_other_end_of_the_batch():
    maps = torch.stack([torch.full((2, 3), float(number)) for number in range(3)])

    swapped = swap_box(maps, (0, 1, 1, 3))

    assert swapped.tolist() == [[[0, 2, 2], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]], [[2, 0, 0], [2, 2, 2]]]
    assert torch.equal(swap_box(swapped, (0, 1, 1, 3)), maps)
    assert torch.equal(swap_box(maps, NO_BOX), maps)


def test_tokens_are_mixed_after_the_stem_and_only_inside_the_block():
    model = compressed().eval()
    plain = model.patch_embed(images(2)).unflatten(1, (4, 4))

    with mixed_tokens(model.patch_embed, (1, 0, 3, 2)):
        mixed = model.patch_embed(images(2)).unflatten(1, (4, 4))
    after = model.patch_embed(images(2)).unflatten(1, (4, 4))
    with pytest.raises(RuntimeError, match="stopped"), mixed_tokens(model.patch_embed, (1, 0, 3, 2)):
        raise RuntimeError("stopped")
    after_error = model.patch_embed(images(2)).unflatten(1, (4, 4))

    for row in range(4):
        for column in range(4):
            source = plain.flip(0) if 1 <= row < 3 and column < 2 else plain
            assert torch.equal(mixed[:, row, column], source[:, row, column])
    assert torch.equal(after, plain) and torch.equal(after_error, plain)


def test_swapped_back_the_answers_of_tokens_that_never_met_are_those_of_unmixed_images():
    model = prunefront.uncompress(compressed()).eval()
    model.blocks = nn.Sequential()  # positions, norm and classifier alone: a token is all its answer depends on
    box = (0, 1, 3, 4)
    plain = model.classify(model.forward_features(images())).token_logits

    with mixed_tokens(model.patch_embed, box):
        mixed = model.classify(model.forward_features(images())).token_logits

    assert not torch.equal(mixed, plain)
    assert torch.equal(swap_box(mixed.unflatten(1, (4, 4)), box).flatten(1, 2), plain)


def test_what_is_left_goes_back_to_its_place():
    token_logits = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    places = torch.tensor([[3, -1, 0], [-1, 1, -1]])

    logits, is_there = on_grid(token_logits, places, (2, 2))

    assert logits.squeeze(-1).tolist() == [[[3, 0], [0, 1]], [[0, 5], [0, 0]]]
    assert is_there.tolist() == [[[True, False], [False, True]], [[False, True], [False, False]]]


def forward(monkeypatch: pytest.MonkeyPatch, model: Any, box: Any, **settings: Any) -> Any:
    """What the objective makes of three images under a box."""
    monkeypatch.setattr(objectives, "draw_box", lambda grid, alpha, generator: box)
    recipe = Recipe(objective="token-labels", token_labels=TokenLabels(**settings))
    return TokenLabelling(recipe, model.prune_config).forward(model, None, images())


@pytest.mark.parametrize(
    ("method", "site"),
    [
        ("evit", {"block": 1, "op": "prune", "tokens": 10}),
        ("evit", {"block": 1, "op": "fuse", "tokens": 10}),  # the fused token, number 11, has no label
        ("tome", {"block": 1, "op": "merge", "remove": 6}),  # a merged token has that of the place it kept
    ],
)
def test_tokens_that_are_left_answer_for_the_patch_they_show(monkeypatch, method, site):
    model, box = compressed(method, (site,)), (1, 0, 4, 3)
    outputs = forward(monkeypatch, model, box)

    with mixed_tokens(model.patch_embed, box):
        _, aux = model(images(), return_aux=True)
    left: dict[tuple[int, int], Tensor] = {}
    for image in range(3):
        for place, logits in zip(aux.token_places[image].tolist(), aux.token_logits[image], strict=True):
            if place >= 0:
                in_box = 1 <= place // 4 < 4 and place % 4 < 3
                left[2 - image if in_box else image, place] = logits
    assert {(image, place) for image, place in outputs.kept.nonzero().tolist()} == set(left)
    assert all(torch.equal(outputs.token_logits[key], logits) for key, logits in left.items())
    assert len(left) == 3 * 10
    ends = aux.origin[:, 1:] - 1  # where each initial patch ended; the token there speaks for its place
    for image in range(3):
        for position, place in enumerate(aux.token_places[image].tolist()):
            assert place < 0 or ends[image, place] == position


def test_a_model_in_eval_mode_and_one_without_mixing_see_their_own_images(monkeypatch):
    model = compressed()

    assert forward(monkeypatch, model, (0, 0, 2, 2), mix_alpha=0).box == NO_BOX
    assert forward(monkeypatch, model.eval(), (0, 0, 2, 2)).box == NO_BOX


def outputs_of(teacher: Any = None) -> Any:
    """Two images of 2 x 2 patches, two classes; the box is one patch, and one patch of image 1 is gone."""
    half, quarters = [0.0, 0.0], [LN3, 0.0]
    return objectives._Labelled(
        logits=torch.zeros(2, 2),
        class_logits=torch.tensor([quarters, half]),
        token_logits=torch.tensor([[quarters, quarters, half, half], [half, quarters, [9.0, -9.0], quarters]]),
        kept=torch.tensor([[True, True, True, True], [True, True, False, True]]),
        box=(0, 0, 1, 1),
        teacher=teacher,
    )


def test_the_image_target_is_mixed_by_the_boxes_area_and_the_token_targets_are_not():
    settings = TokenLabels(class_weight=1.0, token_weight=0.5)
    objective = TokenLabelling(Recipe(token_labels=settings), compressed().prune_config)

    loss = objective.loss(outputs_of(), torch.tensor([0, 1]))

    sure, unsure, half = -math.log(0.75), -math.log(0.25), math.log(2)
    # lambda is 3/4: image 0 is class 0 by 3/4 and class 1 by 1/4; image 1 says one half of either.
    of_class = (0.75 * sure + 0.25 * unsure + half) / 2
    of_tokens = (2 * sure + 2 * half + half + 2 * unsure) / 7
    assert loss.parts["classification"].item() == pytest.approx(of_class, rel=1e-5)
    assert loss.parts["tokens"].item() == pytest.approx(of_tokens, rel=1e-5)
    assert loss.total.item() == pytest.approx(of_class + 0.5 * of_tokens, rel=1e-5)


def test_plain_labels_are_smoothed():
    objective = TokenLabelling(Recipe(label_smoothing=0.2), compressed().prune_config)

    loss = objective.loss(outputs_of(), torch.tensor([0, 0]))

    of_class = (-0.9 * math.log(0.75) - 0.1 * math.log(0.25) + math.log(2)) / 2
    assert loss.parts["classification"].item() == pytest.approx(of_class, rel=1e-5)


def test_a_teacher_labels_the_image_and_each_token():
    settings = TokenLabels(source="teacher")
    objective = TokenLabelling(Recipe(token_labels=settings), compressed().prune_config)
    token_logits = torch.zeros(2, 4, 2)
    token_logits[0, 0] = torch.tensor([LN3, 0.0])
    teacher = objectives.Heads(logits=torch.tensor([[0.0, LN3], [0.0, 0.0]]), token_logits=token_logits)

    loss = objective.loss(outputs_of(teacher), torch.tensor([0, 1]))

    sure, unsure, half = -math.log(0.75), -math.log(0.25), math.log(2)
    # The teacher says (1/4, 3/4) of image 0 and (1/2, 1/2) of image 1; mixed by 3/4, image 0 is (5/16, 11/16).
    of_class = (5 / 16 * sure + 11 / 16 * unsure + half) / 2
    even = (sure + unsure) / 2
    of_tokens = (0.75 * sure + 0.25 * unsure + even + 2 * half + half + even + even) / 7
    assert loss.parts["classification"].item() == pytest.approx(of_class, rel=1e-5)
    assert loss.parts["tokens"].item() == pytest.approx(of_tokens, rel=1e-5)


def test_a_batch_that_kept_no_patch_has_no_token_loss():
    token_logits = torch.randn(2, 4, 3, requires_grad=True)
    targets = torch.eye(3)[:2]

    loss = token_label_loss(torch.zeros(2, 3), token_logits, targets, kept=torch.zeros(2, 4, dtype=torch.bool))
    loss.total.backward()

    assert loss.tokens.item() == 0.0 and loss.total.item() == pytest.approx(math.log(3))
    assert token_logits.grad is not None and not token_logits.grad.any()


def test_the_teacher_sees_the_images_as_they_are():
    model = compressed()
    teacher = prunefront.uncompress(compressed()).eval()
    recipe = Recipe(token_labels=TokenLabels(source="teacher"))

    outputs = TokenLabelling(recipe, model.prune_config).forward(model, teacher, images())

    assert outputs.box != NO_BOX
    expected = teacher.classify(teacher.forward_features(images()))
    assert torch.equal(outputs.teacher.token_logits, expected.token_logits)
    assert torch.equal(outputs.teacher.logits, expected.logits)


@pytest.mark.parametrize(
    ("recipe", "config", "sentence"),
    [
        (Recipe(), None, "trains the model of a config"),
        (Recipe(mixup=0.8), "evit", "MixToken replaces mixup and cutmix, but the recipe has mixup=0.8 and cutmix=0"),
        (Recipe(), "dynamicvit", "dynamicvit learns its selection. Use the recipe dynamicvit"),
    ],
)
def test_what_token_labels_cannot_train_is_refused(recipe, config, sentence):
    sites = () if config != "dynamicvit" else ({"block": 1, "op": "select", "cumulative_keep_ratio": 0.5},)

    with pytest.raises(ConfigError, match=sentence):
        TokenLabelling(recipe, config and compressed(config, sites).prune_config)


@pytest.mark.parametrize(
    ("teacher", "sentence"),
    [
        (None, "an LV-ViT, but none was named"),
        (nn.Linear(1, 1), "an LV-ViT, but got Linear"),
        (
            lambda: compressed("evit", ({"block": 1, "op": "prune", "tokens": 10},)),
            "The teacher has 10 tokens for the model's 4 x 4 patches",
        ),
    ],
)
def test_a_teacher_that_cannot_label_every_patch_is_refused(teacher, sentence):
    model = compressed()
    objective = TokenLabelling(Recipe(token_labels=TokenLabels(source="teacher")), model.prune_config)
    built = teacher if isinstance(teacher, nn.Module) or teacher is None else teacher()

    with pytest.raises(ConfigError, match=sentence):
        objective.forward(model, built, images())
