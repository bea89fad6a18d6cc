# SPDX-License-Identifier: MIT
"""Shared memory between processes, for buffers and numpy arrays: a sealed memfd, or a named file.

Memory without a name is the default: it goes with its last user, whatever happens to whom, and nobody can
shrink it under the others. It reaches other processes by fork, by pickling to the children of
multiprocessing, or as a descriptor over a Unix socket (``sockets.send_fds``).

All memory is allocated when it is made, so what is missing is an OSError then and not a SIGBUS later.
Nothing here blocks. Any thread, and children after fork, may use a handle; what the bytes mean, and who
may write when, is the users' business.
"""

import errno
import math
import mmap
import os
import sys
from typing import TYPE_CHECKING, Any

from ipckit.errors import Closed, check

__all__ = ["Mapping", "allocate"]

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self

# The map would else hold a duplicate of the descriptor; before 3.13 it always does.
_UNTRACKED: "dict[str, Any]" = {"trackfd": False} if sys.version_info >= (3, 13) else {}

_STEP = 2 << 20
_LARGE = 64 << 20


class Mapping:
    """A descriptor of memory, its size, and one mapping of it that lives as long as any view of it.

    Base of this room's SharedMemory and of the posix room's. A Mapping owns *fd* once it is made; if that
    fails, the caller still does.

    Args: fd: of a memory object of at least *size* bytes. what: names it in errors. readonly: map it
        without the right to write.
    Raises: OSError ENOMEM: no address space; EACCES: *fd* may not be written through; ENFILE, EMFILE.
    """

    size: int
    """bytes asked for when it was made, not rounded"""
    readonly: bool
    """views can't be written to"""

    _fd: int = -1
    _map: "mmap.mmap | None" = None

    def __init__(self, fd: int, size: int, what: str, *, readonly: bool = False) -> None:
        self.size = size
        self.readonly = readonly
        self._what = what
        protection = mmap.PROT_READ if readonly else mmap.PROT_READ | mmap.PROT_WRITE
        try:
            self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, protection, **_UNTRACKED)
        except OSError as error:
            check(-(error.errno or errno.EIO), f"mapping {what}")
        self._fd = fd

    @property
    def buf(self) -> memoryview:
        """A new view of all the bytes. Raises: Closed."""
        return memoryview(self._mapped())

    def asarray(
        self, dtype: "np.typing.DTypeLike", shape: "int | tuple[int, ...] | None" = None, offset: int = 0
    ) -> "np.ndarray[Any, Any]":
        """A numpy array over the memory, from byte *offset* on; nothing is copied.

        The memory begins at a page: an array at a multiple of 64 is aligned to 64 bytes.

        Args: shape: None for one dimension up to the end. offset: bytes, a multiple of the dtype's alignment.
        Raises: ValueError if that does not fit, is not aligned, or *dtype* is no plain value;
            ImportError without numpy; Closed.
        """
        try:
            import numpy as np
        except ImportError:
            raise ImportError("asarray() needs numpy: pip install 'ipckit-unix[numpy]'") from None
        kind = np.dtype(dtype)
        wanted = f"{kind} {'to the end' if shape is None else shape} at {offset} of {self._what}"
        if kind.hasobject or kind.itemsize == 0:
            raise ValueError(f"{wanted}: only plain values of a fixed size can be shared")
        if offset < 0 or offset % kind.alignment:
            raise ValueError(f"{wanted}: the offset must be a multiple of {kind.alignment}")
        dimensions = (shape,) if isinstance(shape, int) else shape
        try:
            # Not ndarray(buffer=), which would not hold the mapping.
            flat = np.frombuffer(self.buf, kind, -1 if dimensions is None else math.prod(dimensions), offset)
            return flat if dimensions is None else flat.reshape(dimensions)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{wanted}: {error}") from None

    def fileno(self) -> int:
        """The descriptor, to be sent or inherited; close-on-exec. Raises: Closed."""
        self._mapped()
        return self._fd

    def readonly_fd(self) -> int:
        """A new descriptor, owned by the caller, through which the memory can be read and not written.

        write(2), a writable mapping and mprotect(2) are refused to who gets it (EBADF, EACCES). A process
        of the same user, or root, could still open the memory anew through /proc; another user can't.

        Raises: OSError as open(2), ENOENT without /proc; Closed. Linux only.
        """
        return os.open(f"/proc/self/fd/{self.fileno()}", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def closed(self) -> bool:
        return self._map is None

    def close(self, *, defer: bool = False) -> None:
        """End this handle's use of the memory; a second call does nothing.

        Args: defer: if views live (of ``buf``, slices, arrays), the mapping goes with the last of them, and
            only the handle and its descriptor now.
        Raises: BufferError if views live and *defer* is false; nothing is closed then.
        """
        if self._map is not None and not defer:
            try:
                self._map.close()
            except BufferError:
                raise BufferError(
                    f"{self._what} still has views or arrays; delete them, or close(defer=True)"
                ) from None
        self._map = None
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exc: object) -> None:
        # The block's own variables may be views; an error here would be one of every second program.
        self.close(defer=True)

    def __del__(self) -> None:
        Mapping.close(self, defer=True)

    def __repr__(self) -> str:
        state = "closed" if self.closed else "readonly" if self.readonly else f"descriptor {self._fd}"
        return f"<{type(self).__name__} {self._what}, {state}>"

    def __reduce__(self) -> "tuple[Any, ...]":
        raise TypeError(f"{self._what} can't be pickled")

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            raise Closed(f"{self._what} is closed")
        return self._map


# --- making memory -------------------------------------------------------------------------------


def allocate(fd: int, size: int, what: str) -> None:
    """Give the new memory object *fd* its size, and all its pages now; block while the kernel clears them.

    Raises: ValueError for a size below 1; OSError ENOMEM for more than this machine has, ENOSPC for more
        than its file system has, EFBIG beyond RLIMIT_FSIZE, each with the size. See posix_fallocate(3).
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 byte, not {size}")
    _refuse_the_impossible(size, what)
    try:
        # In steps: the kernel gives up all of an interrupted call, so that one call for the whole might
        # never end in a process with a fast timer.
        for start in range(0, size, _STEP):
            os.posix_fallocate(fd, start, min(_STEP, size - start))
    except OSError as error:
        os.ftruncate(fd, 0)
        room = os.fstatvfs(fd)
        left = f": {room.f_bavail * room.f_frsize} bytes are free" if error.errno == errno.ENOSPC else ""
        check(-(error.errno or errno.EIO), what + left)


def _refuse_the_impossible(size: int, what: str) -> None:
    """Memory without a limit of its own is allocated until the kernel kills somebody for it."""
    if size < _LARGE:
        return
    with open("/proc/meminfo") as file:
        kib = {line.split(":")[0]: int(line.split()[1]) for line in file}
    available = (kib["MemAvailable"] + kib["SwapFree"]) * 1024
    if size > available:
        check(-errno.ENOMEM, f"{what}: {available} bytes of memory are available")
