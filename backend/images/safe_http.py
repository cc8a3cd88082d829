"""A requests session that does not connect to private addresses: the door through which foreign URLs are fetched.

The address of the open connection is judged, before a byte is sent: a name that resolves to one address when it is
checked and to another when it is used gains nothing, and every redirect is a connection of its own.
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
UNICAST = ipaddress.ip_network("2000::/3")  # all that is given out of IPv6; other forms may carry an IPv4 address
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class BlockedAddress(HTTPError):
    """A connection to an address that is not for everyone."""


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet, also by way of the IPv4 address that an IPv6 one may carry."""
    if isinstance(address, ipaddress.IPv6Address):
        carried = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in NAT64:
            carried = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if carried:
            return is_public(carried)
        return address.is_global and address in UNICAST
    return address.is_global and not address.is_multicast


class AllowedHosts:
    """The hosts that may have any address: by name, by address or by network, some with their port alone."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """Each of `hosts` is a name, an address or a network such as 10.1.0.0/16; names may end in a port.

        Raises:
            SettingsError: one of them is none of these.
        """
        self._names: set[tuple[str, int | None]] = set()
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
                    f"ALLOWED_IMAGE_HOSTS: {host!r} is no host name, address or network such as 10.1.0.0/16"
                ) from None
            self._names.add(((name or host).strip("[]"), int(port) if colon else None))

    def __contains__(self, connection: tuple[str, int, Address]) -> bool:
        """Whether a host, the port of it and the address that it turned out to have may be connected to."""
        host, port, address = connection
        known = {(host.lower(), None), (host.lower(), port)} & self._names
        return is_public(address) or bool(known) or any(address in network for network in self._networks)


def make_guarded_session(allowed: AllowedHosts) -> requests.Session:
    """A session whose connections to other than public addresses raise BlockedAddress.

    It knows no proxies, no .netrc and no cookies: nothing of the environment may add credentials or lead elsewhere.
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
        super().__init__(pool_maxsize=32)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {
            "http": _pool(HTTPConnectionPool, HTTPConnection, self._allowed),
            "https": _pool(HTTPSConnectionPool, HTTPSConnection, self._allowed),
        }


def _pool(pool: Any, connection: Any, allowed: AllowedHosts) -> Any:
    class Guarded(connection):  # type: ignore[misc]
        def _new_conn(self) -> socket.socket:
            opened: socket.socket = super()._new_conn()
            address = ipaddress.ip_address(opened.getpeername()[0].split("%")[0])
            if (self.host, self.port, address) not in allowed:
                opened.close()
                raise BlockedAddress(f"{self.host} is at a private address")
            return opened

    return type("GuardedPool", (pool,), {"ConnectionCls": Guarded})
