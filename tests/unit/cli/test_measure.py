"""What `prunefront measure` compares with what."""

from __future__ import annotations

import pytest

from latency_tables.measure import Measurement
from prunefront.cli.measure import Subject, describe, reference_of, with_dense
from prunefront.config import ModelSpec, PruneConfig
from prunefront.errors import ConfigError


def dense(label: str, name: str = "vit_tiny_patch16_224") -> Subject:
    return Subject(label=label, config=PruneConfig(model=ModelSpec(name=name), method="hybrid"))


def pruned(label: str, name: str = "vit_tiny_patch16_224") -> Subject:
    config = PruneConfig.model_validate(
        {"model": {"name": name}, "method": "evit", "sites": [{"block": 3, "op": "prune", "keep_ratio": 0.5}]}
    )
    return Subject(label=label, config=config)


def measurement(median_ms: float) -> Measurement:
    return Measurement(
        median_ms=median_ms, iqr_ms=0.1, p10_ms=median_ms, p90_ms=median_ms, p99_ms=median_ms, num_samples=10,
        canary_ms=1.0, speedup=1.0, peak_memory_mib=None, state="ok", reason=None,
    )  # fmt: skip


def test_the_dense_model_of_configs_is_measured_once_beside_them() -> None:
    labels = [subject.label for subject in with_dense([pruned("a.json"), pruned("b.json")])]

    assert labels == ["vit_tiny_patch16_224 (dense)", "a.json", "b.json"]


def test_a_dense_model_that_is_named_is_not_added_again() -> None:
    labels = [subject.label for subject in with_dense([pruned("a.json"), dense("vit_tiny_patch16_224")])]

    assert labels == ["a.json", "vit_tiny_patch16_224"]


def test_a_config_refers_to_its_own_dense_model_and_a_model_to_the_first() -> None:
    subjects = with_dense([dense("big", "vit_base_patch16_224"), dense("small", "vit_small_patch16_224"), pruned("c")])
    by_label = {subject.label: subject for subject in subjects}

    assert reference_of(by_label["c"], subjects).label == "vit_tiny_patch16_224 (dense)"
    assert reference_of(by_label["small"], subjects).label == "big"


def test_the_speedup_is_the_reference_over_the_subject() -> None:
    subjects = with_dense([pruned("c")])
    measured = {"vit_tiny_patch16_224 (dense)": measurement(30.0), "c": measurement(20.0)}

    row = describe(subjects[1], subjects, measured, batch_size=8)

    assert row["speedup"] == 1.5
    assert row["images_per_s"] == 400.0
    assert row["reference"] == "vit_tiny_patch16_224 (dense)"


def test_a_thing_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"c\.json is named twice"):
        with_dense([pruned("c.json"), pruned("c.json")])
