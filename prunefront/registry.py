"""Method name → implementation. A new method is a new file in ``methods/`` and one line here."""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING

from prunefront.errors import UnknownNameError

if TYPE_CHECKING:
    from prunefront.methods.base import Method

_METHODS = {
    "evit": ("prunefront.methods.evit", "EViT"),
    "ppt": ("prunefront.methods.ppt", "PPT"),
    "tome": ("prunefront.methods.tome", "ToMe"),
    "diffrate": ("prunefront.methods.diffrate", "DiffRate"),
    "dynamicvit": ("prunefront.methods.dynamicvit", "DynamicViT"),
    "spvit": ("prunefront.methods.spvit", "SPViT"),
    "trilevel": ("prunefront.methods.trilevel", "TriLevel"),
    "hybrid": ("prunefront.methods.hybrid", "Hybrid"),
}


def list_methods() -> list[str]:
    """Names that `PruneConfig.method` may have."""
    return list(_METHODS)


@cache
def get_method(name: str) -> Method:
    """The implementation behind a name.

    Raises:
        UnknownNameError: If no method has that name.
    """
    if name not in _METHODS:
        raise UnknownNameError.of("method", name, _METHODS)
    module, attribute = _METHODS[name]
    method: Method = getattr(importlib.import_module(module), attribute)()
    return method
