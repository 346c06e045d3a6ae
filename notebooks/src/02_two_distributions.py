# %% [markdown]
# # 2 · Two distributions
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/notebooks/02_two_distributions.ipynb)
#
# | what it costs | |
# |---|---|
# | two CPU cores | 1 minute |
# | GPU | not needed |
# | memory | 2.5 GiB |
# | network, account, key | none |

# %% [markdown]
# ## What you will be able to do
#
# 1. Hold the teacher's and the student's distribution for one token, and say
#    what is equal on both sides.
# 2. Tell which part of a logit is no part of the distribution.
# 3. Predict what a temperature changes, and what it leaves.
# 4. Measure dark knowledge, and say which student learns it.
# 5. Keep padded columns and foreign tokenizers out of a loss.
# 6. Predict the error of a half-precision format before you meet it.
#
# Chapters 0 and 1 used these two distributions. Here we look at them.
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
import textwrap
from math import exp, log

import matplotlib.pyplot as plt
import torch
from kdlib import localize, models, phone, plots
from kdlib.divergences import forward_kl, tempered_log_softmax
from kdlib.errors import ModelError
from kdlib.ledger import Interval
from kdlib.pairs import PairedExample
from kdlib.prompts import check_same_tokenizer
from kdlib.teachers import LiveTeacher
from kdlib.views import View

models.quiet_transformers()
plt.rcParams.update(plots.STYLE)
# Models this small are fastest with one thread.
torch.set_num_threads(1)

# %% [markdown]
# ## 1 · Two distributions for one token
#
# The formula of this course compares two things:
#
# $$\hat\theta = \arg\min_\theta \sum_{x' \in D'}
#   \mathrm{Loss}\big(\Pr^t(\cdot \mid c, z),\;
#   \Pr^s_\theta(\cdot \mid c', z),\; x'\big).$$
#
# Let us hold them. The case is that of chapter 0: the teacher reads an
# instruction $c$ and an English string $z$, the student reads $z$ alone.

# %%
data = phone.Data()
tokenizer, teacher = data.tokenizer, data.teacher.eval()
student = models.build(tokenizer, **phone.STUDENT, seed=0).eval()
read = tokenizer.decode

split = localize.load_split("test")
NUMBER = [datum.english for datum in split].index("Spanish (Portugal)")
pair = data.test[NUMBER]
print("teacher reads ", read(pair.teacher_prompt_ids))
print("student reads ", read(pair.student_prompt_ids))
print("both predict  ", read(pair.response_ids))

# %% [markdown]
# The student here is untrained. We will meet a trained one below.
#
# ### Predict
#
# The answer in French is *espagnol (Portugal)*. Before you run on:
#
# 1. How sure is the teacher of the answer's first token?
# 2. What is its second choice?
# 3. And what if it does not read $c$?
#
# ### What is equal on both sides, and what is not
#
# A language model puts out one row of numbers for every place of its input:
# as many as the vocabulary has tokens. These are the **logits**. The row at
# place $t$ speaks of the token at place $t + 1$.


# %%
@torch.no_grad()
def logits_of(model, view):
    return model(view.input_ids, view.attention_mask.long()).logits


batch = data.collator.collate([pair])
whole = {
    "teacher": logits_of(teacher, batch.teacher),
    "student": logits_of(student, batch.student),
}
for side, logits in whole.items():
    print(side, list(logits.shape))

# %% [markdown]
# The inputs differ, so the numbers of places differ: 25 and 16. Where is the
# row that predicts the first answer token? At the *last place of the prompt*,
# which is another place on each side. By hand:

# %%
n = len(pair.response_ids)
by_hand = {}
for side, prompt in (
    ("teacher", pair.teacher_prompt_ids),
    ("student", pair.student_prompt_ids),
):
    first = len(prompt) - 1
    by_hand[side] = whole[side][0, first : first + n]
    print(f"{side}: rows {first} to {first + n - 1} predict {n} tokens")

# %% [markdown]
# `View.select` does this for a whole batch, at `View.positions`. These are the
# only place in `kdlib` where the shift by one is made:

# %%
for part, lines in ((View.positions.func, 2), (View.select, 1)):
    for line in inspect.getsource(part).splitlines()[-lines:]:
        print(line.strip())

rows = {
    "teacher": batch.teacher.select(whole["teacher"]),
    "student": batch.student.select(whole["student"]),
}
for side in rows:
    assert torch.equal(rows[side], by_hand[side])
    print(side, list(rows[side].shape))

# %% [markdown]
# Now both sides have $N = 8$ rows, one for each answer token, end included.
# Row $i$ of the teacher and row $i$ of the student are about the *same token*
# after the *same answer so far*. The prompts before it are all that differs:
#
# $$\Pr^t(\cdot \mid c, z, y_{<i}) \qquad \Pr^s_\theta(\cdot \mid c', z,
#   y_{<i}).$$

# %%
print(f"{'token':12}{'teacher':>8}{'student':>9}")
teacher_p = rows["teacher"].softmax(-1)
student_p = rows["student"].softmax(-1)
for i, token in enumerate(batch.response_ids):
    values = teacher_p[i, token].item(), student_p[i, token].item()
    print(f"{read([token])!r:12}{values[0]:8.3f}{values[1]:9.4f}")

# %% [markdown]
# The teacher is sure of nearly every token. The untrained student gives each
# about one in a thousand, for there are 1,024 tokens. Only at the first token
# does the teacher hesitate. Look closer there, and give it a rival: the same
# teacher *without* its instruction.

# %%
untold = batch.student.select(logits_of(teacher, batch.student))
first = {
    "teacher, reads c and z": rows["teacher"][0].double(),
    "teacher, reads z": untold[0].double(),
    "student, untrained": rows["student"][0].double(),
}
for name, z in list(first.items())[:2]:
    p, ids = z.softmax(-1).topk(4)
    found = (f"{read([i])!r} {v:.3f}" for v, i in zip(p, ids, strict=True))
    print(f"{name:24}", ", ".join(found))

# %% [markdown]
# What are these tokens? The corpus knows the answer in all six languages:

# %%
firsts = {}
for locale, language in localize.LOCALES.items():
    answer = split[NUMBER].rendering(locale, phone.FORM)
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    firsts.setdefault(ids[0], []).append(language)
    print(f"{language:11}{answer:24}{[read([i]) for i in ids[:3]]}")

# %% [markdown]
# So the second choice, *s*, is how the answer begins in Italian, and *his* how
# it begins in Polish. The teacher was told French; it wrote *es*, but it has
# not forgotten what it would say to the others. Without $c$ it cannot know,
# and spreads its probability over the languages.

# %%
figure, axes = plt.subplots(figsize=(6.5, 2.6))
left = [0.0] * len(first)
colours = [plots.BLUE, plots.ORANGE, plots.GREY, "black"]
order = [tokenizer.get_vocab()[name] for name in ("es", "s", "his", "S")]
for token, colour in zip(order, colours, strict=True):
    share = [z.softmax(-1)[token].item() for z in first.values()]
    label = f"{read([token])!r} {', '.join(firsts[token])}"
    axes.barh(list(first), share, left=left, color=colour, label=label)
    left = [a + b for a, b in zip(left, share, strict=True)]
