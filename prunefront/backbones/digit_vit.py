"""The demo model: a small ViT for the 48-px scenes of ``digit-scenes``, with weights that ship inside the package.

64 patch tokens of width 192 in 6 blocks: on a CPU the tokens, not Python, take most of a forward pass, so that
pruning them shows. ``examples/train_digit_vit.py`` made the weights; the JSON beside them says how. The last part of
their training ran under random EViT schedules, so the model tolerates pruning better than most do off the shelf.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

WEIGHTS_PATH = Path(__file__).parent / "weights" / "digit_vit_patch6_48.safetensors"

# Mean and spread of the scenes' pixels, equal for the three channels.
_PIXEL_MEAN = (0.3, 0.3, 0.3)
_PIXEL_STD = (0.18, 0.18, 0.18)

default_cfgs = generate_default_cfgs(
    {
        "digit_vit_patch6_48.digit_scenes": {
            "file": str(WEIGHTS_PATH),
            "num_classes": 10,
            "input_size": (3, 48, 48),
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": _PIXEL_MEAN,
            "std": _PIXEL_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
            "label_names": tuple(str(digit) for digit in range(10)),
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def digit_vit_patch6_48(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build the demo ViT: 48 px, patch 6, width 192, 6 blocks, 3 heads, MLP ratio 2, class token, 10 classes."""
    model_args = {
        "img_size": 48,
        "patch_size": 6,
        "embed_dim": 192,
        "depth": 6,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "num_classes": 10,
        **kwargs,
    }
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer,
        "digit_vit_patch6_48",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **model_args,
    )
    return model
