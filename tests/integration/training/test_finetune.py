"""Fine-tuning: learning, resuming, stopping, diverging."""

from __future__ import annotations

import copy
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import prunefront
from prunefront.errors import CheckpointError, ConfigError, DatasetError, FileWriteError
from prunefront.training.errors import DivergedError, StoppedError
from prunefront.training.finetune import CHECKPOINT_NAME, FinetuneResult, finetune
from prunefront.training.recipes import Augmentation, Distillation, Recipe
from tests.integration.training.image_folders import write_images
from tests.unit.training.models import tiny_vit

RECIPE = Recipe(
    batch_size=8,
    lr=1e-3,
    lr_batch_size=None,
    warmup_epochs=1,
    mixup=0.2,
    augmentation=Augmentation(random_erasing=0.5),
    distillation=Distillation(alpha=0.5, tau=2.0),
)
DATASET = "imagefolder:grey"
STEPS_PER_EPOCH = 4
CONFIG = {
    "format": "prunefront/config/1",
    "model": {
        "name": "vit_tiny_patch16_224",
        "kwargs": {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3},
        "img_size": 32,
        "num_classes": 3,
    },
    "method": "hybrid",
    "sites": [{"block": 1, "op": "fuse", "keep_ratio": 0.5}],
}


@pytest.fixture(autouse=True)
def _grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEFRONT_DATA_ROOTS", str(tmp_path / "data"))
    # 45 images, of which 11 are held out: 34 train, four batches of 8.
    write_images(tmp_path / "data" / "grey" / "train", [15, 15, 15])
    write_images(tmp_path / "data" / "grey" / "val", [3, 3, 3])


def student() -> nn.Module:
    # Stochastic depth makes the training random in the model too.
    return prunefront.compress(tiny_vit(3, drop_path_rate=0.2), CONFIG)


def run(folder: Path, model: nn.Module | None = None, **options):
    options = {"epochs": 2, "recipe": RECIPE, "teacher": tiny_vit(3), **options}
    return finetune(student() if model is None else model, DATASET, checkpoint_dir=folder, **options)


def same_weights(first: FinetuneResult, second: FinetuneResult) -> bool:
    # Not the files' hashes: safetensors writes its metadata in any order.
    left, right = load_file(first.checkpoint_path), load_file(second.checkpoint_path)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def stop_after(steps: int):
    asked = iter(range(10_000))
    return lambda: next(asked) >= steps


@pytest.mark.parametrize("steps", [1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 2])
def test_a_stopped_and_resumed_run_ends_with_the_weights_of_a_whole_one(tmp_path, steps):
    whole = run(tmp_path / "whole")
    with pytest.raises(StoppedError, match=f"after step {steps} of 8"):
        run(tmp_path / "parts", should_stop=stop_after(steps))
    torch.manual_seed(99)  # the resumed process has other random numbers
    resumed = run(tmp_path / "parts")

    assert same_weights(resumed, whole)
    assert resumed.history == whole.history
    assert [record["epoch"] for record in whole.history] == [0, 1]


def test_a_killed_process_goes_on_from_its_last_checkpoint(tmp_path):
    whole = run(tmp_path / "whole", epochs=3)
    script = (
        "import sys, time; from pathlib import Path\n"
        "from tests.integration.training.test_finetune import run\n"
        "run(Path(sys.argv[1]), epochs=3, checkpoint_every_s=0.0, progress=lambda *_: time.sleep(0.2))"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "killed")], env=dict(os.environ))
    try:
        wait_for(tmp_path / "killed" / CHECKPOINT_NAME, child)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()

    steps = []
    resumed = run(tmp_path / "killed", epochs=3, progress=lambda done, *_: steps.append(done))

    assert same_weights(resumed, whole)
    assert steps[0] > 1 and steps[-1] == 12


def wait_for(path: Path, child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert child.poll() is None, "the training process ended before its first checkpoint"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)


def test_the_result_is_a_model_that_loads_with_its_config(tmp_path):
    result = run(tmp_path / "run")
    loaded = prunefront.load_model(result.checkpoint_path)

    assert hashlib.sha256(result.checkpoint_path.read_bytes()).hexdigest() == result.sha256
    assert loaded.prune_config.content_hash() == student().prune_config.content_hash()
    assert not torch.equal(loaded.head.weight, student().head.weight)


