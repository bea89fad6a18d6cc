# SPDX-License-Identifier: MIT
"""Locks, events, semaphores, conditions and barriers between processes, which survive ``kill -9``.

The names, methods and results are those of ``multiprocessing``, so a timeout below 0 is 0 here, however far
below. Each exists in two forms:

- ``Lock()``: in its own memory without a name; other processes get it by fork, or by pickling to the
  children of ``multiprocessing`` as they start.
- ``Lock.create(buffer, offset)`` and ``Lock.attach(buffer, offset)``: in ``Lock.SIZE`` bytes of any
  writable shared memory, at a multiple of 64, for unrelated processes.

A process that is killed hangs nobody: a lock goes to the next, who is told so (``recovered``); what a
condition told the dead, it tells the next; a barrier breaks. The kernel says who died, never a clock.
"""

import errno
from collections.abc import Callable
from threading import BrokenBarrierError
from typing import TYPE_CHECKING, Any

from ipckit import _hot
from ipckit._arguments import check_buffer, integer, seconds_left
from ipckit._handles import check_starting
from ipckit._native import lib
from ipckit.errors import Corrupt, check
from ipckit.memory import SharedMemory
from ipckit.wait import deadline, remaining

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self
else:
    Buffer = object

__all__ = [
    "Barrier",
    "BoundedSemaphore",
    "BrokenBarrierError",
    "Condition",
    "Event",
    "Lock",
    "RLock",
    "Semaphore",
]

_ALIGNMENT: int = lib.IK_SYNC_ALIGNMENT
_LARGEST: int = lib.IK_SYNC_LARGEST
_SEATS: int = lib.IK_SYNC_SEATS
_BEFORE_LOCK: int = lib.IK_SYNC_SEATED_SIZE  # of a Condition with its own


class _Shared:
    """Where a thing lies: in memory of its own, or in somebody's buffer."""

    SIZE: int
    """bytes it takes of a buffer"""

    _KIND: int
    _memory: SharedMemory | None = None  # its own

    def _in_own_memory(self, number: int = 0, most: int = 0) -> None:
        memory = SharedMemory(self.SIZE)
        self._at(memory.buf, 0, True, number, most)
        self._memory = memory

    def _at(self, buffer: Buffer, offset: int, create: bool, number: int = 0, most: int = 0) -> None:
        """Lie at *offset* of *buffer*, which stays as long as we do."""
        kind, offset = type(self).__name__, integer(offset, "offset")
        with memoryview(check_buffer(buffer, "buffer", True)) as view:
            room = view.nbytes - offset
        if offset < 0 or room < self.SIZE:
            raise ValueError(f"{kind} takes {self.SIZE} bytes; at offset {offset} there are {room}")
        rc = self._open(buffer, offset, self._KIND, create, number, most)  # type: ignore[attr-defined]
        if rc == -errno.EINVAL:
            raise ValueError(f"{kind} must lie at a multiple of {_ALIGNMENT}, which offset {offset} is not")
        if rc == -errno.EBADMSG:
            raise Corrupt(f"there is no complete {kind} at offset {offset} of {buffer!r}")
        check(rc, kind)

    @classmethod
    def attach(cls, buffer: Buffer, offset: int = 0) -> "Self":
        """The one that another process created there. It keeps *buffer* exported.

        Raises: Corrupt if none is there, or not yet; ValueError, TypeError and BufferError as create().
        """
        self = cls.__new__(cls)
        self._at(buffer, offset, False)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._memory is None:
            raise TypeError(f"{self!r} lies in a buffer: let the other process attach() to it")
        check_starting(repr(self), "let others attach() to one in shared memory, made by create()")
        return _unpickled, (type(self), self._memory, self._options())

    def _options(self) -> dict[str, Any]:
        """What attach() in the other process needs beside the memory."""
        return {}


def _unpickled(cls: type[Any], memory: SharedMemory, options: dict[str, Any]) -> Any:
    self = cls.attach(memory.buf, **options)
    self._memory = memory
    return self


class _Plain(_Shared):
    """What is made without arguments."""

    def __init__(self) -> None:
        self._in_own_memory()

    @classmethod
    def create(cls, buffer: Buffer, offset: int = 0) -> "Self":
        """A new one in ``SIZE`` bytes of *buffer* that nobody uses; it keeps *buffer* exported.

        Raises: ValueError if the place is too small, or no multiple of 64 in memory; TypeError for a buffer
            that is read-only, BufferError for one with gaps.
        """
        self = cls.__new__(cls)
        self._at(buffer, offset, True)
        return self


