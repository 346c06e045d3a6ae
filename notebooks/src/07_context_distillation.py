# %% [markdown]
# # 7 · Context distillation
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/notebooks/07_context_distillation.ipynb)
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
# 1. Move a context into a model's weights, a tag, or a few trained vectors.
# 2. Prove how much of a context no student can take in, and compute it.
# 3. Measure gain, floor and recovery, and say what each one means.
# 4. Say what training on $D$ instead of $D'$ does, and when it does harm.
# 5. Tell a mixture from a product of experts, and name the loss of each.
#
# Chapter 3 proved the floor in three lines. Here it is taken apart, met in a
# real teacher, and used.
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
import copy
import inspect
import json
import tempfile
from math import log
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from kdlib import claims, exact, localize, models, plots
from kdlib.errors import ModelError
from kdlib.evaluate import evaluate, teacher_reference
from kdlib.exact import ExactLM
from kdlib.objective import Objective
from kdlib.pairs import PairCollator, PairedExample
from kdlib.recovery import best_student, measure_recovery
from kdlib.sampling import complete
from kdlib.soft_prompt import SoftPrompt, load_soft_prompt, save_soft_prompt
from kdlib.teachers import LiveTeacher
from kdlib.train import TrainConfig, train

models.quiet_transformers()
plt.rcParams.update(plots.STYLE)
torch.set_num_threads(1)

# %% [markdown]
# ## 1 · The same request, with less and less said
#
# The shipped teacher turns English values into six languages, in two forms. A
# context tells it which. It can be an instruction, some worked examples, a
# tag, or nothing.

# %%
teacher, tokenizer = models.load("teacher")
data = localize.load_split("train")
contexts = {
    "instruction": localize.instruction("fr", "long"),
    "examples": localize.worked_examples(data[:8000:2000], "fr", "long"),
    "tag": localize.tag("fr", "long"),
    "nothing": "",
}
for name, context in contexts.items():
    tokens = len(tokenizer(context, add_special_tokens=False).input_ids)
    print(f"{name:12} {tokens:4} tokens")
print()
print(contexts["examples"])

# %% [markdown]
# ### Predict
#
# The teacher was trained on instructions and on worked examples, not on tags.
# What will it answer to each of the four?

# %%
collator = PairCollator(
    tokenizer, teacher_max_length=224, student_max_length=224
)
request = localize.load_split("test", kinds=["date"])[0]
print("request:", request.english)
print("wanted: ", request.rendering("fr", "long"))
for name, context in contexts.items():
    ids, _ = collator.teacher_side.prompt_ids(context, request.english, 32, 0)
    (answer,) = complete(teacher, tokenizer, [ids], max_new_tokens=32)
    print(f"{name:12} {tokenizer.decode(answer)}")

# %% [markdown]
# Every request pays for its context: it is read again each time, and each of
# its tokens stands in the cache (chapter 1). If it never changes, why read it
# again? **Context distillation** trains a student that reads less, to say what
# the teacher says after reading all.
#
# The idea is that of Askell et al. 2021 (arXiv:2112.00861) and Snell et al.
# 2022 (arXiv:2209.15189). Here teacher and student can be the same network.

# %% [markdown]
# ## 2 · The same objective
#
# $$\hat\theta = \arg\min_\theta \sum_{x' \in D'}
#   \mathrm{Loss}\big(\Pr^t(\cdot \mid c, z),\;
#   \Pr^s_\theta(\cdot \mid c', z),\; x'\big)$$
#
# Nothing in it is new. In chapter 1 the student was smaller and $c' = c$ would
# have done. Here the student may be the teacher itself, and $c'$ is shorter.
# What differs is the *input*, and so everything hangs on pairing inputs well.

# %%
pair = collator.encode(
    PairedExample(
        request.english,
        request.rendering("fr", "long"),
        context=contexts["instruction"],
        simplified_context="",
    ),
    0,
)
print("teacher reads", len(pair.teacher_prompt_ids), "tokens, then the answer")
print("student reads", len(pair.student_prompt_ids), "tokens, then the answer")
batch = collator.collate([pair])
for name in ("teacher", "student"):
    view = getattr(batch, name)
    first = view.completion_mask[0].nonzero()[0].item()
    print(f"{name}: the answer begins in column {first}")

# %% [markdown]
# The answer stands in different columns. `PairedBatch` compares the tokens of
# both sides row by row before it hands them out; a shift by one would give
# every token its neighbour's target. One objective call, by hand and from the
# library:

# %%
live = LiveTeacher(teacher)
with_c = live.targets(batch)
view = batch.student
with torch.no_grad():
    logits = view.select(teacher(view.input_ids, view.attention_mask).logits)
p, q = with_c.double().softmax(-1), logits.double().softmax(-1)
by_hand = (p * (p / q).log()).sum(-1).mean()
loss = Objective("forward_kl")(logits, with_c, batch.response_ids)
print(f"by hand {by_hand:.2f}, Objective {loss.total:.2f} nats a token")
assert abs(by_hand - loss.total) < 1e-3

