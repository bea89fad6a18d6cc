# SPDX-License-Identifier: MIT
"""Child processes: fork without losing a signal, wait without losing a status. See fork(2).

A ``Child`` is held by a pidfd, never by its number alone: no signal hits a stranger that got the
number later, waiting has a timeout, and select, poll, epoll and asyncio can wait for its end. Only
own children are ever reaped, so those of ``subprocess`` and of other libraries keep their statuses.

``fork`` runs a Python function in the child, ``fork_native`` a C function that never enters Python
there. Linux only: they need pidfds and prctl(2).
"""

import errno
import operator
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, NoReturn

from ipckit import _hot, _procfs, signals
from ipckit._arguments import INT_MAX, Descriptor, fileno_of, integer
from ipckit._handles import Rooted, finalizer
from ipckit._native import ffi, lib
from ipckit._unpatched import os, select, signal, time
from ipckit.errors import Closed, check
from ipckit.wait import FOREVER, READ, deadline, polled, ready, remaining, until_ready

__all__ = [
    "Child",
    "ExitStatus",
    "Reaper",
    "die_with_parent",
    "fork",
    "fork_native",
    "made_by",
    "wait_any",
]

Handler = Callable[[int, FrameType | None], Any] | signal.Handlers

_WHY = {
    errno.EAGAIN: "fork: the limit of processes is reached (RLIMIT_NPROC, pids.max of the cgroup)",
    errno.EMFILE: "fork: no descriptor left for the pidfd of the child",
    errno.ENFILE: "fork: no descriptor left for the pidfd of the child",
    errno.ENOSYS: "fork: pidfd_open needs Linux 5.3",
}

_SLICE_NS = 100_000_000


# --- how a child ended -----------------------------------------------------------------------------


def _name(signum: int) -> str:
    if signal.SIGRTMIN < signum < signal.SIGRTMAX:
        return f"SIGRTMIN+{signum - signal.SIGRTMIN}"
    return signal.Signals(signum).name


@dataclass(frozen=True)
class ExitStatus:
    """How a child ended; *raw* is the number that waitpid(2) stores, and the rest reads it.

    ``code`` is None unless ``exited``, ``signal`` is None unless ``signaled``; ``core`` tells that
    memory was dumped. The names of the macros (``WIFEXITED``, ...) are there as well.
    """

    raw: int

    @property
    def exited(self) -> bool:
        return os.WIFEXITED(self.raw)

    @property
    def code(self) -> int | None:
        return os.WEXITSTATUS(self.raw) if self.exited else None

    @property
    def signaled(self) -> bool:
        return os.WIFSIGNALED(self.raw)

    @property
    def signal(self) -> int | None:
        return os.WTERMSIG(self.raw) if self.signaled else None

    @property
    def core(self) -> bool:
        return os.WCOREDUMP(self.raw)

    WIFEXITED = exited
    WEXITSTATUS = code
    WIFSIGNALED = signaled
    WTERMSIG = signal
    WCOREDUMP = core

    def __str__(self) -> str:
        if self.signal is None:
            return f"exited with {self.code}"
        return f"killed by {_name(self.signal)}" + (" (core dumped)" if self.core else "")


def _status(ended: os.waitid_result) -> ExitStatus:
    if ended.si_code == os.CLD_EXITED:
        return ExitStatus(ended.si_status << 8)
    return ExitStatus(ended.si_status | (0x80 if ended.si_code == os.CLD_DUMPED else 0))


# --- a child ---------------------------------------------------------------------------------------


