"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

from html import escape

from instructor import report

COLOURS = dict(
    zip(report.OUTCOMES, ["#2e7d5b", "#d9963a", "#b5483a", "#c9c9c9"], strict=True)
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem;
       padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; margin: .5rem 0 2rem }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top;
         border-bottom: 1px solid #ddd }
th { font-weight: 600 } td.number { text-align: right }
.bar { display: flex; width: 16rem; height: 1rem } .bar span { display: block }
.key span { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0 1rem }
"""


def page(result: dict) -> str:
    """HTML of what `report.show` prints, with a bar for each question's outcomes."""
    title = f"{result['chapter']}: {len(result['students'])} students"
    made = f"Graded {result['graded']} from {result['submissions']}."
    parts = [
        "<!doctype html>",
        '<html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(made)}</p>",
        _bars(result),
    ]
    for heading, rows in report.tables(result):
        parts += [f"<h2>{escape(heading)}</h2>", _table(rows)]
    parts.append(f"<p>{escape(report.walls(result))}</p></html>")
    return "\n".join(parts) + "\n"


def _bars(result: dict) -> str:
    key = "".join(
        f'<span style="background:{colour}"></span>{escape(outcome)}'
        for outcome, colour in COLOURS.items()
    )
    rows = []
    for row in report.questions(result)[1:]:
        counts = [int(text) for text in row[1 : 1 + len(report.OUTCOMES)]]
        said = ", ".join(
            f"{n} {outcome}"
            for outcome, n in zip(report.OUTCOMES, counts, strict=True)
            if n
        )
        spans = "".join(
            f'<span style="width:{100 * n / sum(counts):.2f}%;'
            f'background:{COLOURS[outcome]}"></span>'
            for outcome, n in zip(report.OUTCOMES, counts, strict=True)
            if n
        )
        rows.append(
            f"<tr><th>{escape(row[0])}</th>"
            f'<td><div class="bar" role="img" aria-label="{said}">{spans}</div></td>'
            f"<td>{said}</td></tr>"
        )
    return f'<p class="key">{key}</p><table>{"".join(rows)}</table>'


def _table(rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows[1:]
    )
    return f"<table><tr>{head}</tr>{body or '<tr><td>none</td></tr>'}</table>"


def _cell(text: str) -> str:
    number = text.replace(".", "", 1).isdigit()
    return f"<td{' class=number' if number else ''}>{escape(text)}</td>"
