"""Chapter 5, "KL divergence": directions, mixtures, estimates."""

from __future__ import annotations

import math

from kdlib.checks.frame import Bug, Choice, Code, Predict, Test

__all__: list[str] = []


def __dir__() -> list[str]:
    return __all__


def _random(rng, *shape, scale=2.0):
    import torch

    numbers = [rng.gauss(0, scale) for _ in range(math.prod(shape))]
    return torch.tensor(numbers, dtype=torch.float64).view(shape)


def _kl(log_p, log_q):
    """sum_v p (log p - log q), and 0 where p is 0."""
    p = log_p.exp()
    return (p * (log_p - log_q).where(p > 0, 0.0)).sum(-1)


# --- 5.1: forward KL of a batch ---


def _alike(rng):
    for shape in ((2, 3, 5), (1, 4, 7)):
        yield _random(rng, *shape), _random(rng, *shape), 1.0


def _padded(rng):
    yield _random(rng, 2, 3, 8), _random(rng, 2, 3, 6), 1.0
    yield _random(rng, 3, 2, 5), _random(rng, 3, 2, 9), 1.0


def _softened(rng):
    for temperature in (0.5, 3.0):
        yield _random(rng, 2, 3, 6), _random(rng, 2, 3, 6), temperature


def _ruled_out(rng):
    for padding in (0, 2):
        student, teacher = _random(rng, 2, 3, 7), _random(rng, 2, 3, 7 + padding)
        for token in (0, 4):  # suppressed by both
            student[..., token] = teacher[..., token] = -math.inf
        yield student, teacher, 2.0


def _cut(student, teacher):
    shared = min(student.shape[-1], teacher.shape[-1])
    return student[..., :shared], teacher[..., :shared]


def _filled(student, teacher):
    """The narrower side padded with logits of 0."""
    import torch

    width = max(student.shape[-1], teacher.shape[-1])
    pad = torch.nn.functional.pad
    return tuple(pad(x, (0, width - x.shape[-1])) for x in (student, teacher))


def _forward(
    per_token=_kl,
    align=_cut,
    soft=lambda t: (t, t),
    after=lambda per_token, shape: per_token.mean(),
):
    """Mean over tokens of per_token(log p_t, log p_s), or one step of it changed."""

    def compute(student, teacher, temperature):
        import torch

        student, teacher = align(student, teacher)
        t_student, t_teacher = soft(temperature)
        log_ps = (student / t_student).log_softmax(-1)
        log_pt = (teacher / t_teacher).log_softmax(-1)
        value = after(per_token(log_pt, log_ps), student.shape)
        return torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)

    return compute


def _over_positions(student, teacher, temperature):
    import torch

    student, teacher = _cut(student, teacher)
    log_ps = (student / temperature).log_softmax(1)
    log_pt = (teacher / temperature).log_softmax(-1)
    return torch.nan_to_num(_kl(log_pt, log_ps).mean(), 0.0, 0.0, 0.0)


def _cut_too_late(student, teacher, temperature):
    logs = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    log_ps, log_pt = _cut(*logs)
    return _kl(log_pt, log_ps).mean()


def _cross(log_pt, log_ps):
    p = log_pt.exp()
    return -(p * log_ps.where(p > 0, 0.0)).sum(-1)


