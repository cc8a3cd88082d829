import base64
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from backend.errors import ImageError
from backend.images import sources as sources_module
from backend.images.sources import ImageFetcher
from backend.labelstudio.client import LabelStudioClient
from tests.servers import http_server, send_reply

TOKEN = "0123456789abcdef0123456789abcdef01234567"


def make_fetcher(url: str = "", root: str = "") -> ImageFetcher:
    return ImageFetcher(LabelStudioClient(url, TOKEN if url else ""), 1000, ["127.0.0.0/8"], root)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    (folder / "a b").mkdir(parents=True)
    (folder / "a b" / "ü.png").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "inner").symlink_to(folder / "a b" / "ü.png")
    (folder / "large").write_bytes(bytes(1001))
    return folder


@pytest.mark.parametrize("path", ["a b/ü.png", "a%20b/%C3%BC.png", "/a b/ü.png", "inner"])
def test_a_mounted_local_file_is_read_from_disk(root: Path, path: str) -> None:
    assert make_fetcher("http://ls", str(root)).fetch(f"/data/local-files/?d={path}").body == b"inside"


@pytest.mark.parametrize("path", ["../secret", "link", "%2e%2e/secret", "a b", "", "a b/../../secret", "none", "\0"])
def test_nothing_outside_of_the_mounted_folder_is_read(root: Path, path: str) -> None:
    with pytest.raises(ImageError, match=r"not a file inside of LOCAL_FILES|cannot be read"):
        make_fetcher("http://ls", str(root)).fetch(f"/data/local-files/?d={path}")


def test_a_large_local_file_is_refused(root: Path) -> None:
    with pytest.raises(ImageError, match="MAX_IMAGE_BYTES"):
        make_fetcher("http://ls", str(root)).fetch("/data/local-files/?d=large")


def test_a_local_file_that_is_not_mounted_comes_from_label_studio() -> None:
    requests: list[tuple[str, str | None]] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        requests.append((handler.path, handler.headers["Authorization"]))
        send_reply(handler, b"body")

    with http_server(answer) as url:
        make_fetcher(url).fetch("/data/local-files/?d=a/b.png")
    assert requests == [("/data/local-files/?d=a/b.png", f"Token {TOKEN}")]


@pytest.mark.parametrize("uri", ["s3://bucket/a b.png", "gs://bucket/ü.png", "azure-blob://box/a.png"])
def test_a_cloud_address_is_signed_by_label_studio_and_fetched_without_its_key(uri: str) -> None:
    requests: list[tuple[str, str | None]] = []

    def storage(handler: BaseHTTPRequestHandler) -> None:
        requests.append((handler.path, handler.headers["Authorization"]))
        send_reply(handler, b"body")

    with http_server(storage) as cloud:

        def label_studio(handler: BaseHTTPRequestHandler) -> None:
            url = urlsplit(handler.path)
            requests.append((url.path, handler.headers["Authorization"]))
            assert base64.urlsafe_b64decode(parse_qs(url.query)["fileuri"][0]).decode() == uri
            send_reply(handler, b"", 303, Location=f"{cloud}/signed?key=1")

        with http_server(label_studio) as url:
            assert make_fetcher(url).fetch(uri, task_id=7).body == b"body"
    assert requests == [("/tasks/7/presign/", f"Token {TOKEN}"), ("/signed?key=1", None)]


@pytest.mark.parametrize("uri", ["/data/upload/1/a.png", "/ls/data/upload/1/a.png"])
def test_label_studio_behind_a_path_prefix(uri: str) -> None:
    requests: list[str] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        requests.append(handler.path)
        send_reply(handler, b"body")

    with http_server(answer) as url:
        make_fetcher(f"{url}/ls/").fetch(uri)
    assert requests == ["/ls/data/upload/1/a.png"]


@pytest.mark.parametrize("path", ["/data/local-files", "/data/xx/", "/x/data/local-files/", "/data/local-files/../y"])
def test_only_the_route_of_local_files_is_read_from_disk(root: Path, path: str) -> None:
    with http_server(lambda handler: send_reply(handler, b"from Label Studio")) as url:
        assert make_fetcher(url, str(root)).fetch(f"{path}?d=inner").body == b"from Label Studio"


def test_an_image_is_requested_again_with_a_renewed_access_token() -> None:
    requests: list[tuple[str, str | None]] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        requests.append((handler.path, handler.headers["Authorization"]))
        if handler.path == "/api/token/refresh":
            send_reply(handler, b'{"access": "token%d"}' % len(requests))
        else:
            send_reply(handler, b"body", 401 if handler.headers["Authorization"] == "Bearer token1" else 200)

    with http_server(answer) as url:
        fetcher = ImageFetcher(LabelStudioClient(url, "a.b.c"), 1000, ["127.0.0.0/8"])
        assert fetcher.fetch("/data/upload/1/a.png").body == b"body"
    refresh = ("/api/token/refresh", None)
    upload = "/data/upload/1/a.png"
    assert requests == [refresh, (upload, "Bearer token1"), refresh, (upload, "Bearer token3")]


@pytest.mark.parametrize(("first_status", "expected_requests"), [(503, 2), (500, 2), (404, 1), (403, 1), (0, 2)])
def test_only_transient_errors_are_retried(
    first_status: int, expected_requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_module, "RETRY_DELAYS", (0.01, 0.01))
    requests: list[str] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        requests.append(handler.path)
        if len(requests) > 1:
            send_reply(handler, b"body")
        elif first_status:
            send_reply(handler, b"", first_status)
        else:
            handler.connection.close()  # a lost connection

    with http_server(answer) as url:
        if expected_requests == 2:
            assert make_fetcher().fetch(f"{url}/a.png").body == b"body"
        else:
            with pytest.raises(ImageError):
                make_fetcher().fetch(f"{url}/a.png")
    assert len(requests) == expected_requests


def test_a_permanent_failure_is_an_error_with_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "RETRY_DELAYS", (0.01, 0.01))
    with http_server(lambda handler: send_reply(handler, b"", 502)) as url, pytest.raises(ImageError, match="HTTP 502"):
        make_fetcher().fetch(f"{url}/a.png")


@pytest.mark.parametrize("uri", ["file:///etc/passwd", "ftp://x/a.png", "s3://bucket/a.png", "//host/a.png", "a.png"])
def test_other_addresses_are_refused(uri: str) -> None:
    with pytest.raises(ImageError, match="address must be"):
        make_fetcher().fetch(uri)
