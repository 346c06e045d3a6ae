"""Grading a class: what comes in, what the room lets out, what the books say."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import class_of_thirty
import handed_in
import nbformat
import numpy as np
import psutil
import pytest
import torch

from instructor import (
    books,
    cells,
    confine,
    grading,
    intake,
    laying,
    marking,
    report,
    tampering,
    wire,
)
from instructor.__main__ import main as instructor_main
from instructor.room import Dead, Rooms
from kdlib.checks import _answers, values
from kdlib.errors import ArgumentError, DataError, StorageError

ROOT = Path(__file__).parents[1]
CHAPTERS = _answers.chapters()

CH = "ch04"
FIRST = "4.1"


def text(notebook):
    return nbformat.writes(notebook)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else text(content))
    return path


@pytest.fixture
def blank():
    return handed_in.released(CH)


# --- Wire -----------------------------------------------------------------------------

CROSSING = [
    None,
    True,
    "é",
    3,
    -(2**80),
    0.1,
    -0.0,
    math.inf,
    ...,
    [1, [2.5, None]],
    (1, "a"),
    {"a": 1, 2: [3]},
    Fraction(1, 3),
    Decimal("0.10"),
    np.float32(0.1),
    np.arange(6.0).reshape(2, 3).T,
    np.array([], dtype=np.int64),
    torch.arange(6).reshape(2, 3),
    torch.tensor([0.1, -math.inf], dtype=torch.float64, requires_grad=True),
    torch.tensor([[True, False]]),
    torch.tensor(0.1, dtype=torch.bfloat16),
    torch.tensor([1.0, 2.0], dtype=torch.float16)[::2],
    torch.zeros(2, 0),
]


def crossed(value):
    return wire.decode(wire.loads(wire.dumps({"x": wire.encode(value)}))["x"])


@pytest.mark.parametrize("value", CROSSING, ids=lambda x: repr(x)[:30])
def test_a_value_crosses_unchanged(value):
    back = crossed(value)
    assert type(back) is type(value)
    if hasattr(value, "dtype"):
        assert back.dtype == value.dtype and back.shape == value.shape
        assert back.tolist() == value.tolist()
    else:
        assert repr(back) == repr(value)


class Odd:
    pass


class Faulty:
    def __repr__(self):
        raise ValueError

    tolist = property(__repr__)


def endless_list():
    found = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    "value",
    [Odd(), Faulty(), (x for x in "a"), {1, 2}, b"a", 1j, len, endless_list()],
    ids=lambda x: type(x).__name__,
)
def test_any_other_value_keeps_its_name_and_its_looks(value):
    """So the checker says of it what it says in the student's own notebook."""
    back = crossed(value)
    if not isinstance(value, list):
        assert isinstance(back, wire.Strange)
    assert type(back).__name__ == type(value).__name__
    assert values.show(back) == values.show(value)
    said = []
    for item in (value, back):
        with pytest.raises(values.Unfit) as unfit:
            values.read(item)
        said.append((unfit.value.bug, unfit.value.sentence))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"x": {"tensor": ["", "no_such", [1]]}}',
        b'{"x": {"tensor": ["AAAA", "Tensor", [1]]}}',
        b'{"x": {"tensor": ["AAAAAAAA", "float32", [1000000, 1000000]]}}',
        b'{"x": {"numpy": ["AAAA", "|O", [1], false]}}',
        b'{"x": {"unknown": 1}}',
        b'{"x": {"int": "one"}}',
        b'{"x": [1]}',
        b'{"x": {"list": 3}}',
        b'{"x": {"strange": ["a"]}}',
    ],
)
def test_what_no_encoder_wrote_is_refused(raw):
    with pytest.raises(ValueError):
        wire.decode(wire.loads(raw)["x"])


def test_a_large_value_stays_where_it_is():
    back = crossed(torch.zeros(1).expand(2**21))
    assert type(back).__name__ == "Tensor" and "2097152 numbers" in repr(back)


# --- Intake ---------------------------------------------------------------------------

