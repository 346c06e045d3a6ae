"""Chapter 2, "Two distributions": logits, temperature, entropy, padding, numerics."""

from __future__ import annotations

import math

from kdlib.checks.frame import Bug, Choice, Code, Predict, Test

__all__: list[str] = []


def __dir__() -> list[str]:
    return __all__


def _logits(rng, *shape, spread=2.0, dtype="float64"):
    """Uniform logits whose favourite is never nearly certain.

    A log-probability near 0 has few right digits in float32, whoever computes it.
    """
    import torch

    count = math.prod(shape)
    z = torch.tensor([rng.uniform(-spread, spread) for _ in range(count)])
    z = z.reshape(shape).to(getattr(torch, dtype))
    best, second = z.topk(2, -1).indices.split(1, -1)
    return z.scatter(-1, second, z.gather(-1, best) - 0.125)


def _normal(z, dim=-1):
    return z - z.logsumexp(dim, keepdim=True)


# --- 2.1: tempered log-probabilities on a padded head ---


def _unpadded(*shape, temperatures=(1.0,), dtypes=("float64", "float32")):
    def cases(rng):
        for dtype in dtypes:
            for temperature in temperatures:
                z = _logits(rng, *shape, dtype=dtype)
                yield z, temperature, shape[-1]

    return cases


def _padded(rng):
    """Columns that nobody trained: zeros, noise, or far above the real ones."""
    import torch

    for level, temperature in ((1.5, 2.0), (0.0, 1.0), (9.0, 1.0)):
        z = _logits(rng, 3, 8)
        junk = level * _logits(rng, 3, 4) / 2 if level else torch.zeros(3, 4)
        yield torch.cat([z, junk.double()], -1), temperature, 8


def _large(rng):
    """The levels overflow or underflow exp; the gaps between likely tokens do not."""
    import torch

    for level, dtype in ((120.0, "float32"), (1000.0, "float64")):
        near = _logits(rng, 2, 60, spread=0.5, dtype=dtype)
        far = _logits(rng, 2, 3, dtype=dtype)
        yield torch.cat([near + level, far - level], -1), 1.0, 63
        yield torch.cat([near - 2 * level, far - 9 * level], -1), 2.0, 63


def _log_probs(logits, temperature, vocabulary):
    return _normal(logits.double()[..., :vocabulary] / temperature)


def _zeroed(logits, temperature, vocabulary):
    z = logits.double().clone()
    z[..., vocabulary:] = 0
    return _normal(z / temperature)[..., :vocabulary]


def _one_sum(logits, temperature, vocabulary):
    z = logits.double()[..., :vocabulary] / temperature
    return _normal(z.flatten()).reshape(z.shape)


def _scaled(logits, temperature, vocabulary):
    return logits.double()[..., :vocabulary] / temperature


_LOG_PROBS = Code(
    "2.1",
    "log_probs",
    ("logits", "temperature", "vocabulary"),
    (
        Test("one position, T = 1", 1, _unpadded(7), lambda z, t, v: (v,)),
        Test(
            "a temperature",
            1,
            _unpadded(7, temperatures=(0.5, 4.0)),
            lambda z, t, v: (v,),
        ),
        Test(
            "several positions",
            1,
            _unpadded(3, 7, temperatures=(2.0,)),
            lambda z, t, v: (len(z), v),
        ),
        Test("padded columns", 1, _padded, lambda z, t, v: (len(z), v)),
        Test("very large logits", 1, _large, lambda z, t, v: (len(z), v)),
    ),
    _log_probs,
    (
        Bug(
            "padding in the sum",
            "columns beyond the vocabulary take a share of the probability.",
            lambda z, t, v: _normal(z.double() / t)[..., :v],
        ),
        Bug(
            "padding set to 0",
            "0 is a logit like any other: e^0 = 1 takes its share.",
            _zeroed,
            "linkedin/Liger-Kernel and arcee-ai/DistillKit#37, which fill up the "
            "smaller side with zeros",
        ),
        Bug(
            "the last columns kept",
            "the real tokens come first, the padding behind them.",
            lambda z, t, v: _normal(z.double()[..., -v:] / t),
        ),
        Bug(
            "temperature left out",
            "it is the distribution at T = 1.",
            lambda z, t, v: _log_probs(z, 1, v),
        ),
        Bug(
            "multiplied by the temperature",
            "a higher temperature must make the distribution flatter.",
            lambda z, t, v: _log_probs(z, 1 / t, v),
        ),
        Bug(
            "temperature after the softmax",
            "the values no longer belong to probabilities that sum to 1.",
            lambda z, t, v: _log_probs(z, 1, v) / t,
        ),
        Bug(
            "over the wrong dimension",
            "each position has a distribution of its own, over its tokens.",
            lambda z, t, v: _normal(_scaled(z, t, v), 0),
            "Lackel/DPN#1 and perone/euclidesdb#2",
        ),
        Bug(
            "one sum for all positions",
            "the probabilities of all positions together sum to 1, not those of each.",
            _one_sum,
        ),
        Bug(
            "no logarithm",
            "these are probabilities, not log-probabilities.",
            lambda z, t, v: _log_probs(z, t, v).to(z.dtype).exp(),  # 0 where theirs is
        ),
        Bug(
            "bits",
            "the course counts in nats.",
            lambda z, t, v: _log_probs(z, t, v) / math.log(2),
        ),
        Bug("not normalised", "these are scaled logits.", _scaled),
        Bug(
            "only the maximum subtracted",
            "the maximum keeps exp in range; the sum has to go as well.",
            lambda z, t, v: _scaled(z, t, v) - _scaled(z, t, v).amax(-1, keepdim=True),
        ),
    ),
)


