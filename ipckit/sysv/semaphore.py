# SPDX-License-Identifier: MIT
"""System V semaphores, which the kernel gives back when their holder is killed. See semop(2).

That is SEM_UNDO, and no other semaphore on Unix has it. A semaphore stays until it is removed.

Made by ipckit it is the first of a set of two: the second says whether the first has its value yet,
so that no process can find it without, or give it twice, whoever is killed in the middle.
"""

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ipckit import limits, registry
from ipckit._arguments import INT_MAX, integer
from ipckit._native import ffi, lib
from ipckit._unpatched import threading, time
from ipckit.errors import Closed, check
from ipckit.sysv.keys import (
    PRIVATE,
    Key,
    changes,
    check_creation,
    check_known,
    check_set,
    find_or_create,
    key_of,
    shown,
)
from ipckit.wait import FOREVER, deadline, remaining

__all__ = ["Semaphore", "SemaphoreStat"]

if TYPE_CHECKING:
    from typing_extensions import Self

_LARGEST = 32767  # SEMVMX
_OURS = 2  # semaphores in a set that ipckit made
# How long who can't give the value waits for who can.
_PATIENCE = 1.0
# How often a wait looks whether another thread closed the handle, if there is another thread.
_SLICE_NS = 100_000_000


@dataclass(frozen=True)
class SemaphoreStat:
    """What the kernel knows of a semaphore. See semctl(2)."""

    key: int  # 0: private
    value: int
    waiting: int  # threads that wait to acquire it
    last_pid: int  # who changed the value last, by giving the first one too; 0 if nobody did
    operation_time: int
    """seconds since the epoch, of the last acquire or release, or since there was none of ipckit's giving it
    its first value; 0 if another program gave that"""
    change_time: int
    uid: int
    gid: int
    creator_uid: int
    creator_gid: int
    mode: int


def _status(ident: int) -> tuple[int, Any]:
    """What ik_sysv_semaphore_stat() returns, and what it found."""
    status = ffi.new("ik_sysv_semaphore_status *")
    return lib.ik_sysv_semaphore_stat(ident, status), status


def _check_value(value: int) -> int:
    return integer(value, "value", 0, _LARGEST)


