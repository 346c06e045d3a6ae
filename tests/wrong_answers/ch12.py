"""Answers to the exercises of chapter 12: wrong ones, and honest variants of right.

A wrong answer comes with its provenance, the outcome and the bug's name that the
checker must give, and the points that are left.
"""

from __future__ import annotations

import numpy as np
import torch
from wrong_answers.collect import collectors

WRONG, HONEST, wrong, honest = collectors()


# --- 12.1 score_weights ---

# The checker has cumulative sums. These loop over tokens.


def looped(student, teacher, mask, span, factor=lambda t, n: 1.0):
    """For each token, the log-ratios of the tokens in span(t, n), added up."""
    ratios = (student - teacher).tolist()
    lengths = mask.sum(1).tolist()
    found = [[0.0] * mask.shape[1] for _ in lengths]
    for b, n in enumerate(lengths):
        for t in range(n):
            found[b][t] = factor(t, n) * sum(ratios[b][u] for u in span(t, n))
    return found


@honest("12.1")
def token_by_token(student, teacher, mask):
    return looped(student, teacher, mask, lambda t, n: range(t, n))


@honest("12.1")
def from_the_last(student, teacher, mask):
    weights, rest = torch.zeros_like(student), torch.zeros(len(student)).double()
    for t in reversed(range(mask.shape[1])):
        rest = rest + (student - teacher)[:, t] * mask[:, t]
        weights[:, t] = rest * mask[:, t]
    return weights


@honest("12.1")
def total_minus_before(student, teacher, mask):
    each = (student - teacher) * mask
    return (each.sum(1, keepdim=True) - each.cumsum(1) + each) * mask


@honest("12.1")
def in_numpy(student, teacher, mask):
    each = np.where(mask.numpy(), (student - teacher).numpy(), 0)
    return np.cumsum(each[:, ::-1], axis=1)[:, ::-1] * mask.numpy()


@wrong("12.1", "this token alone", 0)
def prefixes_as_given(student, teacher, mask):
    return (student - teacher) * mask


@wrong("12.1", "words before it counted", 0)
def whole_answer(student, teacher, mask):
    return looped(student, teacher, mask, lambda t, n: range(n))


@wrong("12.1", "what was written before", 0)
def up_to_here(student, teacher, mask):
    return looped(student, teacher, mask, lambda t, n: range(t + 1))


@wrong("12.1", "own token left out", 0)
def from_the_next(student, teacher, mask):
    return looped(student, teacher, mask, lambda t, n: range(t + 1, n))


@wrong("12.1", "padding counted", 1, "huggingface/trl#7024")
def sums_over_padding(student, teacher, mask):
    return (student - teacher).flip(1).cumsum(1).flip(1) * mask


@wrong("12.1", "padding counted and weighed", 1, "huggingface/trl#7024")
def no_mask(student, teacher, mask):
    return (student - teacher).flip(1).cumsum(1).flip(1)


@wrong("12.1", "sign swapped", 0)
def teacher_minus_student(student, teacher, mask):
    return looped(teacher, student, mask, lambda t, n: range(t, n))


@wrong("12.1", "mean for the sum", 0)
def length_normalised(student, teacher, mask):
    span = lambda t, n: range(t, n)  # noqa: E731
    return looped(student, teacher, mask, span, lambda t, n: 1 / (n - t))


@wrong("12.1", "one weight for the batch", 0)
def summed_over_answers(student, teacher, mask):
    each = torch.tensor(token_by_token(student, teacher, mask), dtype=torch.float64)
    return each.sum(0, keepdim=True) * mask


@wrong("12.1", "wrong shape", 0, "summed over tokens")
def one_an_answer(student, teacher, mask):
    return ((student - teacher) * mask).sum(1)


# --- 12.2 own_words_mean ---


def own(tokens, end):
    """How many tokens of each row the student wrote."""
    return [row.index(end) + 1 if end in row else len(row) for row in tokens.tolist()]