LAYOUTS = {
    "nbgrader": ("jane/ch04/ch04.ipynb", "bob/ch04/ch04.ipynb"),
    "Moodle": (
        "Jané Doe_123_assignsubmission_file_/ch04.ipynb",
        "Bob Roe_124_assignsubmission_file_/my notebook.ipynb",
    ),
    "Canvas": ("doejane_123_9876_ch04-1.ipynb", "roebob_LATE_124_9877_ch04.ipynb"),
    "Blackboard": (
        "hw_jdoe_attempt_2026-11-24-10-10-10_ch04.ipynb",
        "hw_broe_attempt_2026-11-23-10-10-10_ch04.ipynb",
    ),
    "by hand": ("doe_jane_123_ch04.ipynb", "roe_bob_ch04 (1).ipynb"),
    "wrapped": ("export/jane/work/ch04.ipynb", "export/bob/ch04.ipynb"),
    "one alone": ("jane/ch04.ipynb",),
}
STUDENTS = {
    "nbgrader": ["bob", "jane"],
    "Moodle": ["Bob_Roe_124", "Jané_Doe_123"],
    "Canvas": ["doejane_123", "roebob_124"],
    "Blackboard": ["broe", "jdoe"],
    "by hand": ["doe_jane_123", "roe_bob"],
    "wrapped": ["bob", "jane"],
    "one alone": ["jane"],
}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_students_are_told_by_their_paths(layout, packed, tmp_path, blank):
    folder = tmp_path / "in"
    for name in LAYOUTS[layout]:
        put(folder / name, blank)
    if packed:
        with zipfile.ZipFile(tmp_path / "export.zip", "w") as file:
            for name in LAYOUTS[layout]:
                file.write(folder / name, f"./{name}")
        folder = tmp_path / "export.zip"
    found = intake.collect(folder, CH)
    assert [entry.student for entry in found] == STUDENTS[layout]
    assert all(entry.notebook is not None for entry in found)
    late = [e.student for e in found if e.remarks]
    assert late == (["roebob_124"] if layout == "Canvas" else [])


