"""The exceptions of prunefront.

PrunefrontError
├── ConfigError           a document (config, schedule, option) that cannot be right
├── ModelError            a model that a method does not support
├── UnknownNameError      a model, method, dataset, device, ... that nobody registered
├── CheckpointError       weights that do not fit, or a file that is not a checkpoint
├── InputError            images of the wrong shape
├── ExportError           a model that could not be exported, or whose file computes something else
├── DatasetError          a dataset that is missing, empty or does not fit the model
│   └── CorruptImageError     an image file that can be read but not decoded
├── MissingExtraError     a feature whose optional packages are not installed
└── FileWriteError        a file that could not be written; the old one is intact

``LatencyTableError`` (latency_tables) and ``StoreError`` (store) derive from the same root. Each also derives from
the built-in exception a caller would expect.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class PrunefrontError(Exception):
    """Root of everything prunefront raises on purpose; its text is one sentence for the user."""


class ConfigError(PrunefrontError, ValueError):
    """A config, schedule or option that cannot be right."""


class ModelError(PrunefrontError, ValueError):
    """A model that the method, or prunefront as a whole, does not support."""


class UnknownNameError(PrunefrontError, ValueError):
    """A name that nobody registered."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str], hint: str = "") -> UnknownNameError:
        """Build the sentence: what was asked for, what comes close, where the full list is."""
        choices = sorted(known)
        close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
        if close:
            rest = f"did you mean {' or '.join(repr(c) for c in close)}?"
        elif len(choices) <= 12:
            rest = f"known are {', '.join(choices)}." if choices else "none is registered."
        else:
            rest = f"{len(choices)} are known."
        return cls(f"Unknown {kind} {name!r}: {rest}{' ' + hint if hint else ''}")


class CheckpointError(PrunefrontError, ValueError):
    """Weights that do not fit the model, or a file that is not a checkpoint."""


class InputError(PrunefrontError, ValueError):
    """Images of a shape the model cannot take."""


class ExportError(PrunefrontError, RuntimeError):
    """A model that could not be exported, or whose exported file does not compute the same."""


class DatasetError(PrunefrontError, ValueError):
    """A dataset that is missing, empty or does not fit the model."""


class CorruptImageError(DatasetError):
    """An image file that can be read but not decoded.

    Attributes:
        image: Name of the file, or number of the image where images have no names.
        reason: What is wrong with it.
    """

    image: str = ""
    reason: str = ""

    @classmethod
    def of(cls, image: str, reason: str) -> CorruptImageError:
        """Build the sentence."""
        error = cls(
            f"The image {image!r} cannot be decoded: {reason}. Repair or remove that file, or skip such images."
        )
        error.image, error.reason = image, reason
        return error


class MissingExtraError(PrunefrontError, ImportError):
    """A feature whose optional packages are not installed."""


class FileWriteError(PrunefrontError, OSError):
    """A file that could not be written; whatever stood there before is intact."""

    def __str__(self) -> str:
        # Python would put the error number in front of the sentence.
        return self.strerror or super().__str__()


# How allocators say it in errors that share no class: torch's for CPUs (Linux, then Windows), CUDA, cuBLAS, ONNX
# Runtime, C++.
_NO_MEMORY = (
    "can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "Failed to allocate memory",
    "bad_alloc", "bad allocation",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory did not suffice, on a CPU or a GPU.

    So does one that such an error led to, as a compiler's or a CUDA graph's that wraps it. torch is told by the names
    of its errors: this module must not import it.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or type(seen).__name__ == "OutOfMemoryError":
            return True
        if isinstance(seen, OSError) and seen.errno == errno.ENOMEM:
            return True
        # Our own sentences speak of memory where nothing was allocated.
        if not isinstance(seen, PrunefrontError) and any(text in str(seen) for text in _NO_MEMORY):
            return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False
