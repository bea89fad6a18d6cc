# SPDX-License-Identifier: MIT
"""Sockets beyond ``socket``: time limits per call, urgent data, descriptors, credentials, socket files.

All functions but bind_unix() take a socket object, any object with ``fileno()`` or a plain
descriptor, whether it blocks or not: *timeout* (seconds, ``None`` for ever, ``0`` not at all) alone
rules how long a call waits, and not the object's own time-out or SO_RCVTIMEO. Only MSG_DONTWAIT
makes a call return at once with BlockingIOError.

Every send uses MSG_NOSIGNAL: a gone peer is BrokenPipeError, never SIGPIPE. All calls drop the
GIL, work in any thread and after fork; Python signal handlers run while a call waits (PEP 475).
"""

import errno
import fcntl
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from socket import MSG_DONTROUTE, MSG_DONTWAIT, MSG_OOB, MSG_PEEK, MSG_TRUNC, MSG_WAITALL
from types import FrameType
from typing import Any, ClassVar, NamedTuple

from ipckit import _procfs
from ipckit._arguments import (
    INT_MAX,
    LONG_MAX,
    Buffer,
    Descriptor,
    as_bytes,
    fileno_of,
    integer,
    permissions,
    pin,
)
from ipckit._handles import Rooted
from ipckit._native import ffi, lib
from ipckit._unpatched import os, select, signal, time
from ipckit.errors import Closed, check
from ipckit.wait import NOW, deadline, remaining, until_ready

__all__ = [
    "MAX_FDS",
    "MSG_DONTROUTE",
    "MSG_DONTWAIT",
    "MSG_OOB",
    "MSG_PEEK",
    "MSG_WAITALL",
    "Credentials",
    "SocketFile",
    "UrgentWatcher",
    "at_mark",
    "bind_unix",
    "check_path",
    "get_oobinline",
    "peer_credentials",
    "recv",
    "recv_exact",
    "recv_fds",
    "recv_into",
    "recv_urgent",
    "send",
    "send_all",
    "send_fds",
    "send_urgent",
    "set_oobinline",
]

MAX_FDS: int = lib.IK_SOCKETS_MAX_FDS

_LONGEST_PATH = 107  # bytes in sun_path of unix(7), less the NUL

_uncleared = ffi.new_allocator(should_clear_after_alloc=False)


def _restarted(call: Any, *args: Any) -> int:
    """The result of *call*, made again for as long as a signal interrupts it."""
    while True:
        rc: int = call(*args)
        if rc != -errno.EINTR:
            return rc


def _flags(flags: int) -> int:
    return integer(flags, "flags", -INT_MAX - 1, INT_MAX)


def _size(size: int) -> int:
    return integer(size, "size", 0, LONG_MAX)


def _block(size: int, flags: int = 0) -> Any:
    """Memory for *size* bytes; cleared for MSG_TRUNC, which makes a stream count bytes it doesn't store."""
    return (ffi.new if flags & MSG_TRUNC else _uncleared)("char[]", size)


# --- any socket ----------------------------------------------------------------------------------


def send(sock: Descriptor, data: Buffer, flags: int = 0, *, timeout: float | None = None) -> int:
    """Send *data* by one send(2); block until there is room for it.

    Args: flags: MSG_OOB, MSG_DONTROUTE, MSG_DONTWAIT, ... timeout: seconds.
    Returns: bytes sent; on a stream that may be fewer than given if there is a timeout, if *sock* is
        non-blocking, or after a signal (send_all() goes on).
    Raises: TimeoutError (ETIMEDOUT); BlockingIOError (EAGAIN) for MSG_DONTWAIT; BrokenPipeError
        (EPIPE), ConnectionResetError (ECONNRESET); OSError EMSGSIZE for a too long datagram,
        ENOTCONN, ENOTSOCK, EBADF. See send(2).
    """
    number, flags = fileno_of(sock, "sock"), _flags(flags)
    deadline_ns = deadline(timeout)
    with ExitStack() as pinned:
        view = pin(data, pinned, writable=False)
        size = len(view)
        rc = _restarted(lib.ik_sockets_send, number, view, size, flags, deadline_ns)
    why = _why_too_long(rc, f"a datagram of {size} bytes", "SO_SNDBUF, or the protocol, lets pass")
    return check(rc, f"send on descriptor {number}{why}")


