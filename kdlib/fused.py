"""Divergences from hidden states: the [N, V] logits never exist all at once.

Knows: hidden states, the two output heads, and how to walk over them. Does not know a
divergence of its own: divergences.py says what is computed, this file only how, and
fused_gradient.py takes one chunk's gradient.

The problem. For N response tokens over a vocabulary of V, teacher and student make two
[N, V] matrices of logits, and autograd keeps several more. At N = 8192, V = 151,936
each takes 2.5 GB in bfloat16, and reading them again and again costs more time than
making them.

The idea. A row of logits is needed only until the gradient of its own loss is known. So
take a few rows, compute their logits, overwrite the student's logits with the gradient,
multiply that gradient into the head and into the hidden states, and forget it:

    for a panel of rows:                          # G stays in memory for one panel
        for a chunk of rows of the panel:         # teacher logits: for one chunk
            S = h_s W_s^T,  T = h_t W_t^T         # matrix products 1 and 2
            per_token, G = D(S, T), dD/dS         # elementwise; G overwrites S
        d h_s  = G W_s                            # product 3
        d W_s += G^T h_s                          # product 4, summed in float32

Four matrix products are the least that any method needs, and no product is done twice.
Hard labels need no product of their own: the gradient of their cross-entropy is added
to G while S is at hand.

The price. The gradient exists before autograd says what the loss is multiplied by. A
number that multiplies the whole loss can wait for the backward pass; a weight per token
cannot. So weights per token go IN (`token_weights`, `label_weights`), one
differentiable scalar comes out, and the per-token values beside it are detached.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from kdlib.divergences import get_divergence
from kdlib.fused_arguments import check_numbers, check_rows, check_side, check_tokens
from kdlib.fused_gradient import Tokens, by_autograd, by_kept, is_plain, of_targets
from kdlib.fused_kernel import by_triton, closed_form, uses_triton
from kdlib.heads import Head
from kdlib.sparse import checked, kept_gradient, of_kept
from kdlib.sparse_targets import SparseTargets

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor

GIB = 2**30
# Bytes for the buffers of logits and gradients. On CUDA: few panels, because each one
# reads and writes all of d W_s once more. On a CPU: what its caches can hold.
WORKSPACE = {"cuda": 3 * GIB // 2, "cpu": GIB // 16, "mps": GIB // 4}
# float16 has no exponent to spare: a gradient below 6e-8 would vanish. Gradients of
# weight 1 are stored times this, which leaves room up to 255 above.
FLOAT16_GAIN = 256.0


class FusedDivergence(NamedTuple):
    total: Float[Tensor, ""]  # sum of token_weights * per_token + label_weights * hard
    per_token: Float[Tensor, " n"]  # the divergences, detached
    hard: Float[Tensor, " n"] | None  # the labels' cross-entropies, detached


def fused_divergence(
    student_hidden: Float[Tensor, "n h_s"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "n h_t"],
    teacher_head: Head,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    token_weights: Float[Tensor, " n"] | None = None,
    labels: Int[Tensor, " n"] | None = None,
    label_weights: Float[Tensor, " n"] | None = None,
    exact: bool = False,
    workspace: int | None = None,
    **params: float,
) -> FusedDivergence:
    """The weighted sum of per-token divergences and the values, from hidden states.

    The meaning is, term for term,

        D = get_divergence(divergence, **params)
        per_token = D(student_head.logits(student_hidden),
                      teacher_head.logits(teacher_hidden), temperature=temperature)
        total = (token_weights * per_token).sum()

    and with labels, the ordinary cross-entropy beside it, at temperature 1,

        hard = cross_entropy(student_head.logits(student_hidden), labels)
        total += (label_weights * hard).sum()

    whose gradient, label_weights (softmax(z_s) - onehot(labels)), is added to G as the
    divergence's own is written (the table of fused_kernel.py): no product is done for
    it.

    Pass the rows that count, `view.select(hidden)`: what is not passed is not
    projected. Columns beyond min(V_s, V_t) are computed for labels alone, and then only
    the student's.

    Gradient: of `total` alone, to student_hidden and to the student head's weight and
      bias, whichever require it (detach the weight and its product is saved). The
      teacher gets none. Everything that multiplies tokens differently (1/num_items,
      1/length for sequence means, T^2, the share of the hard labels) belongs in
      token_weights and label_weights, which are constants and 1 by default. A sharded
      head (FSDP) has to be gathered first.
    exact: keep the logits of half-precision models in float32. Without it they are
      rounded to the model's dtype, as its own forward pass does. Sums are in float32
      either way, and float32 or float64 models are computed as they are.
    workspace: bytes for the buffers, besides the float32 sum of the head's gradient.

    On CUDA the divergences with a closed form run in one Triton kernel
    (fused_kernel.py); all others, and other devices, take their gradient from autograd,
    slice by slice. Under autocast the products run in its dtype. There is no second
    derivative.

    Raises ArgumentError for arguments that do not fit together.
    """
    # Under torch.compile a graph break: it takes the model around this function. Not as
    # a decorator, which would import the compiler for everyone.
    run = torch.compiler.disable(_run) if torch.compiler.is_compiling() else _run
    return run(
        *(student_hidden, student_head, teacher_hidden, teacher_head),
        *(divergence, temperature, token_weights, labels, label_weights),
        *(exact, workspace, params),
    )


def fused_sparse_divergence(
    student_hidden: Float[Tensor, "n h_s"],
    student_head: Head,
    targets: SparseTargets,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    token_weights: Float[Tensor, " n"] | None = None,
    labels: Int[Tensor, " n"] | None = None,
    label_weights: Float[Tensor, " n"] | None = None,
    exact: bool = False,
    workspace: int | None = None,
    **params: float,
) -> FusedDivergence:
    """fused_divergence with sparse targets in the teacher's place. The meaning is

        per_token = sparse_divergence(student_head.logits(student_hidden), targets,
                                      divergence, temperature=temperature, **params)

    Three matrix products; all else is as there. Raises ArgumentError also for what
    sparse_divergence refuses.
    """
    run = torch.compiler.disable(_run) if torch.compiler.is_compiling() else _run
    return run(
        *(student_hidden, student_head, None, None),
        *(divergence, temperature, token_weights, labels, label_weights),
        *(exact, workspace, params, targets),
    )


def _run(
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    divergence,
    temperature,
    token_weights,
    labels,
    label_weights,
    exact,
    workspace,
    params,
    targets=None,
) -> FusedDivergence:
    function = get_divergence(divergence, **params)
    check_side("student", student_hidden, student_head)
    check_numbers(temperature, student_head, teacher_head, workspace)
    tensors = [student_hidden, student_head.weight]
    if targets is None:
        check_side("teacher", teacher_hidden, teacher_head)
        tensors += [teacher_hidden, teacher_head.weight]
        check_rows(f"{len(teacher_hidden)} teacher rows", teacher_hidden, tensors)
    else:
        check_rows(f"{len(targets)} targets", targets, [*tensors, targets.indices])
        vocab = len(student_head.weight)
        targets = checked(targets, vocab, divergence, temperature)
        function = functools.partial(of_targets, divergence, params)
    ones = torch.ones(len(student_hidden), device=student_hidden.device)
    token_weights = ones if token_weights is None else token_weights.detach()
    if labels is not None:
        label_weights = ones if label_weights is None else label_weights.detach()
    check_tokens(token_weights, labels, label_weights, student_hidden, student_head)
    job = _Job(
        student_head=student_head,
        teacher_head=teacher_head,
        teacher_hidden=teacher_hidden,
        student_dtype=_product_dtype(student_hidden),
        teacher_dtype=_product_dtype(teacher_hidden) if targets is None else None,
        exact=exact,
        workspace=workspace or WORKSPACE.get(student_hidden.device.type, GIB // 4),
        token_weights=token_weights,
        labels=None if labels is None else labels.long(),
        label_weights=label_weights,
        temperature=temperature,
        function=function,
        closed_form=closed_form(divergence, params),
        targets=targets,
        of_kept=functools.partial(of_kept, divergence=divergence, **params),
        kept_gradient=functools.partial(kept_gradient, divergence=divergence, **params),
        wants_gradient=torch.is_grad_enabled(),  # inside _Fused it never is
    )
    return FusedDivergence(
        *_Fused.apply(student_hidden, student_head.weight, student_head.bias, job)
    )


@dataclass(frozen=True)
class _Job:
    """What stays the same for every chunk."""

    student_head: Head
    teacher_head: Head | None  # None with sparse targets, as all of the teacher's
    teacher_hidden: Tensor | None
    student_dtype: torch.dtype  # of the matrix products' operands
    teacher_dtype: torch.dtype | None
    exact: bool
    workspace: int
    token_weights: Tensor
    labels: Tensor | None
    label_weights: Tensor | None
    temperature: float
    function: Callable
    closed_form: tuple[str, float] | None
    wants_gradient: bool
    targets: SparseTargets | None = None
    of_kept: Callable | None = None
    kept_gradient: Callable | None = None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, job):
        wants_hidden, wants_weight, wants_bias = (
            job.wants_gradient and needed for needed in ctx.needs_input_grad[:3]
        )
        wants_any = wants_hidden or wants_weight or wants_bias
        sparse = job.targets is not None
        other = job.targets.vocab_size if sparse else len(job.teacher_head.weight)
        rows, vocab = len(hidden), min(len(weight), other or len(weight))
        has_labels = job.labels is not None
        columns = len(weight) if has_labels else vocab  # of S and G; T has `vocab`
        wide = torch.promote_types(job.student_dtype, torch.float32)
        # Under autocast these casts copy; otherwise they cost nothing.
        h_s, w_s = hidden.to(job.student_dtype), weight[:columns].to(job.student_dtype)
        if not sparse:
            h_t = job.teacher_hidden.to(job.teacher_dtype)
            w_t = job.teacher_head.weight[:vocab].to(job.teacher_dtype)

        gain = torch.ones((), dtype=wide, device=hidden.device)
        if job.student_dtype == torch.float16 and rows:
            largest = job.token_weights.abs().to(wide)
            if has_labels:
                largest = largest + job.label_weights.abs()
            largest = largest.max()
            gain = FLOAT16_GAIN / torch.where(largest > 0, largest, 1.0)

        new = functools.partial(torch.empty, dtype=wide, device=hidden.device)
        tokens = Tokens(
            weights=job.token_weights.to(wide) * gain,
            per_token=new(rows),
            label_weights=job.label_weights.to(wide) * gain if has_labels else None,
            labels=job.labels,
            hard=new(rows) if has_labels else None,
            targets=job.targets,
        )

        # The three sums. torch.empty, because the first panel writes without reading.
        d_hidden = new(hidden.shape) if wants_hidden else None
        d_weight = new(weight.shape) if wants_weight else None
        d_bias = new(bias.shape).zero_() if wants_bias else None
        if d_weight is not None:
            d_weight[columns if rows else 0 :].zero_()  # what no chunk reaches

        s_dtype = wide if job.exact else job.student_dtype
        t_dtype = job.teacher_dtype
        if job.exact and not sparse:
            t_dtype = torch.promote_types(job.teacher_dtype, torch.float32)
        in_place = s_dtype == job.student_dtype  # can G overwrite S?
        chunk, panel = _rows(job, columns, s_dtype, t_dtype, in_place, wants_any)
        buffer = functools.partial(_buffer, device=hidden.device)
        gradients = buffer(min(panel, rows), columns, dtype=job.student_dtype)
        t_logits = s_logits = None
        if not sparse:
            t_logits = buffer(min(chunk, rows), vocab, dtype=t_dtype)
        if not in_place:
            s_logits = buffer(min(chunk, rows), columns, dtype=s_dtype)
        differentiate = by_autograd
        if sparse and is_plain(job):
            differentiate = by_kept
        elif not sparse and job.closed_form and uses_triton(hidden.device):
            differentiate = by_triton

        for first in range(0, rows, panel):
            last = min(first + panel, rows)
            g_panel = gradients[: last - first]
            for start in range(first, last, chunk):
                stop = min(start + chunk, last)
                g = g_panel[start - first : stop - first]
                s = g if in_place else s_logits[: stop - start]
                _project(s, h_s[start:stop], w_s, job.student_head.bias)
                t = None
                if not sparse:
                    t = t_logits[: stop - start]
                    _project(t, h_t[start:stop], w_t, job.teacher_head.bias)
                g_out = g if wants_any else None
                here = slice(start, stop)
                differentiate(s, t, g_out, tokens.rows(here), job)
            if d_hidden is not None:
                _product(d_hidden[first:last], g_panel, w_s)
            if d_weight is not None:
                h_panel = h_s[first:last]
                _product(d_weight[:columns], g_panel.T, h_panel, add=first > 0)
            if d_bias is not None:
                d_bias[:columns] += g_panel.sum(0, dtype=wide)

        ctx.save_for_backward(d_hidden, d_weight, d_bias, gain)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        values = tokens.per_token, tokens.hard
        ctx.mark_non_differentiable(*(x for x in values if x is not None))
        return tokens.total() / gain, *values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        *sums, gain = ctx.saved_tensors
        # Not in place: the graph may be kept and run backward again. Scaling and the
        # only rounding to the parameters' dtype are one pass.
        factor = upstream.to(gain.dtype) / gain
        scaled = (
            None
            if total is None
            else torch.mul(total, factor, out=torch.empty_like(total, dtype=dtype))
            for total, dtype in zip(sums, ctx.dtypes, strict=True)
        )
        return *scaled, None


# ------------------------------------------------------------------ matrix products


def _product(out, a, b, add=False) -> None:
    """out = a b, or out += a b, never rounded on the way to out's dtype."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=float(add))  # beta = 0 does not read `out`
    elif out.device.type != "cuda":  # no such product there: widen the operands
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=float(add))
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _project(logits, hidden, weight, bias) -> None:
    if bias is not None:
        logits.copy_(bias[: logits.shape[1]].expand_as(logits))
    _product(logits, hidden, weight.T, add=bias is not None)


def _padded(vocab) -> int:
    # Rows start at multiples of 64 numbers: aligned for tensor cores and wide loads
    # even where V is odd (50,257).
    return -(-vocab // 64) * 64


def _buffer(rows, columns, *, dtype, device) -> Tensor:
    return torch.empty(rows, _padded(columns), dtype=dtype, device=device)[:, :columns]


def _rows(job, columns, s_dtype, t_dtype, in_place, wants_gradient) -> tuple[int, int]:
    """(rows of a chunk, rows of a panel) that the workspace has room for."""
    columns = _padded(columns)
    t_size = 0 if t_dtype is None else t_dtype.itemsize
    chunk = job.workspace // (5 * columns * max(s_dtype.itemsize, t_size))
    chunk = max(1, chunk)
    if chunk > 128:
        chunk -= chunk % 128  # whole tiles of a matrix product
    if not wants_gradient:
        return chunk, chunk
    row = columns * (t_size + (0 if in_place else s_dtype.itemsize))
    room = (job.workspace - chunk * row) // (
        chunk * columns * job.student_dtype.itemsize
    )
    return chunk, chunk * max(1, room)


def _product_dtype(hidden) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype
