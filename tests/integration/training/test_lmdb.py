"""LMDB files: the folder they were made of is the reference for everything."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torchvision.datasets import ImageFolder

from prunefront.cli.app import run
from prunefront.errors import ConfigError, DatasetError, FileWriteError, MissingExtraError, UnknownNameError
from prunefront.training.data import (
    check_dataset,
    dataset_info,
    evaluation_batches,
    list_datasets,
    open_split,
    training_batches,
)
from prunefront.training.recipes import Augmentation
from tests.integration.training.image_folders import write_images, write_noise
from tests.unit.training.models import DATA_CONFIG

lmdb = pytest.importorskip("lmdb")

from prunefront.training.lmdb_builder import write_lmdb  # noqa: E402
from prunefront.training.lmdb_images import LmdbReader  # noqa: E402


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data root that the environment names."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("PRUNEFRONT_DATA_ROOTS", str(folder))
    monkeypatch.delenv("PRUNEFRONT_DATASETS", raising=False)
    return folder


def both(root: Path, train: int = 12, val: int = 3) -> None:
    """Write ``noise`` as folders and as LMDB files."""
    write_noise(root / "noise" / "train", train)
    write_noise(root / "noise" / "val", val, seed=1)
    for split in ("train", "val"):
        write_lmdb(root / "noise" / split, root / "noise" / f"{split}.lmdb")


def test_records_are_the_files_in_the_order_of_image_folder(tmp_path):
    write_images(tmp_path / "grey", [11, 2, 3])
    info = write_lmdb(tmp_path / "grey", tmp_path / "grey.lmdb")
    reader, folder = LmdbReader(tmp_path / "grey.lmdb"), ImageFolder(tmp_path / "grey")

    assert (info.num_images, info.classes) == (16, ("class_0", "class_1", "class_2"))
    assert len(reader) == len(folder) == 16
    assert reader.class_to_idx == folder.class_to_idx
    assert sorted(reader.filenames()) == sorted(os.path.relpath(path, tmp_path / "grey") for path, _ in folder.samples)
    for index in range(len(reader)):
        file, label = reader[index]
        path = tmp_path / "grey" / reader.filename(index)
        assert file.read() == path.read_bytes()
        assert label == folder.class_to_idx[path.parent.name]
    assert [reader[index][1] for index in range(len(reader))] == folder.targets
    numbers = [name.removeprefix("class_0/").removesuffix(".png") for name in reader.filenames()[:11]]
    assert numbers == [str(number) for number in range(11)]


def test_labels_are_four_bytes_in_front_of_the_file(tmp_path):
    write_images(tmp_path / "grey", [1, 1])
    write_lmdb(tmp_path / "grey", tmp_path / "grey.lmdb")

    with lmdb.open(str(tmp_path / "grey.lmdb"), subdir=False, readonly=True, lock=False) as environment:
        with environment.begin() as transaction:
            record = transaction.get(b"\0\0\0\0\0\0\0\1")
            meta = json.loads(transaction.get(b"meta"))
    assert record == b"\1\0\0\0" + (tmp_path / "grey" / "class_1" / "0.png").read_bytes()
    assert (meta["format"], meta["version"], meta["num_images"]) == ("prunefront/images", 1, 2)
    assert meta["classes"] == ["class_0", "class_1"]


@pytest.mark.parametrize("split", ["train", "search", "test"])
def test_an_lmdb_gives_the_images_of_its_folder_in_every_split(root, split):
    both(root)
    folder = open_split("imagefolder:noise", split, data_config=DATA_CONFIG)
    packed = open_split("lmdb:noise", split, data_config=DATA_CONFIG)

    assert len(packed) == len(folder)
    for (ours, label), (theirs, reference) in zip(packed, folder, strict=True):
        assert label == reference
        assert torch.equal(ours, theirs)


def test_inspect_counts_what_is_in_the_folders(root):
    both(root)

    packed, folder = dataset_info("lmdb:noise"), dataset_info("imagefolder:noise")
    counts = {split: info.num_images for split, info in packed.splits.items()}
    assert counts == {split: info.num_images for split, info in folder.splits.items()}
    assert counts == {"train": 18, "search": 6, "test": 6}
    assert packed.num_classes == 2
    assert "train.lmdb" in packed.splits["search"].origin
    assert list_datasets() == ("digit-scenes", "imagefolder:noise", "lmdb:noise")


def test_a_single_file_is_a_dataset_of_its_own(root, tmp_path):
    write_noise(tmp_path / "elsewhere", 10)
    write_lmdb(tmp_path / "elsewhere", root / "noise.lmdb")

    assert list_datasets() == ("digit-scenes", "lmdb:noise.lmdb")
    counts = {split: info.num_images for split, info in dataset_info("lmdb:noise.lmdb").splits.items()}
    assert counts == {"train": 10, "search": 5, "test": 5}


@pytest.mark.parametrize("scheme", ["", "  scheme: lmdb\n"])
def test_the_settings_name_lmdb_files_as_they_name_folders(root, tmp_path, monkeypatch, scheme):
    both(root)
    settings = tmp_path / "datasets.yaml"
    text = f"packed:\n  path: data/noise\n{scheme}  splits: {{train: train.lmdb, test: val.lmdb}}\n"
    settings.write_text(text + "loose:\n  path: data/noise\n  splits: {train: train, test: val}\n")
    monkeypatch.setenv("PRUNEFRONT_DATASETS", str(settings))

    for split in ("train", "search", "test"):
        packed = open_split("packed", split, data_config=DATA_CONFIG)
        loose = open_split("loose", split, data_config=DATA_CONFIG)
        assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(packed, loose, strict=True))


def test_labels_agree_between_files_that_lack_a_class(root):
    write_images(root / "grey" / "train", [8, 8, 8])
    write_images(root / "grey" / "val", [2, 2, 2])
    for image in (root / "grey" / "val" / "class_0").iterdir():
        image.unlink()
    for split in ("train", "val"):
        write_lmdb(root / "grey" / split, root / "grey" / f"{split}.lmdb")

    packed = open_split("lmdb:grey", "test", data_config=DATA_CONFIG)
    assert [label for _, label in packed] == [1, 1, 2, 2]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # a test process may have one core
def test_loader_processes_open_the_file_themselves(root):
    both(root)
    arguments = {"data_config": DATA_CONFIG, "train": True, "augmentation": Augmentation()}
    packed = open_split("lmdb:noise", "train", **arguments)
    folder = open_split("imagefolder:noise", "train", **arguments)
    packed[0]  # opened here, which must not reach the workers

    shared = list(training_batches(packed, batch_size=4, seed=3, epoch=1, num_workers=2))
    alone = list(training_batches(folder, batch_size=4, seed=3, epoch=1))
    assert len(shared) == 4
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(shared, alone, strict=True))


def test_a_reader_is_small_when_it_is_sent_to_a_process(tmp_path):
    write_images(tmp_path / "grey", [200])
    write_lmdb(tmp_path / "grey", tmp_path / "grey.lmdb")
    reader = LmdbReader(tmp_path / "grey.lmdb")
    assert len(reader.filenames()) == 200

    sent = pickle.dumps(reader)
    assert len(sent) < 1_000
    assert pickle.loads(sent)[7][0].read() == reader[7][0].read()


def test_a_file_that_was_replaced_by_other_images_is_noticed(tmp_path):
    write_noise(tmp_path / "first", 3)
    write_noise(tmp_path / "second", 3, seed=5)
    write_lmdb(tmp_path / "first", tmp_path / "images.lmdb")
    reader = LmdbReader(tmp_path / "images.lmdb")
    sent, before = pickle.dumps(reader), reader[2][0].read()
    write_lmdb(tmp_path / "second", tmp_path / "images.lmdb", overwrite=True)

    assert reader[2][0].read() == before  # the file that was opened, not half of each
    with pytest.raises(DatasetError, match="was replaced meanwhile"):
        pickle.loads(sent)[0]
    after = LmdbReader(tmp_path / "images.lmdb")[2][0].read()
    assert after == (tmp_path / "second" / "class_0" / "2.png").read_bytes() != before


def test_a_file_stands_only_when_it_is_whole(tmp_path, monkeypatch):
    write_images(tmp_path / "grey", [5, 5])
    (tmp_path / "grey" / "class_1" / "3.png").unlink()
    (tmp_path / "grey" / "class_1" / "3.png").symlink_to(tmp_path / "nowhere")

    with pytest.raises(DatasetError, match=r"class_1/3\.png.*Repair or remove"):
        write_lmdb(tmp_path / "grey", tmp_path / "out" / "grey.lmdb")
    (tmp_path / "grey" / "class_1" / "3.png").unlink()

    def stop(done: float, total: float, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lmdb(tmp_path / "grey", tmp_path / "out" / "grey.lmdb", progress=stop)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_file_is_replaced_only_when_told(tmp_path):
    write_images(tmp_path / "grey", [2, 2])
    target = tmp_path / "grey.lmdb"
    target.write_text("precious")

    with pytest.raises(FileWriteError, match=r"exists already.*--force"):
        write_lmdb(tmp_path / "grey", target)
    assert target.read_text() == "precious"
    assert write_lmdb(tmp_path / "grey", target, overwrite=True).num_images == 4
    assert len(LmdbReader(target)) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grey", "grey.lmdb"]


def test_progress_ends_with_all_images(tmp_path):
    write_images(tmp_path / "grey", [150, 100])
    seen: list[tuple[float, float]] = []

    write_lmdb(tmp_path / "grey", tmp_path / "grey.lmdb", progress=lambda done, total, text: seen.append((done, total)))
    assert seen == [(100, 250), (200, 250), (250, 250)]


def test_a_folder_that_cannot_be_one_split_is_refused(tmp_path):
    write_images(tmp_path / "grey" / "train", [2, 2])
    write_images(tmp_path / "grey" / "val", [2, 2])
    (tmp_path / "empty").mkdir()

    with pytest.raises(DatasetError, match=r"has several in it \(train, val\)"):
        write_lmdb(tmp_path / "grey", tmp_path / "grey.lmdb")
    with pytest.raises(DatasetError, match="it has no images"):
        write_lmdb(tmp_path / "empty", tmp_path / "grey.lmdb")
    with pytest.raises(DatasetError, match="there is no such folder"):
        write_lmdb(tmp_path / "absent", tmp_path / "grey.lmdb")
    with pytest.raises(ConfigError, match=r"Call it grey\.mdb\.lmdb"):
        write_lmdb(tmp_path / "grey" / "train", tmp_path / "grey.mdb")
    assert not (tmp_path / "grey.lmdb").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file_is_one_sentence_and_no_crash(root, share):
    write_images(root / "grey" / "train", [40, 40])
    target = root / "grey" / "train.lmdb"
    size = write_lmdb(root / "grey" / "train", target).size_bytes
    os.truncate(target, int(share * size))

    with pytest.raises(DatasetError, match=r"Expected an LMDB .*train\.lmdb is not one: .*Build it again with"):
        check_dataset("lmdb:grey")
    with pytest.raises(DatasetError, match="is not one"):
        open_split("lmdb:grey", "train", data_config=DATA_CONFIG)


def test_a_foreign_file_is_one_sentence(root):
    target = root / "grey" / "train.lmdb"
    target.parent.mkdir()
    target.write_bytes(os.urandom(20_000))
    with pytest.raises(DatasetError, match="is not one: MDB_INVALID"):
        check_dataset("lmdb:grey")

    target.unlink()
    with lmdb.open(str(target), subdir=False, lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"0", pickle.dumps((b"jpeg", 3)))
    with pytest.raises(DatasetError, match="it holds no description of images"):
        check_dataset("lmdb:grey")


def test_a_file_of_another_version_or_with_missing_records_is_refused(tmp_path):
    write_images(tmp_path / "grey", [2, 2])
    target = tmp_path / "grey.lmdb"
    write_lmdb(tmp_path / "grey", target)

    def change(key: bytes, value: bytes | None) -> None:
        with lmdb.open(str(target), subdir=False, lock=False, map_size=2**24) as environment:
            with environment.begin(write=True) as transaction:
                transaction.delete(key) if value is None else transaction.put(key, value)

    with lmdb.open(str(target), subdir=False, readonly=True, lock=False) as environment:
        with environment.begin() as transaction:
            meta = json.loads(transaction.get(b"meta"))
    change(b"meta", json.dumps({**meta, "version": 2}).encode())
    with pytest.raises(DatasetError, match="its format version is 2, and this prunefront reads 1"):
        LmdbReader(target)
    change(b"meta", json.dumps(meta).encode())
    change(b"\0\0\0\0\0\0\0\3", None)
    with pytest.raises(DatasetError, match="it has 3 of the 4 images it promises"):
        LmdbReader(target)


def test_a_dataset_without_lmdb_files_says_how_to_make_them(root):
    write_images(root / "grey" / "train", [2, 2])

    with pytest.raises(DatasetError, match=r"files such as train\.lmdb .*prunefront data lmdb"):
        check_dataset("lmdb:grey")
    with pytest.raises(DatasetError, match="Leave out"):
        check_dataset("lmdb:../data/grey")
    with pytest.raises(UnknownNameError, match="Unknown dataset scheme 'lmdb'"):
        check_dataset("timm:lmdb/grey")


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    write_images(tmp_path / "grey", [2])
    monkeypatch.setitem(sys.modules, "lmdb", None)

    with pytest.raises(MissingExtraError, match="pip install lmdb"):
        write_lmdb(tmp_path / "grey", tmp_path / "grey.lmdb")


def test_the_command_packs_a_folder_and_inspect_reads_it(root, capfd):
    write_noise(root / "noise" / "train", 8)
    line = ["data", "lmdb", str(root / "noise" / "train"), str(root / "noise" / "train.lmdb")]

    assert run([*line, "--json"]) == 0
    made = json.loads(capfd.readouterr().out)
    assert made["num_images"] == 16 and made["classes"] == ["class_0", "class_1"] and made["format_version"] == 1
    assert made["size_bytes"] == (root / "noise" / "train.lmdb").stat().st_size
    assert run(line) == 2
    assert "exists already" in capfd.readouterr().err
    assert run([*line, "--force"]) == 0
    capfd.readouterr()
    assert run(["data", "inspect", "lmdb:noise", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["splits"]["train"]["num_images"] == 8


def test_evaluation_reads_every_image_of_a_file_once(root):
    both(root, val=5)

    packed = open_split("lmdb:noise", "test", data_config=DATA_CONFIG)
    labels = torch.cat([labels for _, labels in evaluation_batches(packed, 3)]).tolist()
    assert labels == [0] * 5 + [1] * 5
