"""Dataset ids, settings and roots, on real folders."""

from __future__ import annotations

import gc
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from prunefront.errors import DatasetError, UnknownNameError
from prunefront.training import data_sources
from prunefront.training.data import (
    DataConfig,
    check_classes,
    check_dataset,
    data_config_of,
    dataset_info,
    evaluation_batches,
    list_datasets,
    open_split,
    training_batches,
)
from prunefront.training.dataset_ids import resolve_dataset
from prunefront.training.recipes import Augmentation
from prunefront.training.split_plan import held_out_indices
from tests.integration.training.image_folders import write_images, write_noise
from tests.unit.training.models import DATA_CONFIG, tiny_vit


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data root that the environment names."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("PRUNEFRONT_DATA_ROOTS", str(folder))
    monkeypatch.delenv("PRUNEFRONT_DATASETS", raising=False)
    return folder


def write_settings(path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path.write_text(text)
    monkeypatch.setenv("PRUNEFRONT_DATASETS", str(path))


def labels_of(dataset_id: str, split: str) -> list[int]:
    dataset = open_split(dataset_id, split, data_config=DATA_CONFIG)
    return [dataset[index][1] for index in range(len(dataset))]


def test_an_image_folder_under_a_root_is_listed_and_opened(root):
    write_images(root / "grey" / "train", [12, 12, 12])
    write_images(root / "grey" / "val", [3, 2, 1])
    (root / "empty").mkdir()

    assert list_datasets() == ("digit-scenes", "imagefolder:grey")
    info = dataset_info("imagefolder:grey")
    assert info.num_classes == 3
    assert {name: split.num_images for name, split in info.splits.items()} == {"train": 27, "search": 9, "test": 6}
    assert info.splits["search"].origin == "held out of 'train' by a hash of the image names"
    assert labels_of("imagefolder:grey", "test") == [0, 0, 0, 1, 1, 2]


def test_the_timm_folder_scheme_opens_the_same_images(root):
    write_images(root / "grey" / "train", [8, 8])
    write_images(root / "grey" / "val", [3, 2])

    assert labels_of("timm:folder/grey", "search") == labels_of("imagefolder:grey", "search")


def test_held_out_images_are_nobody_elses(root):
    write_images(root / "grey" / "train", [20, 20])

    keys = {}
    for split in ("train", "search", "test"):
        source = data_sources.open_source(resolve_dataset("imagefolder:grey"), split)
        keys[split] = set(source._indices)
    assert sorted(sum(map(list, keys.values()), [])) == list(range(40))


def test_holding_out_depends_on_names_alone():
    names = [f"class_{index % 3}/{index}.png" for index in range(200)]
    parts = held_out_indices(names, ("search",))
    backwards = held_out_indices(names[::-1], ("search",))

    assert len(parts["search"]) == 50
    assert {names[index] for index in parts["search"]} == {names[::-1][index] for index in backwards["search"]}
    # A new image moves no more than one of the others.
    more = held_out_indices([*names, "class_0/new.png"], ("search",))
    assert len(set(parts["search"]) - set(more["search"])) <= 1


def test_large_datasets_give_at_most_ten_thousand_images_away():
    parts = held_out_indices([str(index) for index in range(120_000)], ("search", "test"))

    assert [len(parts[name]) for name in ("search", "test", "rest")] == [10_000, 10_000, 100_000]


def test_a_validation_folder_alone_serves_search_and_test_but_not_training(root):
    write_images(root / "imagenet" / "val", [10, 10])

    assert [len(labels_of("imagefolder:imagenet", split)) for split in ("search", "test")] == [5, 15]
    with pytest.raises(DatasetError, match="no images to train on"):
        labels_of("imagefolder:imagenet", "train")
    check_dataset("imagefolder:imagenet")
    with pytest.raises(DatasetError, match="Add a 'train' folder"):
        check_dataset("imagefolder:imagenet", needs_train=True)


def test_own_test_and_validation_folders_are_taken_as_they_are(root):
    for name, count in (("train", 9), ("val", 4), ("test", 2)):
        write_images(root / "grey" / name, [count, count])

    info = dataset_info("imagefolder:grey")
    assert {name: split.num_images for name, split in info.splits.items()} == {"train": 18, "search": 8, "test": 4}


def test_labels_agree_between_splits_that_lack_a_class(root):
    write_images(root / "grey" / "train", [8, 8, 8])
    write_images(root / "grey" / "val", [2, 2, 2])
    for image in (root / "grey" / "val" / "class_0").iterdir():
        image.unlink()

    assert labels_of("imagefolder:grey", "test") == [1, 1, 2, 2]


def test_classes_that_training_never_saw_are_refused(root):
    write_images(root / "grey" / "train", [8, 8])
    write_images(root / "grey" / "val", [2, 2, 2])

    with pytest.raises(DatasetError, match=r"1 that .* lacks \('class_2'\)"):
        open_split("imagefolder:grey", "test", data_config=DATA_CONFIG)


def test_a_model_of_other_classes_is_refused(root):
    write_images(root / "grey" / "train", [8, 8])

    with pytest.raises(DatasetError, match="has 2 classes, but the model has 1000"):
        check_classes(open_split("imagefolder:grey", "search", data_config=DATA_CONFIG), 1000)


@pytest.mark.parametrize(
    "dataset_id, message",
    [
        ("imagefolder:absent", "needs a folder 'absent'"),
        ("imagefolder:empty", "no images in"),
        ("imagefolder:../data/grey", "Leave out"),
        ("imagefolder:/etc", "Leave out"),
        ("imagefolder:grey/../../data/grey", "Leave out"),
        ("timm:folder/..", "Leave out"),
        ("timm:torch/../x", "Leave out"),
        ("imagefolder:link", "leaves its data root"),
        ("timm:hfds/someone/something", "lists it"),
        ("timm:wds/shards", "lists it"),
    ],
)
def test_ids_that_cannot_be_used_are_refused_with_a_reason(root, tmp_path, dataset_id, message):
    write_images(root / "grey" / "train", [1, 1])
    write_images(tmp_path / "outside" / "train", [1, 1])
    (root / "empty").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")

    with pytest.raises(DatasetError, match=message):
        check_dataset(dataset_id)
    assert "imagefolder:link" not in list_datasets()


@pytest.mark.parametrize("dataset_id", ["digits", "imagefolder:", "timm:", "timm:nothing", "", "file:///etc"])
def test_unknown_ids_are_refused_by_name(root, dataset_id):
    with pytest.raises(UnknownNameError, match="Unknown dataset"):
        check_dataset(dataset_id)


def test_an_unknown_scheme_names_the_known_ones(root):
    with pytest.raises(UnknownNameError, match="Unknown dataset scheme 'torhc'.*'torch'"):
        check_dataset("timm:torhc/cifar10")


def test_an_id_without_any_root_says_which_variable_is_missing(monkeypatch):
    monkeypatch.delenv("PRUNEFRONT_DATA_ROOTS", raising=False)

    with pytest.raises(DatasetError, match="PRUNEFRONT_DATA_ROOTS, but that variable is unset"):
        check_dataset("imagefolder:grey")


def test_the_settings_file_names_datasets_outside_the_roots(tmp_path, monkeypatch):
    write_images(tmp_path / "elsewhere" / "first", [8, 8])
    write_images(tmp_path / "elsewhere" / "second", [3, 3])
    text = "grey:\n  path: elsewhere\n  splits: {train: first, test: second}\n"
    write_settings(tmp_path / "datasets.yaml", monkeypatch, text)

    assert list_datasets() == ("digit-scenes", "grey")
    assert labels_of("grey", "test") == [0, 0, 0, 1, 1, 1]
    assert len(labels_of("grey", "search")) == 4


def test_a_settings_entry_with_the_wrong_number_of_classes_is_refused(tmp_path, monkeypatch):
    write_images(tmp_path / "grey" / "train", [8, 8])
    document = {"grey": {"path": str(tmp_path / "grey"), "num_classes": 3}}
    write_settings(tmp_path / "datasets.json", monkeypatch, json.dumps(document))

    with pytest.raises(DatasetError, match="has 3 classes, but 2 were found"):
        open_split("grey", "train", data_config=DATA_CONFIG)


@pytest.mark.parametrize(
    "text, message",
    [
        ("grey: {paht: x}", "grey.paht: no such field is known"),
        ("- grey", "an object with named fields"),
        ("grey: [", "is not one"),
        ("[" * 100_000, "is not one"),
    ],
)
def test_a_settings_file_that_cannot_be_right_is_refused(tmp_path, monkeypatch, text, message):
    write_settings(tmp_path / "datasets.yaml", monkeypatch, text)

    with pytest.raises(DatasetError, match=message):
        list_datasets()


def test_a_missing_settings_file_or_path_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEFRONT_DATASETS", str(tmp_path / "absent.yaml"))
    with pytest.raises(DatasetError, match="Correct the file or unset the variable"):
        list_datasets()
    write_settings(tmp_path / "datasets.yaml", monkeypatch, "grey: {path: absent}")
    with pytest.raises(DatasetError, match="there is nothing"):
        check_dataset("grey")


def test_an_unreadable_image_is_named_instead_of_replaced_by_its_neighbour(root):
    write_images(root / "grey" / "val", [4, 4])
    (root / "grey" / "val" / "class_0" / "1.png").write_bytes(b"not an image")

    dataset = open_split("imagefolder:grey", "test", data_config=DATA_CONFIG)
    with pytest.raises(DatasetError, match=r"class_0/1\.png"):
        for index in range(len(dataset)):
            dataset[index]
        for index in range(2):
            open_split("imagefolder:grey", "search", data_config=DATA_CONFIG)[index]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm leaves the tar open while its dataset lives
def test_a_tar_of_images_is_a_folder(root, tmp_path):
    write_images(tmp_path / "train", [8, 8])
    (root / "grey").mkdir()
    with tarfile.open(root / "grey" / "train.tar", "w") as tar:
        tar.add(tmp_path / "train", arcname=".")

    check_dataset("imagefolder:grey")
    assert {label for split in ("train", "search", "test") for label in labels_of("imagefolder:grey", split)} == {0, 1}
    assert sum(split.num_images for split in dataset_info("imagefolder:grey").splits.values()) == 16
    data_sources._scan_folder.cache_clear()
    gc.collect()


def test_torch_datasets_open_by_their_timm_name(root):
    write_cifar(root / "cifar10" / "cifar-10-batches-py", train=100, test=20)

    info = dataset_info("timm:torch/cifar10")
    assert info.num_classes == 10
    assert {name: split.num_images for name, split in info.splits.items()} == {"train": 75, "search": 25, "test": 20}
    image, label = open_split("timm:torch/cifar10", "test", data_config=DATA_CONFIG)[3]
    assert image.shape == (3, 32, 32) and label == 3


def test_a_torch_dataset_that_is_not_there_is_one_sentence(root):
    with pytest.raises(DatasetError, match="timm could not open the dataset 'timm:torch/cifar10'"):
        dataset_info("timm:torch/cifar10")


def write_cifar(folder: Path, *, train: int, test: int) -> None:
    """Write CIFAR-10 in its own format, random pixels, with the hashes that torchvision checks replaced."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0)
    names = [name for name, _ in CIFAR10.train_list]
    for name, count in [*((name, train // len(names)) for name in names), (CIFAR10.test_list[0][0], test)]:
        content = {
            "data": pixels.integers(0, 256, (count, 3072), dtype=np.uint8),
            "labels": [index % 10 for index in range(count)],
        }
        (folder / name).write_bytes(pickle.dumps(content))
    meta = {"label_names": [f"class {label}" for label in range(10)]}
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps(meta))


@pytest.fixture(autouse=True)
def _torchvision_accepts_our_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: Path(path).exists())


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the shard open when reading stops early
def test_webdataset_shards_are_streamed_once_each_and_shuffled_only_for_training(tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    write_shards(tmp_path / "shards", {"train": 40, "search": 12, "test": 12})
    settings = {
        "timm:wds/shards": {
            "path": str(tmp_path / "shards"),
            "splits": {name: f"{name}-0000.tar" for name in ("train", "search", "test")},
            "num_images": {"train": 40, "search": 12, "test": 12},
            "num_classes": 4,
        }
    }
    write_settings(tmp_path / "datasets.json", monkeypatch, json.dumps(settings))

    test = open_split("timm:wds/shards", "test", data_config=DATA_CONFIG)
    labels = torch.cat([labels for _, labels in evaluation_batches(test, 5)]).tolist()
    assert labels == [index % 4 for index in range(12)]
    few = open_split("timm:wds/shards", "test", data_config=DATA_CONFIG, num_images=3)
    assert torch.cat([labels for _, labels in evaluation_batches(few, 2)]).tolist() == labels[:3]

    train = open_split("timm:wds/shards", "train", data_config=DATA_CONFIG, train=True)
    epochs = [list(training_batches(train, batch_size=8, seed=0, epoch=epoch)) for epoch in (0, 0, 1)]
    orders = [[image.mean().item() for images, _ in epoch for image in images] for epoch in epochs]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) and len(orders[0]) == 40
    resumed = list(training_batches(train, batch_size=8, seed=0, epoch=0, first_batch=3))
    assert len(resumed) == 2 and torch.equal(resumed[0][0], epochs[0][3][0])
    gc.collect()


def test_a_stream_without_a_search_split_is_refused(tmp_path, monkeypatch):
    document = {"timm:wds/shards": {"path": str(tmp_path), "splits": {"train": "a.tar", "test": "b.tar"}}}
    write_settings(tmp_path / "datasets.json", monkeypatch, json.dumps(document))

    with pytest.raises(DatasetError, match="is a stream"):
        check_dataset("timm:wds/shards")


def write_shards(folder: Path, counts: dict[str, int]) -> None:
    """Write one WebDataset shard per split: NUMBER.png with NUMBER.cls, labels 0-3 in turn."""
    folder.mkdir()
    for split, count in counts.items():
        with tarfile.open(folder / f"{split}-0000.tar", "w") as tar:
            for number in range(count):
                buffer = io.BytesIO()
                Image.new("RGB", (32, 32), (5 * number,) * 3).save(buffer, "png")
                for suffix, content in (("png", buffer.getvalue()), ("cls", str(number % 4).encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def test_a_smaller_sample_is_the_beginning_of_a_larger_one_and_mixes_classes(root):
    write_images(root / "grey" / "val", [40, 40])

    samples = [open_split("imagefolder:grey", "test", data_config=DATA_CONFIG, num_images=n) for n in (10, 20)]
    labels = [[dataset[index][1] for index in range(len(dataset))] for dataset in samples]

    assert labels[1][:10] == labels[0]
    assert set(labels[0]) == {0, 1}


def test_digit_scenes_keep_their_clusters_in_a_sample():
    dataset = open_split("digit-scenes", "test", data_config=DATA_CONFIG, num_images=700)

    assert len(dataset) == len(dataset.clusters) == 700
    assert len(set(dataset.clusters)) == 600
    with pytest.raises(IndexError):
        dataset[700]


def test_images_kept_in_memory_are_the_same_images(root):
    write_images(root / "grey" / "val", [8, 8])

    lazy = open_split("imagefolder:grey", "test", data_config=DATA_CONFIG)
    kept = open_split("imagefolder:grey", "test", data_config=DATA_CONFIG, in_memory_mib=16)

    assert len(kept) == len(lazy)
    assert all(torch.equal(kept[index][0], lazy[index][0]) for index in range(len(lazy)))
    assert [kept[index][1] for index in range(len(lazy))] == [lazy[index][1] for index in range(len(lazy))]
    (root / "grey" / "val" / "class_0" / "0.png").unlink()
    kept[0]


def test_grey_models_get_grey_images(root):
    write_images(root / "grey" / "val", [8, 8], mode="L")
    config = DataConfig(**{**DATA_CONFIG.to_dict(), "input_size": (1, 32, 32), "mean": (0.0,), "std": (1.0,)})

    image, label = open_split("imagefolder:grey", "test", data_config=config)[-1 + 12]
    assert image.shape == (1, 32, 32)
    assert image.mean().item() == pytest.approx(0.5 * label, abs=0.01)
    with pytest.raises(DatasetError, match="1 or 3 channels"):
        odd = DataConfig(**{**config.to_dict(), "input_size": (4, 32, 32)})
        open_split("imagefolder:grey", "test", data_config=odd)


def test_the_size_a_model_was_built_for_wins_over_its_pretrained_config():
    config = data_config_of(tiny_vit())

    assert config.input_size == (3, 32, 32)
    assert config.crop_pct == 0.9  # timm's for this model


def test_augmented_images_depend_on_seed_epoch_and_index_alone(root):
    write_noise(root / "noise" / "train", 8)
    augmentation = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)

    def image(index: int, *, epoch: int = 0, seed: int = 0, others: int = 0) -> torch.Tensor:
        dataset = open_split(
            "imagefolder:noise", "train", data_config=DATA_CONFIG, train=True, augmentation=augmentation, seed=seed
        )
        dataset.set_epoch(epoch)
        for other in range(others):
            dataset[other]
        return dataset[index][0]

    before = torch.random.get_rng_state()
    assert torch.equal(image(4), image(4, others=3))
    assert not torch.equal(image(4), image(4, epoch=1))
    assert not torch.equal(image(4), image(4, seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_loader_processes_give_what_one_process_gives(root):
    write_noise(root / "noise" / "train", 8)
    dataset = open_split("imagefolder:noise", "train", data_config=DATA_CONFIG, train=True, augmentation=Augmentation())

    alone = list(training_batches(dataset, batch_size=2, seed=3, epoch=1))
    shared = list(training_batches(dataset, batch_size=2, seed=3, epoch=1, num_workers=1))

    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(alone, shared, strict=True))
