"""A room for each student's code, seen from the grader's side.

    with Rooms(hidden) as rooms, rooms.open() as room:
        tried = room.cell("def f(x): ...", "cell 3")
        answer = room.look("f")

A room is a process that is thrown away: see `inside` for what runs there, and `confine`
for its walls. Here nothing is believed. A reply that is late, too long or malformed
ends the room (Dead), and the grader goes on with another.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

from instructor import wire
from instructor.inside import STUBBORN, WAITING
from kdlib.checks import losses
from kdlib.checks.attempt import KEPT, Attempt, Elsewhere
from kdlib.errors import ArgumentError, StorageError

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = WAITING + 15  # seconds until a room that does not reply is ended
FAILURES = (None, "not written", "raised", "late")


class Dead(Exception):
    """A room ended, or had to be ended; the sentence says how."""


class Rooms:
    """Opens rooms.

    hidden: files and folders that no student's code may see
    walls:  False does without those of `confine`, as a system that allows none
    """

    def __init__(self, hidden: Sequence[Path] = (), walls: bool = True):
        if not hasattr(os, "fork"):
            raise ArgumentError(
                "students' code cannot be kept apart on this system",
                "grade on Linux, or on macOS; on Windows use WSL",
            )
        self.hidden, self.walls = [str(path) for path in hidden], walls
        self.lock = threading.Lock()
        self.rooms: weakref.WeakSet[Room] = weakref.WeakSet()
        self.abandoned = False

    def __enter__(self) -> Rooms:
        self.base = Path(tempfile.mkdtemp(prefix="kdlib-rooms-")).resolve()
        self.server, theirs = socket.socketpair()
        # Nothing of the instructor's environment: no tokens, no KD_PRIVATE.
        kept = {k: os.environ[k] for k in ("PATH", "LANG") if k in os.environ}
        environment = kept | {
            "HOME": str(self.base),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *_tests_only()]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "agg",
        }
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "instructor.inside", str(theirs.fileno())],
                env=environment,
                cwd=self.base,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()
        self.process.wait(10)
        shutil.rmtree(self.base, ignore_errors=True)

    def abandon(self) -> None:
        """End all rooms at once, and open no more."""
        self.abandoned = True
        for room in list(self.rooms):
            with contextlib.suppress(OSError):
                room.control.shutdown(socket.SHUT_RDWR)

    def open(self) -> Room:
        """Raises StorageError where no process can be started."""
        if self.abandoned:
            raise StorageError("grading was interrupted", "run the command again")
        talk, theirs = socket.socketpair()
        control, keepers = socket.socketpair()
        home = tempfile.mkdtemp(dir=self.base)
        order = {"home": home, "hidden": self.hidden, "walls": self.walls}
        with theirs, keepers, self.lock:
            handles = [theirs.fileno(), keepers.fileno()]
            try:
                socket.send_fds(self.server, [json.dumps(order).encode()], handles)
                answered = self.server.recv(1)
            except OSError:
                answered = b""
        if not answered:
            raise StorageError(
                "the process that keeps students' code apart did not start",
                f"run `{sys.executable} -m instructor.inside 0` and read its error",
            )
        room = Room(talk, control, home)
        self.rooms.add(room)
        return room


def _tests_only() -> list[str]:
    """Where a test forbids the network for every process that it starts."""
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [part for part in path if part.endswith(os.path.join("tests", "offline"))]


class Room(contextlib.AbstractContextManager):
    """stand: the walls that hold here (confine.WALLS)
    saw:   what the student's code opened and should not have
    """

    def __init__(self, talk: socket.socket, control: socket.socket, home: str):
        limit = struct.pack("ll", int(PATIENCE), 0)
        talk.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        talk.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self.talk, self.control = Connection(talk.detach()), control
        self.home, self.saw, self.number = home, set(), 0
        self.dead: str | None = None
        self.stand = self._receive(time.monotonic() + PATIENCE).get("stand", [])

    def __exit__(self, *_: object) -> None:
        self.talk.close()
        self.control.close()
        shutil.rmtree(self.home, ignore_errors=True)

    def cell(self, source: str, name: str) -> Attempt:
        """What running a cell did. Raises Dead."""
        return _attempt(self.ask({"do": "cell", "source": source, "name": name}), 0)

    def look(self, name: str) -> object:
        """A variable: its value, a Function, or LookupError. Raises Dead."""
        reply = self.ask({"do": "look", "name": name})
        if reply.get("known") is not True:
            raise LookupError(name)
        return Function(self) if reply.get("callable") is True else _value(reply)

    def ask(self, request: dict) -> dict:
        if self.dead:
            raise Dead(self.dead)
        self.number += 1
        with contextlib.suppress(OSError):  # it has ended; the next line says how
            self.talk.send_bytes(wire.dumps({**request, "number": self.number}))
        reply = self._receive(time.monotonic() + PATIENCE)
        if reply.get("number") != self.number:  # a copy of the process spoke too
            self._die("it sent what is no reply")
        saw = reply.get("saw", [])
        if isinstance(saw, list):
            self.saw |= {str(part)[:60] for part in saw[:20]}
        return reply

    def _receive(self, until: float) -> dict:
        left = max(0.0, until - time.monotonic())
        ready = wait([self.talk, self.control], left)
        if not ready:
            self._die(f"it did not answer for {PATIENCE:g} seconds")
        if self.talk in ready:
            try:
                return wire.loads(self.talk.recv_bytes(wire.LARGEST))
            except EOFError:
                pass
            except (OSError, ValueError):
                self._die("it sent what is no reply")
        self._die(self._how_it_ended())

    def _how_it_ended(self) -> str:
        if not wait([self.control], 5):
            return "it closed its connection"
        try:
            code = json.loads(self.control.recv(64) or b"null")
        except (OSError, ValueError):
            code = None
        if code is None:
            return "its process ended"
        if code == STUBBORN:
            return "it would not stop when its time was up"
        if code >= 0:
            return f"its process ended with exit code {code}"
        return f"its process was ended by signal {-code}"

    def _die(self, how: str) -> None:
        self.dead = how
        raise Dead(how)


class Function(Elsewhere):
    """What the room last looked at. After its death every call raises, alike."""

    def __init__(self, room: Room):
        self.room = room
        self.wrote = (0, 0)  # the most that a call put out, in all and on stderr

    def __call__(self, *arguments: object) -> Attempt:
        sent = [wire.encode(item) for item in arguments]
        return self._tried({"do": "call", "arguments": sent}, len(arguments))

    def put(self, loss: Callable) -> Attempt:
        return self._tried({"do": "put", "loss": _address(loss)}, 1)

    def _tried(self, request: dict, count: int) -> Attempt:
        try:
            tried = _attempt(self.room.ask(request), count)
        except Dead as dead:
            return Attempt(failure="raised", error=f"The kernel died: {dead}.")
        self.wrote = max(self.wrote, tried.wrote)
        return tried


def _address(loss: Callable) -> list:
    for name, right in losses.RIGHT.items():
        if right is loss:
            return ["right", name]
    numbers = [i for i, wrong in enumerate(losses.WRONG) if wrong.loss is loss]
    if not numbers:
        raise ArgumentError(
            f"the loss {loss!r} is not in kdlib.checks.losses",
            "put only losses that stand there: a room knows no others",
        )
    return ["wrong", numbers[0]]


def _attempt(reply: dict, count: int) -> Attempt:
    """An Attempt out of a reply, whatever the reply says."""
    if "too large" in reply:
        kind = str(reply["too large"])[:60]
        error = f"It returned more than can be looked at (a {kind})."
        return Attempt(failure="raised", error=error)
    failure, edited = reply.get("failure"), reply.get("edited")
    wrote, seconds = reply.get("wrote"), reply.get("seconds")
    if not (isinstance(wrote, list) and [type(x) for x in wrote] == [int, int]):
        wrote = (0, 0)
    return Attempt(
        _value(reply),
        failure if failure in FAILURES else "raised",
        str(reply.get("error", ""))[:2000],
        edited if type(edited) is int and 0 <= edited < count else None,
        str(reply.get("printed", ""))[: KEPT + 1],
        tuple(wrote),
        seconds if isinstance(seconds, float) and 0 <= seconds < 1e6 else 0.0,
    )


def _value(reply: dict) -> object:
    try:
        return wire.decode(reply.get("value"))
    except ValueError:
        return wire.Strange()
