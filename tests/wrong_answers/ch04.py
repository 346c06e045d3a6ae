"""Answers to the exercises of chapter 4: wrong ones, and honest variants of right ones.

A wrong answer comes with its provenance, the outcome and the bug's name that the
checker must give, and the points that are left.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F
from wrong_answers.collect import collectors

WRONG, HONEST, wrong, honest = collectors()


# --- 4.1 soft_cross_entropy ---


def cut(s, t):
    v = min(s.shape[1], t.shape[1])
    return s[:, :v], t[:, :v]


def safe(p, log_q):
    return torch.where(p > 0, log_q, torch.zeros_like(log_q))


@honest("4.1")
def right_soft(s, t):
    s, t = cut(s, t)
    p = t.softmax(-1)
    return -(p * safe(p, s.log_softmax(-1))).sum(-1)


@honest("4.1")
def by_torch(s, t):
    s, t = cut(s, t)
    s = s.masked_fill(s == -math.inf, -1e30)
    return F.cross_entropy(s, t.softmax(-1), reduction="none")


@honest("4.1")
def by_log_sum_exp(s, t):
    """log sum exp(z) - p.z, as in its derivation."""
    s, t = cut(s, t)
    p = t.softmax(-1)
    return s.logsumexp(-1) - (p * safe(p, s)).sum(-1)


@honest("4.1")
def in_float32(s, t):
    return right_soft(s.float(), t.float())


@honest("4.1")
def row_by_row(s, t):
    found = []
    for a, b in zip(*cut(s, t), strict=True):
        keep = b > -math.inf
        p, log_q = b[keep].softmax(0), a[keep].log_softmax(0)
        found.append(-float(p @ log_q))
    return found


@honest("4.1")
def in_numpy(s, t):
    s, t = (x.numpy() for x in cut(s, t))
    p = np.exp(t - t.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    shifted = s - s.max(1, keepdims=True)
    log_q = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return -np.where(p > 0, p * np.where(p > 0, log_q, 0), 0).sum(1)


@honest("4.1")
def masked_padding(s, t):
    """The shorter side filled up with -inf, and the longer one's excess set to it."""
    v, width = min(s.shape[1], t.shape[1]), max(s.shape[1], t.shape[1])
    s, t = (F.pad(x[:, :v], (0, width - v), value=-math.inf) for x in (s, t))
    return right_soft(s, t)


@wrong("4.1", "minus sign missing", 0, "Imagination-Augmented-Agents#6")
def no_minus(s, t):
    return -right_soft(s, t)


@wrong("4.1", "mean over the vocabulary", 0, "GMvandeVen/continual-learning#5")
def mean_over_v(s, t):
    return right_soft(s, t) / cut(s, t)[0].shape[1]


@wrong("4.1", "entropy subtracted", 1, "attention-transfer#12")
def kl(s, t):
    s, t = cut(s, t)
    return right_soft(s, t) - right_soft(t, t)


@wrong("4.1", "roles swapped", 0)
def swapped(s, t):
    return right_soft(t, s)


@wrong("4.1", "student left out", 0, "labmlai#66")
def entropy(s, t):
    s, t = cut(s, t)
    return right_soft(t, t)


@wrong("4.1", "no logarithm", 0, "microsoft/ProDA#43")
def probabilities(s, t):
    s, t = cut(s, t)
    return -(t.softmax(-1) * s.softmax(-1)).sum(-1)


@wrong("4.1", "bits for nats", 0)
def bits(s, t):
    return right_soft(s, t) / math.log(2)


@wrong("4.1", "softmax twice", 0, "tflearn/tflearn#562")
def twice(s, t):
    s, t = cut(s, t)
    return F.cross_entropy(s.softmax(-1), t.softmax(-1), reduction="none")


@wrong("4.1", "softmax over the tokens", 0, "Lackel/DPN#1")
def over_rows(s, t):
    s, t = cut(s, t)
    return -(t.softmax(0) * s.log_softmax(0)).sum(-1)


@wrong("4.1", "favourite for the distribution", 1)
def argmax(s, t):
    s, t = cut(s, t)
    return F.cross_entropy(s, t.argmax(-1), reduction="none")


@wrong("4.1", "padding normalised", 3)
def late_cut(s, t):
    p, log_q = t.softmax(-1), s.log_softmax(-1)
    v = min(p.shape[1], log_q.shape[1])
    p, log_q = p[:, :v], log_q[:, :v]
    return -(p * safe(p, log_q)).sum(-1)


