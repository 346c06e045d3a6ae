"""Make the notebooks from their text sources.

    python notebooks/build.py [NAME ...]     run the sources, write the notebooks
    python notebooks/build.py --check        exit 1 where a notebook is not its source

A chapter is written in notebooks/src/NAME.py (jupytext's py:percent) and committed as
notebooks/NAME.ipynb with its outputs. Building twice gives the same bytes as far as the
code's outputs are the same: cell ids come from the cells' content, and times, widget
state and interpreter versions are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "pygments_lexer": "ipython3",
    },
}
WIDGET = "application/vnd.jupyter.widget-view+json"
CELL_TIMEOUT = 600  # seconds; the tests give a cell as long
ENVIRONMENT = {
    "TQDM_DISABLE": "1",  # a bar's text is different every time
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
    "PYTHONPATH": str(FOLDER.parent),
    "KD_PROFILE": "",  # committed outputs are those of the CPU
}


class BuildError(Exception):
    """A source that makes no notebook, with the cell to blame."""


def from_source(text: str) -> NotebookNode:
    """The notebook, not yet run, that a py:percent source describes."""
    return assemble(jupytext.reads(text, fmt="py:percent").cells)


def assemble(parts: Iterable[NotebookNode]) -> NotebookNode:
    """A notebook of these cells, with ids that come from their content."""
    seen: Counter[str] = Counter()
    cells = []
    for cell in parts:
        metadata = {
            key: value
            for key, value in cell.metadata.items()
            if not key.startswith("lines_to_")  # jupytext's memory of blank lines
        }
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()
        seen[digest] += 1
        cell_id = f"{digest[:12]}-{seen[digest]}"
        make = getattr(nbformat.v4, f"new_{cell.cell_type}_cell")
        cells.append(make(cell.source, id=cell_id, metadata=metadata))
    return nbformat.v4.new_notebook(cells=cells, metadata=METADATA)


def run(notebook: NotebookNode, folder: Path) -> None:
    """Run every cell in a fresh kernel; outputs go into `notebook`.

    Raises BuildError, with the cell, for an error, a magic that fails, a time-out, a
    dead kernel, and for a cell tagged raises-exception that raises nothing.
    """
    last = {"cell": None, "number": 0}

    def remember(cell, cell_index):
        last.update(cell=cell, number=cell_index + 1)

    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        on_cell_start=remember,
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--IPKernelApp.log_level=40"],
    )
    try:
        client.execute(env=os.environ | ENVIRONMENT)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        reason = re.sub(r"\x1b\[[\d;]*m", "", getattr(error, "traceback", str(error)))
        shown = last["cell"].source
        raise BuildError(f"cell {last['number']}:\n{shown}\n\n{reason}") from error
    for number, cell in enumerate(notebook.cells, start=1):
        expected = "raises-exception" in cell.metadata.get("tags", [])
        if expected and not any(o.output_type == "error" for o in cell.outputs):
            raise BuildError(
                f"cell {number} is tagged raises-exception and raised nothing:\n"
                f"{cell.source}"
            )


def normalise(notebook: NotebookNode) -> None:
    """Take out what differs between two runs that did the same."""
    notebook.metadata = nbformat.from_dict(METADATA)  # drops widget state and versions
    numbers = itertools.count(1)
    renamed: dict[str, str] = {}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if output.output_type == "error":  # its frames name this machine's folders
                output.traceback = [f"{output.ename}: {output.evalue}"]
            view = output.get("data", {}).get(WIDGET)
            if view:
                known = view["model_id"]
                if known not in renamed:
                    renamed[known] = f"{next(numbers):032x}"
                view["model_id"] = renamed[known]


def write(notebook: NotebookNode, path: Path) -> None:
    """Replace `path` in one step, so that an interrupted build leaves the old file."""
    nbformat.validate(notebook)
    text = nbformat.writes(notebook) + "\n"
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def build(source: Path, target: Path) -> None:
    notebook = from_source(source.read_text(encoding="utf-8"))
    run(notebook, target.parent)
    normalise(notebook)
    write(notebook, target)


def difference(source: Path, target: Path) -> str | None:
    """How the notebook differs from its source, outputs aside; None if it does not."""
    return against(from_source(source.read_text(encoding="utf-8")), target)


def against(want: NotebookNode, target: Path) -> str | None:
    """How the notebook in `target` differs from the wanted one, outputs aside."""
    if not target.exists():
        return "it has not been built"
    have = nbformat.read(target, as_version=4)
    pairs = itertools.zip_longest(have.cells, want.cells)
    for number, (old, new) in enumerate(pairs, start=1):
        if old is None:
            return f"cell {number} is only in the source:\n{new.source}"
        if new is None:
            return f"cell {number} is only in the notebook:\n{old.source}"
        for part in ("cell_type", "source", "metadata", "id"):
            if old.get(part) != new[part]:
                return (
                    f"cell {number} differs in its {part}.\n"
                    f"--- notebook\n{old.get(part)}\n--- source\n{new[part]}"
                )
    if have.metadata != want.metadata:
        return f"the metadata are {dict(have.metadata)}, not {METADATA}"
    return None


def main(arguments: list[str] | None = None) -> int:
    def targets(source: Path) -> list[Path]:
        return [FOLDER / f"{source.stem}.ipynb"]

    def make(source: Path) -> None:
        build(source, *targets(source))

    def problems(source: Path) -> dict[str, str]:
        (target,) = targets(source)
        problem = difference(source, target)
        return {target.name: problem} if problem else {}

    return command(arguments, __doc__, FOLDER, targets, make, problems)


def command(
    arguments: list[str] | None,
    description: str,
    folder: Path,
    targets: Callable[[Path], list[Path]],
    make: Callable[[Path], None],
    problems: Callable[[Path], dict[str, str]],
) -> int:
    """The command line of a folder of notebooks, whose sources lie in its src/.

    targets:  a source -> the notebooks made from it
    make:     makes them, or raises BuildError
    problems: a source -> {file: how it differs from the source}
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="sources in src/")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare sources and metadata with the notebooks, run and write nothing",
    )
    options = parser.parse_args(arguments)
    known = {path.stem: path for path in sorted((folder / "src").glob("*.py"))}
    wanted = [Path(name).stem for name in options.names] or list(known)
    for name in wanted:
        if name not in known:
            parser.error(f"no source {name!r}: there are {', '.join(known)}")
    sources = [known[name] for name in wanted]

    if not options.check:
        for source in sources:
            print(f"{source.stem}.ipynb", flush=True)
            try:
                make(source)
            except BuildError as error:
                print(f"{source.stem}.ipynb, {error}", file=sys.stderr)
                return 1
        return 0

    found: dict[str, str] = {}
    for source in sources:
        found |= problems(source)
    if not options.names:
        made = {target for source in sources for target in targets(source)}
        there = {
            x
            for path in {folder, *(t.parent for t in made)}
            for x in path.glob("*.ipynb")
        }
        for stray in sorted(there - made):
            found[stray.name] = f"it has no source in {folder.name}/src"
    for name, problem in found.items():
        print(f"{name}: {problem}", file=sys.stderr)
    if found:
        print("`make notebooks` builds them anew.", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
