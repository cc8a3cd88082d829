"""Boxes drawn on pictures, and the sheets to look at before and after a long run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from backend.datasets.formats import LabeledImage
from backend.images.decoding import to_rgb

COLOURS = ("#e6194b", "#4363d8", "#3cb44b", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")
MAX_EDGE, TILE_SIZE, COLUMNS, MAX_TILES = 1280, 240, 6, 60  # pixels, pixels, tiles, tiles


def draw_boxes(row: LabeledImage, labels: Sequence[str]) -> Image.Image:
    """The picture, at most `MAX_EDGE` pixels wide and high, with its boxes, labels and scores."""
    with Image.open(row.file.path) as image:
        shown = to_rgb(ImageOps.exif_transpose(image))
    shown.thumbnail((MAX_EDGE, MAX_EDGE))
    pen, scale = ImageDraw.Draw(shown), shown.width / row.width
    for label, score, box in row.boxes:
        colour, corners = COLOURS[labels.index(label) % len(COLOURS)], [edge * scale for edge in box]
        pen.rectangle(corners, outline=colour, width=3)
        text = f"{label} {score:.2f}"
        pen.rectangle(pen.textbbox((corners[0] + 4, corners[1] + 3), text, font_size=14), fill="white")
        pen.text((corners[0] + 4, corners[1] + 3), text, fill=colour, font_size=14)
    return shown


def write_previews(rows: Sequence[LabeledImage], labels: Sequence[str], out: Path) -> None:
    """`preview/`: each picture with its boxes, and a sheet of the boxes of each label, best first."""
    for row in rows:
        path = (out / "preview" / row.file.name).with_suffix(".jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_boxes(row, labels).save(path, quality=85)
    for number, label in enumerate(labels):
        write_sheet(rows, label, out / "preview" / f"sheet-{number}.jpg")


def write_sheet(rows: Sequence[LabeledImage], label: str, path: Path) -> None:
    """The boxes of one label cut out, best first, with their scores; no file where there are none."""
    found = sorted(((score, row, box) for row in rows for own, score, box in row.boxes if own == label), key=_score)
    found = found[::-1][:MAX_TILES]
    if not found:
        return
    down = -(-len(found) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE_SIZE, down * TILE_SIZE), "white")
    for place, (score, row, box) in enumerate(found):
        tile = _cut(row, box)
        pen = ImageDraw.Draw(tile)
        pen.text((4, 4), f"{score:.2f}", fill="black", font_size=14, stroke_width=2, stroke_fill="white")
        sheet.paste(tile, (place % COLUMNS * TILE_SIZE, place // COLUMNS * TILE_SIZE))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=85)


def _score(found: tuple[float, LabeledImage, object]) -> float:
    return found[0]


def _cut(row: LabeledImage, box: tuple[float, float, float, float]) -> Image.Image:
    with Image.open(row.file.path) as image:
        cut = to_rgb(ImageOps.exif_transpose(image)).crop(tuple(round(edge) for edge in box))  # type: ignore[arg-type]
    return ImageOps.contain(cut, (TILE_SIZE - 8, TILE_SIZE - 8)) if min(cut.size) else Image.new("RGB", (8, 8))
