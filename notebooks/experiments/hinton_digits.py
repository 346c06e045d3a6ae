"""Hinton, Vinyals & Dean 2015 (arXiv 1503.02531, section 3) at small scale.

    OMP_NUM_THREADS=1 python notebooks/experiments/hinton_digits.py

Writes notebooks/results/hinton_digits.json after every seed, and goes on from it. The
images are those of kdlib/digits.py. A seed fixes the split, the teacher, each student's
first weights and the order of its images; differences are taken seed by seed.

    temperature    students of two widths on the teacher's logits alone, at five
                   temperatures, beside hard labels; judged on the 797 images that are
                   not for training
    missing class  students of width 64 whose transfer set holds no 3; then the bias
                   of class 3 is raised by what makes the fewest errors on the
                   300 validation images (the paper chose it on the test set)
    probe          what a linear map reads from the students' last hidden layer, among
                   them two students who were matched by hidden states
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from kdlib import digits
from kdlib.digits import Part
from kdlib.features import hidden_mse, linear_probe, relational_distance
from kdlib.ledger import command_of, mean_interval, provenance, resume, write_json
from kdlib.objective import Objective

RESULT = Path(__file__).parents[1] / "results" / "hinton_digits.json"
SEEDS = 6
WIDTHS = (8, 64)
TEMPERATURES = (1, 2, 4, 8, 20)
FEW = (1, 4, 20)  # without the missing class
STEPS, TEACHER_STEPS = 2000, 3000
MISSING = 3  # the class that students never see
WIDE, MIDDLE = 64, 4  # the width without the missing class; a temperature between
HARD = "hard labels"
BIASES = torch.arange(0, 30.05, 0.1)  # tried for the missing class
LABELS_ALONE = Objective(hard_weight=1.0)


def soft(temperature: float) -> str:
    return f"T = {temperature}"


@torch.no_grad()
def errors(model, part: Part) -> torch.Tensor:
    return model(part.images).argmax(1) != part.labels


def rate(wrong: torch.Tensor) -> float:
    return wrong.double().mean().item()


def students(width, data, teacher_logits, seed, temperatures, steps) -> dict:
    """One on labels, and one on the teacher's logits at each temperature."""
    found = {}
    for name, objective in {
        HARD: LABELS_ALONE,
        **{soft(t): Objective(temperature=t) for t in temperatures},
    }.items():
        model = digits.network(width, seed=seed)
        targets = None if name == HARD else teacher_logits
        digits.fit(model, data, targets, objective, steps=steps, seed=seed)
        found[name] = model
    return found


def by_temperature(train, held_out, teacher_logits, seed, steps) -> dict:
    """Width -> row -> share of held-out images answered wrongly."""
    found = {}
    for width in WIDTHS:
        models = students(width, train, teacher_logits, seed, TEMPERATURES, steps)
        found[str(width)] = {
            name: rate(errors(m, held_out)) for name, m in models.items()
        }
        untrained = digits.network(width, seed=seed)
        found[str(width)]["untrained"] = rate(errors(untrained, held_out))

    # Is a small student worse at T = 20, or only slower?
    narrow = digits.network(WIDTHS[0], seed=seed)
    hot = Objective(temperature=TEMPERATURES[-1])
    options = {"steps": 2 * steps, "seed": seed}
    digits.fit(narrow, train, teacher_logits, hot, **options)
    found[str(WIDTHS[0])]["T = 20, twice the steps"] = rate(errors(narrow, held_out))

    # The rivals of the widest: with as many FLOPs, and with the teacher's shifts.
    wide = found[str(WIDE)]
    student = sum(p.numel() for p in digits.network(WIDE).parameters())
    teacher = sum(p.numel() for p in digits.network(digits.TEACHER_WIDTH).parameters())
    asked = 2 * teacher * len(train.labels)
    more = round(steps + asked / (6 * student * digits.BATCH))
    model = digits.network(WIDE, seed=seed)
    digits.fit(model, train, None, LABELS_ALONE, steps=more, seed=seed)
    wide["hard labels, equal FLOPs"] = rate(errors(model, held_out))
    model = digits.network(WIDE, seed=seed)
    options = {"steps": steps, "shifted": True, "seed": seed}
    digits.fit(model, train, None, LABELS_ALONE, **options)
    wide["hard labels, shifted images"] = rate(errors(model, held_out))
    return found


def without(part: Part, missing: int) -> torch.Tensor:
    return part.labels != missing


@torch.no_grad()
def best_bias(model, part: Part) -> float:
    """What to add to the missing class's logit for the fewest errors on `part`."""
    logits = model(part.images)
    counts = []
    for bias in BIASES:
        moved = logits.clone()
        moved[:, MISSING] += bias
        counts.append((moved.argmax(1) != part.labels).sum())
    return round(BIASES[int(torch.stack(counts).argmin())].item(), 1)


def raised(model, bias: float):
    with torch.no_grad():
        model[-1].bias[MISSING] += bias
    return model


def missing_class(models, validation, test) -> dict:
    """Row -> errors before and after the bias of the missing class is raised."""
    threes = test.labels == MISSING
    found = {}
    for name, model in models.items():
        before = errors(model, test)
        bias = best_bias(model, validation)
        after = errors(raised(model, bias), test)
        raised(model, -bias)
        found[name] = {
            "right on threes": 1 - rate(before[threes]),
            "errors": rate(before),
            "bias": bias,
            "right on threes, bias raised": 1 - rate(after[threes]),
            "errors, bias raised": rate(after),
        }
    return found