axes.invert_yaxis()
axes.set_xlim(0, 1)
axes.set_xlabel("probability of the first token")
figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# This is what a loss gets to see: two rows of 1,024 numbers. The rest of this
# chapter asks what can be read from such a row, and what cannot.
#
# ## 2 · From logits to probabilities
#
# The **softmax** makes a distribution of a row of logits $z$:
#
# $$p_v = \frac{e^{z_v}}{\sum_u e^{z_u}}.$$
#
# By hand, for three tokens:

# %%
z = [2.0, 1.0, -1.0]
weights = [exp(value) for value in z]
p = [weight / sum(weights) for weight in weights]
print("e^z    ", [round(weight, 3) for weight in weights])
print("softmax", [round(value, 4) for value in p])

# %% [markdown]
# Vectorised, and from the library, which gives logarithms:

# %%
z = torch.tensor(z, dtype=torch.float64)
vectorised = z.exp() / z.exp().sum()
library = tempered_log_softmax(z, 1.0).exp()
print([round(value, 4) for value in vectorised.tolist()])
print([round(value, 4) for value in library.tolist()])
torch.testing.assert_close(vectorised, library)
assert abs(library[0].item() - p[0]) < 1e-12

# %% [markdown]
# ### Two rows of logits, one distribution
#
# Add the same $c$ to all logits of a row:
#
# $$\frac{e^{z_v + c}}{\sum_u e^{z_u + c}}
#   = \frac{e^c\, e^{z_v}}{e^c \sum_u e^{z_u}} = p_v .$$
#
# Nothing changes. A logit of 12 is neither large nor small: only differences
# of logits count. With the **log-sum-exp** $\mathrm{lse}(z) = \log \sum_u
# e^{z_u}$,
#
# $$\log p_v = z_v - \mathrm{lse}(z).$$

# %%
moved = z + 5
print("same softmax ", torch.allclose(z.softmax(0), moved.softmax(0)))
print("squared difference of the logits", ((z - moved) ** 2).mean().item())
print("forward KL", abs(round(forward_kl(moved, z).item(), 9)))
log_p = z - z.logsumexp(0)
torch.testing.assert_close(log_p, z.softmax(0).log())

# %% [markdown]
# Real models do differ in this. The level of a row is its log-sum-exp, and
# nothing in training fixes it:

# %%
for name, row in first.items():
    print(f"{name:24} lse {row.logsumexp(0):5.1f}  max {row.max():5.1f}")

# %% [markdown]
# A loss that compares logits directly would pay for the gap between 13.5 and
# 7.4, and the student would spend its training on a number that no answer
# depends on. So a loss must not see the constant. There is a test for that. If
# $L(z + c\mathbf{1}) = L(z)$ for every $c$, differentiate by $c$:
#
# $$\sum_v \frac{\partial L}{\partial z_v} = 0 .$$

# %%
target = first["teacher, reads c and z"]
sums = {}
for name, loss in (
    ("forward KL", lambda s: forward_kl(s, target)),
    ("squared difference of logits", lambda s: ((s - target) ** 2).mean()),
):
    s = first["student, untrained"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(s), s)
    sums[name] = slope.sum().item()
    print(f"{name:30} sum of the gradient, in size: {abs(sums[name]):.2f}")
assert abs(sums["forward KL"]) < 1e-12

# %% [markdown]
# (Logits may be compared after the mean of each row is taken away. Chapter 6
# meets that loss again, as a limit.)
#
# ## 3 · Temperature
#
# A **temperature** $T$ divides the logits before the softmax:
#
# $$p_v(T) = \frac{e^{z_v / T}}{\sum_u e^{z_u / T}} .$$
#
# The odds of two tokens are $p_u / p_v = e^{(z_u - z_v)/T}$. So $T = 2$ takes
# the square root of all odds, $T = 3$ the cube root. By hand:

# %%
T = 2.0
weights = [exp(value / T) for value in (2.0, 1.0, -1.0)]
by_hand = [weight / sum(weights) for weight in weights]
print("T = 1 ", [round(value, 4) for value in p])
print("T = 2 ", [round(value, 4) for value in by_hand])
odds = p[0] / p[1], by_hand[0] / by_hand[1]
print(f"odds of the first two: {odds[0]:.3f}, {odds[1]:.3f}")
assert abs(odds[0] ** 0.5 - odds[1]) < 1e-12

vectorised = (z / T).softmax(0)
library = tempered_log_softmax(z, T).exp()
torch.testing.assert_close(vectorised, library)
assert abs(library[0].item() - by_hand[0]) < 1e-12
print([round(value, 4) for value in library.tolist()])

# %% [markdown]
# ### Predict
#
# At $T = 1$ the teacher gives *es* 0.91, *s* 0.05 and *his* 0.01. What are the
# three at $T = 4$? And all other tokens together?

# %%
tokens = sorted(firsts, key=lambda i: -target[i])
names = [read([i]) for i in tokens]
print("  T  ", *(f"{name!r:>7}" for name in names), "   others")
for T in (0.5, 1, 2, 4, 8):
    p = tempered_log_softmax(target, T).exp()
    shown = "".join(f"{p[i]:8.4f}" for i in tokens)
    print(f"{T:5}", shown, f"{1 - p[tokens].sum():9.3f}")
alone = tempered_log_softmax(target[tokens], 4).exp()
print("T = 4, if there were these four only:", f"{alone[0]:.2f} for 'es'")

# %% [markdown]
# At $T = 4$ the four tokens with a meaning have less than 5 % left. The other
# 1,020 are each unlikely, but there are many of them. If the four were all
# that there is, $T = 4$ would be mild. A temperature is no property of a
# method: it must be chosen anew for every vocabulary and every teacher.
#
# ### What stays
#
# Dividing by a positive number keeps the order. The favourite stays, and so
# does every rank.

# %%
order = target.argsort()
for T in (0.1, 0.5, 2, 8, 100):
    assert torch.equal(tempered_log_softmax(target, T).argsort(), order)
print("the same order at every temperature")

# %% [markdown]
# So greedy decoding does not notice a temperature. A loss does. (Sampling
# does, too: there it is called the sampling temperature, and it is another
# knob with the same formula. This course keeps the two names apart.)
#
# ### Cold: $T \to 0$
#
# All odds against the favourite go to infinity. What remains is the argmax,
# the hard label. Where two tokens tie, they share.

# %%
tie = torch.tensor([2.0, 2.0, 1.0])
for T in (1.0, 0.3, 0.1):
    p = tempered_log_softmax(tie, T).exp()
    sure = tempered_log_softmax(target, T).exp().max().item()
    print(f"T = {T}  {[round(v, 4) for v in p.tolist()]}  teacher {sure:.6f}")

