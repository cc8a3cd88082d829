"""What is counted and timed, for Prometheus. Each process has figures of its own; workers hand theirs to the web front.

They cross Redis as the text that Prometheus reads, under a key that expires with its process.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.process_collector import ProcessCollector

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second line for each figure, which nobody reads
REGISTRY = CollectorRegistry()
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
MAX_LABELS = 300  # that are counted by name; each is a line of what Prometheus reads, from every worker
MAX_LABEL_LENGTH, OTHER = 100, "(other)"  # characters; the name of all others together

ProcessCollector(namespace="gdino", registry=REGISTRY)
REQUESTS = Counter("gdino_requests", "Requests answered.", ["route", "status"], registry=REGISTRY)
REQUEST_SECONDS = Histogram(
    "gdino_request_seconds",
    "Time until a request is answered to the end.",
    ["route"],
    buckets=SECONDS,
    registry=REGISTRY,
)
STAGE_SECONDS = Histogram(
    "gdino_stage_seconds",
    "Time of a stage: download and decode of a picture; wait in the queue, forward and post of a chunk.",
    ["stage"],
    buckets=SECONDS,
    registry=REGISTRY,
)
BATCH_IMAGES = Histogram(
    "gdino_batch_pictures", "Pictures in a forward pass.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=REGISTRY
)
IMAGES = Counter("gdino_pictures", "Pictures looked at.", registry=REGISTRY)
BOXES = Counter("gdino_boxes", "Boxes answered, by label.", ["label"], registry=REGISTRY)
FAILURES = Counter("gdino_failures", "Tasks that failed, by code.", ["code"], registry=REGISTRY)
PUSHED_PREDICTIONS = Counter("gdino_pushed_predictions", "Predictions brought into Label Studio.", registry=REGISTRY)
PUSH_SECONDS = Histogram("gdino_push_seconds", "Time of an import by Label Studio.", buckets=SECONDS, registry=REGISTRY)
GPU_MEMORY = Gauge("gdino_gpu_memory_bytes", "Memory of the GPU that torch holds.", ["device"], registry=REGISTRY)

_labels: set[str] = set()


@contextlib.contextmanager
def timed(stage: str) -> Iterator[None]:
    """Times a stage, also one that fails."""
    start = time.perf_counter()
    try:
        yield
    finally:
        STAGE_SECONDS.labels(stage).observe(time.perf_counter() - start)


def count_boxes(label: str) -> None:
    """Counts a box; labels beyond `MAX_LABELS` are counted together."""
    label = label[:MAX_LABEL_LENGTH]
    if label in _labels or len(_labels) < MAX_LABELS:
        _labels.add(label)
        BOXES.labels(label).inc()
    else:
        BOXES.labels(OTHER).inc()


def render_metrics() -> bytes:
    """This process's figures as Prometheus reads them."""
    return generate_latest(REGISTRY)


def merge_metrics(texts: Mapping[str, str]) -> Iterator[Metric]:
    """The figures of other processes, by name: every family once, its samples told apart by the label `worker`."""
    families: dict[str, Metric] = {}
    for name, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text):
            own = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            own.samples += [sample._replace(labels={**sample.labels, "worker": name}) for sample in family.samples]
    yield from families.values()
