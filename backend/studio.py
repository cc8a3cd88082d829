"""Label Studio's REST API: which credentials open it.

Label Studio knows two kinds of key. A legacy token is sent as it is. A personal access token is a refresh token (a JWT)
that must be exchanged for an access token that lives five minutes; sent itself, it is refused.
"""

from __future__ import annotations

import base64
import json
import threading
import time

import requests
from urllib3.util import parse_url

from backend.errors import StudioError

TIMEOUT = (3, 10)  # seconds to connect, and between bytes
RENEW_BEFORE = 60  # seconds before an access token ends


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a URL: what must be equal before a credential is sent.

    Raises:
        ValueError: it is not a URL.
    """
    parts = parse_url(url)  # the parser that requests connects by: another may read another host into an odd URL
    scheme = parts.scheme or ""
    return scheme, (parts.host or "").lower(), parts.port or {"http": 80, "https": 443}.get(scheme, 0)


class Studio:
    """Label Studio as seen from here; safe to share between threads."""

    def __init__(self, url: str, api_key: str) -> None:
        self.url = url.rstrip("/")
        self._api_key = api_key
        self._is_refresh_token = api_key.count(".") == 2
        self._access_token, self._expires = "", 0.0
        self._lock = threading.Lock()
        self._session = requests.Session()
        self._session.trust_env = False  # as for pictures: no proxy and no .netrc of the shell

    def headers(self, url: str) -> dict[str, str]:
        """The headers for a request to `url`: credentials for Label Studio's own origin, none for any other.

        Raises:
            StudioError: the personal access token could not be exchanged.
        """
        if not (self.url and self._api_key) or origin(url) != origin(self.url):
            return {}
        if not self._is_refresh_token:
            return {"Authorization": f"Token {self._api_key}"}
        return {"Authorization": f"Bearer {self._fresh_access_token()}"}

    def _fresh_access_token(self) -> str:
        with self._lock:
            if time.time() > self._expires - RENEW_BEFORE:
                self._access_token = self._exchange()
                self._expires = _expiry(self._access_token)
            return self._access_token

    @property
    def _shown(self) -> str:
        """The address without a user and password that it may hold."""
        return "{}://{}:{}".format(*origin(self.url))

    def _exchange(self) -> str:
        try:
            body = {"refresh": self._api_key}
            reply = self._session.post(
                f"{self.url}/api/token/refresh", json=body, timeout=TIMEOUT, allow_redirects=False
            )
        except requests.RequestException as error:
            raise StudioError(f"Label Studio does not answer at {self._shown} ({type(error).__name__})") from None
        if reply.status_code != 200:
            raise StudioError(
                f"Label Studio refused LABEL_STUDIO_API_KEY (HTTP {reply.status_code}); "
                "make a new personal access token in Account & Settings"
            )
        try:
            return str(reply.json()["access"])
        except (ValueError, KeyError, TypeError):
            raise StudioError(f"{self._shown} gave no token; is it Label Studio's address?") from None


def _expiry(token: str) -> float:
    """Seconds since the epoch at which a JWT ends; five minutes from now where it does not say."""
    try:
        payload = token.split(".")[1]
        return float(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"])
    except (ValueError, KeyError, IndexError, TypeError):
        return time.time() + 300
