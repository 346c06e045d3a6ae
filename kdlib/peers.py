"""Other libraries' losses, made ready for the laws.

Knows: how each library's trainer calls its own loss function. An adapter runs the live
code of the installed library and copies none of it; what the trainer does around the
function (the causal shift, the mask) is done here in the same way. The imports are made
when an adapter is called, and may fail.

An adapter declares what the library documents, and may not make the library fail. What
the function alone cannot show, such as what a trainer does with many micro-batches, is
not applicable, with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import MISSING, fields
from importlib import import_module
from types import SimpleNamespace

import torch

from kdlib.loss_under_test import LossUnderTest

JSD = "generalized_jsd"
ENDS = "the ends of beta are KLs by the convention of GKD, and said to be"
FLOAT32 = (
    "accelerate turns the logits of a bfloat16 run to float32 before this function"
)


BETAS = {0.0: "forward_kl", 1.0: "reverse_kl", 0.5: JSD}


def _shift(student, teacher, labels):
    return student[:, :-1], teacher[:, :-1], labels[:, 1:]


def _generalized_jsd(beta, **declared) -> dict:
    """What a loss declares that follows GKD's convention for beta."""
    return {
        "divergence": BETAS[beta],
        "params": {"beta": 0.5} if BETAS[beta] == JSD else {},
        "knob": ("beta", "forward_kl", "reverse_kl"),
        "documented": {"10": ENDS},
        **declared,
    }


def _defaults(config_class, **changes) -> SimpleNamespace:
    """The defaults of a configuration that is too heavy to be made here."""
    known = {
        f.name: f.default for f in fields(config_class) if f.default is not MISSING
    }
    return SimpleNamespace(**known | changes)


def _eye(logits):
    return torch.eye(logits.shape[-1], dtype=logits.dtype)


def _trl() -> list[LossUnderTest]:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer
    chunked = import_module("trl.trainer.distillation_trainer")
    gold = import_module("trl.experimental.gold.gold_trainer")
    gold_config = import_module("trl.experimental.gold.gold_config")
    sdft = import_module("trl.experimental.sdft.loss_utils")
    sdft_config = import_module("trl.experimental.sdft.sdft_config")

    def generalized_jsd(default):
        def fn(student, teacher, labels, *, num_items=None, beta=default, **options):
            # as in GKDTrainer.compute_loss
            s, t, y = _shift(student, teacher, labels)
            return gkd.generalized_jsd_loss(
                s, t, y, beta=beta, num_items_in_batch=num_items, **options
            )

        return fn

    def fused(beta):
        def fn(h, w, t_h, t_w, *, temperature=1.0, softcap=None, logit_scale=1.0):
            return chunked._chunked_divergence_loss(
                h[None],
                t_h[None],
                w,
                t_w,
                torch.ones(1, len(h)),
                beta,
                student_logit_scale=logit_scale,
                teacher_logit_scale=logit_scale,
                student_final_logit_softcapping=softcap,
                teacher_final_logit_softcapping=softcap,
                temperature=temperature,
            )[0]

        return fn

    def identity_heads(default):
        def fn(student, teacher, labels, *, num_items=None, beta=default, **options):
            s, t, y = _shift(student, teacher, labels)
            return chunked._chunked_divergence_loss(
                s,
                t,
                _eye(s),
                _eye(t),
                y != -100,
                beta,
                num_items_in_batch=num_items,
                **options,
            )[0]

        return fn

    def uld(**changes):
        config = _defaults(gold_config.GOLDConfig, **changes)

        def fn(student, teacher, labels):
            # one tokenizer on both sides: the n-th token covers the n-th byte
            at = torch.arange(labels.shape[1])
            offsets = torch.stack([at, at + 1], dim=-1).expand(len(labels), -1, -1)
            ids = labels.clamp_min(0)
            return gold.ULDLoss(config)(
                student, teacher, labels, labels, ids, ids, offsets, offsets
            )

        return fn

    def top_k(**changes):
        config = _defaults(sdft_config.SDFTConfig, **changes)
        return lambda student, teacher, k: sdft.compute_topk_self_distillation_loss(
            student,
            teacher,
            distillation_topk=k,
            distillation_alpha=config.distillation_alpha,
            distillation_add_tail=config.distillation_add_tail,
        )

    both = frozenset(("temperature", "num_items"))
    jsd = {"divergence": JSD, "params": {"beta": 0.5}}
    sorted_l1 = {
        "divergence": lambda p, q: (p.sort().values - q.sort().values).abs().sum(-1),
        "reduction": "sequence_mean",
        "reasons": {"12": FLOAT32},
    }
    losses = [
        LossUnderTest("SDFT top-k logits (default)", top_k=top_k(), **jsd),
        LossUnderTest(
            "SDFT top-k logits, add_tail",
            top_k=top_k(distillation_add_tail=True),
            **jsd,
        ),
        LossUnderTest("GOLD ULDLoss, observed (default)", uld(), **sorted_l1),
        LossUnderTest(
            "GOLD ULDLoss, bayesian, ends kept",
            uld(
                uld_token_merge_strategy="bayesian",
                uld_skip_student_eos=False,
                uld_skip_teacher_eos=False,
            ),
            **sorted_l1,
        ),
    ]
    for beta in BETAS:
        declared = _generalized_jsd(beta, options=both, reasons={"12": FLOAT32})
        losses.append(
            LossUnderTest(
                f"GKD generalized_jsd_loss, beta {beta:g}",
                generalized_jsd(beta),
                **declared,
            )
        )
    for beta in BETAS:
        losses.append(
            LossUnderTest(
                f"DistillationTrainer, beta {beta:g}",
                identity_heads(beta),
                dtype=torch.float32,
                fused=fused(beta),
                fused_options=frozenset(("temperature", "softcap", "logit_scale")),
                **_generalized_jsd(beta, options=both),
            )
        )
    return losses


