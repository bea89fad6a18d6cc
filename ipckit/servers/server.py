# SPDX-License-Identifier: MIT
"""What all servers have in common, whatever their model: the promises to clients and operators.

==========  =====================================================================================
signal      what the server does
==========  =====================================================================================
SIGTERM     accepts no more, answers what has come already, ends; SIGINT too
SIGHUP      opens the log's path again, after a rotation (``MessageLog.reopen()``); ends the server if
            the controlling terminal that it was started with is gone; nothing if ignored (nohup)
SIGUSR1     prints its statistics
==========  =====================================================================================

serve() takes them by a ``SelfPipe``: threads that a service has started before do no harm, and the programs
that it starts have neither blocked nor ignored signals of ours. In another thread than the main one serve()
takes none: ``stop()`` ends it.

A service manager is told when the server is ready, opens its log again, and stops (``notify()``).

A piece is in the log before its answer is sent. Out of descriptors, memory or processes the server
leaves the backlog alone for a moment, says so once a second, and serves those it has. A client that is
slow, silent, or resets costs only itself. When the server is killed its processes end with it.
"""

import contextlib
import errno
import functools
import logging
import math
import mmap
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from ipckit._arguments import INT_MAX, LONG_MAX, duration, integer
from ipckit._handles import Rooted
from ipckit._native import ffi, lib
from ipckit._unpatched import os, signal, time
from ipckit.messagelog import LogStats, MessageLog, Reopening
from ipckit.servers.connection import ENDS, Terms
from ipckit.servers.listening import endpoint, notify
from ipckit.servers.loop import READ, Loop, delay
from ipckit.servers.service import EchoService, Service
from ipckit.servers.terminal import LOOK_AGAIN, LOOK_EVERY, terminal
from ipckit.signals import SelfPipe, is_main_thread

__all__ = ["SIGNALS", "Server", "ServerStats", "taken_signals"]

# accept(2): errors of the one connection, not of the listener; the next one may do.
_TRY_NEXT = {
    errno.EAGAIN, errno.ECONNABORTED, errno.EPROTO, errno.ENOPROTOOPT, errno.ENETDOWN, errno.ENETUNREACH,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENONET, errno.EPERM, errno.ETIMEDOUT,
}  # fmt: skip
# Out of descriptors, memory, processes or watches of epoll: it passes when some connection ends.
_SHORTAGE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.ENOSPC}
_PAUSE = 0.1
_LOG_TICK = 1.0
_REOPEN_TIMEOUT = 1.0
_STOPS = {signal.SIGTERM, signal.SIGINT}
SIGNALS = {*_STOPS, signal.SIGHUP, signal.SIGUSR1}

_log = logging.getLogger("ipckit.servers")
_T = TypeVar("_T")


class HasPeer(Protocol):
    """A connection, as far as it is told of."""

    @property
    def number(self) -> int: ...
    @property
    def peer(self) -> str: ...


@dataclass(frozen=True)
class ServerStats:
    """What a server did, from its start."""

    model: str
    connections: int
    """accepted"""
    open: int
    """of them, served now"""
    echoes: int
    """pieces answered"""
    bytes: int
    """of the answers"""
    ends: "dict[str, int]"
    """how connections ended: done, idle, not read, reset, log failed, expired, service failed, too much,
    no memory, cut (still open at the stop), refused (by select, for its number), killed"""
    workers: int
    """processes or threads that serve, now"""
    replaced: int
    """workers that died and were replaced"""
    log: LogStats | None


