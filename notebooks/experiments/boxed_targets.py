"""Students of one teacher by what was kept of its distributions, and how sure they are.

    OMP_NUM_THREADS=1 python notebooks/experiments/boxed_targets.py [--workers 12]

Writes notebooks/results/boxed_targets.json after every run, and goes on from it. (For a
short trial: `--share 0.1 --out FILE`.) Runs are independent: the number of workers does
not change a result. The file was made on two x86_64 machines, a part of the runs on
each; "device" and "date" are those of the last go.

The shipped teacher and its student read an input and no instruction (c = c' = nothing).
So the teacher answers in any of six languages, in two forms. One answer was drawn from
it for every unlabelled input, at temperature 1, and all students read these answers.
They differ in the targets at each token, which come from a cache on disk:

    whole distribution     no cache: the teacher is asked at every step
    top 2, renormalised    the two likeliest tokens; both sides renormalised on them
    top 2, zero tail       the sum over the two; the student normalised over all
    top 2, tail bucket     the two, and one bucket for the rest
    2 draws                two tokens drawn from the teacher, counted
    top 12, zero tail; 12 draws    the same with twelve
    hard labels, equal tokens      the answers' own tokens, no teacher

The students have random weights and the quickstart's recipe. Five rows more start as
the teacher's first two layers ("half the teacher"), which put little outside of the
teacher's likely tokens to begin with. A seed fixes weights, order and draws; rows of a
seed are paired. There is no row of equal FLOPs: the teacher computes its distributions
in any case while it writes.

Measured at every token of answers that the teacher drew for the test inputs. The next
token is the teacher's draw, so the chance of a hit is known without drawing it: it is
p_t(v) of the student's favourite v.

    confidence, hits   means of p_s(v) and p_t(v)
    over     confidence minus hits; above zero the student is too sure
    ece      the mean over 15 bins of confidence of |confidence - hits|
    kl       KL(teacher || student), nats a token
    off      the student's mass outside of the teacher's two likeliest tokens
    right    share of 200 greedy answers that are right in some language and form
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch

from kdlib import localize, models, phone
from kdlib.divergences import forward_kl
from kdlib.evaluate import parameter_count, response_logits
from kdlib.ledger import command_of, mean_interval, provenance, resume, write_json
from kdlib.objective import Objective
from kdlib.pairs import EncodedPair, PairCollator, PairedExample
from kdlib.sampling import complete
from kdlib.teachers import CachedTeacher, LiveTeacher, write_cache
from kdlib.train import train

RESULT = Path(__file__).parents[1] / "results" / "boxed_targets.json"
TEACHER, UNTRAINED = "teacher", "untrained"
WHOLE, HARD = "whole distribution", "hard labels, equal tokens"
RENORMALISED, ZERO = "top 2, renormalised", "top 2, zero tail"
BUCKET, DRAWS = "top 2, tail bucket", "2 draws"
ZERO_12, DRAWS_12 = "top 12, zero tail", "12 draws"
BOXES = {  # row -> k, tail
    RENORMALISED: (2, "renormalize"),
    ZERO: (2, "zero"),
    BUCKET: (2, "bucket"),
    DRAWS: (2, "sampled"),
    ZERO_12: (12, "zero"),
    DRAWS_12: (12, "sampled"),
}
HALF = ", half the teacher"
ROWS = (HARD, WHOLE, *BOXES, *(row + HALF for row in (WHOLE, *list(BOXES)[:4])))
LAYERS, HALF_STEPS, HALF_RATE = 2, 250, 1e-3
BINS, ASKED = 15, 200
MEASURES = ("over", "ece", "kl", "confidence", "hits", "off", "right")
DIFFERENCES = (
    *((row, WHOLE) for row in (*BOXES, HARD)),
    *((row, HARD) for row in BOXES),
    *((ZERO, row) for row in (BUCKET, DRAWS)),
    (BUCKET, DRAWS),
    (ZERO_12, DRAWS_12),
    *((row + HALF, WHOLE + HALF) for row in list(BOXES)[:4]),
)

NOTE = (
    "Runs may come from several machines, and several goes: each has its own minutes "
    "of a core. They are independent."
)


class Task:
    """The teacher, the answers that it drew, and its logits on the test answers."""

    def __init__(self, written=None, heard=None, share: float = 1.0):
        torch.set_num_threads(1)
        models.quiet_transformers()
        self.share = share
        self.model, self.tokenizer = models.load("teacher")
        self.collator = PairCollator(
            self.tokenizer, teacher_max_length=128, student_max_length=128
        )
        self.written = written or self.write("unlabelled", share)
        self.heard = heard or self.write("test", share)
        self.batches = [
            self.collator.collate(self.heard[i : i + 250])
            for i in range(0, len(self.heard), 250)
        ]
        live = LiveTeacher(self.model)
        self.logits = torch.cat([live.targets(batch) for batch in self.batches])
        self.live = live

    def encode(self, english: str, answer: str, number: int) -> EncodedPair:
        return self.collator.encode(PairedExample(english, answer), number)

    def write(self, split: str, share: float) -> list[EncodedPair]:
        """One answer to each input, drawn from the teacher."""
        data = localize.load_split(split)
        data = data[: max(64, round(share * len(data)))]
        asked = [self.encode(d.english, "?", i) for i, d in enumerate(data)]
        answers = complete(
            self.model,
            self.tokenizer,
            [pair.teacher_prompt_ids for pair in asked],
            max_new_tokens=40,
            temperature=1.0,
            seeds=[f"{split} {i}" for i in range(len(asked))],
            keep_end=True,
        )
        return [
            replace(pair, response_ids=ids)
            for pair, ids in zip(asked, answers, strict=True)
        ]

    def start(self, row: str, seed: int):
        if row.endswith(HALF):
            return models.first_layers(self.model, LAYERS)
        return models.build(self.tokenizer, **phone.STUDENT, seed=seed)

    def config(self, row: str, seed: int):
        found = replace(phone.CONFIG, seed=seed)
        if row.endswith(HALF):
            found = replace(found, steps=HALF_STEPS, learning_rate=HALF_RATE)
        return replace(found, steps=max(2, round(self.share * found.steps)))

    def trained(self, row: str, seed: int):
        student, kind = self.start(row, seed), row.removesuffix(HALF)
        config, pairs = self.config(row, seed), self.written
        if kind == HARD:
            objective = Objective(hard_weight=1.0)
            train(student, pairs, self.collator, objective, config)
            return student, None
        if kind == WHOLE:
            train(student, pairs, self.collator, Objective(), config, teacher=self.live)
            return student, None
        k, tail = BOXES[kind]
        batches = (
            self.collator.collate(pairs[i : i + 100]) for i in range(0, len(pairs), 100)
        )
        with tempfile.TemporaryDirectory() as folder:
            path = write_cache(
                Path(folder) / "box.safetensors",
                self.live,
                batches,
                self.tokenizer,
                k=k,
                tail=tail,
                seed=seed,
            )
            box = CachedTeacher(path, self.tokenizer, teacher=self.live)
            train(student, pairs, self.collator, Objective(), config, teacher=box)
            tokens = sum(len(pair.response_ids) for pair in pairs)
            return student, path.stat().st_size / tokens

    @torch.no_grad()
    def measured(self, logits) -> dict:
        """Everything that is read off the logits at the heard tokens."""
        p_t, p_s = self.logits.double().softmax(-1), logits.double().softmax(-1)
        confidence, favourite = p_s.max(-1)
        hits = p_t.gather(-1, favourite[:, None])[:, 0]
        two = p_t.topk(2).indices
        bins = binned(confidence, hits)
        gaps = [n * abs(c - h) for n, c, h in bins]
        return {
            "over": (confidence - hits).mean().item(),
            "ece": sum(gaps) / len(hits),
            "kl": forward_kl(logits.double(), self.logits.double()).mean().item(),
            "confidence": confidence.mean().item(),
            "hits": hits.mean().item(),
            "off": (1 - p_s.gather(-1, two).sum(-1)).mean().item(),
            "bins": [[n, round(c, 4), round(h, 4)] for n, c, h in bins],
        }

    def right(self, model) -> float:
        """Share of greedy answers that are right in some language and form."""
        data = localize.load_split("test")[:: max(1, 1000 // ASKED)][:ASKED]
        prompts = [self.encode(d.english, "?", 0).student_prompt_ids for d in data]
        said = complete(model, self.tokenizer, prompts, max_new_tokens=40)
        texts = [self.tokenizer.decode(ids) for ids in said]
        found = [t in d.renderings for t, d in zip(texts, data, strict=True)]
        return sum(found) / len(found)

    def whole_row(self, model) -> dict:
        parts = [response_logits(model, batch) for batch in self.batches]
        return {**self.measured(torch.cat(parts)), "right": self.right(model)}


def binned(confidence, hits) -> list[tuple[int, float, float]]:
    """For each bin of confidence that holds a token: count, and both means."""
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    found = []
    for b in range(BINS):
        mine = place == b
        if mine.any():
            means = confidence[mine].mean().item(), hits[mine].mean().item()
            found.append((int(mine.sum()), *means))
    return found


# --- Runs, in as many processes as one likes ---

_task: Task | None = None


def prepare(written, heard, share: float) -> None:
    global _task
    _task = Task(written, heard, share)


def run(row: str, seed: int) -> dict:
    begun = time.process_time()
    student, bytes_per_token = _task.trained(row, seed)
    found = {"row": row, "seed": seed, **_task.whole_row(student)}
    found["bytes_per_token"] = bytes_per_token
    found["minutes"] = (time.process_time() - begun) / 60
    return found


def summary(runs: list[dict], seeds: int) -> dict:
    """Intervals over the seeds, once every row has all of them, at least two."""
    of = {
        row: sorted((r for r in runs if r["row"] == row), key=lambda r: r["seed"])
        for row in ROWS
    }
    if seeds < 2 or any(len(found) != seeds for found in of.values()):
        return {}

    def minus(ours, theirs, name):
        pairs = zip(of[ours], of[theirs], strict=True)
        return vars(mean_interval([a[name] - b[name] for a, b in pairs]))

    return {
        "rows": {
            row: {m: vars(mean_interval([r[m] for r in of[row]])) for m in MEASURES}
            for row in ROWS
        },
        "minus": {
            f"{ours} - {theirs}": {m: minus(ours, theirs, m) for m in MEASURES}
            for ours, theirs in DIFFERENCES
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--share", type=float, default=1.0, help="of inputs and of steps"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    task = Task(share=arguments.share)
    fixed = {TEACHER: task.whole_row(task.model)}
    fixed |= {UNTRAINED: task.whole_row(task.start(WHOLE, 0))}
    fixed |= {UNTRAINED + HALF: task.whole_row(task.start(WHOLE + HALF, 0))}
    p_t = task.logits.double().softmax(-1).sort(-1, descending=True).values
    kept = {k: p_t[:, :k].sum(-1).mean().item() for k in (1, 2, 4, 8, 12)}
    settings = {
        "parameters": {
            TEACHER: parameter_count(task.model),
            UNTRAINED: parameter_count(task.start(WHOLE, 0)),
            UNTRAINED + HALF: parameter_count(task.start(WHOLE + HALF, 0)),
        },
        "settings": {
            row: {
                "steps": task.config(row, 0).steps,
                "learning_rate": task.config(row, 0).learning_rate,
            }
            for row in (WHOLE, WHOLE + HALF)
        },
        "batch_size": phone.CONFIG.batch_size,
        "inputs": len(task.written),
        "test": len(task.heard),
        "test_tokens": len(task.logits),
    }
    runs, _ = resume(arguments.out, settings, seeds=arguments.seeds)

    def save() -> None:
        result = {
            **provenance(command_of("boxed_targets.py", vars(arguments))),
            "note": NOTE,
            "core_minutes": round(sum(r["minutes"] for r in runs), 1),
            **settings,
            "teacher_mass": kept,
            "seeds": arguments.seeds,
            "fixed": fixed,
            "runs": runs,
            **summary(runs, arguments.seeds),
        }
        write_json(arguments.out, result)

    save()
    done = {(r["row"], r["seed"]) for r in runs}
    todo = [
        (row, seed)
        for seed in range(arguments.seeds)
        for row in ROWS
        if (row, seed) not in done
    ]
    with ProcessPoolExecutor(
        arguments.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=prepare,
        initargs=(task.written, task.heard, arguments.share),
    ) as pool:
        for found in as_completed([pool.submit(run, *what) for what in todo]):
            runs.append(found.result())
            runs.sort(key=lambda r: (r["seed"], ROWS.index(r["row"])))
            save()
            last = found.result()
            shown = ", ".join(f"{m} {last[m]:.3f}" for m in MEASURES)
            print(f"seed {last['seed']}, {last['row']}: {shown}", flush=True)


if __name__ == "__main__":
    main()
