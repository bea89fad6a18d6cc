# SPDX-License-Identifier: MIT
"""The errors of every room, and the one place where a C result becomes a Python error.

C returns ``>= 0`` or ``-errno``. What has an errno is the plain ``OSError`` that Python picks for
it (``BlockingIOError``, ``BrokenPipeError``, ``TimeoutError``, ...); three states have none:

=============  ============  ===============================================================
class          is a          means
=============  ============  ===============================================================
``Closed``     ValueError    this handle was closed here, as for files
``PeerDied``   EOFError      the other side ended without closing, or in the middle of a message
``Corrupt``    RuntimeError  what the other side wrote breaks the format; nothing of it was used
=============  ============  ===============================================================
"""

from ipckit._unpatched import os

__all__ = ["Closed", "Corrupt", "PeerDied", "check"]


class Closed(ValueError):
    """The handle was used after ``close()``."""


class PeerDied(EOFError):
    """The peer ended without closing: the stream stops in the middle of something."""


class Corrupt(RuntimeError):
    """Shared state or a stream breaks its format and can't be trusted."""


def check(rc: int, what: object = None) -> int:
    """Return *rc*, or raise the OSError of ``-rc`` naming *what* (a path, a descriptor, a verb)."""
    if rc >= 0:
        return rc
    if what is None:
        raise OSError(-rc, os.strerror(-rc))
    raise OSError(-rc, os.strerror(-rc), what if isinstance(what, (str, bytes)) else str(what))
