"""`label`: a folder of images becomes a dataset that the usual libraries read."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from backend.demo.shapes import Scene, draw_scene
from tests.boxes import iou
from tests.servers import ROOT, ServeProcess, wait_for

LABELS = ("circle", "square", "triangle", "star", "cross", "ring")
COUNT = 200
ALL_OUTPUTS = ("--format", "yolo,coco,labelstudio", "--preview", "--zip")

# Runs the command line, and kills it for real at the first audit event that the pattern matches.
KILL_AT_EVENT = """
import os, re, signal, sys

pattern = re.compile(sys.argv.pop(1))

def kill(event, arguments):
    if event in ("open", "os.link", "os.rename") and pattern.match(f"{event} {arguments}"):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
from backend.cli.main import main
main()
"""

KILL_POINTS = {
    "before the first answer": r"os\.rename .*\.answers",
    "images": r"os\.link .*/images/val/",
    "YOLO labels": r"open .*/labels/val/.*'w'",
    "data.yaml": r"open .*/data\.yaml.*'w'",
    "COCO": r"open .*/annotations/val\.json.*'w'",
    "Label Studio": r"open .*/labelstudio\.xml.*'w'",
    "previews": r"open .*/preview/.*'w",
    "sheets": r"open .*/preview/sheet-1.*'w",
    "zip": r"open .*images/(train|val)/.*'r'",
    "marker": r"open .*/\.finished.*'w'",
}


@dataclass(frozen=True)
class Source:
    """A folder of images, and their scenes by the names in the dataset; each file name is in two folders."""

    folder: Path
    scenes: Mapping[str, Scene]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(31)
    scenes: dict[str, Scene] = {}
    for number in range(COUNT):
        name = f"{'a' if number % 2 else 'b'}__{number // 2:03}.jpg"
        scenes[name] = draw_scene(rng, 320, 240)
    for name, scene in scenes.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        scene.image.save(path, quality=95)
    Image.new("RGB", (320, 240), "grey").save(folder / "blank.png")
    (folder / "broken.jpg").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("not meant")
    return Source(folder, scenes)


def label(*arguments: object, kill_at: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    program = ["-c", KILL_AT_EVENT, kill_at] if kill_at else ["-m", "backend"]
    return subprocess.run(
        [sys.executable, *program, "label", *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "MODEL": "demo", **env}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def out(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("label")
    done = label(
        source.folder, "--labels", ",".join(LABELS), "--out", folder / "out", *ALL_OUTPUTS,
        MODEL_DIR=str(folder / "data"),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr  # one image is broken
    assert "skipped broken.jpg: the file is not a supported image" in done.stdout
    return folder / "out"


def read_splits(out: Path) -> dict[str, str]:
    """Returns each image's split, by name."""
    images = out / "images"
    return {path.name: split for split in ("train", "val") for path in (images / split).glob("*") if path.is_file()}


def test_every_image_keeps_its_name_and_its_bytes(source: Source, out: Path) -> None:
    splits = read_splits(out)
    assert sorted(splits) == sorted([*source.scenes, "blank.png"])
    assert 20 <= list(splits.values()).count("val") <= 60
    for name, split in splits.items():
        original = source.folder / name.replace("__", "/")
        assert (out / "images" / split / name).read_bytes() == original.read_bytes()


def test_yolo_has_every_box_and_the_right_classes(source: Source, out: Path) -> None:
    is_detected, splits = [], read_splits(out)
    for name, scene in source.scenes.items():
        lines = (out / "labels" / splits[name] / name).with_suffix(".txt").read_text().splitlines()
        rows = [[float(word) for word in line.split()] for line in lines]
        for shape in scene.shapes:
            boxes = [
                ((x - w / 2) * 320, (y - h / 2) * 240, (x + w / 2) * 320, (y + h / 2) * 240)
                for number, x, y, w, h in rows
                if LABELS[int(number)] == shape.shape
            ]
            is_detected.append(any(iou(box, shape.box_xyxy) >= 0.5 for box in boxes))
    assert np.mean(is_detected) > 0.9
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
        counts = [sum(len(row.xyxy) for row in dataset.annotations.values()) for dataset in (yolo, coco)]
        assert counts[0] == counts[1] > 0


