"""Answers to the exercises of chapter 8: wrong ones, and honest variants of right ones.

A wrong answer comes with its provenance, the outcome and the bug's name that the
checker must give, and the points that are left.
"""

from __future__ import annotations

import re
from itertools import product
from math import exp

import numpy as np
import torch
from wrong_answers.collect import collectors

WRONG, HONEST, wrong, honest = collectors()


# --- 8.1 expected_risk ---

# The checker has powers of 1 - f. These list what the draws can be.


def over_all_draws(frequency, seen, unseen, draws, loss):
    """The mean of loss(read, f, seen, unseen) over all sequences of draws."""
    lists = [x.tolist() for x in (frequency, seen, unseen)]
    total = 0.0
    for drawn in product(range(len(frequency)), repeat=draws):
        chance = 1.0
        for x in drawn:
            chance *= lists[0][x]
        total += chance * loss(set(drawn), *lists)
    return total


@honest("8.1")
def by_listing(frequency, seen, unseen, draws):
    if len(frequency) ** draws > 20_000:  # 4^9 sequences take a while
        return in_logs(frequency, seen, unseen, draws)

    def loss(read, f, seen, unseen):
        return sum(f[x] * (seen[x] if x in read else unseen[x]) for x in range(len(f)))

    return over_all_draws(frequency, seen, unseen, draws, loss)


@honest("8.1")
def in_logs(frequency, seen, unseen, draws):
    missing = (draws * (-frequency).log1p()).exp()
    return frequency @ (seen + missing * (unseen - seen))


@honest("8.1")
def in_numpy(frequency, seen, unseen, draws):
    f, s, u = (x.numpy() for x in (frequency, seen, unseen))
    gone = np.power(1 - f, draws)
    return np.sum(f * (gone * u + (1 - gone) * s))


@honest("8.1")
def risk_in_float32(frequency, seen, unseen, draws):
    return in_logs(frequency.float(), seen.float(), unseen.float(), draws)


def plain(missing, frequency, seen, unseen, weights=None):
    """Input by input, in plain Python."""
    f, s, u = (x.tolist() for x in (frequency, seen, unseen))
    weights = f if weights is None else weights
    return sum(
        w * ((1 - m) * a + m * b)
        for w, m, a, b in zip(weights, map(missing, f), s, u, strict=True)
    )


@wrong("8.1", "inputs weighed alike", 0)
def mean_over_inputs(frequency, seen, unseen, draws):
    n = len(frequency)
    return plain(lambda f: (1 - f) ** draws, frequency, seen, unseen, [1 / n] * n)


@wrong("8.1", "frequency forgotten", 0)
def sum_over_inputs(frequency, seen, unseen, draws):
    missing = (1 - frequency) ** draws
    return ((1 - missing) * seen + missing * unseen).sum()


@wrong("8.1", "a single draw", 0)
def one_draw(frequency, seen, unseen, draws):
    return plain(lambda f: 1 - f, frequency, seen, unseen)


@wrong("8.1", "in every draw", 0)
def found_each_time(frequency, seen, unseen, draws):
    return plain(lambda f: 1 - f**draws, frequency, seen, unseen)


@wrong("8.1", "expected number for a chance", 0)
def linear(frequency, seen, unseen, draws):
    return plain(lambda f: 1 - draws * f, frequency, seen, unseen)


@wrong("8.1", "approximation for rare inputs", 0)
def poisson(frequency, seen, unseen, draws):
    return plain(lambda f: exp(-draws * f), frequency, seen, unseen)


@wrong("8.1", "seen and unseen swapped", 0)
def swapped(frequency, seen, unseen, draws):
    return in_logs(frequency, unseen, seen, draws)


@wrong("8.1", "loss of what was read forgotten", 2)
def unread_alone(frequency, seen, unseen, draws):
    return frequency @ ((1 - frequency) ** draws * unseen)


@wrong("8.1", "risk of what is missing, renormalised", 0)
def given_missing(frequency, seen, unseen, draws):
    weights = frequency * (1 - frequency) ** draws
    return (weights / weights.sum()) @ unseen


@wrong("8.1", "wrong shape", 0, "the sum forgotten")
def each_input(frequency, seen, unseen, draws):
    missing = (1 - frequency) ** draws
    return frequency * ((1 - missing) * seen + missing * unseen)


# --- 8.2 favourite_is_wrong ---

# The checker has binomial coefficients. These walk through all labellings.


def by_labelling(error, labels, worth):
    total = 0.0
    for wrong_ones in product((0, 1), repeat=labels):
        k = sum(wrong_ones)
        total += worth(k) * error**k * (1 - error) ** (labels - k)
    return total


@honest("8.2")
def all_labellings(error, labels):
    def worth(k):
        return 1 if k > labels - k else 0.5 if k == labels - k else 0

    return by_labelling(error, labels, worth)


@honest("8.2")
def label_by_label(error, labels):
    chances = np.array([1.0])
    for _ in range(labels):
        chances = np.convolve(chances, [1 - error, error])
    k = np.arange(labels + 1)
    return chances[2 * k > labels].sum() + chances[2 * k == labels].sum() / 2


