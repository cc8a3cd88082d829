"""The pages for people, and what they and Prometheus read: `/`, `/playground`, `/status`, `/metrics`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from flask import Blueprint, Response, jsonify, redirect, request, send_from_directory
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric
from redis import Redis
from redis.exceptions import RedisError
from werkzeug.wrappers import Response as AnyResponse

from backend.delivery.outbox import Outbox
from backend.errors import BadRequest, NotFound, Overloaded, QueueUnavailable
from backend.metrics import REGISTRY, merge_metrics
from backend.monitoring.project_stats import get_label_config, get_shown_model_versions
from backend.queue.predict_queue import PredictQueue
from backend.queue.redis import connect, redis_errors
from backend.queue.worker_metrics import collect_metrics
from backend.settings import Settings
from backend.web.auth import parse_json_body
from backend.web.playground import predict_unfiltered
from backend.web.status import list_workers, read_status

MAX_CONCURRENT_PREDICTIONS = 16  # in the playground at a time; each holds a thread, and its picture lies in Redis
PAGES = Path(__file__).parent / "static"
SAMPLES = Path(__file__).parent.parent / "demo" / "samples"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address may hold the secret path
    "Cache-Control": "no-store",
}


def make_blueprint(settings: Settings) -> Blueprint:
    """The routes."""
    pages = Blueprint("pages", __name__)
    redis = functools.cache(lambda: connect(settings.redis_url))

    @pages.after_request
    def with_headers(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    @pages.get("/")
    def index() -> AnyResponse:
        if not request.environ.get("PATH_INFO"):
            return redirect(request.script_root + "/")  # the page's own addresses are relative
        return send_from_directory(PAGES, "status.html")

    @pages.get("/playground")
    def playground() -> Response:
        return send_from_directory(PAGES, "playground.html")

    @pages.get("/pages/<name>")
    def asset(name: str) -> Response:
        return send_from_directory(PAGES, name)

    @pages.get("/playground/samples/<name>")
    def sample(name: str) -> Response:
        return send_from_directory(SAMPLES, name)

    _add_data(pages, settings, redis)
    return pages


def _add_data(pages: Blueprint, settings: Settings, redis: Callable[[], Redis]) -> None:
    looks, registry = threading.BoundedSemaphore(MAX_CONCURRENT_PREDICTIONS), CollectorRegistry(auto_describe=False)
    registry.register(_Collected(redis))

    @pages.get("/status")
    def state() -> Response:
        return jsonify(read_status(settings, redis(), request.args.get("seen", "")))

    @pages.get("/playground/config/<project>")
    def config(project: str) -> Response:
        with redis_errors():
            found = get_label_config(redis(), project)
        if not found:
            raise NotFound(f"project {project} never asked for anything")
        return jsonify(label_config=found)

    @pages.post("/playground/look")
    def look_at() -> Response:
        words = _words("label_config", "image", "project")
        if not looks.acquire(blocking=False):
            raise Overloaded(f"{MAX_CONCURRENT_PREDICTIONS} pictures are looked at already; try again in a moment")
        try:
            return jsonify(predict_unfiltered(settings, redis(), *words))
        finally:
            looks.release()

    @pages.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


def _words(*keys: str) -> list[str]:
    """These fields of the request's body."""
    body = parse_json_body()
    words = [body.get(key, "") for key in keys]
    if not all(isinstance(word, str) for word in words):
        raise BadRequest(f"{', '.join(keys)} must be strings")
    return words


class _Collected:
    """This process's figures, those of the workers, and what Redis tells; of each name one family."""

    def __init__(self, redis: Callable[[], Redis]) -> None:
        self._redis = redis

    def collect(self) -> Iterator[Metric]:
        """Every figure there is; where Redis is away those of this process alone."""
        families = {family.name: family for family in REGISTRY.collect()}
        try:
            for family in merge_metrics(collect_metrics(self._redis())):
                families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                families[family.name].samples.extend(family.samples)
            yield from _of_redis(self._redis())
        except (RedisError, QueueUnavailable):
            pass
        yield from families.values()


def _of_redis(connection: Redis) -> Iterator[Metric]:
    found = list_workers(connection)
    alive = GaugeMetricFamily("gdino_workers", "Workers that live.", labels=["queue", "state"])
    for queue in ("predict", "fit"):
        for state, is_busy in (("busy", True), ("idle", False)):
            alive.add_metric([queue, state], sum(row["queue"] == queue and row["is_busy"] == is_busy for row in found))
    yield alive
    yield GaugeMetricFamily("gdino_queue_chunks", "Chunks that wait.", PredictQueue(connection).count_waiting())
    yield GaugeMetricFamily("gdino_outbox_chunks", "Chunks that are to be pushed.", len(Outbox(connection)))
    told = InfoMetricFamily("gdino_model_version", "The version that a project was told.", labels=["project"])
    for project, version in get_shown_model_versions(connection).items():
        told.add_metric([project], {"model_version": version})
    yield told
