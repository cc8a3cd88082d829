"""Every example of docs/labeling-configs.md does what it says; COOKBOOK=folder draws the pictures."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from backend import jobs
from backend.demo import samples
from backend.labeling import read_plan
from backend.settings import Settings
from backend.views import views
from model import _row
from tests.pictures import data_uri
from tests.running import ROOT

DOCUMENT = (ROOT / "docs" / "labeling-configs.md").read_text()
EXAMPLE = re.compile(
    r"## ([^\n]+)\n(?:(?!\n## ).)*?```xml\n(.*?)```\n+```json\n(.*?)```\n+Caption: `(.*?)`\n+!\[.*?\]\((.*?)\)", re.S
)
EXAMPLES = EXAMPLE.findall(DOCUMENT)
COLOURS = ["#e6194b", "#4363d8", "#3cb44b", "#f58231", "#911eb4"]


def with_pictures(value: Any) -> Any:
    """The data with sample pictures in place of their names."""
    if isinstance(value, dict):
        return {key: with_pictures(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_pictures(inner) for inner in value]
    return data_uri(Image.open(samples.FOLDER / value)) if str(value).endswith(".jpg") else value


def context(data: dict[str, Any]) -> dict[str, Any] | None:
    """What Label Studio sends while an annotator types."""
    if "typed" not in data:
        return None
    return {
        "result": [
            {"from_name": "prompt", "type": "textarea", "value": {"text": [data["typed"]]}},
            {"from_name": "box_threshold", "type": "number", "value": {"number": data["number"]}},
        ]
    }


@pytest.fixture(scope="module")
def tools() -> jobs.Tools:
    return jobs.set_up(Settings(model="demo"))


def test_every_section_with_a_config_is_an_example() -> None:
    assert len(EXAMPLES) == DOCUMENT.count("```xml") >= 8


@pytest.mark.parametrize("example", EXAMPLES, ids=[example[0] for example in EXAMPLES])
def test_an_example(example: tuple[str, ...], tools: jobs.Tools) -> None:
    _, config, text, caption, picture = example
    data = json.loads(text)
    plan = read_plan(config, 0.3, 0.7)
    row = _row({"id": 1, "data": with_pictures(data)}, plan, context(data))
    seen = list(views(plan, row["data"], jobs.Prompt.from_dict(row["prompt"]) if "prompt" in row else None))
    phrases = [phrase for label in seen[0].asked.labels for phrase in label.phrases]
    assert " . ".join([*phrases, *seen[0].asked.negatives]) + " ." == caption
    payload = {"plan": plan.to_dict(), "model_version": "v", "fingerprint": tools.fingerprint, "tasks": [row]}
    result = jobs.predict(json.loads(json.dumps(payload)))["answers"][0]["result"]
    for view in seen:
        names = (view.from_name, view.to_name, view.page)
        assert [r for r in result if (r["from_name"], r["to_name"], r.get("item_index")) == names], names
    if folder := os.environ.get("COOKBOOK"):
        draw([tools.images.load(view.uri).image for view in seen], seen, result, Path(folder) / Path(picture).name)


def draw(images: list[Image.Image], seen: list[Any], result: list[dict[str, Any]], path: Path) -> None:
    """The views side by side, with their boxes."""
    sheet = Image.new("RGB", (sum(image.width for image in images) + 8 * (len(images) - 1), images[0].height), "white")
    left, names = 0, sorted({label(region) for region in result})
    for image, view in zip(images, seen, strict=True):
        pen = ImageDraw.Draw(image)
        for region in result:
            if (region["to_name"], region.get("item_index")) == (view.to_name, view.page) and region[
                "type"
            ] != "rectangle":
                value, colour = region["value"], COLOURS[names.index(label(region)) % len(COLOURS)]
                x, y = value["x"] * image.width / 100, value["y"] * image.height / 100
                box = (x, y, x + value["width"] * image.width / 100, y + value["height"] * image.height / 100)
                pen.rectangle(box, outline=colour, width=3)
                text = f"{label(region)} {region['score']:.2f}"
                pen.rectangle(pen.textbbox((x + 4, y + 3), text, font_size=14), fill="white")
                pen.text((x + 4, y + 3), text, fill=colour, font_size=14)
        sheet.paste(image, (left, 0))
        left += image.width + 8
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=85)


def label(region: dict[str, Any]) -> str:
    value = region["value"]
    return (value.get("rectanglelabels") or value.get("labels") or ["(choose)"])[0]
