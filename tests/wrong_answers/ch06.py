"""Answers to the exercises of chapter 6: wrong ones, and honest variants of right ones.

A wrong answer comes with its provenance, the outcome and the bug's name that the
checker must give, and the points that are left.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch.nn import functional as F
from wrong_answers.collect import collectors

from kdlib.divergences import forward_kl
from kdlib.objective import Objective

WRONG, HONEST, wrong, honest = collectors()


# --- 6.1 total_loss ---


def flat(zs, zt, labels):
    kept = labels != -100
    return zs[kept], zt[kept], labels[kept]


def kl(zs, zt, t):
    """By torch, as most libraries write it."""
    log_ps = F.log_softmax(zs / t, -1)
    return F.kl_div(log_ps, F.softmax(zt / t, -1), reduction="none").sum(-1)


@wrong("6.1", "T^2 missing", 1, "IntelLabs/distiller#122, keras-io#869")
def no_square(zs, zt, labels, t, w, m):
    zs, zt, y = flat(zs, zt, labels)
    soft, hard = kl(zs, zt, t).sum(), F.cross_entropy(zs, y, reduction="sum")
    return ((1 - w) * soft + w * hard) / m


@wrong("6.1", "T for T^2", 1)
def one_t(zs, zt, labels, t, w, m):
    zs, zt, y = flat(zs, zt, labels)
    soft, hard = t * kl(zs, zt, t).sum(), F.cross_entropy(zs, y, reduction="sum")
    return ((1 - w) * soft + w * hard) / m


@wrong("6.1", "T^2 on the hard term too", 1)
def both_squared(zs, zt, labels, t, w, m):
    return t**2 * no_square(zs, zt, labels, t, w, m)


@wrong("6.1", "hard term at temperature T", 1)
def warm_labels(zs, zt, labels, t, w, m):
    zs, zt, y = flat(zs, zt, labels)
    hard = F.cross_entropy(zs / t, y, reduction="sum")
    return ((1 - w) * t**2 * kl(zs, zt, t).sum() + w * hard) / m


@wrong("6.1", "only the teacher softened", 1, "Teacher-free-KD#24")
def soft_teacher(zs, zt, labels, t, w, m):
    zs, zt, y = flat(zs, zt, labels)
    soft = t**2 * kl(zs, zt / t, 1.0).sum()
    return ((1 - w) * soft + w * F.cross_entropy(zs, y, reduction="sum")) / m


@wrong("6.1", "only the student softened", 1)
def soft_student(zs, zt, labels, t, w, m):
    zs, zt, y = flat(zs, zt, labels)
    soft = t**2 * kl(zs / t, zt, 1.0).sum()
    return ((1 - w) * soft + w * F.cross_entropy(zs, y, reduction="sum")) / m


@wrong("6.1", "weights swapped", 0)
def swapped(zs, zt, labels, t, w, m):
    return right_total(zs, zt, labels, t, 1 - w, m)


@wrong("6.1", "direction reversed", 0, "paiml/aprender#2153")
def reversed_kl(zs, zt, labels, t, w, m):
    zs, zt, y = flat(zs, zt, labels)
    soft = t**2 * kl(zt, zs, t).sum()
    return ((1 - w) * soft + w * F.cross_entropy(zs, y, reduction="sum")) / m


@wrong("6.1", "teacher's entropy not subtracted", 0, "the stored PyTorch tutorial")
def soft_labels(zs, zt, labels, t, w, m):
    zs, zt, y = flat(zs, zt, labels)
    soft = t**2 * F.cross_entropy(zs / t, (zt / t).softmax(-1), reduction="sum")
    return ((1 - w) * soft + w * F.cross_entropy(zs, y, reduction="sum")) / m


@wrong("6.1", "softmax for log_softmax", 0, "microsoft/ProDA#20, #43")
def no_log(zs, zt, labels, t, w, m):
    zs, zt, y = flat(zs, zt, labels)
    ps, pt = (zs / t).softmax(-1), (zt / t).softmax(-1)
    soft = t**2 * F.kl_div(ps, pt, reduction="sum")
    return ((1 - w) * soft + w * F.cross_entropy(zs, y, reduction="sum")) / m


@wrong("6.1", "mean over the vocabulary", 0, "haitongli#48, deit#61")
def over_vocabulary(zs, zt, labels, t, w, m):
    zs, zt, y = flat(zs, zt, labels)
    log_ps, pt = F.log_softmax(zs / t, -1), F.softmax(zt / t, -1)
    soft = t**2 * F.kl_div(log_ps, pt, reduction="none").mean(-1).sum()
    return ((1 - w) * soft + w * F.cross_entropy(zs, y, reduction="sum")) / m


@wrong("6.1", "mean over the micro-batch", 5, "transformers#34191, trl#4719")
def own_mean(zs, zt, labels, t, w, m):
    zs, zt, y = flat(zs, zt, labels)
    return (1 - w) * t**2 * kl(zs, zt, t).mean() + w * F.cross_entropy(zs, y)


@wrong("6.1", "mean over sequences", 3)
def sequences(zs, zt, labels, t, w, m):
    rows = zip(zs, zt, labels, strict=True)
    return sum(own_mean(*row, t, w, m) for row in rows) / len(labels)


@wrong("6.1", "divided by padding", 3)
def all_positions(zs, zt, labels, t, w, m):
    return right_total(zs, zt, labels, t, w, labels.numel())


@wrong("6.1", "padding in the soft term", 3)
def soft_everywhere(zs, zt, labels, t, w, m):
    _, _, y = flat(zs, zt, labels)
    hard = F.cross_entropy(zs[labels != -100], y, reduction="sum")
    return ((1 - w) * t**2 * kl(zs, zt, t).sum() + w * hard) / m


@wrong("6.1", "padding in the soft term's mean", 3, "huggingface/trl#7024")
def masks_always_true(zs, zt, labels, t, w, m):
    hard = F.cross_entropy(zs.flatten(0, 1), labels.flatten())
    return (1 - w) * t**2 * kl(zs, zt, t).mean() + w * hard


@wrong("6.1", "sum", 0)
def no_mean(zs, zt, labels, t, w, m):
    return m * right_total(zs, zt, labels, t, w, m)


@wrong("6.1", "raised", 3, "gather does not know -100", "raised")
def gathers_padding(zs, zt, labels, t, w, m):
    hard = -zs.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return ((1 - w) * t**2 * kl(zs, zt, t) + w * hard).sum() / m


@wrong("6.1", "changes its input", 3, "labels filled in place")
def fills_labels(zs, zt, labels, t, w, m):
    kept = labels != -100
    labels[~kept] = 0
    hard = -zs.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return (((1 - w) * t**2 * kl(zs, zt, t) + w * hard) * kept).sum() / m


@wrong("6.1", None, 0, "teacher on both sides: labmlai#66")
def teacher_twice(zs, zt, labels, t, w, m):
    zs, zt, y = flat(zs, zt, labels)
    soft = t**2 * kl(zt, zt, t).sum()
    return ((1 - w) * soft + w * F.cross_entropy(zs, y, reduction="sum")) / m


@wrong("6.1", "wrong shape", 0, "the reduction forgotten")
def by_token(zs, zt, labels, t, w, m):
    zs, zt, y = flat(zs, zt, labels)
    hard = F.cross_entropy(zs, y, reduction="none")
    return ((1 - w) * t**2 * kl(zs, zt, t) + w * hard) / m


@honest("6.1")
def right_total(zs, zt, labels, t, w, m):
    zs, zt, y = flat(zs, zt, labels)
    hard = F.cross_entropy(zs, y, reduction="sum")
    return ((1 - w) * t**2 * kl(zs, zt, t).sum() + w * hard) / m


@honest("6.1")
def by_kdlib(zs, zt, labels, t, w, m):
    zs, zt, y = flat(zs, zt, labels)
    return Objective(temperature=t, hard_weight=w)(zs, zt, y, num_items=m).total


@honest("6.1")
def masked_not_selected(zs, zt, labels, t, w, m):
    kept = labels != -100
    soft = forward_kl(zs, zt, temperature=t) * t * t
    hard = F.cross_entropy(zs.mT, labels, ignore_index=-100, reduction="none")
    return (((1 - w) * soft + w * hard) * kept / m).sum()


@honest("6.1")
def token_by_token(zs, zt, labels, t, w, m):
    total = 0.0
    for row_s, row_t, row_y in zip(zs, zt, labels.tolist(), strict=True):
        for s, u, y in zip(row_s, row_t, row_y, strict=True):
            if y >= 0:
                soft = Fraction(1) * kl(s, u, t).item() * t**2
                total += (1 - w) * soft - w * s.log_softmax(0)[y].item()
    return total / m


@honest("6.1")
def in_float32(zs, zt, labels, t, w, m):
    return right_total(zs.float(), zt.float(), labels, t, w, m)


# --- 6.2 hot_limit ---


def spread(z):
    return z.var(-1, correction=0)


@wrong("6.2", "mean shift kept", 0)
def raw_error(zs, zt, beta):
    return beta * (1 - beta) / 2 * F.mse_loss(zs, zt, reduction="none").mean(-1)


@wrong("6.2", "one side centred", 0)
def student_centred(zs, zt, beta):
    centred = zs - zs.mean(-1, keepdim=True)
    return beta * (1 - beta) / 2 * (centred - zt).pow(2).mean(-1)


@wrong("6.2", "V - 1 for V", 0, "torch.var's default")
def sample_variance(zs, zt, beta):
    return beta * (1 - beta) / 2 * (zs - zt).var(-1)


@wrong("6.2", "sum over the vocabulary", 0)
def summed(zs, zt, beta):
    return beta * (1 - beta) / 2 * spread(zs - zt) * zs.shape[-1]


@wrong("6.2", "half forgotten", 0)
def no_half(zs, zt, beta):
    return beta * (1 - beta) * spread(zs - zt)


@wrong("6.2", "limit of the forward KL", 0)
def forward_limit(zs, zt, beta):
    return spread(zs - zt) / 2


@wrong("6.2", "beta alone", 0)
def teacher_part(zs, zt, beta):
    return beta * spread(zs - zt) / 2


@wrong("6.2", "student's part alone", 0)
def student_part(zs, zt, beta):
    return (1 - beta) * spread(zs - zt) / 2


@wrong("6.2", "parts not weighted", 0)
def parts(zs, zt, beta):
    return ((1 - beta) ** 2 + beta**2) * spread(zs - zt) / 2


@wrong("6.2", "standard deviation", 0)
def deviation(zs, zt, beta):
    return beta * (1 - beta) / 2 * (zs - zt).std(-1, correction=0)


@wrong("6.2", "difference of the variances", 0)
def variances(zs, zt, beta):
    return beta * (1 - beta) / 2 * (spread(zs) - spread(zt))


@wrong("6.2", None, 0, "a large T is not infinite")
def large_t(zs, zt, beta, t=1e4):
    from kdlib.divergences import generalized_jsd

    return t**2 * generalized_jsd(zs, zt, temperature=t, beta=beta)


@wrong("6.2", None, 2, "GKD's ends, where the JSD is a KL, taken for a neighbourhood")
def a_kl_near_the_ends(zs, zt, beta):
    near = beta < 0.1 or beta > 0.85
    return spread(zs - zt) / 2 if near else right_limit(zs, zt, beta)


@wrong("6.2", None, 1, "V put down as the number of one example")
def six_words(zs, zt, beta):
    centred = (zs - zt) - (zs - zt).mean(-1, keepdim=True)
    return beta * (1 - beta) / 2 * centred.pow(2).sum(-1) / 6


@wrong("6.2", "wrong shape", 0, "the mean over tokens as well")
def one_number(zs, zt, beta):
    return right_limit(zs, zt, beta).mean()


@honest("6.2")
def right_limit(zs, zt, beta):
    return beta * (1 - beta) / 2 * spread(zs - zt)


@honest("6.2")
def second_moments(zs, zt, beta):
    gap = (zs - zt).numpy()
    return beta * (1 - beta) * (np.mean(gap**2, -1) - np.mean(gap, -1) ** 2) / 2


@honest("6.2")
def both_parts(zs, zt, beta):
    half = spread(zs - zt) / 2
    return (beta * (1 - beta) ** 2 * half + (1 - beta) * beta**2 * half).tolist()


@honest("6.2")
def centred_first(zs, zt, beta):
    zs, zt = zs - zs.mean(-1, keepdim=True), zt - zt.mean(-1, keepdim=True)
    return beta * (1 - beta) * (zs - zt).square().sum(-1) / (2 * zs.shape[-1])


# --- 6.3 share_of_the_step ---


@wrong("6.3", "mean over the micro-batch", 1, "transformers#34191, trl#4719")
def micro_mean(losses, mask, n, processes):
    return losses[mask].mean() if mask.any() else losses.new_zeros(())


@wrong("6.3", "mean over the micro-batch", 0, "and the mean of nothing is NaN")
def micro_mean_of_nothing(losses, mask, n, processes):
    return losses[mask].mean()


@wrong("6.3", "processes forgotten", 2, "huggingface/transformers#34242")
def one_average_too_many(losses, mask, n, processes):
    return losses[mask].sum() / n


@wrong("6.3", "divided by the processes", 2)
def averaged_twice(losses, mask, n, processes):
    return losses[mask].sum() / n / processes


@wrong("6.3", "mean over sequences", 1)
def row_means(losses, mask, n, processes):
    means = [row[kept].mean() for row, kept in zip(losses, mask, strict=True)]
    return torch.stack(means).nan_to_num().mean()


@wrong("6.3", "divided by padding", 1)
def positions(losses, mask, n, processes):
    return losses.where(mask, 0).mean()


@wrong("6.3", "mask ignored", 0)
def no_mask_at_all(losses, mask, n, processes):
    return losses.sum() * processes / n


@wrong("6.3", "mask ignored", 1, "infinities papered over")
def no_mask(losses, mask, n, processes):
    return losses.nan_to_num(posinf=0).sum() * processes / n


@wrong("6.3", "sum", 1)
def plain_sum(losses, mask, n, processes):
    return losses[mask].sum()


@wrong("6.3", "mean times the processes", 1)
def mean_times(losses, mask, n, processes):
    return micro_mean(losses, mask, n, processes) * processes


@wrong("6.3", "not finite", 3, "an infinity times 0")
def times_mask(losses, mask, n, processes):
    return (losses * mask).sum() * processes / n


@wrong("6.3", "changes its input", 0, "the padding zeroed in place")
def zeroes_in_place(losses, mask, n, processes):
    losses[~mask] = 0
    return losses.sum() * processes / n


@honest("6.3")
def selected(losses, mask, n, processes):
    return losses[mask].sum() / (n / processes)


@honest("6.3")
def where(losses, mask, n, processes):
    return (losses.where(mask, 0.0) / n).sum() * processes


@honest("6.3")
def python_sum(losses, mask, n, processes):
    kept = zip(losses.flatten().tolist(), mask.flatten().tolist(), strict=True)
    return processes * sum(x for x, keep in kept if keep) / n


# --- 6.4 factors ---

GUESS = {
    "without_t2": 100,
    "with_t2": 1,
    "over_the_vocabulary": 32_000,
    "short_answer": 150,
}
HONEST += [
    ("6.4", GUESS),
    ("6.4", {**GUESS, "without_t2": 70, "with_t2": 1.3, "short_answer": 120}),
    ("6.4", {key: torch.tensor(float(value)) for key, value in GUESS.items()}),
]
for key, value, bug in [
    ("without_t2", 10, "one factor T forgotten"),
    ("without_t2", 1, "no effect of the temperature"),
    ("with_t2", 10, "one factor T forgotten"),
    ("with_t2", 100, "T^2 not used"),
    ("over_the_vocabulary", 1, "mean over tokens only"),
    ("short_answer", 2, "weights of the micro-batches alone"),
    ("short_answer", 299, "against the other tokens"),
    ("short_answer", 1, "equal weights"),
    ("over_the_vocabulary", 100, None),
]:
    WRONG.append(("6.4", GUESS | {key: value}, "wrong", bug, 3.5, ""))
for value, bug in [
    (..., "incomplete"),
    ("many", "wrong type"),
    (0, "not positive"),
    (float("inf"), "not finite"),
]:
    WRONG.append(("6.4", GUESS | {"with_t2": value}, "wrong", bug, 3, ""))

# --- 6.5 what_it_fixes ---

KEY = {"a": "B", "b": "C", "c": "A", "d": "B", "e": "B"}
HONEST += [("6.5", KEY), ("6.5", {k: f" {v.lower()}" for k, v in KEY.items()})]
for item, right in KEY.items():
    for letter in sorted(set("ABC") - {right}):
        given = KEY | {item: letter}
        WRONG.append(("6.5", given, "wrong", f"{item} {letter}", 4, ""))
for value, bug in [("D", "no such option"), (None, "incomplete")]:
    WRONG.append(("6.5", KEY | {"a": value}, "wrong", bug, 4, ""))
