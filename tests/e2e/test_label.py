"""A labelled folder, reviewed in a real Label Studio: its import file shows the boxes, and the way back keeps them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from backend.demo.shapes import draw_scene
from tests.e2e.studio import LabelStudio
from tests.servers import ROOT

pytestmark = pytest.mark.timeout(600)

LABELS = ("circle", "square", "star")


def size_of(region: dict[str, float]) -> tuple[float, float]:
    return region["width"], region["height"]


def test_the_import_file_is_imported_and_every_box_comes_back_within_a_pixel(
    studio: LabelStudio, tmp_path: Path
) -> None:
    folder, rng = tmp_path / "pictures", np.random.default_rng(2)
    folder.mkdir()
    for number in range(10):
        draw_scene(rng, 320, 240).image.save(folder / f"p {number}.jpg")
    out = studio.files / "dataset"
    command = [sys.executable, "-m", "backend", "label", str(folder), "--labels", ",".join(LABELS), "--out", str(out)]
    env = {**os.environ, "MODEL": "demo", "MODEL_DIR": str(tmp_path / "data")}
    words = ["--format", "yolo,labelstudio"]
    done = subprocess.run(
        [*command, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    project = studio.create_project("folder", (out / "labelstudio.xml").read_text(), {})
    storage = {"project": project.number, "title": "dataset", "path": str(out), "use_blob_urls": True}
    studio.call("POST", "/api/storages/localfiles", json=storage)
    tasks = json.loads((out / "labelstudio.json").read_text())
    studio.call("POST", f"/api/projects/{project.number}/import", json=tasks)
    shown = {task["id"]: task["data"]["image"] for task in project.tasks()}
    predictions = {prediction["task"]: prediction for prediction in project.predictions()}
    assert sorted(shown) == sorted(predictions)
    for task, prediction in predictions.items():  # accepted as they are, as a reviewer would
        studio.call("POST", f"/api/tasks/{task}/annotations", json={"result": prediction["result"]})
    exported = studio.call("GET", f"/api/projects/{project.number}/export?exportType=JSON_MIN")
    boxes = 0
    for row in exported:
        name = row["image"].split("/")[-1].replace("%20", " ")
        (path,) = out.glob(f"labels/*/{Path(name).stem}.txt")
        lines = [[float(word) for word in line.split()] for line in path.read_text().splitlines()]
        back = [
            (
                LABELS.index(r["rectanglelabels"][0]),
                r["x"] + r["width"] / 2,
                r["y"] + r["height"] / 2,
                r["width"],
                r["height"],
            )
            for r in row.get("label", [])
        ]
        assert len(back) == len(lines)
        for (number, *edges), (own, *percents) in zip(lines, back, strict=True):
            assert number == own
            assert np.abs(np.array(edges) - np.array(percents) / 100).max() * 320 < 1
            boxes += 1
    assert boxes > 5
