"""A labeling config -> a `Plan`: the controls that get boxes, their labels, the phrases and the thresholds. Pure."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar
from xml.etree.ElementTree import Element, ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from backend.errors import LabelingConfigError

MAX_CONFIG_CHARS = 1_000_000
MAX_LABELS = 20_000  # of all controls on all their images together

# Between the words of a label's value; the last four find a place, not a character.
WORD_GAP = re.compile(
    r"[_/-]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[0-9])(?=[A-Z][a-z])|(?<=[A-Za-z]{3})(?=[0-9])"
)

STRICT = {"extra": "forbid"}  # read by pydantic: a field that the reader does not know is an error, not a loss


@dataclass(frozen=True)
class Label:
    """A label: the name that a region carries, the phrases that detect it, the lowest score of its boxes (0..1)."""

    name: str
    phrases: tuple[str, ...]
    threshold: float

    __pydantic_config__: ClassVar = STRICT


@dataclass(frozen=True)
class Control:
    """A control tag for boxes on one Image tag: its names, its labels, and where a task keeps the image.

    `image_value`, `labels_value` and `repeater_items` are tag values as the config has them, such as `$photo.url`.
    """

    from_name: str
    to_name: str
    image_value: str
    labels: tuple[Label, ...]
    negative_phrases: tuple[str, ...]  # a box that fits one of them best is dropped
    nms_iou: float  # of boxes whose IoU is higher, only the best is kept
    threshold: float  # for labels that come with the task or are typed by the annotator
    labels_from_name: str  # the Labels tag beside a Rectangle; empty for RectangleLabels
    is_multi_page: bool  # the image is a list of pages
    labels_value: str  # where a task keeps more labels
    repeater_items: str  # the list of the Repeater around the control: one control for each item
    index_flag: str  # the placeholder of the item's index in names and values

    __pydantic_config__: ClassVar = STRICT


@dataclass(frozen=True)
class Plan:
    """One labeling config, as far as the detector needs it: controls with their labels, and prompts."""

    controls: tuple[Control, ...]
    prompt_names: tuple[str, ...]  # TextArea tags into which annotators type phrases
    threshold_names: tuple[str, ...]  # Number tags into which annotators type a box threshold

    __pydantic_config__: ClassVar = STRICT

    def select_fields(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of a task's data that the plan reads; the others never leave the web front."""
        return {key: value for key, value in data.items() if key in self._field_names}

    @functools.cached_property
    def _field_names(self) -> set[str]:
        values = [value for c in self.controls for value in (c.image_value, c.labels_value, c.repeater_items)]
        return {field for value in values for field in re.findall(r"\$(\w+)", value)}

    @functools.cached_property
    def payload(self) -> dict[str, Any]:
        """The plan as plain JSON, made once: a large request puts it into thousands of chunks."""
        return asdict(self)


def read_plan(label_config: str, box_threshold: float, nms_iou: float) -> Plan:
    """Reads a labeling config.

    Args:
        label_config: XML, as a Label Studio project has it.
        box_threshold: lowest score (0..1) where the config names none.
        nms_iou: IoU (0..1) of the controls' suppression.

    Raises:
        LabelingConfigError: the config has nothing that boxes could be predicted for; the text says why.
    """
    root = _parse(label_config)
    images = {tag.get("name"): tag for tag in root.iter("Image")}
    if not images:
        raise LabelingConfigError("the labeling config has no Image; this backend detects objects on images")
    prompt_names = _find_names_with_prefix(root, "TextArea", "prompt")
    repeaters = {tag: repeater for repeater in root.iter("Repeater") for tag in repeater.iter()}
    pairs = [
        (tag, labels_tag, images[name])
        for tag, labels_tag in _find_box_tags(root)
        if (tag.get("model_skip") or "").lower() not in ("true", "1", "yes")
        for name in _read_target_names(tag)
        if name in images
    ]
    if len(pairs) * len(list(root.iter("Label"))) > MAX_LABELS:
        raise LabelingConfigError(f"the labeling config has more than {MAX_LABELS} labels on its images")
    controls = [
        _read_control(tag, labels_tag, image, repeaters.get(tag), box_threshold, nms_iou)
        for tag, labels_tag, image in pairs
    ]
    usable = tuple(control for control in controls if control.labels or control.labels_value or prompt_names)
    if not usable:
        raise LabelingConfigError(
            "the labeling config has no RectangleLabels (or Rectangle and Labels) with labels on an Image; "
            "add one, or remove model_skip"
        )
    return Plan(usable, prompt_names, _find_names_with_prefix(root, "Number", "box_threshold"))


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


