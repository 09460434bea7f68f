"""timm's Swin under the token level of Tri-Level E-ViT: tokens are masked within a stage, and the next has all again.

Kong et al., "Peeling the Onion", AAAI 2023 (arXiv:2211.10801), token level on Swin. A site stands behind a block: it
ranks the alive tokens by the attention they received in that block, and those that leave sit out the rest of the
stage with their last value. Two forms:

- ``tie="strict"`` (default): exactly the planned count stays in every image. Norms, projections and MLPs run on alive
  tokens only, and they alone are keys.
- ``tie="official"``: what the official code computes. Everything is computed and masked; the comparison is strict, so
  one token fewer stays, and a token that was gone returns when it scores above the threshold.

Shapes: B images, L tokens of a stage (H x W, row by row), n of them alive, C channels, W windows of A slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.models._manipulate import checkpoint
from timm.models.swin_transformer import SwinTransformer, window_partition
from torch import Tensor
from torch.nn import functional as F

from prunefront.backbones.compressed import Compressed, ScheduleLike, parse_sites
from prunefront.backbones.heads import Heads
from prunefront.errors import ConfigError, InputError
from prunefront.methods.base import Masking, Recorder, SiteRecord
from prunefront.ops.attention import masked_softmax
from prunefront.ops.select import take_tokens, take_values, top_tokens
from prunefront.ops.tokens import Tokens
from prunefront.schedule import BlockSchedule
from prunefront.swin_geometry import stage_grids
from prunefront.swin_schedule import plan_stages

OFFICIAL_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class BlockTrace:
    """One block in official form: ``mask`` (B, L), 1 for tokens alive entering it, and its ``scores`` (B, L)."""

    mask: Tensor
    scores: Tensor


@dataclass(frozen=True, kw_only=True)
class WindowLayout:
    """Which token of the grid sits where once a block has shifted, padded and cut it.

    Attributes:
        slots: Token in each slot, (W * A,); L where the slot is padding.
        places: Slot of each token, (L,).
        windows: W.
        area: A.
        smallest: Fewest tokens in any window, padding not counted.
        shift_mask: What a shifted block adds to its logits, (W, A, A), or None.
    """

    slots: Tensor
    places: Tensor
    windows: int
    area: int
    smallest: int
    shift_mask: Tensor | None


class CompressedSwinTransformer(Compressed):
    """Mixin in front of timm's ``SwinTransformer``. Made by `prunefront.compress`."""

    def _heads(self, tokens: Tokens) -> Heads:
        # Pooling does not ask for the grid's shape, so one row does.
        return Heads(logits=cast(SwinTransformer, self).forward_head(tokens.x.unsqueeze(1)))

    def _embed(self, images: Tensor) -> Tensor:
        """Patches as timm makes them, (B, H, W, C); input checked first."""
        swin = cast(Any, self)
        embed = swin.patch_embed
        channels = embed.proj.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise InputError(
                f"Expected images of shape (batch, {channels} channels, height, width), but got {tuple(images.shape)}. "
                "Add the batch dimension or convert the channels."
            )
        size, got = tuple(embed.img_size), tuple(images.shape[-2:])
        if embed.strict_img_size and got != size:
            raise InputError(
                f"This model takes images of {size[0]} x {size[1]} px, but got {got[0]} x {got[1]}. "
                "Resize the images, or set model.img_size (or dynamic_img_size in model.kwargs) in the config."
            )
        if any(side % patch for side, patch in zip(got, embed.patch_size, strict=True)):
            raise InputError(
                f"Image sides must be multiples of the patch size {embed.patch_size[0]} x {embed.patch_size[1]}, "
                f"but got {got[0]} x {got[1]}. Resize or pad the images."
            )
        return cast(Tensor, embed(images))

    def _plan_grid(self, grid: tuple[int, int], schedule: ScheduleLike | None) -> tuple[BlockSchedule, ...]:
        """The plan for images of this patch grid."""
        layers = cast(Any, self).layers
        grids = stage_grids(grid, [stage.downsample for stage in layers])
        stages = [(len(stage.blocks), h * w) for stage, (h, w) in zip(layers, grids, strict=True)]
        if schedule is None:
            firsts = [sum(blocks for blocks, _ in stages[:number]) for number in range(len(stages))]
            planned = [self._blocks_plan[first].tokens_in for first in firsts]
            if planned == [tokens for _, tokens in stages]:
                return self._blocks_plan
        sites = self.prune_config.sites if schedule is None else parse_sites(schedule)
        if schedule is not None:
            self._method.check_sites(sites)
            if sites and not self._method.runs_on_stages:
                raise ConfigError(
                    f"Method {self._method.name!r} does not run on Swin, so a schedule cannot ask for it. "
                    "Compress the model with trilevel."
                )
        return plan_stages(self.prune_config.options, sites, stages)

    def _walk(
        self,
        images: Tensor,
        schedule: ScheduleLike | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        recording: bool = False,
        masking: Masking | None = None,
    ) -> tuple[Tokens, Recorder | None]:
        if options:
            raise ConfigError(
                f"A call of a Swin takes no other options, but got {', '.join(options)}; set them in the config."
            )
        x, recorder = self._stages(images, schedule, recording=recording)
        return Tokens(x=x.flatten(1, 2), num_prefix=0), recorder

    def forward_features(self, x: Tensor, *, schedule: ScheduleLike | None = None) -> Tensor:
        """All tokens after the final norm, (B, H, W, C), as timm has them."""
        return self._stages(x, schedule)[0]

    def trace_official(self, images: Tensor) -> list[BlockTrace]:
        """Masks and scores of every block in official form, for comparison with recorded ones."""
        trace: list[BlockTrace] = []
        self._stages(images, None, trace=trace)
        return trace

    def _stages(
        self,
        images: Tensor,
        schedule: ScheduleLike | None,
        *,
        recording: bool = False,
        trace: list[BlockTrace] | None = None,
    ) -> tuple[Tensor, Recorder | None]:
        """Tokens after the final norm, (B, H, W, C), and what happened on the way when ``recording``."""
        swin = cast(SwinTransformer, self)
        x = self._embed(images)
        batch, height, width, _ = x.shape
        plan = self._plan_grid((height, width), schedule)
        recorder = Recorder(batch, height * width, x.device) if recording else None
        official = self.prune_config.options.get("tie") == "official"
        first = 0
        for stage in cast(Any, swin.layers):
            x = stage.downsample(x)
            stage_plan = plan[first : first + len(stage.blocks)]
            first += len(stage.blocks)
            if official:
                x = _run_masked(stage, x, stage_plan, recorder, trace)
            else:
                x = _run_kept(stage, x, stage_plan, recorder)
        if recorder is not None:
            recorder.origin = _merged_places((height, width), (x.shape[1], x.shape[2]), x.device).expand(batch, -1)
        return cast(Tensor, swin.norm(x)), recorder


