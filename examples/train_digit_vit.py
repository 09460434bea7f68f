"""Train the demo model ``digit_vit_patch6_48`` on ``digit-scenes``: how the weights inside the package were made.

    python examples/train_digit_vit.py --out digit_vit_patch6_48.safetensors

AdamW with a one-cycle learning rate, plain cross-entropy, 3,600 steps of 50 scenes: about 20 minutes on two idle CPU
cores. A run that was interrupted continues where its last checkpoint (``OUT.partial.pt``) was written.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional

import prunefront.backbones
from prunefront.training.digit_scenes import num_scenes, render_scenes

MODEL_NAME = prunefront.backbones.digit_vit_patch6_48.__name__
CHECKPOINT_EVERY_STEPS = 100

_log = logging.getLogger("train_digit_vit")


def training_batch(step: int, batch_size: int, seed: int, mean: float, std: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Render the scenes of one step; epochs follow each other in a seeded order, a fresh rendering each."""
    steps_per_epoch = num_scenes("train") // batch_size
    epoch, place = divmod(step, steps_per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(num_scenes("train"))
    scenes = render_scenes("train", order[place * batch_size : (place + 1) * batch_size], epoch)
    images = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).float().div(255).sub(mean).div(std)
    return images, torch.from_numpy(scenes.labels)


def train(model: VisionTransformer, args: argparse.Namespace, checkpoint_path: Path) -> None:
    """Train ``model`` in place, resuming from ``checkpoint_path`` when it exists."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.2)
    first_step, mean, std = 0, model.pretrained_cfg["mean"][0], model.pretrained_cfg["std"][0]
    if checkpoint_path.exists():
        state = torch.load(checkpoint_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        first_step = state["step"]
        _log.info("resume at step %d", first_step)
    model.train()
    started, losses = time.monotonic(), []
    for step in range(first_step, args.steps):
        images, labels = training_batch(step, args.batch_size, args.seed, mean, std)
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        done = step + 1
        if done % CHECKPOINT_EVERY_STEPS == 0 or done == args.steps:
            seconds = time.monotonic() - started
            _log.info("step %d: loss %.4f, %.0f s", done, float(np.mean(losses[-CHECKPOINT_EVERY_STEPS:])), seconds)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "step": done,
            }
            torch.save(state, f"{checkpoint_path}.tmp")
            os.replace(f"{checkpoint_path}.tmp", checkpoint_path)


def main() -> None:
    """Train, then write the weights and the record beside them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(f"{MODEL_NAME}.safetensors"))
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(args.seed)
    model = timm.create_model(MODEL_NAME)
    train(model, args, args.out.with_name(f"{args.out.name}.partial.pt"))


if __name__ == "__main__":
    main()
