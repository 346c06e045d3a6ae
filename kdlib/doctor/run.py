"""A run, by its numbers: can they be those of a healthy one?

A check is a function of the record that returns a finding or none, and compares with a
line of thresholds.py. Where one finding explains another, the first stands for both.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from kdlib.doctor import thresholds as at
from kdlib.doctor.finding import Finding, found
from kdlib.doctor.record import Record

LOST = {"not_learning", "fidelity_stuck", "too_flat", "overconfident"}
EXPLAINS = {
    "learning_rate_zero": {"not_learning"},
    "gradient_vanishes": {"not_learning", "gradient_spikes"},
    "mean_over_vocabulary": {"gradient_vanishes"},
    "sum_for_mean": {"always_clipped"},
    "wrong_scale": {"gradient_vanishes", "always_clipped"},
    "starts_too_high": {"always_clipped", "too_flat"},
    "not_learning": {"plateau_above_floor"},
    "diverging": LOST | {"always_clipped", "gradient_spikes"},
    "no_warmup": LOST | {"diverging", "gradient_spikes"},
}


def examine_run(folder: str | Path, *, floor: float | None = None) -> list[Finding]:
    """Findings of a finished run, or of one under way, in its folder.

    floor: the KL in nats a token that no student can go below, where it is known
           (recovery.measure_recovery); 0 for ordinary distillation

    Raises DataError for a folder that holds no run.
    """
    run = Record.read(folder)
    findings = [x for check in CHECKS if (x := check(run))]
    if floor is not None:
        findings += against_floor(run, floor)
    names = {finding.name for finding in findings}
    explained = set().union(*(EXPLAINS.get(name, set()) for name in names))
    return [finding for finding in findings if finding.name not in explained]


# --- Scale ----------------------------------------------------------------------------


def not_finite(run: Record) -> Finding | None:
    steps = [line["step"] for line in run.lines if line["loss"] is None]
    if not steps:
        return None
    return found("loss_not_finite", f"no loss at {len(steps)} steps, first {steps[0]}")


def loss_and_parts(run: Record) -> Finding | None:
    """loss = (1 - hard_weight) T^2 soft + hard_weight hard, with the run's settings."""
    if run.objective is None:
        return None
    w, t = run.objective.hard_weight, run.objective.temperature
    t2 = t**2 if run.objective.scale_by_t2 else 1.0
    ratios = []
    for line in run.lines:
        parts = {"soft": (1 - w) * t2, "hard": w}
        if any(line.get(n) is None for n, weight in parts.items() if weight):
            continue
        whole = sum(weight * line[n] for n, weight in parts.items() if weight)
        if whole and line["loss"] is not None:
            ratios.append(line["loss"] / whole)
    if not ratios or abs(statistics.median(ratios) - 1) <= at.SAME_LOSS:
        return None
    ratio = statistics.median(ratios)
    evidence = f"the loss is {ratio:.4g} times what its parts make at T={t:g}"
    missing = w == 0 and t2 != 1 and abs(ratio * t2 - 1) <= at.SAME_LOSS
    return found("t2_missing" if missing else "wrong_scale", evidence)


