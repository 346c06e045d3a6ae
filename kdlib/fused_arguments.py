"""What fused_divergence and fused_sparse_divergence refuse, and what to do instead."""

from __future__ import annotations

import math

import torch

from kdlib.errors import ArgumentError


def _seen(side, hidden, head) -> str:
    seen = f"{side}_hidden {list(hidden.shape)} {hidden.dtype}"
    return f"{seen}, {side}_head.weight {list(head.weight.shape)} {head.weight.dtype}"


def check_side(side, hidden, head) -> None:
    seen = _seen(side, hidden, head)
    if hidden.dim() != 2:
        raise ArgumentError(seen, "select the response rows first: pass [N, H]")
    if head.weight.dim() != 2 or head.weight.shape[1] != hidden.shape[1]:
        raise ArgumentError(seen, "pass hidden [N, H] and weight [V, H], equal H")
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise ArgumentError(
            f"{side}_head.bias {list(head.bias.shape)} with {seen}", "pass bias [V]"
        )
    autocast = torch.is_autocast_enabled(hidden.device.type)
    if not hidden.is_floating_point() or (
        hidden.dtype != head.weight.dtype and not autocast
    ):
        raise ArgumentError(seen, "cast one to the other's dtype, or use autocast")


def check_rows(others, theirs, tensors) -> None:
    if len(tensors[0]) != len(theirs):
        raise ArgumentError(
            f"{len(tensors[0])} student rows, {others}",
            "select the same response tokens, in the same order, from both views",
        )
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ArgumentError(
            f"tensors on {sorted(devices)}", "move both sides to one device"
        )


def check_tokens(token_weights, labels, label_weights, hidden, head) -> None:
    rows, vocab = len(hidden), len(head.weight)
    for name, weights in (
        ("token_weights", token_weights),
        ("label_weights", label_weights),
    ):
        if weights is not None and weights.shape != (rows,):
            raise ArgumentError(
                f"{name} {list(weights.shape)} for {rows} rows",
                "pass one weight a row of student_hidden",
            )
    if labels is None:
        if label_weights is not None:
            raise ArgumentError("label_weights without labels", "pass labels [N] too")
        return
    if labels.shape != (rows,) or labels.is_floating_point():
        raise ArgumentError(
            f"labels {list(labels.shape)} {labels.dtype} for {rows} rows",
            "pass one token id a row of student_hidden",
        )
    low, high = torch.stack(labels.aminmax()).tolist() if rows else (0, 0)
    if low < 0 or high >= vocab:
        raise ArgumentError(
            f"labels from {low} to {high}, but the student's vocabulary has {vocab}"
            " tokens",
            "select response rows first (there is no ignore_index), and use the"
            " student's own tokenizer",
        )


def check_numbers(temperature, student_head, teacher_head, workspace) -> None:
    numbers = {"temperature": temperature, "workspace": workspace}
    for side, head in (("student", student_head), ("teacher", teacher_head)):
        if head is not None:
            numbers |= {f"{side}_head.scale": head.scale}
            numbers |= {f"{side}_head.softcap": head.softcap}
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise ArgumentError(f"{name} = {value}", "choose a finite number above 0")
