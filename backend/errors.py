"""All errors that the backend raises deliberately.

BackendError                      500  internal
├── SettingsError                 500  settings
├── BadRequest                    400  bad_request
├── Unauthorized                  401  unauthorized
├── NotFound                      404  not_found
├── RequestTooLarge               413  request_too_large
├── LabelingConfigError           422  labeling_config
├── ImageError                    422  image
│   └── ImageUnavailable          422  image
├── CheckpointError               500  checkpoint
├── LabelStudioError              502  label_studio
│   ├── LabelStudioAuthError      502  label_studio_key
│   ├── LabelStudioNotFound       502  label_studio_missing
│   └── LabelStudioUnavailable    503  label_studio_away
├── QueueUnavailable              503  queue_unavailable
├── Overloaded                    503  overloaded
├── WorkerDied                    500  worker_died
├── CannotTrain                   500  cannot_train
├── DiskFull                      500  disk_full
├── MessageError                  500  message
└── NotReady                      503  not_ready

Each class carries its HTTP status, its code, and whether a later attempt may succeed. Users read the message: it says
what to do and never holds a secret.
"""

from __future__ import annotations

from typing import ClassVar


class BackendError(Exception):
    """Base class of all deliberate errors; `str(error)` is the detail that users read.

    Attributes:
        is_retryable: nothing is wrong with the request itself, so a later attempt may succeed.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    is_retryable: ClassVar[bool] = False

    def to_dict(self) -> dict[str, str]:
        """Returns code and detail, the form in which an error crosses the queue and HTTP."""
        return {"code": self.code, "detail": str(self)}


class SettingsError(BackendError):
    """A setting is invalid or does not fit this machine; the program exits with code 2."""

    code = "settings"


class BadRequest(BackendError):
    """The request is not what Label Studio sends."""

    status, code = 400, "bad_request"


class Unauthorized(BackendError):
    """Basic auth is enabled and the credentials are missing or wrong."""

    status, code = 401, "unauthorized"


class NotFound(BackendError):
    """The route does not exist."""

    status, code = 404, "not_found"


class RequestTooLarge(BackendError):
    """The request body is larger than the limit."""

    status, code = 413, "request_too_large"


class LabelingConfigError(BackendError):
    """The labeling config cannot be served; the message says why."""

    status, code = 422, "labeling_config"


class ImageError(BackendError):
    """The image of a task cannot be fetched or decoded; fails that task only."""

    status, code = 422, "image"


class ImageUnavailable(ImageError):
    """The image cannot be fetched now: the server that holds it refuses, is away or slow."""

    is_retryable = True


class CheckpointError(BackendError):
    """The model cannot be found or loaded."""

    code, is_retryable = "checkpoint", True


class LabelStudioError(BackendError):
    """Label Studio refused a request or did not answer."""

    status, code = 502, "label_studio"


class LabelStudioAuthError(LabelStudioError):
    """Label Studio refused our API key; the request may succeed with another one."""

    code, is_retryable = "label_studio_key", True


class LabelStudioNotFound(LabelStudioError):
    """The project, task or Data Manager tab does not exist in Label Studio."""

    code = "label_studio_missing"


class LabelStudioUnavailable(LabelStudioError):
    """Label Studio did not answer, or cannot serve requests now.

    Attributes:
        may_have_succeeded: Label Studio may have carried out the request; False if it was never sent.
        has_answered: it is not at the request any more; False if only somebody stopped waiting for its answer.
    """

    status, code, is_retryable = 503, "label_studio_away", True

    def __init__(self, detail: str, may_have_succeeded: bool = True, has_answered: bool = False) -> None:
        super().__init__(detail)
        self.may_have_succeeded, self.has_answered = may_have_succeeded, has_answered


class QueueUnavailable(BackendError):
    """Redis does not answer."""

    status, code, is_retryable = 503, "queue_unavailable", True


class Overloaded(BackendError):
    """The maximum number of requests or chunks is already waiting."""

    status, code, is_retryable = 503, "overloaded", True


class WorkerDied(BackendError):
    """One task crashed two worker processes; fails that task only."""

    code = "worker_died"


class CannotTrain(BackendError):
    """A training cannot start or go on; the message says what is missing."""

    code = "cannot_train"


class DiskFull(BackendError):
    """The disk has no room for the images of a training."""

    code = "disk_full"


class NotReady(BackendError):
    """The prediction was not finished by the deadline; it continues in the background."""

    status, code, is_retryable = 503, "not_ready", True


class MessageError(BackendError):
    """A message in Redis was written by another version of the backend."""

    code, is_retryable = "message", True
