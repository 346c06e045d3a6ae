"""Sparse teacher targets: k log-probabilities a token instead of the whole vocabulary.

Knows: how to choose the k tokens (the likeliest, or drawn at random), what to do with
the rest of the probability, and what each choice costs. Does not know files: the
cached teacher in teachers.py does.

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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kdlib.divergences import get_divergence, tempered, tempered_log_softmax
from kdlib.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from torch import Tensor

    Logits = Float[Tensor, "n v"]
    KeptIds = Int[Tensor, "n k"]
    Kept = Float[Tensor, "n k"]
    PerToken = Float[Tensor, "n"]

TAILS = ("bucket", "zero", "renormalize")
LINEAR = ("forward_kl", "cross_entropy")  # in the teacher's distribution


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Teacher targets for N tokens, k of the vocabulary each.

    indices:     [N, k] token ids (any integer dtype), distinct within a row, except
                 that entries of weight 0 are padding
    log_probs:   [N, k] the teacher's log-probabilities there, in nats, normalised over
                 its whole vocabulary. Any float dtype; computed with in float32 at
                 least. float16 puts the bucket's rest, 1 - sum p, off by about 1e-4
    tail:        "bucket", "zero" or "renormalize", see above
    temperature: what log_probs were computed at. They cannot be re-tempered: at another
                 temperature the unseen tail's share depends on how it is spread
    weights:     [N, k] for sampled targets: count / n_samples, else None
    vocab_size:  V of the teacher, or None if not known. Student columns beyond it are
                 dropped, as in the dense divergences

    Raises ArgumentError if these do not fit together.
    """

    indices: KeptIds
    log_probs: Kept
    tail: str = "bucket"
    temperature: float = 1.0
    weights: Kept | None = None
    vocab_size: int | None = None

    def __post_init__(self):
        if self.tail not in TAILS:
            raise ArgumentError(f"tail = {self.tail!r}", f"choose one of {TAILS}")
        if self.indices.ndim != 2 or self.indices.shape != self.log_probs.shape:
            raise ArgumentError(
                f"indices {list(self.indices.shape)}, log_probs "
                f"{list(self.log_probs.shape)}",
                "give both the shape [N, k]",
            )
        if self.indices.is_floating_point() or not self.log_probs.is_floating_point():
            raise ArgumentError(
                f"indices of dtype {self.indices.dtype}, log_probs of dtype "
                f"{self.log_probs.dtype}",
                "give integer indices and floating-point log_probs",
            )
        if self.weights is not None:
            if self.weights.shape != self.indices.shape or self.tail != "zero":
                raise ArgumentError(
                    f"weights {list(self.weights.shape)} with tail {self.tail!r}",
                    'sampled targets have weights [N, k] and tail="zero"',
                )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows) -> SparseTargets:
        """The targets of some rows: a slice, a bool mask [N] or ids [M]."""
        return self.map(lambda x: x[rows])

    def to(self, device) -> SparseTargets:
        return self.map(lambda x: x.to(device))

    def map(self, f) -> SparseTargets:
        """The targets with f(tensor) in the place of every tensor."""
        weights = None if self.weights is None else f(self.weights)
        return replace(
            self,
            indices=f(self.indices),
            log_probs=f(self.log_probs),
            weights=weights,
        )


@torch.no_grad()
def top_k_targets(
    teacher_logits: Logits, k: int, tail: str = "bucket", *, temperature: float = 1.0
) -> SparseTargets:
    """The k likeliest tokens of each row, likeliest first, and their log-probabilities.

    teacher_logits: [N, V]; where one vocabulary is padded, cut the padding off first
    """
    _check_logits("teacher_logits", teacher_logits)
    vocab = teacher_logits.shape[-1]
    if not 1 <= k <= vocab:
        raise ArgumentError(f"k = {k} of a vocabulary of {vocab}", "choose k in [1, V]")
    log_probs = tempered_log_softmax(teacher_logits, temperature)
    log_probs, indices = log_probs.topk(k, dim=-1)
    return SparseTargets(indices, log_probs, tail, temperature, vocab_size=vocab)


@torch.no_grad()
def sampled_targets(
    teacher_logits: Logits,
    n_samples: int,
    generator: torch.Generator | None = None,
    *,
    temperature: float = 1.0,
) -> SparseTargets:
    """Tokens drawn from the teacher, each weighted by count / n_samples.

    The weights' expectation is p_t and the loss is linear in them, so the expected loss
    and gradient are those of the dense forward KL. k = min(n_samples, V): rows with
    fewer distinct tokens are padded with entries of weight 0.

    Source: Anshumann et al. 2025, Sparse Logit Sampling (arXiv 2503.16870): random
    sampling KD with the teacher itself as the proposal.
    """
    _check_logits("teacher_logits", teacher_logits)
    vocab = teacher_logits.shape[-1]
    if n_samples < 1:
        raise ArgumentError(f"n_samples = {n_samples}", "draw at least one sample")
    log_probs = tempered_log_softmax(teacher_logits, temperature)
    draws = torch.multinomial(
        log_probs.exp(), n_samples, replacement=True, generator=generator
    )
    draws = draws.sort(dim=-1).values
    # Equal draws are neighbours now: slot j counts the j-th distinct token of its row.
    is_new = torch.ones_like(draws, dtype=torch.bool)
    is_new[:, 1:] = draws[:, 1:] != draws[:, :-1]
    slot = is_new.cumsum(-1) - 1
    k = min(n_samples, vocab)
    one = log_probs.new_full((), 1.0 / n_samples).expand(draws.shape)
    weights = log_probs.new_zeros(len(draws), k).scatter_add(-1, slot, one)
    # padding repeats the first token, whose log-probability is finite
    indices = draws[:, :1].repeat(1, k).scatter(-1, slot, draws)
    kept = log_probs.gather(-1, indices)
    return SparseTargets(indices, kept, "zero", temperature, weights, vocab)


def concatenate(parts: Sequence[SparseTargets]) -> SparseTargets:
    """Rows of several targets of one kind, one after another."""
    kinds = {
        (p.tail, p.temperature, p.indices.shape[1], p.weights is None, p.vocab_size)
        for p in parts
    }
    if len(kinds) != 1:
        raise ArgumentError(
            f"targets of {len(kinds)} kinds",
            "concatenate at least one target, all with the same tail, temperature, k "
            "and vocabulary, all sampled or none",
        )
    sampled = parts[0].weights is not None
    return replace(
        parts[0],
        indices=torch.cat([p.indices for p in parts]),
        log_probs=torch.cat([p.log_probs for p in parts]),
        weights=torch.cat([p.weights for p in parts]) if sampled else None,
    )


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
    _check_logits("student_logits", student_logits)
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


def _check_logits(name, logits) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ArgumentError(
            f"{name} {list(logits.shape)} of dtype {logits.dtype}",
            "give floating-point logits of shape [N, V]",
        )


def _log_sum_exp(x: Tensor) -> Tensor:
    """logsumexp over the last dimension, kept. An empty row gives -inf, gradient 0."""
    empty = (x == -math.inf).all(-1, keepdim=True)
    total = torch.logsumexp(x.masked_fill(empty, 0.0), dim=-1, keepdim=True)
    return total.masked_fill(empty, -math.inf)
