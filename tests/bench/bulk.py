"""`make bench`: what `label` and `preannotate` cost beside the detector, and their memory over many pictures.

Half of the cores are for the worker, and for the detector alone; all else, Label Studio too, has the other half, as if
it were elsewhere. Pictures come from disk. The half with `preannotate` needs a Label Studio in `LABEL_STUDIO_VENV`
(`make install-studio`).
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
from tests.bench.serving import resident_mb
from tests.e2e.studio import LEGACY_TOKEN, VENV, LabelStudio, running_label_studio
from tests.scenes import encode, make_scenes
from tests.servers import ServeProcess

CORES = sorted(os.sched_getaffinity(0))
FOR_WORKER, FOR_ALL_ELSE = CORES[: -(-len(CORES) // 2)], CORES[len(CORES) // 2 :]
BATCH, RUNS, MANY = 16, 3, 10_000
PICTURES = 125 * BATCH
LABELS = ("circle", "square", "triangle", "star")
JPEGS = [encode(scene.image, "JPEG", quality=95) for scene in make_scenes(20, (128, 96))]


def picture(number: int) -> bytes:
    """A small picture; no two have the same bytes, so that none is answered from what Redis keeps."""
    return JPEGS[number % len(JPEGS)] + number.to_bytes(4, "big")


def alone(detector: Detector) -> float:
    """Pictures a second of the detector on decoded pictures."""
    images = [Image.open(io.BytesIO(picture(number))).convert("RGB") for number in range(PICTURES)]
    labels = [Label(name, (name,), 0.3) for name in LABELS]
    os.sched_setaffinity(0, FOR_WORKER)
    start = time.perf_counter()
    for first in range(0, len(images), BATCH):
        detector.detect(images[first : first + BATCH], labels, nms_iou=0.7)
    took = time.perf_counter() - start
    os.sched_setaffinity(0, FOR_ALL_ELSE)
    return len(images) / took


def labelled(settings: Settings, folder: Path, count: int) -> float:
    """Pictures a second of `label`, from the first to the last answer on disk."""
    source, out = folder / f"pictures-{count}", Path(tempfile.mkdtemp(dir=folder))
    if not source.exists():
        source.mkdir()
        for number in range(count):
            (source / f"{number:05}.jpg").write_bytes(picture(number))
    files = find_images([str(source)])
    start = time.perf_counter()
    LabelingRun(settings, connect(settings.redis_url), make_labeling_config(LABELS), out).run(files, lambda row: None)
    return len(files) / (time.perf_counter() - start)


def preannotated(settings: Settings, studio: LabelStudio, count: int) -> float:
    """Tasks a second of `preannotate`, from the first page that it reads until Label Studio has the last prediction."""
    project = studio.create_project("bench", make_labeling_config(LABELS), {})
    folder = studio.files / str(project.number)
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    rows = [{"data": {"image": f"/data/local-files/?d={folder.name}/{number}.jpg"}} for number in range(count)]
    studio.call("POST", f"/api/projects/{project.number}/import", json=rows)
    studio_api = LabelStudioClient(settings.label_studio_url, settings.label_studio_api_key)
    start = time.perf_counter()
    run = Preannotation(settings, connect(settings.redis_url), studio_api, str(project.number))
    tally = run.run(run.pages(), count, lambda done, failed: None)
    took = time.perf_counter() - start
    assert (tally.done, tally.failures) == (count, [])
    return count / took


def compare(name: str, detector: Detector, whole: Callable[[int], float]) -> None:
    """Prints a command's rate beside the detector alone, in turn, and how this process grows over many pictures."""
    whole(BATCH)
    rates = [(alone(detector), whole(PICTURES)) for _ in range(RUNS)]
    ratios = [own / plain for plain, own in rates]
    print(f"detector alone {statistics.median(plain for plain, _ in rates):.1f}/s, ", end="")
    print(f"{name} {statistics.median(own for _, own in rates):.1f}/s, ", end="")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {RUNS} runs)", flush=True)
    before = resident_mb(os.getpid())
    rate = whole(MANY)
    print(f"{name} of {MANY}: {rate:.1f}/s, ", end="")
    print(f"this process grew by {resident_mb(os.getpid()) - before:.0f} MB", flush=True)


@contextlib.contextmanager
def serving(folder: Path, **env: str) -> Iterator[Settings]:
    served = ServeProcess(folder, BATCH_SIZE=str(BATCH), LOG_LEVEL="ERROR", **env)
    try:
        served.wait_until_ready()
        for pid in served.list_descendants():
            if b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setaffinity(int(thread.name), FOR_WORKER)
        yield Settings(
            model="demo", model_dir=served.model_dir, batch_size=BATCH,
            redis_url=(served.model_dir / "redis.url").read_text(),
            label_studio_url=env.get("LABEL_STUDIO_URL", ""), label_studio_api_key=LEGACY_TOKEN,
        )  # fmt: skip
    finally:
        served.stop()


def bench_preannotate(detector: Detector, folder: Path) -> None:
    folder.mkdir()
    with running_label_studio(folder) as studio:
        keys = {"LABEL_STUDIO_URL": studio.url, "LABEL_STUDIO_API_KEY": LEGACY_TOKEN}
        with serving(folder, LOCAL_FILES_DOCUMENT_ROOT=str(studio.files), **keys) as settings:
            compare("preannotate", detector, lambda count: preannotated(settings, studio, count))


def main() -> None:
    os.sched_setaffinity(0, FOR_ALL_ELSE)
    detector = Detector(*load_checkpoint(find_checkpoint("demo").source))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serving(folder) as settings:
            compare("label", detector, lambda count: labelled(settings, folder, count))
        if VENV.exists():
            bench_preannotate(detector, folder / "studio")
        else:
            print(f"preannotate was not measured: no Label Studio in {VENV}; run `make install-studio`")


if __name__ == "__main__":
    main()