# %% [markdown]
# ### Hot: $T \to \infty$
#
# The other end is uniform, and how it gets there is worth a derivation. Write
# $\bar z$ for the plain mean of the logits and $\mathrm{Var}\, z$ for their
# plain variance. For small $x$, $\log \tfrac1V \sum_u e^{x_u} = \bar x +
# \tfrac12 \mathrm{Var}\, x + \dots$ With $x = z / T$:
#
# $$\log p_v(T) = -\log V + \frac{z_v - \bar z}{T}
#   - \frac{\mathrm{Var}\, z}{2\,T^2} + O(T^{-3}).$$
#
# The first-order part is the logit without its mean. The error after it,
# multiplied by $T^2$, must approach $-\tfrac12 \mathrm{Var}\, z$:

# %%
V = len(target)
wanted = -target.var(correction=0).item() / 2
print(f"-Var/2     {wanted:.3f}")
for T in (10.0, 100.0, 1000.0, 10000.0):
    first_order = -log(V) + (target - target.mean()) / T
    error = tempered_log_softmax(target, T) - first_order
    print(f"T = {T:<7g}{T**2 * error.mean().item():.3f}")
assert abs(1e8 * error.mean().item() - wanted) < 0.01

# %% [markdown]
# So at a high temperature a loss compares centred logits, all tokens alike.
# Chapter 6 follows that to its end, and finds what $T^2$ is for.
#
# ### The way from one end to the other
#
# The curves are of one place. Below them you can turn the temperature
# yourself, there and at three other places. Predict first: which of the ten
# likeliest tokens still gain at $T = 4$? And at which of the four places does
# the entropy rise first?


# %%
temperatures = torch.logspace(-0.6, 2, 120)
paths = torch.stack([tempered_log_softmax(target, T) for T in temperatures])
figure, axes = plt.subplots(figsize=(6.5, 3.4))
median = target.argsort()[V // 2].item()
looks = [("-", plots.BLUE), ("-", plots.ORANGE), ("--", plots.ORANGE)]
looks += [("--", plots.BLUE), (":", "black")]
labels = [f"{name!r}" for name in names] + ["the median token"]
for token, label, (line, colour) in zip(
    [*tokens, median], labels, looks, strict=True
):
    p = paths[:, token].exp()
    axes.plot(temperatures, p, line, color=colour, label=label)
axes.axhline(1 / V, color=plots.GREY, linewidth=0.8)
axes.text(0.26, 1.3 / V, "1 / V", color=plots.GREY)
axes.set(xscale="log", yscale="log", ylim=(1e-8, 2))
axes.set_xlabel("temperature (log scale)")
axes.set_ylabel("probability (log scale)")
axes.set_title("Some tokens gain first and lose later", loc="left")
axes.legend(frameon=False, fontsize=9)
plt.show()

# %%
from kdlib.explorers.temperature import temperature

told = batch.teacher.select(whole["teacher"])
untold = batch.student.select(logits_of(teacher, batch.student))
temperature(
    tokenizer,
    {
        "with c, first token": told[0],
        "with c, second token": told[1],
        "without c, first token": untold[0],
        "without c, second token": untold[1],
    },
    at=2.0,
)

# %% [markdown]
# Exercise 2.3 asks which tokens gain at a given temperature. The answer is one
# short formula.
#
# ## 4 · Entropy
#
# How unsure is a distribution? Its **entropy** is the expected surprise,
#
# $$H(p) = -\sum_v p_v \log p_v ,$$
#
# in nats. It is 0 for a sure thing and $\log V$ for the uniform distribution.
# $e^H$ is the **effective number of tokens**: a uniform choice among $n$
# tokens has $e^H = n$. By hand:

# %%
p = [0.9, 0.05, 0.05]
surprise = [-log(value) for value in p]
by_hand = sum(a * b for a, b in zip(p, surprise, strict=True))
print("surprise", [round(value, 3) for value in surprise])
print(f"H = {by_hand:.4f} nats, effective number {exp(by_hand):.3f}")


# %%
def entropy(logits, temperature=1.0):
    log_p = tempered_log_softmax(logits, temperature)
    return -(log_p.exp() * log_p).sum(-1)


vectorised = entropy(torch.tensor(p, dtype=torch.float64).log())
assert abs(vectorised.item() - by_hand) < 1e-12
for name, row in first.items():
    h = entropy(row).item()
    print(f"{name:24} H = {h:.2f}, effective number {exp(h):.1f}")

# %% [markdown]
# Put $\log p_v = z_v / T - \log \sum_u e^{z_u/T}$ into the definition, and a
# second form appears, which needs no logarithm of a probability:
#
# $$H = \mathrm{lse}(z / T) - \frac{\mathrm{E}_p[z]}{T} .$$

# %%
for T in (0.5, 1.0, 3.0):
    p = tempered_log_softmax(target, T).exp()
    second_form = (target / T).logsumexp(0) - (p * target).sum() / T
    torch.testing.assert_close(second_form, entropy(target, T))
print("equal")

# %% [markdown]
# ### Predict
#
# The test split has 1,000 inputs and 10,590 answer tokens. What is the mean
# entropy over all of them,
#
# 1. of the teacher that reads $(c, z)$,
# 2. of the teacher that reads $z$,
# 3. of the untrained student?
#
# And at how many of the 10,590 is the told teacher's effective number above
# 1.5?


# %%
batches = data.batches(data.test)


def over_test(model, side):
    views = [getattr(batch, side) for batch in batches]
    found = [view.select(logits_of(model, view)) for view in views]
    return torch.cat(found).double()


everywhere = {
    "teacher, reads c and z": over_test(teacher, "teacher"),
    "teacher, reads z": over_test(teacher, "student"),
    "student, untrained": over_test(student, "student"),
}
unsure = {name: entropy(logits) for name, logits in everywhere.items()}
for name, h in unsure.items():
    many = int((h.exp() > 1.5).sum())
    print(f"{name:24} mean H {h.mean():.3f}, above 1.5 tokens: {many}")

starts = [0]
for example in data.test:
    starts.append(starts[-1] + len(example.response_ids))
for name, h in list(unsure.items())[:2]:
    print(f"{name:24} mean H of first tokens {h[starts[:-1]].mean():.3f}")

# %%
figure, axes = plt.subplots(figsize=(6.5, 3))
colours = [plots.BLUE, plots.BLUE, plots.ORANGE]
for (name, h), line, colour in zip(
    unsure.items(), ("-", "--", "-"), colours, strict=True
):
    share = torch.linspace(0, 1, len(h))
    ranked = h.exp().sort(descending=True).values
    axes.plot(share, ranked, line, color=colour, label=name)
axes.set_yscale("log")
axes.set_xlabel("share of the answer's tokens, most unsure first")
axes.set_ylabel("effective number (log scale)")
axes.set_title("The teacher is sure nearly everywhere", loc="left")
axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.6))
plt.show()

# %% [markdown]
# This teacher has hardly a doubt: one answer is right here, and it knows it.
# Without the instruction it is unsure at one token in six. An answer's first
# token is where it needs the instruction most; later the answer so far tells
# it a good deal.
#
# ### Entropy and temperature
#
# Entropy rises with the temperature. Here is the slope. Write $\beta = 1/T$
# and $A(\beta) = \mathrm{lse}(\beta z)$. Its derivatives are the mean and the
# variance of the logits under $p$:
#
# $$A' = \mathrm{E}_p[z], \qquad A'' = \mathrm{Var}_p(z).$$
#
# With the second form, $H = A - \beta A'$, so $dH/d\beta = -\beta A''$. And
# $d\beta / dT = -1/T^2$. Together:
#
# $$\frac{dH}{dT} = \frac{\mathrm{Var}_p(z)}{T^3} \;\ge\; 0 .$$
#
# A variance cannot be negative, so the way up is without a dip. Checked by
# autograd in float64, on ten of the teacher's rows:

