# %% [markdown]
# # Exercises 11 · Teachers in a box
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/exercises/ch11.ipynb)
#
# | what it costs | |
# |---|---|
# | your time | 85 minutes |
# | two CPU cores | seconds |
# | network, account, key | none |
#
# Read chapter 11 first (`notebooks/11_teachers_in_a_box.ipynb`).

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

# %% [markdown] question="11.1" part="task"
# ## 11.1 three_parts
#
# **11.1** · derive · difficulty 3/5 · importance 5/5 · 15 minutes · 5 points
#
# The KL of one token is the sum of three parts: *between*, *kept* and *tail*.
# **Derive them** from the two distributions and the ids that were kept, and
# type them in. Their sum must be the whole KL.


# %% question="11.1" part="answer"
def three_parts(
    p_t: torch.Tensor, p_s: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """[between, kept, tail], in nats.

    p_t, p_s: [V] the teacher's and the student's distribution; all positive
    kept:     [k] the ids that were written down, k < V
    """
    ### BEGIN SOLUTION
    inside = torch.zeros(len(p_t), dtype=torch.bool)
    inside[kept] = True
    parts = [torch.zeros((), dtype=p_t.dtype)]
    for group in (inside, ~inside):
        m_t, m_s = p_t[group].sum(), p_s[group].sum()
        t, s = p_t[group] / m_t, p_s[group] / m_s
        parts[0] = parts[0] + m_t * (m_t / m_s).log()
        parts.append(m_t * (t * (t / s).log()).sum())
    return torch.stack(parts)
    ### END SOLUTION


# %% question="11.1" part="check"
checks.check("11.1", three_parts)

# %% [markdown] question="11.1" part="hint"
# Write p = m times (p / m) on both sides, for the kept tokens and for the
# others. The logarithm of a product is a sum.

# %% [markdown] question="11.1" part="hint"
# Each of the two conditional KLs is weighted by the teacher's mass of its
# group. *Between* is the KL of two masses from two masses.

# %% [markdown] question="11.1" part="note"
# A tail bucket sees the first two. A renormalised loss is the second without
# its weight. Nobody who kept k entries can see the third.

# %% [markdown] question="11.2" part="task"
# ## 11.2 cut_gradient
#
# **11.2** · code · difficulty 3/5 · importance 4/5 · 15 minutes · 5 points
#
# A custom kernel must return the gradient of the *zero tail* loss,
# $L = \sum_{v \in K} p_t(v) \log \frac{p_t(v)}{p_s(v)}$, by the student's
# logits. Write it without autograd. The student is normalised over its whole
# vocabulary.


# %% question="11.2" part="answer"
def cut_gradient(
    student_logits: torch.Tensor,
    indices: torch.Tensor,
    log_probs: torch.Tensor,
) -> torch.Tensor:
    """dL/dz, [V], of one token.

    student_logits: [V]
    indices:        [k] the kept ids
    log_probs:      [k] the teacher's log-probabilities there, normalised over
                    its whole vocabulary
    """
    ### BEGIN SOLUTION
    p_s = student_logits.softmax(-1)
    w = torch.zeros_like(p_s).scatter(0, indices, log_probs.exp())
    return w.sum() * p_s - w
    ### END SOLUTION


# %% question="11.2" part="check"
checks.check("11.2", cut_gradient)

# %% [markdown] question="11.2" part="hint"
# Only -log p_s(v) depends on z. Its derivative by z_u is p_s(u) - [u = v].

# %% [markdown] question="11.2" part="hint"
# Sum that over the kept v with weights p_t(v). The weights do not sum to one.

# %% [markdown] question="11.2" part="note"
# The entries of this gradient sum to zero, as they must: adding a constant to
# all logits changes nothing. p_s - w does not sum to zero. It is the gradient
# of the whole KL with the tail of the teacher forgotten, and of no loss.

# %% [markdown] question="11.3" part="task"
# ## 11.3 drawn_loss
#
# **11.3** · code · difficulty 3/5 · importance 5/5 · 15 minutes · 5 points
#
# A cache holds $n$ ids for each token, drawn from the teacher with
# replacement, some of them more than once. Compute the
# cross-entropy of each token from them, so that its expectation over the draws
# is the cross-entropy from the whole distribution,
# $-\sum_v p_t(v) \log p_s(v)$.


# %% question="11.3" part="answer"
def drawn_loss(
    student_logits: torch.Tensor, drawn: torch.Tensor, log_probs: torch.Tensor
) -> torch.Tensor:
    """[N] the loss of each token, in nats.

    student_logits: [N, V]
    drawn:          [N, n] ids
    log_probs:      [N, n] the teacher's log-probabilities of these ids, as
                    the file holds them
    """
    ### BEGIN SOLUTION
    log_p_s = student_logits.log_softmax(-1)
    return -log_p_s.gather(-1, drawn).mean(-1)
    ### END SOLUTION


# %% question="11.3" part="check"
checks.check("11.3", drawn_loss)

# %% [markdown] question="11.3" part="hint"
# A likely token is drawn more often. That is all the weight it needs.

# %% [markdown] question="11.3" part="hint"
# The mean of -log p_s over the draws, with repeats. The student's softmax is
# over its whole vocabulary.

# %% [markdown] question="11.3" part="note"
# Weighting a draw by p_t as well counts the teacher twice: the expectation is
# then that of p_t squared. Dropping repeats makes rare tokens as heavy as
# frequent ones. Both look reasonable, and both are biased at every n.

# %% [markdown] question="11.4" part="task"
# ## 11.4 calibration_error
#
# **11.4** · code · difficulty 2/5 · importance 4/5 · 12 minutes · 4 points
#
# The expected calibration error: put tokens into bins of equal width by their
# confidence; in each bin take the gap between mean confidence and mean hits;
# average the gaps, each weighted by its tokens. Bin $b$ holds
# $\frac{b}{B} \le$ confidence $< \frac{b + 1}{B}$, and the last bin holds 1
# as well.


# %% question="11.4" part="answer"
def calibration_error(
    confidence: torch.Tensor, hits: torch.Tensor, bins: int
) -> torch.Tensor:
    """One number between 0 and 1.

    confidence: [N] the probability of the favourite, up to 1 inclusive
    hits:       [N] whether, or how probably, the favourite was right
    """
    ### BEGIN SOLUTION
    place = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=confidence.dtype)
    gap = gap.index_add(0, place, confidence - hits)
    return gap.abs().sum() / len(confidence)
    ### END SOLUTION


