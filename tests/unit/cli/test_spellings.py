"""Options of the papers' own repositories."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from prunefront.cli.spellings import check_spelling, read_spelling
from prunefront.errors import ConfigError


@pytest.mark.parametrize(
    ("line", "method", "hparams"),
    [
        (
            '--base_keep_rate 0.7 --drop_loc "(3, 6, 9)" --fuse_token',
            "evit",
            {"base_keep_rate": 0.7, "drop_loc": [3, 6, 9], "fuse_token": True},
        ),
        ("--drop-loc 3,6", "evit", {"base_keep_rate": 0.7, "drop_loc": [3, 6]}),
        (
            "--r_tokens 50 --pp_loc_list 3 6 9 --threshold 7e-5",
            "ppt",
            {"r": 50, "pp_loc_list": [3, 6, 9], "threshold": 7e-5},
        ),
        ("--pp-loc-list 3 6 --prop_attn", "ppt", {"r": 50, "pp_loc_list": [3, 6], "prop_attn": False}),
        ("--r 8", "tome", {"r": 8}),
        ("--r [8,8,4]", "tome", {"r": [8, 8, 4]}),
        ("--r 8 8 4", "tome", {"r": [8, 8, 4]}),
        ('--r "(8, -1)"', "tome", {"r": [8, -1], "r_kind": "(r, inflection)"}),
        ("--base_rate 0.7", "dynamicvit", {"base_rate": 0.7}),
        ("--keep_ratio 0.9 --attn_ratio 0.1", "trilevel", {"keep_ratio": 0.9, "attn_ratio": 0.1}),
        (
            "--prune_kept_num 17 12 --merge_kept_num 17 10",
            "diffrate",
            {"prune_kept_num": [17, 12], "merge_kept_num": [17, 10]},
        ),
    ],
)
def test_a_repositorys_options_become_its_hyper_parameters(line: str, method: str, hparams: dict[str, Any]) -> None:
    assert read_spelling(shlex.split(line)) == (method, hparams)


@pytest.mark.parametrize(
    ("line", "method", "sentence"),
    [
        ("--r 8 --fuse_token", None, "--r of tome and --fuse_token of evit"),
        ("--r 8", "evit", "--r of tome and --method evit"),
        ("--base_rate 0.7 --keep_ratio 0.7", None, "--base_rate of dynamicvit and --keep_ratio of trilevel"),
        ("--epochs 30", None, "--epochs is not part of a schedule"),
        (
            "--base-kep-rate 0.7",
            None,
            "--base-kep-rate is not part of a schedule; did you mean --base_keep_rate or",
        ),
        ("--keep-ration 0.7", None, "--keep-ration is not part of a schedule; did you mean --keep-ratio?"),
        ("--r -5", None, "r is how many tokens leave in a block, but got -5"),
        ("--r_tokens [8,-8,8]", None, "r is how many tokens leave in a block, but got -8"),
        ("--r many", None, "--r expects numbers, but got 'many'"),
        ("--drop_loc x", None, "--drop_loc expects numbers"),
        ("3 6 9", None, "Expected options of a schedule"),
        ("--r", None, "expected at least one argument"),
    ],
)
def test_options_out_of_place_are_answered_with_a_sentence(line: str, method: str | None, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_spelling(shlex.split(line), ["--keep-ratio", "--at"])
        read_spelling(shlex.split(line), method)
    assert sentence in str(refused.value)
