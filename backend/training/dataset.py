"""Annotated tasks -> examples: what annotators say is in a picture. Pure.

Of a task's annotations the ground truth counts, else the last one that was finished. A picture with a box that cannot
be used is left out whole: trained on without it, the model would learn that nothing is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from backend.boxes import Box
from backend.errors import LabelingConfigError
from backend.labelstudio.labeling_config import Plan
from backend.labelstudio.targets import MAX_TARGETS, ImageTarget, expand_targets

# Of a hundred tasks so many tell when to stop and so many are for the gate alone; neither is trained on. The gate must
# not be passed by what was chosen on the same pictures.
VALIDATION_PERCENT, HELD_OUT_PERCENT = 15, 20

log = logging.getLogger(__name__)

Tasks = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Example:
    """One picture and its true boxes: xyxy in 0..1 of the picture, each with its label. `part`: train, stop or gate."""

    task: int
    view: ImageTarget
    truth: tuple[tuple[Box, str], ...]
    part: str


class _Unusable(Exception):
    """A task that cannot be learned from, and why."""


def read_examples(plan: Plan, project: str, tasks: Tasks) -> tuple[list[Example], Counter[str]]:
    """The examples of annotated tasks, each with `id`, `data` and `annotations`, and how many were left out and why."""
    examples: list[Example] = []
    left_out: Counter[str] = Counter()
    for task in tasks:
        try:
            examples += _of_task(plan, project, task, left_out)
        except _Unusable as error:
            left_out[str(error)] += 1
        except Exception as error:  # one odd task must not end the training
            log.error("task %s raised %s", task.get("id"), type(error).__name__)
            left_out["tasks that cannot be read"] += 1
    return examples, left_out


def _of_task(plan: Plan, project: str, task: Mapping[str, Any], left_out: Counter[str]) -> list[Example]:
    result = _annotation(task).get("result")
    regions = [region for region in result if isinstance(region, Mapping)] if isinstance(result, list) else []
    part = choose_split(project, task["id"])
    try:
        seen = list(islice(expand_targets(plan, task["data"]), MAX_TARGETS))
        return [Example(task["id"], view, _truth(view, regions, left_out), part) for view in seen]
    except LabelingConfigError:
        raise _Unusable("tasks without labels") from None


def _annotation(task: Mapping[str, Any]) -> Mapping[str, Any]:
    finished = [row for row in task.get("annotations") or [] if not row.get("was_cancelled")]
    if not finished:
        raise _Unusable("tasks that were skipped")
    return max(finished, key=lambda row: (bool(row.get("ground_truth")), str(row.get("updated_at")), row.get("id", 0)))


def choose_split(project: str, task: int) -> str:
    """What a task is for: train, stop or gate; the same each time, whatever tasks there are."""
    place = int.from_bytes(hashlib.sha256(f"{project}/{task}".encode()).digest()[:4], "big") % 100
    return "gate" if place < HELD_OUT_PERCENT else "stop" if place < HELD_OUT_PERCENT + VALIDATION_PERCENT else "train"


def _truth(
    view: ImageTarget, regions: Sequence[Mapping[str, Any]], left_out: Counter[str]
) -> tuple[tuple[Box, str], ...]:
    """The boxes on this picture; raises `_Unusable` where one of them cannot be used."""
    name = view.labels_name or view.from_name
    field = "labels" if view.labels_name else "rectanglelabels"
    wanted = {label.name for label in view.query.labels}
    if view.labels_name and _ids(regions, view.from_name) - _ids(regions, name):
        raise _Unusable("tasks with boxes without a label")
    truth = []
    for region in regions:
        if region.get("from_name") != name or region.get("to_name") != view.to_name:
            continue
        if view.page is not None and region.get("item_index", 0) != view.page:
            continue
        box, labels = _box(region), (region.get("value") or {}).get(field) or []
        if not labels:
            raise _Unusable("tasks with boxes without a label")
        if labels[0] in wanted:
            truth.append((box, labels[0]))
        else:
            left_out["boxes whose label is not in the labeling config"] += 1
    return tuple(truth)


def _ids(regions: Sequence[Mapping[str, Any]], from_name: str) -> set[str]:
    return {str(region.get("id")) for region in regions if region.get("from_name") == from_name}


def _box(region: Mapping[str, Any]) -> Box:
    value = region.get("value") or {}
    if value.get("rotation", 0) or region.get("image_rotation", 0):
        raise _Unusable("tasks with rotated boxes")
    try:
        x, y, width, height = (float(value[key]) / 100 for key in ("x", "y", "width", "height"))
    except (KeyError, TypeError, ValueError):
        raise _Unusable("tasks with boxes that cannot be read") from None
    x1, y1, x2, y2 = (min(max(edge, 0.0), 1.0) for edge in (x, y, x + width, y + height))
    if not (x2 > x1 and y2 > y1):
        raise _Unusable("tasks with boxes that cannot be read")
    return x1, y1, x2, y2


def fingerprint_examples(examples: Sequence[Example]) -> str:
    """Of all that training reads of the examples, in whatever order they come."""
    rows = sorted(json.dumps([e.task, e.view.uri, e.view.from_name, e.view.page, e.truth]) for e in examples)
    return hashlib.sha256("\n".join(rows).encode(errors="replace")).hexdigest()[:16]