class Child(Rooted):
    """A process that fork() or fork_native() started; ``pid`` is its number, ``status`` how it ended.

    ``fileno()`` (the pidfd, close-on-exec) becomes readable when the child ends. Leaving a with-block
    waits for the child, as subprocess.Popen does, and closes the pidfd. A child that is forgotten
    before it was waited for stays a zombie until this process ends: that is a ResourceWarning.

    Fork: only the process that forked the child can wait for it; others may signal it. Threads: any
    number may wait, each gets the status.
    """

    __slots__ = ("__weakref__", "_parent", "_pidfd", "pid", "status")

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.status: ExitStatus | None = None
        self._pidfd = pidfd
        self._parent = os.getpid()

    @property
    def pidfd(self) -> int:
        return self.fileno()

    def fileno(self) -> int:
        """The pidfd. Raises: Closed. See pidfd_open(2)."""
        if self._pidfd < 0:
            raise Closed(f"child {self.pid} is closed")
        return self._pidfd

    def poll(self) -> ExitStatus | None:
        """How the child ended, or None while it runs; does not block.

        Raises: ChildProcessError (ECHILD) if somebody else reaped it, or if this process is not the
            one that forked it; Closed.
        """
        if self.status is None:
            try:
                self._reap()
            except (OSError, Closed):
                if self.status is None:
                    raise
        return self.status

    def _reap(self) -> None:
        # First look, then store, then reap: whoever comes in between (a thread, or a handler of
        # SIGCHLD in this thread) finds either the zombie or the stored status. It may even have
        # closed the pidfd and its number be another child's, hence the look at the pid.
        try:
            ended = os.waitid(os.P_PIDFD, self.fileno(), os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            raise self._lost() from None
        if ended is not None and ended.si_pid == self.pid:
            self.status = _status(ended)
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG)

    def _lost(self) -> OSError:
        if self._parent != os.getpid():
            why = f"child {self.pid} belongs to process {self._parent}, and this is {os.getpid()}"
        else:
            why = f"child {self.pid} was reaped by somebody else, or while SIGCHLD was ignored"
        return ChildProcessError(errno.ECHILD, why)

    def wait(self, timeout: float | None = None) -> ExitStatus:
        """Block until the child ends; how it ended.

        Args: timeout: seconds, None for ever.
        Raises: TimeoutError (ETIMEDOUT), and the child goes on; as poll().
        Signals: their Python handlers run, then the wait goes on. See waitid(2).
        """
        deadline_ns = deadline(timeout)
        while (status := self.poll()) is None:
            with self._held() as own:
                if own is not None:
                    until_ready(own, READ, deadline_ns, f"child {self.pid} still runs")
        return status

    async def await_exit(self, timeout: float | None = None) -> ExitStatus:
        """As wait(), for asyncio: only the calling task waits."""
        deadline_ns = deadline(timeout)
        while (status := self.poll()) is None:
            with self._held() as own:
                if own is not None:
                    await ready(own, READ, deadline_ns, f"child {self.pid} still runs")
        return status

    @contextmanager
    def _held(self) -> Iterator[int | None]:
        """The pidfd once more, to wait on; None if a reaper closed it since the caller's last look."""
        pidfd = self._pidfd
        try:
            own = os.dup(pidfd)
        except OSError:
            if self._pidfd == pidfd != -1:
                raise
            own = -1
        try:
            yield own if self._pidfd == pidfd != -1 else None
        finally:
            if own >= 0:
                os.close(own)

    def send_signal(self, signum: int) -> None:
        """Send *signum* to the child, and to no other process ever; nothing if its status is known.

        Raises: ProcessLookupError (ESRCH) if somebody else reaped it; OSError EINVAL for a bad
            signal, EPERM for a child that changed its user; Closed. See pidfd_send_signal(2).
        """
        number = integer(signum, "signum", -INT_MAX - 1, INT_MAX)
        if self.status is not None:
            return
        try:
            signal.pidfd_send_signal(self.fileno(), number)
        except OSError as error:
            check(-(error.errno or errno.EINVAL), f"signal {number} to child {self.pid}")

    def terminate(self) -> None:
        """Send SIGTERM, see send_signal()."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, see send_signal()."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Close the pidfd; the child goes on. Closing twice is nothing."""
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            self.close()

    @finalizer
    def __del__(self) -> None:
        if getattr(self, "_pidfd", -1) >= 0:
            if self.status is None and self._parent == os.getpid():
                what = f"child {self.pid} was never waited for"
                warnings.warn(what, ResourceWarning, stacklevel=3, source=self)
            self.close()

    def __repr__(self) -> str:
        return f"<Child {self.pid}: {self.status or 'not waited for'}>"


def wait_any(children: Iterable[Child], timeout: float | None = None) -> tuple[Child, ExitStatus]:
    """Block until one of *children* ends; that one and how it ended.

    Args: timeout: seconds for the whole, None for ever.
    Raises: ValueError for no children; TimeoutError (ETIMEDOUT); as Child.poll().
    See waitid(2).
    """
    deadline_ns = deadline(timeout)
    waiting = list(children)
    if not waiting:
        raise ValueError("wait_any needs at least one child")
    poller = select.poll()
    for child in waiting:
        if (status := child.poll()) is not None:
            return child, status
        poller.register(child, select.POLLIN)
    _until_any(poller, deadline_ns, f"none of {len(waiting)} children ended")
    return next((child, status) for child in waiting if (status := child.poll()) is not None)


