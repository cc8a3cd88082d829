"""Prometheus metrics. Each process counts on its own; workers publish theirs to the web front.

They cross Redis in the Prometheus text format, under a key that expires with the process.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.process_collector import ProcessCollector

disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the lines and nobody reads them
REGISTRY = CollectorRegistry()
SECONDS_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
MAX_LABELS = 300  # labels counted by name; each is a line that Prometheus reads from every worker
MAX_LABEL_LENGTH = 100  # characters
OTHER_LABELS = "(other)"  # the name under which all further labels are counted

ProcessCollector(namespace="gdino", registry=REGISTRY)
REQUESTS = Counter("gdino_requests", "Requests answered.", ["route", "status"], registry=REGISTRY)
REQUEST_SECONDS = Histogram(
    "gdino_request_seconds",
    "Time until a request is answered completely.",
    ["route"],
    buckets=SECONDS_BUCKETS,
    registry=REGISTRY,
)
STAGE_SECONDS = Histogram(
    "gdino_stage_seconds",
    "Time of a stage: download and decode of an image; queue_wait, forward and post of a chunk.",
    ["stage"],
    buckets=SECONDS_BUCKETS,
    registry=REGISTRY,
)
BATCH_IMAGES = Histogram(
    "gdino_batch_pictures", "Images in a forward pass.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=REGISTRY
)
IMAGES = Counter("gdino_pictures", "Images passed to the detector.", registry=REGISTRY)
BOXES = Counter("gdino_boxes", "Boxes returned, by label.", ["label"], registry=REGISTRY)
FAILURES = Counter("gdino_failures", "Failed tasks, by error code.", ["code"], registry=REGISTRY)
PUSHED_PREDICTIONS = Counter("gdino_pushed_predictions", "Predictions imported into Label Studio.", registry=REGISTRY)
PUSH_SECONDS = Histogram(
    "gdino_push_seconds", "Time of an import into Label Studio.", buckets=SECONDS_BUCKETS, registry=REGISTRY
)
GPU_MEMORY = Gauge("gdino_gpu_memory_bytes", "GPU memory that torch has reserved.", ["device"], registry=REGISTRY)

_counted_labels: set[str] = set()


@dataclass
class StageTime:
    """The duration of a stage; `seconds` is 0 until the stage has ended."""

    seconds: float = 0.0


@contextlib.contextmanager
def timed(stage: str) -> Iterator[StageTime]:
    """Observes the duration of a stage, failed ones included.

    Yields an object that holds the duration once the block has ended::

        with timed("forward") as forward_time:
            ...
        log.info("forward: %.2f s", forward_time.seconds)
    """
    start, duration = time.perf_counter(), StageTime()
    try:
        yield duration
    finally:
        duration.seconds = time.perf_counter() - start
        STAGE_SECONDS.labels(stage).observe(duration.seconds)


def count_boxes(label: str) -> None:
    """Counts one box; labels beyond the first `MAX_LABELS` are counted as `OTHER_LABELS`."""
    label = label[:MAX_LABEL_LENGTH]
    if label in _counted_labels or len(_counted_labels) < MAX_LABELS:
        _counted_labels.add(label)
        BOXES.labels(label).inc()
    else:
        BOXES.labels(OTHER_LABELS).inc()


def render_metrics() -> bytes:
    """Returns this process's metrics in the Prometheus text format."""
    return generate_latest(REGISTRY)


def merge_metrics(texts: Mapping[str, str]) -> Iterator[Metric]:
    """Merges the metrics of other processes: each family once, its samples distinguished by the label `worker`.

    Args:
        texts: metrics in the Prometheus text format, by worker name.
    """
    families: dict[str, Metric] = {}
    for worker, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [sample._replace(labels={**sample.labels, "worker": worker}) for sample in family.samples]
    yield from families.values()
