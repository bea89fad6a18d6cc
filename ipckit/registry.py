# SPDX-License-Identifier: MIT
"""Who made and who uses what has a name in the kernel, so that the dead can be told from the living.

A System V queue or a POSIX name outlives the process that made it, and the kernel says neither who
that was nor who still uses it. So every process that makes or opens such a thing through ipckit
leaves a record: what, as what (creator or user), and which process that is, by pid, start time and
pid namespace, which together never mean another one. ``ipckit gc`` judges by these records.

A record is a symbolic link ``/dev/shm/ipckit-<uid>/<kind>@<digest>/<pid>.<start>.<namespace>``, whose
target holds the text: one system call makes it whole, so no kill leaves half of one, and it needs
no space that a full /dev/shm would refuse. The folder, empty, goes with the last process.

Names are recorded for as long as the boot lasts, like the objects themselves.
"""

import atexit
import errno
import fcntl
import functools
import hashlib
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar
from urllib.parse import quote, unquote

from ipckit import _procfs
from ipckit._handles import Rooted, finalizer
from ipckit._unpatched import os, threading, time
from ipckit.errors import check
from ipckit.wait import deadline, remaining

__all__ = [
    "KINDS",
    "Membership",
    "Process",
    "Record",
    "birth_of",
    "cleaning",
    "drop",
    "enter",
    "entering",
    "folder",
    "folders",
    "lives",
    "make_or_open",
    "myself",
    "records",
    "tidy",
]

KINDS = (
    "sysv-queue",
    "sysv-memory",
    "sysv-semaphore",
    "posix-queue",
    "posix-memory",
    "posix-semaphore",
    "memory",
    "queue",
)

_T = TypeVar("_T")

# Beside the objects in /dev/shm, because nothing else is the same for all processes of a user.
_WHERE = "/dev/shm"
_LOCK = "lock"
# These live in an ipc namespace; the others in the file system that the record itself is in.
_OF_IPC_NAMESPACE = ("sysv-queue", "sysv-memory", "sysv-semaphore", "posix-queue")
# The threads that hold the lock alone; they may fork without it.
_cleaners: set[int] = set()
# A cleaner is done within milliseconds; one that was stopped in the middle must not stop everybody.
_PATIENCE = 10.0


# --- processes -----------------------------------------------------------------------------------


class Process(NamedTuple):
    """One process, for ever: no later one has the same three."""

    pid: int
    start: int
    """Clock ticks from boot to its start, as in /proc/PID/stat."""
    namespace: int
    """The inode of its pid namespace."""

    def state(self) -> Literal["alive", "dead", "unknown"]:
        """Whether it lives; unknown when it is of another pid namespace, or /proc is.

        A stopped process lives. One that ended and was not reaped yet is dead: it uses nothing.
        """
        if not _proc_is_ours() or self.namespace != _namespace("pid"):
            return "unknown"
        status = _status(self.pid)
        if status is None:  # gone, or /proc hides it (mount option hidepid)
            return "unknown" if _exists(self.pid) else "dead"
        return "dead" if status.start != self.start or status.ended else "alive"


class _Status(NamedTuple):
    start: int
    ended: bool


def _status(pid: int) -> _Status | None:
    with suppress(OSError):
        return _read_status(pid)
    return None


def _read_status(pid: int) -> _Status:
    text = Path(_procfs.path(f"{pid}/stat")).read_text()
    fields = text.rpartition(")")[2].split()  # what precedes is the name, which may hold anything
    state, threads, start = fields[0], int(fields[17]), int(fields[19])
    # A main thread that ended before the others is shown as a zombie, and the process lives.
    return _Status(start, state in "XZ" and threads <= 1)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def lives(pid: int) -> bool:
    """Whether some process has this number: not proven dead, at least."""
    if not _exists(pid):
        return False
    status = _status(pid) if _proc_is_ours() else None
    return status is None or not status.ended


def _namespace(kind: str) -> int:
    return os.stat(_procfs.path(f"self/ns/{kind}")).st_ino


def _proc_is_ours() -> bool:
    """False where /proc was mounted for another pid namespace and shows other numbers, or not at all."""
    with suppress(OSError):
        return _procfs.own_number() == os.getpid()
    return False


