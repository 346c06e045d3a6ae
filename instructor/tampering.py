"""Code that has no business in an answer.

Only names what it finds: that a submission tampers changes no grade, its own neither.
The checks are the grader's own and run in the grader's process, so there is nothing to
be won by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from instructor.cells import Remark, bare, code

_READS = "reads the solution"
_TAMPERS = "tampering"
_SIGNS = [
    (_READS, r"\bchecks\s*\.\s*solution\b", "calls checks.solution"),
    (_READS, r"solutions?[/\\'\", ]+ch\d\d", "names a file of solutions"),
    (_READS, r"exercises[/\\'\", ]+solutions", "names the folder of solutions"),
    (_READS, r"data[/\\'\", ]+checks", "names the checkers' data"),
    (_READS, r"\b_answers\b", "reaches for the checkers' data"),
    (_READS, r"\bchecks\s*(\.|import)\s*\(?\s*ch\d\d\b", "reaches into a checker"),
    (_READS, r"\.\s*truth\b|\bQUESTIONS\b", "reaches for a checker's truth"),
    (_READS, r"\bkdlib\.checks\.(losses|suite|frame)\b", "reaches into the checkers"),
    (_TAMPERS, r"\bchecks(\.\w+)+\s*=(?!=)", "assigns to kdlib.checks"),
    (_TAMPERS, r"\b(setattr|delattr|patch\.object)\(\s*checks", "patches kdlib.checks"),
    (_TAMPERS, r"\bkdlib(\.\w+)+\s*=(?!=)", "assigns to kdlib"),
    (_TAMPERS, r"sys\.modules\s*(\[|\.)", "edits sys.modules"),
    (_TAMPERS, r"NBGRADER_\w+", "looks for the grader's variables"),
    (_TAMPERS, r"gradebook|nbgrader", "names nbgrader's files"),
    (
        _TAMPERS,
        r"\bgc\.get_(objects|referrers)|\bsys\._getframe",
        "searches the memory",
    ),
    (_TAMPERS, r"\binstructor\b", "reaches for the grader"),
]
OPENED = {  # what the room's witness saw -> words
    "exercises/solutions": "opened a file of solutions",
    "data/checks": "opened the checkers' data",
    "kdlib/checks/ch": "opened a checker",
    "wrong_answers": "opened the course's own tests",
}


def found(sources: Iterable[str], released: set[str]) -> list[Remark]:
    """Remarks on a notebook's code, comments and released cells left out."""
    seen: dict[tuple[str, str], Remark] = {}  # one for each kind and line
    for source in sources:
        if bare(source) in released:
            continue
        text = code(source)
        for kind, pattern, what in _SIGNS:
            match = re.search(pattern, text)
            if match:
                begin = match[0].partition("\n")[0]
                line = next(line for line in text.splitlines() if begin in line)
                told = f"It {what}: `{line.strip()[:80]}`. No grade changed by that."
                seen.setdefault((kind, line), Remark(kind, told))
    return list(seen.values())


def opened(saw: Iterable[str]) -> list[Remark]:
    said = {OPENED.get(part, f"imported {part}") for part in saw}
    return [
        Remark(_READS, f"While it ran it {what}, or tried to.") for what in sorted(said)
    ]