def test_a_zip_a_student_in_a_zip_of_the_class(tmp_path, blank):
    for name in ("jane", "bob"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as file:
            file.writestr("deep/ch04.ipynb", text(blank))
            file.writestr("__MACOSX/._ch04.ipynb", "no notebook")
    with zipfile.ZipFile(tmp_path / "class.zip", "w") as file:
        for name in ("jane", "bob"):
            file.write(tmp_path / f"{name}.zip", f"{name}.zip")
            (tmp_path / f"{name}.zip").unlink()
    found = intake.collect(tmp_path, CH)
    assert [(e.student, e.where) for e in found] == [
        ("bob", "class/bob/deep/ch04.ipynb"),
        ("jane", "class/jane/deep/ch04.ipynb"),
    ]


def test_two_students_never_become_one(tmp_path, blank):
    for name in ("jane doe", "jane_doe", "Jane Doe"):
        put(tmp_path / name / "ch04.ipynb", blank)
    found = intake.collect(tmp_path, CH)
    assert len({entry.student.casefold() for entry in found}) == 3


def test_the_newest_of_two_notebooks_counts(tmp_path, blank):
    for copy in ("", "-1", "-2"):
        blank.cells[0].source = f"copy {copy}"
        put(tmp_path / f"doe_12_3{copy[1:]}_ch04{copy}.ipynb", blank)
    (entry,) = intake.collect(tmp_path, CH)
    assert entry.notebook.cells[0].source == "copy -2"
    assert "3 notebooks; the newest counts: doe_12_32" in entry.remarks[0].said


def test_what_cannot_be_graded_is_said_and_stops_nobody(tmp_path, blank):
    put(tmp_path / "good" / "ch04.ipynb", blank)
    put(tmp_path / "cut off" / "ch04.ipynb", text(blank)[:500])
    put(tmp_path / "no cells" / "ch04.ipynb", json.dumps({"nbformat": 4}))
    put(tmp_path / "pdf" / "answer.pdf", "%PDF")
    put(tmp_path / "zip" / "ch04.zip", "no zip file")
    put(tmp_path / "other" / "ch04.ipynb", handed_in.released("ch05"))
    put(tmp_path / "empty" / "ch04.ipynb", nbformat.v4.new_notebook())
    found = {entry.student: entry for entry in intake.collect(tmp_path, CH)}
    kinds = {name: [r.kind for r in entry.remarks] for name, entry in found.items()}
    assert kinds == {
        "good": [],
        "cut_off": ["unreadable"],
        "no_cells": ["unreadable"],
        "pdf": ["no notebook"],
        "zip": ["unreadable"],
        "other": ["wrong chapter"],
        "empty": ["wrong chapter"],
    }
    assert "answers ch05" in found["other"].remarks[0].said
    assert [name for name, e in found.items() if e.notebook is not None] == ["good"]


def test_a_folder_that_is_missing_or_empty(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="Remedy"):
            intake.collect(folder, CH)


# --- Laying ---------------------------------------------------------------------------


def laid(notebook):
    return laying.lay(notebook, handed_in.released(CH))


def kinds(found):
    return [(remark.kind, remark.question) for remark in found.remarks]


def order(found):
    return [step.question or step.name for step in found.steps]


def test_an_untouched_notebook_gives_nothing_to_say(blank):
    found = laid(blank)
    assert found.remarks == []
    assert [step.question for step in found.steps if step.question] == (
        handed_in.questions(CH)
    )
    begin = handed_in.place_of(blank, FIRST, "task")
    same = [cell.source for cell in blank.cells[begin:]]
    same = [source for source in same if not source.startswith("# checks.hint")]
    assert [cell.source for cell in found.notebook.cells] == same


def test_of_two_answers_the_one_that_stands_at_the_check_counts(blank):
    answer = handed_in.cell_of(blank, FIRST, "answer")
    place = blank.cells.index(answer)
    older, newer = (nbformat.from_dict(answer) for _ in "ab")
    older.source, answer.source = "soft_cross_entropy = 1", "soft_cross_entropy = 2"
    newer.source = "soft_cross_entropy = 3"
    blank.cells.insert(place, older)
    blank.cells.append(newer)
    found = laid(blank)
    assert kinds(found) == [("duplicated", FIRST)]
    answers = [cell for cell in found.notebook.cells if "soft_cross" in cell.source]
    assert handed_in.cell_of(found.notebook, FIRST, "answer").source == answer.source
    assert [c.source[-1] for c in answers if "entropy = " in c.source] == list("123")
    # The later one is run later: nothing that stands below a check reaches it.
    names = order(found)
    assert names.index(FIRST) < names.index(f"cell {len(blank.cells)}")


def test_without_checks_a_question_follows_its_answer(blank):
    blank.cells = [c for c in blank.cells if "checks.check(" not in c.source]
    helper = nbformat.v4.new_code_cell("def helper(): pass")
    blank.cells.insert(handed_in.place_of(blank, "4.2", "answer"), helper)
    found = laid(blank)
    assert found.remarks == []
    names = order(found)
    assert names.index("4.1") < names.index("4.2") < names.index("4.3")
    after = blank.cells.index(helper) + 1
    assert names.index(f"cell {after}") < names.index("4.1")


def test_a_shuffled_notebook_without_metadata_is_found_whole(blank):
    for cell in blank.cells:
        cell.metadata.clear()
    blank.cells.reverse()
    found = laid(blank)
    assert set(found.cells) == set(handed_in.questions(CH))
    moved = [("moved", question) for question in handed_in.questions(CH)]
    assert sorted(kinds(found)) == sorted([("lost metadata", None), *moved])
    steps = order(found)
    assert steps[-6:] == handed_in.questions(CH)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("%matplotlib inline\nx = 1", "x = 1"),
        ("!pip install x\nx = 1", "x = 1"),
        ("%%time\nx = 1", "x = 1"),
        ("%%bash\nx = 1", ""),
        ("y = (3\n  % 2)\nx = 1", "y = 3 % 2\nx = 1"),
    ],
)
def test_ipython_s_lines_are_left_out(source, wanted):
    text = cells.code(cells.plain(source))
    assert text.replace("pass\n", "") == wanted.replace("pass\n", "")


