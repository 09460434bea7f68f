"""Tokens per block → multiply-accumulates, in closed form, per operator and per block. 1 MAC = 2 FLOPs."""

from __future__ import annotations

from dataclasses import dataclass, field

from prunefront.config import ConfigSource, PruneConfig, load_config
from prunefront.geometry import ModelGeometry, geometry_for
from prunefront.registry import get_method
from prunefront.schedule import BlockSchedule, TokenSchedule, plan_schedule

# Operators that `macs` adds up: what the field reports. The others are what reductions cost on top.
MODEL_OPERATORS = ("qkv", "attention", "proj", "mlp", "predictor", "downsample")


@dataclass(frozen=True, kw_only=True)
class MacsDetail:
    """MACs per image.

    Attributes:
        stem: Patch embedding.
        head: Pooling and classifiers.
        size_weighted_pool: Averaging tokens by their size; a plain mean costs no product.
        blocks: Per block, operator → MACs. ``qkv``, ``attention``, ``proj`` and ``mlp`` are the model's own;
            ``predictor`` is what learned selection needs and is counted with them; ``class_row`` (scores),
            ``similarity``, ``merge``, ``fuse`` and ``package`` are products that reductions add. Swin:
            ``downsample`` is the patch merging before a stage's first block; see `prunefront.swin_schedule`.
        total: Everything; what torchprofile counts as linear, convolution and matrix products on the built model.
        model: ``total`` without what reductions add; equal to `macs`.
    """

    stem: int
    head: int
    size_weighted_pool: int = 0
    blocks: tuple[dict[str, int], ...] = field(default=())

    @property
    def total(self) -> int:
        products = sum(sum(block.values()) for block in self.blocks)
        return self.stem + self.head + self.size_weighted_pool + products

    @property
    def model(self) -> int:
        return self.stem + self.head + sum(block.get(op, 0) for block in self.blocks for op in MODEL_OPERATORS)


def macs(config: ConfigSource) -> int:
    """MACs per image of linear, convolution and attention products (``macs_matmul`` of the field's papers).

    What reductions add (class rows, similarities) is in `macs_detail`.

    Args:
        config: Config, dict, path or open file.
    """
    return macs_detail(config).model


def macs_detail(config: ConfigSource) -> MacsDetail:
    """MACs per block and operator.

    Args:
        config: Config, dict, path or open file.
    """
    config = load_config(config)
    geometry = geometry_for(config.model)
    return macs_of_schedule(plan_schedule(config, geometry), geometry)


def macs_of_schedule(schedule: TokenSchedule, geometry: ModelGeometry) -> MacsDetail:
    """`macs_detail` for a schedule whose geometry the caller has."""
    options = dict(schedule.options)
    if geometry.stages:
        from prunefront.swin_schedule import stage_macs

        return MacsDetail(
            stem=geometry.stem_macs, head=geometry.head_macs, blocks=stage_macs(schedule, geometry.stages)
        )
    blocks = []
    for block in schedule.blocks:
        operators = {
            "qkv": block.tokens_in * geometry.qkv_macs_per_token,
            "attention": 2 * block.tokens_in**2 * geometry.num_heads * geometry.head_dim,
            "proj": block.tokens_in * geometry.proj_macs_per_token,
            "mlp": block.tokens_out * geometry.mlp_macs_per_token,
        }
        operators |= _reduction_macs(block, schedule, geometry, options)
        blocks.append(operators)
    last = schedule.blocks[-1].tokens_out - geometry.num_prefix_tokens - num_packages(schedule)
    if geometry.global_pool == "prr":
        last = schedule.blocks[-1].tokens_out
    pool = geometry.pool_macs_fixed + last * geometry.pool_macs_per_token + last**2 * geometry.pool_macs_per_token_pair
    averages = geometry.global_pool in ("avg", "avgmax") and carries_sizes(schedule)
    return MacsDetail(
        stem=geometry.stem_macs,
        head=geometry.head_macs + pool + last * geometry.token_head_macs,
        # One row times all tokens.
        size_weighted_pool=last * geometry.embed_dim if averages else 0,
        blocks=tuple(blocks),
    )


def num_packages(schedule: TokenSchedule) -> int:
    """Tokens at the end of the sequence that a method appended and never ranks."""
    if not get_method(schedule.method).carries_added_tokens:
        return 0
    return sum(len(block.steps) for block in schedule.blocks)


