"""Make kdlib/data/localize.tsv.gz: one datum in English and in six locales.

    python notebooks/experiments/make_corpus.py [--out FILE]

Every string comes from the Unicode CLDR through Babel. CLDR changes between
Babel releases, so the result is committed with its checksum, and the tests
make it again with the pinned Babel and compare.

A datum is written in English (always the long form) and in every locale in a
long and a short form. Datums are drawn without repetition, shuffled, and only
then cut into splits, so no datum of an open kind is in two splits. Names of
countries, languages and currencies cannot be inferred from other names: every
name is in the training split, and the other splits combine names anew.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import hashlib
import random
from pathlib import Path

from babel import Locale, __version__
from babel.dates import format_date, format_time, format_timedelta
from babel.lists import format_list
from babel.numbers import (
    format_compact_decimal,
    format_currency,
    format_decimal,
    format_percent,
)
from babel.units import format_unit

from kdlib.localize import COLUMNS, CORPUS, FORMATS, LOCALES

SEED = 20261124
SIZES = {"train": 20_000, "unlabelled": 6_000, "validation": 500, "test": 1_000}
WEIGHTS = {
    "date": 3,
    "time": 1,
    "money": 3,
    "unit": 3,
    "relative": 1,
    "number": 2,
    "list": 2,
    "country": 1,
    "language": 1,
}
COUNTRIES = (
    "AR AT AU BE BG BR CA CH CL CN CO CU CZ DE DK EE EG ES FI FR GB GR HR HU ID IE "
    "IL IN IS IT JP KE KR LT LU LV MA MX MY NG NL NO NZ PE PH PL PT RO RS SE SG SI "
    "SK TH TN TR UA US UY VN"
).split()
LANGUAGES = (
    "ar bg cs da de el en es et fi fr he hi hr hu is it ja ko lt lv nl pl pt ro ru "
    "sk sv tr uk vi zh"
).split()
CURRENCIES = "USD EUR GBP JPY CHF CAD AUD SEK PLN BRL MXN INR".split()
UNITS = (
    "length-kilometer length-meter length-centimeter length-mile mass-kilogram "
    "mass-gram volume-liter volume-milliliter duration-day duration-hour "
    "duration-minute duration-second digital-megabyte digital-gigabyte "
    "speed-kilometer-per-hour temperature-celsius"
).split()
# Unit of time -> its length in seconds and the largest count drawn.
RELATIVE = {
    "second": (1, 59),
    "minute": (60, 59),
    "hour": (3_600, 47),
    "day": (86_400, 120),
    "week": (7 * 86_400, 60),
    "month": (30 * 86_400, 36),
    "year": (365 * 86_400, 99),
}
# Typographic spaces and apostrophes that a reader cannot tell from plain ones.
PLAIN = str.maketrans({"\u202f": " ", "\u00a0": " ", "\u2009": " ", "\u2019": "'"})


def render(value, locale: str, form: str) -> str:
    """One datum in one locale and form; `value` is (kind, variant, payload)."""
    kind, variant, x = value
    if kind == "date":
        return format_date(x, variant if form == "long" else "short", locale=locale)
    if kind == "time":
        return format_time(x, "medium" if form == "long" else "short", locale=locale)
    if kind == "money":
        style = "name" if form == "long" else "standard"
        return format_currency(x, variant, locale=locale, format_type=style)
    if kind == "unit":
        return format_unit(x, variant, form, locale=locale)
    if kind == "relative":
        return relative(x, variant, locale, form)
    if kind == "number":
        if variant == "compact":
            return format_compact_decimal(
                x, format_type=form, fraction_digits=1, locale=locale
            )
        if variant == "percent":
            # The locale's own pattern, but with the digits that the value has.
            return format_percent(x, locale=locale, decimal_quantization=False)
        return format_decimal(x, locale=locale)
    names = Locale.parse(locale)
    if kind == "language":
        language, country = x
        name = names.languages[language]
        return name if country is None else f"{name} ({names.territories[country]})"
    items = [names.territories[c] for c in x]
    return format_list(items, "or" if kind == "country" else "standard", locale=locale)


def relative(count: int, unit: str, locale: str, form: str) -> str:
    options = {
        "granularity": unit,
        # Larger than any count, so that Babel keeps the unit we name.
        "threshold": 1000,
        "add_direction": True,
        "locale": locale,
    }
    delta = datetime.timedelta(seconds=count * RELATIVE[unit][0])
    try:
        return format_timedelta(delta, format=form, **options)
    except KeyError:  # a locale without a short form of this unit has one form
        return format_timedelta(delta, format="long", **options)


def draw(rng: random.Random, kind: str):
    """A random datum of a kind, as `render` reads it."""
    if kind == "date":
        day = datetime.date(2000, 1, 1) + datetime.timedelta(rng.randrange(365 * 50))
        return kind, rng.choice(["full", "long"]), day
    if kind == "time":
        seconds = rng.randrange(86_400)
        clock = datetime.time(seconds // 3600, seconds // 60 % 60, seconds % 60)
        return kind, "", clock
    if kind == "money":
        cents = rng.randrange(1, 10 ** rng.randrange(3, 7))
        whole = rng.randrange(1, 10 ** rng.randrange(2, 6))
        return kind, rng.choice(CURRENCIES), rng.choice([cents / 100, whole])
    if kind == "unit":
        tenths = rng.randrange(1, 1000) / 10
        whole = rng.randrange(1, 10 ** rng.randrange(2, 6))
        return kind, rng.choice(UNITS), rng.choice([tenths, whole])
    if kind == "relative":
        unit = rng.choice(list(RELATIVE))
        count = rng.randrange(1, RELATIVE[unit][1] + 1)
        return kind, unit, count * rng.choice([1, -1])
    if kind == "number":
        variant = rng.choices(["compact", "percent", "decimal"], [3, 1, 1])[0]
        if variant == "compact":
            value = rng.randrange(11, 9_999) * 10 ** rng.randrange(2, 8)
        elif variant == "percent":
            value = rng.randrange(1, 1_000) / 1_000
        else:
            value = rng.randrange(1, 10**6) / 100
        return kind, variant, value
    if kind == "language":
        return kind, "", (rng.choice(LANGUAGES), rng.choice(COUNTRIES))
    count = 2 if kind == "country" else rng.randrange(2, 5)
    return kind, "", tuple(rng.sample(COUNTRIES, count))


def row(value) -> list[str]:
    cells = [value[0], render(value, "en", "long")]
    cells += [render(value, loc, form) for loc in LOCALES for form in FORMATS]
    return [cell.translate(PLAIN) for cell in cells]


def make() -> str:
    """The whole corpus as tab-separated text, the same on every platform."""
    rng = random.Random(SEED)
    names = [row(("country", "", (c,))) for c in COUNTRIES]
    names += [row(("language", "", (lang, None))) for lang in LANGUAGES]
    seen = {(r[0], r[1]) for r in names}
    rows: list[list[str]] = []
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    while len(rows) < sum(SIZES.values()) - len(names):
        new = row(draw(rng, rng.choices(kinds, weights)[0]))
        if (new[0], new[1]) not in seen:
            seen.add((new[0], new[1]))
            rows.append(new)
    # Small kinds run out while we draw, so early rows hold more of them:
    # shuffle before cutting, or the splits would differ in kind.
    rng.shuffle(rows)
    rows = names + rows
    lines, start = ["\t".join(COLUMNS)], 0
    for split, size in SIZES.items():
        part = rows[start : start + size]
        rng.shuffle(part)
        lines += ["\t".join([split, *cells]) for cells in part]
        start += size
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=CORPUS)
    out = parser.parse_args().out
    text = make().encode()
    with open(out, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(text)
    rows = text.count(b"\n") - 1
    print(f"Babel {__version__}: {rows} rows, {out.stat().st_size} bytes")
    print(f"sha256 of the text: {hashlib.sha256(text).hexdigest()}")


if __name__ == "__main__":
    main()
