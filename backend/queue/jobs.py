"""RQ's jobs and queues as this program uses them.

- Jobs run only the functions that their worker offers, and no callbacks: RQ resolves any import path that a job in
  Redis names, so whoever writes to Redis could run anything. Here the name of a job's function is a key into the
  functions of the worker, and nothing is imported.
- The job of a worker that died is found within seconds, and time is Redis's own: RQ would compare the clocks of the
  machines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from redis import Redis
from redis.client import Pipeline
from rq import Queue
from rq.exceptions import NoSuchJobError
from rq.executions import Execution, ExecutionRegistry
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job
from rq.registry import StartedJobRegistry
from rq.results import Result
from rq.serializers import JSONSerializer

PREDICT_FUNCTION = "predict"
TRAIN_FUNCTION = "train"
DELIVER_FUNCTION = "deliver"

EXECUTION_TTL = 8  # s after its last heartbeat for which the execution of a job counts as alive
FIRST_SEEN_TTL = 3600  # s
MAINTENANCE_INTERVAL = 1.8  # s between two searches for dead workers' jobs, of all workers together

JobFunction = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # plain JSON in and out

# KEYS: registry; ARGV: member, time to live in s, XX to update only.
ADD_EXECUTION_SCRIPT = """
if ARGV[3] == 'XX' and not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
return redis.call('ZADD', KEYS[1], redis.call('TIME')[1] + ARGV[2], ARGV[1])
"""


# KEYS: jobs that were taken off and not begun, note; ARGV: job id, time to live of the note in s.
FIRST_SEEN_SCRIPT = """
if not redis.call('LPOS', KEYS[1], ARGV[1]) then return 1 end
return redis.call('SET', KEYS[2], 1, 'NX', 'EX', ARGV[2]) and 1 or 0
"""


class ExecutionsOfJob(ExecutionRegistry):
    """The executions of one job. RQ's own raises for one that has expired, while it keeps its id for a minute more."""

    def get_executions(self, start: int = 0, end: int = -1) -> list[Execution]:
        """Returns the executions, without details where these have expired."""
        found = []
        for execution_id in self.get_execution_ids(start, end):
            try:
                found.append(Execution.fetch(execution_id, self.job_id, connection=self.connection))
            except (ValueError, KeyError):
                found.append(Execution(execution_id, self.job_id, self.connection))
        return found


class StartedJobs(StartedJobRegistry):
    """The executions at work in a queue, each with the time at which it counts as dead, by the clock of Redis."""

    def add_execution(self, execution: Execution, pipeline: Pipeline, ttl: int = 0, xx: bool = False) -> Any:
        """Adds an execution or, with `xx`, keeps one alive that is still there."""
        return pipeline.eval(ADD_EXECUTION_SCRIPT, 1, self.key, execution.composite_key, ttl, "XX" if xx else "")

    def cleanup(self, timestamp: float | None = None, exception_handlers: list[Any] | None = None) -> None:
        """Puts the jobs of dead workers back, as RQ's own method does."""
        super().cleanup(int(self.connection.time()[0]), exception_handlers)


class DequeuedJobs(IntermediateQueue):
    """The jobs that a worker took off a queue and has not begun yet."""

    def set_first_seen(self, job_id: str) -> bool:
        """Notes that the job was seen here; returns False if it was before. A job begun meanwhile gets no note."""
        keys = (self.key, self.get_first_seen_key(job_id))
        return bool(self.connection.eval(FIRST_SEEN_SCRIPT, 2, *keys, job_id, FIRST_SEEN_TTL))

    def should_be_cleaned_up(self, job_id: str) -> bool:
        """Returns whether the job's worker must be dead, by the clock of Redis."""
        seconds_left = int(self.connection.ttl(self.get_first_seen_key(job_id)))
        return seconds_left >= 0 and FIRST_SEEN_TTL - seconds_left > EXECUTION_TTL

    def remove(self, job_id: str) -> None:
        """Removes a job, and the note that it was seen: it may come here again."""
        super().remove(job_id)
        self.connection.delete(self.get_first_seen_key(job_id))


class AllowedJob(Job):
    """A job that runs a function of `functions`; the web front, which runs none, has no functions."""

    functions: ClassVar[Mapping[str, JobFunction]] = {}

    @classmethod
    def with_functions(cls, functions: Mapping[str, JobFunction]) -> type[AllowedJob]:
        """Makes the job class of a worker that offers these functions."""
        return type("AllowedJob", (cls,), {"functions": functions})

    @property
    def func(self) -> JobFunction:
        """The function to run.

        Raises:
            PermissionError: the worker does not offer it.
        """
        name = self.func_name or ""
        if name not in self.functions:
            raise PermissionError(f"this worker runs only its own functions, not {name!r}")
        return self.functions[name]

    @property
    def success_callback(self) -> None:
        """None: callbacks are import paths too."""

    @property
    def failure_callback(self) -> None:
        """None: callbacks are import paths too."""

    @property
    def stopped_callback(self) -> None:
        """None: callbacks are import paths too."""

    @property
    def execution_registry(self) -> ExecutionRegistry:
        """The executions of this job."""
        return ExecutionsOfJob(self.id, connection=self.connection)

    @property
    def started_job_registry(self) -> StartedJobRegistry:
        """The executions at work in the job's queue."""
        return StartedJobs(self.origin, connection=self.connection, job_class=type(self), serializer=self.serializer)


class JobQueue(Queue):
    """A queue whose jobs are plain JSON."""

    def __init__(self, name: str, connection: Redis, job_class: type[Job] = AllowedJob, **options: Any) -> None:
        super().__init__(name, connection=connection, job_class=job_class, **{**options, "serializer": JSONSerializer})

    @property
    def started_job_registry(self) -> StartedJobRegistry:
        """The executions at work."""
        return StartedJobs(queue=self, job_class=self.job_class, serializer=self.serializer)

    @property
    def intermediate_queue(self) -> IntermediateQueue:
        """The jobs that were taken off and not begun."""
        return DequeuedJobs(self.key, connection=self.connection)

    def acquire_maintenance_lock(self) -> bool:
        """Returns whether to search for dead workers' jobs now. The lock has no owner that could die: it expires."""
        milliseconds = int(MAINTENANCE_INTERVAL * 1000)
        return bool(self.connection.set(self.registry_cleaning_key, 1, nx=True, px=milliseconds))

    def release_maintenance_lock(self) -> None:
        """Does nothing: the lock expires."""


def make_queue(name: str, connection: Redis) -> JobQueue:
    """Makes the queue of this name."""
    return JobQueue(name, connection)


def fetch_job(job_id: str, connection: Redis) -> Job | None:
    """Fetches a job; None if Redis does not have it."""
    try:
        return AllowedJob.fetch(job_id, connection=connection, serializer=JSONSerializer)
    except NoSuchJobError:
        return None


def get_final_result(job: Job, timeout: int = 0) -> Result | None:
    """Returns a job's result, for which it waits up to `timeout` seconds; None while another attempt is to come."""
    result = job.latest_result(timeout=timeout)
    return None if result is None or result.type is Result.Type.RETRIED else result
