"""`python -m kdlib progress` on notebooks in every state."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from kdlib import __main__, progress
from kdlib.errors import DataError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    shutil.copy(ROOT / "exercises" / "ch04.ipynb", tmp_path)
    return tmp_path


def change(path, question, *, output=None, answer=None, counts=(None, None)):
    """Save a notebook after a learner's work on one question."""
    notebook = json.loads(path.read_text())
    parts = {}
    for cell in notebook["cells"]:
        name = cell["metadata"].get("nbgrader", {}).get("grade_id", "")
        for part in ("answer", "check"):
            if name == f"ex-{question.replace('.', '-')}-{part}":
                parts[part] = cell
    if answer:
        parts["answer"]["source"] = answer
    if output:
        stream = {"output_type": "stream", "name": "stdout", "text": [output]}
        parts["check"]["outputs"] = [stream]
    parts["answer"]["execution_count"], parts["check"]["execution_count"] = counts
    path.write_text(json.dumps(notebook))


def states(folder):
    return {one.id: (one.state, one.said) for one in progress.progress(folder)}


def test_a_new_notebook_is_open(folder):
    found = progress.progress(folder)
    assert [one.id for one in found] == [f"4.{n}" for n in range(1, 7)]
    assert {one.state for one in found} == {"open"}
    assert found[0].name == "soft_cross_entropy" and found[0].minutes == 20
    assert "0 of 6 right, 0 tried, 6 open; about 95 minutes" in progress.report(found)
    assert "Next: 4.1 soft_cross_entropy" in progress.report(found)


def test_what_the_checks_said_is_read(folder):
    path, code = folder / "ch04.ipynb", "def student_gradient(a, b):\n    return a"
    right = "4.1 soft_cross_entropy: right (4 of 4 points)\n"
    change(path, "4.1", output=right, answer="def soft_cross_entropy(): return 1")
    wrong = "4.2 x: wrong (1 of 4 points)\n  Likely bug: the sign.\n"
    change(path, "4.2", output=wrong)
    name = progress.progress(folder)[2].name
    change(path, "4.3", answer=code.replace("student_gradient", name))
    change(path, "4.4", output="4.4 x: not attempted\n")
    got = states(folder)
    assert got["4.1"] == ("right", "4 of 4 points")
    assert got["4.2"] == ("tried", "wrong, 1 of 4 points: the sign.")
    assert got["4.3"] == ("tried", "not checked yet: run its check")
    assert got["4.4"] == ("open", "")
    assert "Next: 4.2 " in progress.report(progress.progress(folder))


def test_an_answer_that_ran_after_its_check_is_no_longer_right(folder):
    right = "4.1 soft_cross_entropy: right (4 of 4 points)\n"
    path, answer = folder / "ch04.ipynb", "def soft_cross_entropy(): return 1"
    change(path, "4.1", output=right, answer=answer, counts=(7, 6))
    assert states(folder)["4.1"][0] == "tried"
    change(path, "4.1", counts=(7, 8))
    assert states(folder)["4.1"][0] == "right"


def test_another_question_s_words_do_not_count(folder):
    change(folder / "ch04.ipynb", "4.1", output="4.2 x: right (4 of 4 points)\n")
    assert states(folder)["4.1"][0] == "open"


def test_of_two_copies_the_last_saved_tells(folder):
    new = folder / "copy" / "ch04.ipynb"
    new.parent.mkdir()
    shutil.copy(folder / "ch04.ipynb", new)
    change(new, "4.1", output="4.1 soft_cross_entropy: right (4 of 4 points)\n")
    os.utime(folder / "ch04.ipynb", (1, 1))
    assert states(folder)["4.1"][0] == "right"
    os.utime(new, (0, 0))
    assert states(folder)["4.1"][0] == "open"


def test_solutions_are_not_taken_for_the_learner_s(folder):
    shutil.copytree(ROOT / "exercises" / "solutions", folder / "solutions")
    assert {state for state, _ in states(folder).values()} == {"open"}


def test_every_solution_is_right_and_every_stub_open():
    for path in sorted((ROOT / "exercises").glob("ch*.ipynb")):
        assert {state for state, _ in states(path).values()} == {"open"}, path
        solved = path.parent / "solutions" / path.name
        assert {state for state, _ in states(solved).values()} == {"right"}, path


def test_an_empty_folder_and_a_damaged_notebook_are_told(tmp_path):
    with pytest.raises(DataError, match="no notebook with exercises"):
        progress.progress(tmp_path)
    (tmp_path / "a.ipynb").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        progress.progress(tmp_path)


def test_the_command_prints_the_report(folder, capsys):
    assert __main__.main(["progress", str(folder)]) == 0
    assert "Next: 4.1" in capsys.readouterr().out
    assert __main__.main(["progress", str(folder / "none")]) == 2
