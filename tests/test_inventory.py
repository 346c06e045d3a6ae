"""The concept inventory: ten questions, three options each, a key with reasons."""

from __future__ import annotations

import re
from pathlib import Path

TEXT = Path(__file__).parents[1] / "docs" / "concept_inventory.md"


def test_the_inventory_has_ten_questions_a_key_and_reasons():
    questions, key = TEXT.read_text(encoding="utf-8").split("## Key and reasons")
    asked = re.split(r"^\*\*(\d+)\.\*\* ", questions, flags=re.M)[1:]
    assert asked[::2] == [str(n) for n in range(1, 11)]
    for body in asked[1::2]:
        assert re.findall(r"^- \*\*(.)\*\*", body, re.M) == list("ABC")
    answers = re.findall(r"^(\d+)\. \*\*([ABC])\.\*\* \w+", key, re.M)
    assert [number for number, _ in answers] == asked[::2]
    counts = [sum(letter == x for _, letter in answers) for x in "ABC"]
    assert max(counts) <= 5, "whoever guesses one letter must not pass"
