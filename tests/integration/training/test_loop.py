"""The training loop: resuming with everything on, validation, teachers, ends."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import prunefront
from prunefront.errors import CheckpointError, ConfigError, CorruptImageError, ModelError, UnknownNameError
from prunefront.training.checkpoints import CHECKPOINT_NAME, save_weights
from prunefront.training.data import data_config_of, open_split
from prunefront.training.errors import DivergedError, StoppedError
from prunefront.training.examples import ExampleOptions, ExampleSelection
from prunefront.training.logs import RunLog
from prunefront.training.loop import BEST_NAME, EMA_NAME, train
from prunefront.training.objectives import OBJECTIVES, Classification, Loss
from prunefront.training.recipes import Distillation, KeepRateSchedule, Recipe
from tests.integration.training.image_folders import write_images
from tests.integration.training.test_finetune import CONFIG, stop_after, student
from tests.unit.training.models import tiny_vit

DATASET = "imagefolder:grey"
# Everything that a checkpoint has to carry, at once; 34 images make four steps of 2 x 4.
RECIPE = Recipe(
    batch_size=4,
    accumulate=2,
    lr=1e-3,
    lr_batch_size=None,
    warmup_epochs=1,
    drop_path=0.2,
    mixup=0.2,
    cutmix=0.5,
    label_smoothing=0.1,
    frozen_parameters=("cls_token",),
    keep_rate=KeepRateSchedule(start_epoch=0.5, epochs=1.5),
    ema_decay=0.9,
    evaluates_ema=True,
    distillation=Distillation(alpha=0.5, tau=2.0),
)
HALF_AT_1 = [{"block": 1, "op": "prune", "keep_ratio": 0.5}]
FILES = ("model.safetensors", EMA_NAME, BEST_NAME)


@pytest.fixture(autouse=True)
def _grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEFRONT_DATA_ROOTS", str(tmp_path / "data"))
    write_images(tmp_path / "data" / "grey" / "train", [15, 15, 15])
    write_images(tmp_path / "data" / "grey" / "val", [3, 3, 3])


def run(folder: Path, model: nn.Module | None = None, **options):
    model = student() if model is None else model
    options = {"epochs": 3, "recipe": RECIPE, "teacher": tiny_vit(3), **options}
    history = train(model, DATASET, folder=folder, log=RunLog(folder, num_parameters=1), **options)
    save_weights(model, folder / "model.safetensors")
    return history


def stopped(folder: Path, steps: int, **options) -> None:
    """A run that is stopped before the step of that number, from 0."""
    done = [0.0]
    with pytest.raises(StoppedError, match=f"after step {steps} of"):
        run(
            folder,
            progress=lambda number, *_: done.__setitem__(0, number),
            should_stop=lambda: done[0] >= steps,
            **options,
        )


def assert_equal_files(left: Path, right: Path) -> None:
    for name in FILES:
        one, other = load_file(left / name), load_file(right / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


@pytest.mark.parametrize("steps", [1, 4, 6, 11])
def test_a_stopped_and_resumed_run_equals_a_whole_one_bit_for_bit(tmp_path, steps):
    whole = run(tmp_path / "whole")
    stopped(tmp_path / "parts", steps)
    torch.manual_seed(99)

    assert run(tmp_path / "parts") == whole
    assert_equal_files(tmp_path / "parts", tmp_path / "whole")


def test_a_crash_loses_the_steps_since_the_last_checkpoint_and_nothing_else(tmp_path):
    (tmp_path / "crashed").mkdir()

    def crash(done: float, *_: object) -> None:
        # What a process killed after step 7 leaves behind: checkpoints are due every 3 steps, and after an epoch.
        if done == 7:
            shutil.copy(tmp_path / "whole" / CHECKPOINT_NAME, tmp_path / "crashed")
            shutil.copy(tmp_path / "whole" / BEST_NAME, tmp_path / "crashed")

    whole = run(tmp_path / "whole", progress=crash, checkpoint_every_steps=2)
    resumed_from: list[float] = []
    again = run(tmp_path / "crashed", progress=lambda done, *_: resumed_from.append(done), checkpoint_every_steps=2)

    assert resumed_from[0] == 7  # the checkpoint held step 6
    assert again == whole
    assert_equal_files(tmp_path / "crashed", tmp_path / "whole")


def test_a_run_stopped_while_it_validates_does_not_train_the_epoch_again(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(StoppedError, match="after step 4 of 12"):
        run(tmp_path / "parts", should_stop=stop_after(5))  # asked before 4 steps and 2 batches of the search split

    steps: list[float] = []
    assert run(tmp_path / "parts", progress=lambda done, *_: steps.append(done)) == whole
    assert steps[0] == 5
    assert_equal_files(tmp_path / "parts", tmp_path / "whole")


def test_a_finished_run_is_not_trained_again(tmp_path):
    whole = run(tmp_path / "run")
    steps: list[float] = []

    assert run(tmp_path / "run", progress=lambda done, *_: steps.append(done)) == whole
    assert steps == []


def test_half_precision_resumes_with_its_loss_scale(tmp_path):
    recipe = RECIPE.model_copy(update={"amp": "fp16"})
    whole = run(tmp_path / "whole", recipe=recipe, epochs=2)
    stopped(tmp_path / "parts", 6, recipe=recipe, epochs=2)

    assert run(tmp_path / "parts", recipe=recipe, epochs=2) == whole
    assert_equal_files(tmp_path / "parts", tmp_path / "whole")


def test_each_epoch_says_how_good_the_model_is_on_the_search_split(tmp_path):
    recipe = RECIPE.model_copy(update={"validate_every": 2})
    history = run(tmp_path / "run", recipe=recipe)

    assert ["search_top1" in record for record in history] == [False, True, True]  # and the last one
    assert {"search_top5", "search_loss", "ema_search_top1"} <= set(history[1])
    assert len((tmp_path / "run" / "log.txt").read_text().splitlines()) == 3


def test_validation_uses_the_present_ratios_or_the_final_ones(tmp_path):
    late = RECIPE.model_copy(
        update={"ema_decay": None, "lr": 1e-9, "keep_rate": KeepRateSchedule(start_epoch=2, epochs=1)}
    )
    final = late.model_copy(update={"keep_rate": late.keep_rate.model_copy(update={"evaluate_with": "final"})})
    current, last = (run(tmp_path / name, recipe=r) for name, r in (("current", late), ("final", final)))

    # The weights hardly move, so the first epoch differs by the tokens alone, and the last one does not.
    assert current[0]["search_loss"] != pytest.approx(last[0]["search_loss"], abs=1e-7)
    assert current[2]["search_loss"] == last[2]["search_loss"]


def test_an_early_epoch_of_the_schedule_trains_the_dense_model(tmp_path):
    still = RECIPE.model_copy(update={"keep_rate": KeepRateSchedule(start_epoch=9, epochs=0), "accumulate": 1})
    dense = run(tmp_path / "dense", tiny_vit(3, drop_path_rate=0.2), recipe=still, epochs=1, validates=False)

    assert run(tmp_path / "open", recipe=still, epochs=1, validates=False)[0]["loss"] == pytest.approx(dense[0]["loss"])


def test_frozen_parameters_stay(tmp_path):
    model, before = student(), student().state_dict()
    run(tmp_path / "run", model, epochs=1)

    assert torch.equal(model.cls_token, before["cls_token"])
    assert not torch.equal(model.pos_embed, before["pos_embed"])


def test_eval_mode_switches_stochastic_depth_off(tmp_path):
    plain = RECIPE.model_copy(update={"eval_mode": True, "drop_path": 0.0})
    deep = RECIPE.model_copy(update={"eval_mode": True, "drop_path": 0.9})

    assert run(tmp_path / "plain", recipe=plain, epochs=1) == run(tmp_path / "deep", recipe=deep, epochs=1)


def test_accumulated_batches_are_one_larger_batch(tmp_path):
    plain = Recipe(lr=1e-3, lr_batch_size=None, drop_path=0.0, augmentation=None, distillation=None, batch_size=8)
    split = plain.model_copy(update={"batch_size": 4, "accumulate": 2})
    whole, halves = (run(tmp_path / str(r.accumulate), recipe=r, epochs=2) for r in (plain, split))

    assert [r["loss"] for r in halves] == pytest.approx([r["loss"] for r in whole], rel=1e-4)
    assert [r["top1"] for r in halves] == [r["top1"] for r in whole]


@pytest.mark.parametrize(("when", "what"), [(6, "loss"), (8, "search loss")])
def test_a_nan_keeps_the_last_good_checkpoint_and_the_best_weights(tmp_path, when, what):
    model = student()

    def poison(done: float, *_: object) -> None:
        if done == when:
            with torch.no_grad():
                model.head.weight.fill_(float("nan"))

    with pytest.raises(DivergedError, match=f"{what} became nan in step {when} .*last good checkpoint"):
        run(tmp_path / "run", model, progress=poison)

    assert torch.load(tmp_path / "run" / CHECKPOINT_NAME)["model"]["head.weight"].isfinite().all()
    assert prunefront.load_model(tmp_path / "run" / BEST_NAME).head.weight.isfinite().all()


def test_another_number_of_processes_is_refused(tmp_path):
    stopped(tmp_path / "run", 1)
    path = tmp_path / "run" / CHECKPOINT_NAME
    state = torch.load(path)
    state["identity"]["world_size"] = 4
    torch.save(state, path)

    with pytest.raises(CheckpointError, match="by a training on 4 process.* but this one has 1: go on with as many"):
        run(tmp_path / "run")


def test_a_teacher_with_other_classes_is_refused(tmp_path):
    with pytest.raises(ModelError, match="teacher knows 7 classes, but the model that learns from it has 3"):
        run(tmp_path / "run", teacher=tiny_vit(7))


def test_requests_that_cannot_be_right_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch_size=5 is odd"):
        run(tmp_path / "run", recipe=RECIPE.model_copy(update={"batch_size": 5}))
    with pytest.raises(UnknownNameError, match="Unknown objective 'regression'"):
        run(tmp_path / "run", recipe=RECIPE.model_copy(update={"objective": "regression"}))


def test_an_objective_is_one_class_and_its_parts_are_logged(tmp_path, monkeypatch):
    class TokenCount(Classification):
        """Classification, and a loss that looks at the tokens that are left."""

        def forward(self, model, teacher, images, **options):
            logits, aux = model(images, return_aux=True, **options)
            return (logits, None, None), aux

        def loss(self, outputs, targets):
            answer, aux = outputs
            tokens = aux.tokens.square().mean()
            total = super().loss(answer, targets).total + 0.1 * tokens
            return Loss(total=total, logits=answer[0], parts={"tokens": tokens})

    monkeypatch.setitem(OBJECTIVES, "token-count", TokenCount)
    history = run(tmp_path / "run", recipe=RECIPE.model_copy(update={"objective": "token-count"}), epochs=2)

    assert all(record["loss_tokens"] > 0 for record in history)
    assert "loss_tokens" in (tmp_path / "run" / "log.csv").read_text()


def trilevel(sites: list[dict[str, object]] = HALF_AT_1, attn_ratio: float = 0.5) -> nn.Module:
    config = {**CONFIG, "method": "trilevel", "sites": sites, "options": {"attn_ratio": attn_ratio}}
    return prunefront.compress(tiny_vit(3, drop_path_rate=0.2), config)


@pytest.mark.parametrize(("score", "model"), [("forgetting", student), ("forgetting+cls_var", trilevel)])
def test_the_example_level_shortens_the_epoch_and_survives_a_resume(tmp_path, score, model):
    # 34 images, of which 10 are left out: six batches of 4; an exchange before the second and the third epoch.
    examples = ExampleOptions(initial_removed=10, remove=4, interval_epochs=1, events=2, score=score)
    recipe = RECIPE.model_copy(update={"examples": examples, "accumulate": 1})
    whole = run(tmp_path / "whole", model(), recipe=recipe)
    stopped(tmp_path / "parts", 8, model=model(), recipe=recipe)

    assert run(tmp_path / "parts", model(), recipe=recipe) == whole
    assert_equal_files(tmp_path / "parts", tmp_path / "whole")
    states = [torch.load(tmp_path / name / CHECKPOINT_NAME) for name in ("parts", "whole")]
    assert states[0]["examples"] == states[1]["examples"]
    assert (states[0]["position"]["step"], states[0]["examples"]["events_done"]) == (18, 2)


@pytest.mark.parametrize(
    ("sites", "attn_ratio"),
    [
        ([], 1.0),
        ([{"block": 2, "op": "prune", "keep_ratio": 0.5}], 1.0),
        ([{"block": 2, "op": "prune", "keep_ratio": 0.5}], 0.5),
    ],
)
def test_images_are_scored_by_the_variance_of_the_last_blocks_class_attention(tmp_path, sites, attn_ratio):
    # Each of 24 images once, by weights that do not move; nothing leaves before the attention of the last block.
    options = ExampleOptions(initial_removed=10, remove=4, interval_epochs=1, events=1, score="forgetting+cls_var")
    recipe = Recipe(
        batch_size=4,
        lr=1e-12,
        lr_batch_size=None,
        drop_path=0.0,
        augmentation=None,
        distillation=None,
        examples=options,
    )
    run(tmp_path / "run", trilevel(sites, attn_ratio), recipe=recipe, epochs=1, teacher=None, validates=False)
    selection = ExampleSelection(34, options)
    selection.load_state_dict(torch.load(tmp_path / "run" / CHECKPOINT_NAME)["examples"])
    event = selection.start_epoch(1)

    dense = tiny_vit(3).eval()
    projected: list[torch.Tensor] = []
    dense.blocks[2].attn.qkv.register_forward_hook(lambda module, args, out: projected.append(out))
    split = open_split(DATASET, "train", data_config=data_config_of(dense), train=True)
    with torch.no_grad():
        dense(torch.stack([split[int(image)][0] for image in event.ranking]))
    q, k, _ = projected[0].view(24, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
    attention = (q[:, :, :1] @ k.transpose(2, 3) / 4).softmax(dim=-1).mean(dim=1)[:, 0, 1:]
    expected = (attention - attention.mean(dim=1, keepdim=True)).square().sum(dim=1) / 15
    assert event.class_variance.tolist() == pytest.approx(expected.tolist(), rel=1e-3)


def test_class_attention_is_recorded_until_the_last_exchange_alone(tmp_path, monkeypatch):
    recorded: list[bool] = []

    class Watched(Classification):
        def loss(self, outputs, targets):
            loss = super().loss(outputs, targets)
            recorded.append(loss.class_attention is not None)
            return loss

    monkeypatch.setitem(OBJECTIVES, "classification", Watched)
    # Six batches of 4 an epoch; the only exchange comes before the second of three, in which the run is interrupted.
    examples = ExampleOptions(initial_removed=10, remove=4, interval_epochs=1, events=1, score="forgetting+cls_var")
    recipe = RECIPE.model_copy(update={"examples": examples, "accumulate": 1})
    stopped(tmp_path / "run", 8, model=trilevel(), recipe=recipe)
    run(tmp_path / "run", trilevel(), recipe=recipe)

    assert recorded == 6 * [True] + 12 * [False]


def test_a_score_by_attention_is_refused_where_there_is_none(tmp_path, monkeypatch):
    recipe = RECIPE.model_copy(update={"examples": ExampleOptions(score="forgetting+cls_var"), "keep_rate": None})

    with pytest.raises(ConfigError, match="with the method 'hybrid' hands out no class attention.*=forgetting, or"):
        run(tmp_path / "run", recipe=recipe)
    with pytest.raises(ConfigError, match="A dense model hands out no class attention"):
        run(tmp_path / "run", tiny_vit(3), recipe=recipe)
    with pytest.raises(ConfigError, match="of which this config leaves 1; keep at least 2"):
        run(tmp_path / "run", trilevel([{"block": 1, "op": "prune", "tokens": 1}]), recipe=recipe)

    class Forgetful(Classification):
        def loss(self, outputs, targets):
            return dataclasses.replace(super().loss(outputs, targets), class_attention=None)

    monkeypatch.setitem(OBJECTIVES, "forgetful", Forgetful)
    with pytest.raises(ConfigError, match="The objective 'forgetful' hands out no class attention"):
        run(tmp_path / "run", trilevel(), recipe=recipe.model_copy(update={"objective": "forgetful"}))


def test_an_image_that_cannot_be_decoded_is_skipped_or_refused(tmp_path):
    broken = next((tmp_path / "data" / "grey" / "train").rglob("*.png"))
    broken.write_bytes(broken.read_bytes()[:40])

    with pytest.raises(CorruptImageError, match=broken.name):
        run(tmp_path / "refused")
    # Mixup needs pairs: the batch with the gap loses one more.
    assert len(run(tmp_path / "skipped", on_corrupt="skip")) == 3


def test_repeated_augmentation_shows_fewer_images_in_an_epoch_of_the_same_length(tmp_path):
    steps: list[float] = []
    recipe = RECIPE.model_copy(update={"repeats": 3})
    run(tmp_path / "run", recipe=recipe, epochs=1, progress=lambda done, *_: steps.append(done))

    assert steps == [1, 2, 3, 4]
