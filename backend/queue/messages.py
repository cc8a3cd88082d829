"""The messages that travel through Redis: chunks of tasks to the workers, and their answers back.

Every message carries the number of its format and refuses unknown fields, so a process of another version of the
backend fails loudly instead of losing them.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, TypeAdapter, ValidationError

from backend.errors import BackendError, MessageError
from backend.labelstudio.labeling_config import STRICT, Plan
from backend.labelstudio.targets import Prompt


class Message(BaseModel):
    """Base of the messages: frozen, strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format: Literal[2] = 2


@dataclass(frozen=True)
class ChunkTask:
    """One task of a chunk: its id, the fields of its data that the plan reads, and what the annotator typed."""

    id: Any
    data: dict[str, Any]
    prompt: Prompt | None

    __pydantic_config__: ClassVar = STRICT


class VersionId(BaseModel):
    """The name of a trained version: the project that it was trained for, and its id there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    project: str
    id: str


class Chunk(Message):
    """The tasks of one job, with all that a worker needs to answer them."""

    tasks: tuple[ChunkTask, ...]
    plan: Plan
    model_version: str
    checkpoint: str  # fingerprint of the checkpoint that the worker must serve
    version: VersionId | None  # whose weights to use; None: those of the checkpoint

    @functools.cached_property
    def payload(self) -> dict[str, Any]:
        """The chunk as plain JSON; the chunks of one request share the plan's."""
        return {**self.model_dump(exclude={"plan"}), "plan": self.plan.payload}

    @functools.cached_property
    def id(self) -> str:
        """The fingerprint of the content, which names the job: equal chunks share one job."""
        return hashlib.sha256(json.dumps(self.payload, sort_keys=True).encode()).hexdigest()


class Prediction(BaseModel):
    """A task's regions as Label Studio stores them, the mean of their scores (0..1), and the model version."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    result: list[dict[str, Any]]
    score: float
    model_version: str


class ErrorDetail(BaseModel):
    """An error's code, which programs read, its text, which people read, and whether a later attempt may succeed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str
    detail: str
    is_retryable: bool

    @classmethod
    def from_error(cls, error: BackendError) -> ErrorDetail:
        """Makes the details of an error."""
        return cls(code=error.code, detail=str(error), is_retryable=error.is_retryable)


class TaskError(BaseModel):
    """The answer for a task without a prediction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    error: ErrorDetail

    @classmethod
    def from_error(cls, error: BackendError) -> TaskError:
        """Makes the answer for a task that failed with this error."""
        return cls(error=ErrorDetail.from_error(error))


def _tag_answer(answer: Any) -> str:
    is_error = "error" in answer if isinstance(answer, Mapping) else isinstance(answer, TaskError)
    return "error" if is_error else "prediction"


Answer = Annotated[
    Annotated[Prediction, Tag("prediction")] | Annotated[TaskError, Tag("error")], Discriminator(_tag_answer)
]
ANSWER: TypeAdapter[Answer] = TypeAdapter(Answer)


def dump_answer(answer: Answer) -> dict[str, Any]:
    """Returns an answer as Label Studio gets it: what may be tried again is the backend's own concern."""
    return answer.model_dump(exclude={"error": {"is_retryable"}})


class ChunkAnswers(Message):
    """The answers of a chunk: one for each of its tasks, in their order."""

    answers: list[Answer]


class TrainingRequest(Message):
    """A training of one project: what it may change (the setting TRAIN), and a name that no other training has."""

    project: str
    train: str
    run: str


AnyMessage = TypeVar("AnyMessage", bound=Message)


def read_message(kind: type[AnyMessage], payload: Any) -> AnyMessage:
    """Reads a message from plain JSON.

    Raises:
        MessageError: it is of another format, or a field is missing, unknown or of the wrong type.
    """
    reason = "it has no format number"
    if isinstance(payload, Mapping) and "format" in payload:
        try:
            return kind.model_validate(payload)
        except ValidationError as error:
            reason = describe_validation_error(error)
    raise MessageError(
        f"a {kind.__name__} in Redis cannot be read ({reason}); "
        "run the same version of the backend everywhere, and upgrade with an empty queue"
    )


def describe_validation_error(error: ValidationError) -> str:
    """Describes the first thing that is wrong: the field and why, without its value, which may be a secret."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(map(str, first["loc"]))
    return f"{field}: {first['msg']}" if field else first["msg"]