def test_pycocotools_evaluates_the_file_against_the_truth(
    source: Source, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    written = json.loads((out / "annotations" / "train.json").read_text())
    truth: list[dict[str, Any]] = []
    for image in written["images"]:
        for shape in source.scenes[image["file_name"]].shapes if image["file_name"] in source.scenes else ():
            x1, y1, x2, y2 = shape.box_xyxy
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            truth.append(
                {"id": len(truth) + 1, "image_id": image["id"], **box, "category_id": LABELS.index(shape.shape) + 1}
            )
    (tmp_path / "truth.json").write_text(json.dumps({**written, "annotations": truth}))
    coco = COCO(str(tmp_path / "truth.json"))
    evaluation = COCOeval(coco, coco.loadRes(written["annotations"]), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[1] > 0.85  # AP at IoU 0.5
    capsys.readouterr()


def test_the_import_file_has_a_task_with_a_prediction_for_each_image(out: Path) -> None:
    tasks = json.loads((out / "labelstudio.json").read_text())
    assert len(tasks) == COUNT + 1
    assert all(task["data"]["image"].startswith("/data/local-files/?d=out/images/") for task in tasks)
    assert all(len(task["predictions"]) == 1 for task in tasks)
    assert all(f'value="{name}"' in (out / "labelstudio.xml").read_text() for name in LABELS)


def test_previews_and_a_zip_file_are_written(out: Path) -> None:
    assert len(list((out / "preview").rglob("*.jpg"))) >= COUNT + 4
    with zipfile.ZipFile(out.parent / "out.zip") as archive:
        assert "data.yaml" in archive.namelist()


def test_a_finished_folder_is_not_overwritten(source: Source, out: Path) -> None:
    arguments = (source.folder, "--labels", ",".join(LABELS), "--out", out)
    again = label(*arguments, MODEL_DIR=str(out.parent / "data"))
    assert (again.returncode, "--force" in again.stderr) == (2, True)
    before = read_splits(out)
    forced = label(*arguments, "--force", MODEL_DIR=str(out.parent / "data"))
    assert forced.returncode == 1, forced.stdout + forced.stderr
    assert read_splits(out) == before


def test_a_folder_with_other_files_is_refused(source: Source, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    done = label(source.folder, "--labels", "circle", "--out", tmp_path, MODEL_DIR=str(tmp_path / "data"))
    assert (done.returncode, "is not empty" in done.stderr) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_force_removes_no_files_of_others(tmp_path: Path) -> None:
    images = tmp_path / "mine" / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (96, 96), "grey").save(images / "1.png")
    for source in (images, tmp_path / "mine"):
        done = label(
            source, "--labels", "circle", "--out", tmp_path / "mine", "--force", MODEL_DIR=str(tmp_path / "data")
        )
        assert (done.returncode, str(images) in done.stderr) == (2, True), done.stderr
    assert [path.name for path in (tmp_path / "mine").rglob("*")] == ["images", "1.png"]


def test_a_sample_shows_how_many_boxes_each_threshold_gives(source: Source, tmp_path: Path) -> None:
    arguments = ("--labels", "circle,star", "--out", tmp_path / "out", "--sample", "8")
    done = label(source.folder / "a", *arguments, MODEL_DIR=str(tmp_path / "data"))
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [
        int(word) for word in next(line for line in done.stdout.splitlines() if line.startswith("circle")).split()[1:]
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    assert len(list((tmp_path / "out" / "sample" / "preview").glob("0*.jpg"))) == 8


def test_equal_images_are_all_labeled(tmp_path: Path) -> None:
    (tmp_path / "same").mkdir()
    image = draw_scene(np.random.default_rng(1), 96, 96).image
    for number in range(12):
        image.save(tmp_path / "same" / f"{number}.png")
    arguments = (tmp_path / "same", "--labels", "circle", "--out", tmp_path / "out")
    done = label(*arguments, MODEL_DIR=str(tmp_path / "data"), BATCH_SIZE="1")
    assert done.returncode == 0, done.stdout
    assert len(read_splits(tmp_path / "out")) == 12


def test_a_run_that_is_killed_while_it_predicts_resumes(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "many", 150)
    arguments = (str(folder), "--labels", "circle", "--out", str(tmp_path / "out"))
    env = {"MODEL_DIR": str(tmp_path / "data"), "BATCH_SIZE": "4"}
    first = subprocess.Popen(
        [sys.executable, "-m", "backend", "label", *arguments], cwd=ROOT, env={**os.environ, "MODEL": "demo", **env},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    answers = tmp_path / "out" / ".answers.jsonl"
    wait_for(lambda: answers.exists() and len(answers.read_text().splitlines()) > 20, 90, "some answers")
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(1)
    with answers.open("a") as file:
        file.write('{"key": "cut o')  # as a kill may leave it
    answered = len(answers.read_text().splitlines())
    done = label(*arguments, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = answers.read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines[1:]}) == len(lines) - 1 == 150
    assert answered > 20
    assert len(read_splits(tmp_path / "out")) == 150


def draw_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(5)
    for number in range(count):
        draw_scene(rng, 96, 96).image.save(folder / f"{number:03}.jpg")
    return folder


def read_files(out: Path) -> dict[str, bytes]:
    """Returns the contents of a dataset and its archive, by name; the path in data.yaml is made relative."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    files["data.yaml"] = files["data.yaml"].replace(str(out).encode(), b"")
    with zipfile.ZipFile(out.with_suffix(".zip")) as archive:
        return {**files, "zip": "\n".join(sorted(archive.namelist())).encode()}


@pytest.mark.timeout(400)
def test_a_run_that_is_killed_while_it_writes_resumes(served: ServeProcess, tmp_path: Path) -> None:
    images, model_dir = draw_images(tmp_path / "images", 12), str(served.model_dir)
    arguments = [images, "--labels", "circle,square", "--val", "0.5", *ALL_OUTPUTS, "--out"]
    (tmp_path / "whole").mkdir()
    done = label(*arguments, tmp_path / "whole" / "out", MODEL_DIR=model_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    for name, pattern in KILL_POINTS.items():
        killed = label(*arguments, out, kill_at=pattern, MODEL_DIR=model_dir)
        assert killed.returncode == -signal.SIGKILL, (name, killed.stdout + killed.stderr)
    done = label(*arguments, out, MODEL_DIR=model_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_files(out) == read_files(tmp_path / "whole" / "out")
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out", "out.zip"]
    again = label(*arguments, out, MODEL_DIR=model_dir)
    assert (again.returncode, "--force" in again.stderr) == (2, True)


@pytest.mark.timeout(400)
def test_a_forced_run_that_is_killed_resumes_with_and_without_force(served: ServeProcess, tmp_path: Path) -> None:
    images, out, model_dir = draw_images(tmp_path / "images", 12), tmp_path / "out", str(served.model_dir)
    arguments = [images, "--labels", "circle,square", "--val", "0.5", *ALL_OUTPUTS, "--out", out]
    for force in ([], ["--force"]):  # how the command is called again
        done = label(*arguments, "--force", MODEL_DIR=model_dir)
        assert done.returncode == 0, done.stdout + done.stderr
        before = read_files(out)
        for name in ("before the first answer", "images", "previews", "zip", "marker"):
            killed = label(*arguments, "--force", kill_at=KILL_POINTS[name], MODEL_DIR=model_dir)
            assert killed.returncode == -signal.SIGKILL, (name, killed.stdout + killed.stderr)
            done = label(*arguments, *force, MODEL_DIR=model_dir)
            assert done.returncode == 0, (name, done.stdout + done.stderr)
            assert read_files(out) == before


def test_a_resumed_run_removes_files_of_other_options(served: ServeProcess, tmp_path: Path) -> None:
    images, out = draw_images(tmp_path / "images", 12), tmp_path / "out"
    arguments = [images, "--labels", "circle", "--out", out, "--val"]
    killed = label(*arguments, 0.9, *ALL_OUTPUTS, kill_at=KILL_POINTS["marker"], MODEL_DIR=str(served.model_dir))
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    done = label(*arguments, 0, "--format", "coco", MODEL_DIR=str(served.model_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in out.iterdir()} == {".answers.jsonl", ".finished", "images", "annotations"}
    assert set(read_splits(out).values()) == {"train"}


def test_a_run_into_its_own_image_folder_labels_no_copies_when_it_resumes(served: ServeProcess, tmp_path: Path) -> None:
    images, model_dir = draw_images(tmp_path / "images", 12), str(served.model_dir)
    arguments = [images, "--labels", "circle", "--preview", "--out", images / "out"]
    label(images, "--labels", "circle", "--out", images / "out", "--sample", "2", MODEL_DIR=model_dir)
    killed = label(*arguments, kill_at=KILL_POINTS["marker"], MODEL_DIR=model_dir)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    done = label(*arguments, MODEL_DIR=model_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(read_splits(images / "out")) == [f"{number:03}.jpg" for number in range(12)]


def test_label_ends_if_its_workers_cannot_load_the_model_also_in_the_background(tmp_path: Path) -> None:
    images, model = draw_images(tmp_path / "images", 1), tmp_path / "x.pth"
    model.write_text("not a checkpoint")
    command = [
        sys.executable,
        "-m",
        "backend",
        "label",
        str(images),
        "--labels",
        "circle",
        "--out",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(
        ["sh", "-c", '"$@" & wait $!', "sh", *command],  # a shell lets its background commands ignore SIGINT
        cwd=ROOT, env={**os.environ, "MODEL": str(model), "MODEL_DIR": str(tmp_path / "data")},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("error:") == 1
    assert "x.pth is damaged or not a checkpoint" in done.stderr
