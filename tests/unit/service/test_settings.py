"""Settings of the service: where data lies, and which addresses are safe to listen on."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunefront.errors import ConfigError
from search.settings import ControllerSettings, default_data_dir
from service.settings import Settings, is_loopback
from store.urls import describe, parse_url


def settings(**given: object) -> Settings:
    return Settings.model_validate({"data_dir": "/data", **given})


def test_database_is_sqlite_in_the_data_folder_unless_named() -> None:
    assert settings().database_url == "sqlite:////data/prunefront.sqlite3"
    assert settings(database_url="postgresql://db/x").database_url == "postgresql://db/x"


@pytest.mark.parametrize("kind", [Settings, ControllerSettings])
def test_settings_are_shown_without_the_database_url(kind: type[Settings] | type[ControllerSettings]) -> None:
    shown = kind.model_validate({"data_dir": "/data", "database_url": "postgresql://u:hunter2@db/x"})
    assert "hunter2" not in f"{shown!r} {shown}" and "/data" in repr(shown)


@pytest.mark.parametrize("folder", ["/we ird", "/50%20 ü", "/wh?t#", "/a@b:c"])
def test_database_lies_in_the_data_folder_whatever_its_name(folder: str) -> None:
    assert describe(parse_url(settings(data_dir=folder).database_url)) == f"{folder}/prunefront.sqlite3"


def test_a_variable_without_a_value_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA_DIR", "DATABASE_URL", "PORT"):
        monkeypatch.setenv(f"PRUNEFRONT_{name}", "")
    read = Settings.read()
    assert (read.data_dir, read.port) == (default_data_dir(), 8000)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PRUNEFRONT_LEASE_S", "long", "PRUNEFRONT_LEASE_S cannot be used: .*got 'long'"),
        ("PRUNEFRONT_LOG_LEVEL", "loud", "PRUNEFRONT_LOG_LEVEL cannot be used: .*'INFO'.*got 'LOUD'"),
        ("PRUNEFRONT_DATA_DIR", "~nobody-of-that-name/x", "data folder cannot be told .*PRUNEFRONT_DATA_DIR"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        ControllerSettings.read()


def test_log_levels_may_be_written_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEFRONT_LOG_LEVEL", "warning")
    assert ControllerSettings.read().log_level == "WARNING"


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
