# %% [markdown]
# # 3 · The objective
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/notebooks/03_the_objective.ipynb)
#
# | what it costs | |
# |---|---|
# | two CPU cores | 1 minute |
# | GPU | not needed |
# | memory | 1.5 GiB |
# | network, account, key | none |

# %% [markdown]
# ## What you will be able to do
#
# 1. Read the objective of distillation, and say what each part stands for.
# 2. Compute the sequence-level loss exactly, and split it into tokens.
# 3. Say whose prefixes a token-level loss is averaged over, and why it counts.
# 4. Tell the risk from the empirical risk, and $D'$ from $D$.
# 5. Say what a loss of zero means, and compute the loss that cannot go away.
#
# Chapter 2 held the two distributions in the hand. Here they are made equal,
# as far as that can be done.
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
from math import exp, log, log10

import matplotlib.pyplot as plt
import torch
from kdlib import exact, models, phone, plots
from kdlib.divergences import forward_kl
from kdlib.exact import ExactLM
from kdlib.objective import Objective

models.quiet_transformers()
plt.rcParams.update(plots.STYLE)
torch.set_num_threads(1)

# %% [markdown]
# ## 1 · One line
#
# $$\hat\theta = \arg\min_\theta \sum_{x' \in D'}
#   \mathrm{Loss}\big(\Pr^t(\cdot \mid c, z),\;
#   \Pr^s_\theta(\cdot \mid c', z),\; x'\big)$$
#
# The line is from Xiao and Zhu, *Foundations of Large Language Models*,
# chapter 3 (arXiv:2501.09223). Read it from the right.
#
# - $x' = (c', z)$ is an input as the student will see it.
# - $\Pr^s_\theta(\cdot \mid c', z)$ is what the student says about it.
# - $\Pr^t(\cdot \mid c, z)$ is what the teacher says. It sees more.
# - Loss is one number for how far the two are apart. Chapters 4 and 5 choose
#   it; here it is the forward KL, or the cross-entropy.
# - The sum runs over $D'$, the inputs that we have.
# - $\arg\min$ asks for the $\theta$ with the smallest sum.

# %% [markdown]
# Three things are left open, and this chapter is about them.
#
# 1. The distributions are over whole answers $y$, more than can be listed.
#    How does one compare them?
# 2. $D'$ is a sample. Of what, and what does the minimiser owe to chance?
# 3. How small can the sum become? Zero?
#
# ### A world that fits on a page
#
# We want truth, not estimates. So we take a language of eight words, and
# answers of four. The user asks for "May 3". The context says in which
# language. `.` ends an answer and then fills it up.

# %%
WORDS = ["le", "der", "3", "mai", "Mai", "mars", "März", "."]


def speaker(answers):
    """Means one of these answers; one word in ten is drawn blindly."""
    modes = [[WORDS.index(w) for w in text.split()] for text in answers]
    return ExactLM.from_modes(modes, list(answers.values()), noise=0.1)


def side_by_side(*speakers):
    """One model; the contexts are numbered 0, 1, ..."""
    tables = zip(*(s.tables for s in speakers), strict=True)
    return ExactLM([torch.cat(group) for group in tables])


FRENCH, GERMAN = 0, 1
teacher = side_by_side(
    speaker({"le 3 mai .": 0.6, "3 mai . .": 0.4}),
    speaker({"3 . Mai .": 0.7, "der 3 . Mai": 0.3}),
)

# %% [markdown]
# `kdlib.exact` writes such a model out in full: a distribution for every
# prefix. So every answer can be listed, with its probability.

# %%
answers = exact.sequences(vocab=8, length=4)
log_pt = teacher.log_probs()
print(len(answers), "answers")
print("they sum to", [round(p, 6) for p in log_pt.exp().sum(1).tolist()])
for context, name in enumerate(["French", "German"]):
    print(f"\nasked for {name}")
    likeliest, numbers = log_pt[context].topk(2)
    for log_p, number in zip(likeliest, numbers, strict=True):
        text = " ".join(WORDS[i] for i in answers[number])
        print(f"  {text:12} {log_p.exp():.3f}")

# %% [markdown]
# This teacher has two good answers for each context. The rest of its
# probability is spread over thousands of bad ones.
#
# ## 2 · Whole answers, or tokens
#
# ### The loss over whole answers
#
# The textbook's first loss is the cross-entropy between the two distributions
# over whole answers:
#
# $$\mathrm{Loss} = -\sum_y \Pr^t(y \mid c, z)\,
#   \log \Pr^s_\theta(y \mid c', z) .$$
#
# It prints its losses without the minus sign. Then $\arg\min$ would make the
# teacher's answers *unlikely*. We write the minus here and say so this once.
#
# Subtract what does not depend on $\theta$, the teacher's entropy, and the
# same loss becomes a divergence:
#
# $$\mathrm{KL}(\Pr^t \| \Pr^s_\theta) = \sum_y \Pr^t(y)\,
#   \log \frac{\Pr^t(y)}{\Pr^s_\theta(y)} .$$

# %%
student = ExactLM.random(vocab=8, length=4, contexts=2, seed=1)
log_ps = student.log_probs()
cross_entropy = -(log_pt.exp() * log_ps).sum(1)
entropy = -(log_pt.exp() * log_pt).sum(1)
divergence = (log_pt.exp() * (log_pt - log_ps)).sum(1)
for name, value in {
    "cross-entropy": cross_entropy,
    "teacher's entropy": entropy,
    "divergence": divergence,
}.items():
    print(f"{name:18}", [round(v, 4) for v in value.tolist()])
torch.testing.assert_close(cross_entropy - entropy, divergence)
by_library = exact.sequence_forward_kl(teacher, student)
torch.testing.assert_close(by_library, divergence)

# %% [markdown]
# ### Predict
#
# The textbook calls this sum infeasible. For eight words and four places it
# has 4,096 terms. How many digits has the number of terms for the shipped
# teacher, on an answer of eleven tokens? And for a vocabulary of 128,000 and
# an answer of a hundred tokens?

# %%
data = phone.Data()
vocab = data.teacher.config.vocab_size
for v, length in [(8, 4), (vocab, 11), (128_000, 100)]:
    digits = int(length * log10(v)) + 1
    print(f"{v:7,} words, {length:3} places: {digits:3} digits")

# %% [markdown]
# Nobody lists those. What rescues us is that a language model writes one token
# after the other.
#
# ### By hand: two words, two places
#
# First word: `le` or `der`. Second word: `mai` or `Mai`. The teacher ties
# them together. The student chooses the second word without looking at the
# first.

# %%
first_t, first_s = [0.6, 0.4], [0.5, 0.5]  # le, der
second_t = {"le": [0.9, 0.1], "der": [0.1, 0.9]}  # mai, Mai
second_s = {"le": [0.7, 0.3], "der": [0.7, 0.3]}
total = 0.0
for i, first in enumerate(["le", "der"]):
    for j, second in enumerate(["mai", "Mai"]):
        p = first_t[i] * second_t[first][j]
        q = first_s[i] * second_s[first][j]
        total += p * log(p / q)
        print(f"{first:3} {second}  {p:.2f} log({p:.2f} / {q:.2f})")
