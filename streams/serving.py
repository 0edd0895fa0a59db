"""HTTP endpoints of processes: a listening socket, serving until told to stop, and who may ask.

Ingest's uploads, the gateway's pages and every processor's metrics are served by this.
"""

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import h11
import uvicorn
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from uvicorn.protocols.http.h11_impl import H11Protocol

from streams.grants import JwtSettings

# Answers in hand get this long after a stop: as long as their transactions have, seconds.
_DRAIN_S = 5

# A head is a few hundred bytes: who needs longer for it, seconds, only holds a connection. Bodies have limits of
# their own, where they are read.
HEAD_S = 10.0

# What still comes of a body after its answer (a refusal: too long, too slow) is read for this long, seconds, so that
# the sender gets to see the answer; a connection that is cut at once loses it.
LINGER_S = 2.0


class SettingsError(Exception):
    """A setting cannot be used here; the message names it and the fix."""


class EndpointSettings(BaseModel):
    """Where an endpoint listens, and whom it lets in. Subclasses name their section and their default port."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)  # they hold secrets
    section: ClassVar[str]
    """The dotted name of the section, to be named in errors."""

    enabled: bool = True
    host: str = Field(
        default="127.0.0.1", description="Address to listen on; other than loopback needs an api_key or jwt."
    )
    port: int = Field(ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: SecretStr | None = Field(
        default=None,
        description="Asked for as `Authorization: Bearer` or `X-API-Key`. It belongs in the environment.",
    )
    jwt: JwtSettings = JwtSettings()
    tls: Literal["auto", "off"] = Field(
        default="auto", description="`auto` listens with TLS where a certificate is set."
    )
    tls_cert_path: Path | None = Field(default=None, description="PEM certificate chain: listen with TLS.")
    tls_key_path: Path | None = Field(default=None, description="PEM key of tls_cert_path.")
    tls_min_version: Literal["1.2", "1.3"] = Field(default="1.2", description="Oldest TLS that is spoken.")

    @model_validator(mode="after")
    def _open_to_others(self) -> Self:
        name = self.section
        if self.enabled and self.api_key is None and not self.jwt.enabled and not self.is_local:
            raise ValueError(
                f"{name}.host {self.host} can be reached by others: set {name}.api_key "
                f"({_variable(name)}__API_KEY) or {name}.jwt, or listen on 127.0.0.1",
            )
        if self.api_key is not None and not self.api_key.get_secret_value():
            raise ValueError(f"{name}.api_key is empty: set one, or leave it out")
        if (self.tls_cert_path is None) != (self.tls_key_path is None):
            raise ValueError(f"{name}.tls_cert_path and {name}.tls_key_path belong together: set both")
        return self

    @property
    def with_tls(self) -> bool:
        """Whether it listens with TLS."""
        return self.tls == "auto" and self.tls_cert_path is not None

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host).strip("[]")  # noqa: S104 (looked up, not bound)
        scheme = "https" if self.with_tls else "http"
        return f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return _is_loopback(self.host)


def by_web_page(headers: Mapping[str, str]) -> bool:
    """Whether a browser sent the request for a page of somewhere else. Cameras and programs send no Origin."""
    return "origin" in headers or headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers: stopping is the host's, by an event."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(H11Protocol):
    """HTTP/1.1 whose requests must come to an end: uvicorn itself waits for ever, be it one byte a minute."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait(HEAD_S)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._come()
        super().connection_lost(exc)

    def _look(self) -> None:
        """A part of a head, or a body that nobody reads any more, must end in time; drops of it win no time."""
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._wait(HEAD_S)
        elif self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY:
            self._wait(LINGER_S)
        else:
            self._come()

    def _wait(self, seconds: float) -> None:
        if self._late is None:
            self._late = self.loop.call_later(seconds, self.transport.abort)

    def _come(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def listen(settings: EndpointSettings) -> socket.socket:
    """The endpoint's socket, bound and listening.

    Raises:
        SettingsError: the address or port cannot be had; the certificate or its key, or the keys of its tokens, cannot
            be used.
    """
    from streams.admission import tokens_of  # noqa: PLC0415 (it stands above this module)

    # Here, where nothing runs yet: beside other tasks the error would come wrapped in their group's.
    if settings.with_tls:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # Without a password here, OpenSSL would ask for one on the terminal, and a service wait for ever.
            context.load_cert_chain(settings.tls_cert_path or "", settings.tls_key_path, password="")
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(
                f"{settings.section}.tls_cert_path or .tls_key_path cannot be used: {error}; both are PEM, the key is "
                "the certificate's own and has no password"
            ) from error
    tokens_of(settings)
    try:
        return bind(settings.host.strip("[]"), settings.port)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}; "
            f"set {settings.section}.port ({_variable(settings.section)}__PORT) to a free one",
        ) from error


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there, for uvicorn.

    Raises:
        OSError: the address or port cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=512)
    # Connections inherit it. asyncio does not set it on those of a listener that it did not make, and each answer
    # on a kept connection would wait 40 ms for an acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def serve(
    app: Callable[..., Any], settings: EndpointSettings, listener: socket.socket, stop: asyncio.Event
) -> None:
    """Serve an ASGI app on a socket of `listen` until `stop` is set; answers in hand then get 5 s to be finished.

    Raises:
        RuntimeError: the server ended by itself.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=30,  # cameras and scrapers come every few seconds: keep their connections
        timeout_graceful_shutdown=_DRAIN_S,
        ssl_certfile=settings.tls_cert_path if settings.with_tls else None,
        ssl_keyfile=settings.tls_key_path if settings.with_tls else None,
    )
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion[f"TLSv{settings.tls_min_version.replace('.', '_')}"]
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        server.should_exit = True
        await serving
        listener.close()
    if not stop.is_set():
        raise RuntimeError("the HTTP endpoint ended by itself")


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches an endpoint that listens on the address or name."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _variable(section: str) -> str:
    return f"REWATCH_{section.upper().replace('.', '__')}"