_FORWARD = Code(
    "5.1",
    "forward_kl_loss",
    ("student_logits", "teacher_logits", "temperature"),
    (
        Test("equal vocabularies, temperature 1", 1, _alike),
        Test("one side padded", 1, _padded),
        Test("a temperature", 1, _softened),
        Test("tokens that both sides rule out", 1, _ruled_out),
    ),
    _forward(),
    (
        Bug(
            "direction swapped",
            "this is KL(student || teacher). In torch's kl_div the second argument is "
            "the distribution that the mean is taken over.",
            _forward(lambda log_pt, log_ps: _kl(log_ps, log_pt)),
            "paiml/aprender#2153",
        ),
        Bug(
            "entropy not subtracted",
            "this is the cross-entropy. A student that equals its teacher would not "
            "get 0.",
            _forward(_cross),
            "jongwooko/distillm#7",
        ),
        Bug(
            "probabilities for log-probabilities",
            "the student's probabilities stand where their logarithms belong.",
            _forward(
                lambda log_pt, log_ps: (
                    _cross(log_pt, log_ps.exp()) - _cross(log_pt, log_pt)
                )
            ),
            "microsoft/ProDA#20 and sebastian-hofstaetter/matchmaker#18",
        ),
        Bug(
            "mean over the vocabulary",
            'the sum over the tokens of the vocabulary became a mean, as with "mean".',
            _forward(after=lambda x, shape: x.mean() / shape[-1]),
            "haitongli/knowledge-distillation-pytorch#48 and facebookresearch/deit#61",
        ),
        Bug(
            "divided by the sequences alone",
            'a sequence has several tokens, and "batchmean" divides by the first '
            "dimension only. The loss grows with the length.",
            _forward(after=lambda x, shape: x.sum() / shape[0]),
            "huggingface/transformers#1181",
        ),
        Bug(
            "sum over the tokens",
            "it is the sum over all positions, not their mean.",
            _forward(after=lambda x, shape: x.sum()),
        ),
        Bug(
            "softmax over the positions",
            "the student's softmax runs over dimension 1, which is the position.",
            _over_positions,
            "salesforce/ALBEF#58",
        ),
        Bug(
            "padded with zeros",
            "the narrower side got logits of 0. That is no small probability: a real "
            "token may have a lower logit.",
            _forward(align=_filled),
            "arcee-ai/DistillKit#37",
        ),
        Bug(
            "cut after the softmax",
            "probabilities were cut to the shared tokens and no longer sum to 1.",
            _cut_too_late,
        ),
        Bug(
            "only the teacher softened",
            "the temperature divides the logits of both sides.",
            _forward(soft=lambda t: (1.0, t)),
        ),
        Bug(
            "only the student softened",
            "the temperature divides the logits of both sides.",
            _forward(soft=lambda t: (t, 1.0)),
        ),
        Bug(
            "temperature not used",
            "the temperature divides the logits of both sides.",
            _forward(soft=lambda t: (1.0, 1.0)),
        ),
        Bug(
            "multiplied by T squared",
            "the factor T^2 belongs to the objective (chapter 6), not to the KL.",
            lambda s, t, temperature: temperature**2 * _forward()(s, t, temperature),
        ),
    ),
)


# --- 5.2: the gradient of reverse KL ---


def _one_token(rng):
    yield _random(rng, 1, 3), _random(rng, 1, 3), 1.0
    yield _random(rng, 1, 6), _random(rng, 1, 6), 1.0


def _many_tokens(rng):
    yield _random(rng, 4, 5), _random(rng, 4, 5), 1.0


def _tempered(rng):
    for temperature in (0.8, 4.0):
        yield _random(rng, 3, 5), _random(rng, 3, 5), temperature


def _as_student(student, *_):
    return tuple(student.shape)


def _slope(formula, power=-1):
    """formula(p_s, p_t, their log-ratio, KL) T^power, for each token."""

    def compute(student, teacher, temperature):
        log_ps = (student / temperature).log_softmax(-1)
        log_pt = (teacher / temperature).log_softmax(-1)
        p_s, ratio = log_ps.exp(), log_ps - log_pt
        kl = (p_s * ratio).sum(-1, keepdim=True)
        return formula(p_s, log_pt.exp(), ratio, kl) * temperature**power

    return compute


def _right(p_s, p_t, ratio, kl):
    return p_s * (ratio - kl)


def _no_entropy(p_s, p_t, ratio, kl):
    """The gradient of -sum_v p_s log p_t."""
    log_pt = p_s.log() - ratio
    return -p_s * (log_pt - (p_s * log_pt).sum(-1, keepdim=True))


