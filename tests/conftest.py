"""What every test gets: a check that it leaves nothing behind, and real child processes."""

import os
import select
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

# numpy's threads block no signal, so they would take those that a test blocks in the main thread.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import isolation
import pytest
from hypothesis import HealthCheck, settings

from ipckit import registry
from ipckit.messagelog import MessageLog

isolation.leave_process_1()
ISOLATED = isolation.isolated() or isolation.isolate()
QUEUES = isolation.QUEUES if ISOLATED else "/dev/mqueue"
signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
# A signal that is ignored here is ignored in each child that a test signals: a shell ignores SIGINT and SIGQUIT
# for its background jobs, nohup SIGHUP. A program executed by us has the default again, if we have a handler.
for number in (signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)
signal.signal(signal.SIGINT, signal.default_int_handler)

# Seconds that a test waits for a condition before it gives up: never reached without a fault.
PATIENCE = 300.0
# Generated inputs: a busy machine is no fault.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
# Of a log that a test does not close by itself; its default is ten seconds.
MessageLog.close.__kwdefaults__["timeout"] = PATIENCE  # type: ignore[index]


# --- workers side by side ------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    # The thread by which a worker hears from pytest holds no lock that a child would need; and
    # from 3.15 on this warning, made an error, would come when the child is there, and lose it.
    config.addinivalue_line("filterwarnings", "ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two a processor, as tests wait half of their time; none where they would see each other's objects."""
    return 2 * len(os.sched_getaffinity(0)) if ISOLATED else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[Any]) -> None:
    """Each isolated before its Python begins: when this file is imported there it has a thread already."""
    for spec in specs:
        spec.python = shlex.join([sys.executable, isolation.__file__])


# --- nothing left behind -------------------------------------------------------------------------


def open_descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the descriptor of this listing itself
            continue
    return found


def children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError):  # of a thread that was joined, and only now is gone
            found |= {int(pid) for pid in task.read_text().split()}
    return found


def system_v_ids() -> set[tuple[str, str]]:
    found = set()
    for kind in ("msg", "sem", "shm"):
        for line in Path("/proc/sysvipc", kind).read_text().splitlines()[1:]:
            found.add((kind, line.split()[1]))
    return found


def tidy_registries() -> None:
    """What goes when a process ends in good order; that of a test goes on, or is killed."""
    registry.tidy()
    for path, _ in registry.folders():
        if os.geteuid() == 0 and os.listdir(path) == ["lock"]:
            os.unlink(f"{path}/lock")
            os.rmdir(path)


def named_objects() -> set[str]:
    tidy_registries()
    return {
        f"{folder}/{name}"
        for folder in ("/dev/shm", QUEUES)
        if os.path.isdir(folder)
        for name in os.listdir(folder)
    }


def handlers() -> dict[int, object]:
    """The handler of every signal but SIGALRM, which keeps the time limit of the tests."""
    return {number: signal.getsignal(number) for number in signal.valid_signals() - {signal.SIGALRM}}


def kernel_dispositions() -> str:
    """SigBlk, SigIgn and SigCgt as the kernel has them; without SIGALRM and what glibc needs for threads."""
    ours = sum(1 << (number - 1) for number in (signal.SIGALRM, 32, 33))
    masks = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(("SigBlk", "SigIgn", "SigCgt")):
            name, mask = line.split()
            masks[name] = int(mask, 16) & ~ours
    return str(masks)


def everything() -> dict[str, object]:
    return {
        "descriptors": open_descriptors(),
        "children": children(),
        "threads": {thread.name for thread in threading.enumerate()},
        "System V ids": system_v_ids(),
        "named objects": named_objects(),
        "signal handlers": handlers(),
        "signal masks": kernel_dispositions(),
    }


def stop_helpers() -> None:
    """Those processes of multiprocessing that go on for its next use: from 3.14 on each use has them."""
    for module, helper in (("forkserver", "_forkserver"), ("resource_tracker", "_resource_tracker")):
        if loaded := sys.modules.get(f"multiprocessing.{module}"):
            getattr(loaded, helper)._stop()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = everything()
    yield
    stop_helpers()
    after = everything()
    left = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    for pid in after["children"] - before["children"]:  # type: ignore[operator]
        os.kill(pid, signal.SIGKILL)  # or it would be blamed on every later test
        os.waitpid(pid, 0)
    assert not left, f"left behind (before, after): {left}"


# --- children ------------------------------------------------------------------------------------


class Forked:
    """A forked child running ``target(ready, *args)``; ``ready()`` tells the parent how far it came."""

    def __init__(self, target: Callable[..., object], *args: object) -> None:
        self.pid = 0
        self.status: int | None = None
        self._told, tell = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._told)
            self._run(lambda: os.write(tell, b"."), target, args)
        os.close(tell)

    @staticmethod
    def _run(ready: Callable[[], int], target: Callable[..., object], args: tuple[object, ...]) -> None:
        code = 1
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)  # the limit of the test is the parent's
            target(ready, *args)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def wait_ready(self, timeout: float = PATIENCE) -> None:
        """Wait until the child called ready(); fails when it ended before, or at the deadline."""
        readable, _, _ = select.select([self._told], [], [], timeout)
        assert readable, f"child {self.pid} was not ready after {timeout} s"
        assert os.read(self._told, 1), f"child {self.pid} ended before it was ready"

    def kill(self, signum: int = signal.SIGKILL) -> None:
        assert self.status is None, "the child has been reaped already"
        os.kill(self.pid, signum)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The child's exit code, or minus the signal that ended it."""
        if self.status is None:
            pidfd = os.pidfd_open(self.pid)
            readable, _, _ = select.select([pidfd], [], [], timeout)
            os.close(pidfd)
            assert readable, f"child {self.pid} still runs after {timeout} s"
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def close(self) -> None:
        if self.status is None:
            self.kill()
            self.wait()
        os.close(self._told)


@pytest.fixture
def forked(nothing_left_behind: None) -> Iterator[Callable[..., Forked]]:
    """``child = forked(target, *args)``: a real process; what still runs at the end is killed."""
    started: list[Forked] = []

    def start(target: Callable[..., object], *args: object) -> Forked:
        started.append(Forked(target, *args))
        return started[-1]

    yield start
    for child in started:
        child.close()


def eventually(condition: Callable[[], object], timeout: float = PATIENCE) -> None:
    """Poll *condition* until it holds; for what the kernel shows only in /proc."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not true within {timeout} s"
        time.sleep(0.001)