class Lock(_Plain, _hot.Lock):
    """A lock that one thread of one process has, and that the kernel takes back when it ends.

    Who acquires it after a death gets it as always, with ``recovered`` True until the next acquire of the
    handle: then what the lock guards may be half changed. Who needs to repairs it before the release; if
    the repairer is killed too, the next is told so again.

    Raises: OSError ENOMEM, EMFILE, ENFILE for a new one.
    Fork: the child has the handle, but not the lock. Threads: any number.
    See pthread_mutexattr_setrobust(3).
    """

    SIZE: int = lib.IK_SYNC_LOCK_SIZE
    _KIND: int = lib.IK_SYNC_LOCK

    def locked(self) -> bool:
        """Has somebody got it at this moment?"""
        return self.owner is not None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}(owner={self.owner})>"


class RLock(Lock):
    """A Lock that the thread which has it may acquire again, and releases as often."""

    _KIND: int = lib.IK_SYNC_RLOCK


class Event(_Plain, _hot.Event):
    """A flag that processes wait for. No lock is behind it.

    Raises: OSError ENOMEM, EMFILE, ENFILE for a new one.
    """

    SIZE: int = lib.IK_SYNC_EVENT_SIZE
    _KIND: int = lib.IK_SYNC_EVENT

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {id(self):#x} {'set' if self.is_set() else 'unset'}>"


class Semaphore(_Shared, _hot.Semaphore):
    """A counter that is never below 0: ``acquire()`` takes one and waits for it, ``release()`` adds one.

    It has no owner: a process killed between the two keeps what it took, for ever. Where that matters use
    Lock, or ``ipckit.sysv.Semaphore``, which the kernel gives back.

    Args: value: where it starts, 0 to 2147483647.
    Raises: ValueError; OSError ENOMEM, EMFILE, ENFILE for a new one.
    """

    SIZE: int = lib.IK_SYNC_SEMAPHORE_SIZE
    _KIND: int = lib.IK_SYNC_SEMAPHORE

    def __init__(self, value: int = 1) -> None:
        self._in_own_memory(*self._numbers(value))

    @classmethod
    def create(cls, buffer: Buffer, offset: int = 0, *, value: int = 1) -> "Self":
        """A new one in ``SIZE`` bytes of *buffer*. Raises: ValueError as Lock.create()."""
        self = cls.__new__(cls)
        self._at(buffer, offset, True, *cls._numbers(value))
        return self

    @staticmethod
    def _numbers(value: int) -> tuple[int, int]:
        """The value, and what it can never exceed."""
        return integer(value, "value", 0, _LARGEST), _LARGEST

    def locked(self) -> bool:
        """Would acquire() wait at this moment?"""
        return self.get_value() == 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__}(value={self.get_value()})>"


class BoundedSemaphore(Semaphore):
    """A Semaphore that can't be released beyond the value with which it started, 1 or more."""

    @staticmethod
    def _numbers(value: int) -> tuple[int, int]:
        number = integer(value, "value", 1, _LARGEST)
        return number, number


