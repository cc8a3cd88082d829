"""Workers that die, are paused, stopped or cut off from Redis: no job is lost, none is blamed without reason.

Also the contract test for the installed RQ: the registries, lists and methods that `worker` and `jobs` build on.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.results import Result

from backend.queue import private_redis
from backend.queue.jobs import EXECUTION_TTL, make_queue
from backend.queue.live_workers import READY_KEY, get_live_workers
from backend.queue.predict_queue import delete_chunk
from backend.queue.recovery import MAX_LOST_ATTEMPTS, allow_lost_attempts, count_lost_attempts
from backend.queue.redis import connect
from backend.queue.worker import HEARTBEAT_INTERVAL
from backend.queue.worker_loop import make_worker
from backend.settings import Settings
from tests.chunks import PREDICT_QUEUE
from tests.servers import wait_for

pytestmark = pytest.mark.timeout(240)

RECOVERY_LIMIT = 15  # s in which a lost job is found
OUTAGE = 60 if os.environ.get("CHAOS") == "full" else 13  # s, longer than an execution lives

StartWorker = Callable[..., subprocess.Popen[bytes]]


class RedisProcess:
    """A Redis of a test's own that can be stopped and started with its data."""

    def __init__(self, folder: Path) -> None:
        self.socket, self.folder = folder / "r.sock", folder
        self.url = private_redis.make_url(self.socket)
        self.connection = connect(self.url)
        self.start()

    def start(self) -> None:
        command = private_redis.build_command(private_redis.find_server(), self.socket, self.folder)
        self.process = subprocess.Popen(command)
        private_redis.wait_until_ready(self.url)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


@pytest.fixture
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("r"))
    yield process
    process.stop()


@pytest.fixture
def start_worker(redis_process: RedisProcess) -> Iterator[StartWorker]:
    """Starts worker processes and waits until they are ready; they are killed at the end."""
    workers: list[subprocess.Popen[bytes]] = []

    def start(stop_timeout: int = 8) -> subprocess.Popen[bytes]:
        before = len(get_live_workers(redis_process.connection, READY_KEY))
        command = [sys.executable, "-m", "tests.queue.worker_program", redis_process.url, str(stop_timeout)]
        workers.append(subprocess.Popen(command, stderr=subprocess.PIPE))
        wait_for(lambda: len(get_live_workers(redis_process.connection, READY_KEY)) > before, 30, "a ready worker")
        return workers[-1]

    yield start
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGCONT)
        worker.kill()
        worker.communicate()


def enqueue(connection: Redis, **payload: float) -> Job:
    options = {"retry": allow_lost_attempts(), "job_timeout": 3600, "result_ttl": 600}
    return make_queue(PREDICT_QUEUE, connection).enqueue("predict", payload, **options)


def is_at_work(job: Job) -> bool:
    return job.get_status() is JobStatus.STARTED


def wait_for_result(job: Job, seconds: float) -> Result:
    result = wait_for(lambda: job.latest_result(), seconds, "the result")
    assert isinstance(result, Result)
    return result


def test_the_job_of_a_killed_worker_is_done_by_another(redis_process: RedisProcess, start_worker: StartWorker) -> None:
    first, second = start_worker(), start_worker()
    job = enqueue(redis_process.connection, seconds=1)
    wait_for(lambda: is_at_work(job), 10, "work")
    job.refresh()
    is_first = f"-{first.pid}-" in job.worker_name
    at_work, other = (first, second) if is_first else (second, first)
    at_work.kill()
    start = time.monotonic()
    result = wait_for_result(job, RECOVERY_LIMIT)
    assert result.return_value == {"pid": other.pid}
    assert time.monotonic() - start > EXECUTION_TTL - HEARTBEAT_INTERVAL  # it was not given up early
    job.refresh()
    assert count_lost_attempts(job) == 1


def test_a_job_that_was_taken_off_the_queue_and_not_begun_is_put_back_unblamed(
    redis_process: RedisProcess, start_worker: StartWorker
) -> None:
    connection, queue = redis_process.connection, make_queue(PREDICT_QUEUE, redis_process.connection)
    job = enqueue(connection)
    connection.lmove(queue.key, queue.intermediate_queue_key, "LEFT", "RIGHT")
    start_worker()
    wait_for_result(job, EXECUTION_TTL + RECOVERY_LIMIT)  # it looks for the dead only once it was well for a while
    job.refresh()
    assert count_lost_attempts(job) == 0
    assert not connection.keys("*:first_seen:*")  # a second time it may be a living worker's again


def test_a_job_that_was_seen_before_it_was_begun_does_not_count_as_abandoned_later(
    redis_process: RedisProcess,
) -> None:
    connection, queue = redis_process.connection, make_queue(PREDICT_QUEUE, redis_process.connection)
    worker = make_worker(Settings(redis_url=redis_process.url), PREDICT_QUEUE, "w", {})
    job = enqueue(connection)
    taken, _ = worker.dequeue_job_and_maintain_ttl(1)
    queue.intermediate_queue.cleanup(worker, queue)
    note = queue.intermediate_queue.get_first_seen_key(job.id)
    assert connection.exists(note)
    worker.prepare_execution(taken)
    assert not connection.exists(note)
    assert queue.intermediate_queue.set_first_seen(job.id)  # by a worker that looked a moment before
    assert not connection.exists(note)


