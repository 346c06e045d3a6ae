"""Answers to the exercises of chapter 9: wrong ones, and honest variants of right ones.

A wrong answer comes with its provenance, the outcome and the bug's name that the
checker must give, and the points that are left.
"""

from __future__ import annotations

from math import exp, log

import numpy as np
import torch
from wrong_answers.collect import collectors

WRONG, HONEST, wrong, honest = collectors()


# --- 9.1 factor_and_gap ---


def as_lists(*tensors):
    return (x.flatten().tolist() for x in tensors)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def left(g, e, factor):
    return dot(*2 * [[x - factor * y for x, y in zip(g, e, strict=True)]]) ** 0.5


@honest("9.1")
def by_lists(gradient, expected):
    g, e = as_lists(gradient, expected)
    f = dot(g, e) / dot(e, e)
    return [f, left(g, e, f) / (abs(f) * dot(e, e) ** 0.5)]


@honest("9.1")
def by_lstsq(gradient, expected):
    g, e = gradient.flatten(), expected.flatten()[:, None]
    f = torch.linalg.lstsq(e, g).solution[0]
    return np.array([f, (g - e[:, 0] * f).norm() / (e[:, 0] * f).norm()])


@honest("9.1")
def by_the_angle(gradient, expected):
    """The gap of the best multiple is the tangent of the angle, but for rounding."""
    g, e = gradient.flatten(), expected.flatten()
    f = torch.dot(g, e) / torch.dot(e, e)
    rest = g - f * e
    return torch.stack([f, rest.norm() / (f.abs() * e.norm())])


def of_factor(f, gradient, expected):
    g, e = as_lists(gradient, expected)
    return [f, left(g, e, f) / (abs(f) * dot(e, e) ** 0.5)]


@wrong("9.1", "ratio of the norms", 1)
def norms(gradient, expected):
    g, e = as_lists(gradient, expected)
    return of_factor((dot(g, g) / dot(e, e)) ** 0.5, gradient, expected)


@wrong("9.1", "mean of ratios", 2)
def entry_by_entry(gradient, expected):
    g, e = as_lists(gradient, expected)
    ratios = [x / y for x, y in zip(g, e, strict=True)]
    return of_factor(sum(ratios) / len(ratios), gradient, expected)


@wrong("9.1", "median of ratios", 2)
def middle_entry(gradient, expected):
    return of_factor((gradient / expected).median().item(), gradient, expected)


@wrong("9.1", "cosine", 0)
def angle(gradient, expected):
    g, e = as_lists(gradient, expected)
    cosine = dot(g, e) / (dot(g, g) * dot(e, e)) ** 0.5
    return of_factor(cosine, gradient, expected)


@wrong("9.1", "divided by the gradient's square", 0)
def upside_down(gradient, expected):
    g, e = as_lists(gradient, expected)
    return of_factor(dot(g, e) / dot(g, g), gradient, expected)


@wrong("9.1", "not divided", 0)
def inner_product(gradient, expected):
    g, e = as_lists(gradient, expected)
    return of_factor(dot(g, e), gradient, expected)


def changed_gap(gap):
    def answer(gradient, expected):
        g, e = as_lists(gradient, expected)
        f = dot(g, e) / dot(e, e)
        return [f, gap(g, e, f)]

    return answer


def size(x):
    return dot(x, x) ** 0.5


for bug, points, gap in [
    ("gap without the factor", 0, lambda g, e, f: left(g, e, 1) / size(e)),
    ("gap not relative", 2, left),
    ("gap relative to the gradient", 2, lambda g, e, f: left(g, e, f) / size(g)),
    ("gap relative to expected", 2, lambda g, e, f: left(g, e, f) / size(e)),
    ("gap squared", 2, lambda g, e, f: left(g, e, f) ** 2 / (f * f * dot(e, e))),
]:  # fmt: skip
    wrong("9.1", bug, points)(changed_gap(gap))


@wrong("9.1", "wrong shape", 0, "a sum forgotten")
def row_by_row(gradient, expected):
    return (gradient * expected).sum(-1) / expected.square().sum(-1)


# --- 9.2 anchored_optimum ---


