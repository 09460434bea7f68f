"""Train the demo model ``digit_vit_patch6_48`` on ``digit-scenes``: how the weights inside the package were made.

    python examples/train_digit_vit.py --out digit_vit_patch6_48.safetensors

AdamW with a one-cycle learning rate and cross-entropy on batches of 50 scenes: 3,600 steps of the dense model, then
1,500 in which three of four run under a random EViT schedule, as EViT's own training does, so that the model may be
pruned off the shelf. About 15 minutes on two idle CPU cores. A run that was interrupted continues where its last
checkpoint (``OUT.partial.pt``) was written.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import logging
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional

import prunefront
from prunefront.config import Site
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


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the training with a learning-rate cycle of its own."""

    steps: int
    lr: float
    is_pruned: bool
    weights_sha256: str | None = None  # of the weights it ended with, where they were given


def random_schedule(step: int, seed: int, depth: int) -> list[Site]:
    """EViT sites of one step: none in a quarter of the steps, else one to three with keep ratios of 0.35 to 1."""
    draw = random.Random(f"{seed}:{step}")
    if draw.random() < 0.25:
        return []
    # Reducing in the last block saves little, so it is never asked for.
    blocks = sorted(draw.sample(range(depth - 1), draw.choice((1, 2, 2, 3))))
    op = draw.choice(("prune", "fuse"))
    return [Site(block=block, op=op, keep_ratio=draw.uniform(0.35, 1.0)) for block in blocks]


def train(model: VisionTransformer, phases: list[Phase], args: argparse.Namespace, checkpoint_path: Path) -> None:
    """Train ``model`` in place, resuming from ``checkpoint_path`` when it exists."""
    # The compressed model shares its parameters with the dense one.
    compressed = prunefront.compress(
        model, {"format": "prunefront/config/1", "model": {"name": MODEL_NAME}, "method": "evit", "sites": []}
    )
    compressed.train()
    mean, std = model.pretrained_cfg["mean"][0], model.pretrained_cfg["std"][0]
    saved = torch.load(checkpoint_path, weights_only=True) if checkpoint_path.exists() else None
    before = 0  # steps of earlier phases
    for number, phase in enumerate(phases):
        if phase.steps == 0 or phase.weights_sha256 is not None:
            before += phase.steps
            continue
        optimizer = torch.optim.AdamW(model.parameters(), lr=phase.lr, weight_decay=args.weight_decay)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, phase.lr, total_steps=phase.steps, pct_start=0.2)
        first_step = 0
        if saved is not None and saved["phase"] >= number:
            first_step = phase.steps
            if saved["phase"] == number:
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                scheduler.load_state_dict(saved["scheduler"])
                first_step = saved["step"]
                _log.info("resume at step %d of phase %d", first_step, number + 1)
        started, losses = time.monotonic(), []
        for step in range(first_step, phase.steps):
            images, labels = training_batch(before + step, args.batch_size, args.seed, mean, std)
            schedule = random_schedule(step, args.seed, len(model.blocks)) if phase.is_pruned else []
            loss = functional.cross_entropy(compressed(images, schedule=schedule), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            done = step + 1
            if done % CHECKPOINT_EVERY_STEPS == 0 or done == phase.steps:
                seconds = time.monotonic() - started
                mean_loss = float(np.mean(losses[-CHECKPOINT_EVERY_STEPS:]))
                _log.info("phase %d, step %d: loss %.4f, %.0f s", number + 1, done, mean_loss, seconds)
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "phase": number,
                    "step": done,
                }
                buffer = io.BytesIO()
                torch.save(state, buffer)
                write_atomic(checkpoint_path, buffer.getvalue())
        before += phase.steps


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
    parser.add_argument("--pruned-steps", type=int, default=1500, help="further steps under random EViT schedules")
    parser.add_argument("--phase1-weights", type=Path, help="begin with the second phase, from what the first one gave")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--pruned-lr", type=float, default=5e-4)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(args.seed)
    model = timm.create_model(MODEL_NAME)
    checkpoint_path = args.out.with_name(f"{args.out.name}.partial.pt")
    phases = [
        Phase(steps=args.steps, lr=args.lr, is_pruned=False),
        Phase(steps=args.pruned_steps, lr=args.pruned_lr, is_pruned=True),
    ]
    if args.phase1_weights is not None:
        model.load_state_dict(safetensors.torch.load_file(args.phase1_weights))
        phases[0] = replace(phases[0], weights_sha256=hashlib.sha256(args.phase1_weights.read_bytes()).hexdigest())
    train(model, phases, args, checkpoint_path)
    write_weights(model, args.out)
    record = {
        "model": MODEL_NAME,
        "dataset": "digit-scenes",
        "command": " ".join(["python", "examples/train_digit_vit.py", *sys.argv[1:]]),
        **{key: value for key, value in vars(args).items() if key not in ("out", "phase1_weights")},
        "phase1_sha256": phases[0].weights_sha256,
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
