"""The notebook that nbgrader records and makes a page of feedback from.

It is the released one with a student's answers in their places, the student's other
cells before the answers that they prepare, and verdicts as the outputs of the checks.
What a student wrote in markdown is shown as plain text: a page that the instructor
opens runs nobody's scripts.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import nbformat
from nbformat import NotebookNode, v4

from instructor.cells import PART, Remark, code, grade_id
from kdlib.checks.frame import Verdict

LONGEST = 50_000  # characters of one cell that are kept
_STEP = "kdlib_step"


def name(place: int) -> str:
    """What the cell at a place, counted from 0, is called in messages."""
    return f"cell {place + 1}"


def pruned(released: NotebookNode) -> NotebookNode:
    """Without what a page of feedback does not need: introduction, setup, hints."""
    notebook = nbformat.from_dict(released)
    kept, begun = [], False
    for cell in notebook.cells:
        begun = begun or grade_id(cell).endswith("-task")
        if begun and (cell.cell_type != "code" or code(cell.source)):
            kept.append(cell)
    notebook.cells = kept
    return notebook


def fill(
    notebook: NotebookNode,
    handed: list[NotebookNode],
    counted: dict[str, int],
    own: list[int],
) -> None:
    """Lay a student's cells into a pruned notebook.

    counted: question -> the place in `handed` of the answer that counts
    own:     places of other cells, which go above the next answer
    """
    cells: list[NotebookNode] = []
    for cell in notebook.cells:
        match = PART.fullmatch(grade_id(cell))
        question = f"{match[1]}.{match[2]}" if match else ""
        if question in counted and match[3] == "answer":
            place = counted[question]
            cells += _added(handed, [p for p in own if p < place])
            own = [p for p in own if p > place]
            cell.source = _cut(handed[place].source)
            cell.metadata[_STEP] = name(place)
        cells.append(cell)
    notebook.cells = cells + list(_added(handed, own))


def _added(handed: list[NotebookNode], places: list[int]) -> Iterator[NotebookNode]:
    for place in places:
        text = _cut(handed[place].source)
        if handed[place].cell_type == "code":
            new = v4.new_code_cell(text)
            new.metadata[_STEP] = name(place)
            yield new
        else:
            yield v4.new_markdown_cell(textwrap.indent(text, "    ", lambda _: True))


def _cut(text: str) -> str:
    left = len(text) - LONGEST
    return text if left <= 0 else f"{text[:LONGEST]}\n# ... {left} characters more"


def judge(
    notebook: NotebookNode,
    verdicts: dict[str, Verdict],
    remarks: list[Remark],
    printed: dict[str, str],
) -> None:
    """Write the outputs. nbgrader reads a check's points from the last of its own.

    printed: cell's name -> what it put out
    """
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs, cell.execution_count = [], None
        match = PART.fullmatch(grade_id(cell))
        if match and match[3] == "check":
            verdict = verdicts[f"{match[1]}.{match[2]}"]
            points = {"text/plain": repr(verdict.points)}
            cell.outputs = [
                v4.new_output("stream", name="stdout", text=verdict.message + "\n"),
                v4.new_output("execute_result", data=points),
            ]
        text = printed.get(cell.metadata.pop(_STEP, ""), "")
        if text:
            cell.outputs = [v4.new_output("stream", name="stdout", text=text + "\n")]
    notebook.cells.insert(0, v4.new_markdown_cell(_summary(verdicts, remarks)))
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"


def _summary(verdicts: dict[str, Verdict], remarks: list[Remark]) -> str:
    heads = " &emsp; | ".join(["question", "outcome", "points", "likely bug"])
    lines = [f"| {heads} |", "|---|---|---|---|"]
    lines += [
        f"| {v.question} | {v.outcome} | {v.points:g} of {v.out_of:g} | {v.bug or ''} |"
        for v in verdicts.values()
    ]
    if remarks:
        lines += ["", "What the grader noticed:", ""]
        lines += [f"- {_escaped(remark.said)}" for remark in remarks]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """As it is: a student's file name or line of code is no markup."""
    marks = {mark: f"&#{ord(mark)};" for mark in "&<>[]$`*_\\!"}
    return "".join(marks.get(letter, letter) for letter in text)
