# SPDX-License-Identifier: MIT
"""What this machine holds that has a name in the kernel, who uses it, and what nobody will miss.

System V queues, segments and semaphores, POSIX queues, segments and semaphores, and the named memory and
queues of ipckit: each with a verdict.

=========== ==========================================================================================
verdict     means
=========== ==========================================================================================
``live``    a living process uses it: its record says so, or the kernel (attached, open, mapped, waiting)
``orphan``  ipckit made it; all its users ended, one at least without closing it; the kernel knows of none
``foreign`` another user's
``unknown`` none of these is proven
=========== ==========================================================================================

Only ``orphan`` is removed unasked. What isn't proven dead counts as in use: a stopped process lives,
and so may one of another pid namespace.
"""

import errno
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from ipckit import _procfs, limits, registry
from ipckit._native import ffi, lib
from ipckit._unpatched import os
from ipckit.errors import check
from ipckit.registry import Record

__all__ = ["Object", "collect", "objects", "remove", "unlisted"]

Verdict = Literal["live", "orphan", "foreign", "unknown"]

_MEMORY = "/dev/shm"
_TABLES = {"sysv-queue": "msg", "sysv-memory": "shm", "sysv-semaphore": "sem"}  # in /proc/sysvipc
_REMOVED_BY = {
    "sysv-queue": lib.ik_sysv_queue_remove,
    "sysv-memory": lib.ik_sysv_memory_remove,
    "sysv-semaphore": lib.ik_sysv_semaphore_remove,
}
_OWN = ("memory", "queue")  # files of ipckit itself, in the folder of the registry
_SHM_DEST = 0o1000
_LEFT = "left by its maker, who closed it"
_UNRECORDED = "left by its maker, who was killed before it was recorded"


@dataclass(frozen=True)
class Object:
    """One object, as it was when it was looked at."""

    kind: str
    """One of ``registry.KINDS``."""
    ident: str
    """The System V id, or the name."""
    key: int | None
    """The System V key, 0 for IPC_PRIVATE; None for what is no System V object."""
    uid: int
    """Its owner."""
    mode: int
    """Its permission bits."""
    size: int
    """Bytes: of the segment, or waiting in the queue; of a System V semaphore set its semaphores."""
    users: int
    """Living processes that are known to use it."""
    creator: int | None
    """The pid of the process that made it, where that is known."""
    created: float | None
    """Seconds since the epoch; if ipckit didn't make it, when its owner or mode last changed."""
    active: float | None
    """Seconds since the epoch: last sent, received, attached, detached or waited; None if never, or for
    what the kernel keeps no time of."""
    verdict: Verdict
    why: str
    """For people."""
    left: bool
    """Its maker closed it in good order and ended, like every other user: ``collect(dead=True)``. Or it
    is named memory or a queue, so made by ipckit, whose maker was killed before it was recorded."""
    birth: str = field(repr=False)
    """What tells it from a later one with the same id or name."""

    @property
    def id(self) -> str:
        """As ``ipckit ls`` prints it and ``ipckit rm`` takes it: ``sysv-queue:5``, ``posix-queue:/jobs``."""
        whose = f"{self.uid}/" if self.kind in _OWN and self.uid != os.geteuid() else ""
        return f"{self.kind}:{whose}{self.ident}"


@dataclass
class _Found:
    """An object as the kernel shows it, before it is judged."""

    kind: str
    ident: str
    uid: int
    mode: int
    size: int
    birth: str
    created: float | None
    active: float | None
    key: int | None = None
    creator: int | None = None
    pids: set[int] = field(default_factory=set)  # living processes that the kernel shows as users
    held: int = 0  # attached or waiting, whoever that is
    removed: bool = False  # and there until the last user lets go
    blind: str = ""  # why there may be users whom the kernel doesn't show
    place: tuple[int, int] | None = None  # device and inode, of what has a descriptor


# --- System V -------------------------------------------------------------------------------------


def _rows(kind: str, ident: str | None = None) -> Iterator[dict[str, int]]:
    """Those of this ipc namespace, also who may not be read; only the one called *ident* if given."""
    with suppress(FileNotFoundError):  # a kernel without System V
        head, *lines = Path(_procfs.path("sysvipc"), _TABLES[kind]).read_text().splitlines()
        for words in map(str.split, lines):
            if ident in (None, words[1]):
                row = zip(head.split(), words, strict=True)
                yield {name: int(word, 8 if name == "perms" else 10) for name, word in row}


