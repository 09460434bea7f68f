"""Swin under Tri-Level's token level: official results, exact counts, compute really saved, what stays timm's."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import prunefront
from prunefront.config import ModelSpec, PruneConfig
from prunefront.errors import CheckpointError, ConfigError, InputError, ModelError
from prunefront.geometry import geometry_for, require_equal_blocks
from prunefront.macs import macs_detail
from prunefront.official_swin import replay_swin, swin_from_official, swin_sites
from tests.unit.library import models
from tests.unit.library.test_macs import _profiled

CASE = Path("trilevel") / "swin_r090"
PROJECT = Path(__file__).parents[3]
SITES: list[dict[str, Any]] = [
    {"block": 1, "op": "prune", "keep_ratio": 0.5},  # the last of its stage: does nothing
    {"block": 2, "op": "prune", "keep_ratio": 0.7},
    {"block": 3, "op": "prune", "tokens": 20},
    {"block": 6, "op": "prune", "keep_ratio": 0.8},
]


def _spec(**kwargs: Any) -> ModelSpec:
    """Stages of 12 x 12, 6 x 6 and 3 x 3 tokens: the second one's windows of 3 x 3 divide the grid, and shift."""
    arguments: dict[str, Any] = {
        "patch_size": 4, "embed_dim": 12, "depths": [2, 4, 2], "num_heads": [2, 2, 4], "window_size": 3, **kwargs,
    }  # fmt: skip
    size = arguments.pop("img_size", 48)
    return ModelSpec(name="swin_tiny_patch4_window7_224", kwargs=arguments, img_size=size, num_classes=5)


def _config(sites: list[dict[str, Any]] = SITES, spec: ModelSpec | None = None, **options: Any) -> PruneConfig:
    return models.config("trilevel", sites, spec or _spec(), **options)


def _images(batch: int = 3, side: int = 48) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def _model(config: PruneConfig) -> Any:
    return prunefront.compress(models.build(config.model), config)


VARIANTS = {
    "divides": _spec(),
    "pads": _spec(window_size=5),
    "odd grid": _spec(img_size=52),
    "one window": _spec(window_size=12),
    "no bias": _spec(qkv_bias=False),
    "dynamic size": _spec(strict_img_size=False),
}


# --- official form ----------------------------------------------------------------------------------------------------


def _case() -> tuple[dict[str, Any], dict[str, Tensor]]:
    for root in (PROJECT / "tests" / "data" / "golden", PROJECT.parent / "shared" / "golden"):
        if (root / CASE / "case.json").is_file():
            return json.loads((root / CASE / "case.json").read_text()), load_file(root / CASE / "tensors.safetensors")
    pytest.skip(f"needs the recorded case {CASE} in a folder shared/golden beside the clone")


def _weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("weights/"): value for name, value in tensors.items() if name.startswith("weights/")}


def test_replay_equals_every_recorded_tensor() -> None:
    case, tensors = _case()
    results = replay_swin(case, tensors)
    recorded = {name: t for name, t in tensors.items() if not name.startswith("weights/") and name != "input"}
    assert set(recorded) <= set(results)
    for name, expected in recorded.items():
        if expected.is_floating_point():
            torch.testing.assert_close(results[name], expected, atol=1e-5, rtol=1e-4)
        else:
            assert torch.equal(results[name], expected), name


def test_official_images_do_not_depend_on_their_batch_and_counts_are_the_recorded_ones() -> None:
    case, tensors = _case()
    model = swin_from_official(case["model"], case["hparams"], _weights(tensors))
    with torch.no_grad():
        one_by_one = torch.cat([model(image[None]) for image in tensors["input"].float()])
    torch.testing.assert_close(one_by_one, tensors["logits"], atol=1e-4, rtol=0)
    steps = [step for block in prunefront.token_counts(model.prune_config).blocks for step in block.steps]
    assert [step.kept for step in steps] == [info["num_keep_variable"] for info in case["stage_info"].values()]


def test_official_defaults_are_the_papers() -> None:
    sites, options = swin_sites([2, 2, 6, 2])
    assert [site["block"] for site in sites] == [5, 6, 7]
    config = models.config("trilevel", sites, ModelSpec(name="swin_tiny_patch4_window7_224"))
    counts = prunefront.token_counts(config)
    assert counts.tokens_in == [3136] * 2 + [784] * 2 + [196, 196, 176, 158, 142, 142, 49, 49]
    assert counts.is_static
    assert not prunefront.token_counts(config.evolve(options=options)).is_static


