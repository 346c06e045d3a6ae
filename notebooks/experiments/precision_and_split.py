"""What 16 bits and a wrong split of the batch cost a student, over paired seeds.

    OMP_NUM_THREADS=1 python notebooks/experiments/precision_and_split.py

Writes notebooks/results/precision_and_split.json. The quickstart's student and data
(kdlib/phone.py), 400 of its 1,100 steps, three seeds. A seed fixes the student's first
weights and the order of its examples. Rows:

    float32           weights, moments and computation in float32, the token mean
    bf16 computation  the same weights under autocast, as kdlib trains on a GPU
    bf16 weights      weights, gradients and moments in bfloat16
    mean of means     float32; a step is split into micro-batches of one example, each
                      divided by its own token count, and the means are averaged. That
                      is the sequence mean, and is computed as such
"""

from __future__ import annotations

import argparse
import random
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from kdlib import models, phone
from kdlib.batching import shuffled
from kdlib.evaluate import evaluate, teacher_reference
from kdlib.gradients import StudentLoss, add_gradient
from kdlib.ledger import command_of, mean_interval, provenance, write_json
from kdlib.objective import Objective
from kdlib.precision import Precision
from kdlib.settings import TrainConfig
from kdlib.teachers import LiveTeacher

RESULT = Path(__file__).parents[1] / "results" / "precision_and_split.json"
FLOAT32, AUTOCAST = "float32", "bf16 computation"
WEIGHTS, MEANS = "bf16 weights", "mean of means"
ROWS = (FLOAT32, AUTOCAST, WEIGHTS, MEANS)
SEEDS, STEPS, TEST = 3, 400, 500
KEYS = ("kl", "exact_match", "agreement")


@cache
def shared():
    """Data, test batches and the teacher's distributions, once a process."""
    torch.set_num_threads(1)
    data = phone.Data()
    test = data.batches(data.test[:TEST])
    return data, test, teacher_reference(LiveTeacher(data.teacher), test)


def trained(row: str, seed: int, steps: int):
    """One loop for all rows: kdlib's refuses weights of 16 bits."""
    data, _, _ = shared()
    config = TrainConfig(
        steps=steps,
        batch_size=phone.CONFIG.batch_size,
        learning_rate=phone.CONFIG.learning_rate,
        seed=seed,
    )
    student = models.build(data.tokenizer, **phone.STUDENT, seed=seed)
    student.to(torch.bfloat16 if row == WEIGHTS else torch.float32).train()
    loss_of = StudentLoss(
        student,
        Objective(reduction="sequence_mean" if row == MEANS else "token_mean"),
        data.cache,
        precision=Precision("bf16" if row == AUTOCAST else "fp32"),
    )
    optimizer = torch.optim.AdamW(
        student.parameters(), betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    order = shuffled(data.unlabelled, config.batch_size, random.Random(seed))
    for step, pairs in zip(range(steps), order, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        add_gradient(loss_of, [data.collator.collate(pairs)])
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return student.float().eval()


def run(job: tuple[str, int, int]) -> dict:
    row, seed, steps = job
    start = time.process_time()
    _, test, reference = shared()
    found = evaluate(trained(row, seed, steps), test, reference)
    return {
        "row": row,
        "seed": seed,
        **{key: getattr(found, key) for key in KEYS},
        "minutes": (time.process_time() - start) / 60,
    }


def summary(runs: list[dict]) -> dict:
    def of(row: str, key: str) -> list[float]:
        mine = sorted((r for r in runs if r["row"] == row), key=lambda r: r["seed"])
        return [r[key] for r in mine]

    def minus(row: str, key: str) -> dict:
        pairs = zip(of(row, key), of(FLOAT32, key), strict=True)
        return vars(mean_interval([a - b for a, b in pairs]))

    return {
        "rows": {r: {k: vars(mean_interval(of(r, k))) for k in KEYS} for r in ROWS},
        "minus_float32": {r: {k: minus(r, k) for k in KEYS} for r in ROWS[1:]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    jobs = [(r, s, options.steps) for s, r in product(range(options.seeds), ROWS)]
    runs = []
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for found in pool.map(run, jobs):
            runs.append(found)
            print(f"{found['row']}, seed {found['seed']}: {found['kl']:.4f}, "
                  f"{found['exact_match']:.3f}", flush=True)  # fmt: skip
    about = provenance(command_of("precision_and_split.py", vars(options)))
    about["device"] = "CPU, one thread a run"
    result = {
        **about,
        "minutes": round(sum(found["minutes"] for found in runs), 1),
        "seeds": options.seeds,
        "steps": options.steps,
        "batch_size": phone.CONFIG.batch_size,
        "learning_rate": phone.CONFIG.learning_rate,
        "test": TEST,
        "runs": [{k: v for k, v in r.items() if k != "minutes"} for r in runs],
        **summary(runs),
    }
    write_json(options.out, result)


if __name__ == "__main__":
    main()
