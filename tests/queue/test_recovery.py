"""Our recovery reads what RQ keeps of jobs at work: a contract test for the pinned version."""

import time

import pytest
from redis import Redis
from rq.executions import prepare_execution
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job
from rq.results import Result

from backend.queue import recovery
from backend.queue.jobs import PREDICT_FUNCTION, make_queue
from backend.queue.live_workers import READY_KEY
from backend.queue.messages import ANSWER, Prediction
from backend.queue.predict_queue import PREDICT, PredictQueue
from backend.queue.recovery import LostChunk, Recovery
from backend.queue.worker_loop import make_worker
from backend.settings import Settings
from tests.chunks import PREDICTION, make_answers, make_chunk, make_error

ANSWERED = Prediction(**PREDICTION)


def begin_job(connection: Redis, redis_url: str, worker: str) -> Job:
    """Enqueues a job and lets a worker of this name begin_job it."""
    (job,) = PredictQueue(connection).enqueue([make_chunk({"id": 1}, {"id": 2})])
    rq_worker = make_worker(Settings(redis_url=redis_url), PREDICT, worker, {})
    dequeued, _ = rq_worker.dequeue_job_and_maintain_ttl(1)
    assert dequeued.id == job.id
    prepare_execution(rq_worker, dequeued)
    with connection.pipeline() as pipeline:
        dequeued.prepare_for_execution(worker, pipeline)
        pipeline.execute()
    return job


def recover(connection: Redis) -> None:
    connection.delete(recovery.LOCK_KEY + PREDICT)
    Recovery(connection, make_queue(PREDICT, connection), READY_KEY).requeue_lost()


def test_a_job_of_a_live_worker_is_not_requeued(connection: Redis, redis_url: str) -> None:
    begin_job(connection, redis_url, "living")
    connection.set(READY_KEY + "living", 4)
    recover(connection)
    assert make_queue(PREDICT, connection).job_ids == []


def test_a_job_of_a_dead_worker_goes_to_the_front_once(connection: Redis, redis_url: str) -> None:
    job = begin_job(connection, redis_url, "dead")
    PredictQueue(connection).enqueue([make_chunk({"id": 3})])
    recover(connection)
    recover(connection)
    assert make_queue(PREDICT, connection).job_ids[0] == job.id
    assert len(make_queue(PREDICT, connection).job_ids) == 2
    assert make_queue(PREDICT, connection).fetch_job(job.id).func_name == PREDICT_FUNCTION
    assert LostChunk(connection, job.id).count_deaths() == 1


def test_a_job_that_was_dequeued_but_not_begun_is_requeued(
    connection: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = PredictQueue(connection).enqueue([make_chunk({"id": 1})])
    queue = make_queue(PREDICT, connection)
    connection.lmove(queue.key, IntermediateQueue.get_intermediate_queue_key(queue.key), "LEFT", "RIGHT")
    recover(connection)
    assert queue.job_ids == []  # it may be a living worker's
    monkeypatch.setattr(recovery, "READY_TTL", 0.1)
    time.sleep(0.2)
    recover(connection)
    recover(connection)
    assert queue.job_ids == [job.id]
    assert connection.llen(IntermediateQueue.get_intermediate_queue_key(queue.key)) == 0


def test_the_task_at_work_at_a_second_death_gets_an_error(connection: Redis) -> None:
    chunk = LostChunk(connection, "some-job")
    chunk.record_death()
    assert chunk.load_answers() == {}
    chunk.mark_started(0)
    chunk.save_answer(0, ANSWERED)
    chunk.mark_started(1)
    chunk.record_death()
    assert chunk.count_deaths() == 2
    answers = chunk.load_answers()
    assert answers[0] == ANSWERED
    assert answers[1].error.code == "worker_died"


def test_saved_answers_are_dropped_when_the_chunk_is_requested_again(connection: Redis) -> None:
    queue = PredictQueue(connection)
    (job,) = queue.enqueue([make_chunk({"id": 1})])
    chunk = LostChunk(connection, job.id)
    chunk.record_death()
    chunk.save_answer(0, ANSWER.validate_python(make_error("HTTP 503")))
    Result.create(job, Result.Type.SUCCESSFUL, 60, return_value=make_answers([make_error("HTTP 503")]))
    queue.enqueue([make_chunk({"id": 1})])
    assert chunk.count_deaths() == 0
    assert chunk.load_answers() == {}
