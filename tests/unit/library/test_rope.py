"""Rotary ViTs: positions follow the kept tokens, against timm's own blocks run by hand."""

from __future__ import annotations

import copy
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchprofile import profile_macs

import prunefront
from prunefront.backbones.eva import EVA_BLOCKS
from prunefront.config import ModelSpec
from prunefront.errors import InputError, ModelError
from prunefront.geometry import geometry_of
from prunefront.macs import macs_detail
from prunefront.ops.attention import merge_keys
from prunefront.ops.rotary import Rotary, rotation_tables
from prunefront.ops.tokens import Tokens
from tests.unit.library import models

ARCHITECTURES: dict[str, ModelSpec] = {
    "eva02": models.small_spec("eva02_tiny_patch14_224"),
    "eva02-swiglu": models.small_spec("eva02_base_patch14_224"),
    "eva02-clip": models.small_spec("eva02_base_patch16_clip_224"),
    "eva-no-rope": models.small_spec("eva_giant_patch14_224", mlp_ratio=2),
    "dinov3": models.small_spec("vit_small_patch16_dinov3"),
    "dinov3-swiglu": models.small_spec("vit_huge_plus_patch16_dinov3", mlp_ratio=2),
    "rope": models.small_spec("vit_small_patch16_rope_224"),
    "rope-mixed": models.small_spec("vit_small_patch16_rope_mixed_224"),
    "rope-mixed-ape": models.small_spec("vit_small_patch16_rope_mixed_ape_224"),
    "rope-registers": models.small_spec("vit_betwixt_patch16_rope_reg4_gap_256"),
    "mrope": models.small_spec("vit_small_patch16_rope_224", rope_type="mrope", rope_grid_indexing="ij"),
    "perception-encoder": models.small_spec("vit_pe_core_tiny_patch16_384"),
    "sapiens2": models.small_spec("vit_base_patch16_sapiens2", mlp_ratio=2, num_kv_heads=3),
    "grouped-keys": models.small_spec("vit_base_patch16_sapiens2", mlp_ratio=2, num_kv_heads=1),
    "separate-bias": models.small_spec("vit_small_patch16_dinov3_qkvb", global_pool="token"),
    "avgmax": models.small_spec("vit_small_patch16_dinov3", global_pool="avgmax"),
    "non-square": models.small_spec("eva02_tiny_patch14_224", img_size=(32, 64)),
    "dynamic-size": models.small_spec("vit_small_patch16_dinov3", dynamic_img_size=True),
    "dynamic-mixed": models.small_spec("vit_small_patch16_rope_mixed_224", dynamic_img_size=True),
}
MANY = ("eva02-swiglu", "dinov3", "rope-mixed", "grouped-keys")  # what differs in how attention works
SITES: dict[str, list[dict[str, Any]]] = {
    "evit": [{"block": 0, "op": "fuse", "keep_ratio": 0.7}, {"block": 2, "op": "fuse", "keep_ratio": 0.7}],
    "ppt": [{"block": 1, "op": "pool_or_prune", "remove": 9}],
    "tome": [{"block": b, "op": "merge", "remove": 5} for b in range(4)],
    "diffrate": [{"block": 1, "op": "prune", "tokens": 28}, {"block": 1, "op": "merge_mean", "tokens": 20}],
    "hybrid": [{"block": 0, "op": "fuse", "keep_ratio": 0.8}, {"block": 0, "op": "merge", "remove": 4}],
}


def _images(spec: ModelSpec, batch: int = 3) -> Tensor:
    size = spec.img_size if isinstance(spec.img_size, tuple) else (spec.img_size or 224,) * 2
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def _compressed(name: str, method: str) -> nn.Module:
    spec = ARCHITECTURES[name]
    return prunefront.compress(models.build(spec), models.config(method, SITES[method], spec))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_keeping_everything_equals_the_plain_model(name: str) -> None:
    spec = ARCHITECTURES[name]
    model, images = models.build(spec), _images(spec)
    everything = {
        "evit": [{"block": 0, "op": "prune", "keep_ratio": 1.0}],
        "tome": [{"block": 2, "op": "merge", "remove": 0}],
        "diffrate": [{"block": 1, "op": "prune", "keep_ratio": 1.0}],  # sorts all tokens, and their positions with them
    }
    with torch.no_grad():
        expected = model(images)
        for method, sites in everything.items():
            if method != "tome" and model.cls_token is None:
                continue
            compressed = prunefront.compress(model, models.config(method, sites, spec))
            torch.testing.assert_close(compressed(images), expected, atol=1e-5, rtol=1e-5)


