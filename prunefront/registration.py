"""Registers what timm lacks with timm: at once where timm is imported already, else the moment it is.

`import prunefront` thus makes the models known to `timm.create_model` without importing timm, and torch with it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_MODELS = "prunefront.backbones"  # importing it registers them


def register_with_timm() -> None:
    """Make ``timm.create_model`` know prunefront's models, now or as soon as timm has been imported."""
    if "timm" in sys.modules:
        importlib.import_module(_MODELS)
    else:
        sys.meta_path.insert(0, _AfterTimm())


class _AfterTimm(MetaPathFinder):
    """Finds timm as the other finders do, and imports our models once timm is there. Acts once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(_MODELS)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
