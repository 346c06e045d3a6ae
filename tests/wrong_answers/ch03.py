"""Answers to the exercises of chapter 3: wrong ones, and honest variants of right ones.

A wrong answer comes with its provenance, the outcome and the bug's name that the
checker must give, and the points that are left.
"""

from __future__ import annotations

import itertools
from math import log, log2, prod

import numpy as np
import torch
import torch.nn.functional as F
from wrong_answers.collect import collectors

WRONG, HONEST, wrong, honest = collectors()


# --- 3.1 sequence_kl ---

# The checker goes through tables. These walk along answers, one by one, so that the
# two are not the same code.


def walk(teacher, student, *, token=None, by="teacher", ends=True, weigh="product"):
    """{place: sum over its prefixes}; `by` whose prefixes, `weigh` how."""
    token = token or kl
    vocab = len(teacher[0][0])
    sums = []
    for t in range(len(teacher)):
        value, count = 0.0, 0
        for prefix in itertools.product(range(vocab), repeat=t):
            if ends and 0 in prefix:
                continue
            row, written = 0, []
            author = teacher if by == "teacher" else student
            for place, token_id in enumerate(prefix):
                written.append(float(author[place][row][token_id]))
                row = row * vocab + token_id
            weight = {
                "product": lambda w: prod(w),
                "last": lambda w: w[-1] if w else 1.0,
                "one": lambda w: 1.0,
                "mean": lambda w: 1.0,
            }[weigh](written)
            p, q = teacher[t][row].tolist(), student[t][row].tolist()
            value, count = value + weight * token(p, q), count + 1
        sums.append(value / count if weigh == "mean" else value)
    return sums


def kl(p, q):
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def reverse(p, q):
    pairs = zip(p, q, strict=True)
    return sum(b * (log(b / a) if a > 0 else float("inf")) for a, b in pairs)


@wrong("3.1", "counted after the end", 1, "huggingface/trl#7024")
def padding_in_the_loss(teacher, student):
    return sum(walk(teacher, student, ends=False))


@wrong("3.1", "counted after the end", 1, "huggingface/trl#7024")
def padding_in_the_loss_from_tables(teacher, student):
    total, reached = 0.0, torch.ones(1, dtype=torch.float64)
    for p, q in zip(teacher, student, strict=True):
        per_row = F.kl_div(q.log(), p, reduction="none").sum(1)
        total = total + reached @ per_row
        reached = (reached[:, None] * p).flatten()
    return total


@wrong("3.1", "student's prefixes", 1, "idanshen/Self-Distillation#5")
def on_policy_forward_kl(teacher, student):
    return sum(walk(teacher, student, by="student"))


@wrong("3.1", "prefixes weighed alike", 1)
def mean_over_prefixes(teacher, student):
    return sum(walk(teacher, student, weigh="mean"))


@wrong("3.1", "prefixes weighed alike", 1)
def mean_over_rows(teacher, student):
    return sum(walk(teacher, student, weigh="mean", ends=False))


@wrong("3.1", "prefixes not weighed", 1)
def sum_over_prefixes(teacher, student):
    return sum(walk(teacher, student, weigh="one"))


@wrong("3.1", "prefixes not weighed", 1)
def sum_over_rows(teacher, student):
    return sum(walk(teacher, student, weigh="one", ends=False))


@wrong("3.1", "last token for the prefix", 1)
def last_token(teacher, student):
    total, reached = 0.0, torch.ones(1, dtype=torch.float64)
    for p, q in zip(teacher, student, strict=True):
        total = total + reached @ F.kl_div(q.log(), p, reduction="none").sum(1)
        reached = p.clone()
        reached[:, 0] = 0
        reached = reached.flatten()
    return total


@wrong("3.1", "mean over the places", 1, "pytorch/tutorials#325, minimind#298")
def mean_over_places(teacher, student):
    return sum(walk(teacher, student)) / len(teacher)


@wrong("3.1", "direction swapped", 0, "paiml/aprender#2153")
def swapped(teacher, student):
    return sum(walk(student, teacher, token=lambda p, q: reverse(q, p)))


@wrong("3.1", None, 0, "the same, with a clamp that nobody can guess")
def swapped_and_clamped(teacher, student):
    teacher = [table.clamp(min=1e-30) for table in teacher]
    return sum(walk(student, teacher))


