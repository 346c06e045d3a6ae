"""Answers to the exercises of chapter 5: wrong ones, and honest variants of right ones.

A wrong answer comes with its provenance, the outcome and the bug's name that the
checker must give, and the points that are left.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F
from wrong_answers.collect import collectors

from kdlib.divergences import forward_kl, generalized_jsd
from kdlib.estimators import estimate

WRONG, HONEST, wrong, honest = collectors()


# --- 5.1 forward_kl_loss ---


def cut(student, teacher):
    shared = min(student.shape[-1], teacher.shape[-1])
    return student[..., :shared], teacher[..., :shared]


def logs(student, teacher, temperature):
    student, teacher = cut(student, teacher)
    return (x.div(temperature).log_softmax(-1) for x in (student, teacher))


def present(log_p, log_q):
    """Elementwise p (log p - log q), 0 where p is 0."""
    zero = log_p == -torch.inf
    gap = log_p.masked_fill(zero, 0.0) - log_q.masked_fill(zero, 0.0)
    return log_p.exp() * gap


@wrong("5.1", "direction swapped", 0, "paiml/aprender#2153")
def swapped(student, teacher, temperature):
    log_ps, log_pt = logs(student, teacher, temperature)
    return present(log_ps, log_pt).sum(-1).mean()


@wrong("5.1", "entropy not subtracted", 0, "jongwooko/distillm#7")
def soft_cross_entropy(student, teacher, temperature):
    log_ps, log_pt = logs(student, teacher, temperature)
    products = log_pt.exp() * log_ps.masked_fill(log_ps == -torch.inf, 0.0)
    return -products.sum(-1).mean()


@wrong(
    "5.1",
    "probabilities for log-probabilities",
    0,
    "microsoft/ProDA#20, sebastian-hofstaetter/matchmaker#18",
)
def softmax_as_input(student, teacher, temperature):
    log_ps, log_pt = logs(student, teacher, temperature)
    per_token = F.kl_div(log_ps.exp(), log_pt.exp(), reduction="none").sum(-1)
    return per_token.mean()


@wrong("5.1", "mean over the vocabulary", 0, "haitongli#48, facebookresearch/deit#61")
def torch_mean(student, teacher, temperature):
    log_ps, log_pt = logs(student, teacher, temperature)
    finite = log_ps.masked_fill(log_ps == -torch.inf, 0.0)
    return F.kl_div(finite, log_pt.exp(), reduction="mean")


@wrong("5.1", "divided by the sequences alone", 0, "huggingface/transformers#1181")
def torch_batchmean(student, teacher, temperature):
    log_ps, log_pt = logs(student, teacher, temperature)
    finite = log_ps.masked_fill(log_ps == -torch.inf, 0.0)
    return F.kl_div(finite, log_pt.exp(), reduction="batchmean")


@wrong("5.1", "sum over the tokens", 0)
def no_mean(student, teacher, temperature):
    log_ps, log_pt = logs(student, teacher, temperature)
    return present(log_pt, log_ps).sum()


@wrong("5.1", "softmax over the positions", 0, "salesforce/ALBEF#58")
def dimension_one(student, teacher, temperature):
    student, teacher = cut(student, teacher)
    log_ps = (student / temperature).log_softmax(1)
    log_pt = (teacher / temperature).log_softmax(-1)
    return present(log_pt, log_ps).sum(-1).mean()


@wrong("5.1", "padded with zeros", 2.0, "arcee-ai/DistillKit#37, Liger")
def zero_padding(student, teacher, temperature):
    width = max(student.shape[-1], teacher.shape[-1])
    student, teacher = (F.pad(x, (0, width - x.shape[-1])) for x in (student, teacher))
    log_ps, log_pt = logs(student, teacher, temperature)
    return present(log_pt, log_ps).sum(-1).mean()


@wrong("5.1", "cut after the softmax", 2)
def cut_too_late(student, teacher, temperature):
    log_ps, log_pt = cut(
        (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    )
    return present(log_pt, log_ps).sum(-1).mean()


@wrong("5.1", "only the teacher softened", 2)
def soft_teacher(student, teacher, temperature):
    return right_kl(student * temperature, teacher, temperature)


@wrong("5.1", "only the student softened", 2)
def soft_student(student, teacher, temperature):
    return right_kl(student, teacher * temperature, temperature)


@wrong("5.1", "temperature not used", 2)
def no_temperature(student, teacher, temperature):
    return right_kl(student, teacher, 1.0)


@wrong("5.1", "multiplied by T squared", 2)
def with_t_squared(student, teacher, temperature):
    return temperature**2 * right_kl(student, teacher, temperature)


@wrong("5.1", "not finite", 0, "the target's logarithm, without log_target=True")
def log_target_forgotten(student, teacher, temperature):
    log_ps, log_pt = logs(student, teacher, temperature)
    return F.kl_div(log_ps, log_pt, reduction="none").sum(-1).mean()


@wrong("5.1", "not finite", 3, "p-e-w/heretic#348")
def infinity_minus_infinity(student, teacher, temperature):
    log_ps, log_pt = logs(student, teacher, temperature)
    kl = F.kl_div(log_ps, log_pt, reduction="none", log_target=True)
    return kl.sum(-1).mean()


@wrong("5.1", "raised", 2, "Model-Optimizer#2489, torchtune#2502", "raised")
def equal_widths_only(student, teacher, temperature):
    log_ps = (student / temperature).log_softmax(-1)
    log_pt = (teacher / temperature).log_softmax(-1)
    return present(log_pt, log_ps).sum(-1).mean()


@wrong("5.1", "changes its input", 2, "/= on the caller's logits")
def divides_in_place(student, teacher, temperature):
    student /= temperature
    teacher /= temperature
    return right_kl(student, teacher, 1.0)


@wrong("5.1", "wrong shape", 0, "the mean forgotten")
def per_position(student, teacher, temperature):
    log_ps, log_pt = logs(student, teacher, temperature)
    return present(log_pt, log_ps).sum(-1)


@honest("5.1")
def right_kl(student, teacher, temperature):
    log_ps, log_pt = logs(student, teacher, temperature)
    return present(log_pt, log_ps).sum() / log_ps[..., 0].numel()


@honest("5.1")
def from_kdlib(student, teacher, temperature):
    return forward_kl(student, teacher, temperature=temperature).mean()


@honest("5.1")
def in_float32(student, teacher, temperature):
    return right_kl(student.float(), teacher.float(), temperature)


@honest("5.1")
def by_torch(student, teacher, temperature):
    log_ps, log_pt = logs(student, teacher, temperature)
    finite = log_ps.masked_fill(log_ps == -torch.inf, 0.0)
    flat = finite.flatten(0, 1), log_pt.exp().flatten(0, 1)
    return F.kl_div(*flat, reduction="batchmean")


@honest("5.1")
def with_a_mask_before(student, teacher, temperature):
    """The tokens that are ruled out are taken away first, row by row."""
    student, teacher = cut(student, teacher)
    total, rows = 0.0, 0
    for s, t in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True):
        kept = s > -torch.inf
        p = F.softmax(t[kept] / temperature, -1)
        q = F.softmax(s[kept] / temperature, -1)
        total, rows = total + (p * (p / q).log()).sum(), rows + 1
    return total / rows


@honest("5.1")
def in_numpy(student, teacher, temperature):
    s, t = (x.numpy() / temperature for x in cut(student, teacher))
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (t, s))
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    terms = p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1))
    return terms.sum(-1).mean()


# --- 5.2 reverse_kl_gradient ---


def softmaxes(student, teacher, temperature):
    return (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)


@wrong("5.2", "gradient of forward KL", 0)
def forward_gradient(student, teacher, temperature):
    p_s, p_t = softmaxes(student, teacher, temperature)
    return (p_s - p_t) / temperature


@wrong("5.2", "sampling distribution held fixed", 0, "NVIDIA-NeMo/RL#2506, by samples")
def weight_detached(student, teacher, temperature):
    leaf = student.clone().requires_grad_()
    log_ps = (leaf / temperature).log_softmax(-1)
    log_pt = (teacher / temperature).log_softmax(-1)
    loss = (log_ps.exp().detach() * (log_ps - log_pt)).sum()
    return torch.autograd.grad(loss, leaf)[0]


@wrong("5.2", "average not subtracted", 0)
def no_average(student, teacher, temperature):
    p_s, p_t = softmaxes(student, teacher, temperature)
    return p_s * (p_s / p_t).log() / temperature


@wrong("5.2", "the 1 kept", 0)
def with_the_one(student, teacher, temperature):
    p_s, _ = softmaxes(student, teacher, temperature)
    return right_gradient(student, teacher, temperature) + p_s / temperature


@wrong("5.2", "by the probabilities", 0)
def before_the_softmax(student, teacher, temperature):
    p_s, p_t = softmaxes(student, teacher, temperature)
    return ((p_s / p_t).log() + 1) / temperature


@wrong("5.2", "by the teacher's logits", 0, "huggingface/sentence-transformers#3757")
def by_the_teacher(student, teacher, temperature):
    p_s, p_t = softmaxes(student, teacher, temperature)
    return (p_t - p_s) / temperature


@wrong("5.2", "student's entropy forgotten", 0)
def cross_term_only(student, teacher, temperature):
    leaf = student.clone().requires_grad_()
    p_s = (leaf / temperature).softmax(-1)
    loss = -(p_s * (teacher / temperature).log_softmax(-1)).sum()
    return torch.autograd.grad(loss, leaf)[0]


@wrong("5.2", "wrong sign", 0)
def downhill(student, teacher, temperature):
    return -right_gradient(student, teacher, temperature)


@wrong("5.2", "1/T forgotten", 2)
def no_chain_rule(student, teacher, temperature):
    return right_gradient(student, teacher, temperature) * temperature


@wrong("5.2", "T for 1/T", 2)
def with_t(student, teacher, temperature):
    return right_gradient(student, teacher, temperature) * temperature**2


@wrong("5.2", "mean over the tokens", 1)
def of_the_mean(student, teacher, temperature):
    return right_gradient(student, teacher, temperature) / len(student)


@wrong("5.2", "wrong shape", 0)
def summed(student, teacher, temperature):
    return right_gradient(student, teacher, temperature).sum(-1)


@honest("5.2")
def right_gradient(student, teacher, temperature):
    p_s, p_t = softmaxes(student, teacher, temperature)
    ratio = p_s.log() - p_t.log()
    inner = ratio - (p_s * ratio).sum(-1, keepdim=True)
    return inner * p_s / temperature


@honest("5.2")
def through_the_jacobian(student, teacher, temperature):
    rows = []
    for s, t in zip(student, teacher, strict=True):
        p_s, p_t = softmaxes(s, t, temperature)
        jacobian = torch.diag(p_s) - torch.outer(p_s, p_s)
        rows.append(jacobian @ ((p_s / p_t).log() + 1) / temperature)
    return torch.stack(rows)


@honest("5.2")
def by_autograd(student, teacher, temperature):
    leaf = student.clone().requires_grad_()
    log_ps = (leaf / temperature).log_softmax(-1)
    log_pt = (teacher / temperature).log_softmax(-1)
    (log_ps.exp() * (log_ps - log_pt)).sum().backward()
    return leaf.grad


@honest("5.2")
def from_logits(student, teacher, temperature):
    """log Z cancels: only the logits' difference and its average matter."""
    p_s = (student / temperature).softmax(-1)
    gap = (student - teacher) / temperature
    return p_s * (gap - (p_s * gap).sum(-1, keepdim=True)) / temperature


