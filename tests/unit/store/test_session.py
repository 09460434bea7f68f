"""What the store refuses before it asks a database."""

from __future__ import annotations

from pathlib import Path

import pytest

from store import DocumentError, InvalidCursorError
from store.jobs import decode_cursor, encode_cursor, page_size
from store.models import check_document, is_storable_text


@pytest.mark.parametrize("seq", [0, 1, 10**9, 2**63 - 1])
def test_a_cursor_leads_back_to_its_place(seq: int) -> None:
    cursor = encode_cursor(seq)
    assert decode_cursor(cursor) == seq
    assert cursor.replace("-", "").replace("_", "").isalnum()


def test_a_cursor_beyond_the_integers_is_refused() -> None:
    with pytest.raises(InvalidCursorError):
        decode_cursor(encode_cursor(2**63))


@pytest.mark.parametrize(("limit", "size"), [(-1, 1), (0, 1), (1, 1), (500, 500), (501, 500)])
def test_page_sizes_stay_in_bounds(limit: int, size: int) -> None:
    assert page_size(limit) == size


@pytest.mark.parametrize("text", ["", "säge", "🌲", "\\u0000", "\x01"])
def test_most_text_can_be_stored(text: str) -> None:
    assert is_storable_text(text)
    check_document({text: [text]})


@pytest.mark.parametrize("text", ["\x00", "a\x00", "\ud83c", "\udf32", "\\\x00"])
def test_nul_and_lone_surrogates_cannot_be_stored(text: str) -> None:
    assert not is_storable_text(text)
    for document in ({"key": text}, {text: 1}, [[text]]):
        with pytest.raises(DocumentError):
            check_document(document)


def test_a_document_that_contains_itself_is_refused() -> None:
    document: dict[str, object] = {}
    document["self"] = document
    with pytest.raises(DocumentError):
        check_document(document)


def test_the_store_does_not_load_what_it_does_not_need() -> None:
    sources = [path.read_text() for path in Path(__file__).parents[3].joinpath("store").rglob("*.py")]
    assert not any("import torch" in source or "from prunefront import" in source for source in sources)
