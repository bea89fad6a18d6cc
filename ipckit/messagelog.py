# SPDX-License-Identifier: MIT
"""The message log: many processes append through one pipe, a logger child writes the file.

::

    workers --append--> pipe --splice--> second pipe --splice--> file
                          ^                  ^
                   the supervisor holds both open and starts a new logger when one dies

The logger moves the messages to the file inside the kernel, so it never holds a byte that a kill could
lose. No writer holds a lock, or waits for a disk, but until a durability that it asked for is reached,
or the first pipe has room: only the logger has the second pipe and the file in hand. Up to PIPE_BUF
(4,096 bytes on Linux) a message is one write, which the kernel never splits; a longer one goes to the
logger in memory of its own. Either way it is in the log whole or not at all. Durability, what
``append()`` waits for:

==========  ====================================  ==============================================
level       append() returned means               lost by
==========  ====================================  ==============================================
"none"      the message is in the kernel          logger and supervisor both killed; power loss
"written"   it is in the file                     power loss
"synced"    fdatasync(2) returned after it        the disk
==========  ====================================  ==============================================

Format "raw": the file is the appended bytes, one after the other. Format "record": one JSON line a
message, ``{"time": ..., "connection": ..., "peer": ..., "length": ..., "text" or "base64": ...}``,
printable whatever came; ``records()`` reads them back.

Rotation: rename the file, then ``reopen()``, as a server does on SIGHUP. The logger goes over to the
new file between two messages.
"""

import contextlib
import errno
import fcntl
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ipckit import _spawner, wait
from ipckit._arguments import INT_MAX, Buffer, check_buffer, integer, seconds
from ipckit._descriptors import above_standard, eventfd, packets, pipe
from ipckit._handles import Rooted, finalizer
from ipckit._logfile import copy_of_stream, end_torn_tail, identity_of, open_file
from ipckit._native import ffi, lib
from ipckit._records import Record, records
from ipckit._unpatched import os, select, threading, time
from ipckit.errors import Closed, check
from ipckit.process import Child, fork_native

__all__ = ["Append", "LogStats", "LogWriter", "MessageLog", "Record", "Reopening", "records"]

if TYPE_CHECKING:
    from typing_extensions import Self

_FORMATS = {"raw": lib.IK_LOG_RAW, "record": lib.IK_LOG_RECORD}
_DURABILITIES = {"none": lib.IK_LOG_NONE, "written": lib.IK_LOG_WRITTEN, "synced": lib.IK_LOG_SYNCED}
# The descriptors of ik_log, and what of a log goes to a process that was not forked.
_OF_LOGGER = (
    "reader",
    "handed",
    "staging_reader",
    "staging_writer",
    "parked",
    "park",
    "wake",
    "acked",
    "told",
)
_OF_WRITERS = ("writer", "hand", "wake", "acked")
_IN_NATIVE = frozenset((*_OF_LOGGER, *_OF_WRITERS, "tell"))
_PASSED = (*_OF_WRITERS, "memory")
_RUN_LOGGER = ffi.addressof(lib, "ik_log_run")
# A logger that dies more often than this in a second can't be helped by another one.
_RESTARTS_PER_SECOND = 100
# How long the supervisor waits for the pipe before it looks whether its logger lives.
_LOOK_NS = 100_000_000
# Seconds until it tries again to start one, when there is no process or descriptor to be had.
_PAUSE = 0.1
_SHORTAGE = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
# Seconds that a logger has to end by SIGKILL; one that waits for its disk can't.
_LAST_MOMENT = 0.2


@dataclass(frozen=True)
class LogStats:
    """What a log has seen since it was opened."""

    messages: int
    """appended"""
    bytes: int
    """appended, as they stand in the file (records are longer than their messages)"""
    backlog: int
    """bytes that are appended, not in the file yet"""
    restarts: int
    """loggers that died and were replaced"""
    torn: int
    """last lines that were cut off (power was lost), found on opening a file"""
    error: int
    """the errno that the logger waits on (ENOSPC, EDQUOT, EFBIG, EIO, ...), or 0"""
    sync_error: int
    """the errno of the first failed fdatasync of the file in use, or 0"""
    files: int
    """times that reopen() went over to another file"""
    split: int
    """of these, those that could not wait for the end of a message"""


