"""Temperature and dark knowledge: which tokens gain, and which only seem to?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from kdlib.divergences import cross_entropy, tempered_log_softmax
from kdlib.explorers.frame import (
    Explorer,
    axes_of,
    new_figure,
    row_labels,
    shown,
    slider,
)
from kdlib.plots import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

TEMPERATURES = [round(2 ** (i / 8), 2) for i in range(-16, 33)]  # 0.25 to 16
TOKENS = 10
FLOOR = 1e-6  # the left end of the probability axis


def temperature(
    tokenizer, places: Mapping[str, Float[Tensor, " V"]], at: float = 1.0
) -> Explorer:
    """A teacher's distribution at real places, from cold to hot.

    places: {text: logits of the next token there}
    at:     the temperature to begin with, one of TEMPERATURES
    """
    places = {name: logits.detach().double() for name, logits in places.items()}
    # [temperatures, V] for every place, once: a move is then a look-up.
    log_p = {
        name: torch.stack([tempered_log_softmax(z, T) for T in TEMPERATURES])
        for name, z in places.items()
    }
    entropies = {
        name: [float(cross_entropy(z, z, temperature=T)) for T in TEMPERATURES]
        for name, z in places.items()
    }
    figure = new_figure(3.3, left=0.13, right=0.98, top=0.9, bottom=0.16, wspace=0.28)
    left, right = axes_of(figure, 1, 2, gridspec_kw={"width_ratios": [3, 2]})
    rows = range(TOKENS)
    bars = left.barh(rows, [1.0] * TOKENS, color=BLUE)
    (cold,) = left.plot([1.0] * TOKENS, rows, "|", color="black", markersize=11)
    names = row_labels(left, TOKENS)
    left.invert_yaxis()
    left.set(xscale="log", xlim=(FLOOR, 1), xlabel="probability (log scale)")
    left.set_title("bar: at this T · tick: at T = 1", loc="left", fontsize=10)
    (curve,) = right.plot(TEMPERATURES, entropies[next(iter(places))], color=GREY)
    (point,) = right.plot([1.0], [0.0], "o", color=ORANGE, markersize=9)
    most = math.log(max(len(z) for z in places.values()))
    right.set(xscale="log", ylim=(0, 1.05 * most), xlabel="temperature (log scale)")
    right.set_xticks([0.25, 1, 4, 16], ["0.25", "1", "4", "16"])
    right.minorticks_off()
    right.set_title("entropy, nats", loc="left", fontsize=10)

    def draw(place: str, temperature: float) -> str:
        number = TEMPERATURES.index(temperature)
        now, before = log_p[place][number].exp(), log_p[place][ONE].exp()
        order = log_p[place][ONE].topk(TOKENS).indices.tolist()
        for bar, label, token in zip(bars, names, order, strict=True):
            bar.set_width(float(now[token]))
            bar.set_color(BLUE if now[token] <= before[token] else ORANGE)
            label.set_text(shown(tokenizer, token))
        cold.set_xdata(before[order].tolist())
        entropy = entropies[place][number]
        curve.set_ydata(entropies[place])
        point.set_data([temperature], [entropy])
        top, second = order[:2]
        gained = sum(bool(now[t] > before[t]) for t in order)
        rest = float(1 - now[order].sum())
        return (
            f"At T = {temperature:g} the likeliest token "
            f"{tokenizer.decode([top])!r} has {now[top]:.3f} and the second, "
            f"{tokenizer.decode([second])!r}, {now[second]:.3g}. Of the ten likeliest, "
            f"{gained} have more than at T = 1. All others share {max(rest, 0.0):.3f}. "
            f"The entropy is {entropy:.2f} nats, as of {math.exp(entropy):.1f} equally "
            "likely tokens."
        )

    controls = {
        "place": slider("place", list(places)),
        "temperature": slider("temperature T", TEMPERATURES, at),
    }
    return Explorer(
        "temperature",
        "Which tokens gain when the temperature rises?",
        controls,
        figure,
        [*bars, *names, cold, curve, point],
        draw,
    )


ONE = TEMPERATURES.index(1.0)
