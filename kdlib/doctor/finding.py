"""What the doctor says: findings, their words, and how they are printed.

The words of every fault that can be named stand in kdlib/data/doctor.toml.
"""

from __future__ import annotations

import functools
import textwrap
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass

from kdlib.models import DATA

NOTHING = "Nothing found."


@dataclass(frozen=True)
class Finding:
    """One fault, as far as it can be seen from outside.

    name:     of the cause, a key of the catalogue
    symptom:  what is wrong, in general
    evidence: the numbers that were measured here
    cause:    what makes it most likely
    remedy:   what to do about it
    seen:     where this fault was met before
    """

    name: str
    symptom: str
    evidence: str
    cause: str
    remedy: str
    seen: str = ""


@functools.cache
def catalogue() -> dict[str, dict[str, str]]:
    """By name: symptom, cause, remedy, and seen where a sighting is known."""
    return tomllib.loads((DATA / "doctor.toml").read_text(encoding="utf-8"))


def found(name: str, evidence: str) -> Finding:
    """The finding of that name, with what was measured. There is none without."""
    return Finding(name=name, evidence=evidence, **catalogue()[name])


def report(findings: Sequence[Finding]) -> str:
    """Findings as text for a terminal, or "Nothing found."."""
    if not findings:
        return NOTHING
    parts = []
    for number, finding in enumerate(findings, 1):
        header = f"{number}. {finding.symptom} [{finding.name}]"
        lines = textwrap.wrap(header, 88, subsequent_indent="   ")
        for label in ("evidence", "cause", "remedy", "seen"):
            if text := getattr(finding, label):
                lines += textwrap.wrap(
                    text,
                    88,
                    initial_indent=f"   {label:9} ",
                    subsequent_indent=" " * 13,
                )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
