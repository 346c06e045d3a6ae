"""Chapter 4, "Cross-entropy for distillation": the loss, its gradient, its noise."""

from __future__ import annotations

import math

from kdlib.checks.frame import Bug, Choice, Code, Predict, Test

__all__: list[str] = []


def __dir__() -> list[str]:
    return __all__


def _normal(rng, *shape, scale=1.5):
    """Float64 logits from a normal distribution."""
    import torch

    numbers = [rng.gauss(0, scale) for _ in range(math.prod(shape))]
    return torch.tensor(numbers, dtype=torch.float64).view(shape)


def _rows(student, *_):
    return (len(student),)


# --- 4.1: the loss ---


def _plain_logits(rng):
    for n, v in ((1, 3), (2, 6), (4, 5)):
        yield _normal(rng, n, v), _normal(rng, n, v)


def _large_logits(rng):
    """Past where exp or its inverse ends, in float64."""
    for n, v in ((2, 4), (3, 6)):
        student, teacher = _normal(rng, n, v, scale=2), _normal(rng, n, v, scale=2)
        student[:, 0] += 900
        teacher[:, -1] += 800
        yield student, teacher


def _masked_logits(rng):
    for n, v, masked in ((2, 5, [1]), (3, 7, [0, 4])):
        student, teacher = _normal(rng, n, v), _normal(rng, n, v)
        student[:, masked] = teacher[:, masked] = -math.inf
        yield student, teacher


def _padded_logits(rng):
    for n, v_s, v_t in ((2, 5, 8), (3, 8, 5), (1, 6, 7)):
        yield _normal(rng, n, v_s), _normal(rng, n, v_t)


def _shared(student, teacher):
    v = min(student.shape[-1], teacher.shape[-1])
    return student[..., :v], teacher[..., :v]


def _loss(terms, mean=False):
    """A function of (p, log p, q, log q) [N, V] -> a function of the logits."""

    def compute(student, teacher):
        student, teacher = _shared(student, teacher)
        p, q = teacher.softmax(-1), student.softmax(-1)
        kept = (student > -math.inf) & (teacher > -math.inf)
        log_p = teacher.log_softmax(-1).where(kept, 0.0)
        log_q = student.log_softmax(-1).where(kept, 0.0)
        found = terms(p, log_p, q, log_q)
        return found.mean(-1) if mean else found.sum(-1)

    return compute


def _normalised_first(student, teacher):
    """Softmax over each side's padding as well, then cut."""
    p, log_q = _shared(teacher.softmax(-1), student.log_softmax(-1))
    return -(p * log_q.where(p > 0, 0.0)).sum(-1)


def _filled_up(student, teacher):
    """The shorter side padded with logits of 0."""
    import torch

    v = max(student.shape[-1], teacher.shape[-1])
    student, teacher = (
        torch.nn.functional.pad(x, (0, v - x.shape[-1])) for x in (student, teacher)
    )
    return _SOFT.truth(student, teacher)


def _over_rows(student, teacher):
    student, teacher = _shared(student, teacher)
    p, log_q = teacher.softmax(0), student.log_softmax(0)
    return -(p * log_q.where(p > 0, 0.0)).sum(-1)


def _twice(student, teacher):
    """Probabilities given to a function that takes logits."""
    student, teacher = _shared(student, teacher)
    return -(teacher.softmax(-1) * student.softmax(-1).log_softmax(-1)).sum(-1)


def _favourite(student, teacher):
    student, teacher = _shared(student, teacher)
    best = teacher.argmax(-1, keepdim=True)
    return -student.log_softmax(-1).gather(-1, best)[:, 0]


