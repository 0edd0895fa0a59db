"""The `detector:` section of rewatch.yaml."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class ModelError(RuntimeError):
    """The model cannot be loaded; the message names the setting and the fix."""


class DetectorSettings(BaseModel):
    """Which RT-DETRv2 runs, and on what."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model_path: str = Field(
        "demo",
        description="A directory or hub name that transformers' Auto classes load; `demo` is the model in the tree.",
    )
    url: str | None = Field(None, description="A detector service (POST /detect/batch) instead of a model in process.")
    api_key: SecretStr | None = Field(None, description="The service's key, by environment: RTDETR_API_KEY.")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0 leaves it to torch.")
    batch_size: int = Field(8, ge=1, le=256, description="Frames of all cameras that one inference takes at most.")
    wait_ms: float = Field(10.0, ge=0, description="How long a frame waits for others to share its inference, ms.")
