"""The model of one project: its plan, the version that serves it, and its tasks in chunks for the workers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from redis import Redis

from backend.errors import LabelingConfigError
from backend.labelstudio.labeling_config import Plan, read_plan
from backend.labelstudio.targets import read_prompt
from backend.monitoring.project_stats import save_summary
from backend.queue.messages import Chunk, ChunkTask, VersionId
from backend.registry.checkpoint import Checkpoint, find_checkpoint
from backend.registry.versions import Version, VersionStore
from backend.settings import Settings

log = logging.getLogger(__name__)

# Cached, because a checkpoint object keeps its fingerprint, and computing it reads every byte of its files.
find_checkpoint_once = functools.cache(find_checkpoint)


class ProjectModel:
    """One project's labeling config and trained version, as they were at the first access."""

    def __init__(self, settings: Settings, label_config: str, project: str = "", created_at: int | None = None) -> None:
        """Prepares the model; nothing is read yet.

        Args:
            settings: of this process.
            label_config: XML, as the project has it.
            project: its number; empty where there is none.
            created_at: when the project was created, in seconds since the epoch, where it is known.
        """
        self._settings, self._label_config = settings, label_config
        self._project, self.created_at = project, created_at

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that MODEL names; raises CheckpointError where there is none."""
        return find_checkpoint_once(self._settings.model)

    @functools.cached_property
    def version(self) -> Version | None:
        """The trained version that serves the project; None: the base checkpoint."""
        if not self._project:
            return None
        store = VersionStore(self._settings.model_dir, self._project)
        return store.get_serving(self.checkpoint.fingerprint, self.created_at)

    @functools.cached_property
    def plan(self) -> Plan:
        """The plan of the labeling config, with the version's thresholds.

        Raises:
            LabelingConfigError: the config cannot be served.
        """
        plan = read_plan(self._label_config, self._settings.box_threshold, self._settings.nms_iou)
        return self.version.apply_to(plan) if self.version else plan

    @property
    def model_version(self) -> str:
        """The fingerprint of weights, phrases and thresholds; of the weights alone without a usable config."""
        try:
            return self._make_model_version(self.plan)
        except LabelingConfigError as error:
            log.warning("project %s: %s", self._project, error)
            return self._make_model_version(None)

    def _make_model_version(self, plan: Plan | None) -> str:
        return self.checkpoint.make_model_version(plan, self.version.weights if self.version else "")

    def save_summary(self, connection: Redis) -> None:
        """Saves the project's labels and model version for the status page; raises RedisError."""
        try:
            plan: Plan | None = self.plan
        except LabelingConfigError:
            plan = None
        save_summary(connection, self._project, self.model_version, plan, self._label_config, self.created_at)

    def make_chunks(
        self,
        tasks: Sequence[Mapping[str, Any]],
        size: int,
        context: Mapping[str, Any] | None = None,
        plan: Plan | None = None,
    ) -> list[Chunk]:
        """Cuts tasks into chunks for the workers.

        Args:
            tasks: as Label Studio sends them.
            size: maximum number of tasks in a chunk.
            context: what the annotator is typing, in a request for interactive work.
            plan: instead of the project's own.

        Raises:
            LabelingConfigError: the config cannot be served.
        """
        plan = plan or self.plan
        chunk_tasks = [
            ChunkTask(
                id=task.get("id"),
                data=plan.select_fields(task.get("data") or {}),
                prompt=read_prompt(plan, task, context),
            )
            for task in tasks
        ]
        has_weights = self.version is not None and self.version.weights
        version = VersionId(project=self._project, id=self.version.id) if self.version and has_weights else None
        model_version = self._make_model_version(plan)
        return [
            Chunk(
                tasks=tuple(chunk_tasks[i : i + size]),
                plan=plan,
                model_version=model_version,
                checkpoint=self.checkpoint.fingerprint,
                version=version,
            )
            for i in range(0, len(chunk_tasks), size)
        ]
