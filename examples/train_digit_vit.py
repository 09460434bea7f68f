"""Train the demo model ``digit_vit_patch6_48`` on ``digit-scenes``: how the weights inside the package were made.

    python examples/train_digit_vit.py --out digit_vit_patch6_48.safetensors

AdamW with a one-cycle learning rate, plain cross-entropy, 3,600 steps of 50 scenes: about 20 minutes on two idle CPU
cores. A run that was interrupted continues where its last checkpoint (``OUT.partial.pt``) was written.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional

import prunefront
from prunefront.files import write_atomic, write_json_atomic
from prunefront.training.data import SPLITS, SplitName, data_config_of, open_split
from prunefront.training.digit_scenes import num_scenes, render_scenes
from prunefront.training.evaluate import evaluate
from prunefront.training.statistics import top1_interval

MODEL_NAME = "digit_vit_patch6_48"
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
        loss.backward()  # type: ignore[no-untyped-call]
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
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_atomic(checkpoint_path, buffer.getvalue())


def write_weights(model: VisionTransformer, path: Path) -> None:
    """Store the weights as fp16 safetensors, and round the model to what was stored."""
    state = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(path, safetensors.torch.save(state, metadata={"format": "pt"}))
    model.load_state_dict(state)


def accuracy(model: VisionTransformer, split: SplitName) -> dict[str, Any]:
    """Evaluate on a whole split; the interval is clustered by source digit."""
    dataset = open_split("digit-scenes", split, data_config=data_config_of(model))
    result = evaluate(model, dataset, batch_size=50)
    low, high = top1_interval(result.correct, dataset.clusters)
    return {"num_images": result.num_images, "top1": result.top1, "top1_ci": [low, high], "loss": result.loss}


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
    checkpoint_path = args.out.with_name(f"{args.out.name}.partial.pt")
    train(model, args, checkpoint_path)
    write_weights(model, args.out)
    record = {
        "model": MODEL_NAME,
        "dataset": "digit-scenes",
        "command": " ".join(["python", "examples/train_digit_vit.py", *sys.argv[1:]]),
        **{key: value for key, value in vars(args).items() if key != "out"},
        "sha256": hashlib.sha256(args.out.read_bytes()).hexdigest(),
        "stored_as": "float16",
        "versions": {
            "prunefront": prunefront.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
        },
        "accuracy": {split: accuracy(model, split) for split in SPLITS if split != "train"},
    }
    write_json_atomic(args.out.with_suffix(".json"), record)
    for split, result in record["accuracy"].items():
        low, high = result["top1_ci"]
        _log.info("%s: top-1 %.4f (95 %% interval %.4f to %.4f)", split, result["top1"], low, high)
    checkpoint_path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
