"""The loss of one step and its gradient, whichever way they are computed.

    plain   logits [N, V] of both sides, then the objective
    fused   hidden states of both sides, or the student's and sparse targets, then
            fused_divergence: no [N, V]

Both are one module, StudentLoss: whatever wraps a model for several devices wraps that
and sees the student's forward pass and its loss as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch

from kdlib.distributed import ALONE, Ranks
from kdlib.errors import ArgumentError
from kdlib.fused import fused_divergence, fused_sparse_divergence
from kdlib.heads import Head
from kdlib.metrics import fidelity, quarters, sample
from kdlib.objective import DistillationLoss, Objective
from kdlib.precision import Precision
from kdlib.sharding import decoder_of, summing
from kdlib.teachers import CachedTeacher, LiveTeacher, RemoteTeacher, Teacher
from kdlib.views import PairedBatch, View


class StepLoss(NamedTuple):
    """loss:     of the whole step, over `rows` examples
    tokens:   that the student read, without padding; teacher_tokens: the teacher
    parts:    "soft" and "hard", as in DistillationLoss
    fidelity: student against teacher on a sample (metrics.py), where it was asked for
    """

    loss: float
    rows: int
    tokens: int
    teacher_tokens: int
    parts: dict[str, float]
    fidelity: dict[str, float]


class StudentLoss(torch.nn.Module):
    """The student, its teacher and the objective: batch in, loss out.

    Raises ArgumentError for a fused loss that these cannot have.
    """

    def __init__(
        self,
        student,
        objective: Objective,
        teacher: Teacher | None,
        *,
        precision: Precision | None = None,
        fused: bool = False,
        offload: bool = False,
    ):
        super().__init__()
        self.student, self.objective, self.teacher = student, objective, teacher
        self.precision = precision or Precision()
        self.heads = _heads(student, objective, teacher) if fused else None
        self.offload = offload and isinstance(teacher, LiveTeacher)

    def forward(
        self, batch: PairedBatch, num_items: int | None, measure: bool = False
    ) -> tuple[DistillationLoss, dict[str, torch.Tensor]]:
        """The loss of one micro-batch, a share of `num_items`; fidelity if measured."""
        if len(batch.example_ids) == 0:
            return self._nothing(batch), {}
        if self.heads is not None:
            return self._fused(batch, num_items, measure)
        targets = self._targets(batch)
        with self.precision.autocast():
            logits = student_logits(self.student, batch)
        loss = self.objective(
            logits,
            targets,
            batch.response_ids,
            row_ids=batch.row_ids,
            num_items=num_items,
        )
        measured = {}
        if measure and targets is not None:
            measured = fidelity(logits, targets, quarters(batch.row_ids))
        return loss, measured

    def _targets(self, batch: PairedBatch):
        if self.teacher is None or batch.targets is not None:
            return batch.targets
        with self._teacher_at(batch.response_ids.device):
            return self.teacher.targets(batch)

    def _nothing(self, batch: PairedBatch) -> DistillationLoss:
        """The loss 0 of a batch without rows, with a gradient of zeros.

        The models compute all the same: other ranks, which hold parts of the same
        weights and sum the same gradients, wait for this one.
        """
        if isinstance(self.teacher, LiveTeacher):
            self._targets(batch)
        with self.precision.autocast():
            logits = student_logits(self.student, batch)  # [0, V]
        none = logits.to(torch.promote_types(logits.dtype, torch.float32)).sum(-1)
        return DistillationLoss(none.sum(), 0, none.detach(), {})

    def _fused(self, batch, num_items, measure):
        objective = self.objective
        if live := isinstance(self.teacher, LiveTeacher):
            with torch.no_grad(), self._teacher_at(batch.response_ids.device):
                hidden = hidden_states(self.teacher.model, batch.teacher)
                head = attached(self.heads[1], self.teacher.model, trained=False)
            divergence = partial(
                fused_divergence, teacher_hidden=hidden, teacher_head=head
            )
        else:
            targets = self._targets(batch)
            divergence = partial(fused_sparse_divergence, targets=targets)
        with self.precision.autocast():
            student_hidden = hidden_states(self.student, batch.student)
        student_head = attached(self.heads[0], self.student, trained=True)
        dtype = torch.promote_types(student_head.weight.dtype, torch.float32)
        share = token_shares(objective, batch, num_items, dtype)
        t2 = objective.temperature**2 if objective.scale_by_t2 else 1.0
        labels = {}
        if objective.hard_weight > 0:
            weights = share * objective.hard_weight
            labels = {"labels": batch.response_ids, "label_weights": weights}
        with self.precision.autocast():
            total, soft, hard = divergence(
                student_hidden,
                student_head,
                divergence=objective.divergence,
                temperature=objective.temperature,
                token_weights=share * ((1.0 - objective.hard_weight) * t2),
                **labels,
                **objective.divergence_params,
            )
        parts = {"soft": (share * soft).sum()}
        per_token = (1.0 - objective.hard_weight) * t2 * soft
        if hard is not None:
            parts["hard"] = (share * hard).sum()
            per_token = per_token + objective.hard_weight * hard
        loss = DistillationLoss(total, len(share), per_token, parts)
        measured = {}
        if measure:
            few = sample(len(share), share.device)
            with torch.no_grad(), self.precision.autocast():
                measured = fidelity(
                    student_head.logits(student_hidden[few]),
                    head.logits(hidden[few]) if live else targets[few],
                    quarters(batch.row_ids)[few],
                )
        return loss, measured

    @contextmanager
    def _teacher_at(self, device: torch.device) -> Iterator[None]:
        """The teacher's weights on the device while the block runs, if they move."""
        if self.offload:
            self.teacher.model.to(device)
        try:
            yield
        finally:
            if self.offload:
                self.teacher.model.to("cpu")


