"""nbgrader's part: the release, the gradebook, grades.csv and the feedback pages.

A course folder is laid out as nbgrader wants it, so that its own commands and
formgrader work there too. Two things differ from its defaults, and nbgrader_config.py
says so: what it grades are notebooks in `collected/`, which were run already, and it
runs nothing itself.

    source/ release/          from exercises/, by `release`
    submitted/                what the students handed in, never written to
    collected/                their answers in the released notebook, with verdicts
    autograded/ feedback/ gradebook.db grades.csv      nbgrader's
    results/                  what `report` reads
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sysconfig
import warnings
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbgrader.api import Gradebook
from nbgrader.converters import Autograde, GenerateAssignment, GenerateFeedback
from nbgrader.coursedir import CourseDirectory
from nbgrader.plugins import CsvExportPlugin
from nbgrader.preprocessors import (
    AssignLatePenalties,
    CheckCellMetadata,
    ComputeChecksums,
    LockCells,
    OverwriteCells,
    SaveAutoGrades,
    SaveCells,
)
from traitlets.config import Config

from instructor import class_seed
from instructor.cells import grade_id
from kdlib.errors import DataError
from kdlib.ledger import write_text
from kdlib.progress import TASK

ROOT = Path(__file__).resolve().parents[1]
EXERCISES = ROOT / "exercises"

# nbgrader calls its `alembic` by name, and make calls .venv's Python without its PATH.
os.environ["PATH"] = os.pathsep.join(
    [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
)

CONFIG = '''\
"""Written by `make release`: nbgrader's own commands work in this folder."""

from nbgrader import preprocessors as p

c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "kdlib"
# What is graded was run already, each student apart: see the course's docs/teach.md.
c.CourseDirectory.submitted_directory = "collected"
c.Autograde.sanitize_preprocessors = [p.OverwriteCells, p.CheckCellMetadata]
c.Autograde.autograde_preprocessors = [
    p.SaveAutoGrades,
    p.AssignLatePenalties,
    p.CheckCellMetadata,
]
# The stubs are made already: there is nothing to clear.
c.GenerateAssignment.preprocessors = [
    p.LockCells,
    p.CheckCellMetadata,
    p.ComputeChecksums,
    p.SaveCells,
    p.CheckCellMetadata,
]
'''


def config(course: Path) -> Config:
    found = Config()
    found.CourseDirectory.root = str(course.resolve())
    found.CourseDirectory.course_id = "kdlib"
    found.CourseDirectory.submitted_directory = "collected"
    found.CourseDirectory.db_url = f"sqlite:///{course.resolve() / 'gradebook.db'}"
    found.Autograde.sanitize_preprocessors = [OverwriteCells, CheckCellMetadata]
    found.Autograde.autograde_preprocessors = [
        SaveAutoGrades,
        AssignLatePenalties,
        CheckCellMetadata,
    ]
    # exercises/build.py has made the stubs: nothing is left to clear.
    found.GenerateAssignment.preprocessors = [
        LockCells,
        CheckCellMetadata,
        ComputeChecksums,
        SaveCells,
        CheckCellMetadata,
    ]
    return found


def public(chapter: str) -> NotebookNode:
    """The exercises as everybody has them. Raises DataError for no such chapter."""
    path = EXERCISES / f"{chapter}.ipynb"
    if not path.exists():
        known = ", ".join(sorted(path.stem for path in EXERCISES.glob("ch*.ipynb")))
        raise DataError(f"there are no exercises for {chapter}", f"use one of {known}")
    return nbformat.read(path, as_version=4)


def assignment(chapter: str) -> NotebookNode:
    """The exercises as a class gets them: with the hints, without the solutions' call.

    Raises DataError for a chapter without exercises.
    """
    notebook = public(chapter)
    for cell in notebook.cells:
        if not grade_id(cell):
            text = re.sub(r"(a hint|hints)\s+and\s+the\s+solution", r"\1", cell.source)
            cell.source = re.sub(r"\n# checks\.solution\(.*\)$", "", text)
    return notebook


def stated_minutes(notebook: NotebookNode) -> dict[str, int]:
    """question -> the minutes that its text names"""
    text = "\n\n".join(cell.source for cell in notebook.cells)
    return {id: int(minutes) for id, minutes in TASK.findall(text)}


def release(course: Path, chapter: str) -> Path:
    """The student's notebook of a chapter; enters its questions into the gradebook."""
    notebook = assignment(chapter)
    course.mkdir(parents=True, exist_ok=True)
    notebook = class_seed.prepare(course, chapter, notebook)
    source = course / "source" / chapter / f"{chapter}.ipynb"
    source.parent.mkdir(parents=True, exist_ok=True)
    write_text(source, nbformat.writes(notebook) + "\n")
    if not (course / "nbgrader_config.py").exists():
        write_text(course / "nbgrader_config.py", CONFIG)
    (course / "submitted").mkdir(exist_ok=True)
    _convert(GenerateAssignment, course, chapter)
    return course / "release" / chapter / f"{chapter}.ipynb"


def released(course: Path, chapter: str) -> NotebookNode:
    """Raises DataError where the chapter was not released in this course."""
    path = course / "release" / chapter / f"{chapter}.ipynb"
    if not path.exists():
        raise DataError(
            f"{chapter} was not released in {course}",
            f"run make release CH={chapter.removeprefix('ch')} first",
        )
    return nbformat.read(path, as_version=4)


def record(course: Path, chapter: str, notebooks: dict[str, NotebookNode]) -> None:
    """Have nbgrader grade the notebooks, by student, and forget what was there."""
    for old in course.glob(f"collected/*/{chapter}"):
        shutil.rmtree(old)
    for student, notebook in notebooks.items():
        path = course / "collected" / student / chapter / f"{chapter}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
    _convert(Autograde, course, chapter)


def feedback(course: Path, chapter: str) -> None:
    _convert(GenerateFeedback, course, chapter)


def scores(course: Path, chapter: str) -> dict[str, dict[str, float]]:
    """student -> question -> the points that nbgrader gave, without changes by hand."""
    found: dict[str, dict[str, float]] = {}
    with Gradebook(f"sqlite:///{course.resolve() / 'gradebook.db'}") as book:
        for submission in book.assignment_submissions(chapter):
            (notebook,) = submission.notebooks
            found[submission.student.id] = {
                ".".join(grade.name.split("-")[1:3]): float(grade.auto_score)
                for grade in notebook.grades
            }
    return found


def export(course: Path) -> Path:
    path = course / "grades.csv"
    with Gradebook(f"sqlite:///{course.resolve() / 'gradebook.db'}") as book:
        plugin = CsvExportPlugin()
        plugin.to = str(path)
        plugin.export(book)
    return path


def _convert(kind: type, course: Path, chapter: str) -> None:
    """One of nbgrader's converters, over all students. Raises DataError."""
    settings = config(course)
    place = CourseDirectory(config=settings)
    place.assignment_id = chapter
    converter = kind(coursedir=place, config=settings)
    converter.force = True
    log = course / "nbgrader.log"
    handler = logging.FileHandler(log, encoding="utf-8")
    converter.log.addHandler(handler)
    converter.log.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SQLAlchemy's, of nbgrader's own code
            converter.start()
    except (Exception, SystemExit) as error:
        raise DataError(
            f"nbgrader's {kind.__name__} failed for {chapter} ({error})",
            f"read {log}",
        ) from error
    finally:
        converter.log.removeHandler(handler)
        handler.close()
