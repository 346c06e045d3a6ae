# %% [markdown]
# # Exercises 9 · Diagnosis
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/exercises/ch09.ipynb)
#
# | what it costs | |
# |---|---|
# | your time | 115 minutes |
# | two CPU cores | seconds |
# | network, account, key | none |
#
# Read chapter 9 first (`notebooks/09_diagnosis.ipynb`).

# %% [markdown]
# ## How it works
#
# Each exercise has a cell for your answer and a cell that checks it. A check
# says one of four things: *not attempted*, *raised*, *wrong*, *right*. Where
# it knows the mistake, it names it. Most of these mistakes were made in real
# projects, and the check says where.
#
# Below each check stand a hint and the solution. Take away the `#` in front
# of a line and run the cell. The first run gives one hint, the second run
# another.

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

# %% [markdown] question="9.1" part="task"
# ## 9.1 factor_and_gap
#
# **9.1** · code · difficulty 2/5 · importance 5/5 · 12 minutes · 4 points
#
# The doctor's ruler. It has the gradient that a loss gives, and the one that
# the declared objective would give. Which multiple of the expected one comes
# nearest, and how much is left?
#
# The **factor** is the number $f$ with the least $\|g - f e\|$. The **gap** is
# $\|g - f e\| \,/\, \|f e\|$. A gap of zero says: the loss is right, times
# $f$. A large one says: it is another loss.


# %% question="9.1" part="answer"
def factor_and_gap(
    gradient: torch.Tensor, expected: torch.Tensor
) -> torch.Tensor:
    """[factor, gap] of two gradients.

    gradient: [N, V] of the loss that is examined, by the student's logits
    expected: [N, V] of the declared objective; not zero everywhere
    """
    ### BEGIN SOLUTION
    factor = (gradient * expected).sum() / expected.square().sum()
    gap = (gradient - factor * expected).norm() / (factor * expected).norm()
    return torch.stack([factor, gap])
    ### END SOLUTION


# %% question="9.1" part="check"
checks.check("9.1", factor_and_gap)

# %% [markdown] question="9.1" part="hint"
# Write the square of the norm as a polynomial in f, and set its slope to zero.

# %% [markdown] question="9.1" part="hint"
# f = <g, e> / <e, e>, where <a, b> is the sum over all entries of a times b.

# %% [markdown] question="9.1" part="note"
# Both numbers are needed. A factor of 1/32000 with a gap of zero is torch's
# mean over the vocabulary. The same factor with a gap of 0.9 says nothing.
# `kdlib.doctor.closed_form.multiple` is this function.

# %% [markdown] question="9.2" part="task"
# ## 9.2 anchored_optimum
#
# **9.2** · derive · difficulty 4/5 · importance 4/5 · 20 minutes · 5 points
#
# A student may forget what it knew. So somebody adds a term that holds it near
# its start $r$, with a weight $\lambda \ge 0$:
#
# $$L(q) = \mathrm{KL}(q \| p) + \lambda\, \mathrm{KL}(q \| r).$$
#
# **Derive the distribution $q$ that is best**, and type it in.


# %% question="9.2" part="answer"
def anchored_optimum(
    teacher: torch.Tensor, start: torch.Tensor, weight: float
) -> torch.Tensor:
    """The distribution [V] with the least L.

    teacher: [V] p; all probabilities are positive
    start:   [V] r; all probabilities are positive
    weight:  lambda
    """
    ### BEGIN SOLUTION
    log_q = (teacher.log() + weight * start.log()) / (1 + weight)
    return log_q.softmax(0)
    ### END SOLUTION


# %% question="9.2" part="check"
checks.check("9.2", anchored_optimum)

# %% [markdown] question="9.2" part="hint"
# Collect the terms: how often does the sum of q log q occur?

# %% [markdown] question="9.2" part="hint"
# (1 + lambda) sum q log q - sum q (log p + lambda log r). Divide by
# 1 + lambda: it is KL(q || g) and a constant. Which g?

# %% [markdown] question="9.2" part="note"
# q is proportional to (p r^lambda)^(1 / (1 + lambda)): the product of experts
# of chapter 7, with two experts. A uniform r gives the student's entropy as
# the second term, and q is the teacher at the temperature 1 + lambda.

# %% [markdown] question="9.3" part="task"
# ## 9.3 price_of_a_wide_mask
#
# **9.3** · derive · difficulty 4/5 · importance 4/5 · 20 minutes · 5 points
#
# A student so small that it has one distribution for all positions is trained
# with forward KL, as a mean over the positions in the mask. The mask was meant
# for N response positions. It holds M others as well. **Derive what that
# costs**: how much higher is the best student's loss, in nats for each
# response token and measured on the response positions alone, than with the
# right mask?


