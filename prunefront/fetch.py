"""Downloads of weights: over https alone, and given their name only when they are the bytes that were asked for."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunefront.errors import CheckpointError, ConfigError, MissingExtraError
from prunefront.files import replacing

if TYPE_CHECKING:
    import httpx

MAX_REDIRECTS = 10
TIMEOUT_S = 60.0  # to connect, and between two pieces
_PIECE_BYTES = 1 << 20

Progress = Callable[[float, float, str], None]


def fetch(
    url: str,
    out: str | os.PathLike[str] | None = None,
    *,
    sha256: str,
    transport: httpx.BaseTransport | None = None,
    progress: Progress | None = None,
) -> Path:
    """Download a file, checked against its SHA-256 before it gets its name.

    Args:
        url: An https address. Redirects are followed to https addresses alone.
        out: Where to write it; the address's last part in the working folder when left out.
        sha256: Expected hash, 64 hexadecimal digits.
        transport: Another httpx transport, for tests.
        progress: Called with (bytes done, all bytes or 0, text).

    Returns:
        The file. One that is there already with this hash is left alone, and nothing is downloaded.

    Raises:
        ConfigError: If the address is not https, the hash is not one, or another file is in the way.
        CheckpointError: If the download fails or its hash is another; nothing is left behind.
        FileWriteError: If the file cannot be written.
        MissingExtraError: If httpx is not installed.
    """
    try:
        import httpx
    except ImportError as error:
        raise MissingExtraError("Downloads need httpx; install it with `pip install httpx`.") from error

    expected = sha256.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{64}", expected):
        raise ConfigError(f"A SHA-256 has 64 hexadecimal digits, but got {sha256!r}. Copy it from a source you trust.")
    address = _https(url)
    target = Path(out) if out is not None else Path(address.path.rsplit("/", 1)[-1])
    if not target.name:
        raise ConfigError(f"{url} names no file. Give --out FILE.")
    if target.is_dir():
        raise ConfigError(f"{target} is a folder. Name a file in it.")
    if target.exists():
        if _hash_of(target) == expected:
            return target
        raise ConfigError(f"{target} exists and is another file. Move it away, or name another.")
    try:
        with httpx.Client(transport=transport, timeout=TIMEOUT_S, follow_redirects=False) as client:
            _download(client, address, target, expected, progress)
    except httpx.HTTPError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{url} could not be downloaded: {reason}. Check the network and the address.") from error
    return target


def fetch_cached(
    url: str,
    *,
    sha256: str,
    transport: httpx.BaseTransport | None = None,
    progress: Progress | None = None,
) -> Path:
    """`fetch` into torch's cache of weights (``TORCH_HOME``), once per hash and name.

    Raises:
        As `fetch` does.
    """
    import torch

    name = url.partition("?")[0].partition("#")[0].rsplit("/", 1)[-1] or "weights"
    target = Path(torch.hub.get_dir()) / "checkpoints" / sha256.strip().lower() / name
    return fetch(url, target, sha256=sha256, transport=transport, progress=progress)


def _download(client: Any, address: Any, target: Path, expected: str, progress: Progress | None) -> None:
    url = str(address)
    for _ in range(MAX_REDIRECTS + 1):
        with client.stream("GET", address, headers={"Accept-Encoding": "identity"}) as response:
            if response.next_request is not None:
                address = _https(str(response.next_request.url), came_from=url)
                continue
            if response.status_code != 200:
                raise CheckpointError(
                    f"{address} should answer 200 with a file, but answered {response.status_code} "
                    f"{response.reason_phrase}. Check the address."
                )
            total = int(response.headers.get("content-length", 0))
            digest, done = hashlib.sha256(), 0
            with replacing(target) as file:
                for piece in response.iter_bytes(_PIECE_BYTES):
                    file.write(piece)
                    digest.update(piece)
                    done += len(piece)
                    if progress is not None:
                        progress(done, total, f"{done / 2**20:.1f} MiB")
                if digest.hexdigest() != expected:
                    raise CheckpointError(
                        f"{address} should have the SHA-256 {expected}, but has {digest.hexdigest()}. Nothing was "
                        "kept; do not use the file unless you know why it changed."
                    )
            return
    raise CheckpointError(f"{url} redirects more than {MAX_REDIRECTS} times. Check the address.")


def _https(url: str, came_from: str | None = None) -> Any:
    import httpx

    try:
        address = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError(f"Expected an https address, but got {url!r}: {error}.") from error
    if address.scheme != "https" or not address.host:
        where = f"{came_from} redirects to {url}" if came_from else f"got {url}"
        raise ConfigError(f"Weights are downloaded over https alone, but {where}. Use an https address.")
    return address


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
