"""The `detector:` section of rewatch.yaml."""

import ssl
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from streams.serving import EndpointSettings

DECODING_BYTES = 10
"""Of a pixel while its picture is decoded: Pillow's 4, and up to 6 more where it is converted to RGB (4) or libjpeg
keeps the coefficients of a progressive one (2 for each of 3 components)."""

DECODED_BYTES = 4
"""Of a pixel of a decoded picture: Pillow keeps RGB in 32 bits."""


class ModelError(RuntimeError):
    """The model cannot be loaded; the message names the setting and the fix."""


class ClientSettings(BaseModel):
    """How the service at `detector.url` is asked."""

    model_config = ConfigDict(extra="forbid")

    ca_path: Path | None = Field(None, description="Certificates (PEM) that the service's own may be signed by.")
    connect_timeout_s: float = Field(5.0, gt=0, description="A connection that takes longer is given up, seconds.")
    # A full batch of the largest model takes 20 s on two cores, and another may be before it. Longer than the service's
    # own deadline_s of 60: its 503, which says that it is busy, comes first. What is left is a service that hangs.
    read_timeout_s: float = Field(75.0, gt=0, le=100, description="An answer that takes longer is given up, seconds.")
    retries: int = Field(2, ge=0, le=5, description="How often a batch is sent again within seconds of a failure.")
    breaker_failures: int = Field(
        5, ge=1, description="After so many failures in a row nothing is asked for breaker_s; frames wait on the log."
    )
    breaker_s: float = Field(10.0, gt=0, le=600, description="So long, seconds; then one batch tries.")

    def trusted(self) -> ssl.SSLContext | bool:
        """Who may have signed the service's certificate, as httpx's `verify` takes it."""
        return ssl.create_default_context(cafile=self.ca_path) if self.ca_path is not None else True


class ServiceSettings(EndpointSettings):
    """The detector as a service of its own: `rewatch serve detector`."""

    section: ClassVar[str] = "detector.service"

    port: int = Field(default=8090, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    min_confidence: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Boxes of less are left out, unless a request says ?min_confidence=; below 0.1 there are none.",
    )
    max_bytes: int = Field(default=10_000_000, ge=1, description="Longest file, bytes; longer ones get 413.")
    max_pixels: int = Field(default=50_000_000, ge=1, description="Largest picture, width times height.")
    max_files: int = Field(default=256, ge=1, le=1000, description="Files of one batch; more get 413.")
    max_waiting: int = Field(
        default=256, ge=1, description="Pictures in hand at once, of all requests; more are answered with 429."
    )
    bodies_mb: int = Field(
        default=256, ge=1, description="Bodies of requests held at once, MB; more are answered with 429."
    )
    pixels_mb: int = Field(
        default=768, ge=1, description="Decoded pictures held at once, MB; what is beyond waits its turn."
    )
    timeout_s: float = Field(default=60.0, gt=0, description="A body that takes longer to arrive is answered with 408.")
    deadline_s: float = Field(
        default=60.0, gt=0, description="A request that the model has not answered by then gets 503, seconds."
    )
    # Containers are killed 10 s after SIGTERM, and the server itself may take some of them.
    drain_s: float = Field(
        default=5.0, ge=0, le=600, description="What is in hand at a stop has so long to be answered, seconds."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_waiting < self.max_files:
            raise ValueError("detector.service.max_waiting must be at least max_files, or no full batch is ever taken")
        if self.bodies_mb * 1_000_000 < 3 * self.max_bytes:
            raise ValueError("detector.service.bodies_mb must hold three times max_bytes: a file in base64 takes that")
        if self.pixels_mb * 1_000_000 < DECODING_BYTES * self.max_pixels:
            needed = -(-DECODING_BYTES * self.max_pixels // 1_000_000)
            raise ValueError(
                f"detector.service.pixels_mb must be at least {needed}: one picture of max_pixels takes that to decode"
            )
        return self


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
    runtime: Literal["auto", "torch", "openvino", "onnxruntime"] = Field(
        "auto",
        description="What runs the model: `auto` takes torch on a GPU, and on a CPU what is fastest on this machine.",
    )
    threads: int = Field(0, ge=0, description="CPU threads of the model; 0 leaves it to the runtime.")
    batch_size: int = Field(8, ge=1, le=256, description="Frames of all cameras that one inference takes at most.")
    wait_ms: float = Field(10.0, ge=0, description="How long a frame waits for others to share its inference, ms.")
    client: ClientSettings = ClientSettings()
    service: ServiceSettings = ServiceSettings()