print("sum over answers  ", round(total, 4))

# %% [markdown]
# Now the same number from tokens. One term for the first word. One term for
# the second word after `le`, which counts as often as the teacher says `le`.
# One for the second word after `der`.


# %%
def kl(p, q):
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True))


at_first = kl(first_t, first_s)
after_le = kl(second_t["le"], second_s["le"])
after_der = kl(second_t["der"], second_s["der"])
print("first word        ", round(at_first, 4))
print("second, after le  ", round(after_le, 4), " x 0.6")
print("second, after der ", round(after_der, 4), " x 0.4")
by_tokens = at_first + 0.6 * after_le + 0.4 * after_der
print("sum over tokens   ", round(by_tokens, 4))
assert abs(by_tokens - total) < 1e-12

# %% [markdown]
# ### Why they are equal: the chain rule
#
# Write $h$ for a prefix $y_1 \dots y_{t-1}$. A model gives an answer the
# product of its tokens' probabilities, so the log of the ratio is a sum:
#
# $$\log \frac{\Pr^t(y)}{\Pr^s_\theta(y)}
#   = \sum_t \log \frac{\Pr^t(y_t \mid h)}{\Pr^s_\theta(y_t \mid h)} .$$
#
# Take the mean over $y \sim \Pr^t$, place by place. At place $t$ only the
# prefix and the next token matter; what comes later sums to one. First the
# mean over the next token, given the prefix: that is a token's KL. Then the
# mean over the prefix:
#
# $$\mathrm{KL}(\Pr^t \| \Pr^s_\theta) = \sum_t \;
#   \mathbb E_{h \sim \Pr^t}\,
#   \mathrm{KL}\big(\Pr^t(\cdot \mid h) \,\|\, \Pr^s_\theta(\cdot \mid h)\big).
# $$
#
# The prefixes are **the teacher's**. Keep that in mind.

# %% [markdown]
# Vectorised, for the two words. A table per place; a row per prefix:

# %%
table_t = torch.tensor([second_t["le"], second_t["der"]], dtype=torch.float64)
table_s = torch.tensor([second_s["le"], second_s["der"]], dtype=torch.float64)
start_t = torch.tensor(first_t, dtype=torch.float64)
start_s = torch.tensor(first_s, dtype=torch.float64)
places = [
    (start_t * (start_t / start_s).log()).sum(),
    start_t @ (table_t * (table_t / table_s).log()).sum(1),
]
print([round(place.item(), 4) for place in places])
assert abs(sum(places).item() - total) < 1e-12

# %% [markdown]
# From the library, which takes logits. A log-probability is a logit, too.

# %%
two_t = ExactLM([start_t.log().view(1, 1, 2), table_t.log()[None]])
two_s = ExactLM([start_s.log().view(1, 1, 2), table_s.log()[None]])
whole = exact.sequence_forward_kl(two_t, two_s)
by_place = exact.token_level(two_t, two_s, prefixes_from=two_t)[:, 0]
print("whole answers", round(whole.item(), 4))
print("by place     ", [round(v, 4) for v in by_place.tolist()])
assert abs(whole.item() - total) < 1e-12

# %% [markdown]
# And for the big world: one side sums over 4,096 answers, the other over
# $1 + 8 + 64 + 512$ prefixes.

# %%
by_place = exact.token_level(teacher, student, prefixes_from=teacher)
gap = (by_place.sum(0) - divergence).abs().max().item()
print("French, by place", [round(v, 3) for v in by_place[:, 0].tolist()])
print("sum", round(by_place[:, 0].sum().item(), 3), end=", ")
print("whole answers", round(divergence[0].item(), 3))
print("equal to 1e-10:", gap < 1e-10)
assert gap < 1e-10

# %% [markdown]
# ### An answer that the teacher wrote is a sample of the sum
#
# The sum over prefixes is still large. But it is a mean over what the teacher
# writes. Let the teacher write one answer $y$, and add up the tokens' KLs
# along it:
#
# $$A(y) = \sum_t \mathrm{KL}\big(\Pr^t(\cdot \mid y_{<t}) \,\|\,
#   \Pr^s_\theta(\cdot \mid y_{<t})\big),
#   \qquad \mathbb E_{y \sim \Pr^t} A(y) = \mathrm{KL}(\Pr^t \| \Pr^s_\theta).
# $$
#
# That is what training on the teacher's answers with its full distributions
# computes. It is an *unbiased* estimate of the infeasible loss. In our world
# the mean over all answers can be taken:


# %%
def along_answers(teacher, student):
    """[C, V^L]: for each answer, its tokens' KLs added up."""
    total = torch.zeros(teacher.contexts, 1, dtype=torch.float64)
    tables = zip(teacher.tables, student.tables, strict=True)
    for p_logits, q_logits in tables:
        total = total + forward_kl(q_logits, p_logits)
        total = total.repeat_interleave(teacher.vocab, dim=1)
    return total


full = along_answers(teacher, student)  # A(y)
mean_full = (log_pt.exp() * full).sum(1)
print("mean of A(y)", [round(v, 4) for v in mean_full.tolist()])
print("divergence  ", [round(v, 4) for v in divergence.tolist()])
torch.testing.assert_close(mean_full, divergence, rtol=1e-10, atol=1e-10)

# %% [markdown]
# ### Predict
#
# There is a cheaper estimate. Of each answer keep only the log-ratio of the
# tokens that were written, $B(y) = \log \Pr^t(y) - \log \Pr^s_\theta(y)$. Its
# mean is the divergence as well, by definition. Which of the two scatters
# more? By what factor?

# %%
ratio = log_pt - log_ps  # B(y)


def variance(value):
    mean = (log_pt.exp() * value).sum(1, keepdim=True)
    return (log_pt.exp() * (value - mean) ** 2).sum(1)


for name, value in {"A, full": full, "B, log-ratio": ratio}.items():
    spread = [round(v, 2) for v in variance(value).tolist()]
    print(f"{name:13} variance {spread}")
factor = variance(ratio) / variance(full)
print("B needs", [round(v, 1) for v in factor.tolist()], "times the answers")
assert (factor > 1).all()

# %% [markdown]
# $A$ replaces the token that happened to be written by the mean over all
# tokens, given the prefix. That takes out this token's chance and leaves the
# prefix's. (This is how it is here, and no law: a token's own share can be
# made up for by what follows it.) Both approach the truth, for French:

# %%
picked = torch.multinomial(
    log_pt[FRENCH].exp(),
    100,
    replacement=True,
    generator=torch.Generator().manual_seed(0),
)
count = torch.arange(1, 101)
figure, axes = plt.subplots(figsize=(6.5, 2.8))
for value, colour, name in (
    (ratio, plots.GREY, "log-ratio of the written tokens"),
    (full, plots.ORANGE, "full distributions"),
):
    running = value[FRENCH, picked].cumsum(0) / count
    axes.plot(count, running, color=colour, label=name)
