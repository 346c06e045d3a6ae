"""The tables of docs/teach.md, made from the chapters themselves.

    python -m instructor.syllabus            print them
    python -m instructor.syllabus --write    put them into docs/teach.md

Minutes and objectives are those of the README's table (notebooks/contents.py). A
chapter builds on the earlier ones to which its text, or that of its exercises, sends
the reader.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from pathlib import Path

import jupytext

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))

import contents  # noqa: E402  (notebooks/contents.py)

GUIDE = ROOT / "docs" / "teach.md"
BEGIN, END = "<!-- tables: instructor/syllabus.py -->\n", "<!-- end of tables -->\n"
# Weeks -> the chapters of each week. Every chapter comes after all that it builds on.
SYLLABI = {
    3: [(0, 1, 2), (3, 4), (5, 6)],
    6: [(0, 1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 14)],
    12: [
        (0, 1),
        (2,),
        (3,),
        (4,),
        (5,),
        (6, 7),
        (8,),
        (9,),
        (10, 11),
        (12,),
        (13,),
        (14,),
    ],
}
# The book from which the notation comes has a chapter 3 as well.
_NAMED = re.compile(r"\b[Cc]hapter (\d+)(?! \(arXiv)")
_BOOK = "(arXiv:2501.09223), at chapter 3"


@functools.cache
def _chapters() -> list[contents.Chapter]:
    return contents.chapters()


def builds_on(number: int, texts: list[str]) -> list[int]:
    """The earlier chapters that the texts name, in order."""
    words = " ".join(" ".join(texts).split()).replace(_BOOK, "")
    named = {int(found) for found in _NAMED.findall(words)}
    return sorted(other for other in named if other < number)


@functools.cache
def prerequisites() -> dict[int, list[int]]:
    """Chapter -> what it builds on."""
    found = {}
    for chapter in _chapters():
        sources = [
            ROOT / "notebooks" / "src" / f"{chapter.name}.py",
            ROOT / "exercises" / "src" / f"ch{chapter.number:02}.py",
        ]
        texts = [
            cell.source
            for source in sources
            if source.exists()
            for cell in jupytext.read(source, fmt="py:percent").cells
            if cell.cell_type == "markdown"
        ]
        found[chapter.number] = builds_on(chapter.number, texts)
    return found


def chapter_table() -> str:
    lines = [
        "| chapter | builds on | reading | run, two cores | exercises | "
        "what students will be able to do |",
        "|---|---|---|---|---|---|",
    ]
    needed = prerequisites()
    for item in _chapters():
        row = [
            f"[{item.number} · {item.title}](../notebooks/{item.name}.ipynb)",
            ", ".join(map(str, needed[item.number])) or "none",
            f"{item.reading} min",
            item.run.replace("minutes", "min").replace("minute", "min"),
            f"{item.exercises} min" if item.exercises else "none",
            "; ".join(item.objectives),
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def syllabus_table(weeks: int) -> str:
    known = {item.number: item for item in _chapters()}
    lines = [
        "| week | chapters | reading | exercises | together |",
        "|---|---|---|---|---|",
    ]
    total = [0, 0]
    for week, numbers in enumerate(SYLLABI[weeks], start=1):
        reading = sum(known[number].reading for number in numbers)
        work = sum(known[number].exercises or 0 for number in numbers)
        total = [total[0] + reading, total[1] + work]
        titles = ", ".join(f"{number} · {known[number].title}" for number in numbers)
        row = [week, titles, f"{reading} min", f"{work} min", _hours(reading + work)]
        lines.append(f"| {' | '.join(map(str, row))} |")
    lines.append(
        f"| all | | {_hours(total[0])} | {_hours(total[1])} | {_hours(sum(total))} |"
    )
    return "\n".join(lines) + "\n"


def _hours(minutes: int) -> str:
    return f"{minutes // 60} h {minutes % 60:02} min"


def tables() -> str:
    parts = ["### Chapter by chapter\n", chapter_table()]
    for weeks in SYLLABI:
        parts += [f"### {weeks} weeks\n", syllabus_table(weeks)]
    return "\n".join(parts)


def replaced(guide: str, new: str) -> str:
    """Raises ContentsError where the guide lacks the two marks."""
    before, begin, rest = guide.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise contents.ContentsError(f"teach.md needs the lines {BEGIN!r} and {END!r}")
    return f"{before}{begin}\n{new}\n{end}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put them into the guide")
    options = parser.parse_args(arguments)
    try:
        new = tables()
        if options.write:
            GUIDE.write_text(replaced(GUIDE.read_text("utf-8"), new), "utf-8")
        else:
            print(new, end="")
    except contents.ContentsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
