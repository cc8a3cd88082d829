"""A task's image URI -> a decoded picture: the one door for pictures.

Pictures come back as RGB, turned as their EXIF orientation says, because Label Studio shows them so and counts its
percent on what it shows. Whatever is wrong with a picture is an `ImageError` that says what to do.
"""

from __future__ import annotations

import base64
import binascii
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import numpy as np
import requests
from PIL import Image, ImageOps, UnidentifiedImageError
from urllib3.exceptions import HTTPError

from backend.errors import ImageError
from backend.network import Allowed, BlockedAddress, guarded_session
from backend.studio import Studio, origin

TIMEOUT = (3, 10)  # seconds to connect, and between bytes
TOTAL_TIMEOUT = 30  # seconds for one picture, redirects included
MAX_REDIRECTS = 5
PIECE = 64 * 1024  # bytes
SAFE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")  # none runs a program
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF tag, and its values that swap width and height

Image.init()
FORMATS = [name for name in SAFE_FORMATS if name in Image.OPEN]  # Pillow may be built without some
Image.MAX_IMAGE_PIXELS = None  # MAX_IMAGE_PIXELS of the settings takes its place, checked before decoding


Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class Picture:
    """A decoded picture: `image` is RGB and may be a reduced copy, `size` is that of the original as people see it."""

    image: Image.Image
    size: Size


class Images:
    """Loads pictures within limits; safe to share between threads."""

    def __init__(
        self,
        studio: Studio,
        max_bytes: int,
        max_pixels: int,
        needed: Callable[[int, int], Size] | None = None,
        allowed_hosts: Sequence[str] = (),
    ) -> None:
        """Sets the limits.

        Args:
            studio: whose pictures are fetched with its key, wherever it is.
            max_bytes: of a picture's file.
            max_pixels: of a picture.
            needed: the size at which a picture of a given width and height is enough; all of it by default.
            allowed_hosts: those that may be at private addresses, as `network.Allowed` reads them.
        """
        self._studio = studio
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._needed = needed or (lambda width, height: (width, height))
        self._session = guarded_session(Allowed([*allowed_hosts, *_host_and_port(studio.url)]))
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # cookies know hosts, but no ports

    def load(self, uri: str) -> Picture:
        """The picture behind `http(s)://`, `data:` or a path on Label Studio such as `/data/upload/1/a.png`.

        Raises:
            ImageError: it cannot be fetched, is too large, or is not a picture.
            StudioError: Label Studio refused the key.
        """
        if not uri:
            raise ImageError("the task has no picture where the labeling config looks for it")
        body, content_type = self._read(uri)
        if len(body) > self._max_bytes:
            raise self._too_large()
        return self._decode(body, content_type)

    def _read(self, uri: str) -> tuple[bytes, str]:
        scheme = uri.split(":", 1)[0].lower() if ":" in uri else ""
        if scheme == "data":
            return _read_data_uri(uri)
        if scheme in ("http", "https"):
            return self._fetch(uri)
        if uri.startswith("/") and not uri.startswith("//"):
            if not self._studio.url:
                raise ImageError("the picture lies in Label Studio: set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY")
            return self._fetch(self._studio.url + uri)
        raise ImageError("the picture's address must be http(s)://, data: or a path on Label Studio")

    def _fetch(self, url: str) -> tuple[bytes, str]:
        """The body and its content type; redirects are followed by hand, so that each hop gets its own headers."""
        deadline = time.monotonic() + TOTAL_TIMEOUT
        try:
            for _ in range(MAX_REDIRECTS + 1):
                url = requests.Request("GET", url).prepare().url or ""  # judge the very address that is connected to
                headers = self._studio.headers(url)
                with self._session.get(
                    url, headers=headers, timeout=TIMEOUT, stream=True, allow_redirects=False
                ) as reply:
                    if not reply.is_redirect:
                        return self._body(reply, deadline), reply.headers.get("Content-Type", "")
                    url = urljoin(url, reply.headers["Location"])
                    if urlsplit(url).scheme not in ("http", "https"):
                        raise ImageError("the picture's address redirects to something that is not http(s)")
        except BlockedAddress as error:
            raise ImageError(f"{error}; if it is yours, add it to ALLOWED_IMAGE_HOSTS") from None
        except (requests.RequestException, HTTPError, ValueError) as error:
            raise ImageError(f"the picture could not be fetched ({type(error).__name__})") from None
        raise ImageError(f"the picture's address redirects more than {MAX_REDIRECTS} times")

    def _body(self, reply: requests.Response, deadline: float) -> bytes:
        if reply.status_code != 200:
            raise ImageError(_refusal(reply, bool(reply.request.headers.get("Authorization"))))
        body = bytearray()
        while piece := reply.raw.read1(PIECE, decode_content=True):  # unlike read, it does not wait for a full piece
            body += piece
            if len(body) > self._max_bytes:
                raise self._too_large()
            if time.monotonic() > deadline:
                raise ImageError(f"the picture did not arrive within {TOTAL_TIMEOUT} s")
        return bytes(body)

    def _too_large(self) -> ImageError:
        return ImageError(f"the picture's file is larger than MAX_IMAGE_BYTES ({self._max_bytes})")

    def _decode(self, body: bytes, content_type: str) -> Picture:
        try:
            with Image.open(io.BytesIO(body), formats=FORMATS) as image:
                if image.width * image.height > self._max_pixels:
                    edges = f"{image.width} x {image.height}"
                    raise ImageError(f"the picture has {edges} pixels, above MAX_IMAGE_PIXELS ({self._max_pixels})")
                size = image.size[::-1] if image.getexif().get(ORIENTATION, 1) in SIDEWAYS else image.size
                _reduce(image, self._needed(*image.size))
                return Picture(to_rgb(ImageOps.exif_transpose(image)), size)
        except UnidentifiedImageError:
            raise ImageError(_not_a_picture(body, content_type)) from None
        except ImageError:
            raise
        except Exception as error:  # decoders raise whatever a damaged file leads them to
            raise ImageError(f"the picture is damaged ({type(error).__name__}: {error})") from None


