"""RQ's worker, steadier: no dead worker, outage of Redis or planned stop loses a job or blames the innocent.

- A thread sends the heartbeats of the job at work and puts the jobs of dead workers back, with RQ's own registries and
  a time to live of seconds. It looks for the dead only after having been well itself for as long as a heartbeat lives:
  after an outage of Redis everybody looks dead.
- A job ends only for the worker that still holds it: one that was paused so long that another has its job is late, and
  its answer is thrown away.
- A job is begun and ended in one transaction each.
- A planned stop (SIGTERM) lets the job end in time, or puts it back unblamed.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from redis.client import Pipeline
from redis.exceptions import RedisError
from rq import Queue, SimpleWorker
from rq.exceptions import StopRequested
from rq.executions import Execution
from rq.job import Job
from rq.registry import FailedJobRegistry, FinishedJobRegistry
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.timeouts import TimerDeathPenalty
from rq.utils import now, utcformat
from rq.worker_registration import clean_worker_registry

from backend.errors import QueueUnavailable
from backend.queue.delivery_schedule import FINISH_SCRIPT, list_schedule_keys
from backend.queue.jobs import EXECUTION_TTL, AllowedJob, JobFunction, JobQueue
from backend.queue.redis import end_patience

log = logging.getLogger(__name__)

HEARTBEAT_INTERVAL = 2  # s; several heartbeats may be late before the execution of a job counts as dead
MAX_BEAT_SECONDS = 2  # longer, and Redis or this process was not well
ATTEMPTS_AFTER_EXCEPTION = 2  # of a job that raised: its exception may come from one task, or pass

# KEYS: started jobs, job, executions of the job, execution, executions of the worker, results, finished jobs, and the
# keys of the delivery schedule; ARGV: execution, job id, time to live of the answers, end of the job, project, and the
# fields and values of the result. Returns 0 if the job is not this worker's any more.
END_SCRIPT = (
    FINISH_SCRIPT
    + """
local is_mine = redis.call('ZREM', KEYS[1], ARGV[1]) == 1
redis.call('DEL', KEYS[4])
redis.call('SREM', KEYS[5], ARGV[1])
if not is_mine or redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
redis.call('DEL', KEYS[3])
redis.call('HSET', KEYS[2], 'status', 'finished', 'ended_at', ARGV[4])
redis.call('EXPIRE', KEYS[2], ARGV[3])
redis.call('XADD', KEYS[6], 'MAXLEN', '~', 10, '*', unpack(ARGV, 6))
redis.call('EXPIRE', KEYS[6], ARGV[3])
local now = redis.call('TIME')
redis.call('ZADD', KEYS[7], now[1] + ARGV[3], ARGV[2])
finish(KEYS[8], KEYS[9], now, ARGV[2], ARGV[5])
return 1
"""
)

# KEYS: started jobs, job, executions of the job, execution, executions of the worker, queue; ARGV: execution (empty if
# the job was not begun), job id, attempts left (empty: as before). Returns 0 if the job is not this worker's any more.
PUT_BACK_SCRIPT = """
if ARGV[1] ~= '' then
  local is_mine = redis.call('ZREM', KEYS[1], ARGV[1]) == 1
  redis.call('DEL', KEYS[4])
  redis.call('SREM', KEYS[5], ARGV[1])
  if not is_mine then return 0 end
  redis.call('DEL', KEYS[3])
elseif redis.call('HGET', KEYS[2], 'status') ~= 'queued' then
  return 0
