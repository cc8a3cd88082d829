"""A picture as the model reads it: resized, normalised, and padded where it is too narrow."""

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
    """How a checkpoint wants its pictures: edges in pixels, mean and deviation per RGB channel in 0..1."""

    shortest_edge: int = 800
    longest_edge: int = 1333
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def size(self, width: int, height: int) -> Size:
        """Width and height after resizing, rounded as transformers rounds: ratio kept, no edge above the longest."""
        small, large = min(width, height), max(width, height)
        short = min(self.shortest_edge, self.longest_edge * small / large)
        edges = max(round(short), 1), max(int(short * large / small), 1)
        return edges if width <= height else edges[::-1]

    def preprocess(self, image: Image.Image) -> Tensor:
        """An RGB picture -> float32 (3, height, width), resized and normalised."""
        resized = image.resize(self.size(*image.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(resized, dtype=np.float32)).permute(2, 0, 1) / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


@dataclass(frozen=True)
class ModelInput:
    """A picture ready for the model.

    `frame` is the width and height that the padded picture would have in pixels of the original, `size` the original's.
    """

    pixels: Tensor
    frame: tuple[float, float]
    size: Size


def prepare_image(
    image: Image.Image, size: Size, image_format: ImageFormat, strides: Sequence[int], least_tokens: int
) -> ModelInput:
    """An RGB picture, a copy of one of `size`, with as many feature tokens as the model picks its queries from."""
    pixels = image_format.preprocess(image)
    height, width = pixels.shape[1:]
    padded_width, padded_height = _padded(width, height, strides, least_tokens)
    padded = nn.functional.pad(pixels, (0, padded_width - width, 0, padded_height - height))
    return ModelInput(padded, (size[0] * padded_width / width, size[1] * padded_height / height), size)


def _padded(width: int, height: int, strides: Sequence[int], least_tokens: int) -> Size:
    """The short edge grown until the levels, one stride each, have enough tokens."""
    while sum(-(-width // s) * -(-height // s) for s in strides) < least_tokens:
        width, height = (width + strides[0], height) if width < height else (width, height + strides[0])
    return width, height