# %% [markdown]
# That is the loss of the untrained student: the teacher that was robbed of its
# context. It has a name here, the **gain**: what there is to take in.
#
# ## 3 · What cannot be taken in
#
# If the context never changes, the student can learn it by heart. If it
# changes and $x'$ does not say how, no student can know it.
#
# ### By hand: two contexts, one word
#
# Asked for French the teacher says `mai` nine times in ten, and for German
# once in ten. Three requests in four are French. A blind student has one
# distribution for both.

# %%
prior = [0.75, 0.25]
p = [[0.9, 0.1], [0.1, 0.9]]  # mai, Mai
m = [0.75 * 0.9 + 0.25 * 0.1, 0.75 * 0.1 + 0.25 * 0.9]
print("mixture", [round(v, 3) for v in m])


def kl(p, q):
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True))


by_hand = 0.75 * kl(p[0], m) + 0.25 * kl(p[1], m)
print("loss of the mixture", round(by_hand, 4))
for q in ([0.9, 0.1], [0.5, 0.5], [0.8, 0.2]):
    other = 0.75 * kl(p[0], q) + 0.25 * kl(p[1], q)
    print("loss of", q, round(other, 4))
    assert other > by_hand

# %% [markdown]
# Vectorised, and from the library:

# %%
r = torch.tensor(prior, dtype=torch.float64)
table = torch.tensor(p, dtype=torch.float64)
mixture = r @ table
floor = r @ (table * (table / mixture).log()).sum(1)
one_word = ExactLM([table.log()[:, None]])
by_library, best = exact.context_floor(one_word, prior)
print(f"by hand {by_hand:.4f}, vectorised {floor:.4f}", end=", ")
print(f"kdlib {by_library:.4f}")
assert abs(floor - by_hand) < 1e-12 and abs(by_library - floor) < 1e-12

# %% [markdown]
# ### The proof
#
# Fix $x'$. Write $r_c = \Pr(c \mid x')$, $p_c = \Pr^t(\cdot \mid c, z)$ over
# whole answers, $m = \sum_c r_c\, p_c$, and let $q$ be any student.
#
# **1. Put $m$ between.** $\log \frac{p_c}{q} = \log \frac{p_c}{m} +
# \log \frac{m}{q}$, for every answer.
#
# **2. Average.** Over $c \sim r$ and $y \sim p_c$ together, $y$ has the
# distribution $m$. The second term does not contain $c$, so its mean is one
# over $m$:
#
# $$\sum_c r_c\, \mathrm{KL}(p_c \| q) =
#   \sum_c r_c\, \mathrm{KL}(p_c \| m) + \mathrm{KL}(m \| q).$$

# %% [markdown]
# **3. Gibbs.** $\mathrm{KL}(m \| q) \ge 0$, and it is zero only for $q = m$.
#
# **4. Name it.** $\sum_c r_c\, \mathrm{KL}(p_c \| m) = \sum_{c, y} r_c\,
# p_c(y) \log \frac{r_c\, p_c(y)}{r_c\, m(y)}$: the divergence of the joint
# distribution from the product of its marginals, $I(Y; C \mid X' = x')$.
#
# **5. Average over $x'$.** Students for different $x'$ do not touch each
# other, so each can be best:
#
# $$\min_q\, \mathbb E\, \mathrm{KL}\big(\Pr^t(\cdot \mid c, z) \,\|\,
#   q(\cdot \mid x')\big) = I(Y; C \mid X').$$
#
# Step 2 is an equality. So the loss of *every* student splits into a part that
# stays and a part that can go. All five steps, in a world that can be listed:

# %%
WORDS = ["le", "der", "3", "mai", "Mai", "5", "mars", "."]


def speaker(answers, noise=0.05):
    modes = [[WORDS.index(w) for w in text.split()] for text in answers]
    return ExactLM.from_modes(modes, list(answers.values()), noise=noise)


def side_by_side(*speakers):
    """One model; the contexts are numbered 0, 1, ..."""
    tables = zip(*(s.tables for s in speakers), strict=True)
    return ExactLM([torch.cat(group) for group in tables])


FRENCH, GERMAN = 0, 1
world = side_by_side(
    speaker({"le 3 mai .": 0.6, "3 5 . .": 0.4}),
    speaker({"der 3 . Mai": 0.6, "3 5 . .": 0.4}),
)
print(len(exact.sequences(8, 4)), "answers for each context")

# %% [markdown]
# Both languages can also write the date in numbers, `3 5`. That answer does
# not betray the language.

# %%
log_p = world.log_probs()
log_m = (r.log()[:, None] + log_p).logsumexp(0)
student = ExactLM.random(vocab=8, length=4, contexts=1, seed=3)
log_q = student.log_probs()[0]


def mean_kl(log_q):
    return r @ (log_p.exp() * (log_p - log_q)).sum(1)


left = mean_kl(log_m)
to_go = (log_m.exp() * (log_m - log_q)).sum()
joint = r[:, None] * log_p.exp()
apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
information = (joint * (joint / apart).log()).sum()
print(f"loss {mean_kl(log_q):.4f} = stays {left:.4f} + can go {to_go:.4f}")
print(f"I(Y; C) {information:.4f}")
assert abs(mean_kl(log_q) - left - to_go) < 1e-10
assert abs(left - information) < 1e-10
assert abs(exact.context_floor(world, prior)[0] - left) < 1e-10

