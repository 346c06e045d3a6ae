"""The README's table of chapters is that of the chapters."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

spec = importlib.util.spec_from_file_location(
    "contents", ROOT / "notebooks" / "contents.py"
)
contents = importlib.util.module_from_spec(spec)
spec.loader.exec_module(contents)

SOURCE = """\
# %% [markdown]
# # 3 · A title
#
# | what it costs | |
# |---|---|
# | two CPU cores | 2 minutes |

# %% [markdown]
# ## What you will be able to do
#
# 1. Say one thing
#    over two lines.
# 2. Compute another.
#
# More text.

# %%
print(1)
"""


@pytest.fixture
def source(tmp_path):
    def write(text):
        path = tmp_path / "03_title.py"
        path.write_text(text)
        return path

    return write


def test_the_readme_has_the_table():
    readme = contents.README.read_text("utf-8")
    table = contents.table(contents.chapters())
    assert contents.BEGIN + table + contents.END in readme


def test_a_chapter_is_read(source):
    found = contents.chapter(source(SOURCE + "\n# %% [markdown]\n# " + "word " * 950))
    assert (found.number, found.title, found.run) == (3, "A title", "2 minutes")
    assert found.objectives == ["Say one thing over two lines", "Compute another"]
    assert found.reading == 10  # 950 words and a cell, to the nearest five minutes


def test_the_table_links_the_chapter_and_its_exercises(source, monkeypatch, tmp_path):
    monkeypatch.setattr(contents, "ROOT", tmp_path)
    chapter = contents.chapter(source(SOURCE))
    assert contents.table([chapter]).endswith(
        "| [3 · A title](notebooks/03_title.ipynb) | Say one thing over two lines; "
        "Compute another | 0 min | 2 min | none |\n"
    )
    exercises = tmp_path / "exercises" / "src" / "ch03.py"
    exercises.parent.mkdir(parents=True)
    line = "# **3.1** · code · difficulty 1/5 · importance 1/5 · {} minutes · 4 points"
    exercises.write_text(f"{line.format(15)}\n{line.format(20)}\n")
    assert "| [35 min](exercises/ch03.ipynb) |" in contents.table(
        [contents.chapter(source(SOURCE))]
    )


@pytest.mark.parametrize(
    "gone",
    ["# # 3 · A title\n", "# | two CPU cores | 2 minutes |\n", "# 1. Say one thing\n"],
)
def test_what_a_chapter_lacks_is_named(source, gone):
    with pytest.raises(contents.ContentsError, match="03_title.py has no"):
        contents.chapter(source(SOURCE.replace(gone, "# \n")))


def test_a_readme_without_marks_is_left_alone(monkeypatch, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("no marks")
    monkeypatch.setattr(contents, "README", readme)
    assert contents.main(["--write"]) == 1
    assert (
        readme.read_text() == "no marks"
        and "needs the lines" in capsys.readouterr().err
    )


def test_writing_twice_gives_the_same(monkeypatch, tmp_path):
    readme = tmp_path / "README.md"
    text = "before\n" + contents.BEGIN + "| of before |\n" + contents.END + "after\n"
    readme.write_text(text)
    monkeypatch.setattr(contents, "README", readme)
    assert contents.main(["--write"]) == 0
    once = readme.read_text()
    assert contents.main(["--write"]) == 0
    assert readme.read_text() == once
    assert once.startswith("before\n") and once.endswith("after\n")
    assert "of before" not in once