@wrong("3.1", "tokens swapped", 0)
def reverse_on_the_teacher_s_prefixes(teacher, student):
    return sum(walk(teacher, student, token=reverse))


@wrong("3.1", "cross-entropy", 0, "jongwooko/distillm#7")
def cross_entropy(teacher, student):
    return sum(walk(teacher, student, token=lambda p, q: -dot_log(p, q)))


@wrong("3.1", "cross-entropy without its minus", 0, "arXiv:2501.09223, chapter 3")
def as_printed(teacher, student):
    return sum(walk(teacher, student, token=lambda p, q: dot_log(p, q)))


def dot_log(p, q):
    return sum(a * log(b) for a, b in zip(p, q, strict=True))


@wrong("3.1", "end token left out", 0, "huggingface/trl#6357")
def end_masked(teacher, student):
    return sum(walk(teacher, student, token=lambda p, q: kl(p[1:], q[1:])))


@wrong("3.1", "first token left out", 0)
def shifted(teacher, student):
    return sum(walk(teacher, student)[1:])


@wrong("3.1", "mean over the vocabulary", 0, "HikariTJU/LD#74")
def mean_reduction(teacher, student):
    return sum(walk(teacher, student, token=lambda p, q: kl(p, q) / len(p)))


@wrong("3.1", "bits for nats", 0)
def in_bits(teacher, student):
    return sum(walk(teacher, student)) / log(2)


@wrong("3.1", "not finite", 3, "0 log 0 is NaN in floats")
def nan_at_zero(teacher, student):
    total, reached = 0.0, torch.ones(1, dtype=torch.float64)
    for p, q in zip(teacher, student, strict=True):
        total = total + reached @ (p * (p / q).log()).sum(1)
        reached = (reached[:, None] * p).clone()
        reached[:, 0] = 0
        reached = reached.flatten()
    return total


@wrong("3.1", "changes its input", 0, "the view is zeroed in place")
def edits_the_table(teacher, student):
    total = right_kl(teacher, student)
    for table in teacher:
        table[:, 0] = 0
    return total


@wrong("3.1", "wrong shape", 0, "the sum over prefixes forgotten")
def by_prefix(teacher, student):
    return F.kl_div(student[-1].log(), teacher[-1], reduction="none").sum(1)[None]


@wrong("3.1", None, 3, "an entropy of the wrong side for impossible tokens")
def smoothed(teacher, student):
    return sum(walk([t + 1e-4 * (t == 0) for t in teacher], student))


@honest("3.1")
def right_kl(teacher, student):
    return sum(walk(teacher, student))


@honest("3.1")
def by_listing(teacher, student):
    """Every answer with its two probabilities, then the definition."""
    vocab, length = len(teacher[0][0]), len(teacher)
    total = 0.0
    for n in range(1, length + 1):
        for y in itertools.product(range(vocab), repeat=n):
            if 0 in y[:-1] or (n < length and y[-1] != 0):
                continue
            row, p, q = 0, 1.0, 1.0
            for t, token in enumerate(y):
                p *= float(teacher[t][row, token])
                q *= float(student[t][row, token])
                row = row * vocab + token
            if p > 0:
                total += p * log(p / q)
    return total


@honest("3.1")
def recursive(teacher, student, t=0, row=0):
    """A prefix's own KL, and that of all that can follow it."""
    if t == len(teacher):
        return 0.0
    vocab = teacher[0].shape[1]
    own = kl(teacher[t][row].tolist(), student[t][row].tolist())
    for token in range(1, vocab):
        later = recursive(teacher, student, t + 1, row * vocab + token)
        own += float(teacher[t][row, token]) * later
    return own


@honest("3.1")
def in_numpy(teacher, student):
    total, reached = 0.0, np.ones(1)
    for p, q in zip(teacher, student, strict=True):
        p, q = p.numpy(), q.numpy()
        terms = np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.log(q)), 0)
        total += reached @ terms.sum(1)
        goes_on = np.arange(p.shape[1]) > 0
        reached = (reached[:, None] * p * goes_on).ravel()
    return total


