# %% [markdown]
# # Exercises 3 · The objective
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/exercises/ch03.ipynb)
#
# | what it costs | |
# |---|---|
# | your time | 75 minutes |
# | two CPU cores | seconds |
# | network, account, key | none |
#
# Read chapter 3 first (`notebooks/03_the_objective.ipynb`).

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

# %% [markdown] question="3.1" part="task"
# ## 3.1 sequence_kl
#
# **3.1** · code · difficulty 3/5 · importance 5/5 · 20 minutes · 4 points
#
# In the chapter every answer had four words. Real answers **end**. Here token
# 0 is the end token. An answer is over when it is written, or when the tables
# are used up. What the tables hold for prefixes that have ended is padding.
# It must not count.
#
# Compute the divergence between the two distributions over answers, from
# tables of next-token probabilities. Go place by place; do not list the
# answers. Mind the prefixes' weights.


# %% question="3.1" part="answer"
def sequence_kl(
    teacher: list[torch.Tensor], student: list[torch.Tensor]
) -> torch.Tensor:
    """KL(teacher || student) of whole answers, in nats: one number.

    teacher, student: for each place t = 0, 1, ... a table [V^t, V] of
        probabilities, one row for each prefix of t tokens. Prefixes are
        numbered in lexicographic order: the longer prefixes of row i are
        the rows i * V + v of the next table, one for each token v.
        Token 0 is the end. The teacher's probabilities may be 0 (and 0 log 0
        is 0), the student's are positive.
    """
    ### BEGIN SOLUTION
    total, reached = 0.0, torch.ones(1, dtype=torch.float64)
    for p, q in zip(teacher, student, strict=True):
        per_prefix = (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(1)
        total = total + reached @ per_prefix
        reached = reached[:, None] * p
        reached[:, 0] = 0.0  # no answer goes on after its end
        reached = reached.flatten()
    return total
    ### END SOLUTION


# %% question="3.1" part="check"
checks.check("3.1", sequence_kl)

# %% [markdown] question="3.1" part="hint"
# Keep one more tensor beside the sum: how probable it is that the teacher
# comes to each prefix of this place. It starts as the one number 1.

# %% [markdown] question="3.1" part="hint"
# A longer prefix has the probability (of its beginning) x (of its last
# token), and 0 if that token is the end. For 0 log 0, use `torch.xlogy`.

# %% [markdown] question="3.1" part="note"
# The chain rule with answers that end: a prefix that has ended is never gone
# on from, so its weight is 0. That is what a completion mask does in a batch:
# tokens up to the end, the end included, and nothing after it. The end token
# is a prediction like any other; without it a student learns no lengths.

# %% [markdown] question="3.2" part="task"
# ## 3.2 loss_above_floor
#
# **3.2** · derive · difficulty 4/5 · importance 4/5 · 20 minutes · 5 points
#
# A student has the loss $\sum_c r_c\, \mathrm{KL}(p_c \| q_{x'(c)})$. It sees
# $x'(c)$, a tag, in the place of the context $c$, so contexts with the same
# tag get the same distribution. A part of its loss no training can remove.
#
# **Derive the other part**: what a student with enough capacity could still
# lose, beginning from this one. The chapter's three lines did it for a student
# that is told nothing. Do them again with tags, then type in what you found.


# %% question="3.2" part="answer"
def loss_above_floor(
    prior: torch.Tensor,
    teacher: torch.Tensor,
    simplified: torch.Tensor,
    student: torch.Tensor,
) -> torch.Tensor:
    """The student's mean forward KL minus the least that any student has.

    prior:      [C] probability r_c of each context; the sum is 1
    teacher:    [C, Y] p_c, the teacher's distribution over Y answers
    simplified: [C] the number of the tag that is left of each context
    student:    [G, Y] the student's distribution for each tag 0 .. G-1

    All probabilities are positive, and every tag occurs. Returns one number,
    in nats.
    """
    ### BEGIN SOLUTION
    total = 0.0
    for tag, q in enumerate(student):
        mine = simplified == tag
        share = prior[mine].sum()
        mixture = prior[mine] @ teacher[mine] / share
        total = total + share * (mixture * (mixture / q).log()).sum()
    return total
    ### END SOLUTION


# %% question="3.2" part="check"
checks.check("3.2", loss_above_floor)

# %% [markdown] question="3.2" part="hint"
# Contexts with another tag do not touch each other's loss. So take one tag
# alone first: which distribution is best for its contexts?

# %% [markdown] question="3.2" part="hint"
# Within a tag the weights are those of its contexts, given the tag:
# r_c / r(tag). Put the mixture m with these weights between p_c and q, as in
# the chapter. Which of the two terms contains q?

# %% [markdown] question="3.2" part="note"
# Within a tag, log(p_c / q) = log(p_c / m) + log(m / q). The mean of the first
# is the floor's part, I(Y; C | X' = tag). The mean of the second is
# KL(m || q). Over all tags: sum of r(tag) KL(m_tag || q_tag). So a plateau can
# be judged: below this number there is nothing to gain.

# %% [markdown] question="3.3" part="task"
# ## 3.3 best_student
#
# **3.3** · derive · difficulty 3/5 · importance 4/5 · 15 minutes · 4 points
#
# Take the simplest student again: one distribution $q$ for every token of
# every answer. The empirical risk is the forward KL at each token, reduced to
# one number as in `kdlib.objective.Objective`:
#
# - `"token_mean"`: the mean over all tokens;
# - `"sequence_mean"`: the mean over the answers of each one's token mean.
#
# **Derive the minimiser** for both, and type it in. Then look at the two for a
# batch with one long and one short answer. This is why a library that
# computes one while you asked for the other trains another student.


# %% question="3.3" part="answer"
def best_student(
    teacher_probs: torch.Tensor, row_ids: torch.Tensor, reduction: str
) -> torch.Tensor:
    """The q [V] with the least reduced forward KL.

    teacher_probs: [N, V] the teacher's distribution at each token
    row_ids:       [N] the row (answer) that each token belongs to; rows of
                   other processes can be missing, in any order
    reduction:     "token_mean" or "sequence_mean"
    """
    ### BEGIN SOLUTION
    _, row, length = row_ids.unique(return_inverse=True, return_counts=True)
    answers = len(length)
    weights = torch.ones(len(row_ids), dtype=teacher_probs.dtype)
    if reduction == "token_mean":
        weights = weights / len(row_ids)
    else:
        weights = weights / (length[row] * answers)
    return weights @ teacher_probs
    ### END SOLUTION


# %% question="3.3" part="check"
checks.check("3.3", best_student)

# %% [markdown] question="3.3" part="hint"
# Write the reduced loss as a sum of w_i KL(p_i || q) over the tokens. Which
# weight does a token have under each reduction?

# %% [markdown] question="3.3" part="hint"
# The minimiser of sum w_i KL(p_i || q) is the average of the p_i with these
# weights, if they sum to 1. `row_ids.unique(return_inverse=True,
# return_counts=True)` gives each answer's length, however rows are numbered.

# %% [markdown] question="3.3" part="note"
# With "token_mean" every token weighs 1/N; with "sequence_mean" 1/(B n) in an
# answer of n tokens. A loop that takes the token mean of each micro-batch and
# averages these has the second kind of weights once a micro-batch holds one
# answer. The result is a proper student, of another objective.

# %% [markdown] question="3.4" part="task"
# ## 3.4 costs
#
# **3.4** · predict · difficulty 2/5 · importance 3/5 · 8 minutes · 4 points
#
# **Guess first**, without paper and without running code:
#
# - `digits`: A vocabulary of 32,000 tokens, answers of 20. How many digits has
#   the number of answers?
# - `days`: A vocabulary of 50,000 tokens, answers of 3. A machine sums a
#   thousand million answers a second. How many days for the sequence-level
#   loss of one input?
# - `mode`: A teacher gives its favourite 0.9 at each of 20 tokens. What
#   probability does its answer of favourites have?
# - `answers`: Along an answer that the teacher wrote, the tokens' KLs add up
#   to 4 nats on average, with a standard deviation of 1.5. How many answers
#   give the mean a standard error of 0.03?
#
# A guess counts as right within a factor of 1.5, and half otherwise.

# %% question="3.4" part="answer"
### BEGIN SOLUTION
costs = {
    "digits": 91,
    "days": 1.45,
    "mode": 0.12,
    "answers": 2500,
}
### STUB
# costs = {
#     "digits": ...,
#     "days": ...,
#     "mode": ...,
#     "answers": ...,
# }
### END SOLUTION

# %% question="3.4" part="check"
checks.check("3.4", costs)

# %% [markdown] question="3.4" part="hint"
# 32,000 has four and a half digits: its logarithm to the base 10 is 4.5. A
# day has 86,400 seconds. 0.9 squared is 0.81; go on squaring.

# %% [markdown] question="3.4" part="hint"
# Twenty places add their logarithms. 50,000 to the power of three is
# 1.25 x 10^14. The standard error is the deviation over the root of the
# number of answers.

# %% [markdown] question="3.4" part="note"
# Three tokens take over a day, and twenty are out of the question. Yet 2,500
# answers give the same number to a hundredth of itself. And a teacher that is
# 90 % sure of every token gives its best answer only 12 %: the mode is a thin
# summary of a long answer.

# %% [markdown] question="3.5" part="task"
# ## 3.5 what_is_minimised
#
# **3.5** · explain · difficulty 3/5 · importance 5/5 · 12 minutes · 5 points
#
# One option of each item is right. Say to yourself why the others are not,
# before you check.

# %% [markdown] question="3.5" part="options"
# **a.** What is the divergence minimised for?
#
# - **A** So that the student answers the labelled examples correctly.
#   > wrong: No label stands in the divergence. Where the teacher is wrong,
#   > the student learns to be wrong in the same way.
# - **B** So that its next-token distributions, given x', become the
#   teacher's, given c and z.
#   > right: The divergence measures how far these two are apart, and it is
#   > zero where they are equal.
# - **C** So that its weights come as near to the teacher's as its size
#   permits.
#   > wrong: The loss sees distributions only. Two models with quite other
#   > weights, or other shapes, can have the same ones.

# %% [markdown] question="3.5" part="options"
# **b.** The forward KL over whole answers is exactly zero on every input of
# $D'$. What follows?
#
# - **A** The two models agree after every possible prefix.
#   > wrong: Prefixes that the teacher never writes have weight zero. What
#   > the student says after them is left open.
# - **B** The student's answers are the right ones.
#   > wrong: They are the teacher's. Zero says nothing about the truth.
# - **C** On those inputs every answer is as likely from one as from the
#   other.
#   > right: Zero divergence means equal distributions over answers, by
#   > Gibbs' inequality.

# %% [markdown] question="3.5" part="options"
# **c.** Students of one kind are trained on the full inputs $D$, because the
# teacher reads those, and served with $x'$. The loss on held-out inputs of
# $D$ is near zero. What do we know of the loss on $D'$?
#
# - **A** Next to nothing: it has to be measured on $D'$.
#   > right: The chapter's student had zero on D and a large loss on D'. What
#   > it says without c was never trained.
# - **B** It is near zero too, because held-out inputs were used.
#   > wrong: Held out, but of the same kind. They show that it works on new
#   > inputs with c, not without it.
# - **C** It is at least the floor $I(Y; C \mid X')$, and near it.
#   > wrong: At least the floor, yes. But near it only if the student was
#   > trained to mix what it cannot tell apart.

# %% [markdown] question="3.5" part="options"
# **d.** A small student is trained with the token-level KL on text from the
# web, with the teacher's full distributions. It cannot match the teacher at
# every prefix. Which objective has it minimised?
#
# - **A** The sequence-level KL: the chain rule makes them equal.
#   > wrong: The chain rule weighs prefixes by how often the teacher writes
#   > them, and these are weighed by the web.
# - **B** Another sum of the same token KLs, weighed by how often the web has
#   each prefix.
#   > right: So it is best where web text goes, and may be worse on the
#   > teacher's own answers.
# - **C** The cross-entropy with the web's text.
#   > wrong: The targets are the teacher's distributions. The text only says
#   > after which prefixes they are asked for.

# %% [markdown] question="3.5" part="options"
# **e.** $D'$ is made ten times larger by adding inputs of kinds that users
# never send. The student is too small for all of them. What happens to the
# loss on what users send?
#
# - **A** It falls, because more data is less chance.
#   > wrong: Chance does fall, but around the minimiser of another risk.
# - **B** It stays the same, because those inputs are not measured.
#   > wrong: They are not measured, but they are trained on, and they move
#   > the student.
# - **C** It can rise, because the compromise now serves other inputs.
#   > right: A student that cannot match everything weighs inputs as D' does.
#   > The chapter shows a case.

# %% question="3.5" part="answer"
### BEGIN SOLUTION
what_is_minimised = {
    "a": "B",
    "b": "C",
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

# %% question="3.5" part="check"
checks.check("3.5", what_is_minimised)

# %% [markdown] question="3.5" part="hint"
# Ask in each item: a mean over what, and weighed by whom? For b, ask which
# prefixes have the weight zero.

# %% [markdown] question="3.5" part="hint"
# The loss knows three things: the teacher's distributions, the prefixes after
# which they are asked for, and the inputs in D'. It knows nothing of labels,
# weights, or inputs that are not there.

# %% [markdown] question="3.5" part="note"
# An objective is a divergence together with the inputs and prefixes that it is
# averaged over. Where the student can match the teacher everywhere, the
# average does not matter in the end. Where it cannot, it decides everything.