def test_minutes_are_counted_without_the_pauses(blank):
    assert cells.minutes(blank) is None
    code = [cell for cell in blank.cells if cell.cell_type == "code"]
    for cell, when in zip(code, ["10:00", "10:04", "11:30", "11:40"], strict=False):
        time = f"2026-11-24T{when}:00.000Z"
        cell.metadata["execution"] = {"iopub.execute_input": time}
    assert cells.minutes(blank) == 14.0


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("checks.check = print", "tampering"),
        ("import kdlib.checks as c\nsetattr(checks, 'check', 1)", "tampering"),
        ("kdlib.checks.frame.FACTOR = 9", "reads the solution"),
        ("import sys\nsys.modules['kdlib.checks'] = None", "tampering"),
        ("import os\nos.environ['NBGRADER_EXECUTION']", "tampering"),
        ("from kdlib.checks import ch04", "reads the solution"),
        ("from kdlib.checks import _answers as a", "reads the solution"),
        ("open('exercises/solutions/ch04.ipynb')", "reads the solution"),
        ("checks.solution('4.1')", "reads the solution"),
        ("# checks.solution('4.1')", None),
        ("checks.hint('4.1')", None),
        ("checks = {}\nsolution = 3\ntruth = 4", None),
        ("from kdlib import checks", None),
    ],
)
def test_a_line_that_tampers_is_named(source, kind):
    said = {remark.kind for remark in tampering.found([source], set())}
    assert said == ({kind} if kind else set()) or kind in said


# --- The room -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    secret = tmp_path_factory.mktemp("secret")
    (secret / "grades.csv").write_text("100")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_TOKEN", "secret")
        opened = Rooms([secret])
        opened.__enter__()
    opened.secret = secret
    yield opened
    opened.__exit__()


@pytest.fixture
def room(rooms):
    with rooms.open() as opened:
        yield opened


def test_a_function_is_called_where_it_lives(room):
    text = "import torch\ndef f(x, n):\n    print('hm')\n    x += n\n    return x.sum()"
    assert room.cell(text, "cell 1").failure is None
    given = torch.ones(3, dtype=torch.float64)
    tried = room.look("f")(given, 2)
    assert tried.value == torch.tensor(9.0, dtype=torch.float64)
    assert (tried.edited, tried.printed, tried.wrote) == (0, "hm\n", (3, 0))
    assert given.tolist() == [1, 1, 1]
    assert room.look("f")("text", 2).error.startswith("TypeError: can only concatenate")
    with pytest.raises(LookupError):
        room.look("g")


def test_errors_name_the_student_s_own_line(room):
    tried = room.cell("x = 1\ny = x / 0", "cell 1")
    assert tried.error == (
        "ZeroDivisionError: division by zero\n    in line 2: y = x / 0"
    )
    assert room.look("x") == 1
    assert room.cell("def f(:", "cell 2").error.startswith("SyntaxError")


def test_rooms_know_nothing_of_one_another(rooms):
    with rooms.open() as first, rooms.open() as second:
        first.cell("x = 1\nimport math\nmath.pi = 3", "cell 1")
        assert second.cell("import math\ny = math.pi", "cell 1").failure is None
        assert second.look("y") == math.pi
        with pytest.raises(LookupError):
            second.look("x")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os\nos._exit(0)", "exit code 0"),
        ("import ctypes\nctypes.string_at(0)", "signal 11"),
        ("import os\nos.closerange(3, 64)", "its process ended"),
    ],
)
def test_a_room_that_dies_says_how_and_stays_dead(rooms, source, said):
    with rooms.open() as room:
        room.cell("def f():\n    return 1", "cell 1")
        function = room.look("f")
        with pytest.raises(Dead, match=said):
            room.cell(source, "cell 2")
        assert function().failure == "raised" and said in function().error
    with rooms.open() as room:
        assert room.cell("x = 1", "cell 1").failure is None


