"""What a student learns of the tokens that its teacher nearly wrote, over paired seeds.

    OMP_NUM_THREADS=1 python notebooks/experiments/dark_knowledge.py [--seeds 3]

Writes notebooks/results/dark_knowledge.json after every run, and goes on from it.

A French answer and another locale's answer to the same input begin with the same tokens
and part at one position, a fork. There the other locale's next token is a wrong one
with a meaning. The forks are those of the test split, and every model is asked for its
log-probability of the wrong token: the teacher after (c, z), a student after z.

    correlation  of the student's log-probabilities with the teacher's, over the forks
    gap          mean of the student's log-probability minus the teacher's, in nats
    kl           KL(teacher || student) a token, over all positions of the test split
    example      log-probabilities of the six locales' first tokens for one input

The recipe is the quickstart's (kdlib/phone.py), and so are its rows. One is added:

    teacher's answers  its answers to the same 6,000 inputs as labels, without its
                       distributions

No student reads another language than French. A seed fixes a student's first weights
and the order of its examples; differences are taken seed by seed.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import replace
from pathlib import Path

import torch

from kdlib import localize, models, phone
from kdlib.evaluate import evaluate, teacher_reference
from kdlib.ledger import command_of, mean_interval, provenance, resume, write_json
from kdlib.objective import Objective
from kdlib.teachers import LiveTeacher
from kdlib.train import train

RESULT = Path(__file__).parents[1] / "results" / "dark_knowledge.json"
ANSWERS = "teacher's answers"
ROWS = (
    phone.UNTRAINED,
    phone.HARD_TOKENS,
    phone.HARD_FLOPS,
    phone.DISTILLED,
    ANSWERS,
)
MEASURES = ("correlation", "gap", "kl", "exact_match")
EXAMPLE = "Spanish (Portugal)"


def forks(data: phone.Data) -> list[tuple[int, int]]:
    """(response token's number in the test split, another locale's token there)."""
    found, begin = set(), 0
    split = localize.load_split("test")
    for datum, pair in zip(split, data.test, strict=True):
        answer = pair.response_ids
        for locale in localize.LOCALES:
            text = datum.rendering(locale, phone.FORM)
            other = data.tokenizer(text, add_special_tokens=False)["input_ids"]
            other.append(data.tokenizer.eos_token_id)
            for place, (ours, theirs) in enumerate(zip(answer, other, strict=False)):
                if ours != theirs:
                    found.add((begin + place, theirs))
                    break
        begin += len(answer)
    return sorted(found)


def example(data: phone.Data) -> tuple[int, dict[str, int]]:
    """The number of the example's first token, and the locales' tokens there."""
    split = localize.load_split("test")
    row = [datum.english for datum in split].index(EXAMPLE)
    answers = [split[row].rendering(locale, phone.FORM) for locale in localize.LOCALES]
    ids = [data.tokenizer(a, add_special_tokens=False)["input_ids"][0] for a in answers]
    begin = sum(len(pair.response_ids) for pair in data.test[:row])
    return begin, {data.tokenizer.decode([i]): i for i in ids}


@torch.no_grad()
def log_probs(model, batches) -> torch.Tensor:
    """A student's log-probabilities after z, for every response token of the split."""
    model.eval()
    logits = []
    for batch in batches:
        view = batch.student
        out = model(view.input_ids, view.attention_mask.long()).logits
        logits.append(view.select(out))
    return torch.cat(logits).double().log_softmax(-1)


def trained(row: str, data: phone.Data, plan, seed: int):
    if row == phone.UNTRAINED:
        return models.build(data.tokenizer, **phone.STUDENT, seed=seed)
    if row != ANSWERS:
        return phone.fit(row, data, plan[row], seed)
    student = models.build(data.tokenizer, **phone.STUDENT, seed=seed)
    budget = plan[phone.DISTILLED]
    train(
        student,
        data.unlabelled[: budget.unlabelled],
        data.collator,
        Objective(hard_weight=1.0),
        replace(phone.CONFIG, steps=budget.steps, seed=seed),
    )
    return student


def summary(runs: list[dict], seeds: int) -> dict:
    """Means with 95 % intervals, and the distilled student minus every other row."""
    values = {
        row: {
            measure: [run[measure] for run in runs if run["row"] == row]
            for measure in MEASURES
        }
        for row in ROWS
    }
    complete = {
        row: found
        for row, found in values.items()
        if len(found["kl"]) == seeds > 1  # runs are made seed by seed, in order
    }
    ours = complete.get(phone.DISTILLED)
    if ours is None:
        return {}
    return {
        "measures": {
            row: {measure: vars(mean_interval(found[measure])) for measure in MEASURES}
            for row, found in complete.items()
        },
        "distilled_minus": {
            row: {
                measure: vars(
                    mean_interval(
                        [
                            a - b
                            for a, b in zip(ours[measure], found[measure], strict=True)
                        ]
                    )
                )
                for measure in MEASURES
            }
            for row, found in complete.items()
            if row != phone.DISTILLED
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the training")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = phone.Data()
    test = data.batches(data.test)
    reference = teacher_reference(LiveTeacher(data.teacher), test)
    places, tokens = zip(*forks(data), strict=True)
    taught = torch.cat(reference).double().log_softmax(-1)
    teacher = taught[places, tokens]
    begin, firsts = example(data)

    def at_example(log_probs) -> dict[str, float]:
        return {text: log_probs[begin, i].item() for text, i in firsts.items()}

    plan = phone.budgets(data, arguments.share)
    settings = {
        "share": arguments.share,
        "steps": {row: budget.steps for row, budget in plan.items()},
        "test": len(data.test),
        "forks": len(places),
    }
    runs, before = resume(arguments.out, settings, seeds=arguments.seeds)
    done = {(run["row"], run["seed"]) for run in runs}
    for seed, row in itertools.product(range(arguments.seeds), ROWS):
        if (row, seed) in done:
            continue
        student = trained(row, data, plan, seed)
        told = log_probs(student, test)
        ours = told[places, tokens]
        found = evaluate(student, test, reference)
        run = {
            "row": row,
            "seed": seed,
            "correlation": torch.corrcoef(torch.stack([ours, teacher]))[0, 1].item(),
            "gap": (ours - teacher).mean().item(),
            "kl": found.kl,
            "exact_match": found.exact_match,
            "example": at_example(told),
        }
        runs.append(run)
        print(run, flush=True)
        result = {
            **provenance(command_of("dark_knowledge.py", vars(arguments))),
            "core_minutes": round(before + time.process_time() / 60, 1),
            **settings,
            "seeds": arguments.seeds,
            "teacher": {
                "log_prob": teacher.mean().item(),
                "example": at_example(taught),
            },
            "runs": runs,
            **summary(runs, arguments.seeds),
        }
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
