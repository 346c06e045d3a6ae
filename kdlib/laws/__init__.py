"""The laws of every distillation loss, and the name of the bug where one is broken.

Distillation code fails silently: the loss is finite, falls, and optimises something
else. Each law has a number that is measured on the loss and one that is known, by a
formula on probabilities in float64 or by enumeration (exact.py). None compares a loss
with another implementation of it.

Fifteen laws, and three identities (i1 to i3) that alone catch 13 of 13 bugs known from
teaching code. Each is one function, in the room named after what it looks at, and says
in its docstring what must hold, why, and which bug it catches. "museum 6" in the name
of a bug is row 6 of the course's table of failures found in the field's libraries;
owner/repository#number is an issue on GitHub.

How a loss is asked, and what is true, stands in kdlib/loss_under_test.py.

    from kdlib.laws import LAWS, run
    print(LAWS["3"].question.__doc__)
    run(LossUnderTest("mine", my_loss, divergence="forward_kl"))
"""

from __future__ import annotations

from kdlib.errors import ArgumentError
from kdlib.laws import gradients, paths, positions, teacher, values, vocabulary
from kdlib.laws.frame import (
    BY_DESIGN,
    FAILED,
    NOT_APPLICABLE,
    PASSED,
    Law,
    Verdict,
    judge,
)
from kdlib.loss_under_test import LossUnderTest

__all__ = [
    "BY_DESIGN",
    "FAILED",
    "LAWS",
    "NOT_APPLICABLE",
    "PASSED",
    "Law",
    "Verdict",
    "run",
]

LAWS: dict[str, Law] = {
    law.number: law
    for law in (
        values.zero_at_equality,
        values.direction,
        positions.gradient_support,
        positions.padding,
        positions.micro_batches,
        vocabulary.logit_shift,
        vocabulary.vocabulary_scale,
        vocabulary.top_k,
        gradients.estimator,
        values.knob,
        gradients.temperature,
        paths.half_precision,
        paths.fused,
        teacher.paired_identity,
        teacher.teacher_used,
        gradients.closed_form,
        gradients.hard_weight_one,
        values.zero_at_temperature,
    )
}


def run(loss: LossUnderTest, only: str | None = None) -> list[Verdict]:
    """The verdict of every law, or of one. A loss that raises on a batch has failed.

    Raises ArgumentError for a law that does not exist.
    """
    for number in (only, *loss.reasons, *loss.by_design):
        if number is not None and number not in LAWS:
            raise ArgumentError(f"law {number!r}", f"choose one of {', '.join(LAWS)}")
    return [judge(law, loss) for law in LAWS.values() if only in (None, law.number)]
