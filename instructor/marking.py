"""A class's submissions, graded in one go.

    intake -> a room for each student -> nbgrader's books -> pages, grades.csv, results

Knows: the order of these. Does not know: what any of them does inside.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from nbformat import NotebookNode

from instructor import books, confine
from instructor.cells import Remark
from instructor.grading import Result, grade
from instructor.intake import Submission, collect
from instructor.room import ROOT, Rooms
from kdlib.errors import KdlibError
from kdlib.ledger import write_text


def grade_class(
    course: Path, chapter: str, folder: Path, jobs: int, pages: bool = True
) -> list[Result]:
    """Grade all that `folder` holds for a chapter, record it and write the pages.

    jobs:  students at a time
    pages: whether to write the feedback pages

    Raises DataError where there is nothing to grade, or nbgrader fails.
    """
    notebook = books.released(course, chapter)
    submissions = collect(folder, chapter)
    hidden = _hidden_checks(chapter)
    results = list(_graded(course, submissions, notebook, hidden, jobs))
    books.record(course, chapter, {r.student: r.notebook for r in results})
    _compare(results, books.scores(course, chapter))
    if pages:
        books.feedback(course, chapter)
    books.export(course)
    _save(course, chapter, folder, results)
    return results


def _graded(course, submissions, notebook, hidden, jobs):
    out_of_sight = [ROOT / "exercises", ROOT / "tests", ROOT / "notebooks"]
    out_of_sight += [ROOT / "kdlib" / "checks", ROOT / "kdlib" / "data" / "checks"]
    out_of_sight += [course.resolve(), ROOT / ".git"]
    if "KD_PRIVATE" in os.environ:
        out_of_sight.append(Path(os.environ["KD_PRIVATE"]).resolve())
    with Rooms(out_of_sight) as rooms, ThreadPoolExecutor(jobs) as pool:
        waiting = [
            pool.submit(_one, rooms, submission, notebook, hidden)
            for submission in submissions
        ]
        try:
            for number, done in enumerate(waiting, start=1):
                result = done.result()
                points = sum(v.points for v in result.verdicts.values())
                out_of = sum(v.out_of for v in result.verdicts.values())
                print(
                    f"{number}/{len(waiting)} {result.student}: "
                    f"{points:g} of {out_of:g}",
                    file=sys.stderr,
                )
                yield result
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _one(
    rooms: Rooms, submission: Submission, notebook: NotebookNode, hidden: object
) -> Result:
    """A fault of the grader's own costs nobody else's grade, and is not kept quiet."""
    try:
        return grade(rooms, submission, notebook, hidden)
    except KdlibError:
        raise
    except Exception as error:
        told = f"The grader failed ({type(error).__name__}: {error}). Grade by hand."
        empty = Submission(submission.student, submission.where)
        empty.remarks = [*submission.remarks, Remark("grade by hand", told)]
        return grade(rooms, empty, notebook)


def _hidden_checks(chapter: str) -> object:
    """What KD_PRIVATE adds, and the class's seed, where instructor.overlay exists."""
    if importlib.util.find_spec("instructor.overlay") is None:
        return None
    return importlib.import_module("instructor.overlay").load(chapter)


def _compare(results: list[Result], recorded: dict[str, dict[str, float]]) -> None:
    """What nbgrader recorded must be what the checker said."""
    for result in results:
        said = {id: verdict.points for id, verdict in result.verdicts.items()}
        have = recorded.get(result.student)
        if have != said:
            told = f"The gradebook has {have}, the checks gave {said}."
            result.remarks.append(Remark("grade by hand", told))


def _save(course: Path, chapter: str, folder: Path, results: list[Result]) -> None:
    walls = {name for result in results for name in result.stand}
    ran = [result for result in results if result.stand or result.seconds]
    walls = [w for w in confine.WALLS if ran and all(w in r.stand for r in ran)]
    content = {
        "chapter": chapter,
        "submissions": str(folder),
        "graded": datetime.now(UTC).isoformat(timespec="seconds"),
        "walls": walls,
        "students": [
            {
                "student": result.student,
                "where": result.where,
                "questions": {
                    id: {k: v for k, v in asdict(verdict).items() if k != "question"}
                    for id, verdict in result.verdicts.items()
                },
                "remarks": [asdict(remark) for remark in result.remarks],
                "seconds": result.seconds,
            }
            for result in results
        ],
    }
    path = course / "results" / f"{chapter}.json"
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