class Semaphore:
    """A semaphore; the words are those of ``threading.Semaphore``."""

    _id = -1
    _key = PRIVATE
    _closed = True

    def __init__(
        self,
        key: Key = None,
        value: int = 1,
        *,
        create: bool = False,
        exclusive: bool = False,
        mode: int = 0o600,
        undo: bool = True,
    ) -> None:
        """Make a semaphore, or find one.

        What finds one that has no value yet waits up to a second for it; with *create* it gives it
        its own *value* if its maker did not come to that. Exactly one does.

        Args: key: a number, (path, project) for ftok(), or None for a new private one, which others find
            by its id. value: 0 to 32,767; only for a new one. create: make it if it doesn't exist.
            exclusive: it must not exist. mode: permissions of a new one; umask has no part in it.
            undo: what this handle acquires or releases is taken back when the process ends.
        Raises: FileNotFoundError (ENOENT), FileExistsError (EEXIST), PermissionError (EACCES); OSError
            ENOSPC: over kernel.sem.semmni or semmns; TimeoutError (ETIMEDOUT) if its maker never gave it a
            value; ValueError for arguments that make no sense.
        Fork: usable on both sides; what the parent holds is not undone by the child's end. See semget(2).
        """
        number = key_of(key)
        create = create or number == PRIVATE
        mode, value = check_creation(create, exclusive, mode), _check_value(value)
        with registry.entering(f"System V semaphore ({shown(number)})"):
            ident, created = find_or_create(
                lambda: lib.ik_sysv_semaphore_find(number),
                (lambda: lib.ik_sysv_semaphore_create(number, mode)) if create else None,
                exclusive,
            )
            self._fail(ident, number)
            self._take(ident, number, value if create else None, undo, created)

    @classmethod
    def from_id(cls, ident: int, undo: bool = True) -> "Self":
        """The semaphore of this id, as ``id`` and ipcs(1) tell it; of a set, the first.

        Raises: FileNotFoundError (ENOENT) if there is none; PermissionError (EACCES).
        """
        self, ident = cls.__new__(cls), integer(ident, "ident", 0, INT_MAX)
        with registry.entering(f"System V semaphore {ident}"):
            self._take(ident, PRIVATE, None, undo, False)
        return self

    @staticmethod
    def _fail(rc: int, key: int) -> None:
        why = ""
        if rc == -errno.ENOSPC:
            # The kernel doesn't say whether it was that or semmns, which is the larger number.
            why = ": " + limits.advice("kernel.sem.semmni", 2 * (limits.value("kernel.sem.semmni") or 1))
        check(rc, f"System V semaphore ({shown(key)}){why}")

    def _take(self, ident: int, key: int, value: int | None, undo: bool, created: bool) -> None:
        """Have its value given, and record; what was just made goes again if that fails."""
        self._id, self._key, self._undo = ident, key, undo
        try:
            status = self._started(value)
            self._key = status.key
            birth = str(status.ctime) if created else ""
            self._member = registry.enter("sysv-semaphore", str(ident), created=created, birth=birth)
            self._closed = False
        except BaseException:
            if created:
                lib.ik_sysv_semaphore_remove(ident)
            raise

    def _started(self, value: int | None) -> Any:
        """Its status, once it has its value: the given one, if nobody else gave it any."""
        until = deadline(_PATIENCE)
        while True:
            rc, status = _status(self._id)
            check(-errno.ENOENT if rc == -errno.EINVAL else rc, self)
            if status.otime or status.pid:  # the latter after a SETVAL, which leaves no time
                return status
            if (
                value is not None
                and status.count == _OURS
                and (rc := lib.ik_sysv_semaphore_start(self._id, value)) != -errno.EAGAIN
            ):
                check(-errno.ENOENT if rc == -errno.EINVAL else rc, self)
            elif remaining(until) == 0:
                check(-errno.ETIMEDOUT, f"{self}, which its maker, maybe dead, never gave a value")
            else:
                time.sleep(0.001)

    # --- using it

    def acquire(self, timeout: float | None = None) -> Literal[True]:
        """Take one; block until there is one to take.

        Unlike threading.Semaphore it never returns False, but raises at the time-out.

        Args: timeout: seconds; None for ever, 0 not at all.
        Raises: TimeoutError (ETIMEDOUT); OSError EIDRM when it is or was removed, also while this waits;
            PermissionError (EACCES); OSError ENOSPC without memory for undo; Closed, also within 0.1 s
            when another thread closes the handle while this waits.
        Signals: their Python handlers run, then the wait goes on. Threads: any number, in the order in
            which they came, but a process of more than one thread queues anew ten times a second.
        """
        deadline_ns = FOREVER if timeout is None else deadline(timeout)
        rc = self._add(-1, 0)  # most often there is one
        while rc in (-errno.EINTR, -errno.EAGAIN):
            if remaining(deadline_ns) == 0:
                rc = -errno.ETIMEDOUT
            else:
                rc = self._add(-1, self._wait_ns(deadline_ns))
        if rc < 0:
            self._check(rc, "acquiring")
        return True

    def release(self) -> None:
        """Give one back, or give one more. Never blocks.

        With undo, the process that acquired must be the one that releases: else the ends of both are undone,
        each in its own way. For signalling from process to process use ``undo=False``.

        Raises: OSError ERANGE beyond 32,767; EIDRM when it was removed; PermissionError (EACCES); Closed.
        """
        if (rc := self._add(1, 0)) < 0:
            self._check(rc, "releasing")

    def _add(self, delta: int, wait_ns: int) -> int:
        if self._closed:
            self._open()  # which raises
        rc: int = lib.ik_sysv_semaphore_add(self._id, delta, self._undo, wait_ns)
        return rc

    @staticmethod
    def _wait_ns(deadline_ns: int) -> int:
        """How long to wait in one piece."""
        left = remaining(deadline_ns)
        # A wait of 0 would be a try that doesn't queue.
        wait_ns = FOREVER if left is None else max(1, int(left * 1e9))
        if threading.active_count() == 1:
            return wait_ns
        return _SLICE_NS if left is None else min(wait_ns, _SLICE_NS)

    def __enter__(self) -> "Self":
        """Acquire it; the end of the block releases it, and does not close the handle."""
        self.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    # --- the semaphore

    @property
    def id(self) -> int:
        """What from_id() takes; known to ipcs(1)."""
        return self._id

    @property
    def key(self) -> int:
        """The key, signed as key_t is; 0 for a private semaphore."""
        return self._key

    @property
    def value(self) -> int:
        """How many can be taken now. Setting it makes the kernel forget everybody's undo.

        So after that the end of who holds the semaphore at that moment gives nothing back.

        Raises: ValueError for what is not from 0 to 32,767; OSError EIDRM; PermissionError (EACCES); Closed.
        """
        return self.stat().value

    @value.setter
    def value(self, value: int) -> None:
        self._open()
        self._check(lib.ik_sysv_semaphore_set_value(self._id, _check_value(value)), "setting the value of")
        self._refresh()

    @property
    def waiting(self) -> int:
        """How many threads of all processes wait to acquire it now."""
        return self.stat().waiting

    def stat(self) -> SemaphoreStat:
        """How the semaphore is now.

        Raises: PermissionError (EACCES) without the right to read; OSError EIDRM; Closed.
        """
        self._open()
        rc, found = _status(self._id)
        self._check(rc, "stat of")
        return SemaphoreStat(
            key=found.key,
            value=found.value,
            waiting=found.waiting,
            last_pid=found.pid,
            operation_time=found.otime,
            change_time=found.ctime,
            uid=found.uid,
            gid=found.gid,
            creator_uid=found.cuid,
            creator_gid=found.cgid,
            mode=found.mode & 0o777,
        )

    def set(self, *, mode: int | None = None, uid: int | None = None, gid: int | None = None) -> None:
        """Change permissions and owner; None leaves as it is. Only for owner, creator and root.

        Raises: PermissionError (EPERM); OSError EIDRM, or EINVAL where owner or group is none of this user
            namespace; Closed. See semctl(2), IPC_SET.
        """
        who = changes(mode, uid, gid)
        self._open()
        rc = lib.ik_sysv_semaphore_set(self._id, *who)
        check_set(rc, _status(self._id)[0], f"setting {self}")
        self._refresh()

    def _refresh(self) -> None:
        """The kernel's time of the last change tells it from a later one of the same id."""
        rc, status = _status(self._id)
        if rc == 0:  # else a new mode keeps us out, too
            self._member.refresh(birth=str(status.ctime))

    def remove(self) -> None:
        """Remove it at once, also after close(). Who waits for it gets EIDRM; the handle stays to be closed.

        Raises: PermissionError (EPERM) if it is another user's; OSError EIDRM if it is gone.
        """
        self._check(lib.ik_sysv_semaphore_remove(self._id), "removing")
        self._member.forget()

    # --- the handle

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Close the handle; a second call does nothing. The semaphore stays, and what is held is held."""
        if not self._closed:
            self._closed = True
            self._member.leave()

    def __str__(self) -> str:
        return f"System V semaphore {self._id} ({shown(self._key)})"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._id} ({shown(self._key)}){', closed' if self._closed else ''}>"

    def __reduce__(self) -> "tuple[Any, ...]":
        self._open()
        return type(self).from_id, (self._id, self._undo)

    def _open(self) -> None:
        if self._closed:
            raise Closed(f"{self} is closed")

    def _check(self, rc: int, verb: str) -> None:
        check_known(rc, f"{verb} {self}")