def test_a_dense_model_is_saved_as_plain_weights(tmp_path):
    result = run(tmp_path / "run", tiny_vit(3), teacher=None, epochs=1)
    other = tiny_vit(3)
    prunefront.load_weights(other, result.checkpoint_path)

    assert not torch.equal(other.head.weight, tiny_vit(3).head.weight)


def test_training_learns(tmp_path):
    recipe = Recipe(batch_size=8, lr=2e-3, lr_batch_size=None, augmentation=None, distillation=None)
    result = run(tmp_path / "run", prunefront.compress(tiny_vit(3), CONFIG), epochs=8, recipe=recipe)

    assert result.history[-1]["top1"] > 0.9
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert result.history[-1]["lr"] < 0.2 * result.history[0]["lr"]


def test_the_teacher_stays_as_it_was_although_it_shares_the_students_parameters(tmp_path):
    dense = tiny_vit(3)
    before = copy.deepcopy(dense.state_dict())
    only_distillation = RECIPE.model_copy(update={"distillation": Distillation(alpha=1.0), "mixup": 0.0})
    losses = [
        run(
            tmp_path / name,
            prunefront.compress(tiny_vit(3) if name == "apart" else dense, CONFIG),
            teacher=dense,
            recipe=only_distillation,
        ).history
        for name in ("apart", "shared")
    ]

    assert losses[0] == losses[1]
    assert not torch.equal(before["head.weight"], dense.head.weight)  # the student's: shared, hence trained


def test_the_seed_decides_the_result(tmp_path):
    results = [run(tmp_path / str(number), seed=seed, epochs=1) for number, seed in enumerate((0, 0, 1))]

    assert same_weights(results[0], results[1])
    assert not same_weights(results[0], results[2])


def test_the_callers_random_numbers_are_left_alone(tmp_path):
    model = student()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    finetune(model, DATASET, epochs=1, recipe=RECIPE, checkpoint_dir=tmp_path / "run")

    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    model = student()
    poison = stop_after(STEPS_PER_EPOCH + 1)

    def poisoned() -> bool:
        if poison():
            with torch.no_grad():
                model.head.weight.fill_(float("nan"))
        return False

    with pytest.raises(DivergedError, match=r"loss became nan in step 5 of 8.*last good checkpoint"):
        run(tmp_path / "run", model, should_stop=poisoned)

    # The epoch's end was saved before: from there the run goes on as if nothing had happened.
    assert same_weights(run(tmp_path / "run"), run(tmp_path / "whole"))


def test_a_gradient_that_is_no_number_stops_the_run_before_it_spoils_the_weights(tmp_path):
    model = student()
    model.head.weight.register_hook(lambda gradient: gradient * float("inf"))

    with pytest.raises(DivergedError, match="gradient norm became (inf|nan) in step 0.*No checkpoint"):
        run(tmp_path / "run", model)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    with pytest.raises(StoppedError):
        run(tmp_path / "run", should_stop=stop_after(2))

    with pytest.raises(CheckpointError, match="belongs to another run: epochs, seed differs"):
        run(tmp_path / "run", epochs=3, seed=1)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CHECKPOINT_NAME).write_bytes(b"not a checkpoint")

    with pytest.raises(CheckpointError, match="Remove it to start this fine-tuning anew"):
        run(tmp_path / "run")


def test_a_checkpoint_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(FileWriteError, match="Could not write"):
        run(tmp_path / "file" / "run", epochs=1)


def test_requests_that_cannot_be_right_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least 1 epoch"):
        run(tmp_path / "run", epochs=0)
    with pytest.raises(DatasetError, match="has 3 classes, but the model has 10"):
        run(tmp_path / "run", tiny_vit(10), teacher=None)
    with pytest.raises(DatasetError, match="One batch takes 64 images, but the train split .* has 34"):
        run(tmp_path / "run", recipe=RECIPE.model_copy(update={"batch_size": 64}))


def test_bfloat16_training_works(tmp_path):
    result = run(tmp_path / "run", epochs=1, dtype="bf16")

    assert all(value == value for record in result.history for value in record.values())
