"""One call of a student's function, from which nothing escapes.

Knows: errors, endless loops and recursion, floods of output, edited inputs.
Does not know: what the right value is.
"""

from __future__ import annotations

import contextlib
import copy
import io
import linecache
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SECONDS = 5.0  # of computing: a call that takes more counts as endless
WAITING = 120.0  # of waiting, for another thread or its turn on a busy machine
TICK = 0.05
KEPT = 400  # characters of what the function printed


@dataclass(frozen=True, repr=False)
class Attempt:
    """What one call did.

    value:   what it returned, where it returned
    failure: None, "not written", "raised" or "late"
    error:   for "raised", the error and the student's own line that led to it; for
             "late", what it was still doing
    edited:  the number of the first argument that it changed, or None
    printed: the start of its output
    wrote:   how many characters it put out in all, and how many of them on stderr
    seconds: of computing that it took
    """

    value: object = None
    failure: str | None = None
    error: str = ""
    edited: int | None = None
    printed: str = ""
    wrote: tuple[int, int] = (0, 0)
    seconds: float = 0.0


class Elsewhere:
    """A student's function in another process, as an instructor's grader has it."""

    def __call__(self, *arguments: object) -> Attempt:
        """What a call with these arguments did, over there."""
        raise NotImplementedError

    def put(self, loss: Callable) -> Attempt:
        """What it did with a loss of kdlib.checks.losses (suite.put, over there)."""
        raise NotImplementedError


def attempt(
    function: Callable, arguments: tuple, seconds: float | None = None
) -> Attempt:
    """Call `function` on a copy of `arguments`, for SECONDS if not told otherwise."""
    if isinstance(function, Elsewhere):
        return function(*arguments)
    given = copy.deepcopy(arguments)
    out = _Start()
    err = _Start(out)  # any stderr costs all points in nbgrader
    value, failure, error = None, None, ""
    begin = time.thread_time()
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
            _time_limit(SECONDS if seconds is None else seconds),
        ):
            warnings.simplefilter("ignore")
            value = function(*given)
    except _Late as late:
        failure, error = "late", str(late)
    except KeyboardInterrupt:
        raise
    except BaseException as raised:  # SystemExit too
        own = _own_frames(raised, function)
        innermost = traceback.extract_tb(raised.__traceback__)[-1]
        if isinstance(raised, NotImplementedError) and innermost in own:
            failure = "not written"
        else:
            failure, error = "raised", _describe(raised, own)
    seconds = time.thread_time() - begin
    pairs = enumerate(zip(given, arguments, strict=True))
    edited = next((i for i, (now, was) in pairs if not _equal(now, was)), None)
    wrote = (out.length, err.length)
    return Attempt(value, failure, error, edited, out.text, wrote, seconds)


class _Late(BaseException):
    """No Exception, so that a student's `except Exception` lets it pass."""


_OURS = (__file__, contextlib.__file__)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _Late in the block; where there is no such signal, let it run on.

    What counts is the processor time of this thread. A clock on the wall would call a
    right answer endless where the machine is slow or shared. An import counts as
    waiting: the first one of a large library takes seconds, and is not the answer's.
    """
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    computed = waited = 0.0
    before = time.thread_time()

    def tick(_, frame):
        nonlocal computed, waited, before
        now = time.thread_time()
        # A tick that comes late, after a long call into C, still counts in full.
        if not _imports(frame):
            computed += now - before
        waited += TICK
        before = now
        # Not while this block is being left: only where the student's code runs.
        if frame is None or frame.f_code.co_filename not in _OURS:
            if computed > seconds:
                raise _Late(f"It did not come back within {seconds:g} seconds.")
            if waited > WAITING:
                raise _Late(f"It still waits for something after {WAITING:g} seconds.")

    handler = signal.signal(signal.SIGALRM, tick)
    # Again and again, because a bare `except:` may swallow the first ones.
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)


def _imports(frame) -> bool:
    """Is an import under way? Python's own import machinery is on the stack then."""
    while frame is not None and frame.f_code.co_filename not in _OURS:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


class _Start(io.TextIOBase):
    """A stream that keeps its first characters, counts and forgets the rest."""

    def __init__(self, into: _Start | None = None):
        self.text, self.length, self.into = "", 0, into

    def write(self, text: str) -> int:
        self.length += len(text)
        if self.into is not None:
            return self.into.write(text)
        if len(self.text) <= KEPT:
            self.text += text[: KEPT + 1]
        return len(text)


def _own_frames(raised: BaseException, function: Callable) -> list:
    """The frames in the file, or the cell, that holds the function."""
    code = getattr(function, "__code__", None)
    frames = traceback.extract_tb(raised.__traceback__)
    if code is None:
        return [frame for frame in frames if frame.filename != __file__]
    return [frame for frame in frames if frame.filename == code.co_filename]


def _describe(raised: BaseException, own: list) -> str:
    if isinstance(raised, RecursionError):
        text = "RecursionError: the function calls itself without end"
    else:
        try:
            message = " ".join(str(raised).split())
        except Exception:  # a __str__ of the student's own
            message = ""
        if len(message) > 200:
            message = message[:200] + " ..."
        text = f"{type(raised).__name__}: {message}".rstrip(": ")
    if own:
        line = linecache.getline(own[-1].filename, own[-1].lineno).strip()
        text += f"\n    in line {own[-1].lineno}" + (f": {line}" if line else "")
    return text


def _equal(a: object, b: object) -> bool:
    if type(a) is not type(b):
        return False
    if hasattr(a, "dtype"):  # a tensor or an array
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        pairs = zip(a, b, strict=False)
        return len(a) == len(b) and all(_equal(x, y) for x, y in pairs)
    return a == b
