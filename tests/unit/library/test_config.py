"""Configs: what they accept, how they refuse, and when two are the same candidate."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import prunefront
from prunefront.config import ModelSpec, PruneConfig, Site, load_config
from prunefront.errors import ConfigError, FileWriteError, ModelError, PrunefrontError, UnknownNameError
from prunefront.files import write_atomic
from tests.unit.library import models

DOCUMENT: dict[str, Any] = {
    "format": "prunefront/config/1",
    "model": {"name": "deit_small_patch16_224", "kwargs": {}, "img_size": 224, "in_chans": 3, "num_classes": 1000},
    "weights": {"source": "timm", "sha256": None},
    "method": "evit",
    "sites": [
        {"block": 3, "op": "fuse", "keep_ratio": 0.7},
        {"block": 6, "op": "fuse", "tokens": 98},
        {"block": 9, "op": "fuse", "remove": 30},
    ],
    "options": {},
    "results": {
        "macs": 3.03e9,
        "top1": 0.795,
        "eval": {
            "dataset": "imagenet",
            "split": "test",
            "num_images": 50000,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "dtype": "fp32",
        },
        "latency": [
            {
                "device": "cpu",
                "runtime": "compile",
                "dtype": "bf16",
                "batch_size": 8,
                "measured_ms": 12.1,
                "iqr_ms": 0.2,
                "predicted_ms": 12.0,
            }
        ],
        "job": "a",
        "trial": 41,
    },
}


def test_the_documented_example_loads_from_every_source(tmp_path: Path) -> None:
    config = load_config(DOCUMENT)
    json_path, yaml_path = config.save(tmp_path / "a.json"), config.save(tmp_path / "a.yaml")
    assert load_config(json_path) == load_config(str(yaml_path)) == config
    assert load_config(io.StringIO(config.to_json())) == load_config(io.BytesIO(config.to_yaml().encode())) == config
    assert load_config(config) is config


def test_counts_follow_the_documented_rules() -> None:
    # 196 -> ceil(0.7 * 196) = 138 and a fused token = 139; then 98 + 1 = 99; then 99 - 30 = 69 and one more.
    counts = prunefront.token_counts(load_config(DOCUMENT))
    assert counts.tokens_in == [197] * 4 + [140] * 3 + [100] * 3 + [71] * 2


def test_counts_and_macs_take_whatever_a_config_can_be_read_from() -> None:
    config = load_config(DOCUMENT)
    assert prunefront.token_counts(DOCUMENT) == prunefront.token_counts(config)
    assert prunefront.macs(io.StringIO(config.to_yaml())) == prunefront.macs(config)
    assert prunefront.macs_detail(DOCUMENT) == prunefront.macs_detail(config)
    with pytest.raises(ConfigError, match="Cannot read config /nowhere.json"):
        prunefront.macs("/nowhere.json")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"method": "evitt"}, "Unknown method 'evitt': did you mean 'evit' or 'spvit'?"),
        (
            {"sites": [{"block": 3, "op": "merge", "remove": 3}]},
            "has no operation 'merge' (block 3); it has prune, fuse",
        ),
        (
            {"sites": [{"block": 3, "op": "prune", "keep_ratio": 1.2}]},
            "sites.0.keep_ratio: Input should be less than or equal to 1",
        ),
        ({"sites": [{"blok": 3, "op": "prune", "tokens": 9}]}, "sites.0.blok: no such field is known"),
        ({"sites": {"block": 3}}, "sites: Input should be a list"),
        ({"options": [1]}, "options: Input should be an object with named fields"),
        (
            {"model": {"name": "deit_small_patch16_224", "img_size": [224]}},
            "model.img_size: expects pixels such as 224",
        ),
        ({"model": {"name": "deit_small_patch16_224", "img_size": 0}}, "320], but got 0"),
        ({"sites": [{"block": 3, "op": "prune", "keep_ratio": 0}]}, "greater than 0"),
        ({"sites": [{"block": 3, "op": "prune"}]}, "exactly one of keep_ratio, cumulative_keep_ratio, tokens, remove"),
        ({"sites": [{"block": 3, "op": "prune", "tokens": 3, "remove": 4}]}, "but got tokens, remove"),
        ({"sites": [{"block": 3, "op": "prune", "tokens": 9}] * 2}, "allows one site per block, but block 3 has"),
        ({"options": {"prop_attn": True}}, "prop_attn"),
        ({"surplus": 1}, "surplus"),
        ({"format": "prunefront/config/9"}, "'prunefront/config/9'"),
    ],
)
def test_bad_documents_get_one_clear_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PrunefrontError) as caught:
        load_config({**DOCUMENT, **change})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_site_outside_the_model_is_refused_with_the_range() -> None:
    config = load_config({**DOCUMENT, "sites": [{"block": 12, "op": "prune", "tokens": 3}]})
    with pytest.raises(ConfigError, match="block 12, but the model has blocks 0 to 11"):
        prunefront.token_counts(config)


def test_an_unknown_model_is_answered_with_close_names() -> None:
    with pytest.raises(UnknownNameError, match="deit_small_patch16_224"):
        prunefront.macs(PruneConfig(model=ModelSpec(name="deit_small_patch16_242"), method="tome"))


@pytest.mark.parametrize("name", ["resnet18", "swinv2_tiny_window8_256"])
def test_models_that_are_no_plain_vit_are_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match="is not supported: token reduction needs a timm VisionTransformer"):
        prunefront.macs(PruneConfig(model=ModelSpec(name=name), method="tome"))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"embed_dim": -6},
        {"patch_size": 0},
        {"patch_size": 100},
        {"num_heads": 0},
        {"num_heads": -3},
        {"depth": 0},
        {"depth": -1},
        {"reg_tokens": -1},
        {"img_size": [48]},
        {"pos_embed": "x"},
        {"checkpoint_path": "/nowhere"},
    ],
    ids=str,
)
def test_arguments_that_no_model_can_have_are_refused_in_one_sentence(kwargs: dict[str, Any]) -> None:
    spec = ModelSpec(name="digit_vit_patch6_48", kwargs=kwargs)
    with pytest.raises(ModelError) as refused:
        prunefront.macs(PruneConfig(model=spec, method="tome"))
    sentence = str(refused.value)
    assert sentence.endswith(".") and ".." not in sentence and ": ." not in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"format": [', r"neither JSON nor YAML \(Expecting value: line 1 column 13 .*may be cut off"),
        ("sites:\n- {block: 3", r"neither JSON nor YAML \(expected ',' or '}', .*line 2 column 12\).*may be cut off"),
        ("date: 2024-99-99", "neither JSON nor YAML .*month must be in 1..12"),
        ("[" * 100_000, "nested too deeply to be a config"),
        ("[1, 2]", "should hold one config .*, but holds a list"),
        ("", "should hold one config .*, but holds nothing"),
        ("evit", "should hold one config .*, but holds text"),
    ],
    ids=["JSON cut off", "YAML cut off", "impossible date", "deep", "list", "empty", "text"],
)
def test_text_that_is_no_config_says_what_is_wrong(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refused:
        load_config(io.StringIO(text))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("source", ["/nowhere/none.json", "/", "a\0b", 5, None, [DOCUMENT], b"{}"])
def test_what_no_config_can_be_read_from_is_refused(source: Any) -> None:
    with pytest.raises(ConfigError, match="Cannot read config|A config is read from a path, a mapping"):
        load_config(source)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_atomic(tmp_path / "best.json", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FileWriteError, match="No space left on device"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["best.json"]


def test_hash_covers_effective_integers_and_not_results() -> None:
    config = load_config(DOCUMENT)
    spelled = [
        {"block": 3, "op": "fuse", "tokens": 138},
        {"block": 6, "op": "fuse", "remove": 41},
        {"block": 9, "op": "fuse", "keep_ratio": 69 / 99},
        {"block": 10, "op": "prune", "keep_ratio": 1.0},
    ]
    same = load_config({**DOCUMENT, "sites": spelled, "results": None})
    other = load_config({**DOCUMENT, "sites": spelled[:2]})
    assert config.content_hash() == same.content_hash() != other.content_hash()
    pruned = load_config({**DOCUMENT, "sites": [{**site, "op": "prune"} for site in DOCUMENT["sites"]]})
    assert pruned.content_hash() != config.content_hash()


def test_configs_that_remove_nothing_are_one_candidate_except_where_sites_sort() -> None:
    spec = models.small_spec()
    dense = models.config("hybrid", [], spec).content_hash()
    assert models.config("evit", [{"block": 0, "op": "fuse", "keep_ratio": 1.0}], spec).content_hash() == dense
    assert models.config("tome", [{"block": 0, "op": "merge", "remove": 0}], spec).content_hash() == dense
    assert models.config("diffrate", [{"block": 0, "op": "prune", "tokens": 36}], spec).content_hash() != dense


def test_defaults_and_the_same_values_written_out_hash_alike() -> None:
    short = PruneConfig(model=ModelSpec(name="deit_tiny_patch16_224"), method="tome")
    spec = ModelSpec(name="deit_tiny_patch16_224", img_size=(224, 224), num_classes=1000)
    assert PruneConfig(model=spec, method="hybrid").content_hash() == short.content_hash()


amounts = st.one_of(
    st.fixed_dictionaries({"keep_ratio": st.floats(0.01, 1.0)}),
    st.fixed_dictionaries({"cumulative_keep_ratio": st.floats(0.01, 1.0)}),
    st.fixed_dictionaries({"tokens": st.integers(1, 60)}),
    st.fixed_dictionaries({"remove": st.integers(0, 60)}),
)


@st.composite
def configs(draw: st.DrawFn) -> PruneConfig:
    """Any config of any method on the small model."""
    method = draw(st.sampled_from(prunefront.list_methods()))
    implementation = prunefront.registry.get_method(method)
    sites = []
    for block in sorted(draw(st.sets(st.integers(0, 3)))):
        sites.append({"block": block, "op": draw(st.sampled_from(implementation.ops)), **draw(amounts)})
        if (
            implementation.two_sites_per_block
            and sites[-1]["op"] in implementation.dropping_ops
            and draw(st.booleans())
        ):
            sites.append({"block": block, "op": draw(st.sampled_from(implementation.merging_ops)), **draw(amounts)})
    return models.config(method, sites)


@settings(max_examples=150, deadline=None)
@given(configs())
def test_tokens_never_grow_and_prefix_and_one_token_always_stay(config: PruneConfig) -> None:
    counts = prunefront.token_counts(config)
    method = prunefront.registry.get_method(config.method)
    entering = [block.tokens_entering for block in counts.blocks]
    packages = 0
    assert entering[0] == 37
    for block in counts.blocks:
        assert 2 <= block.tokens_out <= block.tokens_entering + (1 if method.carries_added_tokens else 0)
        # What selects before the attention leaves it fewer tokens as well.
        assert block.tokens_in == (block.tokens_out if method.acts_before_attention else block.tokens_entering)
    assert entering[1:] == counts.tokens_out[:-1]
    for block in counts.blocks:
        for step in block.steps:
            assert step.kept + step.removed == step.tokens_in - 1 - packages
            packages += 1 if method.carries_added_tokens else 0
            if "merge" in step.op and step.op != "merge_mean":
                assert step.removed <= (step.tokens_in - 1) // 2


@settings(max_examples=100, deadline=None)
@given(configs())
def test_documents_survive_json_and_yaml_with_their_hash(config: PruneConfig) -> None:
    assert load_config(io.StringIO(config.to_json())) == config
    assert load_config(io.StringIO(config.to_yaml())).content_hash() == config.content_hash()
    assert json.loads(config.to_json())["method"] == config.method


def test_documents_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Site(block=0, op="prune", tokens=1).block = 1  # type: ignore[misc]
