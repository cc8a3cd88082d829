"""The web front: Label Studio's routes and the error handlers."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from backend.errors import BackendError, BadRequest, NotFound, RequestTooLarge
from backend.settings import Settings
from backend.web.auth import SecretPathMiddleware, check_login, require_login
from backend.web.pages import make_blueprint
from backend.web.predict_response import Slots, respond
from backend.web.request_body import parse_json_body
from backend.web.request_log import register_request_log

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 250_000_000  # Label Studio's own limit for imports
RETRY_AFTER = "30"  # s, of the header of that name
PROJECT_ID = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?(?![0-9])")


def create_app(make_plugin: Callable[..., Any], settings: Settings) -> Flask:
    """Makes the application.

    Args:
        make_plugin: `model.GroundingDINO`, called for each request with `project_id`, `label_config` and `settings`.
        settings: of this process.
    """
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    register_request_log(app)
    app.before_request(lambda: check_login(settings))
    app.register_blueprint(make_blueprint(settings))
    app.wsgi_app = SecretPathMiddleware(app.wsgi_app, settings.path_secret)  # type: ignore[method-assign]
    _register_error_handlers(app)
    slots = Slots()

    def plugin(project: Any = None, label_config: Any = None) -> Any:
        """Makes the plugin for the current request."""
        project_id = _parse_project_id(project)
        g.project = project_id.partition(".")[0]
        if not isinstance(label_config or "", str):
            raise BadRequest("the labeling config must be a string")
        return make_plugin(project_id=project_id, label_config=label_config, settings=settings)

    @app.get("/health")
    def health() -> Response:
        return jsonify(status="UP", model_class="GroundingDINO")

    @app.get("/ready")
    def ready() -> tuple[Response, int]:
        workers = plugin().count_ready_workers()
        return jsonify(ready=workers > 0, workers=workers), 200 if workers else 503

    @app.post("/setup")
    def setup() -> Response:
        body = parse_json_body()
        return jsonify(model_version=plugin(body.get("project"), body.get("schema")).setup())

    @app.post("/predict")
    def predict() -> Response:
        body = parse_json_body()
        tasks, params = _parse_tasks(body.get("tasks")), body.get("params") or {}
        if not isinstance(params, Mapping):
            raise BadRequest("params must be an object")
        model = plugin(body.get("project"), body.get("label_config"))
        return respond(
            lambda is_cancelled: model.predict(tasks, context=params.get("context"), is_cancelled=is_cancelled),
            slots,
            is_selection=len(tasks) > 1,
            connection=request.environ.get("gunicorn.socket"),
            description=_describe_request(),
        )

    @app.post("/webhook")
    def webhook() -> Response:
        body = parse_json_body()
        event = body.get("action")
        if not isinstance(event, str):
            raise BadRequest("action must be the name of an event")
        if event == "START_TRAINING":
            require_login(settings)  # Label Studio sends credentials with this event only
        return jsonify(plugin(body.get("project")).fit(event, body))

    @app.get("/versions")
    def versions() -> Response:
        model = plugin()
        return jsonify(versions=model.versions(), trainings=model.trainings())

    return app


def _parse_tasks(tasks: Any) -> list[Mapping[str, Any]]:
    """Returns the tasks of a request body; raises BadRequest if they are not what Label Studio sends."""
    if isinstance(tasks, list) and all(
        isinstance(task, Mapping) and isinstance(task.get("data") or {}, Mapping) for task in tasks
    ):
        return tasks
    raise BadRequest("tasks must be a list of objects, each with an object as its data")


def _parse_project_id(project: Any) -> str:
    """Returns Label Studio's `<number>.<creation time>`, or the number in a webhook's project object; else ""."""
    number = project.get("id") if isinstance(project, Mapping) else project
    match = PROJECT_ID.match(str(number or ""))
    return match[0] if match else ""


def _describe_request() -> str:
    """Returns the current request for a log line: method, path, and the project where it is known."""
    project = g.get("project")
    return f"{request.method} {request.path}" + (f", project {project}" if project else "")


def _register_error_handlers(app: Flask) -> None:
    """Turns every error into `{"error": {"code", "detail"}}` with its status."""

    @app.errorhandler(BackendError)
    def backend_error(error: BackendError) -> tuple[Response, int]:
        log.warning("%s: %s: %s", _describe_request(), error.code, error)
        response = jsonify(error=error.to_dict())
        if error.status == 401:
            response.headers["WWW-Authenticate"] = 'Basic realm="Grounding DINO"'  # makes browsers ask for a login
        if error.status == 503:
            response.headers["Retry-After"] = RETRY_AFTER
        return response, error.status

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> tuple[Response, int]:
        if isinstance(error, RequestEntityTooLarge):
            return backend_error(RequestTooLarge(f"the body is above {MAX_BODY_BYTES} bytes; select fewer tasks"))
        if error.code == 404:
            return backend_error(NotFound("no such route"))
        response, _ = backend_error(BadRequest(error.description or "bad request"))
        return response, error.code or 400

    @app.errorhandler(Exception)
    def unexpected_error(error: Exception) -> tuple[Response, int]:
        log.exception("%s failed", _describe_request())
        return jsonify(error=BackendError("internal error; the log of the web front has the details").to_dict()), 500
