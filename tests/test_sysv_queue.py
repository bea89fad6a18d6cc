import asyncio
import errno
import gc
import os
import pickle
import platform
import random
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import sysv_ipc
from conftest import PATIENCE, eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from procfs import state, wakeups

from ipckit import limits, registry
from ipckit.errors import Closed
from ipckit.sysv.queue import Message, MessageQueue, QueueStat

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / "build/peers/sysv_queue"
WHOLE = os.environ.get("IPCKIT_PROOF") == "1"
NOBODY = 65534
# msgsnd and msgrcv, as /proc/PID/syscall has them
WAITS = ("69", "70") if platform.machine() == "x86_64" else ("188", "189")
MSGMAX = limits.value("kernel.msgmax")
MSGMNB = limits.value("kernel.msgmnb")


@contextmanager
def fresh(**options):
    """A queue of its own, removed at the end."""
    with MessageQueue(**options) as queue:
        try:
            yield queue
        finally:
            with suppress(OSError, Closed):
                queue.remove()


@pytest.fixture
def queue():
    with fresh() as queue:
        yield queue


@contextmanager
def thread(target, *args):
    """A thread; its result, or what it raised, is in the list."""
    result = []

    def run():
        try:
            result.append(target(*args))
        except BaseException as error:
            result.append(error)

    runner = threading.Thread(target=run)
    runner.start()
    try:
        yield result
    finally:
        runner.join(PATIENCE)
        assert not runner.is_alive()


def blocked(task):
    """Is a thread in msgrcv or msgsnd? Its kernel stack can't be read, but its system call can."""
    with suppress(OSError):
        number = Path(f"/proc/self/task/{task}/syscall").read_text().split()[0]
        return number in WAITS
    return False


def waiting(count=1):
    """Wait until *count* threads of this process are in msgrcv or msgsnd."""
    eventually(lambda: sum(map(blocked, os.listdir("/proc/self/task"))) >= count)


def process_waiting(pid):
    eventually(lambda: Path(f"/proc/{pid}/syscall").read_text().split()[0] in WAITS)


def fill(queue, size=1024, type=1):
    """Fill the queue; how many messages that took."""
    count = 0
    with suppress(TimeoutError):
        while True:
            queue.send(bytes(size), type=type, timeout=0)
            count += 1
    return count


def in_own_namespace(script):
    """Run *script* where the limits of System V may be changed; what it prints."""
    if subprocess.run(["unshare", "--ipc", "true"], capture_output=True).returncode:
        pytest.skip("needs an ipc namespace of its own")
    command = ["unshare", "--ipc", sys.executable, "-c", SETUP + textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


SETUP = """
from pathlib import Path
from ipckit.sysv.queue import MessageQueue

def limit(name, value):
    Path("/proc/sys/kernel", name).write_text(str(value))
"""


def some_key():
    return random.randrange(1, 1 << 31)


# --- sending and receiving -----------------------------------------------------------------------


def test_messages_by_type(queue):
    for type, data in ((3, b"c"), (1, b"a"), (2, b"b"), (1, b"aa"), (9, b"z")):
        queue.send(data, type=type)
    assert queue.recv(type=2) == b"b"
    assert queue.recv_message(type=-5) == Message(b"a", 1)
    assert queue.recv_message(all_but=True, type=3) == Message(b"aa", 1)
    assert queue.recv_message() == (b"c", 3)
    assert queue.recv() == b"z"
    with pytest.raises(TimeoutError, match=f"recv on System V queue {queue.id} .private.") as caught:
        queue.recv(timeout=0)
    assert caught.value.errno == errno.ETIMEDOUT


@settings(max_examples=80)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("send"), st.integers(1, 5), st.binary(max_size=60)),
            st.tuples(st.just("recv"), st.integers(-5, 5), st.booleans()),
        ),
        max_size=60,
    )
)
def test_it_does_what_a_list_would_do(steps):
    with fresh() as queue:
        model = []
        for step in steps:
            if step[0] == "send":
                queue.send(step[2], type=step[1], timeout=0)
                model.append(Message(step[2], step[1]))
                continue
            _, type, all_but = step
            all_but = all_but and type > 0
            if type < 0:
                fits = sorted((m for m in model if m.type <= -type), key=lambda m: m.type)
            else:
                fits = [m for m in model if type == 0 or (m.type == type) != all_but]
            if fits:
                assert queue.recv_message(type=type, all_but=all_but, timeout=0) == fits[0]
                model.remove(fits[0])
            else:
                with pytest.raises(TimeoutError):
                    queue.recv(type=type, all_but=all_but, timeout=0)
        assert [queue.peek(i) for i in range(len(model))] == model


def test_any_bytes_like_of_any_size(queue):
    for data in (b"", b"x", bytearray(b"xy"), memoryview(b"abcdef")[2:], bytes(MSGMAX)):
        queue.send(data)
        assert queue.recv() == bytes(data)
    with pytest.raises(TypeError):
        queue.send("text")


