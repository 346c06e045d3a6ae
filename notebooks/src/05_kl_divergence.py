# %% [markdown]
# # 5 · KL divergence
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/notebooks/05_kl_divergence.ipynb)
#
# | what it costs | |
# |---|---|
# | two CPU cores | 1 minute |
# | GPU | not needed |
# | memory | 1 GiB |
# | network, account, key | none |

# %% [markdown]
# ## What you will be able to do
#
# 1. Split a cross-entropy into a divergence and an entropy, and say which of
#    the three numbers to report.
# 2. Derive the gradient of both KLs by the student's logits.
# 3. Call torch's `kl_div` without falling into one of its traps.
# 4. Predict what forward and reverse KL do to a student that is too small.
# 5. Say what GKD's `beta`, skew, adaptive KL, total variation and the
#    alpha-beta family do, and where each loses its gradient.
# 6. Report a KL from samples with k1 or k3, and never differentiate them.
#
# Chapter 4 minimised a cross-entropy. This chapter asks what else could stand
# in the course's formula in its place:
#
# $$\hat\theta = \arg\min_\theta \sum_{x' \in D'}
#   \mathrm{Loss}\big(\Pr^t(\cdot \mid c, z),\;
#   \Pr^s_\theta(\cdot \mid c', z),\; x'\big).$$
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
import warnings
from itertools import product
from math import exp, log

import matplotlib.pyplot as plt
import torch
from kdlib import localize, models, plots
from kdlib.divergences import (
    adaptive_kl,
    alpha_beta,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    kl_mix,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    tvd,
)

models.quiet_transformers()
plt.rcParams.update(plots.STYLE)
torch.set_num_threads(1)

# %% [markdown]
# ## A teacher that is torn
#
# The shipped teacher writes a datum in one of six languages. Usually an
# instruction tells it which. Here it gets one worked example instead, and that
# example is the same in all six languages: `12:10:05 PM => 12:10:05`.
#
# ### Predict
#
# The input is `Germany and Spain`. What does the distribution of the first
# token look like, with the instruction and with the worked example?

# %%
from kdlib.pairs import PairCollator, PairedExample
from kdlib.teachers import LiveTeacher

teacher, tokenizer = models.load("teacher")
collator = PairCollator(
    tokenizer, teacher_max_length=160, student_max_length=128
)
Z = "Germany and Spain"
SURE = localize.instruction("fr", "long")
TORN = "12:10:05 PM => 12:10:05"


def scored(context, answers, model=teacher):
    """Logits of every answer token, the tokens, and each one's answer."""
    examples = [PairedExample(Z, answer, context) for answer in answers]
    pairs = [collator.encode(e, n) for n, e in enumerate(examples)]
    batch = collator.collate(pairs)
    logits = LiveTeacher(model).targets(batch).double()
    return logits, batch.response_ids, batch.row_ids


def first_token(context, model=teacher):
    """Logits [V] of the first token of an answer, whatever the answer."""
    return scored(context, ["?"], model)[0][0]


# %%
for name, context in (("sure", SURE), ("torn", TORN)):
    p = first_token(context).softmax(-1)
    print(f"{name}: {context!r}")
    for token in p.topk(4).indices:
        print(f"    {tokenizer.decode(token):4} {p[token]:.2f}")

# %% [markdown]
# `A` begins the name of Germany in Spanish, French and Portuguese, `G` in
# Italian, `D` in German, `N` in Polish. Both distributions are right, given
# what the teacher was told. A good student of the first is sure. A good
# student of the second is torn as well.
#
# ## 1 · Cross-entropy is KL plus entropy
#
# Write $p_t$ and $p_s$ for the two next-token distributions. The
# **Kullback-Leibler divergence** of the student from the teacher is
#
# $$\mathrm{KL}(p_t \,\|\, p_s) = \sum_v p_t(v) \log\frac{p_t(v)}{p_s(v)}
#   = \underbrace{-\sum_v p_t(v) \log p_s(v)}_{\text{cross-entropy}}
#   - \underbrace{\Big(-\sum_v p_t(v) \log p_t(v)\Big)}_{H(p_t)} .$$
#
# By hand, for three tokens:

# %%
t_hand, s_hand = [0.7, 0.2, 0.1], [0.5, 0.3, 0.2]
both = list(zip(t_hand, s_hand, strict=True))
ce_hand = -sum(t * log(s) for t, s in both)
entropy_hand = -sum(t * log(t) for t in t_hand)
kl_hand = sum(t * log(t / s) for t, s in both)
print("cross-entropy", round(ce_hand, 4))
print("entropy      ", round(entropy_hand, 4))
print("KL           ", round(kl_hand, 4))
assert abs(ce_hand - (kl_hand + entropy_hand)) < 1e-12

# %% [markdown]
# The same three numbers with tensors, then from kdlib. Log-probabilities are
# logits too: softmax of a logarithm gives the probabilities back.

# %%
z_t = torch.tensor(t_hand, dtype=torch.float64).log()
z_s = torch.tensor(s_hand, dtype=torch.float64).log()
p_t, p_s = z_t.softmax(-1), z_s.softmax(-1)
print("by hand     ", round(kl_hand, 4))
print("vectorised  ", round((p_t * (p_t / p_s).log()).sum().item(), 4))
print("from kdlib  ", round(forward_kl(z_s, z_t).item(), 4))
torch.testing.assert_close(forward_kl(z_s, z_t).item(), kl_hand)
torch.testing.assert_close(cross_entropy(z_s, z_t).item(), ce_hand)

# %% [markdown]
# Student first, always: `forward_kl(student_logits, teacher_logits)`.
#
# ### KL is never negative
#
# The logarithm is concave, so the mean of a logarithm is at most the logarithm
# of the mean (Jensen). With the mean taken over $p_t$:
#
# $$-\mathrm{KL}(p_t \,\|\, p_s)
#   = \sum_v p_t \log\frac{p_s}{p_t}
#   \;\le\; \log \sum_v p_t \,\frac{p_s}{p_t}
#   = \log \sum_v p_s = \log 1 = 0 .$$
#
# The logarithm is *strictly* concave, so there is equality only where
# $p_s / p_t$ is the same for all tokens: where the two are equal.

# %%
rng = torch.Generator().manual_seed(0)


def random_logits(*shape, scale=2.0):
    return scale * torch.randn(*shape, generator=rng, dtype=torch.float64)


many_s, many_t = random_logits(10_000, 5), random_logits(10_000, 5)
log_ratio = many_s.log_softmax(-1) - many_t.log_softmax(-1)
mean_of_log = (many_t.softmax(-1) * log_ratio).sum(-1)
log_of_mean = (many_t.softmax(-1) * log_ratio.exp()).sum(-1).log()
assert (mean_of_log <= log_of_mean).all() and log_of_mean.abs().max() < 1e-12
torch.testing.assert_close(forward_kl(many_s, many_t), -mean_of_log)
print("least of 10,000 values:", f"{forward_kl(many_s, many_t).min():.3f}")
print("of a pair of equals:   ", forward_kl(many_t, many_t).max().item())

# %% [markdown]
# ### Equal gradients, different numbers
#
# $H(p_t)$ does not depend on the student. So the two losses have the same
# gradient and the same minimiser. What is the use of the KL, then?
#
# ### Predict
#
# A student equals its teacher exactly. What is its cross-entropy at the sure
# position, and at the torn one?

# %%
for name, context in (("sure", SURE), ("torn", TORN)):
    z = first_token(context)
    student = random_logits(len(z)).requires_grad_()
    (a,) = torch.autograd.grad(cross_entropy(student, z), student)
    (b,) = torch.autograd.grad(forward_kl(student, z), student)
    torch.testing.assert_close(a, b)
    print(
        f"{name}: a perfect student has cross-entropy "
        f"{cross_entropy(z, z).item():.2f}, KL {forward_kl(z, z).item():.2f}"
    )

# %% [markdown]
# A cross-entropy of 1.15 is perfect at one position, and one of 0.1 leaves
# work to do at the other. It depends on how torn the teacher is. So between
# two teachers, two data sets or two positions, cross-entropies cannot be
# compared. A KL has its zero where the student is perfect.
#
# The reverse holds too: with *one* teacher and *one* data set, the two rank
# students alike, because they differ by a constant.

