"""A generator of images: coloured shapes on busy backgrounds, with their true boxes, and phrases that name them.

Boxes are xyxy in pixels of the image, tight around the shape. All randomness comes from the generator that the caller
passes, so that the same seed makes the same image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from backend.boxes import Box

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 220, 50),
    "purple": (150, 50, 180),
    "orange": (245, 140, 30),
    "white": (240, 240, 240),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

COLOUR_JITTER = 18  # largest change of a channel
MIN_CONTRAST = 55  # between a shape and what lies under it, in at least one channel
SIZE_RANGE = (0.14, 0.50)  # of a shape's side, as a share of the image's short side
MIN_GAP = 2  # pixels between two shapes
MAX_ATTEMPTS = 30  # at placing shapes

Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Shape:
    """One drawn shape; `box_xyxy` is tight, in pixels."""

    colour: str
    shape: str
    box_xyxy: Box

    def matches(self, phrase: str) -> bool:
        """Returns whether a phrase such as "red circle", "circle" or "red object" names this shape."""
        return phrase in (f"{self.colour} {self.shape}", self.shape, f"{self.colour} object")


@dataclass(frozen=True)
class Scene:
    """An image and the shapes on it."""

    image: Image.Image
    shapes: tuple[Shape, ...]

    def find_truth(self, phrases: Sequence[str]) -> list[tuple[Box, int]]:
        """Returns the boxes of the shapes that the phrases name, each with the index of the first such phrase."""
        boxes = []
        for shape in self.shapes:
            indices = [i for i, phrase in enumerate(phrases) if shape.matches(phrase)]
            if indices:
                boxes.append((shape.box_xyxy, indices[0]))
        return boxes


def _choose_colour(rng: np.random.Generator) -> Pixels:
    return rng.uniform(40, 215, 3).astype(np.float32)


def _enlarge(grid: Pixels, width: int, height: int) -> Pixels:
    channels = [Image.fromarray(grid[..., c]).resize((width, height), Image.Resampling.BILINEAR) for c in range(3)]
    return np.stack([np.asarray(c) for c in channels], axis=-1)


def noise(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """Draws soft clouds on one colour."""
    cells = int(rng.choice([2, 4, 8, 16]))
    clouds = rng.normal(0, rng.uniform(0, 30), (cells, cells, 3)).astype(np.float32)
    pixels: Pixels = _choose_colour(rng) + _enlarge(clouds, width, height)
    return pixels


def gradient(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """Draws a gradient between two colours at any angle."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    along = x / width * math.cos(angle) + y / height * math.sin(angle)
    share = ((along - along.min()) / max(float(np.ptp(along)), 1e-6))[..., None]
    pixels: Pixels = _choose_colour(rng) * (1 - share) + _choose_colour(rng) * share
    return pixels


