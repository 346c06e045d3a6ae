"""TRL: GKD's divergence, the stable DistillationTrainer, GOLD's ULD, SDFT's top-k."""

from __future__ import annotations

import os
from importlib import import_module

import torch

from kdlib.loss_under_test import LossUnderTest
from kdlib.peers.shared import (
    BETAS,
    FLOAT32,
    JSD,
    defaults,
    eye,
    generalized_jsd,
    shift,
)

CREDIT = (
    "num_items_in_batch: sums of micro-batches equal the batch",
    "the chunked divergence honours temperature, soft cap and scale, in float32",
    "vocabularies of different size are refused rather than padded",
    "what law 8 and law 3 ask for is one setting away: distillation_add_tail, bayesian",
)
ENDS = 'experimental/gkd/gkd_config.py:37 "When beta is 0.0, the loss is the KL"'
TOP_K = (
    'experimental/sdft/loss_utils.py:95 "renormalize the top-k to sum to 1: '
    'divergence over the top-k conditional only"'
)
OBSERVED = (
    'experimental/gold/gold_config.py:83 "answer logits are sliced at the answer '
    'positions", :110 "Whether to skip EOS"'
)


def losses() -> list[LossUnderTest]:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    return [*_sdft(), *_gold(), *_gkd(), *_distillation_trainer()]


def _sdft():
    sdft = import_module("trl.experimental.sdft.loss_utils")
    config_class = import_module("trl.experimental.sdft.sdft_config").SDFTConfig

    def loss(name, **changes):
        config = defaults(config_class, **changes)
        declared = {"divergence": JSD, "params": {"beta": config.distillation_alpha}}
        if not config.distillation_add_tail:
            declared["by_design"] = {"8": ("a mode that the student lacks", TOP_K)}
        return LossUnderTest(
            name,
            top_k=lambda student, teacher, k: sdft.compute_topk_self_distillation_loss(
                student,
                teacher,
                distillation_topk=k,
                distillation_alpha=config.distillation_alpha,
                distillation_add_tail=config.distillation_add_tail,
            ),
            dtype=torch.float32,
            **declared,
        )

    return [
        loss("SDFT top-k logits (default)"),
        loss("SDFT top-k logits, add_tail", distillation_add_tail=True),
    ]


def _gold():
    gold = import_module("trl.experimental.gold.gold_trainer")
    config_class = import_module("trl.experimental.gold.gold_config").GOLDConfig

    def uld(**changes):
        config = defaults(config_class, **changes)

        def fn(student, teacher, labels):
            # one tokenizer on both sides: the n-th token covers the n-th byte
            at = torch.arange(labels.shape[1])
            offsets = torch.stack([at, at + 1], dim=-1).expand(len(labels), -1, -1)
            ids = labels.clamp_min(0)
            return gold.ULDLoss(config)(
                student, teacher, labels, labels, ids, ids, offsets, offsets
            )

        return fn

    declared = {
        "divergence": lambda p, q: (p.sort().values - q.sort().values).abs().sum(-1),
        "reduction": "sequence_mean",
        "reasons": {"12": FLOAT32},
    }
    observed = ("without the end token", OBSERVED)
    return [
        LossUnderTest(
            "GOLD ULDLoss, observed (default)",
            uld(),
            by_design={"3": observed, "i1": observed},
            **declared,
        ),
        LossUnderTest(
            "GOLD ULDLoss, bayesian, ends kept",
            uld(
                uld_token_merge_strategy="bayesian",
                uld_skip_student_eos=False,
                uld_skip_teacher_eos=False,
            ),
            **declared,
        ),
    ]


def _gkd():
    gkd = import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer

    def loss(default):
        def fn(student, teacher, labels, *, num_items=None, beta=default, **options):
            # as in GKDTrainer.compute_loss
            s, t, y = shift(student, teacher, labels)
            return gkd.generalized_jsd_loss(
                s, t, y, beta=beta, num_items_in_batch=num_items, **options
            )

        options = frozenset(("temperature", "num_items"))
        return LossUnderTest(
            f"GKD generalized_jsd_loss, beta {default:g}",
            fn,
            options=options,
            reasons={"12": FLOAT32},
            **generalized_jsd(default, ENDS),
        )

    return [loss(beta) for beta in BETAS]


def _distillation_trainer():
    trainer = import_module("trl.trainer.distillation_trainer")

    def loss(default):
        def identity_heads(
            student, teacher, labels, *, num_items=None, beta=default, **options
        ):
            s, t, y = shift(student, teacher, labels)
            return trainer._chunked_divergence_loss(
                s,
                t,
                eye(s),
                eye(t),
                y != -100,
                beta,
                num_items_in_batch=num_items,
                **options,
            )[0]

        def fused(h, w, t_h, t_w, *, temperature=1.0, softcap=None, logit_scale=1.0):
            return trainer._chunked_divergence_loss(
                h[None],
                t_h[None],
                w,
                t_w,
                torch.ones(1, len(h)),
                default,
                student_logit_scale=logit_scale,
                teacher_logit_scale=logit_scale,
                student_final_logit_softcapping=softcap,
                teacher_final_logit_softcapping=softcap,
                temperature=temperature,
            )[0]

        return LossUnderTest(
            f"DistillationTrainer, beta {default:g}",
            identity_heads,
            dtype=torch.float32,
            options=frozenset(("temperature", "num_items")),
            fused=fused,
            fused_options=frozenset(("temperature", "softcap", "logit_scale")),
            **generalized_jsd(default, ENDS),
        )

    return [loss(beta) for beta in BETAS]
