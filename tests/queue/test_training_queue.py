import pytest
from redis import Redis

from backend.queue.jobs import TRAIN_FUNCTION, make_queue
from backend.queue.training_queue import FIT, TrainingQueue
from backend.queue.worker_loop import make_worker
from backend.settings import Settings
from backend.training.training_job import train


def test_a_second_click_returns_the_training_that_waits(connection: Redis) -> None:
    trainings = TrainingQueue(connection)
    assert trainings.start("7", "encoder") == trainings.start("7", "all") == "fit-7"
    assert trainings.start("8", "encoder") == "fit-8"
    (job, _) = make_queue(FIT, connection).jobs
    assert (job.func_name, job.args[0]["project"], job.args[0]["train"]) == (TRAIN_FUNCTION, "7", "encoder")
    assert [(row["project"], row["state"]) for row in trainings.list_progress()] == [("7", "queued"), ("8", "queued")]


@pytest.mark.timeout(60)
def test_another_training_can_start_when_one_is_over(connection: Redis, redis_url: str, tmp_path) -> None:
    settings = Settings(model="demo", model_dir=tmp_path, redis_url=redis_url)
    trainings = TrainingQueue(connection)
    trainings.start("7", "encoder")
    functions = {TRAIN_FUNCTION: lambda payload: train(settings, payload)}
    make_worker(settings, FIT, "w", functions).work(burst=True, max_jobs=1, logging_level="ERROR")
    row = trainings.get_progress("7")
    assert row["state"] == "failed"
    assert "does not answer" in row["text"] or "LABEL_STUDIO" in row["text"]
    trainings.start("7", "encoder")
    assert trainings.get_progress("7")["state"] == "queued"
    assert len(make_queue(FIT, connection).jobs) == 1