@honest("8.2")
def by_torch(error, labels):
    k = torch.arange(labels + 1, dtype=torch.float64)
    chances = torch.distributions.Binomial(
        labels, torch.tensor(error, dtype=torch.float64)
    )
    worth = ((2 * k - labels).sign() + 1) / 2
    return (chances.log_prob(k).exp() * worth).sum()


@wrong("8.2", "teacher's error", 0)
def as_the_teacher(error, labels):
    return error


@wrong("8.2", "ties are right", 2)
def lucky(error, labels):
    return by_labelling(error, labels, lambda k: k > labels / 2)


@wrong("8.2", "ties are wrong", 2)
def unlucky(error, labels):
    return by_labelling(error, labels, lambda k: k >= labels / 2)


@wrong("8.2", "all labels wrong", 0)
def unanimous(error, labels):
    return by_labelling(error, labels, lambda k: k == labels)


@wrong("8.2", "one wrong label", 0)
def any_of_them(error, labels):
    return by_labelling(error, labels, lambda k: k > 0)


@wrong("8.2", "orders forgotten", 0)
def one_order(error, labels):
    ways = [error**k * (1 - error) ** (labels - k) for k in range(labels + 1)]
    half = labels / 2
    return sum(w * (1 if k > half else 0.5 if k == half else 0)
               for k, w in enumerate(ways))  # fmt: skip


@wrong("8.2", "right for wrong", 0)
def is_right(error, labels):
    return all_labellings(1 - error, labels)