@wrong("4.1", "padding filled up", 3, "linkedin/Liger-Kernel#634")
def zeros(s, t):
    width = max(s.shape[1], t.shape[1])
    s, t = (F.pad(x, (0, width - x.shape[1])) for x in (s, t))
    return right_soft(s, t)


@wrong("4.1", "not finite", 3, "OpenBMB/ModelCenter#14, google-deepmind/optax#896")
def nan_at_masked(s, t):
    s, t = cut(s, t)
    return -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)


@wrong("4.1", "not finite", 3, "summerlvsong/Aggregation-Cross-Entropy#2")
def log_of_softmax(s, t):
    s, t = cut(s, t)
    p = t.softmax(-1)
    return -(p * safe(p, s.softmax(-1).log())).sum(-1)


@wrong("4.1", "not finite", 3, "exp of a large logit")
def naive_exp(s, t):
    s, t = cut(s, t)
    p = t.exp() / t.exp().sum(-1, keepdim=True)
    q = s.exp() / s.exp().sum(-1, keepdim=True)
    return -(p * safe(p, q.log())).sum(-1)


@wrong("4.1", "raised", 3, "LMOps#286, torchtune#2119", "raised")
def one_vocabulary(s, t):
    p = t.softmax(-1)
    return -(p * safe(p, s.log_softmax(-1))).sum(-1)


@wrong("4.1", "wrong shape", 0, "a mean over the tokens as well")
def one_number(s, t):
    return right_soft(s, t).mean()


@wrong("4.1", "changes its input", 3, "masked_fill_ on the caller's logits")
def fills(s, t):
    s.masked_fill_(s == -math.inf, -1e30)
    t.masked_fill_(t == -math.inf, -1e30)
    return right_soft(s, t)


@wrong("4.1", "half precision", 0)
def bfloat16(s, t):
    return right_soft(s, t).bfloat16()


# --- 4.2 batch_gradient ---


def supervised(labels):
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != -100
    return mask


def count(labels):
    return (labels[:, 1:] != -100).sum()


def gradient(s, t, labels, temperature, target=None, scale=None, mask=None, n=None):
    target = (t / temperature).softmax(-1) if target is None else target
    gap = (s / temperature).softmax(-1) - target
    mask = supervised(labels) if mask is None else mask
    scale = temperature if scale is None else scale
    n = count(labels) if n is None else n
    return scale * gap * mask[..., None] / n


HONEST.append(("4.2", gradient))


@honest("4.2")
def by_autograd(s, t, labels, temperature):
    s = s.clone().requires_grad_()
    keep = labels[:, 1:] != -100
    log_q = (s / temperature).log_softmax(-1)[:, :-1][keep]
    p = (t / temperature).softmax(-1)[:, :-1][keep]
    loss = -(temperature**2) * (p * log_q).sum(-1).mean()
    return torch.autograd.grad(loss, s)[0]


@honest("4.2")
def by_kl_div(s, t, labels, temperature):
    s = s.clone().requires_grad_()
    keep = labels[:, 1:] != -100
    log_q = (s / temperature).log_softmax(-1)[:, :-1][keep]
    log_p = (t / temperature).log_softmax(-1)[:, :-1][keep]
    loss = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return torch.autograd.grad(temperature**2 * loss, s)[0]


@honest("4.2")
def gradient_float32(s, t, labels, temperature):
    return gradient(s.float(), t.float(), labels, temperature)


@honest("4.2")
def gradient_loop(s, t, labels, temperature):
    found = torch.zeros_like(s)
    n = 0
    for row in range(len(labels)):
        for i in range(1, labels.shape[1]):
            if labels[row, i] >= 0:
                n += 1
                p_s = torch.softmax(s[row, i - 1] / temperature, 0)
                p_t = torch.softmax(t[row, i - 1] / temperature, 0)
                found[row, i - 1] = p_s - p_t
    return (found * temperature / n).numpy()


def scaled(power):
    return lambda s, t, labels, T: gradient(s, t, labels, T, scale=T**power)


