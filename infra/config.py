"""One validated `rewatch.yaml`: every section belongs to the room that reads it, and they meet here.

Order of precedence: REWATCH_<SECTION>__<NAME> in the environment, the names that people of other services know
(`ALIASES`), the file, the defaults. Secrets belong in the environment, or in files that it names: each secret's name
with _FILE behind it (REWATCH_GATEWAY__API_KEY_FILE), as container engines mount them.
"""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, Secret, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from infra.logs import LogSettings
from infra.retention.settings import RetentionSettings
from infra.tls import places
from processors.analyze.settings import LlmSettings
from processors.batch.settings import WindowsSettings
from processors.detect.settings import DetectorSettings
from processors.gateway.settings import GatewaySettings
from processors.ingest.settings import IngestSettings
from processors.store.settings import ClickHouseSettings
from processors.telemetry.settings import TelemetrySettings
from streams.kafka import KafkaSettings
from streams.scraping import MetricsSettings

ALIASES: dict[str, str] = {
    "RTDETR_URL": "detector.url",
    "RTDETR_MODEL_PATH": "detector.model_path",
    "RTDETR_CONFIDENCE": "windows.threshold",
    "RTDETR_API_KEY": "detector.api_key",
    "NEMOTRON_URL": "llm.url",
    "NEMOTRON_MODEL_PATH": "llm.model_path",
    "NEMOTRON_CONTEXT_SIZE": "llm.context_size",
    "NEMOTRON_GPU_LAYERS": "llm.gpu_layers",
    "NEMOTRON_API_KEY": "llm.api_key",
    "LLAMA_SERVER_PATH": "llm.server_path",
    "TLS_MODE": "ingest.upload.tls",
    "TLS_CERT_PATH": "ingest.upload.tls_cert_path",
    "TLS_KEY_PATH": "ingest.upload.tls_key_path",
    "TLS_MIN_VERSION": "ingest.upload.tls_min_version",
    "REWATCH_LOG_FORMAT": "log.format",
    "REWATCH_LOG_LEVEL": "log.level",
}
"""Environment names of the services that this product's users come from, short ones, and the settings they set."""


_PREFIX = "REWATCH_"


class ConfigError(ValueError):
    """The settings cannot be used; each line names a setting and the fix."""


class LocalSettings(BaseModel):
    """What `rewatch up` starts on this machine by itself. A service whose address is set elsewhere is not started."""

    model_config = ConfigDict(extra="forbid")

    kafka_port: int = Field(9092, ge=1, le=65535, description="Port of the embedded broker.")
    kafka_secure: bool = Field(
        False,
        description="Whether the embedded broker asks for TLS and a password, both made and kept in <data_dir>/tls. "
        "Without it every program on this machine may read and write the log.",
    )
    clickhouse_port: int = Field(8123, ge=1, le=65535, description="Port of the embedded ClickHouse engine.")
    llama_port: int = Field(8091, ge=1, le=65535, description="Port of the embedded llama.cpp server.")


class StageSettings(BaseModel):
    """How one stage is run."""

    model_config = ConfigDict(extra="forbid")

    host: Literal["faust", "raw"] = Field(
        "faust",
        description="What feeds it. Change it only with all members of the stage stopped: the two never share a group.",
    )
    processes: int = Field(1, ge=0, le=64, description="Processes that `rewatch up` starts.")


class ReplayStageSettings(BaseModel):
    """How replays and shadows are run, besides in every process of analyze."""

    model_config = ConfigDict(extra="forbid")

    host: Literal["raw"] = Field("raw", description="What feeds it: the same as beside analyze.")
    processes: int = Field(
        0,
        ge=0,
        le=64,
        description="Processes that `rewatch up` starts for it alone. Each process of analyze does its work too, and "
        "only there live windows come first.",
    )


