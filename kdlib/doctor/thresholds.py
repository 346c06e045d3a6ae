"""Where the doctor draws a line, and why there.

Ten healthy runs and a dozen healthy batches of different kinds lie on the right side of
every line (tests/test_doctor.py); the faults injected there lie beyond.
"""

from __future__ import annotations

import torch

# --- A batch ---

# How far a right gradient may be from the closed form. Right float32 losses are off by
# rounding, 1e-6 or so, and the smallest fault of the tests by 2e-3. 16-bit logits carry
# 8 or 11 bits of mantissa, and so does the gradient that comes back to them.
TOLERANCE = {torch.float64: 2e-4, torch.float32: 2e-4}
TOLERANCE_16_BIT = 3e-2
# Another teacher answer must move the gradient. One that is used moves it by about as
# much as there is of it; one that is not, by nothing at all.
USED = 1e-6
# Dropout moves a teacher's logits by whole units; kernels that add in another order, by
# 1e-6 of them.
NOISE = 1e-3
# Nats by which the first response token may surprise a teacher more than the rest does.
# A teacher that sees a question, or nothing, is off by 1 to 4; one that stands at
# another place of its template than before an answer gives it less than e^-6 of that.
SURPRISE = 6.0
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
