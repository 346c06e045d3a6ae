"""Reverse KL from sampled tokens alone: what to report, and what to differentiate.

On-policy, the student draws the tokens, y ~ p_s, and the teacher only returns the
log-probability of each. Knows: which function of the two numbers estimates the value of
KL(p_s || p_t), and which one's gradient is its gradient. They are not the same: the
gradient of an unbiased estimate is not an unbiased estimate of the gradient, because
the distribution that y is drawn from depends on the parameters as well.

With r = log p_t(y) - log p_s(y), and expectations over y ~ p_s:

    name            formula               E[value]         E[gradient]
    k1              -r                    reverse KL       0
    k2              r^2 / 2               (biased)         reverse KL
    k3              e^r - 1 - r           reverse KL       FORWARD KL
    score_function  (-r).detach() log p_s (no estimate)    reverse KL

So: `estimate` for a value to log, `surrogate` for a loss to differentiate.

k2 and score_function have the same gradient, token by token. All of this is for one
token given its prefix; the effect of a token on the later prefixes is left out.

Sources: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html),
for the estimates; Williams 1992 for the score function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kdlib.errors import ArgumentError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    PerToken = Float[Tensor, "n"]


@torch.no_grad()
def estimate(
    name: str, student_log_probs: PerToken, teacher_log_probs: PerToken
) -> PerToken:
    """Per-token estimates [N] of KL(student || teacher) in nats, without gradient.

    name:              "k1" (unbiased, of either sign), "k2" (biased, accurate only near
                       p_s = p_t) or "k3" (unbiased, never negative; its variance is
                       large or infinite where the student gives little probability to
                       what the teacher finds likely)
    student_log_probs: [N] log p_s(y) of tokens that the student itself drew
    teacher_log_probs: [N] log p_t(y) of the same tokens; where it is -inf, a token that
                       the teacher rules out, every estimate is +inf, as the KL is

    Raises ArgumentError for another name, or shapes that differ.
    """
    log_ps, log_pt = _checked(student_log_probs, teacher_log_probs)
    if name == "k1":
        return log_ps - log_pt
    if name == "k2":
        return 0.5 * (log_pt - log_ps).square()
    if name == "k3":
        return torch.expm1(log_pt - log_ps) - (log_pt - log_ps)
    raise ArgumentError(
        f"estimate {name!r}",
        'choose "k1", "k2" or "k3" for a value; surrogate() gives losses',
    )


def surrogate(
    name: str,
    student_log_probs: PerToken,
    teacher_log_probs: PerToken,
    *,
    accept_forward_kl: bool = False,
) -> PerToken:
    """Per-token losses [N] to differentiate; their values mean nothing by themselves.

    name:              "score_function" or "k2", whose expected gradient is that of
                       KL(student || teacher). "k3" needs accept_forward_kl=True: on
                       tokens drawn by the student its gradient is that of
                       KL(teacher || student). "k1" is refused: its expected gradient is
                       the mean of the score, zero whatever the teacher says
    student_log_probs: [N] log p_s(y) of tokens that the student itself drew, with
                       gradient
    teacher_log_probs: [N] log p_t(y) of the same tokens, taken as constants

    Raises ArgumentError for k1, for k3 without consent, for another name, or for shapes
    that differ.
    """
    log_ps, log_pt = _checked(student_log_probs, teacher_log_probs.detach())
    if name == "score_function":
        # Without detach the mean would stay right (k1's gradient, of mean 0, is added)
        # but every sample would be noisier.
        return (log_ps - log_pt).detach() * log_ps
    if name == "k2":
        return 0.5 * (log_pt - log_ps).square()
    if name == "k3" and accept_forward_kl:
        return torch.expm1(log_pt - log_ps) - (log_pt - log_ps)
    if name == "k3":
        raise ArgumentError(
            'surrogate "k3", whose gradient on the student\'s own tokens is that of '
            "FORWARD KL, KL(teacher || student)",
            'use "k2" or "score_function" for reverse KL, or pass '
            "accept_forward_kl=True if forward KL is what you want",
        )
    if name == "k1":
        raise ArgumentError(
            'surrogate "k1", whose expected gradient is zero: the teacher does not '
            "appear in it, so the student would only random-walk",
            'use "k2" or "score_function"; k1 is for estimate()',
        )
    raise ArgumentError(f"surrogate {name!r}", 'choose "score_function" or "k2"')


def _checked(student_log_probs, teacher_log_probs) -> tuple[Tensor, Tensor]:
    if student_log_probs.shape != teacher_log_probs.shape:
        raise ArgumentError(
            f"student_log_probs {list(student_log_probs.shape)}, teacher_log_probs "
            f"{list(teacher_log_probs.shape)}",
            "give the two log-probabilities of the same sampled tokens",
        )
    dtype = torch.promote_types(student_log_probs.dtype, torch.float32)
    return student_log_probs.to(dtype), teacher_log_probs.to(dtype)
