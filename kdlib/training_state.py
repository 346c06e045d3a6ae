"""What a run needs to go on: everything that decides its next step.

    weights          model.safetensors; of a sharded run in shards/, with the moments
    optimiser        moments and step counts
    gradient scaler  of fp16
    random states    of Python, NumPy, torch and the device, on every rank: dropout
                     draws from them
    history          losses so far; how many there are is the place in the data

The learning rate needs no state: it is a function of the step. Neither does the order
of the data: it is a function of seed and step (batching.py).
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from kdlib import checkpoints, sharding
from kdlib.distributed import ALONE, Ranks
from kdlib.errors import ArgumentError, DataError, StorageError
from kdlib.settings import differences

WEIGHTS, SHARDS, REST = "model.safetensors", "shards", "training.pt"


@dataclass
class History:
    """What happened.

    loss, grad_norm: an entry a step; the norm is of the whole gradient, before clipping
    tokens:          that the student read, of all ranks, padding left out
    seconds:         from the first step on, pauses between starts left out
    """

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class TrainingState:
    """The live objects of a run, filled again from a checkpoint."""

    student: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    history: History
    ranks: Ranks = ALONE

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.history.loss)

    def save(self, folder: Path, facts: dict, keep: int) -> checkpoints.Checkpoint:
        """Write a checkpoint of this moment, all ranks together.

        Rank 0 writes it; of a sharded run every rank its part. Raises StorageError as
        `write`.
        """
        states = self.ranks.gather(random_states())
        writers = {REST: lambda path: self._write_rest(path, states)}
        if self.ranks.shard:
            writers[SHARDS] = self._write_shards
        else:
            writers[WEIGHTS] = self._write_weights
        saved = None
        if self.ranks.rank == 0:
            saved = checkpoints.write(folder, self.step, writers, facts, keep=keep)
        elif self.ranks.shard:
            try:
                self._write_shards(None)
            except OSError as error:
                raise StorageError(
                    f"could not write rank {self.ranks.rank}'s part of a checkpoint: "
                    f"{error}",
                    "free disk space; the last good checkpoint is untouched",
                ) from error
        return self.ranks.from_first(saved)

    def load(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Raises DataError where the checkpoint is of another kind of student."""
        from safetensors.torch import load_model

        try:
            rest = torch.load(
                checkpoint.folder / REST, map_location="cpu", weights_only=True
            )
            if self.ranks.shard:
                self._read_shards(checkpoint.folder / SHARDS, rest["optimizer"])
            else:
                load_model(self.student, checkpoint.folder / WEIGHTS)
                self.optimizer.load_state_dict(rest["optimizer"])
            if rest["scaler"]:  # empty: another device, whose precision had no scaler
                self.scaler.load_state_dict(rest["scaler"])
            self.history.loss[:] = rest["loss"].tolist()
            self.history.grad_norm[:] = rest["grad_norm"].tolist()
            self.history.tokens, self.history.seconds = rest["tokens"], rest["seconds"]
            # A rank that the run did not have before keeps the state it was given.
            if self.ranks.rank < len(rest["random"]):
                set_random_states(rest["random"][self.ranks.rank])
        except Exception as error:  # torch, pickle and safetensors: each their own
            raise DataError(
                f"checkpoint {checkpoint.folder} does not fit: {error}",
                "build the student as for the run that wrote it, or name another "
                "folder",
            ) from error

    def _write_weights(self, path: Path) -> None:
        from safetensors.torch import save_model

        save_model(self.student, str(path))  # tied weights are written once

    def _write_shards(self, path: Path | None) -> None:
        tensors = sharding.weights_and_moments(self.student, self.optimizer)
        sharding.write_shards(tensors, self.ranks.from_first(path))

    def _read_shards(self, path: Path, steps: dict[str, float]) -> None:
        tensors = sharding.weights_and_moments(self.student, self.optimizer)
        sharding.read_shards(tensors, path)
        sharding.set_steps(self.student, self.optimizer, steps)

    def _write_rest(self, path: Path, random_states: list[dict]) -> None:
        if self.ranks.shard:  # its moments are in the shards
            optimizer = sharding.steps_of(self.student, self.optimizer)
        else:
            optimizer = self.optimizer.state_dict()
        rest = {
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "loss": torch.tensor(self.history.loss, dtype=torch.float64),
            "grad_norm": torch.tensor(self.history.grad_norm, dtype=torch.float64),
            "tokens": self.history.tokens,
            "seconds": self.history.seconds,
            "random": random_states,
        }
        torch.save(rest, path)


def random_states() -> dict:
    """The state of every global generator, in types that weights_only reads."""
    name, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states: dict) -> None:
    """Set what this machine has of them."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        devices = torch.cuda.device_count()
        torch.cuda.set_rng_state_all(states["cuda"][:devices])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


def layout(student: torch.nn.Module) -> dict:
    """What tells one kind of student from another: names and shapes of its weights, and
    the scale of adapters, which no weight shows.
    """
    shapes = {name: list(x.shape) for name, x in student.state_dict().items()}
    text = json.dumps(shapes, sort_keys=True)
    adapters = getattr(student, "peft_config", {}).values()
    scales = {"lora_alpha": [getattr(a, "lora_alpha", None) for a in adapters]}
    return (scales if adapters else {}) | {
        "class": type(student).__name__,
        "parameters": sum(p.numel() for p in student.parameters()),
        "shapes": hashlib.sha256(text.encode()).hexdigest(),
    }


def check_same(facts: dict, checkpoint: checkpoints.Checkpoint, may_change) -> None:
    """Refuse to go on under other settings than those of the checkpoint.

    facts: {"config": {...}, "objective": {...}, ...}, as JSON gives them back
    may_change: names of settings that may differ

    Raises ArgumentError naming every setting that differs, with both values.
    """
    differing = [
        f"{name} was {then!r}, now {now!r}"
        for name, (then, now) in differences(checkpoint.facts, facts).items()
        if name.partition(".")[2] not in may_change
    ]
    if differing:
        same = "the same settings"
        if all(name.startswith("teacher.") for name in differing):
            same = "the teacher that the run began with"
        raise ArgumentError(
            f"{checkpoint.folder} is of a run with other settings: "
            f"{'; '.join(differing)}",
            f"go on with {same}, or name another folder for a new run",
        )
