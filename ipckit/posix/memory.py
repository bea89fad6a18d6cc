# SPDX-License-Identifier: MIT
"""Shared memory under a name that other programs find too. See shm_overview(7)."""

import errno
from typing import Any

import posix_ipc

from ipckit import _procfs, registry
from ipckit._arguments import integer, permissions, user
from ipckit._unpatched import os
from ipckit.errors import Closed, check
from ipckit.memory import Mapping, allocate, fault_in
from ipckit.posix.names import (
    check_exclusive,
    check_file,
    check_name,
    look,
    told,
)

__all__ = ["SharedMemory"]

_FOLDER = "/dev/shm"  # where the C library has them


class SharedMemory(Mapping):
    """Memory under a name. ``buf`` is the bytes, ``asarray()`` a numpy array over them.

    ``SharedMemory("/frames")`` opens it, with a size and ``create=True`` makes it if there is none, with
    ``exclusive=True`` too makes it or fails. Nobody ever sees a half-made one.

    All of it is allocated when it is made, so what is missing is an OSError then and not a SIGBUS later. It
    can't be sealed: who may write to it can truncate it, which ends the others by SIGBUS. Memory that
    needs no name is better an ``ipckit.memory.SharedMemory``.

    Args: name: a slash and 1 to 255 bytes without another. size: bytes, kept exactly; of memory that is
        opened, what it must have, 0 for any. mode: permissions, whatever the umask. readonly: open it
        without the right to write. owner: the user whose it must be, if not our own.
    Raises: ValueError for a bad name or number, and for empty memory; FileNotFoundError (ENOENT),
        FileExistsError (EEXIST); PermissionError (EACCES; EPERM for another user's, or with hard links);
        OSError ELOOP, EISDIR, EINVAL for what is no memory; ENOSPC, ENOMEM, EFBIG if there is not so
        much, with the size.
    Fork: the child has it too. Pickle: by name, anywhere. Threads: any number. See shm_open(3).
    """

    _member: "registry.Membership | None" = None

    def __init__(
        self,
        name: str,
        size: int = 0,
        *,
        create: bool = False,
        exclusive: bool = False,
        mode: int = 0o600,
        readonly: bool = False,
        owner: int | None = None,
    ) -> None:
        self.name = check_name(name)
        self._what = f"POSIX memory {name!r}"
        self._path, self._owner = f"{_FOLDER}{name}", user(owner, "owner")
        mode, size = permissions(mode), integer(size, "size", 1 if create else 0)
        check_exclusive(create, exclusive)
        if readonly and create:
            raise ValueError(f"{self._what} can't be made readonly: nobody could fill it")
        with registry.entering(self._what):
            fd, created = registry.make_or_open(
                lambda: self._make(size, mode), lambda: self._find(size, readonly), create, exclusive
            )
            self._enter(fd, created, readonly)

    def _make(self, size: int, mode: int) -> int:
        """Made without a name, and named when it is whole: a full disk or a kill leaves nothing."""
        with told(self._what):
            folder = os.open(_FOLDER, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        fd = -1
        try:
            with told(self._what):
                fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder)
                os.fchmod(fd, mode)  # whatever the umask
            allocate(fd, size, f"{self._what} of {size} bytes")
            whole = _procfs.path(f"self/fd/{fd}")
            with told(self._what):  # with a folder's descriptor Python follows the link in /proc
                os.link(whole, self.name[1:], dst_dir_fd=folder)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        finally:
            os.close(folder)
        return fd

    def _find(self, size: int, readonly: bool) -> int:
        """Looked at before it is opened, as opening can do something to a pipe; and again afterwards."""
        look(self._path, self._owner, self._what)
        with told(self._what):
            fd: int = posix_ipc.SharedMemory(self.name, os.O_NONBLOCK, read_only=readonly).fd
        try:
            found = os.fstat(fd)
            check_file(found, self._owner, self._what)
            if found.st_nlink != 1:
                number = errno.EPERM if found.st_nlink else errno.ENOENT
                check(-number, f"{self._what} has {found.st_nlink} names (hard links)")
            if found.st_size == 0:
                raise ValueError(f"{self._what} is empty")
            if size not in (0, found.st_size):
                raise ValueError(f"{self._what} has {found.st_size} bytes, not {size}")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _enter(self, fd: int, created: bool, readonly: bool) -> None:
        try:
            found = os.fstat(fd)
            self._birth = registry.birth_of(found)
            self._member = registry.enter("posix-memory", self.name, created=created, birth=self._birth)
            Mapping.__init__(self, fd, found.st_size, self._what, readonly=readonly)
            if created:
                fault_in(self._open(), 0, self.size)
        except BaseException:
            os.close(fd)
            if created:
                os.unlink(self._path)
            if self._member is not None:
                self._member.forget() if created else self._member.leave()
            raise

    def unlink(self) -> None:
        """Give up the name: nobody can open it any more. Who has the memory keeps it.

        Also after close(). Memory that was made later under the same name is told from this one, and stays.

        Raises: FileNotFoundError (ENOENT) if the name is gone, or is that of later memory;
            PermissionError (EACCES) if it is another user's. See shm_unlink(3).
        """
        with registry.entering(self._what):
            if registry.birth_of(look(self._path, self._owner, self._what)) != self._birth:
                check(-errno.ENOENT, f"{self._what}, whose name is that of later memory now")
            with told(self._what):
                posix_ipc.unlink_shared_memory(self.name)
            if self._member is not None:
                self._member.forget()

    def close(self, *, defer: bool = False) -> None:
        """End this handle's use of the memory, which stays. As ``Mapping.close()``."""
        super().close(defer=defer)
        if self._member is not None:
            self._member.leave()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.closed:
            raise Closed(f"{self._what} is closed")
        return _reopened, (self.name, self.readonly, self._owner, self._birth)


def _reopened(name: str, readonly: bool, owner: int | None, was: str) -> SharedMemory:
    memory = SharedMemory(name, readonly=readonly, owner=owner)
    if memory._birth != was:
        memory.close()
        check(-errno.ENOENT, f"POSIX memory {name!r} that was pickled; the name is that of later memory now")
    return memory
