"""The plugin: Label Studio's setup, predict and fit for Grounding DINO.

The methods have the shapes of label-studio-ml 2.x. The model itself runs in the workers: nothing here loads torch.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redis import Redis
from rq.job import Job

from backend.delivery.bulk import BulkSender
from backend.delivery.imported_projects import record_import
from backend.delivery.outbox import SELECTION_TIMEOUT, Delivery, Outbox, OutboxEntry
from backend.errors import BackendError, BadRequest, NotReady, QueueUnavailable
from backend.monitoring.feedback import AnnotationEvent, AnnotationLog, count_outcomes, get_predicted
from backend.monitoring.project_stats import list_model_versions
from backend.queue.backlogs import Place
from backend.queue.messages import Answer, Chunk, Prediction, TaskError, dump_answer
from backend.queue.predict_queue import PredictQueue
from backend.queue.private_redis import resolve_redis_url
from backend.queue.redis import connect, redis_errors
from backend.queue.training_queue import TrainingQueue
from backend.registry.project_model import ProjectModel
from backend.settings import Settings

log = logging.getLogger(__name__)

ENQUEUE_SLOTS = threading.BoundedSemaphore(2)  # requests that enqueue at a time: /health wants a turn too
DELETION_EVENTS = ("ANNOTATIONS_DELETED", "ANNOTATION_DELETED")
ANNOTATION_EVENTS = ("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_CREATED", *DELETION_EVENTS)

PUSHED_LATER = TaskError.from_error(
    NotReady("predictions of so many tasks are pushed into the project as they are made")
)
PUSHED_ALREADY = TaskError.from_error(NotReady("the prediction was pushed into the project a moment ago"))

connect_once = functools.cache(connect)


class GroundingDINO:
    """The model of one project and labeling config; cheap to make, one for each request."""

    def __init__(
        self, project_id: str | None = None, label_config: str | None = None, settings: Settings | None = None
    ) -> None:
        """Prepares the model.

        Args:
            project_id: as Label Studio writes it: the project's number, a dot, and when it was created.
            label_config: XML.
            settings: of this process; those of the environment by default.
        """
        number, _, created_at = (project_id or "").partition(".")
        self.project_id = number
        self.settings = settings or resolve_redis_url(Settings())
        self._project_model = ProjectModel(
            self.settings, label_config or "", number, int(created_at) if created_at.isdigit() else None
        )

    @property
    def model_version(self) -> str:
        """The fingerprint of weights, phrases and thresholds; of the weights alone without a usable config."""
        return self._project_model.model_version

    @property
    def queue(self) -> PredictQueue:
        """The queue of the predict workers."""
        return PredictQueue(self._connection, self._project_model.checkpoint.fingerprint)

    @property
    def _outbox(self) -> Outbox:
        return Outbox(self._connection)

    @property
    def _connection(self) -> Redis:
        return connect_once(self.settings.redis_url)

    def prepare(self) -> None:
        """Fingerprints the checkpoint's files, so that no request has to wait for it."""
        log.info("serving %s", self._project_model.checkpoint.make_model_version())

    def setup(self) -> str:
        """Returns the model version, for any config; called when a project connects and before every retrieval."""
        version = self.model_version
        try:
            with redis_errors():
                self._project_model.save_summary(self._connection)
        except QueueUnavailable as error:
            log.warning("project %s: %s", self.project_id, error)
        return version

    def predict(
        self,
        tasks: Sequence[Mapping[str, Any]],
        context: Mapping[str, Any] | None = None,
        is_cancelled: Callable[[], bool] = lambda: False,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """Predicts tasks.

        Args:
            tasks: as Label Studio sends them.
            context: what the annotator is typing, in a request for interactive work.
            is_cancelled: returns whether nobody waits for the answers any more.
            **kwargs: of label-studio-ml's interface; not used.

        Returns:
            One answer per task, in order: a prediction, or `{"error": {"code", "detail"}}`.

        Raises:
            LabelingConfigError: the config cannot be served.
            QueueUnavailable: Redis does not answer.
        """
        deadline, requested_at = time.monotonic() + self.settings.predict_deadline, self._outbox.get_time()
        is_stored = not context and self._can_deliver(tasks)  # Label Studio does not store answers to interactive work
        may_push = is_stored and not self._outbox.is_mismatched(self.project_id)
        is_large = len(tasks) > self.settings.push_above
        with contextlib.nullcontext() if len(tasks) == 1 else ENQUEUE_SLOTS:
            if may_push and is_large:
                self._make_sender().send(tasks, requested_at)
                return [dump_answer(PUSHED_LATER)] * len(tasks)
            size = self.settings.batch_size or self.queue.get_batch_size()
            chunks = self._project_model.make_chunks(tasks, size, context)
            place = Place.BACKLOG if is_large else Place.QUEUE if len(tasks) > 1 else Place.URGENT
            jobs = self.queue.enqueue(chunks, place, self.project_id)
        answers = [self._wait(job, chunk, deadline, is_cancelled) for job, chunk in zip(jobs, chunks, strict=True)]
        if may_push and is_cancelled():  # nobody stores the answers
            self._add_to_outbox(chunks, requested_at)
        elif is_stored:
            answers = self._settle_deliveries(chunks, answers, requested_at, may_push)
        return [dump_answer(answer) for chunk_answers in answers for answer in chunk_answers]

    def _make_sender(self) -> BulkSender:
        return BulkSender(
            self.settings, self._connection, self.project_id, self._project_model, self._project_model.created_at
        )

    def _can_deliver(self, tasks: Sequence[Mapping[str, Any]]) -> bool:
        """Returns whether predictions of these tasks can be imported into Label Studio."""
        has_key = bool(self.settings.label_studio_url and self.settings.label_studio_api_key and self.project_id)
        return has_key and all(isinstance(task.get("id"), int) for task in tasks)

    def _add_to_outbox(self, chunks: Sequence[Chunk], requested_at: float) -> None:
        created_at = self._project_model.created_at
        self._outbox.add([OutboxEntry.from_chunk(self.project_id, chunk, requested_at, created_at) for chunk in chunks])

    def _wait(self, job: Job, chunk: Chunk, deadline: float, is_cancelled: Callable[[], bool]) -> list[Answer]:
        """Waits for the answers of a chunk; the same error for each task where there are none."""
        try:
            answers = self.queue.wait(job, deadline, is_cancelled)
        except TimeoutError:
            error: BackendError = NotReady("the prediction is not finished yet; it continues, retrieve again")
        else:
            if answers is not None and len(answers) == len(chunk.tasks):
                return answers
            error = BackendError("the worker failed on this chunk of tasks; its log says why")
        task_ids = ", ".join(str(task.id) for task in chunk.tasks)
        log.warning("project %s, tasks %s: %s", self.project_id or "-", task_ids, error)
        return [TaskError.from_error(error)] * len(chunk.tasks)

    def _settle_deliveries(
        self, chunks: Sequence[Chunk], answers: Sequence[list[Answer]], requested_at: float, may_push: bool
    ) -> list[list[Answer]]:
        """Leaves unfinished chunks to the delivery; withholds the predictions that it has delivered meanwhile."""
        late = [
            chunk
            for chunk, chunk_answers in zip(chunks, answers, strict=True)
            if any(isinstance(answer, TaskError) and answer.error.code == NotReady.code for answer in chunk_answers)
        ]
        if may_push:
            self._add_to_outbox(late, requested_at)
        settled: list[list[Answer]] = []
        for chunk, chunk_answers in zip(chunks, answers, strict=True):
            by_task = zip(chunk.tasks, chunk_answers, strict=True)
            predicted = [task.id for task, answer in by_task if isinstance(answer, Prediction)]
            since = dict.fromkeys(predicted, requested_at - SELECTION_TIMEOUT)
            claims = self._outbox.claim(Delivery.PULL, self.project_id, chunk.model_version, since)
            settled.append(
                [
                    PUSHED_ALREADY if claims.get(task.id) else answer
                    for task, answer in zip(chunk.tasks, chunk_answers, strict=True)
                ]
            )
        return settled

    def fit(self, event: str, data: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Records an annotation event; START_TRAINING enqueues a training, or finds the one that is enqueued.

        Returns:
            For START_TRAINING `job`, the id of its job; for all other events `status`.

        Raises:
            BadRequest: there is nothing to train from.
            QueueUnavailable: Redis does not answer.
        """
        if event == "START_TRAINING":
            return {"job": self.train()}
        if event == "TASKS_CREATED" and self.project_id and self.settings.preannotate_on_import:
            record_import(self._connection, self.project_id)
        if event in ANNOTATION_EVENTS and self.project_id:
            self._record_annotations(event, data.get("annotation") or data.get("annotations"))
        return {"status": "recorded"}

    def train(self, train: str | None = None) -> str:
        """Enqueues a training of the project and returns the id of its job; `train` is as the setting TRAIN.

        Raises:
            BadRequest: there is nothing to train from.
            QueueUnavailable: Redis does not answer.
        """
        if not (self.settings.label_studio_url and self.settings.label_studio_api_key):
            raise BadRequest("training reads annotations: set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY")
        if not self.project_id:
            raise BadRequest("the project has no number")
        return TrainingQueue(self._connection).start(self.project_id, train or self.settings.train)

    def _record_annotations(self, event: str, annotations: Any) -> None:
        rows = [
            row
            for row in (annotations if isinstance(annotations, list) else [annotations])
            if isinstance(row, Mapping) and isinstance(row.get("id"), int) and isinstance(row.get("task"), int | None)
        ]
        is_deleted = event in DELETION_EVENTS
        with redis_errors():
            predicted = get_predicted(self._connection, self.project_id, [row.get("task") for row in rows])
        events = [
            AnnotationEvent(
                row["id"],
                row.get("task"),
                str(row.get("updated_at") or ""),
                is_deleted,
                {} if is_deleted else count_outcomes(row, boxes),
            )
            for row, boxes in zip(rows, predicted, strict=True)
        ]
        AnnotationLog(self._connection, self.project_id).record(events)

    def versions(self) -> list[str]:
        """Lists the model versions that projects use, and the one of the weights alone."""
        own = self._project_model.checkpoint.make_model_version()
        try:
            with redis_errors():
                return [own, *(version for version in list_model_versions(self._connection) if version != own)]
        except QueueUnavailable:
            return [own]

    def trainings(self) -> list[dict[str, Any]]:
        """Lists each project's training: its progress or outcome, and the annotations that its events reported.

        Empty while Redis does not answer.
        """
        try:
            return [
                {**row, "annotations": len(AnnotationLog(self._connection, row["project"]).get_annotations())}
                for row in TrainingQueue(self._connection).list_progress()
            ]
        except QueueUnavailable:
            return []

    def get(self, key: str) -> str | None:
        """Returns the value of a key, as label-studio-ml's own server reads it: only `model_version` is known."""
        return self.model_version if key == "model_version" else None

    def set_extra_params(self, extra_params: Any) -> None:
        """Does nothing; part of label-studio-ml's interface. The settings and the labeling config hold everything."""

    def count_ready_workers(self) -> int:
        """Counts the live workers whose model is loaded.

        Raises:
            QueueUnavailable: Redis does not answer.
        """
        return len(self.queue.get_ready_workers())


with contextlib.suppress(ImportError):  # label-studio-ml's `init_app` takes only what counts as its subclass
    from label_studio_ml.model import LabelStudioMLBase

    LabelStudioMLBase.register(GroundingDINO)
