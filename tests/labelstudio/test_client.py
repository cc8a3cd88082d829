import base64
import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler

import pytest

from backend.errors import LabelStudioAuthError, LabelStudioError
from backend.labelstudio.client import LabelStudioClient, parse_origin
from tests.servers import http_server, send_reply

LEGACY = "0123456789abcdef0123456789abcdef01234567"


def make_jwt(**payload: object) -> str:
    body = base64.urlsafe_b64encode(json.dumps(payload).encode()).decode().rstrip("=")
    return f"eyJhbGciOiJIUzI1NiJ9.{body}.c2lnbmF0dXJl"


PAT = make_jwt(token_type="refresh", exp=9_999_999_999)


def test_a_legacy_token_is_sent_as_it_is() -> None:
    assert LabelStudioClient("http://ls:8080/", LEGACY).auth_headers("http://ls:8080/data/x") == {
        "Authorization": f"Token {LEGACY}"
    }


@pytest.mark.parametrize(
    "url",
    [
        "http://other/x",
        "https://ls:8080/x",
        "http://ls/x",
        "http://ls:8080@evil/x",
        "http://evil:1\\@ls:8080/x",
        "http://evil:1/@ls:8080/x",
        "http://evil:1#@ls:8080/x",
        "http://evil:1?@ls:8080/x",
    ],
)
def test_no_other_origin_gets_the_key(url: str) -> None:
    assert LabelStudioClient("http://ls:8080", LEGACY).auth_headers(url) == {}


def test_an_invalid_url_gets_no_key() -> None:
    with pytest.raises(ValueError, match=r"ls:8080\.evil"):
        LabelStudioClient("http://ls:8080", LEGACY).auth_headers("http://ls:8080.evil/x")


def test_without_a_key_nothing_is_sent() -> None:
    assert LabelStudioClient("http://ls", "").auth_headers("http://ls/x") == {}
    assert LabelStudioClient("", LEGACY).auth_headers("http://ls/x") == {}


def test_ports_have_defaults() -> None:
    assert parse_origin("https://a/x") == parse_origin("https://a:443") == ("https", "a", 443)


def test_a_personal_access_token_is_exchanged_once_for_many_threads() -> None:
    access, requests = make_jwt(exp=time.time() + 300), []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        requests.append((handler.path, handler.rfile.read(int(handler.headers["Content-Length"]))))
        time.sleep(0.1)
        send_reply(handler, json.dumps({"access": access}).encode())

    headers: list[dict[str, str]] = []
    with http_server(answer) as url:
        client = LabelStudioClient(url, PAT)
        threads = [threading.Thread(target=lambda: headers.append(client.auth_headers(f"{url}/a"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert headers == [{"Authorization": f"Bearer {access}"}] * 8
    assert [(path, json.loads(body)) for path, body in requests] == [("/api/token/refresh", {"refresh": PAT})]


def test_an_access_token_is_renewed_before_it_expires() -> None:
    tokens = iter([make_jwt(exp=time.time() + 30), make_jwt(exp=time.time() + 300)])
    with http_server(lambda handler: send_reply(handler, json.dumps({"access": next(tokens)}).encode())) as url:
        client = LabelStudioClient(url, PAT)
        assert client.auth_headers(url) != client.auth_headers(url)
        assert client.auth_headers(url) == client.auth_headers(url)


@pytest.mark.parametrize(("accepted_token", "exchanges"), [("second", 2), ("none", 2)])
def test_a_refused_token_is_renewed_once(accepted_token: str, exchanges: int) -> None:
    refreshes: list[str] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/api/token/refresh":
            refreshes.append(handler.path)
            send_reply(handler, json.dumps({"access": ("first", "second")[len(refreshes) - 1]}).encode())
        elif handler.headers["Authorization"] == f"Bearer {accepted_token}":
            send_reply(handler, b'{"release": "1.23.2"}')
        else:
            send_reply(handler, b"{}", 401)

    with http_server(answer) as url, contextlib.suppress(LabelStudioAuthError):
        assert LabelStudioClient(url, PAT).get_version() == "1.23.2"
    assert len(refreshes) == exchanges


def test_the_error_for_a_refused_key_says_what_to_do_without_the_key() -> None:
    with http_server(lambda handler: send_reply(handler, b"{}", 401)) as url, pytest.raises(LabelStudioError) as error:
        LabelStudioClient(url, PAT).auth_headers(url)
    assert "make a new personal access token" in str(error.value)
    assert PAT not in str(error.value)


def test_an_answer_that_is_not_a_token_is_an_error() -> None:
    with (
        http_server(lambda handler: send_reply(handler, b"<html>")) as url,
        pytest.raises(LabelStudioError, match="no token"),
    ):
        LabelStudioClient(url, PAT).auth_headers(url)


def test_a_refused_connection_is_an_error() -> None:
    with pytest.raises(LabelStudioError, match="does not answer"):
        LabelStudioClient("http://127.0.0.1:1", PAT).auth_headers("http://127.0.0.1:1/")


@pytest.mark.parametrize("token", ["opaque", "a.!.c", make_jwt(exp=None), make_jwt()])
def test_an_access_token_without_expiry_lasts_five_minutes(token: str) -> None:
    with http_server(lambda handler: send_reply(handler, json.dumps({"access": token}).encode())) as url:
        client = LabelStudioClient(url, PAT)
        assert client.auth_headers(url) == client.auth_headers(url) == {"Authorization": f"Bearer {token}"}
