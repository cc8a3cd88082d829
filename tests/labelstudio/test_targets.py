import json
from typing import Any

import pytest
from pydantic import TypeAdapter

from backend.errors import LabelingConfigError
from backend.labelstudio.labeling_config import Plan, read_plan
from backend.labelstudio.targets import ImageTarget, Prompt, expand_targets, read_prompt, resolve_value

BOXES = '<RectangleLabels name="box" toName="img">{}</RectangleLabels>'
PROMPT = '<TextArea name="prompt" toName="img"/><Number name="box_threshold" toName="img"/>'


def list_targets(*arguments: Any) -> list[ImageTarget]:
    return list(expand_targets(*arguments))


def make_plan(body: str, image: str = '<Image name="img" value="$image"/>') -> Plan:
    plan = read_plan(f"<View>{image}{body}</View>", 0.3, 0.7)
    assert TypeAdapter(Plan).validate_python(json.loads(json.dumps(plan.payload))) == plan
    return plan


def list_labels(target: ImageTarget) -> list[tuple[str, tuple[str, ...]]]:
    return [(label.name, label.phrases) for label in target.query.labels]


def make_typed_result(text: list[str], number: float | None = None) -> dict[str, Any]:
    regions = [{"from_name": "prompt", "to_name": "img", "type": "textarea", "value": {"text": text}}]
    if number is not None:
        regions.append({"from_name": "box_threshold", "to_name": "img", "type": "number", "value": {"number": number}})
    return {"result": regions}


@pytest.mark.parametrize(
    ("template", "value"),
    [
        ("$a", {"b": ["x", {"c": "y"}]}),
        ("$a.b[1].c", "y"),
        ("$a.b[0]", "x"),
        ("$a.b[7]", None),
        ("$none.b", None),
        ("$a.b.c", None),
        ("http://host/$n.jpg", "http://host/12.jpg"),
        ("plain", "plain"),
        ("$a.b.²", None),
        ("$a.b." + "9" * 5000, None),
    ],
)
def test_tag_values_are_resolved_with_the_tasks_data(template: str, value: Any) -> None:
    assert resolve_value(template, {"a": {"b": ["x", {"c": "y"}]}, "n": 12}) == value


def test_a_control_on_two_images_makes_two_targets() -> None:
    images = '<Image name="a" value="$one"/><Image name="b" value="$two.url"/>'
    two = make_plan('<RectangleLabels name="box" toName="a,b"><Label value="Cat"/></RectangleLabels>', images)
    targets = list_targets(two, {"one": "1.png", "two": {"url": "2.png"}})
    assert [(target.from_name, target.to_name, target.uri) for target in targets] == [
        ("box", "a", "1.png"),
        ("box", "b", "2.png"),
    ]


def test_a_rectangle_takes_its_labels_from_the_labels_tag() -> None:
    body = '<Rectangle name="rect" toName="img"/><Labels name="kinds" toName="img"><Label value="Cat"/></Labels>'
    (target,) = list_targets(make_plan(body), {"image": "x"})
    assert (target.from_name, target.labels_from_name, list_labels(target)) == ("rect", "kinds", [("Cat", ("cat",))])


def test_each_page_is_a_target() -> None:
    paged = make_plan(BOXES.format('<Label value="a"/>'), '<Image name="img" valueList="$pages"/>')
    assert [(target.uri, target.page) for target in list_targets(paged, {"pages": ["1.png", "2.png"]})] == [
        ("1.png", 0),
        ("2.png", 1),
    ]
    assert list_targets(paged, {"pages": []}) == []
    assert [target.uri for target in list_targets(paged, {})] == [""]


@pytest.mark.parametrize("flag", ["{{idx}}", "{{i}}"])
def test_a_repeater_makes_a_target_for_each_item(flag: str) -> None:
    repeated = make_plan(
        f'<Repeater on="$shots" indexFlag="{flag}"><Image name="i_{flag}" value="$shots[{flag}].url"/>'
        f'<RectangleLabels name="l_{flag}" toName="i_{flag}"><Label value="a"/></RectangleLabels></Repeater>',
        "",
    )
    data = {"shots": [{"url": "1.png"}, {"url": "2.png"}], "secret": 1}
    targets = list_targets(repeated, repeated.select_fields(data))
    assert [(target.from_name, target.to_name, target.uri) for target in targets] == [
        ("l_0", "i_0", "1.png"),
        ("l_1", "i_1", "2.png"),
    ]
    assert repeated.select_fields(data) == {"shots": data["shots"]}