# %%
z = first_token(TORN)
students = z + random_logits(50, len(z), scale=1.0)
targets = z.expand_as(students)
ce, kl = cross_entropy(students, targets), forward_kl(students, targets)
assert (ce.argsort() == kl.argsort()).all()
gap = ce - kl
print(f"the gap is {gap.min():.4f} to {gap.max():.4f} for all 50 students")

# %% [markdown]
# ## 2 · What the optimiser is told
#
# A loss acts through its gradient by the logits $z$. For softmax,
#
# $$\frac{\partial p_s(v)}{\partial z_k}
#   = p_s(v)\,\big([v = k] - p_s(k)\big).$$
#
# So for any loss $D$, with $g_v = \partial D / \partial p_s(v)$,
#
# $$\frac{\partial D}{\partial z_k}
#   = \sum_v g_v\, p_s(v)\big([v = k] - p_s(k)\big)
#   = p_s(k)\,\Big(g_k - \sum_v p_s(v)\, g_v\Big). \tag{1}$$
#
# Each token is compared with the student's own average.

# %% [markdown]
# **Forward.** $g_v = -p_t(v) / p_s(v)$, and its average is $-1$. Hence
#
# $$\frac{\partial\, \mathrm{KL}(p_t \| p_s)}{\partial z_k}
#   = p_s(k)\Big(1 - \frac{p_t(k)}{p_s(k)}\Big) = p_s(k) - p_t(k).$$
#
# **Reverse.** $D = \sum_v p_s \log(p_s / p_t)$, so
# $g_v = \log\frac{p_s(v)}{p_t(v)} + 1$. The 1 cancels in (1), and the average
# of the logarithm is $D$ itself:
#
# $$\frac{\partial\, \mathrm{KL}(p_s \| p_t)}{\partial z_k}
#   = p_s(k)\Big(\log\frac{p_s(k)}{p_t(k)}
#     - \mathrm{KL}(p_s \| p_t)\Big).$$
#
# By hand for the three tokens, then by autograd:

# %%
reverse_hand = sum(s * log(s / t) for t, s in both)
by_hand = {
    "forward": [s - t for t, s in both],
    "reverse": [s * (log(s / t) - reverse_hand) for t, s in both],
}
leaf = z_s.clone().requires_grad_()
for name, loss in (("forward", forward_kl), ("reverse", reverse_kl)):
    (slope,) = torch.autograd.grad(loss(leaf, z_t), leaf)
    torch.testing.assert_close(slope.tolist(), by_hand[name])
    print(name, [round(v, 4) for v in slope.tolist()])
    assert abs(slope.sum()) < 1e-12

# %% [markdown]
# Both sum to zero: raising all logits alike changes no distribution. For a
# thousand tokens at once, at the teacher's torn position:

# %%
z = first_token(TORN)
leaf = (z + random_logits(len(z), scale=1.0)).requires_grad_()
p_s, p_t = leaf.detach().softmax(-1), z.softmax(-1)
log_ratio = leaf.detach().log_softmax(-1) - z.log_softmax(-1)
reverse = (p_s * log_ratio).sum()
formulas = {
    forward_kl: p_s - p_t,
    reverse_kl: p_s * (log_ratio - reverse),
}
for loss, formula in formulas.items():
    (slope,) = torch.autograd.grad(loss(leaf, z), leaf)
    torch.testing.assert_close(slope, formula)
    print(f"{loss.__name__}: autograd agrees, 1,024 numbers")

# %% [markdown]
# Look at the factor in front. In the reverse gradient everything is multiplied
# by $p_s(k)$. A token that the student has given up gets no push, however much
# the teacher likes it. In the forward gradient it gets the full $-p_t(k)$.

# %%
for unlikely in (1e-1, 1e-3, 1e-6):
    p_s = torch.tensor([1 - unlikely, unlikely], dtype=torch.float64)
    leaf = p_s.log().requires_grad_()
    half = torch.zeros(2, dtype=torch.float64)
    push = [
        -torch.autograd.grad(loss(leaf, half), leaf)[0][1].item()
        for loss in (forward_kl, reverse_kl)
    ]
    print(
        f"p_t = 0.5, p_s = {unlikely:<6g} "
        f"push: forward {push[0]:.3f}, reverse {push[1]:.6f}"
    )

# %% [markdown]
# ### kdlib's code, read aloud
#
# Both directions are one line each over the same helper. Its arguments are
# log-probabilities, and 1.0 means: the whole of the second distribution.

# %%
for divergence in (forward_kl, reverse_kl):
    print(inspect.getsource(divergence).split('"""')[-1].strip("\n"))
    print()

# %% [markdown]
# ## 3 · Four traps of torch's `kl_div`
#
# `torch.nn.functional.kl_div(input, target)` computes, element by element,
# $\text{target}\,(\log \text{target} - \text{input})$. So
#
# 1. the student comes **first** and the result is
#    $\mathrm{KL}(\text{target} \| \text{input})$: for forward KL the *teacher*
#    is the second argument;
# 2. `input` must be a **log**-probability, and nothing checks that;
# 3. `target` is a probability, unless `log_target=True`;
# 4. `reduction="mean"`, the default, divides by **all** elements, the
#    vocabulary included; `"batchmean"` divides by the first dimension alone.
#
# ### Predict
#
# Two sequences of three tokens, a vocabulary of 1,000. By what factor is the
# loss off with `"mean"`, and with `"batchmean"`?

# %%
kl_div = torch.nn.functional.kl_div
z_s, z_t = random_logits(2, 3, 1000), random_logits(2, 3, 1000)
log_ps, log_pt = z_s.log_softmax(-1), z_t.log_softmax(-1)
tokens = 2 * 3


def total(student, target, **how):
    return kl_div(student, target, reduction="sum", **how) / tokens


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns of "mean", and only of that
    mean = kl_div(log_ps, log_pt, log_target=True, reduction="mean")
batchmean = kl_div(log_ps, log_pt, log_target=True, reduction="batchmean")
right = total(log_ps, log_pt, log_target=True)
torch.testing.assert_close(right, forward_kl(z_s, z_t).mean())

# %%
calls = {
    "right": right,
    "arguments swapped": total(log_pt, log_ps, log_target=True),
    "probabilities as input": total(log_ps.exp(), log_pt.exp()),
    "log_target forgotten": total(log_ps, log_pt),
    'reduction="mean"': mean,
    'reduction="batchmean"': batchmean,
}
for name, value in calls.items():
    print(f"{name:24} {value:9.4f}   {value / right:7.3f} of the right one")
torch.testing.assert_close(1000 * mean, right)
torch.testing.assert_close(batchmean / 3, right)
swapped = calls["arguments swapped"]
torch.testing.assert_close(swapped, reverse_kl(z_s, z_t).mean())

# %% [markdown]
# The swap is the worst of them. Its value looks right, it falls in training,
# and it is zero at the right place. It is the other divergence.
#
# ### Zeros
#
# A token that both sides rule out has the logit $-\infty$ on both sides. It
# should count $0 \log 0 = 0$. And a tiny probability may round to zero on the
# way: then a loss can be finite while its gradient is not a number.

# %%
inf = float("inf")
out = torch.tensor([0.0, 1.0, -inf])
other = torch.tensor([1.0, 0.0, -inf])
naive = kl_div(
    out.log_softmax(-1),
    other.log_softmax(-1),
    reduction="sum",
    log_target=True,
)
print("torch", naive.item(), " kdlib", round(forward_kl(out, other).item(), 4))

# %%
sure = torch.tensor([0.0, 200.0], requires_grad=True)  # float32: p rounds to 0
flat = torch.zeros(2)
loss = kl_div(flat.log_softmax(-1), sure.softmax(-1), reduction="sum")
(slope,) = torch.autograd.grad(loss, sure)
print("torch  value", round(loss.item(), 4), "gradient", slope.tolist())
loss = reverse_kl(sure, flat)
(slope,) = torch.autograd.grad(loss, sure)
print("kdlib  value", round(loss.item(), 4), "gradient", slope.abs().tolist())

