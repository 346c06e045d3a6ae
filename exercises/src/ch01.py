# %% [markdown]
# # Exercises 1 · Why distil
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/exercises/ch01.ipynb)
#
# | what it costs | |
# |---|---|
# | your time | 60 minutes |
# | two CPU cores | seconds |
# | network, account, key | none |
#
# Read chapter 1 first (`notebooks/01_why_distil.ipynb`).

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

# %% [markdown] question="1.1" part="task"
# ## 1.1 kv_cache_bytes
#
# **1.1** · code · difficulty 2/5 · importance 4/5 · 15 minutes · 4 points
#
# A model that writes a token keeps the keys and the values of all tokens
# before it. Otherwise it would compute them again for every new token. This
# **KV cache** often takes more memory than the weights. It is one reason why
# a long context is dear, and why a student that needs no context is cheap.
#
# A config states how large a model is. How many bytes does its cache take?


# %% question="1.1" part="answer"
def kv_cache_bytes(config: dict, tokens: int, bytes_per_number: int) -> int:
    """Bytes of the KV cache of one sequence.

    config: entries as in a Hugging Face config.json:
        num_hidden_layers    layers
        hidden_size          width of the model
        num_attention_heads  heads that ask (query heads)
        num_key_value_heads  heads that are stored; where it is missing or
                             None, as many as query heads
        head_dim             width of a head; where it is missing or None,
                             hidden_size // num_attention_heads
    bytes_per_number: 4 for float32, 2 for bfloat16, 1 for int8
    """
    ### BEGIN SOLUTION
    heads = config["num_attention_heads"]
    stored = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    per_token = 2 * config["num_hidden_layers"] * stored * head_dim
    return per_token * tokens * bytes_per_number
    ### END SOLUTION


# %% question="1.1" part="check"
checks.check("1.1", kv_cache_bytes)

# %% [markdown] question="1.1" part="hint"
# Follow one token through one layer. Which two vectors does the layer keep
# of it, and how long are they?

# %% [markdown] question="1.1" part="hint"
# One vector has (stored heads) x (width of a head) numbers. There are two of
# them a layer: a key and a value. `config.get(name) or other` covers both a
# missing entry and None.

# %% [markdown] question="1.1" part="note"
# Two vectors (key and value), for every layer, every stored head and every
# token. The heads that ask leave nothing behind, and hidden_size does not
# appear unless the head's width is derived from it.

# %% [markdown] question="1.2" part="task"
# ## 1.2 distillation_flops
#
# **1.2** · code · difficulty 3/5 · importance 5/5 · 15 minutes · 4 points
#
# A teacher with $N_t$ parameters reads $(c, z)$ and the answer $y$. A student
# with $N_s$ parameters reads $(c', z)$ and the same $y$. The teacher's targets
# are written to a file, so it reads every example **once**. The student is
# trained on all examples in every epoch.
#
# Count as in chapter 0. A forward pass costs 2 FLOPs a parameter and token: a
# multiplication and an addition. A backward pass costs twice as much as a
# forward pass. What does the whole distillation cost?


# %% question="1.2" part="answer"
def distillation_flops(
    teacher_parameters: int,
    student_parameters: int,
    context: int,
    simplified: int,
    inputs: torch.Tensor,
    answers: torch.Tensor,
    epochs: int,
) -> float:
    """FLOPs of making the targets and of training the student, together.

    context, simplified: tokens of c and of c', before every example
    inputs [n], answers [n]: tokens of z and of y in each example
    epochs: how often the student reads each example

    Returns one number: an int, a float or a tensor of shape [].
    """
    ### BEGIN SOLUTION
    teacher_tokens = int((context + inputs + answers).sum())
    student_tokens = int((simplified + inputs + answers).sum())
    targets = 2 * teacher_parameters * teacher_tokens
    training = 6 * student_parameters * student_tokens * epochs
    return targets + training
    ### END SOLUTION


# %% question="1.2" part="check"
checks.check("1.2", distillation_flops)

# %% [markdown] question="1.2" part="hint"
# Count tokens first, on each side alone. How many tokens does the teacher
# read in one example? How many does the student read?