# %% question="11.4" part="check"
checks.check("11.4", calibration_error)

# %% [markdown] question="11.4" part="hint"
# The weight of a bin cancels against the division in its means.

# %% [markdown] question="11.4" part="hint"
# Sum confidence minus hits in each bin, take absolute values, add, and divide
# by the number of all tokens once.

# %% [markdown] question="11.4" part="note"
# The absolute value comes after the sum over a bin. Before it, every token is
# its own bin, and a calibrated coin has an error of one half. Without it, a
# student that is too sure here and too modest there comes out as perfect.

# %% [markdown] question="11.5" part="task"
# ## 11.5 forecasts
#
# **11.5** · predict · difficulty 2/5 · importance 4/5 · 10 minutes · 5 points
#
# **Guess first**, without running code.
#
# - `bytes`: A vocabulary of 151,936 tokens, 64 entries a token, ids in 4 bytes
#   and log-probabilities in 2, and the response's id. Bytes a token?
# - `disk`: Two billion tokens of that, in terabytes.
# - `sure`: A teacher is 0.35 sure of its favourite, and its two likeliest
#   hold 0.5. How sure is the best student of the zero tail?
# - `below`: How far below zero is that student's loss, in nats?
# - `draws`: A loss from 4 draws has a standard deviation of 0.3. How many
#   draws would bring it to 0.1?
#
# A guess counts as right within a factor of 1.5, and half otherwise.

# %% question="11.5" part="answer"
### BEGIN SOLUTION
forecasts = {
    "bytes": 388,
    "disk": 0.78,
    "sure": 0.7,
    "below": 0.35,
    "draws": 36,
}
### STUB
# forecasts = {
#     "bytes": ...,
#     "disk": ...,
#     "sure": ...,
#     "below": ...,
#     "draws": ...,
# }
### END SOLUTION

# %% question="11.5" part="check"
checks.check("11.5", forecasts)

# %% [markdown] question="11.5" part="hint"
# Six bytes an entry. The best student divides by m.

# %% [markdown] question="11.5" part="hint"
# The least loss is m log m, and log 0.5 is about -0.69. A third of the
# deviation is a ninth of the variance.

# %% [markdown] question="11.5" part="note"
# A student that says 0.7 and should say 0.35: that error was computed before
# anything was trained.

