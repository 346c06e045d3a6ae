"""Loss and gradient of a chunk of logits, for the walk of fused.py.

Knows: student logits S, and teacher logits T or sparse targets; it writes the losses
into `Tokens` and their weighted gradient to S into `out`. Does not know where logits
come from, nor what becomes of the gradient. On CUDA, fused_kernel.py does the same in
one kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from kdlib.divergences import tempered_log_softmax
from kdlib.sparse import gathered, of_logits, without_kept

if TYPE_CHECKING:
    from torch import Tensor

    from kdlib.sparse_targets import SparseTargets

# Rows that plain torch differentiates at once, counted in logits: autograd's half dozen
# temporaries of that size should stay in a CPU's cache, or fill a GPU.
SLICE = {"cuda": 2**25, "cpu": 2**19, "mps": 2**23}
# And of sparse targets, where the temporary is one and the cost is that of many small
# operations a slice.
KEPT_SLICE = {"cuda": 2**28, "cpu": 2**22, "mps": 2**25}


class Tokens(NamedTuple):
    """One number a row: what goes into the loss besides the logits, and what comes out.

    Those of labels are None without labels, targets where there is a teacher.
    """

    weights: Tensor
    per_token: Tensor
    label_weights: Tensor | None
    labels: Tensor | None
    hard: Tensor | None
    targets: SparseTargets | None = None

    def rows(self, rows: slice) -> Tokens:
        return Tokens(*(None if column is None else column[rows] for column in self))

    def total(self) -> Tensor:
        total = (self.weights * self.per_token).sum()
        if self.hard is None:
            return total
        return total + (self.label_weights * self.hard).sum()


def by_autograd(s, t, out, tokens, job) -> None:
    """The losses into `tokens`, their weighted gradient to s into `out` (maybe s)."""
    step = max(1, SLICE.get(s.device.type, 2**23) // s.shape[1])
    wide = torch.promote_types(s.dtype, torch.float32)
    for first in range(0, len(s), step):
        rows = slice(first, first + step)
        here = tokens.rows(rows)
        with torch.set_grad_enabled(out is not None):
            logits = s[rows].detach().to(wide).requires_grad_(out is not None)
            teacher = here.targets
            if teacher is None:
                teacher = job.teacher_head.shape(t[rows].to(wide))
            student = job.student_head.shape(logits)
            values = job.function(student, teacher, temperature=job.temperature)
            live = here._replace(per_token=values)
            if here.labels is not None:
                log_ps = tempered_log_softmax(student, 1.0)
                live = live._replace(hard=-log_ps.gather(1, here.labels[:, None])[:, 0])
                here.hard.copy_(live.hard.detach())
            here.per_token.copy_(values.detach())
            if out is not None:
                (out[rows],) = torch.autograd.grad(live.total(), logits)


def of_targets(divergence, params, student, targets, *, temperature):
    return of_logits(student, targets, divergence, **params)


# -------------------------------------- loss and gradient of sparse targets, by formula
#
# They depend on a row's k kept logits and one log-sum-exp (sparse.py), a function of
# few numbers. So G is p times the log-sum-exp's gradient, and k more numbers: one
# softmax and one product of the size [n, V].


def is_plain(job) -> bool:
    """Are the logits what the matrix product gives, with nothing done to them?"""
    head = job.student_head
    plain = head.softcap is None and head.scale == job.temperature == 1.0
    return plain and job.labels is None


def by_kept(s, t, out, tokens, job) -> None:
    step = max(1, KEPT_SLICE.get(s.device.type, 2**23) // s.shape[1])
    for first in range(0, len(s), step):
        rows = slice(first, first + step)
        here = tokens.rows(rows)
        indices = here.targets.indices.long()
        kept, total, p = gathered(s[rows], indices, without_kept(here.targets))
        here.per_token.copy_(job.of_kept(kept, total, here.targets))
        if out is None:
            continue
        d_kept, d_total = job.kept_gradient(kept, total, here.targets)
        d_kept, d_total = (here.weights[:, None] * d for d in (d_kept, d_total))
        torch.mul(p, d_total, out=out[rows])
        out[rows].scatter_add_(1, indices, d_kept.to(out.dtype))