def soft_and_kl(run: Record) -> Finding | None:
    """At temperature 1 the soft part of forward KL is the KL that is measured apart."""
    o = run.objective
    if o is None or o.divergence != "forward_kl" or o.temperature != 1:
        return None
    both = [(x["soft"], x["kl"]) for x in run.lines if x.get("kl") and x.get("soft")]
    if not both or o.reduction == "sum":
        return None
    ratios = [soft / kl for soft, kl in both]
    ratio = statistics.median(ratios)
    if 1 / at.SAME_KL <= ratio <= at.SAME_KL:
        return None
    # A scale stays what it is; a loss of other targets goes its own way beside the KL.
    third = max(1, len(ratios) // 3)
    early, late = map(statistics.median, (ratios[:third], ratios[-third:]))
    if max(early, late) > at.SAME_SCALE * min(early, late):
        return None
    name = "sum_for_mean"
    if ratio < 1:
        diluted = ratio > at.VOCABULARY
        name = "padding_in_denominator" if diluted else "mean_over_vocabulary"
    evidence = (
        f"the loss's soft part is {ratio:.3g} times the KL that is measured apart"
    )
    return found(name, evidence)


def starts_too_high(run: Record) -> Finding | None:
    if run.vocabulary is None:
        return None
    most = at.WORSE_THAN_UNIFORM * math.log(run.vocabulary)
    first = {n: x for n in ("kl", "hard") if (x := run.lines[0].get(n)) is not None}
    high = {n: x for n, x in first.items() if x > most}
    if not high:
        return None
    shown = ", ".join(f"{n} {x:.3g}" for n, x in high.items())
    uniform = f"a uniform guess among {run.vocabulary} tokens has {most / 2:.3g} nats"
    return found("starts_too_high", f"at the first step {shown}; {uniform}")


# --- The optimiser --------------------------------------------------------------------


def learning_rate(run: Record) -> Finding | None:
    rates = run.values("learning_rate")
    if not rates or sum(rates) >= at.MOVES:
        return None
    evidence = f"the learning rates of {len(rates)} steps add up to {sum(rates):.2g}"
    return found("learning_rate_zero", evidence)


def warmup(run: Record) -> Finding | None:
    rates, losses = run.values("learning_rate"), run.values("loss")
    if not rates or rates[0] < at.WARM * max(rates) or len(losses) < at.STEPS:
        return None
    early = losses[: max(5, len(losses) // 10)]
    if max(early) <= at.JUMP * losses[0]:
        return None
    evidence = (
        f"the first step has the rate {rates[0]:.2g} of at most {max(rates):.2g}, and "
        f"the loss goes from {losses[0]:.3g} to {max(early):.3g} within {len(early)} "
        "steps"
    )
    return found("no_warmup", evidence)


def diverging(run: Record) -> Finding | None:
    tenths = run.tenths("loss")
    if len(run.lines) < at.STEPS:
        return None
    # A student that knew something may lose it within the first tenth.
    least, last = min(run.values("loss")[0], *tenths), tenths[-1]
    if last <= at.RISE * least or last - least <= at.NATS:
        return None
    norms = run.tenths("grad_norm")
    evidence = f"the loss falls to {least:.3g}; its tenths are {_row(tenths)}"
    if norms:
        evidence += f", those of the gradient norm {_row(norms)}"
    return found("diverging", evidence)


def not_learning(run: Record) -> Finding | None:
    name = run.learnt_on
    tenths = run.tenths(name)
    if len(run.lines) < at.STEPS or tenths[0] <= at.NATS:
        return None
    if tenths[-1] <= at.FALL * tenths[0]:
        return None
    evidence = (
        f"{name} was {tenths[0]:.3g} in the first tenth, {tenths[-1]:.3g} in the last"
    )
    return found("not_learning", evidence)


def vanishing(run: Record) -> Finding | None:
    norms, left = run.values("grad_norm"), run.tenths(run.learnt_on)
    if not norms or left[-1] <= at.NATS:
        return None
    middle = statistics.median(norms)
    if middle >= at.ALIVE:
        return None
    evidence = f"the median gradient norm is {middle:.2g}, at a loss of {left[-1]:.3g}"
    return found("gradient_vanishes", evidence)


def clipped(run: Record) -> Finding | None:
    if run.config is None:
        return None
    norms, limit = run.values("grad_norm"), run.config.max_grad_norm
    norms = norms[len(norms) // 2 :]
    share = sum(x > at.FAR * limit for x in norms) / max(1, len(norms))
    if share < at.ALWAYS:
        return None
    evidence = (
        f"{share:.0%} of the second half's gradients are longer than {at.FAR:g} times "
        f"max_grad_norm={limit:g} (median {statistics.median(norms):.3g})"
    )
    return found("always_clipped", evidence)


def spikes(run: Record) -> Finding | None:
    norms = [(x["step"], x["grad_norm"]) for x in run.lines if x.get("grad_norm")]
    worst, where = 0.0, None
    for i in range(20, len(norms)):
        step, norm = norms[i]
        before = statistics.median(x for _, x in norms[i - 20 : i])
        if norm / before > worst:
            worst, where = norm / before, step
    if worst <= at.SPIKE:
        return None
    evidence = f"step {where}: {worst:.3g} times the median of the 20 steps before"
    return found("gradient_spikes", evidence)


# --- Student and teacher --------------------------------------------------------------


def fidelity_stuck(run: Record) -> Finding | None:
    """The loss falls, and the student does not come nearer to its teacher."""
    loss, kl = run.thirds("loss"), run.thirds("kl")
    if not loss or not kl or len(run.lines) < at.STEPS or kl[0] <= at.NATS:
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
    if not run.validation or not kl:
        return None
    there = run.validation["student"]["kl"]
    if there <= at.ELSEWHERE * kl[-1] + at.NATS:
        return None
    evidence = f"KL {kl[-1]:.3g} nats a token in training, {there:.3g} in validation"
    return found("validation_far", evidence)


def against_floor(run: Record, floor: float) -> list[Finding]:
    kl = run.tenths("kl")
    if not kl:
        return []
    evidence = f"KL {kl[-1]:.3g} nats a token, floor {floor:.3g}"
    if kl[-1] < floor - max(at.NATS, 0.1 * floor):
        return [found("below_floor", evidence)]
    thirds = run.thirds("kl")
    still = len(run.lines) >= at.STEPS and thirds and thirds[2] > at.STILL * thirds[1]
    if still and kl[-1] - floor > max(at.NATS, at.NEAR * (kl[0] - floor)):
        evidence += f"; tenths of the run: {_row(kl)}"
        return [found("plateau_above_floor", evidence)]
    return []


# --- The machine ----------------------------------------------------------------------


def throughput(run: Record) -> Finding | None:
    last = run.lines[-1].get("student_written")
    speeds = [
        line["tokens_per_s"]
        for line in run.lines
        if line.get("student_written") == last and line.get("tokens_per_s")
    ]
    if len(speeds) < at.STEPS:
        return None
    size = len(speeds) // 4
    quarters = [statistics.median(speeds[i * size : (i + 1) * size]) for i in range(4)]
    if quarters[-1] >= at.SLOW * max(quarters):
        return None
    return found("throughput_collapses", f"tokens/s by quarters: {_row(quarters)}")


def memory(run: Record) -> Finding | None:
    tenths = run.tenths("peak_memory")
    later = tenths[4:]
    growing = len(tenths) == 10 and all(
        b > a for a, b in zip(later, later[1:], strict=False)
    )
    if not growing or later[-1] < at.GROWN * later[0]:
        return None
    evidence = f"GiB by tenths of the run: {_row([x / 2**30 for x in tenths])}"
    return found("memory_grows", evidence)


def _row(values: list[float]) -> str:
    return " ".join(f"{x:.3g}" for x in values)


CHECKS = (
    not_finite,
    loss_and_parts,
    soft_and_kl,
    starts_too_high,
    learning_rate,
    warmup,
    diverging,
    not_learning,
    vanishing,
    clipped,
    spikes,
    fidelity_stuck,
    sureness,
    teacher_mass,
    unfinished,
    validation,
    throughput,
    memory,
)
