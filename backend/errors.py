"""Every error that the backend raises on purpose.

BackendError                      500  internal
├── SettingsError                 500  settings
├── BadRequest                    400  bad_request
├── Unauthorized                  401  unauthorized
├── NotFound                      404  not_found
├── RequestTooLarge               413  request_too_large
├── LabelingConfigError           422  labeling_config
├── ImageError                    422  image
├── CheckpointError               500  checkpoint
├── LabelStudioError                   502  label_studio
│   ├── LabelStudioAuthError             502  label_studio_key
│   ├── LabelStudioNotFound             502  label_studio_missing
│   └── LabelStudioUnavailable                503  label_studio_away
├── QueueUnavailable              503  queue_unavailable
├── Overloaded                    503  overloaded
├── WorkerDied                    500  worker_died
├── CannotLearn (fit.py)          500  cannot_learn
├── DiskFull (shelf.py)           500  disk_full
└── NotReady                      503  not_ready

Each class carries its HTTP status and its code. The text says what to do and never holds a secret: users read it.
"""

from __future__ import annotations

from typing import ClassVar


class BackendError(Exception):
    """Base of all errors on purpose; `str(error)` is the detail that users read."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"

    def to_dict(self) -> dict[str, str]:
        """The form in which an error crosses the queue and HTTP: code and detail."""
        return {"code": self.code, "detail": str(self)}


class SettingsError(BackendError):
    """A setting or the machine cannot work as asked; the program ends with exit code 2."""

    code = "settings"


class BadRequest(BackendError):
    """The request is not what Label Studio sends."""

    status, code = 400, "bad_request"


class Unauthorized(BackendError):
    """Basic auth is on and the credentials are missing or wrong."""

    status, code = 401, "unauthorized"


class NotFound(BackendError):
    """There is no such route."""

    status, code = 404, "not_found"


class RequestTooLarge(BackendError):
    """The body is above the limit."""

    status, code = 413, "request_too_large"


class LabelingConfigError(BackendError):
    """The labeling config cannot be served, and why."""

    status, code = 422, "labeling_config"


class ImageError(BackendError):
    """One task's picture cannot be fetched or shown; fails that task only."""

    status, code = 422, "image"


class CheckpointError(BackendError):
    """The model cannot be found or loaded."""

    code = "checkpoint"


class LabelStudioError(BackendError):
    """Label Studio refused us or did not answer."""

    status, code = 502, "label_studio"


class LabelStudioAuthError(LabelStudioError):
    """Label Studio refused our key; another one may open what waits for it."""

    code = "label_studio_key"


class LabelStudioNotFound(LabelStudioError):
    """Label Studio has no such thing: the number of a project, a task or a tab is wrong."""

    code = "label_studio_missing"


class LabelStudioUnavailable(LabelStudioError):
    """Label Studio did not answer, or cannot now; where it was `reached`, it may have done what it was asked."""

    status, code = 503, "label_studio_away"

    def __init__(self, detail: str, reached: bool = True) -> None:
        super().__init__(detail)
        self.reached = reached


class QueueUnavailable(BackendError):
    """Redis does not answer."""

    status, code = 503, "queue_unavailable"


class Overloaded(BackendError):
    """As many requests or chunks are waiting as may."""

    status, code = 503, "overloaded"


class WorkerDied(BackendError):
    """A worker process ended over one task, twice; fails that task only."""

    code = "worker_died"


class NotReady(BackendError):
    """The prediction was not finished by the deadline; it goes on in the background."""

    status, code = 503, "not_ready"
