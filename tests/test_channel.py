"""What a channel has beyond the verbs of all endpoints, which test_endpoints.py holds it to."""

import asyncio
import contextlib
import errno
import gc
import hashlib
import os
import pickle
import random
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import PATIENCE, eventually, open_descriptors
from procfs import asleep

from ipckit import Closed, PeerDied
from ipckit.channel import Listener, channel, connect

WHOLE = os.environ.get("IPCKIT_PROOF") == "1"


@pytest.fixture
def ends():
    left, right = channel(8192)
    yield left, right
    left.close()
    right.close()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "sock")


# --- both ways -----------------------------------------------------------------------------------


def test_each_end_sends_and_receives(ends):
    left, right = ends
    left.send(b"there")
    right.send(b"and back")
    assert right.recv(timeout=PATIENCE) == b"there"
    assert left.recv(timeout=PATIENCE) == b"and back"
    stats = left.stats()
    assert (stats.sent.sent, stats.received.received, stats.inbox) == (1, 1, 0)
    assert left.capacity == right.capacity == 8192
    assert left.peer == (os.getpid(), os.getuid(), os.getgid())
    assert repr(left) == "<Channel channel of 8192 bytes>"


@pytest.mark.parametrize(
    "options", [{"capacity": 0}, {"capacity": 1 << 35}, {"max_message": 0}, {"max_inbox": -1}]
)
def test_sizes_out_of_range_are_refused(options):
    with pytest.raises(
        ValueError, match=f"{next(iter(options))} must be .* not {next(iter(options.values()))}"
    ):
        channel(**options)


def test_a_message_beyond_max_message_is_refused():
    left, right = channel(8192, max_message=100)
    with (
        left,
        right,
        pytest.raises(OSError, match="101 bytes of at most 100 bytes, which is max_message") as caught,
    ):
        left.send(bytes(101))
    assert caught.value.errno == errno.EMSGSIZE


def test_sizes_from_nothing_to_beyond_the_ring_between_processes(ends, forked):
    left, right = ends
    sizes = [*range(20), 4087, 4088, 4089, 8191, 8192, 100_000, 3, 1_000_001, 0]

    def child(ready):
        with right.claim():
            for size in sizes:
                assert right.recv(timeout=PATIENCE) == random.Random(size).randbytes(size)
                right.send(random.Random(-size).randbytes(size), timeout=PATIENCE)

    process = forked(child)
    left.claim()
    for size in sizes:
        left.send(random.Random(size).randbytes(size), timeout=PATIENCE)
        assert left.recv(timeout=PATIENCE) == random.Random(-size).randbytes(size)
    assert process.wait() == 0


# --- the end -------------------------------------------------------------------------------------


def test_close_is_the_end_after_the_rest(ends):
    left, right = ends
    left.send(b"last")
    left.close()
    assert right.recv(timeout=0) == b"last"
    for receive in (right.recv, lambda: right.recv(timeout=0), right.recv_many, right.peek):
        with pytest.raises(EOFError, match="the sending side is closed") as caught:
            receive()
        assert type(caught.value) is EOFError
    with pytest.raises(BrokenPipeError, match="send on channel of 8192 bytes") as broken:
        right.send(b"x")
    assert broken.value.errno == errno.EPIPE
    assert list(right) == []


def test_half_close(ends):
    left, right = ends
    left.send(b"question")
    left.close_write()
    with pytest.raises(BrokenPipeError):
        left.send(b"x")
    assert list(right) == [b"question"]
    right.send(b"answer")
    assert left.recv(timeout=PATIENCE) == b"answer"
    with pytest.raises(EOFError):
        right.recv()


def test_an_end_that_is_dropped_is_closed():
    left, right = channel(8192)
    right.send(b"x")
    del right
    gc.collect()
    with left:
        assert left.recv(timeout=0) == b"x"
        with pytest.raises(EOFError):
            left.recv()


