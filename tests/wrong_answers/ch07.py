"""Answers to the exercises of chapter 7: wrong ones, and honest variants of right ones.

A wrong answer comes with its provenance, the outcome and the bug's name that the
checker must give, and the points that are left.
"""

from __future__ import annotations

from math import exp, log, log2, prod

import numpy as np
import torch
from wrong_answers.collect import collectors

WRONG, HONEST, wrong, honest = collectors()


# --- 7.1 recovery ---


@honest("7.1")
def by_the_formula(gain, floor, kl):
    gain, floor, kl = gain.mean(), floor.mean(), kl.mean()
    return 1 - (kl - floor) / (gain - floor)


@honest("7.1")
def in_plain_python(gain, floor, kl):
    g, f, k = (sum(x.tolist()) for x in (gain, floor, kl))
    return (g - k) / (g - f)


@honest("7.1")
def in_numpy(gain, floor, kl):
    g, f, k = (x.numpy() for x in (gain, floor, kl))
    return np.sum(g - k) / np.sum(g - f)


@wrong("7.1", "floor forgotten", 1)
def no_floor(gain, floor, kl):
    return (gain.sum() - kl.sum()) / gain.sum()


@wrong("7.1", "floor in one place only", 1)
def half_a_floor(gain, floor, kl):
    return 1 - (kl.sum() - floor.sum()) / gain.sum()


@wrong("7.1", "mean of ratios", 0)
def input_by_input(gain, floor, kl):
    ratios = [
        1 - (k - f) / (g - f)
        for g, f, k in zip(gain.tolist(), floor.tolist(), kl.tolist(), strict=True)
    ]
    return sum(ratios) / len(ratios)


@wrong("7.1", "share that is left", 0)
def what_is_left(gain, floor, kl):
    return (kl.sum() - floor.sum()) / (gain.sum() - floor.sum())


@wrong("7.1", "cut off at zero", 3)
def clamped(gain, floor, kl):
    return by_the_formula(gain, floor, kl).clamp(0, 1)


@wrong("7.1", "nats for a share", 0)
def in_nats(gain, floor, kl):
    return gain.mean() - kl.mean()


@wrong("7.1", "nats for a share", 0)
def in_nats_summed(gain, floor, kl):
    return gain.sum() - kl.sum()


@wrong("7.1", "upside down", 0)
def inverted(gain, floor, kl):
    return (gain.sum() - floor.sum()) / (gain.sum() - kl.sum())


@wrong("7.1", "wrong shape", 0, "the sums forgotten")
def each_input(gain, floor, kl):
    return 1 - (kl - floor) / (gain - floor)


# --- 7.2 best_next_word ---

# The checker has Bayes' weights. These divide two probabilities of whole beginnings.


def beginnings(prior, probs, written, combine=prod):
    """For each context: the prior times what it says of the written words."""
    found = []
    for r, rows in zip(prior.tolist(), probs.tolist(), strict=True):
        said = [rows[i][w] for i, w in enumerate(written.tolist())]
        found.append(r * combine(said))
    return found


def mixed(weights, rows):
    return [sum(w * row[v] for w, row in zip(weights, rows, strict=True))
            for v in range(len(rows[0]))]  # fmt: skip


def scaled(values):
    return [value / sum(values) for value in values]


@honest("7.2")
def ratio_of_two_beginnings(prior, probs, written):
    return scaled(mixed(beginnings(prior, probs, written), probs[:, -1].tolist()))


@honest("7.2")
def in_logs(prior, probs, written):
    log_weights = prior.log()
    for place, word in enumerate(written.tolist()):
        log_weights = log_weights + probs[:, place, word].log()
    log_weights = log_weights.log_softmax(0)
    return (log_weights[:, None] + probs[:, -1].log()).logsumexp(0).exp()


@honest("7.2")
def step_by_step(prior, probs, written):
    weights = prior.clone()
    for place, word in enumerate(written.tolist()):
        weights = weights * probs[:, place, word]
        weights = weights / weights.sum()
    return (weights[:, None] * probs[:, -1]).sum(0)


@honest("7.2")
def next_in_float32(prior, probs, written):
    return step_by_step(prior.float(), probs.float(), written)


@wrong("7.2", "what was written is ignored", 1)
def by_the_prior(prior, probs, written):
    return mixed(prior.tolist(), probs[:, -1].tolist())


@wrong("7.2", "last word alone", 3)
def last_word(prior, probs, written):
    weights = beginnings(prior, probs, written, lambda s: s[-1] if s else 1)
    return mixed(scaled(weights), probs[:, -1].tolist())


@wrong("7.2", "one word late", 1)
def late(prior, probs, written):
    weights = scaled(beginnings(prior, probs, written[:-1]))
    return mixed(weights, probs[:, -1].tolist())


@wrong("7.2", "prior forgotten", 0)
def flat_prior(prior, probs, written):
    return ratio_of_two_beginnings(torch.ones_like(prior), probs, written)


@wrong("7.2", "added for multiplied", 3)
def added(prior, probs, written):
    weights = beginnings(prior, probs, written, lambda s: sum(s) if s else 1)
    return mixed(scaled(weights), probs[:, -1].tolist())


@wrong("7.2", "likeliest context alone", 0)
def one_bet(prior, probs, written):
    weights = beginnings(prior, probs, written)
    return probs[weights.index(max(weights)), -1]


@wrong("7.2", "not normalised", 1)
def joint(prior, probs, written):
    return mixed(beginnings(prior, probs, written), probs[:, -1].tolist())