# %% [markdown]
# ## 4 · Forward or reverse?
#
# Both are zero at $p_s = p_t$, and there alone. So a student that *can* equal
# its teacher has the same goal under both. Take one with a free logit for each
# of the 1,024 tokens, at the torn position, and descend.

# %%
z = first_token(TORN)


def descend(loss, start, steps=400, rate=0.2):
    leaf = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([leaf], lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(leaf, z).backward()
        optimiser.step()
    return leaf.detach()


for loss in (forward_kl, reverse_kl, generalized_jsd):
    found = descend(loss, torch.zeros_like(z))
    print(f"{loss.__name__:16} left: {tvd(found, z).item():.3f}")
    assert tvd(found, z) < 0.01

# %% [markdown]
# ("Left" is the total variation distance, half the sum of $|p_t - p_s|$.)
#
# So "forward covers, reverse seeks" is no property of the two losses alone. It
# is what they do with a student that **cannot** match. Wu et al. (2024, arXiv
# 2404.02657) make this point about language models.
#
# ### The smallest student that cannot
#
# A teacher says `A A` or `B B`, each half of the time. The student chooses its
# first and its second word *independently*: it says `A` with probability $a$,
# in either place. It can say `A A` always, or mix, but a mix also says `A B`.
#
# ### Predict
#
# Which $a$ does forward KL choose, which one reverse KL? What does each pay?

# %% [markdown]
# **Forward**, averaged over the teacher's two sentences:
#
# $$\tfrac12 \log\frac{1/2}{a^2} + \tfrac12 \log\frac{1/2}{(1-a)^2}
#   = -\log a - \log(1 - a) - \log 2 .$$
#
# It is least at $a = \tfrac12$, and there it is $\log 2$. **Reverse**,
# averaged over the student's sentences, is infinite as soon as `A B` can
# appear, because the teacher never says it. What remains is $a = 1$ or
# $a = 0$, at $\log \frac{1}{1/2} = \log 2$.
#
# Both pay $\log 2 = 0.693$ nats, for opposite answers. `kdlib.exact` lists all
# sentences of such a teacher; a slip of one in a thousand keeps the sums
# finite.

# %%
from kdlib.exact import (
    ExactLM,
    sequence_forward_kl,
    sequence_reverse_kl,
)

two_modes = ExactLM.from_modes([[0, 0], [1, 1]], vocab=2, noise=0.001)
a = torch.linspace(0.0005, 0.9995, 1001, dtype=torch.float64)
words = torch.stack([a, 1 - a], -1).log()  # [1001, 2]
independent = ExactLM.memoryless(words[:, None].expand(-1, 2, -1))
curves = {
    "forward KL": sequence_forward_kl(two_modes, independent),
    "reverse KL": sequence_reverse_kl(two_modes, independent),
}
for name, curve in curves.items():
    least = curve.min()
    where = a[(curve - least).abs() < 1e-9]
    places = " and ".join(f"{x:.2f}" for x in where)
    print(f"{name}: least {least:.2f} at a = {places}")

# %%
figure, axes = plt.subplots(figsize=(6, 2.8))
for (name, curve), colour in zip(
    curves.items(), (plots.BLUE, plots.ORANGE), strict=True
):
    axes.plot(a, curve, color=colour, label=name)
axes.axhline(log(2), color=plots.GREY, linewidth=0.8)
axes.text(0.5, log(2) - 0.1, "log 2", color=plots.GREY, ha="center", va="top")
axes.set_ylim(0, 4)
axes.set_xlabel("a, the student's probability of word A")
axes.set_ylabel("nats")
axes.set_title("One valley in the middle, or one at each mode", loc="left")
axes.legend(frameon=False, loc="upper center", ncols=2)
plt.show()

# %% [markdown]
# Forward KL **covers**: half of what its student says (`A B`, `B A`) was never
# said by the teacher. Reverse KL **seeks**: its student says nothing wrong and
# forgets half of what the teacher says. It also has two valleys, and which one
# it ends in depends on where it starts.
#
# See it on a line. The teacher has two hills of unequal size, the student is
# one bell with a middle and a width. Arrows show where the gradient sends it.
# **Predict:** from which middles does reverse KL end on the *smaller* hill?
# Can forward KL be made to end on one hill alone? Then try.

# %%
from kdlib.explorers.directions import directions

directions()

# %% [markdown]
# ### The same on the real teacher
#
# Six answers are right for `Germany and Spain`, one a language. Each has three
# words. Let the student choose its three words independently, as a model that
# writes all words at once would. Then it may write any of these:

# %%
inputs = localize.load_split("unlabelled", kinds=["list"])
datum = next(d for d in inputs if d.english == Z)
ANSWERS = list(dict.fromkeys(datum.renderings))
LANGUAGES = list(localize.LOCALES.values())
by_place = zip(*(answer.split() for answer in ANSWERS), strict=True)
slots = [list(dict.fromkeys(words)) for words in by_place]
for slot in slots:
    print(len(slot), "words:", ", ".join(slot))
sentences = [" ".join(words) for words in product(*slots)]
is_right = torch.tensor([sentence in ANSWERS for sentence in sentences])
print(len(sentences), "sentences,", int(is_right.sum()), "of them right")

# %% [markdown]
# The torn teacher's probability of each of the 180 is a product over its
# tokens, the end included. Nothing is sampled.

# %%
logits, ids, rows = scored(TORN, sentences)
log_token = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
log_p = torch.zeros(len(sentences), dtype=torch.float64)
log_p = log_p.index_add(0, rows, log_token)
print(f"one of the 180: {log_p.exp().sum():.3f}")
log_p = log_p.log_softmax(0)  # from here on: given that it is one of them
p = log_p.exp()
print(f"of these, right in some language: {p[is_right].sum():.3f}")
for answer, language in zip(ANSWERS, LANGUAGES, strict=True):
    print(f"    {p[sentences.index(answer)]:.2f} {answer} ({language})")

# %% [markdown]
# **The best forward student has a formula.** With $q(y) = \prod_i q_i(y_i)$
# the part of the loss that depends on $q$ is
#
# $$-\sum_y p(y) \sum_i \log q_i(y_i)
#   = \sum_i \Big(-\sum_{w} p_i(w) \log q_i(w)\Big),$$
#
# one cross-entropy for each slot with the teacher's **marginal** $p_i$ as its
# target. Each is least at its target: the best student is the product of the
# marginals. For the other losses there is no formula, so we descend, from
# seven starts: all words alike, and one language each.

# %%
SHAPE = [len(slot) for slot in slots]
joint = p.view(SHAPE)
marginals = [joint.sum((1, 2)), joint.sum((0, 2)), joint.sum((0, 1))]
starts = [torch.zeros(7, n, dtype=torch.float64) for n in SHAPE]
for number, answer in enumerate(ANSWERS, start=1):
    for start, slot, word in zip(starts, slots, answer.split(), strict=True):
        start[number, slot.index(word)] = 4.0


# %%
def log_student(words):
    """Log-probability [starts, 180] of every sentence."""
    a, o, b = (x.log_softmax(-1) for x in words)
    total = a[:, :, None, None] + o[:, None, :, None] + b[:, None, None, :]
    return total.flatten(1)


def fit(loss, steps=1500):
    """Where every start ends: values [7], probabilities [7, 180]."""
    words = [start.clone().requires_grad_() for start in starts]
    optimiser = torch.optim.Adam(words, lr=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(log_student(words)).sum().backward()
        optimiser.step()
    log_q = log_student(words).detach()
    return loss(log_q), log_q.exp()


# %%
def from_teacher(divergence, **params):
    return lambda log_q: divergence(log_q, log_p.expand_as(log_q), **params)


def openings(q):
    """exp of the entropy of the first word: how many are in use."""
    first = q.view(SHAPE).sum((1, 2))
    return (-torch.xlogy(first, first).sum()).exp().item()


values, students = fit(from_teacher(forward_kl))
formula = log_student([m.log()[None] for m in marginals])[0].exp()
spread = (values.max() - values.min()).item()
print("all seven starts end alike:", spread < 1e-3)
print(f"distance from the formula: {(students[0] - formula).abs().sum():.4f}")
q = students[values.argmin()]
best = {"forward KL": q}
print(f"right: {q[is_right].sum():.2f}, first words: {openings(q):.1f}")
print(f"the teacher's first words: {openings(p):.1f}")

# %%
values, students = fit(from_teacher(reverse_kl))
names = ["all alike", *LANGUAGES]
for name, value, q in zip(names, values, students, strict=True):
    said = sentences[q.argmax()]
    right = q[is_right].sum()
    print(f"start {name:10} {value:.2f}  right {right:.2f}  {said}")
best["reverse KL"] = students[values.argmin()]

# %% [markdown]
# The reverse student stays with the language that it started with: each is a
# valley. Forward KL had one valley, and it is full of sentences that no
# language has:

# %%
q = best["forward KL"]
wrong = torch.where(is_right, 0.0, q)
print(f"wrong in every language: {wrong.sum():.2f}. The likeliest:")
for number in wrong.topk(4).indices:
    print(f"    {q[number]:.3f}  {sentences[number]}")

# %% [markdown]
# ### The picture
#
# Each field is a pair of first and last word, with its probability in percent.
# The frames mark the six pairs that belong together. JSD, of which more below,
# lies between the two.

# %%
values, students = fit(from_teacher(generalized_jsd, beta=0.1))
best["JSD, beta 0.1"] = students[values.argmin()]
panels = {"teacher": p, **best}
order = ["teacher", "forward KL", "JSD, beta 0.1", "reverse KL"]


def draw(ax, name):
    pairs = panels[name].view(SHAPE).sum(1)
    ax.imshow(pairs.sqrt(), cmap="Blues", vmin=0, vmax=1.2)
    for row, column in product(range(SHAPE[0]), range(SHAPE[2])):
        percent = round(100 * pairs[row, column].item())
        if percent:
            look = {"color": "white" if percent > 60 else "black", "size": 8}
            ax.text(column, row, percent, ha="center", va="center", **look)
    for answer in ANSWERS:
        first, _, last = answer.split()
        corner = slots[2].index(last) - 0.5, slots[0].index(first) - 0.5
        frame = plt.Rectangle(corner, 1, 1, fill=False, clip_on=False)
        frame.set(edgecolor=plots.ORANGE, linewidth=2)
        ax.add_patch(frame)
    right = panels[name][is_right].sum()
    ax.set_title(f"{name}\nright in some language: {right:.0%}", size=10)
    ax.set_xticks(range(6), slots[2], rotation=60, ha="right", size=9)


# %%
figure, axes = plt.subplots(1, 4, figsize=(10, 3.6), sharey=True)
for ax, name in zip(axes, order, strict=True):
    draw(ax, name)
axes[0].set_yticks(range(6), slots[0], size=9)
axes[0].set_ylabel("first word", size=9)
figure.supxlabel("last word", size=9)
figure.suptitle("Forward KL invents sentences, reverse KL forgets languages")
plt.show()

# %% [markdown]
# Neither is better as such. Who must say *something* right wants the student
# on the right. Who wants each word as likely as the teacher made it wants the
# one beside the teacher. A student that remembers its first word needs neither
# compromise.
#
# ### Students that are trained
#
# Real students are not tables. Does the same happen to a transformer? It can
# condition on its own words, so it need not mix languages. It may still be too
# small.
#
# The script `torn_teacher.py` trained students on what the torn teacher wrote
# for 770 lists. They start as the first two of the teacher's four layers. All
# read the same answers, in the same order; only the loss differs. For each of
# 113 test inputs the probabilities of the right answers were added up.
#
# ### Predict
#
# Which student puts more probability on right answers? Which one keeps more
# languages?

# %%
import numpy as np
from kdlib.ledger import Interval, mean_interval

results = Path(kdlib.__file__).parents[1] / "notebooks" / "results"
torn = json.loads((results / "torn_teacher.json").read_text())
print(torn["command"])
print(torn["device"], "·", torn["date"], "·", torn["seeds"], "paired seeds")
print(f"{torn['core_minutes']:.0f} minutes of one core")
steps = {name: row["steps"] for name, row in torn["settings"].items()}
print(f"{steps['forward KL']} steps of {torn['batch_size']} answers")
print()
print(f"{'':26} {'right':22} languages")
for name, row in torn["fixed"].items():
    print(f"{name:26} {row['valid']:<22.3f} {row['languages']:.3f}")
for name, row in torn["rows"].items():
    right, kept = Interval(**row["valid"]), Interval(**row["languages"])
    print(f"{name:26} {right!s:22} {kept}")

# %% [markdown]
# The brackets are 95 % intervals over the seeds. The students start alike, so
# a seed stands for the order of the examples (and for the first weights in the
# two rows "from scratch"). There is no row of equal FLOPs here: the teacher
# wrote the answers for all rows.
#
# Seed by seed:

# %%
MEASURES = {
    "valid": "right",
    "languages": "languages",
    "forward_kl": "forward KL, nats a token",
    "reverse_kl": "reverse KL, nats a token",
}
for rows, row in torn["minus"].items():
    print(rows)
    for measure, name in MEASURES.items():
        print(f"    {name:25} {Interval(**row[measure]).claim()}")

# %% [markdown]
# Read it row by row.
#
# - **Reverse against forward**: more probability on right answers, fewer
#   languages. By its *own* measure, reverse KL, it is not shown to be ahead.
# - **JSD** is not shown to have more or less on right answers than reverse KL.
#   It keeps more languages.
# - **Hard labels** are behind forward KL in every column. Here the teacher's
#   distributions do matter: two sampled answers say less than the six that it
#   had in mind.
# - **From scratch** reverse KL fails altogether, also in reverse KL.
#
# The students had 250 steps. So this does not show that they are too *small*,
# only what each loss does first.
#
# ### The cheapest rival
#
# Fewer languages and fewer slips: could one have had that without another
# loss? Take the forward student as it is, and sample from it at a lower
# temperature. To be fair, cool the others, too. Then compare at equal shares
# of right answers.
#
# ### Predict
#
# Which student has the most languages left?


# %%
def kept_at(share, name):
    """Languages of each seed's student, cooled until `share` is right."""
    found = []
    for run in torn["runs"]:
        if run["row"] == name:
            path = [run, *run["cooled"].values()]
            right = [x["valid"] for x in path]
            kept = [x["languages"] for x in path]
            found.append(np.interp(share, right, kept))
    return found


print("languages of the forward student minus those of")
for share, name in product((0.38, 0.42), ("JSD, beta 0.5", "reverse KL")):
    pairs = zip(
        kept_at(share, "forward KL"), kept_at(share, name), strict=True
    )
    more = mean_interval([a - b for a, b in pairs])
    print(f"{name:13} at {share} right: {more.claim()}")

# %%
figure, axes = plt.subplots(figsize=(7, 3.2))
shown = {
    "forward KL": (plots.BLUE, "o"),
    "JSD, beta 0.5": (plots.GREY, "D"),
    "reverse KL": (plots.ORANGE, "s"),
    "hard labels, equal tokens": (plots.GREY, "v"),
}
for name, (colour, mark) in shown.items():
    runs = [run for run in torn["runs"] if run["row"] == name]
    right = [run["valid"] for run in runs]
    kept = [run["languages"] for run in runs]
    axes.scatter(right, kept, color=colour, marker=mark, label=name)
    path = [torn["rows"][name], *torn["cooled"].get(name, {}).values()]
    right = [row["valid"]["mean"] for row in path]
    kept = [row["languages"]["mean"] for row in path]
    axes.plot(right, kept, color=colour)
axes.set_xlabel("probability of a right answer")
axes.set_ylabel("languages kept")
axes.set_xticks([0.3, 0.35, 0.4, 0.45])
axes.set_title("Every student, cooled from 1 to 0.5", loc="left")
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# The marks are temperature 1, one for each seed; the lines are means. The
# reverse student was ahead in right answers. But at an equal share of them,
# the forward student keeps half a language *more*. What reverse KL gained
# here was a sharper distribution, and a lower temperature has that for
# nothing. JSD's curve crosses the forward one.
#
# This is one teacher, one task and a short training. But a cooled forward
# student is the rival to put into your own table.

# %% [markdown]
# ## 5 · Between the two directions
#
# ### A mixture of the two
#
# The plain way between them is a weighted mean, `kl_mix(lam)`:
#
# $$(1 - \lambda)\,\mathrm{KL}(p_t \| p_s)
#   + \lambda\,\mathrm{KL}(p_s \| p_t).$$
#
# ### GKD's generalised JSD
#
# Agarwal et al. (2023, arXiv 2306.13649) go another way. Both models are
# compared with a mixture of them, $m = \beta p_t + (1 - \beta) p_s$:
#
# $$\mathrm{JSD}_\beta = \beta\,\mathrm{KL}(p_t \| m)
#   + (1 - \beta)\,\mathrm{KL}(p_s \| m).$$
#
# At $\beta = \tfrac12$ it is the Jensen-Shannon divergence. Libraries call
# $\beta = 0$ forward KL and $\beta = 1$ reverse KL.
#
# ### Predict
#
# Put $\beta = 0$ into the formula. What comes out? And $\beta = 0.001$?

# %%
half = models.first_layers(teacher, 2)  # a student that is not trained yet
z_t, z_s = first_token(TORN), first_token("", half)
print("forward", round(forward_kl(z_s, z_t).item(), 3))
for beta in (0, 0.001, 0.1, 0.5, 0.9, 0.999, 1):
    value = generalized_jsd(z_s, z_t, beta=beta).item()
    mixed = kl_mix(z_s, z_t, lam=beta).item()
    print(f"{beta:6g}  JSD {value:.4f}   kl_mix {mixed:.4f}")
print("reverse", round(reverse_kl(z_s, z_t).item(), 3))

# %% [markdown]
# The formula goes to zero at both ends. The two values *at* the ends come from
# a convention, in code of their own:

# %%
print(inspect.getsource(generalized_jsd).split('"""')[-1].strip("\n"))

# %% [markdown]
# ### Why it goes to zero, and which KL it leaves behind
#
# A KL is convex in its second place. So $\mathrm{KL}(p_t \| m) \le
# (1 - \beta)\, \mathrm{KL}(p_t \| p_s)$, and likewise for the student. Hence
#
# $$\mathrm{JSD}_\beta \le \beta (1 - \beta)\,\big(\mathrm{KL}(p_t \| p_s)
#   + \mathrm{KL}(p_s \| p_t)\big).$$

# %%
for beta in (0.001, 0.1, 0.5, 0.9, 0.999):
    both_ways = 2 * kl_mix(many_s, many_t, lam=0.5)
    bound = beta * (1 - beta) * both_ways
    assert (generalized_jsd(many_s, many_t, beta=beta) <= bound).all()
print("10,000 pairs, five betas: the bound holds")

# %% [markdown]
# What is left, to first order? Let $\beta$ be small and $r = p_t / p_s$. Then
# $m = p_s\,(1 + \beta (r - 1))$.
#
# - The first term is $\beta\,\mathrm{KL}(p_t \| m)$, and $m \to p_s$. So it is
#   $\beta\,\mathrm{KL}(p_t \| p_s)$ to first order.
# - In the second, $\mathrm{KL}(p_s \| m) = -\sum p_s \log(1 + \beta(r - 1))$.
#   With $\log(1 + x) = x - x^2/2 + \dots$ the part in $\beta$ is
#   $-\sum p_s (r - 1) = 1 - 1 = 0$. It starts with $\beta^2$.
#
# Hence $\mathrm{JSD}_\beta / \beta \to \mathrm{KL}(p_t \| p_s)$, **forward**
# KL. Swap the roles for the other end: $\mathrm{JSD}_\beta / (1 - \beta) \to
# \mathrm{KL}(p_s \| p_t)$, **reverse** KL, for $\beta \to 1$.

# %%
forward, reverse = forward_kl(z_s, z_t), reverse_kl(z_s, z_t)
for small in (1e-1, 1e-3, 1e-5, 1e-7):
    low = generalized_jsd(z_s, z_t, beta=small) / small
    high = generalized_jsd(z_s, z_t, beta=1 - small) / small
    print(
        f"{small:6g}  JSD/beta is {low / forward:.3f} of forward, "
        f"JSD/(1-beta) {high / reverse:.3f} of reverse"
    )
torch.testing.assert_close(low, forward, rtol=1e-3, atol=0)
torch.testing.assert_close(high, reverse, rtol=1e-3, atol=0)

# %% [markdown]
# The gradient does the same: its *direction* turns from one KL to the other,
# and its *length* vanishes on the way to either. After the figure turn the
# knob yourself. **Predict:** which of the two families tells its student less
# at 0.1, and what does rescaling change?


# %%
def slope(loss, **params):
    leaf = z_s.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, z_t, **params), leaf)[0]


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


