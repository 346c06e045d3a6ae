"""Markdown of the pages that are made from result files."""

from __future__ import annotations

import re
from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a column whose name begins with > is set to the right."""
    names = [name.removeprefix(">") for name in columns]
    rule = ["---:" if name.startswith(">") else "---" for name in columns]
    lines = [names, rule, *([cell(x) for x in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(text: str) -> str:
    """On one line; a no-break space stays one."""
    return re.sub(r"[ \n]+", " ", text).strip().replace("|", "\\|")


def made_by(facts: dict) -> str:
    """Who made a result file: one line."""
    versions = f"Python {facts['python']}, torch {facts['torch']}"
    command = facts["command"]
    return f"`{command}`, {facts['date']}, on {facts['device']}, {versions}.\n"
