"""Build the site: the course, its results and the package, for a browser offline.

    python docs/build.py [OUT]        into OUT/html, by default _site/html

The pages are first written to OUT/source: the notebooks, pages made from result files,
and a page for each room of the package. Then Sphinx makes them HTML. What has not
changed since the last time is not made again.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
sys.path[:0] = map(str, (HERE, HERE.parent, HERE.parent / "notebooks"))

import contents  # noqa: E402
import reference  # noqa: E402
import results  # noqa: E402
from contents import Chapter  # noqa: E402
from places import DOCS, REPOSITORY, ROOT  # noqa: E402

BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\(([^)]*)\)")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
MENTION = re.compile(r"(?<!\[)`([\w/.]+\.(?:ipynb|md))`")
COST_BOX = "| what it costs | |\n|---|---|\n"
COMMON_CELL = "import importlib.util\n"
WIDGET = "application/vnd.jupyter.widget-view+json"


class SiteError(Exception):
    """A file that makes no page, and the remedy."""


def notebook(path: Path) -> nbformat.NotebookNode:
    """A committed notebook as the site shows it.

    The badge is an image on another host: its link stays. The first code cell, the same
    everywhere, is folded. An explorer's picture is given its words for screen readers.

    Raises SiteError where there is no notebook, or one that cannot be read.
    """
    try:
        book = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise SiteError(
            f"{path.relative_to(ROOT)} cannot be read: {error}\n"
            "`make notebooks` builds the notebooks anew."
        ) from error
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = BADGE.sub(r"[Open in Colab](\1)", cell.source)
        if cell.cell_type == "code" and cell.source.startswith(COMMON_CELL):
            cell.metadata.setdefault("tags", []).append("hide-input")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if WIDGET in data:
                words = data.get("text/plain", "").strip("<>")
                cell.metadata["mystnb"] = {"image": {"alt": words}}
    return book


def chapter_page(chapter: Chapter) -> str:
    """A chapter, with its minutes of reading and exercises in the cost box."""
    book = notebook(ROOT / "notebooks" / f"{chapter.name}.ipynb")
    rows = f"| reading | {chapter.reading} minutes |\n"
    if chapter.exercises is not None:
        link = f"../exercises/ch{chapter.number:02}.ipynb"
        rows += f"| exercises | [{chapter.exercises} minutes]({link}) |\n"
    first = book.cells[0]
    first.source = first.source.replace(COST_BOX, COST_BOX + rows)
    return nbformat.writes(book)


def solution_page(path: Path) -> str:
    """Solutions: under a title of their own, and not found by the search."""
    book = notebook(path)
    first = book.cells[0]
    first.source = first.source.replace("# Exercises", "# Solutions", 1)
    book.metadata["nosearch"] = True
    return nbformat.writes(book)


def linked(text: str, folder: str, pages: set[str]) -> str:
    """A page in `folder` whose mentions of other files are links that hold.

    `notebooks/NAME.ipynb` in backticks becomes a link to the page. A link to a file of
    the repository that is no page leads to the repository.
    """

    def mention(found: re.Match) -> str:
        if found[1] not in pages:
            return found[0]
        return f"[{found[0]}]({os.path.relpath(found[1], folder or '.')})"

    def lead(found: re.Match) -> str:
        target = (ROOT / folder / found[1]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return found[1]  # Sphinx names it
        name = target.relative_to(ROOT).as_posix()
        kind = "tree" if target.is_dir() else "blob"
        return found[1] if name in pages else f"{REPOSITORY}/{kind}/main/{name}"

    return LINK.sub(lead, MENTION.sub(mention, text))


def linked_page(name: str, page: str | bytes, pages: set[str]) -> str | bytes:
    folder = name.rpartition("/")[0]
    if name.endswith(".md"):
        return linked(page, folder, pages)
    if name.endswith(".ipynb"):
        book = nbformat.reads(page, as_version=4)
        for cell in book.cells:
            if cell.cell_type == "markdown":
                cell.source = linked(cell.source, folder, pages)
        return nbformat.writes(book)
    return page


def sources() -> dict[str, str | bytes]:
    """Every page and picture that Sphinx reads, by its place below OUT/source."""
    chapters = contents.chapters()
    pages: dict[str, str | bytes] = {}
    for chapter in chapters:
        pages[f"notebooks/{chapter.name}.ipynb"] = chapter_page(chapter)
    for source in sorted((ROOT / "exercises" / "src").glob("ch*.py")):
        name = f"{source.stem}.ipynb"
        book = notebook(ROOT / "exercises" / name)
        pages[f"exercises/{name}"] = nbformat.writes(book)
        solved = solution_page(ROOT / "exercises" / "solutions" / name)
        pages[f"exercises/solutions/{name}"] = solved
    guides = sorted(path for path in DOCS.glob("*.md") if path.stem != "index")
    pages |= {f"docs/{path.name}": path.read_text("utf-8") for path in guides}
    pictures = sorted((DOCS / "pictures").glob("*.png"))
    pages |= {f"docs/pictures/{path.name}": path.read_bytes() for path in pictures}
    pages |= results.pages() | reference.pages()
    pages["index.md"] = index(chapters, pages)
    names = set(pages)
    return {name: linked_page(name, page, names) for name, page in pages.items()}


def index(chapters: list[Chapter], pages: dict) -> str:
    """docs/index.md with its table of chapters and the site's tables of contents."""
    trees = {
        "Chapters": [f"notebooks/{chapter.name}" for chapter in chapters],
        "Exercises": of_folder(pages, "exercises/ch"),
        "Results": of_folder(pages, "results/", ordered=False),
        "Teaching and going on": of_folder(pages, "docs/"),
        "Reference": ["kdlib/index"],
        "Solutions": of_folder(pages, "exercises/solutions/"),
    }
    lines = []
    for caption, names in trees.items():
        options = f":caption: {caption}\n:hidden:\n:maxdepth: 1\n"
        lines.append("```{toctree}\n" + options + "\n" + "\n".join(names) + "\n```\n")
    # On the site the page stands one folder higher than in the repository.
    text = (DOCS / "index.md").read_text("utf-8").replace("](../", "](")
    for mark, new in (
        ("<!-- chapters -->\n", chapter_table(chapters)),
        ("<!-- contents -->\n", "\n".join(lines)),
    ):
        if text.count(mark) != 1:
            raise SiteError(f"docs/index.md needs the line {mark.strip()} once")
        text = text.replace(mark, new)
    return text


