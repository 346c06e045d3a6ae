"""What a linear probe reads from students of the phone example, over paired seeds.

    OMP_NUM_THREADS=1 python notebooks/experiments/probe_students.py

Writes notebooks/results/probe_students.json after every seed, and goes on from it. The
recipe is the quickstart's (kdlib/phone.py). A student never hears of the nine kinds of
value (date, money, unit, ...); a probe of its state at the last token of the prompt is
asked for the kind. The probe is fitted on inputs of the validation split and judged on
those of the test split, for the embedding and after every layer.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from kdlib import localize, models, phone
from kdlib.features import linear_probe
from kdlib.ledger import command_of, mean_interval, provenance, resume, write_json

RESULT = Path(__file__).parents[1] / "results" / "probe_students.json"
SEEDS = 5
TRAINED = (phone.HARD_TOKENS, phone.DISTILLED)


@torch.no_grad()
def states(model, batches, side: str) -> list[torch.Tensor]:
    """[inputs, H] for the embedding and each layer, at the last token of the prompt."""
    found = []
    for batch in batches:
        view = getattr(batch, side)
        out = model(view.input_ids, view.attention_mask, output_hidden_states=True)
        first = batch.row_ids.diff(prepend=torch.tensor([-1])) > 0
        found.append([view.select(layer)[first] for layer in out.hidden_states])
    return [torch.cat(layer) for layer in zip(*found, strict=True)]


def kinds(split: str) -> torch.Tensor:
    data = localize.load_split(split)
    return torch.tensor([localize.KINDS.index(datum.kind) for datum in data])


def probed(model, splits: dict, side: str = "student") -> list[float]:
    """The share of test inputs whose kind the probe names, layer by layer."""
    known, new = (states(model, splits[s], side) for s in ("validation", "test"))
    labels, wanted = kinds("validation"), kinds("test")
    return [
        (linear_probe(a, labels, b) == wanted).double().mean().item()
        for a, b in zip(known, new, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = phone.Data()
    splits = {
        split: data.batches(data.encode(phone.labels(split)))
        for split in ("validation", "test")
    }
    plan = phone.budgets(data, arguments.share)
    settings = {
        "steps": {row: plan[row].steps for row in TRAINED},
        "kinds": localize.KINDS,
        "fitted on": len(kinds("validation")),
        "judged on": len(kinds("test")),
    }
    runs, before = resume(arguments.out, settings, seeds=arguments.seeds)
    teacher = {
        "with its instruction": probed(data.teacher, splits, "teacher"),
        "without it": probed(data.teacher, splits),
    }
    for seed in range(len(runs), arguments.seeds):
        untrained = models.build(data.tokenizer, **phone.STUDENT, seed=seed)
        run = {"seed": seed, phone.UNTRAINED: probed(untrained.eval(), splits)}
        for row in TRAINED:
            run[row] = probed(phone.fit(row, data, plan[row], seed).eval(), splits)
        runs.append(run)
        minutes = before + time.process_time() / 60
        write_json(
            arguments.out,
            {
                **provenance(command_of("probe_students.py", vars(arguments))),
                "core_minutes": round(minutes, 1),
                "seeds": len(runs),
                **settings,
                "most frequent kind": kinds("test").bincount().max().item()
                / len(kinds("test")),
                "teacher": teacher,
                "runs": runs,
                **(summary(runs) if len(runs) > 1 else {}),
            },
        )
        print(f"seed {seed}: {minutes:.1f} minutes of a core", flush=True)


def summary(runs: list[dict]) -> dict:
    """Means with 95 % intervals, layer by layer, and distilled minus the others."""
    rows = (phone.UNTRAINED, *TRAINED)
    layers = range(len(runs[0][phone.DISTILLED]))

    def over(row, layer):
        return [run[row][layer] for run in runs]

    def minus(row, layer):
        pairs = zip(over(phone.DISTILLED, layer), over(row, layer), strict=True)
        return vars(mean_interval([a - b for a, b in pairs]))

    return {
        "probe": {
            row: [vars(mean_interval(over(row, n))) for n in layers] for row in rows
        },
        "distilled_minus": {row: [minus(row, n) for n in layers] for row in rows[:2]},
    }


if __name__ == "__main__":
    main()
