import asyncio
import errno
import fcntl
import os
import resource
import runpy
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import PATIENCE, eventually
from procfs import asleep
from serving import A_MOMENT, user_of_its_own

from ipckit import Closed, sockets

URGENT = [b"A", b"B", b"1!", b"C", b"D", b"2!", b"E", b"F"]  # "!" marks the urgent ones


def tcp_pair(rcvbuf=None):
    with socket.socket() as listener:
        if rcvbuf:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        left = socket.create_connection(listener.getsockname())
        right, _ = listener.accept()
    left.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return left, right


@pytest.fixture
def tcp():
    left, right = tcp_pair()
    with left, right:
        yield left, right


@pytest.fixture
def unix():
    left, right = socket.socketpair()
    with left, right:
        yield left, right


@pytest.fixture
def packets():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        yield left, right


def descriptors():
    return len(os.listdir("/proc/self/fd"))


# --- send and receive ----------------------------------------------------------------------------


def test_send_and_recv_on_objects_and_descriptors(unix):
    left, right = unix
    assert sockets.send(left, b"hello") == 5
    assert sockets.recv(right.fileno(), 100) == b"hello"
    buffer = bytearray(3)
    assert sockets.send(left.fileno(), memoryview(b"abcdef")[1:]) == 5
    assert sockets.recv_into(right, buffer) == 3
    assert buffer == b"bcd"
    assert sockets.recv(right, 10) == b"ef"


def test_peek_leaves_the_data(unix):
    left, right = unix
    left.send(b"peeked")
    assert sockets.recv(right, 4, sockets.MSG_PEEK) == b"peek"
    assert sockets.recv(right, 10) == b"peeked"


def test_dontroute_reaches_this_machine(tcp):
    left, right = tcp
    assert sockets.send(left, b"local", sockets.MSG_DONTROUTE) == 5
    assert sockets.recv_exact(right, 5, timeout=PATIENCE) == b"local"


def test_dontwait_is_blocking_io_error_whatever_the_timeout(unix):
    _, right = unix
    for timeout in (None, 0, 5):
        with pytest.raises(
            BlockingIOError, match=f"recv of 1 bytes on descriptor {right.fileno()}"
        ) as caught:
            sockets.recv(right, 1, sockets.MSG_DONTWAIT, timeout=timeout)
        assert caught.value.errno == errno.EAGAIN
    while True:
        try:
            sockets.send(right, bytes(65536), sockets.MSG_DONTWAIT)
        except BlockingIOError as error:
            assert f"send on descriptor {right.fileno()}" in str(error)
            break


def feed_slowly(ready, sock, data, size, other):
    """A child that sends *data* in blocks of *size*, each when the one before has been read."""
    other.close()
    ready()
    for start in range(0, len(data), size):
        sock.sendall(data[start : start + size])
        time.sleep(0.002)


@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_waitall_is_the_kernels_in_a_blocking_call_and_recv_exacts_everywhere(unix, forked, timeout):
    left, right = unix
    data = bytes(range(200))
    forked(feed_slowly, left, data, 7, right)
    if timeout is None:
        assert sockets.recv(right, 100, sockets.MSG_WAITALL) == data[:100]
        assert sockets.recv_exact(right, 100) == data[100:]
        return
    right.setblocking(False)
    assert sockets.recv_exact(right, 100, timeout=timeout) == data[:100]
    assert sockets.recv_exact(right, 100, timeout=timeout) == data[100:]


def test_waitall_with_peek_on_tcp(tcp, forked):
    left, right = tcp
    data = bytes(range(100))
    forked(feed_slowly, left, data, 7, right)
    assert sockets.recv(right, 50, sockets.MSG_WAITALL | sockets.MSG_PEEK) == data[:50]
    assert sockets.recv(right, 100, sockets.MSG_WAITALL) == data


def test_without_a_timeout_a_nonblocking_socket_is_waited_for(unix, forked):
    left, right = unix
    right.settimeout(0.001)  # the object's own time-out makes its descriptor non-blocking
    left.setblocking(False)
    size = 1_000_000

    def echo(ready):
        ready()
        eventually(lambda: asleep(os.getppid()))  # the parent found nothing and waits
        sockets.send_all(left, sockets.recv(left, 10) + bytes(size))

    child = forked(echo)
    child.wait_ready()
    sockets.send_all(right, b"x")
    assert sockets.recv_exact(right, size + 1) == b"x" + bytes(size)
    assert child.wait() == 0


def test_a_timeout_bounds_the_whole_on_blocking_sockets_too(unix):
    left, right = unix
    assert right.getblocking()
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="recv of 3 bytes") as caught:
        sockets.recv(right, 3, timeout=0.05)
    assert caught.value.errno == errno.ETIMEDOUT
    left.send(b"ab")
    with pytest.raises(TimeoutError, match="after 2 of 3 bytes"):
        sockets.recv_exact(right, 3, timeout=0.05)
    with pytest.raises(TimeoutError, match=r"send_all .* after \d+ of 9000000 bytes"):
        sockets.send_all(right, bytes(9_000_000), timeout=0.05)
    with pytest.raises(TimeoutError, match="send on descriptor"):
        sockets.send(right, b"x", timeout=0)
    assert time.monotonic() - start >= 0.15
    assert right.getblocking(), "the socket stays as it was"


def test_a_receive_timeout_of_the_socket_changes_nothing(unix, forked):
    left, right = unix
    right.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 1000))

    def late(ready):
        time.sleep(0.05)  # many times that time-out
        left.send(b"late")

    child = forked(late)
    assert sockets.recv(right, 10) == b"late"
    assert child.wait() == 0


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_bad_timeouts_and_sizes(unix, timeout):
    left, right = unix
    with pytest.raises(ValueError, match="timeout must be"):
        sockets.recv(right, 1, timeout=timeout)
    for call in (sockets.recv, sockets.recv_exact, lambda sock, size: sockets.recv_fds(sock, size, 1)):
        with pytest.raises(ValueError, match="size must be an integer from 0 to .*, not -3"):
            call(right, -3)
    with pytest.raises(TypeError, match="read-only bytes"):
        sockets.recv_into(right, b"no")
    with pytest.raises(TypeError):
        sockets.send(left, "text")


@pytest.mark.parametrize("blocking", [True, False])
def test_signals_in_the_middle_lose_nothing(unix, forked, blocking):
    left, right = unix
    heard, hear = os.pipe()
    seen = []

    def handler(*_):
        seen.append(1)
        if len(seen) % 10 == 0:
            os.write(hear, b".")

    former = signal.signal(signal.SIGUSR1, handler)
    size = 300_000
    data = bytes(i % 251 for i in range(size))

    def storm(ready, pid):
        while True:
            os.kill(pid, signal.SIGUSR1)
            time.sleep(0.0005)

    def mirror(ready):
        """Sends and takes in pieces, each after ten more signals: so they come in the middle of our calls."""
        right.close()
        for start in range(0, size, 60_000):
            os.read(heard, 1)
            left.sendall(data[start : start + 60_000])
        got = bytearray()
        while len(got) < size:
            os.read(heard, 1)
            got += sockets.recv_exact(left, 60_000)
        assert got == data

    try:
        right.setblocking(blocking)
        child = forked(mirror)
        stormer = forked(storm, os.getpid())
        assert sockets.recv_exact(right, size) == data
        assert sockets.send_all(right, data) == size
        assert child.wait() == 0
        stormer.kill()
        stormer.wait()
    finally:
        signal.signal(signal.SIGUSR1, former)
        os.close(heard)
        os.close(hear)
    assert len(seen) >= 100, "ten for each of ten pieces"


