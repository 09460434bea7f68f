"""The real tasks, on a tiny model and real images, run by one child process of the local engine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import prunefront
from latency_tables.build import BuildSettings, build_table
from latency_tables.errors import DisturbedError
from latency_tables.measure import MeasureSettings, Subject
from latency_tables.predict import predict_latency_ms
from latency_tables.schema import LatencyTable
from latency_tables.validate import validate_table
from prunefront.config import ModelSpec
from prunefront.training.data import data_config_of, evaluation_batches, open_split
from prunefront.training.evaluate import unpack_correct
from tests.integration.workers.conftest import events_until_finished, results_of, task
from tests.unit.latency_tables.fakes import FakeClock, FakeCpu
from workers import profiling
from workers.calibrate import score_variances
from workers.candidate_models import CandidateModels
from workers.engines.base import EngineEvent, Item, Progress
from workers.engines.local import LocalEngine
from workers.payloads import Entry, WeightsChoice
from workers.tasks import FailureCause, JsonDict, TaskContext, TaskResult, TaskState

MODEL: JsonDict = {
    "name": "vit_tiny_patch16_224",
    "kwargs": {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 8},
    "img_size": 48,
    "num_classes": 10,
}
SMALLER_IMAGES: JsonDict = {**MODEL, "img_size": 32}
NUM_IMAGES = 70
ids = (f"body-{number}" for number in itertools.count())


def config(method: str = "hybrid", sites: Any = (), model: JsonDict = MODEL, **options: Any) -> JsonDict:
    return {
        "format": "prunefront/config/1",
        "model": model,
        "method": method,
        "sites": list(sites),
        "options": options,
    }


EVIT = config("evit", [{"block": 1, "op": "fuse", "keep_ratio": 0.5}])
NO_OP = config()


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dataset ``imagefolder:noise``: 96 images to train on, a few to search and test with."""
    root = tmp_path_factory.mktemp("data")
    numbers = np.random.default_rng(0)
    for split, count in (("train", 96), ("search", 10), ("test", 10)):
        for index in range(count):
            path = root / "noise" / split / f"class{index % 10}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(numbers.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Iterator[LocalEngine]:
    folder = tmp_path_factory.mktemp("engine")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PRUNEFRONT_DATA_ROOTS", str(data_root))
        with LocalEngine(folder / "work", slots=["cpu"], lock_dir=folder / "locks") as engine:
            yield engine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a dense model, large enough that its logits differ between images."""
    torch.manual_seed(0)
    model = prunefront.create_dense(ModelSpec.model_validate(MODEL))
    state = {name: tensor.clone() * (3 if tensor.ndim > 1 else 1) for name, tensor in model.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "dense.safetensors"
    save_file(state, path)
    return path


def run_body(engine: LocalEngine, kind: str, payload: JsonDict) -> tuple[TaskResult, list[EngineEvent]]:
    spec = task(kind, id=next(ids), payload=payload, exclusive=kind in ("measure", "table"))
    engine.submit(spec)
    events = events_until_finished(engine, spec.id)
    return results_of(events)[spec.id], events


def value_of(result: TaskResult) -> JsonDict:
    assert result.state is TaskState.SUCCEEDED and result.value is not None, result.failure
    return result.value


def items_of(events: list[EngineEvent]) -> dict[str, JsonDict]:
    return {event.key: event.value for event in events if isinstance(event, Item)}


def evaluate_payload(checkpoint: Path, entries: list[JsonDict], **changes: Any) -> JsonDict:
    return {
        "model": MODEL,
        "weights": {"pretrained": False, "checkpoint": str(checkpoint)},
        "dataset": "digit-scenes",
        "split": "search",
        "num_images": NUM_IMAGES,
        "batch_size": 32,
        "dtype": "fp32",
        "entries": entries,
        **changes,
    }


def reference_hits(model: torch.nn.Module) -> np.ndarray[Any, Any]:
    """Whether each image is classified rightly, computed image by image."""
    split = open_split("digit-scenes", "search", data_config=data_config_of(model), num_images=NUM_IMAGES)
    model.eval()
    with torch.inference_mode():
        return np.array([model(image[None]).argmax().item() == label for image, label in split])


def test_evaluation_gives_each_candidate_its_own_numbers(engine: LocalEngine, checkpoint: Path) -> None:
    smaller = config(model=SMALLER_IMAGES)
    entries = [{"key": key, "config": body} for key, body in (("evit", EVIT), ("dense", NO_OP), ("small", smaller))]
    result, events = run_body(engine, "evaluate", evaluate_payload(checkpoint, entries))
    items = items_of(events)
    assert list(items) == ["evit", "dense", "small"]

    dense = prunefront.create_dense(ModelSpec.model_validate(MODEL), checkpoint=checkpoint)
    resized = prunefront.create_dense(ModelSpec.model_validate(MODEL), checkpoint=checkpoint)
    resized.set_input_size(img_size=32)  # type: ignore[operator]
    references = {"evit": prunefront.compress(dense, EVIT), "dense": dense, "small": resized}
    for key, model in references.items():
        hits = reference_hits(model)
        assert (unpack_correct(items[key]["correct"], NUM_IMAGES) == hits).all(), key
        assert items[key]["top1"] == pytest.approx(hits.mean())
        assert items[key]["num_images"] == NUM_IMAGES
    clusters = value_of(result)["clusters"]
    assert len(clusters) == NUM_IMAGES and len(set(clusters)) > 10
    assert any(isinstance(event, Progress) and "evaluating" in event.message for event in events)


def test_evaluation_uses_the_weights_of_a_candidate_where_it_has_some(
    engine: LocalEngine, checkpoint: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    trained = prunefront.create_model(EVIT)
    path = prunefront.save_model(trained, tmp_path / "trained.safetensors")
    entries = [{"key": "own", "config": EVIT, "checkpoint": str(path)}, {"key": "shared", "config": EVIT}]
    _, events = run_body(engine, "evaluate", evaluate_payload(checkpoint, entries))
    items = items_of(events)
    assert (unpack_correct(items["own"]["correct"], NUM_IMAGES) == reference_hits(trained)).all()
    assert items["own"]["loss"] != items["shared"]["loss"]


def test_nothing_left_to_evaluate_is_no_fault(engine: LocalEngine, checkpoint: Path) -> None:
    result, _ = run_body(engine, "evaluate", evaluate_payload(checkpoint, []))
    assert value_of(result) == {"clusters": None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": "imagenet-42"}, "Unknown dataset 'imagenet-42'"),
        ({"weights": {"checkpoint": "/no/such/file.safetensors"}}, "does not exist"),
        ({"entries": [{"key": "a", "config": {**EVIT, "method": "evti"}}]}, "Unknown method 'evti'"),
        ({"entries": [{"key": "a", "config": config(model={**MODEL, "num_classes": 7})}]}, "weights of its own"),
        ({"model": {**MODEL, "name": "vit_tinny_patch16_224"}}, "did you mean"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input_fails_with_one_sentence_and_leaves_the_process_in_use(
    engine: LocalEngine, checkpoint: Path, changes: JsonDict, words: str
) -> None:
    payload = {**evaluate_payload(checkpoint, [{"key": "a", "config": EVIT}]), **changes}
    result, _ = run_body(engine, "evaluate", payload)
    assert result.state is TaskState.FAILED and result.failure is not None
    assert result.failure.cause == FailureCause.INPUT
    assert words in result.failure.message and "\n" not in result.failure.message


def test_measuring_reports_each_candidate_and_the_dense_model(engine: LocalEngine, checkpoint: Path) -> None:
    smaller = config(model=SMALLER_IMAGES)
    payload = {
        "model": MODEL,
        "weights": {"checkpoint": str(checkpoint)},
        "runtime": "eager",
        "dtype": "fp32",
        "batch_size": 4,
        "entries": [{"key": "evit", "config": EVIT}, {"key": "small", "config": smaller}],
        "dataset": "digit-scenes",
    }
    result, events = run_body(engine, "measure", payload)
    items = items_of(events)
    dense = value_of(result)["dense"]
    assert set(items) == {"evit", "small"}
    for measurement in (*items.values(), dense):
        assert measurement["median_ms"] > 0 and measurement["num_samples"] >= 10
        assert measurement["state"] in ("ok", "noisy")
    for measurement in items.values():
        assert measurement["speedup"] == pytest.approx(measurement["canary_ms"] / measurement["median_ms"])
        # Three blocks of 12 · 48² weights, whatever the images.
        assert measurement["peak_memory_mib"] is None or measurement["peak_memory_mib"] > 3 * 12 * 48**2 * 4 / 2**20


class TickingStopwatch:
    """Runs every subject and calls each of its laps a millisecond, so nothing is noisy."""

    def sample(self, subject: Subject) -> list[tuple[str, float]]:
        laps: list[tuple[str, float]] = []
        subject(lambda name: laps.append((name, 1.0)))
        return laps


def test_building_a_table_returns_one_that_predicts_and_carries_its_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quick = MeasureSettings(warmup_rounds=1, min_rounds=2, max_rounds=2)
    settings = BuildSettings(
        token_shares=(0.0, 0.5, 1.0),
        max_token_counts=3,
        reduction_tokens=(1.0,),
        num_whole_models=3,
        blocks=quick,
        reductions=quick,
        models=quick,
    )
    watch = TickingStopwatch()
    quiet = FakeCpu(FakeClock(), lambda now: 0.0)
    monkeypatch.setattr(profiling, "settings_for", lambda device, runtime: settings)
    monkeypatch.setattr(profiling, "build_table", partial(build_table, stopwatch=watch, cpu=quiet))
    monkeypatch.setattr(
        profiling, "validate_table", partial(validate_table, settings=quick, stopwatch=watch, cpu=quiet)
    )
    partial_path = tmp_path / "partial.jsonl"
    payload = {"model": MODEL, "runtime": "eager", "dtype": "fp32", "batch_size": 1, "partial_path": str(partial_path)}
    payload["validate_schedules"] = 2
    events: list[JsonDict] = []
    value = profiling.run_table(payload, TaskContext(task("table", payload=payload), send=events.append))

    table = LatencyTable.model_validate(json.loads(json.dumps(value))["table"])
    assert predict_latency_ms(table, prunefront.load_config(EVIT)) > 0
    assert table.validation is not None and table.validation.num_schedules == 2
    assert partial_path.exists(), "until the controller has stored the table"
    assert events[-1]["done"] == events[-1]["total"]


@pytest.mark.parametrize(("allowed", "most"), [(None, "0.25"), (0.5, "0.50")])
def test_a_table_beside_a_busy_process_fails_with_what_to_do(
    allowed: float | None, most: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    busy = FakeCpu(FakeClock(), lambda now: 0.98)
    monkeypatch.setattr(profiling, "build_table", partial(build_table, stopwatch=TickingStopwatch(), cpu=busy))
    path = tmp_path / "partial.jsonl"
    payload = {"model": MODEL, "batch_size": 1, "partial_path": str(path), "max_foreign_cores": allowed}
    with pytest.raises(DisturbedError, match=f"take 0.98 cores .* at most {most} are allowed.*kept in {path}"):
        profiling.run_table(payload, TaskContext(task("table", payload=payload), send=lambda event: None))


def test_a_table_is_cancelled_between_two_samples(engine: LocalEngine, tmp_path: Path) -> None:
    task_id = next(ids)
    payload = {"model": MODEL, "batch_size": 1, "partial_path": str(tmp_path / "partial.jsonl")}
    engine.submit(task("table", id=task_id, payload=payload, exclusive=True))
    events: list[EngineEvent] = []
    while not any(isinstance(event, Progress) for event in events):
        events += engine.poll(0.2)
    engine.cancel(task_id)
    assert results_of(events_until_finished(engine, task_id))[task_id].state is TaskState.CANCELLED


def test_measuring_without_a_dataset_uses_random_images(engine: LocalEngine) -> None:
    payload = {"model": MODEL, "batch_size": 2, "entries": [], "dataset": None}
    result, _ = run_body(engine, "measure", payload)
    assert value_of(result)["dense"]["median_ms"] > 0


def test_calibration_gives_sorted_variances_that_ppt_itself_would_see(engine: LocalEngine, checkpoint: Path) -> None:
    payload = {
        "model": MODEL,
        "weights": {"checkpoint": str(checkpoint)},
        "dataset": "digit-scenes",
        "num_images": 40,
        "batch_size": 16,
    }
    result, _ = run_body(engine, "calibrate", payload)
    variances = value_of(result)["ppt_variance"]
    assert list(variances) == ["0", "1", "2"]

    dense = prunefront.create_dense(ModelSpec.model_validate(MODEL), checkpoint=checkpoint)
    split = open_split("digit-scenes", "search", data_config=data_config_of(dense), num_images=40)
    (images,) = (batch for batch, _ in evaluation_batches(split, 40))
    for block in range(3):
        # The first site of PPT sees what the dense model computes there.
        sites = [{"block": block, "op": "pool_or_prune", "remove": 2}]
        ppt = prunefront.compress(dense, config("ppt", sites, threshold=1e-6)).eval()
        with torch.inference_mode():
            _, aux = ppt(images, return_aux=True)
        expected = sorted(aux.sites[0].values["var"].tolist())
        assert variances[str(block)] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224"])
def test_score_variances_of_rotary_models_are_what_ppt_sees(name: str) -> None:
    model = {**MODEL, "name": name}
    dense, images = prunefront.create_dense(ModelSpec.model_validate(model)).eval(), torch.randn(2, 3, 48, 48)
    sites = [{"block": 2, "op": "pool_or_prune", "remove": 2}]
    with torch.inference_mode():
        _, aux = prunefront.compress(dense, config("ppt", sites, model))(images, return_aux=True)
    torch.testing.assert_close(score_variances(dense, images)[2], aux.sites[0].values["var"], rtol=1e-4, atol=0)


def test_score_variances_leave_the_model_as_it_was() -> None:
    model = prunefront.create_dense(ModelSpec.model_validate(MODEL))
    images = torch.randn(2, 3, 48, 48)
    before = model.eval()(images)
    assert score_variances(model, images).shape == (3, 2)
    assert torch.equal(model(images), before)
    assert not any(block._forward_pre_hooks for block in model.blocks)  # type: ignore[union-attr]


def test_calibration_refuses_a_model_without_class_token(engine: LocalEngine) -> None:
    model = {**MODEL, "kwargs": {**MODEL["kwargs"], "class_token": False, "global_pool": "avg"}}
    result, _ = run_body(engine, "calibrate", {"model": model, "dataset": "digit-scenes"})
    assert result.failure is not None and "this model has none" in result.failure.message


def test_finetuning_trains_a_copy_and_resumes_to_the_same_weights(
    engine: LocalEngine, checkpoint: Path, tmp_path: Path
) -> None:
    payload = {
        "model": MODEL,
        "weights": {"checkpoint": str(checkpoint)},
        "config": EVIT,
        "dataset": "imagefolder:noise",
        "epochs": 2,
        "recipe": {"batch_size": 4},
        "checkpoint_dir": str(tmp_path / "whole"),
        "seed": 3,
    }
    before = load_file(checkpoint)
    result, events = run_body(engine, "finetune", payload)
    whole = value_of(result)
    assert len(whole["history"]) == 2
    trained = prunefront.load_model(whole["checkpoint"])
    assert prunefront.is_compressed(trained)
    assert not torch.equal(trained.state_dict()["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])
    assert torch.equal(load_file(checkpoint)["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])

    stopped_id = next(ids)
    engine.submit(task("finetune", id=stopped_id, payload={**payload, "checkpoint_dir": str(tmp_path / "parts")}))
    events = []
    while not any(isinstance(event, Progress) and 0 < event.done < event.total for event in events):
        events += engine.poll(0.2)
    engine.cancel(stopped_id)
    events += events_until_finished(engine, stopped_id)
    assert results_of(events)[stopped_id].state is TaskState.CANCELLED
    assert list((tmp_path / "parts").iterdir())  # where it will go on
    resumed, _ = run_body(engine, "finetune", {**payload, "checkpoint_dir": str(tmp_path / "parts")})
    assert value_of(resumed)["sha256"] == whole["sha256"]


def test_a_faulty_recipe_is_refused(engine: LocalEngine, tmp_path: Path) -> None:
    payload = {
        "model": MODEL,
        "config": EVIT,
        "dataset": "digit-scenes",
        "epochs": 1,
        "recipe": {"learning_rate": 1},
        "checkpoint_dir": str(tmp_path),
    }
    result, _ = run_body(engine, "finetune", payload)
    assert result.failure is not None and "learning_rate" in result.failure.message


def test_candidates_share_the_weights_of_the_dense_model() -> None:
    models = CandidateModels(ModelSpec.model_validate(MODEL), WeightsChoice())
    compressed = models.build(Entry.model_validate({"key": "a", "config": EVIT}))
    same = models.build(Entry.model_validate({"key": "b", "config": NO_OP}))
    assert same is models.dense
    pairs = zip(compressed.parameters(), models.dense.parameters(), strict=True)
    assert all(mine is shared for mine, shared in pairs)


def test_a_sibling_without_weights_is_refused() -> None:
    models = CandidateModels(ModelSpec.model_validate(MODEL), WeightsChoice())
    sibling = config(model={"name": "vit_small_patch16_224", "num_classes": 10})
    with pytest.raises(prunefront.PrunefrontError, match="weights of its own"):
        models.build(Entry.model_validate({"key": "s", "config": sibling}))
