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
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from ipckit._native import ffi, lib
from ipckit.messagelog import MessageLog
from ipckit.servers.connection import Connection, new_block
from ipckit.servers.loop import READ, WRITE, Handler, HasFileno, Loop, number_of
from ipckit.servers.server import Server

__all__ = ["AsyncioLoop", "AsyncioServer"]

_ACCEPTS = 64
_MOMENT = 0.001
# Who was to ring for an acknowledgement may have been killed just before.
_LOOK = 0.1


class AsyncioLoop(Loop):
    """The servers' loop on top of one of asyncio's, which turns by itself until ``wake()``."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(None, 1)
        self.asyncio = loop
        self._failure: BaseException | None = None

    def watch(self, source: "HasFileno | int", events: int, handler: Handler) -> None:
        fd = number_of(source)
        self.handlers[fd] = handler
        if events & READ:
            self.asyncio.add_reader(fd, self._call, handler, READ)
        if events & WRITE:
            self.asyncio.add_writer(fd, self._call, handler, WRITE)

    def forget(self, source: "HasFileno | int") -> None:
        fd = number_of(source)
        if self.handlers.pop(fd, None) is not None:
            self.asyncio.remove_reader(fd)
            self.asyncio.remove_writer(fd)

    def after(self, seconds: float, handler: Callable[[], object]) -> None:
        self.asyncio.call_later(seconds, self._call, handler)

    def every(self, seconds: float, handler: Callable[[], object]) -> None:
        def again() -> None:
            self.every(seconds, handler)
            handler()

        self.after(seconds, again)

    def _call(self, handler: Callable[..., object], *events: int) -> None:
        """asyncio would tell its logger of an error, and go on."""
        try:
            handler(*events)
        except BaseException as error:
            self._failure = error
            self.wake()

    def turn(self, until: float | None = None) -> None:
        timer = self.asyncio.call_later(
            1e6 if until is None else max(0.0, until - time.monotonic()), self.wake
        )
        self.asyncio.run_forever()
        timer.cancel()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wake(self) -> None:
        self.asyncio.stop()

    def close(self) -> None:
        for fd in list(self.handlers):
            self.forget(fd)
        self.asyncio.close()


class _Client(Connection, asyncio.BufferedProtocol):
    """A connection as a protocol; sending and receiving are its transport's.

    All transports receive into one block, so what they hand over is never longer than a piece.
    """

    __slots__ = ("_full", "_piece", "_server", "_transport", "_unsent", "_view")

    _server: "AsyncioServer"
    _view: memoryview  # the block
    _transport: Any
    _piece: bytes  # that the log has not taken yet
    _full: bool  # the client has not taken all of its answer; nothing is read until then
    _unsent: int  # of it, at the last tick

    def join(self, server: "AsyncioServer", view: memoryview) -> None:
        self._server, self._view = server, view
        self._transport, self._piece, self._full, self._unsent = None, b"", False, 0

    # --- what the transport calls

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.set_write_buffer_limits(0)  # pause_writing() as soon as anything is unsent
        if not self.native.echoes:
            self._go_on(self.start())
            if self._full:  # CPython 3.10 and uvloop begin to read after this all the same
                self._server.loop.after(0, self._pause_again)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        piece = self._view[:nbytes].tobytes()
        if not self._take(piece):
            self._piece = piece
            self._transport.pause_reading()
            self._server._wait_for_log(self)

    def eof_received(self) -> bool:
        if self.service is None:
            self._go_on(lib.ik_connection_finish(self.native))
        else:
            self.service.closing = True
            self._go_on(self._answer(self.service.finished))
        return True  # we close it

    def pause_writing(self) -> None:
        self._full = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._full = False
        self.native.moved = True
        if self.native.end == lib.IK_END_OPEN:
            self._transport.resume_reading()
        elif not self._transport.is_closing():
            self._go_on(lib.ik_connection_finish(self.native))

    def connection_lost(self, exc: "Exception | None") -> None:
        if self.native.end == lib.IK_END_OPEN:
            lib.ik_connection_lost(self.native, self._full)
        self.native.socket = -1  # the transport closes it
        lib.ik_connection_close(self.native)
        self._server._lost(self)

    # --- what we do

    def _pause_again(self) -> None:
        if self._full and self.fileno() >= 0:
            self._transport.resume_reading()
            self._transport.pause_reading()

    def _take(self, piece: bytes) -> bool:
        """Log a piece and answer it; False if the log can't take it now."""
        wanted = lib.ik_connection_take(self.native, piece, len(piece))
        if wanted == lib.IK_STEP_PIECE:
            if self.service is None:
                self._transport.write(piece)
                return True
            wanted = self._answer(self.service.received, piece)
        if wanted in (lib.IK_STEP_LOG, lib.IK_STEP_ACK):
            return False
        self._go_on(wanted)
        return True

    def _send(self, answer: bytes, closing: bool) -> int:
        wanted = int(lib.ik_connection_answered(self.native, len(answer), closing))
        if answer and wanted != lib.IK_STEP_ENDED:
            self._transport.write(answer)
        return wanted

    def _go_on(self, wanted: int) -> None:
        if wanted == lib.IK_STEP_LINGER:
            self._transport.pause_reading()
            if not self._full:  # else resume_writing() comes here again
                self._linger()
        elif wanted == lib.IK_STEP_ENDED:
            self._transport.close()

    def _linger(self) -> None:
        if self.fileno() < 0:
            return
        if lib.ik_connection_flushed(self.native):
            self._transport.close()
        else:
            self._server.loop.after(_MOMENT, self._linger)

    def retry(self) -> bool:
        """Once more, with the piece that waits for the log; False if it still does."""
        if self.fileno() >= 0:
            if not self._take(self._piece):
                return False
            self._piece = b""
            if not self._full and self.native.end == lib.IK_END_OPEN:
                self._transport.resume_reading()
        return True

    def tick(self, now: int) -> None:
        if self._full:
            unsent = self._transport.get_write_buffer_size()
            self.native.moved |= unsent != self._unsent
            self._unsent = unsent
        lib.ik_connection_tick(self.native, now)

    def cut(self) -> None:
        lib.ik_connection_cut(self.native)
        if self._transport is not None:
            self._transport.abort()


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
        self._asyncio = _new_loop(uvloop)
        super().__init__(listeners, log, **options)
        self._clients: set[_Client] = set()
        self._waiting: deque[_Client] = deque()  # for the log
        self._looking = False
        self._connecting: set[asyncio.Task[None]] = set()
        self._block = new_block()
        form = ffi.new("ik_connection *")
        self._terms.fill(form)
        self._view = memoryview(ffi.buffer(self._block, lib.ik_connection_most(form)))

    def _new_loop(self) -> Loop:
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
        client = self._try("accept", lambda: _Client.accept(self._terms, listener, self._block))
        if client is None:
            return False
        client.join(self, self._view)
        self._clients.add(client)
        self._started(client)
        connection = socket.socket(listener.family, socket.SOCK_STREAM, fileno=client.fileno())
        connection.setblocking(False)
        task = self._asyncio.create_task(self._connect(client, connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return True

    async def _connect(self, client: _Client, connection: socket.socket) -> None:
        try:
            await self._asyncio.connect_accepted_socket(lambda: client, connection)
        except OSError:  # no memory for the loop to wait for it
            lib.ik_connection_abort(client.native, lib.IK_END_NO_MEMORY)
            connection.close()
            client.connection_lost(None)

    def _lost(self, client: _Client) -> None:
        was_full = self._open() == self._max_connections
        self._clients.remove(client)
        self._ended(client.number, client.peer, client.end)
        if self._stopping:
            self.loop.wake()
        elif self._paused:  # now there is one of what was short
            self._go_on()
        elif was_full:
            self._listen()

    # --- waiting for the log

    def _wait_for_log(self, client: _Client) -> None:
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
        for client in self._clients:
            lib.ik_connection_stop(client.native)  # what has come is read yet, then the end of file
        while self._clients and time.monotonic() < deadline:
            self.loop.turn(deadline)
        for client in self._clients:
            client.cut()
        while self._clients:
            self.loop.turn()


def _new_loop(uvloop: bool | None) -> asyncio.AbstractEventLoop:
    if uvloop is not False:
        try:
            from uvloop import new_event_loop
        except ImportError:
            if uvloop:
                raise
        else:
            made: asyncio.AbstractEventLoop = new_event_loop()
            return made
    return asyncio.new_event_loop()
