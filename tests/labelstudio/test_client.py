import base64
import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler

import pytest

from backend.errors import LabelStudioAuthError, LabelStudioError
from backend.labelstudio.client import LabelStudioClient, parse_origin
from tests.servers import http_server, reply

LEGACY = "0123456789abcdef0123456789abcdef01234567"


def jwt(**payload: object) -> str:
    body = base64.urlsafe_b64encode(json.dumps(payload).encode()).decode().rstrip("=")
    return f"eyJhbGciOiJIUzI1NiJ9.{body}.c2lnbmF0dXJl"


PAT = jwt(token_type="refresh", exp=9_999_999_999)


def test_a_legacy_token_is_sent_as_it_is() -> None:
    assert LabelStudioClient("http://ls:8080/", LEGACY).headers("http://ls:8080/data/x") == {
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
    assert LabelStudioClient("http://ls:8080", LEGACY).headers(url) == {}


def test_a_url_that_cannot_be_read_gets_nothing() -> None:
    with pytest.raises(ValueError, match=r"ls:8080\.evil"):
        LabelStudioClient("http://ls:8080", LEGACY).headers("http://ls:8080.evil/x")


def test_without_a_key_nothing_is_sent() -> None:
    assert LabelStudioClient("http://ls", "").headers("http://ls/x") == {}
    assert LabelStudioClient("", LEGACY).headers("http://ls/x") == {}


def test_ports_have_defaults() -> None:
    assert parse_origin("https://a/x") == parse_origin("https://a:443") == ("https", "a", 443)


def test_a_personal_access_token_is_exchanged_once_for_many_threads() -> None:
    access, asked = jwt(exp=time.time() + 300), []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append((handler.path, handler.rfile.read(int(handler.headers["Content-Length"]))))
        time.sleep(0.1)
        reply(handler, json.dumps({"access": access}).encode())

    found: list[dict[str, str]] = []
    with http_server(answer) as url:
        studio = LabelStudioClient(url, PAT)
        threads = [threading.Thread(target=lambda: found.append(studio.headers(f"{url}/a"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [{"Authorization": f"Bearer {access}"}] * 8
    assert [(path, json.loads(body)) for path, body in asked] == [("/api/token/refresh", {"refresh": PAT})]


def test_an_access_token_is_renewed_before_it_ends() -> None:
    tokens = iter([jwt(exp=time.time() + 30), jwt(exp=time.time() + 300)])
    with http_server(lambda handler: reply(handler, json.dumps({"access": next(tokens)}).encode())) as url:
        studio = LabelStudioClient(url, PAT)
        assert studio.headers(url) != studio.headers(url)
        assert studio.headers(url) == studio.headers(url)


@pytest.mark.parametrize(("good", "exchanges"), [("second", 2), ("none", 2)])
def test_a_token_that_is_refused_is_renewed_once(good: str, exchanges: int) -> None:
    asked: list[str] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/api/token/refresh":
            asked.append(handler.path)
            reply(handler, json.dumps({"access": ("first", "second")[len(asked) - 1]}).encode())
        elif handler.headers["Authorization"] == f"Bearer {good}":
            reply(handler, b'{"release": "1.23.2"}')
        else:
            reply(handler, b"{}", 401)

    with http_server(answer) as url, contextlib.suppress(LabelStudioAuthError):
        assert LabelStudioClient(url, PAT).get_version() == "1.23.2"
    assert len(asked) == exchanges


def test_a_refused_key_says_what_to_do_and_not_the_key() -> None:
    with http_server(lambda handler: reply(handler, b"{}", 401)) as url, pytest.raises(LabelStudioError) as caught:
        LabelStudioClient(url, PAT).headers(url)
    assert "make a new personal access token" in str(caught.value)
    assert PAT not in str(caught.value)


def test_an_answer_that_is_not_a_token_is_an_error() -> None:
    with (
        http_server(lambda handler: reply(handler, b"<html>")) as url,
        pytest.raises(LabelStudioError, match="no token"),
    ):
        LabelStudioClient(url, PAT).headers(url)


def test_a_closed_door_is_said() -> None:
    with pytest.raises(LabelStudioError, match="does not answer"):
        LabelStudioClient("http://127.0.0.1:1", PAT).headers("http://127.0.0.1:1/")


@pytest.mark.parametrize("token", ["opaque", "a.!.c", jwt(exp=None), jwt()])
def test_an_access_token_without_an_end_lasts_five_minutes(token: str) -> None:
    with http_server(lambda handler: reply(handler, json.dumps({"access": token}).encode())) as url:
        studio = LabelStudioClient(url, PAT)
        assert studio.headers(url) == studio.headers(url) == {"Authorization": f"Bearer {token}"}