def _why_too_long(rc: int, what: str, limit: str) -> str:
    """For EMSGSIZE, what lifts the limit."""
    return f": {what} is longer than {limit}" if rc == -errno.EMSGSIZE else ""


def send_all(sock: Descriptor, data: Buffer, *, timeout: float | None = None) -> int:
    """Send all of *data*, however many sends that takes; block until the last byte is on its way.

    Returns: the size of *data*, in bytes.
    Raises: as send(), each saying how many bytes went before. See send(2).
    """
    number = fileno_of(sock, "sock")
    deadline_ns = deadline(timeout)
    with ExitStack() as pinned:
        return _send_rest(number, pin(data, pinned, writable=False), 0, deadline_ns, "send_all")


def _send_rest(number: int, view: Any, moved: int, deadline_ns: int, verb: str) -> int:
    size = len(view)
    while moved < size:
        rc = _restarted(lib.ik_sockets_send, number, view + moved, size - moved, 0, deadline_ns)
        moved += check(rc, f"{verb} on descriptor {number}, after {moved} of {size} bytes")
    return size


def recv(sock: Descriptor, size: int, flags: int = 0, *, timeout: float | None = None) -> bytes:
    """Receive at most *size* bytes by one recv(2); block until something is there.

    Args: flags: MSG_PEEK, MSG_WAITALL, MSG_OOB, MSG_DONTWAIT, ... MSG_WAITALL is kept by the kernel
        and only in a call that blocks there: with a timeout or on a non-blocking socket it has no
        effect (recv_exact() does it everywhere). timeout: seconds.
    Returns: what came; ``b""`` at the end of the stream, and for an empty datagram.
    Raises: as recv_into(). See recv(2).
    """
    number, size, flags = fileno_of(sock, "sock"), _size(size), _flags(flags)
    deadline_ns = deadline(timeout)
    memory = _block(size, flags)
    rc = _restarted(lib.ik_sockets_recv, number, memory, size, flags, deadline_ns)
    why = _why_too_long(rc, "the datagram", "size")
    check(rc, f"recv of {size} bytes on descriptor {number}{why}")
    return bytes(ffi.buffer(memory, min(rc, size)))


def recv_into(sock: Descriptor, buffer: Buffer, flags: int = 0, *, timeout: float | None = None) -> int:
    """As recv(), into *buffer*, as many bytes as fit.

    Returns: bytes received (with ``socket.MSG_TRUNC`` a datagram's real length); 0 at the end.
    Raises: TimeoutError (ETIMEDOUT); BlockingIOError (EAGAIN) for MSG_DONTWAIT; OSError EMSGSIZE if a
        datagram was longer and its rest is lost (MSG_PEEK and MSG_TRUNC allow that);
        ConnectionResetError (ECONNRESET); ENOTCONN, ENOTSOCK, EBADF; TypeError if *buffer* is read-only,
        BufferError if it has gaps.
    """
    number, flags = fileno_of(sock, "sock"), _flags(flags)
    deadline_ns = deadline(timeout)
    with ExitStack() as pinned:
        view = pin(buffer, pinned, writable=True, name="buffer")
        rc = _restarted(lib.ik_sockets_recv, number, view, len(view), flags, deadline_ns)
        why = _why_too_long(rc, "the datagram", "the buffer")
        return check(rc, f"recv_into of {len(view)} bytes on descriptor {number}{why}")


def recv_exact(sock: Descriptor, size: int, *, timeout: float | None = None) -> bytes:
    """Receive *size* bytes from a stream; block until the last is there, over signals and urgent marks.

    Raises: EOFError saying how many bytes came before the end of the stream; TimeoutError
        (ETIMEDOUT) and ConnectionResetError (ECONNRESET), likewise: those bytes are lost.
    See recv(2), MSG_WAITALL.
    """
    number, size = fileno_of(sock, "sock"), _size(size)
    deadline_ns = deadline(timeout)
    memory = _block(size)
    moved = 0
    while moved < size:
        left = size - moved
        rc = _restarted(lib.ik_sockets_recv, number, memory + moved, left, MSG_WAITALL, deadline_ns)
        if rc == 0:
            raise EOFError(f"end of stream on descriptor {number} after {moved} of {size} bytes")
        moved += check(rc, f"recv_exact on descriptor {number}, after {moved} of {size} bytes")
    return bytes(ffi.buffer(memory, size))


