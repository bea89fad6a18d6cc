# SPDX-License-Identifier: MIT
"""Children that run C only, made by a program of our own: the logger, connections, prefork workers.

``ipckit-spawner`` (``csrc/spawner_main.c``) lies in this package. As a logger it is executed for each log. As
a spawner it is executed once by a server, and clones itself for each child that the server asks for: the
children are the server's own (pidfd, status, death with it), and cost the same however large the server is.

Design: the program is executed with posix_spawn(3), so nothing is done to this process: no copy, no marks in
its memory, no handler of pthread_atfork. What the program inherits is decided in ``csrc/spawner_main.c``.
Where it can't be executed (a folder mounted noexec, a sandbox, a package that was replaced while we run) an
ordinary fork takes its place, which costs time and nothing else; the logger ``ipckit.process`` says so once.
"""

import errno
import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from ipckit._descriptors import above_standard, packets
from ipckit._handles import Rooted, finalizer
from ipckit._native import ffi, lib
from ipckit._unpatched import os
from ipckit.memory import SharedMemory
from ipckit.process import Child, fork_native, made_by

__all__ = ["CONNECTION", "WORKER", "Spawner", "Work", "execute", "look_at_end"]

_PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ipckit-spawner")
_NOT_FOR_US = 125  # the status with which the program refuses another build
# These pass, so an ordinary fork is no remedy: it would fail as well.
_SHORTAGE = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSYS}
_ATTEMPTS = 3

_log = logging.getLogger("ipckit.process")
_reasons: "list[str]" = []  # why the program is of no use; none while it is


def execute(title: str, words: "Iterable[object]", keep: "Sequence[int]") -> "Child | None":
    """Execute the program; None if it can't be, and then never again by this process.

    Args: title: what ps shows. words: its further arguments.
        keep: the descriptors that it inherits, each above 2.
    Raises: OSError EAGAIN, ENOMEM, EMFILE, ENFILE, ENOSYS, as fork().
    """
    if _reasons:
        return None
    kind, *rest = words
    texts = [title, str(kind), ffi.string(lib.ik_spawner_build()).decode(), *map(str, rest)]
    argv = [ffi.new("char[]", os.fsencode(text.replace("\0", "?"))) for text in texts]
    pointers = ffi.new("char *[]", [*argv, ffi.NULL])
    try:
        return made_by(
            lambda pidfd: lib.ik_process_execute(os.fsencode(_PROGRAM), pointers, keep, len(keep), pidfd)
        )
    except OSError as error:
        if error.errno in _SHORTAGE:
            raise
        give_up(f"{_PROGRAM}: {os.strerror(error.errno or 0)}")
        return None


def give_up(why: str) -> None:
    """From now on use ordinary forks."""
    _reasons.append(why)
    if len(_reasons) == 1:
        _log.warning("children are made by ordinary forks from now on, which take longer: %s", why)


def look_at_end(child: Child) -> None:
    """Give up if *child*, which has ended, was the program of another build: there is no use in it."""
    if child.status is not None and child.status.code == _NOT_FOR_US:
        give_up(f"{_PROGRAM} is of another build of ipckit")


class Work(NamedTuple):
    """What a child does: its number in the request, and the C function for an ordinary fork."""

    number: int
    main: Any


CONNECTION = Work(lib.IK_SPAWNER_CONNECTION, ffi.addressof(lib, "ik_connection_child"))
WORKER = Work(lib.IK_SPAWNER_WORKER, ffi.addressof(lib, "ik_prefork_run"))


class Spawner(Rooted):
    """Makes children that run C only, which die with the thread that made this object.

    The program is executed when the first child is needed, and again if it has ended or stands still.
    It holds nothing between two requests. Its resource limits, priority and environment are those that
    this process had then. Fork: of use to the process that made it only. Threads: one.
    """

    _program: "Child | None" = None
    _control = -1
    _owner = -1

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._memory = SharedMemory(ffi.sizeof("ik_spawner_shared"))
        self._native = ffi.new("ik_spawner *")
        self._shared = ffi.from_buffer("ik_spawner_shared *", self._memory.buf)
        self._native.shared = self._shared

    @property
    def pid(self) -> int | None:
        """Of the program, if it has been started."""
        return self._program.pid if self._program else None

    def start(self, work: Work, job: Any, fds: "Sequence[int]") -> Child:
        """A child that does *work*; it dies with the thread that made this object.

        Args: job: a cffi pointer to its struct. fds: the descriptors that go with it, see spawner.h.
        Raises: OSError EAGAIN, ENOMEM, EMFILE, ENFILE, as fork(): there is no child.
        """
        for _ in range(_ATTEMPTS):
            if not self._begin():
                break
            try:
                return self._ask(work, job, fds)
            except ProcessLookupError:
                self._forget_program()
        else:
            give_up(f"{_PROGRAM} ended {_ATTEMPTS} times in a row")
        return fork_native(work.main, job, keep=fds)

    def _ask(self, work: Work, job: Any, fds: "Sequence[int]") -> Child:
        size = ffi.sizeof(ffi.typeof(job).item)
        native = self._native
        return made_by(lambda pidfd: lib.ik_spawner_ask(native, work.number, job, size, fds, len(fds), pidfd))

    def _begin(self) -> bool:
        """See to it that there is a program; False if it can't be executed."""
        if self._program is None:
            self._forget_program()  # a handler's exception may have left a half of one
            self._control, its = packets()
            try:
                self._program = self._execute(its)
            finally:
                os.close(its)
            if self._program is not None:
                self._native.control, self._native.pidfd = self._control, self._program.fileno()
        return self._program is not None

    def _execute(self, control: int) -> "Child | None":
        us = os.getpid()
        with ExitStack() as undo:
            host = above_standard(os.pidfd_open(us))
            undo.callback(os.close, host)
            memory = above_standard(os.dup(self._memory.fileno()))
            undo.callback(os.close, memory)
            fds = [control, host, memory]
            return execute(f"ipckit spawner of {us}", ("spawner", *fds, us), fds)

    def _forget_program(self) -> None:
        """It has ended, or is to end: it holds nothing that could be lost."""
        program, self._program = self._program, None
        control, self._control = self._control, -1
        if program is not None:
            program.kill()
            program.wait()
            look_at_end(program)
            program.close()
        if control >= 0:
            os.close(control)

    def close(self) -> None:
        """End the program. Its children go on."""
        if self._owner == os.getpid():
            self._forget_program()

    __del__ = finalizer(close)
