"""Chunks and answers for the tests of the queue and of what stands on it."""

from collections.abc import Sequence
from typing import Any

from backend.labelstudio.labeling_config import Plan
from backend.queue.messages import Chunk, ChunkAnswers, ChunkTask
from backend.queue.predict_queue import PREDICT

EMPTY_PLAN = Plan((), (), ())
CHECKPOINT = "c"  # the fingerprint
PREDICT_QUEUE = PREDICT + CHECKPOINT  # the name of the queue of these chunks


def make_chunk(*tasks: dict[str, Any], **changes: Any) -> Chunk:
    """Makes a chunk of tasks, each with `id` and perhaps `data` and `prompt`; its plan is empty unless it is given."""
    fields = {"plan": EMPTY_PLAN, "model_version": "v", "checkpoint": CHECKPOINT, "version": None, **changes}
    rows = [ChunkTask(id=task["id"], data=task.get("data", {}), prompt=task.get("prompt")) for task in tasks]
    return Chunk(tasks=tuple(rows), **fields)


def make_answers(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Makes what a worker returns for a chunk."""
    return ChunkAnswers.model_validate({"answers": answers}).model_dump()


PREDICTION = {"result": [], "score": 0.0, "model_version": "v"}


def make_error(detail: str, code: str = "image", is_retryable: bool = False) -> dict[str, Any]:
    return {"error": {"code": code, "detail": detail, "is_retryable": is_retryable}}
