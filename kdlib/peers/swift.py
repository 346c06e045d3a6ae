"""ms-swift: gkd_loss, the one file behind its GKD and self-distillation."""

from __future__ import annotations

from importlib import import_module

import torch

from kdlib.loss_under_test import LossUnderTest
from kdlib.peers.shared import BETAS, FLOAT32, generalized_jsd

CREDIT = (
    "one file for all of its loss, which returns the total and the count apart",
    "masks, shift, temperature and the ends of beta are right",
)
ENDS = 'rlhf_trainers/gkd_loss.py:110 "0=forward KL, 1=reverse KL, 0<beta<1=JSD"'


def losses() -> list[LossUnderTest]:
    gkd = import_module("swift.rlhf_trainers.gkd_loss")

    def loss(default):
        def fn(student, teacher, labels, *, beta=default, temperature=1.0):
            # as in GKDTrainer._compute_jsd_loss
            y = torch.roll(labels, shifts=-1, dims=1)
            targets = gkd.TeacherOutput(full_logits=teacher, labels=y)
            total, count = gkd.gkd_loss(student, targets, y, beta, temperature)
            return total / count

        return fn

    def top_k(student, teacher, k):
        y = torch.zeros(1, 1, dtype=torch.long)

        def one(s, t):  # a sum over one token
            targets = gkd.TeacherOutput(full_logits=t[None, None], labels=y).to_topk(k)
            return gkd.gkd_loss(s[None, None], targets, y, 0.0, 1.0)[0]

        return torch.stack([one(*row) for row in zip(student, teacher, strict=True)])

    def pair(teacher_ids, teacher_labels, student_ids, student_labels):
        logits = [torch.zeros(*x.shape, 10) for x in (student_ids, teacher_ids)]
        targets = gkd.TeacherOutput(full_logits=logits[1], labels=teacher_labels)
        gkd.extract_active(logits[0], targets, student_labels)

    reasons = {
        "5": "it returns total and count: the trainer has what it needs to be right",
        "12": FLOAT32,
    }
    checks = {0.0: {"top_k": top_k, "pair": pair}}
    return [
        LossUnderTest(
            f"gkd_loss, beta {beta:g}",
            loss(beta),
            padded=True,
            options=frozenset(("temperature",)),
            reasons=reasons,
            **generalized_jsd(beta, ENDS),
            **checks.get(beta, {}),
        )
        for beta in BETAS
    ]
