"""The exercises: notebooks, stubs, solutions, and every wrong answer we know.

Whether the solutions' outputs come out again is nbval's to test:
pytest --nbval exercises/solutions.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import test_notebooks as rules

from kdlib import checks
from kdlib.checks import _answers as answers
from kdlib.checks import frame

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted(path.stem for path in (ROOT / "exercises" / "src").glob("*.py"))
STUDENT = {name: ROOT / "exercises" / f"{name}.ipynb" for name in CHAPTERS}
SOLVED = {name: ROOT / "exercises" / "solutions" / f"{name}.ipynb" for name in CHAPTERS}
NOTEBOOKS = [*STUDENT.values(), *SOLVED.values()]
QUESTIONS = checks._questions()

spec = importlib.util.spec_from_file_location("make", ROOT / "exercises" / "build.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

ANSWERS = [importlib.import_module(f"wrong_answers.{name}") for name in CHAPTERS]
WRONG = [entry for module in ANSWERS for entry in module.WRONG]
HONEST = [entry for module in ANSWERS for entry in module.HONEST]


def read(path):
    return nbformat.read(path, as_version=4)


def grade_id(cell):
    return cell.metadata.get("nbgrader", {}).get("grade_id", "")


def cells_of(notebook, part):
    """Question -> its cell of that part, by nbgrader's ids."""
    found = {}
    for cell in notebook.cells:
        match = re.fullmatch(rf"ex-(\d+)-(\d+)-{part}", grade_id(cell))
        if match:
            found[".".join(match.groups())] = cell
    return found


def test_there_are_exercises():
    assert "ch01" in CHAPTERS and CHAPTERS == answers.chapters()
    assert {name.partition(".")[0] for name in QUESTIONS} == {
        str(int(name.removeprefix("ch"))) for name in CHAPTERS
    }


# --- Notebooks and their source ---


