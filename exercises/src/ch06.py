# %% [markdown]
# # Exercises 6 · Response-based distillation, whole
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/exercises/ch06.ipynb)
#
# | what it costs | |
# |---|---|
# | your time | 75 minutes |
# | two CPU cores | seconds |
# | network, account, key | none |
#
# Read chapter 6 first (`notebooks/06_response_based.ipynb`).

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

# %% [markdown] question="6.1" part="task"
# ## 6.1 total_loss
#
# **6.1** · code · difficulty 3/5 · importance 5/5 · 20 minutes · 6 points
#
# Write the whole objective with plain torch, for one micro-batch with padding:
#
# $$\frac{1}{M} \sum_{\text{response tokens}} \Big[(1 - w)\, T^2\,
#   \mathrm{KL}(p_t^T \,\|\, p_s^T) - w \log p_s(y)\Big] .$$
#
# $p^T = \mathrm{softmax}(z / T)$, and $p_s$ without a $T$ is the student at
# temperature 1. $M$ is the number of response tokens in all micro-batches of
# the step, so it may be larger than what you see. The logits at a position are
# those that predict its label: the shift has been made. A label of -100 marks
# a position that is no response token.
#
# Use what torch has (`log_softmax`, `gather`, `kl_div`, ...), not kdlib.


# %% question="6.1" part="answer"
def total_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    hard_weight: float,
    num_items: int,
):
    """The micro-batch's share of the step's loss, one number.

    student_logits, teacher_logits [B, L, V]: where labels are predicted
    labels [B, L]: the response's tokens, or -100
    temperature, hard_weight: T and w
    num_items: M, the response tokens of the whole step
    """
    ### BEGIN SOLUTION
    kept = labels != -100
    zs, zt, y = student_logits[kept], teacher_logits[kept], labels[kept]
    log_ps = (zs / temperature).log_softmax(-1)
    log_pt = (zt / temperature).log_softmax(-1)
    soft = (log_pt.exp() * (log_pt - log_ps)).sum(-1)
    hard = -zs.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    per_token = (1 - hard_weight) * temperature**2 * soft + hard_weight * hard
    return per_token.sum() / num_items
    ### END SOLUTION


# %% question="6.1" part="check"
checks.check("6.1", total_loss)

# %% [markdown] question="6.1" part="hint"
# Select the response tokens first. After that there are three tensors with N
# rows, and nothing can go wrong with padding any more.

# %% [markdown] question="6.1" part="hint"
# Two log-softmaxes of the student are needed: one of z / T for the soft term,
# one of z for the hard term. T^2 belongs to the soft term alone. At the end
# there is one sum, divided by num_items and by nothing else.

# %% [markdown] question="6.1" part="note"
# The sum over the vocabulary makes the divergence, the sum over tokens makes
# the loss, and only the second is turned into a mean. The denominator is the
# step's, so the micro-batches' losses add up to the loss of the whole batch.

# %% [markdown] question="6.2" part="task"
# ## 6.2 hot_limit
#
# **6.2** · derive · difficulty 4/5 · importance 3/5 · 20 minutes · 3 points
#
# The chapter let the temperature of the forward KL go to infinity. Do the same
# for the generalized JSD with $0 < \beta < 1$,
#
# $$D = \beta\, \mathrm{KL}(p_t \,\|\, m)
#   + (1 - \beta)\, \mathrm{KL}(p_s \,\|\, m),
#   \qquad m = \beta p_t + (1 - \beta) p_s .$$
#
# **Derive** $\lim_{T \to \infty} T^2 D$ in terms of the logits, then type the
# formula in. Use that for two distributions near the uniform one
# $\mathrm{KL}(p \,\|\, q) \approx \tfrac{V}{2} \sum_v (p_v - q_v)^2$. A large
# T in the code is not the limit: its error is of the order $1/T$.
#
# What does the limit say about a $\beta$ near 0 or 1?


# %% question="6.2" part="answer"
def hot_limit(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float
):
    """The limit of T^2 JSD_beta for each token, as T goes to infinity.

    student_logits, teacher_logits [N, V]
    beta: between 0 and 1

    Returns N numbers: a tensor, an array or a list.
    """
    ### BEGIN SOLUTION
    gap = student_logits - teacher_logits
    centred = gap - gap.mean(-1, keepdim=True)
    return beta * (1 - beta) * centred.pow(2).mean(-1) / 2
    ### END SOLUTION


# %% question="6.2" part="check"
checks.check("6.2", hot_limit)

