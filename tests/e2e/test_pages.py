"""The status page and the playground in a real browser, before a real server."""

import base64
import contextlib
import random
from collections.abc import Callable, Iterator

import pytest
import requests
from playwright.sync_api import Browser, Page, expect

from backend.boxes import Detection
from backend.delivery.failures import Failure, Failures
from backend.labelstudio.labeling_config import read_plan
from backend.labelstudio.regions import read_label
from backend.monitoring.activity import BulkProgress
from backend.queue.live_workers import READY_KEY, describe_worker, save_heartbeat
from backend.queue.pauses import PAUSED_BULK_KEY, Pauses
from backend.queue.redis import connect
from backend.queue.training_queue import TrainingQueue
from tests.boxes import suppress_greedily
from tests.e2e.browser import open_browser, save_screenshot
from tests.scenes import encode, make_labeling_config, make_scenes, to_data_uri
from tests.servers import ServeProcess

DRAWN = make_scenes(3, (640, 480), seed=23)
CONFIG = make_labeling_config(DRAWN)
DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}
DROP = """([selector, body]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([Uint8Array.from(atob(body), (c) => c.charCodeAt(0))], "a.png", { type: "image/png" }));
  const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
  document.querySelector(selector).dispatchEvent(new DragEvent("drop", options));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser, served: ServeProcess) -> Iterator[Callable[..., Page]]:
    """Opens pages; at the end there must be no error in them and no request to another host."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    errors: list[str] = []
    urls: list[str] = []

    def open_(path: str, size: dict[str, int] = DESKTOP) -> Page:
        page = context.new_page()
        page.set_viewport_size(size)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(f"a script ran: {dialog.message}"))
        page.on("request", lambda request: urls.append(request.url))
        page.goto(served.url + path)
        return page

    yield open_
    context.close()
    assert [text for text in errors if "status of 422" not in text] == []  # which a test provokes
    assert [url for url in urls if not url.startswith((served.url, "data:", "blob:"))] == []


def drop(page: Page, image: bytes) -> None:
    page.evaluate(DROP, ["#drop", base64.b64encode(image).decode()])


def fill_config(page: Page, config: str) -> None:
    page.get_by_role("tab", name="Labeling config").click()
    page.get_by_role("textbox", name="Labeling config", exact=True).fill(config)


def read_tags(page: Page) -> list[str]:
    return sorted(page.locator("#frame .tag").all_inner_texts())


def predict_tags(served: ServeProcess, config: str, number: int) -> list[str]:
    """Returns the tags that the playground must show: label and score of each box that `/predict` answers."""
    data = dict.fromkeys(("image", "other"), to_data_uri(DRAWN[number].image))
    body = {"tasks": [{"id": 1, "data": data}], "label_config": config}
    result = requests.post(f"{served.url}/predict", json=body, timeout=60).json()["results"][0]["result"]
    return sorted(f"{read_label(region)} {region['score']:.2f}" for region in result if read_label(region))


def make_labels(*phrases: str) -> str:
    return "".join(f'<Label value="{phrase}"/>' for phrase in phrases)


