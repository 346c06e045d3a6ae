"""Answers to the exercises of chapter 13: wrong ones, and honest variants.

A wrong answer comes with its provenance, the outcome and the bug's name that the
checker must give, and the points that are left.
"""

from __future__ import annotations

from math import exp, floor, prod

import numpy as np
import torch
from wrong_answers.collect import collectors

WRONG, HONEST, wrong, honest = collectors()


# --- 13.1 read_back ---


def row_by_row(weight, bits, of_range, steps=None, whole_zero=True, nearest=True,
               undo=lambda k, z, s: (k - z) * s):  # fmt: skip
    """In plain Python, one row after the other."""
    found = []
    for row in weight.tolist():
        low, high = of_range(row)
        scale = (high - low) / (steps or 2**bits - 1)
        zero = round(-low / scale) if whole_zero else -low / scale
        whole = [w / scale + zero for w in row]
        whole = [round(k) if nearest else floor(k) for k in whole]
        whole = [min(max(k, 0), 2**bits - 1) for k in whole]
        found.append([undo(k, zero, scale) for k in whole])
    return found


def with_zero(row):
    return min(*row, 0), max(*row, 0)


@honest("13.1")
def in_python(weight, bits):
    return row_by_row(weight, bits, with_zero)


@honest("13.1")
def by_torch(weight, bits):
    low = weight.amin(1).clamp(max=0)
    scale = (weight.amax(1).clamp(min=0) - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return torch.fake_quantize_per_channel_affine(
        weight.float(), scale.float(), zero.int(), 0, 0, 2**bits - 1
    )


@honest("13.1")
def in_numpy(weight, bits):
    w = weight.numpy()
    low = np.minimum(w.min(1, keepdims=True), 0)
    scale = (np.maximum(w.max(1, keepdims=True), 0) - low) / (2**bits - 1)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(w / scale + zero), 0, 2**bits - 1) - zero) * scale


@wrong("13.1", "one scale for all", 0)
def per_tensor(weight, bits):
    everything = with_zero(weight.flatten().tolist())
    return row_by_row(weight, bits, lambda row: everything)


@wrong("13.1", "wrong axis", 0)
def per_input(weight, bits):
    return torch.tensor(in_python(weight.T, bits)).T


@wrong("13.1", "zero not in the range", 2)
def from_smallest_to_largest(weight, bits):
    return row_by_row(weight, bits, lambda row: (min(row), max(row)))


@wrong("13.1", "one step too many", 0)
def steps_for_numbers(weight, bits):
    return row_by_row(weight, bits, with_zero, steps=2**bits)


@wrong("13.1", "zero point not whole", 3)
def float_zero(weight, bits):
    return row_by_row(weight, bits, with_zero, whole_zero=False)


@wrong("13.1", "cut off, not rounded", 0)
def to_int(weight, bits):
    return row_by_row(weight, bits, with_zero, nearest=False)


@wrong("13.1", "zero point left in", 0)
def not_undone(weight, bits):
    return row_by_row(weight, bits, with_zero, undo=lambda k, z, s: k * s)


@wrong("13.1", "zero point taken off after scaling", 0)
def undone_late(weight, bits):
    return row_by_row(weight, bits, with_zero, undo=lambda k, z, s: k * s - z)


@wrong("13.1", "symmetric", 0)
def both_ways(weight, bits):
    return row_by_row(
        weight, bits, lambda row: (-max(map(abs, row)), max(map(abs, row)))
    )


@wrong("13.1", None, 0, "the weights themselves")
def not_rounded(weight, bits):
    return weight.clone()


@wrong("13.1", "changes its input", 0, outcome="wrong")
def in_place(weight, bits):
    weight.copy_(torch.tensor(in_python(weight, bits)))
    return weight


# --- 13.2 gradient_behind ---


def through(weight, upstream, scale, bits, estimator):
    """By autograd, with an estimator for the rounding."""
    leaf = weight.clone().requires_grad_()
    value = estimator(leaf, scale, bits)
    (value * upstream).sum().backward()
    return torch.zeros_like(weight) if leaf.grad is None else leaf.grad


def clamped(x, bits):
    return x.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@honest("13.2")
def by_autograd(weight, upstream, scale, bits):
    def estimator(w, s, b):
        x = w / s
        return clamped(x + (x.round() - x).detach(), b) * s

    return through(weight, upstream, scale, bits, estimator)


