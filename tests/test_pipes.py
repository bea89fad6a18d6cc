import asyncio
import ctypes
import errno
import fcntl
import itertools
import os
import pickle
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import PATIENCE, eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from procfs import asleep, wakeups

from ipckit import Closed, Corrupt, PeerDied, pipes

PROOF = os.environ.get("IPCKIT_PROOF") == "1"
MIB = 1024 * 1024
CHUNK = 4096
PAYLOAD = CHUNK - 24


@pytest.fixture
def pipe():
    reader, writer = pipes.pipe()
    with reader, writer:
        yield reader, writer


@pytest.fixture
def ends():
    left, right = pipes.duplex(max_message=16 * MIB)
    with left, right:
        yield left, right


@pytest.fixture
def small_ends():
    left, right = pipes.duplex(capacity=4096, max_message=100_000)
    with left, right:
        yield left, right


def pattern(size, seed=0):
    return random.Random(seed).randbytes(size)


def sender(ready, writer, messages):
    writer.keep()
    ready()
    for message in messages:
        writer.send(message)


# --- messages


@pytest.mark.parametrize("size", [0, 1, 23, 24, 25, PAYLOAD - 1, PAYLOAD, PAYLOAD + 1, 2 * PAYLOAD, 65_536])
def test_a_message_arrives_whole(size):
    reader, writer = pipes.pipe(capacity=1 << 17)
    with reader, writer:
        message = pattern(size)
        writer.send(message)
        writer.send(b"next")
        assert reader.recv(timeout=PATIENCE) == message
        assert reader.recv(timeout=PATIENCE) == b"next"
        assert reader.stats().pending == 0


def test_any_buffer_can_be_sent(pipe):
    reader, writer = pipe
    for data in (bytearray(b"abc"), memoryview(b"xabcx")[1:4], (ctypes.c_char * 3)(*b"abc")):
        writer.send(data)
        assert reader.recv() == b"abc"
    big = bytearray(pattern(20_000))
    writer.send(big)
    big.append(1)  # not pinned any more
    assert reader.recv() == big[:-1]
    writer.send(memoryview(b""))
    assert reader.recv() == b""
    with pytest.raises(TypeError):
        writer.send("text")
    with pytest.raises(BufferError, match="data must be C-contiguous, and this memoryview is not"):
        writer.send(memoryview(b"abcd")[::2])


def test_a_buffer_is_free_again_after_an_error(pipe):
    _, writer = pipe
    data = bytearray(200_000)
    with pytest.raises(TimeoutError) as kept:
        writer.send(data, timeout=0)
    data.append(1)
    assert kept.value.errno == errno.ETIMEDOUT


def test_larger_than_the_pipe(pipe, forked):
    reader, writer = pipe
    messages = [pattern(3 * MIB, seed) for seed in range(3)]
    child = forked(sender, writer, messages)
    reader.keep()
    assert list(reader) == messages
    assert child.wait() == 0


@settings(max_examples=50)
@given(
    sizes=st.lists(st.one_of(st.integers(0, 100), st.integers(0, 20_000)), max_size=20),
    capacity=st.sampled_from([4096, 16_384, 65_536]),
    many=st.booleans(),
    limit=st.one_of(st.none(), st.integers(1, 8)),
)
def test_any_sizes_any_way(sizes, capacity, many, limit):
    messages = [pattern(size, i) for i, size in enumerate(sizes)]
    reader, writer = pipes.pipe(capacity=capacity)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            writer.keep()
            if many:
                code = writer.send_many(messages) != len(messages)
            else:
                sender(lambda: None, writer, messages)
                code = 0
        finally:
            os._exit(code)
    with reader.keep():
        got = []
        try:
            while True:
                got += reader.recv_many(limit) if many else [reader.recv()]
                assert limit is None or not many or len(got) <= len(messages)
        except PeerDied:
            raise
        except EOFError:
            pass
        assert got == messages
        stats = reader.stats()
        assert (stats.messages, stats.bytes, stats.torn) == (len(messages), sum(sizes), 0)
    assert os.waitpid(pid, 0)[1] == 0


def test_many_takes_what_is_there_and_no_more_than_max(pipe):
    reader, writer = pipe
    messages = [b"%03d" % i for i in range(200)]
    assert writer.send_many(messages) == 200
    assert reader.recv_many(3) == messages[:3]
    assert select.select([reader], [], [], 0)[0], "the rest is still in the pipe"
    assert reader.recv() == messages[3]
    assert reader.recv_many(1) == [messages[4]]
    assert reader.recv_many() == messages[5:]
    with pytest.raises(TimeoutError):
        reader.recv_many(timeout=0)
    with pytest.raises(ValueError, match="not 0"):
        reader.recv_many(0)
    assert writer.send_many([]) == 0


