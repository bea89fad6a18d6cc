# SPDX-License-Identifier: MIT
"""Where the connections of a server come from: TCP, a socket file, or a service manager.

All give listening stream sockets, which any server of ``ipckit.servers`` takes, one or several.
"""

import errno
import fcntl
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from ipckit import wait
from ipckit.errors import check

__all__ = ["UnixListener", "activated", "endpoint", "listen", "listen_unix", "notify"]

_LONGEST_PATH = 107  # bytes in sun_path of unix(7), less the NUL
_LOCK_TIME = 5.0
_FIRST_FD = 3  # SD_LISTEN_FDS_START
_ACTIVATION = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")

_log = logging.getLogger(__name__)


# --- TCP -----------------------------------------------------------------------------------------


def listen(host: str = "127.0.0.1", port: int = 0, *, backlog: int = socket.SOMAXCONN) -> socket.socket:
    """A listening TCP socket, IPv4 or IPv6 as *host* resolves; port 0 lets the kernel choose.

    Raises: OSError EADDRINUSE, EACCES, ...; socket.gaierror for an unknown host. See listen(2).
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _answer_at_once(listener)
        listener.bind(address)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def _answer_at_once(listener: socket.socket) -> None:
    """Inherited by the connections: an answer in two pieces must not wait for an acknowledgement."""
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


# --- a socket file -------------------------------------------------------------------------------


class UnixListener(socket.socket):
    """What listen_unix() gives: a socket whose ``close()`` also removes its file.

    Only in the process that made it, and only if the file is still its own and not one that
    somebody put in its place. ``detach()`` and ``dup()`` leave the file alone.
    """

    _file: "tuple[str, int, tuple[int, int]] | None" = None  # path, its maker, what _birth() says

    def close(self) -> None:
        """Remove the file, stop listening; again does nothing."""
        file, self._file = self._file, None
        if file is not None:
            path, maker, birth = file
            # Before it is closed: while it is bound, nobody replaces the file between look and unlink.
            with suppress(OSError):
                if maker == os.getpid() and _birth(path) == birth:
                    os.unlink(path)
        super().close()


def listen_unix(
    path: "str | bytes | os.PathLike[Any]", *, mode: int = 0o600, backlog: int = socket.SOMAXCONN
) -> UnixListener:
    """A listening AF_UNIX stream socket at *path*, whose file goes when it is closed.

    A file that a dead server of this user left is replaced; of several servers that start at a time
    exactly one does. Blocks only for that, at most 5 seconds.

    Args: mode: permissions of the file, whatever the umask, and never more; who may write it may
        connect. backlog: see listen(2).
    Raises: OSError EADDRINUSE if somebody has a socket there; EEXIST for anything else there, a link or a
        socket file with several names; EPERM if what is there belongs to another user; ENAMETOOLONG for
        more than 107 bytes; ENOENT, EACCES for the folder; TimeoutError (ETIMEDOUT) if another process
        holds the lock of the folder; ValueError for an empty or abstract path, or another mode.
    Fork: a child may accept; only the maker's close() removes the file. See unix(7).
    """
    name = _check_path(path)
    if not 0 <= mode <= 0o777:
        raise ValueError(f"mode must be 0 to 0o777, not {mode:#o}")
    with ExitStack() as undo:
        listener = undo.enter_context(UnixListener(socket.AF_UNIX, socket.SOCK_STREAM))
        os.fchmod(listener.fileno(), mode)  # Linux gives this to the file, less the umask
        _bind(listener, name)
        listener._file = (os.path.abspath(name), os.getpid(), _birth(name))
        _set_mode(name, mode)
        listener.listen(backlog)
        undo.pop_all()
    return listener


def _check_path(path: "str | bytes | os.PathLike[Any]") -> str:
    name = os.fsdecode(path)
    if not name or "\0" in name:
        raise ValueError(f"a socket's path can't be empty, abstract or contain NUL: {name!r}")
    size = len(os.fsencode(name))
    if size > _LONGEST_PATH:
        check(-errno.ENAMETOOLONG, f"{name!r} has {size} bytes, a socket's path at most {_LONGEST_PATH}")
    return name


def _birth(path: str) -> "tuple[int, int]":
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _bind(listener: socket.socket, path: str) -> None:
    if _is_bound(listener, path):
        return
    # bind(2) is exclusive, replacing isn't: of two who found the same dead file the second would remove
    # the file that the first has just made.
    with _locked(os.path.dirname(path) or "."):
        _make_way(path)
        if not _is_bound(listener, path):
            check(-errno.EADDRINUSE, path)


def _is_bound(listener: socket.socket, path: str) -> bool:
    """Bind; False if there is something at *path*."""
    try:
        listener.bind(path)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        check(-(error.errno or 0), path)  # the same, with the path
    return True


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(fd, folder)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # a child forked by another thread has a copy of the descriptor
        os.close(fd)


def _lock(fd: int, folder: str) -> None:
    end = wait.deadline(_LOCK_TIME)
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if wait.remaining(end) == 0:
                check(-errno.ETIMEDOUT, f"lock of {folder!r}")
            time.sleep(0.002)


def _make_way(path: str) -> None:
    """Remove a dead socket of ours; refuse anything else, and leave it as it is."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        check(-errno.EEXIST, f"{path!r} is no socket, but {stat.filemode(found.st_mode)}")
    if found.st_uid != os.geteuid():
        check(-errno.EPERM, f"{path!r} belongs to user {found.st_uid}, not to {os.geteuid()}")
    if found.st_nlink != 1:
        check(-errno.EEXIST, f"{path!r} has {found.st_nlink} names")
    if not _is_dead(path):
        check(-errno.EADDRINUSE, path)
    os.unlink(path)