def scaled(values):
    return [value / sum(values) for value in values]


def powers(a, b):
    def answer(teacher, start, weight):
        pairs = zip(teacher.tolist(), start.tolist(), strict=True)
        return scaled([p ** a(weight) * r ** b(weight) for p, r in pairs])

    return answer


@honest("9.2")
def by_powers(teacher, start, weight):
    pairs = zip(teacher.tolist(), start.tolist(), strict=True)
    return scaled([(p * r**weight) ** (1 / (1 + weight)) for p, r in pairs])


@honest("9.2")
def in_numpy(teacher, start, weight):
    x = (np.log(teacher.numpy()) + weight * np.log(start.numpy())) / (1 + weight)
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


@honest("9.2")
def optimum_in_float32(teacher, start, weight):
    share = weight / (1 + weight)
    return torch.softmax(
        (1 - share) * teacher.float().log() + share * start.float().log(), 0
    )


@wrong("9.2", "mean for the product", 1)
def arithmetic(teacher, start, weight):
    pairs = zip(teacher.tolist(), start.tolist(), strict=True)
    return [(p + weight * r) / (1 + weight) for p, r in pairs]


wrong("9.2", "powers without sum one", 1)(powers(lambda w: 1, lambda w: w))
wrong("9.2", "weights swapped", 0)(powers(lambda w: w / (1 + w), lambda w: 1 / (1 + w)))
wrong("9.2", "weight and its rest", 1)(powers(lambda w: 1 - w, lambda w: w))
wrong("9.2", "start left out", 1)(powers(lambda w: 1 / (1 + w), lambda w: 0))
wrong("9.2", "start divided away", 1)(powers(lambda w: 1 + w, lambda w: -w))


@wrong("9.2", "the teacher alone", 1)
def ignores_the_start(teacher, start, weight):
    return teacher.tolist()


@wrong("9.2", "not normalised", 1)
def product(teacher, start, weight):
    return (teacher.log() / (1 + weight) + start.log() * weight / (1 + weight)).exp()


# --- 9.3 price_of_a_wide_mask ---


def mean_of(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def kl(p, q):
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True))


@honest("9.3")
def difference_of_two_losses(response, other):
    p, both = response.tolist(), [*response.tolist(), *other.tolist()]
    reached, wanted = (
        sum(kl(row, mean_of(rows)) for row in p) / len(p) for rows in (both, p)
    )
    return reached - wanted


@honest("9.3")
def by_sums(response, other):
    n, m = len(response), len(other)
    wanted = response.mean(0)
    reached = (n * wanted + m * other.mean(0)) / (n + m)
    return torch.nn.functional.kl_div(reached.log(), wanted, reduction="sum")


@honest("9.3")
def price_in_float32(response, other):
    return by_sums(response.float(), other.float())


def priced(value):
    def answer(response, other):
        p, o = response.tolist(), other.tolist()
        return value(p, o, mean_of(p), mean_of(o), mean_of([*p, *o]))

    return answer


def entropy(p):
    return -sum(a * log(a) for a in p)


for bug, points, value in [
    ("both kinds weighed alike", 1, lambda p, o, m, n, x: kl(m, mean_of([m, n]))),
    (
        "what is unavoidable counted too",
        1,
        lambda p, o, m, n, x: sum(kl(row, x) for row in p) / len(p),
    ),
    (
        "only what is unavoidable",
        0,
        lambda p, o, m, n, x: sum(kl(row, m) for row in p) / len(p),
    ),
    ("sum over the positions", 1, lambda p, o, m, n, x: len(p) * kl(m, x)),
    ("arguments swapped", 0, lambda p, o, m, n, x: kl(x, m)),
    ("the others' mixture for the student", 0, lambda p, o, m, n, x: kl(m, n)),
    ("difference of entropies", 0, lambda p, o, m, n, x: entropy(x) - entropy(m)),
    (
        "measured on the whole mask",
        0,
        lambda p, o, m, n, x: (
            sum(kl(row, x) for row in [*p, *o]) - sum(kl(row, m) for row in p)
        ) / len([*p, *o]),
    ),
    ("wrong shape", 0, lambda p, o, m, n, x: m),
]:  # fmt: skip
    wrong("9.3", bug, points)(priced(value))


