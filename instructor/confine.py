"""Walls around a student's process: namespaces and limits of Linux.

What a system allows differs, so every wall is tried, and `shut` says which ones stand.
What no wall here gives: another user account, a limit on the graphics card, protection
from a fault of the kernel. That is the instructor's duty (docs/teach.md).
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

try:
    import resource
except ImportError:  # Windows, where instructor.room refuses to start
    resource = None

NETWORK, FILES, PROCESSES = "network", "files", "processes"
WALLS = {
    NETWORK: "no network",
    FILES: "files are read-only, solutions and other submissions out of sight",
    PROCESSES: "no other process can be seen or signalled",
}

# linux/sched.h and linux/mount.h
_MOUNTS, _IPC, _USER, _PID, _NET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 1 << 30
_ALL = _MOUNTS | _IPC | _PID | _NET
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND = 1, 2, 4, 8, 32, 4096
_REC, _PRIVATE = 1 << 14, 1 << 18
_KEPT = {  # flags that a remount must repeat, or the kernel refuses it
    "nosuid": _NOSUID,
    "nodev": _NODEV,
    "noexec": _NOEXEC,
    "noatime": 1 << 10,
    "nodiratime": 1 << 11,
    "relatime": 1 << 21,
}
_DEATH_SIGNAL, _NO_NEW_PRIVILEGES = 1, 38  # prctl
MOST = 32  # processes and threads at a time
SCRATCH = 64  # MiB of files that a student's code may write


def possible() -> int:
    """The namespaces that this system lets us have: all, the network's, or 0 for none.

    Tried in a process of its own, for a refusal half-way leaves one that is of no use.
    """
    if not hasattr(ctypes.CDLL(None), "unshare"):
        return 0
    for flags in (_ALL, _NET):
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if _unshare(flags) else 1)
            finally:
                os._exit(1)
        if os.waitpid(child, 0)[1] == 0:
            return flags
    return 0


def shut(flags: int, home: str, hidden: list[str]) -> list[str]:
    """Put this process and its next child behind walls; which ones stand.

    flags:  what `possible` found
    home:   the one folder that stays writable, empty
    hidden: files and folders that are covered
    """
    if not flags or not _unshare(flags):
        return []
    stand = [NETWORK]
    if flags == _ALL:
        stand.append(PROCESSES)
        stand += [FILES] if _cover(home, hidden) else []
    return stand


def _unshare(flags: int) -> bool:
    """With a user namespace, which needs no rights, or without one, for root."""
    user, group = os.getuid(), os.getgid()
    if _ok("unshare", _USER | flags):
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        return True
    return _ok("unshare", flags)


def _cover(home: str, hidden: list[str]) -> bool:
    """Everything read-only but `home`, and nothing to be seen in `hidden`."""
    if not _ok("mount", b"none", b"/", None, _REC | _PRIVATE, None):
        return False
    done = True
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        path, options = line.split()[4:6]
        flags = sum(_KEPT.get(name, 0) for name in options.split(","))
        path = path.encode().decode("unicode_escape")
        held = _mount(None, path, None, _REMOUNT | _BIND | _RDONLY | flags)
        done &= held or path != "/"
    # /run holds the sockets of other services, which no network wall closes.
    for path in [*hidden, "/run"]:
        if os.path.isdir(path):
            done &= _mount("none", path, "tmpfs", _RDONLY)
        elif os.path.exists(path):
            done &= _mount("/dev/null", path, None, _BIND)
    # Covering the folder above hides the rooms of the others.
    above = os.path.dirname(home)
    if not _mount("none", above, "tmpfs", _NOSUID | _NODEV, f"size={SCRATCH}m"):
        return False
    os.mkdir(home)
    return done


def crowded() -> bool:
    """Whether the room that this process keeps has too many processes.

    RLIMIT_NPROC would do, but the kernel exempts root from it. The room's /proc, which
    its keeper sees as well, lists the room's processes alone, and so not the keeper.
    """
    if os.path.exists("/proc/self"):
        return False
    return sum(name.isdigit() for name in os.listdir("/proc")) > MOST


def hold(memory: int, seconds: int) -> None:
    """Limits of the process that runs a student's code; the last thing before it runs.

    memory:  bytes beside those that the process already maps
    seconds: of computing, in all
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_DEATH_SIGNAL, 9, 0, 0, 0)
        # Process 1 of its namespace may have the others' files in /proc no more.
        if os.getpid() == 1 and not _mount("proc", "/proc", "proc", 0):
            _mount("none", "/proc", "tmpfs", _RDONLY)
    mapped = 0
    if os.path.exists("/proc/self/statm"):
        mapped = int(Path("/proc/self/statm").read_text().split()[0])
        mapped *= resource.getpagesize()
        _limit(resource.RLIMIT_AS, mapped + memory)
    _limit(resource.RLIMIT_CPU, seconds)
    _limit(resource.RLIMIT_FSIZE, SCRATCH << 20)
    _limit(resource.RLIMIT_NOFILE, 256)
    _limit(resource.RLIMIT_CORE, 0)
    if os.getpid() == 1:  # else it would count all processes of this user
        _limit(resource.RLIMIT_NPROC, MOST)
    if hasattr(libc, "prctl"):
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        # capset(2), version 3, for this process: none effective, permitted, inherited.
        if os.getpid() == 1:
            libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))


def _limit(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(what, (value, value))


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, data: str = ""
) -> bool:
    parts = [x.encode() if x else None for x in (source, target, kind)]
    return _ok("mount", *parts, flags, data.encode() or None)


def _ok(name: str, *arguments: object) -> bool:
    function = getattr(ctypes.CDLL(None), name)
    typed = [ctypes.c_ulong(x) if isinstance(x, int) else x for x in arguments]
    return function(*typed) == 0
