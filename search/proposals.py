"""Optuna as the proposer: an in-memory study, rebuilt from the store on resume.

Every ask gets a sampler seeded by (job seed, proposal number), so a search that was interrupted proposes what it would
have proposed otherwise. Values told are (accuracy estimate off the shelf, predicted latency).
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from torch.quasirandom import SobolEngine

from search.pareto import pareto_front
from search.space import OPERATIONS, Params, ScheduleSpace

STARTUP_TRIALS = 16
EI_CANDIDATES = 24
# Of "auto", every second proposal varies a schedule that nothing known dominates: a little faster, in one or two blocks
# otherwise. It is drawn among those that lose at most this much top-1 to the best.
VARIED_LOSS = 0.03
VARIED_SPEED = (0.85, 1.0)  # share of the parent's latency that a variation aims at
WEIGHT_STEP = 0.25  # standard deviation by which a varied block's drop weight moves
NEW_OPERATION = 0.3  # how often a varied block gets another operation
GENERATIONS = ("Nsga2:generation", "nsga2:generation")  # where Optuna's NSGA-II, new and old, looks for it


class Nsga2(NSGAIISampler):
    """NSGA-II whose parents come in the order of their trials.

    Optuna's come in another order the first time that a study asks for those of a generation, so that a rebuilt study
    would mate others. Its own memory of generations goes by the name of the class.
    """

    def get_parent_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().get_parent_population(study, generation), key=lambda trial: trial.number)


class Tpe(TPESampler):
    """TPE that is told the search space instead of working it out of all trials at every ask."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        # Every trial has the whole space, so any one tells it; single values are left to be suggested by themselves.
        known = next((t.distributions for t in study.get_trials(deepcopy=False) if t.state is TrialState.COMPLETE), {})
        return {name: distribution for name, distribution in sorted(known.items()) if not distribution.single()}


def _tpe(seed: int) -> BaseSampler:
    return Tpe(
        seed=seed,
        multivariate=True,
        constant_liar=True,
        n_startup_trials=STARTUP_TRIALS,
        n_ei_candidates=EI_CANDIDATES,
    )


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "auto": _tpe,
    "tpe": _tpe,
    "nsga2": lambda seed: Nsga2(seed=seed),
    "gp": lambda seed: GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS),
    # Points of the sequence are given whole, see `quasi_random`: Optuna's sampler counts them in the study, which a
    # rebuilt one would begin again.
    "qmc": lambda seed: RandomSampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}


@dataclass(frozen=True, kw_only=True)
class Told:
    """A point the study knows: its parameters and, once evaluated, its values."""

    params: Params
    values: tuple[float, float] | None  # top-1, predicted milliseconds; None while it is being evaluated
    generation: int = 0  # of NSGA-II; schedules from elsewhere belong to the first


@dataclass(frozen=True, kw_only=True)
class _Parent:
    """A told point among others."""

    params: Params
    top1: float
    measured_ms: float


