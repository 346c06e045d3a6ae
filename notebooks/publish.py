"""What is the same in every notebook: where it is published, and its first code cell.

    python notebooks/publish.py             write both, wherever they stand
    python notebooks/publish.py --check     exit 1 where they differ

`repository` in pyproject.toml says where the course is published. Badges follow it, in
the sources, the notebooks and the README, and so does the first code cell. No notebook
is run: that cell shows nothing, and the others keep their outputs.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

FIRST_CELL = """\
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://github.com/{repository}.git"
if importlib.util.find_spec("kdlib") is None:
    here = [Path.cwd(), *Path.cwd().parents, Path("kdlib-course")]
    clones = [p for p in here if (p / "kdlib" / "errors.py").exists()]
    if not clones:  # neither installed nor inside a clone
        source = os.environ.get("KD_REPO", REPOSITORY)
        command = f'git clone --depth=1 "{{source}}" kdlib-course'
        failed, said = subprocess.getstatusoutput(command)
        if failed:
            way_out = "Needed: git and a network (Kaggle: Settings, Internet)."
            way_out += " Delete kdlib-course if it is here. Run this again."
            raise SystemExit(f"{{command}}\\n{{said}}\\n{{way_out}}")
        clones = [Path("kdlib-course")]
    sys.path.insert(0, str(clones[0].resolve()))

import kdlib

PROFILE = os.environ.get("KD_PROFILE") or "cpu"
"""
COLAB = "https://colab.research.google.com"
PICTURE = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]"
BADGE = f"{PICTURE}({COLAB}/github/{{}}/blob/main/{{}})"
ANY_BADGE = re.compile(re.escape(BADGE).replace(r"\{\}", r"([\w./-]+?)"))
CODE_CELL = re.compile(
    r"^(# %%(?! \[markdown\])[^\n]*\n)(.*?)(?=^# %%|\Z)", re.M | re.S
)


class PublishError(Exception):
    """A file without its badge or first cell, and what to do about it."""


def repository(root: Path = ROOT) -> str:
    """The setting, "owner/name"."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    found = project["tool"]["kdlib"]["repository"]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", found):
        raise PublishError(
            f"repository = {found!r} in pyproject.toml: write it as owner/name"
        )
    return found


def source(text: str, where: str, place: str) -> str:
    """A source's text with its badge and first cell as they should be.

    where: the notebook's path from the root; place: owner/name
    Raises PublishError where there is no badge, or another first code cell.
    """
    if len(ANY_BADGE.findall(text)) != 1:
        raise PublishError(
            f"{where}: its source needs one badge. Write {BADGE.format(place, where)}"
        )
    first = CODE_CELL.search(text)
    if first is None or 'find_spec("kdlib")' not in first[2]:
        raise PublishError(
            f"{where}: the first code cell of its source does not fetch the course. "
            "Begin with that of another chapter"
        )
    cell = first[1] + FIRST_CELL.format(repository=place) + "\n"
    text = text[: first.start()] + cell + text[first.end() :]
    return ANY_BADGE.sub(lambda _: BADGE.format(place, where), text)


def carried(want: NotebookNode, have: NotebookNode, where: str) -> NotebookNode:
    """The wanted notebook with the outputs of the one that is there.

    Raises PublishError where any cell but the badge's and the first code cell differs.
    """
    kinds = [[cell.cell_type for cell in notebook.cells] for notebook in (want, have)]
    first = kinds[0].index("code")
    for number, (new, old) in enumerate(zip(want.cells, have.cells, strict=False)):
        same = (new.cell_type, new.source) == (old.cell_type, old.source)
        if kinds[0] != kinds[1] or not (same or number in (0, first)):
            raise PublishError(
                f"{where}: cell {number + 1} is not that of its source. Build it anew"
            )
        if new.cell_type == "code":
            new.outputs, new.execution_count = old.outputs, old.execution_count
    return want


def _module(path: Path):
    spec = importlib.util.spec_from_file_location(
        f"{path.parent.name}_{path.stem}", path
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebooks(root: Path) -> Iterator[tuple[Path, list[tuple[Path, Callable]]]]:
    """Each source, and the notebooks it makes, each with its maker."""
    chapters = _module(HERE / "build.py")
    exercises = _module(ROOT / "exercises" / "build.py")

    def chapter(path: Path) -> NotebookNode:
        return chapters.from_source(path.read_text(encoding="utf-8"))

    for path in sorted((root / "notebooks" / "src").glob("*.py")):
        yield path, [(root / "notebooks" / f"{path.stem}.ipynb", chapter)]
    for path in sorted((root / "exercises" / "src").glob("*.py")):
        name, folder = f"{path.stem}.ipynb", root / "exercises"
        yield (
            path,
            [
                (folder / name, exercises.student_notebook),
                (folder / "solutions" / name, exercises.solution_notebook),
            ],
        )


def publish(root: Path = ROOT, *, write: bool = True) -> list[str]:
    """Bring every file under `root` in line; returns those that were not.

    Without `write` the sources and the README are compared, and nothing is changed:
    whether a notebook is its source is for build.py --check to say.
    """
    place = repository(root)
    changed = []

    def put(path: Path, text: str) -> None:
        if text != path.read_text(encoding="utf-8"):
            changed.append(path.relative_to(root).as_posix())
            if write:
                new = path.with_name(f".{path.name}.new")
                new.write_text(text, encoding="utf-8")
                new.replace(path)  # in one step: an interrupt leaves the old file

    readme = root / "README.md"
    put(
        readme,
        ANY_BADGE.sub(
            lambda badge: BADGE.format(place, badge[2]),
            readme.read_text(encoding="utf-8"),
        ),
    )
    made = list(notebooks(root))
    for path, targets in made:
        where = targets[0][0].relative_to(root).as_posix()
        put(path, source(path.read_text(encoding="utf-8"), where, place))
    for path, targets in made if write else ():
        for target, maker in targets:
            where = target.relative_to(root).as_posix()
            have = nbformat.read(target, as_version=4)
            put(target, nbformat.writes(carried(maker(path), have, where)) + "\n")
    return changed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    try:
        changed = publish(write=not options.check)
    except PublishError as error:
        print(error, file=sys.stderr)
        return 1
    for name in changed:
        print(name)
    if options.check and changed:
        print("`python notebooks/publish.py` brings them in line", file=sys.stderr)
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