@honest("5.2")
def gradient_in_float32(student, teacher, temperature):
    return right_gradient(student.float(), teacher.float(), temperature)


# --- 5.3 gkd_jsd ---


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jsd(s, t, beta, *, m=None, w=None, first=None, ends=True):
    """The right one, or with the mixture's, the sum's or the end's weights changed."""
    log_ps, log_pt = s.log_softmax(-1), t.log_softmax(-1)
    if ends and beta in (0, 1):
        return kl(log_pt, log_ps) if beta == 0 else kl(log_ps, log_pt)
    share = beta if m is None else m
    w = (beta, 1 - beta) if w is None else w
    parts = torch.stack([log_pt + np.log(share), log_ps + np.log(1 - share)])
    log_m = parts.logsumexp(0)
    first = first or kl
    return w[0] * first(log_pt, log_m) + w[1] * first(log_ps, log_m)


@wrong("5.3", "weights of the mixture swapped", 2, "huggingface/trl#3043")
def mixture_swapped(s, t, beta):
    return jsd(s, t, beta, m=1 - beta)


@wrong("5.3", "weights of the sum swapped", 2, "modelscope/ms-swift#10213")
def sum_swapped(s, t, beta):
    return jsd(s, t, beta, w=(1 - beta, beta))


@wrong("5.3", "beta from the other end", 2)
def roles_swapped(s, t, beta):
    return jsd(t, s, beta)


