"""A page for each room of the package, in the order of its floors."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from docstrings import inline, to_rst
from places import PROJECT, ROOT

from kdlib.laws import LAWS
from kdlib.laws.frame import Law

# The checkers of the chapters hold the answers.
LEFT_OUT = re.compile(r"ch\d\d|__main__|_.*")


def rooms() -> list[list[str]]:
    """The rooms of each floor that has one, the lowest floor first."""
    (contract,) = PROJECT["tool"]["importlinter"]["contracts"]
    floors = []
    for layer in reversed(contract["layers"]):
        names = [name.strip(" ()") for name in layer.split("|")]
        there = [n for n in names if source(n).is_file() and not LEFT_OUT.fullmatch(n)]
        if there:
            floors.append(sorted(there))
    return floors


def source(room: str) -> Path:
    """The file of a room, or the __init__.py of one that is a folder."""
    folder = ROOT / "kdlib" / room
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def parts(room: str) -> list[str]:
    """The modules within a room that is a folder."""
    names = sorted(path.stem for path in source(room).parent.glob("*.py"))
    inside = source(room).name == "__init__.py"
    return [n for n in names if not LEFT_OUT.fullmatch(n)] if inside else []


def page(room: str) -> str:
    lines = section(f"kdlib.{room}", "=")
    for part in parts(room):
        module = f"kdlib.{room}.{part}"
        lines += section(module, "-")
        for law in LAWS.values():
            if law.question.__module__ == module:
                lines += of_law(law)
    return "\n".join(lines)


def of_law(law: Law) -> list[str]:
    """A law is no function any more, but it keeps the docstring of one."""
    heading = f"Law {law.number}: {law.title}"
    said = to_rst((inspect.getdoc(law.question) or "").splitlines())
    return [inline(heading), "~" * 2 * len(heading), "", *said]


def section(module: str, underline: str) -> list[str]:
    return [
        module,
        underline * len(module),
        "",
        f".. automodule:: {module}",
        "   :members:",
        "   :ignore-module-all:",
        "",
    ]


def summary(room: str) -> str:
    """The first sentence of a room's docstring."""
    said = ast.get_docstring(ast.parse(source(room).read_text("utf-8"))) or ""
    return " ".join(said.partition("\n\n")[0].split())


def pages() -> dict[str, str]:
    floors = rooms()
    lines = [
        "# The package",
        "",
        "One page for each room of `kdlib`, with what its docstrings say. A room",
        "imports only from the floors below its own.",
        "",
        "```{toctree}",
        ":hidden:",
        "",
        *(room for floor in floors for room in floor),
        "```",
        "",
    ]
    for number, floor in enumerate(floors, start=1):
        lines += [f"## Floor {number}", ""]
        lines += [f"- [{room}]({room}.rst): {summary(room)}" for room in floor]
        lines += [""]
    found = {f"kdlib/{room}.rst": page(room) for floor in floors for room in floor}
    return found | {"kdlib/index.md": "\n".join(lines)}
