"""Badges and first cells follow one setting, and the first cell fetches the course.

The cell is run as Colab runs it: in an empty folder, where kdlib is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[1]

spec = importlib.util.spec_from_file_location(
    "publish", ROOT / "notebooks" / "publish.py"
)
publish = importlib.util.module_from_spec(spec)
spec.loader.exec_module(publish)

OTHER = "some-one/her.fork"
NAMED = re.compile(
    r"(?:colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/([\w./-]+))"
    r"|(?:https://github\.com/([\w.-]+/[\w.-]+)\.git)"
)


def tracked():
    """What git knows or is about to know, as paths from the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return {name for name in done.stdout.split("\0") if (ROOT / name).is_file()}


@pytest.fixture
def copy(tmp_path):
    """The notebooks and their sources, the README and the setting, in a new folder."""
    for name in tracked():
        parts = Path(name).parts
        if name in ("README.md", "pyproject.toml") or (
            parts[0] in ("notebooks", "exercises")
            and (name.endswith(".ipynb") or "src" in parts)
        ):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def set_repository(root, value):
    path = root / "pyproject.toml"
    was = f'repository = "{publish.repository()}"'
    text = path.read_text(encoding="utf-8")
    assert was in text
    path.write_text(text.replace(was, f'repository = "{value}"'), encoding="utf-8")


# --- The setting ---


def dead_badges(text, files):
    """The files that its badges open and that are not there."""
    opened = [path for _, path, _ in NAMED.findall(text) if path]
    return [path for path in opened if path not in files]


def test_every_badge_opens_a_file_under_version_control():
    files = tracked()
    texts = [name for name in files if name.endswith((".md", ".ipynb", ".py"))]
    found = 0
    for name in texts:
        if name.startswith(("tests/", "notebooks/publish.py")):
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        found += len(NAMED.findall(text))
        assert not dead_badges(text, files), name
    assert found > 60


def test_a_badge_of_no_file_is_noticed():
    badge = publish.BADGE.format("o/r", "notebooks/99_nothing.ipynb")
    assert dead_badges(badge, tracked()) == ["notebooks/99_nothing.ipynb"]


@pytest.mark.slow
def test_all_badges_and_first_cells_follow_the_setting(copy):
    set_repository(copy, OTHER)
    outputs = {
        path: [cell.get("outputs") for cell in nbformat.read(path, 4).cells]
        for path in sorted(copy.rglob("*.ipynb"))
    }
    changed = set(publish.publish(copy))
    everything = {
        path.relative_to(copy).as_posix()
        for path in copy.rglob("*")
        if path.suffix in (".ipynb", ".py", ".md") and "ruff" not in path.name
    }
    assert changed == everything

    for path in (copy / name for name in changed):
        text = path.read_text(encoding="utf-8")
        named = {a or b for a, _, b in NAMED.findall(text)}
        assert named == {OTHER}, path
        assert publish.repository() not in text, path
    for path, before in outputs.items():
        cells = nbformat.read(path, as_version=4).cells
        assert [cell.get("outputs") for cell in cells] == before
    # The way back gives the same bytes.
    set_back = (
        (copy / "pyproject.toml").read_text().replace(OTHER, publish.repository())
    )
    (copy / "pyproject.toml").write_text(set_back)
    publish.publish(copy)
    for name in changed:
        assert (copy / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_sources_and_readme_are_in_line():
    assert publish.publish(write=False) == []


def test_check_names_what_is_not_in_line_and_writes_nothing(copy):
    set_repository(copy, OTHER)
    before = (copy / "README.md").read_bytes()
    assert "README.md" in publish.publish(copy, write=False)
    assert (copy / "README.md").read_bytes() == before


@pytest.mark.parametrize("value", ["kdlib", "https://github.com/a/b", "a b/c", ""])
def test_a_setting_that_is_no_repository_is_refused(copy, value):
    set_repository(copy, value)
    with pytest.raises(publish.PublishError, match="owner/name"):
        publish.publish(copy)


GOOD = (ROOT / "notebooks" / "src" / "00_quickstart.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[![Open in Colab]", "[Open in Colab]", "needs one badge"),
        ('find_spec("kdlib")', "nothing", "does not fetch the course"),
    ],
)
def test_a_source_that_lacks_either_is_refused(old, new, says):
    assert old in GOOD
    with pytest.raises(publish.PublishError, match=says):
        publish.source(GOOD.replace(old, new), "notebooks/a.ipynb", "o/r")


