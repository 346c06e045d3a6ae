"""Stop between two steps when asked to, not in the middle of one.

Ctrl-C (SIGINT) and the SIGTERM of a scheduler or a shutdown ask for the end; training
finishes its step, saves, and leaves by raising Stopped.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(KeyboardInterrupt):
    """A signal asked for the end, and everything was saved.

    Not an Exception: whoever handles errors should not take it for one.
    """

    def __init__(self, name: str, step: int, checkpoint):
        self.signal = signal.Signals[name]
        self.step, self.checkpoint = step, checkpoint
        super().__init__(
            f"{name}: stopped after step {step}, saved in {checkpoint}; "
            "the same command goes on from there"
        )


class StopRequest:
    """`name` is the signal that asked for the end, or None."""

    name: str | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM while the block runs, then handle them as before.

    A SIGINT after the first request raises KeyboardInterrupt at once. Outside the main
    thread, where Python allows no handlers, signals are left alone.
    """
    request = StopRequest()

    def note(number, frame):
        if request.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if request.name is None:
            request.name = signal.Signals(number).name
            print(
                f"\n{request.name}: finishing this step, then saving. "
                "Ctrl-C stops at once.",
                file=sys.stderr,
            )

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            # None: set by code that is not Python's, which Python cannot set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
