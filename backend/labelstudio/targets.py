"""Plan and task -> views: which pictures are looked at for what, and the names that their regions get. Pure.

A control is one view of a task, or one for each page of a list of pictures, or one for each item of a Repeater. Labels
may come with the task, or be typed by the annotator.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from backend.errors import LabelingConfigError
from backend.labelstudio.labeling_config import Control, Label, Plan, clean_phrase, to_phrase

PATH = re.compile(r"\$([\w$]+(?:\.\w+|\[[0-9]{1,9}\])*)")
INDEX = re.compile(r"[0-9]{1,9}")
FIELD_REFERENCE = re.compile(r"\$(\w+)")
MAX_TARGETS = 500  # pictures of one task, all controls together


@dataclass(frozen=True)
class DetectionQuery:
    """What is looked for; views that ask the same share a forward pass."""

    labels: tuple[Label, ...]
    negatives: tuple[str, ...]
    nms_iou: float


@dataclass(frozen=True)
class ImageTarget:
    """One picture of one control in one task; `page` is its number in a list of pictures."""

    from_name: str
    to_name: str
    labels_name: str
    uri: str
    page: int | None
    query: DetectionQuery
    control: str = ""  # as the plan names it; a Repeater makes other names of it


@dataclass(frozen=True)
class Prompt:
    """What an annotator typed: phrases, and the lowest score of a box where one was given."""

    phrases: tuple[str, ...]
    threshold: float | None

    @classmethod
    def from_dict(cls, prompt: Mapping[str, Any]) -> Prompt:
        """From the plain JSON that `asdict` makes."""
        return cls(tuple(prompt["phrases"]), prompt["threshold"])


def read_prompt(plan: Plan, task: Mapping[str, Any], context: Mapping[str, Any] | None) -> Prompt | None:
    """What the annotator is typing, else what the task's last annotation holds; None where there is neither."""
    annotations = task.get("annotations")
    stored = annotations[-1] if isinstance(annotations, list) and annotations else None
    for source in (context, stored):
        result = source.get("result") if isinstance(source, Mapping) else None
        if isinstance(result, list) and (phrases := _typed(plan.prompts, result, "text")):
            numbers = _typed(plan.thresholds, result, "number")
            parts = [part for phrase in phrases for part in re.split(r"[,.;\n]", str(phrase))]
            cleaned = tuple(dict.fromkeys(phrase for part in parts if (phrase := clean_phrase(part))))
            return Prompt(cleaned, float(numbers[-1]) if numbers else None) if cleaned else None
    return None


def _typed(names: Sequence[str], result: Sequence[Any], field: str) -> list[Any]:
    """The values of the regions of these controls."""
    regions = [region for region in result if isinstance(region, Mapping) and region.get("from_name") in names]
    values = [region["value"].get(field) for region in regions if isinstance(region.get("value"), Mapping)]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [item for item in flat if isinstance(item, str if field == "text" else (int, float))]


def expand_targets(plan: Plan, data: Mapping[str, Any], prompt: Prompt | None = None) -> Iterator[ImageTarget]:
    """What is looked at in a task, in the order of the config, one by one: a task may list a million pages.

    Raises:
        LabelingConfigError: there is nothing to look for, and the text says what is missing.
    """
    for control in plan.controls:
        yield from _of_control(plan, control, data, prompt)


def _of_control(plan: Plan, control: Control, data: Mapping[str, Any], prompt: Prompt | None) -> Iterator[ImageTarget]:
    labels = (*control.labels, *_dynamic(control, data))
    if prompt:
        labels = tuple(_prompted(prompt, labels, control.threshold))
    if not labels:
        missing = f"type phrases into {plan.prompts[0]!r}" if plan.prompts else f"the task has no {control.dynamic}"
        raise LabelingConfigError(f"there is nothing to look for: {missing}")
    asked = DetectionQuery(labels, control.negatives, control.nms_iou)
    for one in _repeated(control, data):
        found = resolve_value(one.image, data)
        pages = enumerate(found) if one.has_pages and isinstance(found, list) else [(None, found)]
        for page, uri in pages:
            address = uri if isinstance(uri, str) else ""
            yield ImageTarget(one.from_name, one.to_name, one.labels_name, address, page, asked, control.from_name)


def _repeated(control: Control, data: Mapping[str, Any]) -> Iterator[Control]:
    """The control, or one for each item of its Repeater with the item's number in its names and values."""
    items = resolve_value(control.repeat, data) if control.repeat else None
    if not control.repeat:
        yield control
    for number in range(len(items) if isinstance(items, list) else 0):
        named = {
            field: getattr(control, field).replace(control.flag, str(number))
            for field in ("from_name", "to_name", "labels_name", "image")
        }
        yield replace(control, **named)


def resolve_value(template: str, data: Mapping[str, Any]) -> Any:
    """A value as a config has it: `$a.b[0].c` is what the task holds there; inside a text a `$field` is replaced."""
    whole = PATH.fullmatch(template)
    if whole:
        return _at(whole[1], data)
    return FIELD_REFERENCE.sub(lambda match: str(_at(match[1], data) or ""), template)


def _at(path: str, data: Any) -> Any:
    for key in re.findall(r"[\w$]+", path):
        if isinstance(data, Mapping):
            data = data.get(key)
        elif isinstance(data, list) and INDEX.fullmatch(key) and int(key) < len(data):
            data = data[int(key)]
        else:
            return None
    return data


def _dynamic(control: Control, data: Mapping[str, Any]) -> Iterator[Label]:
    """Labels that come with the task: texts, or objects with a value and perhaps an alias."""
    rows = resolve_value(control.dynamic, data) if control.dynamic else []
    for row in rows if isinstance(rows, list) else []:
        fields = row if isinstance(row, Mapping) else {"value": row}
        value, alias = str(fields.get("value") or ""), str(fields.get("alias") or "")
        if value or alias:
            yield Label(alias or value, (to_phrase(value or alias),), control.threshold)


def _prompted(prompt: Prompt, labels: Sequence[Label], threshold: float) -> Iterator[Label]:
    """Each phrase with the label that it means, the only one there is, or none: then the annotator chooses."""
    lowest = threshold if prompt.threshold is None else min(max(prompt.threshold, 0.0), 1.0)
    only = labels[0].name if len(labels) == 1 else ""
    for phrase in prompt.phrases:
        meant = [
            label.name for label in labels if phrase in (*label.phrases, to_phrase(label.name), label.name.lower())
        ]
        yield Label(meant[0] if meant else only, (phrase,), lowest)
