"""Chapter 6, "Response-based distillation, whole": the objective and its averages."""

from __future__ import annotations

from kdlib.checks.frame import Bug, Choice, Code, Predict, Test

__all__: list[str] = []

IGNORED = -100


def __dir__() -> list[str]:
    return __all__


# --- 6.1: the whole objective, masked ---


def _logits(rng, *shape):
    import torch

    count = 1
    for n in shape:
        count *= n
    numbers = [rng.gauss(0, 2) for _ in range(count)]
    return torch.tensor(numbers, dtype=torch.float64).view(shape)


def _batch(rng, lengths, longest, vocab):
    """Student's and teacher's logits, and labels for responses of these lengths."""
    import torch

    labels = torch.full((len(lengths), longest), IGNORED)
    for row, length in enumerate(lengths):
        start = rng.randint(0, longest - length)  # the prompt stands before it
        for place in range(start, start + length):
            labels[row, place] = rng.randrange(vocab)
    shape = (len(lengths), longest, vocab)
    return _logits(rng, *shape), _logits(rng, *shape), labels


def _plain(rng):
    """T = 1, every position a response token, the whole batch at once."""
    for rows, length in ((1, 3), (3, 4)):
        yield *_batch(rng, [length] * rows, length, 5), 1.0, 0.3, rows * length


def _warm(rng):
    for temperature, weight in ((2.0, 0.25), (3.0, 0.6), (0.5, 0.1)):
        yield *_batch(rng, [4, 4], 4, 6), temperature, weight, 8


def _padded(rng):
    for lengths in ([1, 5], [2, 6, 3]):
        yield *_batch(rng, lengths, 7, 5), 2.0, 0.4, sum(lengths)


def _micro(rng):
    """The step has other micro-batches as well."""
    for lengths in ([2, 4], [1, 3, 6]):
        yield *_batch(rng, lengths, 6, 5), 4.0, 0.2, sum(lengths) + rng.randint(5, 40)


def _forward_kl(zs, zt, t):
    log_ps, log_pt = (zs / t).log_softmax(-1), (zt / t).log_softmax(-1)
    return (log_pt.exp() * (log_pt - log_ps)).sum(-1)


def _reverse_kl(zs, zt, t):
    return _forward_kl(zt, zs, t)


def _entropy_kept(zs, zt, t):
    return -((zt / t).softmax(-1) * (zs / t).log_softmax(-1)).sum(-1)


def _probabilities_for_logs(zs, zt, t):
    ps, pt = (zs / t).softmax(-1), (zt / t).softmax(-1)
    return (pt * (pt.log() - ps)).sum(-1)


def _teacher_softened(zs, zt, t):
    return _forward_kl(zs, zt / t, 1.0)


def _student_softened(zs, zt, t):
    return _forward_kl(zs / t, zt, 1.0)


def _over_vocabulary(zs, zt, t):
    return _forward_kl(zs, zt, t) / zs.shape[-1]


def _by_step(by_token, kept, items):
    return by_token[kept].sum() / items


def _by_micro_batch(by_token, kept, items):
    return by_token[kept].mean()


def _by_sequence(by_token, kept, items):
    rows = [row[here].mean() for row, here in zip(by_token, kept, strict=True)]
    return sum(rows) / len(rows)


def _by_position(by_token, kept, items):
    return by_token.where(kept, 0.0).mean()


def _with_padding(by_token, kept, items):
    return by_token.sum() / items


def _mean_with_padding(by_token, kept, items):
    return by_token.mean()


def _sum_only(by_token, kept, items):
    return by_token[kept].sum()


def _total(
    soft=_forward_kl,
    factor=lambda t: t**2,
    hard_factor=lambda t: 1.0,
    hard_temperature=lambda t: 1.0,
    weights=lambda w: (1 - w, w),
    reduce=_by_step,
    reduce_soft=None,
):
    def compute(zs, zt, labels, temperature, weight, items):
        kept = labels != IGNORED
        y = labels.where(kept, 0)[..., None]
        log_ps = (zs / hard_temperature(temperature)).log_softmax(-1)
        hard = -log_ps.gather(-1, y).squeeze(-1)
        of_soft, of_hard = weights(weight)
        soft_part = (reduce_soft or reduce)(soft(zs, zt, temperature), kept, items)
        hard_part = reduce(hard, kept, items)
        return (
            of_soft * factor(temperature) * soft_part
            + of_hard * hard_factor(temperature) * hard_part
        )

    return compute


