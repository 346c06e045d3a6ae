"""The instructors' guide: its tables, commands and prompts; how slides are cut."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from instructor import slides, syllabus
from kdlib.errors import ArgumentError

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "teach.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def commands(text):
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [line for line in "".join(blocks).splitlines() if line]


# --- Tables ---------------------------------------------------------------------------


def test_the_guide_has_the_tables_of_the_chapters():
    assert syllabus.replaced(GUIDE, syllabus.tables()) == GUIDE


def rows(table):
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def readme():
    """Chapter -> (minutes of reading, of exercises), as the README's table has them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(
        r"^\| \[(\d+) · .* \| (\d+) min \| \d+ min \| (?:\[(\d+) min\]|none)",
        text,
        re.M,
    )
    return {int(n): (int(reading), int(work or 0)) for n, reading, work in found}


def minutes(text):
    hours, rest = re.fullmatch(r"(\d+) h (\d\d) min", text).groups()
    return 60 * int(hours) + int(rest)


@pytest.mark.parametrize("weeks", [3, 6, 12])
def test_the_minutes_of_a_syllabus_add_up(weeks):
    known, totals = readme(), [0, 0, 0]
    assert len(known) == 15
    *body, last = rows(syllabus.syllabus_table(weeks))
    assert [int(row[0]) for row in body] == list(range(1, weeks + 1))
    for _, titles, reading, work, both in body:
        numbers = [int(n) for n in re.findall(r"(?:^|, )(\d+) · ", titles)]
        wanted = [sum(known[n][i] for n in numbers) for i in (0, 1)]
        assert reading == f"{wanted[0]} min" and work == f"{wanted[1]} min"
        assert minutes(both) == sum(wanted)
        totals = [a + b for a, b in zip(totals, [*wanted, sum(wanted)], strict=True)]
    assert [minutes(cell) for cell in last[2:]] == totals
    assert max(minutes(row[4]) for row in body) <= 6 * 60


@pytest.mark.parametrize("weeks", [3, 6, 12])
def test_a_syllabus_brings_no_chapter_before_what_it_builds_on(weeks):
    seen, needed = set(), syllabus.prerequisites()
    for numbers in syllabus.SYLLABI[weeks]:
        for number in numbers:
            assert set(needed[number]) <= seen, (number, needed[number])
            seen.add(number)
    assert weeks < 12 or seen == set(range(15))


def test_what_a_chapter_builds_on_is_what_its_text_names():
    """Two chapters read by hand; the book's own chapter 3 is none of ours."""
    texts = ["As in Chapter 1 and in chapter\n2; next, chapter 5.", "(chapter 3)"]
    assert syllabus.builds_on(4, texts) == [1, 2, 3]
    book = (
        "*Foundations* (arXiv:2501.09223), at chapter 3. chapter 3 (arXiv:2501.09223)"
    )
    assert syllabus.builds_on(4, [book]) == []
    needed = syllabus.prerequisites()
    assert needed[2] == [0] and needed[13] == [1, 5]


def test_the_tables_are_written_between_their_marks(tmp_path, monkeypatch, capsys):
    guide = tmp_path / "teach.md"
    guide.write_text(f"before\n{syllabus.BEGIN}before now\n{syllabus.END}after\n")
    monkeypatch.setattr(syllabus, "GUIDE", guide)
    assert syllabus.main(["--write"]) == 0
    once = guide.read_text()
    assert once.startswith("before\n") and once.endswith("after\n")
    assert "before now" not in once and "### 12 weeks" in once
    assert syllabus.main(["--write"]) == 0 and guide.read_text() == once
    guide.write_text("no marks")
    assert syllabus.main(["--write"]) == 1 and guide.read_text() == "no marks"
    assert "needs the lines" in capsys.readouterr().err


# --- The guide's words ----------------------------------------------------------------