def test_receiving_into_a_buffer(queue):
    queue.send(b"hello", type=7)
    target = bytearray(8)
    assert queue.recv_into(target) == 5
    assert target == b"hello\0\0\0"
    queue.send(b"")
    assert queue.recv_into(bytearray(0)) == 0
    queue.send(b"1234")
    numbers = memoryview(bytearray(8)).cast("I")
    assert queue.recv_into(numbers, timeout=1) == 4
    with pytest.raises(TypeError, match="read-only bytes"):
        queue.recv_into(b"read-only")


def test_a_buffer_too_small_leaves_the_message(queue):
    queue.send(b"first", type=1)
    queue.send(b"larger by far", type=2)
    with pytest.raises(
        OSError, match="message of 13 bytes does not fit into the buffer of 10 bytes"
    ) as caught:
        queue.recv_into(bytearray(10), type=2)
    assert caught.value.errno == errno.EMSGSIZE
    assert f"recv on System V queue {queue.id}" in str(caught.value)
    with pytest.raises(OSError, match="message of 5 bytes"):
        queue.recv_into(bytearray(1), type=-2)
    assert queue.stat().messages == 2
    assert queue.recv_many() == [b"first", b"larger by far"]


def test_peeking_takes_nothing(queue):
    queue.send(b"a", type=5)
    queue.send(b"", type=6)
    assert queue.peek() == Message(b"a", 5)
    assert queue.peek(1) == Message(b"", 6)
    with pytest.raises(OSError, match="no message at index 2") as caught:
        queue.peek(2)
    assert caught.value.errno == errno.ENOMSG
    with pytest.raises(ValueError, match="index must be an integer from 0 to .*, not -1"):
        queue.peek(-1)
    assert queue.stat().messages == 2


def test_many_at_a_time(queue):
    assert queue.send_many([]) == 0
    assert queue.send_many([b"a", bytearray(b""), b"ccc"], type=4) == 3
    assert queue.recv_many(2, type=4) == [b"a", b""]
    assert queue.recv_many(type=-9, timeout=0) == [b"ccc"]
    with pytest.raises(TimeoutError):
        queue.recv_many(timeout=0)
    with pytest.raises(ValueError, match="max must be an integer from 1 to .*, not 0"):
        queue.recv_many(0)


def test_many_more_than_one_call_takes(queue):
    """256 messages are taken by one call into C."""
    assert queue.send_many([b"%d" % i for i in range(2500)]) == 2500
    assert queue.recv_many() == [b"%d" % i for i in range(2500)]