end
if redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
redis.call('HSET', KEYS[2], 'status', 'queued')
if ARGV[3] ~= '' then redis.call('HSET', KEYS[2], 'retries_left', ARGV[3]) end
redis.call('LREM', KEYS[6], 1, ARGV[2])
redis.call('LPUSH', KEYS[6], ARGV[2])
return 1
"""


class Worker(SimpleWorker):
    """A worker of one queue that runs jobs in its own process."""

    queue_class: type[Queue] = JobQueue
    log_result_lifespan = False
    beat_interval: float = HEARTBEAT_INTERVAL

    def __init__(
        self,
        queue: str,
        *,
        functions: dict[str, JobFunction],
        beat: Callable[[], None],
        begin: Callable[[Pipeline], None] | None = None,
        stop_timeout: float = 0,
        **options: Any,
    ) -> None:
        """Prepares the worker; `work` starts it.

        Args:
            queue: its name.
            functions: what its jobs may run.
            beat: called with each heartbeat.
            begin: adds its commands to the transaction that begins a job.
            stop_timeout: s after SIGTERM at which a job that still runs is put back.
            options: of RQ's worker.
        """
        super().__init__(
            [queue],
            job_class=AllowedJob.with_functions(functions),
            serializer=JSONSerializer,
            log_job_description=False,
            **options,
        )
        self.is_stopped = False
        self._call_beat, self._begin, self._stop_timeout = beat, begin, stop_timeout
        self._ended = threading.Event()
        self._end = self.connection.register_script(END_SCRIPT)
        self._put_back = self.connection.register_script(PUT_BACK_SCRIPT)

    # The thread of the heartbeats.

    def work(self, *arguments: Any, **options: Any) -> bool:
        """Runs jobs, as RQ's own method does, with a thread that keeps them alive."""
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()
        try:
            return super().work(*arguments, **options)
        finally:
            self._ended.set()
            thread.join(1)  # it may be waiting for Redis

    def _beat(self) -> None:
        well_since = time.monotonic()
        while True:
            start = time.monotonic()
            try:
                for execution in list(self.executions.values()):
                    self.maintain_heartbeats(execution.job, execution)
                self._call_beat()
                if start - well_since > EXECUTION_TTL:
                    self.clean_registries()
            except (RedisError, QueueUnavailable) as error:
                log.warning("heartbeat failed: Redis does not answer (%s)", type(error).__name__)
                well_since = time.monotonic()
            except Exception:  # a worker without heartbeats would count as dead
                log.exception("heartbeat failed")
                well_since = time.monotonic()
            if time.monotonic() - start > MAX_BEAT_SECONDS:
                well_since = time.monotonic()
            waiting_since = time.monotonic()
            if self._ended.wait(self.beat_interval):
                return
            if time.monotonic() - waiting_since > self.beat_interval + MAX_BEAT_SECONDS:  # the process was paused
                well_since = time.monotonic()

    @property
    def should_run_maintenance_tasks(self) -> bool:
        """False: the thread does it, also while a job runs."""
        return False

    def clean_registries(self) -> None:
        """Puts the jobs of dead workers back, one worker of all at a time."""
        for queue in self.queues:
            if queue.acquire_maintenance_lock():
                queue.started_job_registry.cleanup(exception_handlers=[log_death])
                queue.intermediate_queue.cleanup(self, queue)
                for registry in (FinishedJobRegistry, FailedJobRegistry):
                    registry(queue=queue, job_class=self.job_class).cleanup()
                clean_worker_registry(queue)  # of workers that were killed

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        """Returns the seconds for which an execution lives without a heartbeat."""
        return EXECUTION_TTL

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """Keeps this worker in RQ's list; the thread's heartbeats, which come with a pipeline, are enough."""
        if pipeline is not None or self.get_state() != "busy":
            super().heartbeat(timeout, pipeline)

    # A job's begin and end.

    def prepare_execution(self, job: Job) -> Execution:
        """Begins a job, in one transaction."""
        (queue,) = self.queues
        with self.connection.pipeline() as pipeline:
            execution = Execution.create(job, EXECUTION_TTL, pipeline=pipeline, worker_name=self.name)
            job.prepare_for_execution(self.name, pipeline=pipeline)
            pipeline.persist(job.key)
            pipeline.lrem(queue.intermediate_queue_key, 1, job.id)
            # It may be put back, and taken off again: the note would make it look abandoned then.
            pipeline.delete(queue.intermediate_queue.get_first_seen_key(job.id))
            self.set_state("busy", pipeline=pipeline)
            if self._begin:
                self._begin(pipeline)
            self.executions[execution.id] = execution
            pipeline.execute()
        return execution

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:
        """Does nothing: `prepare_execution` has done it."""

    def handle_execution_ended(self, job: Job, queue: Queue, heartbeat_ttl: int) -> None:
        """Notes when the job ended; the transaction that ends it saves it."""
        job.ended_at = now()

    def handle_job_success(self, job: Job, queue: Queue, started_job_registry: Any, execution: Execution) -> None:
        """Ends a job and saves its answers, unless it is not this worker's any more."""
        result = Result(job.id, Result.Type.SUCCESSFUL, self.connection, return_value=job._result,
                        worker_name=self.name, serializer=job.serializer)  # fmt: skip
        project = str(job.meta.get("project") or "")
        keys = [*self._list_keys(job, execution), f"rq:results:{job.id}", queue.finished_job_registry.key]
        fields = [item for field in result.serialize().items() for item in field]
        arguments = [
            execution.composite_key,
            job.id,
            job.get_result_ttl(self.default_result_ttl),
            utcformat(now()),
            project,
            *fields,
        ]
        if not self._end([*keys, *list_schedule_keys(project)], arguments):
            log.warning("%s was put back before it ended here; another worker answers", job.description)
        self.executions.pop(execution.id, None)

    def handle_job_failure(
        self,
        job: Job,
        queue: Queue,
        started_job_registry: Any = None,
        exc_string: str = "",
        execution: Execution | None = None,
    ) -> None:
        """Puts a job back that this worker stops for, that it never began, or that has attempts left; else fails it."""
        retries_left = job.retries_left or 0
        is_blamed = not self.is_stopped and execution is not None
        if execution and is_blamed and not retries_left:
            if self.connection.zscore(queue.started_job_registry.key, execution.composite_key) is not None:
                super().handle_job_failure(job, queue, started_job_registry, exc_string, execution)
        else:
            attempts = min(retries_left, ATTEMPTS_AFTER_EXCEPTION + 1) - 1 if is_blamed else ""
            keys = [*self._list_keys(job, execution), queue.key]
            self._put_back(keys, [execution.composite_key if execution else "", job.id, attempts])
        if execution:
            self.executions.pop(execution.id, None)

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """Logs the exception of a job; the end of this worker is none."""
        if not (self.is_stopped and exc_info[0] is SystemExit):
            super().handle_exception(job, *exc_info)

    def _list_keys(self, job: Job, execution: Execution | None) -> list[str]:
        (queue,) = self.queues
        return [
            queue.started_job_registry.key,
            job.key,
            f"rq:executions:{job.id}",
            execution.key if execution else "",
            self.executions_key,
        ]

    # Stopping.

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Stops after the current job, or puts it back once `stop_timeout` or a second signal comes."""
        is_second, self.is_stopped, self._stop_requested = self.is_stopped, True, True
        if not self.executions:
            super().request_stop(signum, frame)  # type: ignore[no-untyped-call]
        if is_second or not self._stop_timeout:
            end_patience(self.connection)
            raise SystemExit  # ends the job as a failure, which `handle_job_failure` does not count
        timer = threading.Timer(self._stop_timeout, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()

    def teardown(self) -> None:
        """Takes this worker off RQ's list, without waiting for a Redis that is away."""
        end_patience(self.connection)
        try:
            self.register_death()  # type: ignore[no-untyped-call]
        except RedisError:
            log.warning("Redis does not answer; the entry of this worker there expires")

    def check_for_suspension(self, burst: bool) -> None:
        """Does nothing: workers are not suspended."""

    def subscribe(self) -> None:
        """Does nothing: this worker takes no commands by way of Redis."""


def log_death(job: Job, *exc_info: Any) -> None:
    """Logs that a job is put back because its worker died."""
    log.warning("worker %s died while running %s; it is put back", job.worker_name, job.description)


class ThreadWorker(Worker):
    """A worker that runs in a thread beside others: its process receives the signals and calls `stop`."""

    death_penalty_class = TimerDeathPenalty

    def _install_signal_handlers(self) -> None:
        pass

    def prepare_execution(self, job: Job) -> Execution:
        """Begins a job; one that was waited for when the stop came goes back."""
        if self.is_stopped:
            (queue,) = self.queues
            self.handle_job_failure(job, queue)
            queue.intermediate_queue.remove(job.id)
            raise StopRequested
        return super().prepare_execution(job)

    def holds_job(self) -> bool:
        """Returns whether the job at work is still this worker's; raises RedisError."""
        (queue,) = self.queues
        executions = [execution.composite_key for execution in self.executions.values()]
        return all(self.connection.zscore(queue.started_job_registry.key, key) is not None for key in executions)

    def stop(self) -> None:
        """Stops after the current job."""
        self.is_stopped = self._stop_requested = True
