"""A GPU's "out of memory", and what this run can do about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kdlib.distributed import Ranks
from kdlib.errors import TrainingError
from kdlib.objective import Objective
from kdlib.settings import TrainConfig
from kdlib.teachers import CachedTeacher, LiveTeacher, RemoteTeacher, Teacher


@contextmanager
def memory_errors_explained(when: str, remedy: str) -> Iterator[None]:
    """torch's error as a TrainingError; when: "step 4", say."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"{when}: the GPU's memory is too small: {error}", remedy
        ) from error


def way_out(
    config: TrainConfig,
    objective: Objective,
    teacher: Teacher | None,
    ranks: Ranks,
    *,
    saved: bool,
) -> str:
    """The remedy for a run that got as far as its steps.

    First what the same run may change and go on with (settings.MAY_CHANGE), each only
    where it would help and is allowed; else what makes it another run.
    saved: whether there are checkpoints to go on from
    """
    live = isinstance(teacher, LiveTeacher)
    writes = config.lmbda > 0 or config.sequence_level
    rows = math.ceil(config.batch_size / ranks.world)  # of a step, on one rank
    rows = min(rows, config.micro_batch_size or rows)
    ways = []
    if rows > 1:
        ways.append(f"micro_batch_size={rows // 2} (the loss stays the same)")
    if not config.activation_checkpointing:
        ways.append("activation_checkpointing=True")
    fusable = isinstance(teacher, (LiveTeacher, CachedTeacher, RemoteTeacher))
    if fusable and not config.fused and objective.hard_weight < 1:
        ways.append("fused=True")
    movable = not ranks.shard and not config.sequence_level
    if live and not config.teacher_offload and movable:
        ways.append("teacher_offload=True")
    if ways:
        again = "started again with the same folder, the run goes on from its last "
        again += "checkpoint, which is untouched"
        return f"try {', '.join(ways)}; {again if saved else 'nothing was saved'}"
    ways = ["a GPU with more memory", "a smaller model"]
    if live and not writes:
        ways.append("targets that are cached first (python -m kdlib cache)")
    if ranks.world > 1 and not ranks.shard:
        ways.append("shard=True")
    return f"start a new run with {' or '.join(ways)}"
