# SPDX-License-Identifier: MIT
"""The multiplexing server on epoll(7): the one for many connections.

The kernel keeps the list of what is waited for between the waits, and a wait gives only those that are
ready: it costs in proportion to them, however many connections are open. The price is a system call,
epoll_ctl(2), whenever that changes: for a new client, and for one that has to be waited for to take its
answer. It is used level-triggered, so a client that has more to be read is simply ready again.
Regular files can't be waited for (EPERM). Linux only.

With the echo a turn of the loop is one call of C, which waits, and gives each client that is ready its
piece. Python hears of those only that have to wait for something else then.
"""

import errno
import math
from typing import Any, ClassVar

from ipckit._native import ffi, lib
from ipckit._unpatched import select
from ipckit.errors import check
from ipckit.servers.loop import READ, WRITE, Loop
from ipckit.servers.multiplex import MultiplexServer

__all__ = ["EpollServer"]


class _Loop(Loop):
    """A loop on epoll(7) that steps the echo connections it was told of by step()."""

    def __init__(self) -> None:
        super().__init__(select.epoll())
        self._turn = ffi.new("ik_turn *", {"epoll": self.poller.fileno()})
        self._stepped: dict[int, Any] = {}
        self._grow(64)

    def _grow(self, size: int) -> None:
        table = ffi.new("ik_turn_client[]", size)
        ffi.memmove(table, self._turn.clients, self._turn.n_clients * ffi.sizeof("ik_turn_client"))
        self._table = self._turn.clients = table
        self._turn.n_clients = size

    def step(self, client: Any) -> None:
        """Step a client, which is watched, whenever it is ready; or from now on no longer."""
        fd: int = client.fd
        if client.waits_for in (READ, WRITE):
            if fd >= self._turn.n_clients:
                self._grow(2 * fd)
            self._table[fd] = (client.native, client.waits_for)
            self._stepped[fd] = client
        elif self._stepped.pop(fd, None) is not None:
            self._table[fd].connection = ffi.NULL

    def turn(self, until: float | None = None) -> None:
        patience = self._patience(until)
        n = lib.ik_turn_run(self._turn, -1 if patience is None else math.ceil(1000 * patience))
        if n != -errno.EINTR:
            check(n, "epoll_wait")
        for i in range(n):
            report = self._turn.reports[i]
            if report.stepped:
                client = self._stepped[report.fd]
                client.server._wait_for(client, report.what)
            elif report.fd in self.handlers:  # not forgotten by one that came before it
                self.handlers[report.fd](report.what)
        if self._moments:
            self._run_moments()


class EpollServer(MultiplexServer):
    """Serve all connections in this process, waiting with epoll(7). Args: see MultiplexServer."""

    model: ClassVar[str] = "epoll"
    loop: _Loop

    def _new_loop(self) -> Loop:
        return _Loop()

    def _wait_for(self, client: Any, wanted: int) -> None:
        super()._wait_for(client, wanted)
        if self._terms.native_service:
            self.loop.step(client)