def test_labels_of_the_task_are_added_to_those_of_the_config() -> None:
    dynamic = make_plan(
        '<RectangleLabels name="box" toName="img" value="$kinds"><Label value="Dog"/></RectangleLabels>'
    )
    data = {"image": "x", "kinds": [{"value": "BigCat"}, {"value": "Car", "alias": "c"}, "bus", {}, 7]}
    (target,) = list_targets(dynamic, data)
    expected = [("Dog", ("dog",)), ("BigCat", ("big cat",)), ("c", ("car",)), ("bus", ("bus",)), ("7", ("7",))]
    assert list_labels(target) == expected


def test_the_error_without_labels_says_what_is_missing() -> None:
    dynamic = make_plan('<RectangleLabels name="box" toName="img" value="$kinds"/>')
    with pytest.raises(LabelingConfigError, match=r"the task has no \$kinds"):
        list_targets(dynamic, {"image": "x"})
    with pytest.raises(LabelingConfigError, match="type phrases into 'prompt'"):
        list_targets(make_plan(BOXES.format("") + PROMPT), {"image": "x"})


def test_the_prompt_being_typed_wins_over_the_stored_one() -> None:
    with_prompt = make_plan(BOXES.format('<Label value="Cat"/>') + PROMPT)
    stored = {"annotations": [make_typed_result(["old"]), make_typed_result(["a dog. A Cat,", "x\ny"], 0.4)]}
    assert read_prompt(with_prompt, stored, None) == Prompt(("a dog", "a cat", "x", "y"), 0.4)
    assert read_prompt(with_prompt, stored, make_typed_result(["new"])) == Prompt(("new",), None)
    assert read_prompt(with_prompt, {"annotations": []}, {"result": []}) is None
    assert read_prompt(make_plan(BOXES.format('<Label value="Cat"/>')), stored, None) is None


@pytest.mark.parametrize("odd", [None, 7, {"result": 7}, {"result": [7, {"from_name": "prompt", "value": 7}]}])
def test_a_malformed_context_is_no_prompt(odd: Any) -> None:
    with_prompt = make_plan(BOXES.format('<Label value="Cat"/>') + PROMPT)
    assert read_prompt(with_prompt, {"annotations": odd}, odd) is None


def test_a_typed_phrase_gets_the_label_that_it_names_or_the_only_one_or_none() -> None:
    two = make_plan(
        BOXES.format('<Label value="BigCat"/><Label value="Vehicle" predicted_values="car, bus"/>') + PROMPT
    )
    (target,) = list_targets(two, {"image": "x"}, Prompt(("big cat", "bus", "tree"), 0.2))
    assert list_labels(target) == [("BigCat", ("big cat",)), ("Vehicle", ("bus",)), ("", ("tree",))]
    assert {label.threshold for label in target.query.labels} == {0.2}
    one = make_plan(BOXES.format('<Label value="Thing"/>') + PROMPT)
    assert list_labels(list_targets(one, {"image": "x"}, Prompt(("tree",), None))[0]) == [("Thing", ("tree",))]
    none = make_plan(BOXES.format("") + PROMPT)
    assert list_labels(list_targets(none, {"image": "x"}, Prompt(("tree",), None))[0]) == [("", ("tree",))]


def test_300_labels_make_one_target() -> None:
    many = make_plan(BOXES.format("".join(f'<Label value="thing {i}"/>' for i in range(300))))
    assert len(list_targets(many, {"image": "x"})[0].query.labels) == 300


@pytest.mark.parametrize("label", ["\ud800", "\ud800?", "a\ud800b"])
def test_phrases_of_a_task_are_unicode_text(label: str) -> None:
    dynamic = make_plan('<RectangleLabels name="box" toName="img" value="$kinds"/>')
    (target,) = list_targets(dynamic, {"image": "x", "kinds": [label]})
    for phrase in target.query.labels[0].phrases:
        assert phrase
        phrase.encode()
