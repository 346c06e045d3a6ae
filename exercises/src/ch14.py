# %% [markdown]
# # Exercises 14 · Capstone
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/exercises/ch14.ipynb)
#
# | what it costs | |
# |---|---|
# | your time | 69 minutes |
# | two CPU cores | seconds |
# | network, account, key | none |
#
# Read chapter 14 first (`notebooks/14_capstone.ipynb`).

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
from statistics import mean, stdev

from kdlib import checks

# %% [markdown] question="14.1" part="task"
# ## 14.1 paired_interval
#
# **14.1** · code · difficulty 2/5 · importance 5/5 · 12 minutes · 5 points
#
# Two rows were trained with the same seeds. Return the mean difference and
# its 95 % interval by Student's $t$.


# %% question="14.1" part="answer"
def paired_interval(
    ours: list[float], theirs: list[float], t: float
) -> list[float]:
    """[mean, low, high] of ours minus theirs.

    ours, theirs: a measure of two rows, one number a seed; seeds in one order
    t:            the two-sided 95 % point of Student's t for one seed less
    """
    ### BEGIN SOLUTION
    d = [a - b for a, b in zip(ours, theirs, strict=True)]
    half = t * stdev(d) / len(d) ** 0.5
    return [mean(d), mean(d) - half, mean(d) + half]
    ### END SOLUTION


# %% question="14.1" part="check"
checks.check("14.1", paired_interval)

# %% [markdown] question="14.1" part="hint"
# Take the difference first, seed by seed, and forget the two rows.

# %% [markdown] question="14.1" part="hint"
# The standard error is the sample deviation (with n - 1) over the root of n.

# %% [markdown] question="14.1" part="note"
# On rows that share a seed's luck, the unpaired interval is several times as
# wide, from the same runs.

# %% [markdown] question="14.2" part="task"
# ## 14.2 rival_steps
#
# **14.2** · derive · difficulty 3/5 · importance 5/5 · 15 minutes · 5 points
#
# The teacher was asked once about each unlabelled example, and its targets
# were kept. The distilled student then read them several times. How many
# steps may its rival take, which has the same size and reads labels alone, if
# both shall have cost as many FLOPs? **Derive it** from the cost of a forward
# pass, 2 FLOPs a parameter and token, and of a training step, three times
# that. Do not round.


# %% question="14.2" part="answer"
def rival_steps(
    student: int, teacher: int, tokens: int, asked: int, tokens_a_step: int
) -> float:
    """The steps of the hard-label row with equal FLOPs.

    student, teacher: parameters
    tokens:           that the distilled student read in its training
    asked:            that the teacher read
    tokens_a_step:    that the rival reads in a step
    """
    ### BEGIN SOLUTION
    flops = 6 * student * tokens + 2 * teacher * asked
    return flops / (6 * student * tokens_a_step)
    ### END SOLUTION


# %% question="14.2" part="check"
checks.check("14.2", rival_steps)

# %% [markdown] question="14.2" part="hint"
# Add up what the distilled row costs: its own steps, and the teacher's one
# reading.

# %% [markdown] question="14.2" part="hint"
# A step of the rival costs six times the student's parameters, for each token.

# %% [markdown] question="14.2" part="note"
# A teacher that is kept in a box is paid once, however many students learn
# from it. Say in the memo whether you count it once, or once a student.

# %% [markdown] question="14.3" part="task"
# ## 14.3 false_win
#
# **14.3** · derive · difficulty 3/5 · importance 5/5 · 12 minutes · 4 points
#
# A team tries several ideas, none of which does anything. For each it draws
# an interval that misses the truth with the probability `alpha`, on either
# side equally often, and independently of the others. An interval wholly
# *above* zero is written up as a win. **Derive the probability** that there
# is something to write up.


# %% question="14.3" part="answer"
def false_win(tries: int, alpha: float) -> float:
    """The probability of one false win or more.

    tries: how many ideas were tried
    alpha: 0.05 for intervals of 95 %
    """
    ### BEGIN SOLUTION
    return 1 - (1 - alpha / 2) ** tries
    ### END SOLUTION


# %% question="14.3" part="check"
checks.check("14.3", false_win)

# %% [markdown] question="14.3" part="hint"
# With what probability does one idea not win?

# %% [markdown] question="14.3" part="hint"
# Half of the misses are above zero. The tries are independent.

# %% [markdown] question="14.3" part="note"
# With 28 tries it is about one half. So a memo says how many things were
# tried, and the winner is run once more with new seeds.

# %% [markdown] question="14.4" part="task"
# ## 14.4 forecasts
#
# **14.4** · predict · difficulty 2/5 · importance 4/5 · 10 minutes · 5 points
#
# **Guess first**, without running code.
#
# - `five`: Paired differences of five seeds have a sample deviation of 0.04.
#   The interval reaches how far to either side?
# - `two`: The same deviation with two seeds.
# - `inputs`: A model answers half of all inputs. It is tested on 400. The
#   standard error of its exact match?
# - `tries`: Twenty ideas that do nothing, each with an interval of 95 %. The
#   chance that one at least lies above zero?
# - `flops`: A student of 100 million parameters reads 10 million tokens. Its
#   teacher of a billion has read 2 million of them, once. The rival of equal
#   FLOPs reads how many times the student's tokens?
#
# A guess counts as right within a factor of 1.5, and half otherwise.

