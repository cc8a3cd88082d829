import json
import time
from pathlib import Path

import pytest
from redis import Redis
from rq import SimpleWorker
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer

from backend.errors import QueueUnavailable
from backend.queue.backlogs import Place
from backend.queue.jobs import PREDICT_FUNCTION, AllowedJob, JobFunction, make_queue
from backend.queue.live_workers import READY_KEY, describe_worker, save_heartbeat
from backend.queue.messages import Chunk, Prediction, read_message
from backend.queue.predict_queue import PredictQueue
from backend.queue.redis import connect
from tests.chunks import CHECKPOINT, PREDICT_QUEUE, PREDICTION, make_answers, make_chunk, make_error

CHUNK = make_chunk({"id": 1, "data": {"image": "http://x/?token=s3cret"}})


def run_waiting_jobs(connection: Redis, **functions: JobFunction) -> None:
    """Runs all waiting jobs in this process, as a worker with these functions does."""
    job_class = AllowedJob.with_functions(functions)
    SimpleWorker([PREDICT_QUEUE], connection=connection, serializer=JSONSerializer, job_class=job_class).work(
        burst=True, logging_level="ERROR"
    )


def test_interactive_jobs_go_to_the_front(connection: Redis) -> None:
    queue = PredictQueue(connection, CHECKPOINT)
    bulk = queue.enqueue([make_chunk({"id": 1}, model_version=str(number)) for number in range(3)])
    urgent = queue.enqueue([CHUNK], Place.URGENT)
    waiting = make_queue(PREDICT_QUEUE, connection).job_ids
    assert waiting == [job.id for job in urgent + bulk]


def test_a_job_is_json_and_its_description_shows_no_address(connection: Redis) -> None:
    (job,) = PredictQueue(connection, CHECKPOINT).enqueue([CHUNK])
    stored = connection.hgetall(f"rq:job:{job.id}")
    assert stored[b"description"] == b"predict 1 tasks"
    assert read_message(Chunk, json.loads(json.dumps(job.args))[0]) == CHUNK


@pytest.mark.parametrize("name", ["os.system", "backend.prediction.predict_worker.run", "subprocess.run", "train"])
def test_a_forged_job_does_not_run(connection: Redis, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "pwned"
    queue = make_queue(PREDICT_QUEUE, connection)
    job = queue.enqueue(name, f"touch {mark}")
    run_waiting_jobs(connection, predict=lambda payload: {})
    assert not mark.exists()
    assert "runs only its own functions" in job.latest_result().exc_string


def test_forged_callbacks_do_not_run(connection: Redis, tmp_path: Path) -> None:
    queue = make_queue(PREDICT_QUEUE, connection)
    job = queue.enqueue(PREDICT_FUNCTION, CHUNK.payload)
    mark = tmp_path / "pwned"
    for kind in ("success", "failure", "stopped"):
        connection.hset(f"rq:job:{job.id}", f"{kind}_callback_name", "os.system")
    allowed = AllowedJob.fetch(job.id, connection=connection, serializer=JSONSerializer)
    assert (allowed.success_callback, allowed.failure_callback, allowed.stopped_callback) == (None, None, None)
    payloads = []
    run_waiting_jobs(connection, predict=lambda payload: payloads.append(payload) or {})
    assert len(payloads) == 1
    assert not mark.exists()


def test_waiting_for_a_failed_job_returns_none(connection: Redis) -> None:
    queue = PredictQueue(connection, CHECKPOINT)
    (job,) = queue.enqueue([make_chunk()])
    run_waiting_jobs(connection)
    assert queue.wait(job, time.monotonic() + 5) is None


def test_waiting_ends_at_the_deadline(connection: Redis) -> None:
    queue = PredictQueue(connection, CHECKPOINT)
    (job,) = queue.enqueue([CHUNK])
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        queue.wait(job, start + 0.5)
    assert time.monotonic() - start < 2.5
    assert Job.exists(job.id, connection=connection)


def finish_job(connection: Redis, job: Job, answers: list[dict]) -> None:
    """Takes a job off the queue and stores its answers, as a worker does."""
    make_queue(PREDICT_QUEUE, connection).remove(job)
    Result.create(job, Result.Type.SUCCESSFUL, ttl=60, return_value=make_answers(answers))


def test_a_waiting_chunk_is_not_enqueued_again(connection: Redis) -> None:
    queue = PredictQueue(connection, CHECKPOINT)
    first, again = queue.enqueue([CHUNK, CHUNK])
    assert first.id == again.id
    assert len(make_queue(PREDICT_QUEUE, connection)) == 1


def test_a_prediction_is_reused_and_an_error_is_predicted_again(connection: Redis) -> None:
    queue = PredictQueue(connection, CHECKPOINT)
    (job,) = queue.enqueue([CHUNK])
    finish_job(connection, job, [PREDICTION])
    assert queue.wait(queue.enqueue([CHUNK])[0], time.monotonic() + 1) == [Prediction(**PREDICTION)]
    connection.delete(f"rq:results:{job.id}")
    finish_job(connection, job, [make_error("away")])
    (new,) = queue.enqueue([CHUNK])
    assert new.latest_result() is None
    assert make_queue(PREDICT_QUEUE, connection).job_ids == [new.id]


def test_an_unreachable_redis_is_reported_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(QueueUnavailable, match="is Redis running"):
        PredictQueue(connect("redis://127.0.0.1:1"), CHECKPOINT).enqueue([CHUNK])
    assert time.monotonic() - start < 3


def test_an_annotators_request_moves_a_waiting_chunk_to_the_front(connection: Redis) -> None:
    queue = PredictQueue(connection, CHECKPOINT)
    chunks = [make_chunk({"id": number}) for number in range(3)]
    jobs = queue.enqueue(chunks)
    queue.enqueue(chunks[2:], Place.URGENT)
    waiting = make_queue(PREDICT_QUEUE, connection).job_ids
    assert waiting == [jobs[2].id, jobs[0].id, jobs[1].id]


def test_the_batch_size_is_the_smallest_of_the_ready_workers(connection: Redis) -> None:
    queue = PredictQueue(connection, CHECKPOINT)
    assert queue.get_batch_size() == 4
    for name, size in (("a", 16), ("b", 8)):
        save_heartbeat(connection, READY_KEY, name, describe_worker("cpu", "demo", CHECKPOINT, size))
    save_heartbeat(connection, READY_KEY, "other", describe_worker("cpu", "other", "another", 2))
    assert queue.get_batch_size() == 8
    assert set(queue.get_ready_workers()) == {"a", "b"}


def test_the_batch_size_outlasts_a_restart_of_the_workers(connection: Redis) -> None:
    queue = PredictQueue(connection, CHECKPOINT)
    save_heartbeat(connection, READY_KEY, "a", describe_worker("cpu", "demo", CHECKPOINT, 16))
    queue.get_batch_size()
    connection.delete(READY_KEY + "a")
    assert queue.get_batch_size() == 16  # a repeated request is cut into the same chunks