# %% [markdown] question="6.2" part="hint"
# Write p_t - m and p_s - m as multiples of p_t - p_s. Put both into the
# quadratic form and add them up.

# %% [markdown] question="6.2" part="hint"
# p_t - m = (1 - beta)(p_t - p_s) and p_s - m = -beta (p_t - p_s). Near the
# uniform distribution, p_s - p_t is (gap - its mean over the vocabulary) / (V
# T), with gap = z_s - z_t.

# %% [markdown] question="6.2" part="note"
# beta (1 - beta)^2 + (1 - beta) beta^2 = beta (1 - beta), so the limit is beta
# (1 - beta) / 2 times the variance of z_s - z_t over the vocabulary. In the
# limit all members of the family are logit matching, and beta only changes the
# scale: it goes to 0 at both ends. Forward KL, reverse KL and this divergence
# differ where the distributions are far apart, not where they are nearly flat.

# %% [markdown] question="6.3" part="task"
# ## 6.3 share_of_the_step
#
# **6.3** · code · difficulty 3/5 · importance 4/5 · 15 minutes · 4 points
#
# A step is spread over several processes, and each process over several
# micro-batches. Within a process the gradients of the micro-batches **add
# up**. Then torch's DistributedDataParallel replaces each process's gradient
# by the **average** over the processes.
#
# On which number must a process call `backward()` for one micro-batch, so that
# the step's gradient is that of the mean over all response tokens of the whole
# batch? A position outside the mask may hold anything, an infinity included. A
# micro-batch may have no response token at all.


# %% question="6.3" part="answer"
def share_of_the_step(
    per_token: torch.Tensor,
    mask: torch.Tensor,
    step_tokens: int,
    processes: int,
):
    """The number to differentiate for one micro-batch.

    per_token [B, L]: the loss at each position
    mask [B, L]: bool, True at response tokens
    step_tokens: response tokens of all micro-batches of all processes
    processes: how many processes there are
    """
    ### BEGIN SOLUTION
    return per_token[mask].sum() * processes / step_tokens
    ### END SOLUTION


# %% question="6.3" part="check"
checks.check("6.3", share_of_the_step)

# %% [markdown] question="6.3" part="hint"
# Start with one process. What do the micro-batches' numbers have to add up to?

# %% [markdown] question="6.3" part="hint"
# The average over P processes divides everything by P. The mean that is wanted
# has divided already, so multiply first by what will be divided by later. To
# drop a position, select; an infinity times 0 is no number.

# %% [markdown] question="6.3" part="note"
# The denominator knows the whole step, and the factor `processes` undoes the
# average. No other mean may appear: each mean over a part gives every part the
# same weight, however few tokens it has.

# %% [markdown] question="6.4" part="task"
# ## 6.4 factors
#
# **6.4** · predict · difficulty 2/5 · importance 4/5 · 10 minutes · 4 points
#
# **Guess four factors first**, then compute what surprised you. Each is a
# ratio larger than or equal to 1.
#
# - `without_t2`: logits between -3 and 3 over 1,000 tokens. The gradient of
#   the tempered KL at $T = 10$ is how many times as long as at $T = 100$?
# - `with_t2`: the same, with each loss multiplied by its own $T^2$.
# - `over_the_vocabulary`: someone uses torch's `kl_div` with
#   `reduction="mean"` on logits [N, 32,000]. How many times too small is the
#   loss?
# - `short_answer`: two micro-batches, one with a single response token, one
#   with 299. Someone averages the two means. How many times the weight that it
#   should have does the single token get?
#
# A guess counts as right within a factor of 1.5, and half otherwise.

# %% question="6.4" part="answer"
### BEGIN SOLUTION
factors = {
    "without_t2": 100,
    "with_t2": 1,
    "over_the_vocabulary": 32_000,
    "short_answer": 150,
}
### STUB
# factors = {
#     "without_t2": ...,
#     "with_t2": ...,
#     "over_the_vocabulary": ...,
#     "short_answer": ...,
# }
### END SOLUTION

# %% question="6.4" part="check"
checks.check("6.4", factors)

# %% [markdown] question="6.4" part="hint"
# The gradient is (p_s - p_t) / T at temperature T. One factor 1/T stands in
# front. How does the bracket change when T grows?

# %% [markdown] question="6.4" part="hint"
# For flat distributions p_s - p_t falls as 1/T too. For the last one: a
# token's weight should be 1/300. What is it when each micro-batch counts for a
# half?

# %% [markdown] question="6.4" part="note"
# Two factors of 1/T make (100/10)^2 = 100, and T^2 takes them away. "mean"
# divides by N V where N was meant. A half instead of 1/300 is 150 times too
# much: a single short answer can steer the step.