def test_many_into_a_full_queue_tells_how_many_went(queue):
    block = bytes(MSGMNB // 4)
    assert queue.send_many([block] * 9, timeout=0) == 4
    with pytest.raises(TimeoutError, match="send on System V queue"):
        queue.send_many([block], timeout=0.01)
    queue.recv()
    with pytest.raises(OSError, match=f"message of {MSGMAX + 1} bytes") as caught:
        queue.send_many([b"", bytes(MSGMAX + 1)])
    assert caught.value.errno == errno.EMSGSIZE
    assert queue.stat().messages == 3, "nothing was sent"


def test_iterating_ends_when_the_queue_is_removed(queue, forked):
    def feed(ready, ident):
        with MessageQueue.from_id(ident) as other:
            other.send(b"one")
            other.send(b"two")
            eventually(lambda: other.stat().messages == 0)
            other.remove()

    child = forked(feed, queue.id)
    assert list(queue) == [b"one", b"two"]
    assert child.wait() == 0
    assert list(queue) == []


def test_threads_share_a_handle_and_lose_nothing(queue):
    got = []

    def receive():
        while (data := queue.recv()) != b"end":
            got.append(data)

    receivers = [threading.Thread(target=receive) for _ in range(3)]
    senders = [
        threading.Thread(target=lambda n=n: [queue.send(b"%d.%d" % (n, i)) for i in range(500)])
        for n in range(3)
    ]
    for one in (*receivers, *senders):
        one.start()
    for one in senders:
        one.join(PATIENCE)
    for _ in receivers:
        queue.send(b"end")
    for one in receivers:
        one.join(PATIENCE)
    assert sorted(got) == sorted(b"%d.%d" % (n, i) for n in range(3) for i in range(500))


# --- opening -------------------------------------------------------------------------------------


def test_a_key_finds_the_same_queue():
    key = some_key()
    with (
        fresh(key=key, create=True) as made,
        MessageQueue(key) as found,
        MessageQueue(key, create=True) as same,
    ):
        assert (made.id, made.key) == (found.id, key)
        assert same.id == made.id
        made.send(b"x")
        assert found.recv(timeout=0) == b"x"
        assert repr(found) == f"<MessageQueue: System V queue {made.id} (key {key:#010x})>"
        with pytest.raises(FileExistsError, match=f"System V queue of key {key:#010x}") as caught:
            MessageQueue(key, create=True, exclusive=True)
        assert caught.value.errno == errno.EEXIST


def test_a_path_and_project_are_ftok_s(tmp_path):
    with fresh(key=(tmp_path, 7), create=True) as queue:
        assert queue.key == sysv_ipc.ftok(str(tmp_path), 7, True)


def test_no_such_queue():
    key = some_key()
    with pytest.raises(FileNotFoundError, match=f"ever made, or it was removed.*{key:#010x}") as caught:
        MessageQueue(key)
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(FileNotFoundError, match="or never made: 'System V queue 2147483647") as caught:
        MessageQueue.from_id(2147483647)
    assert caught.value.errno == errno.ENOENT


def test_bad_arguments():
    with pytest.raises(ValueError, match="not 0"):
        MessageQueue(0, create=True)
    with pytest.raises(TypeError, match="'name'"):
        MessageQueue("name", create=True)
    with pytest.raises(ValueError, match="create=True"):
        MessageQueue(5, exclusive=True)
    with pytest.raises(ValueError, match="create=True"):
        MessageQueue(5, max_bytes=100)
    with pytest.raises(ValueError, match="max_bytes .* not 0"):
        MessageQueue(max_bytes=0)
    with pytest.raises(ValueError, match="mode .* not 0o1777"):
        MessageQueue(mode=0o1777)
    with pytest.raises(ValueError, match="from 0 to 2147483647, not -1"):
        MessageQueue.from_id(-1)


def test_bad_arguments_of_calls(queue):
    for type in (0, -3):
        with pytest.raises(ValueError, match=f"type must be an integer from 1 to .*, not {type}"):
            queue.send(b"x", type=type)
    with pytest.raises(ValueError, match="all_but=True needs a type >= 1 to leave out, not -2"):
        queue.recv(all_but=True, type=-2)
    for verb in (lambda: queue.send(b"x", type=1 << 63), lambda: queue.recv(type=1 << 63)):
        with pytest.raises(
            ValueError, match="type must be .* to 9223372036854775807, not 9223372036854775808"
        ):
            verb()
    with pytest.raises(ValueError, match="-1"):
        queue.recv(timeout=-1)
    with pytest.raises(ValueError, match="nan"):
        queue.recv(timeout=float("nan"))
    with pytest.raises(ValueError, match="uid must be .* not -1"):
        queue.set(uid=-1)
    with pytest.raises(ValueError, match="max_bytes"):
        queue.set(max_bytes=1 << 31)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_as_another_user(forked):
    with fresh(mode=0o600) as secret, fresh(mode=0o622) as inbox:

        def stranger(ready):
            secret.close()
            inbox.close()
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            with MessageQueue.from_id(secret.id) as other:
                for verb, call in (
                    ("recv", lambda: other.recv(timeout=0)),
                    ("send", lambda: other.send(b"x", timeout=0)),
                    ("stat", other.stat),
                    ("set", lambda: other.set(mode=0o666)),
                    ("remove", other.remove),
                ):
                    with pytest.raises(
                        PermissionError, match=f"{verb} on System V queue {secret.id}"
                    ) as caught:
                        call()
                    of_owners = verb in ("set", "remove")
                    assert caught.value.errno == (errno.EPERM if of_owners else errno.EACCES)
            with MessageQueue.from_id(inbox.id) as other:
                other.send(b"from nobody")
            with pytest.raises(PermissionError, match=f"kernel.msgmnb is {MSGMNB}") as caught:
                MessageQueue(max_bytes=MSGMNB + 1)
            assert caught.value.errno == errno.EPERM
            assert not [record for record in registry.records() if record.uid == NOBODY]

        assert forked(stranger).wait() == 0
        assert inbox.recv(timeout=0) == b"from nobody"


@pytest.mark.skipif(os.geteuid() != 0, reason="root may do anything, so it takes another user")
def test_an_owner_who_may_not_read_may_set(forked):
    def owner(ready):
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        with MessageQueue(mode=0o200) as queue:
            with pytest.raises(PermissionError, match="stat on"):
                queue.stat()
            queue.set(mode=0o600, max_bytes=100)
            assert (queue.stat().mode, queue.stat().max_bytes, queue.stat().uid) == (0o600, 100, NOBODY)
            queue.remove()

    assert forked(owner).wait() == 0


def test_too_many_queues_names_the_limit():
    printed = in_own_namespace("""
        limit("msgmni", 1)
        with MessageQueue() as first:
            try:
                MessageQueue()
            except OSError as error:
                print(error.errno, error)
            first.remove()
    """)
    assert printed.startswith(f"{errno.ENOSPC} ")
    assert "kernel.msgmni is 1; raise it with: sysctl -w kernel.msgmni=2" in printed


# --- the queue itself ----------------------------------------------------------------------------


def test_stat_and_set(queue):
    before = int(time.time()) - 1  # the kernel's clock of seconds may lag by a tick
    queue.send(b"hello", type=3)
    queue.recv()
    queue.send(b"xy")
    now = queue.stat()
    assert (now.messages, now.bytes, now.max_bytes) == (1, 2, MSGMNB)
    assert (now.send_pid, now.receive_pid) == (os.getpid(), os.getpid())
    assert before <= now.send_time <= time.time()
    assert (now.uid, now.gid, now.creator_uid, now.creator_gid) == (os.getuid(), os.getgid()) * 2
    assert (now.mode, now.key) == (0o600, 0)
    uid, gid = (12, 34) if os.geteuid() == 0 else (os.getuid(), os.getgid())
    queue.set(mode=0o640, uid=uid, gid=gid, max_bytes=100)
    now = queue.stat()
    assert isinstance(now, QueueStat)
    assert (now.mode, now.uid, now.gid, now.creator_uid, now.max_bytes) == (0o640, uid, gid, os.getuid(), 100)


def test_the_records_of_a_queue():
    def of(queue):
        return [
            record
            for record in registry.records()
            if (record.kind, record.ident) == ("sysv-queue", str(queue.id))
        ]

    with fresh(max_bytes=1000) as queue:
        (record,) = of(queue)
        assert (record.role, record.left, record.birth) == ("creator", False, str(queue.stat().change_time))
        with MessageQueue.from_id(queue.id):
            assert len(of(queue)) == 1
        eventually(lambda: time.time() > queue.stat().change_time + 1.1)  # the kernel counts whole ticks
        queue.set(mode=0o644)
        assert of(queue)[0].birth == str(queue.stat().change_time) != record.birth
        queue.close()
        assert of(queue)[0].left
        with MessageQueue.from_id(queue.id) as again:
            again.remove()
        assert of(queue) == []


def test_what_can_not_be_recorded_is_not_left(monkeypatch):
    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(registry, "enter", no_space)
    with pytest.raises(OSError, match="no space"):
        MessageQueue()


def test_removed_before_and_while_in_use(queue):
    with MessageQueue.from_id(queue.id) as other:
        queue.remove()
        for verb, call in (
            ("recv", other.recv),
            ("send", lambda: other.send(b"x")),
            ("stat", other.stat),
            ("remove", other.remove),
            ("peek", other.peek),
        ):
            with pytest.raises(
                OSError, match=f"the queue was removed: '{verb} on System V queue {queue.id} .private.'"
            ) as caught:
                call()
            assert caught.value.errno == errno.EIDRM
    with pytest.raises(FileNotFoundError, match="no queue has this id"):
        MessageQueue.from_id(queue.id)


@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_removed_while_blocked(timeout):
    with fresh() as queue, fresh() as full:
        fill(full)
        with (
            thread(lambda: queue.recv(timeout=timeout)) as received,
            thread(lambda: full.send(bytes(1024), timeout=timeout)) as sent,
        ):
            waiting(2)
            queue.remove()
            full.remove()
    for error, verb in ((received[0], "recv"), (sent[0], "send")):
        assert isinstance(error, OSError)
        assert error.errno == errno.EIDRM
        assert f"the queue was removed: '{verb} on System V queue" in str(error)


def test_handles_pickle_by_id(queue):
    with pickle.loads(pickle.dumps(queue)) as same:
        assert (same.id, same.key) == (queue.id, queue.key)
        same.send(b"x")
        assert queue.recv(timeout=0) == b"x"
    with pytest.raises(Closed):
        pickle.dumps(same)


# --- limits --------------------------------------------------------------------------------------


def test_a_message_over_msgmax_is_refused(queue):
    size = MSGMAX + 1
    with pytest.raises(OSError, match=f"message of {size} bytes to System V queue {queue.id}.*") as caught:
        queue.send(bytes(size))
    assert caught.value.errno == errno.EMSGSIZE
    assert f"kernel.msgmax is {MSGMAX}; raise it with: sysctl -w kernel.msgmax={size}" in str(caught.value)


@pytest.mark.parametrize("timeout", [None, 0, 1])
def test_a_message_that_would_wait_for_ever_is_refused(timeout):
    with fresh(max_bytes=100) as queue:
        for _ in range(2):
            with pytest.raises(
                OSError, match=r"message of 101 bytes .* whose max_bytes is 100; raise it"
            ) as caught:
                queue.send(bytes(101), timeout=timeout)
            assert caught.value.errno == errno.EMSGSIZE
            queue.send(bytes(100), timeout=0)  # a full queue refuses it just the same
            queue.recv()


def test_limits_raised_while_a_handle_is_open():
    in_own_namespace("""
        limit("msgmnb", 500_000)
        with MessageQueue() as queue:
            queue.send(b"")
            assert queue.recv() == b""
            limit("msgmax", 100_000)
            large = bytes(range(250)) * 400
            with MessageQueue.from_id(queue.id) as other:
                other.send(large)
                assert queue.peek().data == large
                assert queue.recv() == large
                other.send(large)
                target = bytearray(200_000)
                assert queue.recv_into(target) == 100_000
                assert target[:100_000] == large
                assert other.send_many([large, b"x", large, large]) == 4
                assert queue.recv_many() == [large, b"x", large, large]
                assert queue.send_many([large] * 4) == 4
                assert queue.recv_many(3) == [large] * 3
                assert other.recv_many() == [large]
            queue.remove()
    """)


# --- waiting -------------------------------------------------------------------------------------


def test_a_full_queue_blocks_until_there_is_room(queue):
    fill(queue)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=f"send on System V queue {queue.id}") as caught:
        queue.send(bytes(1024), timeout=0.05)
    assert caught.value.errno == errno.ETIMEDOUT
    assert time.monotonic() - start >= 0.05
    with thread(lambda: queue.send(b"late" * 256, timeout=PATIENCE)) as sent:
        waiting()
        queue.recv()
    assert sent == [None]
    assert b"late" * 256 in queue.recv_many()


