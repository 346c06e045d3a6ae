"""Where the doctor draws a line, and why there.

Healthy runs and batches of many kinds lie on the right side of every line
(tests/test_doctor.py); the faults injected there lie beyond.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# --- A batch ---

# How far a right gradient may be from the closed form. Right float32 losses are off by
# rounding, 1e-6 or so, and the smallest fault of the tests by 2e-3. 16-bit logits carry
# 8 or 11 bits of mantissa, and so does the gradient that comes back to them.
TOLERANCE, TOLERANCE_16_BIT = 2e-4, 3e-2
# Where the student has learnt all, p_s - p_t is rounding: a gradient counts as no
# smaller than this share of the tokens' weights, or than what the rounding of its
# logits makes of it.
LEAST = 2e-3
# |p_s - p_t| whose gradient nobody misses: rounding of float32 logits makes 1e-6.
LEARNT = 1e-5
# Another teacher answer must move the gradient. One that is used moves it by about as
# much as there is of it; one that is not, by nothing at all.
USED = 1e-6
# Dropout moves a teacher's logits by whole units; kernels that add in another order, by
# 1e-6 of them.
NOISE = 1e-3
# Nats by which the first response token may surprise a teacher more than the rest does.
# A teacher that sees a question, or nothing, is off by 1 to 4; one that stands at
# another place of its template than before an answer gives it less than e^-6 of that,
# and expects the rest all the same. The rest's surprise has the same limit: of a text
# that the teacher does not expect at all, a student's first attempts, nothing follows.
SURPRISE = 6.0
# Targets are of another position where they expect the token beside their own more than
# it, by this on average and four standard errors; a token that they rule out counts as
# so many nats. Text of equal tokens, or of tokens by chance, is at 0.
NEARER_BY, RULED_OUT = 1.0, 20.0
# The share of a teacher's probability that may lie where the tokenizer has no token.
DEAD_MASS = 1e-3
# The share that sparse targets must name. Below it a tenth of the distribution is one
# number, or nothing, by the treatment of the tail.
TEACHER_MASS = 0.9
# Cut off, a sum over the top k has its minimum at p_t / mass: 2 % too sure.
CUT_MASS = 0.98
# Renormalised, a student that has half of the teacher's mass elsewhere looks as if it
# were right.
SUPPORT_SHARE = 0.5

# A student's share of probability is a float32, and no smaller.
TINY = 1e-7

# --- A run ----------------------------------------------------------------------------

# Fewer steps than this say nothing about a trend.
STEPS = 20
# Nats a token that are not worth a word.
NATS = 0.05
# A share of steps that is "always".
ALWAYS = 0.95
# The loss against the sum of its parts: float32 rounding is 1e-6.
SAME_LOSS = 1e-3
# The soft part against the KL measured on a sample of the step's tokens: a sample of
# 256, or the first micro-batch, is off by a factor of two at the worst. A scale is one
# number for the run; a sum's, the tokens of a step, varies about its median.
SAME_KL, SAME_SCALE = 4.0, 2.5
# Padding and prompts in the denominator make the loss smaller by the share of response
# tokens, one in ten say; no vocabulary is smaller than a hundred tokens.
VOCABULARY = 1 / 50
# Random weights give log V nats and a little; twice that is a student that is sure of
# wrong tokens.
WORSE_THAN_UNIFORM = 2.0
# AdamW moves a weight by at most the learning rate a step. Weights are of the size 0.01
# to 1, so a sum of rates below this moves nothing.
MOVES = 1e-5
# A first step at this share of the peak rate had no warm-up; that is a finding only
# where the loss then jumps to so many times its first value. One batch may have 1.6
# times the loss of another.
WARM, JUMP = 0.99, 3.0
# A loss that ends so many times above its lowest tenth has diverged; healthy runs end
# at 1.2 times at most, by noise.
RISE = 1.5
# A run that has learnt ends below this share of where it began.
FALL = 0.98
# A loss that has fallen by this share; the KL should then have fallen by this share of
# that share. In healthy runs it is 0.7 at least, whatever the divergence.
FELL, NEARER = 0.2, 0.25
# A student that left the tail has this share of its teacher's. Forward KL with a bucket
# keeps it; hard labels, and divergences that seek a mode, may leave it.
LEFT = 0.5
# The end of responses is behind their beginning where its KL has fallen by this share
# of that one's fall, and is so many times that one. In healthy runs it falls as much,
# and is the smaller one.
BEHIND, LATE = 0.5, 1.5
# An agreement that has closed this share of its gap to 1 is no longer stuck.
GAINED = 0.1
# Below this norm, AdamW's epsilon of 1e-8 is no longer small beside the square root of
# a mean squared gradient (1e-6 spread over 10^4 weights is 1e-8 each).
ALIVE = 1e-6
# A gradient is far beyond its limit at so many times max_grad_norm. Clipping a few
# times over is common in healthy runs, at the start above all.
FAR = 10.0
# A spike, against the median of the 20 steps before. Healthy runs reach 20. A norm
# below the second number is that of a student that has learnt all, or of a flat loss:
# beside it any batch would be a spike.
SPIKE, QUIET = 100.0, 0.1
# Entropies: a student is too flat at so many nats above its teacher if it also got
# flatter by so many on the way; healthy ones begin flat and get surer. It is too sure
# below the third number; healthy ones end above 0.
FLAT, FLATTER, SURE = 0.5, 0.25, -0.1
# Validation against training. Overfitting on little data makes a factor of two or so.
ELSEWHERE = 4.0
# A plateau: the last third is no lower than this share of the middle one; and the last
# tenth stands above the floor by more than this share of what there was to learn.
STILL, NEAR = 0.97, 0.1
# Speed: other programs on the machine cost a factor of two or three.
SLOW = 0.2
# Peak memory from the middle of the run to its end. It rises a little while longer rows
# come, and then not in every tenth.
GROWN = 1.5


def tolerance(logits: Tensor) -> float:
    return TOLERANCE_16_BIT if logits.dtype.itemsize < 4 else TOLERANCE


def least(logits: Tensor) -> float:
    # A log-sum-exp in float32 is off by z 2^-24: of logits in the thousands it is seen.
    return max(LEAST, 2.0**-24 * float(logits.abs().max()) / TOLERANCE)