_TOTAL = Code(
    "6.1",
    "total_loss",
    (
        "student_logits",
        "teacher_logits",
        "labels",
        "temperature",
        "hard_weight",
        "num_items",
    ),
    (
        Test("temperature 1, no padding, the whole batch", 1, _plain),
        Test("other temperatures", 2, _warm),
        Test("padding, and prompts in front", 2, _padded),
        Test("one micro-batch of several", 1, _micro),
    ),
    _total(),
    (
        Bug(
            "T^2 missing",
            "the soft term has lost its factor. Its gradient shrinks as T grows, and "
            "the hard term takes over.",
            _total(factor=lambda t: 1.0),
            "IntelLabs/distiller#122 and keras-team/keras-io#869",
        ),
        Bug(
            "T for T^2",
            "one factor T is missing. The gradient falls with T twice: the logits are "
            "divided by it, and the distributions grow alike.",
            _total(factor=lambda t: t),
        ),
        Bug(
            "T^2 on the hard term too",
            "the hard term is taken at temperature 1, so it needs no correction.",
            _total(hard_factor=lambda t: t**2),
        ),
        Bug(
            "hard term at temperature T",
            "the labels are to be predicted by the student as it will be used.",
            _total(hard_temperature=lambda t: t),
        ),
        Bug(
            "only the teacher softened",
            "the two distributions are taken at different temperatures, so equal "
            "logits do not give 0.",
            _total(soft=_teacher_softened),
            "the code in question in yuanli2333/Teacher-free-Knowledge-Distillation#24",
        ),
        Bug(
            "only the student softened",
            "the two distributions are taken at different temperatures, so equal "
            "logits do not give 0.",
            _total(soft=_student_softened),
        ),
        Bug(
            "weights swapped",
            "hard_weight weighs the cross-entropy with the labels.",
            _total(weights=lambda w: (w, 1 - w)),
        ),
        Bug(
            "direction reversed",
            "it is the KL of the student from the teacher. The expectation is to be "
            "taken under the teacher.",
            _total(soft=_reverse_kl),
            "paiml/aprender#2153",
        ),
        Bug(
            "teacher's entropy not subtracted",
            "the soft term is a cross-entropy. Its gradient is right, but its value "
            "is not 0 where both sides agree.",
            _total(soft=_entropy_kept),
        ),
        Bug(
            "softmax for log_softmax",
            "probabilities of the student stand where their logarithms should.",
            _total(soft=_probabilities_for_logs),
            "microsoft/ProDA#20",
        ),
        Bug(
            "mean over the vocabulary",
            "a divergence is a sum over the vocabulary; only tokens are averaged. "
            "torch's kl_div with reduction='mean' divides by both.",
            _total(soft=_over_vocabulary),
            "haitongli/knowledge-distillation-pytorch#48 and facebookresearch/deit#61",
        ),
        Bug(
            "mean over the micro-batch",
            "it divides by this micro-batch's own tokens, so that every micro-batch "
            "counts the same, however few tokens it has.",
            _total(reduce=_by_micro_batch),
            "huggingface/transformers#34191",
        ),
        Bug(
            "mean over sequences",
            "each sequence has the same weight. A mean over tokens was wanted.",
            _total(reduce=_by_sequence),
        ),
        Bug(
            "divided by padding",
            "the denominator counts positions that are no response tokens.",
            _total(reduce=_by_position),
        ),
        Bug(
            "padding in the soft term",
            "positions without a label are in the sum of the divergences.",
            _total(reduce_soft=_with_padding),
        ),
        Bug(
            "padding in the soft term's mean",
            "the divergences of positions without a label are in the mean.",
            _total(reduce=_by_micro_batch, reduce_soft=_mean_with_padding),
            "huggingface/trl#7024",
        ),
        Bug(
            "sum",
            "nothing was divided: the loss grows with the number of tokens.",
            _total(reduce=_sum_only),
        ),
    ),
)


# --- 6.2: the limit of infinite temperature ---


def _few(rng):
    for tokens, vocab in ((1, 4), (5, 7)):
        shape = (tokens, vocab)
        # a constant of its own for each token, which no softmax sees
        teacher = _logits(rng, *shape) + _logits(rng, tokens, 1)
        yield _logits(rng, *shape), teacher, rng.uniform(0.15, 0.45)


def _near_the_ends(rng):
    for beta in (0.02, 0.9):
        yield _logits(rng, 3, 6) + 4, _logits(rng, 3, 6), beta