def test_the_notebooks_are_what_their_sources_give():
    command = [sys.executable, "exercises/build.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


COMMON = [
    rules.plain_python,
    rules.no_widget_state,
    rules.clean_outputs,
    rules.small_cells,
    rules.short_paragraphs,
]


@pytest.mark.parametrize("rule", COMMON, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_notebook_keeps(rule, path):
    assert not list(rule(read(path), path.name))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_the_badge_opens_this_very_notebook(path):
    """A student's badge must not open the solutions."""
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["kdlib"]
    found = re.findall(
        r"colab\.research\.google\.com/github/(\S+?)\)", path.read_text()
    )
    here = path.relative_to(ROOT).as_posix()
    assert found == [f"{repository['repository']}/blob/main/{here}"]


def test_the_first_code_cell_is_that_of_the_chapters():
    chapters = {path.name: read(path) for path in rules.NOTEBOOKS}
    exercises = {str(path): read(path) for path in NOTEBOOKS}
    assert len(rules.by_first_code(chapters | exercises)) == 1


@pytest.mark.parametrize("name", CHAPTERS)
def test_solutions_were_run_and_students_get_no_outputs(name):
    for number, cell in enumerate(
        (x for x in read(SOLVED[name]).cells if x.cell_type == "code"), start=1
    ):
        assert cell.execution_count == number
    for cell in read(STUDENT[name]).cells:
        assert cell.cell_type == "markdown" or (
            cell.outputs == [] and cell.execution_count is None
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_nbgrader_finds_what_it_needs(path):
    notebook = read(path)
    ids = [grade_id(cell) for cell in notebook.cells if grade_id(cell)]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[\w-]+", x) for x in ids)
    for cell in notebook.cells:
        entry = cell.metadata.get("nbgrader")
        if entry:
            assert entry["schema_version"] == 3 and entry["task"] is False
            assert entry["solution"] != entry["locked"]
            assert ("points" in entry) == entry["grade"]
    order = [x for x in ids if x.endswith(("answer", "check"))]
    assert order[::2] == [x.replace("check", "answer") for x in order[1::2]]


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_question_states_its_cost_and_has_its_cells(name):
    """Id, kind, difficulty, importance, minutes and points, in one line."""
    student, data = read(STUDENT[name]), make.hidden(make.FOLDER / "src" / f"{name}.py")
    tasks, tests = cells_of(student, "task"), cells_of(student, "check")
    number = str(int(name.removeprefix("ch")))
    ids = [x for x in QUESTIONS if x.partition(".")[0] == number]
    assert list(tasks) == list(tests) == list(data) == ids
    minutes = 0
    for question in ids:
        assert tasks[question].source.startswith(
            f"## {question} {QUESTIONS[question].name}\n"
        )
        stated = re.search(
            rf"^\*\*{re.escape(question)}\*\* · (?:code|derive|predict|explain) · "
            r"difficulty [1-5]/5 · importance [1-5]/5 · (\d+) minutes · (\d+) points$",
            tasks[question].source,
            re.M,
        )
        assert stated, question
        minutes += int(stated[1])
        assert float(stated[2]) == QUESTIONS[question].out_of
        assert tests[question].metadata.nbgrader.points == QUESTIONS[question].out_of
        assert len(data[question]["hints"]) == 2 and data[question]["note"]
    assert f"| your time | {minutes} minutes |" in student.cells[0].source


@pytest.mark.parametrize("name", CHAPTERS)
def test_students_see_no_solution(name):
    source = make.FOLDER / "src" / f"{name}.py"
    student = STUDENT[name].read_text()
    for mark in ("SOLUTION", "STUB", "> right", "> wrong", "part"):
        assert f"{mark}" not in student or mark == "part"
    for entry in make.hidden(source).values():
        told = [entry["note"], *entry["hints"]]
        told += [
            reason for item in entry["options"].values() for _, reason in item.values()
        ]
        for text in told:
            assert json.dumps(text)[1:40] not in student
    body = read(STUDENT[name])
    for question, cell in cells_of(body, "answer").items():
        wanted = ast.parse(make.hidden(source)[question]["solution"]).body[-1]
        if isinstance(wanted, ast.FunctionDef):
            assert cell.source.endswith("\n    raise NotImplementedError")
        else:
            assert "..." in cell.source


@pytest.mark.parametrize("name", CHAPTERS)
def test_stub_and_solution_have_the_same_signature(name):
    stubs, solved = (
        cells_of(read(paths[name]), "answer") for paths in (STUDENT, SOLVED)
    )
    for question, cell in stubs.items():
        (stub,), (solution,) = (
            ast.parse(cell.source).body,
            ast.parse(solved[question].source).body,
        )
        if isinstance(stub, ast.FunctionDef):
            assert stub.name == solution.name == QUESTIONS[question].name
            assert ast.dump(stub.args) == ast.dump(solution.args)
            assert ast.unparse(stub.returns or ast.Constant(None)) == ast.unparse(
                solution.returns or ast.Constant(None)
            )
            assert ast.get_docstring(stub) == ast.get_docstring(solution)
            names = tuple(argument.arg for argument in stub.args.args)
            assert names == QUESTIONS[question].parameters
        else:
            assert ast.unparse(stub.targets[0]) == QUESTIONS[question].name
            keys = [[ast.unparse(k) for k in x.value.keys] for x in (stub, solution)]
            assert keys[0] == keys[1]


# --- Stubs, solutions, wrong answers ---


def run_all(path, monkeypatch):
    """The outputs of a notebook run from top to bottom, and its variables."""
    monkeypatch.chdir(path.parent)
    space, out = {"__name__": "__main__"}, io.StringIO()
    with contextlib.redirect_stdout(out):
        for cell in read(path).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, "<cell>", "exec"), space)
    return out.getvalue(), space


def outcomes(text):
    return re.findall(
        r"^(\d+\.\d+) \w+: (not attempted|raised|wrong|right)", text, re.M
    )


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_stub_is_not_attempted(name, monkeypatch, capsys):
    said, space = run_all(STUDENT[name], monkeypatch)
    ids = list(cells_of(read(STUDENT[name]), "answer"))
    assert outcomes(said) == [(question, "not attempted") for question in ids]
    for question in ids:
        verdict = checks.grade(question, space[QUESTIONS[question].name])
        assert (verdict.points, verdict.bug) == (0, None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_solution_is_right(name, monkeypatch, capsys):
    said, space = run_all(SOLVED[name], monkeypatch)
    ids = list(cells_of(read(SOLVED[name]), "answer"))
    assert outcomes(said) == [(question, "right") for question in ids]
    for question in ids:
        verdict = checks.grade(question, space[QUESTIONS[question].name])
        assert verdict.points == verdict.out_of
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_printed_solution_is_right(name):
    """checks.solution gives code that can be pasted into the answer's cell."""
    for question, cell in cells_of(read(STUDENT[name]), "answer").items():
        space = run_setup(name)
        exec(answers.of(question)["solution"], space)
        answer = space[QUESTIONS[question].name]
        assert checks.grade(question, answer).outcome == "right"
        assert "NotImplementedError" not in answers.of(question)["solution"], cell


def run_setup(name):
    space = {}
    for cell in read(STUDENT[name]).cells:
        if grade_id(cell).endswith(("-setup", "-imports")):
            exec(cell.source, space)
    return space


def label(answer):
    return getattr(answer, "__name__", None)


@pytest.mark.parametrize(
    ("question", "answer", "outcome", "bug", "points", "provenance"),
    WRONG,
    ids=[f"{q} {label(answer) or bug}" for q, answer, _, bug, *_ in WRONG],
)
def test_a_wrong_answer_is_rejected_by_its_name(
    question, answer, outcome, bug, points, provenance
):
    verdict = checks.grade(question, answer)
    got = (verdict.outcome, verdict.bug, verdict.points)
    assert got == (outcome, bug, points), f"{provenance}\n{verdict.message}"


@pytest.mark.parametrize(
    ("question", "answer"),
    HONEST,
    ids=[f"{question} {label(answer) or 'values'}" for question, answer in HONEST],
)
def test_an_honest_variant_is_right(question, answer):
    verdict = checks.grade(question, answer)
    assert verdict.outcome == "right", verdict.message


def moved(value, change):
    """A value with every number changed, as plain floats."""
    if hasattr(value, "tolist"):
        value = value.detach() if hasattr(value, "detach") else value
        return moved(value.tolist(), change)
    if isinstance(value, (list, tuple)):
        return [moved(item, change) for item in value]
    return change(float(value))


CODE = [name for name, kind in QUESTIONS.items() if isinstance(kind, frame.Code)]


@pytest.mark.parametrize(
    "change",
    [lambda x: x * (1 + 1e-4), lambda x: x + 1e-4 * max(1.0, abs(x))],
    ids=["by a factor", "by a constant"],
)
@pytest.mark.parametrize("question", CODE)
def test_a_right_answer_s_neighbour_is_wrong(question, change):
    """No tolerance lets a small mistake pass."""
    right = QUESTIONS[question].truth
    verdict = checks.grade(question, lambda *args: moved(right(*args), change))
    assert verdict.outcome == "wrong" and verdict.points < verdict.out_of
    same = checks.grade(question, lambda *args: moved(right(*args), float))
    assert same.outcome == "right", same.message


def test_every_question_has_its_wrong_and_honest_answers():
    for question, kind in QUESTIONS.items():
        wrong = [entry for entry in WRONG if entry[0] == question]
        assert len(wrong) >= 6, question
        assert [entry for entry in HONEST if entry[0] == question], question
        named = {entry[3] for entry in wrong}
        if isinstance(kind, frame.Code):
            assert {bug.name for bug in kind.bugs} <= named, question
        if isinstance(kind, frame.Predict):
            known = {bug.name for bugs in kind.beliefs.values() for bug in bugs}
            assert known <= named, question
        if isinstance(kind, frame.Choice):
            options = answers.of(question)["options"]
            assert set(options) == set(kind.items)
            for item, reasons in options.items():
                assert sum(right for right, _ in reasons.values()) == 1
                assert all(why for _, why in reasons.values())
                wrong_letters = {x for x, (right, _) in reasons.items() if not right}
                assert {f"{item} {letter}" for letter in wrong_letters} <= named


# --- The build ---

SOURCE = """\
# %% [markdown]
# # Title: /exercises/a.ipynb

# %% question="1.1" part="answer"
def kv_cache_bytes(x):
    if x:
        ### BEGIN SOLUTION
        y = x
        ### END SOLUTION
    return y

# %% question="1.1" part="check"
print(1)

# %% [markdown] question="1.1" part="options"
# **a.** Which?
#
# - **A** This one
#   in two lines.
#   > right: Because
#   > of this.
# - **B** That one.
#   > wrong: No.

# %% question="1.4" part="answer"
x = {
    ### BEGIN SOLUTION
    "a": 1,
    ### STUB
    # "a": ...,
    ### END SOLUTION
}

# %% [markdown] question="1.1" part="hint"
# One.

# %% [markdown] question="1.1" part="note"
# Reason.
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    path = tmp_path / "src" / "ch01.py"
    path.parent.mkdir()
    path.write_text(SOURCE.replace("a.ipynb", "ch01.ipynb"))
    monkeypatch.setattr(make, "ROOT", tmp_path)
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    monkeypatch.setattr(make, "DATA", tmp_path / "data")
    return path


def test_a_stub_stands_where_the_solution_was(source):
    cells = [cell.source for cell in make.student_notebook(source).cells]
    assert cells == [
        "# Title: /exercises/ch01.ipynb",
        "def kv_cache_bytes(x):\n    if x:\n        raise NotImplementedError\n"
        "    return y",
        "print(1)",
        '# checks.hint("1.1")\n# checks.solution("1.1")',
        "**a.** Which?\n\n- **A** This one\n  in two lines.\n- **B** That one.",
        'x = {\n    "a": ...,\n}',
    ]


def test_solutions_keep_nbgrader_s_marks_and_tell_the_reasons(source):
    cells = [cell.source for cell in make.solution_notebook(source).cells]
    assert cells[0] == "# Title: /exercises/solutions/ch01.ipynb"
    assert "        ### BEGIN SOLUTION\n        y = x\n" in cells[1]
    assert "*right*: Because\n  of this." in cells[4] and "*wrong*: No." in cells[4]
    assert cells[5] == (
        'x = {\n    ### BEGIN SOLUTION\n    "a": 1,\n    ### END SOLUTION\n}'
    )
    assert cells[6] == "Reason."


def test_the_data_file_holds_the_rest(source):
    assert make.hidden(source) == {
        "1.1": {
            "hints": ["One."],
            "solution": "def kv_cache_bytes(x):\n"
            "    if x:\n        y = x\n    return y",
            "note": "Reason.",
            "options": {
                "a": {"A": [True, "Because of this."], "B": [False, "No."]},
            },
        },
        "1.4": {
            "hints": [],
            "solution": 'x = {\n    "a": 1,\n}',
            "note": "",
            "options": {},
        },
    }


def test_check_notices_each_file_that_is_not_the_source(source, capsys):
    make.make(source)
    assert make.main(["--check"]) == 0
    files = [*make.targets(source), make.DATA / "ch01.txt"]
    for path in files:
        good = path.read_text()
        path.write_text(
            answers.encode({})
            if path.suffix == ".txt"
            else good.replace("print(1)", "print(2)")
        )
        assert make.main(["--check"]) == 1
        assert path.name in capsys.readouterr().err
        path.write_text(good)
    (source.parents[1] / "solutions" / "stray.ipynb").write_text("{}")
    assert make.main(["--check"]) == 1
    assert "stray.ipynb: it has no source" in capsys.readouterr().err
