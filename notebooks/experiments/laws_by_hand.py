"""Each broken verdict of the leaderboard, once more by hand.

    python notebooks/experiments/laws_by_hand.py     (where the libraries are installed)

Apart from the laws, and from all of kdlib: a few lines of torch call the library's own
function on a case small enough to think through, and show its number beside the right
one, which is worked out in float64. laws_peers.py keeps the numbers with the verdicts.
A check is also made of what is right, or by design, where that is not obvious.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from importlib import import_module
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import log_softmax

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
CASES = "case", "library", "right"


class Check(NamedTuple):
    library: str
    laws: tuple[str, ...]
    source: str  # the line that does it
    case: str
    run: Callable[[], list[tuple[str, float | list, float | list]]]


CHECKS: list[Check] = []


def check(library, laws, source):
    def register(run):
        CHECKS.append(Check(library, laws, source, " ".join(run.__doc__.split()), run))
        return run

    return register


def kl(p, q):
    return float((p * (p / q).log()).sum(-1).mean())


def divergence(beta, p, q):
    """GKD's generalised JSD, from probabilities in float64."""
    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def doubles(*rows):
    return [torch.tensor([row], dtype=torch.float64) for row in rows]


def positions(gradient):
    return gradient.abs().sum(-1)[0].nonzero().flatten().tolist()


# --- TRL: by design -------------------------------------------------------------------


@check("TRL", ("8",), "experimental/sdft/loss_utils.py:82, :95; by design")
def trl_top_k():
    """k = 2, student's logits (5, 4, 0, 0, 0), teacher's (5, 4, 0, 0, 20): on the
    student's two best tokens they agree, and the teacher is elsewhere. JSD, as is the
    default, without and with distillation_add_tail."""
    sdft = import_module("trl.experimental.sdft.loss_utils")
    student, teacher = doubles([5, 4, 0, 0, 0], [5, 4, 0, 0, 20])

    def measured(tail):
        return float(
            sdft.compute_topk_self_distillation_loss(
                student,
                teacher,
                distillation_topk=2,
                distillation_alpha=0.5,
                distillation_add_tail=tail,
            )
        )

    right = divergence(0.5, teacher.softmax(-1), student.softmax(-1))
    return [("renormalised", measured(False), right), ("tail", measured(True), right)]


@check("TRL", ("3", "i1"), "experimental/gold/gold_trainer.py:466, :404; by design")
def trl_shift():
    """One row, its response at 3, 4, 5, so predicted from 2, 3, 4. Where is the
    gradient?"""
    gold = import_module("trl.experimental.gold.gold_trainer")
    labels = torch.tensor([[-100, -100, -100, 5, 6, 7, -100, -100]])
    at = torch.arange(8)
    offsets, ids = torch.stack([at, at + 1], -1)[None], labels.clamp_min(0)
    config = import_module("trl.experimental.gold.gold_config").GOLDConfig
    settings = {x.name: x.default for x in fields(config) if x.default is not MISSING}

    def measured(**changes):
        student = torch.randn(1, 8, 9, requires_grad=True)
        loss = gold.ULDLoss(SimpleNamespace(**settings | changes))
        loss(
            student, torch.randn(1, 8, 9), labels, labels, ids, ids, offsets, offsets
        ).backward()
        return positions(student.grad)

    kept = {"uld_skip_student_eos": False, "uld_skip_teacher_eos": False}
    return [
        ("observed (default)", measured(), [2, 3, 4]),
        ("observed, ends kept", measured(**kept), [2, 3, 4]),
        (
            "bayesian, ends kept",
            measured(uld_token_merge_strategy="bayesian", **kept),
            [2, 3, 4],
        ),
    ]


# --- Liger-Kernel ---------------------------------------------------------------------


def liger(student, teacher, beta):
    module = import_module("liger_kernel.chunked_loss")
    loss = module.LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, compiled=False)
    heads = (torch.eye(x.shape[1], dtype=x.dtype) for x in (student, teacher))
    labels = torch.zeros(len(student), dtype=torch.long)
    return loss(student, next(heads), teacher, next(heads), labels)


