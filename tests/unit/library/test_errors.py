from __future__ import annotations

import errno

import pytest
import torch

from prunefront.errors import ExportError, PrunefrontError, is_out_of_memory


def failed_allocation() -> Exception:
    """What torch's CPU allocator really raises."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


def wrapped(error: Exception) -> Exception:
    try:
        raise ExportError("ONNX Runtime cannot run the exported model.") from error
    except ExportError as outer:
        return outer


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        failed_allocation(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:93] . DefaultCPUAllocator: not enough memory: you tried to"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        wrapped(RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 9")),
        wrapped(failed_allocation()),
    ],
)
def test_a_lack_of_memory_is_recognised_whichever_allocator_says_so(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: device-side assert triggered"),
        OSError(errno.ENOSPC, "No space left on device"),
        PrunefrontError("Block 0 needs 'mlp' on 17 tokens, which ran out of memory at batch size 8."),
        wrapped(ValueError("of another shape")),
    ],
)
def test_other_errors_are_not_taken_for_a_lack_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)
