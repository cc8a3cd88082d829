import json
import logging
import re
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from backend.logs import REQUEST_ID, JsonFormatter, choose_request_id, set_up_logging
from backend.metrics import BOXES, MAX_LABELS, OTHER, REGISTRY, count_boxes, merge_metrics, render_metrics, timed
from backend.settings import Settings
from tests.servers import ROOT


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("backend.metrics._labels", set())
    level = logging.root.level
    yield
    BOXES.clear()
    REQUEST_ID.set("-")
    logging.root.setLevel(level)


def worker_text(count: int) -> str:
    registry = CollectorRegistry()
    Counter("boxes", "Boxes.", ["label"], registry=registry).labels('odd "label"\n').inc(count)
    Histogram("stage", "Stages.", buckets=(1, 2), registry=registry).observe(count)
    return generate_latest(registry).decode()


def test_workers_are_told_apart_and_each_family_comes_once() -> None:
    families = list(merge_metrics({"a": worker_text(1), "b": worker_text(2)}))
    assert [family.name for family in families] == ["boxes", "stage"]
    counts = {
        (sample.labels["worker"], sample.labels["label"]): sample.value
        for sample in families[0].samples
        if sample.name == "boxes_total"
    }
    assert counts == {("a", 'odd "label"\n'): 1, ("b", 'odd "label"\n'): 2}


def test_what_a_process_exposes_can_be_read() -> None:
    with timed("decode"):
        pass
    found = {family.name for family in text_string_to_metric_families(render_metrics().decode())}
    assert {"gdino_stage_seconds", "gdino_requests", "gdino_boxes", "gdino_process_cpu_seconds"} <= found


def test_a_stage_that_fails_is_timed_too() -> None:
    before = REGISTRY.get_sample_value("gdino_stage_seconds_count", {"stage": "download"}) or 0
    with pytest.raises(ValueError, match="x"), timed("download"):
        raise ValueError("x")
    assert REGISTRY.get_sample_value("gdino_stage_seconds_count", {"stage": "download"}) == before + 1


def test_labels_beyond_a_number_are_counted_together() -> None:
    for number in range(2 * MAX_LABELS):
        count_boxes(f"label {number}")
    assert len(BOXES._metrics) <= MAX_LABELS + 1
    assert BOXES.labels(OTHER)._value.get() >= MAX_LABELS


@pytest.mark.parametrize("given", ["", "a b", "x\nINFO forged line", "ü", "a" * 65, None])
def test_a_callers_id_must_fit_into_a_line(given: str | None) -> None:
    assert choose_request_id(given) != given
    assert choose_request_id("abc-1.2_3") == "abc-1.2_3"


def test_a_line_of_json_holds_request_and_traceback() -> None:
    REQUEST_ID.set("abc")
    try:
        raise ValueError('a "quoted"\nreason')
    except ValueError:
        record = logging.LogRecord("backend", logging.ERROR, "f", 1, "%s failed", ("it",), __import__("sys").exc_info())
    record.request = REQUEST_ID.get()
    line = JsonFormatter().format(record)
    row = json.loads(line)
    assert "\n" not in line
    assert (row["level"], row["request"], row["message"]) == ("ERROR", "abc", "it failed")
    assert "ValueError" in row["traceback"]
    assert row["time"].endswith("+00:00")


def test_every_line_has_the_id_of_its_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    set_up_logging(Settings(model="demo"))
    REQUEST_ID.set("r-1")
    logging.getLogger("backend.x").warning("hello")
    assert "WARNING backend.x [r-1]: hello" in capsys.readouterr().err
    logging.getLogger("backend.x").warning("GET /a\n2026 ERROR backend [x]: forged \x1b[31m\u2028")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_dashboard_asks_for_figures_that_there_are() -> None:
    from_redis = {"gdino_workers", "gdino_queue_chunks", "gdino_outbox_chunks", "gdino_model_version_info"}
    names = set(from_redis)
    for family in REGISTRY.collect():
        kinds = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
        names |= {family.name + ending for ending in kinds[family.type]}
    asked = re.findall(r"gdino_\w+", (ROOT / "deploy" / "grafana.json").read_text())
    assert len(set(asked)) > 12
    assert set(asked) <= names
