"""Chapter 9's patients: students trained by broken steps of doctor_zoo.py.

    OMP_NUM_THREADS=1 python notebooks/experiments/clinic.py [--seeds 5] [--workers N]

Writes notebooks/results/clinic.json, and goes on from the runs that it has. (For a
short trial: `--share 0.1 --tests 8 --out FILE`.)

Every patient is a fault of the zoo that was seen in the field. The student has the
first three of the shipped teacher's four layers. It is trained for 64 steps of 8 French
examples with the loss, the batch or the teacher that the fault makes; a healthy row
beside it has the same objective, data, order and seed, and no fault. `plain` patients
read what the teacher reads, without a context; for all others the teacher alone reads
the instruction.

    loss    what the broken code reports, each step
    kl      KL(teacher || student) per response token on 64 test inputs, whatever the
            loss; the teacher reads its whole context
    exact   share of these inputs that are answered exactly, end token and all
    first, end   share of answers whose first token, or whose end, is the likeliest
    entropy_gap  H(p_s) - H(p_t), mean over the tokens, in nats
    norm    the gradient's norm before it is clipped at 1, median over the steps
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import doctor_zoo as zoo
import torch

from kdlib import localize, models
from kdlib.evaluate import evaluate, response_logits
from kdlib.gradients import StudentLoss
from kdlib.ledger import (
    command_of,
    mean_interval,
    provenance,
    resume,
    write_json,
)
from kdlib.objective import Objective
from kdlib.teachers import LiveTeacher

RESULT = Path(__file__).parents[1] / "results" / "clinic.json"
STEPS, BATCH, RATE, WARMUP, TESTS, LAYERS = 64, 8, 1e-3, 6, 64, 3


@dataclass(frozen=True)
class Row:
    """fault:   its name in the zoo; None for a healthy row
    healthy: the row to compare with
    """

    fault: str | None
    healthy: str
    objective: Objective
    plain: bool = False


HEALTHY = {
    "healthy": Row(None, "healthy", Objective()),
    "healthy, T = 2": Row(None, "healthy, T = 2", Objective(temperature=2.0)),
    "healthy, plain": Row(None, "healthy, plain", Objective(temperature=2.0), True),
    "healthy, hard labels too": Row(None, "healthy, hard labels too", zoo.MIXED),
    "healthy, reverse KL": Row(None, "healthy, reverse KL", Objective("reverse_kl")),
}
PATIENTS = {
    "padding masked by id, pad = eos": "healthy",
    "mask from ids that are never -100": "healthy",
    "rows paired by count": "healthy, T = 2",
    "the student's template for the teacher": "healthy",
    "teacher's prompt without the mark of an answer": "healthy",
    "teacher's prompt cut on the left by other code": "healthy",
    "padding copied into the response": "healthy",
    "log-probabilities clamped at -10": "healthy",
    "the student filled up with 0": "healthy",
    "exp, then log": "healthy",
    "the mask on logits that are not shifted": "healthy, T = 2",
    "logits sliced at the response": "healthy, T = 2",
    "torch's mean": "healthy, T = 2",
    "means of micro-batches added": "healthy, T = 2",
    "arguments swapped": "healthy, T = 2",
    "JSD by default": "healthy, T = 2",
    "the temperature is not passed on": "healthy, T = 2",
    "softmax for log_softmax": "healthy, T = 2",
    "both sides renormalised on the top k": "healthy, T = 2",
    "forward KL cut off after the top k": "healthy, T = 2",
    "neither mask nor shift": "healthy, plain",
    "T^2 left out beside hard labels": "healthy, hard labels too",
    "the soft term is computed and not added": "healthy, hard labels too",
    "k3 back-propagated": "healthy, reverse KL",
}
ROWS = HEALTHY | {
    name: replace(HEALTHY[other], fault=name) for name, other in PATIENTS.items()
}
MEASURES = ("kl", "exact", "agreement", "first", "end", "entropy_gap")


class Bench(zoo.Bench):
    """The zoo's, with other examples for each step and a student that is trained."""

    def __init__(self, of: zoo.Bench, examples, student):
        self.teacher, self.tokenizer = of.teacher, of.tokenizer
        self.collator = of.collator
        self.examples, self.student = examples, student


def fault(name: str) -> zoo.Case:
    return next(case for case in zoo.FAULTS if case.name == name)


def prepared(bench: Bench, row: Row) -> dict:
    """The arguments of examine_batch: of the fault, or of the same without it."""
    if row.fault is not None:
        return fault(row.fault).make(bench)
    batch = bench.plain if row.plain else bench.batch
    return bench.whole(objective=row.objective, batch=batch)


def step_loss(case: dict, student):
    batch, objective = case["batch"], case["objective"]
    if "loss" in case:
        return case["loss"](student, batch)
    return StudentLoss(student, objective, case["teacher"])(batch, None)[0].total


