# SPDX-License-Identifier: MIT
"""Shared memory between processes, for buffers and numpy arrays: a sealed memfd, or a named file.

Memory without a name is the default: it goes with its last user, whatever happens to whom, and nobody can
shrink it under the others. It reaches other processes by fork, by pickling to the children of
multiprocessing, or as a descriptor over a Unix socket (``sockets.send_fds``).

All memory is allocated when it is made, so what is missing is an OSError then and not a SIGBUS later.
Nothing here blocks, but for the clearing of new pages, and what has a name for a cleaner of the registry
(10 s at most). Any thread, and children after fork, may use a handle; what the bytes mean, and who may
write when, is the users' business.
"""

import errno
import fcntl
import math
import mmap
import re
import stat
import sys
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ipckit import _procfs, registry
from ipckit._arguments import INT_MAX, LONG_MAX, integer
from ipckit._handles import check_starting, finalizer
from ipckit._unpatched import os
from ipckit.errors import Closed, check

__all__ = [
    "Mapping",
    "SharedMemory",
    "Views",
    "allocate",
    "check_file",
    "check_name",
    "check_regular",
    "fault_in",
    "look_at",
    "naming",
    "open_seen",
    "unlink_file",
    "unnamed",
]

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self

# The map would else hold a duplicate of the descriptor; before 3.13 it always does.
_UNTRACKED: "dict[str, Any]" = {"trackfd": False} if sys.version_info >= (3, 13) else {}

_STEP = 2 << 20
_LARGE = 64 << 20
_SMALL = 2 << 20
_MADV_POPULATE_WRITE = 23  # in mmap from Python 3.14 on


class naming:
    """The OSError of a bare system call, told again with what it was about.

    Not contextlib's, whose errors are cycles in 3.13, which would keep a dropped handle from going.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: "BaseException | None", trace: object) -> None:
        if isinstance(error, OSError) and error.errno:  # a signal handler's own may have none
            check(-error.errno, self.what)


def fault_in(pages: "mmap.mmap", start: int, size: int) -> None:
    """Have the pages of small new memory at once, and not one by one as they are touched.

    Who makes it most likely fills it. What is large may be meant to stay mostly empty.
    """
    if size <= _SMALL:
        with suppress(OSError):  # before Linux 5.14; or there is no memory, which shows later
            pages.madvise(_MADV_POPULATE_WRITE, start, size)


class Views:
    """Mapped memory that lives as long as any view of it: what all rooms' SharedMemory is.

    The pages are an mmap object that is never closed: it goes by itself with the last that refers to it,
    also with a numpy array which the object's own count of exports knows nothing of.
    """

    size: int
    """bytes asked for when it was made, not rounded"""
    readonly: bool
    """views can't be written to"""

    _what: str
    _pages: "mmap.mmap | None" = None
    _start = 0  # of the memory, in the pages

    @property
    def buf(self) -> memoryview:
        """A new view of all the bytes. Raises: Closed."""
        return memoryview(self._open())[self._start : self._start + self.size]

    def asarray(
        self, dtype: "np.typing.DTypeLike", shape: "int | Iterable[int] | None" = None, offset: int = 0
    ) -> "np.ndarray[Any, Any]":
        """A numpy array over the memory, from byte *offset* on; nothing is copied.

        The memory begins at a page: an array at a multiple of 64 is aligned to 64 bytes.

        Args: shape: None for one dimension up to the end; -1 in it as for reshape(). offset: bytes, a
            multiple of the dtype's alignment.
        Raises: ValueError if that does not fit, is not aligned, or *dtype* is no plain value;
            ImportError without numpy; Closed.
        """
        try:
            import numpy as np
        except ImportError:
            raise ImportError("asarray() needs numpy: pip install numpy") from None
        view, kind, offset = self.buf, np.dtype(dtype), integer(offset, "offset", -LONG_MAX, LONG_MAX)
        wanted = f"{kind} {'to the end' if shape is None else shape} at {offset} of {self._what}"
        if kind.hasobject or kind.itemsize == 0:
            raise ValueError(f"{wanted}: only plain values of a fixed size can be shared")
        if offset < 0 or offset % kind.alignment:
            raise ValueError(f"{wanted}: the offset must be a multiple of {kind.alignment}")
        dimensions = None if shape is None else _dimensions(shape)
        try:
            count = -1 if dimensions is None else max(-1, math.prod(dimensions))
            flat = np.frombuffer(view, kind, count, offset)  # not ndarray(buffer=), which holds no view
            return flat if dimensions is None else flat.reshape(dimensions)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{wanted}: {error}") from None

    @property
    def closed(self) -> bool:
        return self._pages is None

    def _open(self) -> "mmap.mmap":
        pages = self._pages
        if pages is None:
            raise Closed(f"{self._what} is closed")
        return pages

    def _let_go(self, defer: bool) -> bool:
        """Unmap, or with *defer* leave that to the last view. False if it was done before."""
        pages, self._pages = self._pages, None
        if pages is None:
            return False
        viewed = weakref.ref(pages)
        del pages
        if not defer:
            self._pages = viewed()
            if self._pages is not None:
                raise BufferError(
                    f"{self._what} still has views or arrays; delete them, or close(defer=True)"
                )
        return True

    def close(self, *, defer: bool = False) -> None:
        """End this handle's use of the memory; a second call does nothing.

        Args: defer: if views live (of ``buf``, slices, arrays), the mapping goes with the last of them, and
            only the handle now.
        Raises: BufferError if views live and *defer* is false; nothing is closed then, but another thread
            that used the handle at that moment may have got Closed.
        """
        self._let_go(defer)

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exc: object) -> None:
        # The block's own variables may be views; an error here would be one of every second program.
        self.close(defer=True)


