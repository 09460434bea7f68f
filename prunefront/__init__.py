"""prunefront: latency-aware token pruning for Vision Transformers.

>>> import prunefront, timm
>>> config = prunefront.load_config("best.json")
>>> model = prunefront.compress(timm.create_model("deit_small_patch16_224", pretrained=True), config)
"""

from prunefront import backbones as _backbones  # noqa: F401  registers models with timm
from prunefront import official
from prunefront.compress import (
    compress,
    create_dense,
    create_model,
    is_compressed,
    load_model,
    load_weights,
    save_model,
    uncompress,
)
from prunefront.config import ModelSpec, PruneConfig, Site, load_config
from prunefront.errors import PrunefrontError
from prunefront.macs import macs, macs_detail
from prunefront.methods.base import Aux
from prunefront.official import from_official
from prunefront.published_schedules import published
from prunefront.registry import list_methods
from prunefront.schedule import token_counts

__version__ = "0.1.0"

__all__ = [
    "Aux",
    "ModelSpec",
    "PruneConfig",
    "PrunefrontError",
    "Site",
    "compress",
    "create_dense",
    "create_model",
    "from_official",
    "is_compressed",
    "list_methods",
    "load_config",
    "load_model",
    "load_weights",
    "macs",
    "macs_detail",
    "official",
    "published",
    "save_model",
    "token_counts",
    "uncompress",
]
