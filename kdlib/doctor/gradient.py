"""Is the gradient that of the declared objective? If not, what explains it?

A wrong scale is a factor that fits, a wrong loss another gradient that fits
(mistakes.py). Where several would fit, the likeliest comes first and the others are
named in the evidence.
"""

from __future__ import annotations

from kdlib.doctor.closed_form import Question, gap, known, multiple
from kdlib.doctor.finding import Finding, found
from kdlib.doctor.mistakes import mistakes, sampled_token, top_k


def examine_closed_form(q: Question) -> list[Finding]:
    expected = known(q)
    off = gap(q, expected)
    if off <= q.tolerance:
        return []
    factor, left = multiple(q, expected)
    if left <= q.tolerance:
        name, others = _of_scale(q, factor)
        also = f"; it would also fit {', '.join(others)}" if others else ""
        evidence = f"the gradient is {factor:.4g} times that of the closed form{also}"
        return [found(name, evidence)]
    said = f"off by {off:.2g} from the closed form"
    fits = [m for m in mistakes(q, expected) if m[3] <= q.tolerance]
    if fits:
        # One that fits as it is explains more than one that fits but for a factor.
        name, words, factor, left = min(fits, key=lambda m: abs(m[2] - 1) > q.tolerance)
        if name == "micro_batch_means" and factor > 1.5:
            name = "micro_batches_added"
        evidence = f"{said}, and by {left:.1g} from {factor:.3g} times that of {words}"
        return [found(name, evidence)]
    if special := sampled_token(q) or top_k(q):
        name, words = special
        return [found(name, f"{said}; {words}")] if name else []
    extra = q.gradient[:, q.targets.shape[-1] :] if q.dense else q.gradient[:, :0]
    if extra.any() and q.objective.hard_weight == 0:
        evidence = f"{extra.shape[-1]} columns that the teacher lacks get gradient"
        return [found("vocabulary_padded", evidence)]
    # bfloat16 has 8 bits: what is summed in it is off by less than a tenth.
    name = "low_precision" if off < 0.1 else "unexplained_gradient"
    return [found(name, f"{said}; the best factor, {factor:.3g}, leaves {left:.2g}")]


def _of_scale(q: Question, factor: float) -> tuple[str, list[str]]:
    """The names whose factor this is, the likeliest first."""
    t, vocab = q.objective.temperature, q.logits.shape[-1]
    n, rows, width = (q.sizes[key] for key in ("tokens", "rows", "width"))
    real, passes = q.sizes["real"], q.sizes["passes"]
    items = {"token_mean": n, "sequence_mean": rows, "sum": 1}[q.objective.reduction]
    squares = {1.0, t**-2 if q.objective.scale_by_t2 else t**2}
    positions = [rows * width, rows * (width - 1), real, real - rows]
    table = {
        "t2_missing": [t**-2] if q.objective.scale_by_t2 else [],
        "t_for_t2": [1 / t] if q.objective.scale_by_t2 else [],
        "t2_squared": [t**2] if q.objective.scale_by_t2 else [],
        "t2_undeclared": [] if q.objective.scale_by_t2 else [t**2],
        "mean_over_vocabulary": [
            x * s / vocab for s in squares for x in (1, *(items / p for p in positions))
        ],
        "divided_by_rows": [items / rows],
        "padding_in_denominator": [items / p for p in positions],
        "sum_for_mean": [items],
        "micro_batches_added": [passes],
        "wrong_sign": [-1.0],
    }
    names = [
        name
        for name, values in table.items()
        if any(x != 1 and abs(factor / x - 1) <= q.tolerance for x in values)
    ]
    return (names[0], names[1:]) if names else ("wrong_scale", [])