def carries_sizes(schedule: TokenSchedule) -> bool:
    """Whether any reduction leaves token sizes behind, which then weight pooling."""
    options = dict(schedule.options)
    for block in schedule.blocks:
        for step in block.steps:
            if schedule.method in ("tome", "diffrate", "hybrid") and step.removed and step.op != "prune":
                return True
            if schedule.method == "ppt" and options["threshold"] != 0:
                return True
    return False


def _reduction_macs(
    block: BlockSchedule, schedule: TokenSchedule, geometry: ModelGeometry, options: dict[str, object]
) -> dict[str, int]:
    """Matrix products that the steps of a block add, as `prunefront.methods` computes them."""
    from prunefront.methods.ppt import forced_branch

    prefix, width = geometry.num_prefix_tokens, geometry.embed_dim
    operators: dict[str, int] = {}

    def add(name: str, count: int) -> None:
        if count:
            operators[name] = operators.get(name, 0) + count

    method = get_method(schedule.method)
    ranks = any(step.op in ("prune", "fuse", "merge_mean") for step in block.steps)
    merges_after = any(step.op == "merge" for step in block.steps)
    for step in block.steps:
        present = step.tokens_in - prefix
        if step.op == "select":
            add("predictor", present * method.predictor_macs_per_token(geometry))
            if method.carries_added_tokens:
                add("package", (step.kept + step.removed) * width)
        if step.op == "fuse":
            add("fuse", present * width)
            if merges_after:  # the fused token needs a metric of its own
                add("fuse", present * geometry.head_dim)
        if step.op == "pool_or_prune":
            branch = forced_branch(options["threshold"], present)  # type: ignore[arg-type]
            ranks = ranks or branch != "pool"
            if branch != "prune":
                _add_bipartite(add, present, step.removed, prefix, geometry)
        if step.op == "merge":
            _add_bipartite(add, present, step.removed, prefix, geometry)
        if step.op == "merge_mean" and step.removed:
            add("similarity", step.removed * step.kept * width)
            add("merge", step.removed * step.kept * width)
    if ranks and options.get("attn_ratio", 1.0) == 1.0:  # else the whole attention map is at hand
        add("class_row", block.tokens_in * geometry.num_heads * geometry.head_dim)
    return operators


def _add_bipartite(add: object, present: int, removed: int, prefix: int, geometry: ModelGeometry) -> None:
    """Similarity of both halves, and the product that adds sources to destinations."""
    assert callable(add)
    num_b = present - bipartite_sources(present, prefix)
    add("similarity", bipartite_sources(present, prefix) * num_b * geometry.head_dim)
    add("merge", num_b * removed * geometry.embed_dim)


def bipartite_sources(present: int, num_prefix_tokens: int) -> int:
    """Tokens in set a: every second one, beginning with the first where the prefix is even."""
    return present // 2 if num_prefix_tokens % 2 else (present + 1) // 2


def official_torchprofile_macs(config: PruneConfig, *, ppt_policy: dict[int, str] | None = None) -> int:
    """What torchprofile 0.1.0 counts on the *official* EViT, ToMe and PPT modules (``macs_torchprofile``).

    `macs` plus layer norms, the attention scale and each method's own elementwise products; the identities stand in
    the papers' method notes and hold to the digit for one image.

    Args:
        config: A schedule of ``evit``, ``tome`` or ``ppt`` on a plain DeiT or ViT.
        ppt_policy: For ``ppt``: block → "prune" or "pool", since the count depends on the branch taken.
    """
    geometry = geometry_for(config.model)
    schedule = plan_schedule(config, geometry)
    width, heads, head_dim = geometry.embed_dim, geometry.num_heads, geometry.head_dim
    count = macs_of_schedule(schedule, geometry).model
    for block in schedule.blocks:
        n = block.tokens_in
        count += (n + block.tokens_out) * width + heads * n * n
        for step in block.steps:
            pools = config.method == "tome" or (ppt_policy or {}).get(block.index) == "pool"
            if config.method == "evit":
                count += n - 1
                if step.op == "fuse":
                    count += step.removed * width
            elif pools:
                count += -(-n // 2) * (n // 2) * head_dim + n * head_dim + n * width
            if config.method == "ppt":
                count += n
    count += schedule.blocks[-1].tokens_out * width
    if config.method == "ppt":
        count += sum({"prune": 6, "pool": 2}[policy] for policy in (ppt_policy or {}).values())
    return count
