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
        "Without an api_key others are refused, or a page elsewhere could read yours by a name of its own.",
    )
