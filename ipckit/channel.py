# SPDX-License-Identifier: MIT
"""Duplex channels through shared memory: two rings, one each way, and a socket that tells of the peer's life.

``channel()`` gives two ends, for parent and child; ``Listener`` and ``connect()`` make one between strangers,
over a socket file. Messages go through the memory and enter the kernel only to sleep and to wake. What the
kernel is needed for is the peer's death: who is killed closes its socket, and that wakes the other at once.

The ring's promises hold (a message is received once, whole, in order, or not at all), and:

- What a peer that died had sent is received first; then that is PeerDied, in every verb, within milliseconds.
- A peer that closed is EOFError for who receives, after the rest, and BrokenPipeError for who sends.
- Both ends may send at once, whatever the sizes: a send that waits for room takes in what comes.
- A peer, also one of another user that ``peer_uid`` allowed, can spoil its own messages and nothing else:
  there is no lock in the memory, every word of it is read once and checked, and no call outlasts its timeout.

Nothing has a name but the listener's socket file, and nothing outlives its holders.
"""

import errno
import socket
import struct
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, TypeVar

from ipckit import ring, sockets, wait
from ipckit._arguments import INT_MAX, LONG_MAX, Descriptor, as_bytes, integer, user
from ipckit._handles import Rooted, check_starting, finalizer
from ipckit._native import ffi, lib
from ipckit._unpatched import os, select, socketpair, threading, time
from ipckit.errors import Closed, Corrupt, check
from ipckit.memory import SharedMemory
from ipckit.ring import DEFAULT_CAPACITY, DEFAULT_MAX_MESSAGE, RECV, SEND, RingStats

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

__all__ = ["Channel", "ChannelStats", "Listener", "channel", "connect"]

DEFAULT_MAX_INBOX = 256 << 20
HANDSHAKE_TIME = 5.0
"""seconds that a client has for its part of the handshake"""

_VERSION = 1
_MAX_DATA = 1 << 16  # beside descriptors
_SLICE = 0.05  # seconds, after which who waits in the kernel looks whether the object was closed
_SENDING = ("send", "send_many", "asend", "reserve", "send_fds")

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ChannelStats:
    """Numbers of one end; each was true at some moment."""

    sent: RingStats
    """the ring into which this end sends"""
    received: RingStats
    """the ring from which it receives"""
    inbox: int
    """messages that a send has taken in, a part of one among them"""


class _Bells(NamedTuple):
    """Of one end: who waits there polls the first two; who is at the other end rings them."""

    data: int
    room: int
    their_data: int
    their_room: int

    def turned(self) -> "_Bells":
        return _Bells(self.their_data, self.their_room, self.data, self.room)


