"""Exported files compute what the eager model does, for any batch, and carry their config; else there is no file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from prunefront import export
from prunefront.backbones.compressed import Compressed
from prunefront.checkpoints import CONFIG_KEY
from prunefront.compress import compress
from prunefront.config import ModelSpec, PruneConfig
from prunefront.errors import ConfigError, ExportError, InputError, MissingExtraError
from prunefront.export import DATA_CONFIG_KEY, compare, export_onnx, export_program
from tests.unit.library.models import build, config, schedules, small_spec

HYBRID = [
    {"block": 0, "op": "fuse", "keep_ratio": 0.8},
    {"block": 0, "op": "merge", "remove": 4},
    {"block": 2, "op": "prune", "tokens": 12},
]
SWIN = ModelSpec(
    name="swin_tiny_patch4_window7_224",
    kwargs={"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4},
    img_size=64,
    num_classes=7,
)
SWIN_SITES = [{"block": block, "op": "prune", "keep_ratio": 0.6} for block in (0, 2)]


def others() -> dict[str, PruneConfig]:
    """Backbones beside the plain ViT."""
    lvvit = ModelSpec(name="lvvit_t", kwargs={"embed_dim": 48, "depth": 4, "num_heads": 3}, img_size=64, num_classes=7)
    rotary = ModelSpec(
        name="eva02_tiny_patch14_224",
        kwargs={"embed_dim": 48, "depth": 4, "num_heads": 3, "patch_size": 8},
        img_size=48,
        num_classes=7,
    )
    return {
        "dense": config("hybrid", []),
        "distilled": config("hybrid", HYBRID, small_spec("deit_tiny_distilled_patch16_224")),
        "lvvit": config("hybrid", HYBRID, lvvit),
        "rotary": config("hybrid", HYBRID, rotary),
        "swin-kept": config("trilevel", SWIN_SITES, SWIN),
        "swin-masked": config("trilevel", SWIN_SITES, SWIN, tie="official"),
    }


# Of each method the schedule with most to it: what is left out runs the same operations.
NAMES = ["evit-fuse", "ppt-mixed", "tome", "diffrate", "dynamicvit", "spvit-fixed", "trilevel-attention", "hybrid"]
NAMES += others()


def model_of(config: PruneConfig) -> nn.Module:
    model = compress(build(config.model), config)
    # Selectors start with weights so small that all tokens score alike; these tell them apart.
    with torch.no_grad():
        for parameter in getattr(model, "score_predictor", nn.Module()).parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.2)
    return model


def pictures(model: Any, count: int = 5) -> Tensor:
    """Smooth shapes at different places: patches differ within an image, so what is dropped matters."""
    height, width = model.patch_embed.img_size
    generator = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    centre = torch.rand(count, 3, 2, generator=generator) * 1.6 - 0.8
    distance = (x - centre[..., :1, None]).square() + (y - centre[..., 1:, None]).square()
    return 4.0 * torch.exp(-6.0 * distance) - 1.0 + 0.1 * torch.randn(count, 3, height, width, generator=generator)


def run_onnx(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.parametrize("name", NAMES)
def test_every_method_and_backbone_exports_to_onnx(name: str, tmp_path: Path) -> None:
    model = model_of({**schedules(), **others()}[name]).eval()
    images = pictures(model)

    exported = export_onnx(model, tmp_path / "model.onnx", images=torch.cat((images, images.flip(0))))

    with torch.inference_mode():
        expected = model(images)
    torch.testing.assert_close(run_onnx(exported.path, images), expected, atol=1e-5, rtol=1e-4)
    assert exported.batch_size is None
    assert exported.agreement.num_images == 8
    assert exported.num_bytes == exported.path.stat().st_size


# The ONNX exporter traces with torch.export too, so only what is most unlike is run as a program.
@pytest.mark.parametrize("name", ["spvit-fixed", "trilevel-attention", "hybrid", "rotary", "swin-kept"])
def test_methods_and_backbones_export_to_a_program(name: str, tmp_path: Path) -> None:
    model = model_of({**schedules(), **others()}[name]).eval()
    images = pictures(model)

    exported = export_program(model, tmp_path / "model.pt2", images=torch.cat((images, images.flip(0))))

    with torch.inference_mode(), exported.path.open("rb") as file:
        torch.testing.assert_close(torch.export.load(file).module()(images), model(images), atol=1e-5, rtol=1e-4)


def test_a_file_carries_its_config_and_how_images_are_prepared(tmp_path: Path) -> None:
    config = schedules()["evit-fuse"]
    model = model_of(config)

    onnx_file = export_onnx(model, tmp_path / "model.onnx", batch_size=2).path
    extra = {CONFIG_KEY: "", DATA_CONFIG_KEY: ""}
    with export_program(model, tmp_path / "model.pt2", batch_size=2).path.open("rb") as file:
        torch.export.load(file, extra_files=extra)

    metadata = {prop.key: prop.value for prop in onnx.load(onnx_file).metadata_props}
    for found in (metadata, extra):
        assert PruneConfig.model_validate(json.loads(found[CONFIG_KEY])) == config
        assert json.loads(found[DATA_CONFIG_KEY])["input_size"] == [3, 48, 48]
    assert model.training is False and next(model.parameters()).requires_grad  # as they were


def test_a_fixed_batch_size_and_half_precision_are_those_of_the_file(tmp_path: Path) -> None:
    model = model_of(schedules()["tome"])

    exported = export_onnx(model, tmp_path / "model.onnx", batch_size=2, dtype="fp16", opset=18)

    graph = onnx.load(exported.path)
    (images,) = graph.graph.input
    assert [dim.dim_value for dim in images.type.tensor_type.shape.dim] == [2, 3, 48, 48]
    assert images.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert graph.opset_import[0].version == 18
    with torch.inference_mode():
        largest = model.eval()(torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(0))).abs().max()
    assert exported.agreement.tolerance == pytest.approx(4 * 2**-10 * float(largest), rel=0.01)


class Swapped(nn.Module):
    """A model with the first two classes swapped."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return torch.cat((logits[:, 1:2], logits[:, :1], logits[:, 2:]), dim=1)


