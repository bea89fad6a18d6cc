# SPDX-License-Identifier: MIT
"""Load on a server, from one epoll loop in C; each byte that comes back is checked.

::

    closed loop   a connection sends its next message when the last one is back. A server that stalls
                  for half a second gets one late message of each connection; all others that would
                  have come meanwhile are never sent, and no percentile shows them.
    rate=         each message is due at its time, whatever the server does, and its latency counts
                  from then. All that were due in that half second are late, and are seen to be.

So latencies of a closed loop tell how long an echo takes, those on a schedule how long a client waits
("without coordinated omission").

A message is a part of a pattern that an echo server sends back, or the text *send*, to which a service
answers *expect*. A connection first sends one byte (or *send*) and waits for its answer: then the server
has it, not only the kernel's queue. The clock starts when all are there. With ``reconnect`` each message
has a connection of its own: connect, one echo, half-close, end of file; nothing goes before it then.

It ends when it is told to, by its duration or by ``stop()``: what is under way then has the grace. If
nobody can be reached it fails; if nobody answers it ends at the first time limit.
"""

import errno
import ipaddress
import math
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ipckit import _arguments, wait
from ipckit._arguments import LONG_MAX, Buffer, as_bytes, integer, nanoseconds, seconds
from ipckit._handles import Rooted, finalizer
from ipckit._native import ffi, lib
from ipckit._unpatched import os, time
from ipckit.errors import Closed, check
from ipckit.limits import raise_descriptors

__all__ = ["Load", "LoadProgress", "LoadReport", "run_load"]

if TYPE_CHECKING:
    from typing_extensions import Self

LARGEST = int(lib.IK_LOAD_LARGEST)
MOST_CONNECTIONS = int(lib.IK_LOAD_MOST_CONNECTIONS)
# Seconds between two looks of Python's at the loop.
_SLICE = 0.1
# Descriptors beside the connections: of the loop, and for what the program opens meanwhile.
_SPARE = 16
_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
_PHASES = {
    lib.IK_LOAD_OPENING: "opening",
    lib.IK_LOAD_RUNNING: "running",
    lib.IK_LOAD_ENDING: "ending",
    lib.IK_LOAD_DONE: "done",
}
_KINDS = {
    lib.IK_LOAD_REFUSED: "refused",
    lib.IK_LOAD_TIMED_OUT: "timed out",
    lib.IK_LOAD_RESET: "reset",
    lib.IK_LOAD_CLOSED_EARLY: "closed early",
    lib.IK_LOAD_WRONG_BYTE: "wrong byte",
    lib.IK_LOAD_TOO_MUCH: "too much",
    lib.IK_LOAD_OTHER: "other",
}
_DOING = {
    lib.IK_LOAD_QUEUED: "while it waited to be connected",
    lib.IK_LOAD_HELLO: "while it was opened",
    lib.IK_LOAD_READY: "between messages",
    lib.IK_LOAD_ECHOING: "within a message",
    lib.IK_LOAD_CLOSING: "while it waited for the end of file",
}


@dataclass(frozen=True)
class LoadProgress:
    """How far a load is."""

    phase: str
    """opening, running, ending (what is under way comes to its end), done"""
    seconds: float
    """counted so far"""
    open: int
    """connections that the server has now"""
    count: int
    """messages counted so far"""
    echoed: int
    """messages that came back, counted or not"""
    bytes: int
    """that came back right"""
    errors: int


@dataclass(frozen=True)
class LoadReport:
    """What a load found."""

    target: str
    connections: int
    idle: int
    size: int
    """bytes of a message"""
    answer_size: int
    """bytes of what comes back to it"""
    reconnect: bool
    scheduled_rate: float | None
    """messages per second that were due; None: a closed loop"""
    seconds: float
    """that were counted"""
    count: int
    """messages (with reconnect: connections) that were counted: in a closed loop those that began and
    ended in that time, on a schedule those that were due in it"""
    rate: float
    """of those per second"""
    bytes: int
    """that came back right, counted or not: what the server echoed if there were no errors"""
    latency_us: "dict[str, float]"
    """microseconds: p50, p90, p99, p99.9, max; at most 0.8 % too large. Empty if nothing was counted.
    With reconnect from connect() to the end of file"""
    unsent: int
    """messages that were due but not begun when the time was over: the server can't keep up"""
    errors: "dict[str, int]"
    """kind: how many. refused, timed out, reset, closed early, wrong byte, too much, other"""
    first: "dict[str, str]"
    """kind: what happened first"""


