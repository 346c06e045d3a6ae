# %% [markdown]
# # 12 · Learning from your own mistakes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/notebooks/12_own_mistakes.ipynb)
#
# | what it costs | |
# |---|---|
# | two CPU cores | 1 minute |
# | GPU | not needed; `KD_PROFILE=gpu` makes section 5 larger |
# | memory | 1 GiB |
# | network, account, key | none |

# %% [markdown]
# ## What you will be able to do
#
# 1. Draw exposure bias by position, and say where it comes from.
# 2. Tell the four sums of prefixes and divergences apart, and name the two
#    that are a KL of whole answers.
# 3. Explain why a student of one best answer should hardly need a beam.
# 4. Derive the on-policy gradient, and say what a per-token loss leaves out.
# 5. Choose prefixes and divergence for a student that is too small.
# 6. Say when training on one's own words does not pay.
#
# Chapter 5 compared divergences at given prefixes. Here the prefixes move.
#
# The next cell is the same in every chapter. In a clone it does nothing
# much; in Colab or Kaggle it fetches the course.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://github.com/kdlib/kdlib.git"
if importlib.util.find_spec("kdlib") is None:
    here = [Path.cwd(), *Path.cwd().parents, Path("kdlib-course")]
    clones = [p for p in here if (p / "kdlib" / "errors.py").exists()]
    if not clones:  # neither installed nor inside a clone
        source = os.environ.get("KD_REPO", REPOSITORY)
        command = f'git clone --depth=1 "{source}" kdlib-course'
        failed, said = subprocess.getstatusoutput(command)
        if failed:
            way_out = "Needed: git and a network (Kaggle: Settings, Internet)."
            way_out += " Delete kdlib-course if it is here. Run this again."
            raise SystemExit(f"{command}\n{said}\n{way_out}")
        clones = [Path("kdlib-course")]
    sys.path.insert(0, str(clones[0].resolve()))

import kdlib

PROFILE = os.environ.get("KD_PROFILE") or "cpu"

# %%
import inspect
import json
from math import log
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from kdlib import claims, exact, plots
from kdlib.divergences import forward_kl, reverse_kl
from kdlib.estimators import surrogate
from kdlib.exact import ExactLM
from kdlib.ledger import (
    Interval,
    mean_interval,
    provenance,
    ratio_interval,
    write_json,
)

plt.rcParams.update(plots.STYLE)
torch.set_num_threads(1)
RESULTS = Path(kdlib.__file__).parents[1] / "notebooks" / "results"

# %% [markdown]
# ## 1 · One mistake, and then?
#
# A student was trained on its teacher's answers. At each of their prefixes it
# errs with probability $\varepsilon$. In use it reads **its own** words. After
# a mistake it stands on a prefix that no answer of the teacher had.
#
# ### Predict
#
# $\varepsilon = 0.01$, an answer has 100 words, and after its first mistake a
# student is lost: all later words are wrong. How many words are wrong, on
# average? How many, if the mistakes did not spread?

# %%
epsilon, words = 0.01, 100
lost = [1 - (1 - epsilon) ** t for t in range(1, words + 1)]
print(f"still on known ground at the end: {1 - lost[-1]:.2f}")
print(f"wrong words if lost at once:      {sum(lost):.1f}")
print(f"wrong words if it recovers:       {epsilon * words:.1f}")

# %% [markdown]
# Vectorised, and for several lengths. For small $\varepsilon T$ the first
# grows as $\varepsilon T^2 / 2$, the second as $\varepsilon T$. This is the
# argument of Ross, Gordon and Bagnell 2011 (arXiv:1011.0686) for training on
# the states that the learner itself visits.

# %%
for length in (10, 20, 40):
    t = torch.arange(1, length + 1, dtype=torch.float64)
    spread = (1 - (1 - epsilon) ** t).sum()
    square = epsilon * length * (length + 1) / 2
    print(f"{length:3} words: {spread:5.2f}, epsilon T(T+1)/2 {square:5.2f}")
    assert spread < square
assert abs((1 - (1 - 1e-6) ** t).sum() / (1e-6 * 40 * 41 / 2) - 1) < 1e-4

# %% [markdown]
# ### A world that can be listed
#
# Is a student lost after a mistake? That is a question about its next-token
# distributions at strange prefixes, and so a KL by position, with prefixes
# from somebody. Take a teacher that is rather sure of itself. Its student
# heard 200 answers. At each prefix that it heard it is nearly right, and at
# the others it guesses.

# %%
VOCAB, LENGTH, HEARD = 6, 6, 200
sure = ExactLM.random(vocab=VOCAB, length=LENGTH, scale=3.0, seed=4)
rng = torch.Generator().manual_seed(0)
numbers = sure.log_probs()[0].exp().multinomial(
    HEARD, replacement=True, generator=rng
)  # fmt: skip
tables, known = [], []
for t, table in enumerate(sure.tables):
    prefixes = numbers // VOCAB ** (LENGTH - t)
    heard = torch.zeros(VOCAB**t, dtype=torch.bool)
    heard[prefixes] = True
    nearly = 0.9 * table[0].softmax(-1) + 0.1 / VOCAB
    guess = torch.full_like(nearly, 1 / VOCAB)
    rows = torch.where(heard[:, None], nearly, guess)
    tables.append(rows.log()[None])
    known.append(heard)
learner = ExactLM(tables)
print("prefixes heard, by length:", [int(h.sum()) for h in known])

# %% [markdown]
# ### Predict
#
# At the sixth word: how often does the teacher stand on a prefix that the
# student knows? And how often does the student?

# %%
for name, walker in (("teacher", sure), ("student", learner)):
    shares = [
        (walker.log_probs(t)[0].exp() * known[t]).sum().item()
        for t in range(LENGTH)
    ]
    print(f"{name} on known ground:", [f"{share:.2f}" for share in shares])

# %%
gap = {}
for name, walker in (("teacher", sure), ("own", learner)):
    level = exact.token_level(sure, learner, prefixes_from=walker)
    gap[name] = level[:, 0].tolist()
    print(f"{name:8} prefixes", [f"{value:.2f}" for value in gap[name]])
assert abs(gap["teacher"][0] - gap["own"][0]) < 1e-12
assert gap["own"][-1] > gap["teacher"][-1]
total = exact.sequence_forward_kl(sure, learner).item()
assert abs(sum(gap["teacher"]) - total) < 1e-9

# %% [markdown]
# The first word has one prefix, the prompt: no difference. From there on the
# gap grows. A loss on the teacher's answers is the first line, and it is what
# a training log shows. The second line is what users get.
#
# **Exposure bias** is that difference: the loss at the student's own prefixes
# minus the loss at the prefixes that it was trained on.

