# SPDX-License-Identifier: MIT
"""The textbook's other concurrent server: one thread per connection, and a logger child.

::

    listen -> pipe + logger child -> loop: accept -> a thread -> it echoes and logs, closes, ends
                                                              -> the main thread joins it

Every message reaches the log before its echo reaches the client. A thread starts in a fraction of the
time of a process, and all share their memory: what a service keeps for several clients needs a lock, and
a service that crashes the interpreter takes all clients with it.
"""

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from ipckit._native import lib
from ipckit.messagelog import MessageLog
from ipckit.servers.connection import Connection, new_block
from ipckit.servers.loop import READ
from ipckit.servers.server import Server, event

__all__ = ["ThreadServer"]

# What serves in C needs little. A service may recurse as deep as Python allows: it has the default.
_STACK = 256 << 10
# Seconds that a thread which was cut has to notice; longer only a service that blocks.
_GRACE = 2.0


class ThreadServer(Server):
    """Serve each connection by a thread of its own.

    A service may block: it holds up only its own client. One that never returns can't be cut at the stop;
    its thread is left to the end of the process, with a warning.

    Args: see Server. max_connections is 1,000 unless said otherwise.
    """

    model: ClassVar[str] = "thread"
    most: ClassVar[int] = 1_000

    def __init__(
        self,
        listeners: "socket.socket | Sequence[socket.socket]",
        log: MessageLog | None = None,
        **options: Any,
    ) -> None:
        super().__init__(listeners, log, **options)
        self._threads: dict[Connection, threading.Thread] = {}
        self._ended_ones: list[Connection] = []  # whose threads are to be joined
        # Who closes a connection holds it, and who shuts one down: or that might hit the next client,
        # which has got the same number.
        self._closing = threading.Lock()
        self._bell = open(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), "r+b", buffering=0)
        self._held: Connection | None = None  # accepted, but without a thread yet

    def _open(self) -> int:
        return len(self._threads) + (self._held is not None)

    def _workers(self) -> int:
        return len(self._threads)

    def _begin(self) -> None:
        self.loop.watch(self._bell, READ, self._join)
        if self._terms.tick:
            self.loop.every(self._terms.tick, self._tick)

    def _arrived(self, listener: socket.socket) -> None:
        block = None if self._terms.native_service else new_block()
        self._held = self._try("accept", lambda: Connection.accept(self._terms, listener, block))
        if self._held:
            self._start_thread(self._held)
            self._listen()

    def _start_thread(self, connection: Connection) -> None:
        thread = threading.Thread(target=self._serve_client, args=(connection,), daemon=True)
        self._threads[connection] = thread
        if self._try("thread", lambda: _start(thread, small=self._terms.native_service)) is None:
            del self._threads[connection]  # it is tried again after the pause
            return
        self._held = None
        self._started(connection)

    def _serve_client(self, connection: Connection) -> None:
        """The life of a thread."""
        try:
            connection.serve()
        finally:
            with self._closing:
                connection.close()
            self._ended_ones.append(connection)
            os.eventfd_write(self._bell.fileno(), 1)

    def _join(self, _: int = 0) -> None:
        os.eventfd_read(self._bell.fileno())
        while self._ended_ones:
            connection = self._ended_ones.pop()
            self._threads.pop(connection).join()
            self._ended(connection.number, connection.peer, connection.end)
        if self._paused:  # now there is one of what was short
            self._go_on()
        else:
            self._listen()

    def _go_on(self) -> None:
        super()._go_on()
        if self._held:
            self._start_thread(self._held)

    def _tick(self) -> None:
        now = time.monotonic_ns()
        self._tell_all(lambda native: lib.ik_connection_tick(native, now))

    def _end(self, deadline: float) -> None:
        if self._held:
            self._held.close()
            self._held = None
        self._tell_all(lib.ik_connection_stop)
        self._await_threads(deadline)
        self._tell_all(lib.ik_connection_cut)
        self._await_threads(time.monotonic() + _GRACE)
        if self._threads:
            event("stuck", "%d services never returned", len(self._threads), level=logging.WARNING)
        else:
            self.loop.forget(self._bell)
            self._bell.close()

    def _tell_all(self, how: Any) -> None:
        with self._closing:
            for connection in self._threads:
                if connection.fileno() >= 0:
                    how(connection.native)

    def _await_threads(self, deadline: float) -> None:
        while self._threads and time.monotonic() < deadline:
            self.loop.turn(deadline)


def _start(thread: threading.Thread, *, small: bool) -> bool:
    """Raises: OSError EAGAIN: out of memory, or at the limit of processes, which counts threads."""
    before = threading.stack_size(_STACK) if small else None
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from None
    finally:
        if before is not None:
            threading.stack_size(before)
    return True
