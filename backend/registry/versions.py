"""The versions that were trained for a project, on disk: weights, thresholds, metrics; promote, roll back.

`MODEL_DIR/versions/<project>/<id>/` holds `version.json` and, where weights were trained, `weights.safetensors`: only
the tensors that training changed. `current` beside them names the version that serves; without it the base checkpoint
serves. Every file is written to a temporary name and renamed, so that nothing half-written is ever found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter, ValidationError

from backend.errors import CheckpointError
from backend.labelstudio.labeling_config import STRICT, Control, Plan
from backend.queue.messages import describe_validation_error

log = logging.getLogger(__name__)

ID = re.compile(r"[0-9a-z][0-9a-z-]{3,40}")
PROJECT = re.compile(r"[0-9]{1,18}")
WEIGHTS, VERSION_FILE, CURRENT = "weights.safetensors", "version.json", "current"  # file names
READ_SIZE = 1024 * 1024  # bytes

# control -> label -> (the threshold of the labeling config, the trained one)
ThresholdChanges = Mapping[str, Mapping[str, tuple[float, float]]]


@dataclass(frozen=True)
class Version:
    """One outcome of training."""

    id: str
    checkpoint: str  # fingerprint of the base checkpoint
    parent: str  # the version that served before; empty: the base checkpoint
    created: int  # when the project was created, in seconds since the epoch: a reset database reuses its number
    weights: str = ""  # SHA-256 of the file of weights; empty where only thresholds were trained
    thresholds: ThresholdChanges = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""  # fingerprint of the examples
    reason: str = ""
    format: Literal[1] = 1

    __pydantic_config__: ClassVar = STRICT

    def apply_to(self, plan: Plan) -> Plan:
        """Returns the plan with the trained thresholds, except where the labeling config has changed since."""
        return dataclasses.replace(plan, controls=tuple(self._apply_to_control(control) for control in plan.controls))

    def _apply_to_control(self, control: Control) -> Control:
        changes = self.thresholds.get(control.from_name, {})
        labels = tuple(
            dataclasses.replace(label, threshold=changes[label.name][1])
            if label.name in changes and changes[label.name][0] == label.threshold
            else label
            for label in control.labels
        )
        return dataclasses.replace(control, labels=labels)


VERSION: TypeAdapter[Version] = TypeAdapter(Version)


class VersionStore:
    """The versions of one project, below MODEL_DIR."""

    def __init__(self, model_dir: Path, project: str) -> None:
        """Raises CheckpointError where `project` is not a number."""
        if not PROJECT.fullmatch(project):
            raise CheckpointError(f"{project!r} is not the number of a project")
        self.project = project
        self.folder = model_dir / "versions" / project

    def list_versions(self) -> list[Version]:
        """Lists the versions that are not damaged, the oldest first."""
        versions = []
        for path in sorted(self.folder.glob(f"*/{VERSION_FILE}")):
            with contextlib.suppress(CheckpointError):
                versions.append(self.get(path.parent.name))
        return versions

    def get(self, version_id: str) -> Version:
        """Reads a version.

        Raises:
            CheckpointError: there is no such version, or it is damaged.
        """
        folder = self._get_folder(version_id)
        try:
            row = json.loads((folder / VERSION_FILE).read_text())
            required = {field.name for field in dataclasses.fields(Version)} - {"format"}  # older files have none
            missing = required - set(row)
            if missing:
                raise ValueError(f"no {min(missing)}")
            version = VERSION.validate_python(row)
        except FileNotFoundError:
            raise CheckpointError(
                f"version {version_id} of project {self.project} is not in {folder.parent}; "
                "every machine needs the same MODEL_DIR"
            ) from None
        except ValidationError as error:
            reason = describe_validation_error(error)
            raise CheckpointError(f"version {version_id} of project {self.project} is damaged ({reason})") from None
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"version {version_id} of project {self.project} is damaged ({error})") from None
        if version.weights and _hash_file(folder / WEIGHTS) != version.weights:
            raise CheckpointError(f"the weights of version {version_id} of project {self.project} are damaged")
        return version

    def get_weights_path(self, version_id: str) -> Path:
        """Returns where the trained tensors of a version lie."""
        return self._get_folder(version_id) / WEIGHTS

    def get_current_id(self) -> str:
        """Returns the id of the promoted version; empty: the base checkpoint."""
        return self._read_current()[0]

    def _read_current(self) -> tuple[str, str]:
        """Reads the ids of the promoted version and of the one before it."""
        try:
            row = json.loads((self.folder / CURRENT).read_text())
            return str(row["version"]), str(row["previous"])
        except FileNotFoundError:
            return "", ""
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.error("%s cannot be read (%s); serving the base checkpoint", self.folder / CURRENT, error)
            return "", ""

    def get_serving(self, checkpoint: str, created_at: int | None = None) -> Version | None:
        """Returns the version that serves: the promoted one, or its next ancestor that is not damaged.

        Args:
            checkpoint: fingerprint of the base checkpoint; a version of another one does not fit it.
            created_at: when the project was created, where it is known; a version of another project does not serve it.

        Returns:
            The version; None: the base checkpoint.
        """
        version_id = self.get_current_id()
        while version_id:
            try:
                version = self.get(version_id)
            except CheckpointError as error:
                log.error("%s; serving the version before it", error)
                version_id = self._read_parent(version_id)
            else:
                fits = version.checkpoint == checkpoint and created_at in (None, version.created)
                return version if fits else None
        return None

    def _read_parent(self, version_id: str) -> str:
        """Reads the parent's id, also of a version that is damaged elsewhere; empty where it cannot be read."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, CheckpointError):
            return str(json.loads((self._get_folder(version_id) / VERSION_FILE).read_text())["parent"])
        return ""

    def add(self, version: Version, write_weights: Callable[[Path], object] | None = None) -> Version:
        """Writes a version, which does not serve before it is promoted; returns it with the hash of its weights.

        Raises:
            OSError: the disk is full or cannot be written; nothing is left behind.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
        try:
            if write_weights:
                write_weights(temporary / WEIGHTS)
                version = dataclasses.replace(version, weights=_hash_file(temporary / WEIGHTS))
            (temporary / VERSION_FILE).write_text(json.dumps(asdict(version), indent=2) + "\n")
            for path in temporary.iterdir():
                _sync(path)
            temporary.chmod(0o755)
            temporary.rename(self._get_folder(version.id))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return version

    def promote(self, version_id: str) -> None:
        """Makes a version serve; an empty id stands for the base checkpoint.

        Raises:
            CheckpointError: there is no such version, or it is damaged.
            OSError: the disk cannot be written.
        """
        self._write_current(version_id, previous=self.get_current_id())

    def _write_current(self, version_id: str, previous: str) -> None:
        if version_id:
            self.get(version_id)
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".current-", dir=self.folder)
        with os.fdopen(handle, "w") as file:
            json.dump({"version": version_id, "previous": previous}, file)
        Path(temporary).chmod(0o644)
        _sync(Path(temporary))
        Path(temporary).replace(self.folder / CURRENT)

    def roll_back(self) -> str:
        """Makes the version before the current one serve again; returns its id, empty for the base checkpoint.

        Raises:
            CheckpointError: the base checkpoint serves, and nothing was promoted before it.
        """
        version_id, previous = self._read_current()
        if version_id == previous == "":
            raise CheckpointError(f"project {self.project} is served by the base checkpoint already")
        while previous and not self._is_sound(previous):
            previous = self._read_parent(previous)
        self._write_current(previous, previous=self._read_parent(previous))
        return previous

    def _is_sound(self, version_id: str) -> bool:
        with contextlib.suppress(CheckpointError):
            return bool(self.get(version_id))
        return False

    def _get_folder(self, version_id: str) -> Path:
        if not ID.fullmatch(version_id):
            raise CheckpointError(f"{version_id!r} is not the name of a version")
        return self.folder / version_id


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _hash_file(path: Path) -> str:
    """Returns a file's SHA-256, cached for as long as the file does not change; empty where it cannot be read."""
    try:
        stat = path.stat()
        return _hash_unchanged_file(path, stat.st_mtime_ns, stat.st_size, stat.st_ino)
    except OSError:
        return ""


@functools.lru_cache(maxsize=256)
def _hash_unchanged_file(path: Path, *stat: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(READ_SIZE):
            digest.update(data)
    return digest.hexdigest()
