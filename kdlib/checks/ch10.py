"""Chapter 10, "The GPU loop": the split of a step, scaler and clipping, a capped head,
padding, forecasts, explanations."""

from __future__ import annotations

import math

from kdlib.checks.frame import Bug, Choice, Code, Predict, Test

__all__: list[str] = []


def __dir__() -> list[str]:
    return __all__


def _generator(rng):
    import torch

    return torch.Generator().manual_seed(rng.randrange(10**6))


def _normal(rng, *shape):
    import torch

    return torch.randn(shape, generator=_generator(rng), dtype=torch.float64)


# --- 10.1: what a process hands in ---


def _step(rng, ranks, parts, width=3):
    """Sums and counts; no two counts are equal."""
    import torch

    counts = torch.tensor(rng.sample(range(2, 40), ranks * parts)).reshape(ranks, parts)
    # Per-token gradients are of one size, so sums are of the size of their counts.
    # float32: whoever divides counts by counts has that, and is right.
    size = 1 + _normal(rng, ranks, parts, width).abs()
    return (counts[..., None] * size).float(), counts


def _one_of_each(rng):
    yield _step(rng, 1, 1)


def _micro_batches(rng):
    for parts in (2, 3):
        yield _step(rng, 1, parts)


def _processes(rng):
    for ranks, parts in ((2, 1), (2, 3), (4, 2)):
        yield _step(rng, ranks, parts)


def _handed_in(sums, tokens):
    return len(sums) * sums.sum(1) / tokens.sum()


_HAND_IN = Code(
    "10.1",
    "hand_in",
    ("sums", "tokens"),
    (
        Test("one process, one batch", 1, _one_of_each, lambda s, t: s[:, 0].shape),
        Test("micro-batches", 2, _micro_batches, lambda s, t: s[:, 0].shape),
        Test("several processes", 3, _processes, lambda s, t: s[:, 0].shape),
    ),
    _handed_in,
    (
        Bug(
            "mean of means",
            "each micro-batch is divided by its own count. A token in a short one then "
            "counts more.",
            lambda s, t: (s / t[..., None]).mean(1),
            "huggingface/trl#4719",
        ),
        Bug(
            "sum of means",
            "each micro-batch is divided by its own count, and the means are added.",
            lambda s, t: (s / t[..., None]).sum(1),
            "MakazhanAlpamys/Soup#720",
        ),
        Bug(
            "own count",
            "each process divides by its own tokens. A token on a process with few "
            "then counts more.",
            lambda s, t: s.sum(1) / t.sum(1, keepdim=True),
            "huggingface/transformers#34242",
        ),
        Bug(
            "engine's average forgotten",
            "the engine divides by the number of processes once more.",
            lambda s, t: s.sum(1) / t.sum(),
            "verl-project/verl-SpeCo#29",
        ),
        Bug(
            "divided twice",
            "the count of the whole step is enough: the number of micro-batches is in "
            "it already.",
            lambda s, t: _handed_in(s, t) / s.shape[1],
            "unslothai/unsloth-zoo#1023",
        ),
        Bug(
            "no denominator",
            "it is the gradient of a sum, not of a mean.",
            lambda s, t: len(s) * s.sum(1),
        ),
        Bug(
            "first process's count",
            "the count of one process stands for all of them.",
            lambda s, t: s.sum(1) / t[0].sum(),
        ),
        Bug(
            "everything for everybody",
            "each process hands in its own share. The engine adds them up.",
            lambda s, t: (s.sum(1).sum(0) / t.sum()).expand(len(s), -1),
        ),
    ),
)


# --- 10.2: scaler, overflow, clipping ---


def _scaled(rng, length, overflow=False, parts=3, width=4):
    """Micro-batch gradients whose sum has a length, times a scale, in float32."""
    scale = 2.0 ** rng.randint(8, 14)
    wanted = _normal(rng, width)
    wanted = length * wanted / wanted.norm()
    drawn = min(1.0, length) * _normal(rng, parts, width)
    drawn = drawn + (wanted - drawn.sum(0)) / parts
    found = (scale * drawn).float()
    if overflow:
        found[rng.randrange(parts), rng.randrange(width)] = math.inf
    return found, scale, 1.5