def of_folder(pages: dict, start: str, *, ordered: bool = True) -> list[str]:
    """Pages whose place begins so, by their name, or in the order they were made."""
    named = [n for n in pages if n.startswith(start) and n.endswith((".md", ".ipynb"))]
    return [n.rpartition(".")[0] for n in (sorted(named) if ordered else named)]


def chapter_table(chapters: list[Chapter]) -> str:
    lines = ["| chapter | reading | two cores | exercises |", "|---|---|---|---|"]
    for item in chapters:
        title = f"[{item.number} · {item.title}](notebooks/{item.name}.ipynb)"
        work = "none"
        if item.exercises is not None:
            work = f"[{item.exercises} min](exercises/ch{item.number:02}.ipynb)"
        run = item.run.replace("minutes", "min").replace("minute", "min")
        lines.append(f"| {title} | {item.reading} min | {run} | {work} |")
    return "\n".join(lines) + "\n"


def write(pages: dict[str, str | bytes], folder: Path) -> None:
    """Make `folder` hold these pages and no others; equal ones keep their date."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(folder).as_posix() not in pages:
            path.unlink()
    for name, page in pages.items():
        path = folder / name
        new = page.encode() if isinstance(page, str) else page
        if not path.is_file() or path.read_bytes() != new:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(new)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "_site")
    out = parser.parse_args(arguments).out
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        write(sources(), out / "source")
    except (SiteError, contents.ContentsError) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error}: free disk space, or name another folder", file=sys.stderr)
        return 1
    from sphinx.cmd.build import main as sphinx

    # Every warning is an error: a link that leads nowhere, a page in no contents.
    options = ["-q", "-W", "--keep-going", "-j", "auto", "-b", "html"]
    places = ["-c", DOCS, "-d", out / "doctrees", out / "source", out / "html"]
    status = sphinx([*options, *map(str, places)])
    if status:
        # Sphinx does not repeat what it said of a page that has not changed.
        shutil.rmtree(out / "doctrees", ignore_errors=True)
        return status
    print(f"The site is built. Open it in a browser: {out / 'html' / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
