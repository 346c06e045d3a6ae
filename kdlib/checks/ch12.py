"""Chapter 12, "Learning from your own mistakes": what a word answers for, and ends."""

from __future__ import annotations

from math import log

from kdlib.checks.frame import Bug, Choice, Code, Predict, Test

__all__: list[str] = []


def __dir__() -> list[str]:
    return __all__


def _generator(rng):
    import torch

    return torch.Generator().manual_seed(rng.randrange(10**6))


def _random(rng, *shape):
    import torch

    return torch.randn(shape, generator=_generator(rng), dtype=torch.float64)


def _as_first(first, *rest):
    return first.shape


# --- 12.1: what a token answers for ---


def _answers(rng, lengths, width):
    import torch

    shape = len(lengths), width
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    log_ps, log_pt = (-_random(rng, *shape).abs() - 0.1 for _ in range(2))
    return log_ps, log_pt, mask


def _whole(rng):
    for rows, width in ((1, 3), (2, 5)):
        yield _answers(rng, [width] * rows, width)


def _padded(rng):
    for lengths in ([2, 5, 3], [1, 4], [6, 3, 1, 2]):
        yield _answers(rng, lengths, max(lengths) + 1)


def _to_go(each):
    """Sums from each place to the end."""
    return each.flip(1).cumsum(1).flip(1)


def _rewards(of):
    """of(k1 with zeros in the padding, mask) -> weights, with zeros in the padding."""

    def compute(log_ps, log_pt, mask):
        return of((log_ps - log_pt) * mask, mask.double()) * mask

    return compute


_TO_GO = Code(
    "12.1",
    "score_weights",
    ("student_log_probs", "teacher_log_probs", "mask"),
    (
        Test("answers of full width", 1, _whole, _as_first),
        Test("shorter answers, padded", 3, _padded, _as_first),
    ),
    _rewards(lambda k, mask: _to_go(k)),
    (
        Bug(
            "this token alone",
            "what a token does to the prefixes of all later tokens is left out. It is "
            "the gradient at prefixes that are taken as given.",
            _rewards(lambda k, mask: k),
        ),
        Bug(
            "words before it counted",
            "what was written before does not depend on this token. The mean is right "
            "all the same, but it is noisier.",
            _rewards(lambda k, mask: k.sum(1, keepdim=True).expand_as(k)),
        ),
        Bug(
            "what was written before",
            "it sums from the first token to this one. A token answers for what comes "
            "after it.",
            _rewards(lambda k, mask: k.cumsum(1)),
        ),
        Bug(
            "own token left out",
            "a token answers for itself, too.",
            _rewards(lambda k, mask: _to_go(k) - k),
        ),
        Bug(
            "padding counted",
            "what stands behind the end was not written by the student.",
            lambda log_ps, log_pt, mask: _to_go(log_ps - log_pt) * mask,
            "huggingface/trl#7024",
        ),
        Bug(
            "padding counted and weighed",
            "what stands behind the end was not written by the student.",
            lambda log_ps, log_pt, mask: _to_go(log_ps - log_pt),
            "huggingface/trl#7024",
        ),
        Bug(
            "sign swapped",
            "a token that the teacher finds unlikely must become less likely when the "
            "loss is made smaller.",
            _rewards(lambda k, mask: -_to_go(k)),
        ),
        Bug(
            "mean for the sum",
            "divided by the tokens that are left, it is another objective: late tokens "
            "weigh too much.",
            _rewards(lambda k, mask: _to_go(k) / _to_go(mask).clamp(min=1)),
        ),
        Bug(
            "one weight for the batch",
            "each answer has its own weights; these add up all answers.",
            _rewards(lambda k, mask: _to_go(k).sum(0, keepdim=True).expand_as(k)),
        ),
    ),
)


# --- 12.2: a mean over what the student wrote ---

_END = 0


def _written(rng, lengths, width, ended):
    """Answers of these lengths; padding is the end token, as in many tokenizers."""
    import torch

    tokens = torch.randint(
        1, 9, (len(lengths), width), generator=_generator(rng), dtype=torch.long
    )
    for row, (length, has_end) in enumerate(zip(lengths, ended, strict=True)):
        tokens[row, length:] = _END
        if has_end:
            tokens[row, length - 1] = _END
    return _random(rng, len(lengths), width).abs() + 0.1, tokens, _END


def _all_ended(rng):
    yield _written(rng, [3, 6], 6, [True] * 2)
    yield _written(rng, [1, 4, 7], 7, [True] * 3)


def _some_cut(rng):
    yield _written(rng, [5, 2], 5, [False, True])
    yield _written(rng, [4, 6, 6], 6, [True, False, True])


