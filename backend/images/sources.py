"""Where a picture's bytes come from: the web, Label Studio, its cloud storages, a mounted folder, the address itself.

Nothing here trusts an address: it is somebody's task data. Credentials go to Label Studio's origin alone, private
addresses are not connected to (network.py), and a path leads nowhere outside of its folder.
"""

from __future__ import annotations

import base64
import binascii
import stat
import time
from collections.abc import Sequence
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from urllib.parse import parse_qs, unquote_to_bytes, urljoin, urlsplit

import requests
from urllib3.exceptions import HTTPError

from backend.errors import ImageError
from backend.images.safe_http import AllowedHosts, BlockedAddress, make_guarded_session
from backend.labelstudio.client import LabelStudioClient, is_connect_failure, parse_origin
from backend.settings import Settings

TIMEOUT = (3, 10)  # seconds to connect, and between bytes
TOTAL_TIMEOUT = 30  # seconds for one picture, redirects and repetitions included
MAX_REDIRECTS = 5
RETRY_DELAYS = (0.2, 1.0)  # seconds before a request is repeated, after a 5xx or a lost connection
READ_SIZE = 64 * 1024  # bytes
CLOUD_SCHEMES = ("s3", "gs", "azure-blob")
LOCAL_FILES = "/data/local-files/"


class _Passing(Exception):
    """A failure that may be gone when asked again."""