def test_many_mixes_small_and_large(pipe, forked):
    reader, writer = pipe
    messages = [pattern(size, size) for size in (5, 9000, 0, 70_000, 200_000, 4, 4072, 4073)]
    child = forked(lambda ready, out: out.send_many(messages), writer)
    reader.keep()
    got = []
    while len(got) < len(messages):
        got += reader.recv_many()
    assert got == messages
    assert child.wait() == 0


def test_many_says_how_many_went():
    reader, writer = pipes.pipe(capacity=4096)
    with reader, writer:
        sent = writer.send_many([bytes(1000)] * 10, timeout=0)
        assert 0 < sent < 10
        with pytest.raises(TimeoutError, match="send on descriptor"):
            writer.send_many([bytes(1000)], timeout=0)
        assert reader.recv_many() == [bytes(1000)] * sent


def test_recv_into_leaves_what_does_not_fit(pipe):
    reader, writer = pipe
    for message in (b"12345678", pattern(20_000)):
        writer.send(message)
        with pytest.raises(
            OSError, match=f"a message of {len(message)} bytes exceeds the buffer, 7 bytes"
        ) as caught:
            reader.recv_into(bytearray(7))
        assert caught.value.errno == errno.EMSGSIZE
        assert select.select([reader], [], [], 0)[0]
        target = bytearray(len(message) + 3)
        assert reader.recv_into(target) == len(message)
        assert target[:-3] == message
    with pytest.raises(TypeError, match="read-only bytes"):
        reader.recv_into(b"no")


def test_too_large_either_way():
    reader, writer = pipes.pipe(max_message=100)
    with reader, writer:
        for send in (writer.send, lambda data: writer.send_many([b"first", data])):
            with pytest.raises(
                OSError, match="a message of 101 bytes exceeds max_message, 100 bytes"
            ) as caught:
                send(bytes(101))
            assert caught.value.errno == errno.EMSGSIZE
        assert reader.stats().pending == 0, "nothing was sent"
        writer.max_message = 1 << 31
        writer.send(bytes(30_000))
        for _ in range(2):
            with pytest.raises(
                OSError, match="a message of 30000 bytes exceeds max_message, 100 bytes"
            ) as caught:
                reader.recv()
            assert caught.value.errno == errno.EMSGSIZE
        reader.max_message = 30_000
        assert reader.recv() == bytes(30_000)


def test_a_length_bomb_allocates_nothing(pipe):
    reader, writer = pipe
    writer.write(chunk(0xFFFFFFFF, 0, bytes(8)))
    before = Path("/proc/self/statm").read_text().split()[0]
    with pytest.raises(
        OSError, match="a message of 4294967295 bytes exceeds max_message, 16777216 bytes"
    ) as caught:
        reader.recv()
    assert caught.value.errno == errno.EMSGSIZE
    assert Path("/proc/self/statm").read_text().split()[0] == before


def chunk(total, offset, payload, lane=1, magic=0x6B69, length=None, pid=0):
    return (
        struct.pack(
            "=HHIIIII", magic, len(payload) if length is None else length, total, offset, pid, 0, lane
        )
        + payload
    )


@pytest.mark.parametrize(
    "garbage",
    [
        b"this is text and not a message at all",
        chunk(3, 0, b"abc", lane=9),
        chunk(8, 8, b"abc"),
        chunk(8, 6, b"abc"),
        chunk(8, 0, b""),
        chunk(8, 4, b"abc"),  # its beginning never came
        chunk(9000, 0, b"abc", length=5000),
        chunk(2, 0, b"abc"),
    ],
)
def test_garbage_is_corrupt(pipe, garbage):
    reader, writer = pipe
    writer.write(garbage)
    for receive in (reader.recv, reader.recv_many):  # nothing of it is used, so it stays
        with pytest.raises(Corrupt, match=f"descriptor {reader.fileno()}: .* {garbage[1:3].hex(' ')}"):
            receive(timeout=PATIENCE)


def test_a_lane_that_jumps_is_corrupt(pipe):
    reader, writer = pipe
    writer.write(chunk(10_000, 0, b"abc"))
    writer.write(chunk(10_000, 4, b"abc"))
    with pytest.raises(Corrupt):
        reader.recv(timeout=PATIENCE)
    writer.send(b"x")