axes.axhline(divergence[FRENCH], color=plots.BLUE, label="sum over all 4,096")
axes.set_ylim(2, 10)
axes.set_xlabel("answers that the teacher wrote")
axes.set_ylabel("mean so far, nats")
axes.set_title("A few answers do what the infeasible sum does", loc="left")
axes.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# What the spread does to a gradient is chapter 4's subject.
#
# ### Prefixes from somewhere else
#
# Often the answers are not the teacher's. Somebody has a corpus that people
# wrote, runs the teacher over it, and takes its distributions at every token.
# Position by position the loss is the same KL. But the prefixes are now
# **the data's**, so it is another sum:
#
# $$\sum_t \mathbb E_{h \sim \text{data}}\,
#   \mathrm{KL}\big(\Pr^t(\cdot \mid h) \,\|\, \Pr^s_\theta(\cdot \mid h)\big).
# $$
#
# In our world people like the short form, and mistake the month at times.

# %%
people = side_by_side(
    speaker({"3 mai . .": 0.8, "3 mars . .": 0.2}),
    speaker({"der 3 . Mai": 0.8, "3 . März .": 0.2}),
)
for name, author in {
    "teacher's": teacher,
    "people's": people,
    "student's": student,
}.items():
    loss = exact.token_level(teacher, student, prefixes_from=author).sum(0)
    again = (author.log_probs().exp() * full).sum(1)
    torch.testing.assert_close(loss, again)
    print(f"{name:10} prefixes", [round(v, 2) for v in loss.tolist()])

# %% [markdown]
# Only the first line is the divergence between the models. The third is
# measured where the student goes by itself, and larger here. Later chapters
# train on such prefixes.
#
# Does it matter for the *minimiser*? Take a student that cannot be perfect: a
# **memoryless** one, with one distribution for each place, whatever came
# before. Its best choice at place $t$ minimises
# $\sum_h w(h)\, \mathrm{KL}(\Pr^t(\cdot \mid h) \| q_t)$, where $w$ weighs the
# prefixes. Chapter 1 showed what solves that: the average, here with weights
# $w$.


# %%
def best_memoryless(teacher, author):
    """The memoryless student that fits best on the author's prefixes."""
    places = []
    for t, table in enumerate(teacher.tables):
        weight = author.log_probs(t).exp().unsqueeze(-1)
        places.append((weight * table.softmax(-1)).sum(1))
    return ExactLM.memoryless(torch.stack(places, 1).log())


fits = {
    "teacher's": best_memoryless(teacher, teacher),
    "people's": best_memoryless(teacher, people),
}
print("loss for French, trained on ... and measured on ...")
for name, fit in fits.items():
    for other, author in {"teacher's": teacher, "people's": people}.items():
        loss = exact.token_level(teacher, fit, prefixes_from=author).sum(0)
        print(f"  {name:10}{other:10}", round(loss[FRENCH].item(), 3))

# %%
losses = {
    (a, b): exact.token_level(teacher, fit, prefixes_from=author).sum(0)[0]
    for a, fit in fits.items()
    for b, author in {"teacher's": teacher, "people's": people}.items()
}
for b in ("teacher's", "people's"):  # each is best where it was trained
    a = "people's" if b == "teacher's" else "teacher's"
    assert losses[b, b] < losses[a, b]
print("two objectives, two minimisers")

# %% [markdown]
# Each student is best on the prefixes that it was made for. So "token-level
# distillation" names no objective until one says who wrote the tokens.
#
# When a student *can* match the teacher at every prefix, all of these losses
# have their zero at the same place, and the weights no longer decide where it
# ends up. They decide where it is bad first.

# %% [markdown]
# ### One answer for all: the mode
#
# The cheapest approximation keeps a single answer, the likeliest one,
# $\hat y = \arg\max_y \Pr^t(y \mid c, z)$:
#
# $$\mathrm{Loss} = -\log \Pr^s_\theta(\hat y \mid c', z) .$$
#
# Kim and Rush (2016, arXiv:1606.07947) call it *sequence-level* knowledge
# distillation: the teacher's distribution is replaced by its mode. It needs
# no distributions, only text, so a teacher behind a server will do.
#
# ### Predict
#
# What part of the teacher's probability does the mode hold? What does a
# student become that minimises this loss, and what is its divergence from the
# teacher then?

# %%
mode = log_pt.argmax(1)
for context, name in enumerate(["French", "German"]):
    share = log_pt[context, mode[context]].exp().item()
    text = " ".join(WORDS[i] for i in answers[mode[context]])
    print(f"{name}: {text:12} holds {share:.2f}")

print("\ncertainty of the student, loss on the mode, divergence (French)")
for certain in (0.416, 0.9, 0.99, 0.999999):
    others = (1 - certain) / 4095
    sharp = torch.full((2, 4096), others, dtype=torch.float64)
    sharp[torch.arange(2), mode] = certain
    fit = ExactLM.from_joint(sharp.log(), vocab=8)
    true_loss = exact.sequence_forward_kl(teacher, fit)[FRENCH].item()
    print(f"  {certain:<8} {-log(certain):6.3f} {true_loss:8.2f}")

# %% [markdown]
# The loss on the mode goes to zero and the divergence grows without limit:
# the student forgets the second answer. That is the price of one answer for
# all. It is small where the teacher is sure, and large where it has several
# good answers.
#
# ### The likeliest answer must be searched for
#
# Taking the likeliest *token* each time is called greedy. It need not find the
# mode:

# %%
start = torch.tensor([[[0.6, 0.4]]], dtype=torch.float64)
after = torch.tensor([[[0.5, 0.5], [0.99, 0.01]]], dtype=torch.float64)
maze = ExactLM([start.log(), after.log()])
for tokens, log_p in zip(
    exact.sequences(2, 2).tolist(), maze.log_probs()[0].tolist(), strict=True
):
    print(tokens, round(exp(log_p), 3))
print("greedy begins with 0, the mode is", end=" ")
print(exact.sequences(2, 2)[maze.log_probs()[0].argmax()].tolist())

# %% [markdown]
# Kim and Rush searched with a beam. A corpus of greedy answers is a further
# approximation, of the mode.
#
# ### A real teacher: how much does its one answer hold?
#
# The file of chapter 0 has the teacher's answers to 6,000 unlabelled inputs.
# Let the teacher score the first 500 of them, and add the log-probabilities
# of the tokens in each answer.

# %%
from kdlib.teachers import LiveTeacher

live = LiveTeacher(data.teacher)
pairs = data.unlabelled[:500]
held = []
for batch in data.batches(pairs):
    log_p = live.targets(batch).log_softmax(-1)
    chosen = log_p.gather(1, batch.response_ids[:, None])[:, 0].double()
    held += torch.bincount(batch.row_ids, chosen).exp().tolist()
held = torch.tensor(held)
print(f"mean share of the one answer: {held.mean():.2f}")
print(f"answers that hold over 0.9:   {(held > 0.9).float().mean():.2f}")

