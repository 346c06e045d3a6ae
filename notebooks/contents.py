"""The README's table of chapters, made from the chapters themselves.

    python notebooks/contents.py             print the table
    python notebooks/contents.py --write     put it into the README

Titles, objectives and the time on two cores stand in a chapter's first cells. Minutes
of reading are counted: 100 words of text a minute, 40 seconds for every code cell. The
minutes of the exercises are those that each exercise states.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

import jupytext

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- chapters: notebooks/contents.py -->\n", "<!-- end -->\n"
WORDS_A_MINUTE = 100
MINUTES_A_CODE_CELL = 2 / 3


class ContentsError(Exception):
    """A chapter that does not say what the table needs."""


class Chapter(NamedTuple):
    """What the table says of a chapter; reading and exercises in minutes."""

    name: str
    number: int
    title: str
    objectives: list[str]
    run: str
    reading: int
    exercises: int | None


def chapter(source: Path) -> Chapter:
    """Raises ContentsError where the first cells lack the title, time or objectives."""
    cells = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent").cells
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]

    def find(pattern: str, what: str) -> re.Match:
        found = re.search(pattern, "\n\n".join(texts), re.M | re.S)
        if not found:
            raise ContentsError(f"{source.name} has no {what}")
        return found

    title = find(r"\A# (\d+) · ([^\n]+)", 'title such as "# 3 · The objective"')
    run = find(
        r"^\| two CPU cores \| ([^|]+) \|", "row `two CPU cores` in its cost box"
    )
    listed = find(
        r"^## What you will be able to do\n+((?:\d+\. .*?\n)+?)\n",
        'numbered list under "What you will be able to do"',
    )
    objectives = re.split(r"^\d+\. ", listed[1], flags=re.M)[1:]
    words = sum(len(text.split()) for text in texts)
    code = len(cells) - len(texts)
    number = int(title[1])
    return Chapter(
        name=source.stem,
        number=number,
        title=title[2],
        objectives=[" ".join(item.split()).rstrip(".") for item in objectives],
        run=run[1],
        reading=5 * round((words / WORDS_A_MINUTE + code * MINUTES_A_CODE_CELL) / 5),
        exercises=_exercise_minutes(number),
    )


def _exercise_minutes(number: int) -> int | None:
    source = ROOT / "exercises" / "src" / f"ch{number:02}.py"
    if not source.exists():
        return None
    stated = re.findall(
        r"^# \*\*[\d.]+\*\* · .* · (\d+) minutes", source.read_text(), re.M
    )
    return sum(map(int, stated))


def chapters() -> list[Chapter]:
    return [chapter(source) for source in sorted((FOLDER / "src").glob("[0-9]*.py"))]


def table(found: list[Chapter]) -> str:
    """The table, in Markdown; paths are those from the repository's root."""
    lines = [
        "| chapter | what you will be able to do | reading | two cores | exercises |",
        "|---|---|---|---|---|",
    ]
    for item in found:
        title = f"[{item.number} · {item.title}](notebooks/{item.name}.ipynb)"
        work = "none"
        if item.exercises is not None:
            work = f"[{item.exercises} min](exercises/ch{item.number:02}.ipynb)"
        row = [
            title,
            "; ".join(item.objectives),
            f"{item.reading} min",
            item.run.replace("minutes", "min").replace("minute", "min"),
            work,
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def replaced(readme: str, new: str) -> str:
    """Raises ContentsError where the README lacks the two marks."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ContentsError(f"README.md needs the lines {BEGIN!r} and {END!r}")
    return before + begin + new + end + after


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put it into the README")
    options = parser.parse_args(arguments)
    try:
        new = table(chapters())
        if options.write:
            README.write_text(replaced(README.read_text("utf-8"), new), "utf-8")
        else:
            print(new, end="")
    except ContentsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
