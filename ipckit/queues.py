# SPDX-License-Identifier: MIT
"""A queue of many producers and consumers that survives kill -9, with the API of ``multiprocessing.Queue``.

It is a ring in shared memory with a lock at each end that the kernel takes back from the dead, and a table of
who takes part. There is no thread behind it: when ``put()`` returns, the object is in shared memory, and
whatever happens to its producer it will be got once.

- ``Queue()``: without a name, for a process and its children. Objects are pickled.
- ``Queue.open("jobs")``: with a name, for any processes of one user. Messages are bytes, unless asked.

A process takes part from its first call, as producer or as consumer, until it closes the queue or ends. When
there were producers, the last is gone and everything was got, ``get()`` raises Ended, which is an EOFError.
"""

import atexit
import errno
import io
import pickle
import stat
import sys
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, Full
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

from ipckit import _procfs, registry, wait
from ipckit._arguments import LONG_MAX, integer, most_of, seconds_left
from ipckit._handles import check_starting, finalizer
from ipckit._hot import QueueEnds
from ipckit._native import ffi, lib
from ipckit._unpatched import os, threading, time
from ipckit.errors import Closed, Corrupt, check
from ipckit.memory import (
    Mapping,
    SharedMemory,
    check_name,
    look_at,
    naming,
    open_seen,
    unlink_file,
    unnamed,
)
from ipckit.ring import (
    DEFAULT_CAPACITY,
    DEFAULT_MAX_MESSAGE,
    RECV,
    SEND,
    Ends,
    RingStats,
    attached,
    check_limit,
    make,
    memory_size,
    new_bells,
    received,
    ring_stats,
    sendable,
)

if sys.version_info >= (3, 13):
    from queue import ShutDown
else:

    class ShutDown(Exception):
        """put() or get() on a queue that was shut down."""


if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Codec", "Ended", "JoinableQueue", "Participant", "Queue", "QueueStats", "ShutDown"]

_PRODUCER: int = lib.IK_QUEUE_PRODUCER
_CONSUMER: int = lib.IK_QUEUE_CONSUMER
_ROLES = {None: 0, "producer": _PRODUCER, "consumer": _CONSUMER}
_TABLE: int = lib.IK_QUEUE_MEMORY
_SENDING = ("put", "send", "send_many", "reserve", "asend")
_AT_ONCE = 1024  # messages that one call receives
_LOOK = 0.4  # seconds between two looks of a waiting consumer for producers that died
_PATIENCE = 10.0  # for the lock of the table, which is held for a microsecond


class Ended(Empty, EOFError):
    """The last producer is gone, and everything was got: an EOFError, and for old code still an Empty."""


class Codec(Protocol):
    """What makes messages of objects and objects of messages."""

    def dumps(self, obj: Any, /) -> Any:
        """A bytes-like object."""

    def loads(self, data: bytes, /) -> Any: ...


@dataclass(frozen=True)
class Participant:
    """One handle of a process that takes, or took, part."""

    pid: int
    state: Literal["alive", "dead", "unknown"]
    """unknown: of another pid namespace. A stopped process is alive, one that ended and was not reaped dead.
    The dead are shown until their place in the table is needed."""
    producer: bool
    consumer: bool
    doing: Literal["idle", "put", "get"]
    """inside which call it is; of the dead, was"""
    waiting: bool
    """and waits there, for room, a message or the others"""
    active: float | None
    """end of its last call, as time.monotonic() tells time, to some milliseconds; None: there was none"""


@dataclass(frozen=True)
class QueueStats:
    """Numbers of a queue; each was true at some moment."""

    capacity: int
    """bytes"""
    used: int
    """bytes, the headers of the messages among them"""
    messages: int
    """in the queue"""
    sent: int
    """messages, modulo 2**32"""
    received: int
    """messages, modulo 2**32"""
    producers: int
    """handles that put, of processes not known to be dead"""
    consumers: int
    """handles that get"""
    waiting: int
    """those of them that wait"""
    sender: tuple[int, int] | None
    """pid and thread id of who holds the lock of the putting end"""
    receiver: tuple[int, int] | None
    """of the getting end"""
    recoveries: int
    """how often a lock was taken over from a killed holder"""
    deaths: int
    """how many ended without closing the queue: killed, or gone by os._exit()"""
    active: float | None
    """the latest of the participants'"""
    participants: tuple[Participant, ...]


