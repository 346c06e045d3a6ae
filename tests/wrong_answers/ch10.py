"""Answers to the exercises of chapter 10: wrong ones, and honest variants.

A wrong answer comes with its provenance, the outcome and the bug's name that the
checker must give, and the points that are left.
"""

from __future__ import annotations

from math import cosh, exp, inf, isfinite, log, sqrt, tanh

import numpy as np
import torch
from wrong_answers.collect import collectors

WRONG, HONEST, wrong, honest = collectors()


# --- 10.1 hand_in ---

# In plain loops; `weight` says what a token's gradient is multiplied by.


def weighed(sums, tokens, weight):
    ranks, parts, width = sums.shape
    return [
        [
            sum(sums[r, k, p].item() * weight(r, k) for k in range(parts))
            for p in range(width)
        ]
        for r in range(ranks)
    ]


@honest("10.1")
def by_loops(sums, tokens):
    total = sum(map(sum, tokens.tolist()))
    return weighed(sums, tokens, lambda r, k: len(sums) / total)


@honest("10.1")
def means_weighed_back(sums, tokens):
    means = sums / tokens[..., None]
    share = tokens / tokens.sum()
    return (means * share[..., None]).sum(1) * sums.shape[0]


@honest("10.1")
def hand_in_float32(sums, tokens):
    return torch.einsum("rkp->rp", sums.float()) * (len(sums) / tokens.sum().item())


@honest("10.1")
def hand_in_numpy(sums, tokens):
    return np.add.reduce(sums.numpy(), 1) / (tokens.numpy().sum() / len(sums))


@wrong("10.1", "mean of means", 1, "huggingface/trl#4719")
def mean_of_means(sums, tokens):
    parts = sums.shape[1]
    return weighed(sums, tokens, lambda r, k: 1 / (parts * tokens[r, k].item()))


@wrong("10.1", "sum of means", 1, "MakazhanAlpamys/Soup#720")
def sum_of_means(sums, tokens):
    return weighed(sums, tokens, lambda r, k: 1 / tokens[r, k].item())


@wrong("10.1", "own count", 3, "huggingface/transformers#34242")
def own_count(sums, tokens):
    return weighed(sums, tokens, lambda r, k: 1 / tokens[r].sum().item())


@wrong("10.1", "engine's average forgotten", 3, "verl-project/verl-SpeCo#29")
def no_factor(sums, tokens):
    total = tokens.sum().item()
    return weighed(sums, tokens, lambda r, k: 1 / total)


@wrong("10.1", "divided twice", 1, "unslothai/unsloth-zoo#1023")
def twice(sums, tokens):
    total = tokens.sum().item() * sums.shape[1]
    return weighed(sums, tokens, lambda r, k: len(sums) / total)


@wrong("10.1", "no denominator", 0)
def summed(sums, tokens):
    return weighed(sums, tokens, lambda r, k: len(sums))


@wrong("10.1", "first process's count", 3)
def first_count(sums, tokens):
    total = tokens[0].sum().item()
    return weighed(sums, tokens, lambda r, k: 1 / total)


@wrong("10.1", "everything for everybody", 3, "an all-reduce before the engine's")
def reduced_before(sums, tokens):
    rows = weighed(sums, tokens, lambda r, k: 1 / tokens.sum().item())
    whole = [sum(column) for column in zip(*rows, strict=True)]
    return [whole] * len(sums)


@wrong("10.1", "wrong shape", 0, "the engine's work done as well")
def already_averaged(sums, tokens):
    return sums.sum((0, 1)) / tokens.sum()


# --- 10.2 for_the_optimiser ---


def length(vector):
    return sqrt(sum(x * x for x in vector))


def added(rows):
    return [sum(column) for column in zip(*rows, strict=True)]


def shortened(vector, limit):
    size = length(vector)
    return [x * limit / size for x in vector] if size > limit else vector


def after(rows, scale, limit, clip=shortened):
    whole = added(rows)
    if not all(map(isfinite, whole)):
        return [0.0] * len(whole)
    return clip([x / scale for x in whole], limit)


@honest("10.2")
def in_plain_python(scaled, scale, limit):
    return after(scaled.tolist(), scale, limit)


@honest("10.2")
def with_torch_s_own_clipping(scaled, scale, limit):
    weight = torch.zeros(scaled.shape[1], requires_grad=True)
    weight.grad = scaled.sum(0) / scale
    norm = torch.nn.utils.clip_grad_norm_([weight], limit)
    return weight.grad if norm.isfinite() else torch.zeros_like(weight.grad)


@honest("10.2")
def unscaled_first(scaled, scale, limit):
    if torch.isinf(scaled).any():
        return 0 * scaled.new_zeros(scaled.shape[1])
    parts = (scaled.double() / scale).numpy()
    whole = parts.sum(0)
    return whole / max(1.0, np.linalg.norm(whole) / limit)


@wrong(
    "10.2", "clipped before it is unscaled", 1, "Lightning-AI/pytorch-lightning#9599"
)
def clip_then_unscale(scaled, scale, limit):
    return [x / scale for x in after(scaled.tolist(), 1.0, limit)]


