# %% [markdown]
# # Exercises 8 · The data D'
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/exercises/ch08.ipynb)
#
# | what it costs | |
# |---|---|
# | your time | 85 minutes |
# | two CPU cores | seconds |
# | network, account, key | none |
#
# Read chapter 8 first (`notebooks/08_the_data.ipynb`).

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
import math

import torch
from kdlib import checks

# %% [markdown] question="8.1" part="task"
# ## 8.1 expected_risk
#
# **8.1** · derive · difficulty 3/5 · importance 5/5 · 15 minutes · 5 points
#
# A student has room for everything, and knows what it has read, though not
# perfectly: an input that stands in $D'$ costs `seen`, any other `unseen`.
# $D'$ consists of independent draws from what is asked. **Derive the expected
# loss on what is asked**, over all that the draws can be, and type it in.


# %% question="8.1" part="answer"
def expected_risk(
    frequency: torch.Tensor,
    seen: torch.Tensor,
    unseen: torch.Tensor,
    draws: int,
) -> torch.Tensor:
    """The expected risk: one number, in nats.

    frequency: [X] how often each input is asked, and drawn; the sum is 1
    seen:      [X] the student's loss on an input, if it stands in D'
    unseen:    [X] its loss if the input does not
    draws:     the number of draws; an input can be drawn more than once
    """
    ### BEGIN SOLUTION
    missing = (1 - frequency) ** draws
    loss = (1 - missing) * seen + missing * unseen
    return (frequency * loss).sum()
    ### END SOLUTION


# %% question="8.1" part="check"
checks.check("8.1", expected_risk)

# %% [markdown] question="8.1" part="hint"
# Take one input. With what probability does none of the draws find it?

# %% [markdown] question="8.1" part="hint"
# The draws are independent, so that probability is a power. Then average the
# two losses of the input, and last the inputs, by how often they are asked.

# %% [markdown] question="8.1" part="note"
# Common inputs are found at once and rare ones late. That is why the curve of
# the risk over the size of D' has a long tail, and why the last of it is
# cheaper to close by asking for rare inputs on purpose.

# %% [markdown] question="8.2" part="task"
# ## 8.2 favourite_is_wrong
#
# **8.2** · derive · difficulty 3/5 · importance 4/5 · 15 minutes · 4 points
#
# Several inputs share one right answer, and a student that cannot tell them
# apart reads the teacher's label for each. A label is wrong with the
# probability `error`, independently of the others, and all wrong labels are
# the same wrong answer. The student answers what stands there more often; of
# two that are equally frequent it takes one by the toss of a coin. **Derive
# the probability that it answers wrongly.**


# %% question="8.2" part="answer"
def favourite_is_wrong(error: float, labels: int) -> float:
    """The probability that the student's answer is wrong.

    error:  the probability that a label is wrong, between 0 and 1
    labels: how many labels the student reads; at least 1
    """
    ### BEGIN SOLUTION
    total = 0.0
    for wrong in range(labels + 1):
        chance = math.comb(labels, wrong)
        chance *= error**wrong * (1 - error) ** (labels - wrong)
        if 2 * wrong > labels:
            total += chance
        elif 2 * wrong == labels:
            total += chance / 2
    return total
    ### END SOLUTION


# %% question="8.2" part="check"
checks.check("8.2", favourite_is_wrong)

# %% [markdown] question="8.2" part="hint"
# The number of wrong labels has a binomial distribution. `math.comb` counts
# the orders.

# %% [markdown] question="8.2" part="hint"
# Sum the probabilities of more than half, and for an even number of labels
# add half the probability of exactly half.

# %% [markdown] question="8.2" part="note"
# Below an error of one half it falls towards zero, and the student is better
# than its teacher. Above, it rises towards one: more data makes a bad teacher
# worse. With two labels nothing is gained over one. All of it rests on the
# word *independently*: an error that follows from the input has no such rest.

# %% [markdown] question="8.3" part="task"
# ## 8.3 fidelity_and_accuracy
#
# **8.3** · code · difficulty 2/5 · importance 5/5 · 12 minutes · 4 points
#
# Student and teacher answered N inputs whose true labels are known. Return
# three shares of the N inputs: on how many they agree; how many of the
# teacher's mistakes the student has repaired; how many of the teacher's right
# answers it has broken.


