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


@dataclass(frozen=True)
class Label:
    """A label as the annotator sees it, the phrases that find it and its lowest score (0..1)."""

    name: str
    phrases: tuple[str, ...]
    threshold: float


@dataclass(frozen=True)
class Control:
    """A RectangleLabels tag: its names, where a task keeps the URI of its picture, and what to look for.

    A box that fits one of the phrases in `negatives` best is dropped; of boxes whose IoU is above `nms_iou` only the
    best stays.
    """

    from_name: str
    to_name: str
    path: tuple[str, ...]
    labels: tuple[Label, ...]
    negatives: tuple[str, ...]
    nms_iou: float

    def uri(self, data: Mapping[str, Any]) -> str:
        """The picture's address in a task's data; empty where the data holds none."""
        value: Any = data
        for key in self.path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value if isinstance(value, str) else ""


@dataclass(frozen=True)
class Plan:
    """What one labeling config asks of the detector."""

    controls: tuple[Control, ...]

    def select(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a task's data that the plan reads; the others need not leave the web front."""
        wanted = {control.path[0] for control in self.controls}
        return {key: value for key, value in data.items() if key in wanted}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, read back by `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plan: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`, also after a round trip through JSON."""
        return cls(tuple(_control_from_dict(control) for control in plan["controls"]))


def _control_from_dict(control: Mapping[str, Any]) -> Control:
    labels = tuple(Label(row["name"], tuple(row["phrases"]), row["threshold"]) for row in control["labels"])
    return Control(
        control["from_name"],
        control["to_name"],
        tuple(control["path"]),
        labels,
        tuple(control["negatives"]),
        control["nms_iou"],
    )


def read_plan(label_config: str, box_threshold: float, nms_iou: float) -> Plan:
    """Reads a labeling config; `box_threshold` and `nms_iou` (0..1) serve where the config names none.

    Raises:
        LabelingConfigError: there is nothing in it that boxes could be predicted for; the text says why.
    """
    root = _parse(label_config)
    images = {tag.get("name"): tag for tag in root.iter("Image")}
    tags = [tag for tag in root.iter("RectangleLabels") if not _is_true(tag.get("model_skip"))]
    controls = tuple(control for tag in tags if (control := _control(tag, images, box_threshold, nms_iou)))
    if not controls:
        raise LabelingConfigError(
            "the labeling config has no RectangleLabels with labels on an Image; add one, or remove model_skip"
        )
    return Plan(controls)


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
    tag: Element, images: Mapping[str | None, Element], box_threshold: float, nms_iou: float
) -> Control | None:
    image = images.get(tag.get("toName"))
    threshold = _threshold(tag, box_threshold)
    labels = tuple(_label(label, threshold) for label in _labels(tag))
    if image is None or not labels:
        return None
    negatives = tuple(_listed(tag.get("model_negative_values")))
    path = (image.get("value") or "").removeprefix("$").split(".")
    return Control(tag.get("name") or "", image.get("name") or "", tuple(path), labels, negatives, nms_iou)


def _labels(tag: Element) -> Iterator[Element]:
    return (label for label in tag.iter("Label") if label.get("alias") or label.get("value"))


def _label(tag: Element, threshold: float) -> Label:
    value = tag.get("value") or ""
    phrases = _listed(tag.get("predicted_values")) or [words(value or tag.get("alias") or "")]
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


def words(value: str) -> str:
    """A label's value as a phrase: underscores, hyphens and camelCase become spaces, all in lower case."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", value)
    return clean_phrase(re.sub(r"[_-]+", " ", spaced)) or clean_phrase(value) or value


def clean_phrase(text: str) -> str:
    """A phrase as the model wants it: lower case, single spaces, no '.' and '?', which would split it in two."""
    return " ".join(re.sub(r"[.?]", " ", text).lower().split())