# %% [markdown]
# On this task the teacher's one answer holds nearly all of its probability,
# so the mode should lose little. Chapter 0's experiment has both students:
# one was trained on the teacher's distributions, the other on the teacher's
# answers alone. The claim is rendered from its result file, over five paired
# seeds.

# %%
from kdlib.ledger import Interval

results = Path(kdlib.__file__).parents[1] / "notebooks" / "results"
found = json.loads((results / "quickstart_seeds.json").read_text())
difference = Interval(**found["distilled_minus"]["teacher's answers"])
print(found["command"])
print("exact match, distributions", end=" ")
print(Interval(**found["exact_match"][phone.DISTILLED]))
print("exact match, answers alone", end=" ")
print(Interval(**found["exact_match"]["teacher's answers"]))
print("difference:", difference.claim())

# %% [markdown]
# A gain from the distributions is not shown here, as the share of 0.98 made
# likely. Do not carry that over to a teacher with several good answers.
#
# Note what chapter 0's loss is, exactly: token-level KL with the teacher's
# distributions, on prefixes from the teacher's *greedy* answer. It is neither
# the sampled sum nor the mode alone, and here it is close to both.

# %% [markdown]
# ## 3 · The sum over $D'$
#
# ### Risk, and empirical risk
#
# Users send inputs $x'$ with some probability. The number that we care about
# is the **risk**, the mean over what users send:
#
# $$R(\theta) = \mathbb E_{x'}\, \mathrm{Loss}(\theta, x') .$$
#
# Nobody can compute it. We have a sample $D'$ of $n$ inputs, and minimise the
# **empirical risk**,
#
# $$\hat R(\theta) = \frac1n \sum_{x' \in D'} \mathrm{Loss}(\theta, x') .$$
#
# The factor $1/n$ is not in the objective. It does not depend on $\theta$, so
# the minimiser is the same. The size of a gradient step is not.
#
# How much does $\hat\theta$ owe to chance? We list every sample that there is.

# %% [markdown]
# Four inputs, three words. The student is as small as can be: one
# distribution $q$ for every input. Its minimiser is the average of the
# teacher's distributions, over users for $R$ and over the sample for
# $\hat R$.

# %%
often = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
says = torch.tensor(
    [[0.9, 0.05, 0.05], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]],
    dtype=torch.float64,
)


def loss_on(inputs, q):
    """KL(teacher || q) on each input; q has one row for each sample."""
    p = says[inputs]
    return (p * (p / q.unsqueeze(-2)).log()).sum(-1)


best = often @ says
least = often @ loss_on(torch.arange(4), best)
print("best q   ", [round(v, 3) for v in best.tolist()])
print("its risk ", round(least.item(), 4))

# %% [markdown]
# ### Predict
#
# Take the minimiser of a sample. Is its loss *on that sample* above or below
# the least risk? And its risk? What happens with one input alone?


# %%
def all_samples(n):
    """Chance, minimiser, empirical risk and risk of every sample of size n."""
    drawn = exact.sequences(4, n)  # inputs can come twice
    chance = often[drawn].prod(1)
    q = says[drawn].mean(1)
    seen = loss_on(drawn, q).mean(1)
    everywhere = torch.arange(4).expand(len(drawn), 4)
    return chance, q, seen, loss_on(everywhere, q) @ often


sizes, on_sample, on_users = [1, 2, 3, 4, 5, 6, 7], [], []
print("n  samples  on the sample   risk   n x variance of q[0]")
for n in sizes:
    chance, q, seen, risk = all_samples(n)
    on_sample.append((chance @ seen).item())
    on_users.append((chance @ risk).item())
    spread = n * (chance @ (q[:, 0] - best[0]) ** 2).item()
    torch.testing.assert_close(chance @ q, best)  # right on average
    print(f"{n} {len(q):8} {on_sample[-1]:12.4f} {on_users[-1]:9.4f}", end="")
    print(f"{spread:16.4f}")

# %% [markdown]
# Three facts, all exact.
#
# - The minimiser is right on average, and its variance falls as $1/n$. Each
#   entry of $q$ is a mean of $n$ independent numbers.
# - On its own sample it looks better than the best student there is. With one
#   input its loss is zero, for it copies the teacher there.
# - On users it is worse than the best student.

# %%
figure, axes = plt.subplots(figsize=(6, 2.8))
axes.plot(sizes, on_users, "o-", color=plots.BLUE, label="risk")
axes.plot(
    sizes, on_sample, "v-", color=plots.ORANGE, label="loss on its own sample"
)
axes.axhline(least, color=plots.GREY, label="least risk of any student")
axes.set_ylim(0, 1.25)
axes.set_xlabel("inputs in D', mean over all samples")
axes.set_ylabel("KL, nats")
axes.set_title("A sample flatters its own minimiser", loc="left")
axes.legend(frameon=False, fontsize=9)
plt.show()
for seen, risk in zip(on_sample, on_users, strict=True):
    assert seen < least < risk
assert on_users == sorted(on_users, reverse=True)

# %% [markdown]
# So measure a student on inputs that it was not trained on. And a larger $D'$
# helps, *if* it is drawn from what users send.
#
# ### More inputs are not always better
#
# Somebody adds "more diverse" inputs to $D'$, of a fifth kind that users never
# send. Let there be as many inputs as you like, so that chance is gone. What
# is the risk on what users do send?

# %%
fifth = torch.tensor([0.02, 0.03, 0.95], dtype=torch.float64)
for share in (0.0, 0.1, 0.3, 0.5):
    q = (1 - share) * best + share * fifth
    risk = often @ loss_on(torch.arange(4), q)
    print(f"share of the fifth kind {share:.1f}   risk {risk.item():.4f}")
    assert risk >= least - 1e-12

# %% [markdown]
# The student is too small for all inputs, so it compromises, and the weights
# of the compromise come from $D'$. Inputs that users never send move it away
# from what they do send. A student that could match the teacher on every
# input would not have to choose.
#
# ### What is summed for one answer?
#
# An answer's loss is a *sum* over its tokens, by the chain rule. Libraries
# report means. Two means are common, and they are not the same objective. Two
# answers, of one token and of three:

# %%
student_logits = torch.tensor([[2.0, 0.0]] * 4)
teacher_logits = torch.tensor([[0.0, 2.0], [2.0, 0.0], [2.0, 1.0], [1.0, 1.0]])
tokens = torch.tensor([1, 0, 0, 0])  # used for hard labels only
answer = torch.tensor([0, 1, 1, 1])
per_token = forward_kl(student_logits, teacher_logits)
print("per token    ", [round(v, 3) for v in per_token.tolist()])
for reduction in ("sum", "token_mean", "sequence_mean"):
    loss = Objective(reduction=reduction)(
        student_logits, teacher_logits, tokens, row_ids=answer
    )
    print(f"{reduction:14}{loss.total.item():.3f}")

