"""Training with a real Label Studio: a new word, thresholds, a gate that refuses, a rollback."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from backend.boxes import Detection
from backend.demo.shapes import Scene, choose_phrases, draw_scene
from backend.training.evaluation import evaluate
from tests.e2e.browser import SCREENSHOTS
from tests.e2e.label_studio import LEGACY_TOKEN, LabelStudio, Project
from tests.scenes import draw_regions, encode, place_side_by_side, to_data_uri, to_pixel_box
from tests.servers import ROOT, ServeProcess, wait_for

pytestmark = pytest.mark.timeout(900)

NEW_LABEL, NEW_PHRASE = "zorp", "purple star"  # the word to learn, and what it stands for
OLD_LABELS = ("star", "red circle", "blue square")
MAX_TRAINING_TIME = 8 * 60  # s


def make_config(labels: tuple[str, ...], threshold: str = "") -> str:
    attribute = f' model_score_threshold="{threshold}"' if threshold else ""
    label_tags = "".join(f'<Label value="{label}"/>' for label in labels)
    image, close = '<View><Image name="image" value="$image"/>', "</RectangleLabels></View>"
    return f'{image}<RectangleLabels name="label" toName="image"{attribute}>{label_tags}{close}'


def draw_scenes(count: int, seed: int, phrase: str = NEW_PHRASE, share: int = 3) -> list[Scene]:
    """Draws scenes that show what the phrase names, except one in `share`."""
    rng, scenes = np.random.default_rng(seed), []
    while len(scenes) < count:
        scene = draw_scene(rng, 320, 240)
        if scene.find_truth([phrase]) or len(scenes) % share == share - 1:
            scenes.append(scene)
    return scenes


def find_truth(scene: Scene, labels: tuple[str, ...]) -> list[tuple[tuple, str]]:
    phrases = [NEW_PHRASE if label == NEW_LABEL else label for label in labels]
    return [(box, labels[i]) for box, i in scene.find_truth(phrases)]


def make_regions(scene: Scene, boxes: list[tuple[tuple, str]]) -> list[dict[str, Any]]:
    width, height = scene.image.size
    return [
        {
            "id": f"r{i}", "type": "rectanglelabels", "from_name": "label", "to_name": "image",
            "original_width": width, "original_height": height, "image_rotation": 0,
            "value": {
                "x": 100 * x1 / width, "y": 100 * y1 / height, "width": 100 * (x2 - x1) / width,
                "height": 100 * (y2 - y1) / height, "rotation": 0, "rectanglelabels": [label],
            },
        }
        for i, ((x1, y1, x2, y2), label) in enumerate(boxes)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def backend(label_studio: LabelStudio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    keys = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.personal_access_token}
    server = ServeProcess(tmp_path_factory.mktemp("training"), **keys)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def run_command(backend: ServeProcess, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "MODEL": "demo", "MODEL_DIR": str(backend.model_dir), **env}
    command = [sys.executable, "-m", "backend", *words]
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=600, check=False)


def create_annotated_project(
    label_studio: LabelStudio, backend: ServeProcess, title: str, label_config: str, scenes: list[Scene],
    boxes: Callable[[int, Scene], list[tuple[tuple, str]]],
) -> Project:  # fmt: skip
    images = {f"scene-{i:03}.png": encode(scene.image) for i, scene in enumerate(scenes)}
    project = label_studio.create_project(title, label_config, images)
    project.connect(backend.url)
    for task in project.list_tasks():
        number = int(task["data"]["image"].split("scene-")[1][:3])
        result = make_regions(scenes[number], boxes(number, scenes[number]))
        label_studio.call("POST", f"/api/tasks/{task['id']}/annotations", json={"result": result})
    return project


def add_skipped_task(project: Project) -> None:
    """Adds a 61st task, which an annotator skips."""
    uri = project.list_tasks()[0]["data"]["image"]
    project.label_studio.call("POST", f"/api/projects/{project.number}/import", json=[{"data": {"image": uri}}])
    task = project.list_tasks()[-1]["id"]
    project.label_studio.call("POST", f"/api/tasks/{task}/annotations", json={"result": [], "was_cancelled": True})


def train(project: Project, backend: ServeProcess) -> dict[str, Any]:
    """Clicks Start Training, and waits for its outcome."""

    def get_outcome() -> Any:
        rows = requests.get(f"{backend.url}/versions", timeout=10).json()["trainings"]
        own = [row for row in rows if row["project"] == str(project.number)]
        return own[0] if own and own[0]["state"] in ("done", "failed") else None

    project.label_studio.call("POST", f"/api/ml/{project.backend}/train", json={})
    return wait_for(get_outcome, MAX_TRAINING_TIME, "the training")


def predict(backend: ServeProcess, project: int, label_config: str, scenes: list[Scene]) -> list[dict[str, Any]]:
    tasks = [{"id": i, "data": {"image": to_data_uri(scene.image)}} for i, scene in enumerate(scenes)]
    body = {
        "tasks": tasks,
        "label_config": label_config,
        "project": str(project),
        "params": {"context": {"result": [1]}},
    }
    return requests.post(f"{backend.url}/predict", json=body, timeout=200).json()["results"]


def read_detections(answer: dict[str, Any]) -> list[Detection]:
    return [Detection(to_pixel_box(r), r["score"], r["value"]["rectanglelabels"][0]) for r in answer["result"]]


def measure_ap50(
    backend: ServeProcess, project: int, labels: tuple[str, ...], scenes: dict[str, list[Scene]]
) -> dict[str, float]:
    """Measures each label's AP50 on its scenes, at all scores: a threshold in the config wins over a trained one."""
    ap50 = {}
    for label, scenes_of_label in scenes.items():
        answers = predict(backend, project, make_config(labels, "0.01"), scenes_of_label)
        detections = [[d for d in read_detections(answer) if d.label == label] for answer in answers]
        truth = [[t for t in find_truth(scene, labels) if t[1] == label] for scene in scenes_of_label]
        ap50[label] = evaluate(detections, truth).ap50
    return ap50


