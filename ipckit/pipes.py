# SPDX-License-Identifier: MIT
"""Messages and raw bytes over a pipe, over two, and between descriptors. See pipe(7).

``pipe()`` gives a reader and a writer, ``duplex()`` two ends that do both. A message arrives whole
or not at all, from any number of writing processes and threads, killed at any moment: what reaches
the pipe is always a whole chunk of at most PIPE_BUF bytes, the unit that the kernel never mixes
with another write. There is no lock that a dead writer could hold.

A pipe has one receiving process at a time. Between two receives a Reader holds no whole message, so
``fileno()`` tells the truth to select, and the receiver may change at that moment. A Duplex may hold
some, and its ``fileno()`` tells of them too. A blocked receive looks for at most 50 us before it
sleeps, and only as long as that has lately paid.
"""

import errno
import fcntl
import functools
import sys
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from termios import FIONREAD
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from ipckit import _procfs
from ipckit._arguments import (
    INT_MAX,
    LONG_MAX,
    Buffer,
    Descriptor,
    check_buffer,
    fileno_of,
    integer,
    most_of,
    pin,
)
from ipckit._handles import finalizer
from ipckit._native import ffi, lib
from ipckit._unpatched import os, select, threading
from ipckit.errors import Closed, Corrupt, PeerDied, check
from ipckit.wait import FOREVER, NOW, READ, WRITE, deadline, polled, ready, remaining, until_ready

__all__ = ["Duplex", "DuplexStats", "Reader", "Stats", "Writer", "duplex", "pipe", "splice", "tee"]

_DEFAULT_MAX_MESSAGE = 16 * 1024 * 1024
_DEFAULT_MAX_INBOX = 256 * 1024 * 1024
_HEADER = ffi.sizeof("ik_pipes_chunk")
_LANE = ffi.offsetof("ik_pipes_chunk", "pid")  # the rest of the header says whose chunk it is
_PAYLOAD: int = lib.ik_pipes_payload()  # what fits into one chunk
_NO_LIMIT = 0xFFFFFFFF
_WHOLE: int = lib.IK_PIPES_WHOLE
_PART: int = lib.IK_PIPES_PART
_OTHER_LANE: int = lib.IK_PIPES_LANE
_uncleared = ffi.new_allocator(should_clear_after_alloc=False)

_AnyEnd = TypeVar("_AnyEnd", bound="_End")


@dataclass(frozen=True)
class Stats:
    """What went through one end of a pipe, and how the pipe is now."""

    messages: int
    bytes: int
    torn: int  # messages that were begun and never finished (always 0 for a writer)
    capacity: int  # bytes
    pending: int  # bytes in the pipe, headers included


@dataclass(frozen=True)
class DuplexStats:
    """The two pipes of an end, and the messages that a send took in meanwhile."""

    sent: Stats
    received: Stats
    inbox: int


@functools.cache
def _identity() -> tuple[int, int]:
    """Who sends: the process, and its pid namespace (0 where there is no /proc to ask)."""
    try:
        return os.getpid(), os.stat(_procfs.path("self/ns/pid")).st_ino & _NO_LIMIT
    except OSError:
        return os.getpid(), 0


os.register_at_fork(after_in_child=_identity.cache_clear)


def _is_gone(pid: int, pidns: int) -> bool:
    """Is it proven that the process has ended? Of one in another namespace it never is."""
    if pidns == 0 or pidns != _identity()[1] or pid >> 31:  # the last is nobody's
        return False
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        return error.errno == errno.ESRCH
    ended = select.poll()
    ended.register(pidfd, READ)
    try:
        return bool(ended.poll(0))
    finally:
        os.close(pidfd)


def _fits_a_chunk(block: Any) -> bool:
    return len(block) <= _PAYLOAD


def _check_limit(max_message: int) -> int:
    return integer(max_message, "max_message", 0, _NO_LIMIT)


def _check_inbox(max_inbox: int) -> int:
    return integer(max_inbox, "max_inbox", 0, LONG_MAX)


def _block_of(data: Any, name: str = "data") -> Any:
    """*data* if it is bytes, else a cffi view, to be released. Raises: as check_buffer()."""
    return data if type(data) is bytes else ffi.from_buffer(check_buffer(data, name))


def _cost(message: bytes) -> int:
    """What keeping a message costs: an empty one is not free."""
    return len(message) + 64


def _epoll() -> Any:
    if not hasattr(select, "epoll"):
        raise OSError(errno.ENOSYS, "the descriptor of a duplex end needs epoll, which is Linux only")
    return select.epoll()


