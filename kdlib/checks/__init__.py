"""The exercises' checkers: an answer goes in, one of four outcomes comes out.

    checks.check("1.1", my_function)    not attempted, raised, wrong or right
    checks.hint("1.1")                  one hint, the next time another
    checks.solution("1.1")              the solution, with a reason

All of it is plain text on stdout, equal every time. Where a class is graded with
nbgrader (the variable NBGRADER_EXECUTION is set), `check` also returns the points, and
nbgrader reads them from the cell's last line.
"""

from __future__ import annotations

import importlib
import os
import textwrap

from kdlib.checks import _answers, frame
from kdlib.errors import ArgumentError, nearest

__all__ = ["check", "hint", "solution"]

_shown: dict[str, int] = {}  # hints given so far, by question


def __dir__() -> list[str]:
    return __all__


def check(question: str, answer: object) -> float | None:
    """Print how an answer fares; when graded by nbgrader, return its points too.

    question: the exercise's number, such as "1.1"
    answer:   the function itself where one was to be written, not its result

    Raises ArgumentError for a question that does not exist.
    """
    verdict = grade(question, answer)
    print(verdict.message)
    return verdict.points if "NBGRADER_EXECUTION" in os.environ else None


def hint(question: str) -> None:
    """Print the first hint, the next time the second."""
    hints = _answers.of(_find(question).id)["hints"]
    number = min(_shown.get(question, 0) + 1, len(hints))
    _shown[question] = number
    print(f"Hint {number} of {len(hints)} for {question}")
    print(textwrap.indent(hints[number - 1], "  "))


def solution(question: str) -> None:
    """Print the solution and the reason behind it."""
    found = _answers.of(_find(question).id)
    print(f"Solution of {question}\n")
    print(found["solution"])
    if found["note"]:
        print("\n" + found["note"])


def grade(question: str, answer: object) -> frame.Verdict:
    """The verdict on an answer, with nothing printed: for graders and tests."""
    return _find(question).grade(answer)


def _find(question: str) -> frame.Question:
    known = _questions()
    if question not in known:
        raise ArgumentError(
            f"there is no question {question!r}", nearest(question, known)
        )
    return known[question]


def _questions() -> dict[str, frame.Question]:
    """Every question by its number, in the order of the course."""
    chapters = (
        importlib.import_module(f"kdlib.checks.{name}") for name in _answers.chapters()
    )
    return {item.id: item for chapter in chapters for item in chapter.QUESTIONS}
