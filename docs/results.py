"""The pages of results, made from the files in notebooks/results.

Knows the ledger of claims, the laws' leaderboard and the doctor's table. No number
stands here: a result file that changes changes its page.
"""

from __future__ import annotations

import json
import re
from collections import Counter

import benches
from places import RESULTS, ROOT
from tables import cell, made_by, table

from kdlib import claims, leaderboard
from kdlib.claims import Claim
from kdlib.laws import BY_DESIGN, FAILED, LAWS, NOT_APPLICABLE, PASSED, Verdict
from kdlib.leaderboard import Row


def pages() -> dict[str, str | bytes]:
    """Pages and their figures, by their place on the site."""
    found = {"ledger": ledger(), "leaderboard": board(), "doctor": doctor()}
    written = {f"results/{name}.md": text for name, text in found.items()}
    return written | benches.pages()


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text("utf-8"))


# --- The ledger ---


def ledger() -> str:
    known = claims.load()
    by_file: dict[str, list[Claim]] = {}
    for claim in known.values():
        by_file.setdefault(claim.result, []).append(claim)
    shown = sum(claims.side(c.interval()) != claims.NOT_SHOWN for c in known.values())
    lines = [
        "# The ledger",
        "",
        f"What the course claims of trained students: {len(known)} claims. Each is a "
        "difference, over paired seeds or inputs, with its 95 % interval. An interval "
        f"that covers zero shows nothing, and then the claim says so: {shown} are "
        f"shown, {len(known) - shown} are not.",
        "",
        "`python -m kdlib ledger` lists the same in a terminal. `python -m kdlib "
        "ledger CLAIM` runs a claim's experiment again, at a scale for any computer.",
        "",
    ]
    sources = {p.stem: p.read_text("utf-8") for p in chapters()}
    for result, mine in by_file.items():
        ids = [f'"{claim.id}"' for claim in mine]
        quoted = [
            f"[chapter {int(name[:2])}](../notebooks/{name}.ipynb)"
            for name, text in sources.items()
            if result in text or any(x in text for x in ids)
        ]
        lines += [
            f"## {result.removesuffix('.json').replace('_', ' ').capitalize()}",
            "",
            f"Told in {', '.join(quoted)}." if quoted else "",
            "",
            made_by(mine[0].facts()),
            table(
                ["claim", ">mean and interval"],
                [[f"{c.says}<br>`{c.id}`", interval_of(c)] for c in mine],
            ),
        ]
    return "\n".join(lines)


def interval_of(claim: Claim) -> str:
    interval = claim.interval()
    text = str(interval).replace(", ", ",\N{NO-BREAK SPACE}")
    if claims.side(interval) == claims.NOT_SHOWN:
        return f"{text}<br>not shown"
    return f"**{text}**"


def chapters():
    return sorted((ROOT / "notebooks" / "src").glob("[0-9]*.py"))


# --- The laws ---

MARKS = {PASSED: "✓", FAILED: "**✗**", BY_DESIGN: "d", NOT_APPLICABLE: ""}


def board() -> str:
    facts = read("laws_peers.json")
    rows = [row_of(item) for item in facts["rows"]]
    libraries = list(dict.fromkeys(row.library for row in rows))
    lines = [
        "# The leaderboard of losses",
        "",
        f"{len(LAWS)} laws hold for every distillation loss, whoever wrote it. Here "
        "are the verdicts on kdlib's own losses and on those of other libraries, as "
        "`python -m kdlib laws --peers` finds them. The [laws](../kdlib/laws.rst) say "
        "what each asks, why, and which bug it catches.",
        "",
        made_by(facts),
        table(["library", "version", ">losses", *LEDGER], map(counts(rows), libraries)),
        "## The laws",
        "",
        table([">law", "what must hold"], [[x, law.title] for x, law in LAWS.items()]),
        *(f"- {note}" for note in facts["notes"]),
        "",
    ]
    for library in libraries:
        lines += of_library(library, rows, facts)
    return "\n".join(lines)


LEDGER = (">laws asked", ">broken", ">by design")


def row_of(item: dict) -> Row:
    """A row of the result file, as kdlib.leaderboard.as_json wrote it."""
    verdicts = [Verdict(title=LAWS[v["law"]].title, **v) for v in item["verdicts"]]
    return Row(item["library"], item["version"], item["loss"], verdicts)


def counts(rows: list[Row]):
    def line(library: str) -> list[str]:
        mine = [row for row in rows if row.library == library]
        found = {status: set() for status in MARKS}
        for row in mine:
            for verdict in row.verdicts:
                found[verdict.status].add(verdict.law)
        asked = found[PASSED] | found[FAILED] | found[BY_DESIGN]
        numbers = [len(mine), len(asked), len(found[FAILED]), len(found[BY_DESIGN])]
        return [library, mine[0].version, *map(str, numbers)]

    return line


def of_library(library: str, rows: list[Row], facts: dict) -> list[str]:
    mine = [row for row in rows if row.library == library]
    marks = [[r.loss, *(MARKS[v.status] for v in r.verdicts)] for r in mine]
    lines = [
        f"## {library}",
        "",
        "✓ holds, ✗ broken, d departs by design, as stated; empty: not asked.",
        "",
        table(["loss", *LAWS], marks),
    ]
    for text, laws in leaderboard.departures(rows, library).items():
        lines.append(f"- Law {', '.join(laws)} {cell(text)}")
    lines += [f"- Right: {text}" for text in facts["credit"].get(library, ())] + [""]
    for case in facts["checked"].get(library, ()):
        numbers = [[n["case"], n["library"], n["right"]] for n in case["numbers"]]
        lines += [
            f"**Worked by hand, law {', '.join(case['laws'])}** (`{case['source']}`). "
            f"{case['case']}",
            "",
            table(["case", f">{library}", ">right"], numbers),
        ]
    return lines


# --- The doctor ---

ISSUE = re.compile(r"([\w.-]+/[\w.-]+)#(\d+)")


def doctor() -> str:
    facts = read("doctor_confusion.json")
    lines = [
        "# The doctor's table",
        "",
        "`python -m kdlib doctor` names what is wrong with a batch or a run. Here it "
        "was shown faults that were made on purpose, with where such a fault was seen, "
        "and healthy batches and runs, of which it must say nothing.",
        "",
        made_by(facts),
    ]
    for kind, name in (("batch", "Batches"), ("run", "Runs")):
        mine = [row for row in facts["rows"] if row["kind"] == kind]
        tally = Counter(
            (bool(row["expected"]), row["expected"] == row["found"]) for row in mine
        )
        lines += [
            f"## {name}",
            "",
            f"{tally[True, True]} of {tally[True, True] + tally[True, False]} faults "
            f"named; nothing found in {tally[False, True]} of "
            f"{tally[False, True] + tally[False, False]} healthy ones.",
            "",
            table(["case", "what the doctor says"], map(case_line, mine)),
        ]
    return "\n".join(lines)


def case_line(row: dict) -> list[str]:
    says = ", ".join(row["found"]).replace("_", " ") or "nothing found"
    if row["found"] != row["expected"]:
        wanted = ", ".join(row["expected"]).replace("_", " ") or "nothing"
        says = f"**{says}**; right: {wanted}"
    seen = ISSUE.sub(r"[\g<0>](https://github.com/\1/issues/\2)", row["seen"])
    return [f"{row['case']}<br>{seen}" if seen else row["case"], says]