# --- ends


def test_end_of_stream(pipe):
    reader, writer = pipe
    writer.send(b"last")
    writer.close()
    assert reader.recv() == b"last"
    for _ in range(2):
        with pytest.raises(EOFError, match=f"end of stream on descriptor {reader.fileno()}") as caught:
            reader.recv()
        assert type(caught.value) is EOFError
    assert list(reader) == []
    assert reader.read(10) == b""


def test_closed_is_closed(pipe):
    reader, writer = pipe
    reader.close()
    reader.close()
    writer.close()
    assert reader.closed
    assert writer.closed
    for call in (
        reader.recv,
        reader.recv_many,
        reader.fileno,
        lambda: reader.read(1),
        lambda: reader.recv_into(bytearray(1)),
    ):
        with pytest.raises(Closed, match="the reading end was closed"):
            call()
    for call in (
        lambda: writer.send(b"x"),
        lambda: writer.send(bytes(9000)),
        lambda: writer.send_many([b"x"]),
        writer.fileno,
        lambda: writer.write(b"x"),
    ):
        with pytest.raises(Closed, match="the writing end was closed"):
            call()
    assert (reader.stats().capacity, writer.stats().pending) == (0, 0)


def full(end):
    stats = end.stats()
    return stats.pending == stats.capacity


def test_a_writer_killed_in_the_middle_of_a_message(pipe, forked):
    reader, writer = pipe
    child = forked(sender, writer, [b"whole", bytes(MIB)])
    reader.keep()
    assert reader.recv() == b"whole"
    eventually(lambda: full(reader))
    child.kill()
    assert child.wait() == -signal.SIGKILL
    with pytest.raises(
        PeerDied, match=rf"descriptor {reader.fileno()}: its writer ended after 65152 of {MIB} bytes"
    ):
        reader.recv()
    assert reader.stats().torn == 1
    with pytest.raises(EOFError) as caught:
        reader.recv()
    assert type(caught.value) is EOFError


def test_the_dead_are_forgotten_while_others_live(pipe, forked):
    reader, writer = pipe
    child = forked(lambda ready, out: out.send(bytes(MIB)), writer)
    eventually(lambda: full(reader))
    child.kill()
    child.wait()
    with pytest.raises(TimeoutError, match=f"receive on descriptor {reader.fileno()}"):
        reader.recv(timeout=0)
    stats = reader.stats()
    assert (stats.torn, stats.messages) == (1, 0)
    writer.send(b"alive")
    assert reader.recv() == b"alive"


def test_a_living_sender_is_never_declared_dead(pipe, forked):
    reader, writer = pipe
    child = forked(lambda ready, out: out.send(bytes(MIB)), writer)
    eventually(lambda: full(reader))
    child.kill(signal.SIGSTOP)
    for _ in range(100):
        with pytest.raises(TimeoutError):
            reader.recv(timeout=0)
        assert reader.stats().torn == 0
    child.kill(signal.SIGCONT)
    assert reader.recv() == bytes(MIB)
    assert child.wait() == 0


def test_a_sender_that_can_not_be_is_not_dead(pipe):
    reader, writer = pipe
    here = os.stat("/proc/self/ns/pid").st_ino
    for pid in (0, 0xFFFFFFFF, os.getpid()):
        writer.write(struct.pack("=HHIIIII", 0x6B69, 1, 9000, 0, pid, here, 7) + b"x")
        with pytest.raises(TimeoutError):
            reader.recv(timeout=0)
        assert reader.stats().torn == 0


def test_half_a_chunk_at_the_end(pipe):
    reader, writer = pipe
    writer.write(chunk(100, 0, b"", lane=0, length=100)[:20])
    writer.close()
    with pytest.raises(PeerDied, match="after 20 of 24 bytes"):
        reader.recv()
    with pytest.raises(EOFError):
        reader.recv()