def test_a_timed_receive_sleeps_to_its_end(queue):
    """It does not wake up now and then to look, so it is woken as an untimed one is."""
    start, before = time.monotonic(), wakeups(os.getpid())
    with pytest.raises(TimeoutError):
        queue.recv(timeout=0.3)
    assert time.monotonic() - start >= 0.3
    assert wakeups(os.getpid()) - before < 10


def test_a_storm_of_signals_neither_shortens_nor_lengthens_a_wait(queue):
    seen = []
    former = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    left = signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        while len(seen) < 50:
            start = time.monotonic()
            with pytest.raises(TimeoutError):
                queue.recv(timeout=0.1)
            assert time.monotonic() - start >= 0.1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        signal.setitimer(signal.ITIMER_REAL, *left)


def test_handlers_run_while_a_receive_waits_and_may_end_it(queue):
    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    former = signal.signal(signal.SIGUSR1, stop)
    try:
        for timeout in (None, PATIENCE):
            interrupter = thread(lambda: (waiting(), os.kill(os.getpid(), signal.SIGUSR1)))
            with interrupter, pytest.raises(StopError):
                queue.recv(timeout=timeout)
    finally:
        signal.signal(signal.SIGUSR1, former)


def test_two_threads_wait_with_times_of_their_own(queue):
    def wait(timeout):
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            queue.recv(timeout=timeout)
        return time.monotonic() - start

    with thread(wait, 0.05) as first, thread(wait, 0.15) as second:
        pass
    assert first[0] >= 0.05
    assert second[0] >= 0.15


