"""The process that students' code runs in.

    python -m instructor.inside FD

It imports torch once and then waits. For every student it forks a keeper, which puts up
the walls and forks once more: that last process runs the student's cells and answers
the grader's requests. The keeper ends it when the grader hangs up.

Knows: how to run a cell and to call a function. Does not know: questions, truths,
points. Whatever it says is taken for what a student's code said.
"""

from __future__ import annotations

import builtins
import gc
import json
import linecache
import os
import select
import signal
import socket
import sys
import types
from multiprocessing.connection import Connection

import torch

import kdlib
from instructor import confine, wire
from kdlib import checks
from kdlib.checks import attempt, losses, suite

CELL_SECONDS = 10.0  # of computing, for one cell
ROOM_SECONDS = 300  # of computing, for all that a student handed in
GRACE = 10.0  # of computing beyond a limit: code that catches every exception goes on
STUBBORN = 124  # the exit code of a process that such code was ended in
WAITING = 60.0  # of waiting, for a call or a cell
MEMORY = 2 << 30
WATCHED = ("exercises/solutions", "data/checks", "kdlib/checks/ch", "wrong_answers")


def main() -> None:
    server = socket.socket(fileno=int(sys.argv[1]))
    torch.set_num_threads(1)
    attempt.WAITING = WAITING
    for name in checks.__all__:
        setattr(checks, name, _silent)
    sys.meta_path.insert(0, _NoCheckers())
    flags = confine.possible()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # pages that are shared stay shared
    while True:
        order, handles, *_ = socket.recv_fds(server, 1 << 16, 2)
        if not order:
            return  # the grader has ended
        if os.fork() == 0:
            server.close()
            try:
                _keep(json.loads(order), flags, *handles)
            finally:
                os._exit(0)
        for handle in handles:
            os.close(handle)
        server.send(b"+")


def _silent(*_: object, **__: object) -> None:
    print("kdlib.checks says nothing while answers are graded.")


class _NoCheckers:
    """Truths are no import away, where no wall hides them either."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.startswith("kdlib.checks."):
            raise ImportError(f"{name} is closed while answers are graded")


# --- The keeper -----------------------------------------------------------------------


def _keep(order: dict, flags: int, talk: int, control: int) -> None:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    flags = flags if order["walls"] else 0
    stand = confine.shut(flags, order["home"], order["hidden"])
    os.chdir(order["home"])
    control_end = socket.socket(fileno=control)
    child = os.fork()
    if child == 0:
        control_end.close()
        try:
            os.setpgid(0, 0)
            confine.hold(MEMORY, ROOM_SECONDS)
            _live(Connection(talk), stand)
        finally:
            os._exit(0)
    os.close(talk)
    status = None
    while status is None:
        hung_up = select.select([control_end], [], [], 0.05)[0]
        over = hung_up or confine.crowded()
        if over:
            os.kill(child, signal.SIGKILL)
        ended, code = os.waitpid(child, 0 if over else os.WNOHANG)
        status = code if ended else None
    try:
        os.killpg(child, signal.SIGKILL)  # what it started, where no wall does that
    except OSError:
        pass
    code = os.waitstatus_to_exitcode(status)
    control_end.send(json.dumps(code).encode())


# --- The student's own process --------------------------------------------------------


def _live(connection: Connection, stand: list[str]) -> None:
    module = types.ModuleType("__main__")
    module.__builtins__ = builtins  # C code that imports looks for it there
    sys.modules["__main__"] = module
    sys.stdin = open(os.devnull)
    signal.signal(signal.SIGPROF, lambda *_: os._exit(STUBBORN))
    saw: set[str] = set()
    sys.addaudithook(_witness(saw))
    connection.send_bytes(wire.dumps({"stand": stand}))
    held: object = None
    while True:
        try:
            request = wire.loads(connection.recv_bytes())
        except EOFError:
            return
        what = request["do"]
        limit = CELL_SECONDS if what == "cell" else attempt.SECONDS
        signal.setitimer(signal.ITIMER_PROF, limit + GRACE)
        if what == "look":
            held = module.__dict__.get(request["name"])
            known = request["name"] in module.__dict__
            reply = {"known": known, "callable": callable(held)}
            if not callable(held):
                reply["value"] = wire.encode(held)
        else:
            reply = _told(_done(what, request, held, module))
        signal.setitimer(signal.ITIMER_PROF, 0)
        number = request["number"]
        answer = wire.dumps({**reply, "saw": sorted(saw), "number": number})
        if len(answer) > wire.LARGEST:
            large = {"too large": type(held).__name__, "number": number}
            answer = wire.dumps(large)
        connection.send_bytes(answer)


def _done(what: str, request: dict, held, module) -> attempt.Attempt:
    if what == "cell":
        return _run(request["source"], request["name"], module)
    if what == "put":
        side, key = request["loss"]
        found = losses.RIGHT[key] if side == "right" else losses.WRONG[key].loss
        return suite.put(held, found)
    arguments = tuple(wire.decode(item) for item in request["arguments"])
    return attempt.attempt(held, arguments)


def _run(source: str, name: str, module) -> attempt.Attempt:
    """One cell, in the student's own namespace."""
    lines = source.splitlines(keepends=True)
    linecache.cache[name] = (len(source), None, lines, name)
    try:
        code = compile(source, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        where = f"\n    in line {line}" if line else ""
        text = f"{type(error).__name__}: {getattr(error, 'msg', error)}{where}"
        return attempt.Attempt(failure="raised", error=text)
    # A module's code as a function: its frames bear the cell's name.
    body = types.FunctionType(code, module.__dict__)
    return attempt.attempt(body, (), CELL_SECONDS)


def _told(tried: attempt.Attempt) -> dict:
    return {
        "value": wire.encode(tried.value),
        "failure": tried.failure,
        "error": tried.error,
        "edited": tried.edited,
        "printed": tried.printed,
        "wrote": tried.wrote,
        "seconds": tried.seconds,
    }


def _witness(saw: set[str]):
    """Notes what is opened or imported that no answer needs."""

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.fsdecode(arguments[0]).replace(os.sep, "/")
            saw.update(part for part in WATCHED if part in path)
        elif event == "import" and str(arguments[0]).startswith("kdlib.checks.ch"):
            saw.add(str(arguments[0])[:40])

    return hook


assert kdlib  # imported here so that no student waits for it

if __name__ == "__main__":
    main()
