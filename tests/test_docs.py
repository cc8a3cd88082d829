"""The documents match the code."""

import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from backend.cli.main import cli
from backend.settings import Settings, make_settings_table
from tests.servers import ROOT

README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_the_readme_has_the_generated_table_of_settings() -> None:
    shown = re.search(r"<!-- settings -->\n(.*?)<!-- /settings -->", README, re.S)[1]
    assert shown == make_settings_table(), (
        "run: python -c 'from backend.settings import *; print(make_settings_table())'"
    )


def test_the_readme_has_the_speed_of_the_benchmarks() -> None:
    """The median of three runs of `make bench`."""
    benchmarks = (ROOT / "docs" / "benchmarks.md").read_text()
    section = re.search(r"^## [^\n]*the detector against transformers, on a CPU\n(.*?)^## ", benchmarks, re.M | re.S)[1]
    runs = re.findall(r"^\| run \d \| ([\d.]+) \([^|]*\| ([\d.]+) \(", section, re.M)
    assert len(runs) == 3
    exact, reduced = (statistics.median(map(float, column)) for column in zip(*runs, strict=True))
    assert re.search(r"([\d.]+) times as fast as\s+transformers", README)[1] == str(exact)
    assert re.search(r"([\d.]+) times with\s+`PRECISION=bfloat16`", README)[1] == str(reduced)


def test_the_readme_shows_every_command() -> None:
    for name in cli.commands:
        assert f"`python -m backend {name}`" in README


def test_every_setting_is_an_option_with_default_and_unit() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "backend", "serve", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    text = " ".join(done.stdout.split())
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
        assert f"variable: {name.upper()}" in text


def test_an_option_wins_over_its_variable() -> None:
    command = [sys.executable, "-m", "backend", "serve", "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PORT": "9999"})
    assert (done.returncode, done.stderr) == (2, "error: PORT must be at least 1\n")


def test_an_empty_option_stands_for_the_default() -> None:
    command = [sys.executable, "-m", "backend", "web", "--redis-url", "", "--model-dir", "nowhere"]
    env = {"REDIS_URL": "redis://127.0.0.1:1", "MODEL": "demo"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (2, "error: set REDIS_URL; no server runs in MODEL_DIR=nowhere either\n")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_linked_files_exist(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    for document in DOCUMENTS:
        named = re.findall(r"`make ([a-z0-9-]+)", document.read_text())
        assert set(named) <= targets, document


def test_the_tests_named_on_the_security_page_exist() -> None:
    named = re.findall(r"`(\w+/test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "security.md").read_text())
    assert len(named) > 10
    for path, test in named:
        assert f"def {test}(" in (ROOT / "tests" / path).read_text(), test
