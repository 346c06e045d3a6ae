"""Laws of other routes to the same number: half precision, and the fused path."""

from __future__ import annotations

import torch

from kdlib.laws.frame import Finding, gap, law, near, ratio, roughly, same
from kdlib.loss_under_test import (
    Batch,
    NotApplicable,
    ask,
    differentiate,
    make_batch,
    truth,
)


@law("12", "bfloat16 logits cost no more than their own rounding")
def half_precision(loss):
    """Given bfloat16 logits, L and dL/dz_s are those of the rounded logits, within 5 %.

    Why:  bfloat16 has 8 bits. A log-probability of -10 is then known to 0.03, and a KL
          of 0.0002 between two close models is a difference of such numbers: half of
          the tokens come out negative (museum 24). float32 inside costs little and errs
          by less than 0.1 %; bfloat16 inside, by 20 % and more. 5 % lies between.
    Bugs: log_softmax in the dtype of the logits (linkedin/Liger-Kernel's chunked JSD);
          exp, then log, of a probability that underflowed (linkedin/Liger-Kernel#769,
          museum 23), on logits of +-100.
    """
    if not loss.half:
        raise NotApplicable("it is never given bfloat16 logits")
    far = make_batch(loss)  # probabilities of e^-200, which float32 cannot hold
    far.student[..., 0], far.student[..., 1] = 100.0, -100.0
    far.teacher[..., 0], far.teacher[..., 1] = -100.0, 100.0
    close = make_batch(loss, vocab=64, scale=2.0)
    close = close._replace(student=close.teacher + 0.01 * close.student)
    for batch in (far, close):
        batch = Batch(*(x.bfloat16() for x in batch[:2]), batch.labels)
        measured, gradient = ask(loss, batch)
        exact = Batch(*(x.double() for x in batch[:2]), batch.labels)
        expected, slope = differentiate(lambda b: truth(loss, b), exact)
        if batch.student.shape[-1] != 64 and not roughly(measured, expected, 0.05):
            bug = "the log of a probability that underflowed (museum 23)"
            return Finding(measured, expected, bug)
    error, size = float((gradient.double() - slope).norm()), float(slope.norm())
    bug = None
    if not (roughly(measured, expected, 0.05) and error <= 0.05 * size):
        bug = "log-probabilities in bfloat16 (museum 24)"
    shown = f"{measured:.3g}, gradient off by {ratio(error, size):.1%}"
    return Finding(shown, expected, bug)


@law("13", "fused equals naive, with temperature, soft cap and logit scale")
def fused(loss):
    """L(h_s, W_s, h_t, W_t) = L(h_s W_s', h_t W_t'), in value and in both gradients.

    Alone, and with each option that it takes, and with all of them together:
    z = cap tanh(scale h W' / cap), then z / T.

    Why:  the fused path is another program. It is chosen for memory, by a flag, and is
          expected to train the same model.
    Bugs: half of it is cross-entropy, and the temperature is that of sampling
          (huggingface/trl#5731, museum 20); logit_scale and final_logit_softcapping,
          which Cohere's and Gemma's heads need, are ignored (huggingface/trl#6629,
          museum 21).
    """
    if loss.fused is None:
        raise NotApplicable("it takes logits, not hidden states")
    rng = torch.Generator().manual_seed(5)
    hidden, weight, t_hidden, t_weight = (
        torch.randn(shape, generator=rng, dtype=loss.dtype)
        for shape in ((6, 4), (11, 4), (6, 5), (11, 5))
    )
    labels = torch.tensor([[-100, 0]]).repeat(6, 1)  # position 0 of each row counts

    def naive(h, w, temperature=1.0, softcap=None, logit_scale=1.0):
        heads = (h, w), (t_hidden, t_weight)
        both = [logit_scale * a.double() @ b.double().T for a, b in heads]
        if softcap:
            both = [softcap * torch.tanh(x / softcap) for x in both]
        both = [x[:, None].repeat(1, 2, 1) for x in both]
        return truth(loss, Batch(*both, labels), temperature)

    def ask_both(function, **options):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        total = function(*leaves, **options)
        slopes = torch.autograd.grad(total, leaves)
        return float(total.detach()), torch.cat([x.flatten() for x in slopes]).double()

    every = {"temperature": 2.0, "softcap": 2.0, "logit_scale": 0.3}
    every = {k: v for k, v in every.items() if k in loss.fused_options}
    settings = [{}, *({k: v} for k, v in every.items())]
    settings += [every] if len(every) > 1 else []
    for options in settings:
        measured, gradient = ask_both(
            lambda h, w, **o: loss.fused(h, w, t_hidden, t_weight, **o), **options
        )
        expected, slope = ask_both(naive, **options)
        if not (near(loss, measured, expected) and same(loss, gradient, slope)):
            bug = "the fused path optimises another objective (museum 20)"
            if options:
                names = " with ".join(options)
                bug = f"the fused path ignores or misuses {names} (museum 21)"
            shown = f"{measured:.4g}, gradient off by {gap(gradient, slope):.1%}"
            return Finding(shown, expected, bug)
    missing = ", ".join(x for x in ("softcap", "logit_scale") if x not in every)
    note = f"does not take {missing}" if missing else ""
    return Finding(f"equal, {len(settings)} settings", "equal", None, note)