class ImageFetcher:
    """Reads files within limits; safe to share between threads."""

    def __init__(
        self, studio: LabelStudioClient, max_bytes: int, allowed_hosts: Sequence[str] = (), local_files_root: str = ""
    ) -> None:
        """Sets the limits.

        Args:
            studio: whose files are fetched with its key, wherever it is.
            max_bytes: of a file.
            allowed_hosts: those that may be at private addresses, as `network.Allowed` reads them.
            local_files_root: the folder that Label Studio serves as local files, if it is mounted here.

        Raises:
            SettingsError: one of `allowed_hosts` means nothing.
        """
        self._label_studio = studio
        self._max_bytes = max_bytes
        self._local_files = Path(local_files_root).resolve() if local_files_root else None
        self._session = make_guarded_session(AllowedHosts([*allowed_hosts, *_host_and_port(studio.url)]))
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # cookies know hosts, but no ports

    @classmethod
    def from_settings(cls, settings: Settings, studio: LabelStudioClient) -> ImageFetcher:
        """As the settings say; raises as the constructor."""
        hosts = [host for host in settings.allowed_image_hosts.split(",") if host.strip()]
        return cls(studio, settings.max_image_bytes, hosts, settings.local_files_document_root)

    def read(self, uri: str, task: int | None = None) -> tuple[bytes, str]:
        """A file and its content type, empty where that is not known.

        Args:
            uri: `http(s)://`, `data:`, a path on Label Studio such as `/data/upload/1/a.png`, or a cloud storage's
                `s3://`, `gs://`, `azure-blob://`, which Label Studio signs.
            task: whose data holds the address; Label Studio signs for tasks.

        Raises:
            ImageError: it cannot be read, or is too large.
            LabelStudioError: Label Studio refused the key.
        """
        body, content_type = self._read(uri, task)
        if len(body) > self._max_bytes:
            raise self._too_large()
        return body, content_type

    def _read(self, uri: str, task: int | None) -> tuple[bytes, str]:
        scheme = uri.split(":", 1)[0].lower() if ":" in uri.split("/", 1)[0] else ""
        if scheme == "data":
            return _read_data_uri(uri)
        if scheme in ("http", "https"):
            return self._fetch(uri)
        if scheme in CLOUD_SCHEMES and task is not None:
            signed = base64.urlsafe_b64encode(uri.encode()).decode()
            return self._fetch(self._on_studio(f"/tasks/{task}/presign/?fileuri={signed}"))
        if uri.startswith("/") and not uri.startswith("//"):
            url = self._on_studio(uri)
            return self._read_local(url) if self._local_files and self._is_local_file(url) else self._fetch(url)
        known = "http(s)://, data:, a path on Label Studio, or s3://, gs://, azure-blob:// in one of its storages"
        raise ImageError(f"the picture's address must be {known}")

    def _on_studio(self, path: str) -> str:
        if not self._label_studio.url:
            raise ImageError("the picture lies in Label Studio: set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY")
        return self._label_studio.address(path)

    def _is_local_file(self, url: str) -> bool:
        return urlsplit(url).path == urlsplit(self._label_studio.address(LOCAL_FILES)).path

    def _read_local(self, url: str) -> tuple[bytes, str]:
        """A file below the mounted folder, wherever links lead."""
        assert self._local_files
        wanted = parse_qs(urlsplit(url).query).get("d", [""])[0]
        try:
            path = (self._local_files / wanted.lstrip("/")).resolve()
            if not (path.is_relative_to(self._local_files) and stat.S_ISREG(path.stat().st_mode)):
                raise ImageError("the local file is not a file inside of LOCAL_FILES_DOCUMENT_ROOT")
            if path.stat().st_size > self._max_bytes:
                raise self._too_large()
            return path.read_bytes(), ""
        except (OSError, ValueError) as error:
            raise ImageError(f"the local file cannot be read ({type(error).__name__})") from None

    def _fetch(self, url: str) -> tuple[bytes, str]:
        """The body and its content type; asked for again where that may help and there is time."""
        deadline = time.monotonic() + TOTAL_TIMEOUT
        for pause in (*RETRY_DELAYS, None):
            try:
                return self._follow(url, deadline)
            except _Passing as error:
                if pause is None or time.monotonic() + pause > deadline:
                    raise ImageError(str(error)) from None
                time.sleep(pause)
        raise AssertionError("not reached")

    def _follow(self, url: str, deadline: float) -> tuple[bytes, str]:
        """Redirects are followed by hand, so that each hop gets its own headers."""
        is_renewed = False
        try:
            for _ in range(MAX_REDIRECTS + 1):
                url = requests.Request("GET", url).prepare().url or ""  # judge the very address that is connected to
                headers = self._label_studio.headers(url)
                with self._session.get(
                    url, headers=headers, timeout=TIMEOUT, stream=True, allow_redirects=False
                ) as reply:
                    if reply.status_code == 401 and not is_renewed and self._label_studio.renew(headers):
                        is_renewed = True
                        continue
                    if not reply.is_redirect:
                        return self._body(reply, deadline), reply.headers.get("Content-Type", "")
                    url = urljoin(url, reply.headers["Location"])
                    if urlsplit(url).scheme not in ("http", "https"):
                        raise ImageError("the picture's address redirects to something that is not http(s)")
        except BlockedAddress as error:
            raise ImageError(f"{error}; if it is yours, add it to ALLOWED_IMAGE_HOSTS") from None
        except (requests.RequestException, HTTPError, ValueError) as error:
            text = f"the picture could not be fetched ({type(error).__name__})"
            raise _Passing(text) if _is_passing(error) else ImageError(text) from None
        raise ImageError(f"the picture's address redirects more than {MAX_REDIRECTS} times")

    def _body(self, reply: requests.Response, deadline: float) -> bytes:
        if reply.status_code >= 500:
            raise _Passing(f"{urlsplit(reply.url).hostname} answered HTTP {reply.status_code} instead of the picture")
        if reply.status_code != 200:
            raise ImageError(_refusal(reply, bool(reply.request.headers.get("Authorization"))))
        body = bytearray()
        while piece := reply.raw.read1(
            READ_SIZE, decode_content=True
        ):  # unlike read, it does not wait for a full piece
            body += piece
            if len(body) > self._max_bytes:
                raise self._too_large()
            if time.monotonic() > deadline:
                raise ImageError(f"the picture did not arrive within {TOTAL_TIMEOUT} s")
        return bytes(body)

    def _too_large(self) -> ImageError:
        return ImageError(f"the picture's file is larger than MAX_IMAGE_BYTES ({self._max_bytes})")


def _is_passing(error: Exception) -> bool:
    """Whether a connection was made and lost; one that is refused or silent will be so again."""
    lost = isinstance(error, (requests.ConnectionError, requests.exceptions.ChunkedEncodingError, HTTPError))
    return lost and not is_connect_failure(error) and not isinstance(error, requests.Timeout)


def _host_and_port(url: str) -> list[str]:
    return ["{1}:{2}".format(*parse_origin(url))] if url else []


def _refusal(reply: requests.Response, with_key: bool) -> str:
    host = urlsplit(reply.url).hostname
    if reply.status_code in (401, 403):
        hint = "check LABEL_STUDIO_API_KEY" if with_key else "set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY"
        return f"{host} refused the picture (HTTP {reply.status_code}); if that is Label Studio, {hint}"
    return f"{host} answered HTTP {reply.status_code} instead of the picture"


def _read_data_uri(uri: str) -> tuple[bytes, str]:
    head, comma, body = uri.removeprefix("data:").partition(",")
    if not comma:
        raise ImageError("the data: address has no comma")
    raw = unquote_to_bytes(body.encode(errors="replace"))
    try:
        return (base64.b64decode(raw, validate=True) if head.endswith(";base64") else raw), head.split(";")[0]
    except binascii.Error:
        raise ImageError("the data: address is not valid base64") from None
