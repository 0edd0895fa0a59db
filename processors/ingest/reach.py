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

# Where machines in clouds ask for credentials, beyond the link-local range: AWS by IPv6 (machines, pods), Google by
# IPv6, Alibaba, Oracle, Azure.
_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        ("fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"),
    )
)

# IPv4 written as IPv6 by NAT64: everybody's prefix (RFC 6052) has it in the last four bytes. Within a network's own
# (RFC 8215) the prefix may be 96, 64, 56 or 48 bits long, and which it is no address tells; byte 8 is left out.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NAT64_OWN = ipaddress.IPv6Network("64:ff9b:1::/48")
_INSIDE = (12, 13, 14, 15)
_INSIDE_OWN = (_INSIDE, (9, 10, 11, 12), (7, 9, 10, 11), (6, 7, 9, 10))


class RefusedAddressError(Exception):
    """The host is at an address that is not asked; the message names it."""


def is_refused(address: str) -> bool:
    """Whether that is asked only where a setting says so: 169.254.0.0/16, fe80::/10, and clouds' metadata services."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return any(one.is_link_local or one in _METADATA for one in (found, *_inside(found)))


def _inside(found: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that this may be another way to write."""
    if isinstance(found, ipaddress.IPv4Address):
        return []
    if (inner := found.ipv4_mapped or found.sixtofour) is not None:
        return [inner]
    places = _INSIDE_OWN if found in _NAT64_OWN else (_INSIDE,) if found in _NAT64 else ()
    return [ipaddress.IPv4Address(bytes(found.packed[at] for at in place)) for place in places]


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
