# %% [markdown]
# # Exercises 13 · Onto the phone
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/exercises/ch13.ipynb)
#
# | what it costs | |
# |---|---|
# | your time | 90 minutes |
# | two CPU cores | seconds |
# | network, account, key | none |
#
# Read chapter 13 first (`notebooks/13_onto_the_phone.ipynb`).

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

# %% [markdown] question="13.1" part="task"
# ## 13.1 read_back
#
# **13.1** · code · difficulty 3/5 · importance 4/5 · 15 minutes · 5 points
#
# The chapter's rule is symmetric: the range is as wide below zero as above.
# Write the asymmetric one. Each output channel has a scale $s$ and a zero
# point $z$, so that
#
# $$k = \mathrm{round}(w / s) + z \in \{0, \dots, 2^b - 1\}, \qquad
#   \hat w = s\,(k - z).$$
#
# The range of a channel runs from its smallest weight to its largest, and
# contains 0, which a padded input needs exactly. $z$ has $b$ bits like $k$.


# %% question="13.1" part="answer"
def read_back(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """[out, in] the weights as they are read after rounding.

    weight: [out, in], as in torch.nn.Linear
    bits:   of the whole numbers and of the zero points

    No row is zero.
    """
    ### BEGIN SOLUTION
    low = weight.amin(1, keepdim=True).clamp(max=0)
    high = weight.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    whole = ((weight / scale).round() + zero).clamp(0, 2**bits - 1)
    return (whole - zero) * scale
    ### END SOLUTION


# %% question="13.1" part="check"
checks.check("13.1", read_back)

# %% [markdown] question="13.1" part="hint"
# With all weights of a row positive, the range starts at 0, not at the
# smallest weight.

# %% [markdown] question="13.1" part="hint"
# The scale is the width of the range over the number of steps. The zero point
# is the whole number that stands for the weight 0.

# %% [markdown] question="13.1" part="note"
# One scale an output channel can be taken out of the matrix product: the sum
# over inputs runs over whole numbers. A scale an input cannot. The zero point
# pays where a row is lopsided; for weights around zero it buys next to
# nothing, which is why weights are mostly quantised symmetrically.

# %% [markdown] question="13.2" part="task"
# ## 13.2 gradient_behind
#
# **13.2** · derive · difficulty 3/5 · importance 5/5 · 15 minutes · 4 points
#
# In training, the forward pass uses
# $\hat w = s \cdot \mathrm{clamp}(\mathrm{round}(w / s))$ with whole numbers
# from $-2^{b-1}$ to $2^{b-1} - 1$. The scale was chosen beforehand and is
# fixed, so some weights are clamped. The straight-through estimator replaces
# the derivative of round by 1, and of nothing else. **Derive what arrives at
# the float weight.**


# %% question="13.2" part="answer"
def gradient_behind(
    weight: torch.Tensor,
    upstream: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """[out, in] the gradient of the loss by the float weights.

    weight:   [out, in]
    upstream: [out, in] the gradient of the loss by the quantised weights
    scale:    [out, 1]
    """
    ### BEGIN SOLUTION
    whole = (weight / scale).round()
    half = 2 ** (bits - 1)
    inside = (whole >= -half) & (whole <= half - 1)
    return upstream * inside
    ### END SOLUTION


# %% question="13.2" part="check"
checks.check("13.2", gradient_behind)

# %% [markdown] question="13.2" part="hint"
# Chain rule: times s, times the derivative of clamp, times 1, times 1 / s.

# %% [markdown] question="13.2" part="hint"
# Clamp has the derivative 1 inside and 0 outside. Its argument is the rounded
# number.

# %% [markdown] question="13.2" part="note"
# The scale cancels. A clamped weight gets no gradient, so it stays where it is
# however wrong that is: one reason to let the scale follow the weights, as
# the chapter does.

# %% [markdown] question="13.3" part="task"
# ## 13.3 emitted
#
# **13.3** · code · difficulty 4/5 · importance 5/5 · 20 minutes · 4 points
#
# The draft has written token $x$. The large model looks at it: it keeps it, or
# another token is drawn. **Give the distribution of the token that comes out,
# given $x$**, under the rule of speculative decoding.
#
# Averaged over $x \sim q$ it must be $p$. That alone does not settle it: the
# rule keeps as many drafted tokens as any rule can.


# %% question="13.3" part="answer"
def emitted(p: torch.Tensor, q: torch.Tensor, drafted: int) -> torch.Tensor:
    """[V] the probability of each token to come out, given the drafted one.

    p, q: [V] the large model's distribution and the draft's, all positive
    """
    ### BEGIN SOLUTION
    keep = (p[drafted] / q[drafted]).clamp(max=1)
    missing = (p - q).clamp(min=0)
    out = (1 - keep) * missing / missing.sum()
    out[drafted] += keep
    return out
    ### END SOLUTION


# %% question="13.3" part="check"
checks.check("13.3", emitted)

# %% [markdown] question="13.3" part="hint"
# The token is kept with probability min(1, p(x) / q(x)).

# %% [markdown] question="13.3" part="hint"
# Tokens that the draft likes too much have been covered by it already. Draw
# the rest from max(0, p - q), with its sum made one.

# %% [markdown] question="13.3" part="note"
# Average over x ~ q: the kept part is min(p, q), and a rejection happens as
# often as the sum of max(0, p - q). So the second part is max(0, p - q), and
# both together are p. No rule can keep more than min(p, q), or tokens would
# come out too often.

# %% [markdown] question="13.4" part="task"
# ## 13.4 tokens_a_pass
#
# **13.4** · derive · difficulty 3/5 · importance 4/5 · 15 minutes · 4 points
#
# A draft of $k$ tokens is judged in one pass of the large model. The first
# rejected token is replaced and ends the round; if none is rejected, one more
# token is drawn. Each place has distributions of its own. For simplicity they
# do not depend on what was drafted before. **How many tokens come out of one
# pass, on average?**


# %% question="13.4" part="answer"
def tokens_a_pass(p: torch.Tensor, q: torch.Tensor) -> float:
    """The expected number of tokens.

    p: [k + 1, V] the large model's distributions
    q: [k, V] the draft's, at the first k places
    """
    ### BEGIN SOLUTION
    kept = p[:-1].minimum(q).sum(-1)
    return 1 + kept.cumprod(0).sum()
    ### END SOLUTION


# %% question="13.4" part="check"
checks.check("13.4", tokens_a_pass)

# %% [markdown] question="13.4" part="hint"
# How likely is one drafted token to be kept? Average min(1, p / q) over q.

# %% [markdown] question="13.4" part="hint"
# The number of kept tokens is the sum, over places, of the chance that this
# place and all before it were kept.

# %% [markdown] question="13.4" part="note"
# With the same overlap a everywhere this is the geometric sum
# (1 - a^(k+1)) / (1 - a), equation 1 of Leviathan et al. 2022. Early places
# count most: a poor overlap at the first place spoils all that follow.

# %% [markdown] question="13.5" part="task"
# ## 13.5 forecasts
#
# **13.5** · predict · difficulty 2/5 · importance 4/5 · 10 minutes · 5 points
#
# **Guess first**, without running code.
#
# - `bits`: Whole numbers of 4 bits, one float16 scale for 32 weights. Bits a
#   weight, all told?
# - `file`: A tied embedding of float32 is also the head. A tool makes the head
#   int8 and leaves the embedding. Both together are now how many times as
#   large as one int8 matrix (scales left out)?
# - `kept`: Teacher (0.7, 0.2, 0.1), draft (0.6, 0.4, 0.0). What share of the
#   drafted tokens is kept?
# - `tokens`: Each of 4 drafted tokens is kept with probability 0.8 if all
#   before it were. Tokens a pass?
# - `speedup`: A pass of the draft takes half as long as one of the large
#   model. By what factor are these drafts faster than none?
#
# A guess counts as right within a factor of 1.5, and half otherwise.

# %% question="13.5" part="answer"
### BEGIN SOLUTION
forecasts = {
    "bits": 4.5,
    "file": 5,
    "kept": 0.8,
    "tokens": 3.36,
    "speedup": 1.12,
}
### STUB
# forecasts = {
#     "bits": ...,
#     "file": ...,
#     "kept": ...,
#     "tokens": ...,
#     "speedup": ...,
# }
### END SOLUTION

# %% question="13.5" part="check"
checks.check("13.5", forecasts)

# %% [markdown] question="13.5" part="hint"
# The float32 copy alone is four times the int8 one. The sum of |p - q| is
# twice the TVD.

# %% [markdown] question="13.5" part="hint"
# 1 + 0.8 + 0.8^2 + 0.8^3 + 0.8^4, and a round takes 4 halves and 1.

# %% [markdown] question="13.5" part="note"
# The last line is the sober one: four tokens in five are kept and it hardly
# pays, because the draft is too slow. A draft must be cheap *in time*, not in
# parameters.

# %% [markdown] question="13.6" part="task"
# ## 13.6 what_ships
#
# **13.6** · explain · difficulty 3/5 · importance 5/5 · 15 minutes · 5 points
#
# One option of each item is right. Say to yourself why the others are not,
# before you check.

# %% [markdown] question="13.6" part="options"
# **a.** A student was exported with an example of batch 2 and length 7, and no
# dynamic shapes. On the phone a request has 12 tokens. It
#
# - **A** works, because no weight of a transformer depends on the length.
#   > wrong: The weights do not, the graph does: its shapes are constants.
# - **B** fails, or computes with shapes of the example.
#   > right: What was a number while the graph was recorded stays one. Name the
#   > axes, and test with other sizes than the example's.
# - **C** works, but more slowly, because it is compiled anew.
#   > wrong: The runtime has no Python code left that it could compile.

# %% [markdown] question="13.6" part="options"
# **b.** All that one wants is a file a quarter as large. What is the first
# thing to try?
#
# - **A** Weights in 8 bits, after training.
#   > right: It needs no training and no data, and at 8 bits the loss was too
#   > small to see in the chapter.
# - **B** Distillation into 8 bits.
#   > wrong: It costs training and mends a loss that is hardly there.
# - **C** A student a quarter as large.
#   > wrong: That is another model to train, and it loses quality that rounding
#   > keeps.

# %% [markdown] question="13.6" part="options"
# **c.** A student is distilled into 3 bits by the teacher's distributions. Its
# rival got as many further steps in float32 and was rounded then. Why is the
# rival in the table?
#
# - **A** It shows that rounding does harm.
#   > wrong: The row without further steps shows that.
# - **B** It shows what the float student could reach.
#   > wrong: It is rounded, too. The float row shows that.
# - **C** Without it, the gain could be that of training longer.
#   > right: Only the quantised forward pass differs between the two rows.

# %% [markdown] question="13.6" part="options"
# **d.** The student drafts for its teacher, and both are sampled at
# temperature 1 with the rule of the chapter. A bad student makes the answers
#
# - **A** worse, because most tokens are the student's.
#   > wrong: A token that the student likes too much is kept more rarely, by
#   > just as much.
# - **B** slower.
#   > right: The answers are distributed as the teacher's, whatever the draft
#   > is. Only the number of passes changes.
# - **C** more varied, because two models are mixed.
#   > wrong: The distribution is the teacher's. Nothing is mixed.

# %% [markdown] question="13.6" part="options"
# **e.** int8 matrices make the file four times smaller and the request not
# faster. What is the most likely reason?
#
# - **A** Whole numbers are multiplied as slowly as floats on every CPU.
#   > wrong: Instructions for 8 bits exist, and large products gain from them.
# - **B** At this size, time goes into starting operations and into changing
#   the format of numbers.
#   > right: The products are tiny. What is added for every product, rounding
#   > the input and scaling the output, costs as much as it saves.
# - **C** The file is read from disk once a request.
#   > wrong: It is read once, when the model is loaded.

# %% question="13.6" part="answer"
### BEGIN SOLUTION
what_ships = {
    "a": "B",
    "b": "A",
    "c": "C",
    "d": "B",
    "e": "B",
}
### STUB
# what_ships = {
#     "a": ...,
#     "b": ...,
#     "c": ...,
#     "d": ...,
#     "e": ...,
# }
### END SOLUTION

# %% question="13.6" part="check"
checks.check("13.6", what_ships)

# %% [markdown] question="13.6" part="hint"
# For c, ask what differs between the two rows, and nothing else. For d,
# average the rule over what the draft may write.

# %% [markdown] question="13.6" part="hint"
# For a: what does an exporter see of a shape? For e: count the products of a
# student of width 64.

# %% [markdown] question="13.6" part="note"
# Measure what ships, on what it ships to: the file, the quality after
# rounding, the time of one request. Each of the three can be right while
# another is not.