def measure_ap50_of_old_phrases(backend: ServeProcess, project: int, images: int = 80) -> float:
    rng, detections, truth = np.random.default_rng(99), [], []
    for _ in range(images):
        scene = draw_scene(rng, 320, 240)
        phrases = tuple(choose_phrases(rng, scene))
        answers = predict(backend, project, make_config(phrases, "0.01"), [scene])
        detections += [read_detections(answer) for answer in answers]
        truth.append([(box, phrases[i]) for box, i in scene.find_truth(phrases)])
    return evaluate(detections, truth).ap50


def save_comparison(scenes: list[Scene], before: list[dict], after: list[dict], labels: tuple[str, ...]) -> None:
    """Saves an image of three scenes with the new object: before training above, after it below."""
    shown = [i for i, scene in enumerate(scenes) if scene.find_truth([NEW_PHRASE])][:3]
    rows = []
    for answers in (before, after):
        images = [scenes[i].image.copy() for i in shown]
        for i, image in zip(shown, images, strict=True):
            draw_regions(image, answers[i]["result"], list(labels))
        rows.append(place_side_by_side(images))
    sheet = Image.new("RGB", (rows[0].width, 2 * rows[0].height + 8), "white")
    sheet.paste(rows[0], (0, 0))
    sheet.paste(rows[1], (0, rows[0].height + 8))
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    sheet.save(SCREENSHOTS / "learning.png")


def get_model_version(project: Project, backend: ServeProcess) -> str:
    body = {"project": str(project.number), "schema": make_config((NEW_LABEL, *OLD_LABELS))}
    return requests.post(f"{backend.url}/setup", json=body, timeout=10).json()["model_version"]


