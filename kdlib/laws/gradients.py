"""Laws of the gradient: what the optimiser is told, and no loss curve shows."""

from __future__ import annotations

import math

import torch

from kdlib.exact import (
    ExactLM,
    estimator_moments,
    on_policy_gradient,
    sequence_forward_kl,
)
from kdlib.laws.frame import Finding, gap, law, near, parallel, ratio, roughly, same
from kdlib.laws.values import SWAPPED
from kdlib.loss_under_test import (
    FORMULAS,
    NotApplicable,
    ask,
    differentiate,
    make_batch,
    predicts,
    truth,
)


@law("i1", "the closed-form gradient, at T = 2")
def closed_form(loss):
    """dL/dz_s = T^2 (1 / T) (p_s - p_t) / N on the N supervised tokens, 0 elsewhere.

    For forward KL with T^2 and a token mean; for another divergence, scale or mean, the
    derivative of its formula on probabilities, in float64.

    Why:  it sees the scale, the direction, the temperature, the mask and the mean at
          once: of the 13 bugs of the teaching lab it alone catches 11. One token of the
          batch has a sure teacher and a student far off, where clamps show.
    Bugs: too many to list; _name knows twenty. Among them a missing T^2
          (TropComplique/knowledge-distillation-keras#2), the teacher on both sides
          (labmlai/annotated_deep_learning_paper_implementations#66), log-probabilities
          clamped at -10 (verl, museum 18), a denominator that counts other tokens than
          those in the loss (TRL's GKD on-policy, museum 9).
    """
    batch, t = make_batch(loss), 2.0 if "temperature" in loss.options else 1.0
    batch.student[0, 2, 0], batch.teacher[0, 2, 0] = -14.0 * t, 9.0 * t
    gradient = ask(loss, batch, temperature=t)[1]

    def known(**wrong):
        return differentiate(lambda b: truth(loss, b, t, **wrong), batch)[1]

    expected = known()
    right = same(loss, gradient, expected)
    bug = None if right else _name(loss, batch, t, gradient, known)
    note = "" if t == 2.0 else "asked at T = 1: it has no temperature"
    return Finding(f"off by {gap(gradient, expected):.2g}", "off by 0", bug, note)


def _name(loss, batch, t, gradient, known) -> str:
    """The known mistake whose gradient this is: a factor, or another direction."""
    expected, rows = known(), len(batch.labels)
    tokens = int((batch.labels[:, 1:] != -100).sum())
    positions, vocab = batch.labels.numel(), batch.student.shape[-1]
    if not gradient.any():
        return "no gradient: the teacher's logits on both sides (labml#66)"
    factor = float((gradient * expected).sum() / (expected * expected).sum())
    factors = {
        "T^2 is missing (museum 22)": [t**-2],
        "T in place of T^2 (museum 22)": [1 / t],
        "T^2 where none is declared (museum 22)": [t**2],
        "mean over the vocabulary (museum 6)": [1 / vocab, 1 / vocab / t**2],
        "padding counts in the mean (museum 4)": [
            tokens / positions,
            tokens / (positions - rows),
        ],
        "divided by rows, not by tokens": [tokens / rows],
        "a sum where a mean is declared": [tokens],
        "the sign is wrong": [-1.0],
    }
    if gap(gradient, expected) < 1e-3:
        return "nearly the right gradient: an epsilon, or too few digits"
    if gap(gradient, factor * expected) < 1e-3:
        for bug, values in factors.items():
            if any(roughly(factor, x) for x in values):
                return bug
        return f"the gradient is {factor:.3g} times what it should be"
    supervised, shifted = batch.labels != -100, torch.ones_like(batch.labels).bool()
    shifted[:, -1] = False
    mistakes = {
        SWAPPED: {"formula": lambda p, q: loss.formula(q, p)},
        "only the teacher is softened": {"t_student": 1.0},
        "only the student is softened": {"t_teacher": 1.0},
        "the temperature is ignored (museum 22)": {"t_student": 1.0, "t_teacher": 1.0},
        "probabilities in the place of log-probabilities (ProDA#20)": {
            "formula": lambda p, q: -(p * q).sum(-1)
        },
        "clamped: no gradient where the student is most wrong (museum 18)": {
            "formula": lambda p, q: -(p * q.log().clamp_min(-10)).sum(-1)
        },
        "label shift off by one (museum 1)": {"mask": supervised},
        "label shift off by one, without the end token (museum 2)": {
            "mask": supervised & predicts(batch.labels)
        },
        "padding or prompt in the loss (museum 4)": {"mask": shifted},
        "sequence means are averaged (torchtune#1865)": {"reduction": "sequence_mean"},
        "tokens are averaged": {"reduction": "token_mean"},
    }
    for bug, wrong in mistakes.items():
        mistaken = known(**wrong)  # which may be no mistake here
        if parallel(gradient, mistaken) and not parallel(mistaken, expected):
            return bug
    return "not the gradient of the divergence that is declared"


