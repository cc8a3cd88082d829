"""A requests session for foreign URLs that refuses private addresses (SSRF protection).

The peer address of the open connection is checked, before a byte is sent. DNS rebinding (a name that resolves to
another address when used than when checked) therefore gains nothing, and each redirect is checked as a new connection.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError

from backend.errors import SettingsError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all public IPv6; other ranges may embed an IPv4 address
NAT64 = ipaddress.ip_network("64:ff9b::/96")
MAX_CONNECTIONS_PER_HOST = 32


class BlockedAddress(HTTPError):
    """A connection to an address that is neither public nor allowed."""


def is_public(address: Address) -> bool:
    """Returns whether an address is public; an IPv6 address that embeds an IPv4 one is judged by that."""
    if isinstance(address, ipaddress.IPv6Address):
        embedded = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in NAT64:
            embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if embedded:
            return is_public(embedded)
        return address.is_global and address in GLOBAL_UNICAST
    return address.is_global and not address.is_multicast


class AllowedHosts:
    """Hosts that may have private addresses: given by name (with or without a port), by address or by network."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """Reads the entries: each is a name, `name:port`, an address, or a network such as 10.1.0.0/16.

        Raises:
            SettingsError: an entry is none of these.
        """
        self._names: set[tuple[str, int | None]] = set()  # with None, any port is allowed
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for host in hosts:
            self._add(host.strip().lower())

    def _add(self, host: str) -> None:
        try:
            self._networks.append(ipaddress.ip_network(host.strip("[]")))
        except ValueError:
            name, colon, port = host.rpartition(":") if host.count(":") == 1 or "]:" in host else (host, "", "")
            if "/" in host or not (name or host) or (colon and not port.isdigit()):
                raise SettingsError(
                    f"ALLOWED_IMAGE_HOSTS: {host!r} is not a host name, an address or a network such as 10.1.0.0/16"
                ) from None
            self._names.add(((name or host).strip("[]"), int(port) if colon else None))

    def is_allowed(self, host: str, port: int, address: Address) -> bool:
        """Returns whether a connection to this host and port, which has this address, may be used."""
        is_named = not self._names.isdisjoint({(host.lower(), None), (host.lower(), port)})
        return is_public(address) or is_named or any(address in network for network in self._networks)


def make_guarded_session(allowed: AllowedHosts) -> requests.Session:
    """Makes a session in which connections to addresses that are not allowed raise `BlockedAddress`.

    Proxies and .netrc of the environment are ignored: they could add credentials or lead elsewhere.
    """
    session = requests.Session()
    session.trust_env = False
    adapter = _GuardedAdapter(allowed)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


class _GuardedAdapter(HTTPAdapter):
    def __init__(self, allowed: AllowedHosts) -> None:
        self._allowed = allowed
        super().__init__(pool_maxsize=MAX_CONNECTIONS_PER_HOST)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {
            "http": _guard_pool(HTTPConnectionPool, HTTPConnection, self._allowed),
            "https": _guard_pool(HTTPSConnectionPool, HTTPSConnection, self._allowed),
        }


def _guard_pool(pool_class: Any, connection_class: Any, allowed: AllowedHosts) -> Any:
    """Makes a subclass of a urllib3 pool whose connections check the peer address as soon as they are open."""

    class GuardedConnection(connection_class):  # type: ignore[misc]
        def _new_conn(self) -> socket.socket:
            connection: socket.socket = super()._new_conn()
            address = ipaddress.ip_address(connection.getpeername()[0].split("%")[0])  # without an IPv6 zone id
            if not allowed.is_allowed(self.host, self.port, address):
                connection.close()
                raise BlockedAddress(f"{self.host} is at a private address")
            return connection

    return type("GuardedPool", (pool_class,), {"ConnectionCls": GuardedConnection})
