"""SelfPipe: signals as a descriptor, by handlers; and what forked children and started programs have of it."""

import asyncio
import errno
import faulthandler
import multiprocessing
import os
import re
import select
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest
from conftest import PATIENCE, eventually

import ipckit
from ipckit import signals
from ipckit._native import lib
from ipckit.errors import Closed
from ipckit.signals import SelfPipe, SignalQueue, blocked, pending, sigaction

TERM, USR1, USR2 = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2
FORK = multiprocessing.get_context("fork")


def taken(self_pipe):
    """The next signals that come to it."""
    assert select.select([self_pipe], [], [], PATIENCE)[0], "nothing comes"
    return self_pipe.take()


def rings(self_pipe):
    return select.select([self_pipe], [], [], 0)[0] == [self_pipe]


def kernel_action(signum):
    """Without SA_RESTORER, which the C library adds with the first action that is set, for ever."""
    kernel = signals._kernel_action(signum)
    return kernel.handler, kernel.mask, kernel.flags & ~0x04000000


def mask():
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


def masks(pid="self"):
    """{"SigBlk": set of numbers, ...} of a process, without the two that glibc keeps for threads."""
    found = re.findall(r"^(Sig\w+):\s+([0-9a-f]{16})$", Path(f"/proc/{pid}/status").read_text(), re.M)
    bits = {name: int(mask, 16) for name, mask in found}
    return {
        name: {number for number in range(1, 65) if mask >> (number - 1) & 1} - {32, 33}
        for name, mask in bits.items()
    }


# --- what it takes -------------------------------------------------------------------------------


def test_a_signal_is_something_to_wait_for():
    with SelfPipe([USR1, USR2]) as self_pipe:
        assert not rings(self_pipe)
        assert self_pipe.take() == set()
        os.kill(os.getpid(), USR1)
        os.kill(os.getpid(), USR1)
        os.kill(os.getpid(), USR2)
        assert taken(self_pipe) == {USR1, USR2}
        assert not rings(self_pipe)
        assert self_pipe.take() == set()
        os.kill(os.getpid(), USR1)
        assert taken(self_pipe) == {USR1}
        assert repr(self_pipe) == f"<SelfPipe of SIGUSR1, SIGUSR2, descriptor {self_pipe.fileno()}>"
    assert repr(self_pipe) == "<SelfPipe of SIGUSR1, SIGUSR2, closed>"
    for use in (self_pipe.take, self_pipe.fileno):
        with pytest.raises(Closed):
            use()
    self_pipe.close()


def test_a_thread_that_was_there_before_may_get_the_signal():
    go, end = threading.Event(), threading.Event()

    def target():
        go.wait()
        signal.pthread_kill(threading.get_ident(), USR1)
        end.set()

    thread = threading.Thread(target=target)
    thread.start()
    with SelfPipe([USR1]) as self_pipe:
        go.set()
        end.wait()
        thread.join()
        assert taken(self_pipe) == {USR1}


def test_one_signal_is_not_lost_behind_many_of_another(forked):
    def storm(ready):
        for _ in range(20_000):
            os.kill(os.getppid(), USR1)
        os.kill(os.getppid(), TERM)

    with SelfPipe([USR1, TERM]) as self_pipe:
        assert forked(storm).wait() == 0  # nothing is taken meanwhile
        assert taken(self_pipe) == {USR1, TERM}


def test_wake_from_another_thread_and_without_any_signal():
    with SelfPipe() as self_pipe:
        thread = threading.Thread(target=self_pipe.wake)
        thread.start()
        assert taken(self_pipe) == set()
        thread.join()
        assert repr(self_pipe).startswith("<SelfPipe of no signals, descriptor ")
    self_pipe.wake()  # nobody hears


