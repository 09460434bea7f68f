"""Runtimes: what runs a model's forward pass, as a callable from images to logits.

``eager`` is torch as it is; ``compile`` is torch.compile with static shapes, on the CPU with the weights packed into
the graph; ``cudagraph`` replays one recorded CUDA graph; ``onnxruntime`` runs the exported model. All but the first
prepare themselves on their first call, for the shape of that call, and refuse any other.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import math
import os
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunefront.cpuinfo import cpu_info
from prunefront.errors import ConfigError, ExportError, MissingExtraError, UnknownNameError
from prunefront.files import cache_folder

Forward = Callable[[Tensor], Any]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Runtimes that take seconds to prepare each forward, so that few are best measured.
SLOW_TO_PREPARE = ("compile", "onnxruntime")


def prepare(model: nn.Module | Forward, runtime: str, dtype: str, device: torch.device) -> Forward:
    """Make a model ready to run: eval mode, dtype and device, behind the runtime.

    A model that has the dtype and device already is run itself (and put into eval mode); any other is copied first.
    Call the result under `torch.inference_mode` (or `torch.no_grad`).

    Args:
        model: A model from images (B, C, H, W) to logits, or a part of one.
        runtime: One of `RUNTIMES`.
        dtype: One of `DTYPES`.
        device: Where to run.

    Raises:
        UnknownNameError: If the runtime or the dtype is unknown.
        ConfigError: If the runtime does not run on the device.
    """
    if runtime not in RUNTIMES:
        raise UnknownNameError.of("runtime", runtime, RUNTIMES, "Others can be imported as latency tables.")
    if dtype not in DTYPES:
        raise UnknownNameError.of("dtype", dtype, DTYPES)
    if isinstance(model, nn.Module):
        model = cast_modules([model], DTYPES[dtype], device)[0].eval()
    if device.type == "cpu":
        keep_freed_memory()
    return RUNTIMES[runtime](model, device)


def cast_modules(modules: Sequence[nn.Module], dtype: torch.dtype, device: torch.device) -> list[nn.Module]:
    """The modules in ``dtype`` on ``device``: themselves where they are so already, else copies.

    Modules that share parameters (compressed models of one dense model) share them in the copies too, so fifty
    candidates take the memory of one model.
    """

    def fits(module: nn.Module) -> bool:
        tensors = (*module.parameters(), *module.buffers())
        return all(t.device == device and (t.dtype == dtype or not t.is_floating_point()) for t in tensors)

    if all(fits(module) for module in modules):
        return list(modules)
    return [module.to(device=device, dtype=dtype) for module in copy.deepcopy(list(modules))]


# Parameters of mallopt(3), the largest threshold that it takes, and the variables by which users set them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_FROM_HEAP = 32 * 2**20
_MALLOC_VARIABLES = (
    "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES",
)  # fmt: skip


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep what activations leave free, rather than return it to the system after each layer.

    glibc takes large buffers from the system and returns them, and the kernel fills them page by page: 70 000 page
    faults, a tenth of the time, in a forward pass of DeiT-S on 16 images. Whether it does depends on what the process
    freed before, so two models in one process may differ by as much. The memory is used again by the next layer;
    ``malloc_trim`` gives it back. Buffers above 32 MiB, other C libraries, and settings by environment variables stay
    as they are.
    """
    if _user_sets_malloc():
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MOST_FROM_HEAP)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _user_sets_malloc() -> bool:
    return any(name in os.environ for name in _MALLOC_VARIABLES)


_LEAST_MAPPED = 64 * 2**10


class _Mallinfo2(ctypes.Structure):
    """mallinfo2(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Within, what a forward pass frees goes back to the system at once, so that resident memory is what is in use.

    Otherwise it also holds whatever the process freed before: the more models it has run, the more. Buffers from 64 KiB
    on are mapped one by one. Free places in the heap, which the C library would use first, are taken meanwhile; nobody
    writes to them, so they need no memory. Only with glibc 2.33 or later, and without settings by environment
    variables.
    """
    keep_freed_memory()
    library = ctypes.CDLL(None)
    trim = getattr(library, "malloc_trim", lambda _: None)
    if _user_sets_malloc() or not hasattr(library, "mallinfo2"):
        trim(0)
        yield
        return
    library.mallinfo2.restype, library.malloc.restype = _Mallinfo2, ctypes.c_void_p
    library.malloc.argtypes, library.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    taken: list[int] = []
    library.mallopt(_M_MMAP_THRESHOLD, _LEAST_MAPPED)
    try:
        size = 2**30
        while size >= _LEAST_MAPPED:
            num_mapped = library.mallinfo2().hblks
            place = library.malloc(size)
            if place is not None and library.mallinfo2().hblks == num_mapped:
                taken.append(place)
            else:
                library.free(place)
                size //= 2
        trim(0)
        yield
    finally:
        library.mallopt(_M_MMAP_THRESHOLD, _MOST_FROM_HEAP)
        for place in taken:
            library.free(place)