def _resolve(address: Any, i_own_this_host: bool) -> "list[tuple[str, int] | str]":
    """All that the host has, as a client tries them one after the other; or the path."""
    if not isinstance(address, tuple):
        return [os.fspath(address)]
    host, port = address[0], integer(address[1], "port", 1, 65535)
    found = [str(each[4][0]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for each in found:
        if not (ipaddress.ip_address(each).is_loopback or i_own_this_host):
            raise ValueError(
                f"{host!r} is {each}, which is not this machine's loopback; a load on somebody else's "
                "machine is an attack: say i_own_this_host if it is yours"
            )
    return [(each, port) for each in found]


def _raise_descriptor_limit(connections: int) -> int:
    """Make room for so many descriptors more; the soft limit as it was before."""
    wanted, before = raise_descriptors(connections + _SPARE)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if wanted > soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))
        raise OSError(
            errno.EMFILE,
            f"{connections} connections need {wanted} descriptors, and RLIMIT_NOFILE allows {hard}; "
            f"raise it with: ulimit -Hn {wanted}, or prlimit --nofile={wanted}",
        )
    return before


def _fill_message(
    options: Any, size: int | None, send: Buffer | None, expect: Buffer | None
) -> "tuple[int, int, Any]":
    """What is sent and what comes back: the lengths, and what must live until C has copied it."""
    if send is None:
        if expect is not None:
            raise ValueError("expect must be the answer to send, which is missing")
        options.size = _count(64 if size is None else size, "size", most=LARGEST)
        return options.size, options.size, None
    if size is not None:
        raise ValueError("size must be left out with send, which has its own")
    request = _text(send, "send")
    answer = request if expect is None else _text(expect, "expect")
    options.request, options.answer = held = ffi.from_buffer(request), ffi.from_buffer(answer)
    options.request_len, options.answer_len = len(request), len(answer)
    return len(request), len(answer), held


def _text(data: Buffer, name: str) -> bytes:
    text = as_bytes(data, name)
    if not 1 <= len(text) <= LARGEST:
        raise ValueError(f"{name} must be of 1 to {LARGEST} bytes, not {len(text)}")
    return text


def _count(value: int, name: str, least: int = 1, most: int = 10**9) -> int:
    return integer(value, name, least, most)


def _warm_up_ns(warm_up: float) -> int:
    limit = seconds(warm_up, "warm_up")
    if limit == math.inf:
        raise ValueError(f"warm_up must be a number of seconds that comes to an end, not {warm_up!r}")
    return int(limit * 1e9)


def _grace_ns(grace: float) -> int:
    limit = seconds(grace, "grace")
    return LONG_MAX if limit == math.inf else int(limit * 1e9)


def _interval(rate: float | None) -> float:
    """Nanoseconds between two messages; 0 for a closed loop."""
    if rate is None:
        return 0
    try:
        number = seconds(rate, "rate")
    except (TypeError, ValueError) as error:
        raise type(error)(f"rate must be None or a number of messages per second, not {rate!r}") from None
    if not 0 < number <= 1e9:
        raise ValueError(f"rate must be more than 0 to 1e9 messages per second, not {rate!r}")
    return 1e9 / number


