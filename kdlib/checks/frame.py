"""Three kinds of question, and the verdict on an answer.

Code:    a function to write, run on inputs made anew and held against the truth
Predict: numbers to name before they are computed, right within a factor
Choice:  items with lettered options, of which one is right
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from kdlib.checks import _answers, redraw, values
from kdlib.checks.attempt import KEPT, Attempt, attempt

NOT_ATTEMPTED = "not attempted"
RAISED = "raised"
WRONG = "wrong"
RIGHT = "right"
FACTOR = 1.5  # how near a prediction must be
ROUNDED = 2e-6  # float32's error in a difference of numbers of a few units


@dataclass(frozen=True)
class Verdict:
    """What a checker says.

    points: out of `out_of`; a share for each test that passed
    bug:    the short name of the likely mistake, where one is known
    """

    question: str
    outcome: str
    points: float
    out_of: float
    message: str
    bug: str | None = None


@dataclass(frozen=True, repr=False)
class Bug:
    """A mistake that has been made, and what it returns.

    tell:    the sentence for the student, which does not give the answer away
    returns: the question's arguments -> the wrong value
    seen:    where it was made, owner/name#number; empty where no sighting is known
    """

    name: str
    tell: str
    returns: Callable
    seen: str = ""


@dataclass(frozen=True, repr=False)
class Test:
    """Inputs of one kind, worth some points.

    cases: a source of random numbers -> the argument tuples
    shape: of the value wanted, given the arguments; one number if None
    """

    name: str
    points: float
    cases: Callable[[random.Random], Iterable[tuple]]
    shape: Callable[..., Sequence[int]] | None = None


@dataclass(frozen=True, repr=False)
class Question:
    """salt: the word of a class, from which kdlib.checks.redraw draws; empty: none"""

    id: str
    name: str
    salt: str = field(default="", kw_only=True)

    def _verdict(self, outcome, points, lines, bug=None) -> Verdict:
        points = float(points)
        head = f"{self.id} {self.name}: {outcome}"
        if outcome != NOT_ATTEMPTED:
            head += f" ({points:g} of {self.out_of:g} points)"
        message = "\n".join([head, *(textwrap.indent(line, "  ") for line in lines)])
        return Verdict(self.id, outcome, points, self.out_of, message, bug)


@dataclass(frozen=True, repr=False)
class Code(Question):
    """parameters: the stub's, in order, for the messages.

    zero: a difference as small as this is rounding, where a right or wrong value may
          be 0 (a relative tolerance lets nothing but 0 pass for 0)
    """

    parameters: tuple[str, ...]
    tests: tuple[Test, ...]
    truth: Callable
    bugs: tuple[Bug, ...]
    zero: float = 0.0

    @property
    def out_of(self) -> float:
        return float(sum(test.points for test in self.tests))

    def grade(self, answer: object) -> Verdict:
        if answer is None or answer is ...:
            return self._verdict(NOT_ATTEMPTED, 0, ["Write the function first."])
        if not callable(answer):
            line = f"Give the function itself, not a {type(answer).__name__}."
            return self._verdict(WRONG, 0, [line], "not a function")
        points, first, seen, shown = 0.0, None, [], 0
        for test in self.tests:
            failed = None
            for arguments in test.cases(redraw.source(self.id, test.name, self.salt)):
                tried = attempt(answer, arguments)
                failed = self._fault(test, arguments, tried, seen)
                if failed:
                    break
            if not failed:
                points += test.points
            if failed and not first:
                first, shown = failed, len(seen) - 1
            if tried.failure in ("not written", "late"):
                break
        if first is None:
            return self._verdict(RIGHT, points, [])
        outcome, lines, bug = first
        if outcome == NOT_ATTEMPTED:
            return self._verdict(outcome, 0, lines)
        if outcome == WRONG and bug is None:
            bug, told = self._diagnose(seen, seen[shown])
            lines = lines + told
        return self._verdict(outcome, points, lines, bug)

    def _fault(self, test, arguments, tried: Attempt, seen: list):
        """(outcome, lines, bug) of one call, or None. `seen` gets the fit values."""
        if tried.failure == "not written":
            return NOT_ATTEMPTED, ["The stub still raises NotImplementedError."], None
        lines = [f"Test: {test.name}", _wrap("Input: " + self._input(arguments))]
        if tried.printed:
            lines += [_printed(tried.printed)]
        if tried.failure == "raised":
            return RAISED, [*lines, tried.error], "raised"
        if tried.failure == "late":
            return RAISED, [*lines, tried.error], "endless loop"
        if tried.edited is not None:
            name = self.parameters[tried.edited]
            told = (
                f"It changes its input `{name}`, which its caller does not expect. "
                "Work on a copy, or write `a = a + b` for `a += b`."
            )
            return WRONG, [*lines, _wrap(told)], "changes its input"
        lines += [_wrap(f"Yours: {values.show(tried.value)}")]
        shape = test.shape(*arguments) if test.shape else ()
        try:
            got, tolerance = values.read(tried.value, shape)
        except values.Unfit as unfit:
            return WRONG, [*lines, unfit.sentence], unfit.bug
        # `.item()` and `.tolist()` hide that the numbers were computed in float32.
        tolerance = max(tolerance, values.tolerance(arguments))
        seen.append((arguments, shape, got, tolerance))
        wanted, _ = values.read(self.truth(*arguments), shape)
        zero = self.zero
        if self.salt and tolerance > values.EXACT:
            # Nobody has looked at a class's inputs. On some of them the answer is a
            # small difference of large numbers, and float32 keeps no 5 digits of it.
            zero = max(zero, ROUNDED)
        if not values.same(got, wanted, tolerance, zero):
            return WRONG, lines, None
        return None

    def _diagnose(self, seen, shown) -> tuple[str | None, list[str]]:
        """The bug that explains every value, also those that were right by luck."""
        for bug in self.bugs:
            if self._explains(bug, seen):
                lines = [_wrap(f"Likely bug: {bug.tell}")]
                factor = self._factor([shown])
                if factor:
                    lines += [f"Your value is {values.times(factor)} here."]
                lines += [_wrap(f"Seen in {bug.seen}.")] if bug.seen else []
                return bug.name, lines
        factor = self._factor(seen)
        if factor:
            told = f"Your value is {values.times(factor)} on every input tried."
            return "constant factor", [told]
        if len(seen) > 1 and all(item[2] == seen[0][2] for item in seen):
            return "constant", ["It returns the same value for every input."]
        return None, ["The value is not right, and no known bug explains it."]

    def _explains(self, bug: Bug, seen) -> bool:
        try:
            return all(
                values.same(
                    got,
                    values.read(bug.returns(*arguments), shape)[0],
                    near,
                    self.zero,
                )
                for arguments, shape, got, near in seen
            )
        except values.Unfit:  # it is NaN on one of the inputs; the student's was not
            return False

    def _factor(self, seen) -> float | None:
        got = [x for _, _, numbers, _ in seen for x in numbers]
        wanted = [
            x
            for arguments, shape, _, _ in seen
            for x in values.read(self.truth(*arguments), shape)[0]
        ]
        return values.ratio(got, wanted, 2 * max(near for *_, near in seen))

    def _input(self, arguments: tuple) -> str:
        pairs = zip(self.parameters, arguments, strict=True)
        return ", ".join(f"{name}={values.show(value)}" for name, value in pairs)


@dataclass(frozen=True, repr=False)
class Predict(Question):
    """Numbers that are named before they are computed.

    truth:   gives key -> the number
    beliefs: key -> mistakes, whose `returns` gives the wrong number
    numbers: those of the task that may change with a class, as redraw.numbers takes
             them. Where there are any, `truth` and `returns` are given them as one
             argument with attributes, and a `tell` may name them in braces.
    phrases: where the task says them, in braces: "A vocabulary of {vocabulary:,}"

    Half a point for a number, the other half if it is near.
    """

    truth: Callable[..., dict[str, float]]
    beliefs: dict[str, tuple[Bug, ...]]
    numbers: Mapping[str, Sequence] = field(default_factory=dict)
    phrases: tuple[str, ...] = ()

    @property
    def out_of(self) -> float:
        return float(len(self.beliefs))

    def drawn(self) -> SimpleNamespace:
        """The class's numbers, by name."""
        return redraw.numbers(self.id, self.numbers, self.salt)

    def right(self) -> dict[str, float]:
        """Key -> the number, with the class's numbers."""
        return self._of(self.truth)

    def _of(self, function: Callable):
        return function(self.drawn()) if self.numbers else function()

    def _tell(self, bug: Bug) -> str:
        return bug.tell.format(**vars(self.drawn())) if self.numbers else bug.tell

    def grade(self, answer: object) -> Verdict:
        given = _entries(answer, self.beliefs)
        if given is None or all(_is_open(value) for value in given.values()):
            keys = ", ".join(self.beliefs)
            return self._verdict(NOT_ATTEMPTED, 0, [f"Put down a number for {keys}."])
        truth = self.right()
        points, lines, bugs = 0.0, [], []
        for key, value in given.items():
            said, worth, bug = self._one(key, value, truth[key])
            points += worth
            lines.append(_wrap(f"{key}: {said}"))
            bugs += [bug] if worth < 1 else []
        if not bugs:
            return self._verdict(RIGHT, points, lines)
        return self._verdict(WRONG, points, lines, bugs[0])

    def _one(self, key, value, wanted) -> tuple[str, float, str | None]:
        if _is_open(value):
            return "still open", 0, "incomplete"
        try:
            (got,), _ = values.read(value)
        except values.Unfit as unfit:
            return unfit.sentence, 0, unfit.bug
        if got <= 0:
            return "it must be more than nothing", 0, "not positive"
        if 1 / FACTOR <= got / wanted <= FACTOR:
            return f"{got:g} is near enough", 1, None
        said = f"{got:g} is {values.times(float(f'{got / wanted:.1g}'))}, about."
        for bug in self.beliefs[key]:
            if values.same([got], [self._of(bug.returns)], 0.1):
                return f"{said} {self._tell(bug)}", 0.5, bug.name
        return said, 0.5, None


