# %% [markdown]
# # 4 · Cross-entropy for distillation
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/notebooks/04_cross_entropy.ipynb)
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
# 1. Write the soft cross-entropy, and tell a missing minus from a loss curve.
# 2. Derive its gradient and its curvature, and check both by machine.
# 3. Make three targets from one teacher: whole, favourite, sample.
# 4. Prove that a sampled label is unbiased, and compute its noise.
# 5. Say when a teacher's answers are as good as its distributions.
# 6. Choose between targets from measurements over several seeds.
#
# Chapter 3 chose what to minimise, over whole answers. Here we look at one
# token of it through a lens.
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
from math import exp, log

import matplotlib.pyplot as plt
import torch
from kdlib import exact, localize, models, phone, plots
from kdlib.divergences import cross_entropy, forward_kl
from kdlib.ledger import Interval, mean_interval

models.quiet_transformers()
plt.rcParams.update(plots.STYLE)
torch.set_num_threads(1)
data = phone.Data()
teacher = data.teacher

# %% [markdown]
# ## 1 · A teacher that is torn
#
# The shipped teacher knows six languages. Told "French", it is sure of nearly
# every token. Now take the instruction away and ask for the first token of an
# answer. Both sides read the same, $c = c' =$ nothing: ordinary distillation.


# %%
def first_token_logits(pairs, side="student"):
    """[N, V]: what the teacher says of each answer's first token."""
    batch = data.collator.collate(pairs)
    view = getattr(batch, side)
    with torch.no_grad():
        found = teacher(view.input_ids, view.attention_mask).logits
    first = batch.row_ids.diff(prepend=torch.tensor([-1])) > 0
    return view.select(found)[first].double()


unlabelled = localize.load_split("unlabelled")
NUMBER = next(
    n for n, d in enumerate(unlabelled) if d.english == "in 81 years"
)
pair = data.unlabelled[NUMBER]
assert pair.example_id == NUMBER
torn = first_token_logits([pair])[0]
told = first_token_logits([pair], side="teacher")[0]

# %%
for name, logits in {"without c": torn, "with c": told}.items():
    share, token = logits.softmax(-1).topk(6)
    print(unlabelled[NUMBER].english, "·", name)
    for p, t in zip(share.tolist(), token.tolist(), strict=True):
        print(f"    {data.tokenizer.decode([t])!r:8} {p:.2f}")

# %%
print(unlabelled[NUMBER].english)
for locale in localize.LOCALES:
    print(f"   {locale}  {unlabelled[NUMBER].rendering(locale, 'long')}")

# %% [markdown]
# Six languages, six first tokens, and the teacher gives each its share. No
# answer is wrong; it was not told which is wanted.
#
# ### Predict
#
# A student is to learn from this teacher. You may give it the six shares, or
# the likeliest token as a label, or one token that you draw. Which students
# end up where? We come back to this token all through the chapter.

# %% [markdown]
# ## 2 · The loss
#
# The **cross-entropy** of a student $q$ under a teacher $p$ is
#
# $$\mathrm{CE}(p, q) = - \sum_v p_v \log q_v .$$
#
# In words: draw a token from the teacher and ask how surprised the student
# is; then take the mean. Three tokens are enough, the ones of chapter 0:

# %%
p = [0.5, 0.4, 0.1]  # the teacher
q = [0.3, 0.3, 0.4]  # the student
surprise = [-log(b) for b in q]
print("surprise ", [round(s, 4) for s in surprise])
by_hand = sum(a * s for a, s in zip(p, surprise, strict=True))
print("mean     ", round(by_hand, 4))

# %% [markdown]
# Vectorised, and from the library. It takes logits, the student's first. A
# log-probability is a logit, too.

# %%
p = torch.tensor(p, dtype=torch.float64)
q = torch.tensor(q, dtype=torch.float64)
vectorised = -(p * q.log()).sum()
library = cross_entropy(q.log(), p.log())
print(round(vectorised.item(), 4), round(library.item(), 4))
assert abs(vectorised.item() - by_hand) < 1e-12
assert abs(library.item() - by_hand) < 1e-12

# %% [markdown]
# ### Where it begins
#
# An untrained student knows nothing. If it gives every token the same,
# $q_v = 1/V$, then the loss is $\sum_v p_v \log V = \log V$, *whatever the
# teacher says*. That number is worth knowing by heart for your vocabulary.

# %%
V = teacher.config.vocab_size
uniform = torch.zeros(V, dtype=torch.float64)
for name, target in {"torn": torn, "sure": told}.items():
    print(name, round(cross_entropy(uniform, target).item(), 4))
print("log V", round(log(V), 4))

# %% [markdown]
# A student with random weights is not quite uniform and starts somewhat
# above. Far above is a sign, for instance of logits that are too large:

# %%
from kdlib.evaluate import teacher_reference
from kdlib.teachers import LiveTeacher

test = data.batches(data.test[:250])
reference = teacher_reference(LiveTeacher(teacher), test)[0]
untrained = models.build(data.tokenizer, **phone.STUDENT, seed=0).eval()
view = test[0].student
with torch.no_grad():
    logits = view.select(untrained(view.input_ids, view.attention_mask).logits)
start = cross_entropy(logits, reference).mean()
large = cross_entropy(10 * logits, reference).mean()
print(f"log V {log(V):.1f}, untrained student {start:.1f}")
print(f"its logits times ten: above 20: {large > 20}")

# %% [markdown]
# ### Where it ends
#
# The loss is smallest at $q = p$ (section 4 proves it). There it is the
# teacher's **entropy**, $H(p) = -\sum_v p_v \log p_v$, and not zero. Walk from
# the student to the teacher and past it:

# %%
for step in (0.0, 0.5, 1.0, 1.1):
    between = (1 - step) * q + step * p
    loss = cross_entropy(between.log(), p.log()).item()
    print(f"{step:3}  {loss:.4f}")
floor = cross_entropy(p.log(), p.log()).item()
print("entropy", round(floor, 4))

