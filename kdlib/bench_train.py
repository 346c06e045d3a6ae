"""Speed and memory of training: kdlib's loop beside TRL's GKDTrainer.

Knows: how to compare rows (training_rows.py) fairly, and what kdlib promises.

Every row runs in a process of its own: none pays for another one's memory or goes down
with it. The rows take turns, round after round, so that a machine that grows slower
does so for all. A row's first loss, before any step, shows whether it minimises what
the others do: one that does not has no part in the targets.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from kdlib.errors import ArgumentError
from kdlib.ledger import provenance, write_json
from kdlib.measuring import check_place, peer_versions
from kdlib.training_rows import PRESETS, ROWS, WARM_UP, Preset

DEVICES = ("cuda", "cpu")
ROUNDS = 2
SECONDS = 900  # at most, for a row in a round
TOLERANCE = 0.01  # of first losses, relative: some logits are rounded to 16 bits
GKD = "TRL GKDTrainer"
# (row, quantity, the row it is compared with, limit): at least the limit, but memory at
# most. They hold for the preset "issue" on a GPU.
TARGETS = [
    (row, *target)
    for row in ("kdlib", "kdlib, compiled")
    for target in (
        ("tokens_per_s", GKD, 2.5),
        ("peak_mib", GKD, 0.35),
        ("mfu", None, 0.45),
    )
] + [
    ("kdlib, cached", "tokens_per_s", "kdlib", 1.5),
    ("kdlib, cached, compiled", "tokens_per_s", "kdlib, compiled", 1.5),
]


def bench_train(
    device: str | None = None,
    *,
    preset: str | Preset | None = None,
    steps: int | None = None,
    rounds: int = ROUNDS,
    rows: tuple[str, ...] = tuple(ROWS),
    out: str | Path | None = None,
    command: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict:
    """Train every row for some steps; what each took, and the targets.

    device: "cuda" or "cpu"; None takes CUDA where it is
    preset: shapes, "issue" or "small" by name; None takes "issue" on CUDA, else "small"
    steps:  timed steps a round, after WARM_UP others; the preset's unless given
    rounds: how often all rows take their turn
    out:    a path for the result as JSON, written anew after every row, so that what
            was measured outlives an end of any kind
    command: what the result names as its maker, by default the command line

    A row of the result has

        tokens_per_s           that the student reads, batch x length a step; and
        response_tokens_per_s  those of them that have a loss
        step_ms, step_ms_iqr   median and quartiles over all timed steps
        peak_mib               of tensors at most, weights and moments included
        mfu                    model FLOPs utilisation (metrics.py), of peak_flops
        first_loss, objective  "same", "top-k of it", or "another objective"
        ratio                  of tokens_per_s to GKDTrainer's

    or `skipped` with the reason.

    Raises ArgumentError for an unknown or absent device, an unknown preset or row, a
    count below 1, or an `out` that is a folder.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_place(device, DEVICES, out)
    if preset is None:
        preset = "issue" if device == "cuda" else "small"
    named = [("row", row, ROWS) for row in rows]
    if isinstance(preset, str):
        named.append(("preset", preset, PRESETS))
    for name, value, known in named:
        if value not in known:
            raise ArgumentError(f"{name} = {value!r}", f"choose from {list(known)}")
    name, preset = (
        (preset, PRESETS[preset]) if isinstance(preset, str) else ("own", preset)
    )
    steps = preset.steps if steps is None else steps
    for what, value in (("steps", steps), ("rounds", rounds)):
        if value < 1:
            raise ArgumentError(f"{what} = {value}", f"use 1 or more {what}")

    command = command or f"python -m kdlib bench train --device {device}"
    about = provenance(command)
    about |= peer_versions("triton", "trl", "liger-kernel", "accelerate")
    if device != "cuda" and torch.cuda.is_available():
        about["device"] = device
    about |= {"preset": name, "shapes": asdict(preset), "warm_up": WARM_UP}
    about |= {"steps": steps, "rounds": rounds}
    judged = device == "cuda" and name == "issue"
    takes = {row: [] for row in rows}
    for number in range(rounds):
        for row in rows:
            if takes[row] and "skipped" in takes[row][-1]:
                continue  # it would fail again
            job = {"row": row, "preset": asdict(preset)}
            takes[row].append(in_child(job | {"device": device, "steps": steps}))
            log(f"round {number + 1}: {_took(row, takes[row][-1])}")
            result = about | _report(takes, preset, judged)
            if out is not None:
                write_json(out, result)
    return result


