# SPDX-License-Identifier: MIT
"""The textbook's concurrent echo server: one process per connection, and a logger child.

::

    listen -> pipe + logger child -> loop: accept -> fork -> the child echoes and logs, exits
                                                         -> the parent closes its copy, reaps

Every message reaches the log before its echo reaches the client.
"""

import errno
import logging
import mmap
import os
import select
import signal
import socket
import time
from collections import Counter
from dataclasses import dataclass

from ipckit import wait
from ipckit._native import ffi, lib
from ipckit.messagelog import LogStats, MessageLog
from ipckit.process import ExitStatus, NativeMemory, Reaper, fork_native
from ipckit.servers.listening import _endpoint, listen
from ipckit.signals import SignalQueue

__all__ = ["ForkServer", "ServerStats", "listen"]

_ECHO = ffi.addressof(lib, "ik_echo_run")
_ENDS = {
    lib.IK_ECHO_DONE: "done",
    lib.IK_ECHO_IDLE: "idle",
    lib.IK_ECHO_NOT_READ: "not read",
    lib.IK_ECHO_RESET: "reset",
    lib.IK_ECHO_LOG_FAILED: "log failed",
}
# accept(2): errors of the one connection, not of the listener; the next one may do.
_TRY_NEXT = {
    errno.ECONNABORTED, errno.EPROTO, errno.ENOPROTOOPT, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENONET, errno.EPERM, errno.ETIMEDOUT,
}  # fmt: skip
# Out of descriptors, memory or processes: it passes when some connection ends.
_SHORTAGE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN}
_PAUSE = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerStats:
    """What a server did, from its start."""

    connections: int
    echoes: int
    bytes: int
    ends: "dict[str, int]"
    """how the connections ended: done, idle, not read, reset, log failed, killed"""
    log: LogStats | None


