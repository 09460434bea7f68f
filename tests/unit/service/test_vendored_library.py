"""The vendored chart library is the one whose hash and licence lie beside it."""

from __future__ import annotations

import hashlib

from service.web import STATIC_DIR

FOLDER = STATIC_DIR / "vendor" / "echarts"
MAX_BYTES = 1_200_000


def test_file_has_the_recorded_hash_and_its_licence_lies_beside_it() -> None:
    digest, name = (FOLDER / "SHA256SUMS").read_text().split()
    content = (FOLDER / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
    assert len(content) <= MAX_BYTES
    assert "Apache License" in (FOLDER / "LICENSE").read_text()


def test_own_pages_load_nothing_from_elsewhere() -> None:
    folders = (STATIC_DIR / "js", STATIC_DIR.parent / "templates")
    for path in (*(file for folder in folders for file in folder.iterdir()), STATIC_DIR / "style.css"):
        text = path.read_text(encoding="utf-8")
        assert "http://" not in text and "https://" not in text and 'src="//' not in text, path
