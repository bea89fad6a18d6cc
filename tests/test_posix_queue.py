import array
import asyncio
import contextlib
import errno
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import posix_ipc
import procfs
import pytest
from conftest import PATIENCE, eventually

from ipckit import Closed, limits, registry
from ipckit.endpoints import Receiver, Sender
from ipckit.posix import Message, MessageQueue

NAME = "/ipckit-test"
PEER = Path(__file__).parent.parent / "build/peers/posix"
NOBODY = 65534


@pytest.fixture
def queue():
    with MessageQueue(NAME, create=True, exclusive=True) as made:
        yield made
        if not made.closed:
            made.unlink()


def peer(*args):
    """A C program that does one thing; what it printed."""
    return subprocess.run(
        [PEER, *map(str, args)], check=True, capture_output=True, text=True, timeout=PATIENCE
    ).stdout


def python(code, *args):
    """A process that knows nothing of ipckit; what it printed."""
    command = [sys.executable, "-c", "import posix_ipc, sys\n" + code, *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout


def fill(queue):
    count = 0
    while True:
        try:
            queue.send(b"x", timeout=0)
        except TimeoutError:
            return count
        count += 1


def in_thread(call):
    """Run *call* in a thread; the thread, and where its result or exception will be."""
    came = []

    def run():
        try:
            came.append(call())
        except Exception as error:
            came.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, came


def asleep(thread):
    """Does the thread sleep in the kernel?"""
    return procfs.asleep(os.getpid(), thread.native_id, within="poll")


# --- messages --------------------------------------------------------------------------------------


def test_the_highest_priority_first_and_the_oldest_of_those(queue):
    queue.send(b"late")
    queue.send(b"urgent 1", priority=9)
    queue.send(b"urgent 2", priority=9, timeout=1)
    queue.send(b"most", priority=32767)
    assert queue.recv_message() == Message(b"most", 32767)
    assert queue.recv() == b"urgent 1"
    assert queue.recv_message(timeout=PATIENCE) == (b"urgent 2", 9)
    assert queue.recv(timeout=5.5) == b"late"


def test_it_is_an_endpoint(queue):
    assert isinstance(queue, Sender)
    assert isinstance(queue, Receiver)


@pytest.mark.parametrize(
    "data",
    [b"", b"a\0b", bytearray(b"xy"), memoryview(b"a view")[2:], array.array("i", [1, 2]), np.arange(3)],
)
def test_any_buffer(queue, data):
    queue.send(data, priority=3)
    assert queue.recv_message() == (bytes(data), 3)
    assert queue.send_many([data, data]) == 2
    assert queue.recv_many() == [bytes(data)] * 2


@pytest.mark.parametrize("data", ["text", 5, None, [b"x"]])
def test_what_is_no_buffer_is_refused(queue, data):
    for verb in (queue.send, lambda data: queue.send_many([b"first", data])):
        with pytest.raises(TypeError, match=type(data).__name__):
            verb(data)
    with pytest.raises(BufferError, match="data must be C-contiguous"):
        queue.send(np.zeros((4, 4))[:, 1])
    assert queue.stat().messages == 0


def test_into_a_buffer(queue):
    queue.send(b"hello")
    buffer = bytearray(8200)
    assert queue.recv_into(buffer, timeout=PATIENCE) == 5
    assert buffer[:6] == b"hello\0"
    numbers = np.ones(8192, np.uint8)
    queue.send(bytes(8192))
    assert queue.recv_into(numbers) == 8192
    assert not numbers.any()


def test_a_buffer_too_small_takes_nothing(queue):
    queue.send(b"hello")
    with pytest.raises(OSError, match="8191 bytes for POSIX queue '/ipckit-test'.* is 8192") as caught:
        queue.recv_into(bytearray(8191))
    assert caught.value.errno == errno.EMSGSIZE
    with pytest.raises(TypeError, match="read-only bytes"):
        queue.recv_into(bytes(8192))
    assert queue.recv() == b"hello"


def test_a_message_too_large_is_refused_before_anything_is_sent(queue):
    for verb in (lambda: queue.send(bytes(8193)), lambda: queue.send_many([b"x", bytes(8193)])):
        with pytest.raises(OSError, match="8193 bytes to POSIX queue '/ipckit-test'.* is 8192") as caught:
            verb()
        assert caught.value.errno == errno.EMSGSIZE
    assert queue.stat().messages == 0


@pytest.fixture
def roomy():
    """Makes queues beyond what C does in one go without dropping the GIL; the limits are raised for it."""
    limit = {name: Path(f"/proc/sys/fs/mqueue/{name}") for name in ("msg_max", "msgsize_max")}
    former = {name: path.read_text() for name, path in limit.items()}
    made = []

    def make(count, size):
        made.append(MessageQueue(NAME, create=True, max_messages=count, max_message=size))
        made[-1].unlink()
        return made[-1]

    try:
        for path in limit.values():
            path.write_text("20000")
    except OSError:
        pytest.skip("may not raise the limits here")
    yield make
    for queue in made:
        queue.close()
    for name, path in limit.items():
        path.write_text(former[name])


def test_large_messages(roomy, forked):
    large = roomy(10, 20_000)
    messages = [bytes([number]) * (20_000 - number) for number in range(5)]
    for timeout in (None, 0, 5):
        large.send(messages[0], timeout=timeout)
        assert large.recv(timeout=timeout) == messages[0]
        assert large.send_many(messages, timeout=timeout) == 5
        assert large.recv_many(4, timeout=timeout) == messages[:4]
        assert large.recv_many(timeout=timeout) == messages[4:]
        with pytest.raises(TimeoutError):
            large.recv_many(timeout=0)

    def send(ready):
        ready()
        large.send(messages[1])

    child = forked(send)
    assert large.recv(timeout=PATIENCE) == messages[1]
    assert child.wait() == 0
    with pytest.raises(ValueError, match="not 0"):
        large.recv_many(0)


def test_many_messages_in_a_row(roomy):
    large = roomy(600, 100)
    for timeout in (None, 0, 5):
        assert large.send_many([b"%d" % number for number in range(600)], timeout=timeout) == 600
        got = large.recv_many(timeout=timeout)
        assert len(got) == 256
        got += large.recv_many(1000) + large.recv_many(88)
        assert got == [b"%d" % number for number in range(600)]
    assert large.send_many([b"x"] * 700, timeout=0) == 600
    assert large.recv_many(2) == [b"x"] * 2
    assert large.send_many((bytearray(b"x") for _ in range(5)), timeout=0) == 2


@pytest.mark.parametrize("priority", [-1, 32768, 1 << 70])
def test_a_priority_out_of_range(queue, priority):
    for verb in (queue.send, lambda data, **more: queue.send_many([data], **more)):
        with pytest.raises(ValueError, match=f"priority must be an integer from 0 to 32767, not {priority}"):
            verb(b"x", priority=priority)
    assert queue.stat().messages == 0


def test_a_wrong_call_names_what_is_wrong(queue):
    with pytest.raises(TypeError, match="positional"):
        queue.recv(5)
    with pytest.raises(TypeError, match="priority"):
        queue.recv(priority=5)
    with pytest.raises(TypeError, match="deadline"):
        queue.send(b"x", deadline=5)
    with pytest.raises(ValueError, match="max must be an integer from 1 to .*, not 0"):
        queue.recv_many(0)
    for timeout in (-1, float("nan")):
        with pytest.raises(ValueError, match="timeout must be None or a number of seconds"):
            queue.send(b"x", timeout=timeout)


def test_many_in_one_call(queue, forked):
    messages = [b"%d" % number * (number % 50) for number in range(1000)]

    def receive(ready):
        ready()
        got = []
        while len(got) < 1000:
            got += queue.recv_many(7)
        assert got == messages

    child = forked(receive)
    child.wait_ready()
    assert queue.send_many(iter(messages), timeout=PATIENCE) == 1000
    assert child.wait() == 0


def test_many_when_the_time_is_over(queue):
    assert queue.send_many([b"x"] * 20, timeout=0) == 10
    with pytest.raises(TimeoutError, match="send to POSIX queue '/ipckit-test'"):
        queue.send_many([b"x"], timeout=0.01)
    assert queue.send_many([]) == 0
    assert len(queue.recv_many(4)) == 4
    assert len(queue.recv_many(100)) == 6
    with pytest.raises(TimeoutError, match="receive from POSIX queue '/ipckit-test'"):
        queue.recv_many(timeout=0.01)


def test_the_time_that_a_full_or_empty_queue_is_waited_for(queue):
    for verb in (
        queue.recv,
        queue.recv_message,
        lambda timeout: queue.recv_into(bytearray(8192), timeout=timeout),
    ):
        start = time.monotonic()
        with pytest.raises(TimeoutError, match="receive from POSIX queue '/ipckit-test'") as caught:
            verb(timeout=0.05)
        assert time.monotonic() - start >= 0.05
        assert caught.value.errno == errno.ETIMEDOUT
    assert fill(queue) == 10
    for data in (b"x", bytearray(b"x")):
        start = time.monotonic()
        with pytest.raises(TimeoutError, match="send to POSIX queue '/ipckit-test'"):
            queue.send(data, priority=5, timeout=0.05)
        assert time.monotonic() - start >= 0.05
    assert queue.stat().messages == 10


def test_a_blocked_sender_keeps_its_priority(queue):
    fill(queue)
    thread, came = in_thread(lambda: queue.send(b"now", priority=7))
    eventually(lambda: asleep(thread))
    queue.recv()
    thread.join(PATIENCE)
    assert came == [None]
    assert queue.recv_message() == (b"now", 7)


def test_signals_neither_end_nor_prolong_a_wait(queue):
    """1,000 a second, while there is nothing to receive and no room to send."""
    seen = []
    former = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        while os.getppid() == parent:
            os.kill(parent, signal.SIGUSR1)
            time.sleep(0.001)
        os._exit(0)
    try:
        for verb in (
            queue.recv,
            queue.recv_message,
            queue.recv_many,
            lambda timeout: (fill(queue), queue.send(b"x", timeout=timeout)),
            lambda timeout: queue.send_many([b"x"], timeout=timeout),
        ):
            seen.clear()
            while len(seen) < 10:
                start = time.monotonic()
                with pytest.raises(TimeoutError):
                    verb(timeout=0.05)
                assert time.monotonic() - start >= 0.05
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        signal.signal(signal.SIGUSR1, former)


def test_a_handler_that_raises_ends_the_wait(queue):
    def interrupt(*_):
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGUSR1, interrupt)
    try:
        for verb in (queue.recv, queue.recv_message, lambda: (fill(queue), queue.send(b"x"))):
            thread, _ = in_thread(
                lambda: (
                    eventually(lambda: procfs.asleep(os.getpid(), within="poll")),
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1),
                )
            )
            with pytest.raises(KeyboardInterrupt):
                verb()
            thread.join()
    finally:
        signal.signal(signal.SIGUSR1, former)


