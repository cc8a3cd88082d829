"""A web server that answers as Label Studio 1.23 with SQLite does, and that misbehaves on demand.

Its answers were compared with those of the real one, which tests/e2e starts; they hold what our client reads.
"""

import contextlib
import itertools
import json
import re
import socket
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from operator import eq, gt, lt
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from PIL import Image

from tests.scenes import encode
from tests.servers import send_reply

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "equal": eq, "greater": gt, "less": lt, "in_list": lambda number, numbers: number in numbers
}  # fmt: skip
Reply = tuple[int, Any]  # HTTP status and content: the bytes of a JPEG, None, or sent as JSON


@dataclass(frozen=True)
class StoredPrediction:
    """A prediction of a task, as imported."""

    id: int
    project: int
    task: int
    model_version: str
    score: float | None
    result: Any


@dataclass(frozen=True)
class _Project:
    label_config: str
    created_at: int  # seconds since the epoch
    tasks: dict[int, dict[str, Any]]  # their data, by id


@dataclass
class _Fault:
    status: int | None = None  # of the answer; None for no answer
    times: float = float("inf")  # how often it still happens
    seconds: float = 0  # by which something is late


class _Refusal(Exception):
    """A request that Label Studio refuses: HTTP status and reason."""


class _Request(NamedTuple):
    project: int  # that it is about; 0 if there is none
    params: dict[str, str]  # of the query, and the numbers in the path
    body: bytes


Serve = Callable[[_Request], Reply | None]


