"""Chapter 14, "Capstone": intervals of pairs, equal budgets, false wins, memos."""

from __future__ import annotations

from math import sqrt
from statistics import mean, pstdev, stdev

from kdlib.checks.frame import Bug, Choice, Code, Predict, Test
from kdlib.ledger import t95

__all__: list[str] = []


def __dir__() -> list[str]:
    return __all__


# --- 14.1: the interval of a difference between paired runs ---


def _paired(rng, seeds):
    """Rows that share what a seed does to both, and a little of their own."""
    both = [rng.gauss(0.6, 0.1) for _ in range(seeds)]
    ours = [x + rng.gauss(0.08, 0.02) for x in both]
    theirs = [x + rng.gauss(0.0, 0.02) for x in both]
    return ours, theirs, t95(seeds - 1)


def _five(rng):
    yield _paired(rng, 5)


def _others(rng):
    for seeds in (2, 3, 8):
        yield _paired(rng, seeds)


def _differences(ours, theirs):
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def _around(middle, half):
    import torch

    return torch.tensor([middle, middle - half, middle + half], dtype=torch.float64)


def _interval(error=lambda d: stdev(d) / sqrt(len(d)), factor=None, middle=mean):
    def compute(ours, theirs, t):
        d = _differences(ours, theirs)
        return _around(middle(d), (factor or t) * error(d))

    return compute


def _unpaired(ours, theirs, t):
    n = len(ours)
    error = sqrt(stdev(ours) ** 2 / n + stdev(theirs) ** 2 / n)
    return _around(mean(ours) - mean(theirs), t * error)


def _lapping(ours, theirs, t):
    n = len(ours)
    half = t * (stdev(ours) + stdev(theirs)) / sqrt(n)
    return _around(mean(ours) - mean(theirs), half)


def _turned(ours, theirs, t):
    return _interval()(theirs, ours, t)


def _of_ours(ours, theirs, t):
    return _around(mean(ours), t * stdev(ours) / sqrt(len(ours)))


_PAIRED = Code(
    "14.1",
    "paired_interval",
    ("ours", "theirs", "t"),
    (
        Test("five seeds", 3, _five, lambda *args: (3,)),
        Test("other numbers of seeds", 2, _others, lambda *args: (3,)),
    ),
    _interval(),
    (
        Bug(
            "not paired",
            "it treats the two rows as if they came from different seeds. What a seed "
            "does to both falls out of the differences.",
            _unpaired,
        ),
        Bug(
            "sum of two intervals",
            "it adds the half widths of the rows' own intervals.",
            _lapping,
        ),
        Bug(
            "normal for t",
            "1.96 holds for many seeds. The deviation was estimated from these few.",
            _interval(factor=1.96),
        ),
        Bug(
            "spread of a seed, not of the mean",
            "the mean of n differences varies less than one of them.",
            _interval(error=stdev),
        ),
        Bug(
            "n for its root",
            "the deviation of a mean falls with the root of n.",
            _interval(error=lambda d: stdev(d) / len(d)),
        ),
        Bug(
            "deviation with n",
            "the sum of squares is divided by n. One was used up by the mean.",
            _interval(error=lambda d: pstdev(d) / sqrt(len(d))),
        ),
        Bug(
            "variance for deviation",
            "it forgets the root of the variance.",
            _interval(error=lambda d: stdev(d) ** 2 / sqrt(len(d))),
        ),
        Bug(
            "best seed",
            "it stands around the largest difference.",
            _interval(middle=max),
        ),
        Bug("sign", "it is theirs minus ours.", _turned),
        Bug("one row alone", "it is the interval of ours, not of the gain.", _of_ours),
        Bug(
            "half width halved",
            "the interval reaches t standard errors to either side.",
            _interval(error=lambda d: stdev(d) / sqrt(len(d)) / 2),
        ),
    ),
    zero=1e-9,
)


# --- 14.2: steps of a rival with equal FLOPs ---


def _budget(rng):
    return (
        rng.randrange(10**6, 5 * 10**6),
        rng.randrange(10**7, 5 * 10**7),
        rng.randrange(10**5, 10**6),
        rng.randrange(2 * 10**4, 10**5),
        rng.randrange(200, 600),
    )


def _budgets(rng):
    for _ in range(3):
        yield _budget(rng)


def _no_teacher(rng):
    student, _, tokens, _, step = _budget(rng)
    yield student, 10**7, tokens, 0, step


def _steps(train=6, ask=2, rival=6, often=False):
    def compute(student, teacher, tokens, asked, tokens_a_step):
        read = tokens if often else asked
        flops = train * student * tokens + ask * teacher * read
        return flops / (rival * student * tokens_a_step)

    return compute