def _dimensions(shape: "int | Iterable[int]") -> "tuple[int, ...]":
    numbers = shape if isinstance(shape, Iterable) else [shape]
    return tuple(integer(each, "shape", -LONG_MAX, LONG_MAX) for each in numbers)


class Mapping(Views):
    """A descriptor of memory, its size, and one mapping of it.

    Base of this room's SharedMemory and of the posix room's. A Mapping owns *fd* once it is made; if that
    fails, the caller still does.

    Args: fd: of a memory object of at least *size* bytes. what: names it in errors. readonly: map it
        without the right to write.
    Raises: OSError ENOMEM: no address space; EACCES: *fd* may not be written through; ENFILE, EMFILE.
    """

    _fd: int = -1

    def __init__(self, fd: int, size: int, what: str, *, readonly: bool = False) -> None:
        self.size = size
        self.readonly = readonly
        self._what = what
        protection = mmap.PROT_READ if readonly else mmap.PROT_READ | mmap.PROT_WRITE
        with naming(f"mapping {what}"):
            self._pages = mmap.mmap(fd, size, mmap.MAP_SHARED, protection, **_UNTRACKED)
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor, to be sent or inherited; close-on-exec. Raises: Closed."""
        fd = self._fd
        if fd < 0:
            raise Closed(f"{self._what} is closed")
        return fd

    def readonly_fd(self) -> int:
        """A new descriptor, owned by the caller, through which the memory can be read and not written.

        write(2), a writable mapping and mprotect(2) are refused to who gets it (EBADF, EACCES). A process
        of the same user, or root, could still open the memory anew through /proc; another user can't.

        Raises: OSError as open(2), ENOSYS without /proc; Closed. Linux only.
        """
        return os.open(_procfs.path(f"self/fd/{self.fileno()}"), os.O_RDONLY | os.O_CLOEXEC)

    def close(self, *, defer: bool = False) -> None:
        """As Views.close(); the descriptor is closed now in any case."""
        self._let_go(defer)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = finalizer(lambda self: Mapping.close(self, defer=True))

    def __repr__(self) -> str:
        state = "closed" if self.closed else "readonly" if self.readonly else f"descriptor {self._fd}"
        return f"<{type(self).__name__} {self._what}, {state}>"

    def __reduce__(self) -> "tuple[Any, ...]":
        raise TypeError(f"{type(self).__name__}: {self._what} can't be pickled")


# --- making memory -------------------------------------------------------------------------------


def allocate(fd: int, size: int, what: str) -> None:
    """Give the new memory object *fd* its size, and all its pages now; block while the kernel clears them.

    Raises: OSError ENOMEM for more than this machine has, ENOSPC for more than its file system has, EFBIG
        beyond RLIMIT_FSIZE, each with the size. See posix_fallocate(3).
    """
    _refuse_the_impossible(size, what)
    try:
        # In steps, between which signal handlers run: some kernels don't let a signal interrupt the call,
        # others then give up all of it, so that one for the whole might never end beside a fast timer.
        for start in range(0, size, _STEP):
            with naming(what):
                os.posix_fallocate(fd, start, min(_STEP, size - start))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.ftruncate(fd, 0)
        room = os.fstatvfs(fd)
        check(-errno.ENOSPC, f"{what}: {room.f_bavail * room.f_frsize} bytes are free")


def _refuse_the_impossible(size: int, what: str) -> None:
    """Memory without a limit of its own is allocated until the kernel kills somebody for it."""
    if size < _LARGE:
        return
    if size > (available := _available()):
        check(-errno.ENOMEM, f"{what}: {available} bytes of memory are available")


def _available() -> int:
    """Bytes of memory that can be had now; without /proc what the machine has."""
    try:
        with open(_procfs.path("meminfo")) as file:
            kib = {line.split(":")[0]: int(line.split()[1]) for line in file}
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    return (kib["MemAvailable"] + kib["SwapFree"]) * 1024


# --- the memory itself ---------------------------------------------------------------------------

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_MFD_NOEXEC_SEAL = 8  # Linux 6.3; where vm.memfd_noexec is 2, the kernel insists on it
_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")


class SharedMemory(Mapping):
    """Memory that several processes see at once. The arguments are those of the sysv and posix rooms.

    - ``SharedMemory(size)``: new, without a name; sealed against shrinking and growing.
    - ``SharedMemory(size, name="frames", create=True)``: opened, or made if there is none; with
      ``exclusive=True`` made, or FileExistsError. Nobody ever sees a half-made one.
    - ``SharedMemory(name="frames")``: opened.

    What has a name is a file of this user alone (mode 0600), kept until unlink() or the end of the boot. It
    can't be sealed: a process of the same user that truncates it makes the others die of SIGBUS.

    Args: size: bytes, kept exactly; of memory that is opened, what it must have. name: 1 to 200 letters,
        digits, ``.``, ``_`` and ``-``. readonly: open it without the right to write.
    Raises: ValueError for a wrong name, size or combination; FileNotFoundError (ENOENT), FileExistsError
        (EEXIST); OSError ENOSPC, ENOMEM, EFBIG if there is not so much memory; EMFILE, ENFILE; for what has
        the name as check_file(), and TimeoutError (ETIMEDOUT) if the registry was locked for 10 s.
    Fork: the child has it too. Pickle: to children of multiprocessing as they start; with a name, anywhere.
    See memfd_create(2), F_ADD_SEALS in fcntl(2), shm_overview(7).
    """

    name: "str | None" = None
    """None for memory without one"""

    _member: "registry.Membership | None" = None
    _birth = ""

    def __init__(
        self,
        size: "int | None" = None,
        *,
        name: "str | None" = None,
        create: bool = False,
        exclusive: bool = False,
        readonly: bool = False,
    ) -> None:
        if readonly and (create or name is None):
            raise ValueError("new memory can't be readonly: nobody could fill it; see readonly_fd()")
        if exclusive and not create:
            raise ValueError("exclusive is for memory to be made: it needs create=True")
        size = None if size is None else integer(size, "size", 1)
        if name is None:
            self._make(size)
        else:
            check_name(name)
            with registry.entering(f"memory segment {name!r}"):
                self._enter(name, size, create, exclusive, readonly)

    def _make(self, size: "int | None") -> None:
        if size is None:
            raise ValueError("memory without a name needs a size")
        what = f"anonymous memory of {size} bytes"
        fd = _sealed(size, what)
        self._own(fd, size, what)
        fault_in(self._open(), 0, size)

    def _own(self, fd: int, size: int, what: str, *, readonly: bool = False) -> None:
        try:
            Mapping.__init__(self, fd, size, what, readonly=readonly)
        except BaseException:
            os.close(fd)
            raise

    def _enter(self, name: str, size: "int | None", create: bool, exclusive: bool, readonly: bool) -> None:
        """Open or make what has the *name*, and record it."""
        what = f"memory segment {name!r}"
        at = registry.folder()
        try:
            fd, created = registry.make_or_open(
                lambda: _create(at, name, size, what),
                lambda: _open(at, name, size, readonly, what),
                create,
                exclusive,
            )
            try:
                found = os.fstat(fd)
                self._own(fd, found.st_size, what, readonly=readonly)
                self.name, self._birth = name, registry.birth_of(found)
                if created:
                    fault_in(self._open(), 0, self.size)
                self._record(created)
            except BaseException:
                if created:
                    os.unlink(_file(name), dir_fd=at)
                Mapping.close(self)
                raise
        finally:
            os.close(at)

    def _record(self, created: bool) -> None:
        assert self.name is not None
        self._member = registry.enter("memory", self.name, created=created, birth=self._birth)

    @classmethod
    def from_fd(
        cls, fd: int, *, size: "int | None" = None, readonly: bool = False, unsealed: bool = False
    ) -> "Self":
        """Memory by a descriptor that came from somewhere: examined before it is mapped.

        *fd* is taken over in any case: if it is refused, it is closed.

        Args: size: what it must have; None for any. readonly: map it without the right to write; else *fd*
            must allow it. unsealed: take also what a peer could truncate, which then ends this process by
            SIGBUS: any file, at your own risk.
        Raises: ValueError if it is not memory sealed against shrinking and growing, can't be written, or has
            another size than *size* or none; OSError EBADF; as Mapping, EPERM for a seal against writing.
        """
        fd = integer(fd, "fd", 0, INT_MAX)
        what = f"descriptor {fd}"
        with naming(what):
            found = os.fstat(fd)
        try:
            _examine(fd, found, readonly, unsealed)
            _has_size(found, size, what)
        except BaseException:
            os.close(fd)
            raise
        self = cls.__new__(cls)
        self._own(fd, found.st_size, f"memory of {found.st_size} bytes by {what}", readonly=readonly)
        return self

    def unlink(self) -> None:
        """Give up the name: nobody can open it any more. Who has the memory keeps it.

        Also after close(). Memory that was made later under the same name is told from this one, and stays.

        Raises: FileNotFoundError (ENOENT) if the name is gone, or is that of later memory; BlockingIOError
            (EAGAIN) if another process is unlinking it at this moment; ValueError without a name.
        """
        if self.name is None:
            raise ValueError(f"{self._what} has no name to unlink")
        with registry.entering(self._what):
            at = registry.folder()
            try:
                unlink_file(at, _file(self.name), self._birth, self._what)
            finally:
                os.close(at)
            if self._member is not None:
                self._member.forget()

    def close(self, *, defer: bool = False) -> None:
        """End this handle's use of the memory; what has a name stays. As Mapping.close()."""
        super().close(defer=defer)
        if self._member is not None:
            self._member.leave()

    def __reduce__(self) -> "tuple[Any, ...]":
        from multiprocessing import context, reduction

        fd = self.fileno()
        if self.name is None:
            check_starting(
                f"{type(self).__name__}: {self._what}",
                "send fileno() with sockets.send_fds(), or give it a name",
            )
        if context.get_spawning_popen() is not None:
            return _inherited, (reduction.DupFd(fd), self.size, self.readonly, self.name)
        return _reopened, (self.name, self.readonly, self._birth)


