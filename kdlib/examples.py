"""Where examples come from: a JSONL file, a data set's rows, or the embedded corpus.

    {"context": "..", "simplified_context": "..", "user_input": "..", "response": ".."}

One object a line. The two contexts may be left out, or be null, which is what a
datasets.Dataset has in rows that lack a column; they are then empty. Everything else
that is wrong is refused, with the file and the line: a key that is spelt wrong would
otherwise train a student on no context at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

from kdlib import localize
from kdlib.errors import ArgumentError, DataError, nearest
from kdlib.pairs import PairedExample

FIELDS = tuple(field.name for field in fields(PairedExample))
REQUIRED = ("user_input", "response")
CORPUS = "localize:"


def read_examples(source: str | Path | Iterable[Mapping]) -> list[PairedExample]:
    """All examples of a source, in its order; an example's number is its place.

    source: the path of a JSONL file, "localize:LOCALE:FORM:SPLIT" for a part of the
            embedded corpus, or rows as mappings (a datasets.Dataset, a list of dicts)

    Raises ArgumentError for a corpus name that does not exist, DataError for a file
    that cannot be read or a row that is not an example, naming file and line.
    """
    if isinstance(source, str) and source.startswith(CORPUS):
        return _from_corpus(source)
    if isinstance(source, (str, Path)):
        rows, origin, first = _lines(Path(source)), f"{source}, line", 1
    else:
        rows, origin, first = enumerate(source), "row", 0
    examples = [_example(row, f"{origin} {number}") for number, row in rows]
    if not examples:
        raise DataError(
            f"{source if first else 'the data set'} holds no example",
            "give at least one example with " + " and ".join(REQUIRED),
        )
    return examples


def _from_corpus(source: str) -> list[PairedExample]:
    parts = source.removeprefix(CORPUS).split(":")
    if len(parts) != 3:
        raise ArgumentError(
            f"data {source!r}",
            "write localize:LOCALE:FORM:SPLIT, say localize:fr:long:train",
        )
    locale, form, split = parts
    return localize.examples(split, locales=[locale], formats=[form])


def _lines(path: Path):
    """Line number and parsed object of every line that is not blank."""
    try:
        # utf-8-sig: some editors begin a file with an invisible mark
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _parse(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the examples {path} cannot be read: {error}",
            "name a JSONL file in UTF-8, one object a line",
        ) from error


def _parse(line: str, where: str):
    def once(pairs):
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(
                f"{where}: the key {twice[0]!r} stands there twice", "keep one of them"
            )
        return dict(pairs)

    try:
        return json.loads(line, object_pairs_hook=once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            f"{where} is not JSON: {error}",
            "write one complete object a line, without line breaks inside",
        ) from error


def _example(row, where: str) -> PairedExample:
    if not isinstance(row, Mapping):
        raise DataError(
            f"{where} is {type(row).__name__}, not an object",
            f"write an object with the keys {', '.join(FIELDS)}",
        )
    for name in row:
        if name not in FIELDS:
            raise DataError(f"{where}: unknown key {name!r}", nearest(name, FIELDS))
    row = {name: value for name, value in row.items() if value is not None}
    for name in REQUIRED:
        if name not in row:
            raise DataError(
                f"{where}: no {name!r}", f"add {name!r}, or leave the example out"
            )
    for name, value in row.items():
        if not isinstance(value, str):
            raise DataError(
                f"{where}: {name!r} is {value!r}, of type {type(value).__name__}, not "
                "text",
                "write a string; an empty one, null or no key for no context",
            )
        try:
            value.encode()
        except UnicodeEncodeError as error:  # half an emoji
            raise DataError(
                f"{where}: {name!r} cannot be written in UTF-8: {error}",
                "write whole characters",
            ) from error
    if not row["response"].strip():
        raise DataError(
            f"{where}: 'response' is empty", "leave out examples without a response"
        )
    return PairedExample(**row)
