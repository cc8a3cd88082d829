"""The command `label`: a folder of images becomes a labeled dataset.

`.answers.jsonl` marks the output folder as ours and holds the answers so far; `.finished` is written last. A run that
is killed at any point leaves the first without the second, and the same command resumes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import sys
import zipfile
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
from backend.queue.predict_queue import count_waiting_by_checkpoint
from backend.queue.private_redis import resolve_redis_url
from backend.queue.redis import connect
from backend.settings import Settings

FORMATS = ("yolo", "coco", "labelstudio")
FINISHED_MARKER, MARKER_TEXT = ".finished", "finished\n"
SAMPLE_FOLDER = "sample"
OUTPUT_FOLDERS = ("images", "labels", "annotations", "preview")
OUTPUT_FILES = ("data.yaml", "labelstudio.json", "labelstudio.xml")
SAMPLE_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
SAMPLE_MIN_SCORE = 0.1  # box threshold of a sample


@dataclass(frozen=True)
class LabelOptions:
    """The options of `label`.

    Attributes:
        out: the folder to write.
        formats: some of FORMATS.
        validation_share: share of the images in the validation split, 0..1.
        preview: draw previews.
        zip: pack the folder.
        sample: number of random images to try, instead of labeling all; 0: label all.
        force: overwrite a finished folder.
    """

    out: Path
    formats: tuple[str, ...]
    validation_share: float
    preview: bool
    zip: bool
    sample: int
    force: bool


def label(settings: Settings, arguments: Sequence[str], label_config: str, options: LabelOptions) -> int:
    """Labels the images of files, folders and patterns.

    Returns:
        The exit code: 0 if all images were labeled, 1 if some failed.

    Raises:
        SettingsError: an option is invalid, or files of others would be overwritten.
        BackendError: the run cannot go on.
    """
    written_folders = [options.out / name for name in (*OUTPUT_FOLDERS, SAMPLE_FOLDER)]
    if options.sample:
        options = dataclasses.replace(options, out=options.out / SAMPLE_FOLDER, force=True)
    _check_folder(options.out, options.force)
    files = find_images(arguments, excluded_folders=written_folders)
    if options.sample:
        files = sorted(random.Random(0).sample(files, min(options.sample, len(files))), key=lambda file: file.key)
        settings = settings.replace(box_threshold=SAMPLE_MIN_SCORE)
    _claim_folder(options.out)
    with _find_or_start_workers(settings) as running:
        connection = connect(running.redis_url)
        run = LabelingRun(running, connection, label_config, options.out)
        _predict(run, files, BulkProgress(connection, make_worker_name(), f"label, {len(files)} images"))
    predictions = run.load_predictions()
    images = [to_labeled_image(file, predictions[file.key]) for file in files if file.key in predictions]
    if options.sample:
        _report_sample(images, run.labels, options.out)
    else:
        _write_dataset(images, run, options)
    box_count, failed = sum(len(image.detections) for image in images), len(files) - len(images)
    print(f"{len(images)} images with {box_count} boxes in {options.out}, {failed} failed")
    return 1 if failed else 0


def read_label_config(labels: str, labels_file: str | None, labels_from: str | None) -> str:
    """Reads or makes the labeling config that one of the three options stands for.

    Raises:
        SettingsError: none or several of them are given, or there are no labels in it.
    """
    if sum(map(bool, (labels, labels_file, labels_from))) != 1:
        raise SettingsError("give one of --labels, --labels-file and --labels-from")
    if labels_from:
        return Path(labels_from).read_text()
    names = Path(labels_file).read_text().splitlines() if labels_file else labels.split(",")
    names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not names:
        raise SettingsError("no labels given")
    return make_labeling_config(names)


def _check_folder(out: Path, force: bool) -> None:
    """Checks that the folder is new, unfinished, or may be overwritten; raises SettingsError."""
    is_finished = (out / FINISHED_MARKER).exists()
    is_ours = is_finished or (out / ANSWERS_FILE).exists()
    if is_finished and not force:
        raise SettingsError(f"{out} is finished; choose another --out, or use --force to overwrite it")
    if not is_ours and not force and any(path.name != SAMPLE_FOLDER for path in out.glob("*")):
        raise SettingsError(f"{out} is not empty, and was not written by label; choose another --out")
    for name in (*OUTPUT_FOLDERS, *OUTPUT_FILES):
        if not is_ours and (out / name).exists():
            raise SettingsError(f"{out / name} was not written by label; choose another --out")


def _claim_folder(out: Path) -> None:
    """Marks the folder as ours and unfinished."""
    out.mkdir(parents=True, exist_ok=True)
    (out / ANSWERS_FILE).touch()
    (out / FINISHED_MARKER).unlink(missing_ok=True)


@contextlib.contextmanager
def _find_or_start_workers(settings: Settings) -> Iterator[Settings]:
    """Yields settings that lead to workers: those of a running server, or else temporary ones."""
    if settings.redis_url or _is_server_running(settings):
        yield resolve_redis_url(settings)
    else:
        with temporary_workers(settings) as running:
            yield running


def _is_server_running(settings: Settings) -> bool:
    """Returns whether a server of this MODEL_DIR answers: one that was killed leaves its address behind."""
    try:
        count_waiting_by_checkpoint(connect(resolve_redis_url(settings).redis_url))
        return True
    except (SettingsError, QueueUnavailable):
        return False


def _predict(run: LabelingRun, files: Sequence[ImageFile], progress: BulkProgress) -> None:
    """Predicts the images without a prediction, with a progress bar, and lists those that failed."""
    done = len(run.load_predictions().keys() & {file.key for file in files})
    failures: dict[str, str] = {}  # by key
    bar = tqdm(total=len(files), initial=done, unit="image", file=sys.stderr)
    with contextlib.closing(progress), bar:

        def on_answer(row: Row) -> None:
            if "error" in row:
                failures[row["key"]] = row["error"]
                bar.set_postfix(failed=len(failures), refresh=False)
            bar.update()
            progress.report(int(bar.n), len(failures), len(files))

        run.run(files, on_answer)
    for key, reason in failures.items():
        print(f"skipped {key}: {reason}")


def _write_dataset(images: Sequence[LabeledImage], run: LabelingRun, options: LabelOptions) -> None:
    out, validation_share = options.out, options.validation_share
    _clear_outputs(out)
    place_images(images, out, validation_share)
    if "yolo" in options.formats:
        write_yolo(images, run.labels, out, validation_share)
    if "coco" in options.formats:
        write_coco(images, run.labels, out, validation_share)
    if "labelstudio" in options.formats:
        write_labelstudio(images, run.label_config, run.field, out, validation_share)
    if options.preview:
        write_previews(images, run.labels, out)
    if options.zip:
        _write_zip(out)
    (out / FINISHED_MARKER).write_text(MARKER_TEXT)


def _clear_outputs(out: Path) -> None:
    """Removes what an earlier run wrote: it may have been killed, or have had other options."""
    for name in OUTPUT_FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in OUTPUT_FILES:
        (out / name).unlink(missing_ok=True)


def _write_zip(out: Path) -> None:
    """Packs the folder into `<out>.zip` beside it, under a temporary name until it is complete."""
    folder = Path(os.path.abspath(out))  # the name of "." is empty
    archive = Path(shutil.make_archive(str(folder.with_name(f".{folder.name}.partial")), "zip", folder))
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(FINISHED_MARKER, MARKER_TEXT)  # an unpacked copy is finished, too
    archive.replace(folder.with_name(f"{folder.name}.zip"))


def _report_sample(images: Sequence[LabeledImage], labels: Sequence[str], out: Path) -> None:
    """Prints how many boxes each threshold would give, and draws the previews."""
    print("boxes at threshold " + "".join(f"{threshold:>7}" for threshold in SAMPLE_THRESHOLDS))
    for name in labels:
        scores = [detection.score for image in images for detection in image.detections if detection.label == name]
        counts = [sum(score >= threshold for score in scores) for threshold in SAMPLE_THRESHOLDS]
        print(f"{name[:18]:<18} {''.join(f'{count:>7}' for count in counts)}")
    _clear_outputs(out)
    write_previews(images, labels, out)
    print(f"see {out / 'preview'}; then run again without --sample, with the --box-threshold that you chose")
