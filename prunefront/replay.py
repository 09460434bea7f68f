"""Recorded cases of the papers' own repositories, recomputed under the names they were recorded with.

Reached as `prunefront.official.replay`; one function per kind of case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from prunefront.backbones.compressed import TRAINING_EPS, Compressed, aux_of
from prunefront.backbones.lvvit import AUX_WEIGHT, LVViT
from prunefront.errors import ConfigError
from prunefront.methods.base import Aux, Masking, SiteRecord
from prunefront.methods.dynamicvit import TokenPredictor
from prunefront.methods.spvit import TokenSelector, shared_heads
from prunefront.official_swin import replay_swin
from prunefront.ops.attention import attention_logits, masked_softmax
from prunefront.ops.tokens import Tokens, with_prefix


def replay(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our results for a recorded case, under the case's own tensor names.

    Args:
        case: The case's JSON.
        tensors: Its tensors; inputs are read (``weights/*``, ``input``, given noise, targets and the like), recorded
            results are not.

    Returns:
        Every quantity that cases of this kind record: tensors, or JSON values for kinds "loss", "token_label_loss"
        (``values`` per variant) and "example_level".

    Raises:
        ConfigError: If nobody knows the kind.
    """
    kind = str(case.get("kind", "eval_forward"))
    if kind not in _KINDS:
        raise ConfigError(f"Expected a case of kind {', '.join(_KINDS)}, but got {kind!r}. Pass its case.json.")
    return _KINDS[kind](case, tensors)


def recorded_input(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """The images of a case: stored small, every pixel repeated ``input.upsample`` times each way."""
    images = tensors["input"].float()
    description = case.get("input")
    factor = int(description.get("upsample", 1)) if isinstance(description, Mapping) else 1
    return images.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1) if factor > 1 else images


def _weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("weights/"): value for name, value in tensors.items() if name.startswith("weights/")}


