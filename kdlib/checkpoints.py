"""Checkpoints that survive: whole or not there at all, and known to be good.

    FOLDER/step-00000200/manifest.json   size and SHA-256 of every other file
                         ...             what the writers wrote

A checkpoint is written to a scratch folder, every file flushed to the disk, the
manifest last; one rename makes it a checkpoint, and the rename is flushed too. A kill
at any instant leaves the old ones and perhaps a scratch folder, which the next write
removes. What a disk does to a file later, the manifest finds out.

Knows files alone: what a training run puts into them is training_state.py's business.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kdlib.errors import DataError, StorageError
from kdlib.files import digest, file_sha256, flush

FORMAT = "kdlib checkpoint 1"
MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """folder: where it is; step: steps done; facts: what `write` was given."""

    folder: Path
    step: int
    facts: dict


def write(
    folder: Path,
    step: int,
    writers: Mapping[str, Callable[[Path], None]],
    facts: dict,
    *,
    keep: int,
) -> Checkpoint:
    """Write a checkpoint of `step`, then remove all but the newest `keep`.

    writers: file name -> function that writes the file (or a folder) at a path
    facts:   JSON, kept in the manifest

    Raises StorageError where it cannot be written; the earlier ones are untouched.
    """
    target, scratch = folder / f"step-{step:08}", None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".step-", dir=folder))
        new = scratch / "new"
        new.mkdir()
        for name, writer in writers.items():
            writer(new / name)
        _write_manifest(new, step, facts)
        for path in (*_files(new), *_folders(new)):
            flush(path)
        if target.exists():  # a damaged one, which was skipped
            os.replace(target, scratch / "old")
        os.replace(new, target)
        flush(folder)
        tidy(folder, step, keep)
    except Exception as error:  # torch and safetensors have their own for a full disk
        raise StorageError(
            f"could not write checkpoint {target}: {error}",
            "free disk space and run the same command again: it goes on from the last "
            "good checkpoint, which is untouched",
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return Checkpoint(target, step, facts)


def tidy(folder: Path, step: int, keep: int) -> None:
    """Of the good checkpoint `step` and all older ones leave `keep`; remove scratch.

    Newer ones are damaged, or they would count: they are left to be looked at.
    """
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)
    older = [path for path in _steps(folder) if _step(path) < step]
    for path in older[: max(0, len(older) - (keep - 1))]:
        shutil.rmtree(path)


def newest_good(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where there is none at all.

    A damaged one is skipped, with a warning that names the file and the fault.
    Raises DataError where all of them are damaged: to begin anew unasked would hide it.
    """
    damaged = []
    for path in reversed(_steps(folder)):
        try:
            return read(path)
        except DataError as error:
            warnings.warn(f"{error.what}; it is skipped", stacklevel=2)
            damaged.append(error.what)
    if damaged:
        raise DataError(
            f"no checkpoint in {folder} is good: {'; '.join(damaged)}",
            f"get the files again, or remove {folder} to begin anew",
        )
    return None


def read(path: Path) -> Checkpoint:
    """A checkpoint, after every file was compared with its manifest.

    Raises DataError naming the file that is damaged and how.
    """

    def damaged(fault: str) -> DataError:
        return DataError(
            f"checkpoint {path} is damaged: {fault}", "use an earlier checkpoint"
        )

    try:
        stored = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        content = stored["content"]
        if stored["sha256"] != digest(content):
            raise damaged(f"{MANIFEST} has another checksum")
        if content["format"] != FORMAT or path.name != f"step-{content['step']:08}":
            raise damaged(
                f"{MANIFEST} is of {content['format']!r}, step {content['step']}"
            )
        for name, wanted in content["files"].items():
            file = path / name
            size = file.stat().st_size
            if size != wanted["bytes"]:
                raise damaged(f"{name} has {size} bytes, not {wanted['bytes']}")
            if file_sha256(file) != wanted["sha256"]:
                raise damaged(f"{name} has another checksum")
    except DataError:  # it is a ValueError too
        raise
    except FileNotFoundError as error:
        raise damaged(f"{Path(error.filename).name} is missing") from error
    except OSError as error:
        raise damaged(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(f"{MANIFEST} is not a manifest ({error})") from error
    return Checkpoint(path, content["step"], content["facts"])


def _write_manifest(folder: Path, step: int, facts: dict) -> None:
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in _files(folder)
    }
    content = {"format": FORMAT, "step": step, "facts": facts, "files": files}
    stored = {"content": content, "sha256": digest(content)}
    (folder / MANIFEST).write_text(json.dumps(stored, indent=1), encoding="utf-8")


def _steps(folder: Path) -> list[Path]:
    """Checkpoint folders, good or not, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _folders(folder: Path) -> list[Path]:
    return [*(path for path in folder.rglob("*") if path.is_dir()), folder]
