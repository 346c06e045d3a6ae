"""A context distilled into the teacher's own weights, into a tag, into a few vectors.

    OMP_NUM_THREADS=1 python notebooks/experiments/context_distillation.py [--seeds 5]

Writes notebooks/results/context_distillation.json after every run, and goes on from it.
(For a short trial: `--share 0.1 --out FILE`.)

The shipped teacher reads a context c and an input z, and answers at temperature 1. The
student is a copy of it that reads x' = (c', z):

    instruction to nothing   c is one instruction, c' is empty
    hard labels, equal tokens   the same answers and steps as the first row, with the
                             cross-entropy of the answers themselves
    soft prompt, 4 vectors   the frozen teacher; four trained vectors for c
    mixed to nothing         c is one of three instructions, c' is empty: a floor
    mixed to a tag           the same, and c' names language and form

As its own student on full inputs the teacher has a loss of zero before the first step.
So that a loss can fall there, four more rows start from three of its four layers. They
read (c, z) in training, "on D", or (c', z), "on D'", for as many steps, and both are
measured on D and on D':

    cut, one context         the task of the first row: c' is empty
    cut, three contexts      the task of the last row: c' is a tag

There is no row of equal FLOPs: the
teacher computes its distributions in any case while it writes. A seed fixes the order
of the examples; all rows of a seed are paired.

    kl        KL(teacher || student) per token, on answers to test inputs that the
              teacher wrote with its context
    exact     share of labelled test inputs that are answered exactly
    recovery  1 - (kl - floor) / (gain - floor)
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from pathlib import Path

import torch
from torn_teacher import Kept

from kdlib import localize, models
from kdlib.evaluate import evaluate
from kdlib.ledger import command_of, mean_interval, provenance, resume, write_json
from kdlib.objective import Objective
from kdlib.pairs import PairCollator, PairedExample
from kdlib.recovery import measure_recovery
from kdlib.sampling import complete
from kdlib.soft_prompt import SoftPrompt
from kdlib.teachers import LiveTeacher
from kdlib.train import TrainConfig, train

RESULT = Path(__file__).parents[1] / "results" / "context_distillation.json"
LANGUAGES, FORM = ("fr", "de", "es"), "long"
INPUTS, TESTS = 96, 24  # of the unlabelled split, of the test split
NEW_TOKENS, VECTORS, LAYERS = 32, 4, 3
ONE, HARD = "instruction to nothing", "hard labels, equal tokens"
SOFT, MIXED, TAG = "soft prompt, 4 vectors", "mixed to nothing", "mixed to a tag"
CUT_D, CUT_DP = "cut, one context, on D", "cut, one context, on D'"
CUT3_D, CUT3_DP = "cut, three contexts, on D", "cut, three contexts, on D'"
ON_D, CUT = (CUT_D, CUT3_D), (CUT_D, CUT_DP, CUT3_D, CUT3_DP)
CONFIG = TrainConfig(steps=32, batch_size=8, learning_rate=1e-3)
CONFIGS = {
    ONE: CONFIG,
    HARD: CONFIG,
    SOFT: replace(CONFIG, learning_rate=0.05),
    MIXED: CONFIG,
    TAG: CONFIG,
    **{row: replace(CONFIG, steps=64) for row in CUT},
}
TASK_OF = {HARD: ONE, SOFT: ONE, CUT_D: ONE, CUT_DP: ONE, CUT3_D: TAG, CUT3_DP: TAG}
DIFFERENCES = (
    (CUT_DP, CUT_D),
    (CUT3_DP, CUT3_D),
    (ONE, HARD),
    (ONE, SOFT),
    (MIXED, TAG),
)


def instructions(languages=LANGUAGES) -> list[str]:
    return [localize.instruction(language, FORM) for language in languages]


class Task:
    """A teacher's contexts and what is left of them, with its answers.

    written: pairs to train on; heard: pairs to measure the KL on; labelled: to score
    like:    a task with the same contexts, and so the same answers
    """

    def __init__(self, model, tokenizer, contexts, simplified, like=None):
        self.contexts, self.simplified = contexts, simplified
        self.model, self.tokenizer = model, tokenizer
        self.collator = PairCollator(
            tokenizer, teacher_max_length=224, student_max_length=224
        )
        inputs = [d.english for d in localize.load_split("unlabelled")[:INPUTS]]
        self.tests = localize.load_split("test")[:: 1000 // TESTS][:TESTS]
        heard_inputs = [d.english for d in self.tests]
        self.written = self.write(inputs, "train", like and like.written)
        heard = self.write(heard_inputs, "0", like and like.heard_pairs)
        self.heard_pairs, self.heard = heard, [self.collator.collate(heard)]
        if like:
            self.teacher, self.heard_logits = like.teacher, like.heard_logits
        else:
            self.teacher = Kept(LiveTeacher(model), self.written, self.collator)
            self.heard_logits = [LiveTeacher(model).targets(b) for b in self.heard]
        self.labelled = [self.collator.collate(self.labels())]

    def encode(self, english: str, answer: str, i: int, number: int):
        example = PairedExample(english, answer, self.contexts[i], self.simplified[i])
        return self.collator.encode(example, number)

    def labels(self):
        return [
            self.encode(d.english, d.rendering(LANGUAGES[i], FORM), i, number)
            for number, d in enumerate(self.tests)
            for i in range(len(self.contexts))
        ]

    def write(self, inputs: list[str], seed: str, known=None):
        """The teacher's answers, drawn with the seeds of measure_recovery."""
        asked = [(z, i) for z in inputs for i in range(len(self.contexts))]
        pairs = [self.encode(z, "?", i, n) for n, (z, i) in enumerate(asked)]
        answers = known and [pair.response_ids for pair in known]
        answers = answers or complete(
            self.model,
            self.tokenizer,
            [pair.teacher_prompt_ids for pair in pairs],
            max_new_tokens=NEW_TOKENS,
            temperature=1.0,
            seeds=[
                f"{seed} {n // len(self.contexts)} {i}"
                for n, (_, i) in enumerate(asked)
            ],
            keep_end=True,
        )
        return [
            replace(pair, response_ids=ids)
            for pair, ids in zip(pairs, answers, strict=True)
        ]

    def measured(self, model, side: str = "student") -> dict[str, float]:
        none = [None] * len(self.labelled)
        heard = evaluate(model, self.heard, self.heard_logits, side=side)
        exact = evaluate(model, self.labelled, none, side=side)
        return {"kl": heard.kl, "exact": exact.exact_match}

    def limits(self) -> dict:
        """Gain and floor, on the answers in `heard`; all contexts leave one c'."""
        alike = len(set(self.simplified)) == 1
        gain = self.measured(self.model)["kl"]  # of every context
        if not alike:  # every context keeps a c' of its own: nothing stays
            return {"gain": gain, "floor": 0.0, "floor_above": None}
        found = measure_recovery(
            self.model,
            self.collator,
            [d.english for d in self.tests],
            self.contexts,
            max_new_tokens=NEW_TOKENS,
        )
        assert abs(gain - found.gain.mean) < 1e-3 * gain, (gain, found.gain)
        above = found.floor_above
        return {
            "gain": gain,
            "floor": max(0.0, found.floor.mean),
            "floor_above": None if above is None else above.mean,
            "intervals": {
                name: vars(getattr(found, name)) for name in ("gain", "floor")
            },
        }