# %% question="14.4" part="answer"
### BEGIN SOLUTION
forecasts = {
    "five": 0.05,
    "two": 0.36,
    "inputs": 0.025,
    "tries": 0.4,
    "flops": 1.67,
}
### STUB
# forecasts = {
#     "five": ...,
#     "two": ...,
#     "inputs": ...,
#     "tries": ...,
#     "flops": ...,
# }
### END SOLUTION

# %% question="14.4" part="check"
checks.check("14.4", forecasts)

# %% [markdown] question="14.4" part="hint"
# t is 2.8 for five seeds and 12.7 for two. The root of 5 is 2.2.

# %% [markdown] question="14.4" part="hint"
# One input has a deviation of 0.5. Each idea wins with 1/40. The teacher
# makes forward passes only.

# %% [markdown] question="14.4" part="note"
# Two seeds instead of five make the interval seven times as wide, and not
# 1.6 times: the deviation itself is hardly known from two.

# %% [markdown] question="14.5" part="task"
# ## 14.5 may_the_memo_say_so
#
# **14.5** · explain · difficulty 3/5 · importance 5/5 · 20 minutes · 6 points
#
# The evidence, from five paired seeds and 800 test inputs:
#
# | distilled minus | exact match | KL, nats |
# |---|---|---|
# | hard labels, equal tokens | 0.14 [0.10, 0.18] | -0.21 [-0.25, -0.17] |
# | hard labels, equal FLOPs | 0.03 [-0.01, 0.07] | -0.17 [-0.22, -0.12] |
#
# Recovery 0.62 [0.57, 0.67]. All in Polish. One option of each item is right.

# %% [markdown] question="14.5" part="options"
# **a.** On exact match at equal FLOPs the memo may say:
#
# - **A** "Distillation makes no difference."
#   > wrong: The interval reaches to 0.07. A difference of that size was not
#   > ruled out.
# - **B** "Distilled students answer 3 points more."
#   > wrong: Zero is within the interval; five other seeds may give a minus.
# - **C** "Not shown here; more than 7 points is unlikely."
#   > right: It says what was not shown and what was ruled out.

# %% [markdown] question="14.5" part="options"
# **b.** The interval of the difference covers zero, but each row's own
# interval was not looked at. Somebody finds that the two overlap. This
#
# - **A** adds nothing: pairs were already compared by their differences.
#   > right: Rows of a seed rise and fall together. Overlap of the rows says
#   > nothing about their difference.
# - **B** confirms that there is no difference.
#   > wrong: Rows may overlap while every seed shows the same difference.
# - **C** shows that the seeds were too few.
#   > wrong: More seeds would narrow both kinds of interval; overlap is no
#   > measure of how many are needed.

# %% [markdown] question="14.5" part="options"
# **c.** KL favours the distilled row at equal FLOPs; exact match does not
# show it. The memo should
#
# - **A** report the KL, because it is the more sensitive measure.
#   > wrong: The question was about exact match. A measure that is picked
#   > after the run is one more try.
# - **B** report both, and name the one that was asked about beforehand.
#   > right: The reader decides whether closeness to the teacher is of use to
#   > them.
# - **C** report the exact match, as users do not see a KL.
#   > wrong: Leaving out a measured row is a choice made after the run.

# %% [markdown] question="14.5" part="options"
# **d.** "Recovery is 0.62, so the student answers 62 % of what the teacher
# answers." This sentence is
#
# - **A** true if c' says all that c says.
#   > wrong: Then the floor is zero, and the share is one of nats all the same.
# - **B** true on average over inputs.
#   > wrong: No average turns a share of nats into a share of answers.
# - **C** false: recovery is a share of the gain in KL.
#   > right: It compares divergences per token, and says nothing of whole
#   > answers.

# %% [markdown] question="14.5" part="options"
# **e.** The rival's learning rate was the one tuned for the distilled
# student. The win at equal tokens is
#
# - **A** unaffected, as both used the same rate.
#   > wrong: The same rate is not the same effort: it was chosen for one of
#   > the two.
# - **B** at most as large as measured, once the rival is tuned as well.
#   > right: On the data it is tuned on, a rival can only gain by being tuned.
# - **C** void, so the memo leaves it out.
#   > wrong: It is a finding under a condition. The memo states the condition.

# %% [markdown] question="14.5" part="options"
# **f.** Which recommendation is borne by the table?
#
# - **A** "Use distillation for all six languages."
#   > wrong: One language was measured.
# - **B** "If tokens are the limit, distil; if FLOPs are, test once more."
#   > right: It says what was shown under which budget, and what to do next.
# - **C** "Buy a larger teacher, since recovery is below one."
#   > wrong: No teacher's size was varied.

# %% question="14.5" part="answer"
### BEGIN SOLUTION
may_the_memo_say_so = {
    "a": "C",
    "b": "A",
    "c": "B",
    "d": "C",
    "e": "B",
    "f": "B",
}
### STUB
# may_the_memo_say_so = {
#     "a": ...,
#     "b": ...,
#     "c": ...,
#     "d": ...,
#     "e": ...,
#     "f": ...,
# }
### END SOLUTION

# %% question="14.5" part="check"
checks.check("14.5", may_the_memo_say_so)

# %% [markdown] question="14.5" part="hint"
# For each sentence ask: which cell of the table would have to be different
# for it to be false?

# %% [markdown] question="14.5" part="hint"
# An interval has two ends, and both say something.

# %% [markdown] question="14.5" part="note"
# A memo is graded by what its evidence bears, and not by how well its method
# did.
