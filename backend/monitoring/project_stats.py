"""Summaries of projects, for the status page, `/metrics`, `/versions` and the playground."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from redis import Redis

from backend.labelstudio.labeling_config import Plan
from backend.monitoring.feedback import BOX_OUTCOMES, OUTCOMES_KEY

LAST_USED_KEY = "gdino:projects:seen"  # sorted set: project -> when it was last used (s since the epoch); never expires
SUMMARIES_KEY = "gdino:projects:cards"  # hash: project -> JSON: version, created, labels, of; never expires
MAX_PROJECTS = 1000  # projects in the two above; those whose last use is oldest are dropped

LABEL_CONFIG_KEY = "gdino:projects:config:"  # + project -> its labeling config, XML
LABEL_CONFIG_TTL = 90 * 24 * 3600  # s since the project was last used
MAX_LABEL_CONFIG_LENGTH = 200_000  # characters; a longer labeling config is not kept

MAX_SHOWN_PROJECTS = 20  # projects on the status page and in `/metrics`
MAX_SUMMARY_LABELS = 200  # labels in a summary
MAX_SUMMARY_PHRASES = 20  # phrases of one label in a summary
MAX_TEXT_LENGTH = 200  # characters of a label or phrase in a summary


def save_summary(
    connection: Redis, project: str, version: str, plan: Plan | None, label_config: str, created_at: int | None = None
) -> None:
    """Saves the summary of a project that is used now; the least recently used beyond `MAX_PROJECTS` are dropped.

    A project is used when it connects, before every retrieval, and by `preannotate`.

    Args:
        connection: to Redis.
        project: the project's number.
        version: the model version that serves it.
        plan: of the labeling config; None where it cannot be served.
        label_config: XML.
        created_at: when the project was created, in seconds since the epoch, where it is known.

    Raises:
        RedisError: Redis does not answer.
    """
    labels = [
        {
            "label": label.name[:MAX_TEXT_LENGTH],
            "phrases": [phrase[:MAX_TEXT_LENGTH] for phrase in label.phrases[:MAX_SUMMARY_PHRASES]],
            "threshold": label.threshold,
        }
        for control in (plan.controls if plan else ())
        for label in control.labels
    ]
    summary = {"version": version, "created": created_at, "labels": labels[:MAX_SUMMARY_LABELS], "of": len(labels)}
    with connection.pipeline() as pipeline:
        pipeline.zadd(LAST_USED_KEY, {project: time.time()})
        pipeline.hset(SUMMARIES_KEY, project, json.dumps(summary))
        if len(label_config) <= MAX_LABEL_CONFIG_LENGTH:
            pipeline.set(LABEL_CONFIG_KEY + project, label_config.encode(errors="replace"), ex=LABEL_CONFIG_TTL)
        pipeline.zrange(LAST_USED_KEY, 0, -MAX_PROJECTS - 1)
        dropped = pipeline.execute()[-1]
    if dropped:
        connection.hdel(SUMMARIES_KEY, *dropped)
        connection.zrem(LAST_USED_KEY, *dropped)


def get_label_config(connection: Redis, project: str) -> str:
    """Returns a project's labeling config as of its last use; empty where none is known. Raises RedisError."""
    label_config = connection.get(LABEL_CONFIG_KEY + project)
    return label_config.decode() if isinstance(label_config, bytes) else ""


def get_created_at(connection: Redis, project: str) -> int | None:
    """Returns when a project was created, in seconds since the epoch, where it is known; raises RedisError."""
    summary = connection.hget(SUMMARIES_KEY, project)
    return json.loads(summary)["created"] if summary else None


def list_model_versions(connection: Redis) -> list[str]:
    """Lists the model versions that serve projects, sorted, each once; raises RedisError."""
    summaries: list[bytes] = connection.hvals(SUMMARIES_KEY)  # type: ignore[assignment]
    return sorted({str(json.loads(summary)["version"]) for summary in summaries})


def get_shown_model_versions(connection: Redis) -> dict[str, str]:
    """Returns the model version of each of the `MAX_SHOWN_PROJECTS` projects used last; raises RedisError."""
    projects: list[bytes] = connection.zrange(LAST_USED_KEY, 0, MAX_SHOWN_PROJECTS - 1, desc=True)  # type: ignore[assignment]
    summaries = connection.hmget(SUMMARIES_KEY, projects) if projects else []
    return {
        project.decode(): json.loads(summary)["version"]
        for project, summary in zip(projects, summaries, strict=True)
        if summary
    }


def get_project_summaries(connection: Redis) -> list[dict[str, Any]]:
    """Lists the summaries of the `MAX_SHOWN_PROJECTS` projects used last, the last one first; raises RedisError.

    Each has project, time, version, created, labels, of (the number of all labels), and boxes: by label, what
    annotators made of them.
    """
    projects: list[tuple[bytes, float]] = connection.zrange(
        LAST_USED_KEY, 0, MAX_SHOWN_PROJECTS - 1, desc=True, withscores=True
    )  # type: ignore[assignment]
    if not projects:
        return []
    with connection.pipeline() as pipeline:
        pipeline.hmget(SUMMARIES_KEY, [project for project, _ in projects])
        for project, _ in projects:
            pipeline.hgetall(OUTCOMES_KEY + project.decode())
        summaries, *outcomes = pipeline.execute()
    return [
        {"project": project.decode(), "time": at, **json.loads(summary), "boxes": _group_by_label(counts)}
        for (project, at), summary, counts in zip(projects, summaries, outcomes, strict=True)
        if summary
    ]


def _group_by_label(counts: Mapping[bytes, bytes]) -> dict[str, dict[str, int]]:
    """Groups the hash of OUTCOMES_KEY: label -> each of BOX_OUTCOMES -> number of boxes."""
    by_label: dict[str, dict[str, int]] = {}
    for field, count in counts.items():
        label, _, outcome = field.decode().rpartition("\n")
        by_label.setdefault(label, dict.fromkeys(BOX_OUTCOMES, 0))[outcome] = int(count)
    return by_label