def _sendable(fd: int) -> Any:
    """*fd* for pickle, as multiprocessing hands descriptors over."""
    from multiprocessing.reduction import DupFd  # only who pickles pays for the import

    return DupFd(fd)


def _unpickled(kind: Any, descriptors: tuple[Any, ...], max_message: int, *max_inbox: int) -> Any:
    limits = {"max_message": max_message} | ({"max_inbox": max_inbox[0]} if max_inbox else {})
    return kind(*[fd.detach() for fd in descriptors], **limits)


@dataclass
class _Part:
    """A message being put together."""

    state: Any  # ik_pipes_part
    message: bytes
    reach: int | None = None  # its sender is dead, and nothing of it is beyond this position in the stream


def _pending(fd: int) -> int:
    """Bytes in the pipe."""
    return int.from_bytes(fcntl.ioctl(fd, FIONREAD, bytes(4)), sys.byteorder)


def _capacity(fd: int) -> int:
    if not hasattr(fcntl, "F_GETPIPE_SZ"):
        return 0
    try:
        return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    except OSError as error:
        raise OSError(error.errno, f"descriptor {fd} is not a pipe") from None


def _now(fd: int) -> tuple[int, int]:
    """Capacity and pending bytes; of a closed end 0 and 0."""
    return (_capacity(fd), _pending(fd)) if fd >= 0 else (0, 0)


def _close(end: Any) -> None:
    """Close the descriptor of a C reader or writer; forget it first, so that it's closed once."""
    fd, end.fd = end.fd, -1
    if fd >= 0:
        os.close(fd)


class _End(ABC):
    """What every end of a pipe has."""

    _peer: "weakref.ref[_End] | None" = None
    _max_message: int
    _at_once: int
    # What close() finds when __init__ failed before it got so far.
    _in: Any = ffi.new("ik_pipes_reader *", {"fd": -1})
    _out: Any = ffi.new("ik_pipes_writer *", {"fd": -1})

    def _adopt(self, fd: int, max_message: int) -> None:
        _capacity(fd)
        self._limit(max_message)
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)

    def _limit(self, max_message: int) -> None:
        self._max_message = _check_limit(max_message)
        self._at_once = min(_PAYLOAD, self._max_message)  # what send() needn't look at twice

    @property
    def max_message(self) -> int:
        """The most bytes of a message; may be changed at any time."""
        return self._max_message

    @max_message.setter
    def max_message(self, size: int) -> None:
        self._limit(size)

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Was close() called here?"""

    @abstractmethod
    def close(self) -> None:
        """Close this end in this process; again does nothing. It doesn't wake a call in another thread."""

    def keep(self: _AnyEnd) -> _AnyEnd:
        """Close the other end in this process, and return this one. For after a fork.

        As long as any process has the other end open, no end of stream and no broken pipe is seen.
        """
        peer = self._peer() if self._peer else None
        if peer is not None:
            peer.close()
        return self

    def __enter__(self: _AnyEnd) -> _AnyEnd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    __del__ = finalizer(lambda self: self.close())