class Append(Rooted):
    """A message on its way into a log, for an event loop; from ``LogWriter.begin()``.

    Until ``done()``, wait for ``events`` (POLLIN or POLLOUT) on ``fileno()``, 100 ms at the most (the
    logger may be killed before it rings), then call ``done()`` again. Any number may be under way:
    one acknowledgement is for all that came before it. In order: those that wait for POLLOUT should
    be called in the order in which they began, or messages overtake each other.

    Dropping it, or ``close()``, gives it up: it is in the log once and whole, or not at all. Threads: one.
    """

    _over = True  # until there is something to give up

    def __init__(self, log: "LogWriter", line: Any) -> None:
        self._log = log
        self._done = False
        self._line = ffi.from_buffer(line)
        self._native = ffi.new("ik_append *", {"data": self._line, "len": len(self._line)})
        self._over = False

    def done(self) -> bool:
        """True when the message is as durable as the log promises; does not block.

        Raises: as ``LogWriter.append()``, but for TimeoutError; Closed also after ``close()``.
        """
        if self._over:
            if not self._done:
                raise Closed(f"an append to the log {self._log.path} was given up")
            return True
        if self._log.closed:
            raise Closed(f"the log {self._log.path} is closed")
        rc = lib.ik_log_append(self._log.native, self._native, wait.NOW)
        if rc in (-errno.ETIMEDOUT, -errno.EINTR):
            return False
        self._done = rc == 0
        self.close()
        check(rc, self._log.path)
        return True

    @property
    def events(self) -> int:
        """What to wait for: POLLOUT on the pipe when it is full, else POLLIN on ``acked``."""
        return select.POLLOUT if self._native.full else select.POLLIN

    def fileno(self) -> int:
        """Where to wait for it. Raises: Closed."""
        return self._log._descriptor("writer" if self._native.full else "acked")

    def close(self) -> None:
        """Give it up, unless it is done."""
        if not self._over:
            self._over = True
            ffi.release(self._line)

    __del__ = finalizer(close)


