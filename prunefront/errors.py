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