# --- opening ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "/", "jobs", "jobs/", "//jobs", "/a/b", "/a/", "/a\0b", "/.", "/.."])
def test_a_name_that_is_none(name):
    with pytest.raises(ValueError, match="name must be a slash and a word without slashes, not") as caught:
        MessageQueue(name, create=True)
    assert repr(name) in str(caught.value)


def test_a_name_too_long():
    with pytest.raises(ValueError, match="at most 255 bytes after the slash, not 256"):
        MessageQueue("/" + "ä" * 128, create=True)
    with MessageQueue("/" + "x" * 255, create=True) as queue:
        queue.unlink()


def test_it_is_not_there_and_it_is_there(queue):
    with pytest.raises(FileNotFoundError, match="No such file.*POSIX queue '/ipckit-none'") as caught:
        MessageQueue("/ipckit-none")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(FileExistsError, match="POSIX queue '/ipckit-test'") as caught:
        MessageQueue(NAME, create=True, exclusive=True)
    assert caught.value.errno == errno.EEXIST
    with MessageQueue(NAME, create=True, max_messages=3) as other:
        assert other.stat().max_messages == 10, "it was opened, not made"


def test_what_contradicts_itself(queue):
    for arguments, match in (
        ({"exclusive": True}, "needs create=True"),
        ({"mode": 0o1600}, "0o1600"),
        ({"readonly": True, "writeonly": True}, "both readonly and writeonly"),
        (
            {"create": True, "exclusive": True, "max_messages": 0},
            "max_messages must be an integer from 1 to 65536, not 0",
        ),
        ({"create": True, "exclusive": True, "max_message": 1 << 25}, "max_message .* not 33554432"),
    ):
        with pytest.raises(ValueError, match=match):
            MessageQueue(NAME, **arguments)


