# SPDX-License-Identifier: MIT
"""The file of a message log: opened, checked and locked, so that two logs never write one."""

import errno
import fcntl
import stat

from ipckit import _procfs
from ipckit._descriptors import above_standard
from ipckit._unpatched import os, time

__all__ = [
    "Identity",
    "end_torn_tail",
    "identity_of",
    "open_file",
]

_SLICE = 0.01  # seconds between two looks whether the file is free


Identity = tuple[int, int]  # device and inode


def identity_of(fd: int) -> Identity:
    info = os.fstat(fd)
    return info.st_dev, info.st_ino


def open_file(path: str, *, synced: bool, patience: float = 0.0, but: Identity | None = None) -> int:
    """The log file, locked against a second log: regular, ours, not reached through a link.

    -1 if it is *but*."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = above_standard(os.open(path, flags, 0o600))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "the log must not be a symbolic link", path) from None
        raise
    try:
        _refuse_strangers(fd, path)
        if identity_of(fd) == but:
            os.close(fd)
            return -1
        _take(fd, path, patience)
        if synced:
            _sync_folder(path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def copy_of_stream(fd: int, *, synced: bool) -> int:
    """A copy of a descriptor of no file, but of a pipe, a socket or a terminal; who reads that keeps it."""
    what = f"descriptor {fd}"
    if synced:
        raise ValueError(f"durability 'synced' is of a file, and {what} is given in place of its path")
    if stat.S_ISREG(os.fstat(fd).st_mode):
        raise OSError(errno.EINVAL, "a log that is a file must be given by its path", what)
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


def _refuse_strangers(fd: int, path: str) -> None:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "the log must be a regular file", path)
    if info.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, f"the log belongs to user {info.st_uid}, not to us", path)
    if info.st_nlink != 1:
        raise OSError(errno.EMLINK, f"the log must have one name, not {info.st_nlink} links", path)


def _take(fd: int, path: str, patience: float) -> None:
    """Lock the file; the logger of a server that was killed may write its rest for so many seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                why = f"another process writes this log{_holder(fd)}"
                raise BlockingIOError(errno.EWOULDBLOCK, why, path) from None
        time.sleep(_SLICE)


def _holder(fd: int) -> str:
    # /proc/locks would name the process that locked it: the server that was killed, not its logger.
    number = _procfs.other_user_of(fd)
    return f" (process {number})" if number else ""


def _sync_folder(path: str) -> None:
    """What is synced in a file whose name is lost would be lost."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has nothing to sync there
            raise
    finally:
        os.close(folder)


def end_torn_tail(fd: int, path: str) -> int:
    """Give a last line that was cut off its line end, so that it stays one bad line: 1 if so."""
    size = os.fstat(fd).st_size
    if size == 0 or os.pread(fd, 1, size - 1) == b"\n":
        return 0
    if os.pwrite(fd, b"\n", size) != 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    return 1