@honest("3.1")
def with_an_epsilon(teacher, student):
    total, reached = 0.0, torch.ones(1)
    for p, q in zip(teacher, student, strict=True):
        per_row = (p * ((p + 1e-12).log() - q.log())).sum(1)
        total = total + (reached * per_row).sum()
        reached = reached[:, None] * torch.cat([0 * p[:, :1], p[:, 1:]], 1)
        reached = reached.flatten()
    return total


@honest("3.1")
def in_float32(teacher, student):
    total, log_reached = 0.0, torch.zeros(1)
    for p, q in zip(teacher, student, strict=True):
        p, q = p.float(), q.float()
        per_row = F.kl_div(q.log(), p, reduction="none").sum(1)
        total = total + (log_reached.exp() * per_row).sum()
        log_reached = log_reached[:, None] + p.log()
        log_reached[:, 0] = float("-inf")
        log_reached = log_reached.flatten()
    return total


# --- 3.2 loss_above_floor ---

# Pairs of Python floats here, tensors in the checker.


def lists(*tensors):
    return [tensor.tolist() for tensor in tensors]


def parts(prior, teacher, simplified, student):
    """For each x': the prior and the distributions of its contexts, and q."""
    prior, teacher, simplified, student = lists(prior, teacher, simplified, student)
    for x, q in enumerate(student):
        mine = [c for c, of in enumerate(simplified) if of == x]
        yield [prior[c] for c in mine], [teacher[c] for c in mine], q


def mixed(weights, rows):
    pairs = [*zip(weights, rows, strict=True)]
    return [sum(w * row[y] for w, row in pairs) for y in range(len(rows[0]))]


def given(weights):
    return [w / sum(weights) for w in weights]


@honest("3.2")
def right_rest(*args):
    return sum(sum(r) * kl(mixed(given(r), p), q) for r, p, q in parts(*args))


@honest("3.2")
def loss_minus_floor(prior, teacher, simplified, student):
    q = student[simplified]
    tags = F.one_hot(simplified).to(prior.dtype)  # [C, G]
    joint = prior[:, None] * teacher
    mixture = (tags.T @ joint) / (tags.T @ prior)[:, None]
    loss = (joint * (teacher / q).log()).sum()
    floor = (joint * (teacher / mixture[simplified]).log()).sum()
    return loss - floor


@honest("3.2")
def from_the_mixture_s_joint(prior, teacher, simplified, student):
    joint = torch.zeros_like(student).index_add(0, simplified, prior[:, None] * teacher)
    share = joint.sum(1, keepdim=True)
    return (joint * (joint / share / student).log()).sum()


@honest("3.2")
def rest_in_float32(prior, teacher, simplified, student):
    return from_the_mixture_s_joint(
        prior.float(), teacher.float(), simplified, student.float()
    )


@honest("3.2")
def rest_in_numpy(prior, teacher, simplified, student):
    prior, teacher, simplified, student = (
        x.numpy() for x in (prior, teacher, simplified, student)
    )
    found = np.float64(0)
    for x in np.unique(simplified):
        r = np.where(simplified == x, prior, 0)
        m = r @ teacher / r.sum()
        found += r.sum() * np.sum(m * np.log(m / student[x]))
    return found


@wrong("3.2", "whole loss", 1)
def all_of_it(prior, teacher, simplified, student):
    p, r, q, x = lists(teacher, prior, student, simplified)
    return sum(r[c] * kl(p[c], q[x[c]]) for c in range(len(r)))


@wrong("3.2", "floor", 0)
def the_floor(*args):
    total = 0.0
    for r, p, _ in parts(*args):
        m = mixed(given(r), p)
        total += sum(w * kl(row, m) for w, row in zip(r, p, strict=True))
    return total


@wrong("3.2", "contexts weighed alike", 0)
def uniform_prior(prior, *rest):
    return right_rest(torch.full_like(prior, 1 / len(prior)), *rest)


@wrong("3.2", "mixture of equal parts", 1)
def plain_mean_of_members(*args):
    return sum(
        sum(r) * kl(mixed(given([1] * len(r)), p), q) for r, p, q in parts(*args)
    )


@wrong("3.2", "mixture without sum one", 2)
def joint_for_the_mixture(*args):
    return sum(sum(r) * kl(mixed(r, p), q) for r, p, q in parts(*args))


@wrong("3.2", "inputs weighed alike", 2)
def mean_over_inputs(*args):
    values = [kl(mixed(given(r), p), q) for r, p, q in parts(*args)]
    return sum(values) / len(values)