def test_closing_ends_what_other_threads_do(ends):
    left, _ = ends
    caught = []

    def receive(verb):
        try:
            verb()
        except Closed as error:
            caught.append(str(error))

    verbs = [left.recv, left.peek, lambda: left.recv_fds(1), lambda: left.send(bytes(1 << 20))]
    threads = [threading.Thread(target=receive, args=[verb]) for verb in verbs]
    for thread in threads:
        thread.start()
    eventually(lambda: len(os.listdir("/proc/self/task")) >= 5)
    left.close()
    for thread in threads:
        thread.join(PATIENCE)
    assert caught == ["channel of 8192 bytes is closed"] * 4


def test_handing_an_end_on_does_not_end_it(ends, forked):
    """As with multiprocessing.Pipe: the parent closes its copy of the child's end."""
    left, right = ends

    def child(ready):
        assert right.recv(timeout=PATIENCE) == b"work"
        right.send(b"done")
        right.close()
        left.close()  # inherited, never used

    process = forked(child)
    right.close()
    left.send(b"work")
    assert left.recv(timeout=PATIENCE) == b"done"
    with pytest.raises(EOFError) as caught:
        left.recv(timeout=PATIENCE)
    assert type(caught.value) is EOFError
    assert process.wait() == 0


def test_claiming_one_end_does_not_end_the_other_even_if_it_was_used(ends, forked):
    left, right = ends
    left.send(b"before the fork")
    assert right.recv() == b"before the fork"

    def child(ready):
        with right.claim():
            right.send(right.recv(timeout=PATIENCE))

    process = forked(child)
    left.claim()
    assert right.closed
    left.send(b"echo")
    assert left.recv(timeout=PATIENCE) == b"echo"
    assert process.wait() == 0
    with pytest.raises(EOFError) as caught:
        left.recv(timeout=PATIENCE)
    assert type(caught.value) is EOFError


def test_an_end_that_two_processes_used_ends_with_the_last(ends, forked):
    left, right = ends
    right.send(b"parent")

    def child(ready):
        right.send(b"child")
        left.close()
        ready()
        assert right.recv(timeout=PATIENCE) == b"go on"
        right.send(b"after the parent")
        right.close()

    process = forked(child)
    process.wait_ready()
    right.close()
    left.send(b"go on")
    assert [left.recv(timeout=PATIENCE) for _ in range(3)] == [b"parent", b"child", b"after the parent"]
    with pytest.raises(EOFError) as caught:
        left.recv(timeout=PATIENCE)
    assert type(caught.value) is EOFError


def test_claiming_a_closed_end_is_closed(ends):
    ends[0].close()
    with pytest.raises(Closed, match="channel of 8192 bytes is closed"):
        ends[0].claim()


# --- death ---------------------------------------------------------------------------------------


def sleeping_child(forked, ends, before=lambda right: None):
    """A child that has the right end and sleeps; killed with SIGKILL by who calls this."""
    left, right = ends

    def child(ready):
        right.claim()
        before(right)
        ready()
        signal.pause()

    process = forked(child)
    left.claim()
    process.wait_ready()
    return process


