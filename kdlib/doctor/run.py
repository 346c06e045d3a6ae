"""A run, by its numbers: can they be those of a healthy one?

Where one finding explains another, the first stands for both.
"""

from __future__ import annotations

import math
from pathlib import Path

from kdlib.doctor import fidelity, optimisation
from kdlib.doctor.finding import Finding
from kdlib.doctor.record import Record
from kdlib.errors import ArgumentError

CHECKS = (*optimisation.CHECKS, *fidelity.CHECKS)
LOST = {"not_learning", "fidelity_stuck", "too_flat", "overconfident"}
EXPLAINS = {
    "learning_rate_zero": {"not_learning"},
    "gradient_vanishes": {"not_learning", "gradient_spikes"},
    "mean_over_vocabulary": {"gradient_vanishes"},
    "sum_for_mean": {"always_clipped"},
    "wrong_scale": {"gradient_vanishes", "always_clipped"},
    "wrong_sign": LOST | {"always_clipped", "gradient_spikes", "late_positions_stuck"},
    "starts_too_high": {"always_clipped", "too_flat"},
    "not_learning": {"plateau_above_floor"},
    "late_positions_stuck": {"fidelity_stuck", "plateau_above_floor"},
    "diverging": LOST | {"always_clipped", "gradient_spikes", "late_positions_stuck"},
    "no_warmup": LOST | {"diverging", "gradient_spikes", "late_positions_stuck"},
}


def examine_run(folder: str | Path, *, floor: float | None = None) -> list[Finding]:
    """Findings of a finished run, or of one under way, in its folder.

    floor: the KL in nats a token that no student can go below, where it is known
           (recovery.measure_recovery); 0 for ordinary distillation

    Raises DataError for a folder that holds no run, or whose files cannot be read;
    ArgumentError for a floor that is none.
    """
    if floor is not None and not 0 <= floor < math.inf:
        raise ArgumentError(f"floor={floor}", "give nats a token, 0 or more")
    run = Record.read(folder)
    findings = [x for check in CHECKS if (x := check(run))]
    if floor is not None:
        findings += fidelity.against_floor(run, floor)
    names = {finding.name for finding in findings}
    explained = set().union(*(EXPLAINS.get(name, set()) for name in names))
    return [finding for finding in findings if finding.name not in explained]
