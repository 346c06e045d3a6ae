"""What a run needs to go on: everything that decides its next step.

    weights          model.safetensors
    optimiser        moments and step counts
    gradient scaler  of fp16
    random states    of Python, NumPy, torch and the device: dropout draws from them
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

from kdlib import checkpoints
from kdlib.errors import ArgumentError, DataError

WEIGHTS, REST = "model.safetensors", "training.pt"


@dataclass
class History:
    """What happened: one entry a step, and the tokens that the student read."""

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

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.history.loss)

    def save(self, folder: Path, facts: dict, keep: int) -> checkpoints.Checkpoint:
        """Write a checkpoint of this moment. Raises StorageError as `write`."""
        writers = {WEIGHTS: self._write_weights, REST: self._write_rest}
        return checkpoints.write(folder, self.step, writers, facts, keep=keep)

    def load(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Raises DataError where the checkpoint is of another kind of student."""
        from safetensors.torch import load_model

        try:
            rest = torch.load(
                checkpoint.folder / REST, map_location="cpu", weights_only=True
            )
            load_model(self.student, checkpoint.folder / WEIGHTS)
            self.optimizer.load_state_dict(rest["optimizer"])
            if rest["scaler"]:  # empty: another device, whose precision had no scaler
                self.scaler.load_state_dict(rest["scaler"])
            self.history.loss[:] = rest["loss"].tolist()
            self.history.grad_norm[:] = rest["grad_norm"].tolist()
            self.history.tokens, self.history.seconds = rest["tokens"], rest["seconds"]
            set_random_states(rest["random"])
        except Exception as error:  # torch, pickle and safetensors: each their own
            raise DataError(
                f"checkpoint {checkpoint.folder} does not fit: {error}",
                "build the student as for the run that wrote it, or name another "
                "folder",
            ) from error

    def _write_weights(self, path: Path) -> None:
        from safetensors.torch import save_model

        save_model(self.student, str(path))  # tied weights are written once

    def _write_rest(self, path: Path) -> None:
        rest = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss": torch.tensor(self.history.loss, dtype=torch.float64),
            "grad_norm": torch.tensor(self.history.grad_norm, dtype=torch.float64),
            "tokens": self.history.tokens,
            "seconds": self.history.seconds,
            "random": random_states(),
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
    """What tells one kind of student from another: names and shapes of its weights."""
    shapes = {name: list(x.shape) for name, x in student.state_dict().items()}
    text = json.dumps(shapes, sort_keys=True)
    return {
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
    differing = []
    for part in sorted(facts.keys() | checkpoint.facts.keys()):
        now, then = facts.get(part, {}), checkpoint.facts.get(part, {})
        for name in sorted(now.keys() | then.keys()):
            if name not in may_change and now.get(name) != then.get(name):
                values = f"{then.get(name)!r}, now {now.get(name)!r}"
                differing.append(f"{part}.{name} was {values}")
    if differing:
        raise ArgumentError(
            f"{checkpoint.folder} is of a run with other settings: "
            f"{'; '.join(differing)}",
            "go on with the same settings, or name another folder for a new run",
        )
