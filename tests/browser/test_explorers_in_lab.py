"""Every explorer of every chapter in JupyterLab, moved by keyboard alone.

A control that is not wired fails here: with `control.observe(...)` taken out of
kdlib/explorers/frame.py, the sentence stays as it was.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import nbformat
import pytest
from lab import ROOT, excerpt, explorer_cells, wait

pytestmark = pytest.mark.slow

CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FOUND = [(path, number) for path in CHAPTERS for number in explorer_cells(path)]


def room(path: Path, number: int) -> str:
    """The explorer's name, as its cell imports it."""
    source = nbformat.read(path, as_version=4).cells[number].source
    return re.search(r"kdlib\.explorers\.(\w+)", source)[1]


ROOMS = {room(*one): one for one in FOUND}


def test_every_explorer_has_its_chapter():
    rooms = {path.stem for path in (ROOT / "kdlib" / "explorers").glob("*.py")}
    assert set(ROOMS) == rooms - {"__init__", "frame"}
    assert len(ROOMS) == len(FOUND)


def seen(page) -> tuple[str, str]:
    """The sentence that a screen reader reads aloud, and the picture's hash."""
    sentence = page.locator('.jp-OutputArea [role="status"]').inner_text()
    pixels = page.locator(".jp-OutputArea img.widget-image").evaluate(
        "async e => [...new Uint8Array(await (await fetch(e.src)).arrayBuffer())]"
    )
    return sentence, hashlib.sha256(bytes(pixels)).hexdigest()


def open_explorer(open_notebook, lab, name):
    path, number = ROOMS[name]
    target = lab.folder / f"{name}.ipynb"
    excerpt(path, number, target)
    student = open_notebook(target)
    student.run_all()
    student.page.wait_for_selector(".jp-OutputArea img.widget-image")
    return student


@pytest.mark.parametrize("name", sorted(set(ROOMS) - {"live_run"}))
def test_every_control_moves_picture_and_sentence_by_keyboard(name, open_notebook, lab):
    student = open_explorer(open_notebook, lab, name)
    page = student.page
    handles = page.locator(
        '.jp-OutputArea .noUi-handle, .jp-OutputArea input[type="checkbox"]'
    )
    assert handles.count() > 0
    handles.first.focus()
    for number in range(handles.count()):
        control = handles.nth(number)
        for _ in range(4):  # a slider's number lies between it and the next one
            if control.evaluate("e => e === document.activeElement"):
                break
            student.press("Tab")
        assert control.evaluate("e => e === document.activeElement"), number
        before = seen(page)
        if control.get_attribute("type") == "checkbox":
            student.press("Space")
        else:
            last = control.get_attribute("aria-valuenow")
            student.press("ArrowRight")
            if control.get_attribute("aria-valuenow") == last:
                student.press("ArrowLeft")
        wait(
            lambda before=before: all(
                a != b for a, b in zip(before, seen(page), strict=True)
            ),
            f"control {number} of {name}: another sentence and picture",
            60,
        )
    assert student.complaints() == []


def test_a_live_run_is_started_stopped_and_resumed_by_keyboard(open_notebook, lab):
    student = open_explorer(open_notebook, lab, "live_run")
    page = student.page

    status = page.locator('.jp-OutputArea [role="status"]')

    def says(pattern):
        wait(lambda: re.search(pattern, status.inner_text()), f"a sentence: {pattern}")
        return status.inner_text()

    def step():
        return int(re.search(r"after step (\d+)", status.inner_text())[1])

    def press(name):
        button = page.locator(f'.jp-OutputArea button:text-is("{name}")')
        for _ in range(5):
            if button.evaluate("e => e === document.activeElement"):
                break
            student.press("Tab")
        assert button.evaluate("e => e === document.activeElement"), name
        student.press("Enter")

    says("Nothing has been trained")
    page.locator(".jp-OutputArea .noUi-handle").focus()
    student.press("ArrowRight")
    says("up to 0.008")
    _, still = seen(page)
    press("start")
    says(r"^Step [1-9].*after step [1-9]")
    assert seen(page)[1] != still
    first = step()
    wait(lambda: step() > first, "a later step")
    press("stop")
    says("^Stopped after step")
    page.wait_for_timeout(2000)  # the last picture is on its way
    sentence, stopped = seen(page)
    page.wait_for_timeout(1000)
    assert seen(page) == (sentence, stopped)
    last = step()
    press("resume")
    wait(lambda: step() > last, "a step after those that were done")
    says("^(Step|All)")
    assert seen(page)[1] != stopped
    assert student.complaints() == []