def test_a_signal_that_the_user_handles_is_not_taken(queue):
    seen = []
    former = signal.signal(signal.SIGRTMAX, lambda *_: seen.append(1))
    try:
        with pytest.raises(TimeoutError):
            queue.recv(timeout=0.05)
        with thread(queue.recv) as received:
            waiting()
            assert not seen
            os.kill(os.getpid(), signal.SIGRTMAX)
            eventually(lambda: seen)
            queue.send(b"x")
        assert received == [b"x"]
    finally:
        signal.signal(signal.SIGRTMAX, former)


def test_a_signal_that_the_user_waits_for_is_not_taken(queue, forked):
    """Even one that served here before. In a process that has no thread but those that block it."""

    def child(ready):
        with pytest.raises(TimeoutError):
            queue.recv(timeout=0.01)
        theirs = {signal.SIGRTMAX, signal.SIGRTMAX - 1}
        signal.pthread_sigmask(signal.SIG_BLOCK, theirs)
        with thread(lambda: queue.recv(timeout=PATIENCE)) as received:
            waiting()
            os.kill(os.getpid(), signal.SIGRTMAX)
            os.kill(os.getpid(), signal.SIGRTMAX - 1)
            assert signal.sigtimedwait({signal.SIGRTMAX}, 0).si_signo == signal.SIGRTMAX
            queue.send(b"x")
        assert received == [b"x"]
        assert signal.sigtimedwait(theirs, 0).si_signo == signal.SIGRTMAX - 1

    assert forked(child).wait() == 0


def test_a_thread_that_blocks_every_signal_still_ends_in_time(queue):
    def wait():
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        with pytest.raises(TimeoutError):
            queue.recv(timeout=0.05)
        return before == signal.pthread_sigmask(signal.SIG_BLOCK, [])

    with thread(wait) as unchanged:
        pass
    assert unchanged == [True]


def test_no_signal_free_to_wait_with(queue, forked):
    def child(ready):
        for number in range(signal.SIGRTMIN, signal.SIGRTMAX + 1):
            signal.signal(number, signal.SIG_IGN)
        with pytest.raises(
            BlockingIOError, match="no real-time signal is free to wait with.*recv on"
        ) as caught:
            queue.recv(timeout=1)
        assert caught.value.errno == errno.EAGAIN
        queue.send(b"x")
        assert queue.recv() == b"x", "what doesn't wait needs none"

    assert forked(child).wait() == 0


