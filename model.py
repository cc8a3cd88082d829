"""The plugin: Label Studio's setup, predict and fit for Grounding DINO.

The methods have the shapes of label-studio-ml 2.x. The model itself runs in the workers: nothing here loads torch.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from redis import Redis

from backend.delivery.outbox import PULL, Outbox
from backend.errors import BackendError, BadRequest, NotReady, QueueUnavailable
from backend.monitoring.feedback import AnnotationEvent, AnnotationLog
from backend.monitoring.project_stats import count_outcomes, get_predicted, list_model_versions
from backend.queue.predict_queue import PredictQueue, record_import
from backend.queue.private_redis import resolve_redis_url
from backend.queue.redis import connect, redis_errors
from backend.queue.training_queue import TrainingQueue
from backend.registry.project_model import ProjectModel
from backend.settings import Settings

log = logging.getLogger(__name__)

ENQUEUE_SLOTS = threading.BoundedSemaphore(
    2
)  # requests whose tasks are put into the queue at a time: /health wants a turn too
SELECTION_TIMEOUT = 60  # s that Label Studio may take from choosing the tasks of a request to sending it
DELETIONS = ("ANNOTATIONS_DELETED", "ANNOTATION_DELETED")
ANNOTATION_EVENTS = ("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_CREATED", *DELETIONS)
PUSHED_LATER = NotReady("the predictions of so many tasks are pushed into the project as they are made")
PUSHED_NOW = NotReady("the prediction was pushed into the project a moment ago")


def _is_annotation(row: Any) -> bool:
    return isinstance(row, Mapping) and isinstance(row.get("id"), int) and isinstance(row.get("task"), int | None)


def _are_late(answers: Sequence[Mapping[str, Any]]) -> bool:
    return any("error" in answer and answer["error"]["code"] == NotReady.code for answer in answers)


@functools.cache
def _connection(redis_url: str) -> Redis:
    return connect(redis_url)


class GroundingDINO:
    """One labeling config's view of the detector; cheap to make, one for each request."""

    def __init__(
        self, project_id: str | None = None, label_config: str | None = None, settings: Settings | None = None
    ) -> None:
        number, _, created = (project_id or "").partition(".")  # as Label Studio writes it: number and birthday
        self.project_id = number
        self.settings = settings or resolve_redis_url(Settings.from_env())
        self._project_model = ProjectModel(
            self.settings, label_config or "", number, int(created) if created.isdigit() else None
        )

    @property
    def model_version(self) -> str:
        """Fingerprint of weights, prompts and thresholds; that of the weights alone while there is no usable config."""
        return self._project_model.model_version

    @property
    def queue(self) -> PredictQueue:
        """The queue that the workers serve."""
        return PredictQueue(self._connection)

    def prepare(self) -> None:
        """Reads the checkpoint's files for their fingerprint, so that no request has to wait for it."""
        log.info("serving %s", self._project_model.checkpoint.model_version())

    def setup(self) -> str:
        """Called when a project connects and before every retrieval; returns the model version, whatever the config."""
        version = self.model_version
        try:
            with redis_errors():
                self._project_model.remember(self._connection)
        except QueueUnavailable as error:
            log.warning("%s", error)
        return version

    def predict(
        self, tasks: Sequence[Mapping[str, Any]], context: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """One answer a task, in order: a prediction, or `{"error": {"code", "detail"}}`.

        Raises:
            LabelingConfigError: the config cannot be served.
            QueueUnavailable: Redis does not answer.
        """
        start, deadline = time.time(), time.monotonic() + self.settings.predict_deadline
        with ENQUEUE_SLOTS:
            size = self.settings.batch_size or self.queue.batch_size()
            chunks = self._project_model.make_chunks(tasks, size, context)
            jobs = self.queue.enqueue(chunks, at_front=len(tasks) == 1, project=self.project_id)
        stored = not context and self._can_push(tasks)  # Label Studio keeps no answer to interactive work
        if stored and len(tasks) > self.settings.push_above:
            self._outbox.add(self.project_id, chunks, start)
            return [{"error": PUSHED_LATER.to_dict()}] * len(tasks)
        answers = [self._answers(job, chunk["tasks"], deadline) for job, chunk in zip(jobs, chunks, strict=True)]
        if stored:
            self._push_late(chunks, answers, start)
        return [answer for chunk in answers for answer in chunk]

    def _can_push(self, tasks: Sequence[Mapping[str, Any]]) -> bool:
        """Whether predictions of these tasks may be brought into Label Studio by its import."""
        return (
            bool(self.settings.label_studio_url and self.settings.label_studio_api_key and self.project_id)
            and all(isinstance(task.get("id"), int) for task in tasks)
            and not self._outbox.is_mismatched(self.project_id)
        )

    def _push_late(self, chunks: list[dict[str, Any]], answers: list[list[dict[str, Any]]], start: float) -> None:
        """Leaves what is not finished to the pusher; takes back, in place, answers that it has delivered meanwhile."""
        late = [chunk for chunk, parts in zip(chunks, answers, strict=True) if _are_late(parts)]
        self._outbox.add(self.project_id, late, start)
        for chunk, parts in zip(chunks, answers, strict=True):
            ready = {task["id"]: i for i, task in enumerate(chunk["tasks"]) if "error" not in parts[i]}
            ways = self._outbox.claim(
                PULL, self.project_id, chunk["model_version"], list(ready), time.time(), start - SELECTION_TIMEOUT
            )
            for task, way in ways.items():
                if way:
                    parts[ready[task]] = {"error": PUSHED_NOW.to_dict()}

    def _answers(self, job: Any, chunk: Sequence[Mapping[str, Any]], deadline: float) -> list[dict[str, Any]]:
        """The answers of one chunk of tasks; the same error for each where there are none."""
        try:
            value = self.queue.wait(job, deadline)
        except TimeoutError:
            error: BackendError = NotReady("the prediction is not finished yet; it goes on, ask again")
        else:
            if isinstance(value, dict) and len(value.get("answers", ())) == len(chunk):
                return list(value["answers"])
            error = BackendError("the worker failed on this chunk of tasks; its log says why")
        log.warning("tasks %s: %s", ", ".join(str(task["id"]) for task in chunk), error)
        return [{"error": error.to_dict()}] * len(chunk)

    def fit(self, event: str, data: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Records an annotation event; START_TRAINING puts a training into the queue, or finds the one that is there.

        Returns:
            For START_TRAINING `job`, its name; for all else `status`.

        Raises:
            BadRequest: there is nothing to train from.
            QueueUnavailable: Redis does not answer.
        """
        if event == "START_TRAINING":
            return {"job": self.train()}
        if event == "TASKS_CREATED" and self.project_id and self.settings.preannotate_on_import:
            record_import(self._connection, self.project_id)
        if event in ANNOTATION_EVENTS and self.project_id:
            self._record(event, data.get("annotation") or data.get("annotations"))
        return {"status": "recorded"}

    def train(self, train: str | None = None) -> str:
        """Puts a training of the project into the queue and returns the name of its job; `train` as in the settings.

        Raises:
            BadRequest: there is nothing to train from.
            QueueUnavailable: Redis does not answer.
        """
        if not (self.settings.label_studio_url and self.settings.label_studio_api_key):
            raise BadRequest("training reads annotations: set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY")
        if not self.project_id:
            raise BadRequest("the project has no number")
        return TrainingQueue(self._connection).start(self.project_id, train or self.settings.train)

    def _record(self, event: str, annotations: Any) -> None:
        rows = [row for row in (annotations if isinstance(annotations, list) else [annotations]) if _is_annotation(row)]
        is_deletion = event in DELETIONS
        with redis_errors():
            given = get_predicted(self._connection, self.project_id, [row.get("task") for row in rows])
        evidence = [
            AnnotationEvent(
                row["id"],
                row.get("task"),
                str(row.get("updated_at") or ""),
                is_deletion,
                {} if is_deletion else count_outcomes(row, boxes),
            )
            for row, boxes in zip(rows, given, strict=True)
        ]
        AnnotationLog(self._connection, self.project_id).record(evidence)

    def versions(self) -> list[str]:
        """Model versions that projects were told, and the one of the weights alone."""
        own = self._project_model.checkpoint.model_version()
        try:
            with redis_errors():
                return [own, *(version for version in list_model_versions(self._connection) if version != own)]
        except QueueUnavailable:
            return [own]

    def trainings(self) -> list[dict[str, Any]]:
        """How each project's training goes, or went, and how many annotations its events told of.

        Nothing while Redis does not answer.
        """
        try:
            rows = TrainingQueue(self._connection).all()
            return [
                {**row, "annotations": len(AnnotationLog(self._connection, row["project"]).annotations())}
                for row in rows
            ]
        except QueueUnavailable:
            return []

    def get(self, key: str) -> str | None:
        """What label-studio-ml's own front asks a model for: its `model_version`."""
        return self.model_version if key == "model_version" else None

    def set_extra_params(self, extra_params: Any) -> None:
        """Part of label-studio-ml's interface; the settings and the labeling config say all that is needed here."""

    def ready_workers(self) -> int:
        """Workers with their model loaded.

        Raises:
            QueueUnavailable: Redis does not answer.
        """
        return self.queue.count_ready_workers()

    @property
    def _outbox(self) -> Outbox:
        return Outbox(self._connection)

    @property
    def _connection(self) -> Redis:
        return _connection(self.settings.redis_url)


with contextlib.suppress(ImportError):  # label-studio-ml's `init_app` takes only what counts as its subclass
    from label_studio_ml.model import LabelStudioMLBase

    LabelStudioMLBase.register(GroundingDINO)
