"""What the benchmarks have in common: a device's clock and memory, and who is there."""

from __future__ import annotations

import gc
import importlib
import itertools
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.autograd.profiler import profile

from kdlib.errors import ArgumentError

MIB = 2**20
LOGIT_STD = 3.0  # of random logits: a spread like that of a trained model


class Unavailable(Exception):
    """A method that cannot run here; the message is the reason to print."""


def peer(module: str, name: str):
    """What another library calls `name`. Raises Unavailable with the reason."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a peer may fail to import in ways of its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Unavailable(f"cannot be imported ({reason})") from error


def peer_versions(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def check_place(device: str, known, out: str | Path | None) -> None:
    """Before the minutes, not after: is the device there, can `out` be a file?

    Raises ArgumentError.
    """
    if device not in known:
        raise ArgumentError(f"device = {device!r}", f"choose from {list(known)}")
    if device != "cpu" and not getattr(torch, device).is_available():
        raise ArgumentError(
            f"device = {device!r}, which torch does not find here",
            'choose "cpu", or run this where the device is',
        )
    if out is not None and Path(out).is_dir():
        raise ArgumentError(f"out = {str(out)!r} is a folder", "name a file in it")


def synchronize(device: str) -> None:
    if device != "cpu":
        getattr(torch, device).synchronize()


class PeakMemory:
    """The most bytes of tensors at a time while a `with` block runs.

    above: beyond those that there were when it began; None on MPS, which does not say

    Counted, not read off the process: what a process holds on a CPU depends on what
    the C library keeps of freed memory and what other processes leave it.
    """

    def __init__(self, device: str):
        self.device, self.above = device, None

    def __enter__(self) -> PeakMemory:
        if self.device == "cpu":
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports every start
            self._seen = profile(profile_memory=True)
            self._seen.__enter__()
        elif self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error) -> None:
        if self.device == "cpu":
            self._seen.__exit__(*error)
            events = sorted(
                self._seen.kineto_results.events(), key=lambda event: event.start_ns()
            )
            sizes = (event.nbytes() for event in events if event.name() == "[memory]")
            self.above = max(itertools.accumulate(sizes, initial=0))
        elif self.device == "cuda":
            self.above = torch.cuda.max_memory_allocated() - self._before


def tensor_bytes(device: str) -> int:
    """Bytes of all tensors there are at this moment on "cuda" or "cpu".

    On a CPU those that Python knows of, which between two steps are all.
    """
    if device == "cuda":
        return torch.cuda.memory_allocated()
    storages = {}
    for thing in gc.get_objects():
        # Of these types themselves: a compiler's stand-ins for tensors have no memory.
        real = type(thing) in (torch.Tensor, torch.nn.Parameter)
        if real and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
