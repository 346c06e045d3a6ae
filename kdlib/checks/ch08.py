"""Chapter 8, "The data D'": coverage, outvoted errors, fidelity, clean inputs."""

from __future__ import annotations

from math import comb, exp, log

from kdlib.checks.frame import Bug, Choice, Code, Predict, Test

__all__: list[str] = []


def __dir__() -> list[str]:
    return __all__


def _generator(rng):
    import torch

    return torch.Generator().manual_seed(rng.randrange(10**6))


def _positive(rng, n):
    import torch

    return 0.2 + torch.rand(n, generator=_generator(rng), dtype=torch.float64)


# --- 8.1: the risk of a student that knows what it has read ---


def _frequencies(rng, n):
    weights = _positive(rng, n) ** 3
    return weights / weights.sum()


def _nothing_left(rng):
    for inputs, draws in ((3, 4), (5, 2), (4, 9)):
        f = _frequencies(rng, inputs)
        yield f, 0 * f, 1 + _positive(rng, inputs), draws


def _something_left(rng):
    for inputs, draws in ((3, 3), (6, 5), (4, 1)):
        seen = 0.3 * _positive(rng, inputs)
        f = _frequencies(rng, inputs)
        yield f, seen, seen + 1 + _positive(rng, inputs), draws


def _risk(missing, seen, unseen, weights):
    return float((weights * ((1 - missing) * seen + missing * unseen)).sum())


def _by_missing(missing, weights=lambda f: f):
    def compute(frequency, seen, unseen, draws):
        gone = missing(frequency, draws)
        return _risk(gone, seen, unseen, weights(frequency))

    return compute


_COVERAGE = Code(
    "8.1",
    "expected_risk",
    ("frequency", "seen", "unseen", "draws"),
    (
        Test("what was read is known exactly", 2, _nothing_left),
        Test("a loss stays on what was read", 3, _something_left),
    ),
    _by_missing(lambda f, n: (1 - f) ** n),
    (
        Bug(
            "inputs weighed alike",
            "a rare input is seldom asked, so its loss counts little.",
            _by_missing(lambda f, n: (1 - f) ** n, lambda f: 0 * f + 1 / len(f)),
        ),
        Bug(
            "frequency forgotten",
            "the losses are added up, and not averaged over what is asked.",
            _by_missing(lambda f, n: (1 - f) ** n, lambda f: 0 * f + 1),
        ),
        Bug(
            "a single draw",
            "it asks whether one draw misses the input. D' has more of them.",
            _by_missing(lambda f, n: 1 - f),
        ),
        Bug(
            "in every draw",
            "an input is read if one draw finds it; it need not be in all.",
            _by_missing(lambda f, n: 1 - f**n),
        ),
        Bug(
            "expected number for a chance",
            "draws times frequency is how often an input is drawn, on average. As a "
            "chance it can be above one.",
            _by_missing(lambda f, n: 1 - n * f),
        ),
        Bug(
            "approximation for rare inputs",
            "exp(-draws * frequency) holds in the limit of rare inputs. These are "
            "common.",
            _by_missing(lambda f, n: (-n * f).exp()),
        ),
        Bug(
            "seen and unseen swapped",
            "it gives the inputs in D' the loss of those that are not.",
            lambda f, seen, unseen, n: _risk((1 - f) ** n, unseen, seen, f),
        ),
        Bug(
            "loss of what was read forgotten",
            "a student need not be perfect on what it has read.",
            lambda f, seen, unseen, n: _risk((1 - f) ** n, 0 * seen, unseen, f),
        ),
        Bug(
            "risk of what is missing, renormalised",
            "it divides by the chance to ask something that D' lacks.",
            lambda f, seen, unseen, n: float(
                (f * (1 - f) ** n * unseen).sum() / (f * (1 - f) ** n).sum()
            ),
        ),
    ),
)


# --- 8.2: errors that are outvoted ---


def _odd(rng):
    for labels in (3, 5, 9):
        yield rng.uniform(0.1, 0.4), labels
    yield rng.uniform(0.55, 0.7), 7


def _even(rng):
    for labels in (2, 4, 8):
        yield rng.uniform(0.1, 0.4), labels


def _votes(error, labels, weight=lambda k, n: (2 * k > n) + 0.5 * (2 * k == n)):
    return sum(
        weight(k, labels) * comb(labels, k) * error**k * (1 - error) ** (labels - k)
        for k in range(labels + 1)
    )


def _no_orders(error, labels):
    return sum(
        ((2 * k > labels) + 0.5 * (2 * k == labels))
        * error**k
        * (1 - error) ** (labels - k)
        for k in range(labels + 1)
    )


