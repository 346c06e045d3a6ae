"""The package's exceptions. Each names the thing that is wrong and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KdlibError(Exception):
    """Base of every error that kdlib raises on purpose.

    what:   the argument, file or quantity, with the value that was seen
    remedy: what to do about it, in one sentence
    """

    def __init__(self, what: str, remedy: str):
        self.what, self.remedy = what, remedy
        super().__init__(f"{what}\n  Remedy: {remedy}")

    def __reduce__(self):
        # An error crosses from one process to another as its two parts.
        return type(self), (self.what, self.remedy)


class ArgumentError(KdlibError, ValueError):
    """An argument has a value that cannot work."""


class DataError(KdlibError, ValueError):
    """Examples, splits or cached targets cannot be used as they are."""


class AlignmentError(DataError):
    """Teacher's and student's views do not hold the same response tokens."""


class ModelError(KdlibError, RuntimeError):
    """A model or tokenizer cannot be found, read or combined."""


class StorageError(KdlibError, OSError):
    """A file could not be written; nothing half-written was left behind."""


class TrainingError(KdlibError, RuntimeError):
    """Training cannot go on, or would go on wrongly."""


def nearest(name: object, known: Iterable[str]) -> str:
    """The remedy for a name that is unknown: the likeliest one, then all of them."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}use one of {', '.join(known) or 'none'}"
