"""Exported models: ONNX files and ``torch.export`` programs, compared with the eager model before they are kept.

Token counts are the schedule's integers and fixed; the batch is of any size, or of one.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunefront.backbones.compressed import Compressed
from prunefront.checkpoints import CONFIG_KEY
from prunefront.errors import ConfigError, ExportError, InputError, MissingExtraError, UnknownNameError
from prunefront.files import replacing_by_name
from prunefront.geometry import geometry_of
from prunefront.ops import native
from prunefront.runtimes import DTYPES, import_onnxruntime, onnx_session
from prunefront.training.data import data_config_of

LEAST_OPSET, DEFAULT_OPSET = 18, 20
DATA_CONFIG_KEY = "prunefront_data_config"
# What rounding may do to an output, in units of the dtype's eps, of the largest output: 3e-5, 4e-3 and 3e-2 of it. In
# fp32 all of it comes from sums in another order: 8 units were seen (DeiT-S). In halves the last rounding counts most,
# as the file is also compared with what the same weights give in fp64: 0.7 units were seen. A reduction that was left
# out moved outputs by more than 20 units of fp16 (DeiT-S, the demo model, small models of all methods).
TOLERANCES = {
    dtype: units * torch.finfo(DTYPES[dtype]).eps for dtype, units in (("fp32", 256), ("fp16", 4), ("bf16", 4))
}

_DYNAMIC_BATCHES = (3, 1, 4)
LEAST_IMAGES = 8
_MOST_ONNX_BYTES = 2**31 - 2**24  # of one protobuf file, a little left for the graph
_NUDGES = 6
_NUDGE_EPS = 4  # of the dtype: a few roundings


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far the outputs of a file are from the eager model's, in the file's dtype or in fp64, whichever is nearer.

    Attributes:
        num_images: Images compared.
        num_clear: Those on which the eager model itself gives the same in the file's dtype and in fp64, for its median
            token where outputs are tokens. Where most images are clear, the file agrees on half of those within the
            tolerance; where few are, rounding chooses tokens too often to tell.
        largest_difference: Of any output value.
        tolerance: What outputs may differ by.
        own_rounding: The most that eager outputs move when pixels and what tokens are ranked by change by a few
            roundings. An image is allowed twice its own on top of the tolerance: where two tokens rank (almost) alike,
            rounding chooses, and other tokens stay.
    """

    num_images: int
    num_clear: int
    largest_difference: float
    tolerance: float
    own_rounding: float


@dataclass(frozen=True, kw_only=True)
class Exported:
    """One file that was written and agrees with the eager model; ``batch_size`` None is any."""

    path: Path
    dtype: str
    batch_size: int | None
    num_bytes: int
    agreement: Agreement


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    batch_size: int | None = None,
    dtype: str = "fp32",
    opset: int = DEFAULT_OPSET,
    images: Tensor | None = None,
) -> Exported:
    """Write a model as ONNX, input ``images`` and output ``logits``, once ONNX Runtime agrees with it on the CPU.

    The config of a compressed model and how images are prepared stand in the file's metadata (`CONFIG_KEY`,
    `DATA_CONFIG_KEY`), as JSON.

    Args:
        model: A timm model, compressed or not; it stays as it is.
        path: File to write; one that stands there is replaced only when all went well.
        batch_size: Of every call; None for any.
        dtype: ``fp32`` or ``fp16``, of weights, images and logits.
        opset: Version of ONNX's operators, 18 or later.
        images: What to compare on, (N, C, H, W), prepared as for the model; noise when left out.

    Raises:
        ConfigError: If images keep different numbers of tokens, or dtype, opset or batch size cannot be used.
        ExportError: If the exporter fails, or the file's logits are not the model's; no file is left.
        FileWriteError: If the file cannot be written.
        MissingExtraError: If onnx, onnxscript or onnxruntime is not installed.
    """
    require_onnx()
    ready = frozen_copy(model, dtype)
    batches = _batches(ready, batch_size, dtype, images)
    return export_part(ready, path, batches, dtype=dtype, opset=opset, is_dynamic=batch_size is None)