ends = slope(forward_kl), slope(reverse_kl)
knob = torch.cat([torch.logspace(-3, -1, 20), torch.linspace(0.12, 0.5, 20)])
knob = torch.cat([knob, (1 - knob).flip(0)[1:]]).tolist()
turning = {
    "JSD": [slope(generalized_jsd, beta=x) for x in knob],
    "kl_mix": [slope(kl_mix, lam=x) for x in knob],
}
turning["JSD / (b (1-b))"] = [
    g / (x * (1 - x)) for x, g in zip(knob, turning["JSD"], strict=True)
]
first, last = turning["JSD"][0], turning["JSD"][-1]
print(f"beta 0.001: cosine with forward {cosine(first, ends[0]):.3f}")
print(f"beta 0.999: cosine with reverse {cosine(last, ends[1]):.3f}")
print(f"length at 0.001: {first.norm() / ends[0].norm():.4f} of forward's")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
looks = {
    "JSD": (plots.ORANGE, "-"),
    "JSD / (b (1-b))": (plots.ORANGE, "--"),
    "kl_mix": (plots.BLUE, "-"),
}
for name, (colour, line) in looks.items():
    lengths = [g.norm() for g in turning[name]]
    toward = [cosine(g, ends[1]) for g in turning[name]]
    axes[0].plot(knob, lengths, line, color=colour, label=name)
    axes[1].plot(knob, toward, line, color=colour)