def corrupted(model: nn.Module, corruption: str, dtype: str) -> nn.Module:
    """What a wrong exporter would write: the model without its last reduction, or with two logits swapped."""
    if corruption == "swapped":
        return Swapped(export.frozen_copy(model, dtype)).eval()
    assert isinstance(model, Compressed)
    config = model.prune_config
    less = compress(build(config.model), config.model_copy(update={"sites": config.sites[:-1]}))
    weights = model.state_dict()
    less.load_state_dict({name: weights[name] for name in less.state_dict()})
    return export.frozen_copy(less, dtype)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("name", "corruption"),
    [("evit-fuse", "swapped"), *((name, "missing") for name in ("evit-fuse", "spvit-fixed", "hybrid", "swin-kept"))],
)
def test_a_corrupted_onnx_file_is_refused_and_not_kept(
    name: str, dtype: str, corruption: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of({**schedules(), **others()}[name])
    wrong, convert = corrupted(model, corruption, dtype), export.write_onnx
    path = tmp_path / "model.onnx"
    path.write_bytes(b"what stood there")
    monkeypatch.setattr(export, "write_onnx", lambda _, *args, **kwargs: convert(wrong, *args, **kwargs))

    with pytest.raises(ExportError, match=r"on [5-8] of 8 images its outputs differ, by up to .* was not kept"):
        export_onnx(model, path, batch_size=4, dtype=dtype)

    assert path.read_bytes() == b"what stood there"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("corruption", ["missing", "swapped"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_corrupted_program_is_refused_and_not_kept(
    dtype: str, corruption: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(schedules()["evit-fuse"])
    wrong, convert = corrupted(model, corruption, dtype), torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda _, *args, **kwargs: convert(wrong, *args, **kwargs))

    with pytest.raises(ExportError, match="of 8 images its outputs differ"):
        export_program(model, tmp_path / "model.pt2", batch_size=4, dtype=dtype)

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "units"), [("fp32", 256), ("fp16", 4), ("bf16", 4)])
def test_the_tolerance_is_a_few_roundings_of_the_largest_output(dtype: str, units: int) -> None:
    x = torch.tensor([[0.125, -0.5], [0.25, 0.0625]]).to(export.DTYPES[dtype])
    eps = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}[dtype]

    agreement = compare(lambda x: x.double() + 0.9 * units * eps * 0.5, nn.Identity(), [x], dtype)

    assert agreement.tolerance == pytest.approx(units * eps * 0.5)
    # An identity moves as its input is nudged, which excuses more; but images that are clear have to do without.
    with pytest.raises(ExportError, match="on 2 of 2 images its outputs differ"):
        compare(lambda x: x.double() + 1.1 * units * eps * 0.5, nn.Identity(), [x], dtype)


