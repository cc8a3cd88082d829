"""The outbox: chunks whose predictions are pending in Label Studio, and claims on who delivers each prediction.

Label Studio stores every copy of a prediction that it gets. So whoever delivers one claims it first: the answer to a
request (a pull), or a delivery job (pushing, and pushed once Label Studio has confirmed it). All times are of the clock
of Redis.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from redis import Redis

from backend.errors import MessageError
from backend.queue.delivery_schedule import DUE_CHUNKS_KEY, DUE_PROJECTS_KEY
from backend.queue.messages import Chunk, ErrorDetail, Message, read_message
from backend.queue.redis import get_time, redis_errors

log = logging.getLogger(__name__)

ENTRIES_KEY = "gdino:outbox:entries:"  # + project -> hash: chunk id -> JSON: OutboxEntry
PENDING_KEY, PENDING_TTL = "gdino:pending:", 7 * 24 * 3600  # + project:version -> set: tasks of the entries; s
RESTING_KEY = "gdino:resting:"  # + project, after an import; expires
DELIVERED_KEY = "gdino:delivered:"  # + project:version -> hash: task -> delivery and time
RECHECKS_KEY = "gdino:rechecks:"  # + project -> sorted set: version/task that may be stored twice -> when to look
FAILED_KEY = "gdino:outbox:failed:"  # + project -> hash: chunk id -> when its delivery failed first
SELECTION_TIMEOUT = 60  # s that Label Studio may take from selecting the tasks of a request to sending it
DELIVERED_TTL = 7 * 24 * 3600  # s
MISMATCHED_KEY = "gdino:strange:"  # + project, if LABEL_STUDIO_URL has another one of that number
MISMATCHED_TTL = 600  # s until the project is compared again
# An entry whose chunk is not finished is looked at again now and then, should its job be lost.
LOOK_AGAIN, LOOK_AGAIN_PER_CHUNK = 30, 0.005  # s; s more for each chunk of the project
ENTRIES_PER_PIPELINE = 500


class Delivery(enum.Enum):
    """How a prediction is delivered, or was."""

    PULL = "pull"  # in the answer to a request; Label Studio may have thrown it away
    PUSHING = "pushing"  # by an import that Label Studio has not confirmed
    PUSHED = "pushed"  # Label Studio has it


@dataclass(frozen=True)
class Claim:
    """The delivery that stands in the way of a claim, and its time: of an import the latest at which it is stored."""

    delivery: Delivery
    at: float


# Arguments: delivery, time to live, latest time after now, then a task and its `since`, and so on. A claim is refused
# while a delivery at or after `since` stands in its way, and a push also while an import is not confirmed. Returns for
# each task "" or the delivery that stands and its time.
CLAIM_SCRIPT = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1000000
local answers = {}
for i = 4, #ARGV, 2 do
  local old = redis.call('HGET', KEYS[1], ARGV[i])
  local delivery, at = '', '-1'
  if old then delivery, at = string.match(old, '(%a+) (.+)') end
  local is_recent = tonumber(at) >= tonumber(ARGV[i + 1])
  local is_push = ARGV[1] == 'pushing'
  if (is_recent and (is_push or delivery ~= 'pull')) or (delivery == 'pushing' and is_push) then
    answers[#answers + 1] = old
  else
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[1] .. ' ' .. string.format('%.6f', now + ARGV[3]))
    answers[#answers + 1] = ''
  end
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
return answers
"""


# Keys: due chunks and rechecks of a project, due projects; argument: the project.
SCHEDULE_SCRIPT = """
local due
for i = 1, 2 do
  local first = redis.call('ZRANGE', KEYS[i], 0, 0, 'WITHSCORES')[2]
  if first and (not due or tonumber(first) < tonumber(due)) then due = first end
end
if due then redis.call('ZADD', KEYS[3], due, ARGV[1]) else redis.call('ZREM', KEYS[3], ARGV[1]) end
"""


