"""Chapter 13, "Onto the phone": rounding, its gradient, drafts and what they save."""

from __future__ import annotations

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


def _distributions(rng, *shape):
    return (1.5 * _normal(rng, *shape)).softmax(-1)


# --- 13.1: asymmetric, one scale and zero point an output channel ---


def _both_signs(rng):
    for out, wide, bits in ((3, 7, 4), (5, 4, 3)):
        spread = 0.2 + 3 * _normal(rng, out, 1).abs()
        weight = _normal(rng, out, wide) + 0.4
        weight[:, 0], weight[:, 1] = weight[:, 0].abs(), -weight[:, 1].abs()
        yield spread * weight, bits


def _one_sign(rng):
    for out, wide, bits in ((3, 6, 4), (4, 5, 3)):
        spread = 0.2 + 3 * _normal(rng, out, 1).abs()
        yield spread * (1.3 + 0.5 * _normal(rng, out, wide).abs()), bits
        yield -spread * (1.3 + 0.5 * _normal(rng, out, wide).abs()), bits


def _read_back(
    dim=1,
    zero_in_range=True,
    levels=lambda b: 2**b - 1,
    whole_zero=True,
    nearest=True,
    back=lambda k, s, z: (k - z) * s,
    symmetric=False,
):
    def compute(weight, bits):
        if dim is None:
            low, high = weight.min(), weight.max()
        else:
            low, high = weight.amin(dim, keepdim=True), weight.amax(dim, keepdim=True)
        if zero_in_range:
            low, high = low.clamp(max=0), high.clamp(min=0)
        if symmetric:
            high = weight.abs().amax(1, keepdim=True)
            low = -high
        scale = (high - low) / levels(bits)
        zero = -low / scale
        zero = zero.round() if whole_zero else zero
        whole = weight / scale + zero
        whole = whole.round() if nearest else whole.floor()
        whole = whole.clamp(0, 2**bits - 1)
        return back(whole, scale, zero)

    return compute


def _matrix(weight, bits):
    return weight.shape


_ROUND = Code(
    "13.1",
    "read_back",
    ("weight", "bits"),
    (
        Test("weights of both signs", 2, _both_signs, _matrix),
        Test("rows of one sign", 3, _one_sign, _matrix),
    ),
    _read_back(),
    (
        Bug(
            "one scale for all",
            "it has one scale and one zero point for the whole matrix. A row with "
            "large weights then takes the steps away from the others.",
            _read_back(dim=None),
        ),
        Bug(
            "wrong axis",
            "the scale belongs to a column. Each output channel, a row of the weight "
            "[out, in], needs its own: only then can it be taken out of the product.",
            _read_back(dim=0),
        ),
        Bug(
            "zero not in the range",
            "where all weights of a row have one sign, zero lies outside of its range "
            "and the zero point outside of 0 to 2^b - 1.",
            _read_back(zero_in_range=False),
        ),
        Bug(
            "one step too many",
            "2^b whole numbers have 2^b - 1 steps between them.",
            _read_back(levels=lambda b: 2**b),
        ),
        Bug(
            "zero point not whole",
            "the zero point is stored as a whole number, so that the weight 0 is met "
            "exactly.",
            _read_back(whole_zero=False),
        ),
        Bug(
            "cut off, not rounded",
            "it rounds down. The error then is up to a whole step, and has a bias.",
            _read_back(nearest=False),
        ),
        Bug(
            "zero point left in",
            "the zero point was added before rounding and is not taken off again.",
            _read_back(back=lambda k, s, z: k * s),
        ),
        Bug(
            "zero point taken off after scaling",
            "the zero point is a whole number of steps. Take it off before you "
            "multiply by the scale.",
            _read_back(back=lambda k, s, z: k * s - z),
        ),
        Bug(
            "symmetric",
            "its range is -max |w| to max |w|. Half of it is empty where a row has one "
            "sign.",
            _read_back(symmetric=True),
        ),
    ),
    zero=1e-9,
)


# --- 13.2: the gradient behind a quantised weight ---


