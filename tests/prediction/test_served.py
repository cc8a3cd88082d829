"""The whole server, through HTTP only."""

import statistics
import time

import requests
from PIL import Image

from tests.scenes import compute_recall, encode, make_labeling_config, make_scenes, to_data_uri, to_pixel_box
from tests.servers import ServeProcess, http_server, send_reply


def predict(served: ServeProcess, tasks: list[dict], config: str) -> list[dict]:
    body = {"tasks": tasks, "label_config": config, "project": "1.1", "params": {"login": None, "context": None}}
    answer = requests.post(f"{served.url}/predict", json=body, timeout=100)
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def get_model_version(served: ServeProcess, config: str) -> str:
    return requests.post(f"{served.url}/setup", json={"project": "1.1", "schema": config}, timeout=3).json()[
        "model_version"
    ]


def test_rectangles_lie_on_the_shapes_with_the_right_labels(served: ServeProcess) -> None:
    drawn = make_scenes(20, (640, 480))
    config = make_labeling_config(drawn)
    results = predict(served, [{"id": i, "data": {"image": to_data_uri(s.image)}} for i, s in enumerate(drawn)], config)
    assert statistics.mean(compute_recall(r["result"], s) for r, s in zip(results, drawn, strict=True)) > 0.8
    assert {result["model_version"] for result in results} == {get_model_version(served, config)}
    assert all(0 <= result["score"] <= 1 for result in results)


def test_each_task_gets_one_answer_in_order_and_a_broken_image_fails_alone(served: ServeProcess) -> None:
    good = to_data_uri(make_scenes(1)[0].image)
    uris = [good, "data:image/png;base64,AAAA", good, None, "ftp://x", good] * 4
    results = predict(
        served, [{"id": i, "data": {"image": uri}} for i, uri in enumerate(uris)], make_labeling_config(make_scenes(1))
    )
    assert ["result" if "result" in result else result["error"]["code"] for result in results] == [
        "result", "image", "result", "image", "image", "result",
    ] * 4  # fmt: skip
    assert "ftp" not in served.read_log()


def test_an_image_without_objects_has_an_empty_result(served: ServeProcess) -> None:
    (result,) = predict(
        served,
        [{"id": 1, "data": {"image": to_data_uri(Image.new("RGB", (96, 96), "grey"))}}],
        make_labeling_config(make_scenes(1)),
    )
    assert result["result"] == []


def test_no_tasks_give_no_results(served: ServeProcess) -> None:
    assert predict(served, [], make_labeling_config(make_scenes(1))) == []


def test_the_same_task_twice_gives_the_same_answer(served: ServeProcess) -> None:
    task = {"id": 5, "data": {"image": to_data_uri(make_scenes(1)[0].image)}}
    assert predict(served, [task], make_labeling_config(make_scenes(1))) == predict(
        served, [task], make_labeling_config(make_scenes(1))
    )


