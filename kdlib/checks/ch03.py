"""Chapter 3, "The objective": whole answers and tokens, minimisers and floors."""

from __future__ import annotations

from math import log, log10

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


# --- 3.1: the divergence of answers that end ---

_END = 0


def _tables(rng, vocab, length):
    return [_distributions(rng, vocab**t, vocab) for t in range(length)]


def _one_place(rng):
    for vocab in (3, 5):
        yield _tables(rng, vocab, 1), _tables(rng, vocab, 1)


def _several_places(rng):
    for vocab, length in ((3, 2), (4, 3), (3, 4)):
        yield _tables(rng, vocab, length), _tables(rng, vocab, length)


def _ruled_out(rng):
    """One token of each row is impossible for the teacher."""
    for vocab, length in ((4, 2), (3, 3)):
        teacher = _tables(rng, vocab, length)
        for table in teacher:
            for row in table:
                row[rng.randrange(vocab)] = 0
            table /= table.sum(1, keepdim=True)
        yield teacher, _tables(rng, vocab, length)


def _kl(p, q):
    """sum_v p (log p - log q) of each row; 0 log 0 is 0."""
    return (p.xlogy(p) - p.xlogy(q)).sum(-1)


def _reverse(p, q):
    return _kl(q, p.clamp(min=1e-300))  # finite, or no answer could be compared


def _chain_rule(
    token=_kl,
    longer=lambda reach, p, q: reach[:, None] * p,
    stop=True,
    weigh=lambda reach: reach,
    total=sum,
):
    """The sum over places, prefixes and tokens, with one of its parts changed.

    token:  the divergence of a row
    longer: how the prefixes' weights go on to the next place
    stop:   whether a prefix that has ended gets the weight 0
    weigh:  what the weights at a place become
    total:  of the places' values
    """

    def compute(teacher, student):
        reach, values = teacher[0].new_ones(1), []
        for p, q in zip(teacher, student, strict=True):
            values.append(float((weigh(reach) * token(p, q)).sum()))
            reach = longer(reach, p, q).clone()
            if stop:
                reach[:, _END] = 0
            reach = reach.flatten()
        return total(values)

    return compute


def _alike(stop, weigh):
    return _chain_rule(
        longer=lambda reach, p, q: reach[:, None] + 0 * p, stop=stop, weigh=weigh
    )


def _share(reach):
    return reach / reach.sum()


_SEQUENCE_KL = Code(
    "3.1",
    "sequence_kl",
    ("teacher", "student"),
    (
        Test("answers of one token", 1, _one_place),
        Test("answers of several tokens", 2, _several_places),
        Test("tokens that the teacher rules out", 1, _ruled_out),
    ),
    _chain_rule(),
    (
        Bug(
            "counted after the end",
            "an answer ends with its end token. What stands in the tables after it "
            "is padding.",
            _chain_rule(stop=False),
            "huggingface/trl#7024",
        ),
        Bug(
            "student's prefixes",
            "the tokens are compared where the student would go. The answers are "
            "the teacher's.",
            _chain_rule(longer=lambda reach, p, q: reach[:, None] * q),
            "idanshen/Self-Distillation#5, whose paper stated another loss",
        ),
        Bug(
            "prefixes weighed alike",
            "it is the plain mean over the prefixes of a place. Some prefixes are "
            "written more often than others.",
            _alike(True, _share),
        ),
        Bug(
            "prefixes weighed alike",
            "it is the plain mean over the rows of a table. Some prefixes are written "
            "more often than others, and those that ended never go on.",
            _alike(False, _share),
        ),
        Bug(
            "prefixes not weighed",
            "every prefix counts fully, however rare it is.",
            _alike(True, lambda reach: reach),
        ),
        Bug(
            "prefixes not weighed",
            "every row counts fully, however rare its prefix is.",
            _alike(False, lambda reach: reach),
        ),
        Bug(
            "last token for the prefix",
            "a prefix has the probability of all its tokens, not of the last one.",
            _chain_rule(longer=lambda reach, p, q: p),
        ),
        Bug(
            "mean over the places",
            "the log of a product is a sum over the places, not a mean.",
            _chain_rule(total=lambda values: sum(values) / len(values)),
            "pytorch/tutorials#325 and jingyaogong/minimind#298",
        ),
        Bug(
            "direction swapped",
            "it is KL(student || teacher).",
            _chain_rule(_reverse, longer=lambda reach, p, q: reach[:, None] * q),
            "paiml/aprender#2153",
        ),
        Bug(
            "tokens swapped",
            "the prefixes are the teacher's, but each token's divergence is "
            "KL(student || teacher).",
            _chain_rule(_reverse),
        ),
        Bug(
            "cross-entropy",
            "the teacher's entropy is still in it: it is not zero for equal models.",
            _chain_rule(lambda p, q: -p.xlogy(q).sum(-1)),
            "jongwooko/distillm#7",
        ),
        Bug(
            "cross-entropy without its minus",
            "it is sum p log q, which is largest for equal models.",
            _chain_rule(lambda p, q: p.xlogy(q).sum(-1)),
            "the textbook (arXiv:2501.09223, chapter 3)",
        ),
        Bug(
            "end token left out",
            "that an answer ends here is a prediction like any other.",
            _chain_rule(lambda p, q: (p.xlogy(p) - p.xlogy(q))[:, 1:].sum(-1)),
            "huggingface/trl#6357",
        ),
        Bug(
            "first token left out",
            "the sum starts at the second token.",
            _chain_rule(total=lambda values: sum(values[1:])),
        ),
        Bug(
            "mean over the vocabulary",
            "a divergence is a sum over the vocabulary.",
            _chain_rule(lambda p, q: _kl(p, q) / p.shape[1]),
            "HikariTJU/LD#74",
        ),
        Bug(
            "bits for nats",
            "it uses the logarithm to the base 2.",
            _chain_rule(lambda p, q: _kl(p, q) / log(2)),
        ),
    ),
)


