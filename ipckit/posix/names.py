# SPDX-License-Identifier: MIT
"""What the three kinds of named objects share: their names, the package's errors, whose a file is."""

import errno

import posix_ipc

from ipckit._unpatched import os
from ipckit.errors import check
from ipckit.memory import check_regular

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


class told:
    """The package's exceptions, and bare OSErrors, as the OSError of their errno, naming *what*.

    Not contextlib's, whose errors are cycles in 3.13, which would keep a dropped handle from going.
    """

    def __init__(self, what: str, *, exclusive: bool = False) -> None:
        self.what, self.exclusive = what, exclusive

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (posix_ipc.Error, OSError, ValueError, MemoryError)):
            check(-_number(error, self.exclusive), self.what)


def look(path: str, owner: int | None, what: str) -> os.stat_result:
    """The file in /dev/shm that a name of the C library's stands for, before it is opened.

    Raises: FileNotFoundError (ENOENT); as check_file().
    """
    with told(what):
        found = os.stat(path, follow_symlinks=False)
    check_file(found, owner, what)
    return found


def check_file(found: os.stat_result, owner: int | None, what: str) -> None:
    """Refuse what somebody else may have put there.

    Raises: OSError ELOOP, EISDIR, EINVAL for a symbolic link, a folder, and what else is no file;
        PermissionError (EPERM) if it is another user's than *owner*'s (None: our own).
    """
    check_regular(found, what)
    wanted = os.geteuid() if owner is None else owner
    if found.st_uid != wanted:
        hint = "" if owner is not None else f"; owner={found.st_uid} opens it on purpose"
        check(-errno.EPERM, f"{what} belongs to user {found.st_uid}, not to {wanted}{hint}")
