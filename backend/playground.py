"""One picture looked at for one labeling config, so that every threshold can be tried on the answer.

Which boxes are left of overlapping ones depends on the thresholds, so the answer holds them all, down to `LOWEST`,
those of negative phrases too. `pages/boxes.js` cuts them as `Detector` would have.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from redis import Redis

from backend.asking import Asking
from backend.errors import BackendError, BadRequest, ImageError, LabelingConfigError, NotReady
from backend.labeling import Control, Label, Plan
from backend.queues import PredictQueue
from backend.regions import label_of
from backend.settings import Settings

LOWEST = 0.05  # score of the boxes that are answered
FIELD = "image"
PROJECT = re.compile(r"[0-9]{1,18}")
NEGATIVE = "\0"  # begins labels that stand for negative phrases; XML cannot hold it


def look(settings: Settings, connection: Redis, label_config: str, image: str, project: str = "") -> dict[str, Any]:
    """The boxes of a picture.

    Args:
        settings: of this process.
        connection: to the queue.
        label_config: as in Label Studio; each of its controls looks at this picture, whatever field it names.
        image: as a `data:` address.
        project: its number, for what was learned for it.

    Returns:
        `labels`: control, label, phrases and threshold of each; `nms_iou`; `boxes`: control, label (null for a negative
        phrase), score, and x, y, width and height in percent of the picture.

    Raises:
        BadRequest: the picture is not a `data:` address, or the project not a number.
        LabelingConfigError: the config cannot be served.
        ImageError: the picture cannot be read.
        NotReady: no answer by PREDICT_DEADLINE.
    """
    if not image.startswith("data:"):
        raise BadRequest("the picture must be sent as a data: address")
    if project and not PROJECT.fullmatch(project):
        raise BadRequest("project must be the number of a project")
    asking = Asking(settings, label_config, project)
    controls = list({control.from_name: control for control in asking.plan.controls}.values())
    low = Plan(tuple(map(_lowered, controls)))
    (chunk,) = asking.chunks([{"id": "playground", "data": {FIELD: image}}], 1, plan=low)
    answer = _answer(settings, PredictQueue(connection), chunk)
    if "error" in answer:
        raise ImageError(answer["error"]["detail"])
    labels = [
        {"control": _name(control), "label": label.name, "phrases": label.phrases, "threshold": label.threshold}
        for control in controls
        for label in control.labels
    ]
    return {
        "model_version": asking.model_version,
        "nms_iou": settings.nms_iou,
        "labels": labels,
        "boxes": _boxes(answer["result"]),
    }


def _name(control: Control) -> str:
    """Of the tag that its regions carry the labels of."""
    return control.labels_name or control.from_name


def _lowered(control: Control) -> Control:
    if not control.labels:
        raise LabelingConfigError(f"{control.from_name!r} has no labels of its own; give it some to try them here")
    negatives = [Label(NEGATIVE + phrase, (phrase,), LOWEST) for phrase in control.negatives]
    labels = (*(replace(label, threshold=LOWEST) for label in control.labels), *negatives)
    return replace(
        control, image=f"${FIELD}", labels=labels, negatives=(), nms_iou=1.0, has_pages=False, dynamic="", repeat=""
    )


def _answer(settings: Settings, queue: PredictQueue, chunk: dict[str, Any]) -> dict[str, Any]:
    (job,) = queue.enqueue([chunk], at_front=True, project=None)
    try:
        value = queue.wait(job, time.monotonic() + settings.predict_deadline)
    except TimeoutError:
        raise NotReady("no answer yet: is a worker running, and is it busy? Try again") from None
    queue.forget(chunk)  # it holds the picture
    if not value:
        raise BackendError("the worker failed on this picture; its log says why")
    answer: dict[str, Any] = value["answers"][0]
    return answer


def _boxes(result: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "control": region["from_name"],
            "label": None if label_of(region).startswith(NEGATIVE) else label_of(region),
            "score": region["score"],
        }
        | {edge: region["value"][edge] for edge in ("x", "y", "width", "height")}
        for region in result
        if label_of(region)
    ]