# --- 9.4 readings ---

GUESS = {"mean": 3e-5, "no_t2": 0.06, "short_row": 9, "on_support": 0.18}
HONEST += [
    ("9.4", GUESS),
    ("9.4", {"mean": 4e-5, "no_t2": 0.05, "short_row": 10, "on_support": 0.2}),
    ("9.4", {key: np.float32(value) for key, value in GUESS.items()}),
]
for key, value, bug in [
    ("mean", 1, "none"),
    ("mean", 32_000, "multiplied"),
    ("mean", 0.0056, "root"),
    ("no_t2", 0.25, "T for T^2"),
    ("no_t2", 16, "multiplied"),
    ("no_t2", 1, "none"),
    ("short_row", 1, "alike"),
    ("short_row", 0.11, "upside down"),
    ("short_row", 81, "squared"),
    ("on_support", 0.5, "all of it"),
    ("on_support", 1, "renormalised"),
    ("on_support", exp(-1), "1/e"),
    ("on_support", 3, None),
]:
    WRONG.append(("9.4", GUESS | {key: value}, "wrong", bug, 3.5, ""))
for value, bug in [
    (..., "incomplete"),
    ("much", "wrong type"),
    (-1, "not positive"),
    (float("inf"), "not finite"),
]:
    WRONG.append(("9.4", GUESS | {"mean": value}, "wrong", bug, 3, ""))

# --- 9.5 differential ---

KEY = {"a": "B", "b": "A", "c": "C", "d": "B", "e": "C"}
HONEST += [("9.5", KEY), ("9.5", {k: f" {v.lower()}" for k, v in KEY.items()})]
for item, right in KEY.items():
    for letter in sorted(set("ABC") - {right}):
        WRONG.append(("9.5", KEY | {item: letter}, "wrong", f"{item} {letter}", 4, ""))
for value, bug in [("D", "no such option"), (1, "no such option"), (..., "incomplete")]:
    WRONG.append(("9.5", KEY | {"a": value}, "wrong", bug, 4, ""))

# --- 9.6 test_loss: the answers are test suites ---


def batch(vocab=12, size=2.0, label=5):
    torch.manual_seed(1)
    labels = torch.full((3, 9), -100)
    labels[0, 2:4], labels[1, 4:8], labels[2, 3] = label, 5, 2
    s, t = size * torch.randn((2, 3, 9, vocab), dtype=torch.float64)
    return s, t, labels


def value_of(s, t, labels, temperature=1.0):
    """By lists: the formula, one token at a time."""
    found = []
    for row in range(len(labels)):
        for place in range(1, labels.shape[1]):
            if labels[row, place] == -100:
                continue
            log_p, log_q = (
                (x[row, place - 1] / temperature).log_softmax(0).tolist()
                for x in (t, s)
            )
            pairs = zip(log_p, log_q, strict=True)
            found.append(sum(exp(a) * (a - b) for a, b in pairs))
    return temperature**2 * sum(found) / len(found)


def near(a, b):
    return abs(float(a) - b) <= 1e-4 * abs(b) + 1e-7


def has_right_value(loss, size=2.0, temperature=1.0, vocab=12):
    s, t, labels = batch(vocab, size, label=0)
    wanted = value_of(s, t, labels, temperature)
    return near(loss(s, t, labels, temperature=temperature), wanted)


def has_right_gradient(loss, size=2.0, vocab=12):
    """Against finite differences of the right value along a direction."""
    s, t, labels = batch(vocab, size, label=0)
    leaf = s.clone().requires_grad_()
    loss(leaf, t, labels).backward()
    along, step = torch.randn_like(s), 1e-5
    up, down = (value_of(s + sign * step * along, t, labels) for sign in (1, -1))
    return abs((leaf.grad * along).sum().item() - (up - down) / 2 / step) < 1e-4


@honest("9.6")
def with_asserts(loss):
    for size, temperature in ((2.0, 1.0), (2.0, 3.0), (10.0, 1.0), (900.0, 1.0)):
        assert has_right_value(loss, size, temperature)
    assert has_right_gradient(loss)
    assert has_right_gradient(loss, 8.0)


