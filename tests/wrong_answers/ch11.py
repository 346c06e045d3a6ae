"""Answers to the exercises of chapter 11: wrong ones, and honest variants of right.

A wrong answer comes with its provenance, the outcome and the bug's name that the
checker must give, and the points that are left.
"""

from __future__ import annotations

from collections import Counter
from math import exp, log, log2

import numpy as np
import torch
from wrong_answers.collect import collectors

WRONG, HONEST, wrong, honest = collectors()


# --- 11.1 three_parts ---


def split(p_t, p_s, kept):
    """(teacher, student) probabilities of the kept tokens, and of the others."""
    inside = set(kept.tolist())
    groups = [], []
    for v, pair in enumerate(zip(p_t.tolist(), p_s.tolist(), strict=True)):
        groups[v not in inside].append(pair)
    return groups


def masses(group):
    return tuple(map(sum, zip(*group, strict=True)))


def conditional(group, logarithm=log):
    m_t, m_s = masses(group)
    return sum(t / m_t * logarithm(t / m_t * m_s / s) for t, s in group)


def between(groups, logarithm=log):
    return sum(m_t * logarithm(m_t / m_s) for m_t, m_s in map(masses, groups))


@honest("11.1")
def by_the_formula(*args):
    groups = split(*args)
    return [between(groups), *(masses(g)[0] * conditional(g) for g in groups)]


@honest("11.1")
def from_cut_sums(p_t, p_s, kept):
    """Each part of the cut sums less what belongs to between."""
    terms = p_t * (p_t / p_s).log()
    inside = torch.isin(torch.arange(len(p_t)), kept)
    found = []
    for group in (inside, ~inside):
        m_t, m_s = p_t[group].sum(), p_s[group].sum()
        found.append((m_t * (m_t / m_s).log(), terms[group].sum()))
    first = found[0][0] + found[1][0]
    return torch.stack([first, *(cut - share for share, cut in found)])


@honest("11.1")
def parts_in_float32(p_t, p_s, kept):
    return from_cut_sums(p_t.float(), p_s.float(), kept)


@honest("11.1")
def parts_in_numpy(p_t, p_s, kept):
    return np.array(by_the_formula(p_t, p_s, kept))


@wrong("11.1", "weights forgotten", 0, "the renormalised loss, taken for a part")
def unweighted(*args):
    groups = split(*args)
    return [between(groups), *map(conditional, groups)]


@wrong("11.1", "student's mass as weight", 0)
def student_weighs(*args):
    groups = split(*args)
    return [between(groups), *(masses(g)[1] * conditional(g) for g in groups)]


@wrong("11.1", "half of between", 0, "what a zero tail sees of it")
def one_event(*args):
    groups = split(*args)
    return [between(groups[:1]), *by_the_formula(*args)[1:]]


@wrong("11.1", "not conditional", 0)
def cut_sums(*args):
    groups = split(*args)
    return [between(groups), *(sum(t * log(t / s) for t, s in g) for g in groups)]


@wrong("11.1", "tail weighed like kept", 0)
def one_weight(*args):
    groups = split(*args)
    m_t = masses(groups[0])[0]
    return [between(groups), *(m_t * conditional(g) for g in groups)]


@wrong("11.1", "the other direction", 0)
def reverse(p_t, p_s, kept):
    return by_the_formula(p_s, p_t, kept)


@wrong("11.1", "kept and tail exchanged", 0)
def exchanged(*args):
    first, kept, tail = by_the_formula(*args)
    return [first, tail, kept]


@wrong("11.1", "bits for nats", 0)
def in_bits(*args):
    groups = split(*args)
    parts = [masses(g)[0] * conditional(g, log2) for g in groups]
    return [between(groups, log2), *parts]


@wrong("11.1", "wrong shape", 0, "the sum, which was known before")
def whole(*args):
    return sum(by_the_formula(*args))


# --- 11.2 cut_gradient ---


def by_autograd_of(loss):
    """The gradient of a loss(log p_s at the kept ids, teacher's log-probabilities)."""

    def answer(student_logits, indices, log_probs):
        z = student_logits.clone().requires_grad_()
        value = loss(z, z.log_softmax(-1)[indices], indices, log_probs)
        return torch.autograd.grad(value, z)[0]

    return answer