def myself() -> Process:
    """The process that calls, also after fork. Raises: OSError ENOSYS without /proc, EMFILE, ENFILE."""
    return _myself_as(os.getpid())


@functools.lru_cache(1)
def _myself_as(pid: int) -> Process:
    return Process(pid, _read_status(_procfs.own_number()).start, _namespace("pid"))


@functools.lru_cache(1)
def _command(pid: int) -> str:
    return Path(_procfs.path("self/comm")).read_text().strip()


# --- the folder and its lock -----------------------------------------------------------------------


def _path() -> str:
    return f"{_WHERE}/ipckit-{os.geteuid()}"


def _make() -> None:
    with suppress(FileExistsError, FileNotFoundError):  # the latter: its last record went at once
        os.mkdir(_path(), 0o700)
        # Others may look, so that their cleaner sees who uses their objects; only we may write.
        os.chmod(_path(), 0o755)


def _check_folder(create: bool) -> None:
    """Nobody can put another one in the place of a folder that is ours: /dev/shm is sticky."""
    path = _path()
    while True:
        try:
            found = os.lstat(path)
            break
        except FileNotFoundError:
            if not create or not os.path.isdir(_WHERE):
                raise
            _make()
    if not stat.S_ISDIR(found.st_mode):
        check(-errno.ENOTDIR, path)
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        check(-errno.EPERM, f"{path} belongs to user {found.st_uid}, mode {stat.filemode(found.st_mode)}")


