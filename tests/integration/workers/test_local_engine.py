"""The promises of ``workers.engines.base``, tried on the local engine with real processes and real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prunefront.errors import UnknownNameError
from tests.integration.workers.conftest import (
    EngineFactory,
    child_pids,
    events_until_finished,
    is_alive,
    results_of,
    run,
    task,
    wait_for,
)
from workers.engines.base import EngineError, Finished, Item, Progress, Started
from workers.engines.local import LocalEngine
from workers.tasks import FailureCause, TaskState


def test_a_task_reports_its_start_its_progress_and_its_value_in_this_order(engine: LocalEngine) -> None:
    engine.submit(task("echo", payload={"answer": 42}))
    started, progress, finished = events_until_finished(engine, "task")
    assert isinstance(started, Started) and started.num_threads >= 1
    assert progress == Progress(task_id="task", done=1.0, total=1.0, message="echoed")
    assert isinstance(finished, Finished)
    assert finished.result.state is TaskState.SUCCEEDED
    assert finished.result.value == {"pid": started.pid, "answer": 42}
    assert Path(started.log_path).read_text() == "a line in the log\n"


def test_one_process_serves_many_tasks_in_the_order_of_submission(engine: LocalEngine) -> None:
    names = [f"t{i}" for i in range(5)]
    for name in names:
        engine.submit(task("echo", id=name))
    results = results_of(events_until_finished(engine, *names))
    assert list(results) == names
    assert len({result.value["pid"] for result in results.values() if result.value}) == 1


def test_items_arrive_even_if_their_task_dies_afterwards(engine: LocalEngine) -> None:
    engine.submit(task("several_items", payload={"keys": ["a", "b"], "then_die": True}))
    events = events_until_finished(engine, "task")
    assert [event.key for event in events if isinstance(event, Item)] == ["a", "b"]
    assert results_of(events)["task"].state is TaskState.LOST


def test_a_payload_larger_than_a_pipe_arrives_whole(engine: LocalEngine) -> None:
    text = "x" * 3_000_000
    result = run(engine, task("echo", payload={"text": text}))
    assert result.value is not None and result.value["text"] == text


def test_an_exception_is_failed_with_type_message_traceback_and_log(engine: LocalEngine) -> None:
    result = run(engine, task("crash", payload={"how": "raise"}))
    assert result.state is TaskState.FAILED and result.failure is not None
    assert (result.failure.type, result.failure.message) == ("RuntimeError", "the body broke")
    assert result.failure.cause == FailureCause.ERROR
    assert "in crash" in (result.failure.traceback or "")
    assert "about to go down" in result.failure.log_tail
    assert "about to go down" in Path(result.failure.log_path or "").read_text()


def test_a_failed_task_leaves_the_process_in_use(engine: LocalEngine) -> None:
    first = run(engine, task("echo", id="1"))
    run(engine, task("crash", id="2", payload={"how": "raise"}))
    last = run(engine, task("echo", id="3"))
    assert first.value == last.value


def test_running_out_of_memory_is_failed_as_such_and_replaces_the_process(engine: LocalEngine) -> None:
    before = run(engine, task("echo", id="1"))
    result = run(engine, task("crash", id="2", payload={"how": "memory"}))
    assert result.state is TaskState.FAILED and result.failure is not None
    assert (result.failure.type, result.failure.cause) == ("MemoryError", FailureCause.OUT_OF_MEMORY)
    after = run(engine, task("echo", id="3"))
    assert before.value != after.value


@pytest.mark.parametrize(
    ("how", "cause", "words"),
    [("exit", FailureCause.EXIT, "exit code 7"), ("segfault", FailureCause.SIGNAL, "SIGSEGV (signal 11)")],
)
def test_a_crash_is_lost_with_its_cause_and_the_end_of_the_log(
    engine: LocalEngine, how: str, cause: FailureCause, words: str
) -> None:
    result = run(engine, task("crash", payload={"how": how}))
    assert result.state is TaskState.LOST and result.failure is not None
    assert result.failure.cause == cause
    assert words in result.failure.message
    assert "about to go down" in result.failure.log_tail
    if how == "segfault":
        assert "stand_in_tasks.py" in result.failure.log_tail  # faulthandler's stack


def test_a_killed_process_is_lost_and_the_next_task_gets_a_fresh_one(engine: LocalEngine, tmp_path: Path) -> None:
    started = tmp_path / "started"
    engine.submit(task("wait", id="1", payload={"started": str(started)}))
    wait_for(lambda: started.exists() and started.read_text(), engine)
    pid = int(started.read_text())
    os.kill(pid, signal.SIGKILL)
    result = results_of(events_until_finished(engine, "1"))["1"]
    assert result.state is TaskState.LOST and result.failure is not None
    assert "SIGKILL (signal 9)" in result.failure.message
    assert result.failure.cause == FailureCause.SIGNAL
    after = run(engine, task("echo", id="2"))
    assert after.value is not None and after.value["pid"] != pid


def test_a_process_killed_while_idle_costs_no_task(engine: LocalEngine) -> None:
    first = run(engine, task("echo", id="1"))
    assert first.value is not None
    os.kill(first.value["pid"], signal.SIGKILL)
    wait_for(lambda: not is_alive(first.value["pid"]))
    assert run(engine, task("echo", id="2")).state is TaskState.SUCCEEDED


def test_a_process_that_dies_before_it_takes_up_a_task_costs_no_task(engine: LocalEngine) -> None:
    first = run(engine, task("echo", id="1"))
    assert first.value is not None
    os.kill(first.value["pid"], signal.SIGSTOP)  # alive, so that the task is handed over, and deaf
    engine.submit(task("echo", id="2"))
    assert engine.poll(0.3) == []
    assert engine.devices()[0].running_task == "2"
    os.kill(first.value["pid"], signal.SIGKILL)
    second = results_of(events_until_finished(engine, "2"))["2"]
    assert second.state is TaskState.SUCCEEDED and second.value is not None
    assert second.value["pid"] != first.value["pid"]


def test_a_process_that_cannot_start_says_why(make_engine: EngineFactory) -> None:
    engine = make_engine(task_modules=["tests.integration.workers.no_such_module"])
    result = run(engine, task("echo"))
    assert result.state is TaskState.LOST and result.failure is not None
    assert result.failure.cause == FailureCause.START
    assert "no_such_module" in result.failure.log_tail


def test_a_process_that_cannot_be_created_costs_one_task_not_the_engine(engine: LocalEngine, tmp_path: Path) -> None:
    logs = tmp_path / "work" / "logs"
    logs.rmdir()
    result = run(engine, task("echo", id="1"))
    assert result.state is TaskState.LOST and result.failure is not None
    assert result.failure.cause == FailureCause.START
    logs.mkdir()
    assert run(engine, task("echo", id="2")).state is TaskState.SUCCEEDED


def test_cancelling_lets_a_listening_task_store_its_work_and_ends_the_process(
    engine: LocalEngine, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    engine.submit(task("wait", payload={"started": str(started), "listens": True}))
    wait_for(lambda: started.exists() and started.read_text(), engine)
    engine.cancel("task")
    result = results_of(events_until_finished(engine, "task"))["task"]
    assert result.state is TaskState.CANCELLED and result.failure is None
    assert (tmp_path / "started.checkpoint").exists()
    assert not is_alive(int(started.read_text()))


def test_cancelling_a_deaf_task_unwinds_it_by_sigterm(engine: LocalEngine, tmp_path: Path) -> None:
    started = tmp_path / "started"
    engine.submit(task("wait", payload={"started": str(started)}))
    wait_for(lambda: started.exists() and started.read_text(), engine)
    engine.cancel("task")
    assert results_of(events_until_finished(engine, "task"))["task"].state is TaskState.CANCELLED
    assert (tmp_path / "started.unwound").exists()


def test_cancelling_a_stubborn_task_kills_it(engine: LocalEngine, tmp_path: Path) -> None:
    started = tmp_path / "started"
    engine.submit(task("wait", payload={"started": str(started), "stubborn": True}))
    wait_for(lambda: started.exists() and started.read_text(), engine)
    engine.cancel("task")
    assert results_of(events_until_finished(engine, "task"))["task"].state is TaskState.CANCELLED
    assert not is_alive(int(started.read_text()))


def test_cancelling_a_queued_task_keeps_it_from_starting(engine: LocalEngine, tmp_path: Path) -> None:
    started = tmp_path / "started"
    engine.submit(task("echo", id="1"))
    engine.submit(task("wait", id="2", payload={"started": str(started)}))
    engine.cancel("2")
    engine.cancel("nobody")
    results = results_of(events_until_finished(engine, "1", "2"))
    assert (results["1"].state, results["2"].state) == (TaskState.SUCCEEDED, TaskState.CANCELLED)
    assert not started.exists()


def test_a_task_over_its_time_limit_is_ended_with_a_fresh_process_afterwards(
    engine: LocalEngine, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    result = run(engine, task("wait", id="1", timeout_s=0.2, payload={"started": str(started), "listens": True}))
    assert result.state is TaskState.TIMED_OUT and result.failure is not None
    assert result.failure.cause == FailureCause.TIME_OUT
    assert "limit of 0.2 s" in result.failure.message
    after = run(engine, task("echo", id="2"))
    assert after.value is not None and after.value["pid"] != int(started.read_text())


def test_a_deaf_task_over_its_time_limit_is_timed_out_too(engine: LocalEngine, tmp_path: Path) -> None:
    payload = {"started": str(tmp_path / "started"), "stubborn": True}
    assert run(engine, task("wait", timeout_s=0.2, payload=payload)).state is TaskState.TIMED_OUT


def test_a_process_whose_memory_grew_is_replaced(make_engine: EngineFactory) -> None:
    engine = make_engine(max_memory_growth_mib=64)
    small = run(engine, task("grow", id="1", payload={"num_bytes": 1000}))
    large = run(engine, task("grow", id="2", payload={"num_bytes": 100 * 2**20}))
    after = run(engine, task("grow", id="3", payload={"num_bytes": 1000}))
    assert small.value == large.value
    assert after.value != large.value


def test_an_id_is_taken_once(engine: LocalEngine) -> None:
    engine.submit(task("echo"))
    with pytest.raises(EngineError, match="'task' was used before"):
        engine.submit(task("echo"))
    events_until_finished(engine, "task")
    with pytest.raises(EngineError, match="'task' was used before"):
        engine.submit(task("echo"))


def test_unusable_tasks_are_refused_in_one_sentence(engine: LocalEngine) -> None:
    with pytest.raises(UnknownNameError, match="Unknown device 'cuda:7'"):
        engine.submit(task("echo", device="cuda:7"))
    with pytest.raises(EngineError, match="JSON values only"):
        engine.submit(task("echo", payload={"path": Path()}))
    with pytest.raises(EngineError, match="characters to name its log"):
        engine.submit(task("echo", id=""))
    with pytest.raises(EngineError, match="characters to name its log"):
        engine.submit(task("echo", id="x" * 300))


def test_an_unknown_kind_fails_as_bad_input(engine: LocalEngine) -> None:
    result = run(engine, task("dance"))
    assert result.state is TaskState.FAILED and result.failure is not None
    assert result.failure.cause == FailureCause.INPUT
    assert "Unknown task kind 'dance'" in result.failure.message


def test_a_value_that_is_not_json_fails_the_task_only(engine: LocalEngine) -> None:
    result = run(engine, task("unknown_value", id="1"))
    assert result.state is TaskState.FAILED and result.failure is not None
    assert "not JSON serializable" in result.failure.message
    assert run(engine, task("echo", id="2")).state is TaskState.SUCCEEDED


def test_ids_with_awkward_characters_get_logs_inside_the_log_folder(engine: LocalEngine, tmp_path: Path) -> None:
    run(engine, task("echo", id="../job 1/evaluate:3"))
    logs = [path.name for path in (tmp_path / "work" / "logs").iterdir()]
    assert "%2E%2E%2Fjob%201%2Fevaluate%3A3.log" in logs


def test_the_log_of_a_silent_success_is_removed(engine: LocalEngine, tmp_path: Path) -> None:
    result = run(engine, task("quiet"))
    assert result.value is not None and int(result.value["omp"]) >= 1 and result.value["devices"] == ""
    assert not list((tmp_path / "work" / "logs").glob("*.log"))


def test_devices_say_what_they_are_doing(engine: LocalEngine, tmp_path: Path) -> None:
    started = tmp_path / "started"
    engine.submit(task("wait", id="1", payload={"started": str(started), "listens": True}))
    engine.submit(task("echo", id="2"))
    wait_for(started.exists, engine)
    (slot,) = engine.devices()
    assert (slot.name, slot.kind, slot.running_task, slot.num_queued) == ("cpu", "cpu", "1", 1)
    assert slot.description


def test_closing_ends_every_task_and_process_and_returns_the_last_events(
    make_engine: EngineFactory, tmp_path: Path
) -> None:
    engine = make_engine(stop_grace_s=0.2, terminate_grace_s=0.2)
    before = child_pids()
    started = tmp_path / "started"
    engine.submit(task("with_grandchild", id="1", payload={"started": str(started)}))
    engine.submit(task("echo", id="2"))
    wait_for(lambda: started.exists() and started.read_text(), engine)
    results = results_of(engine.close())
    assert {result.state for result in results.values()} == {TaskState.CANCELLED} and len(results) == 2
    assert child_pids() == before
    wait_for(lambda: not any(is_alive(int(pid)) for pid in started.read_text().split()))
    with pytest.raises(EngineError, match="closed"):
        engine.submit(task("echo", id="3"))
    assert engine.close() == []


def test_a_killed_controller_leaves_no_process_behind(tmp_path: Path, lock_dir: Path) -> None:
    started = tmp_path / "started"
    options = {
        "work_dir": str(tmp_path / "work"),
        "lock_dir": str(lock_dir),
        "kind": "with_grandchild",
        "payload": {"started": str(started)},
    }
    command = [sys.executable, "-m", "tests.integration.workers.controller_process", json.dumps(options)]
    controller = subprocess.Popen(command, cwd=Path(__file__).parents[3])
    try:
        wait_for(lambda: started.exists() and len(started.read_text().split()) == 2)
        pids = [int(pid) for pid in started.read_text().split()]
        assert all(map(is_alive, pids))
    finally:
        controller.kill()
        controller.wait()
    wait_for(lambda: not any(map(is_alive, pids)))


def test_a_child_outlives_the_thread_that_started_it(engine: LocalEngine) -> None:
    # Linux signals the end of the starting thread as if the whole controller had died.
    results = []
    thread = threading.Thread(target=lambda: results.append(run(engine, task("echo", id="1"))))
    thread.start()
    thread.join()
    assert run(engine, task("echo", id="2")).value == results[0].value


def test_a_controller_killed_while_its_child_starts_leaves_no_process_behind(tmp_path: Path, lock_dir: Path) -> None:
    read_fd, write_fd = os.pipe()
    os.close(write_fd)
    arguments = ["--device", "cpu", "--events-fd", "1", "--controller-pid", "1", "--lock-dir", str(lock_dir)]
    arguments += ["--log", str(tmp_path / "log"), "--run-lock", str(tmp_path / "run.lock")]
    with os.fdopen(read_fd) as nobody:
        orphan = subprocess.run(
            [sys.executable, "-m", "workers.child", *arguments], stdin=nobody, timeout=60, cwd=Path(__file__).parents[3]
        )
    assert orphan.returncode == 70  # its parent is not the controller it was started by


def test_two_engines_do_not_use_a_device_at_once_while_one_measures(make_engine: EngineFactory, tmp_path: Path) -> None:
    started = tmp_path / "started"
    sharing = make_engine(work_dir=tmp_path / "a")
    measuring = make_engine(work_dir=tmp_path / "b")
    sharing.submit(task("wait", id="1", payload={"started": str(started), "listens": True}))
    wait_for(started.exists, sharing)
    measuring.submit(task("overlap", id="2", exclusive=True, timeout_s=30, payload={"length_s": 0.3}))
    waiting = Progress(task_id="2", done=0.0, total=1.0, message="waiting for device")
    events = []
    wait_for(lambda: events.extend(measuring.poll(0.1)) or waiting in events)
    # A task that shares the device queues up behind the measurement that waits.
    sharing.cancel("1")
    sharing.submit(task("overlap", id="3", payload={"length_s": 0.0}))
    shared = results_of(events_until_finished(sharing, "3"))["3"].value
    measured = results_of(events_until_finished(measuring, "2"))["2"].value
    assert shared is not None and measured is not None
    assert shared["began"] >= measured["ended"] or shared["ended"] <= measured["began"]


def test_two_engines_share_a_device_when_nobody_measures(make_engine: EngineFactory, tmp_path: Path) -> None:
    first, second = make_engine(work_dir=tmp_path / "a"), make_engine(work_dir=tmp_path / "b")
    started = tmp_path / "started"
    first.submit(task("wait", id="1", payload={"started": str(started), "listens": True}))
    wait_for(started.exists, first)
    assert run(second, task("echo", id="2")).state is TaskState.SUCCEEDED


def test_a_task_waiting_for_its_device_can_be_cancelled_and_is_not_timed_out(
    make_engine: EngineFactory, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    first, second = make_engine(work_dir=tmp_path / "a"), make_engine(work_dir=tmp_path / "b")
    first.submit(task("wait", id="1", exclusive=True, payload={"started": str(started), "listens": True}))
    wait_for(started.exists, first)
    second.submit(task("echo", id="2", timeout_s=0.01))
    events = []
    wait_for(lambda: events.extend(second.poll(0.1)) or any(isinstance(event, Progress) for event in events))
    events += second.poll(0.5)
    assert not any(isinstance(event, Finished) for event in events)
    second.cancel("2")
    assert results_of(events_until_finished(second, "2"))["2"].state is TaskState.CANCELLED


def test_a_killed_process_gives_its_device_back(make_engine: EngineFactory, tmp_path: Path) -> None:
    started = tmp_path / "started"
    first, second = make_engine(work_dir=tmp_path / "a"), make_engine(work_dir=tmp_path / "b")
    first.submit(task("wait", id="1", exclusive=True, payload={"started": str(started)}))
    wait_for(lambda: started.exists() and started.read_text(), first)
    os.kill(int(started.read_text()), signal.SIGKILL)
    assert run(second, task("echo", id="2", exclusive=True)).state is TaskState.SUCCEEDED


def test_one_task_id_does_not_run_in_two_processes_at_once(make_engine: EngineFactory, tmp_path: Path) -> None:
    first_started, second_started = tmp_path / "first", tmp_path / "second"
    first, second = make_engine(), make_engine()  # one work_dir, as two controllers one after the other
    first.submit(task("wait", payload={"started": str(first_started), "listens": True}))
    wait_for(first_started.exists, first)
    second.submit(task("wait", payload={"started": str(second_started), "listens": True}))
    events = []
    wait_for(lambda: events.extend(second.poll(0.1)) or any(isinstance(event, Progress) for event in events))
    assert not second_started.exists()
    first.cancel("task")
    events_until_finished(first, "task")
    wait_for(second_started.exists, second)
