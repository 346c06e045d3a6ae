"""Students of several sizes, distilled and on labels alone, over paired seeds.

    OMP_NUM_THREADS=1 python notebooks/experiments/student_sizes.py

Writes notebooks/results/student_sizes.json after every run, and goes on from it. The
recipe is the quickstart's (kdlib/phone.py) but for the student's width. Each width has

    distilled student          the teacher's answers and distributions for 6,000 inputs
    hard labels, equal tokens  the 300 labels, with as many tokens

Two rows more look at the recipe. The quickstart's own width is distilled with a quarter
of the steps; the widest is distilled with half the learning rate, because the recipe's
was chosen for the quickstart's width. A seed fixes a student's first weights and the
order of its examples; differences are taken seed by seed.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import replace
from pathlib import Path

import torch

from kdlib import models, phone
from kdlib.evaluate import evaluate, parameter_count, teacher_reference
from kdlib.ledger import command_of, mean_interval, provenance, resume, write_json
from kdlib.objective import Objective
from kdlib.teachers import LiveTeacher
from kdlib.train import train

RESULT = Path(__file__).parents[1] / "results" / "student_sizes.json"
QUARTER = "distilled, a quarter of the steps"
WIDTH = phone.STUDENT["hidden_size"]
HALF = "distilled, half the learning rate"
WIDTHS = (32, 48, WIDTH, 128)


def rows_of(width: int) -> tuple[str, ...]:
    more = {WIDTH: (QUARTER,), max(WIDTHS): (HALF,)}
    return phone.DISTILLED, phone.HARD_TOKENS, *more.get(width, ())


def shape(width: int) -> dict[str, int]:
    return {**phone.STUDENT, "hidden_size": width}


def trained(data: phone.Data, width: int, row: str, seed: int, steps: dict[str, int]):
    student = models.build(data.tokenizer, **shape(width), seed=seed)
    hard = row == phone.HARD_TOKENS
    rate = phone.CONFIG.learning_rate / (2 if row == HALF else 1)
    train(
        student,
        data.labelled if hard else data.unlabelled,
        data.collator,
        Objective("forward_kl", hard_weight=1.0 if hard else 0.0),
        replace(phone.CONFIG, steps=steps[row], learning_rate=rate, seed=seed),
        teacher=None if hard else data.cache,
    )
    return student


def summary(runs: list[dict], seeds: int) -> dict:
    """Means with 95 % intervals for every width whose seeds are complete."""
    values: dict[int, dict[str, list[float]]] = {}
    for width in sorted({run["width"] for run in runs}):
        mine = sorted((r for r in runs if r["width"] == width), key=lambda r: r["seed"])
        rows = {
            row: [run["exact_match"] for run in mine if run["row"] == row]
            for row in rows_of(width)
        }
        if seeds > 1 and all(len(found) == seeds for found in rows.values()):
            values[width] = rows

    def minus(ours, theirs) -> dict[str, float]:
        return vars(mean_interval([a - b for a, b in zip(ours, theirs, strict=True)]))

    distilled = {width: rows[phone.DISTILLED] for width, rows in values.items()}
    return {
        "exact_match": {
            width: {row: vars(mean_interval(found)) for row, found in rows.items()}
            for width, rows in values.items()
        },
        "distilled_minus_hard": {
            width: minus(rows[phone.DISTILLED], rows[phone.HARD_TOKENS])
            for width, rows in values.items()
        },
        "distilled_minus": {
            row: minus(rows[phone.DISTILLED], rows[row])
            for rows in values.values()
            for row in (QUARTER, HALF)
            if row in rows
        },
        "wider_minus_narrower": {
            f"{wide} - {narrow}": minus(distilled[wide], distilled[narrow])
            for narrow, wide in zip(
                list(distilled)[:-1], list(distilled)[1:], strict=True
            )
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the training")
    parser.add_argument("--minutes", type=float, default=60, help="at most, of a core")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = phone.Data()
    test = data.batches(data.test)
    reference = teacher_reference(LiveTeacher(data.teacher), test)
    plan = phone.budgets(data, arguments.share)
    steps = {row: plan[row].steps for row in (phone.DISTILLED, phone.HARD_TOKENS)}
    steps[QUARTER] = max(1, steps[phone.DISTILLED] // 4)
    steps[HALF] = steps[phone.DISTILLED]
    settings = {
        "shape": {k: v for k, v in phone.STUDENT.items() if k != "hidden_size"},
        "steps": steps,
        "learning_rate": phone.CONFIG.learning_rate,
        "batch_size": phone.CONFIG.batch_size,
        "test": len(data.test),
    }
    runs, before = resume(arguments.out, settings, seeds=arguments.seeds)

    def save() -> float:
        minutes = before + time.process_time() / 60
        result = {
            **provenance(command_of("student_sizes.py", vars(arguments))),
            "core_minutes": round(minutes, 1),
            **settings,
            "seeds": arguments.seeds,
            "runs": runs,
            **summary(runs, arguments.seeds),
        }
        write_json(arguments.out, result)
        return minutes

    done = {(run["width"], run["row"], run["seed"]) for run in runs}
    save()
    for width in arguments.widths:
        for row, seed in itertools.product(rows_of(width), range(arguments.seeds)):
            if (width, row, seed) in done:
                continue
            student = trained(data, width, row, seed, steps)
            found = evaluate(student, test, reference)
            run = {"width": width, "row": row, "seed": seed}
            run["parameters"] = parameter_count(student)
            for part in ("exact_match", "agreement", "kl"):
                run[part] = getattr(found, part)
            runs.append(run)
            print(f"{width} {row}, seed {seed}: {found.exact_match:.3f}", flush=True)
            if save() > arguments.minutes:
                return


if __name__ == "__main__":
    main()