class Writer(_End):
    """The writing end of a pipe. Any number of processes and threads may send into one pipe.

    Up to about 4,000 bytes (PIPE_BUF less a header) a message is one atomic write. A larger one goes
    as several, each atomic, between which those of others may come in; the reader sorts them.
    """

    def __init__(self, fd: int, *, max_message: int = _DEFAULT_MAX_MESSAGE) -> None:
        """Take over *fd*, the writing end of a pipe or FIFO, and make it non-blocking.

        Raises: OSError EBADF if it is no pipe; then it stays the caller's.
        """
        fd = integer(fd, "fd", 0, INT_MAX)
        self._out = ffi.new("ik_pipes_writer *", {"fd": -1})
        self._owner = _identity()
        self._lanes: list[Any] = []  # those of the owner that are not in use
        self._adopt(fd, max_message)
        self._out.fd = fd

    # --- sending

    def send(self, data: Buffer, *, timeout: float | None = None) -> None:
        """Send one message; block until all of it is in the pipe.

        Args: data: bytes-like, C-contiguous, at most max_message bytes. timeout: seconds for the whole.
        Raises: BrokenPipeError (EPIPE) when no reader is left, whatever SIGPIPE is set to; TimeoutError
            (ETIMEDOUT), after which the message was not sent and never will be; OSError EMSGSIZE before
            anything is sent; Closed.
        Fork: usable on both sides. Threads and tasks: any number. See write(2), pipe(7).
        """
        deadline_ns = FOREVER if timeout is None else deadline(timeout)
        # What doesn't succeed at once starts afresh: of a message of one chunk nothing went.
        if not (
            type(data) is bytes
            and (size := len(data)) <= self._at_once
            and lib.ik_pipes_send(self._out, data, size, ffi.NULL, NOW) == 0
        ):
            self._send(data, deadline_ns)

    def _send(self, data: Buffer, deadline_ns: int) -> None:
        self._send_block(_block_of(data), deadline_ns)

    def _send_block(self, block: Any, deadline_ns: int) -> None:
        message = self._prepare(block)
        try:
            rc = self._drive(lib.ik_pipes_send, message, deadline_ns)
        finally:
            self._dispose(message)
        self._sent(rc)

    async def asend(self, data: Buffer, *, timeout: float | None = None) -> None:
        """As send(), for asyncio: only the calling task waits. A cancelled send was not sent."""
        deadline_ns = deadline(timeout)
        message = self._prepare(_block_of(data))
        try:
            while (rc := lib.ik_pipes_send(self._out, *message, NOW)) == -errno.ETIMEDOUT:
                await self._aroom(deadline_ns)
        finally:
            self._dispose(message)
        self._sent(rc)

    def send_many(self, messages: Iterable[Buffer], *, timeout: float | None = None) -> int:
        """Send each of *messages*, many small ones in one write.

        Returns: how many were sent: all, or fewer when an error or the timeout came after the first.
        Raises: as send(), if none was sent.
        """
        deadline_ns = deadline(timeout)
        blocks = [_block_of(data, "messages") for data in messages]
        self._check_size(max(map(len, blocks), default=0))
        done = 0
        while done < len(blocks):
            try:
                done += self._send_some(blocks, done, deadline_ns)
            except OSError:
                if done == 0:
                    raise
                break
        return done

    def _send_some(self, blocks: list[Any], first: int, deadline_ns: int) -> int:
        """Send the large message at *first*, or the small ones from there on; how many, at least one."""
        run = [*takewhile(_fits_a_chunk, islice(blocks, first, None))]
        if not run:
            self._send_block(blocks[first], deadline_ns)
            return 1
        plain = (block if type(block) is bytes else ffi.buffer(block) for block in run)
        joined = ffi.from_buffer(b"".join(plain))
        lengths = ffi.new("uint32_t[]", [*map(len, run)])
        batch = ffi.new("ik_pipes_batch *", {"data": joined, "lengths": lengths, "count": len(run)})
        rc = self._drive(lib.ik_pipes_send_many, (batch,), deadline_ns)
        return batch.next or self._sent(rc)

    def _drive(self, call: Any, arguments: tuple[Any, ...], deadline_ns: int) -> int:
        while True:
            rc: int = call(self._out, *arguments, deadline_ns)
            if rc != -errno.EINTR:
                return rc

    async def _aroom(self, deadline_ns: int) -> None:
        await ready(self._out.fd, WRITE, deadline_ns, self._what("send"))

    # --- one message

    def _prepare(self, block: Any) -> tuple[Any, int, Any]:
        """The arguments of ik_pipes_send(); _dispose() of them."""
        self._check_size(len(block))
        return block, len(block), self._lane(len(block)) if len(block) > _PAYLOAD else ffi.NULL

    def _dispose(self, message: tuple[Any, int, Any]) -> None:
        pointer, _, lane = message
        if type(pointer) is not bytes:
            ffi.release(pointer)  # or the buffer couldn't be resized while a traceback is held
        if lane:
            self._lanes.append(lane)

    def _lane(self, size: int) -> Any:
        """A lane that nobody uses now. What was given up in it is dropped when its next message begins."""
        if self._owner is not _identity():  # after a fork the parent's lanes are still the parent's
            self._owner, self._lanes = _identity(), []
        if self._lanes:
            lane = self._lanes.pop()
        else:
            pid, pidns = self._owner
            number = int.from_bytes(os.urandom(4), sys.byteorder)
            lane = ffi.new("ik_pipes_part *", {"pid": pid, "pidns": pidns, "lane": number})
        lane.total, lane.moved = size, 0
        return lane

    def _check_size(self, size: int) -> None:
        if size > self._max_message:
            raise OSError(
                errno.EMSGSIZE, f"a message of {size} bytes exceeds max_message, {self._max_message} bytes"
            )

    def _what(self, verb: str) -> str:
        return f"{verb} on descriptor {self._out.fd}"

    def _sent(self, rc: int) -> int:
        if rc == -errno.EBADF and self._out.fd < 0:
            raise Closed("the writing end was closed")
        return check(rc, self._what("send"))

    # --- raw bytes

    def write(self, data: Buffer, *, timeout: float | None = None) -> int:
        """Write raw bytes, no message; block until some of them could be written.

        Returns: bytes written, which may be fewer than given; all if they are at most PIPE_BUF.
        Raises: as send(). See write(2).
        """
        deadline_ns = deadline(timeout)
        with ExitStack() as pinned:
            pointer = pin(data, pinned, writable=False)
            while (rc := lib.ik_pipes_write(self._out.fd, pointer, len(pointer))) == -errno.EAGAIN:
                until_ready(self._out.fd, WRITE, deadline_ns, self._what("write"))
        return self._sent(rc)

    # --- the descriptor

    def fileno(self) -> int:
        """The descriptor: writable when a message of up to PIPE_BUF fits in."""
        if self._out.fd < 0:
            raise Closed("the writing end was closed")
        return self._out.fd  # type: ignore[no-any-return]

    @property
    def closed(self) -> bool:
        return self._out.fd < 0  # type: ignore[no-any-return]

    def close(self) -> None:
        _close(self._out)

    def stats(self) -> Stats:
        """What this process sent with this handle, and the pipe as it is now."""
        out = self._out
        return Stats(out.messages, out.bytes, 0, *_now(out.fd))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (Writer, (_sendable(Writer.fileno(self)),), self._max_message)


