"""`python -m kdlib train CONFIG`: a training run that one TOML or YAML file describes.

    [train]       steps = 200, ..                  a TrainConfig
    [objective]   divergence = "forward_kl", ..    an Objective
    [data]        source = "examples.jsonl", ..    Data
    [teacher]     model, or cache, or url          TeacherFrom
    [student]     model, build, first_layers       StudentFrom
    [validation]  source = "localize:fr:long:test" Validation (may be left out)

What it leaves in its folder, beside what run_folder.py names:

    student/      as transformers loads it
    result.json   what the run was, and the student against its teacher
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from kdlib import __version__, models
from kdlib.build_cache import OWN_DTYPES
from kdlib.distributed import Ranks, processes
from kdlib.errors import ArgumentError, nearest
from kdlib.evaluate import evaluate, parameter_count, teacher_reference
from kdlib.examples import read_examples
from kdlib.ledger import provenance, write_json
from kdlib.objective import Objective
from kdlib.pairs import EncodedPair, PairCollator
from kdlib.precision import Precision
from kdlib.settings import TrainConfig, checked, checked_values, read_table
from kdlib.sharding import whole_model
from kdlib.teachers import CachedTeacher, LiveTeacher, RemoteTeacher, Teacher
from kdlib.train import train

API_KEY = "KDLIB_API_KEY"  # of a served teacher


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
    """

    model: str | None = None
    first_layers: int | None = None
    build: dict | None = None


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
        teacher, student = self.teacher, self.student
        named = [n for n in ("model", "cache", "url") if getattr(teacher, n)]
        untaught = self.objective.hard_weight == 1 and not named
        if len(named) != 1 and not untaught:
            raise ArgumentError(
                f"{path} [teacher] names {' and '.join(named) or 'no teacher'}",
                "name one of model, cache and url",
            )
        starts = [n for n in vars(student) if getattr(student, n) is not None]
        if not starts or ("build" in starts and len(starts) > 1):
            raise ArgumentError(
                f"{path} [student] names {' and '.join(starts) or 'no start'}",
                "name a model, first_layers (of it, or of the teacher), or build",
            )
        if student.build is not None:
            checked_values(models.build, student.build, f"{path} [student] build")
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


class Parts(NamedTuple):
    """What the plan's names stand for."""

    student: torch.nn.Module
    teacher: Teacher | None
    collator: PairCollator
    pairs: list[EncodedPair]
    validation: list[EncodedPair]