# --- closing -------------------------------------------------------------------------------------


def test_after_close(queue):
    queue.close()
    queue.close()
    assert queue.closed
    for call in (
        queue.recv, queue.recv_message, queue.recv_many, queue.peek, queue.stat, queue.fileno,
        lambda: queue.recv(timeout=0), lambda: queue.recv(timeout=1), lambda: queue.recv_into(bytearray(1)),
        lambda: queue.send(b"x"), lambda: queue.send_many([b"x"]), lambda: queue.set(mode=0o600),
        lambda: next(iter(queue)), lambda: asyncio.run(queue.arecv()), lambda: asyncio.run(queue.asend(b"x")),
    ):  # fmt: skip
        with pytest.raises(Closed, match=f"System V queue {queue.id} .private. was closed"):
            call()
    queue.remove()
    assert not registry.records()
    with pytest.raises(OSError, match="queue was removed") as caught:
        queue.remove()
    assert caught.value.errno == errno.EIDRM


@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_close_ends_what_other_threads_wait_for(timeout):
    with fresh() as keeper, MessageQueue.from_id(keeper.id) as queue:
        fill(keeper, type=2)
        with (
            thread(lambda: queue.recv(type=1, timeout=timeout)) as received,
            thread(lambda: queue.send(bytes(1024), timeout=timeout)) as sent,
            thread(lambda: keeper.recv(type=1, timeout=timeout)) as unconcerned,
        ):
            waiting(3)
            queue.close()
            keeper.recv(type=2)
            keeper.send(b"x", type=1)
        assert isinstance(received[0], Closed)
        assert isinstance(sent[0], Closed)
        assert unconcerned == [b"x"]


def test_closing_against_starting_to_wait():
    """Whenever the close comes, before or in the wait: it ends, and nothing is left of the signal."""
    with fresh() as keeper:
        for _ in range(300 if WHOLE else 100):
            queue = MessageQueue.from_id(keeper.id)
            with thread(queue.recv) as received:
                queue.close()
            assert isinstance(received[0], Closed)


def test_a_forgotten_handle_leaves_nothing_running():
    with fresh() as keeper:
        queue = MessageQueue.from_id(keeper.id)
        fd = queue.fileno()
        del queue
        gc.collect()
        with pytest.raises(OSError):
            os.fstat(fd)


# --- killing and forking -------------------------------------------------------------------------


def test_a_killed_receiver_leaves_the_queue_working(queue, forked):
    def receive(ready, timeout):
        ready()
        queue.recv(timeout=timeout)

    for timeout in (None, PATIENCE):
        child = forked(receive, timeout)
        child.wait_ready()
        process_waiting(child.pid)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        queue.send(b"x")
        assert queue.recv(timeout=0) == b"x"


def test_a_stopped_and_continued_receiver_goes_on(queue, forked):
    def receive(ready):
        ready()
        assert queue.recv(timeout=PATIENCE) == b"x"

    child = forked(receive)
    child.wait_ready()
    for _ in range(5):
        process_waiting(child.pid)
        child.kill(signal.SIGSTOP)
        eventually(lambda: state(child.pid) == "T")
        child.kill(signal.SIGCONT)
    queue.send(b"x")
    assert child.wait() == 0


def test_fork_while_another_thread_waits(queue, forked):
    """The child has neither the thread nor the signal's handler, and can do all by itself."""

    def parent(ready):
        warnings.simplefilter("ignore")
        before = Path("/proc/self/status").read_text().split("SigCgt:")[1].split()[0]
        with thread(lambda: queue.recv(type=1)) as received:
            waiting()
            queue.fileno()
            if (pid := os.fork()) == 0:
                signal.alarm(int(PATIENCE))
                code = 1
                with suppress(BaseException):
                    assert Path("/proc/self/status").read_text().split("SigCgt:")[1].split()[0] == before
                    with pytest.raises(TimeoutError):
                        queue.recv(timeout=0.02)
                    assert not select.select([queue], [], [], 0)[0]
                    queue.send(b"y", type=2)
                    assert select.select([queue], [], [], PATIENCE)[0]
                    assert queue.recv(type=2, timeout=0) == b"y"
                    queue.close()
                    code = 0
                os._exit(code)
            status = os.waitpid(pid, 0)[1]
            queue.send(b"x", type=1)
        assert status == 0
        queue.close()
        assert received == [b"x"]

    assert forked(parent).wait() == 0


def test_a_handle_works_on_both_sides_of_a_fork(queue, forked):
    def child(ready):
        assert queue.recv(timeout=PATIENCE) == b"down"
        queue.send(b"up", type=2)
        queue.close()

    process = forked(child)
    queue.send(b"down")
    assert queue.recv(type=2, timeout=PATIENCE) == b"up"
    assert process.wait() == 0
    queue.send(b"still")
    assert queue.recv() == b"still"