def one_model_and_four_dead_columns():
    z = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    return z, torch.cat([z + 40, torch.zeros(4, 4)], dim=1)


@check("Liger-Kernel", ("6",), "chunked_loss/fused_linear_distillation.py:131")
def liger_padding():
    """One model on both sides, and 4 untrained columns (logit 0) in the teacher's head,
    each with a probability of e^-40: D = 0. Then 40 is taken from the student's logits,
    which changes no probability. Padded with 0, forward KL is mean log(1 + 4 / sum
    e^z)."""
    z, teacher = one_model_and_four_dead_columns()
    padded = float(torch.log1p(4 / z.double().exp().sum(-1)).mean())
    cases = [
        (f"beta {beta:g}, student's logits {level - 40:+d}",
         float(liger(z + level, teacher, beta)), 0.0)
        for beta in (0.0, 1.0, 0.5) for level in (40, 0)
    ]  # fmt: skip
    return [*cases, ("beta 0, explained by the 0s", cases[1][1], padded)]


@check("Liger-Kernel", ("12",), "chunked_loss/jsd_loss.py:30")
def liger_bfloat16():
    """512 rows of 64 bfloat16 logits, two close models, identity heads, so that the
    projection is exact. The same numbers passed as float32; exact in float64."""
    rng = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(512, 64, generator=rng)
    student = teacher + 0.02 * torch.randn(512, 64, generator=rng)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    p, q = (x.double().softmax(-1) for x in (teacher, student))
    cases = []
    for beta in (0.0, 1.0, 0.5):
        right = divergence(beta, p, q)
        cases += [
            (f"beta {beta:g}, {str(dtype)[6:]}",
             float(liger(student.to(dtype), teacher.to(dtype), beta)), right)
            for dtype in (torch.bfloat16, torch.float32)
        ]  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        leaf = student.to(dtype, copy=True).requires_grad_()
        liger(leaf, teacher.to(dtype), 0.0).backward()
        exact = (q - p) / 512
        error = float((leaf.grad.double() - exact).norm() / exact.norm())
        cases.append((f"beta 0, error of the gradient, {str(dtype)[6:]}", error, 0.0))
    return cases


# --- ms-swift -------------------------------------------------------------------------


@check("ms-swift", ("6",), "rlhf_trainers/gkd_loss.py:163")
def swift_padding():
    """As for Liger-Kernel. Here the missing columns get the teacher's logits, so all
    is well as long as both heads have the same level, and not beyond."""
    gkd = import_module("swift.rlhf_trainers.gkd_loss")
    z, teacher = one_model_and_four_dead_columns()
    labels = torch.zeros(1, 4, dtype=torch.long)

    def measured(level, beta):
        targets = gkd.TeacherOutput(full_logits=teacher[None], labels=labels)
        total, count = gkd.gkd_loss((z + level)[None], targets, labels, beta, 1.0)
        return float(total / count)

    padded = float(torch.log1p(4 / z.double().exp().sum(-1)).mean())
    cases = [
        (f"beta {beta:g}, student's logits {level - 40:+d}", measured(level, beta), 0.0)
        for beta in (0.0, 1.0, 0.5)
        for level in (40, 0)
    ]
    return [*cases, ("beta 0, explained by the 0s", cases[1][1], padded)]


@check("ms-swift", ("8",), "rlhf_trainers/gkd_loss.py:258")
def swift_top_k():
    """k = 2, teacher's logits (5, 4, 0, 0, 0), student's (1, 0, 5, 5, 5): 99 % of the
    student's mass is elsewhere, and the ratio on the two tokens is right. Forward
    KL."""
    gkd = import_module("swift.rlhf_trainers.gkd_loss")
    teacher, student = doubles([5, 4, 0, 0, 0], [1, 0, 5, 5, 5])
    labels = torch.zeros(1, 1, dtype=torch.long)
    targets = gkd.TeacherOutput(full_logits=teacher[None], labels=labels).to_topk(2)
    measured = float(gkd.gkd_loss(student[None], targets, labels, 0.0, 1.0)[0])
    right = kl(teacher.softmax(-1), student.softmax(-1))
    return [("forward KL", measured, right)]