# --- urgent data ---------------------------------------------------------------------------------


def send_urgent(sock: Descriptor, byte: Buffer, *, timeout: float | None = None) -> None:
    """Send one urgent byte, TCP's only out-of-band data; block until the send buffer has room.

    A receiver has one urgent byte at a time: a second one turns an unread first one into ordinary
    data. Use it to call for attention, and send what must arrive as ordinary data.

    Raises: ValueError unless *byte* is exactly one; as send(); OSError EOPNOTSUPP for datagrams and
        for AF_UNIX streams on a kernel without CONFIG_AF_UNIX_OOB. See tcp(7), send(2) MSG_OOB.
    """
    urgent = as_bytes(byte, "byte")
    if len(urgent) != 1:
        raise ValueError(f"urgent data is exactly one byte, not {len(urgent)}")
    send(sock, urgent, MSG_OOB, timeout=timeout)


def recv_urgent(sock: Descriptor, *, timeout: float | None = None) -> bytes:
    """Take the urgent byte that the peer has announced; block only while the byte itself is on its way.

    It does not wait for an announcement: UrgentWatcher does. An announced byte comes behind the
    ordinary data before it, so with a full receive buffer it comes only when that has been read.

    A byte taken by recv_urgent() before the reads have come to its place is read once more in the stream
    if a newer one is announced meanwhile. Take it inline (set_oobinline, at_mark, one byte) where that
    matters.

    Raises: OSError EINVAL if there is none (never sent, read already, passed by a read, or read in
        the stream because of SO_OOBINLINE); TimeoutError (ETIMEDOUT); EOFError if the stream ended;
        EOPNOTSUPP as send_urgent(). See tcp(7), recv(2) MSG_OOB.
    """
    number = fileno_of(sock, "sock")
    memory = _block(1)
    rc = _restarted(lib.ik_sockets_recv, number, memory, 1, MSG_OOB, deadline(timeout))
    if rc == 0:
        raise EOFError(f"end of stream on descriptor {number} before the urgent byte")
    check(rc, f"recv_urgent on descriptor {number}{_why_none(number) if rc == -errno.EINVAL else ''}")
    return bytes(ffi.buffer(memory, 1))


def _why_none(number: int) -> str:
    if get_oobinline(number):
        return ": SO_OOBINLINE is on, urgent bytes come with the ordinary data"
    return ": no urgent byte is pending (none sent, or it was read or passed already)"


def at_mark(sock: Descriptor) -> bool:
    """Whether the stream is read up to the urgent mark: True between what came before and after it.

    A read never crosses the mark, so a loop of reads that asks after each one finds it.
    Raises: OSError ENOTTY if *sock* has no urgent data at all, EBADF. See sockatmark(3).
    """
    number = fileno_of(sock, "sock")
    return bool(check(lib.ik_sockets_at_mark(number), f"at_mark on descriptor {number}"))


def set_oobinline(sock: Descriptor, inline: bool) -> None:
    """Choose where urgent bytes are read: in the stream, first after the mark (True), or by recv_urgent().

    Off is the default. What counts is the choice at the moment of the read.
    Raises: OSError ENOTSOCK, EBADF. See SO_OOBINLINE in socket(7).
    """
    number = fileno_of(sock, "sock")
    check(lib.ik_sockets_set_oobinline(number, inline), f"set_oobinline on descriptor {number}")


def get_oobinline(sock: Descriptor) -> bool:
    """What set_oobinline() has chosen. Raises: as that."""
    number = fileno_of(sock, "sock")
    return bool(check(lib.ik_sockets_get_oobinline(number), f"get_oobinline on descriptor {number}"))