def _each_token(zs, zt, beta):
    return (len(zs),)


def _hot(measure, weight=lambda b: b * (1 - b) / 2):
    return lambda zs, zt, beta: weight(beta) * measure(zs, zt)


def _centred(z):
    return z - z.mean(-1, keepdim=True)


def _variance(zs, zt):
    return _centred(zs - zt).pow(2).mean(-1)


_LIMIT = Code(
    "6.2",
    "hot_limit",
    ("student_logits", "teacher_logits", "beta"),
    (
        Test("logits of any mean", 2, _few, _each_token),
        Test("beta near its ends", 1, _near_the_ends, _each_token),
    ),
    _hot(_variance),
    (
        Bug(
            "mean shift kept",
            "it changes when a constant is added to all logits of a token, which no "
            "softmax sees.",
            _hot(lambda zs, zt: (zs - zt).pow(2).mean(-1)),
        ),
        Bug(
            "one side centred",
            "only one side's mean was taken away.",
            _hot(lambda zs, zt: (_centred(zs) - zt).pow(2).mean(-1)),
        ),
        Bug(
            "V - 1 for V",
            "it divides by V - 1, as torch.var does unless told otherwise. Here V "
            "comes from p = 1/V.",
            _hot(lambda zs, zt: (zs - zt).var(-1)),
        ),
        Bug(
            "sum over the vocabulary",
            "the factor 1/V is missing: each p is about 1/V.",
            _hot(lambda zs, zt: _centred(zs - zt).pow(2).sum(-1)),
        ),
        Bug(
            "half forgotten",
            "the second-order term of the expansion has a factor 1/2.",
            _hot(_variance, lambda b: b * (1 - b)),
        ),
        Bug(
            "limit of the forward KL",
            "beta does not appear: this is the limit that the chapter derived.",
            _hot(_variance, lambda b: 1 / 2),
        ),
        Bug(
            "beta alone",
            "only the teacher's part was kept, with m put equal to the student.",
            _hot(_variance, lambda b: b / 2),
        ),
        Bug(
            "student's part alone",
            "only the student's part was kept, with m put equal to the teacher.",
            _hot(_variance, lambda b: (1 - b) / 2),
        ),
        Bug(
            "parts not weighted",
            "both parts were added up without their weights.",
            _hot(_variance, lambda b: (b**2 + (1 - b) ** 2) / 2),
        ),
        Bug(
            "standard deviation",
            "the expansion is quadratic in the logits.",
            _hot(lambda zs, zt: _variance(zs, zt).sqrt()),
        ),
        Bug(
            "difference of the variances",
            "subtract first and square afterwards.",
            _hot(
                lambda zs, zt: (
                    _centred(zs).pow(2).mean(-1) - _centred(zt).pow(2).mean(-1)
                )
            ),
        ),
    ),
)


# --- 6.3: one micro-batch of one process ---


def _losses(rng, rows, longest, lengths):
    import torch

    per_token = _logits(rng, rows, longest).abs() + 0.1
    mask = torch.zeros(rows, longest, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, :length] = True
    return per_token, mask


def _one_process(rng):
    yield *_losses(rng, 2, 4, [4, 4]), 8, 1
    for lengths in ([1, 5, 2], [3, 6]):
        more = rng.randint(4, 60)
        yield *_losses(rng, len(lengths), 6, lengths), sum(lengths) + more, 1


def _many_processes(rng):
    for processes, lengths in ((3, [2, 5]), (8, [4, 1, 6])):
        more = rng.randint(20, 200)
        losses = _losses(rng, len(lengths), 6, lengths)
        yield *losses, sum(lengths) + more, processes


def _infinite_padding(rng):
    for lengths in ([3, 1], [2, 4]):
        per_token, mask = _losses(rng, 2, 5, lengths)
        yield per_token.where(mask, float("inf")), mask, sum(lengths) + 7, 2


def _no_token(rng):
    yield *_losses(rng, 2, 3, []), 40, 2


def _share(compute):
    def returns(per_token, mask, step_tokens, processes):
        kept = per_token[mask]
        return float(compute(kept, per_token, mask, step_tokens, processes))

    return returns


def _ratio(a, b):
    return a / b if b else 0.0


def _row_means(per_token, mask):
    pairs = zip(per_token, mask, strict=True)
    means = [float(row[here].mean()) for row, here in pairs if here.any()]
    return _ratio(sum(means), len(mask))


