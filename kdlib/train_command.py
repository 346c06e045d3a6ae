"""`python -m kdlib train CONFIG`: a run that one file describes (run_plan.py).

What it leaves in its folder, beside what run_folder.py names:

    student/      as transformers loads it
    adapter/      of a LoRA run that began with a named model: the adapters alone, for
                  peft.PeftModel.from_pretrained(that model, "adapter")
    result.json   what the run was, and the student against its teacher

A LoRA student in student/ has its adapters merged into its weights. So that folder is
complete whatever the run trained: it needs no peft, and no base model beside it.

Under torchrun all processes run this; the folder must be one that all of them see.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from kdlib import __version__, models
from kdlib.build_cache import OWN_DTYPES
from kdlib.distributed import Ranks, processes
from kdlib.evaluate import fidelity_report, parameter_count, table
from kdlib.examples import read_examples
from kdlib.ledger import provenance, write_json
from kdlib.lock import only_process_in
from kdlib.memory import memory_errors_explained
from kdlib.pairs import EncodedPair, PairCollator
from kdlib.precision import Precision, trained_weights
from kdlib.run_plan import API_KEY, Plan
from kdlib.settings import read_table
from kdlib.sharding import whole_model
from kdlib.teachers import CachedTeacher, LiveTeacher, RemoteTeacher, Teacher
from kdlib.train import train


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

    Raises what the rooms below raise, StorageError where another process is at `out`,
    and Stopped after SIGINT or SIGTERM.
    """
    out = Path("runs", Path(config).stem) if out is None else Path(out)
    with processes(shard=shard) as ranks, ExitStack() as held:
        plan, first = Plan.read(config), ranks.rank == 0
        ranks.check_same(
            {**read_table(config), "run": {"out": str(out), "shard": shard}}
        )
        if first:
            held.enter_context(only_process_in(out))
        # For dropout, where the student has it; no two ranks drop the same.
        torch.manual_seed(plan.train.seed + ranks.rank)
        parts = prepare(plan, ranks)
        size = parameter_count(parts.student)
        trained = sum(p.numel() for p in trained_weights(parts.student))
        if first:
            say(
                f"{size:,} parameters, {trained:,} trained, {len(parts.pairs):,} "
                f"examples, {plan.train.steps:,} steps; {ranks.world} x "
                f"{ranks.device}, {out}"
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
        save_student(plan, parts, ranks, out)
        facts = {
            "steps": len(history.loss),
            "loss": history.loss[-1],
            "tokens": history.tokens,
            "seconds": round(history.seconds, 1),
            "parameters": size,
            "trained_parameters": trained,
            "examples": len(parts.pairs),
            "validation": validated(parts),
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


def save_student(plan: Plan, parts: Parts, ranks: Ranks, out: Path) -> None:
    """Write student/, and adapter/ where it fits a model that others have too.

    All ranks together; rank 0 writes. A LoRA student is merged in place.
    """
    start, words = plan.student, parts.collator.tokenizer
    student, first = parts.student, ranks.rank == 0
    if ranks.shard:
        student = whole_model(student, "cpu", here=first)
    if not first:
        return
    if start.lora_rank is not None and start.first_layers is None:
        models.save(student, words, out / "adapter")
    models.save(models.merged(student), words, out / "student")


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
    if start.lora_rank is not None:
        student = models.add_lora(
            student,
            rank=start.lora_rank,
            alpha=start.lora_alpha,
            seed=plan.train.seed,
        )

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
    if ranks.shard:
        return model
    with memory_errors_explained(
        "loading the models",
        "take a smaller teacher or student, targets that are cached first (python -m "
        "kdlib cache), or --shard on several GPUs",
    ):
        return model.to(ranks.device)


def encoded(collator: PairCollator, source: str) -> list[EncodedPair]:
    return [collator.encode(e, i) for i, e in enumerate(read_examples(source))]


def validated(parts: Parts) -> dict[str, dict] | None:
    if not parts.validation:
        return None
    return fidelity_report(
        parts.student, parts.teacher, parts.collator, parts.validation
    )


def report(facts: Mapping) -> str:
    """The facts as text for a terminal."""
    lines = [
        f"{facts['steps']:,} steps, {facts['tokens']:,} tokens, "
        f"{facts['seconds']:.0f} s; the last loss is {facts['loss']:.4f}"
    ]
    if facts["validation"]:
        lines += ["", table(facts["validation"])]
    return "\n".join([*lines, "", f"Student: {facts['student']}"])