class UrgentWatcher(Rooted):
    """Notice urgent data on a stream socket: wait for it, poll it, or be called in the middle of anything.

    Without *callback* it uses POLLPRI: wait(), or fileno() in select, poll, epoll and asyncio. It stays
    readable until the urgent byte is taken or passed, and from the moment that the peer shuts down.

    With *callback* it also makes this process the owner of the socket (F_SETOWN) and takes over SIGURG:
    ``callback(sock)`` runs in the main thread as a Python signal handler, once for one or several
    announcements (signals merge), and at once if one is pending. SIGURG comes with the announcement,
    which may be before the byte, and does not name a socket: with SO_OOBINLINE *callback* may be called
    for what came on another watched socket.

    Close it before the socket; close() gives back the owner and, with the last watcher, SIGURG.
    Raises: OSError ENOTTY if *sock* has no urgent data, EBADF; ValueError for a callback outside of the
        main thread.
    Fork: a child can wait(), but SIGURG goes to the process that made the watcher. Threads: any may
        wait(). See SIOCATMARK and SIGURG in tcp(7), F_SETOWN in fcntl(2), poll(2).
    """

    _called: ClassVar[list["UrgentWatcher"]] = []
    _former: ClassVar[Any] = None

    def __init__(self, sock: Descriptor, callback: Callable[[Any], object] | None = None) -> None:
        at_mark(sock)  # refuses what never has urgent data, with the errno that says why
        self._sock = sock
        self._callback = callback
        self._epoll = select.epoll()
        self._epoll.register(fileno_of(sock, "sock"), select.EPOLLPRI | select.EPOLLRDHUP)
        if callback is not None:
            try:
                self._own()
                if self._pending() & select.EPOLLPRI or (self._announced() and not get_oobinline(sock)):
                    callback(sock)
            except BaseException:
                self.close()
                raise

    def _own(self) -> None:
        """Have SIGURG sent here, and handled."""
        if not self._called:
            UrgentWatcher._former = signal.signal(signal.SIGURG, _call_watchers)
        self._called.append(self)
        self._pid = os.getpid()
        self._former_owner = fcntl.fcntl(fileno_of(self._sock), fcntl.F_GETOWN)
        fcntl.fcntl(fileno_of(self._sock), fcntl.F_SETOWN, self._pid)

    def _disown(self) -> None:
        if len(self._called) == 1:
            signal.signal(signal.SIGURG, self._former or signal.SIG_DFL)
        self._called.remove(self)
        if self._pid == os.getpid():  # the owner belongs to the description that a parent and a child share
            with suppress(OSError, ValueError):  # the socket is closed already
                fcntl.fcntl(fileno_of(self._sock), fcntl.F_SETOWN, self._former_owner)

    def _announced(self) -> bool:
        """Whether an urgent byte is here or on its way; with SO_OOBINLINE the kernel does not tell."""
        number = fileno_of(self._sock)
        rc = lib.ik_sockets_recv(number, _block(1), 1, MSG_OOB | MSG_PEEK | MSG_DONTWAIT, NOW)
        return rc > 0 or rc == -errno.EAGAIN or (rc == -errno.EINVAL and get_oobinline(number))

    def _pending(self) -> int:
        found = self._epoll.poll(0)
        return found[0][1] if found else 0

    def wait(self, timeout: float | None = None) -> None:
        """Block until an urgent byte can be read; returns at once while one is unread.

        Args: timeout: seconds.
        Raises: TimeoutError (ETIMEDOUT); EOFError if none is pending and the peer can send no more; Closed.
        """
        deadline_ns = deadline(timeout)
        what = f"wait for urgent data on descriptor {fileno_of(self._sock)}"
        while True:
            until_ready(self.fileno(), select.POLLIN, deadline_ns, what)
            events = self._pending()
            if events & select.EPOLLPRI:
                return
            if events:
                raise EOFError(f"end of stream while in {what}")

    def fileno(self) -> int:
        """A descriptor to poll for reading. Raises: Closed."""
        if self.closed:
            raise Closed("this UrgentWatcher is closed")
        return self._epoll.fileno()

    @property
    def closed(self) -> bool:
        return self._epoll.closed

    def close(self) -> None:
        """Stop watching; the socket stays open. Closing again does nothing."""
        if self in self._called:
            self._disown()
        self._epoll.close()

    def __enter__(self) -> "UrgentWatcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _call_watchers(_signum: int, _frame: FrameType | None) -> None:
    for watcher in list(UrgentWatcher._called):
        if watcher._callback is not None and watcher._announced():
            watcher._callback(watcher._sock)


