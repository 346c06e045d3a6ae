"""How much D', of what kinds, with what wrong answers: the phone's students.

    OMP_NUM_THREADS=1 python notebooks/experiments/data_size.py [--workers 12]

Writes notebooks/results/data_size.json after every run, and goes on from it. (For a
short trial: `--seeds 2 --share 0.1 --out FILE`.) Every run has one thread and a random
state of its own, so the results do not depend on the number of workers.

The students are those of kdlib/phone.py, on inputs of its unlabelled split. All are
trained for as many steps of 32 examples, except for `a quarter of the steps`; size is
the number of distinct inputs in D', which are then read again and again. So all rows
cost the same tokens, but for the lengths of what was drawn.

The plan, made before any run:

    n                 200, 600, 1,800 or all 6,000 inputs, drawn from the nine kinds
    n, three kinds    the same from three kinds alone, as many of each. The seed draws
                      which of the five kinds that have 600 inputs. Size and diversity
                      apart: 600 of three against 600 of nine, and against 1,800
    n, narrow         a student of width 24 for 64. Capacity: what does n do to its
                      loss in training and on test inputs?
    dates alone, narrow   the 1,152 dates, and none of the other inputs. Is the loss on
                      dates lower if all others are added?
    n, a quarter of the steps   optimisation: what is n worth if time is short?
    n, answers        the teacher's answers (greedy; sequence-level targets) in place of
                      its distributions (token-level), on as many tokens
    200, labels       true labels of the 200 inputs
    n, random / systematic errors   answers of a teacher that sometimes takes the wrong
                      context: they are in German. Systematic: all dates and lists.
                      Random: as many inputs, drawn by the seed from those whose German
                      is not their French. n = 600 or 6,000

A seed fixes the inputs, the first weights and the order; rows are paired by seed, and
a smaller D' is a part of a larger one of its kinds. Measured on 1,000 test inputs:

    exact, kl   share answered exactly; KL(teacher || student), nats a token (the
                teacher's eight likeliest tokens and a bucket, as in training)
    exact_covered, kl_covered   the same on the three kinds of this seed
    exact_date, kl_date         the same on dates
    kl_train    on (at most 500 of) the inputs and answers that were trained on,
                against the same teacher: the loss that a training curve ends at
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from parallel import runs_of

from kdlib import localize, models, phone
from kdlib.evaluate import evaluate
from kdlib.ledger import mean_interval, provenance, resume, write_json
from kdlib.objective import Objective
from kdlib.sparse_targets import top_k_targets
from kdlib.teachers import LiveTeacher
from kdlib.train import train

RESULT = Path(__file__).parents[1] / "results" / "data_size.json"
STEPS = 600
SIZES = (200, 600, 1800, 6000)
LARGE_KINDS = ("date", "money", "unit", "list", "number")  # 600 inputs or more
GERMAN_KINDS = ("date", "list")
NARROW = {"hidden_size": 24, "layers": 2, "heads": 2}
HEARD = 500  # of the training inputs, for kl_train
UNTRAINED, LABELS, DATES = "untrained", "200, labels", "dates alone, narrow"
ALL = SIZES[-1]
NINE = [f"{n}" for n in SIZES]
THREE = [f"{n}, three kinds" for n in SIZES[:-1]]
NARROWS = [f"{n}, narrow" for n in SIZES]
SHORT = [f"{n}, a quarter of the steps" for n in (600, ALL)]
ANSWERS = [f"{n}, answers" for n in (600, ALL)]
RANDOM = [f"{n}, random errors" for n in (600, ALL)]
SYSTEMATIC = [f"{n}, systematic errors" for n in (600, ALL)]
ROWS = [
    *(UNTRAINED, *NINE, *THREE, *NARROWS, DATES),
    *(*SHORT, *ANSWERS, LABELS, *RANDOM, *SYSTEMATIC),
]
HARD = (*ANSWERS, LABELS, *RANDOM, *SYSTEMATIC)
DIFFERENCES = (
    ("6000", "200"),
    ("600", "600, three kinds"),
    ("1800, three kinds", "600, three kinds"),
    ("1800, three kinds", "600"),
    ("6000, narrow", "200, narrow"),
    ("6000, narrow", "1800, narrow"),
    ("6000, narrow", "6000"),
    ("6000, narrow", DATES),
    ("6000, a quarter of the steps", "600, a quarter of the steps"),
    ("6000", "600"),
    ("600", "600, answers"),
    ("6000", "6000, answers"),
    ("200", LABELS),
    ("6000", LABELS),
    ("600, random errors", "600, answers"),
    ("6000, random errors", "6000, answers"),
    ("6000, random errors", "600, random errors"),
    ("6000, systematic errors", "6000, random errors"),
    ("6000, systematic errors", "600, systematic errors"),
)


class World:
    """The phone's data, and the teacher's targets for the test inputs."""

    def __init__(self):
        self.data = phone.Data()
        self.unlabelled = localize.load_split("unlabelled")
        self.kinds = [datum.kind for datum in self.unlabelled]
        by_kind = {kind: [] for kind in localize.KINDS}
        for number, datum in enumerate(localize.load_split("test")):
            by_kind[datum.kind].append(self.data.test[number])
        self.test = {k: self.data.batches(p) for k, p in by_kind.items()}
        teacher = LiveTeacher(self.data.teacher)
        self.targets = {
            kind: [top_k_targets(teacher.targets(b), 8) for b in batches]
            for kind, batches in self.test.items()
        }

    def inputs(self, row: str, seed: int) -> list[int]:
        """The numbers of the row's inputs, in the order drawn."""
        rng = random.Random(f"inputs {seed}")
        order = list(range(len(self.unlabelled)))
        rng.shuffle(order)
        if row == DATES:
            return [i for i in order if self.kinds[i] == "date"]
        n = int(row.partition(",")[0])
        if row in THREE:
            kinds = covered(seed)
            return [
                number
                for kind in kinds
                for number in [i for i in order if self.kinds[i] == kind][: n // 3]
            ]
        return order[:n]

    def pairs(self, row: str, seed: int) -> list:
        """The row's examples, with the answers that it reads."""
        chosen = self.inputs(row, seed)
        if row == LABELS:
            return self.with_answers({i: "fr" for i in chosen})
        if row in RANDOM or row in SYSTEMATIC:
            odd = {i for i in chosen if self.kinds[i] in GERMAN_KINDS and self.apart(i)}
            if row in RANDOM:
                apart = [i for i in chosen if self.apart(i)]
                odd = set(random.Random(f"odd {seed}").sample(apart, len(odd)))
            german = {
                p.example_id: p for p in self.with_answers(dict.fromkeys(odd, "de"))
            }
            return [german.get(i, self.data.unlabelled[i]) for i in chosen]
        return [self.data.unlabelled[i] for i in chosen]

    def apart(self, number: int) -> bool:
        datum = self.unlabelled[number]
        return datum.rendering("fr", phone.FORM) != datum.rendering("de", phone.FORM)

    def with_answers(self, locales: dict[int, str]) -> list:
        return self.data.encode(
            {
                i: phone.pair(
                    self.unlabelled[i].english,
                    self.unlabelled[i].rendering(locale, phone.FORM),
                )
                for i, locale in locales.items()
            }
        )

    def measured(self, student, seed: int) -> dict[str, float]:
        by_kind = {
            k: evaluate(student, self.test[k], self.targets[k]) for k in self.test
        }
        found = {}
        for name, kinds in (
            ("", localize.KINDS),
            ("_covered", covered(seed)),
            ("_date", ("date",)),
        ):
            parts = [by_kind[kind] for kind in kinds]
            hits = [hit for part in parts for hit in part.hits]
            tokens = sum(part.n_tokens for part in parts)
            found[f"exact{name}"] = sum(hits) / len(hits)
            found[f"kl{name}"] = sum(p.kl * p.n_tokens for p in parts) / tokens
        return found


def covered(seed: int) -> list[str]:
    return sorted(random.Random(f"kinds {seed}").sample(LARGE_KINDS, 3))


@functools.cache
def world() -> World:
    torch.set_num_threads(1)
    models.quiet_transformers()
    return World()


def run(row: str, seed: int, share: float) -> dict:
    here, start = world(), time.process_time()
    shape = NARROW if "narrow" in row else phone.STUDENT
    student = models.build(here.data.tokenizer, **shape, seed=seed)
    found = {"row": row, "seed": seed}
    if row != UNTRAINED:
        pairs, hard = here.pairs(row, seed), row in HARD
        steps = STEPS // 4 if row in SHORT else STEPS
        config = replace(phone.CONFIG, steps=max(2, round(share * steps)), seed=seed)
        history = train(
            student,
            pairs,
            here.data.collator,
            Objective("forward_kl", hard_weight=1.0 if hard else 0.0),
            config,
            teacher=None if hard else here.data.cache,
        )
        heard = [p for p in pairs if here.data.unlabelled[p.example_id] is p][:HEARD]
        if heard:
            batches = here.data.batches(heard)
            targets = [here.data.cache.targets(b) for b in batches]
            found["kl_train"] = evaluate(student, batches, targets).kl
        found |= {"n": len(pairs), "tokens": history.tokens}
    found |= here.measured(student, seed)
    return found | {"minutes": (time.process_time() - start) / 60}


def summary(runs: list[dict], seeds: int) -> dict:
    """Intervals over the seeds, once every row has all of them, at least two."""
    of = {row: [r for r in runs if r["row"] == row] for row in ROWS}
    if seeds < 2 or any(len(found) != seeds for found in of.values()):
        return {}
    left_out = ("row", "seed", "n", "tokens", "minutes")

    def interval(values):
        return vars(mean_interval(list(values)))

    def minus(ours, theirs, name):
        return [a[name] - b[name] for a, b in zip(of[ours], of[theirs], strict=True)]

    def shared(*rows):
        return [m for m in of[rows[0]][0] if m not in left_out
                and all(m in of[row][0] for row in rows)]  # fmt: skip

    differences = {
        f"{ours} - {theirs}": {
            m: interval(minus(ours, theirs, m)) for m in shared(ours, theirs)
        }
        for ours, theirs in DIFFERENCES
    }
    # What 6,000 inputs gain over 600 in all the steps, more than in a quarter of them.
    later = {
        m: interval(
            a - b
            for a, b in zip(
                minus("6000", "600", m), minus(SHORT[1], SHORT[0], m), strict=True
            )
        )
        for m in shared("6000", SHORT[0])
    }
    return {
        "rows": {
            row: {m: interval(r[m] for r in of[row]) for m in shared(row)}
            for row in ROWS
        },
        "minus": {**differences, "(6000 - 600), all steps - a quarter": later},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {
        "steps": max(2, round(arguments.share * STEPS)),
        "batch_size": phone.CONFIG.batch_size,
        "learning_rate": phone.CONFIG.learning_rate,
        "students": {"wide": phone.STUDENT, "narrow": NARROW},
        "sizes": SIZES,
    }
    runs, _ = resume(arguments.out, settings, seeds=arguments.seeds)
    done = {(r["row"], r["seed"]) for r in runs}
    jobs = [
        (row, seed, arguments.share)
        for seed, row in itertools.product(range(arguments.seeds), ROWS)
        if (row, seed) not in done
    ]
    about = {
        **provenance(
            "python notebooks/experiments/data_size.py "
            f"--seeds {arguments.seeds} --share {arguments.share:g}"
        ),
        **settings,
        "covered": {str(seed): covered(seed) for seed in range(arguments.seeds)},
        "seeds": arguments.seeds,
    }
    for found in runs_of(run, jobs, arguments.workers):
        runs.append(found)
        runs.sort(key=lambda r: (r["seed"], ROWS.index(r["row"])))
        minutes = round(sum(r["minutes"] for r in runs), 1)
        result = {**about, "core_minutes": minutes, "runs": runs}
        write_json(arguments.out, result | summary(runs, arguments.seeds))
        shown = f"exact {found['exact']:.3f}, KL {found['kl']:.3f}"
        print(f"seed {found['seed']}, {found['row']}: {shown}", flush=True)


if __name__ == "__main__":
    main()