@wrong("10.2", "not unscaled", 3)
def still_scaled(scaled, scale, limit):
    return after(scaled.tolist(), 1.0, limit)


@wrong("10.2", "each micro-batch clipped", 1)
def clipped_parts(scaled, scale, limit):
    if not torch.isfinite(scaled).all():
        return torch.zeros(scaled.shape[1])
    return added([after([row], scale, limit) for row in scaled.tolist()])


@wrong("10.2", "each number clipped", 3, "clip_grad_value_ for clip_grad_norm_")
def by_value(scaled, scale, limit):
    def clip(vector, limit):
        return [max(-limit, min(limit, x)) for x in vector]

    return after(scaled.tolist(), scale, limit, clip)


@wrong("10.2", "always stretched to the limit", 3)
def normalised(scaled, scale, limit):
    def clip(vector, limit):
        return [x * limit / length(vector) for x in vector]

    return after(scaled.tolist(), scale, limit, clip)


@wrong("10.2", "squared length", 3)
def by_the_square(scaled, scale, limit):
    def clip(vector, limit):
        return [x * min(1, limit / length(vector) ** 2) for x in vector]

    return after(scaled.tolist(), scale, limit, clip)


@wrong("10.2", "not clipped", 3)
def only_unscaled(scaled, scale, limit):
    return after(scaled.tolist(), scale, limit, lambda vector, limit: vector)


@wrong("10.2", "mean over micro-batches", 1)
def averaged(scaled, scale, limit):
    return after(scaled.tolist(), scale * len(scaled), limit)


@wrong("10.2", "overflow set to zero", 4)
def zeroed(scaled, scale, limit):
    rows = [[0.0 if x == inf else x for x in row] for row in scaled.tolist()]
    return after(rows, scale, limit)


@wrong("10.2", "overflowing micro-batch left out", 4)
def fewer_rows(scaled, scale, limit):
    rows = [row for row in scaled.tolist() if inf not in row]
    return after(rows, scale, limit)


@wrong("10.2", "not finite", 4, "no look for an overflow")
def unchecked(scaled, scale, limit):
    gradient = scaled.sum(0) / scale
    return gradient * (limit / gradient.norm()).clamp(max=1)


# --- 10.3 through_the_cap ---


def by_autograd(raw, teacher, weights, cap, *, shaped=True, loss=None):
    """The gradient that torch finds; the checker has the formula."""
    leaf = raw.detach().clone().requires_grad_()
    logits = cap * torch.tanh(leaf / cap) if shaped else leaf
    log_s = logits.log_softmax(-1)
    if loss is None:
        values = -(teacher * log_s).sum(-1)
    else:
        values = loss(log_s, teacher)
    return torch.autograd.grad((weights * values).sum(), leaf)[0]


HONEST.append(("10.3", by_autograd))


@honest("10.3")
def in_scalars(raw, teacher, weights, cap):
    found = []
    for row, wanted, weight in zip(
        raw.tolist(), teacher.tolist(), weights.tolist(), strict=True
    ):
        powers = [exp(cap * tanh(r / cap)) for r in row]
        found.append(
            [
                weight * (e / sum(powers) - t) / cosh(r / cap) ** 2
                for e, t, r in zip(powers, wanted, row, strict=True)
            ]
        )
    return found


@honest("10.3")
def kl_with_its_entropy(raw, teacher, weights, cap):
    def kl(log_s, teacher):
        return (teacher * (teacher.log() - log_s)).sum(-1)

    return by_autograd(raw, teacher, weights, cap, loss=kl)


@wrong("10.3", "cap ignored", 0, "huggingface/trl#6629")
def no_cap(raw, teacher, weights, cap):
    return by_autograd(raw, teacher, weights, cap, shaped=False)


def slope(raw, cap):
    return 1 / torch.cosh(raw / cap) ** 2


@wrong("10.3", "slope of the cap forgotten", 0)
def by_capped_logits(raw, teacher, weights, cap):
    return by_autograd(raw, teacher, weights, cap) / slope(raw, cap)


@wrong("10.3", "distribution of the raw logits", 0)
def slope_alone(raw, teacher, weights, cap):
    return no_cap(raw, teacher, weights, cap) * slope(raw, cap)


@wrong("10.3", "slope not squared", 0)
def first_power(raw, teacher, weights, cap):
    plain = by_capped_logits(raw, teacher, weights, cap)
    return plain * (1 - torch.tanh(raw.abs() / cap))


@wrong("10.3", "cap in the slope", 0)
def slope_over_cap(raw, teacher, weights, cap):
    return by_autograd(raw, teacher, weights, cap) / cap


@wrong("10.3", "cap in the slope", 0)
def slope_times_cap(raw, teacher, weights, cap):
    return by_autograd(raw, teacher, weights, cap) * cap


@wrong("10.3", "weights forgotten", 0)
def unweighed(raw, teacher, weights, cap):
    return by_autograd(raw, teacher, torch.ones_like(weights), cap)


