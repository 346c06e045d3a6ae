"""The file that describes a training run, in TOML or YAML: every name in it is checked.

    [train]       steps = 200, ..                   a TrainConfig
    [objective]   divergence = "forward_kl", ..     an Objective
    [data]        source = "examples.jsonl", ..     Data
    [teacher]     model, or cache, or url           TeacherFrom
    [student]     model, build, first_layers, ..    StudentFrom
    [validation]  source = "localize:fr:long:test"  Validation (may be left out)

Says what is wanted; train_command.py makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdlib import models
from kdlib.errors import ArgumentError, nearest
from kdlib.objective import Objective
from kdlib.settings import TrainConfig, checked, checked_values, read_table
from kdlib.teachers import RemoteTeacher

API_KEY = "KDLIB_API_KEY"  # the environment variable with a served teacher's key


@dataclass(frozen=True)
class Data:
    """source: what read_examples takes; the others: as PairCollator has them."""

    source: str
    teacher_max_length: int = 1024
    student_max_length: int = 1024
    truncate_context: str = "left"


@dataclass(frozen=True)
class TeacherFrom:
    """model:     what models.load takes
    cache:     a folder that `kdlib cache` wrote
    url:       of a server; `server` holds options of RemoteTeacher, and the environment
               variable KDLIB_API_KEY its key, where it wants one
    tokenizer: of a cached or served teacher (a folder, or a hub id); by default the one
               of the student's model
    """

    model: str | None = None
    cache: str | None = None
    url: str | None = None
    tokenizer: str | None = None
    server: dict | None = None


@dataclass(frozen=True)
class StudentFrom:
    """model:        to start from (what models.load takes)
    first_layers: that many layers of it, or of the teacher where no model is named
    build:        options of models.build, for a new model with random weights
    lora_rank:    train adapters of this rank at its linear layers, and nothing else
                  (models.add_lora; needs the package peft)
    lora_alpha:   their scale is lora_alpha / lora_rank, by default 2
    """

    model: str | None = None
    first_layers: int | None = None
    build: dict | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None


@dataclass(frozen=True)
class Validation:
    """source: examples on which the student is compared with a live teacher."""

    source: str


@dataclass(frozen=True)
class Plan:
    """The file, every name and value in it checked.

    Raises DataError where it cannot be read, ArgumentError for a name that is unknown
    or missing, for a value that cannot work, and for tables that do not fit together.
    """

    train: TrainConfig
    objective: Objective
    data: Data
    teacher: TeacherFrom
    student: StudentFrom
    validation: Validation | None

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        file = read_table(path)
        kinds = {
            "train": TrainConfig,
            "objective": Objective,
            "data": Data,
            "teacher": TeacherFrom,
            "student": StudentFrom,
            "validation": Validation,
        }
        for name in file:
            if name not in kinds:
                raise ArgumentError(
                    f"{path}: table [{name}] is unknown", nearest(name, kinds)
                )
        tables = {
            name: checked(kind, file.get(name, {}), f"{path} [{name}]")
            for name, kind in kinds.items()
            if name != "validation" or name in file
        }
        plan = cls(**{"validation": None, **tables})
        plan._check(path)
        return plan

    def _check(self, path) -> None:
        """Raise ArgumentError where tables do not fit together, or say too little."""
        teacher, student = self.teacher, self.student
        named = [n for n in ("model", "cache", "url") if getattr(teacher, n)]
        untaught = self.objective.hard_weight == 1 and not named
        if len(named) != 1 and not untaught:
            raise ArgumentError(
                f"{path} [teacher] names {' and '.join(named) or 'no teacher'}",
                "name one of model, cache and url",
            )
        starts = ("model", "first_layers", "build")
        starts = [n for n in starts if getattr(student, n) is not None]
        if not starts or ("build" in starts and len(starts) > 1):
            raise ArgumentError(
                f"{path} [student] names {' and '.join(starts) or 'no start'}",
                "name a model, first_layers (of it, or of the teacher), or build",
            )
        if student.build is not None:
            checked_values(models.build, student.build, f"{path} [student] build")
        if student.build is not None and student.lora_rank is not None:
            raise ArgumentError(
                f"{path} [student] lora_rank={student.lora_rank} of a new model",
                "leave lora_rank out: the random weights themselves must be trained",
            )
        if student.lora_alpha is not None and student.lora_rank is None:
            raise ArgumentError(
                f"{path} [student] lora_alpha={student.lora_alpha} without lora_rank",
                "add lora_rank, or leave lora_alpha out",
            )
        if teacher.server is not None:
            checked_values(RemoteTeacher, teacher.server, f"{path} [teacher] server")
            if "api_key" in teacher.server:
                raise ArgumentError(
                    f"{path} [teacher] server holds an api_key",
                    f"remove it and set the environment variable {API_KEY}: the file "
                    "is copied to result.json",
                )
        if student.first_layers is not None and not (student.model or teacher.model):
            raise ArgumentError(
                f"{path} [student] first_layers={student.first_layers} of no model",
                "name it as model, in [student] or in [teacher]",
            )
        if teacher.tokenizer is None and not (teacher.model or student.model):
            raise ArgumentError(
                f"{path} [teacher] names no tokenizer",
                "add tokenizer, a folder or a hub id: no model here brings one",
            )
        if teacher.tokenizer is not None and teacher.model:
            raise ArgumentError(
                f"{path} [teacher] names model and tokenizer",
                "leave tokenizer out: the model's folder has it",
            )
        if teacher.server is not None and not teacher.url:
            raise ArgumentError(
                f"{path} [teacher] names a server's options, but no url", "add url"
            )
        if self.validation is not None and not teacher.model:
            raise ArgumentError(
                f"{path}: [validation] without [teacher] model",
                "name the teacher as model, or leave [validation] out: the student is "
                "compared with the whole distribution of a teacher in memory",
            )
