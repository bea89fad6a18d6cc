# SPDX-License-Identifier: MIT
"""A ring of messages in shared memory: the engine of channels and queues, and an endpoint of its own.

A send copies the message into the memory and stores one index, a receive copies it out and stores the
other; the kernel is entered only to sleep, and to wake who sleeps. The store is all or nothing, so a
process that is killed at any instruction leaves no half message and no lock behind.

What is promised:

- A ``send()`` that returned: the message is received once, in the sender's order, by a receiver that lives.
- A sender killed inside ``send()``: once or not at all; never torn, never twice.
- A receiver killed inside ``recv()`` has not received: the message is the next one's. Of a message larger
  than half the ring this holds while its sender still is inside ``send()``, which then sends it again.
- Who dies is noticed by the others at its lock, which the kernel gives back. A ring can't know that the
  *last* sender is gone; a channel and a queue do.
"""

import errno
import io
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ipckit import wait
from ipckit._arguments import INT_MAX, check_buffer, integer
from ipckit._handles import check_starting
from ipckit._hot import Ends as _Ends
from ipckit._native import ffi, lib
from ipckit._unpatched import os, time
from ipckit.errors import Closed, Corrupt, PeerDied, check
from ipckit.memory import Mapping, SharedMemory

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

__all__ = ["Ends", "Ring", "RingStats", "memory_size"]

DEFAULT_CAPACITY = 1 << 20
DEFAULT_MAX_MESSAGE = 16 << 20

SEND: int = lib.IK_RING_SEND
RECV: int = lib.IK_RING_RECV

# asyncio looks again after so much: who was to ring the bell may have been killed just before.
_LOOK_AGAIN = 100_000_000


def memory_size(capacity: int) -> int:
    """Bytes of memory for a ring of at least *capacity* bytes: a power of two, and its header.

    Raises: ValueError for a capacity below 1 or above 16 GiB.
    """
    capacity = integer(capacity, "capacity", 1, 1 << 34)
    least: int = lib.IK_RING_LEAST
    header: int = lib.IK_RING_HEADER
    return header + max(least, 1 << (capacity - 1).bit_length())


def new_bells() -> "tuple[int, int]":
    """Two eventfds: for what comes, and for room. Who commits rings them, if somebody listens."""
    data = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        return data, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError:
        os.close(data)
        raise


@dataclass(frozen=True)
class RingStats:
    """Numbers of a ring; each was true at some moment."""

    capacity: int
    """bytes"""
    used: int
    """bytes, the headers of the messages among them"""
    messages: int
    """complete ones in the ring"""
    sent: int
    """messages, modulo 2**32; a long one that had to be sent again counts each time, on both sides"""
    received: int
    """messages, modulo 2**32"""
    sender: int
    """id of the thread that has the lock of the sending end, 0 for none, or if there is no lock"""
    receiver: int
    """id of the thread that has the lock of the receiving end"""
    recoveries: int
    """how often a lock was taken over from a killed holder"""


