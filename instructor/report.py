"""The class at a glance: outcomes by question, named bugs by count, what was odd.

Knows: results/chNN.json of a course. Does not know: how it was made.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from instructor.confine import WALLS
from kdlib.errors import DataError
from kdlib.ledger import write_text

OUTCOMES = ("right", "wrong", "raised", "not attempted")


def read(course: Path, chapter: str) -> dict:
    """Raises DataError where the chapter was not graded."""
    path = course / "results" / f"{chapter}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__})",
            f"run make grade CH={chapter.removeprefix('ch')} first",
        ) from None


def show(course: Path, chapter: str) -> str:
    """The class as text; the same is written to course/report-chNN.html."""
    from instructor.page import page

    result = read(course, chapter)
    path = course / f"report-{chapter}.html"
    write_text(path, page(result))
    lines = [f"{chapter}: {len(result['students'])} students", ""]
    for title, rows in tables(result):
        lines += [title, *(_aligned(rows) if rows[1:] else ["  none"]), ""]
    lines += [f"Grades: {course / 'grades.csv'}"]
    lines += [f"A page a student: {course / 'feedback'}/STUDENT/{chapter}/"]
    lines += [f"This report as a page: {path}", "", walls(result)]
    return "\n".join(lines)


def tables(result: dict) -> list[tuple[str, list[list[str]]]]:
    """(title, rows), the first row the heads of the columns."""
    return [
        ("Questions", questions(result)),
        ("Named bugs", bugs(result)),
        ("Students", students(result)),
        ("What was odd", remarks(result)),
    ]


def questions(result: dict) -> list[list[str]]:
    """`minutes` are those that the question states; `seconds` are the grader's."""
    heads = ["mean points", "out of", "minutes", "seconds"]
    rows = [["question", *OUTCOMES, *heads]]
    for id in dict.fromkeys(id for s in result["students"] for id in s["questions"]):
        mine = [s["questions"][id] for s in result["students"]]
        count = Counter(entry["outcome"] for entry in mine)
        mean = sum(entry["points"] for entry in mine) / len(mine)
        spent = sum(s["seconds"].get(id, 0.0) for s in result["students"])
        rows.append(
            [
                id,
                *(str(count[outcome]) for outcome in OUTCOMES),
                f"{mean:.2f}",
                f"{mine[0]['out_of']:g}",
                str(result["minutes"].get(id, "")),
                f"{spent:.1f}",
            ]
        )
    return rows


def bugs(result: dict) -> list[list[str]]:
    count = Counter(
        (id, entry["bug"])
        for s in result["students"]
        for id, entry in s["questions"].items()
        if entry["bug"]
    )
    ordered = sorted(count.items(), key=lambda item: (-item[1], item[0]))
    return [["bug", "question", "students"]] + [
        [bug, id, str(number)] for (id, bug), number in ordered
    ]


def students(result: dict) -> list[list[str]]:
    """`minutes`: at work, at least, where the notebook tells; `seconds`: to grade."""
    rows = [["student", "points", "out of", "right", "minutes", "seconds", "notebook"]]
    for s in result["students"]:
        entries = s["questions"].values()
        rows.append(
            [
                s["student"],
                f"{sum(entry['points'] for entry in entries):g}",
                f"{sum(entry['out_of'] for entry in entries):g}",
                str(sum(entry["outcome"] == "right" for entry in entries)),
                "" if s["minutes"] is None else f"{s['minutes']:g}",
                f"{sum(s['seconds'].values()):.1f}",
                s["where"] or "none",
            ]
        )
    return rows


def remarks(result: dict) -> list[list[str]]:
    return [["student", "what", "in words"]] + [
        [s["student"], remark["kind"], remark["said"]]
        for s in result["students"]
        for remark in s["remarks"]
    ]


def walls(result: dict) -> str:
    stand = [WALLS[name] for name in result["walls"]]
    missing = [said for name, said in WALLS.items() if name not in result["walls"]]
    text = "Each student's code ran in a process of its own, with limits of time and "
    text += "memory" + "".join(f"; {said}" for said in stand) + "."
    if missing:
        text += f" This system did not allow: {'; '.join(missing)}."
    return text


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
