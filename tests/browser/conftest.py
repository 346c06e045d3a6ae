"""One Chromium, and one JupyterLab, for the tests of a file."""

from __future__ import annotations

import os
import shutil

import pytest
from lab import ROOT, Lab, Student

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


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """It starts after the browser was found, or not at all."""
    one = Lab(tmp_path_factory.mktemp("lab"))
    yield one
    one.stop()


@pytest.fixture
def open_notebook(browser, lab):
    """A function: a notebook's path -> a Student who has a copy of it open."""
    context = browser.new_context(viewport={"width": 1100, "height": 1000})
    opened = []

    def one(path):
        if path.parent != lab.folder:
            shutil.copy(ROOT / path, lab.folder)
        opened.append(Student(context, lab, path.name))
        return opened[-1]

    yield one
    for student in opened:
        student.close()
    context.close()