# %% [markdown]
# ### The same for a real student
#
# The teacher of chapter 5's last experiment: the shipped model with a worked
# example that fits six languages. It answers in one of the six. Its student
# has half of its layers, and does not read the example.
#
# Each of five seeds warms a student up with forward KL on the teacher's
# answers. From there nine ways train on, all from the same weights and on the
# same inputs. The plan stands in the script,
# `notebooks/experiments/own_mistakes.py`, with what would speak against this
# chapter. Up to three seeds were seen before the plan was fixed. They are
# reported with the others.

# %%
found = json.loads((RESULTS / "own_mistakes.json").read_text())
settings = found["settings"]
for name, steps in settings["steps"].items():
    print(f"{name:28} {steps:4} steps")
print("warm-up", settings["warm steps"], "steps,", found["seeds"], "seeds,")
print(found["answers"], "answers to learn from,", found["test"], "test lists")

# %% [markdown]
# ### Predict
#
# Draw two curves in your head for the student that goes on with forward KL on
# the teacher's answers: its KL by position, at the teacher's prefixes and at
# its own. Then two more for the student that trains on its own answers.


# %%
def by_place(row, whose, measure="forward_kl"):
    """Mean over seeds at each place that is well visited on both sides."""
    runs = [r for r in found["runs"] if r["row"] == row]
    places = [
        place
        for place in range(len(runs[0][whose][f"{measure}_by_place"]))
        if all(
            run[w]["answers_at"][place] >= 50
            for run in runs
            for w in ("own_prefixes", "teacher_prefixes")
        )
    ]
    curves = [run[whose][f"{measure}_by_place"] for run in runs]
    values = torch.tensor([[c[p] for p in places] for c in curves])
    return [place + 1 for place in places], values


# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
kinds = {
    "forward KL": "trained on the teacher's words",
    "on-policy forward KL": "trained on its own words",
}
for axes, (row, title) in zip(panels, kinds.items(), strict=True):
    for whose, colour, label in (
        ("own_prefixes", plots.ORANGE, "at its own prefixes"),
        ("teacher_prefixes", plots.BLUE, "at the teacher's prefixes"),
    ):
        places, values = by_place(row, whose)
        axes.plot(places, values.mean(0), color=colour, label=label)
        low, high = values.min(0).values, values.max(0).values
        axes.fill_between(places, low, high, color=colour, alpha=0.2, lw=0)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("position in the answer")
    axes.set_xticks(range(1, max(places) + 1, 2))
panels[0].set_ylabel("KL(teacher || student), nats")
panels[0].set_ylim(bottom=0)
panels[0].legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# Lines are means over seeds, bands reach from the lowest seed to the highest.
# The gap between orange and blue is the exposure bias.

# %%
for name in ("own-exposure", "own-exposure-on-policy"):
    print(claims.find(name), end="\n\n")

# %% [markdown]
# At the first word both curves of a student must meet. Behind it there is a
# gap, but a small one: this student does not get lost. Perhaps because its
# answers are short lists, and each item says again what the language is.
#
# And mind the height of the curves. Training on its own words is not shown to
# close the gap. It lowers both curves, the blue one as well, although in this
# phase the student no longer saw the teacher's prefixes:

# %%
lower = found["minus"]["on-policy forward KL - forward KL"]
for name, where in (
    ("own_forward_kl", "at its own prefixes"),
    ("forward_kl", "at the teacher's prefixes"),
):
    print(f"{where:26} {Interval(**lower[name]).claim()}")

# %% [markdown]
# A student can also close a gap by being equally bad at both kinds of prefix,
# so report the curves and not the gap alone.

# %% [markdown]
# ## 2 · Two choices, four sums
#
# Every loss on sequences makes two choices: **whose prefixes**, and **which
# divergence** at them.
#
# | | teacher's prefixes | student's prefixes |
# |---|---|---|
# | **forward KL** | $\mathrm{KL}(p_t \Vert p_s)$ of answers | GKD, `beta` 0 |
# | **reverse KL** | a mixed case | $\mathrm{KL}(p_s \Vert p_t)$ of answers |
#
# The chain rule (chapter 3) needs the prefixes of the distribution that stands
# first in the KL. So two of the four are sequence-level KLs, and two are not.

# %%
pair = {
    "teacher": ExactLM.random(vocab=8, length=4, scale=1.5, seed=1),
    "student": ExactLM.random(vocab=8, length=4, scale=1.5, seed=2),
}
whole = {
    "forward": exact.sequence_forward_kl(*pair.values()).item(),
    "reverse": exact.sequence_reverse_kl(*pair.values()).item(),
}
sums = {}
for name, divergence in (("forward", forward_kl), ("reverse", reverse_kl)):
    for whose, model in pair.items():
        level = exact.token_level(
            *pair.values(), prefixes_from=model, divergence=divergence
        )
        sums[name, whose] = level.sum().item()
        same = abs(sums[name, whose] - whole[name]) < 1e-9
        print(f"{name} KL at {whose}'s prefixes {sums[name, whose]:6.3f}",
              "= the KL of whole answers" if same else "")  # fmt: skip
assert abs(sums["forward", "teacher"] - whole["forward"]) < 1e-9
assert abs(sums["reverse", "student"] - whole["reverse"]) < 1e-9

# %% [markdown]
# All four are zero for equal models. For a student that *cannot* be equal they
# want different things (section 6).
#
# `TrainConfig.lmbda` chooses the column, step by step: with probability
# `lmbda` the student writes the step's answers (GKD, Agarwal et al. 2023,
# arXiv:2306.13649). The objective's divergence chooses the line. Read aloud:

# %%
from kdlib.on_policy import Author

source = inspect.getsource(Author._rewrite).splitlines()
print("\n".join(source[2:9]))

# %% [markdown]
# ## 3 · The teacher's best answer
#
# The oldest way to put a teacher's *sequences* into a student is to let the
# teacher write, and to train on what it wrote as if it were data. Kim and Rush
# 2016 (arXiv:1606.07947) approximate the teacher by its mode,
# $\hat y = \arg\max_y p_t(y)$:
#
# $$-\sum_y p_t(y) \log p_s(y) \;\approx\; -\log p_s(\hat y),$$
#
# and search for $\hat y$ with a beam.
#
# ### Predict
#
# Is the word-by-word likeliest answer the likeliest answer?

# %%
WORDS = ["le", "der", "3", "mai", "Mai", "5", "mars", "."]


def number_of(text):
    found = 0
    for word in text.split():
        found = found * len(WORDS) + WORDS.index(word)
    return found


def text_of(number):
    words = exact.sequences(len(WORDS), 4)[number].tolist()
    return " ".join(WORDS[i] for i in words)


