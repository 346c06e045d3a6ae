"""Answers to the exercises of chapter 1: wrong ones, and honest variants of right ones.

A wrong answer comes with its provenance, the outcome and the bug's name that the
checker must give, and the points that are left.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial

import numpy as np
import torch
from wrong_answers.collect import collectors

WRONG, HONEST, wrong, honest = collectors()


# --- 1.1 kv_cache_bytes ---


def parts(config):
    heads = config["num_attention_heads"]
    stored = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return config["num_hidden_layers"], heads, stored, head_dim


@wrong("1.1", "query heads counted", 1, "vllm-project/vllm#29736, torchtune#38")
def query_heads(config, tokens, size):
    layers, heads, _, head_dim = parts(config)
    return 2 * layers * heads * head_dim * tokens * size


@wrong("1.1", "head_dim derived", 3, "LMCache#688, Model-Optimizer#2482")
def derived(config, tokens, size):
    layers, heads, stored, _ = parts(config)
    head_dim = config["hidden_size"] // heads
    return 2 * layers * stored * head_dim * tokens * size


@wrong("1.1", "hidden_size for the stored width", 1, "model-memory-calculator#2")
def width(config, tokens, size):
    return 2 * config["num_hidden_layers"] * config["hidden_size"] * tokens * size


@wrong("1.1", "heads counted twice", 0, "jranaraki/vllm-fit#2")
def twice(config, tokens, size):
    per_layer = config["num_attention_heads"] * config["hidden_size"]
    return 2 * config["num_hidden_layers"] * per_layer * tokens * size


@wrong("1.1", "stored heads taken for a divisor", 0, "rasbt/LLMs-from-scratch#922")
def divisor(config, tokens, size):
    layers, heads, groups, head_dim = parts(config)
    return 2 * layers * (heads // groups) * head_dim * tokens * size


@wrong("1.1", "one head only", 0, "rohitg00/ai-engineering-from-scratch#57")
def one_head(config, tokens, size):
    layers, _, _, head_dim = parts(config)
    return 2 * layers * head_dim * tokens * size


@wrong("1.1", "keys or values only", 0)
def keys_only(config, tokens, size):
    layers, _, stored, head_dim = parts(config)
    return layers * stored * head_dim * tokens * size


@wrong("1.1", "one layer only", 0)
def one_layer(config, tokens, size):
    _, _, stored, head_dim = parts(config)
    return 2 * stored * head_dim * tokens * size


@wrong("1.1", "bits for bytes", 0)
def bits(config, tokens, size):
    return 8 * right_kv(config, tokens, size)


@wrong("1.1", "one token only", 0)
def per_token(config, tokens, size):
    return right_kv(config, 1, size)


@wrong("1.1", "numbers for bytes", 0)
def numbers(config, tokens, size):
    return right_kv(config, tokens, 1)


@wrong("1.1", "constant factor", 0, "GiB for bytes: no sighting")
def gibibytes(config, tokens, size):
    return right_kv(config, tokens, size) / 1024**3


@wrong("1.1", "changes its input", 3, "setdefault on the caller's config")
def fills_the_config(config, tokens, size):
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    return right_kv(config, tokens, size)


@wrong("1.1", "raised", 3, "torchtune#38: old configs lack the entry", "raised")
def needs_the_entry(config, tokens, size):
    _ = config["num_key_value_heads"]
    return right_kv(config, tokens, size)


@wrong("1.1", "no return", 0)
def prints(config, tokens, size):
    print(right_kv(config, tokens, size))


@honest("1.1")
def right_kv(config, tokens, size):
    layers, _, stored, head_dim = parts(config)
    return size * tokens * layers * (stored * head_dim + stored * head_dim)


@honest("1.1")
def as_a_float(config, tokens, size):
    return float(right_kv(config, tokens, size))


@honest("1.1")
def as_a_tensor(config, tokens, size):
    return torch.tensor(right_kv(config, tokens, size))


@honest("1.1")
def as_float32(config, tokens, size):
    return np.float32(right_kv(config, tokens, size))


@honest("1.1")
def layer_by_layer(config, tokens, size):
    copy = dict(config)
    copy["num_hidden_layers"] = 1
    return sum(right_kv(copy, tokens, size) for _ in range(config["num_hidden_layers"]))


# --- 1.2 distillation_flops ---


def flops(t, s, c, c2, z, y, epochs, *, forward=2, train=6, ask=None, read=None):
    ask = (c + z + y).sum() if ask is None else ask
    read = (c2 + z + y).sum() if read is None else read
    return float(forward * t * ask + train * s * read * epochs)


@wrong("1.2", "multiply-adds counted", 0, "pytorch-OpCounter#46, fvcore#69")
def multiply_adds(*args):
    return flops(*args, forward=1, train=3)


@wrong("1.2", "no backward pass", 0, "baidu-research/DeepBench#48")
def forward_only(*args):
    return flops(*args, train=2)


@wrong("1.2", "backward pass as cheap as forward", 0, "said in DeepBench#48")
def cheap_backward(*args):
    return flops(*args, train=4)


@wrong("1.2", "teacher left out", 0)
def free_teacher(*args):
    return flops(*args, forward=0)


@wrong("1.2", "teacher trained", 0)
def trained_teacher(*args):
    return flops(*args, forward=6)


@wrong("1.2", "teacher reads every epoch", 3)
def every_epoch(t, s, c, c2, z, y, epochs):
    return flops(t * epochs, s, c, c2, z, y, 1, train=6 * epochs)


@wrong("1.2", "student reads the context", 1)
def student_reads_c(t, s, c, c2, z, y, epochs):
    return flops(t, s, c, c, z, y, epochs)


@wrong("1.2", "teacher reads the simplified input", 1, "tinker-cookbook#796")
def teacher_reads_c2(t, s, c, c2, z, y, epochs):
    return flops(t, s, c2, c2, z, y, epochs)


@wrong("1.2", "context counted once", 0, "a sum that closes too early")
def context_once(t, s, c, c2, z, y, epochs):
    ask, read = c + (z + y).sum(), c2 + (z + y).sum()
    return flops(t, s, c, c2, z, y, epochs, ask=ask, read=read)


@wrong("1.2", "answers left out", 0)
def prompts_only(t, s, c, c2, z, y, epochs):
    return flops(t, s, c, c2, z, 0 * y, epochs)


@wrong("1.2", "mean over the examples", 0)
def mean(t, s, c, c2, z, y, epochs):
    return flops(t, s, c, c2, z, y, epochs) / len(z)


@wrong("1.2", "changes its input", 0, "+= on a tensor")
def adds_in_place(t, s, c, c2, z, y, epochs):
    z += y
    return flops(t, s, c, c2, z, 0 * y, epochs)


@wrong("1.2", "wrong shape", 0, "the sum over examples forgotten")
def no_sum(t, s, c, c2, z, y, epochs):
    return 2 * t * (c + z + y) + 6 * s * epochs * (c2 + z + y)


@wrong("1.2", "half precision", 0, "bfloat16 holds three digits")
def in_bfloat16(*args):
    return torch.tensor(flops(*args), dtype=torch.bfloat16)


@honest("1.2")
def loop(t, s, c, c2, z, y, epochs):
    total = 0
    for a, b in zip(z.tolist(), y.tolist(), strict=True):
        total += 2 * t * (c + a + b)
    for _ in range(epochs):
        for a, b in zip(z.tolist(), y.tolist(), strict=True):
            total += 6 * s * (c2 + a + b)
    return total


@honest("1.2")
def float32_tensor(*args):
    return torch.tensor(flops(*args), dtype=torch.float32)


@honest("1.2")
def without_a_name(*args):
    return partial(flops, forward=2)(*args)


# --- 1.3 critical_batch ---


@wrong("1.3", "multiply-adds counted", 0, "facebookresearch/fvcore#69")
def one_flop(f, w, b):
    return b * f / w


@wrong("1.3", "upside down", 0)
def inverse(f, w, b):
    return 2 * w / (b * f)


@wrong("1.3", "bytes forgotten", 0)
def no_bytes(f, w, b):
    return f / (2 * w)


@wrong("1.3", "bytes on the wrong side", 0)
def bytes_below(f, w, b):
    return f / (2 * w * b)


@wrong("1.3", "training counted", 0)
def training(f, w, b):
    return b * f / (6 * w)


@wrong("1.3", "bits for bytes", 0)
def in_bits(f, w, b):
    return 8 * b * f / (2 * w)


@wrong("1.3", "raised", 2, "float() takes one number", "raised")
def one_device(f, w, b):
    return float(b) * float(f) / (2 * float(w))


@wrong("1.3", None, 0, "a batch has whole sequences, but the formula was asked for")
def rounded(f, w, b):
    return b * f // (2 * w)


@honest("1.3")
def other_order(f, w, b):
    return f * (b / w) * 0.5


@honest("1.3")
def from_the_times(f, w, b):
    read, compute = b / w, 2 / f
    return read / compute


@honest("1.3")
def exact(f, w, b):
    if isinstance(f, float):
        return Fraction(b) * Fraction(f) / (2 * Fraction(w))
    return (b.numpy() * f.numpy() / (2 * w.numpy())).tolist()


# --- 1.4 gigabytes ---

GUESS = {"weights": 16, "cache": 69, "all_targets": 256, "kept_targets": 0.05}
HONEST += [
    ("1.4", GUESS),
    ("1.4", {"weights": 12, "cache": 90, "all_targets": 200, "kept_targets": 0.04}),
    ("1.4", {key: torch.tensor(float(value)) for key, value in GUESS.items()}),
]
for key, value, bug in [
    ("weights", 8, "one byte a number"),
    ("weights", 32, "float32"),
    ("weights", 128, "bits for bytes"),
    ("cache", 1.07, "one user only"),
    ("cache", 275, "query heads counted"),
    ("cache", 34, "keys or values only"),
    ("cache", 2.1, "one layer only"),
    ("all_targets", 513, "float32"),
    ("all_targets", 0.002, "one number a token"),
    ("kept_targets", 0.016, "indices forgotten"),
    ("kept_targets", 256, "whole vocabulary"),
    ("weights", 1000, None),
]:
    WRONG.append(("1.4", GUESS | {key: value}, "wrong", bug, 3.5, ""))
for value, bug in [
    (..., "incomplete"),
    ("16 GB", "wrong type"),
    (True, "wrong type"),
    (-16, "not positive"),
    (float("nan"), "not finite"),
]:
    WRONG.append(("1.4", GUESS | {"weights": value}, "wrong", bug, 3, ""))

# --- 1.5 where_the_gain_lies ---

KEY = {"a": "A", "b": "C", "c": "B", "d": "C"}
HONEST += [("1.5", KEY), ("1.5", {k: f" {v.lower()}" for k, v in KEY.items()})]
for item, right in KEY.items():
    for letter in sorted(set("ABC") - {right}):
        given = KEY | {item: letter}
        WRONG.append(("1.5", given, "wrong", f"{item} {letter}", 3, ""))
for value, bug in [
    ("E", "no such option"),
    (2, "no such option"),
    (None, "incomplete"),
]:
    WRONG.append(("1.5", KEY | {"a": value}, "wrong", bug, 3, ""))
