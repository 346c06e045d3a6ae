"""One row of the quickstart, trained in a second process.

Models this small gain little from a second thread, and lose a hundredfold by it where
another program wants the core. Two processes with one thread each use two cores well.
"""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path

from kdlib import models
from kdlib.errors import KdlibError, TrainingError
from kdlib.evaluate import one_core
from kdlib.phone import Budget, Data, fit


class Beside:
    """One row, trained and saved by a second process.

    steps: how many steps were done since the last call; with `wait`, at least one
           message is awaited
    done:  whether the row is saved
    """

    def __init__(self, name: str, budget: Budget, seed: int, folder: Path):
        context = multiprocessing.get_context("spawn")
        self.name, self.done = name, False
        self._messages, theirs = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_train_beside, args=(theirs, name, budget, seed, folder), daemon=True
        )
        self._process.start()
        theirs.close()

    def steps(self, wait: bool = False) -> int:
        """Raises the other process's error, or TrainingError where it was killed."""
        steps = 0
        while not self.done and (self._messages.poll() or (wait and not steps)):
            try:
                message = self._messages.recv()
            except EOFError:
                self._process.join()
                raise TrainingError(
                    f"the process that trains {self.name!r} ended with exit code "
                    f"{self._process.exitcode}",
                    "free some memory and run the same command again: finished rows "
                    "are kept",
                ) from None
            if isinstance(message, BaseException):
                raise message
            self.done = message == "done"
            steps += not self.done
        return steps

    def stop(self) -> None:
        if not self.done:
            self._process.terminate()
        self._process.join()


def _train_beside(messages, name: str, budget: Budget, seed: int, folder: Path) -> None:
    # Ctrl-C reaches both processes; the first one decides, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    models.quiet_transformers()
    try:
        with one_core():
            data = Data()
            student = fit(name, data, budget, seed, lambda *_: messages.send("step"))
            models.save(student, data.tokenizer, folder)
        messages.send("done")
    except KdlibError as error:
        messages.send(error)
    except BrokenPipeError:
        pass  # the first process is gone, and with it who wanted this row
