"""`label`: a folder of pictures becomes a dataset that the usual libraries read."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from backend.boxes import iou
from backend.demo.shapes import Scene, draw_scene
from tests.servers import ROOT, wait_for

LABELS = ("circle", "square", "triangle", "star", "cross", "ring")
COUNT = 200


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    """Names as they are written, with what is in them; each name is in two folders."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(31)
    drawn: dict[str, Scene] = {}
    for number in range(COUNT):
        name = f"{'a' if number % 2 else 'b'}__{number // 2:03}.jpg"
        drawn[name] = draw_scene(rng, 320, 240)
    for name, scene in drawn.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        scene.image.save(path, quality=95)
    Image.new("RGB", (320, 240), "grey").save(folder / "blank.png")
    (folder / "broken.jpg").write_bytes(b"not a picture")
    (folder / "notes.txt").write_text("not meant")
    pictures.folder = folder  # type: ignore[attr-defined]
    return drawn


def label(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "MODEL": "demo", **env}
    command = [sys.executable, "-m", "backend", "label", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def out(pictures: dict[str, Scene], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("label")
    source = pictures_folder()
    done = label(
        source, "--labels", ",".join(LABELS), "--out", folder / "out", "--format", "yolo,coco,labelstudio",
        "--preview", "--zip", MODEL_DIR=str(folder / "data"),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr  # one picture is broken
    assert "skipped broken.jpg: the file is not a picture" in done.stdout
    return folder / "out"


def pictures_folder() -> Path:
    return pictures.folder  # type: ignore[attr-defined]


def of_split(out: Path) -> dict[str, str]:
    """Each picture's split, by name."""
    images = out / "images"
    return {path.name: split for split in ("train", "val") for path in (images / split).iterdir() if path.is_file()}


def test_every_picture_keeps_its_name_and_its_bytes(pictures: dict[str, Scene], out: Path) -> None:
    splits = of_split(out)
    assert sorted(splits) == sorted([*pictures, "blank.png"])
    assert 20 <= list(splits.values()).count("val") <= 60
    for name, split in splits.items():
        assert (out / "images" / split / name).read_bytes() == (
            pictures_folder() / name.replace("__", "/")
        ).read_bytes()


def test_yolo_has_every_box_and_the_right_classes(pictures: dict[str, Scene], out: Path) -> None:
    found, splits = [], of_split(out)
    for name, scene in pictures.items():
        lines = (out / "labels" / splits[name] / name).with_suffix(".txt").read_text().splitlines()
        rows = [[float(word) for word in line.split()] for line in lines]
        for shape in scene.shapes:
            own = [
                ((x - w / 2) * 320, (y - h / 2) * 240, (x + w / 2) * 320, (y + h / 2) * 240)
                for number, x, y, w, h in rows
                if LABELS[int(number)] == shape.shape
            ]
            found.append(any(iou(box, shape.box_xyxy) >= 0.5 for box in own))
    assert np.mean(found) > 0.9
    assert (out / "labels" / splits["blank.png"] / "blank.txt").read_text() == ""  # a negative is kept


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_supervision_reads_yolo_and_coco(out: Path) -> None:
    supervision = pytest.importorskip("supervision")
    for split in ("train", "val"):
        yolo = supervision.DetectionDataset.from_yolo(
            str(out / "images" / split), str(out / "labels" / split), str(out / "data.yaml")
        )
        coco = supervision.DetectionDataset.from_coco(
            str(out / "images" / split), str(out / "annotations" / f"{split}.json")
        )
        assert yolo.classes == list(LABELS)
        found = [sum(len(row.xyxy) for row in dataset.annotations.values()) for dataset in (yolo, coco)]
        assert found[0] == found[1] > 0


def test_pycocotools_scores_the_file_against_the_truth(
    pictures: dict[str, Scene], out: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    written = json.loads((out / "annotations" / "train.json").read_text())
    truth: list[dict[str, Any]] = []
    for image in written["images"]:
        for shape in pictures[image["file_name"]].shapes if image["file_name"] in pictures else ():
            x1, y1, x2, y2 = shape.box_xyxy
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            truth.append(
                {"id": len(truth) + 1, "image_id": image["id"], **box, "category_id": LABELS.index(shape.shape) + 1}
            )
    (tmp_path / "truth.json").write_text(json.dumps({**written, "annotations": truth}))
    coco = COCO(str(tmp_path / "truth.json"))
    scored = COCOeval(coco, coco.loadRes(written["annotations"]), "bbox")
    scored.evaluate()
    scored.accumulate()
    scored.summarize()
    assert scored.stats[1] > 0.85  # AP at IoU 0.5
    capsys.readouterr()


def test_the_import_file_of_label_studio(out: Path) -> None:
    tasks = json.loads((out / "labelstudio.json").read_text())
    assert len(tasks) == COUNT + 1
    assert all(task["data"]["image"].startswith("/data/local-files/?d=out/images/") for task in tasks)
    assert all(len(task["predictions"]) == 1 for task in tasks)
    assert all(f'value="{name}"' in (out / "labelstudio.xml").read_text() for name in LABELS)


def test_previews_and_zip(out: Path) -> None:
    assert len(list((out / "preview").rglob("*.jpg"))) >= COUNT + 4
    with zipfile.ZipFile(out.parent / "out.zip") as packed:
        assert "data.yaml" in packed.namelist()


def test_a_finished_folder_is_not_overwritten(out: Path) -> None:
    words = (pictures_folder(), "--labels", ",".join(LABELS), "--out", out)
    again = label(*words, MODEL_DIR=str(out.parent / "data"))
    assert (again.returncode, "--force" in again.stderr) == (2, True)
    before = of_split(out)
    forced = label(*words, "--force", MODEL_DIR=str(out.parent / "data"))
    assert forced.returncode == 1, forced.stdout + forced.stderr
    assert of_split(out) == before


def test_a_folder_that_is_not_ours_is_left_alone(pictures: dict[str, Scene], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    done = label(pictures_folder(), "--labels", "circle", "--out", tmp_path, MODEL_DIR=str(tmp_path / "data"))
    assert (done.returncode, "holds something already" in done.stderr) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_sample_says_what_thresholds_would_give(pictures: dict[str, Scene], tmp_path: Path) -> None:
    words = ("--labels", "circle,star", "--out", tmp_path / "out", "--sample", "8")
    done = label(pictures_folder() / "a", *words, MODEL_DIR=str(tmp_path / "data"))
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [
        int(word) for word in next(line for line in done.stdout.splitlines() if line.startswith("circle")).split()[1:]
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    assert len(list((tmp_path / "out" / "sample" / "preview").glob("0*.jpg"))) == 8


def test_the_same_picture_many_times_is_labelled_each_time(tmp_path: Path) -> None:
    (tmp_path / "same").mkdir()
    picture = draw_scene(np.random.default_rng(1), 96, 96).image
    for number in range(12):
        picture.save(tmp_path / "same" / f"{number}.png")
    words = (tmp_path / "same", "--labels", "circle", "--out", tmp_path / "out")
    done = label(*words, MODEL_DIR=str(tmp_path / "data"), BATCH_SIZE="1")
    assert done.returncode == 0, done.stdout
    assert len(of_split(tmp_path / "out")) == 12


def test_killed_it_goes_on_where_it_was(tmp_path: Path) -> None:
    folder, rng = tmp_path / "many", np.random.default_rng(5)
    folder.mkdir()
    for number in range(150):
        draw_scene(rng, 96, 96).image.save(folder / f"{number:03}.jpg")
    command = [
        sys.executable,
        "-m",
        "backend",
        "label",
        str(folder),
        "--labels",
        "circle",
        "--out",
        str(tmp_path / "out"),
    ]
    env = {**os.environ, "MODEL": "demo", "MODEL_DIR": str(tmp_path / "data"), "BATCH_SIZE": "4"}
    first = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kept = tmp_path / "out" / ".answers.jsonl"
    wait_for(lambda: kept.exists() and len(kept.read_text().splitlines()) > 20, 90, "some answers")
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(1)
    with kept.open("a") as file:
        file.write('{"key": "cut o')  # as a kill may leave it
    answered = len(kept.read_text().splitlines())
    done = label(
        folder, "--labels", "circle", "--out", tmp_path / "out", MODEL_DIR=str(tmp_path / "data"), BATCH_SIZE="4"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = kept.read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines[1:]}) == len(lines) - 1 == 150
    assert answered > 20
    assert len(of_split(tmp_path / "out")) == 150
