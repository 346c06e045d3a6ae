"""The pages of the benchmarks: figures, numbers, targets, and who made them."""

from __future__ import annotations

import io
import json

from places import RESULTS
from tables import made_by, table

from kdlib.plots import BLUE, GREY, ORANGE, STYLE

UNITS = {"tokens_per_s": "tokens a second", "peak_mib": "peak memory", "mfu": "MFU"}


def pages() -> dict[str, str | bytes]:
    """A page for each bench_*.json, and its figures."""
    found: dict[str, str | bytes] = {}
    for path in sorted(RESULTS.glob("bench_*.json")):
        facts = json.loads(path.read_text("utf-8"))
        make = loss_page if "floor_ms" in facts else train_page
        text, figures = make(facts, path.stem)
        found[f"results/{path.stem}.md"] = text
        found |= {f"results/{name}": png(figure) for name, figure in figures.items()}
    return found


def png(figure) -> bytes:
    held = io.BytesIO()
    # Without the version of matplotlib in it, the same numbers are the same bytes.
    figure.savefig(held, format="png", dpi=150, metadata={"Software": None})
    return held.getvalue()


def bars(groups: dict[str, dict[str, float]], label: str, form: str):
    """Horizontal bars, a panel a group; kdlib's stand out."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        count = sum(map(len, groups.values()))
        figure = Figure(figsize=(7, 0.9 + 0.36 * count + 0.3 * len(groups)))
        heights = [len(rows) for rows in groups.values()]
        panels = figure.subplots(
            len(groups), sharex=True, squeeze=False, height_ratios=heights
        )[:, 0]
        for axes, (title, rows) in zip(panels, groups.items(), strict=True):
            colours = [
                ORANGE
                if name.startswith("kdlib")
                else BLUE
                if "torch" in name
                else GREY
                for name in rows
            ]
            drawn = axes.barh(list(rows), list(rows.values()), color=colours)
            axes.bar_label(drawn, [form.format(x) for x in rows.values()], padding=4)
            axes.invert_yaxis()
            axes.margins(x=0.12)
            axes.set_title(title, fontsize=11, loc="left")
        panels[-1].set_xlabel(label)
        panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    return figure


def loss_page(facts: dict, name: str) -> tuple[str, dict]:
    """Of `python -m kdlib bench loss`."""
    size = facts["size"]
    measured = [row for row in facts["rows"] if "ms" in row]
    kinds = list(dict.fromkeys(row["divergence"] for row in measured))
    groups = {
        kind: {r["method"]: r["ratio"] for r in measured if r["divergence"] == kind}
        for kind in kinds
    }
    figure = bars(groups, "time, as a multiple of the floor", "{:.1f}")
    rows = [
        [
            row["divergence"],
            row["method"],
            f"{row['ratio']:.2f}",
            f"{row['ms']:,.1f}",
            f"{row['peak_mib']:,}",
            f"{row['gradient_error']:.1e}",
        ]
        for row in measured
    ]
    skipped = {r["method"]: r["skipped"] for r in facts["rows"] if "skipped" in r}
    targets = [
        [
            f"{t['method']}, {t['divergence']}: {t['quantity']}",
            f"{t['value']:g}",
            f"at most {t['limit']:g}",
            "met" if t["met"] else "**missed**",
        ]
        for t in facts["targets"]
    ]
    columns = ["divergence", "method", ">x floor", ">ms", ">peak MiB"]
    lines = [
        f"# The fused loss, on {device(facts)}",
        "",
        "Loss and gradients from hidden states. The floor is what no method can avoid: "
        f"four matrix products, here {facts['floor_ms']:,.1f} ms. "
        f"{size['rows']:,} rows, {size['vocab']:,} tokens in the vocabulary, a student "
        f"of width {size['student_width']:,} and a teacher of width "
        f"{size['teacher_width']:,}, {size['dtype']}. The gradient's error is "
        "relative, against float64.",
        "",
        f"![Time of each method as a multiple of the floor; the table below has the "
        f"same numbers]({name}.png)",
        "",
        made_by(facts),
        table([*columns, ">gradient error"], rows),
        *(f"- {method} was not measured: {why}" for method, why in skipped.items()),
        "",
        "## Targets",
        "",
        table(["quantity", ">value", "target", "verdict"], targets),
    ]
    return "\n".join(lines), {f"{name}.png": figure}


def train_page(facts: dict, name: str) -> tuple[str, dict]:
    """Of `python -m kdlib bench train`."""
    shapes = facts["shapes"]
    measured = [row for row in facts["rows"] if "tokens_per_s" in row]
    speed = {row["row"]: row["tokens_per_s"] for row in measured}
    memory = {row["row"]: row["peak_mib"] / 1024 for row in measured}
    figures = {
        f"{name}_speed.png": bars({"": speed}, "tokens a second", "{:,.0f}"),
        f"{name}_memory.png": bars({"": memory}, "peak memory, GiB", "{:.1f}"),
    }
    rows = [
        [
            row["row"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['ratio']:.2f}",
            f"{row['step_ms']:,.1f}",
            f"{row['peak_mib']:,}",
            f"{row['mfu']:.2f}" if row.get("mfu") else "",
        ]
        for row in measured
    ]
    skipped = {r["row"]: r["skipped"] for r in facts["rows"] if "skipped" in r}
    targets = [
        [
            f"{t['row']}: {UNITS.get(t['quantity'], t['quantity'])}"
            + (f" over {t['over']}" if t["over"] else ""),
            "" if t["value"] is None else f"{t['value']:g}",
            f"{'at most' if t['quantity'] == 'peak_mib' else 'at least'} "
            f"{t['limit']:g}",
            "met" if t["verdict"] == "met" else f"**{t['verdict']}**",
        ]
        for t in facts["targets"]
    ]
    columns = ["row", ">tokens/s", ">x GKD", ">step ms", ">peak MiB", ">MFU"]
    lines = [
        f"# The training loop, on {device(facts)}",
        "",
        f"{shapes['batch']} x {shapes['length']:,} tokens a step. Medians of "
        f"{facts['steps']} steps a round, after {facts['warm_up']} to warm up; "
        f"rounds: {facts['rounds']}.",
        "",
        f"![Tokens a second of each row; the table below has the same numbers]"
        f"({name}_speed.png)",
        "",
        f"![Peak memory of each row; the table below has the same numbers]"
        f"({name}_memory.png)",
        "",
        made_by(facts),
        facts.get("note", ""),
        "",
        table(columns, rows),
        *(f"- {row} was not measured: {why}" for row, why in skipped.items()),
        "",
        "## Targets",
        "",
        table(["quantity", ">value", "target", "verdict"], targets),
    ]
    return "\n".join(lines), figures


def device(facts: dict) -> str:
    return facts["device"].partition(" (")[0]
