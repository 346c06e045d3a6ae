"""The notebooks are their sources, run, and keep the rules of the course.

Whether their outputs come out again is nbval's to test: pytest --nbval notebooks/.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

spec = importlib.util.spec_from_file_location("build", ROOT / "notebooks" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

ALLOWED_MAGICS: frozenset[str] = frozenset()  # none so far: nbval passes failing magics
CELL_LINES = 25
COLUMNS = 79
PARAGRAPH_WORDS = 150
BADGE = re.compile(
    r"colab\.research\.google\.com/github/[\w.-]+/[\w.-]+/blob/main/(\S+?)\)"
)


# --- The rules: each takes a notebook and its file name, and yields what breaks it. ---


def of_type(notebook, cell_type):
    return (
        (f"cell {number}", cell)
        for number, cell in enumerate(notebook.cells, start=1)
        if cell.cell_type == cell_type
    )


def plain_python(notebook, name):
    """No magic and no shell line: Colab, Lab and the tests all run the same code."""
    for where, cell in of_type(notebook, "code"):
        lines = [x for x in cell.source.splitlines() if x not in ALLOWED_MAGICS]
        try:
            ast.parse("\n".join(lines))
        except SyntaxError as error:
            yield f"{where} is not plain Python: {error.text!r}"


def no_widget_state(notebook, name):
    """GitHub refuses a page with half a state; random ids make every rebuild differ."""
    if "widgets" in notebook.metadata:
        yield "metadata.widgets is there"
    for where, cell in of_type(notebook, "code"):
        for output in cell.outputs:
            view = output.get("data", {}).get(build.WIDGET, {})
            if "model_id" in view and not re.fullmatch(r"0{20}\d{12}", view.model_id):
                yield f"{where} has the random widget id {view.model_id}"


def shows_something(source):
    """Whether a cell with this source must have left an output."""
    body = ast.parse(source).body
    if not body or not isinstance(body[-1], ast.Expr):
        return False
    value = body[-1].value
    if isinstance(value, ast.Call):
        called = ast.unparse(value.func)
        return called in ("print", "display", "plt.show")
    return not isinstance(value, ast.Constant) or value.value is not None


def executed(notebook, name):
    """Run once, from top to bottom; what prints or displays has an output."""
    for expected, (where, cell) in enumerate(of_type(notebook, "code"), start=1):
        if cell.execution_count != expected:
            yield f"{where} has execution count {cell.execution_count}, not {expected}"
        try:
            wanted = shows_something(cell.source)
        except SyntaxError:
            continue  # plain_python reports it
        if wanted and not cell.outputs:
            yield f"{where} should have an output"


def clean_outputs(notebook, name):
    """No warnings, no unannounced errors, no times."""
    for where, cell in of_type(notebook, "code"):
        if "execution" in cell.metadata:
            yield f"{where} keeps the times of its execution"
        for output in cell.outputs:
            if output.get("name") == "stderr":
                yield f"{where} wrote to stderr: {output.text[:80]!r}"
            if output.output_type == "error" and "raises-exception" not in (
                cell.metadata.get("tags", [])
            ):
                yield f"{where} ended in {output.ename}"


def small_cells(notebook, name):
    for number, cell in enumerate(notebook.cells, start=1):
        lines = cell.source.splitlines()
        if len(lines) > CELL_LINES:
            yield f"cell {number} has {len(lines)} lines"
        for line in lines:
            unbreakable = cell.cell_type == "markdown" and (
                "](" in line or "://" in line or line.startswith("|")
            )
            if len(line) > COLUMNS and not unbreakable:
                yield f"cell {number} has a line of {len(line)} columns: {line!r}"


def short_paragraphs(notebook, name):
    for where, cell in of_type(notebook, "markdown"):
        for paragraph in re.split(r"\n\s*\n", cell.source):
            words = len(paragraph.split())
            if words > PARAGRAPH_WORDS:
                yield f"{where} has a paragraph of {words} words: {paragraph[:60]!r}"


def own_badge(notebook, name):
    """The Colab badge opens this very notebook."""
    first = notebook.cells[0].source if notebook.cells else ""
    targets = BADGE.findall(first)
    if targets != [f"notebooks/{name}"]:
        yield f"the badge of the first cell opens {targets}, not notebooks/{name}"


RULES = [
    plain_python,
    no_widget_state,
    executed,
    clean_outputs,
    small_cells,
    short_paragraphs,
    own_badge,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps(rule, path):
    broken = list(rule(nbformat.read(path, as_version=4), path.name))
    assert not broken, "\n".join(broken)


def by_first_code(notebooks):
    """The notebooks' names, grouped by their first code cell."""
    groups = {}
    for name, notebook in notebooks.items():
        source = next(cell.source for _, cell in of_type(notebook, "code"))
        groups.setdefault(source, []).append(name)
    return list(groups.values())