@honest("12.2")
def row_by_row(losses, tokens, end):
    kept = [
        x
        for row, n in zip(losses.tolist(), own(tokens, end), strict=True)
        for x in row[:n]
    ]
    return sum(kept) / len(kept)


@honest("12.2")
def shifted_mask(losses, tokens, end):
    ended = (tokens == end).cumsum(1).bool()
    before = torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], 1)
    mask = (~before).double()
    return (losses * mask).sum() / mask.sum()


@honest("12.2")
def end_in_float32(losses, tokens, end):
    return shifted_mask(losses.float(), tokens, end).float()


@wrong("12.2", "end token dropped", 0, "huggingface/trl#6357")
def not_padding(losses, tokens, end):
    return losses[tokens != end].mean()


@wrong("12.2", "padding counted", 0, "huggingface/trl#2058")
def everything(losses, tokens, end):
    return losses.mean()


@wrong("12.2", "padding in the denominator", 0)
def over_all_cells(losses, tokens, end):
    return row_by_row(losses, tokens, end) * sum(own(tokens, end)) / tokens.numel()


@wrong("12.2", "mean of means", 0)
def answers_alike(losses, tokens, end):
    rows = zip(losses.tolist(), own(tokens, end), strict=True)
    return sum(sum(row[:n]) / n for row, n in rows) / len(losses)


@wrong("12.2", "divided by the answers", 0)
def per_answer(losses, tokens, end):
    rows = zip(losses.tolist(), own(tokens, end), strict=True)
    return sum(sum(row[:n]) for row, n in rows) / len(losses)


@wrong("12.2", "cut answers lost", 2)
def argmax_of_nothing(losses, tokens, end):
    last = (tokens == end).int().argmax(1)
    mask = torch.arange(tokens.shape[1])[None] <= last[:, None]
    return losses[mask].mean()


@wrong("12.2", "cut answers left out", 2)
def only_finished(losses, tokens, end):
    done = (tokens == end).any(1)
    return row_by_row(losses[done], tokens[done], end)


@wrong("12.2", "one token too many", 0)
def past_the_end(losses, tokens, end):
    kept = [
        x
        for row, n in zip(losses.tolist(), own(tokens, end), strict=True)
        for x in row[: n + 1]
    ]
    return sum(kept) / len(kept)


@wrong("12.2", "sum", 0)
def not_divided(losses, tokens, end):
    return row_by_row(losses, tokens, end) * sum(own(tokens, end))


# --- 12.3 served_kl ---


def chance(logits, tokens, temperature=1.0):
    p = (logits / temperature).softmax(-1)
    return p[torch.arange(len(tokens)), tokens]


@honest("12.3")
def by_probabilities(writer, temperature, student, teacher, tokens):
    s, t = chance(student, tokens), chance(teacher, tokens)
    return s / chance(writer, tokens, temperature) * (s / t).log()


@honest("12.3")
def by_hand(writer, temperature, student, teacher, tokens):
    found = []
    for w, s, t, y in zip(writer, student, teacher, tokens.tolist(), strict=True):
        log_w = w[y] / temperature - (w / temperature).logsumexp(0)
        log_s, log_t = s[y] - s.logsumexp(0), t[y] - t.logsumexp(0)
        found.append(((log_s - log_w).exp() * (log_s - log_t)).item())
    return found


@honest("12.3")
def served_in_float32(writer, temperature, student, teacher, tokens):
    logits = (writer.float(), temperature, student.float(), teacher.float())
    return by_probabilities(*logits, tokens)


def changed(weight, value=None):
    """weight and value: functions of what chance() gives, by name."""

    def answer(writer, temperature, student, teacher, tokens):
        p = {
            "s": chance(student, tokens),
            "t": chance(teacher, tokens),
            "w": chance(writer, tokens),
            "s_tau": chance(student, tokens, temperature),
            "t_tau": chance(teacher, tokens, temperature),
            "w_tau": chance(writer, tokens, temperature),
            "tau": temperature,
        }
        ratio = value(p) if value else p["s"] / p["t"]
        return weight(p) * ratio.log()

    return answer