_OUTVOTED = Code(
    "8.2",
    "favourite_is_wrong",
    ("error", "labels"),
    (
        Test("an odd number of labels", 2, _odd),
        Test("an even number: ties", 2, _even),
    ),
    _votes,
    (
        Bug(
            "teacher's error",
            "that is how often the teacher is wrong, whatever the number of labels.",
            lambda error, labels: error,
        ),
        Bug(
            "ties are right",
            "it counts a tie as if the right answer always won it.",
            lambda error, labels: _votes(error, labels, lambda k, n: 2 * k > n),
        ),
        Bug(
            "ties are wrong",
            "it counts a tie as if the wrong answer always won it.",
            lambda error, labels: _votes(error, labels, lambda k, n: 2 * k >= n),
        ),
        Bug(
            "all labels wrong",
            "a majority of wrong labels is enough; they need not all be wrong.",
            lambda error, labels: error**labels,
        ),
        Bug(
            "one wrong label",
            "one wrong label is outvoted by the others.",
            lambda error, labels: 1 - (1 - error) ** labels,
        ),
        Bug(
            "orders forgotten",
            "k wrong labels can stand at several places among n.",
            _no_orders,
        ),
        Bug(
            "right for wrong",
            "it is the chance that the favourite is right.",
            lambda error, labels: 1 - _votes(error, labels),
        ),
        Bug(
            "one label too many",
            "it asks for more wrong labels than a majority takes.",
            lambda error, labels: _votes(error, labels, lambda k, n: 2 * k > n + 2),
        ),
    ),
)


# --- 8.3: fidelity and accuracy ---


def _answers(rng, n, classes=5):
    """(student, teacher, truth), which agree more often than by chance."""
    import torch

    generator = _generator(rng)
    truth = torch.randint(classes, (n,), generator=generator)

    def near(answers, share):
        other = torch.randint(classes, (n,), generator=generator)
        keep = torch.rand(n, generator=generator) < share
        return torch.where(keep, answers, other)

    teacher = near(truth, 0.5)
    return near(near(teacher, 0.7), 0.9), teacher, truth


def _some(rng):
    for n in (20, 31):
        yield _answers(rng, n)


def _student_is_right(rng):
    student, teacher, truth = _answers(rng, 24)
    yield truth.clone(), teacher, truth


def _split(student, teacher, truth):
    ours, theirs = student == truth, teacher == truth
    return _shares(student == teacher, ours & ~theirs, ~ours & theirs)


def _shares(*masks):
    import torch

    return torch.stack([mask.double().mean() for mask in masks])


def _of_what_there_is(student, teacher, truth):
    ours, theirs = student == truth, teacher == truth
    import torch

    return torch.stack(
        [
            (student == teacher).double().mean(),
            ours[~theirs].double().mean(),
            (~ours)[theirs].double().mean(),
        ]
    )


_FIDELITY = Code(
    "8.3",
    "fidelity_and_accuracy",
    ("student", "teacher", "truth"),
    (
        Test("answers of two models", 3, _some, lambda *_: (3,)),
        Test(
            "a student without errors",
            1,
            _student_is_right,
            lambda *_: (3,),
        ),
    ),
    _split,
    (
        Bug(
            "accuracy for agreement",
            "the first number compares the student with the labels.",
            lambda s, t, y: _shares(s == y, (s == y) & (t != y), (s != y) & (t == y)),
        ),
        Bug(
            "agreement where both are right",
            "two models that make the same mistake agree, too.",
            lambda s, t, y: _shares(
                (s == y) & (t == y), (s == y) & (t != y), (s != y) & (t == y)
            ),
        ),
        Bug(
            "both wrong taken for agreement",
            "two models that make different mistakes do not agree.",
            lambda s, t, y: _shares(
                (s == y) == (t == y), (s == y) & (t != y), (s != y) & (t == y)
            ),
        ),
        Bug(
            "repaired and broken swapped",
            "repaired is where the student is right and the teacher is not.",
            lambda s, t, y: _shares(s == t, (s != y) & (t == y), (s == y) & (t != y)),
        ),
        Bug(
            "shares of the teacher's answers",
            "all three are shares of all inputs. Divided by the teacher's errors and "
            "right answers they no longer add up.",
            _of_what_there_is,
        ),
        Bug(
            "counts for shares",
            "they are shares of the inputs, not counts.",
            lambda s, t, y: len(y) * _split(s, t, y),
        ),
        Bug(
            "disagreement",
            "the first number is the share on which they differ.",
            lambda s, t, y: _shares(s != t, (s == y) & (t != y), (s != y) & (t == y)),
        ),
        Bug(
            "another mistake taken for a repair",
            "a student that leaves the teacher's mistake for another has repaired "
            "nothing.",
            lambda s, t, y: _shares(s == t, (t != y) & (s != t), (t == y) & (s != t)),
        ),
    ),
)


# --- 8.4: inputs that may be trained on ---

_WORDS = ("3 may", "5 euros", "red", "two kilos", "in a week", "peru", "half past ten")


