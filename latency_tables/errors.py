"""What can go wrong with measurements and tables.

PrunefrontError
├── LatencyTableError        a table that is malformed, made for something else, or lacks what is asked of it
└── MeasurementStoppedError  the caller's ``should_stop`` said so; finished entries are kept in the partial file
"""

from __future__ import annotations

from prunefront.errors import PrunefrontError


class LatencyTableError(PrunefrontError, ValueError):
    """A latency table that is malformed, was made for something else, or lacks what is asked of it."""


class MeasurementStoppedError(PrunefrontError, RuntimeError):
    """Measuring ended early because the caller asked for it; nothing is wrong."""
