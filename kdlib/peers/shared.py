"""What the adapters have in common: the causal shift, and GKD's convention for beta."""

from __future__ import annotations

from dataclasses import MISSING, fields
from types import SimpleNamespace

import torch

JSD = "generalized_jsd"
BETAS = {0.0: "forward_kl", 1.0: "reverse_kl", 0.5: JSD}
FLOAT32 = (
    "accelerate turns the logits of a bfloat16 run to float32 before this function"
)


def shift(student, teacher, labels):
    return student[:, :-1], teacher[:, :-1], labels[:, 1:]


def generalized_jsd(beta, source, **declared) -> dict:
    """What a loss declares that follows GKD's convention for beta.

    source: the line that says that the ends are KLs
    """
    return {
        "divergence": BETAS[beta],
        "params": {"beta": 0.5} if BETAS[beta] == JSD else {},
        "knob": ("beta", "forward_kl", "reverse_kl"),
        "by_design": {"10": ("no knob of direction", source)},
        **declared,
    }


def defaults(config_class, **changes) -> SimpleNamespace:
    """The defaults of a configuration that is too heavy to be made here."""
    known = {
        f.name: f.default for f in fields(config_class) if f.default is not MISSING
    }
    return SimpleNamespace(**known | changes)


def eye(logits):
    """The head of a model whose hidden states are its logits."""
    return torch.eye(logits.shape[-1], dtype=logits.dtype)