def _hand_rotated(attn: Any, normed: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys before and after rotation of a dense sequence, spelled out."""
    heads = []
    if attn.qkv is None:
        heads = [attn.q_proj(normed), attn.k_proj(normed)]
    else:
        q, k, _ = attn.qkv(normed).chunk(3, dim=-1)
        heads = [q, k] if getattr(attn, "q_bias", None) is None else [q + attn.q_bias, k + attn.k_bias]
    q, k = (part.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for part in heads)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is None:
        return q, k, k
    prefix = attn.num_prefix_tokens
    turned = []
    for part in (q, k):
        turned.append(part.clone())
        turned[-1][:, :, prefix:] = apply_rot_embed_cat(part[:, :, prefix:], rope, half=attn.rotate_half)
    return turned[0], k, turned[1]


def _masked_evit(model: Any, images: Tensor, keep: dict[int, int]) -> Tensor:
    """EViT's pruning with nothing removed: dropped tokens stay at their places and are hidden by an attention mask."""
    x, rope = model._pos_embed(model.patch_embed(images))
    x = model.norm_pre(x)
    prefix = model.num_prefix_tokens
    visible = torch.ones(x.shape[:2], dtype=torch.bool)
    for index, block in enumerate(model.blocks):
        own = rope[index] if model.rope_mixed else rope
        seen = visible
        if index in keep:
            q, _, k = _hand_rotated(block.attn, block.norm1(x), own)
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            row = (q[:, :, 0] * block.attn.scale).unsqueeze(2) @ k.transpose(-2, -1)
            scores = row.squeeze(2).masked_fill(~visible[:, None], -torch.inf).softmax(-1).mean(1)[:, prefix:]
            kept = scores.masked_fill(~visible[:, prefix:], -1.0).topk(keep[index]).indices
            visible = torch.ones_like(visible)
            visible[:, prefix:] = torch.zeros_like(scores).scatter(1, kept, 1.0).bool()
        x = block(x, rope=own, attn_mask=seen[:, None, None, :])
    x = model.norm(x)
    if model.global_pool == "token":
        pooled = x[:, 0]
    elif model.attn_pool is not None:
        pooled = model.attn_pool(x, attn_mask=visible[:, None, None, :])
    else:
        patches, left = x[:, prefix:], visible[:, prefix:, None]
        pooled = (patches * left).sum(1) / left.sum(1)
    logits: Tensor = model.head(model.fc_norm(pooled))
    return logits


@pytest.mark.parametrize(
    "name", ["eva02", *MANY, "eva02-clip", "eva-no-rope", "rope", "mrope", "non-square", "dynamic-mixed", "sapiens2"]
)
def test_pruning_equals_hiding_the_dropped_tokens_at_their_places(name: str) -> None:
    spec = ARCHITECTURES[name]
    model, images = models.build(spec), _images(spec)
    sites = [{"block": 0, "op": "prune", "tokens": 20}, {"block": 2, "op": "prune", "tokens": 9}]
    with torch.no_grad():
        for method in ("evit", "hybrid"):
            pruned = prunefront.compress(model, models.config(method, sites, spec))(images)
            torch.testing.assert_close(pruned, _masked_evit(model, images, {0: 20, 2: 9}), atol=1e-5, rtol=1e-5)


def _rest_by_timm(model: Any, x: Tensor, first: int, places: Tensor, size: Tensor | None) -> Tensor:
    """Tokens through timm's own blocks from ``first`` on, rotations gathered by ``places`` (B, N), -1 for none."""
    rope = model._pos_embed(model.patch_embed(torch.zeros(1, 3, *model.patch_embed.img_size)))[1]
    bias = None if size is None else size.log()[:, None, None, :]
    for index in range(first, len(model.blocks)):
        own = rope[index] if model.rope_mixed else rope[None]
        dim = own.shape[-1] // 2
        rows = own[:, places[:, model.num_prefix_tokens :].clamp(min=0)].transpose(0, 1).clone()
        without = (places[:, model.num_prefix_tokens :] < 0)[:, None, :, None]
        rows[..., :dim] = rows[..., :dim].masked_fill(without, 0.0)
        rows[..., dim:] = rows[..., dim:].masked_fill(without, 1.0)
        x = model.blocks[index](x, rope=rows, attn_mask=bias)
    return x


@pytest.mark.parametrize("name", MANY)
def test_a_fused_token_is_not_rotated_and_a_merged_one_has_its_destinations_place(name: str) -> None:
    spec = ARCHITECTURES[name]
    model: Any = models.build(spec)
    prefix, images = model.num_prefix_tokens, _images(spec)
    captured: dict[str, Tensor] = {}
    for method, op in (("evit", "fuse"), ("tome", "merge")):
        amount = {"tokens": 20} if op == "fuse" else {"remove": 16}
        compressed = prunefront.compress(model, models.config(method, [{"block": 1, "op": op, **amount}], spec))
        compressed.blocks[1].norm2.register_forward_pre_hook(lambda _, args: captured.update(reduced=args[0]))
        with torch.no_grad():
            _, aux = compressed(images, return_aux=True)
            (record,) = aux.sites
            if op == "fuse":
                kept, size = record.values["kept_idx"], None
                places = torch.cat((kept, torch.full((3, 1), -1)), dim=1)
            else:
                stay = torch.ones(3, 36, dtype=torch.bool).scatter(1, record.values["merge_src"], False)
                in_a = torch.arange(36) % 2 == prefix % 2
                rows = [torch.cat((torch.where(s & in_a)[0], torch.where(~in_a)[0])) for s in stay]
                places, size = torch.stack(rows), aux.size
            places = torch.cat((torch.full((3, prefix), -1), places), dim=1)
            block = compressed.blocks[1]
            x = captured["reduced"]
            x = x + EVA_BLOCKS.mlp(block, x)
            expected = model.norm(_rest_by_timm(model, x, 2, places, size))
        torch.testing.assert_close(aux.tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MANY)
def test_tokens_are_compared_by_keys_before_the_rotation(name: str) -> None:
    model: Any = models.build(ARCHITECTURES[name])
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        x, rope = model._pos_embed(model.patch_embed(_images(ARCHITECTURES[name])))
        own = rope[0] if model.rope_mixed else rope
        _, before, after = _hand_rotated(model.blocks[0].attn, model.blocks[0].norm1(x), own)
        places = (torch.arange(x.shape[1]) - prefix).clamp(min=-1).expand(3, -1)
        rotary = Rotary(tables=rotation_tables(rope, per_block=model.rope_mixed), initial=places)
        tokens = Tokens(x=x, num_prefix=prefix, places=places, rotary=rotary)
        _, state = EVA_BLOCKS.attention(model.blocks[0], tokens, None)
    torch.testing.assert_close(merge_keys(state, prefix).mean(1), before.mean(1)[:, prefix:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("name", MANY)
def test_attention_weighed_by_hand_equals_the_attention(name: str) -> None:
    model: Any = models.build(ARCHITECTURES[name])
    with torch.no_grad():
        tokens = prunefront.compress(model, models.config("tome", [], ARCHITECTURES[name]))._start(
            _images(ARCHITECTURES[name])
        )
        for now in (tokens, tokens.take(torch.tensor([[3, 1, 8], [30, 2, 0], [5, 4, 7]]))):
            expected, _ = EVA_BLOCKS.attention(model.blocks[0], now, None)
            weighed = EVA_BLOCKS.weighed_attention(
                model.blocks[0], now, lambda s: ((s.q * s.scale) @ s.k.transpose(-2, -1)).softmax(-1)
            )
            torch.testing.assert_close(weighed, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", SITES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_method_runs_and_no_image_depends_on_its_batch(name: str, method: str) -> None:
    spec = ARCHITECTURES[name]
    if method != "tome" and not geometry_of(models.build(spec)).has_class_token:
        with pytest.raises(ModelError, match="attention of the class token, but this model has none"):
            _compressed(name, method)
        return
    model, images = _compressed(name, method), _images(spec, batch=4)
    with torch.no_grad():
        whole, aux = model(images, return_aux=True)
        assert aux.tokens.shape[1] == prunefront.token_counts(model.prune_config).tokens_out[-1]
        torch.testing.assert_close(model(images.flip(0)).flip(0), whole, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.cat([model(image[None]) for image in images]), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("method", ["dynamicvit", "spvit"])
def test_learned_selection_trains_by_masking_and_removes_in_evaluation(name: str, method: str) -> None:
    spec = ARCHITECTURES[name]
    sites = [{"block": 1, "op": "select", "keep_ratio": 0.6}, {"block": 2, "op": "select", "keep_ratio": 0.5}]
    torch.manual_seed(0)
    model = prunefront.compress(models.build(spec), models.config(method, sites, spec))
    images = _images(spec, batch=4)
    with torch.no_grad():
        whole = model(images)
        assert whole.isfinite().all()
        torch.testing.assert_close(model(images.flip(0)).flip(0), whole, atol=1e-4, rtol=0)
    model.train()
    model(images).square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "blocks" in n or "rope" in n)


@pytest.mark.parametrize("name", MANY)
def test_trilevel_pruning_runs_on_rotary_models(name: str) -> None:
    spec = ARCHITECTURES[name]
    sites = [{"block": 0, "op": "prune", "tokens": 20}]
    model = prunefront.compress(models.build(spec), models.config("trilevel", sites, spec))
    with torch.no_grad():
        _, aux = model(_images(spec), return_aux=True)
    assert aux.tokens.shape[1] == prunefront.token_counts(model.prune_config).tokens_out[-1]


@pytest.mark.parametrize("name", ["eva02", "perception-encoder", "avgmax"])
def test_pooling_weights_merged_tokens_by_their_size(name: str) -> None:
    spec = ARCHITECTURES[name]
    model: Any = models.build(spec)
    merged = prunefront.compress(model, models.config("tome", [{"block": 3, "op": "merge", "remove": 12}], spec))
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        logits, aux = merged(_images(spec), return_aux=True)
        x, size = aux.tokens[:, prefix:], aux.size[:, prefix:]
        if name == "perception-encoder":
            # A token of size s pools like s equal tokens; every image has sizes of its own, so one by one.
            pooled = torch.cat(
                [
                    model.attn_pool(tokens.repeat_interleave(count.long(), dim=0)[None])
                    for tokens, count in zip(aux.tokens, aux.size, strict=True)
                ]
            )
        else:
            pooled = (x * size[..., None]).sum(1) / size.sum(1, keepdim=True)
        if name == "avgmax":
            pooled = 0.5 * (pooled + x.amax(dim=1))
        torch.testing.assert_close(model.head(model.fc_norm(pooled)), logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["dynamic-size", "dynamic-mixed"])
def test_images_of_other_sizes_run_where_the_size_is_dynamic(name: str) -> None:
    spec = ARCHITECTURES[name]
    model, images = models.build(spec), torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(3))
    sites = [{"block": 0, "op": "prune", "keep_ratio": 0.5}]
    with torch.no_grad():
        dense = prunefront.compress(model, models.config("evit", [], spec))
        torch.testing.assert_close(dense(images), model(images), atol=1e-5, rtol=1e-5)
        pruned = prunefront.compress(model, models.config("evit", sites, spec))
        torch.testing.assert_close(pruned(images), _masked_evit(model, images, {0: 16}), atol=1e-5, rtol=1e-5)


def test_images_of_other_sizes_are_refused_where_it_is_not() -> None:
    evit = _compressed("eva02", "evit")
    with pytest.raises(InputError, match="takes images of 48 x 48 px, but got 64 x 64"):
        evit(torch.randn(1, 3, 64, 64))
    with pytest.raises(InputError, match="Expected images of shape"):
        evit(torch.randn(3, 48, 48))


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("method", SITES)
def test_what_timm_offers_keeps_working(name: str, method: str) -> None:
    spec = ARCHITECTURES[name]
    model, images, compressed = models.build(spec), _images(spec), _compressed(name, method)
    logits = compressed(images)
    assert compressed.state_dict().keys() == model.state_dict().keys()
    assert isinstance(compressed, type(model))
    torch.testing.assert_close(copy.deepcopy(compressed)(images), logits)
    stream = io.BytesIO()
    torch.save(compressed, stream)
    stream.seek(0)
    torch.testing.assert_close(torch.load(stream, weights_only=False)(images), logits)

    compressed.train()
    torch.manual_seed(0)  # some of these models shift and scale their coordinates in training
    compressed(images).square().sum().backward()
    plain = {n: p.grad.clone() for n, p in compressed.named_parameters() if p.grad is not None}
    assert all(n in plain for n, _ in compressed.named_parameters() if "blocks" in n or "rope" in n)
    compressed.zero_grad()
    compressed.set_grad_checkpointing()
    torch.manual_seed(0)
    compressed(images).square().sum().backward()
    for parameter_name, parameter in compressed.named_parameters():
        if parameter_name in plain:
            torch.testing.assert_close(parameter.grad, plain[parameter_name], atol=1e-4, rtol=1e-4)
    compressed.reset_classifier(3)
    assert compressed(images).shape == (3, 3)
    assert type(prunefront.uncompress(compressed)) is type(model)


@pytest.mark.parametrize("name", ["eva02", "rope-mixed"])
def test_patch_dropout_in_training_keeps_positions_with_their_patches(name: str) -> None:
    base = ARCHITECTURES[name]
    spec = base.model_copy(update={"kwargs": {**base.kwargs, "patch_drop_rate": 0.5}})
    model, images = models.build(spec).train(), _images(spec)
    dense = prunefront.compress(model, models.config("diffrate", [], spec)).train()
    sorting = [{"block": 0, "op": "prune", "keep_ratio": 1.0}]
    sorted_ = prunefront.compress(model, models.config("diffrate", sorting, spec)).train()
    outputs = []
    for run in (model, dense, sorted_):
        torch.manual_seed(5)
        outputs.append(run(images))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[2], outputs[0], atol=1e-5, rtol=1e-5)


def test_two_threads_may_use_one_model() -> None:
    model, images = _compressed("rope-mixed", "tome"), _images(ARCHITECTURES["rope-mixed"])
    other = [{"block": 1, "op": "merge", "remove": 9}]
    with torch.no_grad():
        expected = {0: model(images), 1: model(images, schedule=other)}

    def run(index: int) -> bool:
        with torch.no_grad():
            result = model(images) if index % 2 == 0 else model(images, schedule=other)
        return torch.allclose(result, expected[index % 2], atol=1e-6)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, range(20)))


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # timm's RmsNorm
def test_half_precision_and_autocast_run(name: str, dtype: torch.dtype) -> None:
    images = _images(ARCHITECTURES[name])
    for method in ("evit", "tome", "hybrid"):
        model = _compressed(name, method)
        with torch.no_grad():
            with torch.autocast("cpu", dtype=dtype):
                logits = model(images)
            assert logits.dtype == dtype and logits.isfinite().all()
            half = model.to(dtype)(images.to(dtype))
        assert half.dtype == dtype and half.isfinite().all()