def test_a_forged_reply_is_a_value_like_any_other(rooms):
    """Whoever writes to the pipe says what an answer could have said, and no more."""
    forge = (
        "import os, struct\n"
        "def f():\n"
        '    head = b\'{"number": 3, "value": true, \'\n'
        '    text = head + b\'"failure": 7, "edited": 99, "wrote": 1}\'\n'
        "    for fd in range(3, 64):\n"
        "        try:\n"
        "            os.write(fd, struct.pack('!i', len(text)) + text)\n"
        "        except OSError:\n"
        "            pass\n"
        "    return 3"
    )
    with rooms.open() as room:
        room.cell(forge, "cell 1")
        tried = room.look("f")()
        assert (tried.value, tried.failure, tried.edited) == (True, "raised", None)
        assert tried.wrote == (0, 0)


WALLED = """\
import os, socket, sys
found = {}
found["network"] = [name for _, name in socket.if_nameindex()]
try:
    open(sys.prefix + "/kdlib-test", "w")
except OSError as error:
    found["files"] = "Read-only" in str(error)
found["secret"] = os.path.exists(SECRET)
found["pid"] = os.getpid()
found["home"] = os.listdir(".")
found["tokens"] = sorted(set(os.environ) & {"KD_TOKEN", "KD_PRIVATE", "HOME"})
with open("own.txt", "w") as file:
    file.write("allowed")
"""


def test_the_walls_that_are_said_to_stand_do(rooms, room):
    path = rooms.secret / "grades.csv"
    tried = room.cell(f"SECRET = {str(path)!r}\n" + WALLED, "cell 1")
    assert tried.failure is None, tried.error
    found = room.look("found")
    assert found["home"] == [] and found["tokens"] == ["HOME"]
    if confine.NETWORK in room.stand:
        assert found["network"] == ["lo"]
    if confine.FILES in room.stand:
        assert found["files"] is True and found["secret"] is False
    if confine.PROCESSES in room.stand:
        assert found["pid"] == 1
    assert path.read_text() == "100"


def test_a_system_without_walls_still_throws_the_process_away(rooms):
    with Rooms([rooms.secret], walls=False) as plain, plain.open() as room:
        assert room.stand == []
        start = (
            "import os, time\n"
            "if os.fork() == 0:\n"
            "    time.sleep(600)\n"
            "from kdlib.checks import ch04"
        )
        assert "closed while answers are graded" in room.cell(start, "cell 1").error
        (home,) = plain.base.iterdir()
        mine = [p for p in psutil.process_iter() if _works_in(p, home)]
        assert len(mine) >= 3  # the keeper, the student's, and what that one started
        room.__exit__()
        assert gone(home)


def gone(folder):
    """Whether no process works there any more; some seconds are given."""
    for _ in range(100):
        if not any(_works_in(p, folder) for p in psutil.process_iter()):
            return True
        time.sleep(0.1)
    return False


def test_all_rooms_end_when_grading_is_interrupted(rooms):
    with Rooms() as others:
        room = others.open()
        busy = threading.Timer(0.3, others.abandon)
        busy.start()
        with pytest.raises(Dead):
            room.cell("import time\ntime.sleep(600)", "cell 1")
        with pytest.raises(StorageError):
            others.open()


def test_memory_processes_and_handles_have_limits(room):
    hungry = "try:\n    x = bytearray(3 << 30)\nexcept MemoryError:\n    x = None"
    room.cell(hungry, "cell 1")
    assert room.look("x") is None
    text = "open('large', 'wb').write(bytes(65 << 20))"
    assert room.cell(text, "cell 2").failure == "raised"


def test_a_copy_of_the_process_says_nothing_that_counts(room):
    copy = "import os\ncopy = os.fork() == 0\nvalue = 'forged' if copy else 'own'"
    with pytest.raises(Dead, match="no reply"):
        room.cell(copy, "cell 1")
        end = time.monotonic() + 60
        while time.monotonic() < end:  # until the copy has spoken as well
            room.look("value")


def test_processes_without_end_have_an_end(room):
    bomb = "import os, time\nwhile os.fork():\n    pass\ntime.sleep(600)"
    if confine.PROCESSES not in room.stand:
        pytest.skip("this system shares its processes with the room")
    try:
        said = room.cell(bomb, "cell 1").error
    except Dead as dead:  # root, whom the kernel's own limit does not stop
        said = str(dead)
    assert "BlockingIOError" in said or "signal 9" in said