def _find_box_tags(root: Element) -> Iterator[tuple[Element, Element]]:
    """Yields each control tag for boxes with the tag that holds its labels."""
    for tag in root.iter("RectangleLabels"):
        yield tag, tag
    labels_tags = {name: labels for labels in root.iter("Labels") for name in _read_target_names(labels)}
    for tag in root.iter("Rectangle"):
        yield tag, next((labels_tags[name] for name in _read_target_names(tag) if name in labels_tags), tag)


def _read_target_names(tag: Element) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in (tag.get("toName") or "").split(",")))


def _find_names_with_prefix(root: Element, kind: str, prefix: str) -> tuple[str, ...]:
    return tuple(name for tag in root.iter(kind) if (name := tag.get("name") or "").startswith(prefix))


def _read_control(
    tag: Element, labels_tag: Element, image: Element, repeater: Element | None, box_threshold: float, nms_iou: float
) -> Control:
    threshold = _read_threshold(tag, _read_threshold(labels_tag, box_threshold))
    label_tags = [label for label in labels_tag.iter("Label") if label.get("alias") or label.get("value")]
    return Control(
        from_name=tag.get("name") or "",
        to_name=image.get("name") or "",
        image_value=image.get("valueList") or image.get("value") or "",
        labels=tuple(_read_label(label, threshold) for label in label_tags),
        negative_phrases=tuple(split_phrases(labels_tag.get("model_negative_values"))),
        nms_iou=nms_iou,
        threshold=threshold,
        labels_from_name=(labels_tag.get("name") or "") if labels_tag.tag == "Labels" else "",
        is_multi_page=bool(image.get("valueList")),
        labels_value=labels_tag.get("value") or "",
        repeater_items=(repeater.get("on") or "") if repeater is not None else "",
        index_flag=(repeater.get("indexFlag") or "{{idx}}") if repeater is not None else "",
    )


def _read_label(tag: Element, threshold: float) -> Label:
    value = tag.get("value") or ""
    phrases = split_phrases(tag.get("predicted_values")) or [to_phrase(value or tag.get("alias") or "")]
    return Label(tag.get("alias") or value, tuple(phrases), _read_threshold(tag, threshold))


def _read_threshold(tag: Element, default: float) -> float:
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


def split_phrases(text: str | None) -> list[str]:
    r"""Splits a text at `,` `;` `|` `.` and new lines into its phrases, each once; `\,` is a comma of a phrase."""
    parts = re.split(r"(?<!\\)[,;|]|[.\n]", text or "")
    phrases = (clean_phrase(re.sub(r"\\([,;|])", r"\1", part)) for part in parts)
    return list(dict.fromkeys(filter(None, phrases)))


def to_phrase(value: str) -> str:
    """Turns a label's value into a phrase, all in lower case.

    Underscores, hyphens, slashes, camelCase and the number after a word become spaces: `USBCable_Type2` is "usb cable
    type 2", but `v2` and `3D` stay as they are.
    """
    return clean_phrase(WORD_GAP.sub(" ", value)) or clean_phrase(value) or _replace_surrogates(value)


def clean_phrase(text: str) -> str:
    """Normalises a phrase for the model: lower case, single spaces, Unicode text, no '.' and '?', which end phrases."""
    return " ".join(re.sub(r"[.?]", " ", _replace_surrogates(text)).lower().split())


def _replace_surrogates(text: str) -> str:
    """Replaces lone surrogates, which the JSON of a task may hold, but no tokenizer and no message."""
    return text.encode(errors="replace").decode()