@pytest.mark.parametrize("mask", [0, 0o077])
def test_the_umask_neither_cuts_nor_widens_the_mode(mask):
    former = os.umask(mask)
    try:
        with MessageQueue(NAME, create=True, mode=0o660) as queue:
            queue.unlink()
            assert (queue.stat().mode, queue.stat().uid) == (0o660, os.geteuid())
    finally:
        os.umask(former)


def test_one_direction(queue):
    with MessageQueue(NAME, readonly=True) as reader, MessageQueue(NAME, writeonly=True) as writer:
        writer.send(b"x")
        assert writer.stat().bytes is None
        assert reader.stat().bytes == 1
        assert reader.recv() == b"x"
        for verb, way in ((lambda: reader.send(b"x"), "readonly"), (writer.recv, "writeonly")):
            with pytest.raises(
                OSError, match=f"POSIX queue '/ipckit-test', which was opened {way}"
            ) as caught:
                verb()
            assert caught.value.errno == errno.EBADF


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_without_permission(queue, forked):
    def nobody(ready):
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        with pytest.raises(PermissionError, match="POSIX queue '/ipckit-test'") as caught:
            MessageQueue(NAME)
        assert caught.value.errno == errno.EACCES
        # Now one that may be used, but not removed.
        with MessageQueue("/ipckit-open") as other:
            assert other.recv() == b"for all"
            with pytest.raises(PermissionError, match="POSIX queue '/ipckit-open'"):
                other.unlink()

    with MessageQueue("/ipckit-open", create=True, mode=0o666) as opened:
        opened.send(b"for all")
        assert forked(nobody).wait() == 0
        opened.unlink()