class Ward:
    """The teacher, the training examples, and the test inputs with their targets."""

    def __init__(self, n: int):
        self.bench = zoo.Bench()
        settings = {"locales": ["fr"], "formats": ["long"]}
        self.rows = localize.examples("train", limit=STEPS * BATCH, **settings)
        tests = localize.examples("test", limit=n, **settings)
        bare = [replace(row, context="") for row in tests]
        live = LiveTeacher(self.bench.teacher)
        self.tests = {}
        for plain, rows in ((False, tests), (True, bare)):
            batch = self.bench.collator(rows)
            self.tests[plain] = batch, live.targets(batch)

    @torch.no_grad()
    def measured(self, student, plain: bool) -> dict[str, float]:
        batch, targets = self.tests[plain]
        score = evaluate(student, [batch], [targets])
        logits = response_logits(student, batch, "student")
        right = logits.argmax(-1) == batch.response_ids
        last = batch.row_ids.diff(append=torch.tensor([-1])) != 0
        first = batch.row_ids.diff(prepend=torch.tensor([-1])) != 0
        gap = _entropy(logits) - _entropy(targets)
        return {
            "kl": score.kl,
            "exact": score.exact_match,
            "agreement": score.agreement,
            "first": right[first].double().mean().item(),
            "end": right[last].double().mean().item(),
            "entropy_gap": gap.mean().item(),
        }


def _entropy(logits):
    log_p = logits.double().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def trained(ward: Ward, name: str, seed: int, share: float) -> dict:
    row, steps = ROWS[name], max(2, round(share * STEPS))
    student = models.first_layers(ward.bench.teacher, LAYERS).requires_grad_(True)
    order = random.Random(seed).sample(range(len(ward.rows)), len(ward.rows))
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.01)
    losses, norms, curve = [], [], []
    for step in range(steps):
        if step % 8 == 0:
            curve.append({"step": step, **ward.measured(student, row.plain)})
        some = [ward.rows[i] for i in order[step * BATCH : (step + 1) * BATCH]]
        case = prepared(Bench(ward.bench, some, student), row)
        loss = step_loss(case, student)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
        if not math.isfinite(losses[-1]):
            break  # every weight is NaN now
    curve.append({"step": steps, **ward.measured(student, row.plain)})
    return {
        "row": name,
        "seed": seed,
        "loss": [_number(x) for x in losses],
        "norm": _number(statistics.median(norms)),
        "curve": [{k: _number(v) for k, v in point.items()} for point in curve],
        **{m: _number(curve[-1][m]) for m in MEASURES},
    }


def _number(x):
    """Four digits, and null for NaN, which JSON has not."""
    return float(f"{x:.4g}") if math.isfinite(x) else None


_ward: Ward | None = None


def job(arguments) -> dict:
    """One run, in a process that keeps its ward."""
    name, seed, share, tests = arguments
    global _ward
    torch.set_num_threads(1)
    models.quiet_transformers()
    begin = time.process_time()
    _ward = _ward or Ward(tests)
    found = trained(_ward, name, seed, share)
    return {**found, "minutes": round((time.process_time() - begin) / 60, 3)}


def summary(runs: list[dict], seeds: int) -> dict:
    """Intervals over the seeds: of each row, and of each patient minus its healthy."""
    of = {name: [r for r in runs if r["row"] == name] for name in ROWS}
    if seeds < 2 or any(len(found) != seeds for found in of.values()):
        return {}

    def interval(values):
        return None if None in values else vars(mean_interval(values))

    minus = {}
    for name, other in PATIENTS.items():
        pairs = list(zip(of[name], of[other], strict=True))
        minus[name] = {
            m: interval([None if a[m] is None else a[m] - b[m] for a, b in pairs])
            for m in MEASURES
        }
    rows = {
        name: {m: interval([r[m] for r in of[name]]) for m in MEASURES} for name in ROWS
    }
    return {"rows": rows, "minus": minus}


def compact(run: dict) -> dict:
    """Losses and curves of the first seed alone: one is looked at, all are counted."""
    long = ("loss", "curve") if run["seed"] else ()
    return {k: v for k, v in run.items() if k not in long}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps")
    parser.add_argument("--tests", type=int, default=TESTS, help="inputs of the test")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {
        "steps": max(2, round(arguments.share * STEPS)),
        "batch_size": BATCH,
        "learning_rate": RATE,
        "warmup": WARMUP,
        "layers": LAYERS,
        "tests": arguments.tests,
        "patients": patients(),
    }
    runs, minutes = resume(arguments.out, settings, seeds=arguments.seeds)
    done = {(run["row"], run["seed"]) for run in runs}
    jobs = [
        (name, seed, arguments.share, arguments.tests)
        for seed in range(arguments.seeds)
        for name in ROWS
        if (name, seed) not in done
    ]
    about = {
        **provenance(command_of("clinic.py", vars(arguments))),
        **settings,
        "seeds": arguments.seeds,
    }
    order = list(ROWS)
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        for run in pool.map(job, jobs):
            minutes += run.pop("minutes")
            runs.append(compact(run))
            runs.sort(key=lambda r: (r["seed"], order.index(r["row"])))
            result = {**about, "core_minutes": round(minutes, 1), "runs": runs}
            write_json(arguments.out, result | summary(runs, arguments.seeds))
            shown = {k: run[k] for k in ("kl", "exact", "first", "end", "norm")}
            print(f"seed {run['seed']}, {run['row']}: {json.dumps(shown)}", flush=True)


def patients() -> dict:
    """Where each patient was seen, its healthy row, and the causes to be named."""
    return {
        name: {
            "seen": fault(name).seen,
            "healthy": other,
            "expected": sorted(fault(name).expected),
        }
        for name, other in PATIENTS.items()
    }


if __name__ == "__main__":
    main()
