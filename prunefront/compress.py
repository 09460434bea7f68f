"""Put a token-reduction method into a timm model, and take it out again.

The compressed model is a new module that shares the parameters of the original. Its class derives from the original's,
so state-dict keys, heads, gradient checkpointing and everything else of timm's stay as they are; only the walk through
the blocks is ours.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, overload

import safetensors
import timm
import torch
from safetensors.torch import load_file, save
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from prunefront.config import ConfigSource, ModelSpec, PruneConfig, Site, load_config
from prunefront.errors import CheckpointError, ConfigError, InputError, ModelError
from prunefront.files import write_atomic
from prunefront.geometry import ModelGeometry, build_timm_model, geometry_for, geometry_of, require_supported
from prunefront.methods.base import Aux, Method, Recorder
from prunefront.ops.attention import attend, log_size_bias
from prunefront.registry import get_method
from prunefront.schedule import BlockSchedule, Step, plan_blocks

_METADATA_KEY = "prunefront_config"

ScheduleLike = Sequence[Site | Mapping[str, Any]]


def block_forward(
    block: Block,
    x: Tensor,
    size: Tensor | None,
    steps: Sequence[Step],
    method: Method,
    options: Mapping[str, Any],
    *,
    num_prefix_tokens: int,
    recorder: Recorder | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One transformer block with its reductions between attention and MLP.

    Args:
        block: A plain timm block.
        x: Tokens entering it, (B, N, C).
        size: Their sizes, (B, N), or None.
        steps: Reductions of this block; without any the block is timm's own.
        method: Carries them out.
        options: Complete options of the method.
        num_prefix_tokens: Leading tokens that are never removed.
        recorder: Takes the decisions when wanted.
    """
    bias = log_size_bias(size, x.dtype) if method.uses_size_bias(options) else None
    if not steps:
        return (block(x) if bias is None else block(x, attn_mask=bias)), size
    attended, state = attend(block.attn, block.norm1(x), bias)
    x = x + block.drop_path1(block.ls1(attended))
    x, size = method.reduce(
        x, size, state, steps, num_prefix_tokens=num_prefix_tokens, options=options, recorder=recorder
    )
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), size


