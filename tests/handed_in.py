"""Notebooks as students hand them in, made from the known right and wrong answers."""

from __future__ import annotations

import importlib
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from kdlib import checks
from kdlib.checks import _answers

TESTS = Path(__file__).parent
COLLECT = "from wrong_answers.collect import collectors\n"


def released(chapter: str) -> NotebookNode:
    path = TESTS.parent / "exercises" / f"{chapter}.ipynb"
    return nbformat.read(path, as_version=4)


def questions(chapter: str) -> list[str]:
    number = str(int(chapter.removeprefix("ch")))
    return [id for id in checks._questions() if id.partition(".")[0] == number]


def cell_of(notebook: NotebookNode, question: str, part: str) -> NotebookNode:
    wanted = f"ex-{question.replace('.', '-')}-{part}"
    found = [
        cell
        for cell in notebook.cells
        if cell.metadata.get("nbgrader", {}).get("grade_id") == wanted
    ]
    (cell,) = found
    return cell


def place_of(notebook: NotebookNode, question: str, part: str) -> int:
    return notebook.cells.index(cell_of(notebook, question, part))


def bank(chapter: str) -> NotebookNode:
    """A cell that defines WRONG and HONEST, all answers of tests/wrong_answers."""
    text = (TESTS / "wrong_answers" / f"{chapter}.py").read_text()
    collect = (TESTS / "wrong_answers" / "collect.py").read_text()
    collect = collect.partition("from __future__ import annotations\n")[2]
    assert COLLECT in text
    return nbformat.v4.new_code_cell(text.replace(COLLECT, collect))


def known(chapter: str) -> tuple[list, list]:
    module = importlib.import_module(f"wrong_answers.{chapter}")
    return module.WRONG, module.HONEST


def with_answers(chapter: str, answers: dict[str, str]) -> NotebookNode:
    """The released notebook with an answer's source by question; stubs elsewhere."""
    notebook = released(chapter)
    for question, source in answers.items():
        cell_of(notebook, question, "answer").source = source
    if any(" = WRONG[" in s or " = HONEST[" in s for s in answers.values()):
        first = place_of(notebook, questions(chapter)[0], "task")
        notebook.cells.insert(first, bank(chapter))
    return notebook


def solution(question: str) -> str:
    return _answers.of(question)["solution"]


def slices(chapter: str) -> list[dict[str, tuple[str, tuple]]]:
    """The whole matrix in few notebooks: question -> (source, (outcome, bug, points)).

    The i-th holds the i-th wrong answer of every question, and where those are used up
    an honest variant. There are as many as the question with most wrong answers has.
    """
    wrong, honest = known(chapter)
    columns, longest = {}, 0
    for question in questions(chapter):
        name = checks._questions()[question].name
        full = checks._questions()[question].out_of
        columns[question] = [
            (f"{name} = WRONG[{i}][1]", (outcome, bug, points))
            for i, (q, _, outcome, bug, points, _) in enumerate(wrong)
            if q == question
        ]
        longest = max(longest, len(columns[question]))
        columns[question] += [
            (f"{name} = HONEST[{i}][1]", ("right", None, full))
            for i, (q, _) in enumerate(honest)
            if q == question
        ]
    return [
        {q: column[i] for q, column in columns.items() if i < len(column)}
        for i in range(longest)
    ]