# --- 3.2: what training can still remove ---


def _requests(rng, simplified):
    """prior, teacher, simplified and student for these simplified inputs."""
    import torch

    contexts, answers = len(simplified), rng.randint(3, 6)
    prior = _distributions(rng, contexts)
    teacher = _distributions(rng, contexts, answers)
    student = _distributions(rng, max(simplified) + 1, answers)
    return prior, teacher, torch.tensor(simplified), student


def _told_all(rng):
    for simplified in ([1, 0], [2, 0, 3, 1]):
        yield _requests(rng, simplified)


def _told_nothing(rng):
    for contexts in (2, 3, 5):
        yield _requests(rng, [0] * contexts)


def _told_some(rng):
    for simplified in ([0, 1, 0], [1, 0, 1, 1, 0], [2, 0, 1, 2, 0, 0]):
        yield _requests(rng, simplified)


def _arithmetic(weights, rows):
    return weights @ rows


def _geometric(weights, rows):
    return (weights @ rows.log()).softmax(-1)


def _by_input(
    divergence=_kl,
    prior_of=lambda prior: prior,
    within=lambda weights: weights / weights.sum(),
    mix=_arithmetic,
    of_input=lambda weights, inputs: weights.sum(),
):
    """sum over x' of Pr(x') KL(mixture || student), with one of its parts changed.

    within:   the weights of the contexts that share an x'
    of_input: the weight of that x'
    """

    def compute(prior, teacher, simplified, student):
        prior, value = prior_of(prior), 0.0
        for x, q in enumerate(student):
            mine = simplified == x
            mixture = mix(within(prior[mine]), teacher[mine])
            weight = of_input(prior[mine], len(student))
            value += float(weight * divergence(mixture, q))
        return value

    return compute


def _whole_loss(prior, teacher, simplified, student):
    return float(prior @ _kl(teacher, student[simplified]))


def _tag_ignored(prior, teacher, simplified, student):
    share = [prior[simplified == x].sum() for x in range(len(student))]
    mixture = prior @ teacher
    pairs = zip(share, student, strict=True)
    return float(sum(s * _kl(mixture, q) for s, q in pairs))


def _entropy_left_in(prior, teacher, simplified, student):
    entropy = prior @ -teacher.xlogy(teacher).sum(1)
    return float(entropy) + _by_input()(prior, teacher, simplified, student)


def _floor(*arguments):
    return _whole_loss(*arguments) - _by_input()(*arguments)


