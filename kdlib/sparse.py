"""What a student loses to sparse teacher targets, k tokens of the vocabulary each.

Knows: what to do with the rest of the teacher's probability, and what each choice
costs. Does not know how the k tokens were chosen (sparse_targets.py).

`tail` says what becomes of the teacher's probability outside the k tokens:

- "bucket": all the rest is one more event, on both sides. A true divergence between
  coarser distributions: never negative, never above the dense one, equal to it at
  k = V. It sees how much mass the student puts elsewhere, but not where.
- "zero": the sum is cut off, the student stays normalised over the whole vocabulary.
  NOT a KL: it can be negative, and its minimum is not at p_s = p_t: the student is
  drawn to the renormalised top k, sharper than the teacher (k too small shows as
  over-confidence).
- "renormalize": both sides are renormalised on the k tokens. BLIND to the tail: a
  student with nearly all its mass elsewhere has loss 0 if its k ratios are right. Where
  the student rules all k out (-inf) there is nothing to renormalise: NaN.

Randomly sampled targets (sampled_targets) have no such bias: their expected loss and
gradient are those of the dense forward KL, whatever the number of samples.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from kdlib.divergences import get_divergence, tempered
from kdlib.errors import ArgumentError
from kdlib.sparse_targets import SparseTargets, check_logits

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    Logits = Float[Tensor, "n v"]
    KeptIds = Int[Tensor, "n k"]
    Kept = Float[Tensor, "n k"]
    PerToken = Float[Tensor, "n"]

LINEAR = ("forward_kl", "cross_entropy")  # in the teacher's distribution


def sparse_divergence(
    student_logits: Logits,
    targets: SparseTargets,
    divergence: str = "forward_kl",
    *,
    temperature: float = 1.0,
    **params: float,
) -> PerToken:
    """Divergence of the student from sparse targets, per token [N], in nats.

    With tail "bucket" and "renormalize" every divergence of divergences.py is defined.
    "zero" and sampled targets cut a sum over the teacher's tokens, so they allow only
    what is linear in p_t: with w = p_t (tail "zero") or count / n (sampled),

        forward_kl = sum_k w (log p_t - log p_s),    cross_entropy = -sum_k w log p_s

    and gradient d/dz_s = (p_s sum_k w - w) / T.

    Raises ArgumentError for another temperature than the targets', a token outside the
    student's vocabulary, or a divergence that the tail does not define.
    """
    check_logits("student_logits", student_logits)
    get_divergence(divergence, **params)
    if len(student_logits) != len(targets):
        raise ArgumentError(
            f"student_logits {list(student_logits.shape)} for {len(targets)} targets",
            "give one row of logits for each target",
        )
    targets = checked(targets, student_logits.shape[1], divergence, temperature)
    return of_logits(student_logits, targets, divergence, **params)


def checked(
    targets: SparseTargets, student_vocab: int, divergence: str, temperature: float
) -> SparseTargets:
    """The targets, if sparse_divergence is defined for them; raises what it raises.

    On a GPU this waits for all its work: once for many rows, not once for a few.
    """
    if temperature != targets.temperature:
        raise ArgumentError(
            f"temperature = {temperature}, but the targets were made at "
            f"{targets.temperature}",
            "use the targets' temperature, or make targets at the one you want",
        )
    indices, vocab = targets.indices, student_vocab
    if targets.vocab_size is not None:
        vocab = min(vocab, targets.vocab_size)
    low, high = torch.stack(indices.aminmax()).tolist() if indices.numel() else (0, 0)
    if low < 0 or high >= vocab:
        raise ArgumentError(
            f"target token ids from {low} to {high}, but the student's vocabulary has "
            f"{vocab} tokens",
            "cut the teacher's logits to the shared vocabulary before making targets",
        )
    if targets.tail == "zero" and divergence not in LINEAR:
        kind = 'tail "zero"' if targets.weights is None else "sampled targets"
        raise ArgumentError(
            f"divergence {divergence!r} with {kind}",
            'use "forward_kl" or "cross_entropy", or top-k targets with tail="bucket"',
        )
    if targets.tail == "bucket" and indices.shape[1] == vocab:
        return replace(targets, tail="renormalize")  # all are kept: there is no rest
    return targets


def of_logits(
    student_logits: Logits, targets: SparseTargets, divergence: str, **params: float
) -> PerToken:
    """sparse_divergence of `checked` targets."""
    z = tempered(student_logits[:, : targets.vocab_size], targets.temperature)
    kept, total = _Gathered.apply(z, targets.indices.long(), without_kept(targets))
    return of_kept(kept, total, targets, divergence, **params)


def without_kept(targets: SparseTargets) -> bool:
    """Is `total` of `gathered` that of the other tokens alone?"""
    return targets.tail != "zero"


def of_kept(
    kept: Kept,
    total: PerToken,
    targets: SparseTargets,
    divergence: str,
    **params: float,
) -> PerToken:
    """The divergence from what it depends on, `gathered`'s kept and total."""
    if targets.tail != "zero":
        student, teacher = _coarse(kept, total, targets)
        return get_divergence(divergence, **params)(student, teacher)
    log_pt, weights = _terms(kept, targets)
    log_ps = kept - total[:, None]
    terms = (log_pt if divergence == "forward_kl" else 0.0) - log_ps
    return (weights * terms.where(weights > 0, 0.0)).sum(-1)


