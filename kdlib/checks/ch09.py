"""Chapter 9, "Diagnosis": factor and gap, changed objectives, and tests for losses."""

from __future__ import annotations

from math import exp

from kdlib.checks.frame import Bug, Choice, Code, Predict, Test
from kdlib.checks.suite import Suite

__all__: list[str] = []


def __dir__() -> list[str]:
    return __all__


def _generator(rng):
    import torch

    return torch.Generator().manual_seed(rng.randrange(10**6))


def _normal(rng, *shape):
    import torch

    return torch.randn(shape, generator=_generator(rng), dtype=torch.float64)


def _distributions(rng, *shape):
    return (1.5 * _normal(rng, *shape)).softmax(-1)


# --- 9.1: factor and gap ---


def _multiples(rng):
    for n, factor in ((3, 0.25), (5, 32.0), (4, 1.0)):
        expected = _distributions(rng, n, 6) - _distributions(rng, n, 6)
        yield factor * expected, expected


def _negative(rng):
    expected = _distributions(rng, 4, 5) - _distributions(rng, 4, 5)
    yield -3 * expected, expected


def _another(rng):
    for n in (3, 6):
        expected = _distributions(rng, n, 5) - _distributions(rng, n, 5)
        other = _distributions(rng, n, 5) - _distributions(rng, n, 5)
        yield expected + other, expected


def _pair(factor_of, gap_of=None):
    """(factor, |g - factor e| / |factor e|), or with one of the two changed."""

    def compute(gradient, expected):
        import torch

        factor = factor_of(gradient, expected)
        rest = (gradient - factor * expected).norm()
        gap = rest / (factor * expected).norm()
        if gap_of is not None:
            gap = gap_of(gradient, expected, factor, rest)
        return torch.stack([torch.as_tensor(factor), torch.as_tensor(gap)])

    return compute


def _least_squares(g, e):
    return (g * e).sum() / (e * e).sum()


_FACTOR = Code(
    "9.1",
    "factor_and_gap",
    ("gradient", "expected"),
    (
        Test("multiples of the expected gradient", 1, _multiples, lambda g, e: (2,)),
        Test("the sign is wrong", 1, _negative, lambda g, e: (2,)),
        Test("another loss", 2, _another, lambda g, e: (2,)),
    ),
    _pair(_least_squares),
    (
        Bug(
            "ratio of the norms",
            "a norm has no sign, and a gradient of the same length may point anywhere.",
            _pair(lambda g, e: g.norm() / e.norm()),
        ),
        Bug(
            "mean of ratios",
            "entries near zero decide a mean of ratios.",
            _pair(lambda g, e: (g / e).mean()),
        ),
        Bug(
            "median of ratios",
            "each entry has one vote, the smallest as much as the largest.",
            _pair(lambda g, e: (g / e).median()),
        ),
        Bug(
            "cosine",
            "the cosine has no size.",
            _pair(lambda g, e: (g * e).sum() / g.norm() / e.norm()),
        ),
        Bug(
            "divided by the gradient's square",
            "the factor multiplies the expected gradient, so that one's square is "
            "below.",
            _pair(lambda g, e: (g * e).sum() / (g * g).sum()),
        ),
        Bug(
            "not divided",
            "the inner product still contains the square of the expected gradient.",
            _pair(lambda g, e: (g * e).sum()),
        ),
        Bug(
            "gap without the factor",
            "the gap is what the multiple leaves, not the distance of the two.",
            _pair(_least_squares, lambda g, e, f, r: (g - e).norm() / e.norm()),
        ),
        Bug(
            "gap not relative",
            "a gap in absolute terms says nothing: gradients are small.",
            _pair(_least_squares, lambda g, e, f, r: r),
        ),
        Bug(
            "gap relative to the gradient",
            "it is asked in units of the multiple, factor times expected.",
            _pair(_least_squares, lambda g, e, f, r: r / g.norm()),
        ),
        Bug(
            "gap relative to expected",
            "it is asked in units of the multiple, factor times expected.",
            _pair(_least_squares, lambda g, e, f, r: r / e.norm()),
        ),
        Bug(
            "gap squared",
            "the gap is a ratio of norms, not of their squares.",
            _pair(_least_squares, lambda g, e, f, r: r**2 / (f * e).square().sum()),
        ),
    ),
    zero=1e-12,
)


