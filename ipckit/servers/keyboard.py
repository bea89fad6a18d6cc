# SPDX-License-Identifier: MIT
"""The keyboard of a server, waited for beside the sockets, as in the textbook."""

from collections.abc import Callable

from ipckit._arguments import Descriptor, fileno_of
from ipckit._unpatched import os
from ipckit.servers.loop import READ, Loop

__all__ = ["Keyboard"]

# Longer lines are printed in pieces.
_LONGEST = 65536
_BACKGROUND_PAUSE = 0.5


class Keyboard:
    """Prints each line that is typed; ``quit`` calls *leave*; end of file ends the watch and nothing else.

    Read by read(2) when it is ready, never ahead and never so that it blocks: a line may come in pieces.
    """

    def __init__(self, source: Descriptor, loop: Loop, leave: Callable[[], object]) -> None:
        self._source = source
        self._loop = loop
        self._leave = leave
        self._rest = b""

    def watch(self) -> None:
        """From now on; or never, if it can't be waited for."""
        try:
            self._loop.watch(self._source, READ, self._ready)
        except OSError:  # EPERM: epoll can't wait for files; EBADF: there is none
            return

    def _ready(self, _: int) -> None:
        fd = fileno_of(self._source, "keyboard")
        if not _in_foreground(fd):  # a read would stop the whole server (SIGTTIN)
            self._loop.forget(fd)
            self._loop.after(_BACKGROUND_PAUSE, self.watch)
            return
        typed = _read(fd)
        if typed:
            self._type(typed)
        else:
            self._loop.forget(fd)
            self._print(self._rest)

    def _type(self, typed: bytes) -> None:
        *lines, self._rest = (self._rest + typed).split(b"\n")
        if len(self._rest) > _LONGEST:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            if line.strip() == b"quit":
                self._leave()
            else:
                self._print(line)

    @staticmethod
    def _print(line: bytes) -> None:
        if line:
            print(line.decode(errors="backslashreplace"), flush=True)


def _in_foreground(fd: int) -> bool:
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:  # no terminal, or not ours: nobody is stopped
        return True


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 4096)
    except BlockingIOError:  # somebody else has read it; an empty answer would be the end of file
        return b"\n"
    except OSError:  # EIO: the terminal has gone
        return b""
