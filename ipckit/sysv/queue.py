# SPDX-License-Identifier: MIT
"""System V message queues, with time limits, a descriptor and asyncio. See sysvipc(7), msgop(2).

A queue lives in the kernel, by a key or only an id, until somebody removes it; its messages are
whole, and each has a type by which a receiver may choose. The kernel's calls know no timeout and no
descriptor: here a waiting thread is ended by a timer's signal at its deadline, and ``fileno()`` and
asyncio stand on a thread that waits without taking anything out. Nothing polls.
"""

import errno
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

from ipckit import _hot, limits, registry
from ipckit._arguments import INT_MAX, LONG_MAX, Buffer, as_bytes, integer, most_of, pin
from ipckit._native import ffi, lib
from ipckit.errors import Closed, check
from ipckit.sysv.keys import (
    PRIVATE,
    Key,
    changes,
    check_creation,
    check_set,
    find_or_create,
    key_of,
    shown,
)
from ipckit.wait import NOW, READ, deadline, ready

__all__ = ["Message", "MessageQueue", "QueueStat"]

_KIND = "sysv-queue"
_send = lib.ik_sysv_queue_send
_recv = lib.ik_sysv_queue_recv
_class = type  # the name means the type of a message below
_MOST = 256  # messages that come at once

_Block = tuple[Any, Any]  # an ik_sysv_message and a buffer of its text


class Message(NamedTuple):
    """A message and its type."""

    data: bytes
    type: int


@dataclass(frozen=True)
class QueueStat:
    """A queue as the kernel has it, the fields of msqid_ds. Times are seconds since the epoch, 0: never."""

    messages: int
    bytes: int  # of all messages in it
    max_bytes: int  # how many it may hold; also how many messages
    send_pid: int  # who sent last, 0: nobody
    send_time: int
    receive_pid: int
    receive_time: int
    change_time: int
    uid: int
    gid: int
    creator_uid: int
    creator_gid: int
    mode: int
    key: int  # signed, as C has it; 0: private


def _get(key: int, create: bool, exclusive: bool, mode: int) -> tuple[int, bool]:
    """The id of the queue, or -errno, and was it made here?"""

    def find() -> int:
        return lib.ik_sysv_queue_get(key, False, False, 0)  # type: ignore[no-any-return]

    def make() -> int:
        return lib.ik_sysv_queue_get(key, True, True, mode)  # type: ignore[no-any-return]

    return find_or_create(find, make if create else None, exclusive)


def _refuse(rc: int, key: int) -> NoReturn:
    """Raise what msgget said."""
    what = f"System V queue of {shown(key)}"
    if rc == -errno.ENOSPC:
        now = limits.value("kernel.msgmni") or 0
        raise OSError(errno.ENOSPC, f"no more queues: {limits.advice('kernel.msgmni', 2 * now)}", what)
    if rc == -errno.ENOENT:
        raise FileNotFoundError(errno.ENOENT, "no such queue was ever made, or it was removed", what)
    check(rc, what)
    raise AssertionError


def _check_max_bytes(max_bytes: int) -> int:
    return integer(max_bytes, "max_bytes", 1, INT_MAX)


def _check_type(type: int) -> int:
    return integer(type, "type", 1, LONG_MAX)


def _check_wanted(type: int, all_but: bool) -> int:
    wanted = integer(type, "type", -LONG_MAX, LONG_MAX)
    if all_but and wanted < 1:
        raise ValueError(f"all_but=True needs a type >= 1 to leave out, not {wanted}")
    return wanted


def _wanted(type: int, all_but: bool, found: int) -> bool:
    if type < 0:
        return found <= -type
    return type == 0 or (found == type) != all_but


