"""The loss of one step and its gradient, whichever way they are computed.

    plain   logits [N, V] of both sides, then the objective
    fused   hidden states of both sides, then fused_divergence: no [N, V]

Both are one module, StudentLoss: whatever wraps a model for several devices wraps that
and sees the student's forward pass and its loss as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch

from kdlib.errors import ArgumentError
from kdlib.fused import Head, fused_divergence
from kdlib.metrics import fidelity, sample
from kdlib.objective import DistillationLoss, Objective
from kdlib.pairs import PairedBatch, View
from kdlib.precision import Precision
from kdlib.teachers import LiveTeacher, Teacher


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
        if self.offload and fused:  # its head is needed with the student's
            head = self.heads[1]
            parts = {"weight": head.weight.detach().clone()}
            if head.bias is not None:
                parts["bias"] = head.bias.detach().clone()
            self.heads = self.heads[0], replace(head, **parts)

    def forward(
        self, batch: PairedBatch, num_items: int | None, measure: bool = False
    ) -> tuple[DistillationLoss, dict[str, float]]:
        """The loss of one micro-batch, a share of `num_items`; fidelity if measured."""
        if self.heads is not None:
            return self._fused(batch, num_items, measure)
        targets = None
        if self.teacher is not None:
            with self._teacher_at(batch.response_ids.device):
                targets = self.teacher.targets(batch)
        with self.precision.autocast():
            logits = student_logits(self.student, batch)
        loss = self.objective(
            logits,
            targets,
            batch.response_ids,
            row_ids=batch.row_ids,
            num_items=num_items,
        )
        measured = fidelity(logits, targets) if measure and targets is not None else {}
        return loss, measured

    def _fused(self, batch, num_items, measure):
        objective, (student_head, teacher_head) = self.objective, self.heads
        with torch.no_grad(), self._teacher_at(batch.response_ids.device):
            teacher_hidden = hidden_states(self.teacher.model, batch.teacher)
        dtype = torch.promote_types(student_head.weight.dtype, torch.float32)
        share = token_shares(objective, batch, num_items, dtype)
        t2 = objective.temperature**2 if objective.scale_by_t2 else 1.0
        labels = {}
        if objective.hard_weight > 0:
            weights = share * objective.hard_weight
            labels = {"labels": batch.response_ids, "label_weights": weights}
        with self.precision.autocast():
            student_hidden = hidden_states(self.student, batch.student)
            total, soft, hard = fused_divergence(
                student_hidden,
                student_head,
                teacher_hidden,
                teacher_head,
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
                    teacher_head.logits(teacher_hidden[few]),
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
    return add_gradient(StudentLoss(student, objective, teacher), batches)


def add_gradient(
    loss_of,
    batches: list[PairedBatch],
    *,
    scaler: torch.amp.GradScaler | None = None,
    measure: bool = False,
) -> StepLoss:
    """Add the gradient of one step, micro-batch by micro-batch.

    loss_of: a StudentLoss, or a module that wraps one

    Every micro-batch is divided by the count of the whole step, so that neither loss
    nor gradient depends on how the step was split.
    """
    objective = getattr(loss_of, "module", loss_of).objective
    items = count_items(batches, objective.reduction)
    totals, parts, measured = [], [], {}
    for number, batch in enumerate(batches):
        part, found = loss_of(batch, items, measure and number == 0)
        total = part.total if scaler is None else scaler.scale(part.total)
        total.backward()
        totals.append(part.total.detach())
        parts.append(part.parts)
        measured |= found
    # Numbers are fetched when all work is queued: a GPU waits for this once a step.
    return StepLoss(
        loss=sum(torch.stack(totals).tolist()),
        rows=sum(len(batch.example_ids) for batch in batches),
        tokens=sum(int(batch.student.attention_mask.sum()) for batch in batches),
        teacher_tokens=sum(int(b.teacher.attention_mask.sum()) for b in batches),
        parts={
            name: sum(torch.stack([p[name] for p in parts]).tolist())
            for name in parts[0]
        },
        fidelity=measured,
    )


def count_items(batches: list[PairedBatch], reduction: str) -> int | None:
    """The denominator of the step's mean. (Of several processes: their sum.)"""
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
    return batch.student.select(_run(student, batch.student).logits)


def hidden_states(model, view: View) -> torch.Tensor:
    """[N, H] what the model's output head gets for every response token."""
    return view.select(_run(model.get_decoder(), view).last_hidden_state)


def _run(model, view: View):
    # A cache is for generation; with activation checkpointing it would be wrong.
    return model(
        input_ids=view.input_ids,
        attention_mask=view.attention_mask.long(),
        use_cache=False,
    )


def _heads(student, objective, teacher) -> tuple[Head, Head]:
    if not isinstance(teacher, LiveTeacher):
        raise ArgumentError(
            f"fused=True with teacher {type(teacher).__name__}",
            "use a LiveTeacher: the fused loss needs the teacher's hidden states; or "
            "set fused=False",
        )
    if objective.hard_weight == 1:
        raise ArgumentError(
            "fused=True with hard_weight=1", "set fused=False: no teacher is compared"
        )
    training = student.training
    try:
        return Head.of(student.eval()), Head.of(teacher.model)
    finally:
        student.train(training)
