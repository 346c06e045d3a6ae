# %% [markdown]
# # Exercises 7 · Context distillation
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/exercises/ch07.ipynb)
#
# | what it costs | |
# |---|---|
# | your time | 75 minutes |
# | two CPU cores | seconds |
# | network, account, key | none |
#
# Read chapter 7 first (`notebooks/07_context_distillation.ipynb`).

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

# %% [markdown] question="7.1" part="task"
# ## 7.1 recovery
#
# **7.1** · code · difficulty 2/5 · importance 5/5 · 12 minutes · 4 points
#
# A student was measured on N user inputs. For each there are three sums over
# the tokens of the teacher's answers, in nats: the gain, the floor and the
# student's KL. Compute the student's recovery, over all tokens of all inputs.
#
# Answers differ in length, and an input with a gain near zero is no reason to
# divide by zero. A student can also be worse than it was before training.


# %% question="7.1" part="answer"
def recovery(
    gain: torch.Tensor, floor: torch.Tensor, kl: torch.Tensor
) -> torch.Tensor:
    """The share taken in of what can be taken in: one number.

    gain, floor, kl: [N] sums over the tokens of each input's answer, in nats.
        The sum of `gain` is larger than the sum of `floor`
    """
    ### BEGIN SOLUTION
    there_is = gain.sum() - floor.sum()
    taken = gain.sum() - kl.sum()
    return taken / there_is
    ### END SOLUTION


# %% question="7.1" part="check"
checks.check("7.1", recovery)

# %% [markdown] question="7.1" part="hint"
# Write 1 - (KL - floor) / (gain - floor) as one fraction first.

# %% [markdown] question="7.1" part="hint"
# Each of the three is a mean over all tokens. All have the same number of
# tokens below, so it cancels. Sum first, divide once.

# %% [markdown] question="7.1" part="note"
# A ratio of sums, not a mean of ratios: a short answer with a tiny gain must
# not weigh as much as a long one. Nothing is cut off at 0 or 1. A negative
# recovery says that training made the student worse, and that has to be seen.

# %% [markdown] question="7.2" part="task"
# ## 7.2 best_next_word
#
# **7.2** · derive · difficulty 4/5 · importance 5/5 · 20 minutes · 5 points
#
# The best student of the forward KL sees $x'$ and what has been written. It
# does not see the context. **Derive its distribution of the next word**, from
# the teacher's distributions in every context, and type it in.


# %% question="7.2" part="answer"
def best_next_word(
    prior: torch.Tensor, probs: torch.Tensor, written: torch.Tensor
) -> torch.Tensor:
    """The student's distribution [V] of the word after `written`.

    prior:   [C] probability of each context, given x'; the sum is 1
    probs:   [C, n + 1, V] the teacher's distribution in each context at each
             place: probs[c, i] follows the first i written words
    written: [n] the words so far; n can be 0

    All probabilities are positive.
    """
    ### BEGIN SOLUTION
    weights = prior
    for place, word in enumerate(written):
        weights = weights * probs[:, place, word]
    return weights @ probs[:, -1] / weights.sum()
    ### END SOLUTION


# %% question="7.2" part="check"
checks.check("7.2", best_next_word)

# %% [markdown] question="7.2" part="hint"
# The best student over whole answers is the mixture. Divide its probability of
# (written, next word) by its probability of (written).

# %% [markdown] question="7.2" part="hint"
# That is a mixture again, with Bayes' weights: the prior times how well each
# context explains what was written, divided by their sum.

# %% [markdown] question="7.2" part="note"
# The weights move with each written word. After a word that one context alone
# would write, the student is in that context. So a blind student is not blind
# for long, and most of the floor falls on the first words.

# %% [markdown] question="7.3" part="task"
# ## 7.3 reverse_floor
#
# **7.3** · derive · difficulty 4/5 · importance 3/5 · 20 minutes · 5 points
#
# Under reverse KL the student's loss is
# $\sum_c r_c\, \mathrm{KL}(q_{x'(c)} \| p_c)$. The chapter found the least
# value for a student that is told nothing. **Derive it for a student that is
# told a tag** $x'(c)$, and type it in.


# %% question="7.3" part="answer"
def reverse_floor(
    prior: torch.Tensor, teacher: torch.Tensor, simplified: torch.Tensor
) -> torch.Tensor:
    """The least mean reverse KL of any student that sees the tag, in nats.

    prior:      [C] probability r_c of each context; the sum is 1
    teacher:    [C, Y] p_c, the teacher's distribution over Y answers
    simplified: [C] the number of the tag that is left of each context

    All probabilities are positive.
    """
    ### BEGIN SOLUTION
    total = 0.0
    for tag in simplified.unique():
        mine = simplified == tag
        share = prior[mine].sum()
        log_product = (prior[mine] / share) @ teacher[mine].log()
        total = total - share * log_product.logsumexp(0)
    return total
    ### END SOLUTION


# %% question="7.3" part="check"
checks.check("7.3", reverse_floor)

# %% [markdown] question="7.3" part="hint"
# Take one tag alone. The weights of its contexts must have the sum one, or the
# student's own entropy is counted too little.

# %% [markdown] question="7.3" part="hint"
# For one tag the least value is -log Z, with Z the sum over answers of the
# product of p_c to the power r_c / r(tag). Then average over tags.

# %% [markdown] question="7.3" part="note"
# With weights w_c = r_c / r(tag), the sum of w_c KL(q || p_c) is
# KL(q || g) - log Z. For two contexts of equal weight, Z is the sum of
# sqrt(p_1 p_2), and -log Z is known as the Bhattacharyya distance.