class CompressedVisionTransformer:
    """Mixin in front of a timm ViT class: reduces tokens while walking the blocks. Made by `compress`."""

    prune_config: PruneConfig
    _blocks_plan: tuple[BlockSchedule, ...]
    _method: Method

    def _plan(self, num_patch_tokens: int, schedule: ScheduleLike | None) -> tuple[BlockSchedule, ...]:
        vit = cast(VisionTransformer, self)
        native = self._blocks_plan[0].tokens_in - vit.num_prefix_tokens
        if schedule is None and num_patch_tokens == native:
            return self._blocks_plan
        method = self._method
        sites: Sequence[Site] = self.prune_config.sites
        if schedule is not None:
            parsed = [site if isinstance(site, Site) else Site.model_validate(site) for site in schedule]
            sites = sorted(parsed, key=lambda site: site.block)
            method.check_sites(sites)
        return plan_blocks(
            method,
            self.prune_config.options,
            sites,
            depth=len(vit.blocks),
            num_patch_tokens=num_patch_tokens,
            num_prefix_tokens=vit.num_prefix_tokens,
        )

    def _embed(self, images: Tensor) -> Tensor:
        """Patches, prefix tokens and positions, as timm does it; input checked first."""
        vit = cast(VisionTransformer, self)
        size = tuple(vit.patch_embed.img_size)
        conv = getattr(vit.patch_embed, "proj", None)
        if images.ndim != 4 or (isinstance(conv, nn.Conv2d) and images.shape[1] != conv.in_channels):
            channels = conv.in_channels if isinstance(conv, nn.Conv2d) else "its"
            raise InputError(
                f"Expected images of shape (batch, {channels} channels, height, width), but got {tuple(images.shape)}. "
                "Add the batch dimension or convert the channels."
            )
        if tuple(images.shape[-2:]) == size or vit.dynamic_img_size:
            x = vit.patch_embed(images)
            x = vit._pos_embed(x)
        elif self._method.resizes_position_embedding:
            x = self._embed_resized(images)
        else:
            raise InputError(
                f"This model takes images of {size[0]} x {size[1]} px, but got {images.shape[-2]} x "
                f"{images.shape[-1]}. "
                "Resize the images, or set model.img_size (or dynamic_img_size in model.kwargs) in the config."
            )
        return cast(Tensor, vit.norm_pre(vit.patch_drop(x)))

    def _embed_resized(self, images: Tensor) -> Tensor:
        """Embed images of another size, positions resized inside forward as EViT's official code does.

        Bicubic, corners not aligned, no antialiasing; the prefix positions stay.
        """
        vit = cast(VisionTransformer, self)
        patch = vit.patch_embed.patch_size
        if images.shape[-2] % patch[0] or images.shape[-1] % patch[1]:
            raise InputError(
                f"Image sides must be multiples of the patch size {patch[0]} x {patch[1]}, "
                f"but got {images.shape[-2]} x {images.shape[-1]}. Resize or pad the images."
            )
        features = vit.patch_embed.proj(images)
        grid = features.shape[-2:]
        x = vit.patch_embed.norm(features.flatten(2).transpose(1, 2))
        prefix = [
            token for token in (vit.cls_token, getattr(vit, "dist_token", None), vit.reg_token) if token is not None
        ]
        num_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        if vit.pos_embed is None:
            positions = None
        else:
            old = vit.patch_embed.grid_size
            table = vit.pos_embed[:, num_prefix:].reshape(1, old[0], old[1], -1).permute(0, 3, 1, 2)
            table = F.interpolate(table, size=tuple(grid), mode="bicubic", align_corners=False)
            positions = torch.cat((vit.pos_embed[:, :num_prefix], table.flatten(2).transpose(1, 2)), dim=1)
        tokens = [token.expand(x.shape[0], -1, -1) for token in prefix]
        if positions is None:
            x = torch.cat((*tokens, x), dim=1)
        elif vit.no_embed_class:
            x = torch.cat((*tokens, x + positions), dim=1)
        else:
            x = torch.cat((*tokens, x), dim=1) + positions
        return cast(Tensor, vit.pos_drop(x))

    def _walk(
        self, images: Tensor, schedule: ScheduleLike | None, recording: bool
    ) -> tuple[Tensor, Tensor | None, Recorder | None]:
        vit = cast(VisionTransformer, self)
        method, options = self._method, self.prune_config.options
        x = self._embed(images)
        plan = self._plan(x.shape[1] - vit.num_prefix_tokens, schedule)
        recorder = Recorder(x.shape[0], x.shape[1], x.device) if recording else None
        size: Tensor | None = None
        for block, block_plan in zip(vit.blocks, plan, strict=True):
            if recorder is not None:
                recorder.block = block_plan.index
            if vit.grad_checkpointing:
                x, size = checkpoint(
                    block_forward,
                    block,
                    x,
                    size,
                    block_plan.steps,
                    method,
                    options,
                    num_prefix_tokens=vit.num_prefix_tokens,
                    recorder=recorder,
                )
            else:
                x, size = block_forward(
                    block,
                    x,
                    size,
                    block_plan.steps,
                    method,
                    options,
                    num_prefix_tokens=vit.num_prefix_tokens,
                    recorder=recorder,
                )
            if recorder is not None and size is not None:
                recorder.sizes[block_plan.index] = size
        return vit.norm(x), size, recorder

    def forward_features(self, x: Tensor, *, schedule: ScheduleLike | None = None) -> Tensor:
        """Remaining tokens after the final norm, (B, N, C)."""
        return self._walk(x, schedule, recording=False)[0]

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: feature maps of the whole grid do not exist once tokens are gone."""
        raise ModelError(
            "A compressed model has no feature maps per block, since tokens leave on the way. "
            "Use return_aux=True, or prunefront.uncompress(model) for the dense model."
        )

    def pool_tokens(self, x: Tensor, size: Tensor | None) -> Tensor:
        """timm's pooling, with tokens weighted by how many patches they stand for where tokens are averaged."""
        vit = cast(VisionTransformer, self)
        if size is None or (vit.attn_pool is None and vit.global_pool not in ("avg", "avgmax")):
            return cast(Tensor, vit.pool(x))
        if not vit.pool_include_prefix:
            x, size = x[:, vit.num_prefix_tokens :], size[:, vit.num_prefix_tokens :]
        if vit.attn_pool is not None:
            if vit.global_pool == "prr":
                raise ModelError(
                    "Pooling 'prr' cannot weight merged tokens by their size. Use a method that only prunes, "
                    "or another global_pool."
                )
            return cast(Tensor, vit.attn_pool(x, attn_mask=log_size_bias(size, x.dtype)))
        weight = (size / size.sum(dim=1, keepdim=True)).to(x.dtype)
        mean = (weight.unsqueeze(1) @ x).squeeze(1)
        return mean if vit.global_pool == "avg" else 0.5 * (x.amax(dim=1) + mean)

    @overload
    def forward(
        self, x: Tensor, *, schedule: ScheduleLike | None = ..., return_aux: Literal[False] = ...
    ) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, *, schedule: ScheduleLike | None = ..., return_aux: Literal[True]
    ) -> tuple[Tensor, Aux]: ...

    def forward(
        self, x: Tensor, *, schedule: ScheduleLike | None = None, return_aux: bool = False
    ) -> Tensor | tuple[Tensor, Aux]:
        """Logits (B, classes).

        Args:
            x: Images, (B, channels, height, width).
            schedule: Other sites of the same method for this call (keep-rate warm-up, elastic training).
            return_aux: Also return what happened to the tokens.
        """
        vit = cast(VisionTransformer, self)
        tokens, size, recorder = self._walk(x, schedule, recording=return_aux)
        if size is None or hasattr(vit, "head_dist"):
            logits = vit.forward_head(tokens)
        else:
            logits = vit.head(vit.head_drop(vit.fc_norm(self.pool_tokens(tokens, size))))
        if recorder is None:
            return cast(Tensor, logits)
        aux = Aux(tokens=tokens, size=size, origin=recorder.origin, sites=recorder.sites, sizes=recorder.sizes)
        return cast(Tensor, logits), aux

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time; pickles name the class it derives from instead.
        return _new_compressed, (_base_class(type(self)),), cast(nn.Module, self).__dict__


