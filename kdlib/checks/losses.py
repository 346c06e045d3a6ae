"""Thirty wrong losses and the right ones beside them, for the learner's own tests.

All are called alike, and a right one is forward KL, scaled by T^2, as a mean over the
tokens of all responses:

    loss(student_logits [B, T, V], teacher_logits [B, T, V], labels [B, T],
         temperature=1.0) -> scalar

labels are as long as the input and -100 outside the responses; the logits at position t
predict label t + 1. Each wrong loss is `assembled` from right parts and one wrong one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Wrong:
    """A wrong loss: its name, what it does, and the idea that would expose it."""

    idea: str
    name: str
    does: str
    loss: Callable
    seen: str = ""


IDEAS = {
    "divergence": "the value at T = 1, against a formula",
    "temperature": "the value at another T",
    "positions": "which positions get a gradient",
    "mean": "responses of unlike length, and padding",
    "gradient": "the gradient, not the value alone",
    "extremes": "a student that is very wrong or very sure",
}


def _kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _forward(s, t):
    return _kl(t.log_softmax(-1), s.log_softmax(-1))


def _response(labels):
    return labels != -100


def _token_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def assembled(
    soft: Callable = _forward,
    mask: Callable = _response,
    mean: Callable = _token_mean,
    student_t: Callable = lambda t: t,
    teacher_t: Callable = lambda t: t,
    scale: Callable = lambda t: t**2,
    shift: int = 1,
) -> Callable:
    """A loss from its parts; `shift` is how far the labels are moved to the logits."""

    def loss(student_logits, teacher_logits, labels, temperature=1.0):
        end = labels.shape[1] - shift
        s, t = (x[:, :end] for x in (student_logits, teacher_logits))
        per_token = soft(s / student_t(temperature), t / teacher_t(temperature))
        return scale(temperature) * mean(per_token, mask(labels[:, shift:]))

    return loss


# --- Right ----------------------------------------------------------------------------


def _by_kl_div(student_logits, teacher_logits, labels, temperature=1.0):
    mask = labels[:, 1:] != -100
    s, t = (
        (x[:, :-1][mask] / temperature).log_softmax(-1)
        for x in (student_logits, teacher_logits)
    )
    return temperature**2 * F.kl_div(s, t, reduction="batchmean", log_target=True)


def _by_entropies(student_logits, teacher_logits, labels, temperature=1.0):
    """H(p, q) - H(p), the teacher detached."""
    mask = labels[:, 1:] != -100
    p = (teacher_logits.detach()[:, :-1][mask] / temperature).softmax(-1)
    log_q = (student_logits[:, :-1][mask] / temperature).log_softmax(-1)
    cross = F.cross_entropy(log_q, p, reduction="none")
    return temperature**2 * (cross - torch.special.entr(p).sum(-1)).mean()


def _row_by_row(student_logits, teacher_logits, labels, temperature=1.0):
    total, count = 0.0, 0
    for s, t, row in zip(student_logits, teacher_logits, labels, strict=True):
        for place in (row[1:] != -100).nonzero()[:, 0].tolist():
            total = total + _forward(s[place] / temperature, t[place] / temperature)
            count += 1
    return temperature**2 * total / count


def _in_float32(student_logits, teacher_logits, labels, temperature=1.0):
    return assembled()(
        student_logits.float(), teacher_logits.float(), labels, temperature
    )


def _in_float64(student_logits, teacher_logits, labels, temperature=1.0):
    return assembled()(
        student_logits.double(), teacher_logits.double(), labels, temperature
    )


RIGHT = {
    "masked after the divergence": assembled(),
    "F.kl_div with log_target": _by_kl_div,
    "cross-entropy minus entropy, teacher detached": _by_entropies,
    "a Python loop over the rows": _row_by_row,
    "computed in float32": _in_float32,
    "computed in float64": _in_float64,
}


# --- Wrong ----------------------------------------------------------------------------


def _jsd(s, t):
    s, t = s.log_softmax(-1), t.log_softmax(-1)
    middle = torch.logaddexp(s, t) - torch.tensor(2.0).log()
    return (_kl(t, middle) + _kl(s, middle)) / 2


def _without(mask, last: bool):
    """The mask without the last, or the first, token of each row's response."""
    n = mask.cumsum(1)
    return mask & (n != (n[:, -1:] if last else 1))