class Ends(_Ends):
    """What sends into one ring and receives from one: base of Ring, of the channel's ends and of Queue."""

    _what: str
    _memory: Mapping | None = None

    def _fail(self, rc: int, verb: str, size: int, limit: int) -> NoReturn:
        what = f"{verb} on {self._what}"
        if rc == -errno.EBADF:
            raise Closed(f"{self._what} is closed")
        if rc == -errno.ENODATA:
            raise EOFError(f"{what}: the sending side is closed, and all was received")
        if rc == -errno.EBADMSG:
            raise Corrupt(f"{what}: the memory is not what a ring writes")
        if rc == -errno.ECONNRESET:
            raise PeerDied(f"{what}: the peer ended without closing")
        if rc == -errno.EMSGSIZE:
            what = f"{what}: {size} bytes of at most {limit} bytes, {self._limit_of(verb, limit)}"
        check(rc, what)
        raise AssertionError(f"{what}: {rc} is no error")

    def _limit_of(self, verb: str, limit: int) -> str:
        """What the limit is that a message met."""
        if limit == self.max_message:
            return "which is max_message"
        if verb == "recv_into":
            return "which is the buffer"
        return f"which lie in one piece at a capacity of {self.capacity}"

    def _ring(self, side: int) -> Any:
        """The C structure. Its memory stays while the pointer is kept, also if another thread closes."""
        if not self._pin():
            raise Closed(f"{self._what} is closed")
        return ffi.gc(ffi.cast("ik_ring *", self._address(side)), self._unpin)

    def _bell(self, side: int) -> int:
        bell: int = self._ring(side).ends[side].bell
        if bell < 0:
            raise io.UnsupportedOperation(f"{self._what} was made without bells: it has no descriptor")
        return bell

    @property
    def capacity(self) -> int:
        """Bytes of the ring into which this end sends. Raises: Closed."""
        return int(self._ring(SEND).capacity)

    def fileno(self) -> int:
        """For select, poll, epoll and asyncio: readable when a receive would not block.

        From the first call on each receive costs a system call more. A sender that is killed between its
        commit and the bell leaves the descriptor silent until the next message, or the next receive.

        Raises: Closed; io.UnsupportedOperation (an OSError) for a ring that was made without bells.
        """
        bell = self._bell(RECV)
        self._listen(RECV)
        return bell

    async def asend(self, data: "Buffer", *, timeout: "float | None" = None) -> None:
        """As send(), for asyncio. A cancelled send was not sent."""
        end, bell = wait.deadline(timeout), self._bell(SEND)
        try:
            while not self._send_some(data):
                self._listen(SEND)
                if self._send_some(data):
                    return
                await self._rung(bell, end, "asend")
        finally:
            self._stop_sending(data)

    async def arecv(self, *, timeout: "float | None" = None) -> bytes:
        """As recv(), for asyncio. A cancelled receive has taken nothing."""
        end, bell, pause, amid = wait.deadline(timeout), self._bell(RECV), 0.0, False
        try:
            while not isinstance(message := self._recv_some(), bytes):
                amid = amid or message is False
                if not self._listen(RECV):
                    await self._rung(bell, end, "arecv")
                elif message is None:  # another process is just receiving what is there
                    import asyncio  # here: it is large, and most programs never come here

                    await asyncio.sleep(pause)
                    pause = min(0.05, pause * 2 + 0.001)
                    self._check_time(end, "arecv")
            amid = False
            return message
        finally:
            if amid:
                self._stop_receiving()

    def _check_time(self, end: int, verb: str) -> None:
        if wait.remaining(end) == 0:
            self._fail(-errno.ETIMEDOUT, verb, 0, 0)

    async def _rung(self, bell: int, end: int, verb: str) -> None:
        self._check_time(end, verb)
        soon = time.monotonic_ns() + _LOOK_AGAIN
        with suppress(TimeoutError):
            await wait.ready(bell, wait.READ, soon if end == wait.FOREVER else min(soon, end))
        if self.closed:
            raise Closed(f"{self._what} is closed")

    def _recv_many(self, max: "int | None" = None, *, timeout: "float | None" = None) -> "list[bytes]":
        return self.recv_many(max, timeout=timeout)

    def __iter__(self) -> "Iterator[bytes]":
        """Message after message, until the sending side is closed."""
        try:
            while True:
                yield self.recv()
        except PeerDied:
            raise
        except EOFError:
            return

    async def __aiter__(self) -> "AsyncIterator[bytes]":
        """As iter(), for asyncio."""
        try:
            while True:
                yield await self.arecv()
        except PeerDied:
            raise
        except EOFError:
            return

    def close(self) -> None:
        """Close this handle in this process; again does nothing. What is in the ring stays there.

        What other threads are doing with it ends with Closed, within 100 ms.
        """
        self._shut_down()
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close(defer=True)

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._what}{', closed' if self.closed else ''}>"


class Ring(Ends):
    """One ring, into which this object sends and from which it receives.

    Usually one process sends and others receive: an end that is used by more than one process at a time
    must be made for that, with ``many_senders`` or ``many_receivers``, which gives it a lock.

    ``Ring()`` has its own memory, without a name, which the children of a fork share. ``Ring.create()`` and
    ``Ring.attach()`` are for a ring in any memory that processes share.

    Args: capacity: bytes, rounded up to a power of two; of them each message takes its own, rounded up to 8,
        and 8. A message of more than half of it goes through in pieces. many_senders, many_receivers: that
        end is used by several processes at a time. max_message: bytes; larger ones are refused.
        max_messages: how many the ring holds at most, 0 for as many as there is room for.
    Raises: ValueError for sizes out of range; OSError ENOMEM, EMFILE, ENFILE.
    Fork: the child has it too. Pickle: to children of multiprocessing as they start. Threads: any number.
    """

    def __init__(
        self,
        capacity: int = DEFAULT_CAPACITY,
        *,
        many_senders: bool = False,
        many_receivers: bool = False,
        max_message: int = DEFAULT_MAX_MESSAGE,
        max_messages: int = 0,
    ) -> None:
        size, max_message, max_messages = memory_size(capacity), check_limit(max_message), _most(max_messages)
        self._memory = SharedMemory(size)
        self._what = f"ring of {size - lib.IK_RING_HEADER} bytes"
        make(self._memory.buf, many_senders, many_receivers, max_messages)
        self._use(self._memory.buf, max_message)
        self._set_bells(*(bells := new_bells()), *bells, -1)

    def _use(self, view: memoryview, max_message: int) -> None:
        attached(self._attach(view, view, check_limit(max_message)), self._what)

    @classmethod
    def create(
        cls,
        buffer: "Buffer",
        *,
        many_senders: bool = False,
        many_receivers: bool = False,
        max_message: int = DEFAULT_MAX_MESSAGE,
        max_messages: int = 0,
        bells: "tuple[int, int] | None" = None,
    ) -> "Self":
        """Make a ring in memory that nobody uses yet, and a handle of it.

        The memory is cleared. The capacity is the largest power of two that fits behind the header of
        ``memory_size(n) - n`` bytes.

        Args: buffer: writable, C-contiguous, at an address that is a multiple of 128, as the beginning of any
            mapping is. bells: two eventfds or FIFOs, of this ring, for fileno() and asyncio; they are closed
            with the handle. The others as of Ring.
        Raises: ValueError for a buffer that is too small or not aligned; TypeError for one that is read-only,
            BufferError for one with gaps.
        """
        view = memoryview(check_buffer(buffer, "buffer", True)).cast("B")
        max_message, max_messages = check_limit(max_message), _most(max_messages)
        view[: lib.IK_RING_HEADER] = bytes(min(len(view), lib.IK_RING_HEADER))
        make(view, many_senders, many_receivers, max_messages)
        return cls.attach(view, max_message=max_message, bells=bells)

    @classmethod
    def attach(
        cls,
        buffer: "Buffer",
        *,
        max_message: int = DEFAULT_MAX_MESSAGE,
        bells: "tuple[int, int] | None" = None,
    ) -> "Self":
        """A handle of the ring that is in *buffer*; all of its header is checked first.

        Raises: Corrupt if there is none, or a damaged one, or one of another version; BlockingIOError
            (EAGAIN) if it is just being made; ValueError, TypeError and BufferError as create().
        """
        ring = cls.__new__(cls)
        view = memoryview(check_buffer(buffer, "buffer", True)).cast("B")
        ring._what = f"ring in a buffer of {len(view)} bytes"
        ring._use(view, max_message)
        if bells is not None:
            data, room = (integer(bell, "bells", 0, INT_MAX) for bell in bells)
            ring._set_bells(data, room, data, room, -1)
        return ring

    def close_write(self) -> None:
        """No process sends any more: receivers get EOFError after the rest. Raises: Closed."""
        lib.ik_ring_shut(self._ring(SEND), SEND)

    def close_read(self) -> None:
        """No process receives any more: senders get BrokenPipeError (EPIPE). Raises: Closed."""
        lib.ik_ring_shut(self._ring(RECV), RECV)

    def stats(self) -> RingStats:
        """What is in the ring now, and what went through. Raises: Closed."""
        return ring_stats(self._ring(SEND))

    def __reduce__(self) -> "tuple[Any, ...]":
        if self._memory is None:
            raise TypeError(
                f"{type(self).__name__}: {self._what} can't be pickled: only a ring with its own memory can"
            )
        check_starting(f"{type(self).__name__}: {self._what}")
        bells = tuple(sendable(self._bell(side)) for side in (RECV, SEND))
        return _inherited, (self._memory, self.max_message, bells)