# %% question="8.3" part="answer"
def fidelity_and_accuracy(
    student: torch.Tensor, teacher: torch.Tensor, truth: torch.Tensor
) -> torch.Tensor:
    """[3]: agreement, repaired, broken, each as a share of all inputs.

    student, teacher, truth: [N] numbers of classes
    """
    ### BEGIN SOLUTION
    ours, theirs = student == truth, teacher == truth
    masks = student == teacher, ours & ~theirs, ~ours & theirs
    return torch.stack([mask.double().mean() for mask in masks])
    ### END SOLUTION


# %% question="8.3" part="check"
checks.check("8.3", fidelity_and_accuracy)

# %% [markdown] question="8.3" part="hint"
# There are five cases: both right; both wrong alike; both wrong differently;
# only the student right; only the teacher right.

# %% [markdown] question="8.3" part="hint"
# Agreement does not ask who is right. Repaired and broken are one case each.

# %% [markdown] question="8.3" part="note"
# Test your function by the identity: the student's accuracy minus the
# teacher's is repaired minus broken, and neither is more than what they
# disagree on.

# %% [markdown] question="8.4" part="task"
# ## 8.4 may_be_trained_on
#
# **8.4** · code · difficulty 2/5 · importance 5/5 · 15 minutes · 5 points
#
# Clean $D'$ before the teacher is asked, which costs money. An input goes if
# it stands in the test, or if an earlier one is the same. Upper and lower case
# make no difference, nor do spaces at the ends or several in a row.


# %% question="8.4" part="answer"
def may_be_trained_on(inputs: list[str], test: list[str]) -> list[int]:
    """For each input, in order: 1 if it may stay, 0 if it has to go.

    inputs: what was collected for D'
    test:   the inputs that students will be measured on
    """

    ### BEGIN SOLUTION
    def folded(text):
        return " ".join(text.lower().split())

    taken = {folded(text) for text in test}
    stays = []
    for text in inputs:
        stays.append(int(folded(text) not in taken))
        taken.add(folded(text))
    return stays
    ### END SOLUTION


# %% question="8.4" part="check"
checks.check("8.4", may_be_trained_on)

# %% [markdown] question="8.4" part="hint"
# `text.split()` without an argument splits at any run of spaces, and drops
# those at the ends.

# %% [markdown] question="8.4" part="hint"
# Fold both lists. One set can hold the test's inputs and those met before.

# %% [markdown] question="8.4" part="note"
# It finds copies, not paraphrases. For real prompts one compares n-grams or
# embeddings as well, and reads a sample of what was dropped. A teacher's
# answers do not make a leaked input harmless: they teach the test by heart.

# %% [markdown] question="8.5" part="task"
# ## 8.5 forecasts
#
# **8.5** · predict · difficulty 2/5 · importance 4/5 · 10 minutes · 5 points
#
# **Guess first**, without running code.
#
# - `never_drawn`: 1,000 inputs are equally frequent, and $D'$ is 1,000 draws.
#   What share of the inputs is never drawn?
# - `outvoted`: three labels of one answer, each wrong with 0.2, alike and
#   independently. How often is the majority wrong?
# - `doubt`: a student has learned such a teacher's distribution perfectly,
#   0.8 for the right answer. Its mean $-\log p(\text{right})$, in nats?
# - `best`: a teacher is right on 40 % of its inputs, and student and teacher
#   agree on 53 %. The student's accuracy, at the very best?
# - `sampled`: a teacher's distribution over 101 words is learned from 1,000
#   sampled answers. The KL that is left, in nats, about?
#
# A guess counts as right within a factor of 1.5, and half otherwise.

# %% question="8.5" part="answer"
### BEGIN SOLUTION
forecasts = {
    "never_drawn": 0.37,
    "outvoted": 0.104,
    "doubt": 0.223,
    "best": 0.87,
    "sampled": 0.05,
}
### STUB
# forecasts = {
#     "never_drawn": ...,
#     "outvoted": ...,
#     "doubt": ...,
#     "best": ...,
#     "sampled": ...,
# }
### END SOLUTION

# %% question="8.5" part="check"
checks.check("8.5", forecasts)

# %% [markdown] question="8.5" part="hint"
# (1 - 1/n)^n has a limit. Two or three of three labels make a majority.

# %% [markdown] question="8.5" part="hint"
# The student can be right wherever it disagrees, if the teacher is wrong
# there. Each free probability costs half a nat over n.