_SOFT = Code(
    "4.1",
    "soft_cross_entropy",
    ("student_logits", "teacher_logits"),
    (
        Test("logits of ordinary size", 1, _plain_logits, _rows),
        Test("logits of several hundred", 1, _large_logits, _rows),
        Test("tokens that both sides mask", 1, _masked_logits, _rows),
        Test("vocabularies of different padded size", 1, _padded_logits, _rows),
    ),
    _loss(lambda p, log_p, q, log_q: -p * log_q),
    (
        Bug(
            "minus sign missing",
            "a surprise -log q is never negative, so neither is its mean.",
            _loss(lambda p, log_p, q, log_q: p * log_q),
            "higgsfield/Imagination-Augmented-Agents#6, and in print",
        ),
        Bug(
            "mean over the vocabulary",
            "the terms of the vocabulary are summed. A mean divides by V too.",
            _loss(lambda p, log_p, q, log_q: -p * log_q, mean=True),
            "GMvandeVen/continual-learning#5",
        ),
        Bug(
            "entropy subtracted",
            "this is the KL divergence: the teacher's entropy is missing. Its "
            "gradient is the same, its value is not.",
            _loss(lambda p, log_p, q, log_q: p * (log_p - log_q)),
            "szagoruyko/attention-transfer#12, where the two were mixed up",
        ),
        Bug(
            "roles swapped",
            "the tokens are drawn from the student, and the teacher is surprised.",
            _loss(lambda p, log_p, q, log_q: -q * log_p),
        ),
        Bug(
            "student left out",
            "the teacher stands on both sides, so there is nothing to learn.",
            _loss(lambda p, log_p, q, log_q: -p * log_p),
            "labmlai/annotated_deep_learning_paper_implementations#66",
        ),
        Bug(
            "no logarithm",
            "the student's probabilities stand where their logarithms should.",
            _loss(lambda p, log_p, q, log_q: -p * q),
            "microsoft/ProDA#43",
        ),
        Bug(
            "bits for nats",
            "the logarithm is the one to base 2.",
            _loss(lambda p, log_p, q, log_q: -p * log_q / math.log(2)),
        ),
        Bug(
            "softmax twice",
            "the student's probabilities are put through a softmax again.",
            _twice,
            "tflearn/tflearn#562",
        ),
        Bug(
            "softmax over the tokens",
            "the softmax runs down the N rows. It belongs to the vocabulary, the "
            "last dimension.",
            _over_rows,
            "Lackel/DPN#1",
        ),
        Bug(
            "favourite for the distribution",
            "only the teacher's likeliest token is asked for.",
            _favourite,
        ),
        Bug(
            "padding normalised",
            "the columns that only one side has share in its softmax.",
            _normalised_first,
        ),
        Bug(
            "padding filled up",
            "the shorter side was lengthened, and a logit of 0 is not nothing.",
            _filled_up,
            "linkedin/Liger-Kernel#634",
        ),
    ),
)


# --- 4.2: the gradient of a batch ---


def _batch(rng, lengths, prompts, v, temperature):
    """Logits [B, L, V] and labels; rows padded on the right.

    Gaps between the two sides are kept wide: where p_s - p_t is the small difference of
    large numbers, float32 could not be told from a mistake.
    """
    import torch

    shape = len(lengths), max(lengths), v
    student, teacher = _normal(rng, *shape), _normal(rng, *shape)
    for row in range(shape[0]):
        for position in range(shape[1]):
            while not _wide(student[row, position], teacher[row, position]):
                student[row, position] = _normal(rng, v)
                teacher[row, position] = _normal(rng, v)
    labels = torch.full(shape[:2], -100)
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        ids = [rng.randrange(v) for _ in range(length - prompt)]
        labels[row, prompt:length] = torch.tensor(ids)
    return student, teacher, labels, temperature


def _wide(student, teacher):
    for t in (1.0, 2.0, 3.0, 0.5):
        p_s, p_t = (student / t).softmax(-1), (teacher / t).softmax(-1)
        if ((p_s - p_t).abs() < 0.02 * p_s.maximum(p_t)).any():
            return False
    return True


def _whole_rows(rng):
    """One row, then two rows of equal length; the prompt is one token."""
    yield _batch(rng, [4], [1], 3, 1.0)
    yield _batch(rng, [5, 5], [1, 1], 4, 1.0)


def _ragged(rng):
    yield _batch(rng, [7, 4], [2, 3], 4, 1.0)
    yield _batch(rng, [3, 6, 5], [1, 2, 1], 3, 1.0)


def _tempered(rng):
    yield _batch(rng, [6, 4], [2, 1], 4, 2.0)
    yield _batch(rng, [3, 6, 5], [1, 3, 1], 3, 3.0)
    yield _batch(rng, [5], [2], 4, 0.5)


def _like(student, *_):
    return tuple(student.shape)


def _predicts(labels):
    """[B, L] bool: the position's logits predict a supervised token."""
    import torch

    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != -100
    return mask


