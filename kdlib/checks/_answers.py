"""Hints, solutions and explained options, encoded so that nobody reads them by chance.

exercises/build.py writes kdlib/data/checks/chNN.txt from the exercises' source: JSON in
base64. Whoever wants to cheat can decode it, as they can open exercises/solutions. It
is out of the way of tab completion, a search and an editor's preview, no more.
"""

from __future__ import annotations

import base64
import json
import textwrap
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "data" / "checks"


def chapters() -> list[str]:
    """The chapters that have exercises: ch01, ..."""
    return sorted(path.stem for path in FOLDER.glob("ch*.txt"))


def of(question: str) -> dict:
    """{"hints": [...], "solution": ..., "note": ..., "options": ...} of a question.

    options: item -> letter -> [whether it is right, why]; empty but for choices
    """
    chapter = f"ch{int(question.partition('.')[0]):02}"
    return decode((FOLDER / f"{chapter}.txt").read_text())[question]


def encode(content: dict) -> str:
    raw = json.dumps(content, ensure_ascii=False, sort_keys=True).encode()
    return "\n".join(textwrap.wrap(base64.b64encode(raw).decode(), 76)) + "\n"


def decode(text: str) -> dict:
    return json.loads(base64.b64decode(text))
