"""Speed and memory of the fused loss, beside what no method can avoid.

Knows: how to time a loss from hidden states to gradients, and how its peers are called.
Does not know how any of them works.

The unit is the floor: the four matrix products that every method needs (both sides'
logits, the gradients of the student's hidden states and head), timed alone in the same
run. A ratio to the floor says what a loss costs beyond them, and travels between
machines better than milliseconds do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from kdlib.divergences import get_divergence
from kdlib.errors import ArgumentError
from kdlib.fused import fused_divergence
from kdlib.fused_kernel import HAS_TRITON
from kdlib.heads import Head
from kdlib.ledger import provenance, write_json
from kdlib.measuring import (
    LOGIT_STD,
    MIB,
    PeakMemory,
    Unavailable,
    check_place,
    peer,
    peer_versions,
    synchronize,
)
from kdlib.precision import DTYPES, Precision

DIVERGENCES = ("forward_kl", "generalized_jsd", "reverse_kl", "skew_kl")
# beta of the generalized JSD, the one family that the peers know
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "generalized_jsd": 0.5}


@dataclass(frozen=True)
class Size:
    rows: int
    student_width: int
    teacher_width: int
    vocab: int
    dtype: str = "float32"


SIZES = {
    "cuda": Size(8192, 1024, 2048, 151_936, "bfloat16"),
    "cpu": Size(256, 64, 128, 151_936),
    "mps": Size(1024, 256, 512, 151_936),
}


def usual_size(device: str) -> Size:
    """SIZES[device]; in float16 on a card that only emulates bfloat16."""
    size = SIZES[device]
    if device == "cuda":
        half = DTYPES[Precision.choose("auto", torch.device(device)).name]
        size = replace(size, dtype=str(half).removeprefix("torch."))
    return size


class Inputs:
    """Random hidden states and heads, drawn in place: no peak above their own size."""

    def __init__(self, size: Size, device: str):
        torch.manual_seed(0)

        def draw(rows, width, std):
            dtype = getattr(torch, size.dtype)
            return torch.empty(rows, width, device=device, dtype=dtype).normal_(0, std)

        width_s, width_t = size.student_width, size.teacher_width
        self.h_s, self.h_t = draw(size.rows, width_s, 1), draw(size.rows, width_t, 1)
        self.w_s = draw(size.vocab, width_s, LOGIT_STD * width_s**-0.5)
        self.w_t = draw(size.vocab, width_t, LOGIT_STD * width_t**-0.5)
        self.leaves = self.h_s.requires_grad_(), self.w_s.requires_grad_()


# ----------------------------------------- the methods: each makes a () -> loss


def _fused(x, divergence, **options):
    weights = torch.full((len(x.h_s),), 1 / len(x.h_s), device=x.h_s.device)
    options |= {"divergence": divergence, "token_weights": weights}
    student, teacher = Head(x.w_s), Head(x.w_t)
    return lambda: fused_divergence(x.h_s, student, x.h_t, teacher, **options).total


def _fused_exact(x, divergence):
    if x.h_s.dtype in (torch.float32, torch.float64):
        raise Unavailable(
            "kdlib fused is exact where the inputs are not half precision"
        )
    return _fused(x, divergence, exact=True)


def _naive(x, divergence):
    function = get_divergence(divergence)
    return lambda: function(x.h_s @ x.w_s.T, x.h_t @ x.w_t.T).mean()


def _compiled(x, divergence):
    if x.h_s.device.type != "cuda":
        raise Unavailable("measured on CUDA alone: compiling outlasts this benchmark")
    torch.compiler.reset()
    return torch.compile(_naive(x, divergence))


def _trl(x, divergence):
    beta = _beta(divergence)
    loss = peer("trl.experimental.gkd", "GKDTrainer").generalized_jsd_loss

    def run():
        student, teacher = x.h_s @ x.w_s.T, x.h_t @ x.w_t.T
        total = loss(student[None], teacher[None], beta=beta, reduction="sum")
        return total / len(x.h_s)

    return run


def _trl_chunked(x, divergence):
    beta = _beta(divergence)
    function = peer("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    inputs = (x.h_s, x.w_s, None, x.h_t, x.w_t, None, beta)
    return lambda: function.apply(*inputs)[0].mean()


def _liger(x, divergence):
    beta = _beta(divergence)
    if x.h_s.device.type != "cuda":
        raise Unavailable("its kernel needs CUDA")
    loss = peer("liger_kernel.transformers", "LigerFusedLinearJSD")(jsd_beta=beta)
    return lambda: loss(x.h_s, x.w_s, x.h_t, x.w_t, None)


def _liger_chunked(x, divergence):
    beta, cuda = _beta(divergence), x.h_s.device.type == "cuda"
    loss = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=cuda
    )
    labels = torch.zeros(len(x.h_s), dtype=torch.long, device=x.h_s.device)
    return lambda: loss(x.h_s, x.w_s, x.h_t, x.w_t, labels)


def _beta(divergence):
    if divergence not in BETA:
        raise Unavailable(f"has no {divergence}")
    return BETA[divergence]


METHODS = {
    "kdlib fused": _fused,
    "kdlib fused, exact": _fused_exact,
    "torch eager": _naive,
    "torch.compile": _compiled,
    "TRL generalized_jsd_loss": _trl,
    "TRL ChunkedDivergence": _trl_chunked,
    "Liger fused_linear_jsd": _liger,
    "Liger chunked JSD": _liger_chunked,
}


# ----------------------------------------------------------------------- measurements


def _floor(x: Inputs) -> Callable[[], None]:
    """The four products alone, into buffers that exist already."""
    h_s, w_s = x.h_s.detach(), x.w_s.detach()
    student, teacher = h_s @ w_s.T, x.h_t @ x.w_t.T
    d_h, d_w = torch.empty_like(h_s), torch.empty_like(w_s)

    def run():
        torch.mm(h_s, w_s.T, out=student)
        torch.mm(x.h_t, x.w_t.T, out=teacher)
        torch.mm(student, w_s, out=d_h)
        torch.mm(student.T, h_s, out=d_w)

    return run


def _step(method: str, divergence: str, x: Inputs) -> Callable[[], None]:
    loss = METHODS[method](x, divergence)

    def run():
        for leaf in x.leaves:
            leaf.grad = None
        loss().backward()

    return run


def _measure(method: str, divergence: str, size: Size, device: str, repeats: int):
    """Time, peak memory above the inputs, and gradient error of one method."""
    x = Inputs(size, device)
    run = _floor(x) if method == "floor" else _step(method, divergence, x)
    if device != "cpu":
        run()  # so that compilation and the library's own workspace are not counted
        for leaf in x.leaves:
            leaf.grad = None
    with PeakMemory(device) as peak:
        run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    row = {"ms": round(1e3 * statistics.median(times), 2)}
    row["peak_mib"] = None if peak.above is None else round(peak.above / MIB)
    if method != "floor":
        if device == "cpu":  # the reference at full size would outlast all else
            x = Inputs(replace(size, rows=min(size.rows, 16)), device)
            _step(method, divergence, x)()
        row["gradient_error"] = float(f"{_gradient_error(x, divergence):.2g}")
    return row


def _gradient_error(x: Inputs, divergence: str) -> float:
    """The larger relative error of the leaves' gradients, against plain autograd.

    In float32 for half-precision inputs, else in float64, some rows at a time.
    """
    half = x.h_s.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half else torch.float64
    h, w = (leaf.detach().to(dtype).requires_grad_() for leaf in x.leaves)
    h_t, w_t, function = x.h_t.to(dtype), x.w_t.to(dtype), get_divergence(divergence)
    for rows in torch.arange(len(h), device=h.device).split(512):
        (function(h[rows] @ w.T, h_t[rows] @ w_t.T).sum() / len(h)).backward()
    return max(
        ((leaf.grad.to(dtype) - wanted.grad).norm() / wanted.grad.norm()).item()
        for leaf, wanted in zip(x.leaves, (h, w), strict=True)
    )


# ----------------------------------------------------------------------- the benchmark


def bench_loss(
    device: str | None = None,
    *,
    size: Size | None = None,
    divergences: tuple[str, ...] | None = None,
    methods: tuple[str, ...] = tuple(METHODS),
    repeats: int | None = None,
    out: str | Path | None = None,
    command: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict:
    """Forward plus backward from hidden states, as a ratio to the floor.

    device: "cuda", "mps" or "cpu"; None takes CUDA where it is, else the CPU.
    size:   `usual_size(device)` unless given; `targets` are judged at SIZES[device].
    divergences: all of DIVERGENCES on a GPU, the first two on a CPU, unless given.
    out:    a path for the result as JSON, with provenance.
    command: what the provenance names as the maker, by default the command line.

    A row of the result has ms (median), ratio (to the floor of this run), peak_mib
    (of tensors, above the inputs; not on MPS), gradient_error (relative in norm,
    against plain autograd at higher precision; on a CPU for 16 rows), or `skipped` with
    the reason.

    Raises ArgumentError for an unknown or absent device, an unknown method or
    divergence, or an `out` that is a folder.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_place(device, SIZES, out)
    for method in methods:
        if method not in METHODS:
            raise ArgumentError(f"method = {method!r}", f"choose from {list(METHODS)}")
    divergences = divergences or DIVERGENCES[: 2 if device == "cpu" else None]
    for divergence in divergences:
        get_divergence(divergence)
    size = size or usual_size(device)
    settings = (size, device, repeats or (20 if device == "cuda" else 2))

    floor = _measure("floor", "", *settings)
    log(f"floor (four matrix products): {floor['ms']:.1f} ms")
    rows = []
    for divergence in divergences:
        for method in methods:
            row = {"divergence": divergence, "method": method}
            try:
                row |= _measure(method, divergence, *settings)
                row["ratio"] = round(row["ms"] / floor["ms"], 2)
            except (Unavailable, torch.OutOfMemoryError) as reason:
                row["skipped"] = str(reason).splitlines()[0]
            rows.append(row)
            log(_line(row))
    command = command or f"python -m kdlib bench loss --device {device}"
    result = provenance(command)
    result |= peer_versions("triton", "trl", "liger-kernel")
    if device != "cuda" and torch.cuda.is_available():
        result["device"] = device
    result |= {
        "triton_kernel": device == "cuda" and HAS_TRITON,
        "size": asdict(size),
        "repeats": settings[-1],
        "floor_ms": floor["ms"],
        "rows": rows,
        "targets": _targets(rows, device) if size == SIZES[device] else [],
    }
    if out is not None:
        write_json(out, result)
    return result


