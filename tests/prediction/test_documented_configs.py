"""Runs every example of docs/labeling-configs.md; COOKBOOK=folder draws the images."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from backend.demo import samples
from backend.labelstudio.targets import expand_targets
from backend.prediction.predict_job import Predictor
from backend.registry.project_model import ProjectModel
from backend.settings import Settings
from tests.scenes import draw_regions, label_or_placeholder, place_side_by_side, to_data_uri
from tests.servers import ROOT

DOCUMENT = (ROOT / "docs" / "labeling-configs.md").read_text()
EXAMPLE = re.compile(
    r"## ([^\n]+)\n(?:(?!\n## ).)*?```xml\n(.*?)```\n+```json\n(.*?)```\n+Caption: `(.*?)`\n+!\[.*?\]\((.*?)\)", re.S
)
EXAMPLES = EXAMPLE.findall(DOCUMENT)
SETTINGS = Settings(model="demo")


def insert_images(value: Any) -> Any:
    """Replaces the names of sample images in task data with the images."""
    if isinstance(value, dict):
        return {key: insert_images(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [insert_images(inner) for inner in value]
    return to_data_uri(Image.open(samples.FOLDER / value)) if str(value).endswith(".jpg") else value


def make_context(data: dict[str, Any]) -> dict[str, Any] | None:
    """Makes the make_context that Label Studio sends while an annotator types; None if nothing is typed."""
    if "typed" not in data:
        return None
    return {
        "result": [
            {"from_name": "prompt", "type": "textarea", "value": {"text": [data["typed"]]}},
            {"from_name": "box_threshold", "type": "number", "value": {"number": data["number"]}},
        ]
    }


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(SETTINGS)


def test_every_section_with_a_config_is_an_example() -> None:
    assert len(EXAMPLES) == DOCUMENT.count("```xml") >= 8


@pytest.mark.parametrize("example", EXAMPLES, ids=[example[0] for example in EXAMPLES])
def test_each_example_has_its_caption_and_regions(example: tuple[str, ...], predictor: Predictor) -> None:
    _, config, text, caption, screenshot = example
    data = json.loads(text)
    task = {"id": 1, "data": insert_images(data)}
    (chunk,) = ProjectModel(SETTINGS, config).make_chunks([task], 1, make_context(data))
    targets = list(expand_targets(chunk.plan, chunk.tasks[0].data, chunk.tasks[0].prompt))
    phrases = [phrase for label in targets[0].query.labels for phrase in label.phrases]
    assert " . ".join([*phrases, *targets[0].query.negative_phrases]) + " ." == caption
    result = predictor.predict(json.loads(json.dumps(chunk.payload)))["answers"][0]["result"]
    for target in targets:
        names = (target.from_name, target.to_name, target.page)
        assert [r for r in result if (r["from_name"], r["to_name"], r.get("item_index")) == names], names
    if folder := os.environ.get("COOKBOOK"):
        images = [predictor.images.load(target.uri).image for target in targets]
        draw_targets(images, targets, result, Path(folder) / Path(screenshot).name)


def draw_targets(images: list[Image.Image], targets: list[Any], result: list[dict[str, Any]], path: Path) -> None:
    """Draws the targets side by side, with their boxes."""
    names = sorted({label_or_placeholder(region) for region in result})
    for image, target in zip(images, targets, strict=True):
        of_target = (target.to_name, target.page)
        draw_regions(image, [r for r in result if (r["to_name"], r.get("item_index")) == of_target], names)
    path.parent.mkdir(parents=True, exist_ok=True)
    place_side_by_side(images).save(path, quality=85)
