"""PruneConfig: which method reduces tokens, at which blocks and by how much, for which model.

The document users download, edit and train with. It holds no torch object and is checked on construction; what a
config means for a model (integers per block) is worked out by `prunefront.schedule`.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from prunefront.errors import ConfigError
from prunefront.files import write_atomic

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

CONFIG_FORMAT: Literal["prunefront/config/1"] = "prunefront/config/1"

# Runtimes that a forward pass can be measured with here (`prunefront.runtimes.RUNTIMES`), and its number formats.
Runtime = Literal["eager", "compile", "cudagraph", "onnxruntime"]
Dtype = Literal["fp32", "bf16", "fp16"]

Ratio = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]


def expecting(what: str) -> WrapValidator:
    """Refuse with one sentence what no branch of a union takes; its own errors name branches that no reader knows."""

    def validate(value: Any, parse: ValidatorFunctionWrapHandler) -> Any:
        try:
            return parse(value)
        except ValidationError as error:
            raise ValueError(f"expects {what}, but got {_short(value)}") from error

    return WrapValidator(validate)


PIXELS = expecting("pixels such as 224 or [224, 320]")


class StrictModel(BaseModel):
    """Base of every document: unknown fields are refused, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSpec(StrictModel):
    """A model as ``timm.create_model(name, **kwargs)`` builds it."""

    name: str
    kwargs: dict[str, Any] = Field(default_factory=dict)
    img_size: Annotated[PositiveInt | tuple[PositiveInt, PositiveInt] | None, PIXELS] = Field(
        default=None, description="Pixels, one side or [height, width]; null is the model's own."
    )
    in_chans: PositiveInt = 3
    num_classes: Annotated[int, Field(ge=0)] | None = Field(default=None, description="Null is the model's own.")

    @field_validator("img_size", mode="after")
    @classmethod
    def _square_is_one_number(cls, value: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        # [224, 224] and 224 are the same model and have to hash alike.
        if isinstance(value, tuple) and value[0] == value[1]:
            return value[0]
        return value


class Weights(StrictModel):
    """Where the weights of the accuracy in ``results`` came from."""

    source: str = Field(description='"timm", a registered checkpoint id, or a file name.')
    sha256: str | None = None


class Site(StrictModel):
    """One reduction: a block, an operation, and exactly one amount.

    Amounts count chosen tokens; the extra token of ``fuse`` is not among them.
    """

    block: Annotated[int, Field(ge=0)] = Field(description="0-based transformer block.")
    op: str
    keep_ratio: Ratio | None = Field(default=None, description="Share of the non-prefix tokens present that stay.")
    cumulative_keep_ratio: Ratio | None = Field(default=None, description="Share of the initial patches that stay.")
    tokens: PositiveInt | None = Field(default=None, description="Non-prefix tokens left.")
    remove: Annotated[int, Field(ge=0)] | None = Field(default=None, description="Tokens removed.")

    @model_validator(mode="after")
    def _has_one_amount(self) -> Site:
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a site needs exactly one of {', '.join(AMOUNTS)}, but got {', '.join(given) or 'none'} "
                f"at block {self.block}; keep one of them"
            )
        return self


AMOUNTS = ("keep_ratio", "cumulative_keep_ratio", "tokens", "remove")


class EvalInfo(StrictModel):
    """How an accuracy was measured."""

    dataset: str
    split: str
    num_images: PositiveInt
    crop_pct: float | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: str = "fp32"


class LatencyInfo(StrictModel):
    """One latency per forward pass of ``batch_size`` images, measured and predicted kept apart."""

    device: str
    runtime: str
    dtype: str
    batch_size: PositiveInt
    measured_ms: float | None = None
    iqr_ms: float | None = None
    predicted_ms: float | None = None


class Results(StrictModel):
    """What is known about a config. Never part of its identity."""

    macs: float | None = Field(default=None, description="Multiply-accumulates per image.")
    top1: Annotated[float, Field(ge=0, le=1)] | None = Field(default=None, description="On the test split, 0-1.")
    top5: Annotated[float, Field(ge=0, le=1)] | None = None
    eval: EvalInfo | None = None
    latency: tuple[LatencyInfo, ...] = ()
    job: str | None = None
    trial: int | None = None


