"""Feedback from annotators: what they made of the predicted boxes, and the annotations that a project has.

A worker records how many boxes it predicted for a task. When a webhook event brings an annotation of that task,
`count_outcomes` compares the two, and `AnnotationLog` adds the result to the project's numbers.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from redis import Redis
from redis.exceptions import RedisError

from backend.labelstudio.regions import read_label
from backend.queue.messages import Answer, ChunkTask, Prediction
from backend.queue.redis import redis_errors

PREDICTED_KEY = "gdino:projects:predicted:"  # + project -> hash: task -> JSON: number of predicted boxes by label
PREDICTED_TTL = 90 * 24 * 3600  # s since the project's last prediction
MAX_PREDICTED_TASKS = 200_000  # tasks of one project; no more are recorded until the key expires

ANNOTATIONS_KEY = "gdino:evidence:"  # + project -> hash: annotation -> JSON: task, updated_at, is_deleted, boxes
ANNOTATIONS_TTL = 90 * 24 * 3600  # s since the project's last annotation event; of ANNOTATIONS_KEY and OUTCOMES_KEY
MAX_ANNOTATIONS = 200_000  # annotations of one project; further ones are not recorded

OUTCOMES_KEY = "gdino:projects:kept:"  # + project -> hash: label, line break, one of BOX_OUTCOMES -> number of boxes
MAX_OUTCOME_FIELDS = 4000  # fields of one project, so 1000 labels; further ones are not counted

MAX_EVENTS_PER_CALL = 500  # annotations that one call of the script records: Redis serves no one else meanwhile
MAX_LABELS_PER_ANNOTATION = 200  # labels; boxes of further ones are not counted


class OutcomeCounts(NamedTuple):
    """Boxes of one label, by what an annotator made of them; a list of four numbers in JSON."""

    kept: int = 0  # predicted, and left as they were
    changed: int = 0  # predicted, and moved, resized or given this label
    deleted: int = 0  # predicted with this label, and gone
    drawn: int = 0  # by hand


BOX_OUTCOMES = OutcomeCounts._fields

# Events may arrive twice, late, and in any order. The latest change of an annotation counts, and a deletion is final.
# Keys: annotations, outcomes. Arguments: time to live, MAX_ANNOTATIONS, BOX_OUTCOMES, MAX_OUTCOME_FIELDS, and then for
# each event the annotation's id and its JSON.
RECORD_SCRIPT = """
local outcomes, sums = cjson.decode(ARGV[3]), {}
local function add(annotation, sign)
    for label, numbers in pairs(annotation.boxes or {}) do
        for i, outcome in ipairs(outcomes) do
            local field = label .. '\\n' .. outcome
            if numbers[i] ~= 0 then sums[field] = (sums[field] or 0) + sign * numbers[i] end
        end
    end
end
for i = 5, #ARGV, 2 do
    local old_json = redis.call('HGET', KEYS[1], ARGV[i])
    local new, is_newer = cjson.decode(ARGV[i + 1]), redis.call('HLEN', KEYS[1]) < tonumber(ARGV[2])
    if old_json then
        local old = cjson.decode(old_json)
        is_newer = not old.is_deleted and (new.is_deleted or old.updated_at < new.updated_at)
        if is_newer then add(old, -1) end
    end
    if is_newer then
        redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
        add(new, 1)
    end