def test_a_handler_may_raise_out_of_a_blocked_call(unix, forked):
    _, right = unix

    class Enough(Exception):
        pass

    def enough(*_):
        raise Enough

    def poke(ready, pid):
        eventually(lambda: asleep(pid))
        os.kill(pid, signal.SIGUSR1)

    former = signal.signal(signal.SIGUSR1, enough)
    try:
        child = forked(poke, os.getpid())
        with pytest.raises(Enough):
            sockets.recv(right, 1)
        assert child.wait() == 0
    finally:
        signal.signal(signal.SIGUSR1, former)


def test_end_of_stream(unix):
    left, right = unix
    left.send(b"1234567")
    left.close()
    with pytest.raises(EOFError, match=f"descriptor {right.fileno()} after 7 of 10 bytes"):
        sockets.recv_exact(right, 10)
    assert sockets.recv(right, 10) == b""
    assert sockets.recv_exact(right, 0) == b""


def test_a_sender_killed_in_the_middle(unix, forked):
    left, right = unix

    def half(ready):
        right.close()
        left.sendall(b"x" * 500)
        ready()
        signal.pause()

    def kill(ready, pid, reader):
        left.close()
        right.close()
        eventually(lambda: asleep(reader))
        os.kill(pid, signal.SIGKILL)

    child = forked(half)
    child.wait_ready()
    left.close()
    killer = forked(kill, child.pid, os.getpid())
    with pytest.raises(EOFError, match="after 500 of 1000 bytes"):
        sockets.recv_exact(right, 1000)
    assert child.wait() == -signal.SIGKILL
    assert killer.wait() == 0


def test_a_gone_peer_is_an_error_and_no_signal(unix):
    left, right = unix
    former = signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # would kill; Python ignores it by default
    try:
        right.close()
        calls = {
            "send": lambda: sockets.send(left, b"x"),
            "send_all": lambda: sockets.send_all(left, b"x"),
            "send_fds": lambda: sockets.send_fds(left, b"x", [left]),
        }
        for verb, call in calls.items():
            with pytest.raises(BrokenPipeError, match=f"{verb} .*on descriptor {left.fileno()}") as caught:
                call()
            assert caught.value.errno == errno.EPIPE
    finally:
        signal.signal(signal.SIGPIPE, former)


def test_a_reset_connection(tcp):
    left, right = tcp
    left.send(b"lost")
    right.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close() resets
    right.close()
    with pytest.raises(
        ConnectionResetError, match="recv_exact on descriptor .* after 0 of 9 bytes"
    ) as caught:
        sockets.recv_exact(left, 9, timeout=PATIENCE)
    assert caught.value.errno == errno.ECONNRESET


def test_not_a_socket_and_not_open(tmp_path):
    with socket.socket() as alone, open(tmp_path / "file", "w+b") as file:
        spare = os.dup(alone.fileno())
        os.close(spare)
        buffer = bytearray(1)
        calls = [
            lambda sock: sockets.send(sock, b"x"),
            lambda sock: sockets.send_all(sock, b"x"),
            lambda sock: sockets.recv(sock, 1),
            lambda sock: sockets.recv_into(sock, buffer),
            lambda sock: sockets.recv_exact(sock, 1),
            lambda sock: sockets.recv_fds(sock, 1, 1),
            lambda sock: sockets.send_fds(sock, b"x", [0]),
            sockets.peer_credentials,
            sockets.get_oobinline,
            lambda sock: sockets.set_oobinline(sock, True),
        ]
        for call in calls:
            with pytest.raises(OSError, match=f"descriptor {file.fileno()}") as caught:
                call(file)
            assert caught.value.errno == errno.ENOTSOCK
            with pytest.raises(OSError, match=f"descriptor {spare}") as caught:
                call(spare)
            assert caught.value.errno == errno.EBADF
        for call in (sockets.at_mark, sockets.UrgentWatcher):
            with pytest.raises(OSError, match=f"at_mark on descriptor {file.fileno()}") as caught:
                call(file)
            assert caught.value.errno == errno.ENOTTY
            with pytest.raises(OSError, match=f"descriptor {spare}") as caught:
                call(spare)
            assert caught.value.errno == errno.EBADF
    with pytest.raises(OSError, match="descriptor -1") as caught:
        sockets.recv(alone, 1)
    assert caught.value.errno == errno.EBADF


def test_not_connected():
    with socket.socket() as alone:
        calls = [
            lambda sock: sockets.recv(sock, 1),
            lambda sock: sockets.recv_into(sock, bytearray(1)),
            lambda sock: sockets.recv_exact(sock, 1),
            lambda sock: sockets.recv_fds(sock, 1, 1),
        ]
        for call in calls:
            with pytest.raises(OSError, match=f"descriptor {alone.fileno()}") as caught:
                call(alone)
            assert caught.value.errno == errno.ENOTCONN


# --- datagrams -----------------------------------------------------------------------------------


def test_a_too_long_datagram_is_refused(packets):
    left, _ = packets
    with pytest.raises(OSError, match=f"send on descriptor {left.fileno()}") as caught:
        sockets.send(left, bytes(10_000_000))
    assert caught.value.errno == errno.EMSGSIZE


def test_a_truncated_datagram_is_noticed(packets):
    left, right = packets
    for message in (b"longer", b"next", b"measured", b"peeked"):
        left.send(message)
    with pytest.raises(OSError, match=f"recv of 3 bytes on descriptor {right.fileno()}") as caught:
        sockets.recv(right, 3)
    assert caught.value.errno == errno.EMSGSIZE
    assert sockets.recv(right, 4) == b"next", "only the rest of that one datagram is lost"
    assert sockets.recv_into(right, bytearray(1), socket.MSG_TRUNC) == 8
    assert sockets.recv(right, 2, sockets.MSG_PEEK) == b"pe"
    assert sockets.recv(right, 6) == b"peeked"


def test_empty_datagrams(packets):
    left, right = packets
    assert sockets.send(left, b"") == 0
    left.send(b"x")
    assert sockets.recv(right, 9) == b""
    assert sockets.recv(right, 9) == b"x"


def test_truncating_a_tcp_stream_returns_only_bytes_that_came(tcp):
    left, right = tcp
    left.send(b"dropped")
    assert sockets.recv(right, 7, socket.MSG_TRUNC, timeout=PATIENCE) == bytes(7)


def test_the_error_queue_is_not_waited_for():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as alone, pytest.raises(BlockingIOError):
        alone.bind(("127.0.0.1", 0))
        sockets.recv(alone, 1, socket.MSG_ERRQUEUE)