# %% [markdown]
# By hand, with $D_i$ the loss of token $i$:
#
# - `sum`: $D_1 + D_2 + D_3 + D_4$, the sum of the formula.
# - `token_mean`: the same, over 4. Over all of $D'$ the divisor is a constant,
#   so the minimiser is that of the formula. (One step of training divides by
#   the tokens of its own batch. So a token weighs a little more in a batch of
#   short answers.)
# - `sequence_mean`: $\frac12 [D_1 + \frac13 (D_2 + D_3 + D_4)]$. A token in a
#   short answer counts more than one in a long answer.

# %%
d1, d2, d3, d4 = per_token.tolist()
by_hand = {
    "sum": d1 + d2 + d3 + d4,
    "token_mean": (d1 + d2 + d3 + d4) / 4,
    "sequence_mean": (d1 + (d2 + d3 + d4) / 3) / 2,
}
for reduction, value in by_hand.items():
    loss = Objective(reduction=reduction)(
        student_logits, teacher_logits, tokens, row_ids=answer
    )
    assert abs(loss.total.item() - value) < 1e-6
print("equal")

# %% [markdown]
# Neither mean is wrong. Choosing one and computing the other is: exercise 3.3
# shows how far the minimiser moves.
#
# ## 4 · $D'$, not $D$
#
# $D$ holds the full inputs $x = (c, z)$, as the teacher reads them. $D'$ holds
# the simplified inputs $x' = (c', z)$, as the student will see them on the
# phone. The sum runs over $D'$. What if one trains the student on $D$, since
# that data is there, and drops $c$ only when it is served?
#
# A student of logits: what it adds for each input $z$, and what it adds when
# $c$ is there.


# %%
def logits_of(weights, with_context):
    for_z, for_c = weights
    return for_z + for_c if with_context else for_z


def trained_on(with_context, weights, steps=2000):
    for _ in range(steps):
        weights = [w.detach().requires_grad_() for w in weights]
        loss = forward_kl(logits_of(weights, with_context), wanted).mean()
        slopes = torch.autograd.grad(loss, weights, allow_unused=True)
        weights = [
            w if slope is None else w - slope
            for w, slope in zip(weights, slopes, strict=True)
        ]
    return [w.detach() for w in weights]


wanted = says[:2].log()  # the teacher on two inputs, after reading c
rng = torch.Generator().manual_seed(0)
start = [2 * torch.randn(n, 3, generator=rng).double() for n in (2, 1)]

# %%
print("               loss on D   loss on D'")
losses = {}
for trained in ("D", "D'"):
    weights = trained_on(trained == "D", start)
    for measured in ("D", "D'"):
        logits = logits_of(weights, measured == "D")
        loss = forward_kl(logits, wanted).mean().item()
        loss = max(loss, 0.0)  # rounding can leave -1e-17
        losses[trained, measured] = loss
    row = [losses[trained, m] for m in ("D", "D'")]
    print(f"trained on {trained:3} {row[0]:9.3f} {row[1]:10.3f}")
assert losses["D", "D"] < 1e-3 < 0.05 < losses["D", "D'"]
assert losses["D'", "D'"] < 1e-3 < 0.05 < losses["D'", "D"]

# %% [markdown]
# Zero in one column says nothing about the other. Training on $D$ fixes only
# the *sum* of the two parts. How it is shared out is an accident of the
# starting weights, and serving without $c$ removes one part.
#
# ### The same with a real model
#
# The shipped teacher is its own perfect student on $D$: its loss there is
# zero. On $D'$ the instruction is missing.

# %%
batch = data.collator.collate(data.test[:250])
with_c = live.targets(batch)
view = batch.student
with torch.no_grad():
    output = data.teacher(view.input_ids, view.attention_mask)
without_c = view.select(output.logits)
per_token = forward_kl(without_c, with_c).double()
per_answer = torch.bincount(batch.row_ids, per_token)
print(f"on D'  {per_token.mean():.1f} nats a token")
print(f"       {per_answer.mean():.1f} nats an answer")
for name, share in found["teacher"].items():
    print(f"exact match {name:16} {share:.3f}")

# %% [markdown]
# A fifth of a nat for a token sounds harmless. Add it up over the answer, as
# the chain rule says, and it is 2.2 nats. (The prefixes are those of the
# labels. With its instruction the teacher writes nearly all of them itself.)
# The instruction names one of twelve tasks, and mixing twelve evenly costs
# $\log 12 = 2.5$ at most. It is nearly as bad as that, and the exact matches
# agree.
#
# Now one answer, token by token, under a microscope. Both inputs stand above
# each other, then both distributions, the loss and its gradient. Predict
# first: which tokens of a long answer carry the loss of a teacher that was not
# told the language? The first, or all alike?

# %%
from kdlib.explorers.microscope import microscope

one = data.collator.collate([data.test[4]])
view = one.student
blank = models.build(data.tokenizer, **phone.STUDENT, seed=0).eval()
students = {}
for name, model in (("teacher without c", data.teacher), ("untrained", blank)):
    with torch.no_grad():
        students[name] = view.select(view.output_of(model).logits)
microscope(data.tokenizer, one, live.targets(one), students)

# %% [markdown]
# The teacher without $c$ pays where the languages part: in this answer at its
# first token, and hardly anywhere after it. The untrained student pays
# everywhere.
#
# Training and measuring must both happen on $D'$. Chapter 7 measures what is
# lost between $x$ and $x'$.
#
# ## 5 · The objective as code
#
# `Objective` is the Loss of the formula: a divergence for each token, weights,
# and one number in the end. Its last step, as it stands in the library:

# %%
print(inspect.getsource(Objective._reduce))

# %% [markdown]
# `num_items` is the count over the whole step. A step is often cut into
# micro-batches that fit into memory. Each is divided by the *same* number, so
# their losses add up to that of the whole. Look at real tokens:

# %%
network = models.build(data.tokenizer, **phone.STUDENT, seed=0).eval()
batch = data.collator.collate(pairs[:8])
targets = live.targets(batch)
view = batch.student
with torch.no_grad():
    logits = view.select(network(view.input_ids, view.attention_mask).logits)
objective = Objective("forward_kl")
loss = objective(logits, targets, batch.response_ids)
by_hand = forward_kl(logits, targets).sum() / len(batch.response_ids)
torch.testing.assert_close(loss.total, by_hand)
print(loss.n_tokens, f"tokens, {loss.total.item():.1f} nats a token")

# %%
cut, whole = 20, len(logits)
first = objective(
    logits[:cut], targets[:cut], batch.response_ids[:cut], num_items=whole
)
second = objective(
    logits[cut:], targets[cut:], batch.response_ids[cut:], num_items=whole
)
torch.testing.assert_close(first.total + second.total, loss.total)
print("the parts add up to the whole")

