"""Laws of the vocabulary: normalisation, padding, scale, and what top-k leaves out."""

from __future__ import annotations

import math

import torch

from kdlib.laws.frame import TOLERANCE, Finding, law, near, positive, ratio
from kdlib.loss_under_test import Batch, NotApplicable, make_batch, value

PADDED = "padded vocabulary columns take part in the softmax (museum 19)"


@law("6", "a constant added to all logits changes nothing")
def logit_shift(loss):
    """L(z_s + c, z_t) = L(z_s, z_t + c) = L(z_s, z_t), for a c of each position.

    And where the teacher's head has more columns than the student's: one model on both
    sides has D = 0, whatever the level of the student's logits.

    Why:  softmax(z + c) = softmax(z). A number that changes is no function of the two
          distributions. Padding the student with logit 0 is such a case: how much
          probability a 0 takes depends on c.
    Bugs: exp without subtracting the maximum; logits compared in place of
          probabilities; missing columns filled with 0 (linkedin/Liger-Kernel) or with
          the other model's logits (modelscope/ms-swift), museum 19.
    """
    batch = make_batch(loss)
    # Multiples of 1/256, so that adding 1024 is exact in float32 as well.
    batch = Batch(*(torch.round(x * 256) / 256 for x in batch[:2]), batch.labels)
    expected = positive(value(loss, batch))
    shift = torch.tensor([1024.0, -1024.0], dtype=loss.dtype).repeat(4)[:, None]
    for side in ("student", "teacher"):
        moved = batch._replace(**{side: getattr(batch, side) + shift})
        measured = float(value(loss, moved))
        if not near(loss, measured, expected):
            bug = f"the softmax of the {side} overflows or is not normalised"
            return Finding(measured, expected, bug)
    if not loss.padded:
        note = "vocabularies of different size are not accepted, so not asked about"
        return Finding(measured, expected, None, note)
    # 4 untrained columns of the teacher (logit 0), far below its own
    student = batch.student + 40
    untrained = torch.zeros_like(student[..., :4])
    padded = Batch(student, torch.cat([student, untrained], dim=-1), batch.labels)
    expected = float(value(loss, padded._replace(teacher=student)))
    for lowered in (0.0, 40.0):
        measured = float(value(loss, padded._replace(student=student - lowered)))
        if not near(loss, measured, expected):
            level = f"student's logits {-lowered:+.0f}"
            return Finding(f"{measured:.3g}, {level}", expected, PADDED)
    return Finding(measured, expected, None)


@law("7", "the scale does not depend on the size of the vocabulary")
def vocabulary_scale(loss):
    """L with 4 V more tokens, which both models rule out (logit -1e4), is L.

    Why:  D is a sum over the vocabulary. torch's reduction="mean" divides it by V as
          well, which is a learning rate 32,000 or 150,000 times smaller.
    Bugs: F.kl_div(..., reduction="mean") (haitongli/knowledge-distillation-pytorch#2,
          NVIDIA ModelOpt's default, museum 6); a mean over tokens that divides by
          tokens times V (huggingface/trl#4105, museum 7); 0 log 0 = NaN
          (linkedin/Liger-Kernel#769, museum 23).
    """
    batch = make_batch(loss)
    dead = torch.full_like(batch.student, -1e4).repeat(1, 1, 4)
    wide = Batch(*(torch.cat([x, dead], dim=-1) for x in batch[:2]), batch.labels)
    times = ratio(float(value(loss, wide)), positive(value(loss, batch)))
    bug = None
    if not near(loss, times, 1.0):
        bug = "the scale depends on the vocabulary (museum 7)"
        if not math.isfinite(times):
            bug = "tokens of no probability give NaN (museum 23)"
        if near(loss, times, 0.2):
            bug = "mean over the vocabulary: V times too small (museum 6)"
    return Finding(f"{times:.4g} times at 5 V", "1 times", bug)


@law("8", "top-k: never negative, dense at k = V, sees the tail")
def top_k(loss):
    """D_k = D at k = V; D_k > 0 where D is large; D_k is smallest at p_s = p_t.

    Why:  what a sparse loss leaves out, the student is free to do. Cut off, the sum is
          no divergence: it is negative for an over-confident student, and its minimum
          puts all mass on the teacher's top k. Renormalised, it is blind to mass
          elsewhere. One bucket for the rest mends both.
    Bugs: renormalised on the teacher's top k (ms-swift, NVIDIA ModelOpt, axolotl,
          museum 14) or on the student's (TRL's SDFT, museum 15); cut off, then clamped
          at 0, where the gradient dies (verl-project/verl#7856, museum 16); reverse KL
          without a tail (verl-project/verl#5041, museum 17).
    """
    if loss.top_k is None:
        raise NotApplicable("it takes no sparse targets")
    rng, k = torch.Generator().manual_seed(3), 4
    student, teacher = 2 * torch.randn(2, 6, 32, generator=rng, dtype=loss.dtype)
    order = teacher.argsort(-1, descending=True).argsort(-1)
    best, worst = order < k, order >= 32 - k

    def compare(s, t, k=k):
        dense = loss.formula(t.double().softmax(-1), s.double().softmax(-1))
        return loss.top_k(s, t, k).double(), dense

    for measured, dense in zip(*compare(student, teacher, 32), strict=True):
        if not near(loss, float(measured), float(dense)):
            return Finding(measured, dense, "not the dense loss at k = V")
    cases = {  # (student, teacher), each with a divergence far from zero
        "negative, or clamped to nothing: cut off, no divergence (museum 16)": (
            1.4 * teacher,
            teacher,
        ),
        # right ratios on the teacher's best tokens, and nearly all mass elsewhere
        "blind to mass that the student puts in the tail (museum 14, 17)": (
            torch.where(best, teacher - 8.0, student),
            teacher,
        ),
        # right ratios on the student's best tokens, and the teacher is elsewhere
        "blind to a mode that the student lacks (museum 15)": (
            teacher,
            torch.where(worst, student + 12.0, teacher),
        ),
    }
    for bug, case in cases.items():
        measured, dense = compare(*case)
        row = int((measured - 0.02 * dense).argmin())
        # a bucket hides part of the divergence, never 98 % of it in these cases
        if not measured[row] >= 0.02 * dense[row]:
            return Finding(measured[row], f"near {dense[row]:.3g}", bug)
    # Values, not slopes: total variation has a kink there.
    least, best = loss.top_k(teacher, teacher, k), best.to(teacher.dtype)
    steps = [loss.top_k(teacher + step * best, teacher, k) for step in (1e-3, -1e-3)]
    change = float(torch.stack(steps).sub(least).min())
    bug = None
    if not change > -0.01 * TOLERANCE[loss.dtype]:
        bug = "cut off: its minimum is not at p = q, so the student gets over-confident"
    return Finding(f"{change:+.1e} beside p = q", "no less than at p = q", bug)