def test_the_repositorys_option_sets_the_ratio_at_the_places_of_swin() -> None:
    case, tensors = _case()
    constant = swin_from_official(case["model"], {"token_prune_ratio": 0.6}, _weights(tensors))
    option = swin_from_official({**case["model"], "token_prune_ratio": 0.8}, {"keep_ratio": 0.6}, _weights(tensors))

    assert option.prune_config == constant.prune_config
    assert {site.keep_ratio for site in option.prune_config.sites} == {0.6}


@pytest.mark.parametrize(
    ("changes", "hparams", "sentence"),
    [
        ({}, {"token_prune_ratio": 1.5}, "above 0 and at most 1, but got 1.5"),
        ({}, {"ratio": 0.5}, "Unknown hyper-parameter.*ratio"),
        ({}, {"keep_ratio": 1.5}, "keep_ratio is a share .* but got 1.5"),
        ({}, {"keep_ratio": 0.5, "token_prune_ratio": 0.5}, "Give one of them"),
        ({}, {"stage": 4}, "stage is one of 0 to 2, but got 4"),
        ({"ape": True}, {}, "no absolute position embedding"),
        ({"window_size": None}, {}, "The architecture lacks window_size"),
    ],
)
def test_official_arguments_that_cannot_be_are_refused(
    changes: dict[str, Any], hparams: dict[str, Any], sentence: str
) -> None:
    architecture = {**_spec().kwargs, "img_size": 48, "num_classes": 5, **changes}
    architecture = {name: value for name, value in architecture.items() if value is not None}
    with pytest.raises(ConfigError, match=sentence):
        swin_from_official(architecture, hparams, {})


def test_official_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CheckpointError, match="do not fit the architecture"):
        swin_from_official({**_spec().kwargs, "img_size": 48, "num_classes": 5}, {}, {})


def test_the_official_comparison_drops_the_threshold_itself() -> None:
    config = _config([{"block": 2, "op": "prune", "keep_ratio": 1.0}], tie="official")
    with torch.no_grad():
        _, aux = _model(config)(_images(), return_aux=True)
    (record,) = aux.sites
    assert record.values["mask"].sum(dim=1).tolist() == [35, 35, 35]


# --- the strict form against masking ----------------------------------------------------------------------------------


def _masked_reference(dense: Any, images: Tensor, counts: dict[int, int], *, official: bool = False) -> Tensor:
    """The method written down plainly, on whole grids with masks; unless ``official``: exact counts, no eps."""
    x, index = dense.patch_embed(images), 0
    for stage in dense.layers:
        x = stage.downsample(x)
        batch, height, width, _ = x.shape
        mask = torch.ones(batch, height, width, 1)
        for block in stage.blocks:
            computed, scores = _masked_block(block, x * mask, mask, 1e-6 if official else 0.0)
            x = x * (1 - mask) + computed * mask
            if index in counts:
                ranked = (scores * mask).flatten(1).topk(counts[index])
                if official:
                    mask = (scores > ranked.values[:, -1].view(batch, 1, 1, 1)).float()
                else:
                    mask = torch.zeros(batch, height * width).scatter(1, ranked.indices, 1.0).view_as(mask)
            index += 1
    return dense.forward_head(dense.norm(x))