def test_defaults_and_stat(queue):
    found = queue.stat()
    assert found.max_messages == min(10, limits.value("fs.mqueue.msg_max"))
    assert found.max_message == min(8192, limits.value("fs.mqueue.msgsize_max")) == queue.max_message
    queue.send(b"12345")
    queue.send(b"678")
    assert (queue.stat().messages, queue.stat().bytes) == (2, 8)


def test_the_descriptor_is_close_on_exec_and_non_blocking(queue):
    assert not os.get_inheritable(queue.fileno())
    assert not os.get_blocking(queue.fileno())


# --- limits ----------------------------------------------------------------------------------------


def unprivileged(action):
    """Run in a child that may not exceed the limits: nobody if we are root."""

    def run(ready):
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        action()

    return run


def test_over_the_limits_of_the_system(forked):
    def exceed():
        count, size = limits.value("fs.mqueue.msg_max"), limits.value("fs.mqueue.msgsize_max")
        for arguments, name, now in (
            ({"max_messages": count + 1}, "msg_max", count),
            ({"max_message": size + 1}, "msgsize_max", size),
        ):
            with pytest.raises(OSError) as caught:
                MessageQueue(NAME, create=True, **arguments)
            assert caught.value.errno == errno.EINVAL
            assert f"POSIX queue {NAME!r} of " in str(caught.value)
            assert f"fs.mqueue.{name} is {now}; raise it with: sysctl -w fs.mqueue.{name}={now + 1}" in str(
                caught.value
            )

    assert forked(unprivileged(exceed)).wait() == 0


def test_over_the_share_of_the_user(forked):
    def exceed():
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (30_000, 30_000))
        with pytest.raises(OSError, match="counts for 82880 bytes, and RLIMIT_MSGQUEUE .* 30000") as caught:
            MessageQueue(NAME, create=True, max_messages=10, max_message=8192)
        assert caught.value.errno == errno.EMFILE
        with MessageQueue(NAME, create=True, max_messages=2, max_message=8192) as first:  # alone it fits
            with pytest.raises(OSError, match="counts for 16576 bytes.*prlimit .*--msgqueue=46576"):
                MessageQueue("/ipckit-second", create=True, max_messages=2, max_message=8192)
            first.unlink()

    assert forked(unprivileged(exceed)).wait() == 0