# %% [markdown]
# Can a student reach zero? Only where the teacher is certain. So a loss of
# 1.9 may be a perfect student, and a loss of 0.1 a poor one. It depends on
# the teacher:

# %%
for name, target in {"torn": torn, "sure": told}.items():
    floor = cross_entropy(target, target).item()
    print(f"{name}: best loss {floor:.2f} nats, exp of it {exp(floor):.1f}")

# %% [markdown]
# The exponential of an entropy reads as a number of choices. The torn teacher
# hesitates between about six tokens, the sure one has hardly more than one.

# %% [markdown]
# ## 3 · The minus sign
#
# Open the textbook of this course's notation, Xiao and Zhu's *Foundations of
# Large Language Models* (arXiv:2501.09223), at chapter 3. Its loss over
# distributions and its loss on the teacher's answer $\hat y$ are printed as
#
# $$\sum_{y} \Pr^t(y \mid c, z) \log \Pr^s_\theta(y \mid c', z)
#   \qquad\text{and}\qquad
#   \log \Pr^s_\theta(\hat y \mid c', z),$$
#
# both without a minus, under an $\arg\min$. It is a slip of the pen; the
# book's text means the cross-entropy. What happens to a reader who copies it?
#
# ### Predict
#
# Three steps of gradient descent on the printed formula, step length 1. Does
# the loss fall? What becomes of the teacher's favourite?


# %%
def as_printed(z):
    return (p * z.log_softmax(-1)).sum()


def descend(loss_of, steps, z=None, rate=1.0):
    z = q.log() if z is None else z
    history = [z]
    for _ in range(steps):
        leaf = history[-1].clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss_of(leaf), leaf)
        history.append(history[-1] - rate * slope)
    return history


print("step   loss   the student's three probabilities")
for step, z in enumerate(descend(as_printed, 3)):
    shares = [f"{s:.3f}" for s in z.softmax(-1).tolist()]
    print(f"{step}    {as_printed(z):6.3f}  {'  '.join(shares)}")

# %% [markdown]
# The loss falls, so the curve looks like success. The teacher's favourite
# becomes *less* likely with every step, and what the teacher disfavours takes
# over. With the minus:


# %%
def soft(z):
    return cross_entropy(z, p.log())


print("step   loss   the student's three probabilities")
for step, z in enumerate(descend(soft, 3)):
    shares = [f"{s:.3f}" for s in z.softmax(-1).tolist()]
    print(f"{step}    {soft(z):6.3f}  {'  '.join(shares)}")
assert soft(descend(soft, 3)[-1]) < soft(q.log())

# %% [markdown]
# How would you notice without looking at answers? A cross-entropy is a mean
# of surprises, and a surprise $-\log q_v$ is never negative. **A negative
# cross-entropy is a sign error.** And the printed one has no floor: it goes on
# falling for ever.

# %%
far = as_printed(descend(as_printed, 2000)[-1]).item()
print("after 2,000 steps below -100:", far < -100)

# %% [markdown]
# The slip is made in code as well, for instance in a policy's distillation
# loss
# ([Imagination-Augmented-Agents#6](https://github.com/higgsfield/Imagination-Augmented-Agents/issues/6)).
# From here on every loss has its minus.

# %% [markdown]
# ## 4 · The gradient
#
# Write $z$ for the student's logits, so $q = \mathrm{softmax}(z)$. (The user's
# input, also called $z$, does not occur in this section.)
#
# **Step 1.** A log-probability is a logit minus one number for all:
# $\log q_v = z_v - \log \sum_w e^{z_w}$.
#
# **Step 2.** Its derivative has two parts:
#
# $$\frac{\partial \log q_v}{\partial z_u} = [u = v] - q_u .$$
#
# The first part comes from $z_v$. The second is the derivative of the log of
# the sum, $e^{z_u} / \sum_w e^{z_w}$.

# %%
z = q.log()
by_machine = torch.func.jacrev(lambda z: z.log_softmax(-1))(z)
by_formula = torch.eye(3, dtype=torch.float64) - q  # row v, column u
print([[round(x, 2) for x in row] for row in by_machine.tolist()])
torch.testing.assert_close(by_machine, by_formula)

# %% [markdown]
# **Step 3.** Put it into the loss:
#
# $$\frac{\partial \mathrm{CE}}{\partial z_u}
#   = -\sum_v p_v \big([u = v] - q_u\big)
#   = -p_u + q_u \sum_v p_v .$$
#
# **Step 4.** The teacher's probabilities sum to one. So
#
# $$\boxed{\;\frac{\partial \mathrm{CE}}{\partial z} = p^s - p^t\;}$$
#
# with $p^s = q$ and $p^t = p$. The student's logits are pushed by exactly what
# its distribution lacks or has too much of.

# %%
by_hand = [b - a for a, b in zip(p.tolist(), q.tolist(), strict=True)]
print("by hand    ", [round(g, 4) for g in by_hand])
leaf = z.clone().requires_grad_()
(autograd,) = torch.autograd.grad(cross_entropy(leaf, p.log()), leaf)
print("autograd   ", [round(g, 4) for g in autograd.tolist()])
torch.testing.assert_close(autograd, q - p)

# %% [markdown]
# Autograd knows the same calculus as we do, and could share our mistake about
# the *function*. **Finite differences** know no calculus: move one logit by
# $\pm h$ and look at the loss. The error is of order $h^2$, so float64 is
# needed.

# %%
h = 1e-5
differences = []
for u in range(3):
    step = torch.zeros(3, dtype=torch.float64)
    step[u] = h
    change = soft(z + step) - soft(z - step)
    differences.append(change.item() / (2 * h))
print("differences", [round(g, 4) for g in differences])
error = max(abs(a - b) for a, b in zip(differences, by_hand, strict=True))
print("error below 1e-9:", error < 1e-9)
assert error < 1e-9

# %% [markdown]
# And for the real, torn token with its 1,024 logits:

# %%
leaf = torch.linspace(-3, 3, V, dtype=torch.float64).requires_grad_()
(gradient,) = torch.autograd.grad(cross_entropy(leaf, torn), leaf)
torch.testing.assert_close(gradient, leaf.softmax(-1) - torn.softmax(-1))
total = gradient.sum().item()
print(f"sum of its {V} entries below 1e-12:", abs(total) < 1e-12)
print(f"largest entry {gradient.abs().max():.2f}")

# %% [markdown]
# Three things to read off.
#
# - The entries sum to zero: probability is moved, never made.
# - No entry is larger than 1 in size, whatever the logits. The loss can be
#   huge; its gradient by the logits cannot.
# - It is zero where the student equals the teacher. There the *loss* is
#   $H(p)$, so watch the gradient or the KL, not the loss, to see the end.
#
# ### Temperature, and a mean over tokens
#
# With both sides divided by $T$ the chain rule gives a factor $1/T$. A mean
# over $N$ tokens gives $1/N$. The objective may multiply by $T^2$ (chapter 6
# says why). Together: $T\,(p^s - p^t)/N$.

# %%
from kdlib.objective import Objective

T, N = 2.0, len(logits)
objective = Objective("cross_entropy", temperature=T)
leaf = logits.double().requires_grad_()
target = reference.double()
loss = objective(leaf, target, test[0].response_ids).total
(gradient,) = torch.autograd.grad(loss, leaf)
gap = (leaf / T).softmax(-1) - (target / T).softmax(-1)
torch.testing.assert_close(gradient, T * gap / N)
print(f"T (p_s - p_t) / N at {N:,} tokens")

# %% [markdown]
# ### The curvature
#
# Differentiate once more. The target $p$ is a constant in $p^s - p^t$, so it
# drops out:
#
# $$\frac{\partial^2 \mathrm{CE}}{\partial z\, \partial z^\top}
#   = \frac{\partial q}{\partial z^\top}
#   = \mathrm{diag}(q) - q q^\top .$$
#
# The curvature is the *same* for a whole distribution, for a label and for
# any mixture of them.

# %%
formula = q.diag() - q.outer(q)
label = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
for target in (p.log(), label.log()):
    found = torch.func.hessian(cross_entropy)(z, target)
    torch.testing.assert_close(found, formula)
    print([[round(x, 2) for x in row] for row in found.tolist()])

# %% [markdown]
# Is it convex? For any direction $a$,
#
# $$a^\top \big(\mathrm{diag}(q) - q q^\top\big)\, a
#   = \sum_v q_v a_v^2 - \Big(\sum_v q_v a_v\Big)^2
#   = \mathrm{Var}_{v \sim q}(a_v) \ge 0 .$$
#
# Yes, in the *logits*. So where the gradient is zero, at $q = p$, the loss is
# smallest, as section 2 said. (In a network's weights it is not convex, for
# the logits are no linear function of them.) The variance is zero for a
# constant $a$: adding a number to all logits changes nothing.

# %%
curvature = torch.linalg.eigvalsh(formula)
print("eigenvalues", [round(abs(x), 4) for x in curvature.tolist()])
a = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
variance = (q * a**2).sum() - (q * a).sum() ** 2
torch.testing.assert_close(a @ formula @ a, variance)
print("variance   ", round(variance.item(), 4))

# %% [markdown]
# ### The code, read aloud
#
# This is all that kdlib does, without its docstring:

# %%
lines = inspect.getsource(cross_entropy).splitlines()
end = max(i for i, line in enumerate(lines) if '"""' in line)
print("\n".join(lines[end + 1 :]))

# %% [markdown]
# - `_log_probs` is softmax and logarithm in one step, so that a probability
#   of $e^{-1000}$ has a finite logarithm.
# - `where(pt > 0, 0.0)` because a token that both sides rule out has
#   $p_v \log q_v = 0 \cdot (-\infty)$, which a computer calls NaN.
# - `.sum(-1)` over the vocabulary, and nothing else. A mean over the
#   vocabulary would shrink the loss by $V$.

# %%
ruled_out = torch.tensor([0.0, 1.0, -torch.inf])
print("naive  ", -(ruled_out.softmax(-1) * ruled_out.log_softmax(-1)).sum())
print("kdlib  ", round(cross_entropy(ruled_out, ruled_out).item(), 4))
two = ruled_out[:2]
assert cross_entropy(ruled_out, ruled_out) == cross_entropy(two, two)

# %% [markdown]
# ## 5 · Three targets from one teacher
#
# The gradient is $p^s$ minus a target. The teacher can write that target in
# three ways:
#
# | target | what it is | what it needs |
# |---|---|---|
# | **whole** | $p^t$ | the teacher's distribution |
# | **favourite** | one-hot at $\arg\max_v p^t_v$ | its greedy answer |
# | **sample** | one-hot at $y \sim p^t$ | one answer drawn from it |
#
# The last two are **hard targets that the teacher writes**. They are not the
# data's labels: nobody but the teacher said them.
#
# To be able to list all cases, keep the six likeliest tokens of our torn
# position and scale them up to one.

# %%
share, tokens = torn.softmax(-1).topk(6)
print(f"they hold {share.sum():.2f} of the teacher")
p = share / share.sum()
names = [data.tokenizer.decode([t]) for t in tokens.tolist()]
for name, value in zip(names, p.tolist(), strict=True):
    print(f"{name:5} {value:.3f}")
one_hot = torch.eye(6, dtype=torch.float64)
q = torch.full((6,), 1 / 6, dtype=torch.float64)  # a student that is even

# %% [markdown]
# Our student $q$ gives each language the same. That is nearly what the
# teacher does, so the right push is small.
#
# ### Predict
#
# Sketch the gradient $q - \text{target}$ for the three targets. Draw the
# sample ten times. What do the ten have in common with the first?

# %%
whole = q - p
favourite = q - one_hot[p.argmax()]
generator = torch.Generator().manual_seed(0)
drawn = torch.multinomial(p, 3, replacement=True, generator=generator)
print("token     ", "  ".join(f"{name:>5}" for name in names))
for name, gradient in {
    "whole": whole,
    "favourite": favourite,
    **{f"sample {i + 1}": q - one_hot[y] for i, y in enumerate(drawn)},
}.items():
    print(f"{name:10}", "  ".join(f"{g:5.2f}" for g in gradient.tolist()))