def _masked_block(block: Any, x: Tensor, mask: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _, height, width, _ = x.shape
    window, shift = block.window_size, block.shift_size
    pad = (0, 0, 0, -width % window[1], 0, -height % window[0])

    def cut(values: Tensor, filler: float) -> Tensor:
        values = values.roll((-shift[0], -shift[1]), (1, 2))
        return window_partition(nn.functional.pad(values, pad, value=filler), window).flatten(1, 2)

    def join(windows: Tensor) -> Tensor:
        windows = windows.view(-1, *window, windows.shape[-1])
        grid = window_reverse(windows, window, height + pad[5], width + pad[3])[:, :height, :width]
        return grid.roll(shift, (1, 2))

    attn, tokens = block.attn, cut(block.norm1(x), 0.0)
    seen, real = cut(mask, 1.0)[:, None, None, :, 0], cut(torch.ones_like(mask), 0.0)
    qkv = attn.qkv(tokens).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits = qkv[0] * attn.scale @ qkv[1].transpose(-2, -1) + attn._get_rel_pos_bias()
    shift_mask = block.get_attn_mask(cut(x, 0.0).new_empty(1, height + pad[5], width + pad[3], 1))
    if shift_mask is not None:
        logits = logits + shift_mask.repeat(len(x), 1, 1).unsqueeze(1)
    visible = torch.maximum(seen, torch.eye(tokens.shape[1]))
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp() * visible
    weights = (weights + eps / tokens.shape[1]) / (weights.sum(dim=-1, keepdim=True) + eps)
    x = x + join(attn.proj((weights @ qkv[2]).transpose(1, 2).flatten(2)))
    scores = (weights.mean(dim=1) * real).sum(dim=1)
    return x + block.mlp(block.norm2(x)), join(scores.unsqueeze(-1))


@pytest.mark.parametrize("name", VARIANTS)
def test_computing_kept_tokens_only_equals_masking_with_exact_counts(name: str) -> None:
    config = _config(spec=VARIANTS[name])
    assert isinstance(config.model.img_size, int)
    dense, images = models.build(config.model), _images(side=config.model.img_size)
    counts = {b.index: b.steps[0].kept for b in prunefront.token_counts(config).blocks if b.steps}
    assert set(counts) == {2, 3, 6}
    with torch.no_grad():
        expected = _masked_reference(dense, images, counts)
        logits, aux = prunefront.compress(dense, config)(images, return_aux=True)
        plain = dense(images)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, plain, atol=1e-3)
    for record in aux.sites:
        assert (record.values["mask"].sum(dim=1) == counts[record.block]).all()
        assert ((record.assignment >= 0) == record.values["mask"]).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_official_form_equals_its_description(name: str) -> None:
    config = _config(spec=VARIANTS[name], tie="official")
    assert isinstance(config.model.img_size, int)
    dense, images = models.build(config.model), _images(side=config.model.img_size)
    counts = {b.index: b.steps[0].kept for b in prunefront.token_counts(config).blocks if b.steps}
    with torch.no_grad():
        expected = _masked_reference(dense, images, counts, official=True)
        torch.testing.assert_close(prunefront.compress(dense, config)(images), expected, atol=1e-5, rtol=1e-5)


