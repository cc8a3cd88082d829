from typing import Any

import pytest

from backend.labelstudio.labeling_config import read_plan
from backend.training.dataset import choose_split, fingerprint_examples, read_examples

CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    '<Label value="cat"/><Label value="dog" alias="d"/></RectangleLabels></View>'
)
PAIR = (
    '<View><Image name="image" value="$image"/><Rectangle name="box" toName="image"/>'
    '<Labels name="label" toName="image"><Label value="cat"/></Labels></View>'
)
PAGES = CONFIG.replace('value="$image"', 'valueList="$image"')


def make_region(label: str = "cat", **more: Any) -> dict[str, Any]:
    value = {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0, "rectanglelabels": [label] if label else []}
    value |= more.pop("value", {})
    return {"from_name": "label", "to_name": "image", "type": "rectanglelabels", "value": value, **more}


def make_task(*annotations: dict[str, Any], image: Any = "http://x/a.png") -> dict[str, Any]:
    return {"id": 7, "data": {"image": image}, "annotations": list(annotations)}


def read_tasks(tasks: list[dict[str, Any]], config: str = CONFIG) -> Any:
    return read_examples(read_plan(config, 0.3, 0.7), "1", tasks)


def test_boxes_are_normalised_by_the_size_of_the_image() -> None:
    (example,), left_out = read_tasks([make_task({"result": [make_region(), make_region("d")]})])
    box = (0.1, 0.2, pytest.approx(0.4), pytest.approx(0.6))
    assert example.truth == ((box, "cat"), (box, "d"))
    assert (example.task, example.target.uri, left_out) == (7, "http://x/a.png", {})


def test_an_empty_annotation_makes_an_example_without_boxes() -> None:
    (example,), _ = read_tasks([make_task({"result": []})])
    assert example.truth == ()


CAT, DOG = {"result": [make_region("cat")], "updated_at": "1"}, {"result": [make_region("d")], "updated_at": "2"}


@pytest.mark.parametrize(
    ("annotations", "label"),
    [([CAT, DOG], "d"), ([{**CAT, "ground_truth": True}, DOG], "cat"), ([CAT, {**DOG, "was_cancelled": True}], "cat")],
    ids=["last", "ground truth", "not skipped"],
)
def test_one_annotation_of_a_task_counts(annotations: list[dict[str, Any]], label: str) -> None:
    (example,), _ = read_tasks([make_task(*annotations)])
    assert [name for _, name in example.truth] == [label]


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ({"result": [make_region()], "was_cancelled": True}, "tasks that were skipped"),
        ({"result": [make_region(), make_region(value={"rotation": 5})]}, "tasks with rotated boxes"),
        ({"result": [make_region(), make_region("")]}, "tasks with boxes without a label"),
        ({"result": [make_region(value={"width": "wide"})]}, "tasks with boxes that cannot be read"),
        ({"result": [make_region(value={"width": 0})]}, "tasks with boxes that cannot be read"),
        ({"result": [make_region(value={"x": float("nan")})]}, "tasks with boxes that cannot be read"),
    ],
)
def test_an_unusable_task_is_left_out_and_counted(annotation: dict[str, Any], reason: str) -> None:
    examples, left_out = read_tasks([make_task(annotation)])
    assert (examples, left_out) == ([], {reason: 1})


def test_a_box_with_an_unknown_label_is_left_out_alone() -> None:
    (example,), left_out = read_tasks([make_task({"result": [make_region("cow"), make_region("cat")]})])
    assert [label for _, label in example.truth] == ["cat"]
    assert left_out == {"boxes whose label is not in the labeling config": 1}


def test_regions_of_other_controls_are_ignored() -> None:
    (example,), left_out = read_tasks(
        [make_task({"result": [{"from_name": "other", "type": "choices"}, "odd", make_region()]})]
    )
    assert (len(example.truth), left_out) == (1, {})


def test_a_rectangle_gets_the_label_of_its_labels_region() -> None:
    shape = make_region(from_name="box", type="rectangle", id="a")
    label = make_region(type="labels", id="a", value={"labels": ["cat"]})
    (example,), _ = read_tasks([make_task({"result": [shape, label]})], PAIR)
    assert [name for _, name in example.truth] == ["cat"]


def test_each_page_has_its_own_boxes() -> None:
    pages = make_task(
        {"result": [make_region(item_index=1), make_region("d", item_index=1)]}, image=["http://x/0", "http://x/1"]
    )
    examples, _ = read_tasks([pages], PAGES)
    assert [(e.target.uri, len(e.truth)) for e in examples] == [("http://x/0", 0), ("http://x/1", 2)]


def test_splits_have_their_shares_and_never_change() -> None:
    splits = [choose_split("1", number) for number in range(4000)]
    shares = {split: splits.count(split) / 4000 for split in ("train", "validation", "held_out")}
    assert shares == {
        "train": pytest.approx(0.65, abs=0.03),
        "validation": pytest.approx(0.15, abs=0.03),
        "held_out": pytest.approx(0.2, abs=0.03),
    }
    assert splits == [choose_split("1", number) for number in range(4000)]
    assert splits != [choose_split("2", number) for number in range(4000)]


def test_a_malformed_task_is_left_out_alone() -> None:
    malformed = [
        make_task({"result": [{**make_region(), "value": [1]}]}),
        make_task({"result": [make_region(value={"rectanglelabels": [["cat"]]})]}),
    ]
    examples, left_out = read_tasks([*malformed, make_task({"result": [make_region()]})])
    assert (len(examples), left_out) == (1, {"tasks that cannot be read": 2})


def test_a_rectangle_without_a_labels_region_is_left_out() -> None:
    shape, label = (
        make_region(from_name="box", type="rectangle", id="a"),
        make_region(type="labels", id="b", value={"labels": ["cat"]}),
    )
    assert read_tasks([make_task({"result": [shape, label]})], PAIR) == ([], {"tasks with boxes without a label": 1})


def test_the_fingerprint_depends_on_the_examples_and_not_on_their_order() -> None:
    one, two = make_task({"result": [make_region()]}), {**make_task({"result": []}), "id": 8}
    assert (
        fingerprint_examples(read_tasks([one, two])[0])
        == fingerprint_examples(read_tasks([two, one])[0])
        != fingerprint_examples(read_tasks([one])[0])
    )


def test_10000_boxes_in_one_task_are_read() -> None:
    (example,), _ = read_tasks([make_task({"result": [make_region()] * 10_000})])
    assert len(example.truth) == 10_000
