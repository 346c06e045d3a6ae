"""A loss, what it says of itself, and what would then be true.

Knows: how to call a loss on a batch, and the value that its declaration implies, from
formulas on probabilities in float64. laws/ asks the questions; own_losses.py and
peers.py prepare the losses.

A convention is declared, never accused: which divergence, which mean, T^2 or not. A
contradiction between declaration and number is what the laws look for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from kdlib.errors import ArgumentError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    Probabilities = Float[Tensor, "n v"]
    PerToken = Float[Tensor, "n"]
    Formula = Callable[[Probabilities, Probabilities], PerToken]


class Batch(NamedTuple):
    """Logits as the models return them, and labels as long as the input.

    labels are -100 outside the response. Position t predicts label t + 1: that shift is
    the business of the loss.
    """

    student: Float[Tensor, "b t v"]
    teacher: Float[Tensor, "b t v"]
    labels: Int[Tensor, "b t"]


REDUCTIONS = ("token_mean", "sequence_mean", "sum")
OPTIONS = frozenset(("temperature", "hard_weight", "num_items"))
FUSED_OPTIONS = frozenset(("temperature", "softcap", "logit_scale"))


@dataclass(frozen=True)
class LossUnderTest:
    """A loss and what it says of itself. All that is not given is not asked.

    fn:          fn(student_logits, teacher_logits, labels, **options) -> scalar, with
                 the arguments of a Batch
    divergence:  a name in FORMULAS, or a formula (p_t, p_s) -> per token
    params:      the formula's parameters, e.g. {"beta": 0.3}
    reduction:   "token_mean", "sequence_mean" or "sum"
    scale_by_t2: whether the soft term is multiplied by T^2
    options:     keywords that fn takes: "temperature", "hard_weight", "num_items" (the
                 count of tokens or sequences over all micro-batches)
    knob:        (keyword, divergence at 0, divergence at 1), e.g. ("beta",
                 "forward_kl", "reverse_kl")
    dtype:       of the logits that it is given, float64 or float32, in which it is
                 held to the laws
    half:        whether it may be given bfloat16 logits
    padded:      whether it accepts a teacher with more columns than the student
    accumulate:  the sum over a list of micro-batches, as the trainer makes it; without
                 it, what reduction and num_items imply
    top_k:       (student_logits [N, V], teacher_logits [N, V], k) -> [N], seeing k
                 entries of the teacher; approximates `divergence`
    estimator:   (log p_s(y), log p_t(y)) -> elementwise loss of tokens drawn by the
                 student, to be differentiated for reverse KL
    fused:       (student_hidden [N, H_s], student_weight [V, H_s], teacher_hidden,
                 teacher_weight, **some of fused_options) -> the mean over N
    fused_options: which of temperature, softcap, logit_scale it takes
    pair:        (teacher_ids [B, T], teacher_labels, student_ids, student_labels) must
                 raise where the two views hold other response tokens
    teacher:     (module, input_ids [B, T]) -> targets of the teacher
    by_design:   {law: (words of the bug's name, the passage of its documentation that
                 states this departure)}; another bug under the same law is a failure
    reasons:     {law: why it cannot be asked here}

    Raises ArgumentError for a divergence, parameter, reduction or option that is not
    known: a misspelt option would never be asked, and nobody would notice.
    """

    name: str
    fn: Callable[..., Tensor] | None = None
    divergence: str | Formula = "forward_kl"
    params: Mapping[str, float] = field(default_factory=dict)
    reduction: str = "token_mean"
    scale_by_t2: bool = False
    options: frozenset[str] = frozenset()
    knob: tuple[str, str, str] | None = None
    dtype: torch.dtype = torch.float64
    half: bool = True
    padded: bool = False
    accumulate: Callable[[Sequence[Batch]], Tensor] | None = None
    top_k: Callable[[Tensor, Tensor, int], Tensor] | None = None
    estimator: Callable[[Tensor, Tensor], Tensor] | None = None
    fused: Callable[..., Tensor] | None = None
    fused_options: frozenset[str] = frozenset()
    pair: Callable[[Tensor, Tensor, Tensor, Tensor], object] | None = None
    teacher: Callable[[torch.nn.Module, Tensor], Tensor] | None = None
    by_design: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        _known(self.name, "reduction", [self.reduction], REDUCTIONS)
        dtypes = "torch.float32", "torch.float64"
        _known(self.name, "dtype", [str(self.dtype)], dtypes)
        _known(self.name, "option", self.options, OPTIONS)
        _known(self.name, "option of fused", self.fused_options, FUSED_OPTIONS)
        names = list(self.knob[1:] if self.knob else ())
        if not callable(self.divergence):
            names.append(self.divergence)
        _known(self.name, "divergence", names, FORMULAS)
        p, q = torch.tensor([[[0.6, 0.4]], [[0.3, 0.7]]], dtype=torch.float64)
        try:
            self.formula(p, q)
        except TypeError as error:
            raise ArgumentError(
                f"params = {dict(self.params)} of the loss {self.name!r}: {error}",
                f"give the parameters of the formula of {self.divergence!r}",
            ) from error

    def formula(self, p: Probabilities, q: Probabilities) -> PerToken:
        if callable(self.divergence):
            return self.divergence(p, q)
        return FORMULAS[self.divergence](p, q, **self.params)


def _known(loss, what, given, known) -> None:
    for x in given:
        if x not in known:
            raise ArgumentError(
                f"{what} {x!r} of the loss {loss!r}",
                f"choose one of {', '.join(sorted(known))}",
            )


class NotApplicable(Exception):
    """A law cannot be put to this loss; the message says why."""


# --- asking ---------------------------------------------------------------------------

# The responses of three rows: 3, 2 and 6 tokens, no padding after the last. With
# 8 positions and 13 tokens no two mistakes of scale are the same factor.
SPANS = ((2, 5), (4, 6), (2, 8))


def make_batch(loss: LossUnderTest, seed=0, vocab=13, scale=1.5) -> Batch:
    """Three ragged rows of 8 positions, in the dtype that the loss is given."""
    rng = torch.Generator().manual_seed(seed)
    shape = len(SPANS), 8, vocab
    student, teacher = (
        scale * torch.randn(shape, generator=rng, dtype=loss.dtype) for _ in range(2)
    )
    labels = torch.full(shape[:2], -100)
    for row, (start, stop) in enumerate(SPANS):
        labels[row, start:stop] = torch.randint(vocab, (stop - start,), generator=rng)
    labels[0, SPANS[0][0] + 1] = 0  # a token like any other
    return Batch(student, teacher, labels)


def value(loss: LossUnderTest, batch: Batch, **options: float) -> Tensor:
    """The loss of a batch, with those options that it takes; soft term alone if asked
    for nothing else."""
    if loss.fn is None:
        raise NotApplicable("it is no loss of whole sequences")
    known = loss.options | set(loss.knob[:1] if loss.knob else ())
    if "hard_weight" in known:
        options = {"hard_weight": 0.0, **options}
    return loss.fn(*batch, **{k: v for k, v in options.items() if k in known})


def differentiate(function, batch: Batch) -> tuple[float, Float[Tensor, "b t v"]]:
    """function(batch) and its gradient with respect to the student's logits."""
    leaf = batch.student.detach().clone().requires_grad_()
    total = function(batch._replace(student=leaf))
    if not total.requires_grad:
        return float(total), torch.zeros_like(leaf)
    return float(total.detach()), torch.autograd.grad(total.sum(), leaf)[0]


