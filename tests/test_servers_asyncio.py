"""What is special to the asyncio model, on asyncio's own loop and on uvloop; the rest is in test_servers.py."""

import asyncio
import contextlib
import importlib.util
import logging
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path

import pytest
from conftest import PATIENCE, eventually
from serving import (
    NEVER,
    connect,
    connect_unreading,
    exchange,
    half_close_and_drain,
    listen_cramped,
    recv_exact,
    silent,
    streams,
    wait_asleep,
    wait_cut,
)  # fmt: skip

from ipckit.messagelog import MessageLog
from ipckit.servers import EchoService, Service, listen, server
from ipckit.servers.asyncio_loop import AsyncioLoop
from ipckit.servers.loop import READ, WRITE
from ipckit.signals import blocked


class Echo(Service):
    def received(self, piece):
        return piece


@pytest.fixture(scope="module", autouse=True)
def what_uvloop_keeps():
    """A pipe for signals that the first of its loops in a process makes; children have it then."""
    if importlib.util.find_spec("uvloop") is not None:
        new_loop(True).close()


@pytest.fixture(params=["own", "uvloop"])
def uvloop(request):
    if request.param == "uvloop" and importlib.util.find_spec("uvloop") is None:
        pytest.skip("uvloop is not installed")
    return request.param == "uvloop"


@pytest.fixture(params=[EchoService, Echo], ids=["echo", "service"])
def service(request):
    return request.param


@pytest.fixture
def serving(tmp_path, forked, uvloop):
    """Starts an asyncio server in a child of its own, which checks how its connections ended.

    What it says is in the file "said"; the pipe of its log holds a page."""

    def start(
        service, expected_ends, *, durability="none", before=lambda log: None, listener=None, **options
    ):
        listener = listener or listen()
        stop_timeout = options.pop("stop_timeout", NEVER)
        options.setdefault("idle_timeout", NEVER)

        def child(ready):
            logging.basicConfig(filename=tmp_path / "said", force=True)
            with (
                blocked([signal.SIGTERM, signal.SIGUSR1]),
                MessageLog(tmp_path / "log", format="record", durability=durability, capacity=4096) as log,
            ):
                descriptors = len(os.listdir("/proc/self/fd")) - 1  # the listener is closed at the stop
                running = server("asyncio", listener, log, service=service, uvloop=uvloop, **options)
                before(log)
                running.loop.after(0, ready)
                running.serve(stop_timeout=stop_timeout)
                stats = running.stats()
                assert expected_ends in (None, stats.ends), stats
                assert stats.open == 0
                assert len(os.listdir("/proc/self/fd")) == descriptors
                os.kill(log.logger.pid, signal.SIGCONT)

        running = forked(child)
        address = listener.getsockname()
        listener.close()
        running.wait_ready()
        return address, running

    return start


def new_loop(uvloop):
    if not uvloop:
        return asyncio.new_event_loop()
    from uvloop import new_event_loop

    return new_event_loop()


def stop(running):
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait() == 0


def stop_the_logger(log):
    os.kill(log.logger.pid, signal.SIGSTOP)


def logger_of(pid):
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


PIECE = b"p" * 2880
"""of which the pipe of the log holds one, but not two"""


def fill_log(client, durability="none"):
    """Send more than the log takes while its logger stands still; how much is still to come."""
    if durability == "none":
        assert exchange(client, PIECE) == PIECE, "there was room for it"
    client.sendall(PIECE)
    return len(PIECE)


def test_a_large_stream_comes_back_whole_in_pieces(serving, service, tmp_path):
    address, running = serving(service, {"done": 1})
    data = os.urandom(1 << 20)
    with connect(address) as client:
        got, sent = bytearray(), 0
        client.setblocking(False)
        while len(got) < len(data):
            writing = [client] if sent < len(data) else []
            readable, writable, _ = select.select([client], writing, [], PATIENCE)
            assert readable or writable
            if writable:
                sent += client.send(data[sent:])
                if sent == len(data):
                    client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(BlockingIOError):
                got += client.recv(65536)
        assert got == data
        client.setblocking(True)
        assert client.recv(1) == b""
    stop(running)
    assert streams(tmp_path / "log") == {1: data}
    assert max(map(len, (tmp_path / "log").read_bytes().splitlines(keepends=True))) <= select.PIPE_BUF


