"""What the controller reads from the environment, and where the application keeps its files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from prunefront.config import describe_validation_error
from prunefront.errors import ConfigError, FileWriteError

ENV_PREFIX = "PRUNEFRONT_"


def default_data_dir() -> Path:
    """``$XDG_DATA_HOME/prunefront``, or ``~/.local/share/prunefront``."""
    base = os.environ.get("XDG_DATA_HOME") or ""
    # The XDG rules say that a relative path there is to be ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".local" / "share"
    return root / "prunefront"


class StorageSettings(BaseSettings):
    """Settings that the service and the controller share, read from ``PRUNEFRONT_*``; keyword arguments win."""

    # A variable that is set to nothing counts as unset: an empty PRUNEFRONT_DATA_DIR is not the working folder.
    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="ignore", frozen=True)

    data_dir: Path = Field(default_factory=default_data_dir, description="Database, checkpoints, results and logs.")
    # It may hold a password.
    database_url: str = Field(default="", repr=False, description="Empty is SQLite in data_dir.")

    @model_validator(mode="after")
    def _complete(self) -> StorageSettings:
        # Child processes may run elsewhere, so a relative folder is pinned down once.
        object.__setattr__(self, "data_dir", self.data_dir.expanduser().absolute())
        if not self.database_url:
            # In a URL, these two would not mean themselves.
            path = str(self.data_dir / "prunefront.sqlite3").replace("%", "%25").replace("?", "%3F")
            object.__setattr__(self, "database_url", f"sqlite:///{path}")
        return self

    @classmethod
    def read(cls, **given: Any) -> Self:
        """Settings of the environment; what is given wins.

        Raises:
            ConfigError: If a value cannot be used, naming its variable.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            names = {f"{ENV_PREFIX}{item['loc'][0]}".upper(): None for item in error.errors() if item["loc"]}
            raise ConfigError(
                f"{', '.join(names)} cannot be used: {describe_validation_error(error)}. Correct or unset it."
            ) from error
        except RuntimeError as error:  # pathlib's, for a user without a home folder
            raise ConfigError(
                f"The data folder cannot be told ({str(error).rstrip('.')}). Name one with {ENV_PREFIX}DATA_DIR."
            ) from error

    def make_folders(self) -> None:
        """Create what does not exist yet.

        Raises:
            FileWriteError: If that is not possible.
        """
        try:
            self.checkpoints_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileWriteError(
                error.errno,
                f"The data folder {self.data_dir} cannot be made: {error.strerror}. "
                f"Name one that can with {ENV_PREFIX}DATA_DIR, for a demo with --out.",
            ) from error

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
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field(
        default="INFO", description="What the controller writes to stderr."
    )

    @field_validator("log_level", mode="before")
    @classmethod
    def _in_capitals(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @property
    def engine_dir(self) -> Path:
        """Logs of tasks; shared by controllers that may succeed each other."""
        return self.data_dir / "engine"

    def make_folders(self) -> None:
        super().make_folders()
        try:
            for folder in (self.engine_dir, self.artifacts_dir):
                folder.mkdir(exist_ok=True)
                # Logs and weights are written later, and far from here.
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except OSError as error:
            raise FileWriteError(
                error.errno,
                f"The controller cannot write to {folder}: {error.strerror}. "
                f"Free some space, let this user write there, or name another data folder with {ENV_PREFIX}DATA_DIR.",
            ) from error
