"""A task's image URI -> a decoded picture: the one door for pictures.

Pictures come back as RGB, turned as their EXIF orientation says, because Label Studio shows them so and counts its
percent on what it shows. Whatever is wrong with a picture is an `ImageError` that says what to do.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from backend.errors import ImageError
from backend.images.sources import ImageFetcher
from backend.metrics import timed

SAFE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")  # none runs a program
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF tag, and its values that swap width and height

Image.init()
FORMATS = [name for name in SAFE_FORMATS if name in Image.OPEN]  # Pillow may be built without some
Image.MAX_IMAGE_PIXELS = None  # MAX_IMAGE_PIXELS of the settings takes its place, checked before decoding


Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class LoadedImage:
    """A decoded picture: `image` is RGB and may be a reduced copy, `size` is that of the original as people see it."""

    image: Image.Image
    size: Size


class ImageLoader:
    """Loads pictures within limits; safe to share between threads."""

    def __init__(
        self, sources: ImageFetcher, max_pixels: int, needed: Callable[[int, int], Size] | None = None
    ) -> None:
        """`needed` tells the size at which a picture of a given width and height is enough; all of it by default."""
        self._sources = sources
        self._max_pixels = max_pixels
        self._needed = needed or (lambda width, height: (width, height))

    def load(self, uri: str, task: int | None = None) -> LoadedImage:
        """The picture at an address, as `ImageFetcher.read` knows them.

        Raises:
            ImageError: it cannot be fetched, is too large, or is not a picture.
            LabelStudioError: Label Studio refused the key.
        """
        if not uri:
            raise ImageError("the task has no picture where the labeling config looks for it")
        with timed("download"):
            body, content_type = self._sources.read(uri, task)
        with timed("decode"):
            return self._decode(body, content_type)

    def _decode(self, body: bytes, content_type: str) -> LoadedImage:
        try:
            with Image.open(io.BytesIO(body), formats=FORMATS) as image:
                if image.width * image.height > self._max_pixels:
                    edges = f"{image.width} x {image.height}"
                    raise ImageError(f"the picture has {edges} pixels, above MAX_IMAGE_PIXELS ({self._max_pixels})")
                size = read_oriented_size(image)
                _reduce(image, self._needed(*image.size))
                return LoadedImage(to_rgb(ImageOps.exif_transpose(image)), size)
        except UnidentifiedImageError:
            raise ImageError(_not_a_picture(body, content_type)) from None
        except ImageError:
            raise
        except Exception as error:  # decoders raise whatever a damaged file leads them to
            raise ImageError(f"the picture is damaged ({type(error).__name__}: {error})") from None


def read_oriented_size(image: Image.Image) -> Size:
    """Width and height of a picture as people see it, told by its header."""
    return image.size[::-1] if image.getexif().get(ORIENTATION, 1) in SIDEWAYS else image.size


def _not_a_picture(body: bytes, content_type: str) -> str:
    if not body:
        return "the picture's file is empty"
    if b"<html" in body[:1000].lower():
        return "the address gave a web page instead of a picture; if it is a login page, check LABEL_STUDIO_API_KEY"
    return f"the file is not a picture that can be read (content type {content_type or 'unknown'})"


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