@wrong("8.2", "one label too many", 0)
def one_more(error, labels):
    return by_labelling(error, labels, lambda k: k > labels // 2 + 1)


@wrong("8.2", None, 0, "the share of wrong labels has the mean `error`, not more")
def half_way_to_it(error, labels):
    return error * (1 - error)


# --- 8.3 fidelity_and_accuracy ---


def walked(student, teacher, truth, *cases):
    """Shares of the inputs for which each case holds, in plain Python."""
    rows = list(zip(student.tolist(), teacher.tolist(), truth.tolist(), strict=True))
    return [sum(bool(case(*row)) for row in rows) / len(rows) for case in cases]


def agreed(s, t, y):
    return s == t


def repaired(s, t, y):
    return s == y != t


def broken(s, t, y):
    return s != y == t


@honest("8.3")
def in_plain_python(student, teacher, truth):
    return walked(student, teacher, truth, agreed, repaired, broken)


@honest("8.3")
def from_accuracies(student, teacher, truth):
    ours, theirs = (student == truth).double(), (teacher == truth).double()
    both = (ours * theirs).mean()
    same = (student == teacher).double().mean()
    return torch.stack([same, ours.mean() - both, theirs.mean() - both])


@honest("8.3")
def with_numpy(student, teacher, truth):
    s, t, y = (x.numpy() for x in (student, teacher, truth))
    parts = s == t, (s == y) & (t != y), (s != y) & (t == y)
    return np.array([np.count_nonzero(p) / len(y) for p in parts])


@honest("8.3")
def shares_in_float32(student, teacher, truth):
    return torch.tensor(in_plain_python(student, teacher, truth))


@wrong("8.3", "accuracy for agreement", 0)
def accuracy_first(student, teacher, truth):
    return walked(student, teacher, truth, lambda s, t, y: s == y, repaired, broken)


@wrong("8.3", "agreement where both are right", 1)
def right_together(student, teacher, truth):
    return walked(
        student, teacher, truth, lambda s, t, y: s == t == y, repaired, broken
    )


@wrong("8.3", "both wrong taken for agreement", 1)
def alike_in_rightness(student, teacher, truth):
    def alike(s, t, y):
        return (s == y) == (t == y)

    return walked(student, teacher, truth, alike, repaired, broken)


@wrong("8.3", "repaired and broken swapped", 0)
def the_other_way(student, teacher, truth):
    return walked(student, teacher, truth, agreed, broken, repaired)


@wrong("8.3", "shares of the teacher's answers", 0)
def conditional(student, teacher, truth):
    same, up, down = in_plain_python(student, teacher, truth)
    right = (teacher == truth).double().mean().item()
    return [same, up / (1 - right), down / right]


@wrong("8.3", "counts for shares", 0)
def counted(student, teacher, truth):
    return [round(x * len(truth)) for x in in_plain_python(student, teacher, truth)]


@wrong("8.3", "disagreement", 0)
def differing(student, teacher, truth):
    same, up, down = in_plain_python(student, teacher, truth)
    return [1 - same, up, down]


@wrong("8.3", "another mistake taken for a repair", 1)
def any_change(student, teacher, truth):
    return walked(
        student,
        teacher,
        truth,
        agreed,
        lambda s, t, y: s != t and t != y,
        lambda s, t, y: s != t and t == y,
    )


@wrong("8.3", "wrong shape", 0)
def only_agreement(student, teacher, truth):
    return (student == teacher).double().mean()


# --- 8.4 may_be_trained_on ---


def folded(text):
    return " ".join(text.casefold().split())


def by_first_place(inputs, test, fold=folded):
    first = {}
    for place, text in enumerate(inputs):
        first.setdefault(fold(text), place)
    for text in test:
        first.pop(fold(text), None)
    stays = set(first.values())
    return [int(place in stays) for place in range(len(inputs))]


HONEST.append(("8.4", by_first_place))


@honest("8.4")
def with_a_regular_expression(inputs, test):
    return by_first_place(
        inputs, test, lambda text: re.sub(r"\s+", " ", text.strip()).lower()
    )


@honest("8.4")
def as_a_tensor(inputs, test):
    return torch.tensor(by_first_place(inputs, test))


@wrong("8.4", "test inputs kept", 0, "TIGER-AI-Lab/MAmmoTH#11")
def leaking(inputs, test):
    return by_first_place(inputs, [])


@wrong("8.4", "copies kept", 0, "TIGER-AI-Lab/MAmmoTH#11")
def copies(inputs, test):
    return [int(folded(x) not in map(folded, test)) for x in inputs]


@wrong("8.4", "last copy kept", 0)
def last_one(inputs, test):
    return by_first_place(inputs[::-1], test)[::-1]


@wrong("8.4", "all copies dropped", 0)
def unique_ones(inputs, test):
    all_of = [folded(x) for x in (*inputs, *set(map(folded, test)))]
    return [int(all_of.count(folded(x)) == 1) for x in inputs]


@wrong("8.4", "spelling of the test as it is", 2)
def raw_test(inputs, test):
    forbidden, stays = set(test), []
    for text in map(folded, inputs):
        stays.append(int(text not in forbidden))
        forbidden.add(text)
    return stays


@wrong("8.4", "spelling as it is", 2)
def raw(inputs, test):
    return by_first_place(inputs, test, str)


@wrong("8.4", "case not folded", 2)
def cased(inputs, test):
    return by_first_place(inputs, test, lambda text: " ".join(text.split()))


@wrong("8.4", "spaces not folded", 2)
def spaced(inputs, test):
    return by_first_place(inputs, test, str.lower)


@wrong("8.4", "inner spaces not folded", 2)
def stripped(inputs, test):
    return by_first_place(inputs, test, lambda text: text.lower().strip())


@wrong("8.4", "upside down", 0)
def to_go(inputs, test):
    return [1 - stays for stays in by_first_place(inputs, test)]


@wrong("8.4", "wrong shape", 0, "the inputs that stay, not a mark for each")
def numbers_of_those_that_stay(inputs, test):
    return [i for i, stays in enumerate(by_first_place(inputs, test)) if stays]


@wrong("8.4", "changes its input", 0, "cleaned in place")
def in_place(inputs, test):
    stays = by_first_place(inputs, test)
    inputs[:] = [x for x, kept in zip(inputs, stays, strict=True) if kept]
    return stays


# --- 8.5 forecasts ---

GUESS = {
    "never_drawn": 0.37,
    "outvoted": 0.1,
    "doubt": 0.22,
    "best": 0.87,
    "sampled": 0.05,
}
HONEST += [
    ("8.5", GUESS),
    ("8.5", GUESS | {"never_drawn": 0.3, "outvoted": 0.12, "best": 0.9}),
    ("8.5", {key: np.float32(value) for key, value in GUESS.items()}),
]
for key, value, bug in [
    ("never_drawn", 0.001, "nearly none"),
    ("never_drawn", 0.63, "share drawn"),
    ("outvoted", 0.2, "teacher's error"),
    ("outvoted", 0.008, "all three wrong"),
    ("doubt", 1.61, "log of the error"),
    ("doubt", 0.5, "entropy"),
    ("best", 0.4, "not above the teacher"),
    ("best", 0.53, "agreement"),
    ("sampled", 0.1, "a nat for each"),
    ("sampled", 0.001, "1/n"),
    ("sampled", 3, None),
]:
    WRONG.append(("8.5", GUESS | {key: value}, "wrong", bug, 4.5, ""))
for value, bug in [
    (..., "incomplete"),
    ("much", "wrong type"),
    (-1, "not positive"),
    (float("inf"), "not finite"),
]:
    WRONG.append(("8.5", GUESS | {"best": value}, "wrong", bug, 4, ""))

# --- 8.6 what_more_data_does ---

KEY = {"a": "B", "b": "C", "c": "A", "d": "C", "e": "A", "f": "B"}
HONEST += [("8.6", KEY), ("8.6", {k: f" {v.lower()}" for k, v in KEY.items()})]
for item, right in KEY.items():
    for letter in sorted(set("ABC") - {right}):
        WRONG.append(("8.6", KEY | {item: letter}, "wrong", f"{item} {letter}", 5, ""))
for value, bug in [("D", "no such option"), (1, "no such option"), (..., "incomplete")]:
    WRONG.append(("8.6", KEY | {"a": value}, "wrong", bug, 5, ""))
