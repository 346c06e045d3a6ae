"""Hidden checks: a folder outside of the repository, named by KD_PRIVATE.

It holds chNN.py files, for the chapters that need one, with either or both of

    HIDDEN = {"4.1": Hidden(tests=(Test(...),), bugs=(Bug(...),))}
    VARIANTS = (Variant(Code("4.3", "best_smoothing", ...), task=..., ...),)

Hidden tests and bugs join those of a question that asks for a function. Public and
hidden tests together are worth the points that the notebook prints. A variant stands in
the place of a question, in the release and when it is graded.

Knows: what such a file may say, and that it is sound. Does not know: notebooks.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from kdlib import checks
from kdlib.checks import frame
from kdlib.checks.frame import Bug, Choice, Code, Question, Test
from kdlib.errors import DataError

_GIVEN = re.compile(r"^(Test|Input|Yours): |^It printed:")


@dataclass(frozen=True)
class Hidden:
    """More tests of a question, and more mistakes to know by name."""

    tests: tuple[Test, ...] = ()
    bugs: tuple[Bug, ...] = ()


@dataclass(frozen=True)
class Variant:
    """Another question in the place of one: the same number, name and points.

    task:     the text under the title
    stub:     the cell that students fill in
    solution: Python that defines the right answer under the question's name
    options:  for a Choice, its items as exercises/src has them, with the reasons
    """

    question: Question
    task: str
    stub: str
    solution: str
    options: str = ""


@dataclass(frozen=True)
class Overlay:
    """What KD_PRIVATE holds for one chapter, found sound."""

    hidden: dict[str, Hidden] = field(default_factory=dict)
    variants: dict[str, Variant] = field(default_factory=dict)

    def question(self, public: Question) -> Question:
        """The question that is graded in the place of the public one."""
        if public.id in self.variants:
            return self.variants[public.id].question
        if public.id in self.hidden:
            return _joined(public, self.hidden[public.id])
        return public


@dataclass(frozen=True, repr=False)
class Joined(Code):
    """A question with hidden tests, scaled to the points that the notebook prints."""

    printed: float = field(kw_only=True)
    hidden: frozenset[str] = field(kw_only=True)

    @property
    def out_of(self) -> float:
        return self.printed

    def _verdict(self, outcome, points, lines, bug=None) -> frame.Verdict:
        whole = sum(test.points for test in self.tests)
        scaled = round(points * self.printed / whole, 2)
        return super()._verdict(outcome, scaled, lines, bug)

    def _fault(self, test, arguments, tried, seen):
        """What is hidden stays so: no input, and no value that was returned."""
        failed = super()._fault(test, arguments, tried, seen)
        if failed and test.name in self.hidden:
            outcome, lines, bug = failed
            kept = [line for line in lines if not _GIVEN.match(line)]
            return outcome, ["A hidden check failed.", *kept], bug
        return failed


def _joined(public: Code, more: Hidden) -> Joined:
    return Joined(
        public.id,
        public.name,
        public.parameters,
        public.tests + more.tests,
        public.truth,
        public.bugs + more.bugs,
        public.zero,
        printed=public.out_of,
        hidden=frozenset(test.name for test in more.tests),
    )


def options(text: str) -> dict[str, dict[str, list]]:
    """Item -> letter -> [whether it is right, why], of a Choice's items in words."""
    found: dict[str, dict[str, list]] = {}
    for item, body in _parts(r"\*\*([a-z])\.\*\* ", text):
        found[item] = {}
        for letter, option in _parts(r"- \*\*([A-Z])\*\* ", body):
            said = re.search(r"^  > (right|wrong): (.*(?:\n  > .*)*)", option, re.M)
            if said is None:
                raise ValueError(f"option {letter} of {item} is not said to be right")
            why = " ".join(said[2].replace("\n  > ", " ").split())
            found[item][letter] = [said[1] == "right", why]
        if sum(right for right, _ in found[item].values()) != 1:
            raise ValueError(f"item {item} needs one right option")
    return found


def _parts(mark: str, text: str) -> zip:
    pieces = re.split(f"^{mark}", text, flags=re.M)[1:]
    return zip(pieces[::2], pieces[1::2], strict=True)


# --- Reading a folder -----------------------------------------------------------------


def load(chapter: str) -> Overlay:
    """What the folder KD_PRIVATE holds for a chapter; nothing where it is not set.

    Raises DataError, with the file and the remedy, for anything that would only be
    noticed while a class is graded.
    """
    if not os.environ.get("KD_PRIVATE"):
        return Overlay()
    folder = Path(os.environ["KD_PRIVATE"]).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"KD_PRIVATE={folder} is no folder",
            "name the folder that holds chNN.py, or unset KD_PRIVATE",
        )
    for other in sorted(folder.glob("*.py")):
        if not re.fullmatch(r"ch\d\d", other.stem):
            raise DataError(
                f"{other} belongs to no chapter", "name it ch04.py, or move it away"
            )
    path = folder / f"{chapter}.py"
    return _read(path, chapter) if path.exists() else Overlay()


