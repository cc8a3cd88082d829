"""`make bench`: what `label` costs beside the detector, and its memory over many pictures; one worker."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as a worker does: threads that spin here would hold it up

import statistics
import tempfile
import time
from pathlib import Path

from PIL import Image

from backend.checkpoints import load_checkpoint
from backend.detector import Detector
from backend.folder import File, find_files
from backend.label import Labelling, config_of
from backend.labeling import Label
from backend.queues import connect
from backend.settings import Settings
from backend.versions import find_checkpoint
from tests.bench import resident_mb
from tests.pictures import encode, scenes
from tests.running import Served

BATCH, RUNS, MANY = 16, 5, 10_000
PICTURES = 40 * BATCH
LABELS = ("circle", "square", "triangle", "star")


def make_folder(folder: Path, count: int) -> list[File]:
    """So many small pictures, of which few differ."""
    bodies = [encode(scene.image, "JPEG", quality=95) for scene in scenes(20, (128, 96))]
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:05}.jpg").write_bytes(bodies[number % len(bodies)])
    return find_files([str(folder)])


def alone(detector: Detector, files: list[File]) -> float:
    """Pictures a second of the detector on decoded pictures."""
    images = [Image.open(file.path).convert("RGB") for file in files]
    labels = [Label(name, (name,), 0.3) for name in LABELS]
    start = time.perf_counter()
    for first in range(0, len(images), BATCH):
        detector.detect(images[first : first + BATCH], labels, nms_iou=0.7)
    return len(images) / (time.perf_counter() - start)


def through(settings: Settings, files: list[File], out: Path) -> float:
    """Pictures a second of `label`, from the first to the last answer on disk."""
    start = time.perf_counter()
    Labelling(settings, connect(settings.redis_url), config_of(LABELS), out).run(files, lambda row: None)
    return len(files) / (time.perf_counter() - start)


def main() -> None:
    detector = Detector(*load_checkpoint(find_checkpoint("demo").source))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        served = Served(folder, BATCH_SIZE=str(BATCH), LOG_LEVEL="ERROR")
        try:
            served.wait_until_ready()
            settings = Settings(
                model="demo", model_dir=served.model_dir, batch_size=BATCH,
                redis_url=(served.model_dir / "redis.url").read_text(),
            )  # fmt: skip
            files = make_folder(folder / "pictures", PICTURES)
            rates = [(alone(detector, files), through(settings, files, folder / f"out{run}")) for run in range(RUNS)]
            ratios = [label / own for own, label in rates]
            print(f"detector alone {statistics.median(own for own, _ in rates):.1f}/s, ", end="")
            print(f"label {statistics.median(label for _, label in rates):.1f}/s, ", end="")
            print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {RUNS} runs)")
            many = make_folder(folder / "many", MANY)
            before = resident_mb(os.getpid())
            through(settings, many, folder / "out")
            print(f"{MANY} pictures: this process grew by {resident_mb(os.getpid()) - before:.0f} MB")
        finally:
            served.stop()


if __name__ == "__main__":
    main()