@pytest.mark.parametrize("disposition", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_broken_pipe_is_an_error_whatever_sigpipe_is(pipe, disposition, tmp_path):
    reader, writer = pipe
    reader.close()
    former = signal.signal(signal.SIGPIPE, disposition)
    try:
        calls = [
            lambda: writer.send(b"x"),
            lambda: writer.send(bytes(9000)),
            lambda: writer.send_many([b"x", b"y"]),
            lambda: writer.write(b"x"),
        ]
        for call in calls:
            with pytest.raises(BrokenPipeError, match=f"on descriptor {writer.fileno()}") as caught:
                call()
            assert caught.value.errno == errno.EPIPE
        with open(tmp_path / "file", "w+b") as file:
            file.write(b"abc")
            file.flush()
            with pytest.raises(BrokenPipeError, match="splice from descriptor"):
                pipes.splice(file, writer, 3, source_offset=0)
        assert signal.sigpending() == set()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    finally:
        signal.signal(signal.SIGPIPE, former)


def test_a_sigpipe_that_was_pending_stays(pipe):
    reader, writer = pipe
    reader.close()
    former = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPIPE])
    try:
        signal.raise_signal(signal.SIGPIPE)
        with pytest.raises(BrokenPipeError):
            writer.send(b"x")
        assert signal.sigpending() == {signal.SIGPIPE}
    finally:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # drops it
        signal.signal(signal.SIGPIPE, former)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPIPE])


def test_not_a_pipe(tmp_path):
    with open(tmp_path / "file", "w") as file:
        for kind in (pipes.Reader, pipes.Writer, lambda fd: pipes.Duplex(fd, fd)):
            with pytest.raises(OSError, match=f"descriptor {file.fileno()} is not a pipe") as caught:
                kind(file.fileno())
            assert caught.value.errno == errno.EBADF
        assert file.write("still open") == 10


# --- time-outs and signals


def test_a_timeout_while_receiving_loses_nothing(pipe):
    reader, writer = pipe
    message = pattern(50_000)
    blocks = [chunk(len(message), i, message[i : i + PAYLOAD]) for i in range(0, len(message), PAYLOAD)]
    framed = b"".join(blocks[:5]) + chunk(5, 0, b"other", lane=0) + b"".join(blocks[5:])
    got = []
    for start in range(0, len(framed), 777):
        writer.write(framed[start : start + 777])
        try:
            got.append(reader.recv(timeout=0))
        except TimeoutError:
            continue
    assert got == [b"other", message]
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=f"receive on descriptor {reader.fileno()}") as caught:
        reader.recv(timeout=0.05)
    assert time.monotonic() - start >= 0.05
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_timeout_while_sending_gives_the_message_up(pipe):
    reader, writer = pipe
    for i in range(3):
        with pytest.raises(TimeoutError, match=f"send on descriptor {writer.fileno()}") as caught:
            writer.send(bytes([i]) * 200_000, timeout=0.01)
        assert caught.value.errno == errno.ETIMEDOUT
        with pytest.raises(TimeoutError):
            reader.recv(timeout=0)
        writer.send(b"after")
        assert reader.recv() == b"after"
    writer.send(pattern(60_000))
    assert reader.recv() == pattern(60_000)
    assert reader.stats().torn == 3
    with pytest.raises(ValueError, match="-1"):
        writer.send(b"x", timeout=-1)


def test_a_blocked_receiver_sleeps(pipe):
    reader, writer = pipe
    writer.send(b"x")
    reader.recv()
    start, before = time.monotonic(), wakeups(os.getpid())
    with pytest.raises(TimeoutError):
        reader.recv(timeout=0.2)
    assert wakeups(os.getpid()) - before <= 10 + (time.monotonic() - start) / 0.1


def test_signals_in_the_middle_lose_nothing(pipe, forked):
    reader, writer = pipe
    seen = []
    former = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))

    def storm(ready, pid):
        writer.close()
        reader.close()
        ready()
        while True:
            os.kill(pid, signal.SIGUSR1)
            time.sleep(0.0005)

    try:
        stormer = forked(storm, os.getpid())
        stormer.wait_ready()
        messages = [pattern(size, size) for size in (10, 300_000, 5000, 0, 700_000)]
        child = forked(sender, writer, itertools.cycle(messages))
        reader.keep()
        child.wait_ready()
        seen.clear()
        while len(seen) <= 5:
            assert [reader.recv() for _ in messages] == messages
        child.kill()
        child.wait()
    finally:
        stormer.kill()
        stormer.wait()
        signal.signal(signal.SIGUSR1, former)


