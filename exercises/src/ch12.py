# %% [markdown]
# # Exercises 12 · Learning from your own mistakes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/exercises/ch12.ipynb)
#
# | what it costs | |
# |---|---|
# | your time | 80 minutes |
# | two CPU cores | seconds |
# | network, account, key | none |
#
# Read chapter 12 first (`notebooks/12_own_mistakes.ipynb`).

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

# %% [markdown] question="12.1" part="task"
# ## 12.1 score_weights
#
# **12.1** · derive · difficulty 4/5 · importance 4/5 · 25 minutes · 4 points
#
# The chapter's on-policy loss takes the student's prefixes as given. The
# gradient of the *sequence-level* reverse KL does not: a word also decides
# which prefixes come after it. As a policy gradient it is the mean of
#
# $$\sum_t w_t\, \nabla \log p_s(y_t \mid y_{<t})$$
#
# over answers that the student draws. **Derive the weights $w_t$** with the
# least in them: leave out every term that has the mean zero whatever the
# models are. Then type them in.


# %% question="12.1" part="answer"
def score_weights(
    student_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """The factor [B, L] of each token's score; 0 in the padding.

    student_log_probs, teacher_log_probs: [B, L] log-probabilities of the
        tokens that the student drew. What stands in the padding means nothing
    mask: [B, L] bool, True for a token of the answer; padding on the right
    """
    ### BEGIN SOLUTION
    each = torch.where(mask, student_log_probs - teacher_log_probs, 0.0)
    return each.flip(1).cumsum(1).flip(1)
    ### END SOLUTION


# %% question="12.1" part="check"
checks.check("12.1", score_weights)

# %% [markdown] question="12.1" part="hint"
# The gradient of a mean over y ~ p_s of R(y) is the mean of R(y) times the
# score of the whole answer, and both are sums over its tokens. Multiply out.

# %% [markdown] question="12.1" part="hint"
# Take the term of word u in R and of word t in the score. If u stands before
# t, it is fixed when word t is drawn, and a score's mean is zero.

# %% [markdown] question="12.1" part="note"
# The sum from t to the end is called reward-to-go. MiniLLM (Gu et al. 2023,
# arXiv 2306.08543) splits it in two: the term of t itself, summed over the
# vocabulary, which is the chapter's per-token reverse KL, and the rest, which
# is where the noise is.

# %% [markdown] question="12.2" part="task"
# ## 12.2 own_words_mean
#
# **12.2** · code · difficulty 3/5 · importance 5/5 · 15 minutes · 4 points
#
# A student has written a batch of answers. Each row ends with the end token,
# and the rest of the row is padding. This tokenizer pads **with the end
# token**, as many do. A row that reached the width without an end was cut: all
# of its tokens are the student's own.
#
# Return the mean loss per token, over all tokens that the student wrote.


# %% question="12.2" part="answer"
def own_words_mean(
    losses: torch.Tensor, tokens: torch.Tensor, end: int
) -> torch.Tensor:
    """The mean of `losses` over the tokens that the student wrote.

    losses: [B, L] one loss a token; losses[b, i] belongs to tokens[b, i]
    tokens: [B, L] what was generated, padded with `end` on the right
    end:    the end token, which is also the padding
    """
    ### BEGIN SOLUTION
    is_end = tokens == end
    ends_before = is_end.cumsum(1) - is_end.long()
    mask = ends_before == 0
    return losses[mask].mean()
    ### END SOLUTION


# %% question="12.2" part="check"
checks.check("12.2", own_words_mean)

# %% [markdown] question="12.2" part="hint"
# A token was written by the student if no end token stands before it. That is
# also true of the end token itself, the first one.

# %% [markdown] question="12.2" part="hint"
# A cumulative sum counts the end tokens so far. Take off the token itself.
# Divide once, by the number of tokens in the mask.

# %% [markdown] question="12.2" part="note"
# A mask made by comparing with the padding forgets the one token that teaches
# a student to stop (huggingface/trl#6357). `complete(keep_end=True)` keeps it,
# and a completion without it is known to have been cut.

# %% [markdown] question="12.3" part="task"
# ## 12.3 served_kl
#
# **12.3** · code · difficulty 4/5 · importance 4/5 · 20 minutes · 4 points
#
# A fast engine writes the answers with the student's weights of some steps
# ago, the **writer**, at a sampling temperature. The student will be served at
# temperature 1, and its loss is to be that of temperature 1.
#
# For each token return k1, weighted so that its mean over what was really
# drawn is $\mathrm{KL}(p_s \| p_t)$ at temperature 1, for a given prefix.


# %% question="12.3" part="answer"
def served_kl(
    writer_logits: torch.Tensor,
    sampling_temperature: float,
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """An unbiased estimate [N] of KL(student || teacher) at temperature 1.

    writer_logits, student_logits, teacher_logits: [N, V] raw logits, not
        divided by any temperature, at N prefixes
    sampling_temperature: tokens[i] was drawn from the writer's distribution
        at this temperature
    tokens: [N] the drawn tokens
    """

    ### BEGIN SOLUTION
    def log_prob(logits):
        rows = logits.log_softmax(-1)
        return rows.gather(-1, tokens[:, None])[:, 0]

    student, teacher = log_prob(student_logits), log_prob(teacher_logits)
    drawn_from = log_prob(writer_logits / sampling_temperature)
    return (student - drawn_from).exp() * (student - teacher)
    ### END SOLUTION


# %% question="12.3" part="check"
checks.check("12.3", served_kl)

# %% [markdown] question="12.3" part="hint"
# Importance weights are p(wanted) / p(drawn from). Which distribution were the
# tokens drawn from, exactly?

# %% [markdown] question="12.3" part="hint"
# softmax(writer_logits / sampling_temperature). The student and the teacher
# have no temperature anywhere: that one belongs to the sampling.

# %% [markdown] question="12.3" part="note"
# The log-probabilities that an engine returns may or may not contain the
# sampling temperature; ask it, or compute them again. Dividing a
# log-probability by the temperature does not repair it: the normaliser changes
# as well.

# %% [markdown] question="12.4" part="task"
# ## 12.4 forecasts
#
# **12.4** · predict · difficulty 2/5 · importance 4/5 · 8 minutes · 4 points
#
# **Guess first**, without running code. In the first two, a teacher says one
# of two answers of four words, each half of the time. They have no word in
# common in any place. A memoryless student has one distribution a place.
#
# - `valid`: The best student of the forward KL. What share of its draws is one
#   of the two answers?
# - `seeking`: A student that always gives the first answer. Its
#   sequence-level reverse KL, in nats?
# - `survives`: A student errs once in 100 words, and each word alike. What
#   share of its answers of 100 words has no error?
# - `price`: The teacher has 5 times the student's parameters P, and costs 2
#   FLOPs a parameter and token to read. Training on data costs 6 P a token.
#   How many times that is an on-policy token: written (2 P), trained on, and
#   read by the teacher?
#
# A guess counts as right within a factor of 1.5, and half otherwise.

# %% question="12.4" part="answer"
### BEGIN SOLUTION
forecasts = {
    "valid": 0.125,
    "seeking": 0.69,
    "survives": 0.37,
    "price": 3.0,
}
### STUB
# forecasts = {
#     "valid": ...,
#     "seeking": ...,
#     "survives": ...,
#     "price": ...,
# }
### END SOLUTION

# %% question="12.4" part="check"
checks.check("12.4", forecasts)

# %% [markdown] question="12.4" part="hint"
# The forward KL's best memoryless student has the teacher's marginals: one
# half for each word, in each place.

# %% [markdown] question="12.4" part="hint"
# Reverse KL of one answer: 1 times log(1 / 0.5). For 0.99 to the power of 100,
# remember exp(-1).

# %% [markdown] question="12.4" part="note"
# Seven answers in eight of the covering student are in no language, though
# each of its words is right half of the time. The seeking student pays log 2
# and says only right things. Which is better depends on who needs the second
# answer.

# %% [markdown] question="12.5" part="task"
# ## 12.5 whose_prefixes
#
# **12.5** · explain · difficulty 3/5 · importance 5/5 · 12 minutes · 5 points
#
# One option of each item is right. Say to yourself why the others are not,
# before you check.

# %% [markdown] question="12.5" part="options"
# **a.** `lmbda` is 1 and the loss at each prefix is the forward KL. In the
# limit of many steps, what is minimised?
#
# - **A** The sequence-level forward KL.
#   > wrong: Its chain rule needs the teacher's prefixes.
# - **B** The sequence-level reverse KL.
#   > wrong: That one needs reverse KL at the student's prefixes, and the
#   > gradient through the prefixes as well.
# - **C** Neither: a mixed sum, that is zero only for equal models.
#   > right: It is a divergence at prefixes of the student, which move with it.

# %% [markdown] question="12.5" part="options"
# **b.** A student draws its own answers, and is trained on them as hard
# labels. Its expected gradient is
#
# - **A** zero: the score has the mean zero.
#   > right: E[grad log p_s(y)] = 0 for y from p_s. Each step is noise.
# - **B** that of its entropy: it becomes more certain.
#   > wrong: Certainty can grow by chance, as a random walk that is stuck at an
#   > end. On average nothing pulls there in one step.
# - **C** that of the reverse KL, as the samples are on-policy.
#   > wrong: The teacher does not appear in it.

# %% [markdown] question="12.5" part="options"
# **c.** Which student is most in need of training on its own prefixes?
#
# - **A** One that matches its teacher at every prefix.
#   > wrong: Where the loss is zero everywhere, it matters not where it is
#   > measured.
# - **B** A small one, whose answers are long.
#   > right: It must err somewhere, and has the time to walk far from what it
#   > was trained on.
# - **C** A large one, whose answers are one word long.
#   > wrong: A first word has one prefix, the prompt, and it is the same for
#   > both.

# %% [markdown] question="12.5" part="options"
# **d.** A random student begins with `lmbda` 1. Its loss at first teaches it
#
# - **A** what the teacher says after nonsense.
#   > right: Its own prefixes are nonsense, where a teacher was never trained.
# - **B** nothing, as the gradient is zero.
#   > wrong: The two differ at these prefixes as well; there is a gradient.
# - **C** the same as with the teacher's prefixes.
#   > wrong: Other words come after nonsense than after a good beginning.

# %% [markdown] question="12.5" part="options"
# **e.** A student of sequence-level distillation is as good with greedy
# decoding as with a beam. A reason that fits is that
#
# - **A** a beam of five is too small for it.
#   > wrong: The same beam could help another student. Its size is not new.
# - **B** it was trained with beam search, and so it does that inside.
#   > wrong: Nothing in cross-entropy with given answers searches.
# - **C** its training answers were one for each input, so that little mass is
#   left for rivals.
#   > right: With one likely answer the next word is rarely in doubt, and a
#   > greedy step is rarely regretted.

# %% question="12.5" part="answer"
### BEGIN SOLUTION
whose_prefixes = {
    "a": "C",
    "b": "A",
    "c": "B",
    "d": "A",
    "e": "C",
}
### STUB
# whose_prefixes = {
#     "a": ...,
#     "b": ...,
#     "c": ...,
#     "d": ...,
#     "e": ...,
# }
### END SOLUTION

# %% question="12.5" part="check"
checks.check("12.5", whose_prefixes)

# %% [markdown] question="12.5" part="hint"
# Ask in each item who wrote the prefix, and who is asked about the next word.

# %% [markdown] question="12.5" part="hint"
# For b, write the expectation of the gradient of -log p_s(y) as a sum over y.

# %% [markdown] question="12.5" part="note"
# Two choices are made in every distillation of sequences: whose prefixes, and
# which divergence at them. Only two of the four combinations are a KL of whole
# answers.
