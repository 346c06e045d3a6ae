"""The capstone's worked example: a Polish phone, two forms, and grammar with numbers.

    OMP_NUM_THREADS=1 python notebooks/experiments/capstone_example.py [--seeds 5]

Writes notebooks/results/capstone_example.json after every seed, and goes on from it.
(For a short trial: `--seeds 2 --share 0.01 --out FILE`.)

An app in Polish shows each value in a long form or a short one. The teacher reads an
instruction, the student one word, "long" or "short" (c'). The student starts as the
teacher's first two layers of four. There are labels for 150 values, in both forms, and
2,000 more values that nobody has labelled. A seed fixes the order of the examples.

The question and the predictions below were written before the first run, and stand in
the result file as they were. Rows and measures are those of kdlib/capstone.py.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from kdlib import capstone, localize, models, phone
from kdlib.ledger import command_of, mean_interval, provenance, resume, write_json
from kdlib.pairs import PairCollator, PairedExample
from kdlib.settings import TrainConfig

RESULT = Path(__file__).parents[1] / "results" / "capstone_example.json"
QUESTION = (
    "A Polish phone wants two forms from one student that reads one word of context, "
    "and 150 values were labelled. At equal FLOPs, does it answer more if it learns "
    "from the teacher, and is that so because labels are too few for a grammar in "
    "which numbers change the words that follow?"
)
PREDICTIONS = (
    "Distilled minus hard labels at equal FLOPs, exact match: above 0.10.",
    "That gain is larger for units and relative times, whose words change with the "
    "number, than for all other kinds.",
    "Recovery: above 0.5.",
)
LOCALE, FORMS = "pl", ("long", "short")
LABELLED, UNLABELLED, TEST = 150, 2000, 400
COUNTED = ("unit", "relative")
LAYERS = 2
CONFIG = TrainConfig(steps=250, batch_size=32, learning_rate=1e-3)
GROUPS = ("counted words", "other kinds")


def examples(split: str, limit: int) -> list:
    """Each value in both forms: an instruction for the teacher, a word for the student.

    Every n-th value, because a split's kinds do not stand in a random order.
    """
    data = localize.load_split(split)
    step = max(1, len(data) // limit)
    return [
        (datum.kind, example)
        for datum in data[::step][:limit]
        for example in (
            PairedExample(
                datum.english,
                datum.rendering(LOCALE, form),
                localize.instruction(LOCALE, form),
                form,
            )
            for form in FORMS
        )
    ]


def task(share: float = 1.0) -> capstone.Task:
    """The worked example's; `share` of the values and steps."""
    teacher, tokenizer = models.load("teacher")
    collator = PairCollator(tokenizer, teacher_max_length=128, student_max_length=128)

    def part(split, size):
        return examples(split, max(8, round(share * size)))

    def labelled(found):
        return [collator.encode(e, i) for i, (_, e) in enumerate(found)]

    test = part("test", TEST)
    counted = [i for i, (kind, _) in enumerate(test) if kind in COUNTED]
    others = [i for i, (kind, _) in enumerate(test) if kind not in COUNTED]
    unlabelled = [example for _, example in part("unlabelled", UNLABELLED)]
    return capstone.Task(
        teacher=teacher,
        collator=collator,
        student=lambda seed: models.first_layers(teacher, LAYERS),
        labelled=labelled(part("train", LABELLED)),
        unlabelled=capstone.answered(teacher, collator, unlabelled, max_new_tokens=48),
        test=labelled(test),
        groups=dict(zip(GROUPS, (counted, others), strict=True)),
        config=replace(CONFIG, steps=max(2, round(share * CONFIG.steps))),
    )


def more_where_counted(runs: list[dict]) -> dict:
    """Distilled minus hard labels at equal FLOPs: counted words' gain minus others'."""
    of = {(run["row"], run["seed"]): run for run in runs}

    def gained(seed: int, group: str) -> float:
        rows = (phone.DISTILLED, phone.HARD_FLOPS)
        ours, theirs = (of[row, seed][f"exact_match, {group}"] for row in rows)
        return ours - theirs

    seeds = sorted({run["seed"] for run in runs})
    first, second = GROUPS
    return vars(mean_interval([gained(s, first) - gained(s, second) for s in seeds]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--share", type=float, default=1.0, help="of values and of steps"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models.quiet_transformers()
    ours = task(arguments.share)
    settings = {
        "steps": ours.config.steps,
        "batch_size": ours.config.batch_size,
        "learning_rate": ours.config.learning_rate,
        "examples": {
            name: len(getattr(ours, name))
            for name in ("labelled", "unlabelled", "test")
        },
        "question": QUESTION,
        "predictions": list(PREDICTIONS),
    }
    runs, _ = resume(arguments.out, settings, seeds=arguments.seeds)
    fixed = capstone.fixed_rows(ours)
    for seed in range(len({run["seed"] for run in runs}), arguments.seeds):
        runs += capstone.run_seed(ours, seed)
        about = {
            **provenance(command_of("capstone_example.py", vars(arguments))),
            **settings,
        }
        if seed:
            found = capstone.result(
                ours,
                question=QUESTION,
                predictions=PREDICTIONS,
                fixed=fixed,
                runs=runs,
            )
            about |= {**found, "more_where_counted": more_where_counted(runs)}
        else:
            about["runs"] = runs
        write_json(arguments.out, about)
        for run in runs[-4:]:
            print(seed, run["row"], f"exact {run['exact_match']:.3f}", flush=True)


if __name__ == "__main__":
    main()
