"""The training loop.

    for each batch:  targets from the teacher, logits from the student, the
                     objective's loss, one optimiser step

`train` knows the order of things. What they are is told elsewhere: settings.py,
batching.py (which examples), on_policy.py (who writes their responses), gradients.py
(loss and gradient of a step), precision.py, training_state.py and checkpoints.py (going
on after an end), metrics.py, stopping.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch._functorch.config as functorch

from kdlib.batching import batches_of_steps, check_responses, data_hash, shuffled
from kdlib.distributed import ALONE, Ranks
from kdlib.errors import ArgumentError, TrainingError
from kdlib.gradients import (
    StepLoss,
    StudentLoss,
    accumulate_gradient,
    add_gradient,
    summed,
)
from kdlib.memory import memory_errors_explained, way_out
from kdlib.objective import Objective
from kdlib.on_policy import Author
from kdlib.pairs import EncodedPair, PairCollator
from kdlib.precision import Precision, check_scale, trained_weights
from kdlib.run_folder import RunFolder
from kdlib.settings import TrainConfig
from kdlib.sharding import blocks_of, replicated, shard, whole
from kdlib.stopping import Stopped, StopRequest, stop_on_signals
from kdlib.teachers import CachedTeacher, LiveTeacher, Teacher
from kdlib.training_state import History, TrainingState, layout
from kdlib.views import PairedBatch

__all__ = [
    "History",
    "Stopped",
    "TrainConfig",
    "accumulate_gradient",
    "shuffled",
    "train",
]


def train(
    student,
    pairs: Sequence[EncodedPair],
    collator: PairCollator,
    objective: Objective,
    config: TrainConfig,
    *,
    teacher: Teacher | None = None,
    folder: str | Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
    ranks: Ranks = ALONE,
) -> History:
    """Train `student` in place and leave it in eval mode.

    pairs:   the examples, encoded once by the collator
    teacher: may be None where the objective's hard_weight is 1
    folder:  for checkpoints and metrics. A run that ended early, however it ended, goes
             on from its newest good checkpoint when it is started again with the same
             arguments; on a CPU to the same bits. Without a folder nothing is written
    on_step: called after each step with the steps done and the loss
    ranks:   of `processes`, where several train one student (distributed.py); all of
             them call `train` with the same arguments

    Raises ArgumentError where the pieces do not fit, or `folder` holds another run;
    DataError for an example without a response, or if no checkpoint is good;
    TrainingError for a loss or a gradient that is not finite (the student then keeps
    the weights of the last good step) and where a GPU's memory is too small;
    StorageError where a file cannot be written; with a folder, Stopped after SIGINT or
    SIGTERM, when the step is finished and saved.
    """
    check_arguments(pairs, objective, teacher)
    device = ranks.device or next(student.parameters()).device
    facts = facts_of(student, pairs, objective, config, teacher, ranks)
    ranks.check_same(facts)
    precision = Precision.choose(config.precision, device)
    author = Author(config, objective, collator, student, teacher, precision, ranks)
    loss_of = StudentLoss(
        student,
        objective,
        teacher,
        precision=precision,
        fused=config.fused,
        offload=config.teacher_offload,
    )
    # Before the optimiser, because it may split the weights.
    engine = spread(loss_of, config, ranks)
    optimizer = adamw(student, config)
    state = TrainingState(student, optimizer, precision.scaler(), History(), ranks)
    run = None
    if folder is not None:
        run = RunFolder(folder, state, config, loss_of, facts, ranks)
    history = state.history
    batches = batches_of_steps(
        pairs,
        collator,
        config,
        device,
        skip=state.step,
        rewrite=author.rewrite,
        ask=teacher.targets if isinstance(teacher, CachedTeacher) else None,
        ranks=ranks,
    )
    remedy = way_out(config, objective, teacher, ranks, saved=run is not None)
    start = time.perf_counter() - history.seconds
    with ready(student, teacher, config), stopping(run) as stop, closing(batches, run):
        for step in range(state.step, config.steps):
            with memory_errors_explained(f"step {step}", remedy):
                measure = run is not None and step % config.log_every == 0
                found, norm = take_step(engine, next(batches), state, config, measure)
            history.loss.append(found.loss)
            history.grad_norm.append(norm)
            history.tokens += found.tokens
            history.seconds = time.perf_counter() - start
            if run is not None:
                run.write_line(found, author.told)
            if on_step is not None:
                on_step(step + 1, found.loss)
            if run is not None and run.is_due():
                run.save()
            # A signal may come to one rank in this step and to another in the next.
            asked = next(filter(None, ranks.gather(stop.name)), None)
            if asked:
                run.save()
                raise Stopped(asked, state.step, run.saved.folder)
    return history


def take_step(
    loss_of,
    batches: list[PairedBatch],
    state: TrainingState,
    config: TrainConfig,
    measure: bool,
) -> tuple[StepLoss, float]:
    """One optimiser step; its loss, and the gradient's length before clipping."""
    optimizer, scaler, step = state.optimizer, state.scaler, state.step
    for group in optimizer.param_groups:
        group["lr"] = config.rate(step)
    queued = add_gradient(
        loss_of,
        batches,
        scaler=scaler,
        measure=measure and state.ranks.rank == 0,
        ranks=state.ranks,
    )
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(
        state.student.parameters(), config.max_grad_norm
    )
    found, norm = queued.fetch(whole(norm))
    found = summed(state.ranks.gather(found))
    # In fp16 a gradient may overflow: the scaler leaves the step out and scales less.
    finite = math.isfinite(norm) or scaler.is_enabled()
    if not math.isfinite(found.loss) or not finite:
        raise TrainingError(
            f"step {step}: loss={found.loss}, gradient norm={norm}",
            "lower the learning rate, or look for -inf in the targets; the student "
            "keeps the weights of the step before, and its checkpoints are untouched",
        )
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    check_scale(scaler, step)
    return found, norm