def folder() -> int:
    """A descriptor of this user's folder, for ``dir_fd=``; the caller closes it. Call it in entering().

    Raises: PermissionError (EPERM) if somebody else made it, or others may write into it; OSError ENOTDIR
        if it is none; FileNotFoundError (ENOENT) where there is no /dev/shm.
    """
    _check_folder(create=True)
    return os.open(_path(), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _open_lock(create: bool) -> int:
    """The lock file, open; never one that is no longer at its place."""
    while True:
        _check_folder(create)
        try:
            with suppress(FileNotFoundError):
                return os.open(f"{_path()}/{_LOCK}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            if not create:
                check(-errno.ENOENT, f"{_path()}/{_LOCK}")
            _make_lock()
        except OSError:
            with suppress(OSError):  # not empty, or gone
                os.rmdir(_path())
            raise


def _make_lock() -> None:
    path = f"{_path()}/{_LOCK}"
    with suppress(FileNotFoundError):  # the folder went
        os.close(os.open(path, os.O_CREAT | os.O_NOFOLLOW | os.O_RDONLY | os.O_CLOEXEC, 0o600))
        os.chmod(path, 0o600)  # whatever the umask


def _locked(operation: int, until: int, what: str = "") -> int:
    """A descriptor that holds the lock; closing it gives it back. The error names *what* it was for.

    Only a cleaner holds it alone, for milliseconds: so trying again and again costs nobody much,
    and unlike a blocking flock it can end.
    """
    while True:
        fd = _open_lock(create=True)
        try:
            while not _try_lock(fd, operation):
                if remaining(until) == 0:
                    check(-errno.ETIMEDOUT, f"{what}lock of {_path()}, which another process holds")
                time.sleep(0.001)
            if os.fstat(fd).st_nlink:  # else it went with its folder while we waited
                held, fd = fd, -1
                return held
        finally:
            if fd >= 0:
                os.close(fd)


def _try_lock(fd: int, operation: int) -> bool:
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def entering(what: str = "") -> Iterator[None]:
    """Make or open an object, and record it, inside this: no cleaner comes in between.

    Args: what: the object, for the error.
    Raises: TimeoutError (ETIMEDOUT) if a cleaner held the lock for 10 seconds; what folder() raises; OSError
        ENOSYS without /proc, before anything is made.
    """
    _procfs.own_number()
    _tidy_at_exit()
    held = _locked(fcntl.LOCK_SH, deadline(_PATIENCE), what and f"{what}: ")
    try:
        yield
    finally:
        os.close(held)


@contextmanager
def cleaning(*, timeout: float | None = _PATIENCE) -> Iterator[None]:
    """Judge and remove inside this: nobody of this user makes or opens anything meanwhile.

    Raises: TimeoutError (ETIMEDOUT) if the lock could not be had for *timeout* seconds.
    """
    held = _locked(fcntl.LOCK_EX, deadline(timeout))
    _cleaners.add(threading.get_ident())
    try:
        _sweep()
        yield
    finally:
        _cleaners.discard(threading.get_ident())
        os.close(held)
        tidy()


@functools.lru_cache
def _tidy_at_exit() -> None:
    atexit.register(tidy)


def tidy() -> None:
    """Remove this user's folder if nothing but the lock is left in it, and nobody holds that.

    Done when a process ends, and by cleaning(): to make the folder anew for each object would take
    longer than the object. Raises: nothing; what can't be removed stays.
    """
    with suppress(OSError):
        if os.stat(_path()).st_nlink > 2 or os.listdir(_path()) != [_LOCK]:  # 2: no folder in it
            return
        held = _open_lock(create=False)
        try:
            if _try_lock(held, fcntl.LOCK_EX) and os.fstat(held).st_nlink and os.listdir(_path()) == [_LOCK]:
                os.unlink(f"{_path()}/{_LOCK}")
                with suppress(OSError):  # somebody made the next lock already
                    os.rmdir(_path())
        finally:
            os.close(held)


def _sweep() -> None:
    """Remove what a process left that was killed in the middle of recording."""
    for entry in os.scandir(_path()):
        if not entry.is_dir(follow_symlinks=False):
            continue
        for name in os.listdir(entry.path):
            pid, start, namespace, *unfinished = name.split(".")
            if unfinished and Process(int(pid), int(start), int(namespace)).state() == "dead":
                os.unlink(f"{entry.path}/{name}")
        _close_place(entry.path)


# --- records ---------------------------------------------------------------------------------------


class Record(NamedTuple):
    """What one process left about one object."""

    kind: str
    ident: str
    """The System V id, or the name."""
    birth: str
    """What tells the object from a later one with the same id or name; empty in what a user of a System V
    object recorded."""
    role: Literal["creator", "user"]
    left: bool
    """Its process closed the object in good order, and left it for others."""
    process: Process
    uid: int
    time: float
    """Seconds since the epoch."""
    command: str
    path: str
    """Of the record itself."""


def _space(kind: str) -> int:
    """In which of several worlds an object of this kind has its name."""
    return _namespace("ipc") if kind in _OF_IPC_NAMESPACE else 0


def _place(kind: str, ident: str, birth: str, space: int) -> str:
    """The folder of an object's records; its name is as long for a short name as for a long one.

    A later object of the same name has another, so that its records don't go with those of the first.
    System V ids aren't used again, and what is the birth of such a thing changes.
    """
    which = f"{space} {ident}" if kind.startswith("sysv") else f"{birth} {space} {ident}"
    digest = hashlib.sha256(which.encode(errors="surrogateescape")).hexdigest()[:16]
    return f"{_path()}/{kind}@{digest}"


def _parse(path: str, kind: str, uid: int) -> Record | None:
    """A record; None for what is none, is gone, or is of an object that isn't in our namespace."""
    try:
        text = os.readlink(path)
        pid, start, namespace = map(int, os.path.basename(path).split("."))
        version, role, left, when, space, birth, ident, command = text.split(" ")
        if version != "1" or kind not in KINDS or role not in ("creator", "user"):
            return None
        if int(space) != _space(kind):
            return None
        return Record(
            kind,
            unquote(ident, errors="surrogateescape"),
            "" if birth == "-" else birth,
            "creator" if role == "creator" else "user",
            left == "1",
            Process(pid, start, namespace),
            uid,
            float(when),
            unquote(command),
            path,
        )
    except (OSError, ValueError):
        return None


def folders() -> Iterator[tuple[str, int]]:
    """The folders of all users, each with its owner; not those that somebody made in another's name."""
    for entry in os.scandir(_WHERE):
        uid = entry.name.removeprefix("ipckit-")
        if uid == entry.name or not uid.isdecimal():
            continue
        with suppress(OSError):
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode) and found.st_uid == int(uid) and not found.st_mode & 0o022:
                yield entry.path, int(uid)


def records() -> list[Record]:
    """Every record on this machine that can be read, of objects that can be reached from here.

    That is: of this ipc namespace and this /dev/shm; other users' too.
    """
    found = []
    for path, uid in folders():
        with suppress(OSError):
            for entry in os.scandir(path):
                kind = entry.name.partition("@")[0]
                if not entry.is_dir(follow_symlinks=False):
                    continue
                with suppress(OSError):
                    found += [_parse(f"{entry.path}/{name}", kind, uid) for name in os.listdir(entry.path)]
    return [record for record in found if record]


def drop(record: Record) -> None:
    """Remove a record, whose object is gone. Does nothing if it went already."""
    with suppress(FileNotFoundError):
        os.unlink(record.path)
    _close_place(os.path.dirname(record.path))


def _close_place(place: str) -> bool:
    """Remove the folder of an object without records. False if there are some."""
    try:
        os.rmdir(place)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EPERM, errno.EACCES):
            raise
        return False
    return True