@law("i2", "at hard_weight 1, cross-entropy at temperature 1")
def hard_weight_one(loss):
    """L(hard_weight = 1) = mean_t -log softmax(z_s[t])[y_t], in value and gradient.

    Asked at temperature 2, which belongs to the soft term alone.

    Why:  the baseline of every distillation experiment is this same code with the
          teacher weighted 0. If it is not cross-entropy, the gain is measured against
          something else.
    Bugs: hard_weight weighs the soft term; the cross-entropy is softened as well, or
          multiplied by T^2 (rows 4 and 11 of the lab's 13).
    """
    if "hard_weight" not in loss.options:
        raise NotApplicable("it has no hard-label term")
    batch = make_batch(loss)
    measured, gradient = ask(loss, batch, temperature=2.0, hard_weight=1.0)
    # Hard labels are a teacher who is certain of the next token.
    following = batch.labels.roll(-1, 1).clamp_min(0)
    certain = torch.nn.functional.one_hot(following, batch.student.shape[-1]) * 1e4

    def known(b, t=1.0):
        hard = b._replace(teacher=certain)
        return truth(loss, hard, formula=FORMULAS["cross_entropy"], t_student=t)

    expected, slope = differentiate(known, batch)
    bug = None
    if not (same(loss, gradient, slope) and near(loss, measured, expected)):
        bug = "at hard_weight 1 it is not the cross-entropy"
        if roughly(measured, float(known(batch, 2.0))):
            bug = "the cross-entropy is softened as well"
        elif roughly(measured, float(truth(loss, batch, 2.0))):
            bug = "hard_weight is swapped: it weighs the soft term"
    shown = f"{measured:.4g}, gradient off by {gap(gradient, slope):.2g}"
    return Finding(shown, expected, bug)


@law("11", "with T^2, the gradient keeps its scale as T grows")
def temperature(loss):
    """|dL/dz_s| at T = 512 over that at T = 64 is 8^n, with the n of the declared loss.

    For a KL without T^2, p_s - p_t shrinks like 1 / T and is divided by T: n = -2. With
    T^2, n = 0, and the gradient tends to (z_s - z_t) / V up to constants: the matching
    of logits (Hinton et al. 2015, arXiv 1503.02531, section 2.1).

    Why:  T^2 keeps the balance with the hard labels when T is tuned. Declared or not is
          a convention; in between is none.
    Bugs: T^2 missing, doubled, or T in its place (keras-team/keras-io#869,
          IntelLabs/distiller#122, museum 22); only one side softened.
    """
    if "temperature" not in loss.options:
        raise NotApplicable("it has no temperature")
    batch = make_batch(loss)

    def exponent(gradient_at):
        low, high = (float(gradient_at(t)[1].norm()) for t in (64.0, 512.0))
        return math.log(high / low) / math.log(8) if low and high else -math.inf

    measured = exponent(lambda t: ask(loss, batch, temperature=t))
    expected = exponent(lambda t: differentiate(lambda b: truth(loss, b, t), batch))
    off = measured - expected
    bug = None
    if not abs(off) < 0.01:  # of a power of T that is a whole number
        bug = "only one side is softened"
        if math.isinf(off):
            bug = "no gradient reaches the student"
        elif abs(off + 2) < 0.05:
            bug = "T^2 is missing (museum 22)"
        elif abs(off + 1) < 0.05:
            bug = "T in place of T^2 (museum 22)"
        elif abs(off - 2) < 0.05:
            bug = "T^2 not declared, or the student is not softened (museum 22)"
    return Finding(f"T^{measured:.2f}", f"T^{expected:.2f}", bug)


@law("9", "an estimator's expected gradient, by enumeration")
def estimator(loss):
    """E_{y ~ p_s}[grad l(log p_s(y), log p_t(y))] = grad KL(p_s || p_t), by token.

    The expectation is a sum over every sequence of a model with 5 tokens and length 2.
    Its variance must not exceed that of (log p_s - log p_t).detach() log p_s.

    Why:  the gradient of an unbiased estimate is not an unbiased estimate of the
          gradient, for y is drawn from the distribution that is differentiated.
    Bugs: k1 back-propagated, gradient 0 in expectation (museum 13); k3, which gives
          FORWARD KL's (verl's recommendation; pytorch/rl#4038); an advantage that is
          not detached: right in the mean, 2 times the variance (TRL's MiniLLM,
          museum 25).
    """
    if loss.estimator is None:
        raise NotApplicable("it estimates nothing from samples")
    teacher, student = (ExactLM.random(5, 2, scale=0.5, seed=s) for s in (1, 2))
    moments = estimator_moments(loss.estimator, teacher, student)
    best = estimator_moments(lambda s, t: (s - t).detach() * s, teacher, student)
    gradient, reverse = map(
        _flat, (moments.gradient, on_policy_gradient(teacher, student))
    )
    leaves = student.leaves()
    forward_kl = sequence_forward_kl(teacher, leaves).sum()
    forward = _flat(torch.autograd.grad(forward_kl, leaves.tables))
    noise = ratio(float(moments.gradient_variance), float(best.gradient_variance))
    error, bug = gap(gradient, reverse), None
    measured = f"off by {error:.2g}, {noise:.2f} times the variance"
    if not same(loss, gradient, reverse):
        bug = "its expected gradient is not that of reverse KL"
        if float(gradient.norm()) < 1e-6:
            bug = "its expected gradient is zero, like that of k1 (museum 13)"
        elif parallel(gradient, forward):
            measured = "cosine 1.0000 with forward KL"
            bug = "its expected gradient is that of FORWARD KL, like k3's (museum 13)"
    elif noise > 1.01:
        bug = "un-detached advantage: the same mean, a noisier gradient (museum 25)"
    return Finding(measured, "the gradient of reverse KL", bug)


def _flat(tensors):
    return torch.cat([x.flatten() for x in tensors])