@wrong("5.3", "ends swapped", 3, "a review of modelscope/twinkle#112")
def ends_swapped(s, t, beta):
    return jsd(s, t, 1 - beta if beta in (0, 1) else beta)


@wrong("5.3", "ends left to the formula", 3, "huggingface/trl#3043")
def no_ends(s, t, beta):
    log_ps, log_pt = s.log_softmax(-1), t.log_softmax(-1)
    weights = torch.tensor([beta, 1 - beta], dtype=s.dtype).log()
    log_m = torch.logaddexp(log_pt + weights[0], log_ps + weights[1])
    return beta * kl(log_pt, log_m) + (1 - beta) * kl(log_ps, log_m)


@wrong("5.3", "beta kept off its ends", 3, "verl-project/verl-recipe#151")
def clamped(s, t, beta):
    return jsd(s, t, min(max(beta, 1e-6), 1 - 1e-6))


@wrong("5.3", "mixture of logarithms", 1, "huggingface/trl#2202")
def log_mixture(s, t, beta):
    log_ps, log_pt = s.log_softmax(-1), t.log_softmax(-1)
    if beta in (0, 1):
        return jsd(s, t, beta)
    log_m = beta * log_pt + (1 - beta) * log_ps
    return beta * kl(log_pt, log_m) + (1 - beta) * kl(log_ps, log_m)


