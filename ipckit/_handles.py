# SPDX-License-Identifier: MIT
"""What every handle of something of the kernel's has: an end without words, and a say in where it can go."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["Rooted", "check_starting", "finalizer"]


def finalizer(close: Callable[[Any], object]) -> Callable[[Any], None]:
    """A ``__del__`` that calls *close*, and is silent at the end of the interpreter.

    By then the globals of a module may be None already, and the kernel closes what is open. What this needs
    itself is bound here.
    """
    is_ending, errors = sys.is_finalizing, Exception

    def __del__(self: Any) -> None:
        try:
            close(self)
        except errors:
            if not is_ending():
                raise

    __del__.__qualname__ = close.__qualname__  # by which the interpreter calls it, if it raises
    return __del__


def check_starting(what: str, instead: str = "") -> None:
    """Raise TypeError unless *what* is pickled for a process of multiprocessing that is being started.

    Anywhere else each descriptor would start a thread here that hands it out to who knows a key.

    Args: instead: what to do otherwise.
    """
    from multiprocessing import context  # only who pickles pays for the import

    if context.get_spawning_popen() is None:
        raise TypeError(
            f"{what} can be pickled only for a process of multiprocessing that is being started"
            f"{instead and '; '}{instead}"
        )


class Rooted:
    """What stays in its process and those forked from it: a second handle would close the first one's."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} can be neither pickled nor copied: it works in its process and those forked from it"
        )
