"""What the course claims, and whether it holds: every claim, its number, its maker.

notebooks/claims.toml has a table for each claim:

    [distilled-over-hard-flops]
    says = "At equal FLOPs the distilled student answers more than hard labels do"
    result = "quickstart_seeds.json"     in notebooks/results
    at = ["distilled_minus", "hard labels, equal FLOPs"]    the interval in it
    script = "quickstart_seeds.py"       in notebooks/experiments, writes --out
    small = ["--seeds", "2", "--share", "0.1"]
    expect = "above"                     zero; or "below", or "not shown"

A claim is what its interval says, and an interval that covers zero shows nothing. So
the sentence is rendered with its interval, and `expect` is checked against it.

Knows result files and their scripts. Does not know what was measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdlib.errors import ArgumentError, DataError, StorageError, nearest
from kdlib.ledger import Interval

FOLDER = Path(__file__).parents[1] / "notebooks"
ABOVE, BELOW, NOT_SHOWN = "above", "below", "not shown"
KEYS = ("says", "result", "at", "script", "small", "expect")


@dataclass(frozen=True)
class Claim:
    """One claim; the fields are those of the file."""

    id: str
    says: str
    result: str
    at: tuple[str, ...]
    script: str
    small: tuple[str, ...]
    expect: str

    def facts(self, path: Path | None = None) -> dict:
        """The result file: its numbers, command, date, device and versions.

        Raises DataError where it is missing or no JSON.
        """
        path = FOLDER / "results" / self.result if path is None else path
        try:
            return json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"claim {self.id}: {path} cannot be read: {error}",
                f"run python notebooks/experiments/{self.script}",
            ) from error

    def interval(self, path: Path | None = None) -> Interval | None:
        """None where the file has null there: a short run did not get so far.

        Raises DataError where the file has no interval at that place.
        """
        found = self.facts(path)
        try:
            for key in self.at:
                found = found[key]
            if found is None:
                return None
            return Interval(found["mean"], found["low"], found["high"])
        except (KeyError, TypeError) as error:
            raise DataError(
                f"claim {self.id}: {self.result} has no interval at "
                f"{' > '.join(self.at)}",
                "correct `at` in notebooks/claims.toml",
            ) from error

    def __str__(self) -> str:
        """The sentence with its interval, as a notebook prints it."""
        return f"{self.says}: {self.interval().claim()}."


def load() -> dict[str, Claim]:
    """Every claim by its id, in the order of the file.

    Raises DataError where notebooks/claims.toml is missing (the package was installed
    without the course) or has a key too many or too few.
    """
    path = FOLDER / "claims.toml"
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}",
            "run this in a clone of the course's repository",
        ) from error
    claims = {}
    for name, table in tables.items():
        for key in {*table, *KEYS}:
            if key not in KEYS or key not in table:
                fault = "missing" if key in KEYS else "unknown"
                raise DataError(f"claim {name}: {key!r} is {fault}", "correct it")
        fields = table | {"at": tuple(table["at"]), "small": tuple(table["small"])}
        claims[name] = Claim(name, **fields)
    return claims


def find(name: str) -> Claim:
    """Raises ArgumentError for a claim that does not exist."""
    claims = load()
    if name not in claims:
        raise ArgumentError(f"there is no claim {name!r}", nearest(name, claims))
    return claims[name]


def side(interval: Interval) -> str:
    """Which side of zero an interval lies on."""
    if interval.low > 0:
        return ABOVE
    return BELOW if interval.high < 0 else NOT_SHOWN


def rerun(
    claim: Claim, *, small: bool = True, say: Callable[[str], None] = lambda line: None
) -> dict:
    """Run a claim's experiment again, beside its result file, which stays as it is.

    small: with the claim's `small` options, on any CPU; else as it was run

    Returns the interval found and a verdict: "holds"; "not shown at this scale" where
    the new interval alone covers zero, "shown at this scale" where the recorded one
    alone does; "contradicted" where they lie on both sides of zero.

    Raises ArgumentError where the claim has no small scale, StorageError where the
    script fails, with the end of what it printed.
    """
    if small and not claim.small:
        raise ArgumentError(
            f"claim {claim.id} has no small scale", "run it in full: --scale full"
        )
    script = FOLDER / "experiments" / claim.script
    with tempfile.TemporaryDirectory(prefix="kdlib-claim-") as folder:
        out = Path(folder) / claim.result
        command = [sys.executable, str(script), "--out", str(out)]
        command += claim.small if small else ()
        say(" ".join(["python", f"notebooks/experiments/{claim.script}", *command[4:]]))
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = "\n".join(done.stderr.splitlines()[-5:])
            raise StorageError(
                f"{claim.script} ended with status {done.returncode}:\n{last}",
                "run it by itself to see all that it prints",
            )
        found = claim.interval(out)
        facts = claim.facts(out)
        minutes = facts.get("minutes", facts.get("core_minutes"))
    return {
        "claim": claim.id,
        "says": claim.says,
        "command": " ".join(command[1:2] + command[4:]),
        "recorded": vars(claim.interval()),
        "found": None if found is None else vars(found),
        "minutes": minutes,
        "verdict": verdict(claim.expect, None if found is None else side(found)),
    }


def verdict(expected: str, found: str | None) -> str:
    """Of a rerun, by the sides of zero of two intervals; None: it has no interval."""
    if found == expected:
        return "holds"
    if found in (NOT_SHOWN, None):
        return "not shown at this scale"
    return "shown at this scale" if expected == NOT_SHOWN else "contradicted"


def report(found: dict) -> str:
    """What `rerun` found, in three lines."""
    now = "no number" if found["found"] is None else Interval(**found["found"])
    return "\n".join(
        [
            f"{found['says']}",
            f"  recorded {Interval(**found['recorded'])}",
            f"  now      {now}: {found['verdict']}",
        ]
    )


def table(claims: dict[str, Claim]) -> str:
    """All claims, two lines each, with who made the number."""
    lines = []
    for claim in claims.values():
        facts = claim.facts()
        lines += [
            f"{claim.id}",
            f"    {claim}",
            f"    {claim.result}: {facts['command']}; {facts['device']}, "
            f"{facts['date']}",
        ]
    return "\n".join(lines)
