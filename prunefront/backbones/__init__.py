"""Models that timm lacks; importing this package registers them with timm."""

from prunefront.backbones.digit_vit import digit_vit_patch6_48

__all__ = ["digit_vit_patch6_48"]