class ForkServer:
    """Serve *listener*'s connections, a process each, logging to *log* before echoing.

    Args: listener: a listening stream socket; made non-blocking, closed at the stop.
        log: the message log, or None; stays open.
        max_children: at that many connections at a time the next ones wait in the backlog.
        idle_timeout: seconds after which a silent client, or one that takes none of its answer, is
            closed, or up to a quarter later; None: never.
    """

    def __init__(
        self,
        listener: socket.socket,
        log: MessageLog | None,
        *,
        max_children: int = 64,
        idle_timeout: float | None = 60.0,
    ) -> None:
        if max_children < 1:
            raise ValueError(f"max_children must be at least 1, not {max_children}")
        if idle_timeout is not None and not idle_timeout > 0:
            raise ValueError(f"idle_timeout must be None or more than 0 seconds, not {idle_timeout!r}")
        self._listener = listener
        self._log = log
        self._max_children = max_children
        self._connections = 0
        self._held: tuple[socket.socket, str] | None = None  # accepted, but not forked for yet
        self._ends: Counter[str] = Counter()
        self._paused_until = 0.0
        self._last_warning = 0.0
        self._counted = mmap.mmap(-1, ffi.sizeof("ik_echo_counters"))  # shared with the children
        self._counters = ffi.from_buffer("ik_echo_counters *", self._counted)
        # One for all: each child gets it as it stood at its fork.
        self._memory = NativeMemory("ik_echo_job")
        self._job = self._memory.argument
        self._job.echo.idle_ns = int((idle_timeout or 0) * 1e9)
        self._job.echo.peer = self._job.peer
        self._job.echo.counters = self._counters
        if log:
            self._job.log = log.native[0]
            self._job.echo.log = ffi.addressof(self._job, "log")

    def serve(self, *, stop_timeout: float | None = 10.0) -> None:
        """Serve until SIGTERM or SIGINT; then accept no more, let the children finish, return.

        On the signal each child echoes and logs what has come already. Those that have not ended
        after *stop_timeout* seconds are killed. Call it in the main thread, before others start:
        both signals are blocked meanwhile and taken by a descriptor.
        """
        self._listener.setblocking(False)
        with SignalQueue([signal.SIGTERM, signal.SIGINT]) as signals, Reaper() as reaper:
            try:
                self._serve_until(signals, reaper)
            finally:
                self._listener.close()
                if self._held is not None:
                    self._held[0].close()
                self._stop(reaper, wait.deadline(stop_timeout))

    def _serve_until(self, signals: SignalQueue, reaper: Reaper) -> None:
        while True:
            pause = self._paused_until - time.monotonic()
            listening = pause <= 0 and len(reaper) < self._max_children
            patience = 0.0 if listening and self._held else pause if pause > 0 else None
            ready = self._wait(reaper, [signals, self._listener] if listening else [signals], patience)
            if signals.fileno() in ready:
                signals.recv_many(timeout=0)
                return
            if listening and (self._held or self._listener.fileno() in ready):
                self._accept(reaper)

    def _wait(
        self, reaper: Reaper, others: "list[SignalQueue | socket.socket]", seconds: float | None
    ) -> set[int]:
        """Wait for *others*, for our children and our logger; see to those two; the ready descriptors."""
        poll = select.poll()
        for source in (reaper, *others, *([self._log] if self._log else [])):
            poll.register(source, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(None if seconds is None else seconds * 1000)}
        if reaper.fileno() in ready:
            for _, status in reaper.reap():
                self._ends[self._how(status)] += 1
                self._paused_until = 0.0  # now there is one of what was short
        if self._log and self._log.fileno() in ready:
            self._log.supervise()
        return ready

    @staticmethod
    def _how(status: ExitStatus) -> str:
        return _ENDS.get(status.code, str(status)) if status.exited else "killed"

    def _accept(self, reaper: Reaper) -> None:
        if self._held is None:
            self._held = self._next_connection()
        if self._held is not None and self._fork(*self._held, reaper):
            self._held[0].close()  # the parent's copy; the child has its own
            self._held = None

    def _next_connection(self) -> "tuple[socket.socket, str] | None":
        try:
            connection, address = self._listener.accept()
        except BlockingIOError:  # the client has gone again
            return None
        except OSError as error:
            if error.errno in _SHORTAGE:
                self._pause("accept", error)
            elif error.errno not in _TRY_NEXT:
                raise
            return None
        self._connections += 1
        return connection, _endpoint(address)

    def _fork(self, connection: socket.socket, peer: str, reaper: Reaper) -> bool:
        job = self._job
        job.echo.socket = connection.fileno()
        job.echo.connection = self._connections
        job.peer = peer.encode()
        keep = (connection, job.log.writer, job.log.wake) if self._log else (connection,)
        try:
            reaper.add(fork_native(_ECHO, job, keep=keep, memory=self._memory))
        except OSError as error:
            self._pause("fork", error)
            return False
        return True

    def _pause(self, call: str, error: OSError) -> None:
        """Leave the backlog alone for a moment, or it would wake us without end; say so once a second."""
        now = time.monotonic()
        self._paused_until = now + _PAUSE
        if now - self._last_warning >= 1:
            self._last_warning = now
            _log.warning("%s: %s; new connections wait", call, os.strerror(error.errno or 0))

    def _stop(self, reaper: Reaper, deadline_ns: int) -> None:
        reaper.send_signal(signal.SIGTERM)
        while len(reaper) and wait.remaining(deadline_ns) != 0:
            self._wait(reaper, [], wait.remaining(deadline_ns))
        reaper.send_signal(signal.SIGKILL)
        while len(reaper):
            self._wait(reaper, [], None)

    def stats(self) -> ServerStats:
        """The counters of this moment."""
        return ServerStats(
            connections=self._connections,
            echoes=self._counters.echoes,
            bytes=self._counters.bytes,
            ends=dict(self._ends),
            log=self._log.stats() if self._log else None,
        )