@cache
def _compressed_class(base: type) -> type:
    return type(f"Compressed{base.__name__}", (CompressedVisionTransformer, base), {"__module__": __name__})


def _base_class(compressed: type) -> type[VisionTransformer]:
    return cast(type[VisionTransformer], compressed.__mro__[2])


def _new_compressed(base: type[VisionTransformer]) -> VisionTransformer:
    return cast(VisionTransformer, object.__new__(_compressed_class(cast(Hashable, base))))


def is_compressed(model: nn.Module) -> bool:
    return isinstance(model, CompressedVisionTransformer)


def compress(model: nn.Module, config: ConfigSource) -> nn.Module:
    """A new model that runs ``model``'s weights under a token schedule; ``model`` stays as it was.

    Parameters and buffers are shared, so training one trains the other.

    Args:
        model: A timm VisionTransformer, compressed or not.
        config: Config, dict, path or open file. Its model must have the token counts of ``model``.

    Raises:
        ModelError: If prunefront or the method does not support the model, or the config is for another model.
        ConfigError: If the config cannot be right for this model.
    """
    config = load_config(config)
    base = uncompress(model) if is_compressed(model) else _share(model)
    geometry = geometry_of(base)
    _check_fits(config, geometry)
    method = get_method(config.method)
    method.check_geometry(geometry, config.sites)
    vit = cast(Any, base)
    vit.__class__ = _compressed_class(cast(Hashable, type(base)))
    vit.prune_config = config
    vit._method = method
    vit._blocks_plan = plan_blocks(
        method,
        config.options,
        config.sites,
        depth=geometry.depth,
        num_patch_tokens=geometry.num_patch_tokens,
        num_prefix_tokens=geometry.num_prefix_tokens,
    )
    return cast(nn.Module, vit)


def uncompress(model: nn.Module) -> nn.Module:
    """The dense timm model inside a compressed one, sharing its parameters."""
    if not is_compressed(model):
        raise ModelError(f"{type(model).__name__} is not compressed, so there is nothing to undo.")
    dense = cast(Any, _share(model))
    del dense.prune_config, dense._blocks_plan, dense._method
    dense.__class__ = _base_class(type(model))
    return cast(nn.Module, dense)


def _share(model: nn.Module) -> nn.Module:
    """Copy of the module tree whose parameters and buffers are the original's own objects."""
    require_supported(model)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _check_fits(config: PruneConfig, geometry: ModelGeometry) -> None:
    """A config made for another resolution or depth would silently mean something else here."""
    if timm.is_model(config.model.name):
        depth = geometry_for(config.model).depth
        if depth != geometry.depth:
            raise ModelError(
                f"The config is for {config.model.name} with {depth} blocks, but this model has {geometry.depth}. "
                "Use prunefront.create_model(config), or a config made for this model."
            )
    if config.model.img_size is not None:
        wanted = config.model.img_size if isinstance(config.model.img_size, tuple) else (config.model.img_size,) * 2
        if wanted != geometry.img_size:
            raise ModelError(
                f"The config is for images of {wanted[0]} x {wanted[1]} px, but this model takes "
                f"{geometry.img_size[0]} x {geometry.img_size[1]}. Use prunefront.create_model(config) "
                "or change model.img_size in the config."
            )


