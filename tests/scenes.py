"""Images for the tests, from the project's own generator, with their data URIs and labeling configs."""

import base64
import io

import numpy as np
from PIL import Image, ImageDraw

from backend.demo.shapes import Scene, draw_scene
from tests.boxes import iou

COLOURS = ["#e6194b", "#4363d8", "#3cb44b", "#f58231", "#911eb4"]


def make_scenes(count: int, size: tuple[int, int] = (320, 240), seed: int = 11) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw_scene(rng, *size) for _ in range(count)]


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def to_data_uri(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(encode(image)).decode()


def make_labeling_config(scenes: list[Scene]) -> str:
    """Makes a labeling config with a label for each kind of shape in the scenes."""
    names = sorted({f"{shape.colour} {shape.shape}" for scene in scenes for shape in scene.shapes})
    labels = "".join(f'<Label value="{name}"/>' for name in names)
    return (
        '<View><Image name="image" value="$image"/>'
        f'<RectangleLabels name="label" toName="image">{labels}</RectangleLabels></View>'
    )


def to_pixel_box(region: dict) -> tuple[float, float, float, float]:
    """Converts a region's box back to pixels, xyxy."""
    value, width, height = region["value"], region["original_width"], region["original_height"]
    x, y = value["x"] * width / 100, value["y"] * height / 100
    return x, y, x + value["width"] * width / 100, y + value["height"] * height / 100


def compute_recall(result: list[dict], scene: Scene) -> float:
    """Returns the share of the scene's shapes with a region of the right label and an IoU of at least 0.5."""
    hits = [
        any(
            region["value"]["rectanglelabels"] == [f"{shape.colour} {shape.shape}"]
            and iou(to_pixel_box(region), shape.box_xyxy) >= 0.5
            for region in result
        )
        for shape in scene.shapes
    ]
    return sum(hits) / len(hits)


def label_or_placeholder(region: dict) -> str:
    value = region["value"]
    return (value.get("rectanglelabels") or value.get("labels") or ["(choose)"])[0]


def draw_regions(image: Image.Image, result: list[dict], names: list[str]) -> None:
    """Draws boxes with label and score on an image; the position of a label in `names` decides its colour."""
    pen = ImageDraw.Draw(image)
    for region in result:
        if region["type"] == "rectangle":
            continue
        name = label_or_placeholder(region)
        box = to_pixel_box({**region, "original_width": image.width, "original_height": image.height})
        colour, text = COLOURS[names.index(name) % len(COLOURS)], f"{name} {region['score']:.2f}"
        pen.rectangle(box, outline=colour, width=3)
        pen.rectangle(pen.textbbox((box[0] + 4, box[1] + 3), text, font_size=14), fill="white")
        pen.text((box[0] + 4, box[1] + 3), text, fill=colour, font_size=14)


def place_side_by_side(images: list[Image.Image], gap: int = 8) -> Image.Image:
    """Puts images of equal height in a row."""
    sheet = Image.new("RGB", (sum(image.width + gap for image in images) - gap, images[0].height), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (sum(before.width + gap for before in images[:number]), 0))
    return sheet