# %% question="9.3" part="answer"
def price_of_a_wide_mask(response: torch.Tensor, other: torch.Tensor) -> float:
    """The excess loss in nats a response token.

    response: [N, V] the teacher's distributions at the response positions
    other:    [M, V] those at the positions that are in the mask by mistake
    """
    ### BEGIN SOLUTION
    wanted = response.mean(0)
    reached = torch.cat([response, other]).mean(0)
    return (wanted * (wanted / reached).log()).sum().item()
    ### END SOLUTION


# %% question="9.3" part="check"
checks.check("9.3", price_of_a_wide_mask)

# %% [markdown] question="9.3" part="hint"
# Chapter 7: the best single distribution for many targets under forward KL is
# their mixture. Which mixture is it with each of the two masks?

# %% [markdown] question="9.3" part="hint"
# The mean of KL(p_i || q) is the mean of KL(p_i || m) plus KL(m || q), with m
# the mean of the p_i. The first part is the same for both students.

# %% [markdown] question="9.3" part="note"
# KL(m_response || m_mask). The floor stays and cancels. A student with memory
# can keep the positions apart and pays less, with its capacity: it learns what
# nobody asked for.

# %% [markdown] question="9.4" part="task"
# ## 9.4 readings
#
# **9.4** · predict · difficulty 2/5 · importance 4/5 · 8 minutes · 4 points
#
# **Guess first**, without running code.
#
# - `mean`: A loss uses torch's `mean` of a [N, V] tensor, V = 32,000. Which
#   factor will the doctor find?
# - `no_t2`: $T = 4$, and $T^2$ was left out. Which factor?
# - `short_row`: Two responses, of 10 and of 90 tokens, and the mean of their
#   means. How many times as much does a token of the short one weigh?
# - `on_support`: Reverse KL, summed over a top k that holds half of the
#   teacher's mass, with no tail. How much of its mass does the best student
#   put there?
#
# A guess counts as right within a factor of 1.5, and half otherwise.

# %% question="9.4" part="answer"
### BEGIN SOLUTION
readings = {
    "mean": 3.1e-5,
    "no_t2": 0.0625,
    "short_row": 9,
    "on_support": 0.18,
}
### STUB
# readings = {
#     "mean": ...,
#     "no_t2": ...,
#     "short_row": ...,
#     "on_support": ...,
# }
### END SOLUTION

# %% question="9.4" part="check"
checks.check("9.4", readings)

# %% [markdown] question="9.4" part="hint"
# For each loss write down what it divides by, and what it should divide by.

# %% [markdown] question="9.4" part="hint"
# For the last one: the slope of q log(q / p) is log(q / p) + 1. Mass off the
# support costs nothing, so that slope is zero at the optimum.

# %% [markdown] question="9.4" part="note"
# 1/V, 1/T^2, 90/10, and 0.5/e. In the last case the loss is below zero at its
# optimum, which no divergence can be.

# %% [markdown] question="9.5" part="task"
# ## 9.5 differential
#
# **9.5** · explain · difficulty 3/5 · importance 5/5 · 15 minutes · 5 points
#
# One option of each item is right. Say to yourself why the others are not,
# before you check.

# %% [markdown] question="9.5" part="options"
# **a.** Teacher and student are the same model and read the same input. The
# reported forward KL is 1.9 nats a token. What is the likeliest cause?
#
# - **A** The learning rate was too high.
#   > wrong: Two equal models have a divergence of zero after any training.
# - **B** The number is a cross-entropy: the teacher's entropy is in it.
#   > right: It is H(p) at the optimum. A divergence would be zero.
# - **C** The temperature is left out on both sides.
#   > wrong: Two equal distributions stay equal at any temperature.

# %% [markdown] question="9.5" part="options"
# **b.** The loss is 32,000 times too small. AdamW trains the student as fast
# as before. Why?
#
# - **A** It divides the gradient by its own size, so a common factor cancels.
#   > right: But for its epsilon, and for what is added to the loss or clipped.
# - **B** The learning rate was raised by the schedule.
#   > wrong: A schedule does not look at the loss.
# - **C** bfloat16 stores so small a number as well as any other.
#   > wrong: That is so, and does not make a step longer.

# %% [markdown] question="9.5" part="options"
# **c.** The student answers well and does not stop. Which one is tested first?
#
# - **A** Whether the divergence is forward or reverse.
#   > wrong: Both have the teacher's end token at their optimum.
# - **B** Whether the teacher's context was cut.
#   > wrong: A teacher with half a context still ends its answers.
# - **C** Whether the end token's position gets a gradient.
#   > right: If padding is masked by its id, and it is the end token's, then
#   > the end is masked as well.

# %% [markdown] question="9.5" part="options"
# **d.** The loss is near zero, the teacher's top k renormalised on both sides.
# In service the student writes words that the teacher never would. The loss
#
# - **A** was not trained for long enough.
#   > wrong: It is near its least value already.
# - **B** does not see how much mass the student has off the top k.
#   > right: Renormalising divides that mass away.
# - **C** was differentiated through the teacher.
#   > wrong: That would move the teacher, and the loss would still see the top
#   > k alone.

