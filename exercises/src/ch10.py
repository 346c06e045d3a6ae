# %% [markdown]
# # Exercises 10 · The GPU loop
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/exercises/ch10.ipynb)
#
# | what it costs | |
# |---|---|
# | your time | 80 minutes |
# | two CPU cores | seconds |
# | network, account, key | none |
#
# Read chapter 10 first (`notebooks/10_the_gpu_loop.ipynb`).

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

# %% [markdown] question="10.1" part="task"
# ## 10.1 hand_in
#
# **10.1** · code · difficulty 3/5 · importance 5/5 · 15 minutes · 6 points
#
# A step runs on R processes, each with K micro-batches. For each micro-batch
# there is the *sum* of the per-token gradients, and the number of its tokens.
# After the last one each process hands one gradient to the engine, which
# **averages** over processes. Return what each of them hands in, so that the
# average is the gradient of the token mean over the whole step.


# %% question="10.1" part="answer"
def hand_in(sums: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """What each process gives to the engine: [R, P].

    sums:   [R, K, P] summed per-token gradients, P parameters
    tokens: [R, K] response tokens of each micro-batch
    """
    ### BEGIN SOLUTION
    ranks = len(sums)
    return ranks * sums.sum(1) / tokens.sum()
    ### END SOLUTION


# %% question="10.1" part="check"
checks.check("10.1", hand_in)

# %% [markdown] question="10.1" part="hint"
# Write down the gradient that the optimiser should see: all sums over all
# tokens. Each process can give its part of that.

# %% [markdown] question="10.1" part="hint"
# The engine divides by R. What has to be multiplied in before?

# %% [markdown] question="10.1" part="note"
# The count is one number for all, known before the first forward pass. It is
# the only thing that processes have to tell each other besides gradients.

# %% [markdown] question="10.2" part="task"
# ## 10.2 for_the_optimiser
#
# **10.2** · code · difficulty 3/5 · importance 4/5 · 15 minutes · 5 points
#
# In fp16 the loss of every micro-batch was multiplied by a scale before its
# backward pass. The micro-batches hold shares of one gradient. Return what
# the optimiser gets: the whole gradient, shortened to the limit where it is
# longer, and all zeros where anything overflowed (that step is left out).


# %% question="10.2" part="answer"
def for_the_optimiser(
    scaled: torch.Tensor, scale: float, limit: float
) -> torch.Tensor:
    """The gradient after accumulation, scaler and clipping: [P].

    scaled: [K, P] each micro-batch's gradient, times `scale`; may hold inf
    limit:  the largest length that a gradient may have
    """
    ### BEGIN SOLUTION
    gradient = scaled.sum(0) / scale
    if not torch.isfinite(gradient).all():
        return torch.zeros_like(gradient)
    return gradient * (limit / gradient.norm()).clamp(max=1)
    ### END SOLUTION


# %% question="10.2" part="check"
checks.check("10.2", for_the_optimiser)

# %% [markdown] question="10.2" part="hint"
# There are four things to do: add, divide by the scale, look for an overflow,
# clip. The length is that of the gradient that is really meant.

# %% [markdown] question="10.2" part="hint"
# Clipping multiplies the whole vector by min(1, limit / length). Its direction
# stays.

# %% [markdown] question="10.2" part="note"
# torch adds 1e-6 to the length before it divides, which nobody notices.
# GradScaler also halves its scale after an overflow, so that the next step is
# likelier to fit. kdlib gives up below 2^-14: then the gradients themselves
# are not finite.

# %% [markdown] question="10.3" part="task"
# ## 10.3 through_the_cap
#
# **10.3** · derive · difficulty 4/5 · importance 3/5 · 20 minutes · 4 points
#
# Gemma's head has a *soft cap*: of a raw logit $r$ it makes
# $z = c \tanh(r / c)$. A fused loss computes the raw logits and has to return
# the gradient for them. **Derive it for the weighted forward KL**
# $\sum_n w_n\, \mathrm{KL}(p_t \,\|\, p_s)_n$, and type it in.


# %% question="10.3" part="answer"
def through_the_cap(
    raw: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor, cap: float
) -> torch.Tensor:
    """The gradient of the loss by the student's raw logits: [N, V].

    raw:     [N, V] the student's logits before the cap
    teacher: [N, V] the teacher's probabilities
    weights: [N] of the tokens
    """
    ### BEGIN SOLUTION
    tanh = (raw / cap).tanh()
    student = (cap * tanh).softmax(-1)
    return weights[:, None] * (student - teacher) * (1 - tanh**2)
    ### END SOLUTION


# %% question="10.3" part="check"
checks.check("10.3", through_the_cap)

# %% [markdown] question="10.3" part="hint"
# For the capped logits it is the gradient that you know. One more factor takes
# it to the raw ones.

# %% [markdown] question="10.3" part="hint"
# The derivative of c tanh(r / c) by r is 1 - tanh(r / c)^2: both c cancel.

# %% [markdown] question="10.3" part="note"
# Where a raw logit is far beyond the cap, the slope is nearly zero: the cap
# also stops learning there. A loss that ignores it trains another model than
# the one that is served, and looks well doing so.

# %% [markdown] question="10.4" part="task"
# ## 10.4 padding_share
#
# **10.4** · code · difficulty 2/5 · importance 3/5 · 10 minutes · 4 points
#
# Rows come in a given order. Windows of `window` batches are cut from them;
# within each window rows are sorted by length and cut into batches of `size`.
# A batch is padded to its longest row. The last window, and the last batch,
# may be short. What share of all computed places is padding?


# %% question="10.4" part="answer"
def padding_share(lengths: torch.Tensor, size: int, window: int) -> float:
    """Padding over all places, real and padded.

    lengths: [N] whole numbers, the rows in their order
    size:    rows a batch
    window:  batches a window
    """
    ### BEGIN SOLUTION
    made = 0
    for part in lengths.split(size * window):
        for batch in part.sort().values.split(size):
            made += len(batch) * batch.max().item()
    return 1 - lengths.sum().item() / made
    ### END SOLUTION


# %% question="10.4" part="check"
checks.check("10.4", padding_share)

# %% [markdown] question="10.4" part="hint"
# Count the places of each batch: rows times the longest. The sum of all
# lengths is what is real.

# %% [markdown] question="10.4" part="hint"
# `tensor.split(n)` cuts a tensor into pieces of n, the last one shorter.

# %% [markdown] question="10.4" part="note"
# A window of one batch sorts nothing that matters. A window of all rows has
# the least padding, and the same batches at every pass. kdlib takes 16
# batches, and shuffles before and after.

# %% [markdown] question="10.5" part="task"
# ## 10.5 forecasts
#
# **10.5** · predict · difficulty 3/5 · importance 4/5 · 8 minutes · 4 points
#
# **Guess first**, without running code.
#
# - `matrix`: 4 rows of 2,048 response tokens, 128,256 words. One matrix of
#   logits in float32, in GiB.
# - `adamw`: A student of 3 billion parameters. Weights and AdamW's moments,
#   all in float32, in GiB.
# - `tokens_per_s`: A student of 1 billion parameters at MFU 0.4 on a card of
#   989 TFLOP/s, targets from a file, attention left out.
# - `quarter`: A student near its teacher comes four times nearer in its
#   logits. By what factor does its KL fall?
#
# A guess counts as right within a factor of 1.5, and half otherwise.

# %% question="10.5" part="answer"
### BEGIN SOLUTION
forecasts = {
    "matrix": 3.9,
    "adamw": 33.5,
    "tokens_per_s": 66_000,
    "quarter": 16,
}
### STUB
# forecasts = {
#     "matrix": ...,
#     "adamw": ...,
#     "tokens_per_s": ...,
#     "quarter": ...,
# }
### END SOLUTION

# %% question="10.5" part="check"
checks.check("10.5", forecasts)

# %% [markdown] question="10.5" part="hint"
# 8,192 tokens times 128,256 is about a billion. AdamW holds three numbers for
# each weight, itself included.

# %% [markdown] question="10.5" part="hint"
# Training takes 6 operations a parameter and token. A KL is of second order.

# %% [markdown] question="10.5" part="note"
# 3.9 GiB, 33.5 GiB, 66,000 tokens a second, 16. And the gradients, 11 GiB, are
# not in the second number: they are not there between steps.

# %% [markdown] question="10.6" part="task"
# ## 10.6 what_changes
#
# **10.6** · explain · difficulty 3/5 · importance 5/5 · 12 minutes · 5 points
#
# One option of each item is right. Say to yourself why the others are not,
# before you check.

# %% [markdown] question="10.6" part="options"
# **a.** A run is resumed in its second pass over the data. Its loss then lies
# a little *below* the curve of a run that was not stopped. Most likely
#
# - **A** the moments were lost, and AdamW takes larger steps.
#   > wrong: Larger steps after a start without moments mostly raise the loss,
#   > for a while.
# - **B** the order of the data began anew, so that rows come again which were
#   trained on a moment ago.
#   > right: A row that has just been seen is answered better. ms-swift#10050
#   > replayed the order of the first pass in this way.
# - **C** the random state was lost, so that dropout drops fewer numbers.
#   > wrong: Other numbers are dropped, and as many of them.

# %% [markdown] question="10.6" part="options"
# **b.** `micro_batch_size` is halved, with the fused loss. What stays as it
# is?
#
# - **A** The bytes that the layers keep for the backward pass.
#   > wrong: They are kept for one micro-batch at a time: half.
# - **B** The time of a step, to the last millisecond.
#   > wrong: Smaller products are less efficient, and dW is written twice as
#   > often.
# - **C** The loss, but for the rounding of its sum.
#   > right: Every micro-batch divides by the count of the whole step.

# %% [markdown] question="10.6" part="options"
# **c.** From one card to eight with FSDP2, as many rows *on each card* as
# before. Which bytes on a card do not shrink?
#
# - **A** What its layers keep for the backward pass.
#   > right: Each card has its own rows, and keeps what its own rows need.
# - **B** AdamW's moments.
#   > wrong: Each card holds an eighth of them.
# - **C** The teacher's weights.
#   > wrong: kdlib splits the teacher's blocks as well.

# %% [markdown] question="10.6" part="options"
# **d.** The fused loss returns `total` and, detached, `per_token`. Why may
# nobody differentiate `per_token`?
#
# - **A** Its values are too inexact.
#   > wrong: They are summed in float32, and `total` is made of them.
# - **B** It would need the teacher's gradient.
#   > wrong: The teacher gets none in either case.
# - **C** The gradients of all tokens have been added up before anybody could
#   say how to weigh them.
#   > right: dW is one sum. Weights per token have to be known before it is
#   > made.

# %% [markdown] question="10.6" part="options"
# **e.** A checkpoint is written into its final folder, file by file, the
# manifest first. What can a kill leave?
#
# - **A** A folder whose manifest promises files that are not there.
#   > right: Whoever trusts the manifest's presence takes half a checkpoint for
#   > a whole one. So it is written last, and one rename makes it visible.
# - **B** Nothing bad: files are written whole or not at all.
#   > wrong: A file is written in many pieces, and the disk may hold some of
#   > them.
# - **C** A damaged older checkpoint.
#   > wrong: The older one lies in another folder, which nobody touches.

# %% question="10.6" part="answer"
### BEGIN SOLUTION
what_changes = {
    "a": "B",
    "b": "C",
    "c": "A",
    "d": "C",
    "e": "A",
}
### STUB
# what_changes = {
#     "a": ...,
#     "b": ...,
#     "c": ...,
#     "d": ...,
#     "e": ...,
# }
### END SOLUTION

# %% question="10.6" part="check"
checks.check("10.6", what_changes)

# %% [markdown] question="10.6" part="hint"
# Ask in a what the model has seen. In b and c, ask what belongs to the rows
# and what belongs to the weights.

# %% [markdown] question="10.6" part="hint"
# In d, look at the fourth product. In e, name a moment between two writes.

# %% [markdown] question="10.6" part="note"
# Rows, weights and files: each has its own rule. What depends on rows is cut
# by micro-batches, what depends on weights by sharding, and a file counts
# from its rename on.
