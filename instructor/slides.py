"""Slides of a chapter, cut from its notebook.

    python -m instructor.slides [CH ...] [--to FOLDER]

A heading begins a slide. What follows it fills slides in order, as far as it fits by an
estimate: paragraphs, lists, formulas, short code, results, figures. Long code and the
first cells' setup are left out; a figure stands alone. The page draws smaller what is
still too high. Each file opens without a network: reveal.js and MathJax lie inside.

Knows: which part of a notebook goes onto which slide. Does not know: how it is drawn
(slides_template/, slides.css).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from kdlib.errors import ArgumentError, DataError, KdlibError
from kdlib.ledger import write_text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MATHJAX = ROOT / "docs" / "_static" / "vendor" / "mathjax" / "tex-svg.js"
HEIGHT = 600  # of 720 points of a slide; the rest is margin
CODE = 12  # lines of code that a slide shows
RESULT = 20  # lines of a printed result
_HEADING = re.compile(r"^#{1,4} ")
_SETUP = re.compile(r"The next (cell|call) is the same in every chapter")
# Code that says nothing about distillation: setup, imports, drawing, tables.
_UNSAID = re.compile(
    r"find_spec\(|\b(plt|axes|axis|figure)\b|\A(import|from) |\A(show|table|errors)\("
)
_BADGE = re.compile(r"^\[?!\[[^\]]*\]\(https?:[^)]*\)(\]\([^)]*\))?\s*$", re.M)


@dataclass
class Part:
    """Something that is not torn apart: its cell, and its height in points."""

    cell: NotebookNode
    height: int
    heading: bool = False


@dataclass
class Slide:
    parts: list[Part] = field(default_factory=list)

    @property
    def height(self) -> int:
        return sum(part.height for part in self.parts)

    @property
    def bare(self) -> bool:
        return all(part.heading for part in self.parts)


def slides(notebook: NotebookNode) -> list[Slide]:
    """The notebook's slides, in order."""
    found: list[Slide] = []
    section: Part | None = None
    for part in _parts(notebook):
        if part.heading:
            if not part.cell.source.endswith("Predict") or section is None:
                section = part
            begun = found and found[-1].bare and found[-1] is not found[0]
            if begun:  # a heading right below another one
                found[-1].parts.append(part)
            else:
                found.append(Slide([part]))
            continue
        # A heading with nothing below it takes what comes, however high.
        full = found and found[-1].height + part.height > HEIGHT
        if not found or full and not found[-1].bare:
            found.append(Slide([_again(section)] if section else []))
        found[-1].parts.append(part)
    return found


def _again(title: Part) -> Part:
    """The heading of a slide that goes on."""
    text = re.sub(r"^#+ ", "### ", title.cell.source.partition("\n")[0])
    return Part(new_markdown_cell(f"{text} *…*"), 60, heading=True)


def _parts(notebook: NotebookNode) -> Iterator[Part]:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for block in blocks(_BADGE.sub("", cell.source)):
                yield Part(
                    new_markdown_cell(block),
                    _height(block),
                    bool(_HEADING.match(block)),
                )
        elif cell.cell_type == "code":
            yield from _code(cell)


def blocks(text: str) -> list[str]:
    """Paragraphs, lists, formulas, fenced code and quiz answers, each in one piece."""
    found: list[str] = []
    fence = False
    open_answer = False
    for piece in re.split(r"\n{2,}", text.strip()):
        # A formula, and what goes on after it, belong to the sentence before.
        goes_on = piece.startswith("$$") or piece[:1].islower()
        goes_on = goes_on and found and not _HEADING.match(found[-1])
        if fence or open_answer or goes_on:
            found[-1] += "\n\n" + piece
        elif piece:
            head, _, rest = piece.partition("\n")
            if _HEADING.match(head) and rest.strip():
                found += [head, rest]
            else:
                found.append(piece)
        fence ^= piece.count("```") % 2 == 1
        open_answer = (
            open_answer or "<details>" in piece
        ) and "</details>" not in piece
    return [piece for piece in found if piece.strip() and not _SETUP.match(piece)]


