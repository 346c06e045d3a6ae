# %% [markdown]
# # Exercises 2 · Two distributions
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/exercises/ch02.ipynb)
#
# | what it costs | |
# |---|---|
# | your time | 75 minutes |
# | two CPU cores | seconds |
# | network, account, key | none |
#
# Read chapter 2 first (`notebooks/02_two_distributions.ipynb`).

# %% [markdown]
# Each exercise has a cell for your answer and a cell that checks it. A check
# says *not attempted*, *raised*, *wrong* or *right*. Below it stand a hint and
# the solution: take away the `#` in front of a line and run the cell. The
# first run gives one hint, the second run another.

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

# %% [markdown] question="2.1" part="task"
# ## 2.1 log_probs
#
# **2.1** · code · difficulty 2/5 · importance 5/5 · 15 minutes · 5 points
#
# A model's head often has more columns than its tokenizer has tokens: its
# number of rows was rounded up. The tokens come first; nobody ever trained the
# columns behind them. A logit that stands there means nothing, and it may be
# anything.
#
# Write the function that every loss of this course begins with: from logits to
# the log-probabilities of the real tokens, at a temperature. It must also work
# for logits in the hundreds or thousands.


# %% question="2.1" part="answer"
def log_probs(
    logits: torch.Tensor, temperature: float, vocabulary: int
) -> torch.Tensor:
    """log softmax(logits / temperature) over the real tokens.

    logits: float tensor [V] for one position, or [N, V] for several; the first
        `vocabulary` of the V columns are tokens, the rest is padding

    Returns [vocabulary] or [N, vocabulary], float32 or float64.
    """
    ### BEGIN SOLUTION
    z = logits[..., :vocabulary] / temperature
    z = z - z.amax(dim=-1, keepdim=True)
    return z - z.exp().sum(dim=-1, keepdim=True).log()
    ### END SOLUTION


# %% question="2.1" part="check"
checks.check("2.1", log_probs)

# %% [markdown] question="2.1" part="hint"
# Three things happen: columns are dropped, logits are divided, a log-sum-exp
# is subtracted. In which order, so that the probabilities of the real tokens
# sum to 1?

# %% [markdown] question="2.1" part="hint"
# Drop first. Then divide. Subtracting the largest logit of each position
# changes no probability, and after it exp cannot overflow. Never take the
# logarithm of a softmax: where it has rounded to 0 the answer is -inf.

# %% [markdown] question="2.1" part="note"
# Padding goes before the sum, because in the sum it takes a share. The maximum
# goes first, because softmax does not see a shift and exp does. What is left
# is one subtraction. torch.log_softmax does the last two steps as well;
# kdlib.divergences.tempered_log_softmax says why it does not use it on a CPU.

# %% [markdown] question="2.2" part="task"
# ## 2.2 answer_log_probs
#
# **2.2** · code · difficulty 3/5 · importance 5/5 · 15 minutes · 4 points
#
# A view holds rows of token ids: a prompt, the answer, and padding on one
# side. The model has given logits for every place. **What log-probability did
# it give to each token of the answer?**
#
# The same function then works for the teacher's view and for the student's,
# and the two results can be compared token by token. Use torch alone, not
# `kdlib.pairs`.


# %% question="2.2" part="answer"
def answer_log_probs(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    completion_mask: torch.Tensor,
) -> torch.Tensor:
    """The log-probability of each answer token, row after row.

    logits [B, T, V]: the model's output, one distribution a place
    input_ids [B, T]: what the model read
    completion_mask [B, T]: bool, True where a token belongs to the answer (its
        end token too); never True in column 0

    Returns [N], N the number of True places.
    """
    ### BEGIN SOLUTION
    chosen = completion_mask[:, 1:]
    rows = logits[:, :-1][chosen].log_softmax(dim=-1)
    return rows.gather(-1, input_ids[:, 1:][chosen][:, None])[:, 0]
    ### END SOLUTION


# %% question="2.2" part="check"
checks.check("2.2", answer_log_probs)

# %% [markdown] question="2.2" part="hint"
# At place t the model has read the tokens 0 to t. Which token is its
# distribution about?

# %% [markdown] question="2.2" part="hint"
# Cut the last place off the logits and the first one off ids and mask. Then
# place t of the one belongs to place t of the others. `gather` picks one
# column in each row.

# %% [markdown] question="2.2" part="note"
# The first answer token is predicted from the prompt's last place. A mask laid
# on unshifted logits picks as many rows, raises nothing, and never trains the
# first token. Only its values tell.

# %% [markdown] question="2.3" part="task"
# ## 2.3 log_prob_slope
#
# **2.3** · derive · difficulty 3/5 · importance 4/5 · 15 minutes · 4 points
#
# Let $p_v(T) = \mathrm{softmax}(z / T)_v$. When $T$ rises, the favourite loses
# and the last one gains. What about the tokens between them?
#
# **Derive** $\dfrac{\partial}{\partial T} \log p_v(T)$, then type the formula
# in. Which tokens gain? Can a token gain first and lose later?