def _probabilities(student, teacher, temperature, dim=-1):
    return (student / temperature).softmax(dim), (teacher / temperature).softmax(dim)


def _gradient(
    factor=lambda t: t,
    count=lambda labels, v: int((labels[:, 1:] != -100).sum()),
    mask=_predicts,
    gap=lambda student, teacher, labels, t: (
        _probabilities(student, teacher, t)[0] - _probabilities(student, teacher, t)[1]
    ),
):
    def compute(student, teacher, labels, temperature):
        found = gap(student, teacher, labels, temperature)
        kept = found * mask(labels).unsqueeze(-1)
        scale = factor(temperature) / count(labels, student.shape[-1])
        return scale * kept

    return compute


def _of_rows(student, teacher, labels, temperature):
    """The mean over rows of each row's mean."""
    mask = _predicts(labels)
    p_s, p_t = _probabilities(student, teacher, temperature)
    by_row = (p_s - p_t) * mask.unsqueeze(-1) / mask.sum(1)[:, None, None]
    return temperature * by_row / len(labels)


def _one_sided(student, teacher, labels, t):
    return (student / t).softmax(-1) - teacher.softmax(-1)


def _own_temperature(student, teacher, labels, t):
    return student.softmax(-1) - (teacher / t).softmax(-1)


def _over_positions(student, teacher, labels, t):
    p_s, p_t = _probabilities(student, teacher, t, dim=1)
    return p_s - p_t


def _log_gap(student, teacher, labels, t):
    return (student / t).log_softmax(-1) - (teacher / t).log_softmax(-1)


def _labels_gap(student, teacher, labels, t):
    """The data's label in the place of the teacher."""
    import torch

    p_s = (student / t).softmax(-1)
    hot = torch.zeros_like(p_s)
    hot[:, :-1] = torch.nn.functional.one_hot(
        labels[:, 1:].clamp(min=0), p_s.shape[-1]
    ).to(p_s)
    return p_s - hot


def _favourite_gap(student, teacher, labels, t):
    import torch

    p_s = (student / t).softmax(-1)
    return p_s - torch.nn.functional.one_hot(teacher.argmax(-1), p_s.shape[-1])


def _reverse_gap(student, teacher, labels, t):
    """The gradient of KL(student || teacher)."""
    p_s, p_t = _probabilities(student, teacher, t)
    log_ratio = (p_s / p_t).log()
    return p_s * (log_ratio - (p_s * log_ratio).sum(-1, keepdim=True))


