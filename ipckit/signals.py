# SPDX-License-Identifier: MIT
"""Signals with their payload: sigaction with flags, mask and siginfo; sigqueue; signalfd; the self-pipe.

``signal.signal()`` keeps one bit per signal: what comes twice before Python looks is one call, and who
sent it with which value is gone. Here the handler in C stores the siginfo of each arrival and then calls
CPython's own handler, so that ``set_wakeup_fd``, asyncio and EINTR work as ever; Python handlers run, as
ever, in the main thread between two bytecodes, once for each arrival and in the order of arrival.
See signal(7).
"""

import errno
import weakref
from collections.abc import AsyncIterator, Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import FrameType
from typing import Any, NamedTuple, Protocol

from ipckit import wait
from ipckit._arguments import INT_MAX, integer
from ipckit._handles import Rooted, finalizer
from ipckit._native import ffi, lib
from ipckit._unpatched import os, signal, threading
from ipckit.errors import Closed, check

__all__ = [
    "Action",
    "SA_NOCLDSTOP",
    "SA_NOCLDWAIT",
    "SA_NODEFER",
    "SA_RESETHAND",
    "SA_RESTART",
    "SelfPipe",
    "SigInfo",
    "SignalQueue",
    "blocked",
    "pending",
    "sigaction",
    "sigqueue",
]

SA_RESTART: int = lib.IK_SA_RESTART
SA_NOCLDSTOP: int = lib.IK_SA_NOCLDSTOP
SA_NOCLDWAIT: int = lib.IK_SA_NOCLDWAIT
SA_RESETHAND: int = lib.IK_SA_RESETHAND
SA_NODEFER: int = lib.IK_SA_NODEFER

_FLAGS = SA_RESTART | SA_NOCLDSTOP | SA_NOCLDWAIT | SA_RESETHAND | SA_NODEFER
_EVERY = (1 << 64) - 1
_VALID = frozenset(signal.valid_signals())  # each call makes the set anew


class SigInfo(NamedTuple):
    """What the kernel tells about one signal; a field that has no meaning for it is 0.

    code: ``SI_USER`` (0, kill), ``SI_QUEUE`` (-1, sigqueue), ``CLD_EXITED``, ... status: of a child, with
    SIGCHLD. value: the int given to sigqueue. addr: of the fault. band: of SIGIO. See sigaction(2).
    """

    signo: int
    code: int
    pid: int
    uid: int
    status: int
    value: int
    addr: int
    band: int


Handler = Callable[[int, FrameType | None], object] | Callable[[SigInfo], object] | int


class HasPidfd(Protocol):
    """A child by its pidfd: an object with ``fileno()``."""

    def fileno(self) -> int: ...


def _name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def _valid(signum: int) -> int:
    number = integer(signum, "signum")
    if number not in _VALID:
        raise ValueError(f"{signum!r} is not the number of a signal")
    return number


def _catchable(signum: int, verb: str) -> int:
    if _valid(signum) in (signal.SIGKILL, signal.SIGSTOP):
        check(-errno.EINVAL, f"{verb} of {_name(signum)}, which nobody can")
    return _valid(signum)


def _set(signals: Iterable[int]) -> int:
    bits = 0
    for signum in signals:
        bits |= 1 << (_valid(signum) - 1)
    return bits


def _members(bits: int) -> frozenset[int]:
    return frozenset(number for number in range(1, 65) if bits >> (number - 1) & 1)


def _info(record: Any) -> SigInfo:
    return SigInfo(
        record.signo,
        record.code,
        record.pid,
        record.uid,
        record.status,
        record.value,
        record.addr,
        record.band,
    )


# --- sigaction -----------------------------------------------------------------------------------


class Action(Rooted):
    """What happens on a signal. sigaction() returns the former one; a with-statement restores it.

    handler: as given to sigaction(), or as ``signal.getsignal()`` has it (None: installed by foreign C).
    mask: a frozenset of signal numbers. flags: SA_* bits. info: the handler takes a SigInfo.
    """

    __slots__ = ("_held", "_kernel", "flags", "handler", "info", "mask", "signum")

    def __init__(
        self, signum: int, handler: Handler | None, mask: int, flags: int, info: bool, kernel: Any
    ) -> None:
        self.signum = signum
        self.handler = handler
        self.mask = _members(mask)
        self.flags = flags
        self.info = info
        self._kernel = kernel  # of what is not a handler of ours
        self._held = mask if flags & SA_NODEFER else mask | 1 << (signum - 1)

    def restore(self) -> None:
        """Make this the action of its signal again, Python's table and the kernel's alike.

        Raises: ValueError outside the main thread.
        """
        _only_in_main_thread(self.signum)
        _put(self)

    def __enter__(self) -> "Action":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"<Action {_name(self.signum)} {self.handler!r} mask={set(self.mask)} flags={self.flags:#x}>"


