"""Student against teacher, as a run's metrics tell of them (kdlib/metrics.py).

Checks as in optimisation.py: does the student come nearer, at all positions and with
the teacher's own sureness; do the targets hold enough; where does it end?
"""

from __future__ import annotations

import math
import statistics

from kdlib.doctor import thresholds as at
from kdlib.doctor.finding import Finding, found
from kdlib.doctor.record import Record, as_row
from kdlib.sparse import LINEAR


def fidelity_stuck(run: Record) -> Finding | None:
    """The loss falls, and the student does not come nearer to its teacher."""
    run = run.of_one_writer
    loss, kl = run.thirds("loss"), run.thirds("kl")
    if not loss or not kl or len(run.lines) < at.STEPS:
        return None
    if loss[0] <= 0 or kl[0] <= at.NATS:
        return None
    fell, nearer = 1 - loss[-1] / loss[0], 1 - kl[-1] / kl[0]
    if fell < at.FELL or nearer > at.NEARER * fell:
        return None
    evidence = (
        f"from the first third to the last the loss went from {loss[0]:.3g} to "
        f"{loss[-1]:.3g}, the KL from {kl[0]:.3g} to {kl[-1]:.3g}"
    )
    agreement = run.thirds("agreement")
    if agreement:
        if agreement[-1] - agreement[0] > at.GAINED * (1 - agreement[0]):
            return None
        evidence += f", the agreement from {agreement[0]:.2f} to {agreement[-1]:.2f}"
    return found("fidelity_stuck", evidence)


def sureness(run: Record) -> Finding | None:
    gaps = run.tenths("entropy_gap")
    if len(gaps) < 2:
        return None
    evidence = f"H(p_s) - H(p_t) was {gaps[0]:.3g} nats, and is {gaps[-1]:.3g}"
    if gaps[-1] > at.FLAT and gaps[-1] - gaps[0] > at.FLATTER:
        return found("too_flat", evidence)
    o = run.objective
    meant = o is not None and (o.hard_weight > 0.5 or "reverse" in o.divergence)
    if gaps[-1] < at.SURE and not meant:
        return found("overconfident", evidence)
    return None


def teacher_mass(run: Record) -> Finding | None:
    values = run.values("teacher_mass")
    if not values or statistics.fmean(values) >= at.TEACHER_MASS:
        return None
    evidence = f"on average {statistics.fmean(values):.3f} of it"
    return found("teacher_mass_low", evidence)


def support(run: Record) -> Finding | None:
    """The probability off the top k, on both sides.

    Tokens put together cannot be told apart better than one by one (the data processing
    inequality): with the top k as one event and the rest as another, the KL is at most
    what it is with the tail as a bucket. A KL that is less does not see the tail. And
    where the sum is cut off after the top k, the student leaves the tail.
    """
    names = ("teacher_mass", "off_support", "kl")
    rows = [[line.get(name) for name in names] for line in run.lines]
    rows = [row for row in rows if None not in row]
    rows = rows[3 * len(rows) // 4 :]
    if not rows:
        return None
    mass, off, kl = (statistics.median(column) for column in zip(*rows, strict=True))
    evidence = (
        f"off the top k the student has {off:.3f} of its probability, the teacher "
        f"{1 - mass:.3f}"
    )
    blind = statistics.median(_of_two(m, q) - kl for m, q, kl in rows) > at.NATS
    if blind and kl >= 0:
        evidence += f": a KL of {_of_two(mass, off):.3g} by itself, measured {kl:.3g}"
        return found("top_k_renormalised", evidence)
    o = run.objective
    drawn = o is not None and o.divergence in LINEAR and o.hard_weight == 0
    left = drawn and mass < at.CUT_MASS and off < at.LEFT * (1 - mass)
    return found("top_k_tail_cut", evidence) if left or blind else None


def _of_two(mass: float, off: float) -> float:
    """KL of (mass, 1 - mass) and (1 - off, off)."""
    pairs = (mass, 1 - off), (1 - mass, off)
    return sum(p * math.log(p / max(q, at.TINY)) for p, q in pairs if p > 0)


def late_positions(run: Record) -> Finding | None:
    """The KL falls at the beginning of responses, and not at their end."""
    run = run.of_one_writer
    early, late = run.thirds("kl_quarter_1"), run.thirds("kl_quarter_4")
    if not early or not late or min(early[0], late[0]) <= at.NATS:
        return None
    fell, nearer = 1 - early[-1] / early[0], 1 - late[-1] / late[0]
    behind = nearer <= at.BEHIND * fell and late[-1] >= at.LATE * early[-1]
    if fell < at.FELL or not behind:
        return None
    evidence = (
        f"from the first third of the run to the last the KL went from {early[0]:.3g} "
        f"to {early[-1]:.3g} in the first quarter of responses, and from {late[0]:.3g} "
        f"to {late[-1]:.3g} in the last"
    )
    return found("late_positions_stuck", evidence)


def unfinished(run: Record) -> Finding | None:
    values = run.values("unfinished")
    values = values[-max(1, len(values) // 10) :]
    if not values or statistics.fmean(values) < at.ALWAYS:
        return None
    evidence = (
        f"{statistics.fmean(values):.0%} of the last written responses do not end"
    )
    if run.config is not None:
        evidence += f" within max_new_tokens={run.config.max_new_tokens}"
    return found("unfinished_responses", evidence)


def validation(run: Record) -> Finding | None:
    kl = run.tenths("kl")
    try:
        there = float(run.validation["student"]["kl"])
    except (KeyError, TypeError):  # there is none, or none with a teacher
        return None
    if not kl or there <= at.ELSEWHERE * kl[-1] + at.NATS:
        return None
    evidence = f"KL {kl[-1]:.3g} nats a token in training, {there:.3g} in validation"
    return found("validation_far", evidence)


def against_floor(run: Record, floor: float) -> list[Finding]:
    run = run.of_one_writer
    kl = run.tenths("kl")
    if not kl:
        return []
    evidence = f"KL {kl[-1]:.3g} nats a token, floor {floor:.3g}"
    if kl[-1] < floor - max(at.NATS, 0.1 * floor):
        return [found("below_floor", evidence)]
    thirds = run.thirds("kl")
    still = len(run.lines) >= at.STEPS and thirds and thirds[2] > at.STILL * thirds[1]
    if still and kl[-1] - floor > max(at.NATS, at.NEAR * (kl[0] - floor)):
        evidence += f"; tenths of the run: {as_row(kl)}"
        return [found("plateau_above_floor", evidence)]
    return []


CHECKS = (
    fidelity_stuck,
    sureness,
    teacher_mass,
    support,
    late_positions,
    unfinished,
    validation,
)