# %%
rows = everywhere["teacher, reads c and z"][:10]
for value in (0.5, 1.0, 2.0, 5.0):
    T = torch.full((len(rows), 1), value, dtype=torch.float64)
    T.requires_grad_()
    log_p = (rows / T).log_softmax(-1)
    h = -(log_p.exp() * log_p).sum(-1)
    (slope,) = torch.autograd.grad(h.sum(), T)
    p = log_p.detach().exp()
    mean = (p * rows).sum(-1, keepdim=True)
    variance = (p * (rows - mean) ** 2).sum(-1)
    torch.testing.assert_close(slope[:, 0], variance / value**3)
print("dH/dT = Var_p(z) / T^3, at four temperatures")

# %%
figure, axes = plt.subplots(figsize=(6.5, 2.8))
some = everywhere["teacher, reads c and z"][::50]
mean = [entropy(some, T).mean() for T in temperatures]
axes.plot(temperatures, mean, color=plots.BLUE, label="teacher, mean")
axes.plot(
    temperatures,
    [entropy(target, T) for T in temperatures],
    "--",
    color=plots.BLUE,
    label="teacher, our example",
)
some = everywhere["student, untrained"][::50]
mean = [entropy(some, T).mean() for T in temperatures]
axes.plot(temperatures, mean, color=plots.ORANGE, label="untrained student")
axes.axhline(log(V), color=plots.GREY, linewidth=0.8)
axes.text(0.26, log(V) - 0.75, "log V", color=plots.GREY)
axes.set_xscale("log")
axes.set_xlabel("temperature (log scale)")
axes.set_ylabel("entropy, nats")
axes.set_title("From sure to clueless between T = 1 and T = 4", loc="left")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The steep part is where a temperature does something. Left of it the
# distribution is a hard label, right of it uniform noise. For this teacher the
# useful range ends before $T = 4$.
#
# ## 5 · Dark knowledge
#
# A classifier may give a picture of a BMW one chance in a billion of being a
# garbage truck, and still many more of that than of being a carrot. Hinton
# called this *dark knowledge* in a talk of that title
# ([slides](https://www.ttic.edu/dl/dark14.pdf), with Vinyals and Dean). Most
# of what a model has learned, he said, is in the relative probabilities of
# very improbable answers. Is that so here? Our teacher was trained on six
# languages. When told French, which wrong answers does it nearly write?
#
# ### Forks
#
# The French answer and the Italian one begin alike or not, and at some token
# they part. Call that place a **fork**. There the Italian token is wrong, but
# it is not nonsense. What probability does the teacher give it?


# %%
def ids_of(answer):
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def fork(ours, theirs):
    """(place, their token there), or None where the answers are equal."""
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return place, b


french, italian = ids_of("croate (Danemark)"), ids_of("croato (Danimarca)")
print("French ", [read([i]) for i in french])
print("Italian", [read([i]) for i in italian])
place, token = fork(french, italian)
print(f"they part at token {place}: {read([token])!r}")

# %%
told = tempered_log_softmax(everywhere["teacher, reads c and z"], 1.0)
forks = []
for number, (datum, example) in enumerate(zip(split, data.test, strict=True)):
    ours = example.response_ids
    for locale in ("de", "es", "it", "pl", "pt"):
        found = fork(ours, ids_of(datum.rendering(locale, phone.FORM)))
        if found:
            row, token = starts[number] + found[0], found[1]
            forks.append({
                "log_p": told[row, token].item(),
                "at": (row, token),
                "locale": locale,
                "datum": datum,
                "shown": f"{datum.english} → {read(ours[: found[0]])}",
            })  # fmt: skip
print(len(forks), "forks in", len(split), "inputs")

# %% [markdown]
# The strongest temptations, one line for each token:

# %%
same = {}
for f in sorted(forks, key=lambda f: -f["log_p"]):
    same.setdefault(f["at"], []).append(f)
seen = set()
for (_, token), found in same.items():
    if token not in seen and len(seen) < 10:
        seen.add(token)
        locales = ", ".join(f["locale"] for f in found)
        p = exp(found[0]["log_p"])
        print(f"{found[0]['shown']:34}{read([token])!r:10}{p:.3f}  {locales}")

# %% [markdown]
# These are near misses with a reason, sometimes with two. *s* begins
# *spagnolo*. *euro* is the plural in Italian and Polish; it is also the French
# singular, and chapter 0 showed that this teacher is unsure of French
# singulars. A probability does not say why it is there.
#
# ### Which locale is nearest to French?
#
# Probabilities of this size are best averaged in the logarithm, as a geometric
# mean. The interval is over the inputs.


# %%
def over_inputs(values):
    values = torch.tensor(values, dtype=torch.float64)
    reach = 1.96 * values.std().item() / len(values) ** 0.5
    mean = values.mean().item()
    return Interval(mean, mean - reach, mean + reach)


OTHERS = ("pl", "it", "pt", "es", "de")
for locale in OTHERS:
    mine = [f["log_p"] for f in forks if f["locale"] == locale]
    mean = over_inputs(mine)
    mass = sum(map(exp, mine)) / len(mine)
    print(
        f"{localize.LOCALES[locale]:11} log p {mean.mean:6.2f} "
        f"[{mean.low:.2f}, {mean.high:.2f}]  mean p {mass:.4f}"
    )

# %% [markdown]
# In the geometric mean Polish is nearest, and German farthest. Does Polish
# carry the most *mass*, too? Compare input by input where both have a fork:

# %%
by_input = {}
for f in forks:
    by_input.setdefault(f["datum"].english, {})[f["locale"]] = f["log_p"]
both = [f for f in by_input.values() if {"pl", "it"} <= f.keys()]
in_log = over_inputs([f["pl"] - f["it"] for f in both])
in_mass = over_inputs([1000 * (exp(f["pl"]) - exp(f["it"])) for f in both])
print("Polish minus Italian")
print("  log p        ", in_log.claim())
print("  p, per mille ", in_mass.claim())

# %% [markdown]
# In a typical case Polish is ahead by a factor of 1.4. In mass a difference is
# not shown: a few large cases rule it. Why Polish, of all languages? Look by
# kind:

# %%
kinds = ("language", "country", "list", "date", "unit", "money")
print(f"{'mean log p':11}", *(f"{kind:>9}" for kind in kinds))
for locale in OTHERS:
    mine = [f for f in forks if f["locale"] == locale]
    shown = []
    for kind in kinds:
        values = [f["log_p"] for f in mine if f["datum"].kind == kind]
        shown.append(f"{sum(values) / len(values):9.1f}")
    print(f"{localize.LOCALES[locale]:11}", *shown)