def _short(rng):
    for length in (1e-5, 0.8, 1.2):  # the first one is short even with its scale
        yield _scaled(rng, length)


def _long(rng):
    for length in (3.0, 20.0):
        yield _scaled(rng, length)


def _overflowed(rng):
    for length in (0.8, 20.0):
        yield _scaled(rng, length, overflow=True)


def _clip(gradient, limit):
    return gradient * min(1.0, limit / float(gradient.norm()))


def _for_adam(scaled, scale, limit, clip=_clip):
    import torch

    gradient = scaled.double().sum(0)
    if not torch.isfinite(gradient).all():
        return torch.zeros(scaled.shape[1])
    return clip(gradient / scale, limit)


def _each_clipped(scaled, scale, limit):
    import torch

    if not torch.isfinite(scaled).all():
        return _for_adam(scaled, scale, limit)
    return sum(_for_adam(row[None], scale, limit) for row in scaled)


def _elsewhere(kept):
    """A bug that shows where something overflowed: what is kept of it."""
    import torch

    def compute(scaled, scale, limit):
        fit = torch.isfinite(scaled.double())
        return _for_adam(kept(scaled.double(), fit), scale, limit)

    return compute


_FOR_ADAM = Code(
    "10.2",
    "for_the_optimiser",
    ("scaled", "scale", "limit"),
    (
        Test("a short gradient", 2, _short, lambda s, *_: s.shape[1:]),
        Test("a long gradient", 2, _long, lambda s, *_: s.shape[1:]),
        Test("an overflow", 1, _overflowed, lambda s, *_: s.shape[1:]),
    ),
    _for_adam,
    (
        Bug(
            "clipped before it is unscaled",
            "the limit is meant for the gradient itself, not for its scaled copy.",
            lambda s, scale, limit: _for_adam(s, 1.0, limit) / scale,
            "Lightning-AI/pytorch-lightning#9599",
        ),
        Bug(
            "not unscaled",
            "the scale is still in it.",
            lambda s, scale, limit: _for_adam(s, 1.0, limit),
        ),
        Bug(
            "each micro-batch clipped",
            "parts that would cancel are cut before they are added.",
            _each_clipped,
        ),
        Bug(
            "each number clipped",
            "it cuts every number by itself, which turns the gradient.",
            lambda s, scale, limit: _for_adam(
                s, scale, limit, clip=lambda g, n: g.clamp(-n, n)
            ),
        ),
        Bug(
            "always stretched to the limit",
            "a gradient that is short stays as it is.",
            lambda s, scale, limit: _for_adam(
                s, scale, limit, clip=lambda g, n: g * n / g.norm()
            ),
        ),
        Bug(
            "squared length",
            "the length is the root of the sum of squares.",
            lambda s, scale, limit: _for_adam(
                s,
                scale,
                limit,
                clip=lambda g, n: g * min(1.0, n / float(g.norm()) ** 2),
            ),
        ),
        Bug(
            "not clipped",
            "a gradient longer than the limit is shortened to it.",
            lambda s, scale, limit: _for_adam(s, scale, limit, clip=lambda g, n: g),
        ),
        Bug(
            "mean over micro-batches",
            "the micro-batches hold shares of one gradient already: they add up.",
            lambda s, scale, limit: _for_adam(s / len(s), scale, limit),
        ),
        Bug(
            "overflow set to zero",
            "one number that overflowed says that the others may be wrong as well.",
            _elsewhere(lambda s, fit: s.where(fit, 0.0)),
        ),
        Bug(
            "overflowing micro-batch left out",
            "without that micro-batch it is the gradient of other data. Leave the step "
            "out.",
            _elsewhere(lambda s, fit: s[fit.all(1)]),
        ),
    ),
)


# --- 10.3: the gradient through a soft cap ---


def _capped(rng, rows, vocab, cap):
    teacher = (2 * _normal(rng, rows, vocab)).softmax(-1)
    return 2 * _normal(rng, rows, vocab), teacher, 0.1 + _normal(rng, rows).abs(), cap


def _loose(rng):
    for rows, vocab in ((2, 3), (4, 6)):
        yield _capped(rng, rows, vocab, 50.0)


