"""What is known of each project, in Redis: the labels it last asked for, and what annotators made of the boxes."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from backend.labelstudio.labeling_config import Plan
from backend.labelstudio.regions import read_label
from backend.queue.messages import Answer, ChunkTask, Prediction

SEEN_KEY = "gdino:projects:seen"  # sorted set: project -> when it last asked
CARDS_KEY = "gdino:projects:cards"  # hash: project -> JSON: version, labels
CONFIG_KEY = "gdino:projects:config:"  # + project -> its labeling config
PREDICTED_KEY = "gdino:projects:predicted:"  # + project -> hash: task -> JSON: boxes by label
OUTCOMES_KEY = "gdino:projects:kept:"  # + project -> hash: label and FATES, a line each -> boxes
BOX_OUTCOMES = ("kept", "changed", "deleted", "drawn")  # of boxes: three of predicted ones, and those that people drew
MAX_PROJECTS, SHOWN_PROJECTS, MAX_LABELS, MAX_PHRASES = 1000, 20, 200, 20  # projects, labels of one, phrases of one
MAX_CONFIG_LENGTH, MAX_TEXT_LENGTH = 200_000, 200  # characters of a config, and of a label or phrase
MAX_TASKS, TTL = 200_000, 90 * 24 * 3600  # of a project, s

Boxes = dict[str, list[int]]  # by label, so many of each of FATES


def save_summary(
    connection: Redis, project: str, version: str, plan: Plan | None, label_config: str, created: int | None = None
) -> None:
    """Notes what a project, `created` at so many seconds since the epoch, asked for; raises RedisError."""
    labels = [
        {
            "label": label.name[:MAX_TEXT_LENGTH],
            "phrases": [phrase[:MAX_TEXT_LENGTH] for phrase in label.phrases[:MAX_PHRASES]],
            "threshold": label.threshold,
        }
        for control in (plan.controls if plan else ())
        for label in control.labels
    ]
    card = {"version": version, "created": created, "labels": labels[:MAX_LABELS], "of": len(labels)}
    with connection.pipeline() as pipeline:
        pipeline.zadd(SEEN_KEY, {project: time.time()})
        pipeline.hset(CARDS_KEY, project, json.dumps(card))
        if len(label_config) <= MAX_CONFIG_LENGTH:
            pipeline.set(CONFIG_KEY + project, label_config.encode(errors="replace"), ex=TTL)
        pipeline.zrange(SEEN_KEY, 0, -MAX_PROJECTS - 1)
        forgotten = pipeline.execute()[-1]
    if forgotten:
        connection.hdel(CARDS_KEY, *forgotten)
        connection.zrem(SEEN_KEY, *forgotten)


def get_label_config(connection: Redis, project: str) -> str:
    """A project's labeling config as it was last asked for, empty where it never did; raises RedisError."""
    found = connection.get(CONFIG_KEY + project)
    return found.decode() if isinstance(found, bytes) else ""


def list_model_versions(connection: Redis) -> list[str]:
    """The versions that projects were told, sorted; raises RedisError."""
    rows: list[bytes] = connection.hvals(CARDS_KEY)  # type: ignore[assignment]
    return sorted({str(json.loads(row)["version"]) for row in rows})


def get_project_summaries(connection: Redis) -> list[dict[str, Any]]:
    """The last projects that asked, the last first, with their labels and the fates of boxes; raises RedisError."""
    seen: list[tuple[bytes, float]] = connection.zrange(SEEN_KEY, 0, SHOWN_PROJECTS - 1, desc=True, withscores=True)  # type: ignore[assignment]
    with connection.pipeline() as pipeline:
        for project, _ in seen:
            pipeline.hget(CARDS_KEY, project.decode())
            pipeline.hgetall(OUTCOMES_KEY + project.decode())
        rows = pipeline.execute()
    return [
        {"project": project.decode(), "time": at, **json.loads(card), "boxes": _by_label(kept)}
        for (project, at), card, kept in zip(seen, rows[::2], rows[1::2], strict=True)
        if card
    ]


def get_shown_model_versions(connection: Redis) -> dict[str, str]:
    """The versions that the last projects were told, by project; raises RedisError."""
    projects: list[bytes] = connection.zrange(SEEN_KEY, 0, SHOWN_PROJECTS - 1, desc=True)  # type: ignore[assignment]
    rows = connection.hmget(CARDS_KEY, projects) if projects else []
    return {project.decode(): json.loads(row)["version"] for project, row in zip(projects, rows, strict=True) if row}


def get_created_at(connection: Redis, project: str) -> int | None:
    """When a project was made, as it said; raises RedisError."""
    row = connection.hget(CARDS_KEY, project)
    return json.loads(row)["created"] if row else None


def _by_label(rows: Mapping[bytes, bytes]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for field, count in rows.items():
        label, _, fate = field.decode().rpartition("\n")
        found.setdefault(label, dict.fromkeys(BOX_OUTCOMES, 0))[fate] = int(count)
    return found


def record_predicted(connection: Redis, project: str, tasks: Sequence[ChunkTask], answers: Sequence[Answer]) -> None:
    """Notes how many boxes of each label a task was given, so that deleted ones can be told."""
    rows = {
        _text(task.id): json.dumps(Counter(filter(None, map(read_label, answer.result))))
        for task, answer in zip(tasks, answers, strict=True)
        if isinstance(answer, Prediction) and task.prompt is None  # Label Studio keeps no answer to interactive work
    }
    key = PREDICTED_KEY + project
    with contextlib.suppress(RedisError):
        if project and rows and connection.hlen(key) < MAX_TASKS:
            connection.hset(key, items=[word for row in rows.items() for word in row])
            connection.expire(key, TTL)


def _text(number: object) -> str:
    return str(number).encode(errors="replace").decode()  # Redis takes Unicode text only


def get_predicted(connection: Redis, project: str, tasks: Sequence[int | None]) -> list[dict[str, int]]:
    """The boxes by label that tasks were last given, none for those that are not known; raises RedisError."""
    rows = connection.hmget(PREDICTED_KEY + project, [str(task) for task in tasks]) if tasks else []
    return [json.loads(row) if row else {} for row in rows]


def count_outcomes(annotation: Mapping[str, Any], given: Mapping[str, int]) -> Boxes:
    """What became of the boxes in one annotation.

    Args:
        annotation: as Label Studio's events have it. Regions carry their `origin`; those that it copied from a
            prediction itself have none, but a score. A box with another label is changed there and deleted here.
        given: the boxes by label that the task's prediction had.
    """
    if annotation.get("was_cancelled") or not isinstance(annotation.get("result"), list):
        return {}
    found: Boxes = {label: [0, 0, 0, 0] for label in given}
    for region in annotation["result"]:
        label = read_label(region) if isinstance(region, Mapping) else ""
        if label and (label in found or len(found) < MAX_LABELS):
            found.setdefault(label, [0, 0, 0, 0])[BOX_OUTCOMES.index(_fate(region, annotation))] += 1
    for label, count in given.items():
        found[label][2] = max(count - found[label][0] - found[label][1], 0)
    return found


def _fate(region: Mapping[str, Any], annotation: Mapping[str, Any]) -> str:
    origin = region.get("origin")
    if origin == "prediction-changed":
        return "changed"
    is_copy = origin is None and "score" in region and annotation.get("parent_prediction")
    return "kept" if origin == "prediction" or is_copy else "drawn"
