import os
import subprocess
import sys
from pathlib import Path

import pytest

from backend.detection.checkpoints import load_checkpoint
from backend.errors import CheckpointError
from backend.registry.checkpoint import DEMO_CHECKPOINT


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_checkpoint(str(tmp_path))


def test_without_the_hub_one_line_names_the_alternatives() -> None:
    code = "from backend.detection.checkpoints import load_checkpoint; load_checkpoint('owner/never-cached')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    last = run.stderr.strip().splitlines()[-1]
    assert "MODEL=owner/never-cached cannot be loaded" in last
    assert "give a hub id that this machine can reach or has cached, a folder, an original .pth file, or demo" in last


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="'bert'; it must be one of"):
        load_checkpoint(str(tmp_path))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    for path in DEMO_CHECKPOINT.iterdir():
        body = path.read_bytes()
        (tmp_path / path.name).write_bytes(body[: len(body) // 2] if path.suffix == ".safetensors" else body)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_checkpoint(str(tmp_path))
