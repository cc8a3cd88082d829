import json
from typing import Any

import pytest
from pydantic import TypeAdapter

from backend.errors import LabelingConfigError
from backend.labelstudio.labeling_config import Plan, read_plan
from backend.labelstudio.targets import ImageTarget, Prompt, read_prompt, resolve_value
from backend.labelstudio.targets import expand_targets as lazily

BOXES = '<RectangleLabels name="box" toName="img">{}</RectangleLabels>'
PROMPT = '<TextArea name="prompt" toName="img"/><Number name="box_threshold" toName="img"/>'


def views(*arguments: Any) -> list[ImageTarget]:
    return list(lazily(*arguments))


def plan(body: str, image: str = '<Image name="img" value="$image"/>') -> Plan:
    found = read_plan(f"<View>{image}{body}</View>", 0.3, 0.7)
    assert TypeAdapter(Plan).validate_python(json.loads(json.dumps(found.payload))) == found
    return found


def labels(view: ImageTarget) -> list[tuple[str, tuple[str, ...]]]:
    return [(label.name, label.phrases) for label in view.query.labels]


def typed(text: list[str], number: float | None = None) -> dict[str, Any]:
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
def test_values_as_configs_have_them(template: str, value: Any) -> None:
    assert resolve_value(template, {"a": {"b": ["x", {"c": "y"}]}, "n": 12}) == value


def test_one_control_on_two_pictures() -> None:
    images = '<Image name="a" value="$one"/><Image name="b" value="$two.url"/>'
    two = plan('<RectangleLabels name="box" toName="a,b"><Label value="Cat"/></RectangleLabels>', images)
    found = views(two, {"one": "1.png", "two": {"url": "2.png"}})
    assert [(view.from_name, view.to_name, view.uri) for view in found] == [
        ("box", "a", "1.png"),
        ("box", "b", "2.png"),
    ]


def test_a_rectangle_takes_the_labels_beside_it() -> None:
    body = '<Rectangle name="rect" toName="img"/><Labels name="kinds" toName="img"><Label value="Cat"/></Labels>'
    (view,) = views(plan(body), {"image": "x"})
    assert (view.from_name, view.labels_from_name, labels(view)) == ("rect", "kinds", [("Cat", ("cat",))])


def test_pages() -> None:
    paged = plan(BOXES.format('<Label value="a"/>'), '<Image name="img" valueList="$pages"/>')
    assert [(view.uri, view.page) for view in views(paged, {"pages": ["1.png", "2.png"]})] == [
        ("1.png", 0),
        ("2.png", 1),
    ]
    assert views(paged, {"pages": []}) == []
    assert [view.uri for view in views(paged, {})] == [""]


@pytest.mark.parametrize("flag", ["{{idx}}", "{{i}}"])
def test_a_repeater_makes_a_control_for_each_item(flag: str) -> None:
    repeated = plan(
        f'<Repeater on="$shots" indexFlag="{flag}"><Image name="i_{flag}" value="$shots[{flag}].url"/>'
        f'<RectangleLabels name="l_{flag}" toName="i_{flag}"><Label value="a"/></RectangleLabels></Repeater>',
        "",
    )
    data = {"shots": [{"url": "1.png"}, {"url": "2.png"}], "secret": 1}
    found = views(repeated, repeated.select_fields(data))
    assert [(view.from_name, view.to_name, view.uri) for view in found] == [
        ("l_0", "i_0", "1.png"),
        ("l_1", "i_1", "2.png"),
    ]
    assert repeated.select_fields(data) == {"shots": data["shots"]}


def test_labels_that_come_with_the_task() -> None:
    dynamic = plan('<RectangleLabels name="box" toName="img" value="$kinds"><Label value="Dog"/></RectangleLabels>')
    data = {"image": "x", "kinds": [{"value": "BigCat"}, {"value": "Car", "alias": "c"}, "bus", {}, 7]}
    (view,) = views(dynamic, data)
    expected = [("Dog", ("dog",)), ("BigCat", ("big cat",)), ("c", ("car",)), ("bus", ("bus",)), ("7", ("7",))]
    assert labels(view) == expected


def test_no_labels_at_all_say_what_is_missing() -> None:
    dynamic = plan('<RectangleLabels name="box" toName="img" value="$kinds"/>')
    with pytest.raises(LabelingConfigError, match=r"the task has no \$kinds"):
        views(dynamic, {"image": "x"})
    with pytest.raises(LabelingConfigError, match="type phrases into 'prompt'"):
        views(plan(BOXES.format("") + PROMPT), {"image": "x"})


def test_what_is_being_typed_goes_before_what_is_stored() -> None:
    asking = plan(BOXES.format('<Label value="Cat"/>') + PROMPT)
    stored = {"annotations": [typed(["old"]), typed(["a dog. A Cat,", "x\ny"], 0.4)]}
    assert read_prompt(asking, stored, None) == Prompt(("a dog", "a cat", "x", "y"), 0.4)
    assert read_prompt(asking, stored, typed(["new"])) == Prompt(("new",), None)
    assert read_prompt(asking, {"annotations": []}, {"result": []}) is None
    assert read_prompt(plan(BOXES.format('<Label value="Cat"/>')), stored, None) is None


@pytest.mark.parametrize("odd", [None, 7, {"result": 7}, {"result": [7, {"from_name": "prompt", "value": 7}]}])
def test_an_odd_context_is_no_prompt(odd: Any) -> None:
    asking = plan(BOXES.format('<Label value="Cat"/>') + PROMPT)
    assert read_prompt(asking, {"annotations": odd}, odd) is None


def test_a_phrase_gets_the_label_it_means_or_the_only_one_or_none() -> None:
    two = plan(BOXES.format('<Label value="BigCat"/><Label value="Vehicle" predicted_values="car, bus"/>') + PROMPT)
    (view,) = views(two, {"image": "x"}, Prompt(("big cat", "bus", "tree"), 0.2))
    assert labels(view) == [("BigCat", ("big cat",)), ("Vehicle", ("bus",)), ("", ("tree",))]
    assert {label.threshold for label in view.query.labels} == {0.2}
    one = plan(BOXES.format('<Label value="Thing"/>') + PROMPT)
    assert labels(views(one, {"image": "x"}, Prompt(("tree",), None))[0]) == [("Thing", ("tree",))]
    none = plan(BOXES.format("") + PROMPT)
    assert labels(views(none, {"image": "x"}, Prompt(("tree",), None))[0]) == [("", ("tree",))]


def test_300_labels() -> None:
    many = plan(BOXES.format("".join(f'<Label value="thing {i}"/>' for i in range(300))))
    assert len(views(many, {"image": "x"})[0].query.labels) == 300
