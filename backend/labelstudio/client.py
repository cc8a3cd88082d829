"""Label Studio's REST API: which credentials open it.

Label Studio knows two kinds of key. A legacy token is sent as it is. A personal access token is a refresh token (a JWT)
that must be exchanged for an access token that lives five minutes; sent itself, it is refused.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import NewConnectionError
from urllib3.util import parse_url

from backend.errors import LabelStudioAuthError, LabelStudioError, LabelStudioNotFound, LabelStudioUnavailable

TIMEOUT = (3, 10)  # seconds to connect, and between bytes
IMPORT_TIMEOUT = (3, 300)  # of a project of 100,000 tasks with SQLite about a minute
PAGE = 100  # tasks
RENEW_BEFORE = 60  # seconds before an access token ends


def parse_origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a URL: what must be equal before a credential is sent.

    Raises:
        ValueError: it is not a URL.
    """
    parts = parse_url(url)  # the parser that requests connects by: another may read another host into an odd URL
    scheme = parts.scheme or ""
    return scheme, (parts.host or "").lower(), parts.port or {"http": 80, "https": 443}.get(scheme, 0)


class LabelStudioClient:
    """Label Studio as seen from here; safe to share between threads."""

    def __init__(self, url: str, api_key: str) -> None:
        self.url = url.rstrip("/")
        self._api_key = api_key
        self._is_refresh_token = api_key.count(".") == 2
        self._access_token, self._expires = "", 0.0
        self._lock = threading.Lock()
        self._session = requests.Session()
        self._session.trust_env = False  # as for pictures: no proxy and no .netrc of the shell

    def address(self, path: str) -> str:
        """The URL of a path on Label Studio; behind a prefix Label Studio writes some paths with it, some without."""
        prefix = urlsplit(self.url).path
        return self.url.removesuffix(prefix) + path if prefix and path.startswith(f"{prefix}/") else self.url + path

    def headers(self, url: str) -> dict[str, str]:
        """The headers for a request to `url`: credentials for Label Studio's own origin, none for any other.

        Raises:
            LabelStudioError: the personal access token could not be exchanged.
        """
        if not (self.url and self._api_key) or parse_origin(url) != parse_origin(self.url):
            return {}
        if not self._is_refresh_token:
            return {"Authorization": f"Token {self._api_key}"}
        return {"Authorization": f"Bearer {self._fresh_access_token()}"}

    def renew(self, headers: Mapping[str, str]) -> bool:
        """Whether a request that was refused with these headers may be sent again, with a new access token."""
        refused = headers.get("Authorization", "").removeprefix("Bearer ")
        if not (refused and self._is_refresh_token):
            return False
        with self._lock:
            if refused == self._access_token:  # else another thread has renewed it already
                self._expires = 0.0
        return True

    def _fresh_access_token(self) -> str:
        with self._lock:
            if time.time() > self._expires - RENEW_BEFORE:
                self._access_token = self._exchange()
                self._expires = _expiry(self._access_token)
            return self._access_token

    @property
    def _shown(self) -> str:
        """The address without a user and password that it may hold."""
        return "{}://{}:{}".format(*parse_origin(self.url))

    def _exchange(self) -> str:
        reply = self._send("POST", "/api/token/refresh", {}, json={"refresh": self._api_key})
        if reply.status_code >= 500 or reply.status_code == 429:
            raise LabelStudioUnavailable(f"Label Studio cannot answer now (HTTP {reply.status_code})", reached=False)
        if reply.status_code != 200:
            raise LabelStudioAuthError(
                f"Label Studio refused LABEL_STUDIO_API_KEY (HTTP {reply.status_code}); "
                "make a new personal access token in Account & Settings"
            )
        try:
            return str(reply.json()["access"])
        except (ValueError, KeyError, TypeError):
            raise LabelStudioError(f"{self._shown} gave no token; is it Label Studio's address?") from None

    def get_task_data(self, project: str, task: int) -> dict[str, Any] | None:
        """A task's data as it was imported, which does not make Label Studio predict it; None if there is no such task.

        Raises:
            LabelStudioError: Label Studio refused.
            LabelStudioUnavailable: it did not answer.
        """
        query = {"filters": {"conjunction": "and", "items": [_is("id", "equal", task)]}}
        options = {"project": project, "fields": "all", "resolve_uri": "false", "query": json.dumps(query)}
        tasks = self._call("GET", "/api/tasks", params=options)["tasks"]
        return tasks[0]["data"] if tasks else None

    def get_first_task(self, project: str) -> dict[str, Any] | None:
        """Id and data of a task of the project, if it has any; raises as `task_data`."""
        options = {"project": project, "fields": "all", "resolve_uri": "false", "page_size": 1}
        tasks = self._call("GET", "/api/tasks", params=options)["tasks"]
        return {"id": int(tasks[0]["id"]), "data": tasks[0]["data"]} if tasks else None

    def label_config(self, project: str) -> str:
        """The labeling config of a project; raises as `task_data`."""
        return str(self._call("GET", f"/api/projects/{project}")["label_config"])

    def created(self, project: str) -> int:
        """When a project was made, in seconds since the epoch; raises as `task_data`."""
        text = str(self._call("GET", f"/api/projects/{project}")["created_at"])
        return int(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp())

    def iter_annotated_tasks(self, project: str) -> Iterator[dict[str, Any]]:
        """Id, data and annotations of each task that has any, skipped ones last; raises as `task_data`."""
        yield from self._tasks(project, [_is("total_annotations", "greater", 0)])
        yield from self._tasks(
            project, [_is("total_annotations", "equal", 0), _is("cancelled_annotations", "greater", 0)]
        )

    def _tasks(self, project: str, items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        last = 0
        while page := self._page(project, items, last)["tasks"]:
            yield from ({key: task[key] for key in ("id", "data", "annotations")} for task in page)
            last = page[-1]["id"]

    def _page(self, project: str, items: list[dict[str, Any]], after: int, size: int = PAGE) -> Any:
        """The first tasks behind a number that fit all `items`; not by page: pages shift while people work."""
        filters = {"conjunction": "and", "items": [*items, _is("id", "greater", after)]}
        query = json.dumps({"filters": filters, "ordering": ["tasks:id"]})
        options = {"project": project, "fields": "all", "resolve_uri": "false", "page_size": size, "query": query}
        return self._call("GET", "/api/tasks", params=options)

    def list_tasks_without_prediction(
        self, project: str, version: str, after: int, numbers: Sequence[int] = ()
    ) -> list[dict[str, Any]]:
        """Id, data, annotations and `versions` of the next tasks without a prediction of a version; as `task_data`."""
        return [_with_versions(task) for task in self._page(project, _without(version, numbers), after)["tasks"]]

    def count_tasks_without_prediction(self, project: str, version: str, numbers: Sequence[int] = ()) -> int:
        """How many tasks have no prediction of a version; raises as `task_data`."""
        return int(self._page(project, _without(version, numbers), 0, 1)["total"])

    def list_tasks_of_view(self, view: str, page: int) -> list[dict[str, Any]]:
        """A page, from 1, of a tab of the Data Manager, as `page_without`; empty behind the last."""
        options = {"view": view, "fields": "all", "resolve_uri": "false", "page_size": PAGE, "page": page}
        try:
            tasks = self._call("GET", "/api/tasks", params=options)["tasks"]
        except LabelStudioNotFound:
            return []
        return [_with_versions(task) for task in tasks]

    def list_predictions(self, task: int) -> list[dict[str, Any]]:
        """The predictions of a task; raises as `task_data`."""
        return list(self._call("GET", "/api/predictions", params={"task": task}))

    def delete_prediction(self, number: int) -> None:
        """Deletes a prediction; raises as `task_data`."""
        self._call("DELETE", f"/api/predictions/{number}")

    def list_ml_backends(self, project: str) -> list[dict[str, Any]]:
        """The models that are connected to a project; raises as `task_data`."""
        return list(self._call("GET", "/api/ml", params={"project": project}))

    def get_version(self) -> str:
        """Label Studio's version; raises as `task_data`."""
        return str(self._call("GET", "/api/version")["release"])

    def whoami(self) -> str:
        """Whose key it is; raises as `task_data`."""
        return str(self._call("GET", "/api/current-user/whoami")["email"])

    def get_token_type(self) -> str:
        """In Label Studio's words."""
        kind = "personal access token" if self._is_refresh_token else "legacy token"
        return kind if self._api_key else "no key"

    def filter_existing(self, project: str, numbers: Sequence[int], without: str = "") -> set[int]:
        """Those of these tasks that there are, and that have no prediction of the version `without`; as `task_data`."""
        found: set[int] = set()
        for start in range(0, len(numbers), PAGE):
            among = numbers[start : start + PAGE]
            items = _without(without, among) if without else [_is("id", "in_list", list(among))]
            found |= {int(task["id"]) for task in self._page(project, items, 0)["tasks"]}
        return found

    def import_predictions(self, project: str, predictions: Sequence[Mapping[str, Any]]) -> int:
        """Stores predictions, all or none, and says how many; whatever is there already stays as well.

        Raises:
            LabelStudioError: Label Studio refused them.
            LabelStudioUnavailable: it did not answer; they may be stored or not.
        """
        path = f"/api/projects/{project}/import/predictions"
        return int(self._call("POST", path, json=predictions, timeout=IMPORT_TIMEOUT)["created"])

    def _call(self, method: str, path: str, **options: Any) -> Any:
        headers = self.headers(self.url)
        reply = self._send(method, path, headers, **options)
        if reply.status_code == 401 and self.renew(headers):
            reply = self._send(method, path, self.headers(self.url), **options)
        if reply.status_code >= 500 or reply.status_code == 429:
            raise LabelStudioUnavailable(f"Label Studio cannot answer now (HTTP {reply.status_code})")
        if reply.status_code in (401, 403):
            raise LabelStudioAuthError(
                f"Label Studio refused LABEL_STUDIO_API_KEY for {path} (HTTP {reply.status_code})"
            )
        if reply.status_code == 404:
            raise LabelStudioNotFound(f"Label Studio has no {path}")
        if reply.status_code == 204:
            return None
        if not reply.ok:
            raise LabelStudioError(
                f"Label Studio refused {method} {path} (HTTP {reply.status_code}): {reply.text[:200]}"
            )
        try:
            return reply.json()
        except ValueError:
            raise LabelStudioUnavailable(f"{self._shown} answered {path} with something else than JSON") from None

    def _send(self, method: str, path: str, headers: dict[str, str], **options: Any) -> requests.Response:
        options = {"timeout": TIMEOUT, "allow_redirects": False, "headers": headers, **options}
        try:
            return self._session.request(method, self.url + path, **options)
        except requests.RequestException as error:
            text = f"Label Studio does not answer at {self._shown} ({type(error).__name__})"
            raise LabelStudioUnavailable(text, reached=not is_connect_failure(error)) from None


def _is(column: str, operator: str, value: Any, kind: str = "Number") -> dict[str, Any]:
    """A filter of Label Studio's Data Manager."""
    return {"filter": f"filter:tasks:{column}", "operator": operator, "type": kind, "value": value}


def _without(version: str, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Filters for tasks without a prediction of a version, of these numbers if there are any."""
    among = [_is("id", "in_list", list(numbers))] if numbers else []
    return [*among, _is("predictions_model_versions", "not_contains", [version], "List")]


def _with_versions(task: Mapping[str, Any]) -> dict[str, Any]:
    versions = [str(row["model_version"]) for row in task.get("predictions") or []]
    return {**{key: task[key] for key in ("id", "data", "annotations")}, "versions": versions}


def is_connect_failure(error: Exception) -> bool:
    """Whether a request failed before anything was sent."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(error, requests.ConnectTimeout) or isinstance(reason, NewConnectionError)


def _expiry(token: str) -> float:
    """Seconds since the epoch at which a JWT ends; five minutes from now where it does not say."""
    try:
        payload = token.split(".")[1]
        return float(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"])
    except (ValueError, KeyError, IndexError, TypeError):
        return time.time() + 300