def test_no_descriptor_left_is_told_as_such(queue, forked):
    def exhaust(ready):
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 1,) * 2)
        spare = []
        with pytest.raises(OSError) as caught:
            while True:
                spare.append(os.dup(0))
        assert caught.value.errno == errno.EMFILE
        with pytest.raises(OSError) as caught:
            MessageQueue(NAME, create=True)
        assert caught.value.errno == errno.EMFILE
        assert "RLIMIT_MSGQUEUE" not in str(caught.value)

    assert forked(exhaust).wait() == 0


def test_no_descriptor_left_to_wait_with(queue, forked):
    def exhaust(ready):
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        with contextlib.suppress(OSError):
            while True:
                os.dup(0)
        fill(queue)
        queue.recv_many()
        for verb in (
            queue.recv,
            queue.recv_many,
            queue.recv_message,
            lambda: (fill(queue), queue.send(b"x")),
        ):
            with pytest.raises(OSError, match="POSIX queue '/ipckit-test'") as caught:
                verb()
            assert caught.value.errno == errno.EMFILE

    assert forked(exhaust).wait() == 0


def test_too_many_queues(forked):
    limit = Path("/proc/sys/fs/mqueue/queues_max")
    former = limit.read_text()
    try:
        limit.write_text("0")
    except OSError:
        pytest.skip("may not set fs.mqueue.queues_max here")

    def one_more():
        with pytest.raises(OSError, match="fs.mqueue.queues_max is 0; raise it with") as caught:
            MessageQueue(NAME, create=True)
        assert caught.value.errno == errno.ENOSPC

    try:
        assert forked(unprivileged(one_more)).wait() == 0
    finally:
        limit.write_text(former)


# --- with others -----------------------------------------------------------------------------------


def test_with_a_c_program_both_ways(queue):
    queue.send(b"from us", priority=4)
    assert peer("queue-receive", NAME) == "4 from us\n"
    peer("queue-send", NAME, 17, "from C")
    assert queue.recv_message(timeout=PATIENCE) == (b"from C", 17)


def test_a_queue_that_a_c_program_made():
    peer("queue-create", NAME, 3, 100)
    with MessageQueue(NAME) as queue:
        queue.unlink()
        found = queue.stat()
        assert (found.max_messages, found.max_message, found.mode) == (3, 100, 0o600)
        assert queue.send_many([b"x" * 100] * 4, timeout=0) == 3
        assert queue.recv_many() == [b"x" * 100] * 3


def test_with_posix_ipc_both_ways(queue):
    queue.send(b"from us", priority=4)
    code = "q = posix_ipc.MessageQueue(sys.argv[1]); print(*q.receive(5)); q.send(b'from it', 5, 9)"
    assert python(code, NAME) == "b'from us' 4\n"
    assert queue.recv_message(timeout=PATIENCE) == (b"from it", 9)


def test_a_blocked_receiver_of_each_gets_its_message(queue):
    for command in (
        [PEER, "queue-receive", NAME],
        [
            sys.executable,
            "-c",
            "import posix_ipc, sys; print(posix_ipc.MessageQueue(sys.argv[1]).receive()[0])",
            NAME,
        ],
    ):
        waiting = subprocess.Popen(command, stdout=subprocess.PIPE)
        queue.send(b"hello")
        assert b"hello" in waiting.communicate(timeout=PATIENCE)[0]
    thread, came = in_thread(lambda: queue.recv(timeout=PATIENCE))
    eventually(lambda: asleep(thread))
    peer("queue-send", NAME, 0, "hello")
    thread.join(PATIENCE)
    assert came == [b"hello"]


def test_killed_receivers_take_nothing_with_them(queue, forked):
    def receive(ready):
        ready()
        queue.recv()

    children = [forked(receive) for _ in range(5)]
    for child in children:
        child.wait_ready()
        eventually(lambda: procfs.asleep(child.pid, within="poll"))  # noqa: B023
        child.kill()
        assert child.wait() == -signal.SIGKILL
    assert queue.send_many([b"%d" % number for number in range(5)]) == 5
    assert queue.recv_many(timeout=0) == [b"0", b"1", b"2", b"3", b"4"]


