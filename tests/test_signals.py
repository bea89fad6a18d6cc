import asyncio
import errno
import faulthandler
import fcntl
import gc
import json
import logging
import os
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
from conftest import PATIENCE, eventually

from ipckit import signals
from ipckit.errors import Closed
from ipckit.signals import SignalQueue, blocked, pending, sigaction, sigqueue

RT = signal.SIGRTMIN
RT1 = signal.SIGRTMIN + 1
USR1 = signal.SIGUSR1
USR2 = signal.SIGUSR2
ROOT = Path(__file__).parent.parent
WHOLE = bool(os.environ.get("IPCKIT_PROOF"))

# Beside other tests there is a thread that would take the signals which a test blocks.
pytestmark = pytest.mark.serial


def send_values(ready, pid, count, refused):
    """A child that queues 0, 1, ... with RT; the file *refused* tells of the first EAGAIN, or of the end."""
    ready()
    for value in range(count):
        while True:
            try:
                sigqueue(pid, RT, value)
                break
            except BlockingIOError:
                refused.touch()
                time.sleep(0.001)
    refused.touch()


def in_one_c_call(go, until):
    """Make the directory *go* and wait for the file *until*: no bytecode runs, so no Python handler does."""
    deque(chain(map(os.mkdir, [str(go)]), iter(partial(os.access, str(until), os.F_OK), True)), maxlen=0)


def send_values_after(ready, go, *args):
    eventually(go.exists)
    send_values(ready, *args)


def busy_until(condition):
    """What a Python program does all day: calls, garbage, text."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        json.loads(json.dumps({"a": [{} for _ in range(20)]}))


def threads_that_take_signals():
    """Those beside this one that do not block all, as the thread of a worker does."""
    masks = [task.read_text().split("SigBlk:\t")[1][:16] for task in Path("/proc/self/task").glob("*/status")]
    return sum(not int(mask, 16) & 1 << (USR1 - 1) for mask in masks) - 1


@pytest.fixture(autouse=True)
def alone(forked):
    """Another thread would take the signals that a test blocks: numpy has some, up to the first fork."""
    if threads_that_take_signals():
        forked(lambda ready: None).wait()
    assert threads_that_take_signals() == 0


@pytest.fixture
def few_pending():
    """Let the kernel hold 8,000 pending signals at most, whatever the machine allows."""
    former = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (8000, former[1]))
    yield
    resource.setrlimit(resource.RLIMIT_SIGPENDING, former)


# --- nothing is lost -----------------------------------------------------------------------------


def test_each_of_a_thousand_real_time_signals_is_handled_once_and_in_order():
    got = []
    with sigaction(RT, got.append, info=True), blocked():
        for value in range(1000):
            sigqueue(os.getpid(), RT, value)
        assert got == []
        assert pending() == {RT}
    assert [info.value for info in got] == list(range(1000))
    assert {(info.signo, info.pid, info.uid) for info in got} == {(RT, os.getpid(), os.getuid())}


def test_a_thousand_arrive_during_one_long_c_call(forked, tmp_path):
    refused = tmp_path / "refused"
    got = []
    with sigaction(RT, lambda info: got.append((info.value, refused.exists())), info=True):
        child = forked(send_values_after, tmp_path / "go", os.getpid(), 1000, refused)
        in_one_c_call(tmp_path / "go", refused)
        assert got == [(value, True) for value in range(1000)], "True: the call held the handlers off"
        assert child.wait() == 0


COUNT = 1_000_000 if WHOLE else 100_000


@pytest.mark.proof
def test_values_to_a_busy_receiver_all_come_in_order(forked, tmp_path, few_pending):
    refused = tmp_path / "refused"
    got = []
    with sigaction(RT, lambda info: got.append(info.value), info=True):
        child = forked(send_values_after, tmp_path / "go", os.getpid(), COUNT, refused)
        in_one_c_call(tmp_path / "go", refused)
        assert len(got) < COUNT, "the ring filled, then the kernel's queue, then the sender was refused"
        busy_until(lambda: len(got) == COUNT)
        assert child.wait() == 0
    assert got == list(range(COUNT))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()), "nothing stays held back"


@pytest.mark.proof
def test_values_to_a_signal_queue_all_come_in_order(forked, tmp_path, few_pending):
    got = []
    with SignalQueue((RT,)) as queue:
        child = forked(send_values, os.getpid(), COUNT, tmp_path / "refused")
        eventually((tmp_path / "refused").exists)
        while len(got) < COUNT:
            got += [info.value for info in queue.recv_many(timeout=PATIENCE)]
        assert child.wait() == 0
    assert got == list(range(COUNT))


def test_threads_that_take_signals_lose_none(forked, tmp_path, few_pending):
    """Once the main thread has enough, the kernel gives them to the others; order is not kept then."""
    script = """