def export_part(
    part: nn.Module,
    path: str | os.PathLike[str],
    batches: Sequence[Tensor],
    *,
    names: tuple[str, str] = ("images", "logits"),
    dtype: str = "fp32",
    opset: int = DEFAULT_OPSET,
    is_dynamic: bool = False,
) -> Exported:
    """`export_onnx` for anything from one tensor to one tensor, ready in the dtype: a part of a latency table.

    Args:
        batches: What to compare on; the first one has the shape to export for.
        names: Of input and output.
        is_dynamic: Whether the first dimension may be of any size.
    """
    if dtype == "bf16":
        raise ConfigError(
            "ONNX Runtime cannot run bf16 models on a CPU, so such a file could not be checked. Export fp32 and let "
            "the engine convert (trtexec --bf16 of TensorRT 10), or write a torch.export program."
        )
    if opset < LEAST_OPSET:
        raise ConfigError(f"The ONNX opset must be {LEAST_OPSET} or later, but got {opset}. {DEFAULT_OPSET} is usual.")
    num_bytes = sum(tensor.nbytes for tensor in part.state_dict().values())
    if num_bytes > _MOST_ONNX_BYTES:
        raise ConfigError(
            f"One ONNX file holds at most 2 GiB, but the weights take {num_bytes / 2**30:.1f} GiB in {dtype}. "
            "Use fp16, or write a torch.export program."
        )
    with replacing_by_name(path) as temporary:
        write_onnx(part, batches[0], temporary, names=names, opset=opset, is_dynamic=is_dynamic)
        session = onnx_session(temporary, torch.device("cpu"))

        def run(x: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {names[0]: x.numpy()})[0])

        agreement = compare(run, part, batches, dtype)
        size = temporary.stat().st_size
    return Exported(
        path=Path(path), dtype=dtype, batch_size=None if is_dynamic else len(batches[0]), num_bytes=size,
        agreement=agreement,
    )  # fmt: skip


def export_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    batch_size: int | None = None,
    dtype: str = "fp32",
    images: Tensor | None = None,
) -> Exported:
    """Write a model as a ``torch.export`` program (``.pt2``), once it gives the eager model's logits when loaded.

    ``torch.export.load`` needs nothing of prunefront or timm to read it. The config of a compressed model and how
    images are prepared are extra files in it (``prunefront_config``, ``prunefront_data_config``), as JSON.

    Args:
        model: A timm model, compressed or not; it stays as it is.
        path: File to write; one that stands there is replaced only when all went well.
        batch_size: Of every call; None for any.
        dtype: ``fp32``, ``bf16`` or ``fp16``, of weights, images and logits.
        images: What to compare on, (N, C, H, W), prepared as for the model; noise when left out.

    Raises:
        ConfigError: If images keep different numbers of tokens, or dtype or batch size cannot be used.
        ExportError: If the exporter fails, or the file's logits are not the model's; no file is left.
        FileWriteError: If the file cannot be written.
    """
    ready = frozen_copy(model, dtype)
    batches = _batches(ready, batch_size, dtype, images)
    shapes = _dynamic_shapes(batch_size is None)
    with replacing_by_name(path) as temporary:
        with torch.no_grad():
            try:
                program = torch.export.export(ready, (batches[0],), dynamic_shapes=shapes, strict=False)
            except Exception as error:
                raise _failed("torch.export", error, batch_size is None) from error
        # By open files: by name, torch wants the suffix .pt2.
        with temporary.open("wb") as file:
            torch.export.save(program, file, extra_files=_metadata(ready))
        with temporary.open("rb") as file:
            loaded = torch.export.load(file).module()
        agreement = compare(loaded, ready, batches, dtype)
        size = temporary.stat().st_size
    return Exported(path=Path(path), dtype=dtype, batch_size=batch_size, num_bytes=size, agreement=agreement)


def write_onnx(
    module: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    names: tuple[str, str] = ("images", "logits"),
    opset: int = DEFAULT_OPSET,
    is_dynamic: bool = False,
) -> None:
    """Convert a module for inputs like ``example`` and write it, unchecked.

    Args:
        module: In eval mode, without gradients.
        is_dynamic: Whether the first dimension may be of any size; its name is ``batch``.

    Raises:
        ExportError: If the exporter fails.
        MissingExtraError: If onnx or onnxscript is not installed.
    """
    require_onnx()
    with torch.no_grad():
        try:
            program = torch.onnx.export(
                module,
                (example,),
                input_names=[names[0]],
                output_names=[names[1]],
                opset_version=opset,
                dynamo=True,
                verbose=False,
                dynamic_shapes=_dynamic_shapes(is_dynamic),
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
            )
        except Exception as error:
            raise _failed("torch.onnx", error, is_dynamic) from error
    assert program is not None
    program.model.metadata_props.update(_metadata(module))
    program.save(os.fspath(path))


