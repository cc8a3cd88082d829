"""Each request's id, its line in the log, and its time."""

from __future__ import annotations

import logging
import time

from flask import Flask, Response, g, request

from backend.logs import REQUEST_ID, choose_request_id
from backend.metrics import REQUEST_SECONDS, REQUESTS

HEADER = "X-Request-ID"
QUIET_PATHS = ("/health", "/ready", "/status", "/metrics", "/pages/")  # asked for every few seconds

log = logging.getLogger(__name__)


def register_request_log(app: Flask) -> None:
    """Gives each request an id, the caller's own if it has one, which follows its jobs into the workers."""

    @app.before_request
    def begin() -> None:
        g.start = time.perf_counter()
        REQUEST_ID.set(choose_request_id(request.headers.get(HEADER)))

    @app.after_request
    def end(response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule else "none"
        line, start, own = f"{request.method} {request.path}", g.get("start", time.perf_counter()), REQUEST_ID.get()
        level = logging.DEBUG if request.path.startswith(QUIET_PATHS) else logging.INFO

        def closed() -> None:  # what streams its answer ends here
            took = time.perf_counter() - start
            REQUESTS.labels(route, response.status_code).inc()
            REQUEST_SECONDS.labels(route).observe(took)
            REQUEST_ID.set(own)
            log.log(level, "%s %d in %.0f ms", line, response.status_code, 1000 * took)

        response.call_on_close(closed)
        response.headers[HEADER] = own
        return response