class FastestAttention:
    """Lets a model's attention run by the kernel that is fastest for a device and dtype.

    torch's flash kernel for CPUs is made for fp32 and for AMX. Elsewhere, in reduced precision, two products and a
    softmax take 0.55 to 0.75 of its time (DeiT-S, 197 tokens, AVX-512 with bf16). Logits may differ by rounding.

    Args:
        forward: A module whose attentions have timm's switch ``fused_attn``; nothing is switched in other callables.
    """

    def __init__(self, forward: nn.Module | Forward) -> None:
        modules = forward.modules() if isinstance(forward, nn.Module) else ()
        self._attentions = [module for module in modules if getattr(module, "fused_attn", False)]

    @contextlib.contextmanager
    def for_inputs(self, x: Tensor) -> Iterator[None]:
        """The kernel for inputs like ``x`` within, the model as it was after."""
        if x.device.type != "cpu" or x.dtype == torch.float32 or torch.cpu._is_amx_tile_supported():
            yield
            return
        self._set(False)
        try:
            yield
        finally:
            self._set(True)

    def _set(self, fused: bool) -> None:
        for attention in self._attentions:
            # A plain attribute; nn.Module's way to set one takes ten times as long, in every call of every model.
            vars(attention)["fused_attn"] = fused


def _require_same(x: Tensor, shape: torch.Size, dtype: torch.dtype, made: str) -> None:
    """Refuse images other than those that a forward was ``made`` for."""
    if x.shape != shape or x.dtype != dtype:
        raise ConfigError(
            f"{made} for images {tuple(shape)} in {dtype}, but got {tuple(x.shape)} in {x.dtype}; prepare another one."
        )


class EagerForward:
    """A forward as torch runs it, with the fastest attention kernel."""

    def __init__(self, forward: nn.Module | Forward, device: torch.device) -> None:
        self._forward = forward
        self._attention = FastestAttention(forward)

    def __call__(self, x: Tensor) -> Any:
        with self._attention.for_inputs(x):
            return self._forward(x)


class CompiledForward:
    """A forward compiled with static shapes as one graph, for the images of its first call; it refuses others.

    torch keeps compiled graphs by code object and, beyond eight, silently runs eagerly. Each forward therefore gets a
    code object of its own: the limit is never met, and no call tries the guards of other models first.
    """

    def __init__(self, forward: nn.Module | Forward, device: torch.device) -> None:
        def call(x: Tensor) -> Any:
            return forward(x)

        own = types.FunctionType(
            call.__code__.replace(co_name=f"forward_{id(self):x}"), call.__globals__, "forward", None, call.__closure__
        )
        self._attention = FastestAttention(forward)
        self._compiled = torch.compile(own, fullgraph=True, dynamic=False)
        self._is_cpu = device.type == "cpu"
        self._compiled_for: tuple[torch.Size, torch.dtype] | None = None

    def __call__(self, x: Tensor) -> Any:
        if self._compiled_for is None:
            outputs = self._compile(x)
            self._compiled_for = x.shape, x.dtype
            return outputs
        _require_same(x, *self._compiled_for, "This model was compiled")
        # torch would look at every weight of the model before each call, which is some percent of a small batch. There
        # is one graph, and the line above has checked what it depends on.
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
            return self._compiled(x)

    def _compile(self, x: Tensor) -> Any:
        """The first call."""
        # Freezing must be on while the graph is traced, not only among the compiler's options: else weights stay
        # inputs of the graph, nothing is packed, and torch does not say so. The wrapper around the kernels, in Python
        # by default, takes as long as some of them; optimising it like them takes g++ long, and gains nothing.
        options = {"freezing": self._is_cpu, "cpp_wrapper": self._is_cpu}
        if hasattr(torch._inductor.config, "cpp_wrapper_build_separate"):  # Not in every version of torch.
            options["cpp_wrapper_build_separate"] = self._is_cpu
        with (
            torch._inductor.config.patch(options),
            _fastest_linears(),
            self._attention.for_inputs(x),
        ):
            try:
                return self._compiled(x)
            except torch._dynamo.exc.UserError as error:
                raise ConfigError(
                    "torch cannot compile this model into one graph, since its token counts depend on the images; use "
                    "the runtime eager, or options of its method that fix the counts (spvit: mode=fixed)."
                ) from error
            except torch._dynamo.exc.TorchDynamoException as error:
                cause = getattr(error, "inner_exception", error)  # of a failed compilation
                if not isinstance(cause, torch._inductor.exc.InvalidCxxCompiler | torch._inductor.exc.TritonMissing):
                    raise
                what = "a C++ compiler (install g++)" if self._is_cpu else "Triton (pip install triton)"
                raise ConfigError(
                    f"The runtime compile needs {what}, which is not here; install it, or use the runtime eager."
                ) from error