def test_a_file_whose_outputs_have_another_shape_is_refused() -> None:
    with pytest.raises(ExportError, match=r"outputs of shape \(2, 2\) where the model gives \(2, 3\)"):
        compare(lambda x: x[:, :2], nn.Identity(), [torch.ones(2, 3)], "fp32")


def test_half_precision_computed_in_single_agrees() -> None:
    model = export.frozen_copy(model_of(schedules()["tome"]), "fp16")
    single = export.frozen_copy(model, "fp32")
    x = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(0)).half()

    agreement = compare(lambda x: single(x.float()), model, [x[:3], x[3:]], "fp16")

    assert agreement.num_images == agreement.num_clear == 8
    assert agreement.largest_difference < 0.5 * agreement.tolerance


class Largest(nn.Module):
    """The position of an image's largest pixel: which one that is jumps where two are alike."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).topk(1).indices.float()


def test_images_on_the_edge_of_a_choice_may_fall_either_way() -> None:
    alike, clear = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, 2.0, 1.0, 0.0])

    def other_choice(x: Tensor) -> Tensor:
        return 3.0 - Largest()(x)

    agreement = compare(other_choice, Largest(), [alike.reshape(1, 1, 2, 2)], "fp32")
    assert agreement.largest_difference == agreement.own_rounding == 1.0
    # Where every image is on the edge, it is no longer chance.
    with pytest.raises(ExportError, match="on 3 of 3 images its outputs differ"):
        compare(other_choice, Largest(), [alike.reshape(1, 1, 2, 2).repeat(3, 1, 1, 1)], "fp32")

    with pytest.raises(ExportError, match="on 1 of 1 images its outputs differ, by up to 1 where 3.05e-05 is rounding"):
        compare(other_choice, Largest(), [clear.reshape(1, 1, 2, 2)], "fp32")


def test_outputs_that_are_no_numbers_never_agree() -> None:
    with pytest.raises(ExportError, match="by up to nan"):
        compare(lambda x: x * torch.nan, nn.Identity(), [torch.ones(2, 1, 2, 2)], "fp32")


@pytest.mark.parametrize("name", ["spvit-adaptive", "spvit-bucketed"])
def test_ragged_models_are_refused_with_what_works(name: str, tmp_path: Path) -> None:
    model = model_of(schedules()[name])
    assert isinstance(model, Compressed)
    for write in (export_onnx, export_program):
        with pytest.raises(ConfigError, match="another number of tokens in every image.*mode to 'fixed'"):
            write(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_asked_for_is_refused(tmp_path: Path) -> None:
    model, path = build(small_spec()), tmp_path / "model.onnx"
    with pytest.raises(ConfigError, match="cannot run bf16 models on a CPU"):
        export_onnx(model, path, dtype="bf16")
    with pytest.raises(ConfigError, match="opset must be 18 or later, but got 17"):
        export_onnx(model, path, opset=17)
    with pytest.raises(ConfigError, match="batch size must be 1 or more, but got 0"):
        export_program(model, path, batch_size=0)
    with pytest.raises(InputError, match=r"at least 4 images of shape \(3, 48, 48\).*got \(2, 3, 48, 48\)"):
        export_program(model, path, batch_size=4, images=torch.zeros(2, 3, 48, 48))


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"needs the package onnxscript.*pip install 'prunefront\[export\]'"):
        export_onnx(build(small_spec()), tmp_path / "model.onnx")