def run(
    config: str | Path,
    out: str | Path | None = None,
    *,
    shard: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict:
    """Train as the file says; the facts that result.json holds.

    out:   the folder of the run, by default runs/NAME for a file NAME.toml. Started
           again after an end of any kind, the run goes on from its last checkpoint
    shard: split student and teacher among torchrun's processes (sharding.py)
    say:   gets a line of text at each stage

    Raises what the rooms below raise, and Stopped after SIGINT or SIGTERM.
    """
    out = Path("runs", Path(config).stem) if out is None else Path(out)
    with processes(shard=shard) as ranks:
        plan, first = Plan.read(config), ranks.rank == 0
        ranks.check_same(
            {**read_table(config), "run": {"out": str(out), "shard": shard}}
        )
        # For dropout, where the student has it; no two ranks drop the same.
        torch.manual_seed(plan.train.seed + ranks.rank)
        parts = prepare(plan, ranks)
        size = parameter_count(parts.student)
        if first:
            say(
                f"{size:,} parameters, {len(parts.pairs):,} examples, "
                f"{plan.train.steps:,} steps; {ranks.world} x {ranks.device}, {out}"
            )
        history = train(
            parts.student,
            parts.pairs,
            parts.collator,
            plan.objective,
            plan.train,
            teacher=parts.teacher,
            folder=out,
            ranks=ranks,
        )
        student = whole_model(parts.student, ranks) if shard else parts.student
        if first:
            models.save(student, parts.collator.tokenizer, out / "student")
        facts = {
            "steps": len(history.loss),
            "loss": history.loss[-1],
            "tokens": history.tokens,
            "seconds": round(history.seconds, 1),
            "parameters": size,
            "examples": len(parts.pairs),
            "validation": fidelity_report(parts) if parts.validation else None,
            "student": str(out / "student"),
            "ranks": ranks.world,
            "shard": shard,
            "settings": read_table(config),
            "kdlib": __version__,
            **provenance(shlex.join(["python", "-m", "kdlib", "train", str(config)])),
        }
        if first:
            write_json(out / "result.json", facts)
        return facts


def prepare(plan: Plan, ranks: Ranks) -> Parts:
    """Load, build and encode."""
    wanted, start, device = plan.teacher, plan.student, ranks.device
    dtype = OWN_DTYPES[Precision.choose(plan.train.precision, device).name]
    teacher_model = student = words = teacher_words = None  # words: the tokenizers
    if wanted.model:
        # A student that is made from the teacher begins with its weights unrounded.
        exact = start.first_layers is not None and start.model is None
        teacher_model, teacher_words = models.load(
            wanted.model, dtype=torch.float32 if exact else dtype
        )
    elif wanted.tokenizer:
        teacher_words = models.load_tokenizer(wanted.tokenizer)
    if start.model:
        student, words = models.load(start.model)
    words, teacher_words = words or teacher_words, teacher_words or words
    if start.build is not None:
        student = models.build(words, **start.build)
    if start.first_layers is not None:
        whole = teacher_model if student is None else student
        student = models.first_layers(whole, start.first_layers)

    data = plan.data
    collator = PairCollator(
        words,
        teacher_tokenizer=teacher_words,
        teacher_max_length=data.teacher_max_length,
        student_max_length=data.student_max_length,
        truncate_context=data.truncate_context,
    )
    pairs = encoded(collator, data.source)
    validation = encoded(collator, plan.validation.source) if plan.validation else []

    teacher = None
    if teacher_model is not None:
        teacher = LiveTeacher(placed(teacher_model.to(dtype), ranks))
    elif wanted.cache:
        temperature = plan.objective.temperature
        teacher = CachedTeacher(wanted.cache, teacher_words, temperature=temperature)
        teacher.check(pairs)
    elif wanted.url:
        teacher = RemoteTeacher(
            wanted.url,
            teacher_words,
            api_key=os.environ.get(API_KEY),
            **(wanted.server or {}),
        )
    return Parts(placed(student, ranks), teacher, collator, pairs, validation)


def placed(model, ranks: Ranks):
    """On the rank's device; to be sharded, in the CPU's memory: it may not fit."""
    return model if ranks.shard else model.to(ranks.device)


def encoded(collator: PairCollator, source: str) -> list[EncodedPair]:
    return [collator.encode(e, i) for i, e in enumerate(read_examples(source))]


def fidelity_report(parts: Parts, batch_size: int = 32) -> dict[str, dict]:
    """evaluate.Fidelity of the student (on x') and of the teacher (on x).

    A batch at a time: the teacher's logits for a whole validation set may not fit.
    """
    sides = {"student": parts.student, "teacher": parts.teacher.model}
    found: dict[str, list] = {side: [] for side in sides}
    for start in range(0, len(parts.validation), batch_size):
        batch = parts.collator.collate(parts.validation[start : start + batch_size])
        reference = teacher_reference(parts.teacher, [batch])
        for side, model in sides.items():
            found[side].append(evaluate(model, [batch], reference, side=side))

    def mean(side: str, name: str) -> float:
        """Over tokens."""
        tokens = sum(part.n_tokens for part in found[side])
        return sum(getattr(p, name) * p.n_tokens for p in found[side]) / tokens

    report = {}
    for side, scores in found.items():
        hits = [hit for part in scores for hit in part.hits]
        report[side] = {
            "exact_match": sum(hits) / len(hits),
            "agreement": mean(side, "agreement"),
            "kl": mean(side, "kl"),
            "examples": len(hits),
        }
    return report


def report(facts: Mapping) -> str:
    """The facts as text for a terminal."""
    lines = [
        f"{facts['steps']:,} steps, {facts['tokens']:,} tokens, "
        f"{facts['seconds']:.0f} s; the last loss is {facts['loss']:.4f}"
    ]
    if facts["validation"]:
        lines += ["", f"{'':10}{'exact':>7}{'agree':>7}{'KL':>8}"]
        for side, row in facts["validation"].items():
            lines.append(
                f"{side:10}{row['exact_match']:7.3f}{row['agreement']:7.3f}"
                f"{row['kl']:8.3f}   {row['examples']:,} examples"
            )
    return "\n".join([*lines, "", f"Student: {facts['student']}"])
