"""Models that timm lacks; importing this package registers them with timm."""

from prunefront.backbones.digit_vit import digit_vit_patch6_48
from prunefront.backbones.lvvit import lvvit_l, lvvit_m, lvvit_s, lvvit_t

__all__ = ["digit_vit_patch6_48", "lvvit_l", "lvvit_m", "lvvit_s", "lvvit_t"]
