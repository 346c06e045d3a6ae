"""Loss and gradient of the closed-form divergences, in one Triton kernel.

Knows: one row of both sides' logits at a time. fused.py makes the logits and calls it;
divergences.py says what the values mean.

Every divergence here is D = sum_v d(p_t, p_s), and through the softmax

    dD/dz_s = (a - p_s sum_v a) / T      with a = p_s * (partial of d by p_s),

where a constant added to the partial cancels. With x = log p_t - log p_s and a
mixture m = w p_t + (1 - w) p_s:

                      d                          a                            sum a
    forward_kl        p_t x                      -p_t                         -1
    cross_entropy     -p_t log p_s               -p_t                         -1
    reverse_kl        -p_s x                     -p_s x                       D
    kl_mix            (1 - lam), lam times the   same                         same
    generalized_jsd   beta p_t log(p_t / m)      (1 - beta) p_s log(p_s / m)  pass 2
                      + (1 - beta) p_s log(p_s / m)
    skew_kl           p_t log(p_t / m)           -(1 - alpha) p_s p_t / m     pass 2
    skew_reverse_kl   p_s log(p_s / m)           p_s log(p_s / m)             pass 2
                                                 - alpha p_s p_s / m

Where `sum a` is known beforehand, two passes over the row do: one for the softmaxes'
normalisers (and D of reverse_kl), one for the loss and the gradient. Others need one
more. A pass reads 2 V logits, the time of the kernel, so each pass runs against the
direction of the one before: what was read last is still in the cache.

Hard labels enter below the table, as the last pass writes the gradient. Theirs is
another softmax, at temperature 1 and over all V_s columns: its normaliser is one more
sum in pass 1, and (softmax(z_s T) - onehot(label)) times the label's weight is added.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from kdlib.divergences import DIVERGENCES

# Triton compiles for CUDA alone; its interpreter runs the same kernel on a CPU (tests).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = bool(
    (torch.cuda.is_available() or INTERPRETED) and find_spec("triton") is not None
)
if HAS_TRITON:
    import triton
    import triton.language as tl

# Bytes of a row that a Triton program takes at once. Three such blocks a side are under
# way, which fills a multiprocessor: few rows are then in progress together, and more of
# each is still in the L2 cache for the next pass.
BLOCK_BYTES = 16384


def closed_form(name, params) -> tuple[str, float] | None:
    """(name, parameter) for the kernel; None where it has no closed form."""
    known = ("forward_kl", "reverse_kl", "cross_entropy", "kl_mix")
    if name not in (*known, "generalized_jsd", "skew_kl", "skew_reverse_kl"):
        return None
    defaults = DIVERGENCES[name].__kwdefaults__
    values = [v for k, v in {**defaults, **params}.items() if k != "temperature"]
    value = float(values[0]) if values else 0.0
    ends = {
        "kl_mix": {0.0: "forward_kl", 1.0: "reverse_kl"},
        "generalized_jsd": {0.0: "forward_kl", 1.0: "reverse_kl"},
        "skew_kl": {0.0: "forward_kl"},
        "skew_reverse_kl": {0.0: "reverse_kl"},
    }
    return ends.get(name, {}).get(value, name), value


def uses_triton(device) -> bool:
    return HAS_TRITON and (device.type == "cuda" or INTERPRETED)


def by_triton(s, t, out, tokens, job) -> None:
    kind, value = job.closed_form
    mixture = {"generalized_jsd": value, "skew_kl": value, "skew_reverse_kl": 1 - value}
    wide = torch.promote_types(s.dtype, t.dtype) == torch.float64
    block = BLOCK_BYTES // max(s.dtype.itemsize, t.dtype.itemsize)
    block = min(block, triton.next_power_of_2(s.shape[1]))
    has_labels = tokens.labels is not None
    unused = tokens.per_token
    with torch.cuda.device_of(s):  # Triton launches on the current device
        _kernel[(len(s),)](
            *(s, s.stride(0), t, t.stride(0)),
            *(s if out is None else out, 0 if out is None else out.stride(0)),
            *(tokens.per_token, tokens.weights),
            *(tokens.hard, tokens.labels) if has_labels else (unused, unused),
            tokens.label_weights if has_labels else unused,
            *(min(s.shape[1], t.shape[1]), s.shape[1], job.temperature),
            *_shape_numbers(job.student_head, job.temperature),
            *_shape_numbers(job.teacher_head, job.temperature),
            *(value, mixture.get(kind, 0.0)),
            KIND=kind,
            S_CAPPED=job.student_head.softcap is not None,
            T_CAPPED=job.teacher_head.softcap is not None,
            LABELS=has_labels,
            WRITE=out is not None,
            DTYPE=tl.float64 if wide else tl.float32,
            BLOCK=block,
            num_warps=max(1, block // 256),  # 8 logits a thread
        )


def _shape_numbers(head, temperature) -> tuple[float, float]:
    """(outer, inner): z = outer * tanh(inner * logit), or outer * logit, with 1/T."""
    if head.softcap is None:
        return head.scale / temperature, 1.0
    return head.softcap / temperature, head.scale / head.softcap


def _jit(function):
    return triton.jit(function) if HAS_TRITON else function


@_jit
def _z(
    ptr, stride, columns, vocab, outer, inner, CAPPED: tl.constexpr, DTYPE: tl.constexpr
):
    """Logits over temperature, -inf beyond the vocabulary, and their slope."""
    # Up to the stride, a multiple of 64, not to the vocabulary: 16 bytes a load.
    raw = tl.load(ptr + columns, mask=columns < stride, other=0.0).to(DTYPE)
    if CAPPED:
        tanh = 2 * tl.sigmoid(2 * inner * raw) - 1
        shaped, slope = outer * tanh, outer * inner * (1 - tanh * tanh)
    else:
        shaped, slope = outer * raw, tl.zeros_like(raw) + outer
    return tl.where(columns < vocab, shaped, float("-inf")), slope


@_jit
def _terms(log_ps, log_pt, value, weight, KIND: tl.constexpr):
    """(d, a, p_s) of the table above. 0 log 0 is 0, and 0 (inf - inf) as well."""
    ps, pt = tl.exp(log_ps), tl.exp(log_pt)
    x = log_pt - log_ps
    forward, reverse = tl.where(pt > 0, pt * x, 0.0), tl.where(ps > 0, -ps * x, 0.0)
    if KIND == "forward_kl":
        d, a = forward, -pt
    elif KIND == "cross_entropy":
        d, a = tl.where(pt > 0, -pt * log_ps, 0.0), -pt
    elif KIND == "reverse_kl":
        d, a = reverse, reverse
    elif KIND == "kl_mix":
        d = (1 - value) * forward + value * reverse
        a = value * reverse - (1 - value) * pt
    else:
        # Everything is taken relative to the larger probability: e = smaller / larger,
        # r = m / larger. So nothing overflows, and x = 0 gives log r = 0 exactly.
        e = tl.exp(-tl.abs(x))
        r = 1 + tl.where(x > 0, 1 - weight, weight) * (e - 1)
        pt_log = tl.where(pt > 0, -pt * (tl.maximum(-x, 0.0) + tl.log(r)), 0.0)
        ps_log = tl.where(ps > 0, -ps * (tl.maximum(x, 0.0) + tl.log(r)), 0.0)
        if KIND == "generalized_jsd":
            d = value * pt_log + (1 - value) * ps_log
            a = (1 - value) * ps_log
        elif KIND == "skew_kl":
            d = pt_log
            a = tl.where(ps > 0, -(1 - value) * ps * tl.where(x > 0, 1.0, e) / r, 0.0)
        else:
            d = ps_log
            a = ps_log - value * tl.where(ps > 0, ps * tl.where(x > 0, e, 1.0) / r, 0.0)
    return d, a, ps


@_jit
def _kernel(
    s_ptr,
    s_stride,
    t_ptr,
    t_stride,
    out_ptr,
    out_stride,
    per_token_ptr,
    weight_ptr,
    hard_ptr,
    label_ptr,
    label_weight_ptr,
    vocab,
    s_vocab,
    temperature,
    s_outer,
    s_inner,
    t_outer,
    t_inner,
    value,
    weight,
    KIND: tl.constexpr,
    S_CAPPED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    LABELS: tl.constexpr,
    WRITE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: the row's losses, and their gradient written over `out`.

    vocab columns are compared; with labels the student may have more, s_vocab.
    """
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * s_stride
    t_ptr += row * t_stride
    out_ptr += row * out_stride
    lanes = tl.arange(0, BLOCK)
    last = (s_vocab - 1) // BLOCK

    # Pass 1, forwards: log-sum-exp of both sides. Every lane keeps a maximum and a sum
    # of its own, so that lanes need not meet before the end, and pays one exponential a
    # logit: of the smaller minus the larger, whichever of the two is new.
    s_max = tl.full([BLOCK], -1e38, DTYPE)  # finite: -inf minus -inf is NaN
    t_max = tl.full([BLOCK], -1e38, DTYPE)
    s_sum = tl.zeros([BLOCK], DTYPE)
    t_sum = tl.zeros([BLOCK], DTYPE)
    gap = tl.zeros([BLOCK], DTYPE)  # sum of e^z_s (z_s - z_t), for reverse_kl
    h_max = tl.full([BLOCK], -1e38, DTYPE)  # h = z_s T, for the labels
    h_sum = tl.zeros([BLOCK], DTYPE)
    for i in tl.range(0, last + 1, num_stages=3):
        columns = i * BLOCK + lanes
        s, _ = _z(s_ptr, s_stride, columns, s_vocab, s_outer, s_inner, S_CAPPED, DTYPE)
        if LABELS:
            h = s * temperature
            e = tl.exp(-tl.abs(h - h_max))
            h_sum = tl.where(h > h_max, h_sum * e + 1, h_sum + e)
            h_max = tl.maximum(h_max, h)
            s = tl.where(columns < vocab, s, float("-inf"))
        t, _ = _z(t_ptr, t_stride, columns, vocab, t_outer, t_inner, T_CAPPED, DTYPE)
        e = tl.exp(-tl.abs(s - s_max))
        if KIND == "reverse_kl" or KIND == "kl_mix":
            apart = tl.where(s > float("-inf"), s - t, 0.0)
            gap = tl.where(s > s_max, gap * e + apart, gap + apart * e)
        s_sum = tl.where(s > s_max, s_sum * e + 1, s_sum + e)
        s_max = tl.maximum(s_max, s)
        e = tl.exp(-tl.abs(t - t_max))
        t_sum = tl.where(t > t_max, t_sum * e + 1, t_sum + e)
        t_max = tl.maximum(t_max, t)
    s_top, t_top = tl.max(s_max, 0), tl.max(t_max, 0)
    s_total = tl.sum(s_sum * tl.exp(s_max - s_top), 0)
    t_total = tl.sum(t_sum * tl.exp(t_max - t_top), 0)
    s_norm, t_norm = s_top + tl.log(s_total), t_top + tl.log(t_total)

    # sum a: known, or from pass 1, or by pass 2, backwards.
    sum_a = s_norm * 0 - 1
    if KIND == "reverse_kl" or KIND == "kl_mix":
        reverse = tl.sum(gap * tl.exp(s_max - s_top), 0) / s_total - s_norm + t_norm
        share = value if KIND == "kl_mix" else 1.0
        sum_a = share * reverse - (1 - share)
    elif KIND != "forward_kl" and KIND != "cross_entropy" and WRITE:
        sums = tl.zeros([BLOCK], DTYPE)
        for i in tl.range(0, last + 1, num_stages=3):
            columns = (last - i) * BLOCK + lanes
            s, _ = _z(
                s_ptr, s_stride, columns, vocab, s_outer, s_inner, S_CAPPED, DTYPE
            )
            t, _ = _z(
                t_ptr, t_stride, columns, vocab, t_outer, t_inner, T_CAPPED, DTYPE
            )
            _, a, _ = _terms(s - s_norm, t - t_norm, value, weight, KIND)
            sums += a
        sum_a = tl.sum(sums, 0)

    # The last pass: the losses, and their gradient over the student's logits.
    row_weight = tl.load(weight_ptr + row)
    losses = tl.zeros([BLOCK], DTYPE)
    if LABELS:
        label, label_weight = tl.load(label_ptr + row), tl.load(label_weight_ptr + row)
        h_top = tl.max(h_max, 0)
        h_norm = h_top + tl.log(tl.sum(h_sum * tl.exp(h_max - h_top), 0))
        hard = tl.zeros([BLOCK], DTYPE)
    backwards = KIND == "forward_kl" or KIND == "cross_entropy"
    backwards = backwards or KIND == "reverse_kl" or KIND == "kl_mix"
    for i in tl.range(0, last + 1, num_stages=3):
        columns = ((last - i) if backwards else i) * BLOCK + lanes
        s, slope = _z(
            s_ptr, s_stride, columns, s_vocab, s_outer, s_inner, S_CAPPED, DTYPE
        )
        if LABELS:
            h = s * temperature
            s = tl.where(columns < vocab, s, float("-inf"))
        t, _ = _z(t_ptr, t_stride, columns, vocab, t_outer, t_inner, T_CAPPED, DTYPE)
        d, a, ps = _terms(s - s_norm, t - t_norm, value, weight, KIND)
        losses += d
        g = (a - ps * sum_a) * slope * row_weight
        if LABELS:
            hit = columns == label
            hard += tl.where(hit, h_norm - h, 0.0)
            surplus = tl.exp(h - h_norm) - tl.where(hit, 1.0, 0.0)
            g += surplus * slope * temperature * label_weight
        if WRITE:
            g = g.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + columns, g, mask=columns < out_stride)
    tl.store(per_token_ptr + row, tl.sum(losses, 0))
    if LABELS:
        tl.store(hard_ptr + row, tl.sum(hard, 0))