def test_fork_while_another_thread_waits(queue):
    thread, came = in_thread(lambda: queue.recv(timeout=PATIENCE))
    eventually(lambda: asleep(thread))
    code = f"""if 1:
        import os, threading, time
        from ipckit.posix import MessageQueue
        queue = MessageQueue({NAME!r})
        fd = queue.fileno()
        thread = threading.Thread(target=queue.recv)
        thread.start()
        while queue._queue.wake < 0:
            time.sleep(0.001)
        pid = os.fork()
        if pid == 0:
            queue.close()  # neither blocks, nor ends the parent's wait
            try:
                os.fstat(fd)
            except OSError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert thread.is_alive()
        queue.send(b"one")
        queue.send(b"two")
        thread.join()
    """
    subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], check=True, timeout=PATIENCE
    )
    thread.join(PATIENCE)
    assert came and came[0] in (b"one", b"two")


# --- closing and removing --------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["recv", "recv_message", "recv_many", "recv_into", "send", "send_many"])
def test_close_ends_a_blocked_call_of_another_thread(queue, verb):
    if verb.startswith("send"):
        fill(queue)
    call = {
        "send": lambda: queue.send(b"x"),
        "send_many": lambda: queue.send_many([b"x"]),
        "recv_into": lambda: queue.recv_into(bytearray(8192)),
    }.get(verb) or getattr(queue, verb)
    fd = queue.fileno()
    pairs = [in_thread(call) for _ in range(3)]
    for thread, _ in pairs:
        eventually(lambda: asleep(thread))  # noqa: B023
    queue.unlink()
    queue.close()
    for thread, came in pairs:
        thread.join(PATIENCE)
        assert type(came[0]) is Closed
        assert "POSIX queue '/ipckit-test' is closed" in str(came[0])
    with pytest.raises(OSError):
        os.fstat(fd)


def test_threads_use_a_queue_while_one_closes_it():
    for _ in range(15):
        queue = MessageQueue(NAME, create=True)
        queue.unlink()

        def use(queue=queue):
            while True:
                queue.send(b"x")
                queue.recv()

        pairs = [in_thread(use) for _ in range(3)]
        queue.close()
        for thread, came in pairs:
            thread.join(PATIENCE)
            assert type(came[0]) is Closed


def test_closed_is_closed(queue):
    queue.unlink()
    queue.close()
    queue.close()
    assert queue.closed
    assert "closed" in repr(queue)
    calls = [
        lambda: queue.send(b"x"),
        lambda: queue.send(b"x", timeout=PATIENCE),
        lambda: queue.send_many([b"x"]),
        queue.recv,
        queue.recv_message,
        queue.recv_many,
        lambda: queue.recv_into(bytearray(8192)),
        queue.fileno,
        queue.stat,
        lambda: next(iter(queue)),
        lambda: pickle.dumps(queue),
        lambda: asyncio.run(queue.arecv()),
        lambda: asyncio.run(queue.asend(b"x")),
    ]
    for call in calls:
        with pytest.raises(Closed, match="POSIX queue '/ipckit-test' is closed"):
            call()


def test_close_then_unlink(queue):
    queue.close()
    queue.unlink()
    assert not registry.records()
    later = MessageQueue(NAME, create=True)
    later.close()
    with pytest.raises(FileNotFoundError, match="whose name is that of a later queue now"):
        queue.unlink()
    later.unlink()
    with pytest.raises(FileNotFoundError, match="POSIX queue '/ipckit-test'"):
        later.unlink()


def test_removed_while_in_use(queue, forked):
    def receive(ready):
        ready()
        assert queue.recv() == b"still here"

    child = forked(receive)
    child.wait_ready()
    queue.unlink()
    with pytest.raises(FileNotFoundError, match=NAME) as caught:
        queue.unlink()
    assert caught.value.errno == errno.ENOENT
    queue.send(b"still here")
    assert child.wait() == 0
    queue.close()


def test_a_later_queue_of_the_same_name_is_not_ours_to_remove(queue):
    queue.unlink()
    data = pickle.dumps(queue)
    with MessageQueue(NAME, create=True, exclusive=True) as later:
        for verb in (queue.unlink, lambda: pickle.loads(data)):
            with pytest.raises(FileNotFoundError, match="the name is that of|whose name is that of"):
                verb()
        later.unlink()
    queue.close()


