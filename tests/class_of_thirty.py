"""A class of thirty for chapter 4: right, partly right, each known bug, each damage.

    python tests/class_of_thirty.py FOLDER

writes what a learning platform would export. What each student must get stands here and
not in the grader: points and bugs are those of tests/wrong_answers/ch04.py, which names
them by hand.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import handed_in
import nbformat
from handed_in import cell_of, place_of, solution
from nbformat import NotebookNode, v4

from kdlib import checks

CH = "ch04"
FULL = {id: checks._questions()[id].out_of for id in handed_in.questions(CH)}
RIGHT = {id: ("right", None, points) for id, points in FULL.items()}
OPEN = {id: ("not attempted", None, 0.0) for id in FULL}

Answer = tuple[str, tuple[str, str | None, float]]  # source, (outcome, bug, points)


@dataclass
class Student:
    """expected: question -> (outcome, bug, points)
    kinds:    the kinds of remark that the report must have, and no others
    """

    id: str
    path: str
    expected: dict[str, tuple]
    kinds: set[str]
    content: NotebookNode | str | bytes
    more: dict[str, NotebookNode] = field(default_factory=dict)


class _Class:
    def __init__(self):
        wrong, _ = handed_in.known(CH)
        self.pools: dict[str, list[Answer]] = {}
        for id in FULL:
            name = checks._questions()[id].name
            mine = [
                (f"{name} = WRONG[{i}][1]", (outcome, bug, float(points)))
                for i, (q, _, outcome, bug, points, _) in enumerate(wrong)
                if q == id and bug != "endless loop"  # it has a student of its own
            ]
            first: dict[str, Answer] = {}
            for entry in mine:
                first.setdefault(entry[1][1], entry)
            rest = [entry for entry in mine if entry not in first.values()]
            self.pools[id] = [*first.values(), *rest]
        self.students: list[Student] = []

    def add(
        self,
        name: str,
        *kinds: str,
        fixed: dict[str, Answer] | None = None,
        damage: Callable[[NotebookNode], None] = lambda notebook: None,
    ) -> Student:
        """A student with known wrong answers to all questions that are not fixed."""
        answers = dict(fixed or {})
        for id, pool in self.pools.items():
            if id not in answers:
                answers[id] = pool.pop(0) if pool else (solution(id), RIGHT[id])
        notebook = handed_in.with_answers(CH, {q: s for q, (s, _) in answers.items()})
        damage(notebook)
        expected = {id: answers[id][1] for id in FULL}
        return self.whole(name, notebook, expected, *kinds)

    def whole(self, name, content, expected, *kinds) -> Student:
        number = 100 + len(self.students)
        folder = f"{name}_{number}_assignsubmission_file_"  # Moodle's
        id = f"{name}_{number}".replace(" ", "_")
        path = f"{folder}/ch04.ipynb"
        self.students.append(Student(id, path, dict(expected), set(kinds), content))
        return self.students[-1]


def right(question: str, before: str = "", source: str | None = None) -> Answer:
    """The solution, with statements put at its function's end of the docstring."""
    text = source or solution(question)
    if before:
        head, mark, rest = text.rpartition('"""\n')
        assert mark
        lines = "".join(f"    {line}\n" for line in before.splitlines())
        text = head + mark + lines + rest
    return text, RIGHT[question]


def broken(question: str, body: str, bug: str = "raised") -> Answer:
    name = checks._questions()[question].name
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return f"def {name}(*arguments):\n{lines}", ("raised", bug, 0.0)


# --- Damages --------------------------------------------------------------------------


def code(notebook: NotebookNode, place: int, source: str) -> None:
    notebook.cells.insert(place, v4.new_code_cell(source))


def lose_all_metadata(notebook):
    for cell in notebook.cells:
        cell.metadata.clear()


def lose_one(notebook):
    cell_of(notebook, "4.2", "answer").metadata.clear()


def rename_cell(notebook):
    cell_of(notebook, "4.3", "answer").metadata.nbgrader.grade_id = "cell-0e1f"


