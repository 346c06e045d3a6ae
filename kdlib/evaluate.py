"""How faithful is the student, and what does it cost to run?

Exact match and agreement are read off one forward pass over the reference answer:
greedy decoding gives exactly that answer if and only if every reference token is the
argmax after the reference tokens before it. (A test compares with real decoding.)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdlib.divergences import forward_kl
from kdlib.errors import ArgumentError
from kdlib.pairs import PairedBatch
from kdlib.sampling import complete
from kdlib.teachers import LiveTeacher

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SIDES = ("student", "teacher")


@dataclass(frozen=True)
class Fidelity:
    """A model against reference answers and against its teacher.

    exact_match: share of examples answered exactly
    agreement:   share of response tokens where both have the same argmax
    kl:          KL(teacher || model) per response token, in nats
    hits:        for each example, in order, whether it was answered exactly
    """

    exact_match: float
    agreement: float
    kl: float
    n_tokens: int
    hits: tuple[bool, ...]


@torch.no_grad()
def evaluate(
    model,
    batches: Sequence[PairedBatch],
    teacher_logits: Sequence[Float[Tensor, "N V"]],
    *,
    side: str = "student",
) -> Fidelity:
    """Compare a model, reading one side's inputs, with the teacher's distributions.

    batches:        the evaluation set
    teacher_logits: one tensor a batch, from `teacher_reference`
    side:           whose view the model reads: "student" (x') or "teacher" (x)

    Raises ArgumentError for an unknown side, no batch, or lists of unequal length.
    """
    if side not in SIDES:
        raise ArgumentError(f"side={side!r}", f"use one of {', '.join(SIDES)}")
    if not batches or len(batches) != len(teacher_logits):
        raise ArgumentError(
            f"{len(batches)} batches, {len(teacher_logits)} teacher_logits",
            "give at least one batch, and its teacher_reference",
        )
    hits: list[bool] = []
    agreeing, kl, tokens = 0, 0.0, 0
    for batch, reference in zip(batches, teacher_logits, strict=True):
        logits = response_logits(model, batch, side).cpu()
        wrong = logits.argmax(-1) != batch.response_ids.cpu()
        missed = torch.bincount(
            batch.row_ids.cpu(), wrong.double(), minlength=len(batch.example_ids)
        )
        hits += (missed == 0).tolist()
        agreeing += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        kl += forward_kl(logits, reference).double().sum().item()
        tokens += len(logits)
    return Fidelity(
        exact_match=sum(hits) / len(hits),
        agreement=agreeing / tokens,
        kl=kl / tokens,
        n_tokens=tokens,
        hits=tuple(hits),
    )


def teacher_reference(
    teacher: LiveTeacher, batches: Sequence[PairedBatch]
) -> list[Float[Tensor, "N V"]]:
    """The teacher's logits with its full context, once for all evaluations."""
    return [teacher.targets(batch).cpu() for batch in batches]


def response_logits(
    model, batch: PairedBatch, side: str = "student"
) -> Float[Tensor, "N V"]:
    """A model's logits at every response token, in eval mode; side as in `evaluate`."""
    was_training = model.training
    model.eval()
    try:
        view = getattr(batch, side).to(next(model.parameters()).device)
        output = model(
            input_ids=view.input_ids, attention_mask=view.attention_mask.long()
        )
        return view.select(output.logits)
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Speed:
    """Greedy decoding on one core.

    latency_ms:     the median time of one request on its own
    requests_per_s: the best of three runs of one large batch

    One small request is bound by the dispatch of many small operations, so small
    models differ little there; a batch shows what the arithmetic costs.
    """

    latency_ms: float
    requests_per_s: float


def measure_speed(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int = 16,
    single: int = 8,
) -> Speed:
    """Time `single` requests one by one, then all prompts as one batch.

    Every request is answered with exactly `new_tokens` tokens, so that two models
    differ by their speed and not by the length of their answers.
    """
    if not prompts:
        raise ArgumentError("prompts is empty", "give at least one prompt")

    def answer(requests) -> float:
        start = time.perf_counter()
        complete(
            model,
            tokenizer,
            requests,
            max_new_tokens=new_tokens,
            batch_size=len(requests),
            stop_at_end=False,
        )
        return time.perf_counter() - start

    with one_core():
        answer(prompts[:1])  # the first call also sets things up
        alone = [answer([prompt]) for prompt in prompts[:single]]
        together = min(answer(prompts) for _ in range(3))
    return Speed(1000 * statistics.median(alone), len(prompts) / together)


@contextmanager
def one_core() -> Iterator[None]:
    """Let torch use one thread, then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def parameter_count(model) -> int:
    """Numbers in the model; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())