_RIVAL = Code(
    "14.2",
    "rival_steps",
    ("student", "teacher", "tokens", "asked", "tokens_a_step"),
    (
        Test("a teacher that is asked once", 4, _budgets),
        Test("a teacher that is not asked", 1, _no_teacher),
    ),
    _steps(),
    (
        Bug(
            "equal tokens",
            "the rival gets as many tokens. The teacher's work is left out.",
            _steps(ask=0),
        ),
        Bug(
            "one pass like a step",
            "a training step costs three forward passes, and the teacher makes one.",
            _steps(ask=6),
        ),
        Bug(
            "rival without backward pass",
            "the rival is trained as well.",
            _steps(rival=2),
        ),
        Bug(
            "student without backward pass",
            "the distilled student is trained as well.",
            _steps(train=2),
        ),
        Bug(
            "one FLOP a weight",
            "a multiplication and an addition a weight: two in the teacher's forward "
            "pass.",
            _steps(ask=1),
        ),
        Bug(
            "teacher at every step",
            "it was asked once about each example, and written down.",
            _steps(often=True),
        ),
        Bug(
            "teacher's share alone",
            "the student's own steps belong to the budget.",
            _steps(train=0),
        ),
        Bug(
            "tokens, not steps",
            "it gives the tokens that the rival may read.",
            lambda *args: _steps()(*args) * args[-1],
        ),
        Bug(
            "paid by the teacher's size",
            "the rival has the student's size.",
            lambda s, t, *rest: _steps()(s, t, *rest) * s / t,
        ),
    ),
)


# --- 14.3: the chance of a false win ---


def _tries(rng):
    for tries in (2, 5, 20):
        yield tries, rng.uniform(0.02, 0.15)


def _one_try(rng):
    yield 1, rng.uniform(0.02, 0.15)


_FALSE = Code(
    "14.3",
    "false_win",
    ("tries", "alpha"),
    (Test("several tries", 3, _tries), Test("one try", 1, _one_try)),
    lambda tries, alpha: 1 - (1 - alpha / 2) ** tries,
    (
        Bug(
            "both sides",
            "an interval below zero is no win.",
            lambda tries, alpha: 1 - (1 - alpha) ** tries,
        ),
        Bug(
            "as with one try",
            "each further try has a chance of its own.",
            lambda tries, alpha: alpha / 2,
        ),
        Bug(
            "sum of chances",
            "two tries can both be false wins; a sum counts that twice.",
            lambda tries, alpha: tries * alpha / 2,
        ),
        Bug(
            "sum of chances, both sides",
            "an interval below zero is no win, and a sum counts twice.",
            lambda tries, alpha: tries * alpha,
        ),
        Bug(
            "every try",
            "one false win is enough to be shown.",
            lambda tries, alpha: (alpha / 2) ** tries,
        ),
        Bug(
            "no win at all",
            "it is the chance that no try wins.",
            lambda tries, alpha: (1 - alpha / 2) ** tries,
        ),
        Bug(
            "exactly one",
            "two false wins are no better than one.",
            lambda tries, alpha: tries * alpha / 2 * (1 - alpha / 2) ** (tries - 1),
        ),
    ),
)


# --- 14.4: predictions ---

_NUMBERS = {
    "deviation": (0.04, 0.02, 0.08, 0.1),
    "inputs": (400, 100, 2500, 10_000),
    "ideas ideas_word": ((20, "Twenty"), (3, "Three"), (5, "Five"), (10, "Ten")),
}


def _forecasts(n):
    return {
        "five": t95(4) * n.deviation / sqrt(5),
        "two": t95(1) * n.deviation / sqrt(2),
        "inputs": sqrt(0.5 * 0.5 / n.inputs),
        "tries": 1 - 0.975**n.ideas,
        "flops": (6 * 1e8 * 1e7 + 2 * 1e9 * 2e6) / (6 * 1e8 * 1e7),
    }


_PREDICTION = Predict(
    "14.4",
    "forecasts",
    _forecasts,
    {
        "five": (
            Bug(
                "one seed's spread",
                "Divide by the root of 5.",
                lambda n: t95(4) * n.deviation,
            ),
            Bug(
                "deviation",
                "That is one standard error.",
                lambda n: n.deviation / sqrt(5),
            ),
        ),
        "two": (
            Bug(
                "normal for t",
                "With two seeds t is 12.7, and not 2.",
                lambda n: 1.96 * n.deviation / sqrt(2),
            ),
        ),
        "inputs": (
            Bug("variance", "That is the variance.", lambda n: 0.5 * 0.5 / n.inputs),
            Bug(
                "deviation of one input",
                "Divide by the root of {inputs:,}.",
                lambda n: 0.5,
            ),
        ),
        "tries": (
            Bug("one try", "There are {ideas} of them.", lambda n: 0.025),
            Bug("certain", "About one in 40 wins by chance.", lambda n: 1.0),
        ),
        "flops": (
            Bug("teacher trained", "The teacher is not trained.", lambda n: 3.0),
            Bug("sizes alone", "It reads a fifth of the tokens.", lambda n: 11.0),
        ),
    },
    _NUMBERS,
    (
        "a sample deviation of {deviation:g}.",
        "tested on {inputs:,}.",
        "{ideas_word} ideas that do nothing",
    ),
)

QUESTIONS = (
    _PAIRED,
    _RIVAL,
    _FALSE,
    _PREDICTION,
    Choice("14.5", "may_the_memo_say_so", "abcdef"),
)
