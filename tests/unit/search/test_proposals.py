from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunefront.schedule import plan_schedule
from search.proposals import SAMPLERS, STARTUP_TRIALS, Proposer, Told, derived_seed, quasi_random, radical_inverse
from search.space import ScheduleSpace
from tests.unit.search.spaces import space_of

BATCH = 8
SEEDS = 3  # schedules from elsewhere that the study knows before its first proposal


def values_of(params: dict[str, Any]) -> tuple[float, float]:
    """An objective whose value depends on every parameter."""
    numbers = [float(value) if isinstance(value, float) else len(str(value)) for value in params.values()]
    return sum(number / (place + 2) for place, number in enumerate(numbers)), params["share"] * 100


def seeds(space: ScheduleSpace) -> list[Told]:
    told = []
    for number in range(SEEDS):
        params = quasi_random(space.distributions, 99, number)
        told.append(Told(params=params, values=values_of(params)))
    return told


class Search:
    """Asks in batches and tells whole batches, as a search job does; can forget its study and rebuild it."""

    def __init__(self, sampler: str) -> None:
        self.space = space_of()
        self.sampler = sampler
        self.told: list[Told] = []
        self.pending: list[tuple[int, Told]] = []
        self.proposed: list[dict[str, Any]] = []
        self.rebuild()

    def rebuild(self) -> None:
        history = [*seeds(self.space), *self.told]
        self.proposer = Proposer(self.space, sampler=self.sampler, seed=5, history=history)
        self.pending = [(self.proposer.add(told), told) for _, told in self.pending]

    def step(self) -> None:
        """Propose once more; every seventh proposal is known already and dropped."""
        number = len(self.proposed)
        trial, params = self.proposer.ask(number)
        self.proposed.append(params)
        if number % 7 == 6:
            self.proposer.drop(trial)
        else:
            generation = self.proposer.generation(trial)
            self.pending.append((trial, Told(params=params, values=None, generation=generation)))
        if len(self.proposed) % BATCH == 0:
            for trial, told in self.pending:
                self.proposer.tell(trial, values_of(told.params))
                self.told.append(Told(params=told.params, values=values_of(told.params), generation=told.generation))
            self.pending = []


@pytest.mark.parametrize(
    ("sampler", "count"), [("auto", 48), ("tpe", 48), ("nsga2", 128), ("gp", 20), ("random", 24), ("qmc", 24)]
)
@pytest.mark.parametrize("every", [5, 11])
def test_a_rebuilt_study_proposes_what_the_uninterrupted_one_would(sampler: str, count: int, every: int) -> None:
    whole, interrupted = Search(sampler), Search(sampler)
    for number in range(count):
        whole.step()
        if number % every == every - 1:
            interrupted.rebuild()
        interrupted.step()
        assert interrupted.proposed[-1] == whole.proposed[-1], f"proposal {number}"
    assert len({str(params) for params in whole.proposed}) == count


@pytest.mark.parametrize(("sampler", "count"), [("tpe", 64), ("nsga2", 64), ("gp", 18)])
def test_a_sampler_learns_from_what_it_was_told(sampler: str, count: int) -> None:
    """With other values told, the same seeds propose other points."""
    whole, other = Search(sampler), Search(sampler)
    other.told = [Told(params=params, values=(-1.0, 1.0)) for params in (t.params for t in seeds(other.space))]
    for _ in range(count):
        whole.step()
    other.rebuild()
    for _ in range(count):
        other.step()
    if sampler != "nsga2":
        assert other.proposed != whole.proposed
    else:
        assert max(told.generation for told in whole.told) >= 1


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_proposes_points_of_the_space(sampler: str) -> None:
    search = Search(sampler)
    for _ in range(STARTUP_TRIALS + 2):
        search.step()
    for params in search.proposed:
        assert set(params) == set(search.space.distributions)
        assert all(d._contains(d.to_internal_repr(params[name])) for name, d in search.space.distributions.items())
        plan_schedule(search.space.config(params), search.space.geometry)


@pytest.mark.parametrize(("sampler", "turns"), [("tpe", 1), ("auto", 2)])
def test_aims_cover_the_latency_range_whatever_the_sampler_learns(sampler: str, turns: int) -> None:
    search = Search(sampler)
    for _ in range(32 * turns):
        search.step()
    low, high = search.space.min_share, search.space.max_share
    places = sorted((params["share"] - low) / (high - low) for params in search.proposed[::turns])
    assert all(later - earlier < 2.5 / 32 for earlier, later in itertools.pairwise([0.0, *places, 1.0]))


def test_every_second_proposal_of_auto_varies_a_schedule_of_the_front() -> None:
    space = space_of()
    good, dominated, useless = (quasi_random(space.distributions, 7, number) for number in range(3))
    ms = 0.6 * space.dense_ms
    history = [
        Told(params=good, values=(0.95, ms)),
        Told(params=dominated, values=(0.94, ms + 1)),
        Told(params=useless, values=(0.50, ms - 1)),
    ]
    proposer = Proposer(space, sampler="auto", seed=0, history=history)
    for proposal in range(1, 41, 2):
        trial, params = proposer.ask(proposal)
        proposer.drop(trial)
        assert params["method"] == good["method"]
        assert 0.84 * 0.6 <= params["share"] <= 0.6 or params["share"] == space.min_share
        changed = {name.split("_")[1] for name in params if params[name] != good[name] and name != "share"}
        assert 1 <= len(changed) <= 2, "blocks"


def test_quasi_random_points_are_those_of_the_job_seed() -> None:
    distributions = space_of().distributions
    first = [quasi_random(distributions, 1, number) for number in range(8)]
    assert first == [quasi_random(distributions, 1, number) for number in range(8)]
    assert first != [quasi_random(distributions, 2, number) for number in range(8)]


@given(st.integers(1, 10))
def test_the_first_points_of_a_van_der_corput_sequence_fill_every_gap(bits: int) -> None:
    count = 2**bits
    assert sorted(radical_inverse(number) for number in range(count)) == [place / count for place in range(count)]


def test_derived_seeds_differ_between_proposals_and_jobs() -> None:
    drawn = {derived_seed(seed, proposal) for seed in range(20) for proposal in range(200)}
    assert len(drawn) == 4000
    assert all(0 <= seed < 2**32 for seed in drawn)
    assert derived_seed(0, 0) == 2893166218, "stored searches depend on it"