def _read(path: Path, chapter: str) -> Overlay:
    module = _executed(path)
    hidden = getattr(module, "HIDDEN", {})
    variants = getattr(module, "VARIANTS", ())
    if not isinstance(hidden, dict) or not isinstance(variants, tuple):
        raise DataError(
            f"{path}: HIDDEN is no dict, or VARIANTS no tuple",
            "write HIDDEN = {...} and VARIANTS = (..., )",
        )
    if not hidden and not variants:
        raise DataError(
            f"{path} defines neither HIDDEN nor VARIANTS", "add one, or move it away"
        )
    number = str(int(chapter.removeprefix("ch")))
    known = {
        id: question
        for id, question in checks._questions().items()
        if id.partition(".")[0] == number
    }
    for id, more in hidden.items():
        _sound(path, id, lambda id=id, more=more: _check_hidden(known, id, more))
    for variant in variants:
        id = getattr(getattr(variant, "question", None), "id", "VARIANTS")
        _sound(path, id, lambda v=variant: _check_variant(known, v))
    both = set(hidden) & {variant.question.id for variant in variants}
    if both:
        raise DataError(
            f"{path}: {', '.join(sorted(both))} is in HIDDEN and in VARIANTS",
            "give a variant its tests itself",
        )
    return Overlay(hidden, {variant.question.id: variant for variant in variants})


def _executed(path: Path):
    spec = importlib.util.spec_from_file_location(f"kd_private_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    kept, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise DataError(
            f"{path}{line} cannot be read ({type(error).__name__}: {error})",
            "mend it before you release or grade",
        ) from None
    finally:
        sys.dont_write_bytecode = kept
    return module


class Unsound(Exception):
    """What is wrong with an entry, and the remedy."""


def _sound(path: Path, id: str, check) -> None:
    try:
        check()
    except Unsound as error:
        told, remedy = error.args
    except Exception as error:
        told = f"it fails ({type(error).__name__}: {error})"
        remedy = "run its tests and its truth by hand"
    else:
        return
    raise DataError(f"{path}, {id}: {told}", remedy)


def _check_hidden(known: dict, id: str, more: Hidden) -> None:
    if id not in known:
        raise Unsound("there is no such question", f"use one of {', '.join(known)}")
    public = known[id]
    if not isinstance(public, Code):
        raise Unsound(
            "hidden tests are for functions to write", "make it a Variant instead"
        )
    tests = getattr(more, "tests", ())
    fit = all(isinstance(t, Test) and t.points > 0 for t in tests)
    if not isinstance(more, Hidden) or not fit or not (tests or more.bugs):
        raise Unsound(
            "it wants a Hidden with a Test of some points, or a Bug",
            'write Hidden(tests=(Test("name", 1, cases),))',
        )
    names = [test.name for test in public.tests + tests]
    if len(set(names)) < len(names):
        raise Unsound("two of its tests have one name", "give each its own")
    for salt in ("", "some class"):
        _check_code(replace(_joined(public, more), salt=salt), more.bugs)


def _check_code(question: Code, bugs: tuple[Bug, ...]) -> None:
    for test in question.tests:
        if not list(test.cases(frame.redraw.source(question.id, test.name))):
            raise Unsound(f"the test {test.name!r} has no cases", "yield some")
    verdict = question.grade(question.truth)
    if verdict.outcome != frame.RIGHT:
        raise Unsound(
            f"the right answer itself fails: {' '.join(verdict.message.split())}",
            "mend the test, its shape or the truth",
        )
    for bug in bugs:
        verdict = question.grade(bug.returns)
        if verdict.bug != bug.name:
            raise Unsound(
                f"the bug {bug.name!r} is judged {verdict.outcome}, "
                f"and named {verdict.bug!r}",
                "add a test on which it differs from the truth and from other bugs",
            )


def _check_variant(known: dict, variant: Variant) -> None:
    if not isinstance(variant, Variant) or not isinstance(variant.question, Question):
        raise Unsound("it is no Variant of a question", "write Variant(Code(...), ...)")
    question = variant.question
    if question.id not in known:
        raise Unsound("there is no such question", f"use one of {', '.join(known)}")
    public = known[question.id]
    if (question.name, question.out_of) != (public.name, public.out_of):
        raise Unsound(
            f"it is called {question.name} and gives {question.out_of:g} points",
            f"keep the name {public.name} and {public.out_of:g} points",
        )
    if isinstance(question, Code):
        _check_code(question, question.bugs)
    if isinstance(question, Choice) and not question.own:
        raise Unsound(
            "its options are missing", "write Choice(id, name, items, options(TEXT))"
        )
    for what, wanted in (("stub", frame.NOT_ATTEMPTED), ("solution", frame.RIGHT)):
        space: dict = {}
        exec("import math\nimport torch\n" + getattr(variant, what), space)
        verdict = question.grade(space.get(question.name))
        if verdict.outcome != wanted:
            raise Unsound(f"its {what} is judged {verdict.outcome}", f"wanted {wanted}")
