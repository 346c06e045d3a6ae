"""What a law is, how a loss is judged by it, and when two numbers count as equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kdlib.loss_under_test import LossUnderTest, NotApplicable

PASSED, FAILED = "passed", "failed"
BY_DESIGN = "by_design"  # it departs, and its documentation says so
NOT_APPLICABLE = "not_applicable"  # the loss cannot be asked


@dataclass(frozen=True)
class Verdict:
    """What one law says of one loss.

    bug:  what is broken, or departed from by design; None where the law holds
    note: why it was not asked, the passage that states the departure, or what part of
          the law could not be asked
    """

    law: str
    title: str
    status: str
    measured: str = ""
    expected: str = ""
    bug: str | None = None
    note: str = ""


class Finding(NamedTuple):
    measured: float | str
    expected: float | str
    bug: str | None  # None where the law holds
    note: str = ""  # what of the law this loss could not be asked


class Broken(Exception):
    """Ends a question early, with a finding."""

    def __init__(self, *finding):
        super().__init__()
        self.finding = Finding(*finding)


@dataclass(frozen=True)
class Law:
    """question(loss) -> Finding; its docstring says what must hold, and why."""

    number: str
    title: str
    question: Callable[[LossUnderTest], Finding]


def law(number: str, title: str) -> Callable[[Callable], Law]:
    return lambda question: Law(number, title, question)


def judge(law: Law, loss: LossUnderTest) -> Verdict:
    def verdict(status, *said):
        return Verdict(law.number, law.title, status, *said)

    if law.number in loss.reasons:
        return verdict(NOT_APPLICABLE, "", "", None, loss.reasons[law.number])
    try:
        finding = law.question(loss)
    except Broken as broken:
        finding = broken.finding
    except NotApplicable as reason:
        return verdict(NOT_APPLICABLE, "", "", None, str(reason))
    except Exception as error:  # on a plain batch, whatever it raises is its failure
        line = str(error).partition("\n")[0]
        bug = f"raises {type(error).__name__}: {line}"
        return verdict(FAILED, "an exception", "a number", bug)
    measured, expected, bug, note = finding
    digits = 4
    if bug and _shown(measured, 4) == _shown(expected, 4):
        digits = 12
    shown = _shown(measured, digits), _shown(expected, digits)
    if bug is None:
        return verdict(PASSED, *shown, None, note)
    words, passage = loss.by_design.get(law.number, ("", ""))
    if passage and words in bug:
        return verdict(BY_DESIGN, *shown, bug, passage)
    return verdict(FAILED, *shown, bug, note)


def _shown(x, digits) -> str:
    return x if isinstance(x, str) else f"{x:.{digits}g}"


# --- when two numbers are equal -------------------------------------------------------

# Two right ways to write one formula differ by the rounding of its dtype (1e-16, 6e-8),
# times what cancels in a sum of logs: up to 1e-11 and 1e-5 among the right losses of
# the tests. The smallest mistakes there, an epsilon of 1e-5 in a logarithm, show as
# 1e-5 and more. In float64 there is room to spare: 1e-6 forgives an epsilon of 1e-8.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


def near(loss, measured, expected) -> bool:
    """Equal up to rounding, relative or, near zero, absolute. False for NaN."""
    return abs(measured - expected) <= TOLERANCE[loss.dtype] * (abs(expected) + 0.01)


def roughly(measured, expected, rel=1e-3) -> bool:
    """For naming a bug: measured is explained by expected."""
    return abs(measured - expected) <= rel * abs(expected) + 1e-6


def gap(gradient, expected) -> float:
    return ratio(float((gradient - expected).norm()), float(expected.norm()))


def same(loss, gradient, expected) -> bool:
    return gap(gradient, expected) <= TOLERANCE[loss.dtype]  # False for NaN


def parallel(a, b) -> bool:
    cosine = torch.cosine_similarity(a.flatten().double(), b.flatten().double(), 0)
    return float(cosine) > 0.99999


def ratio(a, b) -> float:
    return a / b if b else math.nan


def positive(value) -> float:
    """The loss of two different models, to be compared with itself. Of a loss that is
    always zero or NaN no invariance could be learnt."""
    value = float(value)
    if not 0 < value < math.inf:
        raise Broken(value, "above 0", "no divergence between two different models")
    return value