def _built(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    from prunefront.official import from_official

    return from_official(str(case["method"]), case["model"], case.get("hparams") or {}, _weights(tensors))


# eval_forward --------------------------------------------------------------------------------------------------------


def _eval_forward(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if "depths" in case["model"]:
        return replay_swin(case, tensors)
    method = str(case["method"])
    model = _built(case, tensors)
    images = recorded_input(case, tensors)
    assert isinstance(model, Compressed)
    with torch.no_grad():
        return _EVALUATED.get(method, _evaluated)(model, images, method)


def _evaluated(model: Compressed, images: Tensor, method: str) -> dict[str, Tensor]:
    """Methods that act between attention and MLP: one record per site, sizes, groups."""
    logits, aux = model.forward(images, return_aux=True)
    results: dict[str, Tensor] = {"logits": logits, "logits_no_reduction": model.forward(images, schedule=[])}
    prefix = model._blocks_plan[0].tokens_in - _initial_patches(model)
    for record in aux.sites:
        results |= _RECORDED[method](record, prefix)
    if method != "evit":
        first = 0 if method == "diffrate" else min((r.block for r in aux.sites), default=0)
        for plan in model._blocks_plan[first:]:
            size = aux.sizes.get(plan.index)
            results[f"size/{plan.index}"] = size if size is not None else torch.ones(len(logits), plan.tokens_out)
    if method in ("tome", "diffrate"):
        results["group"] = aux.origin
    # These repositories' cases have 32-bit integers.
    return {name: value if value.is_floating_point() else value.to(torch.int32) for name, value in results.items()}


def _initial_patches(model: Compressed) -> int:
    return int(model._blocks_plan[0].tokens_entering - model.num_prefix_tokens)  # type: ignore[attr-defined]


def _dynamicvit_evaluated(model: Compressed, images: Tensor, method: str) -> dict[str, Tensor]:
    logits, aux = model.forward(images, return_aux=True)
    assert aux.class_tokens is not None
    results = {"logits": logits, "cls_after_block": aux.class_tokens}
    original: Tensor | None = None
    for stage, record in enumerate(aux.sites):
        index = record.values["kept_idx"]
        original = index if original is None else original.gather(1, index)
        results[f"pred_score/{stage}"] = record.values["pred_score"]
        results[f"kept_idx/{stage}"] = index.long()
        results[f"kept_orig_idx/{stage}"] = original
    return results


def _spvit_evaluated(model: Compressed, images: Tensor, method: str) -> dict[str, Tensor]:
    """Recorded with all tokens in place and dropped ones masked, so that is what is compared; and our own way."""
    tokens, recorder = model._walk(images, recording=True, masking=Masking(eps=0.0, noise=None))
    assert recorder is not None
    aux = aux_of(tokens, model._heads(tokens), recorder)
    assert aux.class_tokens is not None and aux.class_logits is not None
    removed = model.forward(images)
    results = {"logits": removed, "cls_after_block": aux.class_tokens} | _spvit_stages(aux)
    if aux.token_logits is not None:
        # The official code lets dropped patches vote.
        results["logits"] = aux.class_logits + AUX_WEIGHT * aux.token_logits.amax(dim=1)
        results |= {"logits_cls": aux.class_logits, "aux_logits": aux.token_logits, "logits_kept_aux": removed}
    return results


def _spvit_stages(aux: Aux) -> dict[str, Tensor]:
    results = {}
    for stage, (record, decision) in enumerate(zip(aux.sites, aux.decisions, strict=True)):
        results[f"keep_decision/{stage}"] = decision
        for name in ("pred_score", "softmax_score", "package_token", "drop_decision"):
            if name in record.values:
                results[f"{name}/{stage}"] = record.values[name]
    return results


def _trilevel_evaluated(model: Compressed, images: Tensor, method: str) -> dict[str, Tensor]:
    features: list[Tensor] = []
    hooks = [
        block.norm1.register_forward_pre_hook(lambda _, args: features.append(args[0]))
        for block in model.blocks[1:]  # type: ignore[attr-defined]
    ]
    hooks.append(model.norm.register_forward_pre_hook(lambda _, args: features.append(args[0])))  # type: ignore[attr-defined]
    logits, aux = model.forward(images, return_aux=True)
    for hook in hooks:
        hook.remove()
    assert aux.class_attention is not None
    results = {
        "logits": logits,
        "cls_attn_last": aux.class_attention,
        "cls_attn_var": aux.class_attention.var(dim=1, unbiased=True),
    }
    original: Tensor | None = None
    for record in aux.sites:
        index = record.values["kept_idx"]
        original = index if original is None else original.gather(1, index)
        results[f"kept_idx/{record.block}"] = index.long()
        results[f"kept_idx_abs/{record.block}"] = original
        left = index.shape[1] + 1
        mask = record.values.get("attn_mask", torch.ones(len(index), left, left))
        results[f"attn_mask/{record.block}"] = mask.to(torch.uint8)
    # The norm before a block's attention sees what left the block before it; the last one feeds the final norm.
    return results | {f"features/{block}": feature for block, feature in enumerate(features)}


def _evit_recorded(record: SiteRecord, prefix: int) -> dict[str, Tensor]:
    b = record.block
    return {f"kept_idx/{b}": record.values["kept_idx"], f"scores/{b}": record.values["scores"]}


def _tome_recorded(record: SiteRecord, prefix: int) -> dict[str, Tensor]:
    b = record.block
    return {
        f"merge_src/{b}": record.values["merge_src"] + prefix,
        f"merge_dst/{b}": record.values["merge_dst"] + prefix,
        f"scores/{b}": _with_protected(record.values["similarity"], prefix),
    }


def _ppt_recorded(record: SiteRecord, prefix: int) -> dict[str, Tensor]:
    b, values = record.block, record.values
    pooled = values["policy"]
    protected = torch.full_like(values["scores"][:, :1], 2.0).expand(-1, prefix)
    results = {
        f"scores/{b}": torch.cat((protected, values["scores"]), dim=1),
        f"var/{b}": values["var"],
        f"policy/{b}": pooled,
    }
    if not pooled.all():
        kept = with_prefix(values["kept_idx"], prefix)
        results[f"kept_idx/{b}"] = kept.masked_fill(pooled[:, None], -1)
    if pooled.any():
        pruned = ~pooled[:, None]
        results[f"merge_src/{b}"] = (values["merge_src"] + prefix).masked_fill(pruned, -1)
        results[f"merge_dst/{b}"] = (values["merge_dst"] + prefix).masked_fill(pruned, -1)
        results[f"merge_score/{b}"] = _with_protected(values["similarity"], prefix).masked_fill(pruned, -2.0)
    return results


def _diffrate_recorded(record: SiteRecord, prefix: int) -> dict[str, Tensor]:
    b, values = record.block, record.values
    if record.op == "prune":
        return {f"scores/{b}": values["scores"], f"order/{b}": with_prefix(values["order"], prefix)}
    return {f"merge_dst/{b}": values["merge_dst"] + prefix, f"merge_sim/{b}": values["merge_sim"]}


_RECORDED = {"evit": _evit_recorded, "tome": _tome_recorded, "ppt": _ppt_recorded, "diffrate": _diffrate_recorded}

_EVALUATED: dict[str, Callable[[Compressed, Tensor, str], dict[str, Tensor]]] = {
    "dynamicvit": _dynamicvit_evaluated,
    "spvit": _spvit_evaluated,
    "trilevel": _trilevel_evaluated,
}


def _with_protected(similarity: Tensor, prefix: int) -> Tensor:
    """Official lists hold protected tokens of the even positions too, as -inf."""
    return torch.cat((similarity.new_full((len(similarity), -(-prefix // 2)), -torch.inf), similarity), dim=1)


# Other kinds ---------------------------------------------------------------------------------------------------------


def _dense_eval(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    model = _built(case, tensors)
    assert isinstance(model, LVViT)
    class_tokens: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: class_tokens.append(out[:, 0])) for block in model.blocks]
    images = recorded_input(case, tensors)
    with torch.no_grad():
        heads = model.classify(model.forward_features(images))
        stem = model.patch_embed.convolve(images)
    for hook in hooks:
        hook.remove()
    assert heads.class_logits is not None and heads.token_logits is not None
    return {
        "logits": heads.logits,
        "logits_cls": heads.class_logits,
        "aux_logits": heads.token_logits,
        "cls_after_block": torch.stack(class_tokens),
        "stem_output": stem,
    }


def _train_forward(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    model = _built(case, tensors).train()
    assert isinstance(model, Compressed)

    def given(stage: int, scores: Tensor) -> Tensor:
        return tensors[f"gumbel_noise/{stage}"]

    tokens, recorder = model._walk(
        recorded_input(case, tensors), recording=True, masking=Masking(eps=TRAINING_EPS, noise=given)
    )
    assert recorder is not None
    aux = aux_of(tokens, model._heads(tokens), recorder)
    assert aux.class_logits is not None and aux.class_tokens is not None
    features = aux.token_logits
    if features is None:
        features = aux.tokens[:, tokens.num_prefix : aux.tokens.shape[1] - aux.num_packages]
    description = case["loss"]
    parts = _selection_parts(
        str(case["method"]), description["kwargs"], description["keep_ratio"], logits=aux.class_logits,
        tokens=features, targets=tensors["targets"], decisions=aux.decisions,
        teacher_logits=tensors["teacher_logits"], teacher_tokens=tensors["teacher_tokens"],
    )  # fmt: skip
    parts.total.backward()
    results: dict[str, Any] = {
        "logits": aux.class_logits,
        "features": features,
        "final_decision": aux.decisions[-1].unsqueeze(-1),
        "cls_after_block": aux.class_tokens,
        "loss": {"values": _loss_values(parts)},
        **_spvit_stages(aux),
    }
    named: Iterator[tuple[str, nn.Parameter]] = model.named_parameters()
    results |= {f"grad/{name}": parameter.grad for name, parameter in named if parameter.grad is not None}
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in results.items()}


def _selection_parts(
    method: str,
    kwargs: Mapping[str, Any],
    keep_ratios: Sequence[float],
    *,
    label_smoothing: float = 0.0,
    kept: Tensor | None = None,
    **given: Any,
) -> Any:
    from prunefront.training.losses import selection_loss

    return selection_loss(
        keep_ratios=keep_ratios,
        classification_weight=kwargs.get("clf_weight", 1.0),
        ratio_weight=kwargs.get("ratio_weight", 2.0),
        distillation_weight=kwargs.get("distill_weight", 0.5),
        token_loss="mse" if kwargs.get("mse_token", False) else "kl",
        ratio_over="batch" if kwargs.get("dynamic", method == "spvit") else "image",
        label_smoothing=label_smoothing,
        kept=kept,
        **given,
    )


def _loss_values(parts: Any) -> dict[str, float]:
    return {
        "total": float(parts.total.detach()),
        "cls": float(parts.classification.detach()),
        "ratio_sum_over_stages_unweighted": float(parts.ratio.detach()),
        "cls_kl": float(parts.class_distillation.detach()),
        "token": float(parts.token_distillation.detach()),
    }


def _loss(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    stages = sorted(int(name.partition("/")[2]) for name in tensors if name.startswith("keep_decision/"))
    results = []
    for variant in case["variants"]:
        criterion = variant.get("base_criterion", "SoftTargetCrossEntropy")
        is_hard = "LabelSmoothing" in criterion or criterion.startswith("CrossEntropy")
        smoothing = float(criterion.partition("(")[2].rstrip(")") or 0.1) if "LabelSmoothing" in criterion else 0.0
        mask = tensors["mask"].flatten(1)
        parts = _selection_parts(
            str(case["method"]),
            variant["kwargs"],
            case["keep_ratio"],
            label_smoothing=smoothing,
            kept=torch.zeros_like(mask) if variant.get("mask") == "zeros" else mask,
            logits=tensors["pred"],
            tokens=tensors["token_pred"],
            targets=tensors["hard_targets" if is_hard else "soft_targets"],
            decisions=[tensors[f"keep_decision/{stage}"] for stage in stages],
            teacher_logits=tensors["teacher_logits"],
            teacher_tokens=tensors["teacher_tokens"],
        )
        results.append({"name": variant["name"], "values": _loss_values(parts)})
    return {"variants": results}


def _token_label_loss(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    from prunefront.training.losses import token_label_loss

    results = []
    for variant in case["variants"]:
        value = token_label_loss(
            tensors["output"],
            tensors["aux_output"],
            tensors[variant["target"]],
            mixed_box=tuple(variant["bbox"]),
            class_weight=variant["cls_weight"],
            token_weight=variant["dense_weight"],
            uses_ground_truth=variant["ground_truth"],
        )
        results.append({"name": variant["name"], "value": float(value.total)})
    return {"variants": results}


def _masked_block(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    from prunefront.backbones.lvvit import BranchScale
    from prunefront.backbones.vit import VIT_BLOCKS

    shape = case["block"]
    eps = float(shape.get("layernorm_eps", 1e-6))
    block = Block(
        shape["dim"], shape["num_heads"], mlp_ratio=shape["mlp_ratio"], qkv_bias=shape["qkv_bias"],
        norm_layer=lambda dim, **place: nn.LayerNorm(dim, eps=eps, **place),
    )  # fmt: skip
    block.load_state_dict({name: value.float() for name, value in _weights(tensors).items()})
    if shape.get("skip_lam"):
        block.ls1, block.ls2 = BranchScale(shape["skip_lam"]), BranchScale(shape["skip_lam"])
    x = tensors["x"].clone().requires_grad_()
    policy = tensors["policy"].clone().requires_grad_()
    maps: dict[str, Tensor] = {}

    def run(stream: Tensor, weights_of: Tensor) -> Tensor:
        tokens = Tokens(x=stream, num_prefix=1)

        def weigh(state: Any) -> Tensor:
            maps["attn_logits"] = attention_logits(state)
            maps["attn"] = masked_softmax(maps["attn_logits"], weights_of.squeeze(-1), float(case["attention_eps"]))
            return maps["attn"]

        stream = stream + VIT_BLOCKS.weighed_attention(block, tokens, weigh)
        return stream + VIT_BLOCKS.mlp(block, stream)

    with torch.no_grad():
        all_ones = run(x, torch.ones_like(policy))
        plain = block(x)
    out = run(x, policy)
    out.backward(tensors["upstream_grad"])  # type: ignore[no-untyped-call]
    assert x.grad is not None and policy.grad is not None
    return {
        "attn_logits": maps["attn_logits"].detach(),
        "attn": maps["attn"].detach(),
        "out": out.detach(),
        "out_policy_all_ones": all_ones,
        "out_policy_none": plain,
        "grad/x": x.grad,
        "grad/policy": policy.grad,
    }


def _predictor(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    x, policy = tensors["x"], tensors["policy"].squeeze(-1)
    state = {name: value.float() for name, value in _weights(tensors).items()}
    module: TokenSelector | TokenPredictor
    if case["method"] == "spvit":
        module = TokenSelector(x.shape[-1], int(case["num_heads"]))
        state = shared_heads(state, [module])
    else:
        module = TokenPredictor(x.shape[-1])
    module.load_state_dict(state)
    results: dict[str, Any] = {}
    with torch.no_grad():
        for suffix, weight in (("", policy), ("_policy_ones", None)):
            scores = module(x, weight)
            if isinstance(scores, tuple):
                results[f"pred_score{suffix}"], results[f"softmax_score{suffix}"] = scores
            else:
                results[f"pred_score{suffix}"] = scores
    return results


def _example_level(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    from prunefront.training.examples import replay_example_level

    return replay_example_level(case)


_KINDS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], dict[str, Any]]] = {
    "eval_forward": _eval_forward,
    "dense_eval": _dense_eval,
    "train_forward": _train_forward,
    "masked_block": _masked_block,
    "predictor": _predictor,
    "loss": _loss,
    "token_label_loss": _token_label_loss,
    "example_level": _example_level,
}
