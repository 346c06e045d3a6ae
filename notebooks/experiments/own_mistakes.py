"""Whose prefixes, which divergence: nine ways to train on from one student.

    OMP_NUM_THREADS=1 python notebooks/experiments/own_mistakes.py [--workers 12]

Writes notebooks/results/own_mistakes.json, and goes on from it: a finished run is not
repeated. (For a short trial: `--seeds 2 --share 0.1 --out FILE`.) Runs are spread over
`--workers` processes with one thread each; the numbers do not depend on how many.

The teacher is that of torn_teacher.py: it reads a list and a worked example that fits
six languages, and answers in one of the six. Its student has half of its layers and
reads the list alone. Up to three seeds were seen before the plan was fixed; they are
reported with the others. The plan:

Every seed warms a student up: WARM_STEPS of forward KL on answers that the teacher drew
at temperature 1. From there each row trains for STEPS more, on as many answers a step:

    hard labels, equal tokens   cross-entropy with the teacher's drawn answers
    hard labels, equal FLOPs    the same for as many FLOPs as an on-policy row costs:
                                its student's writing and its teacher's reading counted
    sequence-level              cross-entropy with the teacher's best answers, found by
                                beam search (Kim & Rush 2016)
    forward KL                  from the teacher's distributions on its drawn answers
    reverse KL                  the same answers, the other direction
    on-policy forward KL        lmbda 1: on answers that the student draws itself
    on-policy reverse KL        lmbda 1
    half on-policy reverse KL   lmbda 0.5
    cold on-policy reverse KL   from the teacher's first layers, without the warm-up,
                                for WARM_STEPS + STEPS

All rows of a seed are paired: one warm student, one order of examples. Measured on the
test lists:

    valid, languages   exact: how likely a drawn answer is right in some language, and
                       exp of the entropy of the right answers' shares
    greedy             share of lists whose greedy answer is right
    beam               beam search's (only where the two kinds of label are compared)
    teacher_prefixes   KL(teacher || student) and KL(student || teacher) per token, by
    own_prefixes       place, on answers that the teacher drew, and the student itself
    exposure           forward KL on own prefixes minus the teacher's prefixes

What would count against the chapter: exposure that does not differ from zero; a beam
that helps the sequence-level student as much as that of hard labels; on-policy rows no
better than the same divergence on the teacher's answers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torn_teacher import (
    ANSWERS,
    COOLED,
    HALF,
    LAYERS,
    TEACHER,
    Torn,
    answers_of,
    logits_of,
)

from kdlib import localize, models, phone
from kdlib.divergences import forward_kl, reverse_kl
from kdlib.evaluate import parameter_count
from kdlib.ledger import command_of, mean_interval, provenance, resume, write_json
from kdlib.objective import Objective
from kdlib.on_policy import write_responses
from kdlib.sampling import Pick, as_writer
from kdlib.teachers import LiveTeacher
from kdlib.train import train

RESULT = Path(__file__).parents[1] / "results" / "own_mistakes.json"
WARM_STEPS, STEPS, RATE = 250, 150, 1e-3
BEAMS, NEW_TOKENS, DRAWS = 5, 48, 4
PLACES = 20
WARM = "warm student"
HARD, FLOPS = "hard labels, equal tokens", "hard labels, equal FLOPs"
SEQUENCE = "sequence-level"
FORWARD, REVERSE = "forward KL", "reverse KL"
OWN_FORWARD, OWN_REVERSE = "on-policy forward KL", "on-policy reverse KL"
HALF_OWN, COLD = "half on-policy reverse KL", "cold on-policy reverse KL"
ROWS = (
    HARD,
    FLOPS,
    SEQUENCE,
    FORWARD,
    REVERSE,
    OWN_FORWARD,
    OWN_REVERSE,
    HALF_OWN,
    COLD,
)
LMBDA = {OWN_FORWARD: 1.0, OWN_REVERSE: 1.0, HALF_OWN: 0.5, COLD: 1.0}
LABELS = (HARD, FLOPS, SEQUENCE)
MEASURES = (
    "valid",
    "languages",
    "greedy",
    "forward_kl",
    "reverse_kl",
    "own_forward_kl",
    "own_reverse_kl",
    "exposure",
)
BEAM_MEASURES = ("beam", "beam_gain")
BEAMED = (WARM, HARD, SEQUENCE)
DIFFERENCES = (
    (SEQUENCE, HARD),
    (HARD, SEQUENCE),
    (FORWARD, HARD),
    (OWN_FORWARD, FORWARD),
    (OWN_REVERSE, REVERSE),
    (OWN_REVERSE, OWN_FORWARD),
    (OWN_REVERSE, FORWARD),
    (OWN_REVERSE, SEQUENCE),
    (OWN_REVERSE, HARD),
    (OWN_REVERSE, FLOPS),
    (OWN_REVERSE, HALF_OWN),
    (OWN_REVERSE, COLD),
    (REVERSE, FORWARD),
)


@torch.no_grad()
def beam_search(model, tokenizer, prompts: list[list[int]], size: int = 64):
    """The likeliest answer that a beam of BEAMS finds, by the sum of log-probs."""
    end, found = tokenizer.eos_token_id, [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with as_writer(model):
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            width = max(len(prompts[i]) for i in chosen)
            rows = [[end] * (width - len(prompts[i])) + prompts[i] for i in chosen]
            mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i])
                    for i in chosen]  # fmt: skip
            answers = model.generate(
                input_ids=torch.tensor(rows),
                attention_mask=torch.tensor(mask),
                logits_processor=[Pick(0.0, [], len(tokenizer))],
                do_sample=False,
                num_beams=BEAMS,
                length_penalty=0.0,  # the sum itself, whatever the length
                max_new_tokens=NEW_TOKENS,
                eos_token_id=end,
                pad_token_id=end,
            )
            for i, ids in zip(chosen, answers[:, width:].tolist(), strict=True):
                found[i] = ids[: ids.index(end) + 1] if end in ids else ids
    return found


class World(Torn):
    """The torn teacher with its best answers, and what counts as right."""

    def __init__(self, inputs: int | None = None, best: list[list[int]] | None = None):
        super().__init__(inputs)
        data = localize.load_split("unlabelled", kinds=["list"])[:inputs]
        asked = [self.encode(d.english, "?", i) for i, d in enumerate(data)]
        prompts = [list(pair.teacher_prompt_ids) for pair in asked]
        self.best_ids = best or beam_search(self.model, self.tokenizer, prompts)
        self.best = [
            replace(pair, response_ids=ids)
            for pair, ids in zip(asked, self.best_ids, strict=True)
        ]
        self.live = LiveTeacher(self.model)
        tests = localize.load_split("test", kinds=["list"])[:inputs]
        self.heard = self.heard[: ANSWERS * len(tests)]
        self.right = [pair for pair in self.right if pair.example_id < len(tests)]
        self.asked = [self.encode(d.english, "?", i) for i, d in enumerate(tests)]
        self.answers = [set() for _ in tests]
        for pair in self.right:
            self.answers[pair.example_id].add(tuple(pair.response_ids))

    def share_right(self, answers: list[list[int]]) -> float:
        hits = [tuple(a) in s for a, s in zip(answers, self.answers, strict=True)]
        return sum(hits) / len(hits)


def by_place(world: World, model, pairs) -> dict:
    """Both KLs, student against teacher, per token and at each place of an answer."""
    batch = world.collator.collate(pairs)
    pair = logits_of(model, batch, "student"), world.live.targets(batch)
    rows = batch.row_ids
    first = torch.zeros(int(rows.max()) + 1, dtype=torch.long)
    first = first.index_add(0, rows, torch.ones_like(rows)).cumsum(0)
    first = torch.cat([torch.zeros(1, dtype=torch.long), first[:-1]])
    place = torch.arange(len(rows)) - first[rows]
    found = {}
    for name, divergence in (("forward_kl", forward_kl), ("reverse_kl", reverse_kl)):
        each = divergence(*pair).double()
        found[name] = each.mean().item()
        found[f"{name}_by_place"] = [
            round(each[place == t].mean().item(), 5) if (place == t).any() else None
            for t in range(PLACES)
        ]
    found["answers_at"] = [(place == t).sum().item() for t in range(PLACES)]
    return found


def measured(model, world: World, side: str = "student", beam: bool = True) -> dict:
    model.eval()
    batch = world.collator.collate(world.right)
    logits = logits_of(model, batch, side)
    found = answers_of(world, batch, logits, 1.0)
    found["cooled"] = {str(t): answers_of(world, batch, logits, t) for t in COOLED}
    prompts = [list(getattr(pair, f"{side}_prompt_ids")) for pair in world.asked]
    # Each draw needs a number of its own: it is the seed of what is drawn.
    again = [replace(p, example_id=n * 1000 + p.example_id)
             for n in range(DRAWS) for p in world.asked]  # fmt: skip
    greedy, drawn = (
        write_responses(model, pairs, world.collator, side=side,
                        max_new_tokens=NEW_TOKENS, temperature=t, seed="own")
        for pairs, t in ((world.asked, 0.0), (again, 1.0))
    )  # fmt: skip
    found["greedy"] = world.share_right([p.response_ids for p in greedy])
    if beam:
        found["beam"] = world.share_right(beam_search(model, world.tokenizer, prompts))
        found["beam_gain"] = found["beam"] - found["greedy"]
    if side == "student":
        found["teacher_prefixes"] = by_place(world, model, world.heard)
        found["own_prefixes"] = by_place(world, model, drawn)
        for name in ("forward_kl", "reverse_kl"):
            found[name] = found["teacher_prefixes"][name]
            found[f"own_{name}"] = found["own_prefixes"][name]
        found["exposure"] = found["own_forward_kl"] - found["forward_kl"]
    return found


def steps_of(row: str, share: float, world: World) -> int:
    """An on-policy step: 6 P_s to train, 2 P_s to write, 2 P_t to read, a token."""
    steps = {COLD: WARM_STEPS + STEPS}.get(row, STEPS)
    if row == FLOPS:
        student = parameter_count(models.first_layers(world.model, LAYERS))
        extra = 2 * student + 2 * parameter_count(world.model)
        steps *= 1 + extra / (6 * student)
    return max(1, round(share * steps))


def config(row: str, seed: int, share: float, world: World):
    return replace(
        phone.CONFIG,
        steps=steps_of(row, share, world),
        learning_rate=RATE,
        seed=seed,
        lmbda=LMBDA.get(row, 0.0),
        max_new_tokens=NEW_TOKENS,
    )


def warmed(world: World, seed: int, share: float):
    student = models.first_layers(world.model, LAYERS)
    steps = max(1, round(share * WARM_STEPS))
    settings = replace(phone.CONFIG, steps=steps, learning_rate=RATE, seed=1000 + seed)
    train(student, world.written, world.collator, Objective("forward_kl"), settings,
          teacher=world.teacher)  # fmt: skip
    return student


def trained(world: World, row: str, seed: int, share: float, warm):
    student = models.first_layers(world.model, LAYERS)
    if row != COLD:
        student.load_state_dict(warm)
    name = "forward_kl" if row in (FORWARD, OWN_FORWARD) else "reverse_kl"
    objective = Objective(hard_weight=1.0) if row in LABELS else Objective(name)
    teacher = None if row in LABELS else world.teacher
    if row in LMBDA:
        teacher = world.live
    pairs = world.best if row == SEQUENCE else world.written
    settings = config(row, seed, share, world)
    train(student, pairs, world.collator, objective, settings, teacher=teacher)
    return student


# --- one process, several ------------------------------------------------------------

WORLD: World | None = None


def begin(inputs: int | None, best=None) -> None:
    global WORLD
    torch.set_num_threads(1)
    models.quiet_transformers()
    WORLD = WORLD or World(inputs, best)


def work(task) -> dict:
    """One run. Warm students are kept as files, so that every row has the same."""
    row, seed, share, folder = task
    start, path = time.process_time(), Path(folder) / f"warm-{seed}.pt"
    if row == WARM:
        student = warmed(WORLD, seed, share)
        torch.save(student.state_dict(), path)
    else:
        warm = None if row == COLD else torch.load(path, weights_only=True)
        student = trained(WORLD, row, seed, share, warm)
    found = {"row": row, "seed": seed, **measured(student, WORLD, beam=row in BEAMED)}
    found["core_seconds"] = round(time.process_time() - start, 1)
    return found


def summary(runs: list[dict], seeds: int) -> dict:
    """Intervals over the seeds, once every row has all of them, at least two."""
    of = {
        row: sorted((r for r in runs if r["row"] == row), key=lambda r: r["seed"])
        for row in (WARM, *ROWS)
    }
    if seeds < 2 or any(len(found) != seeds for found in of.values()):
        return {}

    def minus(ours, theirs, name):
        pairs = zip(of[ours], of[theirs], strict=True)
        return vars(mean_interval([a[name] - b[name] for a, b in pairs]))

    def measures(*rows):
        return MEASURES + (BEAM_MEASURES if set(rows) <= set(BEAMED) else ())

    return {
        "rows": {
            row: {m: vars(mean_interval([r[m] for r in found])) for m in measures(row)}
            for row, found in of.items()
        },
        "minus": {
            f"{ours} - {theirs}": {
                m: minus(ours, theirs, m) for m in measures(ours, theirs)
            }
            for ours, theirs in DIFFERENCES
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps")
    parser.add_argument(
        "--inputs", type=int, help="lists to train on, and to test on; all by default"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    begin(arguments.inputs)
    world, seeds, share = WORLD, arguments.seeds, arguments.share
    half = models.first_layers(world.model, LAYERS)
    settings = {
        "parameters": {
            TEACHER: parameter_count(world.model),
            HALF: parameter_count(half),
        },
        "settings": {
            "warm steps": max(1, round(share * WARM_STEPS)),
            "steps": {row: steps_of(row, share, world) for row in ROWS},
            "learning_rate": RATE,
            "batch_size": phone.CONFIG.batch_size,
            "beams": BEAMS,
            "draws": DRAWS,
        },
        "answers": len(world.written),
        "test": len(world.asked),
    }
    runs, _ = resume(arguments.out, settings, seeds=seeds)
    fixed = {
        TEACHER: measured(world.model, world, "teacher"),
        HALF: measured(half, world),
    }

    def save() -> None:
        runs.sort(key=lambda r: (r["seed"], (WARM, *ROWS).index(r["row"])))
        result = {
            **provenance(command_of("own_mistakes.py", vars(arguments))),
            "core_minutes": round(sum(r["core_seconds"] for r in runs) / 60, 1),
            **settings,
            "seeds": seeds,
            "fixed": fixed,
            "runs": runs,
            **summary(runs, seeds),
        }
        write_json(arguments.out, result)

    done = {(r["row"], r["seed"]) for r in runs}

    def spread(tasks, pool) -> None:
        for found in pool.imap_unordered(work, tasks) if pool else map(work, tasks):
            if (found["row"], found["seed"]) not in done:
                runs.append(found)
            save()
            shown = ", ".join(f"{m} {found[m]:.3f}" for m in MEASURES)
            print(f"seed {found['seed']}, {found['row']}: {shown}", flush=True)

    open_rows = [(row, s) for s in range(seeds) for row in ROWS if (row, s) not in done]
    # The long ones first, so that no process waits for the last of them.
    open_rows.sort(key=lambda task: task[0] not in LMBDA)
    pool = None
    with tempfile.TemporaryDirectory() as folder:
        if arguments.workers > 1:
            context = multiprocessing.get_context("spawn")
            pool = context.Pool(
                arguments.workers, begin, (arguments.inputs, world.best_ids)
            )
        needed = {seed for _, seed in open_rows} | {
            seed for seed in range(seeds) if (WARM, seed) not in done
        }
        warm = [(WARM, seed, share, folder) for seed in sorted(needed)]
        spread(warm, pool)
        spread([(row, s, share, folder) for row, s in open_rows], pool)
        if pool:
            pool.close()
            pool.join()
    save()


if __name__ == "__main__":
    main()
