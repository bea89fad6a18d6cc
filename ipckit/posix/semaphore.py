# SPDX-License-Identifier: MIT
"""Named semaphores. See sem_overview(7)."""

import errno
from types import TracebackType
from typing import Any, Literal, NoReturn, TypeVar

import posix_ipc

from ipckit import registry
from ipckit._arguments import integer, permissions, user
from ipckit._native import ffi, lib
from ipckit._unpatched import os
from ipckit.errors import Closed, check
from ipckit.posix.names import (
    check_exclusive,
    check_name,
    look,
    told,
)
from ipckit.wait import deadline

__all__ = ["Semaphore"]

_AnySemaphore = TypeVar("_AnySemaphore", bound="Semaphore")

_LARGEST: int = posix_ipc.SEMAPHORE_VALUE_MAX
_LONGEST = 255 - len("sem.")  # the C library's file for it is /dev/shm/sem.NAME


class Semaphore:
    """A counter that is never below 0: ``acquire()`` takes one and waits for it, ``release()`` adds one.

    ``Semaphore("/free")`` opens it, with ``create=True`` makes it if there is none, with
    ``exclusive=True`` too makes it or fails. ``with`` acquires and releases, as in ``threading``; close()
    is a call of its own.

    It has no owner: a process killed between acquire() and release() keeps what it took, for ever. Where
    that matters, use ``ipckit.sysv.Semaphore``, which the kernel gives back (SEM_UNDO).

    Args: name: a slash and 1 to 251 bytes without another. value: where it starts, if it is made. mode:
        permissions, whatever the umask; who uses it needs to read and write. owner: the user whose it must
        be, if not our own: somebody else's file could be truncated, which ends who has it mapped.
    Raises: ValueError for a bad name or number; FileNotFoundError (ENOENT), FileExistsError (EEXIST);
        PermissionError (EACCES; EPERM for another user's); OSError ELOOP, EISDIR, EINVAL for what is no
        semaphore.
    Fork: usable on both sides. Pickle: by name, anywhere. Threads: any number. See sem_open(3).
    """

    _handle: Any = None
    _member: "registry.Membership | None" = None

    def __init__(
        self,
        name: str,
        value: int = 1,
        *,
        create: bool = False,
        exclusive: bool = False,
        mode: int = 0o600,
        owner: int | None = None,
    ) -> None:
        self.name = check_name(name, _LONGEST)
        self._what = f"POSIX semaphore {name!r}"
        self._path, self._owner = f"/dev/shm/sem.{name[1:]}", user(owner, "owner")
        mode, value = permissions(mode), integer(value, "value", 0, _LARGEST)
        check_exclusive(create, exclusive)
        with registry.entering(self._what):
            (handle, found), created = registry.make_or_open(
                lambda: self._make(value, mode), self._find, create, exclusive
            )
            self._birth = registry.birth_of(found)
            try:
                self._member = registry.enter("posix-semaphore", name, created=created, birth=self._birth)
            except BaseException:
                if created:
                    posix_ipc.unlink_semaphore(name)
                raise
        self._handle = handle

    def _make(self, value: int, mode: int) -> tuple[Any, os.stat_result]:
        # The C library writes it under another name and links it when it is whole.
        with told(self._what, exclusive=True):
            posix_ipc.Semaphore(self.name, posix_ipc.O_CREX, mode, value).close()
        try:
            os.chmod(self._path, mode)  # whatever the umask
            return self._find()
        except BaseException:
            posix_ipc.unlink_semaphore(self.name)
            raise

    def _find(self) -> tuple[Any, os.stat_result]:
        """Ours, because the package waits by the wall clock, and close() would not end it."""
        while True:
            found = look(self._path, self._owner, self._what)
            # Hard links are let pass: the C library's making has two for a moment, and what else they
            # could be here is a file of the same user with the very size of a semaphore.
            if found.st_size != lib.ik_posix_semaphore_size():
                check(-errno.EINVAL, f"{self._what} is no semaphore, but a file of {found.st_size} bytes")
            handle = ffi.gc(ffi.new("ik_posix_semaphore *"), lib.ik_posix_semaphore_free)
            check(lib.ik_posix_semaphore_open(handle, os.fsencode(self.name)), self._what)
            if registry.birth_of(look(self._path, self._owner, self._what)) == registry.birth_of(found):
                return handle, found

    def acquire(self, timeout: float | None = None) -> Literal[True]:
        """Take one; block until there is one. Unlike threading's it never returns False, but raises.

        Args: timeout: seconds.
        Raises: TimeoutError (ETIMEDOUT), also for 0; Closed, within 100 ms when another thread closes.
        Threads: any number. Signals: their Python handlers run, then the wait goes on. See sem_clockwait(3).
        """
        deadline_ns, handle = deadline(timeout), self._open()
        while True:
            rc = lib.ik_posix_semaphore_acquire(handle, deadline_ns)
            if rc == -errno.EBADF:
                self._closed()
            if rc != -errno.EINTR:
                check(rc, f"acquire of {self._what}")
                return True

    def release(self) -> None:
        """Add one, which wakes one that waits; anybody may.

        Raises: OSError EOVERFLOW beyond 2,147,483,647; Closed. See sem_post(3).
        """
        check(lib.ik_posix_semaphore_release(self._open()), f"release of {self._what}")

    @property
    def value(self) -> int:
        """How many could be taken at this moment. See sem_getvalue(3)."""
        return lib.ik_posix_semaphore_value(self._open())  # type: ignore[no-any-return]

    def unlink(self) -> None:
        """Give up the name: nobody can open it any more. Who has the semaphore open goes on with it.

        Also after close(). A semaphore that was made later under the same name is told from this one, and
        stays.

        Raises: FileNotFoundError (ENOENT) if the name is gone, or is that of a later semaphore;
            PermissionError (EACCES) if it is another user's. See sem_unlink(3).
        """
        with registry.entering(self._what):
            if registry.birth_of(look(self._path, self._owner, self._what)) != self._birth:
                check(-errno.ENOENT, f"{self._what}, whose name is that of a later semaphore now")
            with told(self._what):
                posix_ipc.unlink_semaphore(self.name)
            if self._member is not None:
                self._member.forget()

    def _open(self) -> Any:
        handle = self._handle
        if handle is None:
            self._closed()
        return handle

    def _closed(self) -> NoReturn:
        raise Closed(f"{self._what} is closed")

    @property
    def closed(self) -> bool:
        """Was close() called here?"""
        return self._handle is None

    def close(self) -> None:
        """Let go of the semaphore, without releasing it; again does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            lib.ik_posix_semaphore_close(handle)  # who waits in it has it still, and unmaps it when he leaves
        if self._member is not None:
            self._member.leave()

    def __enter__(self: _AnySemaphore) -> _AnySemaphore:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}{', closed' if self.closed else ''}>"

    def __reduce__(self) -> tuple[Any, ...]:
        self._open()
        return _reopened, (self.name, self._owner, self._birth)


def _reopened(name: str, owner: int | None, was: str) -> Semaphore:
    semaphore = Semaphore(name, owner=owner)
    if semaphore._birth != was:
        semaphore.close()
        what = f"POSIX semaphore {name!r} that was pickled"
        check(-errno.ENOENT, f"{what}; the name is that of a later semaphore now")
    return semaphore
