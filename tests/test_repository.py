"""What the repository promises about its commands, its versions and its files."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import no_network
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kdlib

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIREMENT_FILES = sorted(path.name for path in ROOT.glob("requirements*.txt"))


def requirements(name):
    """Canonical name -> requirement, for one file."""
    lines = (ROOT / name).read_text().splitlines()
    found = [Requirement(x) for x in lines if x.strip() and not x.startswith("#")]
    return {canonicalize_name(item.name): item for item in found}


def repository_files():
    """Every file that is, or is about to be, under version control."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


# --- The README and its commands ---


def commands(markdown):
    """The commands of the fenced shell blocks, comments left out."""
    blocks = re.findall(r"```(?:bash|sh|shell|console)?\n(.*?)```", markdown, re.S)
    lines = (line.partition("#")[0].strip() for line in "".join(blocks).splitlines())
    return [line.removeprefix("$ ") for line in lines if line]


def experiment(name):
    path = ROOT / "notebooks" / "experiments" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_s_numbers_are_those_of_the_result_file():
    seeds = experiment("quickstart_seeds")
    assert seeds.table(json.loads(seeds.RESULT.read_text())) in README


def test_the_teacher_s_card_gives_the_scores_of_the_result_file():
    teacher = experiment("make_teacher")
    scores = json.loads(teacher.RESULT.read_text())["scores"]
    card = (ROOT / "kdlib" / "data" / "teacher" / "README.md").read_text()
    for context, entry in scores.items():
        row = (
            f"| {context} | {entry['mean_exact_match']:.3f} | {entry['mean_kl']:.3f} |"
        )
        assert row in card
    # What the course promises of its teacher.
    assert scores["instruction"]["mean_exact_match"] >= 0.97
    assert scores["examples, 4 shown"]["mean_exact_match"] >= 0.97
    assert scores["nothing"]["mean_exact_match"] <= 0.30


def test_badges_and_clones_name_the_repository_of_the_setting():
    wanted = PROJECT["tool"]["kdlib"]["repository"]
    texts = {"README.md": README}
    for path in (ROOT / "notebooks" / "src").glob("*.py"):
        texts[path.name] = path.read_text(encoding="utf-8")
    for name, text in texts.items():
        badges = re.findall(
            r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)", text
        )
        clones = re.findall(r"https://github\.com/([\w.-]+/[\w.-]+)\.git", text)
        assert badges, f"{name} has no badge"
        assert set(badges + clones) == {wanted}, name


def test_readme_opens_with_the_two_commands():
    first = [x for x in commands(README) if not x.startswith(("git clone", "cd "))]
    assert first[:2] == ["make quickstart", "make test"]


def test_every_goal_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    goals = set(re.findall(r"^([a-z]+):", makefile, re.M))
    assert {"quickstart", "test", "lab", "check", "notebooks", "clean"} <= goals
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        named = set(re.findall(r"`make ([a-z]+)", text))
        named |= set(re.findall(r"^make ([a-z]+)", "\n".join(commands(text)), re.M))
        assert named <= goals, f"{document} names {named - goals}"


def test_pip_lines_name_files_that_exist():
    lines = [line for line in commands(README) if "pip install" in line]
    assert lines, "the README gives no pip lines for systems without make"
    for line in lines:
        for name in re.findall(r"(?:-r|-c)\s*(\S+)", line):
            assert (ROOT / name).is_file(), f"{line!r} names {name}"


def test_readme_shows_one_picture_in_words_too():
    ((words, path),) = re.findall(r"(?<!\[)!\[([^]]*)\]\(([^)]+)\)", README)
    assert len(words.split()) >= 20  # for who does not see it
    picture = ROOT / path
    assert picture in repository_files() and picture.stat().st_size < 100_000


def test_ci_runs_the_readmes_test_command():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "set -euo pipefail" in lines and lines[-1] == "make test"


# --- Requirements, pins and versions ---


@pytest.mark.parametrize("name", REQUIREMENT_FILES)
def test_every_requirement_is_pinned_to_a_version_that_it_admits(name):
    pins = requirements("constraints.txt")
    for key, requirement in requirements(name).items():
        assert key in pins, f"constraints.txt has no pin for {requirement}"
        (pin,) = pins[key].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), (
            f"{requirement}, {pins[key]}"
        )


# A range that Colab does not meet makes pip replace a package there: gigabytes, and a
# restart. Its Python and torch cannot be had from tests/colab_constraints.txt.
COLAB = requirements("tests/colab_constraints.txt")
COLAB_TORCH = "2.11.0"


def test_colab_satisfies_the_ranges():
    course = requirements("requirements.txt")
    assert course["torch"].specifier.contains(COLAB_TORCH)
    shared = COLAB.keys() & course.keys()
    assert {"transformers", "numpy", "ipywidgets", "matplotlib"} <= shared
    for name in shared:
        (pin,) = COLAB[name].specifier
        assert course[name].specifier.contains(pin.version), name


