import contextlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from backend.errors import LabelingConfigError
from backend.labelstudio.labeling_config import Label, Plan, clean_phrase, read_plan, split_phrases, to_phrase


def make_config(labels: str, control: str = "", image: str = 'value="$image"') -> str:
    return (
        f'<View><Image name="img" {image}/>'
        f'<RectangleLabels name="box" toName="img" {control}>{labels}</RectangleLabels></View>'
    )


def read_labels(xml: str, threshold: float = 0.3) -> tuple[Label, ...]:
    return read_plan(xml, threshold, 0.7).controls[0].labels


@pytest.mark.parametrize(
    ("value", "phrase"),
    [
        ("cat", "cat"),
        ("RedCircle", "red circle"),
        ("red_circle", "red circle"),
        ("red-circle", "red circle"),
        ("TrafficLight_v2", "traffic light v2"),
        ("  Two   Words ", "two words"),
        ("U.S. flag?", "u s flag"),
        ("猫", "猫"),
        ("Кошка", "кошка"),
        ("HTTPServer", "http server"),
        ("USBCable", "usb cable"),
        ("myUSBCable", "my usb cable"),
        ("ABC", "abc"),
        ("person/car", "person car"),
        ("Type2Connector", "type 2 connector"),
        ("class12", "class 12"),
        ("mp3", "mp3"),
        ("3D", "3d"),
        ("4WheelDrive", "4 wheel drive"),
        ("/", "/"),
    ],
)
def test_a_labels_value_becomes_a_phrase(value: str, phrase: str) -> None:
    assert to_phrase(value) == phrase


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("person. car", ["person", "car"]),
        ("a; b|c, d\ne", ["a", "b", "c", "d", "e"]),
        (r"salt\, pepper, mill", ["salt, pepper", "mill"]),
        (" Cat ,cat,, . ", ["cat"]),
        ("", []),
        (None, []),
    ],
)
def test_a_text_is_split_into_phrases(text: str | None, phrases: list[str]) -> None:
    assert split_phrases(text) == phrases


@given(st.text(min_size=1))
def test_a_clean_phrase_holds_no_delimiter_and_stays_as_it_is(text: str) -> None:
    phrase = clean_phrase(text)
    assert "." not in phrase
    assert "?" not in phrase
    assert phrase == clean_phrase(phrase)


def test_names_and_labels_are_read() -> None:
    control = read_plan(make_config('<Label value="Cat"/><Label value="dog"/>'), 0.3, 0.7).controls[0]
    assert (control.from_name, control.to_name, control.image_value) == ("box", "img", "$image")
    assert control.labels == (Label("Cat", ("cat",), 0.3), Label("dog", ("dog",), 0.3))


def test_labels_nested_in_views_are_read() -> None:
    assert [label.name for label in read_labels(make_config('<View><View><Label value="a b"/></View></View>'))] == [
        "a b"
    ]


def test_an_alias_becomes_the_name_and_the_value_the_phrase() -> None:
    assert read_labels(make_config('<Label value="BigCat" alias="c1"/>')) == (Label("c1", ("big cat",), 0.3),)


def test_predicted_values_replace_the_value() -> None:
    labels = read_labels(make_config('<Label value="pet" predicted_values="Cat, small dog ,, cat"/>'))
    assert labels == (Label("pet", ("cat", "small dog"), 0.3),)


def test_negative_phrases_are_read() -> None:
    control = read_plan(
        make_config('<Label value="a"/>', 'model_negative_values="Shadow, , reflection"'), 0.3, 0.7
    ).controls[0]
    assert control.negative_phrases == ("shadow", "reflection")


def test_a_threshold_of_a_label_wins_over_its_controls_and_the_setting() -> None:
    labels = '<Label value="a"/><Label value="b" model_score_threshold="0.7"/>'
    assert [label.threshold for label in read_labels(make_config(labels), 0.25)] == [0.25, 0.7]
    assert [label.threshold for label in read_labels(make_config(labels, 'model_score_threshold="0.5"'))] == [0.5, 0.7]


@pytest.mark.parametrize("value", ["high", "-0.1", "1.5", "nan", ""])
def test_a_wrong_threshold_names_its_tag(value: str) -> None:
    with pytest.raises(LabelingConfigError, match="'cat' must be a number from 0 to 1"):
        read_plan(make_config(f'<Label value="cat" model_score_threshold="{value}"/>'), 0.3, 0.7)


def test_only_the_fields_that_the_plan_reads_are_selected() -> None:
    plan = read_plan(make_config('<Label value="a"/>', image='value="$photo.url"'), 0.3, 0.7)
    assert plan.select_fields({"photo": {"url": "x"}, "patient": "secret"}) == {"photo": {"url": "x"}}


@pytest.mark.parametrize(
    "xml",
    [
        "<View></View>",
        make_config(""),
        make_config('<Label value="a"/>', 'model_skip="true"'),
        '<View><RectangleLabels name="b" toName="text"><Label value="a"/></RectangleLabels></View>',
        '<View><Image name="i" value="$i"/><Choices name="c" toName="i"><Choice value="a"/></Choices></View>',
    ],
)
def test_a_config_without_anything_to_predict_is_refused(xml: str) -> None:
    with pytest.raises(LabelingConfigError, match=r"no Image|with labels on an Image"):
        read_plan(xml, 0.3, 0.7)


def test_a_skipped_control_leaves_the_others() -> None:
    two = make_config('<Label value="a"/>', 'model_skip="true"').replace("</View>", "") + (
        '<RectangleLabels name="other" toName="img"><Label value="b"/></RectangleLabels></View>'
    )
    assert [control.from_name for control in read_plan(two, 0.3, 0.7).controls] == ["other"]


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        ("<View>", "not valid XML"),
        ("", "not valid XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><View>&b;</View>', "DOCTYPE"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><View/>', "DOCTYPE"),
        ("<View>" + " " * 1_000_000 + "</View>", "longer than"),
    ],
)
def test_a_config_that_cannot_be_read_says_why(xml: str, reason: str) -> None:
    with pytest.raises(LabelingConfigError, match=reason):
        read_plan(xml, 0.3, 0.7)


def test_a_plan_survives_json() -> None:
    plan = read_plan(make_config('<Label value="a" predicted_values="x, y"/><Label value="b" alias="c"/>'), 0.3, 0.7)
    assert TypeAdapter(Plan).validate_python(json.loads(json.dumps(plan.payload))) == plan


@pytest.mark.parametrize(
    "body",
    [
        '<RectangleLabels name="l" toName="' + "i," * 400 + '">' + '<Label value="a"/>' * 300 + "</RectangleLabels>",
        '<Rectangle name="r" toName="i"/><Labels name="l" toName="i"><Label value="a"/></Labels>' * 4000,
        '<Repeater on="$x">' * 100
        + '<RectangleLabels name="l" toName="i"><Label value="a"/></RectangleLabels>' * 500
        + "</Repeater>" * 100,
    ],
)
def test_a_config_that_would_explode_is_read_or_refused_within_a_second(body: str) -> None:
    start = time.monotonic()
    with contextlib.suppress(LabelingConfigError):
        read_plan(f'<View><Image name="i" value="$i"/>{body}</View>', 0.3, 0.7)
    assert time.monotonic() - start < 1
