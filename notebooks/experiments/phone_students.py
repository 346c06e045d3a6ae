"""Students in few bits, and students as drafts, over paired seeds.

    OMP_NUM_THREADS=1 python notebooks/experiments/phone_students.py [--workers 2]

Writes notebooks/results/phone_students.json after every job, and goes on from it; and
beside it the student of seed 0 (phone_student.safetensors), which chapter 13 puts onto
the phone. (For a short trial: `--seeds 2 --share 0.01 --out FILE`.) Every job has one
thread and a random state of its own, so the results do not depend on the number of
workers.

Each seed has the quickstart's rows (kdlib/phone.py) and one student of another loss:

    distilled student, hard labels at equal tokens and at equal FLOPs, untrained
    distilled by TVD         the same tokens, total variation for the forward KL

Then the distilled student is quantised: every matrix, one scale a row, b bits.

    rounded, b bits          as it is
    longer, b bits           trained on for a quarter of its steps, in float32, then
                             rounded: the fair rival of the next row
    distilled into b bits    the same further steps with quantised weights in the
                             forward pass (quantisation-aware distillation)
    labels into 3 bits       the same, on the 300 labels without the teacher

The further steps read as many tokens in all three rows. The teacher's distributions
for them are those that stage one had asked for, so equal tokens are equal FLOPs.

    exact, kl, agreement     of kdlib.evaluate, on the test split
    accepted                 1 - TVD from the teacher, mean over the tokens of the test
                             answers: the chance that a drafted token is kept
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from parallel import runs_of
from safetensors.torch import save_file

from kdlib import models, phone
from kdlib.divergences import tvd
from kdlib.evaluate import evaluate, response_logits, teacher_reference
from kdlib.ledger import command_of, mean_interval, provenance, resume, write_json
from kdlib.objective import Objective
from kdlib.quantised import FakeQuantised, quantised, stored_bytes
from kdlib.teachers import LiveTeacher
from kdlib.train import train

RESULT = Path(__file__).parents[1] / "results" / "phone_students.json"
STUDENT = "phone_student.safetensors"
BITS = (8, 4, 3, 2)
TRAINED_BITS = (4, 3, 2)
LABEL_BITS = 3
BY_TVD = "distilled by TVD"
LONGER = "longer, float32"
ROUNDED = {b: f"rounded, {b} bits" for b in BITS}
LONGER_IN = {b: f"longer, {b} bits" for b in BITS}
INTO = {b: f"distilled into {b} bits" for b in TRAINED_BITS}
LABELS_INTO = f"labels into {LABEL_BITS} bits"
# A job is what one process makes of one seed: its rows.
BASELINES = (phone.UNTRAINED, phone.HARD_TOKENS, phone.HARD_FLOPS, BY_TVD)
QUANTISED = (
    *(phone.DISTILLED, LONGER, *ROUNDED.values(), *LONGER_IN.values()),
    *(*INTO.values(), LABELS_INTO),
)
ROWS = (*BASELINES, *QUANTISED)
RATE = 1e-3  # of the further steps: a quarter of stage one's
MEASURES = ("exact", "kl", "agreement", "accepted")
DIFFERENCES = (
    *((ROUNDED[b], phone.DISTILLED) for b in BITS),
    *((INTO[b], LONGER_IN[b]) for b in TRAINED_BITS),
    *((INTO[b], phone.DISTILLED) for b in TRAINED_BITS),
    (INTO[LABEL_BITS], LABELS_INTO),
    (phone.DISTILLED, phone.HARD_TOKENS),
    (phone.DISTILLED, phone.HARD_FLOPS),
    (BY_TVD, phone.DISTILLED),
)


@functools.cache
def prepared():
    """Data and the teacher's logits on the test split; once a process."""
    torch.set_num_threads(1)
    models.quiet_transformers()
    data = phone.Data()
    test = data.batches(data.test)
    return data, test, teacher_reference(LiveTeacher(data.teacher), test)


@torch.no_grad()
def measured(model, side: str = "student") -> dict[str, float]:
    _, test, reference = prepared()
    found = evaluate(model, test, reference, side=side)
    apart = torch.cat(
        [
            tvd(response_logits(model, batch, side), target)
            for batch, target in zip(test, reference, strict=True)
        ]
    )
    return {
        "exact": found.exact_match,
        "kl": found.kl,
        "agreement": found.agreement,
        "accepted": 1 - apart.double().mean().item(),
    }


def by_tvd(data, budget, seed: int):
    student = models.build(data.tokenizer, **phone.STUDENT, seed=seed)
    pairs = data.unlabelled[: budget.unlabelled]
    config = replace(phone.CONFIG, steps=budget.steps, seed=seed)
    objective = Objective("tvd", scale_by_t2=False)
    train(student, pairs, data.collator, objective, config, teacher=data.cache)
    return student


