"""The course as a student meets it in JupyterLab: the quickstart, and an exercise."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab import wait

pytestmark = pytest.mark.slow

# Seen in microsoft/ProDA#43: probabilities where their logarithms should be.
WRONG = """\
def soft_cross_entropy(student_logits, teacher_logits):
    v = min(student_logits.shape[-1], teacher_logits.shape[-1])
    p = teacher_logits[:, :v].softmax(-1)
    return -(p * student_logits[:, :v].softmax(-1)).sum(-1)
"""
RIGHT = """\
def soft_cross_entropy(student_logits, teacher_logits):
    v = min(student_logits.shape[-1], teacher_logits.shape[-1])
    p = teacher_logits[:, :v].softmax(-1)
    log_q = student_logits[:, :v].log_softmax(-1)
    return -(p * log_q.where(p > 0, 0.0)).sum(-1)
"""


def test_the_quickstart_runs_whole(open_notebook):
    student = open_notebook(Path("notebooks/00_quickstart.ipynb"))
    cells = student.page.locator(".jp-CodeCell")
    student.run_all()
    assert cells.count() > 10
    assert student.page.locator(".jp-RenderedImage img").count() > 0
    assert student.page.locator("mjx-container").count() > 0
    assert student.page.locator("mjx-merror").count() == 0
    assert student.complaints() == []


def test_an_exercise_from_a_wrong_answer_to_the_right_one(open_notebook):
    student = open_notebook(Path("exercises/ch04.ipynb"))
    page = student.page
    cells = page.locator(".jp-CodeCell")
    setup, imports, answer, check, help_ = (cells.nth(i) for i in range(5))

    def run(cell, text=None):
        cell.locator(".cm-content").click()
        if text is not None:
            student.press("Control+a")
            page.keyboard.insert_text(text)
        before = cell.locator(".jp-InputPrompt").inner_text()
        student.press("Shift+Enter")
        prompt = cell.locator(".jp-InputPrompt")
        wait(
            lambda: (
                prompt.inner_text() != before
                and prompt.inner_text().strip("[]: \n").isdigit()
            ),
            "a cell that was run",
        )
        return " ".join(cell.locator(".jp-OutputArea").inner_text().split())

    run(setup)
    run(imports)
    run(answer)
    assert "not attempted" in run(check)
    run(answer, WRONG)
    said = run(check)
    assert "wrong" in said, said
    assert "probabilities stand where their logarithms should" in said, said
    assert "Cut both sides" in run(help_, 'checks.hint("4.1")')
    run(answer, RIGHT)
    assert "right" in run(check)
    assert student.complaints() == []
