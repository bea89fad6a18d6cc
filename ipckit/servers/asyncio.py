# SPDX-License-Identifier: MIT
"""The server of asyncio's way: one process, whose loop calls a protocol object of each client.

::

    listen -> loop: a listener is ready -> accept, and make a transport and a protocol for that client
                    bytes have come     -> the protocol logs the piece and writes it to the transport
                    the client is slow  -> it reads no more until the transport is empty

Sending and receiving are asyncio's, or uvloop's, which is asyncio's loop in C and twice as fast. Use it
where the service shares a process with other coroutines; the model epoll does the same with less.
"""

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar

from ipckit._native import ffi, lib
from ipckit._unpatched import os, time
from ipckit.messagelog import MessageLog
from ipckit.servers.asyncio_loop import AsyncioLoop, new_event_loop
from ipckit.servers.connection import new_block
from ipckit.servers.loop import READ, WRITE, Loop
from ipckit.servers.protocol import Client
from ipckit.servers.server import Server

__all__ = ["AsyncioServer"]

_ACCEPTS = 64
# Who was to ring for an acknowledgement may have been killed just before.
_LOOK = 0.1


class AsyncioServer(Server):
    """Serve all connections in this process, by a loop of asyncio's.

    Args: uvloop: True: use it; False: use asyncio's own loop; None: use it if it is installed.
        The others: see Server.
    """

    model: ClassVar[str] = "asyncio"

    def __init__(
        self,
        listeners: "socket.socket | Sequence[socket.socket]",
        log: MessageLog | None = None,
        *,
        uvloop: bool | None = None,
        **options: Any,
    ) -> None:
        self._uvloop = uvloop
        super().__init__(listeners, log, **options)
        self._clients: set[Client] = set()
        self._waiting: deque[Client] = deque()  # for the log
        self._looking = False
        self._block = new_block()
        form = ffi.new("ik_connection *")
        self._terms.fill(form)
        self._view = memoryview(ffi.buffer(self._block, lib.ik_connection_most(form)))

    def _new_loop(self) -> Loop:
        self._asyncio = new_event_loop(self._uvloop)
        return AsyncioLoop(self._asyncio)

    def _open(self) -> int:
        return len(self._clients)

    def _begin(self) -> None:
        if self._log is not None:
            self.loop.watch(self._log.native.acked, READ, self._acknowledged)
        if self._terms.tick is not None:
            self.loop.every(self._terms.tick, self._tick)

    # --- accepting; asyncio's own way, out of descriptors, is a traceback and a second's sleep

    def _arrived(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPTS):
            if self._open() == self._max_connections or not self._accept(listener):
                break
        self._listen()

    def _accept(self, listener: socket.socket) -> bool:
        client = self._try("accept", lambda: Client.accept(self._terms, listener, self._block))
        if client is None:
            return False
        client.join(self, self._view)
        self._clients.add(client)
        self._started(client)
        connection = socket.socket(listener.family, socket.SOCK_STREAM, fileno=client.fileno())
        connection.setblocking(False)
        self._asyncio.create_task(self._connect(client, connection))
        return True

    async def _connect(self, client: Client, connection: socket.socket) -> None:
        try:
            self._reserve(connection)
            await self._asyncio.connect_accepted_socket(lambda: client, connection)
        except OSError as error:
            self._pause("wait for a client", error)
            lib.ik_connection_abort(client.native, lib.IK_END_NO_MEMORY)
            self._release(connection)
            connection.close()
            client.connection_lost(None)

    def _reserve(self, connection: socket.socket) -> None:
        """Have epoll_ctl(2) fail here, if it does, and not in a callback of the transport, which nobody sees.

        The transport only changes what is called. uvloop's does it by itself (libuv aborts).
        """
        if isinstance(self._asyncio, asyncio.SelectorEventLoop):
            self._asyncio.add_reader(connection, bool)

    def _release(self, connection: socket.socket) -> None:
        if isinstance(self._asyncio, asyncio.SelectorEventLoop):
            with contextlib.suppress(RuntimeError):  # there is a transport, which does it
                self._asyncio.remove_reader(connection)

    def lost(self, client: Client) -> None:
        was_full = self._open() == self._max_connections
        self._clients.remove(client)
        self._ended(client.number, client.peer, client.end)
        if self._stopping:
            self.loop.wake()
        elif was_full or self._paused:
            self._freed()

    # --- waiting for the log

    def wait_for_log(self, client: Client) -> None:
        self._waiting.append(client)
        self._watch_log()

    def _watch_log(self) -> None:
        log = self._terms.log.native
        if not (self._waiting and self._waiting[0].native.append.full):
            self.loop.forget(log.writer)
        elif not self.loop.watches(log.writer):
            self.loop.watch(log.writer, WRITE, self._room)
        if self._waiting and not self._looking:
            self._looking = True
            self.loop.after(_LOOK, self._look)

    def _acknowledged(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._terms.log.native.acked)
        self._room()

    def _look(self) -> None:
        self._looking = False
        self._room()

    def _room(self, _: int = 0) -> None:
        """The log goes on: those that wait for it do so in their order."""
        while self._waiting and self._waiting[0].retry():
            self._waiting.popleft()
        self._watch_log()

    # --- deadlines and the end

    def _tick(self) -> None:
        now = time.monotonic_ns()
        for client in self._clients:
            client.tick(now)

    def _end(self, deadline: float) -> None:
        for client in list(self._clients):
            lib.ik_connection_stop(client.native)
            client.stop()
        while self._clients and time.monotonic() < deadline:
            self.loop.turn(deadline)
        for client in self._clients:
            client.cut()
        while self._clients:
            self.loop.turn()