def _row_means(x, mask):
    return ((x * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()


class _WrongSlope(torch.autograd.Function):
    """The value of the first argument, the gradient of the second."""

    @staticmethod
    def forward(context, value, sloped):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return None, gradient


def _renormalised(k):
    def soft(s, t):
        best, ids = t.log_softmax(-1).topk(min(k, t.shape[-1]))
        return _kl(best.log_softmax(-1), s.gather(-1, ids).log_softmax(-1))

    return soft


def _padding_too(labels):
    """From the first response token to the end of the row."""
    return (labels != -100).cumsum(1) > 0


def _naive(s, t):
    p, q = (x.exp() / x.exp().sum(-1, keepdim=True) for x in (t, s))
    return (p * (p.log() - q.log())).sum(-1)


def _wrong() -> list[Wrong]:
    def of(idea):
        return lambda name, does, seen="", **part: Wrong(
            idea, name, does, assembled(**part), seen
        )

    d, t = of("divergence"), of("temperature")
    p, m, g, x = of("positions"), of("mean"), of("gradient"), of("extremes")
    slope = _WrongSlope.apply
    return [
        d("arguments swapped", "KL(student || teacher)", "paiml/aprender#2153",
          soft=lambda s, t: _forward(t, s)),
        d("cross-entropy", "the teacher's entropy is in it", "jongwooko/distillm#7",
          soft=lambda s, t: -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)),
        d("softmax for log_softmax", "-sum p q", "microsoft/ProDA#20",
          soft=lambda s, t: -(t.softmax(-1) * s.softmax(-1)).sum(-1)),
        d("JSD", "Jensen-Shannon where KL is declared", "huggingface/trl#5731",
          soft=_jsd),
        d("argmax", "the teacher's likeliest token as a hard label",
          soft=lambda s, t: -s.log_softmax(-1).gather(
              -1, t.argmax(-1, keepdim=True))[..., 0]),
        d("softmax twice", "the teacher's probabilities are taken for logits",
          soft=lambda s, t: _forward(s, t.softmax(-1))),
        d("sign", "minus the divergence", soft=lambda s, t: -_forward(s, t)),
        t("T^2 left out", "no factor T^2", "keras-team/keras-io#869",
          scale=lambda t: 1.0),
        t("T for T^2", "the factor is T", scale=lambda t: t),
        t("T ignored", "T is accepted and not used", "huggingface/trl#6847",
          student_t=lambda t: 1.0, teacher_t=lambda t: 1.0, scale=lambda t: 1.0),
        t("teacher alone softened", "the student's logits are not divided by T",
          student_t=lambda t: 1.0),
        t("student alone softened", "the teacher's logits are not divided by T",
          teacher_t=lambda t: 1.0),
        t("times T", "logits are multiplied by T",
          student_t=lambda t: 1 / t, teacher_t=lambda t: 1 / t),
        p("no shift", "the mask lies on logits that are not shifted",
          "arcee-ai/DistillKit", shift=0),
        p("shift of two", "labels are shifted twice", shift=2),
        p("no mask", "every position counts, prompt and padding too",
          "MakazhanAlpamys/Soup#682", mask=lambda y: torch.ones_like(y).bool()),
        p("padding in the loss", "the mask never ends", "huggingface/trl#7024",
          mask=_padding_too),
        p("end dropped", "the last token of each response is left out",
          "huggingface/trl#6357", mask=lambda y: _without(y != -100, True)),
        p("first dropped", "the first token of each response is left out",
          "TRL's ULD loss", mask=lambda y: _without(y != -100, False)),
        p("token 0 ignored", "the mask is labels > 0", mask=lambda y: y > 0),
        m("mean over V", "torch's mean: divided by the vocabulary as well",
          "haitongli/knowledge-distillation-pytorch#2",
          soft=lambda s, t: _forward(s, t) / s.shape[-1]),
        m("sum", "not divided", mean=lambda x, mask: (x * mask).sum()),
        m("batchmean", "divided by the rows",
          mean=lambda x, mask: (x * mask).sum() / len(x)),
        m("all positions below", "masked, then torch's mean over all positions",
          "huggingface/trl#7024", mean=lambda x, mask: (x * mask).mean()),
        m("mean of row means", "a token of a short response counts for more",
          "pytorch/torchtune#1865", mean=_row_means),
        g("student detached", "the value is right, and the teacher gets the gradient",
          "labmlai/annotated_deep_learning_paper_implementations#66",
          soft=lambda s, t: _forward(s.detach(), t) + 0 * s.sum(-1)),
        g("gradient of reverse KL", "the value is right, the gradient another's",
          soft=lambda s, t: slope(_forward(s, t), _forward(t, s))),
        x("top k renormalised", "eight tokens, renormalised on both sides",
          "ms-swift, NVIDIA ModelOpt, axolotl", soft=_renormalised(8)),
        x("clamped at -10", "no gradient where the student is most wrong", "verl",
          soft=lambda s, t: _kl(t.log_softmax(-1), s.log_softmax(-1).clamp_min(-10))),
        x("exp, then log", "inf - inf for large logits", "linkedin/Liger-Kernel#769",
          soft=_naive),
    ]  # fmt: skip


WRONG = _wrong()
