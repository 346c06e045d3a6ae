"""Make the exercises from their text sources.

    python exercises/build.py [NAME ...]     write the notebooks, run the solutions
    python exercises/build.py --check        exit 1 where a file is not its source

From exercises/src/chNN.py (jupytext's py:percent) come three files:

    exercises/chNN.ipynb             for students, not run
    exercises/solutions/chNN.ipynb   with solutions and outputs; nbgrader's source
    kdlib/data/checks/chNN.txt       hints and solutions, for checks.hint and .solution

A cell says what it is by its metadata, `question="1.1" part="answer"`:

    setup, imports   cells that students leave as they are
    task             the exercise in words
    options          an item of a choice; `> right:` and `> wrong:` give the reasons,
                     which students are not shown
    answer           holds ### BEGIN SOLUTION ... ### END SOLUTION. Students get
                     `raise NotImplementedError` in its place, or what stands behind
                     ### STUB there, with its `# ` taken away
    check            worth the question's points in nbgrader
    hint, hint       go into the data file
    note             the reason; into the data file and the solutions
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "notebooks"), str(ROOT)]

import build as chapters  # noqa: E402  (notebooks/build.py)

from kdlib.checks import _answers as answers  # noqa: E402

FOLDER = ROOT / "exercises"
DATA = answers.FOLDER
REGION = re.compile(
    r"^(?P<indent> *)### BEGIN SOLUTION\n(?P<solution>.*?\n)"
    r"(?: *### STUB\n(?P<stub>.*?\n))? *### END SOLUTION$",
    re.M | re.S,
)
ITEM = re.compile(r"^\*\*([a-z])\.\*\* ", re.M)
OPTION = re.compile(r"^- \*\*([A-Z])\*\* ", re.M)
REASON = re.compile(r"\n  > (right|wrong): ((?:.*)(?:\n  > .*)*)")


def student_notebook(source: Path) -> NotebookNode:
    return _notebook(source, solved=False)


def solution_notebook(source: Path) -> NotebookNode:
    return _notebook(source, solved=True)


def hidden(source: Path) -> dict:
    """Question -> what kdlib.checks._answers promises."""
    found: dict[str, dict] = {}
    for cell in _cells(source):
        question, part = cell.metadata.get("question"), cell.metadata.get("part")
        if question is None:
            continue
        empty = {"hints": [], "solution": "", "note": "", "options": {}}
        entry = found.setdefault(question, empty)
        if part == "hint":
            entry["hints"].append(cell.source)
        elif part == "note":
            entry["note"] = cell.source
        elif part == "answer":
            entry["solution"] = _bare(cell.source)
        elif part == "options":
            entry["options"] |= _options(cell.source)
    return found


def _cells(source: Path) -> list[NotebookNode]:
    return jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent").cells


def _notebook(source: Path, *, solved: bool) -> NotebookNode:
    return chapters.assemble(_transformed(source, solved))


def _transformed(source: Path, solved: bool) -> Iterator[NotebookNode]:
    points = _points(source.stem)
    for cell in _cells(source):
        question, part = cell.metadata.get("question"), cell.metadata.get("part")
        text = cell.source
        if part == "hint" or (part == "note" and not solved):
            continue
        if part == "answer":
            text = _kept(text) if solved else _stubbed(text)
        elif part == "options":
            text = _shown(text) if solved else REASON.sub("", text)
        elif solved:  # its badge opens the solutions
            text = text.replace(
                f"/exercises/{source.stem}.", f"/exercises/solutions/{source.stem}."
            )
        cell = nbformat.from_dict({**cell, "source": text, "metadata": {}})
        if part in ("setup", "imports", "task", "answer", "check"):
            name = (
                "-".join(["ex", question.replace(".", "-"), part])
                if question
                else f"{source.stem}-{part}"
            )
            cell.metadata["nbgrader"] = _nbgrader(name, part, points.get(question))
        yield cell
        if part == "check":
            yield nbformat.v4.new_code_cell(
                f'# checks.hint("{question}")\n# checks.solution("{question}")'
            )


def _nbgrader(name: str, part: str, points: float | None) -> dict:
    """Answers are the student's; checks give points; the rest is put back."""
    entry = {
        "schema_version": 3,
        "grade_id": name,
        "solution": part == "answer",
        "grade": part == "check",
        "locked": part != "answer",
        "task": False,
    }
    return entry | ({"points": points} if part == "check" else {})


def _points(name: str) -> dict[str, float]:
    module = importlib.import_module(f"kdlib.checks.{name}")
    return {question.id: question.out_of for question in module.QUESTIONS}


def _stubbed(text: str) -> str:
    def stub(region) -> str:
        if region["stub"] is None:
            return region["indent"] + "raise NotImplementedError"
        return re.sub(r"^( *)# ", r"\1", region["stub"].rstrip("\n"), flags=re.M)

    return REGION.sub(stub, text)


def _kept(text: str) -> str:
    """Without the stub; nbgrader needs the markers."""
    return REGION.sub(
        lambda r: "{0}### BEGIN SOLUTION\n{1}{0}### END SOLUTION".format(
            r["indent"], r["solution"]
        ),
        text,
    )


def _bare(text: str) -> str:
    return REGION.sub(lambda region: region["solution"].rstrip("\n"), text)


def _options(text: str) -> dict:
    item = ITEM.match(text)[1]
    parts = OPTION.split(text)[1:]
    options = {}
    for letter, body in zip(parts[::2], parts[1::2], strict=True):
        said, reason = REASON.search("\n" + body).groups()
        options[letter] = [
            said == "right",
            " ".join(re.sub(r"\n  > ", " ", reason).split()),
        ]
    return {item: options}


def _shown(text: str) -> str:
    """The reasons as paragraphs of their options."""
    return REASON.sub(
        lambda r: f"\n\n  *{r[1]}*: " + r[2].replace("\n  > ", "\n  ") + "\n", text
    )


# --- Files ---


def targets(source: Path) -> list[Path]:
    name = f"{source.stem}.ipynb"
    return [FOLDER / name, FOLDER / "solutions" / name]


def make(source: Path) -> None:
    # First the data: the solutions are run with it.
    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / f"{source.stem}.txt").write_text(answers.encode(hidden(source)))
    for_students, solved = targets(source)
    chapters.write(student_notebook(source), for_students)
    notebook = solution_notebook(source)
    solved.parent.mkdir(exist_ok=True)
    chapters.run(notebook, solved.parent)
    chapters.normalise(notebook)
    chapters.write(notebook, solved)


def problems(source: Path) -> dict[str, str]:
    for_students, solved = targets(source)
    found = {
        for_students: chapters.against(student_notebook(source), for_students),
        solved: chapters.against(solution_notebook(source), solved),
    }
    data = DATA / f"{source.stem}.txt"
    if not data.exists() or answers.decode(data.read_text()) != hidden(source):
        found[data] = "it does not hold the source's hints and solutions"
    return {str(path.relative_to(ROOT)): said for path, said in found.items() if said}


def main(arguments: list[str] | None = None) -> int:
    return chapters.command(arguments, __doc__, FOLDER, targets, make, problems)


if __name__ == "__main__":
    sys.exit(main())
