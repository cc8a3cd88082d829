"""`make bench`: the throughput of `label` and `preannotate` against the detector alone, and their memory growth.

Half of the cores are for the worker, and for the detector alone; everything else, Label Studio too, has the other half,
as if it ran on another machine. Images come from disk. The part with `preannotate` needs a Label Studio in
`LABEL_STUDIO_VENV` (`make install-studio`).
"""

import os

os.environ["OMP_NUM_THREADS"] = str(-(-len(os.sched_getaffinity(0)) // 2))  # read when torch is loaded

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from backend.datasets.image_files import find_images
from backend.datasets.labeling_run import LabelingRun, make_labeling_config
from backend.delivery.preannotation import Preannotation
from backend.detection.checkpoints import load_checkpoint
from backend.detection.detector import Detector
from backend.labelstudio.client import LabelStudioClient
from backend.labelstudio.labeling_config import Label
from backend.queue.redis import connect
from backend.registry.checkpoint import find_checkpoint
from backend.settings import Settings
from tests.bench.serving import measure_memory_mb
from tests.e2e.label_studio import LEGACY_TOKEN, VENV, LabelStudio, running_label_studio
from tests.scenes import encode, make_scenes
from tests.servers import ServeProcess

CORES = sorted(os.sched_getaffinity(0))
WORKER_CORES, OTHER_CORES = CORES[: -(-len(CORES) // 2)], CORES[len(CORES) // 2 :]
BATCH, RUNS, MANY = 16, 3, 10_000
IMAGES = 125 * BATCH
LABELS = ("circle", "square", "triangle", "star")
JPEGS = [encode(scene.image, "JPEG", quality=95) for scene in make_scenes(20, (128, 96))]


def make_jpeg(number: int) -> bytes:
    """Makes a small image; no two have the same bytes, so that no answer is reused."""
    return JPEGS[number % len(JPEGS)] + number.to_bytes(4, "big")


def measure_detector(detector: Detector) -> float:
    """Measures the images per second of the detector alone, on decoded images."""
    images = [Image.open(io.BytesIO(make_jpeg(number))).convert("RGB") for number in range(IMAGES)]
    labels = [Label(name, (name,), 0.3) for name in LABELS]
    os.sched_setaffinity(0, WORKER_CORES)
    start = time.perf_counter()
    for first in range(0, len(images), BATCH):
        detector.detect(images[first : first + BATCH], labels, nms_iou=0.7)
    seconds = time.perf_counter() - start
    os.sched_setaffinity(0, OTHER_CORES)
    return len(images) / seconds


def measure_label(settings: Settings, folder: Path, count: int) -> float:
    """Measures the images per second of `label`, from the start to the last answer on disk."""
    source, out = folder / f"images-{count}", Path(tempfile.mkdtemp(dir=folder))
    if not source.exists():
        source.mkdir()
        for number in range(count):
            (source / f"{number:05}.jpg").write_bytes(make_jpeg(number))
    files = find_images([str(source)])
    start = time.perf_counter()
    LabelingRun(settings, connect(settings.redis_url), make_labeling_config(LABELS), out).run(files, lambda row: None)
    return len(files) / (time.perf_counter() - start)


def measure_preannotate(settings: Settings, label_studio: LabelStudio, count: int) -> float:
    """Measures the tasks per second of `preannotate`, until Label Studio has the last prediction."""
    project = label_studio.create_project("bench", make_labeling_config(LABELS), {})
    folder = label_studio.files / str(project.number)
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(make_jpeg(number))
    tasks = [{"data": {"image": f"/data/local-files/?d={folder.name}/{number}.jpg"}} for number in range(count)]
    label_studio.call("POST", f"/api/projects/{project.number}/import", json=tasks)
    client = LabelStudioClient(settings.label_studio_url, settings.label_studio_api_key)
    start = time.perf_counter()
    run = Preannotation(settings, connect(settings.redis_url), client, str(project.number))
    summary = run.run(run.open_cursor(), count, lambda done, failed: None)
    seconds = time.perf_counter() - start
    assert (summary.done, summary.failures) == (count, [])
    return count / seconds


def compare(name: str, detector: Detector, measure: Callable[[int], float]) -> None:
    """Prints a command's rate against the detector alone, in turn, and how much this process grows over many images."""
    measure(BATCH)
    rates = [(measure_detector(detector), measure(IMAGES)) for _ in range(RUNS)]
    ratios = [own / plain for plain, own in rates]
    print(f"detector alone {statistics.median(plain for plain, _ in rates):.1f}/s, ", end="")
    print(f"{name} {statistics.median(own for _, own in rates):.1f}/s, ", end="")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {RUNS} runs)", flush=True)
    before = measure_memory_mb(os.getpid())
    rate = measure(MANY)
    print(f"{name} of {MANY}: {rate:.1f}/s, ", end="")
    print(f"this process grew by {measure_memory_mb(os.getpid()) - before:.0f} MB", flush=True)


@contextlib.contextmanager
def serving(folder: Path, **env: str) -> Iterator[Settings]:
    served = ServeProcess(folder, BATCH_SIZE=str(BATCH), LOG_LEVEL="ERROR", **env)
    try:
        served.wait_until_ready()
        for pid in served.list_descendants():
            if b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setaffinity(int(thread.name), WORKER_CORES)
        yield Settings(
            model="demo", model_dir=served.model_dir, batch_size=BATCH,
            redis_url=(served.model_dir / "redis.url").read_text(),
            label_studio_url=env.get("LABEL_STUDIO_URL", ""), label_studio_api_key=LEGACY_TOKEN,
        )  # fmt: skip
    finally:
        served.stop()


def bench_preannotate(detector: Detector, folder: Path) -> None:
    folder.mkdir()
    with running_label_studio(folder) as label_studio:
        keys = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": LEGACY_TOKEN}
        with serving(folder, LOCAL_FILES_DOCUMENT_ROOT=str(label_studio.files), **keys) as settings:
            compare("preannotate", detector, lambda count: measure_preannotate(settings, label_studio, count))


def main() -> None:
    os.sched_setaffinity(0, OTHER_CORES)
    detector = Detector(*load_checkpoint(find_checkpoint("demo").source))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serving(folder) as settings:
            compare("label", detector, lambda count: measure_label(settings, folder, count))
        if VENV.exists():
            bench_preannotate(detector, folder / "label-studio")
        else:
            print(f"preannotate was not measured: no Label Studio in {VENV}; run `make install-studio`")


if __name__ == "__main__":
    main()
