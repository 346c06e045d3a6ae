"""Chapter 7, "Context distillation": recovery, the best blind student, both floors."""

from __future__ import annotations

from math import log

from kdlib.checks.frame import Bug, Choice, Code, Predict, Test

__all__: list[str] = []


def __dir__() -> list[str]:
    return __all__


def _generator(rng):
    import torch

    return torch.Generator().manual_seed(rng.randrange(10**6))


def _distributions(rng, *shape):
    import torch

    logits = torch.randn(shape, generator=_generator(rng), dtype=torch.float64)
    return (1.5 * logits).softmax(-1)


def _positive(rng, n):
    import torch

    return 0.2 + torch.rand(n, generator=_generator(rng), dtype=torch.float64)


# --- 7.1: recovery ---


def _no_floor(rng):
    for n in (3, 5):
        gain = 2 * _positive(rng, n)
        yield gain, 0 * gain, gain * 0.5 * _positive(rng, n)


def _with_floor(rng):
    for n in (3, 6):
        floor = _positive(rng, n)
        yield floor + 2 * _positive(rng, n), floor, floor + 0.5 * _positive(rng, n)


def _worse(rng):
    floor = _positive(rng, 4)
    gain = floor + _positive(rng, 4)
    yield gain, floor, gain + _positive(rng, 4)


def _recovery(gain, floor, kl):
    return float((gain.sum() - kl.sum()) / (gain.sum() - floor.sum()))


_RECOVERY = Code(
    "7.1",
    "recovery",
    ("gain", "floor", "kl"),
    (
        Test("one context: no floor", 1, _no_floor),
        Test("several contexts: a floor", 2, _with_floor),
        Test("a student that became worse", 1, _worse),
    ),
    _recovery,
    (
        Bug(
            "floor forgotten",
            "what nobody can take in is counted against the student.",
            lambda gain, floor, kl: float(1 - kl.sum() / gain.sum()),
        ),
        Bug(
            "floor in one place only",
            "the floor is taken off the student's KL and not off the gain.",
            lambda gain, floor, kl: float(1 - (kl - floor).sum() / gain.sum()),
        ),
        Bug(
            "mean of ratios",
            "it divides input by input. A short answer with a small gain then counts "
            "as much as a long one.",
            lambda gain, floor, kl: float(((gain - kl) / (gain - floor)).mean()),
        ),
        Bug(
            "share that is left",
            "it is the share that was not taken in.",
            lambda *args: 1 - _recovery(*args),
        ),
        Bug(
            "cut off at zero",
            "a student that became worse must be seen.",
            lambda *args: max(0.0, _recovery(*args)),
        ),
        Bug(
            "nats for a share",
            "it is what was taken in, in nats, not as a share of what there is.",
            lambda gain, floor, kl: float((gain - kl).mean()),
        ),
        Bug(
            "nats for a share",
            "it is what was taken in, in nats, not as a share of what there is.",
            lambda gain, floor, kl: float((gain - kl).sum()),
        ),
        Bug(
            "upside down",
            "it is what there is over what was taken in.",
            lambda *args: 1 / _recovery(*args),
        ),
    ),
)


# --- 7.2: the best blind student, word by word ---


def _prefix(rng, contexts, vocab, n):
    import torch

    probs = _distributions(rng, contexts, n + 1, vocab)
    written = torch.randint(vocab, (n,), generator=_generator(rng))
    return _distributions(rng, contexts), probs, written


def _nothing_written(rng):
    for contexts, vocab in ((2, 3), (3, 5)):
        yield _prefix(rng, contexts, vocab, 0)


def _one_word(rng):
    for contexts, vocab in ((2, 4), (3, 3)):
        yield _prefix(rng, contexts, vocab, 1)


def _many_words(rng):
    for contexts, vocab, n in ((2, 4, 3), (4, 5, 4), (3, 3, 2)):
        yield _prefix(rng, contexts, vocab, n)


