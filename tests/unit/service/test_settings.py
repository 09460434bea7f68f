"""Settings of the service: where data lies, and which addresses are safe to listen on."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunefront.errors import ConfigError
from search.settings import default_data_dir
from service.settings import Settings, is_loopback


def settings(**given: object) -> Settings:
    return Settings.model_validate({"data_dir": "/data", **given})


def test_database_is_sqlite_in_the_data_folder_unless_named() -> None:
    assert settings().database_url == "sqlite:////data/prunefront.sqlite3"
    assert settings(database_url="postgresql://db/x").database_url == "postgresql://db/x"


def test_data_folder_follows_xdg_and_ignores_a_relative_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/xdg")
    assert default_data_dir() == Path("/xdg/prunefront")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert default_data_dir() == Path.home() / ".local" / "share" / "prunefront"


def test_environment_is_read_with_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEFRONT_PORT", "8123")
    monkeypatch.setenv("PRUNEFRONT_ALLOWED_HOSTS", "lab.example, Other.example ")
    read = Settings()
    assert read.port == 8123
    assert {"lab.example", "other.example", "localhost", "127.0.0.1", "::1"} == read.accepted_hosts


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "[::1]", "localhost"])
def test_loopback_may_be_listened_on(host: str) -> None:
    assert is_loopback(host)
    settings(host=host).require_safe_bind()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "my-server", ""])
def test_other_addresses_are_refused_until_the_risk_is_accepted(host: str) -> None:
    with pytest.raises(ConfigError, match="PRUNEFRONT_ALLOW_NETWORK_ACCESS_WITHOUT_LOGIN"):
        settings(host=host).require_safe_bind()
    settings(host=host, allow_network_access_without_login=True).require_safe_bind()
