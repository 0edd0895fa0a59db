"""The `telemetry:` section of rewatch.yaml."""

from pydantic import BaseModel, ConfigDict, Field


class TelemetrySettings(BaseModel):
    """Whether and how often GPUs are read."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool | None = Field(
        None,
        description="Whether `rewatch up` runs the process that reads GPUs. Unset: where NVIDIA's driver is installed.",
    )
    every_s: float = Field(10.0, ge=1, le=3600, description="How often each GPU is read, seconds.")