def _inherited(duplicate: Any, size: int, readonly: bool, name: "str | None") -> SharedMemory:
    fd = duplicate.detach()
    os.set_inheritable(fd, False)
    memory = SharedMemory.from_fd(fd, size=size, readonly=readonly, unsealed=name is not None)
    if name is not None:
        memory.name, memory._what = name, f"memory segment {name!r}"
        with registry.entering(memory._what):
            found = os.fstat(fd)
            memory._birth = registry.birth_of(found)
            if found.st_nlink:  # else it was unlinked meanwhile
                memory._record(False)
    return memory


def _reopened(name: str, readonly: bool, birth: str) -> SharedMemory:
    memory = SharedMemory(name=name, readonly=readonly)
    if memory._birth != birth:
        memory.close()
        check(-errno.ENOENT, f"memory segment {name!r} that was pickled; the name is that of later memory")
    return memory


def _file(name: str) -> str:
    return f"memory.{name}"


def _sealed(size: int, what: str) -> int:
    """A new memfd of *size* bytes that nobody can truncate any more."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    with naming(what):
        try:
            fd = os.memfd_create("ipckit", flags | _MFD_NOEXEC_SEAL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fd = os.memfd_create("ipckit", flags)
    try:
        # Born for everybody: who gets it read-only could else open it anew for writing, whatever his user.
        os.fchmod(fd, 0o600)
        allocate(fd, size, what)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _create(at: int, name: str, size: "int | None", what: str) -> int:
    """Named when it is whole, so that nobody finds it half-made."""
    if size is None:
        raise ValueError(f"{what} can't be made without a size")
    fd = unnamed(at, size, what)
    try:
        whole = _procfs.path(f"self/fd/{fd}")
        with naming(what):
            os.link(whole, _file(name), dst_dir_fd=at)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open(at: int, name: str, size: "int | None", readonly: bool, what: str) -> int:
    seen, found = look_at(at, _file(name), what)
    try:
        _has_size(found, size, what)
        return open_seen(seen, os.O_RDONLY if readonly else os.O_RDWR, what)
    finally:
        os.close(seen)


# --- files in a folder ---------------------------------------------------------------------------


def check_name(name: str) -> None:
    """Raises: ValueError for what can't be the name of a thing of ours."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"name must be 1 to 200 letters, digits and ._-, not {name!r}")