speaker = ExactLM.from_modes(
    [[WORDS.index(w) for w in text.split()] for text in
     ("le 3 mai .", "der 3 . Mai", "der 5 . Mai", "der 3 . mars")],
    [0.4, 0.25, 0.2, 0.15], noise=0.05,
)  # fmt: skip


# %%
def greedy(model):
    number = 0
    for table in model.tables:
        number = number * model.vocab + table[0, number].argmax().item()
    return number


def beam(model, width):
    kept = torch.zeros(1, dtype=torch.long)
    scores = torch.zeros(1, dtype=torch.float64)
    for table in model.tables:
        each = scores[:, None] + table[0, kept].log_softmax(-1)
        scores, place = each.flatten().topk(min(width, each.numel()))
        kept = kept[place // model.vocab] * model.vocab + place % model.vocab
    return kept[0].item()


best = speaker.log_probs()[0].argmax().item()
for name, number in (
    ("greedy", greedy(speaker)), ("beam of 2", beam(speaker, 2)),
    ("the mode", best),
):  # fmt: skip
    chance = speaker.log_probs()[0, number].exp()
    print(f"{name:10} {text_of(number):12} {chance:.2f}")
assert greedy(speaker) != best and beam(speaker, 2) == best

# %% [markdown]
# Most answers begin with `der`, but they disagree later. The likeliest whole
# answer begins with `le`. Greedy cannot take its first word back; a beam keeps
# both.
#
# ### A student of the mode
#
# One student learns the teacher's distribution, one its best answer. Both can
# hold all that they are taught. Which of them needs the beam?


# %%
def of_one_answer(number, certainty):
    rest = (1 - certainty) / (8**4 - 1)
    joint = torch.full((1, 8**4), rest, dtype=torch.float64)
    joint[0, number] = certainty
    return ExactLM.from_joint(joint.log(), 8)


students = {
    "of the distribution": speaker,
    "of the best answer": of_one_answer(best, 0.6),
}
for name, model in students.items():
    score = model.log_probs()[0]
    print(f"student {name:20} greedy {text_of(greedy(model)):12}"
          f" beam {text_of(beam(model, 2)):12}")  # fmt: skip
assert greedy(students["of the best answer"]) == best

# %% [markdown]
# An answer with more than half of the mass is found greedily, whatever the
# rest looks like: at each of its words the alternatives together have less.
# Kim and Rush's explanation is of this kind: a student of the mode has a
# sharper distribution, with little left to search.
#
# ### Published, and here
#
# Their abstract: the student beats a baseline trained without distillation
# "by 4.2/1.7 BLEU with greedy decoding/beam search". The gain is larger
# without a beam, which is to say that the beam helps the baseline by 2.5 more.
# Our row for the baseline is `hard labels`, on answers *drawn* by the teacher,
# which vary as human references do. The score is the share of test lists that
# are answered right in any of the languages, with a beam of 5.


# %%
def show(rows, columns):
    print(" " * 27, *[f"{name:>9}" for name in columns])
    for row in rows:
        values = found["rows"][row]
        cells = [f"{values[column]['mean']:9.3f}" for column in columns]
        print(f"{row:27}", *cells)


fixed = found["fixed"]["teacher"]
print(f"teacher: greedy {fixed['greedy']:.3f}, beam {fixed['beam']:.3f}")
show(
    ["warm student", "hard labels, equal tokens", "sequence-level"],
    ["greedy", "beam", "beam_gain"],
)

# %%
difference = found["minus"]["sequence-level - hard labels, equal tokens"]
print("sequence-level minus hard labels      greedy    beam")
print("Kim and Rush 2016, BLEU                  4.2     1.7")
ours = [100 * difference[name]["mean"] for name in ("greedy", "beam")]
print(f"here, hundredths answered right      {ours[0]:7.1f} {ours[1]:7.1f}")

# %%
for name in ("own-sequence-greedy", "own-sequence-beam", "own-beam-gain"):
    print(claims.find(name), end="\n\n")

# %% [markdown]
# Two things are asked of these lines. Is the student of best answers better?
# And does the beam add less to it? The first is not reproduced: it is worse
# than the student of drawn answers, greedily and with a beam. The second is:
# a beam adds less to it, by a little. But a small gap between two worse scores
# is no reason to drop the beam.
#
# Much is different here. A beam finds nothing in this teacher that its greedy
# answer has not: its two numbers above are equal. The student of best answers
# reads one answer for each list, that of drawn answers two. And lists are not
# translation, nor is BLEU a share of right answers.

# %% [markdown]
# ## 4 · The gradient of one's own answers
#
# Minimise $\mathrm{KL}(p_s \Vert p_t)$ over whole answers. The distribution
# that the mean is over moves with $\theta$, so
#
# $$\nabla\, \mathrm{KL}(p_s \Vert p_t) = \sum_y p_s(y)\, R(y)\,
#   \nabla \log p_s(y), \qquad
#   R(y) = \sum_t \log \frac{p_s(y_t \mid y_{<t})}{p_t(y_t \mid y_{<t})} .$$
#
# (The other term, $\sum_y p_s \nabla \log p_s = \nabla 1$, is zero.) It is a
# policy gradient with the reward $-R$. Multiply out $R$ and the score, both
# sums over words. A term of word $u$ with the score of a later word $t > u$
# has the mean zero. What is left for the score of word $t$:
#
# $$w_t = \underbrace{\log\tfrac{p_s}{p_t}(y_t)}_{\text{this word}} +
#   \underbrace{\sum_{u > t} \log\tfrac{p_s}{p_t}(y_u)}_{\text{its future}}$$

# %% [markdown]
# ### What a per-token loss leaves out
#
# GKD, and `lmbda` here, take the student's prefixes **as given**. That keeps
# the first part and drops the second: a word is judged by what the teacher
# thinks of it, not by where it leads.
#
# ### Predict
#
# The value of the loss is the same. Is the gradient, at least roughly?


# %%
def gradient(loss, model):
    found = torch.autograd.grad(loss, model.tables)
    return torch.cat([g.flatten() for g in found])


def given(model):
    return ExactLM([table.detach() for table in model.tables])


student = pair["student"].leaves()
as_given = exact.token_level(
    pair["teacher"], student,
    prefixes_from=given(student), divergence=reverse_kl,
).sum()  # fmt: skip
per_token = gradient(as_given, student)
sequence = torch.cat(
    [
        g.flatten()
        for g in exact.on_policy_gradient(pair["teacher"], pair["student"])
    ]
)
cosine = torch.cosine_similarity(per_token, sequence, dim=0)
print(f"value {as_given:.3f}, whole answers {whole['reverse']:.3f}")
print(f"cosine of the two gradients {cosine:.2f}")

# %% [markdown]
# The part that was dropped, by enumeration: each word's score, times the
# mean of all later log-ratios. With it the identity is exact.


# %%
def word_log_probs(model):
    """Of each word of each answer, given the words before it [V^L, L]."""
    answers = exact.sequences(model.vocab, model.length)
    found, prefix = [], torch.zeros(len(answers), dtype=torch.long)
    for t, table in enumerate(model.tables):
        found.append(table[0, prefix].log_softmax(-1))
        found[-1] = found[-1].gather(1, answers[:, t : t + 1])[:, 0]
        prefix = prefix * model.vocab + answers[:, t]
    return torch.stack(found, 1)


def score_sum(teacher, model, part):
    """The mean over answers of weighted scores, to differentiate."""
    own = word_log_probs(model)
    ratio = (own - word_log_probs(teacher)).detach()
    to_go = ratio.flip(1).cumsum(1).flip(1)
    weight = {"word": ratio, "later": to_go - ratio, "to go": to_go}[part]
    chance = own.detach().sum(1).exp()
    return (chance[:, None] * weight * own).sum()


# %%
parts = {
    part: gradient(score_sum(pair["teacher"], student, part), student)
    for part in ("word", "later", "to go")
}
torch.testing.assert_close(parts["word"], per_token)
torch.testing.assert_close(parts["to go"], sequence)
torch.testing.assert_close(parts["word"] + parts["later"], sequence)
print("length of each part:",
      {k: round(v.norm().item(), 2) for k, v in parts.items()})  # fmt: skip

# %% [markdown]
# Why leave it out? Because of the noise. The first part can be summed over the
# vocabulary at each prefix: `Objective("reverse_kl")` does that, and only the
# prefix is luck. The second part must be sampled, and is a sum of many noisy
# terms. How noisy, section 5 computes.

# %% [markdown]
# ### The estimators, from one's own samples
#
# If the teacher only returns the log-probability of each token, as a server
# does, then the sum over the vocabulary is out of reach too. Chapter 5 showed
# which function of the two numbers may be differentiated. By enumeration, for
# whole answers:

# %%
moments = {}
for name in ("k2", "score_function", "k3"):

    def value(log_ps, log_pt, name=name):
        return surrogate(name, log_ps, log_pt, accept_forward_kl=True)

    moments[name] = exact.estimator_moments(
        value, pair["teacher"], pair["student"]
    )
target = pair["student"].leaves()
forward = gradient(
    exact.sequence_forward_kl(pair["teacher"], target).sum(), target
)
for name, found_moments in moments.items():
    mean = torch.cat([g.flatten() for g in found_moments.gradient])
    which = "reverse" if torch.allclose(mean, sequence) else "neither"
    which = "forward" if torch.allclose(mean, forward) else which
    noise = found_moments.gradient_variance.sqrt().item()
    print(f"{name:15} mean gradient: {which} KL, std of a sample {noise:.1f}")

# %% [markdown]
# k2 and the score function agree sample by sample. k3, which many trainers log
# as "the KL", is a right *value* of the reverse KL, with the gradient of the
# forward KL. k1 has none: kdlib refuses both as losses, unless told that one
# knows.
#
# ## 5 · A race of estimators
#
# Means and variances are one thing, a run another. A student that is **too
# small** learns from samples that it draws itself. Its teacher means one of
# two answers.

# %%
modes = ["le 3 mai .", "der 5 . Mai"]
two = ExactLM.from_modes(
    [[WORDS.index(w) for w in text.split()] for text in modes],
    [0.6, 0.4], noise=0.05,
)  # fmt: skip
right = [number_of(text) for text in modes]
print("the teacher says one of the two:",
      f"{two.log_probs()[0, right].exp().sum():.2f}")  # fmt: skip

# %% [markdown]
# The student is memoryless: one distribution for each place, 32 numbers in
# all. It does not know which answer it began.
#
# First the noise of one sample's gradient, as sums over all 4,096 answers. A
# softmax's score is one-hot minus probabilities, so each sample's gradient is
# a line.

# %%
logits = 0.5 * torch.randn(
    4, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64
)
logits.requires_grad_()
small = ExactLM.memoryless(logits[None])
p = logits.detach().softmax(-1)
answers = exact.sequences(8, 4)
chance = small.log_probs()[0].detach().exp()[:, None, None]
rows, prefix = [], torch.zeros(len(answers), dtype=torch.long)
for t, table in enumerate(two.tables):
    rows.append(table[0, prefix].log_softmax(-1))
    prefix = prefix * 8 + answers[:, t]
rows = torch.stack(rows, 1)  # the teacher's log-probs [4096, 4, 8]
said = torch.nn.functional.one_hot(answers, 8).double()
ratio = ((p.log() - rows) * said).sum(-1)  # [4096, 4]
excess = p.log() - rows
excess = excess - (p * excess).sum(-1, keepdim=True)
samples = {
    "full: summed over the vocabulary": p * excess,
    "k2: this word": ratio[..., None] * (said - p),
    "to go": ratio.flip(1).cumsum(1).flip(1)[..., None] * (said - p),
    "whole answer": ratio.sum(1)[:, None, None] * (said - p),
}

# %%
means = {}
for name, each in samples.items():
    means[name] = (chance * each).sum(0)
    spread = (chance * (each - means[name]).square()).sum().sqrt()
    print(f"{name:33} mean {means[name].norm():.2f}, std {spread:5.2f}")
(autograd,) = torch.autograd.grad(
    exact.sequence_reverse_kl(two, small).sum(), logits
)
torch.testing.assert_close(means["to go"], autograd)
torch.testing.assert_close(means["whole answer"], autograd)
torch.testing.assert_close(
    means["k2: this word"], means["full: summed over the vocabulary"]
)

# %% [markdown]
# Two pairs of equal means. In each pair the second is the noisier: a sum over
# the vocabulary beats a sample, and words that were written *before* have no
# business in a word's weight. Between the pairs stands the price of the whole
# gradient.
#
# `KD_PROFILE=gpu` takes a larger vocabulary and many more samples to the card
# for what follows. The sums stay exact.

# %%
BIG = PROFILE == "gpu"
DEVICE = "cuda" if BIG else "cpu"
SIZE, SAMPLES, STEPS = (32, 8192, 400) if BIG else (8, 64, 150)
LOSSES = ("k1", "k2", "k3", "to go", "full")
if BIG:
    places = torch.tensor([[0, 2, 4, 6], [1, 3, 5, 7]])
    race_teacher = ExactLM.from_modes(
        places.tolist(), [0.6, 0.4], vocab=SIZE, noise=0.05
    )
    race_right = [
        sum(w * SIZE ** (3 - i) for i, w in enumerate(mode))
        for mode in places.tolist()
    ]
else:
    race_teacher, race_right = two, right
race_teacher = ExactLM([t.to(DEVICE) for t in race_teacher.tables])


# %%
def drawn(logits, samples, rng):
    """Answers of a memoryless student, and both log-probs of each word."""
    p = logits.detach().softmax(-1)
    words = p.multinomial(samples, replacement=True, generator=rng).T
    own = logits.log_softmax(-1)[torch.arange(4, device=DEVICE), words]
    other, rows, prefix = [], [], torch.zeros_like(words[:, 0])
    for t, table in enumerate(race_teacher.tables):
        rows.append(table[0, prefix].log_softmax(-1))
        other.append(rows[-1].gather(1, words[:, t : t + 1])[:, 0])
        prefix = prefix * SIZE + words[:, t]
    return own, torch.stack(other, 1), torch.stack(rows, 1)


def sampled_loss(name, logits, samples, rng):
    own, other, rows = drawn(logits, samples, rng)
    if name == "full":  # summed over the vocabulary, at sampled prefixes
        at = logits.expand(len(rows), -1, -1)
        return reverse_kl(at, rows).sum(1).mean()
    if name == "to go":
        ratio = (own - other).detach()
        weight = ratio.flip(1).cumsum(1).flip(1)
        return (weight * own).sum(1).mean()
    if name == "k1":  # refused by surrogate(), for the reason to be seen
        return (own - other).sum(1).mean()
    return surrogate(name, own, other, accept_forward_kl=True).sum(1).mean()


# %%
def race(name, seed):
    """Exact share of right answers, and reverse KL, before and after."""
    rng = torch.Generator(DEVICE).manual_seed(seed)
    logits = 0.1 * torch.randn(
        4, SIZE, generator=rng, device=DEVICE, dtype=torch.float64
    )
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    curve = []
    for step in range(STEPS + 1):
        if step % 10 == 0:
            with torch.no_grad():
                model = ExactLM.memoryless(logits[None])
                share = model.log_probs()[0, race_right].exp()
                kl = exact.sequence_reverse_kl(race_teacher, model)
            curve.append((step, share.sum().item(), kl.item()))
        optimizer.zero_grad()
        sampled_loss(name, logits, SAMPLES, rng).backward()
        optimizer.step()
    return curve


# %% [markdown]
# ### Predict
#
# Five losses, the same samples a step. Which student ends with the largest
# share of right answers? Which goes nowhere? Which one is forward KL in
# disguise, and what will it say?

# %%
SEEDS = 5
curves = {
    name: torch.tensor([race(name, seed) for seed in range(SEEDS)])
    for name in LOSSES
}
print("        right answers   reverse KL")
for name, curve in curves.items():
    share, kl = curve[:, -1, 1].mean(), curve[:, -1, 2].mean()
    print(f"{name:7} {share:13.2f} {kl:12.1f}")

# %%
looks = {
    "k1": (plots.GREY, ":"), "k2": (plots.BLUE, "--"),
    "k3": (plots.GREY, "-"), "to go": (plots.ORANGE, "-"),
    "full": (plots.BLUE, "-"),
}  # fmt: skip
figure, axes = plt.subplots(figsize=(6.5, 3))
for name, curve in curves.items():
    colour, line = looks[name]
    steps = curve[0, :, 0]
    axes.plot(steps, curve[:, :, 1].mean(0), color=colour, ls=line,
              label=name)  # fmt: skip
axes.set(xlabel="step", ylabel="share of right answers", ylim=(0, 1))
axes.legend(frameon=False, fontsize=9, ncols=5, loc="lower left",
            bbox_to_anchor=(0, 1))  # fmt: skip
plt.show()

# %% [markdown]
# - **k1** goes nowhere: its mean gradient is zero.
# - **k3** covers. It is forward KL, and says mostly answers of no language.
# - **k2** and **full** have one mean gradient, that of the reverse KL at
#   prefixes taken as given. They meet, and stay far below.
# - **to go** is the only one that is told where a word leads. It is the only
#   one that learns to finish the answer that it began.
#
# (`score_function` would draw the same line as k2: their gradients are equal
# sample by sample.)

# %%
if BIG:
    write_json(
        RESULTS / "own_mistakes_gpu.json",
        {
            **provenance(
                "python notebooks/experiments/own_mistakes_gpu.py"
            ),
            "vocabulary": SIZE, "samples": SAMPLES, "steps": STEPS,
            "seeds": SEEDS,
            "curves": {k: v.tolist() for k, v in curves.items()},
        },
    )  # fmt: skip

# %% [markdown]
# On a card the same cells have a vocabulary of 32 (a million answers) and
# 8,192 samples a step. They would show whether k2 and `full` stay below
# `to go` when there is hardly any noise left: a difference that remains
# belongs to what the losses want, not to luck. `own_mistakes_gpu.py` writes
# the file that is read here.

# %%
path = RESULTS / "own_mistakes_gpu.json"
if path.exists():
    large = json.loads(path.read_text())
    print(f"{large['device']}, {large['samples']} samples a step")
    for name, runs in large["curves"].items():
        share = sum(run[-1][1] for run in runs) / len(runs)
        kl = sum(run[-1][2] for run in runs) / len(runs)
        print(f"{name:7} right {share:.2f}, reverse KL {kl:4.1f}")
else:
    print("no run on a GPU is committed yet")

# %% [markdown]
# ## 6 · A student that is too small
#
# Now without sampling noise. The same two answers, the same memoryless
# student, and the *exact* gradient of each sum of section 2, with the
# student's prefixes taken as given. Beside them the sequence-level reverse
# KL with its whole gradient, and cross-entropy with the teacher's best answer.


# %%
def own_prefix(divergence):
    return lambda model: exact.token_level(
        two, model, prefixes_from=given(model), divergence=divergence
    ).sum()


def teacher_prefix(divergence):
    return lambda model: exact.token_level(
        two, model, prefixes_from=two, divergence=divergence
    ).sum()


ways = {
    "sequence-level": lambda model: -model.log_probs()[0, right[0]],
    "forward, teacher's": teacher_prefix(forward_kl),
    "reverse, teacher's": teacher_prefix(reverse_kl),
    "forward, own": own_prefix(forward_kl),
    "reverse, own": own_prefix(reverse_kl),
    "reverse, whole": lambda m: exact.sequence_reverse_kl(two, m).sum(),
}


# %%
def descend(loss_of, seed, steps=250):
    rng = torch.Generator().manual_seed(seed)
    logits = 0.1 * torch.randn(1, 4, 8, generator=rng, dtype=torch.float64)
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(ExactLM.memoryless(logits)).backward()
        optimizer.step()
    return ExactLM.memoryless(logits.detach())


ends = {name: [descend(w, s) for s in range(3)] for name, w in ways.items()}


def judged(model):
    share = model.log_probs()[0, right].exp()
    parts = share / share.sum()
    kept = torch.special.entr(parts).sum().exp()
    forward = exact.sequence_forward_kl(two, model)
    reverse = exact.sequence_reverse_kl(two, model)
    return [x.item() for x in (share.sum(), kept, forward, reverse)]


# %% [markdown]
# ### Predict
#
# Six ways, six students of 32 numbers. Which of them say right answers, and
# which keep both of them? Can any do both?

# %%
table = {
    name: torch.tensor([judged(model) for model in models]).mean(0)
    for name, models in ends.items()
}
print(f"{'':19} right  answers kept  forward KL  reverse KL")
for name, (share, kept, fwd, rev) in table.items():
    print(f"{name:19} {share:5.2f} {kept:13.1f} {fwd:11.1f} {rev:11.1f}")

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.2))
bars = {"the teacher": two, **{name: ends[name][0] for name in ways}}
looks = ((plots.ORANGE, modes[0]), (plots.BLUE, modes[1]))
for place, model in enumerate(bars.values()):
    left = 0.0
    for number, (colour, _) in zip(right, looks, strict=True):
        width = model.log_probs()[0, number].exp().item()
        axes.barh(place, width, left=left, color=colour, height=0.65)
        left += width
    axes.barh(place, 1 - left, left=left, color="#dddddd", height=0.65)
