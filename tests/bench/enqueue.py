"""`make bench`: the CPU time in which the web front cuts 10,000 tasks into chunks, notes and enqueues them."""

import tempfile
import time
from pathlib import Path

from backend.delivery.bulk import BulkSender
from backend.queue.redis import connect
from backend.registry.project_model import ProjectModel
from backend.settings import Settings
from tests.bench.serving import show
from tests.conftest import running_redis

TASKS, BATCH, RUNS = 10_000, 16, 7
LABELS = (4, 20, 100)


def make_config(labels: int) -> str:
    rows = "".join(f'<Label value="label {number}"/>' for number in range(labels))
    return (
        '<View><Image name="image" value="$image"/>'
        f'<RectangleLabels name="label" toName="image">{rows}</RectangleLabels></View>'
    )


def main() -> None:
    tasks = [{"id": i, "data": {"image": f"http://127.0.0.1:1/images/{i:06}.jpg"}} for i in range(TASKS)]
    times: dict[int, list[float]] = {labels: [] for labels in LABELS}
    with tempfile.TemporaryDirectory() as folder, running_redis(Path(folder)) as url:
        connection = connect(url)
        for run in range(RUNS + 1):
            for labels in LABELS:
                start = time.process_time()
                project_model = ProjectModel(Settings(model="demo"), make_config(labels), "1", 1)
                BulkSender(Settings(model="demo", batch_size=BATCH), connection, "1", project_model, 1).send(tasks, 0)
                if run:  # the first run also sets up what is set up lazily
                    times[labels].append(1000 * (time.process_time() - start))
                connection.flushdb()
    for labels in LABELS:
        show(f"10,000 tasks with {labels} labels, made, noted and enqueued", "ms", times[labels])


if __name__ == "__main__":
    main()