print()
euros = next(d for d in split if d.english == "4,665.32 euros")
for locale in ("fr", *OTHERS):
    print(f"{locale} {euros.rendering(locale, phone.FORM)}")

# %% [markdown]
# For money and units Polish leads: like French it writes *euro* without a
# capital and groups digits by a space. For names of languages all but German
# are alike; German writes them with a capital. The teacher's doubts follow
# habits of writing, and nobody labelled those.
#
# ### All six languages
#
# Now tell the teacher each language in turn, for the first 300 test inputs.
# Sketch a 6 by 6 table first: where will it be dark?


# %%
def nearly(told, others):
    """Mean log-probability of each other locale's token at its forks."""
    context = localize.instruction(told, phone.FORM)
    some = [d.rendering(told, phone.FORM) for d in split[:300]]
    pairs = [
        data.collator.encode(PairedExample(d.english, answer, context))
        for d, answer in zip(split, some, strict=False)
    ]
    rows = [LiveTeacher(teacher).targets(b) for b in data.batches(pairs, 100)]
    log_p = tempered_log_softmax(torch.cat(rows), 1.0)
    by_row = log_p.split([len(p.response_ids) for p in pairs])
    found = {locale: [] for locale in others}
    for d, p, row in zip(split, pairs, by_row, strict=False):
        for locale in others:
            ids = ids_of(d.rendering(locale, phone.FORM))
            if at := fork(p.response_ids, ids):
                found[locale].append(row[at].item())
    return {locale: over_inputs(values) for locale, values in found.items()}


# %%
order = ("de", "pl", "fr", "it", "es", "pt")
table, reach = torch.full((6, 6), float("nan")), 0.0
for i, told_locale in enumerate(order):
    others = [locale for locale in order if locale != told_locale]
    cells = nearly(told_locale, others)
    for locale, cell in cells.items():
        table[i, order.index(locale)] = cell.mean
        reach = max(reach, cell.high - cell.mean)
    first_two = sorted(others, key=lambda locale: -cells[locale].mean)[:2]
    names = [localize.LOCALES[x] for x in (told_locale, *first_two)]
    print(f"told {names[0]:11} nearest {names[1]}, then {names[2]}")
print(f"each mean is known to within {reach:.1f}")

# %%
figure, axes = plt.subplots(figsize=(6, 4.4))
image = axes.imshow(table, cmap="Blues", vmin=-11, vmax=-6.5)
languages = [localize.LOCALES[locale] for locale in order]
axes.set_xticks(range(6), languages, rotation=35, ha="right")
axes.set_yticks(range(6), languages)
for i in range(6):
    for j in range(6):
        if i != j:
            p = 10_000 * table[i, j].exp().item()
            dark = table[i, j] > -8.2
            colour = "white" if dark else "black"
            axes.text(j, i, f"{p:.1f}", ha="center", va="center", color=colour)
axes.set_xlabel("... nearly writes")
axes.set_ylabel("told to write ...")
figure.suptitle("What the teacher nearly writes, per 10,000", x=0.45)
axes.spines[:].set_visible(False)
bar = figure.colorbar(image, label="mean log-probability at forks")
plt.show()

# %% [markdown]
# In the cells: the geometric mean of the probability, in ten-thousandths. Dark
# means tempting. Spanish and Portuguese are nearest to each other, Italian is
# next to Spanish, and German stays apart from all. French and Polish are near,
# by way of prices: it is no family tree, it is how values are written. All of
# it lies in the small probabilities of one model (another seed's would differ)
# that answers 99 % of the French inputs right.
#
# How small is small? For comparison, a token of the vocabulary, whichever:

# %%
right = torch.cat([batch.response_ids for batch in batches])
off_label = 1 - told.gather(1, right[:, None]).exp()
mean = sum(f["log_p"] for f in forks) / len(forks)
tempting = sum(told[at].exp().item() for at in {f["at"] for f in forks})
print(f"geometric mean, any token     {exp(told.mean()):.0e}")
print(f"geometric mean, at the forks  {exp(mean):.0e}")
share = tempting / off_label.sum().item()
print(f"of all mass off the label, at the forks {share:.2f}")

# %% [markdown]
# So a token with a meaning is more than 100,000 times likelier than one from
# anywhere. Yet only a sixth of the probability off the label is at such
# forks. The rest is doubts about French, and noise: dark knowledge is not all
# that is dark.
#
# ### Who learns it?
#
# Take two students with the same 6,000 inputs and the same number of steps.
# One learns the teacher's **distributions** (kept as the eight likeliest
# tokens), the other the teacher's **answers** alone, as labels. No student
# ever reads another language than French.
#
# ### Predict
#
# Both answer about 90 % of the test inputs exactly. At the forks, will the
# first student nearly write Italian where the teacher does? And the second?
#
# `notebooks/experiments/dark_knowledge.py` has asked them, with the usual
# rivals beside them. What follows is rendered from its result file.

# %%
results = Path(kdlib.__file__).parents[1] / "notebooks" / "results"
found = json.loads((results / "dark_knowledge.json").read_text())
print(found["command"])
print(found["device"], "·", found["date"], "·", found["core_minutes"], "min")
print(found["seeds"], "paired seeds,", found["forks"], "forks")

# %% [markdown]
# For every fork there are two numbers: the teacher's log-probability of the
# wrong token and the student's. Their correlation over the forks tells whether
# the student's temptations are the teacher's.

# %%
print(f"{'correlation of temptations':28} mean [95 % interval]")
print(f"{phone.TEACHER:28} 1")
for row, values in found["measures"].items():
    print(f"{row:28} {Interval(**values['correlation'])}")
print()
print(f"{'exact match':28} mean [95 % interval]")
quickstart = json.loads((results / "quickstart_seeds.json").read_text())
print(f"{phone.TEACHER:28} {quickstart['teacher']['with context']:.3f}")
for row, values in found["measures"].items():
    print(f"{row:28} {Interval(**values['exact_match'])}")

# %%
answers = "teacher's answers"
print(f"distilled student minus {answers!r}")
for measure in ("correlation", "gap", "exact_match", "kl"):
    value = Interval(**found["distilled_minus"][answers][measure])
    print(f"  {measure:12} {value.claim()}")
gap = Interval(**found["distilled_minus"][answers]["gap"])
factors = (f"{exp(x):.0f}" for x in (gap.mean, gap.low, gap.high))
print("the gap as a factor: {} [{}, {}]".format(*factors))

# %% [markdown]
# (`gap` is the student's log-probability at the forks minus the teacher's, in
# nats; `kl` is the forward KL a token.) Read it slowly, for there are two
# results:
#
# - Trained on distributions, a student takes over *which* wrong tokens its
#   teacher finds tempting. Trained on the same teacher's answers it hardly
#   does, and it gives those tokens far less probability than the other.
# - No difference is shown in how many answers are right. Here dark knowledge
#   is transferred, and not needed.
#
# With three seeds the intervals are wide.

# %%
example = {"teacher": found["teacher"]["example"]}
for row in (phone.DISTILLED, answers, phone.UNTRAINED):
    seeds = [run["example"] for run in found["runs"] if run["row"] == row]
    example[row] = {
        token: sum(seed[token] for seed in seeds) / len(seeds)
        for token in seeds[0]
    }