# %% [markdown]
# ### And the arg min
#
# `kdlib.train` does what the symbol asks for. One step, read aloud, without
# what serves devices and restarts:
#
# ```python
# for batch in batches_of_the_step:
#     targets = teacher.targets(batch)         # Pr^t( . | c, z)
#     logits = student_logits(student, batch)  # Pr^s( . | c', z)
#     loss = objective(logits, targets, batch.response_ids,
#                      row_ids=batch.row_ids, num_items=count_of_the_step)
#     loss.total.backward()
# clip_grad_norm_(student.parameters(), max_grad_norm)
# optimizer.step()
# ```
#
# Teacher and student each get their own view of the batch. That the library
# computes this gradient, and not another one, is checked here:

# %%
from kdlib.train import accumulate_gradient

network.zero_grad()
logits = view.select(network(view.input_ids, view.attention_mask).logits)
objective(logits, targets, batch.response_ids).total.backward()
mine = [p.grad.clone() for p in network.parameters()]
network.zero_grad()
halves = [data.collator.collate(pairs[i : i + 4]) for i in (0, 4)]
step = accumulate_gradient(network, halves, objective, live)
for p, gradient in zip(network.parameters(), mine, strict=True):
    torch.testing.assert_close(p.grad, gradient, atol=1e-4, rtol=1e-3)
assert abs(step.loss - loss.total.item()) < 1e-3
print("one batch of 8 and two of 4: the same loss, the same gradient")

# %% [markdown]
# ### A landscape that can be seen
#
# A real student has 170,000 parameters. Take one with two: the memoryless
# student of the two words. Its parameters are the logit of `le` in the first
# place and the logit of `mai` in the second. The teacher is the one that was
# worked by hand. People begin with `der` more often than the teacher.
#
# ### Predict
#
# Three losses: whole answers, tokens on people's prefixes, the mode alone.
# Where is the minimum of each? Which of them share a coordinate?

# %%
people_start = torch.tensor([[[0.2, 0.8]]], dtype=torch.float64)
two_people = ExactLM([people_start.log(), two_t.tables[1]])


def two_parameters(at):
    """Students [n] of the parameters at [n, 2]."""
    zero = torch.zeros_like(at)
    return ExactLM.memoryless(torch.stack([at, zero], -1))


def whole_answers(at):
    return exact.sequence_forward_kl(two_t, two_parameters(at))


def peoples_prefixes(at):
    fit = two_parameters(at)
    return exact.token_level(two_t, fit, prefixes_from=two_people).sum(0)


def mode_alone(at):
    number = two_t.log_probs()[0].argmax()
    return -two_parameters(at).log_probs()[:, number]


# %% [markdown]
# First check that for whole answers and for tokens on the *teacher's*
# prefixes the landscape is one and the same, at every point of a grid.

# %%
line = torch.linspace(-3, 4, 141, dtype=torch.float64)
grid = torch.cartesian_prod(line, line)
tokens_t = exact.token_level(
    two_t, two_parameters(grid), prefixes_from=two_t
).sum(0)
gap = (tokens_t - whole_answers(grid)).abs().max().item()
print(len(grid), "points, equal to 1e-10:", gap < 1e-10)
assert gap < 1e-10


# %%
def descend(loss_of, at, steps=150, rate=1.0):
    """The path of gradient descent, [steps + 1, 2]."""
    path = [at]
    for _ in range(steps):
        here = path[-1].clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss_of(here[None]).sum(), here)
        path.append(path[-1] - rate * slope)
    return torch.stack(path)


begin = torch.tensor([-2.0, -2.0], dtype=torch.float64)
objectives = {
    "whole answers =\ntokens, teacher's prefixes": whole_answers,
    "tokens,\npeople's prefixes": peoples_prefixes,
    "the likeliest answer\nalone": mode_alone,
}
paths = {name: descend(f, begin) for name, f in objectives.items()}
for name, path in paths.items():
    end = [round(v, 2) for v in path[-1].tolist()]
    print(f"{name.replace(chr(10), ' '):44} ends at {end}")

# %% [markdown]
# The first two minima have a closed form, the average with the prefixes'
# weights. In logits, $\log q/(1 - q)$:

# %%
q_teacher = 0.6 * 0.9 + 0.4 * 0.1
q_people = 0.2 * 0.9 + 0.8 * 0.1
names = list(objectives)
for name, q in ((names[0], q_teacher), (names[1], q_people)):
    want = [log(0.6 / 0.4), log(q / (1 - q))]
    torch.testing.assert_close(
        paths[name][-1].tolist(), want, atol=0.02, rtol=0
    )
    print([round(v, 2) for v in want])

# %%
figure, panels = plt.subplots(1, 3, figsize=(8.6, 3.9), sharey=True)
levels = [0.02, 0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4]
for axes, (name, loss_of) in zip(panels, objectives.items(), strict=True):
    height = loss_of(grid).view(len(line), len(line)).T
    ends = name != names[2]  # the mode's loss has no least value, it nears 0
    low = height.min().item() if ends else 0.0
    look = {"levels": levels, "colors": plots.GREY, "linewidths": 0.8}
    axes.contour(line, line, height - low, **look)
    axes.plot(*paths[name].T, color=plots.ORANGE, linewidth=2.5)
    axes.plot(*begin, "o", color=plots.ORANGE, markersize=8)
    if ends:
        axes.axvline(log(1.5), color=plots.BLUE, linewidth=0.8, ls=":")
        axes.plot(*paths[name][-1], "*", color=plots.BLUE, markersize=16)
    least_loss = f"least loss {low:.2f}" if ends else "no least loss"
    axes.set_title(f"{name}\n{least_loss}", fontsize=10)
    axes.set(xlim=(-3, 4), ylim=(-3, 4))
    axes.set_xlabel('logit of "le", first word')
panels[0].set_ylabel('logit of "mai", second word')
figure.suptitle("Three losses, three places to end up", fontsize=12)
plt.show()

# %% [markdown]
# Read the picture. The first place has an empty prefix, the same for
# everybody, so the first two stars stand over one another. The second
# coordinate follows whose first word is counted. And the mode's loss has no
# minimum: it goes down for ever towards `le mai`, certain of both.
#
# Start somewhere else, and go step by step. Predict first: for which of the
# three does the start change where the path ends? And how far does the mode's
# path still move after a hundred steps?

# %%
from kdlib.explorers.landscape import landscape

landscape()

# %% [markdown]
# No start changes where the first two paths end: those losses are convex in
# these two logits. The path of the mode passes by, and never ends.
#
# Both stars have a number above zero. Can it be brought to zero? No. Why that
# is so, and by how much, is the last question.

# %% [markdown]
# ## 6 · Zero
#
# ### What zero means
#
# Gibbs' inequality: $\mathrm{KL}(p \| q) \ge 0$, and it is zero only if
# $q = p$ wherever $p > 0$. *Why:* $\log a \le a - 1$, with equality only at
# $a = 1$. So
#
# $$-\mathrm{KL}(p \| q) = \sum_{p_v > 0} p_v \log \frac{q_v}{p_v}
#   \le \sum_{p_v > 0} p_v \Big(\frac{q_v}{p_v} - 1\Big)
#   = \sum_{p_v > 0} q_v - 1 \le 0 .$$
#
# Equality asks for $q_v = p_v$ at every word with $p_v > 0$.

