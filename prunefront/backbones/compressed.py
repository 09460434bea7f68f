"""What every compressed backbone shares: the plan of a schedule, the walk through the blocks, and the call itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal, cast, overload

import torch
from pydantic import ValidationError
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from prunefront.backbones.heads import Heads
from prunefront.blocks import Blocks
from prunefront.config import PruneConfig, Site, describe_validation_error
from prunefront.errors import ConfigError, ModelError
from prunefront.methods.base import Aux, Call, Masking, Method, Recorder
from prunefront.ops.tokens import Tokens
from prunefront.schedule import BlockSchedule, plan_blocks

ScheduleLike = Sequence[Site | Mapping[str, Any]]

TRAINING_EPS = 1e-6


def gumbel_noise(stage: int, scores: Tensor) -> Tensor:
    """Gumbel(0, 1) noise in the shape of ``scores``, from torch's global generator."""
    return -torch.empty_like(scores, dtype=torch.float32).exponential_().log()


class Compressed:
    """Base of the mixins in front of a backbone's class: the call. A backbone adds its walk and its heads.

    No ``ABC``: Python refuses to give a model a class whose layout has one in it.
    """

    prune_config: PruneConfig
    _blocks_plan: tuple[BlockSchedule, ...]
    _method: Method

    def _walk(
        self,
        images: Tensor,
        schedule: ScheduleLike | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        recording: bool = False,
        masking: Masking | None = None,
    ) -> tuple[Tokens, Recorder | None]:
        """Remaining tokens after the final norm, and what happened to them when ``recording``."""
        raise NotImplementedError

    def _heads(self, tokens: Tokens) -> Heads:
        """Pooling and classifiers on the normalised remaining tokens."""
        raise NotImplementedError

    def forward_features(self, x: Tensor, *, schedule: ScheduleLike | None = None) -> Tensor:
        """Remaining tokens after the final norm, (B, N, C)."""
        return self._walk(x, schedule)[0].x

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: feature maps of the whole grid do not exist once tokens are gone."""
        raise ModelError(
            "A compressed model has no feature maps per block, since tokens leave on the way. "
            "Use return_aux=True, or prunefront.uncompress(model) for the dense model."
        )

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        schedule: ScheduleLike | None = ...,
        options: Mapping[str, Any] | None = ...,
        return_aux: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        schedule: ScheduleLike | None = ...,
        options: Mapping[str, Any] | None = ...,
        return_aux: Literal[True],
    ) -> tuple[Tensor, Aux]: ...

    def forward(
        self,
        x: Tensor,
        *,
        schedule: ScheduleLike | None = None,
        options: Mapping[str, Any] | None = None,
        return_aux: bool = False,
    ) -> Tensor | tuple[Tensor, Aux]:
        """Logits (B, classes).

        Args:
            x: Images, (B, channels, height, width).
            schedule: Other sites of the same method for this call (keep-rate warm-up, elastic training).
            options: Options of the method to replace for this call, such as Tri-Level's ``attn_ratio``.
            return_aux: Also return what happened to the tokens.
        """
        tokens, recorder = self._walk(x, schedule, options=options, recording=return_aux)
        heads = self._heads(tokens)
        return heads.logits if recorder is None else (heads.logits, aux_of(tokens, heads, recorder))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time; pickles name the classes it derives from instead.
        return _new_compressed, type(self).__bases__, cast(nn.Module, self).__dict__


class CompressedTransformer(Compressed):
    """A column of blocks that are all alike; tokens that leave do not come back."""

    blocks_family: ClassVar[Blocks]

    def _start(self, images: Tensor) -> Tokens:
        """Tokens entering block 0; the images are checked first."""
        raise NotImplementedError

    def _entering(self, tokens: Tokens, block: int) -> Tokens:
        """``tokens`` as block number ``block`` wants them; most backbones change nothing."""
        return tokens

    def _norm(self, x: Tensor) -> Tensor:
        """The final norm over tokens (B, N, C)."""
        raise NotImplementedError

    def _options(self, changes: Mapping[str, Any] | None) -> dict[str, Any]:
        """The config's options with those replaced that a call names."""
        own = self.prune_config.options
        return own if changes is None else self._method.parse_options({**own, **changes})

    def _plan(
        self, tokens: Tokens, schedule: ScheduleLike | None, options: dict[str, Any]
    ) -> tuple[BlockSchedule, ...]:
        native = self._blocks_plan[0].tokens_entering
        if schedule is None and tokens.x.shape[1] == native:
            return self._blocks_plan
        method = self._method
        sites: Sequence[Site] = self.prune_config.sites
        if schedule is not None:
            sites = parse_sites(schedule)
            method.check_sites(sites)
            if hasattr(self, "score_predictor"):
                self._check_predictors(sites)
        return plan_blocks(
            method,
            options,
            sites,
            depth=len(self._blocks_plan),
            num_patch_tokens=tokens.x.shape[1] - tokens.num_prefix,
            num_prefix_tokens=tokens.num_prefix,
        )

    def _check_predictors(self, sites: Sequence[Site]) -> None:
        own = [site.block for site in self.prune_config.sites]
        asked = [site.block for site in sites]
        if not set(asked) <= set(own):
            raise ConfigError(
                f"This model has learned predictors for blocks {own}, but the schedule asks for blocks {asked}. "
                "Use some of the trained blocks."
            )

    def _walk(
        self,
        images: Tensor,
        schedule: ScheduleLike | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        recording: bool = False,
        masking: Masking | None = None,
    ) -> tuple[Tokens, Recorder | None]:
        """Remaining tokens after the final norm, and what happened to them when ``recording``."""
        model = cast(Any, self)
        tokens = self._start(images)
        chosen = self._options(options)
        plan = self._plan(tokens, schedule, chosen)
        if masking is None and model.training and self._method.masks_in_training:
            masking = Masking(eps=TRAINING_EPS, noise=gumbel_noise)
        recorder = Recorder(tokens.x.shape[0], tokens.x.shape[1], tokens.x.device) if recording else None
        stages = {site.block: stage for stage, site in reversed(list(enumerate(self.prune_config.sites)))}
        predictors = getattr(model, "score_predictor", None)
        for block, block_plan in zip(model.blocks, plan, strict=True):
            stage = stages.get(block_plan.index, 0)
            call = Call(
                options=chosen,
                stage=stage,
                predictor=predictors[stage] if block_plan.steps and predictors is not None else None,
                masking=masking,
                recorder=recorder,
                is_last_block=block_plan.index == len(plan) - 1,
            )
            if recorder is not None:
                recorder.block = block_plan.index
            tokens = self._entering(tokens, block_plan.index)
            run = self._method.forward_block
            if model.grad_checkpointing:
                tokens = checkpoint(run, self.blocks_family, block, tokens, block_plan.steps, call)
            else:
                tokens = run(self.blocks_family, block, tokens, block_plan.steps, call)
            if recorder is not None:
                recorder.class_tokens.append(tokens.first())
                if tokens.size is not None:
                    recorder.sizes[block_plan.index] = tokens.size
        return tokens.but(x=self._norm(tokens.x)).padded(), recorder