# %% [markdown]
# The whole target whispers corrections. A hard target shouts: "this one, and
# nothing else". Draw the three side by side. On the right every grey dot is
# one drawn label, every orange dot the mean of sixteen.


# %%
def cloud(n, draws):
    """[draws, 6]: mean gradients of n sampled labels each."""
    generator = torch.Generator().manual_seed(1)
    picked = torch.multinomial(
        p, draws * n, replacement=True, generator=generator
    )
    return q - one_hot[picked].view(draws, n, 6).mean(1)


# %%
figure, axes = plt.subplots(1, 3, figsize=(8, 3.6), sharey=True)
place = torch.arange(6.0)
axes[0].bar(place, whole, color=plots.BLUE)
axes[1].bar(place, favourite, color=plots.BLUE)
for n, colour, shift in ((1, plots.GREY, -0.2), (16, plots.ORANGE, 0.2)):
    spots = place + shift + 0.12 * torch.linspace(-1, 1, 60)[:, None]
    dots = {"color": colour, "markersize": 3, "linestyle": "none"}
    lines = axes[2].plot(spots, cloud(n, 60), marker=".", **dots)
    lines[0].set_label("one draw" if n == 1 else f"mean of {n} draws")
ends = place - 0.4, place + 0.4
axes[2].hlines(whole, *ends, color=plots.BLUE, label="whole distribution")
titles = ("whole distribution", "favourite token", "sampled token")
for axis, title in zip(axes, titles, strict=True):
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xticks(place, names)
    axis.set_title(title)
axes[0].set_ylabel("gradient (below 0: pushed up)")
axes[1].set_xlabel("token that may come next")
figure.legend(loc="outside lower right", ncols=3, frameon=False)
plt.show()

# %% [markdown]
# ### A sample is right on average
#
# The grey dots never lie on the blue lines, but they lie *around* them. For a
# drawn label $y$ the gradient is $q - e_y$, with $e_y$ the one-hot vector.
# The mean over $y$ needs no simulation, for there are six cases:
#
# $$\mathbb E_{y \sim p}\,[q - e_y] = q - \sum_y p_y e_y = q - p .$$
#
# A sampled label is an **unbiased** estimate of the whole gradient. So is its
# loss:
#
# $$\mathbb E_{y \sim p}\,[-\log q_y] = -\sum_y p_y \log q_y
#   = \mathrm{CE}(p, q).$$

# %%
mean_gradient = sum(p[y] * (q - one_hot[y]) for y in range(6))
torch.testing.assert_close(mean_gradient, whole)
mean_loss = sum(p[y] * -q[y].log() for y in range(6))
torch.testing.assert_close(mean_loss, cross_entropy(q.log(), p.log()))
print("mean over six labels ", [round(g, 4) for g in mean_gradient.tolist()])
print("whole distribution   ", [round(g, 4) for g in whole.tolist()])

# %% [markdown]
# It also holds for the network's weights, because the gradient there is a
# fixed matrix (the Jacobian of the logits) times this one, and a mean passes
# through a matrix.
#
# The same label as kdlib's objective sees it: `hard_weight=1` is the
# cross-entropy with the response tokens.

# %%
response = torch.tensor([2])
leaf = q.log()[None].requires_grad_()
loss = Objective(hard_weight=1.0)(leaf, None, response).total
(gradient,) = torch.autograd.grad(loss, leaf)
torch.testing.assert_close(gradient[0], q - one_hot[2])
print("label", repr(names[2]), [round(g, 4) for g in gradient[0].tolist()])

# %% [markdown]
# ### The favourite is wrong on average, and stays wrong
#
# The favourite is no draw: it is the same label every time. Its gradient is
# $q - e_{\hat y}$, and no averaging moves it towards $q - p$. What does it
# lead to? Put the loss itself, $-\log q_{\hat y}$, in front of you: it is
# smallest where $q_{\hat y} = 1$. Its minimiser is a **point mass**, and with
# finite logits it is never reached.
#
# ### Predict
#
# Descend from the even student with each target, 200 steps of length 1. For
# the sample, a new label is drawn at every step. Where does each end?


# %%
def trained(targets, rate=1.0):
    """The student at the end, and its KL from the teacher on the way."""
    z, path = q.log(), []
    for target in targets:
        path.append(forward_kl(z, p.log()).item())
        z = z - rate * (z.softmax(-1) - target)
    return z.softmax(-1), path


def drawn_labels(steps):
    rng = torch.Generator().manual_seed(2)
    return one_hot[torch.multinomial(p, steps, True, generator=rng)]


ends = {
    "whole": trained(p.expand(200, 6)),
    "favourite": trained(one_hot[p.argmax()].expand(200, 6)),
    "sample": trained(drawn_labels(200)),
}
print("teacher  ", "  ".join(f"{x:.3f}" for x in p.tolist()))
for name, (end, _) in ends.items():
    print(f"{name:9}", "  ".join(f"{x:.3f}" for x in end.tolist()))

# %%
figure, axes = plt.subplots(figsize=(6.5, 2.8))
for (name, (_, path)), colour in zip(
    ends.items(), (plots.BLUE, plots.ORANGE, plots.GREY), strict=True
):
    axes.plot(path, color=colour, label=name)
axes.set_yscale("log")
axes.set_ylim(1e-4, 20)
axes.set_xlabel("step")
axes.set_ylabel("KL from the teacher, nats")
axes.set_title("Right, wrong, and right on average", loc="left")
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# - **Whole**: straight down to the teacher.
# - **Favourite**: away from it, and further with every step. Its own loss
#   falls all the while.
# - **Sample**: never at rest. It wanders in the teacher's neighbourhood,
#   because its gradient is not zero even where $q = p$.
#
# The neighbourhood shrinks with the steps. Measure its size by the mean KL in
# the second half of 4,000 steps:

# %%
for rate in (1.0, 0.1, 0.01):
    path = trained(drawn_labels(4000), rate)[1]
    print(f"step length {rate:4}: KL {sum(path[2000:]) / 2000:.3f}")

# %% [markdown]
# So a sampled label needs a learning rate that goes to zero; the whole
# distribution does not. It is a matter of *noise*. How much is there?

# %% [markdown]
# ## 6 · The noise of a label
#
# Measure noise by the mean squared distance of the gradient from its own
# mean, all entries added: the trace of its covariance. The student $q$ is in
# both and cancels:
#
# $$\mathbb E_y \| (q - e_y) - (q - p) \|^2 = \mathbb E_y \| e_y - p \|^2
#   = \mathbb E_y \big[ 1 - 2 p_y + \textstyle\sum_v p_v^2 \big] .$$
#
# Because $\|e_y\|^2 = 1$ and $e_y \cdot p = p_y$. The mean of $p_y$ is
# $\sum_y p_y^2$. So
#
# $$\boxed{\;\text{noise of one sampled label} = 1 - \sum_v (p^t_v)^2\;}$$
#
# and zero for the whole distribution. **It does not depend on the student**,
# trained or not.

# %%
formula = 1 - p.square().sum()
for name, student in {"even": q, "teacher": p, "odd": p.flip(0)}.items():
    mean = student - p
    listed = sum(
        p[y] * (student - one_hot[y] - mean).square().sum() for y in range(6)
    )
    torch.testing.assert_close(listed, formula)
    print(f"{name:8} {listed:.4f}")
print(f"formula  {formula:.4f}")

# %% [markdown]
# By hand, for a coin: $p = (0.5, 0.5)$ gives $1 - 0.25 - 0.25 = 0.5$. Between
# $k$ equal tokens it is $1 - 1/k$. It is the chance that two draws differ.
#
# ### Predict
#
# Which is nearer to the whole target, on the squared distance: one sample, or
# the favourite?
#
# The favourite does not vary, so all of its error is bias:
# $\|e_{\hat y} - p\|^2 = 1 - 2 \max_v p_v + \sum_v p_v^2$.

# %%
bias = (one_hot[p.argmax()] - p).square().sum()
torch.testing.assert_close(bias, 1 - 2 * p.max() + p.square().sum())
print(f"one sample, noise   {formula:.3f}")
print(f"favourite, bias     {bias:.3f}")

# %% [markdown]
# That may surprise. A single draw is *further* off than the favourite, for
# every teacher: $1 - \sum p^2 \ge 1 - 2 \max p + \sum p^2$ says no more than
# $\sum_v p_v^2 \le \max_v p_v$. (Each $p_v^2$ is at most $p_v \max p$.)
#
# The difference is what happens *next*. Noise averages out: the mean of $n$
# independent labels has $1/n$ of it. Bias does not.

# %%
rng = torch.Generator().manual_seed(3)
noises = torch.randn(10_000, 6, generator=rng, dtype=torch.float64)
many = (2 * noises).softmax(-1)
assert (many.square().sum(1) <= many.max(1).values).all()
print("holds for 10,000 random teachers")
print(f"noise / bias here: {formula / bias:.2f}")

# %%
figure, axes = plt.subplots(figsize=(6.5, 3))
counts = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128])
measured = [
    (cloud(int(n), 4000) - whole).square().sum(1).mean() for n in counts
]
axes.plot(counts, formula / counts, color=plots.ORANGE, label="$n$ samples")
axes.plot(counts, measured, "o", color=plots.ORANGE, label="simulated")
axes.axhline(bias, color=plots.GREY, label="favourite, $n$ times")
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks(counts, [str(n) for n in counts.tolist()])
axes.set_xlabel("labels for one token, $n$ (log scale)")
axes.set_ylabel("squared error (log scale)")
axes.set_title("Noise averages out, bias does not", loc="left")
axes.legend(frameon=False)
plt.show()
for n, value in zip(counts.tolist(), measured, strict=True):
    assert abs(value * n / formula - 1) < 0.1

# %% [markdown]
# kdlib draws such labels: `sampled_targets` keeps the tokens and the share of
# the $n$ draws that each got. Its loss is linear in those shares, so it is
# unbiased for every $n$.

# %%
from kdlib.sparse import sparse_divergence
from kdlib.sparse_targets import sampled_targets

kept = sampled_targets(p.log()[None], 16, torch.Generator().manual_seed(0))
for index, weight in zip(kept.indices[0], kept.weights[0], strict=True):
    if weight > 0:
        print(f"{names[index]:5} {weight.item() * 16:.0f} of 16")
leaf = q.log()[None].requires_grad_()
loss = sparse_divergence(leaf, kept, "cross_entropy").sum()
(gradient,) = torch.autograd.grad(loss, leaf)
counted = torch.zeros(6, dtype=torch.float64)
counted.scatter_add_(0, kept.indices[0], kept.weights[0])
torch.testing.assert_close(gradient[0], q - counted)

# %% [markdown]
# ## 7 · A batch has two kinds of noise
#
# Training does not look at one token. It draws inputs $x$ as well, and the
# gradients differ from input to input whatever the target. Add both up with
# the **law of total variance**. With $g = p^s_x - e_y$:
#
# $$\mathrm{Var}(g) = \underbrace{\mathbb E_x\big[
#     1 - \textstyle\sum_v (p^t_{x,v})^2 \big]}_{\text{the label's noise}}
#   + \underbrace{\mathrm{Var}_x\big( p^s_x - p^t_x \big)}_{
#     \text{the inputs' noise}} .$$
#
# The mean over $B$ inputs divides both by $B$. A whole distribution removes
# the first term altogether, and leaves the second. Which one is larger?

# %%
dated = [
    pair
    for pair in data.unlabelled
    if unlabelled[pair.example_id].kind in ("date", "relative")
][:300]
torn_many = first_token_logits(dated)
p_t = torn_many.softmax(-1)
label_noise = (1 - p_t.square().sum(-1)).mean()
print(len(dated), "dates and times, read without the instruction")
print(f"label's noise {label_noise:.2f}")