# %% [markdown] question="6.5" part="task"
# ## 6.5 what_it_fixes
#
# **6.5** · explain · difficulty 3/5 · importance 5/5 · 10 minutes · 5 points
#
# One option of each item is right. Say to yourself why the others are not,
# before you check.

# %% [markdown] question="6.5" part="options"
# **a.** `hard_weight=0`, and the optimizer is Adam. Someone removes the factor
# $T^2$. What happens to the training?
#
# - **A** It converges to another student, because the minimum moves.
#   > wrong: A constant factor moves no minimum, and here it multiplies the
#   > whole
#   > loss.
# - **B** Next to nothing, as long as gradients are not clipped.
#   > right: Adam divides by the size of the gradient, so a constant factor
#   > cancels, up to its small epsilon. The factor matters where the soft term
#   > is
#   > added to another.
# - **C** It slows down by $T^2$, because every step is that much shorter.
#   > wrong: That would be so for plain gradient descent. Adam's step does not
#   > grow
#   > with the gradient.

# %% [markdown] question="6.5" part="options"
# **b.** A student gives each token a logit that is 5 higher than the
# teacher's. Which loss is zero?
#
# - **A** The squared error of the logits.
#   > wrong: It is 25 for every token of the vocabulary.
# - **B** Neither of the two.
#   > wrong: A softmax does not see a constant that all tokens share.
# - **C** The forward KL, at every temperature.
#   > right: Both distributions are equal, so the student is perfect. Matching
#   > logits without taking out the mean would punish it.

# %% [markdown] question="6.5" part="options"
# **c.** No image of a 3 is in the transfer set. Why does a student on soft
# targets recognise threes all the same?
#
# - **A** The teacher gave the other digits a little of class 3, more of it
#   where they look like a 3.
#   > right: These small numbers carry the shape of the class. A student on
#   > labels
#   > never sees them, and is never right on a 3.
# - **B** It has more parameters to spare than a student on labels.
#   > wrong: Both are the same network. Only their targets differ.
# - **C** The raised bias does it: without that step it would be right on none.
#   > wrong: Many threes were right before the bias was touched, and a raised
#   > bias helps the student on labels far less.

# %% [markdown] question="6.5" part="options"
# **d.** The student's distributions equal the teacher's on all inputs. What
# follows for its hidden states?
#
# - **A** They equal the teacher's, up to a rotation.
#   > wrong: A rotation is one way to differ with equal responses. Another
#   > width,
#   > another depth or other features are possible, too.
# - **B** Nothing more than that the responses can be computed from them.
#   > right: A response objective says nothing else about what lies underneath.
#   > A
#   > loss on features or relations does.
# - **C** Their pairwise distances equal the teacher's.
#   > wrong: That is what a relational loss asks for. Responses alone do not
#   > fix
#   > it.

# %% [markdown] question="6.5" part="options"
# **e.** The teacher's head has 152,064 columns, the student's 151,936. The
# tokenizer has 151,665 tokens. What is safe?
#
# - **A** Give the student 128 more logits of 0 and compare all columns.
#   > wrong: 0 is not small: what it means depends on the other logits, which a
#   > constant could have shifted. The loss changes although no answer does.
# - **B** Compare the columns that both sides have.
#   > right: No real token is beyond them, and a shift of all logits changes
#   > nothing.
# - **C** Copy the teacher's logits into the student's missing columns.
#   > wrong: A teacher's logit among the student's means something else there,
#   > and
#   > a student that never made it gets credit for it.

# %% question="6.5" part="answer"
### BEGIN SOLUTION
what_it_fixes = {
    "a": "B",
    "b": "C",
    "c": "A",
    "d": "B",
    "e": "B",
}
### STUB
# what_it_fixes = {
#     "a": ...,
#     "b": ...,
#     "c": ...,
#     "d": ...,
#     "e": ...,
# }
### END SOLUTION

# %% question="6.5" part="check"
checks.check("6.5", what_it_fixes)

# %% [markdown] question="6.5" part="hint"
# For a and b ask in each case: what stays the same if I multiply the loss, or
# add a constant to the logits?

# %% [markdown] question="6.5" part="hint"
# For c look at what differs between the two students' targets. For d think of
# a rotation, and of a student of another width. For e add 100 to all real
# logits.

# %% [markdown] question="6.5" part="note"
# T^2 balances two terms. Responses fix distributions, and nothing beneath
# them. Soft targets carry what the teacher knows about classes that the inputs
# do not contain.
