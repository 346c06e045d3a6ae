"""Run a loss and see what the models read, what they said, and what is learnt from it.

The loss is anyone's: loss(student, batch) -> scalar. It is not asked how it works. A
hook on each model notes every forward pass, and autograd tells the gradient that
reaches the student's logits. Nothing is changed for good: no weight, no `.grad`, no
mode, not torch's random state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from kdlib.errors import ArgumentError
from kdlib.sparse_targets import SparseTargets
from kdlib.views import PairedBatch, View

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64
    from torch import Tensor

    Loss = Callable[[torch.nn.Module, PairedBatch], Tensor]


class Call(NamedTuple):
    """One forward pass of a model."""

    ids: Int64[Tensor, "b t"]
    mask: Tensor | None
    logits: Float[Tensor, "b t v"]
    training: bool


@dataclass
class Seen:
    """One run of the loss.

    value:     of the loss
    student:   its forward passes; gradients: with respect to the logits of each
    teacher:   the teacher's; teacher_gradient: the norm of what reaches its logits
    targets:   what its `targets` answered, where it has that method
    differentiable: whether the loss carries a gradient at all
    """

    value: float
    student: list[Call] = field(default_factory=list)
    gradients: list[Float[Tensor, "b t v"]] = field(default_factory=list)
    teacher: list[Call] = field(default_factory=list)
    teacher_gradient: float = 0.0
    targets: list = field(default_factory=list)
    differentiable: bool = True


def run(loss: Loss, student, batch: PairedBatch, teacher=None, change=False) -> Seen:
    """Run the loss once.

    teacher: a module, an object with a module as `model`, or one with `targets(batch)`
    change:  have the teacher's answer changed on its way to the loss

    Raises ArgumentError for a loss that is no scalar, or that calls backward itself.
    """
    said: list[Call] = []
    answers: list[Call] = []
    targets: list = []
    with ExitStack() as stack:
        # Dropout must draw the same in every run, or runs could not be compared.
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(0)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(watched(student, said))
        module = model_of(teacher)
        if module is not None:
            stack.enter_context(watched(module, answers, change))
        if hasattr(teacher, "targets"):
            turn = change and module is None
            stack.enter_context(overheard(teacher, targets, turn))
        value = loss(student, batch)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise ArgumentError(
            f"loss returned {type(value).__name__}",
            "give loss(student, batch) that returns a tensor of one number, before "
            "any call of backward",
        )
    seen = Seen(float(value.detach()), teacher=answers, targets=targets)
    seen.differentiable = value.requires_grad
    seen.student = [call for call in said if call.logits.requires_grad]
    theirs = [call.logits for call in answers if call.logits.requires_grad]
    if not seen.differentiable:
        seen.gradients = [torch.zeros_like(call.logits) for call in seen.student]
        return seen
    inputs = [call.logits for call in seen.student] + theirs
    if not inputs:
        return seen
    try:
        slopes = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
    except RuntimeError as error:
        raise ArgumentError(
            f"the loss cannot be differentiated: {error}",
            "return the loss without calling backward on it",
        ) from error
    slopes = [
        torch.zeros_like(x) if slope is None else slope
        for slope, x in zip(slopes, inputs, strict=True)
    ]
    seen.gradients = slopes[: len(seen.student)]
    seen.teacher_gradient = sum(float(s.norm()) for s in slopes[len(seen.student) :])
    return seen


def model_of(teacher) -> torch.nn.Module | None:
    if isinstance(teacher, torch.nn.Module):
        return teacher
    model = getattr(teacher, "model", None)
    return model if isinstance(model, torch.nn.Module) else None


@contextmanager
def watched(module, calls: list[Call], change: bool = False) -> Iterator[None]:
    """Note the module's forward passes; with `change`, give other logits to its caller.

    The logits are turned round along the vocabulary: as sure as they were, and about
    other tokens.
    """

    def note(module, args, kwargs, output):
        ids = kwargs.get("input_ids", args[0] if args else None)
        logits = logits_of(output)
        if ids is None or logits is None or logits.ndim != 3:
            return None
        calls.append(Call(ids, kwargs.get("attention_mask"), logits, module.training))
        return with_logits(output, logits.flip(-1)) if change else None

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def overheard(teacher, answers: list, change: bool) -> Iterator[None]:
    """The same for a teacher that has no model here: cached, or served."""
    ask = teacher.targets

    def targets(batch):
        answer = ask(batch)
        answers.append(answer)
        if not change:
            return answer
        if isinstance(answer, SparseTargets):
            least, most = answer.indices.aminmax()
            return replace(answer, indices=least + most - answer.indices)
        return answer.flip(-1)

    before = vars(teacher).get("targets")
    object.__setattr__(teacher, "targets", targets)  # it may be a frozen dataclass
    try:
        yield
    finally:
        if before is None:
            object.__delattr__(teacher, "targets")
        else:
            object.__setattr__(teacher, "targets", before)


def logits_of(output) -> Tensor | None:
    if isinstance(output, torch.Tensor):
        return output
    return output[0] if isinstance(output, tuple) else getattr(output, "logits", None)


def with_logits(output, logits):
    if isinstance(output, torch.Tensor):
        return logits
    if isinstance(output, tuple):
        return (logits, *output[1:])
    output = copy.copy(output)
    output.logits = logits
    return output


# --- In the layout of a view ---


class Reading(NamedTuple):
    """What a model said of a view's tokens, whatever rows and columns the loss used.

    logits:    [B, T, V], zero where the view has padding
    gradient:  of the loss, the same shape
    outside:   the norm of the gradient at padding
    call:      [B] the forward pass that read each row
    hidden:    tokens that the attention mask hid although later ones are predicted
    unhidden:  tokens of padding before a row that it did not hide
    """

    logits: Float[Tensor, "B T V"]
    gradient: Float[Tensor, "B T V"]
    outside: float
    call: list[int]
    hidden: int
    unhidden: int = 0


def reading(view: View, calls: list[Call], gradients=None) -> Reading | None:
    """Find the view's rows in forward passes; None where one of them was not read.

    Rows are found by their tokens. They may come in another order, in several passes,
    and with padding on either side.
    """
    rows = [
        ids[real].tolist()
        for ids, real in zip(view.input_ids, view.attention_mask, strict=True)
    ]
    places: dict[int, tuple[int, int, slice]] = {}
    for number, call in enumerate(calls):
        if call.logits.shape[:2] != call.ids.shape:
            continue  # only some positions have logits: they cannot be told apart
        for line, ids in enumerate(call.ids.tolist()):
            for row, wanted in enumerate(rows):
                if row not in places and (at := _place(wanted, ids)):
                    places[row] = number, line, at
                    break
    if len(places) < len(rows):
        return None
    shape = *view.input_ids.shape, calls[0].logits.shape[-1]
    logits = calls[0].logits.new_zeros(shape)
    gradient, used = torch.zeros_like(logits), 0.0
    hidden = unhidden = 0
    for row, (number, line, at) in places.items():
        real = view.attention_mask[row]
        logits[row, real] = calls[number].logits[line, at].detach()
        if gradients is not None:
            part = gradients[number][line, at]
            gradient[row, real] = part
            used += float(part.double().square().sum())
        mask = calls[number].mask
        if mask is None:
            unhidden += at.start
        elif mask.shape == calls[number].ids.shape:
            hidden += int((mask[line, at][:-1] == 0).sum())
            unhidden += int((mask[line, : at.start] != 0).sum())
    whole = sum(float(g.double().square().sum()) for g in gradients or [])
    outside = max(0.0, whole - used) ** 0.5 if whole - used > 1e-12 * whole else 0.0
    call = [places[row][0] for row in range(len(rows))]
    return Reading(logits, gradient, outside, call, hidden, unhidden)


def _place(wanted: list[int], ids: list[int]) -> slice | None:
    """Where a row's tokens stand among ids, the rest of which is padding."""
    n = len(wanted)
    for at, rest in ((slice(0, n), ids[n:]), (slice(len(ids) - n, None), ids[:-n])):
        if len(ids) >= n and ids[at] == wanted and len(set(rest)) <= 1:
            return at
    return None


def predicting(view: View) -> Bool[Tensor, "B T"]:
    """The positions whose output predicts a response token."""
    mask = torch.zeros_like(view.completion_mask)
    mask[:, :-1] = view.completion_mask[:, 1:]
    return mask
