"""Debian's Chromium, driven by Playwright."""

import contextlib
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.servers import ROOT

SCREENSHOTS = ROOT / os.environ.get("SCREENSHOTS", "build/screenshots")


@functools.cache
def find_chromium() -> str | None:
    """Finds Chromium; installs it if it is missing and this user may."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if not path and os.geteuid() == 0 and shutil.which("apt-get"):
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], env=env, check=False, timeout=300)
        subprocess.run(["apt-get", "install", "-y", "-qq", "chromium"], env=env, check=False, timeout=300)
        path = shutil.which("chromium")
    return path


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """Opens a browser; skips the test if there is none."""
    chromium = find_chromium()
    if not chromium:
        pytest.skip("no Chromium here, and no right to install it: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def save_screenshot(page: Page, name: str) -> None:
    """Saves a screenshot of the whole page."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