def unnamed(at: int, size: int, what: str) -> int:
    """A new file of the folder *at*, without a name yet, allocated. Its descriptor is the caller's."""
    with naming(what):
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=at)
    try:
        os.fchmod(fd, 0o600)  # whatever the umask
        allocate(fd, size, f"{what} of {size} bytes")
    except BaseException:
        os.close(fd)
        raise
    return fd


def look_at(at: int, file: str, what: str) -> "tuple[int, os.stat_result]":
    """A descriptor for open_seen(), owned by the caller, and what it is of: a file that check_file() passes.

    Looked at before it is opened: opening a pipe or a device can do something to it.
    """
    with naming(what):
        seen = os.open(file, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    try:
        found = os.fstat(seen)
        check_file(found, what)
    except BaseException:
        os.close(seen)
        raise
    return seen, found


def open_seen(seen: int, flags: int, what: str) -> int:
    """Open the very file that look_at() saw."""
    file = _procfs.path(f"self/fd/{seen}")
    with naming(what):
        return os.open(file, flags | os.O_CLOEXEC)


def unlink_file(at: int, file: str, birth: str, what: str) -> os.stat_result:
    """Remove the name *file* if it still is that of what was born as *birth*. Call it in entering().

    Whoever unlinks that holds its lock, so nobody takes away its name, and gives it to another, in between.

    Returns: what it was.
    Raises: FileNotFoundError (ENOENT) if the name is gone, or another's; BlockingIOError (EAGAIN) if another
        process is unlinking it at this moment.
    """
    with naming(what):
        seen = os.open(file, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    try:
        if registry.birth_of(os.fstat(seen)) != birth:
            check(-errno.ENOENT, f"{what}, whose name is that of a later one now")
        guard = open_seen(seen, os.O_RDONLY, what)  # an open file of our own: a lock belongs to that
    finally:
        os.close(seen)
    try:
        with naming(what):
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.fstat(guard)
            if found.st_nlink == 0:
                check(-errno.ENOENT)
            os.unlink(file, dir_fd=at)
    finally:
        os.close(guard)
    return found


# --- what is not ours is not used ----------------------------------------------------------------


def check_regular(found: os.stat_result, what: str) -> None:
    """Raises: OSError ELOOP, EISDIR, EINVAL for a symbolic link, a folder, and what else is no file."""
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        number = {stat.S_IFLNK: errno.ELOOP, stat.S_IFDIR: errno.EISDIR}.get(kind, errno.EINVAL)
        check(-number, f"{what} is no file, but {stat.filemode(found.st_mode)}")


def check_file(found: os.stat_result, what: str) -> None:
    """Refuse a file that somebody else may have put there, or may write into.

    Raises: as check_regular(); FileNotFoundError (ENOENT) if it was unlinked; PermissionError (EPERM) if
        it is not this user's, has more names than one, or may be written by others.
    """
    mode, links = found.st_mode, found.st_nlink
    check_regular(found, what)
    if links == 0:
        check(-errno.ENOENT, what)
    if found.st_uid != os.geteuid():
        check(-errno.EPERM, f"{what} belongs to user {found.st_uid}, not to {os.geteuid()}")
    if links != 1:
        check(-errno.EPERM, f"{what} has {links} names (hard links)")
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        check(-errno.EPERM, f"{what} may be written by others: {stat.filemode(mode)}")


def _has_size(found: os.stat_result, size: "int | None", what: str) -> None:
    if found.st_size == 0:
        raise ValueError(f"{what} is empty")
    if size is not None and found.st_size != integer(size, "size"):
        raise ValueError(f"{what} has {found.st_size} bytes, not {size}")


def _examine(fd: int, found: os.stat_result, readonly: bool, unsealed: bool) -> None:
    """Refuse a received descriptor that is not safe to map."""
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"descriptor {fd} is no memory, but {stat.filemode(found.st_mode)}")
    if not unsealed and _seals(fd) & _SEALS != _SEALS:
        raise ValueError(
            f"descriptor {fd} is not sealed against shrinking and growing: "
            "who sent it could end this process; unsealed=True takes that risk"
        )
    if not unsealed and os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
        raise ValueError(
            f"descriptor {fd} is of huge pages, which a peer can take away; unsealed=True takes it"
        )
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    if not readonly and mode != os.O_RDWR:
        raise ValueError(f"descriptor {fd} can't be both read and written; readonly=True takes it to read")


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # EINVAL: a file system that knows no seals
        return 0