for colour, label in (*looks, ("#dddddd", "in no language")):
    axes.plot([], [], "s", color=colour, markersize=9, label=label)
axes.set_yticks(range(len(bars)), list(bars))
axes.invert_yaxis()
axes.set(xlim=(0, 1), xlabel="probability of an answer")
axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower center",
            bbox_to_anchor=(0.5, 1))  # fmt: skip
plt.show()

# %%
print(f"{'':19} le    der")
for name, model in bars.items():
    first = model.tables[0][0, 0].softmax(-1)
    le, der = first[WORDS.index("le")], first[WORDS.index("der")]
    print(f"{name:19} {le:.2f}  {der:.2f}")

# %% [markdown]
# There is the reason. At the first word a memoryless student lacks nothing: it
# can say `le` and `der` as often as the teacher, and a loss of that word alone
# tells it to. The price is paid three words later, when it no longer knows how
# it began. `reverse, own` does not see that the one causes the other. The
# whole gradient does, and gives up `der`.
#
# So "reverse KL on-policy seeks a mode" has two meanings. The KL of whole
# answers does. The per-token loss that libraries call on-policy distillation
# seeks **per word**. For a student that could match the teacher the two end in
# the same place. For one that cannot they do not.

# %% [markdown]
# The cheapest way to a right student is the oldest: train on one answer, and
# give up the rest. It never saw the teacher's distributions. What it loses is
# in the forward KL: the second answer is as good as impossible for it.