@wrong("3.2", "inputs not weighed", 2)
def sum_over_inputs(*args):
    return sum(kl(mixed(given(r), p), q) for r, p, q in parts(*args))


@wrong("3.2", "direction swapped", 0, "paiml/aprender#2153")
def reverse_rest(*args):
    return sum(sum(r) * kl(q, mixed(given(r), p)) for r, p, q in parts(*args))


@wrong("3.2", "tag ignored", 2)
def one_mixture(prior, teacher, simplified, student):
    m = (prior @ teacher).tolist()
    return sum(
        sum(r) * kl(m, q) for r, _, q in parts(prior, teacher, simplified, student)
    )


@wrong("3.2", "product for the mixture", 1)
def product_of_experts(*args):
    total = 0.0
    for r, p, q in parts(*args):
        logs = mixed(given(r), [[log(v) for v in row] for row in p])
        m = torch.tensor(logs, dtype=torch.float64).softmax(0).tolist()
        total += sum(r) * kl(m, q)
    return total


@wrong("3.2", "entropy left in", 0, "jongwooko/distillm#7")
def from_cross_entropy(prior, teacher, simplified, student):
    cross = -(prior[:, None] * teacher * student[simplified].log()).sum()
    return float(cross) - the_floor(prior, teacher, simplified, student)


@wrong("3.2", "bits for nats", 0)
def rest_in_bits(*args):
    total = 0.0
    for r, p, q in parts(*args):
        m = mixed(given(r), p)
        total += sum(r) * sum(a * log2(a / b) for a, b in zip(m, q, strict=True))
    return total


@wrong("3.2", "wrong shape", 0, "the sum over x' forgotten")
def one_a_tag(*args):
    return [sum(r) * kl(mixed(given(r), p), q) for r, p, q in parts(*args)]


@wrong("3.2", None, 0, "a gap is not a divergence")
def squares(prior, teacher, simplified, student):
    gap = (teacher - student[simplified]) ** 2
    return (prior[:, None] * gap).sum()


@wrong("3.2", "raised", 1, "contexts and tags have other numbers", "raised")
def student_by_context(prior, teacher, simplified, student):
    if len(student) == len(prior):
        return right_rest(prior, teacher, simplified, student)
    return (prior[:, None] * teacher * (teacher.log() - student[len(prior) - 1])).sum()


# --- 3.3 best_student ---


def by_rows(p, rows):
    """Each answer's distributions, in the order in which rows first appear."""
    found = {}
    for row, distribution in zip(rows.tolist(), p.tolist(), strict=True):
        found.setdefault(row, []).append(distribution)
    return list(found.values())


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@honest("3.3")
def right_student(p, rows, reduction):
    if reduction == "token_mean":
        return p.mean(0)
    return mean([mean(answer) for answer in by_rows(p, rows)])


@honest("3.3")
def student_in_numpy(p, rows, reduction):
    p, rows = p.numpy(), rows.numpy()
    if reduction == "token_mean":
        return np.average(p, axis=0)
    return np.mean([p[rows == row].mean(0) for row in np.unique(rows)], axis=0)


@honest("3.3")
def student_in_float32(p, rows, reduction):
    return torch.tensor(right_student(p, rows, reduction)).float()


@honest("3.3")
def weights_in_float32(p, rows, reduction):
    """torch's default dtype for 1 / n."""
    length = (rows[:, None] == rows).sum(1)
    weights = 1 / (length * len(rows.unique()))
    if reduction == "token_mean":
        weights = torch.full((len(rows),), 1 / len(rows))
    return (weights[:, None] * p).sum(0)


@honest("3.3")
def normalised_at_the_end(p, rows, reduction):
    counts = dict(zip(*rows.unique(return_counts=True), strict=True))
    counts = {int(row): int(n) for row, n in counts.items()}
    weights = [
        1.0 if reduction == "token_mean" else 1.0 / counts[row] for row in rows.tolist()
    ]
    q = torch.tensor(weights, dtype=torch.float64) @ p
    return q / q.sum()


@wrong("3.3", "every token alike", 1)
def token_mean(p, rows, reduction):
    return p.mean(0)