@contextlib.contextmanager
def _fastest_linears() -> Iterator[None]:
    """Within, linear layers of graphs compiled for a CPU run by the library that is fastest on it.

    In fp32 torch takes MKL, which is slower than oneDNN on CPUs of AMD: with both changes below, DeiT-S on a Zen 3
    takes 0.97 of the time at batch 1 and 16, with EViT's pruning 0.93 and 0.98.
    """
    from torch._inductor.fx_passes import mkldnn_fusion

    packing = getattr(mkldnn_fusion, "CpuMkldnnDeviceOp", None)  # Not in every version of torch.
    if packing is None or cpu_info("vendor_id") != "AuthenticAMD":
        yield
        return
    # torch has no setting for it, but oneDNN is its only choice where weights are of reduced precision.
    own = {name: getattr(packing, name) for name in ("pack_linear_weight", "pack_linear")}
    for name, method in own.items():
        setattr(packing, name, _as_for_reduced_precision(method))
    # Without AVX-512, GELU within oneDNN's linear layer takes three times as long as torch's own after it.
    passes = {} if torch.cpu._is_avx512_supported() else {"post_grad_custom_pre_pass": _keep_gelu_apart}
    try:
        with torch._inductor.config.patch(passes):
            yield
    finally:
        for name, method in own.items():
            setattr(packing, name, method)


def _keep_gelu_apart(graph: torch.fx.Graph) -> None:
    """A pass over inductor's graph, after which it does not find GELU (by erf) to make it a part of a linear layer.

    There is no switch for that. The search is for this very factor; the next double is the same number in fp32.
    """
    factor = math.sqrt(0.5)
    for node in graph.nodes:
        if node.target is torch.ops.aten.mul.Tensor and node.args[1] == factor:
            node.update_arg(1, math.nextafter(factor, 1))


def _as_for_reduced_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda op, graph, is_reduced, *rest: method(op, graph, True, *rest)


class GraphedForward:
    """A forward recorded as one CUDA graph: a call copies the images in and replays all kernels by one launch."""

    def __init__(self, forward: nn.Module | Forward, device: torch.device) -> None:
        if device.type != "cuda":
            raise ConfigError(f"Runtime 'cudagraph' needs a CUDA device, but got {device}; use compile on a CPU.")
        self._forward = forward
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._images: Tensor | None = None
        self._output: Any = None

    def __call__(self, x: Tensor) -> Any:
        """Logits of ``x``; the tensor is overwritten by the next call."""
        if self._graph is None or self._images is None:
            self._record(x)
        assert self._graph is not None and self._images is not None
        _require_same(x, self._images.shape, self._images.dtype, "This CUDA graph was recorded")
        self._images.copy_(x)
        self._graph.replay()
        return self._output

    def _record(self, x: Tensor) -> None:
        self._images = x.clone()
        # Libraries pick their kernels and workspaces in the first runs, which must not be part of the graph.
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._forward(self._images)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = self._forward(self._images)