@pytest.mark.serial  # beside others there is a thread that would take what is blocked here
def test_what_was_blocked_is_taken_at_once_and_blocked_again_after_it():
    with blocked([USR1, USR2]):
        os.kill(os.getpid(), USR1)
        with SelfPipe([USR1]) as self_pipe:
            assert mask() == {USR2}
            assert taken(self_pipe) == {USR1}
            os.kill(os.getpid(), USR1)
        assert mask() == {USR1, USR2}
        assert pending() == {USR1}, "nobody took it"
        with SelfPipe([USR1]) as self_pipe:
            assert taken(self_pipe) == {USR1}
    assert mask() == set()


def test_what_nobody_takes_is_sent_again():
    got = []
    former = signal.signal(USR1, lambda *_: got.append("theirs"))
    try:
        with SelfPipe([USR1]):
            os.kill(os.getpid(), USR1)
            assert got == []
        assert got == ["theirs"]
    finally:
        signal.signal(USR1, former)


def test_an_inner_one_has_what_the_outer_one_has_noted_and_leaves_it_the_rest():
    with SelfPipe([USR1, USR2]) as outer:
        os.kill(os.getpid(), USR1)
        os.kill(os.getpid(), USR2)
        with SelfPipe([USR1]) as inner:
            assert taken(inner) == {USR1}
            assert taken(outer) == {USR2}
            os.kill(os.getpid(), USR1)
            assert rings(inner) and not rings(outer)
        assert taken(outer) == {USR1}
        os.kill(os.getpid(), USR1)
        assert taken(outer) == {USR1}


def test_wrong_signals_and_wrong_threads():
    with pytest.raises(ValueError, match="99 is not the number of a signal"):
        SelfPipe([99])
    with pytest.raises(OSError, match="SelfPipe of SIGKILL, which nobody can") as caught:
        SelfPipe([signal.SIGKILL])
    assert caught.value.errno == errno.EINVAL
    raised = []

    def elsewhere():
        try:
            SelfPipe([USR1])
        except ValueError as error:
            raised.append(str(error))
        with SelfPipe() as self_pipe:
            self_pipe.wake()
            raised.append(taken(self_pipe))

    thread = threading.Thread(target=elsewhere, name="other")
    thread.start()
    thread.join()
    assert raised == ["sigaction of SIGUSR1 works only in the main thread, not in other", set()]


# --- what was there before -----------------------------------------------------------------------


def in_c(sink):
    faulthandler.register(USR1, file=sink)
    return lambda: faulthandler.unregister(USR1)


def in_python(_):
    former = signal.signal(USR1, lambda *_: None)
    signal.siginterrupt(USR1, False)
    return lambda: signal.signal(USR1, former)


def with_siginfo(_):
    return sigaction(USR1, print, mask=[USR2], flags=signals.SA_RESTART, info=True).restore


def ignored(_):
    return sigaction(USR1, signal.SIG_IGN).restore


@pytest.mark.parametrize("install", [in_c, in_python, with_siginfo, ignored, lambda _: lambda: None])
def test_close_puts_back_exactly_what_was_there(install):
    with open(os.devnull, "w") as sink:
        undo = install(sink)
        try:
            before = kernel_action(USR1), signal.getsignal(USR1)
            with SelfPipe([USR1]) as self_pipe:
                assert kernel_action(USR1) != before[0]
                with SelfPipe([USR1]):
                    pass
                os.kill(os.getpid(), USR1)
                assert taken(self_pipe) == {USR1}
            assert (kernel_action(USR1), signal.getsignal(USR1)) == before
        finally:
            undo()


def test_an_action_with_siginfo_works_as_before():
    got = []
    with sigaction(USR1, got.append, info=True):
        with SelfPipe([USR1]) as self_pipe:
            os.kill(os.getpid(), USR1)
            assert taken(self_pipe) == {USR1}
        os.kill(os.getpid(), USR1)
    assert [info.pid for info in got] == [os.getpid()]


def test_a_handler_that_was_set_since_stays():
    former = signal.getsignal(USR1)
    try:
        with SelfPipe([USR1]):
            signal.signal(USR1, signal.SIG_IGN)
        assert signal.getsignal(USR1) is signal.SIG_IGN
        os.kill(os.getpid(), USR1)
    finally:
        signal.signal(USR1, former)


