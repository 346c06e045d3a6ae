"""kdlib's own losses, made ready for the laws, with what their documentation says.

Every divergence, reduction, sparse tail, estimator, fused path and pairing of this
package; laws/ puts the questions, leaderboard.py shows the answers.
"""

from __future__ import annotations

import torch

from kdlib.divergences import DIVERGENCES
from kdlib.estimators import surrogate
from kdlib.fused import fused_divergence
from kdlib.heads import Head
from kdlib.loss_under_test import LossUnderTest
from kdlib.objective import Objective
from kdlib.sparse import sparse_divergence
from kdlib.sparse_targets import SparseTargets, top_k_targets
from kdlib.teachers import LiveTeacher
from kdlib.views import PairedBatch, View

KNOBS = {
    "generalized_jsd": ("beta", "forward_kl", "reverse_kl"),
    "kl_mix": ("lam", "forward_kl", "reverse_kl"),
}
PARAMS = {"generalized_jsd": {"beta": 0.3}, "kl_mix": {"lam": 0.3}}
PARAMS["alpha_beta"] = {"alpha": 0.3, "beta": 0.6}
TAILS = {  # and the departures that their documentation states
    "bucket": {},
    "renormalize": {
        "8": ("blind to mass", 'sparse.py, tail "renormalize": BLIND to the tail')
    },
    "zero": {
        "8": (
            "cut off",
            'sparse.py, tail "zero": NOT a KL, its minimum is not at p_s = p_t',
        )
    },
}
JUMP = "no knob of direction", "divergences.py: the interior goes to 0 at both ends"


def kdlib_losses() -> list[LossUnderTest]:
    """Every divergence, reduction, sparse tail, estimator and path of this package."""
    losses = [objective_loss(name) for name in DIVERGENCES]
    losses += [objective_loss("forward_kl", r) for r in ("sequence_mean", "sum")]
    losses += [fused_loss(x) for x in ("forward_kl", "reverse_kl", "generalized_jsd")]
    losses += [top_k_loss(tail) for tail in TAILS]
    losses += [top_k_loss("bucket", "reverse_kl"), _sampled()]
    losses += [_estimator(name) for name in ("k2", "score_function")]
    return [*losses, _pairs()]


def _view(labels, ids=None):
    ids = labels.clamp_min(0) if ids is None else ids
    return View(ids, torch.ones_like(ids, dtype=torch.bool), labels != -100)


def objective_loss(
    name, reduction="token_mean", params=None, dtype=torch.float64
) -> LossUnderTest:
    """The Objective with one divergence, as its trainer calls it."""
    declared = PARAMS.get(name, {}) if params is None else params

    def fn(student, teacher, labels, *, num_items=None, **options):
        settings = {
            k: options.pop(k) for k in ("temperature", "hard_weight") if k in options
        }
        params = declared | options  # what is left is the knob
        objective = Objective(
            name, reduction=reduction, divergence_params=params, **settings
        )
        view = _view(labels)
        return objective(
            view.select(student),
            view.select(teacher),
            view.input_ids[:, 1:][view.completion_mask[:, 1:]],
            row_ids=view.completion_mask[:, 1:].nonzero()[:, 0],
            num_items=num_items,
        ).total

    options = {"temperature", "hard_weight", "num_items"}
    return LossUnderTest(
        f"{name}, {reduction}",
        fn,
        divergence=name,
        params=declared,
        reduction=reduction,
        scale_by_t2=True,
        options=frozenset(options - {"num_items"} if reduction == "sum" else options),
        knob=KNOBS.get(name),
        dtype=dtype,
        padded=True,
        by_design={"10": JUMP} if name == "generalized_jsd" else {},
    )


def fused_loss(name, params=None, dtype=torch.float64) -> LossUnderTest:
    """fused_divergence from hidden states, as a mean over the tokens."""
    declared = PARAMS.get(name, {}) if params is None else params

    def fn(h, w, t_h, t_w, *, temperature=1.0, softcap=None, logit_scale=1.0):
        student, teacher = (
            Head(x, scale=logit_scale, softcap=softcap) for x in (w, t_w)
        )
        weights = h.new_full((len(h),), temperature**2 / len(h))
        return fused_divergence(
            h,
            student,
            t_h,
            teacher,
            divergence=name,
            temperature=temperature,
            token_weights=weights,
            **declared,
        ).total

    return LossUnderTest(
        f"fused {name}",
        divergence=name,
        params=declared,
        scale_by_t2=True,
        dtype=dtype,
        fused=fn,
        fused_options=frozenset(("temperature", "softcap", "logit_scale")),
    )


def top_k_loss(
    tail, divergence="forward_kl", params=None, dtype=torch.float64
) -> LossUnderTest:
    """sparse_divergence from the teacher's top k, with one of the three tails."""
    declared = PARAMS.get(divergence, {}) if params is None else params
    return LossUnderTest(
        f"top-k {divergence}, tail {tail}",
        top_k=lambda s, t, k: sparse_divergence(
            s, top_k_targets(t, k, tail), divergence, **declared
        ),
        divergence=divergence,
        params=declared,
        dtype=dtype,
        by_design=TAILS[tail],
    )


def _sampled() -> LossUnderTest:
    """Sampled targets, as the mean over every token that one draw can give."""

    def fn(student, teacher, k):
        log_pt, total = teacher.log_softmax(-1), 0.0
        for token in range(teacher.shape[-1]):
            column = log_pt[:, token : token + 1]
            drawn = SparseTargets(
                torch.full(column.shape, token),
                column,
                "zero",
                weights=torch.ones_like(column),
                vocab_size=teacher.shape[-1],
            )
            total = total + column[:, 0].exp() * sparse_divergence(student, drawn)
        return total

    return LossUnderTest("sampled forward_kl, expected", top_k=fn)


def _estimator(name) -> LossUnderTest:
    return LossUnderTest(
        f"surrogate {name}", estimator=lambda s, t: surrogate(name, s, t)
    )


def _pairs() -> LossUnderTest:
    def pair(teacher_ids, teacher_labels, student_ids, student_labels):
        return PairedBatch.from_views(
            _view(teacher_labels, teacher_ids),
            _view(student_labels, student_ids),
            torch.arange(len(student_ids)),
        )

    def teacher(module, ids):
        labels = torch.where(torch.arange(ids.shape[1]) < 2, -100, ids)
        return LiveTeacher(module).targets(pair(ids, labels, ids, labels))

    return LossUnderTest("pairs and LiveTeacher", pair=pair, teacher=teacher)