_GRADIENT = Code(
    "5.2",
    "reverse_kl_gradient",
    ("student_logits", "teacher_logits", "temperature"),
    (
        Test("one token", 1, _one_token, _as_student),
        Test("several tokens", 1, _many_tokens, _as_student),
        Test("a temperature", 1, _tempered, _as_student),
    ),
    _slope(_right),
    (
        Bug(
            "gradient of forward KL",
            "p_s - p_t is the gradient of KL(teacher || student).",
            _slope(lambda p_s, p_t, ratio, kl: p_s - p_t),
        ),
        Bug(
            "sampling distribution held fixed",
            "p_s in front of the logarithm depends on the logits as well. With it held "
            "fixed, nothing is left.",
            _slope(lambda p_s, p_t, ratio, kl: 0 * p_s),
            "NVIDIA-NeMo/RL#2506, by samples",
        ),
        Bug(
            "average not subtracted",
            "a softmax passes on what differs from the average alone. These numbers do "
            "not sum to 0.",
            _slope(lambda p_s, p_t, ratio, kl: p_s * ratio),
        ),
        Bug(
            "the 1 kept",
            "the derivative of p log p has a 1 in it. The average has it too.",
            _slope(lambda p_s, p_t, ratio, kl: p_s * (ratio + 1 - kl)),
        ),
        Bug(
            "by the probabilities",
            "this is the derivative by p_s, not yet taken through the softmax.",
            _slope(lambda p_s, p_t, ratio, kl: ratio + 1),
        ),
        Bug(
            "by the teacher's logits",
            "this is the derivative by the teacher's logits.",
            _slope(lambda p_s, p_t, ratio, kl: p_t - p_s),
            "huggingface/sentence-transformers#3757, where the teacher was not "
            "detached",
        ),
        Bug(
            "student's entropy forgotten",
            "only -sum p_s log p_t was differentiated. The student's own logarithm is "
            "missing.",
            _slope(_no_entropy),
        ),
        Bug(
            "wrong sign",
            "it points uphill the other way: a step against it would raise the KL.",
            _slope(lambda *parts: -_right(*parts)),
        ),
        Bug(
            "1/T forgotten",
            "the logits are divided by T before the softmax, and the chain rule "
            "divides once more.",
            _slope(_right, power=0),
        ),
        Bug(
            "T for 1/T",
            "the chain rule divides by T. (T^2, where it is used, comes on top.)",
            _slope(_right, power=1),
        ),
        Bug(
            "mean over the tokens",
            "each token has its own KL here; nothing is averaged.",
            lambda s, t, temperature: _slope(_right)(s, t, temperature) / len(s),
        ),
    ),
    zero=1e-6,  # a logit's rounding in float32, where two terms cancel
)


# --- 5.3: the generalised JSD ---


def _halves(rng):
    yield _random(rng, 3, 5), _random(rng, 3, 5), 0.5
    yield _random(rng, 2, 8), _random(rng, 2, 8), 0.5


def _inside(rng):
    for beta in (0.1, 0.8):
        yield _random(rng, 3, 5), _random(rng, 3, 5), beta


def _ends(rng):
    for beta in (0.0, 1.0):
        yield _random(rng, 3, 5), _random(rng, 3, 5), beta


def _far_apart(rng):
    for beta in (0.3, 0.6):
        yield _random(rng, 2, 4, scale=900), _random(rng, 2, 4, scale=900), beta


def _per_token(student, *_):
    return tuple(student.shape[:-1])


def _log_mixture(log_pt, log_ps, weight):
    """log(weight p_t + (1 - weight) p_s)."""
    import torch

    return torch.logaddexp(log_pt + math.log(weight), log_ps + math.log(1 - weight))


def _interior(mixture=None, weights=None, divergence=_kl):
    """w_t KL(p_t || m) + w_s KL(p_s || m), with a weight or two in other places."""
    mixture = mixture or (lambda beta: beta)
    weights = weights or (lambda beta: (beta, 1 - beta))

    def compute(log_pt, log_ps, beta):
        log_m = _log_mixture(log_pt, log_ps, mixture(beta))
        for_teacher, for_student = weights(beta)
        return for_teacher * divergence(log_pt, log_m) + for_student * divergence(
            log_ps, log_m
        )

    return compute


def _at_end(log_pt, log_ps, beta):
    return _kl(log_pt, log_ps) if beta == 0 else _kl(log_ps, log_pt)


def _jsd(inside=_interior(), end=_at_end):  # noqa: B008 (made once, never changed)
    def compute(student, teacher, beta):
        log_ps, log_pt = student.log_softmax(-1), teacher.log_softmax(-1)
        part = end if beta in (0, 1) else inside
        return part(log_pt, log_ps, beta)

    return compute


def _mirrored(log_pt, log_ps, beta):
    return _interior()(log_pt, log_ps, 1 - beta)


def _by_logarithms(log_pt, log_ps, beta):
    log_m = beta * log_pt + (1 - beta) * log_ps
    return beta * _kl(log_pt, log_m) + (1 - beta) * _kl(log_ps, log_m)