_ABOVE = Code(
    "3.2",
    "loss_above_floor",
    ("prior", "teacher", "simplified", "student"),
    (
        Test("the student is told everything", 1, _told_all),
        Test("the student is told nothing", 2, _told_nothing),
        Test("a tag tells some of it", 2, _told_some),
    ),
    _by_input(),
    (
        Bug(
            "whole loss",
            "it is the whole loss. A part of it no student can avoid.",
            _whole_loss,
        ),
        Bug(
            "floor",
            "it is the part that stays, not the part above it.",
            _floor,
        ),
        Bug(
            "contexts weighed alike",
            "some contexts are asked for more often than others.",
            _by_input(prior_of=lambda prior: 0 * prior + 1 / len(prior)),
        ),
        Bug(
            "mixture of equal parts",
            "contexts that share an x' are mixed in equal parts. They are not equally "
            "frequent.",
            _by_input(within=lambda weights: 0 * weights + 1 / len(weights)),
        ),
        Bug(
            "mixture without sum one",
            "the mixture of an x' is no distribution: its weights must be those of "
            "the contexts, given x'.",
            _by_input(within=lambda weights: weights),
        ),
        Bug(
            "inputs weighed alike",
            "it is the plain mean over the x'. Some are sent more often than others.",
            _by_input(of_input=lambda weights, inputs: 1 / inputs),
        ),
        Bug(
            "inputs not weighed",
            "every x' counts fully, however rarely it is sent.",
            _by_input(of_input=lambda weights, inputs: 1),
        ),
        Bug(
            "direction swapped",
            "it is KL(student || mixture).",
            _by_input(lambda mixture, q: _kl(q, mixture)),
            "paiml/aprender#2153",
        ),
        Bug(
            "tag ignored",
            "the student sees x', so it can hold one mixture for each x'.",
            _tag_ignored,
        ),
        Bug(
            "product for the mixture",
            "it is the geometric mean of the distributions, which is best for the "
            "reverse KL.",
            _by_input(mix=_geometric),
        ),
        Bug(
            "entropy left in",
            "it starts from the cross-entropy. The teacher's entropy is not the "
            "student's to remove either.",
            _entropy_left_in,
            "jongwooko/distillm#7",
        ),
        Bug(
            "bits for nats",
            "it uses the logarithm to the base 2.",
            lambda *arguments: _by_input()(*arguments) / log(2),
        ),
    ),
)


# --- 3.3: where a reduction ends up ---


def _answers(rng, reduction, ids=None):
    """Answers of different lengths, so that the two means differ.

    Every 1/n is a power of two, so that weights in float32 are as good as any.
    """
    import torch

    lengths = rng.choice([[1, 1, 2, 4], [2, 2, 4, 8]])
    lengths = rng.sample(lengths, 4)
    rows = [row for row, n in enumerate(lengths) for _ in range(n)]
    rows = rows if ids is None else [ids[row] for row in rows]
    p = _distributions(rng, len(rows), rng.randint(3, 5))
    return p, torch.tensor(rows), reduction


def _by_token(rng):
    for _ in range(3):
        yield _answers(rng, "token_mean")


def _by_answer(rng):
    for _ in range(3):
        yield _answers(rng, "sequence_mean")


def _with_gaps(rng):
    """A micro-batch of a larger batch: some rows are elsewhere."""
    for ids in ([2, 5, 6, 9], [7, 0, 3, 12]):
        yield _answers(rng, "sequence_mean", ids)


def _vocabulary(p, *_):
    return (p.shape[1],)


def _token_weights(p, rows, reduction):
    """[N], with the sum 1."""
    _, row, length = rows.unique(return_inverse=True, return_counts=True)
    if reduction == "token_mean":
        return p.new_ones(len(p)) / len(p)
    return 1 / (length[row] * len(length)).to(p.dtype)


def _always(reduction):
    return lambda p, rows, _: _token_weights(p, rows, reduction) @ p


def _right_student(p, rows, reduction):
    return _token_weights(p, rows, reduction) @ p


def _other_reduction(p, rows, reduction):
    other = {"token_mean": "sequence_mean", "sequence_mean": "token_mean"}
    return _right_student(p, rows, other[reduction])


def _favourites(p, rows, reduction):
    import torch

    chosen = torch.nn.functional.one_hot(p.argmax(1), p.shape[1]).to(p.dtype)
    return _right_student(chosen, rows, reduction)


def _not_divided(p, rows, reduction):
    count = len(p) if reduction == "token_mean" else len(rows.unique())
    return _right_student(p, rows, reduction) * count


def _padding_counted(p, rows, reduction):
    _, length = rows.unique(return_counts=True)
    if reduction == "token_mean":
        return p.sum(0) / (len(length) * length.max())
    return p.sum(0) / length.max() / len(length)


