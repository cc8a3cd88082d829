"""The predict job: a chunk of tasks -> one answer for each task, plain JSON in and out.

Expected errors travel as data, one for each task: of an exception only a string would survive the queue.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rq import get_current_job
from rq.timeouts import JobTimeoutException

from backend.detection.acceleration import is_small
from backend.detection.detector import DetectionsOrError, Detector
from backend.detection.detector_cache import DetectorCache
from backend.detection.device import is_device_error
from backend.detection.preprocess import ModelInput
from backend.errors import BackendError, CheckpointError, ImageError
from backend.images.decoding import ImageLoader
from backend.images.sources import ImageFetcher
from backend.images.thumbnails import ThumbnailSampler
from backend.labelstudio.client import LabelStudioClient
from backend.labelstudio.labeling_config import Plan
from backend.labelstudio.regions import Region, make_prediction, make_regions
from backend.labelstudio.targets import MAX_TARGETS, DetectionQuery, ImageTarget, expand_targets
from backend.metrics import IMAGES, timed
from backend.prediction.circuit_breaker import pause_if_unavailable
from backend.prediction.image_loading import load_images
from backend.prediction.job_report import JobReport
from backend.queue.messages import Answer, Chunk, ChunkAnswers, ChunkTask, Prediction, TaskError, read_message
from backend.queue.recovery import MAX_LOST_ATTEMPTS, WORKER_DIED, LostChunk, count_lost_attempts, get_lost_chunk
from backend.queue.watchdog import Watchdog
from backend.registry.checkpoint import find_checkpoint
from backend.settings import Settings

MIN_IMAGES_PER_LOAD = 8  # in memory at a time, at least
EXIT_BROKEN_DEVICE = 71  # exit status

log = logging.getLogger(__name__)

RegionsOrError = list[Region] | BackendError  # of one image target

OTHER_CHECKPOINT = CheckpointError("the worker serves another MODEL than the web front; start both with the same")


@dataclass(frozen=True)
class TargetKey:
    """An image target in a chunk: the index of its task, and its index among the task's targets."""

    task: int
    target: int