# Keys: entries and due chunks of a project; argument: a chunk that is not due if it has no entry.
FORGET_SCRIPT = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then redis.call('ZREM', KEYS[2], ARGV[1]) end
"""


class OutboxEntry(Message):
    """A chunk whose predictions are pending, and how it came here.

    Attributes:
        project: its number.
        created_at: when the project was created, as the request says it; None where it does not.
        since: when the chunk was requested.
        failed_since: when its tasks failed first; None if they have not.
        attempts: how often its tasks failed.
        error: of the last attempt; None before the first one.
        chunk_id: kept, because computing it again costs more than everything else done with an entry.
        chunk: the tasks.
    """

    project: str
    created_at: int | None
    since: float
    failed_since: float | None
    attempts: int
    error: ErrorDetail | None
    chunk_id: str
    chunk: Chunk

    @classmethod
    def from_chunk(cls, project: str, chunk: Chunk, since: float, created_at: int | None = None) -> OutboxEntry:
        """Makes the entry of a chunk that was requested now."""
        return cls(
            project=project, created_at=created_at, since=since, failed_since=None, attempts=0, error=None,
            chunk_id=chunk.id, chunk=chunk,
        )  # fmt: skip

    @property
    def task_ids(self) -> list[int]:
        """The ids of the chunk's tasks."""
        return [task.id for task in self.chunk.tasks]

    def to_json(self) -> str:
        """Returns the entry as it is kept; the chunks of one request share the JSON of their plan."""
        return json.dumps({**self.model_dump(exclude={"chunk"}), "chunk": self.chunk.payload})


