"""What the tests of the delivery have in common: a project in the stand-in, finished chunks, a deliverer."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from redis import Redis
from rq.results import Result

from backend.delivery.deliver_job import Deliverer
from backend.delivery.outbox import Outbox, OutboxEntry
from backend.labelstudio.client import LabelStudioClient
from backend.queue.jobs import make_queue
from backend.queue.live_workers import make_worker_name
from backend.queue.messages import Chunk
from backend.queue.predict_queue import PREDICT, PredictQueue, make_backlogs
from backend.queue.redis import connect
from backend.queue.worker import ThreadWorker
from backend.queue.worker_loop import make_worker
from backend.registry.checkpoint import find_checkpoint
from backend.settings import Settings
from tests.chunks import CHECKPOINT, make_answers, make_chunk
from tests.label_studio_stand_in import LabelStudioStandIn

CREATED_AT = 1_700_000_000
VERSION = "demo-00000001"


def add_project(stand_in: LabelStudioStandIn, project: int, count: int, first: int = 1) -> None:
    """Adds a project whose tasks have the images that `make_task_chunks` asks for."""
    tasks = {number: {"image": f"{number}.png"} for number in range(first, first + count)}
    stand_in.add_project(project, "<View/>", CREATED_AT, tasks)


def make_task_chunks(count: int, size: int = 2, first: int = 1) -> list[Chunk]:
    """Makes chunks of `size` tasks each, of `count` tasks together."""
    tasks = [{"id": number, "data": {"image": f"{number}.png"}} for number in range(first, first + count)]
    return [make_chunk(*tasks[i : i + size], model_version=VERSION) for i in range(0, count, size)]


def make_prediction(task: int) -> dict[str, Any]:
    """Makes a prediction with one region, whose id is as stable as the real ones."""
    return {"result": [{"id": f"r{task}"}], "score": 0.5, "model_version": VERSION}


def make_settings(redis_url: str, url: str, **changes: Any) -> Settings:
    fields = {"model": "demo", "label_studio_url": url, "label_studio_api_key": "key", "import_timeout": 60}
    return Settings(**{**fields, "redis_url": redis_url, **changes})


def make_deliverer(connection: Redis, stand_in: LabelStudioStandIn, **changes: Any) -> Deliverer:
    settings = make_settings("redis://unused", stand_in.url, **changes)
    return Deliverer(settings, connection, LabelStudioClient(stand_in.url, "key"))


def add_entries(connection: Redis, chunks: Sequence[Chunk], project: str = "1", since: float | None = None) -> None:
    """Puts chunks into the outbox and the queue."""
    outbox = Outbox(connection)
    since = outbox.get_time() if since is None else since
    outbox.add([OutboxEntry.from_chunk(project, chunk, since, CREATED_AT) for chunk in chunks])
    PredictQueue(connection, CHECKPOINT).enqueue(chunks, project=project)


def finish_chunks(
    connection: Redis, chunks: Sequence[Chunk], project: str = "1", answers: Mapping[int, dict[str, Any]] | None = None
) -> None:
    """Answers chunks as a worker does, with a prediction for each task that has no other answer."""
    for chunk in chunks:
        rows = [(answers or {}).get(task.id, make_prediction(task.id)) for task in chunk.tasks]
        finish_chunk(connection, chunk, Result.Type.SUCCESSFUL, make_answers(rows))
    make_due(connection, chunks, project)


def finish_chunk(connection: Redis, chunk: Chunk, kind: Result.Type, value: Any = None) -> None:
    (job,) = PredictQueue(connection, CHECKPOINT).enqueue([chunk])
    connection.lrem(f"rq:queue:predict:{CHECKPOINT}", 0, job.id)
    connection.hset(job.key, "status", "finished")
    Result.create(job, kind, 60, return_value=value)


def make_due(connection: Redis, chunks: Sequence[Chunk], project: str = "1") -> None:
    """Makes entries due now, as the end of a job does, and ends a rest of their project."""
    outbox = Outbox(connection)
    outbox.postpone(project, [chunk.id for chunk in chunks], 0)
    outbox.schedule(project)


def deliver(connection: Redis, deliverer: Deliverer, project: str = "1") -> None:
    """Delivers a project that neither rests nor pauses."""
    connection.delete(f"gdino:resting:{project}", f"gdino:paused:delivery:{project}")
    deliverer.deliver_project(project)


@contextlib.contextmanager
def running_predict_worker(
    redis_url: str, answer: Callable[[int], dict[str, Any]] | None = None, seconds: float = 0
) -> Iterator[None]:
    """Runs a predict worker in a thread that takes the chunks of the demo checkpoint and looks at no image.

    Args:
        redis_url: of the queue.
        answer: makes the answer for a task; without it, a prediction with one region.
        seconds: that a chunk takes.
    """

    def predict(payload: Mapping[str, Any]) -> dict[str, Any]:
        time.sleep(seconds)
        rows = [
            answer(task["id"]) if answer else {**make_prediction(task["id"]), "model_version": payload["model_version"]}
            for task in payload["tasks"]
        ]
        return make_answers(rows)

    checkpoint = find_checkpoint("demo").fingerprint
    settings = Settings(redis_url=redis_url)
    refill = make_backlogs(connect(redis_url), checkpoint).refill
    worker = make_worker(
        settings, PREDICT + checkpoint, make_worker_name(), {"predict": predict}, begin=refill,
        worker_class=ThreadWorker,
    )  # fmt: skip
    thread = threading.Thread(target=worker.work, kwargs={"logging_level": "WARNING"}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        worker.stop()
        make_queue(PREDICT + checkpoint, connect(redis_url)).enqueue("predict", {"tasks": []})  # wakes it
        thread.join(10)