# %% [markdown]
# ### The real student
#
# Half of a real teacher's layers, six languages. `valid` is the probability
# that a drawn answer is right in some language, `greedy` the share of greedy
# answers that are, `languages` how many are kept.

# %%
rows = [
    "warm student",
    "hard labels, equal tokens", "hard labels, equal FLOPs",
    "sequence-level", "forward KL", "reverse KL",
    "on-policy forward KL", "on-policy reverse KL",
    "half on-policy reverse KL", "cold on-policy reverse KL",
]  # fmt: skip
before = found["fixed"]["untrained, first layers"]
print(f"teacher: valid {fixed['valid']:.3f}", end=", ")
print(f"languages {fixed['languages']:.2f}", end="; ")
print(f"untrained student: valid {before['valid']:.3f}")
show(rows, ["valid", "greedy", "languages", "forward_kl"])

# %%
figure, axes = plt.subplots(figsize=(7, 3.6))
marks = {
    "hard labels, equal tokens": ("v", plots.GREY),
    "sequence-level": ("D", plots.GREY),
    "forward KL": ("o", plots.BLUE), "reverse KL": ("s", plots.BLUE),
    "on-policy forward KL": ("o", plots.ORANGE),
    "on-policy reverse KL": ("s", plots.ORANGE),
}  # fmt: skip
for row, (mark, colour) in marks.items():
    runs = [r for r in found["runs"] if r["row"] == row]
    points = [(r["valid"], r["languages"]) for r in runs]
    x, y = torch.tensor(points).mean(0)
    axes.plot(x, y, mark, color=colour, markersize=9, label=row)
    cooled = [[(r["cooled"][t]["valid"], r["cooled"][t]["languages"])
               for t in runs[0]["cooled"]] for r in runs]  # fmt: skip
    line = torch.cat([torch.stack([x, y])[None], torch.tensor(cooled).mean(0)])
    axes.plot(*line.T, color=colour, lw=0.8, alpha=0.6)
