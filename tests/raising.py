"""A signal handler that raises at any moment, amid any verb, while another thread computes.

CPython runs handlers between two bytecodes, and right after a call of a C function. So between "C has done
it" and "Python has noted it" there is a gap, which is as long as another thread holds the interpreter.
``interrupted()`` goes into each such gap again and again.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

from conftest import PATIENCE, Forked

SIGNAL = signal.SIGUSR2  # SIGALRM keeps the time limit of the tests


class Stop(Exception):
    """What the handler raises."""


class _Handler:
    """Raises once for each time that it is armed; its process sends signals without end."""

    armed = False

    def __call__(self, *_: object) -> None:
        if self.armed:
            self.armed = False
            raise Stop

    def within(self, verb: Callable[[], object]) -> bool:
        """Call *verb*; was it left by the handler?"""
        try:
            self.armed = True
            verb()
        except Stop:
            return True
        finally:
            self.armed = False
        return False


def _fire(ready: Callable[[], object], target: int, seed: int) -> None:
    """Signal the process *target* after ever other pauses, the shorter the more often, until killed."""
    chance = random.Random(seed)
    ready()
    while os.getppid() == target:
        time.sleep(chance.random() ** 3 * 0.002)
        os.kill(target, SIGNAL)


@contextmanager
def _computing():
    """A thread that wants the interpreter all the time, as a program's own work would."""
    done = threading.Event()

    def compute() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not done.is_set():
            sum(range(100))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(PATIENCE)


@contextmanager
def raising(seed: int = 1):
    """``within(verb)``: whether the handler's exception came out of *verb*; the thread and the sender beside it."""
    handler = _Handler()
    before = signal.signal(SIGNAL, handler)
    sender = Forked(_fire, os.getpid(), seed)  # before the thread, which it would not have
    try:
        sender.wait_ready()
        with _computing():
            yield handler.within
    finally:
        sender.close()
        signal.signal(SIGNAL, before)


def interrupted(
    verb: Callable[[], object], check: Callable[[bool], object], *, times: int, seed: int = 1
) -> int:
    """Call *verb* until so many of its calls were left by an exception of a handler.

    Args: check: called after each call, undisturbed, with whether it was left so; it asserts what must hold.
    Returns: how often it was called.
    """
    calls = hits = 0
    with raising(seed) as within:
        while hits < times:
            hit = within(verb)
            hits += hit
            calls += 1
            check(hit)
    return calls
