"""The task that kills workers fails alone; the others of its chunk go on."""

import pytest
from redis import Redis
from rq.job import Job
from rq.results import Result

from backend.queue.messages import ANSWER, Prediction
from backend.queue.predict_queue import PredictQueue
from backend.queue.recovery import MAX_LOST_ATTEMPTS, LostChunk, count_lost_attempts
from tests.chunks import CHECKPOINT, PREDICTION, make_answers, make_chunk, make_error

ANSWERED = Prediction(**PREDICTION)


class KilledError(BaseException):
    """Stands for a kill: nothing runs after it that a kill would not let run."""


def test_the_task_at_work_at_a_second_death_gets_an_error(connection: Redis) -> None:
    chunk = LostChunk(connection, "some-job")
    chunk.blame_task_at_work()
    assert chunk.load_answers() == {}
    with chunk.working_on(0):
        pass
    chunk.save_answer(0, ANSWERED)
    with pytest.raises(KilledError), chunk.working_on(1):
        raise KilledError
    chunk.blame_task_at_work()
    answers = chunk.load_answers()
    assert answers[0] == ANSWERED
    assert answers[1].error.code == "worker_died"


def test_a_planned_stop_blames_no_task(connection: Redis) -> None:
    chunk = LostChunk(connection, "some-job")
    with pytest.raises(SystemExit), chunk.working_on(0):
        raise SystemExit
    chunk.blame_task_at_work()
    assert chunk.load_answers() == {}


def test_saved_answers_are_dropped_when_the_chunk_is_requested_again(connection: Redis) -> None:
    queue = PredictQueue(connection, CHECKPOINT)
    (job,) = queue.enqueue([make_chunk({"id": 1})])
    chunk = LostChunk(connection, job.id)
    chunk.save_answer(0, ANSWER.validate_python(make_error("HTTP 503")))
    Result.create(job, Result.Type.SUCCESSFUL, 60, return_value=make_answers([make_error("HTTP 503")]))
    queue.enqueue([make_chunk({"id": 1})])
    assert chunk.load_answers() == {}


@pytest.mark.parametrize(("retries_left", "expected"), [(MAX_LOST_ATTEMPTS, 0), (MAX_LOST_ATTEMPTS - 1, 1)])
def test_lost_attempts_are_what_rq_has_used_up(connection: Redis, retries_left: int, expected: int) -> None:
    (job,) = PredictQueue(connection, CHECKPOINT).enqueue([make_chunk({"id": 1})])
    connection.hset(job.key, "retries_left", retries_left)
    fetched = Job.fetch(job.id, connection=connection, serializer=job.serializer)
    assert count_lost_attempts(fetched) == expected
