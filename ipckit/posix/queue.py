# SPDX-License-Identifier: MIT
"""Message queues with priorities, kept by the kernel under a name. See mq_overview(7)."""

import errno
import resource
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import posix_ipc

from ipckit import _procfs, limits, registry
from ipckit._arguments import Buffer, as_bytes, integer, most_of, permissions, pin
from ipckit._handles import finalizer
from ipckit._hot import PosixQueue
from ipckit._native import ffi, lib
from ipckit._unpatched import os, select
from ipckit.errors import Closed, check
from ipckit.posix.names import check_exclusive, check_name, told
from ipckit.wait import READ, WRITE, deadline, ready, remaining

__all__ = ["Message", "MessageQueue", "QueueStat"]

_AnyQueue = TypeVar("_AnyQueue", bound="MessageQueue")

_CLOSED: int = lib.IK_POSIX_CLOSED
_HIGHEST: int = lib.IK_POSIX_MOST_PRIORITY
_CAP_SYS_RESOURCE = 1 << 24
# What the kernel counts for a message beside its bytes: a message and a node of the tree of priorities.
_OVERHEAD = 48 + 48
_uncleared = ffi.new_allocator(should_clear_after_alloc=False)


class Message(NamedTuple):
    data: bytes
    priority: int


@dataclass(frozen=True)
class QueueStat:
    """A queue as it is now."""

    messages: int
    max_messages: int
    max_message: int
    """bytes"""
    bytes: int | None
    """of all messages in it; None if the queue was opened writeonly, or where the kernel doesn't tell"""
    mode: int
    uid: int


# --- limits --------------------------------------------------------------------------------------


def _limit(name: str) -> int:
    found = limits.value(f"fs.mqueue.{name}")
    if found is None:
        _procfs.path("sys/fs/mqueue")  # is there; so the kernel has no queues
    return found or 0


def _given(value: int | None, name: str, usual: int, limit: str) -> int:
    return min(usual, _limit(limit)) if value is None else integer(value, name)


def _may_exceed_limits() -> bool:
    """Has this process the privilege that the kernel asks for? Root in a container hasn't."""
    with open(_procfs.path("self/status")) as status:
        effective = next(line for line in status if line.startswith("CapEff"))
    return bool(int(effective.split()[1], 16) & _CAP_SYS_RESOURCE)


def _share(max_messages: int, max_message: int) -> int:
    """The bytes that a queue counts for, however few messages are in it."""
    return max_messages * (max_message + _OVERHEAD)


def _refuse_share(max_messages: int, max_message: int, what: str) -> None:
    wanted, (allowed, _) = _share(max_messages, max_message), resource.getrlimit(resource.RLIMIT_MSGQUEUE)
    check(
        -errno.EMFILE,
        f"{what}: it counts for {wanted} bytes, and RLIMIT_MSGQUEUE gives this user {allowed} for all "
        f"queues; raise it with: prlimit --pid {os.getpid()} --msgqueue={allowed + wanted}",
    )


def _refuse_size(max_messages: int, max_message: int, what: str) -> None:
    """Name the limit that one of the two exceeds."""
    for limit, value in (("msg_max", max_messages), ("msgsize_max", max_message)):
        if value > _limit(limit):
            check(-errno.EINVAL, f"{what}: {limits.advice(f'fs.mqueue.{limit}', value)}")


def _check_limits(max_messages: int, max_message: int, what: str) -> None:
    """Before the kernel says EINVAL, or "too many open files"."""
    for name, value, most in (
        ("max_messages", max_messages, 65536),
        ("max_message", max_message, 16 << 20),
    ):
        integer(value, name, 1, most)  # which no setting exceeds
    if not _may_exceed_limits():
        _refuse_size(max_messages, max_message, what)
    allowed, _ = resource.getrlimit(resource.RLIMIT_MSGQUEUE)  # the privileged, too
    if allowed not in (resource.RLIM_INFINITY, -1) and _share(max_messages, max_message) > allowed:
        _refuse_share(max_messages, max_message, what)


def _explain(error: OSError, max_messages: int, max_message: int, what: str) -> None:
    """Raise what the kernel meant by refusing to make a queue; return if it meant what it said."""
    if error.errno == errno.EMFILE:  # not a lack of descriptors: _check_limits() just had one
        _refuse_share(max_messages, max_message, what)
    if error.errno == errno.ENOSPC:
        check(-errno.ENOSPC, f"{what}: {limits.advice('fs.mqueue.queues_max', 2 * _limit('queues_max'))}")
    if error.errno == errno.EINVAL:
        _refuse_size(max_messages, max_message, what)


