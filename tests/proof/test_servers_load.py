"""Shortage, a full disk, slow crowds and endless rotation, under every model that can meet them.

By default a slice of each proof; the whole with IPCKIT_PROOF=1 (``make proof``).
"""

import contextlib
import ctypes
import errno
import os
import random
import resource
import select
import signal
import socket
import time

import pytest
from conftest import PATIENCE, eventually
from fire import WHOLE, slice_of
from serving import (
    Crowd,
    Served,
    assert_logged,
    chatter,
    connect,
    cpu_seconds,
    exchange,
    room_for,
    user_of_its_own,
    wait_asleep,
)  # fmt: skip

from ipckit.messagelog import MessageLog
from ipckit.servers import MODELS, EchoService, listen, serve
from ipckit.signals import blocked

pytestmark = [pytest.mark.proof, *([pytest.mark.timeout(1500)] if WHOLE else [])]


def every(*models):
    """For each of these models that there are; without names for all."""
    return pytest.mark.parametrize("model", [name for name in MODELS if name in (models or MODELS)])


def stopped(server):
    """Stop it as an operator does; what it printed."""
    code, printed = server.stop()
    assert code == 0, printed
    return printed


@contextlib.contextmanager
def many_descriptors(count):
    """For this process and the servers that it starts."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(count, before[0]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# --- out of descriptors, out of processes ----------------------------------------------------------


def served_within(clients, seconds, enough=None):
    """Those that are answered within so many seconds (each has sent a "w"), or *enough* of them."""
    end = time.monotonic() + seconds
    waiting = {client.fileno(): client for client in clients}
    rest = len(clients) - enough if enough else 0
    while len(waiting) > rest and (left := end - time.monotonic()) > 0:
        poll = select.poll()
        for number in waiting:
            poll.register(number, select.POLLIN)
        for number, _ in poll.poll(left * 1000):
            assert waiting.pop(number).recv(1) == b"w"
    return [client for client in clients if client.fileno() not in waiting]


def without(clients, others):
    return [client for client in clients if client not in others]


@every()
def test_out_of_descriptors(model, tmp_path):
    with (
        Served(tmp_path / "log", *room_for(model, 300), model=model) as server,
        contextlib.ExitStack() as stack,
    ):
        held = stack.enter_context(server.connect())
        assert exchange(held, b"held") == b"held"
        few = len(os.listdir(f"/proc/{server.pid}/fd")) + 3
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (few, 4096))
        began = time.monotonic()
        clients = [stack.enter_context(server.connect()) for _ in range(200)]
        for client in clients:
            client.sendall(b"w")
        if model != "iterative":
            eventually(lambda: "new connections wait" in server.errors())
        wait_asleep(server.pid)
        served = served_within(clients, 0.3)
        assert len(served) < 50
        used, start = server.cpu_seconds(), time.monotonic()
        assert served_within(without(clients, served), slice_of(20, 0.5)) == []
        used, seconds = server.cpu_seconds() - used, time.monotonic() - start
        wait_asleep(server.pid)
        assert exchange(held, b"still") == b"still"
        if model == "iterative":  # what it is short of is not descriptors, but itself
            for client in (held, *clients):
                client.shutdown(socket.SHUT_WR)
        start = time.monotonic()
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (4096, 4096))
        waiting = without(clients, served)
        assert served_within(waiting, PATIENCE) == waiting
        after = time.monotonic() - start
        stack.close()
        lines = stopped(server).count("Too many open files; new connections wait")
    assert (0 if model == "iterative" else 1) <= lines <= 1 + time.monotonic() - began, "a line a second"
    print(f"\n{model}: {few} descriptors, 200 clients: {len(served)} served, {len(waiting)} waited for {seconds:.1f} s; "
          f"CPU {used / seconds:.1%}, {lines} lines; all served {after:.3f} s after the release")  # fmt: skip


@every("fork", "prefork", "thread")
def test_out_of_processes(model, tmp_path, forked):
    """Threads are processes to this limit."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become a user whose processes can be limited")
    listener = listen()

    def child(ready):
        user = user_of_its_own()
        with blocked([signal.SIGTERM]), MessageLog(tmp_path / "log") as log:
            os.setresuid(user, user, user)
            most = 3 + (model != "thread")  # the server, two that serve, the spawner
            resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
            ready()
            stats = serve(EchoService, listener, model=model, log=log)
            assert stats.ends == {"done": 5}, stats

    server = forked(child)
    address = listener.getsockname()
    listener.close()
    server.wait_ready()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(address)) for _ in range(5)]
        for client in clients:
            client.sendall(b"w")
        served = served_within(clients, PATIENCE, enough=2)
        waiting = without(clients, served)
        used, start = cpu_seconds(server.pid), time.monotonic()
        assert served_within(waiting, slice_of(20, 0.5)) == []
        used, seconds = cpu_seconds(server.pid) - used, time.monotonic() - start
        wait_asleep(server.pid)
        for client in served:
            assert exchange(client, b"still") == b"still"
        while waiting:  # each that ends makes room for another one
            served.pop().close()
            served += served_within(waiting, PATIENCE, enough=1)
            waiting = without(waiting, served)
            assert len(served) == 2
    server.kill(signal.SIGTERM)
    assert server.wait() == 0
    print(f"\n{model}: 2 workers, 5 clients: 3 waited for {seconds:.1f} s; CPU {used / seconds:.1%}")


