"""What was learned for a project, on disk: weights, thresholds, metrics; promote, roll back.

`MODEL_DIR/versions/<project>/<id>/` holds `version.json` and, where weights were learned, `weights.safetensors`: only
the tensors that training changed. `current` beside them names the version that serves; no such file means the
checkpoint as it came. All is written aside and renamed, so that nothing half-written is ever found.
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
from typing import Any

from backend.errors import CheckpointError
from backend.labelstudio.labeling_config import Control, Plan

log = logging.getLogger(__name__)

ID = re.compile(r"[0-9a-z][0-9a-z-]{3,40}")
PROJECT = re.compile(r"[0-9]{1,18}")
WEIGHTS, ABOUT, CURRENT = "weights.safetensors", "version.json", "current"
READ_SIZE = 1024 * 1024  # bytes

Thresholds = Mapping[str, Mapping[str, tuple[float, float]]]  # control -> label -> the one before, the learned one


@dataclass(frozen=True)
class Version:
    """One outcome of training; `weights` is the SHA-256 of their file, empty where only thresholds were learned."""

    id: str
    checkpoint: str  # fingerprint of the checkpoint that it was learned on
    parent: str  # what served before; empty: the checkpoint as it came
    created: int  # of the project, seconds since the epoch: numbers of projects come again, their birthdays do not
    weights: str = ""
    thresholds: Thresholds = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""  # fingerprint of the examples
    reason: str = ""

    def apply_to(self, plan: Plan) -> Plan:
        """The plan with the learned thresholds; one that the labeling config has changed since goes before."""
        controls = tuple(self._applied_to(control) for control in plan.controls)
        return dataclasses.replace(plan, controls=controls)

    def _applied_to(self, control: Control) -> Control:
        learned = self.thresholds.get(control.from_name, {})
        labels = tuple(
            dataclasses.replace(label, threshold=learned[label.name][1])
            if label.name in learned and learned[label.name][0] == label.threshold
            else label
            for label in control.labels
        )
        return dataclasses.replace(control, labels=labels)


class VersionStore:
    """The versions of one project, below MODEL_DIR."""

    def __init__(self, model_dir: Path, project: str) -> None:
        """Raises CheckpointError where `project` is no number."""
        if not PROJECT.fullmatch(project):
            raise CheckpointError(f"{project!r} is not the number of a project")
        self.project = project
        self.folder = model_dir / "versions" / project

    def all(self) -> list[Version]:
        """Every sound version, oldest first."""
        found = []
        for path in sorted(self.folder.glob(f"*/{ABOUT}")):
            with contextlib.suppress(CheckpointError):
                found.append(self.get(path.parent.name))
        return found

    def get(self, version: str) -> Version:
        """The version of this id.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        folder = self._folder_of(version)
        try:
            row = json.loads((folder / ABOUT).read_text())
            found = Version(**{f.name: row[f.name] for f in dataclasses.fields(Version)})
        except FileNotFoundError:
            raise CheckpointError(
                f"version {version} of project {self.project} is not in {folder.parent}; "
                "every machine needs the same MODEL_DIR"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"version {version} of project {self.project} is damaged ({error})") from None
        if found.weights and _sha256(folder / WEIGHTS) != found.weights:
            raise CheckpointError(f"the weights of version {version} of project {self.project} are damaged")
        return found

    def weights_path(self, version: str) -> Path:
        """Where the learned tensors of a version lie."""
        return self._folder_of(version) / WEIGHTS

    def get_current_id(self) -> str:
        """The id of the version that is to serve; empty: the checkpoint as it came."""
        return self._mark()[0]

    def _mark(self) -> tuple[str, str]:
        """The ids of what is to serve, and of what did before."""
        try:
            row = json.loads((self.folder / CURRENT).read_text())
            return str(row["version"]), str(row["previous"])
        except FileNotFoundError:
            return "", ""
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.error("%s cannot be read (%s); serving the checkpoint as it came", self.folder / CURRENT, error)
            return "", ""

    def get_serving(self, checkpoint: str, created: int | None = None) -> Version | None:
        """The version that serves: the promoted one, or the next sound one before it; None: the checkpoint as it came.

        Args:
            checkpoint: fingerprint of the checkpoint that serves; versions of another one do not fit it.
            created: the project's birthday, where it is known.
        """
        version = self.get_current_id()
        while version:
            try:
                found = self.get(version)
                return found if found.checkpoint == checkpoint and created in (None, found.created) else None
            except CheckpointError as error:
                log.error("%s; serving what was there before", error)
                version = self._parent_of(version)
        return None

    def _parent_of(self, version: str) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, CheckpointError):
            return str(json.loads((self._folder_of(version) / ABOUT).read_text())["parent"])
        return ""

    def add(self, version: Version, write_weights: Callable[[Path], object] | None = None) -> Version:
        """Writes a version; it serves only when it is promoted. Returns it with the fingerprint of its weights.

        Raises:
            OSError: the disk is full or cannot be written; nothing is left behind.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
        try:
            if write_weights:
                write_weights(aside / WEIGHTS)
                version = dataclasses.replace(version, weights=_sha256(aside / WEIGHTS))
            (aside / ABOUT).write_text(json.dumps(asdict(version), indent=2) + "\n")
            for path in aside.iterdir():
                _sync(path)
            aside.chmod(0o755)
            aside.rename(self._folder_of(version.id))
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return version

    def promote(self, version: str) -> None:
        """Lets a version serve; an empty id stands for the checkpoint as it came.

        Raises:
            CheckpointError: there is no such version, or it is damaged.
            OSError: the disk cannot be written.
        """
        self._promote(version, previous=self.get_current_id())

    def _promote(self, version: str, previous: str) -> None:
        if version:
            self.get(version)
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=".current-", dir=self.folder)
        with os.fdopen(handle, "w") as file:
            json.dump({"version": version, "previous": previous}, file)
        Path(aside).chmod(0o644)
        _sync(Path(aside))
        Path(aside).replace(self.folder / CURRENT)

    def roll_back(self) -> str:
        """Lets what served before the current version serve again, and returns its id.

        Raises:
            CheckpointError: nothing was learned yet.
        """
        version, previous = self._mark()
        if version == previous == "":
            raise CheckpointError(f"project {self.project} is served by the checkpoint as it came already")
        while previous and not self._is_sound(previous):
            previous = self._parent_of(previous)
        self._promote(previous, previous=self._parent_of(previous))
        return previous

    def _is_sound(self, version: str) -> bool:
        with contextlib.suppress(CheckpointError):
            return bool(self.get(version))
        return False

    def _folder_of(self, version: str) -> Path:
        if not ID.fullmatch(version):
            raise CheckpointError(f"{version!r} is not the name of a version")
        return self.folder / version


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    """Of a file's bytes; remembered as long as the file is the same. Empty where it cannot be read."""
    try:
        about = path.stat()
        return _digest(path, about.st_mtime_ns, about.st_size, about.st_ino)
    except OSError:
        return ""


@functools.lru_cache(maxsize=256)
def _digest(path: Path, *about: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(READ_SIZE):
            digest.update(piece)
    return digest.hexdigest()