def _explained(probs, written):
    """[C, n]: how probable each context finds each written word."""
    import torch

    return probs[:, torch.arange(len(written)), written]


def _next(weights_of):
    def compute(prior, probs, written):
        weights = weights_of(prior, _explained(probs, written))
        return weights @ probs[:, -1] / weights.sum()

    return compute


def _likeliest_context(prior, probs, written):
    return probs[(prior * _explained(probs, written).prod(1)).argmax(), -1]


def _not_normalised(prior, probs, written):
    return (prior * _explained(probs, written).prod(1)) @ probs[:, -1]


def _product(prior, probs, written):
    weights = prior * _explained(probs, written).prod(1)
    return ((weights / weights.sum()) @ probs[:, -1].log()).softmax(0)


_NEXT = Code(
    "7.2",
    "best_next_word",
    ("prior", "probs", "written"),
    (
        Test(
            "nothing is written yet", 1, _nothing_written, lambda r, p, w: p.shape[2:]
        ),
        Test("one word", 2, _one_word, lambda r, p, w: p.shape[2:]),
        Test("several words", 2, _many_words, lambda r, p, w: p.shape[2:]),
    ),
    _next(lambda prior, e: prior * e.prod(1)),
    (
        Bug(
            "what was written is ignored",
            "it mixes by the prior. What is written tells something of the context.",
            _next(lambda prior, e: prior),
        ),
        Bug(
            "last word alone",
            "all that was written speaks for a context, not the last word alone.",
            _next(lambda prior, e: prior * (e[:, -1] if e.shape[1] else 1)),
        ),
        Bug(
            "one word late",
            "the last written word is not in the weights yet.",
            _next(lambda prior, e: prior * e[:, :-1].prod(1)),
        ),
        Bug(
            "prior forgotten",
            "some contexts are more frequent than others.",
            _next(lambda prior, e: 0 * prior + e.prod(1)),
        ),
        Bug(
            "added for multiplied",
            "independent evidence multiplies.",
            _next(lambda prior, e: prior * (e.sum(1) if e.shape[1] else 1)),
        ),
        Bug(
            "likeliest context alone",
            "it bets on one context. The best student keeps its doubt.",
            _likeliest_context,
        ),
        Bug(
            "not normalised",
            "it is the probability of the written words and the next one together.",
            _not_normalised,
        ),
        Bug(
            "product for the mixture",
            "it is the product of experts, which is best for the reverse KL.",
            _product,
        ),
    ),
)


# --- 7.3: the floor of the reverse KL ---


def _requests(rng, simplified):
    import torch

    contexts, answers = len(simplified), rng.randint(3, 6)
    prior, teacher = (
        _distributions(rng, contexts),
        _distributions(rng, contexts, answers),
    )
    return prior, teacher, torch.tensor(simplified)


def _told_nothing(rng):
    for contexts in (2, 3, 5):
        yield _requests(rng, [0] * contexts)


def _told_some(rng):
    for simplified in ([0, 1, 0], [1, 0, 1, 1, 0], [4, 0, 1, 4, 0, 0]):
        yield _requests(rng, simplified)


def _log_z(weights, rows):
    return (weights @ rows.log()).logsumexp(0)


def _by_tag(
    value=lambda w, p: -_log_z(w, p),
    within=lambda r: r / r.sum(),
    of_tag=lambda r, tags: r.sum(),
):
    def compute(prior, teacher, simplified):
        total, tags = 0.0, simplified.unique()
        for tag in tags:
            mine = simplified == tag
            r, p = prior[mine], teacher[mine]
            total += float(of_tag(r, len(tags)) * value(within(r), p))
        return total

    return compute


def _forward(w, p):
    mixture = w @ p
    return w @ (p * (p / mixture).log()).sum(1)


def _of_mixture(w, p):
    """The reverse KL of the forward KL's best student."""
    mixture = w @ p
    return w @ (mixture * (mixture / p).log()).sum(1)