# --- a full disk -----------------------------------------------------------------------------------

_DISK = 8 << 20


def own_disk(path):
    """A tmpfs in a mount namespace of this process's own."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private_and_below = 0x20000, 0x44000
    if os.geteuid() or libc.unshare(new_mounts):
        return False
    libc.mount(b"none", b"/", None, private_and_below, None)
    return libc.mount(b"tmpfs", str(path).encode(), b"tmpfs", 0, b"size=%d" % _DISK) == 0


@every()
def test_a_full_disk(model, tmp_path, forked):
    """The clients send more than the file and the log's pipe can take, so all that serve wait for them."""

    def child(_):
        if not own_disk(tmp_path):
            raise SystemExit(77)
        ballast, path = tmp_path / "ballast", tmp_path / "log"
        ballast.write_bytes(bytes(_DISK - 100_000))
        with Served(path, "--format", "record", "--json", model=model) as server, Crowd() as crowd:
            for seed in range(4):
                crowd.add(server.connect(), [random.Random(seed).randbytes(1 << 20)])
            crowd.run(until=lambda: is_full(server))
            eventually(lambda: stands_still(crowd, server))
            stuck = crowd.answered()
            used, start = server.cpu_seconds(), time.monotonic()
            crowd.run_for(slice_of(20, 0.3))
            used, seconds = server.cpu_seconds() - used, time.monotonic() - start
            assert crowd.answered() == stuck, "the log waits, so there are no echoes"
            assert is_full(server)
            ballast.unlink()
            start = time.monotonic()
            crowd.run()
            after = time.monotonic() - start
            assert [len(client.got) for client in crowd.clients] == [1 << 20] * 4
            stopped(server)
            assert_logged(crowd.clients, path)
        print(f"\n{model}: {stuck:,} bytes echoed, then the disk was full for {seconds:.1f} s: CPU {used / seconds:.1%}; "
              f"all of 4,194,304 echoed and logged {after:.3f} s after there was room")  # fmt: skip

    server = forked(child)
    status = server.wait()
    if status == 77:
        pytest.skip("no mount namespace to be had")
    assert status == 0


def is_full(server):
    """What it answers to SIGUSR1."""
    before = server.errors().count('"statistics"')
    server.process.send_signal(signal.SIGUSR1)
    eventually(lambda: server.errors().count('"statistics"') > before)
    told = [fields for event, fields in server.events() if event == "statistics"]
    return told[-1]["log"]["error"] == errno.ENOSPC


def stands_still(crowd, server):
    """What the server has answered is there, and it waits."""
    before = crowd.answered()
    wait_asleep(server.pid, *server.children()[0])
    crowd.run_for(0.05)
    return crowd.answered() == before