class Condition(_Shared, _hot.Condition):
    """A lock, and waiting until somebody who has the lock notifies.

    ``create()`` and ``attach()`` without a lock have an RLock of their own in the same memory.

    Args: lock: a Lock or RLock of this module; None for an RLock of its own.
    Raises: TypeError for another lock; OSError ENOMEM, EMFILE, ENFILE for a new one.
    """

    SIZE: int = _BEFORE_LOCK + Lock.SIZE
    _KIND: int = lib.IK_SYNC_CONDITION
    lock: Lock
    """the one that acquire() and release() are about"""
    _has_own: bool

    def __init__(self, lock: Lock | None = None) -> None:
        memory = SharedMemory(self.SIZE)
        self._with(memory.buf, 0, lock, create=True)
        self._memory = memory

    @classmethod
    def create(cls, buffer: Buffer, offset: int = 0, *, lock: Lock | None = None) -> "Self":
        """A new one in ``SIZE`` bytes of *buffer*. Raises: ValueError as Lock.create()."""
        return cls.__new__(cls)._with(buffer, offset, lock, create=True)

    @classmethod
    def attach(cls, buffer: Buffer, offset: int = 0, *, lock: Lock | None = None) -> "Self":
        """The one that another process created there, with the same lock. Raises: as Lock.attach()."""
        return cls.__new__(cls)._with(buffer, offset, lock, create=False)

    def _with(self, buffer: Buffer, offset: int, lock: Lock | None, *, create: bool) -> "Self":
        if lock is not None and not isinstance(lock, Lock):
            raise TypeError(f"lock must be a Lock or RLock of ipckit, not {lock!r}")
        self._at(buffer, offset, create)
        self._has_own = lock is None
        if lock is None:
            lock = (RLock.create if create else RLock.attach)(buffer, offset + _BEFORE_LOCK)
        lock.locked()  # raises if it was never initialized
        self._bind(lock)
        self.lock = lock
        return self

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """As ``lock.acquire()``."""
        return self.lock.acquire(block, timeout)

    def release(self) -> None:
        """As ``lock.release()``."""
        self.lock.release()

    def __enter__(self) -> bool:
        return self.lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self.lock.release()

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        """wait() until *predicate* is true; *timeout* seconds for all of it.

        Returns: the last value of *predicate*. Raises: as wait().
        """
        end = deadline(seconds_left(timeout))
        while not (result := predicate()):
            left = remaining(end)
            if left == 0:
                break
            self.wait(left)
        return result

    def _options(self) -> dict[str, Any]:
        return {"lock": None if self._has_own else self.lock}

    def __repr__(self) -> str:
        return f"<{type(self).__name__}({self.lock!r})>"


class Barrier(_Shared, _hot.Barrier):
    """Where each of so many processes waits until all have come.

    One that dies while it waits breaks the barrier for the others, within 50 ms: BrokenBarrierError, until
    ``reset()``. So do a time-out, abort(), and an exception of the action.

    Args: parties: how many, 1 to 256. action: called by the last to come, before any goes on. timeout:
        seconds, for wait() without one.
    Raises: ValueError; OSError ENOMEM, EMFILE, ENFILE for a new one.
    """

    SIZE: int = lib.IK_SYNC_SEATED_SIZE
    _KIND: int = lib.IK_SYNC_BARRIER
    _action: Callable[[], Any] | None = None
    _timeout: float | None = None

    def __init__(
        self, parties: int, action: Callable[[], Any] | None = None, timeout: float | None = None
    ) -> None:
        seconds_left(timeout)
        self._in_own_memory(_checked(parties))
        self._action, self._timeout = action, timeout

    @classmethod
    def create(
        cls,
        buffer: Buffer,
        offset: int = 0,
        *,
        parties: int,
        action: Callable[[], Any] | None = None,
        timeout: float | None = None,
    ) -> "Self":
        """A new one in ``SIZE`` bytes of *buffer*. Raises: ValueError as Lock.create()."""
        seconds_left(timeout)
        self = cls.__new__(cls)
        self._at(buffer, offset, True, _checked(parties))
        self._action, self._timeout = action, timeout
        return self

    @classmethod
    def attach(
        cls,
        buffer: Buffer,
        offset: int = 0,
        *,
        action: Callable[[], Any] | None = None,
        timeout: float | None = None,
    ) -> "Self":
        """The one that another process created there. Raises: as Lock.attach()."""
        seconds_left(timeout)
        self = super().attach(buffer, offset)
        self._action, self._timeout = action, timeout
        return self

    def wait(self, timeout: float | None = None) -> int:
        """Block until all parties wait.

        Args: timeout: seconds; None for that of the barrier.
        Returns: 0 to parties - 1, for each another number: how many were there before.
        Raises: BrokenBarrierError (threading's) if the barrier is or gets broken, or the time runs out,
            which breaks it; what the action raises.
        Fork: usable on both sides. Threads: any number. Signals: their Python handlers run, then the wait
            goes on; one that raises takes its thread out of the barrier.
        """
        index = self._wait(self._timeout if timeout is None else timeout, self._action)
        if index is None:
            raise BrokenBarrierError(f"{self!r}")
        return index

    def _options(self) -> dict[str, Any]:
        return {"action": self._action, "timeout": self._timeout}

    def __repr__(self) -> str:
        state = "broken" if self.broken else f"waiters={self.n_waiting}/{self.parties}"
        return f"<{type(self).__name__} at {id(self):#x}: {state}>"


def _checked(parties: int) -> int:
    return integer(parties, "parties", 1, _SEATS)