_actions: dict[int, Action] = {}


def _dispatch(signum: int, frame: FrameType | None) -> None:
    """What signal.signal() knows as the handler of our signals: run what has arrived, oldest first."""
    look = ffi.gc(ffi.new("ik_signals_look *"), lib.ik_signals_leave)
    try:
        if not lib.ik_signals_enter(signum, look):
            return
        while lib.ik_signals_next(look):
            action = _actions.get(look.info.signo)
            lib.ik_signals_begin(look, action._held if action else 0)
            if action:
                action.handler(*((_info(look.info),) if action.info else (look.info.signo, frame)))  # type: ignore
    finally:
        # This leaves. As a call it would run what is left inside of this frame, on top of an exception
        # on its way out; after a del CPython looks for signals only in the frame that we return to.
        del look


def _kernel_action(signum: int) -> Any:
    kernel = ffi.new("ik_signals_action *")
    check(lib.ik_signals_action_get(signum, kernel), f"sigaction of {_name(signum)}")
    return kernel


def _current(signum: int) -> Action:
    kernel = _kernel_action(signum)
    known = signal.getsignal(signum)
    address = int(ffi.cast("intptr_t", kernel.handler))
    if address in (signal.SIG_DFL, signal.SIG_IGN):
        known = signal.Handlers(address)  # after SA_RESETHAND Python's table is not up to date
    elif known is _dispatch:
        return _actions[signum]
    return Action(signum, known, kernel.mask, kernel.flags & _FLAGS, False, kernel)


def is_main_thread() -> bool:
    """Whether Python runs signal handlers in the thread that calls; a greenlet of it is it, too."""
    return threading.get_native_id() == os.getpid()


def _only_in_main_thread(signum: int) -> None:
    if not is_main_thread():
        name = threading.current_thread().name
        raise ValueError(f"sigaction of {_name(signum)} works only in the main thread, not in {name}")


def _put(action: Action) -> None:
    with blocked((action.signum,)):
        if action._kernel is None:
            _catch(action)
        else:
            _release(action)


def _catch(action: Action) -> None:
    """Python's table first, so that what CPython's handler trips is ours; then the kernel's."""
    _register_fork()
    check(lib.ik_signals_prepare(action.signum, action.flags), f"sigaction of {_name(action.signum)}")
    _actions[action.signum] = action
    signal.signal(action.signum, _dispatch)
    check(lib.ik_signals_catch(action.signum), f"sigaction of {_name(action.signum)}")


def _release(action: Action) -> None:
    signum = action.signum
    signal.signal(signum, signal.SIG_DFL if action.handler is None else action.handler)  # type: ignore
    check(lib.ik_signals_action_set(signum, action._kernel), f"sigaction of {_name(signum)}")
    _actions.pop(signum, None)
    if lib.ik_signals_forget(signum):  # a handler took its own action away, and more of them wait for it
        signal.raise_signal(signum)


def _action(signum: int, handler: Handler, mask: int, flags: int, info: bool) -> Action:
    kernel = None
    if not callable(handler):
        kernel = ffi.new("ik_signals_action *", {"mask": mask, "flags": flags})
        kernel.handler = ffi.cast("void *", int(handler))
    return Action(signum, handler, mask, flags, info, kernel)