def test_who_reads_nothing_is_read_no_more_and_nobody_else_waits(serving, service):
    address, running = serving(service, {"reset": 1, "done": 1}, listener=listen_cramped())
    with connect(address, receive_buffer=4096) as unreading, connect(address) as other:
        before = resident(running.pid)
        sent = 0
        unreading.setblocking(False)
        while select.select([], [unreading], [], 0)[1]:
            with contextlib.suppress(BlockingIOError):
                sent += unreading.send(bytes(1 << 16))
            if not select.select([], [unreading], [], 0)[1]:
                wait_asleep(running.pid, seconds=0.01)  # it reads no more
            assert sent < 64 << 20
        assert exchange(other, b"me") == b"me"
        assert resident(running.pid) - before < 48 << 20
    stop(running)


def test_who_does_not_read_is_cut(serving, service):
    address, running = serving(service, {"not read": 1}, idle_timeout=0.3, listener=listen_cramped())
    with connect_unreading(address) as unreading:
        wait_cut(unreading)
    stop(running)


def resident(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


class Long(Service):
    def received(self, piece):
        return bytes(32 << 20)


def test_who_reads_slowly_is_not_idle(serving):
    address, running = serving(Long, None, idle_timeout=0.5, max_output=32 << 20)
    while not read_slowly(address, seconds=0.75):
        pass  # this process stood still for as long as one that is idle: try again
    stop(running)


def read_slowly(address, seconds):
    """Read for so long, a little at a time; False if it was not fast enough to count as reading."""
    with connect(address) as slow:
        slow.sendall(b"x")
        began = last = time.monotonic()
        while last - began < seconds:
            got = len(recv_exact(slow, 1 << 18))
            now = time.monotonic()
            if now - last > 0.2:
                return False
            assert got == 1 << 18, "cut"
            last = now
            time.sleep(0.02)
        slow.shutdown(socket.SHUT_WR)
        assert recv_exact(slow, 1 << 30)
    return True


@pytest.mark.parametrize("durability", ["none", "written", "synced"])
def test_a_log_that_stands_still_stops_only_those_that_wait_for_it(serving, service, tmp_path, durability):
    address, running = serving(service, {"done": 3}, durability=durability, before=stop_the_logger)
    with connect(address) as one, connect(address) as late:
        due = fill_log(one, durability)
        late.sendall(b"l" * 2880)
        os.kill(running.pid, signal.SIGUSR1)
        eventually(lambda: "statistics" in (tmp_path / "said").read_text())
        with connect(address) as quiet:  # accepted, and its end is seen
            assert half_close_and_drain(quiet) == b""
        assert silent(one, late)
        wait_asleep(running.pid)
        os.kill(logger_of(running.pid), signal.SIGCONT)
        assert len(recv_exact(one, due)) == due
        assert recv_exact(late, 2880) == b"l" * 2880
    stop(running)
    sizes = sorted(map(len, streams(tmp_path / "log").values()))
    assert sizes == [2880, 2 * 2880 if durability == "none" else 2880]


def test_what_waits_for_the_log_is_cut_at_the_stop(serving, service):
    address, running = serving(service, {"cut": 2}, stop_timeout=0.2, before=stop_the_logger)
    with connect(address) as one, connect(address) as two:
        fill_log(one)
        two.sendall(PIECE)
        assert silent(one, two)
        stop(running)


def test_a_killed_logger_is_replaced(serving, service, tmp_path):
    address, running = serving(service, {"done": 1}, durability="written")
    with connect(address) as client:
        for number in range(20):
            logger = logger_of(running.pid)
            os.kill(logger, signal.SIGKILL)
            assert exchange(client, b"%d\n" % number) == b"%d\n" % number
    stop(running)
    assert streams(tmp_path / "log") == {1: b"".join(b"%d\n" % number for number in range(20))}


def test_out_of_descriptors_it_waits_quietly(serving, service, tmp_path):
    address, running = serving(service, {"done": 11})
    with connect(address) as held:
        assert exchange(held, b"held") == b"held"
        most = len(os.listdir(f"/proc/{running.pid}/fd"))
        began = time.monotonic()
        resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (most, 4096))
        waiting = [connect(address) for _ in range(10)]
        for client in waiting:
            client.sendall(b"w")
        eventually(lambda: "new connections wait" in (tmp_path / "said").read_text())
        wait_asleep(running.pid)
        assert exchange(held, b"still") == b"still"
        resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (4096, 4096))
        for client in waiting:
            assert recv_exact(client, 1) == b"w"
            client.close()
    stop(running)
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said, "asyncio's own way"
    lines = said.count("accept: Too many open files; new connections wait")
    assert 1 <= lines <= 1 + time.monotonic() - began, "a line a second"