class Queue(QueueEnds, Ends):
    """A queue without a name, of this process and its children; ``Queue.open()`` is for one with a name.

    It has the methods of ``multiprocessing.Queue``, and the verbs of all endpoints for the messages as
    they are. A put() blocks while there is no room for its bytes, so whatever ``maxsize`` is, one that
    nobody gets from fills up.

    Args: maxsize: objects that it holds at most; 0 for as many as there is room for. capacity: bytes,
        rounded up to a power of two; each message takes its own, rounded up to 8, and 8. A message of
        more than half of it goes through in pieces while both sides work. codec: "pickle"; "bytes" for
        messages that are bytes-like as they are; or an object with dumps() and loads(). role: this
        process takes part as that from now on, and not from its first call on: a "producer" keeps the
        queue from its end while there are no others. max_message: bytes; larger ones are refused.
    Raises: ValueError for sizes out of range or another codec; OSError ENOMEM, EMFILE, ENFILE.
    Fork: the child has it too. Pickle: to children of multiprocessing as they start. Threads: any number.
    """

    name: "str | None" = None
    """None for a queue without one"""

    _place: "int | None" = None  # ours in the table
    _roles = 0
    _next_look = 0.0
    _member: "registry.Membership | None" = None
    _birth = ""

    def __init__(
        self,
        maxsize: int = 0,
        *,
        capacity: int = DEFAULT_CAPACITY,
        codec: "Literal['bytes', 'pickle'] | Codec" = "pickle",
        role: "Literal['producer', 'consumer'] | None" = None,
        max_message: int = DEFAULT_MAX_MESSAGE,
    ) -> None:
        size = _TABLE + memory_size(capacity)
        functions, roles = _functions_of(codec), _roles_of(role)
        max_message, maxsize = check_limit(max_message), _objects(maxsize)
        memory = SharedMemory(size)
        _format(memory.buf, maxsize)
        self._what = f"queue of {memory_size(capacity) - lib.IK_RING_HEADER} bytes"
        self._use(memory, codec, functions, max_message, new_bells())
        self._take_part_as(roles)

    def _use(
        self, memory: Mapping, codec: Any, functions: "tuple[Any, Any]", limit: int, bells: "tuple[int, int]"
    ) -> None:
        """Take all of them over."""
        self._guard = threading.RLock()
        self._memory, self._codec = memory, codec
        self._table = ffi.from_buffer("ik_queue_table *", memory.buf, require_writable=True)
        try:
            view = memory.buf[_TABLE:]
            if lib.ik_queue_attach(self._shared(), memory.size) < 0:
                raise Corrupt(f"{self._what}: the memory holds no queue, or a damaged one")
            attached(self._attach(view, view, limit), self._what)
        except BaseException:
            _close(bells)
            self._table = None
            memory.close(defer=True)
            raise
        self._set_bells(*bells, *bells, -1)
        self._set_codec(*functions)
        self._show()
        _queues.add(self)

    def _shared(self) -> Any:
        """The table; as long as somebody has it, the memory stays, whoever closes the queue meanwhile."""
        table = self._table
        if table is None:
            raise Closed(f"{self._what} is closed")
        return table

    def _numbers(self) -> RingStats:
        table = self._shared()
        found = ring_stats(self._ring(RECV))
        del table
        return found

    @property
    def maxsize(self) -> int:
        """Objects that it holds at most; 0 for as many as there is room for. Raises: Closed."""
        return int(self._ring(SEND).max_messages)

    # --- the table of who takes part ------------------------------------------------------------

    def _locked(self, function: Any, *arguments: Any) -> int:
        end = wait.deadline(_PATIENCE)
        while (rc := function(self._shared(), *arguments, end)) == -errno.EINTR:
            continue
        return int(rc)

    def _take_part(self, roles: int) -> None:
        """Called before the first call of a side, from C: in the table with that role from now on."""
        with self._guard:
            if self._place is None:
                self._place = self._joined(roles)
            else:
                check(self._locked(lib.ik_queue_play, self._place, roles), f"table of {self._what}")
            self._roles |= roles
            self._show(lib.ik_queue_doing_of(self._shared(), self._place))
        _leave_at_exit()

    def _take_part_as(self, roles: int) -> None:
        if roles:
            self._take_part(roles)

    def _show(self, doing: Any = ffi.NULL) -> None:
        """Tell the C calls where in the table they show what they do, and what they have to ask for first."""
        table, place = (int(ffi.cast("uintptr_t", pointer)) for pointer in (self._shared(), doing))
        self._set_place(table, place, (_PRODUCER | _CONSUMER) & ~self._roles)

    def _joined(self, roles: int) -> int:
        myself = registry.myself()
        rc = self._locked(lib.ik_queue_join, *myself, roles)
        if rc == -errno.EUSERS:
            self._bury_the_dead()
            rc = self._locked(lib.ik_queue_join, *myself, roles)
        return check(rc, f"table of {self._what}")

    def _leave(self) -> None:
        """Out of the table; receivers that slept look whether there still is a producer."""
        with self._guard:
            place, self._place, self._roles = self._place, None, 0
            if place is None:
                return
            self._show()
            table = self._shared()
            self._locked(lib.ik_queue_leave, place)
            lib.ik_ring_wake(self._ring(SEND), RECV)
            del table

    def _forget_place(self) -> None:
        """In a child after fork: the place is the parent's."""
        self._guard = threading.RLock()
        self._place, self._roles = None, 0
        if not self.closed:
            self._show()

    def _places(self) -> "Iterator[tuple[int, Any]]":
        index = 0
        while True:
            place = ffi.new("ik_queue_place *")
            index = lib.ik_queue_read(self._shared(), index, place)
            if index < 0:
                return
            yield index, place
            index += 1

    def _bury_the_dead(self, until: int = 0) -> None:
        """Look at all in the table, or until a living one with that role is found."""
        for index, place in self._places():
            if place.state != lib.IK_QUEUE_ALIVE:
                continue
            if _process(place).state() == "dead":
                self._locked(lib.ik_queue_bury, index, place)
            elif place.roles & until:
                return

    def _is_over(self) -> bool:
        """There were producers, none is left, and everything was received."""
        table = self._shared()
        if not lib.ik_queue_had_producer(table):
            return False
        if lib.ik_queue_count(table, _PRODUCER):
            now = time.monotonic()
            if self._roles & _PRODUCER or now < self._next_look:
                return False
            self._next_look = now + _LOOK
            self._bury_the_dead(_PRODUCER)
            if lib.ik_queue_count(table, _PRODUCER):
                return False
        # After the count: what the last one put before it went is seen.
        return self._numbers().used == 0

    def _lull(self, verb: str) -> None:
        """Called now and then while a receive waits, from C: is this the end?"""
        if self._is_over():
            self._end(verb)

    def _end(self, verb: str) -> NoReturn:
        raise Ended(f"{verb} on {self._what}: the last producer is gone, and all was received")

    def _fail(self, rc: int, verb: str, size: int, limit: int) -> NoReturn:
        standard = verb in ("put", "get", "get_many")
        if rc == -errno.ETIMEDOUT and verb not in _SENDING and self._is_over():
            self._end(verb)
        if rc == -errno.ETIMEDOUT and standard:
            raise Full(self._why_full(verb)) if verb == "put" else Empty(f"{verb} on {self._what}")
        if rc in (-errno.EPIPE, -errno.ENODATA) and standard:
            raise ShutDown(f"{verb} on {self._what}: it was shut down")
        super()._fail(rc, verb, size, limit)

    def _why_full(self, verb: str) -> str:
        """What Full says: what there is, and what would lift it."""
        now, most = self._numbers(), self.maxsize
        objects = f"{now.messages} of maxsize={most} objects" if most else f"{now.messages} objects"
        return f"{verb} on {self._what}: {objects}, {now.used} of capacity={now.capacity} bytes are in it"

    async def _rung(self, bell: int, end: int, verb: str) -> None:
        if verb == "arecv":
            self._lull(verb)
        await super()._rung(bell, end, verb)

    # --- what the standard library's queues have -------------------------------------------------

    def _put(self, obj: Any, block: bool = True, timeout: "float | None" = None) -> None:
        self.put(obj, block, timeout)

    def put_many(self, objs: "Iterable[Any]", block: bool = True, timeout: "float | None" = None) -> int:
        """Put objects in order, with one commit for many; block while there is no room.

        Args: objs: all are encoded before the first is put. block, timeout: as of put(), for all.
        Returns: how many were put: all, or fewer when an error or the timeout came after the first.
        Raises: as put(), if none was put.
        """
        messages = [self._encode(obj) for obj in objs]
        try:
            return self.send_many(messages, timeout=_seconds(block, timeout))
        except (TimeoutError, BrokenPipeError) as error:
            if error.filename != f"send_many on {self._what}":  # a signal handler's own
                raise
            if isinstance(error, TimeoutError):
                raise Full(self._why_full("put_many")) from None
            raise ShutDown(f"put_many on {self._what}: it was shut down") from None

    def put_many_nowait(self, objs: "Iterable[Any]") -> int:
        """put_many(objs, block=False)."""
        return self.put_many(objs, False)

    def get_many(
        self,
        max: "int | None" = None,
        block: bool = True,
        timeout: "float | None" = None,
        *,
        max_messages_to_get: "int | None" = None,
    ) -> "list[Any]":
        """Get the objects that are there, at least one; block until there is one.

        A message that can't be decoded ends the list before it: the next call raises that, and goes on
        behind it.

        Args: max: the most to return; no more than 1024 come at once. block, timeout: as of get().
            max_messages_to_get: the name that faster-fifo has for *max*.
        Raises: as get(); ValueError for less than 1.
        """
        most = most_of(max_messages_to_get if max is None else max)
        return self._get_many(min(most or _AT_ONCE, _AT_ONCE), block, timeout)

    def get_many_nowait(
        self, max: "int | None" = None, *, max_messages_to_get: "int | None" = None
    ) -> "list[Any]":
        """get_many(max, block=False)."""
        return self.get_many(max, False, max_messages_to_get=max_messages_to_get)

    async def aput(self, obj: Any, *, timeout: "float | None" = None) -> None:
        """As put(), for asyncio. A cancelled one was not put. Raises: TimeoutError for Full; as asend()."""
        await self.asend(self._encode(obj), timeout=timeout)

    async def aget(self, *, timeout: "float | None" = None) -> Any:
        """As get(), for asyncio. A cancelled one got nothing. Raises: TimeoutError for Empty; as arecv()."""
        message = await self.arecv(timeout=timeout)
        loads = _functions_of(self._codec)[1]
        return message if loads is None else loads(message)

    def _refuse_connections(self, obj: Any) -> None:
        """Called by put() of any kind if one may be in *obj*, from C. Raises: TypeError if so."""
        if self._codec == "pickle":
            _NoConnections(io.BytesIO()).dump(obj)

    def qsize(self) -> int:
        """How many objects are in the queue: exact, also after kills. Raises: Closed."""
        return self._numbers().messages

    def empty(self) -> bool:
        """Is nothing in the queue? Raises: Closed."""
        return self._numbers().used == 0

    def full(self) -> bool:
        """Would a put() of the smallest object block? Raises: Closed."""
        found = self._numbers()
        return 0 < self.maxsize <= found.messages or found.capacity - found.used < 16

    def shutdown(self, immediate: bool = False) -> None:
        """No process puts any more: put() raises ShutDown, and so does get() after the rest.

        Of a queue with a name, this is taken back when it is opened while it is empty and nobody has it.

        Args: immediate: the rest is dropped; blocks until those who are just getting are done.
        Raises: Closed; with immediate, TimeoutError (ETIMEDOUT) if somebody was peeking for 10 s.
        """
        table, ring = self._shared(), self._ring(SEND)
        lib.ik_ring_shut(ring, RECV)
        lib.ik_ring_shut(ring, SEND)
        with suppress(EOFError):
            while immediate:
                lib.ik_queue_tasks_dropped(table, len(self.recv_many(timeout=_PATIENCE)))

    def task_done(self) -> None:
        """One object that was got is dealt with: for who waits in join(), and of no effect otherwise.

        Raises: ValueError if all were; Closed.
        """
        sent = self._numbers().sent
        if lib.ik_queue_task_done(self._shared(), sent) < 0:
            raise ValueError(f"task_done() called too many times for {self._what}")

    def join(self) -> None:
        """Block until task_done() was said as often as an object was put; by nobody is for ever.

        A consumer killed before its task_done() leaves it undone. Raises: Closed.
        """
        # What is done is read first: it never is more than what was sent by then.
        while (done := lib.ik_queue_tasks(self._shared())) != self._numbers().sent:
            rc = lib.ik_queue_wait_tasks(self._shared(), done, wait.FOREVER)
            if rc != -errno.EINTR:
                check(rc, f"join on {self._what}")

    def join_thread(self) -> None:
        """Does nothing: there is no thread, and what was put is in the queue already."""

    def cancel_join_thread(self) -> None:
        """Does nothing, as join_thread()."""

    # --- at least once ---------------------------------------------------------------------------

    def commit(self, size: "int | None" = None, /) -> None:
        """Send what this thread reserved; or receive, as release(), what it peeked at.

        Peek, work, commit: if this process dies before the commit, the message is the next consumer's, so
        each is worked on at least once. Until then other consumers wait.

        Raises: RuntimeError if this thread has neither; ValueError for more than was reserved.
        """
        try:
            super().commit(size)
        except RuntimeError:
            self.release()

    # --- the end ---------------------------------------------------------------------------------

    def __iter__(self) -> "Iterator[Any]":
        """Object after object, until the last producer is gone or the queue is shut down."""
        with suppress(EOFError, ShutDown):
            while True:
                yield self.get()

    async def __aiter__(self) -> "AsyncIterator[Any]":
        """As iter(), for asyncio."""
        with suppress(EOFError):
            while True:
                yield await self.aget()

    def close(self) -> None:
        """End this handle's part in the queue; again does nothing. What is in the queue stays there.

        If this was the last producer, consumers get Ended (EOFError) after the rest.
        """
        if self.closed:
            return
        with self._guard:
            self._leave()
            self._table = None
        super().close()
        if self._member is not None:
            self._member.leave()

    @finalizer
    def __del__(self) -> None:
        if not self.closed:
            self._leave()

    def stats(self) -> QueueStats:
        """What is in the queue, who takes part, and what they are doing. Raises: Closed.

        Those who died since the last look are noticed. Reads /proc for each participant.
        """
        ring = self._numbers()
        self._bury_the_dead()
        people = tuple(_participant(place) for _, place in self._places())
        there = [person for person in people if person.state != "dead"]
        return QueueStats(
            capacity=ring.capacity,
            used=ring.used,
            messages=ring.messages,
            sent=ring.sent,
            received=ring.received,
            producers=sum(person.producer for person in there),
            consumers=sum(person.consumer for person in there),
            waiting=sum(person.waiting for person in there),
            sender=_holder(ring.sender),
            receiver=_holder(ring.receiver),
            recoveries=ring.recoveries,
            deaths=lib.ik_queue_deaths(self._shared()),
            active=max((person.active for person in people if person.active is not None), default=None),
            participants=people,
        )

    def __reduce__(self) -> "tuple[Any, ...]":
        if self.closed:
            raise Closed(f"{self._what} is closed")
        if self.name is not None:
            return _reopened, (type(self), self.name, self._birth, self._codec, self.max_message)
        check_starting(f"{type(self).__name__}: {self._what}", "give it a name with Queue.open()")
        bells = tuple(sendable(self._bell(side)) for side in (RECV, SEND))
        return _inherited, (type(self), self._memory, self._codec, self.max_message, *bells)

    # --- with a name -----------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        name: str,
        *,
        create: bool = True,
        exclusive: bool = False,
        maxsize: int = 0,
        capacity: int = DEFAULT_CAPACITY,
        codec: "Literal['bytes', 'pickle'] | Codec" = "bytes",
        role: "Literal['producer', 'consumer'] | None" = None,
        max_message: int = DEFAULT_MAX_MESSAGE,
    ) -> "Self":
        """The queue called *name* of this user: opened, or made if there is none.

        It is a file that only this user may open (mode 0600), in the folder of the registry. Nobody ever
        sees a half-made one. It stays, with what is in it, until unlink() or the end of the boot; ``ipckit
        ls`` shows it, and ``ipckit gc`` removes it if it was left behind by the killed.

        Args: name: 1 to 200 letters, digits, ``.``, ``_`` and ``-``. create: make it if there is none.
            exclusive: make it, or FileExistsError. maxsize, capacity: of a queue that is made; one that is
            there keeps its own. codec: with "pickle" whoever may write to the queue runs code here.
            role: takes part as that from now on, and not from the first call on. max_message: as of Queue.
        Raises: ValueError for a wrong name or size; FileNotFoundError (ENOENT), FileExistsError (EEXIST);
            Corrupt for a damaged one, which ``ipckit rm`` removes; OSError ENOSPC, ENOMEM, EFBIG, EMFILE,
            ENFILE; PermissionError (EPERM) and OSError ELOOP, EISDIR, EINVAL for what has the name and is
            not ours; TimeoutError (ETIMEDOUT) if the registry was locked for 10 s.
        """
        check_name(name)
        roles = _roles_of(role)
        if exclusive and not create:
            raise ValueError("exclusive is for a queue to be made: it needs create=True")
        functions = _functions_of(codec)
        max_message, maxsize = check_limit(max_message), _objects(maxsize)
        self = cls.__new__(cls)
        self._what = f"queue {name!r}"
        size = _TABLE + memory_size(capacity)
        with registry.entering(self._what), _folder() as at:
            (memory, bells), created = registry.make_or_open(
                lambda: _create(at, name, size, maxsize, self._what),
                lambda: _find(at, name, self._what),
                create,
                exclusive,
            )
            found = os.fstat(memory.fileno())
            self._use(memory, codec, functions, max_message, bells)
            self.name, self._birth = name, registry.birth_of(found)
            try:
                self._member = registry.enter("queue", name, created=created, birth=self._birth)
            except BaseException:
                if created:
                    _remove(at, name, found.st_ino)
                self.close()
                raise
        self._renew()
        self._take_part_as(roles)
        return self

    def _renew(self) -> None:
        """A queue that is empty and that nobody has is as new: what ended in it is past."""
        if self._numbers().used == 0:
            self._bury_the_dead()
            if self._locked(lib.ik_queue_renew) == 1:
                for side in (SEND, RECV):
                    lib.ik_ring_reopen(self._ring(SEND), side)

    def unlink(self) -> None:
        """Give up the name: nobody can open it any more. Who has the queue keeps it.

        Also after close(). A queue that was made later under the same name is told from this one, and stays.

        Raises: FileNotFoundError (ENOENT) if the name is gone, or is that of a later queue; BlockingIOError
            (EAGAIN) if another process is unlinking it at this moment; ValueError without a name.
        """
        if self.name is None:
            raise ValueError(f"{self._what} has no name to unlink")
        with registry.entering(self._what), _folder() as at:
            found = unlink_file(at, _file(self.name), self._birth, self._what)
            _remove_bells(at, found.st_ino)
            if self._member is not None:
                self._member.forget()