def _kept(tokens, end):
    """Tokens up to the first end token, and with it."""
    is_end = tokens == end
    return is_end.cumsum(1) - is_end.long() == 0


def _mean(mask_of, over=lambda x, m: (x * m).sum() / m.sum()):
    def compute(losses, tokens, end):
        return float(over(losses, mask_of(tokens, end).double()))

    return compute


def _first_end(tokens, end):
    """argmax is 0 where nothing is found."""
    import torch

    last = (tokens == end).long().argmax(1)
    return torch.arange(tokens.shape[1]) <= last[:, None]


def _without_cut(tokens, end):
    return _kept(tokens, end) & (tokens == end).any(1, keepdim=True)


def _one_more(tokens, end):
    is_end = (tokens == end).long()
    return is_end.cumsum(1) - is_end <= 1


def _no_ends(tokens, end):
    return tokens != end


_MEAN = Code(
    "12.2",
    "own_words_mean",
    ("losses", "tokens", "end"),
    (
        Test("every answer has ended", 2, _all_ended),
        Test("some were cut", 2, _some_cut),
    ),
    _mean(_kept),
    (
        Bug(
            "end token dropped",
            "the end token is a word that the student chose. Without it nobody teaches "
            "the student when to stop.",
            _mean(_no_ends),
            "huggingface/trl#6357",
        ),
        Bug(
            "padding counted",
            "the padding behind the end was not written by the student.",
            _mean(lambda tokens, end: tokens == tokens),
            "huggingface/trl#2058",
        ),
        Bug(
            "padding in the denominator",
            "the sum is right. It is divided by the cells of the batch, and not by the "
            "tokens that were written.",
            _mean(_kept, lambda x, m: (x * m).sum() / m.numel()),
        ),
        Bug(
            "mean of means",
            "each answer's mean counts alike, so that a word of a long answer counts "
            "less than one of a short answer.",
            _mean(_kept, lambda x, m: ((x * m).sum(1) / m.sum(1)).mean()),
        ),
        Bug(
            "divided by the answers",
            "it is a sum per answer, not a mean per token.",
            _mean(_kept, lambda x, m: (x * m).sum() / len(m)),
        ),
        Bug(
            "cut answers lost",
            "an answer without an end token was cut. argmax over nothing found is 0, "
            "so that its first token alone is left.",
            _mean(_first_end),
        ),
        Bug(
            "cut answers left out",
            "an answer that was cut is as much the student's own as the others.",
            _mean(_without_cut),
        ),
        Bug(
            "one token too many",
            "the first padding behind the end is counted, too.",
            _mean(_one_more),
        ),
        Bug(
            "sum",
            "it is the sum over the tokens, not their mean.",
            _mean(_kept, lambda x, m: (x * m).sum()),
        ),
    ),
)


# --- 12.3: written at another temperature, by an older student ---


def _drawn(rng, n, vocab, temperature, fresh=False):
    import torch

    student, teacher, other = (1.5 * _random(rng, n, vocab) for _ in range(3))
    writer = student.clone() if fresh else other
    tokens = torch.randint(vocab, (n,), generator=_generator(rng))
    return writer, temperature, student, teacher, tokens


def _fresh(rng):
    for n, vocab in ((1, 3), (4, 5)):
        yield _drawn(rng, n, vocab, 1.0, fresh=True)


def _stale(rng):
    yield _drawn(rng, 4, 4, 1.0)


def _tempered(rng):
    yield _drawn(rng, 3, 4, 0.6)
    yield _drawn(rng, 4, 5, 1.5)


def _log_p(logits, tokens, temperature=1.0):
    rows = (logits / temperature).log_softmax(-1)
    return rows.gather(-1, tokens[:, None])[:, 0]


def _served(log_weight=None, value=None):
    """exp(log_weight) * value, of the five arguments."""
    log_weight = log_weight or _log_weight
    value = value or (lambda w, tau, s, t, y: _log_p(s, y) - _log_p(t, y))
    return lambda *args: log_weight(*args).exp() * value(*args)


def _log_weight(w, tau, s, t, y):
    return _log_p(s, y) - _log_p(w, y, tau)


