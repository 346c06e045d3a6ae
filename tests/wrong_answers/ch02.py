"""Answers to the exercises of chapter 2: wrong ones, and honest variants of right ones.

As in ch01.py: the question, the answer, the outcome, the bug's name that the checker
must give, the points that are left, and where the mistake was made.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F
from wrong_answers.collect import collectors

WRONG, HONEST, wrong, honest = collectors()


# --- 2.1 log_probs ---


@wrong("2.1", "padding in the sum", 4, "a slice that comes too late")
def slice_too_late(z, t, v):
    return (z / t).log_softmax(-1)[..., :v]


@wrong("2.1", "padding set to 0", 4, "Liger-Kernel, DistillKit#37")
def zeros_for_padding(z, t, v):
    filled = torch.cat([z[..., :v], torch.zeros_like(z[..., v:])], -1)
    return (filled / t).log_softmax(-1)[..., :v]


@wrong("2.1", "the last columns kept", 4)
def from_behind(z, t, v):
    return (z[..., -v:] / t).log_softmax(-1)


@wrong("2.1", "temperature left out", 1)
def no_temperature(z, t, v):
    return z[..., :v].log_softmax(-1)


@wrong("2.1", "multiplied by the temperature", 1)
def hotter_is_sharper(z, t, v):
    return (z[..., :v] * t).log_softmax(-1)


@wrong("2.1", "temperature after the softmax", 1)
def tempered_log_probs(z, t, v):
    return z[..., :v].log_softmax(-1) / t


@wrong("2.1", "over the wrong dimension", 2, "Lackel/DPN#1, perone/euclidesdb#2")
def over_positions(z, t, v):
    return (z[..., :v] / t).log_softmax(0)


@wrong("2.1", "one sum for all positions", 2)
def one_sum(z, t, v):
    z = z[..., :v] / t
    return z - z.flatten().logsumexp(0)


@wrong("2.1", "no logarithm", 0)
def probabilities(z, t, v):
    return (z[..., :v] / t).softmax(-1)


@wrong("2.1", "not normalised", 0)
def scaled(z, t, v):
    return z[..., :v] / t


@wrong("2.1", "only the maximum subtracted", 0)
def only_the_maximum(z, t, v):
    z = z[..., :v] / t
    return z - z.amax(-1, keepdim=True)


@wrong("2.1", "not finite", 4, "tensorflow#10142, uTensor#175")
def naive(z, t, v):
    e = (z[..., :v] / t).exp()
    return (e / e.sum(-1, keepdim=True)).log()


@wrong("2.1", "not finite", 4, "NVIDIA/apex#379")
def log_of_softmax(z, t, v):
    return (z[..., :v] / t).softmax(-1).log()


@wrong("2.1", "half precision", 0)
def in_bfloat16(z, t, v):
    return (z[..., :v].bfloat16() / t).log_softmax(-1)


@wrong("2.1", "bits", 0)
def bits(z, t, v):
    return right_log_probs(z, t, v) / np.log(2)


@wrong("2.1", "changes its input", 1, "/= on the caller's logits")
def in_place(z, t, v):
    z /= t
    return z[..., :v].log_softmax(-1)


@wrong("2.1", "wrong shape", 4, "masked with -inf and not dropped")
def masked(z, t, v):
    z = z.clone()
    z[..., v:] = -1e9
    return (z / t).log_softmax(-1)


@honest("2.1")
def right_log_probs(z, t, v):
    return (z[..., :v] / t).log_softmax(-1)


@honest("2.1")
def by_hand(z, t, v):
    z = z[..., :v] / t
    z = z - z.max(-1, keepdim=True).values
    return z - z.exp().sum(-1, keepdim=True).log()


@honest("2.1")
def in_float64(z, t, v):
    z = z.double()[..., :v] / t
    return z - z.logsumexp(-1, keepdim=True)


@honest("2.1")
def in_float32(z, t, v):
    return F.log_softmax(z[..., :v].float() / t, dim=-1)


@honest("2.1")
def masked_then_cut(z, t, v):
    z = z.clone()
    z[..., v:] = -torch.inf
    return (z / t).log_softmax(-1)[..., :v]


@honest("2.1")
def in_numpy(z, t, v):
    z = z.numpy()[..., :v] / t
    return z - np.logaddexp.reduce(z, axis=-1, keepdims=True)


# --- 2.2 answer_log_probs ---


def gathered(log_probs, ids):
    return log_probs.gather(-1, ids[:, None])[:, 0]


@wrong("2.2", "not shifted", 0, "DistillKit, Soup#682")
def not_shifted(z, ids, mask):
    return gathered(z.log_softmax(-1)[mask], ids[mask])


@wrong("2.2", "shifted twice", 0, "linkedin/fmchisel#23")
def twice(z, ids, mask):
    return gathered(z.log_softmax(-1)[:, :-2][mask[:, 2:]], ids[mask])


@wrong("2.2", "shifted the wrong way", 0, "asked in huggingface/trl#1172")
def wrong_way(z, ids, mask):
    return gathered(z.log_softmax(-1).roll(-1, 1)[mask], ids[mask])


@wrong("2.2", "the token before", 0)
def token_before(z, ids, mask):
    log_probs = z.log_softmax(-1)[:, :-1][mask[:, 1:]]
    return gathered(log_probs, ids[:, :-1][mask[:, 1:]])


@wrong("2.2", "the favourite's log-probability", 0)
def favourite(z, ids, mask):
    return z.log_softmax(-1)[:, :-1][mask[:, 1:]].amax(-1)


@wrong("2.2", "not normalised", 0)
def raw(z, ids, mask):
    return gathered(z[:, :-1][mask[:, 1:]], ids[mask])


@wrong("2.2", "no logarithm", 0)
def probability(z, ids, mask):
    return gathered(z.softmax(-1)[:, :-1][mask[:, 1:]], ids[mask])


@wrong("2.2", "over the wrong dimension", 0)
def over_time(z, ids, mask):
    return gathered(z.log_softmax(1)[:, :-1][mask[:, 1:]], ids[mask])


@wrong("2.2", "column by column", 1)
def by_columns(z, ids, mask):
    table = z.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return table.T[mask[:, 1:].T]


@wrong("2.2", "negated", 0)
def losses(z, ids, mask):
    return F.cross_entropy(z[:, :-1][mask[:, 1:]], ids[mask], reduction="none")


@wrong("2.2", "wrong shape", 0, "TRL's GOLD drops the end by default")
def without_the_end(z, ids, mask):
    mask = mask.clone()
    mask[torch.arange(len(mask)), mask.long().cumsum(1).argmax(1)] = False
    return right_answers(z, ids, mask)


@wrong("2.2", "wrong shape", 0, "every token but the first: the prompt is scored")
def with_the_prompt(z, ids, mask):
    mask = torch.ones_like(mask)
    mask[:, 0] = False
    return gathered(z.log_softmax(-1)[:, :-1][mask[:, 1:]], ids[mask])


@wrong("2.2", "wrong shape", 0)
def added_up(z, ids, mask):
    return right_answers(z, ids, mask).sum()


@wrong("2.2", "wrong shape", 1, "a prompt's length taken for that of all rows")
def same_prompt(z, ids, mask):
    start = int(mask[0].long().argmax())
    log_probs = z.log_softmax(-1)[:, start - 1 : -1]
    return gathered(log_probs.flatten(0, 1), ids[:, start:].flatten())


@wrong("2.2", None, 1, "the end of a row taken for the end of its answer")
def last_places(z, ids, mask):
    found = [
        gathered(z[row, -n - 1 : -1].log_softmax(-1), ids[row, -n:])
        for row, n in enumerate(mask.sum(1).tolist())
    ]
    return torch.cat(found)


@honest("2.2")
def right_answers(z, ids, mask):
    return gathered(z.log_softmax(-1)[:, :-1][mask[:, 1:]], ids[mask])


@honest("2.2")
def table_first(z, ids, mask):
    table = z[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return table[mask[:, 1:]]


@honest("2.2")
def rolled(z, ids, mask):
    return -F.cross_entropy(z.roll(1, 1)[mask], ids[mask], reduction="none")


@honest("2.2")
def loops(z, ids, mask):
    return [
        float(z[row, column - 1].double().log_softmax(0)[ids[row, column]])
        for row, column in mask.nonzero().tolist()
    ]


@honest("2.2")
def float32_answers(z, ids, mask):
    return right_answers(z.float(), ids, mask)


# --- 2.3 log_prob_slope ---


def tempered(z, t):
    return (z / t).softmax(-1)


def average(z, p):
    return (p * z).sum(-1, keepdim=True)


@wrong("2.3", "sign", 0)
def other_sign(z, t):
    return -right_slope(z, t)


@wrong("2.3", "plain average", 0)
def plain_average(z, t):
    return (z.mean(-1, keepdim=True) - z) / t**2


@wrong("2.3", "the favourite for the average", 0)
def below_the_favourite(z, t):
    return (z.max(-1, keepdim=True).values - z) / t**2


@wrong("2.3", "average left out", 0)
def no_average(z, t):
    return -z / t**2


@wrong("2.3", "probabilities at T = 1", 1)
def untempered(z, t):
    return (average(z, z.softmax(-1)) - z) / t**2


@wrong("2.3", "1/T for 1/T^2", 1)
def one_t(z, t):
    return right_slope(z, t) * t


@wrong("2.3", "T^3", 1)
def three_t(z, t):
    return right_slope(z, t) / t


@wrong("2.3", "with respect to 1/T", 0)
def by_beta(z, t):
    return z - average(z, tempered(z, t))


@wrong("2.3", "T^2 left out", 1)
def no_t(z, t):
    return average(z, tempered(z, t)) - z


@wrong("2.3", "slope of the probability", 0)
def of_p(z, t):
    return tempered(z, t) * right_slope(z, t)


@wrong("2.3", "raised", 3, "one position only", "raised")
def one_position(z, t):
    return (tempered(z, t) @ z - z) / t**2


@wrong("2.3", None, 0, "a difference over a wide step")
def wide_step(z, t):
    ahead, behind = ((z / (t + d)).log_softmax(-1) for d in (0.1, -0.1))
    return (ahead - behind) / 0.2


@honest("2.3")
def right_slope(z, t):
    return (average(z, tempered(z, t)) - z) / t**2


@honest("2.3")
def scaled_first(z, t):
    z = z / t
    return (average(z, z.softmax(-1)) - z) / t


@honest("2.3")
def by_autograd(z, t):
    t = torch.tensor(t, dtype=z.dtype)
    return torch.autograd.functional.jacobian(lambda t: (z / t).log_softmax(-1), t)


@honest("2.3")
def float32_slope(z, t):
    return right_slope(z.float(), t)


# --- 2.4 entropy_of_parts ---


def share(s):
    return s.softmax(0)


@wrong("2.4", "the choice of the part left out", 0)
def average_entropy(s, m):
    return (share(s) * (s - m)).sum(0)


@wrong("2.4", "entropies added", 0)
def added_entropies(s, m):
    return (s - m).sum(0)


@wrong("2.4", "parts weighted alike", 0)
def plain_mean(s, m):
    return s.logsumexp(0) - m.mean(0)


@wrong("2.4", "log-sum-exps added", 0)
def added_log_sums(s, m):
    return s.sum(0) - (share(s) * m).sum(0)


@wrong("2.4", "the largest log-sum-exp for all", 0)
def largest(s, m):
    return s.amax(0) - (share(s) * m).sum(0)


@wrong("2.4", "shares from the means", 0)
def by_means(s, m):
    return s.logsumexp(0) - (m.softmax(0) * m).sum(0)


@wrong("2.4", "average logit left out", 0)
def only_log_sum(s, m):
    return s.logsumexp(0)


@wrong("2.4", "only the choice of the part", 0)
def only_the_part(s, m):
    return -(share(s) * share(s).log()).sum(0)


@wrong("2.4", "sign", 0)
def negative(s, m):
    return -right_entropy(s, m)


@wrong("2.4", "bits", 0)
def in_bits(s, m):
    return right_entropy(s, m) / np.log(2)


@wrong("2.4", "not finite", 3, "exp before the maximum is taken away")
def overflows(s, m):
    weight = s.exp() / s.exp().sum(0)
    return s.exp().sum(0).log() - (weight * m).sum(0)


@wrong("2.4", "wrong shape", 0, "over positions, not over parts")
def over_the_positions(s, m):
    return s.logsumexp(1) - (s.softmax(1) * m).sum(1)


@honest("2.4")
def right_entropy(s, m):
    return s.logsumexp(0) - (share(s) * m).sum(0)


@honest("2.4")
def two_stages(s, m):
    """Which part, and then which token in it."""
    return only_the_part(s, m) + average_entropy(s, m)


@honest("2.4")
def one_after_another(s, m):
    total, mean = s[0], m[0]
    for log_sum, part in zip(s[1:], m[1:], strict=True):
        both = torch.logaddexp(total, log_sum)
        mean = (total - both).exp() * mean + (log_sum - both).exp() * part
        total = both
    return total - mean


@honest("2.4")
def in_numpy_parts(s, m):
    s, m = s.numpy(), m.numpy()
    total = np.logaddexp.reduce(s, axis=0)
    return total - (np.exp(s - total) * m).sum(0)


# --- 2.5 five_numbers ---

GUESS = {
    "odds": 10,
    "padded_share": 0.97,
    "bf16_error": 0.06,
    "half_limit": 11,
    "tokens": 6.6,
}
HONEST += [
    ("2.5", GUESS),
    ("2.5", GUESS | {"odds": 8, "padded_share": 1, "tokens": 5}),
    ("2.5", {key: torch.tensor(float(value)) for key, value in GUESS.items()}),
]
for key, value, bug in [
    ("odds", 333, "divided by T"),
    ("odds", 3000, "multiplied by T"),
    ("odds", 1000, "unchanged"),
    ("odds", 1e9, "to the power of T"),
    ("padded_share", 0.0018, "share of the columns"),
    ("padded_share", 0.12, "one column only"),
    ("padded_share", 0.027, "the real tokens' share"),
    ("bf16_error", 0.0039, "relative error"),
    ("bf16_error", 0.125, "spacing"),
    ("bf16_error", 0.0078, "float16"),
    ("half_limit", 88.7, "float32"),
    ("half_limit", 710, "float64"),
    ("half_limit", 65504, "the number itself"),
    ("tokens", 1001, "tokens that can occur"),
    ("tokens", 1.88, "nats for tokens"),
    ("tokens", 3.7, "two for e"),
    ("tokens", 1.25, "one over the largest"),
    ("odds", 100, None),
]:
    WRONG.append(("2.5", GUESS | {key: value}, "wrong", bug, 4.5, ""))
for value, bug in [
    (..., "incomplete"),
    ("ten", "wrong type"),
    (-10, "not positive"),
    (float("inf"), "not finite"),
]:
    WRONG.append(("2.5", GUESS | {"odds": value}, "wrong", bug, 4, ""))

# --- 2.6 two_distributions ---

KEY = {"a": "B", "b": "A", "c": "C", "d": "B", "e": "A"}
HONEST += [("2.6", KEY), ("2.6", {k: f"{v.lower()} " for k, v in KEY.items()})]
for item, right in KEY.items():
    for letter in sorted(set("ABC") - {right}):
        given = KEY | {item: letter}
        WRONG.append(("2.6", given, "wrong", f"{item} {letter}", 4, ""))
for value, bug in [("D", "no such option"), (1, "no such option"), ("", "incomplete")]:
    WRONG.append(("2.6", KEY | {"a": value}, "wrong", bug, 4, ""))