class StagesSettings(BaseModel):
    """The topology table."""

    model_config = ConfigDict(extra="forbid")

    detect: StageSettings = StageSettings()
    batch: StageSettings = StageSettings()
    enrich: StageSettings = StageSettings()
    analyze: StageSettings = StageSettings()
    # Many partitions of many topics, thousands of records a second while it catches up: the raw host spends the
    # least on each (`make bench`: 15,100 records a second against 13,600 on Faust's).
    sink: StageSettings = StageSettings(host="raw")
    replay: ReplayStageSettings = ReplayStageSettings()


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        validate_default=True,
        hide_input_in_errors=True,  # a section's input holds its secrets
    )
    file: ClassVar[Path | None] = None
    _local: set[str] = PrivateAttr(default_factory=set)

    data_dir: Path = Field(Path(".rewatch"), description="Where everything local is kept.")
    time_zone: str = Field("UTC", description="IANA time zone of cameras that have none of their own.")
    images: str = Field("", description="Image store: a directory or an fsspec URL. Empty: <data_dir>/images.")
    kafka: KafkaSettings = KafkaSettings()
    clickhouse: ClickHouseSettings = ClickHouseSettings()
    detector: DetectorSettings = DetectorSettings()
    llm: LlmSettings = LlmSettings()
    windows: WindowsSettings = WindowsSettings()
    ingest: IngestSettings = IngestSettings()
    gateway: GatewaySettings = GatewaySettings()
    stages: StagesSettings = StagesSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    metrics: MetricsSettings = MetricsSettings()
    retention: RetentionSettings = RetentionSettings()
    log: LogSettings = LogSettings()
    local: LocalSettings = LocalSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment, aliases, files of secrets, file."""
        del dotenv_settings, file_secret_settings
        if isinstance(env_settings, EnvSettingsSource):  # else api_key_file would be taken for a setting of its own
            files = {variable.lower() for variable in _secret_files()}
            env_settings.env_vars = {name: v for name, v in env_settings.env_vars.items() if name not in files}
        sources: tuple[PydanticBaseSettingsSource, ...] = (
            init_settings,
            env_settings,
            _Aliases(settings_cls),
            _SecretFiles(settings_cls),
        )
        if cls.file is not None:
            sources += (YamlConfigSettingsSource(settings_cls, yaml_file=cls.file),)
        return sources

    @property
    def images_root(self) -> str:
        """The image store's root."""
        return self.images or str(self.data_dir / "images")

    def model_post_init(self, _: Any, /) -> None:
        """Services whose address nobody set are this machine's own, at the ports of `local:`.

        The inbox lies with the data unless somebody set it: two data directories never share one.
        """
        folder = self.ingest.folder
        if "root" not in folder.model_fields_set:
            folder = folder.model_copy(update={"root": self.data_dir / "inbox"})
            self.ingest = self.ingest.model_copy(update={"folder": folder})
        local = self.local
        for section, name, address in (
            ("kafka", "bootstrap_servers", f"127.0.0.1:{local.kafka_port}"),
            ("clickhouse", "url", f"http://127.0.0.1:{local.clickhouse_port}"),
            ("llm", "url", f"http://127.0.0.1:{local.llama_port}"),
        ):
            model: BaseModel = getattr(self, section)
            if name not in model.model_fields_set:
                self._local.add(section)
                setattr(self, section, model.model_copy(update={name: address}))

    @model_validator(mode="after")
    def _one_way_to_the_broker(self) -> Self:
        """Every client of a locked embedded broker is told how to open it; whoever asks for a lock gets one."""
        secure = self.local.kafka_secure
        if not self.local_kafka:
            if secure:
                raise ValueError(
                    "local.kafka_secure is about the embedded broker, and kafka.bootstrap_servers names another: "
                    "take one of them out, and set kafka.security_protocol to what that broker asks for"
                )
            return self
        given = self.kafka.model_fields_set & {"security_protocol", "sasl_username", "ssl_cafile", "ssl_certfile"}
        if given and (secure or self.kafka.security_protocol != "PLAINTEXT"):
            raise ValueError(
                f"kafka.{min(given)} is for a broker of yours (kafka.bootstrap_servers); "
                "the embedded one asks for TLS and a password with local.kafka_secure: true, and nothing else is set"
            )
        if secure:
            # Not validated: the files are there from the broker's first start on.
            self.kafka = self.kafka.model_copy(update=places.client_settings(self.data_dir))
        return self

    @property
    def local_kafka(self) -> bool:
        """Whether the embedded broker is used."""
        return "kafka" in self._local

    @property
    def local_clickhouse(self) -> bool:
        """Whether the embedded ClickHouse engine is used."""
        return "clickhouse" in self._local

    @property
    def local_llm(self) -> bool:
        """Whether the embedded llama.cpp server is used."""
        return "llm" in self._local


class _Aliases(PydanticBaseSettingsSource):
    """The well-known names in the environment, as a source of settings."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002 (the base's shape)
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        return _tree({path: os.environ[name] for name, path in ALIASES.items() if name in os.environ})


class _SecretFiles(PydanticBaseSettingsSource):
    """Secrets in files that the environment names, as a source of settings."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002 (the base's shape)
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        return _tree({path: _secret_in(variable) for variable, path in _secret_files().items()})