_SERVED = Code(
    "12.3",
    "served_kl",
    (
        "writer_logits",
        "sampling_temperature",
        "student_logits",
        "teacher_logits",
        "tokens",
    ),
    (
        Test("written by this student", 1, _fresh, lambda *a: a[-1].shape),
        Test("written by an older one", 1, _stale, lambda *a: a[-1].shape),
        Test("at another temperature", 2, _tempered, lambda *a: a[-1].shape),
    ),
    _served(),
    (
        Bug(
            "no importance weight",
            "the mean is over the writer at its temperature, and not over the student.",
            _served(lambda w, tau, s, t, y: 0 * _log_p(s, y)),
            "huggingface/trl#3867 and verl-project/verl#2953",
        ),
        Bug(
            "sampling temperature ignored",
            "the writer's probabilities are those that were drawn from: its logits are "
            "divided by the sampling temperature.",
            _served(lambda w, tau, s, t, y: _log_p(s, y) - _log_p(w, y)),
            "huggingface/trl#4159",
        ),
        Bug(
            "log-probabilities divided",
            "temperature divides logits. A log-probability divided by it belongs to no "
            "distribution: the softmax has to be taken again.",
            _served(lambda w, tau, s, t, y: _log_p(s, y) - _log_p(w, y) / tau),
            "PrimeIntellect-ai/prime-rl#697",
        ),
        Bug(
            "weight upside down",
            "a token that the student likes better than its writer did counts more.",
            _served(lambda *args: -_log_weight(*args)),
        ),
        Bug(
            "student at the sampling temperature",
            "the student is served at temperature 1, so the weight has it at 1.",
            _served(lambda w, tau, s, t, y: _log_p(s, y, tau) - _log_p(w, y, tau)),
        ),
        Bug(
            "sampling temperature in the divergence",
            "the temperature of the sampling is not that of the loss.",
            _served(
                value=lambda w, tau, s, t, y: _log_p(s, y, tau) - _log_p(t, y, tau)
            ),
            "huggingface/trl#5731",
        ),
        Bug(
            "all at the sampling temperature",
            "it is the KL between the two models at the sampling temperature, which "
            "nobody serves.",
            _served(
                lambda w, tau, s, t, y: _log_p(s, y, tau) - _log_p(w, y, tau),
                lambda w, tau, s, t, y: _log_p(s, y, tau) - _log_p(t, y, tau),
            ),
        ),
        Bug(
            "compared with the writer",
            "the KL compares the student with the teacher. The writer has a say in the "
            "weight alone.",
            _served(value=lambda w, tau, s, t, y: _log_p(w, y) - _log_p(t, y)),
        ),
        Bug(
            "sign swapped",
            "KL(student || teacher) is a mean of log p_s - log p_t.",
            _served(value=lambda w, tau, s, t, y: _log_p(t, y) - _log_p(s, y)),
        ),
        Bug(
            "weighed towards the teacher",
            "this weight makes the mean one over the teacher's answers.",
            _served(lambda w, tau, s, t, y: _log_p(t, y) - _log_p(w, y, tau)),
        ),
        Bug(
            "logarithm for the weight",
            "the weight is a ratio of probabilities, not of their logarithms.",
            lambda *a: (
                (1 + _log_weight(*a)) * (_log_p(a[2], a[4]) - _log_p(a[3], a[4]))
            ),
        ),
    ),
)


# --- 12.4: predictions ---

_NUMBERS = {
    "words words_word": ((4, "four"), (3, "three"), (6, "six"), (8, "eight")),
    "length": (100, 50, 200, 300),
    "times": (5, 14, 30, 70),
}


def _forecasts(n):
    return {
        "valid": 2 * 0.5**n.words,
        "seeking": log(2),
        "survives": 0.99**n.length,
        "price": (6 + 2 + 2 * n.times) / 6,
    }


_PREDICTION = Predict(
    "12.4",
    "forecasts",
    _forecasts,
    {
        "valid": (
            Bug("all", "The words do not know of each other.", lambda n: 1.0),
            Bug("one answer", "There are two right answers.", lambda n: 0.5**n.words),
            Bug("a coin", "That is for one word, not {words_word}.", lambda n: 0.5),
        ),
        "seeking": (
            Bug(
                "per word",
                "All of it is paid at the first word; but it is one number an answer.",
                lambda n: n.words * log(2),
            ),
        ),
        "survives": (
            Bug("added", "The mistakes do not all meet in one answer.", lambda n: 0.01),
            Bug("first word", "That is the share for one word.", lambda n: 0.99),
        ),
        "price": (
            Bug("teacher forgotten", "The teacher reads it, too.", lambda n: 8 / 6),
            Bug(
                "teacher trained",
                "The teacher takes no step: it reads once, forwards.",
                lambda n: (6 + 2 + 6 * n.times) / 6,
            ),
            Bug("nothing", "Somebody has to write and to read.", lambda n: 1.0),
        ),
    },
    _NUMBERS,
    (
        "one of two answers of {words_word} words",
        "its answers of {length} words",
        "The teacher has {times} times",
    ),
)

QUESTIONS = (
    _TO_GO,
    _MEAN,
    _SERVED,
    _PREDICTION,
    Choice("12.5", "whose_prefixes", "abcde"),
)