def compare(run: Callable[[Tensor], Tensor], model: nn.Module, batches: Sequence[Tensor], dtype: str) -> Agreement:
    """Compare what ``run`` gives with the eager model, image by image.

    Every image may differ by what `Agreement` allows it. That is a lot where rounding chooses tokens, and would hide
    what a wrong file does, so half of the clear images have to agree without.

    Raises:
        ExportError: If they do not; the text has the largest difference.
    """
    eps = _NUDGE_EPS * torch.finfo(DTYPES[dtype]).eps
    generator = torch.Generator().manual_seed(0)
    exact = copy.deepcopy(model).double()
    differences, typicals, owns, moves, largest_output = [], [], [], [], 0.0
    # By torch's own operators, as in the file; what tokens are ranked by is nudged there too.
    with torch.inference_mode(), native.disabled():
        for x in batches:
            expected, unrounded, got = model(x), exact(x.double()), run(x)
            if got.shape != expected.shape:
                raise ExportError(
                    f"The exported file gives outputs of shape {tuple(got.shape)} where the model gives "
                    f"{tuple(expected.shape)}. It was not kept; try another format, and report it with the config."
                )
            moved = torch.zeros(len(x), dtype=torch.float64)
            for _ in range(_NUDGES):
                with _Nudged(eps, generator) as nudged:
                    moved = torch.maximum(moved, _distance(model(nudged.change(x)), expected)[0])
            moves.append(moved)
            owns.append(_distance(expected, unrounded)[1])
            difference, typical = map(torch.minimum, _distance(got, expected), _distance(got, unrounded))
            differences.append(difference)
            typicals.append(typical)
            largest_output = max(largest_output, float(expected.abs().max()))
    difference, typical, own, moved = (torch.cat(found) for found in (differences, typicals, owns, moves))
    tolerance = TOLERANCES[dtype] * largest_output
    # Written so that a NaN does not pass.
    differs, is_clear = ~(difference <= tolerance), own <= tolerance
    num_wrong = int((~(difference <= tolerance + 2.0 * moved)).sum())
    num_clear, num_unlike = int(is_clear.sum()), int((~(typical <= tolerance) & is_clear).sum())
    # Rounded up, since one image alone may be one where rounding chooses in the file only.
    is_unlike = 2 * num_clear > len(is_clear) and num_unlike > (num_clear + 1) // 2
    if num_wrong or is_unlike:
        raise ExportError(
            f"The exported file does not compute what the model does: on {int(differs.sum())} of {len(differs)} images "
            f"its outputs differ, by up to {float(difference.max()):.3g} where {tolerance:.3g} is rounding ({dtype}). "
            "It was not kept; try another --opset or format, and report it with the config."
        )
    return Agreement(
        num_images=len(difference), num_clear=num_clear, largest_difference=float(difference.max()),
        tolerance=tolerance, own_rounding=float(moved.max()),
    )  # fmt: skip


class _Nudged(TorchFunctionMode):
    """While active, what tensors are ranked by changes by about ``eps`` of itself, as if it were rounded otherwise."""

    _DECIDING = (Tensor.topk, Tensor.argsort, Tensor.sort, Tensor.max, Tensor.log_softmax)

    def __init__(self, eps: float, generator: torch.Generator) -> None:
        super().__init__()
        self._eps, self._generator = eps, generator

    def change(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self._generator)
        return (x.float() * (1.0 + self._eps * noise)).to(x.dtype)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._DECIDING or not args[0].is_floating_point():
            return func(*args, **(kwargs or {}))
        if func is Tensor.log_softmax:  # by the difference of two such scores tokens are ranked as well
            return self.change(func(*args, **(kwargs or {})))
        return func(self.change(args[0]), *args[1:], **(kwargs or {}))