@wrong("5.3", "arguments of both KLs swapped", 1)
def mixture_first(s, t, beta):
    return jsd(s, t, beta, first=lambda log_p, log_m: kl(log_m, log_p))


@wrong("5.3", "both KLs weigh one half", 2)
def half_the_sum(s, t, beta):
    return jsd(s, t, beta, w=(0.5, 0.5))


@wrong("5.3", "mixture of one half", 2)
def half_the_mixture(s, t, beta):
    return jsd(s, t, beta, m=0.5)


@wrong("5.3", "mean over the vocabulary", 0, "huggingface/trl#4105")
def vocabulary_mean(s, t, beta):
    return jsd(s, t, beta) / s.shape[-1]


@wrong("5.3", "not finite", 3, "linkedin/Liger-Kernel#769: exp, then log")
def through_probabilities(s, t, beta):
    p_s, p_t = s.softmax(-1), t.softmax(-1)
    if beta in (0, 1):
        return jsd(s, t, beta)
    m = beta * p_t + (1 - beta) * p_s
    parts = beta * p_t * (p_t / m).log() + (1 - beta) * p_s * (p_s / m).log()
    return parts.sum(-1)


@wrong("5.3", "wrong shape", 0)
def one_number(s, t, beta):
    return jsd(s, t, beta).mean()


@honest("5.3")
def right_jsd(s, t, beta):
    return jsd(s, t, beta)


@honest("5.3")
def jsd_from_kdlib(s, t, beta):
    return generalized_jsd(s, t, beta=beta)


@honest("5.3")
def jsd_in_float32(s, t, beta):
    return jsd(s.float(), t.float(), beta)


@honest("5.3")
def entropy_of_the_mixture(s, t, beta):
    """JSD = H(m) - beta H(p_t) - (1 - beta) H(p_s)."""
    if beta in (0, 1):
        return jsd(s, t, beta)
    p_s, p_t = s.softmax(-1), t.softmax(-1)

    def entropy(p):
        return -torch.xlogy(p, p).sum(-1)

    m = beta * p_t + (1 - beta) * p_s
    return entropy(m) - beta * entropy(p_t) - (1 - beta) * entropy(p_s)


@honest("5.3")
def row_by_row(s, t, beta):
    return [jsd(a, b, beta).item() for a, b in zip(s, t, strict=True)]


# --- 5.4 stale_k3 ---


@wrong("5.4", "no importance weight", 1, "huggingface/trl#4637, verl#2983")
def unweighted(s, t, old):
    return (t - s).exp() - 1 - (t - s)


@wrong("5.4", "weight upside down", 1)
def inverse_weight(s, t, old):
    return unweighted(s, t, old) * (old - s).exp()


@wrong("5.4", "logarithm for the weight", 1)
def log_weight(s, t, old):
    return unweighted(s, t, old) * (1 + s - old)


@wrong("5.4", "weighed towards the teacher", 0)
def teacher_weight(s, t, old):
    return unweighted(s, t, old) * (t - old).exp()