end
local size = redis.call('HLEN', KEYS[2])
for field, sum in pairs(sums) do
    local is_new = redis.call('HEXISTS', KEYS[2], field) == 0
    if sum ~= 0 and not (is_new and size >= tonumber(ARGV[4])) then
        redis.call('HINCRBY', KEYS[2], field, sum)
        if is_new then size = size + 1 end
    end
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
redis.call('EXPIRE', KEYS[2], ARGV[1])
"""


def record_predicted(connection: Redis, project: str, tasks: Sequence[ChunkTask], answers: Sequence[Answer]) -> None:
    """Records how many boxes of each label were predicted for tasks, so that deleted boxes can be counted later.

    Does nothing without a project, or while Redis does not answer.

    Args:
        connection: to Redis.
        project: the project's number.
        tasks: of a chunk.
        answers: one for each task, in order.
    """
    boxes_by_task = {
        str(task.id).encode(errors="replace"): json.dumps(Counter(filter(None, map(read_label, answer.result))))
        for task, answer in zip(tasks, answers, strict=True)
        if isinstance(answer, Prediction) and task.prompt is None  # Label Studio does not store interactive answers
    }
    key = PREDICTED_KEY + project
    with contextlib.suppress(RedisError):
        if project and boxes_by_task and connection.hlen(key) < MAX_PREDICTED_TASKS:
            connection.hset(key, mapping=boxes_by_task)  # type: ignore[arg-type]  # mypy's Mapping is invariant
            connection.expire(key, PREDICTED_TTL)


def get_predicted(connection: Redis, project: str, tasks: Sequence[int | None]) -> list[dict[str, int]]:
    """Returns the number of boxes by label last predicted for each task, in order; raises RedisError.

    It is empty for a task that is not known.
    """
    rows = connection.hmget(PREDICTED_KEY + project, [str(task) for task in tasks]) if tasks else []
    return [json.loads(row) if row else {} for row in rows]


def count_outcomes(annotation: Mapping[str, Any], predicted: Mapping[str, int]) -> dict[str, OutcomeCounts]:
    """Counts what became of the boxes in one annotation, by label.

    A box that was given another label counts as changed under the new label, and as deleted under the old one. A
    skipped task counts nothing.

    Args:
        annotation: as Label Studio's events have it.
        predicted: the number of boxes by label that were predicted for the task.
    """
    if annotation.get("was_cancelled") or not isinstance(annotation.get("result"), list):
        return {}
    counts: dict[str, Counter[str]] = {label: Counter() for label in predicted}
    for region in annotation["result"]:
        label = read_label(region) if isinstance(region, Mapping) else ""
        if label and (label in counts or len(counts) < MAX_LABELS_PER_ANNOTATION):
            counts.setdefault(label, Counter())[_get_outcome(region, annotation)] += 1
    return {
        label: OutcomeCounts(
            kept=count["kept"],
            changed=count["changed"],
            deleted=max(predicted.get(label, 0) - count["kept"] - count["changed"], 0),
            drawn=count["drawn"],
        )
        for label, count in counts.items()
    }


def _get_outcome(region: Mapping[str, Any], annotation: Mapping[str, Any]) -> str:
    """Returns which of `BOX_OUTCOMES` a region of an annotation has.

    The editor marks regions with their `origin`. Regions that Label Studio itself copied from a prediction have none,
    but they keep the score.
    """
    origin = region.get("origin")
    if origin == "prediction-changed":
        return "changed"
    is_copy = origin is None and "score" in region and annotation.get("parent_prediction")
    return "kept" if origin == "prediction" or is_copy else "drawn"


@dataclass(frozen=True)
class AnnotationEvent:
    """One annotation, as a webhook event reports it."""

    annotation: int  # its id
    task: int | None  # id of its task, where the event names it
    updated_at: str  # as Label Studio writes it, which sorts by time
    is_deleted: bool = False
    outcomes: Mapping[str, Sequence[int]] = field(default_factory=dict)  # by label: OutcomeCounts

    def to_json(self) -> str:
        """Returns the event as the JSON that Redis keeps."""
        return json.dumps(
            {
                "task": self.task,
                "updated_at": self.updated_at,
                "is_deleted": self.is_deleted,
                "boxes": self.outcomes,
            }
        )


class AnnotationLog:
    """The annotations of a project, as webhook events reported them. Their content stays in Label Studio.

    Every method raises QueueUnavailable if Redis does not answer.
    """

    def __init__(self, connection: Redis, project: str) -> None:
        self._connection = connection
        self._annotations_key, self._outcomes_key = ANNOTATIONS_KEY + project, OUTCOMES_KEY + project

    def record(self, events: Sequence[AnnotationEvent]) -> None:
        """Records annotations; an event that comes twice, or after a later one, changes nothing."""
        for start in range(0, len(events), MAX_EVENTS_PER_CALL):
            arguments: list[str | int] = [
                ANNOTATIONS_TTL,
                MAX_ANNOTATIONS,
                json.dumps(BOX_OUTCOMES),
                MAX_OUTCOME_FIELDS,
            ]
            for event in events[start : start + MAX_EVENTS_PER_CALL]:
                arguments += [event.annotation, event.to_json()]
            with redis_errors():
                self._connection.eval(RECORD_SCRIPT, 2, self._annotations_key, self._outcomes_key, *arguments)

    def get_annotations(self) -> dict[int, int | None]:
        """Returns the annotations that are not deleted: the id of the task, where it is known, by annotation id."""
        with redis_errors():
            rows: dict[bytes, bytes] = self._connection.hgetall(self._annotations_key)  # type: ignore[assignment]
        entries = {int(annotation): json.loads(row) for annotation, row in rows.items()}
        return {annotation: entry["task"] for annotation, entry in sorted(entries.items()) if not entry["is_deleted"]}
