"""Loads the image at an address: the only place where task images are decoded.

Images are returned as RGB and upright (EXIF orientation applied), because Label Studio shows them that way and its
percentages refer to what it shows. Every defect of an image is an `ImageError` that says what to do.
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
ORIENTATION_TAG = 0x0112  # EXIF
ROTATED_ORIENTATIONS = (5, 6, 7, 8)  # values of the tag that swap width and height

Image.init()
FORMATS = [name for name in SAFE_FORMATS if name in Image.OPEN]  # Pillow may be built without some
Image.MAX_IMAGE_PIXELS = None  # the setting of the same name replaces it and is checked before decoding


Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class LoadedImage:
    """A decoded image.

    Attributes:
        image: RGB and upright; may be a reduced copy.
        size: width and height of the original, upright.
    """

    image: Image.Image
    size: Size


class ImageLoader:
    """Loads images within limits; safe to share between threads."""

    def __init__(
        self, fetcher: ImageFetcher, max_pixels: int, target_size: Callable[[int, int], Size] | None = None
    ) -> None:
        """Sets the limits.

        Args:
            fetcher: gets the bytes of an image.
            max_pixels: largest width x height that is decoded.
            target_size: (width, height) of an image -> the size that suffices for it. Large JPEGs are then decoded at a
                fraction of their size, but never below this. By default all images are decoded in full.
        """
        self._fetcher = fetcher
        self._max_pixels = max_pixels
        self._target_size = target_size or (lambda width, height: (width, height))

    def load(self, uri: str, task_id: int | None = None) -> LoadedImage:
        """Loads the image at an address; see `ImageFetcher.fetch` for the arguments.

        Raises:
            ImageError: it cannot be fetched, is too large, or is not an image.
            LabelStudioError: Label Studio refused the API key.
        """
        if not uri:
            raise ImageError("the task has no image where the labeling config looks for it")
        with timed("download"):
            file = self._fetcher.fetch(uri, task_id)
        with timed("decode"):
            return self._decode(file.body, file.content_type)

    def _decode(self, body: bytes, content_type: str) -> LoadedImage:
        try:
            with Image.open(io.BytesIO(body), formats=FORMATS) as image:
                if image.width * image.height > self._max_pixels:
                    edges = f"{image.width} x {image.height}"
                    raise ImageError(f"the image has {edges} pixels, above MAX_IMAGE_PIXELS ({self._max_pixels})")
                size = read_oriented_size(image)
                _reduce_jpeg(image, self._target_size(*image.size))
                return LoadedImage(to_rgb(ImageOps.exif_transpose(image)), size)
        except UnidentifiedImageError:
            raise ImageError(_explain_unidentified(body, content_type)) from None
        except ImageError:
            raise
        except Exception as error:  # a damaged file can make a decoder raise anything
            raise ImageError(f"the image is damaged ({type(error).__name__}: {error})") from None


def read_oriented_size(image: Image.Image) -> Size:
    """Reads width and height of the upright image from its header, without decoding it."""
    return image.size[::-1] if image.getexif().get(ORIENTATION_TAG, 1) in ROTATED_ORIENTATIONS else image.size


def _explain_unidentified(body: bytes, content_type: str) -> str:
    if not body:
        return "the image file is empty"
    if b"<html" in body[:1000].lower():
        return "the address returned a web page instead of an image; if it is a login page, check LABEL_STUDIO_API_KEY"
    return f"the file is not a supported image (content type {content_type or 'unknown'})"


def _reduce_jpeg(image: Image.Image, target_size: Size) -> None:
    """Sets a JPEG to be decoded at 1/8, 1/4 or 1/2 of its size, if that suffices and divides both edges.

    An edge that is not divisible would be rounded up, which would shift all boxes a little. Pillow does this for no
    other format.
    """
    for divisor in (8, 4, 2):
        width, height = image.width / divisor, image.height / divisor
        if width.is_integer() and height.is_integer() and width >= target_size[0] and height >= target_size[1]:
            image.draft(None, (int(width), int(height)))
            return


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any Pillow mode to RGB: 16-bit grey levels are scaled, transparency is laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(pixels: Any) -> Any:
    """Scales grey levels to 8 bits: 16-bit values by their full range, all others by their own maximum."""
    values = pixels.astype(np.float64)
    maximum = max(values.max(initial=0), 1.0)
    white = 65535.0 if 255 < maximum <= 65535 else maximum
    return np.clip(values * 255 / white, 0, 255).astype(np.uint8)