# %%
rng = torch.Generator().manual_seed(0)
p, q = torch.rand(2, 10_000, 8, generator=rng, dtype=torch.float64)
p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
ratio = q / p
assert (ratio.log() <= ratio - 1).all()
values = (p * (p / q).log()).sum(1)
print("10,000 random pairs, least KL above 0:", values.min().item() > 0)
print("q = p:", (p * (p / p).log()).sum(1).abs().max().item())

# %% [markdown]
# With the chain rule: the sequence-level loss is zero if and only if the two
# next-token distributions are equal **at every prefix that the teacher can
# write**. Then every answer is as likely from the student as from the
# teacher.
#
# That is the goal. The number is a means: it is zero at the goal and nowhere
# else.
#
# ### What zero leaves open
#
# At prefixes that the teacher never writes the weight is zero. Take a teacher
# that never begins with `der`, and two students. They agree with it after
# `le`. After `der` they say opposite things.

# %%
never = torch.tensor([[[0.0, -50.0]]], dtype=torch.float64)  # logits: le, der
strict = ExactLM([never, two_t.tables[1]])
after_le = two_t.tables[1][:, :1]
for name, after_der in (("mai", [9.0, -9.0]), ("Mai", [-9.0, 9.0])):
    row = torch.tensor([[after_der]], dtype=torch.float64)
    twin = ExactLM([never, torch.cat([after_le, row], 1)])
    loss = exact.sequence_forward_kl(strict, twin).item()
    there = forward_kl(row, strict.tables[1][:, 1:]).item()
    print(f"says {name} after der: loss below 1e-12: {abs(loss) < 1e-12},")
    print(f"    KL after der {there:.2f} nats")
    assert abs(loss) < 1e-12 < 0.1 < there

# %% [markdown]
# Both are perfect by the loss. The training says nothing about what they do
# after `der`. They will be asked all the same if a user types the first word,
# or if the student samples at a high temperature and slips. The loss promises
# nothing there.
#
# ### Where zero cannot be reached: capacity
#
# The memoryless student cannot tie the second word to the first. Its best fit
# is the product of the teacher's marginals, by the same averaging as above,
# and what is left is
#
# $$\sum_y p(y) \log \frac{p(y)}{\prod_t p_t(y_t)}
#   = \sum_t H(Y_t) - H(Y),$$
#
# the information that the words carry about each other. For two words that is
# their mutual information.

# %%
joint = start_t[:, None] * table_t  # [first, second]
apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
tied = (joint * (joint / apart).log()).sum().item()
found_least = whole_answers(paths[names[0]][-1][None]).item()
print("mutual information of the two words", round(tied, 4))
print("where the descent ended            ", round(found_least, 4))
assert abs(tied - found_least) < 1e-4

# %% [markdown]
# In the world of eight words, for each context:


# %%
def entropies(model):
    """Sum of the entropies of single words, and the entropy of the answer."""
    shape = [model.contexts] + [model.vocab] * model.length
    p = model.log_probs().exp().view(shape)
    single = 0.0
    for place in range(1, model.length + 1):
        other = [d for d in range(1, model.length + 1) if d != place]
        marginal = p.sum(other)
        single = single - (marginal * marginal.log()).sum(1)
    return single, exact.sequence_entropy(model)


single, together = entropies(teacher)
capacity = single - together
fit = best_memoryless(teacher, teacher)
torch.testing.assert_close(exact.sequence_forward_kl(teacher, fit), capacity)
print("left by a memoryless student", [round(v, 3) for v in capacity.tolist()])

# %% [markdown]
# ### Where zero cannot be reached: information
#
# Now a student as large as you like, but the phone does not tell it the
# language: $x' = z$. It has one distribution $q$ for both contexts. With
# $r_c$ the share of requests in context $c$, and $m = \sum_c r_c\, p_c$ the
# mixture of the teacher's distributions, three lines:
#
# $$\sum_c r_c\, \mathrm{KL}(p_c \| q)
#   = \sum_c r_c \sum_y p_c(y) \log \frac{p_c(y)}{m(y)}
#   + \sum_c r_c \sum_y p_c(y) \log \frac{m(y)}{q(y)}$$
# $$= \sum_c r_c\, \mathrm{KL}(p_c \| m) + \mathrm{KL}(m \| q)$$
# $$\ge \sum_c r_c\, \mathrm{KL}(p_c \| m) = I(Y; C),
#   \quad\text{with equality at } q = m.$$
#
# The best student is the mixture. What is left is the mutual information of
# answer and context. With more than one $z$, all of it holds given $X'$:
# $I(Y; C \mid X')$. It is zero only if $x'$ tells all of $c$ that the answers
# depend on.

# %%
mixture = log_pt.exp().mean(0)  # both contexts are equally frequent
floor = (log_pt.exp() * (log_pt - mixture.log())).sum(1).mean()
by_library, best_blind = exact.context_floor(teacher)
print("by enumeration  ", round(floor.item(), 4))
print("kdlib           ", round(by_library.item(), 4))
torch.testing.assert_close(floor, by_library)

middle = -(mixture * mixture.log()).sum() - entropy.mean()  # H(Y) - H(Y|C)
print("H(Y) - H(Y | C) ", round(middle.item(), 4))
torch.testing.assert_close(middle, floor)
print("a coin has      ", round(log(2), 4))

# %% [markdown]
# The two languages share no good answer, so the answer nearly tells the
# context, and the floor is nearly that of a fair coin. The middle line of the
# proof, for a blind student that is not the best:

# %%
blind = ExactLM.random(vocab=8, length=4, contexts=1, seed=5)
average = exact.sequence_forward_kl(teacher, blind).mean()
above = exact.sequence_forward_kl(best_blind, blind)[0]
print("its loss           ", round(average.item(), 4))
print("floor + KL(m || q) ", round((floor + above).item(), 4))
torch.testing.assert_close(average, floor + above)

# %% [markdown]
# A better $x'$ removes the floor. A tag that names the language leaves
# nothing; a tag that is always the same leaves everything.

# %%
for name, simplified in {"a tag for each": [0, 1], "no tag": [0, 0]}.items():
    left, _ = exact.context_floor(teacher, simplified=simplified)
    print(f"{name:15} {abs(left.item()):.3f}")

# %% [markdown]
# ### A zero that is not the goal: cross-entropy
#
# Cross-entropy is the divergence plus the teacher's entropy. Its gradient is
# the same, but its least value is $H(Y \mid C)$, not zero. A cross-entropy of
# 2.5 nats here is perfect:

# %%
perfect = -(log_pt.exp() * log_pt).sum(1)
print("student = teacher")
print("  divergence    ", exact.sequence_forward_kl(teacher, teacher).tolist())
print("  cross-entropy ", [round(v, 2) for v in perfect.tolist()])
torch.testing.assert_close(perfect, exact.sequence_entropy(teacher))