def _inside(rng):
    for out, wide, bits in ((2, 5, 4), (3, 3, 3)):
        weight = _normal(rng, out, wide)
        scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        yield weight, _normal(rng, out, wide), scale, bits


def _outside(rng):
    for out, wide, bits in ((2, 9, 4), (4, 8, 3)):
        weight = 20 * _normal(rng, out, wide)
        scale = 10 / 2 ** (bits - 1) * (0.7 + _normal(rng, out, 1).abs())
        # Both ends of the range, where the two sides differ by one step.
        edge = 2 ** (bits - 1)
        weight[:, 0] = (edge - 0.7) * scale[:, 0]
        weight[:, 1] = -(edge - 0.3) * scale[:, 0]
        weight[:, 2] = (edge - 0.2) * scale[:, 0]
        yield weight, _normal(rng, out, wide), scale, bits


def _upstream(weight, upstream, scale, bits):
    return weight.shape


def _kept(weight, scale, bits, low=0, high=-1):
    whole = (weight / scale).round()
    half = 2 ** (bits - 1)
    return (whole >= -half + low) & (whole <= half + high)


_GRADIENT = Code(
    "13.2",
    "gradient_behind",
    ("weight", "upstream", "scale", "bits"),
    (
        Test("all weights inside the range", 1, _inside, _upstream),
        Test("some are clamped", 3, _outside, _upstream),
    ),
    lambda w, g, s, b: g * _kept(w, s, b),
    (
        Bug(
            "zero everywhere",
            "that is what rounding's own derivative gives. Nothing would be learned.",
            lambda w, g, s, b: 0 * g,
        ),
        Bug(
            "clamp not seen",
            "a weight that was clamped does not move the output. Its gradient is zero.",
            lambda w, g, s, b: g.clone(),
        ),
        Bug(
            "times the scale",
            "the scale goes in and comes out again: w / s, then times s.",
            lambda w, g, s, b: g * s * _kept(w, s, b),
        ),
        Bug(
            "over the scale",
            "the scale goes in and comes out again: w / s, then times s.",
            lambda w, g, s, b: g / s * _kept(w, s, b),
        ),
        Bug(
            "range of the weight",
            "it compares the weight with the limits of the whole numbers. Divide by "
            "the scale first.",
            lambda w, g, s, b: g * (w >= -(2 ** (b - 1))) * (w <= 2 ** (b - 1) - 1),
        ),
        Bug(
            "compared before rounding",
            "a weight between the last whole number and half a step above is rounded "
            "down to it, and is not clamped.",
            lambda w, g, s, b: (
                g * (w / s >= -(2 ** (b - 1))) * (w / s <= 2 ** (b - 1) - 1)
            ),
        ),
        Bug(
            "both ends alike",
            "in two's complement there is one whole number more below zero than above.",
            lambda w, g, s, b: g * _kept(w, s, b, low=1),
        ),
        Bug(
            "one step too many above",
            "2^(b-1) itself is no whole number of b bits.",
            lambda w, g, s, b: g * _kept(w, s, b, high=0),
        ),
        Bug(
            "unsigned range",
            "the whole numbers have a sign: -2^(b-1) to 2^(b-1) - 1.",
            lambda w, g, s, b: (
                g * ((w / s).round() >= 0) * ((w / s).round() <= 2**b - 1)
            ),
        ),
        Bug(
            "error for the gradient",
            "it moves the weight towards its rounded value, whatever the loss says.",
            lambda w, g, s, b: (
                w - (w / s).round().clamp(-(2 ** (b - 1)), 2 ** (b - 1) - 1) * s
            ),
        ),
    ),
    zero=1e-12,
)


# --- 13.3: the token that speculative decoding gives ---


def _speculation(rng, vocab, liked):
    """p, q and a token that the draft likes too much, or too little."""
    while True:
        p, q = _distributions(rng, vocab), _distributions(rng, vocab)
        if liked:
            token = int((q - p).argmax())
            others = int((q > p).sum()) > 1
            if others and 0.2 < float(p[token] / q[token]) < 0.8:
                return p, q, token
        else:
            wanted = [x for x in range(vocab) if p[x] > q[x] and x != int(p.argmax())]
            if wanted and bool((q > p).any()):
                return p, q, wanted[0]


