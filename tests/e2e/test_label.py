"""A labeled folder, imported into a real Label Studio, reviewed and exported: every box comes back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from backend.demo.shapes import draw_scene
from tests.e2e.label_studio import LabelStudio
from tests.servers import ROOT

pytestmark = pytest.mark.timeout(600)

LABELS = ("circle", "square", "star")


def test_the_import_file_is_imported_and_every_box_comes_back_within_a_pixel(
    label_studio: LabelStudio, tmp_path: Path
) -> None:
    folder, rng = tmp_path / "images", np.random.default_rng(2)
    folder.mkdir()
    for number in range(10):
        draw_scene(rng, 320, 240).image.save(folder / f"p {number}.jpg")
    out = label_studio.files / "dataset"
    arguments = [str(folder), "--labels", ",".join(LABELS), "--out", str(out), "--format", "yolo,labelstudio"]
    command = [sys.executable, "-m", "backend", "label", *arguments]
    env = {**os.environ, "MODEL": "demo", "MODEL_DIR": str(tmp_path / "data")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    project = label_studio.create_project("folder", (out / "labelstudio.xml").read_text(), {})
    storage = {"project": project.number, "title": "dataset", "path": str(out), "use_blob_urls": True}
    label_studio.call("POST", "/api/storages/localfiles", json=storage)
    tasks = json.loads((out / "labelstudio.json").read_text())
    label_studio.call("POST", f"/api/projects/{project.number}/import", json=tasks)
    task_ids = [task["id"] for task in project.list_tasks()]
    predictions = {prediction["task"]: prediction for prediction in project.list_predictions()}
    assert sorted(task_ids) == sorted(predictions)
    for task_id, prediction in predictions.items():  # accepted as they are, as a reviewer would
        label_studio.call("POST", f"/api/tasks/{task_id}/annotations", json={"result": prediction["result"]})
    exported_tasks = label_studio.call("GET", f"/api/projects/{project.number}/export?exportType=JSON_MIN")
    box_count = 0
    for task in exported_tasks:
        name = task["image"].split("/")[-1].replace("%20", " ")
        (path,) = out.glob(f"labels/*/{Path(name).stem}.txt")
        yolo_boxes = [[float(word) for word in line.split()] for line in path.read_text().splitlines()]
        regions = task.get("label", [])
        assert len(regions) == len(yolo_boxes)
        for (label_number, *cxcywh), region in zip(yolo_boxes, regions, strict=True):
            width, height = region["width"], region["height"]
            percents = (region["x"] + width / 2, region["y"] + height / 2, width, height)
            assert label_number == LABELS.index(region["rectanglelabels"][0])
            assert np.abs(np.array(cxcywh) - np.array(percents) / 100).max() * 320 < 1
            box_count += 1
    assert box_count > 5
