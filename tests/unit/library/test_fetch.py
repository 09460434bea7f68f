"""Downloads get their name when their hash is right, and never come over plain http."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from prunefront.cli.app import run
from prunefront.errors import CheckpointError, ConfigError
from prunefront.fetch import fetch

WEIGHTS = bytes(range(256)) * 5000  # more than one piece
HASH = hashlib.sha256(WEIGHTS).hexdigest()
URL = "https://weights.example/released/evit.pth"


def served(request: httpx.Request) -> httpx.Response:
    """A server with one file, an address that moved to it, and some that lead astray."""
    moved = {"/moved": URL, "/relative": "/released/evit.pth", "/plain": "http://weights.example/released/evit.pth"}
    moved["/loop"] = "https://weights.example/loop"
    path = request.url.path
    if path in moved:
        return httpx.Response(302, headers={"location": moved[path]})
    if path == "/cut":
        raise httpx.RemoteProtocolError("peer closed connection without sending complete message body")
    return httpx.Response(200, content=WEIGHTS) if path == "/released/evit.pth" else httpx.Response(404)


TRANSPORT = httpx.MockTransport(served)


@pytest.mark.parametrize("url", [URL, "https://weights.example/moved", "https://weights.example/relative"])
def test_a_file_with_the_right_hash_gets_its_name(url: str, tmp_path: Path) -> None:
    told: list[tuple[float, float]] = []

    path = fetch(
        url, tmp_path / "new" / "w.pth", sha256=HASH.upper(), transport=TRANSPORT,
        progress=lambda done, total, message: told.append((done, total)),
    )  # fmt: skip

    assert path.read_bytes() == WEIGHTS
    assert [entry.name for entry in path.parent.iterdir()] == ["w.pth"]
    assert told[-1] == (len(WEIGHTS), len(WEIGHTS)) and len(told) > 1


def test_a_wrong_hash_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"should have the SHA-256 {'0' * 64}, but has {HASH}"):
        fetch(URL, tmp_path / "w.pth", sha256="0" * 64, transport=TRANSPORT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "sha256", "error", "sentence"),
    [
        ("http://weights.example/released/evit.pth", HASH, ConfigError, "over https alone, but got http:"),
        ("ftp://weights.example/e.pth", HASH, ConfigError, "over https alone"),
        ("released/evit.pth", HASH, ConfigError, "over https alone"),
        ("https://weights.example/plain", HASH, ConfigError, "/plain redirects to http://weights.example/released"),
        (URL, "", ConfigError, "64 hexadecimal digits, but got ''"),
        (URL, HASH[:-1], ConfigError, "64 hexadecimal digits"),
        ("https://weights.example/nope", HASH, CheckpointError, "answered 404 Not Found"),
        ("https://weights.example/loop", HASH, CheckpointError, "redirects more than 10 times"),
        ("https://weights.example/cut", HASH, CheckpointError, "could not be downloaded: peer closed connection"),
    ],
)
def test_what_cannot_be_trusted_or_had_is_refused(
    url: str, sha256: str, error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=sentence):
        fetch(url, tmp_path / "w.pth", sha256=sha256, transport=TRANSPORT)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    never: Callable[[httpx.Request], httpx.Response] = lambda request: pytest.fail("asked the network")  # noqa: E731
    target = tmp_path / "w.pth"
    target.write_bytes(WEIGHTS)

    assert fetch(URL, target, sha256=HASH, transport=httpx.MockTransport(never)) == target
    with pytest.raises(ConfigError, match=r"w\.pth exists and is another file"):
        fetch(URL, target, sha256="0" * 64, transport=httpx.MockTransport(never))
    assert target.read_bytes() == WEIGHTS


def test_the_command_writes_the_addresss_last_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("httpx.HTTPTransport.handle_request", lambda self, request: served(request))
    monkeypatch.chdir(tmp_path)

    assert run(["models", "fetch", URL, "--sha256", HASH]) == 0
    assert (tmp_path / "evit.pth").read_bytes() == WEIGHTS
    assert HASH in capfd.readouterr().out
    assert run(["models", "fetch", URL]) == 2
    assert "Missing option '--sha256'" in capfd.readouterr().err


def test_models_without_a_command_lists(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "deit_tiny"]) == 0
    listed = capfd.readouterr().out
    assert run(["models", "list", "deit_tiny"]) == 0
    assert capfd.readouterr().out == listed
    assert "deit_tiny_patch16_224" in listed.splitlines()
