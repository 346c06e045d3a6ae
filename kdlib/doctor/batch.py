"""One batch, through the student, the teacher and the loss, with eyes open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kdlib.doctor import thresholds
from kdlib.doctor.closed_form import Question, known, multiple
from kdlib.doctor.finding import Finding, found
from kdlib.doctor.gradient import examine_closed_form
from kdlib.doctor.positions import examine_attention, examine_positions
from kdlib.doctor.teacher import (
    Answer,
    examine_answer,
    examine_teacher,
    examine_use,
    moved_answers,
)
from kdlib.doctor.views import examine_views
from kdlib.doctor.watch import Reading, Seen, model_of, predicting, reading, run
from kdlib.errors import ArgumentError
from kdlib.gradients import StudentLoss
from kdlib.metrics import sample
from kdlib.objective import Objective
from kdlib.pairs import PairCollator, PairedExample
from kdlib.views import PairedBatch, View

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64
    from torch import Tensor

    from kdlib.doctor.watch import Loss


def examine_batch(
    student,
    batch: PairedBatch,
    objective: Objective | None = None,
    *,
    teacher=None,
    loss: Loss | None = None,
    collator: PairCollator | None = None,
    examples: Sequence[PairedExample] | None = None,
) -> list[Finding]:
    """What is wrong with a loss, its models and its data, as far as one batch shows.

    student:   a causal LM: student(input_ids, ...) -> logits, or an output that has
               them as `logits` or first. In the mode in which it is trained
    batch:     where the responses stand on both sides (views.from_labels makes one of
               the dicts that other libraries have)
    objective: what the loss is meant to be; by default Objective()
    teacher:   a module like the student; a Teacher (LiveTeacher, CachedTeacher, ..); or
               None, and then nothing is asked that needs one
    loss:      loss(student, batch) -> scalar, anyone's; it may get its inputs and its
               teacher from elsewhere. It must call the student as a whole. By default
               that of kdlib's own loop, with `objective` and `teacher`
    collator:  for the end of responses and the tokenizer's size
    examples:  with the collator: the data by number, which batch.example_ids are

    Runs the loss twice and the teacher up to three times. Weights, modes, `.grad` and
    torch's random state stay as they are.

    Raises ArgumentError for a loss that is no scalar or does not call the student, and
    for a teacher that is the student itself.
    """
    objective = Objective() if objective is None else objective
    _check(student, teacher, loss)
    if loss is None:
        own = StudentLoss(student, objective, teacher)

        def loss(student, batch):
            return own(batch, None)[0].total

    findings = examine_views(batch, collator, examples)
    counts = (
        int(v.completion_mask[:, 1:].sum()) for v in (batch.teacher, batch.student)
    )
    if len(set(counts)) > 1 or any(f.name == "mask_covers_padding" for f in findings):
        return findings  # there is nothing to compare token by token
    seen = run(loss, student, batch, teacher)
    if not torch.isfinite(torch.tensor(seen.value)):
        return [*findings, found("loss_not_finite", f"the loss is {seen.value}")]
    of_student, read, view = _student(batch, seen)
    findings += of_student
    answer = Answer(None, None, batch.teacher)
    if teacher is not None:
        of_teacher, answer = examine_teacher(teacher, student, batch, seen)
        findings += of_teacher
    if read is None:
        return _once(findings)
    logits = view.select(read.logits)
    findings += examine_answer(answer, batch, logits, collator)

    def question(tokens):
        return _question(batch, objective, view, read, answer, tokens)

    of_loss = examine_positions(view, read, _alive(view, read, question))
    if not of_loss and teacher is not None and objective.hard_weight < 1:
        of_loss = examine_use(seen, run(loss, student, batch, teacher, change=True))
    if not of_loss:
        of_loss = _scale(question(sample(len(batch.response_ids), "cpu")))
    return _once(findings + of_loss)


def _check(student, teacher, loss) -> None:
    module = model_of(teacher)
    if module is student:
        raise ArgumentError(
            "teacher and student are one module",
            "give a copy (copy.deepcopy) as the teacher, so that their forward passes "
            "can be told apart",
        )
    if loss is None and teacher is not None and not hasattr(teacher, "targets"):
        raise ArgumentError(
            f"teacher {type(teacher).__name__} without a loss",
            "give LiveTeacher(model), as for train, or your own loss",
        )


def _once(findings: list[Finding]) -> list[Finding]:
    """One finding a cause: what is seen in the batch may be seen at the models too."""
    return [
        x
        for i, x in enumerate(findings)
        if x.name not in {y.name for y in findings[:i]}
    ]


def _student(
    batch: PairedBatch, seen: Seen
) -> tuple[list[Finding], Reading | None, View]:
    """What the student read, and which view that is."""
    view = batch.student
    if not seen.student:
        if seen.differentiable:
            raise ArgumentError(
                "the loss has a gradient, but never called the student",
                "have it call student(input_ids, ...): what goes around that, such as "
                "a fused loss from hidden states, cannot be looked into",
            )
        evidence = "no forward pass of the student carries a gradient"
        return [found("no_gradient", evidence)], None, view
    read = reading(view, seen.student, seen.gradients)
    findings = []
    if read is None:
        view = batch.teacher
        read = reading(view, seen.student, seen.gradients)
        if read is None:
            shape = seen.student[0].ids.shape
            evidence = f"it read {shape[0]} rows of {shape[1]}, not all of the view's"
            return [found("student_reads_other_input", evidence)], None, view
        more = int(view.attention_mask.sum() - batch.student.attention_mask.sum())
        evidence = f"it read the teacher's rows: {more} tokens more than its own view"
        findings.append(found("student_reads_full_input", evidence))
    return findings + examine_attention(read, "student"), read, view


def _question(
    batch: PairedBatch,
    objective: Objective,
    view: View,
    read: Reading,
    answer: Answer,
    few: Int64[Tensor, " n"],
) -> Question | None:
    """The gradient of a few of the response tokens, beside all that is known."""
    if answer.targets is None and objective.hard_weight < 1:
        return None
    n = len(batch.response_ids)
    rows = batch.row_ids.cpu()
    weights = _weights(objective.reduction, rows)
    others = {}
    if objective.reduction == "token_mean":
        others["sequence_mean_for_token_mean"] = _weights("sequence_mean", rows)
        calls = torch.tensor(read.call)[rows]
        others["micro_batch_means"] = _weights("sequence_mean", calls)
    elif objective.reduction == "sequence_mean":
        others["token_mean_for_sequence_mean"] = _weights("token_mean", rows)
    return Question(
        logits=view.select(read.logits).cpu()[few].double(),
        gradient=view.select(read.gradient).cpu()[few].double(),
        targets=None if answer.targets is None else answer.targets.to("cpu")[few],
        ids=batch.response_ids.cpu()[few],
        objective=objective,
        weights=weights[few],
        others={name: w[few] for name, w in others.items()},
        moved={w: x.cpu()[few] for w, x in moved_answers(answer, batch).items()},
        sizes={
            "tokens": n,
            "rows": len(batch.example_ids),
            "width": view.input_ids.shape[1],
            "real": int(view.attention_mask.sum()),
            "passes": len(set(read.call)),
        },
        tolerance=thresholds.tolerance(read.logits),
        sixteen_bits=read.logits.dtype.itemsize < 4,
    )


def _weights(reduction: str, groups: Int64[Tensor, " N"]) -> Tensor:
    """[N] what a reduction multiplies each token by; groups: the row of each token."""
    ones = torch.ones(len(groups), dtype=torch.float64)
    if reduction == "sum":
        return ones
    if reduction == "token_mean":
        return ones / len(groups)
    _, group, length = groups.unique(return_inverse=True, return_counts=True)
    return ones / length[group] / len(length)


def _alive(view: View, read: Reading, question) -> Bool[Tensor, "B T"]:
    """Where the declared loss has a gradient.

    A student that says what its teacher says, to the last bit, has nothing to learn
    there, and a gradient of zero is right.
    """
    alive = (view.select(read.gradient).abs().amax(-1) > 0).cpu()
    still = (~alive).nonzero()[:, 0]
    due = predicting(view)
    if not len(still):
        return due
    few = still[sample(len(still), "cpu")]
    asked = question(few)
    if asked is None:
        return due
    learnt = known(asked).abs().amax(-1) <= thresholds.LEARNT * asked.weights
    alive[still] = not learnt.all()
    alive[few] = ~learnt
    due[due.clone()] = alive.to(due.device)
    return due


def _scale(question: Question | None) -> list[Finding]:
    if question is None:
        return []
    findings = examine_closed_form(question)
    if not findings or question.objective.hard_weight == 1:
        return findings
    hard = known(question, hard_weight=1.0)
    if multiple(question, hard)[1] <= question.tolerance:
        evidence = "the gradient is that of the hard labels alone"
        return [found("teacher_unused", evidence)]
    return findings