def _new_bell() -> int:
    """A datagram socket connected to itself.

    Not an eventfd: its O_NONBLOCK is the same for all who have it, so a hostile peer could make us block.
    With a socket each call says for itself that it must not. Nor a socket pair: who has kept a message, or
    left one in the ring, rings its own bell.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as bell:
        bell.bind(b"")  # the kernel finds a name, to which nobody but this socket itself can send
        bell.connect(bell.getsockname())
        bell.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 1
        )  # the least: ringing twice is no more than once
        return bell.detach()


def _new_bells() -> _Bells:
    made: list[int] = []
    try:
        for _ in range(4):
            made.append(_new_bell())
        return _Bells(*made)
    except BaseException:
        _close_all(made)
        raise


def _close_all(fds: "Iterable[int]") -> None:
    for fd in fds:
        os.close(fd)


# --- forking -------------------------------------------------------------------------------------

_channels: "weakref.WeakSet[Channel]" = weakref.WeakSet()


def _count_fork() -> None:
    Channel._forks += 1


def _begin_anew() -> None:
    for each in list(_channels):
        each._joined = False
        each._expect_use()


os.register_at_fork(before=_count_fork, after_in_child=_begin_anew)


# --- one end -------------------------------------------------------------------------------------


class Channel(ring.Ends):
    """One end of a channel. Made by channel(), connect() and Listener.accept().

    close() tells the peer that it is the end once every process that *used* this end has closed it: one that
    only handed it on to a child doesn't count. A process that ends without closing, killed or not, is
    PeerDied.

    Fork: the child has both ends too; each process claim()s the one that it keeps, or the death of the other
    isn't seen. An end is used by one process at a time. Pickle: to children of multiprocessing as they start;
    the parent then closes its handle. Threads: any number take turns.
    """

    _forks: ClassVar[int] = 0  # of this process
    _made_at = -1  # by the count of forks: while that stands, no other process can have this end
    _joined = False  # this process has used it
    _died = False
    _closing = False
    _life = -1
    _limit: int
    _max_inbox: int
    _bells: _Bells
    _either: Any = None
    _peer: "weakref.ref[Channel] | None" = None

    def _use(self, memory: SharedMemory, side: int, bells: _Bells, life: int, what: str) -> None:
        """Take over the descriptors, unless this raises."""
        self._what, self._side = what, side
        half = memory.size // 2
        views = memory.buf[:half], memory.buf[half:]
        ring.attached(self._attach(views[side], views[1 - side], self._limit), what)
        if self._ring(SEND).flags or self._ring(RECV).flags:
            self._shut_down()
            raise Corrupt(f"{what}: the rings have locks, which a peer could misuse")
        self._set_bells(*bells, life)
        self._set_inbox(self._max_inbox, deque())
        self._memory, self._bells, self._life = memory, bells, life
        self._expect_use()
        self._made_at = self._forks
        _channels.add(self)

    @classmethod
    def _make(
        cls,
        memory: SharedMemory,
        side: int,
        bells: _Bells,
        life: int,
        limits: "tuple[int, int]",
        what: str,
    ) -> "Self":
        self = cls.__new__(cls)
        self._limit, self._max_inbox = limits
        self._use(memory, side, bells, life, what)
        return self

    # --- who uses this end

    def _join(self) -> None:
        if not self._joined:
            self._joined = True
            lib.ik_ring_join(self._ring(SEND), SEND)
            lib.ik_ring_join(self._ring(RECV), RECV)

    def claim(self) -> "Self":
        """Close the other end in this process, and return this one. For after a fork.

        As long as any process has the other end open, its death is not seen; pipes call this keep().
        Raises: Closed.
        """
        peer = self._peer() if self._peer else None
        if peer is not None:
            peer._close(False)
        self._ring(SEND)
        self._join()
        return self

    def close(self) -> None:
        """Close this end in this process; again does nothing.

        If no other process uses it, the peer finds the end of the stream after what was sent. What other
        threads are doing with it ends with Closed, within 100 ms.
        """
        self._close(True)

    def _close(self, for_good: bool) -> None:
        self._closing = True
        if not self.closed and (self._joined or (self._made_at == self._forks and for_good)):
            self._join()
            for side in (RECV, SEND):
                lib.ik_ring_part(self._ring(side), side, for_good)
        self._shut_down()
        self._memory = None  # which the other end may share
        either, self._either = self._either, None
        if either is not None:
            either.close()

    def close_write(self) -> None:
        """Send nothing more: the peer finds the end of the stream after what was sent. See shutdown(2).

        Raises: Closed.
        """
        lib.ik_ring_shut(self._ring(SEND), SEND)

    __del__ = finalizer(close)

    # --- what ends

    def _fail(self, rc: int, verb: str, size: int, limit: int) -> NoReturn:
        side = SEND if verb in _SENDING else RECV
        if self._closing:  # by another thread, at this moment
            rc = -errno.EBADF
        elif rc == -errno.ETIMEDOUT and lib.ik_ring_is_deserted(self._ring(side), side):
            rc = -errno.ECONNRESET
        if rc == -errno.ECONNRESET and not self._died:
            self._died = True
            lib.ik_ring_shut(self._ring(SEND), RECV)  # so that sends fail without waiting for room
        elif rc == -errno.EPIPE and self._died:
            rc = -errno.ECONNRESET
        super()._fail(rc, verb, size, limit)

    # --- waiting elsewhere

    def fileno(self) -> int:
        """For select, poll, epoll and asyncio: readable when a receive would not block, or the peer is dead.

        From the first call on each receive costs a system call more. See epoll(7). Raises: Closed.
        """
        bell = super().fileno()
        if self._either is None:
            self._either = self._poll_for(bell)
        number: int = self._either.fileno()
        return number

    def _poll_for(self, *bells: int) -> Any:
        """An epoll object of the bells and the peer's life."""
        poll = select.epoll()
        for bell in bells:
            poll.register(bell, select.EPOLLIN)
        poll.register(self._life, select.EPOLLRDHUP)
        return poll

    async def _rung(self, bell: int, end: int, verb: str) -> None:
        bells = [bell]
        if verb == "asend":
            took = self._take_in()
            if took > 0 or (took == 0 and self._listen(RECV)):  # there may be more, or room by now
                self._check_time(end, verb)
                import asyncio  # here: it is large, and most programs never come here

                return await asyncio.sleep(0)
            if took == 0:
                bells.append(self._bell(RECV))
        with self._poll_for(*bells) as poll:
            await super()._rung(poll.fileno(), end, verb)
        side = SEND if verb == "asend" else RECV
        if lib.ik_ring_is_deserted(self._ring(side), side):
            self._fail(-errno.ECONNRESET, verb, 0, 0)

    # --- descriptors

    def send_fds(
        self, fds: "Iterable[Descriptor]", data: "Buffer" = b"", *, timeout: "float | None" = None
    ) -> None:
        """Send duplicates of *fds*, and a little *data* with them; block while there is no room.

        They go past the messages, and are received in their own order by recv_fds().

        Args: fds: at most 253. data: at most 64 KiB. timeout: seconds.
        Raises: ValueError for too many; OSError EMSGSIZE for more data, EBADF for a closed descriptor;
            TimeoutError (ETIMEDOUT); BrokenPipeError (EPIPE) if the peer has closed; PeerDied; Closed.
        See SCM_RIGHTS in unix(7).
        """
        block = b"." + as_bytes(data)  # not nothing, which is the end
        if len(block) > _MAX_DATA + 1:
            self._fail(-errno.EMSGSIZE, "send_fds", len(block) - 1, _MAX_DATA)
        numbers = [*fds]
        self._on_life(
            lambda life, left: sockets.send_fds(life, block, numbers, timeout=left), "send_fds", timeout
        )

    def recv_fds(self, max_fds: int, *, timeout: "float | None" = None) -> "tuple[bytes, list[int]]":
        """Receive descriptors and the data that were sent with one send_fds(); block until there are some.

        Args: max_fds: 0 to 253. timeout: seconds.
        Returns: the data, and new descriptors, close-on-exec and owned by the caller.
        Raises: OSError EMSGSIZE if more came than *max_fds*, EMFILE: all that came are closed; TimeoutError
            (ETIMEDOUT); EOFError if the peer has closed; PeerDied; Corrupt; Closed.
        """

        def receive(life: int, left: "float | None") -> "tuple[bytes, list[int]]":
            return sockets.recv_fds(life, _MAX_DATA + 1, max_fds, timeout=left)

        data, fds = self._on_life(receive, "recv_fds", timeout)
        if data[:1] == b".":
            return data[1:], fds
        _close_all(fds)
        if data:
            raise Corrupt(f"recv_fds on {self._what}: {len(data)} bytes that no channel sends")
        self._gone("recv_fds", -errno.ENODATA)

    def _on_life(
        self, call: "Callable[[int, float | None], _Result]", verb: str, timeout: "float | None"
    ) -> _Result:
        """The result of *call* on a duplicate, so that another thread may close this end meanwhile."""
        end = wait.deadline(timeout)
        self._ring(SEND)
        life = os.dup(self._life)
        try:
            while True:
                left = wait.remaining(end)
                try:
                    return call(life, _SLICE if left is None else min(left, _SLICE))
                except TimeoutError:
                    self._ring(SEND)
                    if wait.remaining(end) == 0:
                        self._fail(-errno.ETIMEDOUT, verb, 0, 0)
                except BrokenPipeError:
                    self._gone(verb, -errno.EPIPE)
                except ConnectionResetError:  # told once, when the peer ended with something unread
                    continue
        finally:
            os.close(life)

    def _gone(self, verb: str, rc: int) -> NoReturn:
        """The peer closed, or died."""
        stats = ffi.new("ik_ring_stats *")
        lib.ik_ring_get_stats(self._ring(SEND), stats)
        closed = stats.closed[RECV] and not self._died
        self._fail(rc if closed else -errno.ECONNRESET, verb, 0, 0)

    def _limit_of(self, verb: str, limit: int) -> str:
        if verb == "send_fds":
            return "which go beside descriptors; send() takes more"
        return super()._limit_of(verb, limit)

    # --- the rest

    @property
    def peer(self) -> sockets.Credentials:
        """Process, user and group that made the other end, as the kernel saw them. Raises: Closed."""
        self._ring(SEND)
        return sockets.peer_credentials(self._life)

    def stats(self) -> ChannelStats:
        """What is in the rings now, and what went through. Raises: Closed."""
        sent, received = ring.ring_stats(self._ring(SEND)), ring.ring_stats(self._ring(RECV))
        return ChannelStats(sent, received, self._inbox())

    def __reduce__(self) -> "tuple[Any, ...]":
        self._ring(SEND)
        check_starting(f"{type(self).__name__}: {self._what}")
        if self._inbox():
            raise ValueError(
                f"{self._what}: {self._inbox()} received messages would stay behind in this process"
            )
        fds = [ring.sendable(fd) for fd in (*self._bells, self._life)]
        self._made_at = -1
        return _inherited, (self._memory, self._side, fds, (self._limit, self._max_inbox), self._what)


