"""JSD's beta and kl_mix's lam: what does the knob turn, and what does it shrink?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kdlib.divergences import generalized_jsd, kl_mix
from kdlib.explorers.frame import Explorer, axes_of, new_figure, shown, slider, switch
from kdlib.plots import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SMALL = [0.001, 0.003, 0.01, 0.02, 0.05]
KNOB = [
    0.0,
    *SMALL,
    *(i / 10 for i in range(1, 10)),
    *(1 - x for x in SMALL[::-1]),
    1.0,
]
KNOB = [round(x, 3) for x in KNOB]
TOKENS = 8
KINDS = ("kl_mix", "JSD")


def values_and_gradients(student_logits, teacher_logits):
    """{kind: (values [K], gradients [K, V])} at the places of the KNOB."""
    found = {}
    for kind, (loss, name) in {
        "kl_mix": (kl_mix, "lam"),
        "JSD": (generalized_jsd, "beta"),
    }.items():
        leaf = student_logits.detach().double().requires_grad_()
        values = [loss(leaf, teacher_logits.double(), **{name: x}) for x in KNOB]
        slopes = [torch.autograd.grad(value, leaf)[0] for value in values]
        found[kind] = torch.stack(values).detach(), torch.stack(slopes)
    return found


def mixtures(
    tokenizer,
    student_logits: Float[Tensor, " V"],
    teacher_logits: Float[Tensor, " V"],
) -> Explorer:
    """Both families between forward and reverse KL, at one token, with one knob."""
    found = values_and_gradients(student_logits, teacher_logits)
    ends = [found["kl_mix"][1][i] for i in (0, -1)]  # forward's and reverse KL's
    order = torch.stack(ends).abs().amax(0).topk(TOKENS).indices
    shape = {"left": 0.09, "right": 0.98, "top": 0.88, "bottom": 0.17, "wspace": 0.32}
    figure = new_figure(3.3, **shape)
    left, right = axes_of(figure, 1, 2)
    colours = dict(zip(KINDS, (BLUE, ORANGE), strict=True))
    lengths = {kind: slopes.norm(dim=-1) for kind, (_, slopes) in found.items()}
    curves, points, bars = {}, {}, {}
    for kind, line in zip(KINDS, ("-", "--"), strict=True):
        # Without the ends, where beta means forward and reverse KL by convention.
        (curves[kind],) = left.plot(
            KNOB[1:-1], lengths[kind][1:-1], line, color=colours[kind], label=kind
        )
        (points[kind],) = left.plot([0.0], [0.0], "o", color=colours[kind])
    rows = np.arange(TOKENS)
    for kind, up in zip(KINDS, (-0.2, 0.2), strict=True):
        bars[kind] = right.barh(
            rows + up, [0.0] * TOKENS, 0.38, color=colours[kind], label=kind
        )
    left.plot([0, 1], lengths["kl_mix"][[0, -1]], "o", color=GREY, label="the two KLs")
    top = 1.25 * max(float(length[[0, -1]].max()) for length in lengths.values())
    left.set(xlim=(-0.03, 1.03), ylim=(0, top), xlabel="beta, or lam")
    left.set_title("length of the gradient", loc="left", fontsize=10)
    left.legend(
        frameon=False,
        fontsize=9,
        loc="upper center",
        ncols=3,
        handlelength=1.5,
        columnspacing=1,
    )
    right.set_yticks(rows, [shown(tokenizer, t) for t in order.tolist()])
    right.invert_yaxis()
    wide = 1.1 * float(torch.stack(ends)[:, order].abs().max())
    right.set(xlim=(-wide, wide), xlabel="gradient by the student's logit")
    right.axvline(0, color=GREY, linewidth=0.8)
    right.set_title("below 0: the logit is pushed up", loc="left", fontsize=10)

    def draw(knob: float, rescaled: bool) -> str:
        number, said = KNOB.index(knob), []
        inside = torch.tensor([min(max(x, 1e-9), 1.0) for x in KNOB]).double()
        # The ends are forward and reverse KL themselves: nothing to divide by there.
        size = inside * (1 - inside)
        size[0] = size[-1] = 1.0
        for kind in KINDS:
            values, slopes = found[kind]
            scale = size if rescaled and kind == "JSD" else torch.ones_like(size)
            scaled = slopes / scale[:, None]
            length = scaled.norm(dim=-1)
            curves[kind].set_ydata(length[1:-1])
            points[kind].set_data([knob], [length[number]])
            for bar, token in zip(bars[kind], order, strict=True):
                bar.set_width(float(scaled[number, token]))
            near = [
                float(torch.cosine_similarity(slopes[number], end, dim=0))
                for end in ends
            ]
            said.append(
                f"{kind}: {values[number] / scale[number]:.3f} nats, a gradient "
                f"{length[number]:.3f} long, cosine {near[0]:.2f} with forward and "
                f"{near[1]:.2f} with reverse KL's"
            )
        divided = " JSD is divided by beta (1 - beta)." if rescaled else ""
        return f"At {knob:g}, {said[0]}; {said[1]}.{divided}"

    controls = {
        "knob": slider("beta, or lam", KNOB, 0.1),
        "rescaled": switch("divide JSD by beta (1 - beta)"),
    }
    return Explorer(
        "mixtures",
        "What do JSD's beta and kl_mix's lam turn, and what do they shrink?",
        controls,
        figure,
        [
            *(bar for kind in KINDS for bar in bars[kind]),
            *curves.values(),
            *points.values(),
        ],
        draw,
    )
