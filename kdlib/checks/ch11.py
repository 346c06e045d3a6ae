"""Chapter 11, "Teachers in a box": sparse targets, their gradient, and calibration."""

from __future__ import annotations

from math import log

from kdlib.checks.frame import Bug, Choice, Code, Predict, Test

__all__: list[str] = []


def __dir__() -> list[str]:
    return __all__


def _generator(rng):
    import torch

    return torch.Generator().manual_seed(rng.randrange(10**6))


def _logits(rng, *shape):
    import torch

    return 1.5 * torch.randn(shape, generator=_generator(rng), dtype=torch.float64)


def _ids(rng, vocab, k):
    import torch

    return torch.tensor(rng.sample(range(vocab), k))


# --- 11.1: three parts of one KL ---


def _kept_of(*sizes):
    def cases(rng):
        for vocab, k in sizes:
            p_t, p_s = (_logits(rng, vocab).softmax(-1) for _ in range(2))
            yield p_t, p_s, _ids(rng, vocab, k)

    return cases


def _parts(
    weight=lambda m_t, m_s: m_t,
    tail_weight=None,
    conditional=True,
    halves=2,
    base=1.0,
):
    def compute(p_t, p_s, kept):
        import torch

        inside = torch.zeros(len(p_t), dtype=torch.bool)
        inside[kept] = True
        m_t, m_s = p_t[inside].sum(), p_s[inside].sum()
        between = m_t * (m_t / m_s).log()
        if halves == 2:
            between = between + (1 - m_t) * ((1 - m_t) / (1 - m_s)).log()
        found = [between]
        for group, w_t, w_s in ((inside, m_t, m_s), (~inside, 1 - m_t, 1 - m_s)):
            t, s = p_t[group], p_s[group]
            value = (t * (t / s).log()).sum()
            if conditional:
                t, s = t / w_t, s / w_s
                value = weight(w_t, w_s) * (t * (t / s).log()).sum()
            found.append(value)
        if tail_weight:
            found[2] = found[2] / (1 - m_t) * m_t
        return torch.stack(found) / base

    return compute


def _swapped(p_t, p_s, kept):
    return _parts()(p_s, p_t, kept)


def _other_order(*args):
    return _parts()(*args)[[0, 2, 1]]


_PARTS = Code(
    "11.1",
    "three_parts",
    ("p_t", "p_s", "kept"),
    (
        Test("two of four", 2, _kept_of((4, 2)), lambda *args: (3,)),
        Test("others", 3, _kept_of((5, 2), (9, 6), (7, 3)), lambda *args: (3,)),
    ),
    _parts(),
    (
        Bug(
            "weights forgotten",
            "a conditional KL counts as often as the teacher is in its group.",
            _parts(weight=lambda m_t, m_s: 1.0),
        ),
        Bug(
            "student's mass as weight",
            "the sum runs over the teacher's probabilities, and so do the weights.",
            _parts(weight=lambda m_t, m_s: m_s),
        ),
        Bug(
            "half of between",
            "the mass outside of the kept tokens is the other event.",
            _parts(halves=1),
        ),
        Bug(
            "not conditional",
            "kept and tail are cut sums. They contain between once more.",
            _parts(conditional=False),
        ),
        Bug(
            "tail weighed like kept",
            "the tail's weight is the teacher's mass in the tail.",
            _parts(tail_weight=True),
        ),
        Bug(
            "the other direction",
            "these are the parts of KL(student || teacher).",
            _swapped,
        ),
        Bug(
            "kept and tail exchanged", "the order is between, kept, tail.", _other_order
        ),
        Bug(
            "bits for nats", "it uses the logarithm to the base 2.", _parts(base=log(2))
        ),
    ),
    zero=1e-6,
)


# --- 11.2: the gradient of a cut sum ---


def _cut(*sizes):
    def cases(rng):
        for vocab, k in sizes:
            teacher = _logits(rng, vocab).log_softmax(-1)
            kept = teacher.topk(k).indices
            kept = kept[_ids(rng, k, k)]
            yield _logits(rng, vocab), kept, teacher[kept]

    return cases


