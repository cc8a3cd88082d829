"""The training job that RQ runs: reads a project's annotations, trains, and promotes what passes the gate.

After its worker was killed, the job resumes from the files in its work directory. Whatever fails, the version that
serves goes on serving.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rq import get_current_job
from safetensors.torch import save

from backend.detection.acceleration import keep_freed_memory
from backend.detection.checkpoints import load_checkpoint, load_weights_into
from backend.detection.detector import Detector
from backend.detection.device import choose_device, choose_precision
from backend.errors import BackendError, CannotTrain, LabelStudioUnavailable, QueueUnavailable
from backend.images.decoding import ImageLoader
from backend.images.sources import ImageFetcher
from backend.labelstudio.client import LabelStudioClient
from backend.labelstudio.labeling_config import Plan, read_plan
from backend.queue.messages import TrainingRequest, read_message
from backend.queue.recovery import MAX_LOST_ATTEMPTS, count_lost_attempts
from backend.queue.redis import connect
from backend.queue.training_queue import TrainingQueue
from backend.registry.checkpoint import find_checkpoint
from backend.registry.versions import Version, VersionStore
from backend.settings import Settings
from backend.training.dataset import Example, fingerprint_examples, read_examples
from backend.training.image_cache import ImageCache
from backend.training.pipeline import MAX_EVALUATED, Report, Stage, TrainingInputs, TrainingResult, run_pipeline

log = logging.getLogger(__name__)

MAX_EXAMPLES = 5000  # images to train on; those of the last tasks are taken
OUTCOME_RETRY_DELAYS = (1, 5, 30)  # seconds before each retry, while Redis is unavailable
RETRY_DELAYS = (1, 5, 15, 30, 60, 120, 300)  # seconds before each retry, while Label Studio is unavailable
REPORT_INTERVAL = 0.5  # seconds between two reports of the same stage

T = TypeVar("T")


def train(settings: Settings, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Trains for one project, and reports its progress and outcome.

    Args:
        settings: of the worker.
        payload: a `TrainingRequest` as plain JSON.

    Returns:
        The outcome: `state` (done or failed) and `text` for people; of a training that is done also `version`,
        `is_promoted`, `metrics` and `left_out`.

    Raises:
        MessageError: the payload was written by another version of the backend.
    """
    keep_freed_memory()
    request = read_message(TrainingRequest, payload)
    trainings = TrainingQueue(connect(settings.redis_url))
    outcome = _run_training(settings, request, _make_report(trainings, request.project))
    log.info("project %s: %s", request.project, outcome["text"])
    for delay in OUTCOME_RETRY_DELAYS:
        try:
            trainings.report(request.project, **outcome)
            break
        except QueueUnavailable:
            time.sleep(delay)
    return outcome


def _run_training(settings: Settings, request: TrainingRequest, report: Report) -> dict[str, Any]:
    """Runs a training; returns its outcome, whatever goes wrong."""
    try:
        if not (settings.label_studio_url and settings.label_studio_api_key):
            raise CannotTrain("training reads annotations: set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY")
        if (deaths := count_lost_attempts(get_current_job())) >= MAX_LOST_ATTEMPTS:
            raise CannotTrain(f"{deaths} workers died during this training; see their logs")
        training = _Training(settings, request, report)
        with contextlib.closing(training):
            return {"state": "done", **training.run()}
    except BackendError as error:
        return {"state": "failed", "text": str(error)}
    except OSError as error:
        return {"state": "failed", "text": f"MODEL_DIR cannot be used ({error.strerror}); is its disk full?"}
    except Exception as error:
        log.exception("the training of project %s failed", request.project)
        return {"state": "failed", "text": f"internal error ({type(error).__name__}); see the worker's log"}


def _make_report(trainings: TrainingQueue, project: str) -> Report:
    """Makes a `Report` that writes to Redis, at most every `REPORT_INTERVAL` within a stage."""
    last_stage, last_time = "", 0.0

    def report(stage: Stage, done: int = 0, total: int = 0) -> None:
        nonlocal last_stage, last_time
        if stage != last_stage or done == total or time.monotonic() - last_time > REPORT_INTERVAL:
            last_stage, last_time = stage, time.monotonic()
            with contextlib.suppress(QueueUnavailable):  # the training does not need it
                trainings.report(project, stage, done=done, of=total)

    return report


