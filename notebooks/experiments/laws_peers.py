"""The leaderboard of the laws, with the other libraries run live.

    pip install --no-deps trl==1.16.0 liger-kernel==0.8.5 ms-swift==4.6.0 verl==0.9.1 \\
        nvidia-modelopt==0.47.0     (and what their imports ask for)
    python notebooks/experiments/laws_peers.py      (a minute)

Writes notebooks/results/laws_peers.json. CHECKED says how each failed verdict was
verified by hand, apart from the laws: the line of the library's source and a number of
a small case. A failed verdict without such a line stops the script.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from kdlib import leaderboard
from kdlib.laws import FAILED, LAWS
from kdlib.ledger import provenance, write_json
from kdlib.peers import PEERS

RESULT = Path(__file__).parents[1] / "results" / "laws_peers.json"

LIGER_6 = (
    "chunked_loss/fused_linear_distillation.py:131-136 pads the student with logit 0. "
    "One model on both sides, 4 untrained teacher columns of logit 0: forward KL is "
    "mean log(1 + 4 / sum e^z) by hand, 0.2546 for logits near 0; measured 0.2546, and "
    "0.0000 with 40 added to the student's own logits, which changes no probability."
)
LIGER_12 = (
    "chunked_loss/jsd_loss.py:30 takes log_softmax in the dtype of the logits. 512 "
    "rows of 64 bfloat16 logits, exact forward KL 1.974e-4: measured 1.535e-4, "
    "gradient off by 26%; JSD -1.3e-3 (exact 4.9e-5), reverse KL 3.1e-4 (exact "
    "2.0e-4). The same numbers passed as float32: 1.974e-4, gradient off by 6e-6. "
    "Identity heads, so that the projection is exact."
)
SWIFT_6 = (
    "rlhf_trainers/gkd_loss.py:163 copies the teacher's logits into the student's "
    "missing columns. One model on both sides, 4 untrained teacher columns of logit "
    "0, the teacher's own logits near 40: with the student's own logits near 40 the "
    "loss is 0.0000, with 40 subtracted, which changes no probability, 0.2546; by "
    "hand mean log(1 + 4 / sum e^z) = 0.2546."
)
CHECKED = {
    "TRL, SDFT top-k logits (default), law 8": (
        "experimental/sdft/loss_utils.py:82 takes the student's top k, :96 "
        "renormalises. k = 2, student logits (5, 4, 0, 0, 0), teacher's (5, 4, 0, 0, "
        "20): loss 3e-17, true JSD 0.678, true forward KL 5.33. distillation_add_tail "
        "defaults to False."
    ),
    "TRL, GOLD ULDLoss, observed (default), law 3": (
        "experimental/gold/gold_trainer.py:466 slices the logits at the answer's "
        "positions, :403 drops its last token. Response at 3, 4, 5, so predicted from "
        "2, 3, 4: gradient at 3, 4. The setting is described in gold_config.py, and "
        '"bayesian" with both ends kept gives 2, 3, 4.'
    ),
    "TRL, GOLD ULDLoss, observed (default), law i1": "the same shift",
    **{
        f"Liger-Kernel, LigerFusedLinearJSDLoss, beta {beta}, law {law}": text
        for beta in ("0", "1", "0.5")
        for law, text in (("6", LIGER_6), ("12", LIGER_12))
    },
    **{f"ms-swift, gkd_loss, beta {b}, law 6": SWIFT_6 for b in ("0", "1", "0.5")},
    "ms-swift, gkd_loss, beta 0, law 8": (
        "rlhf_trainers/gkd_loss.py:258-260 gathers the student's logits on the "
        "teacher's top k and takes their softmax there. k = 2, teacher (5, 4, 0, 0, "
        "0), student (1, 0, 5, 5, 5): 99.2% of the student's mass is elsewhere, loss "
        "0.0, true forward KL 4.65."
    ),
    "ms-swift, gkd_loss, beta 0, law 14": (
        "rlhf_trainers/gkd_loss.py:202 compares the two sums of the masks. Student's "
        "tokens 1, 2, 3, 4 and teacher's 9, 1, 2, 3 are accepted and paired in order."
    ),
    "verl, forward_kl_topk, law 8": (
        "trainer/distillation/fsdp/losses.py:71 sums p (log p - log q) over the top k "
        "alone. 200 rows of 50 logits, student = 1.4 times the teacher's, k = 8: "
        "negative on 93% of the rows, mean -0.070, true KL 0.124. Then losses.py:365 "
        "clamps at 0, where the gradient is 0. Run with the defaults of "
        "distillation.yaml (no clamps)."
    ),
    "verl, kl_penalty k3, back-propagated, law 9": (
        "trainer/ppo/core_algos.py:2244, reached with loss_mode k3 (the default in "
        "distillation.yaml) and use_policy_gradient false. 4 tokens, sum over all: "
        "expected gradient (.0990, -.1236, -.0733, .0979), which is that of forward "
        "KL; that of reverse KL is (.0933, -.1181, -.0775, .1023). A comment at :2206 "
        "says so, and k3+ would be right, but trainer/distillation/losses.py:371 does "
        "not register it. Pulling to the teacher by forward KL is sound; it is just "
        "not what the name reverse_kl_estimator says."
    ),
    "NVIDIA ModelOpt, LogitsDistillationLoss() (default), law 7": (
        "torch/distill/losses.py:34 and :60, F.kl_div with reduction mean. 5 rows, "
        "V = 32000: 3.14e-5, true mean KL 1.005, ratio 32000.0."
    ),
    "NVIDIA ModelOpt, LogitsDistillationLoss() (default), law i1": (
        "the same factor 1 / V, seen in the gradient"
    ),
    "NVIDIA ModelOpt, KDTrainer, law 5": (
        "torch/distill/plugins/huggingface.py:243 divides by the micro-batch's own "
        "count; num_items_in_batch arrives in **kwargs and is not used. Rows of 1 and "
        "4 tokens, whole and split: each token's weight grows 5 times in the short "
        "one and 1.25 times in the long one. Judged by the milder of the two ways in "
        "which transformers' Trainer.training_step can add them up, the average."
    ),
}
CREDIT = {
    "TRL": [
        "GKD's generalized_jsd_loss and the stable DistillationTrainer break no law",
        "num_items_in_batch: sums of micro-batches equal the batch",
        "the chunked divergence honours temperature, soft cap and scale, in float32",
        "SDFT with distillation_add_tail passes law 8; GOLD with bayesian and ends "
        "kept passes all that it is asked",
        "vocabularies of different size are refused rather than padded",
    ],
    "Liger-Kernel": [
        "ignore_index is honoured, hard and soft weights do what they say",
        "in float32 it is exact; the fused path equals the naive one",
    ],
    "ms-swift": [
        "one file for all of its loss, which returns the total and the count apart",
        "masks, shift, temperature and the ends of beta are right",
    ],
    "verl": [
        "k1 back-propagated is refused, with the right reason",
        "k2 has the right gradient; agg_loss takes the global token count",
        "the mass on the support and the overlap of the top k are logged",
    ],
    "NVIDIA ModelOpt": [
        "T^2 as in the paper, and the reason in a comment",
        "KDTrainer shifts, masks and computes in float32, and takes the sum over V",
    ],
}
NOTES = [
    "Law 10: D jumps at beta 0 and 1 in TRL, Liger, swift and kdlib alike. That is "
    "GKD's convention, documented by all four as to its ends, so it is not counted.",
    "Law 12 is not asked of TRL's generalized_jsd_loss and of swift: in a bfloat16 run "
    "accelerate turns the models' logits to float32 before. Given bfloat16 logits they "
    "would take log_softmax in bfloat16.",
    "Law 5 is not asked of swift: GKDTrainer (gkd_trainer.py:114) divides by the "
    "count of its own micro-batch, which was read and not run; the function gives "
    "what is needed.",
    "Not run: Triton kernels (they need CUDA), ModelOpt's Megatron losses, what GKD "
    "divides by on-policy. DistillKit is not on PyPI.",
    "swift asks for transformers below 5.20 and trl below 1.0; its gkd_loss.py needs "
    "neither.",
    "Of two verdicts with one cause (7 and i1, 3 and i1) the bug is one.",
]


def main() -> None:
    rows = leaderboard.leaderboard()
    for row in rows:
        for verdict in row.verdicts:
            if verdict.status == FAILED:
                CHECKED[f"{row.library}, {row.loss}, law {verdict.law}"]
    versions = {name: importlib.metadata.version(name) for name in PEERS.values()}
    made = provenance("python notebooks/experiments/laws_peers.py")
    versions |= {name: made[name] for name in ("python", "torch", "transformers")}
    result = made | {
        "versions": versions,
        "checked": CHECKED,
        "credit": CREDIT,
        "notes": NOTES,
        "laws": {law: title for law, (title, _) in LAWS.items()},
        "table": leaderboard.render(rows).splitlines(),
        "rows": leaderboard.as_json(rows),
    }
    write_json(RESULT, result)
    print(leaderboard.render(rows))


if __name__ == "__main__":
    main()
