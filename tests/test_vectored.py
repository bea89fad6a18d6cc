import array
import errno
import os
import signal
import socket
import time

import numpy as np
import pytest
from conftest import PATIENCE, eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from procfs import asleep

import ipckit


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    ends = {reader, writer}
    yield reader, writer, ends
    for end in ends:
        os.close(end)


def feed(ready, writer, blocks):
    """A child that writes *blocks*, each by a write of its own."""
    ready()
    for block in blocks:
        os.write(writer, block)


def drain(ready, reader, writer, size, pause=0.0):
    """A child that reads *size* bytes and exits with 0 if they count up from 0 modulo 251."""
    os.close(writer)
    ready()
    got = bytearray()
    while len(got) < size:
        time.sleep(pause)
        block = os.read(reader, 7000)
        if not block:
            break
        got += block
    assert bytes(got) == counting(size)


def counting(size):
    return bytes(i % 251 for i in range(251)) * (size // 251) + bytes(range(size % 251))


def test_one_call_moves_what_fits(pipe):
    reader, writer, _ = pipe
    assert ipckit.writev(writer, [b"abc", bytearray(b"de"), memoryview(b"f")]) == 6
    first, second = bytearray(2), bytearray(10)
    assert ipckit.readv(reader, [first, second]) == 6
    assert (bytes(first), bytes(second[:4])) == (b"ab", b"cdef")


def test_any_buffer_without_a_copy(pipe):
    reader, writer, _ = pipe
    source = [np.arange(6, dtype=np.int32).reshape(2, 3), array.array("d", [1.5]), memoryview(b"xyz")[1:]]
    assert ipckit.writev_all(writer, source) == 24 + 8 + 2
    target = np.zeros((2, 3), dtype=np.int32)
    number = array.array("d", [0])
    tail = bytearray(2)
    assert ipckit.readv_exact(reader, [target, memoryview(number), tail]) == 34
    assert (target == source[0]).all()
    assert number[0] == 1.5
    assert tail == b"yz"


def test_an_object_with_fileno_will_do():
    left, right = socket.socketpair()
    with left, right:
        assert ipckit.writev_all(left, [b"hello"]) == 5
        got = bytearray(5)
        assert ipckit.readv_exact(right, [got]) == 5
        assert got == b"hello"


@pytest.mark.parametrize("call", [ipckit.readv, ipckit.readv_exact])
def test_a_read_only_target_is_a_type_error(pipe, call):
    reader, writer, _ = pipe
    os.write(writer, b"kept")
    with pytest.raises(TypeError, match="read-only bytes"):
        call(reader, [bytearray(1), b"no"])
    assert os.read(reader, 10) == b"kept"


def test_not_a_buffer_and_not_contiguous(pipe):
    _, writer, _ = pipe
    with pytest.raises(TypeError):
        ipckit.writev(writer, ["text"])
    with pytest.raises(BufferError, match="buffers must be C-contiguous"):
        ipckit.writev(writer, [np.zeros((4, 4))[:, 1]])


def test_no_buffers_and_empty_buffers(pipe):
    reader, writer, ends = pipe
    assert ipckit.writev(writer, []) == 0
    assert ipckit.writev_all(writer, []) == 0
    assert ipckit.writev_all(writer, [b"", b""]) == 0
    assert ipckit.writev_all(writer, [memoryview(b"")] * 2000 + [b"x"]) == 1
    assert ipckit.readv_exact(reader, []) == 0
    assert ipckit.readv_exact(reader, [bytearray()]) == 0
    got = bytearray(1)
    assert ipckit.readv_exact(reader, [bytearray()] * 2000 + [got] + [bytearray()] * 2000) == 1
    assert got == b"x"
    os.close(writer)
    ends.remove(writer)
    assert ipckit.readv_exact(reader, [bytearray()]) == 0, "nothing wanted, so no end of file either"


def test_three_thousand_buffers_either_way(pipe, forked):
    reader, writer, ends = pipe
    size = 3000 * 100
    child = forked(drain, reader, writer, size)
    child.wait_ready()
    data = memoryview(counting(size))  # memoryviews take one address each: beyond IOV_MAX
    assert ipckit.writev_all(writer, [data[i : i + 100] for i in range(0, size, 100)]) == size
    os.close(writer)
    ends.remove(writer)
    assert child.wait() == 0


def test_reading_three_thousand_buffers_from_small_writes(pipe, forked):
    reader, writer, _ = pipe
    data = counting(30_000)
    child = forked(feed, writer, [data[i : i + 77] for i in range(0, len(data), 77)])
    buffers = [bytearray(10) for _ in range(3000)]
    assert ipckit.readv_exact(reader, buffers) == 30_000
    assert b"".join(buffers) == data
    assert child.wait() == 0


def test_partial_writes_go_on_where_they_stopped(pipe, forked):
    reader, writer, _ = pipe
    os.set_blocking(writer, False)  # each write is cut at what the pipe has room for
    size = 500_000
    child = forked(drain, reader, writer, size)
    data = memoryview(counting(size))
    assert ipckit.writev_all(writer, [data[:1], data[1:300_000], data[300_000:]], timeout=PATIENCE) == size
    assert child.wait() == 0


def test_signals_in_the_middle_lose_nothing(pipe, forked):
    reader, writer, _ = pipe
    seen = []
    former = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))

    def storm(ready, pid):
        ready()
        for _ in range(300):
            os.kill(pid, signal.SIGUSR1)
            time.sleep(0.0005)

    try:
        size = 400_000
        child = forked(drain, reader, writer, size, 0.002)
        stormer = forked(storm, os.getpid())
        stormer.wait_ready()
        data = memoryview(counting(size))
        views = [data[i : i + 1000] for i in range(0, size, 1000)]
        assert ipckit.writev_all(writer, views) == size
        assert child.wait() == 0
        assert stormer.wait() == 0
        assert seen
    finally:
        signal.signal(signal.SIGUSR1, former)