def _gradient(
    mass=lambda w: w.sum(), target=lambda w: w, others=True, scale=lambda v, k: 1.0
):
    def compute(student_logits, indices, log_probs):
        import torch

        p_s = student_logits.softmax(-1)
        w = torch.zeros_like(p_s).scatter(0, indices, log_probs.exp())
        found = mass(w) * p_s - target(w)
        if not others:
            found = found * (w > 0)
        return found * scale(len(p_s), len(indices))

    return compute


def _on_kept(student_logits, indices, log_probs):
    import torch

    found = student_logits[indices].softmax(-1) - log_probs.softmax(-1)
    return torch.zeros_like(student_logits).scatter(0, indices, found)


def _by_probability(student_logits, indices, log_probs):
    import torch

    p_s = student_logits.softmax(-1)
    return torch.zeros_like(p_s).scatter(0, indices, -log_probs.exp()) / p_s


_CUT = Code(
    "11.2",
    "cut_gradient",
    ("student_logits", "indices", "log_probs"),
    (
        Test("all tokens kept", 1, _cut((4, 4)), lambda z, *_: z.shape),
        Test(
            "some tokens kept", 4, _cut((5, 2), (8, 3), (6, 1)), lambda z, *_: z.shape
        ),
    ),
    _gradient(),
    (
        Bug(
            "mass taken for one",
            "that is the gradient of the whole KL with the tail set to zero in it. "
            "Its entries do not sum to zero.",
            _gradient(mass=lambda w: 1.0),
        ),
        Bug(
            "teacher renormalised",
            "it divides the teacher by its mass. That is a loss without a cut.",
            _gradient(mass=lambda w: 1.0, target=lambda w: w / w.sum()),
        ),
        Bug(
            "both renormalised",
            "the student is normalised over its whole vocabulary.",
            _on_kept,
        ),
        Bug(
            "others left alone",
            "a token that is not kept stands in the student's softmax.",
            _gradient(others=False),
        ),
        Bug("sign", "it climbs.", _gradient(scale=lambda v, k: -1.0)),
        Bug(
            "by probabilities",
            "it differentiates by p_s, not by the logits.",
            _by_probability,
        ),
        Bug(
            "mean over the vocabulary",
            "the loss is a sum over tokens of the vocabulary, not a mean.",
            _gradient(scale=lambda v, k: 1 / v),
        ),
        Bug(
            "mean over the kept",
            "the loss is a sum over the kept tokens, not a mean.",
            _gradient(scale=lambda v, k: 1 / k),
        ),
    ),
    zero=1e-6,
)


# --- 11.3: a loss from draws ---


def _draws(distinct, *sizes):
    def cases(rng):
        import torch

        for n_tokens, vocab, n in sizes:
            teacher = _logits(rng, n_tokens, vocab).log_softmax(-1)
            if distinct:
                drawn = torch.stack([_ids(rng, vocab, n) for _ in range(n_tokens)])
            else:
                drawn = torch.multinomial(
                    teacher.exp(), n, replacement=True, generator=_generator(rng)
                )
                drawn[:, 1] = drawn[:, 0]  # at least one repeat in every row
            yield _logits(rng, n_tokens, vocab), drawn, teacher.gather(-1, drawn)

    return cases


def _once(drawn):
    """1 where an id stands for the first time in its row."""
    import torch

    same = drawn[:, :, None] == drawn[:, None, :]
    before = torch.ones(same.shape[1:], dtype=torch.bool).tril(-1)
    return (~(same & before).any(-1)).double()


def _weighted(weights):
    """The loss with weights(drawn, p_t), as a sum over the draws."""

    def compute(student_logits, drawn, log_probs):
        log_s = student_logits.log_softmax(-1).gather(-1, drawn)
        return -(weights(drawn, log_probs.exp()) * log_s).sum(-1)

    return compute


def _mean(drawn, p):
    return 1 / drawn.shape[1] + 0 * p


def _on_draws(student_logits, drawn, log_probs):
    return -student_logits.gather(-1, drawn).log_softmax(-1).mean(-1)


def _minus_entropy(student_logits, drawn, log_probs):
    return _weighted(_mean)(student_logits, drawn, log_probs) + log_probs.mean(-1)