# %% [markdown]
# Check the law on three inputs and six tokens, where every (input, label) pair
# can be listed:

# %%
p_small = p_t[:3, :6] / p_t[:3, :6].sum(1, keepdim=True)
q_small = torch.arange(1.0, 19.0, dtype=torch.float64).view(3, 6).cos()
q_small = q_small.softmax(1)
g = q_small[:, None] - one_hot  # [input, label, entry]
weight = p_small[..., None] / 3
mean = (weight * g).sum((0, 1))
total = (weight * (g - mean).square()).sum()
label = (1 - p_small.square().sum(1)).mean()
gap = q_small - p_small
inputs = (gap - gap.mean(0)).square().sum(1).mean()
torch.testing.assert_close(total, label + inputs)
print(f"{total:.4f} = {label:.4f} + {inputs:.4f}")

# %% [markdown]
# ### Predict
#
# Now the real 300 inputs. The label's noise is the same for all students. Is
# the inputs' noise larger or smaller, for an untrained student? For one that
# is close to the teacher?


# %%
def inputs_noise(student_logits):
    gap = student_logits.softmax(-1) - p_t
    return (gap - gap.mean(0)).square().sum(1).mean().item()


rng = torch.Generator().manual_seed(3)
error = torch.randn(torn_many.shape, generator=rng, dtype=torch.float64)
print("student            inputs' noise   labels for a tenth of it")
for name, student in {
    "uniform": torch.zeros_like(torn_many),
    "rough copy": torn_many + error,
    "close copy": torn_many + 0.3 * error,
    "equal": torn_many,
}.items():
    noise = inputs_noise(student)
    needed = f"{label_noise / (0.1 * noise):8.0f}" if noise else "never"
    print(f"{name:18} {noise:8.4f}        {needed:>8}")

# %% [markdown]
# The last column is how many labels a token needs until their noise is a
# tenth of the inputs'. For a student that knows nothing, a dozen will do: the
# inputs are the noisier part, and the exact target buys little.
#
# As the student comes closer, the inputs' noise goes to zero and the label's
# does not. **At the end all of the noise is the labels'.** That is where whole
# distributions pay: with them the gradient at the goal is zero for *every*
# input, and training can come to rest.

# %% [markdown]
# ## 8 · A teacher that knows nothing
#
# **Label smoothing** (Szegedy and others 2015, arXiv:1512.00567) is a soft
# target, too. It mixes a label with the uniform distribution:
#
# $$\tilde p = (1 - \varepsilon)\, e_y + \varepsilon\, \tfrac1V .$$
#
# Everything above holds for it: the gradient is $q - \tilde p$, the curvature
# the same, the loss has a floor. It differs in *where* the mass goes. A
# teacher gives it to what could also be said; smoothing to all tokens alike.

# %%
label = torn.argmax()
smooth = torch.full((V,), 0.1 / V, dtype=torch.float64)
smooth[label] += 0.9
target = torn.softmax(-1)
second = tokens[1]
for name, row in {"teacher": target, "smoothed": smooth}.items():
    first, next_ = row[label].item(), row[second].item()
    print(
        f"{name:9} {names[0]!r} {first:.2f}, {names[1]!r} {next_:.4f}, "
        f"entropy {-(row * row.log()).sum().item():.2f}"
    )


def smoothed_kl(epsilon):
    row = torch.full((V,), epsilon / V, dtype=torch.float64)
    row[label] += 1 - epsilon
    return forward_kl(row.log(), torn).item()


print(f"KL(teacher || smoothed) {smoothed_kl(0.1):.2f}")
best = min(smoothed_kl(percent / 100) for percent in range(1, 101))
print(f"at the best strength    {best:.2f}")

# %% [markdown]
# No strength makes it the teacher. So "soft targets help because they are
# soft" explains little. Whether smoothing helps training is another question,
# and not asked here. One sighting is worth knowing: a
# *teacher* that was trained with smoothed labels made worse students (Müller,
# Kornblith and Hinton 2019, arXiv:1906.02629).

# %% [markdown]
# ## 9 · Whole answers
#
# A label for every token makes an answer. Let the teacher write
# $\hat y = (\hat y_1, \dots, \hat y_n)$ and take
#
# $$\mathrm{Loss} = -\log \Pr^s_\theta(\hat y \mid c', z)
#   = -\sum_{t} \log \Pr^s_\theta(\hat y_t \mid c', z, \hat y_{<t}) .$$
#
# This is plain supervised training on text that the teacher wrote. Chapter 3
# asked what one greedy answer loses, compared with all answers. Here we ask
# what *drawn* answers lose. Each of their tokens is a sampled label, so the
# loss is unbiased:

# %%
lm = exact.ExactLM.random(vocab=6, length=3, scale=2.0, seed=0)
student = exact.ExactLM.random(vocab=6, length=3, scale=1.0, seed=1)
log_pt, log_ps = lm.log_probs()[0], student.log_probs()[0]
mean_over_draws = -(log_pt.exp() * log_ps).sum()
divergence = exact.sequence_forward_kl(lm, student)
whole_loss = (divergence + exact.sequence_entropy(lm))[0]
torch.testing.assert_close(mean_over_draws, whole_loss)
print(f"mean over 216 answers     {mean_over_draws:.4f}")
print(f"KL + entropy, exact.py    {whole_loss:.4f}")

# %% [markdown]
# ### Predict
#
# Keep the drawn answers, but take the teacher's *distribution* as the target
# at every token instead of the token that was drawn. How much of the
# gradient's noise goes away, and what is left?
#
# Write $h$ for the prefix, the tokens before. Given $h$, the next token is a
# sampled label like any other. So by the law of total variance
#
# $$\text{noise of drawn answers} = \text{noise of drawn prefixes}
#   + \sum_t \mathbb E_h \big[ 1 - \textstyle\sum_v \Pr^t(v \mid h)^2 \big].$$
#
# A model of three places over six tokens has 216 answers. List them all, with
# the gradient by every logit of the student.