def test_who_saves_and_puts_back_a_handler_does_not_disturb_it():
    """As asyncio.run() does with SIGINT, if it finds Python's own handler; here it finds ours."""
    with SelfPipe([USR1, signal.SIGINT]) as self_pipe:
        signal.signal(USR1, signal.signal(USR1, signal.SIG_IGN))
        for _ in range(2):  # the first one by CPython's handler
            os.kill(os.getpid(), USR1)
            assert taken(self_pipe) == {USR1}
        asyncio.run(asyncio.sleep(0))
        os.kill(os.getpid(), signal.SIGINT)
        assert taken(self_pipe) == {signal.SIGINT}


@pytest.mark.parametrize("put_back", [False, True])
def test_put_back_after_its_time_it_gives_way_to_what_was_before(put_back):
    got = []
    former = signal.signal(USR1, lambda *_: got.append("theirs"))
    try:
        with SelfPipe([USR1]):
            saved = signal.getsignal(USR1)
            action = sigaction(USR1, signal.SIG_IGN)
        signal.signal(USR1, saved) if put_back else action.restore()
        os.kill(os.getpid(), USR1)
        os.kill(os.getpid(), USR1)
        assert got == ["theirs", "theirs"]
    finally:
        signal.signal(USR1, former)


def test_no_thread_writes_into_what_gets_the_number_of_a_closed_one(forked, tmp_path):
    """Its handler may just know the descriptor when that is closed, and the next file has its number."""

    def storm(ready):
        parent = os.getppid()
        while os.getppid() == parent:
            os.kill(parent, USR1)

    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    former = signal.signal(USR1, signal.SIG_IGN)
    child = forked(storm)
    try:
        for number in range(200):
            self_pipe = SelfPipe([USR1])
            fd = self_pipe.fileno()
            with blocked([USR1]):  # the other thread gets them
                taken(self_pipe)
                self_pipe.close()
                with open(tmp_path / "file", "w") as file:
                    assert file.fileno() == fd
            assert (tmp_path / "file").stat().st_size == 0, number
    finally:
        child.kill()
        child.wait()
        signal.signal(USR1, former)
        end.set()
        thread.join()


# --- forks and programs --------------------------------------------------------------------------


def forked_by_os(target):
    pid = os.fork()
    if pid == 0:
        try:
            target()
            os._exit(0)
        finally:  # it is not to go on with the tests
            traceback.print_exc()
            os._exit(1)
    return pid, lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def forked_by_multiprocessing(target):
    process = FORK.Process(target=target)
    process.start()

    def wait():
        process.join()
        code = process.exitcode
        process.close()
        return code

    return process.pid, wait


def forked_by_ipckit(target):
    child = ipckit.fork(target)

    def wait():
        status = child.wait(PATIENCE)
        child.close()
        return -status.signal if status.signaled else status.code

    return child.pid, wait


FORKS = [forked_by_os, forked_by_multiprocessing, forked_by_ipckit]


@pytest.mark.parametrize("fork", FORKS)
def test_a_forked_child_can_be_terminated_and_does_not_ring(fork):
    with SelfPipe([TERM]) as self_pipe:
        for _ in range(3):
            pid, wait = fork(signal.pause)
            os.kill(pid, TERM)
            assert wait() == -TERM
        assert not rings(self_pipe)
        os.kill(os.getpid(), TERM)
        assert taken(self_pipe) == {TERM}


@pytest.mark.parametrize("fork", FORKS)
def test_a_forked_child_has_what_was_there_before(fork):
    before = signal.getsignal(USR1), kernel_action(USR1)

    def target():
        assert outer.closed and inner.closed
        assert (signal.getsignal(USR1), kernel_action(USR1)) == before
        assert lib.ik_signals_take(1 << (USR1 - 1)) == 0, "what its parent noted is its parent's"
        with SelfPipe([USR1]) as own:
            os.kill(os.getpid(), USR1)
            assert taken(own) == {USR1}

    with SelfPipe([USR1]) as outer, SelfPipe([USR1, USR2]) as inner:
        os.kill(os.getpid(), USR1)
        _, wait = fork(target)
        assert wait() == 0
        assert taken(inner) == {USR1}