_readers: "weakref.WeakSet[Reader]" = weakref.WeakSet()


def _renew_locks() -> None:
    """A thread that held a lock isn't there in the child to release it."""
    for reader in _readers:
        reader._lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)


class Reader(_End):
    """The reading end of a pipe, for one process at a time; its threads take turns.

    Iterating, ``for`` or ``async for``, gives message after message until the end of the stream.
    """

    def __init__(self, fd: int, *, max_message: int = _DEFAULT_MAX_MESSAGE) -> None:
        """Take over *fd*, the reading end of a pipe or FIFO, and make it non-blocking.

        Raises: OSError EBADF if it is no pipe; then it stays the caller's.
        """
        fd = integer(fd, "fd", 0, INT_MAX)
        self._in = ffi.new("ik_pipes_reader *", {"fd": -1})
        self._lock = threading.Lock()
        self._adopt(fd, max_message)
        self._in.size = max(_capacity(fd), select.PIPE_BUF) + 2 * (_PAYLOAD + _HEADER)
        self._memory = _uncleared("char[]", self._in.size)
        self._buffer = ffi.buffer(self._memory)
        self._in.buffer = self._memory
        self._parts: dict[bytes, _Part] = {}  # by lane
        self._lane_in = b""  # the lane of self._in.part
        self._torn = 0
        self._in.fd = fd
        _readers.add(self)

    def _limit(self, max_message: int) -> None:
        super()._limit(max_message)
        self._in.largest = self._max_message

    # --- receiving

    def recv(self, *, timeout: float | None = None) -> bytes:
        """Receive one message; block until all of one has come.

        Args: timeout: seconds for the whole. What came of a message before a time-out is not lost.
        Raises: EOFError when every writer has closed; PeerDied, once, if that was in the middle of a
            message; TimeoutError (ETIMEDOUT); OSError EMSGSIZE for a message over max_message, which
            stays; Corrupt for bytes that are no message; Closed.
        Fork: one process at a time. Threads: take turns. Not from a signal handler that may have
        interrupted a receive. See read(2).
        """
        deadline_ns = FOREVER if timeout is None else deadline(timeout)
        if not self._lock.acquire(False):
            self._wait_turn(deadline_ns)
        try:
            return self._one(1, deadline_ns)
        finally:
            self._lock.release()

    async def arecv(self, *, timeout: float | None = None) -> bytes:
        """As recv(), for asyncio: only the calling task waits."""
        deadline_ns = deadline(timeout)
        while True:
            try:
                return self.recv(timeout=0)
            except TimeoutError:
                await ready(self.fileno(), READ, deadline_ns, self._about("receive"))

    def recv_into(self, buffer: Buffer, *, timeout: float | None = None) -> int:
        """As recv(), into *buffer*, which is writable.

        Returns: bytes of the message.
        Raises: as recv(); OSError EMSGSIZE if the message is larger than *buffer*: it stays for the
            next receive; TypeError for a read-only buffer, BufferError for one with gaps.
        """
        deadline_ns = deadline(timeout)
        with ExitStack() as pinned:
            target = pin(buffer, pinned, writable=True, name="buffer")
            message = self._one_of_at_most(len(target), deadline_ns)
            ffi.memmove(target, message, len(message))
        return len(message)

    def _one_of_at_most(self, size: int, deadline_ns: int) -> bytes:
        self._wait_turn(deadline_ns)
        try:
            self._in.largest = min(self._max_message, size)
            return self._one(1, deadline_ns)
        finally:
            self._in.largest = self._max_message
            self._lock.release()

    def recv_many(self, max: int | None = None, *, timeout: float | None = None) -> list[bytes]:
        """Receive all messages that are ready, at least one, with few reads; block until there is one.

        Args: max: the most to return; the rest stays in the pipe. None: what one read gives.
        Raises: as recv(), if there was no message before the end or the error.
        """
        most, deadline_ns = most_of(max), deadline(timeout)
        self._wait_turn(deadline_ns)
        try:
            got = [self._one(min(most or _NO_LIMIT, _NO_LIMIT), deadline_ns)]
            while most is None or len(got) < most:
                more = self._next(min(most - len(got), _NO_LIMIT) if most else 0, NOW)
                if isinstance(more, int):
                    break
                got.append(more)
            return got
        finally:
            self._lock.release()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                yield self.recv()
            except PeerDied:
                raise
            except EOFError:
                return

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            try:
                yield await self.arecv()
            except PeerDied:
                raise
            except EOFError:
                return

    def _wait_turn(self, deadline_ns: int) -> None:
        left = remaining(deadline_ns)
        if not self._lock.acquire(timeout=-1 if left is None else left):
            check(-errno.ETIMEDOUT, self._about("receive"))

    def _one(self, wanted: int, deadline_ns: int) -> bytes:
        got = self._next(wanted, deadline_ns)
        if type(got) is bytes:
            return got
        self._fail(got)  # type: ignore[arg-type]

    def _next(self, wanted: int, deadline_ns: int) -> bytes | int:
        """One message, or -errno. An error other than a time-out comes again with the next call."""
        state = self._in
        while True:
            came: int = lib.ik_pipes_next(state, wanted, deadline_ns)
            if came == _WHOLE:
                at = state.at
                whole: bytes = self._buffer[at : at + state.length]
                return whole
            if came == _PART:
                return self._finish()
            if came == _OTHER_LANE:
                came = self._enter_lane()
            if came < 0 and came != -errno.EINTR:
                return came

    # --- messages of several chunks

    def _enter_lane(self) -> int:
        """Go on with, or begin, the message that the chunk at the head of the stream belongs to."""
        stream = self._in
        lane = self._lane_in = self._buffer[stream.start + _LANE : stream.start + _HEADER]
        if stream.head.offset == 0:
            self._begin(lane, stream.head.total)
            return 0
        part = self._parts.get(lane)
        rc: int = lib.ik_pipes_enter(stream, part.state) if part else -errno.EBADMSG
        return rc

    def _begin(self, lane: bytes, total: int) -> None:
        if self._parts:
            self._torn += lane in self._parts  # its sender gave it up
            self._bury()
        # Nobody else has seen these bytes yet, so C may fill them in: there is no second copy.
        message = bytes(total)
        state = ffi.new("ik_pipes_part *")
        lib.ik_pipes_begin(self._in, state, message)
        self._parts[lane] = _Part(state, message)

    def _finish(self) -> bytes:
        self._in.part = ffi.NULL
        return self._parts.pop(self._lane_in).message

    def _bury(self) -> None:
        """Drop what the dead left unfinished, once all that was in the pipe at their death is taken."""
        stream = self._in
        for lane, part in [*self._parts.items()]:
            if part.reach is None and _is_gone(part.state.pid, part.state.pidns):
                part.reach = stream.position + _pending(stream.fd)
            if part.reach is not None and stream.position - (stream.end - stream.start) >= part.reach:
                self._drop(lane)

    def _drop(self, lane: bytes) -> None:
        self._torn += 1
        if self._in.part == self._parts.pop(lane).state:
            self._in.part, self._in.left = ffi.NULL, 0

    # --- errors

    def _fail(self, rc: int) -> NoReturn:
        fd = self._in.fd
        if rc == -errno.EBADF and fd < 0:
            raise Closed("the reading end was closed")
        if rc == -errno.ENODATA:
            self._end_of_stream()
        if rc == -errno.EBADMSG:
            found = self._buffer[self._in.start : self._in.start + _HEADER]
            raise Corrupt(f"descriptor {fd}: no message begins or goes on with the bytes {found.hex(' ')}")
        if rc == -errno.EMSGSIZE:
            largest = self._in.largest
            limit = "max_message" if largest == self._max_message else "the buffer"
            raise OSError(
                errno.EMSGSIZE, f"a message of {self._next_size()} bytes exceeds {limit}, {largest} bytes"
            )
        raise OSError(-rc, os.strerror(-rc), self._about("receive"))

    def _end_of_stream(self) -> NoReturn:
        """EOFError, or PeerDied if something is unfinished, which is dropped."""
        stream, parts = self._in, [part.state for part in self._parts.values()]
        came, total = (parts[0].moved, parts[0].total) if parts else (stream.end - stream.start, _HEADER)
        for lane in [*self._parts]:
            self._drop(lane)
        stream.start = stream.end = 0
        if came:
            raise PeerDied(f"descriptor {stream.fd}: its writer ended after {came} of {total} bytes")
        raise EOFError(f"end of stream on descriptor {stream.fd}")

    def _next_size(self) -> int:
        """The size of the message that was refused."""
        return self._in.head.total  # type: ignore[no-any-return]

    def _about(self, verb: str) -> str:
        return f"{verb} on descriptor {self._in.fd}"

    # --- raw bytes

    def read(self, size: int, *, timeout: float | None = None) -> bytes:
        """Read up to *size* raw bytes, no message; block until there are some.

        Returns: b"" at end of file.
        Raises: TimeoutError (ETIMEDOUT), Closed. See read(2).
        """
        size, deadline_ns = integer(size, "size", 0, LONG_MAX), deadline(timeout)
        while True:
            try:
                return os.read(self.fileno(), size)
            except BlockingIOError:
                until_ready(self._in.fd, READ, deadline_ns, self._about("read"))

    # --- the descriptor

    def fileno(self) -> int:
        """The descriptor: readable when a receive would not block, or at end of stream."""
        if self._in.fd < 0:
            raise Closed("the reading end was closed")
        return self._in.fd  # type: ignore[no-any-return]

    @property
    def closed(self) -> bool:
        return self._in.fd < 0  # type: ignore[no-any-return]

    def close(self) -> None:
        _close(self._in)

    def stats(self) -> Stats:
        """What this process received with this handle, and the pipe as it is now."""
        stream = self._in
        if self._parts and stream.fd >= 0 and self._lock.acquire(False):
            self._bury()
            self._lock.release()
        return Stats(stream.messages, stream.bytes, self._torn, *_now(stream.fd))

    def _movable_fd(self) -> Any:
        """The descriptor for pickle; nothing of a message may be in this process only."""
        if self._parts or self._in.end > self._in.start:
            raise ValueError(f"descriptor {self._in.fd} can't be handed over in the middle of a message")
        return _sendable(Reader.fileno(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (Reader, (self._movable_fd(),), self._max_message)


class Duplex(Reader, Writer):
    """One end of two pipes: what one end sends, the other receives, both ways at the same time.

    A send that finds its pipe full takes in what has come meanwhile and keeps it for the next
    receives, so two ends that send at once both finish. It takes in no more messages when those kept
    reach max_inbox bytes: an end holds at most that and one message. Ends that both send more than
    that before they receive wait for each other, until a timeout.
    """

    _either: Any = None  # epoll of the pipe and the bell, made by the first fileno()
    _bell = -1  # readable while the inbox or the buffer holds something
    _rung = False

    def __init__(
        self,
        reader: int,
        writer: int,
        *,
        max_message: int = _DEFAULT_MAX_MESSAGE,
        max_inbox: int = _DEFAULT_MAX_INBOX,
    ) -> None:
        """Take over two descriptors; see Reader and Writer, and duplex() for *max_inbox*."""
        self._max_inbox = _check_inbox(max_inbox)
        reader, writer = integer(reader, "reader", 0, INT_MAX), integer(writer, "writer", 0, INT_MAX)
        _capacity(writer)
        self._inbox: deque[bytes] = deque()
        self._kept = 0  # bytes that the inbox costs
        Reader.__init__(self, reader, max_message=max_message)
        Writer.__init__(self, writer, max_message=max_message)
        self._in.ahead = 1

    def exchange(self, data: Buffer, *, timeout: float | None = None) -> bytes:
        """Send one message and receive one; both ends may do so at once, whatever the sizes.

        Args: timeout: seconds for both together.
        Raises: as send() and recv().
        """
        deadline_ns = deadline(timeout)
        self._send(data, deadline_ns)
        self._wait_turn(deadline_ns)
        try:
            return self._one(1, deadline_ns)
        finally:
            self._lock.release()

    def close_write(self) -> None:
        """Close the sending half: the other end finds end of stream after what was sent. See shutdown(2)."""
        _close(self._out)

    # --- taking in while sending

    def _drive(self, call: Any, arguments: tuple[Any, ...], deadline_ns: int) -> int:
        while True:
            rc: int = call(self._out, *arguments, NOW)
            if rc != -errno.ETIMEDOUT or not self._room(deadline_ns):
                return rc

    def _room(self, deadline_ns: int) -> bool:
        """Wait until the pipe out has room or, unless the inbox is full, something came in."""
        either = select.poll()
        either.register(self._out.fd, WRITE)
        if self._take_in():
            either.register(self._in.fd, READ)
        return bool(polled(either, deadline_ns))

    async def _aroom(self, deadline_ns: int) -> None:
        with _epoll() as either:
            either.register(self._out.fd, WRITE)
            if self._take_in():
                either.register(self._in.fd, READ)
            await ready(either.fileno(), READ, deadline_ns, self._what("send"))

    def _take_in(self) -> bool:
        """Move what has come to the inbox; is it worth waiting for more?"""
        if not self._lock.acquire(False):
            return True  # another thread is receiving
        try:
            while self._kept < self._max_inbox:
                message = Reader._next(self, 1, NOW)
                if isinstance(message, int):
                    return message == -errno.ETIMEDOUT  # what else it is, the next receive finds too
                self._inbox.append(message)
                self._kept += _cost(message)
            return False
        finally:
            self._ring()
            self._lock.release()

    def _next(self, wanted: int, deadline_ns: int) -> bytes | int:
        try:
            if not self._inbox:
                return super()._next(wanted, deadline_ns)
            if len(self._inbox[0]) > self._in.largest:
                return -errno.EMSGSIZE
            message = self._inbox.popleft()
            self._kept -= _cost(message)
            return message
        finally:
            self._ring()

    def _ring(self) -> None:
        """Make the bell tell whether something is kept here that the pipe no longer shows."""
        if self._bell < 0:
            return
        keeps = bool(self._inbox) or self._in.end > self._in.start
        if keeps and not self._rung:
            os.eventfd_write(self._bell, 1)
        elif self._rung and not keeps:
            os.eventfd_read(self._bell)
        self._rung = keeps

    def _next_size(self) -> int:
        return len(self._inbox[0]) if self._inbox else super()._next_size()

    # --- the descriptors

    def fileno(self) -> int:
        """A descriptor that is readable when a receive would not block, kept messages included.

        Raises: OSError ENOSYS where there is no epoll; Closed. See epoll(7).
        """
        fd = super().fileno()
        if self._either is None:
            self._either = _epoll()
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._ring()
            self._either.register(fd, READ)
            self._either.register(self._bell, READ)
        return self._either.fileno()  # type: ignore[no-any-return]

    @property
    def closed(self) -> bool:
        return self._in.fd < 0 and self._out.fd < 0  # type: ignore[no-any-return]

    def close(self) -> None:
        Reader.close(self)
        Writer.close(self)
        if self._either is not None:
            self._either.close()
            os.close(self._bell)
            self._either, self._bell, self._rung = None, -1, False

    def stats(self) -> DuplexStats:  # type: ignore[override]
        """What this process sent and received with this end, and its two pipes as they are now."""
        return DuplexStats(Writer.stats(self), Reader.stats(self), len(self._inbox))

    def _movable_fd(self) -> Any:
        if self._inbox:
            raise ValueError(f"{len(self._inbox)} received messages would stay behind in this process")
        return super()._movable_fd()

    def __reduce__(self) -> tuple[Any, ...]:
        fds = self._movable_fd(), _sendable(Writer.fileno(self))
        return _unpickled, (Duplex, fds, self._max_message, self._max_inbox)


# --- making them


def _pipes(count: int, capacity: int | None, max_message: int) -> list[tuple[int, int]]:
    """The descriptors of *count* pipes; of none if one fails."""
    _check_limit(max_message)
    if capacity is not None:
        capacity = integer(capacity, "capacity", 1, INT_MAX)  # the kernel would take it modulo 2**32
    made: list[tuple[int, int]] = []
    try:
        for _ in range(count):
            made.append(os.pipe())
            if capacity is not None:
                _set_capacity(made[-1][1], capacity)
    except BaseException:
        for fd in chain(*made):
            os.close(fd)
        raise
    return made


def _set_capacity(fd: int, capacity: int) -> None:
    if not hasattr(fcntl, "F_SETPIPE_SZ"):
        raise OSError(errno.ENOSYS, "the capacity of a pipe can be set on Linux only")
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, capacity)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: a pipe of {capacity} bytes; fs.pipe-max-size, pipe-user-pages-soft limit it",
        ) from None


