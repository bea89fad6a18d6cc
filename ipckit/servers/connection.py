# SPDX-License-Identifier: MIT
"""One client of a server: its state machine in C, and its service in Python.

``step()`` goes on with it, at most a piece: receive, log, answer. What it returns says what it waits
for; the models differ in how they wait, and in nothing else.
"""

import logging
import socket
from typing import TYPE_CHECKING, Any

from ipckit._arguments import as_bytes, nanoseconds
from ipckit._native import ffi, lib
from ipckit.errors import check
from ipckit.servers.service import EchoService, Service

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ENDS", "Connection", "Terms", "accept", "new_block"]

ENDS: "dict[int, str]" = {
    lib.IK_END_DONE: "done",
    lib.IK_END_IDLE: "idle",
    lib.IK_END_NOT_READ: "not read",
    lib.IK_END_RESET: "reset",
    lib.IK_END_LOG_FAILED: "log failed",
    lib.IK_END_EXPIRED: "expired",
    lib.IK_END_SERVICE_FAILED: "service failed",
    lib.IK_END_TOO_MUCH: "too much",
    lib.IK_END_NO_MEMORY: "no memory",
    lib.IK_END_CUT: "cut",
    lib.IK_END_REFUSED: "refused",
}
"""how a connection ended, by the number that C gives it"""

_POINTER = ffi.typeof("ik_connection *")

_log = logging.getLogger("ipckit.servers")


class Terms:
    """What all connections of a server have in common: log, deadlines, limits, counters, service.

    Args: idle_timeout, total_timeout: as duration() gives them.
    """

    def __init__(
        self,
        service: "type[Service]",
        log: Any,
        counters: Any,
        *,
        idle_timeout: float,
        total_timeout: float,
        max_output: int,
    ) -> None:
        self.service = service
        self.native_service = service is EchoService
        self.counters = counters
        self.log = log  # a MessageLog or LogWriter, or None
        self.log_descriptors: list[int] = log.descriptors if log else []
        """what a child that only appends keeps of it"""
        self._form = ffi.new("ik_connection *")
        form = self._form
        form.socket = -1
        form.end = lib.IK_END_OPEN
        form.echoes = self.native_service
        form.log = log.native if log else ffi.NULL
        form.counters = counters
        form.max_output = max_output
        form.idle_ns, form.total_ns = nanoseconds(idle_timeout), nanoseconds(total_timeout)
        self.tick: float | None = lib.ik_connection_tick_ns(form.idle_ns, form.total_ns) / 1e9 or None
        """seconds between two looks at the deadlines"""

        self._value = form[0]

    def new(self) -> Any:
        """An ``ik_connection *`` of ours, without a client."""
        return ffi.new(_POINTER, self._value)

    def fill(self, native: Any) -> None:
        """Make an ``ik_connection *`` a new one of ours, without a client."""
        native[0] = self._value


def accept(native: Any, listener: socket.socket) -> Any:
    """Accept into an ``ik_connection *``, and give it back. Raises: OSError, see accept(2)."""
    check(lib.ik_connection_accept(native, listener.fileno()), "accept")
    return native


class Connection:
    """One client.

    Args: terms: of its server. native: an ``ik_connection *`` that ``terms`` filled, with a socket.
        block: IK_PIECE bytes for the pieces; connections that take turns share one.
    """

    __slots__ = ("__weakref__", "_block", "_kind", "native", "service")

    def __init__(self, terms: Terms, native: Any, block: Any) -> None:
        self.native = native
        self._block = block
        self._kind = terms.service
        self.service: Service | None = None
        """of this client, from start() on, unless C does it"""

    @classmethod
    def accept(cls, terms: Terms, listener: socket.socket, block: Any) -> "Self":
        """The next client of *listener*. Raises: OSError of accept(2), EAGAIN if there is none."""
        return cls(terms, accept(terms.new(), listener), block)

    def fileno(self) -> int:
        number: int = self.native.socket
        return number

    @property
    def peer(self) -> str:
        name: bytes = ffi.string(self.native.peer)
        return name.decode()

    @property
    def number(self) -> int:
        number: int = self.native.number
        return number

    @property
    def end(self) -> str | None:
        """How it ended; None while it has not."""
        return ENDS.get(self.native.end)

    def start(self) -> int:
        """Greet the client, as the service does; as step()."""
        return int(lib.IK_STEP_READ) if self.native.echoes else self._answer(self._started)

    def _started(self) -> bytes:
        self.service = service = self._kind()
        service.peer, service.number = self.peer, self.number
        return service.started()

    def step(self) -> int:
        """Go on, at most a piece: what it waits for (an ``ik_connection_step``), or IK_STEP_ENDED."""
        wanted: int = lib.ik_connection_step(self.native, self._block)
        if wanted < lib.IK_STEP_PIECE:
            return wanted
        assert self.service is not None
        if wanted == lib.IK_STEP_LAST:
            self.service.closing = True
            return self._answer(self.service.finished)
        return self._answer(self.service.received, bytes(ffi.buffer(self._block, self.native.piece_len)))

    def _answer(self, method: Any, *piece: bytes) -> int:
        try:
            answer = as_bytes(method(*piece), "the answer of a service")
            assert self.service is not None
            rc = self._send(answer, self.service.closing)
            if self.native.end == lib.IK_END_TOO_MUCH:
                self._tell_limit(len(answer))
        except BaseException:  # SystemExit and KeyboardInterrupt too: they would end all clients of a loop
            _log.exception("connection %d from %s: the service failed", self.number, self.peer)
            rc = lib.ik_connection_abort(self.native, lib.IK_END_SERVICE_FAILED)
        return rc

    def _tell_limit(self, size: int) -> None:
        text = "connection %d from %s: an answer of %d bytes exceeds max_output, %d"
        _log.warning(text, self.number, self.peer, size, self.native.max_output)

    def _send(self, answer: bytes, closing: bool) -> int:
        return int(lib.ik_connection_answer(self.native, answer, len(answer), closing))

    def run(self) -> int:
        """All of a client that its process has for its own: block until the end, then close.

        Returns: the end, as C numbers them.
        """
        self.native.blocking = True
        if self.native.echoes:
            return int(lib.ik_connection_run(self.native))
        self.serve()
        self.close()
        return int(self.native.end)

    def serve(self) -> None:
        """The same, of a service in Python, without the close: as a thread must do it."""
        self.native.blocking = True
        wanted = self.start()
        while wanted == lib.IK_STEP_READ:
            wanted = self.step()
        lib.ik_connection_hang_up(self.native)

    def close(self) -> None:
        """Close it; an open one counts as cut."""
        if self.native.socket < 0:
            return
        if self.native.end == lib.IK_END_OPEN:
            self.native.end = lib.IK_END_CUT
        lib.ik_connection_close(self.native)


def new_block() -> Any:
    """Room for a piece."""
    return ffi.new("char[]", lib.IK_PIECE)
