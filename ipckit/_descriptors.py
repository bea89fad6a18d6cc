# SPDX-License-Identifier: MIT
"""Descriptors for programs and children of our own: pipes, sockets, eventfds. None of them is 0, 1 or 2."""

import contextlib
import fcntl
import socket

from ipckit._unpatched import os, socketpair

__all__ = ["above_standard", "eventfd", "packets", "pipe"]


def above_standard(fd: int) -> int:
    """The descriptor as one above 2. These may be closed, but each child keeps what has their numbers."""
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


def _both(first: int, second: int) -> tuple[int, int]:
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, second)
        first = above_standard(first)
        undo.pop_all()
        undo.callback(os.close, first)
        second = above_standard(second)
        undo.pop_all()
    return first, second


def pipe(capacity: int) -> tuple[int, int]:
    reader, writer = _both(*os.pipe())
    with contextlib.suppress(PermissionError):  # over the user's pipe allowance: the default works too
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, capacity)
    return reader, writer


def eventfd() -> int:
    return above_standard(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))


def packets() -> tuple[int, int]:
    """Two ends of a socket of packets."""
    here, there = socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return _both(here.detach(), there.detach())