def _inherited(
    memory: SharedMemory, side: int, duplicates: "list[Any]", limits: "tuple[int, int]", what: str
) -> Channel:
    *bells, life = (ring.received(duplicate) for duplicate in duplicates)
    return Channel._make(memory, side, _Bells(*bells), life, limits, what).claim()


# --- making both ends ----------------------------------------------------------------------------


def _limits(max_message: int, max_inbox: int) -> "tuple[int, int]":
    return ring.check_limit(max_message), integer(max_inbox, "max_inbox", 0, LONG_MAX)


def _new_memory(capacity: int) -> SharedMemory:
    """Two empty rings."""
    size = ring.memory_size(capacity)
    memory = SharedMemory(2 * size)
    for start in (0, size):
        ring.make(memory.buf[start : start + size], False, False)
    return memory


def channel(
    capacity: int = DEFAULT_CAPACITY,
    *,
    max_message: int = DEFAULT_MAX_MESSAGE,
    max_inbox: int = DEFAULT_MAX_INBOX,
) -> "tuple[Channel, Channel]":
    """Two ends of a channel, for this process and a child: both send and receive.

    Args: capacity: bytes of the ring each way, rounded up to a power of two; of them each message takes its
        own, rounded up to 8, and 8. max_message: bytes; larger ones are refused. max_inbox: bytes of
        messages that a send takes in while it waits for room; 0 for none.
    Raises: ValueError for sizes out of range; OSError ENOMEM, EMFILE, ENFILE.
    Fork: each process claim()s the end that it keeps.
    """
    limits = _limits(max_message, max_inbox)
    what = f"channel of {ring.memory_size(capacity) - lib.IK_RING_HEADER} bytes"
    with ExitStack() as undo:
        memory = _new_memory(capacity)
        bells = _new_bells()
        undo.callback(_close_all, bells)
        lives = [life.detach() for life in socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
        undo.callback(_close_all, lives)
        again = _Bells(*_duplicates(bells))
        undo.callback(_close_all, again)
        left = Channel._make(memory, 0, bells, lives[0], limits, what)
        right = Channel._make(memory, 1, again.turned(), lives[1], limits, what)
        undo.pop_all()
    left._peer, right._peer = weakref.ref(right), weakref.ref(left)
    return left, right


def _duplicates(fds: "Iterable[int]") -> "list[int]":
    made: list[int] = []
    try:
        for fd in fds:
            made.append(os.dup(fd))
        return made
    except BaseException:
        _close_all(made)
        raise


# --- the handshake -------------------------------------------------------------------------------
#
# Client: its version, and the largest message that it takes. Listener: the same of its own, the capacity,
# and with them the memory and the client's bells. Each is one packet, so that nothing comes in part. The
# listener makes the memory, because it makes the rules: what a stranger made it need not map, and before it
# knows who the client is it gives nothing away.

_PACKET = struct.Struct("=8sIIQQ")  # magic, version, 0, capacity, max_message
_MAGIC = b"ikchan\r\n"
_LONGEST = 64
_FDS = 5


def _packet(capacity: int, max_message: int) -> bytes:
    return _PACKET.pack(_MAGIC, _VERSION, 0, capacity, max_message)


def _parsed(data: bytes, what: str) -> "tuple[int, int]":
    """Capacity and largest message. Raises: Corrupt; OSError EPROTONOSUPPORT for another version."""
    if len(data) < 12 or data[:8] != _MAGIC:
        raise Corrupt(f"{what}: {len(data)} bytes that begin no handshake")
    (version,) = struct.unpack_from("=I", data, 8)
    if version != _VERSION:
        check(-errno.EPROTONOSUPPORT, f"{what}: version {version}, not {_VERSION}")
    if len(data) != _PACKET.size:
        raise Corrupt(f"{what}: {len(data)} bytes, not {_PACKET.size}")
    _, _, _, capacity, max_message = _PACKET.unpack(data)
    if not 0 < max_message < 1 << 40:
        raise Corrupt(f"{what}: max_message {max_message}")
    return capacity, max_message


def _is_allowed(found: int, peer_uid: "int | None") -> bool:
    return found == (os.geteuid() if peer_uid is None else peer_uid)


# --- listening -----------------------------------------------------------------------------------


class Listener(Rooted):
    """A socket file at which other processes connect() to channels of their own.

    A file that is left of a listener that is gone is replaced; anything else that has the name is left alone.
    close() removes the file, if it is still this listener's and this process made it.

    Args: path: of the socket file. mode: its permissions, from the beginning and whatever
        the umask; who may write to it may connect. peer_uid: the user whose processes are let in; None:
        this process's own.
        capacity, max_message, max_inbox: as of channel(); the smaller max_message of both sides counts.
        backlog: how many clients may wait to be accepted, and how many may be silent.
    Raises: as ipckit.sockets.bind_unix(): ValueError for an abstract or empty path, or sizes out of range;
        OSError EADDRINUSE if somebody has a socket there, FileExistsError (EEXIST) for anything else there,
        PermissionError (EPERM) for another user's; ENAMETOOLONG beyond 107 bytes, ENOENT, EACCES;
        TimeoutError (ETIMEDOUT) if the folder was locked for 5 s.
    Fork: the child may accept too. Threads: take turns. See unix(7).
    """

    refused = 0
    """clients that were turned away: of a wrong user, silent, or babbling"""

    _sock: "socket.socket | None" = None
    _pid = -1

    def __init__(
        self,
        path: "str | bytes | os.PathLike[Any]",
        *,
        mode: int = 0o600,
        peer_uid: "int | None" = None,
        capacity: int = DEFAULT_CAPACITY,
        max_message: int = DEFAULT_MAX_MESSAGE,
        max_inbox: int = DEFAULT_MAX_INBOX,
        backlog: int = 128,
    ) -> None:
        self.path = sockets.check_path(path)
        self._limits = _limits(max_message, max_inbox)
        self._capacity = ring.memory_size(capacity) - lib.IK_RING_HEADER
        self._peer_uid, self._backlog = user(peer_uid, "peer_uid"), integer(backlog, "backlog", 1, INT_MAX)
        self._begin()
        try:
            self._sock, self._file = _bound(self.path, mode, self._backlog)
            self._watch()
        except BaseException:
            self.close()
            self._forget()
            raise

    def _begin(self) -> None:
        """What each process has of its own."""
        self._turn = threading.Lock()
        self._silent: dict[int, tuple[socket.socket, float]] = {}  # and until when they may be
        self._poll = select.epoll()

    def _watch(self) -> None:
        self._poll.register(self._listening(), select.EPOLLIN)
        self._pid = os.getpid()

    def _listening(self) -> socket.socket:
        sock = self._sock
        if sock is None:
            raise Closed(f"listener at {self.path!r} is closed")
        return sock

    def _drop_parents(self) -> None:
        """After a fork: those that the parent is talking to are the parent's."""
        if self._pid != os.getpid():
            self._forget()
            self._begin()
            self._watch()

    def _forget(self) -> None:
        self._poll.close()
        for sock, _ in self._silent.values():
            sock.close()

    def accept(self, *, timeout: "float | None" = None) -> Channel:
        """A channel to the next client that finished the handshake; block until there is one.

        Clients of another user are turned away before a byte of theirs is read. A client has 5 s for its
        part, and meanwhile others are accepted.

        Args: timeout: seconds.
        Raises: TimeoutError (ETIMEDOUT); OSError EMFILE, ENFILE, ENOMEM if there is nothing to make a channel
            of, and then the client was turned away; Closed, within 100 ms, if another thread closes.
        See accept(2), SO_PEERCRED in unix(7).
        """
        end = wait.deadline(timeout)
        self._listening()
        self._drop_parents()
        left = wait.remaining(end)
        if not self._turn.acquire(timeout=-1 if left is None else left):
            check(-errno.ETIMEDOUT, f"accept at {self.path!r}")
        try:
            return self._accept(end)
        finally:
            self._turn.release()

    async def aaccept(self, *, timeout: "float | None" = None) -> Channel:
        """As accept(), for asyncio: only the calling task waits."""
        end = wait.deadline(timeout)
        while True:
            try:
                return self.accept(timeout=0)
            except TimeoutError:
                await wait.ready(self.fileno(), wait.READ, end, f"accept at {self.path!r}")

    def _accept(self, end: int) -> Channel:
        turn = 0
        while True:
            turn += 1
            sock = self._listening()
            left = wait.remaining(end)
            events = self._poll.poll(_SLICE if left is None else min(left, _SLICE))
            self._listening()
            for fd, _ in events:
                if fd == sock.fileno():
                    self._greet(sock)
                elif (made := self._answer(fd)) is not None:
                    return made
            self._drop_late()
            # Without time to wait, what is there is looked at a few times: for who comes, and what it says.
            if wait.remaining(end) == 0 and (turn > 8 or not events):
                check(-errno.ETIMEDOUT, f"accept at {self.path!r}")

    def _greet(self, sock: socket.socket) -> None:
        """Let a client in, if it may come in."""
        try:
            client, _ = sock.accept()
        except BlockingIOError:
            return  # another process was faster, or the client thought better of it
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._silent:
                raise OSError(
                    error.errno, os.strerror(error.errno or 0), f"accept at {self.path!r}"
                ) from None
            return self._turn_away(next(iter(self._silent)))
        client.setblocking(False)
        if not _is_allowed(sockets.peer_credentials(client).uid, self._peer_uid):
            self.refused += 1
            return client.close()
        if len(self._silent) >= self._backlog:
            self._turn_away(next(iter(self._silent)))
        self._silent[client.fileno()] = client, time.monotonic() + HANDSHAKE_TIME
        self._poll.register(client, select.EPOLLIN)

    def _drop_late(self) -> None:
        now = time.monotonic()
        while self._silent:
            fd, (_, until) = next(iter(self._silent.items()))
            if until > now:
                return
            self._turn_away(fd)

    def _turn_away(self, fd: int) -> None:
        self._silent.pop(fd)[0].close()
        self.refused += 1

    def _answer(self, fd: int) -> "Channel | None":
        """The client has said something, or gone: a channel to it, or None."""
        client, _ = self._silent.pop(fd)
        self._poll.unregister(client)
        with client:
            try:
                data, _ = sockets.recv_fds(client, _LONGEST, 0, timeout=0)
                _, max_message = _parsed(data, f"client at {self.path!r}")
            except (OSError, Corrupt) as error:
                self.refused += 1
                if isinstance(error, OSError) and error.errno == errno.EPROTONOSUPPORT:
                    self._tell(client, [], 1)
                return None
            return self._serve(client, max_message)

    def _tell(self, client: "Descriptor", fds: "list[int]", max_message: int) -> bool:
        with suppress(OSError):
            sockets.send_fds(client, _packet(self._capacity, max_message), fds, timeout=0)
            return True
        return False

    def _serve(self, client: socket.socket, max_message: int) -> "Channel | None":
        limits = min(max_message, self._limits[0]), self._limits[1]
        memory = _new_memory(self._capacity)
        with ExitStack() as undo:
            bells = _new_bells()
            undo.callback(_close_all, bells)
            what = f"channel of {self._capacity} bytes to a client at {self.path!r}"
            # Before the client can write into the memory.
            end = Channel._make(memory, 0, bells, client.fileno(), limits, what)
            undo.pop_all()
        if not self._tell(client.detach(), [memory.fileno(), *bells.turned()], limits[0]):
            self.refused += 1
            end.close()
            return None
        return end.claim()

    def fileno(self) -> int:
        """For select, poll, epoll and asyncio: readable when accept(timeout=0) has something to look at.

        That may be a client that has not finished the handshake, or won't: then it is a TimeoutError.
        Raises: Closed.
        """
        self._listening()
        self._drop_parents()
        return self._poll.fileno()

    @property
    def closed(self) -> bool:
        return self._sock is None

    def close(self) -> None:
        """Stop listening, and remove the socket file; again does nothing. Channels stay."""
        sock, self._sock = self._sock, None
        if sock is None:
            return
        self._turn.acquire(timeout=4 * _SLICE)  # a thread that accepts notices, unless it is this one
        with sock:
            self._file.unlink()
            self._forget()

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    __del__ = finalizer(close)

    def __repr__(self) -> str:
        return f"<Listener at {self.path!r}{', closed' if self.closed else ''}>"


def _bound(path: str, mode: int, backlog: int) -> "tuple[socket.socket, sockets.SocketFile]":
    with ExitStack() as undo:
        sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        sock.setblocking(False)
        file = sockets.bind_unix(sock, path, mode=mode)
        undo.callback(file.unlink)
        sock.listen(backlog)
        undo.pop_all()
    return sock, file


# --- connecting ----------------------------------------------------------------------------------


def connect(
    path: "str | bytes | os.PathLike[Any]",
    *,
    timeout: "float | None" = None,
    max_message: int = DEFAULT_MAX_MESSAGE,
    max_inbox: int = DEFAULT_MAX_INBOX,
    peer_uid: "int | None" = None,
) -> Channel:
    """A channel to the Listener at *path*; block until it accepts.

    Args: timeout: seconds for all of it. peer_uid: the user who must listen there; None: this process's own.
        max_message, max_inbox: as of channel(); the smaller max_message of both sides counts.
    Raises: FileNotFoundError (ENOENT); ConnectionRefusedError (ECONNREFUSED) if nobody listens, or the
        listener doesn't let this user in; PermissionError (EACCES by the file's mode, EPERM if another user
        listens); OSError EPROTONOSUPPORT for another version of ipckit, EPROTOTYPE for another kind of
        socket; TimeoutError (ETIMEDOUT); Corrupt for what no Listener sends; ValueError for an abstract or
        empty path, or a size out of range.
    See connect(2), unix(7).
    """
    limits, name, until = _limits(max_message, max_inbox), sockets.check_path(path), wait.deadline(timeout)
    peer_uid = user(peer_uid, "peer_uid")
    what = f"connect to {name!r}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.setblocking(False)
        _reach(sock, name, until, what)
        uid = sockets.peer_credentials(sock).uid
        if not _is_allowed(uid, peer_uid):
            check(-errno.EPERM, f"{what}: user {uid} listens there")
        data, fds = _shake_hands(sock, limits[0], until, what)
        with ExitStack() as undo:
            undo.callback(_close_all, fds)
            capacity, agreed = _parsed(data, what)
            if len(fds) != _FDS:
                raise Corrupt(f"{what}: {len(fds)} descriptors, not {_FDS}")
            memory = _examined(fds.pop(0), capacity, what)
            for fd in fds:
                _examine_bell(fd, what)
            limits = min(agreed, limits[0]), limits[1]
            end = _attached(
                memory, _Bells(*fds), sock.fileno(), limits, f"channel of {capacity} bytes to {name!r}"
            )
            undo.pop_all()
        sock.detach()
    return end.claim()


def _reach(sock: socket.socket, path: str, end: int, what: str) -> None:
    while True:
        try:
            return sock.connect(path)
        except BlockingIOError:  # the backlog is full, which can't be waited for
            if wait.remaining(end) == 0:
                check(-errno.ETIMEDOUT, f"{what}: nobody accepts, and no more may wait for that")
            time.sleep(0.002)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), path) from None


