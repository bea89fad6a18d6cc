# SPDX-License-Identifier: MIT
"""A client of the asyncio server: its connection as a protocol of asyncio's."""

import asyncio
import errno
import functools
from typing import Any, Protocol

from ipckit._native import lib
from ipckit.servers.connection import Connection
from ipckit.servers.loop import Loop

__all__ = ["Client", "ServesClients"]

# Between two looks at who lingers; the second one once nothing has come of some looks.
_MOMENT, _LONGEST_MOMENT = 0.001, 0.064


class ServesClients(Protocol):
    """What a client needs of its server."""

    loop: Loop

    def wait_for_log(self, client: "Client") -> None:
        """Call its ``retry()``, after those of who waits already, when the log goes on."""

    def lost(self, client: "Client") -> None:
        """It has ended."""


class Client(Connection, asyncio.BufferedProtocol):
    """A connection as a protocol; sending and receiving are its transport's.

    All transports receive into one block, so what they hand over is never longer than a piece.
    """

    __slots__ = ("_full", "_piece", "_server", "_transport", "_view")

    _server: "ServesClients"
    _view: memoryview  # the block
    _transport: Any
    _piece: bytes  # that the log has not taken yet
    _full: bool  # the client has not taken all of its answer; nothing is read until then

    def join(self, server: "ServesClients", view: memoryview) -> None:
        self._server, self._view = server, view
        self._transport, self._piece, self._full = None, b"", False

    # --- what the transport calls

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.set_write_buffer_limits(0)  # pause_writing() as soon as anything is unsent
        if self.native.stopping:  # before this; what has come is seen when the transport reads
            self._server.loop.after(0, self.stop)
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
            self._server.wait_for_log(self)
        elif self.native.stopping:
            self.stop()

    def eof_received(self) -> bool:
        if self.service is None:
            self._go_on(lib.ik_connection_finish(self.native))
        else:
            self.service.closing = True
            self._go_on(self._answer(self.service.finished))
        return True  # we close it

    def stop(self) -> None:
        """Told to: once all that has come is answered, this is the end, as if the client had ended."""
        waits = self._transport is None or self._piece or self._full
        if not waits and self.native.end == lib.IK_END_OPEN and lib.ik_connection_is_drained(self.native):
            self.eof_received()

    def pause_writing(self) -> None:
        self._full = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._full = False
        self.native.moved = True
        if self.native.end == lib.IK_END_OPEN:
            self._read_on()
        elif not self._transport.is_closing():
            self._go_on(lib.ik_connection_finish(self.native))

    def connection_lost(self, exc: "Exception | None") -> None:
        if self.native.end == lib.IK_END_OPEN:
            lib.ik_connection_lost(self.native)
        if isinstance(exc, OSError) and exc.errno in (errno.ENOMEM, errno.ENOSPC):  # of epoll_ctl(2)
            lib.ik_connection_abort(self.native, lib.IK_END_NO_MEMORY)
        self.native.socket = -1  # the transport closes it
        lib.ik_connection_close(self.native)
        self._server.lost(self)

    # --- what we do

    def _pause_again(self) -> None:
        if self._full and self.fileno() >= 0:
            self._transport.resume_reading()
            self._transport.pause_reading()

    def _read_on(self) -> None:
        """Read again; told to stop, only what has come already."""
        try:
            self._transport.resume_reading()
        except OSError:  # of epoll_ctl(2)
            lib.ik_connection_abort(self.native, lib.IK_END_NO_MEMORY)
            self._transport.abort()
        if self.native.stopping:
            self.stop()

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

    def _linger(self, moment: float = _MOMENT) -> None:
        if self.fileno() < 0:
            return
        if lib.ik_connection_flushed(self.native):
            self._transport.close()
        else:
            again = functools.partial(self._linger, min(2 * moment, _LONGEST_MOMENT))
            self._server.loop.after(moment, again)

    def retry(self) -> bool:
        """Once more, with the piece that waits for the log; False if it still does."""
        if self.fileno() >= 0:
            if not self._take(self._piece):
                return False
            self._piece = b""
            if not self._full and self.native.end == lib.IK_END_OPEN:
                self._read_on()
        return True

    def tick(self, now: int) -> None:
        if self._transport is not None:
            self.native.held = self._transport.get_write_buffer_size()
        lib.ik_connection_tick(self.native, now)
        if self._piece and self.native.expired:  # it waits for the log, so nothing else tells
            self._transport.abort()

    def cut(self) -> None:
        lib.ik_connection_cut(self.native)
        if self.native.end != lib.IK_END_OPEN:
            lib.ik_connection_flushed(self.native)  # cut, unless it has all of its answer
        if self._transport is not None:
            self._transport.abort()