# --- the descriptor ------------------------------------------------------------------------------


def readable(queue, timeout=0.0):
    return bool(select.select([queue], [], [], timeout)[0])


def test_readable_means_a_receive_would_not_block(queue):
    assert not readable(queue)
    queue.send(b"a")
    queue.send(b"b")
    assert readable(queue, PATIENCE)
    assert queue.recv(timeout=0) == b"a"
    assert readable(queue), "there is one more"
    assert queue.recv(timeout=0) == b"b"
    assert not readable(queue)
    queue.send(b"c")
    assert readable(queue, PATIENCE)
    assert queue.recv_many() == [b"c"]
    assert not readable(queue)


def test_readable_after_another_was_faster(queue):
    assert not readable(queue)
    with MessageQueue.from_id(queue.id) as other:
        queue.send(b"x")
        assert readable(queue, PATIENCE)
        assert other.recv() == b"x"
    with pytest.raises(TimeoutError):
        queue.recv(timeout=0)
    assert not readable(queue), "the receive found that out"


def test_what_was_there_before_fileno(queue):
    queue.send(b"x")
    assert readable(queue, PATIENCE)


def test_empty_messages_are_kept_in_order_and_put_back(queue):
    with MessageQueue.from_id(queue.id) as other:
        assert not readable(other)
        queue.send(b"", type=5)
        assert readable(other, PATIENCE)
        queue.send(b"second", type=6)
        assert other.peek(0) == Message(b"", 5)
        assert other.peek(1) == Message(b"second", 6)
        assert other.recv_message(timeout=0) == Message(b"", 5)
        assert other.recv() == b"second"
        queue.send(b"", type=7)
        assert readable(other, PATIENCE)
        with pytest.raises(TimeoutError):
            other.recv(type=1, timeout=0)
    assert queue.recv_message(timeout=0) == Message(b"", 7), "close() put it back"


def test_readable_for_ever_after_a_removal(queue):
    assert not readable(queue)
    queue.remove()
    assert readable(queue, PATIENCE)
    for _ in range(2):
        with pytest.raises(OSError, match="removed"):
            queue.recv(timeout=0)
        assert readable(queue)


def test_close_while_a_selector_waits(queue):
    with select.epoll() as epoll, MessageQueue.from_id(queue.id) as other:
        own = os.dup(other.fileno())
        epoll.register(own, select.EPOLLIN)
        with thread(lambda: epoll.poll(PATIENCE)) as events:
            other.close()
        os.close(own)
    assert events[0]


def test_no_message_is_lost_or_missed_by_a_selector(queue, forked):
    count = 2000

    def feed(ready):
        with MessageQueue.from_id(queue.id) as other:
            for i in range(count):
                other.send(b"%d" % i if i % 3 else b"")

    child = forked(feed)
    got = []
    while len(got) < count:
        assert readable(queue, PATIENCE)
        with suppress(TimeoutError):
            got += queue.recv_many(random.randint(1, 20), timeout=0)
    assert child.wait() == 0
    assert [data for data in got if data] == [b"%d" % i for i in range(count) if i % 3]
    assert not readable(queue)


# --- asyncio -------------------------------------------------------------------------------------


def test_async_each_task_gets_its_type(queue):
    async def main():
        low = asyncio.create_task(queue.arecv(type=-3, timeout=PATIENCE))
        chosen = asyncio.create_task(queue.arecv_message(type=5))
        others = asyncio.create_task(queue.arecv(type=5, all_but=True, timeout=PATIENCE))
        await asyncio.sleep(0.01)
        await queue.asend(b"chosen", type=5)
        assert await chosen == Message(b"chosen", 5)
        await queue.asend(b"high", type=9)
        assert await others == b"high"
        await queue.asend(b"", type=2)
        assert await low == b""

    for _ in range(20):
        asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_async_tasks_share_a_queue(queue):
    async def main():
        tasks = [asyncio.create_task(queue.arecv()) for _ in range(10)]
        await asyncio.sleep(0.01)
        for i in range(10):
            await queue.asend(b"%d" % i)
        return await asyncio.gather(*tasks)

    assert sorted(asyncio.run(asyncio.wait_for(main(), PATIENCE))) == [b"%d" % i for i in range(10)]


def test_async_iteration_ends_with_the_removal(queue):
    async def main():
        got = []
        async for data in queue:
            got.append(data)
            if data == b"last":
                queue.remove()
        return got

    queue.send_many([b"first", b"", b"last"])
    assert asyncio.run(main()) == [b"first", b"", b"last"]