@honest("11.2")
def by_autograd(*args):
    def loss(z, log_s, indices, log_t):
        return (log_t.exp() * (log_t - log_s)).sum()

    return by_autograd_of(loss)(*args)


@honest("11.2")
def by_central_differences(student_logits, indices, log_probs):
    def loss(z):
        log_s = z - z.exp().sum().log()
        return (log_probs.exp() * (log_probs - log_s[indices])).sum().item()

    step, found = 1e-3, []
    for v in range(len(student_logits)):
        values = []
        for times in (-2, -1, 1, 2):
            z = student_logits.clone()
            z[v] += times * step
            values.append(loss(z))
        a, b, c, d = values
        found.append((a - 8 * b + 8 * c - d) / (12 * step))
    return np.array(found, dtype=np.float32)


@honest("11.2")
def token_by_token(student_logits, indices, log_probs):
    weights = dict(zip(indices.tolist(), log_probs.exp().tolist(), strict=True))
    total = sum(exp(z) for z in student_logits.tolist())
    m = sum(weights.values())
    return [
        m * exp(z) / total - weights.get(v, 0.0)
        for v, z in enumerate(student_logits.tolist())
    ]


@honest("11.2")
def gradient_in_float32(student_logits, indices, log_probs):
    return by_autograd(student_logits.float(), indices, log_probs.float())


def p_and_w(student_logits, indices, log_probs):
    w = torch.zeros_like(student_logits)
    w[indices] = log_probs.exp()
    return student_logits.softmax(-1), w


@wrong("11.2", "mass taken for one", 1, "the formula of the whole KL")
def whole_formula(*args):
    p, w = p_and_w(*args)
    return p - w


@wrong("11.2", "teacher renormalised", 1)
def scaled_up(*args):
    p, w = p_and_w(*args)
    return p - w / w.sum()


@wrong("11.2", "both renormalised", 1)
def blind(*args):
    def loss(z, log_s, indices, log_t):
        t = log_t.softmax(-1)
        return (t * (t.log() - z[indices].log_softmax(-1))).sum()

    return by_autograd_of(loss)(*args)


@wrong("11.2", "others left alone", 1)
def sparse_gradient(student_logits, indices, log_probs):
    found = torch.zeros_like(student_logits)
    found[indices] = by_autograd(student_logits, indices, log_probs)[indices]
    return found


@wrong("11.2", "sign", 0)
def uphill(*args):
    return -by_autograd(*args)


@wrong("11.2", "by probabilities", 0)
def not_through_softmax(*args):
    p, w = p_and_w(*args)
    return -w / p


@wrong("11.2", "mean over the vocabulary", 0, "torch's kl_div with reduction='mean'")
def mean_over_v(student_logits, *args):
    return by_autograd(student_logits, *args) / len(student_logits)


@wrong("11.2", "mean over the kept", 0)
def mean_over_k(student_logits, indices, log_probs):
    return by_autograd(student_logits, indices, log_probs) / len(indices)


@wrong("11.2", None, 0, "the kept entries alone, in the order of indices")
def kept_entries(student_logits, indices, log_probs):
    return by_autograd(student_logits, indices, log_probs)[indices]


@wrong("11.2", None, 0, "log-probabilities taken for weights")
def log_weights(student_logits, indices, log_probs):
    w = torch.zeros_like(student_logits).scatter(0, indices, log_probs)
    return student_logits.softmax(-1) * w.sum() - w


# --- 11.3 drawn_loss ---


def by_rows(student_logits, drawn, log_probs, loss):
    """loss(log p_s of the whole vocabulary, draws, {id: p_t}) of each token."""
    found = []
    for z, ids, lps in zip(student_logits, drawn.tolist(), log_probs, strict=True):
        p = dict(zip(ids, lps.exp().tolist(), strict=True))
        found.append(loss((z - z.exp().sum().log()).tolist(), ids, p))
    return found


@honest("11.3")
def by_counts(*args):
    def loss(log_s, ids, p):
        counts = Counter(ids)
        return -sum(c / len(ids) * log_s[v] for v, c in counts.items())

    return by_rows(*args, loss)


@honest("11.3")
def by_torch(student_logits, drawn, log_probs):
    n, k = drawn.shape
    many = student_logits[:, None].expand(n, k, -1).reshape(n * k, -1)
    losses = torch.nn.functional.cross_entropy(many, drawn.flatten(), reduction="none")
    return losses.view(n, k).mean(1)