# --- 9.2: two teachers at once ---


def _anchored(rng):
    for v, weight in ((3, 0.5), (5, 2.0), (4, 0.1)):
        yield _distributions(rng, v), _distributions(rng, v), weight


def _no_weight(rng):
    yield _distributions(rng, 4), _distributions(rng, 4), 0.0


def _geometric(a, b):
    """a, b: weight -> the powers of teacher and start."""

    def compute(teacher, start, weight):
        return (a(weight) * teacher.log() + b(weight) * start.log()).softmax(-1)

    return compute


_ANCHOR = Code(
    "9.2",
    "anchored_optimum",
    ("teacher", "start", "weight"),
    (
        Test("weight 0", 1, _no_weight, lambda p, r, w: p.shape),
        Test("other weights", 4, _anchored, lambda p, r, w: p.shape),
    ),
    _geometric(lambda w: 1 / (1 + w), lambda w: w / (1 + w)),
    (
        Bug(
            "mean for the product",
            "that is best for the forward KL to both.",
            lambda p, r, w: (p + w * r) / (1 + w),
        ),
        Bug(
            "powers without sum one",
            "the student's entropy counts 1 + weight times.",
            _geometric(lambda w: 1, lambda w: w),
        ),
        Bug(
            "weights swapped",
            "the weight is that of the start, not of the teacher.",
            _geometric(lambda w: w / (1 + w), lambda w: 1 / (1 + w)),
        ),
        Bug(
            "weight and its rest",
            "the teacher's term has the weight 1, not 1 - weight.",
            _geometric(lambda w: 1 - w, lambda w: w),
        ),
        Bug(
            "start left out",
            "what is left of the start is the entropy alone.",
            _geometric(lambda w: 1 / (1 + w), lambda w: 0),
        ),
        Bug(
            "start divided away",
            "the student is held near the start, not pushed away from it.",
            _geometric(lambda w: 1 + w, lambda w: -w),
        ),
        Bug(
            "the teacher alone",
            "the second term moves the optimum.",
            lambda p, r, w: p,
        ),
        Bug(
            "not normalised",
            "the probabilities must have the sum one.",
            lambda p, r, w: (p * r**w) ** (1 / (1 + w)),
        ),
    ),
)


# --- 9.3: what a widened mask costs ---


def _positions(rng):
    for n, m, v in ((2, 2, 3), (3, 5, 4), (6, 2, 5)):
        yield _distributions(rng, n, v), _distributions(rng, m, v)


def _one_each(rng):
    yield _distributions(rng, 1, 4), _distributions(rng, 1, 4)


def _kl(p, q):
    return (p * (p / q).log()).sum(-1)


def _pooled(response, other):
    import torch

    return torch.cat([response, other]).mean(0)


def _excess(
    of=lambda p, m: _kl(p.mean(0), m),
    mixture=_pooled,
):
    return lambda response, other: float(of(response, mixture(response, other)))


