"""The `gateway:` section of rewatch.yaml."""

from typing import ClassVar

from pydantic import Field

from streams.serving import EndpointSettings


class GatewaySettings(EndpointSettings):
    """The page and the API."""

    section: ClassVar[str] = "gateway"

    port: int = Field(default=8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    hosts: tuple[str, ...] = Field(
        default=(),
        description="Names under which browsers may reach it, besides its address and localhost; `*` is any. "
        "Without an api_key or jwt others are refused, or a page elsewhere could read yours by a name of its own.",
    )
    session_h: float = Field(
        default=12.0,
        gt=0,
        le=8760,
        description="How long a browser stays signed in, hours, or as long as its token; a new api_key signs all out.",
    )
    ingest_url: str | None = Field(
        default=None,
        pattern=r"^https?://[^/@\s]+$",
        description="Where uploads are passed on to; by default ingest.upload of this installation, on this machine.",
    )
    max_uploads: int = Field(default=64, ge=1, description="Uploads passed on at once; more are answered with 429.")
    upload_timeout_s: float = Field(
        default=60.0, gt=0, description="An upload whose body takes longer to arrive is answered with 408."
    )
