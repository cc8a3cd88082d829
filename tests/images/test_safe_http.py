import ipaddress
import socket
from http.server import BaseHTTPRequestHandler

import pytest

from backend.errors import ImageError, SettingsError
from backend.images.safe_http import AllowedHosts, BlockedAddress, is_public, make_guarded_session
from backend.images.sources import ImageFetcher
from backend.labelstudio.client import LabelStudioClient
from tests.servers import http_server, send_reply


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.20.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::a9fe:a9fe", False),  # NAT64 of 169.254.169.254
        ("2002:7f00:1::", False),  # 6to4 of 127.0.0.1
        ("fec0::1", False),
        ("64:ff9b:1::7f00:1", False),
        ("::7f00:1", False),
        ("::ffff:0:7f00:1", False),
    ],
)
def test_is_public(address: str, expected: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is expected


@pytest.mark.parametrize(
    ("entry", "host", "port", "address", "expected"),
    [
        ("images.lan", "images.lan", 80, "10.0.0.5", True),
        ("images.lan", "Images.LAN", 8080, "10.0.0.5", True),
        ("images.lan:8080", "images.lan", 8080, "10.0.0.5", True),
        ("images.lan:8080", "images.lan", 6379, "10.0.0.5", False),
        ("10.1.0.0/16", "whatever", 80, "10.1.2.3", True),
        ("10.1.0.0/16", "whatever", 80, "10.2.2.3", False),
        ("10.1.2.3", "whatever", 80, "10.1.2.3", True),
        ("[fd00::5]:80", "fd00::5", 80, "fd00::5", True),
        ("fd00::/8", "x", 80, "fd00::5", True),
        ("images.lan", "evil.example", 80, "10.0.0.5", False),
    ],
)
def test_allowed_hosts(entry: str, host: str, port: int, address: str, expected: bool) -> None:
    assert AllowedHosts([entry]).is_allowed(host, port, ipaddress.ip_address(address)) is expected


@pytest.mark.parametrize("entry", ["10.0.0.0/99", "a/b", "host:http", ""])
def test_an_invalid_entry_is_refused(entry: str) -> None:
    with pytest.raises(SettingsError, match="ALLOWED_IMAGE_HOSTS"):
        AllowedHosts([entry])


def test_not_a_byte_is_sent_to_a_private_address() -> None:
    requested: list[str] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        requested.append(handler.path)
        send_reply(handler, b"secret")

    with http_server(answer) as url:
        for private_url in (url, url.replace("127.0.0.1", "localhost")):
            with pytest.raises(BlockedAddress):
                make_guarded_session(AllowedHosts([])).get(f"{private_url}/metadata", timeout=5)
        with pytest.raises(ImageError, match="ALLOWED_IMAGE_HOSTS"):
            ImageFetcher(LabelStudioClient("", ""), 10**6).fetch(f"{url}/a.png")
    assert requested == []


def test_dns_rebinding_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    port = 0

    def rebinding(host: str, *args: object, **kwargs: object) -> list:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    with http_server(lambda handler: send_reply(handler, b"secret")) as url:
        port = int(url.rsplit(":", 1)[1])
        monkeypatch.setattr(socket, "getaddrinfo", rebinding)
        with pytest.raises(BlockedAddress):
            make_guarded_session(AllowedHosts([])).get(f"http://rebind.example:{port}/", timeout=5)


def test_each_redirect_is_checked() -> None:
    requested: list[str] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        requested.append(handler.path)
        send_reply(handler, b"secret")

    with http_server(answer) as forbidden:
        redirecting = http_server(lambda handler: send_reply(handler, b"", 302, Location=f"{forbidden}/metadata"))
        with redirecting as allowed, pytest.raises(ImageError, match="private address"):
            ImageFetcher(LabelStudioClient(allowed, ""), 10**6).fetch(f"{allowed}/a.png")
    assert requested == []