def test_masked_tokens_return_in_official_form_as_described() -> None:
    config = _config(
        [{"block": 2, "op": "prune", "tokens": 25}, {"block": 3, "op": "prune", "tokens": 20}], tie="official"
    )
    dense, images = models.build(config.model), _images(8)
    for name, parameter in dense.named_parameters():
        if "qkv" in name:
            parameter.data.mul_(6)  # sharp attention
    with torch.no_grad():
        logits, aux = prunefront.compress(dense, config)(images, return_aux=True)
        expected = _masked_reference(dense, images, {2: 25, 3: 20}, official=True)
    first, second = (record.values["mask"] for record in aux.sites)
    assert (second & ~first).any()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_windows_without_a_token_change_nothing() -> None:
    config = _config([{"block": 2, "op": "prune", "tokens": 2}])
    dense = models.build(config.model)
    with torch.no_grad():
        expected = _masked_reference(dense, _images(), {2: 2})
        torch.testing.assert_close(prunefront.compress(dense, config)(_images()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_keeping_everything_equals_timm(name: str) -> None:
    spec = VARIANTS[name]
    assert isinstance(spec.img_size, int)
    dense, images = models.build(spec), _images(side=spec.img_size)
    everything = [{"block": b, "op": "prune", "keep_ratio": 1.0} for b in range(8)]
    with torch.no_grad():
        expected = dense(images)
        torch.testing.assert_close(
            prunefront.compress(dense, _config(everything, spec))(images), expected, atol=1e-5, rtol=1e-5
        )
        masks = prunefront.compress(dense, _config([], spec, tie="official"))
        torch.testing.assert_close(masks(images), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("tie", ["strict", "official"])
def test_images_do_not_depend_on_their_batch(tie: str) -> None:
    model, images = _model(_config(tie=tie)), _images()
    with torch.no_grad():
        one_by_one = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), one_by_one, atol=1e-5, rtol=1e-5)


# --- schedules and MACs -----------------------------------------------------------------------------------------------


def test_counts_are_truncated_and_start_again_with_every_stage() -> None:
    counts = prunefront.token_counts(_config())
    assert counts.tokens_in == [144, 144, 36, 25, 20, 20, 9, 7]
    assert counts.tokens_out == [144, 144, 25, 20, 20, 20, 7, 7]
    sites = [{"block": 2, "op": "prune", "cumulative_keep_ratio": 0.5}, {"block": 3, "op": "prune", "remove": 4}]
    assert prunefront.token_counts(_config(sites)).tokens_in == [144, 144, 36, 18, 14, 14, 9, 9]


def test_configs_that_do_the_same_hash_alike() -> None:
    spelled = [{"block": block, "op": "prune", "tokens": count} for block, count in ((2, 25), (3, 20), (6, 7))]
    assert _config().content_hash() == _config(spelled).content_hash()
    assert _config().content_hash() != _config(tie="official").content_hash()


@pytest.mark.parametrize("tie", ["strict", "official"])
def test_torchprofile_equals_the_detail(tie: str) -> None:
    # Too many tokens stay for a window to be left empty.
    config = _config([{"block": 2, "op": "prune", "tokens": 30}, {"block": 3, "op": "prune", "tokens": 28}], tie=tie)
    detail = macs_detail(config)
    assert _profiled(_model(config), config.model) == detail.total
    dense = macs_detail(_config([]))
    assert _profiled(models.build(config.model), config.model) == dense.total
    assert (detail.model < dense.model) == (tie == "strict")


def test_padded_grids_are_counted_as_timm_runs_them() -> None:
    config = _config([{"block": 0, "op": "prune", "tokens": 143}], VARIANTS["pads"])
    assert _profiled(_model(config), config.model) == macs_detail(config).total
    assert _profiled(models.build(config.model), config.model) == macs_detail(_config([], VARIANTS["pads"])).total


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_s3_tiny_224"])
def test_dense_macs_equal_torchprofile_on_timms_model(name: str) -> None:
    spec = ModelSpec(name=name)
    assert prunefront.macs(models.config("trilevel", [], spec)) == _profiled(timm.create_model(name).eval(), spec)


def _counted(model: nn.Module, images: Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(images)
    return int(counter.get_total_flops() // 2)


def test_strict_form_saves_what_the_detail_says_and_skips_empty_windows() -> None:
    images = _images(1)
    dense = _counted(models.build(_spec()), images)
    pruned = _config([{"block": 2, "op": "prune", "tokens": 30}])
    assert _counted(_model(pruned), images) == macs_detail(pruned).total < dense
    # One token per image: in each of three blocks at most one of the four windows has anything to attend to.
    hardly = _config([{"block": 2, "op": "prune", "tokens": 1}])
    detail = macs_detail(hardly)
    skipped = sum(detail.blocks[block]["attention"] * 3 // 4 for block in (3, 4, 5))
    assert _counted(_model(hardly), images) == detail.total - skipped


# --- what stays timm's ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", ["strict", "official"])
def test_state_dict_copies_pickles_and_uncompress(tie: str) -> None:
    dense, images = models.build(_spec()), _images()
    model = prunefront.compress(dense, _config(tie=tie))
    assert list(model.state_dict()) == list(dense.state_dict())
    with torch.no_grad():
        expected, plain = model(images), dense(images)
        assert torch.equal(copy.deepcopy(model)(images), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)
        assert torch.equal(prunefront.uncompress(model)(images), plain)
        assert torch.equal(model.forward_head(model.forward_features(images)), expected)
    assert next(model.parameters()) is next(dense.parameters())


@pytest.mark.parametrize("tie", ["strict", "official"])
def test_every_block_trains_with_and_without_checkpointing(tie: str) -> None:
    model, images = _model(_config(tie=tie)).train(), _images()
    for stage in model.layers:
        for block in stage.blocks:
            block.drop_path1 = block.drop_path2 = nn.Identity()
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("tie", ["strict", "official"])
def test_compiles_into_one_graph(tie: str) -> None:
    model, images = _model(_config(tie=tie)), _images()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), model(images), atol=1e-5, rtol=1e-5)


def test_bfloat16_autocast_runs_both_forms() -> None:
    for tie in ("strict", "official"):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert _model(_config(tie=tie))(_images()).isfinite().all()


def test_aux_says_where_tokens_went() -> None:
    model = _model(_config())
    with torch.no_grad():
        logits, aux = model(_images(), return_aux=True)
        assert torch.equal(model(_images()), logits)
        torch.testing.assert_close(model.head.fc(aux.tokens.mean(dim=1)), logits, atol=1e-5, rtol=1e-5)
    assert aux.origin.shape == (3, 144)
    # The third stage has 3 x 3 tokens, each made of 4 x 4 patches.
    assert aux.origin[0, [0, 3, 4, 48, 143]].tolist() == [0, 0, 1, 3, 8]
    assert [record.block for record in aux.sites] == [2, 3, 6]


def test_a_schedule_for_one_call_and_other_image_sizes() -> None:
    spec = VARIANTS["dynamic size"]
    dense = models.build(spec)
    model = prunefront.compress(dense, _config([], spec))
    other = [{"block": 2, "op": "prune", "tokens": 20}]
    with torch.no_grad():
        for side in (48, 56):
            _, aux = model(_images(side=side), schedule=other, return_aux=True)
            assert (aux.sites[0].values["mask"].sum(dim=1) == 20).all()
            torch.testing.assert_close(model(_images(side=side)), dense(_images(side=side)), atol=1e-5, rtol=1e-5)


def test_saved_models_load_again(tmp_path: Path) -> None:
    model = _model(_config())
    loaded = prunefront.load_model(prunefront.save_model(model, tmp_path / "swin.safetensors")).eval()
    with torch.no_grad():
        assert torch.equal(loaded(_images()), model(_images()))


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "op"),
    [("evit", "fuse"), ("tome", "merge"), ("hybrid", "merge"), ("dynamicvit", "select"), ("spvit", "select")],
)
def test_other_methods_are_refused(method: str, op: str) -> None:
    config = models.config(method, [{"block": 2, "op": op, "tokens": 20}], _spec())
    for refuse in (prunefront.macs, _model):
        with pytest.raises(ModelError, match=f"{method!r} does not run on Swin.*Use trilevel"):
            refuse(config)
    dense = prunefront.compress(models.build(_spec()), config.evolve(sites=()))
    with torch.no_grad():
        torch.testing.assert_close(dense(_images()), models.build(_spec())(_images()))
        with pytest.raises(ConfigError, match="does not run on Swin"):
            dense(_images(), schedule=config.sites)


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224"])
def test_other_swins_are_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match="SwinTransformerV2.* is not supported"):
        prunefront.macs(models.config("trilevel", [], ModelSpec(name=name)))


def test_a_changed_block_is_refused_by_name() -> None:
    class OtherBlock(nn.Module):
        pass

    dense = models.build(_spec())
    dense.layers[1].blocks[2] = OtherBlock()
    with pytest.raises(ModelError, match="OtherBlock in stage 1"):
        prunefront.compress(dense, _config())


def test_latency_tables_are_refused() -> None:
    with pytest.raises(ModelError, match="has 3 kinds of blocks.*Measure its configs as a whole"):
        require_equal_blocks(geometry_for(_spec()), "swin_tiny")


def test_what_cannot_be_on_this_swin_is_refused() -> None:
    with pytest.raises(ConfigError, match="attn_ratio has to be 1, but got 0.5"):
        prunefront.macs(_config(attn_ratio=0.5))
    with pytest.raises(ConfigError, match="block 8, but the model has blocks 0 to 7"):
        prunefront.macs(_config([{"block": 8, "op": "prune", "tokens": 3}]))
    with pytest.raises(ValueError, match="no operation 'fuse'"):
        _config([{"block": 2, "op": "fuse", "tokens": 3}])
    with pytest.raises(ModelError, match=r"with 2\+4\+2 blocks, but this model has 2\+2\+4"):
        prunefront.compress(models.build(_spec(depths=[2, 2, 4])), _config())
    with pytest.raises(InputError, match="48 x 48 px, but got 56 x 56"):
        _model(_config())(_images(side=56))
    with pytest.raises(InputError, match="shape \\(batch, 3 channels"):
        _model(_config())(_images()[0])
