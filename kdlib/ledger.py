"""Result files: who made a number, and how sure it is.

Every number that a notebook quotes stands in a JSON file under notebooks/results,
with the command that made it. (Claims and their rendering come later.)
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdlib.errors import ArgumentError

# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval (Student's t over the values)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def claim(self) -> str:
        """The interval of a difference, or "not shown here" where it covers zero."""
        if self.low <= 0 <= self.high:
            return f"not shown here ({self})"
        return str(self)


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean over seeds and its 95 % interval; for paired runs, pass differences.

    Raises ArgumentError for fewer than two values, or more than the table holds.
    """
    freedom = len(values) - 1
    if not 1 <= freedom <= len(T95):
        raise ArgumentError(
            f"{len(values)} values", f"give 2 to {len(T95) + 1} values, one a seed"
        )
    mean = statistics.fmean(values)
    half = T95[freedom - 1] * statistics.stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half)


def provenance(command: str) -> dict[str, str]:
    """What a result file says about its making, besides the numbers."""
    import torch
    import transformers

    device = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_json(path: str | Path, value) -> Path:
    """Write a JSON file in one rename, so that a reader never meets half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path
