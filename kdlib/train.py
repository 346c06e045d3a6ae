"""The training loop.

    for each batch:  targets from the teacher, logits from the student, the
                     objective's loss, one optimiser step

`train` knows devices, batches, the schedule and when to stop. It knows nothing of
divergences (objective.py) or of where targets come from (teachers.py).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from kdlib.errors import ArgumentError, TrainingError
from kdlib.objective import Objective
from kdlib.pairs import EncodedPair, PairCollator, PairedBatch
from kdlib.teachers import Teacher


@dataclass(frozen=True)
class TrainConfig:
    """How to train; what to minimise is the Objective's business.

    steps:            optimiser steps
    batch_size:       examples a step
    micro_batch_size: examples a forward pass; the loss does not depend on it
    learning_rate:    the peak; warm-up over `warmup` (a share of the steps), then a
                      cosine to `final_rate` (a share of the peak)
    max_grad_norm:    gradients are clipped to this length
    seed:             order of the examples

    Raises ArgumentError for a value that cannot work.
    """

    steps: int
    batch_size: int = 64
    micro_batch_size: int | None = None
    learning_rate: float = 3e-3
    warmup: float = 0.05
    final_rate: float = 0.02
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ArgumentError(
                    f"{name}={getattr(self, name)}", f"use a positive {name}"
                )
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ArgumentError(
                f"micro_batch_size={self.micro_batch_size}", "use 1 or more, or None"
            )
        for name in ("warmup", "final_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(
                    f"{name}={getattr(self, name)}", f"{name} is a share, 0 to 1"
                )

    def rate(self, step: int) -> float:
        """The learning rate at a step, counted from 0."""
        done = step / self.steps
        if done < self.warmup:
            return self.learning_rate * (step + 1) / (self.warmup * self.steps + 1)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)


@dataclass
class History:
    """What happened: one entry a step, and the tokens that the student read."""

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


def train(
    student,
    pairs: Sequence[EncodedPair],
    collator: PairCollator,
    objective: Objective,
    config: TrainConfig,
    *,
    teacher: Teacher | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> History:
    """Train `student` in place and leave it in eval mode.

    pairs:   the examples, encoded once by the collator
    teacher: may be None where the objective's hard_weight is 1
    on_step: called after each step with the steps done and the loss

    Raises ArgumentError where the pieces do not fit, TrainingError for a loss or a
    gradient that is not finite: the student then keeps the weights of the last good
    step.
    """
    if not pairs:
        raise ArgumentError("pairs is empty", "give at least one encoded example")
    if teacher is None and objective.hard_weight < 1:
        raise ArgumentError(
            f"no teacher, but hard_weight={objective.hard_weight}",
            "give a teacher, or train on labels alone with hard_weight=1",
        )
    device = next(student.parameters()).device
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
        fused=True,
    )
    history, start = History(), time.perf_counter()
    batches = shuffled(pairs, config.batch_size, random.Random(config.seed))
    student.train()
    try:
        for step in range(config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.rate(step)
            parts = micro_batches(next(batches), config.micro_batch_size)
            loss, tokens = accumulate_gradient(
                student,
                [collator.collate(p).to(device) for p in parts],
                objective,
                teacher,
            )
            norm = torch.nn.utils.clip_grad_norm_(
                student.parameters(), config.max_grad_norm
            ).item()
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise TrainingError(
                    f"step {step}: loss={loss}, gradient norm={norm}",
                    "lower the learning rate, or look for -inf in the targets; the "
                    "student keeps the weights of the step before",
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            history.loss.append(loss)
            history.grad_norm.append(norm)
            history.tokens += tokens
            if on_step is not None:
                on_step(step + 1, loss)
    finally:
        student.zero_grad(set_to_none=True)
        student.eval()
        history.seconds = time.perf_counter() - start
    return history


def accumulate_gradient(
    student, batches: list[PairedBatch], objective: Objective, teacher: Teacher | None
) -> tuple[float, int]:
    """Add the gradient of one step; return its loss and the tokens read.

    Every micro-batch is divided by the count of the whole step, so that neither loss
    nor gradient depends on how the step was split.
    """
    counts = {
        "token_mean": sum(len(b.response_ids) for b in batches),
        "sequence_mean": sum(len(b.example_ids) for b in batches),
    }
    loss, tokens = 0.0, 0
    for batch in batches:
        targets = None if teacher is None else teacher.targets(batch)
        part = objective(
            student_logits(student, batch),
            targets,
            batch.response_ids,
            row_ids=batch.row_ids,
            num_items=counts.get(objective.reduction),
        )
        part.total.backward()
        loss += part.total.item()
        tokens += int(batch.student.attention_mask.sum())
    return loss, tokens


def student_logits(student, batch: PairedBatch) -> torch.Tensor:
    """[N, V] the student's logits for every response token of the batch."""
    view = batch.student
    output = student(
        input_ids=view.input_ids, attention_mask=view.attention_mask.long()
    )
    return view.select(output.logits)


def shuffled(
    pairs: Sequence[EncodedPair], batch_size: int, rng: random.Random
) -> Iterator[list[EncodedPair]]:
    """Endless batches; each pass shuffles anew and batches rows of like length.

    Rows are sorted by length within windows of 16 batches: little padding, and still
    a new mixture at every pass.
    """
    order = list(range(len(pairs)))

    def length(i: int) -> int:
        return len(pairs[i].student_prompt_ids) + len(pairs[i].response_ids)

    while True:
        rng.shuffle(order)
        batches = []
        for start in range(0, len(order), 16 * batch_size):
            window = sorted(order[start : start + 16 * batch_size], key=length)
            batches += [
                window[i : i + batch_size] for i in range(0, len(window), batch_size)
            ]
        rng.shuffle(batches)
        for batch in batches:
            yield [pairs[i] for i in batch]


def micro_batches(
    pairs: list[EncodedPair], size: int | None
) -> list[list[EncodedPair]]:
    size = size or len(pairs)
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]