def pipe(*, capacity: int | None = None, max_message: int = _DEFAULT_MAX_MESSAGE) -> tuple[Reader, Writer]:
    """A pipe for messages or raw bytes: its reading and its writing end.

    Args: capacity: bytes, at least; the kernel takes the next power of two of pages, and stats() tells
        the real size. max_message: the most bytes of a message, either way.
    Raises: OSError EPERM for a capacity over /proc/sys/fs/pipe-max-size (as root ENOMEM), ENOSYS where
        none can be set (Linux only), EMFILE, ENFILE; ValueError for a bad number.
    Fork: both ends are inherited; keep() the one that a process needs. Neither survives exec, but both
        pickle to children of multiprocessing. See pipe(2), F_SETPIPE_SZ in fcntl(2).
    """
    ((source, target),) = _pipes(1, capacity, max_message)
    reader, writer = Reader(source, max_message=max_message), Writer(target, max_message=max_message)
    reader._peer, writer._peer = weakref.ref(writer), weakref.ref(reader)
    return reader, writer


def duplex(
    *,
    capacity: int | None = None,
    max_message: int = _DEFAULT_MAX_MESSAGE,
    max_inbox: int = _DEFAULT_MAX_INBOX,
) -> tuple[Duplex, Duplex]:
    """Two pipes, one each way: two ends that send and receive.

    Args: max_inbox: how many bytes of messages a send takes in when it finds its pipe full. The others,
        and the errors, as pipe().
    """
    _check_inbox(max_inbox)
    there, back = _pipes(2, capacity, max_message)
    left = Duplex(back[0], there[1], max_message=max_message, max_inbox=max_inbox)
    right = Duplex(there[0], back[1], max_message=max_message, max_inbox=max_inbox)
    left._peer, right._peer = weakref.ref(right), weakref.ref(left)
    return left, right