def test_a_handler_that_raises_ends_the_send(pipe):
    reader, writer = pipe

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    former = signal.signal(signal.SIGUSR1, stop)

    def interrupt():
        eventually(lambda: full(writer) and asleep(os.getpid()))
        os.kill(os.getpid(), signal.SIGUSR1)

    interrupter = threading.Thread(target=interrupt)
    try:
        interrupter.start()
        with pytest.raises(Stop):
            writer.send(bytes(MIB))
        with pytest.raises(TimeoutError):
            reader.recv(timeout=0)
        writer.send(b"after")
        assert reader.recv() == b"after"
    finally:
        interrupter.join()
        signal.signal(signal.SIGUSR1, former)


# --- many writers


def numbered(worker, number):
    """A small or a large message that says who sent it, which it is, and how it ends."""
    size = 200 * 1024 if number % 5 == 0 else 20 + number % 3000
    return struct.pack("=III", worker, number, size) + bytes([number % 251]) * (size - 12)


def check_numbered(message, last):
    worker, number, size = struct.unpack_from("=III", message)
    assert message == numbered(worker, number), "torn"
    assert len(message) == size
    assert number > last.get(worker, -1), "out of order"
    last[worker] = number


def flood(ready, writer, worker):
    ready()
    for number in range(1_000_000_000):
        writer.send(numbered(worker, number))


@pytest.mark.proof
@pytest.mark.parametrize("capacity", [4096, 65_536])
def test_eight_writers_killed_at_random(forked, capacity):
    reader, writer = pipes.pipe(capacity=capacity)
    chance = random.Random(capacity)
    last: dict[int, int] = {}
    with reader, writer:
        workers = {i: forked(flood, writer, i) for i in range(8)}
        for child in workers.values():
            child.wait_ready()
        for kill in range(400 if PROOF else 24):
            for _ in range(chance.randrange(1, 40)):
                check_numbered(reader.recv(timeout=PATIENCE), last)
            victim = workers.pop(chance.choice([*workers]))
            victim.kill()
            assert victim.wait() == -signal.SIGKILL
            workers[8 + kill] = forked(flood, writer, 8 + kill)
        kills = 400 if PROOF else 24
        for child in workers.values():
            child.kill()
            child.wait()
        writer.close()
        try:
            for message in reader:
                check_numbered(message, last)
        except PeerDied:
            pass
        stats = reader.stats()
        assert 1 <= stats.torn <= kills + 8
        assert len(last) >= 8


def test_threads_of_one_process_send_and_receive(pipe):
    reader, writer = pipe
    got = []

    def receive():
        while (message := reader.recv(timeout=PATIENCE)) != b"stop":
            got.append(message)

    def send(worker):
        for number in range(60):
            writer.send(numbered(worker, number))

    receivers = [threading.Thread(target=receive) for _ in range(2)]
    senders = [threading.Thread(target=send, args=(i,)) for i in range(4)]
    for thread in receivers + senders:
        thread.start()
    for thread in senders:
        thread.join()
    for _ in receivers:
        writer.send(b"stop")
    for thread in receivers:
        thread.join()
    assert sorted(got) == sorted(numbered(i, n) for i in range(4) for n in range(60))
    assert reader.stats().torn == 0


def test_waiting_for_ones_turn_is_bounded(pipe):
    reader, writer = pipe
    other = threading.Thread(target=reader.recv)
    other.start()
    eventually(reader._lock.locked)
    with pytest.raises(TimeoutError, match="receive on descriptor"):
        reader.recv(timeout=0.01)
    writer.send(b"x")
    other.join()


def test_a_fork_while_a_thread_receives():
    code = """if True:
        import os, threading, warnings
        from ipckit import pipes
        warnings.simplefilter("ignore")
        reader, writer = pipes.pipe()
        threading.Thread(target=reader.recv, daemon=True).start()
        while not reader._lock.locked():
            pass
        pid = os.fork()
        if pid == 0:
            try:
                reader.recv(timeout=0)
            except TimeoutError as error:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        writer.send(b"end")
    """
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE).returncode == 0


# --- duplex


def both_at_once(ready, end, how):
    end.keep()
    ready()
    mine, theirs = bytes([1]) * (16 * MIB), bytes([2]) * (16 * MIB)
    if how == "exchange":
        assert end.exchange(mine, timeout=PATIENCE) == theirs
    else:
        end.send(mine, timeout=PATIENCE)
        assert end.recv(timeout=PATIENCE) == theirs


@pytest.mark.parametrize("how", ["exchange", "send"])
def test_16_mib_both_ways_at_once(ends, forked, how):
    parent, child = ends
    other = forked(both_at_once, child, how)
    parent.keep()
    other.wait_ready()
    mine, theirs = bytes([2]) * (16 * MIB), bytes([1]) * (16 * MIB)
    if how == "exchange":
        assert parent.exchange(mine, timeout=PATIENCE) == theirs
    else:
        parent.send(mine, timeout=PATIENCE)
        assert parent.recv(timeout=PATIENCE) == theirs
    assert other.wait() == 0


