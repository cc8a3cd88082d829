"""One picture looked at for one labeling config, so that every threshold can be tried on the answer.

Which boxes are left of overlapping ones depends on the thresholds, so the answer holds them all, down to `MIN_SCORE`,
those of negative phrases too. `pages/boxes.js` cuts them as `Detector` would have.
"""

from __future__ import annotations

import itertools
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from redis import Redis

from backend.errors import BackendError, BadRequest, ImageError, LabelingConfigError, NotReady
from backend.labelstudio.labeling_config import Control, Label, Plan
from backend.labelstudio.regions import read_label, read_percent_box
from backend.monitoring.project_stats import get_created_at
from backend.queue.messages import Answer, Chunk, TaskError
from backend.queue.predict_queue import PredictQueue
from backend.queue.redis import redis_errors
from backend.registry.project_model import ProjectModel
from backend.settings import Settings

MIN_SCORE = 0.05  # score of the boxes that are answered, unless a threshold is lower
IMAGE_FIELD = "image"
NEGATIVE = "-"  # stands for negative phrases where others have their place
PROJECT = re.compile(r"[0-9]{1,18}")


def predict_unfiltered(
    settings: Settings, connection: Redis, label_config: str, image: str, project: str = ""
) -> dict[str, Any]:
    """The boxes of a picture.

    Args:
        settings: of this process.
        connection: to the queue.
        label_config: as in Label Studio; each of its controls looks at this picture, whatever field it names.
        image: as a `data:` address.
        project: its number, for what was learned for it.

    Returns:
        `labels`: control, label, phrases and threshold of each, and where it is in the config: the tag that holds it
        and its place there; `nms_iou`; `lowest`, the score down to which there are boxes; `boxes`: control, place in
        `labels` (null for a negative phrase), score, and x, y, width and height in percent of the picture.

    Raises:
        BadRequest: the picture is not a `data:` address, or the project not a number.
        LabelingConfigError: the config cannot be served.
        ImageError: the picture cannot be read.
        NotReady: no answer by PREDICT_DEADLINE.
    """
    _check(settings, image, project)
    with redis_errors():
        asking = ProjectModel(settings, label_config, project, get_created_at(connection, project) if project else None)
    controls = list({control.from_name: control for control in asking.plan.controls}.values())
    labels = [_row(control, number, label) for control in controls for number, label in enumerate(control.labels)]
    lowest = min([MIN_SCORE, *(row["threshold"] for row in labels)])
    places = map(str, itertools.count())
    low = Plan(tuple(_lowered(control, lowest, places) for control in controls), (), ())
    task = {"id": secrets.token_hex(8), "data": {IMAGE_FIELD: image}}
    (chunk,) = asking.make_chunks([task], 1, plan=low)
    answer = _predict(settings, PredictQueue(connection), chunk)
    if isinstance(answer, TaskError):
        raise ImageError(answer.error.detail)
    return {
        "model_version": asking.model_version,
        "nms_iou": settings.nms_iou,
        "lowest": lowest,
        "labels": labels,
        "boxes": _boxes(answer.result),
    }


def _check(settings: Settings, image: str, project: str) -> None:
    if not image.startswith("data:"):
        raise BadRequest("the image must be sent as a data: address")
    if len(image) > 2 * settings.max_image_bytes:  # base64 makes a third more of it
        raise ImageError(f"the image file is larger than MAX_IMAGE_BYTES ({settings.max_image_bytes})")
    if project and not PROJECT.fullmatch(project):
        raise BadRequest("project must be the number of a project")


def _row(control: Control, number: int, label: Label) -> dict[str, Any]:
    about = {"control": control.from_name, "holder": control.labels_from_name or control.from_name, "number": number}
    return {**about, "label": label.name, "phrases": label.phrases, "threshold": label.threshold}


def _lowered(control: Control, lowest: float, places: Iterator[str]) -> Control:
    """The control for this picture, with all its boxes, labelled with their places in the list of labels."""
    if not control.labels:
        raise LabelingConfigError(f"{control.from_name!r} has no labels of its own; give it some to try them here")
    labels = [replace(label, name=next(places), threshold=lowest) for label in control.labels]
    labels += [Label(NEGATIVE, (phrase,), lowest) for phrase in control.negative_phrases]
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


def _predict(settings: Settings, queue: PredictQueue, chunk: Chunk) -> Answer:
    (job,) = queue.enqueue([chunk], at_front=True, project=None)
    try:
        answers = queue.wait(job, time.monotonic() + settings.predict_deadline)
    except TimeoutError:
        raise NotReady("no answer yet: is a worker running, and is it busy? Try again") from None
    finally:
        queue.delete(chunk)  # it holds the image
    if not answers:
        raise BackendError("the worker failed on this image; its log says why")
    return answers[0]


def _boxes(result: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "control": region["from_name"],
            "place": None if read_label(region) == NEGATIVE else int(read_label(region)),
            "score": region["score"],
            **read_percent_box(region),
        }
        for region in result
    ]