# %% [markdown] question="11.6" part="task"
# ## 11.6 what_the_box_hides
#
# **11.6** · explain · difficulty 3/5 · importance 5/5 · 18 minutes · 5 points
#
# One option of each item is right. Say to yourself why the others are not,
# before you check.

# %% [markdown] question="11.6" part="options"
# **a.** A loss renormalises both sides on the *student's* ten likeliest
# tokens. It stands at zero. Then
#
# - **A** student and teacher agree on all tokens that matter.
#   > wrong: Which tokens matter was decided by the student. A mode of the
#   > teacher that the student lacks is not among them.
# - **B** the teacher may have a likely token that the student never says.
#   > right: The support is the student's, so what it does not say is not
#   > looked at. Only the ratios on its own ten tokens were compared.
# - **C** the student is the teacher's sharpened copy.
#   > wrong: Nothing in the loss says so: only ratios on ten tokens are
#   > compared, and these are right.

# %% [markdown] question="11.6" part="options"
# **b.** A cut sum of 32 entries is often negative in the log. Someone writes
# `loss.clamp(min=0)`. What changes?
#
# - **A** Nothing: a KL is never negative, so the negative part was rounding.
#   > wrong: A cut sum is no KL. Its least value is m log m, below zero.
# - **B** The student stays calibrated, because it is no longer rewarded for
#   sharpness.
#   > wrong: A stopped gradient rewards nothing and repairs nothing; other
#   > tokens go on as before.
# - **C** The tokens that are clamped no longer train.
#   > right: The slope of the clamp is zero there. In verl-project/verl#7856
#   > it was active in 415 of 467 steps.

# %% [markdown] question="11.6" part="options"
# **c.** The cache holds log-probabilities of 16 tokens at temperature 1. The
# next student shall be trained at temperature 4. What is needed?
#
# - **A** A new cache.
#   > right: The share of the tail at temperature 4 depends on how it is
#   > spread, and that was not written down.
# - **B** The 16 numbers divided by 4, and a softmax over them.
#   > wrong: That renormalises on the 16, and at temperature 4 most of the mass
#   > may be elsewhere.
# - **C** The 16 numbers and the bucket's, over 4, and a softmax over 17.
#   > wrong: It treats the tail as one token. A hundred tokens of r/100 weigh
#   > far more at temperature 4 than one token of r.

# %% [markdown] question="11.6" part="options"
# **d.** The teacher is served by vLLM. The request says `temperature: 2`. The
# prompt log-probabilities that come back are
#
# - **A** at temperature 2, because the request says so.
#   > wrong: The temperature of a request is that of sampling.
# - **B** at temperature 1, whatever the request says.
#   > right: Unless the server was started to process them, they are the
#   > model's own (verl-project/verl#5592).
# - **C** at temperature 2 for drawn tokens and at 1 for those of the prompt.
#   > wrong: Nothing is drawn here but one token that is thrown away.

# %% [markdown] question="11.6" part="options"
# **e.** A tokenizer was trained anew, to the same size, on the same texts plus
# one. A cache of the old one is read with it. Without a fingerprint
#
# - **A** the first batch raises an error, because ids are out of range.
#   > wrong: The size is the same, so every id is in range.
# - **B** the loss is higher at first, then training repairs it.
#   > wrong: It falls, and what it learns is another language: an id stands for
#   > another word on each side.
# - **C** the loss falls as ever, towards the distribution of other words.
#   > right: Ids are numbers. Nothing in them says which word they were.

# %% question="11.6" part="answer"
### BEGIN SOLUTION
what_the_box_hides = {
    "a": "B",
    "b": "C",
    "c": "A",
    "d": "B",
    "e": "C",
}
### STUB
# what_the_box_hides = {
#     "a": ...,
#     "b": ...,
#     "c": ...,
#     "d": ...,
#     "e": ...,
# }
### END SOLUTION

# %% question="11.6" part="check"
checks.check("11.6", what_the_box_hides)

# %% [markdown] question="11.6" part="hint"
# Ask in each item what was written down, and what had to be known.

# %% [markdown] question="11.6" part="hint"
# For c, compare one token of probability 0.01 with a hundred of 0.0001, both
# to the power of one quarter.

# %% [markdown] question="11.6" part="note"
# A cache and a server both speak of a distribution that is no longer there to
# be asked. What they do not say has to be proven, or done without.