def test_keys_and_tokens_are_out_of_sight_and_python_is_not(tmp_path, monkeypatch):
    for name in (".ssh/id", ".venv/bin/python", ".netrc", "work/notes"):
        put(tmp_path / name, "secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    hidden = marking._out_of_sight(tmp_path / "course", ROOT.parent)
    assert {tmp_path / ".ssh", tmp_path / ".netrc"} <= set(hidden)
    assert tmp_path / ".venv" not in hidden and ROOT.parent not in hidden
    assert {ROOT / "exercises", tmp_path / "course"} <= set(hidden)


def test_a_suite_is_put_to_losses_over_there(room):
    from kdlib.checks import losses, suite

    text = "def test_loss(loss):\n    assert loss.__name__ == 'loss_of_unknown_origin'"
    room.cell(text, "cell 1")
    there = room.look("test_loss")
    for loss in (*losses.RIGHT.values(), losses.WRONG[3].loss):
        assert suite.put(there, loss).failure is None
    with pytest.raises(ArgumentError):
        suite.put(there, lambda *_: 0)


def test_no_room_outlives_its_grader(tmp_path):
    """Killed without a chance to clean up."""
    script = (
        "import os, signal, time\n"
        "from instructor import wire\n"
        "from instructor.room import Rooms\n"
        "room = Rooms().__enter__().open()\n"
        "print(room.home, flush=True)\n"
        "order = {'do': 'cell', 'source': 'while True: pass', 'name': ''}\n"
        "room.talk.send_bytes(wire.dumps({**order, 'number': 1}))\n"
        "time.sleep(0.5)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    home = done.stdout.strip()
    assert home, done.stderr
    assert gone(Path(home).parent)
    shutil.rmtree(Path(home).parent)


def _works_in(process, folder):
    try:
        return Path(process.cwd()).is_relative_to(folder)
    except (psutil.Error, OSError):
        return False


# --- Grading --------------------------------------------------------------------------


def graded(rooms, notebook):
    released = handed_in.released(CH)
    submission = intake.Submission("jane", "ch04.ipynb", notebook)
    found = laying.lay(notebook, released)
    return grading.grade(rooms, submission, found, marking.questions(CH, released))


def test_a_dead_kernel_costs_the_question_that_killed_it(rooms):
    answers = {id: handed_in.solution(id) for id in handed_in.questions(CH)}
    answers["4.2"] = "def batch_gradient(*x):\n    import os\n    os._exit(1)"
    result = graded(rooms, handed_in.with_answers(CH, answers))
    outcomes = [verdict.outcome for verdict in result.verdicts.values()]
    assert outcomes == ["right", "raised", "right", "right", "right", "right"]
    assert "The kernel died" in result.verdicts["4.2"].message


def test_what_the_page_and_nbgrader_read(rooms):
    """Points as the last output, the verdict above it, and no stderr anywhere."""
    answers = {"4.1": handed_in.solution("4.1"), "4.3": "def best_smoothing(:"}
    result = graded(rooms, handed_in.with_answers(CH, answers))
    said = {
        id: handed_in.cell_of(result.notebook, id, "check").outputs
        for id in handed_in.questions(CH)
    }
    points = {id: float(outputs[-1].data["text/plain"]) for id, outputs in said.items()}
    assert points == {"4.1": 4, "4.2": 0, "4.3": 0, "4.4": 0, "4.5": 0, "4.6": 0}
    assert said["4.1"][0].text == "4.1 soft_cross_entropy: right (4 of 4 points)\n"
    assert "SyntaxError" in said["4.3"][0].text and "raised" in said["4.3"][0].text
    names = {out.get("name") for outs in said.values() for out in outs}
    assert names == {"stdout", None}
    assert "| 4.3 | raised | 0 of 4 |" in result.notebook.cells[0].source


SCRIPT = "<script>document.title = 'taken'</script>"


@pytest.mark.slow
def test_no_script_of_a_student_s_runs_in_the_page(tmp_path):
    """In a note, in what is printed, in an error, in a value, in the file's name."""
    answers = {
        "4.1": f"def soft_cross_entropy(s, t):\n    raise ValueError({SCRIPT!r})",
        "4.3": f"print({SCRIPT!r})\nbest_smoothing = lambda *x: {SCRIPT!r}",
    }
    notebook = handed_in.with_answers(CH, answers)
    note = nbformat.v4.new_markdown_cell(f"{SCRIPT}\n\n[x](javascript:alert(1))")
    notebook.cells.insert(handed_in.place_of(notebook, "4.2", "answer"), note)
    put(tmp_path / "in" / "jane" / "a.ipynb", notebook)
    put(tmp_path / "in" / "jane" / f"{SCRIPT.replace('/', '')}.ipynb", notebook)
    put(tmp_path / "in" / "bob" / "a.ipynb", notebook)
    books.release(tmp_path, CH)
    marking.grade_class(tmp_path, CH, tmp_path / "in", jobs=2)
    report.show(tmp_path, CH)
    pages = list(tmp_path.glob("feedback/*/*/*.html")) + list(tmp_path.glob("*.html"))
    assert len(pages) == 3
    for page in pages:
        text = page.read_text()
        assert "document.title" in text
        assert "<script>document.title" not in text
        assert 'href="javascript' not in text


def test_a_fault_of_the_grader_is_no_zero_in_silence(rooms, monkeypatch):
    def fault(*_):
        raise KeyError("ours")

    questions = marking.questions(CH, handed_in.released(CH))
    monkeypatch.setattr(type(questions["4.1"]), "grade", fault)
    result = graded(rooms, handed_in.with_answers(CH, {}))
    said = [remark for remark in result.remarks if remark.kind == "grade by hand"]
    assert [r.question for r in said] == ["4.1", "4.2", "4.3", "4.4"]
    assert result.verdicts["4.5"].outcome == "not attempted"


# --- The class, and the matrix --------------------------------------------------------


def make(goal, *variables):
    """A goal of the Makefile with this very Python, its packages being there."""
    # A file that exists stands for the packages' stamp.
    fixed = [f"PY={sys.executable}", "TEACHING=README.md", "JOBS=2"]
    command = ["make", "-s", goal, *fixed, *variables]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The class of thirty, graded by one command: (students, folder, its output)."""
    folder = tmp_path_factory.mktemp("a class")
    students = class_of_thirty.students()
    class_of_thirty.write(folder / "in", students)
    released = make("release", "CH=04", f"CLASS={folder / 'course'}")
    assert released.returncode == 0, released.stderr
    done = make(
        "grade", "CH=04", f"CLASS={folder / 'course'}", f"SUBMISSIONS={folder / 'in'}"
    )
    assert done.returncode == 0, done.stderr
    return students, folder / "course", done


@pytest.mark.slow
def test_each_of_thirty_gets_what_is_due(taught):
    students, course, _ = taught
    result = json.loads((course / "results" / "ch04.json").read_text())
    given = {entry["student"]: entry for entry in result["students"]}
    assert len(given) == len(students) == 30
    wanted = {s.id: s.expected for s in students}
    got = {
        id: {
            q: (v["outcome"], v["bug"], v["points"])
            for q, v in entry["questions"].items()
        }
        for id, entry in given.items()
    }
    assert got == wanted
    # The gradebook, and grades.csv, which are nbgrader's.
    points = {
        id: {q: entry[2] for q, entry in expected.items()}
        for id, expected in wanted.items()
    }
    assert books.scores(course, CH) == points
    with (course / "grades.csv").open() as file:
        rows = {row["student_id"]: float(row["score"]) for row in csv.DictReader(file)}
    assert rows == {id: sum(entry.values()) for id, entry in points.items()}


@pytest.mark.slow
def test_each_damage_has_its_line_and_nobody_else_has_one(taught):
    students, course, done = taught
    result = json.loads((course / "results" / "ch04.json").read_text())
    kinds = {
        s["student"]: {r["kind"] for r in s["remarks"]} for s in result["students"]
    }
    assert kinds == {student.id: student.kinds for student in students}
    shown = make("report", "CH=04", f"CLASS={course}")
    assert shown.stdout == done.stdout
    page = html.unescape((course / "report-ch04.html").read_text())
    for entry in result["students"]:
        for remark in entry["remarks"]:
            assert re.search(
                rf"{re.escape(entry['student'])} +{remark['kind']} +"
                rf"{re.escape(remark['said'])}",
                shown.stdout,
            )
            assert remark["said"] in page


@pytest.mark.slow
def test_the_report_counts_outcomes_and_bugs(taught):
    students, course, done = taught
    for question in handed_in.questions(CH):
        entries = [student.expected[question] for student in students]
        counts = [sum(e[0] == x for e in entries) for x in report.OUTCOMES]
        mean = f"{sum(e[2] for e in entries) / 30:.2f}"
        row = rf"^ +{question} +{' +'.join(map(str, counts))} +{mean} "
        assert re.search(row, done.stdout, re.M), question
    for (question, bug), number in Counter(
        (q, e[1]) for s in students for q, e in s.expected.items() if e[1]
    ).items():
        row = rf"^ +{re.escape(bug)} +{question} +{number}$"
        assert re.search(row, done.stdout, re.M), bug


@pytest.mark.slow
def test_each_student_has_a_page_that_needs_no_network(taught):
    students, course, _ = taught
    for student in students:
        page = (course / "feedback" / student.id / CH / f"{CH}.html").read_text()
        said = html.unescape(re.sub(r"<[^>]+>", "", page))
        for question, (outcome, _, points) in student.expected.items():
            assert re.search(rf"{question} \w+: {outcome}", said)
            full = class_of_thirty.FULL[question]
            if outcome != "not attempted":
                assert f"({points:g} of {full:g} points)" in said
        for tag in re.findall(r"<(?:img|link|iframe)[^>]*>", page):
            assert "http" not in tag
        assert "batch_gradient" in said


def test_the_class_holds_every_known_bug_and_nobody_is_called_twice():
    students = class_of_thirty.students()
    assert len(students) == len({student.id for student in students}) == 30
    wrong, _ = handed_in.known(CH)
    held = {(q, entry[1]) for s in students for q, entry in s.expected.items()}
    assert {(q, bug) for q, _, _, bug, *_ in wrong} <= held


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_known_wrong_answer_through_nbgrader(chapter, tmp_path):
    """The score in nbgrader's gradebook is that of tests/wrong_answers."""
    slices = handed_in.slices(chapter)
    for number, answers in enumerate(slices):
        sources = {q: source for q, (source, _) in answers.items()}
        notebook = handed_in.with_answers(chapter, sources)
        put(tmp_path / "in" / f"s{number}" / f"{chapter}.ipynb", notebook)
    books.release(tmp_path / "course", chapter)
    results = marking.grade_class(
        tmp_path / "course", chapter, tmp_path / "in", jobs=2, pages=False
    )
    said = {
        result.student: {
            q: (v.outcome, v.bug, v.points) for q, v in result.verdicts.items()
        }
        for result in results
    }
    recorded = books.scores(tmp_path / "course", chapter)
    seen = 0
    for number, answers in enumerate(slices):
        for question, (_, wanted) in answers.items():
            assert said[f"s{number}"][question] == wanted, (number, question)
            assert recorded[f"s{number}"][question] == wanted[2]
            seen += wanted[0] != "right"
    assert seen == len(handed_in.known(chapter)[0])


# --- Commands -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["release", "x"], "'x' is no chapter"),
        (["release", ""], "'' is no chapter"),
        (["release", "99"], "there are no exercises for ch99"),
        (["grade", "04"], "ch04 was not released in"),
        (["report", "04"], "make grade CH=04"),
    ],
)
def test_a_mistake_is_told_with_its_remedy(arguments, said, tmp_path, capsys):
    course = ["--course", str(tmp_path / "course")]
    assert instructor_main([*arguments, *course]) == 1
    err = capsys.readouterr().err
    assert said in err and "Remedy" in err


def test_the_assignment_has_hints_and_no_solutions():
    for chapter in CHAPTERS:
        public, given = books.public(chapter), books.assignment(chapter)
        assert len(public.cells) == len(given.cells)
        text = "\n".join(cell.source for cell in given.cells)
        assert "checks.solution" not in text
        count = len(handed_in.questions(chapter))
        assert text.count("# checks.hint(") == count
        assert "and the solution" not in " ".join(text.split())