def _clamped(log_pt, log_ps, beta):
    return _interior()(log_pt, log_ps, min(max(beta, 1e-6), 1 - 1e-6))


_JSD = Code(
    "5.3",
    "gkd_jsd",
    ("student_logits", "teacher_logits", "beta"),
    (
        Test("beta = 1/2", 1, _halves, _per_token),
        Test("beta inside", 1, _inside, _per_token),
        Test("beta = 0 and beta = 1", 1, _ends, _per_token),
        Test("models that are far apart", 1, _far_apart, _per_token),
    ),
    _jsd(),
    (
        Bug(
            "weights of the mixture swapped",
            "the mixture gives beta to the student. In GKD it gives beta to the "
            "teacher.",
            _jsd(_interior(mixture=lambda beta: 1 - beta)),
            "huggingface/trl#3043",
        ),
        Bug(
            "weights of the sum swapped",
            "the teacher's KL carries 1 - beta and the student's beta. That joins the "
            "two ends without a jump, and is not GKD's formula.",
            _jsd(_interior(weights=lambda beta: (1 - beta, beta))),
            "modelscope/ms-swift#10213",
        ),
        Bug(
            "beta from the other end",
            "teacher and student have changed places, inside and at the ends.",
            _jsd(_mirrored, lambda t, s, beta: _at_end(s, t, beta)),
        ),
        Bug(
            "ends swapped",
            "beta = 0 is forward KL, KL(teacher || student), and beta = 1 reverse KL.",
            _jsd(end=lambda t, s, beta: _at_end(s, t, beta)),
            "a review of modelscope/twinkle#112, whose code was right",
        ),
        Bug(
            "ends left to the formula",
            "at both ends the formula gives 0, a loss without a gradient. The ends are "
            "set by convention.",
            _jsd(end=lambda t, s, beta: 0 * _kl(t, s)),
            "huggingface/trl#3043",
        ),
        Bug(
            "beta kept off its ends",
            "with beta a millionth away from its end the loss is a millionth of a KL.",
            _jsd(end=_clamped),
            "verl-project/verl-recipe#151",
        ),
        Bug(
            "mixture of logarithms",
            "m mixes probabilities. A mixture of their logarithms is another "
            "distribution, and not even normalised.",
            _jsd(_by_logarithms),
            "huggingface/trl#2202",
        ),
        Bug(
            "arguments of both KLs swapped",
            "the mixture comes second: KL(p || m). In torch's kl_div that is the first "
            "argument.",
            _jsd(_interior(divergence=lambda log_p, log_m: _kl(log_m, log_p))),
        ),
        Bug(
            "both KLs weigh one half",
            "only the mixture depends on beta here.",
            _jsd(_interior(weights=lambda beta: (0.5, 0.5))),
        ),
        Bug(
            "mixture of one half",
            "only the weights of the sum depend on beta here.",
            _jsd(_interior(mixture=lambda beta: 0.5)),
        ),
        Bug(
            "mean over the vocabulary",
            "the sum over the vocabulary became a mean.",
            lambda s, t, beta: _jsd()(s, t, beta) / s.shape[-1],
            "huggingface/trl#4105",
        ),
    ),
    zero=1e-12,
)


# --- 5.4: k3 of samples from an older student ---


def _fresh(rng):
    for n in (1, 5):
        log_ps = -_random(rng, n, scale=1.0).abs() - 0.1
        yield log_ps, -_random(rng, n, scale=1.0).abs() - 0.1, log_ps.clone()


def _stale(rng):
    for n in (4, 6):
        yield tuple(-_random(rng, n, scale=1.0).abs() - 0.1 for _ in range(3))


def _weighed(weight=None, term=None):
    """weight(log p_s, log p_t, log p_old) * term(log p_t - log p_s)."""
    weight = weight or (lambda s, t, old: (s - old).exp())
    term = term or (lambda r: r.expm1() - r)
    return lambda s, t, old: weight(s, t, old) * term(t - s)


