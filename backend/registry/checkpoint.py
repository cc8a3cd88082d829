"""The checkpoint that MODEL names, and the version string that Label Studio sees."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from backend.errors import CheckpointError
from backend.labelstudio.labeling_config import Plan

DEMO_CHECKPOINT = Path(__file__).parent.parent / "demo" / "checkpoint"
READ_SIZE = 1024 * 1024  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: its name, its source (a folder, a file or a hub id), and its files; a hub id has none here."""

    name: str
    source: str
    files: tuple[Path, ...] = ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the files, or of the hub id; the first access reads every byte."""
        digest = hashlib.sha256(b"" if self.files else self.source.encode())
        for path in self.files:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while data := file.read(READ_SIZE):
                    digest.update(data)
        return digest.hexdigest()

    def make_model_version(self, plan: Plan | None = None, weights: str = "") -> str:
        """Makes the model version: equal versions give equal predictions.

        Args:
            plan: the phrases and thresholds; None while there is no usable labeling config.
            weights: fingerprint of the trained weights; empty for the checkpoint's own.
        """
        plan_text = json.dumps(plan.payload if plan else {}, sort_keys=True)
        return f"{self.name}-{hashlib.sha256((self.fingerprint + weights + plan_text).encode()).hexdigest()[:8]}"


def find_checkpoint(model: str) -> Checkpoint:
    """Finds the checkpoint of a MODEL setting: `demo`, a folder, an original `.pth` file, or else a hub id.

    Raises:
        CheckpointError: `model` looks like a path and nothing is there.
    """
    path = DEMO_CHECKPOINT if model == "demo" else Path(model)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and p.suffix != ".md")
        return Checkpoint("demo" if model == "demo" else path.resolve().name, str(path), tuple(files))
    if path.suffix == ".pth" and path.is_file():
        return Checkpoint(path.stem, str(path), (path,))
    if model.startswith((".", "/", "~")) or model.count("/") != 1 or path.suffix == ".pth":
        raise CheckpointError(
            f"MODEL={model}: no such folder or file; give a folder, an original .pth file, "
            "a hub id such as owner/name, or demo"
        )
    return Checkpoint(model.split("/")[1], model)
