"""How many workers `serve` starts, and on which devices; only the folder with the driver's GPUs is replaced."""

from pathlib import Path

import pytest

from backend.cli import supervisor
from backend.cli.supervisor import _make_workers
from backend.settings import Settings


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The driver's folder with one entry for each GPU; empty."""
    monkeypatch.setattr(supervisor, "NVIDIA", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def list_workers(device: str, workers: int = 0) -> list[str]:
    settings = Settings(model="demo", device=device, workers=workers)
    return [process._env["DEVICE"] for process in _make_workers(settings, {})]


def test_a_cpu_has_one_worker(gpus: Path) -> None:
    assert list_workers("auto") == ["auto"]
    assert list_workers("cpu") == ["cpu"]


def test_a_gpu_has_two_workers(gpus: Path) -> None:
    (gpus / "0000:01:00.0").mkdir()
    assert list_workers("auto") == ["auto", "auto"]
    assert list_workers("cuda") == ["cuda", "cuda"]
    assert list_workers("cpu") == ["cpu"]
    (gpus / "0000:02:00.0").mkdir()
    assert list_workers("auto") == ["cuda:0", "cuda:1"] * 2
    assert list_workers("cuda:1,cuda:0") == ["cuda:1", "cuda:0"] * 2
    assert list_workers("cuda:0,cpu") == ["cuda:0", "cpu", "cuda:0"]
    assert list_workers("cpu,cuda:0") == ["cpu", "cuda:0", "cuda:0"]
    assert list_workers("auto", workers=3) == ["cuda:0", "cuda:1", "cuda:0"]


@pytest.mark.parametrize(
    ("visible", "workers"),
    [("", 1), ("-1", 1), ("NoDevFiles", 1), ("3", 2), ("1,2", 4), ("0,-1,1", 2), ("GPU-8932f937", 2)],
)
def test_only_visible_gpus_count(gpus: Path, visible: str, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (gpus / "0000:01:00.0").mkdir()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(list_workers("auto")) == workers
