# %% [markdown]
# # Exercises 4 · Cross-entropy for distillation
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/exercises/ch04.ipynb)
#
# | what it costs | |
# |---|---|
# | your time | 95 minutes |
# | two CPU cores | seconds |
# | network, account, key | none |
#
# Read chapter 4 first (`notebooks/04_cross_entropy.ipynb`).

# %% [markdown]
# Each exercise has a cell for your answer and a cell that checks it. A check
# says *not attempted*, *raised*, *wrong* or *right*, and names the mistake
# where it knows it. Below each check stand two hints and the solution: take
# away the `#` in front of a line and run the cell.
#
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

# %% [markdown] question="4.1" part="task"
# ## 4.1 soft_cross_entropy
#
# **4.1** · code · difficulty 3/5 · importance 5/5 · 20 minutes · 4 points
#
# The loss of the chapter, for real logits. Three things happen to those that
# do not happen to three tokens:
#
# - They are large. A logit of 500 is a legal logit.
# - Some tokens are **masked**: both models put $-\infty$ there. Such a token
#   adds nothing to the loss.
# - The two vocabularies have different **padded sizes**. Qwen2.5 has 151,936
#   rows in its small models and 152,064 in its large ones. The tokens that
#   both have come first; what only one side has is padding, and no
#   probability belongs there.


