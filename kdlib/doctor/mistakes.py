"""The mistakes that are known, each with the gradient that it would give."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kdlib.doctor.closed_form import TINY, Question, known, multiple
from kdlib.doctor.thresholds import LEARNT
from kdlib.loss_under_test import FORMULAS


def mistakes(q: Question, expected) -> Iterator[tuple[str, str, float, float]]:
    """(name, words, factor, gap) of every mistake that is one here."""
    for name, words, wrong in candidates(q):
        mistaken = known(q, **wrong)
        norm = float(mistaken.norm())
        if not norm > LEARNT * float(q.weights.norm()):
            continue  # next to nothing, which times a large factor would fit anything
        scale = float((expected * mistaken).sum()) / norm**2
        apart = float((expected - scale * mistaken).norm())
        if apart <= q.tolerance * max(float(expected.norm()), q.least):
            continue  # the same as what is right, on this batch
        yield name, words, *multiple(q, mistaken)


def candidates(q: Question) -> Iterator[tuple[str, str, dict]]:
    objective, t = q.objective, q.objective.temperature
    for name, weights in q.others.items():
        yield name, name.replace("_", " "), {"weights": weights}
    if objective.hard_weight > 0:
        yield "hard_labels_softened", "hard labels at T", {"t_hard": t}
    if not q.dense or objective.hard_weight == 1:
        return
    own = FORMULAS[objective.divergence]
    params = objective.divergence_params
    yield (
        "direction_swapped",
        "the arguments swapped",
        {"formula": lambda p, q: own(q, p, **params)},
    )
    for words, wrong in {
        "a teacher that is softened alone": {"t_student": 1.0},
        "a student that is softened alone": {"t_teacher": 1.0},
    }.items():
        yield "temperature_on_one_side", words, wrong
    for name, words, both in (
        ("temperature_ignored", "both at temperature 1", (1.0, 1.0)),
        ("temperature_inverted", "logits times T", (1 / t, 1 / t)),
        ("temperature_twice", "both divided by T twice", (t**2, t**2)),
        ("temperature_twice", "the teacher divided by T twice", (t, t**2)),
        ("temperature_twice", "the student divided by T twice", (t**2, t)),
    ):
        yield name, words, dict(zip(("t_student", "t_teacher"), both, strict=True))
    for name, words, formula in (
        (
            "probabilities_for_logs",
            "-sum p_t p_s",
            lambda p, q: -(p * q).sum(-1),
        ),
        (
            "another_divergence",
            "the squared difference of probabilities",
            lambda p, q: ((p - q) ** 2).sum(-1),
        ),
        (
            "clamped_log_probs",
            "log p_s clamped at -10",
            lambda p, q: -(p * q.log().clamp_min(-10)).sum(-1),
        ),
        (
            "softmax_twice",
            "a teacher's softmax taken twice",
            lambda p, q: own(p.softmax(-1), q, **params),
        ),
        (
            "softmax_twice",
            "a student's softmax taken twice",
            lambda p, q: own(p, q.softmax(-1), **params),
        ),
        (
            "argmax_for_distribution",
            "the teacher's likeliest token",
            lambda p, q: -q.log().gather(-1, p.argmax(-1, keepdim=True))[:, 0],
        ),
    ):
        yield name, words, {"formula": formula}
    for words, targets in q.moved.items():
        yield "teacher_shifted", words, {"targets": targets}
    if q.logits.shape[-1] != q.targets.shape[-1]:
        yield "vocabulary_padded", "columns padded with the logit 0", {"padded": True}
    for name, formula in FORMULAS.items():
        if name != objective.divergence:
            yield "another_divergence", name, {"formula": formula}


# --- Gradients that are told by their shape ---


def sampled_token(q: Question) -> tuple[str, str] | None:
    """Every row a multiple of onehot(y) - p_s: one token's log-probability alone.

    With a the multiple, 1 - p_t(y) / p_s(y) is k3's, log p_s(y) - log p_t(y) that of k2
    and of the score function, whose expectation over y from p_s is reverse KL's: there
    the name is empty, because nothing is wrong.
    """
    if not q.dense or q.logits.shape[-1] > q.targets.shape[-1]:
        return None
    log_ps = q.logits.log_softmax(-1)
    log_pt = q.targets.double()[:, : log_ps.shape[-1]].log_softmax(-1)
    chosen = q.ids[:, None]
    slope = torch.zeros_like(log_ps).scatter(-1, chosen, 1.0) - log_ps.exp()
    a = (q.gradient * slope).sum(-1) / (slope * slope).sum(-1).clamp_min(TINY)
    left = float((q.gradient - a[:, None] * slope).norm() / q.gradient.norm())
    if left > q.tolerance:
        return None
    ratio = (log_ps - log_pt).gather(-1, chosen)[:, 0]

    def fits(values) -> bool:
        return float((a / q.weights - values).norm() / values.norm()) <= q.tolerance

    if q.objective.divergence == "reverse_kl" and fits(ratio):
        return "", "an unbiased estimate"
    if fits(1 - (-ratio).exp()):
        return "k3_gradient", "each token's gradient is 1 - p_t(y) / p_s(y) times that"
    return "sampled_token_only", "only the response token's own log-probability moves"


def top_k(q: Question) -> tuple[str, str] | None:
    """Forward KL from the teacher's k best tokens alone.

    Renormalised, the gradient is zero elsewhere. Cut off, it is c p_s elsewhere, with c
    the teacher's mass on the k tokens, times the same weight.
    """
    if not q.dense or q.objective.divergence != "forward_kl":
        return None
    vocab = min(q.logits.shape[-1], q.targets.shape[-1])
    g, t = q.gradient[:, :vocab], q.objective.temperature
    # A log_softmax over the whole vocabulary leaves rounding where nothing should be.
    touched = (g.abs() > 1e-5 * g.abs().amax(-1, keepdim=True)).sum(-1)
    k = int(touched.max())
    if k < vocab // 2 and bool((touched == k).all()):
        return "top_k_renormalised", f"{k} of {vocab} columns get gradient"
    p_s, p_t = ((x.double()[:, :vocab] / t).softmax(-1) for x in (q.logits, q.targets))
    ratio = g / p_s.clamp_min(TINY)
    elsewhere = ratio.median(-1, keepdim=True).values
    k = int(((ratio / elsewhere - 1).abs() > 10 * q.tolerance).sum(-1).max())
    if not 0 < k < vocab // 2:
        return None
    best, at = p_t.topk(k, dim=-1)
    mass = best.sum(-1, keepdim=True)
    expected = (mass * p_s).scatter_add(-1, at, -best) * q.weights[:, None]
    factor = float((g * expected).sum() / (expected * expected).sum())
    if float((g - factor * expected).norm() / g.norm()) > q.tolerance:
        return None
    return "top_k_tail_cut", f"as from {k} tokens with {float(mass.mean()):.3f} of p_t"


def squared_logits(q: Question) -> tuple[str, str] | None:
    """Every row a multiple of z_s - z_t, as from the squared difference of logits."""
    if not q.dense:
        return None
    vocab = min(q.logits.shape[-1], q.targets.shape[-1])
    g, apart = q.gradient[:, :vocab], q.logits[:, :vocab] - q.targets[:, :vocab]
    factor = float((g * apart).sum() / (apart * apart).sum().clamp_min(TINY))
    if not factor or float((g - factor * apart).norm() / g.norm()) > q.tolerance:
        return None
    return "another_divergence", "it is that of the squared difference of logits"
