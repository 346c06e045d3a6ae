# %% [markdown]
# # Exercises 5 · KL divergence
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/exercises/ch05.ipynb)
#
# | what it costs | |
# |---|---|
# | your time | 100 minutes |
# | two CPU cores | seconds |
# | network, account, key | none |
#
# Read chapter 5 first (`notebooks/05_kl_divergence.ipynb`). How the checks
# work stands at the top of `exercises/ch01.ipynb`.

# %% [markdown]
# The next cell is the same in every chapter. In a clone it does nothing
# much; in Colab or Kaggle it fetches the course.

# %% part="setup"
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

# %% part="imports"
import torch
from kdlib import checks

# %% [markdown] question="5.1" part="task"
# ## 5.1 forward_kl_loss
#
# **5.1** · code · difficulty 3/5 · importance 5/5 · 20 minutes · 4 points
#
# The loss that every distillation library has, and that many had wrong first.
# Compute $\mathrm{KL}(p_t \| p_s)$ in nats for every position, and return the
# **mean over the positions**.
#
# - Both sides' logits are divided by the temperature $T$. There is no factor
#   $T^2$.
# - An embedding is often padded to a round size, so one side may have more
#   columns than the other. The columns beyond the narrower side belong to no
#   token.
# - A logit may be $-\infty$ on *both* sides: a token that is suppressed. It
#   contributes 0.