def echo(ready, end):
    with end.keep():
        ready()
        for message in end:
            end.send(message)


@pytest.mark.parametrize("which", ["ends", "small_ends"])
def test_an_echo(which, forked, request):
    parent, child = request.getfixturevalue(which)
    other = forked(echo, child)
    parent.keep()
    for size in (0, 1, 5000, 90_000):
        parent.send(pattern(size))
        assert parent.recv() == pattern(size)
    assert parent.stats().sent.messages == parent.stats().received.messages == 4
    parent.close_write()
    with pytest.raises(EOFError):
        parent.recv()
    assert other.wait() == 0


def test_half_close(ends):
    left, right = ends
    left.send(b"last")
    left.close_write()
    assert not left.closed
    with pytest.raises(Closed, match="the writing end was closed"):
        left.send(b"x")
    assert [*right] == [b"last"]
    right.send(b"still")
    assert left.recv() == b"still"
    assert left.stats().sent.capacity == 0
    left.close()
    assert left.closed
    with pytest.raises(BrokenPipeError):
        right.send(b"x")


def flood_small(ready, end):
    end.keep()
    ready()
    for i in range(5000):
        end.send(b"%d" % i)
    end.send(b"end")
    assert end.recv() == bytes(50_000)


def test_what_a_send_took_in_is_received_in_order_and_seen_by_select(small_ends, forked):
    parent, child = small_ends
    parent.max_message = child.max_message = MIB
    poller = select.epoll()
    poller.register(parent.fileno(), select.EPOLLIN)
    other = forked(flood_small, child)
    other.wait_ready()
    parent.send(bytes(50_000))  # the child receives only after all its own are sent
    kept = parent.stats().inbox
    assert kept > 0
    assert poller.poll(0), "messages wait in the inbox"
    with pytest.raises(ValueError, match=f"{kept} received messages would stay behind"):
        pickle.dumps(parent)
    with pytest.raises(OSError, match="a message of 1 bytes exceeds the buffer, 0 bytes"):
        parent.recv_into(bytearray())
    got = [parent.recv(), *parent.recv_many(10)]
    while got[-1] != b"end":
        assert poller.poll(PATIENCE)
        got += parent.recv_many()
    assert got[:-1] == [b"%d" % i for i in range(5000)]
    assert other.wait() == 0
    child.close()
    assert parent.stats().inbox == 0
    assert poller.poll(PATIENCE), "end of stream"
    with pytest.raises(EOFError):
        parent.recv()
    poller.close()


def test_what_came_between_the_chunks_is_seen_by_select(ends):
    left, right = ends
    poller = select.poll()
    poller.register(right.fileno(), select.POLLIN)
    message = pattern(10_000)
    blocks = [chunk(10_000, i, message[i : i + PAYLOAD]) for i in range(0, 10_000, PAYLOAD)]
    others = b"".join(chunk(2, 0, b"%02d" % i, lane=0) for i in range(50))
    left.write(blocks[0] + others + b"".join(blocks[1:]))
    assert right.recv() == b"00"
    for i in range(1, 50):
        assert poller.poll(0), "it may be here, no longer in the pipe"
        assert right.recv() == b"%02d" % i
    assert poller.poll(0)
    assert right.recv() == message
    assert not poller.poll(0)


def test_the_inbox_is_bounded(forked):
    parent, child = pipes.duplex(max_message=100_000, max_inbox=100_000)

    def flood_for_ever(ready, end):
        end.keep()
        ready()
        while True:
            end.send(bytes(1000))

    with parent, child:
        other = forked(flood_for_ever, child)
        other.wait_ready()

        def tried_to_send():
            with pytest.raises(TimeoutError, match="send on descriptor"):
                while True:  # some go into the inbox of the other
                    parent.send(bytes(100_000), timeout=0.05)
            return parent.stats().inbox

        eventually(lambda: tried_to_send() >= 90)
        assert tried_to_send() <= 100
        other.kill()
        other.wait()


def many_megabytes(ready, end, count):
    """Send *count* messages of 1 MiB before receiving any."""
    end.keep()
    ready()
    for number in range(count):
        end.send(bytes([number]) * MIB)
    for number in range(count):
        assert end.recv() == bytes([number]) * MIB