@check("ms-swift", ("14",), "rlhf_trainers/gkd_loss.py:202")
def swift_pairs():
    """Two rows; the student's responses are (1, 2, 3) and (4), the teacher's view holds
    (9) and (1, 2, 3). The teacher's logits carry the token's own number, so that what
    is paired with the student's tokens can be read off."""
    gkd = import_module("swift.rlhf_trainers.gkd_loss")
    ours = torch.tensor([[-100, 1, 2, 3], [-100, -100, -100, 4]])
    theirs = torch.tensor([[-100, -100, -100, 9], [-100, 1, 2, 3]])
    targets = gkd.TeacherOutput(full_logits=theirs[..., None].float(), labels=theirs)
    paired = gkd.extract_active(ours[..., None].float(), targets, ours)[1].full_logits
    return [("paired with 1, 2, 3, 4", paired.flatten().int().tolist(), [1, 2, 3, 4])]


# --- verl -----------------------------------------------------------------------------


@check("verl", ("8",), "trainer/distillation/fsdp/losses.py:71, losses.py:365")
def verl_top_k():
    """200 rows of 50 logits, student's = 1.4 times the teacher's, k = 8. Before the
    clamp at 0, a sum of p (log p - log q) over the top k alone; after it, the share of
    rows that still have a gradient. Defaults of distillation.yaml."""
    fsdp = import_module("verl.trainer.distillation.fsdp.losses")
    teacher = 2 * torch.randn(200, 50, generator=torch.Generator().manual_seed(1))
    student = (1.4 * teacher).requires_grad_()
    kept = log_softmax(teacher, -1).topk(8)
    packed = [torch.nested.as_nested_tensor([x], layout=torch.jagged) for x in kept]
    settings = SimpleNamespace(log_prob_min_clamp=None, use_chunked_topk=False)
    config = SimpleNamespace(distillation_loss=settings)
    outputs = fsdp.compute_forward_kl_topk(student[None], *packed, config, "thd")
    loss = outputs["distillation_losses"][0]
    loss.clamp_min(0.0).sum().backward()  # what losses.py:365 does
    alive = float((student.grad.abs().sum(-1) > 0).float().mean())
    p, q = (x.detach().double().softmax(-1) for x in (teacher, student))
    by_hand = (p * (p / q).log()).gather(-1, kept.indices).sum(-1)
    mean = float(loss.detach().mean())
    return [
        ("mean over the rows", mean, kl(p, q)),
        ("the same sum by hand", mean, float(by_hand.mean())),
        ("share of rows with a gradient", alive, 1.0),
    ]