class Load(Rooted):
    """A load that goes on in steps; ``run_load()`` is all of it in one call.

    Args: address: (host, port), or the path of a Unix socket. Only loopback addresses unless
            *i_own_this_host*. Of several addresses of a host the first one that can be reached.
        connections: at a time. size: bytes of a message, up to 16 MiB; None is 64.
        send: what each message is, instead of a pattern of that size; expect: all that comes back to it,
            None: the same again. Up to 16 MiB each.
        messages: of each connection; None: no limit. duration: seconds to count; None: no limit.
            Whichever comes first ends it; with both None nothing does but ``stop()``, and errors alone
            for as long as *timeout*.
        rate: messages per second of all connections together, on a schedule; None: a closed loop.
        reconnect: a connection for each message.
        idle: further connections, opened and held silently.
        warm_up: seconds that are not counted, before the others.
        timeout: seconds for a message, for opening a connection, for the end of file at its end.
        grace: seconds for what is under way when the duration is over, or at ``stop()``.

    A connection with an error is counted, closed, and opened again after 0.1 s. Errors end nothing early, but
    for a server that has answered nothing at all within a time limit. The opening waits for a connection
    no longer than warm_up, duration and grace together.
    From 127.0.0.0/8 the connections of *reconnect* come from 127.0.0.1 to 127.0.0.16 in turn, because
    each address has some 28,000 ports, which are not free at once after their use.

    While it exists the soft RLIMIT_NOFILE is raised if it has to be. Fork: of use to the process that
    made it only. Threads: one at a time.
    Raises: ValueError for a bad option or an address that is not loopback; OSError EMFILE naming the
        limit, ENAMETOOLONG (the path); socket.gaierror. See epoll(7).
    """

    def __init__(
        self,
        address: "tuple[str, int] | str | os.PathLike[str]",
        *,
        connections: int = 16,
        size: int | None = None,
        send: Buffer | None = None,
        expect: Buffer | None = None,
        messages: int | None = None,
        duration: float | None = 5.0,
        rate: float | None = None,
        reconnect: bool = False,
        idle: int = 0,
        warm_up: float = 0.0,
        timeout: float = 10.0,
        grace: float = 1.0,
        i_own_this_host: bool = False,
    ) -> None:
        connections = _count(connections, "connections", most=MOST_CONNECTIONS)
        idle = _count(idle, "idle", least=0)
        self._options = options = ffi.new("ik_load_options *")
        options.connections, options.idle = connections, idle
        sent, answer, self._texts = _fill_message(options, size, send, expect)
        options.messages = 0 if messages is None else _count(messages, "messages")
        options.reconnect, options.interval_ns = reconnect, _interval(rate)
        options.duration_ns = nanoseconds(_arguments.duration(duration, "duration"))
        options.timeout_ns = nanoseconds(_arguments.duration(timeout, "timeout")) or LONG_MAX
        options.grace_ns = _grace_ns(grace)
        options.warm_up_ns = _warm_up_ns(warm_up)
        self._asked = (connections, idle, sent, answer, reconnect, rate)
        self._addresses = _resolve(address, i_own_this_host)
        self._limit = _raise_descriptor_limit(connections + idle)
        try:
            self._point()
        except BaseException:
            self._restore_limits()
            raise

    def _point(self) -> None:
        """Go to the next of the addresses."""
        address = self._addresses.pop(0)
        options, made = self._options, ffi.new("ik_load **")
        if isinstance(address, tuple):
            host, options.port = address
            options.host = held = ffi.new("char[]", host.encode())
            self.target = f"[{host}]:{options.port}" if ":" in host else f"{host}:{options.port}"
        else:
            self.target = address
            options.path = held = ffi.new("char[]", os.fsencode(address))
        check(lib.ik_load_new(options, made), self.target)
        del held  # which lived until it was copied
        self._native = made[0]

    _native: Any = None

    def step(self, seconds: float = _SLICE) -> bool:
        """Go on for about so many seconds; whether it is over.

        Block for that time, in the kernel or in C without the GIL; a signal ends the step early, after
        its Python handler has run. Raises: Closed; OSError of epoll_wait(2); ECONNREFUSED, ENOENT, or what
        else connect(2) says, if nobody could be reached at all.
        """
        end = wait.deadline(seconds, "seconds")
        done: int = lib.ik_load_run(self._open(), LONG_MAX if end == wait.FOREVER else end)
        if done == -errno.EINTR:
            return False
        if done < 0 and self._addresses and self.progress().phase == "opening":
            unreachable = self._native
            self._point()
            lib.ik_load_free(unreachable)  # if a handler raised before it, this is never free
            return False
        return bool(check(done, self.target))

    def stop(self) -> None:
        """Begin nothing more; go on with step() until what is under way has ended, within the grace."""
        lib.ik_load_stop(self._open())

    def _open(self) -> Any:
        if self._native is None:
            raise Closed(f"the load on {self.target} is closed")
        return self._native

    def _counters(self) -> Any:
        counters = ffi.new("ik_load_counters *")
        lib.ik_load_read_counters(self._open(), counters)
        return counters

    def _failures(self) -> "dict[str, Any]":
        """What has happened, by kind."""
        failures = {}
        for kind, name in _KINDS.items():
            failure = ffi.new("ik_load_failure *")
            lib.ik_load_read_failure(self._open(), kind, failure)
            if failure.count:
                failures[name] = failure
        return failures

    @staticmethod
    def _seconds(counters: Any) -> float:
        ended = counters.ended_ns or time.monotonic_ns()
        return max(0.0, (ended - counters.began_ns) / 1e9) if counters.began_ns else 0.0

    def progress(self) -> LoadProgress:
        """How far it is. Raises: Closed."""
        counters = self._counters()
        return LoadProgress(
            phase=_PHASES[counters.phase],
            seconds=self._seconds(counters),
            open=counters.open,
            count=counters.count,
            echoed=counters.echoed,
            bytes=counters.bytes,
            errors=sum(failure.count for failure in self._failures().values()),
        )

    def report(self) -> LoadReport:
        """What was found; complete when ``step()`` has returned True. Raises: Closed."""
        counters, failures = self._counters(), self._failures()
        connections, idle, size, answer, reconnect, rate = self._asked
        seconds = self._seconds(counters)
        percentiles = {name: lib.ik_load_percentile(self._native, share) for name, share in _SHARES.items()}
        return LoadReport(
            target=self.target,
            connections=connections,
            idle=idle,
            size=size,
            answer_size=answer,
            reconnect=reconnect,
            scheduled_rate=rate,
            seconds=seconds,
            count=counters.count,
            rate=counters.count / seconds if seconds else 0.0,
            bytes=counters.bytes,
            latency_us={name: ns / 1e3 for name, ns in percentiles.items()} if counters.count else {},
            unsent=counters.unsent,
            errors={name: failure.count for name, failure in failures.items()},
            first={name: _told(name, failure) for name, failure in failures.items()},
        )

    def close(self) -> None:
        """Close all connections, as they are, and restore the limit; a second call does nothing."""
        native, self._native = self._native, None  # before it is free: a handler may raise in between
        if native is not None:
            lib.ik_load_free(native)
            self._restore_limits()

    def _restore_limits(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (self._limit, hard))

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    __del__ = finalizer(close)

    def __repr__(self) -> str:
        state = "closed" if self._native is None else self.progress().phase
        return f"<Load on {self.target} {state}>"


def _told(kind: str, failure: Any) -> str:
    where = f"connection {failure.connection} after {failure.position:,} bytes, {_DOING[failure.state]}"
    if kind == "wrong byte":
        return f"{where}: 0x{failure.got:02x} came back, not 0x{failure.expected:02x}"
    return where + (f": {os.strerror(failure.error)}" if failure.error else "")


def run_load(
    address: "tuple[str, int] | str | os.PathLike[str]",
    *,
    on_progress: Callable[[LoadProgress], object] | None = None,
    **options: Any,
) -> LoadReport:
    """Load the server at *address*; the options are those of ``Load``.

    Block until the end; errors don't end it, they are counted. KeyboardInterrupt and what else a signal
    handler raises does, at once.

    Args: on_progress: called about ten times a second.
    Raises: as ``Load``.
    """
    with Load(address, **options) as load:
        while not load.step():
            if on_progress is not None:
                on_progress(load.progress())
        return load.report()