def ask(loss: LossUnderTest, batch: Batch, **options: float) -> tuple[float, Tensor]:
    return differentiate(lambda b: value(loss, b, **options), batch)


# --- what is true ---------------------------------------------------------------------


def predicts(labels: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """Where a supervised token is predicted: one position before it."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != -100
    return mask


def truth(loss: LossUnderTest, batch: Batch, temperature=1.0, **wrong) -> Tensor:
    """The loss that is declared, in float64.

    wrong: replaces a part by a known mistake: formula, mask [B, T], reduction, or the
           temperature of one side, t_teacher or t_student
    """
    mask = wrong.get("mask", predicts(batch.labels))
    q, p = (
        (logits.double() / wrong.get(name, temperature)).softmax(-1)[mask]
        for logits, name in ((batch.student, "t_student"), (batch.teacher, "t_teacher"))
    )
    per_token = wrong.get("formula", loss.formula)(p, q)
    if loss.scale_by_t2:
        per_token = per_token * temperature**2
    reduction = wrong.get("reduction", loss.reduction)
    if reduction == "sum":
        return per_token.sum()
    if reduction == "token_mean":
        return per_token.mean()
    _, row, length = mask.nonzero()[:, 0].unique(
        return_inverse=True, return_counts=True
    )
    return (per_token / length[row]).sum() / len(length)


def _kl(p, q):
    return (p * (p / q).log()).sum(-1)


def _jsd(p, q, beta=0.5):
    if beta in (0, 1):
        return _kl(q, p) if beta else _kl(p, q)
    m = beta * p + (1 - beta) * q
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def _adaptive(p, q, alpha=0.5):
    ordered, order = p.detach().sort(-1, descending=True)
    head = ordered.cumsum(-1) <= alpha
    head[..., 0] = True
    gap = (p - q).detach().abs()
    share = (gap.gather(-1, order) * head).sum(-1) / gap.sum(-1).clamp_min(1e-30)
    return share * _kl(p, q) + (1 - share) * _kl(q, p)


def _alpha_beta(p, q, alpha=0.5, beta=0.5):
    s = alpha + beta
    terms = alpha / s * p**s + beta / s * q**s - p**alpha * q**beta
    return terms.sum(-1) / (alpha * beta)


# p is the teacher's distribution, q the student's; both positive.
FORMULAS: dict[str, Callable[..., Tensor]] = {
    "forward_kl": _kl,
    "reverse_kl": lambda p, q: _kl(q, p),
    "kl_mix": lambda p, q, lam=0.5: (1 - lam) * _kl(p, q) + lam * _kl(q, p),
    "generalized_jsd": _jsd,
    "skew_kl": lambda p, q, alpha=0.1: _kl(p, alpha * p + (1 - alpha) * q),
    "skew_reverse_kl": lambda p, q, alpha=0.1: _kl(q, (1 - alpha) * p + alpha * q),
    "adaptive_kl": _adaptive,
    "tvd": lambda p, q: 0.5 * (p - q).abs().sum(-1),
    "alpha_beta": _alpha_beta,
    "cross_entropy": lambda p, q: -(p * q.log()).sum(-1),
}
