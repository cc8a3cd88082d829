"""Which checkpoint serves, and the version string that Label Studio sees."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backend.errors import CheckpointError
from backend.labeling import Plan

DEMO = Path(__file__).parent / "demo" / "checkpoint"
PIECE = 1024 * 1024  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint by name: where it lies (folder, file or hub id) and the fingerprint of its files."""

    name: str
    source: str
    fingerprint: str

    def model_version(self, plan: Plan | None = None) -> str:
        """Weights, prompts and thresholds in one short string: as long as it is the same, so are the answers."""
        asked = json.dumps(plan.to_dict() if plan else {}, sort_keys=True)
        return f"{self.name}-{_short(self.fingerprint + asked)}"


def find_checkpoint(model: str) -> Checkpoint:
    """`demo`, a folder, an original `.pth` file, or else the id of a checkpoint on the hub.

    Raises:
        CheckpointError: `model` looks like a path and nothing is there.
    """
    path = DEMO if model == "demo" else Path(model)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and p.suffix != ".md")
        return Checkpoint("demo" if model == "demo" else path.resolve().name, str(path), _fingerprint(files))
    if path.suffix == ".pth" and path.is_file():
        return Checkpoint(path.stem, str(path), _fingerprint([path]))
    if model.startswith((".", "/", "~")) or model.count("/") != 1 or path.suffix == ".pth":
        raise CheckpointError(
            f"MODEL={model}: no such folder or file; give a folder, an original .pth file, "
            "a hub id such as owner/name, or demo"
        )
    return Checkpoint(model.split("/")[1], model, _short(model))


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
    return digest.hexdigest()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