for bug, power, provenance in [
    ("T^2 missing", -1, "IntelLabs/distiller#122"),
    ("T forgotten in the scale", 0, ""),
    ("1/T missing", 2, ""),
    ("T^2 twice", 3, ""),
]:
    WRONG.append(("4.2", scaled(power), "wrong", bug, 3, provenance))


@wrong("4.2", "sign", 0)
def upwards(s, t, labels, T):
    return -gradient(s, t, labels, T)


@wrong("4.2", "mean over the vocabulary", 0, "GMvandeVen/continual-learning#5")
def over_v(s, t, labels, T):
    return gradient(s, t, labels, T, n=count(labels) * s.shape[-1])


@wrong("4.2", "sum for the mean", 0)
def summed(s, t, labels, T):
    return gradient(s, t, labels, T, n=1)


@wrong("4.2", "all positions counted", 0, "ServiceNow/Fast-LLM#344")
def every_position(s, t, labels, T):
    return gradient(s, t, labels, T, n=labels.numel())


@wrong("4.2", "padding counted", 1, "ServiceNow/Fast-LLM#344")
def masked_terms_counted(s, t, labels, T):
    return gradient(s, t, labels, T, n=labels[:, 1:].numel())


@wrong("4.2", "divided by the rows", 0, "batchmean over [B, L, V]")
def batchmean(s, t, labels, T):
    return gradient(s, t, labels, T, n=len(labels))


@wrong("4.2", "mean of the rows' means", 1, "meta-pytorch/torchtune#1865")
def rows_mean(s, t, labels, T):
    mask = supervised(labels)
    n = mask.sum(1)[:, None, None] * len(labels)
    return gradient(s, t, labels, T, n=n)


@wrong("4.2", "not shifted", 0, "arcee-ai/DistillKit, museum 1")
def unshifted(s, t, labels, T):
    return gradient(s, t, labels, T, mask=labels != -100)


@wrong("4.2", "shifted the wrong way", 0)
def to_the_right(s, t, labels, T):
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, 1:] = labels[:, :-1] != -100
    return gradient(s, t, labels, T, mask=mask)


@wrong("4.2", "mask forgotten", 1, "peremartra/optipfair#34")
def everything(s, t, labels, T):
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[:, -1] = False
    return gradient(s, t, labels, T, mask=mask, n=labels[:, 1:].numel())


@wrong("4.2", "teacher on both sides", 0, "labmlai#66")
def no_difference(s, t, labels, T):
    return gradient(t, t, labels, T)


@wrong("4.2", "teacher at temperature 1", 3)
def sharp_teacher(s, t, labels, T):
    return gradient(s, t, labels, T, target=t.softmax(-1))


@wrong("4.2", "student at temperature 1", 3)
def sharp_student(s, t, labels, T):
    return gradient(T * s, t, labels, T)


@wrong("4.2", "softmax over the positions", 0, "structure_knowledge_distillation#11")
def over_positions(s, t, labels, T):
    gap = (s / T).softmax(1) - (t / T).softmax(1)
    return T * gap * supervised(labels)[..., None] / count(labels)


@wrong("4.2", "logarithms subtracted", 0)
def log_gap(s, t, labels, T):
    gap = (s / T).log_softmax(-1) - (t / T).log_softmax(-1)
    return T * gap * supervised(labels)[..., None] / count(labels)


@wrong("4.2", "labels for the teacher", 0)
def hard_labels(s, t, labels, T):
    hot = torch.zeros_like(s)
    ids = labels[:, 1:].clamp(min=0)
    hot[:, :-1] = F.one_hot(ids, s.shape[-1]).double()
    return gradient(s, t, labels, T, target=hot)


@wrong("4.2", "favourite for the distribution", 0)
def hard_teacher(s, t, labels, T):
    hot = F.one_hot(t.argmax(-1), t.shape[-1])
    return gradient(s, t, labels, T, target=hot)


@wrong("4.2", "reverse KL", 0)
def reverse(s, t, labels, T):
    s = s.clone().requires_grad_()
    keep = supervised(labels)
    log_q, log_p = (s / T).log_softmax(-1), (t / T).log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    return torch.autograd.grad(T**2 * kl[keep].mean(), s)[0]


@wrong("4.2", "wrong shape", 0, "only the supervised rows")
def selected(s, t, labels, T):
    return gradient(s, t, labels, T)[supervised(labels)]