def _liger() -> list[LossUnderTest]:
    module = import_module("liger_kernel.chunked_loss")

    def chunked(beta, hard_weight=0.0, temperature=1.0):
        return module.LigerFusedLinearJSDLoss(
            weight_hard_loss=hard_weight,
            weight_soft_loss=1 - hard_weight,
            beta=beta,
            temperature=temperature,
            compiled=False,
        )

    def identity_heads(default):
        def fn(student, teacher, labels, *, beta=default, **options):
            s, t, y = (x.flatten(0, 1) for x in _shift(student, teacher, labels))
            return chunked(beta, **options)(s, _eye(s), t, _eye(t), y)

        return fn

    def fused(beta):
        return lambda h, w, t_h, t_w, **options: chunked(beta, **options)(
            h, w, t_h, t_w, torch.zeros(len(h), dtype=torch.long)
        )

    return [
        LossUnderTest(
            f"LigerFusedLinearJSDLoss, beta {beta:g}",
            identity_heads(beta),
            dtype=torch.float32,
            padded=True,
            fused=fused(beta),
            fused_options=frozenset(("temperature",)),
            **_generalized_jsd(beta, options=frozenset(("temperature", "hard_weight"))),
        )
        for beta in BETAS
    ]


def _swift() -> list[LossUnderTest]:
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
            reasons=reasons,
            **_generalized_jsd(beta, options=frozenset(("temperature",))),
            **checks.get(beta, {}),
        )
        for beta in BETAS
    ]


def _verl() -> list[LossUnderTest]:
    fsdp = import_module("verl.trainer.distillation.fsdp.losses")
    core = import_module("verl.trainer.ppo.core_algos")
    # the defaults of config/distillation/distillation.yaml: no clamps
    settings = SimpleNamespace(log_prob_min_clamp=None, use_chunked_topk=False)
    config = SimpleNamespace(distillation_loss=settings)

    def per_token(student, teacher, k):  # [N, V], one packed sequence
        log_probs, ids = teacher.log_softmax(-1).topk(k)
        packed = [
            torch.nested.as_nested_tensor([x], layout=torch.jagged)
            for x in (log_probs, ids)
        ]
        outputs = fsdp.compute_forward_kl_topk(student[None], *packed, config, "thd")
        return outputs["distillation_losses"][0]

    def whole_vocabulary(student, teacher, labels, *, num_items=None):
        s, t, y = _shift(student, teacher, labels)
        losses = per_token(s.flatten(0, 1), t.flatten(0, 1), t.shape[-1])
        return core.agg_loss(
            losses.view(y.shape), y != -100, "token-mean", batch_num_tokens=num_items
        )

    def estimator(name):
        return LossUnderTest(
            f"kl_penalty {name}, back-propagated",
            estimator=lambda s, t: core.kl_penalty(s, t, name),
        )

    return [
        LossUnderTest(
            "forward_kl_topk at k = V, token-mean",
            whole_vocabulary,
            options=frozenset(("num_items",)),
            dtype=torch.float32,
            reasons={"12": "its engine calls it under autocast, in float32"},
        ),
        LossUnderTest("forward_kl_topk", top_k=per_token, dtype=torch.float32),
        estimator("k3"),
        estimator("k2"),
    ]


def _modelopt() -> list[LossUnderTest]:
    losses = import_module("modelopt.torch.distill.losses")
    trainer = import_module("modelopt.torch.distill.plugins.huggingface")

    def readme(student, teacher, labels, *, temperature=1.0):
        s, t, y = _shift(student, teacher, labels)  # masks are the user's business
        criterion = losses.LogitsDistillationLoss(temperature=temperature)
        return criterion(s[y != -100], t[y != -100])

    def kd_trainer(student, teacher, labels, *, temperature=1.0):
        itself = SimpleNamespace(
            _kd_criterion=losses.LogitsDistillationLoss(temperature, reduction="none"),
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


PEERS = {  # library: its name on PyPI
    "TRL": "trl",
    "Liger-Kernel": "liger-kernel",
    "ms-swift": "ms-swift",
    "verl": "verl",
    "NVIDIA ModelOpt": "nvidia-modelopt",
}
ADAPTERS: dict[str, Callable[[], list[LossUnderTest]]] = dict(
    zip(PEERS, (_trl, _liger, _swift, _verl, _modelopt), strict=True)
)