def duplicate(notebook):
    """Jupyter's copy and paste: the copy has the same id, and is the older text."""
    copy = nbformat.from_dict(cell_of(notebook, "4.1", "answer"))
    copy.source = solution("4.1")
    notebook.cells.insert(place_of(notebook, "4.1", "answer"), copy)
    copy = nbformat.from_dict(cell_of(notebook, "4.2", "check"))
    notebook.cells.insert(place_of(notebook, "4.2", "check"), copy)


def move(notebook):
    check = notebook.cells.pop(place_of(notebook, "4.2", "check"))
    notebook.cells.insert(place_of(notebook, "4.2", "answer"), check)


def last_years(notebook):
    cell_of(notebook, "4.2", "task").source += "\n\nUse a temperature of 3."
    gone = v4.new_code_cell("def old_question(x):\n    return x")
    gone.metadata.nbgrader = {"grade_id": "ex-4-9-answer", "solution": True}
    check = v4.new_code_cell('checks.check("4.9", old_question)')
    check.metadata.nbgrader = {"grade_id": "ex-4-9-check", "grade": True, "points": 9}
    notebook.cells += [gone, check]


def tamper(notebook):
    cell_of(notebook, "4.1", "check").source = "5.0"
    patch = (
        "import os\n"
        "import kdlib.checks.frame as frame\n"
        "checks.check = lambda question, answer: 99.0\n"
        "all_right = frame.Verdict('4.1', 'right', 4, 4, '')\n"
        "frame.Code.grade = lambda self, answer: all_right\n"
        "os.environ['NBGRADER_EXECUTION'] = 'autograde'\n"
        "print(5.0)"
    )
    code(notebook, place_of(notebook, "4.1", "check"), patch)


def read_the_solution(notebook):
    reading = (
        "from pathlib import Path\n"
        "import kdlib\n"
        "root = Path(kdlib.__file__).parents[1]\n"
        "try:\n"
        "    text = (root / 'exercises' / 'solutions' / 'ch04.ipynb').read_text()\n"
        "except OSError:\n"
        "    checks.solution('4.1')"
    )
    code(notebook, place_of(notebook, "4.1", "answer"), reading)


def flood_the_wire(notebook):
    flood = (
        "import os\n"
        "for handle in range(3, 64):\n"
        "    try:\n"
        "        os.write(handle, b'points: 99' * 100)\n"
        "    except OSError:\n"
        "        pass"
    )
    code(notebook, place_of(notebook, "4.2", "answer"), flood)


def endless_cell(notebook):
    code(notebook, place_of(notebook, "4.3", "answer"), "while True:\n    pass")


def crash(notebook):
    text = "import ctypes\nctypes.string_at(0)"
    code(notebook, place_of(notebook, "4.3", "answer"), text)


def own_cells(notebook):
    """What an industrious student adds: magics, helpers, plots of numbers, notes."""
    imports = next(
        cell
        for cell in notebook.cells
        if cell.metadata.get("nbgrader", {}).get("grade_id") == "ch04-imports"
    )
    imports.source += "\nimport math"
    code(notebook, 3, "%matplotlib inline\n!pip install nothing\n%time math.sqrt(2)")
    place = place_of(notebook, "4.1", "answer")
    code(notebook, place, "def ours(x, size):\n    return x[:, :size]")
    notebook.cells.insert(place, v4.new_markdown_cell("I cut first. $V_s$ is shorter."))
    answer = cell_of(notebook, "4.1", "answer")
    answer.source = (
        "def soft_cross_entropy(s, t):\n"
        "    size = min(s.shape[-1], t.shape[-1])\n"
        "    p, log_q = ours(t, size).softmax(-1), ours(s, size).log_softmax(-1)\n"
        "    return -(p * log_q.where(p > 0, math.log(1))).sum(-1)\n"
    )


# --- The class ------------------------------------------------------------------------