def test_64_plain_sends_of_1_mib_from_both_sides_at_once(ends, forked):
    parent, child = ends
    other = forked(many_megabytes, child, 64)
    many_megabytes(other.wait_ready, parent, 64)
    assert other.wait() == 0


def test_bad_limits(ends):
    for limit in (-1, 1 << 32):
        with pytest.raises(ValueError, match=f"max_message must be an integer from 0 to .* not {limit}"):
            pipes.pipe(max_message=limit)
    with pytest.raises(ValueError, match="max_inbox must be an integer from 0 to .*, not -1"):
        pipes.duplex(max_inbox=-1)


def test_a_send_to_a_dead_peer_that_had_sent(ends, forked):
    parent, child = ends
    other = forked(lambda ready, end: (end.keep().send(b"before"), ready()), child)
    other.wait_ready()
    other.wait()
    parent.keep()
    with pytest.raises(BrokenPipeError):
        parent.send(bytes(MIB))
    assert parent.recv() == b"before"
    with pytest.raises(EOFError):
        parent.recv()


# --- handles


def test_keep_closes_the_other_end_only(pipe):
    reader, writer = pipe
    assert reader.keep() is reader
    assert writer.closed
    assert not reader.closed
    with pytest.raises(EOFError):
        reader.recv()
    lone, _ = pipes.pipe()
    lone.keep()
    lone.close()


def test_descriptors_are_closed_with_the_last_reference():
    for _ in range(3):
        pipes.pipe()
        pipes.duplex()[0].fileno()


CHILD = """
import multiprocessing, os, sys
from ipckit import pipes

def work(reader, writer, end):
    assert reader.recv() == b"to the child"
    writer.send(bytes(100_000))
    end.send(end.recv() * 2)
    assert not os.get_inheritable(end.fileno())

if __name__ == "__main__":
    (reader, out), (back, writer) = pipes.pipe(), pipes.pipe()
    mine, theirs = pipes.duplex(max_message=77)
    context = multiprocessing.get_context(sys.argv[1])
    child = context.Process(target=work, args=(reader, writer, theirs))
    child.start()
    for end in (out, back, mine):
        end.keep()
    out.send(b"to the child")
    assert back.recv() == bytes(100_000)
    assert mine.exchange(b"ab") == b"abab"
    child.join()
    assert child.exitcode == 0
"""


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_handles_pickle_to_children_of_multiprocessing(method, tmp_path):
    (tmp_path / "program.py").write_text(CHILD)
    script = [sys.executable, tmp_path / "program.py", method]
    assert subprocess.run(script, timeout=PATIENCE, stdin=subprocess.DEVNULL).returncode == 0


def test_no_pickle_in_the_middle_of_a_message(pipe):
    reader, writer = pipe
    writer.write(chunk(10_000, 0, b"abc")[:12])
    with pytest.raises(TimeoutError):
        reader.recv(timeout=0)
    with pytest.raises(ValueError, match=f"descriptor {reader.fileno()} can't be handed over in the middle"):
        pickle.dumps(reader)


def test_the_receiver_may_change_between_messages(pipe, forked):
    reader, writer = pipe
    writer.send_many([b"1", pattern(9000), b"3"])
    assert reader.recv() == b"1"

    def take(ready, end):
        assert end.recv() == pattern(9000)

    assert forked(take, reader).wait() == 0
    assert reader.recv() == b"3"


def test_capacity(pipe):
    assert pipe[0].stats().capacity == fcntl.fcntl(pipe[0].fileno(), fcntl.F_GETPIPE_SZ)
    reader, writer = pipes.pipe(capacity=5000)
    with reader, writer:
        assert reader.stats().capacity == writer.stats().capacity == 8192
    with pytest.raises(OSError, match=f"a pipe of {1 << 30} bytes") as caught:
        pipes.duplex(capacity=1 << 30)
    assert caught.value.errno in (errno.EPERM, errno.ENOMEM)  # the latter for root
    for wrong in (0, 1 << 31):
        with pytest.raises(ValueError, match=f"capacity must be .* not {wrong}"):
            pipes.pipe(capacity=wrong)
    for wrong in (-1, 1 << 32):
        with pytest.raises(ValueError, match=f"max_message must be .* not {wrong}"):
            pipes.pipe(max_message=wrong)