@wrong("7.2", "product for the mixture", 0)
def geometric(prior, probs, written):
    weights = scaled(beginnings(prior, probs, written))
    return scaled([exp(v) for v in mixed(weights, probs[:, -1].log().tolist())])


@wrong("7.2", "wrong shape", 0, "the sum over contexts forgotten")
def one_a_context(prior, probs, written):
    return probs[:, -1]


# --- 7.3 reverse_floor ---


def groups(prior, teacher, simplified):
    """For each tag: the prior and the distributions of its contexts, as lists."""
    for tag in sorted(set(simplified.tolist())):
        mine = [c for c, of in enumerate(simplified.tolist()) if of == tag]
        yield [prior[c].item() for c in mine], [teacher[c].tolist() for c in mine]


def geometric_sum(weights, rows):
    """Z: the sum over answers of the product of p_c to the power of its weight."""
    return sum(
        prod(row[y] ** w for w, row in zip(weights, rows, strict=True))
        for y in range(len(rows[0]))
    )


def kl(p, q):
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True))


@honest("7.3")
def right_floor(*args):
    return -sum(sum(r) * log(geometric_sum(scaled(r), p)) for r, p in groups(*args))


@honest("7.3")
def loss_of_the_product(*args):
    """The best student, then its loss by the definition."""
    total = 0.0
    for r, p in groups(*args):
        w = scaled(r)
        g = scaled([prod(row[y] ** a for a, row in zip(w, p, strict=True))
                    for y in range(len(p[0]))])  # fmt: skip
        total += sum(a * kl(g, row) for a, row in zip(r, p, strict=True))
    return total


@honest("7.3")
def floor_in_float32(prior, teacher, simplified):
    total = torch.zeros(())
    for tag in simplified.unique():
        r = prior.float() * (simplified == tag)
        log_product = (r / r.sum()) @ teacher.float().log()
        total = total - r.sum() * log_product.exp().sum().log()
    return total


@wrong("7.3", "floor of the forward KL", 0)
def information(*args):
    total = 0.0
    for r, p in groups(*args):
        m = mixed(scaled(r), p)
        total += sum(a * kl(row, m) for a, row in zip(r, p, strict=True))
    return total


@wrong("7.3", "mixture for the product", 0)
def reverse_of_mixture(*args):
    total = 0.0
    for r, p in groups(*args):
        m = mixed(scaled(r), p)
        total += sum(a * kl(m, row) for a, row in zip(r, p, strict=True))
    return total


@wrong("7.3", "weights without sum one", 2)
def powers_of_the_prior(*args):
    return -sum(sum(r) * log(geometric_sum(r, p)) for r, p in groups(*args))


@wrong("7.3", "contexts weighed alike", 0)
def equal_powers(*args):
    return -sum(
        sum(r) * log(geometric_sum([1 / len(r)] * len(r), p)) for r, p in groups(*args)
    )


@wrong("7.3", "tags weighed alike", 2)
def mean_over_tags(*args):
    found = [-log(geometric_sum(scaled(r), p)) for r, p in groups(*args)]
    return sum(found) / len(found)


@wrong("7.3", "tags not weighed", 2)
def sum_over_tags(*args):
    return sum(-log(geometric_sum(scaled(r), p)) for r, p in groups(*args))


@wrong("7.3", "tag ignored", 2)
def one_product(prior, teacher, simplified):
    return right_floor(prior, teacher, 0 * simplified)


@wrong("7.3", "minus forgotten", 0)
def log_z(*args):
    return -right_floor(*args)


@wrong("7.3", "bits for nats", 0)
def floor_in_bits(*args):
    return -sum(sum(r) * log2(geometric_sum(scaled(r), p)) for r, p in groups(*args))


@wrong("7.3", None, 0, "arithmetic and geometric means confused half way")
def sum_of_means(prior, teacher, simplified):
    return (prior[:, None] * teacher**2).sum()


# --- 7.4 forecasts ---

GUESS = {"floor": 1.8, "per_token": 0.15, "exact": 0.17, "recovery": 0.8}
HONEST += [
    ("7.4", GUESS),
    ("7.4", {"floor": 2, "per_token": 0.2, "exact": 0.2, "recovery": 0.9}),
    ("7.4", {key: np.float32(value) for key, value in GUESS.items()}),
]
for key, value, bug in [
    ("floor", 1 / 6, "probability"),
    ("floor", 6, "count"),
    ("per_token", 1.79, "per answer"),
    ("per_token", 21.5, "times the tokens"),
    ("exact", 1, "all"),
    ("exact", 0.5, "a coin"),
    ("recovery", 0.5, "floor forgotten"),
    ("recovery", 0.167, "share that is left"),
    ("recovery", 3, None),
]:
    WRONG.append(("7.4", GUESS | {key: value}, "wrong", bug, 3.5, ""))
for value, bug in [
    (..., "incomplete"),
    ("much", "wrong type"),
    (-1, "not positive"),
    (float("inf"), "not finite"),
]:
    WRONG.append(("7.4", GUESS | {"floor": value}, "wrong", bug, 3, ""))

# --- 7.5 what_was_taken_in ---

KEY = {"a": "A", "b": "B", "c": "C", "d": "B", "e": "A"}
HONEST += [("7.5", KEY), ("7.5", {k: f" {v.lower()}" for k, v in KEY.items()})]
for item, right in KEY.items():
    for letter in sorted(set("ABC") - {right}):
        WRONG.append(("7.5", KEY | {item: letter}, "wrong", f"{item} {letter}", 4, ""))
for value, bug in [("D", "no such option"), (1, "no such option"), (..., "incomplete")]:
    WRONG.append(("7.5", KEY | {"a": value}, "wrong", bug, 4, ""))
