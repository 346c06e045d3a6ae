"""What both kinds of lasting files need: to be on the disk, and to be known again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path


def flush(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's list of names.

    Else a power cut could keep the new name of a file and not its content. Raises
    OSError.
    """
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders, and writes their names through
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