@dataclass(frozen=True, repr=False)
class Choice(Question):
    """One letter an item; the options and their reasons stand in the data file.

    own: item -> letter -> [whether it is right, why], where they stand nowhere else
    """

    items: str
    own: Mapping[str, Mapping[str, Sequence]] = field(default_factory=dict)

    @property
    def out_of(self) -> float:
        return float(len(self.items))

    def letters(self) -> dict[str, dict[str, str]]:
        """Item -> the class's letter -> the course's letter."""
        options = self.own or _answers.of(self.id)["options"]
        return {
            item: redraw.letters(self.id, item, options[item], self.salt)
            for item in self.items
        }

    def options(self) -> dict[str, dict[str, list]]:
        """Item -> the class's letter -> [whether it is right, why]."""
        known = self.own or _answers.of(self.id)["options"]
        return {
            item: {letter: known[item][own] for letter, own in moved.items()}
            for item, moved in self.letters().items()
        }

    def grade(self, answer: object) -> Verdict:
        given = _entries(answer, self.items)
        if given is None or all(_is_open(value) for value in given.values()):
            return self._verdict(NOT_ATTEMPTED, 0, ["Give a letter for every item."])
        options = self.options()
        points, lines, bugs = 0.0, [], []
        for item, value in given.items():
            letter = value.strip().upper() if isinstance(value, str) else value
            if _is_open(value):
                lines.append(f"{item}: still open")
                bugs.append("incomplete")
            elif not isinstance(letter, str) or letter not in options[item]:
                known = ", ".join(options[item])
                lines.append(f"{item}: {values.show(value)} is none of {known}")
                bugs.append("no such option")
            else:
                right, reason = options[item][letter]
                points += right
                said = "right" if right else "not so"
                lines.append(_wrap(f"{item} {letter}: {said}. {reason}"))
                bugs += [] if right else [f"{item} {letter}"]
        if not bugs:
            return self._verdict(RIGHT, points, lines)
        return self._verdict(WRONG, points, lines, bugs[0])


def _entries(answer: object, keys: Iterable[str]) -> dict | None:
    """key -> value in our order; None where the answer is no dictionary at all."""
    return {k: answer.get(k) for k in keys} if isinstance(answer, dict) else None


def _is_open(value: object) -> bool:
    return value is None or value is ... or (isinstance(value, str) and not value)


def _printed(text: str) -> str:
    shown = text[:KEPT] + (" ..." if len(text) > KEPT else "")
    return "It printed:\n" + textwrap.indent(shown.rstrip(), "  ")


def _wrap(text: str) -> str:
    return textwrap.fill(text, 76, subsequent_indent="  ")
