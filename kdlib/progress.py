"""How far a learner is, read from notebooks as they were saved.

Knows: what the exercises' checks printed, and which answers are still stubs.
Does not know: whether an answer is right. Nothing is run, nothing leaves the machine.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from kdlib.errors import DataError

RIGHT, TRIED, OPEN = "right", "tried", "open"
LEFT_OUT = ("solutions", ".ipynb_checkpoints", ".venv")

CHECK = re.compile(r'^checks\.check\("(\d+\.\d+)", (\w+)\)', re.M)
TASK = re.compile(r"^\*\*(\d+\.\d+)\*\* · .* · (\d+) minutes · \d+ points$", re.M)
_SAID = re.compile(
    r"^(\d+\.\d+) \w+: (not attempted|raised|wrong|right)"
    r"(?: \(([\d.]+) of ([\d.]+) points\))?",
    re.M,
)
_STUB = re.compile(r"^\s*raise NotImplementedError$|: \.\.\.,?$", re.M)


@dataclass(frozen=True)
class Question:
    """One exercise as the notebook in `path` has it.

    state:   "right", "tried" or "open"
    said:    more about it, for the learner; may be empty
    minutes: as the exercise states them
    """

    id: str
    name: str
    state: str
    said: str
    minutes: int
    path: Path


def progress(folder: str | Path) -> list[Question]:
    """Every question of the notebooks in a folder, or of one notebook, in order.

    Raises DataError where there is no notebook with exercises.
    """
    folder = Path(folder)
    if folder.is_file():
        paths = [folder]
    else:
        found = folder.rglob("*.ipynb")
        paths = [p for p in found if not set(LEFT_OUT) & set(p.parts)]
    questions: dict[str, Question] = {}
    # Of two copies of a notebook the one that was saved last tells.
    for path in sorted(paths, key=lambda path: (path.stat().st_mtime, str(path))):
        questions |= {question.id: question for question in _read(path)}
    if not questions:
        raise DataError(
            f"{folder} has no notebook with exercises",
            "name the folder that holds ch01.ipynb and the others",
        )
    return sorted(questions.values(), key=_number)


def report(questions: list[Question]) -> str:
    """A line a question, a sum, and the next step."""
    lines, chapter = [], None
    for question in questions:
        if question.id.partition(".")[0] != chapter:
            chapter = question.id.partition(".")[0]
            lines += ["", f"Chapter {chapter}: {question.path}"]
        said = question.said or f"{question.minutes} minutes"
        lines.append(f"  {question.id:5} {question.name:28} {question.state:6} {said}")
    states = [question.state for question in questions]
    left = [question for question in questions if question.state != RIGHT]
    minutes = sum(question.minutes for question in left)
    lines += [
        "",
        f"{states.count(RIGHT)} of {len(states)} right, {states.count(TRIED)} tried, "
        f"{states.count(OPEN)} open; about {minutes} minutes are left.",
    ]
    if left:
        # What was begun comes first.
        first = min(
            left, key=lambda question: (question.state != TRIED, _number(question))
        )
        lines.append(f"Next: {first.id} {first.name}, in {first.path}")
    return "\n".join(lines[1:])


def _number(question: Question) -> tuple[int, ...]:
    return tuple(int(part) for part in question.id.split("."))


def _read(path: Path) -> list[Question]:
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read as a notebook ({type(error).__name__})",
            "save it again from Jupyter, or move it out of the folder",
        ) from None
    minutes = {key: int(value) for key, value in TASK.findall("\n\n".join(sources))}
    found, start = [], 0
    for place, source in enumerate(sources):
        check = CHECK.search(source)
        if check and cells[place]["cell_type"] == "code":
            id, name = check.groups()
            mine = range(start, place)
            answer = [i for i in mine if re.search(rf"\b{name}\b\s*[(=]", sources[i])]
            answer = [i for i in answer if cells[i]["cell_type"] == "code"]
            stub = not answer or bool(_STUB.search(sources[answer[-1]]))
            cell = cells[answer[-1]] if answer else {}
            state, said = _state(id, cells[place], cell, stub)
            found.append(Question(id, name, state, said, minutes.get(id, 0), path))
            start = place + 1
    return found


def _state(id: str, check: dict, answer: dict, stub: bool) -> tuple[str, str]:
    outputs = check.get("outputs", [])
    text = "".join("".join(out.get("text", "")) for out in outputs)
    said = [match for match in _SAID.finditer(text) if match[1] == id]
    if not said or said[-1][2] == "not attempted":
        return (OPEN, "") if stub else (TRIED, "not checked yet: run its check")
    ran, checked = answer.get("execution_count"), check.get("execution_count")
    if ran and checked and ran > checked:
        return TRIED, "changed since its check: run it again"
    outcome = said[-1][2]
    points = f"{said[-1][3]} of {said[-1][4]} points"
    if outcome == RIGHT:
        return RIGHT, points
    bug = re.search(r"Likely bug: (.*)", text)
    return TRIED, f"{outcome}, {points}" + (f": {bug[1]}" if bug else "")
