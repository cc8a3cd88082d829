"""Fetches the bytes of an image: from the web, Label Studio, its cloud storages, a mounted folder or a `data:` URI.

No address is trusted: it is foreign task data. Credentials are sent to Label Studio's origin only, private addresses
are refused (safe_http.py), and no path leads out of the mounted folder.
"""

from __future__ import annotations

import base64
import binascii
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from urllib.parse import parse_qs, unquote_to_bytes, urljoin, urlsplit

import requests
from urllib3.exceptions import DecodeError, HTTPError

from backend.errors import ImageError, ImageUnavailable
from backend.images.safe_http import AllowedHosts, BlockedAddress, make_guarded_session
from backend.labelstudio.client import LabelStudioClient, is_connect_failure, parse_origin
from backend.settings import Settings

TIMEOUT = (3, 10)  # seconds to connect, and between bytes
TOTAL_TIMEOUT = 30  # seconds for one image, redirects and retries included
MAX_REDIRECTS = 5
RETRY_DELAYS = (0.2, 1.0)  # seconds before each retry, after a 5xx or a lost connection
READ_SIZE = 64 * 1024  # bytes
CLOUD_SCHEMES = ("s3", "gs", "azure-blob")
LOCAL_FILES_ROUTE = "/data/local-files/"  # of Label Studio
RETRYABLE_STATUSES = (408, 425, 429)  # of HTTP, besides all from 500


class _ConnectionLost(ImageUnavailable):
    """An open connection was lost, or the server failed: an attempt at once may succeed."""


@dataclass(frozen=True)
class FetchedFile:
    """The bytes of a file, with its content type where one is known, else an empty text."""

    body: bytes
    content_type: str


