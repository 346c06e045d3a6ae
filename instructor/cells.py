"""What can be said of a notebook's cell by reading it."""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from dataclasses import dataclass
from datetime import datetime

from nbformat import NotebookNode

from kdlib import checks

PART = re.compile(r"ex-(\d+)-(\d+)-(answer|check|task)")  # ids of exercises/build.py
_KEPT = ("%%time", "%%timeit", "%%capture", "%%prun")  # around Python, not in its place


@dataclass(frozen=True)
class Remark:
    """A line for the report: what kind of thing, in words, at which question."""

    kind: str
    said: str
    question: str | None = None


@functools.cache
def names() -> dict[str, str]:
    """The name that an answer defines -> its question, where only one has that name."""
    pairs = [(question.name, id) for id, question in checks._questions().items()]
    count = Counter(name for name, _ in pairs)
    return {name: id for name, id in pairs if count[name] == 1}


def grade_id(cell: NotebookNode) -> str:
    entry = cell.metadata.get("nbgrader")
    return str(entry.get("grade_id", "")) if isinstance(entry, dict) else ""


def plain(source: str) -> str:
    """A cell as Python: lines of IPython's own are commented out."""
    if _parses(source):
        return source
    first = source.lstrip().partition("\n")[0].strip()
    if first.startswith("%%") and first.split()[0] not in _KEPT:
        return "".join(f"# {line}\n" for line in source.splitlines())
    return re.sub(r"^(?=[ \t]*[%!])", "pass  # ", source, flags=re.M)


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def defined(source: str) -> set[str]:
    """The names that a cell's top level defines."""
    try:
        body = ast.parse(plain(source)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pattern = r"^(?:def\s+)?([A-Za-z_]\w*)\s*(?:\(|=(?!=)|:)"
        return set(re.findall(pattern, source, re.M))
    found = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            found |= {
                x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name)
            }
    return found


def code(source: str) -> str:
    """A cell without comments, and written one way."""
    try:
        return ast.unparse(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return re.sub(r"^\s*#.*$", "", source, flags=re.M)


def bare(text: str) -> str:
    """Without the blanks that editors add and take away."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


PAUSE = 15  # minutes without a cell being run: no work is counted then


def minutes(notebook: NotebookNode) -> float | None:
    """Minutes at work, at least; None where Jupyter did not record any.

    JupyterLab writes the time of each cell's last run where "Record timing" is set.
    Time before the first one, and longer pauses, are not in it.
    """
    found = []
    for cell in notebook.cells:
        timing = cell.metadata.get("execution")
        text = timing.get("iopub.execute_input") if isinstance(timing, dict) else None
        try:
            found.append(datetime.fromisoformat(str(text).replace("Z", "+00:00")))
        except ValueError:
            continue
    if len(found) < 2:
        return None
    found = sorted(when.timestamp() for when in found)
    gaps = [(b - a) / 60 for a, b in zip(found, found[1:], strict=False)]
    return round(sum(gap for gap in gaps if gap <= PAUSE), 1)
