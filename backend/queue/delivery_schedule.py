"""When the predictions of a chunk are looked at next, and which projects have something to look at.

The worker that ends a chunk makes it due at once, in the same transaction, so no wake-up can be lost: what is due stays
due until it is delivered. All times are of the clock of Redis.
"""

from __future__ import annotations

DUE_CHUNKS_KEY = "gdino:outbox:"  # + project -> sorted set: chunk id -> when it is due
DUE_PROJECTS_KEY = "gdino:outbox"  # sorted set: project -> when its first chunk is due

# finish(due chunks, due projects, time as from TIME, chunk id, project): makes a chunk of the outbox due now.
FINISH_SCRIPT = """
local function finish(chunks, projects, now, id, project)
  if redis.call('ZSCORE', chunks, id) then
    local seconds = now[1] + now[2] / 1000000
    redis.call('ZADD', chunks, 'LT', seconds, id)
    redis.call('ZADD', projects, 'LT', seconds, project)
  end
end
"""


def list_schedule_keys(project: str) -> list[str]:
    """Lists the keys that FINISH_SCRIPT takes."""
    return [DUE_CHUNKS_KEY + project, DUE_PROJECTS_KEY]
