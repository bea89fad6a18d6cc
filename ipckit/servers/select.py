# SPDX-License-Identifier: MIT
"""The multiplexing server on select(2), the oldest of the three.

select(2) is given three sets of descriptors with each wait, each a bit a descriptor: 1,024 bits, so
numbers over 1,023 don't exist for it, whatever the limit on open files is, and C programs that set such
a bit write beyond their memory. Here a client that gets such a number is closed and the others
go on. A wait costs in proportion to the highest number. It is what runs everywhere.
"""

import errno
from typing import ClassVar

from ipckit._unpatched import select
from ipckit.servers.loop import READ, WRITE, Loop
from ipckit.servers.multiplex import MultiplexServer

__all__ = ["SelectServer"]

_HIGHEST = 1023  # FD_SETSIZE - 1
_OURS = 16  # numbers that no client gets: a new logger's descriptor, for one, must be found a place


class SelectPoller:
    """select(2) in the manner of ``select.poll()``."""

    def __init__(self) -> None:
        self._readers: set[int] = set()
        self._writers: set[int] = set()

    def register(self, fd: int, events: int) -> None:
        """Raises: OSError EINVAL for a descriptor over 1,023."""
        if fd > _HIGHEST:
            raise OSError(errno.EINVAL, f"select(2) takes no descriptor over {_HIGHEST:,}, and one is {fd:,}")
        self.modify(fd, events)

    def modify(self, fd: int, events: int) -> None:
        for fds, kind in ((self._readers, READ), (self._writers, WRITE)):
            (fds.add if events & kind else fds.discard)(fd)

    def unregister(self, fd: int) -> None:
        self.modify(fd, 0)

    def poll(self, timeout: float | None) -> "list[tuple[int, int]]":
        """A client that hangs up or fails is readable, and writable."""
        readable, writable, _ = select.select(self._readers, self._writers, (), timeout)
        return [(fd, READ) for fd in readable] + [(fd, WRITE) for fd in writable]


class SelectServer(MultiplexServer):
    """Serve all connections in this process, waiting with select(2).

    Args: max_connections: 960 if not given; more may be refused for the numbers of their descriptors.
        The others: see MultiplexServer.
    Raises: OSError EINVAL from ``serve()`` if its own descriptors are over 1,023.
    """

    model: ClassVar[str] = "select"
    most: ClassVar[int] = 960

    def _new_loop(self) -> Loop:
        return Loop(SelectPoller())

    def _can_watch(self, fd: int) -> bool:
        if fd <= _HIGHEST - _OURS:
            return True
        text = "a connection got the descriptor %d, too high for select(2), and is closed"
        self._warn("refused", text, fd, descriptor=fd)
        return False
