"""Is the gradient that of the declared objective? If not, what explains it?

From the simplest explanation to none: the right gradient times one factor; its two
terms, each times a factor of its own; the gradient of a known mistake (mistakes.py);
each token's gradient times a factor of its own; one that is told by its shape. Where
several names fit one factor, the likeliest comes first and the evidence has the others.
"""

from __future__ import annotations

import torch

from kdlib.doctor.closed_form import TINY, Question, computable, gap, known, multiple
from kdlib.doctor.finding import Finding, found
from kdlib.doctor.mistakes import mistakes, sampled_token, squared_logits, top_k


def examine_closed_form(q: Question) -> list[Finding]:
    q = computable(q)
    if not len(q.ids):
        return []  # float64 has no closed form of a student that is so sure
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
    if terms := _two_terms(q):
        return [found(terms[0], f"{said}; {terms[1]}")]
    fits = [m for m in mistakes(q, expected) if m[3] <= q.tolerance]
    if fits:
        # One that fits as it is explains more than one that fits but for a factor.
        name, words, factor, left = min(fits, key=lambda m: abs(m[2] - 1) > q.tolerance)
        if name == "micro_batch_means" and factor > 1.5:
            name = "micro_batches_added"
        evidence = f"{said}, and by {left:.1g} from {factor:.3g} times that of {words}"
        return [found(name, evidence)]
    if words := _sixteen_bits(q, off):
        return [found("low_precision", f"{said}; {words}")]
    special = sampled_token(q) or top_k(q) or squared_logits(q)
    if special := special or _token_by_token(q, expected):
        name, words = special
        return [found(name, f"{said}; {words}")] if name else []
    extra = q.gradient[:, q.targets.shape[-1] :] if q.dense else q.gradient[:, :0]
    if extra.any() and q.objective.hard_weight == 0:
        evidence = f"{extra.shape[-1]} columns that the teacher lacks get gradient"
        return [found("vocabulary_padded", evidence)]
    evidence = f"{said}; the best factor, {factor:.3g}, leaves {left:.2g}"
    return [found("unexplained_gradient", evidence)]


def _of_scale(q: Question, factor: float) -> tuple[str, list[str]]:
    """The names whose factor this is, the likeliest first."""
    t, vocab = q.objective.temperature, q.logits.shape[-1]
    n, rows, width = (q.sizes[key] for key in ("tokens", "rows", "width"))
    real, passes = q.sizes["real"], q.sizes["passes"]
    items = {"token_mean": n, "sequence_mean": rows, "sum": 1}[q.objective.reduction]
    squares = {1.0, t**-2 if q.objective.scale_by_t2 else t**2}
    positions = [rows * width, rows * (width - 1), real, real - rows]
    table = {
        **_of_temperature(q),
        "mean_over_vocabulary": [
            x * s / vocab for s in squares for x in (1, *(items / p for p in positions))
        ],
        "divided_by_rows": [items / rows],
        "padding_in_denominator": [items / p for p in positions],
        "sum_for_mean": [items],
        "micro_batches_added": [passes],
        "wrong_sign": [-1.0],
    }
    names = _names(table, factor, q.tolerance)
    return (names[0], names[1:]) if names else ("wrong_scale", [])


def _of_temperature(q: Question) -> dict[str, list[float]]:
    """What the soft term is multiplied by, beside what is declared."""
    t = q.objective.temperature
    if not q.objective.scale_by_t2:
        return {"t2_undeclared": [t**2]}
    return {"t2_missing": [t**-2], "t_for_t2": [1 / t], "t2_squared": [t**2]}


def _names(table: dict[str, list[float]], factor: float, tolerance: float) -> list[str]:
    return [
        name
        for name, values in table.items()
        if any(x != 1 and abs(factor / x - 1) <= tolerance for x in values)
    ]


def _two_terms(q: Question) -> tuple[str, str] | None:
    """gradient = a soft + b hard, by least squares; declared is a = b = 1."""
    w = q.objective.hard_weight
    if not 0 < w < 1:
        return None
    soft, hard = known(q, hard_scale=0.0), known(q, soft_scale=0.0)
    columns = torch.stack([soft.flatten(), hard.flatten()], 1)
    a, b = torch.linalg.lstsq(columns, q.gradient.flatten()[:, None]).solution[:, 0]
    if float((q.gradient - a * soft - b * hard).norm() / q.gradient.norm()) > (
        q.tolerance
    ):
        return None
    a, b = float(a), float(b)

    def are(x, y) -> bool:
        return all(
            abs(m - n) <= 10 * q.tolerance * max(1, n) for m, n in ((a, x), (b, y))
        )

    evidence = f"the soft term counts {a:.4g} times, the hard term {b:.4g} times"
    if are(0.0, b):
        return "teacher_unused", evidence
    if are(a, 0.0):
        return "hard_weight_ignored", evidence
    if are(w / (1 - w), (1 - w) / w):
        return "hard_weight_swapped", evidence
    if are(1.0, q.objective.temperature**2):
        return "t2_on_hard_labels", evidence
    names = _names(_of_temperature(q), a, 10 * q.tolerance) if are(a, 1.0) else []
    return (names or ["terms_scaled"])[0], evidence


def _token_by_token(q: Question, expected) -> tuple[str, str] | None:
    """Each token's gradient a multiple of its own closed form, by another factor."""
    factors = (q.gradient * expected).sum(-1) / (expected**2).sum(-1).clamp_min(TINY)
    left = float((q.gradient - factors[:, None] * expected).norm() / q.gradient.norm())
    if len(factors) < 2 or left > q.tolerance:
        return None
    least, most = factors.aminmax()
    return (
        "tokens_weighted",
        f"tokens count {least:.3g} to {most:.3g} times their due",
    )


def _sixteen_bits(q: Question, off: float) -> str | None:
    """A gradient that has passed through 16 bits has no more digits than they have.

    By chance a float32 number is that near to one of 16 bits once in a thousand times.
    The logits, rounded by 2^-9 of themselves at most, move it no further than that.
    """
    if q.sixteen_bits or off > 2**-8 * (1 + float(q.logits.abs().max())):
        return None
    for dtype in (torch.bfloat16, torch.float16):
        for x in (q.gradient, q.gradient * q.objective.temperature):
            near = (x - x.to(dtype)).abs() <= 1e-6 * x.abs()
            if near.double().mean() > 0.99:
                bits = 1 - round(torch.tensor(torch.finfo(dtype).eps).log2().item())
                return f"its numbers have the {bits} binary digits of {dtype}"
    return None