def test_the_package_and_the_course_ask_for_the_same():
    project = PROJECT["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["notebooks"]
    course = map(str, requirements("requirements.txt").values())
    assert sorted(asked) == sorted(course)


def runtime_imports():
    """Top-level names that kdlib imports, the type checker's imports left out."""
    for path in sorted((ROOT / "kdlib").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for_types = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        for node in set(ast.walk(tree)) - for_types:
            if isinstance(node, ast.Import):
                yield from (
                    (path, alias.name.partition(".")[0]) for alias in node.names
                )
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield path, node.module.partition(".")[0]


def test_what_kdlib_imports_is_a_declared_dependency():
    declared = set(requirements("requirements.txt")) | {
        "ipython",  # in every kernel that runs a notebook
        "babel",  # makes the corpus anew; reading it needs none
        "triton",  # comes with CUDA builds of torch
    }
    for path, name in runtime_imports():
        known = name in sys.stdlib_module_names or name == "kdlib"
        assert known or canonicalize_name(name) in declared, f"{path}: import {name}"


def closure(names):
    """Distributions that installing `names` brings, from the installed metadata."""
    found, todo = set(), list(names)
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                todo.append(need.name)
    return found


def test_smollm2_needs_nothing_that_no_deps_leaves_out():
    course = closure(requirements("requirements.txt"))
    assert closure(["gguf", "accelerate"]) - {"gguf", "accelerate"} <= course


def test_the_version_stands_in_one_place_and_is_cited():
    assert "version" in PROJECT["project"]["dynamic"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(cited["version"]) == kdlib.__version__
    assert cited["license"] == PROJECT["project"]["license"] == "Apache-2.0"
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"[{kdlib.__version__}]" in changes or "[Unreleased]" in changes


def test_the_licence_is_there_in_full():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "The kdlib authors" in text and "[name of copyright owner]" not in text


# --- Files ---

# Folders that only the writer's machine has. (Split, so as not to match itself.)
FOREIGN = re.compile(
    r"(?<![\w.<>-])/"
    + r"(?:root|work|farm|tmp|home/\w+|Users/\w+)/|[A-Z]:\\"
    + r"Users\\"
)


def test_no_file_names_a_folder_of_the_machine_it_was_written_on():
    assert FOREIGN.search("see " + "/home/" + "me/kdlib")
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for match in FOREIGN.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{path.relative_to(ROOT)}:{line}: {match[0]}")
    assert not found, "\n".join(found)


def test_a_wheel_holds_the_package_and_its_data(tmp_path):
    copy = tmp_path / "copy"  # setuptools leaves a build folder beside its source
    for path in repository_files():
        name = path.relative_to(ROOT)
        if name.parts[0] in ("kdlib", "pyproject.toml", "README.md", "LICENSE"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy / name)
    command = "pip wheel -q --no-deps --no-build-isolation -w wheels".split()
    done = subprocess.run(
        [sys.executable, "-m", *command, str(copy)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert wheel.name.startswith(f"kdlib-{kdlib.__version__}-")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(copy))
        for path in (copy / "kdlib").rglob("*")
        if path.is_file()
    }
    assert "kdlib/__init__.py" in wanted
    assert any(name.startswith("kdlib/data/") for name in wanted)
    assert wanted <= held, f"the wheel lacks {sorted(wanted - held)}"
    assert any(name.endswith("/LICENSE") for name in held)


# --- No network ---


@pytest.fixture
def forgiven():
    """Let a test try to reach another machine on purpose."""
    yield
    no_network.attempts.clear()


OUTSIDE = ("192.0.2.1", 80)  # reserved for documentation, RFC 5737


def test_connections_to_other_machines_are_refused(forgiven):
    with pytest.raises(no_network.NetworkBlocked):
        socket.create_connection(OUTSIDE, timeout=1)
    with pytest.raises(no_network.NetworkBlocked):
        socket.socket().connect(OUTSIDE)
    with pytest.raises(no_network.NetworkBlocked):
        socket.socket().connect_ex(OUTSIDE)
    with pytest.raises(no_network.NetworkBlocked):
        socket.getaddrinfo("example.org", 80)
    assert len(no_network.attempts) == 4


def test_connections_to_this_machine_are_allowed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
        socket.create_connection(("localhost", server.getsockname()[1])).close()


def test_processes_that_a_test_starts_are_guarded_too():
    code = f"import socket; socket.create_connection({OUTSIDE}, timeout=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "NetworkBlocked" in done.stderr


def test_a_test_that_swallows_the_refusal_fails(tmp_path):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(
        "import socket\n\ndef test_it():\n    try:\n"
        f"        socket.create_connection({OUTSIDE}, timeout=1)\n"
        "    except OSError:\n        pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "1 passed, 1 error" in done.stdout
    assert "tried to reach 192.0.2.1" in done.stdout
