"""What all explorers share: controls that move a picture, and the picture in words.

Knows ipywidgets, and how a notebook shows things: one output with the live widget, a
PNG where there is no kernel (GitHub, a built site, a notebook that was only opened),
and a line of text. Does not know what is drawn.

A hand that holds an arrow key does not wait for a figure. So the figure is made and
laid out once. What moves is left out of it, and is drawn on a copy of the rest at every
move.
"""

from __future__ import annotations

import base64
import html
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdlib.errors import ArgumentError
from kdlib.plots import STYLE

if TYPE_CHECKING:
    from ipywidgets import Widget
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

WIDGET = "application/vnd.jupyter.widget-view+json"
DPI = 110
WIDTH = 7.4  # inches; a notebook's column holds about 8 at 100 dots


class Explorer:
    """A question, its controls, a picture and a sentence.

    name:     of the explorer; it stands for it where only text is shown
    question: what it answers
    controls: {name: widget with a value}; all of them can be used by keyboard
    figure:   made by `new_figure`
    moving:   its artists that `draw` changes, the lowest first
    draw:     draw(**values) changes them, and says in words what is to be seen
    buttons:  of `buttons`, where something is to be started

    Raises ArgumentError where there is no control.
    """

    def __init__(
        self,
        name: str,
        question: str,
        controls: Mapping[str, Widget],
        figure: Figure,
        moving: Sequence[Artist],
        draw: Callable[..., str],
        buttons: Widget | None = None,
    ):
        import ipywidgets

        if not controls:
            raise ArgumentError(f"{name} has no controls", "give it one at least")
        self.name, self.question, self.figure = name, question, figure
        self.controls, self.moving, self._draw = dict(controls), list(moving), draw
        self._lock = threading.RLock()
        self._canvas, self._still = still_part(figure, self.moving)
        self.picture = ipywidgets.Image(
            format="png", layout=ipywidgets.Layout(width="100%", max_width="760px")
        )
        self.words = ipywidgets.HTML()
        self.update()
        for control in self.controls.values():
            control.observe(self.update, names="value")
        self.widget = ipywidgets.VBox(
            [
                ipywidgets.HTML(f"<b>{html.escape(question, quote=False)}</b>"),
                *self.controls.values(),
                *([] if buttons is None else [buttons]),
                self.words,
                self.picture,
            ],
            layout=ipywidgets.Layout(max_width="780px"),
        )

    @property
    def values(self) -> dict:
        """What the controls say now."""
        return {name: control.value for name, control in self.controls.items()}

    def update(self, change=None) -> None:
        """Draw for the controls' values. `change` is what ipywidgets passes; unused."""
        with self._lock:  # a run that is watched draws from a thread of its own
            self._update()

    def _update(self) -> None:
        self.sentence = self._draw(**self.values)
        # Screen readers read a status aloud when it changes, once they are free.
        sentence = html.escape(self.sentence, quote=False)
        self.words.value = f'<p role="status" aria-live="polite">{sentence}</p>'
        self._canvas.restore_region(self._still)
        for artist in self.moving:
            self.figure.draw_artist(artist)
        self.picture.value = png(self._canvas)

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        """One output for all readers. The text has no numbers: nbval compares it."""
        return {
            WIDGET: {
                "version_major": 2,
                "version_minor": 0,
                "model_id": self.widget.model_id,
            },
            "image/png": base64.b64encode(self.picture.value).decode(),
            "text/plain": f"<explorer: {self.name}. {self.question}>",
        }


def new_figure(height: float, **spaces: float) -> Figure:
    """An empty figure in the course's style.

    spaces: of subplots_adjust, shares of the figure; there is no other layout
    """
    from matplotlib.figure import Figure

    with in_style():
        figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    figure.subplots_adjust(**spaces)
    return figure


def in_style():
    """Figures and axes take their looks when they are made, inside this context."""
    import matplotlib

    return matplotlib.rc_context(STYLE | {"figure.constrained_layout.use": False})


def axes_of(figure: Figure, *args, **kwargs):
    """figure.subplots(...) in the course's style."""
    with in_style():
        return figure.subplots(*args, **kwargs)


def mosaic(figure: Figure, *args, **kwargs):
    """figure.subplot_mosaic(...) in the course's style."""
    with in_style():
        return figure.subplot_mosaic(*args, **kwargs)


def still_part(figure: Figure, moving: Sequence[Artist]):
    """A canvas of the figure, and what is on it without the moving artists."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    for artist in moving:
        artist.set_animated(True)
    canvas.draw()
    return canvas, canvas.copy_from_bbox(figure.bbox)


def png(canvas: FigureCanvasAgg) -> bytes:
    """The canvas as it is now."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    # Better compression takes longer than the drawing.
    fast = {"compress_level": 1}
    imsave(file, np.asarray(canvas.buffer_rgba()), format="png", pil_kwargs=fast)
    return file.getvalue()


def row_labels(axes: Axes, n: int, size: float = 10) -> list[Text]:
    """Empty texts left of the rows 0 to n - 1, in the place of tick labels."""
    axes.set_yticks(range(n), [""] * n)
    with in_style():
        return [
            axes.text(
                -0.03,
                row,
                "",
                transform=axes.get_yaxis_transform(),
                ha="right",
                va="center",
                fontsize=size,
            )
            for row in range(n)
        ]


def slider(label: str, options, value=None):
    """A slider over values, or (text, value) pairs: arrow keys move it by one.

    value: to begin with; the first option where none is given

    For names as well: JupyterLab takes the arrow keys from a drop-down and goes to the
    next cell.
    """
    import ipywidgets

    given = {} if value is None else {"value": value}
    return ipywidgets.SelectionSlider(
        options=options, description=label, **given, **_wide()
    )


def buttons(names: Sequence[str], press: Callable[[str], None]):
    """A row of buttons; press(name) is called.

    None is ever switched off: the keyboard's place would be lost with it.
    """
    import ipywidgets

    row = [ipywidgets.Button(description=name) for name in names]
    for one in row:
        one.on_click(lambda button: press(button.description))
    return ipywidgets.HBox(row)


def switch(label: str, value: bool = False):
    import ipywidgets

    return ipywidgets.Checkbox(value=value, description=label, **_wide())


def _wide() -> dict:
    import ipywidgets

    return {
        "style": {"description_width": "150px"},
        "layout": ipywidgets.Layout(width="560px", max_width="100%"),
    }


def shown(tokenizer, token: int) -> str:
    """A token's text in quotes; $ as it is, though matplotlib takes it for formulas."""
    return repr(tokenizer.decode([token])).replace("$", r"\$")