def _varied(rng, text):
    text = rng.choice((text, text.upper(), text.lower()))
    return rng.choice((text, f" {text}", f"{text} ", text.replace(" ", "  ")))


def _lists(rng, vary):
    for _ in range(3):
        words = rng.sample(_WORDS, 7)
        inputs = words[:5] + rng.choices(words[:5], k=3) + words[:2]
        rng.shuffle(inputs)
        test = words[3:] + words[3:4]
        if vary:
            inputs = [_varied(rng, text) for text in inputs]
            test = [_varied(rng, text) for text in test]
        yield inputs, test


def _plain(rng):
    yield from _lists(rng, vary=False)


def _spelled(rng):
    yield from _lists(rng, vary=True)


def _fold(text):
    return " ".join(text.lower().split())


def _mask(ours=_fold, theirs=_fold, *, once="first", leaks=True, sign=True):
    def compute(inputs, test):
        forbidden = {theirs(text) for text in test} if leaks else ()
        texts = [ours(text) for text in inputs]
        kept = []
        for i, text in enumerate(texts):
            twice = {
                "first": text in texts[:i],
                "last": text in texts[i + 1 :],
                "none": texts.count(text) > 1,
                "all": False,
            }[once]
            kept.append(float((text not in forbidden and not twice) == sign))
        return kept

    return compute


_CLEAN = Code(
    "8.4",
    "may_be_trained_on",
    ("inputs", "test"),
    (
        Test("plain text", 2, _plain, lambda inputs, test: (len(inputs),)),
        Test("other spellings", 3, _spelled, lambda inputs, test: (len(inputs),)),
    ),
    _mask(),
    (
        Bug(
            "test inputs kept",
            "some of these inputs stand in the test.",
            _mask(leaks=False),
            "TIGER-AI-Lab/MAmmoTH#11",
        ),
        Bug(
            "copies kept",
            "an input that stands there twice counts once.",
            _mask(once="all"),
            "TIGER-AI-Lab/MAmmoTH#11",
        ),
        Bug(
            "last copy kept",
            "of several copies it keeps the last one, not the first.",
            _mask(once="last"),
        ),
        Bug(
            "all copies dropped",
            "it drops every copy. One of them may stay.",
            _mask(once="none"),
        ),
        Bug(
            "spelling of the test as it is",
            "the inputs are folded, and the test is not, so that they never meet.",
            _mask(theirs=lambda text: text),
        ),
        Bug(
            "spelling as it is",
            "an input in capitals is the same input.",
            _mask(lambda text: text, lambda text: text),
        ),
        Bug(
            "case not folded",
            "it folds spaces, and not upper and lower case.",
            _mask(*[lambda text: " ".join(text.split())] * 2),
        ),
        Bug(
            "spaces not folded",
            "it folds upper and lower case, and not spaces.",
            _mask(*[str.lower] * 2),
        ),
        Bug(
            "inner spaces not folded",
            "it takes away the spaces at both ends, and not those within.",
            _mask(*[lambda text: text.strip().lower()] * 2),
        ),
        Bug(
            "upside down",
            "it marks the inputs that have to go.",
            _mask(sign=False),
        ),
    ),
)


# --- 8.5: predictions ---


def _forecasts():
    return {
        "never_drawn": exp(-1),
        "outvoted": 3 * 0.2**2 * 0.8 + 0.2**3,
        "doubt": -log(0.8),
        "best": 0.87,
        "sampled": 100 / 2000,
    }


_PREDICTION = Predict(
    "8.5",
    "forecasts",
    _forecasts,
    {
        "never_drawn": (
            Bug("nearly none", "Draws repeat themselves.", lambda: 0.001),
            Bug("share drawn", "That is the share that is drawn.", lambda: 1 - exp(-1)),
        ),
        "outvoted": (
            Bug("teacher's error", "Two wrong labels are needed.", lambda: 0.2),
            Bug("all three wrong", "Two wrong labels are enough.", lambda: 0.008),
        ),
        "doubt": (
            Bug("log of the error", "The right answer has 0.8.", lambda: -log(0.2)),
            Bug(
                "entropy",
                "That is the entropy of its answer. The truth has none.",
                lambda: -0.8 * log(0.8) - 0.2 * log(0.2),
            ),
        ),
        "best": (
            Bug(
                "not above the teacher",
                "Where they disagree the student can be right.",
                lambda: 0.4,
            ),
            Bug("agreement", "That is the share on which they agree.", lambda: 0.53),
        ),
        "sampled": (
            Bug("a nat for each", "Half a nat for each free one.", lambda: 0.1),
            Bug("1/n", "There are 101 words to learn.", lambda: 0.001),
        ),
    },
)

QUESTIONS = (
    _COVERAGE,
    _OUTVOTED,
    _FIDELITY,
    _CLEAN,
    _PREDICTION,
    Choice("8.6", "what_more_data_does", "abcdef"),
)