class LogWriter:
    """One process's use of a log: what a child of the log's supervisor has.

    It comes by fork (the supervisor's own ``MessageLog`` is one) or by pickling the log to a ``spawn`` or
    ``forkserver`` child of multiprocessing. Threads: any number.
    """

    # What close() finds when __init__ failed before it got so far.
    _own: "dict[str, int]" = {}  # noqa: RUF012
    native: Any = None
    """the C handle (``ik_log *``), for services written in C; valid while this object lives"""

    def __init__(self, path: str, format: str, durability: str, descriptors: "tuple[int, ...]") -> None:
        self.path = path
        self.format = format
        self.durability = durability
        self._own = dict(zip(_PASSED, descriptors, strict=True))
        self._attach()

    def _attach(self) -> None:
        mapped = lib.ik_log_map(self._own["memory"])
        if not mapped:
            raise MemoryError(f"no memory to map for the log {self.path}")
        # Mapped as long as this object lives, beyond close(): another thread may still be unlocking.
        self._shared = ffi.gc(mapped, lib.ik_log_unmap)
        self.native = ffi.new("ik_log *")
        for name in _IN_NATIVE:
            setattr(self.native, name, self._own.get(name, -1))
        self.native.file = -1
        self.native.format = _FORMATS[self.format]
        self.native.durability = _DURABILITIES[self.durability]
        self.native.shared = self._shared

    def append(
        self, data: Buffer, *, peer: str = "", connection: int = 0, timeout: float | None = None
    ) -> None:
        """Append one message; block until it is as durable as the log promises.

        Args: data: bytes-like. peer, connection: who sent it, for the record format. timeout: seconds
            for the whole; None waits for ever, which a full disk can make long.
        Raises: TimeoutError (ETIMEDOUT): in the log once or not at all; BrokenPipeError (EPIPE): neither
            logger nor supervisor lives; OSError EIO, ENOSPC, ...: fdatasync failed, now or earlier, so
            nothing can be promised as "synced" any more; ENOMEM, EMFILE, EFBIG (RLIMIT_FSIZE), ... of a
            message longer than PIPE_BUF, which is not appended then; Closed.
        Signals: their Python handlers run in between; one that raises gives the message up.
        """
        if self.closed:
            raise Closed(f"the log {self.path} is closed")
        line = self._line(data, peer, connection)
        with ffi.from_buffer(line) as start:
            self._append(ffi.new("ik_append *", {"data": start, "len": len(start)}), wait.deadline(timeout))

    def begin(self, data: Buffer, *, peer: str = "", connection: int = 0) -> "Append":
        """An append for an event loop, which never blocks: call its ``done()`` until that is True.

        Nothing is appended before the first ``done()``. Args, and what its errors are: as append().
        """
        return Append(self, self._line(data, peer, connection))

    @property
    def acked(self) -> int:
        """A descriptor that becomes readable when a waiting ``Append`` may be done.

        Read it empty (``os.read(log.acked, 8)``) before calling ``done()``. Of several loops that
        wait for it, each in a process, one may read it before the other has seen it, which then finds
        nothing to read: BlockingIOError (EAGAIN). With an edge-triggered epoll nobody need read it.
        Raises: Closed. See eventfd(2).
        """
        return self._descriptor("acked")

    @property
    def descriptors(self) -> "list[int]":
        """What a C child appends with, in the order of ``spawner.h``. Raises: Closed."""
        return [self._descriptor(name) for name in _PASSED]

    def _descriptor(self, name: str) -> int:
        fd = self._own.get(name, -1)
        if fd < 0:
            raise Closed(f"the log {self.path} is closed")
        return fd

    def _append(self, append: Any, deadline_ns: int) -> None:
        rc = -errno.EINTR
        while rc == -errno.EINTR:
            rc = self._try_append(append, deadline_ns)
        check(rc, self.path)

    def _try_append(self, append: Any, deadline_ns: int) -> int:
        rc: int = lib.ik_log_append(self.native, append, deadline_ns)
        return rc

    def _line(self, data: Buffer, peer: str, connection: int) -> Any:
        check_buffer(data)
        connection = integer(connection, "connection", 0, (1 << 64) - 1)
        if self.format == "raw":
            return data
        name = peer.encode("ascii", "backslashreplace").replace(b"\0", b"?")
        with ffi.from_buffer(data) as start:
            line = ffi.new("char[]", lib.ik_log_record_bound(len(start), name))
            length = lib.ik_log_format_record(line, start, len(start), name, connection)
        return ffi.buffer(line, length)

    @property
    def closed(self) -> bool:
        return "writer" not in self._own

    def close(self) -> None:
        """End this process's use of the log; a second call does nothing."""
        self._forget(*self._own)

    def _forget(self, *names: str) -> None:
        """Close descriptors; their numbers are gone from the C handle before they are free again."""
        for name in names:
            fd = self._own.pop(name, -1)
            if name in _IN_NATIVE and self.native is not None:
                setattr(self.native, name, -1)
            if fd >= 0:
                os.close(fd)

    def _close_all(self) -> None:
        while self._own:
            os.close(self._own.popitem()[1])

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    __del__ = finalizer(close)  # the loggers go on, and end with the last who writes

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.durability
        return f"<{type(self).__name__} {self.path} {self.format} {state}>"

    def __reduce__(self) -> "tuple[Any, ...]":
        if self.closed:
            raise Closed(f"the log {self.path} is closed")
        from multiprocessing import reduction

        duplicates = [reduction.DupFd(self._own[name]) for name in _PASSED]
        return _rebuild, (self.path, self.format, self.durability, duplicates)


def _rebuild(path: str, format: str, durability: str, duplicates: "list[Any]") -> LogWriter:
    descriptors = tuple(duplicate.detach() for duplicate in duplicates)
    for fd in descriptors:
        os.set_inheritable(fd, False)
    return LogWriter(path, format, durability, descriptors)


