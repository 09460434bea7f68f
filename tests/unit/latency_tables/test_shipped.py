"""Tables that come with prunefront: by name, from the folder of their machine."""

import tomllib
from pathlib import Path

import pathspec
import pytest

from latency_tables import shipped
from latency_tables.errors import LatencyTableError
from latency_tables.schema import load_table, save_table
from latency_tables.shipped import file_to_ship, shipped_tables
from tests.unit.latency_tables.fakes import DEVICE, simple_table

ROOT = Path(__file__).parents[3]
NAME = "shipped:abacus-3000-2-threads/vit_tiny_patch16_224-eager-fp32-b8"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shipped, "DATA", tmp_path / "data")
    return tmp_path / "data"


def test_a_table_in_its_machines_folder_is_listed_and_read_by_name(data: Path) -> None:
    assert shipped_tables() == ()
    small, large = simple_table(), simple_table(batch_size=64, device=DEVICE.model_copy(update={"name": "Abacus 2"}))
    for table in (small, large):
        save_table(table, file_to_ship(table))
    (data / "README.md").write_text("about")
    assert shipped_tables() == ("shipped:abacus-2-2-threads/vit_tiny_patch16_224-eager-fp32-b64", NAME)
    assert load_table(NAME) == load_table(Path(NAME)) == small
    assert load_table(shipped_tables()[0]) == large


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (NAME.replace("b8", "b1"), f"No table .*-b1' comes with this version; did you mean '{NAME}'?"),
        ("shipped:", "comes with this version. `prunefront table list` shows"),
        ("shipped:../secret", "No table 'shipped:../secret' comes with this version"),
    ],
)
def test_a_name_that_is_not_shipped_is_refused(data: Path, name: str, sentence: str) -> None:
    save_table(simple_table(), file_to_ship(simple_table()))
    save_table(simple_table(), data.parent / "secret.json")
    with pytest.raises(LatencyTableError, match=sentence):
        load_table(name)


def test_without_the_prefix_a_name_is_a_path(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_table(simple_table(), file_to_ship(simple_table()))
    monkeypatch.chdir(tmp_path)
    bare = NAME.removeprefix("shipped:")
    with pytest.raises(LatencyTableError, match=f"Cannot read latency table {bare}: No such file"):
        load_table(bare)
    save_table(simple_table(batch_size=3), bare)
    assert load_table(bare).batch_size == 3
    assert load_table(NAME).batch_size == 8


def test_a_shipped_table_is_not_written_to(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LatencyTableError, match="comes with prunefront, which is not written to"):
        save_table(simple_table(), NAME)
    assert list(tmp_path.iterdir()) == []


def test_tables_in_the_tree_are_validated_and_lie_under_their_names() -> None:
    for name in shipped_tables():
        table = load_table(name)
        assert f"shipped:{file_to_ship(table).relative_to(shipped.DATA).with_suffix('')}" == name
        assert table.validation is not None


def test_the_wheel_carries_shipped_tables() -> None:
    """hatchling puts in what lies in the packages and is not ignored by git."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".gitignore").read_text().splitlines())
    file = file_to_ship(simple_table()).relative_to(ROOT)
    assert file.parts[0] in wheel["packages"] and set(wheel) == {"packages"}
    assert not ignored.match_file(file)
