# SPDX-License-Identifier: MIT
"""Load on an echo server, from one epoll loop in C; each byte that comes back is checked.

::

    closed loop   a connection sends its next message when the last one is back. A server that stalls
                  for half a second gets one late message of each connection; all others that would
                  have come meanwhile are never sent, and no percentile shows them.
    rate=         each message is due at its time, whatever the server does, and its latency counts
                  from then. All that were due in that half second are late, and are seen to be.

So latencies of a closed loop tell how long an echo takes, those on a schedule how long a client waits
("without coordinated omission").

A connection first sends one byte and waits for its echo: then the server has it, not only the
kernel's queue. The clock starts when all are there. With ``reconnect`` each message has a connection
of its own: connect, one echo, half-close, end of file; there is no such byte then.
"""

import errno
import ipaddress
import math
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ipckit import _arguments, _procfs, wait
from ipckit._arguments import LONG_MAX, integer, nanoseconds, seconds
from ipckit._handles import Rooted, finalizer
from ipckit._native import ffi, lib
from ipckit._unpatched import os, time
from ipckit.errors import Closed, check

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


def _resolve(host: str, port: int, i_own_this_host: bool) -> tuple[str, int]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    address = str(found[4][0])
    if not (ipaddress.ip_address(address).is_loopback or i_own_this_host):
        raise ValueError(
            f"{host!r} is {address}, which is not this machine's loopback; a load on somebody else's "
            "machine is an attack: say i_own_this_host if it is yours"
        )
    return address, int(found[4][1])


def _raise_descriptor_limit(connections: int) -> "tuple[int, int] | None":
    """Make room for so many descriptors more, up to the hard limit; the limits before, if they changed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir(_procfs.path("self/fd"))) + connections + _SPARE
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return None
    if wanted > hard != resource.RLIM_INFINITY:
        raise OSError(
            errno.EMFILE,
            f"{connections} connections need {wanted} descriptors, and RLIMIT_NOFILE allows {hard}; "
            f"raise it with: ulimit -Hn {wanted}, or prlimit --nofile={wanted}",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return soft, hard


def _count(value: int, name: str, least: int = 1, most: int = 10**9) -> int:
    return integer(value, name, least, most)


def _warm_up_ns(warm_up: float) -> int:
    limit = seconds(warm_up, "warm_up")
    if limit == math.inf:
        raise ValueError(f"warm_up must be a number of seconds that comes to an end, not {warm_up!r}")
    return int(limit * 1e9)


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
            *i_own_this_host*.
        connections: at a time. size: bytes of a message, up to 16 MiB.
        messages: of each connection; None: no limit. duration: seconds to count; None: no limit.
            Whichever comes first ends it; with both None nothing does but ``stop()``.
        rate: messages per second of all connections together, on a schedule; None: a closed loop.
        reconnect: a connection for each message.
        idle: further connections, opened and held silently.
        warm_up: seconds that are not counted, before the others.
        timeout: seconds for a message, for opening a connection, for the end of file at its end.

    A connection with an error is counted, closed, and opened again after 0.1 s: nothing ends early.
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
        size: int = 64,
        messages: int | None = None,
        duration: float | None = 5.0,
        rate: float | None = None,
        reconnect: bool = False,
        idle: int = 0,
        warm_up: float = 0.0,
        timeout: float = 10.0,
        i_own_this_host: bool = False,
    ) -> None:
        connections = _count(connections, "connections", most=MOST_CONNECTIONS)
        size, idle = _count(size, "size", most=LARGEST), _count(idle, "idle", least=0)
        options = ffi.new("ik_load_options *")
        options.connections, options.size, options.idle = connections, size, idle
        options.messages = 0 if messages is None else _count(messages, "messages")
        options.reconnect, options.interval_ns = reconnect, _interval(rate)
        options.duration_ns = nanoseconds(_arguments.duration(duration, "duration"))
        options.timeout_ns = nanoseconds(_arguments.duration(timeout, "timeout")) or LONG_MAX
        options.warm_up_ns = _warm_up_ns(warm_up)
        self._asked = (connections, idle, size, reconnect, rate)
        self._strings = self._point(options, address, i_own_this_host)
        self._limits = _raise_descriptor_limit(connections + idle)
        made = ffi.new("ik_load **")
        try:
            check(lib.ik_load_new(options, made), self.target)
        except BaseException:
            self._restore_limits()
            raise
        self._native = made[0]

    def _point(
        self, options: Any, address: "tuple[str, int] | str | os.PathLike[str]", i_own_this_host: bool
    ) -> Any:
        """Fill in where to; what must live as long as *options*."""
        if not isinstance(address, tuple):
            self.target = os.fspath(address)
            options.path = path = ffi.new("char[]", os.fsencode(address))
            return path
        host, port = _resolve(address[0], integer(address[1], "port", 1, 65535), i_own_this_host)
        self.target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        options.host = name = ffi.new("char[]", host.encode())
        options.port = port
        return name

    _native: Any = None

    def step(self, seconds: float = _SLICE) -> bool:
        """Go on for about so many seconds; whether it is over.

        Block for that time, in the kernel or in C without the GIL; a signal ends the step early, after
        its Python handler has run. Raises: Closed; OSError of epoll_wait(2).
        """
        end = wait.deadline(seconds, "seconds")
        done: int = lib.ik_load_run(self._open(), LONG_MAX if end == wait.FOREVER else end)
        return False if done == -errno.EINTR else bool(check(done, self.target))

    def stop(self) -> None:
        """Begin nothing more; go on with step() until what is under way has ended."""
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
        connections, idle, size, reconnect, rate = self._asked
        seconds = self._seconds(counters)
        percentiles = {name: lib.ik_load_percentile(self._native, share) for name, share in _SHARES.items()}
        return LoadReport(
            target=self.target,
            connections=connections,
            idle=idle,
            size=size,
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
        if self._native is not None:
            lib.ik_load_free(self._native)
            self._native = None
            self._restore_limits()

    def _restore_limits(self) -> None:
        if self._limits is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, self._limits)

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
    """Load the echo server at *address*; the options are those of ``Load``.

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