@honest("11.3")
def by_kdlib(student_logits, drawn, log_probs):
    from kdlib.sparse import sparse_divergence
    from kdlib.sparse_targets import SparseTargets

    weights = torch.full_like(log_probs, 1 / drawn.shape[1])
    targets = SparseTargets(drawn, log_probs, "zero", weights=weights)
    return sparse_divergence(student_logits, targets, "cross_entropy")


@honest("11.3")
def drawn_in_float32(student_logits, drawn, log_probs):
    return by_torch(student_logits.float(), drawn, log_probs)


@wrong("11.3", "teacher counted twice", 0, "importance weights without a proposal")
def squared_teacher(*args):
    return by_rows(*args, lambda s, ids, p: -sum(p[v] * s[v] for v in ids) / len(ids))


@wrong("11.3", "draws weighted and renormalised", 0)
def weighted_draws(*args):
    return by_rows(
        *args,
        lambda s, ids, p: -sum(p[v] * s[v] for v in ids) / sum(p[v] for v in ids),
    )


@wrong("11.3", "repeats dropped", 2)
def unique_draws(*args):
    return by_rows(
        *args, lambda s, ids, p: -sum(s[v] for v in set(ids)) / len(set(ids))
    )


@wrong("11.3", "renormalised on what was drawn", 0)
def top_k_of_draws(*args):
    return by_rows(
        *args, lambda s, ids, p: -sum(p[v] * s[v] for v in p) / sum(p.values())
    )


@wrong("11.3", "cut sum of what was drawn", 0)
def cut_of_draws(*args):
    return by_rows(*args, lambda s, ids, p: -sum(p[v] * s[v] for v in p))


@wrong("11.3", "student's softmax on the draws", 0)
def small_softmax(student_logits, drawn, log_probs):
    few = student_logits.gather(1, drawn)
    return (few.exp().sum(1).log()[:, None] - few).mean(1)


@wrong("11.3", "sum for mean", 0)
def summed(student_logits, drawn, log_probs):
    return by_torch(student_logits, drawn, log_probs) * drawn.shape[1]


@wrong("11.3", "KL for cross-entropy", 0)
def with_the_teacher(student_logits, drawn, log_probs):
    return (log_probs - student_logits.log_softmax(-1).gather(1, drawn)).mean(1)


@wrong("11.3", "sign", 0)
def log_likelihood(*args):
    return -by_torch(*args)


@wrong("11.3", "wrong shape", 0, "the mean over tokens taken as well")
def one_number(*args):
    return by_torch(*args).mean()


# --- 11.4 calibration_error ---


def binned(confidence, hits, bins, last=True):
    """The (confidence, hit) pairs of each bin, empty ones included."""
    found = [[] for _ in range(bins)]
    for c, h in zip(confidence.tolist(), hits.tolist(), strict=True):
        b = int(c * bins)
        if b == bins and last:
            b -= 1
        if b < bins:
            found[b].append((c, h))
    return found


def gap(members):
    return sum(c - h for c, h in members) / len(members)


@honest("11.4")
def bin_by_bin(confidence, hits, bins):
    found = [m for m in binned(confidence, hits, bins) if m]
    return sum(len(m) / len(hits) * abs(gap(m)) for m in found)


@honest("11.4")
def by_bincount(confidence, hits, bins):
    place = (confidence * bins).floor().long().clamp(0, bins - 1)
    sums = torch.bincount(place, confidence - hits, bins)
    return sums.abs().sum() / len(hits)


@honest("11.4")
def by_digitize(confidence, hits, bins):
    c, h = confidence.numpy(), hits.numpy()
    place = np.minimum(np.digitize(c, np.linspace(0, 1, bins + 1)), bins) - 1
    return sum(abs((c - h)[place == b].sum()) for b in range(bins)) / len(c)


@wrong("11.4", "bins weighed alike", 1)
def mean_of_gaps(confidence, hits, bins):
    found = [abs(gap(m)) for m in binned(confidence, hits, bins) if m]
    return sum(found) / len(found)


@wrong("11.4", "empty bins counted", 1)
def mean_over_all_bins(confidence, hits, bins):
    return sum(abs(gap(m)) for m in binned(confidence, hits, bins) if m) / bins


@wrong("11.4", "gaps cancel", 0)
def signed(confidence, hits, bins):
    return (confidence - hits).mean()