def test_raw_bytes(pipe):
    reader, writer = pipe
    assert writer.write(b"hello ") + writer.write(bytearray(b"world")) == 11
    assert reader.read(100) == b"hello world"
    with pytest.raises(TimeoutError, match=f"read on descriptor {reader.fileno()}"):
        reader.read(1, timeout=0.01)
    while writer.stats().pending < writer.stats().capacity:
        writer.write(bytes(4096))
    with pytest.raises(TimeoutError, match=f"write on descriptor {writer.fileno()}"):
        writer.write(b"x", timeout=0.01)


# --- asyncio and select


def test_asyncio(ends):
    left, right = ends

    async def collect(count):
        return [await left.arecv() for _ in range(count)]

    async def both(end, message):
        await end.asend(message)
        return await end.arecv()

    async def main():
        big = pattern(3 * MIB)
        with pytest.raises(TimeoutError):
            await left.arecv(timeout=0.01)
        received = asyncio.ensure_future(collect(3))
        await asyncio.gather(right.asend(big), right.asend(b"small"), right.asend(big))
        assert sorted(await received, key=len) == [b"small", big, big]
        assert await asyncio.gather(both(left, big), both(right, big)) == [big, big]
        right.close_write()
        assert [message async for message in left] == []
        with pytest.raises(TimeoutError):
            await left.asend(bytes(5 * MIB), timeout=0.05)

    asyncio.run(main())


def test_asyncio_over_one_pipe(pipe, forked):
    reader, writer = pipe
    messages = [pattern(size, size) for size in (10, 500_000, 0, 3000)]

    def child(ready, end):
        async def send_all():
            for message in messages:
                await end.keep().asend(message)

        asyncio.run(send_all())

    other = forked(child, writer)
    reader.keep()

    async def receive_all():
        return [message async for message in reader]

    assert asyncio.run(receive_all()) == messages
    assert other.wait() == 0


def test_a_cancelled_send_was_not_sent(pipe):
    reader, writer = pipe

    async def main():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(writer.asend(bytes(MIB)), 0.05)

    asyncio.run(main())
    with pytest.raises(TimeoutError):
        reader.recv(timeout=0)
    writer.send(b"after")
    assert reader.recv() == b"after"


def test_select(pipe):
    reader, writer = pipe
    assert select.select([reader], [writer], [], 0) == ([], [writer], [])
    writer.send(b"x")
    assert select.select([reader], [], [], PATIENCE)[0] == [reader]
    reader.recv()
    assert select.select([reader], [], [], 0)[0] == []
    writer.close()
    assert select.select([reader], [], [], PATIENCE)[0] == [reader]


# --- splice and tee


def test_splice_to_a_file_and_tee(pipe, tmp_path):
    reader, writer = pipe
    copy, into = pipes.pipe()
    with copy, into, open(tmp_path / "file", "w+b", buffering=0) as file:
        writer.write(b"0123456789")
        assert pipes.tee(reader, into, 100) == 10
        assert copy.read(100) == b"0123456789"
        assert pipes.splice(reader, file, 6) == 6
        assert pipes.splice(reader, file, 100, target_offset=1) == 4
        file.seek(0)
        assert file.read() == b"067895"
        assert pipes.splice(file, writer, 3, source_offset=2) == 3
        assert reader.read(100) == b"789"
        writer.close()
        assert pipes.splice(reader, file, 1) == 0


def test_splice_errors(pipe, tmp_path):
    reader, writer = pipe
    with open(tmp_path / "file", "w+b") as file:
        with pytest.raises(
            OSError, match=f"splice from descriptor {file.fileno()} to {file.fileno()}"
        ) as caught:
            pipes.splice(file, file, 1)
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(OSError, match=f"tee from descriptor {file.fileno()}") as caught:
            pipes.tee(file, writer, 1)
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(ValueError, match="target_offset must be an integer from 0 to .*, not -1"):
            pipes.splice(reader, file, 1, target_offset=-1)
        with pytest.raises(TimeoutError, match="splice from descriptor"):
            pipes.splice(reader, file, 1, timeout=0.01)


def test_splice_between_the_ends_of_a_duplex(ends, pipe):
    left, right = ends
    left.send(pattern(5000))
    assert pipes.splice(right, pipe[1], 65_536) == 5048
    assert pipe[0].recv() == pattern(5000)


def test_the_example():
    example = Path(__file__).parent.parent / "examples" / "pipe_workers.py"
    run = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=PATIENCE)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines()[-2:] == ["worker 3 did job 2", "12 reports, 0 torn"]
