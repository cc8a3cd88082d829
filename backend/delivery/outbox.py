"""The outbox: chunks whose predictions are pending in Label Studio, and claims on who delivers each prediction.

Label Studio stores every copy of a prediction that it gets. So whoever delivers one claims it first: the answer to a
request (a pull), or the pusher (pushing, and pushed once Label Studio has confirmed it).
"""

from __future__ import annotations

import enum
import json
import logging
from collections.abc import Iterator, Sequence

from redis import Redis

from backend.errors import MessageError
from backend.queue.messages import Chunk, Message, read_message
from backend.queue.redis import redis_errors

log = logging.getLogger(__name__)

ORDER_KEY = "gdino:outbox"  # sorted set: chunk id -> when it was requested
ENTRIES_KEY = "gdino:outbox:entries"  # hash: chunk id -> JSON: OutboxEntry
DELIVERED_KEY = "gdino:delivered:"  # + project:version -> hash: task -> delivery and time
DELIVERED_TTL = 7 * 24 * 3600  # s
MISMATCHED_KEY = "gdino:strange:"  # + project, if LABEL_STUDIO_URL has another one of that number
MISMATCHED_TTL = 600  # s until the project is compared again


class Delivery(enum.Enum):
    """How a prediction is delivered, or was."""

    PULL = "pull"  # in the answer to a request
    PUSHING = "pushing"  # by an import that Label Studio has not confirmed
    PUSHED = "pushed"  # by an import that Label Studio has confirmed


# Arguments: delivery, now, since, time to live, tasks. A claim is refused while a delivery at or after `since` stands
# in its way, and a push also while an import is not confirmed. Returns for each task "" or the delivery that stands.
CLAIM_SCRIPT = """
local answers = {}
for i = 5, #ARGV do
  local old = redis.call('HGET', KEYS[1], ARGV[i])
  local delivery, at = '', '-1'
  if old then delivery, at = string.match(old, '(%a+) (.+)') end
  local is_recent = tonumber(at) >= tonumber(ARGV[3])
  if (is_recent and (ARGV[1] == 'pushing' or delivery ~= 'pull')) or (delivery == 'pushing' and ARGV[1] == 'pushing') then
    answers[i - 4] = delivery
  else
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[1] .. ' ' .. ARGV[2])
    answers[i - 4] = ''
  end
end
redis.call('EXPIRE', KEYS[1], ARGV[4])
return answers
"""  # noqa: E501


class OutboxEntry(Message):
    """A chunk whose predictions are pending, its project, and when it was requested (seconds since the epoch)."""

    project: str
    since: float
    chunk_id: str  # kept, because computing it again costs more than everything else done with an entry
    chunk: Chunk


class Outbox:
    """The pending chunks and the claims; safe to share between threads and processes.

    Every method raises QueueUnavailable if Redis does not answer.
    """

    def __init__(self, connection: Redis) -> None:
        self._connection = connection
        self._claim = connection.register_script(CLAIM_SCRIPT)

    def add(self, project: str, chunks: Sequence[Chunk], since: float) -> None:
        """Adds chunks behind the others; a chunk that is there already keeps its place."""
        with redis_errors(), self._connection.pipeline() as pipeline:
            for number, chunk in enumerate(chunks):
                entry = OutboxEntry(project=project, since=since, chunk_id=chunk.id, chunk=chunk)
                row = {**entry.model_dump(exclude={"chunk"}), "chunk": chunk.payload}
                pipeline.hset(ENTRIES_KEY, chunk.id, json.dumps(row))
                pipeline.zadd(ORDER_KEY, {chunk.id: since + number * 1e-6}, nx=True)
            pipeline.execute()

    def peek(self, count: int) -> Iterator[OutboxEntry]:
        """Yields the first entries in the order of their requests; drops those of an unknown format.

        Entries are parsed one at a time, so a caller that stops early does not pay for the rest.
        """
        with redis_errors():
            ids: list[bytes] = self._connection.zrange(ORDER_KEY, 0, count - 1)  # type: ignore[assignment]
            rows = self._connection.hmget(ENTRIES_KEY, ids) if ids else []
        for chunk_id, row in zip(ids, rows, strict=True):
            try:
                if row:
                    yield read_message(OutboxEntry, json.loads(row))
            except MessageError as error:
                log.error("dropping outbox entry %s: %s", chunk_id.decode(), error)
                self.remove([chunk_id.decode()])

    def filter_pending(self, chunk_ids: Sequence[str]) -> set[str]:
        """Returns those of these chunks that are still pending."""
        with redis_errors():
            scores = self._connection.zmscore(ORDER_KEY, list(chunk_ids)) if chunk_ids else []
        return {chunk_id for chunk_id, score in zip(chunk_ids, scores, strict=True) if score is not None}

    def remove(self, chunk_ids: Sequence[str]) -> None:
        """Removes the entries of chunks that are delivered, or cannot be."""
        with redis_errors(), self._connection.pipeline() as pipeline:
            for chunk_id in chunk_ids:
                pipeline.zrem(ORDER_KEY, chunk_id)
                pipeline.hdel(ENTRIES_KEY, chunk_id)
            pipeline.execute()

    def __len__(self) -> int:
        with redis_errors():
            return int(self._connection.zcard(ORDER_KEY))

    def claim(
        self, delivery: Delivery, project: str, version: str, tasks: Sequence[int], now: float, since: float
    ) -> dict[int, Delivery | None]:
        """Claims tasks for a delivery, unless they were delivered at or after `since`.

        Args:
            delivery: PULL, which a push stands in the way of; or PUSHING, which any delivery stands in the way of.
            project: its number.
            version: the predictions' model version.
            tasks: their numbers.
            now: seconds since the epoch.
            since: likewise.

        Returns:
            None for each task whose claim was granted, otherwise the delivery that stands in its way.
        """
        if not tasks:
            return {}
        with redis_errors():
            answers: list[bytes] = self._claim(
                keys=[f"{DELIVERED_KEY}{project}:{version}"], args=[delivery.value, now, since, DELIVERED_TTL, *tasks]
            )
        return {
            task: Delivery(answer.decode()) if answer else None for task, answer in zip(tasks, answers, strict=True)
        }

    def confirm(self, project: str, version: str, tasks: Sequence[int], now: float) -> None:
        """Notes that Label Studio has stored the predictions of tasks that were PUSHING."""
        if tasks:
            with redis_errors():
                items = [item for task in tasks for item in (str(task), f"{Delivery.PUSHED.value} {now}")]
                self._connection.hset(f"{DELIVERED_KEY}{project}:{version}", items=items)

    def mark_mismatched(self, project: str) -> None:
        """Notes that LABEL_STUDIO_URL has another project of this number; nothing is pushed there."""
        with redis_errors():
            self._connection.set(MISMATCHED_KEY + project, 1, ex=MISMATCHED_TTL)

    def is_mismatched(self, project: str) -> bool:
        """Returns whether the project is marked as mismatched."""
        with redis_errors():
            return bool(self._connection.exists(MISMATCHED_KEY + project))
