"""Many threads and processes, some of them killed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from store import JobState, LeaseLostError, Store, open_store
from tests.integration.store.conftest import MovableClock
from tests.integration.store.writes import propose, queue, start

NUM_THREADS = 8
ROOT = Path(__file__).parents[3]


def run_in_threads(function: Callable[[int], object]) -> list[object]:
    """Call the function in all threads at once."""
    barrier = threading.Barrier(NUM_THREADS)

    def call(index: int) -> object:
        barrier.wait()
        return function(index)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(call, range(NUM_THREADS)))


def start_process(url: str, mode: str) -> subprocess.Popen[str]:
    """Start a writer process that waits to be let go."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integration.store.writer_process", url, mode],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_threads_never_get_the_same_job(store: Store) -> None:
    ids = {queue(store).id for _ in range(40)}

    def claim_all(index: int) -> list[str]:
        claimed = []
        while (job := store.claim_job(f"c{index}", 60)) is not None:
            assert job.lease_owner == f"c{index}"
            claimed.append(job.id)
        return claimed

    claims = Counter(job_id for claimed in run_in_threads(claim_all) for job_id in claimed)  # type: ignore[attr-defined]
    assert claims == Counter(ids)


def test_an_expired_job_is_taken_over_by_one_thread(timed_store: Store, clock: MovableClock) -> None:
    job = start(timed_store)
    clock.advance(61)
    taken = [record for record in run_in_threads(lambda index: timed_store.claim_job(f"c{index}", 60)) if record]
    assert len(taken) == 1
    record = timed_store.get_job(job.id)
    assert taken == [record] and (record.fence, record.times_lost) == (2, 1)


def test_processes_that_start_at_once_share_new_tables_and_never_a_job(new_database_url: str) -> None:
    processes = [start_process(new_database_url, "claim") for _ in range(3)]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "opened\n"
        with open_store(new_database_url) as store:
            ids = {queue(store).id for _ in range(60)}
            outputs = []
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            for process in processes:
                output, _ = process.communicate()
                assert process.returncode == 0
                outputs.append(output)
            claims = [line.split()[1:] for output in outputs for line in output.splitlines()]
            assert Counter(job_id for job_id, _ in claims) == Counter(ids)
            assert {fence for _, fence in claims} == {"1"}
            assert store.count_jobs()[JobState.RUNNING] == 60
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_one_idempotency_key_makes_one_job_however_many_send_it(store: Store) -> None:
    jobs = run_in_threads(lambda _: queue(store, idempotency_key="k", request_hash="h"))
    assert len({job.id for job in jobs}) == 1  # type: ignore[attr-defined]
    assert len(store.list_jobs()[0]) == 1


def test_one_device_is_registered_once_however_many_do(store: Store) -> None:
    run_in_threads(lambda index: store.save_device("cpu", "CPU", "cpu", {"index": index}))
    assert len(store.list_devices()) == 1


def test_numbers_have_no_gaps_when_threads_record_at_once(store: Store) -> None:
    job = start(store)
    run_in_threads(lambda index: [propose(store, job, f"h{index}-{n % 4}") for n in range(6)])
    candidates = store.list_candidates(job.id)
    assert [candidate.number for candidate in candidates] == list(range(4 * NUM_THREADS))


def test_watchers_miss_no_event_while_threads_write(store: Store) -> None:
    job = start(store)
    total = 10 * NUM_THREADS
    seen: list[int] = [0]

    def watch() -> None:
        # As the event stream does: always from the last id seen.
        while len(seen) < total + 3:
            seen.extend(event.id for event in store.events_after(job.id, seen[-1]))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    run_in_threads(lambda index: [store.add_event(job.id, "note", {"n": n}) for n in range(10)])
    watcher.join(timeout=60)
    assert not watcher.is_alive()
    assert seen[1:] == [event.id for event in store.events_after(job.id, limit=500)]


def test_users_and_controller_change_a_job_without_losing_a_flag(store: Store) -> None:
    job = start(store)

    def work(index: int) -> None:
        if index == 0:
            store.request_cancel(job.id)
        else:
            for n in range(10):
                store.set_progress(job.id, job.fence, f"stage {index}", n, 10, "")
                store.renew_lease(job.id, job.fence, 60)

    run_in_threads(work)
    assert store.renew_lease(job.id, job.fence, 60).cancel_requested


def test_a_superseded_holder_never_writes_after_its_successor(store: Store) -> None:
    old = start(store, lease_s=-1)
    stop = threading.Event()
    refused: list[int] = []

    def keep_writing() -> None:
        for index in range(10_000):
            if stop.is_set():
                return
            try:
                propose(store, old, f"old{index}")
            except LeaseLostError:
                refused.append(index)
                return

    writer = threading.Thread(target=keep_writing, daemon=True)
    writer.start()
    while not store.list_candidates(old.id):
        pass
    # Postgres passes over a row that the old holder is writing at this very moment.
    while (new := store.claim_job("successor", 60)) is None:
        pass
    assert new.fence == old.fence + 1
    first_new = propose(store, new, "new")
    writer.join(timeout=60)
    stop.set()
    assert refused
    assert store.list_candidates(old.id)[-1] == first_new


def test_a_killed_writer_loses_and_doubles_nothing(store: Store, database_url: str) -> None:
    job = queue(store)
    confirmed: list[tuple[str, int, int]] = []
    for num_lines in (2, 25):
        process = start_process(database_url, "record")
        try:
            assert process.stdin is not None and process.stdout is not None
            assert process.stdout.readline() == "opened\n"
            process.stdin.write("go\n")
            process.stdin.flush()
            lines = [process.stdout.readline() for _ in range(num_lines)]
            process.kill()
            # What was confirmed before the kill arrived, except a line cut in the middle.
            lines += [line for line in process.stdout.readlines() if line.endswith("\n")]
        finally:
            process.kill()
            process.communicate()
        for line in lines:
            kind, index, number = line.split()
            confirmed.append((kind, int(index), int(number)))
    candidates = store.list_candidates(job.id)
    assert [candidate.number for candidate in candidates] == list(range(len(candidates)))
    assert [candidate.params["index"] for candidate in candidates] == list(range(len(candidates)))
    stored = Counter(("candidate", candidate.params["index"], candidate.number) for candidate in candidates)
    for candidate in candidates:
        key = (candidate.params["index"], candidate.number)
        stored.update([("evaluation", *key)] * len(candidate.evaluations))
        stored.update([("measurement", *key)] * len(candidate.measurements))
    assert set(stored.values()) == {1}
    assert set(confirmed) <= set(stored)
    assert store.get_job(job.id).attempts == 2
