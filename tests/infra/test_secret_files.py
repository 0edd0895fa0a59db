"""Secrets in files that the environment names: `REWATCH_GATEWAY__API_KEY_FILE=/run/secrets/gateway_api_key`."""

import os
from pathlib import Path

import pytest

from infra.config import ALIASES, ConfigError, load


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("REWATCH_") or name in ALIASES]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def secret(monkeypatch: pytest.MonkeyPatch, variable: str, text: str = "s3cret\n") -> Path:
    path = Path("a-secret").absolute()
    path.write_text(text)
    monkeypatch.setenv(variable, str(path))
    return path


@pytest.mark.parametrize("variable", ["REWATCH_GATEWAY__API_KEY_FILE", "rewatch_gateway__api_key_file"])
def test_a_secret_is_read_from_the_file_that_its_name_with_file_behind_it_names(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret(monkeypatch, variable)
    monkeypatch.setenv("REWATCH_GATEWAY__HOST", "0.0.0.0")
    gateway = load().gateway
    assert gateway.api_key is not None
    assert gateway.api_key.get_secret_value() == "s3cret"
    assert gateway.host == "0.0.0.0"


def test_the_names_of_other_services_and_of_cameras_have_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    secret(monkeypatch, "NEMOTRON_API_KEY_FILE")
    secret(monkeypatch, "REWATCH_INGEST__SNAPSHOTS__GATE__PASSWORD_FILE")
    monkeypatch.setenv("REWATCH_INGEST__SNAPSHOTS__GATE__URL", "http://gate.invalid/snap.jpg")
    settings = load()
    assert settings.llm.api_key is not None
    assert settings.llm.api_key.get_secret_value() == "s3cret"
    assert settings.ingest.snapshots["gate"].password.get_secret_value() == "s3cret"


def test_a_file_that_is_not_there_is_named_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWATCH_CLICKHOUSE__PASSWORD_FILE", "/nowhere/at-all")
    with pytest.raises(ConfigError, match=r"REWATCH_CLICKHOUSE__PASSWORD_FILE .*/nowhere/at-all: No such file"):
        load()


def test_a_secret_and_its_file_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    secret(monkeypatch, "REWATCH_CLICKHOUSE__PASSWORD_FILE")
    monkeypatch.setenv("REWATCH_CLICKHOUSE__PASSWORD", "another")
    with pytest.raises(ConfigError, match="both set") as error:
        load()
    assert "another" not in str(error.value)


@pytest.mark.parametrize("variable", ["REWATCH_KAFKA__BOOTSTRAP_SERVERS_FILE", "REWATCH_GATEWAY__APIKEY_FILE"])
def test_only_secrets_have_files(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret(monkeypatch, variable)
    with pytest.raises(ConfigError, match="no such setting"):
        load()


def test_an_error_in_a_secret_of_a_file_does_not_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    secret(monkeypatch, "REWATCH_GATEWAY__API_KEY_FILE", "\n")
    with pytest.raises(ConfigError, match=r"gateway\.api_key is empty"):
        load()