def sigaction(
    signum: int, handler: Handler, *, mask: Iterable[int] = (), flags: int = 0, info: bool = False
) -> Action:
    """Set what happens on *signum*; the former action is returned, and restored by a with-statement.

    Never blocks. What had arrived for the former handler is handled by it before.

    Args: handler: called in the main thread, once for each arrival and oldest first, as
        ``handler(signum, frame)``, or as ``handler(SigInfo)`` with *info*; or SIG_DFL, SIG_IGN.
        mask: further signals that wait while the handler runs (it itself always waits, unless SA_NODEFER).
        flags: SA_RESTART, SA_NOCLDSTOP, SA_NOCLDWAIT, SA_RESETHAND, SA_NODEFER or 0. With SA_RESTART
        a system call that waits in the main thread goes on, and the handler comes only after it.
    Returns: the former Action. ``restore()`` and leaving the with-statement put it back.
    Raises: ValueError for what is not a signal, unknown flags, and outside the main thread; OSError EINVAL
        for SIGKILL and SIGSTOP; TypeError for a handler that is none. An exception out of a handler comes
        out of whatever the main thread does; what else has arrived is handled after it.
    Fork: the child keeps the actions and starts with nothing arrived. See sigaction(2).
    """
    number = _catchable(signum, "sigaction")
    if not callable(handler) and handler not in (signal.SIG_DFL, signal.SIG_IGN):
        raise TypeError(
            f"the handler of {_name(number)} must be callable, SIG_DFL or SIG_IGN, not {handler!r}"
        )
    flags = integer(flags, "flags", -INT_MAX - 1, INT_MAX)
    if flags & ~_FLAGS:
        raise ValueError(f"flags of {_name(number)} must be SA_* bits, not {flags:#x}")
    _only_in_main_thread(number)
    former = _current(number)
    try:
        _put(_action(number, handler, _set(mask), flags, info))
    except BaseException:
        _put(former)
        raise
    return former


@cache
def _register_fork() -> None:
    """Once, and only in a process that uses sigaction(): each fork costs two system calls more."""
    os.register_at_fork(
        before=lib.ik_signals_before_fork,
        after_in_parent=lambda: lib.ik_signals_after_fork(0),
        after_in_child=lambda: lib.ik_signals_after_fork(1),
    )


# --- masks ---------------------------------------------------------------------------------------


@contextmanager
def blocked(signals: Iterable[int] | None = None) -> Iterator[None]:
    """Hold off *signals* (None: all that can be) from the calling thread inside a with-statement.

    What arrived before has been handled when the body begins; what arrives in it stays pending in
    the kernel, and is delivered when the body ends. Exactly those are unblocked that were not
    blocked before. The mask is inherited by threads, by forked children and over exec.

    Raises: ValueError for what is not a signal. SIGKILL and SIGSTOP are left out by the kernel.
    Threads: each has its own mask. See pthread_sigmask(3).
    """
    bits = _EVERY if signals is None else _set(signals)
    added = ffi.new("uint64_t *")
    try:
        lib.ik_signals_block(bits, added)
        yield
    finally:
        lib.ik_signals_unblock(added[0])


def pending() -> frozenset[int]:
    """The signals that wait, blocked, for the calling thread or the process. See sigpending(2)."""
    return frozenset(signal.sigpending())


# --- sigqueue ------------------------------------------------------------------------------------


def sigqueue(target: int | HasPidfd, signum: int, value: int = 0) -> None:
    """Send *signum* with *value* to a process; never blocks.

    Args: target: a pid, or an object whose ``fileno()`` is a pidfd: that never hits another process
        which was given the number of an ended one. value: an int of 32 bits, signed.
    Raises: BlockingIOError (EAGAIN) if the receiver has RLIMIT_SIGPENDING signals pending and *signum*
        is a real-time signal (a standard one is then delivered without its value); ProcessLookupError
        (ESRCH), PermissionError (EPERM); ValueError for what is not a signal or does not fit.
    Threads and fork: any. See sigqueue(3), pidfd_send_signal(2).
    """
    number, value = _valid(signum), integer(value, "value", -INT_MAX - 1, INT_MAX)
    if hasattr(target, "fileno"):
        rc = lib.ik_signals_queue_pidfd(target.fileno(), number, value)
        check(rc, f"sigqueue of {_name(number)} to {target!r}")
    else:
        pid = integer(target, "target", -INT_MAX - 1, INT_MAX)
        rc = lib.ik_signals_queue(pid, number, value)
        check(rc, f"sigqueue of {_name(number)} to process {pid}")


# --- signalfd ------------------------------------------------------------------------------------