# --- urgent data ---------------------------------------------------------------------------------


def send_the_eight(ready, sock):
    for item in URGENT:
        if item.endswith(b"!"):
            sockets.send_urgent(sock, item[:1])
        else:
            sockets.send_all(sock, item)
    sock.shutdown(socket.SHUT_WR)
    ready()


def reads(sock):
    """What each read gave, with "|" where the mark stood after it."""
    found = []
    while data := sockets.recv(sock, 100, timeout=PATIENCE):
        found.append(data + (b"|" if sockets.at_mark(sock) else b""))
    return found


def all_there(sock):
    """Wait for the end of the stream, behind all that was sent."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    assert poll.poll(PATIENCE * 1000)


def unix_oob():
    left, right = socket.socketpair()
    with left, right:
        try:
            left.send(b"?", socket.MSG_OOB)
        except OSError as error:
            assert error.errno == errno.EOPNOTSUPP
            return False
        return True


@pytest.fixture(params=["tcp", "unix"])
def stream(request):
    if request.param == "unix" and not unix_oob():
        pytest.skip("this kernel has no CONFIG_AF_UNIX_OOB")
    return request.getfixturevalue(request.param)


def test_the_mark_and_the_older_urgent_byte(stream, forked):
    left, right = stream
    child = forked(send_the_eight, left)
    child.wait_ready()
    all_there(right)
    assert sockets.recv_urgent(right) == b"2", "the newest; 1 has fallen into the stream"
    assert not sockets.at_mark(right)
    assert reads(right) == [b"AB1CD|", b"EF"]


def test_a_pending_urgent_byte_that_is_passed_is_lost(stream, forked):
    left, right = stream
    forked(send_the_eight, left).wait_ready()
    all_there(right)
    assert sockets.recv(right, 100) == b"AB1CD"
    assert sockets.at_mark(right)
    assert sockets.recv(right, 100) == b"EF"
    with pytest.raises(OSError, match="passed already") as caught:
        sockets.recv_urgent(right)
    assert caught.value.errno == errno.EINVAL


def test_inline_the_urgent_byte_comes_first_after_the_mark(stream, forked):
    left, right = stream
    assert not sockets.get_oobinline(right)
    sockets.set_oobinline(right, True)
    assert sockets.get_oobinline(right)
    forked(send_the_eight, left).wait_ready()
    all_there(right)
    with pytest.raises(OSError, match="SO_OOBINLINE is on") as caught:
        sockets.recv_urgent(right)
    assert caught.value.errno == errno.EINVAL
    assert reads(right) == [b"AB1CD|", b"2EF"]


@pytest.mark.parametrize("inline", [False, True])
def test_the_choice_counts_when_it_is_read(stream, forked, inline):
    left, right = stream
    sockets.set_oobinline(right, not inline)
    forked(send_the_eight, left).wait_ready()
    all_there(right)
    sockets.set_oobinline(right, inline)
    assert reads(right) == [b"AB1CD|", b"2EF" if inline else b"EF"]


def test_recv_exact_goes_over_the_mark(stream, forked):
    left, right = stream
    forked(send_the_eight, left).wait_ready()
    all_there(right)
    assert sockets.recv(right, 100, sockets.MSG_WAITALL) == b"AB1CD", "the kernel's stops at it"
    assert sockets.recv_exact(right, 2) == b"EF"


def test_no_urgent_byte_or_read_already(stream):
    left, right = stream
    for _ in range(2):
        with pytest.raises(
            OSError, match=f"descriptor {right.fileno()}: no urgent byte is pending"
        ) as caught:
            sockets.recv_urgent(right)
        assert caught.value.errno == errno.EINVAL
        sockets.send_urgent(left, b"!", timeout=PATIENCE)
        with sockets.UrgentWatcher(right) as watcher:
            watcher.wait(PATIENCE)
        assert sockets.recv(right, 1, sockets.MSG_OOB | sockets.MSG_PEEK) == b"!"
        assert sockets.recv_urgent(right) == b"!"


@pytest.mark.parametrize("data", [b"", b"ab"])
def test_urgent_is_one_byte(tcp, data):
    with pytest.raises(ValueError, match=f"exactly one byte, not {len(data)}"):
        sockets.send_urgent(tcp[0], data)


def test_datagrams_have_no_urgent_data(packets):
    left, right = packets
    with pytest.raises(OSError, match="send on descriptor") as caught:
        sockets.send_urgent(left, b"x")
    assert caught.value.errno == errno.EOPNOTSUPP
    with pytest.raises(OSError, match="recv_urgent on descriptor") as caught:
        sockets.recv_urgent(right)
    assert caught.value.errno == errno.EOPNOTSUPP


@pytest.fixture
def announced():
    """A TCP pair whose receive buffer is full, so that an urgent byte can be announced but not come."""
    left, right = tcp_pair(rcvbuf=4096)
    with left, right:
        left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sockets.send_all(left, bytes(50_000), timeout=PATIENCE)
        yield left, right


def test_an_announced_byte_that_has_not_come(announced):
    left, right = announced
    called = []
    with sockets.UrgentWatcher(right, called.append) as watcher:
        sockets.send_urgent(left, b"!", timeout=PATIENCE)
        eventually(lambda: called)  # SIGURG comes before the byte
        with pytest.raises(TimeoutError, match="recv_urgent on descriptor"):
            sockets.recv_urgent(right, timeout=0.01)
        with pytest.raises(TimeoutError):
            watcher.wait(0)
        assert sockets.recv_exact(right, 50_000, timeout=PATIENCE) == bytes(50_000)
        assert sockets.recv_urgent(right, timeout=PATIENCE) == b"!"
        assert called == [right]
    with sockets.UrgentWatcher(right, called.append):
        assert called == [right], "taken already"


def test_a_watcher_made_after_the_announcement_is_called_at_once(announced):
    left, right = announced
    first, second = [], []
    with sockets.UrgentWatcher(right, first.append):
        sockets.send_urgent(left, b"!", timeout=PATIENCE)
        eventually(lambda: first)
    with sockets.UrgentWatcher(right, second.append):
        assert second == [right]


def test_the_end_comes_before_the_announced_byte(announced):
    left, right = announced
    called = []
    with sockets.UrgentWatcher(right, called.append):
        sockets.send_urgent(left, b"!", timeout=PATIENCE)
        eventually(lambda: called)
        right.shutdown(socket.SHUT_RD)
        with pytest.raises(EOFError, match="before the urgent byte"):
            sockets.recv_urgent(right, timeout=PATIENCE)


# --- the watcher ---------------------------------------------------------------------------------


def test_a_watcher_waits(stream, forked):
    left, right = stream
    with sockets.UrgentWatcher(right) as watcher:
        with pytest.raises(TimeoutError, match=f"urgent data on descriptor {right.fileno()}") as caught:
            watcher.wait(0.01)
        assert caught.value.errno == errno.ETIMEDOUT
        sockets.send_all(left, b"ordinary")
        with pytest.raises(TimeoutError):
            watcher.wait(0)

        def urge(ready, pid):
            eventually(lambda: asleep(pid))
            sockets.send_urgent(left, b"!")

        child = forked(urge, os.getpid())
        watcher.wait()
        watcher.wait(0)
        assert sockets.recv_urgent(right) == b"!"
        with pytest.raises(TimeoutError):
            watcher.wait(0)
        assert child.wait() == 0


def test_a_watcher_notices_that_the_peer_died(tcp, forked):
    left, right = tcp

    def stay(ready):
        right.close()
        ready()
        signal.pause()

    child = forked(stay)
    child.wait_ready()
    left.close()
    with sockets.UrgentWatcher(right) as watcher:

        def kill(ready, reader):
            left.close()
            eventually(lambda: asleep(reader))
            os.kill(child.pid, signal.SIGKILL)

        killer = forked(kill, os.getpid())
        with pytest.raises(EOFError, match=f"descriptor {right.fileno()}"):
            watcher.wait()
        assert child.wait() == -signal.SIGKILL
        assert killer.wait() == 0


def test_an_urgent_byte_before_the_end_is_found_first(tcp):
    left, right = tcp
    sockets.send_urgent(left, b"!")
    left.close()
    all_there(right)
    with sockets.UrgentWatcher(right) as watcher:
        watcher.wait(PATIENCE)
        assert sockets.recv_urgent(right) == b"!"
        with pytest.raises(EOFError):
            watcher.wait(PATIENCE)


def test_a_watcher_in_poll_and_asyncio(stream, forked):
    left, right = stream
    with sockets.UrgentWatcher(right) as watcher:
        assert select.select([watcher], [], [], 0)[0] == []

        def urge(ready):
            ready()
            sockets.send_urgent(left, b"!")

        async def wait():
            found = asyncio.get_running_loop().create_future()

            def take():
                found.set_result(sockets.recv_urgent(right))
                asyncio.get_running_loop().remove_reader(watcher)

            asyncio.get_running_loop().add_reader(watcher, take)
            child = forked(urge)
            assert await asyncio.wait_for(found, PATIENCE) == b"!"
            assert child.wait() == 0

        asyncio.run(wait())
        assert select.select([watcher], [], [], 0)[0] == []


def test_a_callback_interrupts_a_blocked_call_and_all_is_restored(tcp, forked):
    left, right = tcp
    mine = signal.signal(signal.SIGURG, signal.SIG_IGN)
    called = []

    def take(sock):
        called.append(sockets.recv_urgent(sock, timeout=PATIENCE))

    def urge(ready, pid):
        right.close()
        eventually(lambda: asleep(pid))
        sockets.send_urgent(left, b"!")
        ready()
        left.sendall(b"done")

    try:
        with sockets.UrgentWatcher(right, take):
            assert fcntl.fcntl(right, fcntl.F_GETOWN) == os.getpid()
            child = forked(urge, os.getpid())
            assert sockets.recv_exact(right, 4) == b"done"
            eventually(lambda: called)
            assert child.wait() == 0
        assert called == [b"!"]
        assert fcntl.fcntl(right, fcntl.F_GETOWN) == 0
        assert signal.getsignal(signal.SIGURG) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGURG, mine)


def test_only_the_watcher_concerned_is_called(tcp):
    left, right = tcp
    other_left, other_right = tcp_pair()
    called = []
    with (
        other_left,
        other_right,
        sockets.UrgentWatcher(right, called.append),
        sockets.UrgentWatcher(other_right, called.append),
    ):
        sockets.send_urgent(left, b"!")
        eventually(lambda: called)
        assert called == [right]
        assert sockets.recv_urgent(right) == b"!"
        sockets.send_urgent(other_left, b"!")
        eventually(lambda: len(called) > 1)
        assert called == [right, other_right]


def test_inline_a_callback_is_called_too(tcp):
    left, right = tcp
    sockets.set_oobinline(right, True)
    called = []
    with sockets.UrgentWatcher(right, called.append):
        assert called == []
        sockets.send_urgent(left, b"!")
        eventually(lambda: called)
        assert sockets.recv(right, 9, timeout=PATIENCE) == b"!"
    sockets.send_urgent(left, b"!")
    all_urgent = sockets.UrgentWatcher(right)
    with all_urgent:
        all_urgent.wait(PATIENCE)
    with sockets.UrgentWatcher(right, called.append):
        assert len(called) == 2, "what is pending already is told at once"


def test_a_callback_outside_of_the_main_thread_is_refused(tcp, forked):
    _, right = tcp
    caught = []

    def make():
        before = descriptors()
        try:
            sockets.UrgentWatcher(right, print)
        except ValueError as error:
            caught.append(str(error))
        assert descriptors() == before

    def in_a_thread(ready):
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        assert "main thread" in caught[0]

    assert forked(in_a_thread).wait() == 0


def test_a_callback_that_raises_at_once_leaves_nothing(tcp):
    left, right = tcp
    sockets.send_urgent(left, b"!")
    with sockets.UrgentWatcher(right) as watcher:
        watcher.wait(PATIENCE)
    with pytest.raises(ZeroDivisionError):
        sockets.UrgentWatcher(right, lambda sock: 1 / 0)
    assert signal.getsignal(signal.SIGURG) is signal.SIG_DFL
    assert fcntl.fcntl(right, fcntl.F_GETOWN) == 0


def test_a_child_does_not_take_the_owner_away(tcp, forked):
    left, right = tcp
    called = []
    with sockets.UrgentWatcher(right, called.append) as watcher:

        def close(ready):
            watcher.close()

        assert forked(close).wait() == 0
        assert fcntl.fcntl(right, fcntl.F_GETOWN) == os.getpid()
        sockets.send_urgent(left, b"!")
        eventually(lambda: called)


def test_a_closed_watcher(tcp):
    left, right = tcp
    with sockets.UrgentWatcher(right, print) as watcher:
        assert not watcher.closed
        right.close()  # the wrong order, but nothing else is harmed
    watcher.close()
    assert watcher.closed
    for call in (watcher.wait, watcher.fileno):
        with pytest.raises(Closed, match="UrgentWatcher is closed"):
            call()
    assert signal.getsignal(signal.SIGURG) is signal.SIG_DFL
    left.close()


# --- descriptors ---------------------------------------------------------------------------------


def content(fd):
    with open(fd, "rb") as file:
        return os.pread(file.fileno(), 100, 0)


@pytest.fixture
def files(tmp_path):
    """Three open files that hold their own numbers."""
    with ExitStack() as opened:
        for number in range(3):
            (tmp_path / str(number)).write_text(str(number))
        yield [opened.enter_context(open(tmp_path / str(number), "rb")) for number in range(3)]


@pytest.fixture(params=[socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def local(request):
    left, right = socket.socketpair(socket.AF_UNIX, request.param)
    with left, right:
        yield left, right


def test_descriptors_arrive_from_another_process(local, files, forked):
    left, right = local

    def give(ready):
        assert sockets.send_fds(left, b"take", files) == 4

    assert forked(give).wait() == 0
    data, fds = sockets.recv_fds(right, 100, 5, timeout=PATIENCE)
    assert data == b"take"
    assert not any(os.get_inheritable(fd) for fd in fds)
    assert [content(fd) for fd in fds] == [b"0", b"1", b"2"]


def test_no_descriptors_and_the_end(local):
    left, right = local
    assert sockets.send_fds(left, b"alone", []) == 5
    assert sockets.recv_fds(right, 9, 0) == (b"alone", [])
    left.close()
    assert sockets.recv_fds(right, 9, 3) == (b"", [])


def test_descriptors_with_the_standard_library(local, files, forked):
    left, right = local

    def give(ready):
        socket.send_fds(left, [b"to us"], [file.fileno() for file in files])
        data, fds, _, _ = socket.recv_fds(left, 100, 3)
        assert data == b"to them"
        assert [content(fd) for fd in fds] == [b"2", b"0"]

    child = forked(give)
    data, fds = sockets.recv_fds(right, 100, 3)
    assert (data, [content(fd) for fd in fds]) == (b"to us", [b"0", b"1", b"2"])
    sockets.send_fds(right, b"to them", [files[2], files[0].fileno()])
    assert child.wait() == 0


def test_descriptors_without_data(packets, unix, files):
    left, right = packets
    assert sockets.send_fds(left, b"", files[:1]) == 0
    data, fds = sockets.recv_fds(right, 10, 1)
    assert (data, [content(fd) for fd in fds]) == (b"", [b"0"])
    with pytest.raises(ValueError, match="a stream carries descriptors with data only"):
        sockets.send_fds(unix[0], b"", files)


def test_all_of_a_long_message_goes_after_its_descriptors(unix, files, forked):
    left, right = unix
    size = 1_000_000
    left.setblocking(False)

    def take(ready):
        data, fds = sockets.recv_fds(right, 10, 1)
        assert [content(fd) for fd in fds] == [b"0"]
        assert data + sockets.recv_exact(right, size - len(data)) == bytes(size)

    child = forked(take)
    assert sockets.send_fds(left, bytes(size), files[:1], timeout=PATIENCE) == size
    assert child.wait() == 0


def test_a_timeout_after_the_descriptors_have_gone(unix, files):
    left, right = unix
    with pytest.raises(TimeoutError, match=r"send_fds .* after \d+ of 9000000 bytes"):
        sockets.send_fds(left, bytes(9_000_000), files, timeout=0.01)
    data, fds = sockets.recv_fds(right, 10, 3)
    assert data == bytes(10)
    assert [content(fd) for fd in fds] == [b"0", b"1", b"2"]


def test_too_many_descriptors(local, files):
    left, right = local
    with pytest.raises(ValueError, match="at most 253 descriptors, not 254"):
        sockets.send_fds(left, b"x", [files[0]] * 254)
    for number in (-1, 254):
        with pytest.raises(ValueError, match=f"max_fds must be an integer from 0 to 253, not {number}"):
            sockets.recv_fds(right, 1, number)
    assert sockets.send_fds(left, b"x", [files[0]] * 253) == 1
    data, fds = sockets.recv_fds(right, 1, 253)
    for fd in fds:
        os.close(fd)
    assert (data, len(fds)) == (b"x", 253)


def test_a_closed_descriptor_among_them_and_nothing_is_sent(local, files):
    left, right = local
    spare = os.dup(files[0].fileno())
    os.close(spare)
    with pytest.raises(OSError, match=rf"descriptors \[{files[1].fileno()}, {spare}\]") as caught:
        sockets.send_fds(left, b"x", [files[1], spare])
    assert caught.value.errno == errno.EBADF
    with pytest.raises(BlockingIOError):
        sockets.recv(right, 1, sockets.MSG_DONTWAIT)


def test_tcp_carries_no_descriptors(tcp, files):
    with pytest.raises(OSError, match="send_fds of descriptors") as caught:
        sockets.send_fds(tcp[0], b"x", files)
    assert caught.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize("passcred", [0, 1])
@pytest.mark.parametrize("expected", [0, 1, 2, 9])
def test_surplus_descriptors_are_closed(local, files, passcred, expected):
    left, right = local
    right.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, passcred)
    before = descriptors()
    for surplus in (1, 2, 8, 253 - expected):
        sockets.send_fds(left, b"x", [files[0]] * (expected + surplus))
        with pytest.raises(OSError, match=f"1 bytes and {expected} descriptors on") as caught:
            sockets.recv_fds(right, 1, expected)
        assert caught.value.errno == errno.EMSGSIZE
        assert descriptors() == before
    sockets.send_fds(left, b"x", [files[0]] * expected)
    data, fds = sockets.recv_fds(right, 1, expected)
    for fd in fds:
        os.close(fd)
    assert (data, len(fds)) == (b"x", expected)


SO_TIMESTAMP, SO_PASSPIDFD = 29, 76  # the latter from Linux 6.5 on
OPTIONS = (socket.SO_PASSCRED, socket.SO_PASSSEC, SO_TIMESTAMP, SO_PASSPIDFD)


@pytest.mark.parametrize("options", [OPTIONS[-1:], OPTIONS[:1] + OPTIONS[-1:], OPTIONS])
@pytest.mark.parametrize("expected", [0, 1, 253])
def test_what_options_add_to_a_message_is_no_descriptor(files, options, expected):
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left, right:
        for option in options:
            try:
                right.setsockopt(socket.SOL_SOCKET, option, 1)
            except OSError:
                pytest.skip(f"the kernel has no option {option}")
        before = descriptors()
        for _ in range(5):
            sockets.send_fds(left, b"x", [files[0]] * expected)
            data, fds = sockets.recv_fds(right, 10, expected, timeout=PATIENCE)
            for fd in fds:
                os.close(fd)
            assert (data, len(fds)) == (b"x", expected)
            assert descriptors() == before
        sockets.send_fds(left, b"too long", files)
        with pytest.raises(OSError, match="recv_fds of 1 bytes") as caught:
            sockets.recv_fds(right, 1, 3)
        assert caught.value.errno == errno.EMSGSIZE
        assert descriptors() == before


def test_the_pidfd_of_a_sender_is_not_the_last_descriptor_that_there_is(files, forked):
    """SO_PASSPIDFD where none is left: what came is received all the same."""
    left, right = socket.socketpair()
    with left, right:
        try:
            right.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 1)
        except OSError:
            pytest.skip("the kernel has no SO_PASSPIDFD")

        def take(ready):
            before = descriptors()
            resource.setrlimit(resource.RLIMIT_NOFILE, (before + 1, before + 1))
            sockets.send_fds(left, b"x", files[:1])
            data, fds = sockets.recv_fds(right, 1, 1)
            assert (data, len(fds)) == (b"x", 1)
            os.close(fds[0])
            assert descriptors() == before

        assert forked(take).wait() == 0


@pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_253_descriptors_again_and_again_to_one_that_expects_one(local, files, forked, times):
    left, right = local

    def give(ready):
        for _ in range(times):
            sockets.send_fds(left, b"x", [files[0]] * 253)
            left.recv(1)  # a user may not have more on their way than RLIMIT_NOFILE

    child = forked(give)
    before = descriptors()
    for _ in range(times):
        with pytest.raises(OSError) as caught:
            sockets.recv_fds(right, 1, 1, timeout=PATIENCE)
        right.send(b".")
        assert caught.value.errno == errno.EMSGSIZE
        assert descriptors() == before
    assert child.wait() == 0


@pytest.mark.serial  # the descriptors on their way are counted for a user, whatever the process
def test_a_receiver_that_may_not_open_them(local, files, forked):
    left, right = local

    def take(ready):
        before = descriptors()
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 2, before + 2))
        for expected in (1, 20, 253) * 5:
            sockets.send_fds(left, b"x", [files[0]] * 253)
            try:
                sockets.recv_fds(right, 1, expected)
                raise AssertionError("it came whole")
            except OSError as error:
                assert error.errno == (errno.EMSGSIZE if expected == 1 else errno.EMFILE)
                assert f"{expected} descriptors on descriptor {right.fileno()}" in str(error)
            assert descriptors() == before

    assert forked(take).wait() == 0


def test_a_truncated_message_closes_its_descriptors(packets, files):
    left, right = packets
    before = descriptors()
    sockets.send_fds(left, b"too long", files)
    with pytest.raises(OSError, match="recv_fds of 3 bytes") as caught:
        sockets.recv_fds(right, 3, 3)
    assert caught.value.errno == errno.EMSGSIZE
    assert descriptors() == before


def test_a_plain_recv_closes_what_came(local, files):
    left, right = local
    before = descriptors()
    sockets.send_fds(left, b"x", files)
    assert sockets.recv(right, 1) == b"x"
    assert descriptors() == before


@pytest.mark.serial  # the descriptors on their way are counted for a user, whatever the process
def test_too_many_on_their_way(local, files, forked):
    left, _ = local

    def give(ready):
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
        if os.getuid() == 0:
            os.setuid(user_of_its_own())  # the limit is not for CAP_SYS_RESOURCE
        for sent in range(200):
            try:
                sockets.send_fds(left, b"x", [files[0]] * 20, timeout=0)
            except OSError as error:
                assert error.errno == errno.ETOOMANYREFS
                assert "send_fds of descriptors" in str(error)
                assert sent > 0
                return
        raise AssertionError("no limit")

    assert forked(give).wait() == 0


# --- credentials ---------------------------------------------------------------------------------


def test_credentials_of_another_process(tmp_path, forked):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        os.chmod(path, 0o777)
        listener.listen()

        def connect(ready):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
                peer = sockets.peer_credentials(sock)
                assert peer == (os.getppid(), os.getuid(), os.getgid())
                sock.recv(1)

        child = forked(connect)
        served, _ = listener.accept()
        with served:
            peer = sockets.peer_credentials(served.fileno())
            assert (peer.pid, peer.uid, peer.gid) == (child.pid, os.getuid(), os.getgid())
        assert child.wait() == 0


def test_credentials_of_nobody(tcp):
    with socket.socket(socket.AF_UNIX) as alone:
        for sock in (tcp[0], alone):
            with pytest.raises(OSError, match=f"peer_credentials on descriptor {sock.fileno()}") as caught:
                sockets.peer_credentials(sock)
            assert caught.value.errno == errno.ENOTCONN


# --- socket files --------------------------------------------------------------------------------

TYPES = [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM]
NOBODY = 65534


@pytest.fixture
def umask():
    former = os.umask(0o022)
    yield os.umask
    os.umask(former)


@pytest.fixture
def bound(tmp_path):
    """``bound(path, kind=..., mode=...)``: a socket bound by bind_unix(), and its file."""
    with ExitStack() as opened:

        def bind(path=tmp_path / "sock", kind=socket.SOCK_STREAM, **options):
            sock = opened.enter_context(socket.socket(socket.AF_UNIX, kind))
            return sock, sockets.bind_unix(sock, path, **options)

        yield bind


def dead_socket(path, kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_UNIX, kind) as gone:
        gone.bind(str(path))


HOOKED = {}
sys.addaudithook(lambda event, _: HOOKED[event]() if event in HOOKED else None)


@contextmanager
def during(event, call):
    """Have *call* called when this process does what *event* stands for in Python's audit events."""
    HOOKED[event] = call
    yield
    del HOOKED[event]


