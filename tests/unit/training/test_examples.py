"""The example level of Tri-Level E-ViT against recorded traces of the official code, and what it promises beyond."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from prunefront.errors import CheckpointError, ConfigError
from prunefront.training.errors import ExampleError
from prunefront.training.examples import ExampleOptions, ExampleSelection, replay_example_level

PROJECT = Path(__file__).parents[3]
OWN = PROJECT / "tests" / "data" / "golden"


def _cases() -> list[Path]:
    """Cases that travel with the project, and all others beside the clone."""
    beside = PROJECT.parent / "shared" / "golden"
    found = {path.relative_to(root): path for root in (OWN, beside) for path in root.glob("trilevel/*/case.json")}
    return [path for _, path in sorted(found.items()) if json.loads(path.read_text())["kind"] == "example_level"]


def _case(name: str) -> dict[str, Any]:
    case: dict[str, Any] = json.loads((OWN / "trilevel" / name / "case.json").read_text())
    return case


def _options(**changes: Any) -> ExampleOptions:
    return ExampleOptions(**{"interval_epochs": 3, "initial_removed": 10, "remove": 4} | changes)


def _run(
    selection: ExampleSelection,
    epochs: range,
    seed: int = 5,
    order: np.random.Generator | None = None,
) -> list[Any]:
    """Train on made-up bits that depend on the epoch and the image alone; return the events."""
    events = []
    for epoch in epochs:
        if (event := selection.start_epoch(epoch)) is not None:
            events.append(event)
        source = np.random.default_rng((seed, epoch))
        bits, variance = source.random(selection.num_examples) < 0.6, source.random(selection.num_examples)
        ids = selection.train if order is None else order.permutation(selection.train)
        for batch in np.array_split(ids, 3):
            selection.record(batch, bits[batch], variance[batch])
    return events


def _trace(events: list[Any]) -> list[Any]:
    return [
        (e.epoch, e.removed.tolist(), e.restored.tolist(), e.train.tolist(), e.pool.tolist(), e.ranking.tolist())
        for e in events
    ]


@pytest.mark.parametrize("path", _cases(), ids=lambda path: path.parent.name)
def test_replay_equals_everything_recorded(path: Path) -> None:
    case = json.loads(path.read_text())

    results = replay_example_level(case)

    assert results["initial"] == case["initial"]
    assert [event["epoch"] for event in results["events"]] == [event["epoch"] for event in case["events"]]
    for ours, recorded in zip(results["events"], case["events"], strict=True):
        assert {name: ours[name] for name in recorded} == recorded
    assert json.loads(json.dumps(results)) == results


def test_replay_follows_recorded_ties_only_as_far_as_scores_allow() -> None:
    case = _case("examples_base")
    event = case["events"][0]
    worst = max(event["forgetting_count"], key=lambda example: event["forgetting_count"][example])
    event["removed_in_official_order"] = [int(worst), *event["removed_in_official_order"][1:]]

    ours = replay_example_level(case)["events"][0]

    assert ours["removed"] == event["removed"]
    assert int(worst) not in ours["removed_in_official_order"]


def test_the_own_tie_rule_takes_an_acceptable_part_of_a_recorded_tie_group() -> None:
    # Followed with the recorded ids up to the tie, as the case asks; then the own rule decides.
    case = _case("examples_ties")
    recorded = {event["epoch"]: event for event in case["events"]}
    options = ExampleOptions(initial_removed=12, remove=6)
    selection = ExampleSelection(50, options, seed=case["config"]["numpy_seed"])
    for epoch, trace in enumerate(case["passes"][:60]):
        selection.start_epoch(epoch, recorded.get(epoch, {}).get("removed_in_official_order"))
        bits = np.array(list(trace["correct"])) == "1"
        selection.record(selection.train, bits[selection.train])

    event = selection.start_epoch(60)

    assert event is not None and recorded[60]["tie_at_boundary"]
    removed = set(event.removed.tolist())
    assert set(recorded[60]["must_remove"]) <= removed
    chosen = removed - set(recorded[60]["must_remove"])
    assert len(chosen) == recorded[60]["take_from_tie_group"]
    assert chosen <= set(recorded[60]["tie_group"])


def test_replay_runs_a_trace_without_recorded_events() -> None:
    case = _case("examples_base")
    recorded = case.pop("events")

    events = replay_example_level(case)["events"]

    assert events[0]["forgetting_count"] == recorded[0]["forgetting_count"]
    assert events[0]["removed"] == recorded[0]["removed"]


def test_replay_skips_images_that_a_pass_did_not_present() -> None:
    case = _case("examples_base")
    absent = case["initial"]["train"][0]
    presented = "".join("0" if example == absent else "1" for example in range(50))
    for trace in case["passes"][:30]:
        trace["presented"] = presented

    assert str(absent) not in replay_example_level(case)["events"][0]["forgetting_count"]


@pytest.mark.parametrize(
    "bits, expected",
    [
        ("0000", 30),  # never learnt
        ("0001", 0),
        ("1111", 0),
        ("1010", 2),
        ("0110", 1),
        ("0" * 30 + "1", 30),  # learnt beyond the cap only
        ("1" * 30 + "0", 0),  # forgotten beyond the cap
        ("1" * 29 + "0", 1),
    ],
)
def test_the_score_counts_forgetting_events_of_the_first_presentations(bits: str, expected: int) -> None:
    one_by_one = ExampleSelection(3, ExampleOptions(initial_removed=1, remove=1))
    at_once = ExampleSelection(3, ExampleOptions(initial_removed=1, remove=1))
    example = int(one_by_one.train[0])
    for bit in bits:
        one_by_one.record([example], [int(bit)])
    at_once.record([example] * len(bits), [bit == "1" for bit in bits])

    for selection in (one_by_one, at_once):
        ids, counts = selection.forgetting_counts()
        assert (ids.tolist(), counts.tolist()) == ([example], [expected])


def test_flat_class_attention_is_removed_first_among_equal_scores() -> None:
    options = _options(initial_removed=2, remove=2, score="forgetting+cls_var")
    selection = ExampleSelection(8, options)
    variance = np.linspace(1, 0, 8)
    for _ in range(2):
        selection.record(selection.train, np.ones(6, bool), variance[selection.train])
    flattest = sorted(selection.train.tolist())[::-1]

    event = selection.start_epoch(3)

    assert event is not None
    assert event.removed.tolist() == flattest[:2]
    assert event.class_variance is not None and event.class_variance[0] == pytest.approx(variance[flattest[0]])


def test_removing_nothing_is_safe_however_long_it_lasts() -> None:
    selection = ExampleSelection(50, _options(remove=0, events=20))
    train = selection.train

    assert _run(selection, range(70)) == []
    assert not selection.is_collecting
    assert selection.train.tolist() == train.tolist()
    assert selection.train.dtype == np.int64


def test_nothing_is_collected_after_the_last_event() -> None:
    selection = ExampleSelection(50, _options(events=2))

    events = _run(selection, range(12))

    assert [event.epoch for event in events] == [3, 6]
    assert not selection.is_collecting
    assert len(selection.forgetting_counts()[0]) == 0


@pytest.mark.parametrize("stop", [0, 1, 3, 7, 15, 20])
@pytest.mark.parametrize("score", ["forgetting", "forgetting+cls_var"])
def test_a_resumed_run_equals_an_uninterrupted_one(stop: int, score: str) -> None:
    options = _options(score=score)
    whole = ExampleSelection(50, options, seed=3)
    expected = _run(whole, range(20))
    first, second = ExampleSelection(50, options, seed=3), ExampleSelection(50, options, seed=3)
    events = _run(first, range(stop))

    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    events += _run(second, range(stop, 20))

    assert _trace(events) == _trace(expected)
    assert second.state_dict() == whole.state_dict()


def test_a_run_that_resumes_after_the_epoch_of_an_event_catches_up_once() -> None:
    selection = ExampleSelection(50, _options(), seed=3)
    _run(selection, range(3))

    event = selection.start_epoch(10)  # epochs 3, 6 and 9 were missed

    assert event is not None and len(event.removed) == 4
    assert selection.start_epoch(10) is None
    assert selection.start_epoch(11) is None
    assert selection.pending_epochs == (12, 15)


def test_an_event_without_statistics_exchanges_nothing() -> None:
    selection = ExampleSelection(50, _options())
    before = set(selection.train.tolist())

    event = selection.start_epoch(3)

    assert event is not None and len(event.removed) == len(event.restored) == 0
    assert set(selection.train.tolist()) == before


def test_kept_lowest_scores_stay_and_the_pool_keeps_its_size() -> None:
    plain, keeping = ExampleSelection(50, _options(), seed=2), ExampleSelection(50, _options(keep_lowest=3), seed=2)
    (expected, *_), (event, *_) = _run(plain, range(20)), _run(keeping, range(20))

    assert event.removed.tolist() == expected.ranking[3:7].tolist()
    assert len(event.pool) == len(keeping.pool) == 10


def test_without_shuffling_the_longest_left_out_return_first() -> None:
    selection = ExampleSelection(50, _options(shuffle=False))
    waiting = selection.pool.tolist()
    first, second, *_ = _run(selection, range(20))

    assert first.restored.tolist() == waiting[:4]
    assert second.restored.tolist() == waiting[4:8]


@settings(deadline=None, max_examples=60)
@given(
    num_examples=st.integers(3, 40),
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
    score=st.sampled_from(["forgetting", "forgetting+cls_var"]),
    shuffle=st.booleans(),
)
def test_no_image_is_ever_lost_or_doubled(
    num_examples: int, data: st.DataObject, seed: int, score: str, shuffle: bool
) -> None:
    initial_removed = data.draw(st.integers(0, num_examples - 1))
    remove = data.draw(st.integers(0, min(initial_removed, num_examples - initial_removed)))
    keep_lowest = data.draw(st.integers(0, num_examples - initial_removed - remove))
    options = ExampleOptions(
        initial_removed=initial_removed,
        remove=remove,
        keep_lowest=keep_lowest,
        interval_epochs=2,
        events=6,
        score=score,
        window_cap=3,
        shuffle=shuffle,
    )
    selection = ExampleSelection(num_examples, options, seed=seed)
    source = np.random.default_rng(seed)
    for epoch in range(15):
        event = selection.start_epoch(epoch)
        train, pool = selection.train, selection.pool
        assert len(train) == num_examples - initial_removed
        assert sorted([*train, *pool]) == list(range(num_examples))
        if event is not None:
            assert len(event.removed) == len(event.restored) <= remove
            assert not set(event.removed) & set(event.train)
            assert set(event.restored) <= set(event.train)
        seen = source.choice(train, data.draw(st.integers(0, len(train))))  # some twice, some never
        selection.record(seen, source.random(len(seen)) < 0.5, source.random(len(seen)))


def test_ranks_that_gather_their_bits_agree_in_whatever_order_they_are_merged() -> None:
    one, other = ExampleSelection(60, _options(), seed=9), ExampleSelection(60, _options(), seed=9)

    events = _run(one, range(20))
    merged_differently = _run(other, range(20), order=np.random.default_rng(1))

    assert len(events) == 5
    assert _trace(events) == _trace(merged_differently)


def test_ties_do_not_favour_low_ids() -> None:
    # All images are equally unforgettable; the list is sorted after the first event.
    selection = ExampleSelection(1000, _options(initial_removed=0.2, remove=0.1))
    removed = []
    for epoch in range(7):
        if (event := selection.start_epoch(epoch)) is not None:
            removed.append(event.removed)
        selection.record(selection.train, np.ones(800, bool))

    assert all(400 < ids.mean() < 600 for ids in removed)


def test_shares_are_the_counts_of_the_official_scripts() -> None:
    selection = ExampleSelection(1_281_167, ExampleOptions())

    assert len(selection.pool) == 256_233
    selection.record(selection.train, np.ones(len(selection.train), bool))
    event = selection.start_epoch(30)
    assert event is not None and len(event.removed) == 64_058


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"remove": 1.5}, "share such as 0.05"),
        ({"remove": -1}, "share such as 0.05"),
        ({"remove": True}, "share such as 0.05"),
        ({"initial_removed": "5"}, "share such as 0.05"),
        ({"score": "margin"}, "forgetting"),
        ({"interval": 3}, "interval"),
    ],
)
def test_options_that_cannot_be_right_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        _options(**changes)


@pytest.mark.parametrize(
    "num_examples, changes, seed, sentence",
    [
        (0, {}, 0, "Pass its length"),
        (10, {}, 0, "leave images to train on, but got 10 of 10"),
        (50, {"remove": 11}, 0, "at most initial_removed"),
        (50, {"keep_lowest": 37}, 0, "at most the 40 images trained on"),
        (50, {}, -1, "seed lies between"),
    ],
)
def test_counts_that_do_not_fit_the_data_are_refused(
    num_examples: int, changes: dict[str, Any], seed: int, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ExampleSelection(num_examples, _options(**changes), seed=seed)


@pytest.mark.parametrize(
    "ids, correct, variance, sentence",
    [
        ([0], [True, False], [0.1], "one id and one bit per image"),
        ([[0]], [[True]], [0.1], "Flatten both"),
        ([0.5], [True], [0.1], "whole numbers"),
        ([50], [True], [0.1], "but got 50, which is not in it"),
        ([-1], [True], [0.1], "but got -1, which is not in it"),
        (None, [True], [0.1], "rebuild the data loader after an event"),
        ([0], [2], [0.1], "but got 2. Compare"),
        ([0], [True], None, "Pass class_variance"),
        ([0], [True], [[0.1]], "one class-attention variance per image"),
        ([0], [True], [np.nan], "has not diverged"),
    ],
)
def test_statistics_that_cannot_be_right_are_refused_as_a_whole(
    ids: Any, correct: Any, variance: Any, sentence: str
) -> None:
    selection = ExampleSelection(50, _options(score="forgetting+cls_var"), seed=2)
    assert 0 in selection.train
    before = selection.state_dict()

    with pytest.raises(ExampleError, match=sentence):
        selection.record(selection.pool[:1] if ids is None else ids, correct, variance)
    assert selection.state_dict() == before


def test_an_empty_batch_records_nothing() -> None:
    selection = ExampleSelection(50, _options())

    selection.record([], [])

    assert len(selection.forgetting_counts()[0]) == 0


def test_epochs_and_tie_orders_that_cannot_be_right_are_refused() -> None:
    selection = ExampleSelection(50, _options())

    with pytest.raises(ExampleError, match="counted from 0"):
        selection.start_epoch(-1)
    with pytest.raises(ExampleError, match="between 0 and 49"):
        selection.start_epoch(3, [50])
    assert selection.pending_epochs == (3, 6, 9, 12, 15)


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda state: state.update(format="other"), "checkpoint of this version"),
        (lambda state: state.update(seed=4), "had seed=4, but this one has 0"),
        (lambda state: state.update(num_examples=49), "num_examples=49"),
        (lambda state: state["options"].update(remove=3), "Resume with the same"),
        (lambda state: state.pop("pending"), "damaged"),
        (lambda state: state["arrays"].update(train="no"), "damaged"),
        (lambda state: state["arrays"].update(train=state["arrays"]["pool"]), "has 10 images, not 40"),
        (lambda state: state["arrays"].update(pool=state["arrays"]["train"]), "every image once"),
        (lambda state: state["arrays"].update(forgotten=state["arrays"]["train"]), "forgotten has 80 entries"),
        (lambda state: state["generator"].update(key=[1], position=1), "damaged"),
        (lambda state: state["generator"].update(position=625), "625 of 624"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(damage: Any, sentence: str) -> None:
    selection = ExampleSelection(50, _options())
    before = selection.state_dict()
    state = copy.deepcopy(before)
    damage(state)

    with pytest.raises(CheckpointError, match=sentence):
        selection.load_state_dict(state)
    assert selection.state_dict() == before


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda case: case.update(kind="loss"), "kind 'example_level'"),
        (lambda case: case["config"].pop("remove_n"), "lacks 'remove_n'"),
        (lambda case: case.pop("passes"), "lacks 'passes'"),
    ],
)
def test_a_case_that_cannot_be_replayed_is_refused(change: Any, sentence: str) -> None:
    case = _case("examples_base")
    change(case)

    with pytest.raises(ConfigError, match=sentence):
        replay_example_level(case)