def _living(*pids: int) -> set[int]:
    return {pid for pid in pids if pid and registry.lives(pid)}


def _system_v(kind: str, row: dict[str, int], size: int, *times: int) -> _Found:
    _, ident, *_ = map(str, row.values())  # key and id come first, whatever the latter is called
    last = max(times, default=0) or None
    return _Found(
        kind, ident, row["uid"], row["perms"] & 0o777, size, str(row["ctime"]), row["ctime"], last, row["key"]
    )


def _queues() -> Iterator[_Found]:
    for row in _rows("sysv-queue"):
        found = _system_v("sysv-queue", row, row["cbytes"], row["stime"], row["rtime"])
        found.pids = _living(row["lspid"], row["lrpid"])
        if (row["stime"] and not row["lspid"]) or (row["rtime"] and not row["lrpid"]):
            found.blind = "last used from another pid namespace"
        yield found


def _segments() -> Iterator[_Found]:
    for row in _rows("sysv-memory"):
        found = _system_v("sysv-memory", row, row["size"], row["atime"], row["dtime"])
        found.creator, found.held = row["cpid"] or None, row["nattch"]
        found.removed = bool(row["perms"] & _SHM_DEST)
        yield found


def _semaphores() -> Iterator[_Found]:
    for row in _rows("sysv-semaphore"):
        found = _system_v("sysv-semaphore", row, row["nsems"], row["otime"])
        pids = ffi.new("int[]", row["nsems"])
        found.held = lib.ik_inventory_semaphore_pids(row["semid"], pids, row["nsems"])
        found.pids = _living(*pids)
        if found.held < 0:
            found.held, found.blind = 0, "its last users can't be read"
        elif row["otime"] and 0 in list(pids):
            found.blind = "last used from another pid namespace"
        yield found


# --- POSIX, and our own ---------------------------------------------------------------------------


def _file(kind: str, ident: str, status: os.stat_result) -> _Found:
    place = (status.st_dev, status.st_ino)
    mode, birth = stat.S_IMODE(status.st_mode), registry.birth_of(status)
    return _Found(kind, ident, status.st_uid, mode, status.st_size, birth, status.st_ctime, None, place=place)


def unlisted() -> str | None:
    """Why objects() can't list every POSIX queue, in a line; None if it can."""
    with limits.queue_folder() as folder:
        if folder >= 0 or folder == -errno.ENODEV:  # the latter: a kernel without them
            return None
    why = "shows those of another ipc namespace" if folder == -errno.EXDEV else "is not mounted"
    return (
        f"POSIX queues that ipckit didn't make are not listed: /dev/mqueue {why}"
        " (root does it with: mkdir -p /dev/mqueue && mount -t mqueue none /dev/mqueue)"
    )


def _posix_queue(name: str, fd: int) -> _Found:
    """The queue that *fd* has open; closes it."""
    try:
        status = os.fstat(fd)
        found = _file("posix-queue", name, status)
        found.size = int(os.read(fd, 100).split()[0].removeprefix(b"QSIZE:"))
        # The kernel sets all three times at each message, so none of them says when it was made.
        found.created, found.active = None, status.st_mtime
        return found
    finally:
        os.close(fd)


def _recorded_queues() -> Iterator[str]:
    yield from (record.ident for record in registry.records() if record.kind == "posix-queue")


def _posix_queues(known: Iterable[str]) -> Iterator[_Found]:
    """All that can be seen; without a folder, those of the *known* names."""
    with limits.queue_folder() as folder:
        for name in [f"/{name}" for name in os.listdir(folder)] if folder >= 0 else sorted({*known}):
            fd = lib.ik_inventory_queue_open(os.fsencode(name))
            if fd >= 0:
                yield _posix_queue(name, fd)
            elif folder >= 0:
                with suppress(FileNotFoundError):
                    found = _file("posix-queue", name, os.stat(name[1:], dir_fd=folder))
                    found.size, found.created = 0, None  # both can't be read
                    yield found


def _files(path: str) -> Iterator[tuple[str, os.stat_result]]:
    with suppress(FileNotFoundError, PermissionError):
        for name in os.listdir(path):
            with suppress(FileNotFoundError):
                status = os.lstat(f"{path}/{name}")
                if stat.S_ISREG(status.st_mode):
                    yield name, status


def _shared_files() -> Iterator[_Found]:
    for name, status in _files(_MEMORY):
        if name.startswith("sem."):
            yield _file("posix-semaphore", f"/{name[4:]}", status)
        else:
            yield _file("posix-memory", f"/{name}", status)


