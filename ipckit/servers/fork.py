# SPDX-License-Identifier: MIT
"""The textbook's concurrent server: one process per connection, and a logger child.

::

    listen -> pipe + logger child -> loop: accept -> fork -> the child echoes and logs, exits
                                                         -> the parent closes its copy, reaps

Every message reaches the log before its echo reaches the client.
"""

import socket
from collections.abc import Sequence
from typing import Any, ClassVar

from ipckit._native import ffi, lib
from ipckit._spawner import CONNECTION, Spawner
from ipckit._unpatched import os
from ipckit.messagelog import MessageLog
from ipckit.process import Child
from ipckit.servers.children import ChildServer, fork_child
from ipckit.servers.connection import ENDS, Connection, accept, new_block
from ipckit.servers.loop import READ

__all__ = ["ForkServer"]


class ForkServer(ChildServer):
    """Serve each connection by a process of its own.

    Args: see ChildServer.
    """

    model: ClassVar[str] = "fork"

    def __init__(
        self,
        listeners: "socket.socket | Sequence[socket.socket]",
        log: MessageLog | None = None,
        **options: Any,
    ) -> None:
        super().__init__(listeners, log, **options)
        self._clients: dict[Child, tuple[int, str]] = {}
        self._held = False  # a connection is accepted, but not forked for yet
        self._spawner = Spawner()
        # One for all: each child gets it as it stands then.
        self._job = ffi.new("ik_connection_job *")
        self._native = ffi.addressof(self._job, "connection")
        if log:
            self._job.log = log.native[0]

    def _open(self) -> int:
        return len(self._reaper) + self._held

    def _begin(self) -> None:
        self.loop.watch(self._reaper, READ, self._reap)

    def _arrived(self, listener: socket.socket) -> None:
        self._terms.fill(self._native)
        if self._log:
            self._native.log = ffi.addressof(self._job, "log")
        if self._try("accept", lambda: accept(self._native, listener)):
            self._held = True
            self._fork()
            self._listen()

    def _fork(self) -> None:
        """A child for the connection that was accepted; then the parent closes its copy."""
        child = self._try("fork", self._start_child)
        if child is None:  # it is tried again after the pause
            return
        connection = Connection(self._terms, self._native, None)
        number, peer = connection.number, connection.peer
        self._started(connection)
        if self._adopt(child):
            self._clients[child] = (number, peer)
        else:
            self._killed += 1
            self._ended(number, peer, "killed")
        self._let_go()

    def _start_child(self) -> Child:
        if self._terms.native_service:
            fds = (self._native.socket, self._counted.fileno(), *self._terms.log_descriptors)
            return self._spawner.start(CONNECTION, self._job, fds)
        return fork_child(self._serve_in_child)

    def _serve_in_child(self) -> int:
        for listener in self.listeners:
            listener.close()
        lib.ik_connection_guard(self._native)
        return Connection(self._terms, self._native, new_block()).run()

    def _let_go(self) -> None:
        os.close(self._native.socket)
        self._held = False

    def _go_on(self) -> None:
        super()._go_on()
        if self._held:
            self._fork()

    def _reap(self, _: int = 0) -> None:
        for child, status in self._reaper.reap():
            self._killed += status.signaled
            self._ended(
                *self._clients.pop(child), "killed" if status.signaled else ENDS.get(status.code or 0)
            )
        self._freed()

    def _end(self, deadline: float) -> None:
        if self._held:
            self._let_go()
        self._spawner.close()
        self._end_children(deadline)
