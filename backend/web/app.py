"""The web front: Label Studio's routes, and the one place where errors become answers."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeout  # another class than the builtin in Python 3.10
from contextvars import copy_context
from typing import Any

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from backend.errors import BackendError, BadRequest, NotFound, Overloaded, RequestTooLarge
from backend.settings import Settings
from backend.web.auth import SecretPathMiddleware, check_login, parse_json_body, require_login
from backend.web.pages import make_blueprint
from backend.web.request_log import register_request_log

log = logging.getLogger(__name__)

MAX_BODY = 250_000_000  # bytes; Label Studio's own limit for imports
MAX_WAITING_REQUESTS = 200  # below gunicorn's threads, so that /health always finds one
KEEP_ALIVE_INTERVAL = 20.0  # s after which a waiting client gets a sign of life
PROJECT = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?(?![0-9])")
RETRY_AFTER = "30"  # s


def create_app(make_model: Callable[..., Any], settings: Settings) -> Flask:
    """The application.

    Args:
        make_model: `model.GroundingDINO`, made anew for each request from `project_id`, `label_config` and `settings`.
        settings: of this process.
    """
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    register_request_log(app)
    app.before_request(lambda: check_login(settings))
    app.register_blueprint(make_blueprint(settings))
    app.wsgi_app = SecretPathMiddleware(app.wsgi_app, settings.path_secret)  # type: ignore[method-assign]
    _map_errors(app)
    waiting = threading.BoundedSemaphore(MAX_WAITING_REQUESTS)

    def model(project: Any = None, label_config: Any = None) -> Any:
        if not isinstance(label_config or "", str):
            raise BadRequest("the labeling config must be a string")
        return make_model(project_id=_project_id(project), label_config=label_config, settings=settings)

    @app.get("/health")
    def health() -> Response:
        return jsonify(status="UP", model_class="GroundingDINO")

    @app.get("/ready")
    def ready() -> tuple[Response, int]:
        workers = model().count_ready_workers()
        return jsonify(ready=workers > 0, workers=workers), 200 if workers else 503

    @app.post("/setup")
    def setup() -> Response:
        body = parse_json_body()
        return jsonify(model_version=model(body.get("project"), body.get("schema")).setup())

    @app.post("/predict")
    def predict() -> Response:
        body = parse_json_body()
        tasks, params = body.get("tasks"), body.get("params") or {}
        if not isinstance(tasks, list) or not all(_is_task(task) for task in tasks):
            raise BadRequest("tasks must be a list of objects, each with an object as its data")
        if not isinstance(params, Mapping):
            raise BadRequest("params must be an object")
        plugin = model(body.get("project"), body.get("label_config"))
        return _kept_alive(lambda: plugin.predict(tasks, context=params.get("context")), waiting)

    @app.post("/webhook")
    def webhook() -> Response:
        body = parse_json_body()
        return jsonify(model(body.get("project")).fit(_event(body, settings), body))

    @app.get("/versions")
    def versions() -> Response:
        return jsonify(versions=model().versions(), trainings=model().trainings())

    return app


def _kept_alive(predict: Callable[[], list[Any]], waiting: threading.BoundedSemaphore) -> Response:
    """The answer; spaces come before one that takes long, which are legal JSON: Label Studio waits 100 s for a byte."""
    outcome: Future[list[Any]] = Future()

    def run() -> None:
        try:
            outcome.set_result(predict())
        except Exception as error:  # raised where the answer is made
            outcome.set_exception(error)
        finally:
            waiting.release()

    if not waiting.acquire(blocking=False):
        raise Overloaded(f"{MAX_WAITING_REQUESTS} requests are waiting already; ask again in a minute")
    threading.Thread(target=copy_context().run, args=(run,), daemon=True).start()
    try:
        return jsonify(results=outcome.result(KEEP_ALIVE_INTERVAL))
    except FutureTimeout:
        return Response(_spaces_and_answer(outcome), mimetype="application/json")


def _spaces_and_answer(outcome: Future[list[Any]]) -> Iterator[str]:
    while not outcome.done():
        yield " "
        wait([outcome], KEEP_ALIVE_INTERVAL)
    try:
        yield json.dumps({"results": outcome.result()})
    except BackendError as error:  # too late for a status
        log.warning("/predict: %s: %s", error.code, error)
        yield json.dumps({"error": error.to_dict()})


def _is_task(task: Any) -> bool:
    return isinstance(task, Mapping) and isinstance(task.get("data") or {}, Mapping)


def _project_id(project: Any) -> str:
    """Label Studio's `<number>.<time of creation>`, or the number in the project object of a webhook."""
    number = project.get("id") if isinstance(project, Mapping) else project
    found = PROJECT.match(str(number or ""))
    return found[0] if found else ""


def _event(body: Mapping[str, Any], settings: Settings) -> str:
    event = body.get("action")
    if not isinstance(event, str):
        raise BadRequest("action must be the name of an event")
    if event == "START_TRAINING":
        require_login(settings)  # Label Studio sends it with the credentials, unlike all other events
    return event


def _map_errors(app: Flask) -> None:
    @app.errorhandler(BackendError)
    def on_purpose(error: BackendError) -> tuple[Response, int]:
        log.warning("%s %s: %s: %s", request.method, request.path, error.code, error)
        answer = jsonify(error=error.to_dict())
        if error.status == 401:
            answer.headers["WWW-Authenticate"] = 'Basic realm="Grounding DINO"'  # browsers ask for it then
        if error.status == 503:
            answer.headers["Retry-After"] = RETRY_AFTER
        return answer, error.status

    @app.errorhandler(HTTPException)
    def http(error: HTTPException) -> tuple[Response, int]:
        if isinstance(error, RequestEntityTooLarge):
            return on_purpose(RequestTooLarge(f"the body is above {MAX_BODY} bytes; select fewer tasks"))
        if error.code == 404:
            return on_purpose(NotFound("no such route"))
        mapped = on_purpose(BadRequest(error.description or "bad request"))
        return mapped[0], error.code or 400

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> tuple[Response, int]:
        log.exception("%s %s failed", request.method, request.path)
        return jsonify(error=BackendError("an error of ours; the log of the web front says more").to_dict()), 500
