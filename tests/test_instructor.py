"""Grading a class: what comes in, what the room lets out, what the books say."""

from __future__ import annotations

import json
import math
import zipfile
from decimal import Decimal
from fractions import Fraction

import handed_in
import nbformat
import numpy as np
import pytest
import torch

from instructor import intake, laying, wire
from kdlib.checks import values
from kdlib.errors import DataError

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
    same = [cell.source for cell in found.notebook.cells]
    assert same == [cell.source for cell in blank.cells]