# --- moving bytes inside the kernel


def _reading(source: Descriptor) -> int:
    return Reader.fileno(source) if isinstance(source, Reader) else fileno_of(source, "source")


def _writing(target: Descriptor) -> int:
    return Writer.fileno(target) if isinstance(target, Writer) else fileno_of(target, "target")


def _place(offset: int | None, name: str) -> int:
    return -1 if offset is None else integer(offset, name, 0, LONG_MAX)


def _amount(count: int, flags: int) -> tuple[int, int]:
    return integer(count, "count", 0, LONG_MAX), integer(flags, "flags", 0, INT_MAX)


def _moved(call: Any, verb: str, source: int, target: int, timeout: float | None) -> int:
    deadline_ns = deadline(timeout)
    what = f"{verb} from descriptor {source} to {target}"
    while True:
        rc: int = call()
        if rc not in (-errno.EAGAIN, -errno.EINTR):
            return check(rc, what)
        if rc == -errno.EAGAIN:  # it doesn't say which of the two
            until_ready(source, READ, deadline_ns, what)
            until_ready(target, WRITE, deadline_ns, what)


def splice(
    source: Descriptor,
    target: Descriptor,
    count: int,
    *,
    source_offset: int | None = None,
    target_offset: int | None = None,
    flags: int = 0,
    timeout: float | None = None,
) -> int:
    """Move up to *count* bytes from *source* to *target* inside the kernel; one of them is a pipe.

    Blocks until some bytes were moved. Bytes, not messages: other writers of *target* may come in between.

    Args: source, target: a descriptor or what has ``fileno()``; a Duplex gives its in- or outgoing pipe.
        source_offset, target_offset: where in a file, whose own position then stays. flags:
        ``os.SPLICE_F_MORE``, ... timeout: seconds; it bounds the wait only for non-blocking descriptors.
    Returns: bytes moved; 0 at end of file.
    Raises: OSError EINVAL if neither is a pipe or *target* is open with O_APPEND; BrokenPipeError (EPIPE);
        TimeoutError (ETIMEDOUT); ENOSYS elsewhere than on Linux. See splice(2).
    """
    reader, writer = _reading(source), _writing(target)
    begin, to = _place(source_offset, "source_offset"), _place(target_offset, "target_offset")
    call = functools.partial(lib.ik_pipes_splice, reader, begin, writer, to, *_amount(count, flags))
    return _moved(call, "splice", reader, writer, timeout)


def tee(
    source: Descriptor, target: Descriptor, count: int, *, flags: int = 0, timeout: float | None = None
) -> int:
    """Copy up to *count* bytes from the pipe *source* to the pipe *target*; they stay in *source*.

    Arguments, result and errors as splice(); OSError EINVAL unless both are pipes. See tee(2).
    """
    reader, writer = _reading(source), _writing(target)
    call = functools.partial(lib.ik_pipes_tee, reader, writer, *_amount(count, flags))
    return _moved(call, "tee", reader, writer, timeout)