def test_the_first_code_cell_is_the_same_everywhere():
    notebooks = {path.name: nbformat.read(path, as_version=4) for path in NOTEBOOKS}
    groups = by_first_code(notebooks)
    assert len(groups) == 1, f"the first code cell differs between {groups}"


def test_the_notebooks_are_what_their_sources_give():
    command = [sys.executable, "notebooks/build.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- Each rule fails on a notebook that breaks it, and on no other. ---


def good_notebook():
    badge = (
        "https://colab.research.google.com/github/o/r/blob/main/notebooks/good.ipynb"
    )
    view = {build.WIDGET: {"model_id": f"{1:032x}"}, "text/plain": "<slider>"}
    cells = [
        new_markdown_cell(f"# Good\n\n[![Open in Colab](badge.svg)]({badge})"),
        new_code_cell(
            "print(1)",
            execution_count=1,
            outputs=[new_output("stream", name="stdout", text="1\n")],
        ),
        new_code_cell(
            "slider", execution_count=2, outputs=[new_output("display_data", data=view)]
        ),
        new_code_cell("x = 5 % 3", execution_count=3),
    ]
    return new_notebook(cells=cells, metadata=build.METADATA)


def code(source):
    return lambda nb: nb.cells[3].update(source=source)


def text(source):
    return lambda nb: nb.cells.append(new_markdown_cell(source))


def output(*args, **kwargs):
    return lambda nb: nb.cells[3].outputs.append(new_output(*args, **kwargs))


BREAKS = [
    (plain_python, code("%no_such_magic\nraise ValueError")),
    (plain_python, code("!ls")),
    (plain_python, code("files = !ls")),
    (plain_python, code("%%time\nx = 1")),
    (no_widget_state, lambda nb: nb.metadata.update(widgets={})),
    (
        no_widget_state,
        output("display_data", data={build.WIDGET: {"model_id": "5f2c" * 8}}),
    ),
    (executed, lambda nb: nb.cells[3].update(execution_count=None)),
    (executed, lambda nb: nb.cells[3].update(execution_count=7)),
    (executed, lambda nb: nb.cells[1].update(outputs=[])),
    (executed, lambda nb: nb.cells[2].update(outputs=[])),
    (executed, code("fig, ax = plt.subplots()\nplt.show()")),
    (clean_outputs, output("stream", name="stderr", text="UserWarning")),
    (clean_outputs, output("error", ename="ValueError", evalue="", traceback=[])),
    (clean_outputs, lambda nb: nb.cells[3].metadata.update(execution={})),
    (small_cells, code("\n".join("x = 1" for _ in range(26)))),
    (small_cells, code("x = '" + "a" * 80 + "'")),
    (small_cells, text("a" * 80)),
    (short_paragraphs, text("word\n" * 10 + "a word or two " * 38 + "more")),
    (own_badge, lambda nb: nb.cells.pop(0)),
    (own_badge, lambda nb: nb.cells[0].update(source="# No badge")),
    (
        own_badge,
        lambda nb: nb.cells[0].update(
            source=nb.cells[0].source.replace("good", "other")
        ),
    ),
]


def test_a_good_notebook_breaks_no_rule():
    assert [x for rule in RULES for x in rule(good_notebook(), "good.ipynb")] == []


def test_every_rule_has_a_notebook_that_breaks_it():
    assert {rule for rule, _ in BREAKS} == set(RULES)


@pytest.mark.parametrize(
    ("rule", "spoil"),
    BREAKS,
    ids=[f"{r.__name__}-{i}" for i, (r, _) in enumerate(BREAKS)],
)
def test_a_bad_notebook_breaks_its_rule(rule, spoil):
    notebook = good_notebook()
    spoil(notebook)
    broken = {r for r in RULES if list(r(notebook, "good.ipynb"))}
    assert rule in broken


def test_another_first_code_cell_is_noticed():
    notebooks = {name: good_notebook() for name in "abc"}
    assert by_first_code(notebooks) == [["a", "b", "c"]]
    notebooks["b"].cells[1].source = "print(2)"
    assert by_first_code(notebooks) == [["a", "c"], ["b"]]


# --- The build. ---

SOURCE = """\
# %% [markdown]
# # Title

# %% tags=["some-tag"]
x = 1

# %%
print(x + 1)

# %%
print(x + 1)
"""


@pytest.fixture
def built(tmp_path):
    """A source and its notebook, the outputs left out."""
    source, target = tmp_path / "a.py", tmp_path / "a.ipynb"
    source.write_text(SOURCE)
    build.write(build.from_source(SOURCE), target)
    return source, target


def test_cell_ids_are_unique_and_come_from_the_content():
    ids = [cell.id for cell in build.from_source(SOURCE).cells]
    assert len(set(ids)) == 4
    assert ids == [cell.id for cell in build.from_source(SOURCE).cells]
    longer = "# %%\nimport os\n\n" + SOURCE
    assert [cell.id for cell in build.from_source(longer).cells][1:] == ids


def test_tags_reach_the_notebook():
    assert build.from_source(SOURCE).cells[1].metadata == {"tags": ["some-tag"]}


def test_check_accepts_what_was_built_and_ignores_outputs(built):
    source, target = built
    assert build.difference(source, target) is None
    notebook = nbformat.read(target, as_version=4)
    notebook.cells[2].execution_count = 2
    notebook.cells[2].outputs = [new_output("stream", text="3\n")]
    build.write(notebook, target)
    assert build.difference(source, target) is None


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("x = 1", "x = 2", "cell 2 differs in its source"),
        ("# # Title", "# # Other", "cell 1 differs in its source"),
        ("some-tag", "other-tag", "cell 2 differs in its metadata"),
        ("# %% [markdown]", "# %%", "cell 1 differs in its cell_type"),
        ("# %%\nprint(x + 1)\n\n# %%\n", "# %%\n", "cell 4 is only in the notebook"),
        ("# # Title\n", "# # Title\n\n# %%\nx = 0\n", "cell 2 differs in its source"),
    ],
)
def test_check_names_the_first_cell_that_differs(built, old, new, says):
    source, target = built
    assert old in SOURCE
    source.write_text(SOURCE.replace(old, new, 1))
    assert says in build.difference(source, target)


