"""Pictures for the tests, from the project's own generator, and their addresses."""

import base64
import io

import numpy as np
from PIL import Image

from backend.demo.shapes import Scene, draw_scene
from backend.regions import iou


def scenes(count: int, size: tuple[int, int] = (320, 240), seed: int = 11) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw_scene(rng, *size) for _ in range(count)]


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_uri(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(encode(image)).decode()


def config_for(scene_list: list[Scene]) -> str:
    """A labeling config whose labels name everything in the scenes."""
    names = sorted({f"{shape.colour} {shape.shape}" for scene in scene_list for shape in scene.shapes})
    labels = "".join(f'<Label value="{name}"/>' for name in names)
    return (
        '<View><Image name="image" value="$image"/>'
        f'<RectangleLabels name="label" toName="image">{labels}</RectangleLabels></View>'
    )


def pixel_box(region: dict) -> tuple[float, float, float, float]:
    """A region's box back in pixels, xyxy."""
    value, width, height = region["value"], region["original_width"], region["original_height"]
    x, y = value["x"] * width / 100, value["y"] * height / 100
    return x, y, x + value["width"] * width / 100, y + value["height"] * height / 100


def recall(result: list[dict], scene: Scene) -> float:
    """Share of the scene's shapes with a region of the right label and an IoU of at least 0.5."""
    hits = [
        any(
            region["value"]["rectanglelabels"] == [f"{shape.colour} {shape.shape}"]
            and iou(pixel_box(region), shape.box_xyxy) >= 0.5
            for region in result
        )
        for shape in scene.shapes
    ]
    return sum(hits) / len(hits)