def in_child(job: dict) -> dict:
    """measure(**job) in a new process; its end, however it came, is an answer."""
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="kdlib-bench-") as folder:
        out = Path(folder, "row.json")
        command = [sys.executable, "-m", "kdlib.training_rows", json.dumps(job), out]
        try:
            done = subprocess.run(
                command,
                env=os.environ | quiet,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return {"skipped": f"not finished after {SECONDS} s"}
        if out.exists():
            return json.loads(out.read_text())
    status = f"status {done.returncode}"
    if done.returncode < 0:  # SIGKILL: on Linux mostly for want of memory
        status = signal.Signals(-done.returncode).name
    last = [line.strip() for line in done.stdout.splitlines() if line.strip()][-1:]
    return {"skipped": ": ".join([f"its process ended with {status}", *last])}


def _report(takes: dict[str, list[dict]], preset: Preset, judged: bool) -> dict:
    rows = [_summary(row, found, preset) for row, found in takes.items() if found]
    measured = {row["row"]: row for row in rows if "skipped" not in row}
    dense = [row for row in measured.values() if ROWS[row["row"]].dense]
    for row in measured.values():
        row["objective"] = _objective(row, dense)
        if GKD in measured:
            gkd = measured[GKD]["tokens_per_s"]
            row["ratio"] = round(row["tokens_per_s"] / gkd, 2)
    targets = [_target(measured, judged, *target) for target in TARGETS]
    return {"rows": rows, "targets": targets}


def _summary(name: str, takes: list[dict], preset: Preset) -> dict:
    """One row over all rounds."""
    good = [take for take in takes if "skipped" not in take]
    if not good:
        return {"row": name, "skipped": takes[-1]["skipped"]}
    ms = [value for take in good for value in take["ms"]]
    median, first = statistics.median(ms), good[0]
    quartiles = statistics.quantiles(ms * (1 + (len(ms) == 1)), method="inclusive")
    tokens = preset.batch * preset.length
    answers = preset.batch * (preset.length - preset.prompt)
    mfu = None
    if first["peak_flops"]:
        mfu = round(first["flops"] / (first["peak_flops"] * median / 1e3), 3)
    return {
        "row": name,
        "tokens_per_s": round(1e3 * tokens / median, 1),
        "response_tokens_per_s": round(1e3 * answers / median, 1),
        "step_ms": round(median, 2),
        "step_ms_iqr": [round(quartiles[0], 2), round(quartiles[2], 2)],
        "round_ms": [round(statistics.median(take["ms"]), 2) for take in good],
        "peak_mib": max(take["peak_mib"] for take in good),
        "mfu": mfu,
        "flops": first["flops"],
        "peak_flops": first["peak_flops"],
        "precision": first["precision"],
        "first_loss": float(f"{first['first_loss']:.6g}"),
    }


def _objective(row: dict, dense: list[dict]) -> str:
    """By its first loss: that of most dense rows, or, of top k and the rest as one
    event, less."""
    if not dense:
        return "not compared"
    usual = statistics.median_low([other["first_loss"] for other in dense])
    gap = row["first_loss"] / usual - 1
    if not ROWS[row["row"]].dense:
        return "top-k of it" if -1 < gap <= TOLERANCE else "another objective"
    return "same" if abs(gap) <= TOLERANCE else "another objective"


def _target(measured, judged, name, quantity, base, limit) -> dict:
    """One promise: {"verdict": "met", "missed" or "not measured", ...}."""
    target = {"row": name, "quantity": quantity, "over": base, "limit": limit}
    rows = [measured.get(row) for row in (name, base) if row is not None]
    usable = all(row and row["objective"] != "another objective" for row in rows)
    if not usable or rows[0][quantity] is None:
        return target | {"value": None, "verdict": "not measured"}
    value = rows[0][quantity] / (rows[1][quantity] if base else 1)
    target["value"] = round(value, 3)
    if not judged:
        return target | {"verdict": "not measured"}
    met = value <= limit if quantity == "peak_mib" else value >= limit
    return target | {"verdict": "met" if met else "missed"}


def _took(name: str, take: dict) -> str:
    if "skipped" in take:
        return f"{name}: skipped: {take['skipped']}"
    return f"{name}: {statistics.median(take['ms']):.1f} ms a step"


def table(result: dict) -> str:
    """The result as lines of text."""
    shapes = result["shapes"]
    lines = [
        f"{result['device']}, torch {result['torch']}, {result['date']}",
        f"{shapes['batch']} x {shapes['length']} tokens a step, {shapes['prompt']} of "
        f"each row without a loss; {result['rounds']} rounds of {result['steps']} "
        f"steps after {result['warm_up']}",
        "",
        f"{'row':<26}{'tokens/s':>10}{'x GKD':>7}{'step ms':>10}{'quartiles':>18}"
        f"{'peak MiB':>10}{'MFU':>6}{'first loss':>12}",
        *map(_line, result["rows"]),
        "",
    ]
    for target in result["targets"]:
        sign = "<=" if target["quantity"] == "peak_mib" else ">="
        over = f" over {target['over']}" if target["over"] else ""
        value = "" if target["value"] is None else f" {target['value']:g}"
        lines.append(
            f"{target['verdict']:<13}{target['row']}: {target['quantity']}{over}"
            f"{value} {sign} {target['limit']:g}"
        )
    return "\n".join(lines)


def _line(row: dict) -> str:
    start = f"{row['row']:<26}"
    if "skipped" in row:
        return f"{start} skipped: {row['skipped']}"
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
    low, high = row["step_ms_iqr"]
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.2f}"
    note = "" if row["objective"] == "same" else f"  {row['objective']}"
    return (
        f"{start}{row['tokens_per_s']:>10,.0f}{ratio:>7}{row['step_ms']:>10.1f}"
        f"{f'{low:.1f} - {high:.1f}':>18}{row['peak_mib']:>10,}{mfu:>6}"
        f"{row['first_loss']:>12.5f}{note}"
    )