def _empty(place: str) -> None:
    """Remove the records of other processes, of which most often there are none."""
    with suppress(FileNotFoundError):
        for name in os.listdir(place):
            with suppress(FileNotFoundError, PermissionError):
                os.unlink(f"{place}/{name}")
    _close_place(place)


def _replace(path: str, text: str) -> None:
    """The record at *path* says *text* from now on, at no moment anything else or nothing."""
    try:
        return os.symlink(text, path)
    except FileExistsError:
        new = f"{path}.{threading.get_ident()}"  # never parsed: a record's name has three parts
    os.symlink(text, new)
    os.rename(new, path)


def _write(place: str, name: str, text: str) -> None:
    while True:
        with suppress(FileExistsError, FileNotFoundError):  # the latter: others closed it at once
            os.mkdir(place, 0o700)
            os.chmod(place, 0o755)
        try:
            return _replace(f"{place}/{name}", text)
        except FileNotFoundError:
            if not os.path.isdir(os.path.dirname(place)):
                raise
        except OSError:
            _close_place(place)
            raise


# --- what this process has ---------------------------------------------------------------------------


class _Entry:
    """This process's record of one object, however many handles it has of it."""

    def __init__(self, kind: str, ident: str, birth: str, created: bool) -> None:
        self.kind, self.ident, self.birth = kind, ident, birth
        self.role: Literal["creator", "user"] = "creator" if created else "user"
        self.time = time.time()
        self.handles = 0

    def text(self, space: int, left: bool) -> str:
        """What _parse() reads; under 128 bytes it takes no page of the file system."""
        ident, command = quote(os.fsencode(self.ident)), quote(_command(os.getpid()), safe="")
        return f"1 {self.role} {int(left)} {self.time:.3f} {space} {self.birth or '-'} {ident} {command}"

    def write(self, left: bool = False) -> None:
        space = _space(self.kind)
        self.place = _place(self.kind, self.ident, self.birth, space)
        self.name = "{}.{}.{}".format(*myself())
        _write(self.place, self.name, self.text(space, left))

    def exists(self) -> bool:
        return os.path.lexists(f"{self.place}/{self.name}")

    def erase(self) -> bool:
        """Remove the record. True if that was the last of the object."""
        with suppress(FileNotFoundError, PermissionError):  # the latter after setuid()
            os.unlink(f"{self.place}/{self.name}")
        return _close_place(self.place)


_entries: dict[tuple[str, str, str], _Entry] = {}
_guard = threading.RLock()  # taken after the lock, where both are


class Membership(Rooted):
    """One handle's part in the record of its object. Made by enter()."""

    _entry: _Entry | None = None

    def __init__(self, entry: _Entry) -> None:
        self._entry = entry  # None once the object was removed
        self._left = False

    def leave(self) -> None:
        """The handle was closed in good order. Idempotent.

        The last handle of a user takes the record with it; that of the creator leaves word that the
        object was left on purpose.
        """
        with _guard:
            entry, left, self._left = self._entry, self._left, True
            if entry is None or left or not _give_up(entry):
                return
            if entry.role == "user":
                entry.erase()
            elif entry.exists():  # else somebody removed the object, and all about it
                with suppress(FileNotFoundError, PermissionError):
                    entry.write(left=True)

    @finalizer
    def __del__(self) -> None:
        # Dropped without close(): the record stays, but children don't get what is no longer there.
        with _guard:
            if self._entry is not None and not self._left:
                self._entry.handles -= 1

    def forget(self) -> None:
        """The object was removed: every process's record of it goes, also after leave(). Idempotent."""
        with _guard:
            entry, self._entry = self._entry, None
            if entry is None:
                return
            _entries.pop(_key(entry.kind, entry.ident, entry.birth), None)
            if not entry.erase():
                _empty(entry.place)

    def refresh(self, birth: str) -> None:
        """The object's change time is another now, by our own doing: *birth* follows it.

        The creator's record is rewritten, whichever process of this user that was.
        """
        with _guard:
            entry = self._entry
            if entry is None:
                return
            if entry.role == "creator":
                entry.birth = birth
                return entry.write()
            for name in os.listdir(entry.place):
                _rewrite_birth(f"{entry.place}/{name}", birth)


