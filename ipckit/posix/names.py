# SPDX-License-Identifier: MIT
"""What the three kinds of named objects share: their names, making or opening one, its record."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import posix_ipc

from ipckit import registry
from ipckit.errors import check

_T = TypeVar("_T")

# The package's OSErrors without an errno, by how they begin; the others mean EMFILE.
_UNNUMBERED = {"Insufficient space": errno.ENOSPC, "The system limit": errno.ENFILE}


def check_name(name: str, longest: int = 255) -> str:
    """Raises: ValueError unless it is a slash and 1 to *longest* bytes that can name a file."""
    rest = os.fsencode(name)[1:]
    if name[:1] != "/" or b"/" in rest or b"\0" in rest or rest in (b"", b".", b".."):
        raise ValueError(f"name must be a slash and a word without slashes, not {name!r}")
    if len(rest) > longest:
        raise ValueError(f"name must have at most {longest} bytes after the slash, not {len(rest)}: {name!r}")
    return name


def check_mode(mode: int) -> int:
    if not 0 <= mode <= 0o777:
        raise ValueError(f"mode must be permission bits from 0 to 0o777, not {mode:#o}")
    return mode


def check_exclusive(create: bool, exclusive: bool) -> None:
    if exclusive and not create:
        raise ValueError("exclusive is for what is to be made: it needs create=True")


def _number(error: Exception, exclusive: bool) -> int:
    """The errno that the package had and does not tell."""
    if isinstance(error, posix_ipc.ExistentialError):
        return errno.EEXIST if exclusive else errno.ENOENT
    if isinstance(error, posix_ipc.PermissionsError):
        return errno.EACCES
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError):
        begins = [number for text, number in _UNNUMBERED.items() if str(error).startswith(text)]
        return error.errno or (begins[0] if begins else errno.EMFILE)
    return errno.EINVAL


@contextmanager
def told(what: str, *, exclusive: bool = False) -> Iterator[None]:
    """The package's exceptions as the OSError of their errno, naming *what*."""
    try:
        yield
    except (posix_ipc.Error, OSError, ValueError, MemoryError) as error:
        number = _number(error, exclusive)
    else:
        return
    check(-number, what)


def make_or_open(
    make: Callable[[], _T], find: Callable[[], _T], create: bool, exclusive: bool
) -> tuple[_T, bool]:
    """What has the name, and whether we made it; whatever others make and remove meanwhile."""
    while True:
        if create:
            try:
                return make(), True
            except FileExistsError:
                if exclusive:
                    raise
        try:
            return find(), False
        except FileNotFoundError:
            if not create:
                raise


def birth(found: os.stat_result) -> str:
    """What tells an object from a later one of the same name."""
    return f"{found.st_dev}.{found.st_ino}"


def record(kind: str, name: str, created: bool, found: os.stat_result) -> registry.Membership:
    return registry.enter(kind, name, created=created, birth=birth(found) if created else "")