class OnnxForward:
    """A module exported to ONNX for the shape of its first call, and run by ONNX Runtime on the same device."""

    def __init__(self, forward: nn.Module | Forward, device: torch.device) -> None:
        if not isinstance(forward, nn.Module):
            raise ConfigError(f"Runtime 'onnxruntime' exports a torch module, but got {forward!r}. Pass the module.")
        if any(tensor.dtype == torch.bfloat16 for tensor in (*forward.parameters(), *forward.buffers())):
            raise ConfigError("ONNX Runtime cannot run bf16 models. Choose fp32 or fp16, or the runtime compile.")
        import_onnxruntime()
        self._module = forward
        self._device = device
        self._session: Any = None
        self._binding: Any = None
        self._stream: Any = None
        self._input = self._output = torch.empty(0)

    def __call__(self, x: Tensor) -> Any:
        """Outputs for ``x``; the tensor is overwritten by the next call."""
        if self._session is None:
            self._prepare(x)
        _require_same(x, self._input.shape, self._input.dtype, "This ONNX session was made")
        self._input = x.contiguous()  # held until the next call, as a GPU may read it later
        self._bind(self._binding.bind_input, "images", self._input)
        if self._stream is None:
            self._session.run_with_iobinding(self._binding)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            self._session.run_with_iobinding(self._binding)
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return self._output

    def _prepare(self, x: Tensor) -> None:
        from prunefront.export import frozen_copy, write_onnx

        dtype = next(name for name, value in DTYPES.items() if value == x.dtype)
        # Tensors made in inference mode cannot be traced.
        with torch.inference_mode(False), tempfile.TemporaryDirectory(prefix="prunefront-") as folder:
            path = Path(folder) / "model.onnx"
            write_onnx(frozen_copy(self._module, dtype), x.detach().cpu().clone(), path)
            if self._device.type == "cuda":
                self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._session = onnx_session(path, self._device, self._stream)
        self._input = x
        self._output = torch.empty_like(self._module(x))
        self._binding = self._session.io_binding()
        self._bind(self._binding.bind_output, "logits", self._output)

    def _bind(self, bind: Callable[..., None], name: str, tensor: Tensor) -> None:
        element = {torch.float32: np.float32, torch.float16: np.float16}[tensor.dtype]
        bind(name, self._device.type, self._device.index or 0, element, tuple(tensor.shape), tensor.data_ptr())


def import_onnxruntime() -> Any:
    """Return the package onnxruntime.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            "The runtime 'onnxruntime' needs a package that is not installed: pip install 'prunefront[export]'."
        ) from error
    return onnxruntime


def onnx_session(path: str | os.PathLike[str], device: torch.device, stream: Any = None) -> Any:
    """An ``InferenceSession`` of a file, with as many threads as torch uses, tuned for the latency of one call.

    Args:
        path: ONNX file.
        device: CPU, or a CUDA device.
        stream: CUDA stream to run on.

    Raises:
        MissingExtraError: If onnxruntime is not installed, or is a build without CUDA for a CUDA device.
        ExportError: If ONNX Runtime cannot load the file.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; its warnings are about placement that nobody chose
    # One operator after the other, each on all threads: a ViT is a chain, nothing in it could run side by side.
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads spin for the next operator, which is microseconds away (waking them for it costs DeiT-S 5 %), but not
    # after the call: they would take the CPU from what runs next, such as a model measured in turns with this one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Without an arena, activations go back after each call, as torch's do; the heap hands them out again as fast.
    options.enable_cpu_mem_arena = False
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise MissingExtraError(
                "The installed onnxruntime was built without CUDA: pip uninstall onnxruntime, then pip install "
                "onnxruntime-gpu."
            )
        cuda = {"device_id": str(device.index or 0)}
        if stream is not None:
            cuda["user_compute_stream"] = str(stream.cuda_stream)
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=providers)
    except Exception as error:  # its errors share no class below Exception
        raise ExportError(f"ONNX Runtime cannot run the exported model: {' '.join(str(error).split())}") from error


def use_shared_compile_cache() -> Path:
    """Point torch's compile cache at one folder per user, so that workers and later runs do not compile again.

    A folder chosen by the user (``TORCHINDUCTOR_CACHE_DIR``) is kept.
    """
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("inductor"))))


# Name -> what turns a ready model on a device into a forward of that runtime.
RUNTIMES: dict[str, Callable[[nn.Module | Forward, torch.device], Forward]] = {
    "eager": EagerForward,
    "compile": CompiledForward,
    "cudagraph": GraphedForward,
    "onnxruntime": OnnxForward,
}