class ImageFetcher:
    """Fetches files within limits; safe to share between threads."""

    def __init__(
        self,
        label_studio: LabelStudioClient,
        max_bytes: int,
        allowed_hosts: Sequence[str] = (),
        local_files_root: str = "",
    ) -> None:
        """Sets the limits.

        Args:
            label_studio: files of this Label Studio are fetched with its credentials, also from a private address.
            max_bytes: largest file that is fetched.
            allowed_hosts: hosts that may have private addresses, as `AllowedHosts` reads them.
            local_files_root: the folder that Label Studio serves as local files, if it is mounted on this machine.

        Raises:
            SettingsError: an entry of `allowed_hosts` is not valid.
        """
        hosts = list(allowed_hosts)
        if label_studio.url:
            origin = parse_origin(label_studio.url)
            hosts.append(f"{origin.host}:{origin.port}")
        self._label_studio = label_studio
        self._max_bytes = max_bytes
        self._local_files_root = Path(local_files_root).resolve() if local_files_root else None
        self._session = make_guarded_session(AllowedHosts(hosts))
        # Cookies are kept by host whatever the port: none is stored.
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))

    @classmethod
    def from_settings(cls, settings: Settings, label_studio: LabelStudioClient) -> ImageFetcher:
        """Makes a fetcher with the limits in the settings; raises as the constructor."""
        hosts = [host for host in settings.allowed_image_hosts.split(",") if host.strip()]
        return cls(label_studio, settings.max_image_bytes, hosts, settings.local_files_document_root)

    def fetch(self, uri: str, task_id: int | None = None) -> FetchedFile:
        """Fetches a file.

        Args:
            uri: `http(s)://`, `data:`, a path on Label Studio such as `/data/upload/1/a.png`, or an address in cloud
                storage (`s3://`, `gs://`, `azure-blob://`), for which Label Studio makes a presigned URL.
            task_id: the task whose data holds the address; Label Studio presigns URLs for tasks only.

        Raises:
            ImageUnavailable: the server that holds the file refuses, is away or slow; a later attempt may succeed.
            ImageError: the file cannot be read or is too large.
            LabelStudioError: Label Studio refused the API key.
        """
        scheme = uri.split(":", 1)[0].lower() if ":" in uri.split("/", 1)[0] else ""
        if scheme == "data":
            file = _decode_data_uri(uri)
        elif scheme in ("http", "https"):
            file = self._download(uri)
        elif scheme in CLOUD_SCHEMES and task_id is not None:
            encoded_uri = base64.urlsafe_b64encode(uri.encode()).decode()
            file = self._download(self._label_studio_url(f"/tasks/{task_id}/presign/?fileuri={encoded_uri}"))
        elif uri.startswith("/") and not uri.startswith("//"):
            url = self._label_studio_url(uri)
            local_files_path = urlsplit(self._label_studio.url_for(LOCAL_FILES_ROUTE)).path
            if self._local_files_root and urlsplit(url).path == local_files_path:
                file = self._read_local_file(self._local_files_root, url)
            else:
                file = self._download(url)
        else:
            supported = (
                "http(s)://, data:, a path on Label Studio, or s3://, gs://, azure-blob:// in one of its storages"
            )
            raise ImageError(f"the image address must be {supported}")
        if len(file.body) > self._max_bytes:
            raise self._make_too_large_error()
        return file

    def _label_studio_url(self, path: str) -> str:
        if not self._label_studio.url:
            raise ImageError("the image is stored in Label Studio: set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY")
        return self._label_studio.url_for(path)

    def _read_local_file(self, root: Path, url: str) -> FetchedFile:
        """Reads the file that a local-files URL names; it must lie below `root` after all links are resolved."""
        relative_path = parse_qs(urlsplit(url).query).get("d", [""])[0]
        try:
            path = (root / relative_path.lstrip("/")).resolve()
            if not (path.is_relative_to(root) and stat.S_ISREG(path.stat().st_mode)):
                raise ImageError("the local file is not a file inside of LOCAL_FILES_DOCUMENT_ROOT")
            if path.stat().st_size > self._max_bytes:
                raise self._make_too_large_error()
            return FetchedFile(path.read_bytes(), "")
        except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError) as error:
            raise ImageError(f"the local file cannot be read ({type(error).__name__})") from None
        except OSError as error:  # of a network file system that is away
            raise ImageUnavailable(f"the local file cannot be read now ({type(error).__name__})") from None

    def _download(self, url: str) -> FetchedFile:
        """Downloads a file, again after a lost connection while there is time."""
        deadline = time.monotonic() + TOTAL_TIMEOUT
        for delay in (*RETRY_DELAYS, None):
            try:
                return self._follow_redirects(url, deadline)
            except _ConnectionLost:
                if delay is None or time.monotonic() + delay > deadline:
                    raise
                time.sleep(delay)
        raise AssertionError("unreachable")

    def _follow_redirects(self, url: str, deadline: float) -> FetchedFile:
        """Downloads a file once; redirects are followed here, so that each hop gets headers of its own."""
        is_renewed = False
        try:
            for _ in range(MAX_REDIRECTS + 1):
                url = requests.Request("GET", url).prepare().url or ""  # judge the URL in the form that is requested
                headers = self._label_studio.auth_headers(url)
                with self._session.get(
                    url, headers=headers, timeout=TIMEOUT, stream=True, allow_redirects=False
                ) as reply:
                    if reply.status_code == 401 and not is_renewed and self._label_studio.renew_token(headers):
                        is_renewed = True
                        continue
                    if not reply.is_redirect:
                        return FetchedFile(self._read_body(reply, deadline), reply.headers.get("Content-Type", ""))
                    url = urljoin(url, reply.headers["Location"])
                    if urlsplit(url).scheme not in ("http", "https"):
                        raise ImageError("the image address redirects to something that is not http(s)")
        except BlockedAddress as error:
            raise ImageError(f"{error}; if it is yours, add it to ALLOWED_IMAGE_HOSTS") from None
        except (requests.RequestException, HTTPError, ValueError) as error:
            raise _find_error_class(error)(f"the image could not be fetched ({type(error).__name__})") from None
        raise ImageError(f"the image address redirects more than {MAX_REDIRECTS} times")

    def _read_body(self, reply: requests.Response, deadline: float) -> bytes:
        host, status = urlsplit(reply.url).hostname, reply.status_code
        if status >= 500:
            raise _ConnectionLost(f"{host} answered HTTP {status} instead of the image")
        if status in (401, 403):
            if "Authorization" in reply.request.headers:  # the key can be renewed while the task waits
                raise ImageUnavailable(f"{host} refused the image (HTTP {status}); check LABEL_STUDIO_API_KEY")
            hint = "if that is Label Studio, set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY"
            raise ImageError(f"{host} refused the image (HTTP {status}); {hint}")
        if status != 200:
            error_class = ImageUnavailable if status in RETRYABLE_STATUSES else ImageError
            raise error_class(f"{host} answered HTTP {status} instead of the image")
        body = bytearray()
        # Unlike `read`, `read1` returns what has arrived, so that the deadline holds for a slow server too.
        while data := reply.raw.read1(READ_SIZE, decode_content=True):
            body += data
            if len(body) > self._max_bytes:
                raise self._make_too_large_error()
            if time.monotonic() > deadline:
                raise ImageUnavailable(f"the image did not arrive within {TOTAL_TIMEOUT} s")
        return bytes(body)

    def _make_too_large_error(self) -> ImageError:
        return ImageError(f"the image file is larger than MAX_IMAGE_BYTES ({self._max_bytes})")


def _find_error_class(error: Exception) -> type[ImageError]:
    """Finds the error that a failed request means: final, retryable, or worth another attempt at once."""
    if isinstance(error, (requests.exceptions.SSLError, DecodeError, requests.exceptions.ContentDecodingError)):
        return ImageError
    if isinstance(error, requests.Timeout) or is_connect_failure(error):
        return ImageUnavailable
    is_lost = isinstance(error, (requests.ConnectionError, requests.exceptions.ChunkedEncodingError, HTTPError))
    return _ConnectionLost if is_lost else ImageError


def _decode_data_uri(uri: str) -> FetchedFile:
    header, comma, data = uri.removeprefix("data:").partition(",")
    if not comma:
        raise ImageError("the data: address has no comma")
    raw = unquote_to_bytes(data.encode(errors="replace"))
    try:
        body = base64.b64decode(raw, validate=True) if header.endswith(";base64") else raw
    except binascii.Error:
        raise ImageError("the data: address is not valid base64") from None
    return FetchedFile(body, header.split(";")[0])