@honest("13.2")
def by_torch_s_own(weight, upstream, scale, bits):
    def estimator(w, s, b):
        zero = torch.zeros(len(w), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(
            w, s[:, 0], zero, 0, -(2 ** (b - 1)), 2 ** (b - 1) - 1
        )

    return through(weight.float(), upstream.float(), scale.float(), bits, estimator)


@honest("13.2")
def where_it_moves(weight, upstream, scale, bits):
    whole = torch.round(weight / scale)
    return torch.where(clamped(whole, bits) == whole, upstream, 0.0)


@wrong("13.2", "zero everywhere", 0)
def plain_round(weight, upstream, scale, bits):
    return through(
        weight, upstream, scale, bits, lambda w, s, b: clamped((w / s).round(), b) * s
    )


@wrong("13.2", "clamp not seen", 1)
def all_through(weight, upstream, scale, bits):
    return through(
        weight,
        upstream,
        scale,
        bits,
        lambda w, s, b: w + (clamped((w / s).round(), b) * s - w).detach(),
    )


@wrong("13.2", "times the scale", 0)
def scaled_up(weight, upstream, scale, bits):
    return where_it_moves(weight, upstream, scale, bits) * scale


@wrong("13.2", "over the scale", 0)
def scaled_down(weight, upstream, scale, bits):
    return where_it_moves(weight, upstream, scale, bits) / scale


@wrong("13.2", "range of the weight", 1)
def not_in_steps(weight, upstream, scale, bits):
    return torch.where(clamped(weight, bits) == weight, upstream, 0.0)


@wrong("13.2", "compared before rounding", 1)
def unrounded(weight, upstream, scale, bits):
    x = weight / scale
    return torch.where(clamped(x, bits) == x, upstream, 0.0)


@wrong("13.2", "both ends alike", 1)
def symmetric_range(weight, upstream, scale, bits):
    return upstream * ((weight / scale).round().abs() <= 2 ** (bits - 1) - 1)


@wrong("13.2", "one step too many above", 1)
def two_sided(weight, upstream, scale, bits):
    return upstream * ((weight / scale).round().abs() <= 2 ** (bits - 1))


@wrong("13.2", "unsigned range", 0)
def from_zero(weight, upstream, scale, bits):
    whole = (weight / scale).round()
    return torch.where(whole.clamp(0, 2**bits - 1) == whole, upstream, 0.0)


@wrong("13.2", "error for the gradient", 0)
def pull(weight, upstream, scale, bits):
    return weight - clamped((weight / scale).round(), bits) * scale


# --- 13.3 emitted ---


def mixture(keep, rest, drafted):
    found = [(1 - keep) * r for r in rest]
    found[drafted] += keep
    return found


def shares(values):
    return [v / sum(values) for v in values]


def parts(p, q, drafted):
    p, q = p.tolist(), q.tolist()
    missing = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
    return min(1.0, p[drafted] / q[drafted]), missing, p, q


@honest("13.3")
def emitted_in_python(p, q, drafted):
    keep, missing, _, _ = parts(p, q, drafted)
    return mixture(keep, shares(missing), drafted)


@honest("13.3")
def emitted_in_float32(p, q, drafted):
    p, q = p.float(), q.float()
    keep = min(p[drafted] / q[drafted], torch.tensor(1.0))
    missing = torch.relu(p - q)
    hot = torch.nn.functional.one_hot(torch.tensor(drafted), len(p))
    return keep * hot + (1 - keep) * missing / missing.sum()


@honest("13.3")
def by_joint_probability(p, q, drafted):
    """The coupling of p and q that is most often equal, one row of it."""
    joint = torch.outer((q - p).clamp(min=0), (p - q).clamp(min=0))
    joint = joint / (p - q).clamp(min=0).sum() + torch.diag(torch.minimum(p, q))
    return joint[drafted] / q[drafted]


@wrong("13.3", "always accepted", 1)
def trusting(p, q, drafted):
    return mixture(1.0, [0.0] * len(p), drafted)


@wrong("13.3", "draft's distribution forgotten", 0, "sgl-project/sglang#10308")
def one_hot_draft(p, q, drafted):
    rest = p.clone()
    rest[drafted] = 0
    return mixture(p[drafted].item(), shares(rest.tolist()), drafted)


@wrong("13.3", "kept by p alone", 0)
def by_p(p, q, drafted):
    _, missing, large, _ = parts(p, q, drafted)
    return mixture(large[drafted], shares(missing), drafted)


@wrong("13.3", "upside down", 0)
def inverted(p, q, drafted):
    _, missing, large, small = parts(p, q, drafted)
    keep = min(1.0, small[drafted] / large[drafted])
    return mixture(keep, shares(missing), drafted)


@wrong("13.3", "drawn anew from p", 1)
def from_p(p, q, drafted):
    keep, _, large, _ = parts(p, q, drafted)
    return mixture(keep, large, drafted)


@wrong("13.3", "residual by softmax", 1, "huggingface/transformers#28508")
def softened(p, q, drafted):
    keep, missing, _, _ = parts(p, q, drafted)
    return mixture(keep, shares([exp(m) for m in missing]), drafted)


@wrong("13.3", "residual the wrong way", 1)
def from_the_surplus(p, q, drafted):
    keep, _, large, small = parts(p, q, drafted)
    surplus = [max(0.0, b - a) for a, b in zip(large, small, strict=True)]
    return mixture(keep, shares(surplus), drafted)


@wrong("13.3", "absolute difference", 1)
def from_the_distance(p, q, drafted):
    keep, _, large, small = parts(p, q, drafted)
    away = [abs(a - b) for a, b in zip(large, small, strict=True)]
    return mixture(keep, shares(away), drafted)


@wrong("13.3", "residual not scaled", 1)
def unscaled(p, q, drafted):
    keep, missing, _, _ = parts(p, q, drafted)
    return mixture(keep, missing, drafted)


@wrong("13.3", "greedy match", 0)
def favourite(p, q, drafted):
    _, missing, large, _ = parts(p, q, drafted)
    keep = float(large.index(max(large)) == drafted)
    return mixture(keep, shares(missing), drafted)


@wrong("13.3", "overlap for this token", 0)
def mean_over_tokens(p, q, drafted):
    _, missing, large, small = parts(p, q, drafted)
    keep = sum(map(min, large, small))
    return mixture(keep, shares(missing), drafted)


@wrong("13.3", "draft's distribution forgotten", 0, "on average, not given the token")
def on_average(p, q, drafted):
    return p.clone()


# --- 13.4 tokens_a_pass ---


def lists(p, q):
    """The overlap of each drafted place."""
    rows = zip(p[: len(q)].tolist(), q.tolist(), strict=True)
    return [sum(map(min, a, b)) for a, b in rows]


def expected(chances):
    """One token, and then the next as long as all are kept."""
    total = 1.0
    for a in reversed(chances):
        total = 1 + a * total
    return total


@honest("13.4")
def from_behind(p, q):
    return expected(lists(p, q))


@honest("13.4")
def by_the_tvd(p, q):
    distance = 0.5 * (p[:-1] - q).abs().sum(-1)
    return 1 + torch.cumprod(1 - distance, 0).sum()


@honest("13.4")
def outcome_by_outcome(p, q):
    a, total, reached = lists(p, q), 0.0, 1.0
    for place, chance in enumerate(a):
        total += reached * (1 - chance) * (place + 1)
        reached *= chance
    return total + reached * (len(a) + 1)


@honest("13.4")
def tokens_in_float32(p, q):
    return by_the_tvd(p.float(), q.float())


@wrong("13.4", "last token forgotten", 0)
def only_kept(p, q):
    return from_behind(p, q) - 1


@wrong("13.4", "later tokens judged alone", 1)
def alone(p, q):
    return 1 + sum(lists(p, q))


@wrong("13.4", "all or nothing", 1)
def whole_drafts(p, q):
    return 1 + len(q) * prod(lists(p, q))


@wrong("13.4", "chance that all are kept", 1)
def chance_of_all(p, q):
    return 1 + prod(lists(p, q))


@wrong("13.4", "mean overlap", 1)
def geometric(p, q):
    a = sum(lists(p, q)) / len(q)
    return (1 - a ** (len(q) + 1)) / (1 - a)


@wrong("13.4", "TVD for the overlap", 0)
def by_rejections(p, q):
    return expected([1 - a for a in lists(p, q)])


@wrong("13.4", "half of the sum forgotten", 0)
def twice_the_tvd(p, q):
    return 1 + torch.cumprod(1 - (p[:-1] - q).abs().sum(-1), 0).sum()


@wrong("13.4", "chance of the same draw", 0, "ml-explore/mlx-lm#1709")
def same_draw(p, q):
    return expected(torch.einsum("kv,kv->k", p[:-1], q).tolist())


@wrong("13.4", "wrong shape", 0, "the sum forgotten")
def each_place(p, q):
    return torch.minimum(p[:-1], q).sum(-1).cumprod(0).expand(2, -1)


# --- 13.5 forecasts ---

GUESS = {"bits": 4.5, "file": 5, "kept": 0.8, "tokens": 3.4, "speedup": 1.1}
HONEST += [
    ("13.5", GUESS),
    ("13.5", {"bits": 5, "file": 4, "kept": 0.75, "tokens": 3, "speedup": 1.3}),
    ("13.5", {key: np.float32(value) for key, value in GUESS.items()}),
]
for key, value, bug in [
    ("bits", 20, "scale a weight"),
    ("bits", 16, "kept in bytes"),
    ("file", 1, "tied after all"),
    ("file", 2, "two of a kind"),
    ("kept", 0.2, "rejected"),
    ("kept", 0.5, "same draw"),
    ("tokens", 0.8, "share"),
    ("speedup", 3.36, "drafts for nothing"),
    ("speedup", 2.24, "one draft"),
    ("speedup", 9, None),
]:
    WRONG.append(("13.5", GUESS | {key: value}, "wrong", bug, 4.5, ""))
for value, bug in [
    (..., "incomplete"),
    ("much", "wrong type"),
    (-1, "not positive"),
    (float("inf"), "not finite"),
]:
    WRONG.append(("13.5", GUESS | {"bits": value}, "wrong", bug, 4, ""))

# --- 13.6 what_ships ---

KEY = {"a": "B", "b": "A", "c": "C", "d": "B", "e": "B"}
HONEST += [("13.6", KEY), ("13.6", {k: f" {v.lower()}" for k, v in KEY.items()})]
for item, right in KEY.items():
    for letter in sorted(set("ABC") - {right}):
        bug = f"{item} {letter}"
        WRONG.append(("13.6", KEY | {item: letter}, "wrong", bug, 4, ""))
for value, bug in [("D", "no such option"), (1, "no such option"), (..., "incomplete")]:
    WRONG.append(("13.6", KEY | {"a": value}, "wrong", bug, 4, ""))
