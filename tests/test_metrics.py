import json
import logging
import re
import time
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from backend.logs import REQUEST_ID, JsonFormatter, choose_request_id, set_up_logging
from backend.metrics import BOXES, MAX_LABELS, OTHER_LABELS, REGISTRY, count_boxes, merge_metrics, render_metrics, timed
from backend.settings import Settings
from tests.servers import ROOT


@pytest.fixture(autouse=True)
def restore_globals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("backend.metrics._counted_labels", set())
    level = logging.root.level
    yield
    BOXES.clear()
    REQUEST_ID.set("-")
    logging.root.setLevel(level)


def make_worker_metrics(count: int) -> str:
    registry = CollectorRegistry()
    Counter("boxes", "Boxes.", ["label"], registry=registry).labels('odd "label"\n').inc(count)
    Histogram("stage", "Stages.", buckets=(1, 2), registry=registry).observe(count)
    return generate_latest(registry).decode()


def test_workers_are_distinguished_and_each_family_comes_once() -> None:
    families = list(merge_metrics({"a": make_worker_metrics(1), "b": make_worker_metrics(2)}))
    assert [family.name for family in families] == ["boxes", "stage"]
    counts = {
        (sample.labels["worker"], sample.labels["label"]): sample.value
        for sample in families[0].samples
        if sample.name == "boxes_total"
    }
    assert counts == {("a", 'odd "label"\n'): 1, ("b", 'odd "label"\n'): 2}


def test_the_metrics_of_a_process_can_be_parsed() -> None:
    with timed("decode"):
        pass
    names = {family.name for family in text_string_to_metric_families(render_metrics().decode())}
    assert {"gdino_stage_seconds", "gdino_requests", "gdino_boxes", "gdino_process_cpu_seconds"} <= names


def stage_sample(name: str, stage: str) -> float:
    return REGISTRY.get_sample_value(f"gdino_stage_seconds_{name}", {"stage": stage}) or 0


def test_a_timed_stage_returns_the_seconds_that_are_observed() -> None:
    count, total = stage_sample("count", "forward"), stage_sample("sum", "forward")
    with timed("forward") as forward_time:
        assert forward_time.seconds == 0
        time.sleep(0.02)
    assert 0.02 <= forward_time.seconds < 5
    assert stage_sample("count", "forward") == count + 1
    assert stage_sample("sum", "forward") - total == pytest.approx(forward_time.seconds)


def test_a_stage_that_fails_is_timed_too() -> None:
    before = stage_sample("count", "download")
    with pytest.raises(ValueError, match="x"), timed("download") as download_time:
        raise ValueError("x")
    assert stage_sample("count", "download") == before + 1
    assert download_time.seconds > 0


def test_labels_beyond_the_maximum_are_counted_together() -> None:
    for number in range(2 * MAX_LABELS):
        count_boxes(f"label {number}")
    assert len(BOXES._metrics) <= MAX_LABELS + 1
    assert BOXES.labels(OTHER_LABELS)._value.get() >= MAX_LABELS


@pytest.mark.parametrize("given", ["", "a b", "x\nINFO forged line", "ü", "a" * 65, None])
def test_a_callers_id_must_be_safe_to_log(given: str | None) -> None:
    assert choose_request_id(given) != given
    assert choose_request_id("abc-1.2_3") == "abc-1.2_3"


def test_a_json_line_holds_request_and_traceback() -> None:
    REQUEST_ID.set("abc")
    try:
        raise ValueError('a "quoted"\nreason')
    except ValueError:
        record = logging.LogRecord("backend", logging.ERROR, "f", 1, "%s failed", ("it",), __import__("sys").exc_info())
    record.request = REQUEST_ID.get()
    line = JsonFormatter().format(record)
    fields = json.loads(line)
    assert "\n" not in line
    assert (fields["level"], fields["request"], fields["message"]) == ("ERROR", "abc", "it failed")
    assert "ValueError" in fields["traceback"]
    assert fields["time"].endswith("+00:00")


def test_every_line_holds_its_request_id(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    set_up_logging(Settings(model="demo"))
    REQUEST_ID.set("r-1")
    logging.getLogger("backend.x").warning("hello")
    assert "WARNING backend.x [r-1]: hello" in capsys.readouterr().err
    logging.getLogger("backend.x").warning("GET /a\n2026 ERROR backend [x]: forged \x1b[31m\u2028")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_dashboard_queries_existing_metrics() -> None:
    from_redis = {"gdino_workers", "gdino_queue_chunks", "gdino_outbox_chunks", "gdino_model_version_info"}
    names = set(from_redis)
    for family in REGISTRY.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
        names |= {family.name + suffix for suffix in suffixes[family.type]}
    queried = re.findall(r"gdino_\w+", (ROOT / "deploy" / "grafana.json").read_text())
    assert len(set(queried)) > 12
    assert set(queried) <= names
