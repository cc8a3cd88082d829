"""What a fit worker runs: `fit(dict) -> dict`. Reads a project's annotations, learns, and promotes what is better.

It goes on where it was when its worker is killed. Whatever goes wrong, the version that serves goes on serving.
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

from safetensors.torch import save

from backend.detection.acceleration import keep_freed_memory
from backend.detection.checkpoints import load_checkpoint, load_weights_into
from backend.detection.detector import Detector
from backend.detection.device import choose_device, choose_precision
from backend.errors import BackendError, LabelStudioUnavailable, QueueUnavailable
from backend.images.decoding import ImageLoader
from backend.images.sources import ImageFetcher
from backend.labelstudio.client import LabelStudioClient
from backend.labelstudio.labeling_config import Plan, read_plan
from backend.queue.recovery import MAX_WORKER_DEATHS, get_lost_chunk
from backend.queue.redis import connect
from backend.queue.training_queue import TrainingQueue
from backend.registry.checkpoint import find_checkpoint
from backend.registry.versions import Version, VersionStore
from backend.settings import Settings
from backend.training.dataset import Example, fingerprint_examples, read_examples
from backend.training.image_cache import ImageCache
from backend.training.pipeline import MAX_EVALUATED, TrainingInputs, TrainingResult, run_pipeline

log = logging.getLogger(__name__)

MAX_EXAMPLES = 5000  # pictures that a training looks at: the last ones annotated
REPORT_PAUSES = (1, 5, 30)  # s, while Redis is away
RETRY_DELAYS = (1, 5, 15, 30, 60, 120, 300)  # s, while Label Studio is away
REPORT_EVERY = 0.5  # s

Value = TypeVar("Value")
Report = Callable[..., None]


class CannotLearn(BackendError):
    """There is nothing to learn from, or no way to; the text says what is missing."""

    code = "cannot_learn"


def fit(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Trains for one project.

    Args:
        payload: `project` its number, `train` as in the settings, `run` a name that no other training has.

    Returns:
        `state`, done or failed, `text` that people read, and of what was done `version`, `is_promoted`, `metrics`,
        `left_out`.
    """
    keep_freed_memory()
    settings, project = Settings.from_env(), payload["project"]
    trainings = TrainingQueue(connect(settings.redis_url))
    outcome = _outcome(settings, payload, _reporter(trainings, project))
    log.info("project %s: %s", project, outcome["text"])
    for pause in REPORT_PAUSES:
        try:
            trainings.report(project, **outcome)
            break
        except QueueUnavailable:
            time.sleep(pause)
    return outcome


def _outcome(settings: Settings, payload: Mapping[str, Any], report: Report) -> dict[str, Any]:
    try:
        if not (settings.label_studio_url and settings.label_studio_api_key):
            raise CannotLearn("training reads annotations: set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY")
        chunk = get_lost_chunk()
        if chunk and chunk.deaths > MAX_WORKER_DEATHS:
            raise CannotLearn(f"{chunk.deaths} workers died over this training; their logs say more")
        training = _Training(settings, payload, report)
        with contextlib.closing(training):
            return {"state": "done", **training.run()}
    except BackendError as error:
        return {"state": "failed", "text": str(error)}
    except OSError as error:
        return {"state": "failed", "text": f"MODEL_DIR cannot be used ({error.strerror}); is its disk full?"}
    except Exception as error:
        log.exception("the training of project %s failed", payload["project"])
        return {"state": "failed", "text": f"an error of ours ({type(error).__name__}); the worker's log says more"}


def _reporter(trainings: TrainingQueue, project: str) -> Report:
    """Reports progress, at most so often."""
    last_state, last_time = "", 0.0

    def report(state: str, done: int = 0, of: int = 0) -> None:
        nonlocal last_state, last_time
        if state != last_state or done == of or time.monotonic() - last_time > REPORT_EVERY:
            last_state, last_time = state, time.monotonic()
            with contextlib.suppress(QueueUnavailable):  # the training does not need it
                trainings.report(project, state, done=done, of=of)

    return report


def _patiently(ask: Callable[[], Value]) -> Value:
    """Asks Label Studio again while it is away, for some minutes."""
    for pause in RETRY_DELAYS:
        try:
            return ask()
        except LabelStudioUnavailable as error:
            log.warning("%s; asking again in %d s", error, pause)
            time.sleep(pause)
    return ask()