def _inherited(memory: SharedMemory, max_message: int, duplicates: "tuple[Any, Any]") -> Ring:
    data, room = (received(duplicate) for duplicate in duplicates)
    ring = Ring.attach(memory.buf, max_message=max_message, bells=(data, room))
    ring._memory = memory
    ring._what = f"ring of {ring.capacity} bytes"
    return ring


# --- what channels and queues need too -----------------------------------------------------------


def _most(max_messages: int) -> int:
    return integer(max_messages, "max_messages", 0, (1 << 32) - 1)


def make(view: memoryview, many_senders: bool, many_receivers: bool, max_messages: int = 0) -> None:
    """Make a ring in memory of zeros."""
    flags = (many_senders and lib.IK_RING_MANY_SENDERS) | (many_receivers and lib.IK_RING_MANY_RECEIVERS)
    with ffi.from_buffer(view, require_writable=True) as memory:
        if int(ffi.cast("uintptr_t", memory)) % lib.IK_RING_ALIGNMENT:
            raise ValueError(f"a ring begins at a multiple of {lib.IK_RING_ALIGNMENT} bytes")
        rc = lib.ik_ring_create(memory, len(view), flags, max_messages)
    if rc == -errno.EINVAL:
        raise ValueError(f"a ring needs {memory_size(1)} bytes, not {len(view)}")
    check(rc, "making a ring")


def attached(rc: int, what: str) -> None:
    """Raise what attaching to a ring found."""
    if rc == -errno.EBADMSG:
        raise Corrupt(f"{what}: the memory holds no ring, or a damaged one")
    if rc == -errno.EACCES:
        raise ValueError(f"{what}: a ring needs memory that can be written to")
    check(rc, what)


def check_limit(max_message: int) -> int:
    return integer(max_message, "max_message", 1, (1 << 40) - 1)


def ring_stats(ring: Any) -> RingStats:
    """Of an ``ik_ring *``."""
    stats = ffi.new("ik_ring_stats *")
    lib.ik_ring_get_stats(ring, stats)
    return RingStats(
        capacity=ring.capacity,
        used=stats.used,
        messages=(stats.sent - stats.received) & 0xFFFFFFFF,
        sent=stats.sent,
        received=stats.received,
        sender=stats.holder[SEND],
        receiver=stats.holder[RECV],
        recoveries=stats.recoveries[SEND] + stats.recoveries[RECV],
    )


def sendable(fd: int) -> Any:
    """A descriptor for pickle, to a child of multiprocessing that is being started."""
    from multiprocessing import reduction

    return reduction.DupFd(fd)


def received(duplicate: Any) -> int:
    """The descriptor that sendable() sent."""
    fd: int = duplicate.detach()
    os.set_inheritable(fd, False)
    return fd