def _own_files() -> Iterator[_Found]:
    for path, uid in registry.folders():
        for name, status in _files(path):
            kind, _, ident = name.partition(".")
            if kind in _OWN and status.st_uid == uid:
                yield _file(kind, ident, status)


# --- who has them open ----------------------------------------------------------------------------

_MAPPING = re.compile(r"^\S+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) (\d+) +(/SYSV)?", re.MULTILINE)


def _open_files(pid: str) -> Iterator[tuple[int, int]]:
    folder = _procfs.path(f"{pid}/fd")
    for name in os.listdir(folder):
        path = f"{folder}/{name}"
        with suppress(FileNotFoundError):
            if os.readlink(path).startswith("/"):  # sockets, pipes and the like are quick to tell
                with suppress(OSError):  # of a file system that refuses even root, so none of ours
                    status = os.stat(path)
                    yield status.st_dev, status.st_ino


def _mapped(pid: str) -> Iterator[tuple[int, int] | str]:
    """Device and inode of what is mapped; of System V segments the id, which stands for the inode."""
    lines = Path(_procfs.path(f"{pid}/maps")).read_text(errors="replace")
    for major, minor, inode, segment in _MAPPING.findall(lines):
        yield inode if segment else (os.makedev(int(major, 16), int(minor, 16)), int(inode))


def _holders() -> tuple[dict[tuple[int, int] | str, set[int]], bool]:
    """Who has what open or mapped, and whether every process could be looked at."""
    held: dict[tuple[int, int] | str, set[int]] = defaultdict(set)
    whole = os.geteuid() == 0  # /proc may hide processes from others altogether
    for pid in filter(str.isdecimal, os.listdir(_procfs.path(""))):
        try:
            for what in (*_open_files(pid), *_mapped(pid)):
                held[what].add(int(pid))
        except PermissionError:
            whole = False
        except (FileNotFoundError, ProcessLookupError):
            continue
    return held, whole


def _add_holders(found: list[_Found]) -> None:
    concerned = [item for item in found if item.place or (item.kind == "sysv-memory" and item.held)]
    if not concerned:
        return
    holders, whole = _holders()
    for item in concerned:
        item.pids |= holders.get(item.place or item.ident, set())
        if item.place and item.mode & 0o077 and not whole:
            item.blind = "open to other users, whose processes can't be looked at"


# --- the verdict ----------------------------------------------------------------------------------

_Key = tuple[str, str, int]


class _Use(NamedTuple):
    """A record, and what became of its process."""

    record: Record
    state: Literal["alive", "dead", "unknown"]


def _key(kind: str, ident: str, uid: int) -> _Key:
    """What a record and its object have in common; each user has memory names of his own."""
    return kind, ident, uid if kind in _OWN else -1


def _uses() -> dict[_Key, list[_Use]]:
    uses: dict[_Key, list[_Use]] = defaultdict(list)
    states: dict[registry.Process, Literal["alive", "dead", "unknown"]] = {}
    for record in registry.records():
        if record.process not in states:
            states[record.process] = record.process.state()
        uses[_key(record.kind, record.ident, record.uid)].append(_Use(record, states[record.process]))
    return uses


def _uses_of(item: "_Found | Object", uses: dict[_Key, list[_Use]]) -> list[_Use]:
    """Those of this very object; a System V object's birth changes, and who only uses it doesn't know it."""
    return [
        use
        for use in uses.get(_key(item.kind, item.ident, item.uid), [])
        if item.kind in _TABLES or use.record.birth in ("", item.birth)
    ]


def _people(pids: Iterable[int]) -> str:
    first, *rest = sorted(pids)
    return f"pid {first}" + (f" and {len(rest)} more" if rest else "")


def _judge(found: _Found, uses: list[_Use], users: set[int]) -> tuple[Verdict, str]:
    if found.uid != os.geteuid():
        return "foreign", f"belongs to user {found.uid}"
    if users or found.held:
        who = _people(users) if users else "processes that can't be seen"
        return "live", f"{'removed, but still ' if found.removed else ''}used by {who}"
    if any(use.state == "unknown" for use in uses):
        return "unknown", "used in another pid namespace, where somebody may live"
    if found.blind:
        return "unknown", found.blind
    return _judge_unused(found, uses)