# %% [markdown] question="9.5" part="options"
# **e.** A loss has the right value on a thousand random batches, to 1e-12. Is
# its training right?
#
# - **A** Yes: equal functions have equal gradients.
#   > wrong: Equal functions have. Autograd differentiates the code, and
#   > `detach` changes the code's gradient and not its value.
# - **B** Yes, if the batches held padding as well.
#   > wrong: Padding tests the mask. The gradient is still untested.
# - **C** Not shown: the gradient has to be compared too.
#   > right: k1, k3 and a detached student have the right value or mean, and
#   > another gradient.

# %% question="9.5" part="answer"
### BEGIN SOLUTION
differential = {
    "a": "B",
    "b": "A",
    "c": "C",
    "d": "B",
    "e": "C",
}
### STUB
# differential = {
#     "a": ...,
#     "b": ...,
#     "c": ...,
#     "d": ...,
#     "e": ...,
# }
### END SOLUTION

# %% question="9.5" part="check"
checks.check("9.5", differential)

# %% [markdown] question="9.5" part="hint"
# For each cause ask what it would do to a healthy run, and whether that is the
# symptom.

# %% [markdown] question="9.5" part="hint"
# In a, ask for the least value of each candidate. In e, think of `detach`.

# %% [markdown] question="9.5" part="note"
# A symptom has several causes. What tells them apart is an experiment in which
# they predict different numbers.

# %% [markdown] question="9.6" part="task"
# ## 9.6 test_loss
#
# **9.6** · code · difficulty 4/5 · importance 5/5 · 40 minutes · 30 points
#
# **The inverse exercise.** Do not write a loss. Write the tests that a wrong
# one fails. Thirty wrong losses are put to your function, each with one
# mistake; most of them were seen in real projects. You get a point for each
# that it rejects.
#
# Right losses in several forms are put to it as well. **If it rejects one of
# those, it gets nothing.** One of them computes in float32 and one detaches
# the teacher, so allow a relative error of 1e-4 and ask for no gradient of the
# teacher.
#
# A loss is called so:
#
# ```python
# loss(student_logits, teacher_logits, labels, temperature=1.0)
# ```
#
# It should be the forward KL at that temperature, times $T^2$, as a mean over
# all response tokens. The logits are `[B, T, V]`. The labels are `[B, T]`,
# and -100 outside the response. Logits at a position predict the *next*
# label. Its gradient by the student's logits should be that of its value.

# %% [markdown]
# An `assert` that fails rejects a loss, and so does any other error, or
# `return False`. The check says which ideas your tests lack.


# %% question="9.6" part="answer"
def test_loss(loss) -> None:
    """Raise where the loss is wrong. Give it batches with a response."""
    ### BEGIN SOLUTION
    torch.manual_seed(0)
    labels = torch.full((3, 9), -100)
    labels[0, 2:4], labels[1, 4:8], labels[2, 3] = 0, 5, 2
    mask = labels[:, 1:] != -100
    shape, exactly = (2, 3, 9, 12), {"rtol": 1e-4, "atol": 1e-6}
    for size, t in ((2, 1.0), (2, 3.0), (10, 1.0), (900, 1.0)):
        s, p = size * torch.randn(shape, dtype=torch.float64)
        s.requires_grad_()
        got = loss(s, p, labels, temperature=t)
        (slope,) = torch.autograd.grad(got, s)
        s = s.detach()
        log_q, log_p = ((x[:, :-1] / t).log_softmax(-1) for x in (s, p))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        torch.testing.assert_close(
            got.double(), t**2 * kl[mask].mean(), **exactly
        )
        right = torch.zeros_like(s)
        gap = (log_q.exp() - log_p.exp()) * mask[..., None]
        right[:, :-1] = t * gap / mask.sum()
        torch.testing.assert_close(slope.double(), right, **exactly)
    ### END SOLUTION


# %% question="9.6" part="check"
checks.check("9.6", test_loss)

# %% [markdown] question="9.6" part="hint"
# Start with one batch of several rows, responses of unlike length, padding,
# more than eight tokens in the vocabulary and a label that is 0. Compute the
# value by a formula of your own.

# %% [markdown] question="9.6" part="hint"
# Then the gradient, T (p_s - p_t) / N at the positions that predict, and zero
# elsewhere. Then another T. Then logits of a thousand.

# %% [markdown] question="9.6" part="note"
# Two numbers kill nearly all: the value and the gradient against a closed
# form, on a batch in which no two mistakes coincide. The rest is choosing
# inputs: rows of unlike length, T other than 1, a vocabulary larger than k, a
# student that is very wrong, logits that overflow.