def _is_dead(path: str) -> bool:
    """Whether no process has the socket of this file.

    A datagram socket can't connect to a stream (EPROTOTYPE), so a living server notices nothing of
    this, and one that is bound and doesn't listen yet isn't taken for dead.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED


def _set_mode(path: str, mode: int) -> None:
    """Give back what the umask took. Not through a link that somebody put there meanwhile."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) != mode:
            os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        os.close(fd)


# --- a service manager ---------------------------------------------------------------------------


def activated() -> "list[socket.socket]":
    """The listening sockets that a service manager gave this process, in its order; else an empty list.

    They are meant for us if LISTEN_PID is our process number. The variables LISTEN_PID, LISTEN_FDS and
    LISTEN_FDNAMES are removed in any case, so that no child takes them for its own, and a second call
    gives nothing. The sockets become close-on-exec and blocking. Never blocks.

    Raises: ValueError for a variable that is no number; OSError EBADF, ENOTSOCK, EPROTOTYPE or EINVAL for
        a descriptor that is not open, no socket, not a stream, not listening: then it and those before
        it are closed.
    Threads: call it before there are any. See sd_listen_fds(3).
    """
    given = {name: os.environ.pop(name, "") for name in _ACTIVATION}
    if not given["LISTEN_PID"] or _number("LISTEN_PID", given) != os.getpid():
        return []
    fds = range(_FIRST_FD, _FIRST_FD + _number("LISTEN_FDS", given))
    with ExitStack() as undo:
        found = [undo.enter_context(_taken_over(fd)) for fd in fds]
        undo.pop_all()
    return found


def _number(variable: str, given: "dict[str, str]") -> int:
    text = given[variable]
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{variable} must be a number, not {text!r}")
    return int(text)


def _taken_over(fd: int) -> socket.socket:
    """Descriptor *fd* as a socket, or closed."""
    with ExitStack() as undo:
        if not stat.S_ISSOCK(_fstat(fd).st_mode):
            undo.callback(os.close, fd)
            what = os.readlink(f"/proc/self/fd/{fd}")
            check(-errno.ENOTSOCK, f"descriptor {fd} of LISTEN_FDS: {what}")
        sock = undo.enter_context(socket.socket(fileno=fd))
        if sock.type != socket.SOCK_STREAM:
            check(-errno.EPROTOTYPE, f"descriptor {fd} of LISTEN_FDS: {sock.type.name}, not a stream")
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            check(-errno.EINVAL, f"descriptor {fd} of LISTEN_FDS: a stream socket that does not listen")
        os.set_inheritable(fd, False)
        sock.setblocking(True)
        if sock.proto == socket.IPPROTO_TCP:
            _answer_at_once(sock)
        undo.pop_all()
    return sock


def _fstat(fd: int) -> os.stat_result:
    try:
        return os.fstat(fd)
    except OSError as error:
        check(-(error.errno or 0), f"descriptor {fd} of LISTEN_FDS")
        raise


def notify(state: str, *, timeout: float | None = 5.0) -> bool:
    """Tell the service manager *state*: ``READY=1``, ``STOPPING=1``, ``STATUS=3 connections``, ...

    Several assignments are separated by newlines. With ``RELOADING=1`` the MONOTONIC_USEC that it needs is
    sent too. Blocks while the manager's queue is full, up to *timeout* seconds.

    Returns: whether it was sent; False without NOTIFY_SOCKET. It raises nothing of what may go wrong:
        that is a warning in the log, because a server goes on when its manager doesn't listen.
    Threads and fork: any; a manager may listen to its main process only. See sd_notify(3).
    """
    name = os.environ.get("NOTIFY_SOCKET")
    if not name:
        return False
    if "RELOADING=1" in state.split("\n"):
        state += f"\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"
    try:
        _tell(name, state, timeout)
    except OSError as error:
        _log.warning("%s: the service manager was not told %r: %s", name, state, error)
        return False
    return True


def _tell(name: str, state: str, timeout: float | None) -> None:
    if name[0] not in "/@":
        check(-errno.EAFNOSUPPORT, "neither a path nor an abstract name")
    address = "\0" + name[1:] if name[0] == "@" else name
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(timeout)
        manager.sendto(state.encode(), address)


# --- names ---------------------------------------------------------------------------------------


def endpoint(listener: socket.socket) -> str:
    """Where *listener* listens: ``127.0.0.1:7007``, ``[::1]:7007``, ``unix:/path``, ``unix:@abstract``."""
    address: Any = listener.getsockname()
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    # Abstract names are bytes that begin with NUL. What is not UTF-8 must not break who prints it.
    return "unix:" + os.fsencode(address).decode(errors="backslashreplace").replace("\0", "@", 1)
