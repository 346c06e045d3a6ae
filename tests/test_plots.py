"""The figures' one style: in colour, in print, on a dark page, and at half size.

Lightness is CIE L*, 0 to 100; colour difference is the distance in CIE Lab. How a
colour looks without green or without red cones is Machado, Oliveira and Fernandes
(2009), severity 1, in linear RGB.
"""

from __future__ import annotations

import base64
import io
import itertools
from pathlib import Path

import matplotlib.style
import nbformat
import numpy as np
import pytest
from PIL import Image

from kdlib import plots

ROOT = Path(__file__).parents[1]
COLOURS = {"blue": plots.BLUE, "orange": plots.ORANGE, "grey": plots.GREY}
DEUTERANOPIA = [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
]
PROTANOPIA = [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
]
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def linear(colour):
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE Lab of linear RGB, white at (100, 0, 0)."""
    x = TO_XYZ @ rgb / TO_XYZ.sum(axis=1)
    f = np.where(x > (6 / 29) ** 3, np.cbrt(x), x * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distances(colours, eye):
    """The distance in Lab of every two colours, as this eye sees them."""
    seen = {
        name: lab(np.clip(np.array(eye) @ linear(colour), 0, 1))
        for name, colour in colours.items()
    }
    return {
        (a, b): np.linalg.norm(seen[a] - seen[b])
        for a, b in itertools.combinations(seen, 2)
    }


def test_the_measure_itself():
    """Against values known apart from this code: white, and pure red."""
    assert lab(linear("#ffffff")) == pytest.approx([100, 0, 0], abs=0.01)
    assert lab(linear("#ff0000")) == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    # A red and a green that are one colour without green cones, and two with them.
    pair = {"red": "#c04040", "green": "#767a3e"}
    (normal,) = distances(pair, np.eye(3)).values()
    (without,) = distances(pair, DEUTERANOPIA).values()
    assert normal > 45 and without < 15


@pytest.mark.parametrize(
    "eye", [np.eye(3), DEUTERANOPIA, PROTANOPIA], ids=["all", "no green", "no red"]
)
def test_colours_are_told_apart_with_any_eyes(eye):
    for pair, distance in distances(COLOURS, eye).items():
        assert distance > 25, pair


def test_colours_are_told_apart_in_print():
    lightness = {name: lab(linear(colour))[0] for name, colour in COLOURS.items()}
    lightness |= {"black": 0, "white": 100}
    for a, b in itertools.combinations(lightness, 2):
        assert abs(lightness[a] - lightness[b]) > 10, (a, b)


def test_what_text_is_written_in_stands_out_from_the_ground():
    """WCAG's contrast of at least 3 for graphics; the orange is for marks that are
    large, or labelled in words."""
    for name in ("blue", "grey"):
        luminance = TO_XYZ[1] @ linear(COLOURS[name])
        assert 1.05 / (luminance + 0.05) >= 3, name


def test_a_reader_s_dark_style_does_not_show_through():
    rows = [{"name": "teacher", "exact_match": 0.9}]
    with matplotlib.style.context("dark_background"):
        figure = plots.exact_match_bars(rows)
        with matplotlib.rc_context(plots.STYLE):
            figure.savefig(file := io.BytesIO(), format="png")
    picture = np.asarray(Image.open(file))
    assert (picture[..., 3] == 255).all() and (picture[0, 0] == 255).all()
    axes = figure.axes[0]
    assert matplotlib.colors.to_rgb(axes.get_facecolor()) == (1, 1, 1)
    label = axes.xaxis.label
    for colour in (label.get_color(), axes.spines["left"].get_edgecolor()):
        assert matplotlib.colors.to_rgb(colour) == (0, 0, 0)


def draws(notebook):
    """Whether its own cells draw with pyplot."""
    return any("plt.show()" in cell.source for cell in notebook.cells)


CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_figure_of_a_chapter_is_in_the_style(path):
    notebook = nbformat.read(path, as_version=4)
    if draws(notebook):
        code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        styled = [i for i, x in enumerate(code) if "rcParams.update(plots.STYLE)" in x]
        drawn = [i for i, x in enumerate(code) if "plt.subplots" in x]
        assert styled and styled[0] < min(drawn)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            png = output.get("data", {}).get("image/png")
            if png:
                picture = Image.open(io.BytesIO(base64.b64decode(png)))
                assert picture.getchannel("A").getextrema() == (255, 255), cell.source
                assert picture.width <= 1100, cell.source  # shown smaller if wider