# %% question="4.1" part="answer"
def soft_cross_entropy(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the student under the teacher, in nats, per token.

    student_logits [N, V_s], teacher_logits [N, V_t]: float64. A token is
        masked on both sides (-inf) or on none.

    Returns [N].
    """
    ### BEGIN SOLUTION
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    p = teacher_logits[:, :shared].softmax(-1)
    log_q = student_logits[:, :shared].log_softmax(-1)
    return -(p * log_q.where(p > 0, 0.0)).sum(-1)
    ### END SOLUTION


# %% question="4.1" part="check"
checks.check("4.1", soft_cross_entropy)

# %% [markdown] question="4.1" part="hint"
# Cut both sides to the tokens that they share before you normalise. Take the
# student's logarithm together with its softmax: `log_softmax`.

# %% [markdown] question="4.1" part="hint"
# At a masked token p is 0 and log q is -inf, and their product is NaN.
# `torch.where(p > 0, log_q, 0.0)` replaces the factor before it is used.

# %% [markdown] question="4.1" part="note"
# Cut first, then normalise: a softmax over padding would give probability to
# tokens that do not exist. `log_softmax` keeps the logarithm finite where the
# probability is smaller than any float. The factor is replaced *before* the
# product, so that no NaN is made, in the gradient either.

# %% [markdown] question="4.2" part="task"
# ## 4.2 batch_gradient
#
# **4.2** · code · difficulty 4/5 · importance 5/5 · 25 minutes · 5 points
#
# Write down the gradient of a whole distillation loss **without autograd**.
# The loss is
#
# $$L = \frac{T^2}{N} \sum_{\text{supervised tokens}} \mathrm{CE}\big(
#   \mathrm{softmax}(z^t / T),\ \mathrm{softmax}(z^s / T)\big).$$
#
# The batch is as Hugging Face makes it. The logits at position $i$ predict
# the token at position $i + 1$. Where `labels` is -100, the token is prompt or
# padding and is not supervised. $N$ is the number of supervised tokens in the
# whole batch. Nothing predicts the token at position 0.


# %% question="4.2" part="answer"
def batch_gradient(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """dL / d student_logits, of shape [B, L, V].

    student_logits, teacher_logits [B, L, V]: float64
    labels [B, L]: token ids, or -100
    """
    ### BEGIN SOLUTION
    p_s = (student_logits / temperature).softmax(-1)
    p_t = (teacher_logits / temperature).softmax(-1)
    supervised = labels[:, 1:] != -100
    gradient = torch.zeros_like(student_logits)
    gradient[:, :-1] = (p_s - p_t)[:, :-1] * supervised.unsqueeze(-1)
    return temperature * gradient / supervised.sum()
    ### END SOLUTION


# %% question="4.2" part="check"
checks.check("4.2", batch_gradient)

# %% [markdown] question="4.2" part="hint"
# Start with one supervised token and T = 1. Then ask which row of the logits
# it belongs to, and what each of the factors T^2, 1/T and 1/N does.

# %% [markdown] question="4.2" part="hint"
# `supervised = labels[:, 1:] != -100` belongs to the positions `[:, :-1]`. The
# chain rule through z / T gives 1/T, and T^2 stands in front of the loss.

# %% [markdown] question="4.2" part="note"
# T^2 / N from the loss, 1/T from the chain rule: T (p_s - p_t) / N, at the
# positions that predict a supervised token and zero elsewhere. This one
# formula sees scale, sign, temperature, mask, shift and mean at once. kdlib
# holds every loss to it, as its first law.

# %% [markdown] question="4.3" part="task"
# ## 4.3 best_smoothing
#
# **4.3** · derive · difficulty 4/5 · importance 3/5 · 20 minutes · 4 points
#
# You may have only *one* label $y$ for each token, drawn from the teacher's
# $p$. Label smoothing replaces it by
#
# $$\tilde p = (1 - \varepsilon)\, e_y + \varepsilon\, u,
#   \qquad u_v = \tfrac1V .$$
#
# That pulls a noisy target towards a wrong one: less noise, more bias. Write
# down the mean squared error $\mathbb E_y \|\tilde p - p\|^2$ as bias plus
# noise, and **derive the $\varepsilon$ that makes it smallest**. What is it
# for a teacher that is sure, and for one that knows nothing?


# %% question="4.3" part="answer"
def best_smoothing(teacher_probs: torch.Tensor) -> torch.Tensor:
    """The epsilon of the smallest mean squared error, for each row.

    teacher_probs [N, V]: rows that sum to one, float64

    Returns [N].
    """
    ### BEGIN SOLUTION
    squares = teacher_probs.square().sum(-1)
    return (1 - squares) / (1 - 1 / teacher_probs.shape[-1])
    ### END SOLUTION


# %% question="4.3" part="check"
checks.check("4.3", best_smoothing)

# %% [markdown] question="4.3" part="hint"
# The mean of the smoothed target is (1 - e) p + e u. Its distance from p is
# the bias. What varies around that mean is (1 - e) times the label.

# %% [markdown] question="4.3" part="hint"
# Error(e) = e^2 |u - p|^2 + (1 - e)^2 (1 - sum p^2). Here |u - p|^2 is
# sum p^2 - 1/V, because u.p = 1/V. Set the derivative by e to zero.

# %% [markdown] question="4.3" part="note"
# e = (1 - sum p^2) / (1 - 1/V): the label's noise, divided by the largest
# noise that there can be. A sure teacher needs no smoothing; where it knows
# nothing, the label says nothing and e is 1. The best strength depends on the
# token, while a recipe has one for all. With the distribution itself at hand
# you need none of it.

# %% [markdown] question="4.4" part="task"
# ## 4.4 label_noise_share
#
# **4.4** · code · difficulty 3/5 · importance 4/5 · 15 minutes · 4 points
#
# You could ask the teacher for whole distributions, which is dearer than one
# sampled answer. Is it worth it *now*, for this student? Let an input be
# picked at random from $N$ inputs and a label be drawn from the teacher's
# $p^t_x$. The gradient by the logits is $p^s_x - e_y$. Which **share** of its
# variance (all entries added up) comes from the label and would be gone with
# whole distributions?


# %% question="4.4" part="answer"
def label_noise_share(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor
) -> float:
    """Variance that comes from the label, divided by all variance.

    student_logits, teacher_logits [N, V]: float64, one row an input

    The N inputs are all there are, and equally likely. Returns one number.
    """
    ### BEGIN SOLUTION
    p_t, p_s = teacher_logits.softmax(-1), student_logits.softmax(-1)
    label = (1 - p_t.square().sum(-1)).mean()
    gap = p_s - p_t
    inputs = (gap - gap.mean(0)).square().sum(-1).mean()
    return label / (label + inputs)
    ### END SOLUTION


# %% question="4.4" part="check"
checks.check("4.4", label_noise_share)

# %% [markdown] question="4.4" part="hint"
# The law of total variance: the mean over the inputs of the variance within
# one, plus the variance over the inputs of the mean within one.

# %% [markdown] question="4.4" part="hint"
# Within an input the variance is 1 - sum p_t^2, and the mean is p_s - p_t.
# Its variance over the inputs is the mean of |gap - mean gap|^2.

# %% [markdown] question="4.4" part="note"
# The share grows as the student improves: the label's noise stays, the
# inputs' noise goes to zero with the gaps. At p_s = p_t it is 1, whatever the
# teacher. Subtracting the mean gap matters: what all inputs agree on is no
# noise.

# %% [markdown] question="4.5" part="task"
# ## 4.5 losses_in_nats
#
# **4.5** · predict · difficulty 2/5 · importance 4/5 · 5 minutes · 5 points
#
# A vocabulary has 151,936 tokens. At a certain token the teacher is torn
# evenly between four of them and rules out the rest. **Guess first**, without
# running code. All losses are cross-entropies in nats, at this token:
#
# - `start`: of a student that gives every token of the vocabulary the same;
# - `best`: of the best student that there can be;
# - `bold`: of a student that gives one of the four tokens 0.97, and each of
#   the other three 0.01;
# - `noise`: not a loss, but the noise of one sampled label (all entries
#   added up);
# - `labels`: how many sampled labels must be averaged until that noise is
#   0.01.
#
# A guess counts as right within a factor of 1.5, and half otherwise.

# %% question="4.5" part="answer"
### BEGIN SOLUTION
losses_in_nats = {
    "start": 11.93,
    "best": 1.386,
    "bold": 3.46,
    "noise": 0.75,
    "labels": 75,
}
### STUB
# losses_in_nats = {
#     "start": ...,
#     "best": ...,
#     "bold": ...,
#     "noise": ...,
#     "labels": ...,
# }
### END SOLUTION

# %% question="4.5" part="check"
checks.check("4.5", losses_in_nats)

# %% [markdown] question="4.5" part="hint"
# Which of them depends on the size of the vocabulary? A natural logarithm of
# 10 is 2.3.

# %% [markdown] question="4.5" part="hint"
# For `bold`, the teacher gives a quarter to each token: the mean of three
# large surprises and a small one. For `noise`, 1 minus the sum of squares.

# %% [markdown] question="4.5" part="note"
# log 151,936 = 11.9 at the start, log 4 = 1.39 at best. The bold student has
# the right favourite and a loss of 3.5: three quarters of the time the teacher
# says something that it finds hardly possible. The noise is 1 - 4/16, and 75
# labels bring it to 0.01.

# %% [markdown] question="4.6" part="task"
# ## 4.6 which_target
#
# **4.6** · explain · difficulty 3/5 · importance 5/5 · 10 minutes · 5 points
#
# One option of each item is right. Say to yourself why the others are not,
# before you check.

# %% [markdown] question="4.6" part="options"
# **a.** Student and teacher start from the same checkpoint and read the same
# input. Somebody asks: "The cross-entropy must then be zero. Is there anything
# to learn?"
#
# - **A** The loss is zero and so is the gradient.
#   > wrong: The loss is the teacher's entropy, which is above zero unless
#   > the teacher is certain.
# - **B** The loss is the teacher's entropy, and the gradient is zero.
#   > right: The gradient is p_s - p_t. The question was asked in
#   > qinenergy/cotta#18.
# - **C** The loss is the teacher's entropy, so the gradient pulls it down.
#   > wrong: Nothing can pull a loss below its smallest value, and p_s - p_t
#   > is zero here.

# %% [markdown] question="4.6" part="options"
# **b.** A run's cross-entropy falls from -0.3 to -40, steadily. What is the
# likely cause?
#
# - **A** The student has become more certain than its teacher.
#   > wrong: Then the loss would be above the teacher's entropy, as for every
#   > student that differs from it.
# - **B** The teacher's entropy has been subtracted.
#   > wrong: That gives the KL, which is never negative either.
# - **C** A minus sign is missing.
#   > right: A mean of -log q cannot be negative. A printed formula without
#   > its minus, once minimised, makes the teacher's tokens unlikely.

# %% [markdown] question="4.6" part="options"
# **c.** For an input you have a label from the data, and the answer that the
# teacher writes to it. In which way do they differ as targets?
#
# - **A** The teacher's answer says what the teacher does, right or wrong; the
#   label says what somebody else did.
#   > right: Only the former belongs to the objective, whose target is the
#   > teacher. Where the teacher has read another context, the two may even
#   > answer different questions.
# - **B** In none: both are one-hot, and the loss is the same function.
#   > wrong: The function is the same, but it is minimised by another
#   > student.
# - **C** The label has more noise, as it comes from people.
#   > wrong: It may have less. What counts is whose distribution it was drawn
#   > from.

# %% [markdown] question="4.6" part="options"
# **d.** One label is drawn for each training token, **once**, and the same
# labels are read in thirty epochs. Is the student still taught without bias?
#
# - **A** Yes: the draw was unbiased, and reading it again does not change it.
#   > wrong: The mean over draws is right, but there was one draw. A student
#   > that can learn it by heart learns that draw, not the teacher.
# - **B** No: it learns the drawn labels by heart, as if they were certain.
#   > right: Unbiased means right on average over draws. New draws at each
#   > visit, or more inputs, take that average; reading one draw again does
#   > not.
# - **C** No: a drawn label is biased towards the teacher's favourite.
#   > wrong: The mean over draws is the teacher's distribution. It is the
#   > arg max that is biased so.

# %% [markdown] question="4.6" part="options"
# **e.** In which case are whole distributions worth least, compared with the
# teacher's greedy answers?
#
# - **A** The teacher has nearly no entropy at any token.
#   > right: Then distribution, sample and favourite are one target. This is
#   > the phone app, with its instruction.
# - **B** The student is already close to the teacher.
#   > wrong: There a label's noise is nearly all of the gradient's variance.
# - **C** The teacher is torn between several good answers.
#   > wrong: Then the greedy answer is one of them, for ever.

# %% question="4.6" part="answer"
### BEGIN SOLUTION
which_target = {
    "a": "B",
    "b": "C",
    "c": "A",
    "d": "B",
    "e": "A",
}
### STUB
# which_target = {
#     "a": ...,
#     "b": ...,
#     "c": ...,
#     "d": ...,
#     "e": ...,
# }
### END SOLUTION

# %% question="4.6" part="check"
checks.check("4.6", which_target)

# %% [markdown] question="4.6" part="hint"
# In each item ask what is averaged over: the teacher's tokens, the draws, or
# the inputs.

# %% [markdown] question="4.6" part="hint"
# The gradient is p_s minus the target. A mean over draws is only taken if
# something is drawn more than once.

# %% [markdown] question="4.6" part="note"
# Three questions sort all of these. Whose distribution is the target drawn
# from? Is it averaged, and over what? How torn is it?
