"""The leaderboard of the laws, with the other libraries run live.

    pip install --no-deps trl==1.16.0 liger-kernel==0.8.5 ms-swift==4.6.0 verl==0.9.1 \\
        nvidia-modelopt==0.47.0     (and what their imports ask for)
    python notebooks/experiments/laws_peers.py      (a minute)

Writes notebooks/results/laws_peers.json: the verdicts, and beside each that is not
"holds" a check by hand from laws_by_hand.py, run at the same time: the line of the
library's source, and its number on a small case beside the right one. A broken verdict
without such a check stops the script.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import laws_by_hand

from kdlib import leaderboard
from kdlib.laws import FAILED, LAWS
from kdlib.ledger import provenance, write_json
from kdlib.peers import CREDIT, PEERS

RESULT = Path(__file__).parents[1] / "results" / "laws_peers.json"

NOTES = [
    "By design: the library's source states what is computed, and the number agrees "
    "with it; the line is quoted. kdlib's own departures are marked in the same way.",
    "Law 10: D jumps at beta 0 and 1 in TRL, Liger, swift and kdlib alike. That is "
    "GKD's convention, and all four say that the ends are KLs.",
    "Law 12 is not asked of TRL's generalized_jsd_loss and of swift: in a bfloat16 run "
    "accelerate turns the models' logits to float32 before. Given bfloat16 logits they "
    "would take log_softmax in bfloat16.",
    "Law 5 is not asked of swift: GKDTrainer (gkd_trainer.py:114) divides by the "
    "count of its own micro-batch, which was read and not run; the function gives "
    "what is needed. Of ModelOpt's KDTrainer it is asked in the milder of the two ways "
    "in which Trainer.training_step adds micro-batches up, the average.",
    "verl, law 8: the top-k sum is said to be possibly negative "
    "(trainer/distillation/losses.py:364); the clamp that follows, and the gradient "
    "that it takes away, are what is counted. Law 9: pulling to the teacher by forward "
    "KL is sound; it is not what the name reverse_kl_estimator says.",
    "Not run: Triton kernels (they need CUDA), ModelOpt's Megatron losses, what GKD "
    "divides by on-policy. DistillKit is not on PyPI.",
    "swift asks for transformers below 5.20 and trl below 1.0; its gkd_loss.py needs "
    "neither.",
    "Of two verdicts with one cause (7 and i1, 3 and i1) the bug is one.",
]


def main() -> None:
    rows = leaderboard.leaderboard()
    checked = {library: laws_by_hand.results(library) for library in PEERS}
    for row in rows:
        known = {law for check in checked.get(row.library, ()) for law in check["laws"]}
        for verdict in row.verdicts:
            if verdict.status == FAILED and verdict.law not in known:
                raise SystemExit(f"{row.library}, law {verdict.law}: not checked")
    versions = {name: importlib.metadata.version(name) for name in PEERS.values()}
    made = provenance("python notebooks/experiments/laws_peers.py")
    versions |= {name: made[name] for name in ("python", "torch", "transformers")}
    result = made | {
        "versions": versions,
        "checked": checked,
        "credit": CREDIT,
        "notes": NOTES,
        "laws": {number: law.title for number, law in LAWS.items()},
        "table": leaderboard.render(rows).splitlines(),
        "rows": leaderboard.as_json(rows),
    }
    write_json(RESULT, result)
    print(leaderboard.render(rows))


if __name__ == "__main__":
    main()