def _height(text: str) -> int:
    if _HEADING.match(text):
        return 70
    if text.startswith("```"):
        return 28 * (text.count("\n") - 1) + 40
    if "<details>" in text:
        return 60
    if text.startswith("|"):
        return sum(34 * (1 + len(row) // 110) for row in text.splitlines()) + 20
    formulas = re.findall(r"\$\$.*?\$\$", text, re.S)
    words = re.sub(r"\$\$.*?\$\$", "", text, flags=re.S)
    lines = sum(1 + len(x) // 88 for x in re.split(r"\n(?=\s*(?:- |\d+\. ))", words))
    return 38 * lines + 18 + sum(70 + 30 * x.count(r"\\") for x in formulas)


def _code(cell: NotebookNode) -> Iterator[Part]:
    source = cell.source.strip()
    lines = source.count("\n") + 1
    shown = lines <= CODE and not _UNSAID.search(source)
    for output in cell.get("outputs", []):
        yield from _output(output, source if shown else "")
        shown = False
    if shown:
        yield Part(new_code_cell(source), 27 * lines + 40)


def _output(output: NotebookNode, source: str) -> Iterator[Part]:
    code = 27 * (source.count("\n") + 1) + 40 if source else 0
    data = {
        kind: value
        for kind, value in output.get("data", {}).items()
        if kind in ("image/png", "image/svg+xml", "text/markdown", "text/plain")
    }
    text = output.get("text", "")
    if any(kind.startswith("image/") for kind in data):
        data.pop("text/plain", None)
        if source:
            yield Part(new_code_cell(source), code)
        shown = nbformat.v4.new_output("display_data", data)
        yield Part(_without_code(shown), 520)
        return
    text = text or data.get("text/markdown") or data.get("text/plain", "")
    if not text.strip() or output.output_type == "error":
        if source:
            yield Part(new_code_cell(source), code)
        return
    lines = text.rstrip().splitlines()
    if len(lines) > RESULT:
        lines = [*lines[: RESULT - 1], "..."]
    stream = nbformat.v4.new_output("stream", name="stdout", text="\n".join(lines))
    part = _without_code(stream)
    part.source = source
    yield Part(part, code + 27 * len(lines) + 30)


def _without_code(output: NotebookNode) -> NotebookNode:
    return new_code_cell("", outputs=[output])


# --- Drawing --------------------------------------------------------------------------


def deck(cut: list[Slide], title: str) -> str:
    """One HTML file. Raises DataError where a part of the page is missing."""
    from nbconvert import SlidesExporter

    cells = []
    for slide in cut:
        for number, part in enumerate(slide.parts):
            cell = nbformat.from_dict(part.cell)
            cell["id"] = f"part-{len(cells)}"
            cell.metadata["slideshow"] = {"slide_type": "-" if number else "slide"}
            if cell.cell_type == "code" and not cell.source:
                cell.metadata["tags"] = ["result"]
            cells.append(cell)
    exporter = SlidesExporter(
        extra_template_basedirs=[str(HERE)], template_name="slides_template"
    )
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    exporter.register_preprocessor(
        "nbconvert.preprocessors.TagRemovePreprocessor", enabled=True
    )
    from nbconvert.preprocessors import TagRemovePreprocessor

    for one in exporter._preprocessors:
        if isinstance(one, TagRemovePreprocessor):
            one.remove_input_tags = {"result"}
    vendor = HERE / "vendor" / "reveal"
    resources = {
        "offline": {
            "title": title,
            "style": _asset(HERE / "slides.css"),
            "reveal_css": _asset(vendor / "reveal.css"),
            "reveal": _asset(vendor / "reveal.js"),
            "mathjax": _asset(MATHJAX),
        }
    }
    page, _ = exporter.from_notebook_node(new_notebook(cells=cells), resources)
    return page


def _asset(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{path.relative_to(ROOT)} cannot be read ({error.strerror})",
            "restore it with git checkout",
        ) from None
    return text.replace("</script", "<\\/script")


def write(source: Path, folder: Path) -> Path:
    """The slides of one chapter's notebook."""
    notebook = nbformat.read(source, as_version=4)
    title = notebook.cells[0].source.partition("\n")[0].lstrip("# ")
    path = folder / f"{source.stem}.html"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, deck(slides(notebook), title))
    return path


def sources(chapters: list[str]) -> list[Path]:
    """The notebooks of these chapters, or of all. Raises ArgumentError."""
    known = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    numbers = {int(path.name.partition("_")[0]): path for path in known}
    found = []
    for text in chapters:
        number = text.lower().removeprefix("ch")
        if not number.isdigit() or int(number) not in numbers:
            raise ArgumentError(
                f"there is no chapter {text!r}", f"name one of 0 to {max(numbers)}"
            )
        found.append(numbers[int(number)])
    return found or known


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m instructor.slides", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("chapters", nargs="*", help="such as 04; none: all of them")
    parser.add_argument("--to", type=Path, default=Path("slides"))
    given = parser.parse_args(arguments)
    try:
        for source in sources(given.chapters):
            print(f"Wrote {write(source, given.to)}")
    except KdlibError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