_BATCH = Code(
    "4.2",
    "batch_gradient",
    ("student_logits", "teacher_logits", "labels", "temperature"),
    (
        Test("rows of equal length", 1, _whole_rows, _like),
        Test("prompts and padding", 2, _ragged, _like),
        Test("a temperature", 2, _tempered, _like),
    ),
    _gradient(),
    (
        Bug(
            "T^2 missing",
            "T^2 stands in front of the loss, and its gradient has it too.",
            _gradient(factor=lambda t: 1 / t),
            "IntelLabs/distiller#122",
        ),
        Bug(
            "1/T missing",
            "the logits are divided by T, so the chain rule brings a factor.",
            _gradient(factor=lambda t: t**2),
        ),
        Bug(
            "T forgotten in the scale",
            "two factors with T meet here, and they do not cancel.",
            _gradient(factor=lambda t: 1.0),
        ),
        Bug(
            "T^2 twice",
            "the loss has T^2 once.",
            _gradient(factor=lambda t: t**3),
        ),
        Bug(
            "sign",
            "descent goes against the gradient, so the gradient points away from "
            "the teacher.",
            _gradient(factor=lambda t: -t),
        ),
        Bug(
            "mean over the vocabulary",
            "the mean is taken over tokens, and not over the vocabulary as well.",
            _gradient(
                count=lambda labels, v: v * int((labels[:, 1:] != -100).sum()),
            ),
            "GMvandeVen/continual-learning#5",
        ),
        Bug(
            "sum for the mean",
            "the loss is divided by N.",
            _gradient(count=lambda labels, v: 1),
        ),
        Bug(
            "all positions counted",
            "every position of the batch is in the denominator. N counts supervised "
            "tokens.",
            _gradient(count=lambda labels, v: labels.numel()),
            "ServiceNow/Fast-LLM#344",
        ),
        Bug(
            "padding counted",
            "prompt and padding are masked, yet they are in the denominator. N counts "
            "supervised tokens.",
            _gradient(count=lambda labels, v: labels[:, 1:].numel()),
            "ServiceNow/Fast-LLM#344",
        ),
        Bug(
            "divided by the rows",
            "N is a number of tokens, and not of rows.",
            _gradient(count=lambda labels, v: len(labels)),
        ),
        Bug(
            "mean of the rows' means",
            "each row is averaged by itself. Then a token of a short row weighs "
            "more than one of a long row.",
            _of_rows,
            "meta-pytorch/torchtune#1865, where it was a mean of chunks' means",
        ),
        Bug(
            "not shifted",
            "the logits at a position predict the next token. Here they are held "
            "against the label at the same position.",
            _gradient(mask=lambda labels: labels != -100),
            "arcee-ai/DistillKit (commit a61c2e7)",
        ),
        Bug(
            "shifted the wrong way",
            "the logits at a position predict the next token, not the one before.",
            _gradient(mask=lambda labels: _predicts(labels.flip(1)).flip(1)),
        ),
        Bug(
            "mask forgotten",
            "prompt and padding get a gradient as well, and are counted.",
            _gradient(
                mask=lambda labels: _predicts(0 * labels),
                count=lambda labels, v: labels[:, 1:].numel(),
            ),
            "peremartra/optipfair#34",
        ),
        Bug(
            "teacher on both sides",
            "the gradient is zero everywhere: a model is compared with itself.",
            _gradient(gap=lambda student, teacher, labels, t: 0.0 * student),
            "labmlai/annotated_deep_learning_paper_implementations#66",
        ),
        Bug(
            "teacher at temperature 1",
            "the temperature divides the logits of both sides.",
            _gradient(gap=_one_sided),
        ),
        Bug(
            "student at temperature 1",
            "the temperature divides the logits of both sides.",
            _gradient(gap=_own_temperature),
        ),
        Bug(
            "softmax over the positions",
            "the softmax belongs to the vocabulary, the last dimension.",
            _gradient(gap=_over_positions),
            "irfanICMLL/structure_knowledge_distillation#11",
        ),
        Bug(
            "logarithms subtracted",
            "it is the difference of probabilities, not of their logarithms.",
            _gradient(gap=_log_gap),
        ),
        Bug(
            "labels for the teacher",
            "the target is the label. The teacher does not occur.",
            _gradient(gap=_labels_gap),
        ),
        Bug(
            "favourite for the distribution",
            "the target is the teacher's likeliest token, not its distribution.",
            _gradient(gap=_favourite_gap),
        ),
        Bug(
            "reverse KL",
            "this is the gradient of KL(student || teacher).",
            _gradient(gap=_reverse_gap),
        ),
    ),
)


# --- 4.3: the best strength of smoothing ---


def _distributions(rng):
    for n, v in ((1, 3), (3, 5), (4, 8)):
        yield (_normal(rng, n, v).softmax(-1),)


def _extremes(rng):
    import torch

    yield (torch.full((1, 4), 0.25, dtype=torch.float64),)
    yield (torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64),)


def _smoothing(strength):
    """A function of (sum p^2 [N], p [N, V], V) -> a function of p."""
    return lambda p: strength(p.square().sum(-1), p, p.shape[-1])


def _entropy(p):
    return -(p * p.where(p > 0, 1.0).log()).sum(-1)