# multiprocessing has two classes, of which only this counts what is done. Here every queue does.
JoinableQueue = Queue


def _inherited(
    cls: "type[Queue]", memory: SharedMemory, codec: Any, limit: int, data: Any, room: Any
) -> Queue:
    queue = cls.__new__(cls)
    queue._what = f"queue of {memory.size - _TABLE - lib.IK_RING_HEADER} bytes"
    queue._use(memory, codec, _functions_of(codec), limit, (received(data), received(room)))
    return queue


def _reopened(cls: "type[Queue]", name: str, birth: str, codec: Any, limit: int) -> Queue:
    queue = cls.open(name, create=False, codec=codec, max_message=limit)
    if queue._birth != birth:
        queue.close()
        check(-errno.ENOENT, f"queue {name!r} that was pickled; the name is that of a later queue")
    return queue


# --- what they are made of -----------------------------------------------------------------------


class _NoConnections(pickle.Pickler):
    """Refuses what pickle writes as the bare number of a descriptor, which elsewhere is another file."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not sys.modules["multiprocessing.connection"].Connection:
            return NotImplemented
        raise TypeError(
            f"{obj!r} can't be put: pickled, it is the bare number of a descriptor of this process; "
            "Queue(codec=multiprocessing.reduction.ForkingPickler) hands the descriptor over"
        )


def _functions_of(codec: Any) -> "tuple[Any, Any]":
    if codec == "bytes":
        return None, None
    if codec == "pickle":
        return pickle.dumps, pickle.loads
    try:
        return codec.dumps, codec.loads
    except AttributeError:
        raise ValueError(
            f"codec must be 'bytes', 'pickle' or have dumps() and loads(), not {codec!r}"
        ) from None


def _roles_of(role: "str | None") -> int:
    if role not in _ROLES:
        raise ValueError(f"role must be None, 'producer' or 'consumer', not {role!r}")
    return _ROLES[role]


def _seconds(block: bool, timeout: "float | None") -> float:
    limit = seconds_left(timeout)
    return limit if block else 0


def _objects(maxsize: int) -> int:
    """Below 0 is 0, as multiprocessing has it."""
    return max(0, integer(maxsize, "maxsize", -LONG_MAX, (1 << 32) - 1))


def _format(view: memoryview, maxsize: int) -> None:
    """Make a queue in memory of zeros."""
    with ffi.from_buffer("ik_queue_table *", view, require_writable=True) as table:
        check(lib.ik_queue_create(table), "making a queue")
    make(view[_TABLE:], True, True, maxsize)


def _process(place: Any) -> registry.Process:
    return registry.Process(place.pid, place.start, place.namespace)


def _participant(place: Any) -> Participant:
    doing = place.doing
    return Participant(
        pid=place.pid,
        state="dead" if place.state == lib.IK_QUEUE_DEAD else _process(place).state(),
        producer=bool(place.roles & _PRODUCER),
        consumer=bool(place.roles & _CONSUMER),
        doing="put" if doing.inside[SEND] else "get" if doing.inside[RECV] else "idle",
        waiting=doing.waiting > 0,
        active=doing.active_ns / 1e9 if doing.active_ns else None,
    )


def _holder(thread: int) -> "tuple[int, int] | None":
    """Process and thread, of a thread id."""
    with suppress(OSError), open(_procfs.path(f"{thread}/status")) as file:
        for line in file:
            if line.startswith("Tgid:"):
                return int(line.split()[1]), thread
    return None


# --- the file of a queue with a name, and the two pipes beside it that are its bells ---------------


@contextmanager
def _folder() -> "Iterator[int]":
    at = registry.folder()
    try:
        yield at
    finally:
        os.close(at)


def _file(name: str) -> str:
    return f"queue.{name}"


def _bells(inode: int) -> "tuple[str, str]":
    """They have names of the file, so that those of a former queue of the same name are others."""
    return f"bell.{inode}.data", f"bell.{inode}.room"


def _remove(at: int, name: str, inode: int) -> None:
    os.unlink(_file(name), dir_fd=at)
    _remove_bells(at, inode)


def _remove_bells(at: int, inode: int) -> None:
    for bell in _bells(inode):
        with suppress(FileNotFoundError):
            os.unlink(bell, dir_fd=at)


def _create(at: int, name: str, size: int, maxsize: int, what: str) -> "tuple[Mapping, tuple[int, int]]":
    """Made without a name, and named when it is whole with its bells."""
    fd = unnamed(at, size, what)
    try:
        memory = Mapping(fd, size, what)
    except BaseException:
        os.close(fd)
        raise
    inode = os.fstat(fd).st_ino
    try:
        _format(memory.buf, maxsize)
        for bell in _bells(inode):
            with naming(what), suppress(FileExistsError):  # of one killed just here, of the same inode
                os.mkfifo(bell, 0o600, dir_fd=at)
        bells = _open_bells(at, inode, what)
        try:
            whole = _procfs.path(f"self/fd/{fd}")
            with naming(what):
                os.link(whole, _file(name), dst_dir_fd=at)
        except BaseException:
            _close(bells)
            raise
    except BaseException:
        _remove_bells(at, inode)
        memory.close(defer=True)
        raise
    return memory, bells


def _find(at: int, name: str, what: str) -> "tuple[Mapping, tuple[int, int]]":
    seen, found = look_at(at, _file(name), what)
    try:
        if found.st_size < _TABLE + memory_size(1):
            raise Corrupt(f"{what} has {found.st_size} bytes, too few for a queue")
        bells = _open_bells(at, found.st_ino, what)
        try:
            fd = open_seen(seen, os.O_RDWR, what)
            try:
                return Mapping(fd, found.st_size, what), bells
            except BaseException:
                os.close(fd)
                raise
        except BaseException:
            _close(bells)
            raise
    finally:
        os.close(seen)


def _open_bells(at: int, inode: int, what: str) -> "tuple[int, int]":
    data, room = _bells(inode)
    first = _open_bell(at, data, what)
    try:
        return first, _open_bell(at, room, what)
    except BaseException:
        os.close(first)
        raise


def _open_bell(at: int, bell: str, what: str) -> int:
    """Reading and writing, so that opening it waits for nobody and it never is at its end."""
    with naming(f"{what}: {bell}"):
        fd = os.open(bell, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    found = os.fstat(fd)
    if not stat.S_ISFIFO(found.st_mode) or found.st_uid != os.geteuid():
        os.close(fd)
        raise Corrupt(f"{what}: {bell} beside it is no pipe of user {os.geteuid()}")
    return fd


def _close(descriptors: "Iterable[int]") -> None:
    for fd in descriptors:
        os.close(fd)


# --- fork, and the end of the process --------------------------------------------------------------

_queues: "weakref.WeakSet[Queue]" = weakref.WeakSet()
_leaves_at_exit: "list[int]" = []  # of which process that is settled


def _leave_all() -> None:
    for queue in list(_queues):
        if not queue.closed:
            queue._leave()


def _leave_at_exit() -> None:
    """The children of multiprocessing end without atexit; they have their own list of what to do."""
    if os.getpid() in _leaves_at_exit:
        return
    _leaves_at_exit[:] = [os.getpid()]
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        from multiprocessing import util

        util.Finalize(None, _leave_all, exitpriority=0)


def _after_fork_in_child() -> None:
    for queue in list(_queues):
        queue._forget_place()


atexit.register(_leave_all)
os.register_at_fork(after_in_child=_after_fork_in_child)
