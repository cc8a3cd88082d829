"""Authentication: secret URL prefix and basic auth.

Label Studio sends credentials with its requests, but not with webhook events. So basic auth alone leaves that route
open; the secret prefix, part of the URL that Label Studio stores, covers it too.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable
from typing import Any

from flask import request

from backend.errors import Unauthorized
from backend.settings import Settings

PROBES = ("/health", "/ready")  # for container platforms, which know no secret; they reveal nothing
OPEN_ROUTES = (*PROBES, "/webhook")  # need no credentials


class SecretPathMiddleware:
    """WSGI middleware that serves everything but the probes below `/s/<secret>` only; without a secret, no change."""

    def __init__(self, app: Callable[..., Iterable[bytes]], secret: str) -> None:
        self._app, self._prefix = app, f"/s/{secret}".encode() if secret else b""

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Removes the prefix from the path; a path without it becomes one that no route has."""
        path = environ.get("PATH_INFO", "").encode("latin-1")  # the encoding that WSGI prescribes
        prefix, rest = path[: len(self._prefix)], path[len(self._prefix) :]
        if self._prefix and hmac.compare_digest(prefix, self._prefix) and rest[:1] in (b"", b"/"):
            environ["SCRIPT_NAME"] = environ.get("SCRIPT_NAME", "") + prefix.decode("latin-1")
            environ["PATH_INFO"] = rest.decode("latin-1")
        elif self._prefix and path.decode("latin-1") not in PROBES:
            environ["PATH_INFO"] = "/nothing-here"
        return self._app(environ, start_response)


def check_login(settings: Settings) -> None:
    """Requires a login for the current request, unless its route is open; raises Unauthorized."""
    if request.path not in OPEN_ROUTES:
        require_login(settings)


def require_login(settings: Settings) -> None:
    """Compares the credentials of the current request with the settings.

    Raises:
        Unauthorized: basic auth is enabled, and the credentials are missing or wrong.
    """
    if not settings.basic_auth_user:
        return
    given = request.authorization
    user, password = (given.username or "", given.password or "") if given and given.type == "basic" else ("", "")
    is_user_right = hmac.compare_digest(user.encode(), settings.basic_auth_user.encode())
    is_password_right = hmac.compare_digest(password.encode(), settings.basic_auth_pass.encode())
    if not (is_user_right and is_password_right):
        raise Unauthorized("log in with BASIC_AUTH_USER and BASIC_AUTH_PASS; in Label Studio, in the model's settings")