def _tight(rng):
    for rows, vocab, cap in ((2, 3, 2.0), (4, 6, 1.5), (3, 5, 3.0)):
        yield _capped(rng, rows, vocab, cap)


def _through_cap(slope=lambda t, cap: 1 - t**2, shaped=True, pull=None, weigh=None):
    def compute(raw, teacher, weights, cap):
        t = (raw / cap).tanh()
        student = ((cap * t) if shaped else raw).softmax(-1)
        w = (weigh(weights) if weigh else weights)[:, None]
        difference = pull(student, teacher) if pull else student - teacher
        return w * difference * slope(t, cap)

    return compute


def _reverse(student, teacher):
    a = student * (student / teacher).log()
    return a - student * a.sum(-1, keepdim=True)


_CAPPED = Code(
    "10.3",
    "through_the_cap",
    ("raw", "teacher", "weights", "cap"),
    (
        Test("a loose cap", 1, _loose, lambda raw, *_: raw.shape),
        Test("a tight cap", 3, _tight, lambda raw, *_: raw.shape),
    ),
    _through_cap(),
    (
        Bug(
            "cap ignored",
            "the student's distribution is that of the capped logits.",
            _through_cap(lambda t, cap: 1, shaped=False),
            "huggingface/trl#6629",
        ),
        Bug(
            "slope of the cap forgotten",
            "it is the gradient for the capped logits, not for the raw ones.",
            _through_cap(lambda t, cap: 1),
        ),
        Bug(
            "distribution of the raw logits",
            "the slope is there, and the distribution is that of raw logits.",
            _through_cap(shaped=False),
        ),
        Bug(
            "slope not squared",
            "the derivative of tanh is 1 - tanh^2.",
            _through_cap(lambda t, cap: 1 - t.abs()),
        ),
        Bug(
            "cap in the slope",
            "the factor cap and the factor 1 / cap inside cancel.",
            _through_cap(lambda t, cap: (1 - t**2) / cap),
        ),
        Bug(
            "cap in the slope",
            "the factor cap and the factor 1 / cap inside cancel.",
            _through_cap(lambda t, cap: (1 - t**2) * cap),
        ),
        Bug(
            "weights forgotten",
            "each token's gradient is multiplied by its weight.",
            _through_cap(weigh=lambda w: 0 * w + 1),
        ),
        Bug(
            "weights made a mean",
            "the weights are what they are: their sum need not be one.",
            _through_cap(weigh=lambda w: w / w.sum()),
        ),
        Bug(
            "wrong sign",
            "descent on it makes the student less likely to say what its teacher says.",
            _through_cap(pull=lambda p_s, p_t: p_t - p_s),
        ),
        Bug(
            "gradient of the reverse KL",
            "the loss is KL(teacher || student).",
            _through_cap(pull=_reverse),
        ),
    ),
)


# --- 10.4: padding ---


def _lengths(rng, n):
    import torch

    return torch.tensor([rng.randint(3, 90) for _ in range(n)])


def _one_batch(rng):
    for n in (3, 5):
        yield _lengths(rng, n), n, 1


def _without_windows(rng):
    for n, size in ((12, 4), (15, 3)):
        yield _lengths(rng, n), size, 1


def _with_windows(rng):
    for n, size, window in ((24, 3, 4), (40, 4, 5), (22, 4, 2)):
        yield _lengths(rng, n), size, window


def _batches(lengths, size, window, order=True):
    rows, found = lengths.tolist(), []
    for start in range(0, len(rows), size * window):
        part = rows[start : start + size * window]
        part = sorted(part) if order else part
        found += [part[i : i + size] for i in range(0, len(part), size)]
    return found


def _share(batches):
    real = sum(map(sum, batches))
    made = sum(max(batch) * len(batch) for batch in batches)
    return 1 - real / made


def _padding(lengths, size, window):
    return _share(_batches(lengths, size, window))


def _of_longest(lengths, size, window):
    return 1 - float(lengths.sum()) / (int(lengths.max()) * len(lengths))


def _mean_of_shares(lengths, size, window):
    found = [_share([batch]) for batch in _batches(lengths, size, window)]
    return sum(found) / len(found)