VERBS = {
    "recv": lambda end: end.recv(),
    "recv_into": lambda end: end.recv_into(bytearray(10)),
    "recv_many": lambda end: end.recv_many(),
    "peek": lambda end: end.peek(),
    "iteration": lambda end: next(iter(end)),
    "recv_fds": lambda end: end.recv_fds(1),
    "send": lambda end: end.send(bytes(4000)),
    "send of a long one": lambda end: end.send(bytes(100_000)),
    "send_many": lambda end: end.send_many([bytes(4000)]),
    "reserve": lambda end: end.reserve(4000),
    "arecv": lambda end: asyncio.run(end.arecv()),
    "asend": lambda end: asyncio.run(end.asend(bytes(4000))),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
def test_a_killed_peer_ends_every_verb(ends, forked, verb):
    left, _ = ends
    child = sleeping_child(forked, ends)
    with contextlib.suppress(TimeoutError):
        while True:  # until there is no room
            left.send(bytes(4000), timeout=0)
    blocked = threading.Event()
    caught = []

    def call():
        blocked.set()
        try:
            verb(left)
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    blocked.wait()
    eventually(lambda: asleep(os.getpid(), thread.native_id))
    assert not caught
    child.kill()
    thread.join(PATIENCE)
    assert type(caught[0]) is PeerDied
    assert "channel of 8192 bytes: the peer ended without closing" in str(caught[0])


def test_a_death_wakes_who_sleeps():
    """Who is killed as a slice of 100 ms begins is not noticed only as that ends: at least once, however busy
    the machine is. A small process: the kernel frees all memory of the dead before it closes what they had open.
    """
    program = """
import os, signal, time
from ipckit import PeerDied, channel
from procfs import asleep, wakeups

def once_more_asleep(pid):
    while not asleep(pid, within="poll"):
        time.sleep(0.001)
    before = wakeups(pid)
    while wakeups(pid) == before:
        time.sleep(0.001)

took = 1
while took > 0.05:
    left, right = channel(8192)
    told, tell = os.pipe()
    victim = os.fork()
    if victim == 0:
        right.claim()
        signal.pause()
    left.claim()
    killer = os.fork()
    if killer == 0:
        once_more_asleep(os.getppid())
        os.write(tell, b"%r" % time.monotonic())
        os.kill(victim, signal.SIGKILL)
        os._exit(0)
    try:
        left.recv()
    except PeerDied:
        took = time.monotonic() - float(os.read(told, 100))
    for child in (victim, killer):
        os.waitpid(child, 0)
    os.close(told), os.close(tell)
    left.close()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE, cwd=Path(__file__).parent)


def test_what_was_sent_before_the_death_comes_first(ends, forked):
    left, _ = ends
    child = sleeping_child(forked, ends, lambda right: right.send_many([b"%d" % n for n in range(100)]))
    child.kill()
    child.wait()
    assert [left.recv() for _ in range(50)] == [b"%d" % n for n in range(50)]
    assert left.recv_many() == [b"%d" % n for n in range(50, 100)]
    for receive in (lambda: left.recv(timeout=0), left.recv, lambda: list(left)):
        with pytest.raises(PeerDied, match="recv on channel"):
            receive()


def test_after_the_death_sending_fails_too(ends, forked):
    left, _ = ends
    child = sleeping_child(forked, ends)
    child.kill()
    child.wait()
    with pytest.raises(PeerDied):
        left.recv(timeout=0)
    for send in (lambda: left.send(b"x"), lambda: left.send_many([b"x"]), lambda: left.reserve(1)):
        with pytest.raises(PeerDied, match="on channel of 8192 bytes: the peer ended without closing"):
            send()
    with pytest.raises(PeerDied, match="send_fds"):
        left.send_fds([0])
    with pytest.raises(PeerDied, match="recv_fds"):
        left.recv_fds(1)


def test_killed_amid_a_long_message(ends, forked):
    left, right = ends

    def child(ready):
        right.claim()
        ready()
        right.send(bytes(1 << 20))

    process = forked(child)
    left.claim()
    process.wait_ready()
    eventually(lambda: left.stats().received.used > 4000 and asleep(process.pid))
    process.kill()
    with pytest.raises(PeerDied):
        left.recv(timeout=PATIENCE)


def test_an_exit_without_closing_is_a_death(ends, forked):
    left, right = ends
    process = forked(lambda ready: right.send(b"x"))
    right.close()
    assert process.wait() == 0
    assert left.recv() == b"x"
    with pytest.raises(PeerDied):
        left.recv()


def test_a_death_before_the_first_use_is_one_too(ends, forked):
    left, right = ends
    process = forked(lambda ready: os._exit(3))
    right.close()
    assert process.wait() == 3
    with pytest.raises(PeerDied):
        left.recv(timeout=PATIENCE)


def test_a_death_is_not_seen_while_this_process_has_the_other_end_too(ends, forked):
    left, right = ends
    process = forked(lambda ready: right.send(b"x"))
    assert process.wait() == 0
    assert left.recv(timeout=PATIENCE) == b"x"
    with pytest.raises(TimeoutError):
        left.recv(timeout=0.1)
    left.claim()
    with pytest.raises(PeerDied):
        left.recv(timeout=PATIENCE)


def test_the_descriptor_tells_of_messages_and_of_the_end(ends, forked):
    left, _ = ends

    def readable(timeout=0):
        return bool(select.select([left.fileno()], [], [], timeout)[0])

    child = sleeping_child(forked, ends, lambda right: right.send_many([b"a", b"b"]))
    assert readable(PATIENCE)
    left.recv()
    assert readable(PATIENCE)
    left.recv()
    assert not readable()
    child.kill()
    assert readable(PATIENCE)
    with pytest.raises(PeerDied):
        left.recv(timeout=0)


def test_asyncio_goes_on_while_it_waits_for_a_peer_that_dies(ends, forked):
    left, _ = ends
    child = sleeping_child(forked, ends)

    async def both():
        receiving = asyncio.create_task(left.arecv())
        await asyncio.sleep(0.02)
        assert not receiving.done()
        child.kill()
        with pytest.raises(PeerDied):
            await receiving
        with pytest.raises(PeerDied):
            async for _ in left:
                pass

    asyncio.run(both())


# --- both send at once ---------------------------------------------------------------------------


def exchange(ends, forked, here, there):
    """Each side sends its messages, then receives those of the other."""
    left, right = ends

    def child(ready):
        with right.claim():
            for message in there:
                right.send(message, timeout=PATIENCE)
            for message in here:
                assert right.recv(timeout=PATIENCE) == message

    process = forked(child)
    left.claim()
    for message in here:
        left.send(message, timeout=PATIENCE)
    for message in there:
        assert left.recv(timeout=PATIENCE) == message
    assert process.wait() == 0


def test_both_send_16_mib_at_once(forked):
    size = 16 << 20
    with contextlib.ExitStack() as both:
        ends = [both.enter_context(end) for end in channel(max_message=size)]
        exchange(ends, forked, [os.urandom(size)], [os.urandom(size)])


def test_both_send_many_of_all_sizes_at_once(ends, forked):
    def some(seed):
        order = random.Random(seed)
        return [order.randbytes(order.choice([0, 5, 100, 4000, 5000, 100_000])) for _ in range(200)]

    exchange(ends, forked, some(1), some(2))


def test_both_send_at_once_in_asyncio(ends, forked):
    left, right = ends
    size = 1 << 20

    async def talk(end, mine, yours):
        await end.asend(mine, timeout=PATIENCE)
        await end.asend(mine, timeout=PATIENCE)
        assert [await end.arecv(timeout=PATIENCE), await end.arecv(timeout=PATIENCE)] == [yours, yours]

    def child(ready):
        with right.claim():
            asyncio.run(talk(right, b"r" * size, b"l" * size))

    process = forked(child)
    left.claim()
    asyncio.run(talk(left, b"l" * size, b"r" * size))
    assert process.wait() == 0


def tried_to_send(left):
    """Its numbers after a send for which there is no room, but time to take in what has come."""
    with pytest.raises(TimeoutError):
        left.send(bytes(5000), timeout=0.02)
    return left.stats()


def taken_in(ends, messages, count=None):
    """The left end has taken in the messages, or *count* of them, while it could not send one of its own."""
    left, right = ends
    right.send_many(messages)
    with contextlib.suppress(TimeoutError):
        while True:
            left.send(bytes(5000), timeout=0)
    eventually(lambda: tried_to_send(left).inbox == (len(messages) if count is None else count))


def test_what_was_taken_in_comes_in_order_by_every_verb(ends):
    left, right = ends
    taken_in(ends, [b"%d" % n for n in range(9)])
    assert left.stats().inbox == 9
    assert left.stats().received.messages == 0
    right.send(b"9")
    assert left.recv() == b"0"
    buffer = bytearray(10)
    assert left.recv_into(buffer) == 1
    assert buffer[:1] == b"1"
    with pytest.raises(OSError, match="1 bytes of at most 0 bytes, which is the buffer"):
        left.recv_into(bytearray(0))
    assert bytes(left.peek()) == b"2"
    left.keep()
    assert bytes(left.peek()) == b"2"
    left.release()
    assert left.recv_many(2) == [b"3", b"4"]
    assert asyncio.run(left.arecv()) == b"5"
    assert left.recv_many() == [b"6", b"7", b"8", b"9"]
    assert left.stats().inbox == 0


def test_what_was_taken_in_makes_the_descriptor_readable(ends):
    left, _ = ends
    number = left.fileno()
    taken_in(ends, [b"a", b"b"])
    for expected in (b"a", b"b"):
        assert select.select([number], [], [], 0)[0]
        assert left.recv(timeout=0) == expected
    assert not select.select([number], [], [], 0)[0]


def test_the_inbox_is_bounded():
    left, right = channel(8192, max_inbox=1000)
    with left, right:
        taken_in((left, right), [bytes(400)] * 10, count=3)
        assert tried_to_send(left).inbox == 3  # 400 bytes and a little each: the third is the first beyond
        assert left.recv_many() == [bytes(400)] * 10


def test_without_an_inbox_nothing_is_taken_in():
    left, right = channel(8192, max_inbox=0)
    with left, right:
        taken_in((left, right), [b"x"], count=0)


def part_taken_in(ends, long):
    """The right end is amid a long message, of which a send of the left end has taken in a part."""
    left, right = ends
    taken_in(ends, [])
    assert right._send_some(long) is False  # the step of asend(): as much as there is room for
    eventually(lambda: (now := tried_to_send(left)).inbox == 1 and now.received.used == 0)


def rest_of(right, long):
    while not right._send_some(long):
        time.sleep(0.001)


def test_a_part_of_a_long_message_is_gone_on_with_by_any_thread(ends):
    left, right = ends
    long = os.urandom(100_000)
    thread = threading.Thread(target=part_taken_in, args=[ends, long])
    thread.start()
    thread.join()
    with pytest.raises(
        OSError, match="100000 bytes of at most 4088 bytes, which lie in one piece at a capacity of 8192"
    ) as caught:
        left.peek()
    assert caught.value.errno == errno.EMSGSIZE
    with pytest.raises(OSError, match="100000 bytes of at most 10 bytes, which is the buffer"):
        left.recv_into(bytearray(10))
    with pytest.raises(TimeoutError):
        left.recv(timeout=0)
    thread = threading.Thread(target=rest_of, args=[right, long])
    thread.start()
    assert left.recv(timeout=PATIENCE) == long
    thread.join(PATIENCE)
    right.send(b"next")
    assert left.recv(timeout=PATIENCE) == b"next"


def test_a_part_that_ran_out_of_time_comes_again(ends):
    left, right = ends
    long = os.urandom(100_000)
    part_taken_in(ends, long)
    with pytest.raises(TimeoutError):
        left.recv(timeout=0.02)
    thread = threading.Thread(target=rest_of, args=[right, long])
    thread.start()
    buffer = bytearray(200_000)
    assert left.recv_into(buffer, timeout=PATIENCE) == 100_000
    thread.join(PATIENCE)
    assert buffer[:100_000] == long


def test_asyncio_and_recv_many_go_on_with_a_part(ends):
    left, right = ends
    for receive in (
        lambda: asyncio.run(left.arecv(timeout=PATIENCE)),
        lambda: left.recv_many(timeout=PATIENCE)[0],
    ):
        long = os.urandom(100_000)
        part_taken_in(ends, long)
        thread = threading.Thread(target=rest_of, args=[right, long])
        thread.start()
        assert receive() == long
        thread.join(PATIENCE)
        right.recv_many()  # make room: the next part begins with a full ring


def test_a_part_whose_sender_died_is_a_death(ends, forked):
    left, right = ends
    taken_in(ends, [])

    def child(ready):
        right.claim()
        assert right._send_some(bytes(100_000)) is False
        ready()
        signal.pause()

    process = forked(child)
    left.claim()
    process.wait_ready()
    eventually(lambda: tried_to_send(left).inbox == 1)
    process.kill()
    process.wait()
    with pytest.raises(PeerDied):
        left.recv(timeout=0)
    with pytest.raises(PeerDied):
        left.recv()
    assert left.stats().inbox == 0


def test_a_thread_that_receives_is_not_robbed(ends):
    left, right = ends
    got = []
    receiving = threading.Thread(target=lambda: got.extend(left.recv(timeout=PATIENCE) for _ in range(500)))
    receiving.start()

    def drain():
        for _ in range(300):
            right.recv(timeout=PATIENCE)

    draining = threading.Thread(target=drain)
    draining.start()
    answering = threading.Thread(target=lambda: [right.send(b"%d" % n, timeout=PATIENCE) for n in range(500)])
    answering.start()
    for _ in range(300):
        left.send(bytes(4000), timeout=PATIENCE)
    for thread in (receiving, draining, answering):
        thread.join(PATIENCE)
    assert got == [b"%d" % n for n in range(500)]


# --- descriptors ---------------------------------------------------------------------------------


def test_descriptors_with_data_and_without(ends, forked):
    left, right = ends

    def child(ready):
        with right.claim():
            data, (fd,) = right.recv_fds(1, timeout=PATIENCE)
            assert data == b"a pipe"
            os.write(fd, b"through it")
            os.close(fd)

    process = forked(child)
    left.claim()
    reader, writer = os.pipe()
    left.send_fds([writer], b"a pipe")
    os.close(writer)
    assert os.read(reader, 100) == b"through it"
    os.close(reader)
    assert process.wait() == 0
    with pytest.raises(EOFError) as caught:
        left.recv_fds(1, timeout=PATIENCE)
    assert type(caught.value) is EOFError
    with pytest.raises(BrokenPipeError, match="send_fds on channel"):
        left.send_fds([0])


def test_descriptors_go_past_the_messages_and_wake_nobody(ends):
    left, right = ends
    left.send_fds([0])
    left.send_fds([], b"nothing but data")
    with pytest.raises(TimeoutError):
        right.recv(timeout=0.05)
    assert not select.select([right.fileno()], [], [], 0)[0]
    data, (fd,) = right.recv_fds(5)
    os.close(fd)
    assert data == b""
    assert right.recv_fds(5) == (b"nothing but data", [])
    for timeout in (0, 0.07):
        with pytest.raises(TimeoutError, match="recv_fds on channel") as caught:
            right.recv_fds(1, timeout=timeout)
        assert caught.value.errno == errno.ETIMEDOUT


def test_surplus_descriptors_are_closed(ends):
    left, right = ends
    before = open_descriptors()
    left.send_fds([0] * 253)
    with pytest.raises(OSError, match="1 descriptors") as caught:
        right.recv_fds(1)
    assert caught.value.errno == errno.EMSGSIZE
    assert open_descriptors() == before


def test_what_cant_be_sent(ends):
    left, _ = ends
    with pytest.raises(ValueError, match="253 descriptors, not 254"):
        left.send_fds([0] * 254)
    with pytest.raises(
        OSError, match="65537 bytes of at most 65536 bytes, which go beside descriptors"
    ) as caught:
        left.send_fds([], bytes(65537))
    assert caught.value.errno == errno.EMSGSIZE
    with pytest.raises(OSError, match="send_fds") as caught:
        left.send_fds([9999])
    assert caught.value.errno == errno.EBADF
    with pytest.raises(ValueError, match="-1"):
        left.recv_fds(-1)
    with pytest.raises(TimeoutError):
        while True:
            left.send_fds([], bytes(60000), timeout=0)
    left.close()
    with pytest.raises(Closed):
        left.send_fds([0])
    with pytest.raises(Closed):
        left.recv_fds(1)
    with pytest.raises(Closed):
        left.peer  # noqa: B018


# --- other ways to start a process ---------------------------------------------------------------


CHILD = """
import multiprocessing, sys
from ipckit.channel import channel

def answer(end):
    with end:
        end.send(end.recv()[::-1])

if __name__ == "__main__":
    left, right = channel(8192)
    child = multiprocessing.get_context(sys.argv[1]).Process(target=answer, args=[right])
    child.start()
    right.close()
    left.send(b"abc")
    assert left.recv() == b"cba"
    try:
        left.recv()
    except EOFError as error:
        print(type(error).__name__)
    child.join()
"""


@pytest.mark.parametrize("method", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_multiprocessing(method, tmp_path):
    (tmp_path / "program.py").write_text(CHILD)
    command = [sys.executable, tmp_path / "program.py", method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "EOFError\n", done.stderr


# --- signals -------------------------------------------------------------------------------------

BLOCKING = {
    "recv": lambda end: end.recv(),
    "recv_into": lambda end: end.recv_into(bytearray(10)),
    "recv_many": lambda end: end.recv_many(),
    "peek": lambda end: end.peek(),
    "send": lambda end: end.send(bytes(4000)),
    "send of a long one": lambda end: end.send(bytes(100_000)),
    "send_many": lambda end: end.send_many([bytes(4000)] * 5),
    "reserve": lambda end: end.reserve(4000),
    "send_fds": lambda end: [end.send_fds([], bytes(60_000)) for _ in range(10)],
    "recv_fds": lambda end: end.recv_fds(1),
    "arecv": lambda end: asyncio.run(end.arecv()),
    "asend": lambda end: asyncio.run(end.asend(bytes(4000))),
}


def interrupted(forked, call):
    """Ctrl-C, which comes when *call* sleeps in the kernel, ends it by KeyboardInterrupt."""
    begun, begin = os.pipe()

    def child(ready):
        ready()
        os.read(begun, 1)
        eventually(lambda: asleep(os.getppid()))
        os.kill(os.getppid(), signal.SIGINT)

    process = forked(child)
    process.wait_ready()
    with pytest.raises(KeyboardInterrupt):
        os.write(begin, b".")  # from here on nothing but the call sleeps
        call()
    assert process.wait() == 0
    for fd in (begun, begin):
        os.close(fd)


@pytest.mark.parametrize("verb", BLOCKING.values(), ids=BLOCKING.keys())
def test_ctrl_c_ends_every_verb_and_the_channel_stays_usable(ends, forked, verb):
    left, right = ends
    filled = 0
    with contextlib.suppress(TimeoutError):
        while True:
            left.send(bytes(4000), timeout=0)
            filled += 1
    interrupted(forked, lambda: verb(left))
    while filled:
        assert right.recv(timeout=PATIENCE) == bytes(4000)
        filled -= 1
    with contextlib.suppress(TimeoutError):  # send_many had sent some, or none
        right.recv_many(timeout=0)
    for size in (5, 100_000):
        thread = threading.Thread(target=left.send, args=[bytes(size)], kwargs={"timeout": PATIENCE})
        thread.start()
        assert right.recv(timeout=PATIENCE) == bytes(size)
        thread.join()
        right.send(b"back")
        assert left.recv(timeout=PATIENCE) == b"back"


@pytest.mark.parametrize("verb", ["accept", "aaccept", "connect"])
def test_ctrl_c_while_a_channel_is_made(path, forked, verb):
    with Listener(path) as listener:
        call = {
            "accept": listener.accept,
            "aaccept": lambda: asyncio.run(listener.aaccept()),
            "connect": lambda: connect(path),
        }[verb]
        interrupted(forked, call)
        made = []
        thread = threading.Thread(target=lambda: made.append(connect(path, timeout=PATIENCE)))
        thread.start()
        with listener.accept(timeout=PATIENCE) as end:
            thread.join()
            end.send(b"x")
            assert made[0].recv(timeout=PATIENCE) == b"x"
            made[0].close()


# --- how much, how often -------------------------------------------------------------------------


@pytest.mark.proof
def test_a_gibibyte_through_a_mebibyte(forked):
    """By hash, in messages of all sizes."""
    total = 1 << 30 if WHOLE else 64 << 20
    left, right = channel(1 << 20)
    block = os.urandom(4 << 20)

    def pieces():
        order, left_to_do = random.Random(7), total
        while left_to_do:
            size = min(left_to_do, int(order.paretovariate(0.5)) * 64 % len(block))
            start = order.randrange(len(block) - size + 1)
            yield memoryview(block)[start : start + size]
            left_to_do -= size

    def child(ready):
        with right.claim():
            digest, came = hashlib.blake2b(), 0
            for message in right:
                digest.update(message)
                came += len(message)
            right.send(digest.digest() + b"%d" % came)

    process = forked(child)
    with left.claim():
        digest, sent = hashlib.blake2b(), 0
        for piece in pieces():
            left.send(piece, timeout=PATIENCE)
            digest.update(piece)
            sent += len(piece)
        left.close_write()
        assert left.recv(timeout=PATIENCE) == digest.digest() + b"%d" % total
    assert process.wait() == 0
    print(f"{sent} bytes through a channel of {1 << 20} bytes, the same by hash")


def memory_in_use():
    """KiB that this process has of its own, and that is shared."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))


def use_and_drop(number, listener):
    if number % 10:
        left, right = channel(4096)
    else:
        made = []
        thread = threading.Thread(target=lambda: made.append(connect(listener.path)))
        thread.start()
        left = listener.accept(timeout=PATIENCE)
        thread.join()
        (right,) = made
    left.send(b"%d" % number)
    assert right.recv(timeout=PATIENCE) == b"%d" % number
    right.send(bytes(3000))
    select.select([left.fileno()], [], [], PATIENCE)
    assert left.recv(timeout=PATIENCE) == bytes(3000)
    if number % 2:
        left.close()
        right.close()


@pytest.mark.proof
def test_many_channels_leave_nothing(path):
    count = 10_000 if WHOLE else 500
    with Listener(path, capacity=4096) as listener:
        for number in range(100):
            use_and_drop(number, listener)
        gc.collect()
        before = open_descriptors(), os.listdir("/dev/shm"), memory_in_use()
        for number in range(count):
            use_and_drop(number, listener)
        gc.collect()
        after = open_descriptors(), os.listdir("/dev/shm"), memory_in_use()
    assert after[:2] == before[:2]
    assert after[2] - before[2] < 1000
    print(f"{count} channels: {len(after[0])} descriptors as before, {after[2] - before[2]} KiB more memory")


def test_elsewhere_it_cant_be_pickled(ends):
    with pytest.raises(TypeError, match="channel of 8192 bytes can be pickled only for a process"):
        pickle.dumps(ends[0])


def test_the_example_runs():
    example = Path(__file__).parent.parent / "examples" / "channel_worker.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.endswith("the first worker did [0, 1, 4], the second [9, 16, 25]\n"), done.stderr