def create_dense(
    spec: ModelSpec, *, pretrained: bool = False, checkpoint: str | os.PathLike[str] | None = None
) -> nn.Module:
    """The dense model of a spec, with timm's weights, a checkpoint file's, or freshly initialised.

    Raises:
        UnknownNameError, ModelError: If timm cannot build it, or it is not supported.
        CheckpointError: If the checkpoint is missing or does not fit.
    """
    if pretrained and checkpoint is None:
        try:
            model = build_timm_model(spec, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"Could not load timm's pretrained weights of {spec.name!r}: {' '.join(str(error).split())[:300]}. "
                "Check the network, or name a local checkpoint."
            ) from error
    else:
        model = build_timm_model(spec)
    require_supported(model)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model


def create_model(
    config: ConfigSource,
    pretrained: bool = False,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Build the config's timm model and compress it.

    Args:
        config: Config, dict, path or open file.
        pretrained: Load timm's pretrained weights.
        checkpoint: Weights to load instead: a safetensors or PyTorch file.
    """
    config = load_config(config)
    return compress(create_dense(config.model, pretrained=pretrained, checkpoint=checkpoint), config)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a state dict (safetensors, or a PyTorch file read weights-only) strictly into ``model``.

    Raises:
        CheckpointError: If the file is missing, damaged, or names and shapes do not fit; the text says which.
    """
    state = read_state_dict(path)
    own = model.state_dict()
    missing = sorted(set(own) - set(state))
    surplus = sorted(set(state) - set(own))
    reshaped = [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = []
    if missing:
        problems.append(f"lacks {_some(missing)}")
    if surplus:
        problems.append(f"has {_some(surplus)} that the model does not")
    if reshaped:
        problems.append(_some(reshaped))
    if problems:
        raise CheckpointError(
            f"Checkpoint {os.fspath(path)} does not fit {type(model).__name__}: {'; '.join(problems)}. "
            "Check model name, image size and number of classes."
        )
    model.load_state_dict(state)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint file; of a training checkpoint, those under ``model``, then ``model_ema``.

    Raises:
        CheckpointError: If the file is missing or is not a checkpoint.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise CheckpointError(f"Checkpoint {name} does not exist. Check the path.")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(name)
        loaded = torch.load(name, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{name} is not a readable checkpoint: {_first_line(error)}") from error
    except Exception as error:  # pickle.UnpicklingError and whatever a damaged archive raises
        raise CheckpointError(
            f"{name} could not be read as weights only: {_first_line(error)} "
            "Save the state dict alone, best as safetensors."
        ) from error
    for key in ("model", "model_ema", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{name} holds no state dict. Save model.state_dict(), best as safetensors.")
    return cast(dict[str, Tensor], loaded)


def save_model(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write weights as safetensors with the config inside, so that `load_model` needs nothing else. All or nothing.

    Raises:
        ConfigError: If the model was not compressed.
        FileWriteError: If the file cannot be written.
    """
    if not isinstance(model, CompressedVisionTransformer):
        raise ConfigError("save_model needs a compressed model; save a dense one with safetensors or torch.save.")
    # One key: safetensors writes several in no fixed order, and equal weights should be equal files.
    metadata = {_METADATA_KEY: json.dumps(model.prune_config.to_dict())}
    module = cast(nn.Module, model)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    return write_atomic(path, save(state, metadata=metadata))


def load_model(path: str | os.PathLike[str]) -> nn.Module:
    """A compressed model from a file of `save_model`: config and weights.

    Raises:
        CheckpointError: If the file is missing, damaged or carries no config.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise CheckpointError(f"Checkpoint {name} does not exist. Check the path.")
    try:
        with safetensors.safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{name} is not a readable safetensors file: {error}.") from error
    if _METADATA_KEY not in metadata:
        raise CheckpointError(
            f"{name} carries no prunefront config. Use create_model(config, checkpoint=...) for plain weights."
        )
    return create_model(json.loads(metadata[_METADATA_KEY]), checkpoint=path)


def _some(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