def require_onnx() -> None:
    """Find out before the minutes of tracing whether ONNX files can be written and run.

    Raises:
        MissingExtraError: If they cannot.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"Writing ONNX needs the package {error.name}, which is not installed: pip install 'prunefront[export]'."
        ) from error
    import_onnxruntime()


def frozen_copy(module: nn.Module, dtype: str) -> nn.Module:
    """The module on the CPU in eval mode without gradients, for an exporter to take apart.

    Raises:
        ConfigError: If it is a compressed model whose images keep different numbers of tokens.
        UnknownNameError: If the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise UnknownNameError.of("dtype", dtype, DTYPES)
    if isinstance(module, Compressed):
        _require_fixed_counts(module)
    # Tensors made in inference mode cannot be traced; copies made outside of it can.
    with torch.inference_mode(False):
        ready = copy.deepcopy(module).to(device="cpu", dtype=DTYPES[dtype]).eval().requires_grad_(False)
    if callable(switch := getattr(ready, "set_grad_checkpointing", None)):
        switch(False)
    return ready


def _require_fixed_counts(model: Any) -> None:
    """Refuse models that remove different numbers of tokens from different images."""
    geometry = geometry_of(model)
    # Swin's tokens are masked then, not removed: shapes stay.
    if geometry.stages:
        return
    method, config = model._method, model.prune_config
    steps = [step for plan in model._blocks_plan for step in plan.steps]
    if not method.is_static(config.options, steps, geometry):
        raise ConfigError(
            f"{method.title} in mode {config.options['mode']!r} keeps another number of tokens in every image, which "
            "an exported graph cannot. Set the option mode to 'fixed', which keeps the schedule's numbers."
        )


def _batches(model: nn.Module, batch_size: int | None, dtype: str, images: Tensor | None) -> list[Tensor]:
    """Batches to compare on, of the fixed size or of several; the first one is exported with."""
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"The batch size must be 1 or more, but got {batch_size}.")
    size = data_config_of(model).input_size
    sizes = _DYNAMIC_BATCHES if batch_size is None else (batch_size,) * math.ceil(LEAST_IMAGES / batch_size)
    if images is None:
        images = torch.randn(sum(sizes), *size, generator=torch.Generator().manual_seed(0))
    elif tuple(images.shape[1:]) != size or len(images) < sizes[0]:
        raise InputError(
            f"Expected at least {sizes[0]} images of shape {size} to compare on, but got {tuple(images.shape)}. "
            "Prepare them as for the model."
        )
    return [batch.to(device="cpu", dtype=DTYPES[dtype]).contiguous() for batch in _split(images, sizes)]


def _split(images: Tensor, sizes: Sequence[int]) -> Iterator[Tensor]:
    first = 0
    for size in sizes:
        if first + size <= len(images):
            yield images[first : first + size]
            first += size


def _dynamic_shapes(is_dynamic: bool) -> tuple[dict[int, Any]] | None:
    return ({0: torch.export.Dim("batch", min=1, max=2**16)},) if is_dynamic else None


def _metadata(module: nn.Module) -> dict[str, str]:
    metadata = {}
    if isinstance(module, Compressed):
        metadata[CONFIG_KEY] = json.dumps(module.prune_config.to_dict())
    if hasattr(module, "pretrained_cfg"):
        metadata[DATA_CONFIG_KEY] = json.dumps(data_config_of(module).to_dict())
    return metadata


def _distance(got: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Largest difference of each image and, of outputs (B, N, C), that of its median token, both (B,).

    Parts of a table give their tokens in the order of their ranks, so two that rank alike may change places.
    """
    difference = (got.double() - expected.double()).abs()
    tokens = difference.flatten(2).amax(dim=2) if difference.ndim > 2 else difference.amax(dim=1, keepdim=True)
    return tokens.amax(dim=1), tokens.median(dim=1).values


def _failed(exporter: str, error: Exception, is_dynamic: bool) -> ExportError:
    reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
    advice = "Name a fixed batch size, or another format." if is_dynamic else "Try another format."
    return ExportError(f"{exporter} could not convert the model: {reason.rstrip('.')}. {advice}")


def _stable_sort(x: Any, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
    """Sorting for ONNX, whose TopK breaks ties by the lower index: stable. torch's exporter has no stable sort."""
    from onnxscript import opset18

    op: Any = opset18  # whose types ask for an element type of every tensor
    length = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, length, axis=dim, largest=int(descending), sorted=1)