_DRAWN = Code(
    "11.3",
    "drawn_loss",
    ("student_logits", "drawn", "log_probs"),
    (
        Test(
            "all draws different",
            2,
            _draws(True, (2, 5, 3)),
            lambda z, *_: z.shape[:1],
        ),
        Test(
            "draws with repeats",
            3,
            _draws(False, (2, 5, 4), (3, 4, 6)),
            lambda z, *_: z.shape[:1],
        ),
    ),
    _weighted(_mean),
    (
        Bug(
            "teacher counted twice",
            "likely tokens are drawn more often already. Weighted by p_t as well, the "
            "expectation is that of p_t squared.",
            _weighted(lambda drawn, p: p / drawn.shape[1]),
        ),
        Bug(
            "draws weighted and renormalised",
            "likely tokens are drawn more often already.",
            _weighted(lambda drawn, p: p / p.sum(-1, keepdim=True)),
        ),
        Bug(
            "repeats dropped",
            "how often a token was drawn is all that is known of its weight.",
            _weighted(lambda d, p: _once(d) / _once(d).sum(-1, keepdim=True)),
        ),
        Bug(
            "renormalised on what was drawn",
            "it is top k with another choice of tokens, and biased like it.",
            _weighted(lambda d, p: _once(d) * p / (_once(d) * p).sum(-1, keepdim=True)),
        ),
        Bug(
            "cut sum of what was drawn",
            "a sum of p_t over the tokens that were drawn leaves out the others.",
            _weighted(lambda d, p: _once(d) * p),
        ),
        Bug(
            "student's softmax on the draws",
            "the student is normalised over its whole vocabulary.",
            _on_draws,
        ),
        Bug(
            "sum for mean",
            "twice as many draws would make twice the loss.",
            _weighted(lambda d, p: 1 + 0 * p),
        ),
        Bug(
            "KL for cross-entropy",
            "the teacher's own part is in it.",
            _minus_entropy,
        ),
        Bug(
            "sign",
            "a cross-entropy is not negative.",
            _weighted(lambda d, p: -_mean(d, p)),
        ),
    ),
)


# --- 11.4: expected calibration error ---


def _tokens(rng, n, certain=0, soft=False):
    import torch

    confidence = torch.rand(n, generator=_generator(rng), dtype=torch.float64)
    confidence = 0.05 + 0.94 * confidence
    hits = torch.rand(n, generator=_generator(rng), dtype=torch.float64)
    if not soft:
        hits = (hits < 0.7 * confidence).double()
    confidence[:certain] = 1.0
    hits[:certain] = 0.0
    return confidence, hits


def _one_bin(rng):
    yield *_tokens(rng, 12), 1
    confidence, hits = _tokens(rng, 9, soft=True)
    yield 0.2 * confidence, hits, 1


def _many_bins(rng):
    for n, bins, soft in ((7, 10, True), (20, 4, False), (30, 5, False)):
        yield *_tokens(rng, n, soft=soft), bins


def _certain(rng):
    for n, bins in ((8, 12), (16, 5)):
        yield *_tokens(rng, n, certain=3), bins


def _of_bins(combine, places=None, gap=None):
    def compute(confidence, hits, bins):
        place = (confidence * bins).long().clamp(max=bins - 1)
        if places:
            place = places(confidence, bins)
        found = []
        for b in range(bins):
            mine = place == b
            if mine.any():
                c, h = confidence[mine].mean(), hits[mine].mean()
                if gap == "middle":
                    c = (b + 0.5) / bins
                found.append((int(mine.sum()), float(c - h)))
        return combine(found, len(confidence))

    return compute


def _average(found, n):
    return sum(m * abs(gap) for m, gap in found) / n


def _by_rank(confidence, bins):
    return confidence.argsort().argsort() * bins // len(confidence)


