"""The doctor's confusion table: every broken step and run, and what it is taken for.

    python notebooks/experiments/doctor_table.py [--out FILE] [--batches]

Writes notebooks/results/doctor_confusion.json. The faults stand in doctor_zoo.py (one
batch each) and doctor_runs.py (a short training run each), with where they were seen.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import doctor_runs
import doctor_zoo
import torch

from kdlib import models
from kdlib.doctor import Finding, examine_batch, examine_run
from kdlib.ledger import provenance, write_json

RESULT = Path(__file__).parents[1] / "results" / "doctor_confusion.json"


def row(kind: str, case, findings: list[Finding]) -> dict:
    return {
        "kind": kind,
        "case": case.name,
        "seen": case.seen,
        "expected": sorted(case.expected),
        "found": sorted(finding.name for finding in findings),
    }


def batches() -> Iterator[dict]:
    bench = doctor_zoo.Bench()
    for case in doctor_zoo.FAULTS + doctor_zoo.HEALTHY:
        yield row("batch", case, examine_batch(**case.make(bench)))


def runs(folder: Path) -> Iterator[dict]:
    bench = doctor_runs.Bench()
    for number, run in enumerate(doctor_runs.BROKEN + doctor_runs.HEALTHY):
        place = folder / str(number)
        run.make(bench, place)
        yield row("run", run, examine_run(place, floor=run.floor))


def table(rows: list[dict]) -> str:
    """A line a case: what it is, and what it is taken for."""
    lines, wrong = [], [r for r in rows if r["expected"] != r["found"]]
    for kind in ("batch", "run"):
        mine = [r for r in rows if r["kind"] == kind]
        if not mine:
            continue
        broken = [r for r in mine if r["expected"]]
        named = sum(r["expected"] == r["found"] for r in broken)
        healthy = [r for r in mine if not r["expected"]]
        quiet = sum(not r["found"] for r in healthy)
        lines += [
            f"{kind}: {named} of {len(broken)} faults named, "
            f"nothing found in {quiet} of {len(healthy)} healthy ones",
            "",
        ]
        for r in mine:
            answer = ", ".join(r["found"]) or "nothing found"
            mark = " " if r not in wrong else "X"
            lines.append(f"{mark} {r['case'][:52]:<52}  {answer}")
        lines.append("")
    pairs = Counter(
        (", ".join(r["expected"]) or "healthy", ", ".join(r["found"]) or "nothing")
        for r in wrong
    )
    lines += [f"{a} taken for {b}: {n}" for (a, b), n in pairs.items()]
    return "\n".join(lines).rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--batches", action="store_true", help="leave the runs out")
    arguments = parser.parse_args()
    models.quiet_transformers()
    torch.set_num_threads(1)
    rows = list(batches())
    if not arguments.batches:
        with tempfile.TemporaryDirectory(prefix="kdlib-doctor-") as folder:
            rows += runs(Path(folder))
    print(table(rows))
    facts = {
        "rows": rows,
        "minutes": round(time.process_time() / 60, 1),  # of one core
        **provenance("python notebooks/experiments/doctor_table.py"),
    }
    write_json(arguments.out, facts)
    return int(any(r["expected"] != r["found"] for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
