"""The exercises' checkers: an answer goes in, one of four outcomes comes out.

    checks.check("1.1", my_function)    not attempted, raised, wrong or right
    checks.hint("1.1")                  one hint, the next time another
    checks.solution("1.1")              the solution, with a reason

All of it is plain text on stdout, equal every time. Where a class is graded with
nbgrader (the variable NBGRADER_EXECUTION is set), `check` also returns the points, and
nbgrader reads them from the cell's last line.

A notebook that was released to a class says so with `checks.for_class`.
"""

from __future__ import annotations

import importlib
import os
import textwrap
from collections.abc import Iterable
from dataclasses import replace

from kdlib.checks import _answers, frame
from kdlib.errors import ArgumentError, nearest

__all__ = ["check", "for_class", "hint", "solution"]

_shown: dict[str, int] = {}  # hints given so far, by question
_class: dict = {"salt": "", "hidden": frozenset(), "private": frozenset()}


def __dir__() -> list[str]:
    return __all__


def check(question: str, answer: object) -> float | None:
    """Print how an answer fares; when graded by nbgrader, return its points too.

    question: the exercise's number, such as "1.1"
    answer:   the function itself where one was to be written, not its result

    Raises ArgumentError for a question that does not exist.
    """
    if _find(question).id in _class["private"]:
        print(_kept(question))
        return 0.0 if "NBGRADER_EXECUTION" in os.environ else None
    verdict = grade(question, answer)
    print(verdict.message)
    if question in _class["hidden"]:
        print("  Hidden checks run at grading.")
    return verdict.points if "NBGRADER_EXECUTION" in os.environ else None


def for_class(
    salt: str, hidden: Iterable[str] = (), private: Iterable[str] = ()
) -> None:
    """From here on, check with a class's letters and numbers.

    salt:    the class's word, as released notebooks have it; "" for the course's own
    hidden:  questions that get further checks when the class is graded
    private: questions of the class's own, which only its instructor can check
    """
    _class.update(salt=salt, hidden=frozenset(hidden), private=frozenset(private))


def _kept(question: str) -> str:
    name = _find(question).name
    return f"{question} {name}: your class's own, checked when the class is graded"


def hint(question: str) -> None:
    """Print the first hint, the next time the second."""
    if _find(question).id in _class["private"]:
        print(_kept(question))
        return
    hints = _answers.of(_find(question).id)["hints"]
    number = min(_shown.get(question, 0) + 1, len(hints))
    _shown[question] = number
    print(f"Hint {number} of {len(hints)} for {question}")
    print(textwrap.indent(hints[number - 1], "  "))


def solution(question: str) -> None:
    """Print the solution and the reason behind it."""
    asked = _find(question)
    if asked.id in _class["private"]:
        print(_kept(question))
        return
    found = _answers.of(asked.id)
    print(f"Solution of {question}\n")
    print(_redrawn(asked) or found["solution"])
    if found["note"]:
        print("\n" + found["note"])


def _redrawn(question: frame.Question) -> str:
    """The right answer with a class's letters or numbers; "" where none changed."""
    if isinstance(question, frame.Choice) and question.salt:
        options = question.options()
        right = {
            item: letter
            for item, letters in options.items()
            for letter, (said, _) in letters.items()
            if said
        }
        return f"{question.name} = {right}"
    if isinstance(question, frame.Predict) and question.salt and question.numbers:
        right = {key: float(f"{x:.3g}") for key, x in question.right().items()}
        return f"{question.name} = {right}\n\nThe course's own numbers, in words:"
    return ""


def grade(question: str, answer: object) -> frame.Verdict:
    """The verdict on an answer, with nothing printed: for graders and tests."""
    return _find(question).grade(answer)


def _find(question: str) -> frame.Question:
    known = _questions()
    if question not in known:
        raise ArgumentError(
            f"there is no question {question!r}", nearest(question, known)
        )
    found = known[question]
    # A function's inputs change when a class is graded, and not before.
    if _class["salt"] and isinstance(found, (frame.Choice, frame.Predict)):
        return replace(found, salt=_class["salt"])
    return found


def _questions() -> dict[str, frame.Question]:
    """Every question by its number, in the order of the course."""
    chapters = (
        importlib.import_module(f"kdlib.checks.{name}") for name in _answers.chapters()
    )
    return {item.id: item for chapter in chapters for item in chapter.QUESTIONS}