# %% [markdown]
# ### All four students, trained
#
# With memory or without, told the language or not. We know where each must
# stop before it takes a step.
#
# ### Predict
#
# The floors of the two handicaps are 1.20 (memory, mean over the contexts)
# and 0.67 (language). What is the floor of the student with both?

# %%
single, together = entropies(best_blind)
floors = {
    "told, with memory": 0.0,
    "not told, with memory": floor.item(),
    "told, no memory": capacity.mean().item(),
    "not told, no memory": (floor + single - together).item(),
}
for name, value in floors.items():
    print(f"{name:22} {value:.3f}")
tied = (single - together).item()
print(f"words tied to each other: {tied:.3f} in the mixture")

# %% [markdown]
# More than the sum of the two. By the middle line of the proof it is $I(Y; C)$
# plus what a memoryless student loses on the mixture. That is more than it
# loses on either language: in the mixture, words also betray the language to
# each other.


# %%
def students(name):
    """Parameters of zeros, and how to make the student of them."""
    contexts = 1 if "not told" in name else 2
    if "no memory" in name:
        logits = torch.zeros(contexts, 4, 8, dtype=torch.float64)
        return [logits.requires_grad_()], lambda w: ExactLM.memoryless(w[0])
    shapes = [(contexts, 8**t, 8) for t in range(4)]
    tables = [torch.zeros(s, dtype=torch.float64) for s in shapes]
    return [t.requires_grad_() for t in tables], ExactLM


curves = {}
for name in floors:
    weights, student_of = students(name)
    optimizer = torch.optim.Adam(weights, lr=0.1)
    curves[name] = []
    for _ in range(150):
        loss = exact.sequence_forward_kl(teacher, student_of(weights)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curves[name].append(loss.item())

# %%
figure, axes = plt.subplots(figsize=(6.8, 3.6))
looks = [(plots.BLUE, "-"), (plots.ORANGE, "-"), (plots.BLUE, "--"),
         (plots.ORANGE, "--")]  # fmt: skip
for (name, curve), (colour, style) in zip(curves.items(), looks, strict=True):
    axes.plot(curve, style, color=colour, linewidth=1.8)
    axes.axhline(floors[name], color=plots.GREY, linewidth=0.8, zorder=0)
    axes.text(148, floors[name] + 0.07, f"{name}: {floors[name]:.2f}",
              color=colour, fontsize=9, ha="right")  # fmt: skip
    assert -1e-9 < curve[-1] - floors[name] < 0.02, name
axes.set_ylim(-0.1, 4)
axes.set_xlim(0, 150)
axes.set_xlabel("step")
axes.set_ylabel("sequence-level KL, nats")
axes.set_title("Every plateau was known before the first step", loc="left")
plt.show()

# %% [markdown]
# The grey lines were computed from the teacher alone. When a real loss stops
# falling, ask which line it has met. Is the student too small? Does $x'$ say
# too little? Is it a cross-entropy, whose zero is not at zero? Or is none of
# these so, and something is broken?
#
# For the phone of chapter 0 the context never changes, so the second floor is
# exactly zero. Chapter 7 computes it where contexts do change.

# %% [markdown]
# ## Exercises
#
# They are in [`exercises/ch03.ipynb`](../exercises/ch03.ipynb), each with its
# own check, two hints and a solution. Do them before the quiz.

# %% [markdown]
# ## Quiz
#
# **1.** A colleague runs the teacher over a million sentences from the web and
# minimises the KL at every token. "That is sequence-level distillation", she
# says, "by the chain rule." What do you answer?
#
# <details><summary>Answer</summary>
#
# The chain rule asks for prefixes that the teacher writes. The web's prefixes
# give the same KLs other weights, so the sum is another objective. If the
# student can match the teacher everywhere, both have their zero at the same
# place. If it cannot, they end at different students.
#
# </details>

# %% [markdown]
# **2.** The loss stands at 0.67 nats an answer and does not move. Name three
# explanations, and how you would tell them apart.
#
# <details><summary>Answer</summary>
#
# The student may be too small: try a wider one. The input may say too little:
# compute $I(Y; C \mid X')$, or add a tag to $c'$. The loss may be a
# cross-entropy: subtract the teacher's entropy. And it may be a bug, such as
# targets that slipped by a token.
#
# </details>

# %% [markdown]
# **3.** A student has a loss of exactly zero. May it still answer differently
# from the teacher?
#
# <details><summary>Answer</summary>
#
# Not on inputs of the training's $D'$ and prefixes that the teacher can write.
# Elsewhere it may do anything: on inputs outside $D'$, and after a first word
# that the teacher would never have chosen.
#
# </details>

# %% [markdown]
# ## What breaks in practice
#
# - **A mean of means.** Each micro-batch is divided by its own count, and the
#   results are averaged. `token_mean` was asked for; with micro-batches of one
#   answer it is `sequence_mean`
#   ([verl#7200](https://github.com/verl-project/verl/issues/7200),
#   [ms-swift#10076](https://github.com/modelscope/ms-swift/issues/10076)).
# - **The wrong count.** The loss sums over the tokens that were generated and
#   divides by those of the data set
#   ([trl#6478](https://github.com/huggingface/trl/pull/6478)).
# - **An objective with another name.** A paper states the reverse KL; its code
#   took the student's prefixes with the forward KL of each token
#   ([Self-Distillation#5](https://github.com/idanshen/Self-Distillation/issues/5)).
#   Those are the mixed case of section 2, and no sequence-level KL at all.

# %% [markdown]
# - **Length taken out of a sum.** An answer's log-probability is a sum over
#   its tokens. A mean over them is another quantity
#   ([minimind#298](https://github.com/jingyaogong/minimind/issues/298),
#   [pytorch/tutorials#325](https://github.com/pytorch/tutorials/issues/325)).
# - **A loss that "should be zero".** It was cross-entropy. Readers of
#   distillation code keep asking which of the two it is
#   ([TAKD#4](https://github.com/imirzadeh/Teacher-Assistant-Knowledge-Distillation/issues/4),
#   [distillm#7](https://github.com/jongwooko/distillm/issues/7)).

# %% [markdown]
# ## Summary
#
# - The loss over whole answers is a sum over tokens, with the teacher's
#   prefixes. On answers that the teacher wrote, the tokens' KLs are an
#   unbiased estimate of it.
# - Other prefixes make another objective. The mode alone makes a third.
# - $D'$ is a sample of what the student will read. Its minimiser varies as
#   $1/n$, and looks better on $D'$ than it is.
# - Zero means equal at every prefix that the teacher writes, and says nothing
#   elsewhere.
# - What cannot be removed can be computed beforehand: what the student cannot
#   express, and what $x'$ does not tell, $I(Y; C \mid X')$.
#
# $$\hat\theta = \arg\min_\theta \sum_{x' \in D'}
#   \mathrm{Loss}\big(\Pr^t(\cdot \mid c, z),\;
#   \Pr^s_\theta(\cdot \mid c', z),\; x'\big)$$
#
# Next, chapter 4: the cross-entropy, and its gradient.