# %% [markdown] question="1.2" part="hint"
# The cost is (FLOPs a parameter and token) x parameters x tokens, once for
# the teacher and once for the student. The teacher only runs forward: 2. The
# student runs forward and backward: 2 + 4.

# %% [markdown] question="1.2" part="note"
# Each side is charged for what it reads itself: the teacher for c, z and y,
# once; the student for c', z and y, in every epoch. The teacher's part is
# often the larger one. It is also the part that a comparison with a plainly
# trained model tends to forget.

# %% [markdown] question="1.3" part="task"
# ## 1.3 critical_batch
#
# **1.3** · derive · difficulty 3/5 · importance 3/5 · 15 minutes · 3 points
#
# A processor does $F$ FLOPs a second and reads $W$ bytes a second from
# memory. A model has $N$ parameters of $b$ bytes each. To write the next
# token of a batch of $B$ sequences it
#
# - reads every weight once, which takes the time $T_{\text{read}}$, and
# - does 2 FLOPs for each weight and sequence, which takes
#   $T_{\text{compute}}$.
#
# For small $B$ the processor waits for the memory. Write both times down.
# **Derive the $B$ at which they are equal**, then type the formula in. Where
# has $N$ gone, and what follows for a small student on a phone?


# %% question="1.3" part="answer"
def critical_batch(flops_per_second, bytes_per_second, bytes_per_number):
    """The batch size at which reading and computing take equally long.

    flops_per_second, bytes_per_second, bytes_per_number: numbers, or tensors
        of one shape with a device at each place
    """
    ### BEGIN SOLUTION
    return bytes_per_number * flops_per_second / (2 * bytes_per_second)
    ### END SOLUTION


# %% question="1.3" part="check"
checks.check("1.3", critical_batch)

# %% [markdown] question="1.3" part="hint"
# N weights of b bytes are N b bytes. How long does memory take for them at W
# bytes a second?

# %% [markdown] question="1.3" part="hint"
# Reading takes N b / W seconds, whatever the batch. Computing takes
# 2 N B / F seconds. Set them equal.

# %% [markdown] question="1.3" part="note"
# N b / W = 2 N B / F gives B = b F / (2 W). N cancels: a student does not
# reach the point sooner than its teacher. Below it the time of a token is
# N b / W. So one user on one phone gains from a smaller N (distillation) and
# from a smaller b (quantisation), and gains from both together.

# %% [markdown] question="1.4" part="task"
# ## 1.4 gigabytes
#
# **1.4** · predict · difficulty 2/5 · importance 3/5 · 5 minutes · 4 points
#
# A teacher has the shape of Llama 3 8B: 8.03 billion parameters, 32 layers,
# 32 query heads, 8 stored heads of width 128, a vocabulary of 128,256. All
# numbers are bfloat16. A gigabyte is $10^9$ bytes. **Guess first**, without
# paper and without running code:
#
# - `weights`: the weights;
# - `cache`: the KV caches of 64 users with 8,192 tokens each;
# - `all_targets`: the teacher's whole distribution for each of one million
#   answer tokens;
# - `kept_targets`: only the 8 likeliest tokens of each, with a 4-byte index
#   for each number.
#
# A guess counts as right within a factor of 1.5, and half otherwise. Then
# compute what surprised you. For the cache, use your function of 1.1.

# %% question="1.4" part="answer"
### BEGIN SOLUTION
gigabytes = {
    "weights": 16.1,
    "cache": 68.7,
    "all_targets": 257,
    "kept_targets": 0.048,
}
### STUB
# gigabytes = {
#     "weights": ...,
#     "cache": ...,
#     "all_targets": ...,
#     "kept_targets": ...,
# }
### END SOLUTION

# %% question="1.4" part="check"
checks.check("1.4", gigabytes)

# %% [markdown] question="1.4" part="hint"
# bfloat16 has 2 bytes. Which of the four grows with users, which with answer
# tokens, and which with neither?

# %% [markdown] question="1.4" part="hint"
# Per token, the cache takes 2 x 32 x 8 x 128 numbers. Per answer token, all
# targets take 128,256 numbers; the kept ones take 8 numbers and 8 indices.