@pytest.mark.compile
@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("method", SITES)
def test_whole_graph_compilation_gives_the_same_logits(name: str, method: str) -> None:
    model, images = _compressed(name, method), _images(ARCHITECTURES[name])
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
        torch.testing.assert_close(compiled(images), model(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counters_on_the_built_model_equal_the_detail(name: str) -> None:
    model, spec = _compressed(name, "tome").requires_grad_(False), ARCHITECTURES[name]
    images = _images(spec, batch=1)
    expected = macs_detail(model.prune_config).total
    counted = ("linear", "addmm", "matmul", "bmm", "convolution", "scaled_dot_product_attention")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns about every size it freezes
        nodes = profile_macs(model, images, reduction=None)
    assert sum(count for node, count in nodes.items() if any(op in node.operator for op in counted)) == expected
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # it does not count the CPU's fused kernel
        model(images)
    assert counter.get_total_flops() == 2 * expected


def test_what_makes_blocks_cost_differently_is_in_their_key() -> None:
    keys = {name: geometry_of(models.build(spec)).block for name, spec in ARCHITECTURES.items()}
    distinct = ("eva02", "eva02-swiglu", "eva02-clip", "eva-no-rope", "dinov3", "rope", "rope-mixed", "sapiens2")
    assert len({keys[name] for name in (*distinct, "grouped-keys")}) == len(distinct) + 1
    assert keys["rope-mixed"] == keys["rope-mixed-ape"] == keys["dynamic-mixed"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"use_post_norm": True}, "EvaBlockPostNorm at block 0; post-norm blocks are not supported"),
        ({"attn_type": "rope", "qkv_fused": False, "num_kv_heads": (3, 1, 1, 3)}, "blocks of several kinds: block 1"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_by_name(kwargs: dict[str, Any], message: str) -> None:
    model = models.build(models.small_spec("eva02_tiny_patch14_224", **kwargs))
    with pytest.raises(ModelError, match=message):
        prunefront.compress(model, models.config("tome", []))
