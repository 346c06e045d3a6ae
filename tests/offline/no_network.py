"""A guard that refuses every connection beyond this machine.

It covers Python's own sockets, which is what requests, httpx, urllib and asyncio use.
"""

from __future__ import annotations

import ipaddress
import socket

attempts: list[str] = []


class NetworkBlocked(OSError):
    """A test, or a process that it started, tried to reach another machine."""


def is_local(host: object) -> bool:
    if host is None or host in ("", "localhost", socket.gethostname()):
        return True
    name = host.decode() if isinstance(host, bytes) else str(host)
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def refuse_unless_local(host: object) -> None:
    if not is_local(host):
        attempts.append(str(host))
        raise NetworkBlocked(
            f"no test may reach {host!r}: only this machine is allowed"
        )


def install() -> None:
    """Guard `connect`, `connect_ex` and `getaddrinfo` of this process, once."""
    if getattr(socket, "kdlib_guarded", False):
        return
    socket.kdlib_guarded = True

    def guarded(connect):
        def wrapper(self, address, /):
            if self.family in (socket.AF_INET, socket.AF_INET6):
                refuse_unless_local(address[0])
            return connect(self, address)

        return wrapper

    socket.socket.connect = guarded(socket.socket.connect)
    socket.socket.connect_ex = guarded(socket.socket.connect_ex)

    getaddrinfo = socket.getaddrinfo

    def guarded_getaddrinfo(host, *args, **kwargs):
        refuse_unless_local(host)
        return getaddrinfo(host, *args, **kwargs)

    socket.getaddrinfo = guarded_getaddrinfo