def _run_kept(stage: Any, x: Tensor, plan: Sequence[BlockSchedule], recorder: Recorder | None) -> Tensor:
    """The blocks of a stage on x (B, H, W, C), tokens that left not computed any more."""
    batch, height, width, channels = x.shape
    kept: Tensor | None = None  # positions of the alive tokens in ascending order, (B, n); None while all are
    alive = x  # (B, n, C) once some have left
    for block, block_plan in zip(stage.blocks, plan, strict=True):
        if kept is None and not block_plan.steps:
            x = alive = _call(stage, block, x)
            continue
        scored = bool(block_plan.steps)
        if kept is None:
            x = x.flatten(1, 2)
            alive = x
        alive, scores = _call(stage, _kept_block, block, alive, kept, (height, width), scored)
        for step in block_plan.steps:
            assert scores is not None
            x = alive if kept is None else _put_tokens(x, kept, alive)
            index = top_tokens(scores, step.kept).sort(dim=-1).values
            alive = take_tokens(alive, index)
            positions = index if kept is None else take_values(kept, index)
            if recorder is not None:
                dense_scores = scores if kept is None else _put_values(scores, kept, height * width)
                mask = torch.zeros(batch, height * width, dtype=torch.bool, device=x.device).scatter(1, positions, True)
                _record(recorder, block_plan.index, step.op, mask, scores=dense_scores, kept_idx=positions)
            kept = positions
    if kept is not None:
        x = _put_tokens(x, kept, alive)
    return x.reshape(batch, height, width, channels)


def _run_masked(
    stage: Any, x: Tensor, plan: Sequence[BlockSchedule], recorder: Recorder | None, trace: list[BlockTrace] | None
) -> Tensor:
    """The blocks of a stage on x (B, H, W, C) as the official code runs them: all computed, then masked."""
    batch, height, width, channels = x.shape
    x = x.flatten(1, 2)
    mask = torch.ones(batch, height * width, dtype=x.dtype, device=x.device)
    for block, block_plan in zip(stage.blocks, plan, strict=True):
        column = mask.unsqueeze(-1)
        computed, scores = _call(stage, _masked_block, block, x * column, mask, (height, width))
        x = x * (1 - column) + computed * column
        scores = scores.detach()
        if trace is not None:
            trace.append(BlockTrace(mask=mask, scores=scores))
        for step in block_plan.steps:
            threshold = (scores * mask).topk(step.kept, dim=-1).values[:, -1:]
            # On the scores without the mask: a token that was gone may return.
            alive = scores > threshold
            mask = alive.to(x.dtype)
            if recorder is not None:
                _record(recorder, block_plan.index, step.op, alive, scores=scores)
    return x.reshape(batch, height, width, channels)


