"""The loss and its optimiser: scale, rate, what falls and what does not, the machine.

A check is a function of the run's record that returns a finding or none, and compares
with a line of thresholds.py. No check raises, whatever numbers a record lacks.
"""

from __future__ import annotations

import math
import statistics

from kdlib.doctor import thresholds as at
from kdlib.doctor.finding import Finding, found
from kdlib.doctor.record import Record, as_row

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
    if abs(ratio + 1) <= at.SAME_LOSS:
        return found("wrong_sign", evidence)
    missing = w == 0 and t2 != 1 and abs(ratio * t2 - 1) <= at.SAME_LOSS
    return found("t2_missing" if missing else "wrong_scale", evidence)


def soft_and_kl(run: Record) -> Finding | None:
    """At temperature 1 the soft part of forward KL is the KL that is measured apart.
    Other divergences are other numbers, of the same sign."""
    o = run.objective
    both = [(x["soft"], x["kl"]) for x in run.lines if x.get("kl") and x.get("soft")]
    if o is None or not both:
        return None
    soft, kl = (statistics.median(column) for column in zip(*both, strict=True))
    if soft < -at.NATS and kl > at.NATS:
        evidence = f"the loss's soft part is {soft:.3g}, the KL measured apart {kl:.3g}"
        return found("wrong_sign", evidence)
    if (o.divergence, o.temperature) != ("forward_kl", 1) or o.reduction == "sum":
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
    run = run.of_one_writer
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
    run = run.of_one_writer
    losses, tenths = run.values("loss"), run.tenths("loss")
    if len(losses) < at.STEPS:
        return None
    # A student that knew something may lose it within the first tenth.
    least, last = min(losses[0], *tenths), tenths[-1]
    if last <= at.RISE * least or last - least <= at.NATS:
        return None
    norms = run.tenths("grad_norm")
    evidence = f"the loss falls to {least:.3g}; its tenths are {as_row(tenths)}"
    if norms:
        evidence += f", those of the gradient norm {as_row(norms)}"
    return found("diverging", evidence)


def not_learning(run: Record) -> Finding | None:
    """Neither the loss falls nor the KL. Where the loss alone does, it may be a loss of
    something else (fidelity.fidelity_stuck)."""
    run = run.of_one_writer
    if len(run.values("loss")) < at.STEPS:
        return None
    evidence = []
    for name in ("kl", "loss"):
        tenths = run.tenths(name)
        if name == "kl" and len(tenths) < 2:
            continue
        if tenths[0] <= at.NATS or tenths[-1] <= at.FALL * tenths[0]:
            return None
        first, last = tenths[0], tenths[-1]
        evidence.append(
            f"{name} {first:.3g} in the first tenth, {last:.3g} in the last"
        )
    return found("not_learning", "; ".join(evidence))


def vanishing(run: Record) -> Finding | None:
    norms, left = run.values("grad_norm"), run.tenths(run.learnt_on)
    if not norms or not left or left[-1] <= at.NATS:
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
        if norm / max(before, at.QUIET) > worst:
            worst, where = norm / max(before, at.QUIET), step
    if worst <= at.SPIKE:
        return None
    evidence = (
        f"step {where}: {worst:.3g} times the median of the 20 steps before, or times "
        f"{at.QUIET:g} where that is smaller"
    )
    return found("gradient_spikes", evidence)


# --- The machine ----------------------------------------------------------------------


def throughput(run: Record) -> Finding | None:
    speeds = [x for x in run.of_one_writer.values("tokens_per_s") if x]
    if len(speeds) < at.STEPS:
        return None
    size = len(speeds) // 4
    quarters = [statistics.median(speeds[i * size : (i + 1) * size]) for i in range(4)]
    if quarters[-1] >= at.SLOW * max(quarters):
        return None
    return found("throughput_collapses", f"tokens/s by quarters: {as_row(quarters)}")


def memory(run: Record) -> Finding | None:
    tenths = run.tenths("peak_memory")
    later = tenths[4:]
    growing = len(tenths) == 10 and all(
        b > a for a, b in zip(later, later[1:], strict=False)
    )
    if not growing or later[-1] < at.GROWN * later[0]:
        return None
    evidence = f"GiB by tenths of the run: {as_row([x / 2**30 for x in tenths])}"
    return found("memory_grows", evidence)


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
    throughput,
    memory,
)
