"""A process that works on the store until it is killed: ``python -m tests.integration.store.writer_process URL MODE``.

It prints a line for everything the store has confirmed.
"""

from __future__ import annotations

import itertools
import sys

from store import Store, open_store
from tests.integration.store.writes import evaluate, measure, propose


def record_forever(store: Store) -> None:
    """Claim the job and record candidates with their numbers, from the beginning, whatever is there already."""
    job = store.claim_job("to be killed", lease_s=0.0)
    assert job is not None
    for index in itertools.count():
        candidate = propose(store, job, f"h{index}", params={"index": index})
        print("candidate", index, candidate.number, flush=True)
        evaluate(store, job, candidate.number, top1=0.5)
        print("evaluation", index, candidate.number, flush=True)
        measure(store, job, candidate.number)
        print("measurement", index, candidate.number, flush=True)
        store.set_progress(job.id, job.fence, f"stage {index}", index, 0, "")


def claim_all(store: Store) -> None:
    """Claim until nothing is left."""
    while (job := store.claim_job("one of many", lease_s=3600)) is not None:
        print("claimed", job.id, job.fence, flush=True)


def main(url: str, mode: str) -> None:
    """Open the store, which may need its tables, and work."""
    with open_store(url) as store:
        print("opened", flush=True)
        # All processes of a test are let go at once.
        sys.stdin.readline()
        {"record": record_forever, "claim": claim_all}[mode](store)


if __name__ == "__main__":
    main(*sys.argv[1:])
