# SPDX-License-Identifier: MIT
"""The controlling terminal of a server, by which a SIGHUP is understood.

A terminal that is closed, a shell that ends with it, and ``kill -HUP`` of a log's rotation all send the same
signal, and the shell's looks like any other kill (SI_USER). What tells them apart is whether the terminal is
gone.
"""

import errno
import functools

from ipckit import _procfs
from ipckit._unpatched import os

__all__ = ["LOOK_AGAIN", "LOOK_EVERY", "Terminal", "terminal"]

LOOK_AGAIN = 1.0
"""Seconds after a SIGHUP until the second look: a shell that ends in order (huponexit), and the kernel when
that shell was killed, send it just before the terminal goes."""
LOOK_EVERY = 10.0
"""Seconds between the looks for a terminal that goes without a SIGHUP."""


class Terminal:
    """Whether this process has lost the controlling terminal that it had."""

    def __init__(self) -> None:
        self.was_there = has_terminal()
        self._missed = False

    def is_lost(self) -> bool:
        return self.was_there and not has_terminal()

    def look(self) -> None:
        """To be called each LOOK_EVERY seconds.

        A process that goes on after its terminal (disown, or a shell that sends its jobs nothing at its
        end) is a daemon from then on: a SIGHUP is about its log again.
        """
        missing = self.is_lost()
        if missing and self._missed:
            self.was_there = False
        self._missed = missing


@functools.cache
def terminal() -> Terminal:
    """That of this process, as the first call found it."""
    return Terminal()


def has_terminal() -> bool:
    """Whether this process has a controlling terminal now; True if it can't be known. See tty(4)."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        # EIO: the other end is closed, and the kernel is about to take it from us.
        return error.errno not in (errno.ENXIO, errno.EIO) and _is_listed()
    return True


def _is_listed() -> bool:
    """The same from /proc, for a container whose /dev has no tty. See proc_pid_stat(5)."""
    try:
        with open(_procfs.path("self/stat"), "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[4] != b"0"
    except OSError:  # out of descriptors, or no /proc
        return True
