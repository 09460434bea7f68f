"""What the service reads from the environment: one class, every name prefixed ``PRUNEFRONT_``."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from prunefront.errors import ConfigError
from search.settings import StorageSettings

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


class Settings(StorageSettings):
    """Settings of the API process, read from ``PRUNEFRONT_*``; keyword arguments win over the environment."""

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65_535, description="0 takes any free port.")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Host names that requests may carry besides loopback, comma-separated."
    )
    allow_network_access_without_login: bool = Field(
        default=False,
        description="Listen on a non-loopback address although anybody who reaches it can submit and delete jobs.",
    )
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024, description="Largest request body, in bytes.")
    event_poll_s: float = Field(default=0.5, gt=0, description="Seconds between looks for new job events.")
    shutdown_grace_s: float = Field(default=20.0, gt=0, description="Seconds the controller gets to stop cleanly.")

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip().lower() for part in value.split(",") if part.strip())
        return value

    @property
    def accepted_hosts(self) -> frozenset[str]:
        """Values of the Host header, without port, that are answered."""
        return frozenset({*LOOPBACK_HOSTS, *self.allowed_hosts})

    def require_safe_bind(self) -> None:
        """Refuse to listen beyond this machine by accident.

        Raises:
            ConfigError: If the address is not loopback and nobody said that this is wanted.
        """
        if self.allow_network_access_without_login or is_loopback(self.host):
            return
        raise ConfigError(
            f"Listening on {self.host} would let everybody on the network submit and delete jobs, since there is no "
            "login; use 127.0.0.1 behind a reverse proxy that asks for one, or accept the risk with "
            "PRUNEFRONT_ALLOW_NETWORK_ACCESS_WITHOUT_LOGIN=true."
        )


def is_loopback(host: str) -> bool:
    """Whether an address to listen on reaches this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