# --- the queue -----------------------------------------------------------------------------------

_queues: "weakref.WeakSet[MessageQueue]" = weakref.WeakSet()


def _after_fork() -> None:
    for queue in _queues:
        lib.ik_posix_queue_after_fork(queue._queue)


os.register_at_fork(after_in_child=_after_fork)


class MessageQueue(PosixQueue):
    """A queue of messages, the highest priority first and the oldest of those, for any number of users.

    ``MessageQueue("/jobs")`` opens it, with ``create=True`` makes it if there is none, with
    ``exclusive=True`` too makes it or fails. Iterating gives message after message; it has no end.

    Args: name: a slash and 1 to 255 bytes without another. mode: permissions, whatever the umask.
        max_messages, max_message: how many, and how many bytes each; what is not given is 10 and 8,192, or
        what the system allows if that is less. Only for a queue that is made. readonly, writeonly: open it
        for one direction.
    Raises: ValueError for a bad name or number; FileNotFoundError (ENOENT), FileExistsError (EEXIST),
        PermissionError (EACCES); OSError EINVAL (over fs.mqueue.msg_max or msgsize_max), EMFILE (over
        RLIMIT_MSGQUEUE, or no descriptor left), ENOSPC (over fs.mqueue.queues_max), each with the command
        that raises the limit.
    Fork: usable on both sides. Pickle: by name, anywhere. The descriptor is close-on-exec.
    See mq_open(3).
    """

    # What close() finds when __init__ failed before it got so far.
    _queue: Any = ffi.new("ik_posix_queue *", {"fd": -1, "wake": -1, "state": _CLOSED})
    _member: "registry.Membership | None" = None
    _memories: list[tuple[Any, Any]]  # those not in use

    def __init__(
        self,
        name: str,
        *,
        create: bool = False,
        exclusive: bool = False,
        mode: int = 0o600,
        max_messages: int | None = None,
        max_message: int | None = None,
        readonly: bool = False,
        writeonly: bool = False,
    ) -> None:
        self.name = check_name(name)
        self._what = f"POSIX queue {name!r}"
        mode = permissions(mode)
        check_exclusive(create, exclusive)
        if readonly and writeonly:
            raise ValueError(f"{self._what} can't be both readonly and writeonly")
        self._way = {"read": not writeonly, "write": not readonly}
        count = _given(max_messages, "max_messages", 10, "msg_max")
        size = _given(max_message, "max_message", 8192, "msgsize_max")
        self._queue = ffi.cast("ik_posix_queue *", self._address())
        self._memories = []
        with registry.entering(self._what):
            self._enter(mode, count, size, create, exclusive)
        _queues.add(self)

    def _enter(self, mode: int, count: int, size: int, create: bool, exclusive: bool) -> None:
        fd, created = registry.make_or_open(
            lambda: self._make(mode, count, size), self._find, create, exclusive
        )
        try:
            found = os.fstat(fd)
            if created:
                os.fchmod(fd, mode)  # whatever the umask
            self._birth = registry.birth_of(found)
            self._member = registry.enter("posix-queue", self.name, created=created, birth=self._birth)
            check(lib.ik_posix_queue_adopt(self._queue, fd), self._what)
        except BaseException:
            os.close(fd)
            if created:
                posix_ipc.unlink_message_queue(self.name)
            if self._member is not None:
                self._member.forget() if created else self._member.leave()
            raise

    def _make(self, mode: int, count: int, size: int) -> int:
        what = f"{self._what} of {count} messages of {size} bytes"
        _check_limits(count, size, what)
        try:
            with told(what, exclusive=True):
                package = posix_ipc.MessageQueue(self.name, posix_ipc.O_CREX, mode, count, size, **self._way)
        except OSError as error:
            _explain(error, count, size, what)
            raise
        return package.mqd  # type: ignore[no-any-return]  # the package never closes it by itself

    def _find(self) -> int:
        with told(self._what):
            return posix_ipc.MessageQueue(self.name, **self._way).mqd  # type: ignore[no-any-return]

    # --- sending

    # send() and send_many() are PosixQueue's, in C; what doesn't succeed there at once comes here.
    def _send(self, data: Buffer, *, priority: int = 0, timeout: float | None = None) -> None:
        priority, deadline_ns = integer(priority, "priority", 0, _HIGHEST), deadline(timeout)
        with ExitStack() as pinned:
            block = data if type(data) is bytes else pin(data, pinned, False)
            size = len(block)
            self._sent(self._drive(lib.ik_posix_queue_send, block, size, priority, deadline_ns), size)

    async def asend(self, data: Buffer, *, priority: int = 0, timeout: float | None = None) -> None:
        """As send(), for asyncio: only the calling task waits. A cancelled send was not sent."""
        deadline_ns = deadline(timeout)
        while True:
            try:
                return self.send(data, priority=priority, timeout=0)
            except TimeoutError:
                await self._ready(WRITE, deadline_ns)

    # As _send(), for what isn't all bytes, or was refused.
    def _send_many(
        self, messages: Iterable[Buffer], *, priority: int = 0, timeout: float | None = None
    ) -> int:
        deadline_ns = deadline(timeout)
        priority = integer(priority, "priority", 0, _HIGHEST)
        blocks = [as_bytes(data, "messages") for data in messages]
        largest = max(map(len, blocks), default=0)
        if largest > self.max_message and not self.closed:
            self._sent(-errno.EMSGSIZE, largest)
        for done, block in enumerate(blocks):
            try:
                self.send(block, priority=priority, timeout=remaining(deadline_ns))
            except OSError:
                if done:
                    return done
                raise
        return len(blocks)

    def _drive(self, call: Callable[..., int], *arguments: Any) -> int:
        while True:
            rc = call(self._queue, *arguments)
            if rc != -errno.EINTR:
                return rc

    def _sent(self, rc: int, size: int) -> None:
        what = self._what
        if rc == -errno.EMSGSIZE:
            what = f"a message of {size} bytes to {what}, whose max_message is {self.max_message}"
        self._check(rc, f"send to {what}", "readonly")

    # --- receiving

    # recv() and recv_many() are PosixQueue's, in C; what doesn't succeed there at once comes here.
    def _recv(self, *, timeout: float | None = None) -> bytes:
        return self.recv_message(timeout=timeout).data

    def recv_message(self, *, timeout: float | None = None) -> Message:
        """As recv(). Returns: the message with its priority."""
        memory = self._memory()
        try:
            buffer, view = memory
            size = self._receive(buffer, timeout)
            return Message(view[:size], buffer.priority)
        finally:
            self._memories.append(memory)

    def _memory(self) -> tuple[Any, Any]:
        """Room for one message, and a view of it. Nobody else has it until it goes back."""
        try:
            return self._memories.pop()
        except IndexError:
            buffer = _uncleared("ik_posix_message *", {"data": self.max_message})
            return buffer, ffi.buffer(buffer.data, self.max_message)

    def recv_into(self, buffer: Buffer, *, timeout: float | None = None) -> int:
        """As recv(), into *buffer*, which is writable and has room for max_message bytes.

        Returns: bytes of the message.
        Raises: as recv(); OSError EMSGSIZE for a smaller buffer, whatever message waits: the kernel can't
            tell its size before it is taken; TypeError for a read-only buffer, BufferError for one with gaps.
        """
        with ExitStack() as pinned:
            target = pin(buffer, pinned, True, "buffer")
            if len(target) < self.max_message:
                short = f"a buffer of {len(target)} bytes for {self._what}"
                check(-errno.EMSGSIZE, f"{short}, whose max_message is {self.max_message}")
            memory = self._memory()
            pinned.callback(self._memories.append, memory)
            size = self._receive(memory[0], timeout)
            ffi.memmove(target, memory[1], size)
            return size

    # As _recv(), for large messages and what was refused.
    def _recv_many(self, max: int | None = None, *, timeout: float | None = None) -> list[bytes]:
        most = most_of(max) or self._queue.max_messages
        got = [self.recv(timeout=timeout)]
        with suppress(TimeoutError):
            while len(got) < most:
                got.append(self.recv(timeout=0))
        return got

    def _receive(self, buffer: Any, timeout: float | None) -> int:
        rc = self._drive(lib.ik_posix_queue_receive, buffer, deadline(timeout))
        return self._check(rc, f"receive from {self._what}", "writeonly")

    async def arecv(self, *, timeout: float | None = None) -> bytes:
        """As recv(), for asyncio: only the calling task waits. A cancelled receive has taken nothing."""
        return (await self.arecv_message(timeout=timeout)).data

    async def arecv_message(self, *, timeout: float | None = None) -> Message:
        """As recv_message(), for asyncio."""
        deadline_ns = deadline(timeout)
        while True:
            try:
                return self.recv_message(timeout=0)
            except TimeoutError:
                await self._ready(READ, deadline_ns)

    def __iter__(self) -> Iterator[bytes]:
        while True:
            yield self.recv()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield await self.arecv()

    # --- the descriptor

    def _check(self, rc: int, what: str, other_way: str) -> int:
        if rc == -errno.EBADF:
            if self.closed:
                raise Closed(f"{self._what} is closed")
            what = f"{what}, which was opened {other_way}"
        return check(rc, what)

    @contextmanager
    def _held(self) -> Iterator[int]:
        """An eventfd that close() makes readable; until the end of this, the descriptor stays open."""
        wake = self._check(lib.ik_posix_queue_enter(self._queue), self._what, "")
        try:
            yield wake
        finally:
            lib.ik_posix_queue_leave(self._queue)

    async def _ready(self, events: int, deadline_ns: int) -> None:
        with self._held() as wake, select.epoll() as either:
            either.register(self._queue.fd, events)
            either.register(wake, READ)
            await ready(either.fileno(), READ, deadline_ns, f"waiting for {self._what}")

    def fileno(self) -> int:
        """The descriptor: readable when there is a message, writable when there is room.

        It tells what mq_notify(3) would tell, to select, poll, epoll and asyncio, to any number of
        processes, and without a signal. It is non-blocking. Linux only.
        """
        if self.closed:
            raise Closed(f"{self._what} is closed")
        return self._queue.fd  # type: ignore[no-any-return]

    @property
    def max_message(self) -> int:
        """The most bytes of a message."""
        return self._queue.max_message  # type: ignore[no-any-return]

    def stat(self) -> QueueStat:
        """The queue as it is now. Raises: Closed. See mq_getattr(3)."""
        found = ffi.new("ik_posix_stat *")
        with self._held():
            check(lib.ik_posix_queue_stat(self._queue, found), self._what)
            inode = os.fstat(self._queue.fd)
            size = _bytes_in(self._queue.fd)
        return QueueStat(
            found.messages, found.max_messages, found.max_message, size, inode.st_mode & 0o777, inode.st_uid
        )

    def unlink(self) -> None:
        """Give up the name: nobody can open it any more. Who has the queue open goes on with it.

        Also after close(). A queue that was made later under the same name is told from this one, and stays.

        Raises: FileNotFoundError (ENOENT) if the name is gone, or is that of a later queue; PermissionError
            (EACCES) if it is another user's. See mq_unlink(3).
        """
        with registry.entering(self._what):
            now = self._find()
            try:
                if registry.birth_of(os.fstat(now)) != self._birth:
                    check(-errno.ENOENT, f"{self._what}, whose name is that of a later queue now")
            finally:
                os.close(now)
            with told(self._what):
                posix_ipc.unlink_message_queue(self.name)
            if self._member is not None:
                self._member.forget()

    @property
    def closed(self) -> bool:
        """Was close() called here?"""
        return bool(self._queue.state & _CLOSED)

    def close(self) -> None:
        """Let go of the queue; again does nothing. Calls of other threads and tasks end with Closed."""
        lib.ik_posix_queue_close(self._queue)
        if self._member is not None:
            self._member.leave()

    def __enter__(self: _AnyQueue) -> _AnyQueue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    __del__ = finalizer(lambda self: lib.ik_posix_queue_close(self._queue))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}{', closed' if self.closed else ''}>"

    def __reduce__(self) -> tuple[Any, ...]:
        self.fileno()
        return _reopened, (self.name, self._way, self._birth)


def _reopened(name: str, way: dict[str, bool], was: str) -> MessageQueue:
    queue = MessageQueue(name, readonly=not way["write"], writeonly=not way["read"])
    if queue._birth != was:
        queue.close()
        check(-errno.ENOENT, f"POSIX queue {name!r} that was pickled; the name is that of a later queue now")
    return queue


def _bytes_in(fd: int) -> int | None:
    """QSIZE of mq_overview(7)."""
    try:
        text = os.pread(fd, 128, 0)
    except OSError:  # EBADF: opened for writing only
        return None
    return int(text.split(b"QSIZE:")[1].split()[0])