def tasks(model, tokenizer) -> dict[str, Task]:
    three = instructions()
    tags = [localize.tag(language, FORM) for language in LANGUAGES]
    found = {
        ONE: Task(model, tokenizer, three[:1], [""]),
        MIXED: Task(model, tokenizer, three, [""] * len(three)),
    }
    found[TAG] = Task(model, tokenizer, three, tags, like=found[MIXED])
    return {row: found[TASK_OF.get(row, row)] for row in CONFIGS}


def start(model, task: Task, row: str):
    if row in CUT:
        return models.first_layers(model, LAYERS)
    student = copy.deepcopy(model)
    if row == SOFT:
        context = task.contexts[0]
        return SoftPrompt.from_context(student, task.collator, context, VECTORS)
    return student


def trained(model, task: Task, row: str, seed: int, share: float):
    student = start(model, task, row)
    pairs = task.written
    if row in ON_D:  # the student's view is the teacher's
        pairs = [replace(p, student_prompt_ids=p.teacher_prompt_ids) for p in pairs]
    config = replace(
        CONFIGS[row], steps=max(2, round(share * CONFIGS[row].steps)), seed=seed
    )
    objective = Objective(hard_weight=1.0 if row == HARD else 0.0)
    teacher = None if row == HARD else task.teacher
    history = train(student, pairs, task.collator, objective, config, teacher=teacher)
    return student, history.loss


