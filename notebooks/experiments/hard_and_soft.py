"""Five kinds of target from one torn teacher, over paired seeds.

    OMP_NUM_THREADS=1 python notebooks/experiments/hard_and_soft.py [--seeds 5]

Writes notebooks/results/hard_and_soft.json after every run, and goes on from it. The
shipped teacher reads dates and relative times ("in 81 years") without its instruction,
c = c' = nothing, and is asked for the first token of the answer. Not knowing which of
twelve tasks is meant, it is torn there; a student that reads the same can match it.

    full distributions  the target is the teacher's distribution
    16 samples          tokens drawn from it once, each with its share of the draws
    one sample          a hard label: a token drawn from it once
    redrawn sample      a hard label, drawn anew at every visit
    favourite           a hard label: its likeliest token

An untrained student stands beside them. The trained rows of a seed have the same
inputs, first weights, order and cost: each label needs one forward pass of the teacher.
The seed draws the tokens, too, so that an interval covers the luck of the draw. On test
inputs are measured KL(teacher || student), the student's mean entropy, and the share of
inputs where both have the same favourite.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import replace
from pathlib import Path

import torch

from kdlib import localize, models, phone
from kdlib.divergences import cross_entropy
from kdlib.evaluate import evaluate, teacher_reference
from kdlib.ledger import command_of, mean_interval, provenance, resume, write_json
from kdlib.objective import Objective
from kdlib.pairs import EncodedPair
from kdlib.sparse_targets import sampled_targets
from kdlib.teachers import LiveTeacher
from kdlib.train import train

RESULT = Path(__file__).parents[1] / "results" / "hard_and_soft.json"
KINDS = ("date", "relative")
UNTRAINED = "untrained student"
FULL = "full distributions"
MANY = "16 samples"
SAMPLE = "one sample"
REDRAWN = "redrawn sample"
FAVOURITE = "favourite"
ROWS = (UNTRAINED, FULL, MANY, SAMPLE, REDRAWN, FAVOURITE)
INPUTS = (100, 1000)
STEPS = 400
MEASURES = ("kl", "agreement", "entropy")


class Questions:
    """Inputs of one split, and the teacher's logits for the first answer token."""

    def __init__(self, data, teacher, split: str, limit: int | None = None):
        pairs = data.unlabelled if split == "unlabelled" else data.test
        data_of = localize.load_split(split)
        pairs = [p for p in pairs if data_of[p.example_id].kind in KINDS][:limit]
        self.prompts = [pair.student_prompt_ids for pair in pairs]
        batches = data.batches(self.labelled([0] * len(pairs)))
        self.logits = torch.cat(teacher_reference(teacher, batches))

    def labelled(self, tokens) -> list[EncodedPair]:
        """Both sides read the same prompt, and the answer is one token."""
        return [
            EncodedPair(number, prompt, prompt, [int(token)])
            for number, (prompt, token) in enumerate(
                zip(self.prompts, tokens, strict=True)
            )
        ]


class Kept:
    """A teacher that looks its targets up. `draw` makes a label of them each time."""

    def __init__(self, targets, draw=None):
        self.kept, self.draw = targets, draw

    def targets(self, batch):
        found = self.kept[batch.example_ids]
        return found if self.draw is None else self.draw(found)


def targets_of(row: str, logits, seed: int):
    """(the labels, the teacher) of a row; a hard label needs no teacher."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    if row == FAVOURITE:
        return logits.argmax(-1), None
    if row == SAMPLE:
        return labels, None
    if row == MANY:
        return labels, Kept(sampled_targets(logits, 16, generator))
    if row == REDRAWN:
        return labels, Kept(logits, lambda found: sampled_targets(found, 1, generator))
    return labels, Kept(logits)


def run(data, questions, test, row: str, inputs: int, seed: int, steps: int) -> dict:
    student = models.build(data.tokenizer, **phone.STUDENT, seed=seed)
    if row != UNTRAINED:
        labels, kept = targets_of(row, questions.logits, seed)
        train(
            student,
            questions.labelled(labels)[:inputs],
            data.collator,
            Objective("cross_entropy", hard_weight=1.0 if kept is None else 0.0),
            replace(phone.CONFIG, steps=steps, seed=seed),
            teacher=kept,
        )
    found = evaluate(student, *test)
    return {
        "row": row,
        "inputs": inputs,
        "seed": seed,
        "kl": found.kl,
        "agreement": found.agreement,
        "entropy": entropy(torch.cat(teacher_reference(LiveTeacher(student), test[0]))),
    }


def entropy(logits) -> float:
    """The mean entropy of softmax(logits): its cross-entropy with itself."""
    return cross_entropy(logits, logits).double().mean().item()


def summary(runs: list[dict], seeds: int) -> dict:
    """Means with 95 % intervals, and each row minus the full distributions."""
    levels: dict = {}
    minus: dict = {}
    for inputs in INPUTS:
        values = {
            row: sorted(
                (r for r in runs if (r["row"], r["inputs"]) == (row, inputs)),
                key=lambda r: r["seed"],
            )
            for row in ROWS
        }
        if any(len(found) != seeds for found in values.values()) or seeds < 2:
            continue
        levels[inputs] = {
            row: {m: vars(mean_interval([r[m] for r in found])) for m in MEASURES}
            for row, found in values.items()
        }
        minus[inputs] = {
            row: {
                m: vars(
                    mean_interval(
                        [a[m] - b[m] for a, b in zip(found, values[FULL], strict=True)]
                    )
                )
                for m in MEASURES
            }
            for row, found in values.items()
            if row != FULL
        }
    return {"levels": levels, "minus_full": minus}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = phone.Data()
    teacher = LiveTeacher(data.teacher)
    questions = Questions(data, teacher, "unlabelled", max(INPUTS))
    asked = Questions(data, teacher, "test")
    test = data.batches(asked.labelled(asked.logits.argmax(-1)))
    test = test, teacher_reference(teacher, test)
    steps = max(1, round(arguments.share * STEPS))
    settings = {
        "steps": steps,
        "batch_size": phone.CONFIG.batch_size,
        "test": len(asked.prompts),
    }
    runs, before = resume(arguments.out, settings, seeds=arguments.seeds)
    done = {(r["row"], r["inputs"], r["seed"]) for r in runs}
    for seed, inputs, row in itertools.product(range(arguments.seeds), INPUTS, ROWS):
        if (row, inputs, seed) not in done:
            runs.append(run(data, questions, test, row, inputs, seed, steps))
            print(runs[-1], flush=True)
        result = {
            **provenance(command_of("hard_and_soft.py", vars(arguments))),
            "core_minutes": round(before + time.process_time() / 60, 1),
            **settings,
            "seeds": arguments.seeds,
            "teacher_entropy": entropy(asked.logits),
            "runs": runs,
            **summary(runs, arguments.seeds),
        }
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