_SMOOTHING = Code(
    "4.3",
    "best_smoothing",
    ("teacher_probs",),
    (
        Test("random teachers", 3, _distributions, _rows),
        Test("sure of one token, of two, of none", 1, _extremes, _rows),
    ),
    _smoothing(lambda s, p, v: (1 - s) / (1 - 1 / v)),
    (
        Bug(
            "1/V forgotten",
            "it is the label's noise. A teacher that knows nothing should get 1.",
            _smoothing(lambda s, p, v: 1 - s),
        ),
        Bug(
            "bias and noise swapped",
            "this is the weight that the label should keep.",
            _smoothing(lambda s, p, v: (s - 1 / v) / (1 - 1 / v)),
        ),
        Bug(
            "noise scaled once",
            "scaling a random vector by 1 - e scales its variance by the square.",
            _smoothing(
                lambda s, p, v: (1 - s) / (2 * (s - 1 / v)).where(s > 1 / v, 1.0)
            ),
        ),
        Bug(
            "noise left out",
            "bias alone is smallest without smoothing. One smooths against noise.",
            _smoothing(lambda s, p, v: 0.0 * s),
        ),
        Bug(
            "bias left out",
            "noise alone is smallest without the label. Then nothing is learned.",
            _smoothing(lambda s, p, v: 0.0 * s + 1),
        ),
        Bug(
            "unit vector for the uniform",
            "u is taken for a vector of length 1. Each of its entries is 1/V.",
            _smoothing(lambda s, p, v: (1 - s) / (2 - 2 / v)),
        ),
        Bug(
            "dot product left out",
            "|u - p|^2 has a third part, -2 u.p.",
            _smoothing(lambda s, p, v: (1 - s) / (1 + 1 / v)),
        ),
        Bug(
            "favourite for the label",
            "the label is taken for the likeliest one; it is drawn.",
            _smoothing(lambda s, p, v: 1 - p.amax(-1)),
        ),
        Bug(
            "entropy for the noise",
            "entropy also measures how torn a teacher is, but squared error does "
            "not lead to it.",
            _smoothing(lambda s, p, v: _entropy(p) / math.log(v)),
        ),
        Bug(
            "standard deviation",
            "this is the square root: e is a ratio of variances.",
            _smoothing(lambda s, p, v: ((1 - s) / (1 - 1 / v)).sqrt()),
        ),
    ),
)


# --- 4.4: which part of the noise the labels bring ---


def _inputs(rng, n, v, spread):
    teacher = _normal(rng, n, v)
    return teacher + spread * _normal(rng, n, v), teacher


def _unlike(rng):
    for n, v in ((2, 3), (4, 5), (7, 6)):
        yield _normal(rng, n, v), _normal(rng, n, v)
    for n, v in ((3, 4), (5, 6)):  # all inputs pull the same way: a large mean gap
        student, teacher = _inputs(rng, n, v, 0.3)
        student[:, 0] += 4.0
        yield student, teacher


def _alike(rng):
    for n, v in ((2, 4), (5, 3)):
        student, teacher = _inputs(rng, n, v, 0.0)
        yield student.clone(), teacher
    yield _inputs(rng, 1, 5, 1.0)  # one input: nothing varies but the label


def _share(
    label=None, inputs=None, ratio=lambda label, inputs: label / (label + inputs)
):
    def compute(student, teacher):
        p_s, p_t = student.softmax(-1), teacher.softmax(-1)
        a = (label or _label_part)(p_s, p_t)
        b = (inputs or _inputs_part)(p_s, p_t)
        return ratio(a, b)

    return compute


def _label_part(p_s, p_t):
    return (1 - p_t.square().sum(-1)).mean()


def _inputs_part(p_s, p_t):
    gap = p_s - p_t
    return (gap - gap.mean(0)).square().sum(-1).mean()


def _corrected(p_s, p_t):
    return _inputs_part(p_s, p_t) * len(p_s) / max(1, len(p_s) - 1)


_SHARE = Code(
    "4.4",
    "label_noise_share",
    ("student_logits", "teacher_logits"),
    (
        Test("students that differ from the teacher", 3, _unlike),
        Test("a student that equals its teacher; one input", 1, _alike),
    ),
    _share(),
    (
        Bug(
            "mean gap left in",
            "a variance is taken around the mean. What all inputs agree on is no "
            "noise.",
            _share(inputs=lambda p_s, p_t: (p_s - p_t).square().sum(-1).mean()),
        ),
        Bug(
            "inputs' share",
            "this is the other part.",
            _share(ratio=lambda a, b: b / (a + b)),
        ),
        Bug(
            "ratio, not share",
            "the label's part is divided by the other part alone.",
            _share(ratio=lambda a, b: a / b if b > 0 else a),
        ),
        Bug(
            "label's variance alone",
            "it is not yet divided by the whole variance.",
            _share(ratio=lambda a, b: a),
        ),
        Bug(
            "standard deviations",
            "variances add up, their roots do not.",
            _share(ratio=lambda a, b: a.sqrt() / (a.sqrt() + b.sqrt())),
        ),
        Bug(
            "student's noise",
            "the label is drawn from the teacher.",
            _share(label=lambda p_s, p_t: _label_part(p_t, p_s)),
        ),
        Bug(
            "teacher left out of the gap",
            "within an input the mean gradient is p_s - p_t, and both vary.",
            _share(inputs=lambda p_s, p_t: _inputs_part(p_s, 0.0 * p_t)),
        ),
        Bug(
            "mean distribution",
            "the noise is averaged over inputs, not taken of their average.",
            _share(label=lambda p_s, p_t: _label_part(p_s, p_t.mean(0, True))),
        ),
        Bug(
            "favourite for the label",
            "the label is taken for the likeliest one; it is drawn.",
            _share(
                label=lambda p_s, p_t: (
                    1 - 2 * p_t.amax(-1) + p_t.square().sum(-1)
                ).mean()
            ),
        ),
        Bug(
            "divided by N - 1",
            "the N inputs are all there are, so nothing is estimated.",
            _share(inputs=_corrected),
        ),
    ),
)