@wrong("3.3", "every answer alike", 3, "verl-project/verl#7200, ms-swift#10076")
def mean_of_means(p, rows, reduction):
    return mean([mean(answer) for answer in by_rows(p, rows)])


@wrong("3.3", "the other reduction", 0)
def other_way_round(p, rows, reduction):
    other = "sequence_mean" if reduction == "token_mean" else "token_mean"
    return right_student(p, rows, other)


@wrong("3.3", "geometric mean", 0)
def mean_of_logits(p, rows, reduction):
    return torch.tensor(right_student(p.log(), rows, reduction)).softmax(0)


@wrong("3.3", "favourites counted", 0)
def votes(p, rows, reduction):
    return right_student(F.one_hot(p.argmax(1), p.shape[1]).double(), rows, reduction)


@wrong("3.3", "not divided", 0)
def sums(p, rows, reduction):
    if reduction == "token_mean":
        return p.sum(0)
    answers = torch.tensor([mean(a) for a in by_rows(p, rows)], dtype=torch.float64)
    return answers.sum(0)


@wrong("3.3", "padding counted", 0, "eladhoffer/utils.pytorch#4")
def padded(p, rows, reduction):
    answers = [torch.tensor(a, dtype=torch.float64) for a in by_rows(p, rows)]
    batch = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True)
    return batch.mean((0, 1))


@wrong("3.3", "missing rows counted", 3)
def rows_from_zero(p, rows, reduction):
    if reduction == "token_mean":
        return p.mean(0)
    answers = int(rows.max()) + 1
    total = torch.zeros(answers, p.shape[1], dtype=p.dtype).index_add(0, rows, p)
    length = torch.bincount(rows, minlength=answers).clamp(min=1)
    return (total / length[:, None]).mean(0)


@wrong("3.3", "raised", 3, "rows are taken for places", "raised")
def rows_are_places(p, rows, reduction):
    if reduction == "token_mean":
        return p.mean(0)
    length = rows.unique(return_counts=True)[1]
    return (p / length[rows][:, None]).sum(0) / len(length)


@wrong("3.3", "wrong shape", 0, "the sum over tokens forgotten")
def weighted_rows(p, rows, reduction):
    return p / len(p)


@wrong("3.3", None, 0, "a student that is sure")
def sure(p, rows, reduction):
    q = torch.zeros(p.shape[1]) + 1e-3
    q[p.mean(0).argmax()] = 1
    return q / q.sum()


# --- 3.4 costs ---

GUESS = {"digits": 90, "days": 1.4, "mode": 0.12, "answers": 2500}
HONEST += [
    ("3.4", GUESS),
    ("3.4", {"digits": 100, "days": 2, "mode": 0.1, "answers": 2000}),
    ("3.4", {key: np.float32(value) for key, value in GUESS.items()}),
]
for key, value, bug in [
    ("digits", 6, "product for the power"),
    ("digits", 41_600, "base and exponent swapped"),
    ("days", 125_000, "seconds"),
    ("days", 35, "hours"),
    ("days", 2.9e-5, "one place too few"),
    ("days", 72_000, "one place too many"),
    ("mode", 0.9, "one token's share"),
    ("mode", 0.045, "divided"),
    ("answers", 50, "square forgotten"),
    ("answers", 75, "variance over the error"),
    ("answers", 400, None),
]:
    WRONG.append(("3.4", GUESS | {key: value}, "wrong", bug, 3.5, ""))
for value, bug in [
    (..., "incomplete"),
    ("a day", "wrong type"),
    (-1, "not positive"),
    (float("inf"), "not finite"),
]:
    WRONG.append(("3.4", GUESS | {"days": value}, "wrong", bug, 3, ""))

# --- 3.5 what_is_minimised ---

KEY = {"a": "B", "b": "C", "c": "A", "d": "B", "e": "C"}
HONEST += [("3.5", KEY), ("3.5", {k: f" {v.lower()}" for k, v in KEY.items()})]
for item, right in KEY.items():
    for letter in sorted(set("ABC") - {right}):
        WRONG.append(("3.5", KEY | {item: letter}, "wrong", f"{item} {letter}", 4, ""))
for value, bug in [("D", "no such option"), (1, "no such option"), (..., "incomplete")]:
    WRONG.append(("3.5", KEY | {"a": value}, "wrong", bug, 4, ""))