@wrong("5.4", "compared with the old student", 1)
def ratio_of_the_old(s, t, old):
    return unweighted(old, t, old) * (s - old).exp()


@wrong("5.4", "log-ratio swapped", 0, "the other direction's k3")
def swapped_ratio(s, t, old):
    return unweighted(t, s, old) * (s - old).exp()


@wrong("5.4", "k1", 0)
def weighted_k1(s, t, old):
    return (s - t) * (s - old).exp()


@wrong("5.4", "k2", 0)
def weighted_k2(s, t, old):
    return (s - t) ** 2 / 2 * (s - old).exp()


@wrong("5.4", "1 not subtracted", 0)
def not_zero_at_equality(s, t, old):
    return ((t - s).exp() - (t - s)) * (s - old).exp()


@wrong("5.4", "weights normalised", 1)
def self_normalised(s, t, old):
    weight = (s - old).exp()
    return unweighted(s, t, old) * weight / weight.mean()


@wrong("5.4", "wrong shape", 0)
def mean_of_all(s, t, old):
    return right_stale(s, t, old).mean()


@honest("5.4")
def right_stale(s, t, old):
    return (s - old).exp() * unweighted(s, t, old)


@honest("5.4")
def as_three_terms(s, t, old):
    weight = (s - old).exp()
    return (t - old).exp() - weight - weight * (t - s)


@honest("5.4")
def estimate_from_kdlib(s, t, old):
    return estimate("k3", s, t) * (s - old).exp()


@honest("5.4")
def stale_in_numpy(s, t, old):
    s, t, old = (x.numpy() for x in (s, t, old))
    return np.exp(s) / np.exp(old) * (np.exp(t - s) - 1 - t + s)


@honest("5.4")
def in_a_loop(s, t, old):
    pairs = zip(s.tolist(), t.tolist(), old.tolist(), strict=True)
    return [math.exp(a - c) * (math.exp(b - a) - 1 - (b - a)) for a, b, c in pairs]


# --- 5.5 numbers ---

GUESS = {
    "perfect_ce": 2.8,
    "jsd_apart": 0.33,
    "jsd_near_end": 0.003,
    "wrong_share": 0.9,
    "k3_reads": 0.2,
}
ROUGH = {
    "perfect_ce": 3.5,
    "jsd_apart": 0.25,
    "jsd_near_end": 0.0025,
    "wrong_share": 0.8,
    "k3_reads": 0.25,
}
HONEST += [
    ("5.5", GUESS),
    ("5.5", ROUGH),
    ("5.5", {key: np.float32(value) for key, value in GUESS.items()}),
]
for key, value, bug in [
    ("perfect_ce", 0.0625, "one token's probability"),
    ("perfect_ce", 16, "perplexity"),
    ("jsd_apart", 0.69, "log 2 for every beta"),
    ("jsd_apart", 2.3, "bound of the skew KL"),
    ("jsd_near_end", 3, "no jump at the end"),
    ("jsd_near_end", 0.005, "the other end"),
    ("jsd_near_end", 0.008, "the bound"),
    ("wrong_share", 0.5, "two sentences"),
    ("wrong_share", 0.1, "the right share"),
    ("k3_reads", 0.69, "the KL itself"),
    ("k3_reads", 5e8, "the rare sample"),
    ("k3_reads", 0.01, None),
]:
    WRONG.append(("5.5", GUESS | {key: value}, "wrong", bug, 4.5, ""))
for value, bug in [
    (..., "incomplete"),
    ("log 16", "wrong type"),
    (0, "not positive"),
    (float("inf"), "not finite"),
]:
    WRONG.append(("5.5", GUESS | {"perfect_ce": value}, "wrong", bug, 4, ""))

# --- 5.6 what_is_minimised ---

KEY = {"a": "B", "b": "B", "c": "A", "d": "B", "e": "C"}
HONEST += [("5.6", KEY), ("5.6", {k: f" {v.lower()}" for k, v in KEY.items()})]
for item, letter in KEY.items():
    for other in sorted(set("ABC") - {letter}):
        given = KEY | {item: other}
        WRONG.append(("5.6", given, "wrong", f"{item} {other}", 4, ""))
WRONG.append(("5.6", KEY | {"a": "D"}, "wrong", "no such option", 4, ""))
WRONG.append(("5.6", KEY | {"a": None}, "wrong", "incomplete", 4, ""))
