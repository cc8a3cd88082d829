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
    """Installed where it is missing and we may."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found and os.geteuid() == 0 and shutil.which("apt-get"):
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], env=env, check=False, timeout=300)
        subprocess.run(["apt-get", "install", "-y", "-qq", "chromium"], env=env, check=False, timeout=300)
        found = shutil.which("chromium")
    return found


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """Skips the test where there is no browser."""
    chromium = find_chromium()
    if not chromium:
        pytest.skip("no Chromium here, and no right to install it: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def screenshot(page: Page, name: str) -> None:
    """The whole page, for people to look at."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