def _targets(rows, device) -> list[dict]:
    """What the fused loss promises at SIZES[device], and whether it held."""
    measured = {(r["divergence"], r["method"]): r for r in rows if "ms" in r}
    targets = []
    for (divergence, method), measured_row in measured.items():
        row, limits = dict(measured_row), {}
        if device == "cuda" and method == "kdlib fused":
            limits["ratio"] = 1.20 if divergence == "forward_kl" else 1.25
            limits["peak_mib"] = 2.2 * 1024
        if device == "cuda" and method == "kdlib fused, exact":
            limits |= {"ratio": 1.45, "gradient_error": 2e-3}
        naive = measured.get((divergence, "torch eager"))
        if device == "cpu" and method == "kdlib fused" and naive:
            for key, limit in {"ms": 1.0, "peak_mib": 0.25}.items():
                limits[f"{key} / torch eager"] = limit
                row[f"{key} / torch eager"] = round(row[key] / naive[key], 3)
        for quantity, limit in limits.items():
            target = {"divergence": divergence, "method": method, "quantity": quantity}
            value = row[quantity]
            targets.append(target | {"value": value, "limit": limit})
            targets[-1]["met"] = value <= limit
    return targets


def table(result: dict) -> str:
    """The result as lines of text."""
    size = ", ".join(f"{key} {value}" for key, value in result["size"].items())
    lines = [
        f"{result['device']}, torch {result['torch']}, {result['date']}",
        f"{size}; floor (four matrix products): {result['floor_ms']:.1f} ms",
        "",
        f"{'divergence':<16}{'method':<25}{'x floor':>8}{'ms':>9}{'peak MiB':>9}"
        f"{'gradient error':>15}",
        *map(_line, result["rows"]),
    ]
    for target in result["targets"]:
        verdict = "met   " if target["met"] else "MISSED"
        where = f"{target['method']}, {target['divergence']}: {target['quantity']}"
        lines.append(f"{verdict} {where} {target['value']:g} <= {target['limit']:g}")
    return "\n".join(lines)


def _line(row) -> str:
    start = f"{row['divergence']:<16}{row['method']:<25}"
    if "skipped" in row:
        return f"{start} skipped: {row['skipped']}"
    peak = "-" if row["peak_mib"] is None else row["peak_mib"]
    numbers = f"{row['ratio']:>8.2f}{row['ms']:>9.1f}{peak:>9}"
    return f"{start}{numbers}{row['gradient_error']:>15.1e}"
