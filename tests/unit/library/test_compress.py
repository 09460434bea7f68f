"""Compressed models: dense equality, what stays timm's, independence of calls, and clear refusals."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn import functional as F

import prunefront
from prunefront.config import ModelSpec
from prunefront.errors import CheckpointError, ConfigError, InputError, ModelError
from tests.unit.library import models

FAMILIES: dict[str, ModelSpec] = {
    "vit": models.small_spec(),
    "deit-distilled": models.small_spec("deit_tiny_distilled_patch16_224"),
    "deit3": models.small_spec("deit3_small_patch16_224"),
    "augreg": models.small_spec("vit_small_patch16_224"),
    "mae": models.small_spec("vit_base_patch16_224.mae", global_pool="avg"),
    "clip": models.small_spec("vit_base_patch16_clip_224"),
    "dinov2": models.small_spec("vit_small_patch14_dinov2"),
    "dinov2-registers": models.small_spec("vit_small_patch14_reg4_dinov2"),
    "siglip": models.small_spec("vit_base_patch16_siglip_224"),
    "gap-no-class-token": models.small_spec(class_token=False, global_pool="avg"),
    "qk-norm": models.small_spec(qk_norm=True),
    "layer-scale": models.small_spec(init_values=0.5),
    "attention-norm": models.small_spec(scale_attn_norm=True, scale_mlp_norm=True),
    "non-square": models.small_spec(img_size=(32, 64)),
    "odd-size": models.small_spec(img_size=40),
    "dynamic-size": models.small_spec(dynamic_img_size=True),
    "max-pool": models.small_spec(global_pool="max"),
    "lvvit": models.small_spec("lvvit_s", stem_width=8),
    "avgmax-pool": models.small_spec(global_pool="avgmax"),
}


def _images(spec: ModelSpec, batch: int = 3, seed: int = 1) -> torch.Tensor:
    size = spec.img_size if isinstance(spec.img_size, tuple) else (spec.img_size or 224,) * 2
    return torch.randn(batch, spec.in_chans, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_equals_the_plain_model(family: str) -> None:
    spec = FAMILIES[family]
    model, images = models.build(spec), _images(spec)
    everything = {
        "evit": [{"block": 0, "op": "fuse", "keep_ratio": 1.0}],
        "ppt": [{"block": 1, "op": "pool_or_prune", "remove": 0}],
        "tome": [{"block": 2, "op": "merge", "remove": 0}],
        "diffrate": [
            {"block": 1, "op": "prune", "keep_ratio": 1.0},
            {"block": 1, "op": "merge_mean", "keep_ratio": 1.0},
        ],
        "hybrid": [{"block": 0, "op": "prune", "keep_ratio": 1.0}, {"block": 0, "op": "merge", "remove": 0}],
    }
    with torch.no_grad():
        expected = model(images)
        for method, sites in everything.items():
            if not model.has_class_token and method in ("evit", "ppt", "diffrate", "hybrid"):
                continue
            compressed = prunefront.compress(model, models.config(method, sites, spec))
            torch.testing.assert_close(compressed(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_reduced_and_trains(family: str) -> None:
    spec = FAMILIES[family]
    model, images = models.build(spec), _images(spec)
    sites = [{"block": 0, "op": "merge", "remove": 4}, {"block": 2, "op": "merge", "remove": 5}]
    compressed = prunefront.compress(model, models.config("tome", sites, spec)).train()
    logits, aux = compressed(images, return_aux=True)
    assert logits.shape == (3, 7)
    assert aux.tokens.shape[1] == prunefront.token_counts(compressed.prune_config).tokens_out[-1]
    logits.sum().backward()
    assert all(p.grad is not None for name, p in compressed.named_parameters() if "blocks" in name)


@pytest.mark.parametrize("name", models.static_schedules())
def test_sizes_and_origins_account_for_every_token(name: str) -> None:
    config = models.schedules()[name]
    model = prunefront.compress(models.build(config.model), config)
    with torch.no_grad():
        _, aux = model(_images(config.model), return_aux=True)
    assert aux.tokens.shape[1] == prunefront.token_counts(config).tokens_out[-1]
    assert (aux.origin[:, 0] == 0).all()
    assert aux.origin.max() < aux.tokens.shape[1]
    if name in ("tome", "tome-noprop", "ppt-pool"):
        # Merging loses nothing: sizes are the number of tokens that ended in each place, and add up to all.
        counted = F.one_hot(aux.origin, aux.tokens.shape[1]).sum(dim=1).float()
        assert aux.size is not None
        torch.testing.assert_close(aux.size, counted)
        assert (aux.size.sum(dim=1) == 37).all()


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_tome_conserves_the_weighted_sum_of_tokens(prefix: int, sized: bool) -> None:
    from prunefront.ops.merge import bipartite_match, merge_matched

    generator = torch.Generator().manual_seed(0)
    tokens = 21 + prefix
    x = torch.randn(2, tokens, 8, generator=generator)
    size = torch.randint(1, 5, (2, tokens), generator=generator).float() if sized else torch.ones(2, tokens)
    match = bipartite_match(x[:, prefix:], 9, num_prefix_tokens=prefix)
    merged, merged_size = merge_matched(x, size, match, prefix)
    assert merged.shape == (2, tokens - 9, 8)
    torch.testing.assert_close(
        (merged * merged_size[..., None]).sum(1), (x * size[..., None]).sum(1), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(merged_size.sum(1), size.sum(1))
    # The prefix, and the kept tokens of set a in their order, are as they were.
    torch.testing.assert_close(merged[:, :prefix], x[:, :prefix], atol=0, rtol=0)
    kept = prefix + match.a_offset + 2 * match.kept
    for image in range(2):
        torch.testing.assert_close(merged[image, prefix : prefix + kept.shape[1]], x[image, kept[image]])


def test_fused_token_is_the_score_weighted_sum_of_what_was_dropped() -> None:
    config = models.config("evit", [{"block": 1, "op": "fuse", "tokens": 20}])
    model = prunefront.compress(models.build(config.model), config)
    captured: dict[str, torch.Tensor] = {}
    block = model.blocks[1]
    block.norm2.register_forward_pre_hook(lambda module, args: captured.update(reduced=args[0]))
    block.norm1.register_forward_pre_hook(lambda module, args: captured.update(entering=args[0]))
    with torch.no_grad():
        _, aux = model(_images(config.model), return_aux=True)
        entering = captured["entering"]
        after_attention = entering + block.attn(block.norm1(entering))
    (record,) = aux.sites
    dropped = torch.ones(3, 36).scatter(1, record.values["kept_idx"], 0.0)
    expected = ((dropped * record.values["scores"])[..., None] * after_attention[:, 1:]).sum(1)
    torch.testing.assert_close(captured["reduced"][:, -1], expected, atol=1e-5, rtol=1e-4)
    assert captured["reduced"].shape[1] == 1 + 20 + 1


@pytest.mark.parametrize(
    ("method", "other"),
    [
        (models.schedules()["evit-fuse"], {"prop_attn": False}),
        (models.schedules()["evit-prune"], {"prop_attn": False}),
        (models.schedules()["tome"], {"prop_attn": True}),
        (models.schedules()["tome-noprop"], {"prop_attn": False}),
    ],
    ids=["evit-fuse", "evit-prune", "tome", "tome-noprop"],
)
def test_hybrid_with_one_methods_operations_equals_that_method(method: Any, other: dict[str, Any]) -> None:
    hybrid = models.config("hybrid", [site.model_dump() for site in method.sites], method.model, **other)
    model, images = models.build(method.model), _images(method.model)
    with torch.no_grad():
        ours, theirs = prunefront.compress(model, hybrid)(images), prunefront.compress(model, method)(images)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_hybrid_pruning_by_class_and_value_equals_ppt_that_always_prunes() -> None:
    ppt = models.schedules()["ppt-prune"]
    sites = [{"block": site.block, "op": "prune", "remove": site.remove} for site in ppt.sites]
    hybrid = models.config("hybrid", sites, ppt.model, score="cls_value")
    model, images = models.build(ppt.model), _images(ppt.model)
    with torch.no_grad():
        ours, theirs = prunefront.compress(model, hybrid)(images), prunefront.compress(model, ppt)(images)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_ppt_mixes_both_branches_and_equals_each_one_per_image() -> None:
    config = models.schedules()["ppt-mixed"]
    model, images = models.build(config.model), _images(config.model, batch=8)
    with torch.no_grad():
        _, aux = prunefront.compress(model, models.config("ppt", [dict(config.sites[0])], threshold=0.0))(
            images, return_aux=True
        )
        threshold = float(aux.sites[0].values["var"].median()) * 1.0001
        pool, prune, mixed = (
            prunefront.compress(model, models.config("ppt", [dict(config.sites[0])], threshold=t))
            for t in (None, 0.0, threshold)
        )
        logits, aux = mixed(images, return_aux=True)
        expected = torch.where(aux.sites[0].values["policy"][:, None], pool(images), prune(images))
    assert aux.sites[0].values["policy"].unique().tolist() == [False, True]
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", models.schedules())
def test_batch_size_and_order_do_not_change_an_image(name: str) -> None:
    config = models.schedules()[name]
    model, images = prunefront.compress(models.build(config.model), config), _images(config.model, batch=8)
    with torch.no_grad():
        whole = model(images)
        torch.testing.assert_close(torch.cat([model(i[None]) for i in images]), whole, atol=1e-4, rtol=0)
        torch.testing.assert_close(model(images.flip(0)).flip(0), whole, atol=1e-4, rtol=0)


def test_the_input_stays_as_it_was_and_parameters_are_shared() -> None:
    config = models.schedules()["hybrid"]
    model, images = models.build(config.model), _images(config.model)
    before = model(images)
    compressed = prunefront.compress(model, config)
    compressed.train()
    compressed.set_grad_checkpointing()
    compressed.reset_classifier(3)
    assert not model.training and not model.blocks[0].training and not model.grad_checkpointing
    assert type(model) is type(models.build(config.model)) and model.head.out_features == 7
    torch.testing.assert_close(model(images), before)
    assert compressed.blocks[0].attn.qkv.weight is model.blocks[0].attn.qkv.weight


def test_uncompress_gives_the_plain_model_back() -> None:
    config = models.schedules()["evit-fuse"]
    model, images = models.build(config.model), _images(config.model)
    dense = prunefront.uncompress(prunefront.compress(model, config))
    assert type(dense) is type(model) and dense.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(dense(images), model(images))
    with pytest.raises(ModelError, match="not compressed"):
        prunefront.uncompress(model)


def test_compressing_again_replaces_the_schedule() -> None:
    first, second = models.schedules()["evit-fuse"], models.schedules()["tome"]
    model, images = models.build(first.model), _images(first.model)
    again = prunefront.compress(prunefront.compress(model, first), second)
    torch.testing.assert_close(again(images), prunefront.compress(model, second)(images))


@pytest.mark.parametrize("name", ["evit-fuse", "ppt-mixed", "tome", "diffrate", "hybrid", "trilevel-attention"])
def test_what_timm_offers_keeps_working(name: str) -> None:
    config = models.schedules()[name]
    model, images = models.build(config.model), _images(config.model)
    compressed = prunefront.compress(model, config)
    logits = compressed(images)
    assert compressed.state_dict().keys() == model.state_dict().keys()
    assert isinstance(compressed, type(model)) and compressed.pretrained_cfg == model.pretrained_cfg
    torch.testing.assert_close(copy.deepcopy(compressed)(images), logits)
    torch.testing.assert_close(compressed.forward_head(compressed.forward_features(images)), logits)
    stream = io.BytesIO()
    torch.save(compressed, stream)
    stream.seek(0)
    torch.testing.assert_close(torch.load(stream, weights_only=False)(images), logits)

    compressed.train()
    compressed(images).square().sum().backward()
    plain = {n: p.grad.clone() for n, p in compressed.named_parameters()}
    compressed.zero_grad()
    compressed.set_grad_checkpointing()
    compressed(images).square().sum().backward()
    for parameter_name, parameter in compressed.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[parameter_name], atol=1e-4, rtol=1e-4)
    with pytest.raises(ModelError, match="no feature maps per block"):
        compressed.forward_intermediates(images)


@pytest.mark.parametrize("name", ["trilevel", "trilevel-attention"])
def test_looking_at_the_attention_changes_nothing_in_training_or_under_checkpointing(name: str) -> None:
    config = models.schedules()[name]
    images = _images(config.model)
    compressed: Any = prunefront.compress(models.build(config.model), config).train()
    for block in compressed.blocks:
        block.drop_path1, block.drop_path2 = DropPath(0.5), DropPath(0.5)
    results = []
    for checkpointing, looks in ((False, False), (False, True), (True, True)):
        compressed.set_grad_checkpointing(checkpointing)
        compressed.zero_grad()
        torch.manual_seed(5)
        logits = compressed(images, return_aux=True)[0] if looks else compressed(images)
        logits.square().sum().backward()
        results.append((logits.detach(), [parameter.grad.clone() for parameter in compressed.parameters()]))

    for logits, gradients in results[1:]:
        torch.testing.assert_close(logits, results[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradients, results[0][1], atol=1e-4, rtol=1e-4)


def test_another_schedule_for_one_call_leaves_the_model_alone() -> None:
    config = models.schedules()["evit-fuse"]
    model, images = models.build(config.model), _images(config.model)
    compressed = prunefront.compress(model, config)
    logits = compressed(images)
    torch.testing.assert_close(compressed(images, schedule=[]), model(images), atol=1e-5, rtol=1e-5)
    _, aux = compressed(images, schedule=[{"block": 3, "op": "prune", "tokens": 5}], return_aux=True)
    assert aux.tokens.shape[1] == 6
    torch.testing.assert_close(compressed(images), logits)
    with pytest.raises(ConfigError, match="no operation 'merge'"):
        compressed(images, schedule=[{"block": 3, "op": "merge", "tokens": 5}])


def test_two_threads_may_use_one_model_with_different_schedules() -> None:
    config = models.schedules()["tome"]
    model = prunefront.compress(models.build(config.model), config)
    images = _images(config.model)
    other = [{"block": 1, "op": "merge", "remove": 9}]
    with torch.no_grad():
        expected = {0: model(images), 1: model(images, schedule=other)}

        def run(index: int) -> bool:
            with torch.no_grad():
                result = model(images) if index % 2 == 0 else model(images, schedule=other)
            return torch.allclose(result, expected[index % 2], atol=1e-6)

        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(run, range(40)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_dtype(dtype: torch.dtype) -> None:
    for config in models.schedules().values():
        model = prunefront.compress(models.build(config.model).to(dtype), config)
        with torch.no_grad():
            assert model(_images(config.model).to(dtype)).dtype == dtype


@pytest.mark.compile
@pytest.mark.parametrize("name", models.static_schedules())
def test_whole_graph_compilation_gives_the_same_logits(name: str) -> None:
    config = models.schedules()[name]
    model, images = prunefront.compress(models.build(config.model), config), _images(config.model)
    torch._dynamo.reset()
    with torch.no_grad():
        # The graph is what must be whole; what a back end makes of it is torch's business and slow to test.
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
        torch.testing.assert_close(compiled(images), model(images), atol=1e-4, rtol=1e-4)


def test_evit_resizes_positions_for_other_image_sizes_and_others_refuse() -> None:
    spec = models.small_spec()
    model, larger = models.build(spec), torch.randn(2, 3, 64, 64)
    evit = prunefront.compress(model, models.schedules()["evit-fuse"])
    table = model.pos_embed[:, 1:].reshape(1, 6, 6, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(table, size=(8, 8), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    bigger = models.build(models.small_spec(img_size=64))
    bigger.load_state_dict({**model.state_dict(), "pos_embed": torch.cat((model.pos_embed[:, :1], resized), 1)})
    with torch.no_grad():
        torch.testing.assert_close(evit(larger, schedule=[]), bigger(larger), atol=1e-5, rtol=1e-5)
        assert evit(larger).shape == (2, 7)
    with pytest.raises(InputError, match="takes images of 48 x 48 px, but got 64 x 64"):
        prunefront.compress(model, models.schedules()["tome"])(larger)
    with pytest.raises(InputError, match="multiples of the patch size 8 x 8"):
        evit(torch.randn(1, 3, 50, 48))
    for bad in (torch.randn(3, 48, 48), torch.randn(1, 1, 48, 48)):
        with pytest.raises(InputError, match="Expected images of shape"):
            evit(bad)


def test_ranking_methods_refuse_models_without_class_token_and_merging_works() -> None:
    spec = FAMILIES["gap-no-class-token"]
    model = models.build(spec)
    for method, op in (("evit", "prune"), ("ppt", "pool_or_prune"), ("diffrate", "prune"), ("hybrid", "fuse")):
        with pytest.raises(ModelError, match="attention of the class token, but this model has none"):
            prunefront.compress(model, models.config(method, [{"block": 0, "op": op, "tokens": 20}], spec))
    merged = prunefront.compress(model, models.config("hybrid", [{"block": 0, "op": "merge", "remove": 5}], spec))
    assert merged(_images(spec)).shape == (3, 7)


def test_averaging_weights_merged_tokens_by_their_size() -> None:
    spec = FAMILIES["gap-no-class-token"]
    model = models.build(spec)
    merged = prunefront.compress(model, models.config("tome", [{"block": 3, "op": "merge", "remove": 12}], spec))
    with torch.no_grad():
        logits, aux = merged(_images(spec), return_aux=True)
        mean = (aux.tokens * aux.size[..., None]).sum(1) / 36
        torch.testing.assert_close(model.head(model.fc_norm(mean)), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "block"),
    [
        ({"block_fn": timm.models.vision_transformer.ParallelScalingBlock}, "ParallelScalingBlock"),
        ({"block_fn": timm.models.vision_transformer.ResPostBlock}, "ResPostBlock"),
    ],
)
def test_parallel_and_post_norm_blocks_are_refused_by_name(kwargs: dict[str, Any], block: str) -> None:
    model = timm.models.vision_transformer.VisionTransformer(img_size=32, embed_dim=48, depth=1, num_heads=3, **kwargs)
    with pytest.raises(ModelError, match=f"{block} at block 0"):
        prunefront.compress(model, models.config("tome", []))


def test_a_config_for_another_image_size_is_refused() -> None:
    model = models.build(models.small_spec(img_size=64))
    with pytest.raises(ModelError, match="48 x 48 px, but this model takes 64 x 64"):
        prunefront.compress(model, models.schedules()["tome"])


def test_checkpoints_carry_their_config(tmp_path: Path) -> None:
    config = models.schedules()["hybrid"]
    model, images = prunefront.compress(models.build(config.model), config), _images(config.model)
    path = prunefront.save_model(model, tmp_path / "best.safetensors")
    loaded = prunefront.load_model(path)
    assert loaded.prune_config == config
    torch.testing.assert_close(loaded.eval()(images), model(images))
    again = prunefront.create_model(config, checkpoint=path).eval()
    torch.testing.assert_close(again(images), model(images))


def test_a_config_for_another_depth_is_refused() -> None:
    config = {"format": "prunefront/config/1", "model": {"name": "digit_vit_patch6_48"}, "method": "evit", "sites": []}
    deeper = timm.create_model("digit_vit_patch6_48", depth=8)
    with pytest.raises(ModelError, match="digit_vit_patch6_48 with 6 blocks, but this model has 8"):
        prunefront.compress(deeper, config)


def test_checkpoints_that_do_not_fit_say_where(tmp_path: Path) -> None:
    config = models.schedules()["tome"]
    other = models.build(models.small_spec(num_classes=4))
    torch.save({"model": other.state_dict()}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"head.weight is \(4, 48\) instead of \(7, 48\)"):
        prunefront.create_model(config, checkpoint=tmp_path / "other.pth")
    torch.save({"pos_embed": torch.zeros(1)}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match="lacks .* more"):
        prunefront.create_model(config, checkpoint=tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        prunefront.create_model(config, checkpoint=tmp_path / "none.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(CheckpointError, match="not a readable"):
        prunefront.load_model(tmp_path / "text.safetensors")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(CheckpointError, match="could not be read|not a readable"):
        prunefront.create_model(config, checkpoint=tmp_path / "text.pth")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a readable checkpoint: .+"):
        prunefront.create_model(config, checkpoint=tmp_path / "empty.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pth")
    with pytest.raises(CheckpointError, match="weights only"):
        prunefront.create_model(config, checkpoint=tmp_path / "pickle.pth")


def test_positions_are_resized_for_another_image_size(tmp_path: Path) -> None:
    """A checkpoint of 48 px for a model of 64 px: what EViT does inside its forward pass, done once."""
    small, larger = models.small_spec(), models.small_spec(img_size=64)
    model = models.build(small)
    torch.save(model.state_dict(), tmp_path / "small.pth")
    resized = prunefront.create_model(models.config("evit", [], larger), checkpoint=tmp_path / "small.pth").eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = prunefront.compress(model, models.config("evit", [], small))(images)
        torch.testing.assert_close(resized(images), expected, atol=1e-5, rtol=1e-5)
    torch.save({**model.state_dict(), "pos_embed": torch.zeros(1, 36, 48)}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"pos_embed is \(1, 36, 48\) instead of \(1, 65, 48\)"):
        prunefront.create_model(models.config("evit", [], larger), checkpoint=tmp_path / "odd.pth")
