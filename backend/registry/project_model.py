"""What a project asks of the workers: its plan, the version that serves it, and its tasks in chunks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from redis import Redis

from backend.errors import LabelingConfigError
from backend.labelstudio.labeling_config import Plan, read_plan
from backend.labelstudio.targets import read_prompt
from backend.monitoring.project_stats import save_summary
from backend.registry.checkpoint import Checkpoint, find_checkpoint
from backend.registry.versions import Version, VersionStore
from backend.settings import Settings

log = logging.getLogger(__name__)


@functools.cache
def _checkpoint(model: str) -> Checkpoint:
    return find_checkpoint(model)  # keeps its fingerprint, for which it read every byte of its files


def to_row(task: Mapping[str, Any], plan: Plan, context: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a worker needs of a task."""
    row = {"id": task.get("id"), "data": plan.select_fields(task.get("data") or {})}
    prompt = read_prompt(plan, task, context)
    return {**row, "prompt": asdict(prompt)} if prompt else row


class ProjectModel:
    """One project's labeling config and what was learned for it, as of now: one look at the disk for all of it."""

    def __init__(self, settings: Settings, label_config: str, project: str = "", created: int | None = None) -> None:
        """`project` is its number, `created` its birthday in seconds since the epoch, where it is known."""
        self._settings, self._label_config = settings, label_config
        self._project, self._created = project, created

    @property
    def checkpoint(self) -> Checkpoint:
        """The one that MODEL names."""
        return _checkpoint(self._settings.model)

    @functools.cached_property
    def learned(self) -> Version | None:
        """What serves of what was learned for this project."""
        if not self._project:
            return None
        versions = VersionStore(self._settings.model_dir, self._project)
        return versions.get_serving(self.checkpoint.fingerprint, self._created)

    @functools.cached_property
    def plan(self) -> Plan:
        """What the labeling config asks, with the thresholds that were learned.

        Raises:
            LabelingConfigError: the config cannot be served.
        """
        plan = read_plan(self._label_config, self._settings.box_threshold, self._settings.nms_iou)
        return self.learned.apply_to(plan) if self.learned else plan

    @property
    def model_version(self) -> str:
        """Fingerprint of weights, prompts and thresholds; that of the weights alone while there is no usable config."""
        try:
            plan: Plan | None = self.plan
        except LabelingConfigError as error:
            log.warning("project %s: %s", self._project, error)
            plan = None
        return self.checkpoint.model_version(plan, self.learned.weights if self.learned else "")

    def remember(self, connection: Redis) -> None:
        """Notes the project's labels and version for the status page; raises RedisError."""
        try:
            plan: Plan | None = self.plan
        except LabelingConfigError:
            plan = None
        save_summary(connection, self._project, self.model_version, plan, self._label_config, self._created)

    def make_chunks(
        self,
        tasks: Sequence[Mapping[str, Any]],
        size: int,
        context: Mapping[str, Any] | None = None,
        plan: Plan | None = None,
    ) -> list[dict[str, Any]]:
        """What the workers are given, at most `size` tasks each, for this `plan` or the own; raises as `plan`."""
        plan = plan or self.plan
        rows = [to_row(task, plan, context) for task in tasks]
        weights = self.learned.weights if self.learned else ""
        common = {
            "plan": plan.to_dict(),
            "model_version": self.checkpoint.model_version(plan, weights),
            "fingerprint": self.checkpoint.fingerprint,
            "learned": [self._project, self.learned.id] if self.learned and weights else None,
        }
        return [{"tasks": rows[i : i + size], **common} for i in range(0, len(rows), size)]