def _liked_too_much(rng):
    for vocab in (3, 5, 8):
        yield _speculation(rng, vocab, True)


def _liked_too_little(rng):
    for vocab in (3, 5):
        yield _speculation(rng, vocab, False)


def _one_hot(p, token):
    import torch

    return torch.zeros_like(p).index_fill(0, torch.tensor([token]), 1.0)


def _emitted(
    accept=lambda p, q, x: (p[x] / q[x]).clamp(max=1),
    anew=lambda p, q: (p - q).clamp(min=0),
    scaled=True,
):
    def compute(p, q, drafted):
        kept = accept(p, q, drafted)
        rest = anew(p, q)
        rest = rest / rest.sum() if scaled else rest
        return kept * _one_hot(p, drafted) + (1 - kept) * rest

    return compute


_EMITTED = Code(
    "13.3",
    "emitted",
    ("p", "q", "drafted"),
    (
        Test(
            "the draft likes its token too much",
            3,
            _liked_too_much,
            lambda p, q, x: p.shape,
        ),
        Test(
            "the large model likes it more",
            1,
            _liked_too_little,
            lambda p, q, x: p.shape,
        ),
    ),
    _emitted(),
    (
        Bug(
            "always accepted",
            "every drafted token is kept, so the answer is the draft's.",
            lambda p, q, x: _one_hot(p, x),
        ),
        Bug(
            "draft's distribution forgotten",
            "it is p, whatever was drafted. The answers come out right, but a token is "
            "kept with probability p(x) alone, as if the draft had been sure of it.",
            lambda p, q, x: p.clone(),
            seen="sgl-project/sglang#10308",
        ),
        Bug(
            "kept by p alone",
            "the chance to be kept is a ratio of both distributions.",
            _emitted(accept=lambda p, q, x: p[x]),
        ),
        Bug(
            "upside down",
            "it keeps what the draft likes more than the large model does.",
            _emitted(accept=lambda p, q, x: (q[x] / p[x]).clamp(max=1)),
        ),
        Bug(
            "drawn anew from p",
            "after a rejection it draws from the large model's whole distribution. "
            "What the draft has already covered is then counted twice.",
            _emitted(anew=lambda p, q: p),
        ),
        Bug(
            "residual by softmax",
            "max(0, p - q) is divided by its sum. A softmax of it gives every token a "
            "share, and those that are covered as well.",
            _emitted(anew=lambda p, q: (p - q).clamp(min=0).softmax(-1)),
            seen="huggingface/transformers#28508",
        ),
        Bug(
            "residual the wrong way",
            "after a rejection it draws where the draft has too much, not too little.",
            _emitted(anew=lambda p, q: (q - p).clamp(min=0)),
        ),
        Bug(
            "absolute difference",
            "tokens that the draft likes too much must not be drawn again.",
            _emitted(anew=lambda p, q: (p - q).abs()),
        ),
        Bug(
            "residual not scaled",
            "what is drawn after a rejection has no distribution: its sum is not one.",
            _emitted(scaled=False),
        ),
        Bug(
            "greedy match",
            "it keeps the token only where it is the large model's favourite.",
            _emitted(accept=lambda p, q, x: (p.argmax() == x).to(p)),
        ),
        Bug(
            "overlap for this token",
            "1 - TVD is the mean over tokens that the draft may write. This token has "
            "a chance of its own.",
            _emitted(accept=lambda p, q, x: p.minimum(q).sum()),
        ),
    ),
    zero=1e-12,
)


# --- 13.4: tokens a pass of the large model ---


def _one_place(rng):
    for _ in range(2):
        yield (_distributions(rng, 2, 4), _distributions(rng, 1, 4))


def _several_places(rng):
    for k, vocab in ((2, 3), (3, 5), (5, 4)):
        yield (_distributions(rng, k + 1, vocab), _distributions(rng, k, vocab))