# %% [markdown]
# ### Three bounds for free
#
# $I(Y; C \mid X') \le H(C \mid X')$: the answer cannot tell more about the
# context than there is to tell. So:
#
# - one context: the floor is 0;
# - $K$ contexts for one $x'$: at most $\log K$ nats *an answer*, however long
#   the answer is;
# - an $x'$ that says more never has a higher floor. (If $x'_1$ can be computed
#   from $x'_2$, a student of $x'_2$ can copy any student of $x'_1$.)

# %%
four = ExactLM.random(vocab=8, length=3, contexts=4, scale=2.0, seed=1)
print("x' tells           floor   H(C | X')")
floors = []
for name, simplified, unknown in (
    ("nothing", [0, 0, 0, 0], log(4)),
    ("one of two groups", [0, 0, 1, 1], log(2)),
    ("all", [0, 1, 2, 3], 0.0),
):
    left, _ = exact.context_floor(four, simplified=simplified)
    floors.append(left.item())
    print(f"{name:18} {abs(left):6.3f}   {unknown:6.3f}")
    assert left <= unknown + 1e-10
assert floors == sorted(floors, reverse=True)

# %% [markdown]
# ### Predict
#
# The best student of the blind world has read nothing about the language. It
# has written `le`. What does it say next: still a mixture?
#
# ### Token by token
#
# The mixture is over whole answers. Its next-token distributions follow from
# Bayes' rule: contexts that explain the beginning well get more weight.
#
# $$q(y_i \mid x', y_{<i}) = \sum_c \Pr(c \mid x', y_{<i})\,
#   \Pr^t(y_i \mid c, z, y_{<i}), \quad
#   \Pr(c \mid x', y_{<i}) \propto r_c \Pr^t(y_{<i} \mid c, z).$$

# %%
written = torch.tensor([WORDS.index(w) for w in ("le", "3", "mai", ".")])
rows, prefix = [], 0
for table, token in zip(world.tables, written, strict=True):
    rows.append(table[:, prefix].log_softmax(-1))
    prefix = prefix * 8 + token.item()
by_token = torch.stack(rows, 1)  # [C, L, V]
weight = r.clone()
for i, token in enumerate(written):
    print(f"before {WORDS[token]:4}", end=" ")
    print(f"French {weight[FRENCH]:.3f}, German {weight[GERMAN]:.3f}")
    weight = weight * by_token[:, i, token].exp()
    weight = weight / weight.sum()

# %% [markdown]
# One word, and the student knows what it was never told, because it has said
# it itself. The doubt is paid for in the first token, and the rest is free.
# The library's lines for it:

# %%
print(inspect.getsource(best_student).split('"""')[2])

# %% [markdown]
# Where does the floor fall, token by token? The chain rule of chapter 3 says
# that the parts add up.

# %%
total, mixture = exact.context_floor(world, prior)
both = ExactLM([t.expand(2, -1, -1) for t in mixture.tables])
by_place = exact.token_level(world, both, prefixes_from=world) @ r
print("floor by place", [round(v, 3) for v in by_place.tolist()])
print("sum           ", round(by_place.sum().item(), 3))
assert abs(by_place.sum() - total) < 1e-10
best = best_student(by_token, written, r.log())
hers = torch.stack(
    [
        mixture.tables[0][0, 0],
        mixture.tables[1][0, written[0]],
    ]
).log_softmax(-1)
torch.testing.assert_close(best[:2], hers, rtol=1e-10, atol=1e-10)

# %% [markdown]
# A floor per token therefore looks small when answers are long. A floor per
# *answer* is the number that $H(C \mid X')$ bounds.

# %% [markdown]
# ## 4 · Gain, floor, recovery
#
# $$\text{recovery} = 1 - \frac{\text{KL} - \text{floor}}
#   {\text{gain} - \text{floor}}$$
#
# - **gain**: the teacher without $c$ against itself with $c$. It is the loss
#   before training, if the student is the teacher.
# - **floor**: the best that any student of $x'$ can do.
# - **recovery**: 0 if nothing was taken in, 1 if all that can be. A student
#   can be worse than at the start; then it is negative.
#
# ### Predict
#
# For the shipped teacher, and $x' = z$. One instruction: what is the floor?
# Three instructions, for French, German and Spanish: which bound holds for an
# answer? Is the gain then larger than for one?

# %%
inputs = [d.english for d in localize.load_split("test")[:180:30]]
languages = ("fr", "de", "es")
three = [localize.instruction(language, "long") for language in languages]
measured = {
    "one instruction": measure_recovery(
        teacher, collator, inputs, three[:1], max_new_tokens=32
    ),
    "three instructions": measure_recovery(
        teacher, collator, inputs, three, max_new_tokens=32
    ),
}
for name, found in measured.items():
    print(f"{name:19} gain {found.gain.mean:.2f}", end=", ")
    print(f"floor {abs(found.floor.mean):.2f} nats a token")
assert abs(measured["one instruction"].floor.mean) < 1e-6
found = measured["three instructions"]
assert 0 < found.floor.mean < found.gain.mean

