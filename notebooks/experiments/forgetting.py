"""A new habit for an old model: what labels, and the model itself, make it forget.

    OMP_NUM_THREADS=1 python notebooks/experiments/forgetting.py [--workers 12]

Writes notebooks/results/forgetting.json, and goes on from it. (For a short trial:
`--seeds 2 --share 0.25 --out FILE`.) Runs are spread over `--workers` processes with
one thread each; the numbers do not depend on how many.

The shipped teacher answers in the language and form that its instruction names. The
new task: without any instruction, answer in French, long form. The student is a copy of
it. Its own teacher is the same network, frozen, that reads the French instruction:
self-distillation (as in Shenfeld et al. 2026, SDFT, arXiv 2601.19897, where the teacher
reads a demonstration). One seed at full scale was seen before the plan was run, and
nothing was changed after it. Every row trains for STEPS on the same inputs in the same
order, at each of RATES:

    labels, CE               cross-entropy with the corpus's French labels
    labels, forward KL       from its own teacher's distributions, on the labels
    own words, forward KL    the same, on answers that the student draws (lmbda 1)
    own words, reverse KL    lmbda 1

    new     share of test inputs without an instruction answered in French, exactly
    old     share answered exactly with an instruction for one of the other languages
    drift   KL(before || after) per token on those, in nats

What would count against "on-policy forgets less": `old` and `drift` of the last two
rows no better than those of the first, where all have learned the new task.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import time
from pathlib import Path

import torch

from kdlib import localize, models
from kdlib.evaluate import evaluate, teacher_reference
from kdlib.ledger import command_of, mean_interval, provenance, resume, write_json
from kdlib.objective import Objective
from kdlib.pairs import PairCollator, PairedExample
from kdlib.teachers import LiveTeacher
from kdlib.train import TrainConfig, train

RESULT = Path(__file__).parents[1] / "results" / "forgetting.json"
OTHERS, FORM = ("de", "es", "it", "pl", "pt"), "long"
INPUTS, TESTS, STEPS, BATCH = 512, 50, 64, 16
RATES = (3e-4, 3e-3)
LABELS, SOFT = "labels, CE", "labels, forward KL"
OWN, OWN_REVERSE = "own words, forward KL", "own words, reverse KL"
ROWS = (LABELS, SOFT, OWN, OWN_REVERSE)
OBJECTIVES = {
    LABELS: Objective(hard_weight=1.0),
    SOFT: Objective("forward_kl"),
    OWN: Objective("forward_kl"),
    OWN_REVERSE: Objective("reverse_kl"),
}
MEASURES = ("new", "old", "drift")
DIFFERENCES = (
    (SOFT, LABELS),
    (OWN, LABELS),
    (OWN_REVERSE, LABELS),
    (OWN, SOFT),
    (OWN_REVERSE, OWN),
)


class World:
    """The model as it was, the new task, and the old ones."""

    def __init__(self, size: int = TESTS):
        self.model, tokenizer = models.load("teacher")
        self.live = LiveTeacher(self.model)
        self.collator = PairCollator(
            tokenizer, teacher_max_length=160, student_max_length=160
        )
        tests = localize.load_split("test")[:: 1000 // size][:size]
        self.new = self.pairs(localize.load_split("unlabelled")[:INPUTS])
        self.tests = self.batches(self.pairs(tests))
        self.old = self.batches(
            [
                self.collator.encode(
                    PairedExample(
                        d.english,
                        d.rendering(language, FORM),
                        context=localize.instruction(language, FORM),
                        simplified_context=localize.instruction(language, FORM),
                    ),
                    number,
                )
                for number, (d, language) in enumerate(
                    (d, language) for d in tests for language in OTHERS
                )
            ]
        )
        self.before = teacher_reference(self.live, self.old)

    def pairs(self, data):
        french = localize.instruction("fr", FORM)
        examples = [
            PairedExample(d.english, d.rendering("fr", FORM), french, "") for d in data
        ]
        return [self.collator.encode(e, number) for number, e in enumerate(examples)]

    def batches(self, pairs):
        return [self.collator.collate(pairs[i : i + 50])
                for i in range(0, len(pairs), 50)]  # fmt: skip

    def measured(self, model) -> dict[str, float]:
        new = evaluate(model, self.tests, [None] * len(self.tests))
        old = evaluate(model, self.old, self.before)
        return {"new": new.exact_match, "old": old.exact_match, "drift": old.kl}

    def run(self, row: str, rate: float, seed: int, share: float) -> dict:
        start = time.process_time()
        student = copy.deepcopy(self.model).requires_grad_(True)
        settings = TrainConfig(
            steps=max(1, round(share * STEPS)),
            batch_size=BATCH,
            learning_rate=rate,
            seed=seed,
            lmbda=1.0 if row in (OWN, OWN_REVERSE) else 0.0,
            max_new_tokens=48,
        )
        teacher = None if row == LABELS else self.live
        history = train(student, self.new, self.collator, OBJECTIVES[row], settings,
                        teacher=teacher)  # fmt: skip
        return {
            "row": row,
            "rate": rate,
            "seed": seed,
            **self.measured(student),
            "loss": [round(x, 4) for x in history.loss],
            "core_seconds": round(time.process_time() - start, 1),
        }


WORLD: World | None = None


def begin(tests: int) -> None:
    global WORLD
    torch.set_num_threads(1)
    models.quiet_transformers()
    WORLD = WORLD or World(tests)


def work(task) -> dict:
    return WORLD.run(*task)


def summary(runs: list[dict], seeds: int) -> dict:
    """Intervals over the seeds, once every row has all of them, at least two."""
    of = {(row, rate): [] for rate in RATES for row in ROWS}
    for r in sorted(runs, key=lambda r: r["seed"]):
        of[r["row"], r["rate"]].append(r)
    if seeds < 2 or any(len(found) != seeds for found in of.values()):
        return {}

    def minus(ours, theirs, rate, name):
        pairs = zip(of[ours, rate], of[theirs, rate], strict=True)
        return vars(mean_interval([a[name] - b[name] for a, b in pairs]))

    return {
        "rows": {
            str(rate): {
                row: {
                    m: vars(mean_interval([r[m] for r in of[row, rate]]))
                    for m in MEASURES
                }
                for row in ROWS
            }
            for rate in RATES
        },
        "minus": {
            str(rate): {
                f"{ours} - {theirs}": {
                    m: minus(ours, theirs, rate, m) for m in MEASURES
                }
                for ours, theirs in DIFFERENCES
            }
            for rate in RATES
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps")
    parser.add_argument("--tests", type=int, default=TESTS, help="inputs, of 1000")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    begin(arguments.tests)
    settings = {
        "settings": {
            "steps": max(1, round(arguments.share * STEPS)),
            "batch_size": BATCH,
            "inputs": INPUTS,
            "rates": list(RATES),
        },
        "test": arguments.tests,
        "old_tests": arguments.tests * len(OTHERS),
    }
    runs, _ = resume(arguments.out, settings, seeds=arguments.seeds)
    fixed = WORLD.measured(WORLD.model)

    def save() -> None:
        runs.sort(key=lambda r: (r["seed"], r["rate"], ROWS.index(r["row"])))
        result = {
            **provenance(command_of("forgetting.py", vars(arguments))),
            "core_minutes": round(sum(r["core_seconds"] for r in runs) / 60, 1),
            **settings,
            "seeds": arguments.seeds,
            "fixed": fixed,
            "runs": runs,
            **summary(runs, arguments.seeds),
        }
        write_json(arguments.out, result)

    done = {(r["row"], r["rate"], r["seed"]) for r in runs}
    tasks = [
        (row, rate, seed, arguments.share)
        for seed in range(arguments.seeds)
        for rate in RATES
        for row in ROWS
        if (row, rate, seed) not in done
    ]
    pool = None
    if arguments.workers > 1:
        context = multiprocessing.get_context("spawn")
        pool = context.Pool(arguments.workers, begin, (arguments.tests,))
    for found in pool.imap_unordered(work, tasks) if pool else map(work, tasks):
        runs.append(found)
        save()
        shown = ", ".join(f"{m} {found[m]:.3f}" for m in MEASURES)
        name = f"{found['row']}, rate {found['rate']}"
        print(f"seed {found['seed']}, {name}: {shown}", flush=True)
    if pool:
        pool.close()
        pool.join()
    save()


if __name__ == "__main__":
    main()