def _over_real(lengths, size, window):
    share = _padding(lengths, size, window)
    return share / (1 - share)


def _last_dropped(lengths, size, window):
    whole = [b for b in _batches(lengths, size, window) if len(b) == size]
    return _share(whole)


_PADDING = Code(
    "10.4",
    "padding_share",
    ("lengths", "size", "window"),
    (
        Test("one batch", 1, _one_batch),
        Test("windows of one batch", 1, _without_windows),
        Test("windows of several", 2, _with_windows),
    ),
    _padding,
    (
        Bug(
            "not sorted",
            "within a window rows are sorted by length before they are cut.",
            lambda n, size, window: _share(_batches(n, size, window, order=False)),
        ),
        Bug(
            "all sorted at once",
            "only rows of one window are sorted together.",
            lambda n, size, window: _share(_batches(n, size, len(n))),
        ),
        Bug(
            "padded to the longest of all",
            "a batch is as long as its own longest row.",
            _of_longest,
        ),
        Bug(
            "padded to the longest of the window",
            "a batch is as long as its own longest row.",
            lambda n, size, window: _share(_batches(n, size * window, 1)),
        ),
        Bug(
            "mean of the batches' shares",
            "a short batch has fewer tokens than a long one. Count over all of them.",
            _mean_of_shares,
        ),
        Bug(
            "share of the real tokens",
            "it is padding over real tokens, not over all that are computed.",
            _over_real,
        ),
        Bug(
            "share of real tokens",
            "it is what is not padding.",
            lambda *args: 1 - _padding(*args),
        ),
        Bug(
            "last batch dropped",
            "the last batch of a pass may be short. It is trained on as well.",
            _last_dropped,
        ),
        Bug(
            "a count",
            "it is the number of padded places, not their share.",
            lambda n, size, window: sum(
                max(b) * len(b) - sum(b) for b in _batches(n, size, window)
            ),
        ),
    ),
)


# --- 10.5: predictions ---

_NUMBERS = {
    "words": (128_256, 32_000, 50_257, 262_144),
    "billions": (3, 1, 7, 14),
    "tflops": (989, 125, 312, 2250),
}

_N = 4 * 2048


def _forecasts(n):
    return {
        "matrix": 4 * _N * n.words / 2**30,
        "adamw": 12 * n.billions * 1e9 / 2**30,
        "tokens_per_s": 0.4 * n.tflops * 1e12 / 6e9,
        "quarter": 16.0,
    }


_PREDICTION = Predict(
    "10.5",
    "forecasts",
    _forecasts,
    {
        "matrix": (
            Bug(
                "16 bits",
                "That is in bfloat16: float32 takes 4 bytes.",
                lambda n: 2 * _N * n.words / 2**30,
            ),
            Bug(
                "one row", "That is for one row.", lambda n: 4 * 2048 * n.words / 2**30
            ),
        ),
        "adamw": (
            Bug(
                "weights alone",
                "AdamW keeps two moments for each weight.",
                lambda n: 4 * n.billions * 1e9 / 2**30,
            ),
            Bug(
                "16 bits",
                "That is with 2 bytes a number.",
                lambda n: 6 * n.billions * 1e9 / 2**30,
            ),
        ),
        "tokens_per_s": (
            Bug(
                "forward pass alone",
                "Training needs a backward pass, which is twice a forward pass.",
                lambda n: 0.4 * n.tflops * 1e12 / 2e9,
            ),
            Bug(
                "at the peak",
                "That is at an MFU of one.",
                lambda n: n.tflops * 1e12 / 6e9,
            ),
        ),
        "quarter": (
            Bug(
                "first order",
                "A KL is of second order in the distance.",
                lambda n: 4.0,
            ),
            Bug("half of the order", "It is not the root.", lambda n: 2.0),
        ),
    },
    _NUMBERS,
    (
        "{words:,} words",
        "A student of {billions} billion parameters. Weights",
        "a card of {tflops} TFLOP/s",
    ),
)

QUESTIONS = (
    _HAND_IN,
    _FOR_ADAM,
    _CAPPED,
    _PADDING,
    _PREDICTION,
    Choice("10.6", "what_changes", "abcde"),
)
