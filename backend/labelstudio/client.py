"""Label Studio's REST API: authentication, tasks, predictions.

Label Studio has two kinds of API key. A legacy token is sent as it is. A personal access token is a refresh token (a
JWT) that has to be exchanged for an access token with a lifetime of five minutes; sent directly, it is refused.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import NewConnectionError
from urllib3.util import parse_url

from backend.errors import LabelStudioAuthError, LabelStudioError, LabelStudioNotFound, LabelStudioUnavailable

TIMEOUT = (3, 10)  # seconds to connect, and between bytes
IMPORT_TIMEOUT = 300  # seconds; with SQLite, an import into a project of 100,000 tasks takes about a minute
TASKS_PER_PAGE = 500  # with more, the ids of a filter make a URL that proxies refuse
TASKS_OF_VIEW = 1_000_000  # per page
# `include` would reduce annotations to their ids, though not predictions.
TASK_FIELDS: dict[str, Any] = {"fields": "all", "omit": "predictions"}
PREDICTION_FIELDS: dict[str, Any] = {"fields": "all", "include": "id,predictions"}
DELETE_THREADS = 4
NOT_CARRIED_OUT = (408, 425, 429)  # statuses of requests that are to be repeated
GATEWAY_TIMEOUT = 504  # of a proxy; Label Studio is still at the request
RENEWAL_MARGIN = 60  # seconds before its expiry at which an access token is renewed
DEFAULT_TOKEN_LIFETIME = 300  # seconds, of an access token that does not state its expiry

Task = dict[str, Any]
Filter = dict[str, Any]  # one condition of the Data Manager


class Origin(NamedTuple):
    """Scheme, host and port: a credential is only sent to a URL of the same origin."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}"


def parse_origin(url: str) -> Origin:
    """Reads the origin of a URL; the port defaults to that of the scheme.

    Raises:
        ValueError: it is not a URL.
    """
    parts = parse_url(url)  # the parser that requests uses to connect: another may read another host from an odd URL
    scheme = parts.scheme or ""
    return Origin(scheme, (parts.host or "").lower(), parts.port or {"http": 80, "https": 443}.get(scheme, 0))