# --- descriptors and credentials -----------------------------------------------------------------


def send_fds(
    sock: Descriptor, data: Buffer, fds: Iterable[Descriptor], *, timeout: float | None = None
) -> int:
    """Send *data* and duplicates of *fds* over an AF_UNIX socket; block until all of *data* is sent.

    Args: data: at least one byte on a stream. fds: at most MAX_FDS (253). timeout: seconds.
    Returns: the size of *data*, in bytes.
    Raises: ValueError for too many descriptors, or a stream and no data; OSError EBADF if one of them
        (or *sock*) is closed, and then nothing is sent; ETOOMANYREFS if too many are on their way
        (RLIMIT_NOFILE of the user); EOPNOTSUPP if *sock* is not AF_UNIX; as send_all(), and then the
        descriptors have gone if any byte has.
    See SCM_RIGHTS in unix(7), sendmsg(2).
    """
    number = fileno_of(sock, "sock")
    numbers = [fileno_of(fd, "fds") for fd in fds]
    if len(numbers) > MAX_FDS:
        raise ValueError(f"one message carries at most {MAX_FDS} descriptors, not {len(numbers)}")
    deadline_ns = deadline(timeout)
    with ExitStack() as pinned:
        view = pin(data, pinned, writable=False)
        call = lib.ik_sockets_send_fds
        rc = _restarted(call, number, view, len(view), numbers, len(numbers), deadline_ns)
        if rc == -errno.EINVAL and len(view) == 0:
            raise ValueError(f"a stream carries descriptors with data only, and there is none for {number}")
        check(rc, f"send_fds of descriptors {numbers} on descriptor {number}")
        return _send_rest(number, view, rc, deadline_ns, "send_fds")


def recv_fds(
    sock: Descriptor, size: int, max_fds: int, *, timeout: float | None = None
) -> tuple[bytes, list[int]]:
    """Receive at most *size* bytes and the descriptors that came with them; block until there are some.

    A stream gives descriptors with the first read that takes a byte they were sent with, whichever call
    that is: recv() of those bytes closes them. What options of the socket add (SO_PASSCRED, SO_PASSSEC,
    SO_PASSPIDFD) is dropped, and the pidfd closed.

    Args: max_fds: 0 to MAX_FDS (253). timeout: seconds.
    Returns: the data, and new descriptors, close-on-exec and owned by the caller; ``(b"", [])`` at the
        end of the stream.
    Raises: OSError EMSGSIZE if more descriptors came than *max_fds* or a datagram longer than *size*,
        EMFILE if this process may not open so many: in each case the data is lost and all descriptors
        that came are closed; as recv_into().
    See SCM_RIGHTS in unix(7), recvmsg(2) MSG_CTRUNC.
    """
    number, size, max_fds = fileno_of(sock, "sock"), _size(size), integer(max_fds, "max_fds", 0, MAX_FDS)
    deadline_ns = deadline(timeout)
    memory, came = _block(size), ffi.new("ik_sockets_fds *")
    rc = _restarted(lib.ik_sockets_recv_fds, number, memory, size, came, max_fds, deadline_ns)
    why = _why_too_long(rc, "what came", "size, or max_fds")
    check(rc, f"recv_fds of {size} bytes and {max_fds} descriptors on descriptor {number}{why}")
    return bytes(ffi.buffer(memory, rc)), list(came.fd[0 : came.count])


class Credentials(NamedTuple):
    """Process, user and group at the other end, as the kernel saw them when the connection was made."""

    pid: int
    uid: int
    gid: int