class _Training:
    """One training, from the annotations to the version."""

    def __init__(self, settings: Settings, request: TrainingRequest, report: Report) -> None:
        self._settings, self._train, self._report = settings, request.train, report
        self._project, self._run_id = request.project, request.run
        self._checkpoint = find_checkpoint(settings.model)
        self._versions = VersionStore(settings.model_dir, self._project)
        self._work_dir = self._versions.folder / ".training"
        self._label_studio = LabelStudioClient(settings.label_studio_url, settings.label_studio_api_key)

    def run(self) -> dict[str, Any]:
        """Trains, and saves and promotes a version if there is something to promote.

        Returns:
            `text`, `version` (empty if none was saved), `is_promoted`, `metrics` and `left_out`.

        Raises:
            CannotTrain: there are no annotations.
            LabelStudioError: Label Studio refuses requests, or stays unavailable.
            OSError: the disk is full or cannot be written.
        """
        self._report("reading")
        snapshot = self._load_snapshot()
        version_at_start = self._versions.get_current_id()
        serving = self._versions.get_serving(self._checkpoint.fingerprint, snapshot["created"])
        plan = read_plan(snapshot["label_config"], self._settings.box_threshold, self._settings.nms_iou)
        serving_plan = serving.apply_to(plan) if serving else plan
        examples, left_out = read_examples(serving_plan, self._project, snapshot["tasks"])
        if not examples:
            raise CannotTrain(f"there are no annotations to train on{_format_left_out(left_out)}")
        max_examples = MAX_EVALUATED if self._train == "thresholds" else MAX_EXAMPLES
        examples = sorted(examples, key=lambda example: example.task)[-max_examples:]

        model, tokenizer, make_detector = self._load_base_model()
        serving_model = copy.deepcopy(model)
        if serving and serving.weights:
            serving_model = load_weights_into(serving_model, self._versions.get_weights_path(serving.id))
        detector = make_detector(serving_model)
        images, examples = self._cache_images(examples, detector, left_out)
        inputs = TrainingInputs(
            examples=examples,
            images=images,
            labels={control.from_name: {label.name for label in control.labels} for control in plan.controls},
            model=model,
            tokenizer=tokenizer,
            make_detector=make_detector,
            device=choose_device(self._settings),
            is_serving_base_weights=not (serving and serving.weights),
        )
        result = run_pipeline(inputs, detector, self._train, self._work_dir, self._report)

        text = f"{result.text}{_format_left_out(left_out)}"
        data = fingerprint_examples(examples)
        version_id = self._save_version(result, plan, serving, snapshot["created"], data)
        is_promoted = bool(version_id) and self._versions.get_current_id() == version_at_start
        if is_promoted:
            self._versions.promote(version_id)
        elif version_id:
            text = f"not promoted, because another version was promoted or rolled back meanwhile; {text}"
        outcome = {"version": version_id, "is_promoted": is_promoted}
        return {"text": text, **outcome, "metrics": result.metrics, "left_out": dict(left_out)}

    def close(self) -> None:
        """Deletes the work directory: only a training that was killed needs it."""
        shutil.rmtree(self._work_dir, ignore_errors=True)

    def _load_snapshot(self) -> dict[str, Any]:
        """Loads the labeling config, the creation time and the annotated tasks that the training began with.

        A new training deletes the work directory of another one, and reads them from Label Studio.
        """
        path = self._work_dir / "snapshot.json"
        if path.exists():
            saved: dict[str, Any] = json.loads(path.read_text())
            if saved["run"] == self._run_id:
                return saved
        shutil.rmtree(self._work_dir, ignore_errors=True)
        self._work_dir.mkdir(parents=True)
        snapshot = {
            "run": self._run_id,
            "label_config": self._retry(lambda: self._label_studio.get_label_config(self._project)),
            "created": self._retry(lambda: self._label_studio.get_project_created_at(self._project)),
            "tasks": self._retry(lambda: list(self._label_studio.iter_annotated_tasks(self._project))),
        }
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(snapshot))
        temporary.replace(path)
        return snapshot

    def _retry(self, request: Callable[[], T]) -> T:
        """Sends a request to Label Studio; while it is unavailable, again for some minutes."""
        for delay in RETRY_DELAYS:
            try:
                return request()
            except LabelStudioUnavailable as error:
                log.warning("project %s: %s; retrying in %d s", self._project, error, delay)
                time.sleep(delay)
        return request()

    def _load_base_model(self) -> tuple[Any, Any, Callable[[Any], Detector]]:
        """Loads the base model and its tokenizer, and returns them with a function that makes detectors of models."""
        model, tokenizer, image_format = load_checkpoint(self._checkpoint.source, self._settings.size_divisor)
        device, precision = choose_device(self._settings), choose_precision(self._settings)  # as it will serve
        batch_size = self._settings.batch_size

        def make_detector(own_model: Any) -> Detector:
            detector = Detector(own_model, tokenizer, image_format, device, precision)
            if batch_size:
                detector.batch_size = batch_size
            return detector

        if not batch_size:
            batch_size = make_detector(copy.deepcopy(model)).find_batch_size()
        return model, tokenizer, make_detector

    def _cache_images(
        self, examples: Sequence[Example], detector: Detector, left_out: Counter[str]
    ) -> tuple[ImageCache, list[Example]]:
        """Downloads the images; returns the cache, and the examples whose images could be loaded."""
        fetcher = ImageFetcher.from_settings(self._settings, self._label_studio)
        loader = ImageLoader(fetcher, self._settings.max_image_pixels)
        images = ImageCache(self._work_dir / "images", loader, detector)
        task_by_uri = {example.target.uri: example.task for example in examples}
        errors = images.download(task_by_uri, lambda done: self._report("loading", done, len(task_by_uri)))
        if errors:  # Label Studio may have been unavailable
            self._retry(self._label_studio.get_version)
            errors = images.download({uri: task_by_uri[uri] for uri in errors}, lambda done: None)
        for uri, error in errors.items():
            log.warning("project %s, task %s: left out, because %s", self._project, task_by_uri[uri], error)
        if errors:
            left_out["images that cannot be read"] += len(errors)
        return images, [example for example in examples if example.target.uri not in errors]

    def _save_version(
        self, result: TrainingResult, plan: Plan, serving: Version | None, created: int, data: str
    ) -> str:
        """Saves a version if the result changes anything, and returns its id; else an empty string.

        Args:
            result: of the pipeline.
            plan: of the labeling config, without trained thresholds.
            serving: the version that serves.
            created: when the project was created.
            data: fingerprint of the examples.
        """
        configured = {c.from_name: {label.name: label.threshold for label in c.labels} for c in plan.controls}
        thresholds = {
            control: {
                label: (configured[control][label], trained)
                for label, trained in trained_by_label.items()
                if label in configured.get(control, {})
            }
            for control, trained_by_label in result.thresholds.items()
        }
        if not (thresholds or result.tensors):
            return ""
        version = Version(
            id=time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + data[:4],
            checkpoint=self._checkpoint.fingerprint,
            parent=serving.id if serving else "",
            created=created,
            thresholds=thresholds,
            metrics=result.metrics,
            data=data,
            reason=result.text,
        )

        def write_weights(path: Path) -> None:
            if result.tensors:
                path.write_bytes(save(result.tensors))  # save_file would hide the error of a full disk
            elif serving:
                shutil.copyfile(self._versions.get_weights_path(serving.id), path)

        has_weights = result.tensors or (serving and serving.weights)
        self._versions.add(version, write_weights if has_weights else None)
        return version.id


def _format_left_out(left_out: Counter[str]) -> str:
    return "; left out: " + ", ".join(f"{count} {reason}" for reason, count in left_out.items()) if left_out else ""
