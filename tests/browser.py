"""A headless Chromium for tests, where there is one: skipped with a hint, or failed where the environment insists."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HINT = (
    "no Chromium was found: install one (apt-get install chromium, or playwright install chromium), or name it in "
    "PROXIMO_CHROMIUM"
)


def missing(why: str) -> None:
    """Skip, or fail where CI_NEEDS_BROWSER=1 says that a browser must be there."""
    if os.environ.get("CI_NEEDS_BROWSER") == "1":
        pytest.fail(why)
    pytest.skip(why)


def chromium() -> str | None:
    """The browser's program: PROXIMO_CHROMIUM, one on the PATH, or None for playwright's own."""
    named = os.environ.get("PROXIMO_CHROMIUM")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def opened() -> Iterator[Any]:
    """A browser of playwright's."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        missing("playwright is not installed: pip install -c constraints.txt playwright")
        return
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        except Error as error:
            missing(f"{HINT} ({str(error).splitlines()[0]})")
            return
        yield browser
        browser.close()
