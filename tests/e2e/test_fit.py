"""Learning from corrections, with a real Label Studio: a new word, thresholds, a gate that refuses, a way back."""

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
from tests.e2e.studio import LEGACY_TOKEN, LabelStudio, Project
from tests.scenes import draw_regions, encode, place_side_by_side, to_data_uri, to_pixel_box
from tests.servers import ROOT, ServeProcess, wait_for

pytestmark = pytest.mark.timeout(900)

NEW, NEW_IS = "zorp", "purple star"
OLD = ("star", "red circle", "blue square")
TRAINING_LIMIT = 8 * 60  # s


def config(labels: tuple[str, ...], threshold: str = "") -> str:
    given = f' model_score_threshold="{threshold}"' if threshold else ""
    rows = "".join(f'<Label value="{label}"/>' for label in labels)
    image, close = '<View><Image name="image" value="$image"/>', "</RectangleLabels></View>"
    return f'{image}<RectangleLabels name="label" toName="image"{given}>{rows}{close}'


def draw(count: int, seed: int, label: str = NEW_IS, share: int = 3) -> list[Scene]:
    """Scenes that show what the label names, but one in `share`."""
    rng, scenes = np.random.default_rng(seed), []
    while len(scenes) < count:
        scene = draw_scene(rng, 320, 240)
        if scene.find_truth([label]) or len(scenes) % share == share - 1:
            scenes.append(scene)
    return scenes


def truth(scene: Scene, labels: tuple[str, ...]) -> list[tuple[tuple, str]]:
    phrases = [NEW_IS if label == NEW else label for label in labels]
    return [(box, labels[i]) for box, i in scene.find_truth(phrases)]


def annotation(scene: Scene, boxes: list[tuple[tuple, str]]) -> list[dict[str, Any]]:
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
def backend(studio: LabelStudio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    keys = {"LABEL_STUDIO_URL": studio.url, "LABEL_STUDIO_API_KEY": studio.personal_access_token}
    server = ServeProcess(tmp_path_factory.mktemp("learning"), **keys)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def run(backend: ServeProcess, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "MODEL": "demo", "MODEL_DIR": str(backend.model_dir), **env}
    command = [sys.executable, "-m", "backend", *words]
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=600, check=False)


def annotated_project(
    studio: LabelStudio, backend: ServeProcess, title: str, label_config: str, scenes: list[Scene],
    boxes: Callable[[int, Scene], list[tuple[tuple, str]]],
) -> Project:  # fmt: skip
    pictures = {f"scene-{i:03}.png": encode(scene.image) for i, scene in enumerate(scenes)}
    project = studio.create_project(title, label_config, pictures)
    project.connect(backend.url)
    for task in project.tasks():
        number = int(task["data"]["image"].split("scene-")[1][:3])
        result = annotation(scenes[number], boxes(number, scenes[number]))
        studio.call("POST", f"/api/tasks/{task['id']}/annotations", json={"result": result})
    return project


def skip(project: Project) -> None:
    """A 61st task, which an annotator skips."""
    uri = project.tasks()[0]["data"]["image"]
    project.studio.call("POST", f"/api/projects/{project.number}/import", json=[{"data": {"image": uri}}])
    task = project.tasks()[-1]["id"]
    project.studio.call("POST", f"/api/tasks/{task}/annotations", json={"result": [], "was_cancelled": True})


def train(project: Project, backend: ServeProcess) -> dict[str, Any]:
    """Clicks Start Training, and waits for its outcome."""

    def outcome() -> Any:
        rows = requests.get(f"{backend.url}/versions", timeout=10).json()["trainings"]
        own = [row for row in rows if row["project"] == str(project.number)]
        return own[0] if own and own[0]["state"] in ("done", "failed") else None

    project.studio.call("POST", f"/api/ml/{project.backend}/train", json={})
    return wait_for(outcome, TRAINING_LIMIT, "the training")


def predict(backend: ServeProcess, project: int, label_config: str, scenes: list[Scene]) -> list[dict[str, Any]]:
    tasks = [{"id": i, "data": {"image": to_data_uri(scene.image)}} for i, scene in enumerate(scenes)]
    body = {
        "tasks": tasks,
        "label_config": label_config,
        "project": str(project),
        "params": {"context": {"result": [1]}},
    }
    return requests.post(f"{backend.url}/predict", json=body, timeout=200).json()["results"]


def detections(answer: dict[str, Any]) -> list[Detection]:
    return [Detection(to_pixel_box(r), r["score"], r["value"]["rectanglelabels"][0]) for r in answer["result"]]


def ap50(
    backend: ServeProcess, project: int, labels: tuple[str, ...], scenes: dict[str, list[Scene]]
) -> dict[str, float]:
    """Of each label on its scenes, with all scores: a threshold written into the config goes before learned ones."""
    figures = {}
    for label, shown in scenes.items():
        found = [detections(answer) for answer in predict(backend, project, config(labels, "0.01"), shown)]
        own = [[d for d in row if d.label == label] for row in found]
        figures[label] = evaluate(own, [[t for t in truth(scene, labels) if t[1] == label] for scene in shown]).ap50
    return figures


