"""One Chromium for the tests of a file; it comes from the system."""

from __future__ import annotations

import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = [
    "--no-sandbox",  # containers run as root
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def browser():
    """Chromium, driven by playwright.

    Where it is missing the tests are skipped, or fail if KD_BROWSER=required.
    """
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        missing = "no Chromium (on Debian: apt-get install chromium)"
        if os.environ.get("KD_BROWSER") == "required":
            pytest.fail(f"{missing}, and KD_BROWSER=required")
        pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        yield one
        one.close()
