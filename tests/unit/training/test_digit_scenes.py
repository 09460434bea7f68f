"""Scenes of the demo dataset: disjoint, repeatable, and mostly background."""

import hashlib
import sys

import numpy as np
import pytest

from prunefront.errors import DatasetError
from prunefront.training.digit_scenes import (
    CANVAS_PX,
    SOURCE_DIGITS,
    num_scenes,
    render_scenes,
    source_indices,
)

SPLITS = ("train", "search", "test")
PATCH_PX = 6


def test_splits_share_no_source_digit_and_use_all_of_them():
    digits = np.concatenate([source_indices(split) for split in SPLITS])

    assert sorted(digits) == list(range(1797))


def test_search_and_test_hold_the_promised_number_of_images():
    assert num_scenes("search") >= 2000
    assert num_scenes("test") >= 4000


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_and_its_beginning_hold_all_classes_alike(split):
    scenes = render_scenes(split, range(100))

    for labels in (render_scenes(split, range(SOURCE_DIGITS[split])).labels, scenes.labels):
        counts = np.bincount(labels, minlength=10)
        assert counts.min() >= 0.85 * len(labels) / 10
        assert counts.max() <= 1.15 * len(labels) / 10


def test_the_first_images_show_different_digits():
    clusters = render_scenes("test", range(SOURCE_DIGITS["test"])).clusters

    assert len(set(clusters)) == SOURCE_DIGITS["test"]


def test_labels_and_clusters_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    scenes = render_scenes("search", range(50))

    assert (scenes.labels == datasets.load_digits().target[scenes.clusters]).all()


def test_a_scene_does_not_depend_on_the_others_rendered_with_it():
    together = render_scenes("test", range(40))
    order = np.random.default_rng(0).permutation(40)
    shuffled = render_scenes("test", order)

    assert (shuffled.images == together.images[order]).all()
    assert (render_scenes("test", [17]).images[0] == together.images[17]).all()


def test_train_scenes_change_with_the_epoch_and_test_scenes_never_do():
    assert (render_scenes("train", [3], epoch=0).images != render_scenes("train", [3], epoch=1).images).any()
    assert (render_scenes("test", [3], epoch=0).images == render_scenes("test", [3], epoch=1).images).all()


def test_renderings_of_one_digit_differ():
    scenes = render_scenes("search", [5, 5 + SOURCE_DIGITS["search"]])

    assert scenes.clusters[0] == scenes.clusters[1]
    assert (scenes.images[0] != scenes.images[1]).mean() > 0.9


def test_most_patches_are_background():
    # Background is what lies within the noise of the canvas colour, which most of the border shows.
    images = render_scenes("test", range(200)).images.astype(float)
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    distance = np.abs(images - np.median(border, axis=1)[:, None, None]).max(axis=-1)
    grid = CANVAS_PX // PATCH_PX
    patches = distance.reshape(-1, grid, PATCH_PX, grid, PATCH_PX)
    is_ink = (patches > 30).sum(axis=(2, 4)) > PATCH_PX**2 // 10

    assert 0.1 < is_ink.mean() < 0.45
    assert (is_ink.mean(axis=(1, 2)) < 0.5).mean() > 0.95


def test_a_scene_number_outside_the_split_is_refused():
    with pytest.raises(DatasetError, match=r"lie in 0\.\.2078, but got 2079"):
        render_scenes("search", [2079])


def test_the_digits_are_asked_for_when_scikit_learn_is_missing(monkeypatch):
    from prunefront.training import digit_scenes

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digit_scenes._source_digits.cache_clear()
    try:
        with pytest.raises(DatasetError, match="pip install scikit-learn"):
            render_scenes("search", [0])
    finally:
        monkeypatch.undo()
        digit_scenes._source_digits.cache_clear()


def test_rendering_is_the_one_the_shipped_weights_were_trained_on():
    # Recorded when the weights were made: other scenes would make every stored accuracy meaningless.
    images = render_scenes("test", [0, 1, 2, 3]).images

    assert hashlib.sha256(images.tobytes()).hexdigest() == (
        "0e09cba3c13509e41618acabee1a27d0f6d7c3c3985f7b5234b8e9693b219861"
    )