def _rewrite_birth(path: str, birth: str) -> None:
    with suppress(FileNotFoundError):
        fields = os.readlink(path).split(" ")
        if fields[1] == "creator":
            fields[5] = birth or "-"
            _replace(path, " ".join(fields))


def _give_up(entry: _Entry) -> bool:
    """One handle less; True if it was the last of this process."""
    entry.handles -= 1
    key = _key(entry.kind, entry.ident, entry.birth)
    if entry.handles > 0 or _entries.get(key) is not entry:
        return False
    del _entries[key]
    return True


def _key(kind: str, ident: str, birth: str) -> tuple[str, str, str]:
    """What is one object: of System V the id alone, since the birth changes."""
    return kind, ident, "" if kind.startswith("sysv") else birth


def birth_of(found: os.stat_result) -> str:
    """What tells an object with a descriptor or path from a later one of the same name."""
    return f"{found.st_dev}.{found.st_ino}"


def make_or_open(
    make: Callable[[], _T], find: Callable[[], _T], create: bool, exclusive: bool
) -> tuple[_T, bool]:
    """What has the name, and whether we made it; whatever others make and remove meanwhile."""
    while True:
        if not exclusive:
            try:
                return find(), False
            except FileNotFoundError:
                if not create:
                    raise
        try:
            return make(), True
        except FileExistsError:
            if exclusive:
                raise


def enter(kind: str, ident: str, *, created: bool, birth: str = "") -> Membership:
    """Record that this process made (*created*) or opened an object. Call it inside entering().

    Args: kind: one of KINDS. ident: the System V id in decimal, or the name. birth: what tells the
        object from a later one with the same id or name, without spaces: device and inode; of a System V
        object its change time, and only from its creator.
    Returns: what the handle keeps, and tells when it is closed or the object removed.
    Raises: what folder() raises; OSError ENOSPC if the file system has no inode left.
    Fork: a child has the handles too, so it is recorded as a user before fork() returns in it.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    with _guard:
        entry = _entries.get(_key(kind, ident, birth))
        if entry is None or created:
            entry = _Entry(kind, ident, birth, created)
            entry.write()
            _entries[_key(kind, ident, birth)] = entry
        elif not entry.exists():  # somebody removed the records by mistake
            entry.write()
        entry.handles += 1
        return Membership(entry)


# --- fork --------------------------------------------------------------------------------------------

# The lock is held, shared, from before the fork until the child is recorded: it belongs to the open
# file, which both have, so no cleaner can find a child that uses an object and isn't recorded yet.
_forking: list[int] = []


def _before_fork() -> None:
    try:
        if any(entry.handles > 0 for entry in _entries.values()) and threading.get_ident() not in _cleaners:
            _forking.append(_locked(fcntl.LOCK_SH, deadline(_PATIENCE)))
    finally:
        _guard.acquire()


def _after_fork_in_parent() -> None:
    while _forking:
        os.close(_forking.pop())
    _guard.release()


def _after_fork_in_child() -> None:
    global _guard  # noqa: PLW0603 - its owner is the thread that forked, which is another one here
    _guard = threading.RLock()
    try:
        for entry in [entry for entry in _entries.values() if entry.handles > 0]:
            entry.role, entry.time = "user", time.time()
            if entry.kind.startswith("sysv"):
                entry.birth = ""
            entry.write()
    finally:
        while _forking:
            os.close(_forking.pop())


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)