def accumulate_gradient(
    student, batches: list[PairedBatch], objective: Objective, teacher: Teacher | None
) -> StepLoss:
    """Add the gradient of one step, in the weights' own precision."""
    return add_gradient(StudentLoss(student, objective, teacher), batches).fetch()[0]


@dataclass(frozen=True)
class QueuedStep:
    """The numbers of a step whose work may be under way still.

    rest: a StepLoss whose loss, parts and fidelity are not known yet
    """

    totals: list[torch.Tensor]
    parts: list[dict[str, torch.Tensor]]
    fidelity: dict[str, torch.Tensor]
    rest: StepLoss

    def fetch(self, *others: torch.Tensor) -> tuple[StepLoss, *tuple[float, ...]]:
        """The step's numbers and other scalars: a GPU is waited for once."""
        columns = {None: self.totals}
        for name in self.parts[0]:
            columns[name] = [part[name] for part in self.parts if part]
        queued = [x.detach() for column in columns.values() for x in column]
        queued += self.fidelity.values()
        numbers = iter(torch.stack([*queued, *others]).tolist())
        sums = {name: sum(islice(numbers, len(x))) for name, x in columns.items()}
        # Not zip(.., numbers): it would take one number more to see that names end.
        fidelity = {name: next(numbers) for name in self.fidelity}
        found = self.rest._replace(loss=sums.pop(None), parts=sums, fidelity=fidelity)
        return found, *numbers


