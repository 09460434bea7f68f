"""prunefront: latency-aware token pruning for Vision Transformers.

>>> import prunefront, timm
>>> config = prunefront.load_config("best.json")
>>> model = prunefront.compress(timm.create_model("deit_small_patch16_224", pretrained=True), config)
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from prunefront.registration import register_with_timm

if TYPE_CHECKING:
    from prunefront import official as official
    from prunefront.checkpoints import load_weights as load_weights
    from prunefront.checkpoints import save_model as save_model
    from prunefront.compress import compress as compress
    from prunefront.compress import create_dense as create_dense
    from prunefront.compress import create_model as create_model
    from prunefront.compress import is_compressed as is_compressed
    from prunefront.compress import load_model as load_model
    from prunefront.compress import uncompress as uncompress
    from prunefront.config import ModelSpec as ModelSpec
    from prunefront.config import PruneConfig as PruneConfig
    from prunefront.config import Site as Site
    from prunefront.config import load_config as load_config
    from prunefront.errors import PrunefrontError as PrunefrontError
    from prunefront.macs import macs as macs
    from prunefront.macs import macs_detail as macs_detail
    from prunefront.methods.base import Aux as Aux
    from prunefront.official import from_official as from_official
    from prunefront.published_schedules import published as published
    from prunefront.registry import list_methods as list_methods
    from prunefront.schedule import token_counts as token_counts

__version__ = "0.1.0"

# Public name -> module. torch and timm take seconds to import, which `prunefront --help`, a command that only asks a
# service, or a process that only writes jobs down would spend for nothing; so each name is looked up when it is used.
_HOMES = {
    "Aux": "prunefront.methods.base",
    "ModelSpec": "prunefront.config",
    "PruneConfig": "prunefront.config",
    "PrunefrontError": "prunefront.errors",
    "Site": "prunefront.config",
    "compress": "prunefront.compress",
    "create_dense": "prunefront.compress",
    "create_model": "prunefront.compress",
    "from_official": "prunefront.official",
    "is_compressed": "prunefront.compress",
    "list_methods": "prunefront.registry",
    "load_config": "prunefront.config",
    "load_model": "prunefront.compress",
    "load_weights": "prunefront.checkpoints",
    "macs": "prunefront.macs",
    "macs_detail": "prunefront.macs",
    "official": "prunefront.official",
    "published": "prunefront.published_schedules",
    "save_model": "prunefront.checkpoints",
    "token_counts": "prunefront.schedule",
    "uncompress": "prunefront.compress",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    value = module if module.__name__ == f"{__name__}.{name}" and not hasattr(module, name) else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps the functions `compress` and `macs` what their names mean after the modules of that name are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOMES.get(name) == value.__name__:
            value = getattr(value, name, value)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
register_with_timm()
