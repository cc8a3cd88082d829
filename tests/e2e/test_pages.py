"""The status page and the playground in a real browser, before a real server."""

import base64
import contextlib
import random
from collections.abc import Callable, Iterator

import pytest
import requests
from playwright.sync_api import Browser, Page, expect

from backend.boxes import Detection, non_max_suppression
from backend.labelstudio.labeling_config import read_plan
from backend.labelstudio.regions import read_label
from backend.monitoring.activity import BulkProgress
from backend.queue.redis import connect
from backend.queue.training_queue import TrainingQueue
from tests.e2e.browser import open_browser, screenshot
from tests.scenes import config_for, data_uri, encode, scenes
from tests.servers import Served

DRAWN = scenes(3, (640, 480), seed=23)
CONFIG = config_for(DRAWN)
ENQUEUE_SLOTS, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}
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
def open_page(browser: Browser, served: Served) -> Iterator[Callable[..., Page]]:
    """Opens pages in which nothing may go wrong, and which may ask no other host."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    said: list[str] = []
    asked: list[str] = []

    def open_(path: str, size: dict[str, int] = ENQUEUE_SLOTS) -> Page:
        page = context.new_page()
        page.set_viewport_size(size)
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"a script ran: {dialog.message}"))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served.url + path)
        return page

    yield open_
    context.close()
    assert [text for text in said if "status of 422" not in text] == []  # which a test asks for
    assert [url for url in asked if not url.startswith((served.url, "data:", "blob:"))] == []


def drop(page: Page, picture: bytes) -> None:
    page.evaluate(DROP, ["#drop", base64.b64encode(picture).decode()])


def ask(page: Page, config: str) -> None:
    page.get_by_role("tab", name="Labeling config").click()
    page.get_by_role("textbox", name="Labeling config", exact=True).fill(config)


def tags(page: Page) -> list[str]:
    return sorted(page.locator("#frame .tag").all_inner_texts())


def predicted(served: Served, config: str, number: int) -> list[str]:
    """What the playground is to show: label and score of each box that `/predict` answers."""
    data = dict.fromkeys(("image", "other"), data_uri(DRAWN[number].image))
    body = {"tasks": [{"id": 1, "data": data}], "label_config": config}
    result = requests.post(f"{served.url}/predict", json=body, timeout=60).json()["results"][0]["result"]
    return sorted(f"{read_label(region)} {region['score']:.2f}" for region in result if read_label(region))


def labels(*phrases: str) -> str:
    return "".join(f'<Label value="{phrase}"/>' for phrase in phrases)


FOUND = [f"{shape.colour} {shape.shape}" for shape in DRAWN[0].shapes]
IMAGE = '<Image name="image" value="$image"/>'
OTHER = '<Image name="other" value="$other"/>'
RIVALS = labels("red ring", "circle", "square", "star", "shape")
CONFIGS = {
    "plain": CONFIG,
    "rivals and negatives": f"<View>{IMAGE}<RectangleLabels name='a' toName='image' model_negative_values='ring, "
    f"square'>{RIVALS}{labels(*FOUND)}</RectangleLabels></View>",
    "Rectangle and Labels": f"<View>{IMAGE}<Rectangle name='r' toName='image'/><Labels name='l' toName='image'>"
    f"{labels(*FOUND)}</Labels></View>",
    "two controls": f"<View>{IMAGE}<RectangleLabels name='a' toName='image'>{RIVALS}</RectangleLabels>"
    f"<RectangleLabels name='b' toName='image'>{labels(*FOUND)}</RectangleLabels></View>",
    "one alias twice": f"<View>{IMAGE}<RectangleLabels name='a' toName='image'>"
    "<Label value='one' alias='v' predicted_values='square' model_score_threshold='0.5'/>"
    "<Label value='two' alias='v' predicted_values='star, circle' model_score_threshold='0.1'/>"
    "</RectangleLabels></View>",
    "below the lowest": f"<View>{IMAGE}<RectangleLabels name='a' toName='image' model_score_threshold='0.02'>{RIVALS}"
    "</RectangleLabels></View>",
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_dropped_picture_shows_what_predict_answers_at_every_threshold(
    open_page: Callable[..., Page], served: Served, config: str
) -> None:
    page = open_page("/playground")
    ask(page, config)
    drop(page, encode(DRAWN[0].image))
    expect(page.locator("#results")).to_be_visible()
    assert tags(page) == predicted(served, config, 0) != []
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    sliders = page.locator("#sliders input")
    for threshold in (0.06, 0.2, 0.6):
        page.locator("#all").fill(str(threshold))
        for number in range(0, sliders.count(), 2):  # every other one elsewhere
            sliders.nth(number).fill(str(threshold + 0.05))
        assert tags(page) == predicted(served, page.locator("#result").input_value(), 0)
    assert [url for url in asked if "look" in url] == []  # no other forward pass


def test_the_copied_config_says_what_is_seen(open_page: Callable[..., Page]) -> None:
    page = open_page("/playground")
    page.get_by_role("button", name="sample 1").click()
    expect(page.locator("#results")).to_be_visible()
    slider = page.get_by_label("threshold of star")
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    screenshot(page, "playground")
    page.get_by_role("button", name="Copy the labeling config").click()
    expect(page.locator("#copied")).to_have_text("copied")
    plan = read_plan(page.evaluate("navigator.clipboard.readText()"), 0.9, 0.7)
    labels = {label.name: (label.threshold, label.phrases) for label in plan.controls[0].labels}
    assert labels == {
        "ring": (0.3, ("ring",)),
        "star": (0.35, ("star",)),
        "Square": (0.3, ("purple square", "blue square")),
    }


def test_mistakes_are_told_and_can_be_mended(open_page: Callable[..., Page]) -> None:
    page = open_page("/playground")
    page.get_by_role("button", name="Look", exact=True).click()
    expect(page.get_by_role("alert")).to_have_text("Choose a picture first.")
    drop(page, b"this is no picture")
    expect(page.get_by_role("alert")).to_contain_text("not a picture")
    drop(page, encode(DRAWN[1].image))
    expect(page.locator("#results")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()
    ask(page, "<View><Image/>")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("not valid XML")


def test_the_keyboard_is_enough(open_page: Callable[..., Page]) -> None:
    page = open_page("/playground")
    page.on("filechooser", lambda chooser: None)  # the browser is told early to give it to us
    for _ in range(4):  # two links, the picture, the first sample
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#results")).to_be_visible()
    page.get_by_role("tab", name="Phrases").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("textbox", name="Labeling config", exact=True)).to_be_visible()
    page.locator("#drop").focus()
    with page.expect_file_chooser():
        page.keyboard.press("Enter")


def test_boxes_are_cut_as_the_detector_does(open_page: Callable[..., Page]) -> None:
    rng, page = random.Random(3), open_page("/playground")
    for _ in range(30):
        found = [
            Detection((x, y, x + rng.uniform(1, 40), y + rng.uniform(1, 40)), rng.random(), rng.choice("abc"))
            for x, y in ((rng.uniform(0, 60), rng.uniform(0, 60)) for _ in range(40))
        ]
        thresholds = {label: rng.random() for label in "ab"} | {"c": 0.2}
        kept = [row for row in found if row.score >= thresholds[row.label]]
        want = [row.score for row in non_max_suppression(kept, 0.5) if row.label != "c"]
        rows = [
            {"control": "k", "place": None if d.label == "c" else d.label, "score": d.score}
            | dict(zip(("x", "y"), d.box_xyxy[:2], strict=True))
            | {"width": d.box_xyxy[2] - d.box_xyxy[0], "height": d.box_xyxy[3] - d.box_xyxy[1]}
            for d in found
        ]
        script = """async ([rows, thresholds]) => {
          const { cut } = await import("./pages/boxes.js");
          return cut(rows, (control, place) => thresholds[place ?? "c"], 0.5).map((row) => row.score);
        }"""
        assert page.evaluate(script, [rows, thresholds]) == want


def test_the_status_page_lives_without_a_reload(open_page: Callable[..., Page], served: Served) -> None:
    odd = '<img src=x onerror="alert(1)">'
    named = odd.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    config = CONFIG.replace("</RectangleLabels>", f'<Label value="{named}"/></RectangleLabels>')
    page = open_page("/")
    expect(page.locator("#workers")).to_contain_text("alive")
    requests.post(f"{served.url}/setup", json={"project": "51.1", "schema": config}, timeout=10)
    tasks = [{"id": 900 + i, "data": {"image": data_uri(scene.image)}} for i, scene in enumerate(DRAWN)]
    tasks.append({"id": 999, "data": {"image": "http://127.0.0.1:1/gone.png"}})
    body = {"tasks": tasks, "label_config": config, "project": "51.1"}
    requests.post(f"{served.url}/predict", json=body, timeout=60)
    expect(page.locator("#projects")).to_contain_text("project 51", timeout=10_000)
    expect(page.locator("#projects")).to_contain_text(odd)  # as text
    expect(page.locator("#failures")).to_contain_text("could not be fetched")
    expect(page.locator("#pictures figure").first).to_be_visible()
    connection = connect((served.model_dir / "redis.url").read_text())
    TrainingQueue(connection).report("51", "training", done=2, of=8)
    with contextlib.closing(BulkProgress(connection, "x", "label, 40 pictures")) as bulk:
        bulk.report(10, 1, 40)
        expect(page.locator("#running")).to_contain_text("fine-tuning 2 of 8")
        expect(page.locator("#running")).to_contain_text("label, 40 pictures10 of 40, 1 failed")
        screenshot(page, "status-odd-label")
    TrainingQueue(connection).report("51", "done", text="nothing that is surely better")
    expect(page.locator("#running")).to_contain_text("nothing that is surely better")
    expect(page.locator("#running")).not_to_contain_text("label, 40 pictures")
    page.get_by_role("link", name="try it in the playground").first.click()
    expect(page.get_by_role("textbox", name="Labeling config", exact=True)).to_have_value(config)


@pytest.mark.parametrize("path", ["/", "/playground"])
def test_a_phone_shows_all_of_it(open_page: Callable[..., Page], path: str) -> None:
    page = open_page(path, PHONE)
    if path == "/playground":
        page.get_by_role("button", name="sample 2").click()
        expect(page.locator("#results")).to_be_visible()
    else:
        expect(page.locator("#workers")).to_contain_text("alive")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    screenshot(page, f"phone{path.replace('/', '-')}")
