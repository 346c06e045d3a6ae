"""A question of one's own: five rows, paired seeds, one result file.

    teacher                     reads (c, z)
    untrained student           before training
    hard labels, equal tokens   as many tokens as the distilled student reads
    hard labels, equal FLOPs    as many FLOPs, the teacher's counted
    distilled student           the teacher's answers and distributions

A Task says what is learned, from whom and how. `run_seed` trains a seed's rows,
`summary` draws the intervals, and `result` is what the file holds. So whoever has the
file can draw them again (class_leaderboard.py).

    gain      KL(p_t(. | c, z) || p_t(. | c', z)) on the test set: what the teacher
              loses without c
    recovery  1 - kl / gain. The floor is taken for zero, so it is too low where c'
              does not say all that c says (recovery.py)

Knows rows, budgets and seeds. Does not know the data, nor where models come from.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kdlib.errors import ArgumentError
from kdlib.evaluate import Fidelity, evaluate, parameter_count, together
from kdlib.ledger import mean_interval
from kdlib.objective import Objective
from kdlib.pairs import EncodedPair, PairCollator, PairedExample
from kdlib.phone import (
    DISTILLED,
    HARD_FLOPS,
    HARD_TOKENS,
    TEACHER,
    UNTRAINED,
    Budget,
)
from kdlib.sampling import complete
from kdlib.settings import TrainConfig
from kdlib.teachers import CachedTeacher, LiveTeacher, write_cache
from kdlib.train import train

WITHOUT = "teacher, without its context"
SEEDED = (UNTRAINED, HARD_TOKENS, HARD_FLOPS, DISTILLED)
MEASURES = ("exact_match", "agreement", "kl")


@dataclass(frozen=True)
class Task:
    """What is learned, from whom, and how.

    student:    the untrained student of a seed; its tokenizer is the collator's
    labelled:   examples whose responses are labels
    unlabelled: examples whose responses the teacher wrote (`answered`)
    test:       examples with labels that no row has read
    groups:     parts of the test set, by their places in it, for which the exact match
                is told apart
    config:     of the distilled student; the other rows differ in steps alone
    k:          entries of the teacher's distributions that are kept (chapter 11), the
                rest in a bucket
    batch_size: examples at a time where nothing is trained

    Raises ArgumentError where one of the three sets is empty.
    """

    teacher: object
    collator: PairCollator
    student: Callable[[int], object]
    labelled: Sequence[EncodedPair]
    unlabelled: Sequence[EncodedPair]
    test: Sequence[EncodedPair]
    config: TrainConfig
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)
    k: int = 8
    batch_size: int = 100

    def __post_init__(self):
        for name in ("labelled", "unlabelled", "test"):
            if not getattr(self, name):
                raise ArgumentError(f"{name} is empty", "give at least one example")

    def batches(self, pairs: Sequence[EncodedPair]) -> Iterator:
        for start in range(0, len(pairs), self.batch_size):
            yield self.collator.collate(pairs[start : start + self.batch_size])


def answered(
    teacher,
    collator: PairCollator,
    examples: Sequence[PairedExample],
    *,
    max_new_tokens: int = 64,
) -> list[EncodedPair]:
    """The examples with the teacher's greedy answers in place of their responses.

    Nobody's label is read. An answer that has not ended by max_new_tokens is left out.
    """
    pairs = [
        collator.encode(replace(e, response="?"), i) for i, e in enumerate(examples)
    ]
    answers = complete(
        teacher,
        collator.tokenizer,
        [pair.teacher_prompt_ids for pair in pairs],
        max_new_tokens=max_new_tokens,
        keep_end=True,
    )
    end = collator.tokenizer.eos_token_id
    return [
        replace(pair, response_ids=answer)
        for pair, answer in zip(pairs, answers, strict=True)
        if answer and answer[-1] == end
    ]


def budgets(task: Task) -> dict[str, Budget]:
    """Each trained row's steps, tokens and FLOPs, by phone.budgets' count.

    A forward pass costs 2 FLOPs a parameter and token, a training step 6; the teacher
    reads every unlabelled example once.
    """
    student, teacher = parameter_count(task.student(0)), parameter_count(task.teacher)
    batch = task.config.batch_size
    tokens = task.config.steps * batch * _mean_length(task.unlabelled, "student")
    asked = len(task.unlabelled) * _mean_length(task.unlabelled, "teacher")
    flops = 6 * student * tokens + 2 * teacher * asked
    found = {
        DISTILLED: Budget(task.config.steps, round(tokens), flops, len(task.unlabelled))
    }
    a_step = batch * _mean_length(task.labelled, "student")
    for row, wanted in ((HARD_TOKENS, tokens), (HARD_FLOPS, flops / (6 * student))):
        steps = max(1, round(wanted / a_step))
        read = steps * a_step
        found[row] = Budget(steps, round(read), 6 * student * read)
    return found


def _mean_length(pairs: Sequence[EncodedPair], side: str) -> float:
    prompts = sum(len(getattr(pair, f"{side}_prompt_ids")) for pair in pairs)
    return (prompts + sum(len(pair.response_ids) for pair in pairs)) / len(pairs)


def fixed_rows(task: Task) -> dict[str, dict]:
    """The teacher with its context and without: what no seed changes."""
    return {
        TEACHER: measured(task, task.teacher, "teacher"),
        WITHOUT: measured(task, task.teacher, "student"),
    }


def run_seed(
    task: Task,
    seed: int,
    *,
    device: str = "cpu",
    folder: str | Path | None = None,
    keep: Callable[[str, object], None] = lambda row, student: None,
) -> list[dict]:
    """Train and measure the rows of one seed; all start from the same weights.

    folder: of the distilled student's run, for the doctor
    keep:   gets every row's student, trained
    """
    plan, runs = budgets(task), []
    with tempfile.TemporaryDirectory() as scratch:
        for row in SEEDED:
            begun = time.process_time()
            student = task.student(seed).to(device)
            if row != UNTRAINED:
                soft = row == DISTILLED
                train(
                    student,
                    task.unlabelled if soft else task.labelled,
                    task.collator,
                    Objective(hard_weight=0.0 if soft else 1.0),
                    replace(task.config, steps=plan[row].steps, seed=seed),
                    teacher=_boxed(task, Path(scratch)) if soft else None,
                    folder=folder if soft else None,
                )
            keep(row, student)
            found = {"row": row, "seed": seed, **measured(task, student, "student")}
            minutes = (time.process_time() - begun) / 60
            runs.append({**found, "minutes": round(minutes, 3)})
    return runs


def _boxed(task: Task, folder: Path) -> CachedTeacher:
    """The teacher asked once about every unlabelled example (chapter 11)."""
    live = LiveTeacher(task.teacher)
    path = write_cache(
        folder / "targets.safetensors",
        live,
        task.batches(task.unlabelled),
        task.collator.teacher_side.tokenizer,
        k=task.k,
    )
    return CachedTeacher(path, task.collator.tokenizer, teacher=live)


def measured(task: Task, model, side: str) -> dict:
    """Fidelity on the test set, and the exact match of each group."""
    live, parts = LiveTeacher(task.teacher), []
    for batch in task.batches(task.test):  # a batch at a time, for large vocabularies
        parts.append(evaluate(model, [batch], [live.targets(batch).cpu()], side=side))
    whole: Fidelity = together(parts)
    found = {name: getattr(whole, name) for name in MEASURES}
    for group, places in task.groups.items():
        hits = [whole.hits[place] for place in places]
        found[f"exact_match, {group}"] = sum(hits) / len(hits)
    return found


def summary(fixed: Mapping[str, Mapping], runs: Sequence[Mapping]) -> dict:
    """Intervals over the seeds: each row, distilled minus each, and the recovery.

    recovery is None where the teacher loses nothing without c: c' = c, say.
    Raises ArgumentError for fewer than two seeds, or a seed that lacks a row.
    """
    of = {row: {r["seed"]: r for r in runs if r["row"] == row} for row in SEEDED}
    seeds = sorted(of[DISTILLED])
    if len(seeds) < 2 or any(sorted(found) != seeds for found in of.values()):
        raise ArgumentError(
            "the runs are " + ", ".join(f"{len(of[row])} of {row}" for row in SEEDED),
            "run all rows of two seeds at least: rows of a seed are paired",
        )
    left_out = ("row", "seed", "minutes")
    measures = [name for name in of[DISTILLED][seeds[0]] if name not in left_out]

    def interval(values) -> dict:
        return vars(mean_interval([values(seed) for seed in seeds]))

    def minus(row, name) -> dict:
        return interval(lambda s: of[DISTILLED][s][name] - of[row][s][name])

    gain = fixed[WITHOUT]["kl"]
    return {
        "rows": {
            row: {m: interval(lambda s, r=row, m=m: of[r][s][m]) for m in measures}
            for row in SEEDED
        },
        "distilled_minus": {
            row: {m: minus(row, m) for m in measures} for row in SEEDED[:-1]
        },
        "gain": gain,
        "recovery": (
            interval(lambda s: 1 - of[DISTILLED][s]["kl"] / gain)
            if gain > 1e-6
            else None
        ),
    }


def result(
    task: Task,
    *,
    question: str,
    predictions: Sequence[str],
    fixed: Mapping[str, Mapping],
    runs: Sequence[Mapping],
) -> dict:
    """What the result file holds, beside ledger.provenance and the task's settings.

    Raises ArgumentError for a question or predictions that nobody wrote.
    """
    if not question.strip() or not predictions or not all(map(str.strip, predictions)):
        raise ArgumentError(
            f"question={question!r}, predictions={list(predictions)!r}",
            "write both before the run: a prediction made afterwards is none",
        )
    return {
        "question": question,
        "predictions": list(predictions),
        "parameters": {
            TEACHER: parameter_count(task.teacher),
            "student": parameter_count(task.student(0)),
        },
        "budgets": {row: vars(budget) for row, budget in budgets(task).items()},
        "examples": {
            name: len(getattr(task, name))
            for name in ("labelled", "unlabelled", "test")
        },
        "core_minutes": round(sum(run["minutes"] for run in runs), 1),
        "seeds": len({run["seed"] for run in runs}),
        "fixed": dict(fixed),
        "runs": list(runs),
        **summary(fixed, runs),
    }


def table(found: Mapping) -> str:
    """The rows of a result as text, exact match with its interval over the seeds."""
    lines = [f"{'':30}{'exact match':>22}{'agreement':>11}{'KL':>8}"]
    for name, row in found["fixed"].items():
        lines.append(
            f"{name:30}{row['exact_match']:7.3f}{'':15}"
            f"{row['agreement']:11.3f}{row['kl']:8.3f}"
        )
    for name, row in found["rows"].items():
        exact = row["exact_match"]
        span = f"[{exact['low']:.3f}, {exact['high']:.3f}]"
        lines.append(
            f"{name:30}{exact['mean']:7.3f} {span:14}"
            f"{row['agreement']['mean']:11.3f}{row['kl']['mean']:8.3f}"
        )
    return "\n".join(lines)