@wrong("10.3", "weights made a mean", 0)
def as_a_mean(raw, teacher, weights, cap):
    return by_autograd(raw, teacher, weights, cap) / weights.sum()


@wrong("10.3", "wrong sign", 0)
def uphill(raw, teacher, weights, cap):
    return -by_autograd(raw, teacher, weights, cap)


@wrong("10.3", "gradient of the reverse KL", 0)
def reversed_kl(raw, teacher, weights, cap):
    def loss(log_s, teacher):
        return (log_s.exp() * (log_s - teacher.log())).sum(-1)

    return by_autograd(raw, teacher, weights, cap, loss=loss)


# --- 10.4 padding_share ---


def cut(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def places(batches):
    return sum(len(batch) * max(batch) for batch in batches)


@honest("10.4")
def in_lists(lengths, size, window):
    batches = []
    for part in cut(lengths.tolist(), size * window):
        batches += cut(sorted(part), size)
    made = places(batches)
    return (made - sum(map(sum, batches))) / made


@honest("10.4")
def longest_first(lengths, size, window):
    """From the end, so that the short batch has the same rows."""
    made = 0
    for part in cut(lengths.numpy(), size * window):
        ordered = np.sort(part)
        for start in range(0, len(ordered), size):
            batch = ordered[start : start + size]
            made += batch[-1] * batch.size
    return 1 - lengths.sum().double() / made


@wrong("10.4", "not sorted", 2)
def unsorted(lengths, size, window):
    return 1 - lengths.sum().item() / places(cut(lengths.tolist(), size))


@wrong("10.4", "all sorted at once", 1)
def one_window(lengths, size, window):
    return 1 - lengths.sum().item() / places(cut(sorted(lengths.tolist()), size))


@wrong("10.4", "padded to the longest of all", 1)
def longest_of_all(lengths, size, window):
    return 1 - lengths.double().mean().item() / lengths.max().item()


@wrong("10.4", "padded to the longest of the window", 2)
def longest_of_window(lengths, size, window):
    windows = cut(lengths.tolist(), size * window)
    return 1 - lengths.sum().item() / places(windows)


def batches_of(lengths, size, window):
    return [
        batch
        for part in cut(lengths.tolist(), size * window)
        for batch in cut(sorted(part), size)
    ]


@wrong("10.4", "mean of the batches' shares", 1)
def mean_share(lengths, size, window):
    batches = batches_of(lengths, size, window)
    return np.mean([1 - np.mean(batch) / max(batch) for batch in batches])


@wrong("10.4", "share of the real tokens", 0)
def over_real(lengths, size, window):
    return places(batches_of(lengths, size, window)) / lengths.sum().item() - 1


@wrong("10.4", "share of real tokens", 0)
def real_share(lengths, size, window):
    return lengths.sum().item() / places(batches_of(lengths, size, window))


@wrong("10.4", "last batch dropped", 2, "drop_last=True")
def whole_batches(lengths, size, window):
    batches = [b for b in batches_of(lengths, size, window) if len(b) == size]
    return 1 - sum(map(sum, batches)) / places(batches)


@wrong("10.4", "a count", 0)
def padded_places(lengths, size, window):
    return places(batches_of(lengths, size, window)) - lengths.sum().item()


# --- 10.5 forecasts ---

GUESS = {"matrix": 4, "adamw": 34, "tokens_per_s": 66_000, "quarter": 16}
HONEST += [
    ("10.5", GUESS),
    ("10.5", {"matrix": 5, "adamw": 36, "tokens_per_s": 50_000, "quarter": 20}),
    ("10.5", {key: np.float32(value) for key, value in GUESS.items()}),
]
for key, value, bug in [
    ("matrix", 1.96, "16 bits"),
    ("matrix", 0.98, "one row"),
    ("adamw", 11.2, "weights alone"),
    ("adamw", 16.8, "16 bits"),
    ("tokens_per_s", 198_000, "forward pass alone"),
    ("tokens_per_s", 165_000, "at the peak"),
    ("quarter", 4, "first order"),
    ("quarter", 2, "half of the order"),
    ("quarter", log(16), None),
]:
    WRONG.append(("10.5", GUESS | {key: value}, "wrong", bug, 3.5, ""))
for value, bug in [
    (..., "incomplete"),
    ("much", "wrong type"),
    (-1, "not positive"),
    (float("inf"), "not finite"),
]:
    WRONG.append(("10.5", GUESS | {"matrix": value}, "wrong", bug, 3, ""))

# --- 10.6 what_changes ---

KEY = {"a": "B", "b": "C", "c": "A", "d": "C", "e": "A"}
HONEST += [("10.6", KEY), ("10.6", {k: f" {v.lower()}" for k, v in KEY.items()})]
for item, right in KEY.items():
    for letter in sorted(set("ABC") - {right}):
        WRONG.append(("10.6", KEY | {item: letter}, "wrong", f"{item} {letter}", 4, ""))
for value, bug in [("D", "no such option"), (1, "no such option"), (..., "incomplete")]:
    WRONG.append(("10.6", KEY | {"a": value}, "wrong", bug, 4, ""))
