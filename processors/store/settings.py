"""The `clickhouse:` section of rewatch.yaml."""

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class ClickHouseSettings(BaseModel):
    """Where the store is and how to speak to it."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(
        "http://127.0.0.1:8123",
        pattern=r"^https?://[^/@\s]+(/[^\s?#]*)?$",
        description="ClickHouse's HTTP interface; user and password have settings of their own.",
    )
    user: str = "default"
    password: SecretStr | None = Field(None, description="By environment: REWATCH_CLICKHOUSE__PASSWORD.")
    database: str = Field(
        "rewatch",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Database of the tables; `rewatch migrate` makes it.",
    )
    connect_timeout_s: float = Field(5.0, gt=0, description="How long to wait for a connection, seconds.")
    read_timeout_s: float = Field(
        30.0,
        gt=0,
        description="How long to wait for an answer, seconds; then an insert is repeated under its token.",
    )
