"""Notebooks in whatever folder a learning platform exports.

Understood are a folder a student (Moodle, Gradescope, nbgrader's own), files whose
names begin with the student (Canvas, Blackboard, by hand), and zip files of either, in
one another. Who a notebook belongs to is read from its path alone.

Knows: paths, zip files, which chapter a notebook answers. Does not know: answers.
"""

from __future__ import annotations

import io
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath

import nbformat
from nbformat import NotebookNode

from instructor.cells import Remark, defined, grade_id, names
from kdlib.errors import DataError
from kdlib.progress import CHECK

LARGEST = 64 << 20  # bytes of one file
DEEPEST = 4  # zip files in zip files
SKIPPED = ("__MACOSX", ".ipynb_checkpoints", ".git", ".venv")
# Folders that say nothing about who handed something in.
GENERIC = re.compile(
    r"(ch|chapter|hw|assignment|week)[-_ ]?\d+|submi\w+|exercises?", re.I
)

_CANVAS = re.compile(r"(?P<who>[^_]+)(?P<late>_LATE)?_(?P<id>\d+)_\d+_(?P<file>.+)")
_MOODLE = re.compile(r"(?P<who>.+?)_(?P<id>\d+)_assignsubmission_\w+?_?$")
_BLACKBOARD = re.compile(
    r".+?_(?P<who>[^_]+)_attempt_(?P<when>\d{4}(?:-\d\d){5})(?:_(?P<file>.+))?"
)
_COPY = re.compile(r"(?:-| \(|_)(\d+)\)?$")


@dataclass
class Submission:
    """What one student handed in for a chapter; `notebook` is None where nothing can
    be graded, and a remark says why."""

    student: str
    where: str = ""
    notebook: NotebookNode | None = None
    remarks: list[Remark] = field(default_factory=list)


@dataclass(frozen=True)
class _File:
    path: PurePosixPath  # below the folder; a zip file counts as a folder
    when: datetime
    raw: bytes | None  # None where it is no notebook, or cannot be read
    fault: str = ""

    @property
    def order(self) -> tuple:
        """Later handed in, by its name first, then by the time of the file."""
        said = _BLACKBOARD.match(self.path.stem)
        copy = _COPY.search(self.path.stem)
        number = int(copy[1]) if copy and len(copy[1]) < 3 else 0
        return (said["when"] if said else "", number, self.when, str(self.path))


def collect(folder: str | Path, chapter: str) -> list[Submission]:
    """One Submission a student, sorted.

    chapter: "ch04"

    Raises DataError where the folder is missing or holds nothing.
    """
    folder = Path(folder)
    if not folder.exists():
        raise DataError(
            f"there is no folder {folder}",
            "name the folder of submissions: make grade CH=04 SUBMISSIONS=folder",
        )
    files = list(_files(folder))
    if not files:
        raise DataError(
            f"{folder} holds no files",
            "put the files there as the learning platform exports them",
        )
    found: dict[str, list[_File]] = {}
    for student, file in _by_student(files):
        found.setdefault(student, []).append(file)
    return [_chosen(student, found[student], chapter) for student in sorted(found)]


# --- Files ----------------------------------------------------------------------------


def _files(folder: Path) -> Iterator[_File]:
    if folder.is_file():
        yield from _opened(folder, PurePosixPath(folder.name))
        return
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        hidden = any(part in SKIPPED or part.startswith(".") for part in below.parts)
        if path.is_file() and not path.is_symlink() and not hidden:
            yield from _opened(path, PurePosixPath(*below.parts))


def _opened(path: Path, name: PurePosixPath) -> Iterator[_File]:
    when = datetime.fromtimestamp(path.stat().st_mtime)
    if path.stat().st_size > LARGEST:
        yield _File(name, when, None, f"is larger than {LARGEST >> 20} MiB")
        return
    try:
        raw = path.read_bytes()
    except OSError as error:
        yield _File(name, when, None, f"cannot be read ({error.strerror})")
        return
    yield from _unpacked(name, when, raw, DEEPEST)


def _unpacked(name, when, raw: bytes, depth: int) -> Iterator[_File]:
    if name.suffix.lower() != ".zip":
        yield _File(name, when, raw if name.suffix.lower() == ".ipynb" else None)
        return
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as packed:
            for entry in packed.infolist():
                parts = PurePosixPath(entry.filename.replace("\\", "/")).parts
                below = name.with_suffix("").joinpath(*(p for p in parts if p != ".."))
                hidden = any(p in SKIPPED or p.startswith("._") for p in parts)
                if entry.is_dir() or hidden:
                    continue
                then = datetime(*entry.date_time)
                if entry.file_size > LARGEST or not depth:
                    yield _File(below, then, None, "is too large, or packed too deep")
                else:
                    yield from _unpacked(below, then, packed.read(entry), depth - 1)
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError) as error:
        told = f"cannot be unpacked ({type(error).__name__})"
        yield _File(name, when, None, told)


