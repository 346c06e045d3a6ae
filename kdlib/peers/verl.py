"""verl: the top-k loss as it is trained on, and the estimators of reverse KL."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import torch

from kdlib.loss_under_test import LossUnderTest
from kdlib.peers.shared import shift

CREDIT = (
    "k1 back-propagated is refused, with the right reason",
    "k2 has the right gradient; agg_loss takes the global token count",
    "the mass on the support and the overlap of the top k are logged",
)


def losses() -> list[LossUnderTest]:
    fsdp = import_module("verl.trainer.distillation.fsdp.losses")
    distillation = import_module("verl.trainer.distillation.losses")
    core = import_module("verl.trainer.ppo.core_algos")
    tensordict = import_module("tensordict").TensorDict

    def per_token(student, teacher, k):
        """[N, V] logits of one sequence with a prompt of one token, as the engine packs
        it; its last position predicts nothing."""
        # the defaults of config/distillation/distillation.yaml: no clamps
        settings = SimpleNamespace(
            log_prob_min_clamp=None, use_chunked_topk=False, topk=k
        )
        config = SimpleNamespace(distillation_loss=settings)
        student, teacher = (torch.cat([x, x[-1:]]) for x in (student, teacher))
        log_probs, ids = teacher.log_softmax(-1).topk(k)
        packed = [
            torch.nested.as_nested_tensor([x], layout=torch.jagged)
            for x in (log_probs, ids)
        ]
        outputs = fsdp.compute_forward_kl_topk(student[None], *packed, config, "thd")
        outputs = {name: x[0] for name, x in outputs.items()}
        ones = torch.ones(1, len(student), dtype=torch.long)
        data = {
            "prompts": ones[:, :1],
            "responses": ones[:, 1:],
            "attention_mask": ones,
            "response_mask": ones[:, 1:],
        }
        data = tensordict(data, batch_size=[1])
        return distillation.compute_forward_kl_topk(None, config, outputs, data)[0][0]

    def whole_vocabulary(student, teacher, labels, *, num_items=None):
        s, t, y = shift(student, teacher, labels)
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