def _judge_unused(found: _Found, uses: list[_Use]) -> tuple[Verdict, str]:
    """All who had it were asked, and none lives and has it."""
    # Only what its owner wrote proves anything: others may claim what they like.
    own = [use for use in uses if use.record.uid == found.uid]
    makers = [use for use in own if use.record.role == "creator"]
    maker = next((use for use in makers if use.record.birth == found.birth), None)
    if not makers and found.kind in _OWN:  # in our own folder, so ours all the same
        return "unknown", _UNRECORDED
    if maker is None:
        return "unknown", "successor of one that ipckit made" if makers else "not made by ipckit"
    if maker.state == "alive":
        return "unknown", f"closed by its maker, pid {maker.record.process.pid}, who lives"
    # What was recorded before it was made is about a former object of that name.
    killed = [use for use in own if not use.record.left and use.record.time >= maker.record.time]
    if not killed:
        return "unknown", _LEFT
    last = max(killed, key=lambda use: use.record.time).record
    return "orphan", f"pid {last.process.pid} ({last.command}) never closed it"


def _object(found: _Found, uses: list[_Use]) -> Object:
    having = {use.record.process.pid for use in uses if use.state == "alive" and not use.record.left}
    users = having | found.pids
    verdict, why = _judge(found, uses, users)
    makers = [use.record for use in uses if use.record.role == "creator"]
    maker = next((record for record in makers if record.birth == found.birth), None)
    return Object(
        kind=found.kind,
        ident=found.ident,
        key=found.key,
        uid=found.uid,
        mode=found.mode,
        size=found.size,
        users=len(users) or found.held,
        creator=maker.process.pid if maker else found.creator,
        created=maker.time if maker else found.created,
        active=found.active,
        verdict=verdict,
        why=why,
        left=why in (_LEFT, _UNRECORDED),
        birth=found.birth,
    )


def _survey() -> tuple[list[Object], dict[_Key, list[_Use]]]:
    found = [*_queues(), *_segments(), *_semaphores()]
    found += [*_posix_queues(_recorded_queues()), *_shared_files(), *_own_files()]
    _add_holders(found)
    uses = _uses()  # last: who opens one of them while we look has recorded that by now
    return sorted((_object(item, _uses_of(item, uses)) for item in found), key=_order), uses


def _order(obj: Object) -> tuple[int, int, str]:
    return registry.KINDS.index(obj.kind), int(obj.ident) if obj.kind in _TABLES else 0, obj.ident


def objects() -> list[Object]:
    """Every named object that can be seen from here: of this ipc namespace and this /dev/shm.

    Nothing is changed. Blocks for as long as it takes to read /proc. See unlisted() for what isn't seen.

    Returns: by kind in the order of ``registry.KINDS``, then by id or name.
    See sysvipc(7), mq_overview(7), shm_overview(7), sem_overview(7), proc_sysvipc(5).
    """
    return _survey()[0]


# --- removing -------------------------------------------------------------------------------------


@contextmanager
def _cleaning(timeout: float | None) -> Iterator[None]:
    try:
        with registry.cleaning(timeout=timeout):
            yield
    except TimeoutError as error:
        error.filename = f"{error.filename}; it is held by {_lock_holders()}"
        raise


def _lock_holders() -> str:
    pids: set[int] = set()
    with suppress(FileNotFoundError):  # it went meanwhile
        inode = os.stat(f"{_MEMORY}/ipckit-{os.geteuid()}/lock").st_ino
        lines = [line.split() for line in Path(_procfs.path("locks")).read_text().splitlines()]
        pids = {int(words[4]) for words in lines if words[1] == "FLOCK" and words[5].endswith(f":{inode}")}
    return _people(pids) if pids else "a process that can't be seen"


def _path(obj: Object) -> str:
    if obj.kind in _OWN:
        return f"{_MEMORY}/ipckit-{obj.uid}/{obj.kind}.{obj.ident}"
    return f"{_MEMORY}/{'sem.' if obj.kind == 'posix-semaphore' else ''}{obj.ident[1:]}"


def _birth_now(obj: Object) -> str:
    if obj.kind in _TABLES:
        for row in _rows(obj.kind, obj.ident):
            return str(row["ctime"]) if row["key"] == obj.key else ""
        check(-errno.ENOENT, obj.id)
    if obj.kind == "posix-queue":
        for found in _posix_queues([obj.ident]):
            if found.ident == obj.ident:
                return found.birth
        check(-errno.ENOENT, obj.id)
    return registry.birth_of(os.lstat(_path(obj)))


