"""Latency tables and devices."""

from __future__ import annotations

from typing import Any

import pytest

from store import NotFoundError, Store, TableRecord

KEY: dict[str, Any] = {
    "fingerprint": "cpu-abc",
    "block_key": "w192h4",
    "runtime": "eager",
    "dtype": "fp32",
    "batch_size": 8,
}


def save(store: Store, document: dict[str, Any] | None = None, **fields: Any) -> TableRecord:
    values: dict[str, Any] = {"name": "cpu eager", "device_name": "Some CPU", "source": "import"}
    return store.save_table(document or {"format": "prunefront/latency-table/1"}, **(values | KEY | fields))


def test_the_newest_table_of_a_key_is_found(store: Store) -> None:
    save(store, {"entries": [1]})
    newest = save(store, {"entries": [2]})
    assert store.find_table(**KEY) == newest
    assert store.get_table(newest.id).document == {"entries": [2]}


@pytest.mark.parametrize(
    "change", [{"fingerprint": "x"}, {"block_key": "x"}, {"runtime": "x"}, {"dtype": "x"}, {"batch_size": 1}]
)
def test_a_table_serves_only_its_own_key(store: Store, change: dict[str, Any]) -> None:
    save(store)
    assert store.find_table(**(KEY | change)) is None


def test_tables_are_listed_newest_first(store: Store) -> None:
    tables = [save(store, {"index": index}) for index in range(3)]
    page, cursor = store.list_tables(limit=2)
    assert page == tables[:0:-1]
    assert store.list_tables(limit=2, cursor=cursor) == ([tables[0]], None)


def test_a_deleted_table_is_gone(store: Store) -> None:
    older, newer = save(store), save(store)
    store.delete_table(newer.id)
    assert store.find_table(**KEY) == older
    for call in (store.get_table, store.delete_table):
        with pytest.raises(NotFoundError, match="no latency table"):
            call(newer.id)


@pytest.mark.parametrize("name", ["nope", "\x00", "\ud800"])
def test_unknown_tables_and_devices_are_not_found(store: Store, name: str) -> None:
    for call in (store.get_table, store.delete_table, store.get_device):
        with pytest.raises(NotFoundError, match="There is no"):
            call(name)


def test_a_device_registered_again_is_updated(store: Store) -> None:
    first = store.save_device("cpu", "Some CPU", "cpu", {"threads": 2})
    store.save_device("board", "Some board", "cuda", {})
    again = store.save_device("cpu", "Some CPU", "cpu", {"threads": 4})
    assert again.created_at == first.created_at and again.info == {"threads": 4}
    assert store.get_device("cpu") == again
    assert [device.id for device in store.list_devices()] == ["board", "cpu"]
