"""The backlogs of bulk work: one list of jobs for each project, from which a short queue is refilled in turn.

A worker takes jobs from the queue alone. Single tasks and small selections go there directly; bulk chunks wait in
their project's backlog, so nobody waits behind all of them, and the chunks of one project can be held back while the
server that holds its images is away (`pauses`). Every enqueuing and every begin of a job refills the queue.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

from redis import Redis
from redis.client import Pipeline
from rq.job import Job

from backend.queue.pauses import PAUSED_BULK_KEY

BACKLOG_KEY = "gdino:backlog:"  # + queue:project -> list of job ids
PROJECTS_KEY = "gdino:backlogs:"  # + queue -> list of the projects that have a backlog, in turn
REFILL_TO = 4  # jobs; a begin refills at once, so more workers than this do not wait
JOB_KEY = "rq:job:"

# KEYS: queue, projects; ARGV: jobs to refill to, BACKLOG_KEY + queue:, JOB_KEY, PAUSED_BULK_KEY.
REFILL_SCRIPT = """
local function refill(queue, projects, size, backlog, job, paused)
  for turn = 1, redis.call('LLEN', projects) + size do
    if redis.call('LLEN', queue) >= size then return end
    local project = redis.call('LPOP', projects)
    if not project then return end
    if redis.call('EXISTS', paused .. project) == 0 then
      local id = redis.call('LPOP', backlog .. project)
      if id and redis.call('EXISTS', job .. id) == 1 then redis.call('RPUSH', queue, id) end
    end
    if redis.call('EXISTS', backlog .. project) == 1 then redis.call('RPUSH', projects, project) end
  end
end
"""
REFILL_ONLY_SCRIPT = REFILL_SCRIPT + "refill(KEYS[1], KEYS[2], tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4])"

# KEYS: queue, projects, job; ARGV: as above, then place, job id, project, and the fields of the job with their values.
# Returns 1 if the job is new. One that exists stays where it is, but an urgent request moves it forward.
ENQUEUE_SCRIPT = (
    REFILL_SCRIPT
    + """
local size, backlog, job, paused = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
local place, id, project = ARGV[5], ARGV[6], ARGV[7]
local is_new = redis.call('HEXISTS', KEYS[3], 'data') == 0
if is_new then
  redis.call('DEL', KEYS[3])
  redis.call('HSET', KEYS[3], unpack(ARGV, 8))
elseif place ~= 'urgent' or redis.call('LREM', KEYS[1], 1, id) + redis.call('LREM', backlog .. project, 1, id) == 0 then
  return 0
end
if place == 'backlog' then
  if redis.call('RPUSH', backlog .. project, id) == 1 then redis.call('RPUSH', KEYS[2], project) end
elseif place == 'urgent' then
  redis.call('HSET', KEYS[3], 'is_urgent', 1)
  local is_inserted = false
  for _, other in ipairs(redis.call('LRANGE', KEYS[1], 0, -1)) do
    if not redis.call('HGET', job .. other, 'is_urgent') then
      is_inserted = redis.call('LINSERT', KEYS[1], 'BEFORE', other, id) > 0
      break
    end
  end
  if not is_inserted then redis.call('RPUSH', KEYS[1], id) end
else
  redis.call('RPUSH', KEYS[1], id)
end
refill(KEYS[1], KEYS[2], size, backlog, job, paused)
return is_new and 1 or 0
"""
)


class Place(enum.Enum):
    """Where a new job waits."""

    URGENT = "urgent"  # before all that is not urgent: somebody waits for one task
    QUEUE = "queue"  # behind what is in the queue: somebody waits for a small selection
    BACKLOG = "backlog"  # in the backlog of its project


class Backlogs:
    """The backlogs of one queue. Methods raise RedisError."""

    def __init__(self, connection: Redis, queue: str, queue_key: str) -> None:
        """Prepares the backlogs of a queue, given its name and its key in Redis."""
        self._connection, self._backlog = connection, f"{BACKLOG_KEY}{queue}:"
        self._keys = (queue_key, PROJECTS_KEY + queue)
        self._arguments = (REFILL_TO, self._backlog, JOB_KEY, PAUSED_BULK_KEY)
        self._enqueue = connection.register_script(ENQUEUE_SCRIPT)
        self._refill = connection.register_script(REFILL_ONLY_SCRIPT)

    def enqueue(self, jobs: Sequence[Job], place: Place, project: str) -> list[bool]:
        """Saves and enqueues jobs; returns for each whether it is new: one that exists keeps its place."""
        with self._connection.pipeline(transaction=False) as pipeline:
            for job in jobs:
                keys = (*self._keys, job.key)
                self._enqueue(keys, (*self._arguments, place.value, job.id, project, *_list_fields(job)), pipeline)
            return [bool(is_new) for is_new in pipeline.execute()]

    def refill(self, pipeline: Pipeline | None = None) -> None:
        """Moves jobs from the backlogs to the queue, a job of each project in turn, until REFILL_TO are there."""
        self._refill(self._keys, self._arguments, pipeline)

    def count(self) -> int:
        """Counts the jobs in the backlogs."""
        projects: list[bytes] = self._connection.lrange(self._keys[1], 0, -1)  # type: ignore[assignment]
        with self._connection.pipeline(transaction=False) as pipeline:
            for project in projects:
                pipeline.llen(self._backlog + project.decode())
            return sum(pipeline.execute())


def _list_fields(job: Job) -> list[Any]:
    """Lists the fields and values of a job's hash; RQ deletes a hash without `last_heartbeat` as a leftover."""
    fields = {name: value for name, value in job.to_dict().items() if value != "" or name == "last_heartbeat"}
    return [item for name, value in fields.items() for item in (name, getattr(value, "value", value))]