# --- slowloris -------------------------------------------------------------------------------------


@every("epoll", "prefork")
def test_a_crowd_of_slow_clients(model, tmp_path):
    """Each sends a byte every few seconds; who is fresh is served as if they were not there."""
    crowd, pause, lasting = slice_of(1000, 100), slice_of(10, 0.5), slice_of(35.0, 2.5)
    options = (*room_for(model, crowd + 100), "--total-timeout", lasting, "--json")
    with (
        many_descriptors(3000),
        Served(tmp_path / "log", *options, model=model) as server,
        contextlib.ExitStack() as stack,
    ):
        began = time.monotonic()
        slow = SlowCrowd([stack.enter_context(server.connect()) for _ in range(crowd)], began)
        times, turn = [], 0
        while slow.clients and time.monotonic() - slow.began < lasting + PATIENCE:
            # A few at a time, so that each has its turn once in every pause.
            slow.send_bytes(turn % 50, 50)
            slow.note_ends()
            times.append(fresh_round_trip(server))
            turn += 1
            select.select([], [], [], max(0, slow.began + turn * pause / 50 - time.monotonic()))
        stopped(server)
        (last,) = [fields for event, fields in server.events() if event == "served"]
    assert not slow.clients, "not all were cut"
    assert last["ends"]["expired"] == crowd
    first, latest = min(slow.ends), max(slow.ends)
    assert lasting <= first
    times.sort()
    p50, p99 = times[len(times) // 2], times[len(times) * 99 // 100]
    print(f"\n{model}: {crowd} slow clients, a byte per {pause} s: round trip of {len(times)} fresh ones p50 {p50 * 1e3:.2f} ms, "
          f"p99 {p99 * 1e3:.2f} ms; the slow ones were cut after {first:.2f} to {latest:.2f} s "
          f"(total timeout {lasting} s)")  # fmt: skip


class SlowCrowd:
    """Clients that send a byte now and then, and see when they are cut."""

    def __init__(self, connections, began):
        self.began = began
        self.clients = {connection.fileno(): connection for connection in connections}
        self._everyone = connections
        self._poll = select.poll()
        for number, connection in self.clients.items():
            connection.setblocking(False)
            self._poll.register(number, select.POLLIN)
        self.ends = []
        """seconds after which each was cut"""

    def send_bytes(self, first, step):
        for connection in self._everyone[first::step]:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # it has been cut
                connection.send(b"s")

    def note_ends(self):
        for number, _ in self._poll.poll(0):
            if not self._goes_on(self.clients[number]):
                self._poll.unregister(number)
                del self.clients[number]
                self.ends.append(time.monotonic() - self.began)

    @staticmethod
    def _goes_on(connection):
        try:
            return connection.recv(100) != b""
        except ConnectionResetError:
            return False


def fresh_round_trip(server):
    start = time.monotonic()
    with server.connect() as client:
        assert exchange(client, b"fresh") == b"fresh"
    return time.monotonic() - start


# --- rotation --------------------------------------------------------------------------------------


@every(*([] if WHOLE else ["fork", "epoll"]))  # tests/test_servers.py has a short one for each
def test_rotation_every_100_ms(model, tmp_path):
    path, files = tmp_path / "log", []
    with Served(path, "--format", "record", "--json", model=model) as server, Crowd() as crowd:
        for seed in range(4):
            crowd.add(server.connect(), chatter(seed, longest=60), each_waits=True)
        end = time.monotonic() + slice_of(60, 3)
        while time.monotonic() < end:
            crowd.run_for(0.1)
            files.append(tmp_path / f"log.{len(files)}")
            path.rename(files[-1])
            server.process.send_signal(signal.SIGHUP)
            crowd.run(until=path.exists)
        crowd.finish()
        stopped(server)
        assert "log kept" not in server.errors(), "a reopening failed"
        assert_logged(crowd.clients, *files, path)
        print(f"\n{model}: {len(files)} rotations under load: {crowd.answered():,} bytes echoed, "
              f"each in one of the files, once and in order")  # fmt: skip