class _Training:
    """One training, from the annotations to the version."""

    def __init__(self, settings: Settings, payload: Mapping[str, Any], report: Report) -> None:
        self._settings, self._train, self._report = settings, payload["train"], report
        self._project, self._run = payload["project"], payload["run"]
        self._checkpoint = find_checkpoint(settings.model)
        self._versions = VersionStore(settings.model_dir, self._project)
        self._desk = self._versions.folder / ".training"
        self._label_studio = LabelStudioClient(settings.label_studio_url, settings.label_studio_api_key)

    def run(self) -> dict[str, Any]:
        """Learns, and says what came of it."""
        self._report("reading")
        snapshot = self._snapshot()
        at_first = self._versions.get_current_id()
        serving = self._versions.get_serving(self._checkpoint.fingerprint, snapshot["created"])
        plan = read_plan(snapshot["label_config"], self._settings.box_threshold, self._settings.nms_iou)
        present = serving.apply_to(plan) if serving else plan
        examples, left_out = read_examples(present, self._project, snapshot["tasks"])
        if not examples:
            raise CannotLearn(f"there are no annotations to learn from{_listed(left_out)}")
        model, tokenizer, make_detector = self._loaded()
        detector = make_detector(self._serving_model(model, serving))
        examples = _last(examples, MAX_EXAMPLES if self._train != "thresholds" else MAX_EVALUATED)
        shelf, examples = self._shelve(examples, detector, left_out)
        labels = {control.from_name: {label.name for label in control.labels} for control in plan.controls}
        is_fresh, device = not (serving and serving.weights), choose_device(self._settings)
        material = TrainingInputs(examples, shelf, labels, model, tokenizer, make_detector, device, is_fresh)
        learned = run_pipeline(material, detector, self._train, self._desk, self._report)
        version = self._keep(learned, plan, serving, snapshot["created"], fingerprint_examples(examples))
        text = f"{learned.text}{_listed(left_out)}"
        is_promoted = bool(version) and self._promote(version, at_first)
        if version and not is_promoted:
            text = f"not promoted, because another version was meanwhile; {text}"
        kept = {"version": version, "is_promoted": is_promoted}
        return {"text": text, **kept, "metrics": learned.metrics, "left_out": dict(left_out)}

    def _loaded(self) -> tuple[Any, Any, Callable[[Any], Detector]]:
        """The model as it came, its tokenizer, and what makes detectors of models, all with batches that fit."""
        model, tokenizer, image_format = load_checkpoint(self._checkpoint.source)
        device, precision = choose_device(self._settings), choose_precision(self._settings)  # judged as it will serve

        def make_detector(own: Any) -> Detector:
            made = Detector(own, tokenizer, image_format, device, precision)
            made.batch_size = fitting or made.batch_size
            return made

        fitting = self._settings.batch_size
        fitting = fitting or make_detector(copy.deepcopy(model)).find_batch_size()
        return model, tokenizer, make_detector

    def close(self) -> None:
        """Takes away what only a training that is killed would need."""
        shutil.rmtree(self._desk, ignore_errors=True)

    def _promote(self, version: str, at_first: str) -> bool:
        """Promotes, unless somebody has changed what serves since the training began."""
        if self._versions.get_current_id() != at_first:
            return False
        self._versions.promote(version)
        return True

    def _serving_model(self, model: Any, serving: Version | None) -> Any:
        own = copy.deepcopy(model)
        return load_weights_into(own, self._versions.weights_path(serving.id)) if serving and serving.weights else own

    def _snapshot(self) -> dict[str, Any]:
        """Config, birthday and annotated tasks of the project; after a kill those that the training began with."""
        path = self._desk / "snapshot.json"
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text())
            if kept["run"] == self._run:
                return kept
        shutil.rmtree(self._desk, ignore_errors=True)
        self._desk.mkdir(parents=True)
        read = {
            "run": self._run,
            "label_config": _patiently(lambda: self._label_studio.label_config(self._project)),
            "created": _patiently(lambda: self._label_studio.created(self._project)),
            "tasks": _patiently(lambda: list(self._label_studio.iter_annotated_tasks(self._project))),
        }
        aside = path.with_suffix(".new")
        aside.write_text(json.dumps(read))
        aside.replace(path)
        return read

    def _shelve(
        self, examples: Sequence[Example], detector: Detector, left_out: Counter[str]
    ) -> tuple[ImageCache, list[Example]]:
        """The pictures, on a shelf, and the examples whose pictures can be had."""
        settings = self._settings
        images = ImageLoader(ImageFetcher.from_settings(settings, self._label_studio), settings.max_image_pixels)
        shelf = ImageCache(self._desk / "pictures", images, detector)
        uris = {example.view.uri: example.task for example in examples}
        failed = shelf.fetch(uris, lambda done: self._report("loading", done, len(uris)))
        if failed:  # Label Studio may have been away
            _patiently(self._label_studio.get_version)
            failed = shelf.fetch({uri: uris[uri] for uri in failed}, lambda done: None)
        for reason in failed.values():
            log.warning("project %s: a picture is left out: %s", self._project, reason)
        left_out.update({"pictures that cannot be read": len(failed)} if failed else {})
        return shelf, [example for example in examples if example.view.uri not in failed]

    def _keep(self, learned: TrainingResult, plan: Plan, serving: Version | None, created: int, data: str) -> str:
        """Writes a version, if there is something to keep, and returns its id."""
        before = {
            control.from_name: {label.name: label.threshold for label in control.labels} for control in plan.controls
        }
        thresholds = {
            name: {label: (before[name][label], now) for label, now in own.items() if label in before.get(name, {})}
            for name, own in learned.thresholds.items()
        }
        if not (thresholds or learned.tensors):
            return ""
        version = Version(
            id=time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + data[:4],
            checkpoint=self._checkpoint.fingerprint,
            parent=serving.id if serving else "",
            created=created,
            thresholds=thresholds,
            metrics=learned.metrics,
            data=data,
            reason=learned.text,
        )

        def write_weights(path: Path) -> None:
            if learned.tensors:
                path.write_bytes(save(learned.tensors))  # save_file would hide what a full disk says
            elif serving:
                shutil.copyfile(self._versions.weights_path(serving.id), path)

        has_weights = learned.tensors or (serving and serving.weights)
        self._versions.add(version, write_weights if has_weights else None)
        return version.id


def _last(examples: Sequence[Example], most: int) -> list[Example]:
    return sorted(examples, key=lambda example: example.task)[-most:]


def _listed(left_out: Counter[str]) -> str:
    return "; left out: " + ", ".join(f"{count} {what}" for what, count in left_out.items()) if left_out else ""