# %% [markdown]
# The gain does not ask how many contexts there are: each is missed by itself.
# The floor does. Half of what three instructions tell cannot be had from $z$
# alone, by any student of any size.
#
# This is measured on answers that the teacher wrote, so it carries an interval
# over the inputs. Six inputs are few:

# %%
figure, axes = plt.subplots(figsize=(6.5, 1.9))
for row, found in enumerate(measured.values()):
    for what, colour, dy in (("gain", plots.GREY, -0.12),
                             ("floor", plots.BLUE, 0.12)):  # fmt: skip
        value = getattr(found, what)
        bar = [[value.mean - value.low], [value.high - value.mean]]
        axes.errorbar(value.mean, row + dy, xerr=bar, fmt="o", color=colour,
                      capsize=3, label=what if row == 0 else None)  # fmt: skip
axes.set_yticks([0, 1], list(measured))
axes.set_ylim(1.5, -0.5)
axes.set_xlim(left=-0.01)
axes.set_xlabel("nats a token, with 95 % intervals over six inputs")
axes.legend(frameon=False, fontsize=9, loc="upper left",
            bbox_to_anchor=(0.08, 1.05))  # fmt: skip
plt.show()

# %% [markdown]
# ### As the context shrinks
#
# The student need not read all or nothing. Let it read the first words of its
# instruction: each word that is cut makes more instructions look alike, and
# what tells them apart becomes floor. **Predict:** which word matters most,
# the language or the form? At how many words does the floor begin?

# %%
from kdlib.explorers.context import context as shrinking

dates = localize.load_split("test", kinds=["date"])[:2]
shrinking(teacher, collator, [datum.english for datum in dates])

# %% [markdown]
# The floor steps up where a word disappears that told two instructions apart,
# and nowhere else. The teacher itself is a bad student of half an instruction:
# it was never trained on one, and its recovery can be negative.
#
# ### When the contexts are a sample
#
# Two things change if the contexts in hand are a few of very many, such as
# worked examples drawn anew for each request. With $K$ contexts the mixture
# knows each answer's own context too well: the floor comes out **too low**,
# and can never exceed $\log K$ an answer. Leave the own context out of the
# mixture and it comes out **too high** on average. The truth lies between
# (Poole et al. 2019, arXiv:1905.06922, section 2).
#
# In a world of 64 contexts the truth is known:

# %%
many = ExactLM.random(vocab=6, length=2, contexts=64, scale=1.5, seed=2)
log_many = many.log_probs()
truth, _ = exact.context_floor(many)


def low_and_high(chosen):
    log_p, k = log_many[chosen], len(chosen)
    low = log_p.logsumexp(0) - log(k)
    high = [
        log_p[torch.arange(k) != own].logsumexp(0) - log(k - 1)
        for own in range(k)
    ]
    below = (log_p.exp() * (log_p - low)).sum(1).mean()
    above = (log_p.exp() * (log_p - torch.stack(high))).sum(1).mean()
    return below, above


# %%
rng = torch.Generator().manual_seed(0)
print(f"truth {truth:.3f}")
for k in (2, 4, 16):
    sums = torch.zeros(2).double()
    for _ in range(200):
        drawn = torch.randperm(64, generator=rng)[:k]
        sums += torch.stack(low_and_high(drawn))
    low, high = sums / 200
    print(f"{k:2} of 64 contexts: floor {low:.3f}, floor_above {high:.3f}")
    assert low < truth < high

# %% [markdown]
# `measure_recovery` gives both, `floor` and `floor_above`. With all the
# contexts in hand, as for our three instructions, `floor` is the number.
#
# ### Worked examples as a context
#
# Four samples of worked examples, all French, long form. Each names the same
# task, so they should be interchangeable:

# %%
samples = [
    localize.worked_examples(data[i : i + 8000 : 2000], "fr", "long")
    for i in (0, 101, 202, 303)
]
shots = measure_recovery(
    teacher, collator, inputs[:3], samples, max_new_tokens=32
)
print(f"gain {shots.gain.mean:.2f}, floor {shots.floor.mean:.2f}", end=", ")
print(f"floor_above {shots.floor_above.mean:.2f}")
assert shots.floor.mean < shots.gain.mean / 4

# %% [markdown]
# What the samples have in common, the task, can be taken in. What is special
# to one sample is the floor, and nobody misses it.
#
# ## 5 · The other direction: a product of experts
#
# Take the reverse KL for the Loss, over the same contexts. Which $q$ is best
# now?
#
# $$\sum_c r_c\, \mathrm{KL}(q \| p_c) = \sum_y q(y) \log q(y)
#   - \sum_y q(y) \sum_c r_c \log p_c(y)$$
# $$= \sum_y q(y) \log \frac{q(y)}{\prod_c p_c(y)^{r_c}}
#   = \mathrm{KL}(q \| g) - \log Z,$$
# $$g(y) = \tfrac1Z \prod_c p_c(y)^{r_c}, \qquad
#   Z = \sum_y \prod_c p_c(y)^{r_c} .$$
#
# Three lines, and Gibbs again: $q = g$ is best, and $-\log Z$ stays. $g$ is
# the **product of experts** (the name is Hinton's, 2002, *Neural Computation*
# 14).

