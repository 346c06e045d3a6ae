"""The quickstart's rows over five paired seeds, with the baselines that it leaves out.

    python notebooks/experiments/quickstart_seeds.py [--seeds 5] [--share 1.0]

Writes notebooks/results/quickstart_seeds.json. A seed fixes the student's first weights
and the order of the examples; it is the same for every row, so that differences are
taken seed by seed. Rows beyond the quickstart's own:

    hard labels, best length   the 300 labels again, trained for 25 to 800 steps, the
                               length chosen on the validation split
    teacher's answers          its answers as labels, without its distributions
                               (sequence-level distillation)
    true labels for all        the true answers to the same 6,000 inputs: what the app
                               would have if somebody had labelled them
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from kdlib import localize, models, phone
from kdlib.evaluate import evaluate, teacher_reference
from kdlib.ledger import Interval, command_of, mean_interval, provenance, write_json
from kdlib.objective import Objective
from kdlib.teachers import LiveTeacher
from kdlib.train import train

RESULT = Path(__file__).parents[1] / "results" / "quickstart_seeds.json"
BEST_LENGTH = "hard labels, best length"
ANSWERS = "teacher's answers"
TRUE_LABELS = "true labels for all"
LENGTHS = (25, 50, 100, 200, 400, 800)
QUICKSTART = (phone.HARD_TOKENS, phone.HARD_FLOPS, phone.DISTILLED)


@cache
def prepared():
    """Data, and the teacher's logits on the test split; once a process."""
    torch.set_num_threads(1)
    data = phone.Data()
    return data, teacher_reference(LiveTeacher(data.teacher), data.batches(data.test))


def on_labels(data: phone.Data, pairs, steps: int, seed: int):
    """A student trained on labels alone."""
    student = models.build(data.tokenizer, **phone.STUDENT, seed=seed)
    config = replace(phone.CONFIG, steps=steps, seed=seed)
    train(student, pairs, data.collator, Objective(hard_weight=1.0), config)
    return student


def best_length(data: phone.Data, share: float, seed: int):
    """The student, of several lengths of training, that does best on validation."""
    pairs = data.encode(phone.labels("validation"))
    batches = data.batches(pairs)
    reference = teacher_reference(LiveTeacher(data.teacher), batches)
    students = [
        on_labels(data, data.labelled, max(1, round(share * steps)), seed)
        for steps in LENGTHS
    ]
    return max(students, key=lambda s: evaluate(s, batches, reference).exact_match)


def seed_rows(seed: int, share: float) -> dict[str, dict]:
    """Every row of one seed: exact match, agreement, KL."""
    data, reference = prepared()
    plan = phone.budgets(data, share)
    steps = plan[phone.DISTILLED].steps
    read = data.unlabelled[: plan[phone.DISTILLED].unlabelled]
    true = phone.labels("unlabelled")
    students = {n: phone.fit(n, data, plan[n], seed) for n in QUICKSTART}
    students[BEST_LENGTH] = best_length(data, share, seed)
    students[ANSWERS] = on_labels(data, read, steps, seed)
    labelled = data.encode({p.example_id: true[p.example_id] for p in read})
    students[TRUE_LABELS] = on_labels(data, labelled, steps, seed)
    rows = {}
    for name, student in students.items():
        found = evaluate(student, data.batches(data.test), reference)
        rows[name] = {
            "exact_match": found.exact_match,
            "agreement": found.agreement,
            "kl": found.kl,
        }
        print(f"seed {seed}: {name}: {found.exact_match:.3f}", flush=True)
    return rows


def summary(seeds: list[dict]) -> dict:
    """Means with 95 % intervals, and the differences from the distilled student."""
    values = {n: [rows[n]["exact_match"] for rows in seeds] for n in seeds[0]}
    ours = values[phone.DISTILLED]

    def interval(numbers) -> dict[str, float]:
        found = mean_interval(numbers)
        return {"mean": found.mean, "low": found.low, "high": found.high}

    return {
        "exact_match": {name: interval(found) for name, found in values.items()},
        "distilled_minus": {
            name: interval([a - b for a, b in zip(ours, found, strict=True)])
            for name, found in values.items()
            if name != phone.DISTILLED
        },
    }


def table(result: dict) -> str:
    """The README's table, in Markdown."""
    seeds, test, teacher = len(result["seeds"]), result["test"], result["teacher"]
    lines = [
        f"| {seeds} paired seeds | exact match, {test:,} test inputs | lead of the "
        "distilled student |",
        "|---|---|---|",
        f"| teacher, with its instruction | {teacher['with context']:.3f} | |",
        f"| teacher, without it | {teacher['without context']:.3f} | |",
    ]
    for name, found in result["exact_match"].items():
        lead = result["distilled_minus"].get(name)
        claim = Interval(**lead).claim() if lead else ""
        lines.append(f"| {name} | {Interval(**found)} | {claim} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    start = time.perf_counter()
    with ProcessPoolExecutor(max_workers=2) as pool:
        numbers = range(arguments.seeds)
        seeds = list(pool.map(seed_rows, numbers, [arguments.share] * len(numbers)))
    data, reference = prepared()
    test = data.batches(data.test)
    result = {
        **provenance(command_of("quickstart_seeds.py", vars(arguments))),
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "budgets": {
            name: vars(budget)
            for name, budget in phone.budgets(data, arguments.share).items()
        },
        "labelled": len(data.labelled),
        "test": len(data.test),
        "teacher": {
            "with context": evaluate(
                data.teacher, test, reference, side="teacher"
            ).exact_match,
            "without context": evaluate(data.teacher, test, reference).exact_match,
        },
        "split": {"train": len(localize.load_split("train"))},
        "seeds": seeds,
        **summary(seeds),
    }
    write_json(arguments.out, result)
    print(table(result))


if __name__ == "__main__":
    main()
