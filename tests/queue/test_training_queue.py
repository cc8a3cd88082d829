import itertools
import time

import pytest
from redis import Redis

from backend.monitoring.feedback import AnnotationEvent, AnnotationLog
from backend.monitoring.project_stats import BOX_OUTCOMES, get_project_summaries, save_summary
from backend.queue.allowed_job import TRAIN_FUNCTION, make_queue
from backend.queue.training_queue import FIT, TrainingQueue
from backend.queue.worker_loop import make_worker
from backend.settings import Settings
from backend.training.training_job import train

EVENTS = [
    (1, 10, "2026-01-01T10:00", False, {"car": [1, 0, 1, 0]}),
    (1, 10, "2026-01-01T11:00", False, {"car": [0, 1, 1, 0], "dog": [0, 0, 0, 2]}),
    (2, 10, "2026-01-01T10:30", False, {"car": [7, 7, 7, 7]}),
    (2, None, "", True),
    (3, 11, "2026-01-01T12:00", False, {"dog": [1, 0, 0, 0]}),
]


def test_the_same_events_in_any_order_and_twice_give_the_same_evidence(connection: Redis) -> None:
    found, fates = set(), []
    for number, order in enumerate(itertools.permutations(EVENTS)):
        evidence = AnnotationLog(connection, str(number))
        for event in (*order, order[0]):
            evidence.record([AnnotationEvent(*event)])
        evidence.record([AnnotationEvent(*event) for event in order])
        found.add(tuple(evidence.annotations().items()))
        save_summary(connection, str(number), "v", None, "")
        fates.append(get_project_summaries(connection)[0]["boxes"])
    assert found == {((1, 10), (3, 11))}
    car, dog = (
        {**dict.fromkeys(BOX_OUTCOMES, 0), **more} for more in ({"changed": 1, "deleted": 1}, {"kept": 1, "drawn": 2})
    )
    assert all(
        {label: counts for label, counts in row.items() if any(counts.values())} == {"car": car, "dog": dog}
        for row in fates
    )


def test_10000_annotations_in_one_event_are_recorded_in_no_time(connection: Redis) -> None:
    start = time.perf_counter()
    boxes = {f"label {n}": [n, 0, 1, 0] for n in range(5)}
    AnnotationLog(connection, "1").record(
        [AnnotationEvent(number, number, "2026", False, boxes) for number in range(10_000)]
    )
    assert time.perf_counter() - start < 0.9  # Label Studio waits a second
    assert len(AnnotationLog(connection, "1").annotations()) == 10_000


def test_a_second_click_returns_the_training_that_waits(connection: Redis) -> None:
    trainings = TrainingQueue(connection)
    assert trainings.start("7", "encoder") == trainings.start("7", "all") == "fit-7"
    assert trainings.start("8", "encoder") == "fit-8"
    (job, _) = make_queue(FIT, connection).jobs
    assert (job.func_name, job.args[0]["project"], job.args[0]["train"]) == (TRAIN_FUNCTION, "7", "encoder")
    assert [(row["project"], row["state"]) for row in trainings.list_progress()] == [("7", "queued"), ("8", "queued")]


@pytest.mark.timeout(60)
def test_a_training_that_is_over_makes_room_for_another(connection: Redis, redis_url: str, tmp_path) -> None:
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
