"""Images that cannot be decoded: left out and counted, or refused, and never replaced by another."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from prunefront.cli.app import run
from prunefront.errors import ConfigError, CorruptImageError, DatasetError
from prunefront.training.data import SplitDataset, evaluation_batches, open_split, training_batches
from prunefront.training.evaluate import evaluate
from tests.integration.training.image_folders import write_images
from tests.unit.training.models import DATA_CONFIG, BrightnessModel
from workers.images import open_images

# The test split has 5, 3 and 2 images; these are number 1 and 6 of it.
BROKEN = ("class_0/1.png", "class_1/1.png")


@pytest.fixture
def grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with two corrupt test images: one is no image, one ends early."""
    monkeypatch.setenv("PRUNEFRONT_DATA_ROOTS", str(tmp_path))
    write_images(tmp_path / "grey" / "train", [8, 8, 8])
    write_images(tmp_path / "grey" / "val", [5, 3, 2])
    no_image, cut_off = (tmp_path / "grey" / "val" / name for name in BROKEN)
    no_image.write_bytes(b"not an image")
    cut_off.write_bytes(half_a_jpeg())
    return "imagefolder:grey"


def half_a_jpeg() -> bytes:
    """The beginning of a file: a whole header, and image data that end early."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "jpeg", quality=95)
    return buffer.getvalue()[: -(len(buffer.getvalue()) // 2)]


def open_test(dataset_id: str, **options: object) -> SplitDataset:
    return open_split(dataset_id, "test", data_config=DATA_CONFIG, **options)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # a test process may have one core
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("in_memory_mib", [0, 16])
def test_skipped_images_do_not_count_and_no_other_takes_their_place(grey, num_workers, in_memory_mib):
    split = open_test(grey, on_corrupt="skip", in_memory_mib=in_memory_mib)

    for _ in range(2):
        result = evaluate(BrightnessModel(3), split, batch_size=4, num_workers=num_workers)
        assert (result.num_images, result.num_skipped) == (8, 2)
        assert result.indices.tolist() == [0, 2, 3, 4, 5, 7, 8, 9]
        assert result.correct.tolist() == [True] * 8
    assert sorted(split.skipped) == [1, 6]
    assert split.describe_skipped() == (
        "2 of the 10 images of 'imagefolder:grey' (test) could not be decoded and were left out; "
        "the first is 'class_0/1.png': it has no known image format."
    )


def test_labels_stay_with_their_images(grey):
    split = open_test(grey, on_corrupt="skip")

    batches = list(evaluation_batches(split, 3, with_index=True))
    assert [places.tolist() for _, _, places in batches] == [[0, 2], [3, 4, 5], [7, 8], [9]]
    assert [labels.tolist() for _, labels, _ in batches] == [[0, 0], [0, 0, 1], [1, 2], [2]]
    for images, labels, _ in batches:
        levels = images.mean(dim=(1, 2, 3)) / 2 + 0.5
        assert torch.allclose(levels, labels / 3, atol=0.01)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_by_default_a_corrupt_image_is_refused_by_name(grey, num_workers):
    with pytest.raises(CorruptImageError) as caught:
        evaluate(BrightnessModel(3), open_test(grey), num_workers=num_workers)

    text = str(caught.value)
    assert text.startswith("The image 'class_0/1.png' cannot be decoded: it has no known image format. Repair")
    assert "\n" not in text
    with pytest.raises(CorruptImageError):
        open_test(grey, in_memory_mib=16)


def test_a_cut_off_image_is_corrupt(grey):
    with pytest.raises(CorruptImageError, match=r"'class_1/1\.png' cannot be decoded: .*truncated"):
        open_test(grey, on_corrupt="skip")[6]


def test_a_file_that_cannot_be_read_is_refused_though_corrupt_ones_are_skipped(grey, tmp_path):
    split = open_test(grey, on_corrupt="skip")
    (tmp_path / "grey" / "val" / "class_2" / "0.png").unlink()

    with pytest.raises(DatasetError, match=r"Could not read the image 'class_2/0\.png'") as caught:
        evaluate(BrightnessModel(3), split)
    assert not isinstance(caught.value, CorruptImageError)


def test_a_split_of_corrupt_images_alone_is_refused(grey, tmp_path):
    for image in (tmp_path / "grey" / "val").rglob("*.png"):
        image.write_bytes(b"")

    with pytest.raises(DatasetError, match=r"gave no images: 10 of the 10 images .*'class_0/0\.png'"):
        evaluate(BrightnessModel(3), open_test(grey, on_corrupt="skip"))


def test_clusters_of_the_counted_images_are_found_by_index(grey):
    split = open_test(grey, on_corrupt="skip")
    split.clusters = np.arange(10) // 2

    result = evaluate(BrightnessModel(3), split)
    assert split.clusters[result.indices].tolist() == [0, 1, 1, 2, 2, 3, 4, 4]


def test_training_batches_become_smaller_where_an_image_is_corrupt(grey, tmp_path):
    def batches(first_batch: int = 0) -> list[list[int]]:
        loaded = training_batches(split, batch_size=3, seed=1, epoch=2, first_batch=first_batch, with_index=True)
        return [places.tolist() for _, _, places in loaded]

    split = open_split(grey, "train", data_config=DATA_CONFIG, train=True, on_corrupt="skip")
    whole = batches()
    name = split._source._dataset.filename(int(split._source._indices[7]))
    (tmp_path / "grey" / "train" / name).write_bytes(b"broken")

    assert batches() == [[place for place in batch if place != 7] for batch in whole] != whole
    assert batches(first_batch=2) == batches()[2:]
    assert list(split.skipped) == [7]
    assert split.skipped[7].image == name


def test_a_training_batch_without_any_image_is_refused(grey, tmp_path):
    split = open_split(grey, "train", data_config=DATA_CONFIG, train=True, on_corrupt="skip")
    for image in (tmp_path / "grey" / "train").rglob("*.png"):
        image.write_bytes(b"broken")

    with pytest.raises(CorruptImageError, match="needs an image, but none of its 4 can be decoded"):
        next(iter(training_batches(split, batch_size=4, seed=0, epoch=0)))


def test_jobs_refuse_corrupt_images(grey):
    with pytest.raises(CorruptImageError, match=r"class_0/1\.png"):
        open_images(grey, "test", DATA_CONFIG)


def test_an_unknown_choice_is_refused(grey):
    with pytest.raises(ConfigError, match="must be 'refuse' or 'skip', but got 'ignore'"):
        open_test(grey, on_corrupt="ignore")


def test_the_error_keeps_name_and_reason_on_its_way_from_a_process():
    error = pickle.loads(pickle.dumps(CorruptImageError.of("a/b.png", "it is empty")))

    assert (error.image, error.reason) == ("a/b.png", "it is empty")
    assert str(error) == (
        "The image 'a/b.png' cannot be decoded: it is empty. Repair or remove that file, or skip such images."
    )


def test_a_corrupt_record_of_an_lmdb_is_skipped_like_its_file(grey, tmp_path):
    pytest.importorskip("lmdb")
    from prunefront.training.lmdb_builder import write_lmdb

    write_lmdb(tmp_path / "grey" / "train", tmp_path / "grey" / "train.lmdb")
    write_lmdb(tmp_path / "grey" / "val", tmp_path / "grey" / "val.lmdb")
    split = open_test("lmdb:grey", on_corrupt="skip")

    result = evaluate(BrightnessModel(3), split)
    assert result.indices.tolist() == [0, 2, 3, 4, 5, 7, 8, 9]
    assert [error.image for _, error in sorted(split.skipped.items())] == list(BROKEN)


TINY = [
    "vit_tiny_patch16_224", "--img-size", "32", "--num-classes", "3", "--model-kwarg", "patch_size=8",
    "--model-kwarg", "embed_dim=48", "--model-kwarg", "depth=1", "--model-kwarg", "num_heads=3",
]  # fmt: skip


def test_the_eval_command_skips_with_a_warning_and_refuses_when_strict(grey, tmp_path, capfd):
    weights = tmp_path / "weights.pt"
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=3, patch_size=8, embed_dim=48, depth=1, num_heads=3
    )
    torch.save(model.state_dict(), weights)
    line = ["eval", *TINY, "--checkpoint", str(weights), "--dataset", grey]

    assert run([*line, "--json"]) == 0
    output = capfd.readouterr()
    assert {key: json.loads(output.out)[key] for key in ("num_images", "num_skipped")} == {
        "num_images": 8,
        "num_skipped": 2,
    }
    assert "Warning: 2 of the 10 images" in output.err and "'class_0/1.png'" in output.err
    assert run([*line, "--strict"]) == 2
    assert "Error: The image 'class_0/1.png' cannot be decoded" in capfd.readouterr().err