class Proposer:
    """Asks and tells one study."""

    def __init__(self, space: ScheduleSpace, *, sampler: str, seed: int, history: Iterable[Told] = ()) -> None:
        self._space = space
        self._sampler = sampler
        self._seed = seed
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(directions=["maximize", "minimize"], sampler=make_sampler(sampler, seed))
        for told in history:
            self.add(told)

    def add(self, told: Told) -> int:
        """Tell about a point that was not asked for; returns its trial number."""
        params = {name: value for name, value in told.params.items() if name in self._space.distributions}
        state = TrialState.RUNNING if told.values is None else TrialState.COMPLETE
        trial = create_trial(
            state=state,
            params=params,
            distributions={name: self._space.distributions[name] for name in params},
            values=None if told.values is None else list(told.values),
            system_attrs=dict.fromkeys(GENERATIONS, told.generation),
        )
        self.study.add_trial(trial)
        return len(self.study.get_trials(deepcopy=False)) - 1

    def ask(self, proposal: int) -> tuple[int, Params]:
        """Propose a point.

        Args:
            proposal: Number of the proposal in the job; decides seed and aim on the latency axis.

        Returns:
            Trial number in the study, and the parameters.
        """
        self.study.sampler = make_sampler(self._sampler, derived_seed(self._seed, proposal))
        low, high = self._space.min_share, self._space.max_share
        # Aims are spread evenly over the latency range; the sampler chooses all else.
        place = proposal // 2 if self._sampler == "auto" else proposal
        aim = {"share": low + (high - low) * radical_inverse(place + 1)}
        if self._sampler == "qmc":
            chosen = quasi_random(self._space.distributions, self._seed, proposal) | aim
        elif self._sampler == "auto" and proposal % 2:
            chosen = self._variation(random.Random(derived_seed(self._seed, proposal))) or aim
        else:
            chosen = aim
        self.study.enqueue_trial(chosen)
        with _one_thread():
            trial = self.study.ask(self._space.distributions)
        return trial.number, dict(trial.params)

    def _variation(self, draw: random.Random) -> Params | None:
        """A point beside one of the front, or None while no trial has been told."""
        complete = [t for t in self.study.get_trials(deepcopy=False) if t.state is TrialState.COMPLETE]
        if not complete:
            return None
        points = [_Parent(params=t.params, top1=t.values[0], measured_ms=t.values[1]) for t in complete]
        least = max(point.top1 for point in points) - VARIED_LOSS
        parent = draw.choice(pareto_front(point for point in points if point.top1 >= least))
        params = dict(parent.params)
        share = parent.measured_ms / self._space.dense_ms * draw.uniform(*VARIED_SPEED)
        params["share"] = min(max(share, self._space.min_share), self._space.max_share)
        for block in draw.sample(sorted(self._space.blocks), min(draw.choice((1, 2)), len(self._space.blocks))):
            if draw.random() < NEW_OPERATION:
                params[f"op_{block}"] = draw.choice(OPERATIONS)
            params[f"drop_{block}"] = min(max(params[f"drop_{block}"] + draw.gauss(0.0, WEIGHT_STEP), 0.0), 1.0)
        return params

    def generation(self, trial: int) -> int:
        """NSGA-II's generation of an asked trial, to be given back in `Told` when the study is rebuilt."""
        attributes = self.study.get_trials(deepcopy=False)[trial].system_attrs
        return next((int(attributes[name]) for name in GENERATIONS if name in attributes), 0)

    def tell(self, trial: int, values: tuple[float, float]) -> None:
        self.study.tell(trial, list(values))

    def drop(self, trial: int) -> None:
        """Forget a proposal that is known already; pruned trials teach the sampler nothing in this study."""
        self.study.tell(trial, state=TrialState.FAIL)


def make_sampler(name: str, seed: int) -> BaseSampler:
    """A sampler by its name in a job."""
    with warnings.catch_warnings():
        # Optuna 4 marks the Gaussian process and two options of TPE as experimental.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return SAMPLERS[name](seed)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: the Gaussian process has small matrices, over which threads only wait for each other.

    On a machine with other work that makes an ask ten times as long; and sums depend on how they are divided.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def derived_seed(seed: int, proposal: int) -> int:
    """32-bit seed of one proposal, unrelated to its neighbours'."""
    digest = hashlib.sha256(f"{seed}:{proposal}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def quasi_random(distributions: Mapping[str, BaseDistribution], seed: int, proposal: int) -> Params:
    """Point ``proposal`` of a scrambled Sobol sequence over the space."""
    engine: Any = SobolEngine(len(distributions), scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    coordinates = engine.fast_forward(proposal).draw(1)[0].tolist()
    params: Params = {}
    for (name, distribution), at in zip(distributions.items(), coordinates, strict=True):
        if isinstance(distribution, CategoricalDistribution):
            params[name] = distribution.choices[min(int(at * len(distribution.choices)), len(distribution.choices) - 1)]
        else:
            assert isinstance(distribution, FloatDistribution)
            params[name] = distribution.low + at * (distribution.high - distribution.low)
    return params


def radical_inverse(number: int) -> float:
    """Van der Corput sequence in base 2: 1/2, 1/4, 3/4, 1/8, ... — evenly spread however many are drawn."""
    result, digit = 0.0, 0.5
    while number:
        result += digit * (number & 1)
        number >>= 1
        digit /= 2
    return result