# %%
p_at = [table[0].softmax(-1) for table in lm.tables]
q_at = [table[0].softmax(-1) for table in student.tables]


def gradient_of(answer, distributions):
    """d loss / d student's logits, for one answer that the teacher drew."""
    found = [torch.zeros_like(table) for table in q_at]
    prefix = 0
    for t, token in enumerate(answer):
        label = one_hot[token]
        target = p_at[t][prefix] if distributions else label
        found[t][prefix] = q_at[t][prefix] - target
        prefix = 6 * prefix + token
    return torch.cat([table.flatten() for table in found])


answers = exact.sequences(6, 3).tolist()
chance = log_pt.exp()[:, None]

# %%
noise = {}
for name, distributions in {"labels": False, "distributions": True}.items():
    rows = torch.stack([gradient_of(y, distributions) for y in answers])
    middle = (chance * rows).sum(0)
    noise[name] = (chance * (rows - middle).square()).sum().item()
    print(f"{name:14} noise {noise[name]:.4f}")
by_formula = sum(
    (lm.log_probs(t)[0].exp() * (1 - p_at[t].square().sum(1))).sum().item()
    for t in range(3)
)
gone = noise["labels"] - noise["distributions"]
print(f"{'difference':14}       {gone:.4f}")
print(f"{'formula':14}       {by_formula:.4f}")
assert abs(gone - by_formula) < 1e-10

# %% [markdown]
# The distributions take out what the tokens add, and leave what the prefixes
# add. That is why the teacher should write *and* keep its distributions: they
# come with the writing.
#
# ### When an answer is enough
#
# The noise of a label is $1 - \sum p^2$. Where the teacher is sure, it is
# zero, and so is the favourite's bias. Then all three targets are one target.
# So before you choose, **measure how torn your teacher is**. Ours, on the
# test inputs, once with its instruction and once without:


# %%
def all_positions(side, pairs):
    rows = []
    for batch in data.batches(pairs):
        view = getattr(batch, side)
        with torch.no_grad():
            found = teacher(view.input_ids, view.attention_mask).logits
        rows.append(view.select(found).double())
    return torch.cat(rows)


positions = {
    "with its instruction": all_positions("teacher", data.test[:500]),
    "without it": all_positions("student", data.test[:500]),
}
for name, rows in positions.items():
    entropy = cross_entropy(rows, rows)
    noise = 1 - rows.softmax(-1).square().sum(1)
    print(f"{name:21} entropy {entropy.mean():.3f}, median", end=" ")
    print(f"{entropy.median():.3f}, a label's noise {noise.mean():.3f}")

# %%
figure, axes = plt.subplots(figsize=(6.5, 2.9))
edges = torch.linspace(0, 2.5, 26)
for (name, rows), colour in zip(
    positions.items(), (plots.BLUE, plots.ORANGE), strict=True
):
    entropy = cross_entropy(rows, rows)
    look = {"histtype": "step", "linewidth": 1.8, "color": colour}
    axes.hist(entropy, bins=edges, label=name, **look)
axes.set_yscale("log")
axes.set_xlabel("entropy of the teacher at one token, nats")
axes.set_ylabel("tokens (log scale)")
axes.set_title("One teacher, sure or torn", loc="left")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# With its instruction the teacher is sure at nearly every token. There is next
# to nothing that a label could lose. Chapter 0's experiment agrees:

# %%
results = Path(kdlib.__file__).parents[1] / "notebooks" / "results"
phones = json.loads((results / "quickstart_seeds.json").read_text())
print(phones["command"])
rows = {"distributions": phone.DISTILLED, "answers": "teacher's answers"}
for name, row in rows.items():
    print(f"{name:14}", Interval(**phones["exact_match"][row]))
lead = Interval(**phones["distilled_minus"]["teacher's answers"])
print("exact match, distributions minus answers:", lead.claim())

# %% [markdown]
# The share of exact answers does not tell them apart. The same runs also
# measured the KL from the teacher, which is what the loss asks for. Take it
# seed by seed:

# %%
gaps = [
    seed["teacher's answers"]["kl"] - seed[phone.DISTILLED]["kl"]
    for seed in phones["seeds"]
]
print("KL, answers minus distributions:", mean_interval(gaps).claim())

# %% [markdown]
# The students that saw distributions are nearer to the teacher's, and it shows
# in no answer. Two measures, two verdicts, both true. Decide which one you
# need before you look.

# %% [markdown]
# ## 10 · The torn case, measured
#
# Now the same teacher where it is torn. It reads dates and relative times
# without its instruction and is asked for the first token of the answer. The
# student of chapter 0 reads the same. One token means that the KL is an exact
# sum over the vocabulary, with no prefix in it.
#
# | row | the target |
# |---|---|
# | full distributions | $p^t$ |
# | 16 samples | sixteen tokens, drawn once |
# | one sample | one token, drawn once |
# | redrawn sample | one token, drawn anew at every visit |
# | favourite | the likeliest token |

# %% [markdown]
# All have the same inputs, first weights, order and number of steps. They
# also cost the same: every label takes one forward pass of the teacher. There
# is no row of true labels, because without the instruction no answer is the
# right one.

# %% [markdown]
# ### Predict
#
# The 400 steps visit each of 100 inputs about 130 times, or each of 1,000
# about 13 times. Sort the five rows by their KL on *test* inputs, for 100 and
# for 1,000. Then sort them once more by how often the student's favourite is
# the teacher's. Do you expect the same order?

# %%
found = json.loads((results / "hard_and_soft.json").read_text())
print(found["command"])
print(found["device"], "·", found["date"])
print(f"{found['seeds']} paired seeds, {found['steps']} steps of", end=" ")
print(f"{found['batch_size']} examples, {found['test']} test inputs")
print(f"entropy of the teacher there: {found['teacher_entropy']:.2f}")


# %%
def show(measure):
    for inputs, levels in found["levels"].items():
        print(f"{inputs} inputs")
        for row, values in levels.items():
            print(f"    {row:20} {Interval(**values[measure])}")