figure, axes = plt.subplots(figsize=(6.5, 3))
looks = [(plots.BLUE, "s"), (plots.ORANGE, "o"), ("black", "v")]
looks.append((plots.GREY, "x"))
for (row, values), (colour, mark) in zip(example.items(), looks, strict=True):
    p = [exp(values[name]) for name in ("es", "s", "his", "S")]
    axes.plot(range(4), p, mark, color=colour, label=row, markersize=8)
labels = ["'es'\nfr, es, pt", "'s'\nit", "'his'\npl", "'S'\nde"]
axes.set_xticks(range(4), labels)
axes.set_xlim(-0.4, 3.4)
axes.set_yscale("log")
axes.set_ylabel("probability (log scale)")
axes.set_title("The first token for “Spanish (Portugal)”", loc="left")
figure.legend(loc="outside right upper", frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# One input, the geometric mean of three seeds. The distilled student was shown
# the teacher's doubts on *other* inputs, and has similar doubts here. The
# untrained one gives every token about as much.
#
# ## 6 · What a vocabulary does
#
# A column of logits is a token, by number. Nothing else says which. So a
# distribution over columns means something only together with its tokenizer.
#
# ### Columns without a token
#
# Heads are often larger than the vocabulary: the number of rows is rounded up
# so that it divides well. A tokenizer of the Qwen family has 151,646 tokens
# and its model 151,936 columns
# ([Qwen3#29](https://github.com/QwenLM/Qwen3/issues/29)). Larger models of the
# same family have 152,064 columns for the same tokens
# ([Qwen3#292](https://github.com/QwenLM/Qwen3/issues/292)). The columns behind
# the last token were never a label. What stands there?
#
# Our teacher has none. Let us give it 128, in two ways: rows of zeros, and
# random rows as a new head would have them.

# %%
print(len(tokenizer), "tokens,", teacher.config.vocab_size, "columns")
view = data.collator.collate(data.test[:200]).teacher
with torch.no_grad():
    states = teacher.model(
        view.input_ids, view.attention_mask.long()
    ).last_hidden_state
states = view.select(states)
real = teacher.lm_head(states).detach().double()
draw = torch.Generator().manual_seed(0)
scale = teacher.config.initializer_range
random_rows = scale * torch.randn(128, states.shape[1], generator=draw)
columns = {
    "zeros": torch.zeros(len(real), 128).double(),
    "random": (states @ random_rows.T).detach().double(),
}

# %% [markdown]
# ### Predict
#
# 128 of 1,152 columns are 11 %. What share of the *probability* do they take
# from the teacher, at $T = 1$ and at $T = 4$?


# %%
def stolen(real, extra, T=1.0):
    p = tempered_log_softmax(torch.cat([real, extra], -1), T).exp()
    return p[:, real.shape[-1] :].sum(-1).mean().item()


for name, extra in columns.items():
    shares = [stolen(real, extra, T) for T in (1.0, 2.0, 4.0)]
    print(f"{name:7} T = 1, 2, 4:", *(f"{share:9.5f}" for share in shares))

# %% [markdown]
# At $T = 1$ next to nothing: this teacher's logits are high, and zero is low.
# At $T = 4$ they have their share of the columns. But "high" was an accident.
# Section 2 said that a constant may be added to all real logits. Lower them
# all by 20, which changes no probability:

# %%
for level in (0, -10, -20, -30):
    share = stolen(real + level, columns["zeros"])
    k = 128 / (128 + (real + level).logsumexp(-1).exp())
    torch.testing.assert_close(k.mean().item(), share)
    print(f"real logits {level:+4}: the zeros take {share:.5f}")

# %% [markdown]
# The asserted formula is $k / (k + e^{\mathrm{lse}(z)})$ for $k$ columns of
# zeros. A padded zero is a bomb whose fuse is the level of the logits. It does
# not matter whether the model or the loss has put it there. Two *identical*
# models, one of them padded with zeros:

# %%
for level in (0, -10, -20):
    lowered = real + level
    padded = torch.cat([lowered, columns["zeros"]], -1)
    wide = torch.cat([lowered, columns["zeros"] - 100], -1)
    filled = forward_kl(padded, wide).mean().item()
    cut = forward_kl(lowered, padded).mean().item()
    print(f"level {level:+4}: padded {filled:.4f}, cut by kdlib {cut:.1f}")

# %% [markdown]
# `kdlib` never fills up a missing column. The divergences drop the columns
# that only one side has, *before* the softmax; then no untrained number can
# reach the loss. Columns that both sides have, though neither has a token for
# them, are for the caller to cut: the tokenizer knows how many tokens there
# are.
#
# ### Another tokenizer
#
# Equal sizes prove nothing. Here is a second tokenizer with 1,024 tokens,
# trained on other text. The same word, and the same number:

# %%
train = localize.load_split("train")
german = [datum.rendering("de", phone.FORM) for datum in train]
english = [datum.english for datum in train]
other = models.train_tokenizer(german + english, len(tokenizer))
print(len(other), "tokens")
for name, each in (("teacher's", tokenizer), ("other", other)):
    ids = each("espagnol", add_special_tokens=False)["input_ids"]
    print(f"{name:10} espagnol → {[each.decode([i]) for i in ids]}")
number = tokens[0]
print(f"column {number}: {read([number])!r} and {other.decode([number])!r}")

# %% [markdown]
# A loss between these two columns would be finite, would fall, and would mean
# nothing. `kdlib.pairs` compares the tokenizers' content and refuses:

# %%
try:
    check_same_tokenizer(tokenizer, other)
except ModelError as refused:
    for line in str(refused).splitlines():
        print(textwrap.fill(line.strip(), 76))

# %% [markdown]
# ### Tokens are not strings
#
# One more thing to know about columns. The word *croate* was `c`, `ro`, `ate`
# for the tokenizer. But `c`, `roat`, `e` spells the same word. So is the
# teacher's 0.03 for *roat* Italian, or the right French word on another path?
# The chain rule tells.


# %%
@torch.no_grad()
def log_prob(prompt, ids):
    """log Pr(ids | prompt): the sum of the tokens' log-probabilities."""
    z = teacher(torch.tensor([[*prompt, *ids]])).logits[0].double()
    log_p = tempered_log_softmax(z[len(prompt) - 1 : -1], 1.0)
    return log_p[range(len(ids)), ids].sum().item()


where = [d.english for d in split].index("Croatian (South Korea)")
prompt = data.test[where].teacher_prompt_ids
vocabulary = tokenizer.get_vocab()
for path in ("c ro ate", "c roat", "c roat e", "c roat o", "c roat a"):
    ids = [vocabulary[piece] for piece in path.split()]
    print(f"{path:9} {exp(log_prob(prompt, ids)):.4f}")

# %% [markdown]
# Little of it is the French word, and little the Italian or the Spanish one.
# After a token that it was never taught to write in French the teacher is
# lost. So a small probability tells what the teacher finds likely *next*, not
# which answer it has in mind.
#
# Token-level losses compare paths, one token at a time. The probability of a
# string is a sum over all its paths, and nobody computes it. So two models
# with different tokenizers have no common event to compare, token by token:
# that is why distillation between vocabularies needs other means.
#
# ## 7 · Numbers in a machine
#
# Everything so far held for real numbers. A float has few digits and a limited
# range:
#
# | format | digits after the leading bit | largest number | its logarithm |
# |---|---|---|---|
# | float32 | 23 bits | 3.4e38 | 88.7 |
# | bfloat16 | 7 bits | 3.4e38 | 88.7 |
# | float16 | 10 bits | 65,504 | 11.1 |
#
# ### Predict
#
# The largest logit of a row is about 19 in this teacher. Which of the three
# formats can compute its softmax as section 2 wrote it?

# %%
print(f"the largest logit of a row, on average: {real.amax(-1).mean():.0f}")
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    limit = torch.finfo(dtype)
    weights = real.to(dtype).exp()
    naive = weights / weights.sum(-1, keepdim=True)
    broken = naive.isnan().any(-1).double().mean().item()
    print(f"{dtype!s:15} log max {log(limit.max):5.1f}  NaN rows {broken:.2f}")

# %% [markdown]
# In float16 the exponential is infinite, and infinity by infinity is NaN. This
# is no exotic case: it is nearly every row of a real teacher.
#
# ### The log-sum-exp
#
# A shift changes no probability, so take away the largest logit $m$ first:
#
# $$\mathrm{lse}(z) = \log \sum_u e^{z_u}
#   = m + \log \sum_u e^{z_u - m}, \qquad m = \max_u z_u .$$
#
# Now every exponent is at most 0, and one of them is 0. Nothing can overflow,
# and the sum is at least 1. By hand, with logits that float64 itself cannot
# exponentiate:

# %%
z = [1000.0, 999.0, -500.0]
m = max(z)
inner = sum(exp(value - m) for value in z)
lse = m + log(inner)
print(f"lse = {m} + log({inner:.5f}) = {lse:.5f}")
print([round(value - lse, 4) for value in z])
library = tempered_log_softmax(torch.tensor(z).double(), 1.0)
torch.testing.assert_close(library, torch.tensor(z).double() - lse)

# %% [markdown]
# ### Never the logarithm of a softmax
#
# The third token has $\log p = -1500.3$. Its $p$ is too small for any format
# and is stored as 0, whose logarithm is $-\infty$. With float16 that happens
# soon: its smallest number above 0 is 6e-8.

# %%
half = real.to(torch.float16)
after = half.softmax(-1).log()
print(f"log(softmax): {after.isinf().double().mean():.2f} of all are -inf")
directly = half.log_softmax(-1)
print(f"log_softmax:  {directly.isinf().double().mean():.2f}")
worst = (directly.double() - tempered_log_softmax(real, 1.0)).abs().max()
print(f"its largest error is below 0.03: {worst.item() < 0.03}")

# %% [markdown]
# A KL with such a value in it is infinite, or NaN where the teacher's
# probability is 0 as well: $0 \cdot (-\infty)$.
#
# ### The order matters
#
# There are two ways to write the last step, equal on paper:
# $z - \mathrm{lse}(z)$, and $(z - m) - \log \sum e^{z - m}$. Two equal logits
# must give $\log \tfrac12 = -0.693$, whatever their level. In float32:

# %%
for level in (1.0, 1e4, 1e6, 1e8):
    z = torch.full((2,), level)
    first_way = (z - z.logsumexp(0))[0].item()
    second_way = tempered_log_softmax(z, 1.0)[0].item()
    print(f"level {level:<12,.0f} {first_way:9.6f} {second_way:9.6f}")

# %% [markdown]
# The log-sum-exp of two logits of a million is a million and 0.693, and
# float32 has no room for the 0.693. Taking the maximum away first is exact, so
# nothing is lost. MLX had the first form in its cross-entropy
# ([mlx#4188](https://github.com/ml-explore/mlx/pull/4188)). Here is the end of
# `kdlib`'s function, which every divergence begins with:

# %%
code = inspect.getsource(tempered_log_softmax).split("    z = ", 1)[1]
for line in ("    z = " + code).splitlines():
    if not line.strip().startswith("#"):
        print(line)

# %% [markdown]
# Read it aloud. Half precision becomes float32, float64 stays. The temperature
# divides. On a GPU torch's own function does the rest. On a CPU `kdlib` does
# it: the maximum goes first, and `torch.sum` adds in pairs. torch's
# log-softmax adds there one number after another, and 151,936 of them let the
# rounding grow. Five rows of a vocabulary of that size, against float64:

# %%
draw = torch.Generator().manual_seed(1)
z = 3 * torch.randn(5, 151_936, generator=draw)
truth = z.double() - z.double().logsumexp(-1, keepdim=True)
ours = (tempered_log_softmax(z, 1.0) - truth).abs().max().item()
print(f"kdlib in float32: largest error below 3e-6: {ours < 3e-6}")
torchs = (z.log_softmax(-1) - truth).abs().max().item()
plots.table(
    ["log-softmax of 151,936 logits, float32", "largest error, nats"],
    [["kdlib", f"{ours:.1e}"], ["torch", f"{torchs:.1e}"]],
)

# %% [markdown]
# ### What bfloat16 does to a logit
#
# Models are run in bfloat16, so their logits arrive with 7 bits after the
# leading one. Between 16 and 32 its numbers are $2^{4-7} = 0.125$ apart.
#
# ### Predict
#
# Round the teacher's logits to bfloat16. How large is the largest error of a
# logit between 16 and 32? By what factor can that change a probability? And
# the KL between the teacher and its rounded self: is it about 0.06, or far
# less?

# %%
all_real = everywhere["teacher, reads c and z"]
rounded = all_real.bfloat16().double()
error = rounded - all_real
high = error[all_real > 16]
print(f"largest error of a logit above 16  {high.abs().max():.4f}")
print(f"root mean square                   {high.pow(2).mean().sqrt():.4f}")
print(f"0.125 / sqrt(12)                   {0.125 / 12**0.5:.4f}")
print(f"a probability changes by up to     {exp(0.0625) - 1:.1%}")

# %% [markdown]
# An error anywhere within half a step, all alike, has the root mean square
# $0.125 / \sqrt{12}$. Now the KL. Rounding multiplies each weight by
# $e^{\varepsilon_v}$, so the rounded distribution is
# $q_v = p_v e^{\varepsilon_v} / \mathrm{E}_p[e^\varepsilon]$, and
#
# $$\mathrm{KL}(p \,\|\, q) = \log \mathrm{E}_p[e^\varepsilon]
#   - \mathrm{E}_p[\varepsilon] \approx \tfrac12
#   \mathrm{Var}_p(\varepsilon).$$
#
# It is of second order, and a *variance under $p$*: an error that all likely
# tokens share is a shift, and does not count.

# %%
p = tempered_log_softmax(all_real, 1.0).exp()
mean = (p * error).sum(-1, keepdim=True)
predicted = (p * (error - mean) ** 2).sum(-1) / 2
measured = forward_kl(rounded, all_real)
print(f"half the variance  {predicted.mean():.2e}")
print(f"KL                 {measured.mean():.2e}")
print(f"largest KL         {measured.max():.0e}")
exact = (p * error.exp()).sum(-1).log() - mean[:, 0]
torch.testing.assert_close(measured, exact, atol=1e-12, rtol=1e-6)

# %% [markdown]
# A millionth of a nat. So logits that *arrive* in bfloat16 do little harm,
# where the teacher is sure. Where it wavers between two tokens it is more, up
# to $\tfrac12 (0.0625)^2 = 0.002$ in the worst case.
#
# ### What bfloat16 does to a logarithm
#
# *Computing* in bfloat16 is another matter. A log-softmax of the same logits,
# with every result rounded:

# %%
z = all_real.bfloat16()
low = (z - z.logsumexp(-1, keepdim=True)).double()
exact = tempered_log_softmax(all_real, 1.0)
favourite = exact.argmax(-1, keepdim=True)
sure = (low.gather(1, favourite) == 0).double().mean().item()
print(f"favourites with log p = 0 exactly   {sure:.3f}")
for name, log_p in (("bfloat16", low), ("float64", exact)):
    mean = log_p.gather(1, favourite).mean().item()
    total = log_p.exp().sum(-1)
    span = f"{total.min():.2f} to {total.max():.2f}"
    print(f"{name:9} favourites {mean:.4f}, probabilities sum to {span}")

# %% [markdown]
# A thing of size 0.002 was computed as the difference of two numbers that are
# rounded to 0.125. The favourite's doubt is gone, and the probabilities no
# longer sum to 1.
#
# A student near the end of its training suffers most. Take one whose logits
# are the teacher's, two per cent too small. Its KL is tiny, and never
# negative:


# %%
def log_softmax_in_bfloat16(logits):
    z = logits.bfloat16()
    return (z - z.logsumexp(-1, keepdim=True)).double()


near = 0.98 * all_real
for name, log_softmax in (
    ("float64", lambda logits: tempered_log_softmax(logits, 1.0)),
    ("bfloat16", log_softmax_in_bfloat16),
):
    log_p, log_q = log_softmax(all_real), log_softmax(near)
    terms = log_p.exp() * (log_p - log_q)
    first = terms.gather(1, favourite)[:, 0]
    kl = terms.sum(-1)
    negative = (kl < 0).double().mean().item()
    print(f"{name:9} mean term of the favourite {first.mean():+.5f}")
    print(f"{'':9} mean of all others together {(kl - first).mean():+.5f}")
    print(f"{'':9} mean KL {kl.mean():+.6f}, below zero {negative:.2f}")

# %% [markdown]
# The true KL is a small difference between one positive term, the favourite's,
# and many negative ones. In bfloat16 most of the positive one was rounded
# away. What is left is several times larger than the truth, and below zero at
# nearly every token. A negative KL is a cheap alarm.
#
# So the rule of this course: logits may come in any format, and every
# divergence lifts them to float32 *before* the softmax. Then a divergence
# between equal logits is 0 exactly:

# %%
arrived = all_real[:1000].bfloat16()
same = forward_kl(arrived, arrived)
lifted = forward_kl(near[:1000].bfloat16(), arrived)
print(f"{same.dtype}, equal logits: {same.abs().max().item()}")
print(f"near logits, none below -1e-6: {lifted.min().item() > -1e-6}")

# %% [markdown]
# ## Exercises
#
# They are in [`exercises/ch02.ipynb`](../exercises/ch02.ipynb), each with its
# own check, two hints and a solution. Do them before the quiz.

# %% [markdown]
# ## Quiz
#
# **1.** A colleague compares the teacher's and the student's logits by their
# squared difference. The loss stays large, though both give the same answers
# with the same probabilities. What do you tell them?
#
# <details><summary>Answer</summary>
#
# Logits are fixed up to a constant at each position. The squared difference
# sees the constant and the distribution does not. Compare log-probabilities,
# or take the mean of each row away first.
#
# </details>

# %% [markdown]
# **2.** Someone raises the temperature from 1 to 4 "to bring out the dark
# knowledge". What could go wrong with a vocabulary of 150,000 tokens?
#
# <details><summary>Answer</summary>
#
# The tail has so many tokens that it may get nearly all of the probability.
# Then the target is close to uniform, and the tokens with a meaning have
# little of it. Look at the entropy of the targets before training: near
# $\log V$ there is nothing left but noise. The useful range depends on the
# vocabulary and the teacher.
#
# </details>

# %% [markdown]
# **3.** Teacher and student read different prompts of 25 and 16 tokens. Which
# rows of logits are compared, and how would you find out that somebody took
# those beside them?
#
# <details><summary>Answer</summary>
#
# The rows that predict the answer's tokens: from the prompt's last place to
# the last but one, on each side by itself. A row too late raises no error.
# Check token identity: the token after each chosen place must be the same
# answer token on both sides. And the teacher's probability of those tokens
# must be high where the teacher is good.
#
# </details>

# %% [markdown]
# ## What breaks in practice
#
# - **Rows beside the right ones.** A mask laid on unshifted logits
#   ([Soup#682](https://github.com/MakazhanAlpamys/Soup/issues/682)), or logits
#   shifted a second time
#   ([fmchisel#23](https://github.com/linkedin/fmchisel/pull/23)). Shift in one
#   place, and prove it by token identity.
# - **Sizes that differ.** Qwen2.5 with 0.5 billion parameters has 151,936
#   columns, with 7 billion 152,064, and losses crash
#   ([trl#6252](https://github.com/huggingface/trl/issues/6252)) or are given
#   workarounds
#   ([Model-Optimizer#2489](https://github.com/NVIDIA/Model-Optimizer/issues/2489)).
#   Drop columns before the softmax; filling up with zeros
#   ([DistillKit#37](https://github.com/arcee-ai/DistillKit/pull/37)) adds
#   tokens that do not exist.
# - **A temperature on one side.** TinyBERT's paper softens the student alone,
#   its code both
#   ([Pretrained-Language-Model#11](https://github.com/huawei-noah/Pretrained-Language-Model/issues/11)).
# - **log of softmax.** In half precision it underflows, and the gradient
#   overflows ([apex#379](https://github.com/NVIDIA/apex/issues/379)).
# - **The softmax over the wrong dimension.** It sums to 1, only not over the
#   tokens ([DPN#1](https://github.com/Lackel/DPN/issues/1)).

# %% [markdown]
# ## Summary
#
# - Both sides have one row of logits for each answer token. The tokens are
#   equal, the places and the prompts are not.
# - A distribution is logits up to a constant. A loss must not see the
#   constant.
# - A temperature divides logits: it takes a root of the odds, keeps every
#   rank, and raises the entropy without a dip. In a large vocabulary it soon
#   feeds the tail.
# - Dark knowledge is in the small probabilities: here, which languages write
#   values alike. A student of distributions learns it, a student of answers
#   hardly. Whether that helps is another question.
# - A column is a token of one tokenizer. What is no token is dropped before
#   the softmax.
# - Logits may arrive in half precision. Log-probabilities are computed in
#   float32 or more, with the maximum taken away first.
#
# Next, chapter 3: what is summed over $D'$, and why.