for bug, points, seen, weight, value in [
    (
        "no importance weight",
        1,
        "huggingface/trl#3867 and verl-project/verl#2953",
        lambda p: 1.0,
        None,
    ),
    (
        "sampling temperature ignored",
        2,
        "huggingface/trl#4159",
        lambda p: p["s"] / p["w"],
        None,
    ),
    (
        "log-probabilities divided",
        2,
        "PrimeIntellect-ai/prime-rl#697",
        lambda p: p["s"] / p["w"] ** (1 / p["tau"]),
        None,
    ),
    ("weight upside down", 1, "", lambda p: p["w_tau"] / p["s"], None),
    (
        "student at the sampling temperature",
        2,
        "",
        lambda p: p["s_tau"] / p["w_tau"],
        None,
    ),
    (
        "sampling temperature in the divergence",
        2,
        "huggingface/trl#5731",
        lambda p: p["s"] / p["w_tau"],
        lambda p: p["s_tau"] / p["t_tau"],
    ),
    (
        "all at the sampling temperature",
        2,
        "",
        lambda p: p["s_tau"] / p["w_tau"],
        lambda p: p["s_tau"] / p["t_tau"],
    ),
    (
        "compared with the writer",
        1,
        "",
        lambda p: p["s"] / p["w_tau"],
        lambda p: p["w"] / p["t"],
    ),
    (
        "sign swapped",
        0,
        "",
        lambda p: p["s"] / p["w_tau"],
        lambda p: p["t"] / p["s"],
    ),
    ("weighed towards the teacher", 0, "", lambda p: p["t"] / p["w_tau"], None),
    (
        "logarithm for the weight",
        1,
        "",
        lambda p: 1 + (p["s"] / p["w_tau"]).log(),
        None,
    ),
]:
    wrong("12.3", bug, points, seen)(changed(weight, value))


@wrong("12.3", "wrong shape", 0, "summed over tokens")
def served_mean(writer, temperature, student, teacher, tokens):
    return by_probabilities(writer, temperature, student, teacher, tokens).mean()


# --- 12.4 forecasts ---

GUESS = {"valid": 0.13, "seeking": 0.7, "survives": 0.37, "price": 3}
HONEST += [
    ("12.4", GUESS),
    ("12.4", {"valid": 1 / 8, "seeking": 0.6, "survives": 0.3, "price": 2.5}),
    ("12.4", {key: np.float32(value) for key, value in GUESS.items()}),
]
for key, value, bug in [
    ("valid", 1, "all"),
    ("valid", 1 / 16, "one answer"),
    ("valid", 0.5, "a coin"),
    ("seeking", 0.45, None),
    ("seeking", 2.77, "per word"),
    ("survives", 0.01, "added"),
    ("survives", 0.99, "first word"),
    ("price", 1.33, "teacher forgotten"),
    ("price", 6.33, "teacher trained"),
    ("price", 1, "nothing"),
]:
    WRONG.append(("12.4", GUESS | {key: value}, "wrong", bug, 3.5, ""))
for value, bug in [
    (..., "incomplete"),
    ("much", "wrong type"),
    (-1, "not positive"),
    (float("inf"), "not finite"),
]:
    WRONG.append(("12.4", GUESS | {"valid": value}, "wrong", bug, 3, ""))

# --- 12.5 whose_prefixes ---

KEY = {"a": "C", "b": "A", "c": "B", "d": "A", "e": "C"}
HONEST += [("12.5", KEY), ("12.5", {k: f" {v.lower()}" for k, v in KEY.items()})]
for item, right in KEY.items():
    for letter in sorted(set("ABC") - {right}):
        WRONG.append(("12.5", KEY | {item: letter}, "wrong", f"{item} {letter}", 4, ""))
for value, bug in [("D", "no such option"), (1, "no such option"), (..., "incomplete")]:
    WRONG.append(("12.5", KEY | {"a": value}, "wrong", bug, 4, ""))