# %% question="2.3" part="answer"
def log_prob_slope(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """d/dT of log softmax(logits / T), at T = temperature.

    logits: [V] for one position, or [N, V] for several

    Returns a slope for each token, in the shape of logits.
    """
    ### BEGIN SOLUTION
    p = (logits / temperature).softmax(dim=-1)
    average = (p * logits).sum(dim=-1, keepdim=True)
    return (average - logits) / temperature**2
    ### END SOLUTION


# %% question="2.3" part="check"
checks.check("2.3", log_prob_slope)

# %% [markdown] question="2.3" part="hint"
# Write $\log p_v = z_v / T - \log \sum_u e^{z_u / T}$ and differentiate both
# terms.

# %% [markdown] question="2.3" part="hint"
# The first term gives $-z_v / T^2$. In the second the sum is differentiated
# and divided by itself: what remains is a sum of $z_u$, each with a weight
# that you know.

# %% [markdown] question="2.3" part="note"
# $(\mathrm{E}_p[z] - z_v) / T^2$: a token gains exactly where its logit is
# below the average under p(T). That average falls as T rises, from the largest
# logit to the plain mean. So a token above the plain mean gains first, while
# the average is still above it, and loses later.

# %% [markdown] question="2.4" part="task"
# ## 2.4 entropy_of_parts
#
# **2.4** · code · difficulty 4/5 · importance 3/5 · 15 minutes · 4 points
#
# A vocabulary of 152,000 tokens is cut into $K$ parts: chunks that fit into
# memory, or one part on each GPU. Each part $k$ reports two numbers for every
# position:
#
# - its log-sum-exp, $\ell_k = \log \sum_{v \in k} e^{z_v}$, and
# - its average logit under its *own* softmax,
#   $m_k = \sum_{v \in k} e^{z_v - \ell_k} z_v$.
#
# **That is enough for the entropy of the whole distribution.** Logits may be
# in the thousands.


# %% question="2.4" part="answer"
def entropy_of_parts(
    log_sums: torch.Tensor, means: torch.Tensor
) -> torch.Tensor:
    """The entropy of softmax over all parts together, in nats.

    log_sums, means [K, N]: what each of K parts reports for N positions

    Returns [N].
    """
    ### BEGIN SOLUTION
    whole = log_sums.logsumexp(dim=0)
    shares = (log_sums - whole).exp()
    return whole - (shares * means).sum(dim=0)
    ### END SOLUTION


# %% question="2.4" part="check"
checks.check("2.4", entropy_of_parts)

# %% [markdown] question="2.4" part="hint"
# For one part the entropy is (log-sum-exp) - (average logit). What are these
# two for the whole vocabulary?

# %% [markdown] question="2.4" part="hint"
# The log-sum-exp of the whole is the log-sum-exp of the parts' log-sum-exps. A
# part's share of the probability is e to (its own minus the whole's). The
# average logit is an average of averages, with these shares.

# %% [markdown] question="2.4" part="note"
# H = log-sum-exp - average logit, and both can be put together from parts. The
# same sum in another order: H = H(shares) + average of the parts' entropies,
# first which part, then which token in it. This is how fused losses and
# sharded heads get by without a whole row of logits.

# %% [markdown] question="2.5" part="task"
# ## 2.5 five_numbers
#
# **2.5** · predict · difficulty 3/5 · importance 4/5 · 5 minutes · 5 points
#
# **Guess first**, without running code:
#
# - `odds`: at $T = 1$ the teacher finds one token 1,000 times as likely as
#   another. How many times at $T = 3$?
# - `padded_share`: 151,669 real tokens, whose log-sum-exp is 2. Behind them
#   come 267 untrained columns, each with logit 0. Which share of the
#   probability do the 267 get?
# - `bf16_error`: by how much can a logit between 16 and 32 change when it is
#   rounded to bfloat16?
# - `half_limit`: what is the largest logit whose exponential float16 can hold?
#   Its largest number is 65,504.
# - `tokens`: the teacher gives one token 0.8, and shares the rest evenly among
#   1,000 others. What is its effective number of tokens, $e^H$?
#
# A guess counts as right within a factor of 1.5, and half otherwise.

# %% question="2.5" part="answer"
### BEGIN SOLUTION
five_numbers = {
    "odds": 10,
    "padded_share": 0.97,
    "bf16_error": 0.0625,
    "half_limit": 11.1,
    "tokens": 6.6,
}
### STUB
# five_numbers = {
#     "odds": ...,
#     "padded_share": ...,
#     "bf16_error": ...,
#     "half_limit": ...,
#     "tokens": ...,
# }
### END SOLUTION

# %% question="2.5" part="check"
checks.check("2.5", five_numbers)

# %% [markdown] question="2.5" part="hint"
# Logarithms of odds are differences of logits, and T divides them. A column
# counts with e to its logit. bfloat16 keeps 7 bits behind the leading 1.

# %% [markdown] question="2.5" part="hint"
# The cube root of 1,000. 267 against e^2 = 7.4. From 16 to 32 bfloat16 has 128
# steps, and rounding moves by half a step at most. The logarithm of 65,504.
# For the last one: H = 0.8 log(1/0.8) + 0.2 log(1,000/0.2).

# %% [markdown] question="2.5" part="note"
# The 267 columns take 97 %, though they are 0.2 % of all columns: it depends
# on the level of the real logits, which no loss controls. The 0.06 of bfloat16
# is an error of 6 % in a probability. And 0.2 of the probability, thinly
# spread over 1,000 tokens, makes 6.6 effective tokens.

# %% [markdown] question="2.6" part="task"
# ## 2.6 two_distributions
#
# **2.6** · explain · difficulty 2/5 · importance 5/5 · 10 minutes · 5 points
#
# One option of each item is right. Say to yourself why the others are not,
# before you check.

# %% [markdown] question="2.6" part="options"
# **a.** The teacher reads $(c, z)$, the student $(c', z)$. What is equal on
# both sides?
#
# - **A** The positions: an answer token stands in the same column.
#   > wrong: The prompts differ in length, so the answers start in different
#   > columns.
# - **B** The answer's tokens, one by one, and so the number of rows that are
#   compared.
#   > right: Row n of either side is a distribution for the same token after
#   > the same answer so far.
# - **C** The prompts: both models must see the same text to be compared.
#   > wrong: That is the special case c' = c. Here the difference of the
#   > prompts is what the student learns to do without.

# %% [markdown] question="2.6" part="options"
# **b.** What is dark knowledge?
#
# - **A** What the teacher's distribution says beyond its favourite: how it
#   ranks the tokens that it does not choose.
#   > right: The answer alone does not show it, and a soft target does.
# - **B** What the teacher knows of languages that the student is never asked
#   for.
#   > wrong: It is no store of other tasks. It is in the very distributions
#   > that the student is trained on.
# - **C** Noise: probability that a better trained teacher would not have given
#   away.
#   > wrong: Noise would not know which locales write alike. Part of what is
#   > off the answer is noise, but not all of it.

# %% [markdown] question="2.6" part="options"
# **c.** Which of these does a temperature of 4 leave unchanged?
#
# - **A** The entropy.
#   > wrong: It rises, unless all logits are equal.
# - **B** The ratio of two tokens' probabilities.
#   > wrong: It becomes its own fourth root.
# - **C** The order of the tokens.
#   > right: Division by a positive number keeps the order of the logits, so
#   > the favourite stays too.

# %% [markdown] question="2.6" part="options"
# **d.** A loss is computed as the squared difference of the teacher's and the
# student's logits. The student's distribution equals the teacher's at every
# position. What can the loss be?
#
# - **A** Zero: equal distributions come from equal logits.
#   > wrong: Logits are fixed only up to a constant at each position.
# - **B** Anything from zero upwards.
#   > right: A constant added to one side's logits changes the loss and no
#   > probability.
# - **C** Small, but not zero, because of rounding.
#   > wrong: A constant of 10 gives a loss of 100, and has nothing to do with
#   > rounding.

# %% [markdown] question="2.6" part="options"
# **e.** Teacher and student have heads of 152,064 and 151,936 columns, and one
# tokenizer with fewer tokens than either. How are they compared?
#
# - **A** On the columns that both have, or on the real tokens alone; the rest
#   is dropped before the softmax.
#   > right: No token stands in the dropped columns, so nothing is lost, and
#   > the result does not depend on a logit that nobody trained.
# - **B** The smaller side is filled up with zeros.
#   > wrong: A zero is a logit. Its share depends on the level of the others,
#   > from nothing to nearly all.
# - **C** They cannot be: distillation needs heads of one size.
#   > wrong: It needs one tokenizer, so that column 17 means the same token on
#   > both sides.

# %% question="2.6" part="answer"
### BEGIN SOLUTION
two_distributions = {
    "a": "B",
    "b": "A",
    "c": "C",
    "d": "B",
    "e": "A",
}
### STUB
# two_distributions = {
#     "a": ...,
#     "b": ...,
#     "c": ...,
#     "d": ...,
#     "e": ...,
# }
### END SOLUTION

# %% question="2.6" part="check"
checks.check("2.6", two_distributions)

# %% [markdown] question="2.6" part="hint"
# For each option ask: is this about logits, about probabilities, or about
# tokens?

# %% [markdown] question="2.6" part="hint"
# For d and e, add 10 to all logits of one side. Which numbers change?

# %% [markdown] question="2.6" part="note"
# A distribution is logits up to a constant, over the tokens of one tokenizer.
# A loss that sees anything else measures something else.
