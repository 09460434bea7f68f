"""Two processes that train one model over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prunefront.errors import ConfigError
from prunefront.training.checkpoints import save_weights
from prunefront.training.data import data_config_of, open_split
from prunefront.training.distributed import World, place_of_process
from prunefront.training.evaluate import evaluate
from prunefront.training.recipes import Recipe
from tests.integration.training.image_folders import write_images
from tests.integration.training.test_finetune import CONFIG
from tests.unit.training.models import tiny_vit

ROOT = Path(__file__).parents[3]
DATASET = "imagefolder:grey"
RECIPE = Recipe(
    batch_size=4, lr=1e-3, lr_batch_size=None, drop_path=0.0, augmentation=None, label_smoothing=0.1, ema_decay=0.9
)


@pytest.fixture(autouse=True)
def _grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEFRONT_DATA_ROOTS", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data" / "grey" / "train", [15, 15, 15])
    write_images(tmp_path / "data" / "grey" / "val", [3, 3, 3])


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a script or module in two processes, of this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)


def prepared() -> list[str]:
    Path("config.json").write_text(json.dumps({**CONFIG, "method": "evit"}))
    save_weights(tiny_vit(3), Path("dense.safetensors"))
    line = f"train --config config.json --dataset {DATASET} --out run --checkpoint dense.safetensors --device cpu"
    values = "lr=1e-3 lr_batch_size=null drop_path=0.0 augmentation=null label_smoothing=0.1 ema_decay=0.9".split()
    return [*line.split(), "--recipe", "default", *(word for value in values for word in ("--set", value))]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_batches_twice_as_large(capfd: pytest.CaptureFixture[str]) -> None:
    line = [*prepared(), "--epochs", "3", "--batch-size", "4"]
    done = torchrun("-m", "prunefront", *line, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # one process alone reports

    from prunefront.cli.app import run

    alone = [word if word != "run" else "alone" for word in line[:-1]] + ["8"]
    assert run(alone) == 0
    expected = json.loads(Path("alone/result.json").read_text())
    assert document["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    for name in ("search_top1", "top1", "top5", "num_images"):
        assert document[name] == pytest.approx(expected[name])
    assert document["top1_ci"] == pytest.approx(expected["top1_ci"])
    for name in ("model.safetensors", "ema.safetensors"):
        ours, theirs = load_file(f"run/{name}"), load_file(f"alone/{name}")
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-3) for key in ours)
    assert len(Path("run/log.txt").read_text().splitlines()) == 3

    # A checkpoint of two processes is not continued by one.
    capfd.readouterr()
    assert run(line) == 2
    assert "by a training on 2 process(es), but this one has 1: go on with as many" in capfd.readouterr().err


_SCRIPT = """
import sys, torch
from pathlib import Path
from prunefront.training.distributed import joined
from prunefront.training.errors import StoppedError
from prunefront.training import loop
from prunefront.training.examples import ExampleOptions, ExampleSelection
from prunefront.training.loop import train
from tests.integration.training.test_distributed import RECIPE, DATASET
from tests.integration.training.test_finetune import student
from tests.integration.training.test_loop import trilevel
from tests.unit.training.models import tiny_vit

class Told(ExampleSelection):
    def start_epoch(self, epoch):
        event = super().start_epoch(epoch)
        if event is not None:
            print("EVENT", {name: str(value) for name, value in vars(event).items()}, flush=True)
        return event

loop.ExampleSelection = Told
score = sys.argv[3]
examples = ExampleOptions(initial_removed=10, remove=4, interval_epochs=1, events=2, score=score)
recipe = RECIPE.model_copy(update={"mixup": 0.2, "repeats": 2, "examples": examples, "batch_size": 2, "accumulate": 2})
done = [0]
stop_at = int(sys.argv[2])
with joined(torch.device("cpu")) as world:
    try:
        history = train(
            student() if score == "forgetting" else trilevel(),
            DATASET, epochs=3, folder=sys.argv[1], recipe=recipe, teacher=tiny_vit(3), world=world,
            progress=lambda number, *_: done.__setitem__(0, number),
            # One process alone is asked to stop.
            should_stop=lambda: world.rank == 1 and done[0] >= stop_at,
        )
        print("HISTORY", history, flush=True)
    except StoppedError as error:
        print("STOPPED", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("score", ["forgetting", "forgetting+cls_var"])
def test_two_processes_resume_with_everything_on_and_agree_on_the_end(score: str) -> None:
    Path("script.py").write_text(_SCRIPT)
    runs = (["a", "99"], ["b", "4"], ["b", "99"])
    whole, stopped, resumed = (torchrun("script.py", *words, score) for words in runs)
    assert [run.returncode for run in (whole, stopped, resumed)] == [0, 0, 0], whole.stderr + resumed.stderr

    assert stopped.stdout.count("STOPPED Training was stopped after step 4 of 9") == 2
    histories = [line for run in (whole, resumed) for line in run.stdout.splitlines() if line.startswith("HISTORY")]
    assert len(histories) == 4 and len(set(histories)) == 1
    # Both processes exchange the same images, for the same reasons.
    events = [line for line in whole.stdout.splitlines() if line.startswith("EVENT")]
    assert len(events) == 4 and len(set(events)) == 2
    first, second = (torch.load(f"{name}/checkpoint.pt") for name in "ab")
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    assert first["examples"] == second["examples"] and first["examples"]["events_done"] == 2


_PHASED_SCRIPT = """
import torch
from pathlib import Path
from prunefront.training.distributed import joined
from tests.integration.training.test_selection_training import PHASED, phased

recipe = PHASED.model_copy(update={"batch_size": 4})
with joined(torch.device("cpu")) as world:
    student, history = phased(Path("run"), recipe=recipe, world=world)
    weights = sum(float(p.detach().double().abs().sum()) for p in student.parameters())
    print("ENDED", [record["phase"] for record in history], weights)
"""


@pytest.mark.slow
def test_two_processes_wait_for_no_selector_that_has_yet_to_join() -> None:
    Path("script.py").write_text(_PHASED_SCRIPT)
    done = torchrun("script.py")
    assert done.returncode == 0, done.stderr
    ends = [line for line in done.stdout.splitlines() if line.startswith("ENDED")]
    assert len(ends) == 2 and len(set(ends)) == 1
    assert ends[0].startswith("ENDED [0.0, 1.0, 2.0, 3.0, 3.0]")


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_of_process() == (0, 1, 0)
    world = World()
    assert world.is_main and world.total([1.5]) == [1.5] and world.any(True, False) == [True, False]
    assert torch.equal(world.gathered(torch.arange(3)), torch.arange(3))

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK=None, WORLD_SIZE=2"):
        place_of_process()


def test_an_evaluation_alone_is_the_whole_one() -> None:
    model = tiny_vit(3)
    split = open_split(DATASET, "test", data_config=data_config_of(model))

    assert evaluate(model, split, world=World()).correct.tolist() == evaluate(model, split).correct.tolist()