def spread(loss_of: StudentLoss, config: TrainConfig, ranks: Ranks) -> torch.nn.Module:
    """What to call in the place of `loss_of`, by the engine for these ranks."""
    if ranks.shard:
        if config.teacher_offload:  # moving would take the parts apart
            raise ArgumentError(
                "shard=True with teacher_offload=True",
                "leave teacher_offload out: a sharded teacher is in parts already; or "
                "do not shard",
            )
        shard(loss_of.student, ranks)
        if isinstance(loss_of.teacher, LiveTeacher):
            shard(loss_of.teacher.model, ranks)
    elif ranks.world > 1:
        return replicated(loss_of, ranks)
    return loss_of


def check_arguments(
    pairs: Sequence[EncodedPair], objective: Objective, teacher: Teacher | None
) -> None:
    if not pairs:
        raise ArgumentError("pairs is empty", "give at least one encoded example")
    check_responses(pairs)
    if teacher is None and objective.hard_weight < 1:
        raise ArgumentError(
            f"no teacher, but hard_weight={objective.hard_weight}",
            "give a teacher, or train on labels alone with hard_weight=1",
        )


def adamw(student, config: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        trained_weights(student),
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
        fused=True,
    )


def facts_of(student, pairs, objective, config, teacher, ranks) -> dict[str, dict]:
    """What has to be the same for a run to go on."""
    taught = {"kind": type(teacher).__name__}
    if isinstance(teacher, LiveTeacher):
        taught |= layout(teacher.model) | {"signs": teacher.signs()}
    taught |= getattr(teacher, "facts", {})  # what a cache says of its making
    return {
        "config": vars(config),
        "objective": vars(objective),
        "data": {"examples": len(pairs), "sha256": data_hash(pairs)},
        "student": layout(student),
        "teacher": taught,
        "run": {"shard": ranks.shard},
    }


@contextmanager
def ready(student, teacher: Teacher | None, config: TrainConfig) -> Iterator[None]:
    """The student in train mode, compiled and checkpointed as asked; then as before."""
    models = [student]
    if isinstance(teacher, LiveTeacher):
        models.append(teacher.model)
        home = next(teacher.model.parameters()).device
    # Blocks are alike: one program does for all of a model's. And the attention mask is
    # made outside, where transformers sees that causal attention needs none.
    compiled = [part for model in models for part in blocks_of(model)]
    compiled = compiled if config.compile else []
    # What is cheap to compute (norms, SiLU, weights in 16 bits) is computed again in
    # the backward pass, also where a matrix product reads it: a fifth less memory.
    student.train()
    try:
        if config.activation_checkpointing:
            switch_checkpointing(student, True)
        for part in compiled:
            part.compile()  # for the first length, and at the second for all others
        with functorch.patch(ban_recompute_materialized_backward=False):
            yield
    finally:
        for part in compiled:
            part._compiled_call_impl = None
        if config.activation_checkpointing:
            switch_checkpointing(student, False)
        if config.teacher_offload and len(models) == 2:
            models[1].to(home)
        student.zero_grad(set_to_none=True)
        student.eval()


def switch_checkpointing(student, on: bool) -> None:
    verb = "enable" if on else "disable"
    name = f"activation_checkpointing_{verb}"
    if not hasattr(student, name):  # its name before transformers 5.23
        name = f"gradient_checkpointing_{verb}"
    getattr(student, name)(*[{"use_reentrant": False}] * on)


def stopping(run: RunFolder | None):
    """Signals end a run between steps where there is a folder to save it in."""
    return nullcontext(StopRequest()) if run is None else stop_on_signals()


@contextmanager
def closing(batches: Iterator, run: RunFolder | None) -> Iterator[None]:
    try:
        yield
    finally:
        batches.close()
        if run is not None:
            run.close()
