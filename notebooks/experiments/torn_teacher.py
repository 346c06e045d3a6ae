"""Students of a teacher that is torn between six languages, by divergence.

    OMP_NUM_THREADS=1 python notebooks/experiments/torn_teacher.py [--seeds 5]

Writes notebooks/results/torn_teacher.json after every run, and goes on from it. (For a
short trial: `--share 0.1 --out FILE`.) The teacher reads one worked example that is the
same in all six languages, then a list of countries or languages. It answers in one of
the six. The student reads the list alone; as the worked example never changes, it could
match the teacher.

Every student reads the same answers, which the teacher wrote at temperature 1, two for
each input. Only the loss on them differs:

    hard labels, equal tokens   cross-entropy with the answers themselves
    forward KL, JSD, reverse KL the divergence from the teacher's distributions

These students start as the teacher's first two layers, half of it. Two rows more start
from random weights, with the quickstart's smaller student. A seed fixes the order of
the examples, and random weights. There is no row of equal FLOPs: the teacher computes
its distributions in any case while it writes.

A student is judged by exact numbers, with nothing sampled, from the probability of each
of the right answers to a test input:

    valid      their sum: how likely a sampled answer is right in some language
    languages  exp of the entropy of their shares: how many languages are kept
    forward_kl, reverse_kl   per token, on answers that the teacher wrote for the tests

The three students of a divergence are also measured at lower sampling temperatures
("cooled"): the cheapest rival of a loss that makes students sharper. "at equal valid"
compares them where both are as likely right, between two temperatures on a line.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from kdlib import localize, models, phone
from kdlib.divergences import forward_kl, reverse_kl
from kdlib.evaluate import parameter_count
from kdlib.ledger import command_of, mean_interval, provenance, resume, write_json
from kdlib.objective import Objective
from kdlib.pairs import EncodedPair, PairCollator, PairedExample
from kdlib.sampling import complete
from kdlib.teachers import LiveTeacher
from kdlib.train import train

RESULT = Path(__file__).parents[1] / "results" / "torn_teacher.json"
CONTEXT = "12:10:05 PM => 12:10:05"
ANSWERS = 2
LAYERS, RATE = 2, 1e-3
STEPS, SCRATCH_STEPS = 250, 400
TEACHER, HALF, SMALL = "teacher", "untrained, first layers", "untrained, random"
HARD, FORWARD, JSD = "hard labels, equal tokens", "forward KL", "JSD, beta 0.5"
REVERSE = "reverse KL"
SCRATCH_FORWARD = "from scratch, forward KL"
SCRATCH_REVERSE = "from scratch, reverse KL"
OBJECTIVES = {
    HARD: Objective(hard_weight=1.0),
    FORWARD: Objective("forward_kl"),
    JSD: Objective("generalized_jsd", divergence_params={"beta": 0.5}),
    REVERSE: Objective("reverse_kl"),
    SCRATCH_FORWARD: Objective("forward_kl"),
    SCRATCH_REVERSE: Objective("reverse_kl"),
}
COOLED = (0.9, 0.8, 0.7, 0.6, 0.5)
EQUAL_VALID = (0.38, 0.42)
COOLED_ROWS, COOLED_MEASURES = (FORWARD, JSD, REVERSE), ("valid", "languages")
SCRATCH = (SCRATCH_FORWARD, SCRATCH_REVERSE)
MEASURES = ("valid", "languages", "forward_kl", "reverse_kl")
DIFFERENCES = (
    (REVERSE, FORWARD),
    (JSD, FORWARD),
    (JSD, REVERSE),
    (FORWARD, HARD),
    (SCRATCH_REVERSE, SCRATCH_FORWARD),
)


class Kept:
    """A teacher whose logits were computed once, example by example."""

    def __init__(self, teacher: LiveTeacher, pairs, collator):
        self.logits = {}
        for i in range(0, len(pairs), 128):
            batch = collator.collate(pairs[i : i + 128])
            found = teacher.targets(batch)
            for row, number in enumerate(batch.example_ids.tolist()):
                self.logits[number] = found[batch.row_ids == row].clone()

    def targets(self, batch):
        return torch.cat([self.logits[n] for n in batch.example_ids.tolist()])


class Torn:
    """The teacher, what it wrote, and the six right answers to every test input."""

    def __init__(self, inputs: int | None = None):
        self.model, self.tokenizer = models.load("teacher")
        self.collator = PairCollator(
            self.tokenizer, teacher_max_length=160, student_max_length=128
        )
        self.written = self.write("unlabelled", inputs)
        self.teacher = Kept(LiveTeacher(self.model), self.written, self.collator)
        self.heard = self.write("test")
        self.heard_teacher = Kept(LiveTeacher(self.model), self.heard, self.collator)
        self.right = [
            self.encode(datum.english, answer, number)
            for number, datum in enumerate(localize.load_split("test", kinds=["list"]))
            for answer in dict.fromkeys(datum.renderings)
        ]

    def encode(self, english: str, answer: str, number: int) -> EncodedPair:
        return self.collator.encode(PairedExample(english, answer, CONTEXT), number)

    def write(self, split: str, limit: int | None = None) -> list[EncodedPair]:
        """The teacher's own answers, by token, with a number for each."""
        data = localize.load_split(split, kinds=["list"])[:limit]
        asked = [self.encode(d.english, "?", 0) for d in data for _ in range(ANSWERS)]
        answers = complete(
            self.model,
            self.tokenizer,
            [pair.teacher_prompt_ids for pair in asked],
            temperature=1.0,
            seeds=range(len(asked)),
            keep_end=True,
        )
        return [
            replace(pair, example_id=number, response_ids=ids)
            for number, (pair, ids) in enumerate(zip(asked, answers, strict=True))
        ]