def test_every_goal_path_and_anchor_of_the_guide_exists():
    goals = set(re.findall(r"^([a-z]+):", MAKEFILE, re.M))
    named = set(re.findall(r"\bmake ([a-z]+)", "\n".join(commands(GUIDE))))
    named |= set(re.findall(r"`make ([a-z]+)", GUIDE))
    assert (
        {"quickstart", "lab", "release", "grade", "report", "slides"} <= named <= goals
    )
    for link in re.findall(r"\]\(([^)#\s]+)\)", GUIDE):
        assert link.startswith("https://") or (ROOT / "docs" / link).is_file(), link
    for path in re.findall(r"`((?:tests|exercises|notebooks)/[\w/.]*)`", GUIDE):
        assert (ROOT / path).exists(), path
    titles = re.findall(r"^## (.*)$", GUIDE, re.M)
    anchors = {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
    assert set(re.findall(r"\]\(#([\w-]+)\)", GUIDE)) <= anchors


def test_every_chapter_has_three_prompts():
    body = GUIDE.partition("## Discussion prompts")[2].partition("\n## ")[0]
    parts = re.split(r"^\*\*(\d+) · ([^*]+)\*\*$", body, flags=re.M)[1:]
    titles = {item.number: item.title for item in syllabus.contents.chapters()}
    assert [int(n) for n in parts[::3]] == list(range(1, 15))
    for number, title, prompts in zip(*(parts[i::3] for i in range(3)), strict=True):
        assert title == titles[int(number)]
        asked = re.split(r"^\d\. ", prompts, flags=re.M)[1:]
        assert len(asked) == 3 and all(
            "?" in p or "Write down" in p or "Write the" in p for p in asked
        ), number


def test_what_the_guide_says_of_the_seed_is_true():
    from kdlib import checks
    from kdlib.checks import frame

    known = checks._questions()
    varied = [id for id, q in known.items() if getattr(q, "numbers", None)]
    kept = [id for id, q in known.items() if isinstance(q, frame.Predict)]
    kept = [id for id in kept if id not in varied]
    words = " ".join(GUIDE.split())
    assert f"numbers in {', '.join(varied[:-1])} and {varied[-1]};" in words
    assert f"numbers of {', '.join(kept[:-1])} and {kept[-1]} |" in words
    other = [
        id
        for id, q in known.items()
        if not isinstance(q, (frame.Predict, frame.Choice, frame.Code))
    ]
    assert other == ["9.6"]


# --- The guide, followed --------------------------------------------------------------


def follow(line, folder, environment=()):
    """A line of the guide, in this environment's Python instead of .venv's."""
    done = subprocess.run(
        [*line.split(), f"PY={sys.executable}", "TEACHING=", "COURSE="],
        cwd=folder,
        # Like make, without the virtual environment's own programs.
        env={
            **os.environ,
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(folder),
            **dict(environment),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="grading needs Linux")
def test_an_instructor_follows_the_guide(tmp_path, monkeypatch):
    """Seed, hidden checks, release, two students, grading, report: its own lines."""
    monkeypatch.chdir(ROOT)
    lines = commands(GUIDE)
    (seeded,) = [line for line in lines if line.startswith("KD_CLASS_SEED")]
    release, grade, report = (
        next(line for line in lines if line.startswith(f"make {goal} CH=04"))
        for goal in ("release", "grade", "report")
    )
    seed = re.match(r'KD_CLASS_SEED="([^"]*)"', seeded)[1]
    assert seeded.endswith(release)
    private = tmp_path / "private_checks"
    private.mkdir()
    shutil.copy(ROOT / "tests" / "private_checks" / "ch04.py", private)
    course, handed = tmp_path / "course", tmp_path / "handed_in"
    here = [f"CLASS={course}"]
    both = {"KD_CLASS_SEED": seed, "KD_PRIVATE": str(private)}
    follow(f"{release} {here[0]}", ROOT, both)
    text = (course / "release" / "ch04" / "ch04.ipynb").read_text()
    assert "Hidden checks run at grading" in text and seed not in text
    assert "colab-badge" not in text
    handed.mkdir()
    (handed / "ada_ch04.ipynb").write_text(solved(text, seed, "ch04"))
    (handed / "bob_ch04.ipynb").write_text(text)
    line = grade.replace("SUBMISSIONS=handed_in", f"SUBMISSIONS={handed}")
    told = follow(f"{line} {here[0]}", ROOT, {"KD_PRIVATE": str(private)})
    table = (course / "grades.csv").read_text()
    assert re.search(r"ada", table) and "cell raised" not in told
    again = follow(f"{report} {here[0]}", ROOT)
    points = {
        name: float(p) for name, p in re.findall(r"^  (ada|bob) +([\d.]+)", again, re.M)
    }
    assert points == {"ada": 27.0, "bob": 0.0}
    assert list((course / "feedback" / "ada").rglob("*.html"))


def solved(text, seed, chapter):
    """A released notebook with the right answer to every question of the class."""
    from dataclasses import replace

    from instructor import class_seed, overlay
    from kdlib.checks import _answers, frame

    book = nbformat.reads(text, as_version=4)
    found = overlay._read(ROOT / "tests" / "private_checks" / "ch04.py", chapter)
    for public in class_seed._of(chapter):
        cell = class_seed._cell(book, f"ex-{public.id.replace('.', '-')}-answer")
        question = replace(found.question(public), salt=class_seed.word(seed))
        if isinstance(question, frame.Choice):
            right = {
                item: next(x for x, (said, _) in letters.items() if said)
                for item, letters in question.options().items()
            }
            cell.source = f"{question.name} = {right}"
        elif isinstance(question, frame.Predict):
            cell.source = f"{question.name} = {question.right()}"
        elif public.id in found.variants:
            cell.source = found.variants[public.id].solution
        else:
            cell.source = _answers.of(public.id)["solution"]
    return nbformat.writes(book)


# --- How slides are cut ---------------------------------------------------------------


def texts(notebook):
    return [
        [part.cell.source for part in slide.parts] for slide in slides.slides(notebook)
    ]


def test_a_heading_begins_a_slide_and_long_code_is_left_out():
    book = new_notebook(
        cells=[
            new_markdown_cell(
                "# 1 · A title\n\n[![Open](https://x.y/z.svg)](https://x.y)"
            ),
            new_code_cell('import os\nfind_spec("kdlib")'),
            new_markdown_cell(
                "## One\n\nA sentence ends in\n\n$$x$$\n\nwith a formula."
            ),
            new_code_cell("print(1)", outputs=[new_output("stream", text="1\n")]),
            new_code_cell("\n".join(f"x{n} = {n}" for n in range(30))),
            new_markdown_cell("## Two\n\nNext."),
        ]
    )
    assert texts(book) == [
        ["# 1 · A title"],
        ["## One", "A sentence ends in\n\n$$x$$\n\nwith a formula.", "print(1)"],
        ["## Two", "Next."],
    ]


def test_what_does_not_fit_goes_on_under_the_same_heading():
    long = "\n\n".join(f"Paragraph {n}. " + "word " * 60 for n in range(6))
    cut = slides.slides(new_notebook(cells=[new_markdown_cell(f"## One\n\n{long}")]))
    assert len(cut) > 1 and all(slide.height <= slides.HEIGHT for slide in cut)
    assert [slide.parts[0].cell.source for slide in cut[1:]] == ["### One *…*"] * (
        len(cut) - 1
    )
    said = " ".join(part.cell.source for slide in cut for part in slide.parts)
    assert re.findall(r"Paragraph (\d)", said) == list("012345")


def test_fences_and_quiz_answers_stay_whole():
    text = (
        "Look:\n\n```python\na = 1\n\nb = 2\n```\n\nQ?\n\n<details>x\n\ny\n\n</details>"
    )
    assert slides.blocks(text) == [
        "Look:",
        "```python\na = 1\n\nb = 2\n```",
        "Q?",
        "<details>x\n\ny\n\n</details>",
    ]


def test_no_figure_and_no_paragraph_of_a_chapter_is_lost():
    for source in slides.sources([]):
        book = nbformat.read(source, as_version=4)
        shown = [p.cell for s in slides.slides(book) for p in s.parts]
        pictures = [
            out.data["image/png"]
            for cell in book.cells
            for out in cell.get("outputs", [])
            if "image/png" in out.get("data", {})
        ]
        kept = [
            out.data["image/png"]
            for cell in shown
            for out in cell.get("outputs", [])
            if "image/png" in out.get("data", {})
        ]
        assert kept == pictures, source.name
        words = " ".join(" ".join(cell.source for cell in shown).split())
        for cell in book.cells:
            if cell.cell_type == "markdown":
                for line in slides._BADGE.sub("", cell.source).splitlines():
                    if not slides._SETUP.search(cell.source):
                        assert " ".join(line.split()) in words, (source.name, line)


def test_a_chapter_that_does_not_exist_is_named(capsys):
    with pytest.raises(ArgumentError, match="there is no chapter '99'"):
        slides.sources(["99"])
    assert slides.main(["4x"]) == 1 and "name one of 0 to 14" in capsys.readouterr().err
    assert [path.name for path in slides.sources(["04"])] == ["04_cross_entropy.ipynb"]


def test_a_page_loads_nothing(tmp_path):
    path = slides.write(slides.sources(["01"])[0], tmp_path / "a folder")
    page = path.read_text(encoding="utf-8")
    assert not re.search(
        r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']?http""", page
    )
    assert "Why distil" in page and "MathJax" in page and "data:image/png" in page
    again = slides.write(slides.sources(["01"])[0], tmp_path / "b")
    assert again.read_bytes() == path.read_bytes()