def students() -> list[Student]:
    all_right = {id: right(id) for id in FULL}
    made = _Class()
    made.add("Right", fixed=all_right)
    made.whole("Untouched", handed_in.released(CH), OPEN)
    own = {"4.1": right("4.1")}
    made.add("Own Cells", "edited imports", fixed=own, damage=own_cells)
    half = {id: right(id) for id in ("4.1", "4.3", "4.5")}
    made.add("Half", fixed=half)
    shout = "import sys, warnings\nwarnings.warn('odd')\nprint('odd', file=sys.stderr)"
    made.add("Stderr", "stderr", fixed={"4.1": right("4.1", shout)})
    made.add("Lost All", "lost metadata", damage=lose_all_metadata)
    made.add("Lost One", "lost metadata", damage=lose_one)
    made.add("Renamed Cell", "renamed", damage=rename_cell)
    mine = solution("4.4").replace("def label_noise_share", "def noise")
    fixed = {"4.4": right("4.4", source=mine)}
    made.add("Renamed Function", "renamed", fixed=fixed)
    made.add("Duplicated", "duplicated", damage=duplicate)
    made.add("Moved", "moved", damage=move)
    endless = broken("4.1", "while True:\n    pass", "endless loop")
    made.add("Endless", "endless loop", fixed={"4.1": endless})
    made.add("Endless Cell", "endless loop", damage=endless_cell)
    stubborn = "while True:\n    try:\n        while True:\n            pass\n"
    stubborn = broken("4.2", stubborn + "    except BaseException:\n        pass")
    made.add("Stubborn", "dead kernel", fixed={"4.2": stubborn})
    flood = "for _ in range(200):\n    print('x' * 10_000)"
    made.add("Flood", "huge output", fixed={"4.3": right("4.3", flood)})
    dead = broken("4.1", "import os\nos._exit(3)")
    made.add("Dead Kernel", "dead kernel", fixed={"4.1": dead})
    made.add("Crash", "dead kernel", damage=crash)
    hungry = broken("4.1", "import torch\nreturn torch.zeros(10**11)")
    made.add("Hungry", "out of memory", fixed={"4.1": hungry})
    made.add("Last Year", "another version", damage=last_years)
    made.add("Tamper", "tampering", "reads the solution", damage=tamper)
    made.add("Reader", "reads the solution", damage=read_the_solution)
    made.add("Wire", "dead kernel", damage=flood_the_wire)
    syntax = "def best_smoothing(logits)\n    return 1", ("raised", "raised", 0.0)
    made.add("Syntax", "cell raised", fixed={"4.3": syntax})
    text = nbformat.writes(handed_in.released(CH))
    made.whole("Cut Off", text[: len(text) // 2], OPEN, "unreadable")
    made.whole("Other", handed_in.released("ch05"), OPEN, "wrong chapter")
    pdf = made.whole("Paper", b"%PDF-1.7", OPEN, "no notebook")
    pdf.path = pdf.path.replace("ch04.ipynb", "answers.pdf")
    twice = made.add("Twice", "several notebooks")
    older = handed_in.with_answers(CH, {id: s for id, (s, _) in all_right.items()})
    twice.more = {twice.path: older}
    twice.path = twice.path.replace("ch04.ipynb", "ch04 (1).ipynb")
    canvas = made.add("Canvas")
    canvas.id, canvas.path = "roebob_128", "roebob_128_9876_ch04.ipynb"
    late = made.add("Late", "late")
    late.id, late.path = "doejane_129", "doejane_LATE_129_9877_ch04-1.ipynb"
    packed = made.add("Packed")
    packed.path = packed.path.replace("ch04.ipynb", "handed in.zip")
    return made.students


def write(folder: Path, found: list[Student]) -> None:
    for student in found:
        for path, content in {**student.more, student.path: student.content}.items():
            path = folder / path
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, NotebookNode):
                content = v4.writes(content)  # a duplicated id is what it shall have
            if path.suffix == ".zip":
                with zipfile.ZipFile(path, "w") as file:
                    file.writestr("work/ch04.ipynb", content)
            elif isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text(content)


if __name__ == "__main__":
    write(Path(sys.argv[1]), students())
