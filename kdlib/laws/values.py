"""Laws of the value: what the loss says of equal, swapped and mixed models."""

from __future__ import annotations

import torch

from kdlib.laws.frame import TOLERANCE, Finding, law, near, ratio, roughly
from kdlib.loss_under_test import (
    FORMULAS,
    Batch,
    NotApplicable,
    ask,
    make_batch,
    truth,
    value,
)

NO_ENTROPY = "the teacher's entropy is not subtracted: a cross-entropy reported as KL"
SWAPPED = "the direction of the divergence is swapped (museum 12)"


@law("1", "zero, with zero gradient, at p = q")
def zero_at_equality(loss):
    """D(p, p) = 0 and dD/dz_s = 0. (Of a cross-entropy: the teacher's entropy.)

    Why:  a student that has become its teacher has nothing left to learn. If the loss
          still pulls, it pulls towards something that is not the teacher.
    Bugs: a fused path that trains half on hard labels (huggingface/trl#5731); the
          teacher's entropy reported as distance (the PyTorch tutorial;
          haitongli/knowledge-distillation-pytorch#2); p log-softmaxed on one side only
          (microsoft/ProDA#20).
    """
    batch = make_batch(loss)
    batch = batch._replace(teacher=batch.student.clone())
    measured, gradient = ask(loss, batch)
    expected, slope = float(truth(loss, batch)), float(gradient.abs().max())
    other = torch.where(batch.labels < 0, -100, batch.labels // 2)
    bug = None
    if not (near(loss, measured, expected) and slope < 0.01 * TOLERANCE[loss.dtype]):
        bug = "identical models are not at the minimum"
        if not roughly(float(value(loss, batch._replace(labels=other))), measured):
            bug = "hard labels in the soft loss (museum 20)"
        elif _is_entropy(loss, batch, measured):
            bug = NO_ENTROPY
    return Finding(
        f"{measured:.3g}, slope {slope:.0e}", f"{expected:.3g}, slope 0", bug
    )


@law("i3", "zero at p = q, at T = 2")
def zero_at_temperature(loss):
    """D(p, p) = 0 when both sides are softened: softmax(z / 2) against softmax(z / 2).

    Why:  temperature divides the logits of both sides or it compares two different
          softenings, whose distance is not zero even between equal models. At T = 1
          (law 1) that cannot be seen.
    Bugs: only one side is softened (a sampling temperature taken for the loss's,
          museum 22); the teacher's entropy is not subtracted.
    """
    if "temperature" not in loss.options:
        raise NotApplicable("it has no temperature; law 1 asks this at T = 1")
    batch, t = make_batch(loss, seed=4), 2.0
    batch = batch._replace(teacher=batch.student.clone())
    measured = float(value(loss, batch, temperature=t))
    expected = float(truth(loss, batch, t))
    one_sided = (
        float(truth(loss, batch, t, **{side: 1.0}))
        for side in ("t_student", "t_teacher")
    )
    bug = None
    if not near(loss, measured, expected):
        bug = "identical models do not agree"
        if _is_entropy(loss, batch, measured, t):
            bug = NO_ENTROPY
        elif any(roughly(measured, x) for x in one_sided):
            bug = "only one side is softened (museum 22)"
    return Finding(measured, expected, bug)


def _is_entropy(loss, batch, measured, temperature=1.0) -> bool:
    entropy = truth(loss, batch, temperature, formula=FORMULAS["cross_entropy"])
    return roughly(measured, float(entropy))


@law("2", "direction, on a pair that is worked by hand")
def direction(loss):
    """D(a, b), D(b, a) and D(a, c) are in the declared proportion, where

        a = (.6, .3, .1)    b = (.2, .3, .5)    c = (.1, .3, .6)

    For forward KL the first two are .6 ln 3 + .1 ln .2 = 0.498 and .2 ln(1/3) + .5 ln 5
    = 0.585. c is there for symmetric divergences, in which a swap does not show and is
    no bug. A proportion, so that a wrong scale is left to the laws about scale.

    Why:  KL(teacher || student) covers the teacher's modes, KL(student || teacher)
          picks one. Both fall during training, and both are called KL.
    Bugs: F.kl_div(input, target) is KL(target || input), and is read the other way
          round (paiml/aprender#2153; museum 12); JSD's mixture or a skew with its
          weights swapped.
    """
    a, b, c = torch.tensor(
        [[0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.1, 0.3, 0.6]], dtype=loss.dtype
    )
    labels = torch.tensor([[-100, 0, 0]])

    def teacher_student(p, q):  # the same at each position, so that shifts do not show
        student, teacher = (x.log().repeat(1, 3, 1) for x in (q, p))
        return float(value(loss, Batch(student, teacher, labels)))

    pairs = (a, b), (b, a), (a, c)
    measured = torch.tensor([teacher_student(*pair) for pair in pairs]).double()
    expected = torch.stack(
        [loss.formula(p[None].double(), q[None].double())[0] for p, q in pairs]
    )
    # each in proportion to the sum of the first two, which a swap leaves as it is
    measured, expected = (x / x[:2].sum().abs() for x in (measured, expected))

    def agrees(order):
        return all(
            near(loss, *both)
            for both in zip(measured[order].tolist(), expected.tolist(), strict=False)
        )

    bug = None
    if not agrees([0, 1, 2]):
        bug = "another divergence than the one declared"
        if agrees([1, 0]) and not near(loss, *expected[:2].tolist()):
            bug = SWAPPED
    shown = (" : ".join(f"{x:.4f}" for x in y) for y in (measured, expected))
    return Finding(*shown, bug)


@law("10", "the knob between two divergences makes no jump")
def knob(loss):
    """D at 0 and at 1 are the two named ends, and D(0.001), D(0.999) are near them.

    Why:  a parameter that is said to lead from forward to reverse KL is swept in
          experiments. The generalised JSD, beta KL(p || m) + (1 - beta) KL(q || m),
          m = beta p + (1 - beta) q, does not lead there: inside it goes to 0 at both
          ends, and the ends are KLs by convention. D(0) = 3.9, D(.001) = .004.
    Bugs: beta sold as a knob of direction (modelscope/ms-swift#10078, museum 11);
          its ends swapped, or taken for each other by reviewers of right code
          (huggingface/trl#4935, modelscope/twinkle#112, museum 12).
    """
    if loss.knob is None:
        raise NotApplicable("it has no knob from one divergence to another")
    batch, (name, *ends) = make_batch(loss), loss.knob
    places = (0.0, 0.001, 0.999, 1.0)
    at = [float(value(loss, batch, **{name: x})) for x in places]
    low, high = (float(truth(loss, batch, formula=FORMULAS[end])) for end in ends)
    inside = max(abs(ratio(at[1], low) - 1), abs(ratio(at[2], high) - 1))
    bug = None
    if roughly(at[0], high) and roughly(at[3], low):
        bug = f"the ends of {name} are swapped (museum 12)"
    elif not (near(loss, at[0], low) and near(loss, at[3], high)):
        bug = f"{name} does not lead to {ends[0]} and {ends[1]}"
    # a step of 0.001 moves a continuous D by about 0.001 of its range
    elif not inside < 0.02:
        bug = f"{name} is no knob of direction: it jumps at its ends (museum 11)"
    measured = ", ".join(f"D({x:g}) = {d:.3g}" for x, d in zip(places, at, strict=True))
    return Finding(measured, f"from {low:.3g} to {high:.3g}", bug)
