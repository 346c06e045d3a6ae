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