# %% question="5.1" part="answer"
def forward_kl_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Mean over all positions of KL(teacher || student), in nats.

    student_logits [B, L, V_s], teacher_logits [B, L, V_t]: B sequences of L
        positions; every position counts

    Returns one number.
    """
    ### BEGIN SOLUTION
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    log_ps = (student_logits[..., :shared] / temperature).log_softmax(-1)
    log_pt = (teacher_logits[..., :shared] / temperature).log_softmax(-1)
    p_t = log_pt.exp()
    log_ratio = torch.where(p_t > 0, log_pt - log_ps, 0.0)
    return (p_t * log_ratio).sum(-1).mean()
    ### END SOLUTION


# %% question="5.1" part="check"
checks.check("5.1", forward_kl_loss)

# %% [markdown] question="5.1" part="hint"
# Which step must come first, cutting or softmax? And in which dimension does
# the softmax run, when there are three?

# %% [markdown] question="5.1" part="hint"
# Cut both sides to the columns they share, divide by T, take log_softmax over
# the last dimension. Replace the log-ratio by 0 where p_t is 0, *before* you
# multiply: 0 times (infinity minus infinity) is not a number. Then a sum over
# the vocabulary and a mean over the rest.

# %% [markdown] question="5.1" part="note"
# The sum over the vocabulary is part of the KL. The mean over positions is
# not, and torch's reductions mix the two up: "mean" divides by the vocabulary
# too, "batchmean" by the sequences alone. kdlib's divergences return one
# number a token and leave the mean to the objective.

# %% [markdown] question="5.2" part="task"
# ## 5.2 reverse_kl_gradient
#
# **5.2** · derive · difficulty 4/5 · importance 4/5 · 25 minutes · 3 points
#
# With $p_s = \mathrm{softmax}(z_s / T)$ and $p_t = \mathrm{softmax}(z_t / T)$,
# **derive the gradient of $\mathrm{KL}(p_s \| p_t)$ by the student's logits**
# $z_s$, for any temperature. The chapter did $T = 1$. Type the formula in; no
# autograd.
#
# Then look at it: for which tokens is there no push?


# %% question="5.2" part="answer"
def reverse_kl_gradient(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """The gradient [N, V] of each row's KL(student || teacher) by its logits.

    student_logits, teacher_logits [N, V]: one row a token
    """
    ### BEGIN SOLUTION
    log_ps = (student_logits / temperature).log_softmax(-1)
    log_pt = (teacher_logits / temperature).log_softmax(-1)
    p_s, log_ratio = log_ps.exp(), log_ps - log_pt
    kl = (p_s * log_ratio).sum(-1, keepdim=True)
    return p_s * (log_ratio - kl) / temperature
    ### END SOLUTION


# %% question="5.2" part="check"
checks.check("5.2", reverse_kl_gradient)

# %% [markdown] question="5.2" part="hint"
# First take the derivative by p_s, as if its entries were free. Then send it
# through the softmax, which subtracts the student's average.

# %% [markdown] question="5.2" part="hint"
# The derivative by p_s(v) is log(p_s(v) / p_t(v)) + 1. Its average under p_s
# is the KL plus 1. And z enters as z / T: that is one more factor.

# %% [markdown] question="5.2" part="note"
# p_s (log(p_s / p_t) - KL) / T. Each row sums to 0. There is no push where
# p_s is 0, and none where a token's log-ratio equals its average. p_s occurs
# twice in the KL: as the weight and under the logarithm. Holding the weight
# fixed leaves a gradient of exactly 0, and that is what back-propagation
# through k1 does on the average.

# %% [markdown] question="5.3" part="task"
# ## 5.3 gkd_jsd
#
# **5.3** · code · difficulty 3/5 · importance 4/5 · 20 minutes · 4 points
#
# Write GKD's generalised Jensen-Shannon divergence, one number a token:
#
# $$\beta\,\mathrm{KL}(p_t \| m) + (1 - \beta)\,\mathrm{KL}(p_s \| m),
#   \qquad m = \beta p_t + (1 - \beta) p_s .$$
#
# At $\beta = 0$ return forward KL and at $\beta = 1$ reverse KL, as the
# libraries do. The two models may be *very* far apart: a probability may be
# smaller than any number that float64 holds.


# %% question="5.3" part="answer"
def gkd_jsd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Generalised JSD [N] in nats, with forward and reverse KL at its ends.

    student_logits, teacher_logits [N, V]: finite, at temperature 1
    beta: between 0 and 1, both included
    """
    ### BEGIN SOLUTION
    log_ps = student_logits.log_softmax(-1)
    log_pt = teacher_logits.log_softmax(-1)

    def kl(log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    if beta == 0:
        return kl(log_pt, log_ps)
    if beta == 1:
        return kl(log_ps, log_pt)
    weights = torch.tensor([beta, 1 - beta], dtype=log_ps.dtype).log()
    log_m = torch.logaddexp(log_pt + weights[0], log_ps + weights[1])
    return beta * kl(log_pt, log_m) + (1 - beta) * kl(log_ps, log_m)
    ### END SOLUTION


# %% question="5.3" part="check"
checks.check("5.3", gkd_jsd)

# %% [markdown] question="5.3" part="hint"
# Write down who gets beta: in the mixture, in front of the teacher's KL, and
# what each end is called. Three places, and all three have been swapped.

# %% [markdown] question="5.3" part="hint"
# Stay with logarithms. log m is logaddexp(log p_t + log beta,
# log p_s + log(1 - beta)). A probability of 0 is never divided or logged then.

# %% [markdown] question="5.3" part="note"
# At beta = 1/2 most of these mistakes give the right value, so a test with
# 1/2 alone finds none of them. The ends are no limit of the inside: there the
# formula goes to 0.

# %% [markdown] question="5.4" part="task"
# ## 5.4 stale_k3
#
# **5.4** · code · difficulty 3/5 · importance 3/5 · 15 minutes · 3 points
#
# A trainer lets the student write a batch of answers and then makes several
# optimiser steps on it. After the first step the samples are **stale**: they
# come from $p_\text{old}$, and the student is $p_s$ by now. The mean of k3
# over them no longer estimates $\mathrm{KL}(p_s \| p_t)$.
#
# Repair it. Return k3 for each token, weighted so that its mean over samples
# from $p_\text{old}$ is $\mathrm{KL}(p_s \| p_t)$ again. (Only values are
# asked for, not gradients.)


# %% question="5.4" part="answer"
def stale_k3(
    student_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
) -> torch.Tensor:
    """An unbiased estimate [N] of KL(student || teacher), never negative.

    student_log_probs, teacher_log_probs, old_log_probs [N]: log-probabilities
        of N sampled tokens under the student, the teacher, and the student
        that drew them
    """
    ### BEGIN SOLUTION
    weight = (student_log_probs - old_log_probs).exp()
    r = teacher_log_probs - student_log_probs
    return weight * (torch.expm1(r) - r)
    ### END SOLUTION


# %% question="5.4" part="check"
checks.check("5.4", stale_k3)

# %% [markdown] question="5.4" part="hint"
# You have a sum over y of p_old(y) times something. You want the sum over y of
# p_s(y) k3(y). What must the something be?

# %% [markdown] question="5.4" part="hint"
# p_s = p_old (p_s / p_old). The ratio is the exponential of a difference of
# logarithms. Inside k3 nothing changes.

# %% [markdown] question="5.4" part="note"
# Importance weights: E under p_old of (p_s / p_old) k3 is E under p_s of k3.
# Each weighted value is still at least 0. The weights have a variance of their
# own, which grows as the student moves away from the one that wrote.

# %% [markdown] question="5.5" part="task"
# ## 5.5 numbers
#
# **5.5** · predict · difficulty 3/5 · importance 3/5 · 10 minutes · 5 points
#
# **Guess first**, without running code. All in nats, but for the share.
#
# - `perfect_ce`: a teacher finds 16 tokens equally likely. The cross-entropy
#   of a student that equals it.
# - `jsd_apart`: the generalised JSD with $\beta = 0.1$ of two models that have
#   no token in common.
# - `jsd_near_end`: forward KL is 3 and reverse KL is 5. The JSD with
#   $\beta = 0.001$.
# - `wrong_share`: a teacher says one of 10 sentences, equally often. Each has
#   two words, and no word occurs in two sentences. A student that chooses its
#   words independently is trained with forward KL. Which share of what it says
#   is wrong?
# - `k3_reads`: a teacher gives each of two answers one half. The student gives
#   the second one a billionth. What does k3 read on nearly every sample?
#
# A guess counts as right within a factor of 1.5, and half otherwise.

# %% question="5.5" part="answer"
### BEGIN SOLUTION
numbers = {
    "perfect_ce": 2.77,
    "jsd_apart": 0.325,
    "jsd_near_end": 0.003,
    "wrong_share": 0.9,
    "k3_reads": 0.193,
}
### STUB
# numbers = {
#     "perfect_ce": ...,
#     "jsd_apart": ...,
#     "jsd_near_end": ...,
#     "wrong_share": ...,
#     "k3_reads": ...,
# }
### END SOLUTION

# %% question="5.5" part="check"
checks.check("5.5", numbers)

# %% [markdown] question="5.5" part="hint"
# What is the KL of the perfect student, and what is left of the cross-entropy?
# For the sentences, the best student is the product of the marginals.

# %% [markdown] question="5.5" part="hint"
# JSD of two that share nothing is the entropy of (beta, 1 - beta). Near its
# end JSD / beta is a KL: which one? And k3 = e^r - 1 - r, with r = log(0.5 /
# 1) for the answer that is always drawn.

# %% [markdown] question="5.5" part="note"
# log 16; the entropy of (0.1, 0.9); 0.001 times the forward KL; nine sentences
# out of ten, because each word is drawn from ten and only one second word fits
# a first. k3 reads 0.193 where the truth is 0.693: the rest of its mean waits
# for a sample that comes once in a billion.

# %% [markdown] question="5.6" part="task"
# ## 5.6 what_is_minimised
#
# **5.6** · explain · difficulty 2/5 · importance 5/5 · 10 minutes · 5 points
#
# One option of each item is right. Say to yourself why the others are not,
# before you check.

# %% [markdown] question="5.6" part="options"
# **a.** A trainer samples tokens from the student and back-propagates the mean
# of k1 $= \log p_s(y) - \log p_t(y)$. The student drifts about and learns
# nothing. Why?
#
# - **A** k1 takes both signs, and its noise drowns the gradient.
#   > wrong: More samples would cure noise. With endless samples this gradient
#   > is exactly 0.
# - **B** The teacher's term is a constant, and the rest has mean 0.
#   > right: What is left is the mean of grad log p_s(y), the score, which is 0
#   > whatever the teacher says.
# - **C** k1 is a biased estimate, so it points at another model.
#   > wrong: Its value is unbiased. An unbiased value does not make an unbiased
#   > gradient.

# %% [markdown] question="5.6" part="options"
# **b.** A teacher answers in two styles, each half of the time. A student has
# room for one style and cannot switch between them. Its words come out half in
# one style and half in the other, in every sentence. Which loss does that?
#
# - **A** Reverse KL, because it averages over the student's own sentences.
#   > wrong: Averaged over its own sentences, a mixed one costs most, for the
#   > teacher never says it. Reverse KL would choose one style.
# - **B** Forward KL, because each style that is left out costs without limit.
#   > right: It pays for every sentence of the teacher. Giving both some
#   > probability is worth any number of mixed sentences.
# - **C** Either of them, because both have their minimum at the teacher.
#   > wrong: They do where the student can be the teacher. This one cannot, and
#   > there the two part.

# %% [markdown] question="5.6" part="options"
# **c.** Cross-entropy minus KL is
#
# - **A** the teacher's entropy, which no training changes.
#   > right: H(p_t) does not depend on the student. So the gradients are equal
#   > and the numbers are not.
# - **B** the student's entropy, which shrinks while it learns.
#   > wrong: The student's own entropy is in neither of them. It is part of the
#   > reverse KL.
# - **C** the part of the loss that is due to the student's size.
#   > wrong: That would be a part of the KL: what is left of it in the best
#   > student.

# %% [markdown] question="5.6" part="options"
# **d.** Student 1 has a KL of 0.10 nats to its teacher. Student 2 has a
# distillation cross-entropy of 0.05 nats with *its* teacher, another one.
# Which student is nearer to its teacher?
#
# - **A** Student 1: a KL is stricter than a cross-entropy.
#   > wrong: It is smaller, by an entropy. With the same teacher, a
#   > cross-entropy of 0.05 means a KL of at most 0.05.
# - **B** Student 2: its KL is at most 0.05.
#   > right: An entropy is never negative, so KL = CE - H <= CE. Here the
#   > comparison is safe; the other way round it would not be.
# - **C** Nobody can tell: one number is a KL and one is not.
#   > wrong: Usually so. But a cross-entropy bounds the KL from above, and that
#   > is enough here.

# %% [markdown] question="5.6" part="options"
# **e.** Two runs with a generalised JSD and plain gradient descent, same
# learning rate: $\beta = 0.5$ and $\beta = 0.999$. The second one hardly
# moves. What follows?
#
# - **A** Reverse KL does not work for this student.
#   > wrong: Reverse KL is beta = 1. The run had about a thousandth of it.
# - **B** The mixture is too near to the student to learn from.
#   > wrong: At 0.999 the mixture is nearly the teacher. And nearness to the
#   > student is what beta near 0 does.
# - **C** Nothing about the direction: the gradient was a thousandth as long.
#   > right: It points nearly along reverse KL and is scaled by about 1 - beta.
#   > Compare with beta = 1, kl_mix, or another learning rate.

# %% question="5.6" part="answer"
### BEGIN SOLUTION
what_is_minimised = {
    "a": "B",
    "b": "B",
    "c": "A",
    "d": "B",
    "e": "C",
}
### STUB
# what_is_minimised = {
#     "a": ...,
#     "b": ...,
#     "c": ...,
#     "d": ...,
#     "e": ...,
# }
### END SOLUTION

# %% question="5.6" part="check"
checks.check("5.6", what_is_minimised)

# %% [markdown] question="5.6" part="hint"
# For a, write the mean of the gradient as a sum over y and use that
# probabilities sum to 1. For d, write CE = KL + H and ask which signs H can
# have.

# %% [markdown] question="5.6" part="hint"
# For b, ask each loss which sentences it averages over: the teacher's or the
# student's. For e, recall what JSD / (1 - beta) tends to.

# %% [markdown] question="5.6" part="note"
# A loss is its gradient. Two losses with one gradient are the same training
# (cross-entropy and forward KL), one loss with two strengths is two learning
# rates (JSD and its beta), and an unbiased number may have no gradient at all
# (k1).
