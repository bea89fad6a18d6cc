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
from typing import Any, NamedTuple

from ipckit import _procfs
from ipckit._arguments import INT_MAX, integer, seconds
from ipckit._unpatched import os, time
from ipckit.errors import check
from ipckit.sockets import SocketFile, bind_unix

__all__ = ["UnixListener", "activated", "endpoint", "listen", "listen_all", "listen_unix", "notify"]

_FIRST_FD = 3  # SD_LISTEN_FDS_START
_NOT_HERE = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
_ACTIVATION = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")

_log = logging.getLogger(__name__)


# --- TCP -----------------------------------------------------------------------------------------


def listen(host: str = "127.0.0.1", port: int = 0, *, backlog: int = socket.SOMAXCONN) -> socket.socket:
    """A listening TCP socket at the first address of *host*, IPv4 or IPv6; port 0 lets the kernel choose.

    ``::`` is all addresses of IPv6, and those of IPv4 are ``0.0.0.0``: to have both, listen at both.
    Raises: OSError EADDRINUSE, EACCES, ...; socket.gaierror for an unknown host. See listen(2).
    """
    port, backlog = integer(port, "port", 0, 65535), integer(backlog, "backlog", 0, INT_MAX)
    return _listen(_addresses(host, port)[0], backlog)


def listen_all(
    host: str = "127.0.0.1", port: int = 0, *, backlog: int = socket.SOMAXCONN
) -> "list[socket.socket]":
    """Listening TCP sockets at all addresses of *host*, as ``localhost`` often has two; at one port.

    An address that this machine does not have (127.0.0.1 and ::1 where IPv6 is off) is left out, unless
    there is no other. Port 0 lets the kernel choose one for all. Raises: as listen(). See getaddrinfo(3).
    """
    port, backlog = integer(port, "port", 0, 65535), integer(backlog, "backlog", 0, INT_MAX)
    addresses = _addresses(host, port)
    while True:
        with ExitStack() as undo, suppress(_PortTaken):
            found = _listen_at(addresses, port, backlog, undo)
            undo.pop_all()
            return found


class _PortTaken(Exception):
    """What the kernel chose for one address somebody has at the next one."""


def _listen_at(
    addresses: "list[_Address]", port: int, backlog: int, undo: ExitStack
) -> "list[socket.socket]":
    found: list[socket.socket] = []
    for address in addresses:
        chosen = port or (found[0].getsockname()[1] if found else 0)
        try:
            found.append(undo.enter_context(_listen(address.at(chosen), backlog)))
        except OSError as error:
            if error.errno == errno.EADDRINUSE and chosen != port:
                raise _PortTaken from None
            if error.errno not in _NOT_HERE or (address is addresses[-1] and not found):
                raise
    return found


class _Address(NamedTuple):
    """What a name stands for."""

    family: int
    protocol: int
    name: Any

    def at(self, port: int) -> "_Address":
        return self._replace(name=(self.name[0], port, *self.name[2:]))


def _addresses(host: str, port: int) -> "list[_Address]":
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys(_Address(family, protocol, name) for family, _, protocol, _, name in found))


def _listen(address: _Address, backlog: int) -> socket.socket:
    with ExitStack() as undo:
        listener = undo.enter_context(socket.socket(address.family, socket.SOCK_STREAM, address.protocol))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.name[0] == "::":
            # Else it takes IPv4 too, or not, as a sysctl says, and 0.0.0.0 is in use by it, or it by that.
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        _answer_at_once(listener)
        listener.bind(address.name)
        listener.listen(backlog)
        undo.pop_all()
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
