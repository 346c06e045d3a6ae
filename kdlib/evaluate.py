"""How faithful is the student, and what does it cost to run?

Exact match and agreement are read off one forward pass over the reference answer:
greedy decoding gives exactly that answer if and only if every reference token is the
argmax after the reference tokens before it. (A test compares with real decoding.)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdlib.divergences import forward_kl
from kdlib.errors import ArgumentError
from kdlib.pairs import EncodedPair, PairCollator
from kdlib.sampling import complete
from kdlib.sparse import sparse_divergence
from kdlib.sparse_targets import SparseTargets
from kdlib.teachers import LiveTeacher, Teacher
from kdlib.views import PairedBatch

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor

SIDES = ("student", "teacher")


@dataclass(frozen=True)
class Fidelity:
    """A model against reference answers and against its teacher.

    exact_match: share of examples answered exactly
    agreement:   share of response tokens where both have the same argmax
    kl:          KL(teacher || model) per response token, in nats
    hits:        for each example, in order, whether it was answered exactly

    agreement and kl are None where there is no teacher, agreement also for sampled
    targets, which do not tell the teacher's argmax.
    """

    exact_match: float
    agreement: float | None
    kl: float | None
    n_tokens: int
    hits: tuple[bool, ...]


@torch.no_grad()
def evaluate(
    model,
    batches: Sequence[PairedBatch],
    targets: Sequence[Float[Tensor, "N V"] | SparseTargets | None],
    *,
    side: str = "student",
) -> Fidelity:
    """Compare a model, reading one side's inputs, with the teacher's distributions.

    batches: the evaluation set
    targets: one for each batch: logits (from `teacher_reference`), SparseTargets, or
             None for no teacher. Sparse ones give the KL of their own kind (sparse.py),
             at their own temperature
    side:    whose view the model reads: "student" (x') or "teacher" (x)

    Raises ArgumentError for an unknown side, no batch, or lists of unequal length.
    """
    if side not in SIDES:
        raise ArgumentError(f"side={side!r}", f"use one of {', '.join(SIDES)}")
    if not batches or len(batches) != len(targets):
        raise ArgumentError(
            f"{len(batches)} batches, {len(targets)} targets",
            "give at least one batch, and its teacher_reference",
        )
    return together(
        [
            _compared(response_logits(model, batch, side).cpu(), target, batch)
            for batch, target in zip(batches, targets, strict=True)
        ]
    )


def together(parts: Sequence[Fidelity]) -> Fidelity:
    """One Fidelity of several parts of an evaluation set, with means over tokens."""
    tokens = sum(part.n_tokens for part in parts)
    hits = [hit for part in parts for hit in part.hits]
    agreement = kl = None
    if all(part.agreement is not None for part in parts):
        agreement = sum(round(p.agreement * p.n_tokens) for p in parts) / tokens
    if all(part.kl is not None for part in parts):
        kl = sum(part.kl * part.n_tokens for part in parts) / tokens
    return Fidelity(
        exact_match=sum(hits) / len(hits),
        agreement=agreement,
        kl=kl,
        n_tokens=tokens,
        hits=tuple(hits),
    )


def _compared(logits: Float[Tensor, "N V"], targets, batch: PairedBatch) -> Fidelity:
    """What a model says about one batch, against the answers and the targets."""
    agreement = kl = None
    if isinstance(targets, SparseTargets):
        targets = targets.to(logits.device)
        kl = sparse_divergence(logits, targets, temperature=targets.temperature)
    elif targets is not None:
        kl = forward_kl(logits, targets)
    if targets is not None and (likeliest := _likeliest(targets)) is not None:
        # Padding of the longer vocabulary is no token of either.
        vocab = _vocabulary(targets) or logits.shape[-1]
        same = logits[:, :vocab].argmax(-1) == likeliest
        agreement = same.double().mean().item()
    hits = _hits(logits.argmax(-1), batch)
    kl = None if kl is None else kl.double().mean().item()
    return Fidelity(sum(hits) / len(hits), agreement, kl, len(logits), hits)


def _likeliest(targets) -> Int64[Tensor, " N"] | None:
    """The teacher's argmax; None for sampled targets, which are in no order."""
    if not isinstance(targets, SparseTargets):
        return targets.argmax(-1)
    return None if targets.weights is not None else targets.indices[:, 0].long()


def _vocabulary(targets) -> int | None:
    if isinstance(targets, SparseTargets):
        return targets.vocab_size
    return targets.shape[-1]


def _hits(said: Int64[Tensor, " N"], batch: PairedBatch) -> tuple[bool, ...]:
    """Whether each row's response is token for token what was said."""
    wrong = said.cpu() != batch.response_ids.cpu()
    missed = torch.bincount(
        batch.row_ids.cpu(), wrong.double(), minlength=len(batch.example_ids)
    )
    return tuple((missed == 0).tolist())


def fidelity_report(
    student,
    teacher: Teacher | None,
    collator: PairCollator,
    pairs: Sequence[EncodedPair],
    *,
    batch_size: int = 32,
) -> dict[str, dict]:
    """The student (reading x') and its teacher (reading x) on a set of examples.

    {"student": row, "teacher": row}, a row being exact_match, agreement and kl of
    Fidelity, examples, and parameters (None where the teacher is not in memory).
    Without a teacher there is the student's row alone, and no agreement and no kl.

    A batch at a time: the teacher's logits for a whole set may not fit into memory.
    """
    scores: dict[str, list[Fidelity]] = {"student": [], "teacher": []}
    for start in range(0, len(pairs), batch_size):
        batch, target = collator.collate(pairs[start : start + batch_size]), None
        if teacher is not None:
            target = teacher.targets(batch).to("cpu")
            if (likeliest := _likeliest(target)) is not None:
                hits, n = _hits(likeliest, batch), len(likeliest)
                itself = Fidelity(sum(hits) / len(hits), 1.0, 0.0, n, hits)
                scores["teacher"].append(itself)
        scores["student"].append(evaluate(student, [batch], [target]))
    sides = {"student": student, "teacher": getattr(teacher, "model", None)}
    report = {}
    for side, parts in scores.items():
        if parts:
            whole = together(parts)
            report[side] = {
                "exact_match": whole.exact_match,
                "agreement": whole.agreement,
                "kl": whole.kl,
                "examples": len(whole.hits),
                "parameters": sides[side] and parameter_count(sides[side]),
            }
    return report


def table(report: Mapping[str, Mapping]) -> str:
    """A fidelity report as text for a terminal."""

    def number(value, wide: int) -> str:
        return f"{'-' if value is None else f'{value:.3f}':>{wide}}"

    lines = [f"{'':10}{'exact':>7}{'agree':>7}{'KL':>8}{'parameters':>15}"]
    for side, row in report.items():
        size = "-" if row["parameters"] is None else f"{row['parameters']:,}"
        lines.append(
            f"{side:10}{number(row['exact_match'], 7)}{number(row['agreement'], 7)}"
            f"{number(row['kl'], 8)}{size:>15}   {row['examples']:,} examples"
        )
    return "\n".join(lines)


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
        return view.select(view.output_of(model).logits)
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