# %% [markdown] question="1.4" part="note"
# The cache of 64 users is four times as large as the weights. The whole
# distributions of a small training set are sixteen times as large. Eight
# tokens of each fit in 48 MB: this is why a teacher's targets are cut to the
# likeliest. What the cut costs is a question for a later chapter.

# %% [markdown] question="1.5" part="task"
# ## 1.5 where_the_gain_lies
#
# **1.5** · explain · difficulty 2/5 · importance 5/5 · 10 minutes · 4 points
#
# One option of each item is right. Say to yourself why the others are not,
# before you check.

# %% [markdown] question="1.5" part="options"
# **a.** Why are there two models, and not one?
#
# - **A** A large model learns more from data than a small one; a small one
#   is cheaper to run. Each is used where it is better.
#   > right: Learning is paid for once and serving at every request, so
#   > the two stages want different sizes.
# - **B** A small model cannot represent what a large one computes, so the
#   large one has to stay beside it.
#   > wrong: After the training the teacher is not needed: the student
#   > answers alone.
# - **C** Two models are more accurate than one, as in an ensemble.
#   > wrong: At serving time there is one model. An ensemble would have to
#   > run both.

# %% [markdown] question="1.5" part="options"
# **b.** The teacher reads $(c, z)$, and $c$ is always the same instruction.
# The student is served with $z$ alone. Where is $c$ then?
#
# - **A** Nowhere: the student has to guess what is wanted.
#   > wrong: This describes the teacher without its instruction. The
#   > student's targets were made with it.
# - **B** In the prompt: it is put in front of $z$ before the student reads.
#   > wrong: Then the student would read (c, z), and the tokens of c would
#   > cost time and cache again.
# - **C** In the student's weights.
#   > right: Each target depends on c, so training against them writes c's
#   > effect into the weights.

# %% [markdown] question="1.5" part="options"
# **c.** A teacher's weights are quantised from 16 to 4 bits. A student has a
# quarter of the teacher's parameters, in 16 bits. Both files are equally
# large. Which is true?
#
# - **A** Both need the same number of FLOPs for a token.
#   > wrong: FLOPs go with the number of parameters. Only the student has
#   > fewer of them.
# - **B** The student needs a quarter of the FLOPs; at batch size 1 the two
#   read about as many bytes of weights for a token.
#   > right: So they are about as fast for a single user, who waits for the
#   > memory, and the student is ahead in large batches.
# - **C** One has to choose: a student cannot be quantised.
#   > wrong: It can. The two savings multiply.

# %% [markdown] question="1.5" part="options"
# **d.** In which case will a distilled student gain least over the same small
# model, trained alone?
#
# - **A** Few labels, and many inputs without a label.
#   > wrong: Here it gains most: the teacher makes targets for the inputs
#   > that nobody labelled.
# - **B** The labels are noisy, and the teacher has seen far more data.
#   > wrong: The teacher's distribution averages over noise that a single
#   > label hands on.
# - **C** Clean labels, one right answer each, for all inputs that there are.
#   > right: Then the teacher has hardly anything to add. The quickstart
#   > shows it: with labels for all inputs, plain training did as well.

# %% question="1.5" part="answer"
### BEGIN SOLUTION
where_the_gain_lies = {
    "a": "A",
    "b": "C",
    "c": "B",
    "d": "C",
}
### STUB
# where_the_gain_lies = {
#     "a": ...,
#     "b": ...,
#     "c": ...,
#     "d": ...,
# }
### END SOLUTION

# %% question="1.5" part="check"
checks.check("1.5", where_the_gain_lies)

# %% [markdown] question="1.5" part="hint"
# Ask in each item who pays for what, and when: once, or at every request?

# %% [markdown] question="1.5" part="hint"
# For c, write down for both models the FLOPs of a token (2 N) and the bytes
# that are read for it (N b). For d, ask what the teacher knows that the
# labels do not say.

# %% [markdown] question="1.5" part="note"
# Distillation moves knowledge from where learning is good to where serving
# is cheap. It creates none. It pays where the teacher knows more than the
# labels say, and where requests are many.