@check("verl", ("9",), "trainer/ppo/core_algos.py:2244, config/distillation.py:52")
def verl_k3():
    """One token out of four, drawn by the student; the gradient of kl_penalty, expected
    by summing over the four. Beside it the gradient of reverse KL, and for k3 that of
    forward KL as well. The configuration recommends k3 for back-propagation; a comment
    at core_algos.py:2207 says that its gradient is not that of the KL."""
    core = import_module("verl.trainer.ppo.core_algos")
    z = torch.tensor([0.3, 0.0, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    log_pt = log_softmax(torch.tensor([0.0, 0.5, 0.2, -0.3], dtype=torch.float64), -1)

    def grad(x):
        return torch.autograd.grad(x, z)[0]

    def expected(name):
        total = 0
        for y in range(4):
            log_ps = log_softmax(z, -1)
            slope = grad(core.kl_penalty(log_ps[y], log_pt[y], name))
            total = total + log_ps[y].detach().exp() * slope
        return [round(x, 4) for x in total.tolist()]

    log_ps = log_softmax(z, -1)
    p, q = log_pt.exp(), log_ps.detach().exp()
    forward = [round(x, 4) for x in (q - p).tolist()]
    ratio = (q / p).log()
    reverse = [round(x, 4) for x in (q * (ratio - (q * ratio).sum())).tolist()]
    return [
        ("k3", expected("k3"), reverse),
        ("k3, beside forward KL", expected("k3"), forward),
        ("k2", expected("k2"), reverse),
    ]


# --- NVIDIA ModelOpt ------------------------------------------------------------------


@check("NVIDIA ModelOpt", ("7", "i1"), "torch/distill/losses.py:34, :60")
def modelopt_mean():
    """5 rows of 32,000 logits, LogitsDistillationLoss() as in the README. The docstring
    (:31) says that it is the loss of the paper, whose sum over the vocabulary has no
    1 / V."""
    losses = import_module("modelopt.torch.distill.losses")
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 32000, generator=rng)
    measured = float(losses.LogitsDistillationLoss()(student, teacher))
    right = kl(*(x.double().softmax(-1) for x in (teacher, student)))
    return [("mean KL", measured, right), ("right / measured", right / measured, 1.0)]


@check("NVIDIA ModelOpt", ("5",), "torch/distill/plugins/huggingface.py:243")
def modelopt_micro_batches():
    """Rows of 1 and of 4 response tokens, as one batch and as two micro-batches. How
    much did each token's weight change? num_items_in_batch = 5 is given and not used.
    Trainer.training_step (transformers 5.23, trainer.py:2107) adds the two up as they
    are where the model takes loss keywords, as Llama and Qwen do, and else averages."""
    plugin = import_module("modelopt.torch.distill.plugins.huggingface")
    losses = import_module("modelopt.torch.distill.losses")
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 7, generator=rng)
    student.requires_grad_()
    labels = torch.tensor([[-100, -100, -100, -100, 1], [-100, 1, 2, 3, 4]])

    def loss(rows):
        trainer = SimpleNamespace(
            _kd_criterion=losses.LogitsDistillationLoss(1.0, reduction="none"),
            _last_teacher_outputs=SimpleNamespace(logits=teacher[rows]),
        )
        outputs = SimpleNamespace(logits=student[rows])
        return plugin.KDTrainer._standard_kd_loss(
            trainer, outputs, labels[rows], num_items_in_batch=5
        )

    whole = torch.autograd.grad(loss(slice(0, 2)), student)[0].norm(dim=-1)
    added = loss(slice(0, 1)) + loss(slice(1, 2))
    added = torch.autograd.grad(added, student)[0].norm(dim=-1)
    short, long = float(added[0, 3] / whole[0, 3]), float(added[1, 0] / whole[1, 0])
    return [
        ("the token of the short row, added up", short, 1.0),
        ("a token of the long row, added up", long, 1.0),
        ("the token of the short row, averaged", short / 2, 1.0),
        ("a token of the long row, averaged", long / 2, 1.0),
    ]


def number(x) -> str:
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def results(library: str) -> list[dict]:
    """The checks of one library, run: what is kept beside its verdicts."""
    return [
        {
            "laws": list(check.laws),
            "source": check.source,
            "case": check.case,
            "numbers": [
                dict(zip(CASES, (case, number(a), number(b)), strict=True))
                for case, a, b in check.run()
            ],
        }
        for check in CHECKS
        if check.library == library
    ]


def main() -> int:
    for library in dict.fromkeys(check.library for check in CHECKS):
        print(f"\n{library}")
        try:
            rows = results(library)
        except ImportError as error:
            print(f"  skipped: {error}")
            continue
        for row in rows:
            print(f"  law {', '.join(row['laws'])} ({row['source']})")
            print(f"    {row['case']}")
            for x in row["numbers"]:
                print(f"    {x['case']:<40} {x['library']:>24}  right: {x['right']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