_ECE = Code(
    "11.4",
    "calibration_error",
    ("confidence", "hits", "bins"),
    (
        Test("one bin", 1, _one_bin),
        Test("several bins, some empty", 2, _many_bins),
        Test("tokens with confidence 1", 1, _certain),
    ),
    _of_bins(_average),
    (
        Bug(
            "bins weighed alike",
            "a bin with one token counts as much as one with a thousand.",
            _of_bins(lambda f, n: sum(abs(g) for _, g in f) / len(f)),
        ),
        Bug(
            "empty bins counted",
            "the gaps are divided by the number of bins, the empty ones as well.",
            lambda c, h, b: _of_bins(lambda f, n: sum(abs(g) for _, g in f) / b)(
                c, h, b
            ),
        ),
        Bug(
            "gaps cancel",
            "too sure here and too modest there come out as perfect.",
            _of_bins(lambda f, n: sum(m * g for m, g in f) / n),
        ),
        Bug(
            "gaps cancel",
            "too sure here and too modest there come out as perfect.",
            _of_bins(lambda f, n: abs(sum(m * g for m, g in f)) / n),
        ),
        Bug(
            "token by token",
            "a single token is always right or wrong, and never 70 % right.",
            lambda c, h, b: float((c - h).abs().mean()),
        ),
        Bug(
            "largest gap",
            "that is the maximum calibration error.",
            _of_bins(lambda f, n: max(abs(g) for _, g in f)),
        ),
        Bug(
            "certain tokens lost",
            "tokens with confidence 1 fall out of the last bin.",
            _of_bins(_average, places=lambda c, b: (c * b).long()),
        ),
        Bug(
            "bins of equal size",
            "the bins have equal width, not equally many tokens.",
            _of_bins(_average, places=_by_rank),
        ),
        Bug(
            "middle of the bin",
            "tokens need not lie at the middle of their bin.",
            _of_bins(_average, gap="middle"),
        ),
        Bug(
            "squared",
            "it is the root or mean of squares. The ECE takes absolute values.",
            _of_bins(lambda f, n: sum(m * g * g for m, g in f) / n),
        ),
        Bug(
            "squared",
            "it is the root or mean of squares. The ECE takes absolute values.",
            _of_bins(lambda f, n: (sum(m * g * g for m, g in f) / n) ** 0.5),
        ),
    ),
    zero=1e-6,
)


# --- 11.5: predictions ---

_NUMBERS = {
    "entries": (64, 16, 128, 256),
    "billions word": ((2, "Two"), (20, "Twenty"), (30, "Thirty"), (50, "Fifty")),
    "draws now goal": ((4, 0.3, 0.1), (4, 0.2, 0.05), (8, 0.3, 0.1), (4, 0.5, 0.1)),
}


def _forecasts(n):
    return {
        "bytes": n.entries * 6 + 4,
        "disk": n.billions * 1e9 * (n.entries * 6 + 4) / 1e12,
        "sure": 0.35 / 0.5,
        "below": 0.5 * log(2),
        "draws": n.draws * (n.now / n.goal) ** 2,
    }


_PREDICTION = Predict(
    "11.5",
    "forecasts",
    _forecasts,
    {
        "bytes": (
            Bug(
                "one entry",
                "That is one entry, and there are {entries}.",
                lambda n: 6.0,
            ),
            Bug("bits", "That is in bits.", lambda n: 8 * (n.entries * 6 + 4)),
            Bug(
                "whole vocabulary", "That is every token's logit.", lambda n: 303_872.0
            ),
        ),
        "disk": (
            Bug(
                "gigabytes",
                "A terabyte is a thousand gigabytes.",
                lambda n: n.billions * (n.entries * 6 + 4),
            ),
            Bug(
                "one billion",
                "There are {billions} billion tokens.",
                lambda n: (n.entries * 6 + 4) / 1000,
            ),
        ),
        "sure": (
            Bug("as the teacher", "A cut sum does not stop there.", lambda n: 0.35),
            Bug("times the mass", "It divides by the mass.", lambda n: 0.175),
        ),
        "below": (
            Bug("log of the mass", "It is weighted by the mass.", lambda n: log(2)),
            Bug("favourite alone", "Both kept tokens are in the sum.", lambda n: 0.125),
        ),
        "draws": (
            Bug(
                "deviation as 1/n",
                "The variance falls as 1/n.",
                lambda n: n.draws * n.now / n.goal,
            ),
            Bug(
                "factor alone",
                "That many times the {draws} draws.",
                lambda n: (n.now / n.goal) ** 2,
            ),
        ),
    },
    _NUMBERS,
    (
        "{entries} entries a token",
        "{word} billion tokens of that",
        "A loss from {draws} draws",
        "deviation of {now:g}.",
        "bring it to {goal:g}?",
    ),
)

QUESTIONS = (
    _PARTS,
    _CUT,
    _DRAWN,
    _ECE,
    _PREDICTION,
    Choice("11.6", "what_the_box_hides", "abcde"),
)
