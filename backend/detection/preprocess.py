"""An RGB image -> the pixel tensor that the model reads: resized, normalised, and padded where it is too narrow."""

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
    """

    shortest_edge: int = 800
    longest_edge: int = 1333
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def compute_size(self, width: int, height: int) -> Size:
        """Returns width and height after resizing with the aspect ratio kept, rounded as transformers rounds."""
        small, large = min(width, height), max(width, height)
        short = min(self.shortest_edge, self.longest_edge * small / large)
        edges = max(round(short), 1), max(int(short * large / small), 1)
        return edges if width <= height else edges[::-1]

    def preprocess(self, image: Image.Image) -> Tensor:
        """Resizes and normalises an RGB image; returns float32 (3, height, width)."""
        resized = image.resize(self.compute_size(*image.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(resized, dtype=np.float32)).permute(2, 0, 1) / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


@dataclass(frozen=True)
class ModelInput:
    """An image ready for the model.

    Attributes:
        pixels: float32 (3, height, width), normalised and padded with zeros at the right and at the bottom.
        padded_size: width and height of the padded image, measured in pixels of the original. The model's boxes are
            relative to it; equal to `size` where nothing is padded.
        size: width and height of the original in pixels.
    """

    pixels: Tensor
    padded_size: tuple[float, float]
    size: Size


def make_model_input(
    image: Image.Image, size: Size, image_format: ImageFormat, strides: Sequence[int], min_tokens: int
) -> ModelInput:
    """Preprocesses an RGB image and pads it until the model has enough feature tokens to select its queries from.

    Args:
        image: the original or a reduced copy of it.
        size: width and height of the original in pixels.
        image_format: the checkpoint's.
        strides: pixels of the resized image per feature token and axis, for each feature level.
        min_tokens: feature tokens of all levels that the model needs: its number of queries.
    """
    pixels = image_format.preprocess(image)
    height, width = pixels.shape[1:]
    padded_width, padded_height = _compute_padded_size(width, height, strides, min_tokens)
    padded = nn.functional.pad(pixels, (0, padded_width - width, 0, padded_height - height))
    return ModelInput(padded, (size[0] * padded_width / width, size[1] * padded_height / height), size)


def _compute_padded_size(width: int, height: int, strides: Sequence[int], min_tokens: int) -> Size:
    """Extends the shorter edge until all feature levels together have enough tokens."""
    while sum(-(-width // s) * -(-height // s) for s in strides) < min_tokens:
        width, height = (width + strides[0], height) if width < height else (width, height + strides[0])
    return width, height