def _host_and_port(url: str) -> list[str]:
    return ["{1}:{2}".format(*origin(url))] if url else []


def _refusal(reply: requests.Response, with_key: bool) -> str:
    host = urlsplit(reply.url).hostname
    if reply.status_code in (401, 403):
        hint = "check LABEL_STUDIO_API_KEY" if with_key else "set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY"
        return f"{host} refused the picture (HTTP {reply.status_code}); if that is Label Studio, {hint}"
    return f"{host} answered HTTP {reply.status_code} instead of the picture"


def _not_a_picture(body: bytes, content_type: str) -> str:
    if not body:
        return "the picture's file is empty"
    if b"<html" in body[:1000].lower():
        return "the address gave a web page instead of a picture; if it is a login page, check LABEL_STUDIO_API_KEY"
    return f"the file is not a picture that can be read (content type {content_type or 'unknown'})"


def _read_data_uri(uri: str) -> tuple[bytes, str]:
    head, comma, body = uri.removeprefix("data:").partition(",")
    if not comma:
        raise ImageError("the data: address has no comma")
    raw = unquote_to_bytes(body.encode(errors="replace"))
    try:
        return (base64.b64decode(raw, validate=True) if head.endswith(";base64") else raw), head.split(";")[0]
    except binascii.Error:
        raise ImageError("the data: address is not valid base64") from None


def _reduce(image: Image.Image, needed: Size) -> None:
    """Lets a JPEG decode at a half, a quarter or an eighth, if that is enough and divides both edges.

    Other formats cannot. An edge that is not divided would be rounded up, and all boxes shifted a little.
    """
    for scale in (8, 4, 2):
        width, height = image.width / scale, image.height / scale
        if width.is_integer() and height.is_integer() and width >= needed[0] and height >= needed[1]:
            image.draft(None, (int(width), int(height)))
            return


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB as a person would see it: 16 bits scaled, transparency laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(pixels: Any) -> Any:
    """16-bit grey levels -> 8 bits; values of other ranges are stretched to their own."""
    values = pixels.astype(np.float64)
    top = 65535.0 if 255 < values.max(initial=0) <= 65535 else max(values.max(initial=0), 1.0)
    return np.clip(values * 255 / top, 0, 255).astype(np.uint8)