def _shake_hands(sock: socket.socket, max_message: int, end: int, what: str) -> "tuple[bytes, list[int]]":
    try:
        sockets.send_fds(sock, _packet(0, max_message), [], timeout=wait.remaining(end))
        data, fds = sockets.recv_fds(sock, _LONGEST, _FDS, timeout=wait.remaining(end))
    except (BrokenPipeError, ConnectionResetError):
        data, fds = b"", []
    except TimeoutError:
        check(-errno.ETIMEDOUT, f"{what}: nobody accepted")
    except OSError as error:
        if error.errno == errno.EMSGSIZE:
            raise Corrupt(f"{what}: more came than a handshake") from None
        raise OSError(error.errno, os.strerror(error.errno or 0), what) from None
    if not data:
        _close_all(fds)
        check(-errno.ECONNREFUSED, f"{what}: the listener turned us away")
    return data, fds


def _examined(fd: int, capacity: int, what: str) -> SharedMemory:
    """The memory, which is what it should be."""
    try:
        size = ring.memory_size(capacity)
        if size - lib.IK_RING_HEADER != capacity:
            raise ValueError(f"{capacity} is no capacity of a ring")
    except ValueError as error:
        os.close(fd)
        raise Corrupt(f"{what}: {error}") from None
    try:
        return SharedMemory.from_fd(fd, size=2 * size)
    except ValueError as error:
        raise Corrupt(f"{what}: {error}") from None


def _examine_bell(fd: int, what: str) -> None:
    try:
        bell = socket.socket(fileno=fd)
    except OSError:
        raise Corrupt(f"{what}: descriptor {fd} is no bell") from None
    kind = bell.family, bell.type
    bell.detach()
    if kind != (socket.AF_UNIX, socket.SOCK_DGRAM):
        raise Corrupt(f"{what}: descriptor {fd} is no bell, but a socket of {kind[0]!r}, {kind[1]!r}")


def _attached(
    memory: SharedMemory, bells: _Bells, life: int, limits: "tuple[int, int]", what: str
) -> Channel:
    try:
        return Channel._make(memory, 1, bells, life, limits, what)
    except BlockingIOError:
        raise Corrupt(f"{what}: the memory holds no ring") from None