class LabelStudioClient:
    """A client of one Label Studio instance; safe to share between threads.

    Every method that sends a request raises:
        LabelStudioUnavailable: Label Studio did not answer, or cannot serve requests now.
        LabelStudioAuthError: it refused the API key.
        LabelStudioNotFound: the project, task or view does not exist.
        LabelStudioError: it refused the request for another reason.
    """

    def __init__(self, url: str, api_key: str) -> None:
        self.url = url.rstrip("/")
        self._api_key = api_key
        self._is_refresh_token = api_key.count(".") == 2
        self._access_token, self._expires_at = "", 0.0
        self._lock = threading.Lock()
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy and no .netrc of the environment, as for images

    def url_for(self, path: str) -> str:
        """Returns the URL of a path on Label Studio; the path may include the URL's own prefix or lack it."""
        prefix = urlsplit(self.url).path
        return self.url.removesuffix(prefix) + path if prefix and path.startswith(f"{prefix}/") else self.url + path

    def get_token_type(self) -> str:
        """Returns the kind of API key in Label Studio's words."""
        if not self._api_key:
            return "no key"
        return "personal access token" if self._is_refresh_token else "legacy token"

    def auth_headers(self, url: str) -> dict[str, str]:
        """Returns the headers that authenticate a request to `url`: empty for any origin but Label Studio's own.

        Raises:
            LabelStudioError: the personal access token could not be exchanged.
            ValueError: `url` is not a URL.
        """
        if not (self.url and self._api_key) or parse_origin(url) != parse_origin(self.url):
            return {}
        if not self._is_refresh_token:
            return {"Authorization": f"Token {self._api_key}"}
        with self._lock:
            if time.time() > self._expires_at - RENEWAL_MARGIN:
                self._access_token = self._exchange_refresh_token()
                self._expires_at = _read_expiry(self._access_token)
            return {"Authorization": f"Bearer {self._access_token}"}

    def renew_token(self, headers: Mapping[str, str]) -> bool:
        """Discards the access token in `headers`, which Label Studio refused.

        Returns:
            True if the request may be repeated with new `auth_headers`; False if the key cannot be renewed.
        """
        refused = headers.get("Authorization", "").removeprefix("Bearer ")
        if not (refused and self._is_refresh_token):
            return False
        with self._lock:
            if refused == self._access_token:  # otherwise another thread has renewed it already
                self._expires_at = 0.0
        return True

    def _exchange_refresh_token(self) -> str:
        try:
            reply = self._send("POST", "/api/token/refresh", {}, json={"refresh": self._api_key})
        except LabelStudioUnavailable as error:  # the caller's own request was never sent
            raise LabelStudioUnavailable(str(error), may_have_succeeded=False) from None
        if _is_temporary_failure(reply):
            raise LabelStudioUnavailable(
                f"Label Studio cannot answer now (HTTP {reply.status_code})", may_have_succeeded=False
            )
        if reply.status_code != 200:
            raise LabelStudioAuthError(
                f"Label Studio refused LABEL_STUDIO_API_KEY (HTTP {reply.status_code}); "
                "make a new personal access token in Account & Settings"
            )
        try:
            return str(reply.json()["access"])
        except (ValueError, KeyError, TypeError):
            raise LabelStudioError(
                f"{parse_origin(self.url)} returned no token; is it Label Studio's address?"
            ) from None

    def get_version(self) -> str:
        """Returns Label Studio's version."""
        return str(self._request_json("GET", "/api/version")["release"])

    def whoami(self) -> str:
        """Returns the email address of the user that the API key belongs to."""
        return str(self._request_json("GET", "/api/current-user/whoami")["email"])

    def get_label_config(self, project: str) -> str:
        """Returns the labeling config of a project."""
        return str(self._request_json("GET", f"/api/projects/{project}")["label_config"])

    def get_project_created_at(self, project: str) -> int:
        """Returns when a project was created, in seconds since the epoch."""
        text = str(self._request_json("GET", f"/api/projects/{project}")["created_at"])
        return int(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp())

    def list_ml_backends(self, project: str) -> list[dict[str, Any]]:
        """Returns the models connected to a project."""
        return list(self._request_json("GET", "/api/ml", params={"project": project}))

    def get_task_data(self, project: str, task_ids: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Returns the data of tasks as imported, by task; without those that the project does not have."""
        rows = self._fetch_tasks_of(project, task_ids, [], include="id,data")
        return {int(row["id"]): row["data"] for row in rows}

    def get_first_task(self, project: str) -> Task | None:
        """Returns `id` and `data` of one task of a project, or None if the project is empty."""
        tasks = self._fetch_tasks(project=project, page_size=1, include="id,data")["tasks"]
        return {"id": int(tasks[0]["id"]), "data": tasks[0]["data"]} if tasks else None

    def iter_annotated_tasks(self, project: str) -> Iterator[Task]:
        """Yields `id`, `data` and `annotations` of each annotated task; those that were only skipped come last."""
        finished = [_make_filter("total_annotations", "greater", 0)]
        skipped = [_make_filter("total_annotations", "equal", 0), _make_filter("cancelled_annotations", "greater", 0)]
        for filters in (finished, skipped):
            last_id = 0
            while tasks := self._fetch_tasks_after(project, filters, last_id, **TASK_FIELDS)["tasks"]:
                yield from map(_to_task, tasks)
                last_id = tasks[-1]["id"]

    def list_tasks_without_prediction(
        self, project: str, model_version: str, after_id: int, task_ids: Sequence[int] = ()
    ) -> list[Task]:
        """Returns the next tasks, by id, that have no prediction of a model version; empty behind the last.

        Args:
            project: id of the project.
            model_version: tasks with a prediction of this version are left out.
            after_id: of the last task that is already known; 0 for the first page.
            task_ids: if given, all of these tasks are considered, and `after_id` is not.

        Returns:
            Tasks with `id`, `data` and `annotations`; without `task_ids` at most `TASKS_PER_PAGE`.
        """
        filters = [_make_missing_prediction_filter(model_version)]
        if task_ids:
            return [_to_task(row) for row in self._fetch_tasks_of(project, task_ids, filters, **TASK_FIELDS)]
        return [_to_task(row) for row in self._fetch_tasks_after(project, filters, after_id, **TASK_FIELDS)["tasks"]]

    def count_tasks_without_prediction(self, project: str, model_version: str) -> int:
        """Counts the tasks without a prediction of a model version."""
        filters = [_make_missing_prediction_filter(model_version)]
        return int(self._fetch_tasks_after(project, filters, 0, page_size=1, include="id")["total"])

    def filter_without_prediction(self, project: str, task_ids: Sequence[int], model_version: str) -> set[int]:
        """Returns which of these tasks exist and lack a prediction of a model version."""
        filters = [_make_missing_prediction_filter(model_version)]
        return {int(row["id"]) for row in self._fetch_tasks_of(project, task_ids, filters, include="id")}

    def list_task_ids_of_view(self, view: str) -> list[int]:
        """Returns the ids of all tasks of a view (a tab of the Data Manager), in its order."""
        ids: dict[int, None] = {}
        for page in itertools.count(1):  # one page, unless Label Studio is configured with smaller ones
            try:
                reply = self._fetch_tasks(view=view, page_size=TASKS_OF_VIEW, page=page, include="id")
            except LabelStudioNotFound:
                if page == 1:
                    raise
                break
            ids |= {int(row["id"]): None for row in reply["tasks"]}
            if len(ids) >= reply["total"]:
                break
        return list(ids)

    def delete_older_predictions(
        self, project: str, task_ids: Sequence[int], model_version: str, model_name: str
    ) -> int:
        """Deletes predictions of a model's other versions from tasks that have one of `model_version`.

        Predictions of other models and of people stay. Label Studio deletes several predictions at once only with all
        of their tasks', or with all of their version's.

        Returns:
            How many were deleted.
        """
        is_of_model = re.compile(rf"{re.escape(model_name)}-[0-9a-f]{{8}}")
        older: list[int] = []
        for row in self._fetch_tasks_of(project, task_ids, [], **PREDICTION_FIELDS):
            versions = {prediction["id"]: str(prediction["model_version"]) for prediction in row["predictions"]}
            if model_version in versions.values():
                older += [
                    number
                    for number, version in versions.items()
                    if version != model_version and is_of_model.fullmatch(version)
                ]
        self._delete_predictions(older)
        return len(older)

    def delete_double_predictions(self, project: str, task_ids: Sequence[int], model_version: str) -> int:
        """Deletes predictions of a version that a task has twice, with the same region ids; returns how many."""
        doubles: list[int] = []
        if self._has_doubles(project, model_version):
            for row in self._fetch_tasks_of(project, task_ids, [], **PREDICTION_FIELDS):
                seen: set[tuple[str, ...]] = set()
                for prediction in sorted(row["predictions"], key=lambda prediction: int(prediction["id"])):
                    regions = tuple(str(region.get("id")) for region in prediction["result"])
                    if str(prediction["model_version"]) == model_version and regions in seen:
                        doubles.append(prediction["id"])
                    elif str(prediction["model_version"]) == model_version:
                        seen.add(regions)
        self._delete_predictions(doubles)
        return len(doubles)

    def _has_doubles(self, project: str, model_version: str) -> bool:
        """Returns whether there are more predictions of a version than tasks with one: two cheap requests."""
        counts = self._request_json("GET", f"/api/projects/{project}/model-versions")
        filters = [_make_filter("predictions_model_versions", "contains", [model_version], "List")]
        tasks = int(self._fetch_tasks_after(project, filters, 0, page_size=1, include="id")["total"])
        return int(counts.get(model_version, 0)) > tasks

    def _delete_predictions(self, prediction_ids: Sequence[int]) -> None:
        with ThreadPoolExecutor(DELETE_THREADS) as pool:
            list(pool.map(self._delete_prediction, prediction_ids))

    def _delete_prediction(self, prediction_id: int) -> None:
        with contextlib.suppress(LabelStudioNotFound):  # deleted meanwhile
            self._request_json("DELETE", f"/api/predictions/{prediction_id}")

    def import_predictions(
        self, project: str, predictions: Sequence[Mapping[str, Any]], timeout: float = IMPORT_TIMEOUT
    ) -> int:
        """Stores predictions, all or none, and returns their number; predictions already there are kept.

        Args:
            project: id of the project.
            predictions: with `task`, `result`, `score` and `model_version`.
            timeout: seconds to wait for the answer.

        Raises:
            LabelStudioError: Label Studio refused the predictions.
            LabelStudioUnavailable: it did not answer; the predictions may be stored or not.
        """
        path = f"/api/projects/{project}/import/predictions"
        options: dict[str, Any] = {"json": predictions, "timeout": (TIMEOUT[0], timeout)}
        return int(self._request_json("POST", path, **options)["created"])

    def _fetch_tasks_of(
        self, project: str, task_ids: Sequence[int], filters: Sequence[Filter], **params: Any
    ) -> Iterator[Any]:
        """Yields the rows of those of these tasks that pass all filters."""
        for start in range(0, len(task_ids), TASKS_PER_PAGE):
            among = _make_filter("id", "in_list", list(task_ids[start : start + TASKS_PER_PAGE]))
            last_id = 0
            while True:  # once, unless Label Studio is configured with smaller pages
                reply = self._fetch_tasks_after(project, [among, *filters], last_id, **params)
                yield from reply["tasks"]
                if not reply["tasks"] or len(reply["tasks"]) >= reply["total"]:
                    break
                last_id = reply["tasks"][-1]["id"]

    def _fetch_tasks_after(
        self,
        project: str,
        filters: Sequence[Filter],
        after_id: int,
        page_size: int = TASKS_PER_PAGE,
        **params: Any,
    ) -> Any:
        """Fetches the first tasks with a larger id that pass all filters.

        Page numbers are not used: pages shift while people work.
        """
        conditions = {"conjunction": "and", "items": [*filters, _make_filter("id", "greater", after_id)]}
        query = json.dumps({"filters": conditions, "ordering": ["tasks:id"]}, separators=(",", ":"))
        return self._fetch_tasks(project=project, page_size=page_size, query=query, **params)

    def _fetch_tasks(self, **params: Any) -> Any:
        """Fetches tasks with their URIs as imported; `include` names the fields, which makes it several times faster.

        Label Studio requests predictions for the tasks that it shows, unless they are read for a review. The path ends
        with a slash: without it, Label Studio refuses long queries.
        """
        return self._request_json("GET", "/api/tasks/", params={"review": "true", "resolve_uri": "false", **params})

    def _request_json(self, method: str, path: str, **options: Any) -> Any:
        """Sends a request with credentials and returns the decoded answer, None if it has no content."""
        headers = self.auth_headers(self.url)
        reply = self._send(method, path, headers, **options)
        if reply.status_code == 401 and self.renew_token(headers):
            reply = self._send(method, path, self.auth_headers(self.url), **options)
        status = reply.status_code
        if _is_temporary_failure(reply):
            raise LabelStudioUnavailable(
                f"Label Studio cannot answer now (HTTP {status})",
                may_have_succeeded=status not in NOT_CARRIED_OUT,
                has_answered=status != GATEWAY_TIMEOUT,
            )
        if status in (401, 403):
            raise LabelStudioAuthError(f"Label Studio refused LABEL_STUDIO_API_KEY for {path} (HTTP {status})")
        if status == 404:
            raise LabelStudioNotFound(f"Label Studio has no {path}")
        if status == 204:
            return None
        if not reply.ok:
            raise LabelStudioError(f"Label Studio refused {method} {path} (HTTP {status}): {_shorten(reply.text)}")
        try:
            return reply.json()
        except ValueError:
            raise LabelStudioUnavailable(
                f"{parse_origin(self.url)} answered {path} with something other than JSON"
            ) from None

    def _send(self, method: str, path: str, headers: dict[str, str], **options: Any) -> requests.Response:
        options = {"timeout": TIMEOUT, "allow_redirects": False, "headers": headers, **options}
        try:
            return self._session.request(method, self.url + path, **options)
        except requests.RequestException as error:
            # The origin only: the URL itself may hold a user and a password.
            text = f"Label Studio does not answer at {parse_origin(self.url)} ({type(error).__name__})"
            raise LabelStudioUnavailable(text, may_have_succeeded=not is_connect_failure(error)) from None


def is_connect_failure(error: Exception) -> bool:
    """Returns whether a request failed before anything was sent."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(error, requests.ConnectTimeout) or isinstance(reason, NewConnectionError)


def _is_temporary_failure(reply: requests.Response) -> bool:
    return reply.status_code >= 500 or reply.status_code in NOT_CARRIED_OUT


def _shorten(text: str) -> str:
    """Shortens an error text: the refusal of an import begins with the item and ends with the reason."""
    return text if len(text) <= 300 else f"{text[:100]} … {text[-200:]}"


def _make_filter(column: str, operator: str, value: Any, value_type: str = "Number") -> Filter:
    """Builds one condition in the format of Label Studio's Data Manager."""
    return {"filter": f"filter:tasks:{column}", "operator": operator, "type": value_type, "value": value}


def _make_missing_prediction_filter(model_version: str) -> Filter:
    """Builds the filter for tasks without a prediction of a model version."""
    return _make_filter("predictions_model_versions", "not_contains", [model_version], "List")


def _to_task(row: Mapping[str, Any]) -> Task:
    """Keeps `id`, `data` and `annotations` of a row of the API."""
    return {key: row[key] for key in ("id", "data", "annotations")}


def _read_expiry(token: str) -> float:
    """Reads the expiry of a JWT in seconds since the epoch; `DEFAULT_TOKEN_LIFETIME` from now if it states none."""
    try:
        payload = token.split(".")[1]
        return float(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"])
    except (ValueError, KeyError, IndexError, TypeError):
        return time.time() + DEFAULT_TOKEN_LIFETIME
