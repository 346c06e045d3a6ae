"""The embedded corpus: splits, checksum, determinism, and clear refusals."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from pathlib import Path

import pytest

from kdlib import localize
from kdlib.errors import ArgumentError, DataError

ROOT = Path(__file__).parents[1]


def test_split_sizes():
    sizes = {name: len(localize.load_split(name)) for name in localize.SPLITS}
    assert sizes == {
        "train": 20_000,
        "unlabelled": 6_000,
        "validation": 500,
        "test": 1_000,
    }


def test_no_datum_is_in_two_splits():
    data = [d for name in localize.SPLITS for d in localize.load_split(name)]
    assert len({(d.kind, d.english) for d in data}) == len(data)


def test_every_name_of_the_other_splits_is_in_training():
    single = {
        d.english
        for d in localize.load_split("train", kinds=localize.CLOSED_KINDS)
        if not any(mark in d.english for mark in (",", " and ", " or ", "("))
    }
    for name in ("unlabelled", "validation", "test"):
        for datum in localize.load_split(name, kinds=localize.CLOSED_KINDS):
            text = datum.english.replace(")", "").replace(" (", ", ")
            for joint in (", and ", " and ", " or "):
                text = text.replace(joint, ", ")
            assert set(text.split(", ")) <= single, datum


def test_every_kind_is_in_every_split():
    for name in localize.SPLITS:
        kinds = {d.kind for d in localize.load_split(name)}
        assert kinds == set(localize.KINDS)


def test_the_command_still_makes_the_shipped_file():
    babel = pytest.importorskip("babel")
    if babel.__version__ != "2.18.0":
        pytest.skip(f"Babel {babel.__version__} carries another CLDR than 2.18.0")
    path = ROOT / "notebooks" / "experiments" / "make_corpus.py"
    spec = importlib.util.spec_from_file_location("make_corpus", path)
    make_corpus = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_corpus)
    text = make_corpus.make().encode()
    assert hashlib.sha256(text).hexdigest() == localize.SHA256
    assert gzip.decompress(localize.CORPUS.read_bytes()) == text


def test_known_renderings():
    datum = next(d for d in localize.load_split("train") if d.english == "France")
    assert datum.rendering("de", "long") == "Frankreich"
    assert datum.rendering("pl", "short") == "Francja"


def test_examples_carry_contexts_of_the_named_kinds():
    (example,) = localize.examples(
        "test",
        locales=["fr"],
        formats=["short"],
        context="examples",
        simplified="tag",
        shots=2,
        limit=1,
    )
    assert example.simplified_context == "fr short"
    assert example.context.count(" => ") == 2
    assert len(example.context.splitlines()) == 2
    plain = localize.examples("test", limit=1)
    assert len(plain) == 12 and {e.simplified_context for e in plain} == {""}
    assert plain[0].context == "Write it in German, long form."
    again = localize.examples("test", context="examples", limit=5, seed=3)
    assert again == localize.examples("test", context="examples", limit=5, seed=3)
    assert again != localize.examples("test", context="examples", limit=5, seed=4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"locales": ["fra"]}, "did you mean 'fr'"),
        ({"formats": ["lng"]}, "did you mean 'long'"),
        ({"kinds": ["dates"]}, "did you mean 'date'"),
        ({"context": "words"}, "context='words'"),
        ({"simplified": "tags"}, "did you mean 'tag'"),
        ({"limit": 0}, "limit=0"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(options, words):
    with pytest.raises(ArgumentError, match=words):
        localize.examples("test", **options)


def test_unknown_and_empty_splits_are_refused():
    with pytest.raises(ArgumentError, match="did you mean 'train'"):
        localize.load_split("trian")
    with pytest.raises(DataError, match="no example"):
        localize.examples("test", locales=[])
    with pytest.raises(DataError, match="holds no example"):
        localize.load_split("test", kinds=[])


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_file_is_named(tmp_path, monkeypatch, damage):
    path = tmp_path / "localize.tsv.gz"
    packed = localize.CORPUS.read_bytes()
    if damage == "cut":
        path.write_bytes(packed[:5000])
    elif damage == "changed":
        path.write_bytes(gzip.compress(gzip.decompress(packed) + b"x"))
    monkeypatch.setattr(localize, "CORPUS", path)
    localize._corpus.cache_clear()
    try:
        with pytest.raises(DataError, match="localize.tsv.gz"):
            localize.load_split("test")
    finally:
        localize._corpus.cache_clear()
