"""The response to `/predict`, which may take minutes: slots, bytes that keep it alive, clients that hang up."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextvars import copy_context
from typing import Any

from flask import Response, jsonify

from backend.errors import BackendError, Overloaded

log = logging.getLogger(__name__)

MAX_WAITING_REQUESTS = 200  # fewer than gunicorn's threads, so that /health always gets one
MAX_WAITING_SELECTIONS = 150  # of them with more than one task, so that somebody who opens a task gets in
KEEP_ALIVE_INTERVAL = 20.0  # s between two bytes to a waiting client
HANG_UP_INTERVAL = 1.0  # s between two looks whether the client still waits

Predict = Callable[[Callable[[], bool]], list[Any]]  # given a function that returns whether nobody waits any more


class Slots:
    """The requests that may wait at a time."""

    def __init__(self) -> None:
        self._requests = threading.BoundedSemaphore(MAX_WAITING_REQUESTS)
        self._selections = threading.BoundedSemaphore(MAX_WAITING_SELECTIONS)

    @contextlib.contextmanager
    def hold(self, is_selection: bool) -> Iterator[None]:
        """Holds a slot for a request of one task or, with `is_selection`, of several; raises Overloaded."""
        with contextlib.ExitStack() as held:
            for slots in [self._requests, *([self._selections] if is_selection else [])]:
                if not slots.acquire(blocking=False):
                    raise Overloaded("too many requests are waiting already; try again in a minute")
                held.callback(slots.release)
            yield


def respond(
    predict: Predict, slots: Slots, is_selection: bool, connection: socket.socket | None, description: str
) -> Response:
    """Runs `predict` in a thread of its own and responds with its results.

    Label Studio gives up when it gets no byte for 100 s. So a response that takes longer than `KEEP_ALIVE_INTERVAL`
    begins with spaces, which JSON allows. Its status is 200 by then, whatever the outcome.

    Args:
        predict: returns the results.
        slots: of this process.
        is_selection: whether the request has several tasks.
        connection: to the client; None where it is not known.
        description: of the request, for the log.

    Raises:
        Overloaded: no slot is free.
        BackendError: from `predict`, within the first interval.
    """
    held = contextlib.ExitStack()
    held.enter_context(slots.hold(is_selection))
    results: Future[list[Any]] = Future()
    hung_up = threading.Event()

    def run() -> None:
        with held:
            try:
                results.set_result(predict(hung_up.is_set))
            except Exception as error:  # raised again by `results.result`
                results.set_exception(error)

    def wait_for_results() -> None:
        """Waits for one interval; less if the results come or the client hangs up."""
        end = time.monotonic() + KEEP_ALIVE_INTERVAL
        while not wait([results], min(HANG_UP_INTERVAL, KEEP_ALIVE_INTERVAL)).done and time.monotonic() < end:
            if connection and _has_hung_up(connection):
                hung_up.set()

    def stream() -> Iterator[str]:
        while not results.done():
            yield " "
            wait_for_results()
        try:
            yield json.dumps({"results": results.result()})
        except BackendError as error:  # too late for its status
            log.warning("%s: %s: %s", description, error.code, error)
            yield json.dumps({"error": error.to_dict()})

    threading.Thread(target=copy_context().run, args=(run,), daemon=True).start()
    wait_for_results()
    if results.done():
        return jsonify(results=results.result())
    return Response(stream(), mimetype="application/json")


def _has_hung_up(connection: socket.socket) -> bool:
    """Returns whether the client has closed its connection, without reading what it may have sent."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