class Server(Rooted):
    """The base of all models: a subclass says in ``_arrived()`` what it does with a connection.

    Args: listeners: a listening stream socket, or several; made non-blocking, closed at the stop.
        log: the message log, or None; stays open.
        service: what is done with a client, see ``ipckit.servers.service``.
        max_connections: at that many at a time the next ones wait in the backlog.
        idle_timeout: seconds after which a silent client, or one that takes none of its answer, is
            closed, or up to a quarter later; None: never. One that has taken some of it has in any case
            the time to read that at 8 KiB/s, up to 16 seconds.
        total_timeout: seconds that a connection may last at all, or up to a quarter more, whatever it
            waits for; None: any.
        max_output: bytes; a longer answer of a service is not sent, and ends the connection. Until a
            client has taken one answer nothing more is read from it.
    """

    model: ClassVar[str]
    most: ClassVar[int] = 10_000
    """the default of max_connections"""

    def __init__(
        self,
        listeners: "socket.socket | Sequence[socket.socket]",
        log: MessageLog | None = None,
        *,
        service: "type[Service]" = EchoService,
        max_connections: int | None = None,
        idle_timeout: float | None = 60.0,
        total_timeout: float | None = None,
        max_output: int = 1 << 20,
    ) -> None:
        most = self.most if max_connections is None else max_connections
        self._max_connections = integer(most, "max_connections", 1, INT_MAX)
        max_output = integer(max_output, "max_output", 1, LONG_MAX)
        idle = duration(idle_timeout, "idle_timeout")
        total = duration(total_timeout, "total_timeout")
        self.listeners = list(listeners) if isinstance(listeners, Sequence) else [listeners]
        if not self.listeners:
            raise ValueError("a server needs at least one listening socket")
        self._log = log
        self._counters = ffi.from_buffer("ik_server_counters *", self._new_counters())
        self._terms = Terms(
            service, log, self._counters, idle_timeout=idle, total_timeout=total, max_output=max_output
        )
        self._killed = 0
        self._replaced = 0
        self._signals: SelfPipe | None = None  # while it serves
        self._stopping = False
        self._paused = False
        self._warned: dict[str, float] = {}  # when, by the name of the event
        self._logger_fd = -1
        self._reopening: Reopening | None = None
        self._log_before: LogStats | None = None
        self._log_waits = False
        self.deadline = math.inf
        """when the stop has to be over, by time.monotonic()"""
        self.loop = self._new_loop()
        """what the server waits with; ``loop.every()`` is there for who runs it"""

    @property
    def max_connections(self) -> int:
        """that are served at a time; each takes a descriptor of this process, its own or its child's"""
        return self._max_connections

    @classmethod
    def options(cls) -> "dict[str, Any]":
        """What this model can be told by keyword, and the defaults."""
        found: dict[str, Any] = {}
        for kind in reversed(cls.__mro__):
            found |= getattr(vars(kind).get("__init__"), "__kwdefaults__", None) or {}
        return found

    # --- what a model says

    def _new_counters(self) -> Any:
        """Memory for the counters, zeroed, which forked children share."""
        return mmap.mmap(-1, ffi.sizeof("ik_server_counters"))

    def _new_loop(self) -> Loop:
        """What to wait with: poll(2), unless the model says something else."""
        return Loop()

    def _begin(self) -> None:
        """Before the first connection."""

    def _arrived(self, listener: socket.socket) -> None:
        """A listener is readable: take what has come."""
        raise NotImplementedError

    def _open(self) -> int:
        """Connections that are served now."""
        raise NotImplementedError

    def _workers(self) -> int:
        """Processes or threads that serve now."""
        return 1

    def _end(self, deadline: float) -> None:
        """No more connections come: have those that there are end, by force at *deadline*."""
        raise NotImplementedError

    # --- the life of a server

    def serve(self, *, stop_timeout: float | None = 10.0) -> None:
        """Serve until SIGTERM or SIGINT; then accept no more, let the connections end, return.

        What has come already is answered and logged. What has not ended after *stop_timeout* seconds is
        cut. In the main thread the signals of the module's table are handled meanwhile, and unblocked: one
        that waits behind ``blocked()`` or in a SelfPipe of the caller's is taken at once. What was there
        before is put back at the end; a child that the service forks has it from the beginning.
        """
        patience = delay(stop_timeout, "stop_timeout")
        with SelfPipe(taken_signals() if is_main_thread() else ()) as signals:
            self._signals = signals
            self._watch(signals)
            at = ", ".join(map(endpoint, self.listeners))
            event("listening", "listening on %s", at, model=self.model, at=at, pid=os.getpid())
            try:
                self._begin()
                self._listen()
                notify("READY=1")
                while not self._stopping:
                    self.loop.turn()
            finally:
                notify("STOPPING=1")
                event("stopping", "stopping: %d connections are open", self._open(), open=self._open())
                for listener in self.listeners:
                    self.loop.forget(listener)
                    listener.close()
                self._stopping = True
                now = time.monotonic()
                self.deadline = now + patience
                # What waits for a log that stands still can't be answered: half is for the log's end.
                self._end(now + patience / 2 if self._log_waits else self.deadline)
                self.loop.close()
                event("stopped", "stopped")

    def stop(self) -> None:
        """End serve() as SIGTERM does; from any thread, or a handler of a signal."""
        self._stopping = True
        if self._signals is not None:
            self._signals.wake()

    def _watch(self, signals: SelfPipe) -> None:
        self.loop.watch(signals, READ, lambda _: self._signalled(signals))
        if terminal().was_there:
            self.loop.every(LOOK_EVERY, terminal().look)
        self._tend_log()
        for listener in self.listeners:
            listener.setblocking(False)

    def _signalled(self, signals: SelfPipe) -> None:
        came = signals.take()
        if signal.SIGUSR1 in came:
            self._tell()
        if signal.SIGHUP in came:
            self._hung_up()
        if came & _STOPS:
            self.stop()
        if self._stopping:
            self.loop.wake()

    def _hung_up(self) -> None:
        if terminal().is_lost():
            self.stop()
            return
        self._reopen()
        if terminal().was_there:
            self.loop.after(LOOK_AGAIN, self._stop_without_terminal)

    def _stop_without_terminal(self) -> None:
        if terminal().is_lost():
            self.stop()

    def _tell(self) -> None:
        stats = asdict(self.stats())
        event("statistics", "statistics: %s", _flat(stats), level=logging.WARNING, **stats)

    # --- the log

    def _tend_log(self) -> None:
        if self._log is not None:
            self.loop.every(_LOG_TICK, self._look_at_log)
            self._watch_logger()

    def _watch_logger(self) -> None:
        """The present one: append() of a service in this process may have started another one."""
        assert self._log is not None
        fd = self._log.fileno()
        if self._logger_fd != fd:
            self._forget_logger()
            self._logger_fd = fd
            self.loop.watch(fd, READ, self._logger_died)

    def _forget_logger(self) -> None:
        fd, self._logger_fd = self._logger_fd, -1
        if self.loop.handlers.get(fd) == self._logger_died:
            with contextlib.suppress(OSError):  # it has been closed
                self.loop.forget(fd)

    def _logger_died(self, _: int = 0) -> None:
        """Start another one; if that can't be now the log waits, and all else goes on."""
        assert self._log is not None
        self._forget_logger()  # or its end would wake us without end
        try:
            replaced = self._log.supervise()
        except OSError as error:
            if error.errno not in _SHORTAGE:
                raise
            self._warn(
                "shortage", "logger: %s; the log waits", error.strerror, call="logger", error=error.strerror
            )
            self.loop.after(_PAUSE, self._logger_died)
            return
        self._watch_logger()
        if replaced:
            event("logger died", "the logger died; another one goes on", level=logging.WARNING)

    def _reopen(self) -> None:
        """Offer the logger the new file; that it has gone over is seen by the loop."""
        if self._log is None:
            return
        notify("RELOADING=1")
        try:
            change = self._log.begin_reopen(timeout=_REOPEN_TIMEOUT)
        except OSError as error:
            self._end_reopening(str(error))
            return
        if change is None:
            self._end_reopening()
        else:
            self._forget_reopening()
            self._reopening = change
            self.loop.watch(change, READ, self._reopened)
            self._end_in_time(change, _REOPEN_TIMEOUT)

    def _end_in_time(self, change: Reopening, seconds: float) -> None:
        def look() -> None:
            if self._reopening is change:
                self._reopened()
                self._end_in_time(change, _PAUSE)  # a loop's clock may be ahead of the log's

        if self._reopening is change:
            self.loop.after(seconds, look)

    def _reopened(self, _: int = 0) -> None:
        assert self._reopening is not None
        try:
            if self._reopening.done():
                self._end_reopening()
        except OSError as error:
            self._end_reopening(str(error))

    def _end_reopening(self, error: str = "") -> None:
        assert self._log is not None
        self._forget_reopening()
        if error:
            event("log kept", "the log can't be reopened: %s", error, level=logging.ERROR)
        else:
            event("log reopened", "the log %s is open again", self._log.path)
        notify("READY=1")

    def _forget_reopening(self) -> None:
        if self._reopening is not None:
            self.loop.forget(self._reopening)
            self._reopening = None

    def _look_at_log(self) -> None:
        """Say so once a second while the log waits, and when it goes on again."""
        assert self._log is not None
        if self._log.closed:
            return
        self._watch_logger()
        now, before = self._log.stats(), self._log_before
        self._log_before = now
        why = _why_it_waits(before, now)
        if why:
            text = "the log waits: %s; %d bytes are not in its file"
            fields = {"error": why, "errno": now.error, "backlog": now.backlog}
            event("log waits", text, why, now.backlog, level=logging.WARNING, **fields)
        elif self._log_waits:
            event("log goes on", "the log goes on", level=logging.WARNING)
        self._log_waits = bool(why)
        if now.sync_error and (before is None or now.sync_error != before.sync_error):
            text = "the log is not synced any more: %s; rename the file and send SIGHUP"
            error = os.strerror(now.sync_error)
            event("log not synced", text, error, level=logging.ERROR, error=error, errno=now.sync_error)

    # --- accepting

    def _listen(self) -> None:
        """Watch the listeners while there is room, and only then."""
        wanted = not (self._paused or self._stopping) and self._open() < self._max_connections
        for listener in self.listeners:
            if self._paused:
                self.loop.rest(listener)
            elif not wanted:
                self.loop.forget(listener)
            elif not self.loop.watches(listener):
                self._try("listen", functools.partial(self._watch_listener, listener))

    def _watch_listener(self, listener: socket.socket) -> None:
        self.loop.watch(listener, READ, functools.partial(self._ready, listener))

    def _ready(self, listener: socket.socket, _: int) -> None:
        self._arrived(listener)

    def _try(self, call: str, function: Callable[[], _T]) -> _T | None:
        """What ``function()`` gives; None if the client has gone, or nothing can be had now."""
        try:
            return function()
        except OSError as error:
            # EAGAIN of accept: the client has gone again, or another process has it; of fork it is a limit.
            if error.errno in _SHORTAGE and (call, error.errno) != ("accept", errno.EAGAIN):
                self._pause(call, error)
            elif error.errno not in _TRY_NEXT:
                raise
            return None

    def _pause(self, call: str, error: OSError) -> None:
        """Leave the backlog alone for a moment, or it would wake us without end; say so once a second."""
        if not self._paused:
            self._paused = True
            self.loop.after(_PAUSE, self._go_on)
            self._listen()
        why = os.strerror(error.errno or 0)
        self._warn("shortage", "%s: %s; new connections wait", call, why, call=call, error=why)

    def _go_on(self) -> None:
        self._paused = False
        self._listen()

    def _freed(self) -> None:
        """A connection has ended: now there is one of what was short, or of what is the limit."""
        if self._paused:
            self._go_on()
        else:
            self._listen()

    # --- telling

    def _warn(self, name: str, text: str, *args: object, **fields: object) -> None:
        """As event(), but once a second at the most for each name."""
        now = time.monotonic()
        if now - self._warned.get(name, 0.0) >= 1:
            self._warned[name] = now
            event(name, text, *args, level=logging.WARNING, **fields)

    def _started(self, connection: HasPeer) -> None:
        if tells_of_connections():
            number, peer = connection.number, connection.peer
            event("connected", "connection %d from %s", number, peer, connection=number, peer=peer)

    def _ended(self, number: int, peer: str, how: str | None) -> None:
        if tells_of_connections():
            how = how or "?"
            text = "connection %d from %s ended: %s"
            event("ended", text, number, peer, how, connection=number, peer=peer, how=how)

    def stats(self) -> ServerStats:
        """The counters of this moment."""
        now = ffi.new("ik_server_counters *")
        lib.ik_counters_read(self._counters, now)
        ends = Counter({name: now.ends[number] for number, name in ENDS.items()})
        ends["killed"] = self._killed
        return ServerStats(
            model=self.model,
            connections=now.accepted,
            open=self._open(),
            echoes=now.echoes,
            bytes=now.bytes,
            ends=dict(+ends),
            workers=self._workers(),
            replaced=self._replaced,
            log=self._log.stats() if self._log else None,
        )


def _why_it_waits(before: LogStats | None, now: LogStats) -> str:
    """What keeps the log from its file, or ""."""
    if now.error:
        return os.strerror(now.error)
    if before is None or not before.backlog or not now.backlog:
        return ""
    # Another logger may have ended with bytes that it had not counted: they differ then, too.
    stands_still = now.bytes - now.backlog == before.bytes - before.backlog
    return "its file system or its logger stands still" if stands_still else ""


def taken_signals() -> "set[signal.Signals]":
    """Those of the module's table; an ignored SIGHUP stays so, here and in what a service starts."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return SIGNALS - {signal.SIGHUP} if is_ignored else SIGNALS


def tells_of_connections() -> bool:
    """Somebody wants to know of each one."""
    return _log.isEnabledFor(logging.INFO)


def event(name: str, text: str, *args: object, level: int = logging.INFO, **fields: object) -> None:
    """Tell the logger ipckit.servers that something happened, as text and as fields."""
    _log.log(level, text, *args, extra={"event": name, "fields": fields})


def _flat(fields: "dict[str, Any]") -> str:
    parts = []
    for name, value in fields.items():
        parts.append(f"{name} ({_flat(value)})" if isinstance(value, dict) else f"{name} {value}")
    return ", ".join(parts)