class SignalQueue(Rooted):
    """Signals to be read like messages, from a signalfd: no handler, nothing is interrupted.

    The signals are blocked in the thread that makes the queue, until it is closed there. Every other
    thread must block them too (make the queue before the threads, they inherit the mask), or the kernel
    delivers them there. What is unread at close() is then delivered as its action says.

    Args: signals: their numbers.
    Raises: ValueError for none, or for what is not a signal; OSError EINVAL for SIGKILL and SIGSTOP, EMFILE.
    Fork: a child of ``ipckit.fork`` has the queue closed and its signals not blocked, so it can be
        terminated; ``keep=[queue]`` leaves it both. A child of os.fork() has both, and reads the signals
        sent to it. An executed program inherits the blocked signals: who starts programs takes SelfPipe.
    Threads: any number may receive; each signal goes to one. See signalfd(2).
    """

    _fd = -1

    def __init__(self, signals: Iterable[int]) -> None:
        self._added = ffi.new("uint64_t *")
        self._thread = threading.get_ident()
        bits = _set(_catchable(signum, "SignalQueue") for signum in signals)
        if not bits:
            raise ValueError("a SignalQueue needs at least one signal")
        self.signals = _members(bits)
        try:
            _queues.add(self)
            lib.ik_signals_block(bits, self._added)
            self._fd = check(lib.ik_signals_open(bits), "signalfd")
        except BaseException:
            lib.ik_signals_unblock(self._added[0])
            raise

    def fileno(self) -> int:
        """The descriptor; readable while a signal waits. Raises: Closed."""
        if self._fd < 0:
            raise Closed(f"{self!r}")
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        """Close the descriptor and unblock what __init__() blocked; again does nothing.

        In another thread than the one that made the queue the mask stays: only that one can change it.
        """
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            if threading.get_ident() == self._thread:
                lib.ik_signals_unblock(self._added[0])

    def __enter__(self) -> "SignalQueue":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    __del__ = finalizer(close)

    def __repr__(self) -> str:
        names = ", ".join(map(_name, sorted(self.signals)))
        return f"<SignalQueue of {names}, {'closed' if self.closed else f'descriptor {self._fd}'}>"

    def _read(self, limit: int) -> list[SigInfo]:
        """What waits, or an empty list."""
        records = ffi.new("ik_signals_info[]", limit)
        rc = lib.ik_signals_read(self.fileno(), records, limit)
        if rc == -errno.EAGAIN:
            return []
        return [_info(record) for record in records[0 : check(rc, repr(self))]]

    def recv(self, *, timeout: float | None = None) -> SigInfo:
        """The next signal; block up to *timeout* seconds (None: for ever).

        Raises: TimeoutError (ETIMEDOUT); Closed. Handlers of other signals run meanwhile.
        """
        return self.recv_many(1, timeout=timeout)[0]

    def recv_many(self, max: int = lib.IK_SIGNALS_READ_MAX, *, timeout: float | None = None) -> list[SigInfo]:
        """At least one signal, and all that wait up to *max* (1 to 64), in one read; blocks as recv().

        Raises: as recv(); ValueError for another max.
        """
        limit = integer(max, "max", 1, lib.IK_SIGNALS_READ_MAX)
        deadline_ns = wait.deadline(timeout)
        while not (got := self._read(limit)):
            wait.until_ready(self.fileno(), wait.READ, deadline_ns, repr(self))
        return got

    async def arecv(self, *, timeout: float | None = None) -> SigInfo:
        """As recv(), for asyncio: only the calling task waits."""
        deadline_ns = wait.deadline(timeout)
        while not (got := self._read(1)):
            await wait.ready(self.fileno(), wait.READ, deadline_ns, repr(self))
        return got[0]

    def __iter__(self) -> Iterator[SigInfo]:
        """Receive for ever; ends when the body closes the queue."""
        while not self.closed:
            yield self.recv()

    async def __aiter__(self) -> AsyncIterator[SigInfo]:
        while not self.closed:
            yield await self.arecv()


_queues: "weakref.WeakSet[SignalQueue]" = weakref.WeakSet()


def close_queues(kept: Container[int]) -> None:
    """In a child of fork(): close all queues but those whose descriptor is *kept*, and undo their masks.

    Those were set on the user's behalf, and in whatever thread forked: the others had to have them too.
    """
    blocked_by_closed = blocked_for_kept = 0
    for queue in list(_queues):
        if queue._fd in kept:
            blocked_for_kept |= _set(queue.signals)
        elif queue._fd >= 0:
            blocked_by_closed |= queue._added[0]
            fd, queue._fd = queue._fd, -1
            os.close(fd)
    lib.ik_signals_unblock(blocked_by_closed & ~blocked_for_kept)


# --- the self-pipe -------------------------------------------------------------------------------


