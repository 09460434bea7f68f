"""What can go wrong with measurements and tables.

PrunefrontError
├── LatencyTableError        a table that is malformed, made for something else, or lacks what is asked of it
│   ├── UnmeasuredTokensError  a schedule needs more or fewer tokens than the table was measured for
│   │   └── ExceedsMemoryError   a schedule needs what ran out of memory while the table was measured
│   └── DisturbedError         other processes take CPU from measuring, and did not end in time
└── MeasurementStoppedError  the caller's ``should_stop`` said so; finished entries are kept in the partial file
"""

from __future__ import annotations

from prunefront.errors import PrunefrontError


class LatencyTableError(PrunefrontError, ValueError):
    """A latency table that is malformed, was made for something else, or lacks what is asked of it."""


class UnmeasuredTokensError(LatencyTableError):
    """A schedule that needs more or fewer tokens than the table was measured for."""


class ExceedsMemoryError(UnmeasuredTokensError):
    """A schedule that needs what ran out of memory while the table was measured."""


class DisturbedError(LatencyTableError):
    """Measuring that was given up, as other processes took CPU from it and did not end in time."""


class MeasurementStoppedError(PrunefrontError, RuntimeError):
    """Measuring ended early because the caller asked for it; nothing is wrong."""