axes.set(xlabel="a drawn answer is right (valid)", ylabel="languages kept")
axes.set_xticks([0.35, 0.4, 0.45, 0.5, 0.55])
axes.legend(frameon=False, fontsize=9, loc="upper left",
            bbox_to_anchor=(1, 1))  # fmt: skip
plt.show()

# %% [markdown]
# A mark is a student that is sampled at temperature 1. The thin line behind it
# is the same student at lower and lower temperatures, down to 0.5: the
# cheapest rival of a loss that makes students sharper (chapter 5).

# %%
for name in ("own-reverse", "own-forward", "own-seeks", "own-languages"):
    print(claims.find(name), end="\n\n")

# %%
for name in (
    "own-over-hard-tokens", "own-over-hard-flops", "own-over-hard-greedy"
):  # fmt: skip
    print(claims.find(name), end="\n\n")

# %% [markdown]
# Two comparisons count. On-policy against the same divergence on the teacher's
# text says what the prefixes are worth. Against hard labels with equal FLOPs
# it says what they are worth for their price. In the figure a student is only
# better than another if it lies beyond the other's line: above it or to the
# right. On the line, a lower sampling temperature would have done.
#
# So compare the languages of two students that are cooled until both are right
# equally often, at a place that all four lines reach:


# %%
def languages_at(valid, run):
    """Languages kept, when cooled until `valid` is this; on a line between."""
    path = [run, *run["cooled"].values()]
    x, y = ([at[name] for at in path] for name in ("valid", "languages"))
    assert x[0] <= valid <= x[-1]
    return np.interp(valid, x, y)


of = {(run["row"], run["seed"]): run for run in found["runs"]}
for ours, theirs in (
    ("on-policy forward KL", "forward KL"),
    ("on-policy reverse KL", "reverse KL"),
    ("on-policy reverse KL", "on-policy forward KL"),
):
    apart = []
    for seed in range(found["seeds"]):
        both = (languages_at(0.46, of[row, seed]) for row in (ours, theirs))
        apart.append(next(both) - next(both))
    print(f"{ours} minus {theirs}:\n    {mean_interval(apart).claim()}")