# %%
log_g = r @ log_p
log_z = log_g.logsumexp(0)
log_g = log_g - log_z
reverse_left, product = exact.reverse_context_floor(world, prior)


def mean_reverse(log_q):
    return r @ (log_q.exp() * (log_q - log_p)).sum(1)


to_go = (log_q.exp() * (log_q - log_g)).sum()
print(f"loss {mean_reverse(log_q):.3f} = {-log_z:.3f} + {to_go:.3f}")
assert abs(mean_reverse(log_q) - to_go + log_z) < 1e-10
assert abs(reverse_left + log_z) < 1e-10
torch.testing.assert_close(product.log_probs()[0], log_g)

# %% [markdown]
# ### Predict
#
# French has `le 3 mai` and `3 5`. German has `der 3 . Mai` and `3 5`. Let both
# be equally frequent. What does the mixture say most often, and what does the
# product?

# %%
_, mixture = exact.context_floor(world)
_, product = exact.reverse_context_floor(world)
shown = ["le 3 mai .", "der 3 . Mai", "3 5 . ."]
everything = exact.sequences(8, 4)
numbers = [
    (everything == torch.tensor([WORDS.index(w) for w in text.split()]))
    .all(1)
    .nonzero()[0]
    .item()
    for text in shown
]
columns = {
    "asked for French": log_p[FRENCH],
    "asked for German": log_p[GERMAN],
    "mixture": mixture.log_probs()[0],
    "product": product.log_probs()[0],
}
print(f"{'':17}", *[f"{text:>12}" for text in shown], "      others")
shares = {}
for name, log_share in columns.items():
    three_of = log_share[numbers].exp()
    shares[name] = [*three_of.tolist(), 1 - three_of.sum().item()]
    print(f"{name:17}", *[f"{value:12.2f}" for value in shares[name]])

# %%
figure, panels = plt.subplots(1, 4, figsize=(9, 2.6), sharey=True)
colours = [plots.GREY, plots.GREY, plots.BLUE, plots.ORANGE]
titles = [
    "teacher, context 1", "teacher, context 2",
    "forward KL:\nthe mixture", "reverse KL:\nthe product",
]  # fmt: skip
labels = ["le 3 mai", "der 3. Mai", "3 5", "others"]
for axes, share, colour, title in zip(
    panels, shares.values(), colours, titles, strict=True
):
    axes.barh(labels, share, color=colour)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1])
panels[0].invert_yaxis()
figure.supxlabel("probability of the answer", fontsize=10)
plt.show()

# %% [markdown]
# The mixture says everything that *some* context would say. The product says
# what *no* context rules out. A blind student of the reverse KL writes the
# date in numbers, and nobody is misunderstood.
#
# Which is better? The mixture is right about how often each answer is wanted.
# The product gives one answer that suits everybody, if there is one. If there
# is none, it has to take whatever all of them call least unlikely:

# %%
apart = side_by_side(
    speaker({"le 3 mai .": 1.0}), speaker({"der 3 . Mai": 1.0})
)
_, product = exact.reverse_context_floor(apart)
log_product = product.log_probs()[0]
values, likeliest = log_product.topk(8)
print(f"the product's eight likeliest answers, {values.exp().mean():.2f} each")
for text in sorted(
    " ".join(WORDS[i] for i in everything[number]) for number in likeliest
):
    print("  ", text)
sure = log_product[numbers[:2]].exp().sum().item()
print(f"the two answers that are right: {sure:.2f}")
assert sure < 0.5

# %% [markdown]
# `le 3 . Mai` begins in French and ends in German. Each word has one context
# that would write it in its place, so to the product all eight are equally
# good. Six of them are in no language.

# %% [markdown]
# ### Both, found by training
#
# The optima are not only formulas. Let a blind student descend on each loss:


