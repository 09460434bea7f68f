"""Random schedules spread evenly over a range of cost: what corrections are fitted on and tables are validated with."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from latency_tables.errors import ExceedsMemoryError, LatencyTableError
from latency_tables.parts import measured_methods
from prunefront.config import ModelSpec, PruneConfig, Site
from prunefront.errors import ModelError
from prunefront.geometry import ModelGeometry
from prunefront.macs import macs_of_schedule
from prunefront.registry import get_method
from prunefront.schedule import plan_schedule

LOWEST_COST, HIGHEST_COST = 0.3, 1.0  # Of the dense model.
TELLING_COST = 0.45
_TRIES = 60  # Draws of a block pattern before the next method takes a target that this one cannot reach.
_STRONGEST = 4.0  # Kept share exp(-4) at sites of weight 1.
_HALVINGS = 14  # Bisection steps; sites then hit their target to about a token.


def random_configs(
    spec: ModelSpec,
    geometry: ModelGeometry,
    num: int,
    seed: int,
    methods: Sequence[str] | None = None,
    cost: Callable[[PruneConfig], float] | None = None,
) -> list[PruneConfig]:
    """Draw configs of all methods whose costs are spread over 30-100 % of the dense model.

    The range is cut into ``num`` strata of equal width, one config each; methods take turns, blocks, operations and
    options are drawn, and how much every site removes is scaled until the cost falls on the stratum's random point.

    Args:
        spec: The model of the configs.
        geometry: Of that model.
        num: Configs wanted, in random order of cost.
        seed: Equal seeds give equal configs.
        methods: Names; all that can rank tokens on this model by default.
        cost: Latency or MACs of a config; MACs by default. Configs for which it raises `ExceedsMemoryError` are not
            drawn.

    Raises:
        LatencyTableError: If no method can run on the model.
        ExceedsMemoryError: If the dense model, or every schedule of every method, exceeds the memory.
    """
    draw = random.Random(seed)
    names = [name for name in (measured_methods() if methods is None else methods) if _usable(name, geometry, spec)]
    if not names:
        raise LatencyTableError(
            "None of the methods can run on this model, so there is nothing to draw schedules from."
        )
    known = cost or (lambda config: float(macs_of_schedule(plan_schedule(config, geometry), geometry).model))
    dense = known(PruneConfig(model=spec, method="hybrid"))

    def measure(config: PruneConfig) -> float:
        """Beyond every target where it exceeds the memory: stronger reductions and other patterns are tried then."""
        try:
            return known(config)
        except ExceedsMemoryError:
            return math.inf

    width = (HIGHEST_COST - LOWEST_COST) / num
    targets = [LOWEST_COST + width * (stratum + draw.random()) for stratum in range(num)]
    draw.shuffle(targets)
    draw.shuffle(names)
    configs = []
    for number, target in enumerate(targets):
        drawn = []
        for turn in range(len(names)):
            drawn.append(_draw(spec, geometry, names[(number + turn) % len(names)], target * dense, measure, draw))
            if drawn[-1][0] <= target * dense:
                break
        # Where nothing reaches the target (blocks whose cost hardly depends on tokens), the cheapest is taken.
        cheapest = min(drawn, key=lambda one: one[0])
        if cheapest[0] == math.inf:
            raise ExceedsMemoryError(
                f"Every schedule that was drawn of {', '.join(names)} needs what ran out of memory while the table was "
                "measured. Choose a smaller batch size."
            )
        configs.append(cheapest[1])
    return configs


def telling_configs(spec: ModelSpec, geometry: ModelGeometry) -> list[PruneConfig]:
    """Two schedules of about 45 % of the dense MACs that tell a correction most, for runtimes where each takes long.

    One reduces in every block; the other has as few tokens after one or two reductions.
    """
    every = [(block, "merge", 1.0) for block in range(geometry.depth)]
    second = min(1, geometry.depth - 1)
    patterns = [("tome", every)]
    if _usable("evit", geometry, spec):
        patterns.append(("evit", [(second, "prune", 1.0)]))
    else:  # Merging halves the tokens at most.
        patterns.append(("tome", every[: second + 1]))

    def cost(config: PruneConfig) -> float:
        return float(macs_of_schedule(plan_schedule(config, geometry), geometry).model)

    target = TELLING_COST * cost(PruneConfig(model=spec, method="hybrid"))
    return [_at_cost(partial(_config_at, spec, name, pattern, {}), target, cost)[1] for name, pattern in patterns]


def _config_at(
    spec: ModelSpec, method: str, pattern: Sequence[tuple[int, str, float]], options: dict[str, Any], strength: float
) -> PruneConfig:
    sites = tuple(
        Site(block=block, op=op, keep_ratio=max(1e-3, math.exp(-strength * weight))) for block, op, weight in pattern
    )
    return PruneConfig(model=spec, method=method, sites=sites, options=options)


def _draw(
    spec: ModelSpec,
    geometry: ModelGeometry,
    method_name: str,
    target: float,
    cost: Callable[[PruneConfig], float],
    draw: random.Random,
) -> tuple[float, PruneConfig]:
    """A config of about the target cost, or the cheapest one of many patterns where none gets there; and its cost."""
    cheapest: tuple[float, PruneConfig] | None = None
    for _ in range(_TRIES):
        options = _draw_options(method_name, draw)
        pattern = _draw_pattern(method_name, geometry, draw)
        found = _at_cost(partial(_config_at, spec, method_name, pattern, options), target, cost)
        if found[0] <= target:
            return found
        if cheapest is None or found[0] < cheapest[0]:
            cheapest = found
    assert cheapest is not None
    return cheapest


def _at_cost(
    config_at: Callable[[float], PruneConfig], target: float, cost: Callable[[PruneConfig], float]
) -> tuple[float, PruneConfig]:
    """The config by its strength that costs about ``target``, or the strongest where none gets there; and its cost."""
    low, high = 0.0, _STRONGEST
    strongest = config_at(high)
    if (lowest := cost(strongest)) > target:
        return lowest, strongest
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(config_at(middle)) > target else (low, middle)
    return cost(config_at(high)), config_at(high)


def _draw_options(method_name: str, draw: random.Random) -> dict[str, Any]:
    known = get_method(method_name).options_model.model_fields
    choices: dict[str, Sequence[Any]] = {
        "prop_attn": (True, False),
        "score": ("cls", "cls_value"),
        "threshold": (0, None, 7e-5),
        "mode": ("fixed",),
        "attn_ratio": (1.0, 0.3),
    }
    return {name: draw.choice(values) for name, values in choices.items() if name in known}


def _draw_pattern(method_name: str, geometry: ModelGeometry, draw: random.Random) -> list[tuple[int, str, float]]:
    """(block, operation, weight) of the sites: anything from one block to all of them."""
    method = get_method(method_name)
    usable = [op for op in method.ops if geometry.has_class_token or op not in method.ranking_ops]
    dropping = [op for op in method.dropping_ops if op in usable]
    merging = [op for op in method.merging_ops if op in usable]
    blocks = sorted(draw.sample(range(geometry.depth), draw.randint(1, geometry.depth)))
    pattern = []
    for block in blocks:
        ops = [draw.choice(usable)]
        if method.two_sites_per_block and dropping and merging and draw.random() < 0.5:
            ops = [draw.choice(dropping), draw.choice(merging)]
        pattern += [(block, op, draw.uniform(0.2, 1.0)) for op in ops]
    return pattern


def _usable(method_name: str, geometry: ModelGeometry, spec: ModelSpec) -> bool:
    method = get_method(method_name)
    usable = [op for op in method.ops if geometry.has_class_token or op not in method.ranking_ops]
    if not usable:
        return False
    try:
        plan_schedule(
            PruneConfig(model=spec, method=method_name, sites=(Site(block=0, op=usable[-1], keep_ratio=0.9),)), geometry
        )
    except ModelError:
        return False
    return True
