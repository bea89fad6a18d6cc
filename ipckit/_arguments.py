# SPDX-License-Identifier: MIT
"""What every verb of every room takes: integers, seconds, permissions, descriptors, buffers.

One function each, and for what is compiled the same ones, so that a wrong argument gets one answer
everywhere: its class, the name of the parameter and the value.

===========  ==========================================  ==================================================
an argument  is                                          or else
===========  ==========================================  ==================================================
integer      what has ``__index__``, and no bool         TypeError; ValueError out of its range
seconds      what has ``__float__`` or ``__index__``;    TypeError; ValueError for nan, and below 0 (where
             None and a century and more are for ever    multiprocessing is stood in for, that is 0)
data         bytes-like, C-contiguous; no references     TypeError; BufferError for what is not contiguous
             to Python objects (numpy's dtype object)
a target     the same, writable                          the same; TypeError for what is read-only
===========  ==========================================  ==================================================
"""

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from ipckit._hot import as_bytes, check_buffer, deadline, integer, seconds, seconds_left
from ipckit._native import ffi

__all__ = [
    "INT_MAX",
    "LONG_MAX",
    "Buffer",
    "Descriptor",
    "HasFileno",
    "as_bytes",
    "check_buffer",
    "deadline",
    "duration",
    "fileno_of",
    "integer",
    "most_of",
    "nanoseconds",
    "permissions",
    "pin",
    "seconds",
    "seconds_left",
    "user",
]

if TYPE_CHECKING:
    from typing_extensions import Buffer as Buffer  # noqa: PLC0414 - other rooms have it from here
else:
    Buffer = object

INT_MAX = (1 << 31) - 1
LONG_MAX = (1 << 63) - 1


class HasFileno(Protocol):
    def fileno(self) -> int: ...


Descriptor = int | HasFileno


def fileno_of(fd: Descriptor, name: str = "fd") -> int:
    """The number of a descriptor or of what has one. Raises: as integer()."""
    if type(fd) is not int and hasattr(fd, "fileno"):
        fd = fd.fileno()
    return integer(fd, name, -INT_MAX - 1, INT_MAX)


def permissions(mode: int, name: str = "mode") -> int:
    """*mode*, which is permission bits and nothing else. Raises: as integer()."""
    number = integer(mode, name)
    if not 0 <= number <= 0o777:
        raise ValueError(f"{name} must be permission bits from 0 to 0o777, not {number:#o}")
    return number


def duration(value: float | None, name: str) -> float:
    """Seconds that are more than 0; inf for ever. Raises: as seconds(); ValueError for 0."""
    limit = seconds(value, name)
    if limit == 0:
        raise ValueError(f"{name} must be None or more than 0 seconds, not {value!r}")
    return limit


def nanoseconds(limit: float) -> int:
    """Of a duration(), at least 1; 0 for ever."""
    return 0 if limit == math.inf else max(1, int(limit * 1e9))


def user(uid: int | None, name: str) -> int | None:
    """The number of a user or group; None is left. Raises: as integer()."""
    return None if uid is None else integer(uid, name, 0, (1 << 32) - 2)


def most_of(max: int | None) -> int | None:
    """The ``max`` of a recv_many(). Raises: as integer(), for less than 1."""
    return None if max is None else integer(max, "max", 1, LONG_MAX)


def pin(data: Buffer, pinned: ExitStack, writable: bool, name: str = "data") -> Any:
    """A cffi view of *data*, which can't be resized until *pinned* closes. Raises: as check_buffer()."""
    check_buffer(data, name, writable)
    return pinned.enter_context(ffi.from_buffer(data, require_writable=writable))