class Outbox:
    """The pending chunks and the claims; safe to share between threads and processes.

    Every method raises QueueUnavailable if Redis does not answer.
    """

    def __init__(self, connection: Redis) -> None:
        self._connection = connection
        self._claim = connection.register_script(CLAIM_SCRIPT)
        self._schedule = connection.register_script(SCHEDULE_SCRIPT)
        self._forget = connection.register_script(FORGET_SCRIPT)

    def get_time(self) -> float:
        """Returns the time by which requests and deliveries are compared."""
        with redis_errors():
            return get_time(self._connection)

    def add(self, entries: Sequence[OutboxEntry], delay: float | None = None) -> None:
        """Adds entries; one whose chunk is there already is left as it is.

        Args:
            entries: of one project and model version.
            delay: seconds until they are looked at; by default a while, since the workers make them due sooner.
        """
        for start in range(0, len(entries), ENTRIES_PER_PIPELINE):
            self._add(entries[start : start + ENTRIES_PER_PIPELINE], delay)

    def _add(self, entries: Sequence[OutboxEntry], delay: float | None) -> None:
        project, version = entries[0].project, entries[0].chunk.model_version
        due = self.get_time() + (self._compute_delay(project) if delay is None else delay)
        with redis_errors(), self._connection.pipeline() as pipeline:
            for entry in entries:
                pipeline.hsetnx(ENTRIES_KEY + project, entry.chunk_id, entry.to_json())
                pipeline.sadd(f"{PENDING_KEY}{project}:{version}", *entry.task_ids)
            pipeline.expire(f"{PENDING_KEY}{project}:{version}", PENDING_TTL)
            pipeline.zadd(DUE_CHUNKS_KEY + project, {entry.chunk_id: due for entry in entries}, nx=True)
            pipeline.zadd(DUE_PROJECTS_KEY, {project: due}, lt=True)
            pipeline.execute()

    def replace(self, entry: OutboxEntry, resolved: Sequence[int], retry: OutboxEntry | None, delay: float = 0) -> None:
        """Removes an entry whose tasks are resolved, but for those of `retry`, which is looked at after `delay` s."""
        project, version = entry.project, entry.chunk.model_version
        with redis_errors(), self._connection.pipeline() as pipeline:
            due = get_time(self._connection) + delay
            pipeline.hdel(ENTRIES_KEY + project, entry.chunk_id)
            pipeline.hdel(FAILED_KEY + project, entry.chunk_id)
            pipeline.zrem(DUE_CHUNKS_KEY + project, entry.chunk_id)
            if resolved:
                pipeline.srem(f"{PENDING_KEY}{project}:{version}", *resolved)
            if retry:
                pipeline.hset(ENTRIES_KEY + project, retry.chunk_id, retry.to_json())
                pipeline.zadd(DUE_CHUNKS_KEY + project, {retry.chunk_id: due})
            pipeline.execute()

    def postpone(self, project: str, chunk_ids: Sequence[str], delay: float | None = None) -> None:
        """Looks at chunks again after `delay` seconds, by default a while."""
        if chunk_ids:
            due = self.get_time() + (self._compute_delay(project) if delay is None else delay)
            with redis_errors():
                self._connection.zadd(DUE_CHUNKS_KEY + project, dict.fromkeys(chunk_ids, due), xx=True)

    def _compute_delay(self, project: str) -> float:
        with redis_errors():
            return LOOK_AGAIN + LOOK_AGAIN_PER_CHUNK * int(self._connection.zcard(DUE_CHUNKS_KEY + project))

    def list_due(self, project: str, count: int) -> list[str]:
        """Lists the first chunks of a project that are due."""
        with redis_errors():
            ids: list[bytes] = self._connection.zrange(
                DUE_CHUNKS_KEY + project, "-inf", get_time(self._connection), byscore=True, offset=0, num=count
            )  # type: ignore[assignment]
        return [chunk_id.decode() for chunk_id in ids]

    def load(self, project: str, chunk_ids: Sequence[str]) -> list[OutboxEntry]:
        """Loads entries; drops those of an unknown format and those that another delivery has removed."""
        with redis_errors():
            rows = self._connection.hmget(ENTRIES_KEY + project, list(chunk_ids)) if chunk_ids else []
        entries = []
        for chunk_id, row in zip(chunk_ids, rows, strict=True):
            if row is None:  # removed meanwhile
                with redis_errors():
                    self._forget(keys=[ENTRIES_KEY + project, DUE_CHUNKS_KEY + project], args=[chunk_id])
                continue
            try:
                entries.append(read_message(OutboxEntry, json.loads(row)))
            except MessageError as error:
                log.error("project %s: dropping outbox entry %s: %s", project, chunk_id, error)
                self._drop(project, chunk_id, row)
        return entries

    def _drop(self, project: str, chunk_id: str, row: bytes | str) -> None:
        """Drops an entry of an unknown format; its tasks are not pending any more, as far as they can be read."""
        with redis_errors(), self._connection.pipeline() as pipeline:
            with contextlib.suppress(LookupError, TypeError, ValueError):
                chunk = json.loads(row)["chunk"]
                tasks = [int(task["id"]) for task in chunk["tasks"]]
                pipeline.srem(f"{PENDING_KEY}{project}:{chunk['model_version']}", *tasks)
            pipeline.zrem(DUE_CHUNKS_KEY + project, chunk_id)
            pipeline.hdel(ENTRIES_KEY + project, chunk_id)
            pipeline.execute()

    def filter_pending(self, project: str, version: str, tasks: Sequence[int]) -> set[int]:
        """Returns those of these tasks whose prediction of a model version is pending."""
        if not tasks:
            return set()
        with redis_errors():
            flags = self._connection.smismember(f"{PENDING_KEY}{project}:{version}", list(tasks))
        return {task for task, is_pending in zip(tasks, flags, strict=True) if is_pending}

    def list_retries(self, project: str) -> list[OutboxEntry]:
        """Lists the entries of a project whose tasks failed and are tried again."""
        with redis_errors():
            ids = [chunk_id.decode() for chunk_id, _ in self._connection.hscan_iter(ENTRIES_KEY + project)]
        entries: list[OutboxEntry] = []
        for start in range(0, len(ids), ENTRIES_PER_PIPELINE):
            loaded = self.load(project, ids[start : start + ENTRIES_PER_PIPELINE])
            entries += [entry for entry in loaded if entry.attempts]
        return entries

    def count(self, project: str) -> int:
        """Counts the entries of a project."""
        with redis_errors():
            return int(self._connection.zcard(DUE_CHUNKS_KEY + project))

    def count_by_project(self) -> dict[str, int]:
        """Counts the entries of each project that has any."""
        with redis_errors():
            projects: list[bytes] = self._connection.zrange(DUE_PROJECTS_KEY, 0, -1)  # type: ignore[assignment]
        counts = {project.decode(): self.count(project.decode()) for project in projects}
        return {project: count for project, count in counts.items() if count}

    def list_due_projects(self) -> list[str]:
        """Lists the projects that have something to deliver now, and do not rest after an import."""
        with redis_errors():
            due: list[bytes] = self._connection.zrange(
                DUE_PROJECTS_KEY, "-inf", get_time(self._connection), byscore=True
            )  # type: ignore[assignment]
            projects = [project.decode() for project in due]
            resting = self._connection.mget([RESTING_KEY + project for project in projects]) if projects else []
        return [project for project, rests in zip(projects, resting, strict=True) if not rests]

    def rest(self, project: str, seconds: float) -> None:
        """Leaves a project alone for a while."""
        with redis_errors():
            self._connection.set(RESTING_KEY + project, 1, px=max(int(seconds * 1000), 1))

    def schedule(self, project: str) -> None:
        """Makes a project due when the first of its chunks or rechecks is; takes it off the list where it has none."""
        keys = [DUE_CHUNKS_KEY + project, RECHECKS_KEY + project, DUE_PROJECTS_KEY]
        with redis_errors():
            self._schedule(keys=keys, args=[project])

    def claim(
        self, delivery: Delivery, project: str, version: str, since: Mapping[int, float], stored_within: float = 0
    ) -> dict[int, Claim | None]:
        """Claims tasks for a delivery, unless they were delivered at or after the time that `since` has for them.

        Args:
            delivery: PULL, which a push stands in the way of; or PUSHING, which any delivery stands in the way of.
            project: its number.
            version: the predictions' model version.
            since: by task.
            stored_within: seconds after which an import that is not confirmed cannot be stored any more.

        Returns:
            None for each task whose claim was granted, otherwise the delivery that stands in its way.
        """
        if not since:
            return {}
        pairs = [item for pair in since.items() for item in pair]
        with redis_errors():
            answers: list[bytes] = self._claim(
                keys=[f"{DELIVERED_KEY}{project}:{version}"],
                args=[delivery.value, DELIVERED_TTL, stored_within, *pairs],
            )
        return {task: _read_claim(answer) for task, answer in zip(since, answers, strict=True)}

    def save_claims(
        self, delivery: Delivery, project: str, version: str, tasks: Sequence[int], stored_within: float = 0
    ) -> None:
        """Saves how tasks are delivered, whatever was claimed before."""
        if tasks:
            with redis_errors():
                row = f"{delivery.value} {get_time(self._connection) + stored_within:.6f}"
                self._connection.hset(f"{DELIVERED_KEY}{project}:{version}", mapping={str(task): row for task in tasks})

    def filter_pushed(self, project: str, version: str, tasks: Sequence[int]) -> set[int]:
        """Returns those of these tasks whose prediction Label Studio has."""
        key = f"{DELIVERED_KEY}{project}:{version}"
        with redis_errors():
            rows = self._connection.hmget(key, list(map(str, tasks))) if tasks else []
        pushed = Delivery.PUSHED.value.encode()
        return {
            task for task, row in zip(tasks, rows, strict=True) if isinstance(row, bytes) and row.startswith(pushed)
        }

    def mark_failed(self, project: str, chunk_ids: Sequence[str]) -> dict[str, float]:
        """Notes that the delivery of chunks failed; returns when that of each failed first."""
        now = self.get_time()
        with redis_errors(), self._connection.pipeline() as pipeline:
            for chunk_id in chunk_ids:
                pipeline.hsetnx(FAILED_KEY + project, chunk_id, str(now))
            pipeline.expire(FAILED_KEY + project, DELIVERED_TTL)
            pipeline.hmget(FAILED_KEY + project, list(chunk_ids))
            times = pipeline.execute()[-1]
        return {chunk_id: float(time) for chunk_id, time in zip(chunk_ids, times, strict=True)}

    def release(self, project: str, version: str, tasks: Sequence[int]) -> None:
        """Forgets the claims on tasks whose import was never sent."""
        if tasks:
            with redis_errors():
                self._connection.hdel(f"{DELIVERED_KEY}{project}:{version}", *map(str, tasks))

    def recheck(self, project: str, version: str, tasks: Sequence[int], delay: float) -> None:
        """Notes tasks that may be stored twice: an import of theirs had no end, and they were imported again."""
        if tasks:
            with redis_errors():
                due = get_time(self._connection) + delay
                self._connection.zadd(RECHECKS_KEY + project, {f"{version}/{task}": due for task in tasks})

    def list_due_rechecks(self, project: str, count: int) -> list[tuple[str, int]]:
        """Lists the first tasks that are to be looked at for doubles now: model version and task."""
        with redis_errors():
            rows: list[bytes] = self._connection.zrange(
                RECHECKS_KEY + project, "-inf", get_time(self._connection), byscore=True, offset=0, num=count
            )  # type: ignore[assignment]
        pairs = (row.decode().rpartition("/") for row in rows)
        return [(version, int(task)) for version, _, task in pairs]

    def remove_rechecks(self, project: str, rechecks: Sequence[tuple[str, int]]) -> None:
        """Removes tasks that were looked at for doubles."""
        if rechecks:
            with redis_errors():
                self._connection.zrem(RECHECKS_KEY + project, *(f"{version}/{task}" for version, task in rechecks))

    def mark_mismatched(self, project: str) -> None:
        """Notes that LABEL_STUDIO_URL has another project of this number; nothing is pushed there."""
        with redis_errors():
            self._connection.set(MISMATCHED_KEY + project, 1, ex=MISMATCHED_TTL)

    def is_mismatched(self, project: str) -> bool:
        """Returns whether the project is marked as mismatched."""
        with redis_errors():
            return bool(self._connection.exists(MISMATCHED_KEY + project))


def _read_claim(answer: bytes) -> Claim | None:
    if not answer:
        return None
    delivery, at = answer.decode().split()
    return Claim(Delivery(delivery), float(at))