# %%
def descend(loss_of, steps=300):
    shapes = [(1, 8**t, 8) for t in range(4)]
    tables = [torch.zeros(s, dtype=torch.float64) for s in shapes]
    tables = [t.requires_grad_() for t in tables]
    optimizer = torch.optim.Adam(tables, lr=0.1)
    for _ in range(steps):
        loss = loss_of(ExactLM(tables).log_probs()[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


for name, loss_of, floor_of in (
    ("forward", mean_kl, exact.context_floor),
    ("reverse", mean_reverse, exact.reverse_context_floor),
):
    least, found_least = floor_of(world, prior)[0].item(), descend(loss_of)
    print(f"{name} KL: floor {least:.2f}, descent ends at {found_least:.2f}")
    assert -1e-9 < found_least - least < 0.02

# %% [markdown]
# ## 6 · A few vectors for a context
#
# Between a tag and nothing there is a third way. Freeze the teacher. Put $n$
# vectors where the context's token embeddings would stand, and train those
# alone (Lester et al. 2021, arXiv:2104.08691; for contexts, Wingate et al.
# 2022, arXiv:2210.03162). The objective stays, and $\theta$ is now the
# vectors.
#
# ### Predict
#
# One vector for each of the context's tokens, started from their embeddings.
# What is its loss before training?

# %%
context = contexts["instruction"]
some = localize.load_split("validation")[::25]
pairs = [
    collator.encode(
        PairedExample(d.english, d.rendering("fr", "long"), context), number
    )
    for number, d in enumerate(some)
]
batches = [collator.collate(pairs)]
reference = teacher_reference(live, batches)
for n in (None, 4, 1):
    model = copy.deepcopy(teacher)
    soft = SoftPrompt.from_context(model, collator, context, n)
    score = evaluate(soft, batches, reference)
    print(f"{len(soft.vectors):3} vectors: KL {abs(score.kl):.2f}")
    assert n is not None or abs(score.kl) < 1e-5

# %% [markdown]
# Zero: to the network an embedding is an embedding, whoever made it. With
# fewer vectors it is a compression, and has to be trained.

# %%
torch.manual_seed(0)
soft = SoftPrompt.from_context(copy.deepcopy(teacher), collator, context, 4)
before = evaluate(soft, batches, reference).kl
config = TrainConfig(steps=15, batch_size=10, learning_rate=0.05)
train(soft, pairs, collator, Objective(), config, teacher=live)
after = evaluate(soft, batches, reference).kl
trained = sum(p.numel() for p in soft.parameters() if p.requires_grad)
print(trained, "numbers are trained")
print("KL fell below a quarter:", after < before / 4)

# %% [markdown]
# (On its own training inputs; the results below are on others.) The vectors
# are a file. They belong to this network and no other, and the file says so:

# %%
with tempfile.TemporaryDirectory() as folder:
    path = save_soft_prompt(soft, Path(folder) / "french.safetensors")
    print("smaller than 10 kB:", path.stat().st_size < 10_000)
    again = load_soft_prompt(copy.deepcopy(teacher), path)
    small = models.build(tokenizer, hidden_size=64, layers=1, heads=4)
    try:
        load_soft_prompt(small, path)
    except ModelError as error:
        print("another model:", type(error).__name__)
torch.testing.assert_close(again.vectors, soft.vectors)

# %% [markdown]
# ## 7 · $D$ for $D'$: the misconfiguration
#
# The data lie there as $D$: full inputs $(c, z)$ with answers. Someone trains
# the student on them as they are and serves it on $D'$, without $c$. The code
# runs. The loss falls.
#
# Chapter 3 saw the extreme case: the teacher, as a student of itself, has a
# loss of zero on $D$ before the first step. Its gradient is zero as well.
# Nothing is trained, and nothing is taken in:

# %%
student = copy.deepcopy(teacher).requires_grad_(True)
both_full = collator.collate(pairs[:8])
view = both_full.teacher
logits = view.select(student(view.input_ids, view.attention_mask).logits)
targets = live.targets(both_full)
on_d = Objective()(logits, targets, both_full.response_ids).total
on_d.backward()
steepest = max(p.grad.abs().max().item() for p in student.parameters())
print("loss on D below 1e-5:", abs(on_d.item()) < 1e-5)
print("largest slope below 1e-4:", steepest < 1e-4)
on_dp = evaluate(student, [both_full], [targets]).kl
print(f"loss on D' {on_dp:.1f}")

# %% [markdown]
# So that the loss has something to fall, take away the teacher's last layer
# and train the rest for 64 steps. Two tasks, and both ways for each:
#
# - **one context**: always the French instruction, $c'$ is empty;
# - **three contexts**: three instructions, $c'$ is the tag of each, such as
#   `fr long`. Nothing is lost: the floor is 0.
#
# ### Predict
#
# Trained on $D$, served on $D'$. In which task does the student answer more
# of its inputs exactly? Think of what it *needs* $c$ for, in training.

# %%
folder = Path(kdlib.__file__).parents[1] / "notebooks" / "results"
found = json.loads((folder / "context_distillation.json").read_text())
cut = ["cut, one context", "cut, three contexts"]
print(f"{'':28}{'loss':>8}{'exact match':>22}")
print(f"{'':28}{'last':>8}{'on D':>11}{'on D' + chr(39):>11}")
for task in cut:
    for way in ("D", "D'"):
        name = f"{task}, on {way}"
        row = found["rows"][name]
        runs = [run for run in found["runs"] if run["row"] == name]
        last = sum(sum(run["loss"][-10:]) / 10 for run in runs) / len(runs)
        on_d, on_dp = row["exact_on_D"]["mean"], row["exact"]["mean"]
        print(f"{name:28}{last:8.3f}{on_d:11.2f}{on_dp:11.2f}")

# %%
figure, axes = plt.subplots(figsize=(6, 2.6))
for task, colour in zip(cut, (plots.GREY, plots.ORANGE), strict=True):
    runs = [r for r in found["runs"] if r["row"] == f"{task}, on D"]
    losses = torch.tensor([run["loss"] for run in runs]).mean(0)
    axes.plot(losses, color=colour, label=task.removeprefix("cut, "))
axes.set(xlabel="step", ylabel="nats a token")
axes.set_title("Trained on D: the loss falls", loc="left")
axes.legend(frameon=False, fontsize=9)
plt.show()

# %%
figure, axes = plt.subplots(figsize=(6, 2.8))
for i, task in enumerate(cut):
    for way, colour, dx in (("D", plots.GREY, -0.2), ("D'", plots.BLUE, 0.2)):
        value = found["rows"][f"{task}, on {way}"]["exact"]
        bar = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
        label = f"trained on {way}" if i == 0 else None
        look = {"color": colour, "capsize": 3, "label": label}
        axes.bar(i + dx, value["mean"], 0.36, yerr=bar, **look)
axes.set_xticks([0, 1], [task.removeprefix("cut, ") for task in cut])
axes.set(ylim=(0, 1.15), yticks=[0, 0.5, 1], ylabel="answered exactly")
axes.set_title("Served on D'", loc="left")
axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
plt.show()

# %% [markdown]
# The difference between the two ways, over five paired seeds:

# %%
for name in ("context-on-d-prime", "context-on-d-prime-tags"):
    print(claims.find(name), end="\n\n")

# %% [markdown]
# **Three contexts**: as the textbook says. The loss on $D$ falls, and on $D$
# the answers are as good as those of the other student. On $D'$ they are not.
# In training the instruction decided the language, so the student learned to
# read instructions. No input ever had a tag. What a tag means was never
# trained.
#
# **One context**: on $D'$ the student answers half of the inputs, though it
# was never trained without its instruction. Training on $D'$ wins far less
# here. If you predicted a low number, look at what the loss could see.

# %% [markdown]
# ### Why one context is forgiving
#
# A context that never changes carries no information. The student needs no
# part of it to fit $D$: it can answer in French because it was told, or
# because it always does. On $D$ these two have the same loss. Chapter 3's
# student of logits had the same freedom: training on $D$ fixed the *sum* of
# two parts and left open how it was shared out.
#
# So what remains on $D'$ is an accident of the start and the optimiser. That
# makes it the worse trap of the two: it half works. The rule does not depend
# on luck. Train on the inputs that will be served, and measure there.
#
# Two honest words on how this came about. The task with three contexts was
# added after a first try, with one seed, had shown that one context is
# forgiving. And that a constant context carries no information is an
# argument; no experiment here takes it apart.

# %% [markdown]
# ## 8 · How much was taken in
#
# Every student here begins as the teacher itself and is trained for 32 steps
# of 8 answers, over five seeds. `hard labels` reads the same answers, as many
# tokens, and minimises their cross-entropy. The untrained student is the
# teacher without its context. All are measured on inputs that none was
# trained on.

# %%
rows = [
    "instruction to nothing", "hard labels, equal tokens",
    "soft prompt, 4 vectors",
    "mixed to nothing", "mixed to a tag",
]  # fmt: skip
print(f"{'':28}{'KL':>7}{'exact':>7}{'gain':>7}{'floor':>7}{'recovery':>10}")
start = found["fixed"]["instruction to nothing"]
for name in ("teacher, with its context", "teacher, without"):
    kl_of, exact_of = start[name]["kl"], start[name]["exact"]
    print(f"{name:28}{abs(kl_of):7.3f}{exact_of:7.2f}")
for name in rows:
    row, limit = found["rows"][name], found["limits"][name]
    numbers = [row["kl"]["mean"], row["exact"]["mean"], limit["gain"]]
    kl_of, exact_of, gain = numbers
    recovery = row["recovery"]["mean"]
    print(f"{name:28}{kl_of:7.3f}{exact_of:7.2f}{gain:7.3f}", end="")
    print(f"{limit['floor']:7.3f}{recovery:10.2f}")

# %% [markdown]
# Look at `mixed to nothing`. Its KL fell by less than a third, and its exact
# match is the lowest of all. But more than half of that KL is the floor, which
# no training removes. Of what *can* be taken in it has taken in a good part,
# and is still on its way. Its exact match cannot go far: told no language, it
# is right by chance, or where the languages share an answer.

# %%
figure, axes = plt.subplots(figsize=(7, 3))
for place, name in enumerate(rows):
    limit, value = found["limits"][name], found["rows"][name]["kl"]
    axes.barh(place, limit["gain"], color="#dddddd", height=0.62)
    axes.barh(place, limit["floor"], color=plots.BLUE, height=0.62)
    axes.plot(value["mean"], place, "o", color=plots.ORANGE, markersize=8)
axes.set_yticks(range(len(rows)), rows)
axes.invert_yaxis()
axes.plot([], [], "s", color="#dddddd", markersize=9, label="gain")
axes.plot([], [], "s", color=plots.BLUE, markersize=9, label="floor")
axes.plot([], [], "o", color=plots.ORANGE, label="student")
axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower center",
            bbox_to_anchor=(0.4, 1.0))  # fmt: skip
axes.set_xlabel("KL from the teacher with its context, nats a token")
plt.show()

# %% [markdown]
# What the seeds show, with 95 % intervals:

# %%
for name, claim in claims.load().items():
    if name.startswith("context-") and "d-prime" not in name:
        print(claim, end="\n\n")

# %% [markdown]
# Read them with the table.
#
# - One line of instruction moves into the weights within 32 small steps.
# - Four vectors, 640 numbers in all, hold it even better after as many steps,
#   each with its own learning rate. They leave the rest of the network alone.
# - A tag in place of three instructions removes the floor. That is the price
#   list of $c'$: a few tokens a request against a floor.
# - No difference from hard labels is shown. With its context this teacher
#   answers every test input exactly: it is in little doubt that could be
#   handed on.

# %% [markdown]
# ### SmolLM2-135M-Instruct
#
# Is it like that for a model that learned from the web? One run distilled an
# instruction ("You are a pirate ...") into SmolLM2-135M-Instruct, on 40
# questions. One instruction: the floor is 0, and recovery needs only two
# numbers. (One seed, and the responses were greedy: no interval.)

# %%
pirate = json.loads((folder / "smollm2_context.json").read_text())
gain = pirate["rows"]["student as it begins"]["kl"]
for name in ("hard labels, equal tokens", "distilled"):
    value = pirate["rows"][name]["kl"]
    print(f"{name:27} KL {value:.3f}, recovery {1 - value / gain:5.2f}")

# %% [markdown]
# In this run the KL did not fall on hard labels, and fell to a seventh with
# the distributions. SmolLM2 has more than one way to say a thing, so there is
# more in them than in one answer. One seed shows no more than that it can be
# so.

# %% [markdown]
# ### A floor that is not zero
#
# The same model under one of *three* instructions: a pirate, a poet, a lawyer.
# The student reads the question and cannot know which. Gain and floor need no
# student, so a CPU can measure them (20 questions, one drawn answer to each
# under each instruction; the intervals are over the questions). How much of
# the gain is out of reach for any student?

# %%
from kdlib.ledger import Interval

three = json.loads((folder / "smollm2_limits.json").read_text())
limits = {name: Interval(**value) for name, value in three["limits"].items()}
for name in ("gain", "floor"):
    print(f"{name:6} {limits[name]} nats a token")
share = limits["floor"].mean / limits["gain"].mean
print(f"out of reach: about {share:.0%} of the gain")
print(f"floor without the answer's own instruction: {limits['floor_above']}")

# %% [markdown]
# Little is out of reach, although no student can know who speaks. One
# explanation: the first words of an answer betray its speaker, and the student
# reads them. The last line shows the estimator's bias. If the three stood for
# many instructions, the first floor would be too low and the last too high;
# for these three the first is exact, but for the answers that were drawn.
#
# `smollm2_floor.py` also trains students to be held against this floor. That
# takes a GPU's minutes, and no such run is committed yet.

# %% [markdown]
# ## Exercises
#
# They are in [`exercises/ch07.ipynb`](../exercises/ch07.ipynb), each with its
# own check, two hints and a solution. Do them before the quiz.

# %% [markdown]
# ## Quiz
#
# **1.** Twelve instructions, all equally frequent, and $x' = z$. A student's
# loss stands at 2.6 nats an answer. Is it the floor?
#
# <details><summary>Answer</summary>
#
# No. $I(Y; C \mid X') \le H(C \mid X') = \log 12 \approx 2.48$. At least 0.1
# nats can still go. How much more, the floor itself says.
#
# </details>

# %% [markdown]
# **2.** A student of three contexts has a recovery of 0.98 and an exact match
# of 0.3. Your manager wants it trained for longer. What do you say?
#
# <details><summary>Answer</summary>
#
# It has taken in what $x'$ allows. More steps cannot tell it what the user
# wants. A tag can: it removes the floor for a few tokens a request.
#
# </details>

# %% [markdown]
# **3.** The loss on held-out data is near zero, the exact match in service is
# low. What do you look at first?
#
# <details><summary>Answer</summary>
#
# Which inputs the loss was computed on. If the held-out data are full inputs
# $(c, z)$ and the service sends $(c', z)$, the loss says nothing about it.
# Decode one batch of training inputs and one request, and compare them.
#
# </details>

# %% [markdown]
# ## What breaks in practice
#
# - **The context is cut.** A teacher's prompt that is limited to the
#   *student's* length loses its beginning, system prompt and question first
#   ([trl#5862](https://github.com/huggingface/trl/issues/5862),
#   [trl#5883](https://github.com/huggingface/trl/issues/5883)).
#   `measure_recovery` refuses a context that must be cut.
# - **Another loss than the paper's.** Prefixes of the student with the forward
#   KL of each token
#   ([Self-Distillation#5](https://github.com/idanshen/Self-Distillation/issues/5)).
# - **No floor in sight.** None of the libraries that this course looked at
#   computes it. A plateau is then taken for a learning rate.

# %% [markdown]
# ## Summary
#
# - Context distillation is the course's objective with $c' \ne c$. Teacher and
#   student may be one network.
# - $\min_q \mathbb E\, \mathrm{KL} = I(Y; C \mid X')$. The mixture reaches it.
#   It is 0 if one context is all there is, and at most $\log K$ an answer.
# - Gain is what there is to take in, recovery the share of it that was.
#   Neither a KL nor an exact match says it alone.
# - Under reverse KL the best blind student is the product of experts: what no
#   context rules out.
# - Train on the inputs that will be served, $D'$, and measure there.
#
# $$\hat\theta = \arg\min_\theta \sum_{x' \in D'}
#   \mathrm{Loss}\big(\Pr^t(\cdot \mid c, z),\;
#   \Pr^s_\theta(\cdot \mid c', z),\; x'\big)$$
#
# Next, chapter 8: the data $D'$.