def _tree(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by their settings' dotted names, as nested sections."""
    found: dict[str, Any] = {}
    for path, value in values.items():
        *sections, setting = path.split(".")
        at = found
        for section in sections:
            at = at.setdefault(section, {})
        at[setting] = value
    return found


def _secret_files() -> dict[str, str]:
    """The variables that name a secret's file, and the setting of each."""
    found = {}
    for variable in os.environ:
        name = variable.upper()
        secret = name.removesuffix("_FILE")
        if secret == name:
            continue
        path = ALIASES.get(secret)
        if path is None and secret.startswith(_PREFIX):
            path = secret.removeprefix(_PREFIX).lower().replace("__", ".")
        if path is not None and _is_secret(path):
            found[variable] = path
    return found


def _secret_in(variable: str) -> str:
    """What is in the file that a variable names, without the end of its line."""
    try:
        return Path(os.environ[variable]).read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no text"
        raise ConfigError(f"{variable} (environment): {os.environ[variable]}: {why}") from error


def load(file: Path | None = None) -> Settings:
    """The settings in force.

    `file` is a path that a person named; without one `rewatch.yaml` in the working directory is read if it is there.

    Raises:
        ConfigError: what is wrong, a line each, naming the setting and the fix.
    """
    if file is not None and not file.exists():
        raise ConfigError(f"{file}: no such file (--config)")
    default = Path("rewatch.yaml")
    chosen = file or (default if default.exists() else None)
    if chosen is not None:
        _check_file(chosen)
    _check_environment()
    bound = type("Settings", (Settings,), {"file": chosen, "__doc__": Settings.__doc__})
    try:
        return bound()  # type: ignore[no-any-return]
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, chosen) for problem in error.errors())) from error
    except SettingsError as error:  # a list or map in the environment that is no JSON
        raise ConfigError(f"{error}; write lists and maps as JSON: REWATCH_WINDOWS__OPEN_ON='[\"person\"]'") from error


def known_settings(model: type[BaseModel] = Settings, prefix: str = "") -> list[str]:
    """Every setting's dotted name."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += known_settings(kind, f"{prefix}{name}.")
    return names


def _check_file(file: Path) -> None:
    try:
        tree = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror} (--config)") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not YAML: {error}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{file}: must be a map of sections, as `kafka:` with its settings indented below")


def _check_environment() -> None:
    """A misspelt name in the environment would set nothing, silently."""
    known = [_PREFIX + name.upper().replace(".", "__") for name in known_settings()]
    # What lies below a setting that is a map is a person's own naming: REWATCH_INGEST__FOLDER__CAMERAS__DRIVEWAY.
    leaves = tuple(f"{name}__" for name in known if not any(other.startswith(f"{name}__") for other in known))
    files = _secret_files()
    problems = [
        f"{variable} and {secret} (environment) are both set: keep one"
        for variable in files
        if (secret := variable[: -len("_FILE")]) in os.environ
    ]
    for variable in os.environ:
        name = variable.upper()
        if variable in files:
            continue
        if name.startswith(_PREFIX) and name not in known and name not in ALIASES and not name.startswith(leaves):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else "`rewatch config show` lists all"
            problems.append(f"{variable} (environment): there is no such setting; {hint}")
    if problems:
        raise ConfigError("\n".join(problems))


def _explain(problem: Any, file: Path | None) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    where = f"{file}: " if file is not None else ""
    if not path:  # what sections say of one another names its settings itself
        return f"{where}{problem['msg']}"
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path, {*known_settings(), *_beside(path)}, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "`rewatch config show` lists all"
        return f"{where}{path}: there is no such setting; {hint}"
    got = problem["input"]
    # A section's values are not repeated, and a secret's never: this goes to terminals and logs. What stands where a
    # map should may be an address with a password.
    hidden = _is_secret(path) or (isinstance(got, str) and "://" in got)
    shown = f" (got {got!r})" if isinstance(got, str | int | float) and not hidden else ""
    return f"{where}{path}: {problem['msg']}{shown}"


def _is_secret(path: str) -> bool:
    annotation = _reached(path)
    kinds = (annotation, *get_args(annotation))
    return any(isinstance(kind, type) and issubclass(kind, Secret | SecretStr) for kind in kinds)


def _beside(path: str) -> list[str]:
    """The settings beside this one, where a person's own name is above them: `ingest.snapshots.driveway.url`."""
    above = path.rpartition(".")[0]
    section = _reached(above)
    is_section = isinstance(section, type) and issubclass(section, BaseModel)
    return [f"{above}.{name}" for name in section.model_fields] if is_section else []


def _reached(path: str) -> Any:
    """The type of a setting, or of what is above it where there is none of that name."""
    annotation: Any = Settings
    for part in path.split("."):
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(part)
            if field is None:
                break
            annotation = field.annotation
        elif get_origin(annotation) is dict:  # `part` is a person's own name: what counts is what it names
            annotation = get_args(annotation)[1]
        else:
            break
    return annotation
