"""The plugin: Label Studio's setup, predict and fit for Grounding DINO.

The methods have the shapes of label-studio-ml 2.x. The model itself runs in the workers: nothing here loads torch.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from redis import Redis

from backend.errors import BackendError, LabelingConfigError, NotReady, QueueUnavailable
from backend.labeling import Plan, read_plan
from backend.queues import PredictQueue, connect, known_versions, record_event, remember_version
from backend.settings import Settings
from backend.versions import Checkpoint, find_checkpoint

log = logging.getLogger(__name__)

EVIDENCE_FIELDS = (
    "id",
    "task",
    "project",
    "result",
    "was_cancelled",
    "ground_truth",
    "parent_prediction",
    "updated_at",
)


@functools.cache
def _checkpoint(model: str) -> Checkpoint:
    return find_checkpoint(model)  # keeps its fingerprint, for which it read every byte of its files


@functools.cache
def _connection(redis_url: str) -> Redis:
    return connect(redis_url)


class GroundingDINO:
    """One labeling config's view of the detector; cheap to make, one for each request."""

    def __init__(
        self, project_id: str | None = None, label_config: str | None = None, settings: Settings | None = None
    ) -> None:
        self.project_id = project_id
        self.label_config = label_config or ""
        self.settings = settings or Settings.from_env()

    @property
    def model_version(self) -> str:
        """Fingerprint of weights, prompts and thresholds; that of the weights alone while there is no usable config."""
        return self._checkpoint.model_version(self._usable_plan())

    @property
    def queue(self) -> PredictQueue:
        """The queue that the workers serve."""
        return PredictQueue(self._connection)

    def prepare(self) -> None:
        """Reads the checkpoint's files for their fingerprint, so that no request has to wait for it."""
        log.info("serving %s", self._checkpoint.model_version())

    def setup(self) -> str:
        """Called when a project connects and before every retrieval; returns the model version, whatever the config."""
        version = self.model_version
        try:
            remember_version(self._connection, str(self.project_id), version)
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
        plan, deadline = self._plan(), time.monotonic() + self.settings.predict_deadline
        version = self._checkpoint.model_version(plan)
        rows = [{"id": task.get("id"), "data": plan.select(task.get("data") or {})} for task in tasks]
        size = self.settings.batch_size or self.queue.batch_size()
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        common = {
            "plan": plan.to_dict(),
            "model_version": version,
            "fingerprint": self._checkpoint.fingerprint,
        }
        payloads = [{"tasks": chunk, **common} for chunk in chunks]
        jobs = self.queue.enqueue(payloads, at_front=len(tasks) == 1)
        answers = [self._answers(job, chunk, deadline) for job, chunk in zip(jobs, chunks, strict=True)]
        return [answer for chunk in answers for answer in chunk]

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

    def fit(self, event: str, data: Mapping[str, Any], **kwargs: Any) -> None:
        """Records an annotation event, without the secrets that Label Studio sends along.

        Raises:
            QueueUnavailable: Redis does not answer.
        """
        annotations = data.get("annotation") or data.get("annotations") or []
        rows = annotations if isinstance(annotations, list) else [annotations]
        evidence = [
            {key: row[key] for key in EVIDENCE_FIELDS if key in row} for row in rows if isinstance(row, Mapping)
        ]
        record_event(
            self._connection,
            {"event": event, "project": self.project_id, "annotations": evidence, "time": time.time()},
        )

    def versions(self) -> list[str]:
        """Model versions that projects were told, and the one of the weights alone."""
        own = self._checkpoint.model_version()
        try:
            return [own, *(version for version in known_versions(self._connection) if version != own)]
        except QueueUnavailable:
            return [own]

    def ready_workers(self) -> int:
        """Workers with their model loaded.

        Raises:
            QueueUnavailable: Redis does not answer.
        """
        return self.queue.ready_workers()

    @property
    def _checkpoint(self) -> Checkpoint:
        return _checkpoint(self.settings.model)

    @property
    def _connection(self) -> Redis:
        return _connection(self.settings.redis_url)

    def _usable_plan(self) -> Plan | None:
        try:
            return self._plan()
        except LabelingConfigError as error:
            log.warning("project %s: %s", self.project_id, error)
            return None

    def _plan(self) -> Plan:
        return read_plan(self.label_config, self.settings.box_threshold, self.settings.nms_iou)