def run(model, task: Task, row: str, seed: int, share: float, limits) -> dict:
    student, loss = trained(model, task, row, seed, share)
    found = task.measured(student)
    gain, floor = limits["gain"], limits["floor"]
    found["recovery"] = 1 - (found["kl"] - floor) / (gain - floor)
    found["above_floor"] = found["kl"] - floor
    found["loss"] = [round(x, 4) for x in loss]
    if row in CUT:
        full = task.measured(student, "teacher")
        found |= {"kl_on_D": full["kl"], "exact_on_D": full["exact"]}
    return {"row": row, "seed": seed, **found}


def summary(runs: list[dict], seeds: int) -> dict:
    """Intervals over the seeds, once every row has all of them, at least two."""
    of = {row: [r for r in runs if r["row"] == row] for row in CONFIGS}
    if seeds < 2 or any(len(found) != seeds for found in of.values()):
        return {}

    def measures(row):
        return [name for name in of[row][0] if name not in ("row", "seed", "loss")]

    def minus(ours, theirs, name):
        pairs = zip(of[ours], of[theirs], strict=True)
        return vars(mean_interval([a[name] - b[name] for a, b in pairs]))

    return {
        "rows": {
            row: {
                m: vars(mean_interval([r[m] for r in of[row]])) for m in measures(row)
            }
            for row in CONFIGS
        },
        "minus": {
            f"{ours} - {theirs}": {
                m: minus(ours, theirs, m) for m in measures(ours) if m in of[theirs][0]
            }
            for ours, theirs in DIFFERENCES
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models.quiet_transformers()
    model, tokenizer = models.load("teacher")
    of_row = tasks(model, tokenizer)
    settings = {
        "contexts": {row: of_row[row].contexts for row in (ONE, MIXED)},
        "settings": {
            row: {
                "steps": max(2, round(arguments.share * c.steps)),
                "learning_rate": c.learning_rate,
                "batch_size": c.batch_size,
            }
            for row, c in CONFIGS.items()
        },
        "inputs": INPUTS,
        "test": TESTS,
        "tokens_heard": len(of_row[ONE].heard[0].response_ids),
    }
    runs, before = resume(arguments.out, settings, seeds=arguments.seeds)
    limits = {row: of_row[row].limits() for row in (ONE, MIXED, TAG)}
    limits = {row: limits[TASK_OF.get(row, row)] for row in CONFIGS}
    fixed = {
        row: {
            "teacher, with its context": of_row[row].measured(model, "teacher"),
            "teacher, without": of_row[row].measured(model),
        }
        for row in (ONE, MIXED, TAG)
    }

    def save() -> None:
        result = {
            **provenance(command_of("context_distillation.py", vars(arguments))),
            "core_minutes": round(before + time.process_time() / 60, 1),
            **settings,
            "seeds": arguments.seeds,
            "limits": limits,
            "fixed": fixed,
            "runs": runs,
            **summary(runs, arguments.seeds),
        }
        write_json(arguments.out, result)

    save()
    done = {(r["row"], r["seed"]) for r in runs}
    for seed in range(arguments.seeds):
        for row in CONFIGS:
            if (row, seed) in done:
                continue
            found = run(model, of_row[row], row, seed, arguments.share, limits[row])
            runs.append(found)
            save()
            shown = [f"{m} {found[m]:.3f}" for m in ("kl", "exact", "recovery")]
            print(f"seed {seed}, {row}: {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
