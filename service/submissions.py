"""What is checked before a job is accepted, so that a job that cannot work is refused at once with the reason.

The documents have checked shapes and ranges; here every name is looked up and what belongs together is compared:
model with checkpoint, dataset, methods and device. Nothing here loads weights or images.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import timm
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from timm.models.vision_transformer import VisionTransformer

import prunefront
from prunefront.config import ModelSpec, Site, describe_validation_error
from prunefront.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    PrunefrontError,
    UnknownNameError,
)
from prunefront.geometry import ModelGeometry, geometry_for, require_equal_blocks
from prunefront.registry import get_method
from prunefront.schedule import plan_schedule
from prunefront.training.data import check_dataset, dataset_info
from search.checkpoints import find_checkpoint
from search.documents import MeasureJob, SearchJob, TableJob
from service.problems import Problem, status_and_code
from service.settings import Settings
from store import NotFoundError, Store, StoreError

MAX_IMG_SIZE_PX = 4096
MAX_ARCHITECTURE_NUMBER = 65_536
MAX_DEPTH = 256

# Callables by name, and where weights come from; a job chooses an architecture and a registered checkpoint.
REFUSED_KWARGS = frozenset(
    {"self", "img_size", "num_classes", "in_chans", "weight_init", "fix_init", "dynamic_img_pad", "device", "dtype"}
)


@contextmanager
def naming_field(pointer: str) -> Iterator[None]:
    """Say in the problem document which part of the body an error is about."""
    try:
        yield
    except PrunefrontError as error:
        if isinstance(error, StoreError) and status_and_code(error)[0] == 503:
            raise  # no value of the body is at fault; the same body may work in a moment
        raise Problem.in_field(pointer, error) from error


def check_job(job: SearchJob | TableJob | MeasureJob, store: Store, settings: Settings) -> None:
    """Refuse a job that names something unknown or asks for something impossible.

    Raises:
        Problem: With the sentence, the code and the field at fault.
    """
    with naming_field("/device"):
        _check_device(job.device, store)
    if isinstance(job, MeasureJob):
        _check_measure(job, settings)
        return
    with naming_field("/model"):
        geometry = check_model(_spec_of(job))
        require_equal_blocks(geometry, job.model.name)
    if job.model.checkpoint is not None:
        with naming_field("/model/checkpoint"):
            _check_checkpoint(job.model.checkpoint, _spec_of(job), settings)
    if isinstance(job, SearchJob):
        _check_search(job, geometry, store)


def _check_search(job: SearchJob, geometry: ModelGeometry, store: Store) -> None:
    with naming_field("/dataset"):
        check_dataset(job.dataset, needs_train=job.budget.finetune_top > 0)
        _check_classes(job.dataset, geometry)
    for number, method in enumerate(job.space.methods):
        with naming_field(f"/space/methods/{number}"):
            _check_method(method, geometry)
    if job.space.locations != "any":
        for number, block in enumerate(job.space.locations):
            if block >= geometry.depth:
                with naming_field(f"/space/locations/{number}"):
                    raise ConfigError(
                        f"{job.model.name} has blocks 0 to {geometry.depth - 1}, but got {block}; name one of them."
                    )
    for number, other in enumerate(job.warm_start_from):
        with naming_field(f"/warm_start_from/{number}"):
            try:
                kind = store.get_job(other).kind
            except NotFoundError as error:
                raise UnknownNameError(
                    f"Unknown job {other!r}; warm_start_from takes ids of earlier searches."
                ) from error
            if kind != "search":
                raise ConfigError(f"Job {other!r} is a {kind} job, but warm_start_from takes ids of searches.")


def _check_method(name: str, geometry: ModelGeometry) -> None:
    method = get_method(name)
    if not geometry.has_class_token and set(method.ops) <= set(method.ranking_ops):
        # Nothing of it works on this model; the method itself says why, and what does.
        method.check_geometry(geometry, [Site(block=0, op=method.ops[0], keep_ratio=0.5)])


def _check_measure(job: MeasureJob, settings: Settings) -> None:
    spec = job.configs[0].model
    with naming_field("/configs/0/model"):
        geometry = check_model(spec)
    for number, config in enumerate(job.configs):
        with naming_field(f"/configs/{number}"):
            plan_schedule(config, geometry)
    if job.checkpoint is not None:
        with naming_field("/checkpoint"):
            _check_checkpoint(job.checkpoint, spec, settings)
    if job.dataset is not None:
        with naming_field("/dataset"):
            check_dataset(job.dataset)


def _spec_of(job: SearchJob | TableJob) -> ModelSpec:
    try:
        return job.model.spec()
    except ValidationError as error:
        raise ConfigError(f"model: {describe_validation_error(error)}.") from error


def _check_device(device: str, store: Store) -> None:
    known = [record.id for record in store.list_devices()]
    if device not in known:
        raise UnknownNameError.of(
            "device",
            device,
            known,
            hint="A device is known once a controller has run on its machine; GET /api/v1/devices lists them.",
        )


def check_model(spec: ModelSpec) -> ModelGeometry:
    """The geometry of a model that came from outside.

    Raises:
        UnknownNameError: If no such model or argument is known.
        ConfigError: If a number is beyond what any model needs.
        ModelError: If no method works on it.
    """
    # Only names of timm's own registry: its prefixes for files and hubs would let a job name paths and URLs.
    if not timm.is_model(spec.name.split(".")[0]) or ":" in spec.name or "/" in spec.name:
        raise UnknownNameError.of(
            "model", spec.name, timm.list_models(), hint="GET /api/v1/models lists those supported."
        )
    _check_kwargs(spec.kwargs)
    for side in (spec.img_size,) if isinstance(spec.img_size, int) else spec.img_size or ():
        if side > MAX_IMG_SIZE_PX:
            raise ConfigError(f"img_size may be {MAX_IMG_SIZE_PX} px at most, but got {side}; ask for a smaller image.")
    return geometry_for(spec)


@cache
def _architecture_kwargs() -> frozenset[str]:
    return frozenset(inspect.signature(VisionTransformer.__init__).parameters) - REFUSED_KWARGS


def _check_kwargs(kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if name not in _architecture_kwargs():
            raise UnknownNameError.of(
                "model argument", name, _architecture_kwargs(), hint="kwargs takes what shapes a VisionTransformer."
            )
        items = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, dict | list) for item in items) or len(items) > 16:
            raise ConfigError(f"The model argument {name!r} takes a number, a word or a short list of them.")
        limit = MAX_DEPTH if name == "depth" else MAX_ARCHITECTURE_NUMBER
        for item in items:
            if isinstance(item, int | float) and not abs(item) <= limit:
                raise ConfigError(f"The model argument {name!r} may be {limit} at most, but got {item}.")


def _check_checkpoint(checkpoint_id: str, spec: ModelSpec, settings: Settings) -> None:
    checkpoint = find_checkpoint(settings.checkpoints_dir, checkpoint_id)
    try:
        with safe_open(checkpoint.path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"Checkpoint {checkpoint_id!r} is not a readable safetensors file ({error}); save it again."
        ) from error
    expected = _weight_shapes(spec)
    surplus = sorted(found.keys() - expected.keys())
    if surplus:
        raise CheckpointError(
            f"Checkpoint {checkpoint_id!r} has {surplus[0]}, but {spec.name} has no such weights; name a checkpoint of "
            "this model."
        )
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(
                f"Checkpoint {checkpoint_id!r} lacks {name}, which {spec.name} needs; name a checkpoint of this model."
            )
        if found[name] != shape:
            raise CheckpointError(
                f"Checkpoint {checkpoint_id!r} has {name} of shape {list(found[name])}, but {spec.name} needs "
                f"{list(shape)}; name a checkpoint of this model, or set num_classes and img_size to its own."
            )


def _weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    import torch

    with torch.device("meta"):
        model = prunefront.create_dense(spec, pretrained=False)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_classes(dataset_id: str, geometry: ModelGeometry) -> None:
    num_classes = dataset_info(dataset_id).num_classes
    if num_classes is not None and geometry.num_classes != num_classes:
        raise DatasetError(
            f"Dataset {dataset_id!r} has {num_classes} classes, but the model tells {geometry.num_classes} apart; "
            "name a model or checkpoint trained on it, or set num_classes."
        )