class PruneConfig(StrictModel):
    """A token-reduction schedule for one model (``prunefront/config/1``)."""

    format: Literal["prunefront/config/1"] = CONFIG_FORMAT
    model: ModelSpec
    weights: Weights | None = None
    method: str
    sites: tuple[Site, ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)
    results: Results | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete_options(cls, data: Any) -> Any:
        """Options become complete and typed by the method's own model."""
        from prunefront.registry import get_method

        if not isinstance(data, Mapping) or not isinstance(data.get("method"), str):
            return data
        method = get_method(data["method"])
        options = data.get("options") or {}
        # What is no mapping is refused like any other field of the wrong type.
        return {**data, "options": method.parse_options(options)} if isinstance(options, Mapping) else data

    @field_validator("sites", mode="after")
    @classmethod
    def _in_order_of_execution(cls, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        # The list's order within a block, the blocks' between them.
        return tuple(sorted(sites, key=lambda site: site.block))

    @model_validator(mode="after")
    def _method_allows_sites(self) -> PruneConfig:
        from prunefront.registry import get_method

        get_method(self.method).check_sites(self.sites)
        return self

    def content_hash(self) -> str:
        """Hash of what the config does: model, method, options and effective integers; never ``results``.

        Sites that remove nothing are left out where they do nothing, so configs that spell one schedule differently
        are one candidate. Needs torch and timm to know the model's token counts.
        """
        from prunefront.schedule import content_hash

        return content_hash(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the fields that are unset inside sites, model and results."""
        document = self.model_dump(mode="json")
        document["sites"] = [{k: v for k, v in site.items() if v is not None} for site in document["sites"]]
        if document["results"] is None:
            del document["results"]
        if document["weights"] is None:
            del document["weights"]
        return document

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write JSON, or YAML when the name ends in ``.yaml`` or ``.yml``; all or nothing."""
        text = self.to_yaml() if Path(path).suffix in (".yaml", ".yml") else self.to_json()
        return write_atomic(path, text)

    def evolve(self, **changes: Any) -> PruneConfig:
        """A checked copy with some fields replaced."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**fields, **changes})


ConfigSource = PruneConfig | Mapping[str, Any] | str | os.PathLike[str] | IO[str] | IO[bytes]


def load_config(source: ConfigSource) -> PruneConfig:
    """Read a PruneConfig from a path (JSON or YAML), a dict, an open file, or another config.

    Raises:
        ConfigError: If the document is not readable or not a valid config; the text names field and reason.
    """
    if isinstance(source, PruneConfig):
        return source
    name = "config"
    if isinstance(source, Mapping):
        document: Any = dict(source)
    else:
        if isinstance(source, str | os.PathLike):
            name = os.fspath(source)
            try:
                text: str | bytes = Path(source).read_bytes()
            except (OSError, ValueError) as error:  # ValueError: no path at all, such as one with a NUL
                reason = getattr(error, "strerror", None) or error
                raise ConfigError(f"Cannot read config {name}: {reason}. Check the path.") from error
        elif not hasattr(source, "read"):
            raise ConfigError(
                f"A config is read from a path, a mapping, an open file or a PruneConfig, but got {_short(source)}."
            )
        else:
            name = str(getattr(source, "name", name))
            text = source.read()
        document = _parse(text, name)
    if not isinstance(document, dict):
        raise ConfigError(
            f"{name} should hold one config (a mapping), but holds {_KINDS.get(type(document), 'something else')}. "
            "Check that it is the right file."
        )
    if "format" not in document:
        raise ConfigError(f'{name} has no "format" field; a config starts with "format": "{CONFIG_FORMAT}".')
    if document["format"] != CONFIG_FORMAT:
        raise ConfigError(
            f"{name} has format {document['format']!r}, but this version of prunefront reads {CONFIG_FORMAT!r}; "
            "pass a config, or upgrade prunefront if it is newer."
        )
    try:
        return PruneConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{name}: {describe_validation_error(error)}") from error


_KINDS = {type(None): "nothing", str: "text", list: "a list", bool: "a word", int: "a number", float: "a number"}


# pydantic's kinds of errors whose own words speak of Python, or leave open what to do.
_MESSAGES = {
    "extra_forbidden": "no such field is known; correct its name or leave it out",
    "model_type": "Input should be an object with named fields",
    "model_attributes_type": "Input should be an object with named fields",
    "dict_type": "Input should be an object with named fields",
    "tuple_type": "Input should be a list",
    "list_type": "Input should be a list",
}
_NEEDS_NO_VALUE = ("value_error", "missing", "extra_forbidden")


def readable_errors(errors: Iterable[ErrorDetails]) -> list[ErrorDetails]:
    """pydantic's errors in the words of whoever wrote the document, without those that only follow from others."""
    items = list(errors)
    deeper = {item["loc"][:depth] for item in items for depth in range(len(item["loc"]))}
    return [
        {**item, "msg": _MESSAGES.get(item["type"], item["msg"].removeprefix("Value error, "))}
        for item in items
        # A list whose items were refused counts as too short as well.
        if not (item["type"] == "too_short" and item["loc"] in deeper)
    ]


def describe_validation_error(error: ValidationError) -> str:
    """One sentence per problem, each with the place where it stands."""
    parts = []
    for item in readable_errors(error.errors()):
        where = ".".join(str(part) for part in item["loc"])
        got = "" if item["type"] in _NEEDS_NO_VALUE else f" (got {_short(item['input'])})"
        parts.append(f"{where}: {item['msg']}{got}" if where else f"{item['msg']}{got}")
    return "; ".join(parts)


def _short(value: Any) -> str:
    """A value as it is written, cut where it would drown the sentence."""
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = 80
    return shortened.repr(value)


def _parse(text: str | bytes, name: str) -> Any:
    try:
        # JSON is YAML, but YAML reads 3e9 as text; so JSON is tried first.
        return json.loads(text)
    except RecursionError as error:
        raise ConfigError(f"{name} is nested too deeply to be a config. Check that it is the right file.") from error
    except ValueError as error:
        json_error = error
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        looks_like_json = text.lstrip()[:1] in ("{", "[", b"{", b"[")
        reason = str(json_error) if looks_like_json else _yaml_problem(error)
        raise ConfigError(
            f"{name} is neither JSON nor YAML ({reason}); it may be cut off or damaged. Copy or write it again."
        ) from error


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{problem}: line {mark.line + 1} column {mark.column + 1}" if mark is not None else problem
