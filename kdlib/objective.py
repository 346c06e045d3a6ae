"""The objective: per-token divergence and hard labels, reduced to one number.

    total = (1 - hard_weight) T^2 mean D(p_t, p_s) + hard_weight mean(-log p_s(y))

Knows: weights, the T^2 factor, and over what the mean is taken. Does not know how the
tokens were selected (pairs.py) nor where the targets came from (teachers.py).

The mean is over response tokens or over sequences, never over the vocabulary (torch's
"mean" would divide by V as well). A mean over a micro-batch is not the batch's mean:
give `num_items`, the count over the whole batch, and the micro-batches' totals add up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from kdlib.divergences import get_divergence, tempered_log_softmax
from kdlib.errors import ArgumentError, nearest
from kdlib.sparse import sparse_divergence
from kdlib.sparse_targets import SparseTargets

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    Logits = Float[Tensor, "n v"]
    PerToken = Float[Tensor, "n"]
    TokenIds = Int[Tensor, "n"]
    Scalar = Float[Tensor, ""]

REDUCTIONS = ("token_mean", "sequence_mean", "sum")


class DistillationLoss(NamedTuple):
    """What an objective returns.

    total:     [] the number to differentiate
    n_tokens:  response tokens in it
    per_token: [N] detached, each token's weighted loss before the reduction
    parts:     detached scalars, reduced like total: "soft", the divergence without T^2
               and weight (absent without a teacher), and "hard", the cross-entropy
    """

    total: Scalar
    n_tokens: int
    per_token: PerToken
    parts: dict[str, Scalar]


@dataclass(frozen=True)
class Objective:
    """A distillation objective, by its settings. Its repr can go into a checkpoint.

    divergence:        a name in divergences.DIVERGENCES
    temperature:       T; divides the logits of both sides in the soft term alone
    scale_by_t2:       multiply the soft term by T^2, which keeps its gradient's scale
                       as T grows (Hinton et al. 2015, arXiv 1503.02531, section 2)
    hard_weight:       weight in [0, 1] of the cross-entropy with the response tokens,
                       taken at temperature 1; 1 is plain supervised training
    reduction:         "token_mean", "sequence_mean" (the mean over sequences of each
                       one's token mean) or "sum"
    divergence_params: e.g. {"beta": 0.5}

    Raises ArgumentError for an unknown name or a value out of range.
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    scale_by_t2: bool = True
    hard_weight: float = 0.0
    reduction: str = "token_mean"
    # equal objectives have equal hashes without it, and a dict cannot be hashed
    divergence_params: dict[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        object.__setattr__(self, "divergence_params", dict(self.divergence_params))
        measure = get_divergence(self.divergence, **self.divergence_params)
        # has it refuse a bad temperature now rather than at the first batch
        measure(torch.zeros(1, 1), torch.zeros(1, 1), temperature=self.temperature)
        if not 0.0 <= self.hard_weight <= 1.0:
            raise ArgumentError(
                f"hard_weight = {self.hard_weight}", "choose hard_weight in [0, 1]"
            )
        if self.reduction not in REDUCTIONS:
            raise ArgumentError(
                f"reduction = {self.reduction!r}", nearest(self.reduction, REDUCTIONS)
            )

    def __call__(
        self,
        student_logits: Logits,
        teacher_targets: Logits | SparseTargets | None,
        response_ids: TokenIds,
        *,
        row_ids: TokenIds | None = None,
        num_items: int | None = None,
    ) -> DistillationLoss:
        """The loss of N response tokens.

        student_logits:  [N, V] the logits that predict them
        teacher_targets: [N, V_t] the teacher's logits, or SparseTargets; may be None
                         where hard_weight is 1
        response_ids:    [N] the response tokens themselves
        row_ids:         [N] the sequence of each; needed for "sequence_mean", whose
                         sequences must not be split between micro-batches
        num_items:       the mean's denominator: tokens ("token_mean") or sequences
                         ("sequence_mean") of the whole batch, over all micro-batches
                         and processes; by default those of this call

        Raises ArgumentError if there is no token, or the arguments do not fit together.
        """
        self._check(student_logits, teacher_targets, response_ids, row_ids, num_items)

        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        per_token = torch.zeros(
            len(response_ids), dtype=dtype, device=student_logits.device
        )
        parts = {}

        # A term of weight 0 is reported, but neither differentiated nor added: 0 * inf
        # would be NaN.
        if teacher_targets is not None:
            soft_weight = 1.0 - self.hard_weight
            if self.scale_by_t2:
                soft_weight *= self.temperature**2
            with torch.set_grad_enabled(torch.is_grad_enabled() and soft_weight > 0):
                parts["soft"] = self._soft(student_logits, teacher_targets)
            if soft_weight > 0:
                per_token = per_token + soft_weight * parts["soft"]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.hard_weight > 0):
            # not F.cross_entropy: see tempered_log_softmax about large vocabularies
            log_ps = tempered_log_softmax(student_logits, 1.0)
            chosen = response_ids.long()[:, None]
            parts["hard"] = -log_ps.gather(-1, chosen).squeeze(-1)
        if self.hard_weight > 0:
            per_token = per_token + self.hard_weight * parts["hard"]

        return DistillationLoss(
            total=self._reduce(per_token, row_ids, num_items),
            n_tokens=len(per_token),
            per_token=per_token.detach(),
            parts={
                name: self._reduce(part.detach(), row_ids, num_items)
                for name, part in parts.items()
            },
        )

    def _soft(self, student_logits, targets) -> Tensor:
        name, params, t = self.divergence, self.divergence_params, self.temperature
        if isinstance(targets, SparseTargets):
            return sparse_divergence(
                student_logits, targets, name, temperature=t, **params
            )
        return get_divergence(name, **params)(student_logits, targets, temperature=t)

    def _reduce(self, per_token, row_ids, num_items) -> Tensor:
        if self.reduction == "sum":
            return per_token.sum()
        if self.reduction == "token_mean":
            return per_token.sum() / (
                len(per_token) if num_items is None else num_items
            )
        _, row, length = row_ids.unique(return_inverse=True, return_counts=True)
        by_row = per_token / length[row]
        return by_row.sum() / (len(length) if num_items is None else num_items)

    def _check(self, student_logits, targets, response_ids, row_ids, num_items):
        if student_logits.ndim != 2 or response_ids.shape != student_logits.shape[:1]:
            raise ArgumentError(
                f"student_logits {list(student_logits.shape)}, response_ids "
                f"{list(response_ids.shape)}",
                "give student_logits [N, V] and response_ids [N], a row for each token",
            )
        n, vocab = student_logits.shape
        if n == 0:
            raise ArgumentError(
                "no response token (N = 0)",
                "leave out batches whose responses are empty or wholly truncated",
            )
        low, high = torch.stack(response_ids.aminmax()).tolist()  # one device wait
        if low < 0 or high >= vocab:
            raise ArgumentError(
                f"response_ids from {low} to {high}, but the student's vocabulary has "
                f"{vocab} tokens",
                "select response tokens before the loss (there is no ignore_index), "
                "and use the student's own tokenizer",
            )
        if targets is None and self.hard_weight < 1.0:
            raise ArgumentError(
                f"teacher_targets is None with hard_weight = {self.hard_weight}",
                "give the teacher's logits or SparseTargets, or set hard_weight=1",
            )
        if targets is not None and len(targets) != n:
            raise ArgumentError(
                f"teacher_targets for {len(targets)} tokens, student_logits for {n}",
                "select the same response tokens from both views",
            )
        if self.reduction == "sequence_mean" and (
            row_ids is None or row_ids.shape != response_ids.shape
        ):
            raise ArgumentError(
                'row_ids are missing or not [N] with reduction "sequence_mean"',
                "give row_ids [N], the sequence of each token (PairedBatch.row_ids)",
            )
        if num_items is not None and self.reduction == "sum":
            raise ArgumentError(
                f'num_items = {num_items}, but reduction "sum" has no denominator',
                'leave num_items out, or choose "token_mean"',
            )
        if num_items is not None and not num_items > 0:
            raise ArgumentError(f"num_items = {num_items}", "give a count above 0")