@pytest.mark.parametrize("added", ["\n# %%\nprint(1)\n", "print(1)\n"])
def test_a_notebook_that_needs_a_run_is_refused(copy, added):
    """One more cell, or a longer last one: its outputs may be others."""
    set_repository(copy, OTHER)
    path = copy / "notebooks" / "src" / "05_kl_divergence.py"
    path.write_text(path.read_text(encoding="utf-8") + added, encoding="utf-8")
    with pytest.raises(publish.PublishError, match="05_kl_divergence.*Build it anew"):
        publish.publish(copy)


# --- The first cell ---

CELL = publish.FIRST_CELL.format(repository=publish.repository())
# Whatever this environment's kdlib was installed by, the cell must not find it.
NOT_INSTALLED = f"""\
import importlib.util, pathlib, sys
sys.path[:] = [p for p in sys.path if not (pathlib.Path(p or ".") / "kdlib").exists()]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in f"{{f}}".lower()]
for name in [n for n in sys.modules if n.partition(".")[0] == "kdlib"]:
    del sys.modules[name]
assert importlib.util.find_spec("kdlib") is None, {str(ROOT)!r}
"""
SHOW = "import json; print(json.dumps([kdlib.__file__, PROFILE]))"
NOWHERE = "file:///no/such/repository"


def run_cell(folder, repository=None, **environment):
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "KD_REPO", "KD_PROFILE")
    }
    if repository is not None:
        environment["KD_REPO"] = repository
    return subprocess.run(
        [sys.executable, "-c", NOT_INSTALLED + CELL + SHOW],
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """A repository to clone, with the package under version control, as it is now."""
    folder = tmp_path_factory.mktemp("remote") / "a course"  # with a space
    for name in tracked():
        if name.startswith("kdlib/") and name.endswith(".py"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for command in (
        ["init", "--quiet"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "course"],
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder.as_uri().replace("%20", " ")


def test_in_an_empty_folder_it_fetches_the_course_once(tmp_path, remote):
    for source in (remote, NOWHERE):  # the second time there is nothing to fetch
        done = run_cell(tmp_path, source)
        assert done.returncode == 0, done.stderr
        path, profile = json.loads(done.stdout)
        assert Path(path) == tmp_path / "kdlib-course" / "kdlib" / "__init__.py"
        assert profile == "cpu"
    assert [path.name for path in tmp_path.iterdir()] == ["kdlib-course"]


def test_inside_a_clone_it_fetches_nothing(tmp_path):
    for name in ("__init__.py", "errors.py"):
        path = tmp_path / "kdlib" / name
        path.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "kdlib" / name, path)
    below = tmp_path / "exercises" / "solutions"
    below.mkdir(parents=True)
    done = run_cell(below, NOWHERE, KD_PROFILE="gpu")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [str(tmp_path / "kdlib" / "__init__.py"), "gpu"]
    assert list(below.iterdir()) == []


@pytest.mark.parametrize("case", ["no such repository", "no git", "cut off"])
def test_where_it_cannot_be_fetched_the_cell_says_what_to_do(tmp_path, remote, case):
    source, environment = remote, {}
    if case == "no such repository":
        source = NOWHERE
    elif case == "no git":
        environment = {"PATH": ""}
    else:  # an earlier clone was killed, and left a folder that is no course
        (tmp_path / "kdlib-course" / ".git").mkdir(parents=True)
    done = run_cell(tmp_path, source, **environment)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert f'git clone --depth=1 "{source}" kdlib-course' in done.stderr
    reason = {
        "no such repository": "does not appear to be a git repository",
        "no git": "not found",
        "cut off": "already exists",
    }
    assert reason[case] in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "Needed: git and a network (Kaggle: Settings, Internet)."
        " Delete kdlib-course if it is here. Run this again."
    )
    # And what it says to do helps.
    shutil.rmtree(tmp_path / "kdlib-course", ignore_errors=True)
    assert run_cell(tmp_path, remote).returncode == 0


def test_in_a_kernel_it_stops_the_run_with_its_message(tmp_path, monkeypatch):
    """SystemExit ends no kernel, but `Run all` stops at the cell that raised it."""
    monkeypatch.setenv("KD_REPO", NOWHERE)
    cells = [
        nbformat.v4.new_code_cell(source)
        for source in (NOT_INSTALLED, CELL, "print('went on')")
    ]
    client = NotebookClient(
        nbformat.v4.new_notebook(cells=cells),
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    with pytest.raises(CellExecutionError, match="Needed: git and a network"):
        client.execute()
    assert not client.nb.cells[2].outputs
