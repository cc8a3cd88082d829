"""The playground's data: one image and one labeling config, predicted so that every threshold can be tried.

The page filters the boxes in the browser while the sliders move. Which of several overlapping boxes is kept depends on
the thresholds, so the response holds all boxes down to `MIN_SCORE`, those of negative phrases included, and
`static/boxes.js` filters them as the detector would.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from flask import Blueprint, Response, jsonify
from redis import Redis

from backend.errors import BackendError, BadRequest, ImageError, LabelingConfigError, NotFound, NotReady, Overloaded
from backend.labelstudio.labeling_config import Control, Label, Plan
from backend.labelstudio.regions import read_label, read_percent_box
from backend.monitoring.project_stats import get_created_at, get_label_config
from backend.queue.backlogs import Place
from backend.queue.messages import Answer, Chunk, TaskError
from backend.queue.predict_queue import PredictQueue, delete_chunk
from backend.queue.redis import redis_errors
from backend.registry.project_model import ProjectModel
from backend.settings import Settings
from backend.web.request_body import parse_string_fields

MAX_CONCURRENT_PREDICTIONS = 16  # requests; each holds a thread, and its image lies in Redis
MIN_SCORE = 0.05  # lowest score of the boxes in a response, unless a threshold of the config is lower
IMAGE_FIELD = "image"
NEGATIVE = "-"  # the label of a box that fits a negative phrase; other labels are numbers
PROJECT_NUMBER = re.compile(r"[0-9]{1,18}")


def register_playground(blueprint: Blueprint, settings: Settings, get_connection: Callable[[], Redis]) -> None:
    """Adds the routes `/playground/config/<project>` and `/playground/look`."""
    slots = threading.BoundedSemaphore(MAX_CONCURRENT_PREDICTIONS)

    @blueprint.get("/playground/config/<project>")
    def playground_config(project: str) -> Response:
        with redis_errors():
            label_config = get_label_config(get_connection(), project)
        if not label_config:
            raise NotFound(f"the labeling config of project {project} is not known; connect this backend to it first")
        return jsonify(label_config=label_config)

    @blueprint.post("/playground/look")
    def playground_look() -> Response:
        fields = parse_string_fields("label_config", "image", "project")
        if not slots.acquire(blocking=False):
            raise Overloaded(f"{MAX_CONCURRENT_PREDICTIONS} playground requests are running; try again in a moment")
        try:
            return jsonify(predict_unfiltered(settings, get_connection(), **fields))
        finally:
            slots.release()


def predict_unfiltered(
    settings: Settings, connection: Redis, label_config: str, image: str, project: str = ""
) -> dict[str, Any]:
    """Predicts one image without thresholds and without suppression.

    Args:
        settings: of this process.
        connection: to Redis.
        label_config: XML; all of its controls get this image, whatever task field they name.
        image: a `data:` URI.
        project: the project's number, if its trained version is to predict.

    Returns:
        - `model_version`; `nms_iou`: the IoU of the suppression; `lowest`: the lowest score of the boxes;
        - `labels`: of each label its control, label, phrases and threshold, and where it stands in the config:
          `holder`, the name of the tag around it, and `number`, its index there;
        - `boxes`: of each box its control, `place` (the index in `labels`; null for a negative phrase), score, and x,
          y, width and height in percent of the image.

    Raises:
        BadRequest: the image is not a `data:` URI, or the project is not a number.
        LabelingConfigError: the config cannot be served.
        ImageError: the image cannot be decoded.
        NotReady: there is no answer by PREDICT_DEADLINE.
        QueueUnavailable: Redis does not answer.
    """
    if not image.startswith("data:"):
        raise BadRequest("the image must be sent as a data: address")
    if len(image) > 2 * settings.max_image_bytes:  # base64 needs 4/3 of the bytes
        raise ImageError(f"the image file is larger than MAX_IMAGE_BYTES ({settings.max_image_bytes})")
    if project and not PROJECT_NUMBER.fullmatch(project):
        raise BadRequest("project must be the number of a project")
    with redis_errors():
        created_at = get_created_at(connection, project) if project else None
    project_model = ProjectModel(settings, label_config, project, created_at)
    controls = list({control.from_name: control for control in project_model.plan.controls}.values())
    labels = _list_labels(controls)
    min_score = min([MIN_SCORE, *(label.threshold for control in controls for label in control.labels)])
    plan = Plan(tuple(_without_thresholds(control, min_score) for control in controls), (), ())
    task = {"id": secrets.token_hex(8), "data": {IMAGE_FIELD: image}}
    (chunk,) = project_model.make_chunks([task], 1, plan=plan)
    answer = _predict(settings, connection, chunk)
    if isinstance(answer, TaskError):
        raise ImageError(answer.error.detail)
    places: dict[tuple[str, str], int | None] = {(control.from_name, NEGATIVE): None for control in controls}
    places |= {(label["control"], str(label["number"])): place for place, label in enumerate(labels)}
    boxes = [
        {
            "control": region["from_name"],
            "place": places[region["from_name"], read_label(region)],
            "score": region["score"],
            **read_percent_box(region),
        }
        for region in answer.result
    ]
    return {
        "model_version": project_model.model_version,
        "nms_iou": settings.nms_iou,
        "lowest": min_score,
        "labels": labels,
        "boxes": boxes,
    }


def _list_labels(controls: Sequence[Control]) -> list[dict[str, Any]]:
    return [
        {
            "control": control.from_name,
            "holder": control.labels_from_name or control.from_name,
            "number": number,
            "label": label.name,
            "phrases": label.phrases,
            "threshold": label.threshold,
        }
        for control in controls
        for number, label in enumerate(control.labels)
    ]


def _without_thresholds(control: Control, min_score: float) -> Control:
    """Returns the control for `IMAGE_FIELD`, with all boxes down to `min_score`.

    Each label is named after its index in the control, since names may occur twice. Negative phrases become a label.
    """
    if not control.labels:
        raise LabelingConfigError(f"{control.from_name!r} has no labels of its own; give it some to try them here")
    labels = [replace(label, name=str(number), threshold=min_score) for number, label in enumerate(control.labels)]
    labels += [Label(NEGATIVE, (phrase,), min_score) for phrase in control.negative_phrases]
    return replace(
        control,
        image_value=f"${IMAGE_FIELD}",
        labels=tuple(labels),
        labels_from_name="",
        negative_phrases=(),
        nms_iou=1.0,
        is_multi_page=False,
        labels_value="",
        repeater_items="",
    )


def _predict(settings: Settings, connection: Redis, chunk: Chunk) -> Answer:
    """Predicts a chunk of one task, kept off the status page, and deletes it: it holds the image."""
    queue = PredictQueue(connection, chunk.checkpoint)
    (job,) = queue.enqueue([chunk], Place.URGENT, project=None)
    try:
        answers = queue.wait(job, time.monotonic() + settings.predict_deadline)
    except TimeoutError:
        raise NotReady("no answer yet: check that a worker is running, and try again") from None
    finally:
        delete_chunk(connection, chunk.id)
    if not answers:
        raise BackendError("the worker failed on this image; its log says why")
    return answers[0]
