"""A class's submissions, graded in one go.

    intake -> a room for each student -> nbgrader's books -> pages, grades.csv, results

Knows: the order of these. Does not know: what any of them does inside.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from nbformat import NotebookNode

from instructor import books, class_seed, confine
from instructor.cells import Remark, bare, grade_id
from instructor.grading import Result, grade
from instructor.intake import Submission, collect
from instructor.laying import Laid, lay
from instructor.room import ROOT, Rooms
from kdlib.checks.frame import Question
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
    asked = questions(chapter, notebook, course)
    familiar = frozenset(bare(cell.source) for cell in books.public(chapter).cells)
    # In this thread alone: ast.parse is not safe in two (python/cpython#106905).
    laid = [_laid(one, notebook, familiar) for one in submissions]
    results = []
    with (
        Rooms(_out_of_sight(course, folder)) as rooms,
        ThreadPoolExecutor(jobs) as pool,
    ):
        waiting = [
            pool.submit(_graded, rooms, one, its, asked)
            for one, its in zip(submissions, laid, strict=True)
        ]
        try:
            for number, done in enumerate(waiting, start=1):
                results.append(done.result())
                print(f"{number}/{len(waiting)} {_line(results[-1])}", file=sys.stderr)
        except BaseException:
            rooms.abandon()
            pool.shutdown(cancel_futures=True)
            raise
    books.record(course, chapter, {r.student: r.notebook for r in results})
    _compare(results, books.scores(course, chapter))
    if pages:
        books.feedback(course, chapter)
    books.export(course)
    _save(course, chapter, folder, results)
    return results


def questions(
    chapter: str, released: NotebookNode, course: Path | None = None
) -> dict[str, Question]:
    """The questions of a released notebook, as the course and KD_PRIVATE have them."""
    ids = [grade_id(cell).split("-") for cell in released.cells]
    wanted = [f"{id[1]}.{id[2]}" for id in ids if id[-1] == "check"]
    known = class_seed.questions(course, chapter)
    return {id: known[id] for id in wanted}


def _out_of_sight(course: Path, folder: Path) -> list[Path]:
    """What no student's code may see, where the system can hide it."""
    found = [ROOT / name for name in ("exercises", "tests", "notebooks", ".git")]
    found += [ROOT / "kdlib" / "checks", ROOT / "kdlib" / "data" / "checks"]
    found += [course.resolve(), folder.resolve()]
    if os.environ.get("KD_PRIVATE"):
        found.append(Path(os.environ["KD_PRIVATE"]).expanduser().resolve())
    # Keys and tokens, which an answer could print on its own page of feedback.
    found += Path.home().glob(".*")
    # Python and the package must stay in sight, whatever folder was named.
    needed = [ROOT, *map(Path, [sys.prefix, sys.base_prefix, *filter(None, sys.path)])]
    needed += [path.resolve() for path in needed]
    return [p for p in found if not any(path.is_relative_to(p) for path in needed)]


# A fault of the grader's own costs nobody else's grade, and is not kept quiet.


def _laid(
    submission: Submission, released: NotebookNode, familiar: frozenset[str]
) -> Laid:
    try:
        return lay(submission.notebook, released, familiar)
    except Exception as error:
        submission.notebook = None
        submission.remarks.append(_by_hand(error))
        return lay(None, released)


def _graded(
    rooms: Rooms, submission: Submission, laid: Laid, asked: dict[str, Question]
) -> Result:
    try:
        return grade(rooms, submission, laid, asked)
    except KdlibError:
        raise
    except Exception as error:
        submission.notebook = None
        submission.remarks.append(_by_hand(error))
        return grade(rooms, submission, laid, asked)


def _by_hand(error: Exception) -> Remark:
    told = f"The grader failed ({type(error).__name__}: {error}). Grade by hand."
    return Remark("grade by hand", told)


def _line(result: Result) -> str:
    points = sum(verdict.points for verdict in result.verdicts.values())
    out_of = sum(verdict.out_of for verdict in result.verdicts.values())
    return f"{result.student}: {points:g} of {out_of:g}"


def _compare(results: list[Result], recorded: dict[str, dict[str, float]]) -> None:
    """What nbgrader recorded must be what the checker said."""
    for result in results:
        said = {id: verdict.points for id, verdict in result.verdicts.items()}
        have = recorded.get(result.student)
        if have != said:
            told = f"The gradebook has {have}, the checks gave {said}."
            result.remarks.append(Remark("grade by hand", told))


def _save(course: Path, chapter: str, folder: Path, results: list[Result]) -> None:
    ran = [result for result in results if result.stand or result.seconds]
    walls = [w for w in confine.WALLS if ran and all(w in r.stand for r in ran)]
    content = {
        "chapter": chapter,
        "submissions": str(folder),
        "graded": datetime.now(UTC).isoformat(timespec="seconds"),
        "walls": walls,
        "minutes": books.stated_minutes(books.released(course, chapter)),
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
                "minutes": result.minutes,
            }
            for result in results
        ],
    }
    path = course / "results" / f"{chapter}.json"
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
