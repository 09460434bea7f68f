"""Logs of a training in its output folder: ``log.csv``, ``log.txt`` as DeiT's scripts write it, and TensorBoard.

Both files are rewritten from the run's history after each epoch, so a resumed run never leaves an epoch twice.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunefront.errors import MissingExtraError
from prunefront.files import write_atomic

CSV_NAME = "log.csv"
JSON_NAME = "log.txt"
TENSORBOARD_NAME = "tensorboard"

# Our name -> DeiT's, and what ours is multiplied by. DeiT calls the images it validates on "test"; ours are the search
# split's.
_DEIT_NAMES = {
    "lr": ("train_lr", 1.0),
    "loss": ("train_loss", 1.0),
    "search_loss": ("test_loss", 1.0),
    "search_top1": ("test_acc1", 100.0),
    "search_top5": ("test_acc5", 100.0),
}


class RunLog:
    """The logs of one run."""

    def __init__(self, folder: Path, *, num_parameters: int, tensorboard: bool = False) -> None:
        """Open the logs.

        Args:
            folder: Output folder of the run.
            num_parameters: Of the model, for ``log.txt``.
            tensorboard: Whether to write events too, under ``tensorboard/``.

        Raises:
            MissingExtraError: If TensorBoard is wanted but not installed.
        """
        self._folder, self._num_parameters = folder, num_parameters
        self._events: Any = None
        self._num_seen: int | None = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingExtraError(
                    "TensorBoard is not installed: pip install tensorboard, or leave --tensorboard out."
                ) from error
            self._events = SummaryWriter  # opened with the first epoch, whose number it has to know

    def write(self, history: Sequence[Mapping[str, float]], seconds: Sequence[float], epoch_images: int) -> None:
        """Write the epochs so far.

        Args:
            history: One record per epoch.
            seconds: Time that training them took, without validation.
            epoch_images: Images that all processes train on in one epoch.
        """
        rows = [
            {**record, "seconds": duration, "images_per_s": epoch_images / max(duration, 1e-9)}
            for record, duration in zip(history, seconds, strict=True)
        ]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "epoch": int(row["epoch"])} for row in rows)
        write_atomic(self._folder / CSV_NAME, text.getvalue())
        write_atomic(
            self._folder / JSON_NAME, "".join(f"{json.dumps(self._like_deit(record))}\n" for record in history)
        )
        if self._events is not None:
            self._write_events(rows)

    def _like_deit(self, record: Mapping[str, float]) -> dict[str, float]:
        named = {theirs: record[ours] * factor for ours, (theirs, factor) in _DEIT_NAMES.items() if ours in record}
        return {**named, "epoch": int(record["epoch"]), "n_parameters": self._num_parameters}

    def _write_events(self, rows: Sequence[Mapping[str, float]]) -> None:
        if self._num_seen is None:
            self._num_seen = len(rows) - 1
            # Events of epochs that a killed run had written but not saved are hidden.
            self._events = self._events(str(self._folder / TENSORBOARD_NAME), purge_step=self._num_seen)
        for row in rows[self._num_seen :]:
            for name, value in row.items():
                if name != "epoch":
                    self._events.add_scalar(name, value, int(row["epoch"]))
        self._num_seen = len(rows)
        self._events.flush()
