"""The objective's landscape: where does each loss send a student of two parameters?

Answers have two words, `le` or `der`, then `mai` or `Mai`. The student has no memory:
its parameters are the logit of `le` in the first place and of `mai` in the second. The
sums over all answers are those of exact.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kdlib.exact import ExactLM, sequence_forward_kl, token_level
from kdlib.explorers.frame import Explorer, axes_of, new_figure, slider
from kdlib.plots import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

STARTS = [float(x) for x in range(-3, 5)]
STEPS, RATE = 150, 1.0
LEVELS = [0.02, 0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4]


def two_words(le: float) -> ExactLM:
    """Writes `le` with this probability, and then mostly the word that fits."""
    first = torch.tensor([[[le, 1 - le]]], dtype=torch.float64)
    then = torch.tensor([[[0.9, 0.1], [0.1, 0.9]]], dtype=torch.float64)
    return ExactLM([first.log(), then.log()])


TEACHER, PEOPLE = two_words(0.6), two_words(0.2)


def students(at: Float[Tensor, "n 2"]) -> ExactLM:
    return ExactLM.memoryless(torch.stack([at, torch.zeros_like(at)], -1))


def whole_answers(at):
    return sequence_forward_kl(TEACHER, students(at))


def peoples_prefixes(at):
    return token_level(TEACHER, students(at), prefixes_from=PEOPLE).sum(0)


def likeliest_answer(at):
    return -students(at).log_probs()[:, TEACHER.log_probs()[0].argmax()]


OBJECTIVES = {
    "whole answers": whole_answers,
    "tokens, on people's prefixes": peoples_prefixes,
    "the likeliest answer alone": likeliest_answer,
}


def paths(loss_of) -> Float[Tensor, "s n 2"]:
    """Gradient descent from every STARTS x STARTS."""
    line = torch.tensor(STARTS, dtype=torch.float64)
    found = [torch.cartesian_prod(line, line)]
    for _ in range(STEPS):
        here = found[-1].clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss_of(here).sum(), here)
        found.append(found[-1] - RATE * slope)
    return torch.stack(found)


def landscape() -> Explorer:
    """Three objectives, and descent on each from a start that is chosen."""
    walks = {name: paths(loss_of) for name, loss_of in OBJECTIVES.items()}
    heights = {
        name: loss_of(walks[name].flatten(0, 1)).view(STEPS + 1, -1)
        for name, loss_of in OBJECTIVES.items()
    }
    shape = {"left": 0.09, "right": 0.98, "top": 0.9, "bottom": 0.17, "wspace": 0.26}
    figure = new_figure(3.4, **shape)
    left, right = axes_of(figure, 1, 2)
    line = torch.linspace(-3.3, 4.3, 77, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    valleys = {}
    for name, loss_of in OBJECTIVES.items():
        height = loss_of(grid).view(len(line), len(line)).T
        low = 0.0 if loss_of is likeliest_answer else height.min()  # it nears 0
        valleys[name] = left.contour(
            line, line, height - low, LEVELS, colors=GREY, linewidths=0.8
        )
    (path,) = left.plot([0.0], [0.0], color=ORANGE, linewidth=2.5)
    (first,) = left.plot([0.0], [0.0], "o", color=ORANGE, markersize=7)
    (here,) = left.plot([0.0], [0.0], "*", color=BLUE, markersize=15)
    left.set(xlim=(-3.3, 4.3), ylim=(-3.3, 4.3), xlabel='logit of "le", first word')
    left.set_title('logit of "mai", second word', loc="left", fontsize=10)
    (curve,) = right.plot(range(STEPS + 1), [0.0] * (STEPS + 1), color=ORANGE)
    (point,) = right.plot([0.0], [0.0], "*", color=BLUE, markersize=15)
    right.set_xscale("symlog", linthresh=10)
    right.set(xlim=(0, STEPS), ylim=(0, 6.5), xlabel="steps of descent")
    right.set_xticks([0, 5, 10, 50, 150], ["0", "5", "10", "50", "150"])
    right.set_title("loss, nats an answer", loc="left", fontsize=10)

    def draw(objective: str, le: float, mai: float, steps: int) -> str:
        number = STARTS.index(le) * len(STARTS) + STARTS.index(mai)
        walk = walks[objective][: steps + 1, number]
        loss = heights[objective][:, number]
        for name in OBJECTIVES:
            valleys[name].set_visible(name == objective)
        path.set_data(*walk.T)
        first.set_data(*walk[:1].T)
        here.set_data(*walk[-1:].T)
        curve.set_ydata(loss)
        point.set_data([steps], [loss[steps]])
        p = walk[-1].sigmoid()
        return (
            f"{objective}: after {steps} steps the student says le with {p[0]:.2f} and "
            f"mai with {p[1]:.2f}. The loss is {loss[steps]:.3f} nats, "
            f"{loss[0] - loss[steps]:.3f} less than at the start."
        )

    steps = [*range(0, 10), *range(10, STEPS + 1, 10)]
    controls = {
        "objective": slider("objective", list(OBJECTIVES)),
        "le": slider('start: logit of "le"', STARTS, -2.0),
        "mai": slider('start: logit of "mai"', STARTS, -2.0),
        "steps": slider("steps", steps, 20),
    }
    return Explorer(
        "landscape",
        "Where does each objective end, for a student of two parameters?",
        controls,
        figure,
        [*valleys.values(), path, first, here, curve, point],
        draw,
    )
