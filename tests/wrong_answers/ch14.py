"""Answers to the exercises of chapter 14: wrong ones, and variants of right ones.

A wrong answer comes with its provenance, the outcome and the bug's name that the
checker must give, and the points that are left.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import exp, log1p

import numpy as np
import torch
from wrong_answers.collect import collectors

WRONG, HONEST, wrong, honest = collectors()


# --- 14.1 paired_interval ---


def around(middle, half):
    return [middle, middle - half, middle + half]


def deviation(values, lost=1):
    middle = sum(values) / len(values)
    squares = sum((x - middle) ** 2 for x in values)
    return (squares / (len(values) - lost)) ** 0.5


def gaps(ours, theirs):
    return [a - b for a, b in zip(ours, theirs, strict=True)]


@honest("14.1")
def by_torch(ours, theirs, t):
    d = torch.tensor([ours, theirs], dtype=torch.float64)
    d = d[0] - d[1]
    half = t * d.std() / len(d) ** 0.5
    return torch.stack([d.mean(), d.mean() - half, d.mean() + half])


@honest("14.1")
def by_numpy(ours, theirs, t):
    d = np.array(ours) - np.array(theirs)
    half = t * d.std(ddof=1) / np.sqrt(len(d))
    return np.array([d.mean(), d.mean() - half, d.mean() + half])


@honest("14.1")
def by_covariance(ours, theirs, t):
    """The variance of a difference, from the rows' variances and covariance."""
    c = np.cov(ours, theirs)
    half = t * ((c[0, 0] + c[1, 1] - 2 * c[0, 1]) / len(ours)) ** 0.5
    return around(np.mean(ours) - np.mean(theirs), half)


@honest("14.1")
def by_kdlib(ours, theirs, t):
    from kdlib.ledger import mean_interval

    return list(vars(mean_interval(gaps(ours, theirs))).values())


@wrong("14.1", "not paired", 0, "scipy's ttest_ind where ttest_rel is due")
def independent(ours, theirs, t):
    c = np.cov(ours, theirs)
    half = t * ((c[0, 0] + c[1, 1]) / len(ours)) ** 0.5
    return around(np.mean(ours) - np.mean(theirs), half)


@wrong("14.1", "sum of two intervals", 0, "two error bars, held side by side")
def error_bars(ours, theirs, t):
    halves = [t * deviation(x) / len(x) ** 0.5 for x in (ours, theirs)]
    return around(np.mean(ours) - np.mean(theirs), sum(halves))


@wrong("14.1", "normal for t", 0)
def normal(ours, theirs, t):
    return by_numpy(ours, theirs, 1.96)


@wrong("14.1", "spread of a seed, not of the mean", 0, "mean plus or minus std")
def spread(ours, theirs, t):
    d = gaps(ours, theirs)
    return around(sum(d) / len(d), t * deviation(d))


@wrong("14.1", "n for its root", 0)
def over_n(ours, theirs, t):
    d = gaps(ours, theirs)
    return around(sum(d) / len(d), t * deviation(d) / len(d))


@wrong("14.1", "deviation with n", 0, "numpy's std, whose ddof is 0")
def population(ours, theirs, t):
    d = np.array(gaps(ours, theirs))
    return around(d.mean(), t * d.std() / len(d) ** 0.5)


@wrong("14.1", "variance for deviation", 0)
def of_variance(ours, theirs, t):
    d = gaps(ours, theirs)
    return around(sum(d) / len(d), t * deviation(d) ** 2 / len(d) ** 0.5)


@wrong("14.1", "best seed", 0)
def best(ours, theirs, t):
    d = gaps(ours, theirs)
    return around(max(d), t * deviation(d) / len(d) ** 0.5)


@wrong("14.1", "sign", 0)
def theirs_minus_ours(ours, theirs, t):
    return by_numpy(theirs, ours, t)


@wrong("14.1", "one row alone", 0)
def ours_alone(ours, theirs, t):
    return by_numpy(ours, [0.0] * len(ours), t)


@wrong("14.1", "half width halved", 0)
def width_halved(ours, theirs, t):
    return by_numpy(ours, theirs, t / 2)


@wrong("14.1", "wrong shape", 0)
def ends_alone(ours, theirs, t):
    return by_numpy(ours, theirs, t)[1:]


# --- 14.2 rival_steps ---


@honest("14.2")
def in_fractions(student, teacher, tokens, asked, a_step):
    a_pass = Fraction(2 * teacher * asked)
    return float((a_pass + 6 * student * tokens) / (6 * student * a_step))


@honest("14.2")
def tokens_and_more(student, teacher, tokens, asked, a_step):
    return (tokens + asked * teacher / student / 3) / a_step


@honest("14.2")
def as_numpy(*args):
    return np.float64(in_fractions(*args))


def steps(own, teachers, rival):
    """The three terms, in units of a parameter and token."""

    def answer(student, teacher, tokens, asked, a_step):
        cost = own * student * tokens + teachers * teacher * asked
        return cost / (rival * student * a_step)

    return answer


