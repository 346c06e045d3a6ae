"""The folder of a run: what it leaves, and how it goes on after an end of any kind.

FOLDER/checkpoints/step-00000500/   checkpoints.py
FOLDER/metrics.jsonl                metrics.py
FOLDER/tensorboard/                 where TensorBoard is installed
FOLDER/.lock                        while a process is at it (lock.py)
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from kdlib import checkpoints
from kdlib.distributed import ALONE, Ranks
from kdlib.gradients import StepLoss, StudentLoss
from kdlib.lock import only_process_in
from kdlib.metrics import (
    Record,
    flops_per_token,
    peak_flops,
    peak_memory,
    step_flops,
)
from kdlib.settings import MAY_CHANGE, TrainConfig
from kdlib.teachers import LiveTeacher
from kdlib.training_state import TrainingState, check_same


class RunFolder:
    """Goes on from the newest good checkpoint, where there is one.

    facts: what has to be the same for that, {"config": {...}, "data": {...}, ...}

    Raises ArgumentError where the run in the folder is another one, DataError where all
    its checkpoints are damaged or do not fit, StorageError where nothing can be
    written, or another process is at it (lock.py). Until then nothing in the folder has
    changed.
    """

    def __init__(
        self,
        folder: str | Path,
        state: TrainingState,
        config: TrainConfig,
        loss_of: StudentLoss,
        facts: dict,
        ranks: Ranks = ALONE,
    ):
        self.checkpoints = Path(folder) / "checkpoints"
        self.state, self.config, self.loss_of = state, config, loss_of
        self.ranks = ranks
        # As JSON gives it back, so that it compares with what a manifest holds.
        self.facts = json.loads(json.dumps(facts, default=lambda x: x.item()))
        with ExitStack() as held:
            if ranks.rank == 0:
                held.enter_context(only_process_in(Path(folder)))
            self._go_on()
            self.record = None
            if ranks.rank == 0:
                self.record = Record(Path(folder), state.step, config.steps)
            self._held = held.pop_all()  # until `close`

    def _go_on(self) -> None:
        first, found = self.ranks.rank == 0, None
        if first:
            found = checkpoints.newest_good(self.checkpoints)
        self.saved = self.ranks.from_first(found)
        if self.saved is not None:
            check_same(self.facts, self.saved, MAY_CHANGE)
            self.state.load(self.saved)
            self.ranks.gather("loaded")  # nothing is removed while a rank reads
            if first:
                keep = self.config.keep_checkpoints
                checkpoints.tidy(self.checkpoints, self.state.step, keep)

    def write_line(self, found: StepLoss, told: dict[str, float]) -> None:
        """The step just done, as a line of metrics.jsonl; told: more of its numbers.

        Rank 0 writes it.
        """
        if self.record is None:
            return
        step = self.state.step
        device = next(self.state.student.parameters()).device
        line = {
            "loss": found.loss,
            **found.parts,
            **found.fidelity,
            **told,
            "grad_norm": self.state.history.grad_norm[-1],
            "learning_rate": self.config.rate(step - 1),
            "peak_memory": peak_memory(device),
        }
        peak = peak_flops(device, self.loss_of.precision.name)
        seconds = None
        if peak is not None:
            seconds = self._flops(found, told) / (peak * self.ranks.world)
        self.record.write(step, line, tokens=found.tokens, seconds_at_peak=seconds)

    def _flops(self, found: StepLoss, told: dict[str, float]) -> float:
        """Of the step, as metrics.py says what counts."""
        student, teacher = self.loss_of.student, self.loss_of.teacher
        live = teacher.model if isinstance(teacher, LiveTeacher) else None
        flops = step_flops(
            student, found.tokens, found.rows, live, found.teacher_tokens
        )
        if told.get("student_written"):
            length = found.tokens / found.rows
            flops += found.tokens * flops_per_token(student, length, training=False)
        if told.get("teacher_written") and live is not None:
            length = found.teacher_tokens / found.rows
            once = flops_per_token(live, length, training=False)
            flops += found.teacher_tokens * once
        return flops

    def close(self) -> None:
        if self.record is not None:
            self.record.close()
        self._held.close()

    def is_due(self) -> bool:
        step = self.state.step
        return step % self.config.checkpoint_every == 0 or step == self.config.steps

    def save(self) -> None:
        """A checkpoint of this moment, unless there is one. All ranks together."""
        if self.saved is None or self.saved.step != self.state.step:
            if self.record is not None:
                self.record.flush()
            self.saved = self.state.save(
                self.checkpoints, self.facts, self.config.keep_checkpoints
            )