@pytest.mark.parametrize("type", [0, 4])
def test_a_cancelled_arecv_has_taken_nothing(queue, type):
    async def main():
        for _ in range(50):
            task = asyncio.create_task(queue.arecv(type=type))
            await asyncio.sleep(random.uniform(0, 0.002))
            queue.send(b"x", type=4)
            await asyncio.sleep(random.choice([0, 0.0005]))
            task.cancel()
            try:
                assert await task == b"x"
            except asyncio.CancelledError:
                assert await queue.arecv(timeout=PATIENCE) == b"x"
            assert queue.stat().messages == 0

    asyncio.run(main())


def test_async_timeouts(queue):
    async def main():
        for type in (0, 3):
            start = time.monotonic()
            with pytest.raises(TimeoutError, match="recv on System V queue"):
                await queue.arecv(type=type, timeout=0.05)
            assert time.monotonic() - start >= 0.04
        count = fill(queue)
        with pytest.raises(TimeoutError, match="send on System V queue"):
            await queue.asend(bytes(1024), timeout=0.05)
        assert len(queue.recv_many()) == count

    asyncio.run(main())


def test_asend_into_a_full_queue(queue):
    async def main():
        count = fill(queue)
        task = asyncio.create_task(queue.asend(b"late" * 256, type=2))
        await asyncio.sleep(0)
        await asyncio.to_thread(waiting)
        assert not task.done()
        queue.recv()
        await asyncio.wait_for(task, PATIENCE)
        assert len(queue.recv_many()) == count

    asyncio.run(main())


def test_a_cancelled_asend_was_not_sent_or_says_so(queue):
    async def attempt():
        try:
            await queue.asend(b"late" * 256, type=2)
        except asyncio.CancelledError as error:
            return str(error) == "the message was sent"
        return True

    async def main():
        outcomes = set()
        for i in range(200):
            count = fill(queue)
            task = asyncio.create_task(attempt())
            await asyncio.sleep(0.0005)
            if i % 2:
                queue.recv()
            task.cancel()
            sent = await task
            outcomes.add(sent)
            assert len(queue.recv_many()) == count - i % 2 + sent
        return outcomes

    assert False in asyncio.run(main())


def test_removed_or_closed_while_a_task_waits():
    async def receive(end, expected):
        with (
            fresh() as keeper,
            fresh() as full,
            MessageQueue.from_id(keeper.id) as queue,
            MessageQueue.from_id(full.id) as sink,
        ):
            fill(full)
            calls = (queue.arecv(), queue.arecv(type=3), sink.asend(bytes(1024)))
            tasks = [asyncio.create_task(call) for call in calls]
            await asyncio.sleep(0.01)
            end(queue)
            end(sink)
            done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE)
            for error in done:
                expected(error)

    def removed(error):
        assert isinstance(error, OSError)
        assert error.errno == errno.EIDRM

    def closed(error):
        assert isinstance(error, Closed)

    asyncio.run(receive(MessageQueue.remove, removed))
    asyncio.run(receive(MessageQueue.close, closed))


# --- with others ---------------------------------------------------------------------------------


def test_with_sysv_ipc_both_ways(forked):
    def other(ready, ident):
        peer = sysv_ipc.MessageQueue(key, max_message_size=MSGMAX)
        assert peer.id == ident
        for _ in range(50):
            data, type = peer.receive(type=-50)
            peer.send(data, type=type + 100)

    key = some_key()
    with fresh(key=key, create=True) as ours:
        child = forked(other, ours.id)
        for i in range(50):
            data = os.urandom(random.choice([0, 1, 64, 4096]))
            ours.send(data, type=1 + i)
            assert ours.recv_message(type=101 + i, timeout=PATIENCE) == (data, 101 + i)
        assert child.wait() == 0


def test_a_queue_of_sysv_ipc_is_one_of_ours():
    theirs = sysv_ipc.MessageQueue(some_key(), sysv_ipc.IPC_CREX)
    with MessageQueue(theirs.key) as ours:
        assert ours.id == theirs.id
        ours.send(b"x", type=3)
        assert theirs.receive() == (b"x", 3)
        ours.remove()


@pytest.mark.parametrize("by", ["id", "ftok"])
def test_with_a_c_program_both_ways(by, tmp_path):
    with fresh(key=(tmp_path, 33), create=True) as queue:
        which = ["id", str(queue.id)] if by == "id" else ["ftok", str(tmp_path), "33"]
        with subprocess.Popen([PEER, *which, "40"]) as peer:
            for i in range(40):
                data = os.urandom(random.choice([0, 1, 64, MSGMAX]))
                queue.send(data, type=1 + i)
                assert queue.recv_message(type=101 + i, timeout=PATIENCE) == (data, 101 + i)
        assert peer.returncode == 0


def test_the_example_of_the_textbook():
    done = subprocess.run(
        [sys.executable, ROOT / "examples/message_queue.py"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"full after {MSGMNB // 1024} messages, {MSGMNB // 1024 * 1024} of {MSGMNB} bytes",
        "the receiver still waits",
        f"received 'for you', {MSGMNB // 1024 - 1} messages are left",
    ]
