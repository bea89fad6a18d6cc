# SPDX-License-Identifier: MIT
"""The textbook's other concurrent server: one thread per connection, and a logger child.

::

    listen -> pipe + logger child -> loop: accept -> a thread -> it echoes and logs, hangs up, tells
                                                              -> the main thread joins it, closes

Every message reaches the log before its echo reaches the client. A thread costs a fraction of a process,
and all threads share their memory: what a service keeps for several clients needs a lock, and a service
that crashes the interpreter takes all clients with it.
"""

import errno
import functools
import logging
import math
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from ipckit._native import ffi, lib
from ipckit._unpatched import is_patched, os, threading, time
from ipckit.errors import check
from ipckit.messagelog import MessageLog
from ipckit.servers.connection import Connection, new_block
from ipckit.servers.loop import READ
from ipckit.servers.server import Server, event

__all__ = ["ThreadServer"]

# Seconds that a thread has to end after it was cut; longer needs only a service that blocks.
_GRACE = 2.0


class ThreadServer(Server):
    """Serve each connection by a thread of its own.

    A service may block: that holds up its own client only. One that never returns can't be cut at the
    stop; its thread is left until the process ends, with a warning. At the stop each thread is interrupted
    by SIGURG, for which there is a handler meanwhile that does nothing, unless there is one already.

    Args: see Server. max_connections is 1,000 unless told otherwise.
    Raises: as Server; RuntimeError for a service in Python where ``threading.Thread`` makes greenlets.
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
        if is_patched() and not self._terms.native_service:
            raise RuntimeError(
                "the thread server needs threads for a service in Python, and threading.Thread was replaced "
                "by what makes none: leave it alone (gevent: patch_all(thread=False)), or take another server"
            )
        self._serving: dict[int, tuple[Connection, Callable[[], None]]] = {}  # by number; how to join
        self._held: Connection | None = None  # accepted, but without a thread yet
        # A thread writes the number of its connection into it at its end. Only the main thread closes
        # sockets, so that its ticks and stops can't hit the next client that got the same descriptor.
        reader, writer = os.pipe()
        self._reader = open(reader, "rb", buffering=0)  # noqa: SIM115 - closed at the stop
        self._writer = open(writer, "wb", buffering=0)  # noqa: SIM115

    def _open(self) -> int:
        return len(self._serving) + (self._held is not None)

    def _workers(self) -> int:
        return len(self._serving)

    def _begin(self) -> None:
        self.loop.watch(self._reader, READ, self._join)
        if self._terms.tick:
            self.loop.every(self._terms.tick, self._tick)

    def _arrived(self, listener: socket.socket) -> None:
        block = None if self._terms.native_service else new_block()
        self._held = self._try("accept", lambda: Connection.accept(self._terms, listener, block))
        if self._held:
            self._start(self._held)
            self._listen()

    def _start(self, connection: Connection) -> None:
        """A thread for the connection that was accepted."""
        join = self._try("thread", lambda: self._start_thread(connection))
        if join is None:  # it is tried again after the pause
            return
        self._serving[connection.number] = connection, join
        self._held = None
        self._started(connection)

    def _start_thread(self, connection: Connection) -> Callable[[], None]:
        if self._terms.native_service:  # a thread in C, which never waits for the interpreter
            told = self._writer.fileno()
            native = ffi.new("ik_connection_thread *", {"connection": connection.native, "told": told})
            check(lib.ik_connection_start_thread(native), "thread")
            return functools.partial(lib.ik_connection_join, native)
        thread = threading.Thread(target=self._serve_in_thread, args=(connection,), daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, str(error)) from None
        return thread.join

    def _serve_in_thread(self, connection: Connection) -> None:
        try:
            lib.ik_connection_enter(connection.native)
            connection.serve()
        finally:
            self._writer.write(connection.number.to_bytes(8, sys.byteorder))

    def _join(self, _: int = 0) -> None:
        for number in memoryview(os.read(self._reader.fileno(), 1 << 16)).cast("Q"):
            connection, join = self._serving.pop(number)
            join()
            connection.close()
            self._ended(connection.number, connection.peer, connection.end)
        self._freed()

    def _go_on(self) -> None:
        super()._go_on()
        if self._held:
            self._start(self._held)

    def _tick(self) -> None:
        now = time.monotonic_ns()
        self._tell_all(lambda native: lib.ik_connection_tick(native, now))

    def _tell_all(self, how: Callable[[Any], None]) -> None:
        for connection, _ in self._serving.values():
            how(connection.native)

    def _end(self, deadline: float) -> None:
        if self._held:
            self._held.close()
            self._held = None
        lib.ik_connection_claim_signal()
        self._tell_all(lib.ik_connection_stop)
        self._await_threads(deadline)
        self._tell_all(lib.ik_connection_cut)
        # Nothing holds up a thread in C for long, and it must not outlive what it works with.
        self._await_threads(math.inf if self._terms.native_service else time.monotonic() + _GRACE)
        lib.ik_connection_release_signal()
        if self._serving:
            event("stuck", "%d services have not returned", len(self._serving), level=logging.WARNING)
            return
        self.loop.forget(self._reader)
        self._reader.close()
        self._writer.close()

    def _await_threads(self, deadline: float) -> None:
        while self._serving and time.monotonic() < deadline:
            self.loop.turn(deadline)
