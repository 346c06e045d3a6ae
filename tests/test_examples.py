"""Examples from JSONL files, rows and the corpus: what is read, what is refused."""

from __future__ import annotations

import json

import pytest

from kdlib import localize
from kdlib.errors import ArgumentError, DataError
from kdlib.examples import read_examples
from kdlib.pairs import PairedExample

GOOD = {"user_input": "2 + 2", "response": "4"}


def write(path, *lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_file_is_read_line_by_line(tmp_path):
    full = {
        "context": "Answer in French.\nBe brief.",
        "simplified_context": "fr",
        "user_input": "Grüße 🙂",
        "response": "Salut",
    }
    lines = json.dumps(full), "", json.dumps(GOOD), "   "
    wanted = [PairedExample(**full), PairedExample("2 + 2", "4")]
    assert read_examples(write(tmp_path / "a.jsonl", *lines)) == wanted
    assert read_examples(str(tmp_path / "a.jsonl")) == wanted
    marked = tmp_path / "b.jsonl"  # as some editors save it
    marked.write_text("\n".join(lines), encoding="utf-8-sig")
    assert read_examples(marked) == wanted


def test_null_is_no_context(tmp_path):
    """As datasets.Dataset.from_list fills the columns that a row lacks."""
    row = {**GOOD, "context": None, "simplified_context": None}
    wanted = [PairedExample("2 + 2", "4")]
    assert read_examples([row]) == wanted
    assert read_examples(write(tmp_path / "a.jsonl", json.dumps(row))) == wanted
    mixed = {**GOOD, "context": None, "simplified_context": "fr"}
    assert read_examples([mixed]) == [
        PairedExample("2 + 2", "4", simplified_context="fr")
    ]


def test_rows_may_be_any_mappings():
    class Dataset:  # what datasets.Dataset is: an iterable of dicts
        def __iter__(self):
            yield dict(GOOD)
            yield {**GOOD, "context": "c"}

    wanted = [PairedExample("2 + 2", "4"), PairedExample("2 + 2", "4", context="c")]
    assert read_examples(Dataset()) == wanted == read_examples(list(Dataset()))


def test_a_part_of_the_corpus():
    wanted = localize.examples("validation", locales=["pl"], formats=["short"])
    assert read_examples("localize:pl:short:validation") == wanted


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("localize:fr:long", "localize:LOCALE:FORM:SPLIT"),
        ("localize:fr:long:train:x", "localize:LOCALE:FORM:SPLIT"),
        ("localize:fx:long:train", "'fx' is unknown"),
        ("localize:fr:lang:train", "did you mean 'long'"),
        ("localize:fr:long:tran", "did you mean 'train'"),
    ],
)
def test_a_part_that_does_not_exist(name, match):
    with pytest.raises(ArgumentError, match=match):
        read_examples(name)


BAD_LINES = {
    "cut": ('{"user_input": "a", "resp', "line 2 is not JSON"),
    "nested": ("[" * 100_000, "line 2 is not JSON"),
    "list": ("[1]", "line 2 is list, not an object"),
    "null": ("null", "line 2 is NoneType"),
    "misspelt": (
        {**GOOD, "contxt": "c"},
        "line 2: unknown key 'contxt'(.|\n)*'context'",
    ),
    "foreign": ({**GOOD, "label": "c"}, "line 2: unknown key 'label'"),
    "no response": ({"user_input": "a"}, "line 2: no 'response'"),
    "no input": ({"response": "a"}, "line 2: no 'user_input'"),
    "null response": ({**GOOD, "response": None}, "line 2: no 'response'"),
    "null input": ({**GOOD, "user_input": None}, "line 2: no 'user_input'"),
    "null of a foreign key": ({**GOOD, "label": None}, "unknown key 'label'"),
    "number": (
        {**GOOD, "response": 4},
        "line 2: 'response' is 4, of type int, not text",
    ),
    "truth": ({**GOOD, "context": True}, "'context' is True, of type bool, not text"),
    "messages": (
        {**GOOD, "user_input": [{"role": "user"}]},
        "'user_input' is .*, of type list, not text",
    ),
    "half an emoji": ({**GOOD, "user_input": "\ud83d"}, "cannot be written in UTF-8"),
    "empty": ({**GOOD, "response": ""}, "line 2: 'response' is empty"),
    "blank": ({**GOOD, "response": " \n"}, "line 2: 'response' is empty"),
    "twice": ('{"user_input": "a", "response": "b", "response": "c"}', "there twice"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, name):
    line, match = BAD_LINES[name]
    line = line if isinstance(line, str) else json.dumps(line)
    path = write(tmp_path / "bad.jsonl", json.dumps(GOOD), line, json.dumps(GOOD))
    before = path.read_bytes()
    with pytest.raises(DataError, match=match) as caught:
        read_examples(path)
    assert str(path) in caught.value.what and caught.value.remedy
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("row", [{**GOOD, "contxt": ""}, "text", {"user_input": "a"}])
def test_a_bad_row_is_named(row):
    with pytest.raises(DataError, match="row 1"):
        read_examples([GOOD, row])


def test_a_missing_number_of_a_table_is_not_text():
    with pytest.raises(DataError, match="row 0: 'context' is nan, of type float"):
        read_examples([{**GOOD, "context": float("nan")}])


def test_files_that_cannot_be_read(tmp_path):
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"user_input": "é"}'.encode("latin-1"))
    for path in (tmp_path / "none.jsonl", tmp_path, latin):
        with pytest.raises(DataError, match="cannot be read") as caught:
            read_examples(path)
        assert str(path) in caught.value.what
    for nothing in (write(tmp_path / "empty.jsonl", "", " "), []):
        with pytest.raises(DataError, match="holds no example"):
            read_examples(nothing)
