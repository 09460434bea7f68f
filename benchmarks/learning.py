"""Claim: methods learn what to keep. On ``digit-scenes`` each beats random dropping trained alike at equal MACs.

Every run starts from the demo model's weights and fine-tunes with one recipe: the same images, steps and learning
rates, the dense model as teacher. Methods with learned selection have their own loss and a higher rate for their
predictors. At evaluation tokens are really removed; SPViT runs with fixed counts, so that MACs are equal. Random
dropping keeps as many tokens at the same blocks as EViT, drawn anew for each image and step.

    python -m benchmarks.learning --out benchmarks/results/learning.json

Finished runs stand in the file and are not run again, so an interrupted benchmark goes on where it was. Accuracy is on
the test split; differences are paired per image, pooled over seeds, and clustered by source digit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

import prunefront
from prunefront.config import ModelSpec, PruneConfig
from prunefront.files import write_json_atomic
from prunefront.methods.base import Call
from prunefront.methods.evit import EViT
from prunefront.ops.attention import AttentionState
from prunefront.ops.tokens import Tokens
from prunefront.schedule import Step
from prunefront.training.data import data_config_of, open_split
from prunefront.training.evaluate import evaluate, pack_correct, unpack_correct
from prunefront.training.examples import ExampleOptions
from prunefront.training.loop import train
from prunefront.training.recipes import Distillation, PruningLoss, Recipe
from prunefront.training.statistics import paired_interval

MODEL = ModelSpec(name="digit_vit_patch6_48")
DATASET = "digit-scenes"
BLOCKS = (1, 3)
SHARES = (0.6, 0.35)  # of the dense model's MACs
METHODS = ("random", "evit", "ppt", "tome", "diffrate", "trilevel", "trilevel-examples", "dynamicvit", "spvit")
SEEDS = 3
EPOCHS = 1  # 72 steps

RECIPE = Recipe(
    batch_size=50, lr=1e-4, lr_batch_size=None, augmentation=None, distillation=Distillation(alpha=0.5), clip_grad=1.0
)
SELECTION = RECIPE.model_copy(
    update={
        "objective": "pruning-distillation",
        "lr": 2e-3,
        "backbone_lr_factor": RECIPE.lr / 2e-3,
        "distillation": None,
        "pruning": PruningLoss(ratio_over="image"),
    }
)


# Tri-Level with its third level: a fifth of the training images left out from the start, as its script does.
EXAMPLES = RECIPE.model_copy(update={"examples": ExampleOptions(initial_removed=0.2)})


class RandomDrop(EViT):
    """EViT with scores of chance: what is left of a method when it does not look."""

    def reduce(self, tokens: Tokens, state: AttentionState, steps: Sequence[Step], call: Call) -> Tokens:
        (step,) = steps
        chance = torch.rand(len(tokens.x), tokens.x.shape[1] - tokens.num_prefix, device=tokens.x.device)
        return tokens.take(chance.topk(step.kept, dim=1).indices)


def sites(method: str, ratio: float) -> list[dict[str, Any]]:
    """The method's operation at each of the blocks, keeping ``ratio`` of what is present (merging at all blocks)."""
    if method == "tome":
        return [{"block": block, "op": "merge", "keep_ratio": max(ratio, 0.5)} for block in range(4)]
    if method == "ppt":
        return [{"block": block, "op": "pool_or_prune", "keep_ratio": max(ratio, 0.5)} for block in range(4)]
    if method == "diffrate":
        return [
            site
            for block in BLOCKS
            for site in (
                {"block": block, "op": "prune", "keep_ratio": 0.5 * (1 + ratio)},
                {"block": block, "op": "merge_mean", "keep_ratio": ratio / (0.5 * (1 + ratio))},
            )
        ]
    if method in ("dynamicvit", "spvit"):
        return [
            {"block": block, "op": "select", "cumulative_keep_ratio": ratio ** (stage + 1)}
            for stage, block in enumerate(BLOCKS)
        ]
    return [{"block": block, "op": "prune", "keep_ratio": ratio} for block in BLOCKS]


def config_of(method: str, share: float) -> PruneConfig | None:
    """The config whose MACs come closest to a share of the dense model's; None where the method cannot get near."""
    attended = {"attn_ratio": 0.5}
    options: dict[str, Any] = {
        "spvit": {"mode": "fixed"}, "ppt": {"threshold": 1e-3}, "trilevel": attended, "trilevel-examples": attended,
    }.get(method, {})  # fmt: skip
    name = {"random": "evit", "trilevel-examples": "trilevel"}.get(method, method)
    dense = prunefront.macs(PruneConfig(model=MODEL, method="hybrid"))

    def at(ratio: float) -> PruneConfig:
        document = {"model": MODEL, "method": name, "sites": sites(method, ratio), "options": options}
        return PruneConfig.model_validate(document)

    ratios = [step / 64 for step in range(2, 65)]
    best = min((at(ratio) for ratio in ratios), key=lambda config: abs(prunefront.macs(config) / dense - share))
    return best if abs(prunefront.macs(best) / dense - share) < 0.03 else None