def test_a_child_forked_behind_the_back_of_python_has_the_action_from_before():
    """By a library in C, whose child runs none of Python's hooks."""
    text = """if 1:
        import ctypes, os, signal, select
        from ipckit.signals import SelfPipe
        with SelfPipe([signal.SIGTERM]) as self_pipe:
            pid = ctypes.CDLL(None).fork()
            if pid == 0:
                signal.pause()
            os.kill(pid, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
            assert select.select([self_pipe], [], [], 0)[0] == []
    """
    subprocess.run([sys.executable, "-c", text], check=True, timeout=PATIENCE)


def test_a_program_that_is_started_has_nothing_of_it():
    with blocked([TERM]), SelfPipe([TERM, USR1]), subprocess.Popen(["sleep", "1000"]) as process:
        program = masks(process.pid)
        process.terminate()
        assert process.wait(PATIENCE) == -TERM
    assert program["SigBlk"] & {TERM, USR1} == program["SigIgn"] & {TERM, USR1} == set()


# --- SignalQueue and fork ------------------------------------------------------------------------


def test_a_child_beside_a_signal_queue_can_be_terminated():
    with SignalQueue([TERM, USR1]):
        for options in ({}, {"keep": []}):
            with ipckit.fork(signal.pause, **options) as child:
                child.terminate()
                assert child.wait(PATIENCE).signal == TERM
    assert mask() == set()


def test_a_child_beside_a_signal_queue_has_its_handlers():
    with SignalQueue([TERM]):
        stop = {TERM: lambda *_: sys.exit(7)}
        with ipckit.fork(signal.pause, handlers=stop) as child:
            child.terminate()
            assert child.wait(PATIENCE).code == 7


def test_what_the_user_has_blocked_himself_stays_blocked_in_the_child():
    with blocked([USR1]), SignalQueue([USR1, USR2]) as queue:

        def target():
            assert queue.closed
            assert mask() == {USR1}

        with ipckit.fork(target) as child:
            assert child.wait(PATIENCE).code == 0


def test_a_queue_that_the_child_is_to_keep():
    def target():
        assert mask() == {USR1, USR2} and other.closed
        return queue.recv(timeout=PATIENCE).signo

    with (
        SignalQueue([USR1]) as other,
        SignalQueue([USR1, USR2]) as queue,
        ipckit.fork(target, keep=[queue]) as child,
    ):
        child.send_signal(USR1)
        assert child.wait(PATIENCE).code == USR1


def test_a_child_of_another_thread_too():
    codes = []

    def elsewhere():
        with ipckit.fork(signal.pause) as child:
            child.terminate()
            codes.append(child.wait(PATIENCE).signal)

    with SignalQueue([TERM]):
        thread = threading.Thread(target=elsewhere)  # it inherits the mask, as it must
        thread.start()
        thread.join()
    assert codes == [TERM]


def test_a_supervisor_by_a_self_pipe(tmp_path):
    """What the reference says: it reads its signals in a loop, and ends the programs that it has started."""
    text = """if 1:
        import select, signal, subprocess
        from ipckit.signals import SelfPipe
        with SelfPipe([signal.SIGTERM, signal.SIGCHLD]) as signals:
            program = subprocess.Popen(["sleep", "1000"])
            print("started", flush=True)
            while program.poll() is None:
                select.select([signals], [], [])
                if signal.SIGTERM in signals.take():
                    program.terminate()
            print(program.returncode)
    """
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout.readline() == "started\n"
        supervisor.terminate()
        assert supervisor.stdout.read() == f"{-TERM}\n"
        assert supervisor.wait(PATIENCE) == 0
    eventually(lambda: supervisor.poll() == 0)