@wrong("11.4", "gaps cancel", 1)
def absolute_at_the_end(confidence, hits, bins):
    return (confidence.mean() - hits.mean()).abs()


@wrong("11.4", "token by token", 0)
def no_bins(confidence, hits, bins):
    return (confidence - hits).abs().mean()


@wrong("11.4", "largest gap", 1)
def maximum(confidence, hits, bins):
    return max(abs(gap(m)) for m in binned(confidence, hits, bins) if m)


@wrong("11.4", "certain tokens lost", 3, "bins that are open on the right, all of them")
def last_edge_open(confidence, hits, bins):
    found = [m for m in binned(confidence, hits, bins, last=False) if m]
    return sum(len(m) / len(hits) * abs(gap(m)) for m in found)


@wrong("11.4", "bins of equal size", 1)
def by_quantiles(confidence, hits, bins):
    order, n = confidence.argsort().tolist(), len(hits)
    total = 0.0
    for b in range(bins):
        mine = [i for rank, i in enumerate(order) if rank * bins // n == b]
        total += abs(sum((confidence[i] - hits[i]).item() for i in mine))
    return total / n


@wrong("11.4", "middle of the bin", 0)
def middles(confidence, hits, bins):
    total = 0.0
    for b, m in enumerate(binned(confidence, hits, bins)):
        total += abs(len(m) * (b + 0.5) / bins - sum(h for _, h in m))
    return total / len(hits)


@wrong("11.4", "squared", 0)
def mean_square(confidence, hits, bins):
    found = [m for m in binned(confidence, hits, bins) if m]
    return sum(len(m) / len(hits) * gap(m) ** 2 for m in found)


@wrong("11.4", "squared", 1)
def root_mean_square(*args):
    return mean_square(*args) ** 0.5


@wrong("11.4", "constant factor", 0, "in percent, as papers print it")
def percent(*args):
    return 100 * bin_by_bin(*args)


@wrong("11.4", "not finite", 1, "an empty bin divided by its size")
def empty_bins(confidence, hits, bins):
    place = (confidence * bins).long().clamp(max=bins - 1)
    total = torch.zeros((), dtype=confidence.dtype)
    for b in range(bins):
        mine = place == b
        weight = mine.double().mean()
        total += weight * (confidence[mine].mean() - hits[mine].mean()).abs()
    return total


# --- 11.5 forecasts ---

GUESS = {"bytes": 388, "disk": 0.8, "sure": 0.7, "below": 0.35, "draws": 36}
HONEST += [
    ("11.5", GUESS),
    ("11.5", {"bytes": 400, "disk": 1, "sure": 0.75, "below": 0.3, "draws": 40}),
    ("11.5", {key: np.float32(value) for key, value in GUESS.items()}),
]
for key, value, bug in [
    ("bytes", 6, "one entry"),
    ("bytes", 3104, "bits"),
    ("bytes", 303_872, "whole vocabulary"),
    ("disk", 776, "gigabytes"),
    ("disk", 0.388, "one billion"),
    ("sure", 0.35, "as the teacher"),
    ("sure", 0.175, "times the mass"),
    ("below", 0.69, "log of the mass"),
    ("below", 0.125, "favourite alone"),
    ("draws", 12, "deviation as 1/n"),
    ("draws", 9, "factor alone"),
    ("draws", 1000, None),
]:
    WRONG.append(("11.5", GUESS | {key: value}, "wrong", bug, 4.5, ""))
for value, bug in [
    (..., "incomplete"),
    ("many", "wrong type"),
    (-1, "not positive"),
    (float("inf"), "not finite"),
]:
    WRONG.append(("11.5", GUESS | {"bytes": value}, "wrong", bug, 4, ""))

# --- 11.6 what_the_box_hides ---

KEY = {"a": "B", "b": "C", "c": "A", "d": "B", "e": "C"}
HONEST += [("11.6", KEY), ("11.6", {k: f" {v.lower()}" for k, v in KEY.items()})]
for item, right in KEY.items():
    for letter in sorted(set("ABC") - {right}):
        WRONG.append(("11.6", KEY | {item: letter}, "wrong", f"{item} {letter}", 4, ""))
for value, bug in [("D", "no such option"), (1, "no such option"), (..., "incomplete")]:
    WRONG.append(("11.6", KEY | {"a": value}, "wrong", bug, 4, ""))