def test_check_sees_other_differences(built):
    source, target = built
    source.write_text(SOURCE + "\n# %%\nx\n")
    assert "cell 5 is only in the source" in build.difference(source, target)
    source.write_text(SOURCE)
    notebook = nbformat.read(target, as_version=4)
    notebook.metadata.language_info.version = "3.11.7"
    build.write(notebook, target)
    assert "metadata" in build.difference(source, target)
    target.unlink()
    assert "not been built" in build.difference(source, target)


def test_check_exits_1_and_names_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text(SOURCE)
    build.write(build.from_source(SOURCE), tmp_path / "a.ipynb")
    assert build.main(["--check"]) == 0
    (tmp_path / "src" / "a.py").write_text(SOURCE.replace("x = 1", "x = 2"))
    build.write(build.from_source(SOURCE), tmp_path / "stray.ipynb")
    assert build.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert "a.ipynb: cell 2" in said and "stray.ipynb: it has no source" in said
    with pytest.raises(SystemExit):
        build.main(["--check", "no_such_chapter"])
    assert "a" in capsys.readouterr().err


def test_two_builds_give_the_same_bytes(tmp_path):
    source, target = tmp_path / "a.py", tmp_path / "a.ipynb"
    source.write_text(
        "# %%\nimport ipywidgets\nimport kdlib\n\nslider = ipywidgets.IntSlider()\n"
        "slider\n\n# %%\nslider\n\n# %%\nprint(kdlib.__version__)\n\n"
        '# %% tags=["raises-exception"]\nkdlib.nothing\n'
    )
    build.build(source, target)
    first = target.read_bytes()
    build.build(source, target)
    assert target.read_bytes() == first
    assert str(ROOT).encode() not in first
    notebook = nbformat.read(target, as_version=4)
    assert [cell.execution_count for cell in notebook.cells] == [1, 2, 3, 4]
    assert not list(no_widget_state(notebook, "a.ipynb"))
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("raise ValueError('seen')", "ValueError: seen"),
        ("%no_such_magic", "no_such_magic"),
        ("import os\n\nos._exit(1)", "died"),
        ('# tagged\nx = "raised nothing"', "raised nothing"),
    ],
    ids=["error", "magic", "dead kernel", "tagged"],
)
def test_a_failing_cell_stops_the_build_and_leaves_the_old_notebook(
    tmp_path, monkeypatch, capsys, cell, says
):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    (tmp_path / "src").mkdir()
    tag = ' tags=["raises-exception"]' if cell.startswith("# tagged") else ""
    (tmp_path / "src" / "a.py").write_text(f"# %%\nx = 1\n\n# %%{tag}\n{cell}\n")
    (tmp_path / "a.ipynb").write_text("old")
    assert build.main([]) == 1
    said = capsys.readouterr().err
    assert "a.ipynb, cell 2" in said and cell in said and says in said
    assert (tmp_path / "a.ipynb").read_text() == "old"