def test_resets_and_limits(serving, service):
    address, running = serving(service, {"reset": 20, "done": 3}, max_connections=2)
    for _ in range(20):
        client = connect(address)
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    first, second, third = (connect(address) for _ in range(3))
    assert exchange(first, b"1") == b"1"
    assert exchange(second, b"2") == b"2"
    third.sendall(b"3")
    assert silent(third)
    first.close()
    assert recv_exact(third, 1) == b"3"
    second.close()
    third.close()
    stop(running)


class Greets(Service):
    def started(self):
        return bytes(8 << 20)

    def finished(self):
        return b"bye"


def test_a_long_greeting_and_a_farewell(serving):
    address, running = serving(Greets, {"done": 1}, max_output=8 << 20)
    with connect(address) as client:
        client.shutdown(socket.SHUT_WR)
        got = recv_exact(client, 1 << 30)
        assert (len(got), got[-3:]) == ((8 << 20) + 3, b"bye")
    stop(running)


# --- the loop ------------------------------------------------------------------------------------


@pytest.fixture
def loop(uvloop):
    made = AsyncioLoop(new_loop(uvloop))
    yield made
    made.close()


def test_the_loop_watches_and_forgets(loop):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        calls = []
        loop.watch(ours, READ | WRITE, calls.append)
        while not calls:
            loop.turn(time.monotonic() + 0.05)
        assert set(calls) == {WRITE}
        loop.forget(ours)
        assert not loop.watches(ours)
        loop.watch(ours, READ, lambda events: (calls.append(ours.recv(9)), loop.wake()))
        theirs.sendall(b"x")
        loop.turn()
        assert calls[-1] == b"x"
        loop.forget(ours)
        loop.forget(ours)


def test_the_loops_moments(loop):
    calls = []
    began = time.monotonic()
    loop.every(0.01, lambda: (calls.append("again"), loop.wake()))
    loop.after(0.05, lambda: (calls.append("once"), loop.wake()))
    while "once" not in calls or calls.count("again") < 3:
        loop.turn()
        assert "once" not in calls or time.monotonic() - began >= 0.04  # uvloop counts whole milliseconds
    assert calls.count("once") == 1
    loop.turn(time.monotonic())


def test_an_error_of_a_handler_comes_out_of_turn(loop):
    def fails():
        raise OSError(5, "no use")

    loop.after(0, fails)
    with pytest.raises(OSError, match="no use"):
        loop.turn()
    loop.turn(time.monotonic())


def test_uvloop_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvloop", None)
    with listen() as listener:
        with pytest.raises(ImportError):
            server("asyncio", listener, uvloop=True)
        server("asyncio", listener).loop.close()