# --- 2.2: what a view says of its own answer ---


def _view(rng, prompts, answers, left=False, dtype="float64"):
    """Random logits and ids for rows of these lengths, padded on one side."""
    import torch

    width = max(p + a for p, a in zip(prompts, answers, strict=True))
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        begin = p + (width - p - a if left else 0)
        mask[row, begin : begin + a] = True
    ids = torch.tensor([[rng.randrange(6) for _ in range(width)] for _ in prompts])
    return _logits(rng, len(prompts), width, 6, dtype=dtype), ids, mask


def _one_row(rng):
    for dtype in ("float64", "float32"):
        yield _view(rng, [rng.randint(3, 5)], [4], dtype=dtype)


def _rows(rng):
    yield _view(rng, [3, 5, 4], [5, 2, 3])
    yield _view(rng, [4, 6], [5, 2], left=True)


def _of(change=_normal, rows=1, ids=0, order=None):
    """The value of the token `ids` before each answer token, from `rows` before it."""

    def compute(logits, input_ids, mask):
        z = change(logits.double())
        chosen, tokens = z.roll(rows, 1), input_ids.roll(ids, 1)
        if order:
            chosen, tokens, mask = (order(x) for x in (chosen, tokens, mask))
        return chosen[mask].gather(-1, tokens[mask][:, None])[:, 0]

    return compute


def _favourite(logits, input_ids, mask):
    return _normal(logits.double()).amax(-1)[:, :-1][mask[:, 1:]]


_ANSWER = Code(
    "2.2",
    "answer_log_probs",
    ("logits", "input_ids", "completion_mask"),
    (
        Test("one row", 1, _one_row, lambda z, ids, mask: (int(mask.sum()),)),
        Test("several rows", 3, _rows, lambda z, ids, mask: (int(mask.sum()),)),
    ),
    _of(),
    (
        Bug(
            "not shifted",
            "what a model says at a position is about the token after it.",
            _of(rows=0),
            "arcee-ai/DistillKit and MakazhanAlpamys/Soup#682",
        ),
        Bug(
            "shifted twice",
            "the logits come from two positions before each token.",
            _of(rows=2),
            "linkedin/fmchisel#23, where the teacher's logits were shifted again",
        ),
        Bug(
            "shifted the wrong way",
            "the logits come from behind the token that they should predict.",
            _of(rows=-1),
            "huggingface/trl#1172, as a reader's question",
        ),
        Bug(
            "the token before",
            "the rows are right, but they are asked about the wrong token.",
            _of(ids=1),
        ),
        Bug(
            "the favourite's log-probability",
            "it is that of the likeliest token, not of the answer's.",
            _favourite,
        ),
        Bug("not normalised", "these are logits.", _of(lambda z: z)),
        Bug(
            "no logarithm",
            "these are probabilities, not log-probabilities.",
            _of(lambda z: _normal(z).exp()),
        ),
        Bug(
            "over the wrong dimension",
            "the probabilities of one position's tokens sum to 1.",
            _of(lambda z: _normal(z, 1)),
        ),
        Bug(
            "column by column",
            "row_ids, and every other selection, go row by row.",
            _of(order=lambda x: x.transpose(0, 1)),
        ),
        Bug(
            "negated",
            "this is a loss. A log-probability is at most 0.",
            _of(lambda z: -_normal(z)),
        ),
    ),
)


