"""The gradient that the declared objective has, and the mistake that explains another.

On the logits z of N response tokens, for forward KL with T^2 and a token mean,

    dL/dz = (1 - hard_weight) T^2 (1 / T) (p_s - p_t) / N
            + hard_weight (p_s(T=1) - onehot(y)) / N

and for another divergence the derivative of its formula on probabilities, in float64
(loss_under_test.FORMULAS, against which the laws hold every loss). A gradient that is a
multiple of it has a wrong scale, and the factor says which. A gradient that is a
multiple of the one that a known mistake gives has that mistake.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from kdlib.doctor import thresholds
from kdlib.loss_under_test import FORMULAS
from kdlib.objective import Objective
from kdlib.sparse import sparse_divergence
from kdlib.sparse_targets import SparseTargets

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor

TINY = 1e-300  # float64 has no logarithm of 0, and 1e-300 log 1e-300 is 0
LEAST_LOG = math.log(1e-150)  # whose square is a float64 still


@dataclass(frozen=True)
class Question:
    """A sample of n of the batch's N response tokens.

    logits:   [n, V] the student's, float64
    gradient: [n, V] of the loss that is examined
    targets:  [n, V_t] the teacher's logits, or SparseTargets; None without a teacher
    ids:      [n] the response tokens
    weights:  [n] what the declared reduction multiplies each token's loss by
    others:   the weights of other reductions, by the name of the mistake
    moved:    the teacher's logits at positions that are not the right ones
    sizes:    tokens, rows, positions and such: what a denominator can be
    tolerance: relative, for rounding
    sixteen_bits: whether the model's own logits have no more
    """

    logits: Float[Tensor, "n V"]
    gradient: Float[Tensor, "n V"]
    targets: Float[Tensor, "n V_t"] | SparseTargets | None
    ids: Int64[Tensor, " n"]
    objective: Objective
    weights: Float[Tensor, " n"]
    others: dict[str, Float[Tensor, " n"]]
    moved: dict[str, Float[Tensor, "n V_t"]]
    sizes: dict[str, int]
    tolerance: float
    sixteen_bits: bool = False

    @property
    def least(self) -> float:
        """A gradient counts as no smaller: beside it p_s - p_t is rounding."""
        return thresholds.least(self.logits) * float(self.weights.norm())

    @property
    def dense(self) -> bool:
        return isinstance(self.targets, torch.Tensor)


def computable(q: Question) -> Question:
    """Without the tokens of which a probability underflows in float64.

    A logit of -inf is a column that was ruled out, and stays.
    """
    keep = torch.ones(len(q.ids), dtype=torch.bool)
    for logits in (q.logits, q.targets) if q.dense else (q.logits,):
        for t in (1.0, q.objective.temperature):
            low = (logits.double() / t).log_softmax(-1) < LEAST_LOG
            keep &= ~(low & logits.isfinite()).any(-1)
    few = keep.nonzero()[:, 0]
    return replace(
        q,
        logits=q.logits[few],
        gradient=q.gradient[few],
        targets=None if q.targets is None else q.targets[few],
        ids=q.ids[few],
        weights=q.weights[few],
        others={name: w[few] for name, w in q.others.items()},
        moved={words: x[few] for words, x in q.moved.items()},
    )


def known(q: Question, **wrong) -> Float[Tensor, "n V"]:
    """The gradient of the declared loss, or of a mistaken one.

    wrong: replaces formula, targets, weights, t_student, t_teacher, hard_weight, the
           factors soft_scale and hard_scale, or the hard term's temperature t_hard;
           `padded` fills the narrower side up with zeros instead of cutting the wider
    """
    objective = q.objective
    t = objective.temperature
    hard_weight = wrong.get("hard_weight", objective.hard_weight)
    weights = wrong.get("weights", q.weights)
    z = q.logits.detach().clone().requires_grad_()
    total = z.sum() * 0.0
    targets = wrong.get("targets", q.targets)
    if targets is not None and hard_weight < 1:
        scale = wrong.get("soft_scale", t**2 if objective.scale_by_t2 else 1.0)
        soft = _divergence(z, targets, objective, wrong)
        total = total + (1 - hard_weight) * scale * (weights * soft).sum()
    if hard_weight > 0:
        log_ps = (z / wrong.get("t_hard", 1.0)).log_softmax(-1)
        hard = -log_ps.gather(-1, q.ids[:, None])[:, 0]
        scale = wrong.get("hard_scale", 1.0)
        total = total + hard_weight * scale * (weights * hard).sum()
    return torch.autograd.grad(total, z)[0]


def _divergence(z, targets, objective, wrong):
    t, name = objective.temperature, objective.divergence
    params = objective.divergence_params
    if isinstance(targets, SparseTargets):
        return sparse_divergence(z, targets, name, temperature=t, **params)
    size = (max if wrong.get("padded") else min)(z.shape[-1], targets.shape[-1])
    q, p = (
        # a negative padding cuts
        (pad(x, (0, size - x.shape[-1])) / wrong.get(key, t)).softmax(-1)
        for x, key in ((z, "t_student"), (targets.double(), "t_teacher"))
    )
    q, p = q.clamp_min(TINY), p.clamp_min(TINY)
    if formula := wrong.get("formula"):
        return formula(p, q)
    return FORMULAS[name](p, q, **params)


def gap(q: Question, expected, factor: float = 1.0) -> float:
    """|gradient - factor expected|, relative."""
    off = float((q.gradient - factor * expected).norm())
    return off / (abs(factor) * max(float(expected.norm()), q.least) + TINY)


def multiple(q: Question, expected) -> tuple[float, float]:
    """The factor that fits best, and the gap that it leaves."""
    size = float((expected * expected).sum())
    factor = float((q.gradient * expected).sum()) / size if size else 0.0
    if factor == 0.0:
        return 0.0, float("inf")
    return factor, gap(q, expected, factor)
