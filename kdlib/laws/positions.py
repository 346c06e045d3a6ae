"""Laws of positions: which tokens count, and how much each of them weighs."""

from __future__ import annotations

import torch

from kdlib.laws.frame import (
    Finding,
    gap,
    law,
    near,
    parallel,
    positive,
    ratio,
    same,
)
from kdlib.loss_under_test import (
    Batch,
    ask,
    differentiate,
    make_batch,
    predicts,
    truth,
    value,
)


@law("3", "gradient where a supervised token is predicted, and only there")
def gradient_support(loss):
    """{t : dL/dz_s[t] != 0} = {t : labels[t + 1] != -100}.

    Why:  position t predicts token t + 1. A mask that sits one position off drops the
          first token of the answer, the one that decides most, and trains on what
          follows the answer.
    Bugs: the mask on unshifted logits (arcee-ai/DistillKit, museum 1); logits sliced at
          the answer's positions and its end dropped (TRL's ULD loss, museum 2);
          neither mask nor shift (MakazhanAlpamys/Soup#682, museum 3); padding and
          prompt counted (jxiw/MambaInLlama#11, huggingface/trl#7024, museum 4);
          ignore_index taken for token 0 (museum 5).
    """
    batch = make_batch(loss)
    gradient = ask(loss, batch)[1]
    measured = {tuple(at) for at in gradient.abs().amax(-1).nonzero().tolist()}
    supervised = {tuple(at) for at in (batch.labels != -100).nonzero().tolist()}
    expected = {(row, t - 1) for row, t in supervised}
    bug = None
    if not measured:
        bug = "no gradient reaches the student"
    elif measured > expected:
        bug = "padding or prompt in the loss (museum 4)"
    elif measured == supervised:
        bug = "label shift off by one (museum 1)"
    elif measured == supervised & expected:  # of each response all but the first
        bug = "label shift off by one, without the end token (museum 2)"
    elif measured < expected:
        bug = "supervised tokens are left out"
    elif measured != expected:
        bug = "the wrong positions (museum 3)"
    rows = [f"row 0: {sorted(t for r, t in x if r == 0)}" for x in (measured, expected)]
    if bug and rows[0] == rows[1]:
        rows = [f"{sorted(x)}" for x in (measured - expected, expected - measured)]
        rows = [f"besides: {rows[0]}", f"missing: {rows[1]}"]
    return Finding(*rows, bug)


@law("4", "padding, masked logits and the order of rows change nothing")
def padding(loss):
    """L(batch) = L(batch with other logits where nothing is supervised)
              = L(batch with padding on the right, on the left)
              = L(rows in another order) = L(batch and a row without response).

    Why:  how a batch is padded is an accident of what else is in it.
    Bugs: padding in the sum, or in the mean's denominator (museum 4;
          linkedin/Liger-Kernel#974, museum 5); a mask by a fixed prompt length, which
          left padding moves; NaN from a row that was truncated to nothing
          (huggingface/trl#5885).
    """
    batch, noise = make_batch(loss), make_batch(loss, seed=9)
    expected = positive(value(loss, batch))
    used = predicts(batch.labels)[..., None]

    def overwrite(logits, other):
        return torch.where(used, logits, other)

    def pad(left, right):
        def widen(x, filling):
            sides = (
                x.new_full((len(x), n, *x.shape[2:]), filling) for n in (left, right)
            )
            return torch.cat([next(sides), x, next(sides)], dim=1)

        student, teacher, labels = batch
        return Batch(widen(student, 0.7), widen(teacher, 0.0), widen(labels, -100))

    changed = {
        "masked logits change the loss (museum 4)": Batch(
            overwrite(batch.student, noise.student),
            overwrite(batch.teacher, noise.teacher),
            batch.labels,
        ),
        "padding dilutes the mean (museum 4)": pad(0, 3),
        "padding on the left moves the mask (museum 4)": pad(2, 0),
        "the order of the rows changes the loss": Batch(*(x[[2, 0, 1]] for x in batch)),
    }
    note = "whether a row without response counts in a mean of rows is a convention"
    if loss.reduction != "sequence_mean":
        note = ""
        empty = noise._replace(labels=torch.full_like(batch.labels, -100))
        changed["a row without response changes the loss"] = Batch(
            *(torch.cat(both) for both in zip(batch, empty, strict=True))
        )
    for bug, other in changed.items():
        measured = float(value(loss, other))
        if not near(loss, measured, expected):
            return Finding(measured, expected, bug)
    return Finding(measured, expected, None, note)


@law("5", "micro-batches add up to the batch")
def micro_batches(loss):
    """sum_m w_m grad L(micro-batch m) = grad L(batch), and the same for the values.

    The weights w_m: those of the trainer, where its sum is given (`accumulate`); 1 for
    a sum, or where num_items replaces the denominator; else the micro-batch's share of
    the tokens (or of the rows, for a mean of rows), which any caller can apply.

    Why:  accumulation is there to save memory. If it changes the weights of the tokens,
          the same settings train another model on a smaller GPU.
    Bugs: micro-batch means averaged, so that tokens of short rows weigh more
          (huggingface/trl#4719, modelscope/ms-swift#10165, museum 8); num_items taken
          and not used (huggingface/trl#6006, MakazhanAlpamys/Soup#720); the count of
          one process for all; a mean of row means that is called a token mean
          (pytorch/torchtune#1865).
    """
    batch = make_batch(loss)

    def count(labels):
        tokens = int((labels[:, 1:] != -100).sum())
        return tokens if loss.reduction == "token_mean" else len(labels)

    def parts(b):
        return [Batch(*(x[rows] for x in b)) for rows in ([0], [1, 2])]

    def split(b):
        total = count(b.labels)
        if loss.accumulate:
            return loss.accumulate(parts(b))
        if loss.reduction == "sum":
            return sum(value(loss, p) for p in parts(b))
        if "num_items" in loss.options:
            return sum(value(loss, p, num_items=total) for p in parts(b))
        return sum(value(loss, p) * (count(p.labels) / total) for p in parts(b))

    expected, whole = ask(loss, batch)
    expected = positive(expected)
    measured, added = differentiate(split, batch)
    factor = ratio(float((added * whole).sum()), float((whole * whole).sum()))
    bug = None
    if not (same(loss, added, whole) and near(loss, measured, expected)):
        bug = "micro-batches do not add up to the batch"
        rows = differentiate(lambda b: truth(loss, b, reduction="sequence_mean"), batch)
        means = differentiate(lambda b: sum(value(loss, p) for p in parts(b)), batch)
        if gap(added, factor * whole) < 1e-3:
            bug = f"micro-batches add up to {factor:.2g} times the batch (museum 8)"
        elif parallel(added, means[1]) and not parallel(whole, means[1]):
            bug = "micro-batch means: tokens of short ones weigh more (museum 8)"
        elif loss.reduction == "token_mean" and parallel(whole, rows[1]):
            bug = "sequence means averaged, a token mean is declared (torchtune#1865)"
    error = f"{measured:.4g}, gradient off by {gap(added, whole):.1%}"
    note = ""
    if not (loss.accumulate or loss.reduction == "sum" or "num_items" in loss.options):
        note = "each weighted by its count, which is left to the caller"
    return Finding(error, expected, bug, note)