def further(data, plan, student, seed: int, bits: int | None, hard: bool = False):
    """The student trained on, a quarter as long; in `bits` bits if they are given.

    hard: on the labels, as many tokens as the teacher's answers have
    """
    student = copy.deepcopy(student)
    budget = plan[phone.HARD_TOKENS if hard else phone.DISTILLED]
    config = replace(
        phone.CONFIG, steps=quarter(budget), learning_rate=RATE, seed=seed + 1000
    )
    train(
        student if bits is None else FakeQuantised(student, bits),
        data.labelled if hard else data.unlabelled[: budget.unlabelled],
        data.collator,
        Objective("forward_kl", hard_weight=1.0 if hard else 0.0),
        config,
        teacher=None if hard else data.cache,
    )
    return student if bits is None else quantised(student, bits)


def quarter(budget) -> int:
    return max(1, round(budget.steps / 4))


def students(job: tuple[str, ...], seed: int, plan, kept: Path) -> Iterator[tuple]:
    """The rows of a job with their models, in order."""
    data, _, _ = prepared()
    if job == BASELINES:
        yield phone.UNTRAINED, models.build(data.tokenizer, **phone.STUDENT, seed=seed)
        for row in (phone.HARD_TOKENS, phone.HARD_FLOPS):
            yield row, phone.fit(row, data, plan[row], seed)
        yield BY_TVD, by_tvd(data, plan[phone.DISTILLED], seed)
        return
    student = phone.fit(phone.DISTILLED, data, plan[phone.DISTILLED], seed)
    if seed == 0:
        # Tied weights have two names in the state, and one in a file.
        weights = {name: p.detach() for name, p in student.named_parameters()}
        save_file(weights, kept, metadata={"format": "pt"})
    yield phone.DISTILLED, student
    yield LONGER, (on := further(data, plan, student, seed, None))
    for bits in BITS:
        yield ROUNDED[bits], quantised(student, bits)
        yield LONGER_IN[bits], quantised(on, bits)
    for bits in TRAINED_BITS:
        yield INTO[bits], further(data, plan, student, seed, bits)
    yield LABELS_INTO, further(data, plan, student, seed, LABEL_BITS, hard=True)


def run(job: tuple[str, ...], seed: int, share: float, kept: Path) -> list[dict]:
    start = time.process_time()
    data, _, _ = prepared()
    plan = phone.budgets(data, share)
    found = [
        {"row": row, "seed": seed, **measured(model)}
        for row, model in students(job, seed, plan, kept)
    ]
    minutes = (time.process_time() - start) / 60
    return [entry | {"minutes": minutes / len(found)} for entry in found]


def summary(runs: list[dict]) -> dict:
    """Intervals over the seeds that have every row, once there are two."""
    of_seed = {}
    for entry in runs:
        of_seed.setdefault(entry["seed"], {})[entry["row"]] = entry
    seeds = [found for found in of_seed.values() if len(found) == len(ROWS)]
    if len(seeds) < 2:
        return {}

    def intervals(values) -> dict:
        return {m: vars(mean_interval([v[m] for v in values])) for m in MEASURES}

    def minus(ours, theirs) -> list[dict]:
        return [{m: s[ours][m] - s[theirs][m] for m in MEASURES} for s in seeds]

    return {
        "seeds": len(seeds),
        "rows": {row: intervals([s[row] for s in seeds]) for row in ROWS},
        "minus": {
            f"{ours} - {theirs}": intervals(minus(ours, theirs))
            for ours, theirs in DIFFERENCES
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="of all the steps")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    data, _, _ = prepared()
    plan, kept = phone.budgets(data, options.share), options.out.with_name(STUDENT)
    settings = {
        "share": options.share,
        "steps": {row: budget.steps for row, budget in plan.items()},
        "further": quarter(plan[phone.DISTILLED]),
        "rate": RATE,
        "test": len(data.test),
    }
    runs, _ = resume(options.out, settings, seeds=options.seeds)
    done = {(r["row"], r["seed"]) for r in runs}
    jobs = [
        (job, seed, options.share, kept)
        for seed in range(options.seeds)
        for job in (QUANTISED, BASELINES)
        if (job[0], seed) not in done
    ]
    student = models.build(data.tokenizer, **phone.STUDENT)
    about = {
        **provenance(
            command_of("phone_students.py", vars(options) | {"workers": None})
        ),
        **settings,
        "bytes": {
            name: {
                "float32": stored_bytes(model),
                **{f"{b} bits": stored_bytes(model, b) for b in BITS},
            }
            for name, model in (("teacher", data.teacher), ("student", student))
        },
        "teacher": {
            "float32": measured(data.teacher, "teacher"),
            **{
                ROUNDED[b]: measured(quantised(data.teacher, b), "teacher")
                for b in BITS
            },
        },
    }
    for found in itertools.chain([[]], runs_of(run, jobs, options.workers)):
        runs += found
        runs.sort(key=lambda r: (r["seed"], ROWS.index(r["row"])))
        minutes = round(sum(r["minutes"] for r in runs), 1)
        result = {**about, "core_minutes": minutes, "runs": runs}
        write_json(options.out, result | summary(runs))
        for entry in found:
            shown = f"exact {entry['exact']:.3f}, kept {entry['accepted']:.3f}"
            print(f"seed {entry['seed']}, {entry['row']}: {shown}", flush=True)


if __name__ == "__main__":
    main()
