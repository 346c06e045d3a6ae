"""Verdicts on many losses: run, counted, and written as tables or JSON.

python -m kdlib laws            own() and render_laws()
python -m kdlib laws --peers    leaderboard() and render()
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import kdlib
from kdlib.laws import (
    BY_DESIGN,
    FAILED,
    LAWS,
    NOT_APPLICABLE,
    PASSED,
    Verdict,
    run,
)
from kdlib.own_losses import kdlib_losses
from kdlib.peers import ADAPTERS, CREDIT, PEERS


@dataclass(frozen=True)
class Row:
    """All verdicts on one loss, or why there are none."""

    library: str
    version: str
    loss: str
    verdicts: list[Verdict] = field(default_factory=list)
    skipped: str = ""


def own() -> list[Row]:
    """A row for each of kdlib's own losses."""
    return [Row("kdlib", kdlib.__version__, x.name, run(x)) for x in kdlib_losses()]


def leaderboard() -> list[Row]:
    """The rows of kdlib, then those of the other libraries, run live."""
    return own() + [row for library in PEERS for row in of(library)]


def of(library: str) -> list[Row]:
    """The rows of one other library, or one row that says why it is skipped."""
    try:
        version = importlib.metadata.version(PEERS[library])
    except importlib.metadata.PackageNotFoundError:
        reason = (
            f"pip install {PEERS[library]} (see notebooks/experiments/laws_peers.py)"
        )
        return [Row(library, "not installed", "", skipped=reason)]
    # what a library prints must not mix with our own output
    with contextlib.redirect_stdout(sys.stderr):
        try:
            losses = ADAPTERS[library]()
        except Exception as error:  # imports fail in many ways
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            return [Row(library, version, "", skipped=reason)]
        return [Row(library, version, x.name, run(x)) for x in losses]


def broken(rows: Sequence[Row], library: str = "kdlib") -> int:
    """How many laws the losses of one library break."""
    return len({v.law for v in _verdicts(rows, library) if v.status == FAILED})


def _verdicts(rows, library) -> list[Verdict]:
    return [v for row in rows if row.library == library for v in row.verdicts]


def as_json(rows: Sequence[Row]) -> list[dict]:
    """The rows as plain values; what is empty, and the laws' titles, are left out."""
    plain = []
    for row in map(asdict, rows):
        row["verdicts"] = [
            {key: x for key, x in verdict.items() if x and key != "title"}
            for verdict in row["verdicts"]
        ]
        plain.append({key: x for key, x in row.items() if x})
    return plain


def render_laws(rows: Sequence[Row], library: str = "kdlib") -> str:
    """A line a law: how many losses it holds for, how many it was put to, the bugs."""
    lines = []
    for law in LAWS:
        verdicts = [v for v in _verdicts(rows, library) if v.law == law]
        counts = {s: sum(v.status == s for v in verdicts) for s in (PASSED, FAILED)}
        status = FAILED if counts[FAILED] else PASSED if counts[PASSED] else "not asked"
        departures = sum(v.status == BY_DESIGN for v in verdicts)
        note = f", {departures} by design" if departures else ""
        lines.append(
            f"{law:>3}  {status:<9}  {counts[PASSED]:>2} of {sum(counts.values()):<2}"
            f"  {LAWS[law].title}{note}"
        )
        lines += [f"       {v.bug}" for v in verdicts if v.status == FAILED]
    return "\n".join(lines)


MARKS = {PASSED: ".", FAILED: "X", BY_DESIGN: "d", NOT_APPLICABLE: " "}


def render(rows: Sequence[Row]) -> str:
    """The leaderboard: a line a loss, a column a law, then what each library breaks,
    what it does by design, and what it does well."""
    width = max(len(row.loss) for row in rows)
    header = " ".join(f"{law:>2}" for law in LAWS)
    lines = [". holds   X broken   d departs by design, as stated   (blank) not asked"]
    for library in dict.fromkeys(row.library for row in rows):
        mine = [row for row in rows if row.library == library]
        name = f"{library} {mine[0].version}"
        if mine[0].skipped:
            lines += ["", name, f"  skipped: {mine[0].skipped}"]
            continue
        lines += ["", name.ljust(width + 4) + header]
        for row in mine:
            cells = " ".join(f"{MARKS[v.status]:>2}" for v in row.verdicts)
            lines.append(f"  {row.loss:<{width}}  {cells}".rstrip())
        said = departures(rows, library)
        lines += [f"  law {', '.join(laws)} {text}" for text, laws in said.items()]
        lines += [f"  right: {credit}" for credit in CREDIT.get(library, ())]
    return "\n".join(lines)


def departures(rows: Sequence[Row], library: str) -> dict[str, list[str]]:
    """What a library breaks and does by design, in words, with the laws it is about."""
    said: dict[str, list[str]] = {}
    for v in _verdicts(rows, library):
        text = f"broken: {v.bug}" if v.status == FAILED else ""
        if v.status == BY_DESIGN:
            text = f"by design: {v.bug}; {v.note}"
        if text and v.law not in said.setdefault(text, []):
            said[text].append(v.law)
    return said
