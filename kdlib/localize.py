"""The embedded corpus: an app that speaks its user's language.

One datum (a date, a price, a list of countries, ...) is given in English and
wanted in the user's locale and format. The strings come from the Unicode CLDR
through Babel; `notebooks/experiments/make_corpus.py` makes the file.

An example has a context c (an instruction in plain words, or worked examples),
a user input z (the English datum) and a response y. Its simplified context c'
is a short tag, or nothing.

    splits: train       what the shipped teacher was trained on, with answers
            unlabelled  inputs that the teacher has never seen
            validation, test
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdlib.errors import ArgumentError, DataError, nearest
from kdlib.pairs import PairedExample

LOCALES = {
    "de": "German",
    "es": "Spanish",
    "fr": "French",
    "it": "Italian",
    "pl": "Polish",
    "pt": "Portuguese",
}
FORMATS = ("long", "short")
SPLITS = ("train", "unlabelled", "validation", "test")
OPEN_KINDS = ("date", "time", "money", "unit", "relative", "number")
# Names cannot be inferred: every name is in the training split, and the other
# splits combine names anew.
CLOSED_KINDS = ("list", "country", "language")
KINDS = OPEN_KINDS + CLOSED_KINDS
COLUMNS = ["split", "kind", "en"] + [f"{loc}-{f}" for loc in LOCALES for f in FORMATS]

CORPUS = Path(__file__).parent / "data" / "localize.tsv.gz"
SHA256 = "e0bb2b3466563e3e65d9cb520642630840f48fc296c911f335eaa2511f8a161a"

INSTRUCTIONS = (
    "Write it in {language}, {form} form.",
    "Translate to {language}. Use the {form} format.",
    "The user reads {language} and wants the {form} form.",
    "{language} please, {form} style.",
    "Show this value in {language} ({form}).",
    "App language: {language}. Format: {form}.",
)


@dataclass(frozen=True)
class Datum:
    """One row of the corpus: the English text and its twelve renderings."""

    split: str
    kind: str
    english: str
    renderings: tuple[str, ...]

    def rendering(self, locale: str, form: str) -> str:
        """The text for a locale and a format ("long" or "short")."""
        column = list(LOCALES).index(locale) * len(FORMATS) + FORMATS.index(form)
        return self.renderings[column]


@functools.cache
def _corpus() -> dict[str, list[Datum]]:
    try:
        text = gzip.decompress(CORPUS.read_bytes())
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise DataError(
            f"the corpus {CORPUS} cannot be read: {error}",
            "get the file again (`git checkout -- kdlib/data`), or make it with "
            "`python notebooks/experiments/make_corpus.py`",
        ) from error
    digest = hashlib.sha256(text).hexdigest()
    if digest != SHA256:
        raise DataError(
            f"the corpus {CORPUS} has checksum {digest[:12]}, not {SHA256[:12]}",
            "get the file again (`git checkout -- kdlib/data`)",
        )
    splits: dict[str, list[Datum]] = {name: [] for name in SPLITS}
    for line in text.decode().splitlines()[1:]:
        split, kind, english, *renderings = line.split("\t")
        splits[split].append(Datum(split, kind, english, tuple(renderings)))
    return splits


def load_split(split: str, *, kinds: Sequence[str] | None = None) -> list[Datum]:
    """The rows of a split, in file order; only the given kinds if named.

    Raises ArgumentError for an unknown split or kind, DataError where nothing is
    left or the file is damaged.
    """
    check_name("split", split, SPLITS)
    for kind in kinds or ():
        check_name("kinds", kind, KINDS)
    data = _corpus()[split]
    if kinds is not None:
        data = [datum for datum in data if datum.kind in kinds]
    if not data:
        raise DataError(
            f"split={split!r} with kinds={kinds!r} holds no example",
            f"name at least one of the kinds {', '.join(KINDS)}",
        )
    return data


def instruction(locale: str, form: str, variant: int = 0) -> str:
    """The context in plain words; `variant` picks one of the phrasings."""
    template = INSTRUCTIONS[variant % len(INSTRUCTIONS)]
    return template.format(language=LOCALES[locale], form=form)


def worked_examples(data: Sequence[Datum], locale: str, form: str) -> str:
    """The context as worked examples, one a line: `English => answer`."""
    return "\n".join(f"{d.english} => {d.rendering(locale, form)}" for d in data)


def tag(locale: str, form: str) -> str:
    """The shortest context that still names the task."""
    return f"{locale} {form}"


def examples(
    split: str,
    *,
    locales: Sequence[str] = tuple(LOCALES),
    formats: Sequence[str] = FORMATS,
    kinds: Sequence[str] | None = None,
    context: str = "instruction",
    simplified: str = "nothing",
    shots: int = 4,
    limit: int | None = None,
    seed: int = 0,
) -> list[PairedExample]:
    """Examples for the teacher (c, z) and the student (c', z), with the answer.

    context, simplified: "instruction", "examples" (`shots` worked examples from
        the training split, drawn anew for every datum), "tag" or "nothing"
    limit: use the first `limit` datums; every datum gives one example for each
        locale and format

    Raises ArgumentError for an unknown name, DataError where nothing is left.
    """
    for locale in locales:
        check_name("locales", locale, LOCALES)
    for form in formats:
        check_name("formats", form, FORMATS)
    if limit is not None and limit < 1:
        raise ArgumentError(f"limit={limit}", "use a positive number, or None for all")
    if not locales or not formats:
        raise DataError(
            f"locales={locales!r}, formats={formats!r} leave no example",
            f"name at least one of {', '.join(LOCALES)}, "
            f"and one of {', '.join(FORMATS)}",
        )
    rng = random.Random(seed)
    make_context = _context_maker("context", context, shots, rng)
    make_simplified = _context_maker("simplified", simplified, shots, rng)
    return [
        PairedExample(
            user_input=datum.english,
            response=datum.rendering(locale, form),
            context=make_context(locale, form),
            simplified_context=make_simplified(locale, form),
        )
        for datum in load_split(split, kinds=kinds)[:limit]
        for locale in locales
        for form in formats
    ]


def _context_maker(
    argument: str, name: str, shots: int, rng: random.Random
) -> Callable[[str, str], str]:
    makers = {
        "instruction": instruction,
        "tag": tag,
        "nothing": lambda locale, form: "",
        "examples": lambda locale, form: worked_examples(
            rng.sample(load_split("train"), shots), locale, form
        ),
    }
    check_name(argument, name, makers)
    return makers[name]


def check_name(argument: str, value: str, known) -> None:
    """Raise ArgumentError, with the nearest right name, if `value` is unknown."""
    if value in known:
        return
    raise ArgumentError(f"{argument}={value!r} is unknown", nearest(value, known))
