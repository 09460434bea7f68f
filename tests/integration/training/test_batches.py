"""Order, repeats and ranks of batches, checked by counting."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prunefront.errors import ConfigError, DatasetError
from prunefront.training import digit_scenes
from prunefront.training.data import (
    SplitDataset,
    batches_per_epoch,
    evaluation_batches,
    open_split,
    training_batches,
)
from prunefront.training.recipes import Augmentation
from tests.integration.training.image_folders import write_noise
from tests.unit.training.models import DATA_CONFIG

NUM_IMAGES = 26


@pytest.fixture
def noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SplitDataset:
    """26 different training images, augmented at random."""
    monkeypatch.setenv("PRUNEFRONT_DATA_ROOTS", str(tmp_path))
    for split, count in (("train", NUM_IMAGES // 2), ("search", 5), ("test", 5)):
        write_noise(tmp_path / "noise" / split, count)
    return open_split(
        "imagefolder:noise", "train", data_config=DATA_CONFIG, train=True, augmentation=Augmentation(), seed=7
    )


def places(split: SplitDataset, **options: Any) -> list[list[int]]:
    options = {"batch_size": 4, "seed": 3, "epoch": 2, **options}
    return [indices.tolist() for _, _, indices in training_batches(split, with_index=True, **options)]


def flat(batches: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


def test_the_order_without_options_is_the_permutation_of_seed_and_epoch(noise):
    order = np.random.default_rng((3, 2)).permutation(NUM_IMAGES).tolist()

    assert places(noise) == [order[start : start + 4] for start in range(0, 24, 4)]
    assert places(noise, first_batch=4) == places(noise)[4:]
    assert places(noise, first_batch=6) == places(noise, first_batch=9) == []


def test_the_augmentation_of_the_first_showing_is_seeded_by_seed_epoch_and_image(noise, tmp_path):
    noise.set_epoch(5)
    state = np.random.SeedSequence([7, 5, 9]).generate_state(1, np.uint64)[0]
    with torch.random.fork_rng(devices=[]):
        random.seed(int(state))
        np.random.seed(int(state) % 2**32)
        torch.manual_seed(int(state) % 2**63)
        image = Image.open(tmp_path / "noise" / "train" / "class_0" / "9.png").convert("RGB")
        expected = noise._transform(image)

    assert torch.equal(noise[9][0], expected)
    assert torch.equal(noise.item(9, 0)[0], expected)


@pytest.mark.parametrize(("repeats", "world_size", "batch_size"), [(3, 1, 4), (3, 2, 4), (2, 3, 2), (4, 4, 1)])
def test_repeats_keep_the_length_and_go_to_different_ranks(noise, repeats, world_size, batch_size):
    ranks = [
        places(noise, repeats=repeats, world_size=world_size, rank=rank, batch_size=batch_size)
        for rank in range(world_size)
    ]

    per_rank = NUM_IMAGES // world_size // batch_size
    assert {len(batches) for batches in ranks} == {per_rank}
    assert per_rank == batches_per_epoch(NUM_IMAGES, batch_size=batch_size, world_size=world_size)
    # Along the row that the ranks take turns on, each image stands `repeats` times and never comes back.
    row = [index for turn in zip(*map(flat, ranks), strict=True) for index in turn]
    order = np.random.default_rng((3, 2)).permutation(NUM_IMAGES)
    assert row == np.repeat(order, repeats)[: per_rank * batch_size * world_size].tolist()
    counts = Counter(row)
    assert max(counts.values()) == repeats and list(counts.values()).count(repeats) >= len(counts) - 1
    if repeats <= world_size:
        assert all(max(Counter(flat(batches)).values()) == 1 for batches in ranks)


def test_repeats_of_one_image_are_augmented_differently_and_reproducibly(noise):
    def shown(num_workers: int = 0) -> dict[int, list[torch.Tensor]]:
        images: dict[int, list[torch.Tensor]] = {}
        batches = training_batches(
            noise, batch_size=4, seed=3, epoch=2, repeats=3, with_index=True, num_workers=num_workers
        )
        for tensors, _, indices in batches:
            for tensor, index in zip(tensors, indices.tolist(), strict=True):
                images.setdefault(index, []).append(tensor)
        return images

    first = shown()
    assert len(first) == 8 and all(len(tensors) == 3 for tensors in first.values())
    for tensors in first.values():
        assert len({tensor.numpy().tobytes() for tensor in tensors}) == 3
    again = shown(num_workers=1)
    assert all(torch.equal(a, b) for index in first for a, b in zip(first[index], again[index], strict=True))


def test_repeated_scenes_are_rendered_anew():
    split = open_split("digit-scenes", "train", data_config=DATA_CONFIG, train=True)
    (images, _, indices) = next(
        iter(training_batches(split, batch_size=2, seed=0, epoch=1, repeats=2, with_index=True))
    )

    assert indices[0] == indices[1]
    assert not torch.equal(images[0], images[1])
    variants = {
        digit_scenes.render_scenes("train", [5], *variant).images.tobytes()
        for variant in ((0,), (0, 0), (1, 0), (0, 1), (1, 1))
    }
    assert len(variants) == 4  # (0,) is (0, 0)
    fixed = {digit_scenes.render_scenes("search", [5], 0, repeat).images.tobytes() for repeat in range(2)}
    assert len(fixed) == 1


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_an_epoch_without_overlap(noise, world_size):
    ranks = [flat(places(noise, world_size=world_size, rank=rank, batch_size=2)) for rank in range(world_size)]

    together = flat(ranks)
    assert len(together) == len(set(together)) == NUM_IMAGES // world_size // 2 * 2 * world_size
    assert ranks == [flat(places(noise, world_size=world_size, rank=r, batch_size=2)) for r in range(world_size)]
    assert ranks[0] != flat(places(noise, world_size=world_size, rank=0, batch_size=2, epoch=3))


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (3, 0), (4, 0), (11, 0), (3, 1)])
def test_evaluation_counts_every_image_once_over_all_ranks(noise, world_size, num_workers):
    test = open_split("imagefolder:noise", "test", data_config=DATA_CONFIG)
    seen = []
    for rank in range(world_size):
        batches = evaluation_batches(test, 2, num_workers, rank=rank, world_size=world_size, with_index=True)
        for images, labels, indices in batches:
            assert len(images) == len(labels) == len(indices) <= 2
            for image, label, index in zip(images, labels, indices.tolist(), strict=True):
                assert torch.equal(image, test[index][0]) and label == test[index][1]
                seen.append(index)
    assert sorted(seen) == list(range(10))


def test_an_epoch_of_some_images_shows_these_and_no_others(noise):
    kept = np.array([20, 3, 5, 8, 13, 21, 1, 2, 0])

    for epoch in range(3):
        shown = flat(places(noise, indices=kept, batch_size=3, epoch=epoch))
        assert sorted(shown) == sorted(kept)
    assert places(noise, indices=kept, batch_size=3) == places(noise, indices=kept.tolist(), batch_size=3)
    assert places(noise, indices=kept, batch_size=3) != places(noise, indices=kept, batch_size=3, epoch=3)
    assert places(noise, indices=np.arange(NUM_IMAGES)) == places(noise)
    both = [flat(places(noise, indices=kept, batch_size=2, rank=rank, world_size=2, repeats=2)) for rank in (0, 1)]
    assert both[0] == both[1] and set(both[0]) < set(kept.tolist())


def test_an_image_looks_the_same_whether_or_not_others_are_left_out(noise):
    def shown(**options: Any) -> dict[int, bytes]:
        batches = training_batches(noise, batch_size=1, seed=3, epoch=2, with_index=True, **options)
        return {int(index): image.numpy().tobytes() for image, _, index in batches}

    everything, some = shown(), shown(indices=[4, 9, 11])
    assert some == {index: everything[index] for index in (4, 9, 11)}


def test_batches_without_index_are_the_same_batches(noise):
    plain = list(training_batches(noise, batch_size=4, seed=3, epoch=2, repeats=2))
    indexed = list(training_batches(noise, batch_size=4, seed=3, epoch=2, repeats=2, with_index=True))

    for (images, labels), (more_images, more_labels, indices) in zip(plain, indexed, strict=True):
        assert torch.equal(images, more_images) and torch.equal(labels, more_labels)
        assert labels.tolist() == [index // (NUM_IMAGES // 2) for index in indices.tolist()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats must be at least 1, but got 0"),
        ({"rank": 2, "world_size": 2}, "rank=2 and world_size=2"),
        ({"rank": -1}, "rank=-1 and world_size=1"),
        ({"indices": [1, 26]}, r"must lie in 0\.\.25, the images of the split, but got 1\.\.26"),
        ({"indices": [-1]}, r"got -1\.\.-1"),
        ({"indices": [1, 2, 1]}, "name each image once, but 1 of 3"),
        ({"indices": []}, "must be a list of image numbers"),
        ({"indices": np.ones(26, dtype=bool)}, "of type bool"),
    ],
)
def test_what_cannot_be_sampled_is_refused(noise, options, message):
    with pytest.raises(ConfigError, match=message):
        places(noise, **options)
    if "rank" in options:
        with pytest.raises(ConfigError, match=message):
            evaluation_batches(noise, 2, **options)


class _Numbers(SplitDataset):
    """A stream of numbered images, in the order it has."""

    is_streamed = True

    def __init__(self, count: int) -> None:
        self.dataset_id, self._num_images, self.split = "numbers", count, "train"

    def stream(self, shuffle_seed: tuple[int, int] | None = None) -> Any:
        return ((torch.full((1, 1, 1), float(number)), number % 3) for number in range(self._num_images))


def test_ranks_share_a_stream_without_overlap():
    stream = _Numbers(23)

    def trained_on(rank: int) -> list[list[float]]:
        batches = training_batches(stream, batch_size=3, seed=0, epoch=0, rank=rank, world_size=2)
        return [images.flatten().tolist() for images, _ in batches]

    training = [trained_on(rank) for rank in (0, 1)]
    assert [len(batches) for batches in training] == [3, 3]
    assert sorted(flat([flat(batches) for batches in training])) == list(range(18))
    evaluated = []
    for rank in (0, 1):
        for images, _, indices in evaluation_batches(stream, 4, rank=rank, world_size=2, with_index=True):
            assert images.flatten().tolist() == indices.tolist()
            evaluated += indices.tolist()
    assert sorted(evaluated) == list(range(23))
    for options in ({"repeats": 2}, {"indices": [0]}, {"with_index": True}):
        with pytest.raises(DatasetError, match="is read in its own order"):
            training_batches(stream, batch_size=3, seed=0, epoch=0, **options)
