"""Every example of docs/labeling-configs.md does what it says; COOKBOOK=folder draws the pictures."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from backend.demo import samples
from backend.labelstudio.labeling_config import read_plan
from backend.labelstudio.targets import expand_targets
from backend.prediction import predict_job as jobs
from backend.registry.project_model import to_row
from backend.settings import Settings
from tests.scenes import beside, data_uri, draw_regions, label_of
from tests.servers import ROOT

DOCUMENT = (ROOT / "docs" / "labeling-configs.md").read_text()
EXAMPLE = re.compile(
    r"## ([^\n]+)\n(?:(?!\n## ).)*?```xml\n(.*?)```\n+```json\n(.*?)```\n+Caption: `(.*?)`\n+!\[.*?\]\((.*?)\)", re.S
)
EXAMPLES = EXAMPLE.findall(DOCUMENT)


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
    row = to_row({"id": 1, "data": with_pictures(data)}, plan, context(data))
    seen = list(expand_targets(plan, row["data"], jobs.Prompt.from_dict(row["prompt"]) if "prompt" in row else None))
    phrases = [phrase for label in seen[0].query.labels for phrase in label.phrases]
    assert " . ".join([*phrases, *seen[0].query.negatives]) + " ." == caption
    payload = {
        "plan": plan.to_dict(),
        "model_version": "v",
        "fingerprint": tools.fingerprint,
        "learned": None,
        "tasks": [row],
    }
    result = jobs.predict(json.loads(json.dumps(payload)))["answers"][0]["result"]
    for view in seen:
        names = (view.from_name, view.to_name, view.page)
        assert [r for r in result if (r["from_name"], r["to_name"], r.get("item_index")) == names], names
    if folder := os.environ.get("COOKBOOK"):
        draw([tools.images.load(view.uri).image for view in seen], seen, result, Path(folder) / Path(picture).name)


def draw(images: list[Image.Image], seen: list[Any], result: list[dict[str, Any]], path: Path) -> None:
    """The views side by side, with their boxes."""
    names = sorted({label_of(region) for region in result})
    for image, view in zip(images, seen, strict=True):
        of_view = (view.to_name, view.page)
        draw_regions(image, [r for r in result if (r["to_name"], r.get("item_index")) == of_view], names)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside(images).save(path, quality=85)
