"""Schedules as the papers' own repositories spell them on the command line, turned into their hyper-parameters.

``--base_keep_rate 0.7 --drop_loc "(3, 6, 9)" --fuse_token`` (EViT), ``--r_tokens 50 --pp_loc_list 3 6 9
--threshold 7e-5`` (PPT), ``--r 8`` (ToMe), ``--prune_kept_num ... --merge_kept_num ...`` (DiffRate), ``--base_rate
0.7`` (DynamicViT), ``--keep_ratio 0.7 --attn_ratio 0.3`` (Tri-Level). Dashes and underscores are the same; each
spelling belongs to one method, which it implies.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from prunefront.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """One option of a repository's script."""

    method: str
    hparam: str  # its name in `prunefront.official`
    read: Callable[[str], Any] | None = None  # from the words after it; None: a switch
    switches_to: bool = True  # what a switch sets the hyper-parameter to


def _number(text: str) -> float:
    return float(text)


def _locations(text: str) -> list[int]:
    """Read ``(3, 6, 9)``, ``3,6,9`` or ``3 6 9``."""
    return [int(part) for part in text.strip("()[] ").replace(",", " ").split()]


def _r(text: str) -> int | list[float]:
    """Read a number, a list or a pair: ``8``, ``[8, 8, 4]``, ``8 8 4``, ``(8, -1)``."""
    listed = text.strip().startswith(("[", "(")) or len(text.split()) > 1
    values = [float(part) if "." in part else int(part) for part in text.strip("()[] ").replace(",", " ").split()]
    return values if listed else int(text)


SPELLINGS: dict[str, Spelling] = {
    "base_keep_rate": Spelling(method="evit", hparam="base_keep_rate", read=_number),
    "drop_loc": Spelling(method="evit", hparam="drop_loc", read=_locations),
    "fuse_token": Spelling(method="evit", hparam="fuse_token"),
    "r_tokens": Spelling(method="ppt", hparam="r", read=_r),
    "pp_loc_list": Spelling(method="ppt", hparam="pp_loc_list", read=_locations),
    "threshold": Spelling(method="ppt", hparam="threshold", read=_number),
    # The repository's flag switches proportional attention off, whatever its name suggests.
    "prop_attn": Spelling(method="ppt", hparam="prop_attn", switches_to=False),
    "r": Spelling(method="tome", hparam="r", read=_r),
    "base_rate": Spelling(method="dynamicvit", hparam="base_rate", read=_number),
    "keep_ratio": Spelling(method="trilevel", hparam="keep_ratio", read=_number),
    "attn_ratio": Spelling(method="trilevel", hparam="attn_ratio", read=_number),
    "prune_kept_num": Spelling(method="diffrate", hparam="prune_kept_num", read=_locations),
    "merge_kept_num": Spelling(method="diffrate", hparam="merge_kept_num", read=_locations),
}
# What the scripts assume where nothing is said.
DEFAULTS: dict[str, dict[str, Any]] = {
    "evit": {"base_keep_rate": 0.7},
    "ppt": {"r": 50},
    "tome": {},
    "diffrate": {},
    "dynamicvit": {"base_rate": 0.9},
    "trilevel": {},
}


def check_spelling(arguments: Sequence[str], own_options: Collection[str] = ()) -> list[str]:
    """Names of the repository's options among the arguments.

    Args:
        arguments: As they stood on the command line.
        own_options: Options that are no spelling but may have been meant, such as ``--keep-ratio``.

    Raises:
        ConfigError: If one of them is no option of a schedule.
    """
    names = {_normalised(word).partition("=")[0][2:]: word.partition("=")[0] for word in arguments if word[:2] == "--"}
    for name, word in names.items():
        if name not in SPELLINGS:
            # Where our own option and a spelling differ by a dash alone, ours is the one to name.
            ours = {option.replace("-", "_") for option in own_options}
            spellings = [f"--{spelling}" for spelling in SPELLINGS if f"__{spelling}" not in ours]
            close = difflib.get_close_matches(word, [*own_options, *spellings], n=2, cutoff=0.75)
            known = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(spellings)}."
            raise ConfigError(f"{word} is not part of a schedule; {known} See prunefront config new --help.")
    return list(names)


def read_spelling(arguments: Sequence[str], method: str | None = None) -> tuple[str, dict[str, Any]]:
    """Read a repository's options.

    Args:
        arguments: The options, as they stood on the command line.
        method: The method the user named, or None to follow from the spelling.

    Returns:
        The method and its hyper-parameters, as `prunefront.official.official_sites` takes them.

    Raises:
        ConfigError: If an option is unknown, belongs to another method than the rest, or has a value out of place.
    """
    used = check_spelling(arguments)
    owners = {SPELLINGS[name].method: f"--{name} of {SPELLINGS[name].method}" for name in used}
    if method is not None:
        owners.setdefault(method, f"--method {method}")
    if len(owners) > 1:
        raise ConfigError(f"Options of one method are needed, but got {' and '.join(owners.values())}; leave one out.")
    if not used:
        raise ConfigError(f"Expected options of a schedule, but got {' '.join(arguments)!r}; see config new --help.")
    (owner,) = owners
    return owner, DEFAULTS[owner] | _hparams([_normalised(word) for word in arguments])


def _hparams(words: Sequence[str]) -> dict[str, Any]:
    parser = _Parser()
    for name, spelling in SPELLINGS.items():
        if spelling.read is None:
            parser.add_argument(f"--{name}", action="store_true", default=None)
        else:
            parser.add_argument(f"--{name}", nargs="+")
    values: dict[str, Any] = {}
    for name, given in vars(parser.parse_args(words)).items():
        if given is None:
            continue
        spelling = SPELLINGS[name]
        if spelling.read is None:
            values[spelling.hparam] = spelling.switches_to
            continue
        try:
            values[spelling.hparam] = spelling.read(" ".join(given))
        except ValueError as error:
            raise ConfigError(f"--{name} expects numbers, but got {' '.join(given)!r}.") from error
    r = values.get("r", 0)
    counts = r if isinstance(r, list) else [r]
    # A pair (r, inflection) is told from a list by its second value.
    if len(counts) == 2 and -1 <= counts[1] <= 1:
        values["r_kind"] = "(r, inflection)"
        counts = counts[:1]
    if any(count < 0 for count in counts):
        raise ConfigError(f"r is how many tokens leave in a block, but got {min(counts)}. Use 0 or more.")
    return values


def _normalised(word: str) -> str:
    """Dashes inside an option's name become underscores."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


class _Parser(argparse.ArgumentParser):
    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}.")