def test_a_new_word_is_learned_and_the_old_ones_are_kept(label_studio: LabelStudio, backend: ServeProcess) -> None:
    labels, others = (NEW_LABEL, *OLD_LABELS), draw_scenes(40, seed=8)
    scenes = {NEW_LABEL: others, **{label: draw_scenes(50, 5, label) for label in OLD_LABELS}}
    shown = draw_scenes(60, seed=3)
    project = create_annotated_project(
        label_studio, backend, "zorp", make_config(labels), shown, lambda _, scene: find_truth(scene, labels)
    )
    number = project.number
    before, old_before = measure_ap50(backend, number, labels, scenes), measure_ap50_of_old_phrases(backend, number)
    version_before = get_model_version(project, backend)
    answers_before = predict(backend, number, make_config(labels), others)
    add_skipped_task(project)
    start = time.monotonic()
    outcome = train(project, backend)
    seconds = time.monotonic() - start
    after, old_after = measure_ap50(backend, number, labels, scenes), measure_ap50_of_old_phrases(backend, number)
    print(f"{outcome}\nbefore {before} {old_before}\nafter {after} {old_after}\n{seconds:.0f} s")
    answers_after = predict(backend, number, make_config(labels), others)
    save_comparison(others, answers_before, answers_after, labels)
    assert (outcome["state"], outcome["left_out"]) == ("done", {"tasks that were skipped": 1})
    assert seconds < MAX_TRAINING_TIME
    assert before[NEW_LABEL] < 0.3
    assert after[NEW_LABEL] > 0.8
    assert all(after[label] > before[label] - 0.03 for label in OLD_LABELS)
    assert old_after > old_before - 0.03
    assert measure_ap50(backend, 999_999, labels, scenes) == before  # another project keeps the base checkpoint
    assert get_model_version(project, backend) != version_before
    assert run_command(backend, "versions", "rollback", "--project", str(number)).returncode == 0
    assert get_model_version(project, backend) == version_before
    assert predict(backend, number, make_config(labels), others) == answers_before


def test_random_boxes_change_nothing(label_studio: LabelStudio, backend: ServeProcess) -> None:
    rng = np.random.default_rng(4)

    def draw_random_boxes(number: int, scene: Scene) -> list[tuple[tuple, str]]:
        corners = np.sort(rng.uniform(0, 1, (3, 2, 2)), axis=1) * [320, 240]
        return [((*low, *high), OLD_LABELS[int(rng.integers(3))]) for low, high in corners.tolist()]

    project = create_annotated_project(
        label_studio, backend, "random", make_config(OLD_LABELS), draw_scenes(60, seed=5), draw_random_boxes
    )
    before = predict(backend, project.number, make_config(OLD_LABELS), draw_scenes(20, seed=6))
    outcome = train(project, backend)
    print(outcome)
    assert (outcome["state"], outcome["version"]) == ("done", "")
    text = outcome["text"]
    assert "fine-tuning did not improve" in text or "are not significantly better" in text  # fine-tuning was tried
    assert predict(backend, project.number, make_config(OLD_LABELS), draw_scenes(20, seed=6)) == before
    assert "promoted" not in run_command(backend, "versions", "list", "--project", str(project.number)).stdout


def test_thresholds_follow_what_annotators_delete(label_studio: LabelStudio, backend: ServeProcess) -> None:
    """Annotators keep only sure boxes of one label; training raises its threshold."""
    labels, strict, limit = ("circle", "star", "square"), "star", 0.5
    env = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": LEGACY_TOKEN}

    def keep_boxes(answer: dict[str, Any]) -> list[tuple[tuple, str]]:
        return [(d.box_xyxy, d.label) for d in read_detections(answer) if d.label != strict or d.score >= limit]

    scenes, others, given = draw_scenes(60, seed=12), draw_scenes(40, seed=13), make_config(labels, "0.1")
    proposed = predict(backend, 999_999, given, scenes)
    project = create_annotated_project(
        label_studio, backend, "strict", given, scenes, lambda i, _: keep_boxes(proposed[i])
    )

    def measure_f1() -> float:
        answers = predict(backend, project.number, given, others)
        truth = [keep_boxes(answer) for answer in predict(backend, 999_999, given, others)]
        return evaluate([read_detections(answer) for answer in answers], truth, threshold=0).f1

    before = measure_f1()
    done = run_command(backend, "train", "--project", str(project.number), "--train", "thresholds", **env)
    print(done.stdout, done.stderr[-2000:], before, measure_f1())
    assert done.returncode == 0, done.stdout + done.stderr
    assert measure_f1() >= before + 0.05
