# SPDX-License-Identifier: MIT
"""Where the connections of a server come from: TCP, a socket file, or a service manager.

All give listening stream sockets, which any server of ``ipckit.servers`` takes, one or several.
"""

import errno
import logging
import math
import socket
import stat
from contextlib import ExitStack, suppress
from typing import Any

from ipckit import _procfs
from ipckit._arguments import INT_MAX, integer, seconds
from ipckit._unpatched import os, time
from ipckit.errors import check
from ipckit.sockets import SocketFile, bind_unix

__all__ = ["UnixListener", "activated", "endpoint", "listen", "listen_unix", "notify"]

_FIRST_FD = 3  # SD_LISTEN_FDS_START
_ACTIVATION = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")

_log = logging.getLogger(__name__)


# --- TCP -----------------------------------------------------------------------------------------


def listen(host: str = "127.0.0.1", port: int = 0, *, backlog: int = socket.SOMAXCONN) -> socket.socket:
    """A listening TCP socket, IPv4 or IPv6 as *host* resolves; port 0 lets the kernel choose.

    Raises: OSError EADDRINUSE, EACCES, ...; socket.gaierror for an unknown host. See listen(2).
    """
    port, backlog = integer(port, "port", 0, 65535), integer(backlog, "backlog", 0, INT_MAX)
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

    _file: SocketFile | None = None

    def close(self) -> None:
        """Remove the file, stop listening; again does nothing."""
        file, self._file = self._file, None
        if file is not None:
            file.unlink()
        super().close()

    def detach(self) -> int:
        """As of any socket; who takes the descriptor has the file, too."""
        self._file = None
        return super().detach()


def listen_unix(
    path: "str | bytes | os.PathLike[Any]", *, mode: int = 0o600, backlog: int = socket.SOMAXCONN
) -> UnixListener:
    """A listening AF_UNIX stream socket at *path*, whose file goes when it is closed.

    A file that a dead server of this user left is replaced; of several servers that start at a time
    exactly one does. Blocks only for that, at most 5 seconds.

    Args: mode: permissions of the file, whatever the umask, and never more; who may write it may
        connect. backlog: see listen(2).
    Raises: as ipckit.sockets.bind_unix(): OSError EADDRINUSE if somebody has a socket there; EEXIST for
        anything else there, EPERM for another user's; ENAMETOOLONG for more than 107 bytes; ENOENT, EACCES;
        TimeoutError (ETIMEDOUT); ValueError for an empty or abstract path, or another mode.
    Fork: a child may accept; only the maker's close() removes the file. See unix(7).
    """
    backlog = integer(backlog, "backlog", 0, INT_MAX)
    with ExitStack() as undo:
        listener = undo.enter_context(UnixListener(socket.AF_UNIX, socket.SOCK_STREAM))
        listener._file = bind_unix(listener, path, mode=mode)
        listener.listen(backlog)
        undo.pop_all()
    return listener


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
        mode = _fstat(fd).st_mode
        if not stat.S_ISSOCK(mode):
            undo.callback(os.close, fd)
            what = stat.filemode(mode)
            with suppress(OSError):
                what = os.readlink(_procfs.path(f"self/fd/{fd}"))
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
    limit, name = seconds(timeout), os.environ.get("NOTIFY_SOCKET")
    if not name:
        return False
    if "RELOADING=1" in state.split("\n"):
        state += f"\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"
    try:
        _tell(name, state, None if limit == math.inf else limit)
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