for bug, points, answer, seen in [
    ("equal tokens", 1, steps(6, 0, 6), "a teacher that comes for nothing"),
    ("one pass like a step", 1, steps(6, 6, 6), ""),
    ("one pass like a step", 1, steps(2, 2, 2), "no backward pass anywhere"),
    ("rival without backward pass", 0, steps(6, 2, 2), ""),
    ("student without backward pass", 0, steps(2, 2, 6), ""),
    ("one FLOP a weight", 1, steps(6, 1, 6), "multiply-adds taken for FLOPs"),
    ("teacher's share alone", 0, steps(0, 2, 6), ""),
]:
    WRONG.append(("14.2", answer, "wrong", bug, points, seen))


@wrong("14.2", "teacher at every step", 0, "a live teacher, not one in a box")
def live(student, teacher, tokens, asked, a_step):
    return in_fractions(student, teacher, tokens, tokens, a_step)


@wrong("14.2", "tokens, not steps", 0)
def read_tokens(*args):
    return in_fractions(*args) * args[-1]


@wrong("14.2", "paid by the teacher's size", 0)
def large_rival(student, teacher, tokens, asked, a_step):
    return (6 * student * tokens + 2 * teacher * asked) / (6 * teacher * a_step)


# --- 14.3 false_win ---


@honest("14.3")
def in_logs(tries, alpha):
    return 1 - exp(tries * log1p(-alpha / 2))


@honest("14.3")
def by_listing(tries, alpha):
    if tries > 10:  # 2^20 outcomes take a while
        return in_logs(tries, alpha)
    total = 0.0
    for wins in product((0, 1), repeat=tries):
        chance = 1.0
        for win in wins:
            chance *= alpha / 2 if win else 1 - alpha / 2
        total += chance * any(wins)
    return total


@honest("14.3")
def one_after_the_other(tries, alpha):
    """The first false win comes at some try."""
    return sum((1 - alpha / 2) ** k * alpha / 2 for k in range(tries))


@wrong("14.3", "both sides", 0)
def two_sided(tries, alpha):
    return 1 - (1 - alpha) ** tries


@wrong("14.3", "as with one try", 1, "an alpha that is not shared out")
def always_alpha(tries, alpha):
    return alpha / 2


@wrong("14.3", "sum of chances", 1, "Bonferroni's bound, taken for the chance")
def bound(tries, alpha):
    return tries * alpha / 2


@wrong("14.3", "sum of chances, both sides", 0)
def two_sided_bound(tries, alpha):
    return tries * alpha


@wrong("14.3", "every try", 1)
def all_win(tries, alpha):
    return (alpha / 2) ** tries


@wrong("14.3", "no win at all", 0)
def none_wins(tries, alpha):
    return (1 - alpha / 2) ** tries


@wrong("14.3", "exactly one", 1)
def one_wins(tries, alpha):
    return tries * alpha / 2 * (1 - alpha / 2) ** (tries - 1)


# --- 14.4 forecasts ---

GUESS = {"five": 0.05, "two": 0.36, "inputs": 0.025, "tries": 0.4, "flops": 1.67}
HONEST += [
    ("14.4", GUESS),
    ("14.4", {"five": 0.06, "two": 0.3, "inputs": 0.02, "tries": 0.5, "flops": 2}),
    ("14.4", {key: np.float32(value) for key, value in GUESS.items()}),
]
for key, value, bug in [
    ("five", 0.111, "one seed's spread"),
    ("five", 0.0179, "deviation"),
    ("two", 0.0554, "normal for t"),
    ("inputs", 0.000625, "variance"),
    ("inputs", 0.5, "deviation of one input"),
    ("tries", 0.025, "one try"),
    ("tries", 1.0, "certain"),
    ("flops", 3.0, "teacher trained"),
    ("flops", 11.0, "sizes alone"),
    ("flops", 50.0, None),
]:
    WRONG.append(("14.4", GUESS | {key: value}, "wrong", bug, 4.5, ""))
for value, bug in [
    (..., "incomplete"),
    ("many", "wrong type"),
    (-1, "not positive"),
    (float("inf"), "not finite"),
]:
    WRONG.append(("14.4", GUESS | {"five": value}, "wrong", bug, 4, ""))

# --- 14.5 may_the_memo_say_so ---

KEY = {"a": "C", "b": "A", "c": "B", "d": "C", "e": "B", "f": "B"}
HONEST += [("14.5", KEY), ("14.5", {k: f" {v.lower()}" for k, v in KEY.items()})]
for item, right in KEY.items():
    for letter in sorted(set("ABC") - {right}):
        WRONG.append(("14.5", KEY | {item: letter}, "wrong", f"{item} {letter}", 5, ""))
for value, bug in [("D", "no such option"), (1, "no such option"), (..., "incomplete")]:
    WRONG.append(("14.5", KEY | {"a": value}, "wrong", bug, 5, ""))
