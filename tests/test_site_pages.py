"""What docs/build.py writes for Sphinx: docstrings, links, notebooks, files."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("site_build", ROOT / "docs" / "build.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
import docstrings  # noqa: E402  docs/ is on the path now


def rst(text: str) -> str:
    return "\n".join(docstrings.to_rst(text.splitlines())).rstrip()


# --- Docstrings ---


def test_entries_of_a_docstring_become_a_list_of_definitions():
    text = """Train it.

pairs, batch: the examples,
              encoded once
Limits:       0 where p_s = p_t
Raises DataError where there is none."""
    assert rst(text) == (
        "Train it.\n\n"
        "``pairs``, ``batch``\n    the examples,\n    encoded once\n\n"
        "**Limits**\n    0 where p_s = p_t\n\n"
        "Raises DataError where there is none."
    )


@pytest.mark.parametrize(
    "sentence",
    [
        "The objective: a divergence and hard labels.",
        "Knows: how far one is from the other, for each\n"
        "token. Does not know masks: objective.py does.",
        "A run goes on where it ended, and so does this\nsentence: it is one.",
    ],
)
def test_a_sentence_with_a_colon_stays_a_sentence(sentence):
    assert rst(f"{sentence}") == sentence
    assert rst(f"First.\n\n{sentence}") == f"First.\n\n{sentence}"


def test_what_is_indented_is_shown_as_it_stands():
    text = "Every function has the form,\n\n    f(*x) -> y\n\n      z | w\n\nwith y."
    assert rst(text) == (
        "Every function has the form,\n\n"
        ".. code-block:: text\n\n       f(*x) -> y\n   \n         z | w\n\nwith y."
    )


def test_marks_of_restructuredtext_in_a_docstring_are_text():
    assert rst("`a_b` is *not* KL(p || q) of name_ or 2\\n") == (
        r"``a_b`` is \*not\* KL(p \|\| q) of name\_ or 2\\n"
    )


# --- Links ---

SLUG = make.REPOSITORY.removeprefix("https://github.com/")
PAGES = {
    "notebooks/00_quickstart.ipynb",
    "docs/past_one_node.md",
    "exercises/ch01.ipynb",
}


@pytest.mark.parametrize(
    ("written", "on_the_site"),
    [
        (
            "see `exercises/ch01.ipynb`.",
            "see [`exercises/ch01.ipynb`](../exercises/ch01.ipynb).",
        ),
        (
            "[exercises](../exercises/ch01.ipynb#a)",
            "[exercises](../exercises/ch01.ipynb#a)",
        ),
        (
            "[maker](../kdlib/train.py)",
            f"[maker]({make.REPOSITORY}/blob/main/kdlib/train.py)",
        ),
        ("[all](../exercises)", f"[all]({make.REPOSITORY}/tree/main/exercises)"),
        ("[out](https://example.org/x) [here](#x)", None),
        ("`notebooks/no_such.ipynb` [no](no_such.md)", None),
    ],
)
def test_links_lead_to_the_site_or_to_the_repository(written, on_the_site):
    assert make.linked(written, "docs", PAGES) == (on_the_site or written)


def test_the_badge_s_picture_is_on_another_host_and_goes(tmp_path):
    name = "notebooks/05_kl_divergence.ipynb"
    assert "colab-badge.svg" in (ROOT / name).read_text("utf-8")
    shown = make.notebook(ROOT / name)
    assert "colab-badge.svg" not in str(shown)
    assert f"[Open in Colab](https://colab.research.google.com/github/{SLUG}" in str(
        shown
    )


@pytest.mark.parametrize("name", ["notebooks/14_capstone", "exercises/ch01"])
def test_the_first_code_cell_is_folded_and_no_other(name):
    cells = make.notebook(ROOT / f"{name}.ipynb").cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    folded = ["hide-input" in cell.metadata.get("tags", []) for cell in code]
    assert folded == [True] + [False] * (len(code) - 1)


# --- Files ---


@pytest.mark.parametrize("content", [None, "{", '{"cells": [}'])
def test_a_notebook_that_cannot_be_read_is_named_with_the_remedy(
    content, tmp_path, monkeypatch
):
    monkeypatch.setattr(make, "ROOT", tmp_path)
    if content is not None:
        (tmp_path / "x.ipynb").write_text(content)
    with pytest.raises(make.SiteError, match=r"x\.ipynb cannot be read.*\n.*notebooks"):
        make.notebook(tmp_path / "x.ipynb")


def test_the_front_page_needs_its_marks(tmp_path, monkeypatch):
    (tmp_path / "index.md").write_text("# Title\n\n<!-- chapters -->\n")
    monkeypatch.setattr(make, "DOCS", tmp_path)
    with pytest.raises(make.SiteError, match="<!-- contents --> once"):
        make.index([], {})


def test_pages_that_are_the_same_keep_their_date_and_others_go(tmp_path):
    make.write(
        {"a/same.md": "same", "a/other.md": "old", "gone.png": b"\x00"}, tmp_path
    )
    for path in tmp_path.rglob("*.md"):
        os.utime(path, (1, 1))
    make.write({"a/same.md": "same", "a/other.md": "new"}, tmp_path)
    assert (tmp_path / "a" / "same.md").stat().st_mtime == 1
    assert (tmp_path / "a" / "other.md").read_text() == "new"
    assert (tmp_path / "a" / "other.md").stat().st_mtime > 1
    assert not (tmp_path / "gone.png").exists()


def test_every_room_is_on_one_floor_of_the_reference():
    rooms = [room for floor in make.reference.rooms() for room in floor]
    there = {path.stem for path in (ROOT / "kdlib").glob("*.py")}
    there |= {path.parent.name for path in (ROOT / "kdlib").glob("*/__init__.py")}
    assert sorted(rooms) == sorted(there - {"__init__", "__main__"})
    assert rooms.index("errors") < rooms.index("divergences") < rooms.index("train")
    assert not any(part.startswith("ch0") for part in make.reference.parts("checks"))