def _overlaps(p, q):
    return p[: len(q)].minimum(q).sum(-1)


def _tokens(a):
    return float(1 + a.cumprod(0).sum())


_TOKENS = Code(
    "13.4",
    "tokens_a_pass",
    ("p", "q"),
    (
        Test("one token drafted", 1, _one_place),
        Test("several tokens drafted", 3, _several_places),
    ),
    lambda p, q: _tokens(_overlaps(p, q)),
    (
        Bug(
            "last token forgotten",
            "each pass of the large model gives one token more than was kept.",
            lambda p, q: _tokens(_overlaps(p, q)) - 1,
        ),
        Bug(
            "later tokens judged alone",
            "a token is only looked at where all before it were kept.",
            lambda p, q: float(1 + _overlaps(p, q).sum()),
        ),
        Bug(
            "all or nothing",
            "the tokens before the first rejection are kept, too.",
            lambda p, q: float(1 + len(q) * _overlaps(p, q).prod()),
        ),
        Bug(
            "chance that all are kept",
            "that is one chance among several, and no number of tokens.",
            lambda p, q: float(1 + _overlaps(p, q).prod()),
        ),
        Bug(
            "mean overlap",
            "it puts the mean overlap into the formula for places that are alike. "
            "Here each place has its own.",
            lambda p, q: float(
                sum(_overlaps(p, q).mean() ** i for i in range(len(q) + 1))
            ),
        ),
        Bug(
            "TVD for the overlap",
            "TVD is the chance of a rejection.",
            lambda p, q: _tokens(1 - _overlaps(p, q)),
        ),
        Bug(
            "half of the sum forgotten",
            "the sum of |p - q| is twice the TVD.",
            lambda p, q: _tokens(1 - (p[: len(q)] - q).abs().sum(-1)),
        ),
        Bug(
            "chance of the same draw",
            "two independent draws agree with the chance sum of p q. The rule keeps "
            "far more.",
            lambda p, q: _tokens((p[: len(q)] * q).sum(-1)),
            seen="ml-explore/mlx-lm#1709",
        ),
    ),
)


# --- 13.5: predictions ---


def _forecasts():
    return {
        "bits": 4 + 16 / 32,
        "file": (1000 * 64 + 1000 * 64 / 4) / (1000 * 64 / 4),
        "kept": 1 - (0.1 + 0.2 + 0.1) / 2,
        "tokens": (1 - 0.8**5) / (1 - 0.8),
        "speedup": (1 - 0.8**5) / (1 - 0.8) / (4 * 0.5 + 1),
    }


_PREDICTION = Predict(
    "13.5",
    "forecasts",
    _forecasts,
    {
        "bits": (
            Bug("scale a weight", "32 weights share one scale.", lambda: 4 + 16.0),
            Bug("kept in bytes", "That is for two bytes a weight.", lambda: 16.0),
        ),
        "file": (
            Bug("tied after all", "The head is stored beside it now.", lambda: 1.0),
            Bug("two of a kind", "One copy has 8 bits, the other 32.", lambda: 2.0),
        ),
        "kept": (
            Bug(
                "same draw",
                "That is how often two independent draws agree.",
                lambda: 0.7 * 0.6 + 0.2 * 0.4,
            ),
            Bug("rejected", "That is how often it is thrown away.", lambda: 0.2),
        ),
        "tokens": (
            Bug("share", "That is a share and no number of tokens.", lambda: 0.8),
        ),
        "speedup": (
            Bug(
                "drafts for nothing",
                "The draft's passes take time.",
                lambda: (1 - 0.8**5) / (1 - 0.8),
            ),
            Bug(
                "one draft",
                "There are four passes of the draft.",
                lambda: (1 - 0.8**5) / (1 - 0.8) / 1.5,
            ),
        ),
    },
)

QUESTIONS = (
    _ROUND,
    _GRADIENT,
    _EMITTED,
    _TOKENS,
    _PREDICTION,
    Choice("13.6", "what_ships", "abcde"),
)
