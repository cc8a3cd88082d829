"""An RGB image -> the pixels that the model reads: resized, and later normalised and padded where it is too narrow.

Images travel as bytes, a quarter of the size of floats; `normalize` runs on the device of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class ImageFormat:
    """The input format that a checkpoint was trained with.

    Attributes:
        shortest_edge: length in pixels to which the shorter edge is resized.
        longest_edge: maximum length in pixels of the longer edge.
        mean: per RGB channel, in 0..1.
        std: standard deviation per RGB channel, in 0..1.
        size_divisor: both edges are rounded to multiples of it, so that images of nearly equal shapes share a batch;
            1 resizes as the checkpoint was published.
    """

    shortest_edge: int = 800
    longest_edge: int = 1333
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    size_divisor: int = 1

    def compute_size(self, width: int, height: int) -> Size:
        """Returns width and height after resizing: aspect ratio and rounding as in transformers, then the divisor."""
        small, large = min(width, height), max(width, height)
        short = min(self.shortest_edge, self.longest_edge * small / large)
        edges = max(round(short), 1), max(int(short * large / small), 1)
        short, long = (max(round(edge / self.size_divisor), 1) * self.size_divisor for edge in edges)
        return (short, long) if width <= height else (long, short)

    def resize(self, image: Image.Image) -> Tensor:
        """Resizes an RGB image; returns uint8 (height, width, 3)."""
        resized = image.resize(self.compute_size(*image.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized))

    def preprocess(self, image: Image.Image) -> Tensor:
        """Resizes and normalises an RGB image; returns float32 (3, height, width)."""
        return normalize(self.resize(image)[None], torch.tensor(self.mean), torch.tensor(self.std))[0]


@dataclass(frozen=True)
class ModelInput:
    """An image ready for the model.

    Attributes:
        pixels: uint8 (height, width, 3), resized.
        padding: pixels of zeros that the model needs at the right and at the bottom, once it is normalised.
        size: width and height of the original in pixels.
        image_format: the checkpoint's.
    """

    pixels: Tensor
    padding: Size
    size: Size
    image_format: ImageFormat

    @property
    def padded_size(self) -> tuple[float, float]:
        """Width and height of the padded image, measured in pixels of the original: the model's boxes are relative."""
        height, width = self.pixels.shape[:2]
        right, bottom = self.padding
        return self.size[0] * (width + right) / width, self.size[1] * (height + bottom) / height

    def normalize(self) -> Tensor:
        """Returns what the model reads: float32 (3, height + bottom, width + right)."""
        mean, std = torch.tensor(self.image_format.mean), torch.tensor(self.image_format.std)
        return normalize(self.pixels[None], mean, std, self.padding)[0]


def normalize(pixels: Tensor, mean: Tensor, std: Tensor, padding: Size = (0, 0)) -> Tensor:
    """Normalises and pads resized images of equal size.

    Args:
        pixels: uint8 (images, height, width, 3).
        mean: (3,), in 0..1, on the device of the pixels.
        std: (3,), likewise.
        padding: as in `ModelInput`.

    Returns:
        float32 (images, 3, height + bottom, width + right).
    """
    values = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255
    values = (values - mean[:, None, None]) / std[:, None, None]
    return nn.functional.pad(values, (0, padding[0], 0, padding[1])) if any(padding) else values


def make_model_input(
    image: Image.Image, size: Size, image_format: ImageFormat, strides: Sequence[int], min_tokens: int
) -> ModelInput:
    """Resizes an RGB image, and finds the padding that gives the model enough feature tokens to select queries from.

    Args:
        image: the original or a reduced copy of it.
        size: width and height of the original in pixels.
        image_format: the checkpoint's.
        strides: pixels of the resized image per feature token and axis, for each feature level.
        min_tokens: feature tokens of all levels that the model needs: its number of queries.
    """
    pixels = image_format.resize(image)
    height, width = pixels.shape[:2]
    return ModelInput(pixels, compute_padding(width, height, strides, min_tokens), size, image_format)


def compute_padding(width: int, height: int, strides: Sequence[int], min_tokens: int) -> Size:
    """Returns by how much width and height have to grow until all feature levels together have enough tokens.

    The shorter edge grows.
    """
    padded_width, padded_height = width, height
    while sum(-(-padded_width // s) * -(-padded_height // s) for s in strides) < min_tokens:
        if padded_width < padded_height:
            padded_width += strides[0]
        else:
            padded_height += strides[0]
    return padded_width - width, padded_height - height
