"""Liger-Kernel: the chunked JSD from hidden states, in plain torch."""

from __future__ import annotations

from importlib import import_module

import torch

from kdlib.loss_under_test import LossUnderTest
from kdlib.peers.shared import BETAS, eye, generalized_jsd, shift

CREDIT = (
    "ignore_index is honoured, hard and soft weights do what they say",
    "in float32 it is exact; the fused path equals the naive one",
    "the hard-label term is taken in float32 whatever comes in",
)
ENDS = "chunked_loss/jsd_loss.py:33 a KL where beta is 0 or 1"


def losses() -> list[LossUnderTest]:
    module = import_module("liger_kernel.chunked_loss")

    def chunked(beta, hard_weight=0.0, temperature=1.0):
        return module.LigerFusedLinearJSDLoss(
            weight_hard_loss=hard_weight,
            weight_soft_loss=1 - hard_weight,
            beta=beta,
            temperature=temperature,
            compiled=False,
        )

    def loss(default):
        def identity_heads(student, teacher, labels, *, beta=default, **options):
            s, t, y = (x.flatten(0, 1) for x in shift(student, teacher, labels))
            return chunked(beta, **options)(s, eye(s), t, eye(t), y)

        def fused(h, w, t_h, t_w, **options):
            labels = torch.zeros(len(h), dtype=torch.long)
            return chunked(default, **options)(h, w, t_h, t_w, labels)

        return LossUnderTest(
            f"LigerFusedLinearJSDLoss, beta {default:g}",
            identity_heads,
            dtype=torch.float32,
            padded=True,
            options=frozenset(("temperature", "hard_weight")),
            fused=fused,
            fused_options=frozenset(("temperature",)),
            **generalized_jsd(default, ENDS),
        )

    return [loss(beta) for beta in BETAS]
