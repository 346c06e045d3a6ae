"""NVIDIA ModelOpt: the loss of its README, and its trainer for transformers models."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import torch

from kdlib.loss_under_test import LossUnderTest
from kdlib.peers.shared import shift

CREDIT = (
    "T^2 as in the paper, and the reason in a comment",
    "KDTrainer shifts, masks and computes in float32, and takes the sum over V",
    "KDTrainer's teacher runs in eval mode and without gradient",
)


def losses() -> list[LossUnderTest]:
    distill = import_module("modelopt.torch.distill.losses")
    trainer = import_module("modelopt.torch.distill.plugins.huggingface")

    def readme(student, teacher, labels, *, temperature=1.0):
        s, t, y = shift(student, teacher, labels)  # masks are the user's business
        criterion = distill.LogitsDistillationLoss(temperature=temperature)
        return criterion(s[y != -100], t[y != -100])

    def kd_trainer(student, teacher, labels, *, temperature=1.0):
        itself = SimpleNamespace(
            _kd_criterion=distill.LogitsDistillationLoss(temperature, reduction="none"),
            _last_teacher_outputs=SimpleNamespace(logits=teacher),
        )
        outputs = SimpleNamespace(logits=student)
        return trainer.KDTrainer._standard_kd_loss(itself, outputs, labels)

    shared = {"scale_by_t2": True, "options": frozenset(("temperature",))}
    return [
        LossUnderTest(
            "LogitsDistillationLoss() (default)",
            readme,
            reasons={"12": "in which dtype it is called is the user's business"},
            **shared,
        ),
        LossUnderTest(
            "KDTrainer",
            kd_trainer,
            dtype=torch.float32,
            # num_items_in_batch reaches it and is not used; then Trainer.training_step
            # averages the micro-batches, at best
            accumulate=lambda parts: sum(kd_trainer(*p) for p in parts) / len(parts),
            **shared,
        ),
    ]