def test_one_of_fifty_creators_wins(forked):
    start, go = os.pipe()

    def race(ready):
        os.close(go)
        ready()
        os.read(start, 1)
        try:
            MessageQueue(NAME, create=True, exclusive=True, max_messages=5).close()
        except FileExistsError:
            with MessageQueue(NAME, create=True, max_messages=7) as queue:
                assert queue.stat().max_messages == 5
            raise SystemExit(3) from None

    children = [forked(race) for _ in range(50)]
    for child in children:
        child.wait_ready()
    os.close(start)
    os.close(go)
    assert sorted(child.wait() for child in children) == [0] + [3] * 49
    MessageQueue(NAME).unlink()


def test_it_is_recorded(queue):
    def roles():
        return {(found.role, found.left) for found in registry.records() if found.ident == NAME}

    assert roles() == {("creator", False)}
    other = MessageQueue(NAME)
    other.close()
    queue.close()
    assert roles() == {("creator", True)}
    with MessageQueue(NAME) as last:
        last.unlink()
    assert roles() == set()


def test_what_could_not_be_recorded_is_not_made(forked):
    def unrecorded(ready):
        def refuse(*_, **__):
            raise OSError(errno.ENOSPC, "no inode left")

        registry.enter = refuse
        with pytest.raises(OSError, match="no inode left"):
            MessageQueue(NAME, create=True)
        with pytest.raises(posix_ipc.ExistentialError):
            posix_ipc.MessageQueue(NAME)

    assert forked(unrecorded).wait() == 0


def test_forgotten_without_close():
    fd = MessageQueue(NAME, create=True).fileno()
    with pytest.raises(OSError):
        os.fstat(fd)
    with MessageQueue(NAME) as queue:
        queue.unlink()


def test_it_pickles_by_name(queue):
    with pickle.loads(pickle.dumps(queue)) as other:
        other.send(b"x")
    with MessageQueue(NAME, readonly=True) as reader, pickle.loads(pickle.dumps(reader)) as other:
        assert other.recv() == b"x"
        with pytest.raises(OSError, match="readonly"):
            other.send(b"x")


# --- select and asyncio ----------------------------------------------------------------------------


def test_the_descriptor_tells(queue):
    poll = select.poll()
    poll.register(queue.fileno())
    assert poll.poll(0) == [(queue.fileno(), select.POLLOUT)]
    fill(queue)
    assert poll.poll(0) == [(queue.fileno(), select.POLLIN)]
    queue.recv()
    assert poll.poll(0) == [(queue.fileno(), select.POLLIN | select.POLLOUT)]


def test_asyncio_both_ways(queue):
    async def main():
        loop_runs = asyncio.ensure_future(asyncio.sleep(0))
        receive = asyncio.ensure_future(queue.arecv(timeout=PATIENCE))
        await loop_runs
        await queue.asend(b"one", priority=3)
        assert await receive == b"one"
        fill(queue)
        send = asyncio.ensure_future(queue.asend(b"more", priority=5, timeout=PATIENCE))
        await asyncio.sleep(0.01)
        assert not send.done()
        assert await queue.arecv() == b"x"
        assert await send is None
        assert await queue.arecv_message() == (b"more", 5)
        got = []
        async for message in queue:
            got.append(message)
            if len(got) == 9:
                break
        assert got == [b"x"] * 9
        with pytest.raises(TimeoutError, match="POSIX queue"):
            await queue.arecv(timeout=0.02)

    asyncio.run(main())


def test_a_cancelled_receive_has_taken_nothing(queue):
    async def main():
        task = asyncio.ensure_future(queue.arecv())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        queue.send(b"x")
        assert await queue.arecv() == b"x"

    asyncio.run(main())


def test_close_ends_a_waiting_task(queue):
    async def main():
        fd = queue.fileno()
        task = asyncio.ensure_future(queue.arecv())
        await asyncio.sleep(0.01)
        queue.unlink()
        queue.close()
        with pytest.raises(Closed, match=NAME):
            await asyncio.wait_for(task, PATIENCE)
        with pytest.raises(OSError):
            os.fstat(fd)

    asyncio.run(main())


def test_iterating(queue):
    queue.send_many([b"1", b"2", b"3"])
    assert [message for _, message in zip(range(3), queue, strict=False)] == [b"1", b"2", b"3"]


def test_the_example():
    example = Path(__file__).parent.parent / "examples" / "priority_queue.py"
    run = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=PATIENCE)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "put out the fire, answer the phone, open the door, sweep, dust\n"
