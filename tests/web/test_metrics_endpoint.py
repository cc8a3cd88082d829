import pytest
from redis import Redis

from backend.monitoring.project_stats import LAST_USED_KEY, SUMMARIES_KEY
from backend.queue.live_workers import READY_KEY
from backend.queue.redis import connect, set_indexed
from backend.queue.worker_metrics import METRICS_KEY
from backend.web.metrics_endpoint import MetricsCollector

WORKER_TEXT = "# HELP gdino_pictures_total Images.\n# TYPE gdino_pictures_total counter\ngdino_pictures_total 7.0\n"


def collect_names(connection: Redis) -> set[str]:
    families = list(MetricsCollector(lambda: connection).collect())
    names = {family.name for family in families if family.samples}
    assert len({family.name for family in families}) == len(families)  # each family occurs once
    return names


def count_worker_images(connection: Redis) -> list[float]:
    families = MetricsCollector(lambda: connection).collect()
    samples = [sample for family in families if family.name == "gdino_pictures" for sample in family.samples]
    return [sample.value for sample in samples if sample.labels.get("worker") == "w"]


def test_all_three_sources_are_collected(connection: Redis) -> None:
    set_indexed(connection, METRICS_KEY, "w", WORKER_TEXT)
    assert {"gdino_process_cpu_seconds", "gdino_pictures", "gdino_workers"} <= collect_names(connection)
    assert count_worker_images(connection) == [7.0]


def test_without_redis_the_metrics_of_the_web_front_are_served(caplog: pytest.LogCaptureFixture) -> None:
    names = collect_names(connect("redis://127.0.0.1:1"))
    assert "gdino_process_cpu_seconds" in names
    assert "gdino_workers" not in names
    assert "/metrics leaves out the workers' metrics: ConnectionError" in caplog.text


def test_unreadable_metrics_of_a_worker_do_not_stop_the_gauges(
    connection: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    set_indexed(connection, METRICS_KEY, "w", "not metrics at all {")
    assert {"gdino_process_cpu_seconds", "gdino_workers"} <= collect_names(connection)
    assert "/metrics leaves out the workers' metrics" in caplog.text


def test_an_unreadable_summary_does_not_stop_the_metrics_of_workers(
    connection: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    connection.zadd(LAST_USED_KEY, {"7": 1})
    connection.hset(SUMMARIES_KEY, "7", "{")
    set_indexed(connection, METRICS_KEY, "w", WORKER_TEXT)
    assert "gdino_workers" not in collect_names(connection)
    assert count_worker_images(connection) == [7.0]
    assert "/metrics leaves out the gauges of the queue: JSONDecodeError" in caplog.text


def test_an_unreadable_heartbeat_leaves_the_other_gauges(connection: Redis) -> None:
    set_indexed(connection, READY_KEY, "w", '{"device": 3}')
    assert {"gdino_workers", "gdino_queue_chunks", "gdino_outbox_chunks"} <= collect_names(connection)