def _missing_rows_counted(p, rows, reduction):
    if reduction == "token_mean":
        return _right_student(p, rows, reduction)
    count = len(rows.unique())
    return _right_student(p, rows, reduction) * count / (int(rows.max()) + 1)


_REDUCTION = Code(
    "3.3",
    "best_student",
    ("teacher_probs", "row_ids", "reduction"),
    (
        Test('reduction "token_mean"', 1, _by_token, _vocabulary),
        Test('reduction "sequence_mean"', 2, _by_answer, _vocabulary),
        Test("rows with gaps in their numbers", 1, _with_gaps, _vocabulary),
    ),
    _right_student,
    (
        Bug(
            "every token alike",
            'with "sequence_mean" the tokens of a short answer count for more.',
            _always("token_mean"),
        ),
        Bug(
            "every answer alike",
            'with "token_mean" every token counts alike, and a long answer has more '
            "of them.",
            _always("sequence_mean"),
            "verl-project/verl#7200 and modelscope/ms-swift#10076",
        ),
        Bug(
            "the other reduction",
            "each reduction has the other one's weights.",
            _other_reduction,
        ),
        Bug(
            "geometric mean",
            "it averages log-probabilities or logits. That is best for the reverse KL.",
            lambda p, rows, reduction: _geometric(
                _token_weights(p, rows, reduction), p
            ),
        ),
        Bug(
            "favourites counted",
            "it counts how often each token is the likeliest. The teacher gives whole "
            "distributions.",
            _favourites,
        ),
        Bug(
            "not divided",
            "the weights must have the sum one, or the result is no distribution.",
            _not_divided,
        ),
        Bug(
            "padding counted",
            "it divides by the length of the longest answer.",
            _padding_counted,
            "eladhoffer/utils.pytorch#4",
        ),
        Bug(
            "missing rows counted",
            "it takes the largest number of a row for a count of answers.",
            _missing_rows_counted,
        ),
    ),
)


# --- 3.4: predictions ---

_NUMBERS = {
    "length": (20, 10, 40, 64),
    "words": (50_000, 32_000, 128_000, 250_000),
    "places": (20, 10, 40, 50),
    "error": (0.03, 0.01, 0.02, 0.05),
}

_DAY = 24 * 60 * 60


def _costs(n):
    return {
        "digits": int(n.length * log10(32_000)) + 1,
        "days": n.words**3 / 1e9 / _DAY,
        "mode": 0.9**n.places,
        "answers": (1.5 / n.error) ** 2,
    }


_PREDICTION = Predict(
    "3.4",
    "costs",
    _costs,
    {
        "digits": (
            Bug(
                "product for the power",
                "Each place multiplies the number of answers by 32,000.",
                lambda n: int(log10(n.length * 32_000)) + 1,
            ),
            Bug(
                "base and exponent swapped",
                "There are {length} places of 32,000 choices, not the reverse.",
                lambda n: int(32_000 * log10(n.length)) + 1,
            ),
        ),
        "days": (
            Bug("seconds", "That is in seconds.", lambda n: _costs(n)["days"] * _DAY),
            Bug("hours", "That is in hours.", lambda n: _costs(n)["days"] * 24),
            Bug(
                "one place too few",
                "Three places, not two.",
                lambda n: _costs(n)["days"] / n.words,
            ),
            Bug(
                "one place too many",
                "Three places, not four.",
                lambda n: _costs(n)["days"] * n.words,
            ),
        ),
        "mode": (
            Bug(
                "one token's share",
                "All {places} tokens must be the favourite.",
                lambda n: 0.9,
            ),
            Bug("divided", "Probabilities multiply.", lambda n: 0.9 / n.places),
        ),
        "answers": (
            Bug(
                "square forgotten",
                "The error of a mean falls with the root of the number of answers.",
                lambda n: 1.5 / n.error,
            ),
            Bug(
                "variance over the error",
                "Square the ratio of both, not the spread alone.",
                lambda n: 1.5**2 / n.error,
            ),
        ),
    },
    _NUMBERS,
    (
        "32,000 tokens, answers of {length}.",
        "A vocabulary of {words:,} tokens",
        "0.9 at each of {places} tokens",
        "a standard error of {error:g}?",
    ),
)

QUESTIONS = (
    _SEQUENCE_KL,
    _ABOVE,
    _REDUCTION,
    _PREDICTION,
    Choice("3.5", "what_is_minimised", "abcde"),
)