DRAWN_PHRASES = [f"{shape.colour} {shape.shape}" for shape in DRAWN[0].shapes]
IMAGE = '<Image name="image" value="$image"/>'
OTHER = '<Image name="other" value="$other"/>'
RIVALS = make_labels("red ring", "circle", "square", "star", "shape")
CONFIGS = {
    "plain": CONFIG,
    "rivals and negatives": f"<View>{IMAGE}<RectangleLabels name='a' toName='image' model_negative_values='ring, "
    f"square'>{RIVALS}{make_labels(*DRAWN_PHRASES)}</RectangleLabels></View>",
    "Rectangle and Labels": f"<View>{IMAGE}<Rectangle name='r' toName='image'/><Labels name='l' toName='image'>"
    f"{make_labels(*DRAWN_PHRASES)}</Labels></View>",
    "two controls": f"<View>{IMAGE}<RectangleLabels name='a' toName='image'>{RIVALS}</RectangleLabels>"
    f"<RectangleLabels name='b' toName='image'>{make_labels(*DRAWN_PHRASES)}</RectangleLabels></View>",
    "one alias twice": f"<View>{IMAGE}<RectangleLabels name='a' toName='image'>"
    "<Label value='one' alias='v' predicted_values='square' model_score_threshold='0.5'/>"
    "<Label value='two' alias='v' predicted_values='star, circle' model_score_threshold='0.1'/>"
    "</RectangleLabels></View>",
    "below the lowest": f"<View>{IMAGE}<RectangleLabels name='a' toName='image' model_score_threshold='0.02'>{RIVALS}"
    "</RectangleLabels></View>",
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_dropped_image_shows_what_predict_answers_at_every_threshold(
    open_page: Callable[..., Page], served: ServeProcess, config: str
) -> None:
    page = open_page("/playground")
    fill_config(page, config)
    drop(page, encode(DRAWN[0].image))
    expect(page.locator("#results")).to_be_visible()
    assert read_tags(page) == predict_tags(served, config, 0) != []
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    sliders = page.locator("#sliders input")
    for threshold in (0.06, 0.2, 0.6):
        page.locator("#all").fill(str(threshold))
        for number in range(0, sliders.count(), 2):  # every second slider has another value
            sliders.nth(number).fill(str(threshold + 0.05))
        assert read_tags(page) == predict_tags(served, page.locator("#result").input_value(), 0)
    assert [url for url in urls if "look" in url] == []  # no further forward pass


def test_the_copied_config_has_the_thresholds_of_the_sliders(open_page: Callable[..., Page]) -> None:
    page = open_page("/playground")
    page.get_by_role("button", name="sample 1").click()
    expect(page.locator("#results")).to_be_visible()
    slider = page.get_by_label("threshold of star")
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    save_screenshot(page, "playground")
    page.get_by_role("button", name="Copy the labeling config").click()
    expect(page.locator("#copied")).to_have_text("copied")
    plan = read_plan(page.evaluate("navigator.clipboard.readText()"), 0.9, 0.7)
    labels = {label.name: (label.threshold, label.phrases) for label in plan.controls[0].labels}
    assert labels == {
        "ring": (0.3, ("ring",)),
        "star": (0.35, ("star",)),
        "Square": (0.3, ("purple square", "blue square")),
    }


def test_mistakes_are_reported_and_can_be_corrected(open_page: Callable[..., Page]) -> None:
    page = open_page("/playground")
    page.get_by_role("button", name="Detect", exact=True).click()
    expect(page.get_by_role("alert")).to_have_text("Choose an image first.")
    drop(page, b"this is no image")
    expect(page.get_by_role("alert")).to_contain_text("not a supported image")
    drop(page, encode(DRAWN[1].image))
    expect(page.locator("#results")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()
    fill_config(page, "<View><Image/>")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("not valid XML")


def test_the_keyboard_suffices(open_page: Callable[..., Page]) -> None:
    page = open_page("/playground")
    page.on("filechooser", lambda chooser: None)  # registered early, so that the browser hands the chooser to us
    for _ in range(4):  # two links, the image, the first sample
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#results")).to_be_visible()
    page.get_by_role("tab", name="Phrases").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("textbox", name="Labeling config", exact=True)).to_be_visible()
    page.locator("#drop").focus()
    with page.expect_file_chooser():
        page.keyboard.press("Enter")


def test_boxes_are_filtered_as_the_detector_does(open_page: Callable[..., Page]) -> None:
    rng, page = random.Random(3), open_page("/playground")
    for _ in range(30):
        detections = [
            Detection((x, y, x + rng.uniform(1, 40), y + rng.uniform(1, 40)), rng.random(), rng.choice("abc"))
            for x, y in ((rng.uniform(0, 60), rng.uniform(0, 60)) for _ in range(40))
        ]
        thresholds = {label: rng.random() for label in "ab"} | {"c": 0.2}
        kept = [row for row in detections if row.score >= thresholds[row.label]]
        expected = [row.score for row in suppress_greedily(kept, 0.5) if row.label != "c"]
        rows = [
            {"control": "k", "place": None if d.label == "c" else d.label, "score": d.score}
            | dict(zip(("x", "y"), d.box_xyxy[:2], strict=True))
            | {"width": d.box_xyxy[2] - d.box_xyxy[0], "height": d.box_xyxy[3] - d.box_xyxy[1]}
            for d in detections
        ]
        script = """async ([rows, thresholds]) => {
          const { filterBoxes } = await import("./pages/boxes.js");
          return filterBoxes(rows, (control, place) => thresholds[place ?? "c"], 0.5).map((row) => row.score);
        }"""
        assert page.evaluate(script, [rows, thresholds]) == expected


def test_the_status_page_updates_without_a_reload(open_page: Callable[..., Page], served: ServeProcess) -> None:
    markup = '<img src=x onerror="alert(1)">'
    escaped = markup.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    config = CONFIG.replace("</RectangleLabels>", f'<Label value="{escaped}"/></RectangleLabels>')
    page = open_page("/")
    expect(page.locator("#workers")).to_contain_text("alive")
    requests.post(f"{served.url}/setup", json={"project": "51.1", "schema": config}, timeout=10)
    tasks = [{"id": 900 + i, "data": {"image": to_data_uri(scene.image)}} for i, scene in enumerate(DRAWN)]
    tasks.append({"id": 999, "data": {"image": "http://127.0.0.1:1/gone.png"}})
    body = {"tasks": tasks, "label_config": config, "project": "51.1"}
    requests.post(f"{served.url}/predict", json=body, timeout=60)
    expect(page.locator("#projects")).to_contain_text("project 51", timeout=10_000)
    expect(page.locator("#projects")).to_contain_text(markup)  # as text
    expect(page.locator("#failures")).to_contain_text("could not be fetched")
    expect(page.locator("#images figure").first).to_be_visible()
    connection = connect((served.model_dir / "redis.url").read_text())
    TrainingQueue(connection).report("51", "training", done=2, of=8)
    with contextlib.closing(BulkProgress(connection, "x", "label, 40 images")) as bulk:
        bulk.report(10, 1, 40)
        expect(page.locator("#running")).to_contain_text("fine-tuning 2 of 8")
        expect(page.locator("#running")).to_contain_text("label, 40 images10 of 40, 1 failed")
        save_screenshot(page, "status-odd-label")
    TrainingQueue(connection).report("51", "done", text="no significant gain")
    expect(page.locator("#running")).to_contain_text("no significant gain")
    expect(page.locator("#running")).not_to_contain_text("label, 40 images")
    page.get_by_role("link", name="try it in the playground").first.click()
    expect(page.get_by_role("textbox", name="Labeling config", exact=True)).to_have_value(config)


def test_the_status_page_says_what_needs_attention(open_page: Callable[..., Page], served: ServeProcess) -> None:
    connection = connect((served.model_dir / "redis.url").read_text())
    page = open_page("/")
    expect(page.locator("#workers")).to_contain_text("alive")
    expect(page.get_by_role("heading", name="Needs attention")).to_be_hidden()
    Pauses(connection, PAUSED_BULK_KEY).pause("61", "storage.example answered HTTP 503 instead of the image")
    Failures(connection).record("62", [Failure(7, "image", "the image is damaged", 0, "v")])
    save_heartbeat(connection, READY_KEY, "odd-one", describe_worker("cuda:0", "other/model", "another", 8))
    trouble = page.locator("#trouble")
    expect(trouble).to_contain_text("bulk prediction of project 61 pauses", timeout=10_000)
    expect(trouble).to_contain_text("storage.example answered HTTP 503")
    expect(trouble).to_contain_text("1 task of project 62 given up")
    expect(trouble).to_contain_text("worker odd-one serves another model")
    save_screenshot(page, "status-trouble")
    Pauses(connection, PAUSED_BULK_KEY).resume("61")
    Failures(connection).remove("62", [7])
    connection.delete(READY_KEY + "odd-one")
    expect(page.get_by_role("heading", name="Needs attention")).to_be_hidden(timeout=10_000)


@pytest.mark.parametrize("path", ["/", "/playground"])
def test_a_phone_shows_the_whole_page(open_page: Callable[..., Page], path: str) -> None:
    page = open_page(path, PHONE)
    if path == "/playground":
        page.get_by_role("button", name="sample 2").click()
        expect(page.locator("#results")).to_be_visible()
    else:
        expect(page.locator("#workers")).to_contain_text("alive")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    save_screenshot(page, f"phone{path.replace('/', '-')}")
