"""Result files: who made a number, and how sure it is.

Every number that a notebook quotes stands in a JSON file under notebooks/results,
with the command that made it. An experiment that was stopped goes on from its file,
if it is still the same experiment.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kdlib.errors import ArgumentError, DataError, StorageError

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

    Raises ArgumentError for fewer than two values.
    """
    return ratio_interval(values, [1.0] * len(values))


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float]
) -> Interval:
    """sum(numerators) / sum(denominators) and its 95 % interval.

    For means per token where the units that were sampled, such as user inputs, have
    several tokens each: numerators hold their sums, denominators their tokens. The
    interval is that of the linearised ratio (Cochran 1977, Sampling Techniques, 3rd
    ed., eq. 6.13), and too narrow for a handful of units that differ in length.

    Raises ArgumentError for fewer than two units, or denominators that sum to zero.
    """
    n, total = len(numerators), sum(denominators)
    if n < 2 or n != len(denominators) or total == 0:
        raise ArgumentError(
            f"{n} values, whose denominators sum to {total}",
            "give two values at least, one a seed or input, and a sum above zero",
        )
    ratio = sum(numerators) / total
    pairs = zip(numerators, denominators, strict=True)
    rest = [a - ratio * b for a, b in pairs]  # sums to zero
    half = t95(n - 1) * (sum(r * r for r in rest) / (n - 1) * n) ** 0.5 / abs(total)
    return Interval(ratio, ratio - half, ratio + half)


def t95(freedom: int) -> float:
    """The two-sided 95 % point of Student's t.

    Above ten degrees of freedom by its expansion around the normal's point (Abramowitz
    & Stegun 1964, eq. 26.7.5), which is right to 2e-4 there.
    """
    if freedom <= len(T95):
        return T95[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**k for k, term in enumerate(terms, 1))


def command_of(script: str, options: dict) -> str:
    """The command that a result file names: a script of notebooks/experiments.

    options: what it was given, by the parser's names; but `out`, where the file was
    put. An option that is None or False was not given.
    """
    words = [f"python notebooks/experiments/{script}"]
    for name, value in options.items():
        if name == "out" or value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            value = value if isinstance(value, (list, tuple)) else [value]
            words += [shlex.quote(str(v)) for v in value]
    return " ".join(words)


def resume(
    path: str | Path, settings: dict, *, seeds: int | None = None
) -> tuple[list[dict], float]:
    """The `runs` that a result file has, and the `core_minutes` that they took.

    settings: the entries of the result that decide what its runs are, in any order;
              the file was written with the same ones
    seeds:    those asked for; the file's runs have no later one

    None and 0 minutes where there is no file, or one without runs. Raises DataError
    where it cannot be read, or is of another experiment: runs of two would be averaged
    as if they were one.
    """
    path = Path(path)
    elsewhere = "name another file (--out FILE), or remove this one to begin anew"
    try:
        earlier = json.loads(path.read_text("utf-8"))
        runs, minutes = list(earlier.get("runs", [])), earlier.get("core_minutes", 0.0)
    except FileNotFoundError:
        return [], 0.0
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is no result file: {error}", elsewhere) from error
    if not runs:
        return [], minutes
    now = json.loads(json.dumps(settings))  # as a file holds them: keys are strings
    for name in now:
        if name not in earlier or earlier[name] != now[name]:
            raise DataError(
                f"{path} holds runs of another experiment: {name} = "
                f"{earlier.get(name)!r} there, {now[name]!r} now",
                f"give the options it was made with; {elsewhere}",
            )
    last = max(run["seed"] for run in runs)
    if seeds is not None and last >= seeds:
        raise DataError(
            f"{path} holds {last + 1} seeds, and {seeds} were asked for",
            f"ask for {last + 1} or more; {elsewhere}",
        )
    return runs, minutes


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
    """Write a JSON file as write_text does."""
    return write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: str | Path, text: str) -> Path:
    """Write a file in one rename, so that a reader never meets half of one.

    Raises StorageError where it cannot be written; what was there is untouched.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error}", "free disk space, or name another folder"
        ) from error
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
    return path
