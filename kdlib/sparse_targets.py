"""Sparse teacher targets: k log-probabilities a token instead of the whole vocabulary.

Knows: how to choose the k tokens, the likeliest or drawn at random. Does not know what
a student loses by them (sparse.py), nor files (cached.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kdlib.divergences import tempered_log_softmax
from kdlib.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from torch import Tensor

    Logits = Float[Tensor, "n v"]
    KeptIds = Int[Tensor, "n k"]
    Kept = Float[Tensor, "n k"]

TAILS = ("bucket", "zero", "renormalize")


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Teacher targets for N tokens, k of the vocabulary each.

    indices:     [N, k] token ids (any integer dtype), distinct within a row, except
                 that entries of weight 0 are padding
    log_probs:   [N, k] the teacher's log-probabilities there, in nats, normalised over
                 its whole vocabulary. Any float dtype; computed with in float32 at
                 least. float16 puts the bucket's rest, 1 - sum p, off by about 1e-4
    tail:        "bucket", "zero" or "renormalize": what becomes of the rest (sparse.py)
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
    check_logits("teacher_logits", teacher_logits)
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
    check_logits("teacher_logits", teacher_logits)
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


def check_logits(name, logits) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ArgumentError(
            f"{name} {list(logits.shape)} of dtype {logits.dtype}",
            "give floating-point logits of shape [N, V]",
        )
