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
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SECONDS = 5.0  # a call that takes longer counts as endless
KEPT = 400  # characters of what the function printed


@dataclass(frozen=True, repr=False)
class Attempt:
    """What one call did.

    value:   what it returned, where it returned
    failure: None, "not written", "raised" or "late"
    error:   for "raised", the error and the student's own line that led to it
    edited:  the number of the first argument that it changed, or None
    printed: the start of its output
    """

    value: object = None
    failure: str | None = None
    error: str = ""
    edited: int | None = None
    printed: str = ""


def attempt(function: Callable, arguments: tuple) -> Attempt:
    """Call `function` on a copy of `arguments`."""
    given = copy.deepcopy(arguments)
    out = _Start()
    value, failure, error = None, None, ""
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),  # any stderr costs all points in nbgrader
            warnings.catch_warnings(),
            _time_limit(SECONDS),
        ):
            warnings.simplefilter("ignore")
            value = function(*given)
    except _Late:
        failure = "late"
    except KeyboardInterrupt:
        raise
    except BaseException as raised:  # SystemExit too
        own = _own_frames(raised, function)
        innermost = traceback.extract_tb(raised.__traceback__)[-1]
        if isinstance(raised, NotImplementedError) and innermost in own:
            failure = "not written"
        else:
            failure, error = "raised", _describe(raised, own)
    pairs = enumerate(zip(given, arguments, strict=True))
    edited = next((i for i, (now, was) in pairs if not _equal(now, was)), None)
    return Attempt(value, failure, error, edited, out.text)


class _Late(BaseException):
    """No Exception, so that a student's `except Exception` lets it pass."""


_OURS = (__file__, contextlib.__file__)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _Late in the block; where there is no such signal, let it run on."""
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def stop(_, frame):
        # Not while this block is being left: only where the student's code runs.
        if frame is None or frame.f_code.co_filename not in _OURS:
            raise _Late

    handler = signal.signal(signal.SIGALRM, stop)
    # Again and again, because a bare `except:` may swallow the first ones.
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 0.05)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)


class _Start(io.TextIOBase):
    """A stream that keeps its first characters and forgets the rest."""

    def __init__(self):
        self.text = ""

    def write(self, text: str) -> int:
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