# --- 2.3: which tokens gain when the temperature rises ---


def _gap(logits, temperature, given=None):
    """E_p[z] - z_v with p at the given temperature."""
    z = logits.double()
    p = _normal(z / (given or temperature)).exp()
    return (p * z).sum(-1, keepdim=True) - z, p


def _apart(temperatures, *shape):
    """Logits none of which is near a mean: there, digits would cancel."""

    def cases(rng):
        for temperature in temperatures:
            while True:
                z = _logits(rng, *shape)
                if min(_gap(z, t)[0].abs().min() for t in (temperature, 1)) > 0.05:
                    break
            yield z, temperature

    return cases


def _slope(power=2, given=None, change=lambda gap, p, z: gap):
    def compute(logits, temperature):
        gap, p = _gap(logits, temperature, given)
        return change(gap, p, logits.double()) / temperature**power

    return compute


def _as_logits(logits, temperature):
    return tuple(logits.shape)


_SLOPE = Code(
    "2.3",
    "log_prob_slope",
    ("logits", "temperature"),
    (
        Test("T = 1", 1, _apart((1.0, 1.0), 6), _as_logits),
        Test("other temperatures", 2, _apart((0.5, 2.0, 3.0), 6), _as_logits),
        Test("several positions", 1, _apart((2.0,), 3, 6), _as_logits),
    ),
    _slope(),
    (
        Bug(
            "sign",
            "by this sign the favourite would gain from a higher temperature.",
            _slope(change=lambda gap, p, z: -gap),
        ),
        Bug(
            "plain average",
            "every token counts with its probability. All count alike only where T is "
            "very large.",
            _slope(change=lambda gap, p, z: z.mean(-1, keepdim=True) - z),
        ),
        Bug(
            "the favourite for the average",
            "the favourite's logit is the average only where T is near 0.",
            _slope(change=lambda gap, p, z: z.amax(-1, keepdim=True) - z),
        ),
        Bug(
            "average left out",
            "the log-sum-exp depends on T as well.",
            _slope(change=lambda gap, p, z: -z),
        ),
        Bug(
            "probabilities at T = 1",
            "the average is taken under the distribution at this T.",
            _slope(given=1),
        ),
        Bug(
            "1/T for 1/T^2",
            "the derivative of z / T has T squared below it.",
            _slope(power=1),
        ),
        Bug(
            "T^3",
            "that is the power for the entropy's slope, a variance.",
            _slope(power=3),
        ),
        Bug(
            "with respect to 1/T",
            "this is the slope as 1/T rises, not as T rises.",
            _slope(power=0, change=lambda gap, p, z: -gap),
        ),
        Bug("T^2 left out", "z / T was differentiated as if it were z T.", _slope(0)),
        Bug(
            "slope of the probability",
            "this is the slope of p, not that of log p.",
            _slope(change=lambda gap, p, z: p * gap),
        ),
    ),
)


# --- 2.4: the entropy of a vocabulary in parts ---


def _parts(level, *widths):
    """(log-sum-exps, mean logits) [K, N] of a vocabulary cut into K parts."""

    def cases(rng):
        import torch

        for _ in range(2):
            sums, means = [], []
            for width in widths:
                z = _logits(rng, 3, width) + level + rng.uniform(-1, 1)
                sums.append(z.logsumexp(-1))
                means.append((z.softmax(-1) * z).sum(-1))
            yield torch.stack(sums), torch.stack(means)

    return cases


def _entropy(log_sums, means, weights=None, base=None):
    total = log_sums.logsumexp(0) if base is None else base(log_sums)
    share = (log_sums - log_sums.logsumexp(0)).exp() if weights is None else weights
    return total - (share * means).sum(0)


def _shares(log_sums):
    return (log_sums - log_sums.logsumexp(0)).exp()


def _without_choice(log_sums, means):
    return (_shares(log_sums) * (log_sums - means)).sum(0)