def peer_credentials(sock: Descriptor) -> Credentials:
    """Who connected, listened or called socketpair() at the other end of an AF_UNIX socket.

    The peer can't forge it. But the socket may have been passed on since, and *pid* may be another
    process by now; it is 0 if the peer lives outside of this pid namespace.
    Raises: OSError ENOTCONN if *sock* has no peer or is not AF_UNIX; ENOTSOCK, EBADF.
    See SO_PEERCRED in unix(7).
    """
    number = fileno_of(sock, "sock")
    peer = ffi.new("ik_sockets_peer *")
    check(lib.ik_sockets_peer_credentials(number, peer), f"peer_credentials on descriptor {number}")
    return Credentials(peer.pid, peer.uid, peer.gid)


# --- socket files --------------------------------------------------------------------------------


def check_path(path: "str | bytes | os.PathLike[Any]") -> str:
    """*path* as text, if a socket file can have it.

    Raises: ValueError if it is empty, abstract (anybody may take such a name) or contains NUL; OSError
        ENAMETOOLONG for more than 107 bytes. See unix(7).
    """
    name = os.fsdecode(path)
    if not name or "\0" in name:
        raise ValueError(f"a socket's path can't be empty, abstract or contain NUL: {name!r}")
    size = len(os.fsencode(name))
    if size > _LONGEST_PATH:
        check(-errno.ENAMETOOLONG, f"{name!r} has {size} bytes, a socket's path at most {_LONGEST_PATH}")
    return name


class SocketFile(NamedTuple):
    """What bind_unix() has made: the file that goes when its socket does."""

    path: str
    """absolute, so the process may change its folder"""
    birth: tuple[int, int]
    """device and inode"""
    maker: int
    """the process that bound it"""

    def unlink(self) -> bool:
        """Remove the file, in the process that made it and if it is still that one. Never blocks.

        Call it before the socket is closed: a bound socket keeps its inode from being used again, and
        other bind_unix() from replacing the file, so nothing else can be meant.

        Returns: whether it was removed. Raises nothing: who stops can't do more about it, and what is
            left is replaced by the next bind_unix(). See unlink(2).
        """
        with suppress(OSError):
            if self.maker == os.getpid() and _birth(os.lstat(self.path)) == self.birth:
                os.unlink(self.path)
                return True
        return False


def bind_unix(
    sock: socket.socket,
    path: "str | bytes | os.PathLike[Any]",
    *,
    mode: int = 0o600,
    timeout: float | None = 5.0,
) -> SocketFile:
    """Bind an AF_UNIX socket of any type to *path*; replace what a dead process of this user left there.

    Of several that bind at a time exactly one does. A socket that some process has, listening or not
    yet, is found to be alive without connecting to it. Blocks only while another process of this user
    replaces the same socket, behind the lock of a file beside it, ``.NAME.lock``, which goes afterwards.

    Args: sock: a socket object. mode: permissions of the file, whatever the umask, and never more; who may
        write it may connect. timeout: seconds.
    Returns: the file, to be removed by its ``unlink()`` before *sock* is closed.
    Raises: OSError EADDRINUSE if somebody has a socket there; EEXIST for anything else there, a link or a
        socket file with several names; EPERM if what is there belongs to another user; EACCES if it may
        not be asked (its mode keeps us out), and for the folder; ENOENT; EINVAL if *sock* is bound;
        and likewise EPERM and EEXIST for the file of the lock; TimeoutError (ETIMEDOUT) if that stays
        locked; TypeError if *sock* is not AF_UNIX; ValueError for another mode; as check_path().
    Fork: a child may use the socket, only the maker removes the file. Threads: any. See bind(2), unix(7).
    """
    name = check_path(path)
    mode, until = permissions(mode), deadline(timeout)
    # Not abspath(): the folder before a ".." may be a link.
    place = name if os.path.isabs(name) else os.path.join(os.getcwd(), name)
    os.fchmod(sock.fileno(), mode)  # Linux gives this to the file, less the umask
    if not _is_bound(sock, name):
        _replace(sock, name, until)
    return _made(place, mode)


def _is_bound(sock: socket.socket, path: str) -> bool:
    """Bind; False if there is something at *path*."""
    try:
        sock.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise OSError(error.errno, os.strerror(error.errno or 0), path) from None
        return False
    return True


