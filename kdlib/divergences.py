"""Per-token divergences between teacher and student: pure functions of logits.

Knows: how far the student's next-token distribution is from the teacher's, for each
token. Does not know masks, reductions, labels or models: objective.py does.

Every function has the same form,

    divergence(student_logits, teacher_logits, *, temperature=1.0, ...) -> per_token

with student_logits [..., V_s], teacher_logits [..., V_t] and per_token [...], in nats.
STUDENT FIRST, always. In the formulas

    p_t = softmax(teacher_logits / T),   p_s = softmax(student_logits / T),

and z_s are the student's logits. What holds for all of them:

- float16 and bfloat16 are computed in float32; float64 stays float64.
- Columns beyond min(V_s, V_t) are padding of one side: they are dropped from both.
- A logit of -inf removes its token. 0 log 0 is 0, in the gradient as well. Where a
  divergence is infinite (forward KL with p_t > 0 and p_s = 0, say) +inf is returned.
- Equal logits give exactly 0.0, except for cross_entropy, whose minimum is the
  teacher's entropy.
- No factor T^2 here: the objective owns it. So gradients below carry 1/T.
- Teacher logits are differentiated like any tensor: a frozen teacher is detached
  by whoever ran it.

Raises ArgumentError for shapes that do not match, integer logits, or a parameter out of
its range.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import TYPE_CHECKING

import torch

from kdlib.errors import ArgumentError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

    Logits = Float[Tensor, "*n v"]
    PerToken = Float[Tensor, "*n"]


def forward_kl(
    student_logits: Logits, teacher_logits: Logits, *, temperature: float = 1.0
) -> PerToken:
    """KL(teacher || student) = sum_v p_t (log p_t - log p_s).

    Limits:   0 where p_s = p_t; +inf where p_t > 0 and p_s = 0. Covers the teacher's
              modes: the best student of limited capacity is the mixture.
    Gradient: d/dz_s = (p_s - p_t) / T.
    Source:   Hinton, Vinyals & Dean 2015 (arXiv 1503.02531), section 2, up to the
              teacher's entropy.
    """
    log_ps, log_pt = _log_probs(student_logits, teacher_logits, temperature)
    return _kl_to_mixture(log_pt, log_ps, 1.0)


def reverse_kl(
    student_logits: Logits, teacher_logits: Logits, *, temperature: float = 1.0
) -> PerToken:
    """KL(student || teacher) = sum_v p_s (log p_s - log p_t).

    Limits:   0 where p_s = p_t; +inf (and no finite gradient) where p_s > 0 and
              p_t = 0. Seeks the teacher's modes.
    Gradient: d/dz_s = p_s (log p_s - log p_t - KL(p_s || p_t)) / T.
    Source:   Gu et al. 2023, MiniLLM (arXiv 2306.08543), there over sequences.
    """
    log_ps, log_pt = _log_probs(student_logits, teacher_logits, temperature)
    return _kl_to_mixture(log_ps, log_pt, 1.0)


def kl_mix(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 1.0,
    lam: float = 0.5,
) -> PerToken:
    """(1 - lam) KL(teacher || student) + lam KL(student || teacher), lam in [0, 1].

    Limits:   lam = 0 is forward KL, lam = 1 reverse KL, and its scale stays the same
              between them: the knob of direction that generalized_jsd is not.
              lam = 0.5 is half of Jeffreys' symmetric divergence. Strictly between the
              ends it is +inf wherever either KL is.
    Gradient: the same mixture of the gradients of forward_kl and reverse_kl.
    Source:   Jeffreys 1946 (Proc. R. Soc. A 186:453-461) for lam = 0.5; the mixture is
              arithmetic.
    """
    _check_between("lam", lam, 0.0, 1.0)
    log_ps, log_pt = _log_probs(student_logits, teacher_logits, temperature)
    if lam == 0.0:  # an end must not meet the other end's infinity: 0 * inf is NaN
        return _kl_to_mixture(log_pt, log_ps, 1.0)
    if lam == 1.0:
        return _kl_to_mixture(log_ps, log_pt, 1.0)
    forward = _kl_to_mixture(log_pt, log_ps, 1.0)
    reverse = _kl_to_mixture(log_ps, log_pt, 1.0)
    return (1.0 - lam) * forward + lam * reverse


def generalized_jsd(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> PerToken:
    """beta KL(p_t || m) + (1 - beta) KL(p_s || m), with m = beta p_t + (1 - beta) p_s.

    Limits:   beta = 0 IS forward KL and beta = 1 IS reverse KL, by convention. The
              interior does not lead there: it goes to 0 at both ends, like
              beta KL(p_t || p_s) for small beta and (1 - beta) KL(p_s || p_t) near 1.
              So beta is no knob of direction (kl_mix is), and a changed beta needs
              another learning rate. At most the entropy of (beta, 1 - beta).
    Gradient: d/dz_s = (1 - beta) p_s (r - sum_v p_s r) / T, with r = log(p_s / m).
    Source:   Agarwal et al. 2023, GKD (arXiv 2306.13649). There P is the teacher.
    """
    _check_between("beta", beta, 0.0, 1.0)
    log_ps, log_pt = _log_probs(student_logits, teacher_logits, temperature)
    if beta == 0.0:
        return _kl_to_mixture(log_pt, log_ps, 1.0)
    if beta == 1.0:
        return _kl_to_mixture(log_ps, log_pt, 1.0)
    teacher_part = _kl_to_mixture(log_pt, log_ps, 1.0 - beta)
    student_part = _kl_to_mixture(log_ps, log_pt, beta)
    return beta * teacher_part + (1.0 - beta) * student_part


def skew_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 1.0,
    alpha: float = 0.1,
) -> PerToken:
    """KL(p_t || alpha p_t + (1 - alpha) p_s), alpha in [0, 1).

    Limits:   alpha = 0 is forward KL; at most -log(alpha), even where p_s = 0, so it
              goes to 0 as alpha goes to 1.
    Gradient: d/dz_s = p_s (sum_v p_s g - g) / T, with g = (1 - alpha) p_t / m and m the
              mixture above.
    Source:   Ko et al. 2024, DistiLLM (arXiv 2402.03898), SKL. There p is the
              teacher, and alpha weighs the first argument, 0.1 by default.
    """
    _check_between("alpha", alpha, 0.0, 1.0, open_right=True)
    log_ps, log_pt = _log_probs(student_logits, teacher_logits, temperature)
    return _kl_to_mixture(log_pt, log_ps, 1.0 - alpha)


def skew_reverse_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 1.0,
    alpha: float = 0.1,
) -> PerToken:
    """KL(p_s || (1 - alpha) p_t + alpha p_s), alpha in [0, 1).

    Limits:   alpha = 0 is reverse KL; at most -log(alpha), even where p_t = 0, so it
              goes to 0 as alpha goes to 1.
    Gradient: d/dz_s = p_s (h - sum_v p_s h) / T, with h = log(p_s / m) - alpha p_s / m
              and m the mixture above.
    Source:   Ko et al. 2024, DistiLLM (arXiv 2402.03898), SRKL.
    """
    _check_between("alpha", alpha, 0.0, 1.0, open_right=True)
    log_ps, log_pt = _log_probs(student_logits, teacher_logits, temperature)
    return _kl_to_mixture(log_ps, log_pt, 1.0 - alpha)


def adaptive_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 1.0,
    alpha: float = 0.5,
) -> PerToken:
    """(g_head KL(p_t || p_s) + g_tail KL(p_s || p_t)) / (g_head + g_tail).

    The head holds the teacher's likeliest tokens while their cumulative probability
    does not exceed alpha (mu in the paper), and always the likeliest; g sums
    |p_t - p_s| over the head or the rest. The weights are constants: no gradient runs
    through them.

    Limits:   forward KL where all of the gap is in the head, reverse KL where all of
              it is in the tail; 0 where p_s = p_t, where the weights are 0/0.
    Gradient: the same mixture of the gradients of forward_kl and reverse_kl.
    Source:   Wu et al. 2024 (arXiv 2404.02657), the head as in the authors' code. (DSKD
              counts the token that crosses alpha to the head.)
    """
    _check_between("alpha", alpha, 0.0, 1.0)
    log_ps, log_pt = _log_probs(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        pt, order = log_pt.exp().sort(dim=-1, descending=True, stable=True)
        gap = (pt - log_ps.exp().gather(-1, order)).abs()
        in_head = pt.cumsum(-1) <= alpha
        in_head[..., :1] = True
        head, tail = (gap * in_head).sum(-1), (gap * ~in_head).sum(-1)
        gap_sum = (head + tail).where(head + tail > 0, 1.0)
    forward = _kl_to_mixture(log_pt, log_ps, 1.0) * (head / gap_sum)
    reverse = _kl_to_mixture(log_ps, log_pt, 1.0) * (tail / gap_sum)
    # a direction without weight must not bring its infinity: 0 * inf is NaN
    return forward.where(head > 0, 0.0) + reverse.where(tail > 0, 0.0)


def tvd(
    student_logits: Logits, teacher_logits: Logits, *, temperature: float = 1.0
) -> PerToken:
    """Total variation distance, 1/2 sum_v |p_t - p_s|, between 0 and 1.

    Limits:   1 where the supports are disjoint. There the gradient is zero, and also
              wherever the student is sure: a poor loss far from the teacher.
    Gradient: d/dz_s = p_s (e - sum_v p_s e) / (2 T), with e = sign(p_s - p_t).
    Source:   Wen et al. 2023, f-distill (arXiv 2307.15190).
    """
    log_ps, log_pt = _log_probs(student_logits, teacher_logits, temperature)
    return 0.5 * (log_pt.exp() - log_ps.exp()).abs().sum(-1)


def cross_entropy(
    student_logits: Logits, teacher_logits: Logits, *, temperature: float = 1.0
) -> PerToken:
    """Soft-label cross-entropy, -sum_v p_t log p_s = H(p_t) + KL(p_t || p_s).

    Limits:   the teacher's entropy where p_s = p_t, which is its minimum.
    Gradient: d/dz_s = (p_s - p_t) / T, that of forward KL.
    Source:   Hinton, Vinyals & Dean 2015 (arXiv 1503.02531), section 2.
    """
    log_ps, log_pt = _log_probs(student_logits, teacher_logits, temperature)
    pt = log_pt.exp()
    return 0.0 - (pt * log_ps.where(pt > 0, 0.0)).sum(-1)


def alpha_beta(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 1.0,
    alpha: float = 0.5,
    beta: float = 0.5,
) -> PerToken:
    """The alpha-beta divergence, alpha and beta >= 0 and not both 0. With s = a + b,

        D = sum_v (a/s p_t^s + b/s p_s^s - p_t^a p_s^b) / (a b).

    Limits:   b = 0: sum_v (p_t^a log(p_t^a / p_s^a) - p_t^a + p_s^a) / a^2, which for
              a = 1 is forward KL; a = 0 the same with the roles swapped, for b = 1
              reverse KL. a + b = 1 is the alpha-divergence (a = b = 1/2 four times
              the squared Hellinger distance), a = b = 1 half the squared error.
              Negative exponents are refused: the tail of the vocabulary, and every
              masked token, would outweigh all else.
    Gradient: d/dz_s = p_s (sum_v p_s g - g) / T,  g = p_s^(b-1) (p_t^a - p_s^a) / a,
              whose last factor is log(p_t / p_s) for a = 0.
    Source:   Cichocki, Cruces & Amari 2011 (Entropy 13(1):134-170); for distillation
              Wang et al. 2025, ABKD (arXiv 2505.04560).
    """
    _check_between("alpha", alpha, 0.0, math.inf, open_right=True)
    _check_between("beta", beta, 0.0, math.inf, open_right=True)
    if alpha + beta == 0:
        raise ArgumentError(
            "alpha = beta = 0", "make at least one of alpha and beta positive"
        )
    log_ps, log_pt = _log_probs(student_logits, teacher_logits, temperature)
    if alpha < beta:  # D(a, b; p, q) = D(b, a; q, p): divide by the larger of the two
        return _alpha_beta(log_ps, log_pt, beta, alpha)
    return _alpha_beta(log_pt, log_ps, alpha, beta)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    divergence.__name__: divergence
    for divergence in (
        forward_kl,
        reverse_kl,
        kl_mix,
        generalized_jsd,
        skew_kl,
        skew_reverse_kl,
        adaptive_kl,
        tvd,
        alpha_beta,
        cross_entropy,
    )
}


def get_divergence(name: str, **params: float) -> Callable[..., PerToken]:
    """The divergence called `name` with its parameters set.

    get_divergence("skew_kl", alpha=0.2)(student_logits, teacher_logits, temperature=2)

    Raises ArgumentError for an unknown name or parameter (naming the nearest right one)
    and for a value out of range, now rather than at the first batch.
    """
    if name not in DIVERGENCES:
        raise ArgumentError(
            f"divergence {name!r} is unknown", nearest(name, DIVERGENCES)
        )
    divergence = DIVERGENCES[name]
    signature = inspect.signature(divergence).parameters
    known = [key for key in signature if key not in _COMMON_ARGUMENTS]
    for key in params:
        if key not in known:
            raise ArgumentError(
                f"divergence {name!r} has no parameter {key!r}", nearest(key, known)
            )
    chosen = functools.partial(divergence, **params)
    chosen(torch.zeros(1, 1), torch.zeros(1, 1))  # has it refuse bad values
    return chosen


_COMMON_ARGUMENTS = ("student_logits", "teacher_logits", "temperature")


def _check_between(name, value, low, high, open_right=False) -> None:
    # `not (a <= x <= b)` rather than `x < a or x > b`, so that NaN is refused
    if not low <= value <= high or (open_right and value == high):
        interval = f"[{low:g}, {high:g}{')' if open_right else ']'}"
        raise ArgumentError(f"{name} = {value}", f"choose {name} in {interval}")


def tempered(logits: Logits, temperature: float) -> Logits:
    """logits / T, in float32 or more. Raises what tempered_log_softmax does."""
    if not 0.0 < temperature < math.inf:
        raise ArgumentError(
            f"temperature = {temperature}", "choose a finite temperature above 0"
        )
    if not logits.is_floating_point():
        raise ArgumentError(
            f"logits of dtype {logits.dtype}", "pass the model's logits, not token ids"
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # contiguous, or equal logits in another memory layout would be summed otherwise
    return (logits.to(dtype) / temperature).contiguous()


def tempered_log_softmax(logits: Logits, temperature: float) -> Logits:
    """log softmax(logits / T) over the last dimension, in float32 or more.

    Not torch.log_softmax on a CPU: there it adds thousands of numbers one after another
    into each lane of a vector register, in the gradient as well. At V = 151,936 the
    rounding of such float32 sums is 1e-5 of a divergence and up to 1e-3 of a JSD's
    gradient. torch.sum adds pairwise. (On CUDA a thousand threads share the sum.)

    Raises ArgumentError if the temperature is not a finite number above 0, or if the
    logits are integers.
    """
    z = tempered(logits, temperature)
    if z.is_cuda:
        return torch.log_softmax(z, dim=-1)
    # The maximum goes first: subtracting it is exact for what is near it, and what is
    # left has no large common part to be rounded with.
    z = z - z.detach().amax(dim=-1, keepdim=True)
    return z - z.exp().sum(dim=-1, keepdim=True).log()


def _log_probs(student_logits, teacher_logits, temperature) -> tuple[Tensor, Tensor]:
    """(log p_s, log p_t) at `temperature`, on the columns that both sides have."""
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ArgumentError(
            f"student_logits {list(student_logits.shape)} and teacher_logits "
            f"{list(teacher_logits.shape)} differ before the vocabulary",
            "select the same response tokens, in the same order, from both views",
        )
    vocab = min(student_logits.shape[-1], teacher_logits.shape[-1])
    log_ps = tempered_log_softmax(student_logits[..., :vocab], temperature)
    log_pt = tempered_log_softmax(teacher_logits[..., :vocab], temperature)
    return log_ps, log_pt


def _kl_to_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """KL(p || (1 - weight) p + weight q), 0 < weight <= 1.

    Written through the log-ratio d = log q - log p, because m / p = (1 - w) + w e^d: so
    d = 0 gives exactly 0, and nothing is exponentiated only to take its log again.
    """
    p = log_p.exp()
    # Where p is 0 the ratio may be inf - inf. It is replaced before it is used, so that
    # the backward pass never multiplies a zero by an infinity.
    log_ratio = (log_q - log_p).where(p > 0, 0.0)
    if weight < 1.0:
        log_ratio = _log_mixture(log_ratio, weight)
    return 0.0 - (p * log_ratio).sum(-1)  # a zero without a minus sign


def _log_mixture(d: Tensor, weight: float) -> Tensor:
    """log((1 - weight) + weight e^d), 0 < weight < 1, accurate for every d."""
    near = d.abs() < 1.0
    small = torch.log1p(weight * torch.expm1(d.where(near, 0.0)))
    rest = d.new_tensor(math.log1p(-weight))
    large = torch.logaddexp(d.where(~near, 0.0) + math.log(weight), rest)
    return torch.where(near, small, large)


def _alpha_beta(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """Alpha-beta divergence for alpha >= beta >= 0, alpha > 0, s = alpha + beta.

    The summand is ((q^s - p^s)/s - p^alpha (q^beta - p^beta)/beta) / alpha. Each
    difference of powers is written as its larger power times 1 - e^(-something): so
    nothing overflows, p = q gives exactly 0, and beta = 0 is its own limit.
    """
    present = (log_p > -math.inf) | (log_q > -math.inf)
    d = (log_q - log_p).where(present, 0.0)
    up, gap = d > 0, d.abs()

    def decay(c, x):  # (1 - e^(-c x)) / c, which is x at c = 0
        return -torch.expm1(-c * x) / c if c > 0 else x

    larger = torch.maximum(log_p, log_q)
    whole = ((alpha + beta) * larger).exp() * decay(alpha + beta, gap)
    power = alpha * log_p
    if beta > 0:  # 0 * -inf is NaN
        power = power + beta * torch.where(up, log_q, log_p)
    cross = power.exp() * decay(beta, gap.where(log_p > -math.inf, 0.0))
    return (torch.where(up, whole - cross, cross - whole) / alpha).sum(-1)
