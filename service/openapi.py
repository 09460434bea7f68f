"""The OpenAPI document: ``python -m service.openapi`` writes ``docs/openapi.json``, which a test compares."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from prunefront.files import write_atomic
from service.app import create_app
from service.settings import Settings

DEFAULT_PATH = Path(__file__).parent.parent / "docs" / "openapi.json"


def build_openapi() -> dict[str, Any]:
    """The document of the API; it depends on the code alone, not on settings."""
    return create_app(Settings(data_dir=Path("unused"))).openapi()


def render_openapi() -> str:
    """The document as text, stable in its order."""
    return json.dumps(build_openapi(), indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write the document and say where."""
    parser = argparse.ArgumentParser(prog="python -m service.openapi", description="Write the OpenAPI document.")
    parser.add_argument(
        "path", nargs="?", type=Path, default=DEFAULT_PATH, help="where to (default: docs/openapi.json)"
    )
    path = write_atomic(parser.parse_args(arguments).path, render_openapi())
    sys.stdout.write(f"Wrote {path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