def test_end_of_file_in_the_middle_says_how_much_came(pipe):
    reader, writer, ends = pipe
    os.write(writer, b"1234567")
    os.close(writer)
    ends.remove(writer)
    with pytest.raises(EOFError, match="after 7 of 10 bytes"):
        ipckit.readv_exact(reader, [bytearray(5), bytearray(5)])
    assert ipckit.readv(reader, [bytearray(1)]) == 0


def test_a_broken_pipe_says_how_much_went(pipe):
    reader, writer, ends = pipe
    os.close(reader)
    ends.remove(reader)
    with pytest.raises(BrokenPipeError, match="writev_all on descriptor .* after 0 of 3 bytes") as caught:
        ipckit.writev_all(writer, [b"abc"])
    assert caught.value.errno == errno.EPIPE


def test_timeout_bounds_the_whole_and_says_how_much_moved(pipe):
    reader, writer, _ = pipe
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    os.write(writer, b"ab")
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="after 2 of 3 bytes") as caught:
        ipckit.readv_exact(reader, [bytearray(3)], timeout=0.05)
    assert time.monotonic() - start >= 0.05
    assert caught.value.errno == errno.ETIMEDOUT
    with pytest.raises(TimeoutError, match=r"after \d+ of 1000000 bytes"):
        ipckit.writev_all(writer, [bytes(1_000_000)], timeout=0)


def test_a_timeout_on_a_blocking_descriptor_is_refused(pipe):
    reader, _, _ = pipe
    with pytest.raises(ValueError, match=f"{reader} is a blocking one"):
        ipckit.readv_exact(reader, [bytearray(1)], timeout=1)


def test_a_nonblocking_descriptor_without_data(pipe):
    reader, _, _ = pipe
    os.set_blocking(reader, False)
    with pytest.raises(BlockingIOError, match=f"readv on descriptor {reader}") as caught:
        ipckit.readv(reader, [bytearray(1)])
    assert caught.value.errno == errno.EAGAIN


def test_a_closed_descriptor(pipe):
    spare = os.dup(pipe[0])
    os.close(spare)
    for call in (ipckit.readv, ipckit.readv_exact, ipckit.writev, ipckit.writev_all):
        with pytest.raises(OSError, match=f"descriptor {spare}") as caught:
            call(spare, [bytearray(1)])
        assert caught.value.errno == errno.EBADF


def test_at_an_offset(tmp_path):
    path = tmp_path / "file"
    with open(path, "w+b", buffering=0) as file:
        assert ipckit.pwritev(file, [b"abc", b"def"], 10) == 6
        assert os.fstat(file.fileno()).st_size == 16
        first, second = bytearray(2), bytearray(9)
        assert ipckit.preadv(file, [first, second], 11) == 5
        assert (bytes(first), bytes(second[:3])) == (b"bc", b"def")
        assert file.tell() == 0, "the file's own position stays"
        assert ipckit.pwritev(file, [b"!"], 16, os.RWF_DSYNC) == 1


def test_bad_offsets_and_flags(pipe, tmp_path):
    reader, writer, _ = pipe
    with pytest.raises(ValueError, match="offset must be an integer from 0 to .*, not -1"):
        ipckit.preadv(reader, [bytearray(1)], -1)
    with pytest.raises(ValueError, match="-5"):
        ipckit.pwritev(writer, [b"x"], -5)
    with pytest.raises(OSError, match="preadv on descriptor") as caught:
        ipckit.preadv(reader, [bytearray(1)], 0)
    assert caught.value.errno == errno.ESPIPE
    with open(tmp_path / "file", "w+b") as file, pytest.raises(OSError) as caught:
        ipckit.pwritev(file, [b"x"], 0, 1 << 30)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_a_buffer_in_use_can_not_be_resized(pipe, forked):
    reader, writer, _ = pipe
    target = bytearray(10)

    def grow(*_):
        with pytest.raises(BufferError):
            target.append(1)
        os.write(writer, b"0123456789")

    def poke(ready, pid):
        ready()
        eventually(lambda: asleep(pid, within="pipe_read"))
        os.kill(pid, signal.SIGUSR1)

    former = signal.signal(signal.SIGUSR1, grow)
    try:
        child = forked(poke, os.getpid())
        assert ipckit.readv_exact(reader, [target]) == 10
        assert target == b"0123456789"
        assert child.wait() == 0
        target.append(1)
    finally:
        signal.signal(signal.SIGUSR1, former)


@settings(max_examples=60)
@given(
    out=st.lists(st.binary(max_size=5000), max_size=40),
    cuts=st.lists(st.integers(min_value=0, max_value=3000), max_size=40),
)
def test_any_split_of_the_buffers_carries_the_same_bytes(out, cuts):
    data = b"".join(out)
    sizes = [*cuts, 0]
    while sum(sizes) > len(data):
        sizes.pop()
    sizes.append(len(data) - sum(sizes))
    left, right = socket.socketpair()
    with left, right:
        left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        assert ipckit.writev_all(left, out) == len(data)
        targets = [bytearray(size) for size in sizes]
        assert ipckit.readv_exact(right, targets) == len(data)
        assert b"".join(targets) == data