print("KL(teacher || student), nats")
show("kl")

# %%
print("favourite is the teacher's, share of the test inputs")
show("agreement")

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.2))
taught = [row for row in found["levels"]["100"] if "untrained" not in row]
for inputs, colour, shift in (
    ("100", plots.GREY, 0.12),
    ("1000", plots.BLUE, -0.12),
):
    levels = found["levels"][inputs]
    values = [Interval(**levels[row]["kl"]) for row in taught]
    means = [value.mean for value in values]
    reach = [value.high - value.mean for value in values]
    place = [i + shift for i in range(len(values))]
    label = f"{int(inputs):,} inputs"
    axes.errorbar(means, place, xerr=reach, fmt="o", color=colour, label=label)
axes.set_yticks(range(len(taught)), taught)
axes.invert_yaxis()
axes.set_xscale("log")
axes.set_xlabel("KL from the teacher on test inputs, nats (log scale)")
axes.set_title("What the label loses where the teacher is torn", loc="left")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# A difference counts if its interval, taken seed by seed, stays away from
# zero. Each row minus the full distributions:

# %%
for measure in ("kl", "agreement"):
    for inputs, rows in found["minus_full"].items():
        print(f"{measure}, {inputs} inputs, row minus full distributions")
        for row, values in rows.items():
            if "untrained" not in row:
                print(f"    {row:16} {Interval(**values[measure]).claim()}")

# %% [markdown]
# Read by KL, the rows fall where the theory puts them.
#
# - The **favourite** is worst, and ten times the inputs do not cure it: bias.
# - **One sample** is nearly as bad on 100 inputs, and much better on 1,000.
# - **Whole distributions** are the best, or level with the best.
# - **Sixteen samples** have about twice the KL of whole distributions.
# - **Redrawn**, a sample is not shown to be worse where each input is visited
#   130 times. With 13 visits it is.

# %% [markdown]
# Read by agreement, the favourite is first or level. If the greedy answer is
# all that you will ever ask of the student, the teacher's greedy answer is a
# fine target.
#
# How sure are these students? The teacher's mean entropy is 0.99.

# %%
for row in taught:
    by_size = [levels[row]["entropy"] for levels in found["levels"].values()]
    few, many = (Interval(**value) for value in by_size)
    print(f"{row:20} {few.mean:.2f} on 100 inputs, {many.mean:.2f} on 1,000")

# %% [markdown]
# The favourite's students are sure where their teacher is torn. So is the
# student of 100 fixed samples: it took each draw for certain, as one does who
# learns by heart. With 1,000 inputs, which resemble each other, it had to
# average.
#
# All of this is one task, one size of student and one recipe.

# %% [markdown]
# ## Exercises
#
# They are in [`exercises/ch04.ipynb`](../exercises/ch04.ipynb), each with its
# own check, two hints and a solution. Do them before the quiz.

# %% [markdown]
# ## Quiz
#
# **1.** The cross-entropy of a student stops at 0.4 nats a token and does not
# fall any more. Is something wrong?
#
# <details><summary>Answer</summary>
#
# The number alone does not say. If the teacher's mean entropy on these tokens
# is 0.4, the student has arrived. Subtract the entropy, or report the KL.
#
# </details>

# %% [markdown]
# **2.** A label that the teacher drew is unbiased, and further from the
# teacher's distribution than its favourite is. Why prefer it?
#
# <details><summary>Answer</summary>
#
# Its error is noise, and averages out over draws and over inputs that resemble
# each other. The favourite's error is bias: it is the same every time, and
# the student learns it.
#
# </details>

# %% [markdown]
# **3.** With whole distributions the gradient has no label noise. Why does it
# still differ from batch to batch? And when does it not?
#
# <details><summary>Answer</summary>
#
# The inputs differ, and so does $p^s_x - p^t_x$. Where the student equals the
# teacher on all inputs, every one of these gradients is zero.
#
# </details>

# %% [markdown]
# ## What breaks in practice
#
# - **A minus that is missing**, in print and in code
#   ([Imagination-Augmented-Agents#6](https://github.com/higgsfield/Imagination-Augmented-Agents/issues/6)).
#   A cross-entropy below zero is the symptom.
# - **A mean over the classes** where a sum belongs
#   ([continual-learning#5](https://github.com/GMvandeVen/continual-learning/issues/5)).
#   The gradient is $V$ times too small.
# - **NaN from a masked token.** $0 \cdot (-\infty)$ in the soft cross-entropy
#   ([ModelCenter#14](https://github.com/OpenBMB/ModelCenter/issues/14),
#   [optax#896](https://github.com/google-deepmind/optax/issues/896)).
# - **Padding that counts** in the mean
#   ([optipfair#34](https://github.com/peremartra/optipfair/issues/34),
#   [Fast-LLM#344](https://github.com/ServiceNow/Fast-LLM/issues/344)).
# - **Waiting for zero.** Equal models do not have a cross-entropy of zero
#   ([cotta#18](https://github.com/qinenergy/cotta/issues/18)).

# %% [markdown]
# ## Summary
#
# - The loss is $-\sum_v p^t_v \log p^s_v$, with its minus. It starts near
#   $\log V$ and ends at the teacher's entropy.
# - Its gradient by the logits is $p^s - p^t$; its curvature does not depend on
#   the target.
# - A sampled label is unbiased with noise $1 - \sum_v (p^t_v)^2$. The
#   favourite has no noise and a bias that stays.
# - Whole distributions remove the label's noise, which is all of it near the
#   goal. Where the teacher is sure there is none to remove.
#
# In the formula of the course this chapter filled in one word:
#
# $$\hat\theta = \arg\min_\theta \sum_{x' \in D'}
#   \underbrace{\mathrm{Loss}}_{\text{cross-entropy}}\big(
#   \Pr^t(\cdot \mid c, z),\; \Pr^s_\theta(\cdot \mid c', z),\; x'\big).$$
#
# Next, chapter 5: the KL divergence, in both directions.