# %% [markdown] question="7.4" part="task"
# ## 7.4 forecasts
#
# **7.4** · predict · difficulty 2/5 · importance 4/5 · 8 minutes · 4 points
#
# **Guess first**, without running code. Six languages are asked for equally
# often, no two share an answer, and $x'$ does not say which one it is.
#
# - `floor`: The floor, in nats an answer.
# - `per_token`: The same for answers of 12 tokens, in nats a token.
# - `exact`: The best student answers greedily. What share of its answers is in
#   the language that was asked for?
# - `recovery`: Another student: gain 0.30, floor 0.12, KL 0.15. Its recovery?
#
# A guess counts as right within a factor of 1.5, and half otherwise.

# %% question="7.4" part="answer"
### BEGIN SOLUTION
forecasts = {
    "floor": 1.79,
    "per_token": 0.149,
    "exact": 0.167,
    "recovery": 0.83,
}
### STUB
# forecasts = {
#     "floor": ...,
#     "per_token": ...,
#     "exact": ...,
#     "recovery": ...,
# }
### END SOLUTION

# %% question="7.4" part="check"
checks.check("7.4", forecasts)

# %% [markdown] question="7.4" part="hint"
# If no answer is shared, the answer tells the language completely. How much
# information is a choice among six?

# %% [markdown] question="7.4" part="hint"
# log 6 is about 1.8. The recovery is what was taken in, 0.15, over what could
# be, 0.18.

# %% [markdown] question="7.4" part="note"
# I(Y; C | X') = H(C) = log 6 here, an answer. The floor a token looks
# harmless, and yet five answers in six are in another language than the
# wanted one.

# %% [markdown] question="7.5" part="task"
# ## 7.5 what_was_taken_in
#
# **7.5** · explain · difficulty 3/5 · importance 5/5 · 15 minutes · 5 points
#
# One option of each item is right. Say to yourself why the others are not,
# before you check.

# %% [markdown] question="7.5" part="options"
# **a.** The student is a copy of the teacher. It is trained by forward KL on
# the full inputs $D$, for many steps. Without its context it then is
#
# - **A** as it was: the loss and its gradient were zero from the start.
#   > right: On D teacher and student are the same function of the same input.
#   > There is nothing to change.
# - **B** better: it has read the context often enough to know it.
#   > wrong: Reading is not learning. Only a gradient changes weights, and it
#   > is zero.
# - **C** worse: it has come to lean on the context.
#   > wrong: It leaned on it before. A zero gradient changes nothing.

# %% [markdown] question="7.5" part="options"
# **b.** Three instructions leave the same $x'$. Which change lowers the floor?
#
# - **A** A student with ten times as many parameters.
#   > wrong: The floor is a minimum over all students, of any size.
# - **B** A word in $x'$ that names the instruction.
#   > right: I(Y; C | X') falls when x' says more of c.
# - **C** Ten times as many inputs in $D'$.
#   > wrong: More inputs make the estimate better. They do not tell one
#   > instruction from another.

# %% [markdown] question="7.5" part="options"
# **c.** Two contexts: in one the teacher says only A or B, in the other only B
# or C, always evenly. What does the best blind student of the reverse KL say?
#
# - **A** A, B, C with 1/4, 1/2, 1/4.
#   > wrong: That is the mixture, which the forward KL wants.
# - **B** A, B, C, evenly.
#   > wrong: A costs without bound in the second context, which never says it.
# - **C** B alone.
#   > right: The product of experts is zero wherever one of them is.

# %% [markdown] question="7.5" part="options"
# **d.** A soft prompt has one vector for each token of the context, started
# from the tokens' embeddings. Its KL on new inputs, before training, is
#
# - **A** about the gain, because nothing was trained.
#   > wrong: The gain is the loss without a context. This one is there, as
#   > vectors.
# - **B** zero, because the network reads the same vectors as the teacher.
#   > right: A network sees embeddings, not words.
# - **C** the floor of that context.
#   > wrong: One context has the floor zero; but why it is reached before
#   > training says the other option.

# %% [markdown] question="7.5" part="options"
# **e.** K contexts out of thousands are at hand, all with the same $x'$. The
# floor is computed from the K alone. It is, on average,
#
# - **A** too low, and at most $\log K$ an answer.
#   > right: Each answer's own context has the weight 1/K in the mixture,
#   > more than it has among thousands.
# - **B** too high, because K contexts are more varied than thousands.
#   > wrong: A few are never more varied than all.
# - **C** right, because the K were drawn by chance.
#   > wrong: Drawn by chance, but each answer's own context is always among
#   > them. That is a bias, and no accident.

# %% question="7.5" part="answer"
### BEGIN SOLUTION
what_was_taken_in = {
    "a": "A",
    "b": "B",
    "c": "C",
    "d": "B",
    "e": "A",
}
### STUB
# what_was_taken_in = {
#     "a": ...,
#     "b": ...,
#     "c": ...,
#     "d": ...,
#     "e": ...,
# }
### END SOLUTION

# %% question="7.5" part="check"
checks.check("7.5", what_was_taken_in)

# %% [markdown] question="7.5" part="hint"
# Ask in each item what the student reads, and what the teacher reads that the
# student does not.

# %% [markdown] question="7.5" part="hint"
# For c, write the product of both distributions. For e, ask how often the
# mixture contains the context that wrote the answer.

# %% [markdown] question="7.5" part="note"
# Three things decide what is taken in: which inputs are trained on, what x'
# says, and which divergence. Size and steps come after.