def test_a_job_that_no_worker_is_at_is_found_though_its_worker_lives(
    redis_process: RedisProcess, start_worker: StartWorker
) -> None:
    connection = redis_process.connection
    start_worker()
    (name,) = get_live_workers(connection, READY_KEY)
    time.sleep(EXECUTION_TTL + 1)
    job = enqueue(connection)
    connection.delete(make_queue(PREDICT_QUEUE, connection).key)
    with connection.pipeline() as pipeline:  # as when the end of the job was lost in a failover
        Execution.create(job, EXECUTION_TTL, pipeline, name)
        job.prepare_for_execution(name, pipeline)
        pipeline.execute()
    wait_for_result(job, RECOVERY_LIMIT)


def test_the_answer_of_a_worker_that_was_paused_too_long_is_thrown_away(
    redis_process: RedisProcess, start_worker: StartWorker
) -> None:
    first = start_worker()
    job = enqueue(redis_process.connection, seconds=2)
    wait_for(lambda: is_at_work(job), 10, "work")
    second = start_worker()
    first.send_signal(signal.SIGSTOP)
    result = wait_for_result(job, EXECUTION_TTL + RECOVERY_LIMIT)
    assert result.return_value == {"pid": second.pid}
    first.send_signal(signal.SIGCONT)
    time.sleep(3)
    assert len(job.results()) == 1
    assert first.poll() is None
    assert wait_for_result(enqueue(redis_process.connection), 5)  # and both work on


def test_an_outage_of_redis_ends_no_worker_and_blames_nobody(
    redis_process: RedisProcess, start_worker: StartWorker
) -> None:
    workers = [start_worker() for _ in range(3)]
    connection = redis_process.connection
    during, after = enqueue(connection, seconds=OUTAGE / 2), enqueue(connection, seconds=OUTAGE + 8)
    waiting = [enqueue(connection, seconds=0.2) for _ in range(3)]
    wait_for(lambda: is_at_work(during) and is_at_work(after), 10, "work")
    wait_for(lambda: all(job.latest_result() for job in waiting), 10, "the short jobs")
    time.sleep(1)  # the last append-only second
    redis_process.stop()
    time.sleep(OUTAGE)
    redis_process.start()
    for job in (during, after, enqueue(connection)):
        wait_for_result(job, 40)
        job.refresh()
        assert (count_lost_attempts(job), len(job.results())) == (0, 1)
    assert [worker.poll() for worker in workers] == [None] * 3
    assert connection.zcard(make_queue(PREDICT_QUEUE, connection).started_job_registry.key) == 0


def test_a_planned_stop_lets_a_short_job_end(redis_process: RedisProcess, start_worker: StartWorker) -> None:
    worker = start_worker()
    job = enqueue(redis_process.connection, seconds=1.5)
    wait_for(lambda: is_at_work(job), 10, "work")
    worker.terminate()
    assert worker.wait(10) == 0
    assert job.latest_result().return_value == {"pid": worker.pid}
    assert get_live_workers(redis_process.connection, READY_KEY) == {}


def test_a_planned_stop_puts_a_long_job_back_unblamed(redis_process: RedisProcess, start_worker: StartWorker) -> None:
    worker, connection = start_worker(stop_timeout=3), redis_process.connection
    job, next_job = enqueue(connection, seconds=60), enqueue(connection)
    wait_for(lambda: is_at_work(job), 10, "work")
    start = time.monotonic()
    worker.terminate()
    assert worker.wait(10) == 0
    assert time.monotonic() - start < 3
    assert make_queue(PREDICT_QUEUE, connection).job_ids == [job.id, next_job.id]
    job.refresh()
    assert (job.get_status(), count_lost_attempts(job), job.results()) == (JobStatus.QUEUED, 0, [])
    assert b"exception" not in worker.stderr.read()


@pytest.mark.parametrize("seconds", [0, 60])
def test_a_stop_does_not_wait_for_a_redis_that_is_away(
    redis_process: RedisProcess, start_worker: StartWorker, seconds: int
) -> None:
    worker = start_worker(stop_timeout=3)
    if seconds:
        job = enqueue(redis_process.connection, seconds=seconds)
        wait_for(lambda: is_at_work(job), 10, "work")
    redis_process.stop()
    time.sleep(3)
    worker.terminate()
    worker.wait(5)
    redis_process.start()


def test_a_job_that_raises_is_tried_again_and_fails_in_the_end(
    redis_process: RedisProcess, start_worker: StartWorker
) -> None:
    start_worker()
    job = enqueue(redis_process.connection, raises=1)
    result = wait_for_result(job, 10)
    assert (result.type, job.get_status()) == (Result.Type.FAILED, JobStatus.FAILED)
    assert "as requested" in result.exc_string
    job.refresh()
    assert count_lost_attempts(job) == MAX_LOST_ATTEMPTS
    wait_for_result(enqueue(redis_process.connection), 5)


def test_a_worker_whose_loop_breaks_ends_with_an_error(redis_process: RedisProcess, start_worker: StartWorker) -> None:
    worker, key = start_worker(), make_queue(PREDICT_QUEUE, redis_process.connection).key
    redis_process.connection.set(key, "not a list")
    assert worker.wait(20) == 1  # a supervisor starts another; with 0 it would not
    assert b"the worker's loop ended unexpectedly" in worker.stderr.read()


def test_a_job_that_was_deleted_meanwhile_leaves_nothing(
    redis_process: RedisProcess, start_worker: StartWorker
) -> None:
    start_worker()
    connection = redis_process.connection
    job = enqueue(connection, seconds=2)
    wait_for(lambda: is_at_work(job), 10, "work")
    delete_chunk(connection, job.id)  # as the playground does at its deadline: the job holds the image
    time.sleep(4)
    assert connection.exists(job.key, f"rq:results:{job.id}", f"gdino:chunk:{job.id}") == 0
    wait_for_result(enqueue(connection), 5)
