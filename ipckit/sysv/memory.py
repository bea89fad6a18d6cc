# SPDX-License-Identifier: MIT
"""System V shared memory: segments that are found by a key or an id. See shmget(2), sysvipc(7).

A segment stays until it is removed, whoever ends; ``SharedMemory.in_use()`` and ``in_use()`` tell
whether anybody has it. New programs that need not talk to old ones are better off with
``ipckit.memory``, which goes with its last user.

Nothing here blocks. Any thread, and children after fork, may use a handle; what the bytes mean, and who
may write when, is the users' business.
"""

import errno
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ipckit import _procfs, limits, registry
from ipckit._arguments import INT_MAX, integer
from ipckit._native import ffi, lib
from ipckit.errors import check
from ipckit.memory import Views, fault_in
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

__all__ = ["SegmentStat", "SharedMemory", "in_use"]

if TYPE_CHECKING:
    from typing_extensions import Self

_LARGEST = (1 << 8 * ffi.sizeof("size_t")) - 1


@dataclass(frozen=True)
class SegmentStat:
    """What the kernel knows of a segment. See shmctl(2)."""

    key: int  # 0: private, or removed and still attached
    size: int  # bytes, as asked for when it was made
    nattch: int  # attachments, of all processes
    creator_pid: int
    last_pid: int  # of the last attaching or detaching; 0 if there was none
    attach_time: int  # seconds since the epoch; 0 if there was none
    detach_time: int
    change_time: int
    uid: int
    gid: int
    creator_uid: int
    creator_gid: int
    mode: int  # permissions
    removed: bool  # goes with the last that is attached (SHM_DEST)
    locked: bool  # is not swapped (SHM_LOCK)


def _status(ident: int) -> tuple[int, Any]:
    """What ik_sysv_memory_stat() returns, and what it found."""
    status = ffi.new("ik_sysv_memory_status *")
    return lib.ik_sysv_memory_stat(ident, status), status


def _others(ident: int, ours: int) -> bool:
    rc, status = _status(ident)
    if rc == -errno.EINVAL:
        return False
    return rc != 0 or status.nattch > ours


def in_use(ident: int) -> bool:
    """Whether any process has the segment *ident* attached; when that can't be known, True.

    ========================  ======  ================================================================
    the kernel says           answer  because
    ========================  ======  ================================================================
    EINVAL                    False   there is no such segment any more
    nattch is 0               False   nobody has it
    nattch is more            True    a process that is stopped, or whose parent was killed, counts too
    EACCES                    True    it is somebody else's, and can't be looked into: not ours to remove
    EIDRM, anything else      True    it may be on its way out, but nothing proves that nobody has it
    ========================  ======  ================================================================

    The answer is of the moment: who knows the id or the key may attach right afterwards.
    """
    return _others(integer(ident, "ident", 0, INT_MAX), 0)


# --- mapping ---------------------------------------------------------------------------------------