def ap50_of_old_phrases(backend: ServeProcess, project: int, pictures: int = 80) -> float:
    rng, found, wanted = np.random.default_rng(99), [], []
    for _ in range(pictures):
        scene = draw_scene(rng, 320, 240)
        phrases = tuple(choose_phrases(rng, scene))
        found += [detections(answer) for answer in predict(backend, project, config(phrases, "0.01"), [scene])]
        wanted.append([(box, phrases[i]) for box, i in scene.find_truth(phrases)])
    return evaluate(found, wanted).ap50


def picture_of(scenes: list[Scene], before: list[dict], after: list[dict], labels: tuple[str, ...]) -> None:
    """Three pictures with the new thing, before in the upper row and after in the lower."""
    shown = [i for i, scene in enumerate(scenes) if scene.find_truth([NEW_IS])][:3]
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


def version(project: Project, backend: ServeProcess) -> str:
    body = {"project": str(project.number), "schema": config((NEW, *OLD))}
    return requests.post(f"{backend.url}/setup", json=body, timeout=10).json()["model_version"]


def test_a_new_word_is_learned_and_the_old_ones_are_kept(studio: LabelStudio, backend: ServeProcess) -> None:
    labels, others = (NEW, *OLD), draw(40, seed=8)
    scenes = {NEW: others, **{label: draw(50, 5, label) for label in OLD}}
    shown = draw(60, seed=3)
    project = annotated_project(studio, backend, "zorp", config(labels), shown, lambda _, scene: truth(scene, labels))
    number = project.number
    before, old_before = ap50(backend, number, labels, scenes), ap50_of_old_phrases(backend, number)
    version_before, answers_before = version(project, backend), predict(backend, number, config(labels), others)
    skip(project)
    start = time.monotonic()
    outcome = train(project, backend)
    seconds = time.monotonic() - start
    after, old_after = ap50(backend, number, labels, scenes), ap50_of_old_phrases(backend, number)
    print(f"{outcome}\nbefore {before} {old_before}\nafter {after} {old_after}\n{seconds:.0f} s")
    answers_after = predict(backend, number, config(labels), others)
    picture_of(others, answers_before, answers_after, labels)
    assert (outcome["state"], outcome["left_out"]) == ("done", {"tasks that were skipped": 1})
    assert seconds < TRAINING_LIMIT
    assert before[NEW] < 0.3
    assert after[NEW] > 0.8
    assert all(after[label] > before[label] - 0.03 for label in OLD)
    assert old_after > old_before - 0.03
    assert ap50(backend, 999_999, labels, scenes) == before  # of a project that did not ask for it
    assert version(project, backend) != version_before
    assert run(backend, "versions", "rollback", "--project", str(number)).returncode == 0
    assert version(project, backend) == version_before
    assert predict(backend, number, config(labels), others) == answers_before


def test_random_boxes_change_nothing(studio: LabelStudio, backend: ServeProcess) -> None:
    rng = np.random.default_rng(4)

    def anywhere(number: int, scene: Scene) -> list[tuple[tuple, str]]:
        corners = np.sort(rng.uniform(0, 1, (3, 2, 2)), axis=1) * [320, 240]
        return [((*low, *high), OLD[int(rng.integers(3))]) for low, high in corners.tolist()]

    project = annotated_project(studio, backend, "random", config(OLD), draw(60, seed=5), anywhere)
    before = predict(backend, project.number, config(OLD), draw(20, seed=6))
    outcome = train(project, backend)
    print(outcome)
    assert (outcome["state"], outcome["version"]) == ("done", "")
    assert (
        "fine-tuning did not improve" in outcome["text"] or "are not significantly better" in outcome["text"]
    )  # it was tried
    assert predict(backend, project.number, config(OLD), draw(20, seed=6)) == before
    assert "promoted" not in run(backend, "versions", "list", "--project", str(project.number)).stdout


def test_thresholds_follow_what_annotators_delete(studio: LabelStudio, backend: ServeProcess) -> None:
    """Of one label annotators keep only what is sure; that alone is learned."""
    labels, strict, limit = ("circle", "star", "square"), "star", 0.5
    env = {"LABEL_STUDIO_URL": studio.url, "LABEL_STUDIO_API_KEY": LEGACY_TOKEN}

    def kept(answer: dict[str, Any]) -> list[tuple[tuple, str]]:
        return [(d.box_xyxy, d.label) for d in detections(answer) if d.label != strict or d.score >= limit]

    scenes, others, given = draw(60, seed=12), draw(40, seed=13), config(labels, "0.1")
    proposed = predict(backend, 999_999, given, scenes)
    project = annotated_project(studio, backend, "strict", given, scenes, lambda i, _: kept(proposed[i]))

    def f1() -> float:
        found = predict(backend, project.number, given, others)
        wanted = [kept(answer) for answer in predict(backend, 999_999, given, others)]
        return evaluate([detections(answer) for answer in found], wanted, threshold=0).f1

    before = f1()
    done = run(backend, "train", "--project", str(project.number), "--train", "thresholds", **env)
    print(done.stdout, done.stderr[-2000:], before, f1())
    assert done.returncode == 0, done.stdout + done.stderr
    assert f1() >= before + 0.05
