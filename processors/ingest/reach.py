"""How cameras are connected to: never at addresses by which clouds hand out their machines' credentials.

A name is looked up here, once for each connection, and what is connected to is the very address that was looked at:
a name that answers otherwise the next moment (DNS rebinding) leads nowhere else.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx

# Where machines in clouds ask for credentials, beyond the link-local range: AWS by IPv6, Alibaba, Oracle, Azure.
_METADATA = frozenset(
    map(ipaddress.ip_address, ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"))
)

# IPv4 written as IPv6: NAT64 (RFC 6052) has it in the last four bytes.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class RefusedAddressError(Exception):
    """The host is at an address that is not asked; the message names it."""


def is_refused(address: str) -> bool:
    """Whether that is asked only where a setting says so: 169.254.0.0/16, fe80::/10, and clouds' metadata services."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if inner is None and found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
        if inner is not None:
            found = inner
    return found.is_link_local or found in _METADATA


class Reach(httpcore.AsyncNetworkBackend):
    """Connects where it may.

    Args:
        link_local: take every address.
    """

    def __init__(self, *, link_local: bool) -> None:
        self._link_local = link_local
        self._below = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """As httpcore's.

        Raises:
            RefusedAddressError: there is no address of the host that may be asked.
        """
        addresses = await _addresses(host, port, timeout)
        allowed = [address for address in addresses if self._link_local or not is_refused(address)]
        if not allowed:
            raise RefusedAddressError(", ".join(addresses))
        for address in allowed[:-1]:
            try:
                return await self._below.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self._below.connect_tcp(allowed[-1], port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        """As httpcore's."""
        await asyncio.sleep(seconds)


class CameraTransport(httpx.AsyncHTTPTransport):
    """httpx's transport over `Reach`.

    Args:
        reach: how to connect.
        verify: which certificates are taken.
        limits: how many connections.
    """

    def __init__(self, reach: Reach, *, verify: Any, limits: httpx.Limits) -> None:
        super().__init__(verify=verify, limits=limits, trust_env=False)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=verify,
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=reach,
        )


async def _addresses(host: str, port: int, timeout: float | None) -> list[str]:
    """The host's addresses, in the order in which they are to be tried."""
    try:
        async with asyncio.timeout(timeout):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except TimeoutError as error:
        raise httpcore.ConnectTimeout(f"no answer to who {host} is") from error
    except (OSError, UnicodeError) as error:
        raise httpcore.ConnectError(str(error)) from error
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