def aux_of(tokens: Tokens, heads: Heads, recorder: Recorder) -> Aux:
    """What a walk recorded, as callers get it."""
    return Aux(
        tokens=tokens.x,
        size=tokens.size,
        origin=recorder.origin,
        sites=recorder.sites,
        sizes=recorder.sizes,
        num_packages=tokens.num_packages,
        present=tokens.present,
        decisions=recorder.decisions,
        class_logits=heads.logits if heads.class_logits is None else heads.class_logits,
        token_logits=heads.token_logits,
        token_places=heads.token_places,
        class_tokens=torch.stack(recorder.class_tokens) if recorder.class_tokens else None,
        class_attention=recorder.class_attention,
    )


@cache
def compressed_class(mixin: type, base: type) -> type:
    """The class of a compressed ``base``."""
    return type(f"Compressed{base.__name__}", (mixin, base), {"__module__": __name__})


def _new_compressed(mixin: type, base: type) -> Any:
    return object.__new__(compressed_class(mixin, base))


def parse_sites(schedule: ScheduleLike) -> list[Site]:
    """The sites of a schedule given to one call, in order of blocks.

    Raises:
        ConfigError: If one of them cannot be used.
    """
    return sorted((_parse_site(site) for site in schedule), key=lambda site: site.block)


def _parse_site(site: Site | Mapping[str, Any]) -> Site:
    if isinstance(site, Site):
        return site
    try:
        return Site.model_validate(site)
    except ValidationError as error:
        raise ConfigError(f"A site of the schedule cannot be used: {describe_validation_error(error)}.") from error