import os, signal, sys, threading
from collections import deque
from functools import partial
from itertools import chain
from ipckit.signals import sigaction
got, stop = [], threading.Event()
for _ in range(8):
    threading.Thread(target=stop.wait, daemon=True).start()
with sigaction(signal.SIGRTMIN, lambda info: got.append(info.value), info=True):
    print(flush=True)
    deque(iter(partial(os.access, sys.argv[1], os.F_OK), True), maxlen=0)
    while len(got) < 20000:
        sum(range(100))
stop.set()
assert sorted(got) == list(range(20000))
"""
    path = tmp_path / "refused"
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as receiver:
        receiver.stdout.readline()
        child = forked(send_values, receiver.pid, 20_000, path)
        assert child.wait() == 0
        assert receiver.wait(PATIENCE) == 0


def storm(ready, pid, count):
    """A child that sends two kinds of signals, and at the end, by a third, how many were accepted."""
    ready()
    accepted = 0
    for value in range(count):
        try:
            os.kill(pid, USR1)
            sigqueue(pid, RT, value)
            accepted += 1
        except BlockingIOError:
            time.sleep(0.001)
    while True:
        try:
            sigqueue(pid, RT1, accepted)
            return
        except BlockingIOError:
            time.sleep(0.001)


@pytest.mark.proof
def test_a_storm_over_a_program_that_logs_and_allocates(forked, tmp_path):
    values, accepted, others, lines = [], [], [], 0
    log = logging.getLogger("storm")
    log.propagate = False
    # The kernel searches all that wait for each standard signal: let no more than this wait.
    former = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (4000, former[1]))
    log.addHandler(logging.FileHandler(tmp_path / "log"))
    with (
        sigaction(RT, lambda info: values.append(info.value), info=True),
        sigaction(USR1, lambda *_: others.append({}), mask=(RT,)),
        sigaction(RT1, lambda info: accepted.append(info.value), info=True),
    ):
        child = forked(storm, os.getpid(), 300_000 if WHOLE else 50_000)
        end = time.monotonic() + PATIENCE * (20 if WHOLE else 1)
        while [len(values)] != accepted and time.monotonic() < end:
            log.error("line %d of %s", lines, [{} for _ in range(50)])
            lines += 1
        assert child.wait() == 0
    log.handlers.pop().close()
    resource.setrlimit(resource.RLIMIT_SIGPENDING, former)
    assert [len(values)] == accepted
    assert values == sorted(set(values))
    assert others
    text = (tmp_path / "log").read_text().splitlines()
    assert text == [f"line {n} of {[{} for _ in range(50)]}" for n in range(lines)]


def test_standard_signals_coalesce_as_the_kernel_does():
    got = []
    with sigaction(USR1, got.append, info=True), blocked((USR1,)):
        for value in range(5):
            sigqueue(os.getpid(), USR1, value)
    assert [info.value for info in got] == [0]


# --- what a handler is told ----------------------------------------------------------------------


def test_a_plain_handler_gets_the_number_and_the_frame():
    got = []
    with sigaction(USR1, lambda *args: got.append(args)):
        os.kill(os.getpid(), USR1)
    [(signum, frame)] = got
    assert signum == USR1
    assert frame.f_code.co_name == "test_a_plain_handler_gets_the_number_and_the_frame"


def test_kill_tells_the_sender(forked):
    got = []
    with sigaction(USR1, got.append, info=True):
        child = forked(lambda ready: os.kill(os.getppid(), USR1))
        assert child.wait() == 0
    assert [(info.code, info.pid, info.uid, info.value) for info in got] == [(0, child.pid, os.getuid(), 0)]


def test_sigqueue_carries_the_whole_range_of_values():
    values = [0, 1, -1, 2**31 - 1, -(2**31)]
    got = []
    with sigaction(RT, got.append, info=True):
        for value in values:
            sigqueue(os.getpid(), RT, value)
    assert [(info.code, info.value) for info in got] == [(-1, value) for value in values]


def test_sigchld_tells_how_the_child_ended(forked):
    got = []
    with sigaction(signal.SIGCHLD, got.append, info=True):
        exits = forked(lambda ready: os._exit(7))
        assert exits.wait() == 7
        killed = forked(lambda ready: signal.pause())
        killed.kill(signal.SIGTERM)
        assert killed.wait() == -signal.SIGTERM
    assert [(info.code, info.pid, info.status) for info in got] == [
        (os.CLD_EXITED, exits.pid, 7),
        (os.CLD_KILLED, killed.pid, signal.SIGTERM),
    ]


def test_an_interval_timer_comes_from_the_kernel():
    got = []
    with sigaction(signal.SIGVTALRM, got.append, info=True):
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.001)
        busy_until(lambda: got)
    assert got[0] == (signal.SIGVTALRM, 128, 0, 0, 0, 0, 0, 0)  # SI_KERNEL


def test_input_on_a_descriptor_tells_the_band():
    got = []
    left, right = socket.socketpair()
    with sigaction(RT, got.append, info=True), left, right:  # closing one sends another to the other
        fcntl.fcntl(left, fcntl.F_SETSIG, RT)
        fcntl.fcntl(left, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(left, fcntl.F_SETFL, os.O_ASYNC)
        right.send(b"x")
        busy_until(lambda: got)
    assert got[0].band & select.POLLIN


# --- flags and mask ------------------------------------------------------------------------------


def test_a_handler_is_not_interrupted_by_its_own_signal_unless_nodefer():
    for flags, expected in (
        (0, ["in", "out", "in", "out"]),
        (signals.SA_NODEFER, ["in", "in", "out", "out"]),
    ):
        trace = []

        def handler(info, trace=trace):
            trace.append("in")
            if info.value == 0:
                sigqueue(os.getpid(), RT, 1)
            trace.append("out")

        with sigaction(RT, handler, flags=flags, info=True):
            sigqueue(os.getpid(), RT, 0)
        assert trace == expected


def test_the_mask_holds_while_the_python_handler_runs_and_others_nest():
    trace = []

    def outer(signum, frame):
        for other in (USR2, RT, signal.SIGHUP):
            os.kill(os.getpid(), other)
        trace.append(("outer", sorted(pending())))

    former = signal.signal(signal.SIGHUP, lambda *_: trace.append("hup of signal.signal"))
    with (
        sigaction(USR1, outer, mask=(USR2, signal.SIGHUP)),
        sigaction(USR2, lambda *_: trace.append("usr2")),
        sigaction(RT, lambda *_: trace.append("rt")),
    ):
        os.kill(os.getpid(), USR1)
        assert trace[:2] == ["rt", ("outer", [signal.SIGHUP, USR2])]
        assert sorted(trace[2:]) == ["hup of signal.signal", "usr2"]
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    signal.signal(signal.SIGHUP, former)


def test_what_had_arrived_waits_for_a_handler_that_masks_it():
    trace = []

    def first(info):
        trace.append("first in")
        sum(range(1000))
        trace.append("first out")

    with (
        sigaction(RT, first, mask=(RT1,), info=True),
        sigaction(RT1, lambda info: trace.append(info.value), info=True),
        blocked(),
    ):
        for signum, value in ((RT, 0), (RT1, 1), (RT1, 2)):
            sigqueue(os.getpid(), signum, value)
    assert trace == ["first in", "first out", 1, 2]


def test_resethand_is_for_one_signal(forked):
    def target(ready):
        got = []
        sigaction(USR1, lambda *_: got.append(1), flags=signals.SA_RESETHAND)
        os.kill(os.getpid(), USR1)
        assert got == [1]
        assert sigaction(USR2, signal.SIG_IGN).handler is signal.SIG_DFL
        ready()
        os.kill(os.getpid(), USR1)

    child = forked(target)
    child.wait_ready()
    assert child.wait() == -USR1


def read_one(ready, reader, answer, flags):
    """A child that writes the time at which its handler ran."""
    sigaction(USR1, lambda *_: os.write(answer, str(time.monotonic_ns()).encode()), flags=flags)
    ready()
    os.read(reader, 1)


@pytest.mark.parametrize("flags", [0, signals.SA_RESTART])
def test_restart_makes_the_handler_wait_for_the_system_call(forked, flags):
    (reader, writer), (answers, answer) = os.pipe(), os.pipe()
    child = forked(read_one, reader, answer, flags)
    child.wait_ready()
    proc = Path(f"/proc/{child.pid}")
    eventually(lambda: proc.joinpath("stat").read_text().split()[2] == "S")
    child.kill(USR1)
    if flags == 0:
        ran = int(os.read(answers, 50))  # at once, although the read still waits
        os.write(writer, b"x")
    else:
        eventually(lambda: "SigPnd:\t0000000000000000" in proc.joinpath("status").read_text())
        eventually(lambda: "ShdPnd:\t0000000000000000" in proc.joinpath("status").read_text())
        eventually(lambda: proc.joinpath("stat").read_text().split()[2] == "S")
        wrote = time.monotonic_ns()
        os.write(writer, b"x")
        ran = int(os.read(answers, 50))
        assert ran > wrote
    assert child.wait() == 0
    for fd in (reader, writer, answers, answer):
        os.close(fd)


def test_nocldwait_leaves_no_child_to_wait_for():
    with sigaction(signal.SIGCHLD, signal.SIG_DFL, flags=signals.SA_NOCLDWAIT):
        pid = os.fork()
        if pid == 0:
            os._exit(3)
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, 0)


def test_nocldstop_tells_only_of_the_end(forked):
    for flags, expected in ((0, [os.CLD_STOPPED, os.CLD_KILLED]), (signals.SA_NOCLDSTOP, [os.CLD_KILLED])):
        got = []
        with sigaction(signal.SIGCHLD, got.append, flags=flags, info=True):
            child = forked(lambda ready: signal.pause())
            child.kill(signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED)
            child.kill()
            child.wait()
        assert [info.code for info in got if info.code != os.CLD_CONTINUED] == expected


def test_ignored_and_default(forked):
    with sigaction(USR1, signal.SIG_IGN):
        os.kill(os.getpid(), USR1)
        with sigaction(USR1, signal.SIG_DFL) as former:
            assert former.handler is signal.SIG_IGN
            child = forked(lambda ready: os.kill(os.getpid(), USR1))
            assert child.wait() == -USR1


# --- exceptions ----------------------------------------------------------------------------------


class Third(Exception):
    pass


def test_an_exception_in_a_handler_loses_nothing_of_the_rest():
    got = []

    def handler(info):
        got.append(info.value)
        if info.value == 3:
            raise Third

    with sigaction(RT, handler, info=True):
        with pytest.raises(Third), blocked((RT,)):
            for value in range(100):
                sigqueue(os.getpid(), RT, value)
        busy_until(lambda: len(got) == 100)
    assert got == list(range(100))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()), "the handler's mask is gone"


def test_ctrl_c_gets_through_a_flood_and_loses_nothing(forked, tmp_path):
    got = []

    go, refused = tmp_path / "go", tmp_path / "refused"

    def flood(ready, pid):
        send_values_after(ready, go, pid, 5000, refused)
        os.kill(pid, signal.SIGINT)
        send_values(ready, pid, 5000, refused)

    with sigaction(RT, got.append, info=True):
        child = forked(flood, os.getpid())
        with pytest.raises(KeyboardInterrupt):
            go.touch()
            busy_until(lambda: False)
        busy_until(lambda: len(got) >= 9999)
        assert child.wait() == 0
    lost = 10_000 - len(got)
    assert lost <= 1, "at most the one whose handler Ctrl-C broke off"


# --- beside others -------------------------------------------------------------------------------


def test_asyncio_signal_handlers_work_beside_ours():
    async def main():
        loop = asyncio.get_running_loop()
        theirs, ours = asyncio.Event(), asyncio.Event()
        loop.add_signal_handler(USR2, theirs.set)
        with sigaction(USR1, lambda *_: ours.set()):
            for signum, event in ((USR1, ours), (USR2, theirs)) * 20:
                os.kill(os.getpid(), signum)
                await asyncio.wait_for(event.wait(), PATIENCE)
                event.clear()
        loop.remove_signal_handler(USR2)

    asyncio.run(main())


def test_the_wakeup_descriptor_is_written_to():
    left, right = socket.socketpair()
    left.setblocking(False)
    with left, right, sigaction(USR1, lambda *_: None):
        former = signal.set_wakeup_fd(left.fileno())
        os.kill(os.getpid(), USR1)
        assert right.recv(10) == bytes([USR1])
        signal.set_wakeup_fd(former)


def test_a_handler_of_signal_signal_wins_and_can_be_put_back():
    got = []
    with sigaction(USR1, lambda info: got.append(info.pid), info=True):
        old = signal.signal(USR1, lambda *_: got.append("theirs"))
        os.kill(os.getpid(), USR1)
        signal.signal(USR1, old)
        os.kill(os.getpid(), USR1)
        os.kill(os.getpid(), USR1)
        me = os.getpid()
        assert got == ["theirs", 0, me], "the first after the change came without its siginfo"
        with sigaction(USR1, signal.SIG_IGN):
            os.kill(os.getpid(), USR1)
        os.kill(os.getpid(), USR1)
        assert got == ["theirs", 0, me, me]
    assert signal.getsignal(USR1) is signal.SIG_DFL


def test_put_back_by_signal_signal_and_replaced_by_us():
    got = []
    with sigaction(USR1, lambda *_: got.append("first")):
        signal.signal(USR1, signal.signal(USR1, signal.SIG_IGN))
        with sigaction(USR1, lambda *_: got.append("second")):
            os.kill(os.getpid(), USR1)
        os.kill(os.getpid(), USR1)
    assert got == ["second", "first"]


def test_former_actions_are_told_and_come_back():
    def handler(*_):
        pass

    first = sigaction(USR1, handler, mask=(USR2,), flags=signals.SA_RESTART)
    assert first.handler is signal.SIG_DFL
    second = sigaction(USR1, print, info=True)
    assert (second.signum, second.handler, second.mask) == (USR1, handler, {USR2})
    assert (second.flags, second.info) == (signals.SA_RESTART, False)
    assert repr(second).startswith("<Action SIGUSR1 <function")
    second.restore()
    assert sigaction(USR1, signal.SIG_DFL).handler is handler
    former = signal.signal(USR1, handler)
    assert sigaction(USR1, print).handler is handler
    first.restore()
    assert signal.signal(USR1, former) is signal.SIG_DFL


def test_a_foreign_handler_in_c_comes_back(forked):
    def target(ready):
        with open(os.devnull, "w") as sink:
            faulthandler.register(USR1, file=sink)
            with sigaction(USR1, lambda *_: None) as former:
                assert former.handler is signal.SIG_DFL or former.handler is None
            os.kill(os.getpid(), USR1)  # would end the process were it SIG_DFL now

    assert forked(target).wait() == 0


def test_a_handler_may_take_itself_away(forked):
    def target(ready):
        got = []

        def theirs(*_):
            got.append("theirs")

        def ours(info):
            got.append(info.value)
            former.restore()

        signal.signal(RT, theirs)
        former = sigaction(RT, ours, info=True)
        with blocked():
            for value in range(3):
                sigqueue(os.getpid(), RT, value)
        busy_until(lambda: len(got) >= 2)
        assert got[:2] == [0, "theirs"], "the rest goes where the kernel would bring it"

    assert forked(target).wait() == 0


# --- fork ----------------------------------------------------------------------------------------


def test_a_child_starts_with_nothing_arrived(forked):
    got = []

    def target(ready):
        assert got == []
        assert pending() == set()
        sigqueue(os.getpid(), RT, 5)
        assert got == [5]

    def handler(info):
        if info.value == 0:
            child = forked(target)  # while nine more wait in the ring
            got.append(child.wait())
        else:
            got.append(info.value)

    def in_child_order(info):
        handler(info)

    with sigaction(RT, in_child_order, flags=signals.SA_NODEFER, info=True), blocked((RT,)):
        for value in range(10):
            sigqueue(os.getpid(), RT, value)
    assert sorted(got) == list(range(10))


def test_a_signal_sent_right_after_fork_reaches_the_child():
    def child():
        end = time.monotonic() + PATIENCE
        while not got and time.monotonic() < end:
            select.select([], [], [], 0.001)
        os._exit(got[0].value if got else 99)

    got = []
    with sigaction(RT, got.append, info=True):
        for value in range(40):
            pid = os.fork()
            if pid == 0:
                child()
            sigqueue(pid, RT, value % 50)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == value % 50


# --- masks ---------------------------------------------------------------------------------------


def mask():
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_blocked_unblocks_exactly_what_it_blocked():
    with blocked((USR1,)):
        with blocked((USR1, USR2)):
            assert mask() == {USR1, USR2}
        assert mask() == {USR1}
        with pytest.raises(Third), blocked():
            assert signal.SIGTERM in mask()
            raise Third
        assert mask() == {USR1}
    assert mask() == set()


def test_an_exception_of_a_pending_handler_leaves_no_mask():
    def handler(*_):
        raise Third

    with sigaction(USR1, handler), pytest.raises(Third), blocked():
        os.kill(os.getpid(), USR1)
    assert mask() == set()


def test_blocked_is_of_the_calling_thread():
    seen = []
    with blocked((USR1,)):
        thread = threading.Thread(target=lambda: seen.append(mask()))
        thread.start()
        thread.join()
    thread = threading.Thread(target=lambda: blocked((USR1,)).__enter__())
    thread.start()
    thread.join()
    gc.collect()
    assert seen == [{USR1}]
    assert mask() == set()


def test_a_program_inherits_what_is_blocked():
    command = ["grep", "SigBlk", "/proc/self/status"]
    with blocked((USR1,)):
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(line.split()[1], 16) == 1 << (USR1 - 1)


# --- SignalQueue ---------------------------------------------------------------------------------


def test_a_queue_gives_each_signal_as_a_message(forked):
    with SignalQueue((RT, signal.SIGCHLD)) as queue:
        assert mask() == {RT, signal.SIGCHLD}
        child = forked(lambda ready: sigqueue(os.getppid(), RT, -5))
        info = {info.signo: info for info in (queue.recv(timeout=PATIENCE), queue.recv(timeout=PATIENCE))}
        assert (info[RT].value, info[RT].pid, info[RT].code) == (-5, child.pid, -1)
        assert (info[signal.SIGCHLD].status, info[signal.SIGCHLD].code) == (0, os.CLD_EXITED)
        assert child.wait() == 0
    assert mask() == set()


def test_a_queue_is_readable_while_a_signal_waits():
    with SignalQueue((RT,)) as queue:
        assert select.select([queue], [], [], 0)[0] == []
        for value in range(3):
            sigqueue(os.getpid(), RT, value)
        assert select.select([queue], [], [], 0)[0] == [queue]
        assert [info.value for info in queue.recv_many(2)] == [0, 1]
        assert select.select([queue], [], [], 0)[0] == [queue]
        assert queue.recv().value == 2
        assert select.select([queue], [], [], 0)[0] == []


def test_iteration_ends_with_close():
    got = []
    with SignalQueue((RT,)) as queue:
        for value in range(5):
            sigqueue(os.getpid(), RT, value)
        for info in queue:
            got.append(info.value)
            if info.value == 4:
                queue.close()
    assert got == [0, 1, 2, 3, 4]


def test_a_queue_in_asyncio():
    async def main():
        got = []
        with SignalQueue((RT,)) as queue:
            receiving = asyncio.create_task(queue.arecv(timeout=PATIENCE))
            await asyncio.sleep(0)
            sigqueue(os.getpid(), RT, 41)
            assert (await receiving).value == 41
            for value in range(3):
                sigqueue(os.getpid(), RT, value)
            async for info in queue:
                got.append(info.value)
                if len(got) == 3:
                    break
            assert got == [0, 1, 2]
            with pytest.raises(TimeoutError, match="SignalQueue of SIGRTMIN") as caught:
                await queue.arecv(timeout=0.01)
            assert caught.value.errno == errno.ETIMEDOUT

    asyncio.run(main())


def test_other_handlers_run_while_a_queue_is_read(forked):
    got = []

    def target(ready):
        os.kill(os.getppid(), USR1)

    def handler(info):
        got.append(info.pid)
        sigqueue(os.getpid(), RT, 1)  # only this lets recv() return

    with SignalQueue((RT,)) as queue, sigaction(USR1, handler, info=True):
        child = forked(target)
        assert queue.recv(timeout=PATIENCE).value == 1
        assert got == [child.pid]
        assert child.wait() == 0


def test_a_forked_child_reads_its_own_signals(forked):
    def target(ready, queue):
        ready()
        sys.exit(queue.recv(timeout=PATIENCE).value)

    with SignalQueue((RT,)) as queue:
        sigqueue(os.getpid(), RT, 1)
        child = forked(target, queue)
        child.wait_ready()
        sigqueue(child.pid, RT, 7)
        assert child.wait() == 7
        assert [info.value for info in queue.recv_many()] == [1]


def test_close_unblocks_what_the_queue_blocked_and_delivers_the_rest():
    got = []
    with sigaction(RT, got.append, info=True), blocked((USR1,)):
        queue = SignalQueue((RT, USR1))
        sigqueue(os.getpid(), RT, 3)
        assert got == []
        thread = threading.Thread(target=SignalQueue((RT,)).close)
        thread.start()
        thread.join()
        assert mask() == {RT, USR1}, "another thread can't change this one's"
        assert not queue.closed
        queue.close()
        queue.close()
        assert queue.closed
        assert mask() == {USR1}
        assert [info.value for info in got] == [3]


def test_a_forgotten_queue_is_closed():
    SignalQueue((RT,))
    gc.collect()
    assert mask() == set()


# --- errors --------------------------------------------------------------------------------------


def test_use_after_close():
    queue = SignalQueue((RT, USR1))
    queue.close()
    for call in (queue.recv, queue.recv_many, queue.fileno):
        with pytest.raises(Closed, match="SignalQueue of SIGUSR1, SIGRTMIN, closed"):
            call()
    assert list(queue) == []


def test_a_queue_times_out():
    with SignalQueue((RT,)) as queue:
        for timeout in (0, 0.01):
            with pytest.raises(TimeoutError, match="SignalQueue of SIGRTMIN, descriptor") as caught:
                queue.recv(timeout=timeout)
            assert caught.value.errno == errno.ETIMEDOUT


def test_a_queue_that_can_not_be_made_leaves_the_mask(forked):
    with pytest.raises(ValueError, match="at least one signal"):
        SignalQueue(())
    with pytest.raises(OSError, match="SignalQueue of SIGKILL") as caught:
        SignalQueue((RT, signal.SIGKILL))
    assert caught.value.errno == errno.EINVAL
    assert mask() == set()

    def target(ready):
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        with pytest.raises(OSError, match="signalfd") as caught:
            SignalQueue((RT,))
        assert caught.value.errno == errno.EMFILE
        assert mask() == set()

    assert forked(target).wait() == 0


def test_recv_many_refuses_a_max_out_of_range():
    with SignalQueue((RT,)) as queue:
        for limit in (0, -1, 65):
            with pytest.raises(ValueError, match=f"max must be an integer from 1 to 64, not {limit}"):
                queue.recv_many(limit)


@pytest.mark.parametrize("number", [0, -1, 65, 32, 10_000])
def test_numbers_that_are_no_signals(number):
    for call in (
        lambda: sigaction(number, signal.SIG_DFL),
        lambda: sigaction(USR1, print, mask=(number,)),
        lambda: SignalQueue((number,)),
        lambda: sigqueue(os.getpid(), number),
        lambda: blocked((number,)).__enter__(),
    ):
        with pytest.raises(ValueError, match=f"{number} is not the number of a signal"):
            call()
    assert signal.getsignal(USR1) is signal.SIG_DFL


def test_what_sigaction_refuses():
    for signum in (signal.SIGKILL, signal.SIGSTOP):
        with pytest.raises(OSError, match=f"sigaction of {signum.name}") as caught:
            sigaction(signum, print)
        assert caught.value.errno == errno.EINVAL
    for handler in ("name", None, 7):
        with pytest.raises(TypeError, match=f"SIGUSR1 must be callable, SIG_DFL or SIG_IGN, not {handler!r}"):
            sigaction(USR1, handler)
    with pytest.raises(ValueError, match="flags of SIGUSR1 must be SA_.* bits, not 0x4"):
        sigaction(USR1, print, flags=4)
    with pytest.raises(TypeError):
        sigaction("SIGUSR1", print)


def test_only_the_main_thread_may_install():
    raised = []

    def target(call):
        try:
            call()
        except ValueError as error:
            raised.append(str(error))

    with sigaction(USR1, print) as former:
        for call in (lambda: sigaction(USR1, print), former.restore):
            thread = threading.Thread(target=target, args=(call,), name="worker-3")
            thread.start()
            thread.join()
    assert raised == ["sigaction of SIGUSR1 works only in the main thread, not in worker-3"] * 2


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
def test_a_value_that_does_not_fit(value):
    with pytest.raises(
        ValueError, match=f"value must be an integer from -2147483648 to 2147483647, not {value}"
    ):
        sigqueue(os.getpid(), RT, value)


class Pidfd:
    """As ipckit.process.Child: what has fileno()."""

    def __init__(self, pid):
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)

    def fileno(self):
        return self.pidfd

    def __repr__(self):
        return f"<Pidfd of {self.pid}>"


def test_sigqueue_by_pidfd_never_hits_a_recycled_number(forked):
    def target(ready):
        with SignalQueue((RT,)) as queue:
            ready()
            info = queue.recv(timeout=PATIENCE)
            assert (info.code, info.pid, info.uid) == (-1, os.getppid(), os.getuid())
            sys.exit(info.value)

    child = forked(target)
    child.wait_ready()
    handle = Pidfd(child.pid)
    sigqueue(handle, RT, 23)
    assert child.wait() == 23
    with pytest.raises(ProcessLookupError, match=f"sigqueue of SIGRTMIN to <Pidfd of {child.pid}>") as caught:
        sigqueue(handle, RT, 1)
    assert caught.value.errno == errno.ESRCH
    os.close(handle.pidfd)
    with pytest.raises(OSError, match="Pidfd") as caught:
        sigqueue(handle, RT, 1)
    assert caught.value.errno == errno.EBADF


def test_sigqueue_to_nobody_and_to_somebody_else(forked):
    child = forked(lambda ready: None)
    child.wait()
    with pytest.raises(ProcessLookupError, match=f"sigqueue of SIGRTMIN to process {child.pid}") as caught:
        sigqueue(child.pid, RT, 1)
    assert caught.value.errno == errno.ESRCH
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")

    def stranger(ready):
        os.setuid(65534)
        with pytest.raises(PermissionError, match="sigqueue of SIGUSR1 to process") as caught:
            sigqueue(os.getppid(), USR1)
        assert caught.value.errno == errno.EPERM

    assert forked(stranger).wait() == 0


def test_too_many_pending_signals_are_a_blocking_io_error(forked):
    def target(ready):
        resource.setrlimit(resource.RLIMIT_SIGPENDING, (10, 10))
        with blocked():
            ready()
            signal.sigwait((signal.SIGTERM,))
            os._exit(0)  # with what is pending still blocked

    child = forked(target)
    child.wait_ready()
    sent = 0
    with pytest.raises(BlockingIOError, match=f"sigqueue of SIGRTMIN to process {child.pid}") as caught:
        while sent < 12:
            sigqueue(child.pid, RT, sent)
            sent += 1
    assert caught.value.errno == errno.EAGAIN
    assert sent <= 11
    child.kill(signal.SIGTERM)
    assert child.wait() == 0


def test_beyond_the_limit_a_standard_signal_loses_its_siginfo(forked):
    def target(ready):
        resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, 0))
        got = []
        with sigaction(USR1, got.append, info=True):
            sigqueue(os.getpid(), USR1, 7)
        assert got == [(USR1, 0, 0, 0, 0, 0, 0, 0)]

    assert forked(target).wait() == 0


# --- the handler in C ----------------------------------------------------------------------------


@pytest.mark.skipif(not (shutil.which("cc") and shutil.which("objdump")), reason="needs cc and objdump")
def test_the_handler_in_c_calls_only_what_is_async_signal_safe(tmp_path):
    source, compiled = ROOT / "csrc/signals.c", tmp_path / "signals.o"
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-fPIC", f"-I{source.parent}"]
    subprocess.run(["cc", *flags, "-c", "-o", compiled, source], check=True)
    text = subprocess.run(["objdump", "-dr", compiled], check=True, capture_output=True, text=True).stdout
    bodies = dict(re.findall(r"^[0-9a-f]+ <([^>]+)>:\n((?:.+\n)+)", text, re.M))
    assert "arrive" in bodies
    todo, called = ["arrive"], set()
    while todo:
        for name in re.findall(r"R_\w+_(?:PLT32|CALL26|JUMP26|PC32)\s+([a-z_]\w*)", bodies[todo.pop()]):
            if name not in called:
                called.add(name)
                todo += [name] if name in bodies else []
    safe = {"__errno_location", "getpid", "pthread_self", "sigaddset", "syscall"}
    assert {name for name in called if name not in bodies} <= safe
    assert "syscall" in called


# --- the examples ---------------------------------------------------------------------------------


def test_the_example_runs():
    run = subprocess.run([sys.executable, ROOT / "examples/signal_values.py"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "the child sent 0, 1, 4, 9, 16 and exited with 0"


def test_the_example_of_the_reference_page_runs(capsys):
    text = (ROOT / "docs/reference/signals.md").read_text()
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    assert capsys.readouterr().out == f"42 from {os.getpid()}\n"
