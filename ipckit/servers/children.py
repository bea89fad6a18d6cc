# SPDX-License-Identifier: MIT
"""Servers whose clients are served by processes of their own, and what these share with their server."""

import socket
from collections.abc import Callable, Sequence
from typing import Any

from ipckit._arguments import INT_MAX, integer
from ipckit._native import ffi
from ipckit._unpatched import signal, time
from ipckit.memory import SharedMemory
from ipckit.messagelog import MessageLog
from ipckit.process import Child, Reaper, fork
from ipckit.servers.server import SIGNALS, Server
from ipckit.signals import blocked

__all__ = ["ChildServer", "fork_child"]


class ChildServer(Server):
    """The base of the models fork and prefork.

    Args: max_children: connections at a time, each served by a process; the next ones wait in the backlog.
        The others: see Server.
    """

    def __init__(
        self,
        listeners: "socket.socket | Sequence[socket.socket]",
        log: MessageLog | None = None,
        *,
        max_children: int = 64,
        **options: Any,
    ) -> None:
        max_children = integer(max_children, "max_children", 1, INT_MAX)
        super().__init__(listeners, log, **options)
        self._max_connections = min(max_children, self._max_connections)
        self._reaper = Reaper()

    def _new_counters(self) -> Any:
        # With a descriptor, because a child that is not forked from us must be given it.
        self._counted = SharedMemory(ffi.sizeof("ik_server_counters"))
        return self._counted.buf

    def _workers(self) -> int:
        return len(self._reaper)

    def _adopt(self, child: Child) -> bool:
        """Have the reaper wait for it; False if no more can be watched: then it has been ended."""
        if self._try("wait for a child", lambda: self._reaper.add(child)):
            return True
        child.kill()
        child.wait()
        child.close()
        return False

    def _end_children(self, deadline: float) -> None:
        """Have them answer what has come, and end; kill those that have not at *deadline*."""
        self._reaper.send_signal(signal.SIGTERM)
        while len(self._reaper) and time.monotonic() < deadline:
            self.loop.turn(deadline)
        self._reaper.send_signal(signal.SIGKILL)
        while len(self._reaper):
            self.loop.turn()
        self._reaper.close()


def fork_child(target: Callable[[], int]) -> Child:
    """A child for a service in Python, which dies with us.

    The server's signals wait until ``ik_connection_guard()``: before, they would have their default action.
    """
    with blocked(SIGNALS):
        return fork(target, die_with_parent=True)