class MessageLog(LogWriter):
    """A log file written by a logger child from the messages of this process and of those it forks.

    Args: path: created with mode 0600 if missing, appended to otherwise. Refused: symbolic links, FIFOs
            and other non-files, files of other users, files with more than one link, and a file
            that another log writes now. Or the number of a descriptor that is no file (a pipe, a
            socket, a terminal), of which a copy is used: then there is no reopen(), and no "synced".
        format: "raw" or "record" (see the module).
        durability: "none", "written" or "synced" (see the module).
        capacity: the size of each of the two pipes in bytes; the kernel rounds it up, and keeps its
            default if the user's allowance is used up.
        lock_timeout: seconds to wait for the file while another log writes it: the logger of a server
            that was killed first writes what is left.

    The process that opens the log is its supervisor. It calls ``supervise()`` when ``fileno()`` is
    readable (the logger died); ``append()`` and ``close()`` do so themselves. When the supervisor itself
    is killed, the logger writes what is left and ends as soon as the last writer has ended.

    A full disk, and one that does not answer, loses nothing and stops nothing for good: the logger tries
    again, the pipes keep what comes and, once full, make the writers wait. ``stats()`` tells: ``error``
    of a disk that refuses, ``backlog`` in any case.

    Fork: children append to the same log; in them ``close()`` ends only their own use. Threads: any
    number. Raises: OSError for the refusals above, naming the path, and the process that writes it if
    /proc shows that; ValueError for a bad option.
    """

    def __init__(
        self,
        path: "str | os.PathLike[str] | int",
        *,
        format: str = "raw",
        durability: str = "none",
        capacity: int = 1 << 20,
        lock_timeout: float | None = 5.0,
    ) -> None:
        for option, value, known in (("format", format, _FORMATS), ("durability", durability, _DURABILITIES)):
            if value not in known:
                raise ValueError(f"{option} must be one of {', '.join(known)}, not {value!r}")
        capacity = integer(capacity, "capacity", 1, INT_MAX)
        patience = seconds(lock_timeout, "lock_timeout")
        self.path = f"descriptor {path}" if isinstance(path, int) else os.fspath(path)
        self.format = format
        self.durability = durability
        self.restarts = 0
        """loggers that died and were replaced"""
        self.unwritten = 0
        """bytes that ``close()`` had to leave, when it raised"""
        self._recent: list[float] = []
        self._logger: Child | None = None
        self._owner = os.getpid()
        # For reopen(), after a chdir() too.
        self._absolute = None if isinstance(path, int) else os.path.abspath(self.path)
        self._number = 0  # of the file in use
        self._files = 0  # after the first
        self._change: Reopening | None = None
        self._guard = threading.RLock()
        self._guarded = False
        with contextlib.ExitStack() as undo:
            self._own = {"next": self._open(path, patience)}
            undo.callback(self._close_all)
            self._identity = identity_of(self._own["next"])
            self._torn_at_open = self._end_torn_tail(self._own["next"])
            self._open_descriptors(capacity)
            self._attach()
            self._park()
            self._logger = self._start_logger()
            undo.pop_all()
        _logs.add(self)

    def _open(self, path: "str | os.PathLike[str] | int", patience: float) -> int:
        synced = self.durability == "synced"
        if isinstance(path, int):
            return copy_of_stream(integer(path, "path", 0, INT_MAX), synced=synced)
        return open_file(self.path, synced=synced, patience=patience)

    def _end_torn_tail(self, fd: int) -> int:
        is_file = self._absolute is not None
        return end_torn_tail(fd, self.path) if is_file and self.format == "record" else 0

    def _open_descriptors(self, capacity: int) -> None:
        own = self._own
        own["reader"], own["writer"] = pipe(capacity)
        os.set_blocking(own["writer"], False)
        own["staging_reader"], own["staging_writer"] = pipe(capacity)
        own["wake"] = eventfd()
        own["acked"] = eventfd()
        for logger, other in (("told", "tell"), ("handed", "hand"), ("parked", "park")):
            own[logger], own[other] = packets()
        own["memory"] = above_standard(os.memfd_create("ipckit-log", os.MFD_CLOEXEC))
        os.ftruncate(own["memory"], lib.ik_log_shared_size())

    def _park(self) -> None:
        """Leave the file to the loggers. To close a file can wait for its disk, so no other process has it
        open: neither we at our end, nor each child that closes what it does not need."""
        check(lib.ik_log_park(self.native, self._own["next"]), self.path)
        self._forget("next")

    def _start_logger(self) -> Child:
        # Not the write ends: holding them, the logger would never see its end of file.
        keep = [self._own[name] for name in _OF_LOGGER]
        words = ("logger", self.native.format, self.native.durability, *keep, self._own["memory"])
        child = _spawner.execute(f"ipckit logger of {self.path}", words, (*keep, self._own["memory"]))
        return child or fork_native(_RUN_LOGGER, self.native, keep=keep, die_with_parent=False)

    @property
    def logger(self) -> Child:
        """The logger child of this moment.

        Raises: Closed; RuntimeError in a process that is not the supervisor.
        """
        if self.closed:
            raise Closed(f"the log {self.path} is closed")
        if self._logger is None:
            raise RuntimeError(
                f"process {os.getpid()} is not the supervisor of {self.path}; {self._owner} is"
            )
        return self._logger

    def fileno(self) -> int:
        """Readable when the logger died and ``supervise()`` is due."""
        return self.logger.fileno()

    def supervise(self) -> bool:
        """Start a new logger if the present one died; True if so. Nothing is lost in between.

        Raises: OSError EAGAIN, ENOMEM, EMFILE or ENFILE if no process is to be had now: call it again
            later (``append()``, ``reopen()`` and ``close()`` do so); RuntimeError if the logger dies more
            than a hundred times within a second.
        """
        if self.logger.poll() is None:
            return False
        with self._alone() as alone:
            return alone and self._supervise()

    @contextlib.contextmanager
    def _alone(self) -> "Iterator[bool]":
        """Keep other threads out; False in a signal handler that interrupted whoever is in already."""
        with self._guard:
            if self._guarded:
                yield False
                return
            try:
                self._guarded = True
                yield True
            finally:
                self._guarded = False

    def _supervise(self) -> bool:
        status = self.logger.poll()
        if status is None:
            return False
        if died := self._too_often():
            raise RuntimeError(f"the logger of {self.path} died {died} times in a second: {status}")
        self._replace(self.logger)
        return True

    def _too_often(self) -> int:
        """How often the logger has died within a second, this time included; 0 if another one may help."""
        now = time.monotonic()
        self._recent = [at for at in self._recent if now - at < 1]
        died = len(self._recent) + 1
        return died if died > _RESTARTS_PER_SECOND else 0

    def _replace(self, dead: Child) -> None:
        """Raises: as fork(); then nothing is changed."""
        _spawner.look_at_end(dead)
        self._logger = self._start_logger()
        dead.close()
        self._recent.append(time.monotonic())
        self.restarts += 1

    def _revive(self) -> bool:
        """supervise(); False if there is no process to be had now."""
        try:
            self.supervise()
        except OSError as error:
            if error.errno not in _SHORTAGE:
                raise
            return False
        return True

    # --- another file

    def reopen(self, *, timeout: float | None = 1.0) -> bool:
        """Open the path again and go over to that file; True if so, False if it is the one in use.

        For rotation: rename the file, then call this. No message is lost, doubled or split over the
        two files; what ``append()`` promised holds for the one that the message went to. Blocks until
        the old file has all that was appended before, *timeout* seconds at the most, and to open the path.

        If half of *timeout* is not enough, because the disk is full or slow, the logger goes over
        where it stands: the old file can then be moved away or removed, which gives its space back, and
        the rest goes to the new one. Nothing is lost or doubled, but one message may begin in one file
        and end in the other; ``stats().split`` counts that.

        After a failed fdatasync(2) the new file is "synced" again; an ``append()`` whose message went
        to the old one still raises.

        Raises: OSError as on opening the log, and TimeoutError (ETIMEDOUT) if the logger itself does
            not run or its writing hangs: then the old file stays in use, nothing is lost, and it can
            be called again. RuntimeError in a forked child, or in a signal handler that interrupted
            this method or ``supervise()``. Closed.
        See rename(2), logrotate(8).
        """
        change = self.begin_reopen(timeout=timeout)
        if change is None:
            return False
        with change:
            while not change.done():
                if self._revive():
                    change.wait()
                else:
                    time.sleep(_PAUSE)
        return True

    def begin_reopen(self, *, timeout: float | None = 1.0) -> "Reopening | None":
        """reopen() for an event loop, which waits only to open the path. None: it is the file in use.

        An earlier one that is not done is given up. Args and raises: as reopen().
        """
        deadline_ns, until_ns = wait.deadline(timeout), wait.deadline(seconds(timeout) / 2)
        self.logger  # noqa: B018 - raises unless open and the supervisor's
        with self._alone() as alone:
            if not alone:
                raise RuntimeError(f"a signal handler interrupted a change of the log {self.path}")
            self._settle()
            if self._absolute is None:
                raise OSError(errno.EINVAL, "the log has no path to be opened again", self.path)
            fd = open_file(self._absolute, synced=self.durability == "synced", but=self._identity)
            if fd < 0:
                return None
            self._own["next"] = fd
            try:
                self._torn_at_open += self._end_torn_tail(fd)
                check(lib.ik_log_offer(self.native, fd, until_ns), self.path)
            except BaseException:
                self._settle()
                raise
            self._change = Reopening(self, deadline_ns)
            return self._change

    def _look_at_change(self) -> None:
        """Note it if the logger has taken the next file."""
        number = lib.ik_log_in_use(self.native)
        if number == self._number or "next" not in self._own:
            return
        self._number = number
        self._files += 1
        self._identity = identity_of(self._own["next"])
        self._end_change(done=True)

    def _settle(self) -> None:
        """End an offer, if there is one; the file that was offered is in use, or free again."""
        if "next" in self._own:
            lib.ik_log_withdraw(self.native)
            self._look_at_change()
        if "next" in self._own:
            # Even if a logger that stands still finds it later: the lock is the open file's.
            fcntl.flock(self._own["next"], fcntl.LOCK_UN)
            self._end_change(done=False)

    def _end_change(self, *, done: bool) -> None:
        change, self._change = self._change, None
        if change is not None:
            change._done = done
        self._forget("next")

    # --- use

    def _try_append(self, append: Any, deadline_ns: int) -> int:
        """For a while only, then look whether the logger lives; -EINTR: go on."""
        if self._logger is None:  # in a forked child
            return super()._try_append(append, deadline_ns)
        look_ns = time.monotonic_ns() + _LOOK_NS
        if deadline_ns != wait.FOREVER:
            look_ns = min(look_ns, deadline_ns)
        rc = super()._try_append(append, look_ns)
        if rc == -errno.ETIMEDOUT and look_ns != deadline_ns:
            self._revive()
            return -errno.EINTR
        return rc

    def _counters(self) -> Any:
        counters = ffi.new("ik_log_counters *")
        lib.ik_log_read_counters(self.native, counters)
        return counters

    def stats(self) -> LogStats:
        """The counters of this moment, over all writers; waits for no disk. Raises: Closed."""
        self.logger  # noqa: B018 - raises unless open and the supervisor's
        counters = self._counters()
        return LogStats(
            messages=counters.messages,
            bytes=counters.bytes,
            backlog=check(lib.ik_log_backlog(self.native), self.path),
            restarts=self.restarts,
            torn=self._torn_at_open,
            error=counters.error,
            sync_error=counters.sync_error,
            files=self._files,
            split=counters.split,
        )

    # --- the end

    def close(self, *, timeout: float | None = 10.0) -> None:
        """Wait until all that was appended is in the file, sync it, end the logger, close.

        Block until every other writer has ended too, *timeout* seconds at the most, and a moment for the
        logger to be killed then. A second call does nothing. In a forked child: end only the child's own
        use, at once.

        Raises: TimeoutError (ETIMEDOUT) saying how many bytes were not written and why; then
            ``unwritten`` has the number. ChildProcessError (ECHILD) likewise, if the logger died more than
            a hundred times within a second. OSError if the last fdatasync failed. The log is closed all
            the same; a logger that not even SIGKILL ends, because its disk does not answer, stays until
            that does.
        """
        deadline_ns = wait.deadline(timeout)
        if self.closed or self._logger is None:
            super().close()
            return
        with self._alone():
            self._settle()
            self._forget("writer", "hand")
        try:
            self._drain(deadline_ns)
        finally:
            self._logger.close()
            self._logger = None
            super().close()

    def _drain(self, deadline_ns: int) -> None:
        assert self._logger is not None
        while True:
            try:
                status = self._logger.wait(wait.remaining(deadline_ns))
            except TimeoutError:
                self._give_up()
            if status.exited:
                check(-(status.code or 0), self.path)
                return
            if died := self._too_often():
                self._leave(errno.ECHILD, f"the logger died {died} times in a second: {status}")
            self._replace_by(deadline_ns)

    def _replace_by(self, deadline_ns: int) -> None:
        """As soon as there is a process to be had."""
        assert self._logger is not None
        while True:
            try:
                return self._replace(self._logger)
            except OSError as error:
                if error.errno not in _SHORTAGE:
                    raise
                if deadline_ns != wait.FOREVER and time.monotonic_ns() >= deadline_ns:
                    self._leave(errno.ETIMEDOUT, f"there is no logger: {error.strerror}")
            time.sleep(_PAUSE)

    def _give_up(self) -> NoReturn:
        assert self._logger is not None
        error = self._counters().error
        poller = select.poll()
        poller.register(self._own["reader"], 0)
        if error:
            why = os.strerror(error)
        elif poller.poll(0):  # POLLHUP
            why = "its file system or its logger stands still"
        else:
            why = "writers still have it open"
        self._logger.kill()
        with contextlib.suppress(TimeoutError):
            self._logger.wait(_LAST_MOMENT)
        self._leave(errno.ETIMEDOUT, why)

    def _leave(self, number: int, why: str) -> NoReturn:
        self.unwritten = check(lib.ik_log_backlog(self.native), self.path)
        text = f"the log was not finished: {why}; {self.unwritten} bytes not written"
        raise OSError(number, text, self.path)

    def _after_fork(self) -> None:
        """In a forked child: keep what appending needs. With the reader kept, a lost logger would go unseen;
        with the file, its lock would outlive the supervisor."""
        if self._logger is not None:
            self._logger.close()
            self._logger = None
        self._forget(*(set(self._own) - set(_PASSED)))


