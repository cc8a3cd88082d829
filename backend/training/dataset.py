"""Annotated tasks -> training examples. Pure.

One annotation of each task counts: the ground truth, else the last one that was submitted. A box that cannot be used
excludes its whole task: without the box, the model would learn that nothing is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from backend.boxes import Box
from backend.errors import LabelingConfigError
from backend.labelstudio.labeling_config import Plan
from backend.labelstudio.targets import MAX_TARGETS, ImageTarget, expand_targets

# Percentages of the tasks. Validation decides when to stop, the held-out tasks are for the gate alone: what was chosen
# on some images would pass a gate on the same images too easily. Neither is trained on.
VALIDATION_PERCENT, HELD_OUT_PERCENT = 15, 20

LabeledBox = tuple[Box, str]  # xyxy and the name of the label
Split = Literal["train", "validation", "held_out"]
Task = Mapping[str, Any]
Region = Mapping[str, Any]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One image of an annotated task and all boxes on it, in 0..1 of its width and height."""

    task: int
    target: ImageTarget
    truth: tuple[LabeledBox, ...]
    split: Split


class _UnusableTask(Exception):
    """A task cannot be trained on; the text says why."""


def read_examples(plan: Plan, project: str, tasks: Iterable[Task]) -> tuple[list[Example], Counter[str]]:
    """Reads examples from annotated tasks.

    Args:
        plan: of the project's labeling config.
        project: id of the project.
        tasks: as Label Studio returns them, each with `id`, `data` and `annotations`.

    Returns:
        The examples, and how many tasks and boxes were left out, by the reason.
    """
    examples: list[Example] = []
    left_out: Counter[str] = Counter()
    for task in tasks:
        try:
            examples += _read_task(plan, project, task, left_out)
        except _UnusableTask as error:
            left_out[str(error)] += 1
        except Exception as error:  # one malformed task must not end the training
            log.error(
                "project %s, task %s: cannot read the annotation (%s)", project, task.get("id"), type(error).__name__
            )
            left_out["tasks that cannot be read"] += 1
    return examples, left_out


def _read_task(plan: Plan, project: str, task: Task, left_out: Counter[str]) -> list[Example]:
    submitted = [annotation for annotation in task.get("annotations") or [] if not annotation.get("was_cancelled")]
    if not submitted:
        raise _UnusableTask("tasks that were skipped")
    annotation = max(submitted, key=lambda a: (bool(a.get("ground_truth")), str(a.get("updated_at")), a.get("id", 0)))
    result = annotation.get("result")
    regions = [region for region in result if isinstance(region, Mapping)] if isinstance(result, list) else []
    split = choose_split(project, task["id"])
    try:
        targets = list(islice(expand_targets(plan, task["data"]), MAX_TARGETS))
    except LabelingConfigError:
        raise _UnusableTask("tasks without labels") from None
    return [Example(task["id"], target, _read_boxes(target, regions, left_out), split) for target in targets]


def choose_split(project: str, task: int) -> Split:
    """Assigns a task to a split by a hash of its id: always the same one, whatever other tasks the project has."""
    percentile = int.from_bytes(hashlib.sha256(f"{project}/{task}".encode()).digest()[:4], "big") % 100
    if percentile < HELD_OUT_PERCENT:
        return "held_out"
    return "validation" if percentile < HELD_OUT_PERCENT + VALIDATION_PERCENT else "train"


def _read_boxes(target: ImageTarget, regions: Sequence[Region], left_out: Counter[str]) -> tuple[LabeledBox, ...]:
    """Reads the boxes on one image.

    Raises:
        _UnusableTask: one of them cannot be used.
    """
    name = target.labels_from_name or target.from_name
    field = "labels" if target.labels_from_name else "rectanglelabels"
    label_names = {label.name for label in target.query.labels}
    if target.labels_from_name:  # rectangles and their labels are regions of two controls with the same ids
        rectangle_ids = {str(region.get("id")) for region in regions if region.get("from_name") == target.from_name}
        labeled_ids = {str(region.get("id")) for region in regions if region.get("from_name") == name}
        if rectangle_ids - labeled_ids:
            raise _UnusableTask("tasks with boxes without a label")
    boxes = []
    for region in regions:
        if region.get("from_name") != name or region.get("to_name") != target.to_name:
            continue
        if target.page is not None and region.get("item_index", 0) != target.page:
            continue
        box, labels = _read_box(region), (region.get("value") or {}).get(field) or []
        if not labels:
            raise _UnusableTask("tasks with boxes without a label")
        if labels[0] in label_names:
            boxes.append((box, labels[0]))
        else:
            left_out["boxes whose label is not in the labeling config"] += 1
    return tuple(boxes)


def _read_box(region: Region) -> Box:
    value = region.get("value") or {}
    if value.get("rotation", 0) or region.get("image_rotation", 0):
        raise _UnusableTask("tasks with rotated boxes")
    try:
        x, y, width, height = (float(value[key]) / 100 for key in ("x", "y", "width", "height"))
    except (KeyError, TypeError, ValueError):
        raise _UnusableTask("tasks with boxes that cannot be read") from None
    x1, y1, x2, y2 = (min(max(edge, 0.0), 1.0) for edge in (x, y, x + width, y + height))
    if not (x2 > x1 and y2 > y1):
        raise _UnusableTask("tasks with boxes that cannot be read")
    return x1, y1, x2, y2


def fingerprint_examples(examples: Sequence[Example]) -> str:
    """Returns a fingerprint of everything that training reads from the examples, whatever their order."""
    entries = sorted(json.dumps([e.task, e.target.uri, e.target.from_name, e.target.page, e.truth]) for e in examples)
    return hashlib.sha256("\n".join(entries).encode(errors="replace")).hexdigest()[:16]