def _huge_page() -> int:
    """Bytes of a huge page; 0 where the kernel has none."""
    found = re.search(r"^Hugepagesize:\s*(\d+) kB", Path(_procfs.path("meminfo")).read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


class _Pages(NamedTuple):
    """Where a segment is mapped: in an mmap object, from byte *start* on."""

    pages: mmap.mmap
    start: int
    huge: bool


def _mapped(ident: int, size: int, readonly: bool, huge: bool) -> tuple[int, _Pages]:
    """0 or -errno, and the segment.

    The mmap object is made over nothing, and the segment attached in the place of some of it. So the
    segment is mapped as long as any view or array holds the object, which knows itself whether it may be
    written to.

    What is attached in a place takes it, and as much behind it as the segment's pages need, whatever is
    there. Nobody tells how large these are, but they must be aligned. So the place is an odd multiple of
    the page size that is meant: a segment of any larger pages is refused, and never larger than the place.
    """
    unit = _huge_page() if huge else mmap.PAGESIZE
    page = lib.IK_SYSV_MEMORY_HUGE if huge else lib.IK_SYSV_MEMORY_USUAL
    protection = mmap.PROT_READ if readonly else mmap.PROT_READ | mmap.PROT_WRITE
    pages = mmap.mmap(-1, (-(-size // unit) + 1) * unit, lib.ik_sysv_memory_reservation(page), protection)
    with ffi.from_buffer(pages) as where:
        start = 0 if int(ffi.cast("uintptr_t", where)) // unit % 2 else unit
        rc: int = lib.ik_sysv_memory_attach(ident, where + start, readonly)
    return rc, _Pages(pages, start, huge)


def _attach(ident: int, size: int, readonly: bool, what: str) -> _Pages:
    """The mapped segment. That it is of huge pages shows only in what attaching takes."""
    try:
        rc, pages = _mapped(ident, size, readonly, False)
        if rc == -errno.EINVAL and _huge_page():
            rc, pages = _mapped(ident, size, readonly, True)
    except OSError as error:
        rc = -(error.errno or errno.EIO)
    check(rc, f"attaching {what} {'read-only' if readonly else 'read-write'}")
    return pages


# --- making ----------------------------------------------------------------------------------------


def _make(key: int, size: int, mode: int, huge: "bool | Literal['require']") -> int:
    size = min(size, _LARGEST)
    if huge:
        rc: int = lib.ik_sysv_memory_create(key, size, mode, lib.IK_SYSV_MEMORY_HUGE)
        if rc not in (-errno.ENOMEM, -errno.EPERM, -errno.EINVAL):
            return rc
        if huge == "require":
            check(rc, _why_not_huge(size))
    return lib.ik_sysv_memory_create(key, size, mode, lib.IK_SYSV_MEMORY_USUAL)  # type: ignore[no-any-return]


def _why_not_huge(size: int) -> str:
    pages = -(-size // (_huge_page() or 1 << 21))
    return (
        f"segment of {size} bytes in huge pages: {limits.advice('vm.nr_hugepages', pages)}"
        " (and the user needs CAP_IPC_LOCK, or the group of vm.hugetlb_shm_group)"
    )


def _in_system() -> list[int]:
    """The sizes of all segments, in pages."""
    lines = Path(_procfs.path("sysvipc/shm")).read_text().splitlines()[1:]
    return [-(-int(line.split()[3]) // mmap.PAGESIZE) for line in lines]


def _why(rc: int, size: int) -> str:
    """Which limit it was."""
    if rc == -errno.EINVAL:
        return limits.advice("kernel.shmmax", size)
    if rc == -errno.ENOMEM:
        policy = limits.value("vm.overcommit_memory")
        return f"more than the kernel promises (vm.overcommit_memory is {policy})"
    if rc == -errno.ENOSPC:
        there = _in_system()
        most = limits.value("kernel.shmmni")
        if most is not None and len(there) >= most:
            return limits.advice("kernel.shmmni", 2 * most)
        return limits.advice("kernel.shmall", sum(there) + -(-size // mmap.PAGESIZE)) + " (pages)"
    return ""


# --- a segment -------------------------------------------------------------------------------------


class SharedMemory(Views):
    """A segment, attached."""

    huge: bool
    """the segment is of huge pages"""

    _id = -1
    _key = PRIVATE
    _member: "registry.Membership | None" = None

    def __init__(
        self,
        key: Key = None,
        size: int = 0,
        *,
        create: bool = False,
        exclusive: bool = False,
        mode: int = 0o600,
        readonly: bool = False,
        huge: "bool | Literal['require']" = False,
    ) -> None:
        """Make a segment of zero bytes, or find one, and attach it.

        Args: key: a number, (path, project) for ftok(), or None for a new private segment, which others
            find by its id. size: bytes; of an existing segment, what it must have at least. create: make
            it if it doesn't exist. exclusive: it must not exist. mode: permissions of a new one; umask
            has no part in it. readonly: attach without the right to write. huge: ask for huge pages, and
            do without if there are none (``huge`` tells); "require" raises then.
        Raises: FileNotFoundError (ENOENT), FileExistsError (EEXIST), PermissionError (EACCES); OSError
            EINVAL: smaller than *size*, or *size* is over kernel.shmmax; ENOSPC: over kernel.shmmni or
            kernel.shmall; ENOMEM, EPERM; ValueError for arguments that make no sense.
        Fork: the child has the segment attached too, and detaches for itself. See shmget(2), shmat(2).
        """
        number = key_of(key)
        create = create or number == PRIVATE
        mode, size = check_creation(create, exclusive, mode), integer(size, "size", 1 if create else 0)
        with registry.entering(f"System V segment ({shown(number)})"):
            ident, created = find_or_create(
                lambda: lib.ik_sysv_memory_find(number),
                (lambda: _make(number, size, mode, huge)) if create else None,
                exclusive,
            )
            if ident < 0:
                self._fail(ident, number, size if created else 0)
            self._take(ident, number, size, readonly, created)

    @classmethod
    def from_id(cls, ident: int, readonly: bool = False) -> "Self":
        """Attach the segment of this id, as ``id`` and ipcs(1) tell it.

        On Linux also one that was removed, as long as somebody has it attached.

        Raises: FileNotFoundError (ENOENT) if there is none; PermissionError (EACCES).
        """
        self, ident = cls.__new__(cls), integer(ident, "ident", 0, INT_MAX)
        with registry.entering(f"System V segment {ident}"):
            self._take(ident, PRIVATE, 0, readonly, False)
        return self

    @staticmethod
    def _fail(rc: int, key: int, size: int) -> None:
        why = _why(rc, size) if size else ""
        asked = f" of {size} bytes" if size else ""
        check(rc, f"System V segment{asked} ({shown(key)}){': ' if why else ''}{why}")

    def _take(self, ident: int, key: int, size: int, readonly: bool, created: bool) -> None:
        """Attach, and record; what was just made goes again if that fails."""
        self._id, self.readonly = ident, readonly
        self._know(key)
        try:
            rc, status = _status(ident)
            check(-errno.ENOENT if rc == -errno.EINVAL else rc, self._what)
            self._know(status.key)
            if status.size < size:
                check(-errno.EINVAL, f"{self._what} has {status.size} bytes, and {size} were asked for")
            self.size = status.size
            mapped = _attach(ident, self.size, readonly, self._what)
            if created and not mapped.huge:
                fault_in(mapped.pages, mapped.start, self.size)
            if not status.mode & lib.IK_SYSV_MEMORY_DEST:  # else it goes by itself
                birth = str(status.ctime) if created else ""
                self._member = registry.enter("sysv-memory", str(ident), created=created, birth=birth)
            self._pages, self._start, self.huge = mapped
        except BaseException:
            if created:
                lib.ik_sysv_memory_remove(ident)
            raise

    def _know(self, key: int) -> None:
        self._key = key
        self._what = f"System V segment {self._id} ({shown(key)})"

    # --- the segment

    @property
    def id(self) -> int:
        """What from_id() takes; known to ipcs(1)."""
        return self._id

    @property
    def key(self) -> int:
        """The key, signed as key_t is; 0 for a private segment."""
        return self._key

    def stat(self) -> SegmentStat:
        """How the segment is now. Raises: PermissionError (EACCES) without the right to read; Closed."""
        self._open()
        rc, found = _status(self._id)
        self._check(rc, "stat of")
        return SegmentStat(
            key=found.key,
            size=found.size,
            nattch=found.nattch,
            creator_pid=found.cpid,
            last_pid=found.lpid,
            attach_time=found.atime,
            detach_time=found.dtime,
            change_time=found.ctime,
            uid=found.uid,
            gid=found.gid,
            creator_uid=found.cuid,
            creator_gid=found.cgid,
            mode=found.mode & 0o777,
            removed=bool(found.mode & lib.IK_SYSV_MEMORY_DEST),
            locked=bool(found.mode & lib.IK_SYSV_MEMORY_LOCKED),
        )

    def in_use(self) -> bool:
        """Whether the segment is attached by anybody but this handle; as in_use() otherwise.

        Another handle, or a child that was forked with this one, counts. Raises: Closed.
        """
        self._open()
        return _others(self._id, 1)

    def set(self, *, mode: int | None = None, uid: int | None = None, gid: int | None = None) -> None:
        """Change permissions and owner; None leaves as it is. Only for owner, creator and root.

        Raises: PermissionError (EPERM); OSError EIDRM, or EINVAL where owner or group is none of this user
            namespace; Closed. See shmctl(2), IPC_SET.
        """
        who = changes(mode, uid, gid)
        self._open()
        set_rc = lib.ik_sysv_memory_set(self._id, *who)
        rc, status = _status(self._id)
        check_set(set_rc, rc, f"setting {self._what}")
        if rc == 0 and self._member:  # else the new mode keeps us out, too
            self._member.refresh(birth=str(status.ctime))

    def remove(self) -> None:
        """Remove the segment: at once if nobody has it attached, else with the last that has.

        Its key is free at once. Those attached go on undisturbed, this handle too, so a segment that
        everybody has may be removed early: then no kill can leave it behind. Also after close().

        Raises: PermissionError (EPERM) if it is another user's; OSError EIDRM if it is gone.
        """
        self._check(lib.ik_sysv_memory_remove(self._id), "removing")
        if self._member:
            self._member.forget()

    # --- the handle

    def close(self, *, defer: bool = False) -> None:
        """Detach; a second call does nothing. The segment stays. As ``memory.Views.close()``."""
        if self._let_go(defer) and self._member:
            self._member.leave()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.size} bytes{', readonly' if self.readonly else ''}"
        return f"<{type(self).__name__} {self._id} ({shown(self._key)}), {state}>"

    def __reduce__(self) -> "tuple[Any, ...]":
        self._open()
        return type(self).from_id, (self._id, self.readonly)

    def _check(self, rc: int, verb: str) -> None:
        check_known(rc, f"{verb} {self._what}")