@torch.no_grad()
def logits_of(model, batch, side: str):
    view = getattr(batch, side)
    mask = view.attention_mask.long()
    return view.select(model(input_ids=view.input_ids, attention_mask=mask).logits)


def answers_of(torn: Torn, batch, logits, temperature: float) -> dict[str, float]:
    """How likely the right answers are when one samples at this temperature."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    log_p = log_p.gather(-1, batch.response_ids[:, None])[:, 0]
    chance = torch.zeros(len(torn.right), dtype=torch.float64)
    chance = chance.index_add(0, batch.row_ids, log_p).exp()
    tests = batch.example_ids
    valid = torch.zeros(int(tests.max()) + 1, dtype=torch.float64)
    valid = valid.index_add(0, tests, chance)
    share = chance / valid[tests]
    entropy = torch.zeros_like(valid).index_add(0, tests, -torch.xlogy(share, share))
    return {
        "valid": valid.mean().item(),
        "languages": entropy.exp().mean().item(),
    }


def measured(model, torn: Torn, side: str = "student") -> dict:
    model.eval()
    batch = torn.collator.collate(torn.right)
    logits = logits_of(model, batch, side)
    heard = torn.collator.collate(torn.heard)
    pair = logits_of(model, heard, side), torn.heard_teacher.targets(heard)
    return {
        **answers_of(torn, batch, logits, 1.0),
        "forward_kl": forward_kl(*pair).mean().item(),
        "reverse_kl": reverse_kl(*pair).mean().item(),
        "cooled": {str(t): answers_of(torn, batch, logits, t) for t in COOLED},
    }


def start(torn: Torn, row: str, seed: int):
    if row in (SMALL, *SCRATCH):
        return models.build(torn.tokenizer, **phone.STUDENT, seed=seed)
    return models.first_layers(torn.model, LAYERS)


def config(row: str, seed: int, share: float):
    if row in SCRATCH:
        found = replace(phone.CONFIG, steps=SCRATCH_STEPS)
    else:
        found = replace(phone.CONFIG, steps=STEPS, learning_rate=RATE)
    return replace(found, steps=max(1, round(share * found.steps)), seed=seed)


def trained(torn: Torn, row: str, seed: int, share: float):
    student, objective = start(torn, row, seed), OBJECTIVES[row]
    teacher = None if objective.hard_weight == 1 else torn.teacher
    settings = config(row, seed, share)
    train(student, torn.written, torn.collator, objective, settings, teacher=teacher)
    return student


def summary(runs: list[dict], seeds: int, rows=tuple(OBJECTIVES)) -> dict:
    """Intervals over the seeds, once every row has all of them, at least two."""
    of = {row: [run for run in runs if run["row"] == row] for row in rows}
    if seeds < 2 or any(len(found) != seeds for found in of.values()):
        return {}

    def difference(ours, theirs):
        return vars(mean_interval([a - b for a, b in zip(ours, theirs, strict=True)]))

    def values(row, measure):
        return [run[measure] for run in of[row]]

    cooled = [row for row in COOLED_ROWS if row in of]
    return {
        "rows": {
            row: {m: vars(mean_interval(values(row, m))) for m in MEASURES}
            for row in of
        },
        "cooled": {
            row: {
                str(t): {
                    m: vars(
                        mean_interval([run["cooled"][str(t)][m] for run in of[row]])
                    )
                    for m in COOLED_MEASURES
                }
                for t in COOLED
            }
            for row in cooled
        },
        "at equal valid": {
            f"{FORWARD} - {row}": {
                str(valid): difference(
                    [languages_at(valid, run) for run in of[FORWARD]],
                    [languages_at(valid, run) for run in of[row]],
                )
                if all(reaches(valid, run) for run in of[FORWARD] + of[row])
                else None
                for valid in EQUAL_VALID
            }
            for row in cooled
            if row != FORWARD and FORWARD in of
        },
        "minus": {
            f"{ours} - {theirs}": {
                m: difference(values(ours, m), values(theirs, m)) for m in MEASURES
            }
            for ours, theirs in DIFFERENCES
            if ours in of and theirs in of
        },
    }


def path(run: dict, measure: str) -> list[float]:
    """From temperature 1 down to the coolest."""
    return [run[measure], *(run["cooled"][str(t)][measure] for t in COOLED)]


def reaches(valid: float, run: dict) -> bool:
    found = path(run, "valid")
    return found[0] <= valid <= found[-1]


def languages_at(valid: float, run: dict) -> float:
    """The languages that a run keeps when it is cooled until `valid` is this."""
    return float(np.interp(valid, path(run, "valid"), path(run, "languages")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps")
    parser.add_argument("--inputs", type=int, help="to train on; all by default")
    parser.add_argument("--rows", nargs="+", choices=OBJECTIVES, help="all by default")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models.quiet_transformers()
    torn = Torn(arguments.inputs)
    settings = {
        "context": CONTEXT,
        "parameters": {
            TEACHER: parameter_count(torn.model),
            HALF: parameter_count(start(torn, HALF, 0)),
            SMALL: parameter_count(start(torn, SMALL, 0)),
        },
        "settings": {
            row: {
                "steps": config(row, 0, arguments.share).steps,
                "learning_rate": config(row, 0, 1).learning_rate,
            }
            for row in OBJECTIVES
        },
        "batch_size": phone.CONFIG.batch_size,
        "answers": len(torn.written),
        "test": len(set(pair.example_id for pair in torn.right)),
    }
    rows = tuple(arguments.rows or OBJECTIVES)
    runs, before = resume(arguments.out, settings, seeds=arguments.seeds)
    fixed = {TEACHER: measured(torn.model, torn, "teacher")}
    fixed |= {row: measured(start(torn, row, 0), torn) for row in (HALF, SMALL)}

    def save() -> None:
        result = {
            **provenance(command_of("torn_teacher.py", vars(arguments))),
            "core_minutes": round(before + time.process_time() / 60, 1),
            **settings,
            "seeds": arguments.seeds,
            "fixed": fixed,
            "runs": runs,
            **summary(runs, arguments.seeds, rows),
        }
        write_json(arguments.out, result)

    save()
    done = {(run["row"], run["seed"]) for run in runs}
    for seed in range(arguments.seeds):
        for row in rows:
            if (row, seed) in done:
                continue
            found = measured(trained(torn, row, seed, arguments.share), torn)
            runs.append({"row": row, "seed": seed, **found})
            save()
            shown = ", ".join(f"{m} {found[m]:.3f}" for m in MEASURES)
            print(f"seed {seed}, {row}: {shown}", flush=True)


if __name__ == "__main__":
    main()
