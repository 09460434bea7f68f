"""Models that timm lacks; importing this package registers them with timm."""

from prunefront.backbones.digit_vit import digit_vit_patch6_48
from prunefront.backbones.lvvit import lvvit_l, lvvit_m, lvvit_s, lvvit_t

# timm's modules, and ours, of models whose blocks are all alike: one latency table serves them, a search can take them.
MODULES_OF_EQUAL_BLOCKS = ("vision_transformer", "deit", "eva", "digit_vit", "lvvit")
SUPPORTED_MODULES = (*MODULES_OF_EQUAL_BLOCKS, "swin_transformer")

__all__ = [
    "MODULES_OF_EQUAL_BLOCKS",
    "SUPPORTED_MODULES",
    "digit_vit_patch6_48",
    "lvvit_l",
    "lvvit_m",
    "lvvit_s",
    "lvvit_t",
]