# %% [markdown] question="8.5" part="note"
# 1/e = 0.37; 3 * 0.2^2 * 0.8 + 0.2^3 = 0.104; -log 0.8 = 0.223; 0.40 + 0.47 =
# 0.87; 100 / 2,000 = 0.05.

# %% [markdown] question="8.6" part="task"
# ## 8.6 what_more_data_does
#
# **8.6** · explain · difficulty 3/5 · importance 5/5 · 18 minutes · 6 points
#
# One option of each item is right. Say to yourself why the others are not,
# before you check.

# %% [markdown] question="8.6" part="options"
# **a.** A student is trained to its minimum. As $D'$ grows, its expected final
# *training* loss
#
# - **A** falls, because more is known.
#   > wrong: One set of weights has to fit more. Each smaller set could be
#   > fitted at least as well.
# - **B** never falls, because more has to be fitted.
#   > right: The least value of a mean is no less than the mean of the least
#   > values.
# - **C** falls at first and then rises.
#   > wrong: The inequality holds at every n.

# %% [markdown] question="8.6" part="options"
# **b.** Training loss and test loss of a run are equal, and high. What will
# not help?
#
# - **A** More steps.
#   > wrong: They may. Both losses can fall together.
# - **B** A larger student.
#   > wrong: It may. Its capacity floor is lower.
# - **C** Ten times as many inputs of the same kinds.
#   > right: Between the two losses there is no gap left that data could close.

# %% [markdown] question="8.6" part="options"
# **c.** A team writes each input of $D'$ ten times, word for word, and trains
# for as many steps as before, on the whole distributions. The objective's
# minimum
#
# - **A** is where it was.
#   > right: The mean over ten copies is the mean over one.
# - **B** is better, as ten times as much is read.
#   > wrong: The steps are as many as before, and copies tell nothing new.
# - **C** is worse, as the student learns by heart.
#   > wrong: It learns as much by heart as it did: the function that is
#   > minimised is the same.

# %% [markdown] question="8.6" part="options"
# **d.** A teacher is wrong about all prices and right about all else. The
# student has room enough, and $D'$ grows tenfold. Its answers about prices
#
# - **A** become right, as errors are outvoted.
#   > wrong: No other answer about prices is there to outvote them.
# - **B** become random.
#   > wrong: The labels are wrong, and not random.
# - **C** become the teacher's wrong ones, more surely.
#   > right: An error that follows from the input is learned as a rule is.

# %% [markdown] question="8.6" part="options"
# **e.** A student agrees with its teacher on every input that will be asked.
# Its accuracy is
#
# - **A** the teacher's.
#   > right: It gives the same answers, the wrong ones too.
# - **B** at least the teacher's.
#   > wrong: To be better it would have to differ somewhere.
# - **C** at most the teacher's, and mostly below it.
#   > wrong: The same answers have the same accuracy, not a lower one.

# %% [markdown] question="8.6" part="options"
# **f.** Forward KL, all inputs that there are, a student at its minimum. Of
# all possible teachers, which one's student has the least
# $\mathrm{KL}(\text{truth} \| \text{student})$?
#
# - **A** A teacher that the student can imitate perfectly.
#   > wrong: Imitating it is easy, and leaves its errors in.
# - **B** The truth itself, however small the student.
#   > right: Its student minimises that number itself. A capacity gap needs
#   > some other cause: too few data, or too few steps.
# - **C** A teacher somewhat larger than the student.
#   > wrong: A rule of thumb for runs that end early, or have few data. Neither
#   > is so here.

# %% question="8.6" part="answer"
### BEGIN SOLUTION
what_more_data_does = {
    "a": "B",
    "b": "C",
    "c": "A",
    "d": "C",
    "e": "A",
    "f": "B",
}
### STUB
# what_more_data_does = {
#     "a": ...,
#     "b": ...,
#     "c": ...,
#     "d": ...,
#     "e": ...,
#     "f": ...,
# }
### END SOLUTION

# %% question="8.6" part="check"
checks.check("8.6", what_more_data_does)

# %% [markdown] question="8.6" part="hint"
# Ask in each item which loss is meant, and over which inputs.

# %% [markdown] question="8.6" part="hint"
# For c, write the mean over ten copies. For f, write down what the student of
# the truth minimises.

# %% [markdown] question="8.6" part="note"
# "More data" is no quantity. Distinct inputs, kinds, copies, samples of an
# answer and a teacher's labels are, and each moves another term of the loss.