def ended(child):
    """Without reaping it."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def mode_of(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def contents(folder):
    """What lstat(2) tells of each file, but when it was last looked at or locked."""
    looks = {name: os.lstat(folder / name) for name in os.listdir(folder)}
    return {name: (*look[:7], look.st_mtime_ns) for name, look in looks.items()}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("path_type", [str, os.fsencode, Path])
def test_a_socket_file_comes_and_goes(tmp_path, bound, kind, path_type):
    path = tmp_path / "sock"
    sock, file = bound(path_type(path), kind)
    assert sock.getsockname() == str(path), "what clients and ss(8) are shown"
    assert file == (str(path), (path.stat().st_dev, path.stat().st_ino), os.getpid())
    assert mode_of(path) == 0o600
    assert file.unlink() is True
    assert not path.exists()
    assert file.unlink() is False


def test_a_socket_file_of_a_relative_path_goes_wherever_the_process_is_by_then(tmp_path, bound, monkeypatch):
    (tmp_path / "one" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("one/inner")
    monkeypatch.chdir(tmp_path)
    for name, place in (("sock", "sock"), ("link/../sock", "one/sock")):  # the .. of link is one
        sock, file = bound(name)
        assert sock.getsockname() == name
        assert (tmp_path / place).exists()
        monkeypatch.chdir("/")
        assert file.unlink()
        assert not (tmp_path / place).exists()
        monkeypatch.chdir(tmp_path)


def test_a_process_whose_folder_is_gone_binds_by_absolute_paths(tmp_path, bound, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    _, file = bound()
    assert file.unlink()
    with pytest.raises(FileNotFoundError):
        bound("sock")


@pytest.mark.parametrize("mode", [0, 0o600, 0o660, 0o666, 0o777])
@pytest.mark.parametrize("mask", [0, 0o022, 0o077, 0o777])
def test_the_mode_of_a_socket_file_whatever_the_umask(tmp_path, bound, umask, mode, mask):
    umask(mask)
    bound(mode=mode)
    umask(0o022)
    assert mode_of(tmp_path / "sock") == mode


@pytest.mark.parametrize("mask", [0, 0o022, 0o777])
def test_a_socket_file_is_never_wider_open_than_its_mode(tmp_path, mask):
    """Seen at each audit event of CPython, and after each line that runs."""
    code = (
        "import os, socket, sys\n"
        "from ipckit import sockets\n"
        "seen = []\n"
        "def look(*_):\n"
        "    if os.path.lexists(sys.argv[1]):\n"
        "        seen.append(os.lstat(sys.argv[1]).st_mode & 0o777)\n"
        "    return look\n"
        "os.umask(int(sys.argv[2]))\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "sys.addaudithook(look)\n"
        "sys.settrace(look)\n"
        "sockets.bind_unix(sock, sys.argv[1], mode=0o640)\n"
        "sys.settrace(None)\n"
        "assert len(seen) > 5 and not any(mode & ~0o640 for mode in seen), seen\n"
        "assert seen[-1] == 0o640, seen\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "sock", str(mask)]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_somebody_else_put_at_the_path_stays(tmp_path, bound):
    path = tmp_path / "sock"
    _, file = bound()
    path.rename(tmp_path / "moved")
    assert file.unlink() is False, "nothing there"
    dead_socket(path)
    assert file.unlink() is False
    assert sorted(os.listdir(tmp_path)) == ["moved", "sock"]


def test_only_the_maker_removes_a_socket_file(tmp_path, bound, forked):
    _, file = bound()
    assert forked(lambda _: sys.exit(7 if file.unlink() is False else 8)).wait() == 7
    assert file.unlink() is True


@pytest.mark.parametrize("ours", TYPES)
@pytest.mark.parametrize("left", TYPES)
def test_what_a_dead_process_left_is_replaced(tmp_path, bound, ours, left):
    path = tmp_path / "sock"
    dead_socket(path, left)
    before = path.stat().st_ctime_ns
    sock, file = bound(kind=ours)
    assert path.stat().st_ctime_ns > before
    if ours == socket.SOCK_STREAM:
        sock.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert file.unlink()


@pytest.mark.parametrize("ours", TYPES)
@pytest.mark.parametrize("theirs", TYPES)
@pytest.mark.parametrize("listening", [True, False])
def test_what_a_living_process_has_is_not_and_does_not_notice(tmp_path, bound, ours, theirs, listening):
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX, theirs) as alive:
        alive.bind(str(path))
        if listening and theirs != socket.SOCK_DGRAM:
            alive.listen(0)
        before = contents(tmp_path)
        with pytest.raises(OSError, match=f"'{path}'$") as caught:
            bound(kind=ours)
        assert caught.value.errno == errno.EADDRINUSE
        assert contents(tmp_path) == before
        if listening:
            assert select.select([alive], [], [], 0) == ([], [], []), "no connection was made to find out"


def make_file(path):
    path.write_text("mine")


def make_dangling_link(path):
    path.symlink_to(path.parent / "nowhere")


def make_link_to_a_dead_socket(path):
    dead_socket(path.parent / "dead")
    path.symlink_to(path.parent / "dead")


def make_dead_socket_of_two_names(path):
    dead_socket(path)
    os.link(path, path.parent / "other")


@pytest.mark.parametrize(
    "make, why",
    [
        (make_file, "is no socket, but -rw"),
        (os.mkfifo, "is no socket, but prw"),
        (os.mkdir, "is no socket, but drwx"),
        (make_dangling_link, "is no socket, but lrwx"),
        (make_link_to_a_dead_socket, "is no socket, but lrwx"),
        (make_dead_socket_of_two_names, "has 2 names"),
    ],
)
def test_anything_else_is_refused_and_untouched(tmp_path, bound, umask, make, why):
    path = tmp_path / "sock"
    make(path)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=f"'{path}' {why}"):
        bound()
    assert contents(tmp_path) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_dead_socket_is_refused_and_untouched(tmp_path, bound):
    path = tmp_path / "sock"
    dead_socket(path)
    os.chown(path, 12345, 12345)
    before = contents(tmp_path)
    with pytest.raises(PermissionError, match=f"'{path}' belongs to user 12345, not to 0") as caught:
        bound()
    assert caught.value.errno == errno.EPERM
    assert contents(tmp_path) == before


@pytest.mark.parametrize("folder_mode", [0o755, 0o333])
def test_a_dead_socket_that_may_not_be_asked(forked, folder_mode):
    """By its mode, and not as root, who may. The folder need not be readable."""

    def bind_twice(_ready):
        if os.geteuid() == 0:
            os.setresuid(NOBODY, NOBODY, NOBODY)
        os.mkdir(work)
        dead_socket(f"{work}/sock")
        os.chmod(f"{work}/sock", 0)
        dead_socket(f"{work}/dead")
        os.chmod(work, folder_mode)
        with socket.socket(socket.AF_UNIX) as sock:
            with pytest.raises(PermissionError, match="/sock'$") as caught:
                sockets.bind_unix(sock, f"{work}/sock")
            assert caught.value.errno == errno.EACCES
            assert mode_of(f"{work}/sock") == 0
            assert sockets.bind_unix(sock, f"{work}/dead").unlink()

    with tempfile.TemporaryDirectory() as folder:
        work = f"{folder}/work"
        os.chmod(folder, 0o777)
        assert forked(bind_twice).wait() == 0
        os.chmod(work, 0o755)


def test_paths_and_modes_that_can_not_be(tmp_path, bound):
    for name in ("", "\0abstract", b"\0abstract", "in\0side"):
        for call in (bound, sockets.check_path):
            with pytest.raises(
                ValueError, match="a socket's path can't be empty, abstract or contain NUL: '"
            ):
                call(name)
    long = f"{tmp_path}/{'x' * 200}"[:108]
    for call in (bound, sockets.check_path):
        with pytest.raises(OSError, match=f"'{long}' has 108 bytes, a socket's path at most 107") as caught:
            call(long)
        assert caught.value.errno == errno.ENAMETOOLONG
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path}/nowhere/sock'"):
        bound(tmp_path / "nowhere" / "sock")
    for mode, shown in ((0o1600, "0o1600"), (-1, "-0o1")):
        with pytest.raises(ValueError, match=f"mode must be permission bits from 0 to 0o777, not {shown}"):
            bound(mode=mode)
    assert os.listdir(tmp_path) == []


def test_a_path_is_counted_in_bytes(tmp_path, bound, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sockets.check_path(b"\xff") == os.fsdecode(b"\xff")
    for name in ("x" * 107, "ä" * 53 + "x", b"\xff" * 107):
        assert bound(name)[1].unlink()
    with pytest.raises(OSError, match="has 108 bytes") as caught:
        bound("ä" * 54)
    assert caught.value.errno == errno.ENAMETOOLONG


def test_sockets_that_can_not_be_bound(tmp_path, bound):
    sock, _ = bound(tmp_path / "first")
    with pytest.raises(OSError, match=f"'{tmp_path}/second'$") as caught:
        sockets.bind_unix(sock, tmp_path / "second")
    assert caught.value.errno == errno.EINVAL
    sock.close()
    with pytest.raises(OSError) as caught:
        sockets.bind_unix(sock, tmp_path / "second")
    assert caught.value.errno == errno.EBADF
    with socket.socket() as tcp, pytest.raises(TypeError):
        sockets.bind_unix(tcp, tmp_path / "second")
    assert os.listdir(tmp_path) == ["first"]


def test_a_file_that_can_not_get_its_mode_goes_again(tmp_path, forked):
    def bind(_ready):
        with socket.socket(socket.AF_UNIX) as sock:
            free = os.dup(sock.fileno())
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))
            os.umask(0o777)
            with pytest.raises(OSError, match=str(tmp_path)) as caught:
                sockets.bind_unix(sock, tmp_path / "sock")
            assert caught.value.errno == errno.EMFILE

    assert forked(bind).wait() == 0
    assert os.listdir(tmp_path) == []


def locked(path):
    """As another process of this user does it that replaces the socket at *path*."""
    fd = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def test_a_lock_is_waited_for_but_not_for_ever(tmp_path, bound):
    path = tmp_path / "sock"
    dead_socket(path)
    lock = locked(path)
    before = contents(tmp_path)
    for timeout in (0, 0.05):
        with pytest.raises(
            TimeoutError, match=f"lock of '{tmp_path}/.sock.lock', to bind '{path}'"
        ) as caught:
            bound(timeout=timeout)
        assert caught.value.errno == errno.ETIMEDOUT
    assert contents(tmp_path) == before
    bound(tmp_path / "free", timeout=0)[1].unlink()  # nothing to be replaced, no lock
    os.close(lock)
    assert bound(timeout=0)[1].unlink(), "what a killed process has locked is free again"
    assert os.listdir(tmp_path) == [], "the lock goes too"


def test_the_lock_of_a_name_that_went_meanwhile_is_none(tmp_path, forked):
    """Who waits for it gets it when its holder has removed it; by then another one may have made it anew."""
    path = tmp_path / "sock"
    dead_socket(path)
    first = locked(path)

    def wait(ready):
        os.close(first)
        with socket.socket(socket.AF_UNIX) as sock, during("fcntl.flock", ready):
            sockets.bind_unix(sock, path, timeout=PATIENCE).unlink()

    waiting = forked(wait)
    waiting.wait_ready()
    os.unlink(tmp_path / ".sock.lock")
    second = locked(path)
    os.close(first)
    select.select([], [], [], A_MOMENT)
    assert not ended(waiting), "the second one is held"
    os.unlink(tmp_path / ".sock.lock")
    os.close(second)
    assert waiting.wait() == 0
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_s_locks_hold_nobody_up(tmp_path, bound, forked):
    path = tmp_path / "sock"
    dead_socket(path)
    os.chmod(tmp_path, 0o755)

    def other(ready):
        fd = os.open(tmp_path, os.O_RDONLY)
        os.setuid(user_of_its_own())
        fcntl.flock(fd, fcntl.LOCK_EX)
        ready()
        signal.pause()

    forked(other).wait_ready()
    assert bound(timeout=0)[1].unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_lock_of_another_user_is_refused(tmp_path, bound):
    dead_socket(tmp_path / "sock")
    lock = tmp_path / ".sock.lock"
    lock.touch()
    os.chown(lock, 12345, -1)
    with pytest.raises(PermissionError, match=f"'{lock}' belongs to user 12345, not to 0") as caught:
        bound()
    assert caught.value.errno == errno.EPERM
    assert sorted(os.listdir(tmp_path)) == [".sock.lock", "sock"]


@pytest.mark.parametrize("what", ["text", "folder", "link"])
def test_what_is_no_lock_is_left_alone(tmp_path, bound, what):
    dead_socket(tmp_path / "sock")
    lock = tmp_path / ".sock.lock"
    if what == "text":
        lock.write_text("mine")
    elif what == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    with pytest.raises(OSError, match=str(lock)) as caught:
        bound()
    assert caught.value.errno == {"text": errno.EEXIST, "folder": errno.EISDIR, "link": errno.ELOOP}[what]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("refused", [False, True])
def test_the_lock_is_given_back_whoever_has_a_copy(tmp_path, bound, forked, refused):
    """A child that another thread forks meanwhile, for one."""
    path = tmp_path / "sock"
    dead_socket(path)
    if refused:
        os.link(path, tmp_path / "other")
    children = []

    def fork_once():
        if not children:
            children.append(None)
            children.append(forked(lambda _: signal.pause()))

    with during("fcntl.flock", fork_once):
        if refused:
            with pytest.raises(FileExistsError, match="has 2 names"):
                bound()
            os.unlink(tmp_path / "other")
        else:
            bound()[1].unlink()
            dead_socket(path)  # the child has that which was bound
        bound(timeout=0)
    assert not ended(children[1])


@pytest.mark.parametrize("left", [False, True])
def test_of_those_that_race_for_a_path_exactly_one_wins(tmp_path, forked, left):
    """Round after round six start at once, with and without a dead socket in their way."""
    path = tmp_path / "sock"
    racers = 6

    def race(ready, gate):
        with socket.socket(socket.AF_UNIX) as sock:
            ready()
            os.read(gate, 1)
            try:
                sockets.bind_unix(sock, path)
            except OSError as error:
                sys.exit(10 if error.errno == errno.EADDRINUSE else 11)
            sock.listen()
            os.write(said, b"w")
            signal.pause()  # killed here: so it leaves a dead socket for the next round

    for _ in range(4):
        if not left:
            path.unlink(missing_ok=True)
        elif not path.exists():
            dead_socket(path)
        gate, opener = os.pipe()
        told, said = os.pipe()
        children = [forked(race, gate) for _ in range(racers)]
        for child in children:
            child.wait_ready()
        os.write(opener, b"." * racers)
        assert select.select([told], [], [], PATIENCE)[0], "somebody wins"
        eventually(lambda: sum(not ended(child) for child in children) == 1)  # noqa: B023
        running = [child for child in children if not ended(child)]
        assert [child.wait() for child in children if child not in running] == [10] * (racers - 1)
        assert os.read(told, 10) == b"w"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        running[0].kill()
        running[0].wait()
        for fd in (gate, opener, told, said):
            os.close(fd)


def test_nobody_comes_between_the_look_at_a_dead_socket_and_its_removal(tmp_path, forked):
    path = tmp_path / "sock"
    dead_socket(path)
    gate, opener = os.pipe()

    def first(ready):
        with socket.socket(socket.AF_UNIX) as sock:
            with during("os.remove", lambda: (ready(), os.read(gate, 1))):
                sockets.bind_unix(sock, path)
            sock.listen()
            sock.accept()

    def second(ready):
        with socket.socket(socket.AF_UNIX) as sock, during("fcntl.flock", ready):
            try:
                sockets.bind_unix(sock, path)
            except OSError as error:
                sys.exit(10 if error.errno == errno.EADDRINUSE else 11)

    one = forked(first)
    one.wait_ready()
    two = forked(second)
    two.wait_ready()
    os.write(opener, b"..")  # for the removal of the dead socket, and for that of the lock's file
    assert two.wait() == 10

    def reached():
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(path)) == 0

    eventually(reached)  # bound, but perhaps not yet listening, when the second gave up
    assert one.wait() == 0
    os.close(gate)
    os.close(opener)


# --- the example ---------------------------------------------------------------------------------


def test_the_example(capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "urgent.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines() == [
        "urgent: 2",
        "read: AB1CD, then the mark",
        "read: EF",
    ]