def matched_by_states(train, teacher, seed, steps) -> dict:
    """Students whose last hidden layer was matched; their output layer is untrained."""
    with torch.no_grad():
        wanted = teacher[:-1](train.images)
    found = {}
    for name in ("hidden states", "relations"):
        model = digits.network(WIDE, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        projection = torch.nn.Parameter(
            torch.randn(WIDE, wanted.shape[1], generator=generator) / WIDE**0.5
        )
        trained = torch.nn.ModuleList([model])
        trained.register_parameter("projection", projection)

        def loss(rows, name=name, model=model, projection=projection):
            states = model[:-1](train.images[rows])
            if name == "relations":
                return relational_distance(states, wanted[rows])
            return hidden_mse(states, wanted[rows], projection)

        if name == "relations":
            trained = model[:-1]
        n = len(train.labels)
        digits.minimise(loss, trained, n, steps, 5e-3, generator, seed)
        found[name] = model
    return found


@torch.no_grad()
def probed(models, teacher, train, test) -> dict:
    """Row -> what a probe of the last hidden layer gets right, on test images."""

    def second(part):
        return teacher(part.images).topk(2).indices[:, 1]

    threes = test.labels == MISSING
    found = {}
    for name, model in models.items():
        states, new = model[:-1](train.images), model[:-1](test.images)
        digit = linear_probe(states, train.labels, new)
        rival = linear_probe(states, second(train), new)
        found[name] = {
            "digit, threes": rate(digit[threes] == MISSING),
            "digit": rate(digit == test.labels),
            "teacher's second choice": rate(rival == second(test)),
        }
    return found


def run(seed: int, share: float = 1.0) -> dict:
    steps = max(1, round(share * STEPS))
    train, validation, test = digits.split(seed)
    held_out = Part(*map(torch.cat, zip(validation, test, strict=True)))
    taught = max(1, round(share * TEACHER_STEPS))
    teacher = digits.train_teacher(train, steps=taught, seed=seed)
    with torch.no_grad():
        logits = teacher(train.images)
    keep = without(train, MISSING)
    transfer = Part(train.images[keep], train.labels[keep])
    models = students(WIDE, transfer, logits[keep], seed, FEW, steps)
    states = {
        "teacher": teacher,
        "untrained": digits.network(WIDE, seed=seed),
        HARD: models[HARD],
        "responses, T = 1": models[soft(1)],
        "responses, T = 4": models[soft(MIDDLE)],
        "responses, T = 20": models[soft(20)],
        **matched_by_states(transfer, teacher, seed, steps),
    }
    return {
        "seed": seed,
        "teacher": rate(errors(teacher, held_out)),
        "temperature": by_temperature(train, held_out, logits, seed, steps),
        "missing class": missing_class(models, validation, test),
        "probe": probed(states, teacher, train, test),
    }


def over_seeds(runs: list, *path: str) -> list[float]:
    found = runs
    for key in path:
        found = [item[key] for item in found]
    return found


def summary(runs: list[dict]) -> dict:
    """Means with 95 % intervals, and the differences that the chapter claims."""

    def interval(*path):
        return vars(mean_interval(over_seeds(runs, *path)))

    def minus(ours, theirs):
        pairs = zip(over_seeds(runs, *ours), over_seeds(runs, *theirs), strict=True)
        return vars(mean_interval([a - b for a, b in pairs]))

    one = runs[0]
    temperature = {
        width: {row: interval("temperature", width, row) for row in rows}
        for width, rows in one["temperature"].items()
    }
    differences = {}
    for width in map(str, WIDTHS):
        for ours, theirs in (
            (soft(MIDDLE), HARD),
            (soft(MIDDLE), soft(1)),
            (soft(20), soft(MIDDLE)),
            (soft(20), soft(8)),
        ):
            name = f"width {width}: {ours} minus {theirs}"
            paths = (("temperature", width, row) for row in (ours, theirs))
            differences[name] = minus(*paths)
    for width, ours, theirs in (
        (WIDTHS[0], "T = 20, twice the steps", soft(20)),
        (WIDTHS[0], "T = 20, twice the steps", soft(MIDDLE)),
        (WIDE, soft(MIDDLE), "hard labels, equal FLOPs"),
        (WIDE, soft(MIDDLE), "hard labels, shifted images"),
    ):
        paths = (("temperature", str(width), row) for row in (ours, theirs))
        differences[f"width {width}: {ours} minus {theirs}"] = minus(*paths)
    return {
        "teacher": interval("teacher"),
        "temperature": temperature,
        "differences": differences,
        "missing class": {
            row: {what: interval("missing class", row, what) for what in found}
            for row, found in one["missing class"].items()
        },
        "probe": {
            row: {what: interval("probe", row, what) for what in found}
            for row, found in one["probe"].items()
        },
        "probe minus hard labels": {
            row: {
                what: minus(("probe", row, what), ("probe", HARD, what))
                for what in found
            }
            for row, found in one["probe"].items()
            if row != HARD
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {
        "images": [len(part.labels) for part in digits.split(0)],
        "teacher_width": digits.TEACHER_WIDTH,
        "widths": WIDTHS,
        "temperatures": TEMPERATURES,
        "steps": max(1, round(arguments.share * STEPS)),
    }
    runs, before = resume(arguments.out, settings, seeds=arguments.seeds)
    for seed in range(len(runs), arguments.seeds):
        runs.append(run(seed, arguments.share))
        minutes = before + time.process_time() / 60
        result = {
            **provenance(command_of("hinton_digits.py", vars(arguments))),
            "core_minutes": round(minutes, 1),
            **settings,
            "seeds": len(runs),
            "runs": runs,
        }
        if len(runs) > 1:
            result["summary"] = summary(runs)
        write_json(arguments.out, result)
        print(f"seed {seed}: {minutes:.1f} minutes of a core", flush=True)


if __name__ == "__main__":
    main()