_STALE = Code(
    "5.4",
    "stale_k3",
    ("student_log_probs", "teacher_log_probs", "old_log_probs"),
    (
        Test("fresh samples: the old student is the new one", 1, _fresh, _as_student),
        Test("stale samples", 2, _stale, _as_student),
    ),
    _weighed(),
    (
        Bug(
            "no importance weight",
            "the samples come from the old student. Their mean is not the new "
            "student's.",
            _weighed(lambda s, t, old: 1.0),
            "huggingface/trl#4637 and verl-project/verl#2983",
        ),
        Bug(
            "weight upside down",
            "a token that the new student likes better than the old one must count "
            "more, not less.",
            _weighed(lambda s, t, old: (old - s).exp()),
        ),
        Bug(
            "logarithm for the weight",
            "the weight is a ratio of probabilities, not of their logarithms.",
            _weighed(lambda s, t, old: 1 + s - old),
        ),
        Bug(
            "weighed towards the teacher",
            "this weight makes the teacher's mean of the samples.",
            _weighed(lambda s, t, old: (t - old).exp()),
        ),
        Bug(
            "compared with the old student",
            "the KL compares the teacher with the new student. The old one has a say "
            "in the weight alone.",
            lambda s, t, old: (s - old).exp() * ((t - old).expm1() - (t - old)),
        ),
        Bug(
            "log-ratio swapped",
            "r is log p_t - log p_s. With the other sign the estimate is not without "
            "bias.",
            _weighed(term=lambda r: (-r).expm1() + r),
        ),
        Bug(
            "k1",
            "this is k1 with a weight: no bias, but of either sign.",
            _weighed(term=lambda r: -r),
        ),
        Bug(
            "k2",
            "this is k2, which is biased whatever the weight.",
            _weighed(term=lambda r: 0.5 * r**2),
        ),
        Bug(
            "1 not subtracted",
            "equal models must give 0.",
            _weighed(term=lambda r: r.exp() - r),
        ),
        Bug(
            "weights normalised",
            "divided by their sum or mean over the batch, the weights are biased.",
            _weighed(lambda s, t, old: (s - old).exp() / (s - old).exp().mean()),
        ),
    ),
)


# --- 5.5: predictions ---

_TOKENS, _SENTENCES, _BETA, _NEAR = 16, 10, 0.1, 0.001
_FORWARD_NATS, _REVERSE_NATS = 3.0, 5.0


def _binary_entropy(beta):
    return -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)


def _numbers():
    r = math.log(0.5)  # of the answer that is left
    return {
        "perfect_ce": math.log(_TOKENS),
        "jsd_apart": _binary_entropy(_BETA),
        "jsd_near_end": _NEAR * _FORWARD_NATS,
        "wrong_share": 1 - 1 / _SENTENCES,
        "k3_reads": math.expm1(r) - r,
    }


def _says(value):
    return lambda: value


_PREDICTION = Predict(
    "5.5",
    "numbers",
    _numbers,
    {
        "perfect_ce": (
            Bug(
                "one token's probability",
                "That is each token's probability.",
                _says(1 / _TOKENS),
            ),
            Bug("perplexity", "That is its exponential.", _says(_TOKENS)),
        ),
        "jsd_apart": (
            Bug(
                "log 2 for every beta",
                "That is the bound at beta = 1/2.",
                _says(math.log(2)),
            ),
            Bug(
                "bound of the skew KL",
                "-log beta bounds the teacher's KL before it is weighed.",
                _says(-math.log(_BETA)),
            ),
        ),
        "jsd_near_end": (
            Bug(
                "no jump at the end",
                "That is its value at beta = 0 itself.",
                _says(_FORWARD_NATS),
                "modelscope/ms-swift#10078",
            ),
            Bug("the other end", "That belongs to beta = 0.999.", _says(0.005)),
            Bug("the bound", "That is the bound; it is less.", _says(0.008)),
        ),
        "wrong_share": (
            Bug("two sentences", "That is for two sentences.", _says(0.5)),
            Bug("the right share", "That is the share that is right.", _says(0.1)),
        ),
        "k3_reads": (
            Bug(
                "the KL itself",
                "That is the true KL. The mean of k3 reaches it through the other, "
                "rare samples.",
                _says(math.log(2)),
            ),
            Bug(
                "the rare sample",
                "So it reads once in a billion samples.",
                _says(5e8),
            ),
        ),
    },
)

QUESTIONS = (
    _FORWARD,
    _GRADIENT,
    _JSD,
    _STALE,
    _PREDICTION,
    Choice("5.6", "what_is_minimised", "abcde"),
)