def test_boxes_lie_on_the_image_as_its_exif_orientation_shows_it(served: ServeProcess) -> None:
    scene = make_scenes(1, (640, 480), seed=3)[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = scene.image.transpose(Image.Transpose.ROTATE_90)  # orientation 6 turns it back
    with http_server(lambda handler: send_reply(handler, encode(stored, "JPEG", quality=95, exif=exif))) as url:
        (result,) = predict(served, [{"id": 1, "data": {"image": f"{url}/a.jpg"}}], make_labeling_config([scene]))
    assert compute_recall(result["result"], scene) == 1
    assert {(r["original_width"], r["original_height"]) for r in result["result"]} == {(640, 480)}
    assert all(0 <= v <= 640 for r in result["result"] for v in to_pixel_box(r))


def test_regions_have_the_names_and_aliases_of_the_config(served: ServeProcess) -> None:
    scene = make_scenes(1)[0]
    shape = scene.shapes[0]
    config = (
        '<View><Image name="img" value="$photo.url"/><View><RectangleLabels name="r" toName="img">'
        f'<Label value="Thing" alias="thing-1" predicted_values="{shape.colour} {shape.shape}"/>'
        '</RectangleLabels></View><RectangleLabels name="skip" toName="img" model_skip="true">'
        '<Label value="red object"/></RectangleLabels></View>'
    )
    (result,) = predict(served, [{"id": 1, "data": {"photo": {"url": to_data_uri(scene.image)}}}], config)
    regions = result["result"]
    assert regions
    assert {(r["from_name"], r["to_name"], *r["value"]["rectanglelabels"]) for r in regions} == {
        ("r", "img", "thing-1")
    }


def test_health_and_setup_are_quick_while_the_worker_is_busy(served: ServeProcess) -> None:
    import threading

    config, uri = make_labeling_config(make_scenes(1)), to_data_uri(make_scenes(1, (640, 480))[0].image)
    tasks = [{"id": i, "data": {"image": uri}} for i in range(64)]
    bulk = threading.Thread(target=predict, args=(served, tasks, config))
    bulk.start()
    slowest = 0.0
    while bulk.is_alive():
        start = time.monotonic()
        assert requests.get(f"{served.url}/health", timeout=1).ok
        get_model_version(served, config)
        slowest = max(slowest, time.monotonic() - start)
    bulk.join()
    assert slowest < 0.5


def test_every_form_of_config_gets_its_regions(served: ServeProcess) -> None:
    drawn = make_scenes(2, (320, 240), seed=3)
    uris = [to_data_uri(scene.image) for scene in drawn]
    label_tags = "".join(f'<Label value="{s.colour} {s.shape}"/>' for scene in drawn for s in scene.shapes)
    pages = (
        '<View><Image name="i" valueList="$pages"/>'
        f'<RectangleLabels name="l" toName="i">{label_tags}</RectangleLabels></View>'
    )
    (paged,) = predict(served, [{"id": 1, "data": {"pages": uris}}], pages)
    for number, scene in enumerate(drawn):
        assert compute_recall([r for r in paged["result"] if r["item_index"] == number], scene) > 0.6
    pair = (
        '<View><Image name="i" value="$image"/><Rectangle name="r" toName="i"/>'
        f'<Labels name="l" toName="i">{label_tags}</Labels></View>'
    )
    (paired,) = predict(served, [{"id": 2, "data": {"image": uris[0]}}], pair)
    assert [r["type"] for r in paired["result"]] == ["rectangle", "labels"] * (len(paired["result"]) // 2)
    dynamic = '<View><Image name="i" value="$image"/><RectangleLabels name="l" toName="i" value="$kinds"/></View>'
    tasks = [
        {"id": 3 + i, "data": {"image": uri, "kinds": [{"value": f"{s.colour} {s.shape}"} for s in scene.shapes]}}
        for i, (uri, scene) in enumerate(zip(uris, drawn, strict=True))
    ]
    results = predict(served, [*tasks, {"id": 9, "data": {"image": uris[0]}}], dynamic)
    assert all(compute_recall(r["result"], scene) > 0.6 for r, scene in zip(results, drawn, strict=False))
    assert results[2]["error"]["code"] == "labeling_config"


def test_an_annotator_types_phrases_to_detect(served: ServeProcess) -> None:
    scene = make_scenes(1, (320, 240), seed=3)[0]
    config = (
        '<View><Image name="i" value="$image"/><RectangleLabels name="l" toName="i"><Label value="Thing"/>'
        '</RectangleLabels><TextArea name="prompt" toName="i"/></View>'
    )
    phrases = ", ".join(f"{s.colour} {s.shape}" for s in scene.shapes)
    typed = {"from_name": "prompt", "to_name": "i", "type": "textarea", "value": {"text": [phrases]}}
    body = {"tasks": [{"id": 1, "data": {"image": to_data_uri(scene.image)}}], "label_config": config, "project": "1.1"}
    body["params"] = {"context": {"result": [typed]}}
    (result,) = requests.post(f"{served.url}/predict", json=body, timeout=60).json()["results"]
    assert len(result["result"]) >= len(scene.shapes) - 1 > 0
    assert {tuple(region["value"]["rectanglelabels"]) for region in result["result"]} == {("Thing",)}


def test_an_annotation_event_is_acknowledged_within_50_ms(served: ServeProcess) -> None:
    annotation = {"id": 1, "task": 1, "updated_at": "2026", "result": [{"id": str(i)} for i in range(100)]}
    times = []
    for number in range(30):
        body = {"action": "ANNOTATION_CREATED", "annotation": {**annotation, "id": number}, "project": {"id": 5}}
        start = time.perf_counter()
        assert requests.post(f"{served.url}/webhook", json=body, timeout=5).json() == {"status": "recorded"}
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 0.05
