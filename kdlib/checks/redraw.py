"""What changes with a class, so that last year's answers do not serve this year.

A class has a word, its salt. Everything here is drawn from the salt and the question's
number alone: equal salts give equal questions, and an empty salt the course's own.

    inputs    of a function, made anew          (frame.Code)
    letters   of the options, moved             (frame.Choice)
    numbers   of a prediction, chosen           (frame.Predict)
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace


def source(question: str, name: str, salt: str = "") -> random.Random:
    """The random numbers for one part of a question."""
    return random.Random(f"{question} {name}" + (f" {salt}" if salt else ""))


def letters(
    question: str, item: str, options: Mapping[str, Sequence], salt: str
) -> dict[str, str]:
    """The class's letter -> the course's letter, for the options of one item.

    options: the course's letter -> (whether it is right, why)

    The right option always moves, so that no published letter is right in a class. All
    orders in which it does are equally likely.
    """
    own = list(options)
    if not salt or len(own) < 2:
        return {letter: letter for letter in own}
    draw, moved = source(question, f"letters {item}", salt), list(own)
    (right,) = [letter for letter in own if options[letter][0]]
    while moved[own.index(right)] == right:
        draw.shuffle(moved)
    return dict(zip(own, moved, strict=True))


def numbers(
    question: str, choices: Mapping[str, Sequence], salt: str
) -> SimpleNamespace:
    """The numbers of a prediction, by name.

    choices: a name -> its values, the course's own first. Several names in one key,
        with a blank between them, are drawn together, and their values are tuples.

    A class never gets the course's own value of any name.
    """
    draw, found = source(question, "numbers", salt), {}
    for names, values in choices.items():
        value = draw.choice(values[1:]) if salt else values[0]
        names = names.split()
        found |= zip(names, value if len(names) > 1 else [value], strict=True)
    return SimpleNamespace(**found)