for x, end in enumerate(ends):
    axes[0].plot(x, end.norm(), "o", color=plots.GREY)
axes[0].set_title("length of the gradient", loc="left")
axes[1].set_title("cosine with reverse KL's gradient", loc="left")
axes[0].set_ylim(bottom=0)
for ax in axes:
    ax.set_xlabel("beta or lam")
figure.legend(loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %%
from kdlib.explorers.mixtures import mixtures

mixtures(tokenizer, z_s, z_t)

# %% [markdown]
# The grey points are the two KLs. `kl_mix` arrives at them, and JSD does not:
# it falls to zero beside them. So $\beta$ changes two things at once. A sweep
# over it with one learning rate compares strengths as well as directions.
#
# Divided by $\beta(1 - \beta)$, JSD keeps its size and is a knob, too. Adam
# divides by the gradient's size anyway, and would hide the loss of length. A
# hard-label term beside it would not be fooled. Here it has half of the
# weight:

# %%
label = z_t.argmax()
hard = slope(lambda student, teacher: -student.log_softmax(-1)[label])
for beta in (0.5, 0.1, 0.01, 0.001):
    soft = slope(generalized_jsd, beta=beta)
    share = soft.norm() / (soft.norm() + hard.norm())
    print(f"beta {beta:5}: {share:.1%} of the push is the teacher's")

# %% [markdown]
# ### How large can it be?
#
# $m \ge \beta p_t$, so $\mathrm{KL}(p_t \| m) \le -\log \beta$; likewise
# $\mathrm{KL}(p_s \| m) \le -\log(1 - \beta)$. Together
#
# $$\mathrm{JSD}_\beta \le -\beta \log \beta - (1 - \beta) \log (1 - \beta)
#   \le \log 2 ,$$
#
# with equality where the two share no token. A bounded loss gives a bounded
# push: far away it has hardly a slope.

# %%
apart = torch.tensor([0.0, -inf]), torch.tensor([-inf, 0.0])
for beta in (0.1, 0.5):
    bound = -beta * log(beta) - (1 - beta) * log(1 - beta)
    print(beta, round(generalized_jsd(*apart, beta=beta).item(), 4))
    assert abs(generalized_jsd(*apart, beta=beta).item() - bound) < 1e-6
    assert (generalized_jsd(many_s, many_t, beta=beta) < bound).all()
print("log 2", round(log(2), 4), " forward KL", forward_kl(*apart).item())

# %% [markdown]
# ## 6 · The rest of the family
#
# ### Skew KL
#
# Forward KL is infinite where the student gives a token nothing. DistiLLM (Ko
# et al. 2024, arXiv 2402.03898) mixes a little of the teacher into the second
# place, with $\alpha = 0.1$:
#
# $$\mathrm{SKL}_\alpha = \mathrm{KL}(p_t \,\|\,
#   \alpha p_t + (1 - \alpha) p_s) \le -\log \alpha .$$
#
# Its mirror image is
# $\mathrm{SRKL}_\alpha = \mathrm{KL}(p_s \| (1-\alpha) p_t + \alpha p_s)$. You
# know both already: they are the two halves of a JSD.

# %%
for beta in (0.1, 0.5, 0.8):
    halves = beta * skew_kl(many_s, many_t, alpha=beta)
    halves += (1 - beta) * skew_reverse_kl(many_s, many_t, alpha=1 - beta)
    whole = generalized_jsd(many_s, many_t, beta=beta)
    torch.testing.assert_close(halves, whole)
print("JSD is the weighted sum of a skew KL and a skew reverse KL")
print(f"no common token: {skew_kl(*apart).item():.3f}", end=" ")
print(f"= -log 0.1 = {-log(0.1):.3f}")
same = skew_kl(many_s, many_t, alpha=0.0)
torch.testing.assert_close(same, forward_kl(many_s, many_t))

# %% [markdown]
# ### Adaptive KL
#
# Wu et al. (2024) mix the two directions anew at every token. The gap
# $|p_t - p_s|$ is added up over the teacher's head (its likeliest tokens, up
# to a mass of one half) and over the tail. Forward KL gets the head's share of
# the gap, reverse KL the tail's. So it is a `kl_mix` whose $\lambda$ is the
# tail's share:

# %%
ranked, order = z_t.softmax(-1).sort(descending=True)
gap = (ranked - z_s.softmax(-1)[order]).abs()
in_head = ranked.cumsum(-1) <= 0.5
in_head[0] = True
lam = (gap[~in_head].sum() / gap.sum()).item()
print("tokens in the head:", int(in_head.sum()), f" lam = {lam:.3f}")
value = adaptive_kl(z_s, z_t)
torch.testing.assert_close(value, kl_mix(z_s, z_t, lam=lam))
print("adaptive KL", round(value.item(), 3))

# %% [markdown]
# ### Total variation
#
# $\mathrm{TVD} = \tfrac12 \sum_v |p_t - p_s|$ lies between 0 and 1. It is the
# largest difference that the two can have about any set of tokens, so it is
# easy to read: "at most 3 % of the answers change". Pinsker's inequality ties
# it to the KL: $\mathrm{TVD} \le \sqrt{\mathrm{KL}/2}$.

# %%
p_t, p_s = many_t.softmax(-1), many_s.softmax(-1)
largest = (p_t - p_s).clamp_min(0).sum(-1)  # the set where p_t > p_s
torch.testing.assert_close(tvd(many_s, many_t), largest)
assert (largest <= (forward_kl(many_s, many_t) / 2).sqrt()).all()
assert (largest <= (reverse_kl(many_s, many_t) / 2).sqrt()).all()
print(f"TVD of the two real ones: {tvd(z_s, z_t).item():.3f}")

# %% [markdown]
# ### The alpha-beta family
#
# One formula with two exponents (Cichocki et al. 2011, *Entropy* 13:134; for
# distillation ABKD, arXiv 2505.04560) has several of the others as points.
# With $s = \alpha + \beta$:
#
# $$D = \frac{1}{\alpha\beta} \sum_v \Big(\frac{\alpha}{s}\, p_t^s
#   + \frac{\beta}{s}\, p_s^s - p_t^\alpha\, p_s^\beta \Big).$$
#
# At $\alpha = 0$ or $\beta = 0$ it is a limit, $0/0$. Each case to $10^{-10}$:

# %%
root = (p_t.sqrt() - p_s.sqrt()).square().sum(-1)
special = {
    (1, 0): ("forward KL", forward_kl(many_s, many_t)),
    (0, 1): ("reverse KL", reverse_kl(many_s, many_t)),
    (0.5, 0.5): ("2 x squared distance of roots", 2 * root),
    (1, 1): ("half squared error", 0.5 * (p_t - p_s).square().sum(-1)),
}
for (a, b), (name, wanted) in special.items():
    found = alpha_beta(many_s, many_t, alpha=a, beta=b)
    off = (found - wanted).abs().max().item()
    print(f"({a}, {b})".ljust(12), f"{name:30} within 1e-10: {off < 1e-10}")
    assert off < 1e-10

# %%
for b in (1e-1, 1e-3, 1e-5):
    near = alpha_beta(many_s, many_t, alpha=1 - b, beta=b)
    off = (near / forward_kl(many_s, many_t) - 1).abs().max().item()
    print(f"({1 - b:g}, {b:g}): within {off:.0e} of forward KL")

# %% [markdown]
# This one is a knob without a jump: from $(1, 0)$ to $(0, 1)$ along
# $\alpha + \beta = 1$, by way of the Hellinger distance.
#
# ### Who pulls, and when
#
# Two tokens are enough to compare all of them. The teacher gives the first one
# 0.9. The student's logit for it is off by $x$: to the left it has given up a
# token that the teacher wants, to the right it is too sure of it. What is the
# push on that logit?

# %%
z_two = torch.tensor([log(9.0), 0.0], dtype=torch.float64)
x = torch.linspace(-12, 8, 401, dtype=torch.float64)
PULLS = {
    "forward KL": (forward_kl, {}, plots.BLUE, "-"),
    "reverse KL": (reverse_kl, {}, plots.ORANGE, "-"),
    "JSD, beta 0.5": (generalized_jsd, {}, plots.GREY, "-"),
    "skew KL, 0.1": (skew_kl, {}, plots.BLUE, "--"),
    "TVD": (tvd, {}, "black", ":"),
}
pulls = {}
for name, (loss, params, _, _) in PULLS.items():
    student = torch.stack([z_two[0] + x, z_two[1].expand_as(x)], -1)
    student.requires_grad_()
    value = loss(student, z_two.expand_as(student), **params).sum()
    pulls[name] = -torch.autograd.grad(value, student)[0][:, 0]

# %%
figure, axes = plt.subplots(figsize=(7, 3.4))
for name, (_, _, colour, line) in PULLS.items():
    axes.plot(x, pulls[name], line, color=colour, label=name)
axes.axhline(0, color="black", linewidth=0.6)
axes.axvline(0, color="black", linewidth=0.6)
axes.set_xlabel("student's logit minus the right one")
axes.set_ylabel("push on the logit")
axes.set_title("Far to the left, only forward KL still pulls", loc="left")
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
for name, pull in pulls.items():
    at = [pull[(x - place).abs().argmin()].item() for place in (-12, -2, 8)]
    print(f"{name:14}", "  ".join(f"{v:9.6f}" for v in at))
torch.testing.assert_close(
    pulls["forward KL"][0].item(), 0.9 - 1 / (1 + exp(12) / 9)
)

# %% [markdown]
# So it is no wonder that reverse KL from scratch failed above. A student that
# knows nothing gives the right word next to nothing, and there the loss has no
# slope. Near the goal ($x = -2$) all of them pull.
#
# From a student that is sure and wrong, count plain gradient steps:

# %%
wrong = torch.tensor([-9.0, 0.0], dtype=torch.float64)
for name, (loss, params, _, _) in PULLS.items():
    student, steps = wrong.clone(), 0
    while tvd(student, z_two) > 0.05 and steps < 3000:
        leaf = student.requires_grad_()
        step = torch.autograd.grad(loss(leaf, z_two, **params), leaf)[0]
        student, steps = (leaf - step).detach(), steps + 1
    print(f"{name:14} {steps if steps < 3000 else 'not in 3000'}")

# %% [markdown]
# ## 7 · From samples alone: k1, k2, k3
#
# Often nobody has whole distributions. On-policy, the student draws a token
# (or a sentence) $y \sim p_s$, and each side says how likely it was. With $r =
# \log p_t(y) - \log p_s(y)$, Schulman's note "Approximating KL divergence"
# (2020, joschu.net/blog/kl-approx.html) compares
#
# $$k_1 = -r, \qquad k_2 = \tfrac12 r^2, \qquad k_3 = e^r - 1 - r .$$
#
# All three estimate $\mathrm{KL}(p_s \| p_t)$, the reverse KL.
#
# - $\mathbb{E}[k_1] = \sum_y p_s \log(p_s / p_t)$: the KL itself, without
#   bias.
# - $\mathbb{E}[e^r] = \sum_y p_s \cdot p_t / p_s = 1$. So
#   $\mathbb{E}[k_3] = \mathbb{E}[k_1]$: no bias. And $e^r \ge 1 + r$, so it is
#   never negative.
# - $k_2$ is their common second-order term, and biased.

# %%
ks = {
    "k1": lambda s, t: s - t,
    "k2": lambda s, t: 0.5 * (t - s).square(),
    "k3": lambda s, t: torch.expm1(t - s) - (t - s),
}
print("true reverse KL", round(reverse_hand, 5))
for name, k in ks.items():
    each = [k(torch.tensor(log(s)), torch.tensor(log(t))) for t, s in both]
    mean = sum(s * v.item() for (_, s), v in zip(both, each, strict=True))
    print(name, [round(v.item(), 4) for v in each], "mean", round(mean, 5))

# %% [markdown]
# ### Value: bias and spread, by enumeration
#
# `kdlib.exact` knows all 4,096 sentences of a small language, so mean and
# variance are sums and no experiments. Two students: a near one and a far one.

# %%
from kdlib.estimators import estimate, surrogate
from kdlib.exact import estimator_moments, on_policy_gradient

model = ExactLM.random(vocab=8, length=4, seed=1)
nudge = ExactLM.random(vocab=8, length=4, seed=2)


def student_at(distance):
    pairs = zip(model.tables, nudge.tables, strict=True)
    return ExactLM([table + distance * other for table, other in pairs])


for distance in (0.1, 1.5):
    near = student_at(distance)
    true = sequence_reverse_kl(model, near).item()
    print(f"distance {distance}: reverse KL {true:.3f}")
    for name, k in ks.items():
        found = estimator_moments(k, model, near)
        spread = found.variance.sqrt().item()
        print(f"    {name}  mean {found.mean.item():8.3f}  std {spread:8.3f}")

# %%
near = student_at(0.1)
log_q, log_teacher = near.log_probs(), model.log_probs()
for name, k in ks.items():
    torch.testing.assert_close(
        estimate(name, log_q, log_teacher), k(log_q, log_teacher)
    )
negative = (near.log_probs().exp() * (log_q < log_teacher)).sum()
print(f"k1 is negative for {negative:.0%} of the samples, k3 never")

# %% [markdown]
# Near the teacher k2 and k3 are far quieter than k1, and of these two only k3
# is without bias. That is what the note shows. Far away k3 is the worst. Its
# variance has the term $\sum_y p_t^2 / p_s$, which explodes where the student
# gives little to what the teacher finds likely. Take the student that has
# *forgotten* one of two answers:

# %%
print("p_s(forgotten)  true KL   k1 mostly  k3 mostly   std k1   std k3")
for forgotten in (1e-1, 1e-3, 1e-6):
    q = torch.tensor([1 - forgotten, forgotten], dtype=torch.float64)
    t = torch.tensor([0.5, 0.5], dtype=torch.float64)
    true = (q * (q / t).log()).sum()
    row = []
    for name in ("k1", "k3"):
        k = ks[name](q.log(), t.log())
        std = (q * (k - true).square()).sum().sqrt()
        row.append((k[0].item(), std.item()))
    print(
        f"{forgotten:14g}  {true:7.3f}   {row[0][0]:9.3f}  {row[1][0]:9.3f}"
        f"  {row[0][1]:7.3f}  {row[1][1]:7.1f}"
    )

# %% [markdown]
# With a millionth left for the forgotten answer, k3 reads 0.193 about a
# million times, and then once half a million. Its mean is right, and no run is
# long enough to see it.
#
# ### Gradient: the trap
#
# ### Predict
#
# k1 is an unbiased estimate of reverse KL. What is the mean of its gradient?
# And k3's?

# %% [markdown]
# A sampled $y$ is a constant for autograd. But the distribution that it comes
# from moves with $\theta$:
#
# $$\nabla\, \mathbb{E}_{y \sim p_s}[k(y)]
#   = \mathbb{E}[\nabla k(y)] + \mathbb{E}[k(y)\, \nabla \log p_s(y)] .$$
#
# Back-propagation through samples gives the first term alone. With
# $\nabla r = -\nabla \log p_s$ and $\mathbb{E}[\nabla \log p_s] = 0$:
#
# $$\mathbb{E}[\nabla k_1] = \mathbb{E}[\nabla \log p_s] = 0,
# \qquad \mathbb{E}[\nabla k_2] = \mathbb{E}[-r\, \nabla \log p_s]
#   = \nabla\, \mathrm{KL}(p_s \| p_t),$$
#
# $$\mathbb{E}[\nabla k_3] = \mathbb{E}[(1 - e^r)\, \nabla \log p_s]
#   = -\sum_y p_t \nabla \log p_s = \nabla\, \mathrm{KL}(p_t \| p_s).$$
#
# The unbiased k1 teaches nothing. The biased k2 teaches the right thing. And
# k3, meant for reverse KL, teaches **forward** KL.

# %%
far = student_at(1.5)


def flat(tensors):
    return torch.cat([x.flatten() for x in tensors])


leaves = far.leaves()
loss = sequence_forward_kl(model, leaves).sum()
forward = flat(torch.autograd.grad(loss, leaves.tables))
reverse = flat(on_policy_gradient(model, far))
means = {
    name: flat(estimator_moments(k, model, far).gradient)
    for name, k in ks.items()
}
for name, mean in means.items():
    equal = [
        n
        for n, g in (("reverse KL", reverse), ("forward KL", forward))
        if torch.allclose(mean, g)
    ]
    print(f"{name}: length {mean.norm():.3f}, equal to", *equal or ["neither"])
torch.testing.assert_close(means["k1"], torch.zeros_like(reverse))
torch.testing.assert_close(means["k2"], reverse)
torch.testing.assert_close(means["k3"], forward)

# %% [markdown]
# kdlib keeps the two uses apart: `estimate` gives values without a gradient,
# `surrogate` gives losses. It refuses the two that teach something else:

# %%
from kdlib.errors import ArgumentError

for name in ("k1", "k3"):
    try:
        surrogate(name, log_q, log_teacher)
    except ArgumentError as error:
        print(str(error).split("\n")[0], "\n")

# %% [markdown]
# ### What the trap costs
#
# Back to `Germany and Spain` and the student of three independent words. We
# follow the *mean* gradient of each loss, as if there were endless samples.
# Where do they end?


# %%
def from_samples(k):
    """The mean over y ~ student of what autograd sees of k(y)."""
    return lambda log_q: (
        log_q.detach().exp() * k(log_q, log_p.expand_as(log_q))
    ).sum(-1)


for name in ("k2", "k3"):
    _, students = fit(from_samples(ks[name]))
    q = students[names.index("Portuguese")]  # starts at the likeliest answer
    near = {m: (q - best[m]).abs().sum().item() / 2 for m in best}
    closest = min(near, key=near.get)
    right = q[is_right].sum()
    print(
        f"{name}: right {right:.2f}, first words {openings(q):.1f}, "
        f"nearest to {closest} (distance {near[closest]:.2f})"
    )

# %% [markdown]
# The student that was to seek covers instead, and writes sentences that no
# language has. Its logged k3 is still a right estimate of reverse KL.

# %% [markdown]
# ## 8 · Choosing one
#
# Each line below is computed. Two cases, each with a hundred-thousandth: the
# student **missed** a token to which the teacher gives one half; the student
# **invented** one, to which it gives a half and the teacher next to nothing.
# The last columns are the fits of three independent words.

# %%
FAMILY = {
    "forward KL": (forward_kl, {}),
    "skew KL 0.1": (skew_kl, {}),
    "JSD 0.1": (generalized_jsd, {"beta": 0.1}),
    "JSD 0.5": (generalized_jsd, {"beta": 0.5}),
    "JSD 0.9": (generalized_jsd, {"beta": 0.9}),
    "kl_mix 0.5": (kl_mix, {"lam": 0.5}),
    "adaptive KL": (adaptive_kl, {}),
    "skew reverse": (skew_reverse_kl, {}),
    "reverse KL": (reverse_kl, {}),
    "TVD": (tvd, {}),
}
tiny = torch.tensor([1 - 1e-5, 1e-5], dtype=torch.float64).log()
even = torch.zeros(2, dtype=torch.float64)


def value_and_push(loss, params, student, target):
    leaf = student.clone().requires_grad_()
    value = loss(leaf, target, **params)
    push = -torch.autograd.grad(value, leaf)[0][1]
    return f"{value.item():6.2f} {push.item():8.4f}"


# %%
print(f"{'':13} {'missed':15} {'invented':15} right first words")
print(f"{'':13} {' value     push':15} {' value     push':15}")
for name, (loss, params) in FAMILY.items():
    missed = value_and_push(loss, params, tiny, even)
    invented = value_and_push(loss, params, even, tiny)
    values, students = fit(from_teacher(loss, **params), steps=1000)
    q = students[values.argmin()]
    right = q[is_right].sum()
    fitted = f"{right:5.2f} {openings(q):10.1f}"
    print(f"{name:13} {missed:15} {invented:15} {fitted}")

# %% [markdown]
# The reasons, read off the table:
#
# - **Start with forward KL.** It alone pulls in full on what the student
#   missed, so it works from scratch, and it keeps the most languages. It needs
#   no more than cross-entropy does.
# - **Reverse KL** pushes hardest on what the student invented, and hardly on
#   what it missed. Take it where one good answer is enough, and for a student
#   that can already talk. It is the one that the student's own samples can
#   estimate. First see whether a cooler forward student does as well.
# - **JSD at one half** seeks too, with pushes that stay small. In the trained
#   runs it kept more languages than reverse KL. Say which $\beta$, and choose
#   the learning rate with it.
# - **Skew KL** stays finite where the student gives a token nothing. It pays
#   with the pull on missed tokens.

# %% [markdown]
# - **kl_mix and adaptive KL** push in both cases, and have the large values of
#   both KLs.
# - **TVD** is a number to report. Its push dies where it is needed most.
#
# Whatever was minimised, report forward KL beside it: it compares with zero.
# And remember what all this is about: students that cannot match, or have not
# matched yet. Where a student can, all have the same goal.


# %% [markdown]
# ## Exercises
#
# They are in [`exercises/ch05.ipynb`](../exercises/ch05.ipynb), each with its
# own check, two hints and a solution. Do them before the quiz.

# %% [markdown]
# ## Quiz
#
# **1.** A paper reports a distillation cross-entropy of 0.6 nats a token;
# yours is 1.4 with another teacher. Is your student worse?
#
# <details><summary>Answer</summary>
#
# Nobody can say. The cross-entropy of a *perfect* student is its teacher's
# entropy. Yours may be 1.4 and your student perfect. Subtract the entropies,
# or report the KL.
#
# </details>

# %% [markdown]
# **2.** With $\beta = 0.95$ in a generalised JSD your loss is a tenth of what
# it was with forward KL, and training is slow. A colleague says: "So reverse
# KL does not work here." What do you answer?
#
# <details><summary>Answer</summary>
#
# It was no reverse KL. Near this end JSD is about
# $(1 - \beta)\,\mathrm{KL}(p_s \| p_t)$, a small share of it. So is its
# gradient. Set $\beta = 1$, use `kl_mix`, or divide by $\beta(1 - \beta)$.
#
# </details>

# %% [markdown]
# **3.** An on-policy trainer back-propagates k3 and logs it. The log falls
# nicely. Which divergence was minimised?
#
# <details><summary>Answer</summary>
#
# Forward KL: the mean gradient of k3 on the student's own samples is that of
# $\mathrm{KL}(p_t \| p_s)$. The log falls all the same, because both
# divergences have the same zero. Where the student is too small, it will cover
# where it was meant to seek.
#
# </details>

# %% [markdown]
# ## What breaks in practice
#
# - **The direction is swapped**, in code
#   ([aprender#2153](https://github.com/paiml/aprender/pull/2153)) and in
#   reviews of code that was right
#   ([trl#4935](https://github.com/huggingface/trl/pull/4935),
#   [twinkle#112](https://github.com/modelscope/twinkle/pull/112)).
# - **Probabilities for log-probabilities**
#   ([ProDA#20](https://github.com/microsoft/ProDA/issues/20),
#   [matchmaker#18](https://github.com/sebastian-hofstaetter/matchmaker/issues/18)).
# - **A mean over the vocabulary**
#   ([knowledge-distillation-pytorch#48](https://github.com/haitongli/knowledge-distillation-pytorch/issues/48),
#   [deit#61](https://github.com/facebookresearch/deit/issues/61)), or
#   `batchmean` over sequences, which grows with their length
#   ([transformers#1181](https://github.com/huggingface/transformers/issues/1181)).
# - **Infinity minus infinity** where a token is ruled out on both sides
#   ([heretic#348](https://github.com/p-e-w/heretic/pull/348)); a finite loss
#   with a gradient that is not
#   ([Soup#719](https://github.com/MakazhanAlpamys/Soup/issues/719)).

# %% [markdown]
# - **JSD's mixture with its weights swapped**, and its ends with it
#   ([trl#3043](https://github.com/huggingface/trl/pull/3043)); a mixture of
#   logarithms ([trl#2202](https://github.com/huggingface/trl/issues/2202)).
# - **Beta as a knob of direction**
#   ([ms-swift#10078](https://github.com/modelscope/ms-swift/issues/10078)), or
#   clamped a millionth away from its end, so that "reverse KL" is a loss of
#   about zero ([verl-recipe#151](https://github.com/verl-project/verl-recipe/issues/151)).
# - **k1 or k3 back-propagated**
#   ([open-instruct#534](https://github.com/allenai/open-instruct/issues/534),
#   [NeMo RL#2506](https://github.com/NVIDIA-NeMo/RL/pull/2506),
#   [OpenRLHF#1309](https://github.com/OpenRLHF/OpenRLHF/pull/1309),
#   [pytorch/rl#4038](https://github.com/pytorch/rl/pull/4038)).

# %% [markdown]
# ## Summary
#
# - Cross-entropy is KL plus the teacher's entropy. Same gradient; only the KL
#   is zero for a perfect student.
# - In the logits the forward gradient is $p_s - p_t$, the reverse one
#   $p_s\,(\log \frac{p_s}{p_t} - \mathrm{KL})$: no push where $p_s$ is
#   nothing.
# - A student that can match has one goal under all of them. One that cannot
#   covers under forward KL and seeks under reverse KL.
# - Before a sharper divergence, try the forward student at a lower sampling
#   temperature.
# - JSD's beta turns the gradient and shrinks it to nothing at both ends.
# - Report k1, or k3 near the teacher. Differentiate k2, the score function or
#   the whole sum.
#
# Next, chapter 6: response-based distillation, whole.
