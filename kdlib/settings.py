"""The settings of a training run, each one checked.

Knows: names, types and ranges, and how to read them from a file. Does not know what is
done with them.
"""

from __future__ import annotations

import importlib
import inspect
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TypeVar

from kdlib.errors import ArgumentError, DataError, nearest

T = TypeVar("T")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# A resumed run may change these: they do not decide which examples come, in what order,
# at what rate and precision, nor what is minimised. (Sums are rounded elsewhere, so
# only the same settings give the same weights to the last bit.)
MAY_CHANGE = (
    "micro_batch_size",
    "compile",
    "activation_checkpointing",
    "fused",
    "teacher_offload",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
)


@dataclass(frozen=True)
class TrainConfig:
    """How to train; what to minimise is the Objective's business.

    steps:            optimiser steps
    batch_size:       examples a step
    micro_batch_size: examples a forward pass; the loss does not depend on it
    learning_rate:    the peak; warm-up over `warmup` (a share of the steps), then a
                      cosine to `final_rate` (a share of the peak)
    weight_decay:     of AdamW, decoupled
    max_grad_norm:    gradients are clipped to this length
    seed:             order of the examples, and what is drawn in sampling
    lmbda:            the share of steps whose responses the student writes (GKD's
                      lambda); 0 is training on the data alone
    sequence_level:   the teacher writes the responses of the other steps, anew at every
                      pass (on_policy.write_responses writes them once)
    sampling_temperature: of what they write, 0 is greedy; the divergence's own is the
                      Objective's
    max_new_tokens:   of what they write; a response cut there has no end token
    precision:        of the student's forward and backward pass; its weights stay
                      float32. "auto": by what the device can do (precision.py)
    compile:          torch.compile the blocks of student and teacher: a minute at the
                      start, pays in long runs on a GPU; needs a C++ compiler
    activation_checkpointing: keep each block's input alone and compute the block again
                      in the backward pass: a third more time, far less memory
    fused:            the loss from hidden states (fused.py), without [N, V] logits
    teacher_offload:  a LiveTeacher's weights come to the student's device for its
                      forward pass alone, and else are in the CPU's memory
    checkpoint_every: steps between checkpoints; there is one at the end in any case
    keep_checkpoints: how many of them to keep
    log_every:        steps between measurements of the student against its teacher
                      (metrics.py); loss, rate and speed are recorded at every step

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
    lmbda: float = 0.0
    sequence_level: bool = False
    sampling_temperature: float = 1.0
    max_new_tokens: int = 128
    precision: str = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    fused: bool = False
    teacher_offload: bool = False
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10

    def __post_init__(self):
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), field.type)
        for name in ("steps", "batch_size", "learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ArgumentError(
                    f"{name}={getattr(self, name)}", f"use a positive {name}"
                )
        for name in (
            "micro_batch_size",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
            "max_new_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"{name}={value}", f"use 1 or more for {name}")
        for name in ("warmup", "final_rate", "lmbda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(
                    f"{name}={getattr(self, name)}", f"{name} is a share, 0 to 1"
                )
        for name in ("weight_decay", "sampling_temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ArgumentError(
                    f"{name}={getattr(self, name)}", f"use 0 or a positive {name}"
                )
        if self.sequence_level and self.teacher_offload:
            raise ArgumentError(
                "sequence_level=True with teacher_offload=True",
                "set teacher_offload=False: a teacher that writes is needed on the "
                "device; or let it write before (on_policy.write_responses)",
            )
        if self.precision not in PRECISIONS:
            raise ArgumentError(
                f"precision={self.precision!r}", nearest(self.precision, PRECISIONS)
            )

    def rate(self, step: int) -> float:
        """The learning rate at a step, counted from 0."""
        done = step / self.steps
        if done < self.warmup:
            return self.learning_rate * (step + 1) / (self.warmup * self.steps + 1)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)

    @classmethod
    def read(cls, path: str | Path) -> TrainConfig:
        """From a .toml, .yaml or .yml file of `name: value` pairs.

        Raises DataError for a file that cannot be read, ArgumentError for an unknown or
        missing name, and for a value that cannot work.
        """
        return cls.from_table(read_table(path), str(path))

    @classmethod
    def from_table(cls, table: dict, source: str) -> TrainConfig:
        """From names and values; `source` says in errors where they came from."""
        return checked(cls, table, source)


def checked(kind: Callable[..., T], table: dict, source: str) -> T:
    """kind(**table), a dataclass say; `source` says in errors where the table stands.

    Raises ArgumentError as checked_values, and for a value that `kind` refuses.
    """
    values = checked_values(kind, table, source)
    try:
        return kind(**values)
    except ArgumentError as error:
        raise ArgumentError(f"{source}: {error.what}", error.remedy) from error


def checked_values(function: Callable, table: dict, source: str) -> dict:
    """The table's names and values, as options of `function`.

    Options are a dataclass's fields, and what another function takes by name alone.

    Raises ArgumentError for an unknown name (and gives the nearest right one), a
    missing one, and a value of another type.
    """
    if not isinstance(table, Mapping):
        raise ArgumentError(
            f"{source} is {table!r}", "write a table of names and values"
        )
    known = inspect.signature(function).parameters
    if not is_dataclass(function):
        known = {n: p for n, p in known.items() if p.kind is p.KEYWORD_ONLY}
    for name in table:
        if name not in known:
            raise ArgumentError(
                f"{source}: setting {name!r} is unknown", nearest(name, known)
            )
    for name, option in known.items():
        if option.default is option.empty and name not in table:
            raise ArgumentError(f"{source}: setting {name!r} is missing", f"add {name}")
    values = {k: _number(v, known[k].annotation) for k, v in table.items()}
    for name, value in values.items():
        try:
            _check_type(name, value, known[name].annotation)
        except ArgumentError as error:
            raise ArgumentError(f"{source}: {error.what}", error.remedy) from error
    return values


def differences(first: dict[str, dict], second: dict[str, dict]) -> dict[str, tuple]:
    """What differs between two sets of settings: {"PART.NAME": (first's, second's)}."""
    found = {}
    for part in sorted(first.keys() | second.keys()):
        a, b = first.get(part, {}), second.get(part, {})
        for name in sorted(a.keys() | b.keys()):
            if a.get(name) != b.get(name):
                found[f"{part}.{name}"] = a.get(name), b.get(name)
    return found


def read_table(path: str | Path) -> dict:
    """The names and values of a TOML or YAML file.

    Raises DataError for a file that is missing, of another kind, or not well formed.
    """
    path = Path(path)
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise DataError(
            f"{path} is no settings file", "name one that ends in .toml or .yaml"
        )
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text) if path.suffix == ".toml" else _yaml(text)
    except (OSError, ValueError) as error:  # both kinds of syntax error, bad UTF-8
        raise DataError(
            f"settings file {path} cannot be read: {error}",
            "correct the file, or name another one",
        ) from error
    if not isinstance(table, dict):
        raise DataError(
            f"settings file {path} holds {type(table).__name__}, not names and values",
            "write a `name: value` pair a line",
        )
    return table


def _yaml(text: str):
    try:  # comes with transformers, and is nothing that kdlib itself asks for
        yaml = importlib.import_module("yaml")
    except ModuleNotFoundError as error:
        raise ValueError("PyYAML is not installed; TOML needs nothing") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _number(value, kind: str):
    # YAML takes 3e-4 for a text: it wants 3.0e-4.
    if kind == "float" and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass  # the check of types names it
    return value


def _check_type(name: str, value, kind: str) -> None:
    if value is None and kind.endswith("| None"):
        return
    wanted = {
        "int": Integral,
        "float": Real,
        "str": str,
        "bool": bool,
        "dict": Mapping,
    }
    kind = kind.removesuffix(" | None").partition("[")[0]
    is_bool = isinstance(value, bool)  # which Python counts among the integers
    if not isinstance(value, wanted[kind]) or is_bool != (kind == "bool"):
        raise ArgumentError(f"{name}={value!r}", f"{name} is of type {kind}")
