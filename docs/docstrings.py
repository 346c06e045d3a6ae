"""Docstrings as this package writes them, turned into reStructuredText.

They are plain text. A paragraph is not indented; what is indented is shown as it
stands; and a line such as

    temperature: of both sides, above 0

begins an entry, whose further lines are indented. Sphinx calls the first functions.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from sphinx.addnodes import pending_xref

VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
NAMES = r"\*{0,2}[a-z]\w*(?:, \*{0,2}[a-z]\w*)*"  # of parameters or fields
ENTRY = re.compile(rf"(?P<label>{NAMES}|[A-Z][a-z]+): +(?P<text>\S.*)")
BULLET = re.compile(r"[-*] |\d+\. ")


def process(app, what, name, obj, options, lines: list[str]) -> None:
    """Of the event autodoc-process-docstring: changes the lines in place."""
    lines[:] = to_rst(lines)


def skip(app, what, name, obj, skipped, options) -> bool | None:
    """Of the event autodoc-skip-member: True leaves out a tuple's field.

    The class's docstring says what it is; Python writes "Alias for field number 0".
    """
    written = getattr(obj, "__doc__", None) or ""
    return True if written.startswith("Alias for field number") else None


def signature(app, what, name, obj, options, written, returned):
    """Of the event autodoc-process-signature: a dataclass's made default is `...`.

    Python writes it as <factory>, which no signature can hold.
    """
    return (written or "").replace("<factory>", "...") or None, returned


def link_types(app, doctree) -> None:
    """Of the event doctree-read: a type's name links to what it names in its module.

    Sphinx would take any object of that name, in whatever room.
    """
    for reference in doctree.findall(pending_xref):
        module = sys.modules.get(reference.get("py:module"))
        name = reference["reftarget"]
        if reference["refdomain"] == "py" and module and "." not in name:
            found = getattr(module, name, None)
            if isinstance(found, type) and found.__module__.startswith("kdlib"):
                reference["reftarget"] = f"{found.__module__}.{found.__qualname__}"
            else:
                reference.replace_self(reference.children)


def to_rst(lines: list[str]) -> list[str]:
    """The lines of a docstring, dedented, as lines of reStructuredText."""
    out: list[str] = []
    for kind, block in blocks(lines):
        if kind == "literal":
            out += [".. code-block:: text", "", *("   " + line for line in block)]
        elif kind == "entry":
            label, text = block[0], block[1:]
            out += [label_of(label), *("    " + inline(line) for line in text)]
        else:
            out += [inline(line) for line in block]
        out.append("")
    return out


def blocks(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(kind, lines): "text", "bullet", "entry" (its label first) or "literal"."""
    kind, block = "", []

    def flush():
        nonlocal kind, block
        if block:
            yield kind, block
        kind, block = "", []

    for number, line in enumerate(lines):
        indented = line.startswith(" ")
        entry = ENTRY.fullmatch(line)
        if not line.strip():
            following = next((x for x in lines[number:] if x.strip()), "")
            if kind == "literal" and following.startswith(" "):
                block.append("")  # an empty line within what is shown as it stands
                continue
            yield from flush()
        elif indented and kind in ("entry", "bullet"):
            block.append(line.strip() if kind == "entry" else line)
        elif indented:
            if kind != "literal":
                yield from flush()
                kind = "literal"
            block.append(line)
        elif entry and kind != "text" and (number or is_names(entry["label"])):
            yield from flush()
            kind, block = "entry", [entry["label"], entry["text"]]
        elif BULLET.match(line):
            yield from flush()
            kind, block = "bullet", [line]
        elif kind == "entry" and not line[0].isupper():
            # It was a sentence with a colon, and it goes on.
            kind, block = "text", [f"{block[0]}: {block[1]}", *block[2:], line]
        elif kind == "text":
            block.append(line)
        else:
            yield from flush()
            kind, block = "text", [line]
    yield from flush()


def label_of(label: str) -> str:
    """Names of parameters as code, words such as Limits and Source in bold."""
    if is_names(label):
        return ", ".join(f"``{name}``" for name in label.split(", "))
    return f"**{inline(label)}**"


def is_names(label: str) -> bool:
    """Names of parameters or fields, and not the first words of a sentence."""
    return re.fullmatch(NAMES, label) is not None


def inline(text: str) -> str:
    """A line with what reStructuredText would take for markup escaped.

    `code` in single backticks becomes code.
    """
    parts = re.split(r"(`+[^`]+`+)", text)
    return "".join(
        f"``{part.strip('`')}``" if number % 2 else escaped(part)
        for number, part in enumerate(parts)
    )


def escaped(text: str) -> str:
    return re.sub(r"([\\*|`]|_(?=\W|$))", r"\\\1", text)
