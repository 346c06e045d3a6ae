"""`python -m kdlib doctor RUN_OR_CONFIG`: findings on a run, or on its first batch.

A folder is a run, and its metrics are examined. A settings file is a run to come: what
it names is made as `train` makes it (train_command.py), and its first batch goes
through student, teacher and loss, without a step of the optimiser.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from kdlib.batching import batches_of_steps
from kdlib.distributed import processes
from kdlib.doctor import Finding, examine_batch, examine_run
from kdlib.doctor.record import Record
from kdlib.doctor.views import truncated_contexts
from kdlib.errors import ArgumentError
from kdlib.examples import read_examples
from kdlib.gradients import StudentLoss
from kdlib.precision import Precision
from kdlib.run_plan import Plan
from kdlib.train_command import prepare


def examine(path: str | Path, floor: float | None = None) -> list[Finding]:
    """Of a run's folder or a settings file.

    floor: see examine_run; for a folder alone

    Raises ArgumentError for a path that is neither, and what the rooms below raise.
    """
    path = Path(path)
    if path.name == "metrics.jsonl":
        path = path.parent
    if os.path.isdir(path):
        return examine_run(path, floor=floor)
    if not os.path.exists(path):  # which Path's own would raise where it may not look
        raise ArgumentError(
            f"{path} does not exist, or you may not look into its folder",
            "name a run's folder, or its settings file",
        )
    if floor is not None:
        raise ArgumentError(
            f"floor={floor} for the settings file {path}",
            "leave it out: it is a line for the KL of a run that has been made",
        )
    return examine_plan(Plan.read(path))


def unseen(path: str | Path) -> list[str]:
    """What a run's folder does not show, so that nothing found there is no verdict."""
    path = Path(path)
    path = path.parent if path.name == "metrics.jsonl" else path
    return Record.read(path).unseen if path.is_dir() else []


def examine_plan(plan: Plan) -> list[Finding]:
    """The first batch of a run to come, and the truncation of all its examples."""
    with processes() as ranks:
        parts = prepare(plan, ranks)
        batches = batches_of_steps(
            parts.pairs, parts.collator, plan.train, ranks.device
        )
        batch = next(batches)[0]
        batches.close()
        own = StudentLoss(
            parts.student.train(),
            plan.objective,
            parts.teacher,
            precision=Precision.choose(plan.train.precision, ranks.device),
        )
        findings = examine_batch(
            parts.student,
            batch,
            plan.objective,
            teacher=parts.teacher,
            loss=lambda student, batch: own(batch, None)[0].total,
            collator=parts.collator,
            examples=read_examples(plan.data.source),
        )
    cuts = [(pair.truncated_teacher, pair.truncated_student) for pair in parts.pairs]
    of_all = truncated_contexts(torch.tensor(cuts), parts.collator)
    names = {finding.name for finding in of_all}
    return of_all + [finding for finding in findings if finding.name not in names]
