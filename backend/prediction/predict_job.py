"""What a worker runs: `predict(dict) -> dict`, plain JSON in and out.

Expected errors travel as data, one for each task: only a string would survive the queue otherwise.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout  # another class than the builtin in Python 3.10
from dataclasses import dataclass
from typing import Any

from rq.timeouts import JobTimeoutException

from backend.detection.detector import DetectionsOrError, Detector
from backend.detection.detector_cache import DetectorCache
from backend.detection.preprocess import ModelInput
from backend.errors import BackendError, CheckpointError, ImageError
from backend.images.decoding import ImageLoader
from backend.images.sources import ImageFetcher
from backend.images.thumbnails import ThumbnailSampler
from backend.labelstudio.client import LabelStudioClient
from backend.labelstudio.labeling_config import Plan
from backend.labelstudio.regions import make_prediction, make_regions
from backend.labelstudio.targets import MAX_TARGETS, DetectionQuery, ImageTarget, Prompt, expand_targets
from backend.metrics import IMAGES, timed
from backend.prediction.job_report import JobReport
from backend.queue.recovery import MAX_WORKER_DEATHS, LostChunk, get_lost_chunk, worker_died_answer
from backend.queue.watchdog import Watchdog
from backend.registry.checkpoint import find_checkpoint
from backend.settings import Settings

DOWNLOAD_THREADS = 8  # pictures of one chunk that are fetched at the same time
LOAD_TIMEOUT = 60  # s for all pictures of a chunk; each has its own limits, but a server may trickle its headers

MIN_IMAGES_PER_LOAD = 8  # pictures loaded at a time, at least

log = logging.getLogger(__name__)

Answer = dict[str, Any]  # of one task: a prediction, or an error


@dataclass(frozen=True)
class Tools:
    """What a worker makes once and every job uses."""

    detectors: DetectorCache
    images: ImageLoader
    fingerprint: str
    batch_size: int
    watchdog: Watchdog
    glimpse: ThumbnailSampler


_tools: Tools | None = None

OTHER_CHECKPOINT = CheckpointError("the worker serves another MODEL than the web front; start both with the same")


def set_up(settings: Settings) -> Tools:
    """Loads the model, warms it up and keeps it for all jobs of this process.

    Raises:
        CheckpointError: the model cannot be loaded.
    """
    global _tools
    detectors, watchdog = DetectorCache(settings), Watchdog(settings.forward_timeout)
    detector = detectors.plain
    batch_size = settings.batch_size or detector.find_batch_size()
    detector.batch_size, detector.on_forward = batch_size, watchdog.beat
    sources = ImageFetcher.from_settings(
        settings, LabelStudioClient(settings.label_studio_url, settings.label_studio_api_key)
    )
    images = ImageLoader(sources, settings.max_image_pixels, needed=detector.image_format.size)
    fingerprint = find_checkpoint(settings.model).fingerprint
    _tools = Tools(detectors, images, fingerprint, batch_size, watchdog, ThumbnailSampler(settings.may_show_images))
    return _tools


def predict(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Predictions for a chunk of tasks.

    Args:
        payload: `plan`, `model_version`, `fingerprint` of the checkpoint, `learned` (project and id of a version, or
            None), and `tasks`, each with `id` and the part of its `data` that the plan reads.

    Returns:
        `answers`: for each task in order a prediction, or `{"error": {"code", "detail"}}`.
    """
    assert _tools, "set_up comes first"
    telling = JobReport(_tools.glimpse)
    answers = _predicted(_tools, payload, telling)
    telling.answered(payload["tasks"], answers)
    return {"answers": answers}


def _predicted(tools: Tools, payload: Mapping[str, Any], telling: JobReport) -> list[Answer]:
    try:
        looking = _looking(tools, payload, telling)
    except CheckpointError as error:
        log.error("%s", error)
        return [{"error": error.to_dict()}] * len(payload["tasks"])
    plan, tasks, version = Plan.from_dict(payload["plan"]), payload["tasks"], payload["model_version"]
    with tools.watchdog.watching():
        if lost := get_lost_chunk():
            return _one_by_one(looking, lost, plan, tasks, version)
        return _answers(looking, plan, tasks, version)


@dataclass(frozen=True)
class Looking:
    """The tools of one job: all of its pictures are looked at by the same detector."""

    detector: Detector
    images: ImageLoader
    batch_size: int
    watchdog: Watchdog
    telling: JobReport


def _looking(tools: Tools, payload: Mapping[str, Any], telling: JobReport) -> Looking:
    if payload["fingerprint"] != tools.fingerprint:
        raise OTHER_CHECKPOINT
    detector = tools.detectors.get(payload.get("learned"))
    return Looking(detector, tools.images, tools.batch_size, tools.watchdog, telling)


def _one_by_one(
    tools: Looking, chunk: LostChunk, plan: Plan, tasks: Sequence[Any], version: str
) -> list[dict[str, Any]]:
    """Answers of a chunk over which a worker died; each is kept as soon as it is there."""
    answers = chunk.answers()
    for number, task in enumerate(tasks):
        if number in answers:
            continue
        if chunk.deaths > MAX_WORKER_DEATHS:
            answers[number] = worker_died_answer()
            continue
        chunk.begin(number)
        (answers[number],) = _answers(tools, plan, [task], version)
        chunk.keep(number, answers[number])
    chunk.forget()
    return [answers[number] for number in range(len(tasks))]


