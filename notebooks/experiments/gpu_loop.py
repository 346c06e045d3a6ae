"""One training step on a GPU: where its bytes go, and what each setting costs.

    python notebooks/experiments/gpu_loop.py

Writes notebooks/results/gpu_loop_h100.json after every row. Models, batches and clock
are those of `bench train` (kdlib/training_rows.py): Qwen3-0.6B's shape learns from
Qwen3-1.7B's, 8 rows of 1,024 tokens. Two parts:

    stages    bytes of tensors after each part of one step: plain loss, fused loss
    settings  tokens per second and the most bytes, for settings of TrainConfig

Every row has a process of its own. Nothing here is a claim about students.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from kdlib import models
from kdlib.gradients import StudentLoss, add_gradient
from kdlib.ledger import provenance, write_json
from kdlib.measuring import MIB, PeakMemory, tensor_bytes
from kdlib.metrics import peak_flops, step_flops
from kdlib.objective import Objective
from kdlib.teachers import LiveTeacher
from kdlib.train import adamw, train
from kdlib.training_rows import PRESETS, Preset, Run

RESULT = Path(__file__).parents[1] / "results" / "gpu_loop_h100.json"
# What is changed in bench train's settings, which are bf16 and the fused loss. From
# the plain loss to the last way out of a full memory.
SETTINGS = {
    "plain loss": {"fused": False},
    "plain loss, float32": {"fused": False, "precision": "fp32"},
    "fused loss": {},
    "fused, float32": {"precision": "fp32"},
    "fused, compiled": {"compile": True},
    "fused, micro-batches of 4": {"micro_batch_size": 4},
    "fused, micro-batches of 2": {"micro_batch_size": 2},
    "fused, micro-batches of 1": {"micro_batch_size": 1},
    "fused, activation checkpointing": {"activation_checkpointing": True},
    "fused, teacher offloaded": {"teacher_offload": True},
}


def stages(preset: Preset, device: str, fused: bool) -> dict:
    """MiB of all tensors after each part of a step, and at most during the gradient.

    The step is the second one, which finds AdamW's moments in their place.
    """
    run = Run(preset, device, 1)
    student, teacher = run.student.train(), LiveTeacher(run.teacher)
    loss_of = StudentLoss(
        student, Objective(), teacher, precision=run.precision, fused=fused
    )
    optimizer = adamw(student, run.config)
    batch = run.collator.collate(run.batches[0]).to(device)

    def bytes_of(tensors) -> float:
        return round(sum(x.numel() * x.element_size() for x in tensors) / MIB)

    for _ in range(2):
        before = tensor_bytes(device)
        with PeakMemory(device) as peak:
            add_gradient(loss_of, [batch]).fetch()
        gradients = bytes_of(p.grad for p in student.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    moments = [x for state in optimizer.state.values() for x in state.values()]
    return {
        "student": bytes_of(student.parameters()),
        "teacher": bytes_of(run.teacher.parameters()),
        "moments": bytes_of(moments),
        "gradients": gradients,
        "between steps": round(before / MIB),
        "at most": round((before + peak.above) / MIB),
    }


def setting(preset: Preset, device: str, steps: int, changes: dict) -> dict:
    """Milliseconds of each step and the most bytes, with changed settings."""
    if "precision" in changes:
        preset = replace(preset, precision=changes["precision"])
    run = Run(preset, device, steps)
    if changes.get("teacher_offload"):
        run.teacher.to("cpu")
    train(
        run.student,
        run.pairs,
        run.collator,
        Objective(),
        replace(run.config, **changes),
        teacher=LiveTeacher(run.teacher),
        on_step=lambda step, loss: run.clock(loss),
    )
    tokens, clock = preset.batch * preset.length, run.clock
    ms = statistics.median(clock.ms)
    flops = step_flops(run.student, tokens, preset.batch, run.teacher, tokens)
    peak = peak_flops(torch.device(device), run.precision.name)
    return {
        "tokens_per_s": round(1e3 * tokens / ms, 1),
        "step_ms": round(ms, 1),
        "peak_mib": round(clock.peak / MIB),
        "mfu": peak and round(1e3 * flops / (peak * ms), 3),
        "precision": run.precision.name,
        "first_loss": float(f"{clock.first_loss:.6g}"),
    }


def in_child(job: dict) -> dict:
    """One row in a process of its own; a row that fails says why."""
    with tempfile.TemporaryDirectory(prefix="kdlib-gpu-loop-") as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--row", json.dumps(job), "--out", out]
        done = subprocess.run(command, capture_output=True, text=True)
        if out.exists():
            return json.loads(out.read_text())
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
    return {"skipped": "".join(last) or f"status {done.returncode}"}


def row(kind: str, device: str, preset: str, steps: int, of) -> dict:
    models.quiet_transformers()
    if kind == "stages":
        return stages(PRESETS[preset], device, of)
    return setting(PRESETS[preset], device, steps, SETTINGS[of])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None)
    parser.add_argument("--preset", choices=PRESETS, default=None)
    parser.add_argument("--steps", type=int, default=6, help="timed, of each setting")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        write_json(options.out, row(**options.row))
        return
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    preset = options.preset or ("issue" if device == "cuda" else "small")
    job = {"device": device, "preset": preset, "steps": options.steps}
    command = f"python notebooks/experiments/gpu_loop.py --device {device}"
    result = {
        **provenance(f"{command} --preset {preset} --steps {options.steps}"),
        "shapes": asdict(PRESETS[preset]),
        "steps": options.steps,
        "stages": {},
        "settings": {},
    }
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        result["memory_mib"] = round(total / MIB)
    for name, fused in (("plain loss", False), ("fused loss", True)):
        found = in_child({"kind": "stages", "of": fused, **job})
        result["stages"][name] = found
        print(name, found, flush=True)
        write_json(options.out, result)
    for name in options.settings:
        found = in_child({"kind": "settings", "of": name, **job})
        result["settings"][name] = found
        print(name, found, flush=True)
        write_json(options.out, result)


if __name__ == "__main__":
    main()
