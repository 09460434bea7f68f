"""The documents of the application: what a job asks for and the front it ends with (design §3, §6)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, field_validator, model_validator

from prunefront.config import PIXELS, Dtype, ModelSpec, PruneConfig, Runtime, StrictModel, expecting

Fidelity = Literal["screened", "evaluated", "finetuned"]
Origin = Literal["dense", "published", "resolution", "sibling", "sampler"]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]+$")]
# Looked up among what is registered and never joined to a path, so any text may be asked for.
Identifier = Name

FRONT_FORMAT: Literal["prunefront/front/1"] = "prunefront/front/1"


class ModelRef(StrictModel):
    """A timm model and the registered checkpoint to load into it; without one, timm's pretrained weights."""

    name: Identifier
    checkpoint: Identifier | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    img_size: Annotated[int | tuple[int, int] | None, PIXELS] = None
    num_classes: int | None = None

    def spec(self) -> ModelSpec:
        return ModelSpec(name=self.name, kwargs=self.kwargs, img_size=self.img_size, num_classes=self.num_classes)


class SearchSpace(StrictModel):
    """Which schedules may be proposed."""

    methods: Annotated[tuple[str, ...], Field(min_length=1)] = ("evit", "ppt", "tome", "diffrate", "hybrid")
    locations: Annotated[
        Literal["any"] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)],
        expecting('"any" or a list of 0-based blocks such as [3, 6, 9]'),
    ] = "any"
    min_keep_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.3, description="Least share of the tokens present that one site may keep."
    )


class Constraints(StrictModel):
    max_latency_ms: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Per forward pass of the job's batch; slower candidates are not promoted."
    )
    max_memory_mib: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Predicted peak memory of a forward pass; candidates above are not promoted."
    )


class Budget(StrictModel):
    trials: Annotated[int, Field(ge=1, le=100_000)] = 200
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    search_images: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Images of the search split per candidate; null is the whole split."
    )
    measure_top: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=12, description="Most promising candidates measured on the device and evaluated on the test split."
    )
    finetune_top: Annotated[int, Field(ge=0, le=1000)] = 0
    finetune_epochs: Annotated[int, Field(ge=1)] = 5


class _Placed(StrictModel):
    """What every kind of job has in common."""

    name: Name | None = None
    tags: tuple[Name, ...] = ()
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    device: Identifier = "cpu"
    runtime: Runtime = "eager"
    dtype: Dtype = "fp32"
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 8


class SearchJob(_Placed):
    """Search schedules for one model on one dataset and device."""

    kind: Literal["search"] = "search"
    model: ModelRef
    dataset: Identifier
    space: SearchSpace = SearchSpace()
    constraints: Constraints = Constraints()
    budget: Budget = Budget()
    sampler: Literal["auto", "tpe", "nsga2", "gp", "qmc", "random"] = "auto"
    warm_start_from: tuple[Identifier, ...] = Field(default=(), description="Jobs whose fronts are proposed first.")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0

    @field_validator("space", mode="after")
    @classmethod
    def _methods_exist(cls, space: SearchSpace) -> SearchSpace:
        from prunefront.registry import get_method

        for name in space.methods:
            if get_method(name).needs_training:
                raise ValueError(
                    f"{name} has to be trained before it can be judged, so a search cannot propose it; "
                    "leave it out of the methods, or train a config of it"
                )
        return space


class TableJob(_Placed):
    """Build the latency table of a model's blocks on a device."""

    kind: Literal["table"] = "table"
    model: ModelRef
    detail: Literal["full", "quick"] = Field(
        default="full", description="Quick takes fewer token counts and reductions: a third of the time, more error."
    )
    validate_schedules: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=20, description="Held-out schedules measured to state the table's error; 0 skips it."
    )
    max_foreign_cores: Annotated[float, Field(ge=0, le=1024)] | None = Field(
        default=None,
        description="Cores that other processes may take from measuring, 0.25 unless given: beside more the job waits "
        "for a minute, then fails.",
    )


class MeasureJob(_Placed):
    """Measure configs, each interleaved with its dense model."""

    kind: Literal["measure"] = "measure"
    configs: Annotated[tuple[PruneConfig, ...], Field(min_length=1, max_length=1000)]
    dataset: Identifier | None = Field(default=None, description="Real images for methods that look at them.")
    checkpoint: Identifier | None = None

    @model_validator(mode="after")
    def _one_model(self) -> MeasureJob:
        if any(config.model != self.configs[0].model for config in self.configs):
            raise ValueError("all configs of a measure job need the same model; submit one job per model")
        return self


Job = Annotated[SearchJob | TableJob | MeasureJob, Field(discriminator="kind")]
JobAdapter: TypeAdapter[SearchJob | TableJob | MeasureJob] = TypeAdapter(Job)


class FrontPoint(StrictModel):
    """One measured point; ratios 0-1, milliseconds per forward pass of the front's batch."""

    label: str
    config: PruneConfig
    fidelity: Fidelity
    top1: float
    top1_ci: tuple[float, float] | None = None
    measured_ms: float
    iqr_ms: float
    predicted_ms: float | None = None
    speedup: float = Field(description="Dense over this, from the same interleaved run.")
    macs: float
    trial: int
    top1_delta: float | None = Field(default=None, description="Top-1 minus dense, on the same images.")
    top1_delta_ci: tuple[float, float] | None = Field(default=None, description="Paired 95 % interval of the delta.")
    origin: Origin = "sampler"


class Front(StrictModel):
    """Accuracy against measured latency on one device, at one fidelity (``prunefront/front/1``)."""

    format: Literal["prunefront/front/1"] = FRONT_FORMAT
    job: str | None = None
    device: str
    runtime: Runtime
    dtype: Dtype
    batch_size: int
    fidelity: Fidelity
    split: str = "test"
    dense: FrontPoint | None
    marks: tuple[FrontPoint, ...] = ()
    points: tuple[FrontPoint, ...] = Field(
        default=(), description="Non-dominated, fastest first; none slower than dense."
    )
    notes: tuple[str, ...] = Field(
        default=(), description="What a reader must know: dense wins, noisy numbers left out."
    )
