"""A class's seed: its own inputs, letters and numbers, the same at release and grading.

KD_CLASS_SEED is any text, secret and new every year. `class.json` in the course folder
keeps, by chapter, the seed and what the release promised. So grading needs no variable,
and refuses to grade with other questions than those that were released.

From the seed comes a word that the released notebook bears. Letters and numbers are
drawn from that word, which students may know; inputs of functions from the seed itself,
which they may not.

Knows: notebooks as exercises/build.py writes them. Does not know: nbgrader.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from instructor import overlay
from kdlib import checks
from kdlib.checks.frame import Choice, Predict, Question
from kdlib.errors import DataError
from kdlib.ledger import write_text

_ITEM = re.compile(r"^\*\*([a-z])\.\*\* ")
_OPTION = re.compile(r"^- \*\*([A-Z])\*\* ", re.M)
_BADGE = re.compile(r"\[!\[Open in Colab\].*\n\n")
_REASON = re.compile(r"\n  > (?:right|wrong): .*(?:\n  > .*)*")


def word(seed: str) -> str:
    """What of the seed a student may see."""
    return hashlib.sha256(seed.encode()).hexdigest()[:8] if seed else ""


def prepare(course: Path, chapter: str, notebook: NotebookNode) -> NotebookNode:
    """The notebook to release, and a line in class.json about it.

    Raises DataError where the overlay is not sound.
    """
    seed = os.environ.get("KD_CLASS_SEED", "")
    found = overlay.load(chapter)
    new = rewritten(notebook, chapter, seed, found)
    known = _read(course)
    known[chapter] = {"seed": seed} | _promised(found)
    write_text(course / "class.json", json.dumps(known, indent=1) + "\n")
    return new


def questions(course: Path | None, chapter: str) -> dict[str, Question]:
    """The questions to grade a chapter by, as they were released in the course.

    Raises DataError where class.json, KD_CLASS_SEED and KD_PRIVATE disagree.
    """
    known = _read(course) if course else {}
    entry = known.get(chapter, {"seed": ""})
    seed, given = entry["seed"], os.environ.get("KD_CLASS_SEED")
    release = f"make release CH={chapter.removeprefix('ch')}"
    if course and given is not None and given != seed:
        raise DataError(
            f"{chapter} was not released with this KD_CLASS_SEED",
            f"unset it (class.json of {course} keeps the seed), or run {release} again",
        )
    found = overlay.load(chapter)
    promised = {key: entry.get(key, []) for key in ("hidden", "private")}
    if _promised(found) != promised:
        raise DataError(
            f"{chapter} was released with hidden checks for "
            f"{_listed(promised['hidden'])} and with private questions "
            f"{_listed(promised['private'])}; KD_PRIVATE now has "
            f"{_listed(_promised(found)['hidden'])} and "
            f"{_listed(_promised(found)['private'])}",
            f"set KD_PRIVATE to that folder, or run {release} again",
        )
    return {
        question.id: _seeded(found.question(question), seed)
        for question in _of(chapter)
    }


def _seeded(question: Question, seed: str) -> Question:
    seen = isinstance(question, (Choice, Predict))
    return replace(question, salt=word(seed) if seen else seed)


def _of(chapter: str) -> list[Question]:
    number = str(int(chapter.removeprefix("ch")))
    known = checks._questions().values()
    return [q for q in known if q.id.partition(".")[0] == number]


def _promised(found: overlay.Overlay) -> dict[str, list[str]]:
    hidden = [id for id, more in found.hidden.items() if more.tests]
    return {"hidden": sorted(hidden), "private": sorted(found.variants)}


def _listed(ids: list[str]) -> str:
    return ", ".join(ids) or "none"


def _read(course: Path) -> dict:
    path = course / "class.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__})",
            "restore it: without it nobody knows what was released",
        ) from None


# --- The notebook ---------------------------------------------------------------------


def rewritten(
    notebook: NotebookNode, chapter: str, seed: str, found: overlay.Overlay
) -> NotebookNode:
    """The student's notebook with a class's letters, numbers and questions.

    Without a seed and an overlay it is the same notebook.
    """
    promised = _promised(found)
    if not seed and not any(promised.values()):
        return notebook
    new = nbformat.from_dict(notebook)
    for public in _of(chapter):
        part = "-".join(["ex", *public.id.split(".")])
        question = _seeded(found.question(public), seed)
        if public.id in found.variants:
            _put_variant(new, part, found.variants[public.id])
        if isinstance(question, Choice):
            for cell in _options(new, part):
                item = _ITEM.match(cell.source)[1]
                cell.source = relettered(cell.source, question.letters()[item])
        elif isinstance(question, Predict):
            task = _cell(new, f"{part}-task")
            task.source = renumbered(task.source, question)
    # The badge opens the public notebook, with other letters and numbers.
    new.cells[0].source = _BADGE.sub("", new.cells[0].source)
    imports = _cell(new, f"{chapter}-imports")
    given = [repr(word(seed)).replace("'", '"')]
    given += [f"{key}={ids}".replace("'", '"') for key, ids in promised.items() if ids]
    imports.source += f"\n\nchecks.for_class({', '.join(given)})"
    if any(promised.values()):
        note = nbformat.v4.new_markdown_cell(_note(promised), id="hidden-checks")
        new.cells.insert(new.cells.index(imports), note)
    return new


def relettered(text: str, letters: dict[str, str]) -> str:
    """An item with its options in another order.

    letters: the new letter -> the letter that the option has in `text`
    """
    head, *parts = _OPTION.split(text)
    bodies = dict(zip(parts[::2], (x.rstrip() for x in parts[1::2]), strict=True))
    return head + "\n".join(
        f"- **{new}** {bodies[old]}" for new, old in letters.items()
    )


def renumbered(text: str, question: Predict) -> str:
    """A task with the class's numbers in the place of the course's own.

    Raises DataError where a phrase does not stand there exactly once.
    """
    public = vars(replace(question, salt="").drawn())
    drawn = vars(question.drawn())
    for phrase in question.phrases:
        said, new = phrase.format(**public), phrase.format(**drawn)
        pattern = r"\s+".join(map(re.escape, said.split()))
        text, count = re.subn(pattern, lambda _, new=new: new, text)
        if count != 1:
            raise DataError(
                f"the task of {question.id} says {said!r} {count} times",
                "a phrase must stand there once: see kdlib/checks",
            )
    return text


def _cell(notebook: NotebookNode, id: str) -> NotebookNode:
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("grade_id") == id:
            return cell
    raise DataError(f"the exercises have no cell {id}", "run exercises/build.py")


def _between(notebook: NotebookNode, part: str) -> tuple[int, int]:
    task, answer = (_cell(notebook, f"{part}-{x}") for x in ("task", "answer"))
    return notebook.cells.index(task) + 1, notebook.cells.index(answer)


def _options(notebook: NotebookNode, part: str) -> list[NotebookNode]:
    begin, end = _between(notebook, part)
    return [cell for cell in notebook.cells[begin:end] if _ITEM.match(cell.source)]


def _put_variant(notebook: NotebookNode, part: str, variant: overlay.Variant) -> None:
    task, answer = (_cell(notebook, f"{part}-{x}") for x in ("task", "answer"))
    head = "\n\n".join(task.source.split("\n\n")[:2])  # the title, and what it is worth
    task.source = f"{head}\n\n{variant.task.strip()}"
    answer.source = variant.stub.strip()
    begin, end = _between(notebook, part)
    items = re.split(
        r"^(?=\*\*[a-z]\.\*\* )", _REASON.sub("", variant.options), flags=re.M
    )
    notebook.cells[begin:end] = [
        nbformat.v4.new_markdown_cell(text.strip(), id=f"{part}-item-{number}")
        for number, text in enumerate(items)
        if text.strip()
    ]


def _note(promised: dict[str, list[str]]) -> str:
    lines = []
    if promised["hidden"]:
        lines.append(
            f"**Hidden checks run at grading**, for {_listed(promised['hidden'])}. "
            "The checks below show\na part of what is asked; all of it together is "
            "worth the printed points."
        )
    if promised["private"]:
        lines.append(
            f"Your class has questions of its own: {_listed(promised['private'])}. "
            "They are checked when the\nclass is graded; here their checks only say so."
        )
    return "\n\n".join(lines)
