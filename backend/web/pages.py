"""The pages for people, `/` and `/playground`, with their static files, their data, and `/metrics`."""

from __future__ import annotations

import functools
from pathlib import Path

from flask import Blueprint, Response, redirect, request, send_from_directory
from werkzeug.wrappers import Response as AnyResponse

from backend.queue.redis import connect
from backend.settings import Settings
from backend.web.metrics_endpoint import register_metrics
from backend.web.playground import register_playground
from backend.web.status import register_status

STATIC = Path(__file__).parent / "static"
SAMPLES = Path(__file__).parent.parent / "demo" / "samples"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the URL may hold the secret prefix
    "Cache-Control": "no-store",
}


def make_blueprint(settings: Settings) -> Blueprint:
    """Makes the blueprint of all routes that people and Prometheus read; each response carries `HEADERS`."""
    blueprint = Blueprint("pages", __name__)
    get_connection = functools.cache(lambda: connect(settings.redis_url))
    register_status(blueprint, settings, get_connection)
    register_playground(blueprint, settings, get_connection)
    register_metrics(blueprint, get_connection)

    @blueprint.after_request
    def add_headers(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    @blueprint.get("/")
    def index() -> AnyResponse:
        if not request.environ.get("PATH_INFO"):  # below a secret prefix, without the slash at its end
            return redirect(request.script_root + "/")  # the page's own URLs are relative
        return send_from_directory(STATIC, "status.html")

    @blueprint.get("/playground")
    def playground() -> Response:
        return send_from_directory(STATIC, "playground.html")

    @blueprint.get("/pages/<name>")
    def static_file(name: str) -> Response:
        return send_from_directory(STATIC, name)

    @blueprint.get("/playground/samples/<name>")
    def playground_sample(name: str) -> Response:
        return send_from_directory(SAMPLES, name)

    return blueprint