# --- Whose ----------------------------------------------------------------------------


def _by_student(files: list[_File]) -> Iterator[tuple[str, _File]]:
    folders = [_telling(file.path.parent.parts) for file in files]
    notebooks = [f for f, file in zip(folders, files, strict=True) if file.raw]
    shared = os.path.commonprefix(notebooks or folders)
    taken: dict[str, str] = {}
    for parts, file in zip(folders, files, strict=True):
        rest = parts[len(shared) :] if parts[: len(shared)] == shared else parts
        if rest:
            raw = _from_folder(rest[0])
        elif _from_name(file.path.stem):
            raw = _from_name(file.path.stem)
        elif parts:  # a single student's folder
            raw = _from_folder(parts[-1])
        elif file.raw is None:
            continue  # a list of grades beside the folders, say
        else:
            raw = file.path.stem
        id = re.sub(r"[^\w.@-]+", "_", raw).strip("._") or "student"
        while taken.setdefault(id.casefold(), raw) != raw:
            id += "_2"  # another student's name that looks alike
        yield id, file


def _telling(parts: tuple[str, ...]) -> list[str]:
    return [part for part in parts if not GENERIC.fullmatch(part)]


def _from_folder(part: str) -> str:
    moodle = _MOODLE.fullmatch(part)
    return f"{moodle['who']}_{moodle['id']}" if moodle else part


def _from_name(stem: str) -> str:
    for pattern in (_BLACKBOARD, _CANVAS):
        found = pattern.fullmatch(stem)
        if found:
            id = found.groupdict().get("id")
            return f"{found['who']}_{id}" if id else found["who"]
    stem = _COPY.sub("", stem) if not stem.isdigit() else stem
    return re.sub(r"[-_ ]*(ch|chapter)[-_ ]?\d+.*$", "", stem, flags=re.I)


# --- Which ----------------------------------------------------------------------------


def _chosen(student: str, files: list[_File], chapter: str) -> Submission:
    found = Submission(student)
    right: list[tuple[_File, NotebookNode]] = []
    others: list[str] = []
    for file in sorted(files, key=lambda file: file.order, reverse=True):
        if file.fault:
            found.remarks.append(Remark("unreadable", f"{file.path} {file.fault}."))
        if file.raw is None:
            continue
        try:
            notebook = _parsed(file.raw)
        except ValueError as error:
            told = f"{file.path} is no readable notebook: {error}."
            found.remarks.append(Remark("unreadable", told))
            continue
        chapters = answers_chapters(notebook)
        if chapter in chapters:
            right.append((file, notebook))
        else:
            what = (
                f"answers {', '.join(chapters)}" if chapters else "holds no exercises"
            )
            others.append(f"{file.path} {what}")
    if right:
        file, found.notebook = right[0]
        found.where = str(file.path)
        if len(right) > 1:
            told = f"{len(right)} notebooks; the newest counts: {file.path}."
            found.remarks.append(Remark("several notebooks", told))
        canvas = _CANVAS.fullmatch(file.path.stem)
        if canvas and canvas["late"]:
            told = "The learning platform marked it as late."
            found.remarks.append(Remark("late", told))
    elif others:
        told = f"Nothing for {chapter}: {'; '.join(others)}."
        found.remarks.append(Remark("wrong chapter", told))
    elif not found.remarks:
        names = ", ".join(file.path.name for file in files[:3])
        told = f"No notebook among {len(files)} files: {names}."
        found.remarks.append(Remark("no notebook", told))
    return found


def _parsed(raw: bytes) -> NotebookNode:
    """Raises ValueError, with a sentence's end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            notebook = nbformat.reads(raw.decode("utf-8-sig"), as_version=4)
            # Everything that is looked at later; an odd file fails here.
            for cell in notebook.cells:
                if not isinstance(cell.source, str):
                    raise ValueError("a cell without text")
                if not isinstance(cell.setdefault("metadata", NotebookNode()), dict):
                    cell.metadata = NotebookNode()
        except RecursionError:
            raise ValueError("nested too deep") from None
        except Exception as error:
            raise ValueError(f"{type(error).__name__}") from None
    return notebook


def answers_chapters(notebook: NotebookNode) -> list[str]:
    """The chapters whose questions a notebook answers: by its checks and ids, and where
    it has none by the names that it defines."""
    found, named = set(), set()
    for cell in notebook.cells:
        found |= {match[1] for match in CHECK.finditer(cell.source)}
        numbered = re.match(r"ex-(\d+)-\d+-", grade_id(cell))
        found |= {f"{numbered[1]}.0"} if numbered else set()
        if cell.cell_type == "code":
            named |= {names()[name] for name in defined(cell.source) & set(names())}
    return sorted({f"ch{int(id.partition('.')[0]):02}" for id in found or named})