def add_gradient(
    loss_of,
    batches: list[PairedBatch],
    *,
    scaler: torch.amp.GradScaler | None = None,
    measure: bool = False,
    ranks: Ranks = ALONE,
) -> QueuedStep:
    """Add the gradient of one step, micro-batch by micro-batch.

    loss_of: a StudentLoss, or a module that wraps one
    batches: this rank's, and so are the numbers that are returned

    Every micro-batch is divided by the count of the whole step, so that neither loss
    nor gradient depends on how the step was split, between batches or between ranks.
    """
    objective = getattr(loss_of, "module", loss_of).objective
    items = count_items(batches, objective.reduction)
    if items is not None:
        items = sum(ranks.gather(items))
    totals, parts, measured = [], [], {}
    for number, batch in enumerate(batches):
        with summing(loss_of, last=number + 1 == len(batches)):
            part, found = loss_of(batch, items, measure and number == 0)
            total = part.total * ranks.world  # the engines average (sharding.py)
            (total if scaler is None else scaler.scale(total)).backward()
        totals.append(part.total.detach())
        parts.append(part.parts)
        measured |= found
    asked = [batch for batch in batches if len(batch.example_ids)]
    rest = StepLoss(
        loss=math.nan,
        rows=sum(len(batch.example_ids) for batch in asked),
        tokens=sum(batch.student.n_tokens for batch in asked),
        teacher_tokens=sum(batch.teacher.n_tokens for batch in asked),
        parts={},
        fidelity={},
    )
    return QueuedStep(totals, parts, measured, rest)


def summed(shares: list[StepLoss]) -> StepLoss:
    """Of all ranks; the first one, which has rows in every step, was measured."""
    first = shares[0]
    return StepLoss(
        loss=sum(share.loss for share in shares),
        rows=sum(share.rows for share in shares),
        tokens=sum(share.tokens for share in shares),
        teacher_tokens=sum(share.teacher_tokens for share in shares),
        parts={
            name: sum(share.parts.get(name, 0.0) for share in shares)
            for name in first.parts
        },
        fidelity=first.fidelity,
    )


def count_items(batches: list[PairedBatch], reduction: str) -> int | None:
    """The denominator of the step's mean, or this rank's share of it."""
    if reduction == "sum":
        return None
    if reduction == "token_mean":
        return sum(len(batch.response_ids) for batch in batches)
    return sum(len(batch.example_ids) for batch in batches)


def token_shares(
    objective: Objective, batch: PairedBatch, num_items: int | None, dtype
) -> torch.Tensor:
    """[N] what the objective's reduction multiplies each token's loss by."""
    ones = torch.ones_like(batch.response_ids, dtype=dtype)
    if objective.reduction == "sum":
        return ones
    if objective.reduction == "token_mean":
        return ones / num_items
    _, row, length = batch.row_ids.unique(return_inverse=True, return_counts=True)
    return ones / length[row] / num_items


def student_logits(student, batch: PairedBatch) -> torch.Tensor:
    """[N, V] the student's logits for every response token of the batch."""
    return batch.student.select(batch.student.output_of(student).logits)


def hidden_states(model, view: View) -> torch.Tensor:
    """[N, H] what the model's output head gets for every response token."""
    return view.select(view.output_of(decoder_of(model)).last_hidden_state)


def attached(head: Head, model, *, trained: bool) -> Head:
    """The head with the weights that the model has at this moment.

    A sharded model has them whole only from its forward pass on to the backward pass; a
    teacher that moves takes its own with it, but not what was detached from them.
    """
    linear = model.get_output_embeddings()
    weight, bias = linear.weight, getattr(linear, "bias", None)
    if not trained:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    return replace(head, weight=weight, bias=bias)


def _heads(student, objective, teacher) -> list[Head]:
    """How the heads are shaped; their weights are not kept (see `attached`)."""
    if not isinstance(teacher, (LiveTeacher, CachedTeacher, RemoteTeacher)):
        raise ArgumentError(
            f"fused=True with teacher {type(teacher).__name__}",
            "use one of kdlib's teachers: the fused loss needs hidden states or sparse "
            "targets; or set fused=False",
        )
    if objective.hard_weight == 1:
        raise ArgumentError(
            "fused=True with hard_weight=1", "set fused=False: no teacher is compared"
        )
    training = student.training
    try:
        heads = [Head.of(student.eval())]
        if isinstance(teacher, LiveTeacher):
            heads.append(Head.of(teacher.model))
        return [replace(head, weight=None, bias=None) for head in heads]
    finally:
        student.train(training)