@honest("9.6")
def with_booleans(loss):
    checks = [has_right_value(loss, 2.0, 3.0), has_right_value(loss, 900.0)]
    checks += [has_right_gradient(loss), has_right_gradient(loss, 8.0)]
    return np.bool_(all(checks))


@wrong("9.6", "accepts every loss", 0)
def nothing_tested(loss):
    pass


@wrong("9.6", "accepts every loss", 0)
def it_runs(loss):
    """A smoke test: it runs, and gives a number."""
    assert loss(*batch()).shape == ()


@wrong("9.6", "rejects every loss", 0)
def always_fails(loss):
    raise AssertionError("no loss is good enough")


@wrong("9.6", "rejects every loss", 0, "a mistake in the tests themselves")
def wrong_call(loss):
    loss(batch())


@wrong("9.6", "rejects every loss", 0, "the direction swapped in the test")
def expects_reverse_kl(loss):
    s, t, labels = batch()
    return near(loss(s, t, labels), value_of(t, s, labels))


@wrong("9.6", "rejects a right loss", 0, "no room for float32")
def too_strict(loss):
    s, t, labels = batch()
    wanted = value_of(s, t, labels)
    assert abs(float(loss(s, t, labels)) - wanted) < 1e-12


@wrong("9.6", "rejects a right loss", 0, "asks for a gradient of the teacher")
def teacher_must_have_a_gradient(loss):
    s, t, labels = batch()
    t.requires_grad_()
    loss(s, t, labels).backward()


@wrong("9.6", "temperature untested", 12, "one point: T = 1, one token, no padding")
def one_point(loss):
    s = torch.tensor([[[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]]])
    t = torch.tensor([[[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]])
    labels = torch.tensor([[-100, 1]])
    return near(loss(s, t, labels), value_of(s, t, labels))


@wrong("9.6", "temperature untested", 21)
def value_at_t_1(loss):
    assert has_right_value(loss)


@wrong("9.6", "gradient untested", 26)
def value_at_t_3(loss):
    assert has_right_value(loss, temperature=3.0)


@wrong("9.6", "gradient untested", 28)
def values_alone(loss):
    for size, temperature in ((2.0, 3.0), (900.0, 1.0)):
        assert has_right_value(loss, size, temperature)


@wrong("9.6", "temperature untested", 5, "equal models have a divergence of zero")
def zero_for_equal_models(loss):
    s, _, labels = batch()
    assert abs(float(loss(s, s, labels))) < 1e-6


@wrong("9.6", "temperature untested", 2, "it is not negative")
def not_negative(loss):
    assert loss(*batch()) >= -1e-9


@wrong("9.6", "extremes untested", 27, "a vocabulary smaller than k")
def small_vocabulary(loss):
    assert has_right_value(loss, temperature=3.0, vocab=7)
    assert has_right_gradient(loss, vocab=7)


@wrong("9.6", "extremes untested", 27, "the gradient where both are alike alone")
def gradient_near_the_teacher(loss):
    s, t, labels = batch(vocab=7, label=0)
    near_by = t + 0.1 * s
    assert near(loss(near_by, t, labels, 3.0), value_of(near_by, t, labels, 3.0))
    assert has_right_gradient(loss, vocab=7)


@wrong("9.6", "gradient untested", 24, "rows of one length without padding")
def one_length(loss):
    s, t, labels = batch()
    labels[:] = -100
    labels[:, 5:] = torch.tensor([3, 0, 4, 1])
    assert near(loss(s, t, labels, 3.0), value_of(s, t, labels, 3.0))


@wrong("9.6", "wrong type", 0)
def returns_the_loss(loss):
    return loss(*batch())


@wrong("9.6", "endless loop", 0, outcome="raised")
def never_stops(loss):
    while True:
        pass


counts = {"calls": 0}


@wrong("9.6", "depends on what came before", 0, "counts, and looks at nothing")
def keeps_count(loss):
    counts["calls"] = counts["calls"] % 37 + 1
    assert counts["calls"] <= 6


WRONG.append(("9.6", "a string", "wrong", "not a function", 0, ""))
