"""Labeling config -> Plan: what one labeling config asks of the detector. Pure: no I/O, no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from backend.errors import LabelingConfigError

MAX_CONFIG_CHARS = 1_000_000
MAX_LABELS = 20_000  # all controls and pictures together


@dataclass(frozen=True)
class Label:
    """A label as the annotator sees it, the phrases that find it and its lowest score (0..1)."""

    name: str
    phrases: tuple[str, ...]
    threshold: float


@dataclass(frozen=True)
class Control:
    """A control for boxes on one Image tag: its names, where a task keeps the picture, and what to look for.

    `image`, `dynamic` and `repeat` are values as the config has them, such as `$photo.url`. A box that fits one of the
    phrases in `negatives` best is dropped; of boxes whose IoU is above `nms_iou` only the best stays.
    """

    from_name: str
    to_name: str
    image: str
    labels: tuple[Label, ...]
    negatives: tuple[str, ...]
    nms_iou: float
    threshold: float
    labels_name: str = ""  # of the Labels beside a Rectangle; empty for RectangleLabels
    has_pages: bool = False  # the picture is a list of pages
    dynamic: str = ""  # where a task keeps more labels
    repeat: str = ""  # the list for whose items a Repeater makes the control
    flag: str = ""  # what stands for the item's number in names and values


@dataclass(frozen=True)
class Plan:
    """What one labeling config asks of the detector; annotators may type into `prompts` and `thresholds`."""

    controls: tuple[Control, ...]
    prompts: tuple[str, ...] = ()
    thresholds: tuple[str, ...] = ()

    def select_fields(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a task's data that the plan reads; the others need not leave the web front."""
        values = [value for c in self.controls for value in (c.image, c.dynamic, c.repeat)]
        wanted = {field for value in values for field in re.findall(r"\$(\w+)", value)}
        return {key: value for key, value in data.items() if key in wanted}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, read back by `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plan: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`, also after a round trip through JSON."""
        controls = tuple(_control_from_dict(control) for control in plan["controls"])
        return cls(controls, tuple(plan["prompts"]), tuple(plan["thresholds"]))


def _control_from_dict(control: Mapping[str, Any]) -> Control:
    labels = tuple(Label(row["name"], tuple(row["phrases"]), row["threshold"]) for row in control["labels"])
    return Control(**{**control, "labels": labels, "negatives": tuple(control["negatives"])})


def read_plan(label_config: str, box_threshold: float, nms_iou: float) -> Plan:
    """Reads a labeling config; `box_threshold` and `nms_iou` (0..1) serve where the config names none.

    Raises:
        LabelingConfigError: there is nothing in it that boxes could be predicted for; the text says why.
    """
    root = _parse(label_config)
    images = {tag.get("name"): tag for tag in root.iter("Image")}
    if not images:
        raise LabelingConfigError("the labeling config has no Image; this backend finds boxes on pictures")
    prompts, repeaters = _names(root, "TextArea", "prompt"), _repeaters(root)
    pairs = [
        (tag, holder, images[name])
        for tag, holder in _box_tags(root)
        if not _is_true(tag.get("model_skip"))
        for name in _targets(tag)
        if name in images
    ]
    if len(pairs) * len(list(root.iter("Label"))) > MAX_LABELS:
        raise LabelingConfigError(f"the labeling config has more than {MAX_LABELS} labels on its pictures")
    controls = [
        _control(tag, holder, image, box_threshold, nms_iou, repeaters.get(tag)) for tag, holder, image in pairs
    ]
    usable = tuple(control for control in controls if control.labels or control.dynamic or prompts)
    if not usable:
        raise LabelingConfigError(
            "the labeling config has no RectangleLabels (or Rectangle and Labels) with labels on an Image; "
            "add one, or remove model_skip"
        )
    return Plan(usable, prompts, _names(root, "Number", "box_threshold"))


def _box_tags(root: Element) -> Iterator[tuple[Element, Element]]:
    """Each control for boxes, with the tag that holds its labels."""
    for tag in root.iter("RectangleLabels"):
        yield tag, tag
    beside = {name: labels for labels in root.iter("Labels") for name in _targets(labels)}
    for tag in root.iter("Rectangle"):
        yield tag, next((beside[name] for name in _targets(tag) if name in beside), tag)


def _targets(tag: Element) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in (tag.get("toName") or "").split(",")))


def _names(root: Element, kind: str, prefix: str) -> tuple[str, ...]:
    return tuple(name for tag in root.iter(kind) if (name := tag.get("name") or "").startswith(prefix))


def _repeaters(root: Element) -> dict[Element, Element]:
    """The Repeater around each tag that has one."""
    return {tag: repeater for repeater in root.iter("Repeater") for tag in repeater.iter()}


def _parse(label_config: str) -> Element:
    if len(label_config) > MAX_CONFIG_CHARS:
        raise LabelingConfigError(f"the labeling config is longer than {MAX_CONFIG_CHARS} characters")
    try:
        root: Element = fromstring(label_config, forbid_dtd=True)
    except ParseError as error:
        raise LabelingConfigError(f"the labeling config is not valid XML: {error}") from None
    except UnicodeError:
        raise LabelingConfigError("the labeling config holds characters that are not Unicode text") from None
    except DefusedXmlException:
        raise LabelingConfigError("the labeling config may hold no DOCTYPE and no entities") from None
    return root


def _control(
    tag: Element, holder: Element, image: Element, box_threshold: float, nms_iou: float, repeater: Element | None
) -> Control:
    threshold = _threshold(tag, _threshold(holder, box_threshold))
    return Control(
        from_name=tag.get("name") or "",
        to_name=image.get("name") or "",
        image=image.get("valueList") or image.get("value") or "",
        labels=tuple(_label(label, threshold) for label in _labels(holder)),
        negatives=tuple(_listed(holder.get("model_negative_values"))),
        nms_iou=nms_iou,
        threshold=threshold,
        labels_name=(holder.get("name") or "") if holder.tag == "Labels" else "",
        has_pages=bool(image.get("valueList")),
        dynamic=holder.get("value") or "",
        repeat=(repeater.get("on") or "") if repeater is not None else "",
        flag=(repeater.get("indexFlag") or "{{idx}}") if repeater is not None else "",
    )


def _labels(tag: Element) -> Iterator[Element]:
    return (label for label in tag.iter("Label") if label.get("alias") or label.get("value"))


def _label(tag: Element, threshold: float) -> Label:
    value = tag.get("value") or ""
    phrases = _listed(tag.get("predicted_values")) or [to_phrase(value or tag.get("alias") or "")]
    return Label(tag.get("alias") or value, tuple(phrases), _threshold(tag, threshold))


def _listed(text: str | None) -> list[str]:
    """The phrases of an attribute, with commas between; each once."""
    return list(dict.fromkeys(phrase for part in (text or "").split(",") if (phrase := clean_phrase(part))))


def _threshold(tag: Element, default: float) -> float:
    text = tag.get("model_score_threshold")
    if text is None:
        return default
    try:
        threshold = float(text)
    except ValueError:
        threshold = -1.0
    if not 0 <= threshold <= 1:
        name = tag.get("name") or tag.get("value")
        raise LabelingConfigError(f"model_score_threshold of {name!r} must be a number from 0 to 1, not {text!r}")
    return threshold


def _is_true(text: str | None) -> bool:
    return (text or "").lower() in ("true", "1", "yes")


def to_phrase(value: str) -> str:
    """A label's value as a phrase: underscores, hyphens and camelCase become spaces, all in lower case."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", value)
    return clean_phrase(re.sub(r"[_-]+", " ", spaced)) or clean_phrase(value) or value


def clean_phrase(text: str) -> str:
    """A phrase as the model wants it: lower case, single spaces, no '.' and '?', which would split it in two."""
    return " ".join(re.sub(r"[.?]", " ", text).lower().split())