class LabelStudioStandIn:
    """Projects with tasks and predictions behind Label Studio's API; safe to share between threads.

    `requests` lists method and path of every request, `import_sizes` project and number of predictions of every import
    that was stored. While `predicts_on_read` is true, `predict_calls` counts how often the real one would have called
    the ML backend because tasks without a prediction were read. `max_page_size`, if set, is the largest number of tasks
    on a page, whatever a request asks for: TASK_API_PAGE_SIZE_MAX of the real one.
    """

    def __init__(self, image: bytes | None = None, key: str = "key") -> None:
        """Takes a port, which is kept until `close`, but does not listen yet."""
        self.image = image or encode(Image.new("RGB", (64, 48), "#4363d8"), "JPEG")
        self.requests: list[tuple[str, str]] = []
        self.import_sizes: list[tuple[int, int]] = []
        self.predicts_on_read, self.predict_calls = False, 0
        self.max_page_size: int | None = None
        self._key = key
        self._projects: dict[int, _Project] = {}
        self._views: dict[int, tuple[int, bool]] = {}  # project, and whether tasks with a prediction are left out
        self._predictions: dict[int, StoredPrediction] = {}
        self._by_task: defaultdict[int, dict[int, StoredPrediction]] = defaultdict(dict)
        self._numbers = itertools.count(1)  # ids of predictions
        self._faults: dict[tuple[int, str], _Fault] = {}  # by project and kind: of routes, or the method's name
        self._timers: list[threading.Timer] = []  # of imports that are stored late
        self._lock = threading.RLock()
        self._server: _Server | None = None
        reservation = socket.socket()  # bound, but never listening: no other socket gets the port while this is stopped
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("127.0.0.1", 0))
        self.port = reservation.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._release_port = weakref.finalize(self, reservation.close)
        self._routes: dict[str, Serve] = {  # with a last slash where the real one allows it
            r"GET /api/version/?": lambda _: (200, {"release": "1.23.2"}),
            r"GET /api/current-user/whoami": lambda _: (200, {"id": 1, "email": "stand-in@example.com"}),
            r"GET /api/projects/(?P<project>\d+)/?": self._show_project,
            r"GET /api/ml/?": self._list_ml_backends,
            r"GET /api/tasks/?": self._list_tasks,
            r"POST /api/projects/(?P<project>\d+)/import/predictions": self._import_predictions,
            r"GET /api/predictions/?": self._list_predictions,
            r"DELETE /api/predictions/(?P<prediction>\d+)/?": self._delete_prediction,
            r"POST /api/dm/actions/?": self._run_action,
            r"GET /api/projects/(?P<project>\d+)/model-versions/?": self._count_model_versions,
            r"DELETE /api/projects/(?P<project>\d+)/model-versions/?": self._delete_model_version,
            r"GET /data/upload/(?P<project>\d+)/.+": self._show_image,
        }

    def start(self) -> None:
        """Accepts connections from now on."""
        assert self._server is None, "it runs already"
        self._server = _Server(self)

    def stop(self) -> None:
        """Refuses connections from now on; requests whose answer is late get none. The state is kept."""
        if self._server:
            self._server.stop()
            self._server = None

    def close(self) -> None:
        """Stops, drops imports that are not stored yet, and gives the port up."""
        self.stop()
        with self._lock:
            for timer in self._timers:
                timer.cancel()
        self._release_port()

    def __enter__(self) -> "LabelStudioStandIn":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add_project(
        self, number: int, label_config: str, created_at: int, tasks: Mapping[int, Mapping[str, Any]]
    ) -> None:
        """Adds a project, created at a time in seconds since the epoch, with the data of its tasks by id."""
        with self._lock:
            taken = [task for project in self._projects.values() for task in project.tasks if task in tasks]
            if number in self._projects or taken:
                raise ValueError(f"project {number} exists, or its tasks are another project's: {taken[:5]}")
            data = {task: dict(tasks[task]) for task in sorted(tasks)}
            self._projects[number] = _Project(label_config, created_at, data)

    def add_view(self, number: int, project: int, without_predictions: bool = False) -> None:
        """Adds a view of a project, of all tasks or only of those without any prediction."""
        with self._lock:
            self._views[number] = (project, without_predictions)

    def delete_tasks(self, project: int, ids: Iterable[int]) -> None:
        """Deletes tasks with their predictions."""
        with self._lock:
            for task in list(ids):
                del self._projects[project].tasks[task]
                self._delete(self._by_task[task].values())

    def delete_project(self, number: int) -> None:
        """Deletes a project with its tasks, predictions and views."""
        with self._lock:
            self.delete_tasks(number, self._projects[number].tasks)
            del self._projects[number]
            self._views = {view: shown for view, shown in self._views.items() if shown[0] != number}

    @property
    def predictions(self) -> list[StoredPrediction]:
        """The stored predictions, by id."""
        with self._lock:
            return list(self._predictions.values())

    def count_by_task(self, project: int, model_version: str | None = None) -> Counter[int]:
        """Counts the predictions of each task, of one model version if given."""
        of_project = [row for row in self.predictions if row.project == project]
        return Counter(row.task for row in of_project if model_version in (None, row.model_version))

    def fail(self, project: int, status: int, times: int | None = None, routes: str = "api|images|import") -> None:
        """Answers the next `times` requests, or all, to some kinds of routes with a status.

        The kinds are "import" of predictions, "images", and "api" for the rest of the API; `times` is of all together.
        """
        fault = _Fault(status, float("inf") if times is None else times)
        assert set(routes.split("|")) <= {"api", "images", "import"}, routes
        with self._lock:
            self._faults |= {(project, kind): fault for kind in routes.split("|")}

    def answer_late(self, project: int, seconds: float) -> None:
        """Delays every answer; what a request changes is changed at once."""
        with self._lock:
            self._faults[project, "answer_late"] = _Fault(seconds=seconds)

    def store_late(self, project: int, seconds: float, status: int | None = 504, times: int = 1) -> None:
        """Answers the next imports at once, with a status or not at all (None), and stores them only later.

        So does a proxy that gives up while the request waits. What cannot be stored by then is dropped.
        """
        with self._lock:
            self._faults[project, "store_late"] = _Fault(status, times, seconds)

    def double_import(self, project: int, times: int = 1, seconds: float = 5) -> None:
        """Stores the next imports twice and answers `seconds` later, though the answer counts each prediction once.

        So does the real one when its SQLite was locked for 5 s and it repeats what it had stored already.
        """
        with self._lock:
            self._faults[project, "double_import"] = _Fault(times=times, seconds=seconds)

    def heal(self, project: int | None = None) -> None:
        """Removes all faults, of one project or of all; imports that wait to be stored still are."""
        with self._lock:
            self._faults = {key: fault for key, fault in self._faults.items() if project not in (None, key[0])}

    def answer(self, method: str, path: str, authorization: str | None, body: bytes) -> tuple[Reply | None, float]:
        """Returns the reply to a request, None for none, and the seconds by which it is late."""
        url = urlsplit(path)
        with self._lock:
            self.requests.append((method, path))
            matches = ((re.fullmatch(route, f"{method} {url.path}"), serve) for route, serve in self._routes.items())
            match, serve = next(((match, serve) for match, serve in matches if match), (None, None))
            if not (match and serve):
                return (404, {"detail": "no such route"}), 0
            if authorization != f"Token {self._key}" and url.path.rstrip("/") != "/api/version":
                return (401, {"detail": "Invalid token."}), 0
            params = dict(parse_qsl(url.query)) | match.groupdict()
            project = self._find_project(params)
            delay = 0.0
            try:
                kind = "images" if "upload" in url.path else "import" if "import" in url.path else "api"
                if fault := self._take_fault(project, kind):
                    raise _Refusal(fault.status, "told to fail")
                doubled = self._faults.get((project, "double_import")) if kind == "import" else None
                times = doubled.times if doubled else 0
                reply = serve(_Request(project, params, body))
                delay = doubled.seconds if doubled and doubled.times < times else 0
            except _Refusal as refusal:
                status, reason = refusal.args
                reply = (status, {"detail": reason})
            late = self._take_fault(project, "answer_late")
            return reply, max(delay, late.seconds if late else 0)

    def _find_project(self, params: Mapping[str, str]) -> int:
        """Finds the project that a request is about; 0 if there is none."""
        if "project" in params:
            return int(params["project"])
        if "view" in params:
            return self._views.get(int(params["view"]), (0, False))[0]
        prediction = self._predictions.get(int(params.get("prediction", 0)))
        task = prediction.task if prediction else int(params.get("task", 0))
        return next((number for number, project in self._projects.items() if task in project.tasks), 0)

    def _take_fault(self, project: int, kind: str) -> _Fault | None:
        fault = self._faults.get((project, kind))
        if fault is None or fault.times <= 0:
            return None
        fault.times -= 1
        return fault

    def _get_project(self, number: int) -> _Project:
        if number not in self._projects:
            raise _Refusal(404, "No Project matches the given query.")
        return self._projects[number]

    def _delete(self, predictions: Iterable[StoredPrediction]) -> int:
        """Deletes predictions and returns their number."""
        rows = list(predictions)
        for row in rows:
            del self._predictions[row.id], self._by_task[row.task][row.id]
        return len(rows)

    def _show_project(self, request: _Request) -> Reply:
        project = self._get_project(request.project)
        created_at = datetime.fromtimestamp(project.created_at, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        row = {"id": request.project, "label_config": project.label_config, "created_at": created_at}
        return 200, {**row, "task_number": len(project.tasks)}

    def _list_ml_backends(self, request: _Request) -> Reply:
        self._get_project(request.project)
        return 200, []

    def _list_tasks(self, request: _Request) -> Reply:
        params, ids = request.params, self._select_tasks(request)
        size, number = int(params.get("page_size", 0)) or 100, int(params.get("page", 1))
        size = min(size, self.max_page_size or size)
        page = ids[(number - 1) * size : number * size]
        if not page and number != 1:
            raise _Refusal(404, "Invalid page.")
        asks_backend = self.predicts_on_read and params.get("review", "").lower() not in ("true", "1")
        if asks_backend and not all(self._by_task[task] for task in page):
            self.predict_calls += 1
        return 200, {"tasks": [self._show_task(task, request) for task in page], "total": len(ids)}

    def _show_task(self, task: int, request: _Request) -> dict[str, Any]:
        """Returns a task's row, of all fields or only those that `include` names."""
        row = {**self._get_columns(task), "data": self._projects[request.project].tasks[task]}
        if request.params.get("fields") == "all":
            row |= {"annotations": [], "predictions": self._show_predictions(task)}
        row = {name: value for name, value in row.items() if name not in request.params.get("omit", "").split(",")}
        if "include" not in request.params:
            return row
        return {name: row[name] for name in request.params["include"].split(",") if name in row}

    def _show_predictions(self, task: int) -> list[dict[str, Any]]:
        return [vars(prediction) for prediction in self._by_task[task].values()]

    def _get_columns(self, task: int) -> dict[str, Any]:
        """Returns the columns of the Data Manager that may be filtered by their value."""
        count = len(self._by_task[task])
        return {"id": task, "total_annotations": 0, "cancelled_annotations": 0, "total_predictions": count}

    def _select_tasks(self, request: _Request) -> list[int]:
        """Returns the ids of the tasks that pass a view or, without one, the query; in their order."""
        if "view" in request.params:
            return self._select_tasks_of_view(int(request.params["view"]), request.project)
        tasks = list(self._get_project(request.project).tasks)
        query = json.loads(unquote(request.params.get("query", "{}")))
        filters = query.get("filters") or {"items": []}
        tests = [self._make_test(item) for item in filters["items"]]
        combine = any if filters.get("conjunction") == "or" else all
        passed = [task for task in tasks if not tests or combine(test(task) for test in tests)]
        ordering = query.get("ordering") or ["tasks:id"]
        if ordering[0].replace("-", "") != "tasks:id":
            raise _Refusal(400, f"the stand-in has no ordering {ordering}")
        return passed[::-1] if "-" in ordering[0] else passed

    def _select_tasks_of_view(self, view: int, project: int) -> list[int]:
        if view not in self._views:
            raise _Refusal(404, "No View matches the given query.")
        of_project, without_predictions = self._views[view]
        if of_project != project:
            raise _Refusal(500, "Project and View mismatch")
        return [task for task in self._get_project(project).tasks if not (without_predictions and self._by_task[task])]

    def _make_test(self, item: Mapping[str, Any]) -> Callable[[int], bool]:
        """Returns a function that tells whether a task, given by its id, passes a filter of the Data Manager."""
        column, name, value = item["filter"].removeprefix("filter:tasks:"), item["operator"], item["value"]
        if column == "predictions_model_versions" and name in ("contains", "not_contains"):
            return lambda task: self._has_version(task, value) == (name == "contains")
        if column not in self._get_columns(0) or name not in COMPARISONS:
            raise _Refusal(400, f"the stand-in has no filter {column} {name}")
        compare, expected = COMPARISONS[name], set(value) if name == "in_list" else value
        return lambda task: compare(self._get_columns(task)[column], expected)

    def _has_version(self, task: int, parts: Iterable[str]) -> bool:
        """Returns whether a prediction's version has one of some parts: with SQLite, in upper or lower case."""
        versions = [row.model_version.lower() for row in self._by_task[task].values()]
        return any(part.lower() in version for part in parts for version in versions)

    def _import_predictions(self, request: _Request) -> Reply | None:
        self._get_project(request.project)
        rows = json.loads(request.body)
        late = self._take_fault(request.project, "store_late")
        if late is None:
            self._store(request.project, rows)
            return 201, {"created": len(rows)}
        timer = threading.Timer(late.seconds, self._store_or_drop, (request.project, rows))
        timer.daemon = True
        timer.start()
        self._timers.append(timer)
        return (late.status, {"detail": "told to store late"}) if late.status else None

    def _store(self, project: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Stores all predictions or none."""
        tasks = self._get_project(project).tasks
        if unknown := [row.get("task") for row in rows if row.get("task") not in tasks]:
            raise _Refusal(400, f"Invalid task ID {unknown[0]} - task not found in project")
        for row in [*rows, *rows] if self._take_fault(project, "double_import") else rows:
            fields = (row["task"], row.get("model_version", "undefined"), row.get("score"), row.get("result"))
            prediction = StoredPrediction(next(self._numbers), project, *fields)
            self._predictions[prediction.id] = self._by_task[prediction.task][prediction.id] = prediction
        self.import_sizes.append((project, len(rows)))

    def _store_or_drop(self, project: int, rows: Sequence[Mapping[str, Any]]) -> None:
        with self._lock, contextlib.suppress(_Refusal):
            self._store(project, rows)

    def _list_predictions(self, request: _Request) -> Reply:
        if request.project not in self._projects:
            raise _Refusal(400, "Select a valid choice. That choice is not one of the available choices.")
        if "task" in request.params:
            return 200, self._show_predictions(int(request.params["task"]))
        return 200, [vars(row) for row in self._predictions.values() if row.project == request.project]

    def _delete_prediction(self, request: _Request) -> Reply:
        prediction = self._predictions.get(int(request.params["prediction"]))
        if prediction is None:
            raise _Refusal(404, "No Prediction matches the given query.")
        self._delete([prediction])
        return 204, None

    def _run_action(self, request: _Request) -> Reply:
        tasks = self._get_project(request.project).tasks
        if request.params.get("id") != "delete_tasks_predictions":
            raise _Refusal(500, f"Can't find {request.params.get('id')!r} in registered actions")
        selected = json.loads(request.body)["selectedItems"]
        # The real one, too, takes an empty list for all tasks.
        included = tasks if selected["all"] else selected.get("included") or tasks
        chosen = set(tasks).intersection(included) - set(selected.get("excluded") or ())
        count = self._delete([row for task in chosen for row in self._by_task[task].values()])
        return 200, {"processed_items": count, "detail": f"Deleted {count} predictions"}

    def _count_model_versions(self, request: _Request) -> Reply:
        self._get_project(request.project)
        return 200, Counter(row.model_version for row in self.predictions[::-1] if row.project == request.project)

    def _delete_model_version(self, request: _Request) -> Reply:
        tasks, version = self._get_project(request.project).tasks, json.loads(request.body).get("model_version")
        if not version:
            raise _Refusal(400, "model_version param is required")
        rows = [row for task in tasks for row in self._by_task[task].values() if row.model_version == version]
        return 200, {"deleted_predictions": self._delete(rows)}

    def _show_image(self, request: _Request) -> Reply:
        if request.project not in self._projects:  # so the real one fails when the image went with its project
            raise _Refusal(500, "'NoneType' object has no attribute 'has_permission'")
        return 200, self.image


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # server_close waits for the requests in progress
    request_queue_size = 128

    def __init__(self, stand_in: LabelStudioStandIn) -> None:
        self.stand_in, self.stopping = stand_in, threading.Event()
        super().__init__(("127.0.0.1", stand_in.port), _Exchange)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Exchange(BaseHTTPRequestHandler):
    """A request and its answer."""

    server: _Server
    timeout = 10  # s for each read; `stop` waits that long for a client that sends nothing

    def do_GET(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            authorization = self.headers.get("Authorization")
            reply, seconds = self.server.stand_in.answer(self.command, self.path, authorization, body)
            if reply is None or self.server.stopping.wait(seconds):
                return
            status, content = reply
            if isinstance(content, bytes):
                send_reply(self, content, status, Content_Type="image/jpeg")
            else:
                text = "" if content is None else json.dumps(content)
                send_reply(self, text.encode(), status, Content_Type="application/json")

    do_POST = do_DELETE = do_GET

    def log_message(self, *args: object) -> None:
        pass