class Reopening(Rooted):
    """A change of the file under way, for an event loop; from ``MessageLog.begin_reopen()``.

    Until ``done()``, wait for POLLIN on ``fileno()``, and until the time is up, then call ``done()``
    again. If the logger dies meanwhile, ``supervise()`` has the next one go on with it. Threads: any.
    """

    _done: bool | None = None  # False: it was given up

    def __init__(self, log: MessageLog, deadline_ns: int) -> None:
        self._log = log
        self._deadline_ns = deadline_ns

    def done(self) -> bool:
        """True when the logger has gone over; does not block.

        Raises: TimeoutError (ETIMEDOUT) when the time is up, or when it was given up: then the old file
            stays in use. Closed.
        """
        log = self._log
        with log._alone():
            if self._done is None:
                self.fileno()
                log._look_at_change()
            if self._done is None and self._is_late():
                log._settle()
        if self._done is False:
            why = "the logger did not go over in time; the old file stays"
            raise TimeoutError(errno.ETIMEDOUT, why, log.path)
        return self._done is True

    def _is_late(self) -> bool:
        return self._deadline_ns != wait.FOREVER and time.monotonic_ns() >= self._deadline_ns

    def wait(self) -> None:
        """Block until done() is due, or the log's supervise()."""
        poller = select.poll()
        for fd in (self.fileno(), self._log.fileno()):
            poller.register(fd, select.POLLIN)
        wait.polled(poller, self._deadline_ns)

    def fileno(self) -> int:
        """Where to wait for it. Raises: Closed."""
        return self._log._descriptor("tell")

    def close(self) -> None:
        """Give it up, unless it is done."""
        with self._log._alone():
            if self._done is None:
                self._log._settle()

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_logs: "weakref.WeakSet[MessageLog]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for log in _logs:
        log._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
