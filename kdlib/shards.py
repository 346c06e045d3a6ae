"""The files of a target cache: whole or absent, and read by memory map.

A writer that is killed, or meets a full disk, leaves under the final name what was
there before. A reader opens a file of any size at once: the operating system fetches a
tensor's pages when its rows are asked for, and may drop them again. What the tensors
mean is cached.py's business.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.errors import DataError, StorageError
from kdlib.files import file_sha256, flush

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "kdlib targets 1"
MANIFEST = "manifest.json"
SCRATCH = ".partial-"  # a file being written is called this, its name and a process id


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A scratch file beside `path` that takes its place when the block has ended.

    Raises StorageError where that fails; then no scratch file is left.
    """
    scratch = path.with_name(f"{SCRATCH}{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.touch()
    except OSError as error:
        raise StorageError(
            f"cannot write to {path.parent}: {error}", "name a folder you may write"
        ) from error
    try:
        yield scratch
        flush(scratch)
        os.replace(scratch, path)
        flush(path.parent)
    except Exception as error:  # safetensors reports a full disk in its own class
        raise StorageError(
            f"could not write {path}: {error}",
            "free disk space or name another folder; nothing was left half-written",
        ) from error
    finally:
        scratch.unlink(missing_ok=True)


def write_shard(path: Path, tensors: dict[str, Tensor], facts: dict) -> dict:
    """Write tensors and facts to one safetensors file; return its size and sha256."""
    from safetensors.torch import save_file

    with whole_file(path) as scratch:
        save_file(tensors, scratch, {"kdlib": json.dumps(facts)})
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def write_manifest(folder: Path, manifest: dict) -> None:
    with whole_file(folder / MANIFEST) as scratch:
        scratch.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Shard:
    """A file of `write_shard`, its tensors mapped into memory."""

    facts: dict
    tensors: dict[str, Tensor]

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Raises DataError for a file that is missing, cut short or of another kind."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("kdlib", "{}"))
                # get_tensor maps the file; it reads nothing yet.
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise DataError(
                f"cached targets {path} cannot be read: {error}",
                "write the cache again, or get the file again",
            ) from error
        return cls(facts, tensors)


def read_manifest(folder: Path) -> dict | None:
    """The manifest, or None where there is none. Raises DataError if it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}")
        # What is asked of it later must be there.
        _ = manifest["plan"], manifest["n_shards"], manifest["complete"]
        for entry in manifest["shards"]:
            _ = entry["file"], entry["bytes"], entry["sha256"], entry["tokens"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the manifest {path} cannot be read: {error!r}",
            "get the file again, or remove the folder and write the cache again",
        ) from error
    return manifest


def shard_fault(folder: Path, entry: dict, verify: bool) -> str:
    """What is wrong with a shard's file; empty if nothing."""
    path = folder / entry["file"]
    if not path.is_file():
        return f"the shard {path} is missing"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"the shard {path} has {size} bytes, its manifest says {entry['bytes']}"
    if verify and file_sha256(path) != entry["sha256"]:
        return f"the shard {path} was altered: its sha256 is not the manifest's"
    return ""