_WIDE = Code(
    "9.3",
    "price_of_a_wide_mask",
    ("response", "other"),
    (
        Test("one position of each kind", 1, _one_each),
        Test("several positions", 4, _positions),
    ),
    _excess(),
    (
        Bug(
            "both kinds weighed alike",
            "every position in the mask has one vote, not every kind.",
            _excess(mixture=lambda p, o: (p.mean(0) + o.mean(0)) / 2),
        ),
        Bug(
            "what is unavoidable counted too",
            "one distribution for all responses has a loss even under the right mask. "
            "Take that off.",
            _excess(lambda p, m: _kl(p, m).mean()),
        ),
        Bug(
            "only what is unavoidable",
            "that is the loss under the right mask.",
            lambda p, o: float(_kl(p, p.mean(0)).mean()),
        ),
        Bug(
            "sum over the positions",
            "it is asked for each response token.",
            _excess(lambda p, m: len(p) * _kl(p.mean(0), m)),
        ),
        Bug(
            "arguments swapped",
            "the teacher's mixture comes first.",
            _excess(lambda p, m: _kl(m, p.mean(0))),
        ),
        Bug(
            "the others' mixture for the student",
            "the student is pulled towards the others, it does not become them.",
            _excess(mixture=lambda p, o: o.mean(0)),
        ),
        Bug(
            "difference of entropies",
            "an entropy's difference is no divergence.",
            _excess(
                lambda p, m: (
                    _kl(p.mean(0), m)
                    + (p.mean(0) * m.log()).sum()
                    - (m * m.log()).sum()
                )
            ),
        ),
        Bug(
            "measured on the whole mask",
            "it is asked on the response tokens alone.",
            lambda p, o: float(
                _kl(_both(p, o), _pooled(p, o)).mean()
                - _kl(p, p.mean(0)).sum() / len(_both(p, o))
            ),
        ),
    ),
)


def _both(response, other):
    import torch

    return torch.cat([response, other])


# --- 9.4: predictions ---

_NUMBERS = {
    "words": (32_000, 50_257, 128_256, 151_936),
    "t": (4, 2, 3, 10),
    "short long": ((10, 90), (5, 95), (20, 80), (4, 96)),
}


def _readings(n):
    return {
        "mean": 1 / n.words,
        "no_t2": 1 / n.t**2,
        "short_row": n.long / n.short,
        "on_support": 0.5 / exp(1),
    }


_PREDICTION = Predict(
    "9.4",
    "readings",
    _readings,
    {
        "mean": (
            Bug("none", "The vocabulary is in the denominator as well.", lambda n: 1.0),
            Bug("multiplied", "A mean is smaller than a sum.", lambda n: n.words),
            Bug("root", "It is a mean over V, not a norm.", lambda n: n.words**-0.5),
        ),
        "no_t2": (
            Bug(
                "T for T^2", "Both sides are divided by T: squared.", lambda n: 1 / n.t
            ),
            Bug("multiplied", "What is left out made it larger.", lambda n: n.t**2),
            Bug("none", "Temperature shrinks a divergence.", lambda n: 1.0),
        ),
        "short_row": (
            Bug("alike", "That is what a mean over tokens would give.", lambda n: 1.0),
            Bug(
                "upside down",
                "The shorter row's token counts for more.",
                lambda n: n.short / n.long,
            ),
            Bug(
                "squared",
                "Each row's mean divides once.",
                lambda n: (n.long / n.short) ** 2,
            ),
        ),
        "on_support": (
            Bug("all of it", "A divergence with a tail would do that.", lambda n: 0.5),
            Bug(
                "renormalised",
                "That is the forward KL without its tail.",
                lambda n: 1.0,
            ),
            Bug("1/e", "The teacher has half of its mass there.", lambda n: exp(-1)),
        ),
    },
    _NUMBERS,
    (
        "V = {words:,}.",
        "$T = {t}$",
        "of {short} and of {long} tokens",
    ),
)


# --- 9.6: the inverse exercise ---


def _losses():
    from kdlib.checks import losses

    return losses


_TESTS = Suite(
    "9.6",
    "test_loss",
    ("loss",),
    lambda: _losses().RIGHT,
    lambda: _losses().WRONG,
    lambda: _losses().IDEAS,
)

QUESTIONS = (
    _FACTOR,
    _ANCHOR,
    _WIDE,
    _PREDICTION,
    Choice("9.5", "differential", "abcde"),
    _TESTS,
)
