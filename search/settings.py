"""What the controller reads from the environment, and where the application keeps its files."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


def default_data_dir() -> Path:
    """``$XDG_DATA_HOME/prunefront``, or ``~/.local/share/prunefront``."""
    base = os.environ.get("XDG_DATA_HOME") or ""
    # The XDG rules say that a relative path there is to be ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".local" / "share"
    return root / "prunefront"


class StorageSettings(BaseSettings):
    """Settings that the service and the controller share, read from ``PRUNEFRONT_*``; keyword arguments win."""

    model_config = SettingsConfigDict(env_prefix="PRUNEFRONT_", extra="ignore", frozen=True)

    data_dir: Path = Field(default_factory=default_data_dir, description="Database, checkpoints, results and logs.")
    database_url: str = Field(default="", description="Empty is SQLite in data_dir.")

    @model_validator(mode="after")
    def _complete(self) -> StorageSettings:
        # Child processes may run elsewhere, so a relative folder is pinned down once.
        object.__setattr__(self, "data_dir", self.data_dir.expanduser().absolute())
        if not self.database_url:
            object.__setattr__(self, "database_url", f"sqlite:///{self.data_dir / 'prunefront.sqlite3'}")
        return self

    @property
    def checkpoints_dir(self) -> Path:
        """Where the files behind checkpoint ids lie."""
        return self.data_dir / "checkpoints"

    @property
    def artifacts_dir(self) -> Path:
        """The only folder that fine-tuned weights are served from."""
        return self.data_dir / "jobs"


class ControllerSettings(StorageSettings):
    """Settings of a controller process."""

    lease_s: float = Field(default=20.0, gt=1, description="A job whose controller is silent this long is taken over.")
    claim_interval_s: float = Field(default=0.5, gt=0, description="Seconds between looks for a job.")
    proposals_per_batch: int = Field(default=8, ge=1, description="Candidates evaluated in one task.")
    eval_batch_size: int = Field(default=64, ge=1, description="Images per forward pass when evaluating.")
    calibration_images: int = Field(default=256, ge=2, description="Images that PPT's thresholds are read off.")
    max_task_attempts: int = Field(default=3, ge=1, description="Tries of a task whose process was lost.")

    @property
    def engine_dir(self) -> Path:
        """Logs of tasks; shared by controllers that may succeed each other."""
        return self.data_dir / "engine"
