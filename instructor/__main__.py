"""python -m instructor release | grade | report: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kdlib.errors import ArgumentError, KdlibError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m instructor",
        description="Release, collect and grade the exercises of a class.",
    )
    parser.add_argument("command", choices=["release", "grade", "report"])
    parser.add_argument("chapter", help="such as 04")
    parser.add_argument(
        "submissions",
        nargs="?",
        type=Path,
        help="grade: folder or zip file (default: COURSE/submitted)",
    )
    parser.add_argument("--course", type=Path, default=Path("course"))
    parser.add_argument("--jobs", type=int, default=2, help="students at a time")
    given = parser.parse_args(arguments)
    try:
        return _run(given)
    except KdlibError as error:
        print(f"{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again.", file=sys.stderr)
        return 130


def _run(given) -> int:
    chapter = _chapter(given.chapter)
    if given.command == "release":
        from instructor import books

        path = books.release(given.course, chapter)
        print(f"Wrote {path}: give this file to the students.")
        return 0
    from instructor import report

    if given.command == "grade":
        from instructor import marking

        folder = given.submissions or given.course / "submitted"
        marking.grade_class(given.course, chapter, folder, max(1, given.jobs))
    print(report.show(given.course, chapter))
    return 0


def _chapter(text: str) -> str:
    number = text.lower().removeprefix("ch")
    if not number.isdigit():
        raise ArgumentError(
            f"{text!r} is no chapter", "give its number: make grade CH=04"
        )
    return f"ch{int(number):02}"


if __name__ == "__main__":
    sys.exit(main())
