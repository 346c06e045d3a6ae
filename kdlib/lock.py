"""One process at a time in a folder.

The lock is the operating system's (flock) on FOLDER/.lock, so it ends with its process,
however that ends: a kill leaves the file, but no lock. The file holds the number and
the machine of the process, for the message that another one gets.

On network file systems flock is the server's business: NFS has it since Linux 2.6.12
(flock(2)). Where there is none, on Windows for one, a warning says so, and nothing is
guarded.
"""

from __future__ import annotations

import os
import platform
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kdlib.errors import StorageError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

LOCK = ".lock"
_held: set[tuple[Path, int]] = set()  # folder and thread


@contextmanager
def only_process_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock while the block runs; make the folder where there is none.

    A thread that holds it may take it again. Afterwards nothing is left of it, nor of
    a folder that was made and stayed empty.

    Raises StorageError, naming the process that has the lock, or where the folder
    cannot be written.
    """
    folder = folder.resolve()  # the working directory may change meanwhile
    mine = folder, threading.get_ident()
    if mine in _held:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    handle = _locked(folder)
    _held.add(mine)
    try:
        yield
    finally:
        _held.discard(mine)
        if handle is not None:
            with suppress(OSError):
                (folder / LOCK).unlink()  # before another process can have it
            os.close(handle)
        for path in made:
            with suppress(OSError):
                path.rmdir()


def _locked(folder: Path) -> int | None:
    """The lock file, open and locked; None where there are no locks."""
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if fcntl is None:
                return _unguarded(folder, "this system has no flock")
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StorageError(
                f"cannot write to {folder}: {error}", "name a folder you may write"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 1000).decode(errors="replace") or "unknown"
            os.close(handle)
            raise StorageError(
                f"{folder} is in use by another process ({holder})",
                "wait until it has ended, or end it, or name another folder",
            ) from error
        except OSError as error:
            os.close(handle)
            path.unlink(missing_ok=True)
            return _unguarded(folder, f"its file system has no locks ({error})")
        # Whoever had it may have removed the file between our opening and locking it.
        if _is_open_at(handle, path):
            os.ftruncate(handle, 0)
            os.write(handle, f"pid {os.getpid()} on {platform.node()}".encode())
            return handle
        os.close(handle)


def _is_open_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _unguarded(folder: Path, reason: str) -> None:
    warnings.warn(
        f"{folder} is not guarded against a second process: {reason}", stacklevel=5
    )
