"""Who may call, and with what: a secret in the path, which Label Studio carries on every call, and basic auth.

Label Studio sends no credentials on webhooks, so basic auth alone leaves that one route open.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable
from typing import Any

from flask import request

from backend.errors import BadRequest, Unauthorized
from backend.settings import Settings

PROBES = ("/health", "/ready")  # of what runs containers; they tell nothing
OPEN_ROUTES = (*PROBES, "/webhook")  # without credentials


class SecretPathMiddleware:
    """WSGI middleware: what is not below `/s/<secret>` does not exist, but for the probes. No secret, no change."""

    def __init__(self, app: Callable[..., Iterable[bytes]], secret: str) -> None:
        self._app, self._prefix = app, f"/s/{secret}".encode() if secret else b""

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Takes the prefix off the path."""
        path = environ.get("PATH_INFO", "").encode("latin-1")  # as WSGI has it
        start, rest = path[: len(self._prefix)], path[len(self._prefix) :]
        if self._prefix and hmac.compare_digest(start, self._prefix) and rest[:1] in (b"", b"/"):
            environ["SCRIPT_NAME"] = environ.get("SCRIPT_NAME", "") + start.decode("latin-1")
            environ["PATH_INFO"] = rest.decode("latin-1")
        elif self._prefix and path.decode("latin-1") not in PROBES:
            environ["PATH_INFO"] = "/nothing-here"
        return self._app(environ, start_response)


def check_login(settings: Settings) -> None:
    """Compares basic auth with the settings, but on the open routes; raises as `require_login`."""
    if request.path not in OPEN_ROUTES:
        require_login(settings)


def require_login(settings: Settings) -> None:
    """Compares basic auth with the settings.

    Raises:
        Unauthorized: it is asked for, and missing or wrong.
    """
    if not settings.basic_auth_user:
        return
    given = request.authorization
    user, password = (given.username or "", given.password or "") if given and given.type == "basic" else ("", "")
    right_user = hmac.compare_digest(user.encode(), settings.basic_auth_user.encode())
    right_password = hmac.compare_digest(password.encode(), settings.basic_auth_pass.encode())
    if not (right_user and right_password):
        raise Unauthorized("give BASIC_AUTH_USER and BASIC_AUTH_PASS, in Label Studio under the model's settings")


def parse_json_body() -> dict[str, Any]:
    """The request's body.

    Raises:
        BadRequest: it is not a JSON object.
    """
    try:
        body = request.get_json(force=True)
    except RecursionError:
        raise BadRequest("the JSON is nested too deeply") from None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body