class MessageQueue(_hot.SysvQueue):
    """A handle of one System V message queue. Any number of processes and threads may use a queue.

    Iterating, ``for`` or ``async for``, gives message after message until the queue is removed.
    ``with`` closes the handle only; the queue stays until ``remove()``.

    Fork: usable on both sides. Pickles by id.
    Threads: any number, of one handle too; ``close()`` ends what other threads wait for.

    send() and recv() themselves are in C, as long as they need not wait; see ``csrc/hot.c``.
    """

    _watch: Any = None
    _watched = False

    def __init__(
        self,
        key: Key = None,
        *,
        create: bool = False,
        exclusive: bool = False,
        mode: int = 0o600,
        max_bytes: int | None = None,
    ) -> None:
        """Open the queue of *key*, or make it.

        Args: key: a 32-bit number; (path, project) for ftok(3); None (IPC_PRIVATE) always makes a new queue,
            which others find by its id. create: make it if there is none. exclusive: fail if there is
            one. mode: permissions of a queue made here, the umask doesn't count. max_bytes: what a queue made
            here may hold, bytes of all messages; None: kernel.msgmnb.
        Raises: FileNotFoundError (ENOENT) without *create*; FileExistsError (EEXIST) for *exclusive*;
            OSError ENOSPC when kernel.msgmni queues exist; PermissionError (EPERM) for *max_bytes* over
            kernel.msgmnb without CAP_SYS_RESOURCE; ValueError for a bad number. Whether one may read or
            write the queue shows with the first receive or send (EACCES). See msgget(2).
        """
        number = key_of(key)
        makes = create or number == PRIVATE
        mode = check_creation(makes, exclusive, mode)
        if max_bytes is not None:
            max_bytes = _check_max_bytes(max_bytes)
        if max_bytes is not None and not makes:
            raise ValueError("max_bytes is for a queue that is made here: it needs create=True")
        with registry.entering(f"System V queue ({shown(number)})"):
            ident, created = _get(number, makes, exclusive, mode)
            if ident < 0:
                _refuse(ident, number)
            self._open(ident, number)
            if created:
                self._enter_made(max_bytes)
            else:
                self._member = registry.enter(_KIND, str(ident), created=False)

    @classmethod
    def from_id(cls, ident: int) -> "MessageQueue":
        """Open a queue by its id, as another process has it from ``id`` or from ipcs(1).

        Raises: FileNotFoundError (ENOENT) if there is none, or none any more. See msgctl(2).
        """
        self, ident = cls.__new__(cls), integer(ident, "ident", 0, INT_MAX)
        with registry.entering(f"System V queue {ident}"):
            self._open(ident, PRIVATE)
            self._key = self._key_of_id()
            self._name = f"System V queue {ident} ({shown(self._key)})"
            self._member = registry.enter(_KIND, str(ident), created=False)
        return self

    def _key_of_id(self) -> int:
        try:
            return self.stat().key
        except PermissionError:  # who may only write can't look
            return PRIVATE
        except OSError:
            text = "no queue has this id: it was removed, or never made"
            raise FileNotFoundError(errno.ENOENT, text, self._name) from None

    def _open(self, ident: int, key: int) -> None:
        self._id, self._key, self._closed = ident, key, False
        self._name = f"System V queue {ident} ({shown(key)})"
        queue = lib.ik_sysv_queue_new(ident)
        if not queue:
            raise MemoryError
        self._queue = ffi.gc(queue, lib.ik_sysv_queue_free)
        self._room: int = limits.value("kernel.msgmax") or 8192
        self._blocks: list[_Block] = []  # those that no receive uses now
        self._at_once(ident)

    def _enter_made(self, max_bytes: int | None) -> None:
        """Finish and record what was made; what can't be is removed again."""
        try:
            if max_bytes is not None:
                self._change(max_bytes, -1, -1, -1)
            birth = str(self._birth())
            self._member = registry.enter(_KIND, str(self._id), created=True, birth=birth)
        except BaseException:
            lib.ik_sysv_queue_remove(self._id)
            raise

    def _birth(self) -> int | str:
        with suppress(PermissionError):  # a mode that shuts out the maker too
            return self.stat().change_time
        return ""

    # --- sending

    def _send(self, data: Buffer, *, type: int = 1, timeout: float | None = None) -> None:
        """What send() in C leaves: waiting, errors, other buffers than bytes."""
        type, deadline_ns = _check_type(type), deadline(timeout)
        self._send_until(as_bytes(data), type, deadline_ns)

    def _send_until(self, data: bytes, type: int, deadline_ns: int) -> None:
        while rc := _send(self._queue, data, len(data), type, deadline_ns):
            if rc != -errno.EINTR:
                self._not_sent(rc, len(data))

    def send_many(self, messages: Iterable[Buffer], *, type: int = 1, timeout: float | None = None) -> int:
        """Send each of *messages*, with few calls into C; block while the queue is full.

        Returns: how many were sent: all, or fewer when an error or the timeout came after the first.
        Raises: as send(), if none was sent; EMSGSIZE for one over kernel.msgmax before any is.
        """
        type, deadline_ns = _check_type(type), deadline(timeout)
        blocks: tuple[Any, ...] = tuple(messages)
        if not {*map(_class, blocks)} <= {bytes}:
            blocks = tuple(as_bytes(data, "messages") for data in blocks)
        self._check_size(max(map(len, blocks), default=0))
        done, count = 0, len(blocks)
        while done < count:
            done += self._send_some(blocks, done, type)
            if done < count:
                try:
                    self._send_until(blocks[done], type, deadline_ns)
                except OSError:
                    if done:  # it comes again
                        break
                    raise
                done += 1
        return done

    async def asend(self, data: Buffer, *, type: int = 1, timeout: float | None = None) -> None:
        """As send(), for asyncio: only the calling task waits, while a thread of its own sends.

        After a TimeoutError the message was not sent. Nor was it after a cancellation, unless the kernel
        took it in that very moment: then the CancelledError that this raises says "the message was sent"
        (another task that awaits this one sees that from Python 3.11 on).
        """
        type, deadline_ns = _check_type(type), deadline(timeout)
        with suppress(TimeoutError):
            return self.send(data, type=type, timeout=0)
        data = as_bytes(data)
        sender = self._helper("send", lib.ik_sysv_queue_sender, data, len(data), type)
        try:
            await self._asend_by(sender, deadline_ns)
        finally:
            rc = lib.ik_sysv_helper_stop(sender)
            ffi.release(sender)
        if rc < 0:
            self._not_sent(rc, len(data))

    async def _asend_by(self, sender: Any, deadline_ns: int) -> None:
        """Wait for the end of a sender; what ends it sooner is an error only if it hadn't sent."""
        from asyncio import CancelledError

        try:
            await ready(lib.ik_sysv_helper_fileno(sender), READ, deadline_ns, self._what("send"))
        except TimeoutError:
            if lib.ik_sysv_helper_stop(sender) != 0:
                raise
        except CancelledError:
            if lib.ik_sysv_helper_stop(sender) != 0:
                raise
            raise CancelledError("the message was sent") from None

    def _not_sent(self, rc: int, size: int) -> NoReturn:
        if rc == -errno.EINVAL:
            self._check_size(size)
        if rc == -errno.EMSGSIZE:
            self._too_large(size)
        self._fail("send", rc)

    def _check_size(self, size: int) -> None:
        """Raises: OSError EMSGSIZE for a size over kernel.msgmax."""
        if size > self._room and size > (limits.value("kernel.msgmax") or INT_MAX):
            advice = limits.advice("kernel.msgmax", size)
            raise OSError(errno.EMSGSIZE, f"message of {size} bytes to {self._name}: {advice}")

    def _too_large(self, size: int) -> NoReturn:
        most = self.stat().max_bytes
        how = "raise it with set(max_bytes=...)"
        if size > (limits.value("kernel.msgmnb") or INT_MAX):
            how += f"; {limits.advice('kernel.msgmnb', size)}"
        text = f"message of {size} bytes to {self._name}, whose max_bytes is {most}; {how}"
        raise OSError(errno.EMSGSIZE, text)

    # --- receiving

    def _recv(self, *, type: int = 0, all_but: bool = False, timeout: float | None = None) -> bytes:
        """What recv() in C leaves: waiting, errors, messages that wait in the handle."""
        return self._recv_until(type, all_but, deadline(timeout))

    def _recv_until(self, type: int, all_but: bool, deadline_ns: int) -> bytes:
        return self._message_until(type, all_but, deadline_ns).data

    def _message_until(self, type: int, all_but: bool, deadline_ns: int) -> Message:
        type = _check_wanted(type, all_but)
        size, block = self._go_on(-errno.EINTR, self._spare(), type, all_but, deadline_ns)
        message = Message(block[1][:size], block[0].type)
        self._blocks.append(block)
        return message

    def recv_message(self, *, type: int = 0, all_but: bool = False, timeout: float | None = None) -> Message:
        """As recv(), with the type of the message."""
        return self._message_until(type, all_but, deadline(timeout))

    def recv_into(
        self, buffer: Buffer, *, type: int = 0, all_but: bool = False, timeout: float | None = None
    ) -> int:
        """As recv(), into *buffer*, which is writable.

        Returns: bytes of the message.
        Raises: as recv(); OSError EMSGSIZE if the message is larger than *buffer*: it stays in the queue;
            TypeError for a read-only buffer, BufferError for one with gaps.
        """
        type, deadline_ns = _check_wanted(type, all_but), deadline(timeout)
        with ExitStack() as pinned:
            target = pin(buffer, pinned, True, "buffer")
            size, block = self._within_room(len(target), type, all_but, deadline_ns)
            if size == -errno.E2BIG:
                self._too_small(len(target), type, all_but)
            if size < 0:
                self._fail("recv", size)
            ffi.memmove(target, block[1], size)
        self._blocks.append(block)
        return size

    def recv_many(
        self,
        max: int | None = None,
        *,
        type: int = 0,
        all_but: bool = False,
        timeout: float | None = None,
    ) -> list[bytes]:
        """Receive the messages that are ready, at least one; block until there is one.

        Args: max: the most to return; the rest stays in the queue. The others as recv().
        Raises: as recv(), if there was no message before the error.
        """
        max, deadline_ns = most_of(max), deadline(timeout)
        type = _check_wanted(type, all_but)
        got = self._ready(max or _MOST, type, all_but) or [self._recv_until(type, all_but, deadline_ns)]
        # Without a limit no more than there are now, or a busy sender would keep us for ever.
        most = max or len(got) + self._now_in_it()
        while len(got) < most and (more := self._ready(most - len(got), type, all_but)):
            got += more
        return got

    def _now_in_it(self) -> int:
        try:
            return self.stat().messages
        except OSError:  # it comes again
            return 0

    def _ready(self, most: int, type: int, all_but: bool) -> list[bytes]:
        """Messages that can be had now, up to so many; maybe not all of them."""
        got = self._recv_some(most, type, all_but)
        if got is not None:
            return got
        with suppress(OSError):  # if it is none of time, it comes again
            return [self._recv_until(type, all_but, NOW)]
        return []

    async def arecv(self, *, type: int = 0, all_but: bool = False, timeout: float | None = None) -> bytes:
        """As recv(), for asyncio: only the calling task waits. A cancelled receive has taken nothing."""
        return (await self.arecv_message(type=type, all_but=all_but, timeout=timeout)).data

    async def arecv_message(
        self, *, type: int = 0, all_but: bool = False, timeout: float | None = None
    ) -> Message:
        """As arecv(), with the type of the message."""
        type, deadline_ns = _check_wanted(type, all_but), deadline(timeout)
        while True:
            with suppress(TimeoutError):
                return self.recv_message(type=type, all_but=all_but, timeout=0)
            await self._aready(type, all_but, deadline_ns)

    async def _aready(self, type: int, all_but: bool, deadline_ns: int) -> None:
        """Wait until there may be such a message."""
        if type == 0:
            return await ready(self.fileno(), READ, deadline_ns, self._what("recv"))
        watch = self._watcher("recv", type, all_but)
        try:
            await ready(lib.ik_sysv_helper_fileno(watch), READ, deadline_ns, self._what("recv"))
        finally:
            ffi.release(watch)

    def peek(self, index: int = 0) -> Message:
        """Copy the message at that place in the queue, 0 the oldest; it stays. Never blocks.

        Raises: OSError ENOMSG past the end; ENOSYS where the kernel can't (Linux with
            CONFIG_CHECKPOINT_RESTORE only). See MSG_COPY in msgrcv(2).
        """
        index = integer(index, "index", 0, LONG_MAX)
        block = self._spare()
        while (size := lib.ik_sysv_queue_peek(block[0], index)) == -errno.E2BIG:
            block = self._block(2 * block[0].room)
        if size == -errno.ENOMSG:
            raise OSError(errno.ENOMSG, f"no message at index {index}", self._what("peek"))
        if size == -errno.ENOSYS:
            raise OSError(errno.ENOSYS, "this kernel has no MSG_COPY", self._what("peek"))
        if size < 0:
            self._fail("peek", size)
        message = Message(block[1][:size], block[0].type)
        self._blocks.append(block)
        return message

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                yield self.recv()
            except OSError as error:
                if error.errno != errno.EIDRM:
                    raise
                return

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            try:
                yield await self.arecv()
            except OSError as error:
                if error.errno != errno.EIDRM:
                    raise
                return

    # --- blocks to receive into: each used by one receive at a time, and kept for the next

    def _block(self, room: int) -> _Block:
        message = ffi.new("ik_sysv_message *", {"queue": self._queue, "room": room, "text": room})
        return message, ffi.buffer(message.text, room)

    def _spare(self) -> _Block:
        with suppress(IndexError):
            return self._blocks.pop()
        return self._block(self._room)

    def _go_on(
        self, rc: int, block: _Block, type: int, all_but: bool, deadline_ns: int
    ) -> tuple[int, _Block]:
        """After a receive that gave no message: again, or raise."""
        while rc < 0:
            if rc == -errno.E2BIG:  # kernel.msgmax was raised since
                block = self._block(2 * block[0].room)
            elif rc != -errno.EINTR:
                self._blocks.append(block)
                self._fail("recv", rc)
            rc = _recv(block[0], type, all_but, deadline_ns)
        return rc, block

    def _within_room(self, room: int, type: int, all_but: bool, deadline_ns: int) -> tuple[int, _Block]:
        """Receive at most *room* bytes: what C returned, and the block."""
        block = self._spare()
        while True:
            message, own = block[0], block[0].room
            message.room = min(own, room)
            try:
                size = _recv(message, type, all_but, deadline_ns)
            finally:
                message.room = own
            if size == -errno.E2BIG and own < room:  # kernel.msgmax was raised since
                block = self._block(2 * own)
            elif size != -errno.EINTR:
                return size, block

    def _too_small(self, size: int, type: int, all_but: bool) -> NoReturn:
        next_size = self._next_size(type, all_but)
        message = "message" if next_size is None else f"message of {next_size} bytes"
        text = f"{message} does not fit into the buffer of {size} bytes and stays"
        raise OSError(errno.EMSGSIZE, text, self._what("recv"))

    def _next_size(self, type: int, all_but: bool) -> int | None:
        """The size of the message that a receive would get now, if the kernel lets us look."""
        found: list[Message] = []
        with suppress(OSError):
            for index in count():
                message = self.peek(index)
                if _wanted(type, all_but, message.type):
                    found.append(message)
                    if type >= 0:
                        break
        return len(min(found, key=lambda message: message.type).data) if found else None

    # --- the descriptor

    def fileno(self) -> int:
        """A descriptor that is readable when a receive by this handle would not block.

        After the queue was removed it stays readable. It is for select, poll, epoll and asyncio; nothing is
        read from it. It stands on a thread, which the first call starts and close() ends: from then on
        this process has several threads, and Python 3.12 and later warn when it forks. A child has no
        such thread, and gets another descriptor by its own call.

        An empty message that comes while the queue is watched is taken out and kept for the next receive by
        this handle; close() puts it back. Another receiver of the queue may be faster: use timeout=0.
        """
        if self._closed:
            raise Closed(f"{self._name} was closed")
        own = self.__dict__
        if "_watch" in own and lib.ik_sysv_helper_fileno(own["_watch"]) < 0:  # the parent's
            del self._watch
        if "_watch" not in own:
            own.setdefault("_watch", self._watcher("fileno", 0, False))
        return lib.ik_sysv_helper_fileno(self._watch)  # type: ignore[no-any-return]

    def _watcher(self, verb: str, type: int, all_but: bool) -> Any:
        """A thread that waits for such messages. From then on the handle itself may hold some."""
        self._watched = True
        self._at_once(-1)
        return self._helper(verb, lib.ik_sysv_queue_watch, type, all_but)

    def _helper(self, verb: str, make: Any, *arguments: Any) -> Any:
        error = ffi.new("int *")
        helper = make(self._queue, *arguments, error)
        if not helper:
            self._fail(verb, error[0])
        return ffi.gc(helper, lib.ik_sysv_helper_free)

    # --- the queue itself

    @property
    def id(self) -> int:
        """The queue's id in the kernel, by which from_id() opens it."""
        return self._id

    @property
    def key(self) -> int | None:
        """Its key, signed as C has it; None for a private one."""
        return None if self._key == PRIVATE else self._key

    def stat(self) -> QueueStat:
        """The queue as it is now. An empty message that this handle keeps for a watch isn't in it.

        Raises: PermissionError (EACCES) for who may not read; OSError EIDRM if it was removed.
        """
        info = ffi.new("ik_sysv_queue_info *")
        rc = lib.ik_sysv_queue_stat(self._queue, info)
        if rc < 0:
            self._fail("stat", rc)
        return QueueStat(**{name: getattr(info, name) for name in QueueStat.__dataclass_fields__})

    def set(
        self,
        *,
        max_bytes: int | None = None,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
    ) -> None:
        """Change what is given: how much the queue may hold, its permissions, its owner.

        Raises: PermissionError (EPERM) for who is neither owner, creator nor root, and for max_bytes over
            kernel.msgmnb without CAP_SYS_RESOURCE; ValueError for a bad number; OSError EINVAL where owner or
            group is none of this user namespace. See IPC_SET in msgctl(2).
        """
        who = changes(mode, uid, gid)
        self._change(-1 if max_bytes is None else _check_max_bytes(max_bytes), *who)
        self._member.refresh(birth=str(self._birth()))

    def _change(self, max_bytes: int, mode: int, uid: int, gid: int) -> None:
        rc = lib.ik_sysv_queue_set(self._queue, max_bytes, mode, uid, gid)
        if rc == -errno.EPERM and max_bytes > (limits.value("kernel.msgmnb") or INT_MAX):
            advice = limits.advice("kernel.msgmnb", max_bytes)
            raise PermissionError(errno.EPERM, f"max_bytes of {max_bytes}: {advice}", self._what("set"))
        if rc == -errno.EINVAL:
            check_set(
                rc, lib.ik_sysv_queue_stat(self._queue, ffi.new("ik_sysv_queue_info *")), self._what("set")
            )
        if rc < 0:
            self._fail("set", rc)

    def remove(self) -> None:
        """Remove the queue with all that is in it; every call that waits on it, anywhere, gets EIDRM.

        Also after close(); else the handle stays to be closed.

        Raises: PermissionError (EPERM) for who is neither owner, creator nor root; OSError EIDRM if it was
            removed already. See IPC_RMID in msgctl(2).
        """
        if (rc := lib.ik_sysv_queue_remove(self._id)) < 0:
            self._fail("remove", rc)
        self._member.forget()

    @property
    def closed(self) -> bool:
        """Was close() called here?"""
        return self._closed

    def close(self) -> None:
        """Give up this handle; again does nothing. The queue stays.

        Calls of other threads and tasks that wait on the handle end with Closed before this returns.
        """
        if self._closed:
            return
        self._closed = True
        self._at_once(-1)
        lib.ik_sysv_queue_close(self._queue)
        if self._watch is not None:
            lib.ik_sysv_helper_stop(self._watch)
        self._member.leave()

    # --- errors

    def _what(self, verb: str) -> str:
        return f"{verb} on {self._name}"

    def _fail(self, verb: str, rc: int) -> NoReturn:
        what = self._what(verb)
        if rc == -errno.EBADF:
            raise Closed(f"{self._name} was closed")
        # The id was good, so what the kernel doesn't know any more (EINVAL) was removed.
        if rc in (-errno.EIDRM, -errno.EINVAL):
            raise OSError(errno.EIDRM, "the queue was removed", what)
        if rc == -errno.EAGAIN:
            raise BlockingIOError(errno.EAGAIN, "no real-time signal is free to wait with", what)
        check(rc, what)
        raise AssertionError

    def __enter__(self) -> "MessageQueue":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._closed:
            raise Closed(f"{self._name} was closed")
        return MessageQueue.from_id, (self._id,)

    def __repr__(self) -> str:
        return f"<MessageQueue: {self._name}{', closed' * self._closed}>"
