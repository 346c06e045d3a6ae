"""Forward and reverse KL: where does each send a student that is too small?

The teacher has two modes on a line of tokens. The student is a bell of two parameters,
its middle and its width, so it cannot have both:

    log p_s(v) = -(v - middle)^2 / (2 width^2) + a constant

The arrows are minus the gradient by (middle, log width), all of one length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from kdlib.divergences import get_divergence
from kdlib.explorers.frame import Explorer, axes_of, new_figure, slider
from kdlib.plots import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

PLACES = torch.linspace(-6, 6, 61, dtype=torch.float64)  # a token stands at each
MODES = ((0.6, -2.5, 0.7), (0.4, 2.5, 0.7))  # share, middle, width
MIDDLES = [i / 2 for i in range(-8, 9)]
WIDTHS = [0.5, 0.7, 1.0, 1.4, 2.0, 2.8]
STEPS, LONGEST = 240, 0.1  # of descent; a step is the gradient, cut at this length
DIRECTIONS = {"forward KL": "forward_kl", "reverse KL": "reverse_kl"}


def bell(at: Float[Tensor, "n 2"]) -> Float[Tensor, "n V"]:
    """Logits of the students at (middle, log width)."""
    middle, width = at[:, :1], at[:, 1:].exp()
    return -((PLACES - middle) ** 2) / (2 * width**2)


def two_modes() -> Float[Tensor, " V"]:
    """The teacher's logits: a mixture of two bells, at MODES."""
    at = torch.tensor([[m, w] for _, m, w in MODES], dtype=torch.float64)
    at[:, 1].log_()
    shares = torch.tensor([[share] for share, _, _ in MODES], dtype=torch.float64)
    return (bell(at).log_softmax(-1) + shares.log()).logsumexp(0)


class Field(NamedTuple):
    """Of one direction, for a start at every MIDDLES x WIDTHS, in this order.

    loss:     [n] at the starts
    gradient: [n, 2]
    paths:    [STEPS + 1, n, 2] of descent from there
    """

    loss: Float[Tensor, " n"]
    gradient: Float[Tensor, "n 2"]
    paths: Float[Tensor, "s n 2"]


def losses(name: str, at: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    students = bell(at)
    return get_divergence(name)(students, two_modes().expand_as(students))


def slope(name: str, at: Float[Tensor, "n 2"]):
    at = at.detach().requires_grad_()
    loss = losses(name, at)
    return loss.detach(), torch.autograd.grad(loss.sum(), at)[0]


def field(name: str) -> Field:
    starts = torch.cartesian_prod(
        torch.tensor(MIDDLES).double(), torch.tensor(WIDTHS).double().log()
    )
    loss, gradient = slope(name, starts)
    paths = [starts]
    for _ in range(STEPS):
        step = slope(name, paths[-1])[1]
        length = step.norm(dim=-1, keepdim=True).clamp(min=LONGEST)
        paths.append(paths[-1] - step * LONGEST / length)
    return Field(loss, gradient, torch.stack(paths))


def directions() -> Explorer:
    """Descent on forward or reverse KL, from a start that is chosen."""
    fields = {label: field(name) for label, name in DIRECTIONS.items()}
    teacher = two_modes().softmax(-1)
    figure = new_figure(3.3, left=0.08, right=0.98, top=0.9, bottom=0.16, wspace=0.2)
    left, right = axes_of(figure, 1, 2)
    left.bar(PLACES.numpy(), teacher.numpy(), width=0.2, color=BLUE, label="teacher")
    (begin,) = left.plot(PLACES, teacher, "--", color=GREY, label="student, start")
    (end,) = left.plot(PLACES, teacher, color=ORANGE, linewidth=2.5, label="end")
    left.set(xlim=(-6, 6), ylim=(0, 0.17), xlabel="token")
    left.set_yticks([0, 0.05, 0.1, 0.15])
    left.set_title("probability", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=9, loc="upper right", handlelength=1.4)

    x = torch.linspace(-4.4, 4.4, 45, dtype=torch.float64)
    y = torch.linspace(-0.9, 1.2, 31, dtype=torch.float64)
    grid = torch.cartesian_prod(x, y)
    valleys, arrows = {}, {}
    starts = fields["forward KL"].paths[0]
    for label, name in DIRECTIONS.items():
        height = losses(name, grid).view(len(x), len(y)).T.log()
        valleys[label] = right.contour(
            x, y, height, 12, colors=GREY, linewidths=0.7, linestyles="solid"
        )
        down = -fields[label].gradient
        down = down / down.norm(dim=-1, keepdim=True)
        arrows[label] = right.quiver(
            *starts.T, *down.T, color=BLUE, angles="xy", scale=28, width=0.004
        )
    (path,) = right.plot([0.0], [0.0], color=ORANGE, linewidth=2.5)
    (stop,) = right.plot([0.0], [0.0], "*", color=ORANGE, markersize=15)
    right.set(xlim=(-4.4, 4.4), ylim=(-0.9, 1.2), xlabel="middle of the student")
    right.set_yticks([float(torch.tensor(w).log()) for w in WIDTHS], WIDTHS)
    right.set_title("width · arrows: downhill", loc="left", fontsize=10)

    def draw(direction: str, middle: float, width: float) -> str:
        number = MIDDLES.index(middle) * len(WIDTHS) + WIDTHS.index(width)
        walk = fields[direction].paths[:, number]
        for label in DIRECTIONS:
            valleys[label].set_visible(label == direction)
            arrows[label].set_visible(label == direction)
        first, last = bell(walk[[0, -1]]).softmax(-1)
        begin.set_ydata(first)
        end.set_ydata(last)
        path.set_data(*walk.T)
        stop.set_data(*walk[-1:].T)
        loss = losses(DIRECTIONS[direction], walk[-1:]).item()
        share = last[PLACES < 0].sum().item()
        verdict = "It covers both modes, and the gap between them"
        if max(share, 1 - share) > 0.9:
            side = "left" if share > 0.5 else "right"
            verdict = f"It sits on the {side} mode and forgets the other"
        return (
            f"{direction}, begun at middle {middle:g} and width {width:g}, ends at "
            f"middle {walk[-1, 0]:.1f} and width {walk[-1, 1].exp():.1f} with "
            f"{loss:.2f} nats. {verdict}: {share:.2f} of the student is on the left, "
            f"{teacher[PLACES < 0].sum():.2f} of the teacher."
        )

    controls = {
        "direction": slider("loss", list(DIRECTIONS)),
        "middle": slider("start: middle", MIDDLES, 1.0),
        "width": slider("start: width", WIDTHS, 1.0),
    }
    return Explorer(
        "directions",
        "Where do forward and reverse KL send a student that is too small?",
        controls,
        figure,
        [*valleys.values(), *arrows.values(), begin, end, path, stop],
        draw,
    )
