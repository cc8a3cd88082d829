"""`/metrics` for Prometheus: the metrics of this process and of all workers, and gauges that are read from Redis."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

from flask import Blueprint, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric
from redis import Redis

from backend.delivery.failures import Failures
from backend.delivery.outbox import Outbox
from backend.metrics import REGISTRY, merge_metrics
from backend.monitoring.project_stats import get_shown_model_versions
from backend.queue.predict_queue import count_waiting_by_checkpoint
from backend.queue.worker_metrics import collect_metrics
from backend.web.status import READY_KEYS, list_workers

log = logging.getLogger(__name__)


def register_metrics(blueprint: Blueprint, get_connection: Callable[[], Redis]) -> None:
    """Adds the route `/metrics`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(MetricsCollector(get_connection))

    @blueprint.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


class MetricsCollector:
    """Collects the metrics of three sources: this process, the workers, and the gauges of Redis.

    A source that fails is logged and left out, so the others are served while Redis is away.
    """

    def __init__(self, get_connection: Callable[[], Redis]) -> None:
        self._get_connection = get_connection

    def collect(self) -> Iterator[Metric]:
        """Yields each metric family once, with the samples of all sources."""
        sources: dict[str, Callable[[], Iterable[Metric]]] = {
            "the web front's metrics": REGISTRY.collect,
            "the workers' metrics": lambda: merge_metrics(collect_metrics(self._get_connection())),
            "the gauges of the queue": lambda: _read_gauges(self._get_connection()),
        }
        families: dict[str, Metric] = {}
        for name, read in sources.items():
            try:
                source = list(read())
            except Exception as error:  # Redis is away, or an entry is of another version of the backend
                log.warning("/metrics leaves out %s: %s: %s", name, type(error).__name__, error)
                continue
            for family in source:
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                merged.samples.extend(family.samples)
        yield from families.values()


def _read_gauges(connection: Redis) -> Iterator[Metric]:
    """Yields the gauges that are read from Redis.

    Raises:
        RedisError, QueueUnavailable: Redis does not answer.
    """
    workers = list_workers(connection)
    live = GaugeMetricFamily("gdino_workers", "Live workers.", labels=["queue", "state"])
    for queue in READY_KEYS:
        for state, is_busy in (("busy", True), ("idle", False)):
            count = sum(worker["queue"] == queue and worker["is_busy"] == is_busy for worker in workers)
            live.add_metric([queue, state], count)
    yield live
    waiting = count_waiting_by_checkpoint(connection).total()
    yield GaugeMetricFamily("gdino_queue_chunks", "Chunks waiting for a worker.", waiting)
    pending = Outbox(connection).count_by_project()
    yield GaugeMetricFamily("gdino_outbox_chunks", "Chunks to push into Label Studio.", sum(pending.values()))
    given_up = GaugeMetricFamily("gdino_given_up_tasks", "Tasks whose prediction was given up.", labels=["project"])
    for project, count in Failures(connection).count_by_project().items():
        given_up.add_metric([project], count)
    yield given_up
    versions = InfoMetricFamily("gdino_model_version", "Model version of a project.", labels=["project"])
    for project, version in get_shown_model_versions(connection).items():
        versions.add_metric([project], {"model_version": version})
    yield versions