_SHARE = Code(
    "6.3",
    "share_of_the_step",
    ("per_token", "mask", "step_tokens", "processes"),
    (
        Test("one process", 1, _one_process),
        Test("several processes", 1, _many_processes),
        Test("infinities outside the mask", 1, _infinite_padding),
        Test("no response token", 1, _no_token),
    ),
    _share(lambda kept, losses, mask, n, p: kept.sum() * p / n),
    (
        Bug(
            "mean over the micro-batch",
            "it divides by this micro-batch's own tokens, so that every micro-batch "
            "counts the same, however few tokens it has.",
            _share(lambda kept, losses, mask, n, p: _ratio(kept.sum(), len(kept))),
            "huggingface/transformers#34191",
        ),
        Bug(
            "processes forgotten",
            "the average over the processes divides once more, after you have divided "
            "by all tokens.",
            _share(lambda kept, losses, mask, n, p: kept.sum() / n),
        ),
        Bug(
            "divided by the processes",
            "the average over the processes divides by their number already.",
            _share(lambda kept, losses, mask, n, p: kept.sum() / n / p),
        ),
        Bug(
            "mean over sequences",
            "each sequence has the same weight. A mean over tokens was wanted.",
            _share(lambda kept, losses, mask, n, p: _row_means(losses, mask)),
        ),
        Bug(
            "divided by padding",
            "the denominator counts positions that are no response tokens.",
            _share(lambda kept, losses, mask, n, p: kept.sum() / mask.numel()),
        ),
        Bug(
            "mask ignored",
            "positions outside the mask are in the sum.",
            lambda losses, mask, n, p: float(losses.nan_to_num(posinf=0).sum()) * p / n,
        ),
        Bug(
            "sum",
            "nothing was divided.",
            _share(lambda kept, losses, mask, n, p: kept.sum()),
        ),
        Bug(
            "mean times the processes",
            "it divides by this micro-batch's own tokens, not by those of the step.",
            _share(lambda kept, losses, mask, n, p: _ratio(kept.sum(), len(kept)) * p),
        ),
    ),
)


# --- 6.4: predictions ---

_SMALL_TOKENS, _VOCABULARY, _SHORT, _LONG = 1000, 32_000, 1, 299


def _gradient_length(temperature):
    """Of the tempered KL of two fixed sets of logits between -3 and 3."""
    import torch

    steps = torch.linspace(-3, 3, _SMALL_TOKENS, dtype=torch.float64)
    zs, zt = steps, 3 * torch.sin(40 * steps)
    ps, pt = (zs / temperature).softmax(-1), (zt / temperature).softmax(-1)
    return ((ps - pt) / temperature).norm().item()


def _factors():
    without = _gradient_length(10.0) / _gradient_length(100.0)
    return {
        "without_t2": without,
        "with_t2": without * (10 / 100) ** 2,
        "over_the_vocabulary": float(_VOCABULARY),
        "short_answer": (1 / 2) / (1 / (_SHORT + _LONG)),
    }


_FACTORS = Predict(
    "6.4",
    "factors",
    _factors,
    {
        "without_t2": (
            Bug(
                "one factor T forgotten",
                "The distributions get flatter as well, and so more alike.",
                lambda: 10.0,
            ),
            Bug(
                "no effect of the temperature",
                "The temperature divides the logits, and the gradient with them.",
                lambda: 1.0,
            ),
        ),
        "with_t2": (
            Bug("one factor T forgotten", "Both factors of 1/T are met.", lambda: 10.0),
            Bug(
                "T^2 not used",
                "Each loss was multiplied by its own T^2 here.",
                lambda: 100.0,
            ),
        ),
        "over_the_vocabulary": (
            Bug(
                "mean over tokens only",
                "torch's mean is over all elements, and a token has V of them.",
                lambda: 1.0,
            ),
        ),
        "short_answer": (
            Bug(
                "weights of the micro-batches alone",
                "A half is what the micro-batch counts for. What should it count for?",
                lambda: 2.0,
            ),
            Bug(
                "against the other tokens",
                "Against a token of the long answer it is that much. Against its own "
                "right weight it is less.",
                lambda: 299.0,
            ),
            Bug(
                "equal weights",
                "Equal weights for unequal micro-batches are unequal for tokens.",
                lambda: 1.0,
            ),
        ),
    },
)

QUESTIONS = (
    _TOTAL,
    _LIMIT,
    _SHARE,
    _FACTORS,
    Choice("6.5", "what_it_fixes", "abcde"),
)