def _replace(sock: socket.socket, path: str, until: int) -> None:
    # bind(2) is exclusive, replacing isn't: of two who found the same dead file the second would remove
    # the file that the first has just made.
    with _locked(path, until):
        _make_way(path)
        if not _is_bound(sock, path):
            check(-errno.EADDRINUSE, path)


@contextmanager
def _locked(path: str, until: int) -> Iterator[None]:
    """Hold the lock of replacing *path*: a file beside it that no other user can open.

    A lock of the folder is one that whoever may read the folder can keep for ever.
    """
    folder, name = os.path.split(path)
    place = os.path.join(folder, f".{name}.lock")
    fd = _take_lock(place, f"lock of {place!r}, to bind {path!r}", until)
    try:
        yield
    finally:
        # Removed while it is held: those who wait for it see that they have the lock of no name.
        with suppress(OSError):
            os.unlink(place)
        fcntl.flock(fd, fcntl.LOCK_UN)  # a child forked by another thread has a copy of the descriptor
        os.close(fd)


def _take_lock(place: str, what: str, until: int) -> int:
    """A descriptor of the file that has this name when it is locked."""
    while True:
        with ExitStack() as undo:
            fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, fd)
            _check_lock(os.fstat(fd), place)
            os.fchmod(fd, 0o600)  # whatever the umask; the next one must be able to open it
            _lock(fd, what, until)
            with suppress(FileNotFoundError):
                if _birth(os.lstat(place)) == _birth(os.fstat(fd)):
                    undo.pop_all()
                    return fd


def _check_lock(found: os.stat_result, place: str) -> None:
    """Refuse what another user has put there, and a file that is somebody's for another purpose."""
    if found.st_uid != os.geteuid():
        check(-errno.EPERM, f"{place!r} belongs to user {found.st_uid}, not to {os.geteuid()}")
    if not stat.S_ISREG(found.st_mode) or found.st_size or found.st_nlink > 1:
        check(-errno.EEXIST, f"{place!r} is no lock of ours")


def _lock(fd: int, what: str, until: int) -> None:
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if remaining(until) == 0:
                check(-errno.ETIMEDOUT, what)
            time.sleep(0.002)


def _make_way(path: str) -> None:
    """Remove a dead socket of ours; refuse anything else, and leave it as it is."""
    try:
        found = _look(path)
    except FileNotFoundError:
        return
    if found.st_uid != os.geteuid():
        check(-errno.EPERM, f"{path!r} belongs to user {found.st_uid}, not to {os.geteuid()}")
    if found.st_nlink != 1:
        check(-errno.EEXIST, f"{path!r} has {found.st_nlink} names")
    answer = _probe(path)
    if answer != errno.ECONNREFUSED:
        check(-(errno.EACCES if answer == errno.EACCES else errno.EADDRINUSE), path)
    os.unlink(path)


def _look(path: str) -> os.stat_result:
    found = os.lstat(path)
    if not stat.S_ISSOCK(found.st_mode):
        check(-errno.EEXIST, f"{path!r} is no socket, but {stat.filemode(found.st_mode)}")
    return found


def _probe(path: str) -> int:
    """The errno of a connect: ECONNREFUSED if no process has the socket of this file.

    A datagram socket can't connect to a stream or to packets (EPROTOTYPE), so a living server notices
    nothing of this, and one that is bound and doesn't listen yet isn't taken for dead.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path)


def _made(path: str, mode: int) -> SocketFile:
    found = _look(path)
    file = SocketFile(path, _birth(found), os.getpid())
    if stat.S_IMODE(found.st_mode) != mode:
        with ExitStack() as undo:
            undo.callback(file.unlink)
            _set_mode(file, mode)
            undo.pop_all()
    return file


def _set_mode(file: SocketFile, mode: int) -> None:
    """Give back what the umask took; to this file, not to what somebody put there meanwhile."""
    fd = os.open(file.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if _birth(os.fstat(fd)) == file.birth:
            os.chmod(_procfs.path(f"self/fd/{fd}"), mode)
    finally:
        os.close(fd)


def _birth(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