def _until_any(poller: "select.poll", deadline_ns: int, what: str) -> None:
    """As until_ready(), for all that *poller* holds."""
    if not polled(poller, deadline_ns):
        check(-errno.ETIMEDOUT, what)


# --- fork ------------------------------------------------------------------------------------------


def fork(
    target: Callable[..., object],
    *args: object,
    keep: Iterable[Descriptor] | None = None,
    die_with_parent: bool = False,
    handlers: Mapping[int, Handler] | None = None,
) -> Child:
    """Run ``target(*args)`` in a child process.

    The child exits with what *target* returns (None is 0, or an int) or with the code of its
    SystemExit; any other exception prints its traceback and is exit code 1. It never returns into
    the caller's code: no ``finally``, ``atexit`` or ``__exit__`` of the parent runs there, and threads
    that *target* started are not waited for.

    Signals are blocked from before the fork until the child has its handlers, so none is lost: those
    that had a Python handler in the parent get their default action (SIGINT too), *handlers* come
    on top, what was ignored stays ignored, and the mask is the parent's again, without what its
    SignalQueues have blocked: those are closed in the child, unless *keep* names them. stdout and
    stderr are flushed before the fork, and by the child at its end.

    If SIGCHLD is ignored (or SA_NOCLDWAIT set) the kernel would drop the child's status, so then its
    default action is set in this process.

    Args: keep: the descriptors (or objects with ``fileno()``) that the child needs beside 0, 1, 2 and
            those of sys.stdout and sys.stderr; None for all. The others are released: using one is
            OSError EBADF, but its number stays taken, so that an inherited object that closes "its"
            number later can't hit a new file.
        die_with_parent: the kernel kills the child when the thread that called this ends.
        handlers: signal number to function, ``SIG_DFL`` or ``SIG_IGN``.
    Raises: BlockingIOError (EAGAIN) at the limit of processes; OSError EMFILE or ENFILE without a
        descriptor for the pidfd, ENOMEM, ENOSYS for *keep* without /proc: no child is left, nothing is
        changed. TypeError and ValueError for bad arguments. What a signal's handler raises meanwhile: no
        child is left.
    Threads: only the calling one lives on in the child, so a lock that another one holds stays
        locked there. os.fork() warns of that from CPython 3.12 on, this function does not. Fork before
        starting threads, or use fork_native(). See fork(2).
    """
    kept = None if keep is None else _kept(keep)
    wanted = _checked(handlers or {})
    _flush()
    flags = lib.IK_PROCESS_DIE_WITH_PARENT if die_with_parent else 0

    def make(pidfd: Any) -> int:
        pid = _hot._fork(flags, int(ffi.cast("uintptr_t", pidfd)))
        if pid == 0:
            _run(target, args, kept, wanted)
        return pid

    return made_by(make)


def _forked(rc: int) -> int:
    return check(rc, _WHY.get(-rc, "fork"))


def made_by(make: Callable[[Any], int]) -> Child:
    """The child whose pid ``make(pointer)`` returns, and whose pidfd it stores there; for this library.

    Raises: what *make* returns as -errno; of a signal's handler: then there is no child."""
    child, pidfd = Child(0, -1), ffi.new("int *", -1)
    try:
        pid = _forked(make(pidfd))
    except BaseException:
        # Of a signal's handler, if there is a child: nobody would ever know of it.
        if pidfd[0] >= 0:
            signal.pidfd_send_signal(pidfd[0], signal.SIGKILL)
            with suppress(ChildProcessError):  # a stranger's handler of SIGCHLD was first
                os.waitid(os.P_PIDFD, pidfd[0], os.WEXITED)
            os.close(pidfd[0])
        raise
    child.pid, child._pidfd = pid, pidfd[0]  # no call, so no handler comes in between
    return child


def _number(fd: Descriptor) -> int:
    return integer(fileno_of(fd, "keep"), "keep", 0)


def _kept(keep: Iterable[Descriptor]) -> set[int]:
    _procfs.path("self/fd")  # which the child will need to know the others
    return {*map(_number, keep), *_standard()}


def _standard() -> Iterator[int]:
    """Standard input, output and error, and where they go when pytest or others have put them elsewhere."""
    yield from (0, 1, 2)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # None; not a file; closed
            yield stream.fileno()