def _remove(obj: Object, uses: dict[_Key, list[_Use]]) -> None:
    if obj.uid != os.geteuid():
        check(-errno.EPERM, f"{obj.id} belongs to user {obj.uid}, who alone may remove it")
    if _birth_now(obj) != obj.birth:
        check(-errno.ESTALE, f"{obj.id} is another object by now")
    if obj.kind in _TABLES:
        check(_REMOVED_BY[obj.kind](int(obj.ident)), obj.id)
    elif obj.kind == "posix-queue":
        check(lib.ik_inventory_queue_unlink(os.fsencode(obj.ident)), obj.id)
    else:
        os.unlink(_path(obj))
        _remove_bells(obj.uid)
    for use in _uses_of(obj, uses):
        _drop(use.record)


def _remove_bells(uid: int) -> None:
    """Those of queues that are gone, or were never made: see queues.py."""
    folder = f"{_MEMORY}/ipckit-{uid}"
    names = os.listdir(folder)
    queues = {os.lstat(f"{folder}/{name}").st_ino for name in names if name.startswith("queue.")}
    for name in names:
        if name.startswith("bell.") and int(name.split(".")[1]) not in queues:
            os.unlink(f"{folder}/{name}")


def _drop(record: Record) -> None:
    if record.uid == os.geteuid():  # others' are theirs to drop
        registry.drop(record)


def remove(obj: Object, *, timeout: float | None = 10.0) -> None:
    """Remove an object of this user, whoever uses it: a segment that is attached or open lives on until
    the last user lets go of it, a queue or semaphore of System V is gone at once (EIDRM for its users).

    Blocks while another process of this user makes or opens something through ipckit.

    Args: obj: as objects() gave it; if it is another one by now, that one stays. timeout: seconds.
    Raises: PermissionError (EPERM) if it is another user's, for root too; FileNotFoundError (ENOENT) if it
        went already; OSError ESTALE if its id or name, or its settings, are another's by now;
        TimeoutError (ETIMEDOUT) naming who keeps the registry locked.
    See ipcrm(1), shmctl(2), mq_unlink(3), shm_unlink(3), sem_unlink(3).
    """
    with _cleaning(timeout):
        _remove(obj, _uses())


def _attached(obj: Object) -> bool:
    return obj.kind == "sysv-memory" and any(row["nattch"] for row in _rows(obj.kind, obj.ident))


def _removed(obj: Object, uses: dict[_Key, list[_Use]]) -> bool:
    """Remove what was judged a moment ago, unless that is past."""
    try:
        if _attached(obj):
            return False
        _remove(obj, uses)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINVAL, errno.EIDRM, errno.ESTALE):
            raise
        return False
    return True


def _exists(name: str) -> bool:
    """Whether there is such a POSIX queue, also where they can't be listed."""
    fd: int = lib.ik_inventory_queue_open(os.fsencode(name))
    if fd >= 0:
        os.close(fd)
    return fd != -errno.ENOENT


def _forget_gone(found: list[Object], uses: dict[_Key, list[_Use]]) -> None:
    """Drop what the dead recorded about objects that are gone."""
    there = {_key(obj.kind, obj.ident, obj.uid): obj for obj in found}
    for key, all_of_name in uses.items():
        obj = there.get(key)
        if obj is None and key[0] == "posix-queue" and _exists(key[1]):
            continue  # it isn't ours to read
        about_it = [] if obj is None else _uses_of(obj, uses)
        for use in all_of_name:
            if use.state == "dead" and use not in about_it:
                _drop(use.record)


def collect(*, dead: bool = False, dry_run: bool = False, timeout: float | None = 10.0) -> list[Object]:
    """Remove this user's orphans, and what the dead recorded about objects that are gone.

    Blocks as remove() does; meanwhile nobody of this user makes or opens anything through ipckit.

    Args: dead: also what was left in good order by users who all ended (``left``). dry_run: change nothing.
        timeout: seconds to wait for the registry's lock.
    Returns: what was removed, or would be.
    Raises: TimeoutError (ETIMEDOUT) naming who keeps the registry locked; OSError of what can't be removed.
    """
    with _cleaning(timeout):
        found, uses = _survey()
        doomed = [obj for obj in found if obj.verdict == "orphan" or (dead and obj.left)]
        if dry_run:
            return doomed
        doomed = [obj for obj in doomed if _removed(obj, uses)]
        _remove_bells(os.geteuid())
        _forget_gone(found, uses)
        return doomed