# %% [markdown]
# This is the clearest result of the chapter. Where both are right equally
# often, a student of its own words keeps more languages than a student of the
# teacher's words, with either divergence. Reverse KL on own words wins nothing
# over forward KL: what it gains in `valid`, a lower sampling temperature gives
# to forward KL, and with more languages.
#
# (0.46 was chosen after the lines had been seen, as a place that they reach.)
#
# And mind the last claim before the comparison: who only serves greedy answers
# gets no more, as far as is shown, from own words than from hard labels for
# the same FLOPs.

# %% [markdown]
# ### Published, and here: on one's own words
#
# GKD (Agarwal et al. 2023) compares gains over the student that one begins
# with. On its own words a student gains 2.1 times what it gains with ordinary
# distillation in summarisation, 1.7 times in translation, 1.9 times in
# arithmetic, as means over student sizes. MiniLLM (Gu et al. 2023,
# arXiv:2306.08543) trains with reverse KL on the student's words. In its
# Table 1 a student of 120M parameters reaches a Rouge-L of 24.6 on Dolly, and
# 22.7 with sequence-level distillation.
#
# (The numbers are those of GKD's introduction and MiniLLM's table as summaries
# of the two papers quote them.) The same two comparisons here, with other
# models, tasks and scores:


# %%
def gains(row, name):
    """Over the warm student of the same seed."""
    return [
        of[row, seed][name] - of["warm student", seed][name]
        for seed in range(found["seeds"])
    ]


print("on-policy gain / gain on the teacher's words")
print("  GKD               2.1, 1.7, 1.9")
for name in ("valid", "greedy"):
    for kind in ("forward KL", "reverse KL"):
        ours, theirs = gains(f"on-policy {kind}", name), gains(kind, name)
        print(f"  {name:6} {kind}", ratio_interval(ours, theirs))

# %%
difference = found["minus"]["on-policy reverse KL - sequence-level"]
print("on-policy reverse KL minus sequence-level")
print(f"  MiniLLM, Rouge-L {24.6 - 22.7:23.1f}")
for name in ("valid", "greedy"):
    print(f"  here, {name}, hundredths {100 * difference[name]['mean']:16.1f}")
print()
print(claims.find("own-over-sequence"))

# %% [markdown]
# With `valid` both intervals lie above one: GKD's direction is reproduced,
# with a smaller size. With greedy answers they reach below one, and it is not
# shown here. There the gain on the teacher's words is small, and a ratio to
# it is noisy.
#
# MiniLLM's direction is reproduced, with a loss that leaves out the future,
# which MiniLLM's has. Its rival is weak here: section 3's student of best
# answers.

# %% [markdown]
# ## 7 · How much, and when to begin
#
# `lmbda` mixes: 0 is the teacher's text alone, 1 the student's. And a student
# that cannot write yet should not be its own author: "Rethinking On-Policy
# Distillation" (2026, arXiv:2604.13016) names an off-policy cold start as the
# remedy for on-policy runs that fail.
#
# ### Predict
#
# A third student begins on-policy from the teacher's first layers, without a
# warm-up, for all the steps of both phases together. Better or worse?

# %%
show(
    ["on-policy reverse KL", "half on-policy reverse KL",
     "cold on-policy reverse KL"],
    ["valid", "languages", "exposure"],
)  # fmt: skip
print()
for name in ("own-lmbda", "own-cold", "own-cold-languages"):
    print(claims.find(name), end="\n\n")

# %% [markdown]
# Of `lmbda`: no difference is shown between its own words in every step and in
# half of them, which are cheaper.
#
# The cold row had as many steps as warm-up and second phase together, all of
# them on-policy and in one schedule, so it is more expensive. It does not
# fail, although it begins with noise: this teacher's first layers are not a
# random student. It ends as often right, and with fewer languages.

# %% [markdown]
# ### What it costs
#
# A student of $P_s$ parameters and a teacher of $P_t$, FLOPs a token:
# training costs $6 P_s$, writing $2 P_s$, and the teacher's reading $2 P_t$.
# A cache (chapter 11) pays for the teacher once, if the text stays; the
# student's text does not.

# %%
p_t, p_s = (
    found["parameters"][k] for k in ("teacher", "untrained, first layers")
)
for name, flops in (
    ("labels or cached targets", 6 * p_s),
    ("live teacher, data's text", 6 * p_s + 2 * p_t),
    ("on-policy", 6 * p_s + 2 * p_s + 2 * p_t),
):
    print(f"{name:27} {flops / (6 * p_s):.2f} times")

# %% [markdown]
# That counts operations. Writing is a token at a time and uses a machine
# badly, so in seconds it is worse.
#
# Against reinforcement learning the account looks different: a reward of one
# number an answer against one a token. A report on Thinking Machines' post
# names 1,800 GPU hours for on-policy distillation where reinforcement learning
# took 17,920
# ([Maginative, 2025](https://www.maginative.com/article/thinking-machines-claims-30x-cost-cut-for-training-ai-models)).
# No such run fits here; it is quoted, not reproduced.

# %% [markdown]
# ## 8 · Why reverse KL on-policy, and when not
#
# Three reasons for the pair:
#
# 1. It is the only choice at the student's prefixes that is a KL of whole
#    answers (section 2).
# 2. Its samples suffice: the log-probabilities of the drawn tokens, which any
#    server returns. Forward KL needs the teacher's whole distribution.
# 3. A student that is too small should rather be right than complete, if one
#    answer is all that a user sees.
#
# The real student of section 6 was no fourth reason: forward KL on its own
# words, cooled, kept more languages and was right as often.
#
# And one reason against it, in numbers. The student has put nearly all of its
# mass on one answer. How strong is the pull back to the other?

# %%
print("mass on the other   pull: forward KL    reverse KL")
for rest in (1e-1, 1e-2, 1e-4):
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    logits = torch.tensor([1 - rest, rest], dtype=torch.float64).log()
    pulls = []
    for divergence in (forward_kl, reverse_kl):
        leaf = logits.clone().requires_grad_()
        divergence(leaf[None], p.log()[None]).sum().backward()
        pulls.append(-leaf.grad[1].item())
    print(f"{rest:17g} {pulls[0]:19.4f} {pulls[1]:13.4f}")

# %% [markdown]
# By hand, for the last line: forward KL pulls with $p_t - p_s = 0.4999$.
# Reverse KL pulls with $p_s\,(\log\frac{p_t}{p_s} + \mathrm{KL}) \approx
# 10^{-4} \cdot (8.5 + 0.7)$. What the student no longer says, it no longer
# draws, and then nobody corrects it.

