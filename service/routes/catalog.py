"""What a job may name: models and checkpoints, methods, datasets."""

from __future__ import annotations

from functools import cache

import timm
from fastapi import APIRouter
from timm.models import is_model_pretrained

from prunefront.backbones import MODULES_OF_EQUAL_BLOCKS
from prunefront.errors import DatasetError
from prunefront.registry import get_method, list_methods
from prunefront.training.data import dataset_info, list_datasets
from search.checkpoints import list_checkpoints
from service.deps import SettingsDep
from service.schemas import (
    CheckpointPublic,
    DatasetPublic,
    Datasets,
    MethodPublic,
    Methods,
    ModelPublic,
    Models,
)

router = APIRouter(tags=["catalog"])


@router.get("/models", summary="List models and checkpoints")
def list_models(settings: SettingsDep) -> Models:
    checkpoints = [CheckpointPublic.model_validate(c) for c in list_checkpoints(settings.checkpoints_dir)]
    return Models(items=_models(), checkpoints=checkpoints)


@router.get("/methods", summary="List token-reduction methods")
def list_reduction_methods() -> Methods:
    return Methods(items=[_method(name) for name in list_methods()])


@router.get("/datasets", summary="List datasets")
def list_registered_datasets() -> Datasets:
    return Datasets(items=[_dataset(dataset_id) for dataset_id in list_datasets()])


@cache
def _models() -> list[ModelPublic]:
    # A model's module says what kind it is, without building all thousand of them.
    names = sorted(name for module in MODULES_OF_EQUAL_BLOCKS for name in timm.list_models(module=module))
    return [ModelPublic(name=name, is_pretrained=is_model_pretrained(name)) for name in names]


@cache
def _method(name: str) -> MethodPublic:
    method = get_method(name)
    return MethodPublic(
        name=name,
        title=method.title,
        paper=method.paper,
        ops=list(method.ops),
        options=method.parse_options({}),
        needs_class_token=set(method.ops) <= set(method.ranking_ops),
        needs_training=method.needs_training,
    )


def _dataset(dataset_id: str) -> DatasetPublic:
    try:
        info = dataset_info(dataset_id)
    except DatasetError as error:
        return DatasetPublic(id=dataset_id, num_classes=None, splits={}, problem=str(error))
    splits = {name: split.num_images for name, split in info.splits.items() if split is not None}
    return DatasetPublic(id=dataset_id, num_classes=info.num_classes, splits=splits, problem=None)