def stripes(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """Draws soft stripes at any angle."""
    angle, period = rng.uniform(0, math.pi), rng.uniform(0.05, 0.4) * min(width, height)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    band = ((x * math.cos(angle) + y * math.sin(angle)) // max(period, 2) % 2)[..., None]
    pixels: Pixels = _choose_colour(rng) + band * rng.uniform(-35, 35, 3).astype(np.float32)
    return pixels


def patches(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """Draws overlapping rectangles of slightly different colours."""
    pixels = np.broadcast_to(_choose_colour(rng), (height, width, 3)).astype(np.float32)
    for _ in range(int(rng.integers(3, 12))):
        x, y = rng.integers(0, width), rng.integers(0, height)
        w, h = rng.integers(2, max(width // 2, 3)), rng.integers(2, max(height // 2, 3))
        pixels[y : y + h, x : x + w] += rng.uniform(-28, 28, 3).astype(np.float32)
    return pixels


def waves(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """Draws crossing waves; never used in training."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / min(width, height)
    pixels = np.broadcast_to(_choose_colour(rng), (height, width, 3)).astype(np.float32)
    for _ in range(3):
        fx, fy, phase = rng.uniform(2, 25), rng.uniform(2, 25), rng.uniform(0, 6)
        ripple = np.sin(fx * x + fy * y + phase).astype(np.float32)
        pixels = pixels + ripple[..., None] * rng.uniform(-14, 14, 3).astype(np.float32)
    return pixels


def tiles(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """Draws tiles of different shades; never used in training."""
    rows, columns = int(rng.integers(3, 12)), int(rng.integers(3, 12))
    shades = rng.normal(0, rng.uniform(4, 16), (rows, columns, 3)).astype(np.float32)
    y, x = np.mgrid[0:height, 0:width]
    pixels: Pixels = _choose_colour(rng) + shades[y * rows // height, x * columns // width]
    return pixels


Background = Callable[[np.random.Generator, int, int], Pixels]
TRAINING_BACKGROUNDS: tuple[Background, ...] = (noise, noise, gradient, stripes, patches)
UNSEEN_BACKGROUNDS: tuple[Background, ...] = (waves, tiles)


def _compute_star_outline(side: int) -> list[tuple[float, float]]:
    radii = [side / 2 * (1 if i % 2 == 0 else 0.42) for i in range(10)]
    angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
    return [(side / 2 + r * math.cos(a), side / 2 + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _draw_mask(shape: str, side: int) -> Image.Image:
    mask = Image.new("L", (side, side))
    draw, end, third = ImageDraw.Draw(mask), side - 1, side / 3
    if shape == "circle":
        draw.ellipse((0, 0, end, end), fill=255)
    elif shape == "square":
        draw.rectangle((0, 0, end, end), fill=255)
    elif shape == "triangle":
        draw.polygon([(side / 2, 0), (end, end), (0, end)], fill=255)
    elif shape == "star":
        draw.polygon(_compute_star_outline(side), fill=255)
    elif shape == "cross":
        draw.rectangle((third, 0, 2 * third, end), fill=255)
        draw.rectangle((0, third, end, 2 * third), fill=255)
    else:
        draw.ellipse((0, 0, end, end), outline=255, width=max(round(side / 6), 3))
    return mask


def _find_place(
    rng: np.random.Generator, width: int, height: int, shapes: Sequence[Shape]
) -> tuple[int, int, int] | None:
    """Chooses x, y and side of a square at random; returns None if it is too near to a shape."""
    low, high = (share * min(width, height) for share in SIZE_RANGE)
    side = max(int(rng.uniform(low, high)), 4)
    x, y = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    for left, top, right, bottom in (shape.box_xyxy for shape in shapes):
        is_apart_in_x = x >= right + MIN_GAP or left >= x + side + MIN_GAP
        is_apart_in_y = y >= bottom + MIN_GAP or top >= y + side + MIN_GAP
        if not (is_apart_in_x or is_apart_in_y):
            return None
    return x, y, side


def _try_to_add_shape(rng: np.random.Generator, image: Image.Image, shapes: Sequence[Shape]) -> Shape | None:
    """Draws a shape on the image; returns None if it has no room or too little contrast."""
    place = _find_place(rng, *image.size, shapes)
    if place is None:
        return None
    x, y, side = place
    colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
    rgb = np.clip(np.array(COLOURS[colour]) + rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3), 0, 255)
    background = np.asarray(image.crop((x, y, x + side, y + side))).mean(axis=(0, 1))
    if np.abs(rgb - background).max() < MIN_CONTRAST:
        return None
    mask = _draw_mask(shape, side)
    image.paste(tuple(int(v) for v in rgb), (x, y), mask)
    left, top, right, bottom = mask.getbbox() or (0, 0, side, side)
    return Shape(colour, shape, (x + left, y + top, x + right, y + bottom))


def draw_scene(
    rng: np.random.Generator,
    width: int,
    height: int,
    backgrounds: Sequence[Background] = TRAINING_BACKGROUNDS,
    max_shapes: int = 4,
) -> Scene:
    """Draws an image of `width` x `height` pixels with up to `max_shapes` shapes that do not overlap."""
    pixels = backgrounds[int(rng.integers(len(backgrounds)))](rng, width, height)
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(rng.uniform(0, 18))
    image = Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
    shape_count = int(rng.integers(1, max_shapes + 1))
    shapes: list[Shape] = []
    for _ in range(MAX_ATTEMPTS):
        if len(shapes) == shape_count:
            break
        if shape := _try_to_add_shape(rng, image, shapes):
            shapes.append(shape)
    return Scene(image, tuple(shapes))


def _choose_phrase(rng: np.random.Generator, colour: str, shape: str) -> str:
    return str(rng.choice([f"{colour} {shape}", shape, f"{colour} object"], p=[0.6, 0.2, 0.2]))


def _choose_candidates(rng: np.random.Generator, shapes: Sequence[Shape], max_phrases: int) -> Iterator[str]:
    """Yields phrases for some of the shapes, then near misses, then arbitrary ones."""
    share = 1.0 if rng.random() < 0.5 else 0.6
    named = [shape for shape in shapes if rng.random() < share]
    yield from (_choose_phrase(rng, shape.colour, shape.shape) for shape in named)
    colours, kinds = list(COLOURS), list(SHAPES)
    for shape in named[: int(rng.integers(0, max_phrases // 2))]:
        near_misses = (str(rng.choice(colours)), shape.shape), (shape.colour, str(rng.choice(kinds)))
        yield " ".join(near_misses[int(rng.integers(2))])
    for _ in range(int(rng.integers(1, max_phrases))):
        yield _choose_phrase(rng, str(rng.choice(colours)), str(rng.choice(kinds)))


def choose_phrases(rng: np.random.Generator, scene: Scene, max_phrases: int = 6) -> list[str]:
    """Chooses one to `max_phrases` phrases in random order, no two of which name the same shape of the scene."""
    phrases: list[str] = []
    for phrase in _choose_candidates(rng, scene.shapes, max_phrases):
        named = [shape for shape in scene.shapes if shape.matches(phrase)]
        if phrase not in phrases and not any(shape.matches(other) for shape in named for other in phrases):
            phrases.append(phrase)
    return [phrases[i] for i in rng.permutation(len(phrases))][:max_phrases]
