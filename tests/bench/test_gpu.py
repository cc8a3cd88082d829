"""The benchmark for GPUs runs on a CPU too, with the bundled model, so that it works where there is a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT


@pytest.mark.timeout(300)
def test_all_sections_run_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.gpu", "--device", "cpu", "--tiny", "--runs", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "gpu.json")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert len(report) == 12
    assert all(section["measured"] and not section["failures"] for section in report.values())
    skipped = {name for name, section in report.items() if "skipped" in section["measured"]}
    assert skipped == {"measure kernel", "exhaust memory"}
    assert "| transformers, float32 | " in done.stdout
    assert "failed: none" in done.stdout


def test_a_section_that_fails_says_why_and_the_others_run(tmp_path: Path) -> None:
    program = """
import sys
from tests.bench import gpu

def fail(bench):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

gpu.SECTIONS = (fail, gpu.describe_machine)
sys.exit(gpu.main())
"""
    options = ["--device", "cpu", "--tiny", "--only", "0,1", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run([sys.executable, "-c", program, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "an illegal memory access" in done.stdout
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert "an illegal memory access" in report["fail"]["failures"][0]
    assert report["describe machine"]["measured"]
