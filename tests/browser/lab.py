"""JupyterLab and a browser, as a student has them: what the tests of this folder drive.

The server is the environment's own JupyterLab, with settings, workspaces and profile of
its own in a new folder. Notebooks are copied there, so nothing that is typed comes
back. One document at a time is shown, without launcher and side bars.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import socket
import subprocess
import symtable
import sys
import time
import urllib.request
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[2]
WIDGET = "application/vnd.jupyter.widget-view+json"
PATIENCE = 400  # seconds for what takes a few on a quiet machine
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"  # of first cells
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    # All cells are in the page, also those that have been scrolled out of sight.
    "notebook-extension/tracker": {
        "autoStartDefaultKernel": True,
        "windowingMode": "none",
    },
    "docmanager-extension/plugin": {"autosave": False},
}


class Lab:
    """A JupyterLab that serves `folder`; stop it with `stop`."""

    def __init__(self, scratch: Path):
        self.folder = scratch / "notebooks"
        self.folder.mkdir(parents=True)
        self.log = scratch / "lab.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        for name, settings in SETTINGS.items():
            file = scratch / f"settings/@jupyterlab/{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(settings))
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
                *("--ip=127.0.0.1", f"--port={self.url.rpartition(':')[2]}"),
                *("--ServerApp.port_retries=0", "--IdentityProvider.token="),
                *("--ServerApp.password=", f"--ServerApp.root_dir={self.folder}"),
                "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            ],
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            env=os.environ
            | {
                "JUPYTERLAB_SETTINGS_DIR": str(scratch / "settings"),
                "JUPYTERLAB_WORKSPACES_DIR": str(scratch / "workspaces"),
                "JUPYTER_CONFIG_DIR": str(scratch / "config"),
                "JUPYTER_RUNTIME_DIR": str(scratch / "runtime"),
                "JUPYTER_DATA_DIR": str(scratch / "data"),
                "IPYTHONDIR": str(scratch / "ipython"),
            },
        )
        try:
            wait(self._answers, "JupyterLab")
        except BaseException:
            self.stop()
            raise

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"JupyterLab ended:\n{self.log.read_text()[-2000:]}")
        try:
            self.api("")
        except OSError:
            return False
        return True

    def api(self, path: str, method: str = "GET"):
        """What the server's REST interface says; None where it says nothing."""
        request = urllib.request.Request(f"{self.url}/api/{path}", method=method)
        text = urllib.request.urlopen(request, timeout=10).read()
        return json.loads(text) if text else None

    def kernel(self, name: str) -> dict | None:
        """The kernel of an open notebook."""
        sessions = [s for s in self.api("sessions") if s["path"] == name]
        return sessions[0]["kernel"] if sessions else None

    def stop(self) -> None:
        self.process.terminate()  # it ends its kernels
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def wait(true, what: str, seconds: float = PATIENCE):
    """Ask until the answer is true, and return it."""
    end = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not after {seconds} seconds")
        time.sleep(0.1)
    return found


class Student:
    """A notebook that is open in the browser, and the hands on the keyboard."""

    def __init__(self, context, lab: Lab, name: str):
        self.lab, self.name = lab, name
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE * 1000)
        self.errors, self.elsewhere = [], []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._note)
        self.page.goto(f"{lab.url}/doc/tree/{name}?reset")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        # The page says "idle" before there is a kernel; the server does not.
        wait(lambda: self._state() == "idle", f"the kernel of {name}")
        self.page.wait_for_selector(
            '.jp-Notebook-ExecutionIndicator[data-status="idle"]'
        )

    def _note(self, request) -> None:
        ours = (self.lab.url, self.lab.url.replace("http", "ws"))
        if not request.url.startswith((*ours, BADGE, "data:", "blob:", "about:")):
            self.elsewhere.append(request.url)

    def _state(self) -> str | None:
        kernel = self.lab.kernel(self.name)
        return kernel and kernel["execution_state"]

    def run_all(self) -> None:
        """Run all cells by the menu, and wait for the last one."""
        self.page.click('.lm-MenuBar-itemLabel:text-is("Run")')
        self.page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
        self.wait_until_run()

    def wait_until_run(self) -> None:
        def prompts():
            found = self.page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
            return all(x.strip("[]: \n").isdigit() for x in found)

        wait(prompts, f"the cells of {self.name}")

    def complaints(self) -> list[str]:
        """Errors in cells, in the page, and requests to other machines."""
        kinds = ("application/vnd.jupyter.stderr", "application/vnd.jupyter.error")
        selector = ",".join(
            f'.jp-OutputArea-output[data-mime-type="{k}"]' for k in kinds
        )
        shown = self.page.locator(selector).all_inner_texts()
        return [*shown, *self.errors, *self.elsewhere]

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def close(self) -> None:
        """Close the page, and end the kernel that it leaves behind."""
        self.page.close()
        for session in self.lab.api("sessions"):
            with contextlib.suppress(OSError):
                self.lab.api(f"sessions/{session['id']}", "DELETE")


def explorer_cells(path: Path) -> list[int]:
    """Numbers of a notebook's cells whose output is an explorer."""
    cells = nbformat.read(path, as_version=4).cells
    return [
        number
        for number, cell in enumerate(cells)
        if any(WIDGET in o.get("data", {}) for o in cell.get("outputs", []))
    ]


def excerpt(path: Path, number: int, target: Path) -> None:
    """A notebook of one cell and of the code cells that it needs, not yet run.

    They are what a student would run who opens the chapter for this cell alone; to run
    all of a chapter takes minutes. Those up to the one that makes transformers quiet
    are always needed; another one if it binds a name that a needed cell after it reads.
    """
    notebook = nbformat.read(path, as_version=4)
    quiet = (i for i, x in enumerate(notebook.cells) if "quiet_transf" in x.source)
    always, wanted, kept = {number, *range(next(quiet) + 1)}, set(), []
    for at in range(number, -1, -1):
        cell = notebook.cells[at]
        if cell.cell_type != "code":
            continue
        bound, read = names(cell.source)
        if at in always or bound & wanted:
            wanted = (wanted - bound) | read
            cell.outputs, cell.execution_count = [], None
            kept.insert(0, cell)
    notebook.cells = kept
    nbformat.write(notebook, target)


def names(source: str) -> tuple[set[str], set[str]]:
    """Global names that a cell binds, and those that it reads before it does."""
    bound, read = set(), set()
    for statement in in_order(ast.parse(source).body):
        top = symtable.symtable(ast.unparse(statement), "cell", "exec")
        here = {s.get_name(): s for s in top.get_symbols()}
        new = {
            name
            for name, symbol in here.items()
            if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
        }
        read |= {name for name, s in here.items() if s.is_referenced()} - bound
        inner = list(top.get_children())
        for scope in inner:
            inner += scope.get_children()
            free = {s.get_name() for s in scope.get_symbols() if s.is_global()}
            read |= free - bound - new
        bound |= new
    return bound, read


def in_order(statements):
    """Statements without blocks, as they are run: a loop binds before its body."""
    for one in statements:
        if isinstance(one, ast.For):
            yield ast.Assign([one.target], one.iter, lineno=0)
        elif isinstance(one, ast.With):
            for item in one.items:
                target = item.optional_vars or ast.Name("_", ast.Store())
                yield ast.Assign([target], item.context_expr, lineno=0)
        elif isinstance(one, ast.If | ast.While):
            yield ast.Expr(one.test)
        else:
            yield one
            continue
        yield from in_order([*one.body, *getattr(one, "orelse", [])])
