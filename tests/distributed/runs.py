"""Small training runs, alone or on several ranks, and what came of them.

    torchrun .. runs.py LEG FOLDER     rank 0 writes FOLDER/LEG.pt

Students are float64, so that one process and two differ by rounding of 1e-16 and a
wrong factor cannot hide in a tolerance.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

from kdlib import localize, models
from kdlib.distributed import ALONE, Ranks, processes
from kdlib.errors import TrainingError
from kdlib.objective import Objective
from kdlib.pairs import PairCollator
from kdlib.sharding import whole
from kdlib.teachers import CachedTeacher, LiveTeacher, write_cache
from kdlib.train import Stopped, TrainConfig, train

# 11 examples in batches of 5: two ranks get 3 and 2 rows, or 1 and none.
EXAMPLES = 11
CONFIG = TrainConfig(
    steps=4, batch_size=5, learning_rate=1e-2, checkpoint_every=100, log_every=1
)
LIVE, CACHED = "live", "cached"
# Objective, what is changed in CONFIG, teacher
RUNS = {
    "tokens": (Objective(), {}, LIVE),
    "labels": (Objective(hard_weight=0.4, temperature=2.0), {}, LIVE),
    "rows": (
        Objective("reverse_kl", reduction="sequence_mean"),
        {"micro_batch_size": 2},
        LIVE,
    ),
    "sum": (Objective(reduction="sum"), {"micro_batch_size": 1}, LIVE),
    "clipped": (Objective(), {"max_grad_norm": 1e-3}, LIVE),
    "cached": (Objective(), {"micro_batch_size": 2}, CACHED),
    "blocks again": (Objective(), {"activation_checkpointing": True}, LIVE),
    "fused": (
        Objective(hard_weight=0.4),
        {"fused": True, "micro_batch_size": 2},
        LIVE,
    ),
    "on-policy": (
        Objective("reverse_kl"),
        {"lmbda": 0.5, "sequence_level": True, "max_new_tokens": 6},
        LIVE,
    ),
}
ADAPTERS = "adapters"
if importlib.util.find_spec("peft"):
    RUNS[ADAPTERS] = Objective(hard_weight=0.4), {"micro_batch_size": 2}, LIVE
COPIED, SHARDED = "copied", "sharded"  # DDP, FSDP2


class Setting:
    """What every run begins with."""

    def __init__(self, folder: Path):
        _, self.tokenizer = models.load("teacher")
        self.collator, self.cache = PairCollator(self.tokenizer), folder / "cache"
        examples = localize.examples("test", locales=["fr"], limit=EXAMPLES)
        self.pairs = [self.collator.encode(e, i) for i, e in enumerate(examples)]
        assert len({len(pair.response_ids) for pair in self.pairs}) > 3

    def model(self, seed: int):
        return models.build(
            self.tokenizer, hidden_size=8, layers=2, heads=2, seed=seed
        ).double()

    def teacher(self, kind: str):
        if kind == LIVE:
            return LiveTeacher(self.model(seed=1))
        return CachedTeacher(self.cache, self.tokenizer)

    def write_cache(self) -> None:
        batch = self.collator.collate(self.pairs)
        write_cache(self.cache, self.teacher(LIVE), [batch], self.tokenizer)


def run(
    setting: Setting,
    name: str,
    ranks: Ranks = ALONE,
    *,
    folder: Path | None = None,
    stop_at: int | None = None,
    dropout: float = 0.0,
    fail_at: int | None = None,
) -> dict:
    """Losses, gradient norms and the student's weights at the end of a run.

    stop_at: a step at which the last rank, and no other, gets a SIGTERM
    fail_at: a step at which the last rank, and no other, raises
    """
    objective, changes, kind = RUNS[name]
    student = setting.model(seed=0)
    if name == ADAPTERS:
        student = models.add_lora(student, rank=2)
    for module in student.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    torch.manual_seed(ranks.rank)

    def on_step(step, loss):
        if ranks.rank == ranks.world - 1:
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            if step == fail_at:
                raise TrainingError("the cat bit the cable", "feed the cat")

    history, stopped = None, None
    try:
        history = train(
            student,
            setting.pairs,
            setting.collator,
            objective,
            replace(CONFIG, **changes),
            teacher=setting.teacher(kind),
            folder=folder,
            on_step=on_step,
            ranks=ranks,
        )
    except Stopped as stop:
        stopped = ranks.gather(stop.step)
    weights = {n: whole(p.detach()) for n, p in student.named_parameters()}
    return {
        "loss": history and history.loss,
        "grad_norm": history and history.grad_norm,
        "tokens": history and history.tokens,
        "stopped": stopped,
        "weights": weights,
        "held": sum(
            getattr(p, "to_local", lambda p=p: p)().numel()
            for p in student.parameters()
        ),
        "groups": sum(isinstance(m, FSDPModule) for m in student.modules()),
    }


def leg(name: str, setting: Setting, ranks: Ranks, folder: Path) -> dict:
    """One start of torchrun: what all of its runs found."""
    found = {}
    for engine in (COPIED, SHARDED):
        here = replace(ranks, shard=engine == SHARDED)
        resumed = folder / engine
        if name == "first":
            for scenario in RUNS:
                found[scenario, engine] = run(setting, scenario, here)
            found["recorded", engine] = run(
                setting, "rows", here, folder=folder / f"recorded-{engine}"
            )
            found["dropout", engine] = run(setting, "tokens", here, dropout=0.2)
            found["dropout, part", engine] = run(
                setting,
                "tokens",
                here,
                dropout=0.2,
                folder=folder / f"dropout-{engine}",
                stop_at=2,
            )
        if name == "third":
            found["dropout, end", engine] = run(
                setting,
                "tokens",
                here,
                dropout=0.2,
                folder=folder / f"dropout-{engine}",
            )
        stop_at = {"first": 1, "second": 3, "third": None}[name]
        found["resumed", engine] = run(
            setting, "rows", here, folder=resumed, stop_at=stop_at
        )
    return found


def main(name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    with processes(shard=True) as ranks:
        setting = Setting(folder)
        if name == "fail":
            run(setting, "rows", ranks, folder=folder / "failed", fail_at=2)
        else:
            found = leg(name, setting, ranks, folder)
            if ranks.rank == 0:
                torch.save(found, folder / f"{name}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