def fine_tuned(config: PruneConfig, method: str, seed: int, epochs: int) -> tuple[nn.Module, int]:
    """The demo model under a config, trained with the recipe; and the steps that it took."""
    torch.manual_seed(seed)  # fresh predictors
    dense = prunefront.create_dense(MODEL, pretrained=True)
    model: Any = prunefront.compress(dense, config)
    if method == "random":
        model._method = RandomDrop()
    recipe = {"dynamicvit": SELECTION, "spvit": SELECTION, "trilevel-examples": EXAMPLES}.get(method, RECIPE)
    steps = 0

    def count(done: float, total: float, text: str) -> None:
        nonlocal steps
        steps = int(done)

    with tempfile.TemporaryDirectory() as folder:
        train(
            model, DATASET, epochs=epochs, folder=folder, recipe=recipe, teacher=dense, seed=seed, validates=False,
            checkpoint_every_s=1e9, progress=count,
        )  # fmt: skip
    return cast(nn.Module, model), steps


def run(method: str, share: float, seed: int, epochs: int, note: Callable[[str], None]) -> dict[str, Any] | None:
    """One run, as it stands in the results; None where the method cannot reach the share."""
    config = config_of(method, share)
    if config is None:
        return None
    start_s = time.perf_counter()
    model, steps = fine_tuned(config, method, seed, epochs)
    images = open_split(DATASET, "test", data_config=data_config_of(model), in_memory_mib=512)
    torch.manual_seed(seed)  # random dropping draws at evaluation as well
    evaluation = evaluate(model, images)
    dense = prunefront.macs(PruneConfig(model=MODEL, method="hybrid"))
    note(f"{method} {share} seed {seed}: {evaluation.top1:.4f} in {time.perf_counter() - start_s:.0f} s")
    return {
        "method": method,
        "share": share,
        "seed": seed,
        "epochs": epochs,
        "steps": steps,
        "macs_share": prunefront.macs(config) / dense,
        "tokens": [block.tokens_out for block in prunefront.token_counts(config).blocks],
        "top1": evaluation.top1,
        "correct": pack_correct(evaluation.correct),
    }


def dense_correct() -> np.ndarray:
    """Per test image, whether the dense model is right."""
    model = prunefront.create_dense(MODEL, pretrained=True)
    images = open_split(DATASET, "test", data_config=data_config_of(model), in_memory_mib=512)
    return evaluate(model, images).correct


def summary(runs: Sequence[dict[str, Any]], dense: np.ndarray) -> list[dict[str, Any]]:
    """Per method and share: accuracy, difference to random and to dense in points, paired and clustered."""
    model = prunefront.create_dense(MODEL, pretrained=True)
    clusters = open_split(DATASET, "test", data_config=data_config_of(model)).clusters
    assert clusters is not None
    by_run = {(r["method"], r["share"], r["seed"]): unpack_correct(r["correct"], len(dense)) for r in runs}
    rows = []
    for share in SHARES:
        for method in METHODS:
            seeds = [seed for seed in range(SEEDS) if (method, share, seed) in by_run]
            paired = [seed for seed in seeds if ("random", share, seed) in by_run]
            if not seeds:
                continue
            own = np.concatenate([by_run[method, share, seed] for seed in seeds])
            row: dict[str, Any] = {
                "method": method, "share": share, "seeds": len(seeds), "top1": float(own.mean()),
                "macs_share": next(r["macs_share"] for r in runs if r["method"] == method and r["share"] == share),
                "to_dense": paired_interval(own, np.tile(dense, len(seeds)), np.tile(clusters, len(seeds))),
            }  # fmt: skip
            if method != "random" and paired:
                own = np.concatenate([by_run[method, share, seed] for seed in paired])
                chance = np.concatenate([by_run["random", share, seed] for seed in paired])
                row["to_random"] = paired_interval(own, chance, np.tile(clusters, len(paired)))
            rows.append(row)
    return rows


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results; finished runs in it are kept")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    arguments = parser.parse_args()

    done: list[dict[str, Any]] = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    known = {(r["method"], r["share"], r["seed"], r["epochs"]) for r in done}
    dense = dense_correct()
    for seed in range(arguments.seeds):
        for share in SHARES:
            for method in arguments.methods:
                if (method, share, seed, arguments.epochs) in known:
                    continue
                result = run(
                    method, share, seed, arguments.epochs, lambda text: print(text, file=sys.stderr, flush=True)
                )
                if result is not None:
                    done.append(result)
                record = {
                    "command": "python -m benchmarks.learning", "model": MODEL.name, "dataset": DATASET,
                    "dense_top1": float(dense.mean()), "epochs": arguments.epochs,
                    "summary": summary(done, dense), "runs": done,
                }  # fmt: skip
                write_json_atomic(arguments.out, record)
    rows = summary(done, dense)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        chance = row.get("to_random")
        print(
            f"{row['share']:.2f} {row['method']:<11} {row['top1']:.2%}  to dense {row['to_dense'][0]:+.2%}"
            + (f"  to random {chance[0]:+.2%} ({chance[1]:+.2%} to {chance[2]:+.2%})" if chance else "")
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