@torch.no_grad()
def kept_gradient(
    kept: Kept,
    total: PerToken,
    targets: SparseTargets,
    divergence: str,
    **params: float,
) -> tuple[Kept, PerToken]:
    """of_kept's gradient to kept [N, k] and total [N, 1]."""
    if targets.tail == "zero":
        _, weights = _terms(kept, targets)
        found = -weights, weights.sum(-1, keepdim=True)
    elif divergence in LINEAR:  # in the teacher: the softmax's gradient is q - p
        student, teacher = _coarse(kept, total, targets)
        few = student.softmax(-1) - teacher.softmax(-1)
        rest = few[:, kept.shape[1] :]
        if targets.tail == "renormalize":
            rest = torch.zeros_like(total)[:, None]
        found = few[:, : kept.shape[1]], rest
    else:
        with torch.enable_grad():
            few = kept.detach().requires_grad_(), total.detach().requires_grad_()
            values = of_kept(*few, targets, divergence, **params)
            found = torch.autograd.grad(
                values.sum(), few, allow_unused=True, materialize_grads=True
            )
        found = found[0], found[1][:, None]
    d_kept, d_total = found
    return d_kept, d_total.masked_fill(total[:, None] == -math.inf, 0.0)


def _coarse(kept: Kept, total: PerToken, targets: SparseTargets) -> tuple[Kept, Kept]:
    """Logits of the kept tokens, and of the rest as one event where it is a bucket;
    the student's and the teacher's."""
    kept_pt = targets.log_probs.to(kept.dtype)
    if targets.tail == "renormalize":
        return kept, kept_pt  # their softmax is the renormalisation
    # A rest within the rounding of a sum of k numbers is none: a student that puts
    # nothing there would get an infinite loss out of a rounding error. The softmax
    # of k logits and the others' log-sum-exp is the coarser distribution.
    rest_pt = -torch.expm1(_log_sum_exp(kept_pt))
    rounding = kept.shape[1] * torch.finfo(rest_pt.dtype).eps
    rest_pt = rest_pt.where(rest_pt > rounding, 0.0).log()
    student = torch.cat([kept, total[:, None]], dim=-1)
    return student, torch.cat([kept_pt, rest_pt], dim=-1)


def _terms(kept: Kept, targets: SparseTargets) -> tuple[Kept, Kept]:
    """log p_t of the kept tokens, and the weights of their terms."""
    kept_pt = targets.log_probs.to(kept.dtype)
    if targets.weights is not None:
        return kept_pt, targets.weights.to(kept.dtype)
    return kept_pt, kept_pt.exp()


@torch.no_grad()
def gathered(
    z: Logits, indices: KeptIds, without: bool
) -> tuple[Kept, PerToken, Logits]:
    """All that sparse targets need to know of logits, in float32 or more.

    kept:  [N, k] the logits at indices
    total: [N] the log-sum-exp of all logits or, `without` those kept, of the others
    p:     [N, V] exp(z - total), 0 at those left out: total's gradient to z
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    kept, empty = z.gather(1, indices).to(wide), None
    if without:
        z = z.scatter(1, indices, -math.inf)
    top, place = z.max(dim=1, keepdim=True)
    if without:  # a row may have no others: its total is -inf
        empty = top == -math.inf
        top = top.masked_fill(empty, 0.0)
        z.scatter_(1, place, top)
    top = top.to(wide)
    if z.is_cuda:
        p = torch.softmax(z, dim=1, dtype=wide)
        total = top - p.gather(1, place).log()
    else:  # see tempered_log_softmax about large vocabularies
        p = (z.to(wide) - top).exp_()
        total = p.sum(dim=1, keepdim=True)
        p /= total
        total = top + total.log()
    if without:
        total = total.masked_fill(empty, -math.inf)
        p.scatter_(1, place, p.gather(1, place).masked_fill(empty, 0.0))
    return kept, total[:, 0], p


class _Gathered(torch.autograd.Function):
    """gathered's kept and total, with a gradient that needs one [N, V]."""

    @staticmethod
    def forward(ctx, z, indices, without):
        kept, total, p = gathered(z, indices, without)
        ctx.save_for_backward(p, indices, total)
        return kept, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_kept, d_total):
        p, indices, total = ctx.saved_tensors
        d_total = d_total.masked_fill(total == -math.inf, 0.0)
        return (p * d_total[:, None]).scatter_add_(1, indices, d_kept), None, None


def _log_sum_exp(x: Tensor) -> Tensor:
    """logsumexp over the last dimension, kept. An empty row gives -inf, gradient 0."""
    empty = (x == -math.inf).all(-1, keepdim=True)
    total = torch.logsumexp(x.masked_fill(empty, 0.0), dim=-1, keepdim=True)
    return total.masked_fill(empty, -math.inf)
