# SPDX-License-Identifier: MIT
"""Scatter and gather: read into, or write from, many buffers in one system call. See readv(2).

Any object with the buffer protocol will do (bytes, bytearray, memoryview, array, mmap, numpy
arrays, ...) as long as it is C-contiguous; what is read into must be writable. Nothing is copied:
the kernel gets the addresses.

All calls drop the GIL, work in any thread and after fork.
"""

import errno
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from ipckit._arguments import INT_MAX, LONG_MAX, Buffer, Descriptor, check_buffer, fileno_of, integer, pin
from ipckit._native import ffi, lib
from ipckit._unpatched import os
from ipckit.errors import check
from ipckit.wait import deadline

__all__ = ["preadv", "pwritev", "readv", "readv_exact", "writev", "writev_all"]

_IOV_MAX = os.sysconf("SC_IOV_MAX")


def _iovec(buffers: Sequence[Buffer], pinned: ExitStack, writable: bool) -> Any:
    """The iovec array of *buffers*, which stay pinned (can't be resized) until *pinned* closes."""
    iov = ffi.new("ik_iovec[]", len(buffers))
    for entry, buffer in zip(iov, buffers):  # noqa: B905 - one is made from the other
        entry.base = view = pin(buffer, pinned, writable, "buffers")
        entry.len = len(view)
    return iov


def _once(call: Callable[..., int], fd: Descriptor, buffers: Iterable[Buffer], *where: int) -> int:
    """One system call by the standard library's function, which pins buffers at a tenth of our cost."""
    number, items = fileno_of(fd), list(buffers)[:_IOV_MAX]
    plain, writable = (bytearray, True) if call in (os.readv, os.preadv) else (bytes, False)
    for item in items:
        if type(item) is not plain:
            check_buffer(item, "buffers", writable)
    try:
        return call(number, items, *where)
    except OSError as error:
        return check(-(error.errno or errno.EIO), f"{call.__name__} on descriptor {number}")


def _where(offset: int, flags: int) -> tuple[int, int]:
    """A place in a file, and the flags of preadv2(2). Raises: as integer()."""
    return integer(offset, "offset", 0, LONG_MAX), integer(flags, "flags", -INT_MAX - 1, INT_MAX)


def readv(fd: Descriptor, buffers: Iterable[Buffer]) -> int:
    """Fill *buffers* one after the other with what one read gives; block until there is something.

    Args: fd: a descriptor, or an object with ``fileno()``. buffers: writable; at most the first
        IOV_MAX (1,024 on Linux) are filled by one call.
    Returns: bytes read, which may be fewer than fit; 0 at end of file.
    Raises: TypeError for a read-only buffer, or one of Python objects; BufferError for one with gaps;
        BlockingIOError (EAGAIN) if *fd* is non-blocking and empty; OSError EBADF and what else read(2) gives.
    Signals: their Python handlers run, then the call goes on (PEP 475). See readv(2).
    """
    return _once(os.readv, fd, buffers)


def writev(fd: Descriptor, buffers: Iterable[Buffer]) -> int:
    """Write *buffers* one after the other by one write; block until something could be written.

    Returns: bytes written, which may be fewer than given (writev_all() goes on).
    Raises: BrokenPipeError (EPIPE), BlockingIOError (EAGAIN), what else write(2) gives.
    See writev(2).
    """
    return _once(os.writev, fd, buffers)


def preadv(fd: Descriptor, buffers: Iterable[Buffer], offset: int, flags: int = 0) -> int:
    """As readv(), from *offset* bytes into the file; the file's own position stays.

    Args: flags: ``os.RWF_HIPRI``, ``os.RWF_NOWAIT``, ... or 0.
    Raises: as readv(); OSError ESPIPE if *fd* can't seek, EOPNOTSUPP for flags unknown to the kernel;
        ValueError for a negative offset. See preadv2(2).
    """
    return _once(os.preadv, fd, buffers, *_where(offset, flags))


def pwritev(fd: Descriptor, buffers: Iterable[Buffer], offset: int, flags: int = 0) -> int:
    """As writev(), to *offset* bytes into the file; the file's own position stays.

    Args: flags: ``os.RWF_DSYNC``, ``os.RWF_SYNC``, ``os.RWF_APPEND``, ... or 0.
    Raises: as writev(); ESPIPE, EOPNOTSUPP and ValueError as preadv(). See pwritev2(2).
    """
    return _once(os.pwritev, fd, buffers, *_where(offset, flags))


def _whole(
    call: Any, verb: str, number: int, buffers: Sequence[Buffer], timeout: float | None, moved: int = 0
) -> int:
    """Move the whole of *buffers*, before which *moved* bytes went already."""
    deadline_ns = deadline(timeout)
    if timeout is not None and os.get_blocking(number):
        raise ValueError(f"a timeout needs a non-blocking descriptor, and {number} is a blocking one")
    with ExitStack() as pinned:
        iov = _iovec(buffers, pinned, call is lib.ik_vectored_read_exact)
        wanted: int = moved + sum(entry.len for entry in iov)
        transfer = ffi.new("ik_transfer *", {"iov": iov, "count": len(buffers), "moved": moved})
        while True:
            rc = call(number, transfer, deadline_ns)
            if rc == -errno.EINTR:
                continue
            if rc == -errno.ENODATA:
                raise EOFError(f"end of file on descriptor {number} after {transfer.moved} of {wanted} bytes")
            check(rc, f"{verb} on descriptor {number}, after {transfer.moved} of {wanted} bytes")
            return wanted


def readv_exact(fd: Descriptor, buffers: Iterable[Buffer], *, timeout: float | None = None) -> int:
    """Fill all of *buffers*, however many reads that takes; any number of buffers.

    Args: timeout: seconds for the whole; only for a non-blocking descriptor, because a read from a
        blocking one can't be bounded.
    Returns: the total size of *buffers*, in bytes.
    Raises: EOFError saying how many bytes came before the end of file; TimeoutError (ETIMEDOUT),
        likewise; TypeError for a read-only buffer; ValueError for a timeout on a blocking descriptor.
    See readv(2).
    """
    return _whole(lib.ik_vectored_read_exact, "readv_exact", fileno_of(fd), list(buffers), timeout)


def _rest(items: list[bytes], moved: int) -> list[Buffer]:
    """What is left of *items* after *moved* bytes of them."""
    first = 0
    while moved >= len(items[first]):
        moved -= len(items[first])
        first += 1
    return [memoryview(items[first])[moved:], *items[first + 1 :]]


def writev_all(fd: Descriptor, buffers: Iterable[Buffer], *, timeout: float | None = None) -> int:
    """Write all of *buffers*, however many writes that takes; any number of buffers.

    Other writers of the same pipe or file may come in between two of those writes.

    Args: timeout: as readv_exact().
    Returns: the total size of *buffers*, in bytes.
    Raises: BrokenPipeError (EPIPE), TimeoutError (ETIMEDOUT), each saying how many bytes went.
    See writev(2).
    """
    number, items = fileno_of(fd), list(buffers)
    moved = 0
    if timeout is None and len(items) <= _IOV_MAX and {*map(type, items)} <= {bytes, bytearray}:
        plain: list[bytes] = items  # type: ignore[assignment]
        with suppress(OSError):  # it comes again below, and is told of there
            moved = os.writev(number, plain)  # most often that is all
        if moved == sum(map(len, plain)):
            return moved
        items = _rest(plain, moved)
    return _whole(lib.ik_vectored_write_all, "writev_all", number, items, timeout, moved)
