# SPDX-License-Identifier: MIT
"""The multiplexing server on epoll(7): the one for many connections.

The kernel keeps the list of what is waited for between the waits, and a wait gives only those that are
ready: it costs in proportion to them, however many connections are open. The price is a system call,
epoll_ctl(2), whenever that changes: for a new client, and for one that has to be waited for to take its
answer. It is used level-triggered, so a client that has more to be read is simply ready again.
Regular files can't be waited for (EPERM). Linux only.
"""

from typing import ClassVar

from ipckit._unpatched import select
from ipckit.servers.loop import Loop
from ipckit.servers.multiplex import MultiplexServer

__all__ = ["EpollServer"]


class EpollServer(MultiplexServer):
    """Serve all connections in this process, waiting with epoll(7). Args: see MultiplexServer."""

    model: ClassVar[str] = "epoll"

    def _new_loop(self) -> Loop:
        return Loop(select.epoll())