def _call(stage: Any, function: Any, *args: Any) -> Any:
    return checkpoint(function, *args) if stage.grad_checkpointing else function(*args)


def _kept_block(
    block: Any, x: Tensor, kept: Tensor | None, grid: tuple[int, int], scored: bool
) -> tuple[Tensor, Tensor | None]:
    """One block on alive tokens (B, n, C), and their scores (B, n) when ``scored``."""
    branch, scores = attend_windows(block, x, grid, kept=kept, scored=scored)
    x = x + block.drop_path1(branch)
    return x + block.drop_path2(block.mlp(block.norm2(x))), scores


def _masked_block(block: Any, x: Tensor, mask: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """One block on all tokens (B, L, C), and their scores (B, L)."""
    branch, scores = attend_windows(block, x, grid, policy=mask, scored=True)
    assert scores is not None
    x = x + block.drop_path1(branch)
    return x + block.drop_path2(block.mlp(block.norm2(x))), scores


def attend_windows(
    block: Any,
    x: Tensor,
    grid: tuple[int, int],
    *,
    kept: Tensor | None = None,
    policy: Tensor | None = None,
    scored: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The attention branch of a Swin block on some of its tokens.

    A token sees itself and the alive tokens of its window. Its score is the attention it receives there: the column
    sum over all queries of the head-averaged map. As in the official code masked tokens vote too, as the token 0 that
    they are zeroed to. On a CPU windows without an alive token are skipped; elsewhere the device would have to be
    waited for to know which.

    Args:
        block: timm's ``SwinTransformerBlock``.
        x: Tokens, (B, n, C), in the order of ``kept``.
        grid: Height and width of the stage.
        kept: Positions of ``x`` in the grid, (B, n), or None where it is the whole grid.
        policy: 1 for alive tokens, 0 for masked ones, (B, L), for the whole grid: the soft-max of the official code.
        scored: Whether to compute scores.

    Returns:
        The branch (B, n, C), without residual and stochastic depth, and the scores (B, n) in float32 or None.
    """
    attn = block.attn
    batch, count, _ = x.shape
    layout = layout_of(block, grid, x)
    total = grid[0] * grid[1]
    width = layout.windows * layout.area
    qkv = attn.qkv(block.norm1(x))
    # Behind the tokens, the rows of a masked one and of padding, which timm adds after the norm.
    padding = qkv.new_zeros(qkv.shape[-1]) if attn.qkv.bias is None else attn.qkv.bias.to(qkv.dtype)
    masked = attn.qkv(block.norm1(x.new_zeros(1, x.shape[-1])))[0] if scored and kept is not None else padding
    table = torch.cat((qkv, torch.stack((masked, padding)).expand(batch, 2, -1)), dim=1)
    rows = torch.full((batch, total + 1), count, device=x.device)
    rows[:, total] = count + 1
    own = torch.arange(count, device=x.device).expand(batch, count)
    rows = rows.scatter(1, own if kept is None else kept, own)[:, layout.slots]  # (B, W * A)
    places = layout.places.expand(batch, total) if kept is None else layout.places[kept]
    places = places + torch.arange(batch, device=x.device).unsqueeze(1) * width  # among all slots of the batch
    is_masked, is_padding = rows == count, rows == count + 1
    rows = (rows + torch.arange(batch, device=x.device).unsqueeze(1) * (count + 2)).view(-1, layout.area)
    is_masked, is_padding = is_masked.view(-1, layout.area), is_padding.view(-1, layout.area)
    shift = layout.shift_mask
    if shift is not None:
        shift = shift.repeat(batch, 1, 1)
    if count <= total - layout.smallest and x.device.type == "cpu" and not torch.compiler.is_compiling():
        is_busy = (~(is_masked | is_padding)).any(dim=1)
        busy = is_busy.nonzero().squeeze(1)
        rank = is_busy.cumsum(0) - 1
        places = rank[places // layout.area] * layout.area + places % layout.area
        rows, is_masked, is_padding = rows[busy], is_masked[busy], is_padding[busy]
        shift = None if shift is None else shift[busy]
    windows = table.flatten(0, 1).index_select(0, rows.flatten())
    windows = windows.view(-1, layout.area, 3, attn.num_heads, windows.shape[-1] // (3 * attn.num_heads))
    q, k, v = windows.permute(2, 0, 3, 1, 4).unbind(0)
    logits = (q * attn.scale) @ k.transpose(-2, -1) + attn._get_rel_pos_bias()
    if shift is not None:
        logits = logits + shift.unsqueeze(1)
    if policy is not None:
        slots = F.pad(policy, (0, 1), value=1.0)[:, layout.slots].view(-1, layout.area)
        attention = masked_softmax(logits, slots, OFFICIAL_EPS)
    else:
        if kept is not None:
            itself = torch.eye(layout.area, dtype=torch.bool, device=x.device)
            logits = logits.masked_fill(is_masked[:, None, None, :] & ~itself, -torch.inf)
        attention = logits.softmax(dim=-1)
    scores = None
    if scored:
        votes = attention.detach().float().mean(dim=1)
        columns = votes.masked_fill(is_padding.unsqueeze(-1), 0.0).sum(dim=1)
        scores = columns.flatten()[places]
    out = attn.attn_drop(attention).to(v.dtype) @ v
    out = out.transpose(1, 2).flatten(2).flatten(0, 1)
    out = out.index_select(0, places.flatten()).view(batch, count, -1)
    return attn.proj_drop(attn.proj(out)), scores


def layout_of(block: Any, grid: tuple[int, int], x: Tensor) -> WindowLayout:
    """How a block cuts a grid into windows; ``x`` gives device and dtype."""
    height, width = grid
    window = tuple(block.window_size)
    total = height * width
    numbers = torch.arange(total, device=x.device).view(1, height, width, 1)
    if any(block.shift_size):
        numbers = numbers.roll(shifts=(-block.shift_size[0], -block.shift_size[1]), dims=(1, 2))
    pad_h, pad_w = -height % window[0], -width % window[1]
    numbers = F.pad(numbers, (0, 0, 0, pad_w, 0, pad_h), value=total)
    slots = window_partition(numbers, window).flatten()
    order = torch.arange(slots.shape[0], device=x.device)
    places = torch.zeros(total + 1, dtype=torch.long, device=x.device).scatter(0, slots, order)[:total]
    shift_mask = block.attn_mask
    if getattr(block, "dynamic_mask", False):
        shift_mask = block.get_attn_mask(x.new_empty(1, height + pad_h, width + pad_w, 1))
    area = window[0] * window[1]
    return WindowLayout(
        slots=slots,
        places=places,
        windows=slots.shape[0] // area,
        area=area,
        smallest=(window[0] - pad_h) * (window[1] - pad_w),
        shift_mask=shift_mask,
    )


def _put_tokens(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``x`` (B, L, C) with rows ``index`` (B, n) replaced by ``values`` (B, n, C)."""
    batch, total, width = x.shape
    rows = index + torch.arange(batch, device=x.device).unsqueeze(1) * total
    flat = x.reshape(batch * total, width).index_copy(0, rows.flatten(), values.reshape(-1, width).to(x.dtype))
    return flat.view(batch, total, width)


def _put_values(values: Tensor, index: Tensor, total: int) -> Tensor:
    """Values (B, n) at ``index`` of a row of zeros, (B, total)."""
    return values.new_zeros(values.shape[0], total).scatter(1, index, values)


def _record(recorder: Recorder, block: int, op: str, alive: Tensor, **values: Tensor) -> None:
    # Not through the recorder's own way: masked tokens come back with the next stage, so origins do not end here.
    places = torch.arange(alive.shape[1], device=alive.device)
    assignment = torch.where(alive, places, -1)
    recorder.sites.append(SiteRecord(block=block, op=op, assignment=assignment, values={"mask": alive, **values}))


def _merged_places(grid: tuple[int, int], last: tuple[int, int], device: torch.device) -> Tensor:
    """For every patch the token of the last grid it was merged into, (1, patches)."""
    factor = 1
    while -(-grid[0] // factor) > last[0] or -(-grid[1] // factor) > last[1]:
        factor *= 2
    row = torch.arange(grid[0], device=device) // factor
    column = torch.arange(grid[1], device=device) // factor
    return (row[:, None] * last[1] + column[None, :]).reshape(1, -1)


__all__ = ["BlockTrace", "CompressedSwinTransformer", "WindowLayout", "attend_windows", "layout_of"]