def _answers(tools: Looking, plan: Plan, tasks: Sequence[Any], version: str) -> list[dict[str, Any]]:
    of_task = [_views(plan, task) for task in tasks]
    wanted = [(task["id"], view) for task, seen in zip(tasks, of_task, strict=True) for view in _listed(seen)]
    size = max(
        tools.batch_size, MIN_IMAGES_PER_LOAD
    )  # pages make more pictures than tasks: not all lie in memory at once
    slices = [wanted[i : i + size] for i in range(0, len(wanted), size)]
    parts = iter([part for piece in slices for part in _detect(tools, piece, version)])
    answers = [seen if isinstance(seen, BackendError) else [next(parts) for _ in seen] for seen in of_task]
    return [_answer(task, answer, version) for task, answer in zip(tasks, answers, strict=True)]


def _views(plan: Plan, task: Mapping[str, Any]) -> list[ImageTarget] | BackendError:
    prompt = Prompt.from_dict(task["prompt"]) if task.get("prompt") else None
    try:
        seen = list(itertools.islice(expand_targets(plan, task["data"], prompt), MAX_TARGETS + 1))
    except BackendError as error:
        return error
    except Exception as error:  # one odd task fails alone
        log.error("a task's data raised %s", type(error).__name__)
        return ImageError(f"the task's data cannot be read ({type(error).__name__})")
    if len(seen) > MAX_TARGETS:
        return ImageError(f"the task has more than {MAX_TARGETS} pictures; split it")
    return seen or ImageError("the task's list of pictures is empty or missing")


def _listed(seen: list[ImageTarget] | BackendError) -> list[ImageTarget]:
    return [] if isinstance(seen, BackendError) else seen


Loaded = ModelInput | BackendError
Part = list[dict[str, object]] | BackendError


def _load(tools: Looking, uris: Mapping[str, int]) -> dict[str, Loaded]:
    """Each address, and a task that has it, with its picture as the model reads it, or what is wrong with it."""

    def load(uri: str) -> ModelInput:
        picture = tools.images.load(uri, uris[uri])
        tools.telling.loaded(uri, picture.image)
        return tools.detector.prepare(picture.image, picture.size)

    pool, deadline = ThreadPoolExecutor(DOWNLOAD_THREADS), time.monotonic() + LOAD_TIMEOUT
    futures = {uri: pool.submit(load, uri) for uri in uris}
    loaded = {uri: _outcome(future, deadline) for uri, future in futures.items()}
    pool.shutdown(wait=False, cancel_futures=True)  # a thread that hangs must not hold up the others' answers
    return loaded


def _outcome(future: Future[ModelInput], deadline: float) -> Loaded:
    try:
        return future.result(max(deadline - time.monotonic(), 0))
    except BackendError as error:
        return error
    except FutureTimeout:
        return ImageError(f"the picture did not arrive within {LOAD_TIMEOUT} s")
    except JobTimeoutException:
        raise
    except Exception as error:  # one odd picture fails alone, whatever it made a library do
        log.error("a picture raised %s", type(error).__name__)
        return ImageError(f"the picture cannot be read ({type(error).__name__})")


def _detect(tools: Looking, wanted: Sequence[tuple[int, ImageTarget]], version: str) -> list[Part]:
    """For each view of a task its regions, or why there are none; views that ask the same are looked at together."""
    with tools.watchdog.paused():
        pictures = _load(tools, {view.uri: task for task, view in wanted})
    parts: list[Part] = []
    for _, view in wanted:
        picture = pictures[view.uri]
        parts.append(picture if isinstance(picture, BackendError) else [])
    by_asked: dict[DetectionQuery, list[int]] = defaultdict(list)
    for i, (_, view) in enumerate(wanted):
        if not isinstance(parts[i], BackendError):
            by_asked[view.query].append(i)
    for asked, places in by_asked.items():
        shown = [picture for i in places if isinstance(picture := pictures[wanted[i][1].uri], ModelInput)]
        found_in = _found(tools.detector, asked, shown)
        with timed("post"):
            for i, picture, found in zip(places, shown, found_in, strict=True):
                task, view = wanted[i]
                parts[i] = (
                    found
                    if isinstance(found, BackendError)
                    else make_regions(found, view, *picture.size, f"{task}/{version}")
                )
    tools.telling.picture([view.uri for _, view in wanted], [task for task, _ in wanted], parts, version)
    return parts


def _found(
    detector: Detector, asked: DetectionQuery, pictures: Sequence[ModelInput]
) -> Sequence[DetectionsOrError | BackendError]:
    IMAGES.inc(len(pictures))
    try:
        with timed("forward"):
            return detector.detect_inputs(pictures, asked.labels, asked.negatives, asked.nms_iou)
    except BackendError as error:
        return [error] * len(pictures)


def _answer(task: Mapping[str, Any], parts: Sequence[Part] | BackendError, version: str) -> dict[str, Any]:
    """One task: its prediction, unless any of its views failed."""
    errors = [parts] if isinstance(parts, BackendError) else [part for part in parts if isinstance(part, BackendError)]
    if isinstance(parts, BackendError) or errors:
        log.warning("task %s: %s", task["id"], errors[0])
        return {"error": errors[0].to_dict()}
    return make_prediction([part for part in parts if not isinstance(part, BackendError)], version)
