"""The log of requests: each one's id, its line in the log, and its metrics."""

from __future__ import annotations

import logging
import time

from flask import Flask, Response, g, request

from backend.logs import REQUEST_ID, choose_request_id
from backend.metrics import REQUEST_SECONDS, REQUESTS

HEADER = "X-Request-ID"
QUIET_PATHS = ("/health", "/ready", "/status", "/metrics", "/pages/")  # requested every few seconds; logged at DEBUG

log = logging.getLogger(__name__)


def register_request_log(app: Flask) -> None:
    """Gives each request an id, the caller's own if it has one, and logs and counts it once it is answered completely.

    The id follows the request's jobs into the workers.
    """

    @app.before_request
    def begin_request() -> None:
        g.start = time.perf_counter()
        REQUEST_ID.set(choose_request_id(request.headers.get(HEADER)))

    @app.after_request
    def end_request(response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule else "none"
        line, start, request_id = (
            f"{request.method} {request.path}",
            g.get("start", time.perf_counter()),
            REQUEST_ID.get(),
        )
        level = logging.DEBUG if request.path.startswith(QUIET_PATHS) else logging.INFO

        def on_close() -> None:  # the end of a streamed response too; runs outside of the request's context
            seconds = time.perf_counter() - start
            REQUESTS.labels(route, response.status_code).inc()
            REQUEST_SECONDS.labels(route).observe(seconds)
            REQUEST_ID.set(request_id)
            log.log(level, "%s %d in %.0f ms", line, response.status_code, 1000 * seconds)

        response.call_on_close(on_close)
        response.headers[HEADER] = request_id
        return response