class Predictor:
    """The loaded model and all else that a worker makes once; its `predict` is the function of the jobs."""

    def __init__(self, settings: Settings) -> None:
        """Loads the model and warms it up.

        Raises:
            CheckpointError: the model cannot be loaded.
            SettingsError: the device cannot be used.
        """
        self.detectors, self.watchdog = DetectorCache(settings), Watchdog(settings.forward_timeout)
        base = self.detectors.base
        if is_small(base.model) and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
        self.batch_size = settings.batch_size or base.find_batch_size()
        base.batch_size, base.on_forward = self.batch_size, self.watchdog.beat
        label_studio = LabelStudioClient(settings.label_studio_url, settings.label_studio_api_key)
        fetcher = ImageFetcher.from_settings(settings, label_studio)
        self.images = ImageLoader(fetcher, settings.max_image_pixels, base.image_format.compute_size)
        self.checkpoint = find_checkpoint(settings.model).fingerprint
        self.thumbnails = ThumbnailSampler(settings.may_show_images)

    def predict(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Predicts a chunk.

        Args:
            payload: a `Chunk` as plain JSON.

        Returns:
            Its `ChunkAnswers` as plain JSON.

        Raises:
            MessageError: the payload was written by another version of the backend.
        """
        chunk = read_message(Chunk, payload)
        report = JobReport(self.thumbnails)
        try:
            answers = self._predict_chunk(chunk, report)
        except Exception as error:
            if is_device_error(error):
                # The device answers every later call with the same error. The supervisor starts another worker, and
                # the recovery gives it this job.
                log.critical("%s is broken; the worker ends: %s", self.detectors.base.device, error)
                logging.shutdown()
                os._exit(EXIT_BROKEN_DEVICE)
            raise
        report.finish(chunk.tasks, answers)
        pause_if_unavailable(answers)
        return ChunkAnswers(answers=answers).model_dump()

    def _predict_chunk(self, chunk: Chunk, report: JobReport) -> list[Answer]:
        try:
            if chunk.checkpoint != self.checkpoint:
                raise OTHER_CHECKPOINT
            with self.watchdog.watching():  # a file system may hang
                detector = self.detectors.get((chunk.version.project, chunk.version.id) if chunk.version else None)
        except CheckpointError as error:
            log.error("%s", error)
            return [TaskError.from_error(error)] * len(chunk.tasks)
        run = ChunkRun(self, detector, chunk.plan, chunk.model_version, report)
        with self.watchdog.watching():
            if lost := get_lost_chunk():
                return run.predict_one_by_one(chunk.tasks, lost)
            return run.predict_tasks(chunk.tasks)


@dataclass(frozen=True)
class ChunkRun:
    """One chunk on its way through the detector."""

    predictor: Predictor
    detector: Detector
    plan: Plan
    model_version: str
    report: JobReport

    def predict_one_by_one(self, tasks: Sequence[ChunkTask], lost: LostChunk) -> list[Answer]:
        """Predicts a chunk over which a worker died, and saves each answer at once for the next worker."""
        answers = lost.load_answers()
        is_hopeless = count_lost_attempts(get_current_job()) >= MAX_LOST_ATTEMPTS
        for index, task in enumerate(tasks):
            if index in answers:
                continue
            if is_hopeless:
                answers[index] = WORKER_DIED
                continue
            with lost.working_on(index):
                answers[index] = self._predict_alone(task)
                lost.save_answer(index, answers[index])
        lost.delete()
        return [answers[index] for index in range(len(tasks))]

    def _predict_alone(self, task: ChunkTask) -> Answer:
        """Predicts a task of a chunk that raised as a whole; if it raises, it fails alone."""
        try:
            (answer,) = self.predict_tasks([task])
        except Exception as error:
            if is_device_error(error) or isinstance(error, JobTimeoutException):
                raise
            log.exception("project %s, task %s failed", self.report.project or "-", task.id)
            return TaskError.from_error(BackendError("the worker failed on this task; its log says why"))
        return answer

    def predict_tasks(self, tasks: Sequence[ChunkTask]) -> list[Answer]:
        """Predicts tasks; a task fails alone."""
        targets: dict[TargetKey, ImageTarget] = {}
        errors: dict[int, BackendError] = {}  # by index of the task
        for index, task in enumerate(tasks):
            try:
                targets |= {TargetKey(index, i): target for i, target in enumerate(self._expand_targets(task))}
            except BackendError as error:
                errors[index] = error
        results: dict[TargetKey, RegionsOrError] = {}
        # Pages make more images than tasks, so not all of them are in memory at once.
        for batch in _split(targets, max(self.predictor.batch_size, MIN_IMAGES_PER_LOAD)):
            results |= self._detect({key: tasks[key.task].id for key in batch}, batch)
        regions: dict[int, list[list[Region]]] = defaultdict(list)  # by index of the task
        for key, result in results.items():
            if isinstance(result, BackendError):
                errors.setdefault(key.task, result)
            else:
                regions[key.task].append(result)
        answers: list[Answer] = []
        for index, task in enumerate(tasks):
            if index in errors:
                log.warning("project %s, task %s: %s", self.report.project or "-", task.id, errors[index])
                answers.append(TaskError.from_error(errors[index]))
            else:
                answers.append(Prediction.model_validate(make_prediction(regions[index], self.model_version)))
        return answers

    def _expand_targets(self, task: ChunkTask) -> list[ImageTarget]:
        try:
            targets = list(itertools.islice(expand_targets(self.plan, task.data, task.prompt), MAX_TARGETS + 1))
        except BackendError:
            raise
        except Exception as error:  # one odd task fails alone
            log.error("task %s: its data raised %s", task.id, type(error).__name__)
            raise ImageError(f"the task's data cannot be read ({type(error).__name__})") from None
        if not targets:
            raise ImageError("the task's list of images is empty or missing")
        if len(targets) > MAX_TARGETS:
            raise ImageError(f"the task has more than {MAX_TARGETS} images; split it")
        return targets

    def _detect(
        self, task_ids: Mapping[TargetKey, int], targets: Mapping[TargetKey, ImageTarget]
    ) -> dict[TargetKey, RegionsOrError]:
        """Loads the images of targets and detects; targets with equal queries share forward passes."""
        with self.predictor.watchdog.paused():  # loading has a time limit of its own
            images = load_images({target.uri: task_ids[key] for key, target in targets.items()}, self._load_image)
        results: dict[TargetKey, RegionsOrError] = {}
        inputs: dict[DetectionQuery, dict[TargetKey, ModelInput]] = defaultdict(dict)
        for key, target in targets.items():
            image = images[target.uri]
            if isinstance(image, BackendError):
                results[key] = image
            else:
                inputs[target.query][key] = image
        for query, images_of_query in inputs.items():
            all_detections = self._run_detector(query, list(images_of_query.values()))
            with timed("post"):
                for (key, image), detections in zip(images_of_query.items(), all_detections, strict=True):
                    if isinstance(detections, BackendError):
                        results[key] = detections
                    else:
                        seed = f"{task_ids[key]}/{self.model_version}"
                        results[key] = make_regions(detections, targets[key], *image.size, seed)
        self.report.record_sample(task_ids, targets, results, self.model_version)
        return {key: results[key] for key in targets}

    def _load_image(self, uri: str, task_id: int) -> ModelInput:
        loaded = self.predictor.images.load(uri, task_id)
        self.report.offer_thumbnail(uri, loaded.image)
        return self.detector.prepare_image(loaded.image, loaded.size)

    def _run_detector(
        self, query: DetectionQuery, inputs: Sequence[ModelInput]
    ) -> Sequence[DetectionsOrError | BackendError]:
        """Detects on images; the same error for each of them where a phrase is too long for the model."""
        IMAGES.inc(len(inputs))
        try:
            with timed("forward") as stage:
                return self.detector.detect_inputs(inputs, query.labels, query.negative_phrases, query.nms_iou)
        except BackendError as error:
            return [error] * len(inputs)
        finally:
            self.report.forward_seconds += stage.seconds


def _split(targets: Mapping[TargetKey, ImageTarget], size: int) -> Iterator[dict[TargetKey, ImageTarget]]:
    items = iter(targets.items())
    while batch := dict(itertools.islice(items, size)):
        yield batch