def _checked(handlers: Mapping[int, Handler]) -> dict[int, Handler]:
    wanted = {integer(signum, "handlers"): handler for signum, handler in handlers.items()}
    for signum, handler in wanted.items():
        if signum not in signal.valid_signals() or signum in (signal.SIGKILL, signal.SIGSTOP):
            raise ValueError(f"signal {signum} can't have a handler")
        if not callable(handler) and handler not in (signal.SIG_DFL, signal.SIG_IGN):
            raise TypeError(
                f"handler of signal {signum} must be callable, SIG_DFL or SIG_IGN, not {handler!r}"
            )
    return wanted


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # None under a daemon; closed
            stream.flush()


def _run(
    target: Callable[..., object],
    args: tuple[object, ...],
    kept: set[int] | None,
    handlers: Mapping[int, Handler],
) -> NoReturn:
    """All of the child's life; whatever happens, it does not return into the parent's code."""
    code = 1
    try:
        _set_handlers(handlers)
        if kept is not None:
            _release_all_but(kept)
        _hot._unblock()
        signals.close_queues(kept or ())
        code = _code(target(*args))
        _flush()
    except SystemExit as stop:
        code = _code_of(stop)
        _flush()
    except BaseException:
        code = 1
        traceback.print_exc()
        _flush()
    finally:
        os._exit(code)


def _set_handlers(handlers: Mapping[int, Handler]) -> None:
    signal.set_wakeup_fd(-1)  # or the child's signals would wake the parent's event loop
    for inherited in signal.valid_signals():
        if callable(signal.getsignal(inherited)):
            signal.signal(inherited, signal.SIG_DFL)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def _release_all_but(kept: set[int]) -> None:
    numbers = {int(name) for name in os.listdir(_procfs.path("self/fd"))}
    # O_PATH: every use but close() fails, as if the number were free.
    nothing = os.open("/dev/null", os.O_PATH | os.O_CLOEXEC)
    for number in numbers - kept - {nothing}:
        os.dup2(nothing, number, inheritable=False)
    os.close(nothing)


def _code(result: object) -> int:
    if result is None:
        return 0
    try:
        return operator.index(result) & 0xFF  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"the target of fork must return None or an exit code, not {result!r}") from None