# %%
rest = 1e-4
kl = (1 - rest) * log((1 - rest) / 0.5) + rest * log(rest / 0.5)
by_hand = rest * (log(0.5 / rest) + kl)
print(f"by hand {by_hand:.5f}, by autograd {pulls[1]:.5f}")
assert abs(by_hand - pulls[1]) < 1e-10

# %% [markdown]
# So, not reverse KL on-policy where
#
# - variety is wanted: creative text, or samples for a later vote;
# - the student begins far from the teacher, so that its own text is noise;
# - the teacher does not know what to say after a student's mistake: it was
#   not trained there either;
# - the student is served at another temperature than it was trained at.
#
# ## 9 · Self-distillation, and what is forgotten
#
# Fine-tuning on new labels makes a model forget old skills. SDFT (Shenfeld et
# al. 2026, arXiv:2601.19897) lets the model be its own teacher: with a
# demonstration in its context it supervises itself without one, on its own
# words. The abstract reports "higher new-task accuracy while substantially
# reducing catastrophic forgetting", against supervised fine-tuning.

# %% [markdown]
# ### At our scale
#
# The shipped teacher answers in the language that its instruction names. New
# task: *without* an instruction, French. The teacher is the same network,
# frozen, that reads the French instruction. Four ways, at two learning rates:
#
# - `labels, CE`: the corpus's French answers, as supervised fine-tuning;
# - `labels, forward KL`: the same text, its own teacher's distributions;
# - `own words`: `lmbda` 1, with forward or reverse KL.
#
# `old` is the share of exact answers to instructions for five *other*
# languages, `drift` the KL from the model as it was.
#
# ### Predict
#
# Which of the four forgets least?

# %%
forgetting = json.loads((RESULTS / "forgetting.json").read_text())
start = forgetting["fixed"]
print(f"before: new {start['new']:.2f}, old {start['old']:.2f}")
for rate, by_row in forgetting["rows"].items():
    print(f"\nlearning rate {rate:22}   new    old  drift")
    for row, values in by_row.items():
        cells = [f"{values[m]['mean']:6.3f}" for m in ("new", "old", "drift")]
        print(f"  {row:34}", *cells)

# %%
for name, claim in claims.load().items():
    if name.startswith("forget-"):
        print(claim, end="\n\n")

# %% [markdown]
# Compare within a rate, and only rows that have learned the new task. At the
# lower rate all have, and the student of its own words has forgotten **more**
# than the one of labels, by a little. At the higher rate all forget nearly
# everything, and no difference from the labels is shown. SDFT's result is not
# reproduced here.
#
# One difference matters: our labels are what this model would have said itself
# with its instruction, so fine-tuning on them is nearly on-policy already.
# Their demonstrations come from elsewhere. (One seed at full scale was seen
# before the run, and nothing was changed after it.)

# %% [markdown]
# Its own words, on the other hand, are wrong at first: before it has learned
# the new task the student seldom answers in French. Its first steps have more
# to correct:

# %%
for row in forgetting["rows"]["0.0003"]:
    firsts = [
        sum(run["loss"][:10]) / 10
        for run in forgetting["runs"]
        if run["row"] == row and run["rate"] == 0.0003
    ]
    mean = sum(firsts) / len(firsts)
    print(f"{row:24} loss of the first ten steps {mean:.2f}")

# %% [markdown]
# The rows have different losses, so compare the two of forward KL. That the
# larger corrections are what makes it forget is a guess. It could be tested
# with a warm-up on labels, as in section 7.

# %% [markdown]
# ## Exercises
#
# They are in [`exercises/ch12.ipynb`](../exercises/ch12.ipynb), each with its
# own check, two hints and a solution. Do them before the quiz.

# %% [markdown]
# ## Quiz
#
# **1.** A validation loss on the teacher's answers is as low as ever. Users
# complain that long answers end in nonsense. What do you measure?
#
# <details><summary>Answer</summary>
#
# The KL by position at the student's own prefixes. The validation loss is
# taken at the teacher's, where no mistake has been made yet.
#
# </details>

# %% [markdown]
# **2.** A colleague logs k3 of the student's samples and differentiates it.
# "Reverse KL", she says. Which students will she get, if they are small?
#
# <details><summary>Answer</summary>
#
# Covering ones: the mean gradient is that of forward KL. Her log is a right
# estimate of reverse KL, so it will not tell her.
#
# </details>

# %% [markdown]
# **3.** `lmbda` is 1, the divergence is forward KL, and the teacher's targets
# come from a cache. What does kdlib say?
#
# <details><summary>Answer</summary>
#
# It refuses: no cache can hold targets for text that the student has not
# written yet. A live or a remote teacher is needed.
#
# </details>

# %% [markdown]
# ## What breaks in practice
#
# - **The end is masked.** Where padding is the end token, a mask made by
#   comparing ids removes the one token that teaches a student to stop
#   ([trl#6357](https://github.com/huggingface/trl/pull/6357)).
# - **Another denominator.** The loss is divided by the tokens of the
#   *dataset's* answers, not of those that the student wrote
#   ([trl#6478](https://github.com/huggingface/trl/pull/6478)).
# - **Two ends of text.** A base student and an instruct teacher end with
#   different tokens: answers grow until they are cut
#   ([ms-swift#9526](https://github.com/modelscope/ms-swift/issues/9526)).
# - **Two temperatures.** Samples come at one temperature, log-probabilities at
#   another ([trl#4159](https://github.com/huggingface/trl/issues/4159),
#   [prime-rl#697](https://github.com/PrimeIntellect-ai/prime-rl/pull/697)).
# - **Padding in the reward.** A mask that is always true
#   ([trl#7024](https://github.com/huggingface/trl/issues/7024)).

# %% [markdown]
# ## Summary
#
# - Exposure bias is the loss at one's own prefixes minus the loss at the
#   teacher's. It is zero at the first word.
# - Whose prefixes and which divergence: four sums. Forward KL at the teacher's
#   and reverse KL at the student's are KLs of whole answers.
# - A per-token on-policy loss takes the prefixes as given. It leaves out where
#   a word leads, and with it most of the noise.
# - k2 or the score function as a loss; k1 and k3 only in a log.
# - A too small student is right or complete. The loss decides which, but a
#   sampling temperature is a rival: here the prefixes counted for more.
# - Training on one's own words is no cure by itself: here it did not forget
#   less than labels that the model would have written.
#
# $$\hat\theta = \arg\min_\theta \sum_{x' \in D'}
#   \mathrm{Loss}\big(\Pr^t(\cdot \mid c, z),\;
#   \Pr^s_\theta(\cdot \mid c', z),\; x'\big)$$
#
# Next, chapter 13: onto the phone.
