"""The course's figures, in one style."""

from __future__ import annotations

from collections.abc import Sequence

# Okabe and Ito's blue and orange, told apart with any colour vision, and a grey whose
# lightness lies halfway between theirs: in a print without colours the three are three.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#8C8C8C"
# Black on white, said outright: a dark page, or a reader's own dark style, must not
# take the ground from under black axes.
STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.transparent": False,
    "text.color": "black",
    "axes.edgecolor": "black",
    "axes.labelcolor": "black",
    "xtick.color": "black",
    "ytick.color": "black",
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


def exact_match_bars(rows: Sequence[dict]):
    """One bar a row: the share of test inputs answered exactly.

    rows: dicts with "name" and "exact_match"; the distilled row stands out
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 2.8))
        axes = figure.subplots()
        names = [row["name"] for row in rows]
        shares = [row["exact_match"] for row in rows]
        colours = [
            ORANGE if "distilled" in n else BLUE if n == "teacher" else GREY
            for n in names
        ]
        bars = axes.barh(names, shares, color=colours)
        axes.bar_label(bars, [f"{share:.2f}" for share in shares], padding=4)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.08)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_xlabel("share of test inputs answered exactly")
    return figure


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]):
    """A table as a figure: for numbers of a training run.

    Their last digits differ between machines, and a notebook's pictures, unlike its
    text, are not compared when it is tested.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.3 * (len(rows) + 1)))
        axes = figure.subplots()
        axes.axis("off")
        drawn = axes.table(
            cellText=rows,
            colLabels=columns,
            cellLoc="left",
            colLoc="left",
            edges="horizontal",
            bbox=(0, 0, 1, 1),
        )
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(10)
        drawn.auto_set_column_width(range(len(columns)))
        for cell in drawn.get_celld().values():
            cell.set_edgecolor(GREY)
            cell.set_linewidth(0.5)
    return figure


def quality_against_speed(points: Sequence[dict]):
    """Exact match against requests per second, one colour a kind of model.

    points: dicts with "kind", "label", "requests_per_s" and "exact_match" (an Interval,
            drawn as a bar, cut at 0 and 1). Kinds that begin with "teacher" are blue,
            "distilled" orange, the rest grey; points of one kind are joined
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.8))
        axes = figure.subplots()
        for kind in dict.fromkeys(point["kind"] for point in points):
            mine = [point for point in points if point["kind"] == kind]
            speeds = [point["requests_per_s"] for point in mine]
            found = [point["exact_match"] for point in mine]
            means = [interval.mean for interval in found]
            first = kind.split()[0]
            axes.errorbar(
                speeds,
                means,
                yerr=[
                    [interval.mean - max(interval.low, 0) for interval in found],
                    [min(interval.high, 1) - interval.mean for interval in found],
                ],
                color={"teacher": BLUE, "distilled": ORANGE}.get(first, GREY),
                marker={"teacher": "s", "distilled": "o"}.get(first, "v"),
                linewidth=1,
                capsize=3,
                label=kind,
            )
            for point, speed, mean in zip(mine, speeds, means, strict=True):
                axes.annotate(
                    point["label"],
                    (speed, mean),
                    xytext=(6, 6),
                    textcoords="offset points",
                    fontsize=9,
                )
        fastest = max(point["requests_per_s"] for point in points)
        slowest = min(point["requests_per_s"] for point in points)
        axes.set_xscale("log")
        axes.set_xlim(0.7 * slowest, 1.5 * fastest)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
        axes.set_ylim(-0.05, 1.08)
        axes.set_xlabel("requests per second on one core (log scale)")
        axes.set_ylabel("share answered exactly")
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    return figure
