"""A headless Chromium for tests of pages: skipped where there is none, failed where CI says that there must be one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def missing(what: str) -> None:
    """Skip with a hint, or fail where `CI_NEEDS_BROWSER=1` says that the browser is part of the test."""
    if os.environ.get("CI_NEEDS_BROWSER") == "1":
        pytest.fail(f"CI_NEEDS_BROWSER is 1, but {what}")
    pytest.skip(what)


def chromium() -> str:
    """The path of a Chromium: `PROXIMO_CHROMIUM`, or one on PATH."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("PROXIMO_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        missing("there is no Chromium: install the package chromium, or set PROXIMO_CHROMIUM to the path of one")
    assert found is not None
    return found


@contextmanager
def headless() -> Iterator[Any]:
    """A playwright browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("the package playwright is missing: pip install -c constraints.txt playwright")
        raise
    executable = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=QUIET)
        try:
            yield browser
        finally:
            browser.close()