@wrong("4.2", "changes its input", 0, "s /= T")
def in_place(s, t, labels, T):
    s -= s.logsumexp(-1, keepdim=True)
    return gradient(s, t, labels, T)


# --- 4.3 best_smoothing ---


def parts(p):
    s, v = p.square().sum(-1), p.shape[-1]
    return 1 - s, s - 1 / v, v  # noise, bias, V


@honest("4.3")
def ratio(p):
    noise, bias, _ = parts(p)
    return noise / (noise + bias)


@honest("4.3")
def many_small_terms(p):
    """The noise as the chance that two draws differ."""
    v = p.shape[-1]
    differ = (p[:, :, None] * p[:, None, :] * (1 - torch.eye(v))).sum((1, 2))
    return differ * v / (v - 1)


@honest("4.3")
def vertex(p):
    """The lowest point of a parabola through three of its points."""
    u = torch.full_like(p, 1 / p.shape[-1])
    noise = 1 - (p * p).sum(-1)

    def error(e):
        bias = ((1 - e) * p + e * u - p).square().sum(-1)
        return bias + (1 - e) ** 2 * noise

    a, b, c = error(0.0), error(0.5), error(1.0)
    return (3 * a - 4 * b + c) / (4 * a - 8 * b + 4 * c)


@honest("4.3")
def smoothing_float32(p):
    return ratio(p.float())


@honest("4.3")
def as_lists(p):
    v = p.shape[-1]
    return [(1 - sum(x * x for x in row)) / (1 - 1 / v) for row in p.tolist()]


@wrong("4.3", "1/V forgotten", 0)
def noise_alone(p):
    return parts(p)[0]


@wrong("4.3", "bias and noise swapped", 0)
def weight_of_the_label(p):
    noise, bias, _ = parts(p)
    return bias / (noise + bias)


@wrong("4.3", "noise scaled once", 0)
def linear_noise(p):
    noise, bias, _ = parts(p)
    return noise / (2 * bias)


@wrong("4.3", "noise left out", 0)
def no_smoothing(p):
    return torch.zeros(len(p))


@wrong("4.3", "bias left out", 0)
def all_smoothing(p):
    return [1.0] * len(p)


@wrong("4.3", "unit vector for the uniform", 0)
def unit(p):
    noise, _, v = parts(p)
    return noise / (noise + p.square().sum(-1) - 2 / v + 1)


@wrong("4.3", "dot product left out", 0)
def no_dot(p):
    noise, _, v = parts(p)
    return noise / (noise + p.square().sum(-1) + 1 / v)


@wrong("4.3", "favourite for the label", 0)
def one_minus_largest(p):
    return 1 - p.max(-1).values


@wrong("4.3", "entropy for the noise", 0)
def relative_entropy(p):
    h = -torch.special.xlogy(p, p).sum(-1)
    return h / math.log(p.shape[-1])


@wrong("4.3", "standard deviation", 0)
def root(p):
    return ratio(p).sqrt()


@wrong("4.3", "wrong shape", 0, "one strength for all, as in a recipe")
def one_for_all(p):
    return ratio(p).mean()


# --- 4.4 label_noise_share ---


def noises(s, t):
    p_s, p_t = s.softmax(-1), t.softmax(-1)
    label = (1 - (p_t**2).sum(-1)).mean()
    gap = p_s - p_t
    return label, (gap - gap.mean(0)).square().sum(-1).mean(), p_s, p_t


@honest("4.4")
def share(s, t):
    label, inputs, *_ = noises(s, t)
    return label / (label + inputs)


@honest("4.4")
def by_enumeration(s, t):
    """Every pair of input and label, with its probability."""
    p_s, p_t = s.softmax(-1), t.softmax(-1)
    n, v = s.shape
    g = (p_s[:, None] - torch.eye(v, dtype=s.dtype)).reshape(n * v, v)
    w = (p_t / n).reshape(n * v, 1)
    total = (w * (g - (w * g).sum(0)).square()).sum()
    return (1 - p_t.square().sum(-1)).mean() / total


@honest("4.4")
def by_var(s, t):
    label, _, p_s, p_t = noises(s, t)
    inputs = (p_s - p_t).var(0, correction=0).sum()
    return float(label / (label + inputs))


@honest("4.4")
def share_float32(s, t):
    return share(s.float(), t.float())


