"""A `Plan` and a task -> image targets: which images get boxes for which labels, and the names of their regions. Pure.

A control makes one target in a task, or one for each page of a multi-page image, or one for each item of a Repeater.
Labels may come with the task, or be typed by the annotator.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from backend.errors import LabelingConfigError
from backend.labelstudio.labeling_config import STRICT, Control, Label, Plan, split_phrases, to_phrase

PATH = re.compile(r"\$([\w$]+(?:\.\w+|\[[0-9]{1,9}\])*)")
INDEX = re.compile(r"[0-9]{1,9}")
FIELD_REFERENCE = re.compile(r"\$(\w+)")
MAX_TARGETS = 500  # of one task, all controls together


@dataclass(frozen=True)
class DetectionQuery:
    """The labels, negative phrases and suppression of a target; targets with equal queries share a forward pass."""

    labels: tuple[Label, ...]
    negative_phrases: tuple[str, ...]
    nms_iou: float


@dataclass(frozen=True)
class ImageTarget:
    """One image of one control in one task."""

    from_name: str
    to_name: str
    labels_from_name: str
    uri: str
    page: int | None  # index in a multi-page image
    query: DetectionQuery
    control_name: str = ""  # the plan's name of the control; a Repeater derives other names from it


@dataclass(frozen=True)
class Prompt:
    """Phrases that an annotator typed, and the lowest score of a box where one was typed too."""

    phrases: tuple[str, ...]
    threshold: float | None

    __pydantic_config__: ClassVar = STRICT


def read_prompt(plan: Plan, task: Mapping[str, Any], context: Mapping[str, Any] | None) -> Prompt | None:
    """Returns what the annotator is typing, else what the task's last annotation holds; None without either."""
    annotations = task.get("annotations")
    last_annotation = annotations[-1] if isinstance(annotations, list) and annotations else None
    for source in (context, last_annotation):
        result = source.get("result") if isinstance(source, Mapping) else None
        if isinstance(result, list) and (texts := _read_typed_values(plan.prompt_names, result, "text")):
            numbers = _read_typed_values(plan.threshold_names, result, "number")
            phrases = tuple(split_phrases("\n".join(map(str, texts))))
            return Prompt(phrases, float(numbers[-1]) if numbers else None) if phrases else None
    return None


def _read_typed_values(names: Sequence[str], result: Sequence[Any], field: str) -> list[Any]:
    """Returns the values of the regions of these controls; `field` is "text" or "number"."""
    regions = [region for region in result if isinstance(region, Mapping) and region.get("from_name") in names]
    values = [region["value"].get(field) for region in regions if isinstance(region.get("value"), Mapping)]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [item for item in flat if isinstance(item, str if field == "text" else (int, float))]


def expand_targets(plan: Plan, data: Mapping[str, Any], prompt: Prompt | None = None) -> Iterator[ImageTarget]:
    """Yields the image targets of a task lazily, in the order of the config: a task may list a million pages.

    Raises:
        LabelingConfigError: a control has no labels to detect; the text says what is missing.
    """
    for control in plan.controls:
        labels = (*control.labels, *_read_task_labels(control, data))
        if prompt:
            labels = tuple(_make_prompt_labels(prompt, labels, control.threshold))
        if not labels:
            typed = plan.prompt_names
            missing = f"type phrases into {typed[0]!r}" if typed else f"the task has no {control.labels_value}"
            raise LabelingConfigError(f"there is nothing to detect: {missing}")
        query = DetectionQuery(labels, control.negative_phrases, control.nms_iou)
        for repeated in _repeat(control, data):
            image = resolve_value(repeated.image_value, data)
            pages = enumerate(image) if repeated.is_multi_page and isinstance(image, list) else [(None, image)]
            for page, uri in pages:
                yield ImageTarget(
                    from_name=repeated.from_name,
                    to_name=repeated.to_name,
                    labels_from_name=repeated.labels_from_name,
                    uri=uri if isinstance(uri, str) else "",
                    page=page,
                    query=query,
                    control_name=control.from_name,
                )


def _repeat(control: Control, data: Mapping[str, Any]) -> Iterator[Control]:
    """Yields the control, or one for each item of its Repeater with the item's index in its names and values."""
    if not control.repeater_items:
        yield control
        return
    items = resolve_value(control.repeater_items, data)
    for index in range(len(items) if isinstance(items, list) else 0):
        indexed = {
            field: getattr(control, field).replace(control.index_flag, str(index))
            for field in ("from_name", "to_name", "labels_from_name", "image_value")
        }
        yield replace(control, **indexed)


def resolve_value(template: str, data: Mapping[str, Any]) -> Any:
    """Resolves a tag's value: `$a.b[0].c` is what the task holds there; in other text each `$field` is replaced."""
    whole = PATH.fullmatch(template)
    if whole:
        return _resolve_path(whole[1], data)
    return FIELD_REFERENCE.sub(lambda match: str(_resolve_path(match[1], data) or ""), template)


def _resolve_path(path: str, data: Any) -> Any:
    for key in re.findall(r"[\w$]+", path):
        if isinstance(data, Mapping):
            data = data.get(key)
        elif isinstance(data, list) and INDEX.fullmatch(key) and int(key) < len(data):
            data = data[int(key)]
        else:
            return None
    return data


def _read_task_labels(control: Control, data: Mapping[str, Any]) -> Iterator[Label]:
    """Yields the labels that come with the task: texts, or objects with a value and perhaps an alias."""
    items = resolve_value(control.labels_value, data) if control.labels_value else []
    for item in items if isinstance(items, list) else []:
        fields = item if isinstance(item, Mapping) else {"value": item}
        value, alias = str(fields.get("value") or ""), str(fields.get("alias") or "")
        if value or alias:
            yield Label(alias or value, (to_phrase(value or alias),), control.threshold)


def _make_prompt_labels(prompt: Prompt, labels: Sequence[Label], threshold: float) -> Iterator[Label]:
    """Yields each typed phrase with the label that it names, else the config's only label, else no label."""
    lowest = threshold if prompt.threshold is None else min(max(prompt.threshold, 0.0), 1.0)
    only = labels[0].name if len(labels) == 1 else ""
    for phrase in prompt.phrases:
        named = (
            label.name for label in labels if phrase in (*label.phrases, to_phrase(label.name), label.name.lower())
        )
        yield Label(next(named, only), (phrase,), lowest)
