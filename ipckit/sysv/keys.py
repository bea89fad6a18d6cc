# SPDX-License-Identifier: MIT
"""The keys by which unrelated processes find one System V object. See ftok(3), sysvipc(7)."""

import errno
from collections.abc import Callable

from ipckit._arguments import INT_MAX, integer, permissions, user
from ipckit._unpatched import os
from ipckit.errors import check

__all__ = ["Key", "ftok"]

PRIVATE = 0  # IPC_PRIVATE: no key at all, a new object each time

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Key = int | tuple[Path, int] | None


def ftok(path: Path, project: int) -> int:
    """The key that ftok(3) makes of an existing file and a project number, as C programs get it.

    Keys collide: only 16 bits of the file's inode number, 8 of its device and 8 of *project* go into
    the key, so two files may well give the same one, and a file made anew gives another one. A key
    says where to look, not that what is found there is yours: create with ``exclusive=True``.

    Args: path: a file or directory that stays. project: 1 to 255, often the code of a letter.
    Returns: the key as key_t has it, signed: below 0 for a project from 128 on.
    Raises: FileNotFoundError (ENOENT) and what else stat(2) gives, naming *path*; ValueError for a
        project of which ftok(3) would use only the low 8 bits, or that is 0.
    """
    project = integer(project, "project", 1, 255)
    status = os.stat(path)
    return _signed(project << 24 | (status.st_dev & 0xFF) << 16 | status.st_ino & 0xFFFF)


def _signed(key: int) -> int:
    return key - (1 << 32) if key >> 31 == 1 else key


def key_of(key: Key) -> int:
    """The number of a ``key`` argument: a key, (path, project) for ftok(), or None for PRIVATE.

    A number may be given signed, as C has it, or unsigned, as ipcs(1) shows it.

    Raises: ValueError for 0 and for what is no 32-bit number; TypeError for anything else; what ftok()
        raises.
    """
    if isinstance(key, tuple):
        return ftok(*key)
    if key is None:
        return PRIVATE
    number = integer(key, "key", -INT_MAX - 1, (1 << 32) - 1)
    if number == PRIVATE:
        raise ValueError("key must be None for a private object, not 0")
    return _signed(number)


def shown(key: int) -> str:
    """The key as ipcs(1) shows it, for messages."""
    return "private" if key == PRIVATE else f"key {key & 0xFFFFFFFF:#010x}"


def check_creation(create: bool, exclusive: bool, mode: int) -> int:
    """The mode. Raises: ValueError for *exclusive* without *create*; as permissions()."""
    if exclusive and not create:
        raise ValueError("exclusive=True needs create=True")
    return permissions(mode)


def check_known(rc: int, what: str) -> int:
    """As check(); the id was good, so what the kernel doesn't know any more (EINVAL) was removed."""
    return check(-errno.EIDRM if rc == -errno.EINVAL else rc, what)


def check_set(rc: int, known: int, what: str) -> int:
    """As check_known(), of IPC_SET, after which IPC_STAT said *known*: it knows what was not removed."""
    if rc == -errno.EINVAL and known not in (-errno.EINVAL, -errno.EIDRM):
        why = "its owner and group must be of this user namespace, see user_namespaces(7)"
        raise OSError(errno.EINVAL, why, what)
    return check_known(rc, what)


def changes(mode: int | None, uid: int | None, gid: int | None) -> list[int]:
    """The three as C takes them for IPC_SET: -1 leaves as it is. Raises: as permissions() and user()."""
    given = None if mode is None else permissions(mode), user(uid, "uid"), user(gid, "gid")
    return [-1 if value is None else value for value in given]


def find_or_create(
    find: Callable[[], int], make: Callable[[], int] | None, exclusive: bool
) -> tuple[int, bool]:
    """The id of an object, or -errno, and whether it was made here and now.

    Args: make: None if the object must exist.
    """
    while True:
        if make and ((rc := make()) != -errno.EEXIST or exclusive):
            return rc, True
        rc = find()
        if rc != -errno.ENOENT or not make:  # else it was removed in between
            return rc, False
