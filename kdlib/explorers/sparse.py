"""Top-k, tail and sampling: what do k tokens of a teacher leave of its gradient?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kdlib.divergences import forward_kl
from kdlib.explorers.frame import (
    Explorer,
    axes_of,
    new_figure,
    row_labels,
    shown,
    slider,
)
from kdlib.plots import BLUE, GREY, ORANGE
from kdlib.sparse import sparse_divergence
from kdlib.sparse_targets import TAILS, sampled_targets, top_k_targets

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

KS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
DRAWS = 400
TOKENS = 9
SAMPLED = "k tokens drawn"
TARGETS = {f"top k, tail: {tail}": tail for tail in TAILS} | {SAMPLED: None}


def targets_of(kind: str, teacher_logits, k: int, draws: int = 1):
    """SparseTargets: the top k, or `draws` rows of k drawn tokens."""
    if kind != SAMPLED:
        return top_k_targets(teacher_logits[None], k, TARGETS[kind])
    generator = torch.Generator().manual_seed(0)
    return sampled_targets(teacher_logits.expand(draws, -1), k, generator)


def loss_and_gradient(student_logits, targets):
    """[rows] forward KL from sparse targets, and [rows, V] its gradient."""
    leaf = student_logits.expand(len(targets), -1).clone().requires_grad_()
    loss = sparse_divergence(leaf, targets)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def sparse(
    tokenizer,
    student_logits: Float[Tensor, " V"],
    teacher_logits: Float[Tensor, " V"],
) -> Explorer:
    """One token's dense forward KL and gradient beside those from k tokens.

    For drawn tokens the bars are one draw's, the curve is the mean of DRAWS draws, and
    the band holds two thirds of them.
    """
    z_s, z_t = student_logits.detach().double(), teacher_logits.detach().double()
    leaf = z_s.clone().requires_grad_()
    dense = forward_kl(leaf, z_t)
    (slope,) = torch.autograd.grad(dense, leaf)
    dense = dense.item()
    losses, gradients, spread, aim = {}, {}, {}, {}
    for kind in TARGETS:
        n = DRAWS if kind == SAMPLED else 1
        found = [loss_and_gradient(z_s, targets_of(kind, z_t, k, n)) for k in KS]
        losses[kind] = torch.stack([loss.mean() for loss, _ in found])
        gradients[kind] = torch.stack([gradient[0] for _, gradient in found])
        ends = torch.tensor([1 / 6, 5 / 6]).double()
        spread[kind] = torch.stack([loss.quantile(ends) for loss, _ in found])
        means = torch.stack([gradient.mean(0) for _, gradient in found])
        aim[kind] = (means - slope).norm(dim=-1) / slope.norm()

    shape = {"left": 0.13, "right": 0.98, "top": 0.9, "bottom": 0.17, "wspace": 0.3}
    figure = new_figure(3.3, **shape)
    left, right = axes_of(figure, 1, 2)
    order = slope.abs().topk(TOKENS).indices.tolist()
    rows = np.arange(TOKENS)
    still = left.barh(
        rows - 0.2, slope[order].numpy(), 0.38, color=BLUE, label="all tokens"
    )
    bars = left.barh(
        rows + 0.2, slope[order].numpy(), 0.38, color=ORANGE, label="k tokens"
    )
    for label, token in zip(row_labels(left, TOKENS), order, strict=True):
        label.set_text(shown(tokenizer, token))
    left.invert_yaxis()
    left.axvline(0, color=GREY, linewidth=0.8)
    wide = 1.15 * max(float(g[:, order].abs().max()) for g in gradients.values())
    left.set(xlim=(-wide, wide), xlabel="gradient by the student's logit")
    left.legend(frameon=False, fontsize=9, loc="lower right", handles=[still, bars])
    left.set_title("below 0: the logit is pushed up", loc="left", fontsize=10)
    right.axhline(dense, color=BLUE, linewidth=1)
    (curve,) = right.plot(KS, losses[SAMPLED], color=ORANGE)
    lows, highs = (right.plot(KS, [dense] * len(KS), ":", color=ORANGE) for _ in "12")
    (point,) = right.plot([1], [dense], "o", color=ORANGE, markersize=9)
    low = min(float(x.min()) for x in [*losses.values(), *spread.values()])
    high = max(float(x.max()) for x in [*losses.values(), *spread.values()])
    right.set(xscale="log", ylim=(low - 0.3, high + 0.3), xlabel="k (log scale)")
    right.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    right.minorticks_off()
    right.set_title("loss, nats · blue: all tokens", loc="left", fontsize=10)

    def draw(targets: str, k: int) -> str:
        number = KS.index(k)
        for bar, token in zip(bars, order, strict=True):
            bar.set_width(float(gradients[targets][number, token]))
        curve.set_ydata(losses[targets])
        for line, edge in zip((*lows, *highs), spread[targets].T, strict=True):
            line.set_ydata(edge)
            line.set_visible(targets == SAMPLED)
        loss = losses[targets][number].item()
        point.set_data([k], [loss])
        told = f"k = {k}, {targets}: the loss is {loss:.2f} nats"
        if targets == SAMPLED:
            told = f"{told} on the mean of {DRAWS} draws, two thirds of them between "
            told += " and ".join(f"{x:.2f}" for x in spread[targets][number])
        return (
            f"{told}; from all tokens it is {dense:.2f}. "
            f"{'The mean gradient' if targets == SAMPLED else 'The gradient'} is off "
            f"by {aim[targets][number]:.0%} of the true one's length."
        )

    controls = {
        "targets": slider("targets", list(TARGETS)),
        "k": slider("k", KS, 4),
    }
    return Explorer(
        "sparse",
        "What do k tokens of a teacher leave of its loss and its gradient?",
        controls,
        figure,
        [*bars, curve, *lows, *highs, point],
        draw,
    )
