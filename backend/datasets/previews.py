"""Draws boxes on images, and contact sheets that show the boxes of a label at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from backend.boxes import Box
from backend.datasets.formats import LabeledImage
from backend.datasets.image_files import ImageFile
from backend.images.decoding import to_rgb

COLOURS = ("#e6194b", "#4363d8", "#3cb44b", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")  # of labels
MAX_EDGE = 1280  # pixels of a preview
TILE_SIZE, TILE_MARGIN = 240, 4  # pixels
SHEET_COLUMNS, MAX_TILES = 6, 60  # tiles


def write_previews(images: Sequence[LabeledImage], labels: Sequence[str], out: Path) -> None:
    """Writes `preview/`: each image with its boxes, and a contact sheet for each label that has boxes."""
    folder = out / "preview"
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        draw_boxes(image, labels).save((folder / image.file.name).with_suffix(".jpg"), quality=85)
    for number, label in enumerate(labels):
        sheet = draw_sheet(images, label)
        if sheet:
            sheet.save(folder / f"sheet-{number}.jpg", quality=85)


def draw_boxes(image: LabeledImage, labels: Sequence[str]) -> Image.Image:
    """Draws an image with its boxes, labels and scores, reduced to MAX_EDGE pixels."""
    preview = _open_upright(image.file)
    preview.thumbnail((MAX_EDGE, MAX_EDGE))
    draw, scale = ImageDraw.Draw(preview), preview.width / image.width
    for detection in image.detections:
        colour = COLOURS[labels.index(detection.label) % len(COLOURS)]
        corners = [edge * scale for edge in detection.box_xyxy]
        draw.rectangle(corners, outline=colour, width=3)
        text, position = f"{detection.label} {detection.score:.2f}", (corners[0] + 4, corners[1] + 3)
        draw.rectangle(draw.textbbox(position, text, font_size=14), fill="white")
        draw.text(position, text, fill=colour, font_size=14)
    return preview


def draw_sheet(images: Sequence[LabeledImage], label: str) -> Image.Image | None:
    """Draws the best boxes of a label, cut out, best first and with their scores; None if it has no boxes."""
    crops = [(image.file, detection) for image in images for detection in image.detections if detection.label == label]
    crops = sorted(crops, key=lambda crop: crop[1].score, reverse=True)[:MAX_TILES]
    if not crops:
        return None
    row_count = -(-len(crops) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * TILE_SIZE, row_count * TILE_SIZE), "white")
    for number, (file, detection) in enumerate(crops):
        tile, score = _cut_out(file, detection.box_xyxy), f"{detection.score:.2f}"
        ImageDraw.Draw(tile).text((4, 4), score, fill="black", font_size=14, stroke_width=2, stroke_fill="white")
        sheet.paste(tile, (number % SHEET_COLUMNS * TILE_SIZE, number // SHEET_COLUMNS * TILE_SIZE))
    return sheet


def _cut_out(file: ImageFile, box_xyxy: Box) -> Image.Image:
    x1, y1, x2, y2 = map(round, box_xyxy)
    crop = _open_upright(file).crop((x1, y1, x2, y2))
    if not min(crop.size):
        return Image.new("RGB", (8, 8))
    return ImageOps.contain(crop, (TILE_SIZE - 2 * TILE_MARGIN, TILE_SIZE - 2 * TILE_MARGIN))


def _open_upright(file: ImageFile) -> Image.Image:
    with Image.open(file.path) as image:
        return to_rgb(ImageOps.exif_transpose(image))