_REVERSE = Code(
    "7.3",
    "reverse_floor",
    ("prior", "teacher", "simplified"),
    (
        Test("the student is told nothing", 2, _told_nothing),
        Test("a tag tells some of it", 3, _told_some),
    ),
    _by_tag(),
    (
        Bug(
            "floor of the forward KL",
            "that is I(Y; C | X'), the least forward KL.",
            _by_tag(_forward),
        ),
        Bug(
            "mixture for the product",
            "it is the reverse KL of the mixture. Another student is better.",
            _by_tag(_of_mixture),
        ),
        Bug(
            "weights without sum one",
            "within a tag the weights must be those of its contexts, given the tag.",
            _by_tag(within=lambda r: r),
        ),
        Bug(
            "contexts weighed alike",
            "contexts that share a tag are not equally frequent.",
            _by_tag(within=lambda r: 0 * r + 1 / len(r)),
        ),
        Bug(
            "tags weighed alike",
            "some tags are sent more often than others.",
            _by_tag(of_tag=lambda r, tags: 1 / tags),
        ),
        Bug(
            "tags not weighed",
            "every tag counts fully, however rarely it is sent.",
            _by_tag(of_tag=lambda r, tags: 1),
        ),
        Bug(
            "tag ignored",
            "the student sees the tag, so it can hold one product for each.",
            lambda prior, teacher, simplified: -float(_log_z(prior, teacher)),
        ),
        Bug(
            "minus forgotten",
            "log Z is negative. A divergence is not.",
            _by_tag(lambda w, p: _log_z(w, p)),
        ),
        Bug(
            "bits for nats",
            "it uses the logarithm to the base 2.",
            _by_tag(lambda w, p: -_log_z(w, p) / log(2)),
        ),
    ),
)


# --- 7.4: predictions ---

_NUMBERS = {
    "languages tokens word": (
        (6, 12, "Six"),
        (18, 8, "Eighteen"),
        (20, 10, "Twenty"),
        (24, 4, "Twenty-four"),
    ),
    "kl": (0.15, 0.24, 0.26, 0.27),
}


def _forecasts(n):
    return {
        "floor": log(n.languages),
        "per_token": log(n.languages) / n.tokens,
        "exact": 1 / n.languages,
        "recovery": (0.30 - n.kl) / (0.30 - 0.12),
    }


_PREDICTION = Predict(
    "7.4",
    "forecasts",
    _forecasts,
    {
        "floor": (
            Bug(
                "probability", "That is no information yet.", lambda n: 1 / n.languages
            ),
            Bug("count", "That is the number of languages.", lambda n: n.languages),
        ),
        "per_token": (
            Bug(
                "per answer", "That is for a whole answer.", lambda n: log(n.languages)
            ),
            Bug(
                "times the tokens",
                "The floor is one number an answer; its tokens share it.",
                lambda n: n.tokens * log(n.languages),
            ),
        ),
        "exact": (
            Bug(
                "all",
                "Nothing tells it which language is wanted.",
                lambda n: 1.0,
            ),
            Bug("a coin", "There are {languages} languages, not two.", lambda n: 0.5),
        ),
        "recovery": (
            Bug(
                "floor forgotten",
                "The floor is not in it.",
                lambda n: (0.30 - n.kl) / 0.30,
            ),
            Bug(
                "share that is left",
                "That is what was not taken in.",
                lambda n: (n.kl - 0.12) / 0.18,
            ),
        ),
    },
    _NUMBERS,
    (
        "{word} languages are asked for",
        "for answers of {tokens} tokens",
        "KL {kl:.2f}.",
    ),
)

QUESTIONS = (
    _RECOVERY,
    _NEXT,
    _REVERSE,
    _PREDICTION,
    Choice("7.5", "what_was_taken_in", "abcde"),
)