# --- 4.5: predictions ---

_NUMBERS = {
    "torn torn_word others favourite rest": (
        (4, "four", "three", 0.97, 0.01),
        (10, "ten", "nine", 0.991, 0.001),
        (16, "sixteen", "fifteen", 0.985, 0.001),
        (32, "thirty-two", "thirty-one", 0.969, 0.001),
    ),
    "goal": (0.01, 0.001, 0.002, 0.003),
}

_VOCABULARY = 151_936


def _nats(n):
    bold = -(math.log(n.favourite) + (n.torn - 1) * math.log(n.rest)) / n.torn
    noise = 1 - 1 / n.torn
    return {
        "start": math.log(_VOCABULARY),
        "best": math.log(n.torn),
        "bold": bold,
        "noise": noise,
        "labels": noise / n.goal,
    }


_PREDICTION = Predict(
    "4.5",
    "losses_in_nats",
    _nats,
    {
        "start": (
            Bug(
                "decimal logarithm",
                "That is the logarithm to base 10.",
                lambda n: math.log10(_VOCABULARY),
            ),
            Bug(
                "floor for the start",
                "That is the best loss; this student does not know the {torn_word}.",
                lambda n: math.log(n.torn),
            ),
        ),
        "best": (
            Bug(
                "decimal logarithm", "That is to base 10.", lambda n: math.log10(n.torn)
            ),
            Bug(
                "choices for nats",
                "That is the number of choices. The loss is its logarithm.",
                lambda n: n.torn,
            ),
        ),
        "bold": (
            Bug(
                "favourite's loss alone",
                "That is the loss where the teacher says the favourite.",
                lambda n: -math.log(n.favourite),
            ),
            Bug(
                "student's mean",
                "The teacher draws the tokens, not the student.",
                lambda n: (
                    -n.favourite * math.log(n.favourite)
                    - (n.torn - 1) * n.rest * math.log(n.rest)
                ),
            ),
            Bug(
                "sum for the mean",
                "That adds up the {torn_word}; each counts 1/{torn}.",
                lambda n: n.torn * _nats(n)["bold"],
            ),
        ),
        "noise": (
            Bug(
                "largest probability",
                "That is the sum of squares: subtract it from one.",
                lambda n: 1 / n.torn,
            ),
            Bug(
                "one entry only",
                "That is the variance of one entry; there are {torn_word}.",
                lambda n: (n.torn - 1) / n.torn**2,
            ),
        ),
        "labels": (
            Bug(
                "standard deviation",
                "Noise goes down with n; its root goes down with the root of n.",
                lambda n: _nats(n)["labels"] ** 0.5,
            ),
            Bug(
                "variance against deviation",
                "That brings the root of the noise to {goal:g}.",
                lambda n: _nats(n)["noise"] / n.goal**2,
            ),
        ),
    },
    _NUMBERS,
    (
        "torn evenly between {torn_word} of them",
        "gives one of the {torn_word} tokens {favourite:g}",
        "the other {others} {rest:g};",
        "until that noise is {goal:g}.",
    ),
)

QUESTIONS = (
    _SOFT,
    _BATCH,
    _SMOOTHING,
    _SHARE,
    _PREDICTION,
    Choice("4.6", "which_target", "abcde"),
)