@honest("4.4")
def mean_of_squares(s, t):
    label, _, p_s, p_t = noises(s, t)
    gap = p_s - p_t
    inputs = gap.square().sum(-1).mean() - gap.mean(0).square().sum()
    return label / (label + inputs)


@wrong("4.4", "mean gap left in", 0)
def second_moment(s, t):
    label, _, p_s, p_t = noises(s, t)
    return label / (label + (p_s - p_t).square().sum(-1).mean())


@wrong("4.4", "inputs' share", 0)
def other_part(s, t):
    return 1 - share(s, t)


@wrong("4.4", "ratio, not share", 0)
def odds(s, t):
    label, inputs, *_ = noises(s, t)
    return label / inputs


@wrong("4.4", "label's variance alone", 0)
def label_part(s, t):
    return noises(s, t)[0]


@wrong("4.4", "standard deviations", 1)
def roots(s, t):
    label, inputs, *_ = noises(s, t)
    return label.sqrt() / (label.sqrt() + inputs.sqrt())


@wrong("4.4", "student's noise", 1)
def student_draws(s, t):
    _, inputs, p_s, _ = noises(s, t)
    label = (1 - p_s.square().sum(-1)).mean()
    return label / (label + inputs)


@wrong("4.4", "teacher left out of the gap", 0)
def student_alone(s, t):
    label, _, p_s, _ = noises(s, t)
    return label / (label + p_s.var(0, correction=0).sum())


@wrong("4.4", "mean distribution", 1)
def of_the_mean(s, t):
    _, inputs, _, p_t = noises(s, t)
    label = 1 - p_t.mean(0).square().sum()
    return label / (label + inputs)


@wrong("4.4", "favourite for the label", 1)
def bias_of_favourite(s, t):
    _, inputs, _, p_t = noises(s, t)
    hot = F.one_hot(p_t.argmax(-1), p_t.shape[-1])
    label = (hot - p_t).square().sum(-1).mean()
    return label / (label + inputs)


@wrong("4.4", "divided by N - 1", 0)
def sample_variance(s, t):
    label, _, p_s, p_t = noises(s, t)
    return label / (label + (p_s - p_t).var(0).sum())


@wrong("4.4", "wrong shape", 0)
def per_input(s, t):
    _, inputs, _, p_t = noises(s, t)
    label = 1 - p_t.square().sum(-1)
    return label / (label + inputs)


# --- 4.5 losses_in_nats ---

GUESS = {"start": 12, "best": 1.4, "bold": 3.5, "noise": 0.75, "labels": 75}
HONEST += [
    ("4.5", GUESS),
    ("4.5", {"start": 10, "best": 1.2, "bold": 3, "noise": 0.8, "labels": 100}),
    ("4.5", {key: torch.tensor(float(value)) for key, value in GUESS.items()}),
]
for key, value, bug in [
    ("start", 5.2, "decimal logarithm"),
    ("start", 1.386, "floor for the start"),
    ("best", 0.6, "decimal logarithm"),
    ("best", 4, "choices for nats"),
    ("bold", 0.03, "favourite's loss alone"),
    ("bold", 0.17, "student's mean"),
    ("bold", 13.8, "sum for the mean"),
    ("noise", 0.25, "largest probability"),
    ("noise", 0.19, "one entry only"),
    ("labels", 8.7, "standard deviation"),
    ("labels", 7500, "variance against deviation"),
    ("labels", 4, None),
]:
    WRONG.append(("4.5", GUESS | {key: value}, "wrong", bug, 4.5, ""))
for value, bug in [
    (..., "incomplete"),
    ("1 nat", "wrong type"),
    (0, "not positive"),
    (float("inf"), "not finite"),
]:
    WRONG.append(("4.5", GUESS | {"best": value}, "wrong", bug, 4, ""))

# --- 4.6 which_target ---

KEY = {"a": "B", "b": "C", "c": "A", "d": "B", "e": "A"}
HONEST += [("4.6", KEY), ("4.6", {k: f" {v.lower()}" for k, v in KEY.items()})]
for item, right in KEY.items():
    for letter in sorted(set("ABC") - {right}):
        given = KEY | {item: letter}
        WRONG.append(("4.6", given, "wrong", f"{item} {letter}", 4, ""))
for value, bug in [("D", "no such option"), (None, "incomplete")]:
    WRONG.append(("4.6", KEY | {"a": value}, "wrong", bug, 4, ""))
