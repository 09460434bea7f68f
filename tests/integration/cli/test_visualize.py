"""`prunefront visualize` as a user types it, on the demo model and its dataset."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import prunefront
from prunefront.cli.app import run
from prunefront.visualize import CAPTION_PX, GAP_PX

MODEL = "digit_vit_patch6_48"
TILE = 240  # 48 px, enlarged fivefold
PATCH = TILE // 8


def new_config(folder: Path, method: str, *amount: str) -> Path:
    path = folder / f"{method}.json"
    line = ["config", "new", "--model", MODEL, "--method", method, "--at", "1,3", *amount, "--out", str(path)]
    assert run(line) == 0
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return new_config(tmp_path, "evit", "--op", "prune", "--keep-ratio", "0.5")


def test_dropped_patches_are_dark_where_the_numbers_say_so(tmp_path: Path, config: Path) -> None:
    out = tmp_path / "pictures"

    assert run(["visualize", str(config), "--dataset", "digit-scenes", "--index", "3", "--out", str(out)]) == 0

    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "image_3.png", "tokens.json"]
    picture = np.asarray(Image.open(out / "image_3.png"))
    assert picture.shape == (TILE + CAPTION_PX + 2 * GAP_PX, 3 * (TILE + GAP_PX) + GAP_PX, 3)
    (entry,) = json.loads((out / "tokens.json").read_text())["images"]
    assert (entry["index"], [site["counts"]["kept"] for site in entry["sites"]]) == (3, [32, 16])
    tiles = [
        picture[GAP_PX + CAPTION_PX :, GAP_PX + number * (TILE + GAP_PX) :][:TILE, :TILE].astype(int)
        for number in range(3)
    ]
    for tile, site in zip(tiles[1:], entry["sites"], strict=True):
        is_dropped = np.kron(np.array(site["states"]) == 0, np.ones((PATCH, PATCH), dtype=bool))
        assert (tile[~is_dropped] == tiles[0][~is_dropped]).all()
        assert (tile[is_dropped] <= tiles[0][is_dropped] * 0.15 + 0.51).all()


def test_the_same_command_writes_the_same_bytes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    selecting = new_config(tmp_path, "spvit", "--cumulative-keep-ratio", "0.5")
    files = []
    for name in ("once", "again"):
        line = [
            "visualize",
            str(selecting),
            "--dataset",
            "digit-scenes",
            "--images",
            "2",
            "--out",
            str(tmp_path / name),
        ]
        capfd.readouterr()
        assert run([*line, "--out", str(tmp_path / name), "--json"]) == 0
        captured = capfd.readouterr()
        assert "random weights" in captured.err
        assert json.loads(captured.out)["images"][1]["index"] == 2100
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})

    assert files[0] == files[1]
    assert len(files[0]) == 4


def test_files_of_a_folder_can_be_shown_by_a_saved_model(tmp_path: Path, config: Path) -> None:
    folder, saved = tmp_path / "photos", tmp_path / "saved.safetensors"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (60, 50), (40 * number, 90, 120)).save(folder / f"{number}.png")
    torch.manual_seed(0)
    prunefront.save_model(prunefront.create_model(config), saved)
    out = tmp_path / "pictures"

    assert run(["visualize", str(saved), "--image", str(folder), "--images", "2", "--out", str(out)]) == 0

    entries = json.loads((out / "tokens.json").read_text())["images"]
    assert [Path(entry["source"]).name for entry in entries] == ["0.png", "1.png"]
    assert [entry["label"] for entry in entries] == [None, None]
    assert (out / "image_1.png").is_file()


def test_pictures_of_a_longer_run_before_go_and_other_files_stay(
    tmp_path: Path, config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures"
    line = ["visualize", str(config), "--dataset", "digit-scenes", "--out", str(out)]
    assert run([*line, "--index", "1", "--index", "2", "--index", "3"]) == 0
    former = (out / "image_2.png").read_bytes()
    for mine in ("image_99.png", "notes.txt", "image_.png"):
        (out / mine).write_text("mine")

    capfd.readouterr()
    assert run([*line, "--index", "2"]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"grid.png", "image_2.png", "tokens.json", "image_99.png", "notes.txt", "image_.png"}
    assert (out / "image_2.png").read_bytes() == former
    assert "Removed 2 pictures of the run before" in capfd.readouterr().err


@pytest.mark.parametrize(
    "document",
    [
        '{"format": "prunefront/tokens/1", "images": [{"file": "../image_7.png"}, {"file": "cat.png"}]}',
        '{"format": "other/1", "images": [{"file": "image_7.png"}]}',
        '{"format": "prunefront/tokens/1", "images": [{"name": "image_7.png"}]}',
        '[{"file": "image_7.png"}]',
        "not JSON",
    ],
)
def test_a_document_that_is_not_ours_removes_nothing(tmp_path: Path, config: Path, document: str) -> None:
    out = tmp_path / "pictures"
    out.mkdir()
    mine = [tmp_path / "image_7.png", out / "image_7.png", out / "cat.png"]
    for path in mine:
        path.write_text("mine")
    (out / "tokens.json").write_text(document)

    assert run(["visualize", str(config), "--dataset", "digit-scenes", "--index", "2", "--out", str(out)]) == 0

    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert json.loads((out / "tokens.json").read_text())["images"][0]["file"] == "image_2.png"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dataset", "digit-scenes", "--index", "99999"], "has images 0 to 4199, but got --index 99999"),
        (["--dataset", "digit-scenes", "--index", "1", "--images", "2"], "give one of the two"),
        (["--image", "missing.png"], "The image missing.png does not exist"),
        (["--image", "broken.png"], "The image 'broken.png' cannot be decoded: it has no known image format. Repair"),
        (["--image", "cut.png"], "The image 'cut.png' cannot be decoded: "),
        (["--image", "empty"], "The folder empty has no image files"),
        (["--image", "broken.png", "--dataset", "digit-scenes"], "only one of the two"),
        ([], "Name images to show"),
    ],
)
def test_what_cannot_be_shown_is_said_in_a_sentence(
    tmp_path: Path,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.png").write_bytes(b"no picture")
    Image.new("RGB", (60, 50)).save("whole.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:60])
    Path("empty").mkdir()

    assert run(["visualize", str(config), "--out", "pictures", *arguments]) == 2

    error = capfd.readouterr().err
    assert sentence in error
    assert not Path("pictures").exists()


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (60, 50)).save(photo)
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path == photo:
            raise PermissionError(13, "Permission denied", str(photo))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)

    assert run(["visualize", str(config), "--image", str(photo), "--out", str(tmp_path / "pictures")]) == 2

    assert f"Could not read the image {str(photo)!r}: [Errno 13] Permission denied" in capfd.readouterr().err


def test_a_dense_model_has_nothing_to_show(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert run(["visualize", MODEL, "--dataset", "digit-scenes", "--out", "pictures"]) == 2

    assert "keeps every patch" in capfd.readouterr().err
