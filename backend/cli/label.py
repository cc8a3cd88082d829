"""The command `label`."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from backend.cli.supervisor import temporary_workers
from backend.datasets.formats import LabeledImage, place_images, write_coco, write_labelstudio, write_yolo
from backend.datasets.image_files import ImageFile, find_images
from backend.datasets.labeling_run import ANSWERS_FILE, LabelingRun, Row, make_labeling_config, to_labeled_image
from backend.datasets.previews import write_previews
from backend.errors import QueueUnavailable, SettingsError
from backend.monitoring.activity import BulkProgress
from backend.queue.live_workers import make_worker_name
from backend.queue.predict_queue import PredictQueue
from backend.queue.private_redis import resolve_redis_url
from backend.queue.redis import connect
from backend.settings import Settings

FINISHED_MARKER, SAMPLE_FOLDER = ".finished", "sample"
WRITTEN_FOLDERS = ("images", "labels", "annotations", "preview")  # folders
FORMATS = ("yolo", "coco", "labelstudio")
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
SAMPLE_MIN_SCORE = 0.1  # lowest score that a sample is looked at with


@dataclass(frozen=True)
class LabelOptions:
    """What `label` is to write, and where."""

    out: Path
    formats: tuple[str, ...]
    val: float
    preview: bool
    zip: bool
    sample: int
    force: bool


def label(settings: Settings, words: Sequence[str], label_config: str, wanted: LabelOptions) -> int:
    """Runs the command; returns its exit code: 0 all done, 1 some pictures failed.

    Raises:
        SettingsError: an option is not what it must be, or something would be overwritten.
        BackendError: it could not run.
    """
    files = find_images(words)
    if wanted.sample:
        files = sorted(random.Random(0).sample(files, min(wanted.sample, len(files))), key=lambda file: file.key)
        settings = settings.replace(box_threshold=SAMPLE_MIN_SCORE)
        wanted = dataclasses.replace(wanted, out=wanted.out / SAMPLE_FOLDER, force=True)
    _clear(wanted)
    with _workers_of(settings) as running:
        connection = connect(running.redis_url)
        run = LabelingRun(running, connection, label_config, wanted.out)
        _answer_all(run, files, BulkProgress(connection, make_worker_name(), f"label, {len(files)} pictures"))
    kept = run.load_predictions()
    rows = [to_labeled_image(file, kept[file.key]) for file in files if file.key in kept]
    if wanted.sample:
        _show_sample(rows, run.labels, wanted.out)
    else:
        _write(rows, run, wanted)
    failed = len(files) - len(rows)
    print(f"{len(rows)} pictures with {sum(len(row.boxes) for row in rows)} boxes in {wanted.out}, {failed} failed")
    return 1 if failed else 0


def _clear(wanted: LabelOptions) -> None:
    """Makes room for what is written; raises SettingsError where something else is there, and --force is not given."""
    is_begun = (wanted.out / ANSWERS_FILE).exists() and not (wanted.out / FINISHED_MARKER).exists()
    others = [path for path in wanted.out.glob("*") if path.name != SAMPLE_FOLDER]
    if others and not (is_begun or wanted.force):
        raise SettingsError(f"{wanted.out} holds something already; give another --out, or --force to write it anew")
    for name in WRITTEN_FOLDERS if wanted.force else ():
        shutil.rmtree(wanted.out / name, ignore_errors=True)
    wanted.out.mkdir(parents=True, exist_ok=True)


def config_from(labels: str, labels_file: str | None, labels_from: str | None) -> str:
    """The labeling config that one of the three options means; raises SettingsError where it is not just one."""
    if sum(map(bool, (labels, labels_file, labels_from))) != 1:
        raise SettingsError("give one of --labels, --labels-file and --labels-from")
    if labels_from:
        return Path(labels_from).read_text()
    words = Path(labels_file).read_text().splitlines() if labels_file else labels.split(",")
    names = list(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not names:
        raise SettingsError("there are no labels in what was given")
    return make_labeling_config(names)


@contextlib.contextmanager
def _workers_of(settings: Settings) -> Iterator[Settings]:
    """The workers of a running server, or else some of our own."""
    if settings.redis_url or _is_served(settings):
        yield resolve_redis_url(settings)
    else:
        with temporary_workers(settings) as running:
            yield running


def _is_served(settings: Settings) -> bool:
    """Whether a server runs in MODEL_DIR: one that was killed leaves its address behind."""
    try:
        return PredictQueue(connect(resolve_redis_url(settings).redis_url)).count_waiting() >= 0
    except (SettingsError, QueueUnavailable):
        return False


def _answer_all(run: LabelingRun, files: Sequence[ImageFile], shown: BulkProgress) -> None:
    left = len(files) - len(run.load_predictions().keys() & {file.key for file in files})
    failed: list[tuple[str, str]] = []
    progress = tqdm(total=len(files), initial=len(files) - left, unit="picture", file=sys.stderr)
    with contextlib.closing(shown), progress as bar:

        def on_answer(row: Row) -> None:
            if "error" in row:
                failed.append((row["key"], row["error"]))
                bar.set_postfix(failed=len(failed), refresh=False)
            bar.update()
            shown.report(int(bar.n), len(failed), len(files))

        run.run(files, on_answer)
    for key, reason in failed:
        print(f"skipped {key}: {reason}")


def _write(rows: Sequence[LabeledImage], run: LabelingRun, wanted: LabelOptions) -> None:
    labels, out = run.labels, wanted.out
    place_images(rows, out, wanted.val)
    if "yolo" in wanted.formats:
        write_yolo(rows, labels, out, wanted.val)
    if "coco" in wanted.formats:
        write_coco(rows, labels, out, wanted.val)
    if "labelstudio" in wanted.formats:
        write_labelstudio(rows, out, wanted.val, run.field)
        (out / "labelstudio.xml").write_text(run.label_config)
    if wanted.preview:
        write_previews(rows, labels, out)
    (out / FINISHED_MARKER).write_text("finished\n")
    if wanted.zip:
        shutil.make_archive(str(out), "zip", out)


def _show_sample(rows: Sequence[LabeledImage], labels: Sequence[str], out: Path) -> None:
    """How many boxes each threshold would give, and the sheets to look at."""
    print("boxes at threshold " + "".join(f"{threshold:>7}" for threshold in THRESHOLDS))
    for name in labels:
        scores = [score for row in rows for own, score, _ in row.boxes if own == name]
        counts = "".join(f"{sum(score >= threshold for score in scores):>7}" for threshold in THRESHOLDS)
        print(f"{name[:18]:<18} {counts}")
    write_previews(rows, labels, out)
    print(f"look at {out / 'preview'}, then run again without --sample, with --box-threshold as you like it")