def _code_of(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return _code(stop.code)
    print(stop.code, file=sys.stderr)
    return 1


def fork_native(
    main: Any,
    argument: Any,
    *,
    keep: Iterable[Descriptor] = (),
    die_with_parent: bool = True,
) -> Child:
    """Run the C function ``main(argument)`` in a child process that never enters Python.

    The child exits with what *main* returns. *main* runs with all signals blocked until it calls
    ``ik_process_unblock()``, which it does after it installed its handlers: then the mask is the
    parent's again. Signals that the parent handled have their default action, ignored ones
    stay ignored. SIGCHLD: as fork().

    Args: main: a cffi pointer to ``int main(void *)``. argument: a cffi pointer, or ``ffi.NULL``; the
            child has its own copy of the memory.
        keep: the descriptors (or objects with ``fileno()``) that stay open beside 0, 1 and 2.
        die_with_parent: as fork().
    Raises: as fork().
    Threads: safe in a process with threads as long as *main* neither allocates nor takes a lock of
        the parent. See fork(2).
    """
    numbers = sorted({number for number in map(_number, keep) if number > 2})
    flags = lib.IK_PROCESS_DIE_WITH_PARENT if die_with_parent else 0
    return made_by(lambda pidfd: lib.ik_process_fork(main, argument, numbers, len(numbers), flags, pidfd))


def die_with_parent(signum: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel send *signum* to this process when the thread that forked it ends.

    "Parent" is that thread, not its process. The wish is dropped by the kernel when this process
    changes its user or group, or executes a set-user-id program: ask again after that. Children
    don't inherit it.

    Args: parent: ``os.getpid()`` of the parent, seen before the fork: if it has ended already,
        *signum* is sent at once. With None such an end goes unnoticed. ``fork(...,
        die_with_parent=True)`` does it right.
    Raises: OSError EINVAL for a bad signal. See PR_SET_PDEATHSIG(2const).
    """
    number = integer(signum, "signum", -INT_MAX - 1, INT_MAX)
    expected = os.getppid() if parent is None else integer(parent, "parent", 0, INT_MAX)
    check(lib.ik_process_die_with_parent(number, expected), f"die_with_parent by signal {number}")


# --- many children ---------------------------------------------------------------------------------


class Reaper(Rooted):
    """Reaps children as they end: its own only, each exactly once, without asking all of them.

    ``fileno()`` (an epoll descriptor over the pidfds) is readable while a child that ended waits to
    be reaped, however many ended at once and whoever got the SIGCHLD. ``len()`` and iteration tell
    the living.

    With *on_exit*, inside its with-block and if the main thread entered that, a handler of SIGCHLD
    (SA_NOCLDSTOP) calls reap(), then the Python handler that was there before; leaving restores
    that. Otherwise call reap() when ``fileno()`` is readable. Leaving lets go of the children that
    still live: they are neither killed nor waited for; stop() does both.

    Args: on_exit: called as ``on_exit(child, status)`` once for each, by whatever reaps it.
    Fork: of use to the process that made it only. Threads: any may call.
    """

    def __init__(self, on_exit: Callable[[Child, ExitStatus], object] | None = None) -> None:
        self._on_exit = on_exit
        self._parent = os.getpid()
        self._living: dict[Child, None] = {}
        self._by_pidfd: dict[int, Child] = {}
        self._epoll = select.epoll()
        self._stopping = False
        self._former: signals.Action | None = None  # of SIGCHLD, while ours is installed

    def fileno(self) -> int:
        """Readable while reap() would find something. Raises: Closed."""
        if self._epoll.closed:
            raise Closed("the reaper is closed")
        return self._epoll.fileno()

    def __len__(self) -> int:
        return len(self._living)

    def __iter__(self) -> Iterator[Child]:
        return iter(list(self._living))

    def add(self, child: Child) -> Child:
        """Reap *child* from now on, and close it then; *child* itself.

        on_exit may be called from here, for a child that has ended already.
        Raises: ValueError for a child that is here already; Closed. See epoll_ctl(2).
        """
        self._check_usable()
        if child in self._living:
            raise ValueError(f"child {child.pid} is in this reaper already")
        self._epoll.register(child, select.EPOLLIN)
        self._by_pidfd[child.fileno()] = child
        self._living[child] = None
        if self._former is not None:
            self.reap()  # it may have ended already, and its SIGCHLD be gone
        return child

    def fork(self, target: Callable[..., object], *args: object, **options: Any) -> Child:
        """As fork(), and add() the child. Raises: as fork(); Closed, also from on_exit while stop() runs."""
        self._check_may_fork()
        return self.add(fork(target, *args, **options))

    def fork_native(self, main: Any, argument: Any, **options: Any) -> Child:
        """As fork_native(), and add() the child. Raises: as fork_native(); Closed, as fork()."""
        self._check_may_fork()
        return self.add(fork_native(main, argument, **options))

    def reap(self) -> list[tuple[Child, ExitStatus]]:
        """The children that ended since the last call, and how, each closed; does not block.

        An exception of on_exit ends the call; the next one finds the children that were not reaped.
        Raises: ChildProcessError (ECHILD) for a child that somebody else reaped; it is dropped. Also
            if this process is not the one that made the reaper. Closed. See waitid(2).
        """
        self._check_usable()
        ended = []
        for pidfd, _ in self._epoll.poll(0, len(self._living) + 1):
            child = self._by_pidfd.get(pidfd)
            if child is None:  # a handler of SIGCHLD or another thread took it meanwhile
                continue
            try:
                status = child.poll()
            except ChildProcessError:
                self._take(child)
                raise
            if status is not None and self._take(child):
                ended.append((child, status))
                if self._on_exit is not None:
                    self._on_exit(child, status)
        return ended

    def _take(self, child: Child) -> bool:
        """Drop *child*; False if somebody else was first."""
        if self._living.pop(child, self) is self:
            return False
        del self._by_pidfd[child.fileno()]
        # close() alone is not enough: a child forked since has the pidfd too, so epoll would go on.
        self._epoll.unregister(child)
        child.close()
        return True

    def wait(self, timeout: float | None = None) -> None:
        """Reap until no child is left; block meanwhile. Their ``status`` tells how each ended.

        Args: timeout: seconds for the whole, None for ever.
        Raises: TimeoutError (ETIMEDOUT) if some still live; as reap().
        """
        deadline_ns = deadline(timeout)
        while self.reap() or self._living:
            if (child := next(iter(self), None)) is not None:
                self._until_some_ended(child, deadline_ns)

    def _until_some_ended(self, child: Child, deadline_ns: int) -> None:
        # Waiting for the epoll alone would sleep on if somebody else reaped the last child.
        with child._held() as own:
            if own is None:
                return
            poller = select.poll()
            poller.register(own, select.POLLIN)
            poller.register(self, select.POLLIN)
            _until_any(poller, deadline_ns, f"{len(self)} children still run")

    def send_signal(self, signum: int) -> None:
        """Send *signum* to every living child, see Child.send_signal()."""
        for child in self:
            with suppress(Closed):  # ended and reaped meanwhile
                child.send_signal(signum)

    def stop(self, timeout: float | None = 10.0) -> list[tuple[Child, ExitStatus]]:
        """End all children: SIGTERM to each, and SIGKILL to those that live on at the end of *timeout*.

        Blocks until none is left, whatever happens: an exception (of on_exit, of a signal's handler) comes
        out when the others have ended, and if it is one that ends programs (KeyboardInterrupt) SIGKILL
        follows at once. A child that is stopped sees only SIGKILL; one that the kernel holds (state D)
        is waited for. No child can be forked by this reaper meanwhile, so on_exit replaces none.

        Args: timeout: seconds for the orderly end; None for ever.
        Returns: the children that there were, and how each ended, whoever reaped it; all closed.
        Raises: what reap() and on_exit raised first; OSError EPERM for a child that has another user by now,
            which lives on. See kill(2).
        """
        self._check_usable()
        children, failures = list(self), list[Exception]()
        deadline_ns = deadline(timeout)
        self._stopping = True
        try:
            self._end_all(signal.SIGTERM, deadline_ns, failures)
        finally:
            self._end_all(signal.SIGKILL, FOREVER, failures)
            self._stopping = False
        if failures:
            raise failures[0]
        return [(child, child.status) for child in children if child.status is not None]

    def _end_all(self, signum: int, deadline_ns: int, failures: list[Exception]) -> None:
        """Signal each; reap until none is left, or until the deadline. Errors are added to *failures*."""
        poller = select.poll()
        poller.register(self, select.POLLIN)
        told: dict[Child, bool] = {}
        while True:
            for child in self:
                if child not in told:  # some are added meanwhile
                    told[child] = self._tell(child, signum, failures)
            try:
                self.reap()
            except Exception as error:
                failures.append(error)
            if not any(told.get(child, True) for child in self) or remaining(deadline_ns) == 0:
                break
            # In slices: another thread may have reaped the last one, and then the epoll tells nothing.
            slice_ns = time.monotonic_ns() + _SLICE_NS
            polled(poller, slice_ns if deadline_ns == FOREVER else min(deadline_ns, slice_ns))

    def _tell(self, child: Child, signum: int, failures: list[Exception]) -> bool:
        """Send it; False if it can't be sent."""
        try:
            child.send_signal(signum)
        except Closed:  # reaped meanwhile by another thread; or somebody closed it, and nobody can reap it
            return False
        except ProcessLookupError:  # reaped by somebody else: reap() will say so
            return True
        except OSError as error:
            failures.append(error)
            return False
        return True

    def close(self) -> None:
        """Let go of the children that still live. Closing twice is nothing."""
        self._epoll.close()
        self._living.clear()
        self._by_pidfd.clear()

    def __enter__(self) -> "Reaper":
        self._check_usable()
        if self._on_exit is not None and signals.is_main_thread():
            self._former = signals.sigaction(
                signal.SIGCHLD, self._on_sigchld, flags=signals.SA_NOCLDSTOP, info=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._former is not None:
            self._former.restore()
            self._former = None
        self.close()

    def _on_sigchld(self, info: signals.SigInfo) -> None:
        former = self._former
        try:
            # Not in a child made by a bare os.fork(); stop() does it itself.
            if self._parent == os.getpid() and not self._stopping:
                self.reap()
        finally:
            if former is not None and callable(former.handler):
                former.handler(*((info,) if former.info else (info.signo, None)))

    def _check_may_fork(self) -> None:
        self._check_usable()
        if self._stopping:
            raise Closed("the reaper is stopping")

    def _check_usable(self) -> None:
        self.fileno()
        if self._parent != os.getpid():
            # The epoll set is shared with that process: touching it would lose its children.
            why = f"this reaper belongs to process {self._parent}, and this is {os.getpid()}"
            raise ChildProcessError(errno.ECHILD, why)