class SelfPipe(Rooted):
    """Signals as a descriptor to wait for, by handlers in C: the self-pipe trick, an eventfd for the pipe.

    Whichever thread gets a signal, it is noted, and nothing of Python is interrupted; nothing is blocked
    either, so threads that were there before do no harm, and programs that are started inherit nothing. One
    that comes twice before take() is one. The signals are unblocked in the calling thread meanwhile: what
    waited behind ``blocked()`` is noted at once.

    close() puts back what was there before, Python's handler and the kernel's action alike; a handler that
    somebody has set since stays. What nobody has taken by then is sent again. SelfPipes may be nested: the
    inner one has what the outer one has noted, and leaves it what it does not take.

    Args: signals: their numbers; none, if only ``wake()`` is to be waited for.
    Raises: ValueError for what is not a signal, or for any outside the main thread; OSError EINVAL for
        SIGKILL and SIGSTOP, EMFILE.
    Fork: in the child it is closed, with what was there before in place. Threads: make and close it in the
        main thread; any may wake. See eventfd(2), signal-safety(7).
    """

    _fd = -1

    def __init__(self, signals: Iterable[int] = ()) -> None:
        self.signals = frozenset(_catchable(signum, "SelfPipe") for signum in signals)
        self._bits = _set(self.signals)
        self._former: dict[int, Action] = {}
        self._bells: dict[int, int] = {}  # of the outer SelfPipe, or -1
        self._held_off: set[int] = set()
        self._lock = threading.RLock()  # a handler in the midst of close() may wake
        for signum in self.signals:
            _only_in_main_thread(signum)
        _close_in_children()
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            if self.signals:
                _self_pipes.append(self)
            for signum in self.signals:
                self._take_over(signum)
            self._held_off = signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals) & self.signals
        except BaseException:
            self.close()
            raise

    def _take_over(self, signum: int) -> None:
        """Python's table first, as sigaction() does: so it tells that there is a handler, and which."""
        self._former[signum] = _current(signum)
        self._bells[signum] = lib.ik_signals_bell(signum, self._fd)
        check(lib.ik_signals_displace(signum), f"SelfPipe of {_name(signum)}")
        signal.signal(signum, self._arrived)
        check(lib.ik_signals_note(signum), f"SelfPipe of {_name(signum)}")

    def _arrived(self, signum: int, _: FrameType | None) -> None:
        """Somebody put signal.signal()'s former result back: Python's table knows us, the kernel does not."""
        if self.closed:
            self._former[signum].restore()
            signal.raise_signal(signum)
        else:
            lib.ik_signals_note_again(signum)

    def fileno(self) -> int:
        """The descriptor; readable when there may be something to take. Raises: Closed."""
        if self._fd < 0:
            raise Closed(f"{self!r}")
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def take(self) -> frozenset[int]:
        """The signals that have come since the last call, maybe none; never blocks. Raises: Closed."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.fileno())
        return _members(lib.ik_signals_take(self._bits))

    def wake(self) -> None:
        """Make the descriptor readable; nothing if it is closed. From any thread, or a handler."""
        if self._fd >= 0:
            with self._lock:
                if self._fd >= 0:
                    os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """Put back what was there before; again does nothing. Close those nested in this one before.

        Raises: ValueError outside the main thread.
        """
        if self.closed:
            return
        for signum in self.signals:
            _only_in_main_thread(signum)
        signal.pthread_sigmask(signal.SIG_BLOCK, self._held_off)
        with blocked():
            self._give_back()
            for signum, bell in self._bells.items():
                lib.ik_signals_bell(signum, bell)
            with self._lock:
                self._let_go()
            for signum in self._untaken():
                signal.raise_signal(signum)

    def _give_back(self) -> None:
        for signum, action in self._former.items():
            if signal.getsignal(signum) == self._arrived:
                _put(action)

    def _let_go(self) -> None:
        if self in _self_pipes:
            _self_pipes.remove(self)
        fd, self._fd = self._fd, -1
        os.close(fd)

    def _untaken(self) -> frozenset[int]:
        """What is not left to an outer one."""
        outermost = _set(signum for signum, bell in self._bells.items() if bell < 0)
        return _members(lib.ik_signals_take(outermost))

    __del__ = finalizer(close)  # of one without signals; the others are in the list

    def __enter__(self) -> "SelfPipe":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        names = ", ".join(map(_name, sorted(self.signals)))
        state = "closed" if self.closed else f"descriptor {self._fd}"
        return f"<SelfPipe of {names or 'no signals'}, {state}>"


_self_pipes: list[SelfPipe] = []  # those with signals, the innermost last


@cache
def _close_in_children() -> None:
    os.register_at_fork(after_in_child=_close_all)


def _close_all() -> None:
    """In a forked child: it must neither ring its parent's bells nor take what they tell."""
    lib.ik_signals_forget_notes()
    for self_pipe in reversed(list(_self_pipes)):
        self_pipe._give_back()
        self_pipe._let_go()