_ENTROPY = Code(
    "2.4",
    "entropy_of_parts",
    ("log_sums", "means"),
    (
        Test("two parts", 2, _parts(0.0, 5, 5), lambda s, m: (3,)),
        Test("parts of different size", 1, _parts(1.0, 3, 8, 5), lambda s, m: (3,)),
        Test("very large logits", 1, _parts(1000.0, 6, 4), lambda s, m: (3,)),
    ),
    _entropy,
    (
        Bug(
            "the choice of the part left out",
            "it averages the parts' entropies. Which part the token is in is uncertain "
            "as well.",
            _without_choice,
        ),
        Bug(
            "entropies added",
            "a token lies in one part, so the parts' entropies do not add up.",
            lambda s, m: (s - m).sum(0),
        ),
        Bug(
            "parts weighted alike",
            "a part counts with its share of the probability.",
            lambda s, m: _entropy(s, m, weights=1 / len(s)),
        ),
        Bug(
            "log-sum-exps added",
            "sums add up, their logarithms do not.",
            lambda s, m: _entropy(s, m, base=lambda s: s.sum(0)),
        ),
        Bug(
            "the largest log-sum-exp for all",
            "the smaller parts are in the sum as well.",
            lambda s, m: _entropy(s, m, base=lambda s: s.amax(0)),
        ),
        Bug(
            "shares from the means",
            "a part's share comes from its sum, not from its average logit.",
            lambda s, m: _entropy(s, m, weights=m.softmax(0)),
        ),
        Bug(
            "average logit left out",
            "this is the log-sum-exp of the whole.",
            lambda s, m: s.logsumexp(0),
        ),
        Bug(
            "only the choice of the part",
            "which token it is within the part is uncertain as well.",
            lambda s, m: -(_shares(s) * _shares(s).log()).sum(0),
        ),
        Bug("sign", "an entropy is never negative.", lambda s, m: -_entropy(s, m)),
        Bug(
            "bits",
            "the course counts in nats.",
            lambda s, m: _entropy(s, m) / math.log(2),
        ),
    ),
)


# --- 2.5: predictions ---

_PADDED, _COLUMNS, _LEVEL = 151_936 - 151_669, 151_936, 2.0
_SURE, _OTHERS = 0.8, 1000


def _nats():
    rest = 1 - _SURE
    return -_SURE * math.log(_SURE) - rest * math.log(rest / _OTHERS)


def _five():
    return {
        "odds": 1000 ** (1 / 3),
        "padded_share": _PADDED / (_PADDED + math.exp(_LEVEL)),
        "bf16_error": 2.0 ** (4 - 7) / 2,  # 7 bits behind the leading 1; 16 is 2^4
        "half_limit": math.log(65504),
        "tokens": math.exp(_nats()),
    }


_PREDICTION = Predict(
    "2.5",
    "five_numbers",
    _five,
    {
        "odds": (
            Bug("divided by T", "T divides logits, not odds.", lambda: 1000 / 3),
            Bug("multiplied by T", "A higher T brings them nearer.", lambda: 3000),
            Bug("unchanged", "Only the order stays.", lambda: 1000),
            Bug("to the power of T", "That is T = 1/3.", lambda: 1e9),
        ),
        "padded_share": (
            Bug(
                "share of the columns",
                "Columns do not count alike: each counts with e to its logit, here 1.",
                lambda: _PADDED / _COLUMNS,
            ),
            Bug(
                "one column only",
                "There are 267 of them.",
                lambda: 1 / (1 + math.exp(_LEVEL)),
            ),
            Bug(
                "the real tokens' share",
                "That is what is left for the real tokens.",
                lambda: 1 - _five()["padded_share"],
            ),
        ),
        "bf16_error": (
            Bug(
                "relative error",
                "2^-8 is the relative error; a logit of 16 to 32 multiplies it.",
                lambda: 2.0**-8,
            ),
            Bug("spacing", "A number lies at most half a step away.", lambda: 0.125),
            Bug(
                "float16",
                "That is float16, which has three more bits here.",
                lambda: 2.0 ** (4 - 10) / 2,
            ),
        ),
        "half_limit": (
            Bug("float32", "That is float32's limit.", lambda: math.log(3.4028e38)),
            Bug("float64", "That is float64's limit.", lambda: math.log(1.797e308)),
            Bug("the number itself", "e to that must still fit.", lambda: 65504),
        ),
        "tokens": (
            Bug("tokens that can occur", "Rare ones count for less.", lambda: 1001),
            Bug("nats for tokens", "That is H; e^H was asked for.", _nats),
            Bug("two for e", "H is in nats, so the base is e.", lambda: 2 ** _nats()),
            Bug("one over the largest", "The others count, too.", lambda: 1 / _SURE),
        ),
    },
)

QUESTIONS = (
    _LOG_PROBS,
    _ANSWER,
    _SLOPE,
    _ENTROPY,
    _PREDICTION,
    Choice("2.6", "two_distributions", "abcde"),
)
