"""The settings: precedence, aliases, mistakes that name their fix, secrets that stay secret."""

import json
import operator
import os
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, SecretStr

from infra.cli.config import in_force
from infra.cli.main import main
from infra.config import ALIASES, ConfigError, Settings, known_settings, load
from infra.masks import MASK
from tests.infra.cli_kit import answer, invoke


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings but those of the test, in a directory without rewatch.yaml."""
    for name in [name for name in os.environ if name.startswith("REWATCH_") or name in ALIASES]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "rewatch.yaml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def test_a_typing_error_in_the_file_names_file_and_setting_and_what_is_near() -> None:
    write("kafka:\n  partitons: 64\n")
    with pytest.raises(ConfigError, match=r"rewatch\.yaml: kafka\.partitons: .*did you mean kafka\.partitions\?"):
        load()


def test_a_typing_error_in_the_environment_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWATCH_KAFKA__PARTITONS", "64")
    with pytest.raises(ConfigError, match=r"REWATCH_KAFKA__PARTITONS .*REWATCH_KAFKA__PARTITIONS\?"):
        load()


def test_environment_beats_alias_beats_file_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().llm.url == "http://127.0.0.1:8091"
    write("llm:\n  url: http://file:1\n")
    assert load().llm.url == "http://file:1"
    monkeypatch.setenv("NEMOTRON_URL", "http://alias:2")
    assert load().llm.url == "http://alias:2"
    monkeypatch.setenv("REWATCH_LLM__URL", "http://env:3")
    assert load().llm.url == "http://env:3"


def test_sources_are_merged_setting_by_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    write("kafka:\n  partitions: 8\n  system: home\n")
    monkeypatch.setenv("REWATCH_KAFKA__PARTITIONS", "32")
    kafka = load().kafka
    assert (kafka.partitions, kafka.system) == (32, "home")


def test_every_alias_names_a_setting() -> None:
    assert set(ALIASES.values()) <= set(known_settings())


@pytest.mark.parametrize(
    ("alias", "value"),
    [
        ("RTDETR_URL", "http://detector:8090"),
        ("RTDETR_MODEL_PATH", "/models/rtdetr"),
        ("RTDETR_CONFIDENCE", "0.6"),
        ("RTDETR_API_KEY", "key"),
        ("NEMOTRON_URL", "http://llm:8091"),
        ("NEMOTRON_MODEL_PATH", "/models/nemotron.gguf"),
        ("NEMOTRON_CONTEXT_SIZE", "8192"),
        ("NEMOTRON_GPU_LAYERS", "20"),
        ("NEMOTRON_API_KEY", "key"),
        ("LLAMA_SERVER_PATH", "/opt/llama-server"),
        ("TLS_MODE", "auto"),
        ("TLS_CERT_PATH", "/tls/cert.pem"),
        ("TLS_KEY_PATH", "/tls/key.pem"),
        ("TLS_MIN_VERSION", "1.3"),
    ],
)
def test_known_names_of_other_services_work(alias: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if alias.startswith("TLS_"):  # files are served whole or not at all
        for name, other in (("TLS_MODE", "auto"), ("TLS_CERT_PATH", "/c.pem"), ("TLS_KEY_PATH", "/k.pem")):
            monkeypatch.setenv(name, other)
    monkeypatch.setenv(alias, value)
    found = operator.attrgetter(ALIASES[alias])(load())
    assert str(found.get_secret_value() if isinstance(found, SecretStr) else found) == value


def test_an_address_that_somebody_set_is_not_started_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().local_llm
    monkeypatch.setenv("NEMOTRON_URL", "http://127.0.0.1:8091")
    settings = load()
    assert not settings.local_llm
    assert settings.local_kafka
    assert settings.local_clickhouse


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kafka: [", "not YAML"),
        ("just words", "must be a map of sections"),
        ("kafka:\n  partitions: many\n", r"kafka\.partitions: .*got 'many'"),
        ("windows:\n  idle_s: 200\n", "lower idle_s or raise max_s"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_clear_message(text: str, message: str) -> None:
    write(text)
    with pytest.raises(ConfigError, match=message):
        load()


def test_a_list_in_the_environment_that_is_no_json_says_how_to_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWATCH_WINDOWS__OPEN_ON", "person,car")
    with pytest.raises(ConfigError, match="as JSON"):
        load()


def test_a_file_that_was_named_must_be_there() -> None:
    with pytest.raises(ConfigError, match=r"other\.yaml: no such file \(--config\)"):
        load(Path("other.yaml"))


def test_an_empty_file_is_the_defaults() -> None:
    write("# nothing\n")
    assert load().kafka.partitions == 16


@pytest.mark.parametrize(
    "text",
    [
        "kafka:\n  sasl_password: 31337\n",
        "kafka:\n  sasl_password: [hunter2]\n",
        "llm:\n  api_key: {hunter2: 1}\n",
        # The section fails as a whole: its values are not repeated.
        "ingest:\n  upload:\n    api_key: hunter2\n    tls_cert_path: /c.pem\n",
    ],
)
def test_no_message_repeats_a_secret(text: str) -> None:
    write(text)
    with pytest.raises(ConfigError) as raised:
        load()
    assert "hunter2" not in str(raised.value)
    assert "31337" not in str(raised.value)


def test_show_masks_every_secret_and_names_where_each_setting_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        "kafka:\n  system: home\n  bootstrap_servers: kafka:9092\n"
        "  security_protocol: SASL_SSL\n  sasl_username: me\n  sasl_password: hunter2\n"
    )
    monkeypatch.setenv("NEMOTRON_API_KEY", "hunter2")
    monkeypatch.setenv("REWATCH_CLICKHOUSE__PASSWORD", "hunter2")
    for output in (invoke("config", "show").output, invoke("config", "show", "--json").output):
        assert "hunter2" not in output
    shown = {entry["setting"]: entry for entry in answer("config", "show")}
    assert shown["kafka.sasl_password"] == {"setting": "kafka.sasl_password", "value": MASK, "from": "rewatch.yaml"}
    assert shown["llm.api_key"]["from"] == "NEMOTRON_API_KEY"
    assert shown["clickhouse.password"]["from"] == "REWATCH_CLICKHOUSE__PASSWORD"
    assert shown["kafka.system"]["from"] == "rewatch.yaml"
    assert shown["kafka.partitions"] == {"setting": "kafka.partitions", "value": 16, "from": "default"}


def test_a_section_given_whole_in_the_environment_sets_only_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWATCH_KAFKA", '{"partitions": 32}')
    sources = {name: source for name, _, source in in_force(load())}
    assert (sources["kafka.partitions"], sources["kafka.system"]) == ("REWATCH_KAFKA", "default")


def test_a_password_inside_an_address_is_not_shown() -> None:
    write("images: s3://key:hunter2@bucket/images\n")
    assert "hunter2" not in invoke("config", "show", "--json").output


def test_the_schema_describes_every_section() -> None:
    result = invoke("config", "schema")
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    assert set(schema["properties"]) == set(Settings.model_fields)
    assert schema["additionalProperties"] is False


def test_every_setting_is_listed_once() -> None:
    sections = {
        name for name in known_settings() if isinstance(_kind(name), type) and issubclass(_kind(name), BaseModel)
    }
    assert [name for name, _, _ in in_force(load())] == [name for name in known_settings() if name not in sections]


def test_a_settings_error_ends_the_command_with_2_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write("kafka:\n  partitons: 64\n")
    monkeypatch.setattr(sys, "argv", ["rewatch", "status"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "settings: rewatch.yaml: kafka.partitons: there is no such setting; did you mean kafka.partitions?\n"
    )


def _kind(name: str) -> type:
    model: type = Settings
    for part in name.split("."):
        model = model.model_fields[part].annotation  # type: ignore[attr-defined]
    return model


def test_the_inbox_lies_with_the_data_unless_somebody_set_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load().ingest.folder.root == Path(".rewatch/inbox")
    monkeypatch.setenv("REWATCH_DATA_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("REWATCH_INGEST__FOLDER__STABLE_S", "1")
    assert load().ingest.folder.root == tmp_path / "site" / "inbox"
    assert load().ingest.folder.stable_s == 1
    monkeypatch.setenv("REWATCH_INGEST__FOLDER__ROOT", "/mnt/cameras")
    assert load().ingest.folder.root == Path("/mnt/cameras")
