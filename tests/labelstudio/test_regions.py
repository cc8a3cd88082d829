import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.boxes import Detection
from backend.labelstudio.regions import make_prediction, make_regions
from backend.labelstudio.targets import DetectionQuery, ImageTarget

QUERY = DetectionQuery((), (), 1)
TARGET = ImageTarget("label", "image", "", "", None, QUERY)
sizes = st.integers(1, 20_000)
edges = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


@given(edges, edges, sizes, sizes)
def test_every_region_lies_inside_the_image(xs: list[float], ys: list[float], width: int, height: int) -> None:
    detection = Detection((xs[0] * width, ys[0] * height, xs[1] * width, ys[1] * height), 0.5, "a")
    for region in make_regions([detection], TARGET, width, height, "1"):
        value = region["value"]
        assert 0 <= value["x"] <= 100
        assert 0 <= value["y"] <= 100
        assert 0 < value["width"] <= 100 - value["x"] + 1e-9
        assert 0 < value["height"] <= 100 - value["y"] + 1e-9


def test_a_region_has_all_fields_of_label_studio() -> None:
    (region,) = make_regions([Detection((10, 20, 60, 45), 0.87654321, "cat")], TARGET, 200, 100, "7/v")
    assert region.pop("id")
    assert region == {
        "from_name": "label",
        "to_name": "image",
        "type": "rectanglelabels",
        "original_width": 200,
        "original_height": 100,
        "image_rotation": 0,
        "score": 0.8765,
        "value": {"x": 5, "y": 20, "width": 25, "height": 25, "rotation": 0, "rectanglelabels": ["cat"]},
    }


def test_ids_are_unique_and_reproducible() -> None:
    detections = [Detection((0, 0, 5, 5), 0.5, "a")] * 3
    ids = [region["id"] for region in make_regions(detections, TARGET, 9, 9, "1/v")]
    assert len(set(ids)) == 3
    assert ids == [region["id"] for region in make_regions(detections, TARGET, 9, 9, "1/v")]
    assert not set(ids) & {region["id"] for region in make_regions(detections, TARGET, 9, 9, "2/v")}


def test_a_prediction_carries_version_and_mean_score() -> None:
    regions = make_regions([Detection((0, 0, 5, 5), s, "a") for s in (0.4, 0.8)], TARGET, 9, 9, "1")
    prediction = make_prediction([regions[:1], regions[1:]], "v1")
    assert prediction == {"result": regions, "score": pytest.approx(0.6), "model_version": "v1"}
    assert make_prediction([[]], "v1") == {"result": [], "score": 0.0, "model_version": "v1"}


def test_a_rectangle_with_labels_is_two_regions_with_one_id() -> None:
    target = ImageTarget("rect", "image", "kinds", "", None, QUERY)
    shape, label = make_regions([Detection((10, 20, 60, 45), 0.9, "cat")], target, 200, 100, "7/v")
    assert shape["id"] == label["id"]
    assert (shape["from_name"], shape["type"]) == ("rect", "rectangle")
    assert (label["from_name"], label["type"]) == ("kinds", "labels")
    assert label["value"] == {**shape["value"], "labels": ["cat"]}
    (alone,) = make_regions([Detection((10, 20, 60, 45), 0.9, "")], target, 200, 100, "7/v")
    assert alone["type"] == "rectangle"


def test_a_region_holds_the_index_of_its_page() -> None:
    pages = [ImageTarget("label", "image", "", "", page, QUERY) for page in (0, 1)]
    regions = [make_regions([Detection((0, 0, 5, 5), 0.9, "")], target, 9, 9, "7/v")[0] for target in pages]
    assert [region["item_index"] for region in regions] == [0, 1]
    assert regions[0]["id"] != regions[1]["id"]
    assert regions[0]["value"]["rectanglelabels"] == []  # for the annotator to choose
